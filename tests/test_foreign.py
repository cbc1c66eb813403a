"""Files of other programs: adapters, images, annotations and conversations as users have them."""
import json
import os
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin
from safetensors.torch import load_file, save_file

from data import load, open_image, refusal_summary
from model import QwenVL
from qwen import lora
from qwen.answer import format_ok, parse_box, write
from qwen.hub import CheckpointError
from qwen.processor import Processor
from readers import images
from readers.base import DataError
from readers.collect import Collector
from test_data import annotate, chat, image, lines, own, split
from test_lora import flags, open_peer, with_adapters

# ---------------------------------------------------------------- adapters

WEIGHTS = "adapter_model.safetensors"


@pytest.mark.parametrize("name", [
    "non_lora_trainables.bin", "non_lora_state_dict.bin", "embeddings.pt", "value_head.pth",
    "vit.safetensors", "mm_projector.bin", "modules_to_save.pkl", "pytorch_model.bin"])
def test_weights_next_to_an_adapter_are_refused_by_name(
        tiny_checkpoint: Path, tmp_path: Path, name: str) -> None:
    with_adapters(tiny_checkpoint).save_pretrained(tmp_path)
    for state in ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state_0.pth",
                  "random_states_0.pkl", "optimizer.bin", "scaler.pt"):
        (tmp_path / state).write_bytes(b"x")
    QwenVL.from_pretrained(tmp_path)
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(CheckpointError, match=f"{re.escape(name)} next to the adapter") as error:
        QwenVL.from_pretrained(tmp_path)
    assert "\n" not in str(error.value) and "optimizer" not in str(error.value)


def without(path: Path, pattern: str) -> None:
    """Removes the tensors of an adapter that match."""
    tensors = load_file(path / WEIGHTS)
    kept = {name: x for name, x in tensors.items() if not re.search(pattern, name)}
    assert 0 < len(kept) < len(tensors)
    save_file(kept, path / WEIGHTS)


@pytest.mark.parametrize("pattern, absent", [
    ("layers.1.mlp.up_proj", "model.layers.1.mlp.up_proj"),
    ("layers.0.", "model.layers.0.self_attn.q_proj"),
    ("visual", "visual."), ("q_proj", "model.layers.0.self_attn.q_proj")])
def test_an_adapter_that_lacks_layers_of_its_config_is_refused(
        tiny_checkpoint: Path, tmp_path: Path, pattern: str, absent: str) -> None:
    with_adapters(tiny_checkpoint, vision=True).save_pretrained(tmp_path)
    without(tmp_path, pattern)
    with pytest.raises(CheckpointError, match=f"but not {absent}.*adapter_config.json names"):
        QwenVL.from_pretrained(tmp_path)


