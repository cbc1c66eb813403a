"""Scores, their intervals and breakdowns: pure functions of boxes, image sizes and records.

Boxes are xyxy floats in pixels of the original image (no +1 pixel), clamped to the image before
they are compared. A row of NaN means that there is no box: a miss. Rates are fractions.

N records, k samples each. Sizes are (W, H).
"""
import itertools
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import reward
from readers.base import Record

THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9)
VRSBENCH_THRESHOLDS = (0.5, 0.7)
INTERVAL = (2.5, 97.5)            # percentiles that enclose 95%
SMALL_AREA = 32 ** 2              # square pixels; COCO's limits of small, medium and large
MEDIUM_AREA = 96 ** 2
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "centre", "right")


# ---------------------------------------------------------------- scores

class Overlaps(NamedTuple):
    valid: Tensor             # (N,) bool: the predicted box has an area in the image
    iou: Tensor               # (N,) `reward.agreement`, 0 without a box
    intersection: Tensor      # (N,) square pixels
    union: Tensor             # (N,) square pixels; the target's area without a box
    distance: Tensor          # (N,) `reward.center_distance`; meaningless without a box


def overlaps(pred: Tensor, gt: Tensor, size: Tensor) -> Overlaps:
    """pred, gt (N, 4), size (N, 2) -> Overlaps of the clamped boxes, double."""
    size = size.double()
    corner = size.repeat(1, 2)                                        # (N, 4)
    pred = pred.double().clamp(min=0).minimum(corner)
    gt = gt.double().clamp(min=0).minimum(corner)
    valid = reward.has_area(pred)
    # A miss becomes an empty box in a corner of its target. It intersects nothing, and its
    # union is the target's area.
    pred = torch.where(valid[:, None], pred, gt[:, :2].repeat(1, 2))
    intersection, union = reward.intersection_union(pred, gt)
    distance = reward.center_distance(pred, gt, size)
    return Overlaps(valid, reward.agreement(pred, gt), intersection, union, distance)


def hits(iou: Tensor, threshold: float, inclusive: bool) -> Tensor:
    """IoU (...) -> bool (...): > threshold, or >= if inclusive. Data sets differ in this."""
    return iou >= threshold if inclusive else iou > threshold


def metrics(
        pred: Tensor, gt: Tensor, size: Tensor, inclusive: bool = False,
) -> dict[str, float | int | None]:
    """pred, gt (N, 4), size (N, 2) -> the scores of an eval.json row (docs/logs.md).

    mIoU, cIoU and Pr@t follow the evaluation that comes with DIOR-RSVG, without its letterbox;
    center_error is ours.
    """
    overlap = overlaps(pred, gt, size)
    n = len(gt)
    row: dict[str, float | int | None] = {"mIoU": overlap.iou.sum().item() / max(n, 1)}
    for t in THRESHOLDS:
        row[f"Pr@{t}"] = hits(overlap.iou, t, inclusive).sum().item() / max(n, 1)
    row["cIoU"] = overlap.intersection.sum().item() / max(overlap.union.sum().item(), 1e-12)
    distance = overlap.distance[overlap.valid]
    row["center_error"] = distance.mean().item() if len(distance) else None
    row["n"] = n
    return row


def targets(records: Sequence[Record]) -> tuple[Tensor, Tensor]:
    """N records -> their boxes (N, 4) and image sizes (N, 2), double."""
    boxes = torch.tensor([record.box for record in records], dtype=torch.float64)
    sizes = torch.tensor([record.size for record in records], dtype=torch.float64)
    return boxes, sizes


def box_tensor(boxes: Sequence[Sequence[float] | None]) -> Tensor:
    """N boxes or None -> (N, 4) double, NaN for None."""
    return torch.tensor([box or [math.nan] * 4 for box in boxes], dtype=torch.float64)


def centre_box(records: Sequence[Record]) -> dict[str, float | int | None]:
    """Scores of a guess that ignores image and text: the floor under every score (ours).

    It is a box in the middle of each image, of the median width and height of these records'
    boxes relative to their images.
    """
    gt, size = targets(records)
    half = ((gt[:, 2:] - gt[:, :2]) / size).median(0).values / 2      # (2,)
    guess = torch.cat((size * (0.5 - half), size * (0.5 + half)), 1)  # (N, 4)
    return metrics(guess, gt, size)


# ---------------------------------------------------------------- VRSBench's own metric

