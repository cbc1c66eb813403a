"""report.py: one safe, small, self-contained page, whatever the texts say."""
import base64
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

import eval as evaluation
import metrics
import report
from data import Record

EVIL = '<script>alert(1)</script><img src=http://x/y onerror=alert(1)>"\' onload="x" &amp; \ud800'
FRAME = {"original": [400, 300], "resized": [400, 300], "convention": "absolute"}


def records(folder, n, noise=False):
    rng = np.random.default_rng(0)
    for i in range(n):
        pixels = rng.integers(0, 256, (300, 400, 3), dtype=np.uint8) if noise else np.full((300, 400, 3), 80, np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return [Record(f"r{i}", folder / f"{i}.png", EVIL, (10.0, 10.0, 110.0, 90.0), EVIL, (400, 300), EVIL) for i in range(n)]


def answers(some):
    """Record i is off by 5 i pixels; every fifth has no box."""
    texts = [f'{EVIL * 40}<answer>{{"bbox_2d": [{x}, 10, {x + 100}, 90]}}</answer>' for x in range(10, 10 + 5 * len(some), 5)]
    texts[::5] = [EVIL] * len(texts[::5])
    return [{"id": r.id, "text": t, "frame": FRAME} for r, t in zip(some, texts)]


def row(some, predictions, name=EVIL):
    return {"stage": name, "temperature": 0.0, "blind": False, "data": EVIL, "split": EVIL, "refused": {EVIL: 1234},
            **evaluation.score(some, predictions), **evaluation.details(some, predictions, "vrsbench", (some[:2], some))}


class Tags(HTMLParser):
    """Every tag and attribute of a page, and whether open tags are closed in order."""
    void = {"meta", "img", "br", "polyline"}

    def __init__(self, page):
        super().__init__()
        self.seen, self.attributes, self.open = set(), [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.seen.add(tag)
        self.attributes += attrs
        if tag not in self.void:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.void:
            assert self.open.pop() == tag


@pytest.fixture
def page(tmp_path):
    """A page of two rows and a stage with logs, all of whose texts are hostile."""
    some = records(tmp_path, 20)
    run = tmp_path / "run"
    run.mkdir()
    lines = [{"step": k, "reward": k / 50, "iou": float("nan") if k == 7 else 0.1, "dispersion": 0.2, "length": 30, "kl": 0.0, EVIL: 1}
             | {f"{name}_group_std": 0.1 for name in ("reward", "iou", "giou", "diou", "center", "format", EVIL)}
             | dict.fromkeys(("giou", "diou", "center", "format"), k / 99) for k in range(1, 500)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines) + '{"step": 50')
    line = {"id": "r0", "expression": EVIL, "boxes": [None, [5.0, 5.0, 60.0, 60.0]], "reward": [0.0, 1.0], "texts": [EVIL, EVIL]}
    foreign = {**line, "step": 999, "expression": "another data set's r0"}
    steps = [*({**line, "step": k} for k in range(1, 30)), foreign]
    (run / "rollouts.jsonl").write_text("".join(json.dumps(x) + "\n" for x in steps))
    predictions = answers(some)
    file = tmp_path / "report.html"
    report.write(file, [row(some, predictions)] * 2, [evaluation.judged(some, predictions)] * 2, [(EVIL, run), ("none", tmp_path)], some,
                 {"centre_box": metrics.centre_box(some)})
    return file.read_text(encoding="utf-8")


def test_hostile_texts_stay_texts(page):
    tags = Tags(page)
    ours = "html head meta title style body h1 h2 h3 p div table tr th td small figure figcaption img b br pre svg polyline text span"
    assert tags.open == [] and tags.seen <= set(ours.split())
    assert not any(name.startswith("on") for name, _ in tags.attributes)
    assert all(value.startswith("data:image/jpeg;base64,") for name, value in tags.attributes if name in ("src", "href"))
    assert "<script" not in page and "&lt;script&gt;alert(1)" in page
    assert not re.search(r"url\(|@import|https?://", page.replace("http://x/y", ""))


def test_the_page_tells_the_whole_story(page):
    for words in ("20 records; 1,234 more are refused (&lt;script&gt;", "Scores", "in the middle of each image: mIoU 0.0",
                  "Breakdowns", "VRSBench", "By size", "By region", "By distractors", "By train image", "Training: ",
                  "step 1 to 499", "Groups of rollouts", "Best", "Median", "Worst", "IoU", "no box", "width=device-width"):
        assert words in page, words
    assert page.count("<svg") == 5         # terms of the reward, their deviations, dispersion, length, KL; no loss, no validation
    shown = [int(step) for step in re.findall(r"<b>step (\d+)</b>", page)]
    assert shown[0] == 1 and shown[-1] == 29 and len(shown) == 4         # a record of the same id in other data is another
    # Seven of the reward's curve, seven of the deviations' and three more: none vanishes, however many there are.
    assert page.count("<polyline") == 17 and page.count("stroke-dasharray") == 2
    assert "nan" not in page.lower().split("<svg", 1)[1].split("</svg>")[0]


def test_200_pictures_of_noise_stay_under_5_mb(tmp_path):
    some = records(tmp_path, 24, noise=True)
    predictions = answers(some)
    rows = [row(some, predictions, f"stage {i}") for i in range(12)]
    report.write(tmp_path / "report.html", rows, [evaluation.judged(some, predictions)] * len(rows), [], some)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert 170 <= page.count("<img") <= report.PICTURES and len(page.encode()) < 5e6
    picture = Image.open(io.BytesIO(base64.b64decode(re.search(r"base64,([^\"]+)", page)[1])))
    assert picture.format == "JPEG" and picture.width > 150


def test_texts_that_swell_in_html_and_a_thousand_categories_stay_under_5_mb():
    """Quotes take six letters each in HTML; a breakdown lists the categories of the most records."""
    assert len(report.text('"' * 5_000)) <= 2 * report.LETTERS < len(report.text("ab" * 600)) * 3
    values = {f"category {i} " + "x" * 2_000: {"n": i, "mIoU": 0.5, "Pr@0.5": 0.5} for i in range(1_000)}
    row = {"stage": "sft", "temperature": 0.0, "blind": False, "breakdowns": {"category": values}}
    table = report.breakdowns([row])
    assert len(table) < 50_000 and "category 999 " in table and "category 10 " not in table and "940 more" in table


def test_cases_are_best_median_worst_and_none_twice():
    cases = [(None, None, iou / 10, "") for iou in (3, 9, 1, 5, 7)]
    assert {title: [c[2] for c in some] for title, some in report.choose(cases, 1)} == {"Best": [0.9], "Median": [0.5], "Worst": [0.1]}
    assert sorted(c[2] for _, some in report.choose(cases, 6) for c in some) == [0.1, 0.3, 0.5, 0.7, 0.9]
