"""RRSIS-D."""
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from readers.base import (
    SPLITS, DataError, NoSplit, Records, first_existing, read_json, read_json_lines)
from readers.collect import Collector, numbers


def read(root: Path, split: str) -> Records:
    """The authors' refs(unc).p and instances.json, or the lines of datainfo/rrsisd_SPLIT.jsonl.
    `bbox` is xyxy in pixels, although the authors' comments say x, y, width, height."""
    if split not in SPLITS:
        raise NoSplit(f"rrsisd has no split {split!r}; it has {', '.join(SPLITS)}")
    name = f"rrsisd_{split}.jsonl"
    file = first_existing(root, "rrsisd/refs(unc).p", "refs(unc).p", f"datainfo/{name}", name)
    is_pickle = file.suffix == ".p"
    collector = Collector(root, "JPEGImages", refuse_swapped=True)
    for number, row in official_rows(file) if is_pickle else read_json_lines(file):
        where = f"{file}, {'ref' if is_pickle else 'line'} {number}"
        if row is None:
            collector.refuse("no JSON object", where)
            continue
        # As in the authors' code, "testA" belongs to the test split too.
        row_split = str(row.get("split"))
        if row_split != split and not (split == "test" and "test" in row_split):
            # The pickle holds all splits. A JSONL file must hold only one; others would leak.
            if not is_pickle:
                collector.refuse("of another split than its file", where)
            continue
        size = row.get("width"), row.get("height")
        # The lines have the image's size, as height and width, with the mask only.
        masks = row.get("segmentation")
        if isinstance(masks, list) and masks and isinstance(masks[0], dict):
            size = numbers(masks[0].get("size"))[::-1] or size
        collector.add(where, str(row.get("ann_id")), row.get("file_name"), row.get("sent"),
                      row.get("bbox"), row.get("category_name"), size=size)
    return collector.records


def official_rows(file: Path) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """Yields (number of the ref, row as in the JSONL files) for each sentence of a ref."""
    try:
        with open(file, "rb") as stream:
            refs = PlainUnpickler(stream, encoding="utf-8").load()
    except Exception as error:
        # On a damaged file the library raises nearly anything, with messages of several lines.
        raise DataError(f"{file}: unreadable pickle ({' '.join(str(error).split())})") from None
    instances = read_json(file.with_name("instances.json"))
    try:
        images = {str(row["id"]): row for row in instances["images"]}
        annotations = {str(row["id"]): row for row in instances["annotations"]}
        categories = {str(row["id"]): row for row in instances["categories"]}
    except (LookupError, TypeError):
        instances = None
    if not instances or not isinstance(refs, list):
        raise DataError(f"{file}: not a list of refs, or no instances.json next to it with the "
                        "boxes; download both again")
    for number, ref in enumerate(refs):
        if not isinstance(ref, dict):
            yield number, None
            continue
        image = images.get(str(ref.get("image_id")), {})
        annotation = annotations.get(str(ref.get("ann_id")), {})
        category = categories.get(str(ref.get("category_id")), {})
        sentences = ref.get("sentences")
        for sentence in sentences if isinstance(sentences, list) and sentences else [None]:
            sentence = sentence if isinstance(sentence, dict) else {}
            yield number, {
                "split": ref.get("split"), "ann_id": ref.get("ann_id"),
                # `raw` is as its author wrote it, `sent` may be in lower case.
                "sent": sentence.get("raw") or sentence.get("sent"),
                "file_name": image.get("file_name") or ref.get("file_name"),
                "bbox": annotation.get("bbox"), "category_name": category.get("name"),
                "width": image.get("width"), "height": image.get("height")}


class PlainUnpickler(pickle.Unpickler):
    """Reads lists, dicts, strings and numbers; anything else needs a class, and is refused."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(
            f"it asks for {f'{module}.{name}'!r}, which annotations do not need; nothing of it "
            "was run; download it again, or use the form with datainfo/*.jsonl")
