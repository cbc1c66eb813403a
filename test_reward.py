"""reward.py: each term once by hand, then its properties."""
import math

import pytest
import torch

import reward
from reward import POSITIONAL, dispersion, iou

IMAGE = torch.tensor([800.0, 400.0])                                    # width, height
NAN = [math.nan] * 4


def box(x1, y1, x2, y2):
    return torch.tensor([x1, y1, x2, y2], dtype=torch.float32)


# ------------------------------------------------------------------------------------------------------- one case each, by hand

def test_iou_by_hand():
    # 10 x 10 and 10 x 10, shifted by (5, 0): they share 5 x 10 = 50 of 100 + 100 - 50 = 150
    assert iou(box(0, 0, 10, 10), box(5, 0, 15, 10)).item() == pytest.approx(50 / 150)


@pytest.mark.parametrize("kind, want", [("exp", math.exp(-0.5)), ("gaussian", math.exp(-0.125)), ("linear", 0.9),
                                        ("size-aware", math.exp(-1.0))])
def test_positional_by_hand(kind, want):
    # Centres (200, 200) and (280, 240): 0.1 of the width and 0.1 of the height apart, so d = sqrt(0.01 + 0.01) / sqrt(2) = 0.1.
    # In pixels sqrt(80^2 + 40^2) = 89.44; the target is 160 x 80, its diagonal sqrt(160^2 + 80^2) = 178.9: half of it.
    pred, target = box(190, 190, 210, 210), box(200, 200, 360, 280)
    tau = 0.5 if kind == "size-aware" else 0.2
    assert reward.positional(pred, target, IMAGE, tau, kind).item() == pytest.approx(want, rel=1e-5)


def test_consistency_by_hand():
    # Four rollouts, three of them valid, centres x = 100, 200, 300 of 800 and y = 100, 100, 100 of 400.
    # Var x = ((-1/8)^2 + 0 + (1/8)^2) / 3 = 1/96, Var y = 0; s = sqrt(1/96); c = 3/4 exp(-s / 0.15).
    group = torch.stack([box(90, 90, 110, 110), box(190, 90, 210, 110), box(290, 90, 310, 110), torch.tensor(NAN)])[None]
    valid = torch.tensor([[True, True, True, False]])
    assert dispersion(group, valid, IMAGE[None]).item() == pytest.approx(math.sqrt(1 / 96))
    assert reward.spatial_consistency(group, valid, IMAGE[None]).item() == pytest.approx(0.75 * math.exp(-math.sqrt(1 / 96) / 0.15))


@pytest.mark.parametrize("mode, want", [("coherent", [0.6, 0.2]), ("focus", [0.4, 0.2]), ("off", [1.0, 1.0])])
def test_weight_by_hand(mode, want):
    # First group: c 0.5 of a valid share of 0.75.  coherent 0.2 + 0.8 * 0.5 = 0.6, focus 0.2 + 0.8 * (0.75 - 0.5) = 0.4.
    # Second: one of eight rollouts valid, so c is 0, and both are at their floor.
    assert reward.update_weight(torch.tensor([0.5, 0.0]), torch.tensor([0.75, 0.125]), mode).tolist() == pytest.approx(want)


# ----------------------------------------------------------------------------------------------------- rewards of a box

def random_boxes(n, side=40, seed=0):
    x = torch.randint(0, side, (n, 2, 2), generator=torch.Generator().manual_seed(seed))
    return torch.cat((x.amin(1), x.amax(1) + 1), 1).float()              # whole numbers, at least one pixel


def test_iou_counts_pixels():
    """10,000 pairs of whole-numbered boxes: IoU is shared pixels over covered pixels, counted one by one."""
    def pixels(boxes, axis):                                             # (n, 40) bool: which columns (or rows) a box covers
        at = torch.arange(40)
        return (at >= boxes[:, axis, None]) & (at < boxes[:, axis + 2, None])
    a, b = random_boxes(10_000), random_boxes(10_000, seed=1)
    b[::100] = a[::100]
    covered_a, covered_b = (pixels(x, 1)[:, :, None] & pixels(x, 0)[:, None] for x in (a, b))
    shared, covered = ((covered_a & covered_b).sum((1, 2)), (covered_a | covered_b).sum((1, 2)))
    assert torch.equal(iou(a, b), shared / covered)
    assert (iou(a, b) == 0).any() and (iou(a, b) == 1).sum() >= 100
    assert torch.equal(iou(a[:50, None], b[None, :60])[7], iou(a[7].expand(60, 4), b[:60]))      # broadcast


