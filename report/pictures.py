"""Boxes on images, sheets of pictures, and curves for a web page.

Boxes are (x1, y1, x2, y2) in pixels of the image on which they are drawn. A colour is a name that
PIL knows, or (red, green, blue), 0 to 255.
"""
from collections.abc import Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from qwen.answer import Box

Colour = str | tuple[int, int, int]
CURVE_COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b")
CURVE_POINTS = 300                # at most: a drawing is too narrow for more


def draw_boxes(image: Image.Image, boxes: Sequence[tuple[Box, Colour]], caption: str = "",
               width: int = 336) -> Image.Image:
    """A copy of the image, `width` pixels wide, with boxes on it and the caption below."""
    scale = width / image.width
    # Enlarged pixels stay square, so the picture adds no detail to the image.
    method = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BICUBIC
    picture = image.resize((width, max(1, round(image.height * scale))), method)
    pen = ImageDraw.Draw(picture)
    for box, colour in boxes:
        pen.rectangle([v * scale for v in box], outline=colour, width=2)
    font = ImageFont.load_default(13)
    lines = wrap(caption, font, width - 8)
    captioned = Image.new("RGB", (width, picture.height + 16 * len(lines) + 6), "white")
    captioned.paste(picture)
    ImageDraw.Draw(captioned).text(
        (4, picture.height + 2), "\n".join(lines), fill="black", font=font, spacing=2)
    return captioned


def wrap(text: str, font: Any, width: float) -> list[str]:
    """The text in lines of at most `width` pixels, unless a word is longer."""
    lines = [""]
    # The font has only ASCII letters.
    for word in text.encode("ascii", "replace").decode().split():
        longer = f"{lines[-1]} {word}".strip()
        if not lines[-1] or font.getlength(longer) < width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def contact_sheet(images: Sequence[Image.Image], columns: int = 4) -> Image.Image:
    """Images of the same width, in rows."""
    column_width = images[0].width + 8
    corners = []
    top = 0
    for first in range(0, len(images), columns):
        row = images[first:first + columns]
        corners += [(column * column_width, top) for column in range(len(row))]
        top += max(image.height for image in row) + 8
    sheet = Image.new("RGB", (min(columns, len(images)) * column_width, top), "white")
    for image, corner in zip(images, corners):
        sheet.paste(image, corner)
    return sheet


def overlay(image: Image.Image, boxes: Sequence[tuple[Box, str, Colour]]) -> Image.Image:
    """A copy of the image in full size with (box, label, colour)."""
    image = image.convert("RGB")
    pen = ImageDraw.Draw(image)
    longer_side = max(image.size)
    line_width = max(1, round(longer_side / 200))
    font = ImageFont.load_default(max(10, longer_side // 40))
    for (x1, y1, x2, y2), label, colour in boxes:
        # PIL includes the last pixel; a box ends before it.
        corners = (x1, y1, max(x1, x2 - 1), max(y1, y2 - 1))
        pen.rectangle(corners, outline=colour, width=line_width)
        label = label.encode("ascii", "replace").decode()
        pen.text((x1 + line_width, y1 + line_width), label, fill=colour, font=font)
    return image


def draw_rollouts(image: Image.Image, boxes: Sequence[Box | None], rewards: Sequence[float],
                  target: Box, text: str = "", width: int = 336) -> Image.Image:
    """A group's boxes on its image: red for the lowest reward, orange for the highest.
    boxes: one per rollout, None or NaN without one. text: of a caption, which adds the range of the
    rewards. The target is drawn last, in green, which is why the highest reward is not yellow."""
    lowest, highest = min(rewards), max(rewards)
    coloured: list[tuple[Box, Colour]] = []
    for box, reward in zip(boxes, rewards):
        if box and box[0] == box[0]:
            green = int(200 * (reward - lowest) / (highest - lowest + 1e-6))
            coloured.append((box, (255, green, 0)))
    caption = f"{text} (reward {lowest:.2f} to {highest:.2f})" if text else ""
    return draw_boxes(image, [*coloured, (target, "lime")], caption, width)


def curve(series: Sequence[tuple[str, Sequence[tuple[float, float]]]], width: int = 320,
          height: int = 170) -> str:
    """One drawing of all curves -> an HTML figure with an SVG; "" if no curve has two points.
    series: (name, points); a name is HTML, and a point is (step, value)."""
    series = [(name, spread(points, CURVE_POINTS)) for name, points in series if len(points) > 1]
    if not series:
        return ""
    steps = [step for _, points in series for step, _ in points]
    values = [value for _, points in series for _, value in points]
    first, last = min(steps), max(steps)
    low, high = min(values), max(values)
    x_scale = (width - 8) / (last - first or 1)
    y_scale = (height - 36) / (high - low or 1)
    names = []
    drawing = ""
    for i, (name, points) in enumerate(series):
        turn, place = divmod(i, len(CURVE_COLOURS))
        # Curves that repeat a colour are dashed.
        dashes = f' stroke-dasharray="{3 * turn} 3"' if turn else ""
        at = " ".join(
            f"{4 + x_scale * (x - first):.1f},{height - 18 - y_scale * (y - low):.1f}"
            for x, y in points)
        drawing += (f'<polyline fill="none" stroke="{CURVE_COLOURS[place]}" stroke-width="1.5"'
                    f'{dashes} points="{at}"/>')
        names.append(f'<span style="color:{CURVE_COLOURS[place]}">{name}</span>')
    for x, y, words in ((4, 12, f"{high:.4g}"), (4, height - 4, f"{low:.4g}"),
                        (width / 2, height - 4, f"step {first} to {last}")):
        drawing += f'<text x="{x}" y="{y}" font-size="11" fill="#666">{words}</text>'
    return (f'<figure><figcaption>{" ".join(names)}</figcaption>'
            f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
            f"{drawing}</svg></figure>")


def spread(items: Sequence[Any], n: int) -> Sequence[Any]:
    """At most n of the items, evenly spread, including the first and the last."""
    if len(items) <= n:
        return items
    return [items[i * (len(items) - 1) // (n - 1)] for i in range(n)]
