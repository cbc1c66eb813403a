"""Scores, their intervals and breakdowns: pure functions of boxes, sizes and records.

Boxes are xyxy floats in pixels of the original image (no +1 pixel). All are clamped to
the image before they are compared. A row of NaN is a record without a box: a miss.
Rates are fractions.

N records, k samples of each. Sizes are (W, H).
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
INTERVAL = (2.5, 97.5)            # percentiles: 95% lie between them
SMALL_AREA = 32 ** 2              # square pixels; COCO's limits of small, medium and large
MEDIUM_AREA = 96 ** 2
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "centre", "right")


# ---------------------------------------------------------------- scores

class Overlaps(NamedTuple):
    """How N predicted boxes lie to their targets."""

    valid: Tensor             # (N,) bool: there is a box with an area in the image
    iou: Tensor               # (N,) `reward.agreement`, 0 where there is no box
    intersection: Tensor      # (N,) square pixels
    union: Tensor             # (N,) square pixels; the target's where there is no box
    distance: Tensor          # (N,) `reward.center_distance`; of no meaning without a box


def metrics(
        pred: Tensor, gt: Tensor, size: Tensor, inclusive: bool = False,
) -> dict[str, float | int | None]:
    """The scores of N predictions; they join a row of eval.json.

    pred, gt (N, 4), size (N, 2). mIoU: mean IoU. Pr@t: share with IoU > t (>= t where
    inclusive). cIoU: sum of intersections over sum of unions. center_error: mean
    `reward.center_distance` over the valid rows, in image sides, None where none is
    valid. n: N.

    A miss has IoU 0, and its target's area joins the union of cIoU. Source: mIoU, cIoU
    and Pr@t as in the evaluation that DIOR-RSVG comes with, but for its letterbox;
    center_error is ours."""
    overlap = overlaps(pred, gt, size)
    n = len(gt)
    row: dict[str, float | int | None] = {"mIoU": overlap.iou.sum().item() / max(n, 1)}
    for t in THRESHOLDS:
        row[f"Pr@{t}"] = hits(overlap.iou, t, inclusive).sum().item() / max(n, 1)
    union = overlap.union.sum().item()
    row["cIoU"] = overlap.intersection.sum().item() / max(union, 1e-12)
    row["center_error"] = None
    if overlap.valid.any():
        row["center_error"] = overlap.distance[overlap.valid].mean().item()
    row["n"] = n
    return row


def centre_box(records: Sequence[Record]) -> dict[str, float | int | None]:
    """What a guess scores that looks at nothing -> as `metrics`.

    The guess is a box in the middle of each image, of the median width and height of
    these records' boxes, in image sides. Ours: the floor under every score."""
    gt, size = targets(records)
    half = ((gt[:, 2:] - gt[:, :2]) / size).median(0).values / 2  # (2,)
    guess = torch.cat((size * (0.5 - half), size * (0.5 + half)), 1)  # (N, 4)
    return metrics(guess, gt, size)


def overlaps(pred: Tensor, gt: Tensor, size: Tensor) -> Overlaps:
    """pred, gt (N, 4), size (N, 2) -> Overlaps, double. All boxes are clamped first."""
    size = size.double()
    corner = size.repeat(1, 2)  # (N, 4)
    pred = pred.double().clamp(min=0).minimum(corner)
    gt = gt.double().clamp(min=0).minimum(corner)
    valid = reward.has_area(pred)
    # A miss becomes a box without area in a corner of its target. So it intersects with
    # nothing, and its union is the target's area.
    point = gt[:, :2].repeat(1, 2)
    pred = torch.where(valid[:, None], pred, point)
    intersection, union = reward.intersection_union(pred, gt)
    distance = reward.center_distance(pred, gt, size)
    return Overlaps(valid, reward.agreement(pred, gt), intersection, union, distance)


def hits(iou: Tensor, threshold: float, inclusive: bool) -> Tensor:
    """IoU (...) -> which count as right, (...) bool.

    inclusive: one equal to the threshold does too. Data sets differ in it."""
    return iou >= threshold if inclusive else iou > threshold


def tensor(boxes: Sequence[Sequence[float] | None]) -> Tensor:
    """N boxes or None -> (N, 4) double, NaN where there is none."""
    return torch.tensor([box or [math.nan] * 4 for box in boxes], dtype=torch.float64)


def targets(records: Sequence[Record]) -> tuple[Tensor, Tensor]:
    """N records -> their boxes (N, 4), their images' sizes (N, 2); double."""
    boxes = torch.tensor([record.box for record in records], dtype=torch.float64)
    sizes = torch.tensor([record.size for record in records], dtype=torch.float64)
    return boxes, sizes


# ---------------------------------------------------------------- VRSBench's own metric

