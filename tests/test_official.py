"""The scores that the authors of a data set would print: worked by hand from their formulas."""
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import data
import eval as evaluation
from qwen.answer import Box
from readers.base import DataError, Record, Records
from readers.collect import refuse_other_unit
from report import metrics, predictions

SQUARE = (640, 640)


def record(box: Sequence[float], size: tuple[int, int] = SQUARE, **more: Any) -> Record:
    return Record("0", "0.png", "a ship", tuple(map(float, box)), "ship", size, **more)


def official(name: str, *pairs: tuple[Sequence[float] | None, Record]) -> dict[str, Any]:
    answers, records = zip(*pairs)
    return metrics.official(name, metrics.box_tensor(answers), records)


# ---------------------------------------------------------------- the formulas

@pytest.mark.parametrize("name, hit", [("dior", 0), ("opt", 1), ("rrsisd", 1), ("rsvg-hr", 1)])
def test_half_is_a_hit_for_those_who_count_at_least_half(name: str, hit: int) -> None:
    """200 of 400 square pixels."""
    got = official(name, ((0, 0, 20, 10), record((0, 0, 20, 20))))
    assert (got["Pr@0.5"], got["Pr@0.6"], got["n"]) == (hit, 0, 1)
    assert got["mIoU"] == pytest.approx(0.5) and got["cIoU"] == pytest.approx(0.5)
    assert list(got) == ["mIoU", *(f"Pr@{t}" for t in metrics.THRESHOLDS), "cIoU", "n"]


def test_dior_truncates_targets_to_pixels_of_its_letterbox() -> None:
    """At 0.8, (133, 237, 684, 672) is (106.4, 189.6, 547.2, 537.6) and truncated (106, 189, 547,
    537): (132.5, 236.25, 683.75, 671.25) in the image. A perfect answer shares 550.75 x 434.25."""
    box = (133, 237, 684, 672)
    got = official("dior", (box, record(box, (800, 800))))
    shared = 550.75 * 434.25
    assert got["mIoU"] == pytest.approx(shared / (551 * 435 + 551.25 * 435 - shared))
    assert got["mIoU"] == got["cIoU"] and got["Pr@0.9"] == 1


def test_the_letterbox_of_an_image_that_is_no_square() -> None:
    """800 x 784 becomes 640 x 627 with 6.5 pixels above. y 10 is 14.5 there, 14 truncated, 9.375 in
    the image; y 30 is 30.5, 30, 29.375; x 10 and 30 are whole. Shared: 20 x 19.375."""
    box = (10, 10, 30, 30)
    got = official("dior", (box, record(box, (800, 784))))
    assert got["mIoU"] == pytest.approx(387.5 / 412.5)


def test_a_target_that_truncation_leaves_without_area_is_missed() -> None:
    """x 101 and 102 are 80.8 and 81.6: 80 and 81. x 102 and 103 are 81.6 and 82.4, 81 and 82. But
    x 5 and 6 are 4.0 and 4.8: both 4."""
    got = official("dior", ((5, 0, 6, 100), record((5, 0, 6, 100), (800, 800))))
    assert (got["mIoU"], got["cIoU"], got["Pr@0.5"]) == (0, 0, 0)


def test_opt_adds_up_areas_at_a_longer_side_of_640() -> None:
    """400 of 400, and 800 of 1600 in an image twice as wide, where a pixel counts a quarter."""
    pairs = (((0, 0, 20, 20), record((0, 0, 20, 20))),
             ((0, 0, 40, 20), record((0, 0, 40, 40), (1280, 640))))
    assert official("opt", *pairs)["cIoU"] == pytest.approx((400 + 200) / (400 + 400))
    assert official("rrsisd", *pairs)["cIoU"] == pytest.approx((400 + 800) / (400 + 1600))


