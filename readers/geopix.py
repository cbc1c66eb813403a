"""GeoPixInstruct: FAST-T, SOTA-T and SIOR-T."""
import itertools
import re
from pathlib import Path

from readers.base import DataError, NoSplit, Records
from readers.collect import Collector, numbers, visible_files

COLUMNS = ["image_id", "image_path", "instances"]
# The authors do not say whether boxes are x1, y1, x2, y2 or x, y, width, height. They are the
# first if this share of a file's boxes has x2 > x1 and y2 > y1.
ORDERED = 0.99


def read(root: Path, split: str) -> Records:
    """A record for each instance of each image, from Parquet files. Needs pyarrow.
    The authors call `test` valid. A split may be that of one part, such as "fast_t_test"."""
    files = []
    for file in visible_files(root, "**/*.parquet"):
        name = file.relative_to(root).as_posix()
        kind = re.search(r"(?<![a-z])(train|val)", name, re.IGNORECASE)
        part = re.search(r"(FAST|SOTA|SIOR)[-_]?T(?![a-z])", name, re.IGNORECASE)
        if kind and part:
            of_split = "train" if kind[1].lower() == "train" else "test"
            if split in (of_split, f"{part[1].lower()}_t_{of_split}"):
                files.append((file, part[1]))
    if not files:
        raise NoSplit(f"no *.parquet of a split {split!r} under {root}; geopix has train and test "
                      "in files like train.FAST_T.parquet and valid.FAST_T.parquet, and those of "
                      "one part, like fast_t_test; val is held out of train")
    try:
        import pyarrow.parquet  # optional: only this data set needs it
    except ImportError:
        raise DataError(f"{files[0][0]}: pyarrow, which reads Parquet files, is not installed; "
                        "pip install pyarrow") from None
    collector = Collector(root, refuse_swapped=True)
    for file, part in files:
        found = []                                   # arguments of collector.add
        try:
            table = pyarrow.parquet.ParquetFile(file)
            if absent := sorted(set(COLUMNS) - set(table.schema_arrow.names)):
                raise ValueError(f"no column {', '.join(absent)}")
            batches = table.iter_batches(batch_size=256, columns=COLUMNS)
            rows = itertools.chain.from_iterable(batch.to_pylist() for batch in batches)
            for number, row in enumerate(rows):
                image_id = f"{file.stem}-{number}" if row["image_id"] is None else row["image_id"]
                for k, instance in enumerate(row["instances"] or []):
                    instance = instance or {}
                    size = (instance.get("mask") or {}).get("size")            # height, width
                    found.append({
                        "where": f"{file}, row {number}, instance {k}",
                        "identity": f"{part.lower()}_t-{image_id}-{k}",
                        "image": row["image_path"], "text": instance.get("description"),
                        "box": numbers(instance.get("bbox")), "category": instance.get("category"),
                        "size": size and size[::-1]})
        except (OSError, ValueError, TypeError, AttributeError, pyarrow.ArrowException) as error:
            raise DataError(
                f"{file}: unreadable ({' '.join(str(error).split())}); download it again") from None
        boxes = [row["box"] for row in found if len(row["box"]) == 4]
        is_xyxy = sum(b[2] > b[0] and b[3] > b[1] for b in boxes) >= ORDERED * len(boxes)
        for box in () if is_xyxy else boxes:
            box[2:] = box[0] + box[2], box[1] + box[3]
        for row in found:
            collector.add(**row, kind=f"{part.upper()}-T")
    return collector.records
