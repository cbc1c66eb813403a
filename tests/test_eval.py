"""eval.py and metrics.py.

Metrics are worked by hand and by counting pixels; the whole script runs on a fake model whose
answers are known.
"""
import json
import math
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import data
import eval as evaluation
from conftest import Run
from qwen.answer import Frame, format_box, locate
from qwen.hub import CheckpointError
from qwen.processor import prompt_hash, smart_resize
from readers.base import DataError, Record, Records
from report import metrics, pictures, predictions
from test_docs import explained

NAN = [math.nan] * 4
HERE = Path(__file__).parents[1]
Script = Callable[..., None]      # runs eval.py with these flags
SCORES = ("mIoU", *(f"Pr@{t}" for t in metrics.THRESHOLDS), "cIoU", "center_error", "n")


# ---------------------------------------------------------------- metrics

def test_metrics_by_hand() -> None:
    """Four targets of 10 x 10 in an image of 100 x 200: hit, half, touched, missed.

    IoU 1; 5 x 10 of 10 x 10, exactly 0.5, which is not above 0.5; 10 x 10 shifted by 2, 80 of 120;
    no box. cIoU (100 + 50 + 80 + 0) / (100 + 100 + 120 + 100). Centres are off by 0, 2.5 and 2 px
    of 100, over sqrt(2)."""
    gt = torch.tensor([[10.0, 10, 20, 20]] * 4)
    pred = torch.tensor([[10.0, 10, 20, 20], [10, 10, 15, 20], [12, 10, 22, 20], NAN])
    got = metrics.metrics(pred, gt, torch.tensor([[100.0, 200.0]] * 4))
    want = {
        "mIoU": (1 + 0.5 + 2 / 3) / 4,
        "Pr@0.5": 0.5, "Pr@0.6": 0.5, "Pr@0.7": 0.25, "Pr@0.8": 0.25, "Pr@0.9": 0.25,
        "cIoU": 230 / 420,
        "center_error": (0 + 0.025 + 0.02) / 3 / math.sqrt(2),
        "n": 4,
    }
    assert got == pytest.approx(want)
    assert tuple(got) == tuple(want) == SCORES


def test_a_guess_in_the_middle_by_hand() -> None:
    """Median width 20% and height 30%: one target is that box, one touches nothing of it."""
    boxes = [(80.0, 35.0, 120.0, 65.0), (0.0, 0.0, 40.0, 30.0), (60.0, 35.0, 140.0, 65.0)]
    records = [Record(str(i), None, "x", box, "", (200, 100)) for i, box in enumerate(boxes)]
    guess = metrics.centre_box(records)
    assert guess["mIoU"] == pytest.approx((1 + 0 + 0.5) / 3)
    assert guess["Pr@0.5"] == pytest.approx(1 / 3)
    assert guess["n"] == 3


def test_boxes_are_clamped_before_they_are_compared() -> None:
    pred = torch.tensor(
        [[-1e30, -5, 10, 10], [90, 90, math.inf, 300], [150, 10, 160, 20], [30, 30, 20, 40]])
    gt = torch.tensor([[0.0, 0, 10, 10], [90, 90, 130, 100], [90, 10, 100, 20], [20, 30, 30, 40]])
    got = metrics.metrics(pred, gt, torch.tensor([[100.0, 100.0]] * 4))
    assert got["Pr@0.9"] == 0.5 and got["mIoU"] == 0.5
    assert got["cIoU"] == 0.5                                    # 100 + 100 of 4 x 100
    assert got["center_error"] == 0


def test_nothing_but_misses() -> None:
    gt = torch.tensor([[1.0, 1, 9, 9]] * 2)
    got = metrics.metrics(torch.tensor([NAN, NAN]), gt, torch.tensor([[10, 10]] * 2))
    assert got["mIoU"] == got["cIoU"] == got["Pr@0.5"] == 0
    assert got["center_error"] is None
    assert got["n"] == 2


def random_pixel_boxes(rng: np.random.Generator, n: int) -> np.ndarray:
    """(n, 4) float32 of whole numbers from 0 to 22, each box of one pixel at least."""
    corners = np.sort(rng.integers(0, 22, (n, 2, 2)), axis=1)    # box, corner, axis
    corners[:, 1] += 1
    return corners.reshape(n, 4).astype(np.float32)


def pixels_of(box: Sequence[float]) -> np.ndarray:
    """Which pixels of an image of 22 x 24 a box covers once it is clamped, none for NaN."""
    grid = np.zeros((24, 24), bool)
    if not np.isnan(box).any():
        x1, y1, x2, y2 = (int(min(max(v, 0), (22, 24)[i % 2])) for i, v in enumerate(box))
        grid[y1:y2, x1:x2] = True
    return grid


def test_metrics_count_pixels() -> None:
    rng = np.random.default_rng(0)
    pred = random_pixel_boxes(rng, 2000)
    gt = random_pixel_boxes(rng, 2000)
    pred[::3] = gt[::3] + rng.integers(-1, 2, (len(gt[::3]), 4))
    pred[::50] = np.nan
    shared = 0
    covered = 0
    ious = []
    for p, g in zip(pred, gt):
        p_pixels = pixels_of(p)
        g_pixels = pixels_of(g)
        both = (p_pixels & g_pixels).sum()
        either = (p_pixels | g_pixels).sum()
        shared += both
        covered += either
        ious.append(both / either)
    size = torch.tensor([[22, 24]] * 2000)
    got = metrics.metrics(torch.tensor(pred), torch.tensor(gt), size)
    assert got["mIoU"] == pytest.approx(np.mean(ious), rel=1e-12)
    assert got["cIoU"] == pytest.approx(shared / covered, rel=1e-12)
    for t in (0.5, 0.6, 0.7, 0.8, 0.9):
        assert got[f"Pr@{t}"] == np.mean(np.array(ious) > t)
        assert 0 < got[f"Pr@{t}"] < 1


def random_pair(rng: random.Random, i: int) -> tuple[list[float], list[float], tuple[int, int]]:
    """The i-th predicted box, target and size: some missing, equal, or exactly at 0.5."""
    W = rng.randint(20, 900)
    H = rng.randint(20, 900)
    g = [rng.uniform(0, W * 0.8), rng.uniform(0, H * 0.8)]
    g += [rng.uniform(g[0] + 1, W), rng.uniform(g[1] + 1, H)]
    p = [v + rng.gauss(0, 30) for v in g] if i % 3 else list(g)
    if i % 11 == 0:
        g = [0.0, 0.0, 16.0, 16.0]
        p = [0.0, 0.0, 16.0, 8.0]
    return (NAN if i % 13 == 0 else p), g, (W, H)


def plain_overlap(
        p: Sequence[float], g: Sequence[float], size: tuple[int, int],
) -> tuple[float, float, float | None]:
    """Intersection, union and distance of the centres (None without a box), in plain floats."""
    W, H = size
    p = [min(max(v, 0.0), size[k % 2]) for k, v in enumerate(p)]
    area_g = (g[2] - g[0]) * (g[3] - g[1])
    if math.isnan(p[0]) or p[2] <= p[0] or p[3] <= p[1]:
        return 0.0, area_g, None
    width = max(0.0, min(p[2], g[2]) - max(p[0], g[0]))
    height = max(0.0, min(p[3], g[3]) - max(p[1], g[1]))
    area_p = (p[2] - p[0]) * (p[3] - p[1])
    dx = (p[0] + p[2] - g[0] - g[2]) / 2 / W
    dy = (p[1] + p[3] - g[1] - g[3]) / 2 / H
    union = area_g + area_p - width * height
    return width * height, union, math.hypot(dx, dy) / math.sqrt(2)