def vrsbench_iou(
        pred: Tensor, gt: Tensor, size: Tensor, grid: Tensor | None = None,
) -> Tensor:
    """IoU as VRSBench's own evaluation computes it.

    pred, gt (N, 4), size (N, 2) -> (N,), 0 for NaN rows. grid (N, 4): the targets in
    whole hundredths as the data set itself gives them, NaN where it does not.

    Boxes are cut down to whole hundredths of the image's sides, and both ends are
    counted in (+1). So a box that is a line or a point has an area, and is hit by one
    of the same cells."""
    size = size.double().repeat(1, 2)  # (N, 4)
    pred_cells = whole_hundredths(pred, size)
    gt_cells = whole_hundredths(gt, size)
    if grid is not None:
        gt_cells = torch.where(grid.isnan(), gt_cells, grid.double())
    top_left = torch.maximum(pred_cells[:, :2], gt_cells[:, :2])
    bottom_right = torch.minimum(pred_cells[:, 2:], gt_cells[:, 2:])
    intersection = (bottom_right - top_left + 1).clamp(min=0).prod(1)
    pred_area = (pred_cells[:, 2:] - pred_cells[:, :2] + 1).prod(1)
    gt_area = (gt_cells[:, 2:] - gt_cells[:, :2] + 1).prod(1)
    return (intersection / (pred_area + gt_area - intersection)).nan_to_num(0.0)


def whole_hundredths(boxes: Tensor, corner: Tensor) -> Tensor:
    """Pixels -> cells: boxes (N, 4), corner (N, 4) as (W, H, W, H) -> (N, 4), 0 to 100."""
    share = boxes.double().clamp(min=0).minimum(corner) / corner
    # 29% of a side comes back from pixels as 28.999...; it is 29.
    return (100 * share + 1e-6).floor()


def vrsbench(
        pred: Tensor, gt: Tensor, size: Tensor, unique: Sequence[bool | None],
        grid: Tensor | None = None,
) -> dict[str, dict[str, float | int]]:
    """VRSBench's own metric: share of records with `vrsbench_iou` >= 0.5 and >= 0.7.

    pred, gt (N, 4), size (N, 2), grid as in `vrsbench_iou`. unique: N of whether the
    target is the only object of its category in its image, None where that is unknown.
    -> part -> {"n", "Acc@0.5", "Acc@0.7"}; parts are "all", "unique" and "non_unique",
    those that have records."""
    iou = vrsbench_iou(pred, gt, size, grid)
    parts = {
        "all": [True] * len(gt),
        "unique": [value is True for value in unique],
        "non_unique": [value is False for value in unique],
    }
    scores = {}
    for part, members in parts.items():
        mask = torch.tensor(members, dtype=torch.bool)
        if mask.any():
            scores[part] = {"n": int(mask.sum())}
            for t in VRSBENCH_THRESHOLDS:
                scores[part][f"Acc@{t}"] = (iou[mask] >= t).double().mean().item()
    return scores


# ---------------------------------------------------------------- breakdowns

def properties(
        records: Sequence[Record], train: Sequence[Record] | None,
        split: Sequence[Record],
) -> dict[str, list[str | None]]:
    """What scores are broken down by: property -> N values, None where one is unknown.

    train: the records trained on (None: the data set has none); split: all records of
    the split that these belong to, for `distractors`.

    size: `size_class`; region: `region`; category and kind: the record's own;
    distractors: other annotated boxes of its category in its image, "0" to "2" or "3 or
    more"; train image: is its image "also in train" or "disjoint"; train category: is
    its category "seen" in train or "unseen"."""
    boxes = annotated_boxes(itertools.chain(train or (), split))
    values: dict[str, list[str | None]] = defaultdict(list)
    train_images = {record.image for record in train or ()}
    train_categories = {record.category for record in train or ()}
    for record in records:
        values["size"].append(size_class(record.box))
        values["category"].append(record.category or None)
        values["region"].append(region(record.box, record.size))
        values["kind"].append(record.kind or None)
        distractors = len(boxes[record.image, record.category] - {record.box})
        values["distractors"].append(str(distractors) if distractors < 3 else "3 or more")
        image = None
        category = None
        if train is not None:
            image = "also in train" if record.image in train_images else "disjoint"
        if train is not None and record.category:
            category = "seen" if record.category in train_categories else "unseen"
        values["train image"].append(image)
        values["train category"].append(category)
    return values


def annotated_boxes(records: Sequence[Record]) -> dict[tuple[Any, str], set[tuple]]:
    """(image, category) -> every box that is known there.

    What no expression of these records names is not known, but where the image is a
    drawn scene: that knows all its objects."""
    boxes = defaultdict(set)
    for record in records:
        boxes[record.image, record.category].add(record.box)
        for drawn in getattr(record.image, "objects", ()):
            boxes[record.image, drawn.category].add(tuple(map(float, drawn.box)))
    return boxes


def size_class(box: Sequence[float]) -> str:
    """"small", "medium" or "large": COCO's limits, 32 x 32 and 96 x 96 pixels."""
    x1, y1, x2, y2 = box
    area = (x2 - x1) * (y2 - y1)
    if area < SMALL_AREA:
        return "small"
    return "medium" if area < MEDIUM_AREA else "large"


