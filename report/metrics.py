"""Scores, their intervals and breakdowns: pure functions of boxes, image sizes and records.

Boxes are xyxy floats in pixels of the original image (no +1 pixel), clamped to it before they are
compared; a row of NaN is a miss. Sizes are (W, H). N records, k samples each.
"""
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
INTERVAL = (2.5, 97.5)            # percentiles that enclose 95%
DRAWS = 2000                      # of the bootstrap
FEW_IMAGES = 20                   # with fewer images, intervals come with a warning
OFFICIAL = ("dior", "opt", "rrsisd", "rsvg-hr", "vrsbench")      # data sets that `official` knows
LETTERBOX = 640                   # pixels, side of the padded images in scripts for dior and opt
BOTH_ENDS = torch.tensor([0, 0, 1, 1])
SMALL_AREA, MEDIUM_AREA = 32 ** 2, 96 ** 2       # square pixels; COCO's limits
Scores = dict[str, float | int | None]
# Name of a rate -> values (N,), weights (N,) or None. The rate is sum(values) / sum(weights).
Rates = Mapping[Any, tuple[Tensor, Tensor | None]]
Interval = list[float] | None     # [low, high]
Properties = dict[str, list[str | None]]         # property -> N values, None if unknown


class Overlaps(NamedTuple):
    valid: Tensor             # (N,) bool: the predicted box has an area in the image
    iou: Tensor               # (N,) `reward.agreement`, 0 without a box
    intersection: Tensor      # (N,) square pixels
    union: Tensor             # (N,) square pixels; without a box, the target's area
    distance: Tensor          # (N,) `reward.center_distance`; meaningless without a box


def overlaps(pred: Tensor, gt: Tensor, size: Tensor) -> Overlaps:
    """pred, gt (N, 4), size (N, 2)."""
    corner = size.double().repeat(1, 2)                               # (N, 4)
    pred = pred.double().clamp(min=0).minimum(corner)
    gt = gt.double().clamp(min=0).minimum(corner)
    valid = reward.has_area(pred)
    # A miss becomes an empty box in a corner of its target, so the union is the target's area.
    pred = torch.where(valid[:, None], pred, gt[:, :2].repeat(1, 2))
    intersection, union = reward.intersection_union(pred, gt)
    distance = reward.center_distance(pred, gt, size.double())
    agreement = reward.agreement(pred, gt).masked_fill(~valid, 0)
    return Overlaps(valid, agreement, intersection, union, distance)


def record_scores(iou: Tensor, inclusive: bool) -> dict[str, Tensor]:
    """IoU (...) -> score -> (...), to be averaged. inclusive: Pr@t counts IoU >= t, not > t."""
    values = {"mIoU": iou}
    for t in THRESHOLDS:
        values[f"Pr@{t}"] = (iou >= t if inclusive else iou > t).double()
    return values


def metrics(pred: Tensor, gt: Tensor, size: Tensor, inclusive: bool = False) -> Scores:
    """The scores of an eval.json row (docs/logs.md). mIoU, cIoU and Pr@t follow DIOR-RSVG's own
    evaluation, without its letterbox; center_error is ours."""
    overlap = overlaps(pred, gt, size)
    scores = record_scores(overlap.iou, inclusive)
    row: Scores = {name: x.sum().item() / max(len(gt), 1) for name, x in scores.items()}
    row["cIoU"] = overlap.intersection.sum().item() / max(overlap.union.sum().item(), 1e-12)
    distance = overlap.distance[overlap.valid]
    row["center_error"] = distance.mean().item() if len(distance) else None
    row["n"] = len(gt)
    return row


def targets(records: Sequence[Record]) -> tuple[Tensor, Tensor]:
    """-> boxes (N, 4), image sizes (N, 2), double."""
    sizes = torch.tensor([record.size for record in records], dtype=torch.float64)
    return box_tensor([record.box for record in records]), sizes


def box_tensor(boxes: Sequence[Sequence[float] | None]) -> Tensor:
    """-> (N, 4) double, NaN for None."""
    return torch.tensor([box or [math.nan] * 4 for box in boxes], dtype=torch.float64)


def centre_box(records: Sequence[Record]) -> Scores:
    """Scores of a guess (ours): a box in the middle of each image, with the records' median width
    and height relative to their images."""
    gt, size = targets(records)
    half = ((gt[:, 2:] - gt[:, :2]) / size).median(0).values / 2      # (2,)
    guess = torch.cat((size * (0.5 - half), size * (0.5 + half)), 1)  # (N, 4)
    return metrics(guess, gt, size)