def test_metrics_equal_brute_force_on_random_pairs() -> None:
    """10,000 pairs in plain Python floats, boxes anywhere; > t and >= t."""
    rng = random.Random(0)
    pairs = [random_pair(rng, i) for i in range(10_000)]
    pred, gt, size = (torch.tensor(x, dtype=torch.float64) for x in zip(*pairs))
    ious = []
    intersections = 0.0
    unions = 0.0
    distances = []
    for p, g, wh in pairs:
        intersection, union, distance = plain_overlap(p, g, wh)
        ious.append(intersection / union)
        intersections += intersection
        unions += union
        if distance is not None:
            distances.append(distance)
    for inclusive in (False, True):
        got = metrics.metrics(pred, gt, size, inclusive)
        for t in metrics.THRESHOLDS:
            right = sum(v >= t if inclusive else v > t for v in ious)
            assert got[f"Pr@{t}"] == right / 10_000
        assert got["mIoU"] == pytest.approx(sum(ious) / 10_000, rel=1e-12)
        assert got["cIoU"] == pytest.approx(intersections / unions, rel=1e-12)
        assert got["center_error"] == pytest.approx(sum(distances) / len(distances), rel=1e-12)


# ---------------------------------------------------------------- VRSBench's own metric

def official_vrsbench(
        pred: Any, target: Any, side: int = 100, unique: Sequence[bool | None] | None = None,
        grid: Sequence[tuple | None] | None = None) -> dict[str, Any]:
    """Square images; pred, target (N, 4) in pixels."""
    records = []
    for i, box in enumerate(target):
        box = tuple(map(float, box))
        records.append(Record(str(i), f"{i}.png", "", box, "ship", (side, side),
                              unique=unique[i] if unique else None, grid=grid[i] if grid else None))
    return metrics.official("vrsbench", torch.as_tensor(pred).double(), records)


def test_vrsbench_takes_the_data_sets_own_cells_where_it_gives_them() -> None:
    """The precise box says cells 10 to 20, the file 11 to 21: the file counts."""
    pred = [[11.2, 11.2, 21.2, 21.2]] * 2
    target = [[10.9, 10.9, 20.9, 20.9]] * 2
    got = official_vrsbench(pred, target, grid=[(11, 11, 21, 21), None])["all"]
    assert got["mIoU"] == pytest.approx((1 + 100 / (121 + 121 - 100)) / 2)
    assert got["cIoU"] == pytest.approx((121 + 100) / (121 + 142))


def cells_of(box: Sequence[int]) -> set[tuple[int, int]]:
    x1, y1, x2, y2 = box
    cells = set()
    for x in range(x1, x2 + 1):
        cells.update((x, y) for y in range(y1, y2 + 1))
    return cells


def in_pixels(cells: Sequence[Sequence[int]]) -> Tensor:
    """Cells -> pixels of an image of 512 x 512, half a cell in, so that none is cut down."""
    return (torch.tensor(cells).double() + 0.5) * 5.12


def test_vrsbench_counts_cells() -> None:
    """Against sets of cells on the grid, 10,000 pairs."""
    rng = random.Random(1)
    corners = [[rng.randint(0, 80), rng.randint(0, 80)] for _ in range(10_000)]
    gt = [[x, y, x + rng.randint(0, 9), y + rng.randint(0, 9)] for x, y in corners]
    pred = []
    for x1, y1, x2, y2 in gt:
        left = x1 + rng.randint(-2, 2) if x1 > 2 else x1
        pred.append([left, y1, x2 + rng.randint(2, 4), y2 + rng.randint(0, 2)])
    got = official_vrsbench(in_pixels(pred), in_pixels(gt), 512)["all"]
    ious = []
    for p, g in zip(pred, gt):
        a = cells_of(p)
        b = cells_of(g)
        ious.append(len(a & b) / len(a | b))
    assert got["mIoU"] == pytest.approx(sum(ious) / 10_000, abs=1e-12)
    for t in (0.5, 0.7):
        assert got[f"Acc@{t}"] == sum(iou >= t for iou in ious) / 10_000


def test_vrsbench_hits_a_target_of_no_area_which_the_pixel_metric_never_can() -> None:
    """A point in cell 19, 19; a line far away; no answer; a point in 11 x 11 cells. Cells: 1 of 1,
    0 of 2 + 39 - 0 or so, none, 1 of 121."""
    pred = [[100.0, 100, 102, 102], [100, 100, 102, 102], NAN, [100, 100, 150, 150]]
    target = [[101.0, 101, 101, 101]] * 4
    target[1] = [200.0, 100, 200, 100]
    got = official_vrsbench(pred, target, 512, [True, False, None, False])
    assert metrics.metrics(torch.tensor(pred[:1]), torch.tensor(target[:1]),
                           torch.tensor([[512, 512]]))["Pr@0.5"] == 0
    # The answer without a box is no part of cIoU.
    assert got == {
        "all": {"n": 4, "Acc@0.5": 0.25, "Acc@0.7": 0.25, "mIoU": pytest.approx((1 + 1 / 121) / 4),
                "cIoU": pytest.approx(2 / (1 + 2 + 121))},
        "unique": {"n": 1, "Acc@0.5": 1.0, "Acc@0.7": 1.0, "mIoU": 1.0, "cIoU": 1.0},
        "non_unique": {"n": 2, "Acc@0.5": 0.0, "Acc@0.7": 0.0, "mIoU": pytest.approx(1 / 242),
                       "cIoU": pytest.approx(1 / 123)}}


@pytest.mark.parametrize("side", (512, 640, 700, 1024))
@pytest.mark.parametrize("written, grid, accuracy, no_area", [
    ([290, 290, 570, 580], (29, 29, 57, 58), 1.0, 0),
    ([290, 290, 290, 580], (29, 29, 29, 58), 1.0, 1),            # a line: a box there, none here
    ([570, 290, 290, 580], (29, 29, 29, 58), 0.0, 1),            # on its head: no box anywhere
])
def test_vrsbench_cells_survive_their_way_through_pixels(
        side: int, written: list[int], grid: tuple, accuracy: float, no_area: int,
) -> None:
    """An answer in thousandths that begins at a cell's very edge is of that cell.

    What our metric cannot score for want of area is no silent 0: it is counted as a failure."""
    box = (0.29 * side, 0.29 * side, 0.57 * side, 0.58 * side)
    record = Record("0", "a.png", "", box, "ship", (side, side), grid=grid)
    frame = {"original": [side, side], "resized": [side, side], "convention": "1000"}
    text = f'<think>a</think><answer>{{"bbox_2d": {written}}}</answer>'
    predictions = [{"id": "0", "text": text, "frame": frame}]
    row = evaluation.details([record], predictions, "vrsbench", None, [record])
    assert row["official"]["all"]["Acc@0.7"] == accuracy
    assert evaluation.score_predictions([record], predictions)["failures"]["no area"] == no_area


# ---------------------------------------------------------------- intervals, breakdowns, samples

def on_images(images: Sequence[Any], boxes: Sequence[tuple] | None = None) -> list[Record]:
    """Records of 10 x 10 targets in 100 x 100 images of these names."""
    boxes = boxes or [(0.0, 0.0, 10.0, 10.0)] * len(images)
    records = []
    for i, (image, box) in enumerate(zip(images, boxes)):
        records.append(Record(str(i), image, "", box, "ship", (100, 100)))
    return records


