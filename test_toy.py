"""The embedded world: boxes against drawn pixels, expressions against a resolver that reads the text, splits and determinism."""
import collections
import itertools
import re

import numpy as np
import pytest

from toy import scenes
from toy.scenes import CATEGORIES, COLORS, SPLITS, scene

NINTHS = {"upper left": (0, 0), "top": (1, 0), "upper right": (2, 0), "left": (0, 1), "center": (1, 1), "right": (2, 1),
          "lower left": (0, 2), "bottom": (1, 2), "lower right": (2, 2)}
PHRASE = rf"(?:(leftmost|rightmost|topmost|lowest|largest|smallest) )?(?:({'|'.join(COLORS)}) )?({'|'.join(CATEGORIES)})"
EXPRESSION = re.compile(rf"the {PHRASE}(?: (?:in|at) the ({'|'.join(NINTHS)})| (left of|right of|above|below) the {PHRASE})?")


def middle(o):
    return (o.box[0] + o.box[2]) / 2, (o.box[1] + o.box[3]) / 2


def answers(text, objects):
    """All objects that an expression fits, read word by word."""
    extreme, color, category, region, relation, _, anchor_color, anchor_category = EXPRESSION.fullmatch(text).groups()
    pool = [o for o in objects if o.category == category and color in (None, o.color)]
    if region:
        third = scenes.SIDE / 3
        pool = [o for o in pool if tuple(min(2, int(c // third)) for c in middle(o)) == NINTHS[region]]
    if relation:
        anchor, = (o for o in objects if o.category == anchor_category and anchor_color in (None, o.color))
        def fits(o):
            dx, dy = (a - b for a, b in zip(middle(o), middle(anchor)))
            along = {"left of": -dx, "right of": dx, "above": -dy, "below": dy}[relation]
            return along > 0 and along >= (abs(dy) if relation in ("left of", "right of") else abs(dx))
        pool = [o for o in pool if o is not anchor and fits(o)]
    if extreme:
        area = lambda o: (o.box[2] - o.box[0]) * (o.box[3] - o.box[1])   # noqa: E731
        key = {"leftmost": lambda o: middle(o)[0], "rightmost": lambda o: -middle(o)[0], "topmost": lambda o: middle(o)[1],
               "lowest": lambda o: -middle(o)[1], "largest": lambda o: -area(o), "smallest": area}[extreme]
        pool = [min(pool, key=key)]
    return pool


@pytest.mark.parametrize("split", ["sft", "rft", "test"])
def test_every_expression_fits_exactly_one_object(split):
    records = scenes.records(split, 700)
    for _, s, text, box, category, _ in records:
        found = answers(text, s.objects)
        assert [o.box for o in found] == [box] and found[0].category == category, text
    kinds = collections.Counter(kind for *_, kind in records)
    assert set(kinds) == {"category", "attribute", "position", "extreme", "relation", "two-step"} and min(kinds.values()) > 30


def test_a_box_is_the_extent_of_what_is_drawn():
    """An object's pixels: those that differ from the same scene without it. The shadow lies to the lower right, up to two pixels."""
    for seed in range(40_000_000, 40_000_060):
        s = scene(seed, 1, 3)
        for o in s.objects:
            without = scenes.Scene(s.seed, s.terrain, s.strip, tuple(p for p in s.objects if p != o))
            y, x = np.nonzero(np.abs(np.asarray(s.draw(), int) - np.asarray(without.draw(), int)).max(2) > 12)
            assert abs(x.min() - o.box[0]) <= 1.5 and abs(y.min() - o.box[1]) <= 1.5
            assert -1.5 <= x.max() + 1 - o.box[2] <= 3 and -1.5 <= y.max() + 1 - o.box[3] <= 3


def test_objects_lie_in_the_image_and_apart():
    for seed in range(30_000_000, 30_000_300):
        s = scene(seed, 2, 5)
        assert all(0 <= o.box[0] < o.box[2] <= scenes.SIDE and 0 <= o.box[1] < o.box[3] <= scenes.SIDE for o in s.objects)
        for a, b in itertools.combinations(s.objects, 2):
            assert a.box[2] < b.box[0] or b.box[2] < a.box[0] or a.box[3] < b.box[1] or b.box[3] < a.box[1]


def test_a_seed_gives_one_world_and_splits_share_no_seed():
    first, again = scenes.records("val", 20), scenes.records("val", 20)
    assert first == again and np.array_equal(first[0][1].draw(), again[0][1].draw())
    spans = sorted((start, start + n) for start, n, _, _ in SPLITS.values())
    assert all(a[1] <= b[0] for a, b in zip(spans, spans[1:]))
    assert len({r[0] for r in first}) == len(first)
