"""Chain-of-thought: spatial reasoning in words, written from annotations or by a teacher.

A text says what is asked for. It says where the object lies that the expression refers to
(its anchor), if there is one. Then it goes through the candidates in the order that the
expression asks about ("the topmost": from top to bottom). Each candidate has its place, what
the expression tells candidates apart by (size, side or distance of the anchor), and whether it
fits. The box comes last. Reasons stand before what follows from them, because a model writes
in this order.

One thing has one wording: in RFT every token that could as well be another is noise in the
gradient. Every sentence is true of the annotated boxes. A real data set annotates some of its
objects only: a text speaks of those alone whose own expression is in the split at hand, and
never claims that there are no more.

Source: our reading of "synthetic spatial reasoning" in the abstract of RSGround-R1
(arXiv 2601.21634); the paper's own texts are not public to us.

    python cot.py dior                    a few texts beside their pictures, in pixels of the
                                          picture
    python cot.py dior --init CKPT        the same in that checkpoint's coordinates, as
                                          sft.py --init CKPT trains on them

A line of a JSONL of your own (sft.py --cot FILE); the answer is added from the annotation:

    {"id": "123", "think": "..."}
    {"id": "124", "refused": "..."}       no such reasoning: the record gets the one that is
                                          written from the annotations

A teacher writes such a file. It is shown image, expression and true box, and explains how one
finds the object: a checkpoint, or any server that speaks OpenAI's chat-completions protocol
(vLLM, SGLang). The same command goes on where it was stopped. A record for which a server has
no whole answer in --tries requests is left undone, and asked for again by the next call.

    python cot.py dior --teacher CKPT
    python cot.py dior --teacher http://localhost:8000/v1 --model Qwen2.5-VL-72B-Instruct \\
        --coords resized --init Qwen2.5-VL-3B-Instruct/ --parallel 32 --want 30000

The paper's teacher is Qwen2.5-VL-72B, and 30,000 samples are kept. Incomplete chains,
inconsistent coordinate formats and wrong boxes are dropped (known second-hand). That the
reasoning must not give the box away is ours. `filter_explanation` has all four.

A teacher's reasoning is in the teacher's coordinates, and the student's may be others. So a
line carries the teacher's frame, and its coordinates are converted when the text is written
for training. That takes coordinates that can be told from other numbers: points (x, y) and
boxes [x1, y1, x2, y2]. Reasoning with others ("40 pixels wide") has an inconsistent coordinate
format, whichever student it is for.
"""
import argparse
import base64
import fcntl
import http.client
import io
import json
import math
import os
import queue
import random
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

import torch
from tqdm import tqdm

import data
import images
import reward
import runtime
from answer import EXAMPLE, TAGS, format_box, format_ok, parse_box, write
from data import DataError, Record, Records, UnreadableImage
from generate import generate
from pictures import draw_boxes
from processor import Frame, Processor, Prompt, frame_by_coords

Point = tuple[float, float]
Box = tuple[float, float, float, float]          # (x1, y1, x2, y2)

REGION_NAMES = (
    ("upper left", "top", "upper right"),
    ("left", "center", "right"),
    ("lower left", "bottom", "lower right"),
)
# IoU from which another annotation is the target itself under another expression.
SAME_OBJECT_IOU = 0.9
# Places and distances are rounded to about this share of the frame's longer side, in fives.
ROUNDING = 0.02
# Candidates beside the target: the nearest ones.
MAX_OTHER_CANDIDATES = 5

SIZE_WORDS = re.compile(
    r"\b(?:large|larger|largest|big|bigger|biggest|huge"
    r"|small|smaller|smallest|tiny|tinier|tiniest|little)\b")
DISTANCE_WORDS = re.compile(r"\b(?:near|nearest|close|closest|next|beside)\b")
SIDE_WORDS = re.compile(
    r"\b(?:left|right|above|below|over|under|higher|lower|upper|further|top|bottom)\b")
RELATION_WORDS = re.compile(
    r"\b(?:left of|right of|above|below|over|under|beside|near|nearest|closest|next|of"
    r"|higher|further)\b")

# A teacher's box agrees with the annotation from this IoU on.
MIN_TEACHER_IOU = 0.5
# Four numbers this near to the box's, in units of the model's frame, reveal it.
REVEALING_DISTANCE = 3
# Whole numbers up to this one may count objects; larger ones are taken for coordinates or sizes.
MAX_COUNT = 20
PLAIN_NUMBER = r"\d++(?:\.\d++)?+"
# A point (x, y) or a box [x1, y1, x2, y2], in either kind of brackets.
TWO_NUMBERS = rf"{PLAIN_NUMBER}\s*,\s*{PLAIN_NUMBER}"
COORDINATES = re.compile(rf"[(\[]\s*{TWO_NUMBERS}(?:\s*,\s*{TWO_NUMBERS})?\s*[)\]]")
# "x1 = 12" is a coordinate and "12 pixels" are a size, however small.
BARE_COORDINATE = re.compile(r"\b[xywh]\d?\s*[=:]\s*\d|\d\s*(?:px|pixels?)\b", re.IGNORECASE)
TEACHER_PROMPT = (
    "The object that is described as {text} lies in the box {box}; coordinates are {units}. "
    "Write down how one finds it who does not know the box: what is asked for, which objects of "
    "that kind there are and where in the image they lie, how they lie to each other, and why "
    "this one fits. Write a place as a point (x, y) in the same coordinates; use no other "
    "numbers, but to count objects. Put that into <think> </think> tags and do not write the "
    "box there. Then answer with the box in <answer> </answer> tags, like " + EXAMPLE)

# Why an explanation is refused. The first three are the paper's.
INCOMPLETE = "incomplete chain"
INCONSISTENT = "inconsistent coordinate format"
WRONG_BOX = "wrong box"
GIVEN_AWAY = "box given away"

# How each line of a teacher's file begins.
LINE_START = b'{"id": '

