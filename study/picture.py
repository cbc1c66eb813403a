"""The picture of speedrun.sh: one test scene that explains the method, and six others.

Above, large: what RSGround-R1 thinks and answers, then eight sampled answers before and after RFT,
coloured by reward over the contours of the positional kernel. Below: scenes that the stages answer
differently. Rules choose all scenes (`explaining_scene`, `contrasting_scenes`).
"""
import math
import re
from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

import reward
from data import open_image
from qwen.answer import POINT, Box, Frame, format_ok
from readers.base import Record
from report import metrics
from report.pictures import Colour, wrap
from report.predictions import Prediction, Predictions, sampled_boxes
from toy.scenes import NAMES

Point = tuple[float, float]
STAGES = {
    "base": "base", "direct": "GRPO from the base", "sft": "CoT-SFT", "rft": "RSGround-R1"}
# Which stages hit (1), in the order of STAGES; a scene below the large one for each.
PATTERNS = {
    "0001": "only RSGround-R1 hits", "0011": "CoT-SFT and RSGround-R1 hit",
    "0111": "only the base misses", "1110": "only RSGround-R1 misses",
    "1100": "CoT-SFT and RSGround-R1 miss", "0010": "only CoT-SFT hits"}
RULE = ("the first test scene with a place expression and three or more candidates that the base "
        "misses and RSGround-R1 hits, and that some but not all of CoT-SFT's samples hit")
KERNEL_LEVELS = (0.8, 0.5, 0.2)
ALPHA = 2.5                       # deviation of the kernel in half-sides of the true box
REWARD_SCALE = (1.0, 2.1)         # from the format alone to a perfect box

# Blue, gray and orange can be told apart by colour-blind readers too. Lines have a dark edge, as
# scenes hold things of any colour.
MISS, MIDDLE, HIT = (70, 160, 255), (225, 225, 225), (245, 150, 0)
TRUTH, EDGE, INK, GRAY = (255, 255, 255), (0, 0, 0), (20, 20, 20), (95, 95, 95)
# Pixels of the picture.
WIDTH, GAP = 1400, 20
LARGE, SMALL = 448, 258           # sides of the scenes
DISC = 13                         # radius of a point's number
DASH = 9
FONTS = {size: ImageFont.load_default(size) for size in (17, 20, 23, 30)}


def hits(iou: Tensor) -> Tensor:
    return metrics.record_scores(iou, inclusive=False)["Pr@0.5"] > 0


def is_place(record: Record) -> bool:
    """Whether the expression says where the object is, not only what it is."""
    return record.kind not in NAMES


# ---------------------------------------------------------------- which scenes are shown

def candidates(record: Record) -> int:
    """How many things of the scene have the expression's category, and its colour if it names it.
    """
    target = next(o for o in record.objects if o.box == record.box)
    with_color = f"{target.color} {target.category}" in record.text
    return sum(o.category == target.category and (o.color == target.color or not with_color)
               for o in record.objects)


def explaining_scene(
        records: Sequence[Record], ious: dict[str, Tensor], sampled: Tensor) -> int | None:
    """-> the scene of RULE, None if there is none. sampled: IoU (n, k) of CoT-SFT's samples for
    the first n records."""
    for i, sampled_hits in enumerate(hits(sampled)):
        mixed = bool(sampled_hits.any()) and not sampled_hits.all()
        right = not hits(ious["base"][i]) and bool(hits(ious["rft"][i]))
        if mixed and right and is_place(records[i]) and candidates(records[i]) >= 3:
            return i
    return None


def contrasting_scenes(ious: dict[str, Tensor], taken: int) -> list[tuple[int, str]]:
    """-> (scene, words about it): the first of each of PATTERNS, without the scene `taken`.

    If no scene has a pattern, the first other one with the same verdict on RSGround-R1 takes its
    place, or else the first other one; the words say so."""
    of_stage = [hits(ious[stage]).int().tolist() for stage in STAGES]
    patterns = ["".join(map(str, scene)) for scene in zip(*of_stage)]
    free = [i for i in range(len(patterns)) if i != taken]
    # A scene of another pattern of the list is that pattern's, not a substitute.
    first = {}
    for pattern in PATTERNS:
        first[pattern] = next((i for i in free if patterns[i] == pattern), None)
    free = [i for i in free if i not in first.values()]
    chosen = []
    for pattern, words in PATTERNS.items():
        i = first[pattern]
        if i is not None:
            n = patterns.count(pattern)
            words = f"{words}, as in {n} of {len(patterns)} scenes"
        elif free:
            differs = [j for j in free if len(set(patterns[j])) > 1]
            alike = [j for j in differs or free if patterns[j][-1] == pattern[-1]]
            i = (alike or differs or free)[0]
            free.remove(i)
            words = f"no scene with \"{words}\"; this is another one"
        if i is not None:
            chosen.append((i, words))
    return chosen


