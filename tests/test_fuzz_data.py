"""Every reader of data.py on random damage: records or one line, and nothing silently changed.

`NIGHTLY=1` tries 10,000 cases of each; conftest.py says how many else.
"""
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import data
from data import load
from readers import collect
from readers.base import DataError, Records, Refused
from toy import scenes

hypothesis = pytest.importorskip("hypothesis")
st = pytest.importorskip("hypothesis.strategies")

SIZE = (100, 50)
ROWS = 6


# ---------------------------------------------------------------- a whole folder of each reader

def box_of(i: int) -> list[float]:
    return [30 + 3 * i, 20 + i, 60 + 5 * i, 35 + 2 * i]


def write_lines(file: Path, rows: list[Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    texts = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    file.write_text("".join(text + "\n" for text in texts), encoding="utf-8")


def dior(root: Path) -> list[Path]:
    (root / "Annotations").mkdir()
    files = []
    for i in range(3):
        tags = ""
        for k in (2 * i, 2 * i + 1):
            x1, y1, x2, y2 = box_of(k)
            tags += (
                f"<object><name>ship</name><bndbox><xmin>{x1}</xmin><ymin>{y1}</ymin><xmax>{x2}"
                f"</xmax><ymax>{y2}</ymax></bndbox><description>ship {k}</description></object>")
        files.append(root / "Annotations" / f"{i}.xml")
        files[-1].write_text(
            f'<?xml version="1.0" encoding="utf-8"?>\n<annotation><filename>{i}.png</filename>'
            f"{tags}</annotation>")
    for name, indices in (("train", "0\n1\n2\n3\n"), ("val", "5\n"), ("test", "4\n")):
        files.append(root / f"{name}.txt")
        files[-1].write_text(indices)
    return files


def rsvg_hr(root: Path) -> list[Path]:
    file = root / "rsvg_hr_train.txt"
    write_lines(
        file, [f"{i % 3}.png,{','.join(map(str, box_of(i)))},ship {i}" for i in range(ROWS)])
    return [file]


def vrsbench(root: Path) -> list[Path]:
    rows = []
    for i in range(ROWS):
        turns = [{"from": "human", "value": f"<image>\n[refer] where is <p>ship {i}</p>?"},
                 {"from": "gpt", "value": f"{{<{i}><10><{40 + i}><60>}}"}]
        rows.append({"image": f"{i % 3}.png", "conversations": turns})
    file = root / "VRSBench_train.json"
    file.write_text(json.dumps(rows))
    return [file]


def vrsbench_test(root: Path) -> list[Path]:
    rows = []
    for i in range(ROWS):
        x = 0.1 + i / 100
        rows.append({
            "image_id": f"{i % 3}.png", "question": f"ship {i}", "unique": True, "obj_cls": "ship",
            "ground_truth": f"{{<{10 + i}><20><40><60>}}",
            "obj_corner": [x, 0.2, 0.4, 0.2, 0.4, 0.6, x, 0.6]})
    file = root / "VRSBench_EVAL_referring.json"
    file.write_text(json.dumps(rows))
    return [file]


def refgeo(root: Path) -> list[Path]:
    rows = []
    for i in range(ROWS):
        rows.append({
            "image_id": f"{i % 3}.png", "question": f"ship {i}", "bbox": box_of(i), "poly": [],
            "question_id": i, "dataset": "rsvg"})
    file = root / "metainfo" / "rsvg_train.jsonl"
    write_lines(file, rows)
    return [file]


def rrsisd_lines(root: Path) -> list[Path]:
    rows = []
    for i in range(ROWS):
        rows.append({
            "split": "train", "sent": f"ship {i}", "file_name": f"{i % 3}.png", "ann_id": i,
            "bbox": box_of(i), "category_name": "ship"})
    file = root / "datainfo" / "rrsisd_train.jsonl"
    write_lines(file, rows)
    return [file]


def rrsisd(root: Path) -> list[Path]:
    refs = []
    annotations = []
    for i in range(ROWS):
        sentence = {"raw": f"Ship {i}", "sent": f"ship {i}", "tokens": ["ship"], "sent_id": i}
        refs.append({
            "image_id": i % 3, "split": "train", "sentences": [sentence], "category_id": 1,
            "file_name": f"{i % 3}.png", "ann_id": i, "ref_id": i})
        annotations.append({"id": i, "image_id": i % 3, "bbox": box_of(i), "categories_id": 1})
    (root / "refs(unc).p").write_bytes(pickle.dumps(refs, protocol=2))
    (root / "instances.json").write_text(json.dumps({
        "images": [{"id": i, "file_name": f"{i}.png"} for i in range(3)],
        "annotations": annotations, "categories": [{"id": 1, "name": "ship"}]}))
    return [root / "refs(unc).p", root / "instances.json"]


def geopix(root: Path) -> list[Path]:
    pytest.importorskip("pyarrow")
    import pyarrow.parquet

    rows = []
    for i in range(3):
        instances = []
        for k in (2 * i, 2 * i + 1):
            x1, y1, x2, y2 = map(int, box_of(k))
            instances.append({
                "bbox": [x1, y1, x2, y2], "category": "ship", "description": f"ship {k}",
                "mask": {"counts": "", "size": [SIZE[1], SIZE[0]]}})
        rows.append({"image_id": f"P{i}", "image_path": f"{i}.png", "instances": instances})
    file = root / "train.FAST_T.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return [file]


def own(root: Path) -> list[Path]:
    rows: list[Any] = []
    for i in range(ROWS - 2):
        rows.append({"image": f"{i % 3}.png", "text": f"ship {i}", "box": box_of(i), "id": f"r{i}"})
    for i in range(ROWS - 2, ROWS):
        rows.append({"image": f"{i % 3}.png", "conversations": [
            {"from": "human", "value": f"<image>Locate ship {i} and output the bbox as JSON."},
            {"from": "gpt", "value": json.dumps({"bbox_2d": box_of(i)})}]})
    file = root / "train.jsonl"
    write_lines(file, rows)
    return [file]


# Name of a case -> reader, what writes its files.
CASES: dict[str, tuple[str, Callable[[Path], list[Path]]]] = {
    "dior": ("dior", dior), "opt": ("opt", dior), "rsvg-hr": ("rsvg-hr", rsvg_hr),
    "vrsbench": ("vrsbench", vrsbench), "vrsbench test": ("vrsbench", vrsbench_test),
    "refgeo": ("refgeo", refgeo), "rrsisd": ("rrsisd", rrsisd),
    "rrsisd lines": ("rrsisd", rrsisd_lines), "geopix": ("geopix", geopix), "jsonl": ("jsonl", own)}


def split_of(case: str) -> str:
    return "test" if case.endswith("test") else "train"


def test_every_reader_of_files_is_fuzzed() -> None:
    readers = {reader for reader, _ in CASES.values()}
    assert readers == data.READERS.keys() - scenes.WORLDS.keys()


@pytest.fixture(params=CASES)
def whole(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path, list[Path]]:
    """A case, its folder, and its files of annotations."""
    root = tmp_path / "whole"
    root.mkdir()
    for i in range(3):
        Image.new("RGB", SIZE, "gray").save(root / f"{i}.png")
    files = CASES[request.param][1](root)
    return request.param, root, files


def check(records: Records) -> None:
    """What is true of whatever a reader returns."""
    assert len({r.id for r in records}) == len(records)
    for r in records:
        x1, y1, x2, y2 = r.box
        assert 0 <= x1 < x2 <= SIZE[0] and 0 <= y1 < y2 <= SIZE[1]
        assert r.text.strip() == r.text != "" and r.size == SIZE
    assert len(records.hash) == 16


def load_or_line(case: str, root: Path, split: str, coords: str | None = None) -> Records | None:
    """The records, or None after a DataError of one line."""
    try:
        records = load(CASES[case][0], root, split, coords)
    except DataError as error:
        assert "\n" not in str(error) and len(str(error)) > 20
        return None
    check(records)
    return records


# ---------------------------------------------------------------- bytes

TOKENS = [
    b"\0", b'"', b"{", b"}", b"[", b"]", b"<", b">", b"</object>", b"<object>", b"<!-- ", b"&x;",
    b"nan", b"Infinity", b"1e999", b"-", b",", b"\xff", b"\n", b"\r", b"\xe2\x80\xa8", b"null",
    b"true", b"9" * 400, b"0." + b"3" * 40, b"\xef\xbb\xbf", b"\\ud800", b"../", b"/",
    b"cos\nsystem\n", b"[[[[[[" * 50]


@st.composite
def damage(draw: Callable) -> Callable[[bytes], bytes]:
    """Flips, cuts, doubles, or puts tokens into some bytes."""
    kind = draw(st.sampled_from(("flip", "cut", "double", "token", "end")))
    share = draw(st.floats(0, 1))
    length = draw(st.integers(1, 40))
    token = draw(st.sampled_from(TOKENS))
    byte = draw(st.integers(0, 255))

    def apply(content: bytes) -> bytes:
        at = int(share * max(len(content) - 1, 0))
        if kind == "flip":
            return content[:at] + bytes([byte]) + content[at + 1:]
        if kind == "cut":
            return content[:at] + content[at + length:]
        if kind == "double":
            return content[:at + length] + content[at:]
        if kind == "token":
            return content[:at] + token + content[at:]
        return content[:at]
    return apply


def test_damaged_files_are_read_or_one_line(
        whole: tuple[str, Path, list[Path]], tmp_path: Path,
) -> None:
    case, root, files = whole
    originals = {file: file.read_bytes() for file in files}
    assert len(load_or_line(case, root, split_of(case))) in (4, ROWS)

    @hypothesis.given(
        st.sampled_from(files), st.lists(damage(), min_size=1, max_size=4),
        st.sampled_from((None, "original", "fraction", "1000")))
    def try_damage(file: Path, damages: list[Callable], coords: str | None) -> None:
        content = originals[file]
        for apply in damages:
            content = apply(content)
        file.write_bytes(content)
        for split in ("train", "val", "test", "sft"):
            load_or_line(case, root, split, coords)
        file.write_bytes(originals[file])
    try_damage()


# ---------------------------------------------------------------- values

VALUES = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.integers(10 ** 300, 10 ** 400), st.floats(),
        st.text(max_size=9), st.sampled_from((
            "0.png", "../0.png", ".", "..", "/", "\0", "[1, 2, 30, 40]", "{<1><2><30><40>}",
            "<p>x</p>", "nan", "1,5", "9" * 400))),
    lambda inner: st.one_of(
        st.lists(inner, max_size=5), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=8)


@st.composite
def row_damage(draw: Callable) -> tuple[int, int, Any, bool]:
    """A row, one of its keys by number, what it becomes, and whether it goes instead."""
    return draw(st.tuples(
        st.integers(0, ROWS - 1), st.integers(0, 20), VALUES, st.booleans()))


@pytest.mark.parametrize("case", ["refgeo", "rrsisd lines", "vrsbench test", "jsonl"])
def test_a_strange_value_in_a_row_changes_no_other_row_and_loses_none(
        case: str, tmp_path: Path,
) -> None:
    root = tmp_path / "whole"
    root.mkdir()
    for i in range(3):
        Image.new("RGB", SIZE, "gray").save(root / f"{i}.png")
    [file] = CASES[case][1](root)
    whole_text = file.read_text()
    is_array = whole_text.startswith("[")
    baseline = list(load(CASES[case][0], root, split_of(case)))
    assert len(baseline) == ROWS

    @hypothesis.given(row_damage())
    def try_value(damaged: tuple[int, int, Any, bool]) -> None:
        number, key_number, value, gone = damaged
        rows = json.loads(whole_text) if is_array else [
            json.loads(line) for line in whole_text.splitlines()]
        row = rows[number]
        key = sorted(row)[key_number % len(row)]
        if gone:
            del row[key]
        else:
            row[key] = value
        text = json.dumps(rows) if is_array else "".join(json.dumps(r) + "\n" for r in rows)
        file.write_text(text)
        records = load_or_line(case, root, split_of(case))
        if records is None:
            # One box of six far outside of its image makes all of them suspect.
            assert key in ("bbox", "box", "conversations")
            return
        assert len(records) + sum(records.refusals.values()) == ROWS
        others = [r for i, r in enumerate(baseline) if i != number]
        kept = [r for r in records if r in others]
        # The row's own id may be another one's, who then is refused and counted.
        assert len(kept) >= len(others) - 1
        if key not in ("id", "ann_id"):
            assert kept == others
    try_value()


@pytest.mark.parametrize("tag", ["filename", "description", "xmin", "ymax", "name"])
def test_a_strange_text_in_an_annotation_changes_no_other(tag: str, tmp_path: Path) -> None:
    from xml.sax.saxutils import escape

    root = tmp_path / "whole"
    root.mkdir()
    for i in range(3):
        Image.new("RGB", SIZE, "gray").save(root / f"{i}.png")
    file = dior(root)[0]
    whole_text = file.read_text()
    baseline = list(load("dior", root, "train"))

    @hypothesis.given(st.one_of(
        st.text(max_size=12), st.floats().map(str), st.integers().map(str),
        st.sampled_from(("", " ", "1,5", "../0.png", "0.PNG", "1.png", "50", "nan", "\u2028"))))
    def try_text(text: str) -> None:
        head, rest = whole_text.split(f"<{tag}>", 1)
        _, tail = rest.split(f"</{tag}>", 1)
        file.write_bytes(f"{head}<{tag}>{escape(text)}</{tag}>{tail}".encode("utf-8", "replace"))
        records = load_or_line("dior", root, "train")
        if records is not None:
            assert len(records) + sum(records.refusals.values()) == 4
            own = 2 if tag == "filename" else 1
            assert list(records)[-(4 - own):] == baseline[own:]
    try_text()


# ---------------------------------------------------------------- boxes

@hypothesis.given(
    st.lists(VALUES, max_size=5), st.tuples(st.integers(1, 3000), st.integers(1, 3000)),
    st.sampled_from((None, 1, 100, 1000)))
def test_a_box_is_repaired_said_and_within_or_refused(
        values: list[Any], size: tuple[int, int], units: int | None,
) -> None:
    try:
        box, repairs, _ = collect.repair_box(values, size, units)
    except Refused as reason:
        assert str(reason) in ("no box", "empty box", "box outside the image")
        return
    x1, y1, x2, y2 = box
    assert 0 <= x1 < x2 <= size[0] and 0 <= y1 < y2 <= size[1]
    scale = [side / units if units else 1.0 for side in size] * 2
    written = tuple(v * s for v, s in zip(collect.numbers(values, bracketed=True), scale))
    if not repairs:
        assert box == pytest.approx(written, rel=1e-12, abs=1e-9)


@hypothesis.given(st.lists(st.tuples(
    st.tuples(*[st.floats(0, 1)] * 4), st.tuples(st.integers(200, 900), st.integers(200, 900))),
    min_size=8, max_size=40))
def test_the_unit_is_recognised_from_the_boxes(drawn: list[tuple[tuple[float, ...], Any]]) -> None:
    """Boxes spread over images of up to 900 pixels a side, in three units."""
    fractions = []
    for (a, b, c, d), size in drawn:
        x1, x2 = sorted((a, c))
        y1, y2 = sorted((b, d))
        fractions.append(((x1, y1, x2 + 1e-3, y2 + 1e-3), size))
    # So that no draw lies in one corner of all images.
    fractions += [((0.92, 0.1, 0.97, 0.2), (900, 900)), ((0.1, 0.1, 0.2, 0.3), (200, 200))]
    fractions = [(np.minimum(box, 1.0).tolist(), size) for box, size in fractions]
    pixels = []
    thousandths = []
    for (x1, y1, x2, y2), (width, height) in fractions:
        pixels.append(((x1 * width, y1 * height, x2 * width, y2 * height), (width, height)))
        thousandths.append(((1000 * x1, 1000 * y1, 1000 * x2, 1000 * y2), (width, height)))
    for boxes, unit in ((fractions, "fraction"), (thousandths, "1000")):
        with pytest.raises(DataError, match=f"--data-coords {unit}, "):
            collect.refuse_other_unit(boxes, "a.jsonl: its boxes")
    collect.refuse_other_unit(pixels, "a.jsonl: its boxes")
