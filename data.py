"""Records and images: the readers of the embedded and the public data sets.

One sample's way: `load` reads the annotations -> `open_image`; what follows is processor.py's.
Boxes are xyxy, float pixels of the original image.

    python data.py dior           counts beside the published ones, refused and repaired records,
                                  images that don't decode, a contact sheet
    python data.py dior rrsisd    what is trained on in one and scored in the other

A new data set is one function in READERS: (root, split) -> Records, or NoSplit. It knows the
splits that its files have; `read_split` makes "sft", "rft" and, where there is none, "val" of its
"train". It hands each annotation to a Collector, which finds the image, repairs what has one
reading and counts what it refuses:

    def read_mine(root: Path, split: str) -> Records:
        file = first_existing(root, f"{split}.jsonl")
        collector = Collector(root)
        for number, row in read_objects(file):
            collector.add(Annotation(
                f"line {number}", f"{split}-{number}", row["file"], row["text"], row["box"]))
        return collector.records
"""
import argparse
import functools
import math
import runpy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from PIL import Image

import reward
from qwen.answer import Box
from readers import images
from readers.base import (
    COORDS,
    DataError,
    NoSplit,
    Reading,
    Record,
    Records,
    UnreadableImage,
    fingerprint,
    in_words,
    reading,
)
from readers.collect import DEEP, hold_out
from readers.dior import read_dior, read_opt
from readers.geopix import read_geopix
from readers.images import ImageError, Stretch
from readers.jsonl import read_jsonl
from readers.refgeo import read_refgeo
from readers.rrsisd import read_rrsisd
from readers.rsvg_hr import read_rsvg_hr
from readers.vrsbench import read_vrsbench


def refusal_summary(records: Records, name: str, root: str | Path | None, split: str) -> str:
    """How many of a split's records are refused, why, and the command that says where.

    "" where none is.
    """
    refused = sum(records.refusals.values())
    if not refused:
        return ""
    command = f"python data.py {name}{f' --root {root}' if root else ''} --split {split}"
    deep = "; --stretch 2 98 reads 16-bit and float images" if DEEP in records.refused else ""
    return (
        f"{refused:,} of {refused + len(records):,} records are refused "
        f"({in_words(records.refusals)}){deep}; {command} says where")


def load(
        name: str, root: str | Path | None = None, split: str = "train",
        coords: str | None = None, stretch: Stretch | None = None,
) -> Records:
    """Records of a data set's split.

    "sft" and "rft" mean "train" where a data set has no split of that name. A mixture is written
    "dior+vrsbench:0.5": then root is the folder that holds dior/ and vrsbench/.

    coords: the unit of the boxes, where the data set leaves it open. stretch: percentiles that
    become black and white in images of 16 bits or floats, which are refused without.

    DataError where there is no such data set or split, or its files don't fit. One annotation
    that does not fit is refused (`Records.refused`); where all are, no record is left.
    """
    if coords and ("+" in name or ":" in name or name in OWN_UNIT):
        raise DataError(
            f"--coords {coords} is for a data set that leaves the unit of its boxes open, which "
            f"{name} does not; leave it out")
    before = reading.set(Reading(coords, tuple(stretch) if stretch else None))
    try:
        if "+" in name or ":" in name:
            records = mixture(name, Path(root or "data"), split)
        elif name in READERS:
            records = read_split(name, Path(root) if root else Path("data") / name, split)
        else:
            raise DataError(
                f"no data set is called {name!r}; there are {', '.join(READERS)}, and mixtures "
                "like dior+vrsbench:0.5")
    finally:
        reading.reset(before)
    check_boxes(records, name, split)
    return records


def read_split(name: str, root: Path, split: str) -> Records:
    """Records of a split, by the data set's reader.

    Where its files have no "sft" or "rft" these are "train"; and where they have no "val" either,
    it is held out of "train" (`hold_out`).
    """
    reader = READERS[name]
    try:
        return reader(root, split)
    except NoSplit as error:
        if split not in ("sft", "rft", "val") or not has_split(reader, root, "train"):
            raise error
    train = reader(root, "train")
    if split != "val" and has_split(reader, root, "val"):
        return train
    return hold_out(train, split, root)


def has_split(reader: Callable[[Path, str], Records], root: Path, split: str) -> bool:
    try:
        reader(root, split)
    except NoSplit:
        return False
    return True


