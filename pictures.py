"""Everything that draws: boxes on images, sheets of pictures, JPEGs and curves for a page. PIL images in, PIL images or text out."""
import base64
import io

from PIL import Image, ImageDraw, ImageFont

COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b")


def draw_boxes(image, boxes, caption="", width=336):
    """PIL image, boxes as (xyxy in its pixels, colour) -> PIL image of this width with the boxes on it and the caption beneath."""
    scale = width / image.width
    size = width, max(1, round(image.height * scale))
    picture = image.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(picture)
    for box, colour in boxes:
        pen.rectangle([v * scale for v in box], outline=colour, width=2)
    font, lines = ImageFont.load_default(13), [""]
    for word in caption.encode("ascii", "replace").decode().split():
        lines = [*lines[:-1], f"{lines[-1]} {word}".strip()] if font.getlength(f"{lines[-1]} {word}") < width - 8 else [*lines, word]
    whole = Image.new("RGB", (width, picture.height + 16 * len(lines) + 6), "white")
    whole.paste(picture)
    ImageDraw.Draw(whole).text((4, picture.height + 2), "\n".join(lines), fill="black", font=font, spacing=2)
    return whole


def contact_sheet(pictures, columns=4):
    """PIL images of one width -> one, in rows."""
    rows = [pictures[i:i + columns] for i in range(0, len(pictures), columns)]
    heights = [max(p.height for p in row) for row in rows]
    sheet = Image.new("RGB", (max(len(row) for row in rows) * (pictures[0].width + 8), sum(heights) + 8 * len(rows)), "white")
    for i, row in enumerate(rows):
        for j, picture in enumerate(row):
            sheet.paste(picture, (j * (picture.width + 8), sum(heights[:i]) + 8 * i))
    return sheet


def overlay(image, boxes, path=None):
    """Draws (box in the image's pixels, label, colour) triples on a copy of a PIL image; written to path where one is given."""
    image = image.convert("RGB")
    draw, width = ImageDraw.Draw(image), max(1, round(max(image.size) / 200))
    for (x1, y1, x2, y2), label, colour in boxes:
        draw.rectangle((x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)), outline=colour, width=width)
        font = ImageFont.load_default(max(10, max(image.size) // 40))
        draw.text((x1 + width, y1 + width), label.encode("ascii", "replace").decode(), fill=colour, font=font)
    if path:
        image.save(path)
    return image


def draw_rollouts(image, boxes, rewards, target, text):
    """One group's boxes (G, 4) over its image, the redder the less its reward (G,); the target in green."""
    low, high = rewards.min().item(), rewards.max().item()
    shades = [int(255 * (r - low) / (high - low + 1e-6)) for r in rewards.tolist()]
    drawn = [(b, (255, s, 0)) for b, s in zip(boxes.tolist(), shades) if b[0] == b[0]]
    return draw_boxes(image, [*drawn, (target, "lime")], f"{text} (reward {low:.2f} to {high:.2f})")


def jpeg_uri(image, most):
    """PIL image -> data URI of a JPEG of `most` bytes at most; what does not fit becomes coarser, then smaller."""
    for quality in (75, 60, 40, 25, 12, 12, 12, 12):
        file = io.BytesIO()
        image.save(file, "JPEG", quality=quality, optimize=True)
        if file.tell() <= most:
            break
        if quality == 12:
            image = image.resize([max(1, round(v * 0.7)) for v in image.size])
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def curve(series, width=320, height=170):
    """[(name, [(step, value)])] -> a figure with an SVG of all that have two points or more, "" where none has. Names are HTML."""
    series = [(name, spread(points, 300)) for name, points in series if len(points) > 1]
    if not series:
        return ""
    xs, ys = zip(*(p for _, points in series for p in points))
    left, right, low, high = min(xs), max(xs), min(ys), max(ys)
    lines, names = [], []
    for i, (name, points) in enumerate(series):
        colour = COLOURS[i % len(COLOURS)]
        dashes = f' stroke-dasharray="{3 * (i // len(COLOURS))} 3"' if i >= len(COLOURS) else ""
        across, up = (width - 8) / (right - left or 1), (height - 36) / (high - low or 1)
        at = " ".join(f"{4 + across * (x - left):.1f},{height - 18 - up * (y - low):.1f}" for x, y in points)
        lines.append(f'<polyline fill="none" stroke="{colour}" stroke-width="1.5"{dashes} points="{at}"/>')
        names.append(f'<span style="color:{colour}">{name}</span>')
    marks = ((4, 12, f"{high:.4g}"), (4, height - 4, f"{low:.4g}"), (width / 2, height - 4, f"step {left} to {right}"))
    words = "".join(f'<text x="{x}" y="{y}" font-size="11" fill="#666">{word}</text>' for x, y, word in marks)
    return (f'<figure><figcaption>{" ".join(names)}</figcaption><svg viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
            f"{''.join(lines)}{words}</svg></figure>")


def spread(items, n):
    """At most n of the items, evenly spread, the first and the last among them."""
    return items if len(items) <= n else [items[i * (len(items) - 1) // (n - 1)] for i in range(n)]
