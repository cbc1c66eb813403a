"""Stage 0: reasoning for CoT-SFT, written from the annotations or by a teacher.

A text repeats the expression and, if that refers to another object (the anchor), says where it is.
Then it lists the candidates, always from left to right: where each is and what the expression asks
about (part of the image, size, side of or distance to the anchor, "leftmost so far"). It ends with
the choice. The box comes last, because a model writes from left to right.

Each fact has one wording, because in RFT a token with equally good alternatives adds noise to the
gradient. Data sets annotate only some objects, so a text mentions only objects with an expression
in the same split and never claims that there are no others. The abstract of RSGround-R1 (arXiv
2601.21634) mentions "synthetic spatial reasoning"; the form is ours.

    python cot.py dior                  prints a few texts and draws their boxes, in image pixels
    python cot.py dior --init CKPT      the same in the coordinates that sft.py --init CKPT uses
    python cot.py dior --teacher URL    has a teacher explain the boxes: see tools/teacher.py

sft.py --cot FILE reads reasoning from a JSONL and adds the answer from the annotation:

    {"id": "123", "think": "...", "frame": {"original": [W, H], "resized": [W, H],
                                            "convention": "absolute" or "1000"}}
    {"id": "124", "refused": "..."}     this record's reasoning is written from the annotations

Points (x, y) and boxes [x1, y1, x2, y2] in "think" are converted from "frame" to the student's
frame; without "frame", "think" is used as it is.
"""
import argparse
import math
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import data
import reward
from qwen.answer import TAGS, Box, Frame, format_box, format_ok, write
from qwen.hub import MALFORMED, folder
from qwen.processor import Processor
from readers.base import DataError, Record, read_json_lines
from report.pictures import draw_boxes
from tools.check_data import save_sheet
from tools.teacher import COORDINATES, PLAIN_NUMBER, check_teacher_flags, run_teacher
from train.dist import check_writable, fail
from train.flags import (
    DEVICE_FLAG, FlagParser, above_zero, add_reading_flags, not_negative, positive)
from train.run import launch

REGIONS = (("upper left", "top", "upper right"), ("left", "center", "right"),
           ("lower left", "bottom", "lower right"))
ROUNDING = 0.02               # of places and distances, as a fraction of the longer side
MAX_OTHER_CANDIDATES = 5      # beside the chosen object
SIZE_WORDS = re.compile(
    r"\b(?:large(?:r|st)?|big(?:ger|gest)?|huge|small(?:er|est)?|tiny|tinier|tiniest|little)\b")
DISTANCE_WORDS = re.compile(r"\b(?:near|nearest|close|closest|next|beside)\b")
SIDE_WORDS = re.compile(
    r"\b(?:left|right|above|below|over|under|higher|lower|upper|further|top|bottom)\b")
RELATION_WORDS = re.compile(
    r"\b(?:above|below|over|under|beside|near|nearest|closest|next|of|higher|further)\b")
# Name of an extreme in the text -> words that ask for it.
EXTREMES = {
    "leftmost": "leftmost|farthest to the left",
    "rightmost": "rightmost|farthest to the right",
    "topmost": "topmost|uppermost|highest|nearest to the top|closest to the top",
    "lowest": "lowest|bottommost|nearest to the bottom|closest to the bottom",
    "nearest": "nearest|closest|next to",
    "largest": "largest|biggest",
    "smallest": "smallest|tiniest",
}


@dataclass(frozen=True)
class Neighbor:
    category: str
    box: Box                   # original pixels
    color: str = ""            # "" if unknown


def box_center(box: Box) -> tuple[float, float]:
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2


def box_area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def round_coarsely(value: float, frame: Frame) -> int:
    """Rounds a coordinate or distance in the model's frame to a multiple of 5, 10, 15, ..."""
    step = 5 * max(1, round(ROUNDING * max(frame.extent) / 5))
    return step * round(value / step)


def point_text(box: Box, frame: Frame) -> str:
    """Original pixels -> the rounded center in the model's frame: "(45, 60)"."""
    x, y = frame.to_model(box_center(box))
    return f"({round_coarsely(x, frame)}, {round_coarsely(y, frame)})"


