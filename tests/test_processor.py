"""processor.py on the files that other programs leave in a checkpoint's folder."""
import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from conftest import ADDED, byte_tokenizer
from model import QwenVL
from qwen.hub import CheckpointError, read_token_ids
from qwen.processor import Processor
from readers.base import DataError
from train import checkpoints, dist

TOP = "preprocessor_config.json"
NESTED = "processor_config.json"
LONG = "the small white plane left of the hangar"


@pytest.fixture
def folder(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint's files without its weights, to be changed."""
    for name in ("config.json", TOP, "tokenizer.json"):
        shutil.copyfile(tiny_checkpoint / name, tmp_path / name)
    return tmp_path


# ---------------------------------------------------------------- tokenizer

def truncating(content: dict[str, Any]) -> None:
    content["truncation"] = {
        "direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}


def padding(content: dict[str, Any]) -> None:
    content["padding"] = {
        "strategy": {"Fixed": 64}, "direction": "Left", "pad_to_multiple_of": None, "pad_id": 256,
        "pad_type_id": 0, "pad_token": "<|endoftext|>"}


def dropping_merges(content: dict[str, Any]) -> None:
    content["model"]["merges"] = [["t", "h"], ["th", "e"]]
    content["model"]["vocab"] |= {"th": 270, "the": 271}
    content["model"]["dropout"] = 0.9


def adding_an_end(content: dict[str, Any]) -> None:
    special = {"SpecialToken": {"id": "<|im_end|>", "type_id": 0}}
    content["post_processor"] = {
        "type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}, special],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {
            "<|im_end|>": {"id": "<|im_end|>", "ids": [258], "tokens": ["<|im_end|>"]}}}


@pytest.mark.parametrize("store", [truncating, padding, dropping_merges, adding_an_end])
def test_state_in_tokenizer_json_neither_cuts_nor_pads_nor_scatters(
        folder: Path, store: Callable[[dict[str, Any]], None],
) -> None:
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    before = Processor.from_pretrained(folder).encode(LONG)
    store(content)
    file.write_text(json.dumps(content))
    ours = Processor.from_pretrained(folder)
    ids = ours.encode(LONG)
    assert ours.decode(ids) == LONG and ids[-1] == ours.end_id
    if store is dropping_merges:
        assert len(ids) == len(before) - 4          # "the " twice
        assert all(torch.equal(ours.encode(LONG), ids) for _ in range(20))
    else:
        assert torch.equal(ids, before)
    prompt = ours(Image.new("RGB", (56, 56)), LONG)
    assert LONG in ours.decode(prompt.input_ids)
    # The file is the user's own.
    ours.save_pretrained(folder / "copy")
    assert (folder / "copy" / "tokenizer.json").read_bytes() == file.read_bytes()


def write_old_layout(folder: Path) -> dict[str, int]:
    """vocab.json, merges.txt and added_tokens.json alone, as Qwen2's first release -> its ids."""
    vocab = byte_tokenizer().get_vocab(with_added_tokens=False)
    added = {text: len(vocab) + i for i, text in enumerate(ADDED)}
    (folder / "tokenizer.json").unlink(missing_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "added_tokens.json").write_text(json.dumps(added))
    return {**vocab, **added}


def test_vocab_merges_and_added_tokens_alone_are_read(folder: Path) -> None:
    before = Processor.from_pretrained(folder)
    ids = write_old_layout(folder)
    assert read_token_ids(folder) == ids
    ours = Processor.from_pretrained(folder)
    assert ours.tokenizer.get_vocab() == ids and ours.ids == before.ids
    question = (Image.new("RGB", (56, 56)), "the ship<|im_end|>")
    assert torch.equal(ours(*question).input_ids, before(*question).input_ids)
    ours.save_pretrained(folder / "copy")
    assert read_token_ids(folder / "copy") == ids


@pytest.mark.parametrize("added, words", [
    ({"<|im_end|>": 300},
     "<|im_end|> is 300 in added_tokens.json, but not in tokenizer_config.json"),
    ({"<other>": 256}, "<other> is 256 in added_tokens.json, but not"),
    ({"<other>": "264"}, "<other> is '264' in added_tokens.json"),
    ([1], "not a readable JSON object")])
def test_added_tokens_that_do_not_fit_are_refused(
        folder: Path, added: Any, words: str,
) -> None:
    ids = write_old_layout(folder)
    decoder = {ids[text]: {"content": text} for text in ADDED}
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder}))
    (folder / "added_tokens.json").write_text(json.dumps(added))
    for read in (read_token_ids, Processor.from_pretrained):
        with pytest.raises(CheckpointError) as error:
            read(folder)
        assert words in str(error.value) and "added_tokens.json" in str(error.value)


