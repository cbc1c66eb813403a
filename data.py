"""Records and images: the readers of the embedded and the public data sets.

One sample's way: `load` reads the annotations -> `open_image`; what follows is processor.py's. Boxes are xyxy, float pixels of the original
image.

A new data set is one function in READERS: (root, split) -> Records. It hands each annotation to a Collector, which finds the image, repairs
what has one reading and counts what it refuses.

    python data.py dior                       counts beside the published ones, refused and repaired records, images that don't decode,
                                              a contact sheet
"""
import argparse
import hashlib
import itertools
import json
import math
import os
import re
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from PIL import Image
from tqdm import tqdm

from pictures import contact_sheet, draw_boxes

Image.MAX_IMAGE_PIXELS = 1 << 31  # aerial scenes are large, and one's own files no bombs
ASPECT = 200                      # longer side of an image over its shorter one, at most: the families' own limit


class DataError(Exception):
    """Data that is missing or does not fit; one line: what is wrong, where, what to do."""


# ------------------------------------------------------------------------------------------------------------------ records

@dataclass(frozen=True)
class Record:
    """One expression and its box."""
    id: str                       # unique in its data set
    image: object                 # path, or for `synth` a toy.scenes.Scene, which draws itself
    text: str                     # the expression, as its author wrote it
    box: tuple                    # (x1, y1, x2, y2), float pixels of the original image
    category: str
    size: tuple                   # (width, height) of the original image
    kind: str = ""                # kind of expression, where the data set knows it; for `refgeo` the data set it comes from
    unique: object = None         # VRSBench: True where the image holds one object of the category, False where it holds more
    grid: object = None           # VRSBench: its own box, whole hundredths of the image's sides, which its official metric compares


class Records(list):
    """The usable records of a split. `refused`: reason -> places, one entry for each record that is not usable. `repaired`: the same of
    records that are, where the file is wrong and only one reading is possible. `note`: what else must be known of the split."""

    def __init__(self, records, refused, repaired=None, note=""):
        super().__init__(records)
        self.refused, self.repaired, self.note = refused, repaired or {}, note

    def absorb(self, other, prefix=""):
        """Takes in the records of another part and where it refused or repaired; a prefix tells whose place it is."""
        self.extend(other)
        for every, theirs in ((self.refused, other.refused), (self.repaired, other.repaired)):
            for reason, places in theirs.items():
                every.setdefault(reason, []).extend(prefix + place for place in places)

    @property
    def refusals(self):
        """Reason -> how many records it refuses."""
        return {reason: len(places) for reason, places in self.refused.items()}

    @property
    def hash(self):
        """16 hex characters that change with any id, text, box or size."""
        lines = (json.dumps([r.id, r.text, r.box, r.category, r.size]) for r in self)
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def told_refused(records, name, root, split):
    """How many of a split's records are refused, why, and the command that says where; "" where none is."""
    n = sum(records.refusals.values())
    command = f"python data.py {name}{f' --root {root}' if root else ''} --split {split}"
    return f"{n:,} of {n + len(records):,} records are refused ({in_words(records.refusals)}); {command} says where" if n else ""


def in_words(counts):
    """{"missing image": 3, "empty box": 1} -> "missing image: 3, empty box: 1"."""
    return ", ".join(f"{reason}: {n:,}" for reason, n in counts.items())


def load(name, root=None, split="train"):
    """Records of a data set's split; "sft" and "rft" mean "train" where a data set has no split of that name. A mixture is written
    "dior+vrsbench:0.5": then root is the folder that holds dior/ and vrsbench/. DataError where there is no such data set or split, or its
    files don't fit; one annotation that does not is refused (`Records.refused`), and where all are, no record is left."""
    if "+" in name or ":" in name:
        return mixture(name, Path(root or "data"), split)
    if name not in READERS:
        raise DataError(f"no data set is called {name!r}; there are {', '.join(READERS)}, and mixtures like dior+vrsbench:0.5")
    return READERS[name](Path(root) if root else Path("data") / name, split)


