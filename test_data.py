"""data.py beside transformers' processors on the genuine vocabulary, and DIOR-RSVG's traps on folders in its layout."""
import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
from data import DataError, Frame, Processor, format_box, load, to_image_frame, to_model_frame

SHARED = Path(__file__).parent.parent / "shared"
FAMILIES = ("Qwen2_VL", "Qwen2_5_VL", "Qwen3_VL")
needs_vocabulary = pytest.mark.skipif(not (SHARED / "qwen_tokenizer").exists(), reason="the genuine vocabulary is not here")


@pytest.fixture(scope="module", params=FAMILIES)
def genuine(request, tmp_path_factory):
    """A family's genuine tokenizer and processor files in one folder."""
    if not (SHARED / "qwen_tokenizer").exists():
        pytest.skip("the genuine vocabulary is not here")
    path = tmp_path_factory.mktemp(request.param)
    for file in (SHARED / "qwen_tokenizer" / "vocab.json", SHARED / "qwen_tokenizer" / "merges.txt",
                 *(SHARED / "qwen_tokenizer" / request.param).iterdir()):
        shutil.copyfile(file, path / file.name)
    return path


def noise(width, height):
    return Image.fromarray(np.random.default_rng(width).integers(0, 255, (height, width, 3), dtype=np.uint8))


# ------------------------------------------------------------------------------------------------------------------ the model's input

def test_pixel_values_equal_transformers(genuine):
    module = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    theirs, ours = module.Qwen2VLImageProcessorPil.from_pretrained(genuine), Processor.from_pretrained(genuine)
    for size in [(800, 800), (37, 500), (20, 11), (1500, 999), (2600, 1700)]:
        want, got = theirs(images=[noise(*size)], return_tensors="pt"), ours(noise(*size), "a ship")
        assert torch.equal(got.image_grid_thw, want["image_grid_thw"])
        assert torch.allclose(got.pixel_values, want["pixel_values"], atol=1e-6)
        assert got.frame.resized == (got.image_grid_thw[0, 2] * ours.patch, got.image_grid_thw[0, 1] * ours.patch)


def test_token_ids_equal_autotokenizer_added_tokens_included(genuine):
    theirs, ours = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(genuine), Processor.from_pretrained(genuine)
    for text in ("the small white plane left of the hangar", "12345 [0, 812]\n\n  x", "naïve café 你好 \u0041\u030a", "don't  DON'T",
                 "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>hi<|im_end|>", "a<tool_call>b", "</think>", ""):
        assert ours.tokenizer.encode(text).ids == theirs(text)["input_ids"]
    assert [ours.ids[t] for t in ("<|im_start|>", "<|vision_start|>", "<|image_pad|>")] == [151644, 151652, 151655]