# Seconds before the second try of a request; they double with every further one.
FIRST_BACKOFF = 1.0
MAX_BACKOFF = 60.0
# A server that asks for a longer pause is not waited for so long.
MAX_RETRY_AFTER = 3600.0
# So many records in a row without an answer mean that the server is gone.
GIVE_UP_AFTER = 20
# A shorter key is no secret, but a word such as vLLM's EMPTY, which an explanation may hold too.
MIN_SECRET_LENGTH = 8


@dataclass(frozen=True)
class Neighbor:
    """Another annotated object of the image."""

    category: str
    box: Box                   # original pixels
    color: str = ""


# ---------------------------------------------------------------- places in words

def box_center(box: Box) -> Point:
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2


def box_area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def box_iou(a: Box, b: Box) -> float:
    """IoU of two boxes, in double precision."""
    tensors = (torch.tensor(box, dtype=torch.float64) for box in (a, b))
    return reward.iou(*tensors).item()


def region_name(box: Box, size: tuple[int, int]) -> str:
    """Name of the ninth of the image, of size (width, height), in which the center lies."""
    x, y = box_center(box)
    row = min(2, int(3 * y / size[1]))
    column = min(2, int(3 * x / size[0]))
    return REGION_NAMES[row][column]


def direction(a: Box, b: Box) -> str:
    """Where box a lies as seen from box b, by the axis on which their centers differ more.

    The centers must not be the same.
    """
    ax, ay = box_center(a)
    bx, by = box_center(b)
    if abs(ax - bx) >= abs(ay - by):
        return "left of" if ax < bx else "right of"
    return "above" if ay < by else "below"


def round_coarsely(value: float, frame: Frame) -> int:
    """A coordinate or distance in the model's frame, rounded as the texts write it."""
    step = 5 * max(1, round(ROUNDING * max(frame.extent) / 5))
    return step * round(value / step)


def model_center(box: Box, frame: Frame) -> Point:
    """The center of a box in original pixels, in the model's frame."""
    return frame.to_model((*box_center(box), 0, 0))[:2]


def point_text(box: Box, frame: Frame) -> str:
    """The center of a box as the texts write it: "(45, 60)", rounded, in the model's frame."""
    x, y = model_center(box, frame)
    return f"({round_coarsely(x, frame)}, {round_coarsely(y, frame)})"


def relation_text(box: Box, anchor: Box, text: str, frame: Frame) -> str:
    """Where a box lies to the anchor's box, as the expression `text` asks for it.

    That is the direction, or the distance of the centers in units of the model's frame, or
    both where the expression asks for both or neither. What has its center there as well (a
    field in its stadium) lies in no direction.
    """
    x, y = model_center(box, frame)
    anchor_x, anchor_y = model_center(anchor, frame)
    distance = round_coarsely(math.hypot(x - anchor_x, y - anchor_y), frame)
    if not distance:
        return "about where it is"
    asks_distance = DISTANCE_WORDS.search(text)
    asks_side = SIDE_WORDS.search(text)
    parts = []
    if asks_side or not asks_distance:
        parts.append(f"{direction(box, anchor)} it")
    if asks_distance or not asks_side:
        parts.append(f"{distance} away")
    return ", ".join(parts)


def noun_phrase(neighbor: Neighbor) -> str:
    """An object's color, where known, and category, with their article: "an orange car"."""
    words = f"{neighbor.color} {neighbor.category.lower() or 'object'}".strip()
    article = "an" if words[0] in "aeiou" else "a"
    return f"{article} {words}"


# ---------------------------------------------------------------- one text

@dataclass(frozen=True)
class CandidateOrder:
    """An order in which a text goes through the candidates, and the expressions that ask for it."""

    words: str                 # regular expression of the words that ask for it
    text: str                  # how the text says it
    # Candidates are sorted by this key of their box, given the anchor's box.
    key: Callable[[Box, Box | None], float | Point]
    is_size: bool = False      # its words count only in the expression's head, see `head_of`
    needs_anchor: bool = False


CANDIDATE_ORDERS = (
    CandidateOrder("leftmost|farthest to the left", "from left to right: ",
                   lambda box, anchor: box_center(box)[0]),
    CandidateOrder("rightmost|farthest to the right", "from right to left: ",
                   lambda box, anchor: -box_center(box)[0]),
    CandidateOrder("topmost|uppermost|highest|nearest to the top|closest to the top",
                   "from top to bottom: ", lambda box, anchor: box_center(box)[1]),
    CandidateOrder("lowest|bottommost|nearest to the bottom|closest to the bottom",
                   "from bottom to top: ", lambda box, anchor: -box_center(box)[1]),
    CandidateOrder("nearest|closest|next to", "from near to far: ",
                   lambda box, anchor: math.dist(box_center(box), box_center(anchor)),
                   needs_anchor=True),
    CandidateOrder("largest|biggest", "from large to small: ",
                   lambda box, anchor: -box_area(box), is_size=True),
    CandidateOrder("smallest|tiniest", "from small to large: ",
                   lambda box, anchor: box_area(box), is_size=True),
)
# Expressions that ask for none of these: from left to right, without saying so.
PLAIN_ORDER = CandidateOrder("", "", lambda box, anchor: box_center(box))


def head_of(text: str) -> str:
    """An expression up to its relation.

    A size word behind the relation is the anchor's: "the car below the largest plane".
    """
    return RELATION_WORDS.split(text)[0]


def candidate_order(text: str, anchor: Neighbor | None) -> CandidateOrder:
    """The order that an expression, in lower case, asks for."""
    for order in CANDIDATE_ORDERS:
        asking_part = head_of(text) if order.is_size else text
        if order.needs_anchor and anchor is None:
            continue
        if re.search(rf"\b(?:{order.words})\b", asking_part):
            return order
    return PLAIN_ORDER


def same_kind(record: Record, others: Sequence[Neighbor], color: str) -> list[Neighbor]:
    """The others that are of the target's category, and of its color if the expression says so."""
    noun = record.category.lower() or "object"
    names_color = bool(color) and f"{color} {noun}" in record.text.lower()
    return [o for o in others
            if o.category == record.category and (not names_color or o.color == color)]


