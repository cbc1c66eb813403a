"""Predictions: reading a file of them, and the boxes that they contain.

A prediction is a line of a JSONL file, as a dict. If it has a text, this counts, else its box:

    id         of the record
    text       the answer
    frame      a `Frame` as a dict: the coordinates of the text
    box        [x1, y1, x2, y2] in original pixels, or null
    score      mean log-probability of a token of the text
    samples    all texts, if there are several; text is the first
    failure    "unreadable image": the model could not be asked
"""
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwen import answer
from qwen.answer import Box, Frame, locate
from qwen.processor import Processor, frame_by_coords
from readers.base import DataError, Record, in_words, read_json_lines
from readers.collect import refuse_other_unit
from report.metrics import box_tensor

UNREADABLE = "unreadable image"
SAME_CORNER = 1.0                                # pixels by which a line's text and box may differ
Prediction = dict[str, Any]
Predictions = Sequence[Prediction | None]        # of N records; None if a record has none


def read_predictions(path: str | Path, records: Sequence[Record], coords: str | None = None,
                     processor: Processor | None = None) -> dict[str, Prediction]:
    """-> record id -> prediction; each text has its frame. processor: for --coords resized.
    DataError if the file does not fit the records."""
    by_id = {record.id: record for record in records}
    predictions: dict[str, Prediction] = {}
    boxes = []                                   # with the sizes of their images
    for number, value in read_json_lines(path):
        try:
            if value is None or type(value.get("id")) not in (str, int):
                raise ValueError('not a JSON object with an "id" that is a text or whole number')
            key = str(value["id"])
            if key not in by_id:
                refusals = in_words(getattr(records, "refusals", {}))
                advice = f"; it may be one of those refused ({refusals})" if refusals else ""
                raise ValueError(f"no record of this split has the id {key!r}; check --data, "
                                 f"--root and --split{advice}")
            if key in predictions:
                raise ValueError(f"the id {key!r} comes a second time; give each record one line")
            predictions[key] = parse_prediction(value, by_id[key], coords, processor)
        except (ValueError, OverflowError) as error:
            raise DataError(f"{path}, line {number}: {error}") from None
        # A text with its own frame comes with a box in pixels.
        box = None if "frame" in value and "text" in predictions[key] else value.get("box")
        if box and not coords and all(map(math.isfinite, box)):
            boxes.append((box, by_id[key].size))
    refuse_other_unit(boxes, f"{path}: its boxes", "--coords")
    return predictions


def parse_prediction(value: dict[str, Any], record: Record, coords: str | None,
                     processor: Processor | None) -> Prediction:
    """value: a line's JSON object. A ValueError has the mistake in it."""
    text, frame, box = (value.get(key) for key in ("text", "frame", "box"))
    own_frame = isinstance(text, str) and bool(frame)
    if own_frame:
        try:
            sides = (*Frame(**frame).original, *frame["resized"])
            whole = len(sides) == 4 and all(type(v) is int and v > 0 for v in sides)
        except TypeError:
            whole = False
        if not whole or frame["convention"] not in ("absolute", "1000"):
            raise ValueError('"frame" is not {"original": [W, H], "resized": [W, H], '
                             '"convention": "absolute" or "1000"}')
        if tuple(frame["original"]) != tuple(record.size):
            raise ValueError(f"the frame is of an image of {frame['original']}, the record's is "
                             f"{list(record.size)}: it belongs to other data")
    elif coords or box is not None:
        frame = asdict(frame_by_coords(record.size, coords or "original", processor))
    elif isinstance(text, str) and ("box" not in value or answer.parse_box_lenient(text)):
        raise ValueError('a text without a "frame" needs --coords original, resized, 1000, 100 or '
                         "fraction")
    elif "box" not in value:
        raise ValueError('neither a "text" nor a "box"')
    if box is not None:
        # A boolean is an int by isinstance, but no number here.
        numbers = isinstance(box, list) and all(type(x) in (int, float) for x in box)
        if not numbers or len(box) != 4:
            raise ValueError('"box" is neither four numbers nor null')
        box = [float(x) for x in (box if own_frame or not coords else Frame(**frame).to_image(box))]
    if isinstance(text, str) and frame:
        where = Frame(**frame)
        said = locate(answer.parse_box_lenient(text, where.extent), where)
        given = box and answer.clamp_box(box, record.size)
        far = [abs(a - b) > SAME_CORNER for a, b in zip(said or (), given or (math.inf,) * 4)]
        if box and any(far):
            raise ValueError(f'its text says the box {[round(v, 1) for v in said]}, its "box" is '
                             f"{[round(v, 1) for v in box]} (pixels); give one of the two")
        # A given box counts unless `parse_box` reads the same from the text.
        if box is None or (said and said == locate(answer.parse_box(text), where)):
            prediction = {"id": record.id, "text": text, "frame": frame}
            samples = value.get("samples")
            if samples is not None:
                if not isinstance(samples, list) or not all(isinstance(x, str) for x in samples):
                    raise ValueError('"samples" is not a list of texts')
                prediction["samples"] = samples
            return prediction
    prediction = {"id": record.id, "box": box}
    if not box and value.get("failure") == UNREADABLE:
        prediction["failure"] = UNREADABLE
    return prediction


def read_prediction(
        prediction: Prediction | None, record: Record) -> tuple[Box | None, Box | None, str | None]:
    """-> strict box, lenient box, and why there is no strict one: None or one of eval.OUTCOMES.
    Boxes are in original pixels, clamped to the image."""
    if prediction is None:
        return None, None, "no prediction"
    if prediction.get("failure") == UNREADABLE:
        return None, None, UNREADABLE
    if "text" in prediction:
        text, frame = prediction["text"], Frame(**prediction["frame"])
        failure = answer.failure(text)
        box = locate(answer.parse_box(text), frame)
        lenient = locate(answer.parse_box_lenient(text, frame.extent), frame)
    else:
        box = prediction["box"]
        box, failure = answer.checked(box) if box else (None, "no answer")
        box = lenient = None if failure else answer.clamp_box(box, record.size)
    if not box and not failure:
        failure = "outside image"
    return box, lenient, failure


def strict_boxes(records: Sequence[Record], predictions: Predictions) -> Tensor:
    """-> (N, 4), double, NaN for no box."""
    return box_tensor([read_prediction(prediction, record)[0]
                       for prediction, record in zip(predictions, records, strict=True)])


def raw_boxes(predictions: Predictions) -> Tensor:
    """As other people's scripts get them -> (N, 4), double, in original pixels, NaN for no box:
    read leniently, not cut to the image, lines and points as well."""
    boxes = []
    for prediction in predictions:
        if "text" in (prediction or {}):
            frame = Frame(**prediction["frame"])
            box, _ = answer.read_lenient(prediction["text"], frame.extent)
            boxes.append(box and frame.to_image(box))
        else:
            boxes.append(answer.checked((prediction or {}).get("box"))[0])
    return box_tensor(boxes)


def sampled_boxes(records: Sequence[Record], predictions: Predictions) -> Tensor:
    """-> (N, k, 4), double, NaN for no box. k: the most samples of any record."""
    texts = [(prediction or {}).get("samples", ()) for prediction in predictions]
    k = max(map(len, texts))
    groups = []
    for prediction, record, samples in zip(predictions, records, texts):
        one_each = [{**prediction, "text": text} for text in samples]
        one_each += [None] * (k - len(samples))
        groups.append(strict_boxes([record] * k, one_each))
    return torch.stack(groups)
