"""cot.py: what is written from annotations, and what a teacher writes.

Every sentence is read back and held against the boxes, without the writer's code. A teacher is
a real HTTP server on the loopback that errs.
"""
import argparse
import base64
import io
import itertools
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from email.utils import formatdate
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import cot
import data
from conftest import Run
from cot import Neighbor, explain, other_objects
from qwen.answer import THINK, Box, Frame, format_box, format_ok, parse_box
from qwen.processor import Processor, Prompt
from readers import base
from readers.base import Record
from tools import teacher
from tools.teacher import Explanation

Script = Callable[..., None]
Teach = Callable[..., list[dict[str, Any]]]

OBJECT = re.compile(
    r"(?P<phrase>an? [a-z ]+) near (?P<point>\(\d+, \d+\))"
    r"(?:, at the (?P<region>[a-z ]+))?(?:, of size (?P<size>\d+))?"
    r"(?:(?:, (?P<side>left of|right of|above|below) it)?(?:, (?P<distance>\d+) away)?"
    r"|(?P<same_place>, about where it is))(?:, (?P<extreme>[a-z]+) so far)?\.")
CHOICE = re.compile(r"so it is the one near (?P<point>\(\d+, \d+\))\.")
MOST_LISTED = 6


# ---------------------------------------------------------------- what the words mean

def middle(box: Box) -> tuple[float, float]:
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2


