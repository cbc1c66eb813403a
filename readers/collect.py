"""readers.collect."""
import itertools
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen.answer import Box
from readers import images
from readers.base import (
    ASPECT,
    COORDS,
    THINNEST,
    DataError,
    NoSplit,
    Record,
    Records,
    fingerprint,
    in_words,
    reading,
)
from readers.images import ImageError, Stretch

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp", ".gif")
DEEP = images.DEEP


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
