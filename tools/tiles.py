"""`python data.py --tile N SCENES OUT`: cuts scenes and their boxes into a `jsonl` data set."""
import json
import re
from argparse import Namespace
from collections import Counter, defaultdict
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from qwen.answer import clamp_box
from readers import collect, jsonl
from readers.base import SPLITS, DataError, NoSplit, Record, in_words
from readers.images import ImageError, read_rgb
from readers.views import Window, read_place, windows
from train.dist import check_writable

KEPT_AREA = 0.6                   # share of a box's area in a tile from which the tile has the box
WHERE = (r"(?:upper|lower|top|bottom|left|right|middle|cent(?:er|re)|"
         r"(?:north|south|east|west)[a-z]*)")
PART = r"(?:hand|side|part|corner|half|area|portion|region|edge|end)"
IN_IMAGE = r"(?:the |this |an? )?(?:whole |entire )?(?:image|picture|photo|scene|frame|view|tile)"
# What may be wrong in a part of the image: superlatives, and positions ("on the left side", "the
# upper ship"). "left of the pier" is a relation, which holds wherever both can be seen.
HOLDS_IN_WHOLE = re.compile(
    r"\b(?!(?:almost|(?:north|south)?-?west|(?:rain)?forest|rest|nest|crest|test|chest|guest)\b)"
    rf"\w*(?:most|est)\b|\b{WHERE}(?:[ -]+(?:{WHERE}|{PART})\b)*+"
    rf"(?! (?:of|to|from) (?!{IN_IMAGE}))", re.IGNORECASE)


def cut_scenes(args: Namespace) -> None:
    scenes, out = map(Path, args.names)
    if any(check_writable(out).iterdir()):
        raise DataError(f"{out} is not empty; name a new folder for the tiles")
    by_image = read_scenes(scenes, args)
    folder = scenes if scenes.is_dir() else scenes.parent
    stems = Counter(path.with_suffix("") for path in by_image)
    lines = defaultdict(list)                    # split -> lines of its file
    tiles, changed, missed = 0, [], 0
    for path, found in tqdm(by_image.items(), "cutting", leave=False, unit="img", disable=None):
        try:
            image, (transform, crs) = read_rgb(path, args.stretch), read_place(path)
        except (OSError, ImageError) as error:
            raise DataError(f"{path}: unreadable ({error}); repair or remove it") from None
        scene = path.relative_to(folder)
        stem = scene.with_suffix("") if stems[path.with_suffix("")] == 1 else scene
        places = windows(image.size, args.tile, args.overlap)
        cut = len(places) > 1 and not args.keep_places
        changed += [r.text for _, r in found if cut and HOLDS_IN_WHOLE.search(r.text)]
        holding = [pair for pair in found if not (cut and HOLDS_IN_WHOLE.search(pair[1].text))]
        placed = set()
        for window in places:
            x, y, right, bottom = window
            name = f"{stem}_{x}_{y}{'.tif' if crs else '.png'}"
            kept = set()
            for split, record in holding:
                x1, y1, x2, y2 = record.box
                box = clamp_box((x1 - x, y1 - y, x2 - x, y2 - y), (right - x, bottom - y))
                inside = (box[2] - box[0]) * (box[3] - box[1]) if box else 0
                if inside >= KEPT_AREA * (x2 - x1) * (y2 - y1):
                    kept.add((split, record.id))
                    lines[split].append(json.dumps({
                        "image": name, "id": f"{record.id}_{x}_{y}", "text": record.text,
                        "box": box, "category": record.category, "scene": str(scene),
                        "corner": [x, y]}) + "\n")
            placed |= kept
            if kept or not found:
                tiles += 1
                save_tile(out / name, image, window, transform, crs)
        missed += len(holding) - len(placed)
    for split, some in lines.items():
        (out / f"{split}.jsonl").write_text("".join(some))
        print(f"{split}: {len(some):,} records in tiles")
    if changed:
        print(f"left out: {len(changed):,} expressions that may not hold in a tile, such as "
              f"{changed[0]!r}; --keep-places keeps them")
    if missed:
        print(f"left out: {missed:,} records: no tile has {KEPT_AREA:.0%} of the box")
    print(f"{tiles:,} tiles of {len(by_image):,} images: {out}")
    if "train" in lines and "val" not in lines and tiles > len(by_image):
        print("no val: training will hold out tiles, which may share objects with other tiles of "
              "their scene; to hold out whole scenes, write their records into val.jsonl and cut "
              "again")


def read_scenes(scenes: Path, args: Namespace) -> dict[Path, list[tuple[str, Record]]]:
    """-> image -> (split, record) of each box in it. Splits are as the files have them: none is
    made of another one."""
    by_image = defaultdict(list)
    before = collect.reading.set((args.coords, tuple(args.stretch) if args.stretch else None))
    annotated = scenes.is_file() or collect.visible_files(scenes, "*.jsonl")
    for split in (args.split or (*SPLITS, "sft", "rft")) if annotated else ():
        with suppress(NoSplit):
            records = jsonl.read(scenes, split)
            for record in records:
                by_image[record.image].append((split, record))
            print(f"{split}: {len(records):,} records, refused: {in_words(records.refusals) or 0}")
    collect.reading.reset(before)
    if not annotated:
        files = collect.visible_files(scenes, "**/*")
        by_image = {p: [] for p in files if p.suffix.lower() in collect.IMAGE_SUFFIXES}
    if not by_image:
        raise DataError(f"{scenes}: no image to cut; name a folder of images, or of images and "
                        "JSONL files (a split of another name: --split)")
    return by_image


def save_tile(file: Path, scene: Image.Image, window: Window, transform: Any, crs: Any) -> None:
    """transform, crs: the scene's, from `read_place`; with them, the tile is a GeoTIFF."""
    file.parent.mkdir(parents=True, exist_ok=True)
    tile = scene.crop(window)
    if not crs:
        return tile.save(file)
    import rasterio.windows
    moved = rasterio.windows.transform(rasterio.windows.Window(*window[:2], *tile.size), transform)
    with rasterio.open(
            file, "w", driver="GTiff", width=tile.width, height=tile.height, count=3,
            dtype="uint8", photometric="RGB", compress="deflate", crs=crs, transform=moved) as tiff:
        tiff.write(np.moveaxis(np.asarray(tile), -1, 0))
