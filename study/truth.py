"""Which sentences of a model's reasoning are true of the drawn scene?

    python study/truth.py ckpt/eval/predictions_sft.jsonl ckpt/eval/predictions_rft.jsonl \\
        --data synth --split final

prints a Markdown table: a row for each file and kind of expression, shares of 0 to 1. A thought is
parsed by the grammar of `cot.explain`; what is true comes from the scene's objects and the
expression, never from cot.py. The repeated expression claims nothing and is not counted. About
sentences:

    sentence    all claims of the sentence are true; with a 95% interval over scenes
    read        the sentence follows the grammar; else it is not true
    object      an object of this category and color has its center within 10 px of the point
    place       any object has. If none has, nothing else about the object is judged
    category    that of the object that the sentence means: see `meant`
    color       likewise
    region      the object's center lies in this ninth of the image
    size        within 25% or 3 px
    side        "left of it" and so on; "it" is the object that the thought takes as the anchor, or
                if there is none at that point, the one that the expression means
    distance    from that anchor, within 10 px
    order       the object lies to the right of the one before it
    so far      "leftmost so far" and so on is said of an object that leads those listed, and only
                of such an object
    so it is    "so it is the one near (x, y)" names the target, or the right anchor
    follows     it names the last one "so far", or the only one listed with what was asked for

About lists and thoughts:

    count       the list has all objects that fit its noun phrase, or six; none twice, no others
    anchor      the thought takes the right object as the anchor
    choice      the thought chooses the target
    box         the answered box overlaps the chosen object, and no other one more
    choice off  of the wrong answers (IoU of 0.5 or less): the choice is wrong or missing
    box off     of the wrong answers: the choice is right
"""
import json
import math
import re
import sys
from collections import defaultdict
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import reward  # noqa: E402
from cot import MAX_OTHER_CANDIDATES, REGIONS  # noqa: E402
from data import load  # noqa: E402
from qwen.answer import ANSWER, THINK, Box, Frame  # noqa: E402
from readers.base import Record  # noqa: E402
from report.metrics import bootstrap, box_tensor  # noqa: E402
from report.predictions import read_prediction, read_predictions  # noqa: E402
from toy import scenes  # noqa: E402
from toy.scenes import Object, Point  # noqa: E402
from train.dist import check_writable, fail  # noqa: E402
from train.flags import FlagParser  # noqa: E402
from train.run import launch  # noqa: E402

COLUMNS = (
    "sentence", "read", "object", "place", "category", "color", "region", "size", "side",
    "distance", "order", "so far", "so it is", "follows", "count", "anchor", "choice", "box",
    "choice off", "box off")
NEAR = 10                         # pixels by which a point or a distance may be wrong
# What an extreme compares, and whether the most is meant.
MEASURES = {"leftmost": ("x", False), "rightmost": ("x", True), "topmost": ("y", False),
            "lowest": ("y", True), "nearest": ("distance", False), "largest": ("area", True),
            "smallest": ("area", False)}


def one_of(words: Sequence[str]) -> str:
    """A pattern; longer words come first, so that "left of" is not read as "left"."""
    return "|".join(sorted(words, key=len, reverse=True))


REGION = one_of(sum(REGIONS, ()))
POINT = r"near \((?P<x>\d{1,4}), (?P<y>\d{1,4})\)"
LISTED = re.compile(
    rf"an? (?P<color>{one_of(scenes.COLORS)}) (?P<category>{one_of(scenes.CATEGORIES)}) {POINT}"
    rf"(?:, at the (?P<region>{REGION}))?(?:, of size (?P<size>\d{{1,4}}))?"
    rf"(?:, (?P<side>{one_of(scenes.RELATIONS)}) it)?(?:, (?P<distance>\d{{1,4}}) away)?"
    rf"(?:, (?P<extreme>{one_of(MEASURES)}) so far)?\.")
CHOICE = re.compile(rf"so it is the one {POINT}\.")
THOUGHT = re.compile(f"{THINK[0]}(.*?)(?:{THINK[1]}|{ANSWER[0]}|$)", re.DOTALL)
NOUN = rf"((?:(?:{one_of(scenes.COLORS)}) )?(?:{one_of(scenes.CATEGORIES)}))"
Row = dict[str, Any]
Claims = dict[str, bool]          # column -> whether what a sentence claims is true
Verdicts = dict[str, list[bool]]  # column -> a thought's claims of this kind


class Question(NamedTuple):
    """What an expression, or the anchor within one, asks for."""

    pool: list[Object]            # the objects that fit its noun phrase
    asked: str                    # "leftmost", "left of" ...; a region; "" if the noun is enough
    anchor: "Question | None"


def read_expression(text: str, objects: Sequence[Object]) -> Question:
    for asked, wordings in {"": ("the {}",), **scenes.WORDINGS}.items():
        for wording in wordings:
            match = re.fullmatch(wording.format(NOUN, f"({REGION}|the .+)"), text)
            if match is None:
                continue
            phrase, other = (*match.groups(), "")[:2]
            pool = [o for o in objects if phrase in (o.category, f"{o.color} {o.category}")]
            if other.startswith("the "):
                return Question(pool, asked, read_expression(other, objects))
            return Question(pool, other or asked, None)
    raise ValueError(f"no wording of toy/scenes.py: {text}")


