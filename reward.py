"""Text to box; format, IoU and positional rewards; spatial consistency of a group. Pure functions of text and tensors.

Boxes are xyxy, continuous pixels (no +1), of the original image wherever a size goes with them; a row of NaN is an invalid box and scores 0
everywhere. Invalid is what does not parse, and what has no area once clamped to the image (`clamp_box`).

Source: RSGround-R1 (arXiv 2601.21634), sections 3.3 and 3.4. Each docstring says how well a formula is known: "partial" was read
from the paper's page itself, in part; "second-hand" was told by readers of its text who agree; "ours" is our own reading or choice.

Q questions, G rollouts of each.
"""
import json
import math
import re

import torch

ANSWER = ("<answer>", "</answer>")
FAILURES = ("no answer", "several answers", "not JSON", "no bbox_2d", "not four numbers", "no area")
WHOLE = re.compile(r"\s*<think>.*</think>\s*<answer>.*</answer>\s*", re.DOTALL)
NUMBER = r"\s*(-?[0-9]{1,15}(?:\.[0-9]{1,15})?(?:[eE][+-]?[0-9]{1,3})?)\s*"
FOUR_NUMBERS = re.compile(rf"\[{NUMBER},{NUMBER},{NUMBER},{NUMBER}\]")


# --------------------------------------------------------------------------------------------------------------------- text to box

def parse_box(text):
    """The box of a completion, (x1, y1, x2, y2) floats in the model's frame, or None. Strict: exactly one <answer>, in it one JSON object
    whose "bbox_2d" is four JSON numbers, finite, x2 > x1, y2 > y1. Other keys are ignored, and what stands outside the answer.

    Whatever the text, it takes linear time and never raises: rewards are computed on what a policy under training writes."""
    box, why = read_answer(text)
    return None if why else box


def failure(text):
    """None where `parse_box` finds a box, otherwise why it does not: one of FAILURES."""
    return read_answer(text)[1]


def read_answer(text):
    """-> (box, None) or (None, one of FAILURES), but (box, "no area") for one that is a line or a point, or stands on its head"""
    opened, closed = (text.count(tag) for tag in ANSWER)
    start, end = text.find(ANSWER[0]), text.find(ANSWER[1])
    if opened > 1 or closed > 1:
        return None, "several answers"
    if not opened or not closed or end < start:
        return None, "no answer"
    try:                                                  # objects become tuples of pairs, so that a key given twice is seen
        answer = json.loads(text[start + len(ANSWER[0]):end], object_pairs_hook=tuple, parse_int=float, parse_constant=refuse)
    except (ValueError, RecursionError):                  # RecursionError: nested a thousand deep
        return None, "not JSON"
    boxes = [value for key, value in answer if key == "bbox_2d"] if isinstance(answer, tuple) else []
    if len(boxes) != 1:
        return None, "no bbox_2d"
    return checked(boxes[0])


def refuse(name):
    raise ValueError(f"{name} is not JSON")               # NaN, Infinity, -Infinity: Python's parser lets them pass


def checked(box):
    """A parsed value -> as `read_answer`. A boolean is no number; 1e999 and a 5,000-digit integer are infinite."""
    if not isinstance(box, list) or len(box) != 4 or not all(isinstance(x, float) and math.isfinite(x) for x in box):
        return None, "not four numbers"
    x1, y1, x2, y2 = box
    return (x1, y1, x2, y2), None if x2 > x1 and y2 > y1 else "no area"


def parse_box_lenient(text):
    """For reports on models that were not trained to our format; the reward never uses it. What `parse_box` finds, else the first list of
    four numbers behind the last <answer> (without one, behind the last </think>; without that, anywhere): fenced or bare JSON, and
    [{"bbox_2d": [...], "label": ...}] as Qwen writes it. Linear-time as well."""
    box = parse_box(text)
    if box is None:
        behind = ANSWER[0] if ANSWER[0] in text else "</think>"
        found = FOUR_NUMBERS.search(text, max(text.rfind(behind), 0))
        box, why = checked([float(x) for x in found.groups()]) if found else (None, None)
        box = None if why else box
    return box


def format_ok(text):
    """True for exactly one think block, then exactly one answer with a box (`parse_box`), and nothing but white space around them."""
    once = all(text.count(tag) == 1 for tag in ("<think>", "</think>", *ANSWER))
    return once and WHOLE.fullmatch(text) is not None and parse_box(text) is not None