def find_anchor(
        record: Record, others: Sequence[Neighbor], candidates: Sequence[Neighbor],
) -> Neighbor | None:
    """The object that the expression refers to beside the target, None where there is none.

    An object of the target's own category is it only if its color tells it from the candidates:
    "the ship next to the red ship".
    """
    text = record.text.lower()
    noun = record.category.lower() or "object"
    mentioned = []
    for o in others:
        own_category = o.category == record.category
        words = f"{o.color} {noun}" if own_category else o.category.lower()
        if o not in candidates and o.category and words in text:
            mentioned.append(o)
    return min(mentioned, key=lambda o: anchor_rank(o, text), default=None)


def anchor_rank(neighbor: Neighbor, text: str) -> tuple[bool, float]:
    """Sort key of a possible anchor; the least is meant.

    First come those of the color that the expression names, then the largest or smallest, as
    its size word asks.
    """
    noun = neighbor.category.lower()
    pattern = r"\b(?:{}) (?:[a-z]+ )?" + re.escape(noun)
    size_rank = 0.0
    if re.search(pattern.format("largest|biggest"), text):
        size_rank = -box_area(neighbor.box)
    elif re.search(pattern.format("smallest|tiniest"), text):
        size_rank = box_area(neighbor.box)
    return f"{neighbor.color} {noun}" not in text, size_rank


def candidate_text(
        candidate: Neighbor, anchor: Neighbor | None, record: Record, frame: Frame) -> str:
    """A candidate with its place and what the expression tells candidates apart by."""
    text = record.text.lower()
    point = point_text(candidate.box, frame)
    region = region_name(candidate.box, record.size)
    line = f"{noun_phrase(candidate)} near {point}, at the {region}"
    if SIZE_WORDS.search(head_of(text)):
        line += f", of size {round(math.sqrt(box_area(frame.to_model(candidate.box))))}"
    if anchor is not None:
        line += f", {relation_text(candidate.box, anchor.box, text, frame)}"
    return line


def explain(
        record: Record, others: Sequence[Neighbor], frame: Frame, color: str = "") -> str:
    """One record's completion.

    others: the other objects of its image. frame: in whose coordinates the text speaks.
    color: of the target, where known.
    """
    target = Neighbor(record.category, record.box, color)
    alike = same_kind(record, others, color)
    anchor = find_anchor(record, others, alike)
    anchor_box = anchor.box if anchor else None
    order = candidate_order(record.text.lower(), anchor)
    target_center = box_center(record.box)
    nearest = sorted(alike, key=lambda o: math.dist(box_center(o.box), target_center))
    candidates = [target, *nearest[:MAX_OTHER_CANDIDATES]]
    candidates.sort(key=lambda o: order.key(o.box, anchor_box))

    sentences = [f"{record.text}."]
    if anchor is not None:
        sentences.append(f"{noun_phrase(anchor)} near {point_text(anchor.box, frame)}.")
    # The order is said once, before the first candidate.
    introduction = order.text
    for candidate in candidates:
        verdict = ": it fits." if candidate is target else "."
        line = candidate_text(candidate, anchor, record, frame)
        sentences.append(introduction + line + verdict)
        introduction = ""
    # A tag inside an expression must not look like one of ours.
    think = " ".join(sentences).replace("<", "(").replace(">", ")")
    return write(think, format_box(record.box, frame))


def answer_text(record: Record, frame: Frame) -> str:
    """The answer to a record, in the model's frame."""
    return write(None, format_box(record.box, frame))


# ---------------------------------------------------------------- texts of a split

def neighbor_finder(records: Sequence[Record]) -> Callable[[Record], list[Neighbor]]:
    """Records of one split -> function from a record to the other objects of its image.

    A synth scene knows all its objects. Elsewhere they are the other records of these on the
    same image, so that reasoning for a training record never speaks of a test record's object.
    """
    by_image: dict[Any, list[Record]] = {}
    for record in records:
        if not hasattr(record.image, "objects"):
            by_image.setdefault(record.image, []).append(record)

    def find_neighbors(record: Record) -> list[Neighbor]:
        if hasattr(record.image, "objects"):
            return [Neighbor(o.category, o.box, o.color)
                    for o in record.image.objects if o.box != record.box]
        neighbors = []
        # The target and each neighbor may be annotated several times, under other expressions.
        distinct_boxes = [record.box]
        for other in by_image.get(record.image, ()):
            if all(box_iou(other.box, box) < SAME_OBJECT_IOU for box in distinct_boxes):
                distinct_boxes.append(other.box)
                neighbors.append(Neighbor(other.category, other.box))
        return neighbors

    return find_neighbors


def target_color(record: Record) -> str:
    """The color of a record's target, which only a synth scene knows; else ""."""
    for o in getattr(record.image, "objects", ()):
        if o.box == record.box:
            return o.color
    return ""


def writer(
        records: Sequence[Record], file: str | Path | None = None, answer_only: bool = False,
) -> Callable[[Record, Frame], str]:
    """-> function from record and frame to the completion's text.

    Its reasoning is written from the annotations, or read from a JSONL file, where that has
    some; answer_only leaves it out.
    """
    if answer_only:
        return answer_text
    find_neighbors = neighbor_finder(records)
    reasoning = load_reasoning(file, records) if file else {}

    def write_completion(record: Record, frame: Frame) -> str:
        given = reasoning.get(record.id)
        if given is not None:
            return write(given.in_frame(frame), format_box(record.box, frame))
        return explain(record, find_neighbors(record), frame, target_color(record))

    return write_completion


# ---------------------------------------------------------------- reasoning from a file

@dataclass(frozen=True)
class Reasoning:
    """What stands between the <think> tags."""

    think: str
    # Frame of the coordinates in it. None: they are the student's already, whoever that is.
    frame: Frame | None = None

    def in_frame(self, student: Frame) -> str:
        """The reasoning with its points and boxes in the student's frame, in whole numbers."""
        if self.frame is None or self.frame.extent == student.extent:
            return self.think

        def to_student(match: re.Match[str]) -> str:
            values = [float(number) for number in re.findall(PLAIN_NUMBER, match[0])]
            values = student.to_model(self.frame.to_image(values))
            numbers = iter(values)
            return re.sub(PLAIN_NUMBER, lambda _: str(round(next(numbers))), match[0])

        return COORDINATES.sub(to_student, self.think)