# All fields with which PEFT's LoraConfig chooses layers.
CHOICES = [
    {"target_modules": ["q_proj", "down_proj", "qkv"]}, {"target_modules": "all-linear"},
    {"target_modules": r".*language_model.*(q_proj|v_proj)"},
    {"target_modules": ["q_proj", "k_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]},
    {"target_modules": ["q_proj", "up_proj"], "exclude_modules": r".*visual.*"},
    {"target_modules": ["v_proj", "q_proj"], "layers_to_transform": 1},
    {"target_modules": ["v_proj"], "layers_to_transform": [0, 1]},
    {"target_modules": ["up_proj", "q_proj"], "layers_to_transform": [1],
     "layers_pattern": "layers"},
    {"target_modules": ["up_proj", "qkv"], "layers_to_transform": [0],
     "layers_pattern": ["blocks"]}]


@pytest.mark.parametrize("choice", CHOICES)
def test_layers_that_a_config_names_are_those_that_peft_adapts(
        tiny_checkpoint: Path, tmp_path: Path, choice: dict[str, Any]) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=3, init_lora_weights=False, **choice)
    peft.get_peft_model(open_peer(tiny_checkpoint), config).save_pretrained(tmp_path)
    adapted = lora.adapted(QwenVL.from_pretrained(tmp_path))
    assert adapted
    last = list(adapted)[-1]
    without(tmp_path, re.escape(f"{last}."))
    with pytest.raises(CheckpointError, match=f"but not {last}"):
        QwenVL.from_pretrained(tmp_path)


@pytest.mark.parametrize("of_base, of_adapter", [
    (torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.float16)])
def test_an_adapter_keeps_its_own_dtype_and_merged_weights_their_bases(
        tiny_checkpoint: Path, tmp_path: Path, of_base: torch.dtype, of_adapter: torch.dtype,
) -> None:
    base, adapter, copy, whole = (tmp_path / name for name in ("base", "lora", "copy", "whole"))
    shutil.copytree(tiny_checkpoint, base)
    model = QwenVL.from_pretrained(tiny_checkpoint, None)
    model.stored_dtype = of_base
    model.save_pretrained(base)
    model = with_adapters(base)
    model.stored_dtype = of_adapter
    model.save_pretrained(adapter)
    model = QwenVL.from_pretrained(adapter, None)
    model.save_pretrained(copy)
    stored, written = load_file(adapter / WEIGHTS), load_file(copy / WEIGHTS)
    assert {x.dtype for x in written.values()} == {of_adapter} and stored.keys() == written.keys()
    assert all(torch.equal(stored[name], x) for name, x in written.items())
    lora.fit(model, flags(lora=None))
    model.save_pretrained(whole)
    assert {x.dtype for x in load_file(whole / "model.safetensors").values()} == {of_base}


def test_a_pickled_adapter_is_refused_with_the_command_that_converts_it(
        tiny_checkpoint: Path, tmp_path: Path) -> None:
    with_adapters(tiny_checkpoint).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    torch.save(tensors, tmp_path / "adapter_model.bin")
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match="adapter_model.bin: pickles are not read") as error:
        QwenVL.from_pretrained(tmp_path)
    command = str(error.value).split("convert it: ")[1].replace("python", os.sys.executable, 1)
    subprocess.run(command, shell=True, check=True)
    assert all(torch.equal(x, tensors[name]) for name, x in load_file(tmp_path / WEIGHTS).items())
    QwenVL.from_pretrained(tmp_path)


