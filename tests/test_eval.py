"""eval.py: metrics by hand and by counting pixels; the whole script on a fake model whose answers are known."""
import json
import math
import os
import random
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import data
import eval as evaluation
import metrics
import pictures
from answer import format_box, locate
from data import DataError, Record, Records
from model import CheckpointError
from processor import Frame, prompt_hash, smart_resize, to_model_frame

NAN = [math.nan] * 4
HERE = Path(__file__).parents[1]


# ------------------------------------------------------------------------------------------------------------------ metrics

def test_metrics_by_hand():
    """Four targets of 10 x 10 in an image of 100 x 200: hit, half, touched, missed.

    IoU 1; 5 x 10 of 10 x 10, exactly 0.5, which is not above 0.5; 10 x 10 shifted by 2, 80 of 120; no box.
    cIoU (100 + 50 + 80 + 0) / (100 + 100 + 120 + 100). Centres are off by 0, 2.5 and 2 px of 100, over sqrt(2)."""
    gt = torch.tensor([[10.0, 10, 20, 20]] * 4)
    pred = torch.tensor([[10.0, 10, 20, 20], [10, 10, 15, 20], [12, 10, 22, 20], NAN])
    got = metrics.metrics(pred, gt, torch.tensor([[100.0, 200.0]] * 4))
    want = {"mIoU": (1 + 0.5 + 2 / 3) / 4, "Pr@0.5": 0.5, "Pr@0.6": 0.5, "Pr@0.7": 0.25, "Pr@0.8": 0.25, "Pr@0.9": 0.25, "cIoU": 230 / 420,
            "center_error": (0 + 0.025 + 0.02) / 3 / math.sqrt(2), "n": 4}
    assert got == pytest.approx(want) and list(got) == list(want)


def test_a_guess_in_the_middle_by_hand():
    """Median width 20% and height 30% of the image: of the three targets one is just that box, one touches nothing of it."""
    some = [data.Record(str(i), None, "x", box, "", (200, 100)) for i, box in enumerate(
        [(80.0, 35.0, 120.0, 65.0), (0.0, 0.0, 40.0, 30.0), (60.0, 35.0, 140.0, 65.0)])]
    guess = metrics.centre_box(some)
    assert guess["mIoU"] == pytest.approx((1 + 0 + 0.5) / 3) and guess["Pr@0.5"] == pytest.approx(1 / 3) and guess["n"] == 3


def test_boxes_are_clamped_before_they_are_compared():
    pred = torch.tensor([[-1e30, -5, 10, 10], [90, 90, math.inf, 300], [150, 10, 160, 20], [30, 30, 20, 40]])
    gt = torch.tensor([[0.0, 0, 10, 10], [90, 90, 130, 100], [90, 10, 100, 20], [20, 30, 30, 40]])
    got = metrics.metrics(pred, gt, torch.tensor([[100.0, 100.0]] * 4))
    assert got["Pr@0.9"] == 0.5 and got["mIoU"] == 0.5 and got["cIoU"] == 0.5 and got["center_error"] == 0      # 100 + 100 of 4 x 100


def test_nothing_but_misses():
    got = metrics.metrics(torch.tensor([NAN, NAN]), torch.tensor([[1.0, 1, 9, 9]] * 2), torch.tensor([[10, 10]] * 2))
    assert got["mIoU"] == got["cIoU"] == got["Pr@0.5"] == 0 and got["center_error"] is None and got["n"] == 2


def test_metrics_count_pixels():
    rng = np.random.default_rng(0)

    def boxes(n):
        x = np.sort(rng.integers(0, 22, (n, 2, 2)), axis=1)              # corner, axis
        x[:, 1] += 1
        return x.reshape(n, 4).astype(np.float32)
    pred, gt = boxes(2000), boxes(2000)
    pred[::3] = gt[::3] + rng.integers(-1, 2, (len(gt[::3]), 4))
    pred[::50] = np.nan
    shared = covered = 0
    ious = []
    for p, g in zip(pred, gt):
        grid = np.zeros((2, 24, 24), bool)                               # a clamped image of 22 x 24
        for k, b in enumerate((p, g)):
            if not np.isnan(b).any():
                x1, y1, x2, y2 = (int(min(max(v, 0), (22, 24)[i % 2])) for i, v in enumerate(b))
                grid[k, y1:y2, x1:x2] = True
        shared, covered = shared + grid.all(0).sum(), covered + grid.any(0).sum()
        ious.append(grid.all(0).sum() / grid.any(0).sum())
    got = metrics.metrics(torch.tensor(pred), torch.tensor(gt), torch.tensor([[22, 24]] * 2000))
    assert got["mIoU"] == pytest.approx(np.mean(ious), rel=1e-12) and got["cIoU"] == pytest.approx(shared / covered, rel=1e-12)
    for t in (0.5, 0.6, 0.7, 0.8, 0.9):
        assert got[f"Pr@{t}"] == np.mean(np.array(ious) > t) and 0 < got[f"Pr@{t}"] < 1


