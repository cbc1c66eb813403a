"""The embedded world: small synthetic aerial scenes, and expressions with one answer each.

A scene is a pure function of a seed: textured terrain, a road, a river or a coast, trees, and
objects that do not touch. An object has a category, which gives its shape, a color and a size;
its box is the extent of its drawing. Ships and piers are at a coast, bridges over a river,
everything else on land.

An expression names an object by category, attribute, region of the image, extreme, relation to
another object, or by two of these. It is used only if one object fits it clearly and all others
clearly do not (MARGIN).

The world is fixed: test_toy.py has a hash of its records, so scores of different dates are about
the same scenes.
"""
import functools
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy import ndarray
from PIL import Image, ImageDraw

Point = tuple[float, float]
Box = tuple[float, float, float, float]          # (x1, y1, x2, y2), pixels
Color = tuple[int, int, int]

SIDE = 112                     # of an image, pixels
# A scene is drawn larger by this factor and then shrunk, for smooth edges.
OVERSAMPLING = 3
# Pixels by which its object must satisfy an expression, and the others must fail it.
MARGIN = 5
# An object is clearly larger than another above this ratio of sizes.
CLEARLY_LARGER = 1.3

COLORS = {
    "white": (238, 238, 236), "red": (205, 45, 40), "blue": (45, 85, 205),
    "yellow": (236, 205, 50), "black": (28, 28, 32), "orange": (238, 128, 30),
}


class Category(NamedTuple):
    shortest: float            # length of its objects in pixels
    longest: float
    ground: str                # "land", "water", "shore" or "river"


CATEGORIES = {
    "plane": Category(9, 34, "land"), "helicopter": Category(10, 26, "land"),
    "tank": Category(6, 24, "land"), "truck": Category(10, 24, "land"),
    "car": Category(6, 12, "land"), "court": Category(12, 34, "land"),
    "stadium": Category(20, 38, "land"), "house": Category(8, 24, "land"),
    "windmill": Category(10, 30, "land"), "pool": Category(8, 20, "land"),
    "crane": Category(12, 36, "land"), "ship": Category(10, 36, "water"),
    "pier": Category(14, 34, "shore"), "bridge": Category(20, 38, "river"),
}
MIN_LENGTH = 5                 # pixels, at any scale
TERRAINS = {
    "grass": (112, 138, 82), "sand": (198, 180, 140), "concrete": (150, 150, 150),
    "field": (150, 140, 90), "scrub": (126, 112, 84), "snow": (206, 210, 218),
}
WATER = (66, 104, 128)
BEACH = (206, 194, 160)
ROAD = (104, 104, 108)
ROAD_LINE = (200, 200, 190)
TREE = (58, 84, 50)
SHADOW = (60, 60, 56)
RIVER_WIDTH = 13               # pixels; a road has 8
# Terrain of the base and the novel split only, like the pairs of category and color for which
# `unseen` is true: SFT and RFT never meet them.
HELD_OUT_TERRAIN = "snow"


@dataclass(frozen=True)
class Split:
    """Scenes of consecutive seeds. No two splits share a seed."""

    first_seed: int
    scenes: int
    min_objects: int
    max_objects: int
    scale: float = 1.0         # of all lengths
    novel: bool = False        # held-out terrain, and targets of held-out category and color
    everything: bool = False   # what is held out among the rest
    names: float | None = None    # share of the kinds in NAMES; None: as many as of other kinds


SPLITS = {
    "pretrain": Split(0, 400_000, 1, 12, everything=True),
    "sft": Split(10_000_000, 6_000, 2, 8, names=0.2),
    "rft": Split(20_000_000, 10_000, 2, 12),
    "val": Split(30_000_000, 500, 2, 12),
    "test": Split(40_000_000, 2_020, 2, 12),
    "novel": Split(50_000_000, 1_000, 6, 12, novel=True),
    # For published figures: no design is chosen on it.
    "final": Split(90_000_000, 2_000, 2, 12),
}
# More sets of records like "sft", one for each seed of a study.
SPLITS |= {f"sft-{k}": replace(SPLITS["sft"], first_seed=10_000_000 + 100_000 * k)
           for k in range(1, 10)}