def region(box: Sequence[float], size: tuple[int, int]) -> str:
    """Which of the image's three by three parts has the box's centre: "top left"."""
    x1, y1, x2, y2 = box
    width, height = size
    # The centre is half the sum, and a part a third of the side: together 1.5. A centre
    # on the last edge belongs to the last part.
    column = min(2, int(1.5 * (x1 + x2) / width))
    row = min(2, int(1.5 * (y1 + y2) / height))
    return f"{ROWS[row]} {COLUMNS[column]}"


# ---------------------------------------------------------------- several samples

def sampled(
        boxes: Tensor, target: Tensor, size: Tensor, inclusive: bool,
) -> dict[str, int | float | None | dict[str, float]]:
    """What k samples of each record say: boxes (N, k, 4), NaN where there is none.

    target (N, 4), size (N, 2) -> "samples": k; "pass": {j as text: `pass_at` of the
    records}, for 1, the powers of two and k; "dispersion": mean `reward.dispersion` of
    the records with two boxes or more, in image sides, None where there is none."""
    k = boxes.shape[1]
    valid = ~boxes[..., 0].isnan()  # (N, k)
    right = []
    for j in range(k):
        right.append(hits(overlaps(boxes[:, j], target, size).iou, 0.5, inclusive))
    counts = torch.stack(right, 1).sum(1).tolist()  # N
    scatter = reward.dispersion(boxes, valid, size)[valid.sum(1) >= 2]
    tries = {1, k}
    tries.update(2 ** i for i in range(1, k.bit_length()))
    return {
        "samples": k,
        "pass": {str(j): pass_at(j, k, counts) for j in sorted(tries)},
        "dispersion": scatter.mean().item() if len(scatter) else None,
    }


def pass_at(j: int, k: int, counts: Sequence[int]) -> float:
    """Chance that the best of j samples has IoU > 0.5, mean over records.

    counts: N of how many of a record's k samples have it. The estimate is unbiased: for
    a count of c it is 1 - C(k - c, j) / C(k, j).

    Source: Chen et al., arXiv 2107.03374."""
    return sum(1 - math.comb(k - c, j) / math.comb(k, j) for c in counts) / len(counts)


# ---------------------------------------------------------------- chance

def resample(
        records: Sequence[Record], draws: int = 2000, seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """The bootstrap's draws.

    -> how often each of I images is drawn, (draws, I), and each record's image, (N,),
    from 0 to I - 1.

    Images are drawn, not records: those of one image share what is hard about it."""
    numbers: dict[Any, int] = {}
    image = np.array([numbers.setdefault(record.image, len(numbers)) for record in records])
    chances = np.full(len(numbers), 1 / len(numbers))
    counts = np.random.default_rng(seed).multinomial(len(numbers), chances, size=draws)
    return counts, image


def intervals(
        records: Sequence[Record], rates: Mapping[Any, tuple[Tensor, Tensor | None]],
) -> dict[Any, list[float]]:
    """95% percentile bootstrap over images: name of a rate -> [low, high].

    rates: name -> values (N,) and weights (N,), or None for weights of 1. A rate is the
    sum of values over the sum of weights."""
    counts, image = resample(records)
    n_images = counts.shape[1]
    bounds = {}
    for name, (values, weights) in rates.items():
        weights = np.ones(len(records)) if weights is None else weights
        numerator = counts @ np.bincount(image, values, n_images)  # (draws,)
        denominator = counts @ np.bincount(image, weights, n_images)
        rate = numerator / np.maximum(denominator, 1e-12)
        bounds[name] = np.percentile(rate, INTERVAL).tolist()
    return bounds


def paired(
        records: Sequence[Record], a: Tensor, b: Tensor, inclusive: bool = False,
) -> dict[str, dict[str, Any]]:
    """Is prediction B better than A? a, b (N,): their IoU on the same records.

    -> name of a score -> {"difference": B - A, "ci": its 95% interval [low, high],
    "p"}. Both are resampled by the same images."""
    counts, image = resample(records)
    n = counts @ np.bincount(image, minlength=counts.shape[1])  # (draws,)
    differences = {"mIoU": b - a}
    for t in THRESHOLDS:
        right_a = hits(a, t, inclusive).double()
        right_b = hits(b, t, inclusive).double()
        differences[f"Pr@{t}"] = right_b - right_a
    tests = {}
    for name, difference in differences.items():
        resampled = counts @ np.bincount(image, difference.numpy(), counts.shape[1]) / n
        tests[name] = {
            "difference": difference.mean().item(),
            "ci": np.percentile(resampled, INTERVAL).tolist(),
            "p": two_sided_p(resampled),
        }
    return tests


def two_sided_p(differences: np.ndarray) -> float:
    """Twice the share of resampled differences that are 0 or on the rarer side of it.

    differences (draws,). One more, at 0, is counted with them, so that p is never 0."""
    n = len(differences) + 1
    not_above = ((differences <= 0).sum() + 1) / n
    not_below = ((differences >= 0).sum() + 1) / n
    return min(1.0, 2 * min(not_above, not_below))
