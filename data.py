"""Records and images: the readers of the embedded and the public data sets.

One sample's way: `load` reads the annotations -> `open_image`; what follows is processor.py's.
Boxes are xyxy, float pixels of the original image.

    python data.py dior           counts beside the published ones, refused and repaired records,
                                  images that don't decode, a contact sheet
    python data.py dior rrsisd    what is trained on in one and scored in the other

A new data set is one function in READERS: (root, split) -> Records, or NoSplit. It knows the
splits that its files have; `read_split` makes "sft", "rft" and, where there is none, "val" of its
"train". It hands each annotation to a Collector, which finds the image, repairs what has one
reading and counts what it refuses:

    def read_mine(root: Path, split: str) -> Records:
        file = first_existing(root, f"{split}.jsonl")
        collector = Collector(root)
        for number, row in read_objects(file):
            collector.add(Annotation(
                f"line {number}", f"{split}-{number}", row["file"], row["text"], row["box"]))
        return collector.records
"""
import argparse
import contextvars
import functools
import hashlib
import itertools
import json
import math
import os
import pickle
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn
from xml.etree import ElementTree

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import images
import reward
from answer import Box
from images import ImageError, Stretch
from pictures import contact_sheet, draw_boxes

# Longer side of an image over its shorter one, at most: the families' own limit.
ASPECT = 200
# Pixels. A box with a thinner side is as good as empty: in the float32 of the rewards, on the
# largest images, it has no area, so that whatever is answered scores 0.
THINNEST = 1 / 16
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp", ".gif")
SPLITS = ("train", "val", "test")
DEEP = images.DEEP
# Share of a run's records whose images can't be decoded, at most.
MOST_UNREADABLE = 0.01
# --coords: what a unit of a box is, and of how many of them the image's sides are (None: a unit
# is a pixel).
COORDS = {"fraction": 1, "1000": 1000, "original": None}


class DataError(Exception):
    """Data that is missing or does not fit; one line: what is wrong, where, what to do."""


class UnreadableImage(DataError):
    """An image that can't be decoded."""


class NoSplit(DataError):
    """There is no split of that name, or not the file that holds it."""


# ---------------------------------------------------------------- records

@dataclass(frozen=True)
class Record:
    """One expression and its box."""

    id: str                       # unique in its data set
    image: Any                    # path, or for `synth` a toy.scenes.Scene, which draws itself
    text: str                     # the expression, as its author wrote it
    box: Box                      # (x1, y1, x2, y2), float pixels of the original image
    category: str
    size: tuple[int, int]         # (width, height) of the original image
    # Kind of expression, where the data set knows it; for `refgeo` the data set it comes from.
    kind: str = ""
    # VRSBench: True where the image holds one object of the category, False where more.
    unique: bool | None = None
    # VRSBench: its own box, whole hundredths of the image's sides, for its official metric.
    grid: tuple[int, ...] | None = None
    # How an image of more than 8 bits a sample becomes one of 8.
    stretch: Stretch | None = None


class Records(list[Record]):
    """The usable records of a split.

    refused: reason -> places, one entry for each record that is not usable. repaired: the same
    for records that are usable, where the file is wrong and only one reading is possible. note:
    what else must be known of the split.
    """

    def __init__(
            self, records: Iterable[Record], refused: dict[str, list[str]],
            repaired: dict[str, list[str]] | None = None, note: str = "",
    ) -> None:
        super().__init__(records)
        self.refused = refused
        self.repaired = repaired or {}
        self.note = note

    def absorb(self, other: "Records", prefix: str = "") -> None:
        """Takes in the records, refusals and repairs of another part.

        prefix: tells whose place it is.
        """
        self.extend(other)
        add_places(self.refused, other.refused, prefix)
        add_places(self.repaired, other.repaired, prefix)

    @property
    def refusals(self) -> dict[str, int]:
        """Reason -> how many records it refuses."""
        return {reason: len(places) for reason, places in self.refused.items()}

    @property
    def hash(self) -> str:
        """16 hex characters that change with any id, text, box or size."""
        lines = (json.dumps([r.id, r.text, r.box, r.category, r.size]) for r in self)
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def add_places(
        places: dict[str, list[str]], more: dict[str, list[str]], prefix: str,
) -> None:
    """Adds reason -> places to another dictionary of that kind."""
    for reason, where in more.items():
        places.setdefault(reason, []).extend(prefix + place for place in where)


def refusal_summary(records: Records, name: str, root: str | Path | None, split: str) -> str:
    """How many of a split's records are refused, why, and the command that says where.

    "" where none is.
    """
    refused = sum(records.refusals.values())
    if not refused:
        return ""
    command = f"python data.py {name}{f' --root {root}' if root else ''} --split {split}"
    deep = "; --stretch 2 98 reads 16-bit and float images" if DEEP in records.refused else ""
    return (
        f"{refused:,} of {refused + len(records):,} records are refused "
        f"({in_words(records.refusals)}){deep}; {command} says where")


def in_words(counts: dict[str, int]) -> str:
    """{"missing image": 3, "empty box": 1} -> "missing image: 3, empty box: 1"."""
    return ", ".join(f"{reason}: {n:,}" for reason, n in counts.items())


def fingerprint(text: str) -> bytes:
    """Bytes that are the same on every machine: an order by them is random and fixed."""
    return hashlib.sha256(text.encode("utf-8", "replace")).digest()


# ---------------------------------------------------------------- load

@dataclass(frozen=True)
class Reading:
    """How files are read where they do not say it themselves."""

    coords: str | None = None     # of the boxes, a key of COORDS; None: pixels, by all signs
    stretch: Stretch | None = None                   # of images of more than 8 bits a sample


# What `load` was asked for. A Collector looks it up, so that no reader need hand it on.
AS_IT_STANDS = Reading()
reading = contextvars.ContextVar("reading", default=AS_IT_STANDS)


def load(
        name: str, root: str | Path | None = None, split: str = "train",
        coords: str | None = None, stretch: Stretch | None = None,
) -> Records:
    """Records of a data set's split.

    "sft" and "rft" mean "train" where a data set has no split of that name. A mixture is written
    "dior+vrsbench:0.5": then root is the folder that holds dior/ and vrsbench/.

    coords: the unit of the boxes, where the data set leaves it open. stretch: percentiles that
    become black and white in images of 16 bits or floats, which are refused without.

    DataError where there is no such data set or split, or its files don't fit. One annotation
    that does not fit is refused (`Records.refused`); where all are, no record is left.
    """
    if coords and ("+" in name or ":" in name or name in OWN_UNIT):
        raise DataError(
            f"--coords {coords} is for a data set that leaves the unit of its boxes open, which "
            f"{name} does not; leave it out")
    before = reading.set(Reading(coords, tuple(stretch) if stretch else None))
    try:
        if "+" in name or ":" in name:
            records = mixture(name, Path(root or "data"), split)
        elif name in READERS:
            records = read_split(name, Path(root) if root else Path("data") / name, split)
        else:
            raise DataError(
                f"no data set is called {name!r}; there are {', '.join(READERS)}, and mixtures "
                "like dior+vrsbench:0.5")
    finally:
        reading.reset(before)
    check_boxes(records, name, split)
    return records


def read_split(name: str, root: Path, split: str) -> Records:
    """Records of a split, by the data set's reader.

    Where its files have no "sft" or "rft" these are "train"; and where they have no "val" either,
    it is held out of "train" (`hold_out`).
    """
    reader = READERS[name]
    try:
        return reader(root, split)
    except NoSplit as error:
        if split not in ("sft", "rft", "val") or not has_split(reader, root, "train"):
            raise error
    train = reader(root, "train")
    if split != "val" and has_split(reader, root, "val"):
        return train
    return hold_out(train, split, root)


def has_split(reader: Callable[[Path, str], Records], root: Path, split: str) -> bool:
    try:
        reader(root, split)
    except NoSplit:
        return False
    return True


def check_boxes(records: Records, name: str, split: str) -> None:
    """DataError for a box that does not lie within its image with an area.

    A Collector keeps none, but a reader may do without one. Whatever is answered to such a
    record would score 0, and nobody would be told.
    """
    for r in records:
        x1, y1, x2, y2 = r.box
        width, height = r.size
        if not (0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height):
            raise DataError(
                f"{name} {split}, record {r.id}: its box {r.box} has no area within the image of "
                f"{width} x {height}; mend its reader, or hand its annotations to a Collector")


def mixture(names: str, root: Path, split: str) -> Records:
    """Records of several data sets, each with its weight.

    A part with a weight below 1 gives that share of its records, one above 1 repeats them (2.5:
    all twice and a half of them again). Weights are for training: of splits that measure, each
    part gives every record once. Which records, and their order, depend on their ids alone; an
    id is preceded by its data set's name and followed by its repetition.
    """
    training = is_training(split)
    mixed = Records([], {})
    notes = []
    for name, weight in mixture_parts(names):
        records = read_split(name, root / name, split)
        weighted = weighted_records(name, records, weight if training else 1.0)
        mixed.absorb(Records(weighted, records.refused, records.repaired), f"{name}: ")
        if records.note:
            notes.append(f"{name}: {records.note}")
    shuffled = sorted(mixed, key=lambda r: fingerprint(r.id))
    return Records(shuffled, mixed.refused, mixed.repaired, "; ".join(notes))


def is_training(split: str) -> bool:
    """Is this a split to train on? Those of one part of a data set are called "rsvg_train"."""
    return split in ("sft", "rft") or split.removesuffix("_v2").endswith("train")


def mixture_parts(names: str) -> Iterator[tuple[str, float]]:
    """Yields name and weight of each part of "dior+vrsbench:0.5".

    DataError for what has no meaning.
    """
    seen = set()
    for part in names.split("+"):
        name, colon, weight_text = part.partition(":")
        try:
            weight = float(weight_text) if colon else 1.0
        except ValueError:
            weight = 0
        if name not in READERS or name in seen or not 0 < weight < 1000:
            raise DataError(
                f"{part!r} can't be a part of the mixture {names!r}; each part is a data set's "
                "name, no name comes twice, and :WEIGHT may follow, above 0 and below 1000; "
                f"there are {', '.join(READERS)}")
        seen.add(name)
        yield name, weight


