"""The terms of the reward, and the consistency weight of a group. Pure functions of tensors.

Boxes are (x1, y1, x2, y2) in continuous pixels (no +1). If a function takes the image's size, they
are pixels of that image. Q questions, G rollouts each. A row of NaN scores 0 in every term: the
answer did not parse, or its box has no area within the image.

To add a term, write a function here and add it to TERMS. `rft.py --reward NAME=WEIGHT` then
accepts it, and metrics.jsonl, the report's curves and the study's tables show it.

docs/method.md has each formula's source: RSGround-R1 (arXiv 2601.21634), others, or ourselves.
"""
import math

import torch
from torch import Tensor

# ---------------------------------------------------------------- rewards of a box

def has_area(boxes: Tensor) -> Tensor:
    """(..., 4) -> (...) bool; False for NaN rows and infinite corners."""
    return (boxes[..., 2:] > boxes[..., :2]).all(-1) & boxes.isfinite().all(-1)


def where_boxes(value: Tensor, pred: Tensor, gt: Tensor) -> Tensor:
    """`value`, but 0 where a box has no area; in the boxes' dtype, or float32 if that is wider."""
    value = value.to(torch.promote_types(torch.result_type(pred, gt), torch.float32))
    return torch.where(has_area(pred) & has_area(gt), value, torch.zeros_like(value))


def intersection_union(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """a, b (..., 4), broadcast -> areas (...) of intersection and union; NaN for NaN rows."""
    top_left = torch.maximum(a[..., :2], b[..., :2])
    bottom_right = torch.minimum(a[..., 2:], b[..., 2:])
    intersection = (bottom_right - top_left).clamp(min=0).prod(-1)
    area_a = (a[..., 2:] - a[..., :2]).clamp(min=0).prod(-1)
    area_b = (b[..., 2:] - b[..., :2]).clamp(min=0).prod(-1)
    return intersection, area_a + area_b - intersection


def centers(boxes: Tensor) -> Tensor:
    return (boxes[..., :2] + boxes[..., 2:]) / 2


def iou(a: Tensor, b: Tensor) -> Tensor:
    """a, b (..., 4), broadcast -> IoU (...) in [0, 1]; 0 if either has no area."""
    intersection, union = intersection_union(a, b)
    return torch.where(union > 0, intersection / union, torch.zeros_like(union))


def giou(pred: Tensor, gt: Tensor) -> Tensor:
    """pred, gt (..., 4), broadcast -> (1 + GIoU) / 2 (...) in [0, 1].
    GIoU is IoU minus the share of the hull that neither box covers."""
    a, b = pred.double(), gt.double()
    _, union = intersection_union(a, b)
    hull_sides = torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])
    hull = hull_sides.prod(-1)
    return where_boxes((1 + (iou(a, b) - (hull - union) / hull)) / 2, pred, gt)


def diou(pred: Tensor, gt: Tensor) -> Tensor:
    """pred, gt (..., 4), broadcast -> (1 + DIoU) / 2 (...) in [0, 1].
    DIoU is IoU minus the squared ratio of the centres' distance to the hull's diagonal."""
    a, b = pred.double(), gt.double()
    distance = (centers(a) - centers(b)).square().sum(-1)
    hull_sides = torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])
    penalty = distance / hull_sides.square().sum(-1)
    return where_boxes((1 + (iou(a, b) - penalty)) / 2, pred, gt)


def center_distance(pred: Tensor, gt: Tensor, size: Tensor) -> Tensor:
    """Distance of the centres, x in image widths and y in image heights, over sqrt(2).
    pred, gt (..., 4), size (..., 2) as (W, H), broadcast -> (...) in [0, 1] for boxes within the
    image; NaN for NaN rows."""
    return (centers(pred) / size - centers(gt) / size).norm(dim=-1) / math.sqrt(2)


def center(pred: Tensor, gt: Tensor, size: Tensor) -> Tensor:
    """1 - center_distance, in [0, 1]."""
    distance = center_distance(pred.double(), gt.double(), size.double())
    return where_boxes((1 - distance).clamp(min=0), pred, gt)


