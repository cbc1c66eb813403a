"""refGeo, the data of GeoGround."""
import re
from pathlib import Path

from readers.base import SPLITS, NoSplit, Records, first_existing, read_json_lines
from readers.collect import Collector

PARTS = ("dior_rsvg", "rsvg", "geochat", "vrsbench", "avvg")


def read(root: Path, split: str) -> Records:
    """metainfo/*.jsonl: a split of all its data sets, or of one ("rsvg_test"). xyxy pixels.
    A repack has metainfo_v2/*_train_v2.jsonl, which is read if metainfo/ lacks that file."""
    files, absent = [], []
    names = [f"{part}_{split}" for part in PARTS] if split in SPLITS else [split]
    for name in names:
        places = (f"metainfo/{name}", f"metainfo_v2/{name}", f"metainfo_v2/{name}_v2")
        found = [root / f"{place}.jsonl" for place in places if (root / f"{place}.jsonl").exists()]
        files += found[:1]
        absent += [] if found else [f"{name}.jsonl"]
    if not files:
        folder = first_existing(root, "metainfo", "metainfo_v2")
        raise NoSplit(f"no {folder / names[0]}.jsonl or the like; refgeo has train, val, test, and "
                      "those of one data set, like rsvg_test")
    parts = [file.stem.removesuffix("_v2").rsplit("_", 1)[0] for file in files]
    # The name of an image folder begins with that of its data set, apart from case and hyphens.
    folders = {}
    candidates = [*sorted((root / "images").glob("*")), *sorted(root.glob("*"))]
    plain = {path: re.sub("[-_ ]", "", path.name.lower()) for path in candidates if path.is_dir()}
    for part in (*PARTS, *parts):
        name = part.replace("_", "")
        matches = [path for path in plain if plain[path].startswith(name)]
        matches.sort(key=lambda path: plain[path] != name)             # an equal name first
        if matches:
            folders[part] = matches[0]
    records = Records([], {})
    for file, part in zip(files, parts):
        # If no data set has its own folder, look everywhere. If some have one, an image of the
        # same name in the folder of another data set would be another image.
        missing = root / "images" / part if folders else root
        collector = Collector(folders.get(part, missing), kept=records)
        for number, row in read_json_lines(file):
            where = f"{file}, line {number}"
            if row is None:
                collector.refuse("no JSON object", where)
                continue
            collector.add(
                where, f"{file.stem}-{number}", row.get("image_id"), row.get("question"),
                row.get("bbox"), size=(row.get("image_width"), row.get("image_height")), kind=part)
        records = collector.records
    records.note = f"missing: {', '.join(absent)}" if absent else ""
    return records