def noun_phrase(neighbor: Neighbor) -> str:
    """"an orange car"."""
    words = f"{neighbor.color} {neighbor.category.lower() or 'object'}".strip()
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def find_anchor(record: Record, others: Sequence[Neighbor],
                candidates: Sequence[Neighbor]) -> tuple[Neighbor | None, str]:
    """The object other than the candidates that the expression refers to, and the word "largest"
    or "smallest" if that tells it from others."""
    text = record.text.lower()
    # In "the red ship next to the largest ship", a size after the target's noun is the anchor's.
    after = text.split(record.category.lower() or "object", 1)[-1]
    mentioned = []
    for o in others:
        noun = o.category.lower()
        if o in candidates or not noun or noun not in text:
            continue
        # Prefer the named color, then the named size: "the largest red tank".
        sized, size_rank, extreme = rf" (?:{o.color or '[a-z]+'} )?{re.escape(noun)}", 0.0, ""
        if re.search(rf"\b(?:{EXTREMES['largest']}){sized}", after):
            size_rank, extreme = -box_area(o.box), "largest"
        elif re.search(rf"\b(?:{EXTREMES['smallest']}){sized}", after):
            size_rank, extreme = box_area(o.box), "smallest"
        named = bool(o.color) and f"{o.color} {noun}" in text
        # One of the target's category needs a color or size: "the ship next to the red ship".
        if o.category != record.category or named or extreme:
            mentioned.append((not named, size_rank, o, extreme))
    return min(mentioned, key=lambda entry: entry[:2])[2:] if mentioned else (None, "")


def choice(objects: Sequence[Neighbor], chosen: Neighbor, frame: Frame,
           facts: Callable[[Neighbor], str], extreme: str = "",
           key: Callable[[Neighbor], float] | None = None) -> list[str]:
    """Sentences that choose an object: it and nearby ones from left to right, then the choice.
    facts: text that follows an object's place. extreme: how the chosen one compares ("leftmost"),
    which makes its key the smallest; every object that leads so far is called so."""
    center = box_center(chosen.box)
    nearest = sorted(objects, key=lambda o: math.dist(box_center(o.box), center))
    sentences, best = [], math.inf
    for o in sorted(nearest[:1 + MAX_OTHER_CANDIDATES], key=lambda o: box_center(o.box)):
        line = f"{noun_phrase(o)} near {point_text(o.box, frame)}{facts(o)}"
        if len(objects) > 1 and extreme and key(o) < best:
            best = key(o)
            line += f", {extreme} so far"
        sentences.append(f"{line}.")
    if len(objects) > 1:
        sentences.append(f"so it is the one near {point_text(chosen.box, frame)}.")
    return sentences


def explain(record: Record, others: Sequence[Neighbor], frame: Frame, color: str = "") -> str:
    """A record's completion. others: the other objects in the image. color: the target's, or ""."""
    text = record.text.lower()
    # A size word after the relation describes the anchor: "the car below the largest plane".
    head = RELATION_WORDS.split(text)[0]

    # 1. Candidates have the target's category, and its color if the expression names it.
    target = Neighbor(record.category, record.box, color)
    alike = [o for o in others if o.category == record.category]
    if color and f"{color} {record.category.lower() or 'object'}" in text:
        alike = [o for o in alike if o.color == color]
    anchor, anchor_extreme = find_anchor(record, others, alike)
    candidates = [target, *alike]
    origin = box_center(anchor.box) if anchor else None
    # An extreme's key is the smallest for the object that it means.
    keys = {
        "leftmost": lambda o: box_center(o.box)[0], "rightmost": lambda o: -box_center(o.box)[0],
        "topmost": lambda o: box_center(o.box)[1], "lowest": lambda o: -box_center(o.box)[1],
        "nearest": lambda o: math.dist(box_center(o.box), origin),
        "largest": lambda o: -box_area(o.box), "smallest": lambda o: box_area(o.box)}
    sizes = {o: f", of size {round(math.sqrt(box_area(frame.to_model(o.box))))}"
             for o in (target, *others)}

    # 2. The anchor, chosen by size if there are several of its kind.
    sentences = [f"{record.text}."]
    if anchor is not None:
        same = [anchor]
        if anchor_extreme:
            named = anchor.color and f"{anchor.color} {anchor.category.lower()}" in text
            same = [o for o in (target, *others) if o.category == anchor.category
                    and (o.color == anchor.color or not named)]
        sentences += choice(same, anchor, frame, sizes.get if len(same) > 1 else lambda o: "",
                            anchor_extreme, keys.get(anchor_extreme))

    # 3. The extreme that the expression asks for, if the annotations agree that the target is it.
    extreme = ""
    for name, words in EXTREMES.items():
        possible = name != "nearest" or anchor is not None
        where = head if name in ("largest", "smallest") else text
        if (possible and re.search(rf"\b(?:{words})\b", where)
                and keys[name](target) == min(map(keys[name], candidates))):
            extreme = name
            break

    # 4. A sentence per candidate, with what the expression asks about.
    def facts(o: Neighbor) -> str:
        x, y = box_center(o.box)
        line = sizes[o] if SIZE_WORDS.search(head) else ""
        if anchor is None:
            if not extreme:
                row, column = (min(2, int(3 * v / s)) for v, s in zip((y, x), record.size[::-1]))
                line = f", at the {REGIONS[row][column]}{line}"
            return line
        # Give the side or the distance; both if the expression asks for both or neither.
        asks_side, asks_distance = SIDE_WORDS.search(text), DISTANCE_WORDS.search(text)
        if abs(x - origin[0]) >= abs(y - origin[1]):
            side = "left of" if x < origin[0] else "right of"
        else:
            side = "above" if y < origin[1] else "below"
        distance = round_coarsely(math.dist(frame.to_model((x, y)), frame.to_model(origin)), frame)
        if not distance:          # such as a field in its stadium
            return line + ", about where it is"
        line += f", {side} it" if asks_side or not asks_distance else ""
        return line + (f", {distance} away" if asks_distance or not asks_side else "")

    sentences += choice(candidates, target, frame, facts, extreme, keys.get(extreme))
    # A tag in an expression must not look like one of the answer format.
    think = " ".join(sentences).replace("<", "(").replace(">", ")")
    return write(think, format_box(record.box, frame))