def clamp_box(box, size):
    """Box (4 floats) cut to the image of size (W, H), or None where no area is left. In Python floats, so that no overflow comes back as a
    box: 1e300 is a number here and infinite in float32."""
    (x1, y1, x2, y2), (W, H) = box, size
    x1, x2 = (float(min(max(x, 0), W)) for x in (x1, x2))
    y1, y2 = (float(min(max(y, 0), H)) for y in (y1, y2))
    return (x1, y1, x2, y2) if x2 > x1 and y2 > y1 else None


# ------------------------------------------------------------------------------------------------------------------ rewards of a box

def has_area(boxes: torch.Tensor) -> torch.Tensor:
    """(..., 4) -> (...) bool; False for NaN rows."""
    return (boxes[..., 2:] > boxes[..., :2]).all(-1)


def intersection_union(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """a, b (..., 4), broadcast -> areas of intersection and union, (...); NaN where a box is."""
    top_left = torch.maximum(a[..., :2], b[..., :2])
    bottom_right = torch.minimum(a[..., 2:], b[..., 2:])
    intersection = (bottom_right - top_left).clamp(min=0).prod(-1)
    area_a = (a[..., 2:] - a[..., :2]).clamp(min=0).prod(-1)
    area_b = (b[..., 2:] - b[..., :2]).clamp(min=0).prod(-1)
    return intersection, area_a + area_b - intersection


def iou(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a, b (..., 4) xyxy, broadcast -> intersection over union (...) in [0, 1].

    0 for NaN rows and where neither box has an area. Source: VLM-R1's IoU reward, which the paper
    uses (second-hand)."""
    intersection, union = intersection_union(a, b)
    return torch.where(union > 0, intersection / union, torch.zeros_like(union))


def hull_sides(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a, b (..., 4), broadcast -> width and height (..., 2) of the smallest box around both."""
    return torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])


def giou(pred: torch.Tensor, gt: torch.Tensor) -> torch.Tensor:
    """pred, gt (..., 4), broadcast -> (1 + GIoU) / 2 (...) in [0, 1]; 0 where pred is no box.

    GIoU is IoU minus the share of the hull that neither box covers (arXiv 1902.09630). A rival of
    the positional reward in the paper's ablation (second-hand); the mapping to [0, 1] is ours."""
    _, union = intersection_union(pred, gt)
    hull = hull_sides(pred, gt).prod(-1)
    value = iou(pred, gt) - (hull - union) / hull
    return torch.where(has_area(pred), (1 + value) / 2, torch.zeros_like(value))


def diou(pred: torch.Tensor, gt: torch.Tensor) -> torch.Tensor:
    """pred, gt (..., 4), broadcast -> (1 + DIoU) / 2 (...) in [0, 1]; 0 where pred is no box.

    DIoU is IoU minus the squared distance of the centres over the squared diagonal of the hull
    (arXiv 1911.08287). A rival in the paper's ablation (second-hand); the mapping is ours."""
    distance = (centers(pred) - centers(gt)).square().sum(-1)
    diagonal = hull_sides(pred, gt).square().sum(-1)
    value = iou(pred, gt) - distance / diagonal
    return torch.where(has_area(pred), (1 + value) / 2, torch.zeros_like(value))


def centers(boxes: torch.Tensor) -> torch.Tensor:
    """(..., 4) -> centres (..., 2)."""
    return (boxes[..., :2] + boxes[..., 2:]) / 2