def test_metrics_equal_brute_force_on_random_pairs():
    """10,000 pairs in plain Python floats: boxes anywhere, some missing, some equal, some exactly at a threshold; > t and >= t."""
    rng = random.Random(0)
    pred, gt, size, ious, areas, away = [], [], [], [], [0.0, 0.0], []
    for i in range(10_000):
        W, H = rng.randint(20, 900), rng.randint(20, 900)
        g = [rng.uniform(0, W * 0.8), rng.uniform(0, H * 0.8)]
        g += [rng.uniform(g[0] + 1, W), rng.uniform(g[1] + 1, H)]
        p = [v + rng.gauss(0, 30) for v in g] if i % 3 else list(g)
        if i % 11 == 0:
            g = [0.0, 0.0, 16.0, 16.0]
            p = [0.0, 0.0, 16.0, 8.0]                                    # exactly 0.5
        p = NAN if i % 13 == 0 else p
        pred.append(p)
        gt.append(g)
        size.append((W, H))
        cut = [min(max(v, 0.0), (W, H)[k % 2]) for k, v in enumerate(p)]
        area_g = (g[2] - g[0]) * (g[3] - g[1])
        if p is NAN or cut[2] <= cut[0] or cut[3] <= cut[1]:
            ious.append(0.0)
            areas[1] += area_g
            continue
        inside = max(0.0, min(cut[2], g[2]) - max(cut[0], g[0])) * max(0.0, min(cut[3], g[3]) - max(cut[1], g[1]))
        union = area_g + (cut[2] - cut[0]) * (cut[3] - cut[1]) - inside
        ious.append(inside / union)
        areas = [areas[0] + inside, areas[1] + union]
        away.append(math.hypot((cut[0] + cut[2] - g[0] - g[2]) / 2 / W, (cut[1] + cut[3] - g[1] - g[3]) / 2 / H) / math.sqrt(2))
    for inclusive in (False, True):
        got = metrics.metrics(*(torch.tensor(x, dtype=torch.float64) for x in (pred, gt, size)), inclusive)
        for t in metrics.THRESHOLDS:
            assert got[f"Pr@{t}"] == sum(v >= t if inclusive else v > t for v in ious) / 10_000
        assert got["mIoU"] == pytest.approx(sum(ious) / 10_000, rel=1e-12) and got["cIoU"] == pytest.approx(areas[0] / areas[1], rel=1e-12)
        assert got["center_error"] == pytest.approx(sum(away) / len(away), rel=1e-12)


def test_vrsbench_takes_the_data_sets_own_cells_where_it_gives_them():
    """The precise box says cells 10 to 20, the file 11 to 21: the file counts."""
    size, pred = torch.tensor([[100.0, 100.0]] * 2), torch.tensor([[11.2, 11.2, 21.2, 21.2]] * 2)
    target, grid = torch.tensor([[10.9, 10.9, 20.9, 20.9]] * 2), torch.tensor([[11.0, 11, 21, 21], NAN])
    assert metrics.vrsbench_iou(pred, target, size, grid).tolist() == pytest.approx([1.0, 100 / (121 + 121 - 100)])


def test_vrsbench_counts_cells():
    """Against sets of cells on the grid, 10,000 pairs; and a target of no area, which the pixel metric can never hit."""
    rng = random.Random(1)
    cells = [[rng.randint(0, 80), rng.randint(0, 80)] for _ in range(10_000)]
    gt = [[x, y, x + rng.randint(0, 9), y + rng.randint(0, 9)] for x, y in cells]
    pred = [[x + rng.randint(-2, 2) if x > 2 else x, y, X + rng.randint(2, 4), Y + rng.randint(0, 2)] for x, y, X, Y in gt]
    size = torch.tensor([[512.0, 512.0]]).repeat(10_000, 1)
    got = metrics.vrsbench_iou(*((torch.tensor(b).double() + 0.5) * 5.12 for b in (pred, gt)), size)      # half a cell in: all whole
    for p, g, value in zip(pred, gt, got.tolist()):
        a, b = ({(x, y) for x in range(q[0], q[2] + 1) for y in range(q[1], q[3] + 1)} for q in (p, g))
        assert value == pytest.approx(len(a & b) / len(a | b), abs=1e-12)
    point = torch.tensor([[100.0, 100, 102, 102], [100, 100, 102, 102], NAN, [100, 100, 150, 150]])          # cells 19, 19 to 19, 19
    target = torch.tensor([[101.0, 101, 101, 101]] * 4)
    target[1] = torch.tensor([200.0, 100, 200, 100])
    assert metrics.vrsbench_iou(point, target, size[:4]).tolist() == [1, 0, 0, pytest.approx(1 / 121)]
    assert metrics.metrics(point[:1], target[:1], size[:1])["Pr@0.5"] == 0
    official = metrics.vrsbench(point, target, size[:4], [True, False, None, False])
    assert official == {"all": {"n": 4, "Acc@0.5": 0.25, "Acc@0.7": 0.25}, "unique": {"n": 1, "Acc@0.5": 1.0, "Acc@0.7": 1.0},
                        "non_unique": {"n": 2, "Acc@0.5": 0.0, "Acc@0.7": 0.0}}


def test_vrsbench_cells_survive_their_way_through_pixels():
    """An answer in thousandths that begins at a cell's very edge is of that cell, on every side length; a line is a box there."""
    for side in (512, 640, 700, 1024):
        target = Record("0", "a.png", "", (0.29 * side, 0.29 * side, 0.57 * side, 0.58 * side), "ship", (side, side), grid=(29, 29, 57, 58))
        frame = {"original": [side, side], "resized": [side, side], "convention": "1000"}
        for told, grid, official, missed in (([290, 290, 570, 580], (29, 29, 57, 58), 1.0, False),
                                             ([290, 290, 290, 580], (29, 29, 29, 58), 1.0, True),
                                             ([570, 290, 290, 580], (29, 29, 29, 58), 0.0, True)):
            text = f'<think>a</think><answer>{{"bbox_2d": {told}}}</answer>'
            record, said = replace(target, grid=grid), [{"id": "0", "text": text, "frame": frame}]
            assert evaluation.details([record], said, "vrsbench", (None, [record]))["vrsbench"]["all"]["Acc@0.7"] == official
            assert (evaluation.score([record], said)["failures"]["no area"] == 1) == missed