def weighted_records(name: str, records: Records, weight: float) -> list[Record]:
    """A mixture's part: all records `weight` times, the last time a share of them."""
    ordered = sorted(records, key=lambda r: fingerprint(f"{name}/{r.id}"))
    weighted = []
    for turn in range(math.ceil(weight)):
        share = min(weight - turn, 1)
        repetition = f"#{turn + 1}" if turn else ""
        for record in ordered[:round(share * len(ordered))]:
            weighted.append(replace(record, id=f"{name}/{record.id}{repetition}"))
    return weighted


# ---------------------------------------------------------------- images

def open_image(record: Record) -> Image.Image:
    """The record's image, PIL RGB; a synth record is drawn here.

    DataError where it can't be decoded to its end.

    Pixels are as the file stores them, for the boxes of data sets are: an orientation, of EXIF or
    of a TIFF, turns nothing. (`eval.py --image` turns the picture upright, as viewers show it,
    and answers in pixels of what it then is.)
    """
    if hasattr(record.image, "draw"):
        return record.image.draw()
    try:
        image = images.read_rgb(record.image, record.stretch)
        if image.size != tuple(record.size):
            raise ImageError(f"{image.size} pixels, where {record.size} were found before")
        return image
    except (OSError, ImageError) as error:
        raise UnreadableImage(
            f"{record.image}: unreadable image of record {record.id} ({error}); repair or remove "
            "it") from None


def open_or_blank(record: Record) -> Image.Image:
    """The record's image to be looked at, a gray one of its size where it can't be read."""
    try:
        return open_image(record)
    except UnreadableImage:
        return Image.new("RGB", record.size, "gray")


def image_size(
        path: Path, stretch: Stretch | None = None,
) -> tuple[tuple[int, int] | None, str | None]:
    """(width, height) as stored and None, or None and why the image can't be used.

    Its header is read, its pixels are not.
    """
    try:
        header = images.read_header(path)
    except FileNotFoundError:
        return None, "missing image"
    except (OSError, ImageError):
        return None, "unreadable image"
    if header.deep and stretch is None:
        return None, DEEP
    if max(header.size) > ASPECT * min(header.size):
        return None, f"image more than {ASPECT} times as long as wide"
    return header.size, None


def image_stem(base: str) -> tuple[str, str]:
    """A name -> its stem and suffix; "P0.v2" has no suffix of an image, and keeps its dot."""
    stem, suffix = os.path.splitext(base)
    return (stem, suffix) if suffix.lower() in IMAGE_SUFFIXES else (base, "")


def is_hidden(name: str) -> bool:
    """Is a file or folder of this name none of the data set's?

    Zips leave `__MACOSX` and `._x` behind, notebooks `.ipynb_checkpoints`, editors `.x.swp`.
    """
    return name.startswith(".") or name == "__MACOSX"


def visible_files(folder: Path, pattern: str) -> list[Path]:
    """The files under a folder that fit a pattern, sorted by path, without what is hidden."""
    files = []
    for path in folder.glob(pattern):
        if not any(map(is_hidden, path.relative_to(folder).parts)):
            files.append(path)
    return sorted(files, key=lambda p: p.as_posix())


def index_images(folder: Path) -> dict[str, list[Path]]:
    """Stem -> the images of that name in a folder and in all below it.

    Links are followed, as hub caches are made of them; what a zip leaves over is skipped.
    """
    paths: dict[str, list[Path]] = {}
    walked = set()
    for directory, subdirectories, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(directory)
        if real in walked:
            # A link beside the folder itself, or a circle of links.
            subdirectories[:] = []
            continue
        walked.add(real)
        subdirectories[:] = [name for name in subdirectories if not is_hidden(name)]
        for name in files:
            stem, suffix = os.path.splitext(name)
            if suffix.lower() in IMAGE_SUFFIXES and not is_hidden(name):
                paths.setdefault(stem, []).append(Path(directory, name))
    return paths


# ---------------------------------------------------------------- from annotation to record

@dataclass
class Annotation:
    """What a reader found, as the file has it: nothing of it needs to be right."""

    where: str                    # its place, for the user
    id: str
    image: Any                    # name or path
    text: Any
    box: Any                      # four numbers
    category: Any = ""
    # In parts of the image's sides, of which there are so many, where the file's own form says
    # so; None: in pixels, unless --coords says otherwise.
    parts: int | None = None
    repairs: Sequence[str] = ()   # what the reader repaired already
    # (width, height) that the image must have for the box to be right, where it is told.
    size: tuple[int, int] | None = None
    # Whose boxes are all in one unit; None: all that the Collector gets.
    file: Path | None = None
    # As in Record.
    kind: str = ""
    unique: bool | None = None
    grid: tuple[int, ...] | None = None


@dataclass
class FoundImage:
    """An image's file, its (width, height) and what was repaired; or why there is none."""

    path: Path | None = None
    size: tuple[int, int] | None = None
    problem: str | None = None
    repairs: Sequence[str] = ()


@dataclass
class RepairedBox:
    """A box within the image and what was repaired; or why there is none."""

    box: Box | None = None
    problem: str | None = None
    repairs: Sequence[str] = ()


class Collector:
    """Takes annotations: keeps the record, or counts why it can't be used.

    Images are found by base name, whatever folders lie between them and `folder`. Where several
    have the name, the end of the path that the annotation gives decides, then a folder called
    `preferred_folder`; if neither does, the record is refused. A name in an annotation never
    leads out of the folder.

    exact: the annotation gives the path itself.
    refuse_swapped: swapped corners have a second reading (x, y, width, height), so that they are
    refused; else they are repaired.
    """

    def __init__(
            self, folder: Path, preferred_folder: str = "", exact: bool = False,
            refuse_swapped: bool = False,
    ) -> None:
        self.folder = folder
        self.preferred_folder = preferred_folder
        self.exact = exact
        self.refuse_swapped = refuse_swapped
        self.reading = reading.get()
        self.kept = Records([], {})
        self.ids: set[str] = set()
        self.sizes: dict[Path, tuple[tuple[int, int] | None, str | None]] = {}
        self.paths = {} if exact else index_images(folder)
        # Of each file: its boxes as they stand there, with their images' sizes.
        self.boxes: dict[Path, list[tuple[Box, tuple[int, int] | None]]] = {}

    @property
    def records(self) -> Records:
        """What was taken; DataError where a file's boxes are in another unit than pixels."""
        for file, boxes in self.boxes.items():
            refuse_other_unit(boxes, f"{file}: its boxes")
        return self.kept

    def add(self, annotation: Annotation) -> None:
        """Finds the image and repairs the box of an annotation -> a record, or a refusal."""
        image = self.find(str(annotation.image or ""))
        coords = self.reading.coords
        parts = COORDS[coords] if coords else annotation.parts
        repaired = repair_box(annotation.box, image.size, parts)
        if not coords and not parts:
            box, _ = read_four_numbers(annotation.box)
            if box:
                self.boxes.setdefault(annotation.file or self.folder, []).append((box, image.size))
        text = annotation.text.strip() if isinstance(annotation.text, str) else ""
        problem = image.problem or repaired.problem
        if self.refuse_swapped and "swapped corners" in repaired.repairs:
            problem = "x1 > x2 or y1 > y2 (is it x, y, width, height?)"
        if not image.problem and annotation.size not in (None, image.size):
            problem = "image of another size than its annotation says"
        if not problem and not text:
            problem = "empty text"
        if not problem and annotation.id in self.ids:
            problem = "id of an earlier record"
        if problem:
            self.refuse(problem, annotation.where)
            return
        for repair in (*annotation.repairs, *image.repairs, *repaired.repairs):
            self.kept.repaired.setdefault(repair, []).append(annotation.where)
        self.ids.add(annotation.id)
        category = str(annotation.category or "").strip()
        self.kept.append(Record(
            annotation.id, image.path, text, repaired.box, category, image.size,
            annotation.kind, annotation.unique, annotation.grid, self.reading.stretch))

    def refuse(self, problem: str, where: str) -> None:
        self.kept.refused.setdefault(problem, []).append(where)

    def find(self, name: str) -> FoundImage:
        """The image that an annotation names."""
        if not name:
            return FoundImage(problem="no image named")
        name = path_within(self.folder, name.replace("\\", "/"))
        if name is None:
            return FoundImage(problem="image outside the data set")
        paths = [self.folder / name] if self.exact else self.candidates(name)
        if not paths:
            return FoundImage(problem="missing image")
        if len(paths) > 1:
            return FoundImage(problem="several images of that name")
        path = paths[0]
        # An image has many records; its file is opened once.
        if path not in self.sizes:
            self.sizes[path] = image_size(path, self.reading.stretch)
        size, problem = self.sizes[path]
        base = os.path.basename(name)
        repairs = []
        if path.name != base:
            repairs = [f"image called *{image_stem(base)[1]} is *{path.suffix}"]
        return FoundImage(path, size, problem, repairs)

    def candidates(self, name: str) -> list[Path]:
        """The images that a name may mean: each rule applies where it leaves one at least."""
        base = os.path.basename(name)
        paths = self.paths.get(image_stem(base)[0], [])
        paths = [p for p in paths if p.name == base] or paths
        paths = [p for p in paths if p.as_posix().endswith(f"/{name}")] or paths
        folder = self.preferred_folder
        return [p for p in paths if folder in p.relative_to(self.folder).parts] or paths


def path_within(folder: Path, name: str) -> str | None:
    """A name, relative or absolute -> its path from the folder, or None where it leads out of it.

    Links are not followed, but those that lead to the folder itself.
    """
    for start in (os.path.abspath(folder), os.path.realpath(folder)):
        path = os.path.relpath(os.path.join(start, name), start)
        if path.split(os.sep)[0] != os.pardir:
            return path
    return None


