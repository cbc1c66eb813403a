"""Scores, their intervals and breakdowns: pure functions of boxes, sizes and records.

Boxes are clamped to the image and compared in pixels of the original image, as floats (no +1 pixel); a row of NaN is a miss.
"""
import itertools
import math
from collections import defaultdict

import numpy as np
import torch

import reward

THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9)


# ------------------------------------------------------------------------------------------------------------------ scores

def metrics(pred, gt, size, inclusive=False):
    """pred, gt (N, 4) xyxy in original pixels, size (N, 2) as (W, H) -> dict of floats, rates as fractions. All boxes are clamped first; a
    NaN row of pred, or one without area in the image, is a miss: its IoU is 0 and its target's area joins the union of cIoU.

    mIoU: mean IoU; Pr@t: share with IoU > t (>= t where inclusive); cIoU: sum of intersections over sum of unions; center_error: mean
    `reward.center_distance` over the valid rows, None where there is none; n: N."""
    valid, iou, inside, union, away = overlaps(pred, gt, size)
    n = len(gt)
    return {"mIoU": iou.sum().item() / max(n, 1), **{f"Pr@{t}": hits(iou, t, inclusive).sum().item() / max(n, 1) for t in THRESHOLDS},
            "cIoU": inside.sum().item() / max(union.sum().item(), 1e-12),
            "center_error": away[valid].mean().item() if valid.any() else None, "n": n}


def centre_box(records):
    """What a guess scores that looks at nothing: a box in the middle of each image, of the median width and height of these records."""
    gt, size = targets(records)
    half = ((gt[:, 2:] - gt[:, :2]) / size).median(0).values / 2
    return metrics(torch.cat((size * (0.5 - half), size * (0.5 + half)), 1), gt, size)


def overlaps(pred, gt, size):
    """As `metrics` -> (N,) each: is there a box, IoU, area of intersection and of union (pixels), `reward.center_distance` (of no meaning
    where there is no box)."""
    pred, gt, size = pred.double(), gt.double(), size.double()
    pred, gt = (box.clamp(min=0).minimum(size.repeat(1, 2)) for box in (pred, gt))
    valid = (pred[:, 2:] > pred[:, :2]).all(1)                           # (N,); False for NaN
    pred = torch.where(valid[:, None], pred, gt[:, :2].repeat(1, 2))     # a miss is a box without area
    return valid, reward.iou(pred, gt), *reward.intersection_union(pred, gt), reward.center_distance(pred, gt, size)


def hits(iou, t, inclusive):
    return iou >= t if inclusive else iou > t


def vrsbench_iou(pred, gt, size, grid=None):
    """As `metrics` -> (N,) IoU as VRSBench's own evaluation computes it: boxes cut down to whole hundredths of the image's sides, both ends
    counted in (+1). A box that is a line or a point has an area there, and is hit by one of the same cells. NaN rows are 0.
    grid (N, 4): the targets in whole hundredths as the data set itself gives them, NaN where it does not."""
    size = size.double().repeat(1, 2)
    p, g = ((100 * (box.double().clamp(min=0).minimum(size) / size) + 1e-6).floor() for box in (pred, gt))         # 29% is 29
    g = g if grid is None else torch.where(grid.isnan(), g, grid.double())
    inside = (torch.minimum(p[:, 2:], g[:, 2:]) - torch.maximum(p[:, :2], g[:, :2]) + 1).clamp(min=0).prod(1)
    area_p, area_g = ((box[:, 2:] - box[:, :2] + 1).prod(1) for box in (p, g))
    return (inside / (area_p + area_g - inside)).nan_to_num(0.0)


def vrsbench(pred, gt, size, unique, grid=None):
    """The official VRSBench metric: share of all samples with `vrsbench_iou` >= 0.5 and 0.7; unique: N of True, False or None (unknown)."""
    iou = vrsbench_iou(pred, gt, size, grid)
    parts = {"all": [True] * len(gt), "unique": [u is True for u in unique], "non_unique": [u is False for u in unique]}
    masks = {name: torch.tensor(mask, dtype=torch.bool) for name, mask in parts.items()}
    return {name: {"n": int(m.sum()), **{f"Acc@{t}": (iou[m] >= t).double().mean().item() for t in (0.5, 0.7)}}
            for name, m in masks.items() if m.any()}


def tensor(boxes):
    """N boxes or None -> (N, 4) double, NaN where there is none."""
    return torch.tensor([box or [math.nan] * 4 for box in boxes], dtype=torch.float64)


def targets(records):
    """N records -> their boxes (N, 4) in original pixels, their images' sizes (N, 2) as (W, H), double."""
    return tuple(torch.tensor([getattr(r, key) for r in records], dtype=torch.float64) for key in ("box", "size"))