def on_images(images, boxes=None):
    """Records of 10 x 10 targets in 100 x 100 images of these names."""
    return [Record(str(i), image, "", boxes[i] if boxes else (0.0, 0.0, 10.0, 10.0), "ship", (100, 100)) for i, image in enumerate(images)]


def test_intervals_resample_images():
    """100 images, half of them right: the interval is the binomial's. Ten copies of every record in its image tell nothing new."""
    right = torch.tensor([1.0, 0.0] * 50)
    [low, high] = metrics.intervals(on_images(range(100)), {"x": (right, None)})["x"]
    assert low == pytest.approx(0.5 - 1.96 * 0.05, abs=0.02) and high == pytest.approx(0.5 + 1.96 * 0.05, abs=0.02)
    copies = metrics.intervals(on_images([i for i in range(100) for _ in range(10)]), {"x": (right.repeat_interleave(10), None)})["x"]
    assert copies == pytest.approx([low, high])
    apart = metrics.intervals(on_images(range(1000)), {"x": (right.repeat_interleave(10), None)})["x"]
    assert apart[1] - apart[0] < (high - low) / 2
    sure = metrics.intervals(on_images(range(9)), {"x": (torch.full((9,), 2.0), torch.full((9,), 4.0))})["x"]
    assert sure == [0.5, 0.5]


def test_paired_test():
    """B adds 10 hits in 200 of A's: p far below 0.05, while the two intervals overlap. A against itself: p 1."""
    records = on_images(range(200))
    whole, none = {"box": [0.0, 0.0, 10.0, 10.0]}, {"box": None}
    a = [whole if i % 2 else none for i in range(200)]
    b = [whole if i < 20 else p for i, p in enumerate(a)]

    def paired(*sides):
        return metrics.paired(records, *(evaluation.overlap_of(records, side) for side in sides))
    got = paired(a, b)["Pr@0.5"]
    assert got["difference"] == pytest.approx(0.05) and got["p"] < 0.01 and got["ci"][0] > 0
    assert paired(b, a)["mIoU"]["difference"] == pytest.approx(-0.05)
    same = paired(a, a)["mIoU"]
    assert same == {"difference": 0, "ci": [0, 0], "p": 1}
    even = paired([whole, none] * 100, [none, whole] * 100)["mIoU"]
    assert even["p"] > 0.2


def test_properties_by_hand():
    """Three ships in one image (one box named twice), a plane alone in another that train has too."""
    boxes = [(0.0, 0.0, 10.0, 10.0), (0.0, 0.0, 10.0, 10.0), (40.0, 40.0, 90.0, 90.0), (90.0, 0.0, 100.0, 100.0), (0.0, 0.0, 97.0, 97.0)]
    records = on_images(["a", "a", "a", "a", "b"], boxes)
    records[4] = replace(records[4], category="plane", kind="relation")
    got = metrics.properties(records, [replace(records[4], category="ship", image="b")], records)
    assert got["size"] == ["small", "small", "medium", "small", "large"]
    assert got["region"] == ["top left", "top left", "middle centre", "middle right", "middle centre"]
    assert got["distractors"] == ["2", "2", "2", "2", "0"] and got["kind"] == [None] * 4 + ["relation"]
    assert got["train image"] == ["disjoint"] * 4 + ["also in train"] and got["train category"] == ["seen"] * 4 + ["unseen"]
    assert set(metrics.properties(records, None, records)["train image"]) == {None}


def test_pass_at_k_by_hand():
    """Of 4 samples 0, 1 and 4 hit: pass@1 is (0 + 1/4 + 1) / 3, pass@2 (0 + 1/2 + 1) / 3, pass@4 2/3. The second scatters."""
    records, frame = on_images("abc"), {"original": [100, 100], "resized": [100, 100], "convention": "absolute"}
    hit, miss = text_of([0, 0, 10, 10]), text_of([80, 0, 90, 10])
    predictions = [{"text": "x", "frame": frame, "samples": ["x"] * 4}, {"text": hit, "frame": frame, "samples": [hit, miss, miss, miss]},
                   {"text": hit, "frame": frame, "samples": [hit] * 4}]
    got = evaluation.details(records, predictions, "tiny", (None, records))
    assert got["pass"] == pytest.approx({"1": 5 / 12, "2": 0.5, "4": 2 / 3}) and got["samples"] == 4
    assert got["dispersion"] == pytest.approx(0.8 * math.sqrt(3 / 16) / 2)                     # the mean of two groups, one of them 0


# ------------------------------------------------------------------------------------------------------- a data set and a model

SIZES = ((800, 800), (640, 360), (100, 300), (500, 800))


