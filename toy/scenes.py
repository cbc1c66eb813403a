"""The embedded world: small aerial scenes that draw themselves from a seed, and expressions that have exactly one answer in them.

A scene is textured terrain, a road, a river or a coast, trees, and objects that do not touch: category by shape, a colour, a size; its
boxes are the extent of what is drawn. Ships and piers lie at a coast, bridges over a river, all else on land. An expression names an object
by category, attribute, region of the image, extreme, relation to another object, or by two of these. It is kept only where one object fits
it clearly and all others clearly do not (MARGIN).

The world is fixed: tests/test_toy.py holds a hash of its records, so that scores taken at different times speak of the same scenes.
"""
import functools
import math
import random
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

SIDE = 112                        # pixels
FINE = 3                          # drawn this much larger, then shrunk
MARGIN = 5                        # pixels by which an expression must hold for its object and fail for the others
LARGER = 1.3                      # ratio of sizes from which one object is clearly larger
COLORS = {"white": (238, 238, 236), "red": (205, 45, 40), "blue": (45, 85, 205), "yellow": (236, 205, 50), "black": (28, 28, 32),
          "orange": (238, 128, 30)}
# category: shortest and longest length in pixels, where it lies
CATEGORIES = {"plane": (9, 34, "land"), "helicopter": (10, 26, "land"), "tank": (6, 24, "land"), "truck": (10, 24, "land"),
              "car": (6, 12, "land"), "court": (12, 34, "land"), "stadium": (20, 38, "land"), "house": (8, 24, "land"),
              "windmill": (10, 30, "land"), "pool": (8, 20, "land"), "crane": (12, 36, "land"), "ship": (10, 36, "water"),
              "pier": (14, 34, "shore"), "bridge": (20, 38, "river")}
SMALLEST = 5                      # pixels of length
TERRAINS = {"grass": (112, 138, 82), "sand": (198, 180, 140), "concrete": (150, 150, 150), "field": (150, 140, 90),
            "scrub": (126, 112, 84), "snow": (206, 210, 218)}
WATER, ROAD, TREE = (66, 104, 128), (104, 104, 108), (58, 84, 50)
RIVER = 13                        # pixels wide; a road is 8
HELD_OUT = "snow"                 # terrain of the novel split alone; so are the pairs of category and colour that `unseen` names


@dataclass(frozen=True)
class Split:
    first: int                    # seed of the first scene; splits share none
    scenes: int
    few: int                      # objects at least ...
    many: int                     # ... and at most
    scale: float = 1.0            # of all lengths
    novel: bool = False           # held-out terrain, and targets of held-out category and colour


SPLITS = {"pretrain": Split(0, 400_000, 1, 9), "sft": Split(10_000_000, 4_000, 2, 8), "rft": Split(20_000_000, 10_000, 2, 12),
          "val": Split(30_000_000, 500, 2, 12), "test": Split(40_000_000, 2_020, 2, 12),
          "novel": Split(50_000_000, 1_000, 6, 12, novel=True)}
SMALL = {"rft": Split(60_000_000, 10_000, 2, 12, 0.5), "val": Split(70_000_000, 500, 2, 12, 0.5),
         "test": Split(80_000_000, 2_020, 2, 12, 0.5)}


def unseen(category, color):
    """Is this pair kept for the novel split? One of each category's six colours is."""
    return (list(COLORS).index(color) - list(CATEGORIES).index(category)) % len(COLORS) == 0


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
class Strip:
    """A road, river or coast along a straight line through the image, or nothing (kind "")."""
    kind: str
    place: float                  # signed distance of the line from the image's centre, pixels
    angle: float                  # radians; water of a coast lies on the side of positive distances

    def point(self, along, across=0.0):
        """Pixels of a place at these distances along the line and off it."""
        c, s = math.cos(self.angle), math.sin(self.angle)
        across += self.place
        return SIDE / 2 + along * c - across * s, SIDE / 2 + along * s + across * c

    def allows(self, where, x, y, radius):
        """May what belongs on "land" or "water" lie in a disc about this place? A road is land; shore and river have their own places."""
        away = (y - SIDE / 2) * math.cos(self.angle) - (x - SIDE / 2) * math.sin(self.angle) - self.place
        if where == "water":
            return away > radius
        return where != "land" or (away < -radius - 1 if self.kind == "coast" else self.kind != "river" or abs(away) > RIVER / 2 + radius)


