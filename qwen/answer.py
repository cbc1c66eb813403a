"""The answer format, from the question to a box in original pixels; only this file spells it out.

What the model is asked; a box to text; text to a box, strictly and leniently; why there
is no box; a box into original pixels. A fork with another answer, such as a point,
edits this file, and the reward and the metrics that take its boxes.

Boxes are xyxy floats. A frame is a `processor.Frame`: its methods turn the model's
coordinates into original pixels and back.
"""
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

Box = tuple[float, float, float, float]
THINK = ("<think>", "</think>")
ANSWER = ("<answer>", "</answer>")
TAGS = (*THINK, *ANSWER)


# ---------------------------------------------------------------- what is asked

# In a template, where braces are doubled: str.format fills in the rest.
EXAMPLE = '<answer>{{"bbox_2d": [x1, y1, x2, y2]}}</answer>'
PROMPT = (
    "Locate the object that is described: {text}\n"
    "First reason about positions in the image in <think> </think> tags, then answer with one box "
    f"in <answer> </answer> tags, like {EXAMPLE}")


# ---------------------------------------------------------------- box to text

def format_box(box: Sequence[float], frame: "Frame") -> str:
    """A box in original pixels as the model is taught to write it: "[x1, y1, x2, y2]".

    The numbers are whole, in the model's frame, and the box has an area there. It
    overlaps the box that it stands for, however thin that is.
    """
    x1, y1, x2, y2 = frame.to_model(box)
    right, bottom = frame.extent
    left_edge, right_edge = whole_interval(x1, x2, right)
    top_edge, bottom_edge = whole_interval(y1, y2, bottom)
    return f"[{left_edge}, {top_edge}, {right_edge}, {bottom_edge}]"


def whole_interval(low: float, high: float, most: int) -> tuple[int, int]:
    """The whole numbers nearest to an interval's ends, within 0 and `most` and never the same.

    >>> whole_interval(2.6, 7.2, 1000)
    (3, 7)
    >>> whole_interval(2.55, 2.58, 1000)       # both round to 3, and 3 to 4 would miss it
    (2, 3)
    """
    start = round(low)
    end = round(high)
    if start == end:
        # Thinner than a unit: the unit that holds its centre holds the most of it.
        start = math.floor((low + high) / 2)
    start = min(max(start, 0), most - 1)
    end = min(max(end, start + 1), most)
    return start, end


def write(think: str | None, box_text: str) -> str:
    """A completion from its reasoning and a box as `format_box` writes it.

    think: None for an answer without reasoning.
    """
    reasoning = "" if think is None else f"<think>{think}</think>"
    return f'{reasoning}<answer>{{"bbox_2d": {box_text}}}</answer>'


# ---------------------------------------------------------------- text to box, strictly

def parse_box(text: str) -> Box | None:
    """The box of a completion, in the model's frame, or None.

    Strict: exactly one <answer>, in it one JSON object whose "bbox_2d" is four JSON
    numbers, finite, x2 > x1, y2 > y1. Other keys are ignored, and what stands outside
    the answer.

    Whatever the text, it takes linear time and never raises: rewards are computed on
    what a policy under training writes.
    """
    box, why = read_answer(text)
    return None if why else box


def read_answer(text: str) -> tuple[Box | None, str | None]:
    """-> (box, None), or (None, one of FAILURES).

    A line, a point, or a box that stands on its head is (box, "no area"): VRSBench's
    own metric gives the first two an area.
    """
    opening, closing = ANSWER
    if text.count(opening) > 1 or text.count(closing) > 1:
        return None, "several answers"
    start = text.find(opening)
    end = text.find(closing)
    if start < 0 or end < start:
        return None, "no answer"
    try:
        # Objects become tuples of pairs, so that a key given twice is seen.
        content = json.loads(
            text[start + len(opening):end], object_pairs_hook=tuple, parse_int=float,
            parse_constant=refuse_constant)
    except (ValueError, RecursionError):             # RecursionError: nested a thousand deep
        return None, "not JSON"
    pairs = content if isinstance(content, tuple) else ()
    boxes = [value for key, value in pairs if key == "bbox_2d"]
    if len(boxes) != 1:
        return None, "no bbox_2d"
    return checked(boxes[0])


def refuse_constant(name: str) -> NoReturn:
    """Python's parser lets NaN, Infinity and -Infinity pass, which are not JSON."""
    raise ValueError(f"{name} is not JSON")


def checked(value: Any) -> tuple[Box | None, str | None]:
    """A parsed value -> as `read_answer`.

    A boolean is no number; 1e999 and an integer of 5,000 digits are infinite.
    """
    if not isinstance(value, list) or len(value) != 4:
        return None, "not four numbers"
    if not all(isinstance(x, float) and math.isfinite(x) for x in value):
        return None, "not four numbers"
    x1, y1, x2, y2 = value
    return (x1, y1, x2, y2), None if x2 > x1 and y2 > y1 else "no area"