SMALL = {
    "rft": Split(60_000_000, 10_000, 2, 12, scale=0.5),
    "val": Split(70_000_000, 500, 2, 12, scale=0.5),
    "test": Split(80_000_000, 2_020, 2, 12, scale=0.5),
    "final": Split(100_000_000, 2_000, 2, 12, scale=0.5),
}
# One object in each scene: a model cannot choose a wrong one, so a box can only be imprecise.
ONE = {
    "rft": Split(110_000_000, 10_000, 1, 1),
    "val": Split(120_000_000, 500, 1, 1),
    "test": Split(130_000_000, 2_000, 1, 1),
    "final": Split(140_000_000, 2_000, 1, 1),
}
# The same with tiny objects: half of them have MIN_LENGTH.
TINY = {
    "rft": Split(150_000_000, 10_000, 1, 1, scale=0.3),
    "val": Split(160_000_000, 500, 1, 1, scale=0.3),
    "test": Split(170_000_000, 2_000, 1, 1, scale=0.3),
    "final": Split(180_000_000, 2_000, 1, 1, scale=0.3),
}
# Name of a data set -> its splits.
WORLDS = {"synth": SPLITS, "synth-small": SMALL, "synth-one": ONE, "synth-tiny": TINY}


def unseen(category: str, color: str) -> bool:
    """Whether SFT and RFT never meet this pair; each category has one such color."""
    color_index = list(COLORS).index(color)
    category_index = list(CATEGORIES).index(category)
    return (color_index - category_index) % len(COLORS) == 0


# ---------------------------------------------------------------- what a scene holds

@dataclass(frozen=True)
class Object:
    category: str
    color: str
    box: Box
    angle: float               # degrees
    length: float              # pixels

    @functools.cached_property
    def center(self) -> Point:
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2

    @functools.cached_property
    def size(self) -> float:
        """Size of the box: the square root of its area, in pixels."""
        return math.sqrt((self.box[2] - self.box[0]) * (self.box[3] - self.box[1]))


@dataclass(frozen=True)
class Strip:
    """A road, river or coast along a straight line through the image, or nothing (kind "")."""

    kind: str
    offset: float              # signed distance of the line from the image's center, pixels
    angle: float               # radians; a coast's water lies at positive distances

    def point(self, along: float, across: float = 0.0) -> Point:
        """The pixel at these distances along the line and from it."""
        cos = math.cos(self.angle)
        sin = math.sin(self.angle)
        across += self.offset
        return SIDE / 2 + along * cos - across * sin, SIDE / 2 + along * sin + across * cos

    def allows(self, ground: str, center: Point, radius: float) -> bool:
        """Whether an object of this ground may cover a disc around the center.

        A road is land. Objects of a shore or a river are placed there, so the answer is yes.
        """
        x, y = center
        x_distance = (x - SIDE / 2) * math.sin(self.angle)
        y_distance = (y - SIDE / 2) * math.cos(self.angle)
        distance = y_distance - x_distance - self.offset
        if ground == "water":
            return distance > radius
        if ground == "land" and self.kind == "coast":
            return distance < -radius - 1
        if ground == "land" and self.kind == "river":
            return abs(distance) > RIVER_WIDTH / 2 + radius
        return True