def positional(pred: Tensor, gt: Tensor, size: Tensor | None = None, alpha: float = 2.5) -> Tensor:
    """The mean over the predicted box of a Gaussian kernel around the true centre.

    pred, gt (..., 4), broadcast -> (...) in [0, 1]; size is not used, and `rft.py --alpha` sets
    alpha. For a true box of W by H, centred at (cx, cy):

        K(x, y) = exp(-(x - cx)^2 / (2 sx^2) - (y - cy)^2 / (2 sy^2))
        sx = alpha W / 2,  sy = alpha H / 2

    It is above 0 (until it underflows) for boxes so far apart that their IoU is 0. At alpha 2.5 a
    perfect box scores 0.9486; a smaller box at the same centre scores more, up to 1.

    No grid of pixels is needed: on an axis, with u = (x - cx) / (sx sqrt(2)), the kernel is
    exp(-u^2), and its mean over [u0, u1] is sqrt(pi) / 2 (erf(u1) - erf(u0)) / (u1 - u0)."""
    start, end = pred[..., :2].double(), pred[..., 2:].double()            # (..., 2): x, y
    gt_start, gt_end = gt[..., :2].double(), gt[..., 2:].double()
    scale = alpha * (gt_end - gt_start) / 2 * math.sqrt(2)
    gt_center = (gt_start + gt_end) / 2
    start, end = (start - gt_center) / scale, (end - gt_center) / scale
    # The kernel is even, so an interval left of the centre is mirrored to the right, where erfc
    # is accurate (erf is so close to 1 that differences are lost).
    mirrored = start + end < 0
    u0 = torch.where(mirrored, -end, start)
    u1 = torch.where(mirrored, -start, end)
    integral = torch.special.erfc(u0) - torch.special.erfc(u1)
    mean = math.sqrt(math.pi) / 2 * integral / (u1 - u0)
    # Over a very short interval the difference is mostly rounding, and the kernel is constant.
    middle = torch.exp(-((u0 + u1) / 2).square())
    return where_boxes(torch.where(u1 - u0 < 1e-4, middle, mean).prod(-1), pred, gt)


def agreement(pred: Tensor, gt: Tensor) -> Tensor:
    """Scores, in [0, 1], of answers (..., 4) for the term "iou", the weights of groups and the
    evaluation. To train on another kind of answer, compute its score here."""
    return iou(pred, gt)


def hard(agreement: Tensor) -> Tensor:
    """1 above 0.5, else 0."""
    return (agreement > 0.5).to(agreement.dtype)


# pred (Q, G, 4), target (Q, 1, 4), size (Q, 1, 2) -> (Q, G) in [0, 1]. Each is highest at the
# target, except "positional", which is higher for smaller boxes at the same centre.
TERMS = {
    "iou": lambda pred, target, size: agreement(pred, target),
    "iou_hard": lambda pred, target, size: hard(agreement(pred, target)),
    "positional": positional,
    "giou": lambda pred, target, size: giou(pred, target),
    "diou": lambda pred, target, size: diou(pred, target),
    "center": center,
}
DEFAULT_REWARD = {"iou": 1.0, "positional": 0.1, "format": 1.0}


# ---------------------------------------------------------------- consistency of a group

def consistency_weight(iou: Tensor, mean: float = 1.2, variance: float = 1.0, low: float = 0.5,
                       high: float = 3.0) -> Tensor:
    """Weight of each group in the loss, from the IoU of its rollouts: (Q, G) -> (Q,), no gradient.

        w = exp(mean (1 - m) + variance v), clipped to [low, high]

    m is the mean of a group's IoU, v its population variance: groups that miss or scatter weigh
    more. With the paper's values w is at least 1, so `low` has no effect."""
    iou = iou.detach()
    exponent = mean * (1 - iou.mean(1)) + variance * iou.var(1, unbiased=False)
    return exponent.exp().clamp(low, high)


def dispersion(boxes: Tensor, valid: Tensor, size: Tensor) -> Tensor:
    """Scatter of the centres of a group's valid boxes, for the log: sqrt(Var x + Var y).
    boxes (Q, G, 4), valid (Q, G) bool, size (Q, 2) as (W, H) -> (Q,) in [0, sqrt(1/2)], in image
    sides; population variance, 0 with fewer than two valid boxes."""
    position = centers(boxes) / size[:, None]                             # (Q, G, 2)
    position = position.masked_fill(~valid[..., None], 0.0)
    n = valid.sum(1).clamp(min=1)[:, None]                                # (Q, 1)
    offset = position - position.sum(1, keepdim=True) / n[..., None]
    offset = offset.masked_fill(~valid[..., None], 0.0)
    return (offset.square().sum(1) / n).sum(-1).sqrt()
