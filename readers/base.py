"""What every reader needs: records, errors, and text, JSON and JSONL files.

A reader is a function (root, split) -> Records, named in data.READERS; rsvg_hr.py is the shortest.
It passes each annotation unchanged to a Collector, and raises NoSplit if the split is missing."""
import glob
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen.answer import Box

SPLITS = ("train", "val", "test")
ASPECT = 200                      # largest ratio of sides that the model families accept
MOST_UNREADABLE = 0.01            # share of records with undecodable images that ends a run
# --data-coords: units per image side; None: a unit is a pixel.
COORDS = {"fraction": 1, "100": 100, "1000": 1000, "original": None}
# How names of archives end: .zip, .tar.gz, .zip.001, .part1.rar.
ARCHIVE = re.compile(r"(?<=.)\.(zip|rar|7z|tar|tgz|tbz2?|txz|tzst)(\.\w+)*$", re.IGNORECASE)
LONGEST_OBJECT = 100              # lines; if an object of a JSONL file is longer, it is broken
Stretch = tuple[float, float]     # percentiles of each band that become black and white


class DataError(Exception):
    """One line: what is wrong, where, what to do."""


class UnreadableImage(DataError):
    pass


class NoSplit(DataError):
    """The data set has no such split, or its file is missing."""


class Refused(Exception):
    """Why one annotation can't be used, in a few words for the Collector to count."""


@dataclass(frozen=True)
class Record:
    id: str                       # unique in its data set
    image: Any                    # path; in `synth` a toy.scenes.Scene, to be drawn
    text: str                     # the expression, as its author wrote it
    box: Box                      # (x1, y1, x2, y2), float pixels of the original image
    category: str
    size: tuple[int, int]         # (width, height) of the original image
    kind: str = ""                # of expression, if known; for `refgeo` the source data set
    unique: bool | None = None    # VRSBench: is the object the only one of its category?
    grid: tuple[int, ...] | None = None            # VRSBench: the box in whole hundredths
    uncut: Box | None = None      # the box before it was cut to the image, if it was
    stretch: Stretch | None = None                 # for images of more than 8 bits per sample

    @property
    def objects(self) -> Sequence[Any]:
        """A drawn scene's objects; () for a file, since not all of its objects are annotated."""
        return getattr(self.image, "objects", ())


class Records(list[Record]):
    """A split's usable records. refused: reason -> places of records that can't be used. repaired:
    repair -> places of records with a mistake that has only one correction."""

    def __init__(self, records: Iterable[Record], refused: dict[str, list[str]],
                 repaired: dict[str, list[str]] | None = None, note: str = "") -> None:
        super().__init__(records)
        self.refused, self.repaired, self.note = refused, repaired or {}, note

    @property
    def refusals(self) -> dict[str, int]:
        return {reason: len(places) for reason, places in self.refused.items()}

    @property
    def hash(self) -> str:
        """16 hex characters that change with any id, text, box, category or size."""
        lines = (json.dumps([r.id, r.text, r.box, r.category, r.size]) for r in self)
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def in_words(counts: dict[str, int]) -> str:
    """{"missing image": 3, "empty box": 1} -> "missing image: 3, empty box: 1"."""
    return ", ".join(f"{reason}: {n:,}" for reason, n in counts.items())


def sha256(text: str) -> bytes:
    """A sort key for an order that is random, but the same on every machine."""
    return hashlib.sha256(text.encode("utf-8", "replace")).digest()


def first_existing(root: Path, *names: str) -> Path:
    for name in names:
        if (root / name).exists():
            return root / name
    archives = packed(root)
    hint = f" ({archives} is there: untar or unzip it)" if archives else ""
    raise NoSplit(f"no {' or '.join(names)} in {root}{hint}; --root must name the folder of the "
                  "data set as it was downloaded")


def packed(folder: Path) -> str:
    """Archives in a folder, in its subfolders or next to it, which are not unpacked in place."""
    found = [*folder.glob("*"), *folder.glob("*/*")]
    for path in (folder, folder.parent):
        found += path.parent.glob(f"{glob.escape(path.name)}.*") if path.name else ()
    names = set()
    for path in found:
        unpacked = path.with_name(ARCHIVE.sub("", path.name))
        if unpacked != path and not any(unpacked.glob("[!.]*")):
            names.add(path.name)
    return ", ".join(sorted(names)[:3])


def read_text(file: str | Path) -> str:
    try:
        return Path(file).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: unreadable ({error})") from None


def read_json(file: Path) -> Any:
    """None if there is no such file."""
    try:
        return json.loads(read_text(file)) if file.exists() else None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: unreadable ({error})") from None


def read_log(file: Path) -> list[dict[str, Any]]:
    """The JSON objects of a run's log, a line each; none if there is no file."""
    text = file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""
    values = []
    for line in text.split("\n"):
        with suppress(ValueError):       # the last line is incomplete while a run is writing it
            values.append(json.loads(line))
    return [value for value in values if isinstance(value, dict)]


def read_json_lines(file: str | Path) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """Yields (line number, object), or (line number, None) if there is no JSON object. It may
    span several lines, as some of refGeo's do, until a line begins another object."""
    text = read_text(file)
    if text.lstrip().startswith("["):
        raise DataError(f"{file}: a JSON array, but one JSON object per line is needed; "
                        "jq -c '.[]' makes lines of it")
    unfinished, start = "", 0     # text of an object so far, number of its first line
    # str.splitlines() would also cut at U+2028, which JSON allows within a string.
    for number, line in enumerate(text.split("\n"), 1):
        if unfinished and line.startswith("{"):
            yield start, None
            unfinished = ""
        start = start if unfinished else number
        unfinished = f"{unfinished}\n{line}" if unfinished else line.strip()
        if not unfinished:
            continue
        value = None
        with suppress(ValueError, RecursionError):
            value = json.loads(unfinished, strict=False)     # a string may hold a line break
        is_object = isinstance(value, dict)
        if is_object or not unfinished.startswith("{") or number - start >= LONGEST_OBJECT:
            yield start, value if is_object else None
            unfinished = ""
    if unfinished:
        yield start, None