def test_answers_are_cut_to_the_image_except_by_rsvg_hr_and_vrsbench() -> None:
    """An answer that is right in the image, and four times as wide: 400 of 1600 if not cut. A
    target that the reader cut from 120 is 40 wide there: 800 of 1600. In VRSBench's cells: 21 x 21
    of 81 x 21."""
    wide = (80, 80, 160, 100)
    target = record((80, 80, 100, 100), (100, 100))
    for name in ("dior", "opt", "rrsisd"):
        # The letterbox of 100 pixels is 6.4 times as large, so DIOR's target is exact.
        assert official(name, (wide, target))["mIoU"] == pytest.approx(1)
    assert official("rsvg-hr", (wide, target))["mIoU"] == pytest.approx(0.25)
    past = record((80, 80, 100, 100), (100, 100), uncut=(80.0, 80.0, 120.0, 100.0))
    assert official("rsvg-hr", (wide, past))["mIoU"] == pytest.approx(0.5)
    assert official("rsvg-hr", (wide, past))["Pr@0.5"] == 1
    got = official("vrsbench", (wide, target))["all"]
    assert got["mIoU"] == pytest.approx(21 * 21 / (81 * 21))


def test_vrsbench_as_its_authors_print_it() -> None:
    """21 x 41 cells of 21 x 111. The digits of -5 are 5: cells 5 to 10 of 0 to 10."""
    got = official("vrsbench", ((60, 60, 80, 170), record((60, 60, 80, 100), (100, 100))))
    assert round(got["all"]["mIoU"], 4) == 0.3694
    got = official("vrsbench", ((-5, 0, 10, 10), record((0, 0, 10, 10), (100, 100))))
    assert got["all"]["mIoU"] == pytest.approx(66 / 121)
    # 51 of 101 cells by 1: at least half, and 5 of 10 is too.
    got = official("vrsbench", ((0, 0, 4, 0), record((0, 0, 9, 0), (100, 100))))
    assert got["all"] == {"Acc@0.5": 1, "Acc@0.7": 0, "mIoU": 0.5, "cIoU": 0.5, "n": 1}


@pytest.mark.parametrize("name", metrics.OFFICIAL)
def test_no_box_and_swapped_corners_are_misses(name: str) -> None:
    target = record((0, 0, 20, 20))
    pairs = [(None, target), ((20, 20, 0, 0), target), ((0, 0, 20, 20), target)]
    got = official(name, *pairs)
    got = got["all"] if name == "vrsbench" else got
    assert got["mIoU"] == pytest.approx(1 / 3)
    # The two misses add their targets' areas, but VRSBench's script leaves them out.
    assert got["cIoU"] == pytest.approx(1 if name == "vrsbench" else 1 / 3)


def test_other_data_has_no_official_score() -> None:
    for name in ("synth", "jsonl", "refgeo", "geopix", "dior+opt"):
        assert official(name, ((0, 0, 1, 1), record((0, 0, 1, 1)))) is None


def test_answers_are_read_leniently_and_not_cut() -> None:
    frame = {"original": [200, 100], "resized": [400, 400], "convention": "absolute"}
    texts = ("{<25><40><33><60>}", "[10, 20, 900, 40]", "none",
             '<answer>{"b": [8, 4, 8, 9]}</answer>')
    answers = [{"id": "0", "text": text, "frame": frame} for text in texts]
    answers += [{"id": "0", "box": [1.0, 2.0, 900.0, 4.0]}, {"id": "0", "box": None}, None]
    got = predictions.raw_boxes(answers).tolist()
    assert got[0] == [50, 40, 66, 60] and got[1] == [5, 5, 450, 10]
    assert got[3] == [4, 1, 4, 2.25] and got[4] == [1, 2, 900, 4]        # a line, and not cut
    assert all(map(lambda box: box[0] != box[0], (got[2], got[5], got[6])))


# ---------------------------------------------------------------- the script

Script = Callable[..., str]


