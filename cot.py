"""Chain-of-thought written from annotations: spatial reasoning in words that can be checked against the boxes.

A text says what is asked for; where the object lies that the expression refers to, if there is one; then one candidate after another, in
the order that the expression asks about ("the topmost": from top to bottom), each with its place, with what the expression tells candidates
apart by (size, side or distance of that other object), and whether it fits; then the box. Reasons stand before what follows from them, for
a model writes in this order. One thing has one wording: in RFT every token that could as well be another is noise in the gradient. Every
sentence is true of the annotated boxes. A real data set annotates some of its objects: a text speaks only of those whose own expression is
in the split at hand, and never claims that there are no more.

Source: our reading of "synthetic spatial reasoning" in the abstract of RSGround-R1 (arXiv 2601.21634); the paper's own texts are not
public to us.

    python cot.py dior                       a few texts beside their pictures, in pixels of the picture
    python cot.py dior --init CKPT           the same in that checkpoint's coordinates, as sft.py --init CKPT trains on them
    python cot.py dior --teacher CKPT        another model explains the known boxes, into cot_dior_sft.jsonl; goes on where it was stopped
    {"id": "123", "think": "..."}            a line of a JSONL of your own (sft.py --cot FILE); the answer is added from the annotation
    {"id": "124", "refused": "..."}          a record without such reasoning: it gets the one written from the annotations
"""
import itertools
import json
import math
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

import data
import runtime
from answer import failure, format_box, format_ok, parse_box
from data import DataError
from generate import generate
from pictures import draw_boxes
from processor import Frame, Processor, Prompt, to_image_frame, to_model_frame

REGIONS = (("upper left", "top", "upper right"), ("left", "center", "right"), ("lower left", "bottom", "lower right"))
SAME_OBJECT = 0.9                 # IoU above which another annotation is the target itself under another expression
COARSE = 0.02                     # centres and distances are rounded to about this share of the frame's longer side, in fives
MOST = 5                          # other candidates spoken of
SIZES = re.compile(r"\b(?:large|larger|largest|big|bigger|biggest|huge|small|smaller|smallest|tiny|tinier|tiniest|little)\b")
NEARNESS = re.compile(r"\b(?:near|nearest|close|closest|next|beside)\b")
SIDES = re.compile(r"\b(?:left|right|above|below|over|under|higher|lower|upper|further|top|bottom)\b")
AGREED = 0.5                      # IoU from which a teacher's box is that of the annotation
LEAK = 3                          # units of the model's frame: four numbers this near to the box's give it away
TEACHER = ("The object that is described as {text} lies in the box {box}. Write down how one finds it who does not know the box: what is "
           "asked for, which objects of that kind there are and where in the image they lie, how they lie to each other, and why this one "
           "fits. Put that into <think> </think> tags and do not write the box there. Then answer with the box in <answer> </answer> tags, "
           'like <answer>{{"bbox_2d": [x1, y1, x2, y2]}}</answer>')


@dataclass(frozen=True)
class Neighbor:
    """Another annotated object of the image."""
    category: str
    box: tuple                    # xyxy, original pixels
    color: str = ""


def centre(box):
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2


def area(box):
    return (box[2] - box[0]) * (box[3] - box[1])


def region(box, size):
    """Ninth of the image in which the centre lies."""
    x, y = centre(box)
    return REGIONS[min(2, int(3 * y / size[1]))][min(2, int(3 * x / size[0]))]


def direction(a, b):
    """Where box a lies as seen from box b, by the axis on which their centres differ more; the centres are not the same."""
    (ax, ay), (bx, by) = centre(a), centre(b)
    if abs(ax - bx) >= abs(ay - by):
        return "left of" if ax < bx else "right of"
    return "above" if ay < by else "below"


def coarse(v, frame):
    step = 5 * max(1, round(COARSE * max(frame.extent) / 5))
    return step * round(v / step)


def near(box, frame):
    x, y = to_model_frame((*centre(box), 0, 0), frame)[:2]
    return f"({coarse(x, frame)}, {coarse(y, frame)})"


def beside(a, b, text, frame):
    """Where box a lies to box b, as an expression asks for it: direction, or distance of the centres in units of the model's frame, or both
    where it does not say. What has its centre there as well (a field in its stadium) lies in no direction."""
    (ax, ay), (bx, by) = (to_model_frame((*centre(x), 0, 0), frame)[:2] for x in (a, b))
    away, nearness, side = coarse(math.hypot(ax - bx, ay - by), frame), NEARNESS.search(text), SIDES.search(text)
    if not away:
        return "about where it is"
    return ", ".join([f"{direction(a, b)} it"] * bool(side or not nearness) + [f"{away} away"] * bool(nearness or not side))


