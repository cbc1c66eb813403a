"""Everything that draws: boxes on images, sheets of pictures, JPEGs and curves for a page.

PIL images go in; PIL images, or text for an HTML page, come out. Boxes are xyxy in
pixels of the image that they are drawn on. A colour is a name that PIL knows, or (red,
green, blue), 0 to 255.
"""
import base64
import io
import itertools
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from report.predictions import Box
from train.dist import T

Colour = str | tuple[int, int, int]
Point = tuple[float, float]
CURVE_COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b")
CURVE_POINTS = 300                # of a curve at most; more can't be told apart
GAP = 8                           # pixels between the pictures of a sheet
# A picture that is too large as a JPEG is tried in these qualities; from the last one
# on it also becomes smaller each time.
QUALITIES = (75, 60, 40, 25, 12, 12, 12, 12)


# ---------------------------------------------------------------- boxes on images

def draw_boxes(
        image: Image.Image, boxes: Sequence[tuple[Box, Colour]], caption: str = "",
        width: int = 336,
) -> Image.Image:
    """Draws boxes on an image of this width, with the caption beneath.

    boxes: (box in pixels of `image`, colour), the later above the earlier. The image
    that is given stays as it is.
    """
    scale = width / image.width
    size = (width, max(1, round(image.height * scale)))
    # Enlarged pixels stay square, so that the eye sees what is in the image and no
    # more.
    method = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BICUBIC
    picture = image.resize(size, method)
    pen = ImageDraw.Draw(picture)
    for box, colour in boxes:
        pen.rectangle([v * scale for v in box], outline=colour, width=2)
    font = ImageFont.load_default(13)
    lines = wrapped(caption, font, width - 8)
    captioned = Image.new("RGB", (width, picture.height + 16 * len(lines) + 6), "white")
    captioned.paste(picture)
    ImageDraw.Draw(captioned).text(
        (4, picture.height + 2), "\n".join(lines), fill="black", font=font, spacing=2)
    return captioned


