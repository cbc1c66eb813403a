"""From an annotation to a record, or to a counted reason why there is none."""
import contextvars
import math
import os
import re
import unicodedata
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from qwen.answer import Box
from readers import images
from readers.base import ASPECT, COORDS, DataError, Record, Records, Refused, packed

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp", ".gif")
# How names begin that zips, notebooks, editors, Synology's and QNAP's servers leave in a folder.
HIDDEN = (".", "__MACOSX", "@eaDir", "@tmp", "@Recycle", "@__thumb", "#recycle", "#snapshot",
          "$RECYCLE.BIN")
BLANK = "\u115f\u1160\u2800\u3164\uffa0"            # although letters or symbols by Unicode
THINNEST = 1 / 16                 # pixels; a thinner box has no area in the rewards' float32
Size = tuple[int, int]
# The (coords, stretch) that `load` got, so that readers need not pass it on.
reading = contextvars.ContextVar("reading", default=(None, None))


class Collector:
    """Turns annotations into `records`. Counts what it repairs and what it refuses.
    Images are found by base name in all of `folder`; if several match, the end of the annotation's
    path decides, then a folder called `preferred_folder`. exact: image paths start in `folder`.
    refuse_swapped: refuses x1 > x2, which may mean x, y, width, height; else it is repaired.
    kept: records of earlier Collectors, to which this one adds its own."""

    def __init__(self, folder: Path, preferred_folder: str = "", exact: bool = False,
                 refuse_swapped: bool = False, kept: Records | None = None) -> None:
        self.folder, self.preferred_folder = folder, preferred_folder
        self.exact, self.refuse_swapped = exact, refuse_swapped
        self.kept = Records([], {}) if kept is None else kept
        self.coords, self.stretch = reading.get()
        self.ids: dict[str, int] = {}                # id -> number of its latest repetition
        self.sizes: dict[Path, Size] = {}            # to read an image of several records once
        # File -> its boxes as written, with the sizes of their images.
        self.boxes: dict[Path, list[tuple[list[float], Size | None]]] = {}
        self.paths: dict[str, list[Path]] = {}       # stem -> images of that name
        walked = set()
        # Links are followed, because hub caches consist of links; each folder is walked once.
        for directory, subfolders, files in [] if exact else os.walk(folder, followlinks=True):
            real = os.path.realpath(directory)
            if real in walked:
                subfolders.clear()
                continue
            walked.add(real)
            subfolders[:] = [name for name in subfolders if not name.startswith(HIDDEN)]
            for name in files:
                stem, suffix = os.path.splitext(name)
                if suffix.lower() in IMAGE_SUFFIXES and not name.startswith(HIDDEN):
                    self.paths.setdefault(stem, []).append(Path(directory, name))

    def add(self, where: str, identity: str, image: Any, text: Any, box: Any, category: Any = "",
            *, units: int | None = None, size: Any = None, repairs: Sequence[str] = (),
            file: Path | None = None, kind: str = "", unique: bool | None = None,
            grid: tuple[int, ...] | None = None) -> None:
        """One annotation, unvalidated -> a record, or a refusal.
        where: its place, for messages. image: a name or path. box: four numbers, or a text or
        list with one [...] of four. units: of the box, per side; None: pixels, or --data-coords.
        size: the image's, if the annotation says it. An identity a that is repeated becomes a-2.
        file: all boxes from it have the same unit."""
        units = COORDS[self.coords] if self.coords else units
        # JSON may hold lone surrogates, which no file can be written with.
        identity, expression, category = (
            str(value or "").encode("utf-8", "replace").decode()
            for value in (identity, text if isinstance(text, str) else "", category))
        name = identity
        while identity in self.ids:
            self.ids[name] += 1
            identity = f"{name}-{self.ids[name]}"
        self.ids[identity] = 1
        image_size, sides = None, numbers(size)
        annotated = (*sides,) if len(sides) == 2 and min(sides) > 0 else None
        try:
            path, image_size, renamed = self.find(str(image or ""))
            # The boxes of a copy that was made smaller are usually still those of the original.
            if annotated not in (None, image_size):
                raise Refused("image of another size than its annotation says")
            fitted, mended, uncut = repair_box(box, image_size, units)
            if self.refuse_swapped and "swapped corners" in mended:
                raise Refused("x1 > x2 or y1 > y2 (is it x, y, width, height?)")
            if isinstance(text, list):
                raise Refused("list of texts in place of one")
            # Letters, numbers, punctuation and symbols are visible.
            if all(unicodedata.category(c)[0] not in "LNPS" or c in BLANK for c in expression):
                raise Refused("empty text")
            for repair in (*repairs, *renamed, *mended):
                self.kept.repaired.setdefault(repair, []).append(where)
            self.kept.append(Record(
                identity, path, expression.strip(), fitted, category.strip(), image_size, kind,
                unique, grid, uncut if uncut != fitted else None, self.stretch))
        except Refused as reason:
            self.refuse(str(reason), where)
        values = numbers(box, bracketed=True)
        if len(values) == 4 and not units and not self.coords:
            self.boxes.setdefault(file or self.folder, []).append((values, annotated or image_size))

    def refuse(self, reason: str, where: str) -> None:
        self.kept.refused.setdefault(reason, []).append(where)

    def find(self, name: str) -> tuple[Path, Size, list[str]]:
        """A name in an annotation -> its file, (width, height) as stored, repairs."""
        if not name:
            raise Refused("no image named")
        # Absolute paths, and paths through a link to the folder, may be within it too.
        for start in (os.path.abspath(self.folder), os.path.realpath(self.folder)):
            relative = os.path.relpath(os.path.join(start, name.replace("\\", "/")), start)
            if relative.split(os.sep)[0] != os.pardir:
                break
        else:
            raise Refused("image outside the data set")
        base = os.path.basename(relative)
        stem, suffix = os.path.splitext(base)
        if suffix.lower() not in IMAGE_SUFFIXES:
            stem, suffix = base, ""                  # "P0.v2" keeps its dot
        paths = [self.folder / relative] if self.exact else self.paths.get(stem, [])
        # Each rule applies only if at least one image remains.
        paths = [p for p in paths if p.name == base] or paths
        paths = [p for p in paths if p.as_posix().endswith(f"/{relative}")] or paths
        preferred = self.preferred_folder
        paths = [p for p in paths if preferred in p.relative_to(self.folder).parts] or paths
        if len(paths) != 1:
            raise Refused("several images of that name" if paths else self.missing)
        [path] = paths
        if path not in self.sizes:
            try:
                with images.opened(path) as (_, _, size, deep):
                    pass
            except (OSError, images.ImageError) as error:
                absent = isinstance(error, FileNotFoundError)
                raise Refused(self.missing if absent else "unreadable image") from None
            if deep and self.stretch is None:
                raise Refused(images.DEEP)
            if max(size) > ASPECT * min(size):
                raise Refused(f"image more than {ASPECT} times as long as wide")
            self.sizes[path] = size
        other_suffix = [f"image called *{suffix} is *{path.suffix}"] if path.name != base else []
        return path, self.sizes[path], other_suffix

    @cached_property
    def missing(self) -> str:
        archives = packed(self.folder)
        return f"missing image (is {archives} unpacked?)" if archives else "missing image"

    @property
    def records(self) -> Records:
        for file, boxes in self.boxes.items():
            refuse_other_unit(boxes, f"{file}: its boxes")
        return self.kept