def load_reasoning(
        path: str | Path, records: Sequence[Record]) -> dict[str, Reasoning | None]:
    """A JSONL of reasoning -> id -> Reasoning, None where the line says "refused".

    DataError where a line does not fit, or a record has none. A teacher's file, whose lines
    carry a frame, may be unfinished.
    """
    reasoning = {}
    for number, line in read_json_lines(path):
        identity, given = read_reasoning(line, f"{path}, line {number}")
        reasoning[identity] = given
    of_teacher = any(given is not None and given.frame for given in reasoning.values())
    missing = [r.id for r in records if r.id not in reasoning]
    if missing and not of_teacher:
        raise DataError(f"{path}: no reasoning for {len(missing)} of {len(records)} records, "
                        f"the first is {missing[0]!r}")
    for record in records:
        given = reasoning.get(record.id)
        if given is not None and given.frame and given.frame.original != record.size:
            raise DataError(
                f"{path}: the reasoning of record {record.id!r} is of an image of "
                f"{given.frame.original}, but the record's image is {record.size}; is it of "
                "another data set?")
    return reasoning


def read_reasoning(line: Any, place: str) -> tuple[str, Reasoning | None]:
    """One line's value -> id and reasoning, None where refused. place: of the line, for errors."""
    try:
        identity = str(line["id"])
        if "refused" in line:
            return identity, None
        think = line["think"]
        if not isinstance(think, str):
            raise TypeError
        # A lone surrogate has no bytes to train on.
        think.encode()
    except (ValueError, KeyError, TypeError):
        raise DataError(
            f'{place}: not a JSON object with "id" and a text "think"') from None
    tags = TAGS
    if any(tag in think for tag in tags):
        raise DataError(
            f'{place}: "think" is the reasoning alone, without <think> or <answer> tags')
    return identity, Reasoning(think, read_frame(line.get("frame"), place))


def read_frame(value: Any, place: str) -> Frame | None:
    """A line's "frame" -> the Frame, None where it has none."""
    if value is None:
        return None
    try:
        frame = Frame(tuple(value["original"]), tuple(value["resized"]), value["convention"])
        sides = (*frame.original, *frame.resized)
        fits = len(sides) == 4 and all(type(side) is int and side > 0 for side in sides)
    except (KeyError, TypeError):
        fits = False
    if not fits or frame.convention not in ("absolute", "1000"):
        raise DataError(f'{place}: "frame" is not {{"original": [W, H], "resized": [W, H], '
                        '"convention": "absolute" or "1000"}')
    return frame


def read_json_lines(
        path: str | Path, content: bytes | None = None) -> Iterator[tuple[int, Any]]:
    """Yields number and JSON value of each line of a JSONL that is not blank.

    content: the file's bytes, where they are read already. DataError where a line is no JSON.
    """
    try:
        content = Path(path).read_bytes() if content is None else content
        # str.splitlines would also cut at U+2028, which JSON allows within a text.
        lines = content.decode("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: unreadable reasoning ({error})") from None
    for number, text in enumerate(lines, 1):
        if not text.strip():
            continue
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            raise DataError(f'{path}, line {number}: not a JSON object with "id" '
                            'and a text "think"') from None
        yield number, value


# ---------------------------------------------------------------- a teacher's explanations

@dataclass(frozen=True)
class Explanation:
    """What a teacher says of a record."""

    record: Record
    frame: Frame               # that the teacher's coordinates are in
    text: str | None           # None where no whole answer came
    failure: str = ""          # why not


# What tells teachers apart: how they are asked. Yields explanations in any order.
Ask = Callable[[Sequence[Record]], Iterator[Explanation]]


def teacher_blanks(record: Record, frame: Frame) -> dict[str, str]:
    """What fills in TEACHER_PROMPT; the box is told in the teacher's frame."""
    units = "in thousandths of the image's width and height, from 0 to 1000"
    if frame.convention == "absolute":
        width, height = frame.resized
        units = f"in pixels of the image, which is {width} wide and {height} high"
    return {"text": record.text, "box": format_box(record.box, frame), "units": units}


def teacher_request(record: Record, frame: Frame) -> str:
    """What a teacher is asked."""
    return TEACHER_PROMPT.format(**teacher_blanks(record, frame))


def filter_explanation(text: str, record: Record, frame: Frame) -> tuple[str | None, str | None]:
    """A teacher's completion -> its reasoning and None, or None and why it is refused.

    incomplete chain: not one closed think block with something in it, then an answer.
    inconsistent coordinate format: no box that can be parsed, or one that is right in another
        convention than the teacher's; or reasoning whose numbers can't be converted.
    wrong box: its IoU with the annotation is below MIN_TEACHER_IOU.
    box given away: the reasoning already writes it.
    """
    think = complete_reasoning(text)
    if think is None:
        return None, INCOMPLETE
    box = parse_box(text)
    if box is None:
        return None, INCONSISTENT
    if box_iou(frame.to_image(box), record.box) < MIN_TEACHER_IOU:
        readings = [box_iou(other, record.box) for other in other_readings(box, frame)]
        # A box that is right when it is read otherwise is no mistake about the object.
        return None, INCONSISTENT if max(readings) >= MIN_TEACHER_IOU else WRONG_BOX
    if reveals_box(think, [box, frame.to_model(record.box)]):
        return None, GIVEN_AWAY
    if not is_convertible(think, record.text, frame):
        return None, INCONSISTENT
    return think, None


def complete_reasoning(text: str) -> str | None:
    """The reasoning of a completion, None where it is empty, unclosed, or without an answer."""
    if text.count("<think>") != 1 or text.count("</think>") != 1:
        return None
    blocks = re.fullmatch(r"\s*<think>(.*)</think>\s*<answer>.*</answer>\s*", text, re.DOTALL)
    think = blocks[1].strip() if blocks else ""
    if not think or "<answer>" in think or "</answer>" in think:
        return None
    return think