def test_an_invalid_box_is_worth_nothing_and_poisons_nothing():
    boxes = torch.tensor([[10.0, 10, 20, 20], NAN, [12, 12, 22, 22]])
    target = box(10, 10, 20, 20)
    assert iou(boxes, target)[1] == 0 and iou(boxes, target)[0] == 1
    for kind in POSITIONAL:
        got = reward.positional(boxes, target, IMAGE, kind=kind)
        assert got[1] == 0 and got[0] == 1 and 0 < got[2] < 1
    both = torch.tensor([[True, False, True]])
    without = boxes[[0, 2]][None]
    assert dispersion(boxes[None], both, IMAGE[None]).item() == pytest.approx(dispersion(without, both[:, [0, 2]], IMAGE[None]).item())
    assert reward.spatial_consistency(boxes[None], both, IMAGE[None]).isfinite().all()


@pytest.mark.parametrize("kind", POSITIONAL)
def test_positional_reward_is_alive_where_iou_is_zero(kind):
    target = box(400, 200, 420, 220)
    x = torch.linspace(420, 780, 50)                                     # boxes ever further to the right, none touches the target
    away = torch.stack((x, torch.full_like(x, 200), x + 20, torch.full_like(x, 220)), 1)
    got = reward.positional(away, target, IMAGE, 1.0, kind)
    assert (iou(away, target) == 0).all() and (got > 0).all() and (got <= 1).all() and (got.diff() < 0).all()
    many = reward.positional(away.view(5, 10, 4), target.expand(5, 1, 4), IMAGE.expand(5, 1, 2), 1.0, kind)          # (Q, G), as rft asks
    assert torch.equal(many, got.view(5, 10))


def test_positional_reward_of_opposite_corners():
    """d is 1 for centres at opposite corners, whatever the shape of the image: exp(-1 / tau)."""
    for W, H in ((800, 400), (300, 1200)):
        got = reward.positional(box(-1, -1, 1, 1), box(W - 1, H - 1, W + 1, H + 1), torch.tensor([W, H]), 0.5)
        assert got.item() == pytest.approx(math.exp(-2), rel=1e-5)


def test_wrong_names_are_refused():
    with pytest.raises(ValueError, match="exponential.*exp, gaussian, linear, size-aware"):
        reward.positional(box(0, 0, 1, 1), box(0, 0, 1, 1), IMAGE, kind="exponential")
    with pytest.raises(ValueError, match="coherence.*coherent, focus, off"):
        reward.update_weight(torch.ones(1), torch.ones(1), "coherence")


# ---------------------------------------------------------------------------------------------------------- consistency

def groups(Q=64, G=8, seed=0):
    """Q groups of boxes within IMAGE, from tight to scattered, the odd box invalid."""
    g = torch.Generator().manual_seed(seed)
    center = (0.5 + torch.linspace(0, 0.45, Q)[:, None, None] * (2 * torch.rand(Q, G, 2, generator=g) - 1)) * IMAGE
    valid = torch.rand(Q, G, generator=g) < 0.8
    return torch.cat((center - 9, center + 9), -1).masked_fill(~valid[..., None], math.nan), valid


def test_consistency_beside_numpy():
    np = pytest.importorskip("numpy")
    boxes, valid = groups()
    got = reward.spatial_consistency(boxes, valid, IMAGE.expand(len(boxes), 2))
    for group, ok, c in zip(boxes.double().numpy(), valid.numpy(), got.tolist()):
        x, y = (group[ok, 0] + group[ok, 2]) / 2 / 800, (group[ok, 1] + group[ok, 3]) / 2 / 400
        want = ok.mean() * np.exp(-np.sqrt(np.var(x) + np.var(y)) / 0.15) if ok.sum() > 1 else 0.0
        assert c == pytest.approx(want, rel=1e-4, abs=1e-7)
    assert (got >= 0).all() and (got <= 1).all()


@pytest.mark.parametrize("n_valid, want", [(0, 0.0), (1, 0.0), (2, 0.25), (8, 1.0)])
def test_consistency_of_equal_boxes_is_their_share(n_valid, want):
    valid = (torch.arange(8) < n_valid)[None]
    boxes = box(100, 100, 180, 130).expand(1, 8, 4).masked_fill(~valid[..., None], math.nan)
    assert reward.spatial_consistency(boxes, valid, IMAGE[None]).item() == pytest.approx(want, abs=1e-6)
    assert dispersion(boxes, valid, IMAGE[None]).item() == pytest.approx(0, abs=1e-6)


def test_weights_lie_between_floor_and_one_and_oppose_each_other():
    boxes, valid = groups()
    share = torch.ones(len(boxes))
    everyone = torch.cat((boxes[..., :2].nan_to_num(50), boxes[..., 2:].nan_to_num(60)), -1)
    consistency = reward.spatial_consistency(everyone, torch.ones_like(valid), IMAGE.expand(len(boxes), 2))
    coherent, focus = (reward.update_weight(consistency, share, mode, floor=0.3) for mode in ("coherent", "focus"))
    assert torch.equal(coherent.argsort(), focus.argsort(descending=True))
    for weight in (coherent, focus):
        assert (weight >= 0.3 - 1e-6).all() and (weight <= 1 + 1e-6).all() and weight.max() > weight.min() + 0.3