# ---------------------------------------------------------------- rewards and points

def rewards(record: Record, boxes: Tensor, texts: Sequence[str]) -> list[float]:
    """The paper's reward of each of k answers. boxes (k, 4), NaN for no box."""
    target, size = metrics.targets([record])
    total = torch.zeros(len(texts), dtype=torch.float64)
    for name, weight in reward.DEFAULT_REWARD.items():
        if name == "format":
            total += weight * torch.tensor([float(format_ok(text)) for text in texts])
        else:
            total += weight * reward.TERMS[name](boxes, target, size)
    return total.tolist()


def split_thought(prediction: Prediction | None) -> tuple[list[tuple[str, int]], list[Point]]:
    """-> the thought in pieces (text, number), and the points (original pixels) by their numbers.

    A piece ends with the point of its number, counted from 1; 0 for no point. A point that is
    named again keeps its number."""
    text = (prediction or {}).get("text", "")
    thought = text.partition("</think>")[0].removeprefix("<think>")
    pieces, points = [], []
    end = 0
    for match in re.finditer(POINT, thought):
        frame = Frame(**prediction["frame"])
        point = frame.to_image([float(v) for v in match.groups()])
        if point not in points:
            points.append(point)
        pieces.append((thought[end:match.end()], points.index(point) + 1))
        end = match.end()
    return [*pieces, (thought[end:], 0)], points


def reward_colour(value: float) -> Colour:
    """From blue by gray to orange on REWARD_SCALE."""
    low, high = REWARD_SCALE
    share = 2 * min(max((value - low) / (high - low), 0), 1)
    start, end = (MISS, MIDDLE) if share < 1 else (MIDDLE, HIT)
    share -= share >= 1
    return tuple(round(a + share * (b - a)) for a, b in zip(start, end))


# ---------------------------------------------------------------- drawing

class Panel:
    """A scene, enlarged, on which lines are drawn in the scene's coordinates."""

    def __init__(self, image: Image.Image, side: int) -> None:
        self.scale = side / image.width
        height = round(image.height * self.scale)
        # Enlarged pixels stay square, so that the picture shows no more than the scene has.
        self.image = image.resize((side, height), Image.Resampling.NEAREST)
        self.pen = ImageDraw.Draw(self.image)

    def line(self, points: Sequence[Point], colour: Colour, width: int, dashed: bool = False,
             ) -> None:
        """points: original pixels."""
        points = [(x * self.scale, y * self.scale) for x, y in points]
        draw_line(self.pen, points, colour, width, dashed)

    def box(self, box: Box, colour: Colour, width: int = 3, dashed: bool = False) -> None:
        x1, y1, x2, y2 = box
        self.line([(x1, y1), (x2, y1), (x2, y2), (x1, y2), (x1, y1)], colour, width, dashed)

    def answer(self, box: Tensor, iou: Tensor, width: int = 3) -> None:
        """An answer's box (4,), or nothing if it is NaN."""
        if not box[0].isnan():
            self.box(box.tolist(), HIT if hits(iou) else MISS, width)

    def contours(self, box: Box) -> None:
        """Where the positional kernel around a box is KERNEL_LEVELS: ellipses."""
        x1, y1, x2, y2 = box
        for level in KERNEL_LEVELS:
            radius = math.sqrt(-2 * math.log(level)) * ALPHA / 2      # in sides of the box
            ring = []
            for step in range(73):
                x = (x1 + x2) / 2 + radius * (x2 - x1) * math.cos(step * math.pi / 36)
                y = (y1 + y2) / 2 + radius * (y2 - y1) * math.sin(step * math.pi / 36)
                ring.append((x, y))
            self.line(ring, TRUTH, 1)
            # The level is written at the top of its ellipse, or where else that is in the panel.
            for x, y in (ring[54], ring[18], ring[36], ring[0]):
                x, y = x * self.scale, y * self.scale
                if 20 < x < self.image.width - 20 and 15 < y < self.image.height - 15:
                    self.pen.text((x, y), f"{level:g}", TRUTH, FONTS[17], anchor="mm",
                                  stroke_width=3, stroke_fill=EDGE)
                    break

    def numbers(self, points: Sequence[Point], order: Sequence[int]) -> None:
        """Points with their numbers, joined in the order in which a thought names them."""
        self.line([points[number - 1] for number in order], TRUTH, 2)
        chosen = order[-1] if order else 0
        for number, (x, y) in enumerate(points, 1):
            x, y = x * self.scale, y * self.scale
            colour = HIT if number == chosen else TRUTH
            self.pen.ellipse((x - 4, y - 4, x + 4, y + 4), colour, EDGE)
            # The number is next to the point, or it would hide the thing there.
            sides = (x + 17, self.image.width), (y - 17, self.image.height)
            centre = [min(max(v, DISC + 1), side - DISC - 2) for v, side in sides]
            draw_disc(self.pen, centre, number, number == chosen)