def other_readings(box: Box, frame: Frame) -> list[Box]:
    """An answer's box in original pixels, had it been written in other conventions.

    These are pixels of the original image, pixels of the resized one, thousandths and shares of
    the sides.
    """
    shares = [1000 * v for v in box]
    in_thousandths = Frame(frame.original, frame.resized, "1000")
    in_resized = Frame(frame.original, frame.resized, "absolute")
    return [box, in_resized.to_image(box), in_thousandths.to_image(box),
            in_thousandths.to_image(shares)]


def is_convertible(think: str, expression: str, frame: Frame) -> bool:
    """Whether all coordinates in the reasoning can be told from other numbers, and fit the frame.

    Other numbers are counts, percents, and those of the expression.
    """
    for match in COORDINATES.finditer(think):
        values = [float(number) for number in re.findall(PLAIN_NUMBER, match[0])]
        beyond = [value > frame.extent[i % 2] for i, value in enumerate(values)]
        # (0.25, 0.4) are shares of the sides.
        if any(beyond) or ("." in match[0] and max(values) <= 1):
            return False
    rest = COORDINATES.sub(" ", think)
    if BARE_COORDINATE.search(rest):
        return False
    # The reasoning repeats the expression, and its numbers are not coordinates.
    expression_numbers = re.findall(PLAIN_NUMBER, expression)
    # Digits that follow a letter are part of a name: "A380".
    for match in re.finditer(rf"(?<![A-Za-z\d.]){PLAIN_NUMBER}(?!\s*%)", rest):
        is_count = "." not in match[0] and float(match[0]) <= MAX_COUNT
        if not is_count and match[0] not in expression_numbers:
            return False
    return True


def reveals_box(think: str, boxes: Sequence[Box]) -> bool:
    """Whether the reasoning writes one of these boxes, by its corners or corner and size.

    Its four numbers may stand in any order, with up to two other numbers between them.
    """
    # "x1" is a name and no number; "100-150" are two numbers.
    numbers = re.findall(r"(?<![A-Za-z\d.])\d{1,6}(?:\.\d+)?", think)
    values = [float(number) for number in numbers]
    windows = [values[i:i + 6] for i in range(max(1, len(values) - 5))]
    for x1, y1, x2, y2 in boxes:
        for notation in ((x1, y1, x2, y2), (x1, y1, x2 - x1, y2 - y1)):
            if any(contains_all(window, notation) for window in windows):
                return True
    return False


def contains_all(values: Sequence[float], wanted: Sequence[float]) -> bool:
    """Whether each of the wanted numbers is near a value of its own, in whatever order."""
    if not wanted:
        return True
    for i, value in enumerate(values):
        is_near = abs(value - wanted[0]) <= REVEALING_DISTANCE
        if is_near and contains_all([*values[:i], *values[i + 1:]], wanted[1:]):
            return True
    return False


# ---------------------------------------------------------------- the file of explanations

@dataclass
class Progress:
    """What a teacher's file holds, and what this call could not get."""

    finished: set[str] = field(default_factory=set)    # ids
    kept: int = 0
    refusals: Counter[str] = field(default_factory=Counter)
    undone: list[Explanation] = field(default_factory=list)
    undone_in_a_row: int = 0
    answered: bool = False                             # by the teacher, in this call

    def add(self, identity: str, reason: str | None) -> None:
        """Counts a line; reason: why it is refused, None where it is kept."""
        self.finished.add(identity)
        if reason is None:
            self.kept += 1
        else:
            self.refusals[reason] += 1


def open_explanations(out: Path) -> BinaryIO:
    """Opens a teacher's file to be read and appended to, by this process alone."""
    try:
        file = open(out, "a+b")
    except OSError as error:
        raise DataError(f"{out} can't be written ({error.strerror}); "
                        "name another file with --out") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise DataError(f"{out} is being written by another process; "
                        "wait for it, or name another file with --out") from None
    return file


def read_progress(file: BinaryIO, out: Path) -> Progress:
    """Reads the file so far; what a call that was killed has left of a line is removed."""
    file.seek(0)
    content = file.read()
    whole_lines, _, last_line = content.rpartition(b"\n")
    if is_json(last_line):
        # Only its end is missing.
        whole_lines = content
    progress = Progress()
    for number, line in read_json_lines(out, whole_lines):
        if not isinstance(line, dict) or "id" not in line:
            raise DataError(f'{out}, line {number}: not a JSON object with an "id"; '
                            "name another file with --out")
        progress.add(str(line["id"]), str(line["refused"]) if "refused" in line else None)
    if is_json(last_line):
        file.write(b"\n")
        file.flush()
    elif last_line.startswith(LINE_START) or LINE_START.startswith(last_line):
        file.truncate(len(content) - len(last_line))
    else:
        raise DataError(f"{out}: its last line is not of a teacher's file; "
                        "name another file with --out")
    return progress


def is_json(text: bytes) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def write_explanation(file: BinaryIO, explanation: Explanation, progress: Progress) -> None:
    """Judges an explanation, appends its line and counts it."""
    record = explanation.record
    think, reason = filter_explanation(explanation.text, record, explanation.frame)
    line = {"id": record.id, "think": think}
    if reason is not None:
        line = {"id": record.id, "refused": reason, "text": explanation.text}
    line["frame"] = asdict(explanation.frame)
    file.write((json.dumps(line) + "\n").encode())
    # At once, so that a call that is killed loses no line.
    file.flush()
    progress.add(record.id, reason)


def run_teacher(args: argparse.Namespace, records: Records, ask: Ask) -> None:
    """Has a teacher explain each record's known box; writes a line for each, kept or refused."""
    out = Path(args.out or f"cot_{args.name.replace('/', '_')}_{args.split}.jsonl")
    runtime.writable(out.parent)
    with open_explanations(out) as file:
        progress = read_progress(file, out)
        remaining = [r for r in records if r.id not in progress.finished][:args.limit]
        if not is_enough(progress, args):
            collect_explanations(args, remaining, ask, file, progress)
    print_progress(progress, out, len(records))
    if progress.undone and (progress.undone_in_a_row == GIVE_UP_AFTER or not progress.answered):
        runtime.fail(f"no answer from {args.teacher} ({progress.undone[-1].failure}); "
                     "the same command goes on when it answers")