# what an expression asks about: its words; the order in which candidates are told then; the key of a box that sorts them, given the other
# object's box
ORDERS = ((r"leftmost|farthest to the left", "from left to right", lambda box, to: centre(box)[0]),
          (r"rightmost|farthest to the right", "from right to left", lambda box, to: -centre(box)[0]),
          (r"topmost|uppermost|highest|nearest to the top|closest to the top", "from top to bottom", lambda box, to: centre(box)[1]),
          (r"lowest|bottommost|nearest to the bottom|closest to the bottom", "from bottom to top", lambda box, to: -centre(box)[1]),
          (r"nearest|closest|next to", "from near to far", lambda box, to: math.dist(centre(box), centre(to)) if to else 0),
          (r"largest|biggest", "from large to small", lambda box, to: -area(box)),
          (r"smallest|tiniest", "from small to large", lambda box, to: area(box)))
RELATIONS = re.compile(r"\b(?:left of|right of|above|below|over|under|beside|near|nearest|closest|next|of|higher|further)\b")


def order(text, head, to):
    """The order in which an expression's candidates are told, (words, key of a box). head: its text up to a relation, for a size behind one
    is the other object's ("the car below the largest plane"); to: box of that object, or None."""
    for words, said, key in ORDERS:
        if re.search(rf"\b(?:{words})\b", head if "large" in said else text) and (to or said != "from near to far"):
            return f"{said}: ", lambda box: key(box, to)
    return "", centre


def anchor_key(o, text):
    """Sort key of an object: first those of the colour that the text names, then by area as its size word asks."""
    noun = o.category.lower()
    larger, smaller = (re.search(rf"\b(?:{size}) (?:[a-z]+ )?{re.escape(noun)}", text) for size in ("largest|biggest", "smallest|tiniest"))
    return f"{o.color} {noun}" not in text, -area(o.box) if larger else area(o.box) if smaller else 0


def called(o):
    """An object's colour, where known, and category, with their article."""
    words = f"{o.color} {o.category.lower() or 'object'}".strip()
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def explain(record, others, frame, color=""):
    """One record's completion. others: Neighbors in its image, the target not among them; frame: a Frame, whose coordinates the text
    speaks in; color: of the target, where known."""
    text, noun = record.text.lower(), record.category.lower() or "object"
    target = Neighbor(record.category, record.box, color)
    kind = f"{color} {noun}" if color and f"{color} {noun}" in text else noun                         # what all candidates are
    alike = [o for o in others if o.category == record.category and (kind == noun or o.color == color)]
    words = {o: f"{o.color} {noun}" if o.category == record.category else o.category.lower() for o in others}
    named = sorted((o for o in others if o not in alike and o.category and words[o] in text), key=lambda o: anchor_key(o, text))[:1]
    nearest = sorted(alike, key=lambda o: math.dist(centre(o.box), centre(record.box)))[:MOST]
    head = RELATIONS.split(text)[0]
    said, key = order(text, head, named[0].box if named else None)
    candidates = sorted([target, *nearest], key=lambda o: key(o.box))

    lines = [f"{record.text}.", *(f"{called(o)} near {near(o.box, frame)}." for o in named)]
    for o in candidates:
        line = f"{said if o is candidates[0] else ''}{called(o)} near {near(o.box, frame)}, at the {region(o.box, record.size)}"
        if SIZES.search(head):
            line += f", of size {round(math.sqrt(area(to_model_frame(o.box, frame))))}"
        for other in named:
            line += f", {beside(o.box, other.box, text, frame)}"
        lines.append(line + (": it fits." if o is target else "."))
    think = " ".join(lines).replace("<", "(").replace(">", ")")          # a tag inside an expression must not look like one of ours
    return f"<think>{think}</think>{answer(record, frame)}"


def answer(record, frame):
    return f'<answer>{{"bbox_2d": {format_box(record.box, frame)}}}</answer>'


# ------------------------------------------------------------------------------------------------------------------ who is known

def neighbors(records):
    """Records of one split -> function record -> Neighbors in its image. A synth scene knows all its objects; elsewhere they are the other
    records of these on the same image, so that reasoning for a training record never speaks of a test record's object."""
    by_image = {}
    for r in records:
        if not hasattr(r.image, "objects"):
            by_image.setdefault(r.image, []).append(r)

    def others(record):
        if hasattr(record.image, "objects"):
            return [Neighbor(o.category, o.box, o.color) for o in record.image.objects if o.box != record.box]
        found = []
        for r in by_image.get(record.image, ()):
            if all(overlap(r.box, box) < SAME_OBJECT for box in (record.box, *(o.box for o in found))):
                found.append(Neighbor(r.category, r.box))
        return found
    return others


