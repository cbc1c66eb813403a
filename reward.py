"""Text to box; format, IoU and positional rewards; spatial consistency of a group. Pure functions of text and tensors.

Boxes are xyxy, continuous pixels (no +1), of the original image wherever a size goes with them; a row of NaN is an invalid box and scores 0
everywhere. Invalid is what does not parse, and what has no area once clamped to the image (`clamp_box`).

Source: RSGround-R1 (arXiv 2601.21634). Its formulas were not available to us; what stands here is our reading of its abstract, which fixes
two things: a positional reward that is continuous and distance-aware, so alive where IoU is 0, and a weight on policy updates that follows
how coherent a group's rollouts are in space. Shapes and scales are ours, and the options beside the defaults are other readings.

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

def intersection_union(a, b):
    """a, b (..., 4), broadcast -> areas of intersection and union, (...); NaN where a box is."""
    inside = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0).prod(-1)
    area_a, area_b = ((box[..., 2:] - box[..., :2]).clamp(min=0).prod(-1) for box in (a, b))
    return inside, area_a + area_b - inside


def iou(a, b):
    """a, b (..., 4) xyxy, broadcast -> intersection over union (...) in [0, 1]; 0 for NaN rows and where neither has an area."""
    inside, union = intersection_union(a, b)
    return torch.where(union > 0, inside / union, torch.zeros_like(union))


def center_distance(pred, gt, size):
    """Distance of the centres, the x axis in image widths and the y axis in heights, over sqrt(2): in [0, 1] within the image.
    pred, gt (..., 4), size (..., 2) as (W, H), broadcast -> (...); NaN for NaN rows."""
    return (centers(pred, size) - centers(gt, size)).norm(dim=-1) / math.sqrt(2)


def centers(boxes, size):
    """(..., 4), (..., 2) -> (..., 2): x in image widths, y in image heights."""
    return (boxes[..., :2] + boxes[..., 2:]) / 2 / size


POSITIONAL = ("exp", "gaussian", "linear", "size-aware")
WEIGHTINGS = ("coherent", "focus", "off")


def positional(pred, gt, size, tau=0.1, kind="exp"):
    """Continuous reward (...) in [0, 1] of how near the centres are, alive where IoU is 0; 0 for NaN rows. Our reading of the abstract.
    pred, gt (..., 4), size (..., 2) as (W, H), broadcast. With d the `center_distance`:

    exp         exp(-d / tau): steepest at the target, so it always pays to come nearer
    gaussian    exp(-d^2 / 2 tau^2): flat at the target
    linear      1 - d: the same slope everywhere; has no tau
    size-aware  exp(-r / tau), r the distance in pixels over the target's diagonal: a miss by 20 px is worse for a ship than for a harbour.
                tau is then in target diagonals; 1 is a natural scale, where the others' 0.1 leaves little beyond the target itself
    """
    if kind not in POSITIONAL:
        raise ValueError(f"positional kind {kind!r}; there are {', '.join(POSITIONAL)}")
    d = center_distance(pred, gt, size)
    if kind == "exp":
        reward = torch.exp(-d / tau)
    elif kind == "gaussian":
        reward = torch.exp(-d ** 2 / (2 * tau ** 2))
    elif kind == "linear":
        reward = 1 - d
    else:
        away = (centers(pred, 1) - centers(gt, 1)).norm(dim=-1)                      # pixels
        reward = torch.exp(-away / (gt[..., 2:] - gt[..., :2]).norm(dim=-1) / tau)
    return reward.masked_fill(pred.isnan().any(-1), 0.0)


# ------------------------------------------------------------------------------------------------------- consistency of a group

def dispersion(boxes, valid, size):
    """How far the centres of a group's valid boxes scatter: sqrt(Var x + Var y), population variance, x in image widths, y in heights.
    boxes (Q, G, 4), valid (Q, G) bool, size (Q, 2) as (W, H) -> (Q,) in [0, sqrt(1/2)]; 0 where fewer than two boxes are valid."""
    c = centers(boxes, size[:, None]).masked_fill(~valid[..., None], 0.0)             # (Q, G, 2)
    n = valid.sum(1).clamp(min=1)[:, None]                                           # (Q, 1)
    away = (c - c.sum(1, keepdim=True) / n[..., None]).masked_fill(~valid[..., None], 0.0)
    return ((away ** 2).sum(1) / n).sum(-1).sqrt()


def spatial_consistency(boxes, valid, size, kappa=0.15):
    """Do a group's rollouts point at one place? valid_share * exp(-dispersion / kappa), our reading of the abstract.
    boxes (Q, G, 4) clamped to the image, valid (Q, G) bool, size (Q, 2) -> (Q,) in [0, 1]; 0 exactly where fewer than two are valid."""
    consistency = valid.float().mean(1) * torch.exp(-dispersion(boxes, valid, size) / kappa)
    return consistency.masked_fill(valid.sum(1) < 2, 0.0)


def update_weight(consistency, valid_share, mode="coherent", floor=0.2):
    """Weight of each group in the policy update, from its consistency (Q,) and share of valid boxes (Q,) -> (Q,) in [floor, 1].

    coherent  floor + (1 - floor) c: trust groups that agree
    focus     floor + (1 - floor) (valid_share - c): work on groups that scatter; floor where fewer than two boxes are valid (there c is 0)
    off       1

    Two readings of "consistency-guided" in the abstract, and none. rft.advantages keeps the size of the whole step as it is without."""
    if mode == "coherent":
        return floor + (1 - floor) * consistency
    if mode == "focus":
        return floor + (1 - floor) * (valid_share - consistency).where(consistency > 0, torch.zeros_like(consistency))
    if mode == "off":
        return torch.ones_like(consistency)
    raise ValueError(f"weighting mode {mode!r}; there are {', '.join(WEIGHTINGS)}")