def mixture(names, root, split):
    """A part with a weight below 1 gives that share of its records, one above 1 repeats them (2.5: all twice and a half of them again).
    Weights are for training: of splits that measure, each part gives every record once. Which records, and their order, depend on their ids
    alone; an id is preceded by its data set's name and followed by its repetition."""
    mixed, notes, seen = Records([], {}), [], set()
    for part in names.split("+"):
        name, colon, weight = part.partition(":")
        try:
            weight = float(weight) if colon else 1.0
        except ValueError:
            weight = 0
        if name not in READERS or name in seen or not 0 < weight < 1000:
            raise DataError(f"{part!r} can't be a part of the mixture {names!r}; each part is a data set's name, no name comes twice, and "
                            f":WEIGHT may follow, above 0 and below 1000; there are {', '.join(READERS)}")
        seen.add(name)
        weight = weight if split in ("sft", "rft") or split.endswith("train") else 1.0
        records = READERS[name](root / name, split)
        order = sorted(records, key=lambda r: fingerprint(f"{name}/{r.id}"))
        shares = [order[:round(min(weight - turn, 1) * len(order))] for turn in range(math.ceil(weight))]
        weighed = [replace(r, id=f"{name}/{r.id}" + (f"#{turn + 1}" if turn else "")) for turn, share in enumerate(shares) for r in share]
        mixed.absorb(Records(weighed, records.refused, records.repaired), f"{name}: ")
        notes += [f"{name}: {records.note}"] if records.note else []
    return Records(sorted(mixed, key=lambda r: fingerprint(r.id)), mixed.refused, mixed.repaired, "; ".join(notes))


def fingerprint(text):
    """A number that is the same on every machine."""
    return hashlib.sha256(text.encode("utf-8", "replace")).digest()


def open_image(record):
    """The record's image, PIL RGB; a synth record is drawn here. DataError where it can't be decoded to its end.

    Pixels are as the file stores them, for the boxes of data sets are: an EXIF orientation turns nothing. (`eval.py --image` turns the
    picture upright, as viewers show it, and answers in pixels of what it then is.)"""
    if hasattr(record.image, "draw"):
        return record.image.draw()
    try:
        with Image.open(record.image) as image:
            return rgb(image)
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{record.image}: unreadable image of record {record.id} ({error}); repair or remove it") from None


def rgb(image):
    """PIL image -> RGB. ValueError where that would clip it to white or black: 16-bit, 32-bit and float values."""
    if image.mode[0] in "IF":
        raise ValueError("16-bit or float image, scale it to 8 bits")
    return image.convert("RGB")


# ------------------------------------------------------------------------------------------------------------------ what readers share

class NoSplit(DataError):
    """There is no split of that name, or not the file that holds it."""


class Collector:
    """Takes what a reader found in an annotation: finds the image, repairs the box, keeps the record or counts why it can't be used.

    Images are found by base name, whatever folders lie between them and `folder`. Where several have the name, the end of the path that
    the annotation gives decides, then a folder called `prefer`; if neither does, the record is refused. exact: the annotation gives the
    path itself, and swapped corners have a second reading (x, y, width, height), so that they are refused. A name in an annotation never
    leads out of the folder; links within it are followed, as hub caches are made of them."""

    def __init__(self, folder, prefer="", exact=False):
        self.folder, self.prefer, self.exact = folder, prefer, exact
        self.records, self.ids, self.sizes, self.paths, walked = Records([], {}), set(), {}, {}, set()
        for path, inner, files in os.walk(folder, followlinks=True) if not exact else ():
            if os.path.realpath(path) in walked:                         # by a link beside it, or a loop
                inner[:] = []
                continue
            inner[:] = [name for name in inner if name != "__MACOSX"]
            walked.add(os.path.realpath(path))
            for name in files:
                stem, suffix = os.path.splitext(name)
                if suffix.lower() in IMAGES and not name.startswith("._"):
                    self.paths.setdefault(stem, []).append(Path(path, name))

    def add(self, where, identity, image, text, box, category="", per=None, repairs=(), **more):
        """One annotation. where: its place, for the user; image: name or path; box: four numbers, in pixels, or if `per` is given, in parts
        of the image's sides of which there are `per`; repairs: what the reader repaired already."""
        path, size, trouble, renamed = self.find(str(image or ""))
        box, no_box, mended = repair_box(box, size, per)
        if self.exact and "swapped corners" in mended:
            no_box = "x1 > x2 or y1 > y2 (is it x, y, width, height?)"
        text = text.strip() if isinstance(text, str) else ""
        reason = trouble or no_box or (None if text else "empty text") or ("id of an earlier record" if identity in self.ids else None)
        if reason:
            return self.refuse(reason, where)
        for repair in (*repairs, *renamed, *mended):
            self.records.repaired.setdefault(repair, []).append(where)
        self.ids.add(identity)
        self.records.append(Record(identity, path, text, box, str(category or "").strip(), size, **more))

    def refuse(self, reason, where):
        self.records.refused.setdefault(reason, []).append(where)

    def find(self, name):
        """A name from an annotation -> path, (width, height), None and what was repaired; or None, None, why there is none and []."""
        name = os.path.normpath(name.replace("\\", "/")) if name else ""
        if not name or os.path.isabs(name) or name.split("/")[0] in ("..", "."):
            return None, None, "image outside the data set" if name else "no image named", []
        base = os.path.basename(name)
        stem, suffix = os.path.splitext(base)
        stem, suffix = (stem, suffix) if suffix.lower() in IMAGES else (base, "")                     # P0.v2 has none
        found = [self.folder / name] if self.exact else self.paths.get(stem, [])
        for better in (lambda p: p.name == base, lambda p: p.as_posix().endswith(f"/{name}"),
                       lambda p: self.prefer in p.relative_to(self.folder).parts):
            found = [p for p in found if better(p)] or found
        if len(found) != 1:
            return None, None, "several images of that name" if found else "missing image", []
        path = found[0]
        if path not in self.sizes:                                       # once an image
            self.sizes[path] = image_size(path)
        renamed = [] if path.name == base else [f"image called *{suffix} is *{path.suffix}"]
        return (path, *self.sizes[path], renamed)