def overlap(a, b):
    """IoU of two boxes, in floats."""
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    inter = max(w, 0) * max(h, 0)
    return inter / (area(a) + area(b) - inter)


def writer(records, file=None, answer_only=False):
    """-> function (record, frame) -> completion text: from the annotations, from a JSONL file, or the answer without reasoning."""
    if answer_only:
        return lambda record, frame: answer(record, frame)
    others, told = neighbors(records), load_jsonl(file, records) if file else {}

    def write(record, frame):
        if told.get(record.id):
            return told[record.id] + answer(record, frame)
        color = next((o.color for o in getattr(record.image, "objects", ()) if o.box == record.box), "")
        return explain(record, others(record), frame, color)
    return write


def load_jsonl(path, records):
    """Lines {"id", "think"} -> id -> "<think>...</think>", or None where the line says "refused"; every record must have a line, and
    "think" may hold no tag of the answer format."""
    told = {}
    for n, line in read_lines(path):
        try:
            identity, think = str(line["id"]), None if "refused" in line else line["think"]
            if not isinstance(think, str | None):
                raise TypeError
            (think or "").encode()                                       # a lone surrogate has no bytes to train on
        except (ValueError, KeyError, TypeError):
            raise DataError(f'{path}, line {n}: not a JSON object with "id" and a text "think"') from None
        if think is not None and any(tag in think for tag in ("<think>", "</think>", "<answer>", "</answer>")):
            raise DataError(f'{path}, line {n}: "think" is the reasoning alone, without <think> or <answer> tags')
        told[identity] = think if think is None else f"<think>{think}</think>"
    missing = [r.id for r in records if r.id not in told]
    if missing:
        raise DataError(f"{path}: no reasoning for {len(missing)} of {len(records)} records, the first is {missing[0]!r}")
    return told


def read_lines(path, content=None):
    """Yields (number, JSON value) of the lines of a JSONL that are not blank. content: its bytes, where they were read already."""
    try:
        content = Path(path).read_bytes() if content is None else content
        lines = content.decode("utf-8-sig").split("\n")                  # splitlines would also cut at U+2028, which JSON allows
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: unreadable reasoning ({error})") from None
    for n, text in enumerate(lines, 1):
        if text.strip():
            try:
                yield n, json.loads(text)
            except (ValueError, RecursionError):
                raise DataError(f'{path}, line {n}: not a JSON object with "id" and a text "think"') from None


# ------------------------------------------------------------------------------------------------------------------ from a teacher

def judge(text, record, frame):
    """A teacher's completion -> its reasoning and None, or None and why it is refused."""
    box = parse_box(text)
    if box is None or not format_ok(text):
        return None, f"does not parse: {failure(text) or 'not one think block, then one answer'}"
    if overlap(to_image_frame(box, frame), record.box) < AGREED:
        return None, "disagrees with the annotation"
    think = text[text.index("<think>") + len("<think>"):text.index("</think>")].strip()
    said = [float(n) for n in re.findall(r"(?<![A-Za-z\d.])\d{1,6}(?:\.\d+)?", think)]                # x1 is a name, 100-150 two numbers
    for x1, y1, x2, y2 in (box, to_model_frame(record.box, frame)):
        for sides in ((x1, y1, x2, y2), (x1, y1, x2 - x1, y2 - y1)):
            if any(gives_away(said[i:i + 6], sides) for i in range(max(1, len(said) - 5))):
                return None, "gives the box away before the answer"
    return (think, None) if think else (None, "no reasoning")


def gives_away(said, sides):
    """Is each of these sides near a number of its own among those said, in whatever order?"""
    return any(all(abs(a - b) <= LEAK for a, b in zip(some, sides)) for some in itertools.permutations(said, 4))