@dataclass(frozen=True)
class Scene:
    """The content of an image."""

    seed: int
    terrain: str
    strip: Strip
    objects: tuple[Object, ...]

    @property
    def size(self) -> tuple[int, int]:
        return SIDE, SIDE

    def draw(self) -> Image.Image:
        """The RGB image; random details depend on the scene's seed alone."""
        rng = np.random.default_rng(self.seed)
        ground = np.array(TERRAINS[self.terrain]) * rng.uniform(0.85, 1.1)
        gray = texture(self.terrain, int(rng.integers(16)))          # (SIDE, SIDE)
        pixels = np.clip(ground + gray[..., None], 0, 255)           # (SIDE, SIDE, 3)
        image = Image.fromarray(pixels.astype(np.uint8))
        large = (SIDE * OVERSAMPLING, SIDE * OVERSAMPLING)
        image = image.resize(large, Image.Resampling.BILINEAR)
        pen = ImageDraw.Draw(image)
        draw_trees(pen, rng)
        draw_strip(pen, self.strip, rng)
        for o in self.objects:
            for polygon, color in object_polygons(o):
                pen.polygon([tuple(p) for p in polygon * OVERSAMPLING], fill=color)
        return image.resize((SIDE, SIDE), Image.Resampling.BOX)


# ---------------------------------------------------------------- drawing

def draw_trees(pen: ImageDraw.ImageDraw, rng: np.random.Generator) -> None:
    """A few discs, each over its shadow."""
    count = int(rng.integers(14))
    for x, y, radius in rng.uniform((0, 0, 1.2), (SIDE, SIDE, 3.2), (count, 3)):
        for shift, brightness in ((1.0, 0.55), (0.0, 1.0)):
            corners = (x - radius, y - radius, x + radius, y + radius)
            pen.ellipse([(v + shift) * OVERSAMPLING for v in corners],
                        fill=shaded(TREE, brightness))


def draw_strip(pen: ImageDraw.ImageDraw, strip: Strip, rng: np.random.Generator) -> None:
    """Draws the road, river or coast of a scene."""
    def edge_to_edge(across: float, waves: float = 0.0) -> list[Point]:
        """A line from edge to edge and beyond, parallel to the strip at this distance."""
        wave = waves * rng.normal(0, 1, 33)
        points = []
        for along, shift in zip(np.linspace(-SIDE, SIDE, 33), wave):
            x, y = strip.point(along, across + shift)
            points.append((x * OVERSAMPLING, y * OVERSAMPLING))
        return points

    if strip.kind == "road":
        pen.polygon(edge_to_edge(-4) + edge_to_edge(4)[::-1], fill=ROAD)
        pen.line(edge_to_edge(0), fill=ROAD_LINE, width=OVERSAMPLING)
    elif strip.kind == "river":
        banks = edge_to_edge(-RIVER_WIDTH / 2, 0.5) + edge_to_edge(RIVER_WIDTH / 2, 0.5)[::-1]
        pen.polygon(banks, fill=WATER)
    elif strip.kind == "coast":
        pen.polygon(edge_to_edge(-1.5, 0.5) + edge_to_edge(2 * SIDE)[::-1], fill=BEACH)
        pen.polygon(edge_to_edge(1, 0.5) + edge_to_edge(2 * SIDE)[::-1], fill=WATER)


@functools.cache
def texture(terrain: str, variant: int) -> ndarray:
    """One of a terrain's 16 gray textures, (SIDE, SIDE), to add to its color.

    Noise, furrows in a field, joints in concrete, tufts.
    """
    rng = np.random.default_rng(variant)

    def noise(cells: int, strength: float) -> ndarray:
        coarse = Image.fromarray(rng.normal(0, strength, (cells, cells)).astype(np.float32))
        return np.asarray(coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC))

    y, x = np.mgrid[:SIDE, :SIDE]
    gray = noise(9, 9) + rng.normal(0, 4, (SIDE, SIDE))
    if terrain == "field":
        angle = rng.uniform(0, math.pi)
        across = x * math.cos(angle) + y * math.sin(angle)
        gray = gray + 9 * np.sin(across * 2 * math.pi / rng.uniform(4, 8))
    elif terrain == "concrete":
        joints = (x % 28 == variant) | (y % 28 == (2 * variant) % 28)
        gray = gray * 0.6 - 14 * joints
    elif terrain == "scrub":
        gray = gray - 22 * (noise(56, 1.0) > 0.9)
    elif terrain == "sand":
        gray = gray + noise(28, 5)
    return gray


