"""reward.py: each term once by hand, then its properties."""
import math

import pytest
import torch

import reward
from reward import TERMS, consistency_weight, dispersion, iou, positional

IMAGE = torch.tensor([800.0, 400.0])                                    # width, height
NAN = [math.nan] * 4


def box(x1, y1, x2, y2):
    return torch.tensor([x1, y1, x2, y2], dtype=torch.float32)


# ------------------------------------------------------------------------------------------------------- one case each, by hand

def test_iou_by_hand():
    # 10 x 10 and 10 x 10, shifted by (5, 0): they share 5 x 10 = 50 of 100 + 100 - 50 = 150
    assert iou(box(0, 0, 10, 10), box(5, 0, 15, 10)).item() == pytest.approx(50 / 150)


TARGET = box(100, 100, 140, 120)                                         # 40 x 20, so sx = 2.5 * 40 / 2 = 50 and sy = 25


@pytest.mark.parametrize("pred, want", [
    ((100, 100, 140, 120), 0.9486),                                      # itself
    ((150, 100, 190, 120), 0.5905),                                      # 50 px to the right: one sx
    ((100, 125, 140, 145), 0.5905),                                      # 25 px down: one sy
    ((110, 105, 130, 115), 0.9868),                                      # half as long, in the centre
    ((0, 0, 800, 800), 0.0122),                                          # the whole image
    ((400, 100, 440, 120), 0.0),                                         # 300 px away: six sx
])
def test_positional_by_hand(pred, want):
    assert positional(box(*pred), TARGET).item() == pytest.approx(want, abs=5e-5)


def test_positional_worked_out():
    # Itself: per axis the interval is c - s / 2.5 .. c + s / 2.5, so u = 0.4 / sqrt(2) = 0.28284 on either side, and the mean is
    # sqrt(pi) / 2 * 2 erf(u) / (2 u) = 0.886227 * 0.310843 / 0.282843 = 0.973963; both axes: 0.948604.
    u = 0.4 / math.sqrt(2)
    assert math.erf(u) == pytest.approx(0.310843, abs=1e-6)
    assert positional(TARGET, TARGET).item() == pytest.approx((math.sqrt(math.pi) / 2 * math.erf(u) / u) ** 2, abs=1e-6)


def test_rivals_by_hand():
    # 10 x 10 and 10 x 10, the second 30 to the right. Nothing is shared, the union is 200, the hull 40 x 10 = 400: GIoU = 0 - 200 / 400.
    # The centres are 30 apart, the hull's diagonal squared is 40^2 + 10^2 = 1700: DIoU = 0 - 900 / 1700.
    a, b = box(0, 0, 10, 10), box(30, 0, 40, 10)
    assert reward.giou(a, b).item() == pytest.approx((1 - 0.5) / 2)
    assert reward.diou(a, b).item() == pytest.approx((1 - 900 / 1700) / 2)
    # In an image of 800 x 400: 30 / 800 of its width apart and 0 of its height, over sqrt(2).
    assert reward.center(a, b, IMAGE).item() == pytest.approx(1 - 30 / 800 / math.sqrt(2))


@pytest.mark.parametrize("group, want", [
    ((0.5, 0.5, 0.0, 0.0), math.exp(1.2 * 0.75 + 0.0625)),               # m 0.25, v 0.0625: 2.618
    ((1.0, 1.0, 1.0, 1.0), 1.0),                                         # m 1, v 0
    ((0.0, 0.0, 0.0, 0.0), 3.0),                                         # exp(1.2) = 3.32, cut
    ((1.0, 0.0), math.exp(0.6 + 0.25)),                                  # a group of two: m 0.5, v 0.25
])
def test_weight_by_hand(group, want):
    assert consistency_weight(torch.tensor([group])).item() == pytest.approx(want)


def test_weight_by_its_terms_and_bounds():
    # m 0.25, v 0.0625 again: the mean term alone exp(0.9), the variance term alone exp(0.0625); a negative lambda meets the lower bound
    iou = torch.tensor([[0.5, 0.5, 0.0, 0.0]])
    assert consistency_weight(iou, variance=0.0).item() == pytest.approx(math.exp(0.9))
    assert consistency_weight(iou, mean=0.0).item() == pytest.approx(math.exp(0.0625))
    assert consistency_weight(iou, mean=-2.0).item() == 0.5
    assert consistency_weight(iou, low=2.0, high=2.5).item() == 2.5


def test_dispersion_by_hand():
    # Four rollouts, three of them valid, centres x = 100, 200, 300 of 800 and y = 100, 100, 100 of 400.
    # Var x = ((-1/8)^2 + 0 + (1/8)^2) / 3 = 1/96, Var y = 0.
    group = torch.stack([box(90, 90, 110, 110), box(190, 90, 210, 110), box(290, 90, 310, 110), torch.tensor(NAN)])[None]
    valid = torch.tensor([[True, True, True, False]])
    assert dispersion(group, valid, IMAGE[None]).item() == pytest.approx(math.sqrt(1 / 96))


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


def scored(name, pred, target, size=IMAGE):
    """A term of the reward as rft.py calls it, for one question: pred (G, 4), target (4,) -> (G,)."""
    return TERMS[name](pred[None], target[None, None], size[None, None])[0]


@pytest.mark.parametrize("name", TERMS)
def test_every_term_lies_in_0_and_1_and_nothing_beats_the_target_but_a_smaller_box(name):
    boxes = random_boxes(400) * 8
    boxes = torch.minimum(boxes, IMAGE.repeat(2))
    boxes = boxes[reward.has_area(boxes)]
    target = box(104, 56, 176, 120)
    got = scored(name, boxes, target)
    assert got.shape == (len(boxes),) and (got >= 0).all() and (got <= 1).all()
    best = scored(name, target[None], target)
    assert (got <= best).all() or name == "positional" and (got <= 1).all()
    assert got.std() > 0.01