@pytest.fixture
def score(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> Script:
    """Runs eval.py on predictions lines for records of a data set -> what it prints."""
    def run(name: str, records: list[Record], lines: list[Any], *flags: object) -> str:
        known = []
        for i, r in enumerate(records):
            path = tmp_path / r.image
            Image.new("RGB", r.size).save(path)
            known.append(Record(str(i), path, r.text, r.box, r.category, r.size, unique=r.unique))
        monkeypatch.setitem(data.READERS, name, lambda root, split: Records(known, {}))
        file = tmp_path / "p.jsonl"
        numbered = [json.dumps({"id": i, **line}) for i, line in enumerate(lines)]
        file.write_text("\n".join(numbered))
        monkeypatch.setattr("sys.argv", ["eval.py", "--predictions", str(file), "--data", name,
                                         *map(str, flags)])
        evaluation.main()
        return capfd.readouterr().out
    return run


def row(tmp_path: Path) -> dict[str, Any]:
    return json.loads((tmp_path / "p" / "eval.json").read_text())["rows"][0]


def test_eval_json_report_and_screen_have_it_beside_our_own(
        score: Script, tmp_path: Path) -> None:
    """OPT-RSVG: 0.5 is a hit in both; cIoU 0.6 in pixels, 0.75 scaled."""
    records = [record((0, 0, 20, 20)), record((0, 0, 40, 40), (1280, 640))]
    out = score("opt", records, [{"box": [0, 0, 20, 20]}, {"box": [0, 0, 40, 20]}],
                "--coords", "original")
    got = row(tmp_path)
    assert got["cIoU"] == pytest.approx(0.6) and got["official"]["cIoU"] == pytest.approx(0.75)
    assert got["official"]["Pr@0.5"] == got["Pr@0.5"] == 1
    assert "p, as the authors of opt count, all (2): mIoU 0.750, Pr@0.5 1.000" in out
    page = (tmp_path / "p" / "report.html").read_text()
    assert "As the authors of opt count" in page and "<td>0.750</td>" in page


def test_answers_in_vrsbenchs_own_form_score_as_its_authors_score_them(
        score: Script, tmp_path: Path) -> None:
    """Three of four right: one in the unique ones, two in the others; the strict figure is 0."""
    boxes = [(128, 128, 256, 384), (0, 0, 256, 256), (256, 0, 384, 128), (0, 256, 128, 512)]
    records = [record(box, (512, 512), unique=i < 2) for i, box in enumerate(boxes)]
    texts = ["{<25><25><50><75>}", "{<90><90><99><99>}", "{<50><0><75><25>|<45>}",
             "{<0><50><25><100>}"]
    out = score("vrsbench", records, [{"text": text} for text in texts], "--coords", "100")
    got = row(tmp_path)
    assert {part: (x["n"], x["Acc@0.5"]) for part, x in got["official"].items()} == {
        "all": (4, 0.75), "unique": (2, 0.5), "non_unique": (2, 1.0)}
    assert (got["Pr@0.5"], got["lenient"]["Pr@0.5"]) == (0, 0.75)
    assert "unique (2): Acc@0.5 0.500" in out and "non_unique (2): Acc@0.5 1.000" in out


# ---------------------------------------------------------------- hundredths

def test_boxes_in_hundredths_are_read_with_the_flag(score: Script, tmp_path: Path) -> None:
    size = (800, 400)
    boxes = [(80, 40, 160, 80), (400, 200, 480, 300), (720, 360, 800, 400), (0, 0, 80, 400)]
    records = [record(box, size) for box in boxes]
    lines = [{"box": [box[0] / 8, box[1] / 4, box[2] / 8, box[3] / 4]} for box in boxes]
    score("theirs", records, lines, "--coords", "100")
    assert row(tmp_path)["mIoU"] == pytest.approx(1)
    with pytest.raises(DataError, match="its boxes all lie in 0..100.*--coords 100, or"):
        score("theirs", records, lines)
    score("theirs", records, lines, "--coords", "original")
    assert row(tmp_path)["mIoU"] < 0.5
    texts = [{"text": json.dumps({"bbox_2d": line["box"]})} for line in lines]
    with pytest.raises(DataError, match="--coords 100, or"):
        score("theirs", records, [{**text, **line} for text, line in zip(texts, lines)])
    score("theirs", records, [{**text, **line} for text, line in zip(texts, lines)],
          "--coords", "100")
    assert row(tmp_path)["mIoU"] == pytest.approx(1)
    score("theirs", records, texts, "--coords", "100")
    assert row(tmp_path)["lenient"]["mIoU"] == pytest.approx(1)


def test_data_in_hundredths_is_refused_and_read_with_the_flag(tmp_path: Path) -> None:
    Image.new("RGB", (800, 400)).save(tmp_path / "a.png")
    boxes = [[10, 10, 20, 20], [50, 50, 60, 75], [90, 90, 100, 100]]
    lines = [json.dumps({"image": "a.png", "text": "a ship", "box": box}) for box in boxes]
    (tmp_path / "test.jsonl").write_text("\n".join(lines))
    with pytest.raises(DataError, match="--data-coords 100, or --data-coords original") as error:
        data.load("jsonl", tmp_path, "test")
    assert "\n" not in str(error.value)
    got = [r.box for r in data.load("jsonl", tmp_path, "test", "100")]
    assert got == [(80, 40, 160, 80), (400, 200, 480, 300), (720, 360, 800, 400)]
    assert data.load("jsonl", tmp_path, "test", "original")[0].box == (10, 10, 20, 20)


BOXES = [(1.0, 2.0, 30.0, 40.0), (50.0, 50.0, 90.0, 100.0), (5.0, 5.0, 8.0, 9.0)]


@pytest.mark.parametrize("boxes, size, unit", [
    # One small box in a corner is likely enough: 1 in 64. Three are 1 in 262,144.
    (BOXES[:1], (800, 800), None), (BOXES, (800, 800), "100"),
    # Copies of a box tell nothing new.
    (BOXES[:1] * 9, (800, 800), None),
    # Half of the pixels of an image: 1 in 8 for three boxes.
    (BOXES, (200, 100), None), ([*BOXES, (101.0, 3.0, 104.0, 9.0)], (800, 800), None),
    # Outside of their images, so no pixels; of 0..1000 if one number is above 100.
    (BOXES, (40, 40), "100"), ([*BOXES, (60.0, 60.0, 101.0, 90.0)], (40, 40), "1000"),
    ([(0.1, 0.1, 0.5, 0.5)], (800, 800), "fraction"), (BOXES, None, None),
])
def test_the_unit_that_is_asked_for(
        boxes: list[Box], size: tuple[int, int] | None, unit: str | None) -> None:
    pairs = [(box, size) for box in boxes]
    if unit is None:
        refuse_other_unit(pairs, "a.jsonl: its boxes")
        return
    with pytest.raises(DataError, match=f"Give --data-coords {unit}, or"):
        refuse_other_unit(pairs, "a.jsonl: its boxes")


# ---------------------------------------------------------------- a text and a box

SAID = '<answer>{"bbox_2d": [%s]}</answer>'


@pytest.mark.parametrize("line, coords, strict, lenient", [
    # The text has no box, or cannot be read: the given one counts.
    ({"text": "there", "box": [8, 8, 40, 40]}, None, (8, 8, 40, 40), (8, 8, 40, 40)),
    ({"text": "there", "box": [100, 100, 500, 500]}, "1000", (8, 8, 40, 40), (8, 8, 40, 40)),
    # They agree, up to a pixel.
    ({"text": SAID % "8, 8, 40, 40", "box": [8, 8, 40, 40.9]}, None, (8, 8, 40, 40),
     (8, 8, 40, 40)),
    ({"text": SAID % "100, 100, 500, 500", "box": [100, 100, 500, 500]}, "1000",
     (8, 8, 40, 40), (8, 8, 40, 40)),
    ({"text": "{<10><10><50><50>}", "box": [8, 8, 40, 40]}, None, (8, 8, 40, 40), (8, 8, 40, 40)),
    ({"text": SAID.replace("bbox", "box") % "100, 200, 500, 600", "box": [16, 8, 48, 40]}, None,
     (16, 8, 48, 40), (16, 8, 48, 40)),
    # No box is given: the text counts, as in our own files.
    ({"text": "[8, 8, 40, 40]", "box": None}, "original", None, (8, 8, 40, 40)),
    ({"text": "nowhere", "box": None}, None, None, None),
])
def test_the_box_counts_where_the_text_has_none(
        line: dict, coords: str | None, strict: Box | None, lenient: Box | None) -> None:
    target = record((8, 8, 40, 40), (80, 80))
    got = predictions.parse_prediction({"id": "0", **line}, target, coords, None)
    got = predictions.read_prediction(got, target)
    assert got[:2] == (strict and pytest.approx(strict), lenient and pytest.approx(lenient))


@pytest.mark.parametrize("line, coords, says", [
    ({"text": SAID % "8, 8, 40, 40", "box": [8, 8, 40, 42]}, None, "its text says the box"),
    ({"text": SAID % "100, 100, 500, 500", "box": [8, 8, 40, 40]}, "1000", "its text says the box"),
    ({"text": "{<10><10><50><50>}", "box": [10, 10, 50, 50]}, None, "its text says the box"),
    ({"text": SAID % "8, 8, 40, 40", "box": [40, 40, 8, 8]}, None, "its text says the box"),
    ({"text": SAID % "8, 8, 40, 40", "box": None}, None, "needs --coords"),
])
def test_a_text_and_a_box_that_disagree_are_refused(
        line: dict, coords: str | None, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        predictions.parse_prediction({"id": "0", **line}, record((8, 8, 40, 40), (80, 80)), coords,
                                     None)


# ---------------------------------------------------------------- few images

@pytest.mark.parametrize("n, says", [
    (1, "no interval from 1 image"), (2, "] from only 2 images"), (20, "")])
def test_intervals_of_few_images_say_so(
        score: Script, tmp_path: Path, n: int, says: str, monkeypatch: pytest.MonkeyPatch,
        capfd: pytest.CaptureFixture) -> None:
    records = [Record("0", f"{i}.png", "x", (0.0, 0.0, 200.0, 200.0), "", (400, 400))
               for i in range(n)]
    out = score("theirs", records, [{"box": [0, 0, 200, 100 + 5 * i]} for i in range(n)])
    got = row(tmp_path)
    assert got["images"] == n and (got["ci"]["mIoU"] is None) == (n == 1)
    page = (tmp_path / "p" / "report.html").read_text()
    assert (says in page) and (says in out)
    assert n < 20 or "from only" not in page + out
    monkeypatch.setattr("sys.argv", [
        "eval.py", "--compare", *[str(tmp_path / "p.jsonl")] * 2, "--data", "theirs",
        "--out", str(tmp_path / "both")])
    evaluation.main()
    out = capfd.readouterr().out
    both = json.loads((tmp_path / "both" / "eval.json").read_text())["comparison"]["mIoU"]
    assert (both["ci"] is None) == (both["p"] is None) == (n == 1)
    assert (", p 1.000" in out) == (n > 1) and says in out


def test_predictions_need_the_name_of_their_data(
        monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    (tmp_path / "p.jsonl").write_text('{"id": "test-0", "box": null}\n')
    monkeypatch.chdir(tmp_path)
    for flags in (("--predictions", "p.jsonl"), ("--compare", "p.jsonl", "p.jsonl")):
        monkeypatch.setattr("sys.argv", ["eval.py", *flags])
        with pytest.raises(SystemExit) as stop:
            evaluation.main()
        error = capfd.readouterr().err
        assert stop.value.code == 2 and "--data" in error and error.count("\n") == 1


def test_boxes_past_the_edge_keep_what_was_written(tmp_path: Path) -> None:
    """The one of RSVG-HR's test file."""
    (tmp_path / "rsvg_hr_test.txt").write_text(
        "a.jpg,927.39,28.0,1032.12,132.73,the largest roundabout\n"
        "a.jpg,1,2,30,40,a ship\n")
    Image.new("RGB", (1024, 1024)).save(tmp_path / "a.jpg")
    one, two = data.load("rsvg-hr", tmp_path, "test")
    assert one.box == (927.39, 28.0, 1024.0, 132.73)
    assert (one.uncut, two.uncut) == ((927.39, 28.0, 1032.12, 132.73), None)