@dataclass(frozen=True)
class Scene:
    seed: int
    terrain: str
    strip: Strip
    objects: tuple

    @property
    def size(self):
        return SIDE, SIDE

    def draw(self):
        """-> PIL RGB image"""
        rng = np.random.default_rng(self.seed)
        ground = np.array(TERRAINS[self.terrain]) * rng.uniform(0.85, 1.1)
        image = Image.fromarray(np.clip(ground + texture(self.terrain, int(rng.integers(16)))[..., None], 0, 255).astype(np.uint8))
        image = image.resize((SIDE * FINE, SIDE * FINE), Image.Resampling.BILINEAR)
        pen = ImageDraw.Draw(image)
        for x, y, r in rng.uniform((0, 0, 1.2), (SIDE, SIDE, 3.2), (int(rng.integers(14)), 3)):        # trees, each behind its shadow
            for off, dark in ((1.0, 0.55), (0.0, 1.0)):
                pen.ellipse([(v + off) * FINE for v in (x - r, y - r, x + r, y + r)], fill=tuple(int(v * dark) for v in TREE))
        self.draw_strip(pen, rng)
        for o in self.objects:
            for shape, color in shadowed(o):
                pen.polygon([tuple(p) for p in shape * FINE], fill=color)
        return image.resize((SIDE, SIDE), Image.Resampling.BOX)

    def draw_strip(self, pen, rng):
        def line(across, waves=0.0):                                     # from edge to edge, and beyond
            wave = waves * rng.normal(0, 1, 33)
            return [tuple(v * FINE for v in self.strip.point(t, across + w)) for t, w in zip(np.linspace(-SIDE, SIDE, 33), wave)]
        if self.strip.kind == "road":
            pen.polygon(line(-4) + line(4)[::-1], fill=ROAD)
            pen.line(line(0), fill=(200, 200, 190), width=FINE)
        elif self.strip.kind == "river":
            pen.polygon(line(-RIVER / 2, 0.5) + line(RIVER / 2, 0.5)[::-1], fill=WATER)
        elif self.strip.kind == "coast":
            pen.polygon(line(-1.5, 0.5) + line(2 * SIDE)[::-1], fill=(206, 194, 160))
            pen.polygon(line(1, 0.5) + line(2 * SIDE)[::-1], fill=WATER)


@functools.cache
def texture(terrain, k):
    """One of a few fixed grey textures of a terrain, (SIDE, SIDE): noise, furrows in a field, joints in concrete, tufts."""
    rng = np.random.default_rng(k)

    def noise(cells, strength):
        coarse = Image.fromarray(rng.normal(0, strength, (cells, cells)).astype(np.float32))
        return np.asarray(coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC))
    y, x = np.mgrid[:SIDE, :SIDE]
    gray = noise(9, 9) + rng.normal(0, 4, (SIDE, SIDE))
    if terrain == "field":
        angle = rng.uniform(0, math.pi)
        gray = gray + 9 * np.sin((x * math.cos(angle) + y * math.sin(angle)) * 2 * math.pi / rng.uniform(4, 8))
    elif terrain == "concrete":
        gray = gray * 0.6 - 14 * ((x % 28 == k) | (y % 28 == (2 * k) % 28))
    elif terrain == "scrub":
        gray = gray - 22 * (noise(56, 1.0) > 0.9)
    elif terrain == "sand":
        gray = gray + noise(28, 5)
    return gray


# ------------------------------------------------------------------------------------------------------------------ shapes

def ring(n, rx, ry, x=0.0):
    t = np.linspace(0, 2 * math.pi, n, endpoint=False)
    return np.stack((rx * np.cos(t) + x, ry * np.sin(t)), 1)