def image_size(path):
    """(width, height) as stored and None, or None and the reason why the image can't be used. Its header is read, its pixels are not."""
    try:
        with Image.open(path) as image:
            size, mode = image.size, image.mode
    except FileNotFoundError:
        return None, "missing image"
    except (OSError, ValueError, Image.DecompressionBombError):
        return None, "unreadable image"
    if mode[0] in "IF":
        return None, "16-bit or float image"
    return (None, f"image more than {ASPECT} times as long as wide") if max(size) > ASPECT * min(size) else (size, None)


def repair_box(values, size, per=None):
    """Four numbers -> box within the image, None and what was repaired; or None, why there is none and []. per: see Collector.add."""
    try:
        comma = [isinstance(v, str) and re.fullmatch(r"\s*-?\d+,\d+\s*", v) is not None for v in values]
        box = [float(v.replace(",", ".") if c else v) for v, c in zip(values, comma)]
    except (TypeError, ValueError, OverflowError):
        box = []
    if len(box) != 4 or not all(map(math.isfinite, box)):
        return None, "no box", []
    if size is None:                                                     # no image: refused for that
        return None, None, []
    if per:
        box = [v * size[i % 2] / per for i, v in enumerate(box)]
    x1, y1, x2, y2 = box
    ordered = [min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)]
    cut = tuple(min(max(v, 0.0), float(size[i % 2])) for i, v in enumerate(ordered))
    if cut[2] <= cut[0] or cut[3] <= cut[1]:
        return None, "empty box" if ordered == list(cut) else "box outside the image", []
    mended = {"decimal comma": any(comma), "swapped corners": ordered != box, "box past the edge": cut != tuple(ordered)}
    return cut, None, [repair for repair, done in mended.items() if done]