def refuse_other_unit(boxes: Sequence[tuple[Sequence[float], Size | None]], subject: str,
                      flag: str = "--data-coords") -> None:
    """DataError, which names the flag, if these (box, size of its image) can't be in pixels."""
    values = np.array([box for box, _ in boxes]).reshape(-1, 4)
    sides = np.array([size or (np.inf, np.inf) for _, size in boxes]).reshape(-1, 2)
    low, high = values[:, :2], values[:, 2:]
    # A box without area proves nothing: zeros may stand for no box.
    solid = (low != high).all(1).any()
    rounding = 1e-3
    if not solid or values.min() < -rounding or values.max() > 1000 + rounding:
        return
    if values.max() <= 1 + rounding:
        unit, sign = "fraction", "all lie in [0, 1]"
        in_pixels = np.isin(values, (0, 1)).all()            # they may be a pixel in the corner
    else:
        known = np.isfinite(sides).all(1)
        n = max(known.sum(), 1)
        outside = (np.minimum(low, high) >= sides).any(1).sum() / n
        far = (np.maximum(low, high) > 1.5 * sides).any(1).sum() / n
        # If fewer boxes are outside, or half a side past an edge, they are single mistakes.
        in_pixels = outside < 0.01 and (n == 1 or far < 0.5)
        # How much likelier hundredths make it than pixels that no number is above 100, if boxes
        # may lie anywhere: 100 / side for each side of each box. Copies of a box tell nothing new.
        boxes_and_sides = np.unique(np.hstack((values, sides))[known], axis=0)
        pixels_likely = np.minimum(100 / boxes_and_sides[:, 4:], 1).prod() > 1e-3
        unit, sign = "1000", "all lie in 0..1000, and some outside their images"
        if values.max() <= 100 + rounding:
            in_pixels = in_pixels and pixels_likely
            unit, sign = "100", "all lie in 0..100, less than their images have pixels"
    if in_pixels:
        return
    raise DataError(
        f"{subject} {sign}: are they fractions, hundredths or thousandths of the image's sides? "
        f"Give {flag} {unit}, or {flag} original if they are pixels")


