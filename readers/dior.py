"""DIOR-RSVG, and OPT-RSVG, which has the same layout."""
import itertools
import re
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

from readers.base import SPLITS, DataError, NoSplit, Records, first_existing, packed, read_text
from readers.collect import Collector, visible_files

# Numbers of lines of the split files that the authors of DIOR-RSVG withdrew.
WITHDRAWN = {"train": 15_328, "val": 3_832, "test": 19_160}
XML_ENCODING = re.compile(rb"""^\s*<\?xml[^>]*?encoding\s*=\s*["']([^"']*)["']""")
# Text in the larger encoding is often declared as the smaller one.
LARGER_ENCODINGS = {"gb2312": "gb18030", "gbk": "gb18030"}


def read(root: Path, split: str, name: str = "dior", image_folder: str = "JPEGImages",
         withdrawn: dict[str, int] = WITHDRAWN) -> Records:
    """Annotations/*.xml, images, and split files of indices, in root or root/split. Indices count
    <object> elements, refused ones too, from 0 over all XML files sorted by path."""
    if split not in SPLITS:
        raise NoSplit(f"{name} has no split {split!r}; it has {', '.join(SPLITS)}")
    splits = read_indices(root, withdrawn)
    folder = first_existing(root, "Annotations")
    collector = Collector(root, image_folder)
    wanted = set(splits[split])
    count = 0                     # of objects so far
    image_of = {}                 # annotation file -> name of its image
    for file in visible_files(folder, "**/*.xml"):
        tree = read_xml(file)
        image_of[file] = (tree.findtext("filename") or "").strip()
        size = [tree.findtext(f"size/{side}") for side in ("width", "height")]
        for item in tree.findall("object"):
            if count in wanted:
                corners = [item.findtext(f"bndbox/{k}") for k in ("xmin", "ymin", "xmax", "ymax")]
                # A tag within the description, such as <i>, does not end it.
                description = item.find("description")
                text = None if description is None else "".join(description.itertext())
                collector.add(f"{file}, object {count}", str(count), image_of[file], text,
                              corners, item.findtext("name"), size=size)
            count += 1
    # If another split has indices beyond the end, those of this one may be shifted.
    for other in (split, *SPLITS):
        if beyond := sum(index >= count for index in splits[other]):
            archives = packed(root)
            raise DataError(
                f"{root}: {beyond} of the {len(splits[other])} indices of {other} are beyond the "
                f"{count} objects found in {folder}; annotations are missing, or the split files "
                f"belong to other data{archives and f'; is {archives} unpacked?'}")
    named = sum(map(len, splits.values()))
    # Of several annotations of one image, the one with the shortest path is the original: "1.xml",
    # not "1 (1).xml", "1 - Copy.xml", "Copy of 1.xml" or "old/1.xml".
    longest_first = sorted(
        image_of, key=lambda f: (len(f.as_posix()), f.as_posix()), reverse=True)
    original = {image_of[file] or file: file for file in longest_first}
    copies = [str(f.relative_to(root)) for f in image_of if original[image_of[f] or f] != f]
    if copies and count > named:
        more = f" and {len(copies) - 5} more" if len(copies) > 5 else ""
        raise DataError(
            f"{root}: {count} objects are in Annotations, but the split files name {named}; "
            f"{', '.join(copies[:5])}{more} looks like a copy of another annotation and shifts "
            "every later index; remove it")
    records = collector.records
    if count > named:
        records.note = (
            f"{count:,} objects are in Annotations, but the split files name {named:,}: fine if "
            "these are only some of the splits; a stray annotation would shift every later index")
    return records


def read_indices(root: Path, withdrawn: dict[str, int] = WITHDRAWN) -> dict[str, list[int]]:
    folder = first_existing(root, "train.txt", "split/train.txt").parent
    splits = {}
    for name in SPLITS:
        file = first_existing(folder, f"{name}.txt")
        lines = read_text(file).split()
        wrong = [line for line in lines if not re.fullmatch("-?(0|[1-9][0-9]{0,17})", line)]
        if wrong:
            raise DataError(
                f"{file}: not one index per line ({wrong[0][:60]!r}); indices count the <object> "
                "elements from 0, and names or numbers of image files can't stand for them; take "
                "the split files of the authors")
        splits[name] = [int(line) for line in lines]
        if len(splits[name]) == withdrawn.get(name):
            raise DataError(
                f"{file} has {len(lines)} lines: these split files were withdrawn in 2023; mixed "
                "with the current ones, test leaks into train; download the current train.txt, "
                "val.txt, test.txt")
    counts = Counter(itertools.chain.from_iterable(splits.values()))
    if wrong := [index for index, n in counts.items() if n > 1 or index < 0]:
        raise DataError(f"{root}: the split files overlap, or repeat an index or hold one below 0 "
                        f"({wrong[:3]}), so test could leak into train; download them again")
    return splits


def read_xml(file: Path) -> ElementTree.Element:
    """The root of an XML file in any encoding."""
    try:
        content = file.read_bytes()
        try:
            return ElementTree.fromstring(content)
        except (LookupError, ValueError):
            # The parser knows UTF-8, UTF-16 and encodings of one byte per character. Others
            # are decoded here; in decoded text, the parser ignores the declaration.
            declared = XML_ENCODING.match(content)
            name = declared[1].decode("ascii", "replace").lower() if declared else "utf-8"
            return ElementTree.fromstring(content.decode(LARGER_ENCODINGS.get(name, name)))
    except (ElementTree.ParseError, LookupError, ValueError, OSError) as error:
        raise DataError(f"{file}: unreadable annotation ({' '.join(str(error).split())}); without "
                        "its objects every later index would be wrong") from None