def rank(o: Object, extreme: str, anchor: Object | None) -> float:
    """A number that is smallest for the leftmost, largest, ... object; NaN if undefined."""
    measure, most = MEASURES[extreme]
    values = {"x": o.center[0], "y": o.center[1], "area": o.size}
    if anchor is not None:
        values["distance"] = math.dist(o.center, anchor.center)
    return values.get(measure, math.nan) * (-1 if most else 1)


def point_of(said: re.Match, frame: Frame) -> Point:
    """The point that a sentence names, in original pixels."""
    return frame.to_image((int(said["x"]), int(said["y"])))


def meant(
        said: re.Match, point: Point, objects: Sequence[Object], used: Sequence[Object],
) -> Object | None:
    """The object near a sentence's point, if any: among several the one that fits the words best,
    then one that the list does not have yet (used), then the nearest."""
    def misfit(o: Object) -> tuple[int, bool, float]:
        wrong = (o.category != said["category"]) + (o.color != said["color"])
        return wrong, o in used, math.dist(o.center, point)

    near = [o for o in objects if math.dist(o.center, point) <= NEAR]
    return min(near, key=misfit, default=None)


def judge_facts(said: re.Match, o: Object, anchor: Object | None, frame: Frame) -> Claims:
    """What a sentence claims about its object, apart from the list that it is in."""
    facts = {"category": o.category == said["category"], "color": o.color == said["color"]}
    if said["region"]:
        facts["region"] = scenes.in_region(o, said["region"], 0)
    if said["size"]:
        pixels, = frame.to_image([int(said["size"])])        # scenes are square
        facts["size"] = abs(pixels - o.size) <= max(3, o.size / 4)
    if said["side"]:
        facts["side"] = anchor is not None and scenes.lies_on_side(o, anchor, said["side"], 0)
    if said["distance"]:
        pixels, = frame.to_image([int(said["distance"])])
        facts["distance"] = (
            anchor is not None and abs(pixels - math.dist(o.center, anchor.center)) <= NEAR)
    return facts


def judge_list(
        sentences: Sequence[re.Match], question: Question, right: Object, anchor: Object | None,
        objects: Sequence[Object], frame: Frame,
) -> tuple[list[Claims], bool, Object | None]:
    """A list of objects with its choice -> each sentence's claims, whether the list is complete,
    and the chosen object. right: the one that it should choose."""
    lines = [said for said in sentences if said.re is LISTED]
    # Where an extreme is asked for, a line without "so far" claims that its object does not lead.
    asked = question.asked if question.asked in MEASURES and len(lines) > 1 else ""
    found: list[Object | None] = []               # of each line
    list_claims: list[Claims] = []
    for said in lines:
        before = [o for o in found if o is not None]
        o = meant(said, point_of(said, frame), objects, before)
        found.append(o)
        claims = {"read": True, "object": False, "place": o is not None}
        list_claims.append(claims)
        if o is None:
            continue
        claims |= judge_facts(said, o, anchor, frame)
        claims["object"] = claims["category"] and claims["color"]
        if before:
            claims["order"] = o.center > before[-1].center
        extreme = said["extreme"] or asked
        if extreme:
            value = rank(o, extreme, anchor)
            leads = all(value < rank(other, extreme, anchor) for other in before)
            claims["so far"] = bool(said["extreme"]) == leads and not math.isnan(value)
    enough = min(len(question.pool), 1 + MAX_OTHER_CANDIDATES)
    complete = enough <= len(found) == len(set(found)) and set(found) <= set(question.pool)

    # The line to choose is the last "so far", or the only one with what is asked for.
    fitting = []
    for i, said in enumerate(lines):
        if question.asked in ("", *said.group("region", "side", "extreme")):
            fitting.append(i)
    best = fitting[-1] if fitting and (asked or len(fitting) == 1) else None
    chosen = found[0] if len(found) == 1 else None
    for said in sentences:
        if said.re is CHOICE:
            point = point_of(said, frame)
            gaps = [math.dist(point, point_of(line, frame)) for line in lines]
            # Two lines may have the same point.
            i = min(range(len(lines)), key=lambda i: (gaps[i], i != best), default=None)
            is_listed = i is not None and gaps[i] <= NEAR
            chosen = found[i] if is_listed else None
            follows = is_listed and i == best
            list_claims.append({"read": True, "so it is": chosen is right, "follows": follows})
    return list_claims, complete, chosen