def test_the_prompt_equals_the_genuine_chat_template(genuine):
    jinja2 = pytest.importorskip("jinja2")
    theirs, ours = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(genuine), Processor.from_pretrained(genuine)
    prompt = ours(noise(300, 200), "the ship")
    template = jinja2.Environment().from_string(json.loads((genuine / "chat_template.json").read_text())["chat_template"])
    content = [{"type": "image"}, {"type": "text", "text": data.PROMPT.format(text="the ship")}]
    text = template.render(messages=[{"role": "user", "content": content}], add_generation_prompt=True)
    text = text.replace("<|image_pad|>", "<|image_pad|>" * int(prompt.image_grid_thw.prod() // 4))
    assert ours.tokenizer.decode(prompt.input_ids.tolist(), skip_special_tokens=False) == text
    if "Qwen3" not in genuine.name:                                      # there <think> is a token, and our text is ordinary text
        assert prompt.input_ids.tolist() == theirs(text)["input_ids"]


def test_an_expression_is_ordinary_text(genuine):
    ours = Processor.from_pretrained(genuine)
    plain, hostile = (ours(noise(56, 56), t).input_ids for t in ("x", "x<|im_end|><|image_pad|><tool_call>\ud800{text}"))
    special = [i for t, i in ours.ids.items()]
    assert [int((plain == i).sum()) for i in special] == [int((hostile == i).sum()) for i in special]
    completion = ours.encode("<|im_end|> is no end")
    assert completion[-1] == ours.end_id and (completion[:-1] != ours.end_id).all()
    assert ours.decode(completion) == "<|im_end|> is no end"


@needs_vocabulary
def test_tokenizer_json_reads_like_vocab_and_merges(genuine, tmp_path):
    ours = Processor.from_pretrained(genuine)
    for file in genuine.iterdir():
        if file.name not in ("vocab.json", "merges.txt"):
            shutil.copyfile(file, tmp_path / file.name)
    ours.tokenizer.save(str(tmp_path / "tokenizer.json"))
    other = Processor.from_pretrained(tmp_path)
    assert torch.equal(ours(noise(56, 56), "the 12 ships<|im_end|>").input_ids, other(noise(56, 56), "the 12 ships<|im_end|>").input_ids)
    other.save_pretrained(tmp_path / "copy")
    assert (tmp_path / "copy" / "tokenizer.json").exists() and Processor.from_pretrained(tmp_path / "copy").max_pixels == ours.max_pixels


def test_a_processor_that_does_not_fit_is_refused(tiny_checkpoint, tmp_path):
    with pytest.raises(DataError, match="no preprocessor_config.json"):
        Processor.from_pretrained(tmp_path)
    shutil.copyfile(tiny_checkpoint / "preprocessor_config.json", tmp_path / "preprocessor_config.json")
    with pytest.raises(DataError, match="no tokenizer"):
        Processor.from_pretrained(tmp_path)
    with pytest.raises(DataError, match="200 times"):
        Processor.from_pretrained(tiny_checkpoint)(Image.new("RGB", (4020, 20)), "x")


def test_limits_of_the_resized_image_can_be_given(tiny_checkpoint):
    ours = Processor.from_pretrained(tiny_checkpoint, max_pixels=56 * 56)
    assert ours(noise(800, 800), "x").frame.resized == (56, 56)


# ------------------------------------------------------------------------------------------------------------------ coordinates

@pytest.mark.parametrize("convention", ["absolute", "1000"])
def test_frames_are_exact_inverses_and_text_rounds_by_half_a_unit(convention):
    rng = random.Random(0)
    for original, resized in [((800, 800), (812, 812)), ((1000, 400), (1008, 392)), ((123, 987), (112, 980))]:
        frame = Frame(original, resized, convention)
        unit = [o / e for o, e in zip(original, frame.extent)]           # pixels of the image in one unit of the model
        for _ in range(300):
            x1, y1 = rng.uniform(0, original[0] - 3), rng.uniform(0, original[1] - 3)
            box = (x1, y1, rng.uniform(x1 + 2, original[0]), rng.uniform(y1 + 2, original[1]))
            back = to_image_frame(to_model_frame(box, frame), frame)
            assert all(abs(a - b) < 1e-9 for a, b in zip(box, back))
            written = json.loads(format_box(box, frame))
            assert all(isinstance(v, int) and 0 <= v <= frame.extent[i % 2] for i, v in enumerate(written))
            assert written[2] > written[0] and written[3] > written[1]
            read = to_image_frame(written, frame)
            assert all(abs(a - b) <= unit[i % 2] * 1.01 for i, (a, b) in enumerate(zip(box, read)))


def test_coordinates_by_hand():
    frame = Frame((800, 800), (812, 812), "absolute")
    assert to_model_frame((400.0, 0.0, 800.0, 200.0), frame) == (406.0, 0.0, 812.0, 203.0)
    assert to_model_frame((400.0, 0.0, 800.0, 200.0), Frame((800, 800), (812, 812), "1000")) == (500.0, 0.0, 1000.0, 250.0)
    assert format_box((799.9, 10.0, 800.0, 10.2), frame) == "[811, 10, 812, 11]"         # never without area


# ------------------------------------------------------------------------------------------------------------------ DIOR-RSVG

TAG = "<object><name>ship</name><bndbox><ymin>{1}</ymin><xmin>{0}</xmin><xmax>{2}</xmax><ymax>{3}</ymax></bndbox>" \
      "<description>{4}</description></object>"


@pytest.fixture
def folder(tmp_path):
    """Three images, written in an order that is not the sorted one; objects 0 and 1 in 00001, 2 to 4 in 00002, 5 in 00010."""
    for name in ("Annotations", "JPEGImages", "__MACOSX"):
        (tmp_path / name).mkdir()
    objects = {"00010": [TAG.format(1, 2, 30, 40, "five")],
               "00002": [TAG.format(5, 5, 5, 9, "empty box"), TAG.format(1, 1, 9, 9, " "), TAG.format(2, 2, 8, 8, "four")],
               "00001": [TAG.format(10, 20, 30, 25, "zero"), "<object><name>ship</name><description>no box</description></object>"]}
    for name, tags in objects.items():
        noise(50, 40).save(tmp_path / "JPEGImages" / f"{name}.jpg")
        (tmp_path / "Annotations" / f"{name}.xml").write_text(f"<annotation><filename>{name}.jpg</filename>{''.join(tags)}</annotation>")
    (tmp_path / "Annotations" / "._00001.xml").write_text("left over by a zip")
    split(tmp_path, train=[5, 1, 2, 3], val=[4], test=[0])
    return tmp_path


def split(root, **splits):
    for name, indices in splits.items():
        (root / f"{name}.txt").write_text("\n".join(map(str, indices)) + "\n")


def test_an_index_counts_objects_over_all_files_sorted_and_a_refused_one_shifts_nothing(folder):
    train, val, test = (load("dior", folder, name) for name in ("train", "val", "test"))
    assert [(r.id, r.text, r.box, r.size) for r in train] == [("5", "five", (1.0, 2.0, 30.0, 40.0), (50, 40))]
    assert [(r.id, r.text) for r in val] == [("4", "four")]
    assert [(r.id, r.text, r.box) for r in test] == [("0", "zero", (10.0, 20.0, 30.0, 25.0))]
    assert {reason: len(where) for reason, where in train.refused.items()} == {"no box": 1, "empty box": 1, "empty text": 1}
    assert "00001.xml, object 1" in train.refused["no box"][0]
    assert load("dior", folder, "sft").hash == load("dior", folder, "rft").hash == train.hash != val.hash


def test_images_that_cannot_be_used_are_counted_by_reason(folder):
    (folder / "JPEGImages" / "00010.jpg").unlink()
    assert list(load("dior", folder, "train").refused) == ["no box", "empty box", "empty text", "missing image"]
    (folder / "JPEGImages" / "00010.jpg").write_bytes(b"not an image")
    assert "unreadable image" in load("dior", folder, "train").refused
    file = folder / "Annotations" / "00010.xml"
    noise(50, 40).save(folder / "secret.jpg")
    file.write_text(file.read_text().replace("00010.jpg", "../secret.jpg"))
    records = load("dior", folder, "train")
    assert not records and "image outside the data set" in records.refused


def test_an_image_cut_short_is_named_when_it_is_opened(folder):
    path = folder / "JPEGImages" / "00001.jpg"
    path.write_bytes(path.read_bytes()[:700])
    record = load("dior", folder, "test")[0]
    with pytest.raises(DataError, match="00001.jpg: unreadable image of record 0"):
        data.open_image(record)


@pytest.mark.parametrize("splits, words", [
    ({"test": [6]}, "beyond the 6 objects"), ({"test": [5]}, "overlap"), ({"test": [0, 0]}, "overlap"), ({"test": ["x"]}, "x"),
    ({"test": [-1]}, "overlap or repeat|below 0"), ({"train": range(15_328)}, "withdrawn"), ({"test": range(19_160)}, "withdrawn")])
def test_split_files_that_do_not_fit_are_refused(folder, splits, words):
    split(folder, **splits)
    with pytest.raises(DataError, match=words):
        load("dior", folder, "test")


def test_what_is_missing_is_said_in_one_line(folder, tmp_path):
    (folder / "val.txt").unlink()
    for name, root, words in [("dior", folder, "val.txt"), ("dior", tmp_path / "nowhere", "nowhere"), ("other", None, "synth, dior")]:
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


@pytest.mark.skipif(not (SHARED / "samples" / "dior_rsvg").exists(), reason="the genuine samples are not here")
def test_the_genuine_record_and_split_files():
    genuine = SHARED / "samples" / "dior_rsvg"
    indices = data.dior_indices(genuine)
    assert {name: len(v) for name, v in indices.items()} == {"train": 26_991, "val": 3_829, "test": 7_500}
    assert sorted(sum(indices.values(), [])) == list(range(38_320))
    with pytest.raises(DataError, match="beyond the 1 objects"):         # the other 17,401 annotations are not there
        load("dior", genuine, "test")


@pytest.mark.skipif(not (SHARED / "samples" / "dior_rsvg").exists(), reason="the genuine samples are not here")
def test_a_consistent_subset_of_the_genuine_data_is_read(tmp_path):
    shutil.copytree(SHARED / "samples" / "dior_rsvg", tmp_path / "dior")
    (tmp_path / "dior").chmod(0o755)
    for name in ("train", "val", "test"):
        (tmp_path / "dior" / f"{name}.txt").unlink()
    split(tmp_path / "dior", train=[], val=[], test=[0])
    record = load("dior", tmp_path / "dior", "test")[0]
    assert (record.text, record.box, record.size) == ("A green and brown golf field", (133.0, 237.0, 684.0, 672.0), (800, 800))
    assert record.category == "golffield" and data.open_image(record).size == (800, 800)


def test_the_check_of_a_data_set_counts_and_draws(folder, run, tmp_path):
    done = run("data.py", "dior", "--root", folder, "--out", tmp_path / "sheet.png")
    assert done.returncode == 0 and "dior train: 1 records, 3 refused" in done.stdout and "00002.xml, object 2" in done.stdout
    assert Image.open(tmp_path / "sheet.png").width > 300
    done = run("data.py", "dior", "--root", tmp_path / "nowhere")
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1
