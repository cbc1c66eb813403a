"""readers.dior."""
import itertools
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from readers.base import SPLITS, DataError, NoSplit, Records, zip_hint
from readers.collect import Annotation, Collector, visible_files


@dataclass(frozen=True)
class DiorLayout:
    """What differs between the data sets of DIOR-RSVG's layout."""

    name: str
    image_folder: str
    # Lines of a split file that mark a generation withdrawn by its authors.
    withdrawn: dict[str, int]


DIOR = DiorLayout("dior", "JPEGImages", {"train": 15_328, "val": 3_832, "test": 19_160})
OPT = DiorLayout("opt", "Image", {})


def read_dior(root: Path, split: str) -> Records:
    """DIOR-RSVG as it is downloaded."""
    return read_dior_layout(root, split, DIOR)


def read_opt(root: Path, split: str) -> Records:
    """OPT-RSVG: DIOR-RSVG's scheme with boxes in fractions of a pixel.

    Its images are in Image/ or JPEGImages/, its split files in split/.
    """
    return read_dior_layout(root, split, OPT)


def read_dior_layout(root: Path, split: str, layout: DiorLayout) -> Records:
    """Annotations/*.xml, images, and split files of indices.

    An index is that of an <object>, counted from 0 over all XML files sorted by path: every
    object counts, a refused one too, or all later indices would shift.
    """
    split = {"sft": "train", "rft": "train"}.get(split, split)
    if split not in SPLITS:
        raise NoSplit(f"{layout.name} has no split {split!r}; it has {', '.join(SPLITS)}")
    splits = dior_indices(root, layout.withdrawn)
    indices = set(splits[split])
    folder = root / "Annotations"
    files = visible_files(folder, "**/*.xml")
    if not files:
        raise DataError(
            f"no annotations at {folder}/*.xml{zip_hint(root)}; --root must name the folder that "
            f"holds Annotations and {layout.image_folder}")
    collector = Collector(root, layout.image_folder)
    count = 0                     # objects of the files that were read
    image_of = {}                 # file -> the image that it is of
    for file in files:
        tree = read_xml(file)
        image_of[file] = image = (tree.findtext("filename") or "").strip()
        for item in tree.findall("object"):
            index = count
            count += 1
            if index in indices:
                sides = ("xmin", "ymin", "xmax", "ymax")
                collector.add(Annotation(
                    f"{file}, object {index}", str(index), image, item.findtext("description"),
                    [item.findtext(f"bndbox/{side}") for side in sides], item.findtext("name")))
    note = check_object_count(root, count, splits, split, image_of)
    records = collector.records
    records.note = note
    return records


def check_object_count(
        root: Path, count: int, splits: dict[str, list[int]], split: str,
        image_of: dict[Path, str],
) -> str:
    """Compares the objects that were found with the indices that the split files name.

    DataError where they name more, or where files that look like copies of others shift the
    indices. -> a note where they name fewer for no such reason: of a part of the splits.

    image_of: annotation file -> image.
    """
    folder = root / "Annotations"
    # Where another split's are beyond the end, this one's may be shifted.
    for name in (split, *splits):
        beyond = sum(index >= count for index in splits[name])
        if beyond:
            raise DataError(
                f"{root}: {beyond} of the {len(splits[name])} indices of {name} are beyond the "
                f"{count} objects found in {folder}; annotations are missing, or the split files "
                "belong to other data")
    named = sum(map(len, splits.values()))
    copies = find_copies(image_of, count > named)
    if copies:
        suspects = ", ".join(str(file.relative_to(root)) for file in copies[:5])
        more = f" and {len(copies) - 5} more" if len(copies) > 5 else ""
        raise DataError(
            f"{root}: {count} objects are in {folder} where the split files name {named}; "
            f"{suspects}{more} looks like a copy of another annotation, and shifts every later "
            "index; remove it")
    if count == named:
        return ""
    return (
        f"{count:,} objects are in Annotations, of which the split files name {named:,}: right for "
        "a part of the splits alone; a stray annotation would shift every later index")