# ---------------------------------------------------------------- pixel limits

A = {"min_pixels": 3136, "max_pixels": 50_000}
B = {"shortest_edge": 6272, "longest_edge": 60_000}


def write_settings(folder: Path, top: dict | None, nested: dict | None) -> None:
    """The processor files with these settings on pixels; None: no such file."""
    settings = json.loads((folder / TOP).read_text())
    settings |= {"image_processor_type": "Qwen2VLImageProcessor"}
    del settings["min_pixels"], settings["max_pixels"]
    (folder / TOP).unlink()
    if top is not None:
        (folder / TOP).write_text(json.dumps(settings | top))
    if nested is not None:
        whole = {"processor_class": "Qwen2_5_VLProcessor", "image_processor": settings | nested}
        (folder / NESTED).write_text(json.dumps(whole))


LIMITS = {
    "top": (A, None),
    "size": ({"size": B}, None),
    "top and size": ({**A, "size": B}, None),
    "one of each": ({"max_pixels": 50_000, "size": B}, None),
    "one of each, the other missing": ({"max_pixels": 50_000, "size": {"shortest_edge": 99}}, None),
    "null": ({"min_pixels": None, "max_pixels": None, "size": B}, None),
    "none": ({}, None),
    "nested": (None, A),
    "nested size": (None, {"size": B}),
    "both files": (A, {"size": B}),
    "both files, the other way": ({"size": B}, A)}


@pytest.mark.parametrize("top, nested", LIMITS.values(), ids=LIMITS)
def test_pixel_limits_have_the_precedence_of_transformers(
        folder: Path, top: dict | None, nested: dict | None,
) -> None:
    module = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    write_settings(folder, top, nested)
    theirs = module.Qwen2VLImageProcessorPil.from_pretrained(folder)
    ours = Processor.from_pretrained(folder)
    assert [ours.min_pixels, ours.max_pixels] == [
        theirs.size["shortest_edge"], theirs.size["longest_edge"]]
    image = Image.new("RGB", (500, 400), "red")
    want = theirs(images=[image], return_tensors="pt")
    assert torch.equal(ours(image, "x").image_grid_thw, want["image_grid_thw"])


@pytest.mark.parametrize("top, nested", LIMITS.values(), ids=LIMITS)
def test_the_limit_of_training_stands_in_the_saved_file_that_is_read_back(
        folder: Path, top: dict | None, nested: dict | None,
) -> None:
    module = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    write_settings(folder, top, nested)
    ours = Processor.from_pretrained(folder, max_pixels=20_000)
    ours.save_pretrained(folder / "saved")
    for again in (Processor.from_pretrained(folder / "saved"),
                  Processor.from_pretrained(folder / "saved", max_pixels=20_000)):
        assert (again.min_pixels, again.max_pixels) == (ours.min_pixels, 20_000)
    theirs = module.Qwen2VLImageProcessorPil.from_pretrained(folder / "saved")
    assert theirs.size["longest_edge"] == 20_000
    # Whichever file a reader prefers.
    for name in (TOP, NESTED):
        assert (folder / "saved" / name).exists() == (folder / name).exists()
    (folder / "saved" / NESTED).unlink(missing_ok=True)
    if top is not None:
        assert Processor.from_pretrained(folder / "saved").max_pixels == 20_000


