"""reward.py: each term once by hand, then its properties.

The model of all tests here: a case that one can follow with a pencil, an independent slow way
to compute the same, then what must hold for every input.
"""
import math

import numpy as np
import pytest
import torch
from torch import Tensor

import reward
from reward import TERMS, consistency_weight, dispersion, iou, positional

IMAGE = torch.tensor([800.0, 400.0])             # width, height
NAN_BOX = [math.nan] * 4


def box(x1: float, y1: float, x2: float, y2: float) -> Tensor:
    return torch.tensor([x1, y1, x2, y2], dtype=torch.float32)


# The target of most cases. One deviation of its kernel is 2.5 * 40 / 2 = 50 px across and
# 2.5 * 20 / 2 = 25 px along.
#
#           x 100             140
#     y 100    +---------------+
#              |       +       |     20 high, the centre at (120, 110)
#     y 120    +---------------+
#                   40 wide
TARGET = box(100, 100, 140, 120)


# ---------------------------------------------------------------- one case each, by hand

#     x 0      5      10     15
#       +------+------+------+
#       |  a   |  ab  |  b   |       both 10 high: they share 5 x 10 = 50
#       +------+------+------+       of 100 + 100 - 50 = 150
@pytest.mark.parametrize("a, b, expected", [
    ((0, 0, 10, 10), (5, 0, 15, 10), 50 / 150),      # the drawing
    ((0, 0, 10, 10), (5, 5, 15, 15), 25 / 175),      # 5 down as well: 5 x 5 of 200 - 25
    ((0, 0, 10, 10), (2, 2, 7, 7), 25 / 100),        # one within the other: 5 x 5 of 100
    ((0, 0, 10, 10), (0, 0, 10, 10), 1.0),           # the same box
    ((0, 0, 10, 10), (10, 0, 20, 10), 0.0),          # side by side: an edge has no area
])
def test_iou_by_hand(a: tuple[float, ...], b: tuple[float, ...], expected: float) -> None:
    assert iou(box(*a), box(*b)).item() == pytest.approx(expected)


# The reward is a product of two means, one an axis. Measured in deviations t from the target's
# centre, an axis of the box is an interval, and its mean is that of exp(-t^2 / 2) over it:
#
#     t   -1         0         1         2
#          +---------+---------+---------+
#                [===+===]                      the target, -0.4 .. 0.4: mean 0.9740
#                          [===+===]            one deviation off, 0.6 .. 1.4: mean 0.6063
@pytest.mark.parametrize("pred, expected", [
    ((100, 100, 140, 120), 0.9486),     # the target: 0.9740 * 0.9740
    ((150, 100, 190, 120), 0.5905),     # 50 px right: 0.6063 over 0.6 .. 1.4, * 0.9740
    ((100, 125, 140, 145), 0.5905),     # 25 px down: the same along, 0.9740 * 0.6063
    ((110, 105, 130, 115), 0.9868),     # half as long: 0.9934 over -0.2 .. 0.2, squared
    ((0, 0, 800, 800), 0.0122),         # huge: 0.1554 (-2.4 .. 13.6) * 0.0783 (-4.4 .. 27.6)
    ((400, 100, 440, 120), 0.0),        # 300 px right: 3e-8 over 5.6 .. 6.4, * 0.9740
])
def test_positional_by_hand(pred: tuple[float, ...], expected: float) -> None:
    assert positional(box(*pred), TARGET).item() == pytest.approx(expected, abs=5e-5)


def test_positional_of_the_target_itself_worked_out() -> None:
    # A side is 2 / 2.5 = 0.8 deviations long, so on either axis the box reaches from -0.4 to
    # 0.4 deviations: u = 0.4 / sqrt(2) = 0.282843 on either side of the centre. The mean of
    # exp(-u^2) over it is
    #
    #     sqrt(pi) / 2 * erf(u) / u = 0.886227 * 0.310843 / 0.282843 = 0.973961 an axis,
    #
    # and 0.973961^2 = 0.948601 for both.
    u = 0.4 / math.sqrt(2)
    axis = math.sqrt(math.pi) / 2 * math.erf(u) / u
    assert math.erf(u) == pytest.approx(0.310843, abs=1e-6)
    assert axis == pytest.approx(0.973961, abs=1e-6)
    assert positional(TARGET, TARGET).item() == pytest.approx(axis ** 2, abs=1e-6)