def draw_line(pen: ImageDraw.ImageDraw, points: Sequence[Point], colour: Colour, width: int,
              dashed: bool = False) -> None:
    """A line through points of the picture, with a dark edge."""
    pen.line(points, EDGE, width + 2, joint="curve")
    for (x1, y1), (x2, y2) in zip(points, points[1:]):
        length = math.dist((x1, y1), (x2, y2))
        # A dashed side has a dash at both ends.
        n = 2 * round(length / DASH / 2) + 1 if dashed else 1
        for i in range(0, n, 2):
            start, end = i / n, (i + 1) / n
            pen.line([(x1 + start * (x2 - x1), y1 + start * (y2 - y1)),
                      (x1 + end * (x2 - x1), y1 + end * (y2 - y1))], colour, width)


def draw_disc(pen: ImageDraw.ImageDraw, centre: Sequence[float], number: int, chosen: bool) -> None:
    x, y = centre
    pen.ellipse((x - DISC, y - DISC, x + DISC, y + DISC), HIT if chosen else TRUTH, EDGE)
    pen.text((x, y), str(number), EDGE, FONTS[17], anchor="mm")


def write_lines(pen: ImageDraw.ImageDraw, corner: Point, text: str, width: float, size: int = 20,
                colour: Colour = INK) -> float:
    """A text in lines -> the y below them."""
    x, y = corner
    for line in wrap(text, FONTS[size], width):
        pen.text((x, y), line, colour, FONTS[size])
        y += round(1.3 * size)
    return y


def write_thought(pen: ImageDraw.ImageDraw, corner: Point, width: float,
                  pieces: Sequence[tuple[str, int]]) -> float:
    """The pieces of `split_thought` in lines, each point followed by its number in a disc -> the y
    below them."""
    left, y = corner
    x = left
    chosen = next((number for _, number in reversed(pieces) if number), 0)
    for text, number in pieces:
        # A point's comma and space do not end a line.
        words = re.sub(r"(\([^()]*),\s*", r"\1,~", text).split()
        for j, word in enumerate(words):
            word = word.replace("~", " ").encode("ascii", "replace").decode()
            of_point = number if j == len(words) - 1 else 0
            length = FONTS[20].getlength(word)
            # What follows a disc needs no space if it is a full stop or comma.
            x -= 6 if word[0] in ".,;" and x > left else 0
            if x > left and x + length + (2 * DISC + 4 if of_point else 0) > left + width:
                x, y = left, y + 29
            pen.text((x, y), word, INK, FONTS[20])
            x += length + 6
            if of_point:
                draw_disc(pen, (x + DISC - 2, y + 12), number, number == chosen)
                x += 2 * DISC + 6
    return y + 29