def center_distance(pred: torch.Tensor, gt: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
    """Distance of the centres, x in image widths and y in image heights, over sqrt(2).

    pred, gt (..., 4), size (..., 2) as (W, H), broadcast -> (...) in [0, 1] within the image; NaN
    for NaN rows."""
    return (centers(pred) / size - centers(gt) / size).norm(dim=-1) / math.sqrt(2)


def center(pred: torch.Tensor, gt: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
    """1 - center_distance: (..., 4), (..., 4), (..., 2) -> (...) in [0, 1]; 0 where pred is no box.

    A rival of the positional reward in the paper's ablation (second-hand); its scale is ours."""
    value = (1 - center_distance(pred, gt, size)).clamp(min=0)
    return torch.where(has_area(pred), value, torch.zeros_like(value))


def positional(pred: torch.Tensor, gt: torch.Tensor, alpha: float = 2.5) -> torch.Tensor:
    """The mean of the true box's Gaussian kernel within the predicted box.

    pred, gt (..., 4), broadcast -> (...) in [0, 1]; 0 where pred is no box. The kernel peaks at 1 in
    the true centre (cx, cy) and is scaled by the true box, W x H:

        K(x, y) = exp(-(x - cx)^2 / (2 sx^2) - (y - cy)^2 / (2 sy^2)),  sx = alpha W / 2, sy = alpha H / 2

    It is positive however far the boxes lie apart (until a float's range ends), where IoU is 0 at once.
    A perfect box has 0.9486 at alpha 2.5, a smaller one in the centre a little more.

    Source: section 3.3; the kernel (its equation 2), alpha 2.5 and the mean are known in part, the
    closed form instead of a pixel grid is ours."""
    across = axis_mean(pred[..., 0::2].double(), gt[..., 0::2].double(), alpha)
    along = axis_mean(pred[..., 1::2].double(), gt[..., 1::2].double(), alpha)
    value = (across * along).to(torch.promote_types(torch.result_type(pred, gt), torch.float32))
    return torch.where(has_area(pred) & has_area(gt), value, torch.zeros_like(value))


def axis_mean(pred: torch.Tensor, gt: torch.Tensor, alpha: float) -> torch.Tensor:
    """Mean of the kernel of one axis over an interval: pred, gt (..., 2) double -> (...).

    With u = (x - centre) / (s sqrt(2)) the kernel is exp(-u^2), and its mean over [u0, u1] is
    sqrt(pi) / 2 (erf(u1) - erf(u0)) / (u1 - u0)."""
    scale = alpha * (gt[..., 1] - gt[..., 0]) / 2 * math.sqrt(2)
    u = (pred - gt.mean(-1, keepdim=True)) / scale[..., None]
    # The kernel is even: an interval on the left of the centre becomes its mirror image on the right,
    # where erfc keeps the digits that erf, near 1, has lost.
    mirrored = u.sum(-1) < 0
    u0 = torch.where(mirrored, -u[..., 1], u[..., 0])
    u1 = torch.where(mirrored, -u[..., 0], u[..., 1])
    integral = torch.special.erfc(u0) - torch.special.erfc(u1)
    mean = math.sqrt(math.pi) / 2 * integral / (u1 - u0)
    # A very short interval leaves too few digits in the difference; the kernel hardly changes in it.
    middle = torch.exp(-((u0 + u1) / 2).square())
    return torch.where(u1 - u0 < 1e-4, middle, mean)


# Terms of the reward by name: pred (Q, G, 4) NaN where invalid, target (Q, 1, 4), size (Q, 1, 2)
# -> (Q, G). `rft.py --reward NAME=WEIGHT` chooses among them; --alpha is positional's.
TERMS = {
    "iou": lambda pred, target, size: iou(pred, target),
    "positional": lambda pred, target, size: positional(pred, target),
    "giou": lambda pred, target, size: giou(pred, target),
    "diou": lambda pred, target, size: diou(pred, target),
    "center": center,
}


# ------------------------------------------------------------------------------------------------------- consistency of a group

def consistency_weight(iou: torch.Tensor, mean: float = 1.2, variance: float = 1.0,
                       low: float = 0.5, high: float = 3.0) -> torch.Tensor:
    """Weight of each group in the loss, from the IoU rewards of its rollouts: (Q, G) -> (Q,).

        w = exp(mean (1 - m) + variance v), clipped to [low, high]

    m is the group's mean IoU, v its population variance: groups that fail or scatter weigh more. Carries
    no gradient. m lies in [0, 1], so at the paper's lambdas the lower bound never acts.

    Source: section 3.4; formula, lambdas 1.2 and 1 and the bounds second-hand (one answer garbles the
    first term); population variance and the missing gradient are ours."""
    iou = iou.detach()
    exponent = mean * (1 - iou.mean(1)) + variance * iou.var(1, unbiased=False)
    return exponent.exp().clamp(low, high)


def dispersion(boxes: torch.Tensor, valid: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
    """How far the centres of a group's valid boxes scatter: sqrt(Var x + Var y), a measure for the log.

    boxes (Q, G, 4), valid (Q, G) bool, size (Q, 2) as (W, H) -> (Q,) in [0, sqrt(1/2)]: population
    variance, x in image widths, y in image heights; 0 where fewer than two boxes are valid. Ours."""
    position = centers(boxes) / size[:, None]                                      # (Q, G, 2)
    position = position.masked_fill(~valid[..., None], 0.0)
    n = valid.sum(1).clamp(min=1)[:, None]                                         # (Q, 1)
    offset = position - position.sum(1, keepdim=True) / n[..., None]
    offset = offset.masked_fill(~valid[..., None], 0.0)
    return (offset.square().sum(1) / n).sum(-1).sqrt()