# Two boxes of 10 x 10, 30 from centre to centre, in a hull of 40 x 10:
#
#     x 0     10            30     40
#       +------+ - - - - - - +------+
#       |  a   |             |  b   |
#       +------+ - - - - - - +------+
#
# Both scores are mapped from [-1, 1] to [0, 1].
def test_giou_and_diou_by_hand() -> None:
    a = box(0, 0, 10, 10)
    b = box(30, 0, 40, 10)
    # Nothing is shared, and the boxes cover 200 of the hull's 400: GIoU = 0 - 200 / 400.
    assert reward.giou(a, b).item() == pytest.approx((1 - 200 / 400) / 2)
    # The hull's diagonal squared is 40^2 + 10^2 = 1700: DIoU = 0 - 30^2 / 1700.
    assert reward.diou(a, b).item() == pytest.approx((1 - 900 / 1700) / 2)


@pytest.mark.parametrize("pred, distance", [
    ((30, 0, 40, 10), 30 / 800),                             # 30 right, of 800
    ((0, 20, 10, 30), 20 / 400),                             # 20 down, of 400
    ((30, 20, 40, 30), math.hypot(30 / 800, 20 / 400)),      # both
])
def test_center_by_hand(pred: tuple[float, ...], distance: float) -> None:
    # The farthest that two points of an image can lie apart is sqrt(2), corner to corner.
    score = reward.center(box(*pred), box(0, 0, 10, 10), IMAGE).item()
    assert score == pytest.approx(1 - distance / math.sqrt(2))


# A group's weight is exp(1.2 (1 - m) + v) within 0.5 .. 3, of its IoUs' mean m and variance v.
@pytest.mark.parametrize("group, expected", [
    ((0.5, 0.5, 0.0, 0.0), math.exp(1.2 * 0.75 + 0.0625)),     # m 0.25, v 0.25^2: 2.618
    ((1.0, 1.0, 1.0, 1.0), 1.0),                               # m 1, v 0: exp(0)
    ((0.0, 0.0, 0.0, 0.0), 3.0),                               # m 0, v 0: exp(1.2) = 3.32, cut
    ((1.0, 0.0), math.exp(0.6 + 0.25)),                        # m 0.5, v 0.5^2: 2.340
])
def test_weight_by_hand(group: tuple[float, ...], expected: float) -> None:
    assert consistency_weight(torch.tensor([group])).item() == pytest.approx(expected)


def test_terms_and_bounds_of_the_weight_by_hand() -> None:
    # m 0.25 and v 0.0625 again: 1.2 * 0.75 = 0.9 by the mean alone, 0.0625 by the variance.
    group = torch.tensor([[0.5, 0.5, 0.0, 0.0]])
    assert consistency_weight(group, variance=0.0).item() == pytest.approx(math.exp(0.9))
    assert consistency_weight(group, mean=0.0).item() == pytest.approx(math.exp(0.0625))
    # exp(-2 * 0.75 + 0.0625) = 0.24 meets the lower bound.
    assert consistency_weight(group, mean=-2.0).item() == 0.5
    # 2.618 meets an upper bound of 2.5.
    assert consistency_weight(group, low=2.0, high=2.5).item() == 2.5


# Three valid boxes and one that is none, in an image of 800 x 400:
#
#     x 100     200     300
#       [+]     [+]     [+]       y 100
#
# In widths of the image the centres lie 1/8 apart: Var x = (1/8^2 + 0 + 1/8^2) / 3 = 1/96.
# They have one height: Var y = 0.
def test_dispersion_by_hand() -> None:
    boxes = torch.tensor([
        [90.0, 90, 110, 110], [190, 90, 210, 110], [290, 90, 310, 110], NAN_BOX])
    valid = torch.tensor([[True, True, True, False]])
    scatter = dispersion(boxes[None], valid, IMAGE[None]).item()
    assert scatter == pytest.approx(math.sqrt(1 / 96))


# ---------------------------------------------------------------- every term

def random_boxes(n: int, side: int = 40, seed: int = 0) -> Tensor:
    """-> (n, 4) whole-numbered boxes of at least one pixel in a square."""
    random = torch.Generator().manual_seed(seed)
    corners = torch.randint(0, side, (n, 2, 2), generator=random)
    return torch.cat((corners.amin(1), corners.amax(1) + 1), 1).float()


def score(name: str, pred: Tensor, target: Tensor) -> Tensor:
    """A term as rft.py calls it, for one question: pred (G, 4), target (4,) -> (G,)."""
    return TERMS[name](pred[None], target[None, None], IMAGE[None, None])[0]