def draw_rewards(pen: ImageDraw.ImageDraw, corner: Point, values: Sequence[float],
                 boxes: Tensor) -> None:
    """A row of squares in the colours of the answers, with their rewards."""
    x, y = corner
    step = LARGE / len(values)
    for i, value in enumerate(values):
        place = (x + i * step, y, x + (i + 1) * step - 5, y + 28)
        has_box = not boxes[i, 0].isnan()
        pen.rectangle(place, reward_colour(value) if has_box else "white", EDGE)
        pen.text(((place[0] + place[2]) / 2, y + 14), f"{value:.2f}", INK, FONTS[17], anchor="mm")


def draw_legend(pen: ImageDraw.ImageDraw, corner: Point) -> float:
    """What lines, colours and numbers mean -> the y below."""
    x, y = corner
    pen.rectangle((x, y, x + 2 * LARGE + GAP, y + 188), "#f2f2f2")
    column = x + LARGE - 30
    icons = ((x + 16, y + 28), (x + 16, y + 68), (column, y + 28), (column, y + 68))
    for i, (left, middle) in enumerate(icons):
        corners = [(left, middle - 12), (left + 50, middle - 12), (left + 50, middle + 12),
                   (left, middle + 12), (left, middle - 12)]
        if i == 0:
            pen.rectangle((left, middle - 12, left + 50, middle + 12), "#8a8a80")
            draw_line(pen, corners, TRUTH, 3, dashed=True)
        elif i == 1:
            draw_line(pen, [(v - (v > left) * 28, w) for v, w in corners], HIT, 3)
            draw_line(pen, [(v + (v == left) * 28, w) for v, w in corners], MISS, 3)
        elif i == 2:
            draw_line(pen, [(left, middle + 8), (left + 36, middle - 8)], TRUTH, 2)
            draw_disc(pen, (left + 8, middle + 4), 1, False)
            draw_disc(pen, (left + 40, middle - 4), 2, True)
        else:
            for width, height in ((25, 14), (17, 9), (9, 5)):
                place = (left + 25 - width, middle - height, left + 25 + width, middle + height)
                pen.ellipse(place, "#8a8a80", TRUTH, 2)
    texts = ("true box", "answer: hit (IoU above 0.5) or miss",
             "points of the thought in order; orange: the last",
             f"kernel K around the true box at {', '.join(f'{v:g}' for v in KERNEL_LEVELS)}")
    for (left, middle), text in zip(icons, texts):
        pen.text((left + 64, middle), text, INK, FONTS[20], anchor="lm")
    low, high = REWARD_SCALE
    bar = 300
    for i in range(bar):
        colour = reward_colour(low + (high - low) * i / bar)
        pen.line((x + 56 + i, y + 98, x + 56 + i, y + 122), colour)
    pen.text((x + 48, y + 110), f"{low:g}", INK, FONTS[20], anchor="rm")
    pen.text((x + 64 + bar, y + 110), f"{high:g}", INK, FONTS[20], anchor="lm")
    pen.text((column, y + 110), "reward of a sampled answer; white: no box", INK, FONTS[20],
             anchor="lm")
    write_lines(pen, (x + 16, y + 134), "reward = IoU + 0.1 P + format (0 or 1). P is the mean "
                "of K over the answered box, so a near miss earns more than a far one.",
                2 * LARGE + GAP - 32)
    return y + 188


def draw_scenes(sheet: Image.Image, top: float, records: Sequence[Record],
                boxes: dict[str, Tensor], ious: dict[str, Tensor],
                chosen: Sequence[tuple[int, str]]) -> float:
    """A row for each scene of `contrasting_scenes`, a column for each stage -> the y below."""
    pen = ImageDraw.Draw(sheet)
    step = SMALL + 14
    first = WIDTH - len(STAGES) * step + 6
    pen.text((8, top), f"{len(chosen)} other scenes", INK, FONTS[23])
    for k, name in enumerate(STAGES.values()):
        pen.text((first + k * step, top), name, INK, FONTS[23])
    y = top + 36
    for i, words in chosen:
        end = write_lines(pen, (8, y), f'"{records[i].text}"', first - 36, 23)
        write_lines(pen, (8, end + 8), words, first - 36, colour=GRAY)
        for k, stage in enumerate(STAGES):
            panel = Panel(open_image(records[i]), SMALL)
            panel.box(records[i].box, TRUTH, 2, dashed=True)
            panel.answer(boxes[stage][i], ious[stage][i], 2)
            sheet.paste(panel.image, (first + k * step, round(y)))
            pen.text((first + k * step, y + panel.image.height + 3),
                     verdict(boxes[stage][i], ious[stage][i]), INK, FONTS[20])
        y += panel.image.height + 42
    return y