def is_enough(progress: Progress, args: argparse.Namespace) -> bool:
    return bool(args.want) and progress.kept >= args.want


def collect_explanations(
        args: argparse.Namespace, records: Sequence[Record], ask: Ask, file: BinaryIO,
        progress: Progress) -> None:
    """Writes the lines of these records until there are enough, or the server is gone."""
    bar = tqdm(total=len(records), desc="teacher")
    with bar, closing(ask(records)) as explanations:
        for explanation in explanations:
            if explanation.text is None:
                progress.undone.append(explanation)
                progress.undone_in_a_row += 1
            else:
                write_explanation(file, explanation, progress)
                progress.undone_in_a_row = 0
                progress.answered = True
            bar.set_postfix_str(
                f"kept {progress.kept} refused {progress.refusals.total()}", refresh=False)
            bar.update()
            if is_enough(progress, args) or progress.undone_in_a_row == GIVE_UP_AFTER:
                break


def print_progress(progress: Progress, out: Path, total: int) -> None:
    """Says what was written, why how many are refused, and what is left. total: of records."""
    done = len(progress.finished)
    print(f"written: {out}; {progress.kept} of {done} records have reasoning, "
          f"{total - done} are still to come")
    for reason, count in sorted(progress.refusals.items()):
        print(f"  refused: {count} {reason}")
    if progress.undone:
        first = progress.undone[0]
        print(f"  left undone: {len(progress.undone)}, the first is {first.record.id!r} "
              f"({first.failure}); the same command asks for them again")


# ---------------------------------------------------------------- a checkpoint as teacher

def record_seed(args: argparse.Namespace, record: Record) -> int:
    """Of a record's sampling: its own, so that it does not depend on where a call began."""
    digest = data.fingerprint(f"{args.seed} {record.id}")
    return int.from_bytes(digest[:4], "big")


def checkpoint_prompt(record: Record, processor: Processor) -> Prompt:
    """The request to a checkpoint; its frame is the one that the checkpoint answers in."""
    image = data.open_image(record)
    pixels, grid, resized = processor.patches(image)
    frame = Frame(image.size, resized, processor.convention)
    image_tokens = int(grid.prod()) // processor.merge ** 2
    ids = processor.turns(TEACHER_PROMPT, image_tokens, **teacher_blanks(record, frame))
    return Prompt(torch.tensor(ids), pixels, grid, frame)


def checkpoint_teacher(args: argparse.Namespace, device: torch.device) -> Ask:
    """A checkpoint that explains --batch records at once."""
    model, processor = runtime.open_checkpoint(args.teacher, device)

    def ask(records: Sequence[Record]) -> Iterator[Explanation]:
        for i in range(0, len(records), args.batch):
            batch = records[i:i + args.batch]
            readable = []
            prompts = []
            for record in batch:
                try:
                    prompts.append(checkpoint_prompt(record, processor))
                except UnreadableImage as error:
                    frame = Frame(record.size, record.size, "absolute")
                    yield Explanation(record, frame, None, str(error))
                    continue
                readable.append(record)
            if not readable:
                continue
            seeds = torch.tensor([record_seed(args, record) for record in readable])
            tokens, _, lengths = generate(
                model, prompts, 1, args.max_new_tokens, args.temperature, seeds)
            # tokens (Q, 1, L), lengths (Q, 1)
            for record, prompt, ids, n in zip(readable, prompts, tokens[:, 0], lengths[:, 0]):
                yield Explanation(record, prompt.frame, processor.decode(ids[:n]))

    return ask


# ---------------------------------------------------------------- a server as teacher

