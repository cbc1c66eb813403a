"""Chain-of-thought written from annotations: spatial reasoning in words that can be checked.

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
    python cot.py dior --teacher CKPT     another model explains the known boxes, into
                                          cot_dior_sft.jsonl; goes on where it was stopped

A line of a JSONL of your own (sft.py --cot FILE); the answer is added from the annotation:

    {"id": "123", "think": "..."}
    {"id": "124", "refused": "..."}       no such reasoning: the record gets the one that is
                                          written from the annotations
"""
import argparse
import itertools
import json
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import data
import reward
import runtime
from data import (
    DataError,
    Frame,
    Processor,
    Prompt,
    Record,
    Records,
    draw_boxes,
    format_box,
    to_image_frame,
    to_model_frame,
)
from generate import generate
from model import QwenVL
from reward import failure, format_ok, parse_box

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
TEACHER_PROMPT = (
    "The object that is described as {text} lies in the box {box}. Write down how one finds it "
    "who does not know the box: what is asked for, which objects of that kind there are and "
    "where in the image they lie, how they lie to each other, and why this one fits. Put that "
    "into <think> </think> tags and do not write the box there. Then answer with the box in "
    '<answer> </answer> tags, like <answer>{{"bbox_2d": [x1, y1, x2, y2]}}</answer>')


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
    return to_model_frame((*box_center(box), 0, 0), frame)[:2]


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
        line += f", of size {round(math.sqrt(box_area(to_model_frame(candidate.box, frame))))}"
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
    return f"<think>{think}</think>{answer_text(record, frame)}"


def answer_text(record: Record, frame: Frame) -> str:
    """The answer to a record, in the model's frame."""
    return f'<answer>{{"bbox_2d": {format_box(record.box, frame)}}}</answer>'


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

    def find(record: Record) -> list[Neighbor]:
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

    return find


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

    Its reasoning is written from the annotations, or read from a JSONL file; answer_only leaves
    it out.
    """
    if answer_only:
        return answer_text
    find_neighbors = neighbor_finder(records)
    reasoning = load_reasoning(file, records) if file else {}

    def write_completion(record: Record, frame: Frame) -> str:
        think = reasoning.get(record.id)
        if think:
            return think + answer_text(record, frame)
        return explain(record, find_neighbors(record), frame, target_color(record))

    return write_completion


# ---------------------------------------------------------------- reasoning from a file

def load_reasoning(path: str | Path, records: Sequence[Record]) -> dict[str, str | None]:
    """A JSONL of reasoning -> id -> "<think>...</think>", None where the line says "refused".

    DataError where a line does not fit, or a record has none.
    """
    reasoning = {}
    for number, line in read_json_lines(path):
        identity, think = read_reasoning(line, f"{path}, line {number}")
        reasoning[identity] = None if think is None else f"<think>{think}</think>"
    missing = [r.id for r in records if r.id not in reasoning]
    if missing:
        raise DataError(f"{path}: no reasoning for {len(missing)} of {len(records)} records, "
                        f"the first is {missing[0]!r}")
    return reasoning


def read_reasoning(line: Any, place: str) -> tuple[str, str | None]:
    """One line's value -> id and reasoning, None where refused. place: of the line, for errors."""
    try:
        identity = str(line["id"])
        think = None if "refused" in line else line["think"]
        if not isinstance(think, str | None):
            raise TypeError
        # A lone surrogate has no bytes to train on.
        (think or "").encode()
    except (ValueError, KeyError, TypeError):
        raise DataError(
            f'{place}: not a JSON object with "id" and a text "think"') from None
    tags = ("<think>", "</think>", "<answer>", "</answer>")
    if think is not None and any(tag in think for tag in tags):
        raise DataError(
            f'{place}: "think" is the reasoning alone, without <think> or <answer> tags')
    return identity, think


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


# ---------------------------------------------------------------- reasoning from a teacher

def filter_explanation(text: str, record: Record, frame: Frame) -> tuple[str | None, str | None]:
    """A teacher's completion -> its reasoning and None, or None and why it is refused."""
    box = parse_box(text)
    if box is None or not format_ok(text):
        reason = failure(text) or "not one think block, then one answer"
        return None, f"does not parse: {reason}"
    if box_iou(to_image_frame(box, frame), record.box) < MIN_TEACHER_IOU:
        return None, "disagrees with the annotation"
    think = text[text.index("<think>") + len("<think>"):text.index("</think>")].strip()
    if reveals_box(think, [box, to_model_frame(record.box, frame)]):
        return None, "gives the box away before the answer"
    if not think:
        return None, "no reasoning"
    return think, None


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
    """Whether each of the four wanted numbers is near a value of its own, in whatever order."""
    for chosen in itertools.permutations(values, 4):
        if all(abs(a - b) <= REVEALING_DISTANCE for a, b in zip(chosen, wanted)):
            return True
    return False


def read_finished(out: Path) -> dict[str, bool]:
    """The teacher's file so far -> id -> whether it was refused; a line cut short is removed."""
    content = b""
    try:
        if out.exists():
            # Opened for writing too, so that a file that can't be written is refused here.
            with open(out, "r+b") as file:
                content = file.read()
    except OSError as error:
        raise DataError(f"{out} can't be written ({error.strerror}); "
                        "name another file with --out") from None
    finished = {}
    # A call that was stopped may have left part of a line.
    whole_lines, _, cut_line = content.rpartition(b"\n")
    for number, line in read_json_lines(out, whole_lines):
        if not isinstance(line, dict) or "id" not in line:
            raise DataError(f'{out}, line {number}: not a JSON object with an "id"; '
                            "name another file with --out")
        finished[str(line["id"])] = "refused" in line
    if cut_line:
        os.truncate(out, len(whole_lines) + bool(whole_lines))
    return finished