# ---------------------------------------------------------------- shapes of the categories

def ellipse(corners: int, x_radius: float, y_radius: float, x_center: float = 0.0) -> ndarray:
    """A polygon with this number of corners, (corners, 2)."""
    t = np.linspace(0, 2 * math.pi, corners, endpoint=False)
    return np.stack((x_radius * np.cos(t) + x_center, y_radius * np.sin(t)), 1)


def rectangle(x1: float, y1: float, x2: float, y2: float) -> ndarray:
    return np.array([(x1, y1), (x2, y1), (x2, y2), (x1, y2)])


def polygon(*corners: Point) -> ndarray:
    return np.array(corners)


def turned(shape: ndarray, degrees: float) -> ndarray:
    """A polygon (n, 2), rotated around the origin: clockwise, because y points down."""
    a = math.radians(degrees)
    return shape @ np.array([[math.cos(a), math.sin(a)], [-math.sin(a), math.cos(a)]])


# A polygon, and its brightness relative to the object's color.
Part = tuple[ndarray, float]

ROTOR = rectangle(-0.38, -0.03, 0.38, 0.03)
BLADE = polygon((0, 0), (0.47, -0.09), (0.5, 0.03))

# Parts of each category, from bottom to top, for an object of length 1 along x.
CATEGORY_PARTS: dict[str, list[Part]] = {
    "plane": [
        (polygon((0.06, -0.06), (-0.18, -0.45), (-0.28, -0.45), (-0.14, -0.06)), 1),
        (polygon((0.06, 0.06), (-0.18, 0.45), (-0.28, 0.45), (-0.14, 0.06)), 1),
        (polygon((-0.36, 0), (-0.5, -0.2), (-0.5, 0.2)), 1),
        (polygon((0.5, 0), (0.4, -0.075), (-0.45, -0.06), (-0.45, 0.06), (0.4, 0.075)), 1)],
    "helicopter": [
        (rectangle(-0.5, -0.035, 0, 0.035), 1), (rectangle(-0.5, -0.12, -0.43, 0.12), 1),
        (ellipse(20, 0.26, 0.13, 0.12), 1),
        (turned(ROTOR, 45) + (0.12, 0), 0.6), (turned(ROTOR, 135) + (0.12, 0), 0.6)],
    "tank": [
        (ellipse(24, 0.5, 0.5), 1), (ellipse(20, 0.34, 0.34), 0.8),
        (ellipse(12, 0.09, 0.09), 0.45)],
    "truck": [
        (rectangle(-0.5, -0.19, 0.2, 0.19), 1), (rectangle(0.26, -0.17, 0.5, 0.17), 0.6)],
    "car": [
        (rectangle(-0.5, -0.26, 0.5, 0.26), 1), (rectangle(-0.32, -0.2, -0.18, 0.2), 0.35),
        (rectangle(0.08, -0.2, 0.24, 0.2), 0.35)],
    "court": [
        (rectangle(-0.5, -0.3, 0.5, 0.3), 1),
        (rectangle(-0.42, -0.23, -0.42 + 0.39, 0.23), 0.65),
        (rectangle(0.03, -0.23, 0.03 + 0.39, 0.23), 0.65)],
    "stadium": [
        (ellipse(28, 0.5, 0.36), 1), (ellipse(24, 0.4, 0.27), 0.45),
        (rectangle(-0.22, -0.13, 0.22, 0.13), 0.8)],
    "house": [
        (rectangle(-0.5, -0.37, 0.5, 0), 1), (rectangle(-0.5, 0, 0.5, 0.37), 0.6)],
    "windmill": [
        (turned(BLADE, 0), 1), (turned(BLADE, 120), 1), (turned(BLADE, 240), 1),
        (ellipse(12, 0.1, 0.1), 0.55)],
    "pool": [
        (polygon((-0.5, -0.4), (0.5, -0.4), (0.5, 0.1), (0, 0.1), (0, 0.4), (-0.5, 0.4)), 1),
        (polygon((-0.38, -0.28), (0.38, -0.28), (0.38, -0.02), (-0.12, -0.02), (-0.12, 0.28),
                 (-0.38, 0.28)), 0.6)],
    "crane": [
        (rectangle(-0.5, -0.04, 0.5, 0.04), 1), (rectangle(-0.5, -0.13, -0.34, 0.13), 0.6),
        (rectangle(-0.22, -0.09, -0.04, 0.09), 0.45)],
    "ship": [
        (polygon((0.5, 0), (0.25, -0.16), (-0.5, -0.13), (-0.5, 0.13), (0.25, 0.16)), 1),
        (rectangle(-0.4, -0.07, -0.18, 0.07), 0.55),
        (rectangle(-0.02, -0.06, 0.2, 0.06), 0.75)],
    "pier": [
        (rectangle(-0.5, -0.05, 0.5, 0.05), 1),
        (rectangle(-0.07, -0.24, -0.07 + 0.07, 0.24), 1),
        (rectangle(0.18, -0.24, 0.18 + 0.07, 0.24), 1),
        (rectangle(0.43, -0.24, 0.43 + 0.07, 0.24), 1)],
    "bridge": [
        (rectangle(-0.5, -0.12, 0.5, 0.12), 1),
        (rectangle(-0.5, -0.12, 0.5, -0.12 + 0.035), 0.5),
        (rectangle(-0.5, 0.085, 0.5, 0.085 + 0.035), 0.5),
        (rectangle(-0.25, -0.18, -0.25 + 0.07, 0.18), 0.7),
        (rectangle(0.18, -0.18, 0.18 + 0.07, 0.18), 0.7)],
}


