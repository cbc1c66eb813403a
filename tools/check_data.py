"""`python data.py NAME...`: what is in a data set, or what several data sets share."""
import argparse
import hashlib
import itertools
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from data import (
    PUBLISHED,
    READERS,
    SAME_BOX,
    add_reading_flags,
    find_shared,
    image_name,
    is_training,
    load,
    open_image,
)
from readers.base import MOST_UNREADABLE, SPLITS, DataError, NoSplit, Record, Records
from report.pictures import contact_sheet, draw_boxes


def main() -> None:
    parser = argparse.ArgumentParser(prog="data.py", description=(
        "Checks a data set: counts next to the published ones, refused and repaired records by "
        "reason, sizes of the boxes, images that splits share, images that can't be decoded, a "
        "contact sheet. Of several: what is trained on in one and scored in another"))
    # A wrong flag is one line.
    parser.error = lambda message: parser.exit(
        2, f"data.py: {message}; data.py --help explains every flag\n")
    add = parser.add_argument
    add("names", nargs="+", metavar="name",
        help=f"one of {', '.join(READERS)}, or a mixture like dior+vrsbench:0.5")
    add("--root",
        help="its folder; default data/<name>; for a mixture or several data sets the folder that "
        "holds theirs, default data")
    add("--split", nargs="+",
        help="splits to check; default those of train, val, test that exist; for several data "
        "sets those of rft, val, test: rft is train without what is held out as val")
    add_reading_flags(add)
    add("--places", type=int, default=20, help="places listed for each reason; 0: all")
    add("--show", type=int, default=12,
        help="records of the first split on the contact sheet; several data sets have none")
    add("--out", default="data_check.png", help="file of the contact sheet")
    args = parser.parse_args()
    # A name in a data set may hold what no encoding has.
    sys.stdout.reconfigure(errors="backslashreplace")
    try:
        check(args)
    except DataError as error:
        print(f"data.py: {error}", file=sys.stderr)
        sys.exit(2)


