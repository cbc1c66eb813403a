"""VRSBench: its train file and its evaluation of referring expressions."""
import itertools
import re
from pathlib import Path

from readers.base import DataError, NoSplit, Records, first_existing, read_json
from readers.collect import THINNEST, Collector, numbers

IMAGE_SIDE = 512                                     # pixels


def read(root: Path, split: str) -> Records:
    """train: boxes of [refer] turns, in hundredths of the image's sides. test: obj_corner, in
    fractions of them; `grid` keeps ground_truth, whole hundredths, for the official metric."""
    if split not in ("train", "test"):
        raise NoSplit(f"vrsbench has no split {split!r}; it has train, test, val held out of train")
    is_train = split == "train"
    name = "VRSBench_train.json" if is_train else "VRSBench_EVAL_referring.json"
    file = first_existing(root, name)
    collector = Collector(root, "Images_train" if is_train else "Images_val")
    rows = read_json(file)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{file}: not a JSON array of objects; download it again")
    for number, row in enumerate(rows):
        where = f"{file}, record {number}"
        if is_train:
            turns = row.get("conversations")
            turns = turns if isinstance(turns, list) else []
            said = [str(turn.get("value", "")) if isinstance(turn, dict) else "" for turn in turns]
            pairs = itertools.zip_longest(said[::2], said[1::2], fillvalue="")
            for i, (question, answer) in enumerate(pairs):
                # [caption] and [vqa] are other tasks.
                if "[refer]" in question:
                    text = re.search(r"<p>(.*?)</p>", question, re.DOTALL)
                    collector.add(
                        f"{where}, turn {i}" if i else where,
                        f"train-{number}-{i}" if i else f"train-{number}", row.get("image"),
                        text and text[1], numbers(answer), units=100)
            continue
        corners = numbers(row.get("obj_corner"))     # x, y of each of the four
        grid = numbers(row.get("ground_truth"))
        box, units, repairs = [], 1, []
        if len(corners) == 8:
            xs, ys = corners[0::2], corners[1::2]
            box = [min(xs), min(ys), max(xs), max(ys)]
        if not box or min(box[2] - box[0], box[3] - box[1]) < THINNEST / IMAGE_SIDE:
            box, units, repairs = grid, 100, ["box of ground_truth, for want of obj_corner"]
            if len(grid) == 4 and (grid[0] == grid[2] or grid[1] == grid[3]):
                # On that grid both ends count: a box from 50 to 50 is one cell wide.
                x1, y1, x2, y2 = grid
                box = [x1, y1, x2 + (x1 == x2), y2 + (y1 == y2)]
                repairs = ["whole cells of ground_truth, for want of area"]
        unique = row.get("unique")
        collector.add(
            where, f"test-{number}", row.get("image_id"), row.get("question"), box,
            row.get("obj_cls"), units=units, repairs=repairs,
            unique=None if unique is None else str(unique).lower() in ("true", "1"),
            grid=tuple(map(int, grid)) if len(grid) == 4 else None)
    return collector.records
