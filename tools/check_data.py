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
from tools import tiles
from train.flags import FlagParser, add_reading_flags, natural, positive
from train.run import launch


def main() -> None:
    parser = FlagParser(
        description="Checks a data set: counts next to the published ones, refused and repaired "
        "records, sizes of the boxes, images that splits share or that can't be decoded, a contact "
        "sheet. With several: records that are trained on in one and scored in another. With "
        "--tile: cuts the images in the folder SCENES, and their boxes if it has JSONL files as "
        "--data jsonl reads them, into the new folder OUT", usage="%(prog)s name [name ...] "
        "[options]\n       %(prog)s --tile N --overlap N SCENES OUT [options]")
    add = parser.add_argument
    add("names", nargs="*", default=argparse.SUPPRESS, metavar="name",
        help=f"one of {', '.join(data.READERS)}, or a mixture like dior+vrsbench:0.5")
    add("--data", dest="names", nargs="+", metavar="NAME", help="the same")
    add("--root", help="its folder, default data/<name>; for a mixture or several data sets the "
        "folder that holds theirs, default data")
    add("--split", nargs="+", help="default: those of train, val, test that exist; for several "
        "data sets rft, val, test, where rft is train without what is held out as val")
    add_reading_flags(add, "--coords")
    add("--places", type=int, default=20, help="places listed for each reason; 0: all")
    add("--show", type=int, default=12, help="records of one data set on its contact sheet")
    add("--out", default="data_check.png", help="file of the contact sheet")
    add("--tile", type=positive, help="side of the tiles, pixels")
    add("--overlap", type=natural, default=0, help="pixels that neighbouring tiles share")
    add("--keep-places", action="store_true", help="keep expressions such as 'the leftmost ship' "
        "and 'the ship at the top', which may not hold in a tile")
    args = parser.parse_args()
    if not args.names:
        raise DataError("name a data set: python data.py dior")
    if args.tile:
        if len(args.names) != 2 or args.overlap >= args.tile:
            raise DataError("--tile needs two folders, SCENES and OUT, and a smaller --overlap")
        return tiles.cut_scenes(args)
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
                loaded[name, split] = data.load(name, root, split, args.coords, args.stretch)
                print_split(name, split, loaded[name, split], args.places)
            except NoSplit as error:
                found = any(key[0] == name for key in loaded)
                if args.split or split == splits[-1] and not found:
                    raise
                print(f"{name} {split}: {error}")
    if not several:
        for a, b in itertools.combinations(loaded, 2):
            both = {r.image for r in loaded[a]} & {r.image for r in loaded[b]}
            held_out = b[1] == "val" and "leave out" in loaded[b].note
            note = ", held out of the splits sft and rft" if held_out else ""
            print(f"images in both {a[1]} and {b[1]}: {len(both):,}{note}")

    # Drawn scenes need no decoding.
    everything = itertools.chain.from_iterable(loaded.values())
    files = {r.image: r for r in everything if isinstance(r.image, Path)}
    with ThreadPoolExecutor(8) as pool:
        decoded = pool.map(pixel_hash, files.values())
        bar = tqdm(decoded, "decoding", len(files), leave=False, unit="img", disable=None)
        hashes = dict(zip(files, bar))
    broken = {path: str(error) for path, error in hashes.items() if isinstance(error, DataError)}
    if files:
        title = f"images decoded: {len(files):,}, unreadable"
        print_places(title, list(broken.values()), args.places)
    if several:
        print_shared(loaded, hashes)
    elif args.show > 0:
        for (_, split), records in loaded.items():
            whole = [r for r in records if r.image not in broken]
            # Spread evenly over the first split with records.
            if shown := whole[::max(1, len(whole) // args.show)][:args.show]:
                boxes = [draw_boxes(data.open_image(r), [(r.box, "red")], r.text) for r in shown]
                save_sheet(boxes, args.out)
                print(f"{len(shown)} records of {split} with their boxes: {args.out}")
                break
    if broken:
        raise DataError(
            f"{len(broken):,} of {len(files):,} images can't be decoded; a run replaces their "
            f"records by others, and ends if they are more than {MOST_UNREADABLE:.0%} of all; "
            "repair or remove those listed above")


def pixel_hash(record: Record) -> str | DataError:
    """Hash of the image's size and pixels, or the error if it can't be decoded."""
    try:
        image = data.open_image(record)
    except DataError as error:
        return error
    return hashlib.sha256(repr(image.size).encode() + image.tobytes()).hexdigest()


def print_split(name: str, split: str, records: Records, places: int) -> None:
    n = len(records) + sum(records.refusals.values())
    print(f"{name} {split}: {len(records):,} records, {n - len(records):,} refused, "
          f"{sum(map(len, records.repaired.values())):,} repairs, "
          f"{len({r.image for r in records}):,} images, {len({r.category for r in records})} "
          f"categories, hash {records.hash}")
    if published := data.PUBLISHED.get(name, {}).get(split):
        comparison = "as published"
        if n < published:
            comparison = f"{published:,} are published; a subset, {n / published:.1%} of it"
        elif n > published:
            comparison = f"{published:,} are published; more than published: another version?"
        print(f"  expressions found: {n:,}, {comparison}")
    if data.TRAINING.fullmatch(split):
        print("  sft.py trains on the split sft, rft.py on rft; a data set without them has train "
              "in their place, less what is held out as val")
    if records.note:
        print(f"  {records.note}")
    for verb, reasons in (("refused", records.refused), ("repaired", records.repaired)):
        for reason, where in reasons.items():
            print_places(f"  {verb}, {reason}", where, places)
    if records:
        boxes = np.array([r.box for r in records])                             # (N, 4)
        areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
        percent = areas / np.array([r.size for r in records]).prod(1) * 100
        words = ", ".join(f"{k}% {np.percentile(percent, k):.3g}" for k in (5, 25, 50, 75, 95))
        print(f"  box area in % of the image, quantiles: {words}; below 1%: "
              f"{(percent < 1).mean():.1%} of the boxes")


def print_places(title: str, where: Sequence[str], most: int) -> None:
    print(f"{title}: {len(where):,}", *where[:most or None], sep="\n    ")
    if 0 < most < len(where):
        print(f"    and {len(where) - most:,} more; --places 0 lists all")


def print_shared(loaded: dict[tuple[str, str], Records], hashes: dict[Any, Any]) -> None:
    width = max(len("trained on"), *(len(f"{name} {split}") for name, split in loaded)) + 2
    print("What is both scored and trained on: the same image by name, or by all pixels (they "
          "change in a copy\ncompressed again or resized); the same record by image and a box of "
          f"IoU {data.SAME_BOX} or more:\n{'trained on':{width}}{'scored':{width}}"
          f"{'images: name':>17}{'pixels':>17}{'records: name':>17}{'pixels':>17}")
    for trained, scored in itertools.product(loaded, loaded):
        if not data.TRAINING.fullmatch(trained[1]) or data.TRAINING.fullmatch(scored[1]):
            continue
        records = loaded[scored]
        n_images = max(len({r.image for r in records}), 1)
        of_images, of_records = [], []
        for pixels in (None, hashes):
            shared = data.find_shared(records, loaded[trained], pixels)
            n = len({r.image for r, what in zip(records, shared) if what})
            of_images.append(f"{n:,} ({n / n_images:.0%})")
            n = shared.count("record")
            of_records.append(f"{n:,} ({n / max(len(records), 1):.0%})")
        cells = "".join(f"{cell:>17}" for cell in of_images + of_records)
        print(f"{' '.join(trained):{width}}{' '.join(scored):{width}}{cells}")


def save_sheet(pictures: Sequence[Image.Image], path: str | Path) -> None:
    """pictures: all of the same width."""
    try:
        contact_sheet(pictures).save(path)
    except (OSError, ValueError, KeyError) as error:
        # There is no such folder or format, or PIL cannot write that format.
        raise DataError(f"the contact sheet can't be written to {path} ({error}); name another "
                        "file with --out") from None


if __name__ == "__main__":
    sys.argv[0] = "data.py"       # for --help and errors; run_path has set this file's name
    launch(main)