def other_objects(record: Record, same_image: Sequence[Record]) -> list[Neighbor]:
    """same_image: records of this split only, so that training never mentions a test object."""
    if record.objects:
        return [Neighbor(o.category, o.box, o.color) for o in record.objects if o.box != record.box]
    # Several expressions can annotate one object.
    boxes = torch.tensor([record.box, *(r.box for r in same_image)], dtype=torch.float64)
    same = reward.iou(boxes[:, None], boxes) >= data.SAME_BOX        # (boxes, boxes)
    distinct = [0]                # the record itself
    for i in range(1, len(boxes)):
        if not same[i, distinct].any():
            distinct.append(i)
    return [Neighbor(same_image[i - 1].category, same_image[i - 1].box) for i in distinct[1:]]


def writer(records: Sequence[Record], file: str | Path | None = None,
           answer_only: bool = False) -> Callable[[Record, Frame], str]:
    """-> function (record, frame) -> completion.
    file: JSONL of reasoning. Annotations are used if it refuses or (a teacher's) lacks a record."""
    reasoning = load_reasoning(file, records) if file and not answer_only else {}
    by_image = defaultdict(list)
    for record in records:
        by_image[record.image].append(record)

    def write_completion(record: Record, frame: Frame) -> str:
        box_text = format_box(record.box, frame)
        if answer_only:
            return write(None, box_text)
        given = reasoning.get(record.id)
        if given is None:
            color = next((o.color for o in record.objects if o.box == record.box), "")
            others = other_objects(record, by_image[record.image])
            return explain(record, others, frame, color)
        think, teacher_frame = given
        if teacher_frame is None or teacher_frame.extent == frame.extent:
            return write(think, box_text)
        # Points and boxes become whole numbers of the student's frame. The last one comes first,
        # so that the places of the others stay.
        for match in reversed([*COORDINATES.finditer(think)]):
            numbers = [float(number) for number in re.findall(PLAIN_NUMBER, match[0])]
            numbers = frame.to_model(teacher_frame.to_image(numbers))
            converted = re.sub(PLAIN_NUMBER, "{}", match[0]).format(*map(round, numbers))
            think = think[:match.start()] + converted + think[match.end():]
        return write(think, box_text)

    return write_completion