def rectangle(x1, y1, x2, y2):
    return np.array([(x1, y1), (x2, y1), (x2, y2), (x1, y2)])


def turn(degrees):
    a = math.radians(degrees)
    return np.array([[math.cos(a), math.sin(a)], [-math.sin(a), math.cos(a)]])


# Parts of a category in a unit frame, length 1 along x: (polygon, how much darker than the object's colour).
PARTS = {
    "plane": [(np.array([(0.06, -0.06), (-0.18, -0.45), (-0.28, -0.45), (-0.14, -0.06)]), 1),
              (np.array([(0.06, 0.06), (-0.18, 0.45), (-0.28, 0.45), (-0.14, 0.06)]), 1),
              (np.array([(-0.36, 0), (-0.5, -0.2), (-0.5, 0.2)]), 1),
              (np.array([(0.5, 0), (0.4, -0.075), (-0.45, -0.06), (-0.45, 0.06), (0.4, 0.075)]), 1)],
    "helicopter": [(rectangle(-0.5, -0.035, 0, 0.035), 1), (rectangle(-0.5, -0.12, -0.43, 0.12), 1), (ring(20, 0.26, 0.13, 0.12), 1),
                   *((rectangle(-0.38, -0.03, 0.38, 0.03) @ turn(a) + (0.12, 0), 0.6) for a in (45, 135))],
    "tank": [(ring(24, 0.5, 0.5), 1), (ring(20, 0.34, 0.34), 0.8), (ring(12, 0.09, 0.09), 0.45)],
    "truck": [(rectangle(-0.5, -0.19, 0.2, 0.19), 1), (rectangle(0.26, -0.17, 0.5, 0.17), 0.6)],
    "car": [(rectangle(-0.5, -0.26, 0.5, 0.26), 1), (rectangle(-0.32, -0.2, -0.18, 0.2), 0.35), (rectangle(0.08, -0.2, 0.24, 0.2), 0.35)],
    "court": [(rectangle(-0.5, -0.3, 0.5, 0.3), 1), *((rectangle(x, -0.23, x + 0.39, 0.23), 0.65) for x in (-0.42, 0.03))],
    "stadium": [(ring(28, 0.5, 0.36), 1), (ring(24, 0.4, 0.27), 0.45), (rectangle(-0.22, -0.13, 0.22, 0.13), 0.8)],
    "house": [(rectangle(-0.5, -0.37, 0.5, 0), 1), (rectangle(-0.5, 0, 0.5, 0.37), 0.6)],
    "windmill": [*((np.array([(0, 0), (0.47, -0.09), (0.5, 0.03)]) @ turn(a), 1) for a in (0, 120, 240)), (ring(12, 0.1, 0.1), 0.55)],
    "pool": [(np.array([(-0.5, -0.4), (0.5, -0.4), (0.5, 0.1), (0, 0.1), (0, 0.4), (-0.5, 0.4)]), 1),
             (np.array([(-0.38, -0.28), (0.38, -0.28), (0.38, -0.02), (-0.12, -0.02), (-0.12, 0.28), (-0.38, 0.28)]), 0.6)],
    "crane": [(rectangle(-0.5, -0.04, 0.5, 0.04), 1), (rectangle(-0.5, -0.13, -0.34, 0.13), 0.6),
              (rectangle(-0.22, -0.09, -0.04, 0.09), 0.45)],
    "ship": [(np.array([(0.5, 0), (0.25, -0.16), (-0.5, -0.13), (-0.5, 0.13), (0.25, 0.16)]), 1),
             (rectangle(-0.4, -0.07, -0.18, 0.07), 0.55), (rectangle(-0.02, -0.06, 0.2, 0.06), 0.75)],
    "pier": [(rectangle(-0.5, -0.05, 0.5, 0.05), 1), *((rectangle(x, -0.24, x + 0.07, 0.24), 1) for x in (-0.07, 0.18, 0.43))],
    "bridge": [(rectangle(-0.5, -0.12, 0.5, 0.12), 1), *((rectangle(-0.5, y, 0.5, y + 0.035), 0.5) for y in (-0.12, 0.085)),
               *((rectangle(x, -0.18, x + 0.07, 0.18), 0.7) for x in (-0.25, 0.18))],
}


