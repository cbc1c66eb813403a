"""readers.base."""
import contextvars
import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen.answer import Box

# Longer side of an image over its shorter one, at most: the families' own limit.
ASPECT = 200
# Pixels. A box with a thinner side is as good as empty: in the float32 of the rewards, on the
# largest images, it has no area, so that whatever is answered scores 0.
THINNEST = 1 / 16
SPLITS = ("train", "val", "test")
# Share of a run's records whose images can't be decoded, at most.
MOST_UNREADABLE = 0.01
# --coords: what a unit of a box is, and of how many of them the image's sides are (None: a unit
# is a pixel).
COORDS = {"fraction": 1, "1000": 1000, "original": None}
# (low, high): percentiles of each band that become black and white.
Stretch = tuple[float, float]


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


def read_json_lines(
        path: str | Path, content: bytes | None = None) -> Iterator[tuple[int, Any]]:
    """Yields number and JSON value of each line of a JSONL that is not blank.

    content: the file's bytes, where they are read already. DataError where a line is no JSON.
    """
    try:
        content = Path(path).read_bytes() if content is None else content
        # str.splitlines would also cut at U+2028, which JSON allows within a text.
        lines = content.decode("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: unreadable reasoning ({error})") from None
    for number, text in enumerate(lines, 1):
        if not text.strip():
            continue
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            raise DataError(f'{path}, line {number}: not a JSON object with "id" '
                            'and a text "think"') from None
        yield number, value
