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

import data
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
        help=f"one of {', '.join(data.READERS)}, or a mixture like dior+vrsbench:0.5")
    add("--root", help="its folder; default data/<name>; for a mixture or several data sets the "
        "folder that holds theirs, default data")
    add("--split", nargs="+", help="splits to check; default those of train, val, test that "
        "exist; for several data sets those of rft, val, test: rft is train without what is held "
        "out as val")
    data.add_reading_flags(add)
    add("--places", type=int, default=20, help="places listed for each reason; 0: all")
    add("--show", type=int, default=12,
        help="records of the first split on the contact sheet; several data sets have none")
    add("--out", default="data_check.png", help="file of the contact sheet")
    args = parser.parse_args()
    # A name in a data set may hold what no encoding has.
    sys.stdout.reconfigure(errors="backslashreplace")
    try:
        check_data(args)
    except DataError as error:
        print(f"data.py: {error}", file=sys.stderr)
        sys.exit(2)


def check_data(args: argparse.Namespace) -> None:
    """Prints what is in the data sets. DataError at the end if an image can't be decoded."""
    several = len(args.names) > 1
    if len(set(args.names)) < len(args.names):
        raise DataError(f"{' '.join(args.names)}: a data set comes twice; name each once")
    loaded: dict[tuple[str, str], Records] = {}      # by name and split
    for name in args.names:
        is_mixture = "+" in name or ":" in name
        root = Path(args.root or "data", name) if several and not is_mixture else args.root
        splits = args.split or (("rft", "val", "test") if several else SPLITS)
        for split in splits:
            try:
                records = data.load(name, root, split, args.coords, args.stretch)
            except NoSplit as error:
                found = any(key[0] == name for key in loaded)
                if args.split or split == splits[-1] and not found:
                    raise
                print(f"{name} {split}: {error}")
                continue
            loaded[name, split] = records
            print_split(name, split, records, args.places)
    if not several:
        for (_, a), (_, b) in itertools.combinations(loaded, 2):
            images = [{r.image for r in loaded[args.names[0], split]} for split in (a, b)]
            print(f"images in both {a} and {b}: {len(images[0] & images[1]):,}")
    # Drawn scenes need no decoding.
    everything = itertools.chain.from_iterable(loaded.values())
    files = {r.image: r for r in everything if isinstance(r.image, Path)}
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
    for (_, split), records in loaded.items() if args.show > 0 and not several else ():
        whole = [r for r in records if r.image not in broken]
        if whole:
            # Spread evenly over the first split that has any.
            shown = whole[::max(1, len(whole) // args.show)][:args.show]
            pictures = [draw_boxes(data.open_image(r), [(r.box, "red")], r.text) for r in shown]
            save_sheet(pictures, args.out)
            print(f"{len(shown)} records of {split} with their boxes: {args.out}")
            break
    if broken:
        raise DataError(
            f"{len(broken):,} of {len(files):,} images can't be decoded; a run replaces their "
            f"records by others, and ends if they are more than {MOST_UNREADABLE:.0%} of all; "
            "repair or remove those listed above")


def pixel_hash(record: Record) -> str:
    image = data.open_image(record)
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
    published = data.PUBLISHED.get(name, {}).get(split)
    if published:
        comparison = "as published"
        if n < published:
            comparison = f"{published:,} are published; a subset, {n / published:.1%} of it"
        elif n > published:
            comparison = f"{published:,} are published; more than published: another version?"
        print(f"  expressions found: {n:,}, {comparison}")
    if records.note:
        print(f"  {records.note}")
    for verb, reasons in (("refused", records.refused), ("repaired", records.repaired)):
        for reason, where in reasons.items():
            print_places(f"  {verb}, {reason}", where, places)
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


def print_shared(loaded: dict[tuple[str, str], Records], hashes: dict[Any, str]) -> None:
    """Prints how much of each scored split is in each training split.

    hashes: image -> hash of its pixels. A drawn scene has none and is its own key.
    """
    width = max(len("trained on"), *(len(f"{name} {split}") for name, split in loaded)) + 2
    print(
        "What is scored and trained on too. An image by its name, or by all its pixels (a copy "
        "that was compressed\nagain or resized has others); a record by its image and a box of "
        f"IoU {data.SAME_BOX} or more:")
    print(
        f"{'trained on':{width}}{'scored':{width}}{'images: name':>17}{'pixels':>17}"
        f"{'records: name':>17}{'pixels':>17}")
    for trained, scored in itertools.product(loaded, loaded):
        if not data.is_training(trained[1]) or data.is_training(scored[1]):
            continue
        records = loaded[scored]
        n_images = len({r.image for r in records})
        of_images = []            # (shared, all) by name, by pixels
        of_records = []
        for image_key in (data.image_name, lambda r: hashes.get(r.image, r.image)):
            shared = data.find_shared(records, loaded[trained], image_key)
            shared_images = {r.image for r, what in zip(records, shared) if what}
            of_images.append((len(shared_images), n_images))
            of_records.append((shared.count("record"), len(records)))
        cells = [f"{n:,} ({n / max(total, 1):.0%})" for n, total in of_images + of_records]
        row = "".join(f"{cell:>17}" for cell in cells)
        print(f"{' '.join(trained):{width}}{' '.join(scored):{width}}{row}")


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