def tiny(root, split="test", n=24):
    """n records, two on each image; the images are one colour each and are drawn by `images`."""
    def record(i):
        W, H = SIZES[i // 2 % 4]
        box = (W * (i % 5) / 10, H * (i % 7) / 10, W * (i % 5 + 4) / 10, H * (i % 7 + 3) / 10)
        return Record(f"r{i}", Path(root) / f"{i // 2}.png", f"{i}: {','.join(map(str, box))}", box, "ship", (W, H))
    if split == "train":
        raise DataError("tiny has no train split")
    return Records([record(i) for i in range({"test": n, "empty": 0}[split])], {})


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    for record in tiny(folder):
        Image.new("RGB", record.size, (int(record.image.stem) * 10, 0, 0)).save(record.image)
    return folder


class FakeProcessor:
    """A prompt that remembers its expression and the colour of its image; the resized image has sides that are multiples of 28."""
    patch, merge, min_pixels, max_pixels = 14, 2, 56 * 56, 28 * 28 * 1280

    def __call__(self, image, text):
        resized = smart_resize(*image.size, 28, self.min_pixels, self.max_pixels)
        return SimpleNamespace(text=text, colour=image.getpixel((0, 0))[0], frame=Frame(image.size, resized, "absolute"))

    def decode(self, ids):
        return "".join(map(chr, ids))


def fake_generate(model, prompts, group, max_new_tokens, temperature, seeds):
    """Knows the truth; record i answers in style i % 6. At a temperature the box is off as the seed says; blind, it is a guess."""
    assert len(prompts) == len(seeds)
    texts = []
    for prompt, seed in ((p, s + g) for p, s in zip(prompts, seeds.tolist()) for g in range(group)):
        i, box = prompt.text.split(": ")
        box = to_model_frame([float(v) for v in box.split(",")], prompt.frame)
        seen = int(i) // 2 * 10 == prompt.colour
        x1, y1, x2, y2 = [round(v) + (seed * 7 % 30 if temperature else 0) for v in box] if seen else (0, 0, 28, 28)
        texts.append({0: f'<think>a</think><answer>{{"bbox_2d": [{x1}, {y1}, {x2}, {y2}]}}</answer>',
                      1: f'<answer>{{"bbox_2d": [{x1 + 4}, {y1 + 4}, {x2 + 4}, {y2 + 4}]}}</answer>',
                      2: "I can't see it \ud800",
                      3: f'```json\n[{{"bbox_2d": [{x1}, {y1}, {x2}, {y2}], "label": "ship"}}]\n```',
                      4: '<answer>{"bbox_2d": [1, 2, 3, NaN]}</answer>',
                      5: '<answer>{"bbox_2d": [90000, 2, 90001, 4]}</answer>'}[int(i) % 6])
    longest = max(map(len, texts))
    tokens = torch.tensor([[*map(ord, t), *[0] * (longest - len(t))] for t in texts]).view(len(prompts), group, longest)
    return tokens, torch.zeros(tokens.shape), torch.tensor([len(t) for t in texts]).view(len(prompts), group)


def install(replace):
    """The fakes, by `setattr` or monkeypatch's."""
    replace(evaluation, "generate", fake_generate)
    replace(evaluation.runtime, "open_checkpoint", lambda folder, device: (None, FakeProcessor()))
    replace(evaluation, "Processor", SimpleNamespace(from_pretrained=lambda folder: FakeProcessor()))
    replace(data, "READERS", {**data.READERS, "tiny": tiny})


@pytest.fixture
def fakes(monkeypatch):
    install(monkeypatch.setattr)
    return lambda *flags: (monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, flags)]), evaluation.main())


def stage(folder, root, step=10):
    """A stage's folder as training leaves it, without weights."""
    here = folder / f"step_{step:06d}"
    here.mkdir(parents=True)
    (here / "config.json").write_text("{}")
    (here / "run.json").write_text(json.dumps({"stage": folder.name, "data": "tiny", "root": str(root), "prompt_hash": prompt_hash()}))
    (folder / "latest").symlink_to(here.name)


def rows(folder):
    return json.loads((folder / "eval.json").read_text())["rows"]


# ------------------------------------------------------------------------------------------------------------------ a model's answers

def test_answers_come_in_record_order_and_in_original_pixels(root, fakes):
    records = tiny(root)
    answers = evaluation.evaluate(None, FakeProcessor(), records, batch=5)
    assert [a["id"] for a in answers] == [r.id for r in records]
    for i, (answer, record) in enumerate(zip(answers, records)):
        if i % 6 == 0:                                                   # whole pixels of the resized image: half a pixel off at most
            assert answer["box"] == pytest.approx(record.box, abs=0.51 * max(record.size) / min(answer["frame"]["resized"]))
        assert (answer["box"] is not None) == (i % 6 in (0, 1))
    assert answers == evaluation.evaluate(None, FakeProcessor(), records, batch=24)
    sampled = [evaluation.evaluate(None, FakeProcessor(), records, batch=b, temperature=1.0, seed=s) for b, s in ((5, 0), (24, 0), (24, 1))]
    assert sampled[0] == sampled[1] != answers and sampled[1] != sampled[2]


def test_locate_by_hand():
    frame = Frame((800, 400), (812, 420), "absolute")                    # 812 / 800 = 1.015, 420 / 400 = 1.05
    assert locate((406.0, 105.0, 900.0, 900.0), frame) == pytest.approx((400, 100, 800, 400))
    assert locate((250.0, 250.0, 500.0, 500.0), Frame((800, 400), (812, 420), "1000")) == pytest.approx((200, 100, 400, 200))
    assert locate((812.0, 0.0, 900.0, 9.0), frame) is locate(None, frame) is None


def test_score_by_hand(root, fakes):
    """Of 24 records a sixth each is: right, off by 4 px, wordless, fenced JSON, not JSON, outside the image."""
    records = tiny(root)
    answers = evaluation.evaluate(None, FakeProcessor(), records)
    got = evaluation.score(records, answers)
    assert {why: n for why, n in got["failures"].items() if n} == {"no answer": 8, "not JSON": 4, "outside image": 4}
    assert tuple(got["failures"]) == evaluation.OUTCOMES and got["n"] == got["lenient"]["n"] == 24
    assert 4 / 24 <= got["Pr@0.9"] <= got["Pr@0.5"] <= 8 / 24
    assert got["lenient"]["mIoU"] > got["mIoU"] + 3.9 / 24               # the fenced ones, nearly perfect
    target, size = torch.tensor([r.box for r in records]), torch.tensor([r.size for r in records])
    boxes = torch.tensor([a["box"] or NAN for a in answers])
    again = metrics.metrics(boxes, target, size)
    assert {k: got[k] for k in again} == pytest.approx(again, abs=1e-6)


