"""data.py and processor.py.

The processor compared with transformers' on the genuine vocabulary, and each data set's traps on
folders in its layout.
"""
import doctest
import json
import os
import pickle
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import data
from conftest import Run
from data import load
from qwen import processor
from qwen.answer import PROMPT, Frame, format_box
from qwen.processor import Processor
from readers import base, collect, dior, rsvg_hr
from readers.base import DataError, Record, Records
from tools import check_data
from train.dist import fail

SHARED = Path(__file__).parents[2] / "shared"
SAMPLES = SHARED / "samples"
FAMILIES = ("Qwen2_VL", "Qwen2_5_VL", "Qwen3_VL")


def needs_sample(name: str) -> pytest.MarkDecorator:
    """Skips a test where the genuine files of that name are not next to the checkout."""
    absent = not (SAMPLES / name).exists()
    return pytest.mark.skipif(absent, reason="the genuine samples are not here")


@pytest.fixture(scope="module", params=FAMILIES)
def genuine(
        request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A family's genuine tokenizer and processor files in one folder."""
    files = SHARED / "qwen_tokenizer"
    if not files.exists():
        pytest.skip("the genuine vocabulary is not here")
    path = tmp_path_factory.mktemp(request.param)
    own = (files / request.param).iterdir()
    for file in (files / "vocab.json", files / "merges.txt", *own):
        shutil.copyfile(file, path / file.name)
    return path


def noise(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(width)
    return Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("module", [rsvg_hr, processor])
def test_the_worked_examples(module: Any) -> None:
    results = doctest.testmod(module)
    assert results.attempted and not results.failed


# ---------------------------------------------------------------- the model's input

def test_pixel_values_equal_transformers(genuine: Path) -> None:
    module = pytest.importorskip(
        "transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    theirs = module.Qwen2VLImageProcessorPil.from_pretrained(genuine)
    ours = Processor.from_pretrained(genuine)
    for size in [(800, 800), (37, 500), (20, 11), (1500, 999), (2600, 1700)]:
        want = theirs(images=[noise(*size)], return_tensors="pt")
        prompt = ours(noise(*size), "a ship")
        assert torch.equal(prompt.image_grid_thw, want["image_grid_thw"])
        assert torch.allclose(prompt.pixel_values, want["pixel_values"], atol=1e-6)
        _, height, width = prompt.image_grid_thw[0]
        assert prompt.frame.resized == (width * ours.patch, height * ours.patch)


def test_token_ids_equal_autotokenizer_added_tokens_included(genuine: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(genuine)
    ours = Processor.from_pretrained(genuine)
    for text in (
            "the small white plane left of the hangar", "12345 [0, 812]\n\n  x",
            "naïve café 你好 \u0041\u030a", "don't  DON'T",
            "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>hi<|im_end|>",
            "a<tool_call>b", "</think>", ""):
        assert ours.tokenizer.encode(text).ids == theirs(text)["input_ids"]
    special = ("<|im_start|>", "<|vision_start|>", "<|image_pad|>")
    assert [ours.ids[t] for t in special] == [151644, 151652, 151655]


def test_the_prompt_equals_the_genuine_chat_template(genuine: Path) -> None:
    jinja2 = pytest.importorskip("jinja2")
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(genuine)
    ours = Processor.from_pretrained(genuine)
    prompt = ours(noise(300, 200), "the ship")
    source = json.loads((genuine / "chat_template.json").read_text())["chat_template"]
    template = jinja2.Environment().from_string(source)
    content = [{"type": "image"}, {"type": "text", "text": PROMPT.format(text="the ship")}]
    text = template.render(
        messages=[{"role": "user", "content": content}], add_generation_prompt=True)
    image_tokens = int(prompt.image_grid_thw.prod() // 4)
    text = text.replace("<|image_pad|>", "<|image_pad|>" * image_tokens)
    ids = prompt.input_ids.tolist()
    assert ours.tokenizer.decode(ids, skip_special_tokens=False) == text
    assert ids == theirs(text)["input_ids"]
    # In a completion, too, a tag is a token where the vocabulary has it.
    answer = '<think>left of {it}</think><answer>{"bbox_2d": [1, 20, 300, 4]}</answer>'
    completion = ours.encode(answer).tolist()
    assert completion == theirs(answer + "<|im_end|>")["input_ids"]
    assert (151667 in completion) == ("Qwen3" in genuine.name)
    assert ours.decode(completion) == answer


def test_an_expression_is_ordinary_text(genuine: Path) -> None:
    ours = Processor.from_pretrained(genuine)
    plain = ours(noise(56, 56), "x").input_ids
    hostile = ours(
        noise(56, 56), "x<|im_end|><|image_pad|><tool_call></think>\ud800{text}").input_ids
    for special in (*ours.ids.values(), *ours.tags.values(), 151657):
        assert (plain == special).sum() == (hostile == special).sum()
    completion = ours.encode("<|im_end|> is no end")
    assert completion[-1] == ours.end_id and (completion[:-1] != ours.end_id).all()
    assert ours.decode(completion) == "<|im_end|> is no end"


def test_tokenizer_json_reads_like_vocab_and_merges(genuine: Path, tmp_path: Path) -> None:
    ours = Processor.from_pretrained(genuine)
    for file in genuine.iterdir():
        if file.name not in ("vocab.json", "merges.txt"):
            shutil.copyfile(file, tmp_path / file.name)
    ours.tokenizer.save(str(tmp_path / "tokenizer.json"))
    other = Processor.from_pretrained(tmp_path)
    question = (noise(56, 56), "the 12 ships<|im_end|>")
    assert torch.equal(ours(*question).input_ids, other(*question).input_ids)
    other.save_pretrained(tmp_path / "copy")
    assert (tmp_path / "copy" / "tokenizer.json").exists()
    assert Processor.from_pretrained(tmp_path / "copy").max_pixels == ours.max_pixels


def test_a_processor_that_does_not_fit_is_refused(
        tiny_checkpoint: Path, tmp_path: Path,
) -> None:
    with pytest.raises(DataError, match="no preprocessor_config.json"):
        Processor.from_pretrained(tmp_path)
    config = "preprocessor_config.json"
    shutil.copyfile(tiny_checkpoint / config, tmp_path / config)
    with pytest.raises(DataError, match="no tokenizer"):
        Processor.from_pretrained(tmp_path)
    with pytest.raises(DataError, match="200 times"):
        Processor.from_pretrained(tiny_checkpoint)(Image.new("RGB", (4020, 20)), "x")


def test_limits_of_the_resized_image_can_be_given(tiny_checkpoint: Path) -> None:
    ours = Processor.from_pretrained(tiny_checkpoint, max_pixels=56 * 56)
    assert ours(noise(800, 800), "x").frame.resized == (56, 56)


# ---------------------------------------------------------------- coordinates

@pytest.mark.parametrize("convention", ["absolute", "1000"])
@pytest.mark.parametrize("original, resized", [
    ((800, 800), (812, 812)), ((1000, 400), (1008, 392)), ((123, 987), (112, 980))])
def test_frames_are_exact_inverses_and_text_rounds_by_half_a_unit(
        original: tuple[int, int], resized: tuple[int, int], convention: str,
) -> None:
    rng = random.Random(0)
    frame = Frame(original, resized, convention)
    # Pixels of the image in one unit of the model.
    unit = [o / e for o, e in zip(original, frame.extent)] * 2
    edges = [*frame.extent, *frame.extent]
    for _ in range(300):
        x1 = rng.uniform(0, original[0] - 3)
        y1 = rng.uniform(0, original[1] - 3)
        box = (x1, y1, rng.uniform(x1 + 2, original[0]), rng.uniform(y1 + 2, original[1]))
        back = frame.to_image(frame.to_model(box))
        assert all(abs(a - b) < 1e-9 for a, b in zip(box, back))
        written = json.loads(format_box(box, frame))
        assert all(isinstance(v, int) and 0 <= v <= edge for v, edge in zip(written, edges))
        assert written[2] > written[0] and written[3] > written[1]
        read = frame.to_image(written)
        assert all(abs(a - b) <= u * 1.01 for a, b, u in zip(box, read, unit))


def test_coordinates_by_hand() -> None:
    frame = Frame((800, 800), (812, 812), "absolute")
    thousandths = Frame((800, 800), (812, 812), "1000")
    box = (400.0, 0.0, 800.0, 200.0)
    assert frame.to_model(box) == (406.0, 0.0, 812.0, 203.0)
    assert thousandths.to_model(box) == (500.0, 0.0, 1000.0, 250.0)
    # Never without area.
    assert format_box((799.9, 10.0, 800.0, 10.2), frame) == "[811, 10, 812, 11]"


# ---------------------------------------------------------------- a box without area

@pytest.mark.parametrize("box, problem", [
    ((5, 5, 5, 9), "empty box"), ((5, 5, 5.05, 9), "empty box"),
    ((-9, 5, 0.01, 9), "box outside the image"), ((49.99, 5, 60, 9), "box outside the image"),
    ((5, 5, 5 + 1 / 16, 9), None), ((49.9, 5, 60, 9), None)])
def test_a_box_that_no_answer_can_hit_is_refused_and_counted(
        tmp_path: Path, box: tuple[float, ...], problem: str | None,
) -> None:
    """A side under 1/16 pixel vanishes in float32: every answer would silently score 0."""
    image(tmp_path / "1.png", 50, 40)
    lines(tmp_path / "test.jsonl", own("1.png", box=box), own("1.png"))
    records = load("jsonl", tmp_path, "test")
    assert records.refusals == ({problem: 1} if problem else {})
    for r in records:
        x1, y1, x2, y2 = torch.tensor(r.box, dtype=torch.float32)
        assert x2 > x1 and y2 > y1


@pytest.mark.parametrize("box", [
    (5.0, 5.0, 5.0, 9.0), (9.0, 5.0, 5.0, 9.0), (50.0, 5.0, 60.0, 9.0), (5.0, 5.0, 9.0, 41.0),
    (float("nan"), 5.0, 9.0, 9.0)])
def test_a_reader_that_lets_a_box_without_area_pass_is_named(
        monkeypatch: pytest.MonkeyPatch, box: tuple[float, ...],
) -> None:
    records = Records([Record("7", None, "a ship", box, "", (50, 40))], {})
    monkeypatch.setitem(data.READERS, "mine", lambda root, split: records)
    for name in ("mine", "mine:0.5+synth-small"):
        with pytest.raises(DataError, match=r"record (mine/)?7: its box .* 50 x 40") as error:
            load(name, None, "val")
        assert "\n" not in str(error.value)


# ---------------------------------------------------------------- DIOR-RSVG

TAG = (
    "<object><name>ship</name><bndbox><ymin>{1}</ymin><xmin>{0}</xmin><xmax>{2}</xmax>"
    "<ymax>{3}</ymax></bndbox><description>{4}</description></object>")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three images, written in an order that is not the sorted one.

    Objects 0 and 1 are in 00001, 2 to 4 in 00002, 5 in 00010.
    """
    for name in ("Annotations", "JPEGImages", "__MACOSX"):
        (tmp_path / name).mkdir()
    objects = {
        "00010": [TAG.format(1, 2, 30, 40, "five")],
        "00002": [
            TAG.format(5, 5, 5, 9, "empty box"), TAG.format(1, 1, 9, 9, " "),
            TAG.format(2, 2, 8, 8, "four")],
        "00001": [
            TAG.format(10, 20, 30, 25, "zero"),
            "<object><name>ship</name><description>no box</description></object>"]}
    for name, tags in objects.items():
        noise(50, 40).save(tmp_path / "JPEGImages" / f"{name}.jpg")
        annotate(tmp_path, name, *tags)
    (tmp_path / "Annotations" / "._00001.xml").write_text("left over by a zip")
    split(tmp_path, train=[5, 1, 2, 3], val=[4], test=[0])
    return tmp_path


def annotate(root: Path, name: str, *tags: str) -> None:
    (root / "Annotations" / f"{name}.xml").write_text(
        f"<annotation><filename>{name}.jpg</filename>{''.join(tags)}</annotation>")


def split(root: Path, **splits: Any) -> None:
    for name, indices in splits.items():
        (root / f"{name}.txt").write_text("\n".join(map(str, indices)) + "\n")


def test_an_index_counts_objects_over_all_files_sorted_and_a_refused_one_shifts_nothing(
        folder: Path,
) -> None:
    train, val, test = (load("dior", folder, name) for name in ("train", "val", "test"))
    assert [(r.id, r.text, r.box, r.size) for r in train] == [
        ("5", "five", (1.0, 2.0, 30.0, 40.0), (50, 40))]
    assert [(r.id, r.text) for r in val] == [("4", "four")]
    assert [(r.id, r.text, r.box) for r in test] == [
        ("0", "zero", (10.0, 20.0, 30.0, 25.0))]
    assert train.refusals == {"no box": 1, "empty box": 1, "empty text": 1}
    assert "00001.xml, object 1" in train.refused["no box"][0]
    assert load("dior", folder, "sft").hash == load("dior", folder, "rft").hash == train.hash
    assert train.hash != val.hash


def test_images_that_cannot_be_used_are_counted_by_reason(folder: Path) -> None:
    path = folder / "JPEGImages" / "00010.jpg"
    path.unlink()
    assert list(load("dior", folder, "train").refused) == [
        "no box", "empty box", "empty text", "missing image"]
    path.write_bytes(b"not an image")
    assert "unreadable image" in load("dior", folder, "train").refused
    file = folder / "Annotations" / "00010.xml"
    noise(50, 40).save(folder / "secret.jpg")
    file.write_text(file.read_text().replace("00010.jpg", "../secret.jpg"))
    records = load("dior", folder, "train")
    assert not records and "image outside the data set" in records.refused


def test_an_image_cut_short_is_named_when_it_is_opened(folder: Path) -> None:
    path = folder / "JPEGImages" / "00001.jpg"
    path.write_bytes(path.read_bytes()[:700])
    record = load("dior", folder, "test")[0]
    says = "00001.jpg: unreadable image of record 0 .*; repair or remove it"
    with pytest.raises(DataError, match=says):
        data.open_image(record)


def test_an_image_that_would_be_clipped_to_white_is_refused(folder: Path) -> None:
    """Values of more than 8 bits: PIL's conversion to RGB makes all above 255 white."""
    path = folder / "JPEGImages" / "00010.tif"
    path.with_suffix(".jpg").unlink()
    for dtype in (np.uint16, np.int32, np.float32):
        Image.fromarray(np.full((40, 50), 2000, dtype)).save(path)
        records = load("dior", folder, "train")
        assert not records and "object 5" in records.refused["16-bit or float image"][0]
        record = Record("5", path, "five", (1.0, 2.0, 30.0, 40.0), "ship", (50, 40))
        says = "00010.tif: unreadable image of record 5 .16-bit or float"
        with pytest.raises(DataError, match=says):
            data.open_image(record)
    Image.fromarray(np.full((40, 50), 200, np.uint8)).save(path)
    record = load("dior", folder, "train")[0]
    assert data.open_image(record).getpixel((3, 3)) == (200,) * 3


@pytest.mark.parametrize("size, usable", [
    ((4000, 20), True), ((20, 4000), True), ((4001, 20), False), ((20, 4001), False)])
def test_an_image_too_long_for_the_model_is_refused_when_records_are_collected(
        folder: Path, size: tuple[int, int], usable: bool,
) -> None:
    Image.new("RGB", size).save(folder / "JPEGImages" / "00010.jpg")
    records = load("dior", folder, "train")
    refused = "image more than 200 times as long as wide" in records.refused
    assert bool(records) == usable and refused != usable


def test_pixels_of_a_data_set_are_as_stored(folder: Path) -> None:
    """An EXIF orientation turns nothing: neither the size that boxes are cut to, nor pixels."""
    exif = Image.Exif()
    exif[0x0112] = 6                                 # lying; a viewer shows 40 x 50
    noise(50, 40).save(folder / "JPEGImages" / "00010.jpg", exif=exif)
    record = load("dior", folder, "train")[0]
    assert record.size == data.open_image(record).size == (50, 40)
    assert record.box == (1.0, 2.0, 30.0, 40.0)


@pytest.mark.parametrize("splits, words", [
    ({"test": [6]}, "beyond the 6 objects"), ({"test": [5]}, "overlap"),
    ({"test": [0, 0]}, "overlap"), ({"test": ["x"]}, "x"), ({"test": [-1]}, "below 0"),
    ({"train": range(15_328)}, "withdrawn"), ({"test": range(19_160)}, "withdrawn")])
def test_split_files_that_do_not_fit_are_refused(
        folder: Path, splits: dict[str, Any], words: str,
) -> None:
    split(folder, **splits)
    with pytest.raises(DataError, match=words):
        load("dior", folder, "test")


def test_what_is_missing_is_said_in_one_line(folder: Path, tmp_path: Path) -> None:
    (folder / "val.txt").unlink()
    for name, root, words in [
            ("dior", folder, "val.txt"), ("dior", tmp_path / "nowhere", "nowhere"),
            ("other", None, "synth-small, dior")]:
        with pytest.raises(DataError, match=words) as error:
            load(name, root, "test")
        assert "\n" not in str(error.value)
    shutil.rmtree(folder / "Annotations")
    split(folder, val=[4])
    (folder / "Annotations.zip").write_bytes(b"")
    with pytest.raises(DataError, match="unzip it"):
        load("dior", folder, "test")
    with pytest.raises(DataError, match="no split 'novel'"):
        load("dior", folder, "novel")


@needs_sample("dior_rsvg")
def test_the_genuine_record_and_split_files() -> None:
    indices = dior.read_indices(SAMPLES / "dior_rsvg")
    assert {name: len(v) for name, v in indices.items()} == data.PUBLISHED["dior"]
    assert data.PUBLISHED["dior"] == {"train": 26_991, "val": 3_829, "test": 7_500}
    assert sorted(sum(indices.values(), [])) == list(range(38_320))
    # The other 17,401 annotations are not there.
    with pytest.raises(DataError, match="beyond the 1 objects"):
        load("dior", SAMPLES / "dior_rsvg", "test")


@needs_sample("dior_rsvg")
def test_a_consistent_subset_of_the_genuine_data_is_read(tmp_path: Path) -> None:
    root = tmp_path / "dior"
    shutil.copytree(SAMPLES / "dior_rsvg", root)
    root.chmod(0o755)
    for name in ("train", "val", "test"):
        (root / f"{name}.txt").unlink()
    split(root, train=[], val=[], test=[0])
    record = load("dior", root, "test")[0]
    assert record.text == "A green and brown golf field" and record.category == "golffield"
    assert record.box == (133.0, 237.0, 684.0, 672.0)
    assert record.size == data.open_image(record).size == (800, 800)


# ---------------------------------------------------------------- the other data sets

def image(path: Path, width: int = 100, height: int = 50) -> None:
    """A plain image in the format that its suffix says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), "gray").save(path)


def lines(file: Path, *rows: Any) -> None:
    """Writes texts as they are, all else as JSON, one a line."""
    file.parent.mkdir(parents=True, exist_ok=True)
    texts = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    file.write_text("\n".join(texts) + "\n", encoding="utf-8")


def numbers_of(places: dict[str, list[str]]) -> dict[str, list[int]]:
    """Reason -> numbers of the lines, records or objects."""
    numbers = {}
    for reason, where in places.items():
        numbers[reason] = [int(place.split()[-1]) for place in where]
    return numbers


@pytest.mark.parametrize("where, images", [
    ("split", "Image"), (".", "JPEGImages"), ("split", "unzipped/twice/Image")])
def test_opt_is_read_wherever_its_folders_stand_and_keeps_fractions(
        tmp_path: Path, where: str, images: str,
) -> None:
    (tmp_path / "Annotations").mkdir()
    annotate(
        tmp_path, "7", TAG.format(1.25, 2.5, 30.75, 40.5, "left ship"),
        TAG.format(90.5, 10, 104.3, 20.5, "right ship"), TAG.format(9, 9, 5, 5, "swapped"))
    image(tmp_path / images / "7.jpg")
    (tmp_path / where).mkdir(exist_ok=True)
    split(tmp_path / where, train=[0, 1], val=[], test=[2])
    train = load("opt", tmp_path, "train")
    test = load("opt", tmp_path, "test")
    assert [(r.id, r.box) for r in train] == [
        ("0", (1.25, 2.5, 30.75, 40.5)), ("1", (90.5, 10.0, 100.0, 20.5))]
    assert train[0].size == (100, 50)
    assert numbers_of(train.repaired) == {"box past the edge": [1]} and not train.refused
    assert test[0].box == (5.0, 5.0, 9.0, 9.0)
    assert numbers_of(test.repaired) == {"swapped corners": [2]}
    assert load("opt", tmp_path, "rft").hash == train.hash
    # DIOR's withdrawn generation has that number of lines; here it says nothing.
    split(tmp_path / where, train=range(15_328))
    with pytest.raises(DataError, match="overlap"):
        load("opt", tmp_path, "test")


def test_an_image_found_twice_or_under_another_suffix_is_said(folder: Path) -> None:
    image(folder / "old" / "00010.jpg")
    assert len(load("dior", folder, "train")) == 1               # the one in JPEGImages
    (folder / "JPEGImages").rename(folder / "new")
    assert "several images of that name" in load("dior", folder, "train").refused
    shutil.rmtree(folder / "old")
    path = folder / "new" / "00010.jpg"
    assert load("dior", folder, "train")[0].image == path
    path.unlink()
    image(path.with_suffix(".png"))
    train = load("dior", folder, "train")
    assert train[0].image.name == "00010.png"
    assert numbers_of(train.repaired) == {"image called *.jpg is *.png": [5]}


def test_links_are_followed_and_a_circle_of_them_ends(
        folder: Path, tmp_path_factory: pytest.TempPathFactory,
) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "images"
    (folder / "JPEGImages").rename(elsewhere)
    (folder / "JPEGImages").symlink_to(elsewhere)
    (elsewhere / "circle").symlink_to(folder)
    # The same once more under another name.
    (folder / "images").symlink_to(elsewhere)
    assert len(load("dior", folder, "train")) == 1


def test_rsvg_hr_repairs_what_has_one_reading_and_refuses_the_rest(tmp_path: Path) -> None:
    for name in ("a", "b"):
        image(tmp_path / "images" / f"{name}.jpg", 1024, 1024)
    lines(
        tmp_path / "rsvg_hr_test.txt",
        "a.jpg,1.5,2.5,30.25,40.0,a pool, left of a road, by the sea",
        "a.jpg,170.0,774.0,216,00,803.21,find a pool",
        "b.jpg,556.5,461.5,511.1,602.12,swapped",
        "b.jpg,1,2,1032.12,132.73,past the edge",
        "b.jpg,1,2,3,4,5,six or seven",
        "b.jpg,1.5,2.5,3.5,4.5,5,6 planes",
        "b.jpg,1,2,3",
        "c.jpg,1,2,3,4,no image",
        "",
        "b.jpg,5.5,5.5,7.5,9,12,storey building",
        "b.jpg,5,5,5,9,flat",
        "b.jpg,1100,5,1200,9,outside",
        "b.jpg,1,2,nan,4,no number",
        "../a.jpg,1,2,3,4,path")
    records = load("rsvg-hr", tmp_path, "test")
    assert [(r.id, r.text, r.box) for r in records] == [
        ("test-1", "a pool, left of a road, by the sea", (1.5, 2.5, 30.25, 40.0)),
        ("test-2", "find a pool", (170.0, 774.0, 216.0, 803.21)),
        ("test-3", "swapped", (511.1, 461.5, 556.5, 602.12)),
        ("test-4", "past the edge", (1.0, 2.0, 1024.0, 132.73)),
        ("test-6", "5,6 planes", (1.5, 2.5, 3.5, 4.5)),
        ("test-10", "12,storey building", (5.5, 5.5, 7.5, 9.0))]
    assert numbers_of(records.repaired) == {
        "decimal comma": [2], "swapped corners": [3], "box past the edge": [4]}
    assert numbers_of(records.refused) == {
        "five numbers, and more than one may hold a decimal comma": [5],
        "no box": [7, 13], "missing image": [8], "empty box": [11],
        "box outside the image": [12], "image outside the data set": [14]}


@needs_sample("rsvg_hr")
def test_the_genuine_rsvg_hr_files_lose_no_record(tmp_path: Path) -> None:
    images = tmp_path / "images"
    image(images / "one.jpg", 1024, 1024)
    for file in (SAMPLES / "rsvg_hr").glob("*.txt"):
        shutil.copyfile(file, tmp_path / file.name)
        for name in {line.split(",")[0] for line in file.read_text().splitlines()}:
            if not (images / name).exists():
                (images / name).hardlink_to(images / "one.jpg")
    train, test, sft, val = (
        load("rsvg-hr", tmp_path, name) for name in ("train", "test", "sft", "val"))
    assert (len(train), len(test)) == (2_151, 499)
    assert not train.refused and not test.refused
    assert numbers_of(train.repaired) == {
        "decimal comma": [18], "box past the edge": [315, 572, 1305, 1988],
        "swapped corners": [450]}
    assert numbers_of(test.repaired) == {"box past the edge": [172]}
    assert train[17].box == (170.0, 774.0, 216.0, 803.21)
    assert train[17].text.startswith("find a swimming pool on the lower left")
    assert len({r.image for r in train} & {r.image for r in test}) == 46
    assert len(sft) + len(val) == 2_151 and 0 < len(val) < 300
    assert not {r.image for r in sft} & {r.image for r in val}
    assert sft.hash == load("rsvg-hr", tmp_path, "rft").hash and "val" in val.note


def referring(
        name: str, question: str, corners: Any, grid: str, **more: Any,
) -> dict[str, Any]:
    """A row of VRSBench's evaluation file."""
    return {
        "image_id": name, "question": question, "ground_truth": grid, "dataset": "DOTA",
        "question_id": 3, "type": "ref", "unique": True, "obj_corner": corners,
        "obj_cls": "ship", "obj_ids": [1], "size_group": "small", **more}


def test_vrsbench_test_is_its_referring_file_with_the_precise_box(tmp_path: Path) -> None:
    image(tmp_path / "Images_val" / "Images_val" / "P1_0001.png", 512, 512)
    # The name again: the split's folder decides.
    image(tmp_path / "Images_train" / "P1_0001.png", 512, 256)
    name = "P1_0001.png"
    rows = [
        referring(name, "The ship.", [0.25, 0.40, 0.3125, 0.375, 0.335, 0.5, 0.26, 0.605],
                  "{<25><37><33><60>}"),
        referring(name, "The tiny ship.", "[0.5, 0.5, 0.505, 0.5, 0.505, 0.505, 0.5, 0.505]",
                  "{<50><50><50><50>}", unique=False),
        referring(name, "No corners.", None, "{<10><20><30><40>}"),
        referring(name, "Half outside.", [0.9, 0.5, 1.1, 0.5, 1.1, 0.7, 0.9, 0.7],
                  "{<90><50><110><70>}"),
        referring(name, "One cell.", [0.5] * 8, "{<50><50><50><60>}", unique=None),
        referring("P9_0001.png", "Gone.", [0, 0, 1, 0, 1, 1, 0, 1], "{}"),
        referring(name, "Nearly a line.", [0.5, 0.5, 0.50001, 0.5, 0.50001, 0.6, 0.5, 0.6],
                  "{<50><50><50><60>}")]
    lines(tmp_path / "VRSBench_EVAL_referring.json", json.dumps(rows))
    records = load("vrsbench", tmp_path, "test")
    assert [r.text for r in records] == [
        "The ship.", "The tiny ship.", "No corners.", "Half outside.", "One cell.",
        "Nearly a line."]
    assert np.allclose([r.box for r in records], [
        (128, 192, 171.52, 309.76), (256, 256, 258.56, 258.56), (51.2, 102.4, 153.6, 204.8),
        (460.8, 256, 512, 358.4), (256, 256, 261.12, 307.2), (256, 256, 261.12, 307.2)])
    assert [r.unique for r in records] == [True, False, True, True, None, True]
    assert records[0].size == (512, 512) and records[0].grid == (25, 37, 33, 60)
    # Without area on that grid, with area here: it counts.
    assert records[1].grid == (50, 50, 50, 50) and records[0].category == "ship"
    assert numbers_of(records.repaired) == {
        "box of ground_truth, for want of obj_corner": [2], "box past the edge": [3],
        "whole cells of ground_truth, for want of area": [4, 6]}
    assert numbers_of(records.refused) == {"missing image": [5]}


def conversation(i: int, question: str, answer: str) -> dict[str, Any]:
    """A row of VRSBench's train file."""
    turns = [
        {"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
    return {"image": f"{i:05d}_0000.png", "conversations": turns}


def test_vrsbench_train_gives_the_referring_turns_alone(tmp_path: Path) -> None:
    rows = []
    for i in range(40):
        image(tmp_path / "Images_train" / "inner" / f"{i:05d}_0000.png", 200, 100)
        rows.append(conversation(
            i, "[refer] give me the location of <p>The ship.</p>", "{<25><40><33><60>}"))
    rows += [
        conversation(0, "[caption] Describe the image", "A harbour at {<1><2><3><4>}"),
        conversation(0, "[vqa] How many ships?", "2"),
        conversation(0, "[refer] where is <p>the ship</p>?", "{<1><2><3><4>}{<5><6><7><8>}"),
        conversation(0, "[refer] the ship", "{<1><2><3><4>}"),
        {"image": "00000_0000.png", "conversations": None}]
    lines(tmp_path / "VRSBench_train.json", json.dumps(rows))
    train, sft, val = (load("vrsbench", tmp_path, name) for name in ("train", "sft", "val"))
    assert len(train) == 40 and train[0].text == "The ship."
    assert train[0].box == (50.0, 40.0, 66.0, 60.0)
    assert numbers_of(train.refused) == {"no box": [42], "empty text": [43]}
    assert len(val) == 2 and len(sft) == 38
    assert {r.id for r in sft} | {r.id for r in val} == {r.id for r in train}
    with pytest.raises(DataError, match="VRSBench_EVAL_referring.json"):
        load("vrsbench", tmp_path, "test")


def geoground(name: str, text: str, box: Any = (1.5, 2, 30, 40)) -> dict[str, Any]:
    """A line of refGeo."""
    return {
        "image_id": name, "question": text, "bbox": list(box), "poly": [[0, 0]],
        "question_id": 1, "dataset": "x"}


@pytest.fixture
def refgeo(tmp_path: Path) -> Path:
    """Three of refGeo's data sets, with its traps."""
    for name in ("DIOR-RSVG/00001.jpg", "rsvg/1.jpg", "GeoChat_test/P1.png"):
        image(tmp_path / "images" / name)
    metainfo = tmp_path / "metainfo"
    lines(
        metainfo / "dior_rsvg_test.jsonl", geoground("00001.jpg", "a golf field"),
        geoground("1.jpg", "another data set's image"))
    lines(metainfo / "rsvg_test.jsonl", geoground("1.jpg", "a road", (30, 40, 120, 2)))
    wrapped = json.dumps(geoground("P1.jpg", "wrapped LINE here"), indent=1)
    lines(
        metainfo / "geochat_test.jsonl", wrapped.replace("LINE", "\n"),
        '{"image_id": "P1.jpg", "ques', geoground("P1.jpg", "the next"), "junk",
        geoground("P1.jpg", "no box", "none"))
    return tmp_path


def test_refgeo_finds_each_data_sets_images_in_its_own_folder(refgeo: Path) -> None:
    records = load("refgeo", refgeo, "test")
    assert [(r.id, r.kind, r.text, r.box) for r in records] == [
        ("dior_rsvg_test-1", "dior_rsvg", "a golf field", (1.5, 2.0, 30.0, 40.0)),
        ("rsvg_test-1", "rsvg", "a road", (30.0, 2.0, 100.0, 40.0)),
        ("geochat_test-1", "geochat", "wrapped \n here", (1.5, 2.0, 30.0, 40.0)),
        ("geochat_test-21", "geochat", "the next", (1.5, 2, 30, 40))]
    assert numbers_of(records.refused) == {
        "missing image": [2], "no JSON object": [20, 22], "no box": [23]}
    assert numbers_of(records.repaired) == {
        "swapped corners": [1], "box past the edge": [1],
        "image called *.jpg is *.png": [1, 21]}
    assert "missing: vrsbench_test.jsonl, avvg_test.jsonl" in records.note
    assert [r.id for r in load("refgeo", refgeo, "rsvg_test")] == ["rsvg_test-1"]
    # Without a file of its own val is held out of train, which is not there.
    with pytest.raises(DataError, match="dior_rsvg_train.jsonl"):
        load("refgeo", refgeo, "val")


def test_refgeo_takes_no_image_of_that_name_from_another_data_sets_folder(
        refgeo: Path,
) -> None:
    (refgeo / "images" / "rsvg").rename(refgeo / "images" / "other")
    assert list(load("refgeo", refgeo, "rsvg_test").refused) == ["missing image"]


def test_refgeo_looks_everywhere_where_no_data_set_has_a_folder(refgeo: Path) -> None:
    shutil.rmtree(refgeo / "images")
    image(refgeo / "images" / "JPEGImages" / "1.jpg")
    image(refgeo / "images" / "JPEGImages" / "P0.v2.png")
    roads = [geoground("1.jpg", f"road {i}") for i in range(3)]
    lines(
        refgeo / "metainfo" / "rsvg_train.jsonl", *roads,
        geoground("P0.v2", "a name with a dot"))
    assert len(load("refgeo", refgeo, "rsvg_test")) == 1
    sft = load("refgeo", refgeo, "sft")
    val = load("refgeo", refgeo, "val")
    assert len(sft) + len(val) == 4
    assert not {r.image for r in sft} & {r.image for r in val}


def test_refgeo_reads_the_repacked_train_files_where_the_first_release_has_none(
        refgeo: Path,
) -> None:
    repacked = {"image_width": 100, "image_height": 50, "mask_exists": True}
    lines(
        refgeo / "metainfo_v2" / "rsvg_train_v2.jsonl", geoground("1.jpg", "a road") | repacked,
        geoground("1.jpg", "too small an image") | repacked | {"image_width": 200})
    train = load("refgeo", refgeo, "train")
    assert [(r.id, r.kind, r.text) for r in train] == [("rsvg_train_v2-1", "rsvg", "a road")]
    assert numbers_of(train.refused) == {
        "image of another size than its annotation says": [2]}
    assert "dior_rsvg_train.jsonl" in train.note and "missing: rsvg" not in train.note
    for name in ("rsvg_train", "rsvg_train_v2"):
        assert load("refgeo", refgeo, name).hash == train.hash
    lines(refgeo / "metainfo" / "rsvg_train.jsonl", geoground("1.jpg", "a first release"))
    assert [r.text for r in load("refgeo", refgeo, "train")] == ["a first release"]


# ---------------------------------------------------------------- RRSIS-D

def ref(i: int, split_name: str, *texts: str, **more: Any) -> dict[str, Any]:
    """A ref of RRSIS-D's pickle, of image and annotation i."""
    sentences = []
    for k, text in enumerate(texts):
        sentences.append(
            {"raw": text, "sent": text.lower(), "tokens": text.split(), "sent_id": k})
    return {
        "image_id": i, "split": split_name, "sentences": sentences,
        "file_name": f"{i:05d}.jpg", "category_id": 3, "ann_id": i, "ref_id": i + 1, **more}


def write_official(
        root: Path, refs: Any, boxes: dict[int, Any], size: tuple[int, int] = (800, 800),
) -> None:
    """RRSIS-D as its authors lay it out: boxes by annotation, one image for all of them."""
    folder = root / "rrsisd"
    folder.mkdir(parents=True)
    (folder / "refs(unc).p").write_bytes(pickle.dumps(refs, protocol=2))
    images = [{"id": i, "file_name": f"{i:05d}.jpg"} for i in boxes]
    annotations = []
    for i, box in boxes.items():
        annotations.append({
            "id": i, "image_id": i, "bbox": box, "categories_id": 3, "area": 9,
            "segmentation": [{"size": [800, 800], "counts": "PXg"}]})
    (folder / "instances.json").write_text(json.dumps({
        "images": images, "annotations": annotations,
        "categories": [{"id": 3, "name": "ship"}]}))
    folder = root / "images" / "rrsisd" / "JPEGImages"
    image(folder / "one.jpg", *size)
    for i in boxes:
        (folder / f"{i:05d}.jpg").hardlink_to(folder / "one.jpg")


def test_rrsisd_in_its_authors_layout(tmp_path: Path) -> None:
    refs = [
        ref(1, "train", "The Ship on the left"), ref(2, "val", "a plane"),
        ref(3, "testA", "a pool"), ref(4, "test", "One", "Two"), ref(5, "train"),
        ref(6, "train", "no annotation"), "junk", ref(7, "train", "corners swapped"),
        ref(8, "test", "past the edge")]
    boxes = {
        1: [10, 20, 300, 40], 2: [5, 5, 9, 9], 3: [5, 5, 9, 9], 4: [1, 2, 3, 4],
        5: [1, 2, 3, 4], 7: [300, 20, 100, 40], 8: [700, 2, 801, 4]}
    write_official(tmp_path, refs, boxes)
    # An annotation of ann_split lists all objects of the image; the ref alone counts.
    xml = tmp_path / "images" / "rrsisd" / "ann_split" / "00001.xml"
    xml.parent.mkdir()
    xml.write_text(f"<annotation>{TAG.format(1, 2, 3, 4, 'another')}</annotation>")
    train = load("rrsisd", tmp_path, "train")
    # x1, y1, x2, y2: as x, y, width, height it would reach to 310 and 60.
    assert [(r.id, r.text, r.box, r.category, r.size) for r in train] == [
        ("1", "The Ship on the left", (10.0, 20.0, 300.0, 40.0), "ship", (800, 800))]
    assert numbers_of(train.refused) == {
        "empty text": [4], "missing image": [5], "no JSON object": [6],
        "x1 > x2 or y1 > y2 (is it x, y, width, height?)": [7]}
    assert [r.text for r in load("rrsisd", tmp_path, "val")] == ["a plane"]
    test = load("rrsisd", tmp_path, "test")
    assert [(r.id, r.text) for r in test] == [
        ("3", "a pool"), ("4", "One"), ("4-2", "Two"), ("8", "past the edge")]
    assert numbers_of(test.repaired) == {"box past the edge": [8]}
    assert load("rrsisd", tmp_path, "sft").hash == load("rrsisd", tmp_path, "rft").hash
    with pytest.raises(DataError, match="rrsisd has no split 'novel'"):
        load("rrsisd", tmp_path, "novel")
    (tmp_path / "rrsisd" / "instances.json").unlink()
    with pytest.raises(DataError, match="no instances.json next to it"):
        load("rrsisd", tmp_path, "train")


class Asks:
    """Its pickle asks for a function and calls it."""

    def __init__(self, function: Callable, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Callable, tuple]:
        return self.call


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_that_asks_for_a_class_is_refused_by_its_name_and_has_not_run(
        tmp_path: Path, protocol: int,
) -> None:
    write_official(tmp_path, [], {1: [1, 2, 3, 4]})
    file = tmp_path / "rrsisd" / "refs(unc).p"
    ran = tmp_path / "ran"
    # os.system is pickled as posix.system.
    hostile = {
        f"{os.system.__module__}.system": Asks(os.system, f"touch {ran}"),
        "builtins.exec|__builtin__.exec": Asks(exec, f"open({str(ran)!r}, 'w')"),
        "numpy": np.zeros(3)}
    for name, asks in hostile.items():
        refs = [ref(1, "train", "a ship"), {"sentences": [asks]}]
        file.write_bytes(pickle.dumps(refs, protocol=protocol))
        with pytest.raises(DataError, match=rf"asks for '({name})") as error:
            load("rrsisd", tmp_path, "train")
        assert "\n" not in str(error.value) and not ran.exists()
    # What the pickle of a class of our own would have run.
    pickle.loads(pickle.dumps(hostile[f"{os.system.__module__}.system"]))
    assert ran.exists()


@pytest.mark.parametrize("content, words", [
    (b"cos\nsystem\n(S'touch ran'\ntR.", "asks for 'os.system'"),
    (b"(S'touch ran'\nios\nsystem\n.", "asks for 'os.system'"),
    (b"\x80\x02cos\nsystem\nU\ttouch ran\x85R.", "asks for 'os.system'"),
    (b"cos\nsys\ntem\n.", "asks for"),
    (b"Prun\n.", "unreadable pickle"), (b"", "unreadable pickle"),
    (b"not a pickle", "unreadable pickle"), (b"]", "unreadable pickle"),
    (b"0.", "unreadable pickle"), (b"(a.", "unreadable pickle"),
    (b"\x80\x04\x8c\x02\xff\xff.", "unreadable pickle"), (b"\x80\x63.", "unreadable pickle"),
    (b"}.", "not a list of refs"), (b"N.", "not a list of refs"),
    (b"Vtext\n.", "not a list of refs")])
def test_a_pickle_that_does_not_fit_is_one_line(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_official(tmp_path, [], {1: [1, 2, 3, 4]})
    (tmp_path / "rrsisd" / "refs(unc).p").write_bytes(content)
    with pytest.raises(DataError, match=words) as error:
        load("rrsisd", tmp_path, "train")
    assert "\n" not in str(error.value) and not (tmp_path / "ran").exists()


@needs_sample("rrsis_d")
def test_the_genuine_records_of_rrsis_d_in_its_converted_form(tmp_path: Path) -> None:
    rows = {}
    excerpt = SAMPLES / "rrsis_d" / "rrsisd_datainfo_excerpt.jsonl"
    for line in excerpt.read_text().splitlines():
        row = json.loads(line)
        image(tmp_path / "images" / "rrsisd" / "JPEGImages" / row["file_name"], 800, 800)
        rows[row["split"]] = row
    for name, row in rows.items():
        lines(tmp_path / "datainfo" / f"rrsisd_{name}.jsonl", row, rows["val"], "junk")
    val = load("rrsisd", tmp_path, "val")
    test = load("rrsisd", tmp_path, "test")
    assert [(r.id, r.text, r.box, r.category) for r in test] == [
        ("3600", "The gray small windmill", (348.0, 272.0, 389.0, 389.0), "windmill")]
    assert numbers_of(test.refused) == {
        "of another split than its file": [2], "no JSON object": [3]}
    assert [r.id for r in val] == ["14636", "14636-2"]
    assert val[0].box == (499.0, 34.0, 510.0, 61.0) and val[0].category == "vehicle"
    with pytest.raises(DataError, match=r"refs\(unc\).p or .*rrsisd_train.jsonl"):
        load("rrsisd", tmp_path, "train")


def test_a_published_val_that_is_missing_is_not_held_out_of_train(tmp_path: Path) -> None:
    """It would hold images that sft and rft, which get the whole train, are trained on."""
    for i in range(3):
        image(tmp_path / f"{i}.jpg")
    lines(tmp_path / "rrsisd_train.jsonl", *({
        "split": "train", "sent": "a ship", "file_name": f"{i}.jpg", "ann_id": i,
        "bbox": [1, 2, 30, 40]} for i in range(3)))
    assert len(load("rrsisd", tmp_path, "sft")) == 3
    with pytest.raises(base.NoSplit, match="rrsisd_val.jsonl"):
        load("rrsisd", tmp_path, "val")


@needs_sample("rrsis_d")
def test_the_genuine_train_split_of_rrsis_d_has_the_published_count(
        tmp_path: Path, capsys: pytest.CaptureFixture,
) -> None:
    """Its 12,181 genuine image ids, and of 150 the genuine text and box, in the official layout."""
    folder = SAMPLES / "rrsis_d"
    ids = [int(line) for line in (folder / "rrsisd_train_image_ids.txt").read_text().split()]
    known = {}
    for row in json.loads((folder / "mllm_rec_json_first150.json").read_text()):
        question, answer = (message["content"] for message in row["messages"])
        known[int(Path(row["images"][0]).stem)] = (
            question.split(": ")[1], collect.numbers(answer.split("```json")[1], bracketed=True))
    boxes = dict.fromkeys(ids, [1, 2, 30, 40]) | {i: box for i, (_, box) in known.items()}
    refs = [ref(i, "train", known[i][0] if i in known else "a ship") for i in ids]
    write_official(tmp_path, refs, boxes)
    train = load("rrsisd", tmp_path, "train")
    assert len(train) == 12_181 == data.PUBLISHED["rrsisd"]["train"] and not train.refused
    assert not train.repaired
    genuine = [r for r in train if int(r.id) in known]
    assert len(genuine) == 150
    for r in genuine:
        assert (r.text, list(r.box)) == known[int(r.id)]
    check_data.print_split("rrsisd", "train", train, 1)
    assert "expressions found: 12,181, as published" in capsys.readouterr().out
    check_data.print_split("rrsisd", "val", Records(train[:1_739], {}), 1)
    check_data.print_split("rrsisd", "test", Records(train[:3_482], {}), 1)
    out = capsys.readouterr().out
    assert "1,740 are published; a subset" in out and "3,481 are published; more than" in out


# ---------------------------------------------------------------- GeoPixInstruct

Size = tuple[int, int]


def instance(box: Any, text: Any = "the ship", size: Size = (100, 80)) -> dict[str, Any]:
    return {
        "bbox": box, "category": "ship", "category_id": 1, "description": text,
        "instance_id": 7, "mask": {"counts": "PQ72001", "size": [size[1], size[0]]}}


def geopix_row(i: int, *instances: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "image_id": f"P{i}", "image_path": f"images/P{i}.png", "instances": list(instances),
        **more}


def parquet(file: Path, *rows: dict[str, Any]) -> None:
    pytest.importorskip("pyarrow")
    import pyarrow.parquet

    file.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), file)


BOXES = [[40, 30, 60, 70], [50, 20, 90, 40], [30, 50, 70, 60], [60, 10, 80, 50]]


def as_sides(box: list[int]) -> list[int]:
    """x1, y1, x2, y2 -> x, y, width, height."""
    return [box[0], box[1], box[2] - box[0], box[3] - box[1]]


@pytest.fixture
def geopix(tmp_path: Path) -> Path:
    """The images of GeoPixInstruct that its files name."""
    for i in range(60):
        image(tmp_path / "images" / f"P{i}.png", 100, 80)
    return tmp_path


@pytest.mark.parametrize("xyxy", [True, False])
def test_geopix_takes_the_order_of_its_boxes_from_all_of_them(geopix: Path, xyxy: bool) -> None:
    rows = []
    for i in range(4):
        instances = []
        for box in BOXES:
            instances.append(instance(box if xyxy else as_sides(box), f"ship {box[0]}"))
        rows.append(geopix_row(i, *instances))
    parquet(geopix / "data" / "valid.SOTA_T-00000-of-00001.parquet", *rows)
    records = load("geopix", geopix, "test")
    assert not records.refused and not records.repaired
    assert [r.box for r in records] == [tuple(map(float, box)) for box in BOXES] * 4
    assert [(r.id, r.text, r.category, r.kind, r.size) for r in records[:2]] == [
        ("sota_t-P0-0", "ship 40", "ship", "SOTA-T", (100, 80)),
        ("sota_t-P0-1", "ship 50", "ship", "SOTA-T", (100, 80))]


def test_geopix_boxes_are_corners_where_99_in_100_are_ordered(geopix: Path) -> None:
    file = geopix / "valid.FAST_T.parquet"
    corners = [instance(box) for box in BOXES] * 25
    sides = instance(as_sides(BOXES[0]))
    # 100 of 101 are 99%; the one in the other order is refused.
    parquet(file, geopix_row(0, *corners, sides))
    records = load("geopix", geopix, "fast_t_test")
    assert len(records) == 100 and records[0].box == (40.0, 30.0, 60.0, 70.0)
    assert [len(places) for places in records.refused.values()] == [1]
    parquet(file, geopix_row(0, *corners, sides, sides))
    assert load("geopix", geopix, "fast_t_test")[0].box == (40.0, 30.0, 100.0, 80.0)


def test_geopix_decides_for_each_file_and_reads_each_split(geopix: Path) -> None:
    for i, part in enumerate(("FAST_T", "SOTA_T", "SIOR_T")):
        rows = []
        for k in range(20):
            instances = [instance(box) for box in BOXES]
            if i == 1:
                instances = [instance(as_sides(box)) for box in BOXES]
            rows.append(geopix_row(20 * i + k, *instances))
        parquet(geopix / "data" / f"train.{part}.parquet", *rows)
        parquet(geopix / "data" / f"valid.{part}.parquet", *rows[:2])
    train, sft, val, test = (
        load("geopix", geopix, name) for name in ("train", "sft", "val", "test"))
    assert len(train) == 240 and len(test) == 24
    assert {r.box for r in train} == {tuple(map(float, box)) for box in BOXES}
    assert len(sft) + len(val) == 240 and len(val) == 12
    assert not {r.image for r in sft} & {r.image for r in val}
    assert {r.kind for r in load("geopix", geopix, "sota_t_train")} == {"SOTA-T"}
    assert len(load("geopix", geopix, "fast_t_test")) == 8
    with pytest.raises(DataError, match="no [*].parquet of a split 'novel'"):
        load("geopix", geopix, "novel")


def test_geopix_refuses_and_counts_single_instances(geopix: Path) -> None:
    good = [instance(box) for box in BOXES] * 30
    bad = [
        instance(BOXES[0], " "), instance(BOXES[0]) | {"bbox": [1, 2, 3]},
        instance(BOXES[0], size=(90, 80)), instance(BOXES[0]) | {"bbox": None}]
    parquet(
        geopix / "valid.SIOR_T.parquet", geopix_row(0, *good), geopix_row(1, *bad),
        geopix_row(99, good[0]), geopix_row(2, image_id=None),
        geopix_row(3, good[1], image_id=None))
    records = load("geopix", geopix, "test")
    assert len(records) == 121 and records[-1].id == "sior_t-valid.SIOR_T-4-0"
    assert numbers_of(records.refused) == {
        "empty text": [0], "no box": [1, 3],
        "image of another size than its annotation says": [2], "missing image": [0]}
    assert "row 1, instance 1" in records.refused["no box"][0]


@pytest.mark.parametrize("content", [b"", b"PAR1", b"no parquet at all" * 99])
def test_a_file_that_is_no_parquet_is_one_line(geopix: Path, content: bytes) -> None:
    pytest.importorskip("pyarrow")
    (geopix / "valid.FAST_T.parquet").write_bytes(content)
    with pytest.raises(DataError, match="valid.FAST_T.parquet: unreadable") as error:
        load("geopix", geopix, "test")
    assert "\n" not in str(error.value)


def test_a_parquet_file_of_other_columns_is_refused(geopix: Path) -> None:
    parquet(geopix / "valid.FAST_T.parquet", {"image": "P1.png", "image_id": "1"})
    with pytest.raises(DataError, match="no column image_path, instances"):
        load("geopix", geopix, "test")


def test_without_pyarrow_one_line_says_how_to_install_it(
        geopix: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    (geopix / "valid.FAST_T.parquet").write_bytes(b"not read")
    # None in their place: an import of them fails, as where they are not installed.
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(DataError, match="not installed; pip install pyarrow") as error:
        load("geopix", geopix, "test")
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------- your own data

def own(name: Any, text: Any = "the ship", box: Any = (1, 2, 30, 40), **more: Any) -> dict:
    """A line of one's own data."""
    return {"image": name, "text": text, "box": list(box), **more}


def test_your_own_lines_are_read_and_bad_ones_refused_by_number(tmp_path: Path) -> None:
    root = tmp_path / "a"
    image(root / "1.jpg")
    image(root / "deep" / "2.JPG")
    image(tmp_path / "outside.jpg")
    lines(
        root / "train.jsonl",
        own("1.jpg", id=7, category="ship"),
        "",
        own("deep/2.JPG", box=(-3, 2, 30, 40)),
        "not json",
        "[1, 2]",
        own("2.JPG", "by base name"),
        own("../outside.jpg"),
        own(str(tmp_path / "outside.jpg")),
        own("1.jpg", " "),
        own("1.jpg", 3),
        own("1.jpg", box=(50, 20, 30, 10)),
        own("1.jpg", box=(1, 2, 3)),
        own("1.jpg", box=(1, 2, True, 4)),
        own("1.jpg", id="7"),
        {"image": "1.jpg", "text": "no box"},
        {"text": "no image", "box": [1, 2, 3, 4]},
        '{"image": "1.jpg", "te',
        own(["1.jpg"], box=("1.5", 2e0, 30, 40.25)))
    train = load("jsonl", root, "train")
    assert [(r.id, r.image, r.box, r.category) for r in train] == [
        ("7", root / "1.jpg", (1.0, 2.0, 30.0, 40.0), "ship"),
        ("train-3", root / "deep" / "2.JPG", (0.0, 2.0, 30.0, 40.0), ""),
        ("7-2", root / "1.jpg", (1.0, 2.0, 30.0, 40.0), ""),
        ("train-18", root / "1.jpg", (1.5, 2.0, 30.0, 40.25), "")]
    assert numbers_of(train.repaired) == {"box past the edge": [3]}
    assert numbers_of(train.refused) == {
        "no JSON object": [4, 5, 17], "missing image": [6],
        "image outside the data set": [7, 8], "empty text": [9, 10],
        "x1 > x2 or y1 > y2 (is it x, y, width, height?)": [11], "no box": [12, 13, 15],
        "no image named": [16]}


def test_lone_surrogates_are_replaced_where_records_are_made(tmp_path: Path) -> None:
    image(tmp_path / "1.jpg")
    lines(tmp_path / "test.jsonl", own("1.jpg", "a \ud800 ship", id="\udfff", category="\ud83d"))
    record, = load("jsonl", tmp_path, "test")
    assert (record.id, record.text, record.category) == ("?", "a ? ship", "?")


def test_the_splits_of_your_own_data(tmp_path: Path) -> None:
    for i in range(21):
        image(tmp_path / f"{i}.png")
    train = [own(f"{i}.png") for i in range(20)]
    lines(tmp_path / "mine.jsonl", *train, own("20.png", split="test"))
    names = ("train", "sft", "val", "test")
    for root in (tmp_path, tmp_path / "mine.jsonl"):
        assert [len(load("jsonl", root, name)) for name in names] == [20, 19, 1, 1]
    (tmp_path / "mine.jsonl").unlink()
    with pytest.raises(DataError, match="no .*jsonl"):
        load("jsonl", tmp_path, "train")
    lines(tmp_path / "train.jsonl", own("0.png"), own("1.png"))
    with pytest.raises(DataError, match="no records of a split 'test'; it has train"):
        load("jsonl", tmp_path, "test")
    lines(tmp_path / "val.jsonl", own("2.png"))
    for name in ("train", "sft", "rft"):
        assert [r.image.stem for r in load("jsonl", tmp_path, name)] == ["0", "1"]
    assert [r.image.stem for r in load("jsonl", tmp_path, "val")] == ["2"]


def test_a_json_array_is_no_jsonl(tmp_path: Path) -> None:
    image(tmp_path / "1.jpg")
    rows = [own("1.jpg", "one"), own("1.jpg", "two"), own("1.jpg", "three")]
    says = (
        r"train\.jsonl: a JSON array, but one JSON object per line is needed; "
        r"jq -c '\.\[\]'")
    for text in (
            json.dumps(rows), "\n [" + ",\n".join(map(json.dumps, rows)) + "]",
            json.dumps(rows, indent=1)):
        (tmp_path / "train.jsonl").write_text(text)
        with pytest.raises(DataError, match=says):
            load("jsonl", tmp_path, "train")


def test_one_image_can_not_be_trained_on_and_held_out(tmp_path: Path) -> None:
    image(tmp_path / "1.jpg")
    lines(
        tmp_path / "train.jsonl", own("1.jpg"), own("1.jpg", box=(3, 4, 5, 6)), own("2.jpg"))
    assert len(load("jsonl", tmp_path, "train")) == 2
    for name in ("sft", "rft", "val"):
        says = (
            f"{name} needs two usable images .* has 1 .refused: missing image: 1.; add")
        with pytest.raises(DataError, match=says):
            load("jsonl", tmp_path, name)
    image(tmp_path / "2.jpg")
    assert {len(load("jsonl", tmp_path, name)) for name in ("sft", "val")} == {1, 2}


@needs_sample("refcoco_jsonl")
def test_the_genuine_pairs_of_vlm_r1_are_read(tmp_path: Path) -> None:
    file = next((SAMPLES / "refcoco_jsonl").glob("*.json"))
    pairs = json.loads(file.read_text())
    image(tmp_path / "1.jpg", 700, 700)
    conversations = []
    for pair in pairs:
        turns = [
            {"from": "human", "value": f"<image>{pair['question']}"},
            {"from": "gpt", "value": str(pair["ground_truth"])}]
        conversations.append({"image": "1.jpg", "conversations": turns})
    lines(tmp_path / "train.jsonl", *conversations)
    lines(tmp_path / "test.jsonl", *({"image": "1.jpg", **pair} for pair in pairs))
    boxes = [tuple(pair["ground_truth"]) for pair in pairs]
    train = load("jsonl", tmp_path, "train")
    test = load("jsonl", tmp_path, "test")
    assert len(boxes) == 200
    assert [r.box for r in train] == [r.box for r in test] == boxes
    assert [r.text for r in train] == [r.text for r in test]
    assert [r.text for r in train[:3]] == [
        "man standing far left in orange", "umpcatcher", "table with bananas"]


HOSTILE_VALUES = [
    None, True, 0, -1, "", "a.png", "a.jpg", "../a.png", "/a.png", ".", "\0", "\ud800",
    "[1, 2, 30, 40]", "{<1><2><30><40>}", [1, 2, 30, 40], [float("nan")] * 4, [1e999] * 8,
    [10 ** 400, 1, 2, 3], "9" * 400, [0.1] * 8, {}, [{}], [{"from": [1]}, {}],
    [{"value": "[refer] <p>x</p>"}],
    [{"from": "human"}, {"from": "gpt", "value": "[1, 2, 3, 4]"}], ["a.png"]]
HOSTILE_KEYS = (
    "image", "image_id", "text", "question", "problem", "solution", "box", "bbox", "obj_corner",
    "ground_truth", "conversations", "id", "unique", "obj_cls", "category")


def test_values_of_any_type_are_refused_or_read_but_never_break_a_reader(
        tmp_path: Path,
) -> None:
    for name in ("Images_train/a.png", "images/rsvg/a.png", "a.png"):
        image(tmp_path / name, 50, 40)
    rng = random.Random(0)
    for _ in range(60):
        rows = []
        for _ in range(8):
            keys = [key for key in HOSTILE_KEYS if rng.random() < 0.7]
            rows.append({key: rng.choice(HOSTILE_VALUES) for key in keys})
        for file in ("VRSBench_train.json", "VRSBench_EVAL_referring.json"):
            (tmp_path / file).write_text(json.dumps(rows))
        for file in ("train.jsonl", "metainfo/rsvg_train.jsonl"):
            lines(tmp_path / file, *rows)
        for name, split_name in (
                ("vrsbench", "test"), ("vrsbench", "train"), ("refgeo", "train"),
                ("jsonl", "train")):
            records = load(name, tmp_path, split_name)
            if (name, split_name) != ("vrsbench", "train"):
                # Each row is there, as a record or as a refusal.
                assert len(records) + sum(records.refusals.values()) == 8
            for r in records:
                x1, y1, x2, y2 = r.box
                assert 0 <= x1 < x2 <= 50 and 0 <= y1 < y2 <= 40
            assert records.hash


# ---------------------------------------------------------------- stray annotations

@pytest.mark.parametrize("name", [
    ".ipynb_checkpoints/00001-checkpoint.xml", ".git/00002.xml", ".00001.xml", "._00002.xml",
    "deep/.backup/00001.xml", "__MACOSX/00001.xml"])
def test_hidden_annotations_shift_no_index(folder: Path, name: str) -> None:
    clean = {split_name: load("dior", folder, split_name).hash for split_name in base.SPLITS}
    stray = folder / "Annotations" / name
    stray.parent.mkdir(parents=True, exist_ok=True)
    stray.write_text(f"<annotation><filename>1.jpg</filename>{TAG.format(1, 2, 9, 9, 'stray')}"
                     "</annotation>")
    for split_name, data_hash in clean.items():
        records = load("dior", folder, split_name)
        assert records.hash == data_hash and not records.note


@pytest.mark.parametrize("name", [
    "00001 (1).xml", "00001 - Copy.xml", "00001 - Copy (2).xml", "Copy of 00001.xml",
    "00001_copy.xml", "00001-checkpoint.xml", "00001.bak.xml", "00001~.xml", "old/00001.xml",
    "0.xml"])
def test_a_copy_of_an_annotation_is_named_and_never_shifts_an_index(
        folder: Path, name: str,
) -> None:
    """The copy of 00001 would make its two objects 2 and 3, or 0 and 1, of those that follow."""
    stray = folder / "Annotations" / name
    stray.parent.mkdir(exist_ok=True)
    shutil.copyfile(folder / "Annotations" / "00001.xml", stray)
    if name == "0.xml":
        # Its name says nothing; that two are of one image does.
        name = "00001.xml"
    for split_name in base.SPLITS:
        with pytest.raises(DataError, match="8 objects .* name 6; ") as error:
            load("dior", folder, split_name)
        assert f"Annotations/{name} looks like a copy" in str(error.value)
        assert "\n" not in str(error.value)


def test_more_objects_than_the_splits_name_are_said(folder: Path) -> None:
    annotate(folder, "00003", TAG.format(1, 2, 9, 9, "of an image of its own"))
    records = load("dior", folder, "test")
    assert "7 objects are in Annotations, but the split files name 6" in records.note


def test_hidden_images_and_lines_are_none_of_the_data_set(folder: Path, tmp_path: Path) -> None:
    for name in (".thumbnails/00010.jpg", "JPEGImages/.ipynb_checkpoints/00010.jpg"):
        image(folder / name, 9, 9)
    assert [r.size for r in load("dior", folder, "train")] == [(50, 40)]
    root = tmp_path / "own"
    image(root / "1.jpg")
    lines(root / "mine.jsonl", own("1.jpg"))
    lines(root / ".mine.jsonl", own("1.jpg", "hidden"))
    assert [r.text for r in load("jsonl", root, "train")] == ["the ship"]


# ---------------------------------------------------------------- encodings of annotations

@pytest.mark.parametrize("declared, codec", [
    ("gb2312", "gb2312"), ("GB2312", "gbk"), ("gbk", "gbk"), ("gb18030", "gb18030"),
    ("big5", "big5"), ("Shift_JIS", "shift_jis"), ("euc-kr", "euc_kr"), ("utf-16", "utf-16"),
    ("utf-8", "utf-8-sig"), ("cp1251", "cp1251")])
def test_annotations_in_any_encoding_are_read(folder: Path, declared: str, codec: str) -> None:
    text = {"cp1251": "пять", "euc_kr": "다섯", "shift_jis": "五つ"}.get(codec, "五")
    if codec == "gbk":
        text = "五镕"                                  # the second is not in GB2312
    content = (
        f'<?xml version="1.0" encoding="{declared}"?>\n<annotation><filename>00010.jpg</filename>'
        f"{TAG.format(1, 2, 30, 40, text)}</annotation>")
    (folder / "Annotations" / "00010.xml").write_bytes(content.encode(codec))
    assert load("dior", folder, "train")[0].text == text


@pytest.mark.parametrize("content", [
    b'<?xml version="1.0" encoding="x-nothing"?><a/>', b'<?xml version="1.0" encoding="hex"?><a/>',
    b'<?xml version="1.0" encoding="undefined"?><a/>', b'<?xml version="1.0" encoding=""?><a/>',
    b'<?xml version="1.0" encoding="gb2312"?><a>\xff\xff</a>',
    b'<?xml version="1.0" encoding="gb2312"?><a>\xce', b"<a>\xce\xe5</a>", b"", b"\x00",
    b"<a>" * 9,
    b'<?xml version="1.0" encoding="\xff"?><a/>'])
def test_an_annotation_that_can_not_be_decoded_is_one_line(folder: Path, content: bytes) -> None:
    (folder / "Annotations" / "00002.xml").write_bytes(content)
    with pytest.raises(DataError, match="00002.xml: unreadable annotation") as error:
        load("dior", folder, "test")
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------- boxes in another unit

def in_unit(coords: str, box: tuple[float, ...], size: Size) -> list[float]:
    """A box in pixels -> the same in another unit."""
    parts = {"fraction": 1, "1000": 1000}.get(coords)
    return [v * parts / size[i % 2] for i, v in enumerate(box)] if parts else list(box)


PIXELS = [(10.0, 5.0, 50.0, 25.0), (60.0, 30.0, 80.0, 45.0), (90.0, 2.0, 100.0, 10.0)]


@pytest.mark.parametrize("coords", ["fraction", "1000"])
@pytest.mark.parametrize("name", ["jsonl", "refgeo", "dior", "rsvg-hr"])
def test_boxes_in_another_unit_are_refused_with_the_flag_and_read_with_it(
        tmp_path: Path, name: str, coords: str,
) -> None:
    size = (100, 50)
    boxes = [in_unit(coords, box, size) for box in PIXELS]
    image(tmp_path / "images" / "1.jpg")
    lines(tmp_path / "test.jsonl", *(own("images/1.jpg", box=box) for box in boxes))
    lines(tmp_path / "metainfo" / "rsvg_test.jsonl", *(geoground("1.jpg", "x", b) for b in boxes))
    lines(
        tmp_path / "rsvg_hr_test.txt",
        *(f"1.jpg,{','.join(map(str, box))},a ship" for box in boxes))
    (tmp_path / "Annotations").mkdir()
    annotate(tmp_path, "1", *(TAG.format(*box, "a ship") for box in boxes))
    split(tmp_path, train=[], val=[], test=[0, 1, 2])
    says = f"--data-coords {coords}, or --data-coords original"
    with pytest.raises(DataError, match=says) as error:
        load(name, tmp_path, "test")
    assert "\n" not in str(error.value)
    records = load(name, tmp_path, "test", coords)
    assert np.allclose([r.box for r in records], PIXELS) and len(records) == 3
    # As pixels they are what a Collector makes of such pixels, one by one.
    original = load(name, tmp_path, "test", "original")
    assert len(original) + sum(original.refusals.values()) == 3


def test_boxes_that_may_be_pixels_are_not_suspected(tmp_path: Path) -> None:
    image(tmp_path / "1.jpg", 400, 300)
    boxes = [(i % 300, i % 200, i % 300 + 50, i % 200 + 60) for i in range(200)]
    # A mistake or two of the file: one box outside of its image, one far past its edge.
    boxes += [(500, 10, 600, 20), (10, 10, 900, 20)]
    lines(tmp_path / "test.jsonl", *(own("1.jpg", box=box) for box in boxes))
    records = load("jsonl", tmp_path, "test")
    assert records.refusals == {"box outside the image": 1}
    # One pixel in the corner, or the whole image: it stays what it was, one pixel.
    lines(tmp_path / "test.jsonl", own("1.jpg", box=(0, 0, 1, 1)))
    assert [r.box for r in load("jsonl", tmp_path, "test")] == [(0.0, 0.0, 1.0, 1.0)]
    # Zeros for want of a box are no fractions.
    lines(tmp_path / "test.jsonl", *[own("1.jpg", box=(0, 0, 0, 0))] * 9)
    assert load("jsonl", tmp_path, "test").refusals == {"empty box": 9}


def test_each_file_of_your_own_has_its_own_unit(tmp_path: Path) -> None:
    image(tmp_path / "1.jpg")
    lines(tmp_path / "a.jsonl", own("1.jpg", split="test"))
    lines(tmp_path / "b.jsonl", own("1.jpg", box=(0.1, 0.2, 0.3, 0.4), split="test"))
    says = "b.jsonl: its boxes all lie in .0, 1.*--data-coords fraction"
    with pytest.raises(DataError, match=says):
        load("jsonl", tmp_path, "test")


@pytest.mark.parametrize("name", ["synth", "vrsbench", "jsonl+dior", "jsonl:0.5"])
def test_a_unit_is_not_asked_of_what_says_its_own(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="--data-coords fraction is for a data set that leaves"):
        load(name, tmp_path, "val", "fraction")


def test_data_py_takes_the_flags_on_reading(
        tmp_path: Path, check: Callable[..., str], capsys: pytest.CaptureFixture,
) -> None:
    Image.fromarray(np.full((50, 100), 9, np.uint16)).save(tmp_path / "1.png")
    lines(tmp_path / "test.jsonl", own("1.png", box=(0.1, 0.2, 0.5, 0.4)))
    flags = ("jsonl", "--root", tmp_path, "--split", "test", "--show", 0)
    for more in ((), ("--coords", "fraction"), ("--stretch", 98, 2), ("--stretch", "nan", 2)):
        if more == ("--coords", "fraction"):
            assert "refused, 16-bit or float image: 1" in check(*flags, *more)
            continue
        with pytest.raises(SystemExit) as stop:
            check(*flags, *more)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.count("\n") == 1
        assert ("two percentiles" if more else "--data-coords fraction") in error
    out = check("--data", *flags, "--data-coords", "fraction", "--stretch", 2, 98)
    assert "jsonl test: 1 records, 0 refused" in out and "unreadable: 0" in out


# ---------------------------------------------------------------- where an image lies

def test_the_splits_that_are_trained_on_are_explained(
        tmp_path: Path, check: Callable[..., str], capsys: pytest.CaptureFixture) -> None:
    for i in range(20):
        image(tmp_path / f"{i}.jpg")
    lines(tmp_path / "train.jsonl", *(own(f"{i}.jpg") for i in range(20)))
    out = check("jsonl", "--root", tmp_path, "--split", "rft", "--show", 0)
    assert "jsonl rft: 19 records" in out
    explained = "  sft.py trains on the split sft, rft.py on rft; a data set without them has "
    assert explained + "train in their place, less what is held out as val\n" in out
    assert explained in check("synth-tiny", "--split", "train", "--show", 0)
    assert explained not in check("synth-tiny", "--split", "val", "--show", 0)
    with pytest.raises(SystemExit) as stop:
        check()
    assert stop.value.code == 2
    assert capsys.readouterr().err == "data.py: name a data set: python data.py dior\n"


def test_only_what_is_outside_is_said_to_be(tmp_path: Path) -> None:
    root = tmp_path / "root"
    image(root / "deep" / "1.jpg")
    image(tmp_path / "2.jpg")
    (tmp_path / "link").symlink_to(root)
    within = [
        str(root / "deep" / "1.jpg"), "deep/1.jpg", "./deep/1.jpg", "../root/deep/1.jpg",
        "deep/../deep/1.jpg", "deep\\1.jpg"]
    outside = ["../2.jpg", str(tmp_path / "2.jpg"), "/1.jpg", "deep/../../2.jpg", ".."]
    lines(root / "test.jsonl", *map(own, within), *map(own, outside), own("."), own("3.jpg"))
    for place in (root, tmp_path / "link"):
        records = load("jsonl", place, "test")
        assert len(records) == len(within)
        assert numbers_of(records.refused) == {
            "image outside the data set": list(range(7, 12)), "unreadable image": [12],
            "missing image": [13]}
        assert {r.size for r in records} == {(100, 50)}


# ---------------------------------------------------------------- conversations

def chat(question: str, answer: Any, names: tuple[str, ...] = ("from", "value", "human", "gpt"),
         **more: Any) -> dict[str, Any]:
    key, value, human, gpt = names
    return {
        "image": "1.jpg",
        "conversations": [{key: human, value: question}, {key: gpt, value: answer}], **more}


QWEN = "<image>\nLocate {} in this image and output the bbox coordinates in JSON format."
BOX = '{\n"bbox_2d": [\n10,\n5,\n50,\n25\n]\n}'


@pytest.mark.parametrize("row", [
    chat(QWEN.format("the ship"), BOX),
    chat(QWEN.format("the ship"), '```json\n[{"bbox_2d": [10, 5, 50, 25], "label": "ship"}]\n```'),
    chat("<image>Locate the ship, and report its bounding box. Use JSON.", BOX),
    chat("<image>Locate the ship", "[10, 5, 50, 25]"),
    chat("<image>Give me the bounding box of the ship in the picture, in JSON format.", BOX),
    chat("<image>[refer] give me the location of <p> the ship </p>", "[10, 5, 50, 25]"),
    chat("<image>the ship", "[10, 5, 50, 25]"),
    chat("Picture 1: <img>1.jpg</img>\nLocate <ref>the ship</ref>",
         "<ref>the ship</ref><box>(100,100),(500,500)</box>",
         ("from", "value", "user", "assistant"), image=None),
    chat("<image>Output the box of <|object_ref_start|>the ship<|object_ref_end|>",
         "<|box_start|>(100, 100), (500, 500)<|box_end|>"),
    chat("<image>Where is it?",
         "<|object_ref_start|>the ship<|object_ref_end|>"
         "<|box_start|>(100,100),(500,500)<|box_end|>"),
    {"images": ["1.jpg"], "messages": [
        {"role": "system", "content": "You are."},
        {"role": "user", "content": QWEN.format("the ship")},
        {"role": "assistant", "content": BOX}]},
    {"image": "1.jpg", "solution": "[10, 5, 50, 25]", "problem": "Please provide the bounding box "
        "coordinate of the region this sentence describes: the ship."}])
def test_a_conversation_is_read_with_expression_and_box_apart(
        tmp_path: Path, row: dict[str, Any],
) -> None:
    image(tmp_path / "1.jpg")
    lines(tmp_path / "test.jsonl", row)
    records = load("jsonl", tmp_path, "test")
    assert [(r.text, r.box) for r in records] == [("the ship", (10.0, 5.0, 50.0, 25.0))]


@pytest.mark.parametrize("row, reason", [
    (chat("<image>Which bbox, as JSON, holds a ship", BOX),
     "request with no clear expression within its instruction"),
    (chat("<image>What is at <box>(1,2),(3,4)</box>?", "a ship"),
     "request with no clear expression within its instruction"),
    (chat("<image>Locate the ship", "<box>(1,2),(3,4)</box><box>(1,2),(3,4)</box>"), "no box"),
    (chat("<image>Locate the ship", "there is none"), "no box")])
def test_a_conversation_of_another_kind_is_refused(
        tmp_path: Path, row: dict[str, Any], reason: str,
) -> None:
    image(tmp_path / "1.jpg")
    lines(tmp_path / "test.jsonl", row)
    records = load("jsonl", tmp_path, "test")
    assert not records and records.refusals == {reason: 1}


def test_points_in_tags_may_be_pixels_by_the_flag(tmp_path: Path) -> None:
    image(tmp_path / "1.jpg")
    lines(tmp_path / "test.jsonl", chat("Locate the ship", "<box>(10,5),(50,25)</box>"))
    assert load("jsonl", tmp_path, "test")[0].box == (1.0, 0.25, 5.0, 1.25)
    assert load("jsonl", tmp_path, "test", "original")[0].box == (10.0, 5.0, 50.0, 25.0)


# ---------------------------------------------------------------- mixtures

@pytest.fixture
def parent(tmp_path: Path) -> Path:
    """A folder that holds two data sets' folders, of 40 and 10 records."""
    for name, n in (("jsonl", 40), ("rsvg-hr", 10)):
        for i in range(n):
            image(tmp_path / name / f"{i}.png")
    lines(tmp_path / "jsonl" / "train.jsonl", *(own(f"{i}.png") for i in range(40)), "bad")
    lines(
        tmp_path / "rsvg-hr" / "rsvg_hr_train.txt",
        *(f"{i}.png,9,2,3,4,a pool" for i in range(10)))
    return tmp_path


def test_a_mixture_takes_shares_and_repeats_and_keeps_ids_apart(parent: Path) -> None:
    mixed = load("jsonl:0.25+rsvg-hr:2.5", parent, "train")
    ids = [r.id for r in mixed]
    assert len(set(ids)) == len(ids) == 10 + 25
    assert sum(i.startswith("jsonl/train-") for i in ids) == 10
    assert sum(i.endswith("#2") for i in ids) == 10 and sum(i.endswith("#3") for i in ids) == 5
    assert {i[:-2] for i in ids if "#" in i} <= set(ids)
    assert mixed.hash == load("jsonl:0.25+rsvg-hr:2.5", parent, "train").hash
    assert mixed.hash != load("jsonl:0.5+rsvg-hr:2.5", parent, "train").hash
    # A slice of it, as validation takes one, is a mixture too.
    assert {i.split("/")[0] for i in ids[:8]} == {"jsonl", "rsvg-hr"}
    assert len(mixed.repaired["swapped corners"]) == 10
    assert list(mixed.refused) == ["no JSON object"]
    assert [place[:7] for place in mixed.refused["no JSON object"]] == ["jsonl: "]


def test_a_larger_share_holds_the_smaller_one(parent: Path) -> None:
    quarter = {r.id for r in load("jsonl:0.25", parent, "train")}
    half = {r.id for r in load("jsonl:0.5", parent, "train")}
    assert quarter < half


def test_a_mixture_holds_out_images_of_each_part(parent: Path) -> None:
    together = load("jsonl+rsvg-hr", parent, "train")
    assert len(together) == 50 and together[0].image.exists()
    sft = load("jsonl+rsvg-hr", parent, "sft")
    val = load("jsonl+rsvg-hr", parent, "val")
    assert len(sft) == 47 and len(val) == 3
    assert not {r.id for r in sft} & {r.id for r in val} and "jsonl: validation" in val.note


def test_a_mixtures_weights_are_for_training_and_leave_what_measures_whole() -> None:
    for split_name in ("val", "test"):
        whole = load("synth-tiny", None, split_name)
        share = load("synth-tiny:0.1", None, split_name)
        assert {r.id for r in share} == {f"synth-tiny/{r.id}" for r in whole} and len(whole) > 400
    whole = load("synth-tiny", None, "rft")
    assert len(load("synth-tiny:0.1", None, "rft")) == round(0.1 * len(whole))


@pytest.mark.parametrize("name", [
    "jsonl+jsonl", "jsonl+other", "jsonl:0", "jsonl:-1", "jsonl:nan", "jsonl:inf", "jsonl:x",
    "jsonl:", "jsonl+", "jsonl:1:1"])
def test_a_mixture_that_has_no_meaning_is_refused(parent: Path, name: str) -> None:
    with pytest.raises(DataError, match="can't be a part of the mixture") as error:
        load(name, parent, "train")
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------- python data.py

def test_the_check_says_that_val_is_held_out_of_training(run: Run, tmp_path: Path) -> None:
    lines = []
    for i in range(4):
        Image.new("RGB", (40, 40), (i * 50, 0, 0)).save(tmp_path / f"{i}.png")
        lines.append({"image": f"{i}.png", "text": "the ship", "box": [5, 5, 20, 20]})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "train.jsonl").write_text(text)
    done = run("data.py", "jsonl", "--root", tmp_path, "--out", tmp_path / "sheet.png")
    assert "images in both train and val: 1, held out of the splits sft and rft\n" in done.stdout


def test_the_check_of_a_data_set_counts_and_draws(
        folder: Path, run: Run, tmp_path: Path,
) -> None:
    done = run("data.py", "dior", "--root", folder, "--out", tmp_path / "sheet.png")
    assert done.returncode == 0 and not done.stderr, done.stderr
    for words in (
            "images decoded: 3, unreadable: 0\n", "dior train: 1 records, 3 refused",
            "00002.xml, object 2", "expressions found: 4, 26,991 are published; a subset",
            "images in both train and val: 0", "quantiles: 5% 55.1, ",     # 29 x 38 of 50 x 40
            "below 1%: 0.0%"):
        assert words in done.stdout
    assert Image.open(tmp_path / "sheet.png").width > 300
    done = run("data.py", "dior", "--root", tmp_path / "nowhere")
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1
    assert done.stderr.startswith("data.py: no train.txt")


def test_the_check_decodes_every_image_and_names_what_would_end_a_run(
        folder: Path, run: Run, tmp_path: Path,
) -> None:
    path = folder / "JPEGImages" / "00001.jpg"
    path.write_bytes(path.read_bytes()[:-300])
    done = run("data.py", "dior", "--root", folder, "--out", tmp_path / "sheet.png")
    says = f"images decoded: 3, unreadable: 1\n    {path}: unreadable image of record 0 ("
    assert says in done.stdout, done.stdout + done.stderr
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "1 of 3 images can't be decoded" in done.stderr
    # The sheet is of those that can be.
    assert Image.open(tmp_path / "sheet.png").width > 300


@pytest.fixture
def check(
        monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture,
) -> Callable[..., str]:
    """check("dior", "--root", folder) -> what data.py prints."""
    def check(*flags: object) -> str:
        monkeypatch.setattr("sys.argv", ["data.py", *map(str, flags)])
        try:
            check_data.main()
        except DataError as error:
            fail(error)                              # as `launch` does
        return capsys.readouterr().out
    return check


def test_the_check_says_what_splits_share_and_what_a_set_lacks(
        tmp_path: Path, check: Callable[..., str], capsys: pytest.CaptureFixture,
) -> None:
    image(tmp_path / "a.png")
    lines(
        tmp_path / "train.jsonl", own("a.png"), own("a.png", box=(0, 0, 5, 5)),
        *["bad"] * 30)
    lines(tmp_path / "test.jsonl", own("a.png", box=(0, 0, 200, 200)))
    out = check("jsonl", "--root", tmp_path, "--split", "train", "test", "--show", 0)
    for words in (
            "images in both train and test: 1", "below 1%: 50.0% of the boxes",
            "and 10 more; --places 0", "refused, no JSON object: 30",
            "repaired, box past the edge: 1"):
        assert words in out
    assert "are published" not in out
    (tmp_path / "test.jsonl").unlink()
    assert "jsonl test: " in check("jsonl", "--root", tmp_path, "--show", 0)
    for flags, words in (
            (["--split", "test"], "no records of a split 'test'"),
            (["--nonsense"], "--nonsense"),
            (["--out", tmp_path / "no" / "sheet.png"], "--out")):
        with pytest.raises(SystemExit) as stop:
            check("jsonl", "--root", tmp_path, *flags)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and words in error
        assert len(error.strip().splitlines()) == 1


# ---------------------------------------------------------------- what data sets share

def record(name: str, box: tuple[float, ...], size: Size = (100, 50)) -> Record:
    return Record("0", Path(name), "a ship", box, "", size)


def test_what_is_shared_by_hand() -> None:
    training = [record("a/1.jpg", (10, 10, 20, 20)), record("a/2.jpg", (0, 0, 50, 50))]
    records = [
        record("b/1.png", (10, 10, 20, 20)),                     # in another folder and format
        record("b/1.png", (10, 10, 20, 20.9)),                   # IoU 0.92
        record("b/1.png", (10, 10, 20, 21.2)),                   # IoU 0.89
        record("b/1.png", (20, 20, 40, 40), (200, 100)),         # twice as large
        record("b/3.png", (10, 10, 20, 20)),
        record("b/2.jpg", (50, 0, 60, 50))]
    assert data.find_shared(records, training) == [
        "record", "record", "image", "record", None, "image"]
    assert data.find_shared(records, []) == [None] * 6
    assert data.find_shared([], training) == []
    shared = data.find_shared(records, training, {})             # a path without pixels is its own
    assert shared == [None] * 6


def test_what_splits_of_the_embedded_world_share() -> None:
    train = load("synth", None, "val")
    assert set(data.find_shared(train[:50], train)) == {"record"}
    assert set(data.find_shared(load("synth", None, "novel")[:50], train)) == {None}


def test_the_check_of_several_data_sets_counts_what_is_trained_on_and_scored(
        tmp_path: Path, check: Callable[..., str], capsys: pytest.CaptureFixture,
) -> None:
    """RRSIS-D's test has an image and an object of the other's train, and a renamed copy of it."""
    rrsisd = tmp_path / "rrsisd"
    folder = rrsisd / "images" / "rrsisd" / "JPEGImages"
    folder.mkdir(parents=True)
    for i, name in enumerate(("00001", "00002", "00003", "00004")):
        noise(50 + i, 40).save(folder / f"{name}.png")
    rows = {}
    for name, i, box in (
            ("train", 4, [1, 1, 9, 9]), ("val", 3, [5, 5, 20, 20]), ("test", 1, [5, 5, 20, 20])):
        rows[name] = {
            "split": name, "sent": "a ship", "file_name": f"{i:05d}.jpg", "ann_id": i,
            "bbox": box}
        lines(rrsisd / "datainfo" / f"rrsisd_{name}.jsonl", rows[name])
    mine = tmp_path / "jsonl"
    mine.mkdir()
    noise(50, 40).save(mine / "renamed.png")                     # the pixels of 00001
    noise(52, 40).save(mine / "00003.png")
    noise(49, 40).save(mine / "00001.png")                       # the name alone
    lines(
        mine / "train.jsonl", own("renamed.png", box=(5, 5, 20, 20)),
        own("00003.png", box=(30, 30, 40, 40)), own("00001.png", box=(20, 20, 30, 30)))
    lines(mine / "val.jsonl", own("00001.png"))
    out = check("jsonl", "rrsisd", "--root", tmp_path)
    table = [line.split() for line in out.splitlines() if " (" in line and "%)" in line]
    none = ["0", "(0%)"]
    one = ["1", "(100%)"]
    assert table == [
        ["jsonl", "rft", "jsonl", "val", *one * 2, *none * 2],
        ["jsonl", "rft", "rrsisd", "val", *one * 2, *none * 2],
        ["jsonl", "rft", "rrsisd", "test", *one * 2, *none, *one],
        ["rrsisd", "rft", "jsonl", "val", *none * 4],
        ["rrsisd", "rft", "rrsisd", "val", *none * 4],
        ["rrsisd", "rft", "rrsisd", "test", *none * 4]], out
    assert not list(Path.cwd().glob("data_check.png"))
    assert "images decoded: 6, unreadable: 0" in out and "jsonl test: " in out
    for flags, words in (
            (["jsonl", "jsonl"], "comes twice"), (["jsonl", "other"], "no data set is called"),
            (["jsonl", "rrsisd", "--split", "test"], "no records of a split 'test'")):
        with pytest.raises(SystemExit) as stop:
            check(*flags, "--root", tmp_path)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and words in error and error.count("\n") == 1


# ---------------------------------------------------------------- a reader of one's own

def read_mine(root: Path, split: str) -> Records:
    """The reader in the docstring of data.py."""
    file = base.first_existing(root, f"{split}.jsonl")
    collector = collect.Collector(root)
    for number, row in base.read_json_lines(file):
        where = f"{file}, line {number}"
        if row is None:
            collector.refuse("no JSON object", where)
            continue
        collector.add(
            where, f"{split}-{number}", row.get("file"), row.get("text"), row.get("box"))
    return collector.records


@pytest.mark.parametrize("with_val", [False, True])
def test_a_reader_need_know_its_own_splits_alone(
        monkeypatch: pytest.MonkeyPatch, tmp_path: Path, with_val: bool) -> None:
    """Of 40 images in train, two are held out where there is no val."""
    monkeypatch.setitem(data.READERS, "mine", read_mine)
    lines = []
    for i in range(40):
        Image.new("RGB", (20, 20)).save(tmp_path / f"{i}.png")
        lines.append(json.dumps({"file": f"{i}.png", "text": "x", "box": [1, 1, 9, 9]}) + "\n")
    (tmp_path / "train.jsonl").write_text("".join(lines))
    if with_val:
        (tmp_path / "val.jsonl").write_text(lines[0])
    sizes = {split: len(load("mine", tmp_path, split)) for split in ("train", "sft", "rft", "val")}
    if with_val:
        assert sizes == {"train": 40, "sft": 40, "rft": 40, "val": 1}
    else:
        assert sizes == {"train": 40, "sft": 38, "rft": 38, "val": 2}
    with pytest.raises(base.NoSplit, match="no test.jsonl in"):
        load("mine", tmp_path, "test")


def test_pixels_travel_as_an_eighth_and_are_the_same_on_the_other_side(
        genuine: Path) -> None:
    processor = Processor.from_pretrained(genuine, max_pixels=10 ** 5)
    prompt = processor(noise(170, 120), "the ship")
    sent = pickle.dumps(prompt.pixels)
    assert len(sent) < 1.1 * prompt.pixel_values.nbytes / 8 + 4096
    arrived = pickle.loads(sent)
    assert torch.equal(arrived.normalised(), prompt.pixel_values)
    half = arrived.normalised(dtype=torch.bfloat16)
    assert torch.equal(half, prompt.pixel_values.bfloat16())