def refuse_other_unit(
        boxes: Sequence[tuple[Sequence[float], tuple[int, int] | None]], whose: str) -> None:
    """DataError, which names --coords, where boxes can't be in pixels.

    boxes: four numbers each, and the size of the image or None.
    """
    unit = other_unit(boxes)
    if unit:
        signs = {
            "fraction": "all lie in [0, 1]",
            "1000": "all lie in 0..1000, and beyond their images"}
        raise DataError(
            f"{whose} {signs[unit]}: are they fractions or thousandths of the image's sides? Say "
            f"it with --coords {unit} (of eval.py's data: --data-coords), or --coords original "
            "where they are pixels")


# The share of boxes beyond their images that tells of another unit than pixels: of boxes wholly
# outside, and of those that go past an edge by half the side. A few are mistakes of the file,
# which are refused and repaired one by one.
WHOLLY_OUTSIDE = 0.01
FAR_PAST_EDGE = 0.5


def other_unit(
        boxes: Sequence[tuple[Sequence[float], tuple[int, int] | None]]) -> str | None:
    """The unit that a file's boxes must be in, a key of COORDS, or None where pixels may be.

    As `refuse_other_unit` takes them.
    """
    values = list(itertools.chain.from_iterable(box for box, _ in boxes))
    lowest = min(values, default=0)
    highest = max(values, default=0)
    # A box without an area tells nothing, as one of zeros in place of none.
    solid = any(box[0] != box[2] and box[1] != box[3] for box, _ in boxes)
    rounding = 1e-3
    if not solid or lowest < -rounding or highest > 1000 + rounding:
        return None
    if highest <= 1 + rounding:
        # Zeros and ones alone are as well a pixel in the corner.
        return None if all(value in (0, 1) for value in values) else "fraction"
    sized = [(box, size) for box, size in boxes if size]
    outside = 0
    far = 0
    for (x1, y1, x2, y2), (width, height) in sized:
        outside += min(x1, x2) >= width or min(y1, y2) >= height
        far += max(x1, x2) > 1.5 * width or max(y1, y2) > 1.5 * height
    n = max(len(sized), 1)
    far_enough = n > 1 and far / n >= FAR_PAST_EDGE
    return "1000" if outside / n >= WHOLLY_OUTSIDE or far_enough else None


def repair_box(
        values: Any, size: tuple[int, int] | None, parts: int | None = None,
) -> RepairedBox:
    """Four numbers -> a box within the image of this size (None: there is no image).

    parts: see Annotation. Repaired are decimal commas, swapped corners, and what lies past the
    edge.
    """
    box, decimal_comma = read_four_numbers(values)
    if not box:
        return RepairedBox(problem="no box")
    if size is None:
        # Without an image the record is refused for that.
        return RepairedBox()
    if parts:
        box = [v * size[i % 2] / parts for i, v in enumerate(box)]
    x1, y1, x2, y2 = box
    ordered = (min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2))
    clamped = tuple(min(max(v, 0.0), float(size[i % 2])) for i, v in enumerate(ordered))
    if min(clamped[2] - clamped[0], clamped[3] - clamped[1]) < THINNEST:
        outside = clamped != ordered
        return RepairedBox(problem="box outside the image" if outside else "empty box")
    repairs = []
    if decimal_comma:
        repairs.append("decimal comma")
    if ordered != tuple(box):
        repairs.append("swapped corners")
    if clamped != ordered:
        repairs.append("box past the edge")
    return RepairedBox(clamped, repairs=repairs)


DECIMAL_COMMA = re.compile(r"\s*-?\d+,\d+\s*")


def read_four_numbers(values: Any) -> tuple[list[float], bool]:
    """Four finite numbers, as numbers or texts -> floats, and whether one had a decimal comma.

    No floats where they are not four, or not numbers.
    """
    box = []
    decimal_comma = False
    try:
        for value in values:
            if isinstance(value, str) and DECIMAL_COMMA.fullmatch(value):
                value = value.replace(",", ".")
                decimal_comma = True
            box.append(float(value))
    except (TypeError, ValueError, OverflowError):
        return [], False
    if len(box) != 4 or not all(map(math.isfinite, box)):
        return [], False
    return box, decimal_comma


# ---------------------------------------------------------------- what readers find in files

def numbers(value: Any) -> list[float]:
    """Every number in a list or a text, as floats, but in a text none too large for one."""
    if isinstance(value, list):
        floats = []
        for item in value:
            if type(item) in (int, float):
                # By way of text 10**400 is infinite; float() itself would raise.
                floats.append(float(str(item)))
            else:
                floats += numbers(item)
        return floats
    texts = re.findall(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?", str(value))
    return [float(text) for text in texts if math.isfinite(float(text))]


def bracketed_numbers(value: Any) -> list[float]:
    """A list's numbers, or those within the only innermost [...] of a text or a nested list.

    Else none.
    """
    if isinstance(value, list) and not any(isinstance(item, list) for item in value):
        return numbers(value)
    brackets = re.findall(r"\[[^\[\]]*\]", str(value))
    return numbers(brackets[0]) if len(brackets) == 1 else []


def first_existing(root: Path, *names: str) -> Path:
    """The first of these paths that is there."""
    for name in names:
        if (root / name).exists():
            return root / name
    raise NoSplit(
        f"no {' or '.join(names)} in {root}{zip_hint(root)}; --root must name the folder of the "
        "data set as it was downloaded")


def zip_hint(root: Path) -> str:
    """What to add to an error about missing files, where archives are in their place."""
    names = sorted(p.name for p in root.glob("*.zip"))
    return f" ({', '.join(names)} is there: unzip it)" if names else ""


def read_json(path: Path) -> Any:
    """A JSON file's value, or None where there is no such file.

    DataError where it is unreadable.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: unreadable ({error})") from None


def text_lines(file: Path) -> list[str]:
    """Lines of a text, without their ends."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: unreadable ({error})") from None
    # splitlines would also cut at U+2028.
    return [line.rstrip("\r") for line in text.split("\n")]


# An object that goes on for more lines than this is a broken one.
LONGEST_OBJECT = 100


def read_objects(file: Path) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """Yields (line number, object) of a JSONL file, None for what is no object.

    An object may go on over several lines, as in some of refGeo's; a line that begins another
    one ends what is unfinished. DataError where the file is one JSON array.
    """
    lines = text_lines(file)
    refuse_array(file, lines)
    unfinished = ""               # an object's text, as far as it was read
    start = 0
    for number, line in enumerate(lines, 1):
        if unfinished and line.startswith("{"):
            yield start, None
            unfinished = ""
        if unfinished:
            text = f"{unfinished}\n{line}"
        else:
            text = line.strip()
            start = number
        if not text:
            continue
        value = parse_object(text)
        if value is None and text.startswith("{") and number - start < LONGEST_OBJECT:
            unfinished = text
            continue
        yield start, value
        unfinished = ""
    if unfinished:
        yield start, None


def parse_object(text: str) -> dict[str, Any] | None:
    """A JSON object, or None for anything else; a text in it may hold a line break."""
    try:
        value = json.loads(text, strict=False)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def refuse_array(file: Path, lines: list[str]) -> None:
    """DataError where the first line that is not blank begins a JSON array."""
    for line in lines:
        if line.strip():
            if line.strip().startswith("["):
                raise DataError(
                    f"{file}: a JSON array, where one JSON object a line is needed; jq -c '.[]' "
                    "makes lines of it")
            return