@pytest.mark.parametrize("name", TERMS)
def test_an_invalid_box_is_worth_nothing_and_poisons_nothing(name):
    boxes = torch.tensor([[10.0, 10, 20, 20], NAN, [12, 12, 22, 22], [10, 10, 20, math.nan]])
    got = scored(name, boxes, box(10, 10, 20, 20))
    assert got[1] == got[3] == 0 and 0 < got[2] < got[0] <= 1
    many = TERMS[name](boxes.expand(3, 4, 4), box(10, 10, 20, 20).expand(3, 1, 4), IMAGE.expand(3, 1, 2))          # (Q, G), as rft asks
    assert torch.equal(many, got.expand(3, 4))


def test_dispersion_leaves_invalid_boxes_out():
    boxes = torch.tensor([[10.0, 10, 20, 20], NAN, [12, 12, 22, 22]])
    valid = torch.tensor([[True, False, True]])
    two = dispersion(boxes[[0, 2]][None], valid[:, [0, 2]], IMAGE[None])
    assert dispersion(boxes[None], valid, IMAGE[None]).item() == pytest.approx(two.item())


def kernel_on_a_grid(pred, target, alpha, n=1500):
    """The mean of the kernel at n x n midpoints of the predicted box: the plain slow way, in double."""
    kernel = []
    for low in (0, 1):
        sigma, centre = alpha * (target[low + 2] - target[low]) / 2, (target[low] + target[low + 2]) / 2
        at = pred[low] + (pred[low + 2] - pred[low]) * (torch.arange(n, dtype=torch.float64) + 0.5) / n
        kernel.append(torch.exp(-(at - centre) ** 2 / (2 * sigma ** 2)))
    return (kernel[0][:, None] * kernel[1][None]).mean().item()


@pytest.mark.parametrize("alpha", [0.7, 2.5, 6.0])
def test_positional_beside_a_fine_grid(alpha):
    preds, targets = random_boxes(40).double() * 3.7, random_boxes(40, seed=1).double() * 3.7
    for pred, target in zip(preds, targets):
        want = kernel_on_a_grid(pred, target, alpha)
        assert positional(pred, target, alpha).item() == pytest.approx(want, rel=1e-4, abs=1e-12)
        assert positional(pred.float(), target.float(), alpha).item() == pytest.approx(want, rel=1e-4, abs=1e-12)


def test_positional_at_every_scale():
    # What is scaled with all its surroundings keeps its value: a target of a thousandth of a pixel, and one of a million.
    pred, target = box(150, 110, 190, 120).double(), TARGET.double()
    want = positional(pred, target).item()
    for scale in (1e-5, 1.0, 1e5):
        assert positional(pred * scale, target * scale).item() == pytest.approx(want, rel=1e-9)
    # A target of one pixel, its box found, missed by a pixel, by ten (2.9e-14 by hand: exp(-(10 / 1.25)^2 / 2) and more), by a thousand.
    one = box(400, 200, 401, 201)
    got = [positional(one + torch.tensor([d, 0.0, d, 0.0]), one).item() for d in (0.0, 1.0, 10.0, 1000.0)]
    assert got[0] == pytest.approx(0.9486, abs=1e-4) and got[0] > got[1] > got[2] > 0 and got[3] == 0
    assert got[2] == pytest.approx(kernel_on_a_grid((one + torch.tensor([10.0, 0, 10, 0])).double(), one.double(), 2.5), rel=1e-4)
    # A speck has the kernel at its own place, here one sx from the centre; so has one that is far shorter than a float's step.
    for width in (1e-3, 1e-9):
        speck = torch.tensor([170.0, 110.0, 170.0 + width, 110.0 + width], dtype=torch.float64)
        assert positional(speck, TARGET.double()).item() == pytest.approx(math.exp(-0.5), rel=1e-4)
    assert positional(box(-1e30, -1e30, 1e30, 1e30), TARGET).item() == 0
    assert positional(box(100, 100, 140, 120), box(5, 5, 5, 5)).item() == 0


def test_positional_is_even_and_falls_on_either_side():
    away = torch.linspace(0, 240, 61)
    shift = torch.stack((away, torch.zeros(61), away, torch.zeros(61)), 1)
    right, left = positional(TARGET + shift, TARGET), positional(TARGET - shift, TARGET)
    assert (right.diff() < 0).all() and (right > 0).all() and torch.allclose(left, right, rtol=1e-4)
    assert (iou(TARGET + shift, TARGET)[11:] == 0).all()                 # alive where nothing overlaps


# ---------------------------------------------------------------------------------------------------------- consistency

def test_weight_beside_numpy_and_without_gradient():
    np = pytest.importorskip("numpy")
    group = torch.rand(200, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    got = consistency_weight(group, 1.7, 2.3, 0.9, 4.1)
    values = group.detach().double().numpy()
    want = np.clip(np.exp(1.7 * (1 - values.mean(1)) + 2.3 * values.var(1)), 0.9, 4.1)
    assert torch.allclose(got, torch.from_numpy(want).float()) and not got.requires_grad


def test_at_the_papers_lambdas_the_lower_bound_never_acts():
    group = torch.rand(1000, 4, generator=torch.Generator().manual_seed(1))
    group[::10] = 1.0
    got = consistency_weight(group)
    assert got.min() == 1 and (got <= 3).all()
    assert torch.equal(consistency_weight(torch.zeros(2, 2)), torch.full((2,), 3.0))