def find_copies(image_of: dict[Path, str], too_many: bool) -> list[Path]:
    """The annotation files that look like copies of others, by their names or images.

    too_many: either sign is enough; else both are needed. image_of: file -> image.
    """
    by_image: dict[str, list[Path]] = {}
    for file, image in image_of.items():
        by_image.setdefault(image or str(file), []).append(file)
    second = set()
    for files in by_image.values():
        # Of several of one image the shortest path is the original's.
        files.sort(key=lambda file: (len(file.as_posix()), file.as_posix()))
        second.update(files[1:])
    copies = {file for file in image_of if is_copy(file)}
    return sorted(copies | second if too_many else copies & second)


# How file managers and editors call copies: "1 (1)", "1 - Copy", "1_copy", "Copy of 1",
# "1-checkpoint", "1.bak", "1.orig", "1~".
COPY_NAME = re.compile(
    r"(?:copy of )?(.+?)(?: ?\(\d+\)|[-_ ]*copy(?: ?\(?\d+\)?)?|-checkpoint|\.bak|\.orig|\.old|~)*",
    re.IGNORECASE)


def is_copy(file: Path) -> bool:
    """Is a file called as a copy of another one in its folder, which is there?"""
    original = COPY_NAME.fullmatch(file.stem)[1]
    return original != file.stem and file.with_name(original + file.suffix).exists()


XML_ENCODING = re.compile(rb"""^\s*<\?xml[^>]*?encoding\s*=\s*["']([^"']*)["']""")
# Encodings that hold all of a smaller one, under whose name they are often sold.
LARGER_ENCODINGS = {"gb2312": "gb18030", "gbk": "gb18030"}


def read_xml(file: Path) -> ElementTree.Element:
    """The root element of an annotation; DataError where it is unreadable.

    The parser knows encodings of one byte a character, UTF-8 and UTF-16; others are decoded here.
    """
    try:
        content = file.read_bytes()
        declared = XML_ENCODING.match(content)
        try:
            return ElementTree.fromstring(content)
        except (LookupError, ValueError):
            if not declared:
                raise
            name = declared[1].decode("ascii", "replace").lower()
            # In a text the declaration means nothing to the parser.
            return ElementTree.fromstring(content.decode(LARGER_ENCODINGS.get(name, name)))
    except (ElementTree.ParseError, LookupError, ValueError, OSError) as error:
        raise DataError(
            f"{file}: unreadable annotation ({' '.join(str(error).split())}); without its objects "
            "every later index would be wrong") from None


def dior_indices(
        root: Path, withdrawn: dict[str, int] = DIOR.withdrawn,
) -> dict[str, list[int]]:
    """The split files, in root or in root/split: name -> indices.

    DataError where they are not whole numbers, not disjoint, or of a generation that was
    withdrawn. withdrawn: name -> lines that mark it.
    """
    if not (root / "train.txt").exists() and (root / "split").is_dir():
        root = root / "split"
    splits = {name: read_indices(root / f"{name}.txt", root) for name in SPLITS}
    for name, indices in splits.items():
        if len(indices) == withdrawn.get(name):
            raise DataError(
                f"{root / name}.txt has {len(indices)} lines: the split generation withdrawn by "
                "its authors in 2023, which leaks test into train beside the current one; "
                "download the current train.txt, val.txt, test.txt")
    counts = Counter(itertools.chain.from_iterable(splits.values()))
    if min(counts, default=0) < 0:
        raise DataError(
            f"{root}: the split files hold an index below 0; download them again")
    repeated = [index for index, n in counts.items() if n > 1]
    if repeated:
        raise DataError(
            f"{root}: the split files overlap or repeat an index ({repeated[:3]}), so test would "
            "leak into train; download them again")
    return splits


def read_indices(file: Path, root: Path) -> list[int]:
    """The whole numbers of a split file."""
    try:
        return [int(line) for line in file.read_text(encoding="utf-8-sig").split()]
    except OSError:
        raise DataError(
            f"no split file {file}{zip_hint(root)}; --root must name the folder that holds "
            "Annotations, images, train.txt, val.txt, test.txt") from None
    except ValueError as error:
        raise DataError(f"{file}: not one index a line ({error})") from None
