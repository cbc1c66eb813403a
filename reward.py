"""IoU and positional rewards; spatial consistency of a group. Pure functions of tensors.

Boxes are xyxy, continuous pixels (no +1), of the original image wherever a size goes with them; a row of NaN is an invalid box and scores 0
everywhere. Invalid is what does not parse, and what has no area once clamped to the image (`answer.clamp_box`).

Source: RSGround-R1 (arXiv 2601.21634). Its formulas were not available to us; what stands here is our reading of its abstract, which fixes
two things: a positional reward that is continuous and distance-aware, so alive where IoU is 0, and a weight on policy updates that follows
how coherent a group's rollouts are in space. Shapes and scales are ours, and the options beside the defaults are other readings.

Q questions, G rollouts of each.
"""
import math

import torch

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