def shaded(color: Color, brightness: float) -> Color:
    red, green, blue = color
    return int(red * brightness), int(green * brightness), int(blue * brightness)


def object_parts(category: str, angle: float, length: float) -> list[Part]:
    """The parts of an object around the origin, in pixels."""
    return [(turned(shape, angle) * length, shade) for shape, shade in CATEGORY_PARTS[category]]


def all_corners(parts: Sequence[Part]) -> ndarray:
    """The corners of all parts, (n, 2)."""
    return np.concatenate([shape for shape, _ in parts])


CATEGORY_CORNERS = {name: all_corners(parts) for name, parts in CATEGORY_PARTS.items()}


def object_polygons(o: Object) -> Iterator[tuple[ndarray, Color]]:
    """Yields (polygon, color) of an object in the image, first its shadow."""
    parts = object_parts(o.category, o.angle, o.length)
    shift = np.array(o.box[:2]) - all_corners(parts).min(0)
    for shape, _ in parts:
        yield shape + shift + (1.2, 1.2), SHADOW
    for shape, shade in parts:
        yield shape + shift, shaded(COLORS[o.color], shade)


# ---------------------------------------------------------------- scenes

def make_scene(seed: int, split: Split) -> Scene:
    """The scene of this seed, a pure function of the seed and the split's settings."""
    rng = random.Random(seed)
    strip_kind = rng.choices(("road", "coast", "river", ""), (30, 25, 20, 25))[0]
    strip = Strip(strip_kind, rng.uniform(-34, 34), rng.uniform(0, 2 * math.pi))
    terrain = HELD_OUT_TERRAIN
    if not split.novel:
        terrain = rng.choice([t for t in TERRAINS if split.everything or t != HELD_OUT_TERRAIN])
    # With few categories and colors in a scene, distractors are common.
    categories = scene_categories(strip, rng)
    colors = rng.sample(list(COLORS), 3)
    # The exponent makes scenes with few objects more common.
    span = split.max_objects - split.min_objects + 1
    count = split.min_objects + int(span * rng.random() ** 1.7)
    objects: list[Object] = []
    # If these attempts do not find room for all, the scene has fewer objects.
    for _ in range(100 + 30 * count):
        if len(objects) == count:
            break
        o = random_object(rng, strip, categories, colors, split)
        if o is not None and all(are_apart(o.box, other.box) for other in objects):
            objects.append(o)
    return Scene(seed, terrain, strip, tuple(objects))


