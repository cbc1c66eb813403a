"""readers.geopix."""
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

import reward
from qwen.answer import Box
from readers.base import DataError, NoSplit, Records
from readers.collect import Annotation, Collector, hold_out, read_four_numbers, visible_files

# A data set of GeoPixInstruct -> how its splits are called here, "fast_t_test".
GEOPIX = {"FAST-T": "fast_t", "SOTA-T": "sota_t", "SIOR-T": "sior_t"}


def read_geopix(root: Path, split: str) -> Records:
    """GeoPixInstruct: a record for each instance of its images. Needs pyarrow.

    Its files have "train" or "valid", and "FAST_T" and the like, in their paths; `test` is what
    it calls valid, for it has no other. A split may be of one data set, as "fast_t_test".
    """
    if split in ("sft", "rft", "val"):
        return hold_out(read_geopix(root, "train"), split, root)
    collector = Collector(root, refuse_swapped=True)
    for part, file in geopix_files(root, split):
        is_xyxy = geopix_order(file)
        for number, row in parquet_rows(file):
            image_id = f"{file.stem}-{number}" if row["image_id"] is None else row["image_id"]
            for k, instance in enumerate(instances_of(row)):
                box, _ = read_four_numbers(instance.get("bbox"))
                if box and not is_xyxy:
                    x, y, width, height = box
                    box = [x, y, x + width, y + height]
                collector.add(Annotation(
                    f"{file}, row {number}, instance {k}", f"{GEOPIX[part]}-{image_id}-{k}",
                    row["image_path"], instance.get("description"), box,
                    instance.get("category"), size=mask_size(instance.get("mask")), kind=part))
    return collector.records


def instances_of(row: dict[str, Any]) -> list[dict[str, Any]]:
    """A row's instances; one that is no object is empty, so that it is refused and counted."""
    instances = row["instances"]
    if not isinstance(instances, list):
        return []
    return [instance if isinstance(instance, dict) else {} for instance in instances]


def geopix_files(root: Path, split: str) -> list[tuple[str, Path]]:
    """The files of a split, each with the data set that it is of."""
    files = []
    for file in visible_files(root, "**/*.parquet"):
        name = file.relative_to(root).as_posix()
        kind = re.search(r"(?<![a-z])(train|val)", name, re.IGNORECASE)
        part = re.search(r"(FAST|SOTA|SIOR)[-_]?T(?![a-z])", name, re.IGNORECASE)
        if kind and part:
            part_name = f"{part[1].upper()}-T"
            kind_name = "train" if kind[1].lower() == "train" else "test"
            if split in (kind_name, f"{GEOPIX[part_name]}_{kind_name}"):
                files.append((part_name, file))
    if not files:
        raise NoSplit(
            f"no *.parquet of a split {split!r} under {root}; geopix has train and test in files "
            "called like train.FAST_T.parquet and valid.FAST_T.parquet, those of one data set, "
            "like fast_t_test, and val held out of train")
    return files


GEOPIX_COLUMNS = ("image_id", "image_path", "instances")


