"""tools.check_data."""
import argparse
import hashlib
import itertools
import sys
from collections.abc import Callable, Iterable, Sequence
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
    DataParser,
    add_reading_flags,
    find_shared,
    image_name,
    is_training,
    load,
    open_image,
)
from readers.base import MOST_UNREADABLE, SPLITS, DataError, NoSplit, Record, Records
from report.pictures import contact_sheet, draw_boxes


def flags() -> DataParser:
    parser = DataParser(
        description="Checks a data set: counts beside the published ones, refused and repaired "
        "records by reason, sizes of the boxes, images that splits share, images that can't be "
        "decoded, a contact sheet. Of several: what is trained on in one and scored in another")
    add = parser.add_argument
    add("names", nargs="+", metavar="name",
        help=f"one of {', '.join(READERS)}, or a mixture like dior+vrsbench:0.5")
    add("--root",
        help="its folder; default data/<name>; of a mixture, and of several data sets, the "
        "folder that holds theirs, default data")
    add("--split", nargs="+",
        help="splits to check; default those of train, val, test that there are; of several "
        "data sets of rft, val, test: rft is train less what is held out of it as val")
    add_reading_flags(add)
    add("--places", type=int, default=20, help="places listed for a reason; 0: all")
    add("--show", type=int, default=12,
        help="records of the first split on the contact sheet; several data sets have none")
    add("--out", default="data_check.png", help="where the contact sheet goes")
    return parser


def main() -> None:
    args = flags().parse_args()
    # A name in a data set may hold what no encoding has.
    sys.stdout.reconfigure(errors="backslashreplace")
    try:
        if len(args.names) == 1:
            check_data_set(args)
        else:
            check_shared(args)
    except DataError as error:
        print(f"data.py: {error}", file=sys.stderr)
        sys.exit(2)


def check_data_set(args: argparse.Namespace) -> None:
    """Prints what is in a data set; DataError where an image can't be decoded."""
    loaded = load_splits(args.names[0], args.root, args)
    for a, b in itertools.combinations(loaded, 2):
        shared = {r.image for r in loaded[a]} & {r.image for r in loaded[b]}
        print(f"images in both {a} and {b}: {len(shared):,}")
    hashes, broken = decode_images(itertools.chain.from_iterable(loaded.values()), args.places)
    show_records(loaded, broken, args)
    refuse_broken(hashes, broken)


def check_shared(args: argparse.Namespace) -> None:
    """Prints what is in several data sets, and what they share.

    DataError where an image can't be decoded.
    """
    if len(set(args.names)) < len(args.names):
        raise DataError(f"{' '.join(args.names)}: a data set comes twice; name each once")
    loaded = {}
    for name in args.names:
        is_mixture = "+" in name or ":" in name
        root = args.root if is_mixture else Path(args.root or "data") / name
        # Trained on is what rft gets: train, less what is held out of it as val.
        for split, records in load_splits(name, root, args, ("rft", "val", "test")).items():
            loaded[f"{name} {split}"] = records
    hashes, broken = decode_images(itertools.chain.from_iterable(loaded.values()), args.places)
    print_shared(loaded, hashes)
    refuse_broken(hashes, broken)


def print_shared(loaded: dict[str, Records], hashes: dict[Any, str]) -> None:
    """Prints how much of each split that is scored is in each split that is trained on.

    loaded: by name and split. hashes: of the images' pixels; a drawn scene has none, and is its
    own.
    """
    def image_pixels(record: Record) -> Any:
        return hashes.get(record.image, record.image)

    training = [title for title in loaded if is_training(title.split()[-1])]
    scored = [title for title in loaded if title not in training]
    width = max(len("trained on"), *map(len, loaded)) + 2
    print(
        "What is scored and trained on too. An image by its name, or by all its pixels (a copy "
        "that was compressed\nagain or resized has others); a record by its image and a box of "
        f"IoU {SAME_BOX} or more:")
    print(
        f"{'trained on':{width}}{'scored':{width}}{'images: name':>17}{'pixels':>17}"
        f"{'records: name':>17}{'pixels':>17}")
    for title in training:
        for other in scored:
            by_name = count_shared(loaded[other], loaded[title], image_name)
            by_pixels = count_shared(loaded[other], loaded[title], image_pixels)
            cells = (by_name[0], by_pixels[0], by_name[1], by_pixels[1])
            row = "".join(f"{cell:>17}" for cell in cells)
            print(f"{title:{width}}{other:{width}}{row}")


def count_shared(
        records: Records, training: Records, image_key: Callable[[Record], Any],
) -> tuple[str, str]:
    """How many images, and how many records, are in the training data: "1,202 (31%)" each."""
    shared = find_shared(records, training, image_key)
    images = {r.image for r in records}
    shared_images = {r.image for r, what in zip(records, shared) if what}
    n = shared.count("record")
    return (
        f"{len(shared_images):,} ({len(shared_images) / max(len(images), 1):.0%})",
        f"{n:,} ({n / max(len(records), 1):.0%})")


