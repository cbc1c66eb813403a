"""The answer format: the prompt, how a box is written and read, and the frame of its coordinates.

To train on other answers, such as points, edit this file, then the reward and the metrics. They use
boxes as this file returns them, (x1, y1, x2, y2) floats; so do predictions files and the teacher.
"""
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Box = tuple[float, float, float, float]
THINK = ("<think>", "</think>")
ANSWER = ("<answer>", "</answer>")
TAGS = (*THINK, *ANSWER)
EXAMPLE = '<answer>{{"bbox_2d": [x1, y1, x2, y2]}}</answer>'         # for str.format
PROMPT = (
    "Locate the object that is described: {text}\n"
    "First reason about positions in the image in <think> </think> tags, then answer with one box "
    f"in <answer> </answer> tags, like {EXAMPLE}")


@dataclass(frozen=True)
class Frame:
    """A model's coordinates: Qwen2.5-VL answers in pixels of the resized image ("absolute"),
    Qwen2-VL and Qwen3-VL in thousandths of its sides ("1000")."""

    original: tuple[int, int]     # (width, height)
    resized: tuple[int, int]
    convention: str

    @property
    def extent(self) -> tuple[int, int]:
        """(width, height) in the model's coordinates."""
        return self.resized if self.convention == "absolute" else (1000, 1000)

    def to_model(self, box: Sequence[float]) -> Box:
        """Original pixels -> the model's coordinates."""
        return tuple(v * self.extent[i % 2] / self.original[i % 2] for i, v in enumerate(box))

    def to_image(self, box: Sequence[float]) -> Box:
        """The model's coordinates -> original pixels."""
        return tuple(v * self.original[i % 2] / self.extent[i % 2] for i, v in enumerate(box))


def clamp_box(box: Sequence[float], size: tuple[float, float]) -> Box | None:
    """Clips a box to an image of size (W, H); None if no area is left."""
    x1, y1, x2, y2 = (float(min(max(v, 0), size[i % 2])) for i, v in enumerate(box))
    return (x1, y1, x2, y2) if x2 > x1 and y2 > y1 else None


def locate(box: Sequence[float] | None, frame: Frame) -> Box | None:
    """A box in the model's frame -> original pixels, clipped to the image; None if outside."""
    return box and clamp_box(frame.to_image(box), frame.original)


def format_box(box: Sequence[float], frame: Frame) -> str:
    """A box in original pixels -> whole numbers in the model's frame: "[x1, y1, x2, y2]".

    The result overlaps the box even if the box is thinner than a unit. Below, 2.55 and 2.58 both
    round to 3, and an interval from 3 to 4 would miss them:

    >>> format_box((2.6, 2.55, 7.2, 2.58), Frame((800, 800), (800, 800), "absolute"))
    '[3, 2, 7, 3]'
    """
    x1, y1, x2, y2 = frame.to_model(box)
    intervals = []
    for low, high, most in zip((x1, y1), (x2, y2), frame.extent):
        start, end = round(low), round(high)
        if start == end:
            # Take the unit with the centre, which contains most of a thin box.
            start = math.floor((low + high) / 2)
        start = min(max(start, 0), most - 1)
        intervals.append((start, min(max(end, start + 1), most)))
    (left, right), (top, bottom) = intervals
    return f"[{left}, {top}, {right}, {bottom}]"


def write(think: str | None, box_text: str) -> str:
    """-> completion; think None: without reasoning. box_text: from `format_box`."""
    reasoning = "" if think is None else f"<think>{think}</think>"
    return f'{reasoning}<answer>{{"bbox_2d": {box_text}}}</answer>'


FAILURES = ("no answer", "several answers", "not JSON", "several boxes", "no object",
            "not four numbers", "no area")
WHOLE = re.compile(r"\s*<think>(.*)</think>\s*<answer>.*</answer>\s*", re.DOTALL)
CONTENT = re.compile(r"<answer>(?:\s*```(?:json)?(.*)```\s*|(.*))</answer>", re.DOTALL)


def parse_box(text: str) -> Box | None:
    """The box of a completion, in the model's frame; None unless its one <answer> is a JSON object,
    or Qwen2.5-VL's list of one object, in a code fence or not. A key of any name has four finite
    numbers, x2 > x1 and y2 > y1, and the answer has no second list of four. A policy may write
    anything, so this never raises, and takes linear time."""
    box, why = read_answer(text)
    return None if why else box


def failure(text: str) -> str | None:
    """Why `parse_box` finds no box: one of FAILURES, or None if it finds one."""
    return read_answer(text)[1]


def form(text: str) -> str:
    """How an answer that has a box is written: "bare", "fenced", "list" or "fenced list"."""
    fenced, listed = re.search(r"<answer>\s*(```(?:json)?)?\s*(\[)?", text).groups()
    return " ".join(["fenced"] * bool(fenced) + ["list"] * bool(listed)) or "bare"