class Unanswered(Exception):
    """A request without a whole answer; the message says why."""

    def __init__(
            self, message: str, retry: bool = True, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry = retry
        self.retry_after = retry_after             # seconds that the server asks to wait


class ChatServer:
    """A server that speaks OpenAI's chat-completions protocol; its methods run in threads.

    The key stands in the request's header alone. Whatever comes from the server may echo it, so
    `redact` goes over all that leaves this class.
    """

    def __init__(self, args: argparse.Namespace, processor: Processor | None) -> None:
        self.args = args
        self.processor = processor                 # that resizes as the teacher's, or None
        self.url = urlsplit(args.teacher)
        self.key = read_key(args.key_env)
        # Set when no more answers are wanted: who waits to try again then does not.
        self.stopped = threading.Event()

    def explain(self, record: Record) -> Explanation:
        """Asks until a whole answer has come, --tries times at most."""
        frame = self.teacher_frame(record)
        try:
            request = self.request_of(record, frame)
        except UnreadableImage as error:
            return Explanation(record, frame, None, str(error))
        reason = ""
        for attempt in range(self.args.tries):
            if self.stopped.is_set():
                break
            # Each try has its own seed, because the same one would be cut at the same place.
            request["seed"] = (record_seed(self.args, record) + attempt) % 2 ** 31
            try:
                content = self.post(json.dumps(request).encode())
                return Explanation(record, frame, self.redact(read_completion(content)))
            except Unanswered as error:
                reason = one_line(self.redact(str(error)))
                if not error.retry:
                    break
                if attempt + 1 < self.args.tries:
                    self.stopped.wait(backoff(attempt, error.retry_after))
        return Explanation(record, frame, None, reason)

    def teacher_frame(self, record: Record) -> Frame:
        """The frame that --coords names."""
        return frame_by_coords(record.size, self.args.coords, self.processor)

    def request_of(self, record: Record, frame: Frame) -> dict[str, Any]:
        """The body of a request, but for its seed."""
        # A lone surrogate in an expression has no bytes to send.
        text = teacher_request(record, frame).encode("utf-8", "replace").decode()
        content = [
            {"type": "image_url", "image_url": {"url": image_data_url(record)}},
            {"type": "text", "text": text},
        ]
        return {
            "model": self.args.model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": self.args.max_new_tokens,
            "temperature": self.args.temperature,
        }

    def post(self, body: bytes) -> bytes:
        """Sends one request -> the body of its answer. Redirects are not followed.

        Unanswered where the server fails, DataError where the flags must be wrong.
        """
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        path = self.url.path.rstrip("/") + "/chat/completions"
        deadline = time.monotonic() + self.args.timeout
        secure = self.url.scheme == "https"
        connect = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        connection = connect(self.url.hostname, self.url.port, timeout=self.args.timeout)
        try:
            connection.request("POST", path, body, headers)
            response = connection.getresponse()
            content = read_body(response, deadline)
        except TimeoutError:
            raise Unanswered(f"no whole answer within {self.args.timeout:g} s") from None
        except (OSError, http.client.HTTPException) as error:
            raise Unanswered(f"{type(error).__name__}: {error}") from None
        finally:
            connection.close()
        self.check_status(response, content)
        return content

    def check_status(self, response: http.client.HTTPResponse, content: bytes) -> None:
        """Raises what an HTTP status other than 200 means."""
        status = response.status
        if status == 200:
            return
        if status in (408, 429) or status >= 500:
            wait = retry_after(response.getheader("Retry-After"))
            raise Unanswered(f"{status}: {error_message(content)}", retry_after=wait)
        # A server may quote the key, or parts of it, when it refuses it: that is not repeated.
        if status in (401, 403):
            raise DataError(
                f"{self.args.teacher} answers {status}: it refuses the key in the environment "
                f"variable {self.args.key_env}, or its absence")
        if status == 404 or status < 400:
            message = one_line(self.redact(error_message(content)))
            raise DataError(f"{self.args.teacher} answers {status} ({message}); "
                            "check --teacher and --model")
        raise Unanswered(f"{status}: {error_message(content)}", retry=False)

    def redact(self, text: str) -> str:
        """A text without the key."""
        if len(self.key) < MIN_SECRET_LENGTH:
            return text
        return text.replace(self.key, "[key]")


def read_key(name: str) -> str:
    """The key in this environment variable, "" where there is none: not every server asks."""
    key = os.environ.get(name, "").strip()
    if not all("!" <= character <= "~" for character in key):
        runtime.fail(f"the key in the environment variable {name} holds characters that no "
                     "HTTP header can carry; set it again")
    return key


def image_data_url(record: Record) -> str:
    """A record's image as a data URL: its file as it is where that is JPEG or PNG, else as PNG."""
    image = data.open_image(record)
    content = b""
    # A server may turn an image as its EXIF orientation says, show it on black or cut its bits.
    if not hasattr(record.image, "draw") and images.is_plain(record.image):
        content = Path(record.image).read_bytes()
    if content.startswith(b"\xff\xd8\xff"):
        kind = "jpeg"
    else:
        kind = "png"
        if not content.startswith(b"\x89PNG\r\n\x1a\n"):
            buffer = io.BytesIO()
            # Without what the file says beside its pixels.
            image.info = {}
            image.save(buffer, "PNG")
            content = buffer.getvalue()
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def read_body(response: http.client.HTTPResponse, deadline: float) -> bytes:
    """Reads an answer to its end, piece by piece, so that a slow one is given up in time."""
    pieces = []
    while piece := response.read1(1 << 16):
        pieces.append(piece)
        if time.monotonic() > deadline:
            raise TimeoutError
    # Bytes that the header promised and that never came.
    if response.length:
        raise Unanswered("the answer was cut")
    return b"".join(pieces)


def read_completion(content: bytes) -> str:
    """The text of a chat completion. Unanswered where it is none, or was cut at its length."""
    try:
        choice = json.loads(content)["choices"][0]
        text = choice["message"]["content"]
        finish_reason = choice.get("finish_reason")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise Unanswered("the answer is no chat completion") from None
    if not isinstance(text, str):
        raise Unanswered("the answer holds no text")
    if finish_reason == "length":
        raise Unanswered("the explanation was cut at --max-new-tokens")
    # A lone surrogate has no bytes to train on.
    return text.encode("utf-8", "replace").decode()


def error_message(content: bytes) -> str:
    """What the body of an error says: OpenAI's {"error": {"message": ...}}, or all of it."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return content.decode("utf-8", "replace")
    if isinstance(value, dict) and isinstance(value.get("error"), dict):
        value = value["error"].get("message", value)
    return value if isinstance(value, str) else json.dumps(value)


def one_line(text: str) -> str:
    """The beginning of a text, without line ends and what no terminal should get."""
    printable = "".join(c if c.isprintable() else " " for c in text)
    return " ".join(printable.split())[:200]


def retry_after(header: str | None) -> float | None:
    """A Retry-After header, seconds or an HTTP date -> seconds, None where it says nothing."""
    if header is None:
        return None
    try:
        seconds = float(header)
    except ValueError:
        try:
            moment = parsedate_to_datetime(header)
            # RFC 9110: a date without a zone is in universal time.
            moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
            seconds = (moment - datetime.now(UTC)).total_seconds()
        except (ValueError, OverflowError):
            return None
    return min(seconds, MAX_RETRY_AFTER) if seconds >= 0 else None


def backoff(attempt: int, wanted: float | None) -> float:
    """Seconds to wait behind try 0, 1, ...: twice as long each time, spread at random.

    The spread keeps requests that failed together from coming again together. wanted: what the
    server asks for; that is not gone below.
    """
    delay = min(MAX_BACKOFF, FIRST_BACKOFF * 2 ** attempt) * random.uniform(0.5, 1.0)
    if wanted is None:
        return delay
    return max(delay, wanted * random.uniform(1.0, 1.1))


def server_teacher(args: argparse.Namespace) -> Ask:
    """A server that is asked for --parallel records at once, each in a thread."""
    processor = Processor.from_pretrained(args.init) if args.coords == "resized" else None
    server = ChatServer(args, processor)

    def ask(records: Sequence[Record]) -> Iterator[Explanation]:
        waiting: queue.SimpleQueue[Record] = queue.SimpleQueue()
        results: queue.SimpleQueue[Explanation | Exception] = queue.SimpleQueue()
        for record in records:
            waiting.put(record)

        def work() -> None:
            while not server.stopped.is_set() and not waiting.empty():
                try:
                    results.put(server.explain(waiting.get_nowait()))
                except queue.Empty:                # another thread has taken the last one
                    return
                except Exception as error:         # raised below, where the results are read
                    server.stopped.set()
                    results.put(error)

        # Daemons: a call that has enough does not wait for the answers under way.
        for _ in range(min(args.parallel, len(records))):
            threading.Thread(target=work, daemon=True).start()
        try:
            for _ in records:
                result = results.get()
                if isinstance(result, Exception):
                    raise result
                yield result
        finally:
            # Also where the caller has enough and reads no further.
            server.stopped.set()

    return ask


# ---------------------------------------------------------------- command line

def flags() -> runtime.FlagParser:
    parser = runtime.FlagParser(
        "Shows the reasoning that sft.py trains on, beside the picture it speaks of; "
        "or has a teacher write some")
    add = parser.add_argument
    add("name", help="data set")
    add("--root", help="its folder; default data/<name>")
    add("--split", default="sft", help="split")
    data.add_reading_flags(add, "--data-coords")
    add("--init", metavar="CKPT",
        help="checkpoint in whose coordinates texts are shown, as sft.py --init writes them; "
        "without it they are in pixels of the picture. With --coords resized: one that resizes "
        "images as the teacher does")
    add("--show", type=runtime.positive, default=8, help="records")
    add("--seed", type=int, default=0, help="of the teacher's sampling")
    add("--out", help="picture, default cot_check.png; "
        "with --teacher the JSONL, default cot_<name>_<split>.jsonl")
    add_teacher_flags(parser)
    return parser


def add_teacher_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("teacher").add_argument
    add("--teacher", metavar="CKPT or URL",
        help="have this checkpoint explain the known boxes, or the server behind this address "
        "of OpenAI's protocol: http://host:port/v1")
    add("--limit", type=runtime.positive,
        help="records in this call; default: all that are left")
    add("--want", type=runtime.positive,
        help="stop when so many explanations are kept, those of earlier calls among them")
    add("--max-new-tokens", type=runtime.positive, default=400,
        help="tokens of an explanation at most")
    add("--temperature", type=float, default=0.7, help="of sampling; 0 is greedy")
    add = parser.add_argument_group("teacher, a checkpoint").add_argument
    add("--batch", type=runtime.positive, default=16, help="records at once")
    runtime.add_device_flag(add)
    add = parser.add_argument_group("teacher, a server").add_argument
    add("--model", help="name of the model there")
    add("--coords", choices=("original", "resized", "1000"),
        help="coordinates that the model knows: pixels of the original image, pixels of the "
        "image as it is resized (needs --init), thousandths of its sides")
    add("--parallel", type=runtime.positive, default=8, help="requests at once")
    add("--tries", type=runtime.positive, default=8,
        help="of a request that gets no whole answer; then the record is left undone")
    add("--timeout", type=runtime.above_zero, default=120.0, help="seconds for an answer")
    add("--key-env", metavar="NAME", default="OPENAI_API_KEY",
        help="environment variable with the server's key; none is sent where it is not set")


def is_server(teacher: str | None) -> bool:
    return teacher is not None and teacher.startswith(("http://", "https://"))


def check_teacher_flags(args: argparse.Namespace) -> None:
    """Ends the script where flags do not fit together."""
    if not 0 <= args.temperature < math.inf:
        runtime.fail(f"--temperature {args.temperature} is not a number from 0 up; 0 is greedy")
    if not is_server(args.teacher):
        if args.teacher and args.init:
            runtime.fail("--init is for the check; a --teacher speaks in its own frame")
        if args.model or args.coords:
            runtime.fail("--model and --coords are about a server: --teacher http://host:port/v1")
        return
    if not args.model or not args.coords:
        runtime.fail("a server as --teacher needs --model, the name of the model there, and "
                     "--coords original, resized or 1000, the coordinates that it knows")
    if args.coords == "resized" and not args.init:
        runtime.fail("--coords resized needs --init, a checkpoint whose processor resizes images "
                     "as the teacher's does")
    url = urlsplit(args.teacher)
    # What stands there would be shown wherever the address is.
    if url.username or url.password or url.query:
        runtime.fail("the address of --teacher holds a user, a password or a query; it is to "
                     "end in /v1, and a key belongs into the environment variable of --key-env")
    try:
        fits = bool(url.hostname) and url.port != 0
    except ValueError:
        fits = False
    if not fits:
        runtime.fail(f"--teacher {args.teacher} is no address like http://host:port/v1")


def show_texts(args: argparse.Namespace, records: Records) -> None:
    """Prints the texts of a few records, and writes their pictures."""
    processor = Processor.from_pretrained(args.init) if args.init else None
    out = Path(args.out or "cot_check.png")
    runtime.writable(out.parent)
    write_completion = writer(records)
    pictures = []
    # Spread evenly over the split.
    stride = max(1, len(records) // args.show)
    for record in records[::stride][:args.show]:
        image = data.open_image(record)
        frame = Frame(image.size, image.size, "absolute")
        if processor is not None:
            frame = processor(image, record.text).frame
        text = write_completion(record, frame)
        if not format_ok(text):
            sys.exit(f"cot.py: record {record.id} makes a text that breaks the format: {text}")
        print(f"{record.id}: {record.text}\n  {text}")
        pictures.append(draw_boxes(image, [(record.box, "red")], text))
    data.save_sheet(pictures, out)
    print(f"written: {out}")


def main() -> None:
    args = flags().parse_args()
    # An expression may hold what the terminal's encoding has no bytes for.
    sys.stdout.reconfigure(errors="backslashreplace")
    check_teacher_flags(args)
    runs_here = args.teacher and not is_server(args.teacher)
    device = runtime.start(runtime.choose_device(args.device)) if runs_here else None
    records = data.load(args.name, args.root, args.split, args.data_coords, args.stretch)
    if not records:
        refused = data.refusal_summary(records, args.name, args.root, args.split)
        raise DataError(f"no usable record in the split {args.split} of {args.name}: "
                        f"{refused or 'it is empty'}")
    if not args.teacher:
        show_texts(args, records)
    elif is_server(args.teacher):
        run_teacher(args, records, server_teacher(args))
    else:
        run_teacher(args, records, checkpoint_teacher(args, device))


if __name__ == "__main__":
    runtime.main(main)
