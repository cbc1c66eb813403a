"""report/page.py: one safe, small, self-contained page, for any texts."""
import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import eval as evaluation
from readers.base import Record
from report import metrics, pictures, predictions
from report import page as report_page

EVIL = '<script>alert(1)</script><img src=http://x/y onerror=alert(1)>"\' onload="x" &amp; \ud800'
FRAME = {"original": [400, 300], "resized": [400, 300], "convention": "absolute"}
TERMS = ("giou", "diou", "center", "format")


def make_records(folder: Path, n: int, noise: bool = False) -> list[Record]:
    """n records with hostile texts, each with its image of 400 x 300."""
    rng = np.random.default_rng(0)
    records = []
    for i in range(n):
        pixels = np.full((300, 400, 3), 80, np.uint8)
        if noise:
            pixels = rng.integers(0, 256, (300, 400, 3), dtype=np.uint8)
        file = folder / f"{i}.png"
        Image.fromarray(pixels).save(file)
        box = (10.0, 10.0, 110.0, 90.0)
        records.append(Record(f"r{i}", file, EVIL, box, EVIL, (400, 300), EVIL))
    return records


def make_predictions(records: list[Record]) -> list[predictions.Prediction]:
    """Record i is off by 5 i pixels; every fifth has no box."""
    predictions = []
    for i, record in enumerate(records):
        x = 10 + 5 * i
        text = f'{EVIL * 40}<answer>{{"bbox_2d": [{x}, 10, {x + 100}, 90]}}</answer>'
        predictions.append(
            {"id": record.id, "text": EVIL if i % 5 == 0 else text, "frame": FRAME})
    return predictions


def make_cases(
        records: list[Record], answers: list[predictions.Prediction]) -> list[report_page.Case]:
    """Each record with its answer, as eval.py shows them."""
    cases = []
    boxes = predictions.strict_boxes(records, answers)
    ious = metrics.overlaps(boxes, *metrics.targets(records)).iou
    for record, answer, iou in zip(records, answers, ious):
        box, _, _ = predictions.read_prediction(answer, record)
        cases.append(report_page.Case(record, box, iou.item(), answer["text"]))
    return cases


def make_row(
        records: list[Record], predictions: list[predictions.Prediction], name: str = EVIL,
) -> dict[str, Any]:
    details = evaluation.details(records, predictions, "vrsbench", records[:2], records)
    return {
        "stage": name, "temperature": 0.0, "blind": False, "data": EVIL, "split": EVIL,
        "refused": {EVIL: 1234}, **evaluation.score_predictions(records, predictions), **details}


class Tags(HTMLParser):
    """Every tag and attribute of a page, and whether open tags are closed in order."""

    void = {"meta", "img", "br", "polyline", "path"}

    def __init__(self, page: str) -> None:
        super().__init__()
        self.seen: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        self.attributes += attrs
        if tag not in self.void:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.void:
            assert self.open.pop() == tag


def write_logs(folder: Path) -> None:
    """Logs of a run of RFT, hostile ones: a NaN, a line that is cut off, strange keys."""
    folder.mkdir()
    lines = []
    for k in range(1, 500):
        line = {"step": k, "reward": k / 50, "iou": float("nan") if k == 7 else 0.1,
                "dispersion": 0.2, "length": 30, "kl": 0.0, EVIL: 1}
        for name in ("reward", "iou", *TERMS, EVIL):
            line[f"{name}_group_std"] = 0.1
        lines.append(line | dict.fromkeys(TERMS, k / 99))
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text + '{"step": 50')
    group = {"id": "r0", "expression": EVIL, "boxes": [None, [5.0, 5.0, 60.0, 60.0]],
             "reward": [0.0, 1.0], "texts": [EVIL, EVIL]}
    groups = [{**group, "step": k} for k in range(1, 30)]
    groups.append({**group, "step": 999, "expression": "another data set's r0"})
    (folder / "rollouts.jsonl").write_text("".join(json.dumps(g) + "\n" for g in groups))