def repair_box(values: Any, size: Size, units: int | None = None) -> tuple[Box, list[str], Box]:
    """Four numbers -> a box within the image, the repairs, the box before it was cut to the image.
    units: as in `add`."""
    box = numbers(values, bracketed=True)
    if len(box) != 4:
        raise Refused("no box")
    if units:
        box = [v * size[i % 2] / units for i, v in enumerate(box)]
    x1, y1, x2, y2 = box
    ordered = (min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2))
    clamped = tuple(min(max(v, 0.0), float(size[i % 2])) for i, v in enumerate(ordered))
    if min(clamped[2] - clamped[0], clamped[3] - clamped[1]) < THINNEST:
        raise Refused("empty box" if clamped == ordered else "box outside the image")
    found = {
        "decimal comma": isinstance(values, list) and any("," in str(v) for v in values),
        "swapped corners": ordered != tuple(box),
        "box past the edge": clamped != ordered}
    return clamped, [repair for repair in found if found[repair]], ordered


def numbers(value: Any, bracketed: bool = False) -> list[float]:
    """The finite numbers of a text, or of a list that holds nothing else. "1,5" in a list is 1.5.
    bracketed: of a text or nested list, only those in the innermost [...], if there is one."""
    if isinstance(value, (list, tuple)) and not any(isinstance(v, list) for v in value):
        try:
            # Through text, since float(10**400) raises and float(True) is 1.
            floats = [float(str(v).replace(",", ".")) for v in value]
        except ValueError:
            return []
        return floats if all(map(math.isfinite, floats)) else []
    text = str(value)
    if bracketed:
        brackets = re.findall(r"\[[^\[\]]*\]", text)
        text = brackets[0] if len(brackets) == 1 else ""
    words = re.findall(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?", text)
    return [float(word) for word in words if math.isfinite(float(word))]


def visible_files(folder: Path, pattern: str) -> list[Path]:
    """Without hidden files; sorted by path."""
    files = []
    for path in sorted(folder.glob(pattern), key=lambda p: p.as_posix()):
        if not any(part.startswith(HIDDEN) for part in path.relative_to(folder).parts):
            files.append(path)
    return files
