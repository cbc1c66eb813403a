"""The embedded world: small aerial scenes that draw themselves from a seed, and expressions that have exactly one answer in them.

A scene is terrain, a road or a coast, and a few objects that do not touch: category by shape, a colour, a size; its boxes are the extent of
what is drawn. An expression names an object by category, attribute, region of the image, extreme, relation to another object, or by two of
these. It is kept only where one object fits it clearly and all others clearly do not (MARGIN).
"""
import functools
import math
import random
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

SIDE = 112                        # pixels
FINE = 3                          # drawn this much larger, then shrunk
MARGIN = 6                        # pixels by which an expression must hold for its object and fail for the others
COLORS = {"white": (238, 238, 236), "red": (205, 45, 40), "blue": (45, 85, 205), "yellow": (236, 205, 50), "black": (28, 28, 32),
          "orange": (238, 128, 30)}
# category: shortest and longest side in pixels, width over length
CATEGORIES = {"plane": (16, 34, 0.9), "ship": (16, 36, 0.32), "tank": (10, 24, 1.0), "truck": (14, 26, 0.42), "court": (16, 32, 0.6),
              "stadium": (26, 42, 0.72), "house": (12, 26, 0.75), "windmill": (18, 32, 1.0)}
TERRAINS = {"grass": (112, 138, 82), "sand": (198, 180, 140), "concrete": (150, 150, 150), "field": (150, 140, 90)}
WATER = (66, 104, 128)
# split: first seed, scenes, objects at least and at most
SPLITS = {"pretrain": (0, 40_000, 1, 5), "sft": (10_000_000, 12_000, 2, 4), "rft": (20_000_000, 12_000, 2, 5),
          "val": (30_000_000, 500, 2, 5), "test": (40_000_000, 2_000, 2, 5)}


@dataclass(frozen=True)
class Object:
    category: str
    color: str
    box: tuple                    # (x1, y1, x2, y2), pixels
    angle: float                  # degrees
    length: float                 # pixels

    @property
    def center(self):
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2

    @property
    def size(self):
        """Size of the box: the square root of its area, in pixels."""
        return math.sqrt((self.box[2] - self.box[0]) * (self.box[3] - self.box[1]))


@dataclass(frozen=True)
class Scene:
    seed: int
    terrain: str
    strip: tuple                  # ("road" or "coast" or "", position, angle)
    objects: tuple

    @property
    def size(self):
        return SIDE, SIDE

    def draw(self):
        """-> PIL RGB image"""
        rng = np.random.default_rng(self.seed)
        ground = np.array(TERRAINS[self.terrain]) * rng.uniform(0.85, 1.1)
        image = Image.fromarray(np.clip(ground + texture(int(rng.integers(16)))[..., None], 0, 255).astype(np.uint8))
        image = image.resize((SIDE * FINE, SIDE * FINE), Image.Resampling.BILINEAR)
        pen = ImageDraw.Draw(image)
        kind, place, angle = self.strip
        along = np.array([math.cos(angle), math.sin(angle)]) * SIDE * FINE * 2
        across = np.array([-math.sin(angle), math.cos(angle)])
        middle = np.array([SIDE * FINE / 2] * 2) + across * place * FINE
        if kind == "road":
            pen.line([*(middle - along), *(middle + along)], fill=(104, 104, 108), width=9 * FINE)
            pen.line([*(middle - along), *(middle + along)], fill=(200, 200, 190), width=FINE)
        elif kind == "coast":
            far = across * SIDE * FINE * 2
            pen.polygon([tuple(p) for p in (middle - along, middle + along, middle + along + far, middle - along + far)], fill=WATER)
        for o in self.objects:
            for shape, color in shadowed(o):
                pen.polygon([tuple(p) for p in shape * FINE], fill=color)
        return image.resize((SIDE, SIDE), Image.Resampling.BOX)


@functools.cache
def texture(k):
    """One of a few fixed grey textures (SIDE, SIDE), rough and smooth noise added."""
    rng = np.random.default_rng(k)
    smooth = np.asarray(Image.fromarray(rng.normal(0, 12, (9, 9)).astype(np.float32)).resize((SIDE, SIDE), Image.Resampling.BICUBIC))
    return smooth + rng.normal(0, 5, (SIDE, SIDE))


# ------------------------------------------------------------------------------------------------------------------ shapes

def ring(n, rx, ry, begin=0.0, end=2 * math.pi):
    t = np.linspace(begin, end, n, endpoint=False)
    return np.stack((rx * np.cos(t), ry * np.sin(t)), 1)


