"""study/truth.py: cot.py's own texts are true, and each kind of mistake is found in its column."""
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

import cot
import data
from conftest import Run
from qwen.answer import Frame, write
from readers.base import Record
from study import truth
from toy import scenes

SIDE = scenes.SIDE
FRAME = Frame((SIDE, SIDE), (SIDE, SIDE), "absolute")


@pytest.mark.parametrize("split", ["sft", "val"])
def test_every_sentence_of_cot_is_true(split: str) -> None:
    records = data.load("synth", None, split)
    write_completion = cot.writer(records)
    claims = dict.fromkeys(truth.COLUMNS, 0)
    for record in records[:300]:
        think = truth.THOUGHT.search(write_completion(record, FRAME))[1]
        for column, verdicts in truth.judge(think, record, FRAME, record.box).items():
            assert all(verdicts), (column, record.id, think)
            claims[column] += len(verdicts)
    # Nothing is true only because it was never judged.
    assert claims.pop("choice off") == claims.pop("box off") == 0
    assert min(claims.values()) > 30, claims
    assert claims["choice"] == claims["box"] == 300


def test_points_and_sizes_are_read_in_the_frame_of_the_answer() -> None:
    records = data.load("synth", None, "val")
    write_completion = cot.writer(records)
    frame = Frame((SIDE, SIDE), (SIDE, SIDE), "1000")
    for record in records[:60]:
        think = truth.THOUGHT.search(write_completion(record, frame))[1]
        for column, verdicts in truth.judge(think, record, frame, record.box).items():
            assert all(verdicts), (column, record.id, think)


# ---------------------------------------------------------------- mistakes

def thing(category: str, color: str, x: float, y: float, side: float = 10) -> scenes.Object:
    box = (x - side / 2, y - side / 2, x + side / 2, y + side / 2)
    return scenes.Object(category, color, box, 0, side)


TRUCK = thing("truck", "blue", 50, 50)
CARS = [thing("car", "white", 20, 52, 8), thing("car", "red", 44, 80),
        thing("car", "red", 92, 56, 16)]
SHIPS = [thing("ship", "black", 70, 20, 20), thing("ship", "black", 100, 20)]
OBJECTS = [TRUCK, *CARS, *SHIPS]
RIGHTMOST = (
    "the rightmost car. a white car near (20, 50), rightmost so far. a red car near (45, 80), "
    "rightmost so far. a red car near (90, 55), rightmost so far. so it is the one near (90, 55).",
    CARS[2])
RIGHT = (
    "the car right of the truck. a blue truck near (50, 50). a white car near (20, 50), left of "
    "it. a red car near (45, 80), below it. a red car near (90, 55), right of it. so it is the "
    "one near (90, 55).", CARS[2])
NEAREST = (
    "the car next to the biggest ship. a black ship near (70, 20), of size 20, largest so far. a "
    "black ship near (100, 20), of size 10. so it is the one near (70, 20). a white car near "
    "(20, 50), 60 away, nearest so far. a red car near (45, 80), 65 away. a red car near (90, "
    "55), 40 away, nearest so far. so it is the one near (90, 55).", CARS[2])
REGION = (
    "the red car at the bottom. a red car near (45, 80), at the bottom. a red car near (90, 55), "
    "at the right. so it is the one near (45, 80).", CARS[1])


def mistakes(think: str, target: scenes.Object) -> set[str]:
    """The columns in which a thought about OBJECTS is wrong somewhere, except "sentence"."""
    record = Record("0", SimpleNamespace(objects=OBJECTS), think.split(".")[0].strip("!"),
                    target.box, target.category, (SIDE, SIDE))
    verdicts = truth.judge(think, record, FRAME, target.box)
    wrong = {column for column, of_column in verdicts.items() if not all(of_column)}
    of_thoughts = {"count", "anchor", "choice", "box", "choice off", "box off"}
    assert ("sentence" in wrong) == bool(wrong - of_thoughts - {"sentence"})
    return wrong - {"sentence"}


@pytest.mark.parametrize("case", [RIGHTMOST, RIGHT, NEAREST, REGION])
def test_true_thoughts_have_no_mistake(case: tuple[str, scenes.Object]) -> None:
    assert mistakes(*case) == set()