def test_blind_shows_another_image_in_the_same_frame(root, fakes):
    records = tiny(root)
    others = evaluation.strangers(records)
    assert all(a.image != b.image for a, b in zip(records, others))
    assert len({o.image for o in others}) == 12
    seen, blind = (evaluation.evaluate(None, FakeProcessor(), records, blind=b) for b in (False, True))
    assert [a["frame"] for a in seen] == [a["frame"] for a in blind]
    assert evaluation.score(records, blind)["Pr@0.5"] == 0 < evaluation.score(records, seen)["Pr@0.5"]
    with pytest.raises(DataError, match="at least two images"):
        evaluation.strangers(records[:2])


def test_every_stage_side_by_side(root, fakes, tmp_path, capfd):
    for name in ("rft", "sft", "ablation"):
        stage(tmp_path / name, root)
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")                 # a downloaded folder: no run.json
    (tmp_path / "notes").mkdir()
    for _ in range(2):                                                   # the second run writes over the first's report
        fakes(tmp_path, "--temperature", 0, 1, "--device", "cpu")
    got = rows(tmp_path / "eval")
    assert [(r["stage"], r["temperature"]) for r in got] == [(s, t) for s in ("base", "sft", "rft", "ablation") for t in (0, 1)]
    assert got[2]["checkpoint"] == str(tmp_path / "sft" / "step_000010") and got[0]["data"] == "tiny" and got[0]["split"] == "test"
    assert got[0]["mIoU"] > got[1]["mIoU"] > 0 and got[0]["mIoU"] == got[2]["mIoU"]
    table = capfd.readouterr().out
    assert re.search(rf"rft +0 +24 +{got[4]['mIoU']:.3f} +{got[4]['Pr@0.5']:.3f}", table) and "rft T=1: no answer 8" in table
    for name in ("predictions_sft.jsonl", "predictions_sft_T1.jsonl", "overlays_sft.png", "overlays_base_T1.png"):
        assert (tmp_path / "eval" / name).stat().st_size > 0
    assert json.loads((tmp_path / "eval" / "predictions_sft.jsonl").read_text().split("\n")[2])["text"] == "I can't see it \ud800"


def test_samples_and_comparison_through_the_script(root, fakes, tmp_path, capfd):
    """Rows, a line of samples read back, the same numbers from the file; two files compared."""
    stage(tmp_path / "sft", root)
    fakes(tmp_path, "--temperature", 0, 1, "--samples", 4, "--device", "cpu")
    greedy, warm = rows(tmp_path / "eval")
    assert "pass" not in greedy and set(warm["pass"]) == {"1", "2", "4"} and 0 < warm["pass"]["1"] <= warm["pass"]["4"]
    low, high = warm["ci"]["mIoU"]
    assert low < warm["mIoU"] < high and sum(part["n"] for part in warm["breakdowns"]["size"].values()) == 24
    a, b = (tmp_path / "eval" / f"predictions_sft{t}.jsonl" for t in ("", "_T1"))
    fakes("--compare", a, b, "--data", "tiny", "--root", root, "--out", tmp_path / "both")
    told = {"stage", "checkpoint", "temperature"}
    for before, after in zip((greedy, warm), rows(tmp_path / "both")):
        assert {k: v for k, v in before.items() if k not in told} == {k: v for k, v in after.items() if k not in told}
    test = json.loads((tmp_path / "both" / "eval.json").read_text())["comparison"]
    assert test["mIoU"]["difference"] == pytest.approx(warm["mIoU"] - greedy["mIoU"]) and "B - A: mIoU -" in capfd.readouterr().out
    assert f"{test['mIoU']['difference']:+.3f} <small>" in (tmp_path / "both" / "report.html").read_text()


@pytest.mark.parametrize("which, name", [("sft", "sft"), ("sft/step_000020", "sft_step_000020"), ("sft/step_000010", "sft_step_000010")])
def test_one_stage_or_step(root, fakes, tmp_path, which, name):
    stage(tmp_path / "sft", root)
    (tmp_path / "sft" / "latest").unlink()
    stage(tmp_path / "sft", root, step=20)
    fakes(tmp_path / which, "--out", tmp_path / "report", "--limit", 5, "--device", "cpu")
    [row] = rows(tmp_path / "report")
    assert row["stage"] == name and row["n"] == 5
    assert row["checkpoint"] == str(tmp_path / ("sft/step_000020" if which == "sft" else which))


# ------------------------------------------------------------------------------------------------------------------ anyone's answers

@pytest.fixture
def own(root, fakes, tmp_path):
    """A report of our own on the tiny data set: its folder, and the script."""
    stage(tmp_path / "sft", root)
    fakes(tmp_path, "--temperature", 0, 1, "--device", "cpu")
    return tmp_path / "eval", lambda file, *more: fakes("--predictions", file, "--data", "tiny", "--root", root, *more)


@pytest.mark.parametrize("k, name", [(0, "predictions_sft"), (1, "predictions_sft_T1")])
def test_rescoring_our_own_predictions_gives_the_same_numbers(own, k, name):
    folder, rescore = own
    rescore(folder / f"{name}.jsonl")
    [row] = rows(folder / name)
    told = {"stage", "checkpoint", "temperature"}
    assert {k: v for k, v in row.items() if k not in told} == {k: v for k, v in rows(folder)[k].items() if k not in told}
    assert row["stage"] == name.removeprefix("predictions_") and row["temperature"] is None


def test_boxes_alone_give_the_same_strict_numbers(own, tmp_path):
    folder, rescore = own
    lines = [json.loads(line) for line in (folder / "predictions_sft.jsonl").read_text().splitlines()]
    theirs = tmp_path / "theirs.jsonl"
    theirs.write_text("".join(json.dumps({"id": p["id"], "box": p["box"]}) + "\n" for p in reversed(lines)))
    rescore(theirs, "--out", tmp_path / "report")
    [row] = rows(tmp_path / "report")
    assert all(row[key] == rows(folder)[0][key] for key in ("mIoU", "Pr@0.5", "Pr@0.9", "cIoU", "center_error", "n"))
    assert row["lenient"]["mIoU"] == row["mIoU"] and row["failures"]["no answer"] == 16