def teacher_prompt(record: Record, processor: Processor) -> Prompt:
    """What a checkpoint is asked as a teacher; its frame is the one that the teacher answers in."""
    image = data.open_image(record)
    pixels, grid, resized = processor.patches(image)
    frame = Frame(image.size, resized, processor.convention)
    request = TEACHER_PROMPT.format(text=record.text, box=format_box(record.box, frame))
    ids = processor.turns(request, int(grid.prod()) // processor.merge ** 2)
    return Prompt(torch.tensor(ids), pixels, grid, frame)


def ask_checkpoint(
        model: QwenVL, processor: Processor, records: Sequence[Record], args: argparse.Namespace,
) -> list[tuple[str, Frame]]:
    """The checkpoint's explanation of each record, and the frame that it speaks in."""
    prompts = [teacher_prompt(record, processor) for record in records]
    # A record's seed is its own, so that its explanation does not depend on where a call began.
    hashes = [data.fingerprint(f"{args.seed} {record.id}") for record in records]
    seeds = torch.tensor([int.from_bytes(digest[:4], "big") for digest in hashes])
    tokens, _, lengths = generate(
        model, prompts, 1, args.max_new_tokens, args.temperature, seeds)    # (Q, 1, L), (Q, 1)
    explanations = []
    for prompt, ids, length in zip(prompts, tokens[:, 0], lengths[:, 0].tolist()):
        explanations.append((processor.decode(ids[:length]), prompt.frame))
    return explanations


def run_teacher(args: argparse.Namespace, records: Records, device: torch.device) -> None:
    """Has a checkpoint explain each record's known box; writes a line for each, kept or refused."""
    out = Path(args.out or f"cot_{args.name.replace('/', '_')}_{args.split}.jsonl")
    runtime.writable(out.parent)
    finished = read_finished(out)
    remaining = [r for r in records if r.id not in finished][:args.limit]
    model, processor = runtime.open_checkpoint(args.teacher, device)
    refusals: Counter[str] = Counter()
    bar = tqdm(total=len(remaining), desc="teacher")
    with open(out, "a", encoding="utf-8") as file, bar:
        for i in range(0, len(remaining), args.batch):
            batch = remaining[i:i + args.batch]
            explanations = ask_checkpoint(model, processor, batch, args)
            for record, (text, frame) in zip(batch, explanations):
                think, reason = filter_explanation(text, record, frame)
                line = {"id": record.id, "think": think}
                if reason:
                    line = {"id": record.id, "refused": reason, "text": text}
                    refusals[reason] += 1
                file.write(json.dumps(line) + "\n")
                finished[record.id] = bool(reason)
            file.flush()
            bar.update(len(batch))
            bar.set_postfix_str(f"kept {count_kept(finished)} of {len(finished)}")
    print(f"written: {out}; {count_kept(finished)} of {len(finished)} records have reasoning, "
          f"{len(records) - len(finished)} are still to come")
    for reason, count in sorted(refusals.items()):
        print(f"  refused: {count} {reason}")


def count_kept(finished: dict[str, bool]) -> int:
    return sum(not refused for refused in finished.values())


# ---------------------------------------------------------------- command line

def flags() -> runtime.Parser:
    parser = runtime.Parser(
        "Shows the reasoning that sft.py trains on, beside the picture it speaks of")
    add = parser.add_argument
    add("name", help="data set")
    add("--root", help="its folder; default data/<name>")
    add("--split", default="sft", help="split")
    add("--init", metavar="CKPT",
        help="checkpoint in whose coordinates texts are shown, as sft.py --init writes them; "
        "without it they are in pixels of the picture")
    add("--show", type=runtime.positive, default=8, help="records")
    add("--seed", type=int, default=0, help="of the teacher's sampling")
    add("--out", help="picture, default cot_check.png; "
        "with --teacher the JSONL, default cot_<name>_<split>.jsonl")
    cuda = torch.cuda.is_available()
    add = parser.add_argument_group("teacher").add_argument
    add("--teacher", metavar="CKPT", help="have this checkpoint explain the known boxes")
    add("--limit", type=runtime.positive,
        help="records in this call; default: all that are left")
    add("--batch", type=runtime.positive, default=16, help="records at once")
    add("--max-new-tokens", type=runtime.positive, default=400,
        help="tokens of an explanation at most")
    add("--temperature", type=float, default=0.7, help="of sampling; 0 is greedy")
    add("--device", choices=("cuda", "cpu"), default="cuda" if cuda else "cpu",
        help="where the teacher runs")
    return parser


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
    if not 0 <= args.temperature < math.inf:
        runtime.fail(f"--temperature {args.temperature} is not a number from 0 up; 0 is greedy")
    if args.teacher and args.init:
        runtime.fail("--init is for the check; a --teacher speaks in its own frame")
    device = runtime.start(args.device) if args.teacher else None
    records = data.load(args.name, args.root, args.split)
    if not records:
        refused = data.told_refused(records, args.name, args.root, args.split)
        raise DataError(f"no usable record in the split {args.split} of {args.name}: "
                        f"{refused or 'it is empty'}")
    if args.teacher:
        run_teacher(args, records, device)
    else:
        show_texts(args, records)


if __name__ == "__main__":
    runtime.main(main)