def check(args: argparse.Namespace) -> None:
    """Prints what is in the data sets. DataError at the end if an image can't be decoded."""
    several = len(args.names) > 1
    if len(set(args.names)) < len(args.names):
        raise DataError(f"{' '.join(args.names)}: a data set comes twice; name each once")
    loaded: dict[str, Records] = {}                  # by name and split
    for name in args.names:
        root = args.root
        if several and "+" not in name and ":" not in name:
            root = Path(root or "data") / name
        splits = args.split or (("rft", *SPLITS[1:]) if several else SPLITS)
        found = False
        for split in splits:
            try:
                records = load(name, root, split, args.coords, args.stretch)
            except NoSplit as error:
                if args.split or split == splits[-1] and not found:
                    raise
                print(f"{name} {split}: {error}")
                continue
            found = True
            loaded[f"{name} {split}"] = records
            print_split(name, split, records, args.places)
    if not several:
        for a, b in itertools.combinations(loaded, 2):
            shared = {r.image for r in loaded[a]} & {r.image for r in loaded[b]}
            print(f"images in both {a.split()[-1]} and {b.split()[-1]}: {len(shared):,}")
    # Drawn scenes need no decoding.
    records = itertools.chain.from_iterable(loaded.values())
    files = {r.image: r for r in records if isinstance(r.image, Path)}
    hashes: dict[Path, str] = {}                     # image -> hash of its pixels
    broken: dict[Path, str] = {}                     # image -> what is wrong with it
    with ThreadPoolExecutor(8) as pool:
        jobs = {path: pool.submit(pixel_hash, record) for path, record in files.items()}
        for path in tqdm(jobs, desc="decoding", unit="img", leave=False, disable=None):
            try:
                hashes[path] = jobs[path].result()
            except DataError as error:
                broken[path] = str(error)
    if files:
        title = f"images decoded: {len(files):,}, unreadable"
        print_places(title, list(broken.values()), args.places)
    if several:
        print_shared(loaded, hashes)
    for title, records in loaded.items() if args.show > 0 and not several else ():
        whole = [r for r in records if r.image not in broken]
        if whole:
            # Spread evenly over the first split that has any.
            shown = whole[::max(1, len(whole) // args.show)][:args.show]
            pictures = [draw_boxes(open_image(r), [(r.box, "red")], r.text) for r in shown]
            save_sheet(pictures, args.out)
            split = title.split()[-1]
            print(f"{len(shown)} records of {split} with their boxes: {args.out}")
            break
    if broken:
        raise DataError(
            f"{len(broken):,} of {len(files):,} images can't be decoded; a run replaces each "
            f"record of one by another record, and ends if they are more than "
            f"{MOST_UNREADABLE:.0%} of its records; repair or remove those listed above")


def pixel_hash(record: Record) -> str:
    image = open_image(record)
    return hashlib.sha256(repr(image.size).encode() + image.tobytes()).hexdigest()


def print_split(name: str, split: str, records: Records, places: int) -> None:
    """Prints what is in a split. places: most to list for a reason; 0: all."""
    refused = sum(records.refusals.values())
    print(
        f"{name} {split}: {len(records):,} records, {refused:,} refused, "
        f"{sum(map(len, records.repaired.values())):,} repairs, "
        f"{len({r.image for r in records}):,} images, {len({r.category for r in records})} "
        f"categories, hash {records.hash}")
    n = len(records) + refused
    published = PUBLISHED.get(name, {}).get(split)
    if published:
        comparison = "as published"
        if n < published:
            comparison = f"{published:,} are published; a subset, {n / published:.1%} of it"
        elif n > published:
            comparison = (
                f"{published:,} are published; more than published: is this another version?")
        print(f"  expressions found: {n:,}, {comparison}")
    if records.note:
        print(f"  {records.note}")
    for reason, where in records.refused.items():
        print_places(f"  refused, {reason}", where, places)
    for reason, where in records.repaired.items():
        print_places(f"  repaired, {reason}", where, places)
    if records:
        boxes = np.array([r.box for r in records])                             # (N, 4)
        areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        percent = areas / np.array([r.size for r in records]).prod(1) * 100
        shares = (5, 25, 50, 75, 95)
        quantiles = zip(shares, np.percentile(percent, shares))
        words = ", ".join(f"{share}% {value:.3g}" for share, value in quantiles)
        print(
            f"  box area in % of the image, quantiles: {words}; below 1%: "
            f"{(percent < 1).mean():.1%} of the boxes")


def print_places(title: str, where: Sequence[str], most: int) -> None:
    """Prints a title, the number of places, and the first of them. most: 0 for all."""
    print(f"{title}: {len(where):,}")
    for place in where[:most or None]:
        print(f"    {place}")
    if 0 < most < len(where):
        print(f"    and {len(where) - most:,} more; --places 0 lists all")


def print_shared(loaded: dict[str, Records], hashes: dict[Any, str]) -> None:
    """Prints how much of each scored split is in each training split.

    loaded: by name and split. hashes: image -> hash of its pixels; a scene is its own.
    """
    training = [title for title in loaded if is_training(title.split()[-1])]
    width = max(len("trained on"), *map(len, loaded)) + 2
    print(
        "What is scored and trained on too. An image by its name, or by all its pixels (a copy "
        "that was compressed\nagain or resized has others); a record by its image and a box of "
        f"IoU {SAME_BOX} or more:")
    print(
        f"{'trained on':{width}}{'scored':{width}}{'images: name':>17}{'pixels':>17}"
        f"{'records: name':>17}{'pixels':>17}")
    for title, other in itertools.product(training, [t for t in loaded if t not in training]):
        records = loaded[other]
        images = {r.image for r in records}
        cells = {}
        for column, key in enumerate((image_name, lambda r: hashes.get(r.image, r.image))):
            shared = find_shared(records, loaded[title], key)
            shared_images = {r.image for r, what in zip(records, shared) if what}
            n = shared.count("record")
            cells[column] = f"{len(shared_images):,} ({len(shared_images) / max(len(images), 1):.0%})"
            cells[column + 2] = f"{n:,} ({n / max(len(records), 1):.0%})"
        row = "".join(f"{cells[column]:>17}" for column in range(4))
        print(f"{title:{width}}{other:{width}}{row}")


def save_sheet(pictures: Sequence[Image.Image], path: str | Path) -> None:
    """Writes images of one width to a file, in rows."""
    try:
        contact_sheet(pictures).save(path)
    except (OSError, ValueError, KeyError) as error:
        # No such folder or format, or the format is only read.
        raise DataError(
            f"the contact sheet can't be written to {path} ({error}); name another file with "
            "--out") from None


if __name__ == "__main__":
    main()