@pytest.fixture
def page(tmp_path: Path) -> str:
    """A page of two rows and a stage with logs; all texts are hostile."""
    records = make_records(tmp_path, 20)
    predictions = make_predictions(records)
    run = tmp_path / "run"
    write_logs(run)
    file = tmp_path / "report.html"
    rows = [make_row(records, predictions)] * 2
    cases = [make_cases(records, predictions)] * 2
    summary = {"centre_box": metrics.centre_box(records)}
    report_page.write_page(file, rows, cases, [(EVIL, run), ("none", tmp_path)], records, summary)
    return file.read_text(encoding="utf-8")


def test_hostile_texts_stay_texts(page: str) -> None:
    tags = Tags(page)
    ours = ("html head meta title style body h1 h2 h3 h4 p div table tr th td small figure "
            "figcaption img b br pre svg polyline path text span nav a details summary")
    assert tags.open == []
    assert tags.seen <= set(ours.split())
    for name, value in tags.attributes:
        assert not name.startswith("on")
        if name == "href":
            assert ("id", value.removeprefix("#")) in tags.attributes
        if name == "src":
            assert value.startswith("data:image/jpeg;base64,")
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert not re.search(r"url\(|@import|https?://", page.replace("http://x/y", ""))


def test_the_page_shows_every_part(page: str) -> None:
    for words in (
            "20 records; 1,234 more are refused (&lt;script&gt;", "Scores",
            "in the middle of each image: mIoU 0.0", "Breakdowns", "authors of", "By size",
            "By region", "By distractors", "By train image", "Training: ", "length (tokens)",
            "Groups of rollouts", "Best", "Median", "Worst", "IoU", "no box",
            "width=device-width"):
        assert words in page, words
    # Terms of the reward, their deviations, dispersion, length, KL; no loss, no validation.
    assert page.count("<svg") == 5
    # The group of another data set's r0 is not shown.
    shown = [int(step) for step in re.findall(r"<b>step (\d+)</b>", page)]
    assert shown[0] == 1 and shown[-1] == 29 and len(shown) == 4
    # Seven curves of rewards, seven of deviations and three more: none is left out.
    assert page.count("<polyline") == 17
    assert page.count("stroke-dasharray") == 2
    assert "nan" not in page.lower().split("<svg", 1)[1].split("</svg>")[0]


@pytest.fixture
def stages_page(tmp_path: Path) -> str:
    """A page of two stages with logs: the base answers no box, rft answers."""
    records = make_records(tmp_path, 20)
    predictions = make_predictions(records)
    silent = [prediction | {"text": "no"} for prediction in predictions]
    rows = [make_row(records, silent, "base"), make_row(records, predictions, "rft")]
    cases = [make_cases(records, silent), make_cases(records, predictions)]
    stages = []
    for name in ("base", "rft"):
        write_logs(tmp_path / name)
        stages.append((name, tmp_path / name))
    report_page.write_page(tmp_path / "report.html", rows, cases, stages, records)
    return (tmp_path / "report.html").read_text(encoding="utf-8")


def test_the_page_opens_on_the_last_stage(stages_page: str) -> None:
    first, *_ = re.findall(r"<p><b>(\w+) ?T?=?0?</b>: mIoU (\d\.\d+)", stages_page)
    assert first[0] == "rft" and float(first[1]) > 0
    titles = re.findall(r"<details( open)?><summary><h2>(.*?)</h2></summary>", stages_page)
    assert titles == [(" open", "Scores"), (" open", "rft"), ("", "base"), ("", "Breakdowns")]
    # A stage's cases come before its training, under the same heading.
    of_rft = stages_page.split('<div id="s1">', 1)[1].split("<h2", 1)[0]
    parts = re.findall(r"<h3>(\w+).*?: (\w+)", of_rft)
    assert parts == [("Cases", "rft"), ("Training", "rft"), ("Groups", "rft")]


def test_a_stage_that_answers_no_box_is_not_shown_at_length(stages_page: str) -> None:
    of_base = stages_page.split('<div id="s2">', 1)[1].split("<h3>Training", 1)[0]
    assert "No answer has a box" in of_base and of_base.count("<img") == report_page.BOXLESS
    assert "Best" not in of_base


