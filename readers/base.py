"""What every reader shares: records, errors, and text, JSON and JSONL files."""
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen.answer import Box

SPLITS = ("train", "val", "test")
# A limit of the model families: the longer side of an image over its shorter one.
ASPECT = 200
# A run ends if the images of more than this share of its records can't be decoded.
MOST_UNREADABLE = 0.01
# --coords: units per image side; None: a unit is a pixel.
COORDS = {"fraction": 1, "1000": 1000, "original": None}
# (low, high): the percentiles of each band that become black and white.
Stretch = tuple[float, float]
# An object of a JSONL file that goes on for more lines is broken.
LONGEST_OBJECT = 100


class DataError(Exception):
    """Data that is missing or does not fit; one line: what is wrong, where, what to do."""


class UnreadableImage(DataError):
    """An image that can't be decoded."""


class NoSplit(DataError):
    """No split of that name, or not the file that holds it."""


class Refused(Exception):
    """Why one annotation can't be used, in a few words. The Collector counts these."""


@dataclass(frozen=True)
class Record:
    """One expression and its box."""

    id: str                       # unique in its data set
    image: Any                    # path, or for `synth` a toy.scenes.Scene, which draws itself
    text: str                     # the expression, as its author wrote it
    box: Box                      # (x1, y1, x2, y2), float pixels of the original image
    category: str
    size: tuple[int, int]         # (width, height) of the original image
    kind: str = ""                # of expression, if known; for `refgeo` the source data set
    unique: bool | None = None    # VRSBench: is the object the only one of its category?
    # VRSBench: its own box, whole hundredths of the image's sides, for its official metric.
    grid: tuple[int, ...] | None = None
    stretch: Stretch | None = None                 # for images of more than 8 bits a sample

    @property
    def objects(self) -> Sequence[Any]:
        """All objects of a drawn scene; () for a file, since not all of them are annotated."""
        return getattr(self.image, "objects", ())


class Records(list[Record]):
    """The usable records of a split, and what is known of the others.

    refused: reason -> places, one for each unusable record. repaired: the same for usable
    records in which the file is wrong and only one reading is possible. note: other remarks.
    """

    def __init__(
            self, records: Iterable[Record], refused: dict[str, list[str]],
            repaired: dict[str, list[str]] | None = None, note: str = "",
    ) -> None:
        super().__init__(records)
        self.refused = refused
        self.repaired = repaired or {}
        self.note = note

    @property
    def refusals(self) -> dict[str, int]:
        """Reason -> number of records refused for it."""
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
    """The hash of a text. An order by it is random, and the same on every machine."""
    return hashlib.sha256(text.encode("utf-8", "replace")).digest()


def first_existing(root: Path, *names: str) -> Path:
    """The first of these paths in root that exists."""
    for name in names:
        if (root / name).exists():
            return root / name
    archives = ", ".join(sorted(p.name for p in root.glob("*.zip")))
    hint = f" ({archives} is there: unzip it)" if archives else ""
    raise NoSplit(
        f"no {' or '.join(names)} in {root}{hint}; --root must name the folder of the data set "
        "as it was downloaded")


def read_text(file: str | Path, content: bytes | None = None) -> str:
    """A UTF-8 file's text with "\\n" at line ends. content: its bytes, if read already."""
    try:
        content = Path(file).read_bytes() if content is None else content
        text = content.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: unreadable ({error})") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_json(file: Path) -> Any:
    """A JSON file's value; None if there is no such file."""
    if not file.exists():
        return None
    try:
        return json.loads(read_text(file))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: unreadable ({error})") from None


def read_json_lines(
        file: str | Path, content: bytes | None = None,
) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """Yields (line number, object) of a JSONL file; None for what is no JSON object.

    An object may go on over several lines, as some of refGeo's do, until a line begins another.
    """
    text = read_text(file, content)
    if text.lstrip().startswith("["):
        raise DataError(
            f"{file}: a JSON array, but one JSON object a line is needed; jq -c '.[]' makes "
            "lines of it")
    unfinished = ""               # the text so far of an object that began in line `start`
    start = 0
    # str.splitlines() would also cut at U+2028, which JSON allows within a string.
    for number, line in enumerate(text.split("\n"), 1):
        if unfinished and line.startswith("{"):
            yield start, None
            unfinished = ""
        start = start if unfinished else number
        unfinished = f"{unfinished}\n{line}" if unfinished else line.strip()
        try:
            # strict=False: a string may hold a line break.
            value = json.loads(unfinished, strict=False) if unfinished else None
        except (ValueError, RecursionError):
            value = None
        value = value if isinstance(value, dict) else None
        goes_on = unfinished.startswith("{") and number - start < LONGEST_OBJECT
        if unfinished and (value is not None or not goes_on):
            yield start, value
            unfinished = ""
    if unfinished:
        yield start, None
