"""cot.py: every sentence is read back and held against the boxes, without the writer's code."""
import json
import math
import random
import re
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from PIL import Image

import cot
import data
from cot import Box, Neighbor, explain, neighbor_finder
from data import Frame, Processor, Record, to_model_frame
from reward import format_ok, parse_box

Run = Callable[..., subprocess.CompletedProcess]
Script = Callable[..., None]

SENTENCES = {
    "order": r"from (\w+) to (\w+):",
    "candidate": r"(an? [a-z ]+) near \((\d+), (\d+)\), at the ([a-z ]+)(?:, of size (\d+))?"
                 r"((?:, (?:left of|right of|above|below) it)?(?:, \d+ away)?"
                 r"|, about where it is)(\.|: it fits\.)",
    "anchor": r"(an? [a-z ]+) near \((\d+), (\d+)\)\.",
}


# ---------------------------------------------------------------- what the words mean

def middle(box: Box) -> tuple[float, float]:
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2


def surface(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def lies_in(region: str, box: Box, size: tuple[int, int]) -> bool:
    """Whether the ninth of the image that the words mean holds the center."""
    column = 0 if "left" in region else 2 if "right" in region else 1
    row = 1
    if "upper" in region or region == "top":
        row = 0
    elif "lower" in region or region == "bottom":
        row = 2
    x, y = middle(box)
    width = size[0] / 3
    height = size[1] / 3
    return (width * column <= x <= width * (column + 1)
            and height * row <= y <= height * (row + 1))


def half_step(frame: Frame) -> float:
    """Half of what places are rounded to.

    That is a fiftieth of the longer side, in fives, and five at least.
    """
    return max(2.5, 2.5 * round(max(frame.extent) / 250)) + 0.01


def scale_of(frame: Frame) -> list[float]:
    """Units of the model's frame in a pixel, across and down."""
    return [extent / original for extent, original in zip(frame.extent, frame.original)]


def is_near(numbers: Sequence[str], box: Box, frame: Frame) -> bool:
    """Whether a point is the box's center to within half of the rounding step."""
    for number, value, scale in zip(numbers, middle(box), scale_of(frame)):
        if abs(int(number) - value * scale) > half_step(frame):
            return False
    return True


def is_away(number: str | int, box: Box, other: Box, frame: Frame) -> bool:
    """Whether the centers are so far from each other, to within half of the rounding step."""
    x, y = middle(box)
    other_x, other_y = middle(other)
    x_scale, y_scale = scale_of(frame)
    distance = math.hypot((x - other_x) * x_scale, (y - other_y) * y_scale)
    return abs(int(number) - distance) <= half_step(frame)


def holds(direction: str, box: Box, other: Box) -> bool:
    dx, dy = (a - b for a, b in zip(middle(box), middle(other)))
    if direction in ("left of", "right of"):
        return abs(dx) >= abs(dy) and (dx < 0 if direction == "left of" else dx > 0)
    return abs(dy) >= abs(dx) and (dy < 0 if direction == "above" else dy > 0)


def relation_holds(relation: str, box: Box, other: Box, frame: Frame) -> bool:
    """Whether ", left of it, 40 away" holds of a box and the other object's."""
    if relation == ", about where it is":
        return is_away(0, box, other, frame)
    for part in relation.split(", ")[1:]:
        if part.endswith("away"):
            true = is_away(part.split()[0], box, other, frame)
        else:
            true = holds(part.removesuffix(" it"), box, other)
        if not true:
            return False
    return True


ASKS_SIDE = re.compile(r"left of|right of|above|below")
ASKS_DISTANCE = re.compile(r"next to|nearest to the (?!top|bottom)")
# The order that is told -> the number that grows in it, of a box and the anchor's.
GROWING = {
    ("left", "right"): lambda box, anchor: middle(box)[0],
    ("right", "left"): lambda box, anchor: -middle(box)[0],
    ("top", "bottom"): lambda box, anchor: middle(box)[1],
    ("bottom", "top"): lambda box, anchor: -middle(box)[1],
    ("near", "far"): lambda box, anchor: math.dist(middle(box), middle(anchor)),
    ("large", "small"): lambda box, anchor: -surface(box),
    ("small", "large"): lambda box, anchor: surface(box),
}


# ---------------------------------------------------------------- reading a text back

@dataclass(frozen=True)
class Case:
    """A record with all that a text may speak of."""

    record: Record
    others: list[Neighbor]
    frame: Frame
    color: str = ""            # of the target

    @property
    def same_kind(self) -> list[Neighbor]:
        """The other candidates."""
        category = self.record.category
        colored = bool(self.color) and f"{self.color} {category}" in self.record.text
        return [o for o in self.others
                if o.category == category and (not colored or o.color == self.color)]

    @property
    def candidates(self) -> list[Box]:
        return [self.record.box, *(o.box for o in self.same_kind)]

    @property
    def mentioned(self) -> list[Neighbor]:
        """Objects that the expression names beside the candidates."""
        mentioned = []
        for o in self.others:
            own_category = o.category == self.record.category
            words = f"{o.color} {o.category}" if own_category else o.category
            if o not in self.same_kind and words in self.record.text:
                mentioned.append(o)
        return mentioned

    @property
    def phrases(self) -> dict[Box, str]:
        """What each object is called: "a red ship"."""
        target = Neighbor(self.record.category, self.record.box, self.color)
        phrases = {}
        for o in [*self.others, target]:
            words = f"{o.color} {o.category}".strip()
            phrases[o.box] = f"{'an' if words[0] in 'aeiou' else 'a'} {words}"
        return phrases


def check_text(text: str, case: Case) -> None:
    """Reads the whole text, sentence by sentence; nothing may be left over."""
    assert format_ok(text)
    think = text[len("<think>"):text.index("</think>")]
    box = parse_box(text)
    wanted = to_model_frame(case.record.box, case.frame)
    assert all(abs(a - b) <= 1 for a, b in zip(box, wanted))
    # The answer is not given away before it is reasoned for.
    assert str([int(v) for v in box])[1:-1] not in think
    sentences = read_sentences(think, case.record.text)
    kinds = " ".join(kind for kind, _ in sentences)
    assert re.fullmatch(r"(anchor )?(order )?(candidate ?)+", kinds), kinds
    # What the expression names is placed.
    assert ("anchor" in kinds) == bool(case.mentioned)
    order = ("left", "right")
    anchors: list[Box] = []
    candidates: list[list[Box]] = []           # boxes that each candidate's sentence fits
    verdicts = []
    for kind, words in sentences:
        if kind == "order":
            order = words
        elif kind == "anchor":
            anchors = anchor_boxes(words, case)
        else:
            candidates.append(candidate_boxes(words, anchors, case))
            verdicts.append(words[-1])
    assert len(candidates) == min(6, len(case.candidates))
    assert verdicts.count(": it fits.") == 1
    assert case.record.box in candidates[verdicts.index(": it fits.")]
    assert any(grows(candidates, order, anchor) for anchor in anchors or [None]), think


def read_sentences(think: str, expression: str) -> list[tuple[str, tuple[str, ...]]]:
    """The reasoning behind the expression -> kind of each sentence, and what its pattern reads."""
    said = expression.replace("<", "(").replace(">", ")") + "."
    assert think.startswith(said)
    rest = think[len(said):].strip()
    sentences = []
    while rest:
        matches = {kind: re.match(pattern, rest) for kind, pattern in SENTENCES.items()}
        matching = [kind for kind, match in matches.items() if match]
        assert matching, f"no sentence that can be checked: {rest!r}"
        match = matches[matching[0]]
        sentences.append((matching[0], match.groups()))
        rest = rest[match.end():].strip()
    return sentences


def anchor_boxes(words: tuple[str, ...], case: Case) -> list[Box]:
    """The boxes that the anchor's sentence fits."""
    phrase, *point = words
    boxes = []
    for o in case.others:
        may_be_anchor = o not in case.same_kind and o.category in case.record.text
        if may_be_anchor and case.phrases[o.box] == phrase and is_near(point, o.box, case.frame):
            boxes.append(o.box)
    assert boxes, (words, case.phrases)
    return boxes


def candidate_boxes(words: tuple[str, ...], anchors: list[Box], case: Case) -> list[Box]:
    """The boxes that a candidate's sentence fits."""
    phrase, x, y, region, size, relation, _ = words
    assert bool(anchors) == bool(relation)
    boxes = []
    for box in case.candidates:
        fits = [case.phrases[box] == phrase, is_near((x, y), box, case.frame),
                lies_in(region, box, case.record.size)]
        if size is not None:
            side = math.sqrt(surface(box) * math.prod(scale_of(case.frame)))
            fits.append(abs(int(size) - side) <= 0.51)
        if relation:
            fits.append(any(relation_holds(relation, box, a, case.frame) for a in anchors))
        if all(fits):
            boxes.append(box)
    assert boxes, (words, case.phrases)
    # What is asked for is told.
    if relation and "it is" not in relation:
        side_told = "of it" in relation or "above" in relation or "below" in relation
        assert side_told or not ASKS_SIDE.search(case.record.text)
        assert "away" in relation or not ASKS_DISTANCE.search(case.record.text)
    return boxes


def grows(candidates: list[list[Box]], order: tuple[str, ...], anchor: Box | None) -> bool:
    """Whether the candidates may stand in this order, where a sentence fits several boxes."""
    for before, behind in zip(candidates, candidates[1:]):
        least = min(GROWING[order](box, anchor) for box in before)
        most = max(GROWING[order](box, anchor) for box in behind)
        if least > most:
            return False
    return True


# ---------------------------------------------------------------- texts from annotations

CATEGORIES = ("ship", "storage tank", "bridge")
EXPRESSIONS = (
    "the ship", "the largest ship", "the ship left of the storage tank",
    "the ship next to the red ship", "the smallest ship next to the bridge",
    "the ship above the largest bridge", "the ship nearest to the bottom edge",
    "the uppermost ship", "the ship farthest to the right", "leftmost ship",
    "a ship </think><answer>", "ship <think>",
)


def made_up(rng: random.Random) -> tuple[Record, list[Neighbor]]:
    """A record without an image, and up to seven other objects."""
    size = (rng.randint(200, 1000), rng.randint(200, 1000))

    def random_box() -> Box:
        x = rng.uniform(0, size[0] - 40)
        y = rng.uniform(0, size[1] - 40)
        return x, y, rng.uniform(x + 10, size[0]), rng.uniform(y + 10, size[1])

    record = Record("1", None, rng.choice(EXPRESSIONS), random_box(), "ship", size)
    others = []
    for _ in range(rng.randint(0, 6)):
        others.append(Neighbor(rng.choice(CATEGORIES), random_box(), rng.choice(("", "red"))))
    # A field in its stadium: one center, another size.
    if rng.random() < 0.3:
        x1, y1, x2, y2 = record.box
        dx = (x2 - x1) / 2 * rng.uniform(-0.5, 0.4)
        dy = dx * (y2 - y1) / (x2 - x1)
        box = (x1 - dx, y1 - dy, x2 + dx, y2 + dy)
        others.append(Neighbor(rng.choice(CATEGORIES), box))
    return record, others


@pytest.mark.parametrize("convention", ["absolute", "1000"])
def test_every_sentence_is_true_of_made_up_records(convention: str) -> None:
    rng = random.Random(0)
    for _ in range(1400):
        record, others = made_up(rng)
        resized = (28 * rng.randint(4, 30), 28 * rng.randint(4, 30))
        frame = Frame(record.size, resized, convention)
        check_text(explain(record, others, frame), Case(record, others, frame))


def test_every_sentence_is_true_of_the_embedded_world() -> None:
    records = data.load("synth", None, "val")
    write_completion = cot.writer(records)
    find_neighbors = neighbor_finder(records)
    for record in records:
        frame = Frame(record.size, record.size, "absolute")
        target, = (o for o in record.image.objects if o.box == record.box)
        others = [Neighbor(o.category, o.box, o.color)
                  for o in record.image.objects if o is not target]
        assert find_neighbors(record) == others
        check_text(write_completion(record, frame), Case(record, others, frame, target.color))


def test_a_checker_that_accepts_anything_would_be_no_test() -> None:
    record = Record("1", None, "the largest ship left of the bridge", (10.0, 10.0, 30.0, 30.0),
                    "ship", (300, 300))
    others = [Neighbor("ship", (200.0, 20.0, 210.0, 30.0)),
              Neighbor("bridge", (100.0, 0.0, 160.0, 60.0))]
    case = Case(record, others, Frame((300, 300), (300, 300), "absolute"))
    text = explain(record, others, case.frame)
    check_text(text, case)
    for right, wrong in [
            ("left of it", "right of it"), ("upper left", "upper right"),
            ("(20, 20)", "(20, 40)"), ("of size 20", "of size 23"),
            ("a ship near", "a bridge near"), ("large to small", "small to large"),
            (": it fits.", "."), (", left of it", "")]:
        assert right in text, (right, text)
        with pytest.raises(AssertionError):
            check_text(text.replace(right, wrong), case)


def test_reasoning_for_training_speaks_of_training_records_only(dior_root: Path) -> None:
    train = data.load("dior", dior_root, "train")
    test = data.load("dior", dior_root, "test")
    find_neighbors = neighbor_finder(train)
    train_boxes = {r.box for r in train}
    for record in train:
        boxes = {o.box for o in find_neighbors(record)}
        assert boxes <= train_boxes - {record.box}
        assert not boxes & {r.box for r in test}


def test_the_target_under_another_expression_is_no_other_object() -> None:
    def ship(identity: str, text: str, *box: float) -> Record:
        return Record(identity, "same.jpg", text, box, "ship", (100, 100))
    target = ship("0", "the ship", 10.0, 10.0, 50.0, 50.0)
    same_object = ship("1", "the grey one", 10.0, 10.0, 51.0, 50.0)
    other = ship("2", "the far ship", 70.0, 70.0, 90.0, 90.0)
    overlapping = ship("3", "the ship beside it", 30.0, 10.0, 70.0, 50.0)      # IoU 1/3
    find_neighbors = neighbor_finder([target, same_object, other, overlapping])
    assert [o.box for o in find_neighbors(target)] == [other.box, overlapping.box]


@pytest.mark.parametrize("category", ["</think>", "<answer>", "<think>"])
def test_a_tag_for_a_category_does_not_break_the_format(category: str) -> None:
    record = Record("1", None, f"the {category}", (10.0, 10.0, 30.0, 30.0), category, (300, 300))
    others = [Neighbor(category, (200.0, 20.0, 220.0, 60.0))]
    assert format_ok(explain(record, others, Frame((300, 300), (300, 300), "absolute")))


def test_what_shares_the_centre_lies_in_no_direction() -> None:
    record = Record("1", None, "the field in the stadium", (100.0, 100.0, 200.0, 200.0), "field",
                    (800, 800))
    others = [Neighbor("stadium", (50.0, 50.0, 250.0, 250.0))]
    text = explain(record, others, Frame((800, 800), (800, 800), "absolute"))
    assert ", about where it is: it fits." in text
    assert " of it" not in text and "away" not in text


@pytest.mark.parametrize("words, meant", [
    ("the red tank", 1), ("the tank", 0), ("the largest tank", 2), ("the smallest blue tank", 0),
    ("the biggest blue tank", 2)])
def test_of_several_anchors_the_one_that_the_words_mean_is_placed(words: str, meant: int) -> None:
    """Three tanks: small and blue, middling and red, large and blue."""
    tanks = [Neighbor("tank", (0, 0, 10, 10), "blue"), Neighbor("tank", (40, 0, 60, 20), "red"),
             Neighbor("tank", (70, 70, 110, 110), "blue")]
    record = Record("0", None, f"the truck nearest to {words}", (50.0, 50.0, 60.0, 60.0), "truck",
                    (112, 112))
    frame = Frame((112, 112), (112, 112), "absolute")
    point = cot.point_text(tanks[meant].box, frame)
    text = explain(record, tanks, frame)
    assert f"a {tanks[meant].color} tank near {point}." in text


# ---------------------------------------------------------------- reasoning of one's own

SHIP = Record("7", None, "the ship", (1.0, 1.0, 2.0, 2.0), "ship", (9, 9))


def test_reasoning_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "own.jsonl"
    # U+2028 and U+0085 end a line for str.splitlines; in JSON they are letters.
    for think in ("it is there.", "one\u2028line", "one\x85line"):
        line = json.dumps({"id": 7, "think": think}, ensure_ascii=False)
        file.write_text("\n" + line + "\n", encoding="utf-8")
        assert cot.load_reasoning(file, [SHIP]) == {"7": f"<think>{think}</think>"}
    # As Windows writes it.
    line = json.dumps({"id": "7", "think": "a"}).encode()
    file.write_bytes(b"\xef\xbb\xbf" + line + b"\r\n")
    assert cot.load_reasoning(file, [SHIP]) == {"7": "<think>a</think>"}


@pytest.mark.parametrize("line", [
    "[1]", '{"id": "7"}', '{"id": "7", "think": 3}', '{"id": "7", "think": "\\ud800"}',
    '{"id": "7", "think": "</think>"}', "[" * 100_000])
def test_a_line_that_is_no_reasoning_is_named(line: str, tmp_path: Path) -> None:
    file = tmp_path / "own.jsonl"
    file.write_text(json.dumps({"id": "7", "think": "a"}) + "\n" + line + "\n")
    with pytest.raises(data.DataError, match=r"own\.jsonl, line 2: "):
        cot.load_reasoning(file, [SHIP])


def test_a_record_without_reasoning_is_named(tmp_path: Path) -> None:
    file = tmp_path / "own.jsonl"
    file.write_text(json.dumps({"id": "7", "think": "a"}))
    other = Record("8", None, "the ship", (1.0, 1.0, 2.0, 2.0), "ship", (9, 9))
    with pytest.raises(data.DataError, match="no reasoning for 1 of 2"):
        cot.load_reasoning(file, [SHIP, other])


# ---------------------------------------------------------------- the command

@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Script:
    """script("dior", "--show", 3) runs cot.py's main in this process."""
    def script(*flags: object) -> None:
        monkeypatch.setattr("sys.argv", ["cot.py", *map(str, flags)])
        cot.main()
    return script


def test_it_can_be_looked_at(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "cot.png"
    done = run("cot.py", "synth", "--split", "val", "--show", 3, "--out", out)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("<think>") == 3 and out.exists()


def test_it_is_shown_in_the_coordinates_that_a_checkpoint_is_trained_on(
        script: Script, tiny_checkpoint: Path, dior_root: Path, tmp_path: Path,
        capsys: pytest.CaptureFixture[str]) -> None:
    records = data.load("dior", dior_root, "sft")
    processor = Processor.from_pretrained(tiny_checkpoint)
    original = Frame((120, 90), (120, 90), "absolute")
    resized = processor(data.open_image(records[0]), "").frame
    assert resized.extent != (120, 90)
    for flags, frame in ((), original), (("--init", tiny_checkpoint), resized):
        script("dior", "--root", dior_root, "--show", 1, "--out", tmp_path / "cot.png", *flags)
        assert cot.writer(records)(records[0], frame) in capsys.readouterr().out


def test_what_no_encoding_has_is_printed_all_the_same(
        run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (50, 50)).save(tmp_path / "a.png")
    row = {"image": "a.png", "text": "the ship \u8239 \ud800", "box": [1, 2, 30, 40]}
    (tmp_path / "train.jsonl").write_text(json.dumps(row))
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    done = run("cot.py", "jsonl", "--root", tmp_path, "--split", "train",
               "--out", tmp_path / "cot.png")
    assert done.returncode == 0 and r"the ship \u8239 \ud800." in done.stdout, done.stderr


def test_a_users_mistake_is_one_line(
        script: Script, dior_root: Path, tmp_path: Path,
        capsys: pytest.CaptureFixture[str]) -> None:
    row = {"image": "a.png", "text": "the ship", "box": [1, 2, 30, 40]}
    (tmp_path / "train.jsonl").write_text(json.dumps(row))
    message = "no usable record in the split train of jsonl: 1 of 1 .*missing image: 1"
    with pytest.raises(data.DataError, match=message) as error:
        script("jsonl", "--root", tmp_path, "--split", "train", "--out", tmp_path / "cot.png")
    assert "\n" not in str(error.value)
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as stop:
        script("dior", "--root", dior_root, "--out", tmp_path / "file" / "cot.png")
    printed = capsys.readouterr().err
    assert stop.value.code == 2 and str(tmp_path / "file") in printed
    assert printed.count("\n") == 1
    for name in ("cot.xyz", "cot.psd"):
        with pytest.raises(data.DataError, match=f"can't be written to .*{name}"):
            script("dior", "--root", dior_root, "--out", tmp_path / name)


@pytest.mark.parametrize("flags, message", [
    (("--teacher", "{tmp}/nope"), "no checkpoint at"),
    (("--teacher", "{tiny}", "--device", "cuda"), "torch sees no CUDA device"),
    (("--teacher", "{tiny}", "--init", "{tiny}"), "--init is for the check")])
def test_a_mistake_about_the_teacher_is_one_line(
        flags: tuple[str, ...], message: str, run: Run, tiny_checkpoint: Path, dior_root: Path,
        tmp_path: Path) -> None:
    flags = [flag.format(tmp=tmp_path, tiny=tiny_checkpoint) for flag in flags]
    out = tmp_path / "explained.jsonl"
    done = run("cot.py", "dior", "--root", dior_root, "--device", "cpu", "--out", out, *flags)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert message in done.stderr and not out.exists()


# ---------------------------------------------------------------- a teacher's reasoning

HARBOR_SHIP = Record("7", None, "the ship", (100.0, 200.0, 300.0, 400.0), "ship", (800, 800))
# The model sees half the size: its box is [50, 100, 150, 200].
HALF_SIZE = Frame((800, 800), (400, 400), "absolute")


@pytest.mark.parametrize("think, box, reason", [
    ("it is left of the pier, near (100, 150).", [50, 100, 150, 200], None),
    ("it is left of the pier.", [52, 101, 149, 197], None),
    ("it is left of the pier.", [250, 100, 350, 200], "disagrees with the annotation"),
    # In pixels of the original image.
    ("it is left of the pier.", [100, 200, 300, 400], "disagrees with the annotation"),
    ("it lies in [50, 100, 150, 200].", [50, 100, 150, 200],
     "gives the box away before the answer"),
    ("from 51 across and 102 down to 149 and 199.", [50, 100, 150, 200],
     "gives the box away before the answer"),
    ("x1=50, y1=100, x2=150, y2=200", [50, 100, 150, 200],
     "gives the box away before the answer"),
    ("x from 50 to 150, y 100-200", [50, 100, 150, 200],
     "gives the box away before the answer"),
    ("top left (50, 100), one of 2 ships, bottom right (150, 200)", [50, 100, 150, 200],
     "gives the box away before the answer"),
    ("left 50, top 100, width 101, height 99", [50, 100, 150, 200],
     "gives the box away before the answer"),
    ("there are 2: near 50, 100 and near 300, 310.", [50, 100, 150, 200], None),
    (" ", [50, 100, 150, 200], "no reasoning"),
    ("it is </think><answer> left.", [50, 100, 150, 200], "does not parse: several answers"),
    ("it is left.", [50, 100, 150], "does not parse: not four numbers")])
def test_a_teacher_is_kept_where_it_parses_agrees_and_does_not_leak(
        think: str, box: list[float], reason: str | None) -> None:
    text = f'<think>{think}</think><answer>{{"bbox_2d": {box}}}</answer>'
    wanted = (think, None) if reason is None else (None, reason)
    assert cot.filter_explanation(text, HARBOR_SHIP, HALF_SIZE) == wanted


class EverySecondRight:
    """Stands for `generate`: explains every second record rightly, and answers no other."""

    def __init__(self, processor: Processor) -> None:
        self.processor = processor
        self.requests: list[str] = []

    def __call__(
            self, model: object, prompts: list[data.Prompt], *settings: object,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        completions = []
        for prompt in prompts:
            self.requests.append(self.processor.decode(prompt.input_ids))
            box = self.requests[-1].split("lies in the box ")[1].split(". Write")[0]
            text = f'<think>by the pier.</think><answer>{{"bbox_2d": {box}}}</answer>'
            if len(self.requests) % 2 == 0:
                text = "i can't say"
            completions.append(self.processor.encode(text))
        tokens = torch.nn.utils.rnn.pad_sequence(completions, batch_first=True)[:, None]
        lengths = torch.tensor([[len(ids)] for ids in completions])
        return tokens, torch.zeros(tokens.shape), lengths


def test_a_teacher_can_be_stopped_and_goes_on_and_what_it_failed_at_is_written_from_the_annotations(
        monkeypatch: pytest.MonkeyPatch, script: Script, tiny_checkpoint: Path, dior_root: Path,
        tmp_path: Path) -> None:
    records = data.load("dior", dior_root, "sft")
    out = tmp_path / "explained.jsonl"
    teacher = EverySecondRight(Processor.from_pretrained(tiny_checkpoint))
    monkeypatch.setattr(cot, "generate", teacher)
    for limit in (3, 1000, 1000):
        # Stopped in the middle of a line.
        if len(teacher.requests) == 3:
            out.write_text(out.read_text() + '{"id": "9", "thi')
        script("dior", "--root", dior_root, "--teacher", tiny_checkpoint, "--out", out,
               "--limit", limit, "--batch", 2, "--device", "cpu")
    # Each record is explained once.
    assert len(teacher.requests) == len(records) > 3
    write_explained = cot.writer(records, out)
    write_own = cot.writer(records)
    for i, record in enumerate(records):
        frame = Frame(record.size, record.size, "absolute")
        text = write_explained(record, frame)
        assert format_ok(text) and text.endswith(cot.answer_text(record, frame))
        if i % 2 == 0:
            assert text.startswith("<think>by the pier.</think>")
        else:
            assert text == write_own(record, frame)
