"""readers.refgeo."""
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from readers.base import SPLITS, NoSplit, Records, first_existing, read_objects
from readers.collect import Annotation, Collector, bracketed_numbers, hold_out, visible_files

REFGEO = ("dior_rsvg", "rsvg", "geochat", "vrsbench", "avvg")


def read_refgeo(root: Path, split: str) -> Records:
    """refGeo (GeoGround): every data set's file of the split, or one, as in "dior_rsvg_test".

    Its boxes are xyxy pixels; its ids may have another suffix than the image's file. A repack
    has its train files as metainfo_v2/*_train_v2.jsonl; they are read where metainfo/ has none.
    """
    if split in ("sft", "rft", "val") and not visible_files(root / "metainfo", "*_val.jsonl"):
        return hold_out(read_refgeo(root, "train"), split, root)
    split = {"sft": "train", "rft": "train"}.get(split, split)
    names = [f"{part}_{split}" for part in REFGEO] if split in SPLITS else [split]
    paths = {name: refgeo_file(root, name) for name in names}
    files = [path for path in paths.values() if path]
    if not files:
        folder = first_existing(root, "metainfo", "metainfo_v2")
        raise NoSplit(
            f"no {folder / names[0]}.jsonl or the like; refgeo has "
            "train, val, test, and those of one data set, like rsvg_test")
    parts = [file.stem.removesuffix("_v2").rsplit("_", 1)[0] for file in files]
    folders = refgeo_folders(root, (*REFGEO, *parts))
    records = Records([], {})
    for file, part in zip(files, parts):
        # Where no data set has a folder of its own, images are looked for everywhere. Where one
        # has, an image of another one's folder would be another image.
        collector = Collector(folders.get(part) or (root / "images" / part if folders else root))
        for number, row in read_objects(file):
            where = f"{file}, line {number}"
            if row is None:
                collector.refuse("no JSON object", where)
                continue
            collector.add(Annotation(
                where, f"{file.stem}-{number}", row.get("image_id"), row.get("question"),
                bracketed_numbers(row.get("bbox")), kind=part,
                size=told_size(row, "image_width", "image_height")))
        records.absorb(collector.records)
    absent = [f"{name}.jsonl" for name, path in paths.items() if not path]
    records.note = f"not there: {', '.join(absent)}" if absent else ""
    return records


def refgeo_file(root: Path, name: str) -> Path | None:
    """The file of a data set's split, "rsvg_train", or None where there is none."""
    for folder, suffix in (("metainfo", ""), ("metainfo_v2", ""), ("metainfo_v2", "_v2")):
        file = root / folder / f"{name}{suffix}.jsonl"
        if file.exists():
            return file
    return None


def told_size(row: dict[str, Any], width: str, height: str) -> tuple[int, int] | None:
    """The (width, height) that an annotation gives its image under these keys, else None."""
    size = (row.get(width), row.get(height))
    return size if all(type(side) is int for side in size) else None


def refgeo_folders(root: Path, parts: Iterable[str]) -> dict[str, Path]:
    """Data sets -> the folder of its images, of those that have one.

    It is called as the data set is, in another case or with other hyphens; else its name begins
    so.
    """
    candidates = []
    for parent in (root / "images", root):
        candidates += [path for path in sorted(parent.glob("*")) if path.is_dir()]
    plain_names = {path: re.sub("[-_ ]", "", path.name.lower()) for path in candidates}
    folders = {}
    for part in parts:
        name = part.replace("_", "")
        equal = [path for path, plain in plain_names.items() if plain == name]
        longer = [path for path, plain in plain_names.items() if plain.startswith(name)]
        if equal or longer:
            folders[part] = (equal or longer)[0]
    return folders