def vrsbench_iou(
        pred: Tensor, gt: Tensor, size: Tensor, grid: Tensor | None = None,
) -> Tensor:
    """IoU as VRSBench's evaluation computes it: pred, gt (N, 4), size (N, 2) -> (N,).

    Boxes are cut down to whole hundredths of the image's sides, and both ends count (+1). So a
    line or a point has an area, and can be hit. grid (N, 4): the targets in hundredths as the
    data set gives them, NaN if it does not. 0 for NaN rows of pred.
    """
    corner = size.double().repeat(1, 2)                               # (N, 4)
    cells = []
    for boxes in (pred, gt):
        share = boxes.double().clamp(min=0).minimum(corner) / corner
        # 29% of a side comes back from pixels as 28.999...; it is 29.
        cells.append((100 * share + 1e-6).floor())
    pred, gt = cells
    if grid is not None:
        gt = torch.where(grid.isnan(), gt, grid.double())
    top_left = torch.maximum(pred[:, :2], gt[:, :2])
    bottom_right = torch.minimum(pred[:, 2:], gt[:, 2:])
    intersection = (bottom_right - top_left + 1).clamp(min=0).prod(1)
    pred_area = (pred[:, 2:] - pred[:, :2] + 1).prod(1)
    gt_area = (gt[:, 2:] - gt[:, :2] + 1).prod(1)
    return (intersection / (pred_area + gt_area - intersection)).nan_to_num(0.0)


def vrsbench(
        pred: Tensor, gt: Tensor, size: Tensor, unique: Sequence[bool | None],
        grid: Tensor | None = None,
) -> dict[str, dict[str, float | int]]:
    """VRSBench's own metric: the share of records with `vrsbench_iou` >= 0.5 and >= 0.7.

    unique: N of whether the target is the only object of its category in its image, None if
    unknown. -> part -> {"n", "Acc@0.5", "Acc@0.7"} for the parts "all", "unique" and
    "non_unique" that have records.
    """
    iou = vrsbench_iou(pred, gt, size, grid)
    parts = {
        "all": torch.ones(len(gt), dtype=torch.bool),
        "unique": torch.tensor([value is True for value in unique]),
        "non_unique": torch.tensor([value is False for value in unique])}
    scores = {}
    for part, mask in parts.items():
        if mask.any():
            scores[part] = {"n": int(mask.sum())}
            for t in VRSBENCH_THRESHOLDS:
                scores[part][f"Acc@{t}"] = (iou[mask] >= t).double().mean().item()
    return scores


# ---------------------------------------------------------------- breakdowns

def properties(
        records: Sequence[Record], train: Sequence[Record] | None, split: Sequence[Record],
) -> dict[str, list[str | None]]:
    """What scores are broken down by: property -> N values, None if unknown.

    train: the records trained on, None if the data set has none; split: all records of the
    split. Both are used to count distractors: other known objects of the category in the image.
    """
    # Only annotated objects are known; synthetic scenes list all objects.
    boxes = defaultdict(set)                     # (image, category) -> boxes
    for record in itertools.chain(train or (), split):
        boxes[record.image, record.category].add(record.box)
        for drawn in record.objects:
            boxes[record.image, drawn.category].add(tuple(map(float, drawn.box)))
    train_images = {record.image for record in train or ()}
    train_categories = {record.category for record in train or ()}
    values = defaultdict(list)
    for record in records:
        x1, y1, x2, y2 = record.box
        width, height = record.size
        area = (x2 - x1) * (y2 - y1)
        size = "small" if area < SMALL_AREA else "medium" if area < MEDIUM_AREA else "large"
        # The centre is half of x1 + x2, and a part is a third of the side: together 1.5. A
        # centre on the last edge belongs to the last part.
        column = COLUMNS[min(2, int(1.5 * (x1 + x2) / width))]
        row = ROWS[min(2, int(1.5 * (y1 + y2) / height))]
        distractors = len(boxes[record.image, record.category] - {record.box})
        image = category = None
        if train is not None:
            image = "also in train" if record.image in train_images else "disjoint"
        if train is not None and record.category:
            category = "seen" if record.category in train_categories else "unseen"
        values["size"].append(size)
        values["category"].append(record.category or None)
        values["region"].append(f"{row} {column}")
        values["kind"].append(record.kind or None)
        values["distractors"].append(str(distractors) if distractors < 3 else "3 or more")
        values["train image"].append(image)
        values["train category"].append(category)
    return values