def properties(records, train, split):
    """Property -> its value for each record, None where unknown. size: COCO's limits, 32 x 32 and 96 x 96 pixels; region: where in the
    image's three by three parts the target's centre lies; distractors: other annotated boxes of its category in its image (what no
    expression of train or of this split names is not counted); train image, train category: does train have them too."""
    boxes = defaultdict(set)
    for r in itertools.chain(train or (), split):
        boxes[r.image, r.category].add(r.box)
        for o in getattr(r.image, "objects", ()):                        # a drawn scene knows them all
            boxes[r.image, o.category].add(tuple(map(float, o.box)))
    images, categories = ({getattr(r, key) for r in train or ()} for key in ("image", "category"))
    values = defaultdict(list)
    for r in records:
        (x1, y1, x2, y2), (W, H), others = r.box, r.size, len(boxes[r.image, r.category] - {r.box})
        column, row = min(2, int(1.5 * (x1 + x2) / W)), min(2, int(1.5 * (y1 + y2) / H))
        area = (x2 - x1) * (y2 - y1)
        values["size"].append("small" if area < 32 ** 2 else "medium" if area < 96 ** 2 else "large")
        values["category"].append(r.category or None)
        values["region"].append(f"{('top', 'middle', 'bottom')[row]} {('left', 'centre', 'right')[column]}")
        values["kind"].append(r.kind or None)
        values["distractors"].append(str(others) if others < 3 else "3 or more")
        values["train image"].append(None if train is None else "also in train" if r.image in images else "disjoint")
        values["train category"].append(None if train is None or not r.category else "seen" if r.category in categories else "unseen")
    return values


def sampled(boxes, target, size, inclusive):
    """boxes (N, k, 4): k samples a record, NaN where invalid; target (N, 4), size (N, 2) -> "samples": k; "pass": {j: chance that the best
    of j has IoU > 0.5}, unbiased, 1 - C(k - c, j) / C(k, j) for c hits (Chen et al., arXiv 2107.03374); "dispersion": mean
    `reward.dispersion` of the records with two valid boxes or more, in image sides."""
    k = boxes.shape[1]
    valid = ~boxes[..., 0].isnan()
    each = [hits(overlaps(boxes[:, j], target, size)[1], 0.5, inclusive) for j in range(k)]
    right = torch.stack(each, 1).sum(1).tolist()
    tries = sorted({1, *(2 ** i for i in range(1, k.bit_length()) if 2 ** i <= k), k})
    scatter = reward.dispersion(boxes, valid, size)[valid.sum(1) >= 2]
    return {"samples": k, "pass": {str(j): sum(1 - math.comb(k - c, j) / math.comb(k, j) for c in right) / len(right) for j in tries},
            "dispersion": scatter.mean().item() if len(scatter) else None}


# ------------------------------------------------------------------------------------------------------------------ chance

def resample(records, draws=2000, seed=0):
    """How often each of I images is drawn in each resample: counts (draws, I), and each record's image (N,). Images are drawn, not records:
    those of one image share what is hard about it."""
    places = {}
    image = np.array([places.setdefault(r.image, len(places)) for r in records])
    return np.random.default_rng(seed).multinomial(len(places), np.full(len(places), 1 / len(places)), size=draws), image


def intervals(records, rates):
    """rates: name -> (values (N,), weights (N,) or None for 1 each), a rate being sum of values over sum of weights -> name -> [low, high],
    95% percentile bootstrap over images."""
    counts, image = resample(records)
    found = {}
    for name, (values, weights) in rates.items():
        above, below = (np.bincount(image, v, counts.shape[1]) for v in (values, np.ones(len(records)) if weights is None else weights))
        found[name] = np.percentile(counts @ above / np.maximum(counts @ below, 1e-12), (2.5, 97.5)).tolist()
    return found


def paired(records, a, b, inclusive=False):
    """IoU a and b (N,) of two predictions of the same records -> name -> {"difference" (b - a), "ci" (95%), "p"}: both are resampled by the
    same images, and p is two-sided: twice the share of resamples whose difference is 0 or on the rarer side of it, counted with one more at
    0."""
    iou = [a, b]
    counts, image = resample(records)
    n = counts @ np.bincount(image, minlength=counts.shape[1])
    found = {}
    for name, (x, y) in {"mIoU": iou, **{f"Pr@{t}": [hits(v, t, inclusive).double() for v in iou] for t in THRESHOLDS}}.items():
        apart = counts @ np.bincount(image, (y - x).numpy(), counts.shape[1]) / n
        p = min(1.0, 2 * min(((apart <= 0).sum() + 1) / (len(apart) + 1), ((apart >= 0).sum() + 1) / (len(apart) + 1)))
        found[name] = {"difference": (y - x).mean().item(), "ci": np.percentile(apart, (2.5, 97.5)).tolist(), "p": p}
    return found
