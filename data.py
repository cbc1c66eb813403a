"""Data sets: `load` gives the records of a split, `open_image` the image of a record.

    python data.py dior           checks a data set: counts, refused and repaired records, images
    python data.py dior rrsisd    records trained on in one and scored in the other

Boxes are xyxy, float pixels of the original image. A new data set is one file in readers/ and its
line in READERS below. Its function reads the splits that the files have; `read_split` makes "sft",
"rft" and "val" if they are missing. For [{"file": "1.jpg", "text": "a ship", "box": [1, 2, 3, 4]}]:

    def read(root: Path, split: str) -> Records:
        file = first_existing(root, f"{split}.json")           # NoSplit if there is none
        collector = Collector(root)
        for i, row in enumerate(read_json(file)):
            collector.add(f"{file}, row {i}", f"{split}-{i}", row.get("file"), row.get("text"),
                          row.get("box"))                      # None: a counted refusal
        return collector.records
"""
import functools
import math
import re
import runpy
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import reward
from readers import collect, dior, geopix, images, jsonl, refgeo, rrsisd, rsvg_hr, vrsbench
from readers.base import (
    DataError, NoSplit, Record, Records, Stretch, UnreadableImage, in_words, sha256)

SAME_BOX = 0.9                    # two boxes with this IoU or more belong to the same object
# Splits to train on. refGeo has "rsvg_train" and "rsvg_train_v2".
TRAINING = re.compile(r"sft(-\d)?|rft|.*train(_v2)?")


def read_synth(root: Path, split: str, name: str = "synth") -> Records:
    """One of scenes.WORLDS. It is drawn, so root is not used."""
    from toy import scenes

    splits = scenes.WORLDS[name]
    split = {"train": "rft"}.get(split, split)
    if split not in splits:
        raise NoSplit(f"{name} has no split {split!r}; it has {', '.join(splits)}; sft.py trains "
                      "on sft, rft.py on rft")
    return Records([Record(f"{split}-{i}", scene, text, box, category, scene.size, kind)
                    for i, scene, text, box, category, kind in scenes.records(splits[split])], {})


READERS: dict[str, Callable[[Path, str], Records]] = {
    "synth": read_synth,
    "synth-small": functools.partial(read_synth, name="synth-small"),
    "dior": dior.read,
    "opt": functools.partial(dior.read, name="opt", image_folder="Image", withdrawn={}),
    "rsvg-hr": rsvg_hr.read,
    "vrsbench": vrsbench.read,
    "refgeo": refgeo.read,
    "rrsisd": rrsisd.read,
    "geopix": geopix.read,
    "jsonl": jsonl.read,
    "synth-one": functools.partial(read_synth, name="synth-one"),
    "synth-tiny": functools.partial(read_synth, name="synth-tiny")}
# Data sets in which the unit of each box is known.
OWN_UNIT = ("synth", "synth-small", "synth-one", "synth-tiny", "vrsbench")
PUBLISHED = {                     # number of expressions in each split
    "dior": {"train": 26_991, "val": 3_829, "test": 7_500},
    "opt": {"train": 19_580, "val": 4_895, "test": 24_477},
    "rsvg-hr": {"train": 2_151, "test": 499},
    "vrsbench": {"test": 16_159},
    "rrsisd": {"train": 12_181, "val": 1_740, "test": 3_481}}


def load(name: str, root: str | Path | None = None, split: str = "train",
         coords: str | None = None, stretch: Stretch | None = None) -> Records:
    """A split of a data set. root: its folder, by default data/<name>; for a mixture such as
    "dior+vrsbench:0.5" the folder that holds dior/ and vrsbench/. coords, stretch: the flags.
    DataError if there is no such data set or split, or its files are not as expected."""
    is_mixture = "+" in name or ":" in name
    if coords and (is_mixture or name in OWN_UNIT):
        raise DataError(f"--data-coords {coords} is for a data set that leaves the unit of its "
                        f"boxes open, which {name} does not; leave it out")
    if not is_mixture and name not in READERS:
        raise DataError(f"no data set is called {name!r}; there are {', '.join(READERS)}, and "
                        "mixtures like dior+vrsbench:0.5")
    folder = Path(root or ("data" if is_mixture else f"data/{name}"))
    before = collect.reading.set((coords, tuple(stretch) if stretch else None))
    try:
        records = (mixture if is_mixture else read_split)(name, folder, split)
    finally:
        collect.reading.reset(before)
    # Any answer to a box without area would score 0. A Collector refuses it; a reader may not.
    for r in records:
        (x1, y1, x2, y2), (width, height) = r.box, r.size
        if not (0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height):
            raise DataError(
                f"{name} {split}, record {r.id}: its box {r.box} has no area within the image of "
                f"{width} x {height}; mend its reader, or pass its annotations to a Collector")
    return records