def test_a_record_without_a_line_is_a_miss(own, tmp_path):
    folder, rescore = own
    kept = (folder / "predictions_sft.jsonl").read_text().splitlines()[:6]
    (tmp_path / "some.jsonl").write_text("\n".join(kept) + "\n\n")
    rescore(tmp_path / "some.jsonl")
    [row] = rows(tmp_path / "some")
    assert row["n"] == 24 and row["failures"]["no prediction"] == 18
    rescore(tmp_path / "some.jsonl", "--limit", 6)
    assert rows(tmp_path / "some")[0]["mIoU"] == pytest.approx(row["mIoU"] * 4)


@pytest.fixture
def poor(tmp_path):
    """Four records of one's own with whole numbers for ids; three images are not there. A perfect predictions file of the fourth."""
    rows = [{"id": i, "image": f"{i}.png", "text": "the ship", "box": [1, 2, 30, 40]} for i in range(4)]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Image.new("RGB", (50, 50)).save(tmp_path / "2.png")
    (tmp_path / "p").mkdir()
    file = tmp_path / "p" / "theirs.jsonl"
    file.write_text(json.dumps({"id": 2, "box": [1, 2, 30, 40]}))
    return tmp_path, file


def test_refused_records_are_said_wherever_scores_are(poor, fakes, capfd):
    folder, file = poor
    fakes("--predictions", file, "--data", "jsonl", "--root", folder)
    [row] = rows(folder / "p" / "theirs")
    assert (row["n"], row["mIoU"], row["refused"]) == (1, 1.0, {"missing image": 3})
    says = f"3 of 4 records are refused (missing image: 3); python data.py jsonl --root {folder} --split test says where"
    assert f"\nnot scored: {says}\n" in capfd.readouterr().out
    assert "1 records; 3 more are refused (missing image: 3) and not scored" in (folder / "p" / "theirs" / "report.html").read_text()
    file.write_text(json.dumps({"id": 3, "box": None}))                  # a record's, but refused
    with pytest.raises(DataError, match=r"line 1: no record .* the id '3'; .* it may be one of those refused \(missing image: 3\)"):
        fakes("--predictions", file, "--data", "jsonl", "--root", folder)
    (folder / "2.png").unlink()
    with pytest.raises(DataError, match="no usable record in the split test of jsonl: 4 of 4 .*missing image: 4.* says where") as error:
        fakes("--predictions", file, "--data", "jsonl", "--root", folder)
    assert "\n" not in str(error.value)


def text_of(box):
    return f'<answer>{{"bbox_2d": {list(box)}}}</answer>'


@pytest.mark.parametrize("where, iou_unscaled", [((390, 390, 410, 410), 0.327), ((780, 780, 800, 800), 0.172)])
def test_a_perfect_answer_in_the_resized_frame_is_perfect(monkeypatch, fakes, tmp_path, where, iou_unscaled):
    """800 -> 812 px, the trap that others fell into: read without rescaling, a 20 px object drops to 0.33 in the centre, and to 0.17 in the
    far corner (0.09 where boxes are not clamped)."""
    record = Record("a", tmp_path / "a.png", "a dot", tuple(map(float, where)), "dot", (800, 800))
    Image.new("RGB", (800, 800)).save(record.image)
    monkeypatch.setitem(data.READERS, "dot", lambda root, split: Records([record], {}))
    (tmp_path / "ckpt").mkdir()
    (tmp_path / "ckpt" / "config.json").write_text("{}")
    frame = Frame((800, 800), (812, 812), "absolute")
    resized = to_model_frame(where, frame)

    def miou(line, *flags):
        (tmp_path / "p.jsonl").write_text(json.dumps({"id": "a", **line}))
        fakes("--predictions", tmp_path / "p.jsonl", "--data", "dot", *flags)
        return rows(tmp_path / "p")[0]["mIoU"]
    text = {"text": text_of(resized)}
    assert miou({**text, "frame": {"original": [800, 800], "resized": [812, 812], "convention": "absolute"}}) == pytest.approx(1)
    assert miou(text, tmp_path / "ckpt", "--coords", "resized") == pytest.approx(1)
    assert miou(text, "--coords", "original") == pytest.approx(iou_unscaled, abs=1e-3)
    assert miou({"text": text_of(where)}, "--coords", "original") == pytest.approx(1)
    assert miou({"text": text_of(v / 0.8 for v in where)}, "--coords", "1000") == pytest.approx(1)
    assert miou({"text": format_box(where, frame).join(('<answer>{"bbox_2d": ', "}</answer>"))},
                tmp_path / "ckpt", "--coords", "resized") > 0.9          # rounded to whole pixels, as a model writes it


FRAME = {"original": [800, 800], "resized": [812, 812], "convention": "absolute"}


