"""Boxes on images, sheets of pictures, and curves for a web page.

Boxes are (x1, y1, x2, y2) in pixels of the image on which they are drawn. A colour is a name that
PIL knows, or (red, green, blue), 0 to 255.
"""
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from qwen.answer import Box

Colour = str | tuple[int, int, int]
# Okabe and Ito's colours, which colour-blind readers can tell apart.
TARGET, ANSWER, BEST = (86, 180, 233), (213, 94, 0), (240, 228, 66)
LEGEND = (("target", TARGET), ("answer", ANSWER))
CURVE_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
CURVE_POINTS = 300                # at most: a drawing is too narrow for more


def draw_boxes(image: Image.Image, boxes: Sequence[tuple[Box, Colour]], caption: str = "",
               width: int = 336, legend: Sequence[tuple[str, Colour]] = ()) -> Image.Image:
    """A copy of the image, `width` pixels wide, with boxes on it; the legend and caption below."""
    scale = width / image.width
    # Enlarged pixels stay square, so the picture adds no detail to the image.
    method = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BICUBIC
    picture = image.resize((width, max(1, round(image.height * scale))), method)
    pen = ImageDraw.Draw(picture)
    for box, colour in boxes:
        x1, y1, x2, y2 = (v * scale for v in box)
        # The dark edge is seen where the image has the colour of the line.
        pen.rectangle((x1 - 1, y1 - 1, x2 + 1, y2 + 1), outline="black", width=4)
        pen.rectangle((x1, y1, x2, y2), outline=colour, width=2)
    font = ImageFont.load_default(13)
    lines = wrap(caption, font, width - 8)
    height = picture.height + 16 * len(lines) + 22 * bool(legend) + 6 * bool(lines)
    captioned = Image.new("RGB", (width, height), "white")
    captioned.paste(picture)
    pen = ImageDraw.Draw(captioned)
    x, y = 4, picture.height + 2
    for name, colour in legend:
        pen.rectangle((x, y + 5, x + 16, y + 12), fill=colour, outline="black")
        pen.text((x + 22, y), name, fill="black", font=font)
        x += 34 + font.getlength(name)
    pen.text((4, y + 22 * bool(legend)), "\n".join(lines), fill="black", font=font, spacing=2)
    return captioned


def wrap(text: str, font: Any, width: float) -> list[str]:
    """The text in lines of at most `width` pixels, unless a word is longer."""
    lines: list[str] = []
    # The font has only ASCII letters.
    for word in text.encode("ascii", "replace").decode().split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) < width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def contact_sheet(images: Sequence[Image.Image], columns: int = 4) -> Image.Image:
    """Images of the same width, in rows."""
    column_width = images[0].width + 8
    rows = [images[first:first + columns] for first in range(0, len(images), columns)]
    heights = [max(image.height for image in row) + 8 for row in rows]
    sheet = Image.new("RGB", (len(rows[0]) * column_width, sum(heights)), "white")
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        sheet.paste(image, (column * column_width, sum(heights[:row])))
    return sheet