def hold_out(records: Records, split: str, root: Path) -> Records:
    """For data without validation records: "val" is one image in 20 of train.

    It is chosen by the image's name. The training stages ("sft", "rft") get the rest and what
    was refused; "train" stays whole. DataError where train has not an image for each.
    """
    images = sorted({r.image for r in records}, key=lambda p: (fingerprint(p.name), p))
    if len(images) < 2:
        refused = f" (refused: {in_words(records.refusals)})" if records.refused else ""
        raise NoSplit(
            f"{split} needs two usable images in train, of which one is held out for validation, "
            f"and {root} has {len(images)}{refused}; add images, or records of a split val")
    held_out = set(images[:max(len(images) // 20, 1)])
    note = (
        f"validation is {len(held_out):,} of train's {len(images):,} images, which sft and rft "
        "leave out")
    if split == "val":
        return Records([r for r in records if r.image in held_out], {}, {}, note)
    training = [r for r in records if r.image not in held_out]
    return Records(training, records.refused, records.repaired, note)


# ---------------------------------------------------------------- readers

def read_synth(root: Path, split: str, name: str = "synth") -> Records:
    """An embedded world, one of scenes.WORLDS.

    Drawn, not read: root is not used.
    """
    from toy import scenes

    splits = scenes.WORLDS[name]
    split = {"train": "rft"}.get(split, split)
    if split not in splits:
        raise NoSplit(f"{name} has no split {split!r}; it has {', '.join(splits)}")
    records = Records([], {})
    for i, scene, text, box, category, kind in scenes.records(splits[split]):
        records.append(Record(f"{split}-{i}", scene, text, box, category, scene.size, kind))
    return records


@dataclass(frozen=True)
class DiorLayout:
    """What differs between the data sets of DIOR-RSVG's layout."""

    name: str
    image_folder: str
    # Lines of a split file that mark a generation withdrawn by its authors.
    withdrawn: dict[str, int]


DIOR = DiorLayout("dior", "JPEGImages", {"train": 15_328, "val": 3_832, "test": 19_160})
OPT = DiorLayout("opt", "Image", {})


def read_dior(root: Path, split: str) -> Records:
    """DIOR-RSVG as it is downloaded."""
    return read_dior_layout(root, split, DIOR)


def read_opt(root: Path, split: str) -> Records:
    """OPT-RSVG: DIOR-RSVG's scheme with boxes in fractions of a pixel.

    Its images are in Image/ or JPEGImages/, its split files in split/.
    """
    return read_dior_layout(root, split, OPT)


def read_dior_layout(root: Path, split: str, layout: DiorLayout) -> Records:
    """Annotations/*.xml, images, and split files of indices.

    An index is that of an <object>, counted from 0 over all XML files sorted by path: every
    object counts, a refused one too, or all later indices would shift.
    """
    split = {"sft": "train", "rft": "train"}.get(split, split)
    if split not in SPLITS:
        raise NoSplit(f"{layout.name} has no split {split!r}; it has {', '.join(SPLITS)}")
    splits = dior_indices(root, layout.withdrawn)
    indices = set(splits[split])
    folder = root / "Annotations"
    files = visible_files(folder, "**/*.xml")
    if not files:
        raise DataError(
            f"no annotations at {folder}/*.xml{zip_hint(root)}; --root must name the folder that "
            f"holds Annotations and {layout.image_folder}")
    collector = Collector(root, layout.image_folder)
    count = 0                     # objects of the files that were read
    image_of = {}                 # file -> the image that it is of
    for file in files:
        tree = read_xml(file)
        image_of[file] = image = (tree.findtext("filename") or "").strip()
        for item in tree.findall("object"):
            index = count
            count += 1
            if index in indices:
                sides = ("xmin", "ymin", "xmax", "ymax")
                collector.add(Annotation(
                    f"{file}, object {index}", str(index), image, item.findtext("description"),
                    [item.findtext(f"bndbox/{side}") for side in sides], item.findtext("name")))
    note = check_object_count(root, count, splits, split, image_of)
    records = collector.records
    records.note = note
    return records


def check_object_count(
        root: Path, count: int, splits: dict[str, list[int]], split: str,
        image_of: dict[Path, str],
) -> str:
    """Compares the objects that were found with the indices that the split files name.

    DataError where they name more, or where files that look like copies of others shift the
    indices. -> a note where they name fewer for no such reason: of a part of the splits.

    image_of: annotation file -> image.
    """
    folder = root / "Annotations"
    # Where another split's are beyond the end, this one's may be shifted.
    for name in (split, *splits):
        beyond = sum(index >= count for index in splits[name])
        if beyond:
            raise DataError(
                f"{root}: {beyond} of the {len(splits[name])} indices of {name} are beyond the "
                f"{count} objects found in {folder}; annotations are missing, or the split files "
                "belong to other data")
    named = sum(map(len, splits.values()))
    copies = find_copies(image_of, count > named)
    if copies:
        suspects = ", ".join(str(file.relative_to(root)) for file in copies[:5])
        more = f" and {len(copies) - 5} more" if len(copies) > 5 else ""
        raise DataError(
            f"{root}: {count} objects are in {folder} where the split files name {named}; "
            f"{suspects}{more} looks like a copy of another annotation, and shifts every later "
            "index; remove it")
    if count == named:
        return ""
    return (
        f"{count:,} objects are in Annotations, of which the split files name {named:,}: right for "
        "a part of the splits alone; a stray annotation would shift every later index")


def find_copies(image_of: dict[Path, str], too_many: bool) -> list[Path]:
    """The annotation files that look like copies of others, by their names or images.

    too_many: either sign is enough; else both are needed. image_of: file -> image.
    """
    by_image: dict[str, list[Path]] = {}
    for file, image in image_of.items():
        by_image.setdefault(image or str(file), []).append(file)
    second = set()
    for files in by_image.values():
        # Of several of one image the shortest path is the original's.
        files.sort(key=lambda file: (len(file.as_posix()), file.as_posix()))
        second.update(files[1:])
    copies = {file for file in image_of if is_copy(file)}
    return sorted(copies | second if too_many else copies & second)


# How file managers and editors call copies: "1 (1)", "1 - Copy", "1_copy", "Copy of 1",
# "1-checkpoint", "1.bak", "1.orig", "1~".
COPY_NAME = re.compile(
    r"(?:copy of )?(.+?)(?: ?\(\d+\)|[-_ ]*copy(?: ?\(?\d+\)?)?|-checkpoint|\.bak|\.orig|\.old|~)*",
    re.IGNORECASE)


def is_copy(file: Path) -> bool:
    """Is a file called as a copy of another one in its folder, which is there?"""
    original = COPY_NAME.fullmatch(file.stem)[1]
    return original != file.stem and file.with_name(original + file.suffix).exists()


XML_ENCODING = re.compile(rb"""^\s*<\?xml[^>]*?encoding\s*=\s*["']([^"']*)["']""")
# Encodings that hold all of a smaller one, under whose name they are often sold.
LARGER_ENCODINGS = {"gb2312": "gb18030", "gbk": "gb18030"}


def read_xml(file: Path) -> ElementTree.Element:
    """The root element of an annotation; DataError where it is unreadable.

    The parser knows encodings of one byte a character, UTF-8 and UTF-16; others are decoded here.
    """
    try:
        content = file.read_bytes()
        declared = XML_ENCODING.match(content)
        try:
            return ElementTree.fromstring(content)
        except (LookupError, ValueError):
            if not declared:
                raise
            name = declared[1].decode("ascii", "replace").lower()
            # In a text the declaration means nothing to the parser.
            return ElementTree.fromstring(content.decode(LARGER_ENCODINGS.get(name, name)))
    except (ElementTree.ParseError, LookupError, ValueError, OSError) as error:
        raise DataError(
            f"{file}: unreadable annotation ({' '.join(str(error).split())}); without its objects "
            "every later index would be wrong") from None


def dior_indices(
        root: Path, withdrawn: dict[str, int] = DIOR.withdrawn,
) -> dict[str, list[int]]:
    """The split files, in root or in root/split: name -> indices.

    DataError where they are not whole numbers, not disjoint, or of a generation that was
    withdrawn. withdrawn: name -> lines that mark it.
    """
    if not (root / "train.txt").exists() and (root / "split").is_dir():
        root = root / "split"
    splits = {name: read_indices(root / f"{name}.txt", root) for name in SPLITS}
    for name, indices in splits.items():
        if len(indices) == withdrawn.get(name):
            raise DataError(
                f"{root / name}.txt has {len(indices)} lines: the split generation withdrawn by "
                "its authors in 2023, which leaks test into train beside the current one; "
                "download the current train.txt, val.txt, test.txt")
    counts = Counter(itertools.chain.from_iterable(splits.values()))
    if min(counts, default=0) < 0:
        raise DataError(
            f"{root}: the split files hold an index below 0; download them again")
    repeated = [index for index, n in counts.items() if n > 1]
    if repeated:
        raise DataError(
            f"{root}: the split files overlap or repeat an index ({repeated[:3]}), so test would "
            "leak into train; download them again")
    return splits


def read_indices(file: Path, root: Path) -> list[int]:
    """The whole numbers of a split file."""
    try:
        return [int(line) for line in file.read_text(encoding="utf-8-sig").split()]
    except OSError:
        raise DataError(
            f"no split file {file}{zip_hint(root)}; --root must name the folder that holds "
            "Annotations, images, train.txt, val.txt, test.txt") from None
    except ValueError as error:
        raise DataError(f"{file}: not one index a line ({error})") from None


def read_rsvg_hr(root: Path, split: str) -> Records:
    """RSVG-HR: lines image,x1,y1,x2,y2,text."""
    if split in ("sft", "rft", "val"):
        return hold_out(read_rsvg_hr(root, "train"), split, root)
    if split not in ("train", "test"):
        raise NoSplit(
            f"rsvg-hr has no split {split!r}; it has train, test, and val held out of train")
    name = f"rsvg_hr_{split}.txt"
    file = first_existing(root, name, f"Annotations/{name}")
    collector = Collector(root, "images")
    for number, line in enumerate(text_lines(file), 1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        image, *fields = line.split(",")
        commas = decimal_commas(fields)
        if len(commas) > 1:
            collector.refuse(
                "five numbers, and more than one may hold a decimal comma", where)
            continue
        for i in commas:
            fields[i:i + 2] = [f"{fields[i]}.{fields[i + 1]}"]
        # All that follows the fifth comma is the text, its own commas included.
        collector.add(Annotation(
            where, f"{split}-{number}", image.strip(), ",".join(fields[4:]), fields[:4],
            repairs=["decimal comma"] if commas else []))
    return collector.records


def decimal_commas(fields: list[str]) -> list[int]:
    """The fields behind which a comma may be a decimal comma: "216,00" became two fields.

    fields: of a line of RSVG-HR, behind the image: four numbers, or five where one has a decimal
    comma, then the text.

    >>> decimal_commas(["170.0", "774.0", "216", "00", "803.21", "find a pool"])
    [2]
    >>> decimal_commas(["1", "2", "3.5", "4.5", "5.5", "six"])       # 1,2 is the only pair
    [0]
    >>> decimal_commas(["5.5", "5.5", "7.5", "9", "12", "storey building"])
    []
    """
    number = re.compile(r"\s*-?\d+(\.\d+)?\s*")
    if len(fields) <= 5 or not all(number.fullmatch(field) for field in fields[:5]):
        return []
    candidates = []
    for i in range(4):
        if fields[i].strip("- ").isdigit() and fields[i + 1].strip().isdigit():
            candidates.append(i)
    # A fifth number behind the last pair may as well begin the text, as in "12,storey building".
    return [] if candidates == [3] else candidates


def read_vrsbench(root: Path, split: str) -> Records:
    """VRSBench: its train file and its evaluation of referring expressions, `test`."""
    if split in ("sft", "rft", "val"):
        return hold_out(read_vrsbench(root, "train"), split, root)
    if split not in ("train", "test"):
        raise NoSplit(
            f"vrsbench has no split {split!r}; it has train, test, and val held out of train")
    name = "VRSBench_train.json" if split == "train" else "VRSBench_EVAL_referring.json"
    file = first_existing(root, name)
    collector = Collector(root, "Images_train" if split == "train" else "Images_val")
    rows = read_json(file)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{file}: not a JSON array of objects; download it again")
    for number, row in enumerate(rows):
        where = f"{file}, record {number}"
        if split == "test":
            collector.add(vrsbench_test(row, where, f"test-{number}"))
        else:
            for annotation in vrsbench_train(row, where, f"train-{number}"):
                collector.add(annotation)
    return collector.records


# Pixels of its images, which are square.
VRSBENCH_SIDE = 512


def vrsbench_test(row: dict[str, Any], where: str, identity: str) -> Annotation:
    """A row of the evaluation: obj_corner is the precise box, in parts of the image's sides.

    `grid` keeps ground_truth, the whole hundredths that the official metric compares.
    """
    corners = numbers(row.get("obj_corner"))         # x, y of each of the four
    grid = numbers(row.get("ground_truth"))
    box = []
    parts = 1
    repairs = []
    if len(corners) == 8:
        xs = corners[0::2]
        ys = corners[1::2]
        box = [min(xs), min(ys), max(xs), max(ys)]
    thinnest = THINNEST / VRSBENCH_SIDE
    if not box or not (box[2] - box[0] >= thinnest and box[3] - box[1] >= thinnest):
        box = grid
        parts = 100
        repairs = ["box of ground_truth, for want of obj_corner"]
        if len(grid) == 4 and (grid[0] == grid[2] or grid[1] == grid[3]):
            # Both ends count on that grid: a box from 50 to 50 is one cell wide.
            x1, y1, x2, y2 = grid
            box = [x1, y1, x2 + (x1 == x2), y2 + (y1 == y2)]
            repairs = ["whole cells of ground_truth, for want of area"]
    unique = row.get("unique")
    whole = len(grid) == 4 and all(map(math.isfinite, grid))
    return Annotation(
        where, identity, row.get("image_id"), row.get("question"), box, row.get("obj_cls"), parts,
        repairs, unique=None if unique is None else str(unique).lower() in ("true", "1"),
        grid=tuple(map(int, grid)) if whole else None)


def vrsbench_train(row: dict[str, Any], where: str, identity: str) -> Iterator[Annotation]:
    """The questions of a conversation that ask for a box, in whole hundredths of the image.

    Those of other tasks ([caption], [vqa]) are none of ours.
    """
    turns = []
    conversation = row.get("conversations")
    for turn in conversation if isinstance(conversation, list) else ():
        turns.append(str(turn["value"]) if isinstance(turn, dict) and "value" in turn else "")
    pairs = itertools.zip_longest(turns[::2], turns[1::2], fillvalue="")
    for i, (question, answer) in enumerate(pairs):
        if "[refer]" not in question:
            continue
        text = re.search(r"<p>(.*?)</p>", question, re.DOTALL)
        yield Annotation(
            f"{where}, turn {i}" if i else where, f"{identity}-{i}" if i else identity,
            row.get("image"), text and text[1], numbers(answer), parts=100)


REFGEO = ("dior_rsvg", "rsvg", "geochat", "vrsbench", "avvg")


def read_refgeo(root: Path, split: str) -> Records:
    """refGeo (GeoGround): every data set's file of the split, or one, as in "dior_rsvg_test".

    Its boxes are xyxy pixels; its ids may have another suffix than the image's file. A repack
    has its train files as metainfo_v2/*_train_v2.jsonl; they are read where metainfo/ has none.
    """
    if split in ("sft", "rft", "val") and not visible_files(root / "metainfo", "*_val.jsonl"):
        return hold_out(read_refgeo(root, "train"), split, root)
    split = {"sft": "train", "rft": "train"}.get(split, split)
    names = [f"{part}_{split}" for part in REFGEO] if split in SPLITS else [split]
    paths = {name: refgeo_file(root, name) for name in names}
    files = [path for path in paths.values() if path]
    if not files:
        folder = first_existing(root, "metainfo", "metainfo_v2")
        raise NoSplit(
            f"no {folder / names[0]}.jsonl or the like; refgeo has "
            "train, val, test, and those of one data set, like rsvg_test")
    parts = [file.stem.removesuffix("_v2").rsplit("_", 1)[0] for file in files]
    folders = refgeo_folders(root, (*REFGEO, *parts))
    records = Records([], {})
    for file, part in zip(files, parts):
        # Where no data set has a folder of its own, images are looked for everywhere. Where one
        # has, an image of another one's folder would be another image.
        collector = Collector(folders.get(part) or (root / "images" / part if folders else root))
        for number, row in read_objects(file):
            where = f"{file}, line {number}"
            if row is None:
                collector.refuse("no JSON object", where)
                continue
            collector.add(Annotation(
                where, f"{file.stem}-{number}", row.get("image_id"), row.get("question"),
                bracketed_numbers(row.get("bbox")), kind=part,
                size=told_size(row, "image_width", "image_height")))
        records.absorb(collector.records)
    absent = [f"{name}.jsonl" for name, path in paths.items() if not path]
    records.note = f"not there: {', '.join(absent)}" if absent else ""
    return records


def refgeo_file(root: Path, name: str) -> Path | None:
    """The file of a data set's split, "rsvg_train", or None where there is none."""
    for folder, suffix in (("metainfo", ""), ("metainfo_v2", ""), ("metainfo_v2", "_v2")):
        file = root / folder / f"{name}{suffix}.jsonl"
        if file.exists():
            return file
    return None


def told_size(row: dict[str, Any], width: str, height: str) -> tuple[int, int] | None:
    """The (width, height) that an annotation gives its image under these keys, else None."""
    size = (row.get(width), row.get(height))
    return size if all(type(side) is int for side in size) else None


def refgeo_folders(root: Path, parts: Iterable[str]) -> dict[str, Path]:
    """Data sets -> the folder of its images, of those that have one.

    It is called as the data set is, in another case or with other hyphens; else its name begins
    so.
    """
    candidates = []
    for parent in (root / "images", root):
        candidates += [path for path in sorted(parent.glob("*")) if path.is_dir()]
    plain_names = {path: re.sub("[-_ ]", "", path.name.lower()) for path in candidates}
    folders = {}
    for part in parts:
        name = part.replace("_", "")
        equal = [path for path, plain in plain_names.items() if plain == name]
        longer = [path for path, plain in plain_names.items() if plain.startswith(name)]
        if equal or longer:
            folders[part] = (equal or longer)[0]
    return folders


def read_rrsisd(root: Path, split: str) -> Records:
    """RRSIS-D, as its authors lay it out or converted to lines, datainfo/rrsisd_SPLIT.jsonl.

    `bbox` is x1, y1, x2, y2 in whole pixels, although its authors' comments say x, y, width,
    height. Boxes of the masks are other boxes; the masks are not read.
    """
    split = {"sft": "train", "rft": "train"}.get(split, split)
    if split not in SPLITS:
        raise NoSplit(f"rrsisd has no split {split!r}; it has {', '.join(SPLITS)}")
    name = f"rrsisd_{split}.jsonl"
    file = first_existing(
        root, "rrsisd/refs(unc).p", "refs(unc).p", f"datainfo/{name}", name)
    is_pickle = file.suffix == ".p"
    rows = rrsisd_refs(file) if is_pickle else read_objects(file)
    collector = Collector(root, "JPEGImages", refuse_swapped=True)
    uses: Counter[str] = Counter()                   # expressions of an annotation
    for number, row in rows:
        where = f"{file}, {'ref' if is_pickle else 'line'} {number}"
        if row is None:
            collector.refuse("no JSON object", where)
            continue
        # As in its authors' code: "testA" is of the test split too.
        split_of_row = str(row.get("split"))
        if split_of_row != split and not (split == "test" and "test" in split_of_row):
            # The pickle holds all splits; a file of lines holds one, or it leaks.
            if not is_pickle:
                collector.refuse("of another split than its file", where)
            continue
        identity = str(row.get("ann_id"))
        uses[identity] += 1
        if uses[identity] > 1:
            identity = f"{identity}-{uses[identity]}"
        collector.add(Annotation(
            where, identity, row.get("file_name"), row.get("sent"), row.get("bbox"),
            row.get("category_name")))
    return collector.records


def rrsisd_refs(file: Path) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """Yields (number, row) as in the converted form: one for each sentence of a ref.

    refs(unc).p has expressions and splits, instances.json beside it has boxes, categories and
    images; DataError where either does not fit.
    """
    refs = read_plain_pickle(file)
    instances = read_json(file.with_name("instances.json"))
    if not isinstance(refs, list) or not isinstance(instances, dict):
        raise DataError(
            f"{file}: not a list of refs, or no instances.json beside it with its boxes; "
            "download both again")
    images = rows_by_id(instances.get("images"))
    annotations = rows_by_id(instances.get("annotations"))
    categories = rows_by_id(instances.get("categories"))
    for number, ref in enumerate(refs):
        if not isinstance(ref, dict):
            yield number, None
            continue
        image = images.get(str(ref.get("image_id")), {})
        annotation = annotations.get(str(ref.get("ann_id")), {})
        category = categories.get(str(ref.get("category_id")), {})
        sentences = ref.get("sentences")
        for sentence in sentences if isinstance(sentences, list) and sentences else [None]:
            if not isinstance(sentence, dict):
                sentence = {}
            yield number, {
                "split": ref.get("split"), "ann_id": ref.get("ann_id"),
                # `raw` is as its author wrote it, `sent` may be in lower case.
                "sent": sentence.get("raw") or sentence.get("sent"),
                "file_name": image.get("file_name") or ref.get("file_name"),
                "bbox": annotation.get("bbox"), "category_name": category.get("name")}


def rows_by_id(rows: Any) -> dict[str, dict[str, Any]]:
    """A list of objects with an "id" -> by that, as text."""
    by_id = {}
    for row in rows if isinstance(rows, list) else ():
        if isinstance(row, dict):
            by_id[str(row.get("id"))] = row
    return by_id


class PlainUnpickler(pickle.Unpickler):
    """Reads lists, dicts, texts and numbers.

    Whatever else a pickle can do, it does through a class or function that it asks for here.
    """

    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(
            f"it asks for {f'{module}.{name}'!r}, which annotations do not need; nothing of it "
            "was run; download it again, or use the form with datainfo/*.jsonl")


def read_plain_pickle(file: Path) -> Any:
    """A pickle's value; DataError where it asks for any class, or is unreadable."""
    try:
        with open(file, "rb") as stream:
            return PlainUnpickler(stream, encoding="utf-8").load()
    except (
            pickle.UnpicklingError, OSError, EOFError, ValueError, TypeError, LookupError,
            AttributeError, OverflowError, MemoryError, RecursionError) as error:
        # The library's own messages may go over several lines.
        raise DataError(
            f"{file}: unreadable pickle ({' '.join(str(error).split())})") from None


# A data set of GeoPixInstruct -> how its splits are called here, "fast_t_test".
GEOPIX = {"FAST-T": "fast_t", "SOTA-T": "sota_t", "SIOR-T": "sior_t"}


def read_geopix(root: Path, split: str) -> Records:
    """GeoPixInstruct: a record for each instance of its images. Needs pyarrow.

    Its files have "train" or "valid", and "FAST_T" and the like, in their paths; `test` is what
    it calls valid, for it has no other. A split may be of one data set, as "fast_t_test".
    """
    if split in ("sft", "rft", "val"):
        return hold_out(read_geopix(root, "train"), split, root)
    collector = Collector(root, refuse_swapped=True)
    for part, file in geopix_files(root, split):
        is_xyxy = geopix_order(file)
        for number, row in parquet_rows(file):
            image_id = f"{file.stem}-{number}" if row["image_id"] is None else row["image_id"]
            for k, instance in enumerate(instances_of(row)):
                box, _ = read_four_numbers(instance.get("bbox"))
                if box and not is_xyxy:
                    x, y, width, height = box
                    box = [x, y, x + width, y + height]
                collector.add(Annotation(
                    f"{file}, row {number}, instance {k}", f"{GEOPIX[part]}-{image_id}-{k}",
                    row["image_path"], instance.get("description"), box,
                    instance.get("category"), size=mask_size(instance.get("mask")), kind=part))
    return collector.records


def instances_of(row: dict[str, Any]) -> list[dict[str, Any]]:
    """A row's instances; one that is no object is empty, so that it is refused and counted."""
    instances = row["instances"]
    if not isinstance(instances, list):
        return []
    return [instance if isinstance(instance, dict) else {} for instance in instances]


def geopix_files(root: Path, split: str) -> list[tuple[str, Path]]:
    """The files of a split, each with the data set that it is of."""
    files = []
    for file in visible_files(root, "**/*.parquet"):
        name = file.relative_to(root).as_posix()
        kind = re.search(r"(?<![a-z])(train|val)", name, re.IGNORECASE)
        part = re.search(r"(FAST|SOTA|SIOR)[-_]?T(?![a-z])", name, re.IGNORECASE)
        if kind and part:
            part_name = f"{part[1].upper()}-T"
            kind_name = "train" if kind[1].lower() == "train" else "test"
            if split in (kind_name, f"{GEOPIX[part_name]}_{kind_name}"):
                files.append((part_name, file))
    if not files:
        raise NoSplit(
            f"no *.parquet of a split {split!r} under {root}; geopix has train and test in files "
            "called like train.FAST_T.parquet and valid.FAST_T.parquet, those of one data set, "
            "like fast_t_test, and val held out of train")
    return files


GEOPIX_COLUMNS = ("image_id", "image_path", "instances")


def parquet_rows(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (number, row) with GEOPIX_COLUMNS; DataError where pyarrow or a column is missing."""
    try:
        # Not among the requirements: this data set alone needs it.
        import pyarrow.parquet
    except ImportError:
        raise DataError(
            f"{file}: Parquet files are read with pyarrow, which is not installed; "
            "pip install pyarrow") from None
    number = 0
    try:
        table = pyarrow.parquet.ParquetFile(file)
        absent = sorted(set(GEOPIX_COLUMNS) - set(table.schema_arrow.names))
        if absent:
            raise ValueError(f"no column {', '.join(absent)}")
        for batch in table.iter_batches(batch_size=256, columns=list(GEOPIX_COLUMNS)):
            for row in batch.to_pylist():
                yield number, row
                number += 1
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise DataError(
            f"{file}: unreadable ({' '.join(str(error).split())}); download it again") from None


# Share of a file's boxes that must fit their masks in one order of the four numbers.
FITTING = 0.99


def geopix_order(file: Path) -> bool:
    """Are a file's boxes x1, y1, x2, y2 (True), or x, y, width, height (False)?

    Its authors do not say it. A box fits its mask where it has an IoU of 0.5 or more with the
    mask's extent. DataError unless 99% fit in one order, and not in the other.
    """
    boxes = []
    extents = []
    for _, row in parquet_rows(file):
        for instance in instances_of(row):
            box, _ = read_four_numbers(instance.get("bbox"))
            extent = mask_extent(instance.get("mask"))
            if box and extent:
                boxes.append(box)
                extents.append(extent)
    xyxy = torch.tensor(boxes, dtype=torch.float64).reshape(-1, 4)
    xywh = torch.cat((xyxy[:, :2], xyxy[:, :2] + xyxy[:, 2:]), 1)
    masks = torch.tensor(extents, dtype=torch.float64).reshape(-1, 4)
    n = max(len(boxes), 1)
    corners_fit = (reward.iou(xyxy, masks) >= 0.5).sum().item() / n
    sides_fit = (reward.iou(xywh, masks) >= 0.5).sum().item() / n
    if (corners_fit >= FITTING) == (sides_fit >= FITTING):
        raise DataError(
            f"{file}: the order of bbox can't be told: of {len(boxes):,} with a mask "
            f"{corners_fit:.1%} fit it as x1, y1, x2, y2 and {sides_fit:.1%} as x, y, width, "
            f"height, where {FITTING:.0%} of one order and not of the other are needed; download "
            "it again")
    return corners_fit >= FITTING


def mask_size(mask: Any) -> tuple[int, int] | None:
    """(width, height) of COCO's run-length encoding, {"size": [height, width], "counts"}."""
    size = mask.get("size") if isinstance(mask, dict) else None
    if not isinstance(size, list) or len(size) != 2:
        return None
    return (size[1], size[0]) if all(type(side) is int for side in size) else None


def mask_extent(mask: Any) -> Box | None:
    """The box around a mask, or None where it is empty or does not fit its size.

    Runs go down the columns, from left to right, the first outside of the mask. Of 3 columns and
    2 rows, 3 pixels outside, 2 inside, 1 outside: the lower one of column 1, the upper of 2.

    >>> mask_extent({"size": [2, 3], "counts": [3, 2, 1]})
    (1.0, 0.0, 3.0, 2.0)
    """
    size = mask_size(mask)
    try:
        runs = np.array(mask_runs(mask["counts"]) if size else [])
    except (LookupError, TypeError, ValueError, OverflowError):
        return None
    if not len(runs) or (runs < 0).any() or runs.sum() != size[0] * size[1]:
        return None
    height = size[1]
    ends = runs.cumsum()[1::2]                       # of the runs inside
    starts = ends - runs[1::2]
    starts = starts[runs[1::2] > 0]
    ends = ends[runs[1::2] > 0]
    if not len(starts):
        return None
    first_columns = starts // height
    last_columns = (ends - 1) // height
    # A run that goes on in the next column reaches the lower edge in one, the upper in the other.
    wraps = last_columns > first_columns
    top = np.where(wraps, 0, starts % height).min()
    bottom = np.where(wraps, height - 1, (ends - 1) % height).max()
    return (
        float(first_columns.min()), float(top), float(last_columns.max() + 1), float(bottom + 1))


def mask_runs(counts: Any) -> list[int]:
    """COCO's runs, as numbers or compressed to a text, as numbers.

    In a text each character holds 5 bits of a number, the lowest first, 32 more where it goes on,
    and stands 48 behind; from the fourth on, a number is the difference to the one two before.

    >>> mask_runs("321")
    [3, 2, 1]
    >>> mask_runs("PQ72001")                   # 0 more than the second, 1 more than the third
    [7200, 2, 0, 2, 1]
    """
    if isinstance(counts, list):
        return [int(count) for count in counts]
    codes = counts.encode("ascii") if isinstance(counts, str) else bytes(counts)
    runs: list[int] = []
    number = 0
    shift = 0
    for code in codes:
        bits = code - 48
        number |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            # The highest bit is the sign.
            number -= 1 << shift
        runs.append(number + runs[-2] if len(runs) > 2 else number)
        number = 0
        shift = 0
    return runs


def read_jsonl(root: Path, split: str) -> Records:
    """Your own data: SPLIT.jsonl, one object a line.

    {"image": path from root, "text": ..., "box": [x1, y1, x2, y2] in pixels} and optional "id",
    "category", "split". Or one file of any name, whose lines are "train" unless they say
    otherwise; root may be that file.
    """
    rows = jsonl_rows(root)
    if split not in rows and split in ("sft", "rft", "val") and "train" in rows:
        train = read_jsonl(root, "train")
        return train if "val" in rows else hold_out(train, split, root)
    if split not in rows:
        raise NoSplit(
            f"{root} has no records of a split {split!r}; it has {', '.join(rows) or 'none'}: "
            f'name a file {split}.jsonl, or give its lines "split": "{split}"')
    folder = root if root.is_dir() else root.parent
    collector = Collector(folder, exact=True, refuse_swapped=True)
    for file, number, row in rows[split]:
        where = f"{file}, line {number}"
        if row is None:
            collector.refuse("no JSON object", where)
            continue
        image = row.get("image") or row.get("images")
        if isinstance(image, list) and len(image) == 1:
            image = image[0]
        asked = expression_and_box(row)
        if asked.problem:
            collector.refuse(asked.problem, where)
            continue
        identity = f"{file.stem}-{number}" if row.get("id") is None else str(row["id"])
        collector.add(Annotation(
            where, identity, image if isinstance(image, str) else asked.image, asked.text,
            asked.box, row.get("category"), asked.parts, file=file))
    return collector.records


Row = tuple[Path, int, dict[str, Any] | None]


def jsonl_rows(root: Path) -> dict[str, list[Row]]:
    """Split -> its lines, as (file, line number, object or None)."""
    files = [root] if root.is_file() else visible_files(root, "*.jsonl")
    if not files:
        raise DataError(
            f"no *.jsonl in {root}; --root must name a folder with train.jsonl, val.jsonl, "
            "test.jsonl, or one JSONL file")
    rows: dict[str, list[Row]] = {}
    for file in files:
        named = len(files) > 1 or file.stem in (*SPLITS, "sft", "rft")
        split_of_file = file.stem if named else "train"
        for number, row in read_objects(file):
            split = str((row or {}).get("split") or split_of_file)
            rows.setdefault(split, []).append((file, number, row))
    return rows


@dataclass
class Asked:
    """What a JSONL line asks for and answers, or why it can't be told."""

    text: Any = None
    box: Sequence[float] = ()
    parts: int | None = None      # as in Annotation
    image: str = ""               # named within the question, as Qwen-VL has it
    problem: str = ""


def expression_and_box(row: dict[str, Any]) -> Asked:
    """Expression and box of a JSONL line.

    "text" and "box"; or a request and an answer that holds the box, as VLM-R1 and Qwen train on
    ("problem" and "solution", "conversations", "messages").
    """
    if "text" in row or "box" in row:
        return Asked(row.get("text"), bracketed_numbers(row.get("box")))
    question, answer = question_and_answer(row)
    image = re.search("<img>(.*?)</img>", question)
    question = re.sub(r"(?:Picture \d+:\s*)?<img>.*?</img>|<image>", "", question).strip()
    text, told = expression_in(question, str(answer))
    if not told:
        return Asked(problem="request whose expression can't be told from its instruction")
    box, parts = box_in(answer)
    return Asked(text, box, parts, image[1] if image else "")


def question_and_answer(row: dict[str, Any]) -> tuple[str, Any]:
    """A request and its answer: of their own keys, or of a conversation's one turn each."""
    turns = {}
    conversation = row.get("conversations") or row.get("messages")
    if isinstance(conversation, list):
        speakers = {"user": "human", "assistant": "gpt", "model": "gpt"}
        said = [turn for turn in conversation if isinstance(turn, dict)]
        said = [turn for turn in said if turn.get("from", turn.get("role")) != "system"]
        for turn in said if len(said) == 2 else ():
            speaker = str(turn.get("from", turn.get("role")))
            turns[speakers.get(speaker, speaker)] = turn.get("value", turn.get("content"))
    question = row.get("problem") or row.get("question") or turns.get("human") or ""
    return str(question), row.get("solution") or row.get("ground_truth") or turns.get("gpt")


IN_IMAGE = "(?:,? in (?:this|the) (?:image|picture))?"
# Requests whose expression stands where the brackets are: VLM-R1's, and kinds of Qwen's.
REQUESTS = [re.compile(pattern, re.DOTALL | re.IGNORECASE) for pattern in (
    "Please provide the bounding box coordinates? of the region this sentence describes: "
    r"(.*?)\.?",
    rf"(?:Locate|Detect|Find|Ground) (.+?){IN_IMAGE},?"
    r"(?: and|\.|;) (?:please )?(?:output|report|return|give|provide) .*",
    r"Outline the position of (.+?) and output all the coordinates in JSON format\.?",
    r"(?:please )?(?:output|report|return|give|provide)(?: me)? the (?:bbox|bounding box|location)"
    rf"(?: coordinates?)? of (.+?){IN_IMAGE}(?:,? (?:in|as) JSON(?: format)?)?\.?",
    rf"Locate (.+?){IN_IMAGE}\.?")]
# What marks an expression: Qwen-VL's and Qwen2-VL's tags, and those of VRSBench.
REFERENCE = re.compile(
    r"<ref>(.*?)</ref>|<\|object_ref_start\|>(.*?)<\|object_ref_end\|>|<p>(.*?)</p>", re.DOTALL)
# What no description of an object says, but an instruction does.
INSTRUCTION = re.compile(
    r"\bbbox|bounding[- ]box|\bcoordinates?\b|\bjson\b|<box>|<\|box_|<\|?object_ref|<ref>",
    re.IGNORECASE)


def expression_in(question: str, answer: str) -> tuple[str, bool]:
    """The expression of a request, and whether it could be told from the instruction around it.

    It is marked in the question, else in the answer; or stands in a known request; or is all
    that is said.
    """
    for text in (question, answer):
        marked = ["".join(groups).strip() for groups in REFERENCE.findall(text)]
        if len(marked) == 1:
            return marked[0], True
    for request in REQUESTS:
        match = request.fullmatch(question)
        if match and not INSTRUCTION.search(match[1]):
            return match[1], True
    return question, not INSTRUCTION.search(question)


# Qwen's way to write a box, in thousandths of the image's sides.
POINTS = re.compile(
    r"(?:<box>|<\|box_start\|>)\s*\((.*?)\)\s*,\s*\((.*?)\)\s*(?:</box>|<\|box_end\|>)")


def box_in(answer: Any) -> tuple[list[float], int | None]:
    """The one box of an answer, and its parts as in Annotation; no numbers where it has none."""
    points = POINTS.findall(answer) if isinstance(answer, str) else []
    if points:
        return (numbers(",".join(points[0])) if len(points) == 1 else []), 1000
    return bracketed_numbers(answer), None


READERS: dict[str, Callable[[Path, str], Records]] = {
    "synth": read_synth,
    "synth-small": functools.partial(read_synth, name="synth-small"),
    "dior": read_dior,
    "opt": read_opt,
    "rsvg-hr": read_rsvg_hr,
    "vrsbench": read_vrsbench,
    "refgeo": read_refgeo,
    "rrsisd": read_rrsisd,
    "geopix": read_geopix,
    "jsonl": read_jsonl,
    "synth-one": functools.partial(read_synth, name="synth-one"),
    "synth-tiny": functools.partial(read_synth, name="synth-tiny")}
# Data sets whose own form says in which unit each box is.
OWN_UNIT = ("synth", "synth-small", "synth-one", "synth-tiny", "vrsbench")
# Expressions of a split, where they were published.
PUBLISHED = {
    "dior": {"train": 26_991, "val": 3_829, "test": 7_500},
    "opt": {"train": 19_580, "val": 4_895, "test": 24_477},
    "rsvg-hr": {"train": 2_151, "test": 499},
    "vrsbench": {"test": 16_159},
    "rrsisd": {"train": 12_181, "val": 1_740, "test": 3_481}}


# ---------------------------------------------------------------- what data sets share

# IoU from which two boxes of one image are taken for one object's.
SAME_BOX = 0.9


def image_name(record: Record) -> Any:
    """What names a record's image in any data set: its file's name without suffix.

    A drawn scene is its own name.
    """
    return record.image.stem if isinstance(record.image, Path) else record.image


def find_shared(
        records: Sequence[Record], training: Iterable[Record],
        image_key: Callable[[Record], Any] = image_name,
) -> list[str | None]:
    """What of each record is in the training data: "record", "image" or None.

    "record": its image, and in it a box with an IoU of 0.9 or more, whatever the expression.
    image_key: tells whether two records have the same image. Boxes are compared in parts of the
    image's sides, so that a resized copy of an image is the same.
    """
    training_boxes: dict[Any, list[Box]] = {}
    for r in training:
        training_boxes.setdefault(image_key(r), []).append(relative_box(r))
    shared: list[str | None] = [None] * len(records)
    # One pair for each record and each box that is trained on in its image.
    pairs = []
    owners = []
    for i, r in enumerate(records):
        boxes = training_boxes.get(image_key(r))
        if boxes:
            shared[i] = "image"
            pairs += [(relative_box(r), box) for box in boxes]
            owners += [i] * len(boxes)
    if pairs:
        a, b = torch.tensor(pairs, dtype=torch.float64).unbind(1)      # (pairs, 4) each
        for i, iou in zip(owners, reward.iou(a, b).tolist()):
            if iou >= SAME_BOX:
                shared[i] = "record"
    return shared


def relative_box(record: Record) -> Box:
    """A record's box in parts of its image's sides."""
    x1, y1, x2, y2 = record.box
    width, height = record.size
    return x1 / width, y1 / height, x2 / width, y2 / height


# ---------------------------------------------------------------- the check of data sets

class DataParser(argparse.ArgumentParser):
    """A wrong flag is one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"data.py: {message}; data.py --help explains every flag\n")


class StretchFlag(argparse.Action):
    """LOW HIGH -> a Stretch."""

    def __call__(
            self, parser: argparse.ArgumentParser, namespace: argparse.Namespace,
            values: Sequence[float], option: str | None = None,
    ) -> None:
        low, high = values
        if not 0 <= low < high <= 100:
            raise argparse.ArgumentError(
                self, f"{low:g} {high:g} are not two percentiles, the lower one first")
        setattr(namespace, self.dest, [low, high])


def add_reading_flags(add: Callable[..., argparse.Action], coords: str = "--coords") -> None:
    """The flags on what a data set's files leave open.

    add: a parser's add_argument; coords: the first one's name, where that is another's.
    """
    add(coords, choices=list(COORDS),
        help="unit of the data set's boxes, where it leaves it open: fractions or thousandths of "
        "the image's sides, or pixels; without it they are pixels, unless that can't be")
    add("--stretch", type=float, nargs=2, action=StretchFlag, metavar=("LOW", "HIGH"),
        help="percentiles, of each image and band, that become black and white in images of 16 "
        "bits or floats, as in 2 98; without it these are refused")


def flags() -> DataParser:
    parser = DataParser(
        description="Checks a data set: counts beside the published ones, refused and repaired "
        "records by reason, sizes of the boxes, images that splits share, images that can't be "
        "decoded, a contact sheet. Of several: what is trained on in one and scored in another")
    add = parser.add_argument
    add("names", nargs="+", metavar="name",
        help=f"one of {', '.join(READERS)}, or a mixture like dior+vrsbench:0.5")
    add("--root",
        help="its folder; default data/<name>; of a mixture, and of several data sets, the "
        "folder that holds theirs, default data")
    add("--split", nargs="+",
        help="splits to check; default those of train, val, test that there are; of several "
        "data sets of rft, val, test: rft is train less what is held out of it as val")
    add_reading_flags(add)
    add("--places", type=int, default=20, help="places listed for a reason; 0: all")
    add("--show", type=int, default=12,
        help="records of the first split on the contact sheet; several data sets have none")
    add("--out", default="data_check.png", help="where the contact sheet goes")
    return parser


def main() -> None:
    args = flags().parse_args()
    # A name in a data set may hold what no encoding has.
    sys.stdout.reconfigure(errors="backslashreplace")
    try:
        if len(args.names) == 1:
            check_data_set(args)
        else:
            check_shared(args)
    except DataError as error:
        print(f"data.py: {error}", file=sys.stderr)
        sys.exit(2)


def check_data_set(args: argparse.Namespace) -> None:
    """Prints what is in a data set; DataError where an image can't be decoded."""
    loaded = load_splits(args.names[0], args.root, args)
    for a, b in itertools.combinations(loaded, 2):
        shared = {r.image for r in loaded[a]} & {r.image for r in loaded[b]}
        print(f"images in both {a} and {b}: {len(shared):,}")
    hashes, broken = decode_images(itertools.chain.from_iterable(loaded.values()), args.places)
    show_records(loaded, broken, args)
    refuse_broken(hashes, broken)


def check_shared(args: argparse.Namespace) -> None:
    """Prints what is in several data sets, and what they share.

    DataError where an image can't be decoded.
    """
    if len(set(args.names)) < len(args.names):
        raise DataError(f"{' '.join(args.names)}: a data set comes twice; name each once")
    loaded = {}
    for name in args.names:
        is_mixture = "+" in name or ":" in name
        root = args.root if is_mixture else Path(args.root or "data") / name
        # Trained on is what rft gets: train, less what is held out of it as val.
        for split, records in load_splits(name, root, args, ("rft", "val", "test")).items():
            loaded[f"{name} {split}"] = records
    hashes, broken = decode_images(itertools.chain.from_iterable(loaded.values()), args.places)
    print_shared(loaded, hashes)
    refuse_broken(hashes, broken)


def print_shared(loaded: dict[str, Records], hashes: dict[Any, str]) -> None:
    """Prints how much of each split that is scored is in each split that is trained on.

    loaded: by name and split. hashes: of the images' pixels; a drawn scene has none, and is its
    own.
    """
    def image_pixels(record: Record) -> Any:
        return hashes.get(record.image, record.image)

    training = [title for title in loaded if is_training(title.split()[-1])]
    scored = [title for title in loaded if title not in training]
    width = max(len("trained on"), *map(len, loaded)) + 2
    print(
        "What is scored and trained on too. An image by its name, or by all its pixels (a copy "
        "that was compressed\nagain or resized has others); a record by its image and a box of "
        f"IoU {SAME_BOX} or more:")
    print(
        f"{'trained on':{width}}{'scored':{width}}{'images: name':>17}{'pixels':>17}"
        f"{'records: name':>17}{'pixels':>17}")
    for title in training:
        for other in scored:
            by_name = count_shared(loaded[other], loaded[title], image_name)
            by_pixels = count_shared(loaded[other], loaded[title], image_pixels)
            cells = (by_name[0], by_pixels[0], by_name[1], by_pixels[1])
            row = "".join(f"{cell:>17}" for cell in cells)
            print(f"{title:{width}}{other:{width}}{row}")


def count_shared(
        records: Records, training: Records, image_key: Callable[[Record], Any],
) -> tuple[str, str]:
    """How many images, and how many records, are in the training data: "1,202 (31%)" each."""
    shared = find_shared(records, training, image_key)
    images = {r.image for r in records}
    shared_images = {r.image for r, what in zip(records, shared) if what}
    n = shared.count("record")
    return (
        f"{len(shared_images):,} ({len(shared_images) / max(len(images), 1):.0%})",
        f"{n:,} ({n / max(len(records), 1):.0%})")


def load_splits(
        name: str, root: str | Path | None, args: argparse.Namespace,
        splits: Sequence[str] = SPLITS,
) -> dict[str, Records]:
    """Loads and prints the splits that are asked for, or those of `splits` that there are.

    DataError where one that is asked for is not there, or none is.
    """
    loaded: dict[str, Records] = {}
    for split in args.split or splits:
        try:
            loaded[split] = load(name, root, split, args.coords, args.stretch)
        except NoSplit as error:
            last = split == splits[-1] and not loaded
            if args.split or last:
                raise
            print(f"{name} {split}: {error}")
            continue
        print_split(name, split, loaded[split], args.places)
    return loaded


def decode_images(
        records: Iterable[Record], places: int,
) -> tuple[dict[Any, str], dict[Any, str]]:
    """Decodes each image to its end -> hashes of their pixels; what is wrong with the others.

    Prints how many there are. A drawn scene needs no decoding, and is in neither.
    """
    files = {}                    # image -> a record of it
    for record in records:
        if not hasattr(record.image, "draw"):
            files[record.image] = record

    def pixel_hash(record: Record) -> tuple[str | None, str | None]:
        try:
            image = open_image(record)
        except DataError as error:
            return None, str(error)
        pixels = hashlib.sha256(repr(image.size).encode() + image.tobytes())
        return pixels.hexdigest(), None

    with ThreadPoolExecutor(8) as pool:
        results = list(tqdm(
            pool.map(pixel_hash, files.values()), total=len(files), desc="decoding", unit="img",
            leave=False, disable=None))
    hashes = {image: pixels for image, (pixels, _) in zip(files, results) if pixels}
    broken = {image: problem for image, (_, problem) in zip(files, results) if problem}
    if files:
        title = f"images decoded: {len(files):,}, unreadable"
        print_places(title, list(broken.values()), places)
    return hashes, broken


def refuse_broken(hashes: dict[Any, str], broken: dict[Any, str]) -> None:
    """DataError where there is an image that can't be decoded."""
    if broken:
        raise DataError(
            f"{len(broken):,} of {len(hashes) + len(broken):,} images can't be decoded; a run "
            "takes another record in the place of each that it meets, and ends where they are more "
            f"than {MOST_UNREADABLE:.0%} of its records; repair or remove those listed above")


def show_records(
        loaded: dict[str, Records], broken: dict[Any, str], args: argparse.Namespace,
) -> None:
    """Draws records of the first split that has any, evenly spread over it."""
    if args.show <= 0:
        return
    for split, records in loaded.items():
        whole = [r for r in records if r.image not in broken]
        if not whole:
            continue
        shown = whole[::max(1, len(whole) // args.show)][:args.show]
        pictures = [draw_boxes(open_image(r), [(r.box, "red")], r.text) for r in shown]
        save_sheet(pictures, args.out)
        print(f"{len(shown)} records of {split} with their boxes: {args.out}")
        return


def save_sheet(pictures: list[Image.Image], path: str | Path) -> None:
    """Writes images of one width to a picture's file, in rows; DataError where that can't be."""
    try:
        contact_sheet(pictures).save(path)
    except (OSError, ValueError, KeyError) as error:
        # There is no such folder or format, or the format is only read.
        raise DataError(
            f"the contact sheet can't be written to {path} ({error}); name another file with "
            "--out") from None


def print_split(name: str, split: str, records: Records, places: int) -> None:
    """Prints what is in a split. places: to list for a reason, 0 for all."""
    refused = sum(map(len, records.refused.values()))
    repaired = sum(map(len, records.repaired.values()))
    print(
        f"{name} {split}: {len(records):,} records, {refused:,} refused, {repaired:,} repairs, "
        f"{len({r.image for r in records}):,} images, {len({r.category for r in records})} "
        f"categories, hash {records.hash}")
    print_published(len(records) + refused, PUBLISHED.get(name, {}).get(split))
    if records.note:
        print(f"  {records.note}")
    for reason, where in records.refused.items():
        print_places(f"  refused, {reason}", where, places)
    for reason, where in records.repaired.items():
        print_places(f"  repaired, {reason}", where, places)
    if records:
        print_areas(records)


def print_published(expressions: int, published: int | None) -> None:
    """Prints a split's count beside the published one, where there is one."""
    if not published:
        return
    if expressions == published:
        comparison = "as published"
    elif expressions < published:
        comparison = (
            f"{published:,} are published; a subset, {expressions / published:.1%} of it")
    else:
        comparison = (
            f"{published:,} are published; more than published: is this another version?")
    print(f"  expressions found: {expressions:,}, {comparison}")


def print_areas(records: Records) -> None:
    """Prints how large the boxes are, in percent of their images' areas."""
    areas = []
    for r in records:
        x1, y1, x2, y2 = r.box
        areas.append((x2 - x1) * (y2 - y1) / (r.size[0] * r.size[1]))
    percent = np.array(areas) * 100
    shares = (5, 25, 50, 75, 95)
    quantiles = np.percentile(percent, shares)
    words = ", ".join(f"{share}% {value:.3g}" for share, value in zip(shares, quantiles))
    print(
        f"  box area in % of the image, quantiles: {words}; below 1%: "
        f"{(percent < 1).mean():.1%} of the boxes")


def print_places(title: str, where: list[str], most: int) -> None:
    """Prints a title, how many places there are, and the first of them; most: 0 for all."""
    print(f"{title}: {len(where):,}")
    for place in where[:most or None]:
        print(f"    {place}")
    if 0 < most < len(where):
        print(f"    and {len(where) - most:,} more; --places 0 lists all")


if __name__ == "__main__":
    main()