@pytest.mark.parametrize("line, says", [
    ({"id": "r0", "text": "x"}, 'line 2: a text without a "frame" needs --coords'),
    ({"id": "nobody", "box": None}, "line 2: no record of this split has the id 'nobody'"),
    ({"id": "r1", "box": None}, "line 2: the id 'r1' comes a second time"),
    ({"id": 1, "box": None}, "line 2: no record of this split has the id '1'"),
    ({"id": True, "box": None}, 'line 2: not a JSON object with an "id"'),
    ({"id": 1.0, "box": None}, 'line 2: not a JSON object with an "id"'),
    (["r0"], 'line 2: not a JSON object with an "id"'),
    ({"id": "r0"}, 'line 2: neither a "text" nor a "box"'),
    ({"id": "r0", "box": [1, 2, 3]}, "line 2: \"box\" is neither four numbers nor null"),
    ({"id": "r0", "box": [1, 2, 3, True]}, "line 2: \"box\" is neither four numbers nor null"),
    ({"id": "r0", "box": [1, 2, 3, 10 ** 400]}, "line 2: int too large"),
    ({"id": "r0", "text": "x", "frame": {**FRAME, "original": [801, 800]}}, "line 2: the frame is of an image of [801, 800]"),
    ({"id": "r0", "text": "x", "frame": {**FRAME, "convention": "xywh"}}, 'line 2: "frame" is not'),
    ({"id": "r0", "text": "x", "frame": {**FRAME, "resized": [0, 812]}}, 'line 2: "frame" is not'),
    ({"id": "r0", "text": "x", "frame": [800, 800]}, 'line 2: "frame" is not'),
    ({"id": "r0", "text": "x", "frame": FRAME, "samples": ["a", 1]}, 'line 2: "samples" is not a list of texts'),
    ("not JSON", "line 2: not a JSON object"),
    (None, "line 2: not a JSON object"),
])
def test_a_line_that_does_not_fit_is_named(root, tmp_path, line, says):
    file = tmp_path / "p.jsonl"
    file.write_text(json.dumps({"id": "r1", "box": None}) + "\n" + json.dumps(line))
    with pytest.raises(DataError) as error:
        evaluation.read_predictions(file, tiny(root))
    assert says in str(error.value) and str(file) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"{", b"\xff", b'{"id": "r0", "box": ' + b"[" * 100_000,
                                     b'{"id": "r0", "box": [1, 2, 3, ' + b"9" * 5000 + b"]}"])
def test_a_broken_file_is_one_line(root, tmp_path, content):
    file = tmp_path / "p.jsonl"
    file.write_bytes(content)
    with pytest.raises(DataError, match="p.jsonl") as error:
        evaluation.read_predictions(file, tiny(root))
    assert "\n" not in str(error.value)
    with pytest.raises(DataError, match="none.jsonl"):
        evaluation.read_predictions(tmp_path / "none.jsonl", tiny(root))


def test_boxes_of_others_may_be_anything():
    record = tiny(".")[0]
    boxes = [0.0, 0.0, 1e300, 9.0], [5.0, 5.0, 4.0, 6.0], NAN, None, [900.0, 0.0, 901.0, 9.0]
    read = [evaluation.read_prediction(p, record) for p in (*({"box": box} for box in boxes), None)]
    assert read[0] == ((0, 0, 800, 9), (0, 0, 800, 9), None)
    assert [why for *_, why in read[1:]] == ["no area", "not four numbers", "no answer", "outside image", "no prediction"]
    assert all(box is lenient is None for box, lenient, _ in read[1:])


# ------------------------------------------------------------------------------------------------------------------ mistakes, pictures

@pytest.mark.parametrize("flags, says", [
    ((), "name a checkpoint's folder"),
    (("ckpt", "--coords", "1000"), "--coords is about a file"),
    (("--predictions", "p.jsonl", "--coords", "resized"), "--coords resized needs a checkpoint"),
    (("--predictions", "p.jsonl", "--blind"), "--blind and --temperature belong to a checkpoint"),
    (("ckpt", "--temperature", "-1"), "numbers from 0 up"),
    (("ckpt", "--temperature", "1", "1"), "each once"),
    (("ckpt", "--limit", "0"), "--limit"),
    (("ckpt", "--wrong"), "--wrong"),
    (("ckpt", "--samples", "4"), "needs a checkpoint and a --temperature above 0"),
    (("--predictions", "p.jsonl", "--compare", "a.jsonl", "b.jsonl"), "name one of them"),
    (("--compare", "a.jsonl"), "--compare"),
    (("ckpt", "--image", "a.png"), "--image and --text go together"),
    (("--image", "a.png", "--text", "a ship", "--predictions", "p.jsonl"), "--image asks one checkpoint once"),
])
def test_a_wrong_flag_is_one_line_and_status_2(fakes, capfd, flags, says):
    with pytest.raises(SystemExit) as stop:
        fakes(*flags)
    error = capfd.readouterr().err
    assert stop.value.code == 2 and says in error and error.count("\n") == 1


def test_missing_checkpoint_and_empty_split(root, fakes, tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint at .*nothing"):
        fakes(tmp_path / "nothing", "--device", "cpu")
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        fakes(tmp_path, "--device", "cpu")
    stage(tmp_path / "sft", root)
    with pytest.raises(DataError, match="no usable record in the split empty of tiny: it is empty"):
        fakes(tmp_path, "--split", "empty", "--device", "cpu")
    assert not (tmp_path / "eval").exists()


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no folder here that even root can't write to")
@pytest.mark.parametrize("more", [(), ("--image", "a.png", "--text", "a ship"), ("--predictions", "p.jsonl")])
def test_a_folder_that_cannot_be_written_to_is_said_before_a_model_is_loaded(root, fakes, tmp_path, monkeypatch, capfd, more):
    stage(tmp_path / "sft", root)
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (100, 100)).save("a.png")
    Path("p.jsonl").write_text(json.dumps({"id": "r0", "box": None}))
    monkeypatch.setattr(evaluation.runtime, "open_checkpoint", None)
    with pytest.raises(SystemExit) as stop:
        fakes(tmp_path, "--device", "cpu", "--out", "/proc/self", *more)
    error = capfd.readouterr().err
    assert stop.value.code == 2 and "/proc/self" in error and error.count("\n") == 1