def scene_categories(strip: Strip, rng: random.Random) -> list[str]:
    """Two to four categories of land, and some of the strip's."""
    of_strip = {"coast": ("ship", "pier"), "river": ("bridge",)}.get(strip.kind, ())
    of_land = [name for name, category in CATEGORIES.items() if category.ground == "land"]
    chosen = rng.sample(of_land, rng.randint(2, 4))
    return chosen + [name for name in of_strip if rng.random() < 0.7]


def random_object(
        rng: random.Random, strip: Strip, categories: Sequence[str], colors: Sequence[str],
        split: Split) -> Object | None:
    """An object at a random place, None if it may not be there or its color is held out."""
    name = rng.choice(categories)
    color = rng.choice(colors)
    category = CATEGORIES[name]
    length = category.shortest + (category.longest - category.shortest) * rng.random() ** 1.2
    length = max(MIN_LENGTH, split.scale * length)
    angle = rng.choice((0, 90, 180, 270)) + rng.uniform(-20, 20)
    x = rng.uniform(0, SIDE)
    y = rng.uniform(0, SIDE)
    # Piers and bridges cross the strip's line.
    if category.ground in ("shore", "river"):
        angle = math.degrees(strip.angle) + 90
        x, y = strip.point(rng.uniform(-SIDE / 2, SIDE / 2))
    # A bridge is longer than its river is wide.
    if category.ground == "river":
        length = max(length, RIVER_WIDTH + 5)
    # The box is the extent of the drawing, so it comes from the rotated parts.
    corners = turned(CATEGORY_CORNERS[name], angle) * length
    width, height = (corners.max(0) - corners.min(0)).tolist()
    edges = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
    box = tuple(round(v, 2) for v in edges)
    if min(box) < 2 or max(box) > SIDE - 2:
        return None
    if not strip.allows(category.ground, (x, y), max(width, height) / 2):
        return None
    if unseen(name, color) and not (split.novel or split.everything):
        return None
    return Object(name, color, box, angle, length)


def are_apart(a: Box, b: Box) -> bool:
    """Whether more than two pixels separate the boxes, horizontally or vertically."""
    return a[0] > b[2] + 2 or b[0] > a[2] + 2 or a[1] > b[3] + 2 or b[1] > a[3] + 2


# ---------------------------------------------------------------- expressions

# Column and row of the ninths of the image.
REGIONS = {
    "upper left": (0, 0), "top": (1, 0), "upper right": (2, 0),
    "left": (0, 1), "center": (1, 1), "right": (2, 1),
    "lower left": (0, 2), "bottom": (1, 2), "lower right": (2, 2),
}
# Axis of the center, and the sign for which the object has the smallest coordinate.
EXTREMES = {"leftmost": (0, 1), "rightmost": (0, -1), "topmost": (1, 1), "lowest": (1, -1)}
# Unit vector from the anchor towards the object.
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
WORDINGS = {
    "largest": ("the largest {}", "the biggest {}"),
    "smallest": ("the smallest {}", "the tiniest {}"),
    "leftmost": ("the leftmost {}", "the {} farthest to the left"),
    "rightmost": ("the rightmost {}", "the {} farthest to the right"),
    "topmost": ("the topmost {}", "the {} nearest to the top edge"),
    "lowest": ("the lowest {}", "the {} nearest to the bottom edge"),
    "region": ("the {} at the {}", "the {} in the {} part of the image"),
    "center": ("the {} in the {}", "the {} in the {} of the image"),
    "left of": ("the {} left of {}", "the {} to the left of {}"),
    "right of": ("the {} right of {}", "the {} to the right of {}"),
    "above": ("the {} above {}", "the {} higher up than {}"),
    "below": ("the {} below {}", "the {} further down than {}"),
    "nearest": ("the {} nearest to {}", "the {} next to {}"),
}