def check_boxes(records: Records, name: str, split: str) -> None:
    """DataError for a box that does not lie within its image with an area.

    A Collector keeps none, but a reader may do without one. Whatever is answered to such a
    record would score 0, and nobody would be told.
    """
    for r in records:
        x1, y1, x2, y2 = r.box
        width, height = r.size
        if not (0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height):
            raise DataError(
                f"{name} {split}, record {r.id}: its box {r.box} has no area within the image of "
                f"{width} x {height}; mend its reader, or hand its annotations to a Collector")


def mixture(names: str, root: Path, split: str) -> Records:
    """Records of several data sets, each with its weight.

    A part with a weight below 1 gives that share of its records, one above 1 repeats them (2.5:
    all twice and a half of them again). Weights are for training: of splits that measure, each
    part gives every record once. Which records, and their order, depend on their ids alone; an
    id is preceded by its data set's name and followed by its repetition.
    """
    training = is_training(split)
    mixed = Records([], {})
    notes = []
    for name, weight in mixture_parts(names):
        records = read_split(name, root / name, split)
        weighted = weighted_records(name, records, weight if training else 1.0)
        mixed.absorb(Records(weighted, records.refused, records.repaired), f"{name}: ")
        if records.note:
            notes.append(f"{name}: {records.note}")
    shuffled = sorted(mixed, key=lambda r: fingerprint(r.id))
    return Records(shuffled, mixed.refused, mixed.repaired, "; ".join(notes))


def is_training(split: str) -> bool:
    """Is this a split to train on? Those of one part of a data set are called "rsvg_train"."""
    return split in ("sft", "rft") or split.removesuffix("_v2").endswith("train")


def mixture_parts(names: str) -> Iterator[tuple[str, float]]:
    """Yields name and weight of each part of "dior+vrsbench:0.5".

    DataError for what has no meaning.
    """
    seen = set()
    for part in names.split("+"):
        name, colon, weight_text = part.partition(":")
        try:
            weight = float(weight_text) if colon else 1.0
        except ValueError:
            weight = 0
        if name not in READERS or name in seen or not 0 < weight < 1000:
            raise DataError(
                f"{part!r} can't be a part of the mixture {names!r}; each part is a data set's "
                "name, no name comes twice, and :WEIGHT may follow, above 0 and below 1000; "
                f"there are {', '.join(READERS)}")
        seen.add(name)
        yield name, weight


def weighted_records(name: str, records: Records, weight: float) -> list[Record]:
    """A mixture's part: all records `weight` times, the last time a share of them."""
    ordered = sorted(records, key=lambda r: fingerprint(f"{name}/{r.id}"))
    weighted = []
    for turn in range(math.ceil(weight)):
        share = min(weight - turn, 1)
        repetition = f"#{turn + 1}" if turn else ""
        for record in ordered[:round(share * len(ordered))]:
            weighted.append(replace(record, id=f"{name}/{record.id}{repetition}"))
    return weighted


# ---------------------------------------------------------------- images

def open_image(record: Record) -> Image.Image:
    """The record's image, PIL RGB; a synth record is drawn here.

    DataError where it can't be decoded to its end.

    Pixels are as the file stores them, for the boxes of data sets are: an orientation, of EXIF or
    of a TIFF, turns nothing. (`eval.py --image` turns the picture upright, as viewers show it,
    and answers in pixels of what it then is.)
    """
    if hasattr(record.image, "draw"):
        return record.image.draw()
    try:
        image = images.read_rgb(record.image, record.stretch)
        if image.size != tuple(record.size):
            raise ImageError(f"{image.size} pixels, where {record.size} were found before")
        return image
    except (OSError, ImageError) as error:
        raise UnreadableImage(
            f"{record.image}: unreadable image of record {record.id} ({error}); repair or remove "
            "it") from None


def open_or_blank(record: Record) -> Image.Image:
    """The record's image to be looked at, a gray one of its size where it can't be read."""
    try:
        return open_image(record)
    except UnreadableImage:
        return Image.new("RGB", record.size, "gray")


# ---------------------------------------------------------------- readers

def read_synth(root: Path, split: str, name: str = "synth") -> Records:
    """An embedded world, one of scenes.WORLDS.

    Drawn, not read: root is not used.
    """
    from toy import scenes

    splits = scenes.WORLDS[name]
    split = {"train": "rft"}.get(split, split)
    if split not in splits:
        raise NoSplit(f"{name} has no split {split!r}; it has {', '.join(splits)}")
    records = Records([], {})
    for i, scene, text, box, category, kind in scenes.records(splits[split]):
        records.append(Record(f"{split}-{i}", scene, text, box, category, scene.size, kind))
    return records


