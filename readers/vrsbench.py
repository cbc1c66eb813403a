"""readers.vrsbench."""
import itertools
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from readers.base import THINNEST, DataError, NoSplit, Records, first_existing, read_json
from readers.collect import Annotation, Collector, hold_out, numbers


def read_vrsbench(root: Path, split: str) -> Records:
    """VRSBench: its train file and its evaluation of referring expressions, `test`."""
    if split in ("sft", "rft", "val"):
        return hold_out(read_vrsbench(root, "train"), split, root)
    if split not in ("train", "test"):
        raise NoSplit(
            f"vrsbench has no split {split!r}; it has train, test, and val held out of train")
    name = "VRSBench_train.json" if split == "train" else "VRSBench_EVAL_referring.json"
    file = first_existing(root, name)
    collector = Collector(root, "Images_train" if split == "train" else "Images_val")
    rows = read_json(file)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{file}: not a JSON array of objects; download it again")
    for number, row in enumerate(rows):
        where = f"{file}, record {number}"
        if split == "test":
            collector.add(vrsbench_test(row, where, f"test-{number}"))
        else:
            for annotation in vrsbench_train(row, where, f"train-{number}"):
                collector.add(annotation)
    return collector.records


# Pixels of its images, which are square.
VRSBENCH_SIDE = 512


def vrsbench_test(row: dict[str, Any], where: str, identity: str) -> Annotation:
    """A row of the evaluation: obj_corner is the precise box, in parts of the image's sides.

    `grid` keeps ground_truth, the whole hundredths that the official metric compares.
    """
    corners = numbers(row.get("obj_corner"))         # x, y of each of the four
    grid = numbers(row.get("ground_truth"))
    box = []
    parts = 1
    repairs = []
    if len(corners) == 8:
        xs = corners[0::2]
        ys = corners[1::2]
        box = [min(xs), min(ys), max(xs), max(ys)]
    thinnest = THINNEST / VRSBENCH_SIDE
    if not box or not (box[2] - box[0] >= thinnest and box[3] - box[1] >= thinnest):
        box = grid
        parts = 100
        repairs = ["box of ground_truth, for want of obj_corner"]
        if len(grid) == 4 and (grid[0] == grid[2] or grid[1] == grid[3]):
            # Both ends count on that grid: a box from 50 to 50 is one cell wide.
            x1, y1, x2, y2 = grid
            box = [x1, y1, x2 + (x1 == x2), y2 + (y1 == y2)]
            repairs = ["whole cells of ground_truth, for want of area"]
    unique = row.get("unique")
    whole = len(grid) == 4 and all(map(math.isfinite, grid))
    return Annotation(
        where, identity, row.get("image_id"), row.get("question"), box, row.get("obj_cls"), parts,
        repairs, unique=None if unique is None else str(unique).lower() in ("true", "1"),
        grid=tuple(map(int, grid)) if whole else None)


def vrsbench_train(row: dict[str, Any], where: str, identity: str) -> Iterator[Annotation]:
    """The questions of a conversation that ask for a box, in whole hundredths of the image.

    Those of other tasks ([caption], [vqa]) are none of ours.
    """
    turns = []
    conversation = row.get("conversations")
    for turn in conversation if isinstance(conversation, list) else ():
        turns.append(str(turn["value"]) if isinstance(turn, dict) and "value" in turn else "")
    pairs = itertools.zip_longest(turns[::2], turns[1::2], fillvalue="")
    for i, (question, answer) in enumerate(pairs):
        if "[refer]" not in question:
            continue
        text = re.search(r"<p>(.*?)</p>", question, re.DOTALL)
        yield Annotation(
            f"{where}, turn {i}" if i else where, f"{identity}-{i}" if i else identity,
            row.get("image"), text and text[1], numbers(answer), parts=100)