def test_the_contents_lead_to_every_section(stages_page: str) -> None:
    nav = re.search(r"<nav>(.*?)</nav>", stages_page)[1]
    links = re.findall(r'<a href="#(s\d)">(.*?)</a>', nav)
    # The anchor lies within what is folded, so a browser opens that to show it.
    sections = re.findall(
        r'<summary><h2>([^<]*)</h2></summary><div id="(s\d)">', stages_page)
    assert links == [(anchor, title) for title, anchor in sections] and len(links) == 4
    assert stages_page.index("<nav>") < stages_page.index("<h2")


def test_a_narrow_screen_scrolls_tables_in_their_boxes(stages_page: str) -> None:
    """Every table has a box that scrolls, other wide parts wrap or shrink, and no fixed width is
    larger than the narrowest phone.
    """
    assert stages_page.count("<table>") == stages_page.count("<div class=wide><table>") > 3
    assert ".wide{overflow-x:auto;max-width:100%}" in report_page.STYLE
    assert "h1,h2,h3,p,nav{overflow-wrap:anywhere}" in report_page.STYLE
    # With "anywhere", the narrowest a cell may be is one letter, and it is made that narrow.
    cells = re.search(r"td:first-child,th:first-child{([^}]*)}", report_page.STYLE)[1]
    assert "min-width:7em" in cells and "overflow-wrap:break-word" in cells
    assert "img,svg{max-width:100%" in report_page.STYLE
    assert "pre{white-space:pre-wrap" in report_page.STYLE
    without_limits = re.sub(r"max-width:\d+px|min\(\d+px,100%\)", "", report_page.STYLE)
    widths = [int(width) for width in re.findall(r"width:(\d+)px", without_limits)]
    assert all(width <= 360 - 2 * 12 for width in widths)


def test_200_pictures_of_noise_stay_under_5_mb(tmp_path: Path) -> None:
    records = make_records(tmp_path, 24, noise=True)
    predictions = make_predictions(records)
    rows = [make_row(records, predictions, f"stage {i}") for i in range(12)]
    cases = [make_cases(records, predictions)] * len(rows)
    report_page.write_page(tmp_path / "report.html", rows, cases, [], records)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert 170 <= page.count("<img") <= report_page.PICTURES
    assert len(page.encode()) < 5e6
    jpeg = base64.b64decode(re.search(r"base64,([^\"]+)", page)[1])
    picture = Image.open(io.BytesIO(jpeg))
    assert picture.format == "JPEG" and picture.width > 150


def test_texts_that_swell_in_html_and_a_thousand_categories_stay_under_5_mb(
        tmp_path: Path) -> None:
    """A quote takes six letters; a breakdown lists the categories with the most records."""
    quotes = len(report_page.safe('"' * 5_000))
    assert quotes <= 2 * report_page.LETTERS < len(report_page.safe("ab" * 600)) * 3
    values = {}
    for i in range(1_000):
        values[f"category {i} " + "x" * 2_000] = {"n": i, "mIoU": 0.5, "Pr@0.5": 0.5}
    records = make_records(tmp_path, 4)
    row = make_row(records, make_predictions(records)) | {"breakdowns": {"category": values}}
    report_page.write_page(tmp_path / "report.html", [row], [[]], [], records)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    section = page.split("<h2>Breakdowns</h2>", 1)[1]
    assert len(section) < 50_000
    assert "category 999 " in section and "category 10 " not in section
    assert "940 more" in section


def test_cases_are_best_worst_and_median_and_none_twice(tmp_path: Path) -> None:
    records = make_records(tmp_path, 5)
    cases = []
    for record, iou in zip(records, (0.3, 0.9, 0.1, 0.5, 0.7)):
        cases.append(report_page.Case(record, record.box, iou, ""))
    row = {"stage": "sft", "temperature": 0.0, "blind": False}
    shown = re.findall(r"<h4>(\w+)</h4>|IoU (0\.\d)", report_page.case_section(row, cases, 1))
    assert [title or iou for title, iou in shown] == [
        "Best", "0.9", "Worst", "0.1", "Median", "0.5"]
    ious = re.findall(r"IoU (0\.\d)", report_page.case_section(row, cases, 6))
    assert sorted(ious) == ["0.1", "0.3", "0.5", "0.7", "0.9"]
    assert report_page.case_section(row, cases, 0) == ""