def overlay(image: Image.Image, boxes: Sequence[tuple[Box, str, Colour]]) -> Image.Image:
    """A copy of the image in full size with (box, label, colour)."""
    image = image.convert("RGB")
    pen = ImageDraw.Draw(image)
    line_width = max(1, round(max(image.size) / 200))
    font = ImageFont.load_default(max(10, max(image.size) // 40))
    for (x1, y1, x2, y2), label, colour in boxes:
        # PIL includes the last pixel; a box ends before it.
        corners = (x1, y1, max(x1, x2 - 1), max(y1, y2 - 1))
        pen.rectangle(corners, outline=colour, width=line_width)
        label = label.encode("ascii", "replace").decode()
        # Inside the image, and with a white edge: trees and roofs have many colours.
        left = min(x1 + line_width, image.width - font.getlength(label) - 2)
        top = min(y1 + line_width, image.height - 1.3 * font.size)
        pen.text((max(left, 2), max(top, 0)), label, fill=colour, font=font,
                 stroke_width=line_width, stroke_fill="white")
    return image


def draw_rollouts(image: Image.Image, boxes: Sequence[Box | None], rewards: Sequence[float],
                  target: Box, text: str = "", width: int = 336) -> Image.Image:
    """A group's boxes on its image, from ANSWER for the lowest reward to BEST for the highest.
    boxes: one per rollout, None or NaN without one. The target is drawn last."""
    lowest, highest = min(rewards), max(rewards)
    coloured: list[tuple[Box, Colour]] = []
    for box, reward in zip(boxes, rewards):
        if box and box[0] == box[0]:
            share = (reward - lowest) / (highest - lowest + 1e-6)
            colour = tuple(round(low + share * (high - low)) for low, high in zip(ANSWER, BEST))
            coloured.append((box, colour))
    legend = (LEGEND[0], (f"reward {lowest:.2f}", ANSWER), (f"to {highest:.2f}", BEST))
    return draw_boxes(image, [*coloured, (target, TARGET)], text, width, legend)


def curve(title: str, series: Sequence[tuple[str, Sequence[tuple[float, float]]]],
          hours: Mapping[float, float]) -> str:
    """One drawing of all curves -> an HTML figure with an SVG; "" if no curve has two points.
    title: what is drawn and its unit; series: (name, points), a point is (step, value); hours:
    since the first step, if known. Title and names are HTML."""
    series = [(name, spread(points, CURVE_POINTS)) for name, points in series if len(points) > 1]
    if not series:
        return ""
    steps, values = zip(*(point for _, points in series for point in points))
    first, last, low, high = min(steps), max(steps), min(values), max(values)
    width, height, left, bottom = 320, 180, 72, 148
    x_scale, y_scale = (width - left - 8) / (last - first or 1), (bottom - 8) / (high - low or 1)
    drawing = names = ""
    for value in sorted({low, (low + high) / 2, high}):
        y = bottom - y_scale * (value - low)
        drawing += (f'<path stroke="#ddd" d="M{left} {y:.1f}H{width - 8}"/><text x="{left - 6}" '
                    f'y="{y + 4:.1f}" text-anchor="end">{value:.3g}</text>')
    middle = min(steps, key=lambda step: abs(step - (first + last) / 2))
    anchors = {middle: "middle", first: "start", last: "end"}
    for step, anchor in sorted(anchors.items()):
        x = left + x_scale * (step - first)
        words = [f"step {step:,}"] + ([f"{hours[step]:.3g} h"] if step in hours else [])
        for i, word in enumerate(words, 1):
            drawing += (f'<text x="{x:.1f}" y="{bottom + 13 * i}" text-anchor="{anchor}">'
                        f"{word}</text>")
    drawing += f'<path stroke="#444" fill="none" d="M{left} 8V{bottom}H{width - 8}"/>'
    for i, (name, points) in enumerate(series):
        turn, colour = i // len(CURVE_COLOURS), CURVE_COLOURS[i % len(CURVE_COLOURS)]
        # Curves that repeat a colour are dashed.
        line, dashes = ("dashed", f'stroke-dasharray="{3 * turn} 3" ') if turn else ("solid", "")
        at = " ".join(f"{left + x_scale * (x - first):.1f},{bottom - y_scale * (y - low):.1f}"
                      for x, y in points)
        drawing += (f'<polyline {dashes}fill="none" stroke="{colour}" stroke-width="1.5" '
                    f'points="{at}"/>')
        names += f' <span style="border-bottom:3px {line} {colour}">{name}</span>'
    return (f'<figure><figcaption><b>{title}</b>{names}</figcaption><svg viewBox="0 0 {width} '
            f'{height}" width="{width}" height="{height}" font-size="11" fill="#444">'
            f"{drawing}</svg></figure>")


def spread(items: Sequence[Any], n: int) -> Sequence[Any]:
    """At most n of the items, evenly spread, including the first and the last."""
    if len(items) <= n:
        return items
    return [items[i * (len(items) - 1) // (n - 1)] for i in range(n)]