def judge(think: str, record: Record, frame: Frame, box: Box | None) -> Verdicts:
    """box: the answer, in original pixels."""
    objects = record.objects
    target = next(o for o in objects if o.box == record.box)
    question = read_expression(record.text, objects)
    texts = re.findall(r"[^.]*\.|[^.]+$", think.strip().removeprefix(f"{record.text}."))
    parsed = [LISTED.fullmatch(t.strip()) or CHOICE.fullmatch(t.strip()) for t in texts]
    sentences = [match for match in parsed if match]
    sentence_claims = [{"read": False}] * (len(parsed) - len(sentences))

    # 1. Lists. The anchor's ends with its choice, or before a line that says more of its object.
    lists = [("choice", question, target, sentences)]
    if question.anchor is not None:
        end = len(sentences)
        for i, said in enumerate(sentences):
            if said.re is CHOICE or any(said.group("region", "side", "distance")):
                end = i + (said.re is CHOICE)
                break
        pool, extreme, _ = question.anchor
        right = min(pool, key=lambda o: rank(o, extreme, None)) if extreme else pool[0]
        lists = [("anchor", question.anchor, right, sentences[:end]),
                 ("choice", question, target, sentences[end:])]
    verdicts: Verdicts = defaultdict(list)
    anchor = chosen = None
    for column, question, right, part in lists:
        claims, complete, chosen = judge_list(part, question, right, anchor, objects, frame)
        sentence_claims += claims
        verdicts["count"].append(complete)
        verdicts[column].append(chosen is right)
        anchor = chosen or right

    # 2. Sentences.
    for claims in sentence_claims:
        verdicts["sentence"].append(all(claims.values()))
        for column, is_true in claims.items():
            verdicts[column].append(is_true)

    # 3. The box. Without one, all overlaps are 0.
    iou = reward.iou(box_tensor([box]), box_tensor([o.box for o in objects]))       # (objects,)
    if chosen is not None:
        own = iou[objects.index(chosen)]
        verdicts["box"].append(bool(own > 0 and own == iou.max()))
    if iou[objects.index(target)] <= 0.5:
        verdicts["choice off"].append(chosen is not target)
        verdicts["box off"].append(chosen is target)
    return verdicts


def read_file(path: Path, records: Sequence[Record]) -> list[tuple[Record, Verdicts | None]]:
    """Each answered record and its thought's verdicts, None without a thought."""
    judged = []
    by_id = read_predictions(path, records)
    for record in records:
        if record.id not in by_id:
            continue
        prediction = by_id[record.id]
        thought = THOUGHT.search(prediction.get("text", ""))
        verdicts = None
        if thought:
            box, _, _ = read_prediction(prediction, record)
            verdicts = judge(thought[1], record, Frame(**prediction["frame"]), box)
        judged.append((record, verdicts))
    return judged


def row_of(stage: str, kind: str, judged: Sequence[tuple[Record, Verdicts | None]]) -> Row:
    """A row of the table: shares, how many claims each is of, the interval of the first."""
    thoughts = [(record, verdicts) for record, verdicts in judged if verdicts is not None]
    shares, counts = {}, {}
    for column in COLUMNS:
        claims = list(chain.from_iterable(verdicts[column] for _, verdicts in thoughts))
        counts[column] = len(claims)
        shares[column] = sum(claims) / len(claims) if claims else None
    interval = None
    if counts["sentence"]:
        true = np.array([sum(verdicts["sentence"]) for _, verdicts in thoughts])
        of = np.array([len(verdicts["sentence"]) for _, verdicts in thoughts])
        drawn = bootstrap([record for record, _ in thoughts], {"sentence": (true, of)})
        interval = drawn["sentence"][1]
    return {
        "stage": stage, "kind": kind, "answers": len(judged), "thoughts": len(thoughts),
        "interval": interval, "shares": shares, "counts": counts}


def table(rows: Sequence[Row]) -> str:
    """Markdown, one line for each row."""
    head = ["stage", "kind", "answers", "thoughts", *COLUMNS]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        cells = ["-" if v is None else f"{v:.3f}" for v in row["shares"].values()]
        if row["interval"]:
            low, high = row["interval"]
            cells[0] += f" [{low:.3f}, {high:.3f}]"
        lines.append([*(str(row[name]) for name in head[:4]), *cells])
    return "".join("| " + " | ".join(cells) + " |\n" for cells in lines)


def main() -> None:
    parser = FlagParser(
        description="Which sentences of a model's reasoning are true of the drawn scene?")
    add = parser.add_argument
    add("files", nargs="+", type=Path, help="predictions_STAGE.jsonl of eval.py")
    add("--data", default="synth", help=f"one of {', '.join(scenes.WORLDS)}")
    add("--split", default="final", help="that the files answer")
    add("--out", type=Path, help="JSON file for the numbers")
    args = parser.parse_args()
    if args.data not in scenes.WORLDS:
        fail(f"--data {args.data} is not drawn, so not all of its objects are known; "
             f"there are {', '.join(scenes.WORLDS)}")
    records = load(args.data, None, args.split)
    stages = [file.stem.removeprefix("predictions_") for file in args.files]
    if len(set(stages)) < len(stages):
        stages = [str(file) for file in args.files]
    rows = []
    for stage, file in zip(stages, args.files):
        judged = read_file(file, records)
        for kind in ("all", *sorted({record.kind for record, _ in judged})):
            of_kind = [pair for pair in judged if kind in ("all", pair[0].kind)]
            rows.append(row_of(stage, kind, of_kind))
    if args.out:
        check_writable(args.out.parent)
        args.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print(table(rows), end="")


if __name__ == "__main__":
    launch(main)
