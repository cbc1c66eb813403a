"""IoU and positional rewards; spatial consistency of a group. Pure functions of tensors.

Boxes are xyxy, continuous pixels (no +1), of the original image wherever a size goes
with them. A row of NaN is an invalid box and scores 0 everywhere. Invalid is what
does not parse, and what has no area once clamped to the image (`answer.clamp_box`).

To add a term, write a function here and name it in TERMS: `rft.py --reward
NAME=WEIGHT` then knows it, and metrics.jsonl, the report's curves and the study's
tables show it.

Source: RSGround-R1 (arXiv 2601.21634), sections 3.3 and 3.4. Each docstring says how
well a formula is known: "partial" was read from the paper's page itself, in part;
"second-hand" was told by readers of its text who agree; "ours" is our own reading or
choice.

Q questions, G rollouts of each.
"""
import math

import torch
from torch import Tensor

# ---------------------------------------------------------------- rewards of a box

def has_area(boxes: Tensor) -> Tensor:
    """(..., 4) -> (...) bool; False for NaN rows, and where a corner is infinite."""
    return (boxes[..., 2:] > boxes[..., :2]).all(-1) & boxes.isfinite().all(-1)


def where_boxes(value: Tensor, pred: Tensor, gt: Tensor) -> Tensor:
    """A reward computed in double, as float32 or as the boxes' own wider type.

    0 where one of the two is no box."""
    value = value.to(torch.promote_types(torch.result_type(pred, gt), torch.float32))
    return torch.where(has_area(pred) & has_area(gt), value, torch.zeros_like(value))


def intersection_union(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """a, b (..., 4), broadcast -> areas of intersection and union, (...); NaN where a box is."""
    top_left = torch.maximum(a[..., :2], b[..., :2])
    bottom_right = torch.minimum(a[..., 2:], b[..., 2:])
    intersection = (bottom_right - top_left).clamp(min=0).prod(-1)
    area_a = (a[..., 2:] - a[..., :2]).clamp(min=0).prod(-1)
    area_b = (b[..., 2:] - b[..., :2]).clamp(min=0).prod(-1)
    return intersection, area_a + area_b - intersection


def iou(a: Tensor, b: Tensor) -> Tensor:
    """a, b (..., 4) xyxy, broadcast -> intersection over union (...) in [0, 1].

    0 for NaN rows and where neither box has an area. Source: VLM-R1's IoU reward,
    which the paper uses (second-hand).
    """
    intersection, union = intersection_union(a, b)
    return torch.where(union > 0, intersection / union, torch.zeros_like(union))


def hull_sides(a: Tensor, b: Tensor) -> Tensor:
    """a, b (..., 4), broadcast -> width and height (..., 2) of the smallest box around both."""
    return torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])


def giou(pred: Tensor, gt: Tensor) -> Tensor:
    """pred, gt (..., 4), broadcast -> (1 + GIoU) / 2 (...) in [0, 1]; 0 where pred is no box.

    GIoU is IoU minus the share of the hull that neither box covers (arXiv
    1902.09630). A rival of the positional reward in the paper's ablation
    (second-hand); the mapping to [0, 1] is ours.
    """
    a = pred.double()
    b = gt.double()
    _, union = intersection_union(a, b)
    hull = hull_sides(a, b).prod(-1)
    value = iou(a, b) - (hull - union) / hull
    return where_boxes((1 + value) / 2, pred, gt)


def diou(pred: Tensor, gt: Tensor) -> Tensor:
    """pred, gt (..., 4), broadcast -> (1 + DIoU) / 2 (...) in [0, 1]; 0 where pred is no box.

    DIoU is IoU minus the squared distance of the centres over the squared diagonal of
    the hull (arXiv 1911.08287). A rival in the paper's ablation (second-hand); the
    mapping is ours.
    """
    a = pred.double()
    b = gt.double()
    distance = (centers(a) - centers(b)).square().sum(-1)
    diagonal = hull_sides(a, b).square().sum(-1)
    value = iou(a, b) - distance / diagonal
    return where_boxes((1 + value) / 2, pred, gt)


def centers(boxes: Tensor) -> Tensor:
    """(..., 4) -> centres (..., 2)."""
    return (boxes[..., :2] + boxes[..., 2:]) / 2


def center_distance(pred: Tensor, gt: Tensor, size: Tensor) -> Tensor:
    """Distance of the centres, x in image widths and y in image heights, over sqrt(2).

    pred, gt (..., 4), size (..., 2) as (W, H), broadcast -> (...) in [0, 1] within
    the image; NaN for NaN rows.
    """
    return (centers(pred) / size - centers(gt) / size).norm(dim=-1) / math.sqrt(2)


def center(pred: Tensor, gt: Tensor, size: Tensor) -> Tensor:
    """1 - center_distance: (..., 4), (..., 4), (..., 2) -> (...) in [0, 1]; 0 where pred is no box.

    A rival of the positional reward in the paper's ablation (second-hand); its scale
    is ours.
    """
    distance = center_distance(pred.double(), gt.double(), size.double())
    return where_boxes((1 - distance).clamp(min=0), pred, gt)