@pytest.mark.parametrize("case, right, wrong, columns", [
    # Of one sentence. If only a word is wrong, the list still has the object that is meant.
    (RIGHTMOST, "a white car", "a black car", {"object", "color"}),
    (RIGHT, "a blue truck", "a blue tank", {"object", "category"}),
    (RIGHTMOST, "car near (45, 80)", "car near (45, 100)", {"object", "place", "count"}),
    (RIGHTMOST, "car near (45, 80)", "car near (45, 89)", set()),
    (REGION, "at the right", "at the upper right", {"region"}),
    (NEAREST, "size 20", "size 26", {"size"}),
    (NEAREST, "size 20", "size 25", set()),
    (NEAREST, "size 10", "size 14", {"size"}),
    (NEAREST, "size 10", "size 13", set()),
    (RIGHT, "left of it", "above it", {"side"}),
    (NEAREST, "60 away", "75 away", {"distance"}),
    (NEAREST, "60 away", "50 away", set()),
    (RIGHTMOST, "(45, 80), rightmost so far", "(45, 80)", {"so far"}),
    (NEAREST, "65 away", "65 away, nearest so far", {"so far"}),
    (REGION, "at the right", "at the right, nearest so far", {"so far"}),
    (RIGHT, "left of it", "left of its", {"read", "count"}),
    (RIGHT, "the car right of the truck.", "!the car right of the truck.", {"read"}),
    # Of a list.
    (RIGHT, " a white car near (20, 50), left of it.", "", {"count"}),
    (REGION, "a red car near (45, 80), at the bottom. a red car near (90, 55), at the right.",
     "a red car near (90, 55), at the right. a red car near (45, 80), at the bottom.", {"order"}),
    (REGION, "at the right.", "at the right. a red car near (90, 55), at the right.",
     {"order", "count"}),
    (REGION, "a red car near (45, 80)", "a white car near (20, 50), at the left. a red car near "
     "(45, 80)", {"count"}),
    # Of the choice. The box is the target's.
    (REGION, "the one near (45, 80)", "the one near (90, 55)",
     {"so it is", "follows", "choice", "box"}),
    (RIGHTMOST, "the one near (90, 55)", "the one near (45, 80)",
     {"so it is", "follows", "choice", "box"}),
    (REGION, "the one near (45, 80)", "the one near (5, 5)", {"so it is", "follows", "choice"}),
    (REGION, " so it is the one near (45, 80).", "", {"choice"}),
    (REGION, "at the right", "at the bottom", {"region", "follows"}),
    # A wrong anchor: from the other ship the distances are 86, 82 and 37.
    (NEAREST, "near (70, 20). a", "near (100, 20). a",
     {"so it is", "follows", "anchor", "distance", "so far"}),
    (RIGHT, "a blue truck near (50, 50). ", "", {"count", "anchor"}),
    # "It" is the truck, wherever the text puts it.
    (RIGHT, "truck near (50, 50)", "truck near (5, 5)", {"object", "place", "count", "anchor"}),
])
def test_a_mistake_is_found_in_its_column(
        case: tuple[str, scenes.Object], right: str, wrong: str, columns: set[str]) -> None:
    think, target = case
    assert right in think
    assert mistakes(think.replace(right, wrong), target) == columns


def test_a_box_elsewhere_is_told_from_a_wrong_choice() -> None:
    record = Record("0", SimpleNamespace(objects=OBJECTS), "the red car at the bottom",
                    CARS[1].box, "car", (SIDE, SIDE))
    think = REGION[0]
    missed = truth.judge(think, record, FRAME, CARS[2].box)
    assert missed["choice off"] == [False] and missed["box off"] == [True]
    assert missed["choice"] == [True] and missed["box"] == [False]
    strayed = truth.judge(think.replace("one near (45, 80)", "one near (90, 55)"), record, FRAME,
                          CARS[2].box)
    assert strayed["choice off"] == [True] and strayed["box off"] == [False]
    assert strayed["choice"] == [False] and strayed["box"] == [True]
    # An IoU of 100 / 169 is right, one of 100 / 210 is not.
    hit = truth.judge(think, record, FRAME, (36, 72, 49, 85))
    assert "choice off" not in hit and "box off" not in hit
    loose = truth.judge(think, record, FRAME, (39, 75, 60, 85))
    assert loose["box"] == [True] and loose["box off"] == [True]
    # A box that touches nothing, and none at all.
    assert truth.judge(think, record, FRAME, (0, 0, 9, 9))["box"] == [False]
    silent = truth.judge(think, record, FRAME, None)
    assert silent["box"] == [False] and silent["box off"] == [True]