def test_rollouts_are_vermillion_to_yellow_and_the_target_is_sky_blue() -> None:
    """The worst box and the best in their colours, the target drawn last; nothing for no box."""
    image = Image.new("RGB", (100, 100))
    boxes = [[10.0, 10.0, 30.0, 30.0], None, [50.0, 50.0, 90.0, 90.0], [2.0, 2.0, 9.0, 9.0]]
    target = (40.0, 10.0, 60.0, 30.0)
    blue, vermillion, yellow = (86, 180, 233), (213, 94, 0), (240, 228, 66)
    # Half way: (213 + 240) / 2, (94 + 228) / 2, (0 + 66) / 2.
    middle = (226, 161, 33)
    expected = pictures.draw_boxes(
        image, [(boxes[0], vermillion), (boxes[2], yellow), (boxes[3], middle), (target, blue)],
        "a ship", legend=(
            ("target", blue), ("reward 0.00", vermillion), ("to 2.00", yellow)))
    for no_box in (None, [float("nan")] * 4):
        boxes[1] = no_box
        drawn = pictures.draw_rollouts(image, boxes, [0.0, 0.2, 2.0, 1.0], target, "a ship")
        assert drawn.tobytes() == expected.tobytes()


def test_the_legend_is_in_the_picture_and_lines_have_a_dark_edge() -> None:
    """Colours of Okabe and Ito's palette, in hexadecimal as published."""
    palette = ["56b4e9", "d55e00", "f0e442"]
    assert [bytes(colour).hex() for colour in (pictures.TARGET, pictures.ANSWER, pictures.BEST)] \
        == palette
    published = "e69f00 56b4e9 009e73 f0e442 0072b2 d55e00 cc79a7".split()
    assert {colour.removeprefix("#") for colour in pictures.CURVE_COLOURS} < set(published)
    image = Image.new("RGB", (200, 100), pictures.TARGET)
    picture = np.asarray(pictures.draw_boxes(
        image, [((20, 30, 120, 80), pictures.TARGET)], width=200, legend=pictures.LEGEND))
    assert picture.shape == (122, 200, 3)
    # From the outside of the left side inwards: image, edge, two pixels of the line, edge.
    row = ["".join(f"{v:02x}" for v in pixel) for pixel in picture[50, 18:24]]
    assert row == ["56b4e9", "000000", "56b4e9", "56b4e9", "000000", "56b4e9"]
    below = {bytes(pixel).hex() for pixel in picture[100:].reshape(-1, 3)}
    assert {"56b4e9", "d55e00", "000000"} <= below


def test_a_curve_has_axes_with_numbers_and_its_unit() -> None:
    points = [(5, 30.0), (10, 40.0), (25, 60.0)]
    drawn = pictures.curve("length (tokens)", [("length", points)], {5: 0.0, 25: 1.25})
    assert "<figcaption><b>length (tokens)</b>" in drawn
    # Lowest, middle and highest value; the first step, the one nearest to the middle, the last;
    # the hours of steps of which they are known.
    assert re.findall(r">([^<>]+)</text>", drawn) == [
        "30", "45", "60", "step 5", "0 h", "step 10", "step 25", "1.25 h"]
    # The plot is 240 x 140 from (72, 8): step 10 is a quarter of the way, 40 a third. The longest
    # numbers, such as -0.000123, fit in the 66 on its left: a digit is 0.64 x 11 wide in DejaVu.
    assert 'points="72.0,148.0 132.0,101.3 312.0,8.0"' in drawn
    assert all(len(f"{v:.3g}") * 0.64 * 11 < 66 for v in (-0.000123, -1.23e-05, 0.000123))
    assert pictures.curve("loss", [("loss", [(1, 2.0)])], {}) == ""
    flat = pictures.curve("loss", [("loss", [(1, 2.0), (2, 2.0)])], {})
    assert re.findall(r">([^<>]+)</text>", flat) == ["2", "step 1", "step 2"]