def teach(args, records, device):
    """Has a checkpoint explain each record's known box; writes a line for each, kept or refused, as soon as it is judged."""
    out, done, content = Path(args.out or f"cot_{args.name.replace('/', '_')}_{args.split}.jsonl"), {}, b""
    runtime.writable(out.parent)
    try:
        if out.exists():
            with open(out, "r+b") as file:                               # to be read, and written to
                content = file.read()
    except OSError as error:
        raise DataError(f"{out} can't be written ({error.strerror}); name another file with --out") from None
    whole, _, cut = content.rpartition(b"\n")                            # a call that was stopped may have left part of a line
    for n, line in read_lines(out, whole):
        if not isinstance(line, dict) or "id" not in line:
            raise DataError(f'{out}, line {n}: not a JSON object with an "id"; name another file with --out')
        done[str(line["id"])] = "refused" in line
    if cut:
        os.truncate(out, len(whole) + bool(whole))
    left = [r for r in records if r.id not in done][:args.limit]
    model, processor = runtime.open_checkpoint(args.teacher, device)
    reasons = {}
    with open(out, "a", encoding="utf-8") as file, tqdm(total=len(left), desc="teacher") as bar:
        for i in range(0, len(left), args.batch):
            some, prompts = left[i:i + args.batch], []
            for r in some:
                image = data.open_image(r)
                pixels, grid, resized = processor.patches(image)
                frame = Frame(image.size, resized, processor.convention)
                asked = TEACHER.format(text=r.text, box=format_box(r.box, frame))
                ids = processor.turns(asked, int(grid.prod()) // processor.merge ** 2)
                prompts.append(Prompt(torch.tensor(ids), pixels, grid, frame))
            seeds = torch.tensor([int.from_bytes(data.fingerprint(f"{args.seed} {r.id}")[:4], "big") for r in some])
            tokens, _, lengths = generate(model, prompts, 1, args.max_new_tokens, args.temperature, seeds)
            for r, p, ids, n in zip(some, prompts, tokens[:, 0], lengths[:, 0].tolist()):
                text = processor.decode(ids[:n])
                think, why = judge(text, r, p.frame)
                line = {"id": r.id, "refused": why, "text": text} if why else {"id": r.id, "think": think}
                file.write(json.dumps(line) + "\n")
                done[r.id] = bool(why)
                if why:
                    reasons[why] = reasons.get(why, 0) + 1
            file.flush()
            bar.update(len(some))
            bar.set_postfix_str(f"kept {sum(not refused for refused in done.values())} of {len(done)}")
    print(f"written: {out}; {sum(not refused for refused in done.values())} of {len(done)} records have reasoning, "
          f"{len(records) - len(done)} are still to come" + "".join(f"\n  refused: {n} {why}" for why, n in sorted(reasons.items())))


def main():
    parser = runtime.FlagParser("Shows the reasoning that sft.py trains on, beside the picture it speaks of")
    parser.add_argument("name", help="data set")
    parser.add_argument("--root", help="its folder; default data/<name>")
    parser.add_argument("--split", default="sft", help="split")
    parser.add_argument("--init", metavar="CKPT", help="checkpoint in whose coordinates texts are shown, as sft.py --init writes them; "
                        "without it they are in pixels of the picture")
    parser.add_argument("--show", type=runtime.positive, default=8, help="records")
    parser.add_argument("--seed", type=int, default=0, help="of the teacher's sampling")
    parser.add_argument("--out", help="picture, default cot_check.png; with --teacher the JSONL, default cot_<name>_<split>.jsonl")
    add = parser.add_argument_group("teacher").add_argument
    add("--teacher", metavar="CKPT", help="have this checkpoint explain the known boxes")
    add("--limit", type=runtime.positive, help="records in this call; default: all that are left")
    add("--batch", type=runtime.positive, default=16, help="records at once")
    add("--max-new-tokens", type=runtime.positive, default=400, help="tokens of an explanation at most")
    add("--temperature", type=float, default=0.7, help="of sampling; 0 is greedy")
    add("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu", help="where the teacher runs")
    args = parser.parse_args()
    sys.stdout.reconfigure(errors="backslashreplace")                    # an expression may hold what no encoding has
    if not 0 <= args.temperature < math.inf:
        runtime.fail(f"--temperature {args.temperature} is not a number from 0 up; 0 is greedy")
    if args.teacher and args.init:
        runtime.fail("--init is for the check; a --teacher speaks in its own frame")
    device = runtime.start(args.device) if args.teacher else None
    records = data.load(args.name, args.root, args.split)
    if not records:
        raise DataError(f"no usable record in the split {args.split} of {args.name}: "
                        f"{data.refusal_summary(records, args.name, args.root, args.split) or 'it is empty'}")
    if args.teacher:
        teach(args, records, device)
        return
    processor, out = Processor.from_pretrained(args.init) if args.init else None, Path(args.out or "cot_check.png")
    runtime.writable(out.parent)
    write, pictures = writer(records), []
    for record in records[::max(1, len(records) // args.show)][:args.show]:
        image = data.open_image(record)
        frame = processor(image, record.text).frame if processor else Frame(image.size, image.size, "absolute")
        text = write(record, frame)
        if not format_ok(text):
            sys.exit(f"cot.py: record {record.id} makes a text that breaks the format: {text}")
        print(f"{record.id}: {record.text}\n  {text}")
        pictures.append(draw_boxes(image, [(record.box, "red")], text))
    data.save_sheet(pictures, out)
    print(f"written: {out}")


if __name__ == "__main__":
    runtime.main(main)