READERS: dict[str, Callable[[Path, str], Records]] = {
    "synth": read_synth,
    "synth-small": functools.partial(read_synth, name="synth-small"),
    "dior": read_dior,
    "opt": read_opt,
    "rsvg-hr": read_rsvg_hr,
    "vrsbench": read_vrsbench,
    "refgeo": read_refgeo,
    "rrsisd": read_rrsisd,
    "geopix": read_geopix,
    "jsonl": read_jsonl,
    "synth-one": functools.partial(read_synth, name="synth-one"),
    "synth-tiny": functools.partial(read_synth, name="synth-tiny")}
# Data sets whose own form says in which unit each box is.
OWN_UNIT = ("synth", "synth-small", "synth-one", "synth-tiny", "vrsbench")
# Expressions of a split, where they were published.
PUBLISHED = {
    "dior": {"train": 26_991, "val": 3_829, "test": 7_500},
    "opt": {"train": 19_580, "val": 4_895, "test": 24_477},
    "rsvg-hr": {"train": 2_151, "test": 499},
    "vrsbench": {"test": 16_159},
    "rrsisd": {"train": 12_181, "val": 1_740, "test": 3_481}}


# ---------------------------------------------------------------- what data sets share

# IoU from which two boxes of one image are taken for one object's.
SAME_BOX = 0.9


def image_name(record: Record) -> Any:
    """What names a record's image in any data set: its file's name without suffix.

    A drawn scene is its own name.
    """
    return record.image.stem if isinstance(record.image, Path) else record.image


def find_shared(
        records: Sequence[Record], training: Iterable[Record],
        image_key: Callable[[Record], Any] = image_name,
) -> list[str | None]:
    """What of each record is in the training data: "record", "image" or None.

    "record": its image, and in it a box with an IoU of 0.9 or more, whatever the expression.
    image_key: tells whether two records have the same image. Boxes are compared in parts of the
    image's sides, so that a resized copy of an image is the same.
    """
    training_boxes: dict[Any, list[Box]] = {}
    for r in training:
        training_boxes.setdefault(image_key(r), []).append(relative_box(r))
    shared: list[str | None] = [None] * len(records)
    # One pair for each record and each box that is trained on in its image.
    pairs = []
    owners = []
    for i, r in enumerate(records):
        boxes = training_boxes.get(image_key(r))
        if boxes:
            shared[i] = "image"
            pairs += [(relative_box(r), box) for box in boxes]
            owners += [i] * len(boxes)
    if pairs:
        a, b = torch.tensor(pairs, dtype=torch.float64).unbind(1)      # (pairs, 4) each
        for i, iou in zip(owners, reward.iou(a, b).tolist()):
            if iou >= SAME_BOX:
                shared[i] = "record"
    return shared


def relative_box(record: Record) -> Box:
    """A record's box in parts of its image's sides."""
    x1, y1, x2, y2 = record.box
    width, height = record.size
    return x1 / width, y1 / height, x2 / width, y2 / height


# ---------------------------------------------------------------- the check of data sets

class DataParser(argparse.ArgumentParser):
    """A wrong flag is one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"data.py: {message}; data.py --help explains every flag\n")


class StretchFlag(argparse.Action):
    """LOW HIGH -> a Stretch."""

    def __call__(
            self, parser: argparse.ArgumentParser, namespace: argparse.Namespace,
            values: Sequence[float], option: str | None = None,
    ) -> None:
        low, high = values
        if not 0 <= low < high <= 100:
            raise argparse.ArgumentError(
                self, f"{low:g} {high:g} are not two percentiles, the lower one first")
        setattr(namespace, self.dest, [low, high])


def add_reading_flags(add: Callable[..., argparse.Action], coords: str = "--coords") -> None:
    """The flags on what a data set's files leave open.

    add: a parser's add_argument; coords: the first one's name, where that is another's.
    """
    add(coords, choices=list(COORDS),
        help="unit of the data set's boxes, where it leaves it open: fractions or thousandths of "
        "the image's sides, or pixels; without it they are pixels, unless that can't be")
    add("--stretch", type=float, nargs=2, action=StretchFlag, metavar=("LOW", "HIGH"),
        help="percentiles, of each image and band, that become black and white in images of 16 "
        "bits or floats, as in 2 98; without it these are refused")


if __name__ == "__main__":
    # The check of a data set is a tool of its own, built on this module.
    runpy.run_module("tools.check_data", run_name="__main__")