def test_intervals_resample_images() -> None:
    """100 images, half of them right: the interval is the binomial's.

    Ten copies of every record in its image tell nothing new."""
    right = torch.tensor([1.0, 0.0] * 50)
    copies = right.repeat_interleave(10)
    low, high = metrics.bootstrap(on_images(range(100)), {"x": (right, None)})["x"][1]
    assert low == pytest.approx(0.5 - 1.96 * 0.05, abs=0.02)
    assert high == pytest.approx(0.5 + 1.96 * 0.05, abs=0.02)
    same_images = on_images([i // 10 for i in range(1000)])
    interval = metrics.bootstrap(same_images, {"x": (copies, None)})["x"][1]
    assert interval == pytest.approx([low, high])
    own_images = on_images(range(1000))
    narrow_low, narrow_high = metrics.bootstrap(own_images, {"x": (copies, None)})["x"][1]
    assert narrow_high - narrow_low < (high - low) / 2
    constant = (torch.full((9,), 2.0), torch.full((9,), 4.0))
    assert metrics.bootstrap(on_images(range(9)), {"x": constant})["x"][1] == [0.5, 0.5]


def test_paired_test() -> None:
    """B adds 10 hits in 200 of A's: p far below 0.05, while the two intervals overlap.

    A against itself: p 1."""
    records = on_images(range(200))
    hit = {"box": [0.0, 0.0, 10.0, 10.0]}
    miss = {"box": None}
    a = [hit if i % 2 else miss for i in range(200)]
    b = [hit if i < 20 else p for i, p in enumerate(a)]

    def paired(first: list[dict], second: list[dict]) -> dict[str, dict[str, Any]]:
        boxes = [predictions.strict_boxes(records, answers) for answers in (first, second)]
        a, b = (metrics.overlaps(pred, *metrics.targets(records)).iou for pred in boxes)
        return metrics.paired(records, a, b)
    got = paired(a, b)["Pr@0.5"]
    assert got["difference"] == pytest.approx(0.05)
    assert got["p"] < 0.01 and got["ci"][0] > 0
    assert paired(b, a)["mIoU"]["difference"] == pytest.approx(-0.05)
    assert paired(a, a)["mIoU"] == {"difference": 0, "ci": [0, 0], "p": 1}
    assert paired([hit, miss] * 100, [miss, hit] * 100)["mIoU"]["p"] > 0.2


def test_properties_by_hand() -> None:
    """Three ships in one image (one box named twice), a plane in another that train has too."""
    boxes = [(0.0, 0.0, 10.0, 10.0), (0.0, 0.0, 10.0, 10.0), (40.0, 40.0, 90.0, 90.0),
             (90.0, 0.0, 100.0, 100.0), (0.0, 0.0, 97.0, 97.0)]
    records = on_images(["a", "a", "a", "a", "b"], boxes)
    records[4] = replace(records[4], category="plane", kind="relation")
    train = [replace(records[4], category="ship", image="b")]
    got = metrics.properties(records, train, records)
    assert got["size"] == ["small", "small", "medium", "small", "large"]
    assert got["region"] == [
        "top left", "top left", "middle centre", "middle right", "middle centre"]
    assert got["distractors"] == ["2", "2", "2", "2", "0"]
    assert got["kind"] == [None] * 4 + ["relation"]
    assert got["train image"] == ["disjoint"] * 4 + ["also in train"]
    assert got["train category"] == ["seen"] * 4 + ["unseen"]
    assert set(metrics.properties(records, None, records)["train image"]) == {None}


def text_of(box: Sequence[float]) -> str:
    return f'<answer>{{"bbox_2d": {list(box)}}}</answer>'


def test_pass_at_k_by_hand() -> None:
    """Of 4 samples 0, 1 and 4 hit; the second record's boxes scatter.

    pass@1 is (0 + 1/4 + 1) / 3, pass@2 (0 + 1/2 + 1) / 3, pass@4 2/3."""
    records = on_images("abc")
    frame = {"original": [100, 100], "resized": [100, 100], "convention": "absolute"}
    hit = text_of([0, 0, 10, 10])
    miss = text_of([80, 0, 90, 10])
    predictions = []
    for texts in (["x"] * 4, [hit, miss, miss, miss], [hit] * 4):
        predictions.append({"text": texts[0], "frame": frame, "samples": texts})
    got = evaluation.details(records, predictions, "tiny", None, records)
    assert got["pass"] == pytest.approx({"1": 5 / 12, "2": 0.5, "4": 2 / 3})
    assert got["samples"] == 4
    # The mean of two groups, one of them 0.
    assert got["dispersion"] == pytest.approx(0.8 * math.sqrt(3 / 16) / 2)


# ---------------------------------------------------------------- a data set and a model

SIZES = ((800, 800), (640, 360), (100, 300), (500, 800))


def tiny(root: Path | str, split: str = "test", n: int = 24) -> Records:
    """n records, two on each image; the images are one colour each and are drawn by `root`.

    An expression says its record's number and box, for the fake model to read. The split "half"
    has the first half of them."""
    if split in ("train", "rft"):
        raise DataError(f"tiny has no split {split}")
    records = []
    for i in range({"test": n, "half": n // 2, "empty": 0}[split]):
        W, H = SIZES[i // 2 % 4]
        box = (W * (i % 5) / 10, H * (i % 7) / 10, W * (i % 5 + 4) / 10, H * (i % 7 + 3) / 10)
        text = f"{i}: {','.join(map(str, box))}"
        image = Path(root) / f"{i // 2}.png"
        records.append(Record(f"r{i}", image, text, box, "ship", (W, H)))
    return Records(records, {})


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    for record in tiny(folder):
        Image.new("RGB", record.size, (int(record.image.stem) * 10, 0, 0)).save(record.image)
    return folder


class FakeProcessor:
    """A prompt that remembers its expression and the colour of its image.

    The resized image has sides that are multiples of 28."""

    patch = 14
    merge = 2
    min_pixels = 56 * 56
    max_pixels = 28 * 28 * 1280

    def __call__(self, image: Image.Image, text: str) -> SimpleNamespace:
        resized = smart_resize(*image.size, 28, self.min_pixels, self.max_pixels)
        frame = Frame(image.size, resized, "absolute")
        return SimpleNamespace(text=text, colour=image.getpixel((0, 0))[0], frame=frame)

    def decode(self, ids: Tensor) -> str:
        return "".join(map(chr, ids))


def fake_answer(prompt: SimpleNamespace, seed: int, temperature: float) -> str:
    """Knows the truth; record i answers in style i % 6.

    At a temperature the box is off as the seed says; of another image it is a guess."""
    i, numbers = prompt.text.split(": ")
    box = prompt.frame.to_model([float(v) for v in numbers.split(",")])
    offset = seed * 7 % 30 if temperature else 0
    corners = [round(v) + offset for v in box]
    if int(i) // 2 * 10 != prompt.colour:
        corners = [0, 0, 28, 28]
    x1, y1, x2, y2 = corners
    return (
        f'<think>a</think><answer>{{"bbox_2d": [{x1}, {y1}, {x2}, {y2}]}}</answer>',
        f'<answer>{{"bbox_2d": [{x1 + 4}, {y1 + 4}, {x2 + 4}, {y2 + 4}]}}</answer>',
        "I can't see it \ud800",
        f'```json\n[{{"bbox_2d": [{x1}, {y1}, {x2}, {y2}], "label": "ship"}}]\n```',
        '<answer>{"bbox_2d": [1, 2, 3, NaN]}</answer>',
        '<answer>{"bbox_2d": [90000, 2, 90001, 4]}</answer>',
    )[int(i) % 6]


def fake_generate(
        model: None, prompts: Sequence[SimpleNamespace], group: int, max_new_tokens: int,
        temperature: float, seeds: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """`fake_answer`s as generate.generate gives them: an id is a letter's number."""
    assert len(prompts) == len(seeds)
    texts = []
    for prompt, seed in zip(prompts, seeds.tolist()):
        texts += [fake_answer(prompt, seed + g, temperature) for g in range(group)]
    longest = max(map(len, texts))
    ids = [[*map(ord, text), *[0] * (longest - len(text))] for text in texts]
    tokens = torch.tensor(ids).view(len(prompts), group, longest)
    lengths = torch.tensor([len(text) for text in texts]).view(len(prompts), group)
    return tokens, torch.zeros(tokens.shape), lengths


def install(set_attribute: Callable[[Any, str, Any], None]) -> None:
    """The fakes, by `setattr` or monkeypatch's."""
    loader = SimpleNamespace(from_pretrained=lambda folder: FakeProcessor())
    set_attribute(evaluation, "generate", fake_generate)
    set_attribute(evaluation, "open_model",
                  lambda folder, device: (None, FakeProcessor()))
    set_attribute(evaluation, "Processor", loader)
    set_attribute(data, "READERS", {**data.READERS, "tiny": tiny})


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> Script:
    """Runs the script with these flags."""
    install(monkeypatch.setattr)

    def script(*flags: object) -> None:
        monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, flags)])
        evaluation.main()
    return script


def stage(folder: Path, root: Path, step: int = 10, **run_flags: str) -> None:
    """A stage's folder as training leaves it, without weights."""
    here = folder / f"step_{step:06d}"
    here.mkdir(parents=True)
    (here / "config.json").write_text("{}")
    run = {"stage": folder.name, "data": "tiny", "root": str(root), "prompt_hash": prompt_hash(),
           "flags": run_flags}
    (here / "run.json").write_text(json.dumps(run))
    (folder / "latest").symlink_to(here.name)


def rows(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "eval.json").read_text())["rows"]


def without_source(row: dict[str, Any]) -> dict[str, Any]:
    """A row but for where its predictions come from, and what their model was trained on."""
    source = ("stage", "checkpoint", "temperature", "trained_on")
    return {key: v for key, v in row.items() if key not in source}


# ---------------------------------------------------------------- a model's answers

def evaluate(records: Sequence[Record], **sampling: Any) -> list[predictions.Prediction]:
    return evaluation.evaluate(None, FakeProcessor(), records, **sampling)


def test_answers_come_in_record_order_and_in_original_pixels(
        root: Path, fakes: Script,
) -> None:
    records = tiny(root)
    answers = evaluate(records, batch=5)
    assert [a["id"] for a in answers] == [r.id for r in records]
    for i, (answer, record) in enumerate(zip(answers, records)):
        if i % 6 == 0:
            # Whole pixels of the resized image: half a pixel off at most.
            near = 0.51 * max(record.size) / min(answer["frame"]["resized"])
            assert answer["box"] == pytest.approx(record.box, abs=near)
        assert (answer["box"] is not None) == (i % 6 in (0, 1))
    assert answers == evaluate(records, batch=24)
    sampled = evaluate(records, batch=5, temperature=1.0)
    assert sampled == evaluate(records, batch=24, temperature=1.0) != answers
    assert sampled != evaluate(records, batch=24, temperature=1.0, seed=1)


def test_locate_by_hand() -> None:
    frame = Frame((800, 400), (812, 420), "absolute")            # 1.015 and 1.05 times as large
    assert locate((406.0, 105.0, 900.0, 900.0), frame) == pytest.approx((400, 100, 800, 400))
    thousandths = Frame((800, 400), (812, 420), "1000")
    box = locate((250.0, 250.0, 500.0, 500.0), thousandths)
    assert box == pytest.approx((200, 100, 400, 200))
    assert locate((812.0, 0.0, 900.0, 9.0), frame) is locate(None, frame) is None


def test_score_by_hand(root: Path, fakes: Script) -> None:
    """A sixth each is: right, off by 4 px, wordless, fenced JSON, not JSON, outside the image."""
    records = tiny(root)
    answers = evaluate(records)
    got = evaluation.score_predictions(records, answers)
    failures = {why: n for why, n in got["failures"].items() if n}
    assert failures == {"no answer": 8, "not JSON": 4, "outside image": 4}
    assert tuple(got["failures"]) == evaluation.OUTCOMES
    assert got["n"] == got["lenient"]["n"] == 24
    assert 4 / 24 <= got["Pr@0.9"] <= got["Pr@0.5"] <= 8 / 24
    # The fenced ones, nearly perfect.
    assert got["lenient"]["mIoU"] > got["mIoU"] + 3.9 / 24
    target = torch.tensor([r.box for r in records])
    size = torch.tensor([r.size for r in records])
    boxes = torch.tensor([a["box"] or NAN for a in answers])
    again = metrics.metrics(boxes, target, size)
    assert {key: got[key] for key in again} == pytest.approx(again, abs=1e-6)


def test_blind_shows_another_image_in_the_same_frame(
        root: Path, fakes: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    records = tiny(root)
    seen = evaluate(records)
    shown = []
    opened = data.open_image

    def watch(record: Record) -> Image.Image:
        shown.append(record.image)
        return opened(record)
    monkeypatch.setattr(data, "open_image", watch)
    blind = evaluate(records, blind=True)
    assert all(image != record.image for image, record in zip(shown, records, strict=True))
    assert len(set(shown)) == 12
    assert [a["frame"] for a in seen] == [a["frame"] for a in blind]
    assert evaluation.score_predictions(records, blind)["Pr@0.5"] == 0
    assert evaluation.score_predictions(records, seen)["Pr@0.5"] > 0
    with pytest.raises(DataError, match="at least two images"):
        evaluate(records[:2], blind=True)


def test_every_stage_side_by_side(
        root: Path, fakes: Script, tmp_path: Path, capfd: pytest.CaptureFixture[str],
) -> None:
    for name in ("rft", "sft", "ablation"):
        stage(tmp_path / name, root)
    # A downloaded folder has no run.json.
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    (tmp_path / "notes").mkdir()
    # The second run writes over the first's report.
    for _ in range(2):
        fakes(tmp_path, "--temperature", 0, 1, "--device", "cpu")
    got = rows(tmp_path / "eval")
    assert [(row["stage"], row["temperature"]) for row in got] == [
        ("base", 0), ("base", 1), ("sft", 0), ("sft", 1), ("rft", 0), ("rft", 1),
        ("ablation", 0), ("ablation", 1)]
    assert got[2]["checkpoint"] == str(tmp_path / "sft" / "step_000010")
    assert got[0]["data"] == "tiny" and got[0]["split"] == "test"
    assert got[0]["mIoU"] > got[1]["mIoU"] > 0
    assert got[0]["mIoU"] == got[2]["mIoU"]
    table = capfd.readouterr().out
    assert re.search(rf"rft +0 +24 +{got[4]['mIoU']:.3f} +{got[4]['Pr@0.5']:.3f}", table)
    assert "rft T=1: no answer 8" in table
    for name in ("predictions_sft.jsonl", "predictions_sft_T1.jsonl", "overlays_sft.png",
                 "overlays_base_T1.png"):
        assert (tmp_path / "eval" / name).stat().st_size > 0
    lines = (tmp_path / "eval" / "predictions_sft.jsonl").read_text().split("\n")
    assert json.loads(lines[2])["text"] == "I can't see it \ud800"


def test_samples_and_comparison_through_the_script(
        root: Path, fakes: Script, tmp_path: Path, capfd: pytest.CaptureFixture[str],
) -> None:
    """Rows, a line of samples read back, the same numbers from the file; two files compared."""
    stage(tmp_path / "sft", root)
    fakes(tmp_path, "--temperature", 0, 1, "--samples", 4, "--device", "cpu")
    greedy, warm = rows(tmp_path / "eval")
    assert "pass" not in greedy
    assert set(warm["pass"]) == {"1", "2", "4"} and 0 < warm["pass"]["1"] <= warm["pass"]["4"]
    low, high = warm["ci"]["mIoU"]
    assert low < warm["mIoU"] < high
    assert sum(part["n"] for part in warm["breakdowns"]["size"].values()) == 24
    a = tmp_path / "eval" / "predictions_sft.jsonl"
    b = tmp_path / "eval" / "predictions_sft_T1.jsonl"
    out = tmp_path / "both"
    fakes("--compare", a, b, "--data", "tiny", "--root", root, "--out", out)
    for before, after in zip((greedy, warm), rows(out)):
        assert without_source(before) == without_source(after)
    test = json.loads((out / "eval.json").read_text())["comparison"]["mIoU"]
    assert test["difference"] == pytest.approx(warm["mIoU"] - greedy["mIoU"])
    assert "B - A: mIoU -" in capfd.readouterr().out
    assert f"{test['difference']:+.3f} <small>" in (out / "report.html").read_text()


@pytest.mark.parametrize("which, name", [
    ("sft", "sft"),
    ("sft/step_000020", "sft_step_000020"),
    ("sft/step_000010", "sft_step_000010"),
])
def test_one_stage_or_step(
        root: Path, fakes: Script, tmp_path: Path, which: str, name: str,
) -> None:
    stage(tmp_path / "sft", root)
    (tmp_path / "sft" / "latest").unlink()
    stage(tmp_path / "sft", root, step=20)
    out = tmp_path / "report"
    fakes(tmp_path / which, "--out", out, "--limit", 5, "--device", "cpu")
    [row] = rows(out)
    assert row["stage"] == name and row["n"] == 5
    newest = "sft/step_000020" if which == "sft" else which
    assert row["checkpoint"] == str(tmp_path / newest)


# ---------------------------------------------------------------- the keys of eval.json

def key_paths(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The paths of the leaves of a JSON object."""
    if not isinstance(value, dict):
        yield path
        return
    for key, inner in value.items():
        yield from key_paths(inner, (*path, key))


def fits(path: Sequence[str], pattern: str) -> bool:
    """Does a path of keys fit a key of docs/logs.md?"""
    parts = pattern.split("/")
    if len(parts) != len(path):
        return False
    return all(part in ("*", key) for part, key in zip(parts, path))


def tiny_vrsbench(root: Path | str, split: str) -> Records:
    """`tiny` as VRSBench gives records: with grid and uniqueness, and one that is refused."""
    records = []
    for i, record in enumerate(tiny(root, split)):
        records.append(replace(record, unique=i % 2 == 0, grid=(0, 0, 10, 10)))
    return Records(records, {"missing image": ["line 25"]})


def test_every_key_of_eval_json_is_explained_and_no_other(
        root: Path, fakes: Script, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:
    monkeypatch.setitem(data.READERS, "vrsbench", tiny_vrsbench)
    stage(tmp_path / "sft", root, split="half")
    fakes(tmp_path, "--data", "vrsbench", "--root", root, "--temperature", 0, 1, "--samples", 2,
          "--device", "cpu")
    folder = tmp_path / "eval"
    files = [folder / "predictions_sft.jsonl", folder / "predictions_sft_T1.jsonl"]
    fakes("--compare", *files, "--data", "vrsbench", "--root", root, "--out", tmp_path / "both")
    content = json.loads((tmp_path / "both" / "eval.json").read_text())
    model_rows = rows(folder)
    monkeypatch.setitem(data.READERS, "dior", tiny)
    fakes("--predictions", files[0], "--data", "dior", "--root", root, "--out", tmp_path / "dior")
    file_rows = content.pop("rows") + rows(tmp_path / "dior")
    for keys, values in ((explained("## eval.json"), [*model_rows, *file_rows]),
                         (explained("next to `rows`"), [content])):
        fitting = set()
        for value in values:
            for path in key_paths(value):
                patterns = [pattern for pattern in keys if fits(path, pattern)]
                assert len(patterns) == 1, (path, patterns)
                fitting.update(patterns)
        assert fitting == keys
    # What "*" is if a sentence says "`mIoU` to `n`".
    assert tuple(model_rows[0]["lenient"]) == tuple(content["centre_box"]) == SCORES


# ---------------------------------------------------------------- what was trained on

def test_records_that_were_trained_on_are_told_and_the_rest_scored_apart(
        root: Path, fakes: Script, tmp_path: Path, capfd: pytest.CaptureFixture,
) -> None:
    """The first twelve of 24 records were in the SFT that the RFT started from."""
    stage(tmp_path / "sft", root, split="half")
    stage(tmp_path / "rft", root, init=str(tmp_path / "sft"))
    fakes(tmp_path, "--data", "tiny", "--root", root, "--device", "cpu")
    by_stage = {row["stage"]: row for row in rows(tmp_path / "eval")}
    for name, unread in (("sft", []), ("rft", ["tiny rft"])):
        row = by_stage[name]
        trained_on = row["trained_on"]
        assert (trained_on["records"], trained_on["images"]) == (12, 12)
        assert trained_on["unread"] == unread
        # Scores of the rest are those of the other twelve.
        assert trained_on["rest"]["n"] == 12
        others = tiny(root)[12:]
        lines = (tmp_path / "eval" / f"predictions_{name}.jsonl").read_text().splitlines()
        boxes = predictions.strict_boxes(others, [json.loads(line) for line in lines[12:]])
        expected = metrics.metrics(boxes, *metrics.targets(others))
        assert trained_on["rest"] == expected
    printed = capfd.readouterr().out
    assert "sft: 12 of 24 scored records were in its training data, by image and box" in printed
    assert f"sft: the other 12: mIoU {by_stage['sft']['trained_on']['rest']['mIoU']:.3f}" in printed
    assert "rft: its training data can't be read (tiny rft)" in printed


def test_a_checkpoint_of_nobody_known_says_nothing_of_training(
        root: Path, fakes: Script, tmp_path: Path, capfd: pytest.CaptureFixture,
) -> None:
    stage(tmp_path / "base", root)
    (tmp_path / "base" / "latest" / "run.json").unlink()
    fakes(tmp_path, "--data", "tiny", "--root", root, "--device", "cpu")
    [row] = rows(tmp_path / "eval")
    assert row["trained_on"] == {"records": 0, "images": 0, "unread": []}
    assert "training data" not in capfd.readouterr().out


# ---------------------------------------------------------------- anyone's answers

@pytest.fixture
def own(root: Path, fakes: Script, tmp_path: Path) -> tuple[Path, Script]:
    """A report of our own on the tiny data set: its folder, and the script."""
    stage(tmp_path / "sft", root)
    fakes(tmp_path, "--temperature", 0, 1, "--device", "cpu")

    def rescore(file: Path, *flags: object) -> None:
        fakes("--predictions", file, "--data", "tiny", "--root", root, *flags)
    return tmp_path / "eval", rescore


@pytest.mark.parametrize("k, name", [(0, "predictions_sft"), (1, "predictions_sft_T1")])
def test_rescoring_our_own_predictions_gives_the_same_numbers(
        own: tuple[Path, Script], k: int, name: str,
) -> None:
    folder, rescore = own
    rescore(folder / f"{name}.jsonl")
    [row] = rows(folder / name)
    assert without_source(row) == without_source(rows(folder)[k])
    assert row["stage"] == name.removeprefix("predictions_")
    assert row["temperature"] is None


def test_boxes_alone_give_the_same_strict_numbers(
        own: tuple[Path, Script], tmp_path: Path,
) -> None:
    folder, rescore = own
    lines = (folder / "predictions_sft.jsonl").read_text().splitlines()
    boxes = ""
    for line in reversed(lines):
        prediction = json.loads(line)
        boxes += json.dumps({"id": prediction["id"], "box": prediction["box"]}) + "\n"
    theirs = tmp_path / "theirs.jsonl"
    theirs.write_text(boxes)
    rescore(theirs, "--out", tmp_path / "report")
    [row] = rows(tmp_path / "report")
    for key in ("mIoU", "Pr@0.5", "Pr@0.9", "cIoU", "center_error", "n"):
        assert row[key] == rows(folder)[0][key]
    assert row["lenient"]["mIoU"] == row["mIoU"]
    assert row["failures"]["no answer"] == 16


def test_a_record_without_a_line_is_a_miss(
        own: tuple[Path, Script], tmp_path: Path,
) -> None:
    folder, rescore = own
    lines = (folder / "predictions_sft.jsonl").read_text().splitlines()[:6]
    (tmp_path / "six.jsonl").write_text("\n".join(lines) + "\n\n")
    rescore(tmp_path / "six.jsonl")
    [row] = rows(tmp_path / "six")
    assert row["n"] == 24 and row["failures"]["no prediction"] == 18
    rescore(tmp_path / "six.jsonl", "--limit", 6)
    assert rows(tmp_path / "six")[0]["mIoU"] == pytest.approx(row["mIoU"] * 4)


@pytest.fixture
def poor(tmp_path: Path) -> tuple[Path, Path]:
    """Four records of one's own with whole numbers for ids; three images are not there.

    -> their folder, and a perfect predictions file of the third."""
    records = []
    for i in range(4):
        records.append({"id": i, "image": f"{i}.png", "text": "the ship", "box": [1, 2, 30, 40]})
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (tmp_path / "test.jsonl").write_text(lines)
    Image.new("RGB", (50, 50)).save(tmp_path / "2.png")
    (tmp_path / "p").mkdir()
    file = tmp_path / "p" / "theirs.jsonl"
    file.write_text(json.dumps({"id": 2, "box": [1, 2, 30, 40]}))
    return tmp_path, file


def test_refused_records_are_said_wherever_scores_are(
        poor: tuple[Path, Path], fakes: Script, capfd: pytest.CaptureFixture[str],
) -> None:
    folder, file = poor
    flags = ("--predictions", file, "--data", "jsonl", "--root", folder)
    fakes(*flags)
    [row] = rows(folder / "p" / "theirs")
    assert (row["n"], row["mIoU"], row["refused"]) == (1, 1.0, {"missing image": 3})
    says = ("3 of 4 records are refused (missing image: 3); "
            f"python data.py jsonl --root {folder} --split test says where")
    assert f"\nnot scored: {says}\n" in capfd.readouterr().out
    page = (folder / "p" / "theirs" / "report.html").read_text()
    assert "1 records; 3 more are refused (missing image: 3) and not scored" in page
    # The id of a record, but of one that is refused.
    file.write_text(json.dumps({"id": 3, "box": None}))
    says = (r"line 1: no record .* the id '3'; .* it may be one of those refused "
            r"\(missing image: 3\)")
    with pytest.raises(DataError, match=says):
        fakes(*flags)
    (folder / "2.png").unlink()
    says = ("no usable record in the split test of jsonl: "
            "4 of 4 .*missing image: 4.* says where")
    with pytest.raises(DataError, match=says) as error:
        fakes(*flags)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("where, iou_unscaled", [
    ((390, 390, 410, 410), 0.327), ((780, 780, 800, 800), 0.172)])
def test_a_perfect_answer_in_the_resized_frame_is_perfect(
        monkeypatch: pytest.MonkeyPatch, fakes: Script, tmp_path: Path, where: tuple,
        iou_unscaled: float,
) -> None:
    """800 -> 812 px, the trap that others fell into.

    Read without rescaling, a 20 px object drops to 0.33 in the centre, and to 0.17 in the far
    corner (0.09 where boxes are not clamped)."""
    box = tuple(map(float, where))
    record = Record("a", tmp_path / "a.png", "a dot", box, "dot", (800, 800))
    Image.new("RGB", (800, 800)).save(record.image)
    monkeypatch.setitem(data.READERS, "dot", lambda root, split: Records([record], {}))
    checkpoint = tmp_path / "ckpt"
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text("{}")
    frame = Frame((800, 800), (812, 812), "absolute")

    def miou(line: dict[str, Any], *flags: object) -> float:
        (tmp_path / "p.jsonl").write_text(json.dumps({"id": "a", **line}))
        fakes("--predictions", tmp_path / "p.jsonl", "--data", "dot", *flags)
        return rows(tmp_path / "p")[0]["mIoU"]
    resized = {"text": text_of(frame.to_model(where))}
    assert miou({**resized, "frame": FRAME}) == pytest.approx(1)
    assert miou(resized, checkpoint, "--coords", "resized") == pytest.approx(1)
    assert miou(resized, "--coords", "original") == pytest.approx(iou_unscaled, abs=1e-3)
    assert miou({"text": text_of(where)}, "--coords", "original") == pytest.approx(1)
    thousandths = {"text": text_of(v / 0.8 for v in where)}
    assert miou(thousandths, "--coords", "1000") == pytest.approx(1)
    # Rounded to whole pixels, as a model writes it.
    whole = {"text": f'<answer>{{"bbox_2d": {format_box(where, frame)}}}</answer>'}
    assert miou(whole, checkpoint, "--coords", "resized") > 0.9


FRAME = {"original": [800, 800], "resized": [812, 812], "convention": "absolute"}


@pytest.mark.parametrize("coords", ["fraction", "1000"])
def test_boxes_of_others_in_another_unit_are_refused_with_the_flag_and_read_with_it(
        root: Path, fakes: Script, tmp_path: Path, coords: str,
) -> None:
    parts = {"fraction": 1, "1000": 1000}[coords]
    lines = {"theirs": "", "texts": "", "pixels": ""}
    for record in tiny(root):
        width, height = record.size
        box = [v * parts / (width, height)[i % 2] for i, v in enumerate(record.box)]
        lines["theirs"] += json.dumps({"id": record.id, "box": box}) + "\n"
        lines["texts"] += json.dumps({"id": record.id, "text": text_of(box)}) + "\n"
        lines["pixels"] += json.dumps({"id": record.id, "box": record.box}) + "\n"
    for name, text in lines.items():
        (tmp_path / f"{name}.jsonl").write_text(text)

    def miou(name: str, *flags: object) -> float:
        fakes("--predictions", tmp_path / f"{name}.jsonl", "--data", "tiny", "--root", root, *flags)
        return rows(tmp_path / name)[0]["mIoU"]
    with pytest.raises(DataError, match=f"theirs.jsonl: its boxes .* --coords {coords}") as error:
        miou("theirs")
    assert "\n" not in str(error.value)
    assert miou("theirs", "--coords", coords) == pytest.approx(1)
    assert miou("texts", "--coords", coords) == pytest.approx(1)
    assert miou("theirs", "--coords", "original") < 0.7
    assert miou("pixels") == miou("pixels", "--coords", "original") == 1


def test_the_unit_of_the_data_sets_own_boxes_is_as_in_training_or_by_its_flag(
        fakes: Script, tmp_path: Path,
) -> None:
    Image.new("RGB", (50, 50)).save(tmp_path / "1.png")
    record = {"id": 1, "image": "1.png", "text": "0: 5,10,25,40", "box": [0.1, 0.2, 0.5, 0.8]}
    (tmp_path / "test.jsonl").write_text(json.dumps(record) + "\n")
    folder = tmp_path / "p"
    folder.mkdir()
    (folder / "theirs.jsonl").write_text(json.dumps({"id": 1, "box": [100, 200, 500, 800]}))
    flags = ("--data", "jsonl", "--root", tmp_path)
    files = ("--predictions", folder / "theirs.jsonl", "--coords", "1000")
    with pytest.raises(DataError, match="Give --data-coords fraction, or --data-coords original"):
        fakes(*files, *flags)
    fakes(*files, *flags, "--data-coords", "fraction")
    assert rows(folder / "theirs")[0]["mIoU"] == pytest.approx(1)
    stage(tmp_path / "sft", tmp_path, coords="fraction")
    run_file = tmp_path / "sft" / "latest" / "run.json"
    run_file.write_text(run_file.read_text().replace('"tiny"', '"jsonl"'))
    fakes(tmp_path / "sft", "--device", "cpu")
    as_trained = rows(tmp_path / "sft" / "eval")[0]["mIoU"]
    run_file.write_text(run_file.read_text().replace('"coords": "fraction"', '"coords": null'))
    fakes(tmp_path / "sft", "--device", "cpu", *flags, "--coords", "fraction")
    assert rows(tmp_path / "sft" / "eval")[0]["mIoU"] == as_trained > 0.5


def test_each_stage_sees_images_stretched_as_it_was_trained(
        root: Path, fakes: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    stage(tmp_path / "sft", root, stretch=[2.0, 98.0])
    stage(tmp_path / "rft", root, stretch=[1.0, 99.0])
    seen = []
    opened = data.open_image

    def watch(record: Record, or_blank: bool = False) -> Image.Image:
        seen.append(record.stretch)
        return opened(record, or_blank)
    monkeypatch.setattr(data, "open_image", watch)
    fakes(tmp_path, "--device", "cpu")
    assert [row["stretch"] for row in rows(tmp_path / "eval")] == [[2, 98], [1, 99]]
    assert set(seen) == {(2, 98), (1, 99)}
    fakes(tmp_path, "--device", "cpu", "--stretch", 5, 95)
    assert [row["stretch"] for row in rows(tmp_path / "eval")] == [[5, 95]] * 2
    with pytest.raises(SystemExit):
        fakes(tmp_path, "--device", "cpu", "--stretch", 95, 5)


@pytest.mark.parametrize("line, says", [
    ({"id": "r0", "text": "x"}, 'line 2: a text without a "frame" needs --coords'),
    ({"id": "nobody", "box": None}, "line 2: no record of this split has the id 'nobody'"),
    ({"id": "r1", "box": None}, "line 2: the id 'r1' comes a second time"),
    ({"id": 1, "box": None}, "line 2: no record of this split has the id '1'"),
    ({"id": True, "box": None}, 'line 2: not a JSON object with an "id"'),
    ({"id": 1.0, "box": None}, 'line 2: not a JSON object with an "id"'),
    (["r0"], 'line 2: not a JSON object with an "id"'),
    ({"id": "r0"}, 'line 2: neither a "text" nor a "box"'),
    ({"id": "r0", "box": [1, 2, 3]}, 'line 2: "box" is neither four numbers nor null'),
    ({"id": "r0", "box": [1, 2, 3, True]}, 'line 2: "box" is neither four numbers nor null'),
    ({"id": "r0", "box": [1, 2, 3, 10 ** 400]}, "line 2: int too large"),
    ({"id": "r0", "text": "x", "frame": {**FRAME, "original": [801, 800]}},
     "line 2: the frame is of an image of [801, 800]"),
    ({"id": "r0", "text": "x", "frame": {**FRAME, "convention": "xywh"}}, 'line 2: "frame" is not'),
    ({"id": "r0", "text": "x", "frame": {**FRAME, "resized": [0, 812]}}, 'line 2: "frame" is not'),
    ({"id": "r0", "text": "x", "frame": [800, 800]}, 'line 2: "frame" is not'),
    ({"id": "r0", "text": "x", "frame": FRAME, "samples": ["a", 1]},
     'line 2: "samples" is not a list of texts'),
    ("not JSON", "line 2: not a JSON object"),
    (None, "line 2: not a JSON object"),
])
def test_a_line_that_does_not_fit_is_named(
        root: Path, tmp_path: Path, line: Any, says: str,
) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text(json.dumps({"id": "r1", "box": None}) + "\n" + json.dumps(line))
    with pytest.raises(DataError) as error:
        predictions.read_predictions(file, tiny(root))
    assert says in str(error.value) and str(file) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [
    b"{",
    b"\xff",
    b'{"id": "r0", "box": ' + b"[" * 100_000,
    b'{"id": "r0", "box": [1, 2, 3, ' + b"9" * 5000 + b"]}",
])
def test_a_broken_file_is_one_line(root: Path, tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "p.jsonl"
    file.write_bytes(content)
    with pytest.raises(DataError, match="p.jsonl") as error:
        predictions.read_predictions(file, tiny(root))
    assert "\n" not in str(error.value)
    with pytest.raises(DataError, match="none.jsonl"):
        predictions.read_predictions(tmp_path / "none.jsonl", tiny(root))


@pytest.mark.parametrize("prediction, failure", [
    ({"box": [5.0, 5.0, 4.0, 6.0]}, "no area"),
    ({"box": NAN}, "not four numbers"),
    ({"box": None}, "no answer"),
    ({"box": [900.0, 0.0, 901.0, 9.0]}, "outside image"),
    (None, "no prediction"),
])
def test_what_is_no_box_has_its_reason(prediction: Any, failure: str) -> None:
    reading = predictions.read_prediction(prediction, tiny(".")[0])
    assert reading == (None, None, failure)


def test_boxes_of_others_may_be_anything() -> None:
    reading = predictions.read_prediction({"box": [0.0, 0.0, 1e300, 9.0]}, tiny(".")[0])
    assert reading == ((0, 0, 800, 9), (0, 0, 800, 9), None)


# ---------------------------------------------------------------- mistakes, pictures

@pytest.mark.parametrize("flags, says", [
    ((), "name a checkpoint's folder"),
    (("ckpt", "--coords", "1000"), "--coords is about a file"),
    (("--predictions", "p.jsonl", "--coords", "resized"), "--coords resized needs a checkpoint"),
    (("--predictions", "p.jsonl", "--blind"), "--blind and --temperature belong to a checkpoint"),
    (("ckpt", "--temperature", "-1"), "a number from 0 to"),
    (("ckpt", "--temperature", "1", "1"), "each --temperature once"),
    (("ckpt", "--limit", "0"), "--limit"),
    (("ckpt", "--wrong"), "--wrong"),
    (("ckpt", "--samples", "4"), "needs a checkpoint and a --temperature above 0"),
    (("--predictions", "p.jsonl", "--compare", "a.jsonl", "b.jsonl"), "not allowed with"),
    (("--compare", "a.jsonl"), "--compare"),
    (("ckpt", "--image", "a.png"), "--image and --text go together"),
    (("--image", "a.png", "--text", "a ship", "--predictions", "p.jsonl"),
     "--image asks one checkpoint once"),
])
def test_a_wrong_flag_is_one_line_and_status_2(
        fakes: Script, capfd: pytest.CaptureFixture[str], flags: tuple[str, ...],
        says: str,
) -> None:
    with pytest.raises(SystemExit) as stop:
        fakes(*flags)
    error = capfd.readouterr().err
    assert stop.value.code == 2 and says in error and error.count("\n") == 1


def test_missing_checkpoint_and_empty_split(
        root: Path, fakes: Script, tmp_path: Path,
) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint at .*nothing"):
        fakes(tmp_path / "nothing", "--device", "cpu")
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        fakes(tmp_path, "--device", "cpu")
    stage(tmp_path / "sft", root)
    says = "no usable record in the split empty of tiny: it is empty"
    with pytest.raises(DataError, match=says):
        fakes(tmp_path, "--split", "empty", "--device", "cpu")
    assert not (tmp_path / "eval").exists()


@pytest.mark.skipif(
    not Path("/proc/self").exists(), reason="no folder here that even root can't write to")
@pytest.mark.parametrize("more", [
    (), ("--image", "a.png", "--text", "a ship"), ("--predictions", "p.jsonl")])
def test_a_folder_that_cannot_be_written_to_is_said_before_a_model_is_loaded(
        root: Path, fakes: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
        capfd: pytest.CaptureFixture[str], more: tuple[str, ...],
) -> None:
    stage(tmp_path / "sft", root)
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (100, 100)).save("a.png")
    Path("p.jsonl").write_text(json.dumps({"id": "r0", "box": None}))
    monkeypatch.setattr(evaluation, "open_model", None)
    with pytest.raises(SystemExit) as stop:
        fakes(tmp_path, "--device", "cpu", "--out", "/proc/self", *more)
    error = capfd.readouterr().err
    assert stop.value.code == 2 and "/proc/self" in error and error.count("\n") == 1


def test_overlay_draws_on_a_copy() -> None:
    image = Image.new("RGB", (200, 100))
    green = (64, 255, 64)
    boxes = [((20, 10, 120, 60), "ship \u8239", green), ((0, 0, 0.4, 0.4), "", evaluation.RED)]
    drawn = pictures.overlay(image, boxes)
    assert image.getpixel((20, 30)) == (0, 0, 0)
    assert drawn.getpixel((20, 30)) == drawn.getpixel((119, 30)) == green
    assert drawn.getpixel((121, 30)) == drawn.getpixel((19, 30)) == (0, 0, 0)
    assert drawn.size == (200, 100)


def test_a_label_is_inside_the_image_with_a_white_edge() -> None:
    """The box is in the lower right corner of a red image; the label is red, as the box is."""
    image, box = Image.new("RGB", (200, 100), evaluation.RED), (190, 90, 200, 100)
    drawn = np.asarray(pictures.overlay(image, [(box, "ship", evaluation.RED)]))
    edge_y, edge_x = (drawn != evaluation.RED).any(-1).nonzero()
    # Four letters of a font of 10 pixels, and their edge of 1, end 2 pixels from the right.
    assert 170 < edge_x.min() < 185 and 195 <= edge_x.max() < 200
    assert 86 <= edge_y.min() < 92 and 95 <= edge_y.max() < 100


@pytest.fixture
def ask(
        root: Path, fakes: Script, tmp_path: Path, capfd: pytest.CaptureFixture[str],
) -> tuple[Callable[[Path, str], str], Path]:
    """Asks the fake model about a picture -> what the script prints, and its folder."""
    stage(tmp_path / "sft", root)

    def script(picture: Path, text: str, *flags: object) -> str:
        fakes(tmp_path, "--image", picture, "--text", text, "--device", "cpu",
              "--out", tmp_path / "asked", *flags)
        return capfd.readouterr().out
    return script, tmp_path / "asked"


def printed_box(output: str, words: str) -> list[float]:
    return [float(v) for v in re.search(rf"{words}: (.*)", output)[1].split(",")]


def test_ask_about_a_picture(
        ask: tuple[Callable[[Path, str], str], Path], tmp_path: Path,
) -> None:
    """Reasoning, the box in the picture's own pixels, and a drawing with it.

    A picture beyond the limit is said to be shrunk."""
    script, out = ask
    picture = tmp_path / "scene.png"
    Image.new("RGB", (2000, 1600)).save(picture)
    output = script(picture, "0: 500,400,1000,800")
    w, h = smart_resize(2000, 1600, 28, FakeProcessor.min_pixels, FakeProcessor.max_pixels)
    assert "2000 x 1600" in output and f"shrunk to {w} x {h}" in output
    assert "<think>a</think>" in output
    box = printed_box(output, "box in pixels of the picture")
    assert box == pytest.approx((500, 400, 1000, 800), abs=2)
    drawn = Image.open(out / "scene_answer.png")
    assert drawn.size == (2000, 1600)
    assert drawn.getpixel((502, 700)) == evaluation.RED


def test_ask_where_the_answer_has_no_box(
        ask: tuple[Callable[[Path, str], str], Path], tmp_path: Path,
) -> None:
    script, out = ask
    small = tmp_path / "small.png"
    Image.new("RGB", (100, 100)).save(small)
    output = script(small, "2: 1,1,9,9")
    assert "shrunk" not in output and "no box: no answer" in output
    assert not (out / "small_answer.png").exists()


def test_ask_about_a_picture_that_is_stored_lying_and_shown_standing(
        ask: tuple[Callable[[Path, str], str], Path], tmp_path: Path,
) -> None:
    script, out = ask
    exif = Image.Exif()
    exif[0x0112] = 6
    lying = tmp_path / "lying.jpg"
    Image.new("RGB", (200, 100)).save(lying, exif=exif)
    output = script(lying, "0: 10,20,90,180")
    box = printed_box(output, "box in pixels of the picture, turned upright by its EXIF")
    assert box == pytest.approx((10, 20, 90, 180), abs=2)
    assert Image.open(out / "lying_answer.png").size == (100, 200)


def test_ask_about_what_is_no_picture(
        ask: tuple[Callable[[Path, str], str], Path], tmp_path: Path,
) -> None:
    script, _ = ask
    deep = tmp_path / "deep.png"
    Image.fromarray(np.full((90, 90), 2000, np.uint16)).save(deep)
    says = "deep.png: unreadable .16-bit or float image, scale it to 8 bits"
    with pytest.raises(DataError, match=says):
        script(deep, "a ship")
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    for missing in (broken, tmp_path / "none.png"):
        with pytest.raises(DataError, match="unreadable") as error:
            script(missing, "a ship")
        assert "\n" not in str(error.value)


def test_a_picture_of_16_bits_is_opened_by_its_stretch(
        ask: tuple[Script, Path], tmp_path: Path) -> None:
    script, out = ask
    ramp = np.linspace(0, 4000, 90 * 90).astype(np.uint16).reshape(90, 90)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    script(tmp_path / "deep.png", "0: 5,5,50,50", "--stretch", 0, 100)
    assert Image.open(out / "deep_answer.png").getpixel((89, 89)) == (255,) * 3


@pytest.mark.parametrize("suffix", ["tif", "jpg"])
def test_a_picture_is_turned_once_in_any_format(
        ask: tuple[Script, Path], tmp_path: Path, suffix: str) -> None:
    script, out = ask
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[:, :30] = 255                             # the left half is white
    exif = Image.Exif()
    exif[0x0112] = 6                                 # its left becomes its top
    Image.fromarray(pixels).save(tmp_path / f"1.{suffix}", exif=exif)
    output = script(tmp_path / f"1.{suffix}", "0: 2,20,12,50")
    assert "turned upright by its EXIF" in output
    image = Image.open(out / "1_answer.png")
    assert image.size == (40, 60)
    assert image.getpixel((36, 5))[0] > 250 and image.getpixel((36, 55))[0] < 5


def test_the_real_script_with_a_random_model(
        run: Run, tiny_checkpoint: Path,
        dior_root: Path, tmp_path: Path,
) -> None:
    """Samples, report and question with a real checkpoint; a mistake is one line, status 2."""
    done = run("eval.py", tiny_checkpoint, "--data", "dior", "--root", dior_root,
               "--temperature", 1, "--samples", 3, "--max-new-tokens", 6, "--limit", 3,
               "--device", "cpu", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    [row] = rows(tmp_path)
    assert row["samples"] == 3
    assert row["breakdowns"]["train image"]["also in train"]["n"] == 3
    assert (tmp_path / "report.html").read_text().count("<img") == 3
    Image.new("RGB", (600, 500)).save(tmp_path / "a.png")
    flags = ("eval.py", tiny_checkpoint, "--text", "a ship", "--max-new-tokens", 6,
             "--device", "cpu", "--out", tmp_path, "--image")
    done = run(*flags, tmp_path / "a.png")
    assert done.returncode == 0, done.stderr
    for words in ("600 x 500", "shrunk to", "no box"):
        assert words in done.stdout, done.stderr
    done = run(*flags, tmp_path / "none.png")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "none.png" in done.stderr


# ---------------------------------------------------------------- several processes

SCRIPT = """import test_eval
from train import run as runtime
test_eval.install(setattr)
runtime.launch(test_eval.evaluation.main)
"""


def test_two_processes_write_the_report_of_one(
        root: Path, fakes: Script, tmp_path: Path,
) -> None:
    stage(tmp_path / "ckpt" / "sft", root)
    flags = [tmp_path / "ckpt", "--temperature", "0", "1", "--samples", "3", "--limit", "23",
             "--batch", "4", "--device", "cpu"]
    fakes(*flags, "--out", tmp_path / "one")
    (tmp_path / "run.py").write_text(SCRIPT)
    path = f"{HERE}{os.pathsep}{HERE / 'tests'}"
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               "--nproc_per_node", "2", tmp_path / "run.py", *flags, "--out", tmp_path / "two"]
    subprocess.run(
        command, env=environment, cwd=tmp_path, check=True, capture_output=True, timeout=120)
    for name in ("eval.json", "report.html", "predictions_sft.jsonl",
                 "predictions_sft_T1.jsonl", "overlays_sft.png"):
        one = (tmp_path / "one" / name).read_bytes()
        assert one == (tmp_path / "two" / name).read_bytes()