def test_six_of_many_are_a_whole_list() -> None:
    ships = [thing("ship", "red", 10 + 12 * i, 50, 8) for i in range(8)]
    record = Record("0", SimpleNamespace(objects=ships), "the lowest ship", ships[3].box, "ship",
                    (SIDE, SIDE))
    lines = [f" a red ship near ({10 + 12 * i}, 50)." for i in range(8)]
    for count, complete in ((8, True), (6, True), (5, False)):
        think = "the lowest ship." + "".join(lines[:count])
        assert truth.judge(think, record, FRAME, None)["count"] == [complete]


# ---------------------------------------------------------------- the command

def write_predictions(
        file: Path, records: Sequence[Record], text_of: Callable[[Record, int], str]) -> None:
    lines = []
    for i, record in enumerate(records):
        frame = {"original": record.size, "resized": record.size, "convention": "absolute"}
        line = {"id": record.id, "text": text_of(record, i), "frame": frame}
        lines.append(json.dumps(line) + "\n")
    file.write_text("".join(lines))


def test_the_command_prints_a_row_a_stage_and_kind(run: Run, tmp_path: Path) -> None:
    records = [r for r in data.load("synth", None, "val") if r.kind == "position"][:8]
    explained = cot.writer(records)

    def spoiled(record: Record, i: int) -> str:
        """Two of the eight choose nothing, and the first of them is cut off."""
        text = explained(record, FRAME)
        if i == 0:
            return text[:text.index(" so it")] + " a"
        return text.replace(" so it is", " so is") if i == 1 else text

    files = [tmp_path / f"predictions_{stage}.jsonl" for stage in ("sft", "boxes")]
    write_predictions(files[0], records, spoiled)
    write_predictions(files[1], records, lambda record, i: write(None, "[1, 2, 3, 4]"))
    out = tmp_path / "numbers" / "truth.json"
    done = run("study/truth.py", *files, "--split", "val", "--out", out)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 6
    cells = [dict(zip(lines[0].split(" | "), line.split(" | "))) for line in lines[2:]]
    rows = json.loads(out.read_text())
    assert [(row["stage"], row["kind"]) for row in rows] == [
        ("sft", "all"), ("sft", "position"), ("boxes", "all"), ("boxes", "position")]
    row = rows[0]
    sentences = sum(explained(record, FRAME).count(".") - 1 for record in records)
    assert row["counts"]["sentence"] == sentences and row["thoughts"] == row["answers"] == 8
    assert row["shares"]["sentence"] == row["shares"]["read"] == (sentences - 2) / sentences
    assert row["interval"][0] < row["shares"]["sentence"] < row["interval"][1] <= 1
    assert row["shares"]["choice"] == 6 / 8 and row["counts"]["box"] == 6
    assert row["shares"]["choice off"] == 1 and row["counts"]["choice off"] == 1
    assert cells[0]["sentence"].startswith(f"{(sentences - 2) / sentences:.3f} [0.")
    # Answers without a thought.
    assert rows[2]["answers"] == 8 and rows[2]["thoughts"] == 0 and rows[2]["interval"] is None
    assert set(rows[2]["shares"].values()) == {None}
    assert lines[4].endswith("| - | - |")


def test_a_mistake_is_one_line(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "predictions_sft.jsonl"
    write_predictions(file, data.load("synth", None, "val")[:2], lambda record, i: "")
    for flags, message in (
            (("--data", "dior"), "--data dior is not drawn"),
            (("--split", "novel"), "no record of this split has the id 'val-"),
            (("--split", "nowhere"), "synth has no split 'nowhere'"),
            (("--split", "val"), "no.jsonl: unreadable")):
        files = [file, tmp_path / "no.jsonl"] if "unreadable" in message else [file]
        done = run("study/truth.py", *files, *flags)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        assert message in done.stderr