def format_ok(text: str) -> bool:
    """True for one think block, then one answer with a box, and only white space around them."""
    # Counting first keeps the match linear: each tag fits in one place only.
    once = all(text.count(tag) == 1 for tag in TAGS)
    return once and WHOLE.fullmatch(text) is not None and parse_box(text) is not None


def read_answer(text: str) -> tuple[Box | None, str | None]:
    """-> (box, None) or (None, one of FAILURES); (box, "no area") for a line or a point, because
    VRSBench's own metric counts these."""
    if any(text.count(tag) > 1 for tag in ANSWER):
        return None, "several answers"
    written = CONTENT.search(text)
    if written is None:
        return None, "no answer"
    try:
        # An object becomes a tuple of its values, even those of repeated keys. NaN and Infinity are
        # not JSON, but Python accepts them; int("NaN") raises ValueError.
        content = json.loads(
            written[written.lastindex], parse_int=float, parse_constant=int,
            object_pairs_hook=lambda pairs: tuple(value for _, value in pairs))
    except (ValueError, RecursionError):
        return None, "not JSON"
    values = [content]
    for value in values:                         # appends what is nested, to any depth
        values += value if isinstance(value, (list, tuple)) else ()
    boxes = [value for value in values if checked(value)[0]]
    if len(boxes) > 1:
        return None, "several boxes"
    only = content[0] if isinstance(content, list) and len(content) == 1 else content
    if not isinstance(only, tuple):
        return None, "no object"
    return checked(boxes[0] if boxes and boxes[0] in only else None)


def checked(value: Any) -> tuple[Box | None, str | None]:
    """A JSON value, its numbers as floats -> (box, None), (box, "no area"), or None and why."""
    four = isinstance(value, list) and len(value) == 4
    # 1e999 and an integer of 5,000 digits are infinite.
    if not four or not all(isinstance(x, float) and math.isfinite(x) for x in value):
        return None, "not four numbers"
    x1, y1, x2, y2 = value
    return (x1, y1, x2, y2), None if x2 > x1 and y2 > y1 else "no area"


# At most 15 digits, to keep the search linear.
NUMBER = r"\s*(-?[0-9]{1,15}(?:\.[0-9]{1,15})?(?:[eE][+-]?[0-9]{1,3})?)\s*"
POINT = rf"\({NUMBER},{NUMBER}\)"
LIST = rf"\[{NUMBER},{NUMBER},{NUMBER},{NUMBER}\]"
# A list of four numbers, or two corners. With a third corner it is a polygon. The first three forms
# have a unit of their own, and end with an empty group of its name: VRSBench's {<x1><y1><x2><y2>}
# and GeoChat's {<x1><y1><x2><y2>|<angle>}, InternVL's <box>[[...]]</box>, and Gemini's "box_2d".
FOUR_NUMBERS = re.compile(
    rf"<{NUMBER}>\s*<{NUMBER}>\s*<{NUMBER}>\s*<{NUMBER}>(?!\s*<{NUMBER}>)(?P<hundredths>)"
    rf"|<box>\s*\[\s*{LIST}(?P<thousandths>)|[\"']box_2d[\"']\s*:\s*{LIST}(?P<y_first>)"
    rf"|{LIST}|{POINT}\s*,\s*{POINT}(?P<polygon>\s*,\s*\()?")
UNITS = {"hundredths": 100, "thousandths": 1000, "y_first": 1000}    # per side of the image


def read_lenient(
        text: str, extent: tuple[float, float] | None = None) -> tuple[Box | None, str | None]:
    """As `read_answer`, but without its box, the first four numbers after the last <answer> (or
    </think>) count. It needs no tags, and reads Qwen2-VL's <|box_start|>(x1,y1),(x2,y2)<|box_end|>.
    extent: the frame's, in which boxes with a unit of their own are returned; else as written."""
    box, why = read_answer(text)
    tag = ANSWER[0] if ANSWER[0] in text else THINK[1]
    match = FOUR_NUMBERS.search(text, max(text.rfind(tag), 0))
    unit = match and match.lastgroup
    if match is None or unit == "polygon" or (box and unit not in UNITS):
        return box, why
    values = [float(x) for x in match.groups() if x]
    if unit == "y_first":
        values = [values[i] for i in (1, 0, 3, 2)]
    if unit in UNITS and extent:
        values = [v * extent[i % 2] / UNITS[unit] for i, v in enumerate(values)]
    return checked(values)


def parse_box_lenient(text: str, extent: tuple[float, float] | None = None) -> Box | None:
    """The box of `read_lenient`. Used only in reports, for models not trained on our format."""
    box, why = read_lenient(text, extent)
    return None if why else box