def surface(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def lies_in(region: str, box: Box, size: tuple[int, int]) -> bool:
    """Whether the ninth of the image that the words mean holds the center."""
    column = 0 if "left" in region else 2 if "right" in region else 1
    row = 1
    if "upper" in region or region == "top":
        row = 0
    elif "lower" in region or region == "bottom":
        row = 2
    x, y = middle(box)
    width = size[0] / 3
    height = size[1] / 3
    return (width * column <= x <= width * (column + 1)
            and height * row <= y <= height * (row + 1))


def half_step(frame: Frame) -> float:
    """Half of what places are rounded to.

    That is a fiftieth of the longer side, in fives, and five at least.
    """
    return max(2.5, 2.5 * round(max(frame.extent) / 250)) + 0.01


def scale_of(frame: Frame) -> list[float]:
    """Units of the model's frame in a pixel, across and down."""
    return [extent / original for extent, original in zip(frame.extent, frame.original)]


def is_near(point: str, box: Box, frame: Frame) -> bool:
    """Whether "(45, 60)" is the box's center to within half of the rounding step."""
    for number, value, scale in zip(re.findall(r"\d+", point), middle(box), scale_of(frame)):
        if abs(int(number) - value * scale) > half_step(frame):
            return False
    return True


def is_of_size(number: str, box: Box, frame: Frame) -> bool:
    """Whether the number is the square root of the box's area in the model's frame, rounded."""
    return abs(int(number) - math.sqrt(surface(box) * math.prod(scale_of(frame)))) <= 0.51


def is_away(number: str | int, box: Box, other: Box, frame: Frame) -> bool:
    """Whether the centers are so far from each other, to within half of the rounding step."""
    x, y = middle(box)
    other_x, other_y = middle(other)
    x_scale, y_scale = scale_of(frame)
    distance = math.hypot((x - other_x) * x_scale, (y - other_y) * y_scale)
    return abs(int(number) - distance) <= half_step(frame)


def holds(direction: str, box: Box, other: Box) -> bool:
    dx, dy = (a - b for a, b in zip(middle(box), middle(other)))
    if direction in ("left of", "right of"):
        return abs(dx) >= abs(dy) and (dx < 0 if direction == "left of" else dx > 0)
    return abs(dy) >= abs(dx) and (dy < 0 if direction == "above" else dy > 0)


# The expressions here name the anchor after one of these.
RELATION = re.compile(
    r"(?P<side>left of|right of|above|below|higher up than|further down than)"
    r"|(?P<distance>next to|nearest to)")
SIZES = {"largest": "largest|biggest", "smallest": "smallest|tiniest"}
# Name of an extreme -> words that ask for it, and a function of a box and the anchor's box that has
# the lowest value for the object that is meant.
EXTREMES = {
    "leftmost": ("leftmost|farthest to the left", lambda box, anchor: middle(box)[0]),
    "rightmost": ("rightmost|farthest to the right", lambda box, anchor: -middle(box)[0]),
    "topmost": ("topmost|uppermost|nearest to the top edge", lambda box, anchor: middle(box)[1]),
    "lowest": ("lowest|nearest to the bottom edge", lambda box, anchor: -middle(box)[1]),
    "nearest": ("next to|nearest to", lambda box, anchor: math.dist(middle(box), middle(anchor))),
    "largest": ("^the (?:largest|biggest)", lambda box, anchor: -surface(box)),
    "smallest": ("^the (?:smallest|tiniest)", lambda box, anchor: surface(box)),
}


# ---------------------------------------------------------------- reading a text back

@dataclass(frozen=True)
class Case:
    """A record with all that a text may speak of."""

    record: Record
    others: list[Neighbor]
    frame: Frame
    color: str = ""            # of the target

    @property
    def objects(self) -> list[Neighbor]:
        """All objects, the target first."""
        return [Neighbor(self.record.category, self.record.box, self.color), *self.others]

    @property
    def candidates(self) -> list[Box]:
        category = self.record.category
        colored = bool(self.color) and f"{self.color} {category}" in self.record.text
        return [o.box for o in self.objects
                if o.category == category and (not colored or o.color == self.color)]

    @property
    def relation(self) -> re.Match | None:
        return RELATION.search(self.record.text)

    @property
    def anchor_words(self) -> str:
        """The expression after the relation: "the largest red tank"."""
        return self.record.text[self.relation.end():].strip() if self.relation else ""

    @property
    def anchor_size(self) -> str | None:
        """"largest", "smallest" or None."""
        for size, words in SIZES.items():
            if re.match(rf"the (?:{words}) ", self.anchor_words):
                return size
        return None

    @property
    def anchors(self) -> list[Box]:
        """Objects that fit the anchor's noun and color; candidates too if a size tells it."""
        mentioned = [o for o in self.objects if o.category in self.anchor_words]
        colored = [o for o in mentioned
                   if o.color and f"{o.color} {o.category}" in self.anchor_words]
        boxes = [o.box for o in colored or mentioned]
        apart = [box for box in boxes if box not in self.candidates]
        return boxes if apart and self.anchor_size else apart

    @property
    def phrases(self) -> dict[Box, str]:
        """What each object is called: "a red ship"."""
        phrases = {}
        for o in self.objects:
            words = f"{o.color} {o.category}".strip()
            phrases[o.box] = f"{'an' if words[0] in 'aeiou' else 'a'} {words}"
        return phrases


def check_text(text: str, case: Case) -> None:
    """Reads the whole text, sentence by sentence; nothing may be left over."""
    assert format_ok(text)
    think = text[len("<think>"):text.index("</think>")]
    box = parse_box(text)
    wanted = case.frame.to_model(case.record.box)
    assert all(abs(a - b) <= 1 for a, b in zip(box, wanted))
    # The answer is not given away before it is reasoned for.
    assert str([int(v) for v in box])[1:-1] not in think
    sentences = read_sentences(think, case.record.text)
    if not case.anchors:
        assert candidates_are_true(sentences, None, case), think
        return
    # What the expression names is placed first.
    count = 1
    if case.anchor_size is not None and len(case.anchors) > 1:
        count = min(MOST_LISTED, len(case.anchors)) + 1
    anchors = [a for a in case.anchors if anchor_is_true(sentences[:count], a, case)]
    assert anchors, think
    # The sentence fits several objects if they lie close together.
    assert any(candidates_are_true(sentences[count:], a, case) for a in anchors), think


def read_sentences(think: str, expression: str) -> list[re.Match]:
    """The sentences after the expression: matches of OBJECT and CHOICE."""
    said = expression.replace("<", "(").replace(">", ")") + "."
    assert think.startswith(said)
    rest = think[len(said):]
    sentences = []
    while rest:
        assert rest[0] == " "
        match = OBJECT.match(rest, 1) or CHOICE.match(rest, 1)
        assert match, f"no sentence that can be checked: {rest!r}"
        sentences.append(match)
        rest = rest[match.end():]
    return sentences


def anchor_is_true(sentences: Sequence[re.Match], anchor: Box, case: Case) -> bool:
    """Whether the sentences place this anchor: in one, or as the largest or smallest of several."""
    several = len(sentences) > 1
    extremes = {}
    if case.anchor_size is not None:
        measure = partial(EXTREMES[case.anchor_size][1], anchor=None)
        if measure(anchor) > min(map(measure, case.anchors)):
            return False
        extremes[case.anchor_size] = measure

    def fits(sentence: re.Match, box: Box) -> bool:
        given = {name for name, words in sentence.groupdict().items() if words is not None}
        return given - {"extreme"} == {"phrase", "point"} | ({"size"} if several else set())

    boxes = case.anchors if several else [anchor]
    return choice_is_true(sentences, boxes, anchor, extremes, fits, case)


def candidates_are_true(sentences: Sequence[re.Match], anchor: Box | None, case: Case) -> bool:
    """Whether the sentences describe the candidates by what is asked for, and choose the target."""
    text = case.record.text
    # The extremes that are asked for, if the target is it among all that are annotated.
    extremes = {}
    for name, (words, value) in EXTREMES.items():
        if not re.search(words, text) or (name == "nearest" and anchor is None):
            continue
        measure = partial(value, anchor=anchor)
        if measure(case.record.box) == min(map(measure, case.candidates)):
            extremes[name] = measure
    asks_size = any(re.match(rf"the (?:{words}) ", text) for words in SIZES.values())
    asks_side = anchor is not None and case.relation["side"] is not None

    def fits(sentence: re.Match, box: Box) -> bool:
        gives = {name: words is not None for name, words in sentence.groupdict().items()}
        if gives["size"] != asks_size:
            return False
        if anchor is None:
            return (gives["region"] == (not extremes)
                    and not any(gives[name] for name in ("side", "distance", "same_place")))
        if gives["same_place"]:
            return not gives["region"] and is_away(0, box, anchor, case.frame)
        if (gives["region"], gives["side"], gives["distance"]) != (False, asks_side, not asks_side):
            return False
        if asks_side:
            return holds(sentence["side"], box, anchor)
        return int(sentence["distance"]) > 0 and is_away(
            sentence["distance"], box, anchor, case.frame)

    return choice_is_true(sentences, case.candidates, case.record.box, extremes, fits, case)


def choice_is_true(
        sentences: Sequence[re.Match], boxes: Sequence[Box], chosen: Box,
        extremes: dict[str, Callable[[Box], float]], fits: Callable[[re.Match, Box], bool],
        case: Case) -> bool:
    """Whether the sentences list the boxes from left to right and, of several, choose one.

    extremes: name -> number that is the least for the chosen box; the sentences use one of them.
    fits: whether what else a sentence says is asked for, and true of a box.
    """
    count = min(MOST_LISTED, len(boxes))
    several = count > 1
    if [s.re for s in sentences] != [OBJECT] * count + [CHOICE] * several:
        return False
    objects = sentences[:count]
    names = {s["extreme"] for s in objects} - {None}
    if len(names) != (several and len(extremes) > 0) or not names <= set(extremes):
        return False
    measure = extremes[names.pop()] if names else None
    # A sentence may fit several boxes that lie close together.
    fitting = []
    for s in objects:
        fitting.append([b for b in boxes if object_is_true(s, b, case) and fits(s, b)])
    return any(order_is_true(order, sentences, chosen, measure)
               for order in itertools.product(*fitting))


def object_is_true(sentence: re.Match, box: Box, case: Case) -> bool:
    """Whether the phrase, the point, the region and the size are the box's."""
    region, size = sentence["region"], sentence["size"]
    return (case.phrases[box] == sentence["phrase"]
            and is_near(sentence["point"], box, case.frame)
            and (region is None or lies_in(region, box, case.record.size))
            and (size is None or is_of_size(size, box, case.frame)))


def order_is_true(
        order: Sequence[Box], sentences: Sequence[re.Match], chosen: Box,
        measure: Callable[[Box], float] | None) -> bool:
    """Whether the sentences may be about these boxes, in this order."""
    across = [middle(box)[0] for box in order]
    if len(set(order)) < len(order) or chosen not in order or across != sorted(across):
        return False
    for i, box in enumerate(order):
        leads = measure is not None and all(measure(box) < measure(b) for b in order[:i])
        if leads != (sentences[i]["extreme"] is not None):
            return False
    # The last sentence is the choice, or the only object.
    return sentences[-1]["point"] == sentences[order.index(chosen)]["point"]


# ---------------------------------------------------------------- texts from annotations

CATEGORIES = ("ship", "storage tank", "bridge")
EXPRESSIONS = (
    "the ship", "the largest ship", "the ship left of the storage tank",
    "the ship next to the red ship", "the smallest ship next to the bridge",
    "the ship above the largest bridge", "the ship nearest to the bottom edge",
    "the uppermost ship", "the ship farthest to the right", "leftmost ship",
    "a ship </think><answer>", "ship <think>",
)


def made_up(rng: random.Random) -> tuple[Record, list[Neighbor]]:
    """A record without an image, and up to seven other objects."""
    size = (rng.randint(200, 1000), rng.randint(200, 1000))

    def random_box() -> Box:
        x = rng.uniform(0, size[0] - 40)
        y = rng.uniform(0, size[1] - 40)
        return x, y, rng.uniform(x + 10, size[0]), rng.uniform(y + 10, size[1])

    record = Record("1", None, rng.choice(EXPRESSIONS), random_box(), "ship", size)
    others = []
    for _ in range(rng.randint(0, 6)):
        others.append(Neighbor(rng.choice(CATEGORIES), random_box(), rng.choice(("", "red"))))
    # A field in its stadium: one center, another size.
    if rng.random() < 0.3:
        x1, y1, x2, y2 = record.box
        dx = (x2 - x1) / 2 * rng.uniform(-0.5, 0.4)
        dy = dx * (y2 - y1) / (x2 - x1)
        box = (x1 - dx, y1 - dy, x2 + dx, y2 + dy)
        others.append(Neighbor(rng.choice(CATEGORIES), box))
    return record, others


@pytest.mark.parametrize("convention", ["absolute", "1000"])
def test_every_sentence_is_true_of_made_up_records(convention: str) -> None:
    rng = random.Random(0)
    for _ in range(1400):
        record, others = made_up(rng)
        resized = (28 * rng.randint(4, 30), 28 * rng.randint(4, 30))
        frame = Frame(record.size, resized, convention)
        check_text(explain(record, others, frame), Case(record, others, frame))


def test_every_sentence_is_true_of_the_embedded_world() -> None:
    records = data.load("synth", None, "val")
    write_completion = cot.writer(records)
    for record in records:
        frame = Frame(record.size, record.size, "absolute")
        target, = (o for o in record.image.objects if o.box == record.box)
        others = [Neighbor(o.category, o.box, o.color)
                  for o in record.image.objects if o is not target]
        assert other_objects(record, records) == others
        check_text(write_completion(record, frame), Case(record, others, frame, target.color))


BRIDGE = "a bridge near (130, 30), of size 60, smallest so far."
LARGER_BRIDGE = "a bridge near (260, 240), of size 80."
SHIPS = ("a ship near (5, 105), of size 8, left of it, largest so far.",
         "a ship near (20, 20), of size 20, left of it, largest so far.",
         "a ship near (205, 25), of size 10, right of it.")
TWO_STEP = "the largest ship left of the smallest bridge"


@pytest.mark.parametrize("expression, right, wrong", [
    # The phrase, the point, the size, the side, the distance, the region.
    (TWO_STEP, "a ship near", "a bridge near"), (TWO_STEP, "a bridge near", "a ship near"),
    (TWO_STEP, "(20, 20)", "(20, 40)"), (TWO_STEP, "(130, 30)", "(130, 50)"),
    (TWO_STEP, "of size 20", "of size 23"), (TWO_STEP, "of size 80", "of size 83"),
    (TWO_STEP, ", of size 20", ""), (TWO_STEP, ", of size 60", ""),
    (TWO_STEP, "right of it", "left of it"), (TWO_STEP, ", right of it", ""),
    (TWO_STEP, ", right of it", ", right of it, 75 away"),
    ("the ship next to the bridge", "75 away", "95 away"),
    ("the ship next to the bridge", ", 75 away", ""),
    ("the ship in the upper left", "upper left.", "upper right."),
    ("the ship in the upper left", ", at the upper left.", "."),
    # "so far" at the wrong object, missing, of another extreme, though the target is not nearest.
    (TWO_STEP, SHIPS[2], SHIPS[2].replace("it.", "it, largest so far.")),
    (TWO_STEP, SHIPS[0], SHIPS[0].replace(", largest so far", "")),
    (TWO_STEP, SHIPS[1], SHIPS[1].replace(", largest so far", "")),
    (TWO_STEP, ", largest so far", ""), (TWO_STEP, "largest so far", "leftmost so far"),
    (TWO_STEP, ", smallest so far", ""), (TWO_STEP, "80.", "80, smallest so far."),
    ("the ship next to the bridge", "75 away", "75 away, nearest so far"),
    # The choice is missing, or another candidate's.
    (TWO_STEP, " so it is the one near (20, 20).", ""),
    (TWO_STEP, "so it is the one near (20, 20)", "so it is the one near (5, 105)"),
    (TWO_STEP, " so it is the one near (130, 30).", ""),
    (TWO_STEP, "so it is the one near (130, 30)", "so it is the one near (260, 240)"),
    # From right to left.
    (TWO_STEP, " ".join(SHIPS), " ".join(SHIPS[::-1])),
    (TWO_STEP, f"{BRIDGE} {LARGER_BRIDGE}", f"{LARGER_BRIDGE} {BRIDGE}"),
    # A sentence is missing, comes twice or says something else.
    (TWO_STEP, f" {SHIPS[2]}", ""), (TWO_STEP, f" {LARGER_BRIDGE}", ""),
    (TWO_STEP, SHIPS[2], f"{SHIPS[2]} {SHIPS[2]}"),
    (TWO_STEP, SHIPS[2], f"{SHIPS[2]} there are no others."),
])
def test_a_checker_that_accepts_anything_would_be_no_test(
        expression: str, right: str, wrong: str) -> None:
    record = Record("1", None, expression, (10.0, 10.0, 30.0, 30.0), "ship", (300, 300))
    others = [Neighbor("ship", (0.0, 100.0, 8.0, 108.0)),
              Neighbor("ship", (200.0, 20.0, 210.0, 30.0)),
              Neighbor("bridge", (100.0, 0.0, 160.0, 60.0))]
    if expression == TWO_STEP:
        others.append(Neighbor("bridge", (220.0, 200.0, 300.0, 280.0)))
    case = Case(record, others, Frame((300, 300), (300, 300), "absolute"))
    text = explain(record, others, case.frame)
    check_text(text, case)
    assert right in text, (right, text)
    with pytest.raises(AssertionError):
        check_text(text.replace(right, wrong), case)


@pytest.mark.parametrize("expression, count, leading", [
    ("the leftmost ship", 6, 0), ("the ship next to the largest tank", 12, 6)])
def test_of_many_objects_six_are_listed(expression: str, count: int, leading: int) -> None:
    """Of nine ships and nine tanks. The target is not the leftmost ship of all, only of those
    that are listed, so it is not called so."""
    frame = Frame((1000, 1000), (1000, 1000), "absolute")
    edges = (0.0, *range(500, 900, 50))
    ships = [Neighbor("ship", (x, 0.0, x + 20, 20.0)) for x in edges]
    # They grow from left to right, so each of those that are listed leads.
    tanks = [Neighbor("tank", (100.0 * i, 500.0, 100.0 * i + 20 + i, 520.0)) for i in range(9)]
    target = ships.pop(1 if "leftmost" in expression else 8)
    record = Record("1", None, expression, target.box, "ship", (1000, 1000))
    case = Case(record, ships + tanks, frame)
    text = explain(record, case.others, frame)
    check_text(text, case)
    assert text.count("near (") - text.count("so it is") == count
    assert text.count("largest so far") == leading and "leftmost so far" not in text


def test_reasoning_for_training_speaks_of_training_records_only(
        dior_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train = data.load("dior", dior_root, "train")
    test = data.load("dior", dior_root, "test")
    monkeypatch.setattr(cot, "explain", lambda record, others, frame, color: others)
    find_others = cot.writer(train)
    train_boxes = {r.box for r in train}
    for record in train:
        boxes = {o.box for o in find_others(record, Frame(record.size, record.size, "absolute"))}
        assert boxes <= train_boxes - {record.box}
        assert not boxes & {r.box for r in test}


def test_the_target_under_another_expression_is_no_other_object() -> None:
    def ship(identity: str, text: str, *box: float) -> Record:
        return Record(identity, "same.jpg", text, box, "ship", (100, 100))
    target = ship("0", "the ship", 10.0, 10.0, 50.0, 50.0)
    same_object = ship("1", "the grey one", 10.0, 10.0, 51.0, 50.0)
    other = ship("2", "the far ship", 70.0, 70.0, 90.0, 90.0)
    overlapping = ship("3", "the ship next to it", 30.0, 10.0, 70.0, 50.0)      # IoU 1/3
    same_image = [target, same_object, other, overlapping]
    assert [o.box for o in other_objects(target, same_image)] == [other.box, overlapping.box]


@pytest.mark.parametrize("category", ["</think>", "<answer>", "<think>"])
def test_a_tag_for_a_category_does_not_break_the_format(category: str) -> None:
    record = Record("1", None, f"the {category}", (10.0, 10.0, 30.0, 30.0), category, (300, 300))
    others = [Neighbor(category, (200.0, 20.0, 220.0, 60.0))]
    assert format_ok(explain(record, others, Frame((300, 300), (300, 300), "absolute")))


def test_what_shares_the_centre_lies_in_no_direction() -> None:
    record = Record("1", None, "the field in the stadium", (100.0, 100.0, 200.0, 200.0), "field",
                    (800, 800))
    others = [Neighbor("stadium", (50.0, 50.0, 250.0, 250.0))]
    text = explain(record, others, Frame((800, 800), (800, 800), "absolute"))
    assert text.startswith("<think>the field in the stadium. a stadium near (150, 150). "
                           "a field near (150, 150), about where it is.</think>")
    assert " of it" not in text and "away" not in text


@pytest.mark.parametrize("words, meant", [
    ("the red tank", 1), ("the tank", 0), ("the largest tank", 2), ("the smallest blue tank", 0),
    ("the biggest blue tank", 2)])
def test_of_several_anchors_the_one_that_the_words_mean_is_placed(words: str, meant: int) -> None:
    """Three tanks: small and blue, middling and red, large and blue."""
    tanks = [Neighbor("tank", (0, 0, 10, 10), "blue"), Neighbor("tank", (40, 0, 60, 20), "red"),
             Neighbor("tank", (70, 70, 110, 110), "blue")]
    record = Record("0", None, f"the truck nearest to {words}", (50.0, 50.0, 60.0, 60.0), "truck",
                    (112, 112))
    frame = Frame((112, 112), (112, 112), "absolute")
    phrase = f"a {tanks[meant].color} tank"
    point = cot.point_text(tanks[meant].box, frame)
    text = explain(record, tanks, frame)
    # A size tells it from others, so these are listed too.
    if "est" in words:
        assert f"{phrase} near {point}, of size" in text
        assert f"so it is the one near {point}. a truck" in text
        assert ("red" in text) == ("blue" not in words)
    else:
        assert f". {phrase} near {point}. a truck" in text
    check_text(text, Case(record, tanks, frame))


def test_an_anchor_of_the_targets_category_is_told_by_its_size() -> None:
    record = Record("0", None, "the white tank left of the largest tank", (10.0, 10.0, 20.0, 20.0),
                    "tank", (112, 112))
    others = [Neighbor("tank", (80.0, 70.0, 100.0, 90.0), "white"),
              Neighbor("tank", (40.0, 0.0, 70.0, 30.0), "red")]
    frame = Frame((112, 112), (112, 112), "absolute")
    text = explain(record, others, frame, "white")
    assert text.startswith(
        "<think>the white tank left of the largest tank. "
        "a white tank near (15, 15), of size 10, largest so far. "
        "a red tank near (55, 15), of size 30, largest so far. "
        "a white tank near (90, 80), of size 20. so it is the one near (55, 15). "
        "a white tank near (15, 15), left of it. a white tank near (90, 80), below it. "
        "so it is the one near (15, 15).</think>")
    check_text(text, Case(record, others, frame, "white"))


# ---------------------------------------------------------------- reasoning of one's own

answer_text = cot.writer((), answer_only=True)

SHIP = Record("7", None, "the ship", (1.0, 1.0, 2.0, 2.0), "ship", (9, 9))


def test_reasoning_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "own.jsonl"
    # U+2028 and U+0085 end a line for str.splitlines; in JSON they are letters.
    for think in ("it is there.", "one\u2028line", "one\x85line"):
        line = json.dumps({"id": 7, "think": think}, ensure_ascii=False)
        file.write_text("\n" + line + "\n", encoding="utf-8")
        assert cot.load_reasoning(file, [SHIP]) == {"7": (think, None)}
    # As Windows writes it.
    line = json.dumps({"id": "7", "think": "a"}).encode()
    file.write_bytes(b"\xef\xbb\xbf" + line + b"\r\n")
    assert cot.load_reasoning(file, [SHIP]) == {"7": ("a", None)}


@pytest.mark.parametrize("line", [
    "[1]", '{"id": "7"}', '{"id": "7", "think": 3}', '{"id": "7", "think": "\\ud800"}',
    '{"id": "7", "think": "</think>"}', '{"id": "7", "think": "a", "frame": {"original": [9, 9]}}',
    "[" * 100_000])
def test_a_line_that_is_no_reasoning_is_named(line: str, tmp_path: Path) -> None:
    file = tmp_path / "own.jsonl"
    file.write_text(json.dumps({"id": "7", "think": "a"}) + "\n" + line + "\n")
    with pytest.raises(base.DataError, match=r"own\.jsonl, line 2: "):
        cot.load_reasoning(file, [SHIP])


def test_a_record_without_reasoning_is_named(tmp_path: Path) -> None:
    file = tmp_path / "own.jsonl"
    file.write_text(json.dumps({"id": "7", "think": "a"}))
    other = Record("8", None, "the ship", (1.0, 1.0, 2.0, 2.0), "ship", (9, 9))
    with pytest.raises(base.DataError, match="no reasoning for 1 of 2"):
        cot.load_reasoning(file, [SHIP, other])


# ---------------------------------------------------------------- the command

@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Script:
    """script("dior", "--show", 3) runs cot.py's main in this process."""
    def script(*flags: object) -> None:
        monkeypatch.setattr("sys.argv", ["cot.py", *map(str, flags)])
        cot.main()
    return script


def test_it_can_be_looked_at(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "cot.png"
    done = run("cot.py", "synth", "--split", "val", "--show", 3, "--out", out)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("<think>") == 3 and out.exists()


def test_it_is_shown_in_the_coordinates_that_a_checkpoint_is_trained_on(
        script: Script, tiny_checkpoint: Path, dior_root: Path, tmp_path: Path,
        capsys: pytest.CaptureFixture[str]) -> None:
    records = data.load("dior", dior_root, "sft")
    processor = Processor.from_pretrained(tiny_checkpoint)
    original = Frame((120, 90), (120, 90), "absolute")
    resized = processor(data.open_image(records[0]), "").frame
    assert resized.extent != (120, 90)
    for flags, frame in ((), original), (("--init", tiny_checkpoint), resized):
        script("dior", "--root", dior_root, "--show", 1, "--out", tmp_path / "cot.png", *flags)
        assert cot.writer(records)(records[0], frame) in capsys.readouterr().out


def test_what_no_encoding_has_is_printed_all_the_same(
        run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (50, 50)).save(tmp_path / "a.png")
    row = {"image": "a.png", "text": "the ship \u8239 \ud800", "box": [1, 2, 30, 40]}
    (tmp_path / "train.jsonl").write_text(json.dumps(row))
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    done = run("cot.py", "jsonl", "--root", tmp_path, "--split", "train",
               "--out", tmp_path / "cot.png")
    assert done.returncode == 0 and r"the ship \u8239 ?." in done.stdout, done.stderr


def test_a_users_mistake_is_one_line(
        script: Script, dior_root: Path, tmp_path: Path,
        capsys: pytest.CaptureFixture[str]) -> None:
    row = {"image": "a.png", "text": "the ship", "box": [1, 2, 30, 40]}
    (tmp_path / "train.jsonl").write_text(json.dumps(row))
    message = "no usable record in the split train of jsonl: 1 of 1 .*missing image: 1"
    with pytest.raises(base.DataError, match=message) as error:
        script("jsonl", "--root", tmp_path, "--split", "train", "--out", tmp_path / "cot.png")
    assert "\n" not in str(error.value)
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as stop:
        script("dior", "--root", dior_root, "--out", tmp_path / "file" / "cot.png")
    printed = capsys.readouterr().err
    assert stop.value.code == 2 and str(tmp_path / "file") in printed
    assert printed.count("\n") == 1
    for name in ("cot.xyz", "cot.psd"):
        with pytest.raises(base.DataError, match=f"can't be written to .*{name}"):
            script("dior", "--root", dior_root, "--out", tmp_path / name)


# ---------------------------------------------------------------- what of a teacher is kept

HARBOR_SHIP = Record("7", None, "the ship", (100.0, 200.0, 300.0, 400.0), "ship", (800, 800))
# The model sees half the size: its box is [50, 100, 150, 200].
HALF_SIZE = Frame((800, 800), (400, 400), "absolute")
RIGHT_BOX = [50, 100, 150, 200]


def completion_of(think: str, box: object) -> str:
    return f'<think>{think}</think><answer>{{"bbox_2d": {box}}}</answer>'


@pytest.mark.parametrize("think", [
    "it is left of the pier.",
    "near (100, 150), above a ship at [300, 300.5, 340,399].",
    "of 3 ships, which fill 30% of it, the A380 is 2nd.",
    "the ship of 1997, x1 and y2 are not known."])
def test_an_explanation_is_kept_where_it_is_whole_agrees_and_does_not_leak(think: str) -> None:
    record = replace(HARBOR_SHIP, text="the ship of 1997")
    for box in (RIGHT_BOX, [52, 101, 149, 197], [50.5, 100.0, 150.2, 200.0]):
        text = "\n" + completion_of(think, box) + "\n"
        assert teacher.filter_explanation(text, record, HALF_SIZE) == (think, None)


@pytest.mark.parametrize("text", [
    "i can't say", "<think>it is left", "<think>it is left</think>",
    '<think>it is left</think><answer>{"bbox_2d": [50, 100, 15',
    completion_of(" ", RIGHT_BOX), completion_of("it is </think><answer> left.", RIGHT_BOX),
    completion_of("it is <answer> left.", RIGHT_BOX),
    '<answer>{"bbox_2d": [50, 100, 150, 200]}</answer>',
    "it is left." + completion_of("it is left.", RIGHT_BOX)])
def test_an_incomplete_chain_is_refused(text: str) -> None:
    assert teacher.filter_explanation(text, HARBOR_SHIP, HALF_SIZE) == (None, "incomplete chain")


@pytest.mark.parametrize("box", [
    [50, 100, 150], "[50, 100, 150, 200", [150, 200, 50, 100], '"50 100 150 200"',
    # Right in pixels of the original image, in thousandths, in shares of the sides.
    [100, 200, 300, 400], [125, 250, 375, 500], [0.125, 0.25, 0.375, 0.5]])
def test_an_answer_in_another_format_is_refused(box: object) -> None:
    text = completion_of("it is left.", box)
    reason = "inconsistent coordinate format"
    assert teacher.filter_explanation(text, HARBOR_SHIP, HALF_SIZE) == (None, reason)


@pytest.mark.parametrize("think", [
    "it is 40 pixels wide.", "it is 4 px wide.", "x = 5 is its left edge.",
    "it lies at 100, 150.", "at (0.25, 0.4).", "at 0.25 of the width.", "at (100, 450).",
    "near (100; 150).", "seen in 1997."])
def test_reasoning_whose_numbers_cant_be_converted_is_refused(think: str) -> None:
    text = completion_of(think, RIGHT_BOX)
    reason = "inconsistent coordinate format"
    assert teacher.filter_explanation(text, HARBOR_SHIP, HALF_SIZE) == (None, reason)


def test_a_wrong_box_is_refused() -> None:
    for box in ([250, 100, 350, 200], [50, 100, 90, 200], [0, 0, 400, 400]):
        text = completion_of("it is left.", box)
        assert teacher.filter_explanation(text, HARBOR_SHIP, HALF_SIZE) == (None, "wrong box")


@pytest.mark.parametrize("think", [
    "it lies in [50, 100, 150, 200].", "from 51 across and 102 down to 149 and 199.",
    "x1=50, y1=100, x2=150, y2=200", "x from 50 to 150, y 100-200",
    "top left (50, 100), one of 2 ships, bottom right (150, 200)",
    "left 50, top 100, width 101, height 99"])
def test_a_box_that_is_given_away_is_refused(think: str) -> None:
    text = completion_of(think, RIGHT_BOX)
    assert teacher.filter_explanation(text, HARBOR_SHIP, HALF_SIZE) == (None, "box given away")


def test_coordinates_of_a_teacher_are_converted_to_the_students(tmp_path: Path) -> None:
    """Points and boxes, in whole numbers; counts stay. Without a frame nothing is converted."""
    file = tmp_path / "explained.jsonl"
    think = "one of 7, near (100, 150), and [10,20.5, 30,40]"
    line = {"id": "7", "think": think, "frame": asdict(HALF_SIZE)}
    thousandths = Frame((800, 800), (112, 112), "1000")
    converted = "one of 7, near (250, 375), and [25,51, 75,100]"
    own_line = {"id": "7", "think": think}
    for content, student, wanted in [
            (line, thousandths, converted), (line, HALF_SIZE, think),
            (own_line, thousandths, think)]:
        file.write_text(json.dumps(content))
        text = cot.writer([HARBOR_SHIP], file)(HARBOR_SHIP, student)
        assert text == f"<think>{wanted}</think>{answer_text(HARBOR_SHIP, student)}"


def test_a_teachers_file_may_be_unfinished_but_must_be_of_these_images(tmp_path: Path) -> None:
    file = tmp_path / "explained.jsonl"
    line = {"id": "7", "think": "it is left.", "frame": asdict(HALF_SIZE)}
    file.write_text(json.dumps(line))
    other = replace(HARBOR_SHIP, id="8")
    frame = Frame((800, 800), (800, 800), "absolute")
    records = [HARBOR_SHIP, other]
    assert cot.writer(records, file)(other, frame) == cot.writer(records)(other, frame)
    with pytest.raises(base.DataError, match="record '7' is for an image of"):
        cot.load_reasoning(file, [replace(HARBOR_SHIP, size=(400, 400))])


# ---------------------------------------------------------------- a checkpoint as teacher

@pytest.mark.parametrize("flags, message", [
    (("--teacher", "{tmp}/nope"), "no checkpoint at"),
    (("--teacher", "{tiny}", "--device", "cuda"), "torch sees no CUDA device"),
    (("--teacher", "{tiny}", "--init", "{tiny}"), "--init is for the check"),
    (("--teacher", "{tiny}", "--model", "m"), "--model and --coords are about a server")])
def test_a_mistake_about_the_teacher_is_one_line(
        flags: tuple[str, ...], message: str, run: Run, tiny_checkpoint: Path, dior_root: Path,
        tmp_path: Path) -> None:
    flags = [flag.format(tmp=tmp_path, tiny=tiny_checkpoint) for flag in flags]
    out = tmp_path / "explained.jsonl"
    done = run("cot.py", "dior", "--root", dior_root, "--device", "cpu", "--out", out, *flags)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert message in done.stderr and not out.exists()


def requested_box(request: str) -> str:
    """The box in the request to a teacher."""
    return re.search(r"lies in the box (\[[\d, ]+\]);", request)[1]


class EverySecondRight:
    """Stands for `generate`: explains every second record rightly, and answers no other."""

    def __init__(self, processor: Processor) -> None:
        self.processor = processor
        self.requests: list[str] = []
        self.prompts: list[list[int]] = []

    def __call__(
            self, model: object, prompts: list[Prompt], *settings: object,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        completions = []
        for prompt in prompts:
            self.prompts.append(prompt.input_ids.tolist())
            self.requests.append(self.processor.decode(prompt.input_ids))
            text = completion_of("by the pier.", requested_box(self.requests[-1]))
            if len(self.requests) % 2 == 0:
                text = "i can't say"
            completions.append(self.processor.encode(text))
        tokens = torch.nn.utils.rnn.pad_sequence(completions, batch_first=True)[:, None]
        lengths = torch.tensor([[len(ids)] for ids in completions])
        return tokens, torch.zeros(tokens.shape), lengths


def test_a_teacher_can_be_stopped_and_goes_on_and_what_it_failed_at_is_written_from_the_annotations(
        monkeypatch: pytest.MonkeyPatch, script: Script, tiny_checkpoint: Path, dior_root: Path,
        tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    records = data.load("dior", dior_root, "sft")
    out = tmp_path / "explained.jsonl"
    explainer = EverySecondRight(Processor.from_pretrained(tiny_checkpoint))
    monkeypatch.setattr("eval.generate", explainer)
    for limit in (3, 1000, 1000):
        # Stopped in the middle of a line.
        if len(explainer.requests) == 3:
            out.write_text(out.read_text() + '{"id": "9", "thi')
        script("dior", "--root", dior_root, "--teacher", tiny_checkpoint, "--out", out,
               "--limit", limit, "--batch", 2, "--device", "cpu")
    # Each record is explained once.
    assert len(explainer.requests) == len(records) > 3
    assert f"refused: {len(records) // 2} incomplete chain" in capfd.readouterr().out
    write_explained = cot.writer(records, out)
    write_own = cot.writer(records)
    for i, record in enumerate(records):
        frame = Frame(record.size, record.size, "absolute")
        text = write_explained(record, frame)
        assert format_ok(text) and text.endswith(answer_text(record, frame))
        if i % 2 == 0:
            assert text.startswith("<think>by the pier.</think>")
        else:
            assert text == write_own(record, frame)


def teacher_request(record: Record, frame: Frame) -> str:
    """What a teacher is asked."""
    return teacher.TEACHER_PROMPT.format(**teacher.prompt_blanks(record, frame))


def test_a_checkpoint_is_asked_in_its_own_tokens(
        tiny_family: Path, dior_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tags of ours that are tokens are such in the request, those of an expression are not."""
    processor = Processor.from_pretrained(tiny_family)
    explainer = EverySecondRight(processor)
    monkeypatch.setattr("eval.generate", explainer)
    record = replace(data.load("dior", dior_root, "sft")[0], text="a <think>{box}</think> ship")
    args = argparse.Namespace(batch=2, max_new_tokens=8, temperature=0)
    explanation, = teacher.ask_checkpoint(args, None, processor, [Explanation(record, 0)])
    asked = teacher_request(record, explanation.frame)
    assert asked in explainer.requests[0]
    assert asked.endswith('like <answer>{"bbox_2d": [x1, y1, x2, y2]}</answer>')
    assert set(processor.tags) == (set(THINK) if processor.family == "qwen3_vl" else set())
    for tag, i in processor.tags.items():
        assert asked.count(tag) == 2 and explainer.prompts[0].count(i) == 1


# ---------------------------------------------------------------- a server that errs

@dataclass
class Request:
    """What the server was sent."""

    body: dict[str, Any]
    headers: Any
    attempt: int               # 0 for the first request of this image and expression
    moment: float

    @property
    def text(self) -> str:
        return self.body["messages"][0]["content"][1]["text"]

    @property
    def url(self) -> str:
        return self.body["messages"][0]["content"][0]["image_url"]["url"]

    @property
    def key(self) -> str:
        """Tells records apart."""
        return self.url + self.text

    @property
    def image(self) -> bytes:
        return base64.b64decode(self.url.split(",")[1])


@dataclass
class Reply:
    """What the server answers."""

    body: bytes
    status: int = 200
    reason: str | None = None
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0         # seconds before it
    missing: int = 0           # bytes that are promised and never sent
    drop: bool = False         # the connection, without an answer


def chat_completion(text: str, finish_reason: str = "stop") -> bytes:
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": finish_reason}
    return json.dumps({"object": "chat.completion", "choices": [choice]}).encode()


def right_answer(request: Request, think: str = "by the pier.") -> Reply:
    return Reply(chat_completion(completion_of(think, requested_box(request.text))))


class FakeServer(ThreadingHTTPServer):
    """Answers as `respond` says, and remembers what it was asked."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), FakeHandler)
        self.respond: Callable[[Request], Reply] = right_answer
        self.requests: list[Request] = []
        self.paths: set[str] = set()
        self.at_once = 0
        self.most_at_once = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class FakeHandler(BaseHTTPRequestHandler):
    server: FakeServer

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        request = Request(body, self.headers, 0, time.monotonic())
        with self.server.lock:
            request.attempt = [r.key for r in self.server.requests].count(request.key)
            self.server.requests.append(request)
            self.server.paths.add(self.path)
            self.server.at_once += 1
            self.server.most_at_once = max(self.server.most_at_once, self.server.at_once)
        reply = self.server.respond(request)
        time.sleep(reply.delay)
        # Before the answer is sent, for the client may ask again as soon as it has it.
        with self.server.lock:
            self.server.at_once -= 1
        try:
            self.reply(reply)
        except OSError:
            # The client has gone.
            pass

    def do_CONNECT(self) -> None:
        """Asked to be a tunnel, as a proxy is for https: refuses."""
        self.server.paths.add(f"{self.path} {self.headers['Authorization']}")
        self.reply(Reply(b"", 502))

    def reply(self, reply: Reply) -> None:
        if reply.drop:
            self.close_connection = True
            return
        self.send_response(reply.status, reply.reason)
        self.send_header("Content-Length", str(len(reply.body) + reply.missing))
        for name, value in reply.headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(reply.body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[FakeServer]:
    server = FakeServer()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def teach(
        script: Script, server: FakeServer, dior_root: Path, tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch) -> Teach:
    """teach("--want", 3) has the server explain the dior records -> the lines of the file."""
    monkeypatch.setattr(teacher, "FIRST_BACKOFF", 0.01)
    out = tmp_path / "explained.jsonl"

    def teach(*flags: object) -> list[dict[str, Any]]:
        script("dior", "--root", dior_root, "--out", out, "--teacher", server.url,
               "--model", "big", "--coords", "original", *flags)
        return read_lines(out)
    return teach


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a teacher's file; every one must be whole, and no id may come twice."""
    content = path.read_text()
    assert content.endswith("\n") or not content
    lines = [json.loads(line) for line in content.splitlines()]
    ids = [line["id"] for line in lines]
    assert len(set(ids)) == len(ids)
    return lines


def test_a_server_is_asked_as_the_protocol_says(
        teach: Teach, server: FakeServer, dior_root: Path,
        monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The image is the file as it is, and the box the one that `format_box` writes."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-0123456789")
    records = data.load("dior", dior_root, "sft")
    lines = teach("--max-new-tokens", 77, "--temperature", 0.5)
    assert server.paths == {"/v1/chat/completions"} and len(server.requests) == len(records)
    assert {line["id"] for line in lines} == {r.id for r in records}
    by_image = {Path(r.image).read_bytes() for r in records}
    for request in server.requests:
        body = request.body
        assert (body["model"], body["max_tokens"], body["temperature"]) == ("big", 77, 0.5)
        assert request.headers["Authorization"] == "Bearer sk-0123456789"
        assert request.url.startswith("data:image/jpeg;base64,") and request.image in by_image
    asked = {(r.image, r.text) for r in server.requests}
    for record in records:
        frame = Frame(record.size, record.size, "absolute")
        text = teacher_request(record, frame)
        assert "in pixels of the image, which is 120 wide and 90 high" in text
        assert (Path(record.image).read_bytes(), text) in asked
    printed = capsys.readouterr()
    assert f"{len(records)} of {len(records)} records have reasoning" in printed.out
    assert f"kept {len(records)} refused 0" in printed.err


@pytest.mark.parametrize("coords", ["original", "resized", "1000"])
def test_a_server_is_asked_and_read_in_its_own_coordinates(
        coords: str, script: Script, server: FakeServer, tiny_checkpoint: Path, tmp_path: Path,
) -> None:
    """It answers with the box of the request, and names a point that is right there."""
    Image.new("RGB", (300, 200)).save(tmp_path / "a.png")
    row = {"id": "a", "image": "a.png", "text": "the ship", "box": [30, 40, 90, 140]}
    (tmp_path / "train.jsonl").write_text(json.dumps(row))
    resized = Processor.from_pretrained(tiny_checkpoint).patches(Image.new("RGB", (300, 200)))[2]
    frame = {"original": Frame((300, 200), (300, 200), "absolute"),
             "resized": Frame((300, 200), resized, "absolute"),
             "1000": Frame((300, 200), (300, 200), "1000")}[coords]
    assert resized != (300, 200)
    x, y = frame.to_model((150, 100))
    server.respond = lambda request: right_answer(request, f"right of ({x:.0f}, {y:.0f}).")
    init = ("--init", tiny_checkpoint) if coords == "resized" else ()
    out = tmp_path / "explained.jsonl"
    script("jsonl", "--root", tmp_path, "--split", "train", "--out", out, "--teacher", server.url,
           "--model", "big", "--coords", coords, *init)
    record, = data.load("jsonl", tmp_path, "train")
    assert requested_box(server.requests[0].text) == format_box(record.box, frame)
    student = Frame((300, 200), (300, 200), "absolute")
    text = cot.writer([record], out)(record, student)
    point = re.search(r"right of \((\d+), (\d+)\)\.", text).groups()
    assert abs(int(point[0]) - 150) <= 1 and abs(int(point[1]) - 100) <= 1
    assert text.endswith(answer_text(record, student))


@pytest.mark.parametrize("save, kind, as_it_is", [
    ({"format": "JPEG"}, "jpeg", True), ({"format": "PNG"}, "png", True),
    ({"format": "TIFF"}, "png", False), ({"format": "JPEG", "exif": True}, "png", False)])
def test_an_image_travels_as_its_file_or_as_png(
        save: dict[str, Any], kind: str, as_it_is: bool, tmp_path: Path) -> None:
    """An image that its file says to turn is sent as it is stored, which is what boxes are of."""
    file = tmp_path / "image.jpg"
    pixels = np.random.default_rng(0).integers(0, 255, (20, 30, 3), np.uint8)
    if "exif" in save:
        exif = Image.Exif()
        exif[0x0112] = 6
        save = save | {"exif": exif}
    Image.fromarray(pixels).save(file, **save)
    record = Record("0", file, "the ship", (1.0, 1.0, 9.0, 9.0), "ship", (30, 20))
    head, content = teacher.image_data_url(record).split(",")
    content = base64.b64decode(content)
    assert head == f"data:image/{kind};base64" and (content == file.read_bytes()) == as_it_is
    with Image.open(io.BytesIO(content)) as sent:
        assert sent.getexif().get(0x0112, 1) == 1
        assert np.array_equal(np.asarray(sent.convert("RGB")), np.asarray(data.open_image(record)))


def test_what_others_would_show_otherwise_travels_as_it_is_seen_here(tmp_path: Path) -> None:
    """A server may put transparency on black, or drop the low byte of 16 bits."""
    rgba = np.full((20, 30, 4), (200, 30, 90, 100), np.uint8)
    Image.fromarray(rgba).save(tmp_path / "clear.png")
    deep = np.arange(600, dtype=np.uint16).reshape(20, 30)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    for name, stretch in (("clear", None), ("deep", (2.0, 98.0))):
        record = Record(
            "0", tmp_path / f"{name}.png", "x", (1.0, 1.0, 9.0, 9.0), "", (30, 20), stretch=stretch)
        _, content = teacher.image_data_url(record).split(",")
        with Image.open(io.BytesIO(base64.b64decode(content))) as sent:
            assert sent.mode == "RGB"
            assert np.array_equal(np.asarray(sent), np.asarray(data.open_image(record)))


def test_a_bad_image_is_left_undone_and_the_others_are_explained(
        script: Script, server: FakeServer, dior_root: Path, tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
) -> None:
    root = tmp_path / "dior"
    shutil.copytree(dior_root, root)
    path = root / "JPEGImages" / "00003.jpg"
    path.write_bytes(path.read_bytes()[:-400])
    out = tmp_path / "explained.jsonl"
    script("dior", "--root", root, "--out", out, "--teacher", server.url, "--model", "big",
           "--coords", "original")
    records = data.load("dior", root, "sft")
    whole = {record.id for record in records if record.image != path}
    assert {line["id"] for line in read_lines(out)} == whole
    printed = capsys.readouterr().out
    assert f"left undone: {len(records) - len(whole)}" in printed
    assert "00003.jpg: unreadable image of record" in printed


def test_a_drawn_scene_travels_as_png() -> None:
    record = data.load("synth", None, "val")[0]
    head, content = teacher.image_data_url(record).split(",")
    assert head == "data:image/png;base64"
    with Image.open(io.BytesIO(base64.b64decode(content))) as sent:
        assert np.array_equal(np.asarray(sent), np.asarray(record.image.draw()))


FAILURES: list[Callable[[Request], Reply]] = [
    lambda request: Reply(b"slow down", 429, headers={"Retry-After": "0"}),
    lambda request: Reply(b"", 429),
    lambda request: Reply(b"<html>oops", 500),
    lambda request: Reply(b"busy", 503, headers={"Retry-After": "soon"}),
    lambda request: replace(right_answer(request), missing=100),
    lambda request: replace(right_answer(request), drop=True),
    lambda request: Reply(right_answer(request).body[:-20]),
    lambda request: Reply(b"\xff\xfe nonsense"),
    lambda request: Reply(b"[" * 100_000),
    lambda request: Reply(b'{"choices": []}'),
    lambda request: Reply(b'{"choices": [{"message": {"content": null}}]}'),
    lambda request: Reply(b'{"error": {"message": "overloaded", "code": 502}, "choices": null}'),
    lambda request: Reply(b'{"object": "error", "message": "busy", "code": 50001}'),
    lambda request: Reply(chat_completion("<think>it is", "length")),
    lambda request: replace(right_answer(request), delay=3),
]


def test_what_fails_is_asked_again(
        teach: Teach, server: FakeServer, dior_root: Path) -> None:
    """Every record meets another failure, some of them two, and then the right answer."""
    records = data.load("dior", dior_root, "sft")
    assert len(records) >= len(FAILURES)
    order: dict[str, int] = {}

    def respond(request: Request) -> Reply:
        place = order.setdefault(request.key, len(order))
        if request.attempt <= place % 2:
            return FAILURES[(place + request.attempt) % len(FAILURES)](request)
        return right_answer(request)
    server.respond = respond
    lines = teach("--timeout", 2, "--parallel", 4)
    assert {line["id"] for line in lines} == {r.id for r in records}
    assert all(line["think"] == "by the pier." for line in lines)
    wanted = sum(2 + place % 2 for place in range(len(records)))
    assert len(server.requests) == wanted
    # Each try has its own seed.
    seeds = {(r.key, r.body["seed"]) for r in server.requests}
    assert len(seeds) == wanted


def test_a_slow_trickle_is_given_up_in_time(
        teach: Teach, server: FakeServer, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str]) -> None:
    """A byte now and then keeps a socket's time-out from running out."""
    def trickle(self: FakeHandler, reply: Reply) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        for _ in range(100):
            self.wfile.write(b" ")
            self.wfile.flush()
            time.sleep(0.1)
    monkeypatch.setattr(FakeHandler, "reply", trickle)
    began = time.monotonic()
    with pytest.raises(SystemExit):
        teach("--timeout", 0.5, "--tries", 1, "--limit", 2)
    assert time.monotonic() - began < 6
    assert "no whole answer within 0.5 s" in capsys.readouterr().err


def test_a_server_that_asks_to_wait_is_not_asked_before(
        teach: Teach, server: FakeServer) -> None:
    later = formatdate(time.time() + 3, usegmt=True)

    def respond(request: Request) -> Reply:
        if request.attempt == 0:
            return Reply(b"", 429, headers={"Retry-After": "1"})
        if request.attempt == 1:
            return Reply(b"", 503, headers={"Retry-After": later})
        return right_answer(request)
    server.respond = respond
    teach("--limit", 1)
    first, second, third = (r.moment for r in server.requests)
    assert second - first >= 1 and third - first >= 1.9


def test_what_never_succeeds_is_left_undone_and_asked_again_by_the_next_call(
        teach: Teach, server: FakeServer, capsys: pytest.CaptureFixture[str],
) -> None:
    bad = {}

    def respond(request: Request) -> Reply:
        key = request.key
        if len(bad) < 3:
            bad.setdefault(key, FAILURES[2 + 11 * (len(bad) % 2)])
        return bad[key](request) if key in bad else right_answer(request)
    server.respond = respond
    lines = teach("--tries", 3)
    printed = capsys.readouterr().out
    assert "left undone: 3, the first is " in printed and "3 are still to come" in printed
    assert "500: <html>oops" in printed or "cut at --max-new-tokens" in printed
    assert not any("refused" in line for line in lines)
    for key in bad:
        assert [r.key for r in server.requests].count(key) == 3
    server.respond = right_answer
    before = len(server.requests)
    again = teach()
    assert again[:len(lines)] == lines and len(again) == len(lines) + 3
    assert len(server.requests) == before + 3


PARTS = ({"type": "text", "text": "<think>by the "},
         {"type": "text", "text": "pier.</think>{box}"})
MESSAGES: list[dict[str, Any]] = [
    # A reasoning parser took the block's text for the model's own thoughts.
    {"reasoning_content": "by the pier.", "content": "{box}"},
    {"reasoning": "\nby the pier.\n", "reasoning_content": None, "content": "\n\n{box}"},
    {"reasoning_content": "<think>by the pier.</think>", "content": "{box}"},
    # It found no end of the thoughts, or the first of two.
    {"reasoning_content": "<think>by the pier.</think>{box}", "content": None},
    {"reasoning": "I see.</think><think>by the pier.</think>{box}", "content": ""},
    {"reasoning_content": "I write <think> and",
     "content": "so on.</think><think>by the pier.</think>{box}"},
    # The thoughts are the model's own, and the block is in the answer.
    {"reasoning_content": "It lies in {box}.", "content": "<think>by the pier.</think>{box}"},
    {"reasoning": "I see 99 of them", "content": "<think>by the pier.</think>\n{box}"},
    # Without a parser: the template has opened the block, or the model thinks first.
    {"content": "by the pier.</think>{box}"},
    {"content": "I see.</think>by the pier.</think>{box}"},
    {"content": "I see.</think>\n\n<think>by the pier.</think>{box}"},
    {"content": "<think>A draft: {box}</think><think>by the pier.</think>{box}"},
    {"content": "Well, the box is known. <think>by the pier.</think>{box}"},
    # In parts.
    {"content": PARTS},
    {"content": [{"type": "text", "text": "{box}"}], "reasoning": "by the pier."},
    {"content": [{"type": "thinking", "thinking": [{"type": "text", "text": "by the pier."}]},
                 {"type": "text", "text": "{box}"}]},
]


def answer_with(request: Request, message: Any, **choice: Any) -> Reply:
    """A chat completion with this message, "{box}" being the right answer."""
    answer = completion_of("", requested_box(request.text)).removeprefix("<think></think>")
    choice = {"message": message, "finish_reason": "stop"} | choice
    written = json.dumps({"choices": [choice]}).replace("{box}", json.dumps(answer)[1:-1])
    return Reply(written.encode())


@pytest.mark.parametrize("message", MESSAGES, ids=range(len(MESSAGES)))
def test_reasoning_is_read_wherever_servers_put_it(
        message: dict[str, Any], teach: Teach, server: FakeServer) -> None:
    server.respond = lambda request: answer_with(request, message)
    lines = teach("--limit", 2, "--tries", 1)
    assert [line.get("think") for line in lines] == ["by the pier."] * 2


def test_a_checkpoints_own_thoughts_are_dropped_too() -> None:
    """A Thinking model's template opens the block, and the model writes its end only."""
    answer = completion_of("by the pier.", RIGHT_BOX)
    assert teacher.last_block(f"It is given. </think>\n{answer}") == answer
    assert teacher.last_block(answer.removeprefix("<think>")) == answer
    for text in ("i can't say", "<think>it is", "<answer>[1, 2", "a </think> b"):
        assert teacher.last_block(text) == text


@pytest.mark.parametrize("message", [
    {"content": "{box}"}, {"content": "{box}", "reasoning_content": ""},
    {"content": None, "reasoning": "I know the box"}, {"content": "It is here. {box}"},
    {"content": "I know.</think>It is by the pier. {box}"},
    {"content": "[1, 2, 3, 4]", "reasoning": "by the pier."}, {"content": "It is by the pier."}])
def test_a_server_that_removes_the_reasoning_ends_the_run_at_once(
        message: dict[str, Any], teach: Teach, server: FakeServer, tmp_path: Path) -> None:
    server.respond = lambda request: answer_with(request, message)
    with pytest.raises(base.DataError, match="start the server without a reasoning parser"):
        teach("--parallel", 1)
    assert len(server.requests) == 3 and not read_lines(tmp_path / "explained.jsonl")
    with pytest.raises(SystemExit):
        teach("--tries", 1, "--limit", 2)
    assert not read_lines(tmp_path / "explained.jsonl")


def test_a_single_answer_without_reasoning_is_asked_again_or_refused(
        teach: Teach, server: FakeServer, dior_root: Path) -> None:
    """It is refused once other answers, of this call or another, have shown their reasoning."""
    def respond(request: Request) -> Reply:
        with server.lock:
            first = server.requests[0] is request
        return answer_with(request, {"content": "{box}"}) if first else right_answer(request)
    server.respond = respond
    lines = teach("--limit", 5, "--parallel", 1)         # so that no other answer comes before
    assert {line["think"] for line in lines} == {"by the pier."}
    server.respond = lambda request: answer_with(request, {"content": "{box}"})
    assert [line["refused"] for line in teach("--limit", 2)[5:]] == ["incomplete chain"] * 2


@pytest.mark.parametrize("reason", [
    "length", "content_filter", "tool_calls", "abort", "error", "insufficient_system_resource",
    None])
def test_an_answer_that_did_not_stop_is_asked_again(
        reason: str | None, teach: Teach, server: FakeServer) -> None:
    """Even if it looks whole."""
    def respond(request: Request) -> Reply:
        if request.attempt == 0:
            return answer_with(request, {"content": "<think>it</think>{box}"}, finish_reason=reason)
        return right_answer(request)
    server.respond = respond
    assert [line["think"] for line in teach("--limit", 2)] == ["by the pier."] * 2


@pytest.mark.parametrize("status", [403, 404])
def test_one_record_that_is_refused_is_left_undone(
        status: int, teach: Teach, server: FakeServer, dior_root: Path,
        capsys: pytest.CaptureFixture[str]) -> None:
    """The first of all, with whatever the server says of it."""
    first: list[str] = []

    def respond(request: Request) -> Reply:
        first.append(request.key)
        flagged = Reply(b'{"error": {"message": "it is flagged"}}', status)
        return flagged if request.key == first[0] else right_answer(request)
    server.respond = respond
    lines = teach("--parallel", 1)
    assert len(lines) == len(data.load("dior", dior_root, "sft")) - 1
    assert first.count(first[0]) == 1
    assert f"left undone: 1, the first is '0' ({status}: it is flagged; check " in (
        capsys.readouterr().out)


@pytest.mark.parametrize("body, words", [
    ({"error": {"message": "no credits", "code": 402}}, "402: no credits"),
    ({"error": "no such model", "choices": []}, "200: no such model"),
    ({"object": "error", "message": "too long", "code": 400}, "400: too long"),
    ({"detail": "not now"}, "200: not now"), ({"status": "Fehler äöü"}, '"Fehler äöü"'),
    ({"choices": [{"error": {"message": "upstream is gone"}, "finish_reason": "error",
                   "message": {"content": "<think>"}}]}, "200: upstream is gone"),
    ({"choices": [{"finish_reason": "stop", "message": {"content": None, "refusal": "I won't"}}]},
     "I won't")])
def test_an_error_with_status_200_is_told_in_the_servers_words(
        body: dict[str, Any], words: str, teach: Teach, server: FakeServer,
        capsys: pytest.CaptureFixture[str]) -> None:
    server.respond = lambda request: Reply(json.dumps(body).encode())
    with pytest.raises(SystemExit):
        teach("--limit", 2, "--tries", 1)
    printed = capsys.readouterr()
    assert words in printed.out and words in printed.err


@pytest.mark.parametrize("status, words", [
    (400, "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."),
    (422, "extra inputs are not permitted: max_tokens"),
    (200, "use max_completion_tokens")])
def test_a_server_may_know_max_completion_tokens_only(
        status: int, words: str, teach: Teach, server: FakeServer, dior_root: Path) -> None:
    def respond(request: Request) -> Reply:
        if "max_tokens" in request.body:
            return Reply(json.dumps({"error": {"message": words}}).encode(), status)
        assert request.body["max_completion_tokens"] == 400
        return right_answer(request)
    server.respond = respond
    lines = teach("--tries", 1, "--parallel", 2)
    assert len(lines) == len(data.load("dior", dior_root, "sft"))
    # It is refused once, or twice at once.
    assert len(server.requests) <= len(lines) + 2


def test_a_request_that_the_server_refuses_is_not_repeated(
        teach: Teach, server: FakeServer, capsys: pytest.CaptureFixture[str],
) -> None:
    message = json.dumps({"error": {"message": "the image is\ntoo \x1b[31mlarge"}}).encode()
    first: list[str] = []

    def respond(request: Request) -> Reply:
        first.append(request.key)
        if request.key == first[0]:
            return Reply(message, 400)
        return right_answer(request)
    server.respond = respond
    teach()
    assert first.count(first[0]) == 1
    assert "(400: the image is too [31mlarge)" in capsys.readouterr().out


def test_counts_of_what_is_refused_are_shown_by_reason(
        teach: Teach, server: FakeServer, capsys: pytest.CaptureFixture[str],
) -> None:
    order: dict[str, int] = {}

    def respond(request: Request) -> Reply:
        place = order.setdefault(request.key, len(order))
        box = requested_box(request.text)
        texts = {0: "<think>it is", 1: completion_of("it is left.", "[50, 60]"),
                 2: completion_of("it is left.", "[1, 1, 3, 3]"),
                 3: completion_of(f"it is in {box}.", box)}
        return Reply(chat_completion(texts[place])) if place < 4 else right_answer(request)
    server.respond = respond
    lines = teach()
    refused = [line for line in lines if "refused" in line]
    assert sorted(line["refused"] for line in refused) == [
        "box given away", "incomplete chain", "inconsistent coordinate format", "wrong box"]
    assert all(line["text"] and line["frame"] for line in refused)
    printed = capsys.readouterr().out
    for reason in ("box given away", "incomplete chain", "inconsistent coordinate format",
                   "wrong box"):
        assert f"  refused: 1 {reason}\n" in printed


def test_it_stops_when_enough_are_kept(
        teach: Teach, server: FakeServer) -> None:
    """Refused ones do not count, and what is in the file counts. No answer is waited for."""
    def respond(request: Request) -> Reply:
        with server.lock:
            place = server.requests.index(request)
        if place == 1:
            return Reply(chat_completion("i can't say"))
        return replace(right_answer(request), delay=30 if place > 6 else 0)
    server.respond = respond
    began = time.monotonic()
    lines = teach("--want", 5, "--parallel", 2)
    assert time.monotonic() - began < 10
    assert sum("think" in line for line in lines) == 5 and len(lines) <= 6
    assert teach("--want", 5) == lines
    server.respond = lambda request: replace(right_answer(request), delay=0.05)
    again = teach("--want", 8, "--parallel", 2)
    assert again[:len(lines)] == lines and sum("think" in line for line in again) == 8
    # Beside the two requests under way none is sent any more.
    asked = len(server.requests)
    time.sleep(0.5)
    assert len(server.requests) <= asked + 2


def test_so_many_are_asked_at_once(teach: Teach, server: FakeServer) -> None:
    server.respond = lambda request: replace(right_answer(request), delay=0.2)
    teach("--parallel", 3)
    assert server.most_at_once == 3


def test_a_server_that_is_gone_ends_the_run(
        teach: Teach, server: FakeServer, tmp_path: Path,
        capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher, "GIVE_UP_AFTER", 3)
    lines = teach("--limit", 2)
    server.shutdown()
    server.server_close()
    with pytest.raises(SystemExit) as stop:
        teach("--tries", 2, "--parallel", 1)
    error = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and "no answer from http://127.0.0.1" in error
    assert "Connection refused" in error
    assert read_lines(tmp_path / "explained.jsonl") == lines


@pytest.mark.parametrize("status, message", [
    (401, "it refuses the key in the environment variable OPENAI_API_KEY"),
    (302, "check --teacher and --model")])
def test_a_server_that_refuses_all_is_asked_no_more(
        status: int, message: str, teach: Teach, server: FakeServer) -> None:
    """A redirect is not followed: the key is for this server alone."""
    headers = {"Location": server.url + "/elsewhere"}
    server.respond = lambda request: Reply(b"no", status, headers=headers)
    with pytest.raises(base.DataError, match=message) as error:
        teach("--parallel", 1)
    assert "\n" not in str(error.value)
    assert len(server.requests) == 1 and server.paths == {"/v1/chat/completions"}


@pytest.mark.parametrize("status, message", [
    (403, "check the key in the environment variable OPENAI_API_KEY"),
    (404, "check --teacher and --model")])
def test_a_server_that_answers_no_record_ends_the_run(
        status: int, message: str, teach: Teach, server: FakeServer,
        monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(teacher, "GIVE_UP_AFTER", 4)
    server.respond = lambda request: Reply(b"no such path", status)
    with pytest.raises(SystemExit):
        teach("--parallel", 1)
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"({status}: no such path; {message})" in error
    assert len(server.requests) < 8


def test_a_proxy_of_the_environment_is_used(
        teach: Teach, server: FakeServer, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str]) -> None:
    """The proxy is given the whole address of an http request, or asked for a tunnel."""
    monkeypatch.setenv("HTTP_PROXY", f"http://me:a%3Ab@127.0.0.1:{server.server_port}")
    lines = teach("--teacher", "http://teacher.invalid:81/v1/", "--limit", 2)
    assert [line["think"] for line in lines] == ["by the pier."] * 2
    assert server.paths == {"http://teacher.invalid:81/v1/chat/completions"}
    for request in server.requests:
        assert request.headers["Host"] == "teacher.invalid:81"
        assert request.headers["Proxy-Authorization"] == "Basic bWU6YTpi"        # me:a:b
    server.paths.clear()
    monkeypatch.setenv("OPENAI_API_KEY", "sk-0123456789")
    monkeypatch.setenv("https_proxy", f"127.0.0.1:{server.server_port}")
    with pytest.raises(SystemExit):
        teach("--teacher", "https://teacher.invalid/v1", "--tries", 1, "--limit", 3)
    assert server.paths == {"teacher.invalid:443 None"}        # the key is not for the proxy
    assert "by the proxy 127.0.0.1 (see NO_PROXY)" in capsys.readouterr().err
    # Not for the teacher on this machine, if NO_PROXY says so.
    server.paths.clear()
    monkeypatch.setenv("NO_PROXY", "teacher.invalid, 127.0.0.1")
    assert len(teach("--limit", 2)) == 4 and server.paths == {"/v1/chat/completions"}


@pytest.mark.parametrize("listed, direct", [
    ("*", "a.org b.a.org 10.1.2.3 localhost"), ("b.org, *", "a.org b.a.org 10.1.2.3 localhost"),
    ("", ""), ("a.org", "a.org b.a.org"), (" A.ORG ,x", "a.org b.a.org"), (".a.org", "b.a.org"),
    ("*.a.org", "b.a.org"), ("a.org:8000", "a.org b.a.org"), ("a.org:8001,org.", ""),
    ("g", ""), ("localhost", "localhost"), ("127.0.0.1,::1", "[::1]"), ("[::1]", "[::1]"),
    ("[::1]:8000", "[::1]"), ("10.1.2.3", "10.1.2.3"), ("10.0.0.0/8", "10.1.2.3")])
def test_no_proxy_lists_what_is_asked_directly(
        listed: str, direct: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As OpenAI's client (httpx) has it: without NO_PROXY, even this machine has its proxy."""
    monkeypatch.setenv("http_proxy", "gate:3128")
    monkeypatch.setenv("NO_PROXY", listed)
    hosts = ["a.org", "b.a.org", "xa.org", "10.1.2.3", "localhost", "[::1]"]
    if listed.endswith("*"):
        hosts.remove("xa.org")
        hosts.remove("[::1]")
    found = [h for h in hosts if teacher.find_proxy(f"http://{h}:8000/v1") is None]
    assert found == direct.split()
    assert teacher.find_proxy("https://xa.org/v1") is None
    monkeypatch.setenv("ALL_PROXY", "http://gate:3129")
    if not listed.endswith("*"):
        assert teacher.find_proxy("https://xa.org/v1").port == 3129
        assert teacher.find_proxy("http://xa.org/v1").netloc == "gate:3128"


def test_a_proxy_of_another_kind_is_refused_in_a_line(
        script: Script, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str]) -> None:
    for proxy in ("socks5://me:secret@gate:1080", "http://me:secret@gate:x"):
        monkeypatch.setenv("all_proxy", proxy)
        with pytest.raises(SystemExit):
            script("dior", "--teacher", "http://a.org/v1", "--model", "big", "--coords", "1000")
        printed = capsys.readouterr().err
        assert printed.count("\n") == 1 and "NO_PROXY=a.org" in printed
        assert "secret" not in printed


@pytest.mark.parametrize("address, wanted", [
    ("http://[2001:db8::1]/v1", ("2001:db8::1", 80)),
    ("https://[2001:db8::1]/v1", ("2001:db8::1", 443)),
    ("http://[::1]:8000/v1", ("::1", 8000)), ("http://there/v1", ("there", 80))])
def test_an_address_is_read_with_and_without_a_port(
        address: str, wanted: tuple[str, int], teach: Teach,
        monkeypatch: pytest.MonkeyPatch) -> None:
    called = []

    def create_connection(place: tuple[str, int], *args: Any, **kwargs: Any) -> None:
        called.append(place)
        raise ConnectionRefusedError
    monkeypatch.setattr("socket.create_connection", create_connection)
    with pytest.raises(SystemExit):
        teach("--teacher", address, "--limit", 1, "--tries", 1)
    assert called == [wanted]


KEY = "sk-Kept/Secret+0123456789abcdef"


def test_the_key_is_never_shown_nor_written(
        run: Run, server: FakeServer, dior_root: Path, tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that echoes it wherever it can, in errors and in answers; then one that refuses
    it, from another variable."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY + "\n")
    monkeypatch.setenv("OTHER_KEY", KEY[::-1])
    echoes = [
        Reply(json.dumps({"error": {"message": f"bad {KEY}"}}).encode(), 400),
        Reply(json.dumps({"detail": KEY}).replace("/", "\\/").encode(), 400),
        Reply(f"{'x' * 190} {KEY}".encode(), 400),
        Reply(b"", 500, reason=KEY),
        Reply(chat_completion(f"i can't say {KEY}")),
    ]

    def respond(request: Request) -> Reply:
        with server.lock:
            keys = list(dict.fromkeys(r.key for r in server.requests))
        place = keys.index(request.key)
        if place < len(echoes):
            return echoes[place]
        return right_answer(request, f"with {KEY} by the pier.")
    server.respond = respond
    out = tmp_path / "out" / "explained.jsonl"
    command = ("cot.py", "dior", "--root", dior_root, "--out", out, "--teacher", server.url,
               "--model", "big", "--coords", "original", "--tries", 2)
    done = run(*command)
    assert done.returncode == 0 and "left undone: 4" in done.stdout, done.stderr
    lines = read_lines(out)
    assert any("with [key] by the pier." == line.get("think") for line in lines)
    assert any("i can't say [key]" == line.get("text") for line in lines)
    assert all(r.headers["Authorization"] == f"Bearer {KEY}" for r in server.requests)
    server.respond = lambda request: Reply(f"bad key {KEY[::-1]}".encode(), 401)
    refused = run(*command, "--key-env", "OTHER_KEY")
    assert server.requests[-1].headers["Authorization"] == f"Bearer {KEY[::-1]}"
    assert refused.returncode == 2 and "variable OTHER_KEY, or its absence" in refused.stderr
    output = done.stdout + done.stderr + refused.stdout + refused.stderr
    for file in tmp_path.rglob("*"):
        output += file.read_text() if file.is_file() else ""
    # Not even most of it, as a text that is cut in the middle would show.
    for key in (KEY, KEY[::-1], KEY.replace("/", "\\/")):
        assert key[:12] not in output and key[-12:] not in output


def test_a_key_that_no_header_can_carry_is_not_shown(
        run: Run, server: FakeServer, dior_root: Path, tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-kept\nsecret")
    done = run("cot.py", "dior", "--root", dior_root, "--out", tmp_path / "explained.jsonl",
               "--teacher", server.url, "--model", "big", "--coords", "original")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "kept" not in done.stderr
    assert not server.requests


@pytest.mark.parametrize("flags, message", [
    (("--coords", "1000"), "needs --model"), (("--model", "big"), "needs --model"),
    (("--model", "big", "--coords", "resized"), "--coords resized needs --init"),
    (("--model", "big", "--coords", "1000", "--teacher", "http://me:secret@there/v1"),
     "without a user, a password or a query"),
    (("--model", "big", "--coords", "1000", "--teacher", "http://there:99999/v1"),
     "must be like http://host:port/v1"),
    (("--model", "big", "--coords", "1000", "--parallel", "0"), "--parallel")])
def test_a_mistake_about_a_server_is_one_line(
        flags: tuple[str, ...], message: str, script: Script,
        capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        script("dior", "--teacher", "http://127.0.0.1:9/v1", *flags)
    printed = capsys.readouterr().err
    assert stop.value.code == 2 and printed.count("\n") == 1 and message in printed
    assert "secret" not in printed


# ---------------------------------------------------------------- the file of explanations

def test_one_process_at_a_time_writes_a_file(
        teach: Teach, tmp_path: Path) -> None:
    with teacher.open_explanations(tmp_path / "explained.jsonl"):
        with pytest.raises(base.DataError, match="is being written by another process"):
            teach()
    assert teach()


@pytest.mark.parametrize("content, kept", [
    (b'{"id": "0", "think": "a"}\n{"id": "1", "th', ["0"]),
    # All but its end.
    (b'{"id": "0", "think": "a"}\n{"id": "1", "think": "b"}', ["0", "1"]),
    (b'{"i', []), (b"", [])])
def test_what_a_killed_call_left_is_repaired(
        content: bytes, kept: list[str], tmp_path: Path) -> None:
    out = tmp_path / "explained.jsonl"
    out.write_bytes(content)
    with teacher.open_explanations(out) as (_, finished):
        assert set(finished) == set(kept)
    assert [line["id"] for line in read_lines(out)] == kept


@pytest.mark.parametrize("content", [b"a letter", b"\x89PNG\r\n", b'{"id": "1"}\n[1]\n', b'"1"'])
def test_another_file_is_not_written_to(content: bytes, tmp_path: Path) -> None:
    out = tmp_path / "letter.txt"
    out.write_bytes(content)
    with pytest.raises(base.DataError, match="letter.txt"), teacher.open_explanations(out):
        pass
    assert out.read_bytes() == content


def test_a_command_that_is_killed_loses_and_repeats_nothing(
        server: FakeServer, tmp_path: Path) -> None:
    """Killed three times (kill -9) while answers come in, then left to finish."""
    records = data.load("synth", None, "val")
    id_of = {teacher.image_data_url(r): r.id for r in records}
    out = tmp_path / "explained.jsonl"

    def respond(request: Request) -> Reply:
        reply = right_answer(request)
        if int(id_of[request.url].split("-")[1]) % 5 == 0:
            reply = Reply(chat_completion("i can't say"))
        return replace(reply, delay=random.uniform(0, 0.05))
    server.respond = respond
    command = [sys.executable, "cot.py", "synth", "--split", "val", "--out", str(out),
               "--teacher", server.url, "--model", "big", "--coords", "1000", "--parallel", "4",
               "--want", "150"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    started = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "env": environment,
               "cwd": Path(cot.__file__).parent}
    before = b""
    for lines_to_wait_for in (1, 30, 90):
        process = subprocess.Popen(command, **started)
        while not out.exists() or out.read_bytes().count(b"\n") < lines_to_wait_for:
            assert process.poll() is None, process.stdout.read()
            time.sleep(0.01)
        process.kill()
        process.communicate()
        content = out.read_bytes()
        # Whole lines stay.
        assert content.startswith(before)
        before = content[:content.rindex(b"\n") + 1]
        written = {json.loads(line)["id"] for line in before.splitlines()}
        asked_so_far = len(server.requests)
        # As if it had been killed in the middle of a line.
        out.write_bytes(before + b'{"id": "val-')
    done = subprocess.run(command, timeout=120, **started)
    assert done.returncode == 0, done.stdout
    assert out.read_bytes().startswith(before)
    lines = read_lines(out)
    assert sum("think" in line for line in lines) == 150
    # What was written is not asked for again.
    asked = [id_of[r.url] for r in server.requests]
    assert not written & set(asked[asked_so_far:])
    for line in lines:
        assert ("refused" in line) == (int(line["id"].split("-")[1]) % 5 == 0)