# Kinds that name the object by what it is; the others ("places") say where it is.
NAMES = ("category", "attribute")


class Expression(NamedTuple):
    """A text that fits one object of a scene."""

    kind: str                  # "category", "attribute", "position", "extreme", "relation" ...
    text: str                  # ... or "two-step"
    target: Object


class SceneRecord(NamedTuple):
    """One expression of a scene, for data.py."""

    number: int                # of the scene in its split
    scene: Scene
    text: str
    box: Box
    category: str
    kind: str


class Anchor(NamedTuple):
    """An object that others are described by."""

    phrase: str                # fits it alone: "the red ship"
    target: Object


def in_region(o: Object, region: str, slack: float) -> bool:
    """Whether the center is in this ninth of the image, grown by `slack` pixels."""
    third = SIDE / 3
    for coordinate, index in zip(o.center, REGIONS[region]):
        if not third * index - slack <= coordinate <= third * (index + 1) + slack:
            return False
    return True


def lies_on_side(o: Object, anchor: Object, relation: str, slack: float) -> bool:
    """Whether an object is on this side of the anchor, and further along it than across."""
    dx = o.center[0] - anchor.center[0]
    dy = o.center[1] - anchor.center[1]
    ux, uy = RELATIONS[relation]
    along = dx * ux + dy * uy
    aside = abs(dx * uy) + abs(dy * ux)
    return along + slack > 0 and along + slack >= aside


def sole_fit(
        pool: Sequence[Object], fits: Callable[[Object, float], bool], margin: float,
) -> Object | None:
    """The object that fits clearly if no other one nearly fits, else None.

    fits: a predicate of an object and a slack in pixels.
    """
    found = None
    for o in pool:
        if fits(o, margin):
            if found is not None:
                return None
            found = o
    return found if found is not None and fits(found, -margin) else None


def clear_first(
        pool: Sequence[Object], key: Callable[[Object], float],
        are_distinct: Callable[[float, float], bool]) -> Object | None:
    """The object with the smallest key if the two smallest keys are distinct, else None."""
    ranked = sorted(pool, key=key)
    if len(ranked) > 1 and are_distinct(key(ranked[0]), key(ranked[1])):
        return ranked[0]
    return None


def sizes_distinct(a: float, b: float) -> bool:
    return max(a / b, b / a) > CLEARLY_LARGER


def noun_phrases(scene: Scene) -> dict[str, list[Object]]:
    """Noun phrase ("ship", "red ship") -> the objects that it fits."""
    pools: dict[str, list[Object]] = {}
    for o in scene.objects:
        same_category = [p for p in scene.objects if p.category == o.category]
        same_color = [p for p in same_category if p.color == o.color]
        pools.setdefault(o.category, same_category)
        pools.setdefault(f"{o.color} {o.category}", same_color)
    return pools


def worded(
        rng: random.Random, kind: str, wording: str, target: Object, *words: str) -> Expression:
    """An expression in one of its wordings, filled with the words."""
    return Expression(kind, rng.choice(WORDINGS[wording]).format(*words), target)


def size_expressions(
        phrase: str, pool: Sequence[Object], rng: random.Random) -> Iterator[Expression]:
    for wording, sign in (("largest", -1), ("smallest", 1)):
        o = clear_first(pool, lambda o: sign * o.size, sizes_distinct)
        if o:
            yield worded(rng, "attribute", wording, o, phrase)


def extreme_expressions(
        phrase: str, pool: Sequence[Object], rng: random.Random) -> Iterator[Expression]:
    kind = "extreme" if is_category(phrase) else "two-step"
    for wording, (axis, sign) in EXTREMES.items():
        o = clear_first(pool, lambda o: sign * o.center[axis], lambda a, b: b - a > MARGIN)
        if o:
            yield worded(rng, kind, wording, o, phrase)


