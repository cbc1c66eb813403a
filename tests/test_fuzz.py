"""Thousands of damaged files and answers: one line each, and no traceback.

50 cases a test, 10,000 where NIGHTLY=1 (conftest.py).
"""
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from conftest import ADDED, byte_tokenizer
from model import QwenVL
from qwen.answer import (
    Frame,
    failure,
    form,
    format_box,
    format_ok,
    parse_box,
    parse_box_lenient,
    write,
)
from qwen.hub import CheckpointError
from qwen.processor import Processor, smart_resize
from readers.base import DataError

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies
given = hypothesis.given

numbers = st.one_of(
    st.integers(), st.integers(-2, 70), st.floats(), st.booleans(), st.none(),
    st.sampled_from([2 ** 31, 2 ** 63, 10 ** 400, 1e308, 0.0]))
texts = st.one_of(st.text(max_size=8), st.sampled_from(["silu", "mrope", "1", "\ud800", "../x"]))
json_values = st.recursive(
    st.one_of(numbers, texts),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=6)


def places(content: Any, path: tuple = ()) -> list[tuple]:
    """Paths to all values in a JSON value, its own first."""
    found = [path]
    items = ()
    if isinstance(content, dict):
        items = content.items()
    elif isinstance(content, list):
        items = enumerate(content)
    for key, value in items:
        found += places(value, (*path, key))
    return found


def put(content: Any, path: tuple, value: Any) -> Any:
    """The JSON value with another one at a path; ... removes it."""
    if not path:
        return None if value is ... else value
    key, *rest = path
    changed = content.copy()
    changed[key] = put(content[key], tuple(rest), value)
    if value is ... and not rest:
        del changed[key]
    return changed


@st.composite
def damaged(draw: Callable, content: Any) -> bytes:
    """A JSON file with some values or bytes changed or removed."""
    for _ in range(draw(st.integers(0, 3))):
        path = draw(st.sampled_from(places(content)))
        content = put(content, path, draw(st.one_of(json_values, st.just(...))))
    return draw(damaged_bytes(json.dumps(content).encode(), 1))


@st.composite
def damaged_bytes(draw: Callable, whole: bytes, most: int) -> bytes:
    """Bytes with up to `most` parts replaced, mostly none."""
    for _ in range(draw(st.sampled_from([0, 0, most]))):
        start = draw(st.integers(0, len(whole)))
        length = draw(st.sampled_from([0, 1, 1, 8, len(whole)]))
        whole = whole[:start] + draw(st.binary(max_size=4)) + whole[start + length:]
    return whole


def one_line(read: Callable[[], Any]) -> Any:
    """The result, or None after a one-line error."""
    try:
        return read()
    except (CheckpointError, DataError) as error:
        assert str(error) and "\n" not in str(error)
        return None


# ---------------------------------------------------------------- answers and frames

pieces = st.sampled_from([
    "<think>", "</think>", "<answer>", "</answer>", '{"bbox_2d": [', "1, 2, 3, 4", "]}", "[", "]",
    "(", ")", "(1,2)", "),(", ",", " ", "<|box_start|>", "<|box_end|>", "<|object_ref_start|>",
    "NaN", "1e999", "-", "true", '{"', "```json\n", "```", "\ud800", '{"bbox_2d": [1, 2, 3, 4]}',
    "(1,2),(3,4)"])
answers = st.lists(
    st.one_of(pieces, st.text(max_size=5), numbers.map(str)), max_size=20).map("".join)


@given(answers)
def test_any_answer_is_a_box_or_a_failure(text: str) -> None:
    in_answer = write("", "[1, 2, 3, 4]").replace('{"bbox_2d": [1, 2, 3, 4]}', text)
    for answer in (text, in_answer):
        strict = parse_box(answer)
        assert (strict is None) == (failure(answer) is not None)
        assert strict is not None or not format_ok(answer)
        lenient = parse_box_lenient(answer)
        assert strict is None or lenient == strict
        assert strict is None or form(answer) in ("bare", "fenced", "list", "fenced list")
        if lenient is not None:
            assert all(map(math.isfinite, lenient))
            assert lenient[2] > lenient[0] and lenient[3] > lenient[1]


corners = st.tuples(*[st.floats(0, 1e6, width=32)] * 4).filter(
    lambda box: box[2] > box[0] and box[3] > box[1])


@given(corners, st.sampled_from(["({},{}),({},{})", "[{}, {}, {}, {}]"]), st.text(max_size=5))
def test_a_box_in_either_spelling_is_read_leniently(
        box: tuple, spelling: str, before: str) -> None:
    box = tuple(round(x, 3) for x in box)
    hypothesis.assume(box[2] > box[0] and box[3] > box[1])
    hypothesis.assume("[" not in before and "(" not in before)
    text = f"{before}<|box_start|>{spelling.format(*map(repr, box))}<|box_end|>"
    hypothesis.assume("e" not in text[len(before) + 13:-11])
    assert parse_box_lenient(text) == box and parse_box(text) is None


sides = st.integers(1, 20_000)


