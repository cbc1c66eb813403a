"""readers.rrsisd."""
import pickle
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from readers.base import (
    SPLITS,
    DataError,
    NoSplit,
    Records,
    first_existing,
    read_json,
    read_objects,
)
from readers.collect import Annotation, Collector


def read_rrsisd(root: Path, split: str) -> Records:
    """RRSIS-D, as its authors lay it out or converted to lines, datainfo/rrsisd_SPLIT.jsonl.

    `bbox` is x1, y1, x2, y2 in whole pixels, although its authors' comments say x, y, width,
    height. Boxes of the masks are other boxes; the masks are not read.
    """
    split = {"sft": "train", "rft": "train"}.get(split, split)
    if split not in SPLITS:
        raise NoSplit(f"rrsisd has no split {split!r}; it has {', '.join(SPLITS)}")
    name = f"rrsisd_{split}.jsonl"
    file = first_existing(
        root, "rrsisd/refs(unc).p", "refs(unc).p", f"datainfo/{name}", name)
    is_pickle = file.suffix == ".p"
    rows = rrsisd_refs(file) if is_pickle else read_objects(file)
    collector = Collector(root, "JPEGImages", refuse_swapped=True)
    uses: Counter[str] = Counter()                   # expressions of an annotation
    for number, row in rows:
        where = f"{file}, {'ref' if is_pickle else 'line'} {number}"
        if row is None:
            collector.refuse("no JSON object", where)
            continue
        # As in its authors' code: "testA" is of the test split too.
        split_of_row = str(row.get("split"))
        if split_of_row != split and not (split == "test" and "test" in split_of_row):
            # The pickle holds all splits; a file of lines holds one, or it leaks.
            if not is_pickle:
                collector.refuse("of another split than its file", where)
            continue
        identity = str(row.get("ann_id"))
        uses[identity] += 1
        if uses[identity] > 1:
            identity = f"{identity}-{uses[identity]}"
        collector.add(Annotation(
            where, identity, row.get("file_name"), row.get("sent"), row.get("bbox"),
            row.get("category_name")))
    return collector.records


def rrsisd_refs(file: Path) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """Yields (number, row) as in the converted form: one for each sentence of a ref.

    refs(unc).p has expressions and splits, instances.json beside it has boxes, categories and
    images; DataError where either does not fit.
    """
    refs = read_plain_pickle(file)
    instances = read_json(file.with_name("instances.json"))
    if not isinstance(refs, list) or not isinstance(instances, dict):
        raise DataError(
            f"{file}: not a list of refs, or no instances.json beside it with its boxes; "
            "download both again")
    images = rows_by_id(instances.get("images"))
    annotations = rows_by_id(instances.get("annotations"))
    categories = rows_by_id(instances.get("categories"))
    for number, ref in enumerate(refs):
        if not isinstance(ref, dict):
            yield number, None
            continue
        image = images.get(str(ref.get("image_id")), {})
        annotation = annotations.get(str(ref.get("ann_id")), {})
        category = categories.get(str(ref.get("category_id")), {})
        sentences = ref.get("sentences")
        for sentence in sentences if isinstance(sentences, list) and sentences else [None]:
            if not isinstance(sentence, dict):
                sentence = {}
            yield number, {
                "split": ref.get("split"), "ann_id": ref.get("ann_id"),
                # `raw` is as its author wrote it, `sent` may be in lower case.
                "sent": sentence.get("raw") or sentence.get("sent"),
                "file_name": image.get("file_name") or ref.get("file_name"),
                "bbox": annotation.get("bbox"), "category_name": category.get("name")}


def rows_by_id(rows: Any) -> dict[str, dict[str, Any]]:
    """A list of objects with an "id" -> by that, as text."""
    by_id = {}
    for row in rows if isinstance(rows, list) else ():
        if isinstance(row, dict):
            by_id[str(row.get("id"))] = row
    return by_id


class PlainUnpickler(pickle.Unpickler):
    """Reads lists, dicts, texts and numbers.

    Whatever else a pickle can do, it does through a class or function that it asks for here.
    """

    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(
            f"it asks for {f'{module}.{name}'!r}, which annotations do not need; nothing of it "
            "was run; download it again, or use the form with datainfo/*.jsonl")


def read_plain_pickle(file: Path) -> Any:
    """A pickle's value; DataError where it asks for any class, or is unreadable."""
    try:
        with open(file, "rb") as stream:
            return PlainUnpickler(stream, encoding="utf-8").load()
    except (
            pickle.UnpicklingError, OSError, EOFError, ValueError, TypeError, LookupError,
            AttributeError, OverflowError, MemoryError, RecursionError) as error:
        # The library's own messages may go over several lines.
        raise DataError(
            f"{file}: unreadable pickle ({' '.join(str(error).split())})") from None