def official(name: str, pred: Tensor, records: Sequence[Record]) -> dict[str, Any] | None:
    """What the script of a data set's authors would print (docs/logs.md); None for other data.
    pred (N, 4): answers in original pixels, not cut to the image; NaN for none."""
    if name not in OFFICIAL:
        return None
    gt, size = targets(records)
    corner = size.repeat(1, 2)                                        # (N, 4)
    if name == "vrsbench":
        # Whole hundredths of the sides; both ends count, so a line has an area. 29% of a side may
        # come back from pixels as 28.999..., so add a little before the floor. The script finds
        # digits, so it does not see a minus sign.
        pred = (100 * pred.abs() / corner + 1e-6).floor() + BOTH_ENDS
        grid = box_tensor([record.grid for record in records])
        gt = torch.where(grid.isnan(), (100 * gt / corner + 1e-6).floor(), grid) + BOTH_ENDS
    elif name == "rsvg-hr":
        gt = box_tensor([record.uncut or record.box for record in records])
    scale = LETTERBOX / size.amax(1, keepdim=True)                    # (N, 1)
    if name == "dior":
        # Targets are truncated to whole pixels of an image padded to LETTERBOX x LETTERBOX.
        padding = (LETTERBOX - (size * scale).round()).repeat(1, 2) / 2
        gt = ((gt.trunc() * scale + padding).trunc() - padding) / scale
    if name in ("dior", "opt", "rrsisd"):
        pred, gt = (boxes.clamp(min=0).minimum(corner) for boxes in (pred, gt))
    valid = reward.has_area(pred)
    pred = torch.where(valid[:, None], pred, gt[:, :2].repeat(1, 2))
    intersection, union = reward.intersection_union(pred, gt)
    little = 1e-6 if name == "rsvg-hr" else 0.0
    iou = ((intersection + little) / (union + little)).masked_fill(~valid, 0)
    scores = record_scores(iou, inclusive=name in ("opt", "rrsisd", "vrsbench"))
    weight = scale[:, 0] ** 2 if name == "opt" else torch.ones(len(records))
    parts = {"all": (True, False, None)}
    if name == "vrsbench":
        # Its script leaves answers without a box out of cIoU.
        weight = valid.double()
        parts |= {"unique": (True,), "non_unique": (False,)}
        scores = {f"Acc@{t}": scores[f"Pr@{t}"] for t in (0.5, 0.7)} | {"mIoU": iou}
    found = {}
    for part, values in parts.items():
        rows = [i for i, record in enumerate(records) if record.unique in values]
        if rows:
            found[part] = {rate: x[rows].mean().item() for rate, x in scores.items()}
            shared, covered = (((x * weight)[rows]).sum().item() for x in (intersection, union))
            found[part] |= {"cIoU": shared / max(covered, 1e-12), "n": len(rows)}
    return found if name == "vrsbench" else found["all"]


def official_parts(row: Mapping[str, Any]) -> list[tuple[str, Scores]]:
    """A row of eval.json -> (part of the records, scores) of what is in `official`."""
    scores = row.get("official", {})
    return list(scores.items()) if "all" in scores else [("all", scores)] if scores else []


def properties(records: Sequence[Record], train: Sequence[Record] | None,
               split: Sequence[Record]) -> Properties:
    """train: the records trained on, or None; split: all records of the scored split. Other objects
    in either, of the same category and image, are distractors."""
    # Only annotated objects are known; a drawn scene lists all of its objects.
    boxes = defaultdict(set)                     # (image, category) -> boxes
    for record in [*(train or ()), *split]:
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
        # The centre (x1 + x2) / 2 in thirds of the side: factor 3 / 2. The far edge is in the last.
        column = ("left", "centre", "right")[min(2, int(1.5 * (x1 + x2) / width))]
        row = ("top", "middle", "bottom")[min(2, int(1.5 * (y1 + y2) / height))]
        distractors = len(boxes[record.image, record.category] - {record.box})
        image = category = None
        if train is not None:
            image = "also in train" if record.image in train_images else "disjoint"
            category = "seen" if record.category in train_categories else "unseen"
        of_record = {
            "size": size, "category": record.category, "region": f"{row} {column}",
            "kind": record.kind,
            "distractors": str(distractors) if distractors < 3 else "3 or more",
            "train image": image, "train category": record.category and category}
        for name, value in of_record.items():
            values[name].append(value or None)
    return values