@given(sides, sides, st.sampled_from(["absolute", "1000"]), st.tuples(*[st.floats(0, 1)] * 4))
def test_frames_are_inverse_to_rounding(
        width: int, height: int, convention: str, fractions: tuple) -> None:
    hypothesis.assume(max(width, height) <= 200 * min(width, height))
    resized = smart_resize(width, height, 28, 56 * 56, 28 * 28 * 1280)
    assert resized[0] % 28 == 0 == resized[1] % 28
    frame = Frame((width, height), resized, convention)
    box = tuple(f * (width, height)[i % 2] for i, f in enumerate(fractions))
    for there, back in ((frame.to_model, frame.to_image), (frame.to_image, frame.to_model)):
        assert back(there(box)) == pytest.approx(box, rel=1e-12, abs=1e-12)
    x1, x2 = sorted(box[::2])
    y1, y2 = sorted(box[1::2])
    hypothesis.assume(x2 - x1 > 1e-6 and y2 - y1 > 1e-6)
    written = parse_box(write(None, format_box((x1, y1, x2, y2), frame)))
    # A whole number is half a unit off, or one where the box is thinner than a unit.
    for taught, meant in zip(written, frame.to_model((x1, y1, x2, y2))):
        assert abs(taught - meant) <= 1


# ---------------------------------------------------------------- a checkpoint's files

@pytest.fixture(scope="module")
def whole(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every file that a checkpoint may have, in a folder that the tests damage and restore."""
    path = tmp_path_factory.mktemp("whole")
    shutil.copytree(tiny_checkpoint, path, dirs_exist_ok=True)
    settings = json.loads((path / "preprocessor_config.json").read_text())
    vocab = byte_tokenizer().get_vocab(with_added_tokens=False)
    added = {text: len(vocab) + i for i, text in enumerate(ADDED)}
    decoder = {i: {"content": text, "special": True} for text, i in added.items()}
    tensors = dict.fromkeys(QwenVL.from_pretrained(path).state_dict(), "model.safetensors")
    for name, content in {
            "processor_config.json": {"image_processor": settings, "processor_class": "x"},
            "vocab.json": vocab, "added_tokens.json": added,
            "tokenizer_config.json": {"added_tokens_decoder": decoder},
            "model.safetensors.index.json": {"metadata": {}, "weight_map": tensors},
            "run.json": {"pixels": [settings["min_pixels"], settings["max_pixels"]]}}.items():
        (path / name).write_text(json.dumps(content))
    (path / "merges.txt").write_text("#version: 0.2\n")
    return path


def read_with(whole: Path, name: str, data: Any, read: Callable[[Path], Any]) -> Any:
    """Reads the folder while one file in it is damaged."""
    file = whole / name
    good = file.read_bytes()
    file.write_bytes(data.draw(damaged(json.loads(good)), label=name))
    try:
        return one_line(lambda: read(whole))
    finally:
        file.write_bytes(good)


def without(whole: Path, names: list[str], tmp_path: Path) -> Path:
    """A copy of the folder without some files, to read what replaces them."""
    folder = tmp_path / "folder"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole, folder, ignore=lambda _, files: [f for f in files if f in names])
    return folder


def ask(folder: Path) -> Processor:
    """Reads the processor and makes a prompt, if its image has a usable size."""
    processor = Processor.from_pretrained(folder)
    if processor.min_pixels < 10 ** 6 and processor.patch * processor.merge < 1000:
        prompt = processor(Image.new("RGB", (80, 60)), "the ship")
        assert len(prompt.pixel_values) == prompt.image_grid_thw.prod()
        assert torch.isfinite(prompt.pixel_values).all()
        processor.decode(processor.encode("the ship"))
    return processor


FALLBACKS = {
    "preprocessor_config.json": ["processor_config.json"],
    "processor_config.json": [],
    "tokenizer.json": [],
    "vocab.json": ["tokenizer.json"],
    "added_tokens.json": ["tokenizer.json", "tokenizer_config.json"],
    "tokenizer_config.json": ["tokenizer.json", "added_tokens.json"],
    "run.json": []}


@pytest.mark.parametrize("name", FALLBACKS)
def test_damaged_processor_files(whole: Path, tmp_path: Path, name: str) -> None:
    folder = without(whole, FALLBACKS[name], tmp_path)
    ask(folder)

    @given(st.data())
    def check(data: Any) -> None:
        read_with(folder, name, data, ask)
    check()


def load(folder: Path) -> QwenVL:
    return QwenVL.from_pretrained(folder, dtype=None)


@pytest.mark.parametrize("name", ["tokenizer.json", "model.safetensors.index.json"])
def test_damaged_files_of_the_model(whole: Path, tmp_path: Path, name: str) -> None:
    folder = without(whole, [], tmp_path)
    if "index" in name:
        # The index is read where there is no model.safetensors; it may name a shard.
        (folder / "model.safetensors").rename(folder / "shard.safetensors")
        content = (folder / name).read_text().replace('"model.s', '"shard.s')
        (folder / name).write_text(content)
    load(folder)

    @given(st.data())
    def check(data: Any) -> None:
        read_with(folder, name, data, load)
    check()


def test_damaged_safetensors_headers(whole: Path) -> None:
    file = whole / "model.safetensors"
    good = file.read_bytes()
    end = 8 + int.from_bytes(good[:8], "little")
    header = json.loads(good[8:end])

    @given(st.data())
    def check(data: Any) -> None:
        changed = data.draw(damaged(header))
        size = data.draw(damaged_bytes(len(changed).to_bytes(8, "little"), 1))
        rest = data.draw(st.sampled_from([good[end:], good[end:-1], good[end:] + b"\0", b""]))
        file.write_bytes(size + changed + rest)
        model = one_line(lambda: load(whole))
        if model is not None:
            assert all(p.is_floating_point() for p in model.parameters())
    try:
        check()
    finally:
        file.write_bytes(good)
