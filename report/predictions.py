"""report.predictions."""
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor

from qwen import answer
from qwen.answer import Frame, locate
from qwen.processor import Processor, frame_by_coords
from readers import base, collect
from readers.base import DataError, Record
from report import metrics

Box = Sequence[float]
UNREADABLE = "unreadable image"
Box = tuple[float, float, float, float]


# ---------------------------------------------------------------- a model's answers

class Prediction(TypedDict, total=False):
    """An answer to one record: a line of a predictions file.

    It has a text, a box, or both: then the box is what the text says."""

    id: str                       # the record's
    text: str
    box: Sequence[float] | None   # original pixels
    frame: dict[str, Any]         # `Frame` as a dict: whose coordinates the text speaks in
    failure: str                  # UNREADABLE: there was nothing to ask about
    samples: Sequence[str]        # where there are several: all texts, `text` is the first


@dataclass(frozen=True)
class Sampling:
    """How a model is asked."""

    temperature: float = 0.0      # 0 is greedy
    samples: int = 1              # answers to each record
    max_new_tokens: int = 256     # of an answer, reasoning included
    batch: int = 32               # records answered at once
    seed: int = 0
    blind: bool = False           # show another record's image


GREEDY = Sampling()
Predictions = Sequence[Prediction | None]             # of N records; None: there is none


def unreadable_prediction(record: Record) -> Prediction:
    """What stands for an answer to a record whose image can't be decoded."""
    return {"id": record.id, "box": None, "failure": UNREADABLE}


# ---------------------------------------------------------------- anyone's answers

def read_predictions(
        path: str | Path, records: Sequence[Record], coords: str | None = None,
        processor: Processor | None = None,
) -> dict[str, Prediction]:
    """A predictions file -> record id -> prediction, every text with its frame.

    coords: --coords; processor: for "resized". A file that does not fit these records, or
    whose boxes can't be in pixels without --coords, is a DataError."""
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: unreadable predictions ({error})") from None
    by_id = {record.id: record for record in records}
    # A plain list of records has none.
    refusals = getattr(records, "refusals", {})
    predictions: dict[str, Prediction] = {}
    boxes = []                    # those that stand in the file, with their images' sizes
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
            record = record_of(value, by_id, refusals)
            if record.id in predictions:
                raise ValueError(f"the id {record.id!r} comes a second time; one line a record")
            prediction = parse_prediction(value, record, coords, processor)
            predictions[record.id] = prediction
            if "text" not in prediction and prediction["box"] and not coords:
                boxes.append((prediction["box"], record.size))
        except (ValueError, OverflowError, RecursionError) as error:
            raise DataError(f"{path}, line {number}: {error}") from None
    finite = [(box, size) for box, size in boxes if all(map(math.isfinite, box))]
    collect.refuse_other_unit(finite, f"{path}: its boxes")
    return predictions


def record_of(
        value: Any, by_id: Mapping[str, Record], refusals: Mapping[str, int],
) -> Record:
    """A line's JSON value -> the record that its id names, else a ValueError.

    refusals: reason -> how many records of the split are refused for it."""
    if not isinstance(value, dict) or type(value.get("id")) not in (str, int):
        raise ValueError('not a JSON object with an "id" that is a text or a whole number')
    identity = str(value["id"])
    if identity not in by_id:
        advice = "check --data, --root and --split"
        if refusals:
            advice += f"; it may be one of those refused ({base.in_words(refusals)})"
        raise ValueError(f"no record of this split has the id {identity!r}; {advice}")
    return by_id[identity]


def parse_prediction(
        value: dict[str, Any], record: Record, coords: str | None,
        processor: Processor | None,
) -> Prediction:
    """A line's JSON object -> the record's prediction.

    What is wrong with it is a ValueError."""
    has_text = isinstance(value.get("text"), str)
    if has_text and (value.get("frame") or coords):
        frame = value.get("frame") or asdict(frame_by_coords(record.size, coords, processor))
        samples = value.get("samples")
        if samples is not None and not is_texts(samples):
            raise ValueError('"samples" is not a list of texts')
        check_frame(frame, record)
        prediction: Prediction = {"id": record.id, "text": value["text"], "frame": frame}
        if samples:
            prediction["samples"] = samples
        return prediction
    if "box" not in value and has_text:
        raise ValueError(
            'a text without a "frame" needs --coords original, resized, 1000 or fraction')
    if "box" not in value:
        raise ValueError('neither a "text" nor a "box"')
    box = value["box"]
    if box is not None and not is_four_numbers(box):
        raise ValueError('"box" is neither four numbers nor null')
    if box and coords:
        box = frame_by_coords(record.size, coords, processor).to_image(box)
    if not box and value.get("failure") == UNREADABLE:
        return unreadable_prediction(record)
    return {"id": record.id, "box": box and [float(x) for x in box]}