def load_splits(
        name: str, root: str | Path | None, args: argparse.Namespace,
        splits: Sequence[str] = SPLITS,
) -> dict[str, Records]:
    """Loads and prints the splits that are asked for, or those of `splits` that there are.

    DataError where one that is asked for is not there, or none is.
    """
    loaded: dict[str, Records] = {}
    for split in args.split or splits:
        try:
            loaded[split] = load(name, root, split, args.coords, args.stretch)
        except NoSplit as error:
            last = split == splits[-1] and not loaded
            if args.split or last:
                raise
            print(f"{name} {split}: {error}")
            continue
        print_split(name, split, loaded[split], args.places)
    return loaded


def decode_images(
        records: Iterable[Record], places: int,
) -> tuple[dict[Any, str], dict[Any, str]]:
    """Decodes each image to its end -> hashes of their pixels; what is wrong with the others.

    Prints how many there are. A drawn scene needs no decoding, and is in neither.
    """
    files = {}                    # image -> a record of it
    for record in records:
        if not hasattr(record.image, "draw"):
            files[record.image] = record

    def pixel_hash(record: Record) -> tuple[str | None, str | None]:
        try:
            image = open_image(record)
        except DataError as error:
            return None, str(error)
        pixels = hashlib.sha256(repr(image.size).encode() + image.tobytes())
        return pixels.hexdigest(), None

    with ThreadPoolExecutor(8) as pool:
        results = list(tqdm(
            pool.map(pixel_hash, files.values()), total=len(files), desc="decoding", unit="img",
            leave=False, disable=None))
    hashes = {image: pixels for image, (pixels, _) in zip(files, results) if pixels}
    broken = {image: problem for image, (_, problem) in zip(files, results) if problem}
    if files:
        title = f"images decoded: {len(files):,}, unreadable"
        print_places(title, list(broken.values()), places)
    return hashes, broken


def refuse_broken(hashes: dict[Any, str], broken: dict[Any, str]) -> None:
    """DataError where there is an image that can't be decoded."""
    if broken:
        raise DataError(
            f"{len(broken):,} of {len(hashes) + len(broken):,} images can't be decoded; a run "
            "takes another record in the place of each that it meets, and ends where they are more "
            f"than {MOST_UNREADABLE:.0%} of its records; repair or remove those listed above")


def show_records(
        loaded: dict[str, Records], broken: dict[Any, str], args: argparse.Namespace,
) -> None:
    """Draws records of the first split that has any, evenly spread over it."""
    if args.show <= 0:
        return
    for split, records in loaded.items():
        whole = [r for r in records if r.image not in broken]
        if not whole:
            continue
        shown = whole[::max(1, len(whole) // args.show)][:args.show]
        pictures = [draw_boxes(open_image(r), [(r.box, "red")], r.text) for r in shown]
        save_sheet(pictures, args.out)
        print(f"{len(shown)} records of {split} with their boxes: {args.out}")
        return


def save_sheet(pictures: list[Image.Image], path: str | Path) -> None:
    """Writes images of one width to a picture's file, in rows; DataError where that can't be."""
    try:
        contact_sheet(pictures).save(path)
    except (OSError, ValueError, KeyError) as error:
        # There is no such folder or format, or the format is only read.
        raise DataError(
            f"the contact sheet can't be written to {path} ({error}); name another file with "
            "--out") from None


def print_split(name: str, split: str, records: Records, places: int) -> None:
    """Prints what is in a split. places: to list for a reason, 0 for all."""
    refused = sum(map(len, records.refused.values()))
    repaired = sum(map(len, records.repaired.values()))
    print(
        f"{name} {split}: {len(records):,} records, {refused:,} refused, {repaired:,} repairs, "
        f"{len({r.image for r in records}):,} images, {len({r.category for r in records})} "
        f"categories, hash {records.hash}")
    print_published(len(records) + refused, PUBLISHED.get(name, {}).get(split))
    if records.note:
        print(f"  {records.note}")
    for reason, where in records.refused.items():
        print_places(f"  refused, {reason}", where, places)
    for reason, where in records.repaired.items():
        print_places(f"  repaired, {reason}", where, places)
    if records:
        print_areas(records)


def print_published(expressions: int, published: int | None) -> None:
    """Prints a split's count beside the published one, where there is one."""
    if not published:
        return
    if expressions == published:
        comparison = "as published"
    elif expressions < published:
        comparison = (
            f"{published:,} are published; a subset, {expressions / published:.1%} of it")
    else:
        comparison = (
            f"{published:,} are published; more than published: is this another version?")
    print(f"  expressions found: {expressions:,}, {comparison}")


def print_areas(records: Records) -> None:
    """Prints how large the boxes are, in percent of their images' areas."""
    areas = []
    for r in records:
        x1, y1, x2, y2 = r.box
        areas.append((x2 - x1) * (y2 - y1) / (r.size[0] * r.size[1]))
    percent = np.array(areas) * 100
    shares = (5, 25, 50, 75, 95)
    quantiles = np.percentile(percent, shares)
    words = ", ".join(f"{share}% {value:.3g}" for share, value in zip(shares, quantiles))
    print(
        f"  box area in % of the image, quantiles: {words}; below 1%: "
        f"{(percent < 1).mean():.1%} of the boxes")


def print_places(title: str, where: list[str], most: int) -> None:
    """Prints a title, how many places there are, and the first of them; most: 0 for all."""
    print(f"{title}: {len(where):,}")
    for place in where[:most or None]:
        print(f"    {place}")
    if 0 < most < len(where):
        print(f"    and {len(where) - most:,} more; --places 0 lists all")


if __name__ == "__main__":
    main()