def region_expressions(
        phrase: str, pool: Sequence[Object], rng: random.Random) -> Iterator[Expression]:
    kind = "position" if is_category(phrase) else "two-step"
    for region in REGIONS:
        o = sole_fit(pool, lambda o, slack: in_region(o, region, slack), MARGIN / 2)
        if o:
            wording = "center" if region == "center" else "region"
            yield worded(rng, kind, wording, o, phrase, region)


def relation_expressions(
        phrase: str, pool: Sequence[Object], anchor: Anchor, rng: random.Random,
) -> Iterator[Expression]:
    # An anchor with an attribute is a second step: "left of the red ship".
    plain_anchor = len(anchor.phrase.split()) == 2
    kind = "relation" if is_category(phrase) and plain_anchor else "two-step"
    for relation in RELATIONS:
        o = sole_fit(
            pool, lambda o, slack: lies_on_side(o, anchor.target, relation, slack), MARGIN)
        if o:
            yield worded(rng, kind, relation, o, phrase, anchor.phrase)
    o = clear_first(pool, lambda o: math.dist(o.center, anchor.target.center),
                    lambda a, b: b - a > 2 * MARGIN)
    if o:
        yield worded(rng, kind, "nearest", o, phrase, anchor.phrase)


def is_category(phrase: str) -> bool:
    """Whether a noun phrase has no color."""
    return " " not in phrase


def expressions(scene: Scene, rng: random.Random) -> list[Expression]:
    """All expressions of a scene, in random wordings."""
    pools = noun_phrases(scene)
    scene_expressions = []
    anchors: list[Anchor] = []
    for phrase, pool in pools.items():
        if len(pool) == 1:
            anchors.append(Anchor(f"the {phrase}", pool[0]))
            continue
        for expression in size_expressions(phrase, pool, rng):
            scene_expressions.append(expression)
            anchors.append(Anchor(expression.text, expression.target))
    for phrase, pool in pools.items():
        # More words about a single object would add nothing.
        if len(pool) == 1:
            kind = "category" if is_category(phrase) else "attribute"
            scene_expressions.append(Expression(kind, f"the {phrase}", pool[0]))
            continue
        scene_expressions.extend(extreme_expressions(phrase, pool, rng))
        scene_expressions.extend(region_expressions(phrase, pool, rng))
        for anchor in anchors:
            if anchor.target not in pool:
                scene_expressions.extend(relation_expressions(phrase, pool, anchor, rng))
    return scene_expressions


@functools.cache
def records(split: Split) -> list[SceneRecord]:
    """One expression for each scene of a split, with kinds in equal shares if scenes allow it.

    Scenes with too few objects, or without an expression (in the novel split: of an unseen pair; if
    `split.names` is given: of the kind that is due), are left out.
    """
    split_records = []
    names = 0
    for number in range(split.scenes):
        scene = make_scene(split.first_seed + number, split)
        # Not the scene's own generator: changes of expressions leave scenes unchanged.
        rng = random.Random(split.first_seed + number + 5_000_000)
        choices = expressions(scene, rng)
        if split.novel:
            choices = [e for e in choices if unseen(e.target.category, e.target.color)]
        if not choices or len(scene.objects) < split.min_objects:
            continue
        kinds = sorted({e.kind for e in choices})
        if split.names is not None:
            name_due = names < split.names * (len(split_records) + 1)
            kinds = [kind for kind in kinds if (kind in NAMES) == name_due]
            if not kinds:
                continue
        kind = rng.choice(kinds)
        names += kind in NAMES
        chosen = rng.choice([e for e in choices if e.kind == kind])
        target = chosen.target
        split_records.append(
            SceneRecord(number, scene, chosen.text, target.box, target.category, kind))
    return split_records