def rectangle(x1, y1, x2, y2):
    return np.array([(x1, y1), (x2, y1), (x2, y2), (x1, y2)])


def outline(category):
    """Parts of a category in a unit frame, length 1 along x: (polygon, shade); shade None is the object's colour, a number darkens it."""
    if category == "plane":
        return [(np.array([(0.06, -0.06), (-0.18, -0.45), (-0.28, -0.45), (-0.14, -0.06)]), None),
                (np.array([(0.06, 0.06), (-0.18, 0.45), (-0.28, 0.45), (-0.14, 0.06)]), None),
                (np.array([(-0.36, 0), (-0.5, -0.2), (-0.5, 0.2)]), None),
                (np.array([(0.5, 0), (0.4, -0.075), (-0.45, -0.06), (-0.45, 0.06), (0.4, 0.075)]), None)]
    if category == "ship":
        return [(np.array([(0.5, 0), (0.25, -0.16), (-0.5, -0.13), (-0.5, 0.13), (0.25, 0.16)]), None),
                (rectangle(-0.4, -0.07, -0.18, 0.07), 0.55), (rectangle(-0.02, -0.06, 0.2, 0.06), 0.75)]
    if category == "tank":
        return [(ring(24, 0.5, 0.5), None), (ring(20, 0.34, 0.34), 0.85), (ring(12, 0.09, 0.09), 0.5)]
    if category == "truck":
        return [(rectangle(-0.5, -0.21, 0.2, 0.21), None), (rectangle(0.26, -0.19, 0.5, 0.19), 0.6)]
    if category == "court":
        halves = [(rectangle(x, -0.23, x + 0.39, 0.23), 0.7) for x in (-0.42, 0.03)]
        return [(rectangle(-0.5, -0.3, 0.5, 0.3), None), *halves]
    if category == "stadium":
        return [(ring(28, 0.5, 0.36), None), (ring(24, 0.36, 0.23), "green")]
    if category == "house":
        return [(rectangle(-0.5, -0.37, 0.5, 0), None), (rectangle(-0.5, 0, 0.5, 0.37), 0.65)]
    blades = [(np.array([(0, 0), (0.47, -0.09), (0.5, 0.03)]) @ turn(a), None) for a in (0, 120, 240)]
    return [*blades, (ring(12, 0.1, 0.1), 0.6)]


def turn(degrees):
    a = math.radians(degrees)
    return np.array([[math.cos(a), math.sin(a)], [-math.sin(a), math.cos(a)]])


PARTS = {category: outline(category) for category in CATEGORIES}


def placed(category, angle, length):
    """The parts of an object about the origin, in pixels."""
    return [(shape @ turn(angle) * length, shade) for shape, shade in PARTS[category]]


def shadowed(o):
    """An object's polygons in the image with their colours, its shadow first."""
    parts = placed(o.category, o.angle, o.length)
    every = np.concatenate([shape for shape, _ in parts])
    offset = np.array(o.box[:2]) - every.min(0)
    color = np.array(COLORS[o.color])
    yield from ((shape + offset + (1.2, 1.2), (60, 60, 56)) for shape, _ in parts)
    for shape, shade in parts:
        tint = (84, 128, 70) if shade == "green" else tuple(int(v) for v in color * (1 if shade is None else shade))
        yield shape + offset, tint


# ------------------------------------------------------------------------------------------------------------------ scenes

def scene(seed, few, many):
    """A scene of `few` to `many` objects; a pure function of its arguments."""
    rng = random.Random(seed)
    kinds, colors = rng.sample(list(CATEGORIES), 3), rng.sample(list(COLORS), 3)                       # few of each: distractors are common
    objects = []
    wanted = rng.randint(few, many)
    for _ in range(60):
        if len(objects) == wanted:
            break
        category = rng.choice(kinds)
        shortest, longest, _ = CATEGORIES[category]
        length, angle = shortest + (longest - shortest) * rng.random() ** 1.3, rng.choice((0, 90, 180, 270)) + rng.uniform(-20, 20)
        every = np.concatenate([shape for shape, _ in placed(category, angle, length)])
        (w, h) = every.max(0) - every.min(0)
        x, y = rng.uniform(2, SIDE - 4 - w), rng.uniform(2, SIDE - 4 - h)
        box = tuple(round(float(v), 2) for v in (x, y, x + w, y + h))
        if all(box[0] > b[2] + 3 or b[0] > box[2] + 3 or box[1] > b[3] + 3 or b[1] > box[3] + 3 for b in (o.box for o in objects)):
            objects.append(Object(category, rng.choice(colors), box, angle, length))
    strip = (rng.choice(("road", "coast", "", "")), rng.uniform(-45, 45), rng.uniform(0, 2 * math.pi))
    return Scene(seed, rng.choice(list(TERRAINS)), strip, tuple(objects))