@pytest.mark.parametrize("name", TERMS)
def test_every_term_lies_in_0_and_1_and_is_best_at_the_target(name: str) -> None:
    boxes = torch.minimum(random_boxes(400) * 8, IMAGE.repeat(2))
    target = box(104, 56, 176, 120)
    # Random boxes are misses; the last one is a hit.
    boxes = torch.cat((boxes[reward.has_area(boxes)], box(100, 60, 180, 116)[None]))
    scores = score(name, boxes, target)
    assert scores.shape == (len(boxes),)
    assert (scores >= 0).all() and (scores <= 1).all() and scores.std() > 0.01
    # The positional term alone favours boxes a little smaller than the target.
    if name != "positional":
        assert (scores <= score(name, target[None], target)).all()


@pytest.mark.parametrize("name", TERMS)
def test_an_invalid_box_is_worth_nothing_and_poisons_nothing(name: str) -> None:
    target = box(10, 10, 20, 20)
    boxes = torch.tensor([
        [10.0, 10, 20, 20], NAN_BOX, [11, 11, 21, 21], [10, 10, 20, math.nan]])
    scores = score(name, boxes, target)
    assert scores[1] == scores[3] == 0
    assert 0 < scores[2] <= scores[0] <= 1
    # (Q, G) boxes with (Q, 1) targets, as rft.py has them.
    of_three = TERMS[name](
        boxes.expand(3, 4, 4), target.expand(3, 1, 4), IMAGE.expand(3, 1, 2))
    assert torch.equal(of_three, scores.expand(3, 4))


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("odd", [
    (100, 100, math.inf, 120), (-math.inf, -math.inf, math.inf, math.inf), (5, 5, 5, 9),
    (9, 9, 5, 5), tuple(NAN_BOX)])
def test_what_is_no_box_is_worth_nothing_on_either_side(
        name: str, odd: tuple[float, ...]) -> None:
    target = TARGET[None]
    assert score(name, box(*odd)[None], TARGET).tolist() == [0.0]
    if not name.startswith("iou"):
        assert score(name, target, box(*odd)).tolist() == [0.0]


@pytest.mark.parametrize("name", TERMS)
def test_a_huge_box_keeps_every_term_finite(name: str) -> None:
    """Areas of 1e40 are beyond float32."""
    scores = score(name, box(-1e20, -1e20, 1e20, 1e20)[None], TARGET)
    assert 0 <= scores.item() <= 1


# ---------------------------------------------------------------- IoU

def test_the_hard_iou_is_1_above_one_half() -> None:
    # IoU 0.5 exactly, 0.6, 1 and 0.
    boxes = torch.stack([box(0, 0, 5, 10), box(0, 0, 6, 10), box(0, 0, 10, 10), box(20, 0, 30, 9)])
    assert score("iou_hard", boxes, box(0, 0, 10, 10)).tolist() == [0, 1, 1, 0]


def covered(boxes: Tensor) -> Tensor:
    """(n, 4) -> (n, 40, 40) bool: which pixels a whole-numbered box covers."""
    at = torch.arange(40)
    columns = (at >= boxes[:, 0, None]) & (at < boxes[:, 2, None])
    rows = (at >= boxes[:, 1, None]) & (at < boxes[:, 3, None])
    return rows[:, :, None] & columns[:, None]


def test_iou_counts_pixels() -> None:
    """10,000 pairs: shared pixels over covered pixels, counted one by one."""
    a = random_boxes(10_000)
    b = random_boxes(10_000, seed=1)
    b[::100] = a[::100]
    shared = (covered(a) & covered(b)).sum((1, 2))
    either = (covered(a) | covered(b)).sum((1, 2))
    assert torch.equal(iou(a, b), shared / either)
    assert (iou(a, b) == 0).any() and (iou(a, b) == 1).sum() >= 100
    table = iou(a[:50, None], b[None, :60])
    assert torch.equal(table[7], iou(a[7].expand(60, 4), b[:60]))


# ---------------------------------------------------------------- the positional reward

def mean_of_kernel_on_a_grid(pred: Tensor, target: Tensor, alpha: float = 2.5) -> float:
    """The plain slow way: the mean over 1,500 x 1,500 midpoints of the predicted box."""
    axes = []
    for low in (0, 1):
        deviation = alpha * (target[low + 2] - target[low]) / 2
        centre = (target[low] + target[low + 2]) / 2
        share = (torch.arange(1500, dtype=torch.float64) + 0.5) / 1500
        at = pred[low] + (pred[low + 2] - pred[low]) * share
        axes.append(torch.exp(-(at - centre) ** 2 / (2 * deviation ** 2)))
    across, along = axes
    return (across[:, None] * along[None]).mean().item()