def test_another_limit_than_that_of_training_is_refused(folder: Path) -> None:
    (folder / "run.json").write_text(json.dumps({"pixels": [3136, 100352]}))
    assert Processor.from_pretrained(folder).max_pixels == 100352
    settings = json.loads((folder / TOP).read_text())
    (folder / TOP).write_text(json.dumps(settings | {"max_pixels": 50_000}))
    with pytest.raises(DataError, match=r"3136 to 50000 pixels, but .* trained with \[3136, 1003"):
        Processor.from_pretrained(folder)
    # The next stage may train at another size.
    assert Processor.from_pretrained(folder, max_pixels=40_000).max_pixels == 40_000


def test_a_step_is_read_back_with_the_limit_that_it_was_trained_with(
        tiny_checkpoint: Path, folder: Path,
) -> None:
    write_settings(folder, None, A)
    model = QwenVL.from_pretrained(tiny_checkpoint, dtype=None)
    out = folder / "out"
    out.mkdir()
    trained = Processor.from_pretrained(folder, max_pixels=20_000)
    keep = SimpleNamespace(keep=2, keep_weights=None)
    checkpoints.save(
        out, {"step": 1}, model, dist.optimizer(model, 1e-3), trained, {}, keep)
    assert json.loads((out / "latest" / "run.json").read_text())["pixels"] == [3136, 20_000]
    assert Processor.from_pretrained(out).max_pixels == 20_000
    # The hub's file put back, which has another limit.
    shutil.copyfile(folder / NESTED, out / "latest" / NESTED)
    with pytest.raises(DataError, match=f"{NESTED} resizes images to 3136 to 50000 pixels, but"):
        Processor.from_pretrained(out)


@pytest.mark.parametrize("name, value, words", [
    ("do_resize", False, "do_resize is False, but this code supports only True"),
    ("resample", 2, "resample is 2, but"),
    ("rescale_factor", 1, "rescale_factor is 1, but"),
    ("do_normalize", "no", "do_normalize is 'no', but"),
    ("patch_size", [14, 14], r"patch_size is \[14, 14\], not a whole number"),
    ("merge_size", 0, "merge_size is 0, not"),
    ("temporal_patch_size", True, "temporal_patch_size is True, not"),
    ("max_pixels", 1e6, "max_pixels is 1000000.0, not"),
    ("max_pixels", "many", "max_pixels is 'many', not"),
    ("image_mean", 0.5, "image_mean is 0.5, not three numbers"),
    ("image_std", [0.5, 0.5, 0], "image_std .* not three numbers above 0"),
    ("size", 224, "size is 224, not shortest_edge")])
@pytest.mark.parametrize("nested", [False, True])
def test_settings_that_are_not_computed_are_refused_by_name(
        folder: Path, nested: bool, name: str, value: Any, words: str,
) -> None:
    settings = {**A, name: value}
    write_settings(folder, None if nested else settings, settings if nested else None)
    with pytest.raises(DataError, match=f"{NESTED if nested else TOP}: {words}"):
        Processor.from_pretrained(folder)


def test_a_size_without_limits_is_refused(folder: Path) -> None:
    write_settings(folder, {"size": {"height": 224, "width": 224}}, None)
    with pytest.raises(DataError, match="size has no shortest_edge"):
        Processor.from_pretrained(folder)


@pytest.mark.parametrize("name", [TOP, NESTED, "config.json", "run.json"])
def test_a_list_in_place_of_an_object_is_one_line(folder: Path, name: str) -> None:
    settings = json.loads((folder / TOP).read_text())
    del settings["processor_class"]
    (folder / TOP).write_text(json.dumps(settings))
    (folder / name).write_text("[1]")
    with pytest.raises(DataError, match=f"{name}: not a JSON object"):
        Processor.from_pretrained(folder)


def test_threads_share_a_processor(folder: Path) -> None:
    processor = Processor.from_pretrained(folder)
    images = [Image.new("RGB", (60 + i % 7 * 9, 80), (i, 0, 0)) for i in range(64)]
    texts = [f"the ship number {i}" for i in range(64)]
    with ThreadPoolExecutor(8) as pool:
        prompts = list(pool.map(processor, images, texts))
    for image, text, prompt in zip(images, texts, prompts):
        alone = processor(image, text)
        assert torch.equal(prompt.input_ids, alone.input_ids)
        assert torch.equal(prompt.pixel_values, alone.pixel_values)