def placed(category, angle, length):
    """The parts of an object about the origin, in pixels."""
    return [(shape @ turn(angle) * length, shade) for shape, shade in PARTS[category]]


def shadowed(o):
    """An object's polygons in the image with their colours, its shadow first."""
    parts = placed(o.category, o.angle, o.length)
    every = np.concatenate([shape for shape, _ in parts])
    offset = np.array(o.box[:2]) - every.min(0)
    yield from ((shape + offset + (1.2, 1.2), (60, 60, 56)) for shape, _ in parts)
    for shape, shade in parts:
        yield shape + offset, tuple(int(v * shade) for v in COLORS[o.color])


# ------------------------------------------------------------------------------------------------------------------ scenes

def scene(seed, split):
    """The scene of this seed; a pure function of it and of the split's settings."""
    rng = random.Random(seed)
    strip = Strip(rng.choices(("road", "coast", "river", ""), (30, 25, 20, 25))[0], rng.uniform(-34, 34), rng.uniform(0, 2 * math.pi))
    terrain = HELD_OUT if split.novel else rng.choice([t for t in TERRAINS if t != HELD_OUT])
    wet = {"coast": ("ship", "pier"), "river": ("bridge",)}.get(strip.kind, ())
    dry = [c for c, (_, _, where) in CATEGORIES.items() if where == "land"]
    kinds = rng.sample(dry, rng.randint(2, 4)) + [c for c in wet if rng.random() < 0.7]               # few of each: distractors are common
    colors = rng.sample(list(COLORS), 3)
    wanted, objects = split.few + int((split.many - split.few + 1) * rng.random() ** 1.7), []
    for _ in range(100 + 30 * wanted):
        if len(objects) == wanted:
            break
        category, color = rng.choice(kinds), rng.choice(colors)
        shortest, longest, where = CATEGORIES[category]
        length = max(SMALLEST, split.scale * (shortest + (longest - shortest) * rng.random() ** 1.2))
        angle, x, y = rng.choice((0, 90, 180, 270)) + rng.uniform(-20, 20), rng.uniform(0, SIDE), rng.uniform(0, SIDE)
        if where in ("shore", "river"):
            angle = math.degrees(strip.angle) + 90
            x, y = strip.point(rng.uniform(-SIDE / 2, SIDE / 2))
            length = max(length, RIVER + 5) if where == "river" else length
        every = np.concatenate([shape for shape, _ in placed(category, angle, length)])
        (w, h) = (every.max(0) - every.min(0)).tolist()
        box = tuple(round(v, 2) for v in (x - w / 2, y - h / 2, x + w / 2, y + h / 2))
        if min(box) < 2 or max(box) > SIDE - 2 or not strip.allows(where, x, y, max(w, h) / 2) or unseen(category, color) > split.novel:
            continue
        if all(box[0] > b[2] + 2 or b[0] > box[2] + 2 or box[1] > b[3] + 2 or b[1] > box[3] + 2 for b in (o.box for o in objects)):
            objects.append(Object(category, color, box, angle, length))
    return Scene(seed, terrain, strip, tuple(objects))


# ------------------------------------------------------------------------------------------------------------------ expressions

REGIONS = {"upper left": (0, 0), "top": (1, 0), "upper right": (2, 0), "left": (0, 1), "center": (1, 1), "right": (2, 1),
           "lower left": (0, 2), "bottom": (1, 2), "lower right": (2, 2)}
