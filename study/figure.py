"""The figure of a study: differences with their intervals, grouped by table, for print in black."""
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

SCALE = 2                      # of everything below, so that it is sharp when printed
ROW = 22                       # pixels, height of a line
PLOT = 420                     # pixels, width of the part with the intervals
MARGIN = 14                    # pixels around all, and between labels and the plot
# Steps between the marks of the axis: the finest of which a dozen are enough.
STEPS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
MARKS = 8
AXIS = ("difference in mIoU (0 to 1), 95% interval over scenes; small lines: the seeds; "
        "hollow: 0 lies within")


@dataclass
class Bar:
    """A difference."""

    label: str
    low: float                 # its 95% interval
    high: float
    of_seeds: Sequence[float]  # of each seed; their mean is the dot

    @property
    def mean(self) -> float:
        return sum(self.of_seeds) / len(self.of_seeds)


@dataclass
class Group:
    """The differences of one table in one regime."""

    title: str
    bars: Sequence[Bar]


@dataclass
class Axis:
    """Values that are drawn, and where on the image."""

    low: float                 # value at the left end
    high: float
    left: float                # pixels
    step: float                # between marks

    def x(self, value: float) -> float:
        """The pixel of a value."""
        return self.left + PLOT * SCALE * (value - self.low) / (self.high - self.low)

    def marks(self) -> list[float]:
        first = round(self.low / self.step)
        last = round(self.high / self.step)
        return [k * self.step for k in range(first, last + 1)]


def draw(groups: Sequence[Group]) -> Image.Image:
    """Groups under their titles, all over one axis, zero marked in each."""
    font = ImageFont.load_default(13 * SCALE)
    texts = [group.title for group in groups]
    for group in groups:
        texts += [bar.label for bar in group.bars]
    widest = max(font.getlength(text) for text in texts)
    axis = fit_axis(groups, widest + 2 * MARGIN * SCALE)
    width = max(axis.left + PLOT * SCALE, MARGIN * SCALE + font.getlength(AXIS))
    # A group has a line for its title, one for each bar, one for the marks, half of one free.
    lines = sum(len(group.bars) + 2.5 for group in groups) + 1
    size = (round(width + 2 * MARGIN * SCALE), round((lines * ROW + 2 * MARGIN) * SCALE))
    image = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(image)
    y = MARGIN * SCALE
    for group in groups:
        y = draw_group(pen, font, group, axis, y)
    pen.text((MARGIN * SCALE, y), AXIS, fill="black", font=font)
    return image


def fit_axis(groups: Sequence[Group], left: float) -> Axis:
    """One axis for all groups: it holds every interval and seed, and zero."""
    ends = [0.0]
    for group in groups:
        for bar in group.bars:
            ends += [bar.low, bar.high, *bar.of_seeds]
    spread = max(ends) - min(ends)
    step = next((s for s in STEPS if spread <= MARKS * s), STEPS[-1])
    # Whole steps on both sides, one at least.
    low = step * min(-1, int(min(ends) / step) - 1)
    high = step * max(1, int(max(ends) / step) + 1)
    return Axis(low, high, left, step)


def draw_group(
        pen: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont, group: Group, axis: Axis,
        y: float,
) -> float:
    """Draws a group from this height on -> the height below it."""
    height = ROW * SCALE
    pen.text((MARGIN * SCALE, y), group.title, fill="black", font=font, stroke_width=1,
             stroke_fill="black")
    top = y + height
    bottom = top + len(group.bars) * height
    for value in axis.marks():
        zero = abs(value) < axis.step / 2
        colour = "black" if zero else "#cccccc"
        pen.line([axis.x(value), top, axis.x(value), bottom], fill=colour,
                 width=SCALE * 2 if zero else SCALE)
        text = "0" if zero else f"{value:+.3g}"
        pen.text((axis.x(value), bottom + 2), text, fill="black", font=font, anchor="ma")
    for i, bar in enumerate(group.bars):
        draw_bar(pen, font, bar, axis, top + (i + 0.5) * height)
    return bottom + 1.5 * height


def draw_bar(
        pen: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont, bar: Bar, axis: Axis, y: float,
) -> None:
    """A line: label, interval, seeds, and the dot, hollow where the interval holds zero."""
    pen.text((MARGIN * SCALE, y), bar.label, fill="black", font=font, anchor="lm")
    pen.line([axis.x(bar.low), y, axis.x(bar.high), y], fill="black", width=2 * SCALE)
    for value in bar.of_seeds:
        x = axis.x(value)
        pen.line([x, y - 6 * SCALE, x, y + 6 * SCALE], fill="#555555", width=SCALE)
    x = axis.x(bar.mean)
    radius = 4 * SCALE
    filled = "white" if bar.low <= 0 <= bar.high else "black"
    pen.ellipse([x - radius, y - radius, x + radius, y + radius], fill=filled, outline="black",
                width=SCALE)