def verdict(box: Tensor, iou: Tensor) -> str:
    if box[0].isnan():
        return "no box"
    return f"IoU {iou:.2f}: {'hit' if hits(iou) else 'miss'}"


def picture(records: Sequence[Record], answers: dict[str, Predictions], boxes: dict[str, Tensor],
            ious: dict[str, Tensor], samples: dict[str, Predictions]) -> Image.Image:
    """answers, boxes, ious: of each stage. samples: of sft and rft, for the first records."""
    n = len(samples["sft"])
    target, size = metrics.targets(records[:n])
    sampled = {}                  # stage -> boxes (n, k, 4) and their IoU (n, k)
    for stage, some in samples.items():
        of_stage = sampled_boxes(records[:n], some)
        overlap = [metrics.overlaps(pred, target, size).iou for pred in of_stage.unbind(1)]
        sampled[stage] = of_stage, torch.stack(overlap, 1)
    fitting = explaining_scene(records, ious, sampled["sft"][1])
    top = fitting or 0
    record = records[top]

    sheet = Image.new("RGB", (WIDTH, 5000), "white")
    pen = ImageDraw.Draw(sheet)
    lefts = [8 + i * (LARGE + GAP) for i in range(3)]
    y = write_lines(pen, (8, 8), f'Question: "{record.text}"', WIDTH - 16, 30) + 10
    titles = ("RSGround-R1 reasons, then answers", "Eight answers before RFT (CoT-SFT)",
              "Eight answers after RFT (RSGround-R1)")
    for left, title in zip(lefts, titles):
        pen.text((left, y), title, INK, FONTS[23])
    y += 36

    # 1. The thought, its points and the answer.
    pieces, points = split_thought(answers["rft"][top])
    panel = Panel(open_image(record), LARGE)
    panel.box(record.box, TRUTH, dashed=True)
    panel.answer(boxes["rft"][top], ious["rft"][top])
    panel.numbers(points, [number for _, number in pieces if number])
    sheet.paste(panel.image, (lefts[0], y))
    below = y + panel.image.height + 12
    end = write_thought(pen, (lefts[0], below), LARGE, pieces)
    end = write_lines(pen, (lefts[0], end + 4),
                      f"Answer: {verdict(boxes['rft'][top], ious['rft'][top])}", LARGE)

    # 2. Sampled answers before and after. Those with the highest rewards are drawn last.
    for left, (stage, (of_stage, overlap)) in zip(lefts[1:], sampled.items()):
        texts = (samples[stage][top] or {}).get("samples", ())
        drawn = of_stage[top, :len(texts)]
        values = rewards(record, drawn, texts)
        panel = Panel(open_image(record), LARGE)
        panel.contours(record.box)
        for value, box in sorted(zip(values, drawn.tolist())):
            if not math.isnan(box[0]):
                panel.box(box, reward_colour(value))
        panel.box(record.box, TRUTH, dashed=True)
        sheet.paste(panel.image, (left, y))
        if texts:
            draw_rewards(pen, (left, below), values, drawn)
            pen.text((left, below + 36), f"{int(hits(overlap[top]).sum())} of {len(texts)} hit, "
                     f"mean reward {sum(values) / len(values):.2f}", INK, FONTS[20])
    y = max(end, draw_legend(pen, (lefts[1], below + 76))) + 12

    # 3. Scenes that the stages answer differently, and how all scenes were chosen.
    pen.line((8, y, WIDTH - 8, y), GRAY)
    y = draw_scenes(sheet, y + 16, records, boxes, ious, contrasting_scenes(ious, top))
    rule = RULE if fitting is not None else (
        f"the first of all, for none of the {n} that have samples fits the rule ({RULE})")
    y = write_lines(pen, (8, y), f"The large scene is {rule}. The others are the first of six "
                    "patterns of hits and misses; RSGround-R1 misses in three of the patterns.",
                    WIDTH - 16, 17, GRAY)
    return sheet.crop((0, 0, WIDTH, round(y) + 8))