# word: axis, sign that makes it the least
EXTREMES = {"leftmost": (0, 1), "rightmost": (0, -1), "topmost": (1, 1), "lowest": (1, -1)}
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
WORDINGS = {"largest": ("the largest {}", "the biggest {}"), "smallest": ("the smallest {}", "the tiniest {}"),
            "leftmost": ("the leftmost {}", "the {} farthest to the left"),
            "rightmost": ("the rightmost {}", "the {} farthest to the right"),
            "topmost": ("the topmost {}", "the {} nearest to the top edge"),
            "lowest": ("the lowest {}", "the {} nearest to the bottom edge"),
            "region": ("the {} at the {}", "the {} in the {} part of the image"),
            "center": ("the {} in the {}", "the {} in the {} of the image"),
            "left of": ("the {} left of {}", "the {} to the left of {}"), "right of": ("the {} right of {}", "the {} to the right of {}"),
            "above": ("the {} above {}", "the {} higher up than {}"), "below": ("the {} below {}", "the {} further down than {}"),
            "nearest": ("the {} nearest to {}", "the {} next to {}")}


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


def first_by(pool, key, clear):
    """The object of least key, where `clear` holds of the two least keys; else None."""
    row = sorted(pool, key=key)
    return row[0] if len(row) > 1 and clear(key(row[0]), key(row[1])) else None


def options(s, rng):
    """All expressions of a scene, in wordings of rng's choice: (kind, text, object)."""
    out, names, anchors = [], {}, []                                     # names: noun phrase -> the objects it fits
    for o in s.objects:
        for phrase, fits in ((o.category, lambda p: True), (f"{o.color} {o.category}", lambda p: p.color == o.color)):
            names.setdefault(phrase, [p for p in s.objects if p.category == o.category and fits(p)])

    def say(kind, how, o, *words):
        out.append((kind, rng.choice(WORDINGS[how]).format(*words), o))
    for phrase, pool in names.items():
        if len(pool) == 1:
            anchors.append((f"the {phrase}", pool[0]))
            continue
        for word, key in (("largest", lambda o: -o.size), ("smallest", lambda o: o.size)):
            o = first_by(pool, key, lambda a, b: max(a / b, b / a) > LARGER)
            if o:
                say("attribute", word, o, phrase)
                anchors.append((out[-1][1], o))
    for phrase, pool in names.items():
        plain, alone = " " not in phrase, len(pool) == 1
        if alone:
            out.append(("category" if plain else "attribute", f"the {phrase}", pool[0]))
            continue                                                     # more words would only confirm what is clear already
        for word, (axis, sign) in EXTREMES.items():
            o = first_by(pool, lambda o: sign * o.center[axis], lambda a, b: b - a > MARGIN)
            if o:
                say("extreme" if plain else "two-step", word, o, phrase)
        for name in REGIONS:
            o = only(pool, lambda o: in_region(o, name, -MARGIN / 2), lambda o: in_region(o, name, MARGIN / 2))
            if o:
                say("position" if plain else "two-step", "center" if name == "center" else "region", o, phrase, name)
        for words, anchor in anchors:
            if anchor in pool:
                continue
            kind = "relation" if plain and len(words.split()) == 2 else "two-step"
            for name in RELATIONS:
                o = only(pool, lambda o: related(o, anchor, name, -MARGIN), lambda o: related(o, anchor, name, MARGIN))
                if o:
                    say(kind, name, o, phrase, words)
            o = first_by(pool, lambda o: math.dist(o.center, anchor.center), lambda a, b: b - a > 2 * MARGIN)
            if o:
                say(kind, "nearest", o, phrase, words)
    return out


def records(split):
    """A Split -> (number, Scene, text, box, category, kind) of its scenes, one expression each; kinds in equal shares where the scene
    allows. A scene with too few objects, without an expression, or without an unseen pair in the novel split, gives none."""
    out = []
    for i in range(split.scenes):
        s, rng = scene(split.first + i, split), random.Random(split.first + i + 5_000_000)
        choices = [c for c in options(s, rng) if not split.novel or unseen(c[2].category, c[2].color)]
        if choices and len(s.objects) >= split.few:
            kind = rng.choice(sorted({kind for kind, _, _ in choices}))
            _, text, o = rng.choice([c for c in choices if c[0] == kind])
            out.append((i, s, text, o.box, o.category, kind))
    return out