def test_overlay_draws_on_a_copy(tmp_path):
    image = Image.new("RGB", (200, 100))
    boxes = [((20, 10, 120, 60), "ship \u8239", evaluation.GREEN), ((0, 0, 0.4, 0.4), "", evaluation.RED)]
    drawn = pictures.overlay(image, boxes, tmp_path / "o.png")
    assert image.getpixel((20, 30)) == (0, 0, 0) and drawn.getpixel((20, 30)) == drawn.getpixel((119, 30)) == evaluation.GREEN
    assert drawn.getpixel((121, 30)) == drawn.getpixel((19, 30)) == (0, 0, 0)
    assert Image.open(tmp_path / "o.png").size == (200, 100)


def test_ask_about_a_picture(root, fakes, tmp_path, capfd):
    """Reasoning, the box in the picture's own pixels, an overlay with it; a picture beyond the limit is said to be shrunk."""
    stage(tmp_path / "sft", root)
    picture = tmp_path / "scene.png"
    Image.new("RGB", (2000, 1600)).save(picture)
    fakes(tmp_path, "--image", picture, "--text", "0: 500,400,1000,800", "--device", "cpu", "--out", tmp_path / "asked")
    said = capfd.readouterr().out
    w, h = smart_resize(2000, 1600, 28, FakeProcessor.min_pixels, FakeProcessor.max_pixels)
    assert "2000 x 1600" in said and f"shrunk to {w} x {h}" in said and "<think>a</think>" in said
    box = [float(v) for v in re.search(r"box in pixels of the picture: (.*)", said)[1].split(",")]
    assert box == pytest.approx((500, 400, 1000, 800), abs=2)
    drawn = Image.open(tmp_path / "asked" / "scene_answer.png")
    assert drawn.size == (2000, 1600) and drawn.getpixel((502, 700)) == evaluation.RED
    small = tmp_path / "small.png"
    Image.new("RGB", (100, 100)).save(small)
    fakes(tmp_path, "--image", small, "--text", "2: 1,1,9,9", "--device", "cpu", "--out", tmp_path / "asked")
    said = capfd.readouterr().out
    assert "shrunk" not in said and "no box: no answer" in said and not (tmp_path / "asked" / "small_answer.png").exists()
    exif = Image.Exif()
    exif[0x0112] = 6                                                     # stored lying, shown standing
    lying = tmp_path / "lying.jpg"
    Image.new("RGB", (200, 100)).save(lying, exif=exif)
    fakes(tmp_path, "--image", lying, "--text", "0: 10,20,90,180", "--device", "cpu", "--out", tmp_path / "asked")
    said = capfd.readouterr().out
    box = [float(v) for v in re.search(r"box in pixels of the picture, turned upright as its EXIF says: (.*)", said)[1].split(",")]
    assert box == pytest.approx((10, 20, 90, 180), abs=2) and Image.open(tmp_path / "asked" / "lying_answer.png").size == (100, 200)
    deep = tmp_path / "deep.png"
    Image.fromarray(np.full((90, 90), 2000, np.uint16)).save(deep)
    with pytest.raises(DataError, match="--image .*deep.png: unreadable .16-bit or float image, scale it to 8 bits"):
        fakes(tmp_path, "--image", deep, "--text", "a ship", "--device", "cpu")
    small.write_bytes(b"no picture")
    for missing in (small, tmp_path / "none.png"):
        with pytest.raises(DataError, match="unreadable") as error:
            fakes(tmp_path, "--image", missing, "--text", "a ship", "--device", "cpu")
        assert "\n" not in str(error.value)


def test_the_real_script_with_a_random_model(run, tiny_checkpoint, dior_root, tmp_path):
    """Samples, report and question with a real checkpoint; a user's mistake is one line and status 2."""
    done = run("eval.py", tiny_checkpoint, "--data", "dior", "--root", dior_root, "--temperature", 1, "--samples", 3, "--max-new-tokens", 6,
               "--limit", 3, "--device", "cpu", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    [row] = rows(tmp_path)
    assert row["samples"] == 3 and row["breakdowns"]["train image"]["also in train"]["n"] == 3
    assert (tmp_path / "report.html").read_text().count("<img") == 3
    Image.new("RGB", (600, 500)).save(tmp_path / "a.png")
    ask = ("eval.py", tiny_checkpoint, "--text", "a ship", "--max-new-tokens", 6, "--device", "cpu", "--out", tmp_path, "--image")
    done = run(*ask, tmp_path / "a.png")
    assert done.returncode == 0 and "600 x 500" in done.stdout and "shrunk to" in done.stdout and "no box" in done.stdout, done.stderr
    done = run(*ask, tmp_path / "none.png")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "none.png" in done.stderr


# ------------------------------------------------------------------------------------------------------------------ several processes

def test_two_processes_write_the_report_of_one(root, fakes, tmp_path):
    stage(tmp_path / "ckpt" / "sft", root)
    flags = [tmp_path / "ckpt", "--temperature", "0", "1", "--samples", "3", "--limit", "23", "--batch", "4", "--device", "cpu"]
    fakes(*flags, "--out", tmp_path / "one")
    (tmp_path / "run.py").write_text("import test_eval, runtime\ntest_eval.install(setattr)\nruntime.main(test_eval.evaluation.main)\n")
    environment = {**os.environ, "PYTHONPATH": f"{HERE}{os.pathsep}{HERE / 'tests'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", tmp_path / "run.py"]
    command += [*flags, "--out", tmp_path / "two"]
    subprocess.run(command, env=environment, cwd=tmp_path, check=True, capture_output=True, timeout=120)
    for name in ("eval.json", "report.html", "predictions_sft.jsonl", "predictions_sft_T1.jsonl", "overlays_sft.png"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