def load_reasoning(
        path: str | Path, records: Sequence[Record]) -> dict[str, tuple[str, Frame | None] | None]:
    """{id: (think, frame), or None if refused}. Only a file with frames may lack records: a
    teacher writes it, and may not have finished."""
    reasoning = {}
    for number, line in read_json_lines(path):
        place = f"{path}, line {number}"
        try:
            refused = "refused" in line
            think, frame = ("", None) if refused else (line["think"], line.get("frame"))
            think.encode()                                    # fails for a lone surrogate
            if frame is not None:
                sizes = tuple(frame["original"]), tuple(frame["resized"])
                frame = Frame(*sizes, frame["convention"])
                frame.to_model(frame.to_image((1, 1)))        # fails if a side is 0
            reasoning[str(line["id"])] = None if refused else (think, frame)
        except MALFORMED:
            raise DataError(f'{place}: not a JSON object with "id", a text "think" and, '
                            'optionally, a "frame"') from None
        if any(tag in think for tag in TAGS):
            raise DataError(f'{place}: remove the <think> and <answer> tags from "think"')
    missing = [record.id for record in records if record.id not in reasoning]
    if missing and not any(given and given[1] for given in reasoning.values()):
        raise DataError(f"{path}: no reasoning for {len(missing)} of {len(records)} records, "
                        f"the first is {missing[0]!r}")
    for record in records:
        _, frame = reasoning.get(record.id) or (None, None)
        if frame is not None and frame.original != record.size:
            raise DataError(
                f"{path}: the reasoning of record {record.id!r} is for an image of "
                f"{frame.original}, but its image is {record.size}; is it for another data set?")
    return reasoning


def flags() -> FlagParser:
    parser = FlagParser(
        description="Shows the reasoning that sft.py trains on, or has a teacher write it")
    add = parser.add_argument
    add("name", nargs="?", default=argparse.SUPPRESS, help="data set")
    add("--data", dest="name", metavar="NAME", help="the same")
    add("--root", help="its folder; default data/<name>")
    add("--split", default="sft", help="of the data set; sft.py trains on sft")
    add_reading_flags(add)
    add("--init", metavar="CKPT",
        help="checkpoint that sets the coordinates, as in sft.py (default: image pixels); with "
        "--coords resized, one that resizes images as the teacher does")
    add("--show", type=positive, default=8, help="number of records to show")
    add("--seed", type=int, default=0, help="seed of the teacher's sampling")
    add("--out", help="picture (cot_check.png) or teacher's JSONL (cot_<name>_<split>.jsonl)")
    add = parser.add_argument_group("teacher").add_argument
    add("--teacher", metavar="CKPT or URL", help="has this checkpoint, or the "
        "server with OpenAI's protocol at http://host:port/v1, explain the known boxes")
    add("--limit", type=positive, help="records in this call; default: all that are left")
    add("--want", type=positive, help="stop when this many are kept, earlier calls included")
    add("--max-new-tokens", type=positive, default=400, help="longest explanation, tokens")
    add("--temperature", type=not_negative, default=0.7, help="of sampling; 0: greedy")
    add = parser.add_argument_group("teacher, a checkpoint").add_argument
    add("--batch", type=positive, default=16, help="records at once")
    add("--device", **DEVICE_FLAG)
    add = parser.add_argument_group("teacher, a server").add_argument
    add("--model", help="the model's name on the server")
    add("--coords", choices=("original", "resized", "1000"),
        help="its coordinates: pixels of the image, of the resized image (needs --init), or "
        "thousandths of the sides")
    add("--parallel", type=positive, default=8, help="requests at once")
    add("--tries", type=positive, default=8, help="requests for a record's answer in this call")
    add("--timeout", type=above_zero, default=120.0, help="seconds to wait for an answer")
    add("--key-env", metavar="NAME", default="OPENAI_API_KEY",
        help="environment variable with the server's key, if it needs one")
    return parser


def main() -> None:
    args = flags().parse_args()
    if not args.name:
        fail("name a data set: python cot.py dior")
    check_teacher_flags(args)
    records = data.load(args.name, args.root, args.split, args.data_coords, args.stretch)
    if not records:
        refused = data.refusal_summary(records, args.name, args.root, args.split)
        raise DataError(f"no usable record in the split {args.split} of {args.name}: "
                        f"{refused or 'it is empty'}")
    if args.teacher:
        run_teacher(args, records)
        return
    processor = Processor.from_pretrained(folder(args.init)) if args.init else None
    out = Path(args.out or "cot_check.png")
    check_writable(out.parent)
    write_completion = writer(records)
    pictures = []
    for record in records[::max(1, len(records) // args.show)][:args.show]:    # evenly spread
        image = data.open_image(record)
        frame = (processor(image, record.text).frame if processor
                 else Frame(image.size, image.size, "absolute"))
        text = write_completion(record, frame)
        if not format_ok(text):
            sys.exit(f"cot.py: the text of record {record.id} breaks the answer format: {text}")
        print(f"{record.id}: {record.text}\n  {text}")
        pictures.append(draw_boxes(image, [(record.box, "red")], text))
    save_sheet(pictures, out)
    print(f"written: {out}")


if __name__ == "__main__":
    launch(main)
