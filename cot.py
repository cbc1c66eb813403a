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
import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import data
from qwen.answer import TAGS, Frame, format_box, format_ok, write
from qwen.processor import Processor
from readers.base import DataError, Record, Records, read_json_lines
from report.pictures import draw_boxes
from tools import check_data
from tools.teacher import (
    COORDINATES,
    PLAIN_NUMBER,
    Box,
    add_teacher_flags,
    box_area,
    box_iou,
    check_teacher_flags,
    checkpoint_teacher,
    is_server,
    run_teacher,
    server_teacher,
)
from train import dist
from train import run as runtime

Point = tuple[float, float]
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


@dataclass(frozen=True)
class Neighbor:
    """Another annotated object of the image."""

    category: str
    box: Box                   # original pixels
    color: str = ""


# ---------------------------------------------------------------- places in words

def box_center(box: Box) -> Point:
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2


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


def show_texts(args: argparse.Namespace, records: Records) -> None:
    """Prints the texts of a few records, and writes their pictures."""
    processor = Processor.from_pretrained(args.init) if args.init else None
    out = Path(args.out or "cot_check.png")
    dist.check_writable(out.parent)
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
    check_data.save_sheet(pictures, out)
    print(f"written: {out}")


def main() -> None:
    args = flags().parse_args()
    # An expression may hold what the terminal's encoding has no bytes for.
    sys.stdout.reconfigure(errors="backslashreplace")
    check_teacher_flags(args)
    runs_here = args.teacher and not is_server(args.teacher)
    device = dist.start(dist.choose_device(args.device)) if runs_here else None
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
