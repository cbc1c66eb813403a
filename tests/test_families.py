"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: the hub's shapes, the stages on each family's tiny
checkpoint, their coordinates. (Their numbers are compared with transformers' in test_model.py
and test_generate.py, their prompts and pixels in test_data.py.)"""
import functools
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import data
import eval as evaluation
import rft
import sft
from conftest import Run, write_tiny
from model import Config, QwenVL
from qwen.answer import format_box, locate, parse_box, write
from qwen.hub import FAMILIES
from qwen.processor import Processor
from test_model import IMAGE, PROMPTS, prompt, random_checkpoint, theirs_of
from train import checkpoints

# ---------------------------------------------------------------- the hub's shapes

# What a family's config.json says at all sizes, where it matters.
IDS = {
    "image_token_id": 151655, "video_token_id": 151656, "vision_start_token_id": 151652,
    "vision_end_token_id": 151653}
FLAT = {
    **IDS, "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1e6, "eos_token_id": 151645,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "use_sliding_window": False, "sliding_window": 32768, "max_window_layers": 28}
QWEN2_VISION = {
    "depth": 32, "embed_dim": 1280, "mlp_ratio": 4, "num_heads": 16, "in_chans": 3,
    "patch_size": 14, "spatial_merge_size": 2, "spatial_patch_size": 14,
    "temporal_patch_size": 2}
QWEN25_VISION = {
    "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16,
    "in_chans": 3, "patch_size": 14, "spatial_merge_size": 2, "spatial_patch_size": 14,
    "temporal_patch_size": 2, "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31],
    "hidden_act": "silu", "tokens_per_second": 2}
QWEN3_TEXT = {
    "model_type": "qwen3_vl_text", "attention_bias": False, "attention_dropout": 0.0,
    "head_dim": 128, "hidden_act": "silu", "eos_token_id": 151645, "rms_norm_eps": 1e-6,
    "rope_theta": 5_000_000, "vocab_size": 151936, "num_key_value_heads": 8,
    "rope_scaling": {
        "mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"}}
QWEN3_VISION = {
    "model_type": "qwen3_vl", "hidden_act": "gelu_pytorch_tanh", "in_channels": 3,
    "num_heads": 16, "num_position_embeddings": 2304, "patch_size": 16,
    "spatial_merge_size": 2, "temporal_patch_size": 2}
SMALL_TOWER = {
    "depth": 24, "hidden_size": 1024, "intermediate_size": 4096,
    "deepstack_visual_indexes": [5, 11, 17]}
LARGE_TOWER = {
    "depth": 27, "hidden_size": 1152, "intermediate_size": 4304,
    "deepstack_visual_indexes": [8, 16, 24]}

# Family, layers, width, heads, key-value heads, width within the MLP, vocabulary, tied.
SIZES = {
    "Qwen2-VL-2B": ("Qwen2-VL", 28, 1536, 12, 2, 8960, 151936, True),
    "Qwen2-VL-7B": ("Qwen2-VL", 28, 3584, 28, 4, 18944, 152064, False),
    "Qwen2.5-VL-3B": ("Qwen2.5-VL", 36, 2048, 16, 2, 11008, 151936, True),
    "Qwen2.5-VL-7B": ("Qwen2.5-VL", 28, 3584, 28, 4, 18944, 152064, False),
    "Qwen2.5-VL-32B": ("Qwen2.5-VL", 64, 5120, 40, 8, 27648, 152064, False),
    "Qwen3-VL-2B": ("Qwen3-VL", 28, 2048, 16, 8, 6144, 151936, True),
    "Qwen3-VL-4B": ("Qwen3-VL", 36, 2560, 32, 8, 9728, 151936, True),
    "Qwen3-VL-8B": ("Qwen3-VL", 36, 4096, 32, 8, 12288, 151936, False),
    "Qwen3-VL-32B": ("Qwen3-VL", 64, 5120, 64, 8, 25600, 151936, False)}


def hub_config(name: str) -> dict[str, Any]:
    """config.json of one of SIZES as the hub has it."""
    family, layers, width, heads, kv_heads, inner, vocab, tied = SIZES[name]
    [model_type] = [key for key, value in FAMILIES.items() if value == family]
    sizes = {
        "num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "intermediate_size": inner, "vocab_size": vocab}
    whole = {"model_type": model_type, "tie_word_embeddings": tied, "torch_dtype": "bfloat16"}
    if family == "Qwen3-VL":
        tower = SMALL_TOWER if width < 4096 else LARGE_TOWER
        vision = {**QWEN3_VISION, **tower, "out_hidden_size": width}
        text = {**QWEN3_TEXT, **sizes, "tie_word_embeddings": tied}
        return {**whole, **IDS, "text_config": text, "vision_config": vision}
    if family == "Qwen2-VL":
        return {**whole, **FLAT, **sizes, "vision_config": {**QWEN2_VISION, "hidden_size": width}}
    vision = {**QWEN25_VISION, "out_hidden_size": width}
    if name == "Qwen2.5-VL-32B":
        vision["intermediate_size"] = 3456
    return {**whole, **FLAT, **sizes, "vision_config": vision}


def nested_name(name: str) -> str:
    """A parameter's name as transformers' modules have it, where both parts lie in "model."."""
    if name.startswith("visual."):
        return f"model.{name}"
    return name.replace("model.", "model.language_model.", 1)


@pytest.mark.parametrize("name", SIZES)
def test_shapes_of_the_hub_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    family = SIZES[name][0]
    raw = hub_config(name)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    config = Config.from_json(tmp_path / "config.json")
    # One layer of the language model, and of the tower: the others are like it. Deepstack's
    # mergers stay.
    theirs_config = theirs_of(family, "Config").from_dict(raw)
    with torch.device("meta"):
        ours = QwenVL(config).state_dict()
        theirs = theirs_of(family, "ForConditionalGeneration")(theirs_config).state_dict()
    shapes = {nested_name(key): tuple(p.shape) for key, p in ours.items()}
    assert shapes == {key: tuple(p.shape) for key, p in theirs.items()}
    assert config.tied == SIZES[name][-1] and config.head_dim == 128


def test_a_head_width_that_is_not_told_is_transformers(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    raw = hub_config("Qwen3-VL-4B")
    del raw["text_config"]["head_dim"]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    theirs = theirs_of("Qwen3-VL", "Config").from_dict(raw)
    assert Config.from_json(tmp_path / "config.json").head_dim == theirs.text_config.head_dim


# ---------------------------------------------------------------- what a family alone has

def test_qwen3s_deepstack_may_reach_the_last_layer(tmp_path: Path) -> None:
    """As many layers as features, and then fewer: what skips rows waits for the sum."""
    for layers in (2, 1):
        theirs = random_checkpoint(
            tmp_path / str(layers), family="Qwen3-VL", num_hidden_layers=layers)
        model = QwenVL.from_pretrained(tmp_path / str(layers), dtype=torch.float32)
        p = PROMPTS[1]
        ids = p.input_ids[None]
        with torch.no_grad():
            want = theirs(
                input_ids=ids, pixel_values=p.pixel_values, image_grid_thw=p.image_grid_thw,
                mm_token_type_ids=(ids == IMAGE).int()).logits[0]
            got = model(ids, None, p.pixel_values, p.image_grid_thw)[0]
            logits, _, _ = model.prefill([p], 2, 4)
        assert torch.allclose(got, want, atol=1e-4)
        assert torch.allclose(logits[0], want[-1], atol=1e-4)


def test_a_video_for_qwen3_is_refused(tmp_path: Path) -> None:
    random_checkpoint(tmp_path, family="Qwen3-VL")
    model = QwenVL.from_pretrained(tmp_path, dtype=torch.float32)
    with pytest.raises(ValueError, match="a video"):
        model.score([prompt([(2, 4, 4)], [5, 6])], [[torch.tensor([17])]])
    with pytest.raises(ValueError, match="a video"):
        model(torch.tensor([[5, 291, 6]]))


def test_coordinates_survive_text_and_back_within_their_rounding(tiny_family: Path) -> None:
    """A box written as the model is taught to write it, and read as an answer."""
    processor = Processor.from_pretrained(tiny_family)
    unit = processor.patch * processor.merge
    for record in data.load("synth-small", None, "val")[:40]:
        frame = processor(data.open_image(record), record.text).frame
        answer = write("why", format_box(record.box, frame))
        back = locate(parse_box(answer), frame)
        width, height = frame.original
        if processor.family == "qwen2_5_vl":
            assert frame.extent == frame.resized and frame.resized[0] % unit == 0
        else:
            assert frame.extent == (1000, 1000)
        # Half a unit of the model's frame, in pixels of the image.
        across = width / frame.extent[0] / 2 + 1e-6
        down = height / frame.extent[1] / 2 + 1e-6
        for a, b, rounding in zip(back, record.box, (across, down, across, down)):
            assert abs(a - b) <= rounding


# ---------------------------------------------------------------- every stage

SHORT = ("--val", 1, "--every", 100, "--max-new-tokens", 60, "--device", "cpu")
SFT = ("--steps", 2, "--batch", 4, "--lr", 1e-3, *SHORT)
# Enough for answers with a box, so that rewards differ.
TAUGHT = ("--steps", 60, "--batch", 8, "--lr", 5e-3, "--answer-only", *SHORT)
RFT = ("--steps", 2, "--prompts", 4, "--group", 4, "--lr", 1e-4, "--beta", 0.04, *SHORT)
SYNTH = ("--data", "synth")
# A small split of the embedded data, for it takes seconds to make a large one.
SMALL = ("--split", "val")


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """stage(module, out, more flags) runs a stage in this process -> out."""
    small = functools.cache(lambda: data.read_synth(None, "val"))
    monkeypatch.setitem(data.READERS, "synth", lambda root, split: small())

    def stage(module: ModuleType, out: Path, *flags: object) -> Path:
        argv = [module.__file__, *flags, "--out", out]
        monkeypatch.setattr(sys, "argv", list(map(str, argv)))
        module.main()
        return out
    return stage


@pytest.fixture
def in_two(run: Run) -> Callable[..., Path]:
    """in_two(module, out, more flags) runs a stage in two processes -> out."""
    def in_two(module: ModuleType, out: Path, *flags: object) -> Path:
        done = run(Path(module.__file__).name, *flags, "--out", out, processes=2)
        assert done.returncode == 0, done.stderr
        return out
    return in_two


def log_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def assert_same_run(one: Path, two: Path, names: tuple[str, ...]) -> None:
    """Two runs of a stage agree to rounding, in their logs and in their weights."""
    for a, b in zip(log_of(one), log_of(two), strict=True):
        for name in names:
            assert math.isclose(a[name], b[name], rel_tol=1e-3, abs_tol=1e-5), name
    weights = load_file(one / "latest" / "model.safetensors")
    others = load_file(two / "latest" / "model.safetensors")
    assert weights.keys() == others.keys()
    for name in weights:
        assert (weights[name] - others[name]).abs().max() < 1e-3, name


# The stages of Qwen2.5-VL, which is the tests' default, are run in test_sft.py, test_rft.py
# and test_eval.py.
@pytest.mark.parametrize("family", ["Qwen2-VL", "Qwen3-VL"])
def test_stages_run_on_both_kinds_of_data_in_one_process_and_in_two(
        family: str, stage: Callable, in_two: Callable, dior_root: Path, tmp_path: Path) -> None:
    dior = ("--data", "dior", "--root", dior_root)
    tiny = tmp_path / "tiny"
    tiny.mkdir()
    init = ("--init", write_tiny(tiny, family))
    # One process recomputes activations in the backward pass, which changes nothing.
    one = stage(sft, tmp_path / "sft", *init, *SFT, *SYNTH, *SMALL, "--gradient-checkpointing")
    two = in_two(sft, tmp_path / "sft_in_two", *init, *SFT, *SYNTH, *SMALL)
    assert_same_run(one, two, ("loss", "grad_norm"))

    init = ("--init", stage(sft, tmp_path / "ckpt" / "sft", *init, *TAUGHT, *dior))
    one = stage(rft, tmp_path / "ckpt" / "rft", *init, *RFT, *dior)
    two = in_two(rft, tmp_path / "rft_in_two", *init, *RFT, *dior)
    assert_same_run(one, two, ("reward", "iou", "entropy", "grad_norm"))
    first = log_of(one)[0]
    assert first["sampled_scored_max"] < 1e-4 and first["grad_norm"] > 0 and first["reward"] > 0
    stage(rft, tmp_path / "rft_synth", *init, *RFT, *SYNTH)

    asked = (tmp_path / "ckpt", "--limit", 2, "--max-new-tokens", 6, "--device", "cpu")
    for name, records in (("dior", dior), ("synth", SYNTH)):
        out = stage(evaluation, tmp_path / name, *asked, *records)
        rows = json.loads((out / "eval.json").read_text())["rows"]
        assert [row["stage"] for row in rows] == ["sft", "rft"]
    in_two(evaluation, tmp_path / "dior_in_two", *asked, *dior)
    for name in ("eval.json", "predictions_rft.jsonl"):
        alone = (tmp_path / "dior" / name).read_bytes()
        assert alone == (tmp_path / "dior_in_two" / name).read_bytes()


def test_what_training_saves_loads_in_transformers(
        tiny_family: Path, stage: Callable, dior_root: Path, tmp_path: Path) -> None:
    """config.json, weights and processor files of a step, as they were given."""
    transformers = pytest.importorskip("transformers")
    flags = ("--init", tiny_family, *SFT, "--data", "dior", "--root", dior_root)
    latest = stage(sft, tmp_path / "sft", *flags) / "latest"
    theirs = transformers.AutoModelForImageTextToText.from_pretrained(
        latest, dtype=torch.float32).eval()
    model, processor = checkpoints.open_model(latest, torch.device("cpu"))
    record = data.load("dior", dior_root, "val")[0]
    p = processor(data.open_image(record), record.text)
    ids = p.input_ids[None]
    with torch.no_grad():
        want = theirs(
            input_ids=ids, pixel_values=p.pixel_values, image_grid_thw=p.image_grid_thw,
            mm_token_type_ids=(ids == model.config.image_id).int()).logits
        got = model(ids, None, p.pixel_values, p.image_grid_thw)
    assert torch.allclose(got, want, atol=1e-4)