WHOLE = re.compile(r"\s*<think>.*</think>\s*<answer>.*</answer>\s*", re.DOTALL)


def format_ok(text: str) -> bool:
    """True for exactly one think block, then exactly one answer with a box (`parse_box`).

    Nothing but white space may stand around them.
    """
    # The counts come first: they keep the pattern linear, for then no tag can match in
    # two places.
    once = all(text.count(tag) == 1 for tag in TAGS)
    return once and WHOLE.fullmatch(text) is not None and parse_box(text) is not None


# ---------------------------------------------------------------- text to box, leniently

# Lengths are bounded, so that hostile text takes linear time.
NUMBER = r"\s*(-?[0-9]{1,15}(?:\.[0-9]{1,15})?(?:[eE][+-]?[0-9]{1,3})?)\s*"
POINT = rf"\({NUMBER},{NUMBER}\)"
# A list of four numbers, or two corners; what follows a second corner makes it a polygon.
FOUR_NUMBERS = re.compile(
    rf"\[{NUMBER},{NUMBER},{NUMBER},{NUMBER}\]|{POINT}\s*,\s*{POINT}(?P<polygon>\s*,\s*\()?")


def parse_box_lenient(text: str) -> Box | None:
    """For reports on models that were not trained to our format; the reward never uses it.

    What `parse_box` finds, else the first four numbers behind the last <answer> (without
    one, behind the last </think>; without that, anywhere): fenced or bare JSON,
    [{"bbox_2d": [...], "label": ...}] as Qwen2.5-VL writes it, and Qwen2-VL's
    <|box_start|>(x1,y1),(x2,y2)<|box_end|>, also without its markers, which decoding may
    have dropped. The numbers are in the model's frame. Linear time as well.
    """
    box = parse_box(text)
    if box is not None:
        return box
    tag = ANSWER[0] if ANSWER[0] in text else THINK[1]
    match = FOUR_NUMBERS.search(text, max(text.rfind(tag), 0))
    if match is None or match["polygon"]:
        return None
    box, why = checked([float(x) for x in match.groups() if x is not None])
    return None if why else box


# ---------------------------------------------------------------- failures

FAILURES = (
    "no answer", "several answers", "not JSON", "no bbox_2d", "not four numbers", "no area")


def failure(text: str) -> str | None:
    """None where `parse_box` finds a box, otherwise why it does not: one of FAILURES."""
    return read_answer(text)[1]


# ---------------------------------------------------------------- into original pixels

def clamp_box(box: Sequence[float], size: tuple[float, float]) -> Box | None:
    """A box cut to the image of size (W, H), or None where no area is left.

    In Python floats, so that no overflow comes back as a box: 1e300 is a number here
    and infinite in float32.
    """
    x1, y1, x2, y2 = box
    W, H = size
    x1 = float(min(max(x1, 0), W))
    x2 = float(min(max(x2, 0), W))
    y1 = float(min(max(y1, 0), H))
    y2 = float(min(max(y2, 0), H))
    return (x1, y1, x2, y2) if x2 > x1 and y2 > y1 else None


def locate(box: Sequence[float] | None, frame: "Frame") -> Box | None:
    """A box in the model's frame, or None -> the same in original pixels, clamped.

    None where nothing of it lies in the image.
    """
    return box and clamp_box(frame.to_image(box), frame.original)


# ---------------------------------------------------------------- coordinates

@dataclass(frozen=True)
class Frame:
    """How a model's coordinates relate to an image.

    Qwen2.5-VL answers in pixels of the resized image ("absolute"), Qwen2-VL and Qwen3-VL in
    thousandths of its sides ("1000").
    """

    original: tuple[int, int]     # (width, height)
    resized: tuple[int, int]
    convention: str

    @property
    def extent(self) -> tuple[int, int]:
        """The coordinate of the right and of the lower edge in the model's frame."""
        return self.resized if self.convention == "absolute" else (1000, 1000)

    def to_model(self, box: Sequence[float]) -> Box:
        """Original pixels -> the model's coordinates, float."""
        return tuple(v * self.extent[i % 2] / self.original[i % 2] for i, v in enumerate(box))

    def to_image(self, box: Sequence[float]) -> Box:
        """The model's coordinates -> original pixels, float."""
        return tuple(v * self.original[i % 2] / self.extent[i % 2] for i, v in enumerate(box))


def to_model_frame(box: Sequence[float], frame: Frame) -> Box:
    """`Frame.to_model` as a function: original pixels -> the model's coordinates, float."""
    return frame.to_model(box)


def to_image_frame(box: Sequence[float], frame: Frame) -> Box:
    """`Frame.to_image` as a function: the model's coordinates -> original pixels, float."""
    return frame.to_image(box)
