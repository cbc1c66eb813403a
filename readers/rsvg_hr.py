"""RSVG-HR."""
import re
from pathlib import Path

from readers.base import NoSplit, Records, first_existing, read_text
from readers.collect import Collector

NUMBER = re.compile(r"\s*-?\d+(\.\d+)?\s*")


def read(root: Path, split: str) -> Records:
    """Lines image,x1,y1,x2,y2,text. The text may hold commas."""
    if split not in ("train", "test"):
        raise NoSplit(f"rsvg-hr has no split {split!r}; it has train, test, val held out of train")
    name = f"rsvg_hr_{split}.txt"
    file = first_existing(root, name, f"Annotations/{name}")
    collector = Collector(root, "images")
    for number, line in enumerate(read_text(file).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        image, *fields = line.split(",")
        commas = decimal_commas(fields)                      # at most one is unambiguous
        if len(commas) > 1:
            collector.refuse("five numbers, and more than one may hold a decimal comma", where)
            continue
        for i in commas:
            fields[i:i + 2] = [f"{fields[i]}.{fields[i + 1]}"]
        collector.add(where, f"{split}-{number}", image.strip(), ",".join(fields[4:]), fields[:4],
                      repairs=["decimal comma"] if commas else [])
    return collector.records


def decimal_commas(fields: list[str]) -> list[int]:
    """Indices i for which fields i and i + 1 may be one number: "216,00" became two fields.

    >>> decimal_commas(["170.0", "774.0", "216", "00", "803.21", "find a pool"])
    [2]
    >>> decimal_commas(["1", "2", "3.5", "4.5", "5.5", "six"])       # 1,2 is the only pair
    [0]
    >>> decimal_commas(["5.5", "5.5", "7.5", "9", "12", "storey building"])
    []
    """
    if len(fields) <= 5 or not all(NUMBER.fullmatch(field) for field in fields[:5]):
        return []
    candidates = [i for i in range(4) if fields[i].strip("- ").isdigit()]
    candidates = [i for i in candidates if fields[i + 1].strip().isdigit()]
    # The fifth number may instead be the start of the text, as in "12,storey building".
    return [] if candidates == [3] else candidates