def is_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(x, str) for x in value)


def is_four_numbers(value: Any) -> bool:
    """A boolean is no number."""
    if not isinstance(value, list) or len(value) != 4:
        return False
    return all(type(x) in (int, float) for x in value)


def is_size(value: Any) -> bool:
    """[width, height], whole numbers above 0."""
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        return False
    return all(type(x) is int and 0 < x < 10 ** 6 for x in value)


def check_frame(frame: Any, record: Record) -> None:
    """A ValueError where this is no frame as `asdict` has it, or another image's."""
    well_formed = (
        isinstance(frame, dict) and frame.keys() == {"original", "resized", "convention"}
        and is_size(frame["original"]) and is_size(frame["resized"])
        and frame["convention"] in ("absolute", "1000"))
    if not well_formed:
        raise ValueError('"frame" is not {"original": [W, H], "resized": [W, H], '
                         '"convention": "absolute" or "1000"}')
    if tuple(frame["original"]) != tuple(record.size):
        raise ValueError(f"the frame is of an image of {frame['original']}, the record's is "
                         f"{list(record.size)}: it belongs to other data")


# ---------------------------------------------------------------- scores

class Reading(NamedTuple):
    """What a prediction says. Boxes are in original pixels, clamped."""

    box: Box | None               # read strictly: what all scores but "lenient" are of
    lenient: Box | None
    failure: str | None           # why there is no strict box, one of OUTCOMES


def read_prediction(prediction: Prediction | None, record: Record) -> Reading:
    """None is a record that has no prediction."""
    if prediction is None:
        return Reading(None, None, "no prediction")
    if prediction.get("failure") == UNREADABLE:
        return Reading(None, None, UNREADABLE)
    if "text" in prediction:
        text = prediction["text"]
        frame = frame_of(prediction)
        box = locate(answer.parse_box(text), frame)
        lenient = locate(answer.parse_box_lenient(text), frame)
        failure = answer.failure(text)
    else:
        box, failure = read_box(prediction["box"], record)
        lenient = box
    if not box and not failure:
        failure = "outside image"
    return Reading(box, lenient, failure)


def frame_of(prediction: Prediction) -> Frame:
    """The frame of a prediction's text."""
    frame = prediction["frame"]
    return Frame(tuple(frame["original"]), tuple(frame["resized"]), frame["convention"])


def read_box(
        box: Sequence[float] | None, record: Record,
) -> tuple[Box | None, str | None]:
    """Anyone's box in original pixels -> clamped, or None and why there is none."""
    if not box:
        return None, "no answer"
    checked, failure = answer.checked(box)
    if failure:
        return None, failure
    return answer.clamp_box(checked, record.size), None


def vrsbench_box(prediction: Prediction | None, record: Record) -> Box | None:
    """The box as VRSBench's own metric takes it.

    A line or a point within the image counts too, which is no box elsewhere: VRSBench's
    grid gives it an area."""
    reading = read_prediction(prediction, record)
    if reading.failure != "no area":
        return reading.box
    if "text" in prediction:
        flat, _ = answer.read_answer(prediction["text"])
        flat = frame_of(prediction).to_image(flat)
    else:
        flat, _ = answer.checked(prediction["box"])
    x1, y1, x2, y2 = flat
    width, height = record.size
    return flat if 0 <= x1 <= x2 <= width and 0 <= y1 <= y2 <= height else None


def strict_boxes(records: Sequence[Record], predictions: Predictions) -> Tensor:
    """N records -> predicted boxes (N, 4), double, NaN where there is none."""
    pairs = zip(predictions, records, strict=True)
    return metrics.tensor([read_prediction(p, record).box for p, record in pairs])


def strict_iou(records: Sequence[Record], predictions: Predictions) -> Tensor:
    """N records -> IoU (N,) of the predicted boxes, double."""
    target, size = metrics.targets(records)
    return metrics.overlaps(strict_boxes(records, predictions), target, size).iou


def sampled_boxes(records: Sequence[Record], predictions: Predictions) -> Tensor:
    """N records and predictions that carry several samples -> boxes (N, k, 4), double.

    k: the most samples that a record has. NaN where there is no box, or no sample."""
    sample_lists = [(p or {}).get("samples", ()) for p in predictions]
    k = max(len(samples) for samples in sample_lists)
    groups = []
    for prediction, record, samples in zip(predictions, records, sample_lists):
        boxes: list[Box | None] = [None] * k
        for j, text in enumerate(samples):
            boxes[j] = read_prediction({**prediction, "text": text}, record).box
        groups.append(metrics.tensor(boxes))
    return torch.stack(groups)
