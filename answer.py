"""The answer format: what the model is asked, a box to text, text to box or why there is none, into original pixels.

Boxes are xyxy floats. A frame is a `processor.Frame`: its methods turn the model's coordinates into original pixels and back.
"""
import json
import math
import re

PROMPT = ('Locate the object that is described: {text}\nFirst reason about positions in the image in <think> </think> tags, then answer '
          'with one box in <answer> </answer> tags, like <answer>{{"bbox_2d": [x1, y1, x2, y2]}}</answer>')
ANSWER = ("<answer>", "</answer>")
FAILURES = ("no answer", "several answers", "not JSON", "no bbox_2d", "not four numbers", "no area")
WHOLE = re.compile(r"\s*<think>.*</think>\s*<answer>.*</answer>\s*", re.DOTALL)
NUMBER = r"\s*(-?[0-9]{1,15}(?:\.[0-9]{1,15})?(?:[eE][+-]?[0-9]{1,3})?)\s*"
FOUR_NUMBERS = re.compile(rf"\[{NUMBER},{NUMBER},{NUMBER},{NUMBER}\]")


# --------------------------------------------------------------------------------------------------------------------- box to text

def format_box(box, frame):
    """A box in original pixels as the model is taught to write it: "[x1, y1, x2, y2]", whole numbers in its frame, never without area."""
    x1, y1, x2, y2 = (round(v) for v in frame.to_model(box))
    right, low = frame.extent
    x1, y1 = min(max(x1, 0), right - 1), min(max(y1, 0), low - 1)
    return f"[{x1}, {y1}, {min(max(x2, x1 + 1), right)}, {min(max(y2, y1 + 1), low)}]"


# --------------------------------------------------------------------------------------------------------------------- text to box

def parse_box(text):
    """The box of a completion, (x1, y1, x2, y2) floats in the model's frame, or None. Strict: exactly one <answer>, in it one JSON object
    whose "bbox_2d" is four JSON numbers, finite, x2 > x1, y2 > y1. Other keys are ignored, and what stands outside the answer.

    Whatever the text, it takes linear time and never raises: rewards are computed on what a policy under training writes."""
    box, why = read_answer(text)
    return None if why else box


def failure(text):
    """None where `parse_box` finds a box, otherwise why it does not: one of FAILURES."""
    return read_answer(text)[1]


def read_answer(text):
    """-> (box, None) or (None, one of FAILURES), but (box, "no area") for one that is a line or a point, or stands on its head"""
    opened, closed = (text.count(tag) for tag in ANSWER)
    start, end = text.find(ANSWER[0]), text.find(ANSWER[1])
    if opened > 1 or closed > 1:
        return None, "several answers"
    if not opened or not closed or end < start:
        return None, "no answer"
    try:                                                  # objects become tuples of pairs, so that a key given twice is seen
        answer = json.loads(text[start + len(ANSWER[0]):end], object_pairs_hook=tuple, parse_int=float, parse_constant=refuse)
    except (ValueError, RecursionError):                  # RecursionError: nested a thousand deep
        return None, "not JSON"
    boxes = [value for key, value in answer if key == "bbox_2d"] if isinstance(answer, tuple) else []
    if len(boxes) != 1:
        return None, "no bbox_2d"
    return checked(boxes[0])


def refuse(name):
    raise ValueError(f"{name} is not JSON")               # NaN, Infinity, -Infinity: Python's parser lets them pass


def checked(box):
    """A parsed value -> as `read_answer`. A boolean is no number; 1e999 and a 5,000-digit integer are infinite."""
    if not isinstance(box, list) or len(box) != 4 or not all(isinstance(x, float) and math.isfinite(x) for x in box):
        return None, "not four numbers"
    x1, y1, x2, y2 = box
    return (x1, y1, x2, y2), None if x2 > x1 and y2 > y1 else "no area"


def parse_box_lenient(text):
    """For reports on models that were not trained to our format; the reward never uses it. What `parse_box` finds, else the first list of
    four numbers behind the last <answer> (without one, behind the last </think>; without that, anywhere): fenced or bare JSON, and
    [{"bbox_2d": [...], "label": ...}] as Qwen writes it. Linear-time as well."""
    box = parse_box(text)
    if box is None:
        behind = ANSWER[0] if ANSWER[0] in text else "</think>"
        found = FOUR_NUMBERS.search(text, max(text.rfind(behind), 0))
        box, why = checked([float(x) for x in found.groups()]) if found else (None, None)
        box = None if why else box
    return box


def format_ok(text):
    """True for exactly one think block, then exactly one answer with a box (`parse_box`), and nothing but white space around them."""
    once = all(text.count(tag) == 1 for tag in ("<think>", "</think>", *ANSWER))
    return once and WHOLE.fullmatch(text) is not None and parse_box(text) is not None


def clamp_box(box, size):
    """Box (4 floats) cut to the image of size (W, H), or None where no area is left. In Python floats, so that no overflow comes back as a
    box: 1e300 is a number here and infinite in float32."""
    (x1, y1, x2, y2), (W, H) = box, size
    x1, x2 = (float(min(max(x, 0), W)) for x in (x1, x2))
    y1, y2 = (float(min(max(y, 0), H)) for y in (y1, y2))
    return (x1, y1, x2, y2) if x2 > x1 and y2 > y1 else None


def locate(box, frame):
    """A box in the model's frame, or None -> the same in original pixels, clamped, or None where nothing of it lies in the image."""
    return box and clamp_box(frame.to_image(box), frame.original)