def breakdowns(values: Properties, iou: Tensor, inclusive: bool) -> dict[str, dict[str, Scores]]:
    """IoU (N,) -> property -> value -> {"n", "mIoU", "Pr@0.5"}, without unknown properties."""
    scores = record_scores(iou, inclusive)
    tables = defaultdict(dict)
    for name, of_records in values.items():
        for value in sorted(set(of_records) - {None}):
            rows = [i for i, other in enumerate(of_records) if other == value]
            means = {rate: scores[rate][rows].mean().item() for rate in ("mIoU", "Pr@0.5")}
            tables[name][value] = {"n": len(rows), **means}
    return dict(tables)


def sampled(boxes: Tensor, target: Tensor, size: Tensor, inclusive: bool) -> dict[str, Any]:
    """boxes (N, k, 4), NaN for no box; target (N, 4).
    "pass": chance that the best of j samples has IoU > 0.5, for j = 1, 2, 4, ... and k.
    With c right samples of k it is 1 - C(k - c, j) / C(k, j), unbiased (Chen et al., arXiv
    2107.03374). "dispersion": mean `reward.dispersion` of records with two boxes or more."""
    n, k, _ = boxes.shape
    iou = torch.stack([overlaps(boxes[:, j], target, size).iou for j in range(k)])
    right = record_scores(iou, inclusive)["Pr@0.5"]                   # (k, N)
    counts = right.sum(0).int().tolist()                              # N
    chances = {}
    for j in sorted({k, *(2 ** i for i in range(k.bit_length()))}):
        chances[str(j)] = sum(1 - math.comb(k - c, j) / math.comb(k, j) for c in counts) / n
    valid = ~boxes[..., 0].isnan()                                    # (N, k)
    scatter = reward.dispersion(boxes, valid, size)[valid.sum(1) >= 2]
    return {"samples": k, "pass": chances,
            "dispersion": scatter.mean().item() if len(scatter) else None}


def bootstrap(
        records: Sequence[Record], rates: Rates) -> dict[Any, tuple[np.ndarray, Interval]]:
    """Resamples images, because records of one image are hard for the same reasons.
    -> name of a rate -> its values (DRAWS,), and their 95% interval, None from a single image."""
    numbers: dict[Any, int] = {}
    image = np.array([numbers.setdefault(record.image, len(numbers)) for record in records])
    n = len(numbers)
    # How often each image is drawn, (DRAWS, n).
    counts = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=DRAWS)
    drawn = {}
    for name, (values, weights) in rates.items():
        weights = np.ones(len(records)) if weights is None else weights
        numerator = counts @ np.bincount(image, values, n)            # (DRAWS,)
        denominator = counts @ np.bincount(image, weights, n)
        rate = numerator / np.maximum(denominator, 1e-12)
        drawn[name] = rate, np.percentile(rate, INTERVAL).tolist() if n > 1 else None
    return drawn


def paired(records: Sequence[Record], a: Tensor, b: Tensor,
           inclusive: bool = False) -> dict[str, dict[str, Any]]:
    """Is B better than A? a, b (N,): their IoU on the same records.
    -> score -> {"difference": B - A, "ci": its 95% interval [low, high], "p": two-sided}; with a
    single image the last two are None."""
    of_a, of_b = record_scores(a, inclusive), record_scores(b, inclusive)
    differences = {name: (of_b[name] - of_a[name], None) for name in of_a}
    tests = {}
    for name, (drawn, ci) in bootstrap(records, differences).items():
        # Twice the share of draws with the rarer sign or 0; one more draw is added, so p > 0.
        rarer = 1 + min((drawn <= 0).sum(), (drawn >= 0).sum())
        tests[name] = {"difference": differences[name][0].mean().item(), "ci": ci,
                       "p": min(1.0, 2 * (rarer / (len(drawn) + 1))) if ci else None}
    return tests


def interval_text(ci: Interval, images: int, sign: str = "") -> str:
    if not ci:
        return "no interval from 1 image"
    few = f" from only {images} images" if images < FEW_IMAGES else ""
    return f"[{ci[0]:{sign}.3f}, {ci[1]:{sign}.3f}]{few}"