def numbers(value):
    """Every number in a list or a text, as floats, but in a text none too large for one."""
    if isinstance(value, list):
        return [x for v in value for x in ([float(str(v))] if type(v) in (int, float) else numbers(v))]         # 10**400 is inf
    found = re.findall(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?", str(value))
    return [float(v) for v in found if math.isfinite(float(v))]


def bracketed(value):
    """A list's numbers, or those within the only innermost [...] of a text or of a list in a list, else []."""
    if isinstance(value, list) and not any(isinstance(v, list) for v in value):
        return numbers(value)
    found = re.findall(r"\[[^\[\]]*\]", str(value))
    return numbers(found[0]) if len(found) == 1 else []


def one_of(root, *names):
    """The first of these paths that is there."""
    for name in names:
        if (root / name).exists():
            return root / name
    raise NoSplit(f"no {' or '.join(names)} in {root}{zipped(root)}; --root must name the folder of the data set as it was downloaded")


def zipped(root):
    """What to add to an error about missing files, where archives are in their place."""
    names = sorted(p.name for p in root.glob("*.zip"))
    return f" ({', '.join(names)} is there: unzip it)" if names else ""


def read_json(path):
    """A JSON file's value, or None where there is no such file; DataError where it is unreadable."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: unreadable ({error})") from None


def text_lines(file):
    """Lines of a text, without their ends."""
    try:
        return [line.rstrip("\r") for line in file.read_text(encoding="utf-8-sig").split("\n")]  # splitlines would also cut at U+2028
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: unreadable ({error})") from None


def read_objects(file):
    """Yields (line number, object) of a JSONL file, None for what is no object. An object may go on over several lines, as in some of
    refGeo's; a line that begins another one ends what is unfinished. DataError where the file is one JSON array."""
    (start, text), lines = (0, ""), text_lines(file)
    if next((line for line in map(str.strip, lines) if line), "").startswith("["):
        raise DataError(f"{file}: a JSON array, where one JSON object a line is needed; jq -c '.[]' makes lines of it")
    for n, line in enumerate([*lines, "{"], 1):
        if text and line.startswith("{"):
            yield start, None
            text = ""
        if not text:
            start = n
        text = f"{text}\n{line}" if text else line.strip()
        try:
            found = json.loads(text, strict=False) if text else None     # strict would refuse a line break within a text
        except (ValueError, RecursionError):
            if text.startswith("{") and n - start < 100:
                continue
            found = ()
        if text:
            yield start, found if isinstance(found, dict) else None
        text = ""


def hold_out(records, split, root):
    """For data without validation records: "val" is one image in 20 of train, chosen by its name, and the training stages ("sft", "rft")
    get the rest and what was refused. "train" stays whole. DataError where train has not an image for each."""
    images = sorted({r.image for r in records}, key=lambda p: (fingerprint(p.name), p))
    if len(images) < 2:
        refused = f" (refused: {in_words(records.refusals)})" if records.refused else ""
        raise NoSplit(f"{split} needs two usable images in train, of which one is held out for validation, and {root} has {len(images)}"
                      f"{refused}; add images, or records of a split val")
    held = set(images[:max(len(images) // 20, 1)])
    note = f"validation is {len(held):,} of train's {len(images):,} images, which sft and rft leave out"
    if split == "val":
        return Records([r for r in records if r.image in held], {}, {}, note)
    return Records([r for r in records if r.image not in held], records.refused, records.repaired, note)


# ------------------------------------------------------------------------------------------------------------------ readers

def read_synth(root, split, small=False):
    """The embedded world; with `small` all objects are half as long. Drawn, not read: root is not used."""
    from toy import scenes

    splits, name = (scenes.SMALL, "synth-small") if small else (scenes.SPLITS, "synth")
    split = {"train": "rft"}.get(split, split)
    if split not in splits:
        raise NoSplit(f"{name} has no split {split!r}; it has {', '.join(splits)}")
    return Records([Record(f"{split}-{i}", scene, text, box, category, scene.size, kind)
                    for i, scene, text, box, category, kind in scenes.records(splits[split])], {})


SPLITS = ("train", "val", "test")
DIOR_WITHDRAWN = {"train": 15_328, "val": 3_832, "test": 19_160}


def read_dior(root, split, name="dior", prefer="JPEGImages", withdrawn=DIOR_WITHDRAWN):
    """DIOR-RSVG as it is downloaded. A split file holds indices of <object>s, counted from 0 over all XML files sorted by path: every
    object counts, a refused one too, or all later indices would shift."""
    split = {"sft": "train", "rft": "train"}.get(split, split)
    if split not in SPLITS:
        raise NoSplit(f"{name} has no split {split!r}; it has {', '.join(SPLITS)}")
    wanted = set(dior_indices(root, withdrawn)[split])
    folder = root / "Annotations"
    files = (p for p in folder.rglob("*.xml") if not p.name.startswith("._") and "__MACOSX" not in p.parts)
    files = sorted(files, key=lambda p: p.as_posix())
    if not files:
        raise DataError(f"no annotations at {folder}/*.xml{zipped(root)}; --root must name the folder that holds Annotations and {prefer}")
    collected, index = Collector(root, prefer), -1
    for file in files:
        try:
            tree = ElementTree.parse(file).getroot()
        except (ElementTree.ParseError, OSError) as error:
            raise DataError(f"{file}: unreadable annotation ({error}); without its objects every later index would be wrong") from None
        for item in tree.findall("object"):
            index += 1
            if index in wanted:
                box = [item.findtext(f"bndbox/{side}") for side in ("xmin", "ymin", "xmax", "ymax")]
                collected.add(f"{file}, object {index}", str(index), (tree.findtext("filename") or "").strip(),
                              item.findtext("description"), box, item.findtext("name"))
    beyond = sum(i > index for i in wanted)
    if beyond:
        raise DataError(f"{root}: {beyond} of the {len(wanted)} indices of {split} are beyond the {index + 1} objects found in {folder}; "
                        "annotations are missing, or the split files belong to other data")
    return collected.records


def dior_indices(root, withdrawn=DIOR_WITHDRAWN):
    """The split files, in root or in root/split: name -> indices. They must be whole numbers, disjoint, and of the current generation."""
    splits, root = {}, root if (root / "train.txt").exists() or not (root / "split").is_dir() else root / "split"
    for name in SPLITS:
        file = root / f"{name}.txt"
        try:
            splits[name] = [int(line) for line in file.read_text(encoding="utf-8-sig").split()]
        except OSError:
            raise DataError(f"no split file {file}{zipped(root)}; --root must name the folder that holds Annotations, images, train.txt, "
                            "val.txt, test.txt") from None
        except ValueError as error:
            raise DataError(f"{file}: not one index a line ({error})") from None
    for name, indices in splits.items():
        if len(indices) == withdrawn.get(name):
            raise DataError(f"{root / name}.txt has {len(indices)} lines: the split generation withdrawn by its authors in 2023, which "
                            "leaks test into train beside the current one; download the current train.txt, val.txt, test.txt")
    every = [i for indices in splits.values() for i in indices]
    if min(every, default=0) < 0:
        raise DataError(f"{root}: the split files hold an index below 0; download them again")
    twice = [i for i, n in Counter(every).items() if n > 1]
    if twice:
        raise DataError(f"{root}: the split files overlap or repeat an index ({twice[:3]}), so test would leak into train; download them "
                        "again")
    return splits


def read_opt(root, split):
    """OPT-RSVG: DIOR-RSVG's scheme with boxes in fractions of a pixel, its images in Image/ or JPEGImages/, its split files in split/."""
    return read_dior(root, split, "opt", "Image", {})


def read_rsvg_hr(root, split):
    """RSVG-HR: lines image,x1,y1,x2,y2,text. What follows the fifth comma is text, unless a decimal comma before it makes a fifth number; a
    number behind it may as well begin the text, as in "12,storey building", and does."""
    if split in ("sft", "rft", "val"):
        return hold_out(read_rsvg_hr(root, "train"), split, root)
    if split not in ("train", "test"):
        raise NoSplit(f"rsvg-hr has no split {split!r}; it has train, test, and val held out of train")
    file, collected = one_of(root, f"rsvg_hr_{split}.txt", f"Annotations/rsvg_hr_{split}.txt"), Collector(root, "images")
    for n, line in enumerate(text_lines(file), 1):
        if not line.strip():
            continue
        where, (image, *fields), repairs = f"{file}, line {n}", line.split(","), []
        box, text = fields[:4], ",".join(fields[4:])
        if len(fields) > 5 and all(re.fullmatch(r"\s*-?\d+(\.\d+)?\s*", field) for field in fields[:5]):
            pairs = [i for i in range(4) if fields[i].strip("- ").isdigit() and fields[i + 1].strip().isdigit()]
            if len(pairs) > 1:
                collected.refuse("five numbers, and more than one may hold a decimal comma", where)
                continue
            for i in pairs if pairs != [3] else ():
                box, text = [*fields[:i], f"{fields[i]}.{fields[i + 1]}", *fields[i + 2:5]], ",".join(fields[5:])
                repairs = ["decimal comma"]
        collected.add(where, f"{split}-{n}", image.strip(), text, box, repairs=repairs)
    return collected.records


def read_vrsbench(root, split):
    """VRSBench. The evaluation's boxes are obj_corner, the precise ones, and `grid` keeps those of its official metric. Train has whole
    hundredths of the image alone; its records of other tasks ([caption], [vqa]) are none of ours."""
    if split in ("sft", "rft", "val"):
        return hold_out(read_vrsbench(root, "train"), split, root)
    if split not in ("train", "test"):
        raise NoSplit(f"vrsbench has no split {split!r}; it has train, test, and val held out of train")
    file = one_of(root, {"train": "VRSBench_train.json", "test": "VRSBench_EVAL_referring.json"}[split])
    collected, rows = Collector(root, {"train": "Images_train", "test": "Images_val"}[split]), read_json(file)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{file}: not a JSON array of objects; download it again")
    for n, row in enumerate(rows):
        where, identity = f"{file}, record {n}", f"{split}-{n}"
        if split == "test":
            corners, grid = numbers(row.get("obj_corner")), numbers(row.get("ground_truth"))
            box, per, repairs = [f(corners[i::2]) for f in (min, max) for i in (0, 1)] if len(corners) == 8 else [], 1, []
            if not box or not (box[0] < box[2] and box[1] < box[3]):
                box, per, repairs = grid, 100, ["box of ground_truth, for want of obj_corner"]
                if len(grid) == 4 and (grid[0] == grid[2] or grid[1] == grid[3]):                     # both ends count there
                    box = [*grid[:2], *(b + (a == b) for a, b in zip(grid, grid[2:]))]
                    repairs = ["whole cells of ground_truth, for want of area"]
            collected.add(where, identity, row.get("image_id"), row.get("question"), box, row.get("obj_cls"), per, repairs,
                          unique=str(row["unique"]).lower() in ("true", "1") if row.get("unique") is not None else None,
                          grid=tuple(map(int, grid)) if len(grid) == 4 and all(map(math.isfinite, grid)) else None)
            continue
        turns = row.get("conversations")
        turns = [str(t["value"]) if isinstance(t, dict) and "value" in t else "" for t in turns] if isinstance(turns, list) else []
        for i, (question, told) in enumerate(itertools.zip_longest(turns[::2], turns[1::2], fillvalue="")):
            if "[refer]" in question:
                text = re.search(r"<p>(.*?)</p>", question, re.DOTALL)
                collected.add(f"{where}, turn {i}" if i else where, f"{identity}-{i}" if i else identity, row.get("image"),
                              text and text[1], numbers(told), per=100)
    return collected.records


def read_refgeo(root, split):
    """refGeo (GeoGround): every data set's file of the split, or one, as in "dior_rsvg_test". Its boxes are xyxy pixels; its ids may have
    another suffix than the image's file, and a folder of images another case or other hyphens than the data set's name. Where no data set
    has such a folder, images are looked for everywhere; where some have, an image of another one's folder would be another image."""
    if split in ("sft", "rft", "val") and not any((root / "metainfo").glob("*_val.jsonl")):
        return hold_out(read_refgeo(root, "train"), split, root)
    split = {"sft": "train", "rft": "train"}.get(split, split)
    names = [f"{part}_{split}" for part in REFGEO] if split in SPLITS else [split]
    files = [p for p in (root / "metainfo" / f"{name}.jsonl" for name in names) if p.exists()]
    if not files:
        raise NoSplit(f"no {one_of(root, 'metainfo') / names[0]}.jsonl or the like; refgeo has train, val, test, and those of one data "
                      "set, like rsvg_test")
    folders = {p: re.sub("[-_ ]", "", p.name.lower()) for place in (root / "images", root) for p in sorted(place.glob("*")) if p.is_dir()}

    def folder_of(part):
        return next((p for same in (str.__eq__, str.startswith) for p in folders if same(folders[p], part.replace("_", ""))), None)
    anywhere, total = not any(map(folder_of, REFGEO)), Records([], {})
    for file in files:
        part = file.stem.rsplit("_", 1)[0]
        collected = Collector(folder_of(part) or (root if anywhere else root / "images" / part))
        for n, row in read_objects(file):
            if row is None:
                collected.refuse("no JSON object", f"{file}, line {n}")
            else:
                collected.add(f"{file}, line {n}", f"{file.stem}-{n}", row.get("image_id"), row.get("question"),
                              bracketed(row.get("bbox")), kind=part)
        total.absorb(collected.records)
    absent = [p.name for p in (root / "metainfo" / f"{name}.jsonl" for name in names) if p not in files]
    total.note = f"not there: {', '.join(absent)}" if absent else ""
    return total


def read_jsonl(root, split):
    """Your own data: SPLIT.jsonl, one object a line, {"image": path from root, "text": ..., "box": [x1, y1, x2, y2] in pixels} and optional
    "id", "category", "split". Or one file of any name, whose lines are "train" unless they say otherwise; root may be that file."""
    files = [root] if root.is_file() else sorted(root.glob("*.jsonl"))
    if not files:
        raise DataError(f"no *.jsonl in {root}; --root must name a folder with train.jsonl, val.jsonl, test.jsonl, or one JSONL file")
    known, rows = (*SPLITS, "sft", "rft"), {}
    for file in files:
        own = file.stem if len(files) > 1 or file.stem in known else "train"
        for n, row in read_objects(file):
            rows.setdefault(str((row or {}).get("split") or own), []).append((file, n, row))
    if split not in rows and split in ("sft", "rft", "val") and "train" in rows:
        whole = read_jsonl(root, "train")
        return whole if "val" in rows else hold_out(whole, split, root)
    if split not in rows:
        raise NoSplit(f"{root} has no records of a split {split!r}; it has {', '.join(rows) or 'none'}: name a file {split}.jsonl, or give "
                      f'its lines "split": "{split}"')
    collected = Collector(root if root.is_dir() else root.parent, exact=True)
    for file, n, row in rows[split]:
        where = f"{file}, line {n}"
        if row is None:
            collected.refuse("no JSON object", where)
            continue
        image, (text, box) = row.get("image"), asked(row)
        image = image[0] if isinstance(image, list) and len(image) == 1 else image
        identity = f"{file.stem}-{n}" if row.get("id") is None else str(row["id"])
        collected.add(where, identity, image if isinstance(image, str) else "", text, box, row.get("category"))
    return collected.records


def asked(row):
    """(expression, box) of a JSONL line: "text" and "box", or what VLM-R1 trains on: a request and an answer that holds the box."""
    if "text" in row or "box" in row:
        return row.get("text"), bracketed(row.get("box"))
    turns = row.get("conversations")
    turns = [t for t in turns if isinstance(t, dict)] if isinstance(turns, list) and len(turns) == 2 else []
    turns = {str(t.get("from")): t.get("value") for t in turns}
    text = str(row.get("problem") or row.get("question") or turns.get("human") or "").replace("<image>", "").strip()
    request = re.fullmatch(r"Please provide the bounding box coordinates? of the region this sentence describes: (.*?)\.?", text, re.DOTALL)
    return request[1] if request else text, bracketed(row.get("solution") or row.get("ground_truth") or turns.get("gpt"))


REFGEO = ("dior_rsvg", "rsvg", "geochat", "vrsbench", "avvg")
IMAGES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp", ".gif")
READERS = {"synth": read_synth, "synth-small": lambda root, split: read_synth(root, split, small=True), "dior": read_dior, "opt": read_opt,
           "rsvg-hr": read_rsvg_hr, "vrsbench": read_vrsbench, "refgeo": read_refgeo, "jsonl": read_jsonl}
PUBLISHED = {"dior": {"train": 26_991, "val": 3_829, "test": 7_500}, "opt": {"train": 19_580, "val": 4_895, "test": 24_477},
             "rsvg-hr": {"train": 2_151, "test": 499}, "vrsbench": {"test": 16_159}}                  # expressions of a split


# ------------------------------------------------------------------------------------------------------------------ the check of a data set

def save_sheet(pictures, path):
    """Writes PIL images of one width to a picture's file, in rows; DataError where that can't be."""
    try:
        contact_sheet(pictures).save(path)
    except (OSError, ValueError, KeyError) as error:                     # no folder, no such format, one that is only read
        raise DataError(f"the contact sheet can't be written to {path} ({error}); name another file with --out") from None


class DataParser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"data.py: {message}; data.py --help explains every flag\n")


def main():
    parser = DataParser(description="Checks a data set: counts beside the published ones, refused and repaired records by reason, sizes of "
                                    "the boxes, images that splits share, images that can't be decoded, a contact sheet")
    parser.add_argument("name", help=f"one of {', '.join(READERS)}, or a mixture like dior+vrsbench:0.5")
    parser.add_argument("--root", help="its folder; default data/<name>; of a mixture the folder that holds theirs, default data")
    parser.add_argument("--split", nargs="+", help="splits to check; default those of train, val, test that there are")
    parser.add_argument("--places", type=int, default=20, help="places listed for a reason; 0: all")
    parser.add_argument("--show", type=int, default=12, help="records of the first split on the contact sheet")
    parser.add_argument("--out", default="data_check.png", help="where the contact sheet goes")
    args = parser.parse_args()
    sys.stdout.reconfigure(errors="backslashreplace")                    # a name in a data set may hold what no encoding has
    try:
        check_data_set(args)
    except DataError as error:
        print(f"data.py: {error}", file=sys.stderr)
        sys.exit(2)


def check_data_set(args):
    loaded = {}
    for split in args.split or SPLITS:
        try:
            loaded[split] = load(args.name, args.root, split)
        except NoSplit as error:
            if args.split or split == "test" and not loaded:
                raise
            print(f"{args.name} {split}: {error}")
        else:
            print_split(args.name, split, loaded[split], args.places)
    images = {split: {r.image for r in records} for split, records in loaded.items()}
    for a, b in itertools.combinations(images, 2):
        print(f"images in both {a} and {b}: {len(images[a] & images[b]):,}")
    files = {r.image: r for records in loaded.values() for r in records if not hasattr(r.image, "draw")}           # a record an image
    broken = undecodable(files)
    if files:
        print_places(f"images decoded: {len(files):,}, unreadable", list(broken.values()), args.places)
    whole = {split: [r for r in records if r.image not in broken] for split, records in loaded.items()}
    split = next((split for split, records in whole.items() if records), None)
    if split and args.show > 0:
        shown = whole[split][::max(1, len(whole[split]) // args.show)][:args.show]
        save_sheet([draw_boxes(open_image(r), [(r.box, "red")], r.text) for r in shown], args.out)
        print(f"{len(shown)} records of {split} with their boxes: {args.out}")
    if broken:
        raise DataError(f"{len(broken):,} of {len(files):,} images can't be decoded, and a run ends at the first that it meets; repair or "
                        "remove those listed above")


def undecodable(files):
    """{image: a record of it} -> {image: what is wrong}, of those that can't be decoded to their end."""
    def trouble(record):
        try:
            open_image(record)
        except DataError as error:
            return str(error)
    with ThreadPoolExecutor(8) as pool:
        found = list(tqdm(pool.map(trouble, files.values()), total=len(files), desc="decoding", unit="img", leave=False, disable=None))
    return {image: why for image, why in zip(files, found) if why}


def print_split(name, split, records, places):
    """Prints what is in a split. Sizes are areas of boxes in percent of their image's."""
    refused, repaired = (sum(map(len, reasons.values())) for reasons in (records.refused, records.repaired))
    print(f"{name} {split}: {len(records):,} records, {refused:,} refused, {repaired:,} repairs, {len({r.image for r in records}):,} "
          f"images, {len({r.category for r in records})} categories, hash {records.hash}")
    found, published = len(records) + refused, PUBLISHED.get(name, {}).get(split)
    if published:
        less = f"{published:,} are published" if found != published else "as published"
        print(f"  expressions found: {found:,}, {less}" + (f"; a subset, {found / published:.1%} of it" if found < published else
                                                         "; more than published: is this another version?" if found > published else ""))
    if records.note:
        print(f"  {records.note}")
    for verb, reasons in (("refused", records.refused), ("repaired", records.repaired)):
        for reason, where in reasons.items():
            print_places(f"  {verb}, {reason}", where, places)
    if records:
        area = np.array([(r.box[2] - r.box[0]) * (r.box[3] - r.box[1]) / (r.size[0] * r.size[1]) for r in records]) * 100
        shares = ", ".join(f"{q}% {v:.3g}" for q, v in zip((5, 25, 50, 75, 95), np.percentile(area, (5, 25, 50, 75, 95))))
        print(f"  box area in % of the image, quantiles: {shares}; below 1%: {(area < 1).mean():.1%} of the boxes")


def print_places(title, where, most):
    """A title, how many places there are, and the first of them; most: 0 for all."""
    rest = [f"    and {len(where) - most:,} more; --places 0 lists all"] if 0 < most < len(where) else []
    print(f"{title}: {len(where):,}", *(f"    {place}" for place in where[:most or None]), *rest, sep="\n")


if __name__ == "__main__":
    main()