def breakdowns(
        values: Mapping[str, Sequence[str | None]], iou: Tensor, inclusive: bool,
) -> dict[str, dict[str, dict[str, float]]]:
    """`properties` and IoU (N,) -> property -> value -> {"n", "mIoU", "Pr@0.5"}.

    Properties that no record has are left out.
    """
    right = hits(iou, 0.5, inclusive).double()
    tables = defaultdict(dict)
    for name, of_records in values.items():
        for value in sorted({value for value in of_records if value is not None}):
            rows = [i for i, other in enumerate(of_records) if other == value]
            tables[name][value] = {
                "n": len(rows), "mIoU": iou[rows].mean().item(),
                "Pr@0.5": right[rows].mean().item()}
    return dict(tables)


def sampled(
        boxes: Tensor, target: Tensor, size: Tensor, inclusive: bool,
) -> dict[str, int | float | None | dict[str, float]]:
    """Scores of k samples of each record: boxes (N, k, 4), NaN for no box; target (N, 4).

    "pass": the chance that the best of j samples has IoU > 0.5, for 1, the powers of two and k.
    With c right samples of k it is 1 - C(k - c, j) / C(k, j), unbiased (Chen et al., arXiv
    2107.03374). "dispersion": mean `reward.dispersion` of records with two boxes or more, None
    if there are none.
    """
    n, k, _ = boxes.shape
    right = []
    for j in range(k):
        right.append(hits(overlaps(boxes[:, j], target, size).iou, 0.5, inclusive))
    counts = torch.stack(right, 1).sum(1).tolist()                    # N
    chances = {}
    for j in sorted({1, k, *(2 ** i for i in range(1, k.bit_length()))}):
        passed = sum(1 - math.comb(k - c, j) / math.comb(k, j) for c in counts)
        chances[str(j)] = passed / n
    valid = ~boxes[..., 0].isnan()                                    # (N, k)
    scatter = reward.dispersion(boxes, valid, size)[valid.sum(1) >= 2]
    return {
        "samples": k, "pass": chances,
        "dispersion": scatter.mean().item() if len(scatter) else None}


# ---------------------------------------------------------------- intervals

def bootstrap(
        records: Sequence[Record], rates: Mapping[Any, tuple[Tensor, Tensor | None]],
        draws: int = 2000, seed: int = 0,
) -> dict[Any, np.ndarray]:
    """Resamples images, not records: records of one image are hard for the same reasons.

    rates: name -> values (N,) and weights (N,), None for weights of 1. A rate is the sum of
    values over the sum of weights. -> name -> (draws,) rates.
    """
    numbers: dict[Any, int] = {}
    image = np.array([numbers.setdefault(record.image, len(numbers)) for record in records])
    n = len(numbers)
    # How often each image is drawn, (draws, n).
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=draws)
    drawn = {}
    for name, (values, weights) in rates.items():
        weights = np.ones(len(records)) if weights is None else weights
        numerator = counts @ np.bincount(image, values, n)            # (draws,)
        denominator = counts @ np.bincount(image, weights, n)
        drawn[name] = numerator / np.maximum(denominator, 1e-12)
    return drawn


def intervals(
        records: Sequence[Record], rates: Mapping[Any, tuple[Tensor, Tensor | None]],
) -> dict[Any, list[float]]:
    """95% percentile `bootstrap` over images: name of a rate -> [low, high]."""
    drawn = bootstrap(records, rates)
    return {name: np.percentile(values, INTERVAL).tolist() for name, values in drawn.items()}


def paired(
        records: Sequence[Record], a: Tensor, b: Tensor, inclusive: bool = False,
) -> dict[str, dict[str, Any]]:
    """Is B better than A? a, b (N,): their IoU on the same records.

    -> score -> {"difference": B - A, "ci": its 95% interval [low, high], "p": two-sided}. Every
    draw takes the same images for both.
    """
    differences = {"mIoU": (b - a, None)}
    for t in THRESHOLDS:
        right_a = hits(a, t, inclusive).double()
        differences[f"Pr@{t}"] = (hits(b, t, inclusive).double() - right_a, None)
    tests = {}
    for name, drawn in bootstrap(records, differences).items():
        # Twice the share of draws that are 0 or of the rarer sign. One more draw, at 0, is
        # counted, so p is never 0.
        rarer = 1 + min((drawn <= 0).sum(), (drawn >= 0).sum())
        tests[name] = {
            "difference": differences[name][0].mean().item(),
            "ci": np.percentile(drawn, INTERVAL).tolist(),
            "p": min(1.0, 2 * (rarer / (len(drawn) + 1)))}
    return tests