# ------------------------------------------------------------------------------------------------------------------ expressions

REGIONS = {"upper left": (0, 0), "top": (1, 0), "upper right": (2, 0), "left": (0, 1), "center": (1, 1), "right": (2, 1),
           "lower left": (0, 2), "bottom": (1, 2), "lower right": (2, 2)}
EXTREMES = {"leftmost": (0, 1), "rightmost": (0, -1), "topmost": (1, 1), "lowest": (1, -1)}
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}


def in_region(o, name, slack):
    """Is the centre in this ninth of the image, grown by `slack` pixels?"""
    third = SIDE / 3
    return all(third * i - slack <= c <= third * (i + 1) + slack for c, i in zip(o.center, REGIONS[name]))


def related(o, anchor, name, slack):
    """Does o lie on this side of the anchor, more than to either side of it? slack in pixels."""
    dx, dy = (a - b for a, b in zip(o.center, anchor.center))
    ux, uy = RELATIONS[name]
    along, aside = dx * ux + dy * uy, abs(dx * uy) + abs(dy * ux)
    return along + slack > 0 and along + slack >= aside



def only(pool, clearly, perhaps):
    """The one object that fits clearly, while no other fits even perhaps; else None."""
    fitting = [o for o in pool if perhaps(o)]
    return fitting[0] if len(fitting) == 1 and clearly(fitting[0]) else None


def options(s):
    """All expressions of a scene: (kind, text, object)."""
    out = []
    names = {}                                                            # noun phrase -> the objects it fits
    for o in s.objects:
        for phrase in (o.category, f"{o.color} {o.category}"):
            names.setdefault(phrase, [p for p in s.objects if p.category == o.category and (phrase == p.category or p.color == o.color)])
    for phrase, pool in names.items():
        plain = " " not in phrase
        if len(pool) == 1:
            out.append(("category" if plain else "attribute", f"the {phrase}", pool[0]))
            if plain or len([o for o in s.objects if o.category == pool[0].category]) == 1:
                continue
        by_size = sorted(pool, key=lambda o: o.size)
        if len(pool) > 1 and by_size[-1].size > by_size[-2].size * 1.3:
            out.append(("attribute", f"the largest {phrase}", by_size[-1]))
        if len(pool) > 1 and by_size[0].size * 1.3 < by_size[1].size:
            out.append(("attribute", f"the smallest {phrase}", by_size[0]))
        if len(pool) > 1:
            for word, (axis, sign) in EXTREMES.items():
                row = sorted(pool, key=lambda o: sign * o.center[axis])
                if abs(row[0].center[axis] - row[1].center[axis]) > MARGIN:
                    out.append(("extreme" if plain else "two-step", f"the {word} {phrase}", row[0]))
            for name in REGIONS:
                o = only(pool, lambda o: in_region(o, name, -MARGIN / 2), lambda o: in_region(o, name, MARGIN / 2))
                if o:
                    out.append(("position" if plain else "two-step", f"the {phrase} {'in' if name == 'center' else 'at'} the {name}", o))
            anchors = [(p, objects[0]) for p, objects in names.items() if len(objects) == 1 and objects[0] not in pool]
            for name in RELATIONS:
                for words, anchor in anchors:
                    o = only(pool, lambda o: related(o, anchor, name, -MARGIN), lambda o: related(o, anchor, name, MARGIN))
                    if o:
                        out.append(("relation" if plain else "two-step", f"the {phrase} {name} the {words}", o))
    return out


def records(split, n=None):
    """(id, Scene, text, box, category, kind) of the first n (all) scenes of a split, one expression each; kinds in equal shares where the
    scene allows."""
    first, scenes, few, many = SPLITS[split]
    out = []
    for i in range(scenes if n is None else min(n, scenes)):
        s, rng = scene(first + i, few, many), random.Random(first + i + 5_000_000)
        choices = options(s)
        if choices:
            kind = rng.choice(sorted({kind for kind, _, _ in choices}))
            kind, text, o = rng.choice([c for c in choices if c[0] == kind])
            out.append((f"{split}-{i}", s, text, o.box, o.category, kind))
    return out