def test_a_pickled_model_is_called_that(tiny_checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_checkpoint, tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pickles are not read .pytorch_model.bin."):
        QwenVL.from_pretrained(tmp_path)


# ---------------------------------------------------------------- processors

def test_settings_of_videos_are_carried_along(tiny_checkpoint: Path, tmp_path: Path) -> None:
    source = shutil.copytree(tiny_checkpoint, tmp_path / "source")
    (source / "video_preprocessor_config.json").write_text('{"fps": 2}')
    Processor.from_pretrained(source).save_pretrained(tmp_path / "copy")
    assert (tmp_path / "copy" / "video_preprocessor_config.json").read_text() == '{"fps": 2}'


# The ends of the templates of Qwen3-VL's Thinking and Instruct models.
TEMPLATE = (
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n<think>\\n' + "
    "reasoning + '\\n</think>\\n\\n' + message.content + '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\nOPENING' }}\n{%- endif %}\n")
THINKING, INSTRUCT = (TEMPLATE.replace("OPENING", text) for text in ("<think>\\n", ""))


def thinking(family: Path, to: Path, template: str, name: str = "chat_template.jinja") -> Processor:
    shutil.copytree(family, to)
    content = template if name.endswith("jinja") else json.dumps({"chat_template": template})
    (to / name).write_text(content)
    return Processor.from_pretrained(to)


@pytest.mark.parametrize("name", [
    "chat_template.jinja", "chat_template.json", "tokenizer_config.json"])
def test_a_thinking_models_prompt_opens_the_reasoning_and_its_answers_do_not(
        tiny_family: Path, tmp_path: Path, name: str) -> None:
    jinja2 = pytest.importorskip("jinja2")
    ours = thinking(tiny_family, tmp_path / "a", THINKING, name)
    ids = ours(Image.new("RGB", (64, 64)), "the ship").input_ids.tolist()
    prompt = ours.tokenizer.decode(ids, skip_special_tokens=False)
    rendered = jinja2.Environment().from_string(THINKING).render(
        messages=[], add_generation_prompt=True)
    assert rendered == "<|im_start|>assistant\n<think>\n" and prompt.endswith(rendered)
    plain = thinking(tiny_family, tmp_path / "b", INSTRUCT, name)
    shorter = plain(Image.new("RGB", (64, 64)), "the ship").input_ids.tolist()
    opened = ours.tokenizer.encode("<think>\n", add_special_tokens=False).ids
    assert ids == shorter + opened and plain.opening == ""
    # Text and ids of an answer: the text is whole, the ids go on after the prompt.
    text = write("left of it", "[1, 20, 300, 4]")
    completion = ours.encode(text).tolist()
    whole = ours.tokenizer.decode(ids[-len(opened):] + completion, skip_special_tokens=False)
    assert whole.count("<think>") == 1 and whole.count("</think>") == 1
    assert ours.decode(completion) == text and plain.decode(plain.encode(text)) == text
    # An answer as such a model samples it has the format, and one without reasoning closes it.
    sampled = 'It is left.\n</think>\n\n<answer>{"bbox_2d": [1, 2, 30, 40]}</answer>'
    answer = ours.decode(plain.encode(sampled))
    assert format_ok(answer) and parse_box(answer) == (1, 2, 30, 40)
    assert answer.count("<think>") == 1 and not format_ok(plain.decode(plain.encode(sampled)))
    assert ours.decode(plain.encode(f"<think>{sampled}")).count("<think>") == 1
    direct = ours.decode(ours.encode(write(None, "[1, 2, 3, 4]")))
    assert direct == '<think></think><answer>{"bbox_2d": [1, 2, 3, 4]}</answer>'
    # The saved checkpoint is a Thinking model's again.
    ours.save_pretrained(tmp_path / "saved")
    assert Processor.from_pretrained(tmp_path / "saved").opening == "<think>\n"


# ---------------------------------------------------------------- images

@pytest.mark.parametrize("kind", ["zTXt", "tEXt", "iTXt", "iCCP", "many"])
def test_a_png_with_megabytes_of_text_or_profile_is_whole(tmp_path: Path, kind: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8)
    info, options = PngImagePlugin.PngInfo(), {}
    words = os.urandom(3 << 20).hex()                                              # 6 MB
    if kind == "iCCP":
        options = {"icc_profile": words.encode()}
    elif kind == "many":
        for i in range(20):
            info.add_text(f"key {i}", words, zip=True)                             # 120 MB
    elif kind == "iTXt":
        info.add_itxt("key", words, zip=True)
    else:
        info.add_text("key", words, zip=kind == "zTXt")
    file = tmp_path / "1.png"
    Image.fromarray(pixels).save(file, pnginfo=info, **options)
    lines(tmp_path / "test.jsonl", own("1.png", box=(1, 2, 30, 40)))
    [record] = load("jsonl", tmp_path, "test")
    assert np.array_equal(np.asarray(open_image(record)), pixels)


def test_an_eps_under_an_images_name_is_refused_and_runs_nothing(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path / 'run'}\n")
    (programs / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)
    eps = "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 50\n%%EndComments\nshowpage\n%%EOF\n"
    for suffix in ("jpg", "png", "tif"):
        (tmp_path / f"1.{suffix}").write_text(eps)
        with pytest.raises(images.ImageError):
            images.read_rgb(tmp_path / f"1.{suffix}")
        lines(tmp_path / "test.jsonl", own(f"1.{suffix}"))
        assert load("jsonl", tmp_path, "test").refusals == {"unreadable image": 1}
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["fifo", "link to a fifo", "device", "folder"])
def test_a_special_file_under_an_images_name_is_refused_at_once(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "1.jpg"
    if kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        fifo = path if kind == "fifo" else tmp_path / "pipe"
        os.mkfifo(fifo)
        if kind != "fifo":
            path.symlink_to(fifo)
    lines(tmp_path / "test.jsonl", own("1.jpg"))
    # In a process of its own, which can be stopped if it waits for the pipe.
    code = ("import sys; from data import load; "
            f"print(load('jsonl', {str(tmp_path)!r}, 'test').refusals)")
    done = subprocess.run([os.sys.executable, "-c", code], cwd=Path(__file__).parents[1],
                          capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "{'unreadable image': 1}", done.stderr


def test_a_pipe_in_the_place_of_an_image_is_no_image_later_either(tmp_path: Path) -> None:
    image(tmp_path / "1.jpg")
    lines(tmp_path / "test.jsonl", own("1.jpg"))
    [record] = load("jsonl", tmp_path, "test")
    (tmp_path / "1.jpg").unlink()
    (tmp_path / "1.jpg").symlink_to("/dev/null")
    with pytest.raises(DataError, match="not a regular file"):
        open_image(record)


# ---------------------------------------------------------------- annotations

SHIP = ("<object><name>ship</name><bndbox><xmin>1</xmin><ymin>2</ymin><xmax>30</xmax>"
        "<ymax>40</ymax></bndbox><description>{}</description></object>")


def write_xml(root: Path, texts: list[str], size: str = "", images_folder: str = "JPEGImages",
              image_size: tuple[int, int] = (100, 50)) -> Path:
    """A folder in DIOR-RSVG's layout with one image for each text; all records are test."""
    (root / "Annotations").mkdir(parents=True)
    (root / images_folder).mkdir()
    for i, text in enumerate(texts, 1):
        annotate(root, f"{i:05d}", size, SHIP.format(text))
        image(root / images_folder / f"{i:05d}.jpg", *image_size)
    split(root, train=[], val=[], test=range(len(texts)))
    return root


@pytest.mark.parametrize("name, folder", [("dior", "JPEGImages"), ("opt", "Image")])
def test_a_shrunk_mirror_is_refused_by_the_size_in_its_annotations(
        tmp_path: Path, name: str, folder: str) -> None:
    reason = {"image of another size than its annotation says": 1}
    for i, (width, height, refusals) in enumerate([
            (100, 50, {}), (800, 800, reason), (50, 100, reason), (0, 0, {}), ("", "?", {})]):
        size = f"<size><width>{width}</width><height>{height}</height></size>"
        root = write_xml(tmp_path / str(i), ["the ship"], size, folder)
        assert load(name, root, "test").refusals == refusals


def test_a_shrunk_mirror_is_not_taken_for_thousandths(tmp_path: Path) -> None:
    """Its boxes lie in 0..1000 and outside of its images, but the annotation says why."""
    size = "<size><width>800</width><height>800</height></size>"
    root = write_xml(tmp_path, ["a", "b", "c"], size)
    for file in (root / "Annotations").iterdir():
        file.write_text(file.read_text().replace(">1<", ">700<").replace(">30<", ">790<"))
    records = load("dior", root, "test")
    assert records.refusals == {"image of another size than its annotation says": 3}
    said = refusal_summary(records, "dior", root, "test")
    assert said.startswith("3 of 3 records are refused (image of another size than its annotation")


def test_sizes_in_both_forms_of_rrsisd(tmp_path: Path) -> None:
    image(tmp_path / "JPEGImages" / "1.jpg")                                       # 100 x 50
    row = {"split": "test", "sent": "a ship", "file_name": "1.jpg", "ann_id": 1,
           "bbox": [1, 2, 30, 40]}
    more = [{}, {"width": 100, "height": 50}, {"width": 800, "height": 800},
            {"segmentation": [{"size": [50, 100], "counts": "x"}]},
            {"segmentation": [{"size": [100, 50], "counts": "x"}]},
            {"segmentation": [[1, 2, 3, 4]]}, {"segmentation": [{}], "width": 9, "height": 9}]
    lines(tmp_path / "rrsisd_test.jsonl", *(row | extra for extra in more))
    records = load("rrsisd", tmp_path, "test")
    places = records.refused["image of another size than its annotation says"]
    assert [int(place.split()[-1]) for place in places] == [3, 5, 7]
    assert [r.id for r in records] == ["1", "1-2", "1-4", "1-6"]


@pytest.mark.parametrize("sides, refused", [((100, 50), 0), ((640, 640), 1)])
def test_the_authors_rrsisd_has_sizes_in_its_images(
        tmp_path: Path, sides: tuple[int, int], refused: int) -> None:
    import pickle
    image(tmp_path / "JPEGImages" / "1.jpg")
    refs = [{"image_id": 1, "split": "test", "sentences": [{"sent": "a ship"}], "ann_id": 2,
             "category_id": 3, "file_name": "1.jpg"}]
    (tmp_path / "refs(unc).p").write_bytes(pickle.dumps(refs))
    (tmp_path / "instances.json").write_text(json.dumps({
        "images": [{"id": 1, "file_name": "1.jpg", "width": sides[0], "height": sides[1]}],
        "annotations": [{"id": 2, "bbox": [1, 2, 30, 40]}],
        "categories": [{"id": 3, "name": "ship"}]}))
    records = load("rrsisd", tmp_path, "test")
    assert (len(records), sum(records.refusals.values())) == (1 - refused, refused)


@pytest.mark.parametrize("entry", [
    "00001", "00001.jpg", "00001.xml", "JPEGImages/00001.jpg", "P0001", "007", "+1", "1.0", "1_0",
    "٣", "00001 1"])
@pytest.mark.parametrize("name", ["dior", "opt"])
def test_split_files_of_names_are_refused_with_words(
        tmp_path: Path, name: str, entry: str) -> None:
    root = write_xml(tmp_path, ["a", "b", "c"])
    (root / "val.txt").write_text(f"0\n{entry}\n", encoding="utf-8")
    words = f"val.txt: not one index per line .{re.escape(repr(entry.split()[0]))}.*names or numb"
    with pytest.raises(DataError, match=words):
        load(name, root, "test")


@pytest.mark.parametrize("text, expected", [
    ("a <b>red</b> ship", "a red ship"), ("<i>a</i> red ship", "a red ship"),
    ("a <x>red <y>big</y></x> ship<!-- it is --> here", "a red big ship here"),
    ("a &lt;red&gt; <![CDATA[& big]]> ship", "a <red> & big ship")])
def test_a_tag_does_not_end_a_description(tmp_path: Path, text: str, expected: str) -> None:
    assert [r.text for r in load("dior", write_xml(tmp_path, [text]), "test")] == [expected]


@pytest.mark.parametrize("junk", ["@eaDir", "@Recycle", "#recycle", "@tmp", "$RECYCLE.BIN"])
def test_what_file_servers_leave_is_skipped(tmp_path: Path, junk: str) -> None:
    root = write_xml(tmp_path, ["a ship", "a boat"])
    (root / "Annotations" / junk / "00001.xml").mkdir(parents=True)
    (root / "Annotations" / junk / "00000.xml").write_text("no XML")
    image(root / "JPEGImages" / junk / "00001.jpg", 9, 9)
    assert [(r.text, r.size) for r in load("dior", root, "test")] == [
        ("a ship", (100, 50)), ("a boat", (100, 50))]
    lines(root / junk / "test.jsonl", own("x.jpg"))
    lines(root / "test.jsonl", own("JPEGImages/00001.jpg"))
    assert len(load("jsonl", root, "test")) == 1


@pytest.mark.parametrize("text", [
    "\u200b", "\ufeff \u200d\u2060", "\u00ad", "\u3164", "\u2800 ", "\u180e\u034f\ufe0f", "\u202e",
    "\x00\x7f", "\U000e0041", "\u00a0\u2028", "\u115f\u1160\uffa0"])
def test_a_text_of_invisible_characters_is_empty(tmp_path: Path, text: str) -> None:
    image(tmp_path / "1.jpg")
    visible = ("船", "\u200bship", "🚢", "7", "ё", "नाव")
    lines(tmp_path / "test.jsonl", own("1.jpg", text), *(own("1.jpg", x) for x in visible))
    records = load("jsonl", tmp_path, "test")
    assert records.refusals == {"empty text": 1} and [r.text for r in records] == [*visible]


def test_a_list_of_texts_is_called_that(tmp_path: Path) -> None:
    image(tmp_path / "1.jpg")
    lines(tmp_path / "test.jsonl", own("1.jpg", ["a ship", "a boat"]), own("1.jpg", []))
    assert load("jsonl", tmp_path, "test").refusals == {"list of texts in place of one": 2}


# ---------------------------------------------------------------- archives

@pytest.mark.parametrize("archive", [
    "images.zip", "images.tar", "images.tar.gz", "images.RAR", "images.7z", "images.tgz",
    "images.zip.001", "images.part1.rar", "images.tar.gz.aa", "images/all.zip"])
def test_an_archive_next_to_missing_images_is_named(tmp_path: Path, archive: str) -> None:
    lines(tmp_path / "test.jsonl", own("images/1.jpg"))
    assert load("jsonl", tmp_path, "test").refusals == {"missing image": 1}
    (tmp_path / archive).parent.mkdir(exist_ok=True)
    (tmp_path / archive).write_bytes(b"")
    records = load("jsonl", tmp_path, "test")
    name = archive.split("/")[-1]
    assert records.refusals == {f"missing image (is {name} unpacked?)": 1}
    assert f"(is {name} unpacked?)" in refusal_summary(records, "jsonl", tmp_path, "test")
    image(tmp_path / "images" / "2.jpg")                   # unpacked in place: not the reason
    if name != "all.zip" and "part1" not in name:
        assert load("jsonl", tmp_path, "test").refusals == {"missing image": 1}


def test_archives_of_the_other_layouts_are_named(tmp_path: Path) -> None:
    root = write_xml(tmp_path / "dior", ["a ship"])
    (root / "JPEGImages" / "00001.jpg").unlink()
    (root / "JPEGImages.tar").write_bytes(b"")
    assert load("dior", root, "test").refusals == {"missing image (is JPEGImages.tar unpacked?)": 1}
    shutil.rmtree(root / "Annotations")
    (root / "Annotations.rar").write_bytes(b"")
    with pytest.raises(DataError, match="Annotations.rar, JPEGImages.tar is there: untar or unzip"):
        load("dior", root, "test")
    (root / "Annotations").mkdir()
    with pytest.raises(DataError, match="0 objects .* is Annotations.rar, JPEGImages.tar unpacked"):
        load("dior", root, "test")
    shutil.rmtree(root)
    (tmp_path / "dior.zip").write_bytes(b"")
    with pytest.raises(DataError, match="dior.zip is there"):
        load("dior", root, "test")
    # refGeo's folders of images, one for each data set.
    lines(tmp_path / "geo" / "metainfo" / "rsvg_test.jsonl", {
        "image_id": "1.jpg", "question": "a road", "bbox": [1, 2, 3, 4]})
    (tmp_path / "geo" / "images" / "rsvg").mkdir(parents=True)
    (tmp_path / "geo" / "images" / "rsvg.rar").write_bytes(b"")
    assert load("refgeo", tmp_path / "geo", "test").refusals == {
        "missing image (is rsvg.rar unpacked?)": 1}


# ---------------------------------------------------------------- your own lines

def test_a_repeated_id_is_numbered(tmp_path: Path) -> None:
    image(tmp_path / "1.jpg")
    lines(tmp_path / "test.jsonl", *(own("1.jpg", id=i) for i in (
        "p", "p", "p-2", "p", "q", 7, "7", "p-2")), own("1.jpg"))
    records = load("jsonl", tmp_path, "test")
    assert not records.refused and [r.id for r in records] == [
        "p", "p-2", "p-2-2", "p-3", "q", "7", "7-2", "p-2-3", "test-9"]


def test_one_id_on_all_lines_takes_linear_time(tmp_path: Path) -> None:
    collector = Collector(tmp_path)
    start = time.monotonic()
    for i in range(20_000):
        collector.add(str(i), "p", "", "a ship", [1, 2, 3, 4])
    assert time.monotonic() - start < 10 and "p-20000" in collector.ids


@pytest.mark.parametrize("name", ["valid", "validation", "dev", "val", "Validation", "DEV"])
def test_other_names_of_val_are_taken(tmp_path: Path, name: str) -> None:
    for i in (1, 2, 3):
        image(tmp_path / f"{i}.jpg")
    lines(tmp_path / "train.jsonl", own("1.jpg"), own("2.jpg"))
    lines(tmp_path / f"{name}.jsonl", own("3.jpg", "held out"))
    assert [r.text for r in load("jsonl", tmp_path, "val")] == ["held out"]
    assert [r.text for r in load("jsonl", tmp_path, name)] == ["held out"]
    for split_name in ("train", "sft", "rft"):
        records = load("jsonl", tmp_path, split_name)
        assert len(records) == 2 and not records.note
    # In one file, the lines say it.
    mine = tmp_path / "one"
    image(mine / "1.jpg")
    lines(mine / "all.jsonl", own("1.jpg", "a"), own("1.jpg", "b", split=name))
    assert [r.text for r in load("jsonl", mine, "val")] == ["b"]
    assert [r.text for r in load("jsonl", mine, "rft")] == ["a"]


def test_a_file_that_is_no_split_by_default_is_said(tmp_path: Path) -> None:
    for i in (1, 2, 3):
        image(tmp_path / f"{i}.jpg")
    lines(tmp_path / "train.jsonl", own("1.jpg"), own("2.jpg"))
    lines(tmp_path / "holdout.jsonl", own("3.jpg"))
    assert "validation is 1 of train's 2" in load("jsonl", tmp_path, "val").note
    for split_name in ("train", "sft", "val"):
        assert load("jsonl", tmp_path, split_name).note.endswith("read by default: holdout")
    # A val of that name comes first, and the other keeps its own.
    lines(tmp_path / "val.jsonl", own("1.jpg", "val"))
    lines(tmp_path / "dev.jsonl", own("1.jpg", "dev"))
    assert [load("jsonl", tmp_path, x)[0].text for x in ("val", "dev")] == ["val", "dev"]
    assert load("jsonl", tmp_path, "train").note.endswith("by default: dev, holdout")


BOXES = ("[10, 5, 50, 25]", "[1, 2, 30, 40]", "[3, 4, 60, 50]")


@pytest.mark.parametrize("key, speaker, said, human, gpt", [
    ("conversations", "from", "value", "human", "gpt"),
    ("messages", "role", "content", "user", "assistant"),
    ("conversations", "from", "value", "User", "Assistant")])
def test_each_turn_of_a_conversation_is_a_record(
        tmp_path: Path, key: str, speaker: str, said: str, human: str, gpt: str) -> None:
    image(tmp_path / "1.jpg")
    turns = [{speaker: "system", said: "You are."}]
    for i, box in enumerate(BOXES):
        tag = "<image>\n" if i == 0 else ""
        turns += [{speaker: human, said: f"{tag}Locate ship {i}"}, {speaker: gpt, said: box}]
    turns[3:3] = [{speaker: human, said: "What is this?"}, {speaker: gpt, said: "A harbour."}]
    row = {"image": "1.jpg", key: turns}
    lines(tmp_path / "test.jsonl", row, row | {"id": "a"}, row | {key: turns[:3]})
    records = load("jsonl", tmp_path, "test")
    boxes = [(10, 5, 50, 25), (1, 2, 30, 40), (3, 4, 60, 50)]
    assert [(r.text, r.box) for r in records[:3]] == [(f"ship {i}", boxes[i]) for i in range(3)]
    assert [r.id for r in records] == [
        "test-1", "test-1-3", "test-1-4", "a", "a-3", "a-4", "test-3"]
    assert records.refusals == {"no box": 2}


def test_turns_after_an_image_in_the_first_request_and_of_parts(tmp_path: Path) -> None:
    image(tmp_path / "1.jpg")
    first = chat("Picture 1: <img>1.jpg</img>\nLocate <ref>the ship</ref>",
                 "<box>(100,100),(500,500)</box>", image=None)
    second = chat("<ref>the boat</ref>", "<box>(100,200),(500,400)</box>")
    first["conversations"] += second["conversations"]
    parts = [{"type": "image"}, {"type": "text", "text": "Locate the pier"}]
    lines(tmp_path / "test.jsonl", first, chat(parts, [{"type": "text", "text": BOXES[0]}]),
          own("1.jpg", "once") | {"conversations": first["conversations"]},
          {"image": "1.jpg", "conversations": [{"from": "human", "value": "Locate a"}]})
    records = load("jsonl", tmp_path, "test")
    assert [(r.text, r.box[:2]) for r in records] == [
        ("the ship", (10, 5)), ("the boat", (10, 10)), ("the pier", (10, 5)), ("once", (1, 2))]
    assert sum(records.refusals.values()) == 1


@pytest.mark.parametrize("request_text, expression", [
    ("Locate {}, output its bbox coordinates using JSON format.", "the white ship"),
    ("Locate {}, output its bbox coordinates using JSON format.", "the car, left of the bus"),
    ("Detect {}, report the bbox coordinates in JSON format", "the person who acts bravely"),
    ("Find {} in this image, then output the bounding box.", "a ship"),
    ("Please locate {}: return its bounding box as JSON.", "a ship"),
    ("Locate {}\nOutput its bbox coordinates in JSON.", "a ship"),
    ("Outline the position of {}, output all the coordinates in JSON format.", "each small cake"),
    ("Outline the position of {} and output all the coordinates in JSON format.", "each cake"),
    ("locate {}， output its bbox coordinates using JSON format.", "a ship"),
    ("Find {}", "the sign, give way"), ("Locate {}", "the tall one, report centre")])
def test_qwens_own_request_is_stripped_to_its_expression(
        tmp_path: Path, request_text: str, expression: str) -> None:
    image(tmp_path / "1.jpg")
    lines(tmp_path / "test.jsonl", chat("<image>" + request_text.format(expression), BOXES[0]))
    [record] = load("jsonl", tmp_path, "test")
    # "Find X" alone is no request that is known.
    assert record.text in (expression, f"Find {expression}")
    assert "JSON" not in record.text