@pytest.mark.parametrize("alpha", [0.7, 2.5, 6.0])
def test_positional_beside_a_fine_grid(alpha: float) -> None:
    preds = random_boxes(40).double() * 3.7
    targets = random_boxes(40, seed=1).double() * 3.7
    for pred, target in zip(preds, targets):
        expected = pytest.approx(mean_of_kernel_on_a_grid(pred, target, alpha), 1e-4, 1e-12)
        assert positional(pred, target, alpha=alpha).item() == expected
        assert positional(pred.float(), target.float(), alpha=alpha).item() == expected


@pytest.mark.parametrize("scale", [1e-5, 1.0, 1e5])
def test_positional_does_not_depend_on_the_scale(scale: float) -> None:
    """What is scaled with all its surroundings keeps its value."""
    pred = box(150, 110, 190, 120).double()
    expected = positional(pred, TARGET.double()).item()
    scaled = positional(pred * scale, TARGET.double() * scale).item()
    assert scaled == pytest.approx(expected, rel=1e-9)


def test_positional_of_a_target_of_one_pixel() -> None:
    """Found, missed by a pixel, by ten, by a thousand: positive until a float's range ends."""
    target = box(400, 200, 401, 201)
    scores = []
    for shift in (0.0, 1.0, 10.0, 1000.0):
        scores.append(positional(target + torch.tensor([shift, 0, shift, 0]), target).item())
    assert scores[0] == pytest.approx(0.9486, abs=1e-4)
    assert scores[0] > scores[1] > scores[2] > 0 and scores[3] == 0
    ten_away = (target + torch.tensor([10.0, 0, 10, 0])).double()
    expected = mean_of_kernel_on_a_grid(ten_away, target.double())
    assert scores[2] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("side", [1e-3, 1e-9])
def test_positional_of_a_speck_is_the_kernel_at_its_place(side: float) -> None:
    """One deviation from the centre: exp(-1/2), however few digits the speck's sides leave."""
    speck = torch.tensor([170.0, 110.0, 170.0 + side, 110.0 + side], dtype=torch.float64)
    assert positional(speck, TARGET.double()).item() == pytest.approx(math.exp(-0.5), rel=1e-4)


def test_positional_at_the_ends_of_the_numbers() -> None:
    assert positional(box(-1e30, -1e30, 1e30, 1e30), TARGET).item() == 0
    assert positional(TARGET, box(5, 5, 5, 5)).item() == 0


def test_positional_falls_on_either_side_and_is_alive_where_nothing_overlaps() -> None:
    distance = torch.linspace(0, 240, 61)
    zero = torch.zeros(61)
    shift = torch.stack((distance, zero, distance, zero), 1)
    right = positional(TARGET + shift, TARGET)
    left = positional(TARGET - shift, TARGET)
    assert (right.diff() < 0).all() and (right > 0).all()
    assert torch.allclose(left, right, rtol=1e-4)
    assert (iou(TARGET + shift, TARGET)[11:] == 0).all()


# ---------------------------------------------------------------- consistency of a group

def test_weight_beside_numpy_and_without_gradient() -> None:
    random = torch.Generator().manual_seed(0)
    group = torch.rand(200, 8, generator=random).requires_grad_()
    weight = consistency_weight(group, 1.7, 2.3, 0.9, 4.1)
    values = group.detach().double().numpy()
    expected = np.exp(1.7 * (1 - values.mean(1)) + 2.3 * values.var(1)).clip(0.9, 4.1)
    assert torch.allclose(weight, torch.from_numpy(expected).float())
    assert not weight.requires_grad


def test_at_the_papers_lambdas_the_lower_bound_never_acts() -> None:
    group = torch.rand(1000, 4, generator=torch.Generator().manual_seed(1))
    group[::10] = 1.0
    weight = consistency_weight(group)
    assert weight.min() == 1 and (weight <= 3).all()
    assert torch.equal(consistency_weight(torch.zeros(2, 2)), torch.full((2,), 3.0))


def test_dispersion_leaves_invalid_boxes_out() -> None:
    boxes = torch.tensor([[[10.0, 10, 20, 20], NAN_BOX, [12, 12, 22, 22]]])
    valid = torch.tensor([[True, False, True]])
    of_two = dispersion(boxes[:, [0, 2]], valid[:, [0, 2]], IMAGE[None])
    assert dispersion(boxes, valid, IMAGE[None]).item() == pytest.approx(of_two.item())