def read_split(name: str, root: Path, split: str) -> Records:
    """If the data set has no "sft" and "rft", they are "train". If it has no "val" either, "val" is
    one image in 20 of train, chosen by a hash of its name, and "sft" and "rft" are the rest."""
    read = READERS[name]
    has_val = "val" in PUBLISHED.get(name, ())       # even if the files here lack it
    try:
        return read(root, split)
    except NoSplit:
        if split not in ("sft", "rft", "val") or split == "val" and has_val:
            raise
    train = read(root, "train")
    if split != "val":
        with suppress(NoSplit):
            if not has_val:
                read(root, "val")
            return train
    by_name = sorted({r.image for r in train}, key=lambda path: (sha256(path.name), path))
    if len(by_name) < 2:
        refused = f" (refused: {in_words(train.refusals)})" if train.refused else ""
        raise NoSplit(f"{split} needs two usable images in train, one to hold out for validation, "
                      f"and {root} has {len(by_name)}{refused}; add images, or a split val")
    held_out = set(by_name[:max(len(by_name) // 20, 1)])
    note = (f"validation is {len(held_out):,} of train's {len(by_name):,} images, which sft and "
            f"rft leave out{train.note and f'; {train.note}'}")
    if split == "val":
        return Records([r for r in train if r.image in held_out], {}, {}, note)
    rest = [r for r in train if r.image not in held_out]
    return Records(rest, train.refused, train.repaired, note)


def mixture(names: str, root: Path, split: str) -> Records:
    """Records of several data sets, "dior+vrsbench:0.5", shuffled in a fixed order.
    A weight of 2.5 takes all records twice and half of them again. In splits not for training,
    weights are 1. The choice depends only on ids: a larger share contains a smaller one."""
    mixed = Records([], {})
    notes: dict[str, str] = {}
    for part in names.split("+"):
        name, colon, weight_text = part.partition(":")
        weight = 0.0 if colon else 1.0
        with suppress(ValueError):
            weight = float(weight_text)
        if name not in READERS or name in notes or not 0 < weight < 1000:
            raise DataError(f"{part!r} can't be a part of the mixture {names!r}; give each data "
                            "set's name once, then :WEIGHT if not 1, above 0 and below 1000; there "
                            f"are {', '.join(READERS)}")
        weight = weight if TRAINING.fullmatch(split) else 1.0
        records = read_split(name, root / name, split)
        ordered = sorted(records, key=lambda r: sha256(f"{name}/{r.id}"))
        for turn in range(math.ceil(weight)):
            repetition = f"#{turn + 1}" if turn else ""
            for record in ordered[:round(min(weight - turn, 1) * len(ordered))]:
                mixed.append(replace(record, id=f"{name}/{record.id}{repetition}"))
        for mine, its in ((mixed.refused, records.refused), (mixed.repaired, records.repaired)):
            for reason, places in its.items():
                mine.setdefault(reason, []).extend(f"{name}: {place}" for place in places)
        notes[name] = records.note
    mixed.sort(key=lambda r: sha256(r.id))
    mixed.note = "; ".join(f"{name}: {note}" for name, note in notes.items() if note)
    return mixed


def refusal_summary(records: Records, name: str, root: str | Path | None, split: str) -> str:
    """How many of a split's records are refused, why, and how to list them; "" if none is."""
    refused = sum(records.refusals.values())
    if not refused:
        return ""
    deep = images.DEEP in records.refused
    return (f"{refused:,} of {refused + len(records):,} records are refused "
            f"({in_words(records.refusals)})"
            f"{'; --stretch 2 98 reads 16-bit and float images' if deep else ''}; "
            f"python data.py {name}{f' --root {root}' if root else ''} --split {split} says where")


def open_image(record: Record, or_blank: bool = False) -> Image.Image:
    """RGB as stored: EXIF is ignored, because boxes refer to stored pixels. If the image can't be
    decoded to its end: UnreadableImage, or a gray image if or_blank."""
    if not isinstance(record.image, Path):
        return record.image.draw()
    try:
        image = images.read_rgb(record.image, record.stretch)
        if image.size != tuple(record.size):
            raise images.ImageError(f"{image.size} pixels, but {record.size} were found before")
        return image
    except (OSError, images.ImageError) as error:
        if or_blank:
            return Image.new("RGB", record.size, "gray")
        raise UnreadableImage(f"{record.image}: unreadable image of record {record.id} ({error}); "
                              "repair or remove it") from None


def find_shared(records: Sequence[Record], training: Sequence[Record],
                pixels: dict[Any, Any] | None = None) -> list[str | None]:
    """For each record, what of it is in the training data: "record", "image" or None.
    "record": its image, and a box with an IoU of SAME_BOX or more, whatever the expression.
    Images are compared by name without suffix or, if given, by `pixels` (image -> hash)."""
    by_image = defaultdict(list)  # boxes trained on, as fractions of the image's sides
    shared: list[str | None] = []
    for i, r in enumerate([*training, *records]):
        key = r.image.stem if isinstance(r.image, Path) else r.image
        if pixels is not None:
            key = pixels.get(r.image, r.image)
        box = [v / side for v, side in zip(r.box, (*r.size, *r.size))]
        if i < len(training):
            by_image[key].append(box)
            continue
        trained = torch.tensor(by_image.get(key, []), dtype=torch.float64).view(-1, 4)
        iou = reward.iou(torch.tensor(box, dtype=torch.float64), trained)          # (N,)
        in_image = "image" if len(trained) else None
        shared.append("record" if (iou >= SAME_BOX).any() else in_image)
    return shared


if __name__ == "__main__":
    runpy.run_path(str(Path(__file__).parent / "tools" / "check_data.py"), run_name="__main__")