def wrapped(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """A text -> lines of less than `width` pixels, where its words allow it.

    There is one line at least."""
    lines = [""]
    # The font has ASCII letters alone.
    for word in text.encode("ascii", "replace").decode().split():
        longer = f"{lines[-1]} {word}"
        if font.getlength(longer) < width:
            lines[-1] = longer.strip()
        else:
            lines.append(word)
    return lines


def contact_sheet(images: Sequence[Image.Image], columns: int = 4) -> Image.Image:
    """Images of one width -> one image that shows them in rows."""
    column_width = images[0].width + GAP
    corners = []
    top = 0
    for first in range(0, len(images), columns):
        row = images[first:first + columns]
        corners += [(column * column_width, top) for column in range(len(row))]
        top += max(image.height for image in row) + GAP
    sheet = Image.new("RGB", (min(columns, len(images)) * column_width, top), "white")
    for image, corner in zip(images, corners):
        sheet.paste(image, corner)
    return sheet


def overlay(
        image: Image.Image, boxes: Sequence[tuple[Box, str, Colour]], path: Path | None = None,
) -> Image.Image:
    """Draws (box, label, colour) triples on a copy of an image, in its full size.

    The copy is written to `path` where one is given.
    """
    image = image.convert("RGB")
    pen = ImageDraw.Draw(image)
    longer_side = max(image.size)
    line_width = max(1, round(longer_side / 200))
    font = ImageFont.load_default(max(10, longer_side // 40))
    for (x1, y1, x2, y2), label, colour in boxes:
        # PIL draws the last pixel too, a box ends before it.
        corners = (x1, y1, max(x1, x2 - 1), max(y1, y2 - 1))
        pen.rectangle(corners, outline=colour, width=line_width)
        ascii_label = label.encode("ascii", "replace").decode()
        pen.text((x1 + line_width, y1 + line_width), ascii_label, fill=colour, font=font)
    if path:
        image.save(path)
    return image


# ---------------------------------------------------------------- a group of rollouts

def rollout_boxes(
        boxes: Sequence[Box | None], rewards: Sequence[float], target: Box,
) -> list[tuple[Box, Colour]]:
    """A group's boxes as `draw_boxes` takes them: the redder, the less their reward.

    boxes: G, None where a rollout has none; rewards: G. The target, green, is the last.
    The best of a group is orange rather than yellow, which would be hard to tell from
    the green.
    """
    lowest = min(rewards)
    highest = max(rewards)
    drawn: list[tuple[Box, Colour]] = []
    for box, reward in zip(boxes, rewards):
        if box:
            green = int(200 * (reward - lowest) / (highest - lowest + 1e-6))
            drawn.append((box, (255, green, 0)))
    return [*drawn, (target, "lime")]


def draw_rollouts(
        image: Image.Image, boxes: "Tensor", rewards: "Tensor", target: Box, text: str,
) -> Image.Image:
    """One group's boxes over its image.

    boxes (G, 4), NaN where there is none; rewards (G,)."""
    valid = (~boxes.isnan().any(1)).tolist()
    drawn = [box if ok else None for box, ok in zip(boxes.tolist(), valid)]
    scores = rewards.tolist()
    caption = f"{text} (reward {min(scores):.2f} to {max(scores):.2f})"
    return draw_boxes(image, rollout_boxes(drawn, scores, target), caption)


# ---------------------------------------------------------------- for a page

def jpeg_uri(image: Image.Image, max_bytes: int) -> str:
    """An image -> data URI of a JPEG of `max_bytes` at most.

    What does not fit becomes coarser, then smaller. A picture that still does not fit
    after the last try (a noisy one of several thousand pixels a side) is taken as it
    is.
    """
    for quality in QUALITIES:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=quality, optimize=True)
        if file.tell() <= max_bytes:
            break
        if quality == QUALITIES[-1]:
            image = image.resize([max(1, round(v * 0.7)) for v in image.size])
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def curve(
        series: Sequence[tuple[str, Sequence[Point]]], width: int = 320, height: int = 170,
) -> str:
    """Curves in one drawing -> an HTML figure with an SVG.

    series: (name, points as (step, value)). A name is HTML already. Those of fewer than
    two points are left out; where all are, "" comes back.
    """
    series = [(name, spread(points, CURVE_POINTS)) for name, points in series if len(points) > 1]
    if not series:
        return ""
    all_points = list(itertools.chain.from_iterable(points for _, points in series))
    steps = [step for step, _ in all_points]
    values = [value for _, value in all_points]
    first = min(steps)
    last = max(steps)
    low = min(values)
    high = max(values)
    x_scale = (width - 8) / (last - first or 1)
    y_scale = (height - 36) / (high - low or 1)
    lines = []
    names = []
    for i, (name, points) in enumerate(series):
        colour = CURVE_COLOURS[i % len(CURVE_COLOURS)]
        at = " ".join(
            f"{4 + x_scale * (x - first):.1f},{height - 18 - y_scale * (y - low):.1f}"
            for x, y in points)
        lines.append(f'<polyline fill="none" stroke="{colour}" stroke-width="1.5"{dashes(i)} '
                     f'points="{at}"/>')
        names.append(f'<span style="color:{colour}">{name}</span>')
    labels = (svg_text(4, 12, f"{high:.4g}") + svg_text(4, height - 4, f"{low:.4g}")
              + svg_text(width / 2, height - 4, f"step {first} to {last}"))
    return (f'<figure><figcaption>{" ".join(names)}</figcaption>'
            f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
            f"{''.join(lines)}{labels}</svg></figure>")


def dashes(i: int) -> str:
    """SVG attribute of the i-th curve: those whose colour comes again are dashed."""
    turn = i // len(CURVE_COLOURS)
    return f' stroke-dasharray="{3 * turn} 3"' if turn else ""


def svg_text(x: float, y: float, word: str) -> str:
    return f'<text x="{x}" y="{y}" font-size="11" fill="#666">{word}</text>'


def spread(items: Sequence[T], n: int) -> Sequence[T]:
    """At most n of the items, evenly spread, the first and the last among them."""
    if len(items) <= n:
        return items
    return [items[i * (len(items) - 1) // (n - 1)] for i in range(n)]