def parquet_rows(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (number, row) with GEOPIX_COLUMNS; DataError where pyarrow or a column is missing."""
    try:
        # Not among the requirements: this data set alone needs it.
        import pyarrow.parquet
    except ImportError:
        raise DataError(
            f"{file}: Parquet files are read with pyarrow, which is not installed; "
            "pip install pyarrow") from None
    number = 0
    try:
        table = pyarrow.parquet.ParquetFile(file)
        absent = sorted(set(GEOPIX_COLUMNS) - set(table.schema_arrow.names))
        if absent:
            raise ValueError(f"no column {', '.join(absent)}")
        for batch in table.iter_batches(batch_size=256, columns=list(GEOPIX_COLUMNS)):
            for row in batch.to_pylist():
                yield number, row
                number += 1
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise DataError(
            f"{file}: unreadable ({' '.join(str(error).split())}); download it again") from None


# Share of a file's boxes that must fit their masks in one order of the four numbers.
FITTING = 0.99


def geopix_order(file: Path) -> bool:
    """Are a file's boxes x1, y1, x2, y2 (True), or x, y, width, height (False)?

    Its authors do not say it. A box fits its mask where it has an IoU of 0.5 or more with the
    mask's extent. DataError unless 99% fit in one order, and not in the other.
    """
    boxes = []
    extents = []
    for _, row in parquet_rows(file):
        for instance in instances_of(row):
            box, _ = read_four_numbers(instance.get("bbox"))
            extent = mask_extent(instance.get("mask"))
            if box and extent:
                boxes.append(box)
                extents.append(extent)
    xyxy = torch.tensor(boxes, dtype=torch.float64).reshape(-1, 4)
    xywh = torch.cat((xyxy[:, :2], xyxy[:, :2] + xyxy[:, 2:]), 1)
    masks = torch.tensor(extents, dtype=torch.float64).reshape(-1, 4)
    n = max(len(boxes), 1)
    corners_fit = (reward.iou(xyxy, masks) >= 0.5).sum().item() / n
    sides_fit = (reward.iou(xywh, masks) >= 0.5).sum().item() / n
    if (corners_fit >= FITTING) == (sides_fit >= FITTING):
        raise DataError(
            f"{file}: the order of bbox can't be told: of {len(boxes):,} with a mask "
            f"{corners_fit:.1%} fit it as x1, y1, x2, y2 and {sides_fit:.1%} as x, y, width, "
            f"height, where {FITTING:.0%} of one order and not of the other are needed; download "
            "it again")
    return corners_fit >= FITTING


def mask_size(mask: Any) -> tuple[int, int] | None:
    """(width, height) of COCO's run-length encoding, {"size": [height, width], "counts"}."""
    size = mask.get("size") if isinstance(mask, dict) else None
    if not isinstance(size, list) or len(size) != 2:
        return None
    return (size[1], size[0]) if all(type(side) is int for side in size) else None


def mask_extent(mask: Any) -> Box | None:
    """The box around a mask, or None where it is empty or does not fit its size.

    Runs go down the columns, from left to right, the first outside of the mask. Of 3 columns and
    2 rows, 3 pixels outside, 2 inside, 1 outside: the lower one of column 1, the upper of 2.

    >>> mask_extent({"size": [2, 3], "counts": [3, 2, 1]})
    (1.0, 0.0, 3.0, 2.0)
    """
    size = mask_size(mask)
    try:
        runs = np.array(mask_runs(mask["counts"]) if size else [])
    except (LookupError, TypeError, ValueError, OverflowError):
        return None
    if not len(runs) or (runs < 0).any() or runs.sum() != size[0] * size[1]:
        return None
    height = size[1]
    ends = runs.cumsum()[1::2]                       # of the runs inside
    starts = ends - runs[1::2]
    starts = starts[runs[1::2] > 0]
    ends = ends[runs[1::2] > 0]
    if not len(starts):
        return None
    first_columns = starts // height
    last_columns = (ends - 1) // height
    # A run that goes on in the next column reaches the lower edge in one, the upper in the other.
    wraps = last_columns > first_columns
    top = np.where(wraps, 0, starts % height).min()
    bottom = np.where(wraps, height - 1, (ends - 1) % height).max()
    return (
        float(first_columns.min()), float(top), float(last_columns.max() + 1), float(bottom + 1))


def mask_runs(counts: Any) -> list[int]:
    """COCO's runs, as numbers or compressed to a text, as numbers.

    In a text each character holds 5 bits of a number, the lowest first, 32 more where it goes on,
    and stands 48 behind; from the fourth on, a number is the difference to the one two before.

    >>> mask_runs("321")
    [3, 2, 1]
    >>> mask_runs("PQ72001")                   # 0 more than the second, 1 more than the third
    [7200, 2, 0, 2, 1]
    """
    if isinstance(counts, list):
        return [int(count) for count in counts]
    codes = counts.encode("ascii") if isinstance(counts, str) else bytes(counts)
    runs: list[int] = []
    number = 0
    shift = 0
    for code in codes:
        bits = code - 48
        number |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            # The highest bit is the sign.
            number -= 1 << shift
        runs.append(number + runs[-2] if len(runs) > 2 else number)
        number = 0
        shift = 0
    return runs