def positional(pred: Tensor, gt: Tensor, alpha: float = 2.5) -> Tensor:
    """The mean of the true box's Gaussian kernel within the predicted box.

    pred, gt (..., 4), broadcast -> (...) in [0, 1]; 0 where pred is no box. The
    kernel peaks at 1 in the true centre (cx, cy); its scale is the true box, W by H:

        K(x, y) = exp(-(x - cx)^2 / (2 sx^2) - (y - cy)^2 / (2 sy^2))
        sx = alpha W / 2,  sy = alpha H / 2

    It is positive however far the boxes lie apart (until a float's range ends), where
    IoU is 0 at once. A perfect box has 0.9486 at alpha 2.5, a smaller one in the
    centre a little more.

    Source: section 3.3; the kernel (its equation 2), alpha 2.5 and the mean are known
    in part, the closed form instead of a pixel grid is ours.
    """
    across = axis_mean(pred[..., 0::2].double(), gt[..., 0::2].double(), alpha)
    along = axis_mean(pred[..., 1::2].double(), gt[..., 1::2].double(), alpha)
    return where_boxes(across * along, pred, gt)


def axis_mean(pred: Tensor, gt: Tensor, alpha: float) -> Tensor:
    """Mean of the kernel of one axis over an interval: pred, gt (..., 2) double -> (...).

    With u = (x - centre) / (s sqrt(2)) the kernel is exp(-u^2), and its mean over
    [u0, u1] is sqrt(pi) / 2 (erf(u1) - erf(u0)) / (u1 - u0).
    """
    scale = alpha * (gt[..., 1] - gt[..., 0]) / 2 * math.sqrt(2)
    u = (pred - gt.mean(-1, keepdim=True)) / scale[..., None]
    # The kernel is even: an interval on the left of the centre becomes its mirror
    # image on the right, where erfc keeps the digits that erf, near 1, has lost.
    mirrored = u.sum(-1) < 0
    u0 = torch.where(mirrored, -u[..., 1], u[..., 0])
    u1 = torch.where(mirrored, -u[..., 0], u[..., 1])
    integral = torch.special.erfc(u0) - torch.special.erfc(u1)
    mean = math.sqrt(math.pi) / 2 * integral / (u1 - u0)
    # A very short interval leaves too few digits in the difference; the kernel hardly
    # changes in it.
    middle = torch.exp(-((u0 + u1) / 2).square())
    return torch.where(u1 - u0 < 1e-4, middle, mean)


def positional_term(pred: Tensor, gt: Tensor, size: Tensor, alpha: float = 2.5) -> Tensor:
    """`positional` with the arguments of a term; `rft.py --alpha` sets its scale."""
    return positional(pred, gt, alpha)


def agreement(pred: Tensor, gt: Tensor) -> Tensor:
    """How right an answer is: (..., 4), (..., 4) -> (...) in [0, 1], 0 where it is invalid.

    The term "iou", the weight of a group and the scores of an evaluation are made of
    it. For boxes it is their IoU; a fork with other answers puts its own measure
    here.
    """
    return iou(pred, gt)


# Terms of the reward by name, in [0, 1], best at the target (test_reward.py checks
# all): pred (Q, G, 4) NaN where invalid, target (Q, 1, 4), size (Q, 1, 2) -> (Q, G).
# `rft.py --reward NAME=WEIGHT` chooses among them; --alpha is positional's.
TERMS = {
    "iou": lambda pred, target, size: agreement(pred, target),
    "positional": positional_term,
    "giou": lambda pred, target, size: giou(pred, target),
    "diou": lambda pred, target, size: diou(pred, target),
    "center": center,
}
# The paper's reward (second-hand): what rft.py takes where --reward is not given.
DEFAULT_REWARD = {"iou": 1.0, "positional": 0.1, "format": 1.0}


# ---------------------------------------------------------------- consistency of a group

def consistency_weight(
        iou: Tensor, mean: float = 1.2, variance: float = 1.0,
        low: float = 0.5, high: float = 3.0,
) -> Tensor:
    """Weight of each group in the loss, from the IoU rewards of its rollouts: (Q, G) -> (Q,).

        w = exp(mean (1 - m) + variance v), clipped to [low, high]

    m is the group's mean IoU, v its population variance: groups that fail or scatter
    weigh more. Carries no gradient. m lies in [0, 1], so at the paper's lambdas the
    lower bound never acts.

    Source: section 3.4; formula, lambdas 1.2 and 1 and the bounds second-hand (one
    answer garbles the first term); population variance and the missing gradient are
    ours.
    """
    iou = iou.detach()
    exponent = mean * (1 - iou.mean(1)) + variance * iou.var(1, unbiased=False)
    return exponent.exp().clamp(low, high)


def dispersion(boxes: Tensor, valid: Tensor, size: Tensor) -> Tensor:
    """How far the centres of a group's valid boxes scatter: sqrt(Var x + Var y).

    A measure for the log. boxes (Q, G, 4), valid (Q, G) bool, size (Q, 2) as (W, H)
    -> (Q,) in [0, sqrt(1/2)]: population variance, x in image widths, y in image
    heights; 0 where fewer than two boxes are valid. Ours.
    """
    position = centers(boxes) / size[:, None]                             # (Q, G, 2)
    position = position.masked_fill(~valid[..., None], 0.0)
    n = valid.sum(1).clamp(min=1)[:, None]                                # (Q, 1)
    offset = position - position.sum(1, keepdim=True) / n[..., None]
    offset = offset.masked_fill(~valid[..., None], 0.0)
    return (offset.square().sum(1) / n).sum(-1).sqrt()
