"""model.py on config.json, weights and folders as other programs leave them."""
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import eval as evaluation
from model import QwenVL
from qwen import hub
from qwen.hub import CheckpointError, Config, by_number, folder, newest_step
from test_model import random_checkpoint, theirs_of


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random checkpoint as transformers 5 writes it: nested config.json."""
    path = tmp_path_factory.mktemp("checkpoint")
    random_checkpoint(path)
    return path


# ---------------------------------------------------------------- config.json

# Fields that change nothing here: about a random start, about positions and ids that text
# generation elsewhere asks for, about windows (which are refused), about a video's frames in
# time, about what transformers returns.
HARMLESS = {
    "initializer_range", "max_position_embeddings", "max_window_layers", "sliding_window",
    "use_cache", "bos_token_id", "pad_token_id", "tokens_per_second", "_name_or_path",
    "architectures", "chunk_size_feed_forward", "dtype", "id2label", "is_encoder_decoder",
    "label2id", "output_attentions", "output_hidden_states", "problem_type", "return_dict",
    "transformers_version"}


class Watched(dict):
    """An object of config.json that remembers which of its fields were read."""

    def __init__(self, content: dict[str, Any]) -> None:
        super().__init__(content)
        self.read: set[str] = set()
        for name, value in content.items():
            if isinstance(value, dict):
                self[name] = Watched(value)

    def __getitem__(self, name: str) -> Any:
        self.read.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self.read.add(name)
        return super().get(name, default)


@pytest.mark.parametrize("family", hub.FAMILIES.values())
def test_every_field_of_transformers_config_is_decided(
        tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is read, refused for other values, or listed as one that changes nothing."""
    random_checkpoint(tmp_path, family=family)
    theirs = theirs_of(family, "Config")().to_dict()
    whole = Watched(json.loads((tmp_path / "config.json").read_text()))
    monkeypatch.setattr(hub, "read_json_object", lambda path: whole)
    Config.from_json("config.json")
    for part, read in (
            (theirs, whole), (theirs["text_config"], whole["text_config"]),
            (theirs["vision_config"], whole["vision_config"])):
        assert part.keys() - read.read - HARMLESS <= {"model_type"}
        assert not HARMLESS & read.read


def at(config: dict[str, Any], path: str) -> tuple[dict[str, Any], str]:
    """"vision_config.hidden_act" -> the object that has the field, and its name."""
    *parts, name = path.split(".")
    for part in parts:
        config = config.setdefault(part, {})
    return config, name


@pytest.mark.parametrize("family, field, value", [
    ("Qwen2-VL", "vision_config.hidden_act", "silu"),
    ("Qwen2-VL", "text_config.attention_bias", False),
    ("Qwen2-VL", "text_config.use_sliding_window", True),
    ("Qwen3-VL", "vision_config.hidden_act", "quick_gelu"),
    ("Qwen3-VL", "text_config.rope_parameters.mrope_interleaved", False),
    ("Qwen3-VL", "text_config.rope_parameters.rope_type", "yarn"),
    ("Qwen3-VL", "quantization_config", {"quant_method": "fp8"})])
def test_each_family_has_its_own_values(
        tmp_path: Path, family: str, field: str, value: Any) -> None:
    random_checkpoint(tmp_path, family=family)
    file = tmp_path / "config.json"
    Config.from_json(file)
    config = json.loads(file.read_text())
    part, name = at(config, field)
    part[name] = value
    file.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=rf"{name} is .*but this code computes"):
        Config.from_json(file)


@pytest.mark.parametrize("family", hub.FAMILIES.values())
def test_defaults_are_those_of_transformers(tmp_path: Path, family: str) -> None:
    random_checkpoint(tmp_path, family=family)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    del config["text_config"]["rms_norm_eps"]
    del config["text_config"]["rope_parameters"]["rope_theta"]
    file.write_text(json.dumps(config))
    got = Config.from_json(file)
    want = theirs_of(family, "Config").from_pretrained(tmp_path).text_config
    assert (got.eps, got.rope_theta) == (want.rms_norm_eps, want.rope_parameters["rope_theta"])


YARN = {"type": "yarn", "factor": 4.0, "mrope_section": [2, 3, 3]}
REFUSED = [
    ("text_config.rope_parameters.rope_type", "yarn"),
    ("text_config.rope_parameters.rope_type", "dynamic"),
    ("text_config.rope_parameters.rope_type", "linear"),
    ("text_config.rope_parameters.type", "longrope"),
    ("text_config.rope_parameters.partial_rotary_factor", 0.5),
    ("text_config.rope_parameters.mrope_interleaved", True),
    ("text_config.rope_scaling", YARN),
    ("text_config.partial_rotary_factor", 0.25),
    ("text_config.use_sliding_window", True),
    ("text_config.layer_types", ["full_attention", "sliding_attention"]),
    ("text_config.hidden_act", "gelu"),
    ("text_config.attention_bias", False),
    ("text_config.mlp_bias", True),
    ("text_config.attention_dropout", 0.1),
    ("text_config.quantization_config", {"quant_method": "gptq"}),
    ("quantization_config", {"quant_method": "bitsandbytes", "load_in_4bit": True}),
    ("vision_config.hidden_act", "quick_gelu"),
    ("vision_config.hidden_act", ["silu"]),
    ("vision_config.rope_parameters.rope_theta", 500.0),
    ("vision_config.rope_parameters.rope_type", "yarn")]


@pytest.mark.parametrize("field, value", REFUSED, ids=[f"{f}={v}"[:60] for f, v in REFUSED])
def test_what_is_not_computed_is_refused_by_name(
        checkpoint: Path, tmp_path: Path, field: str, value: Any) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    part, name = at(config, field)
    part[name] = value
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config))
    named = "type" if value is YARN else name
    words = rf"config.json: .*\b{named} .*but this code computes"
    with pytest.raises(CheckpointError, match=words):
        Config.from_json(file)
    # Flat, as the hub has it.
    text = config.pop("text_config")
    text.pop("model_type")
    file.write_text(json.dumps({**text, **config}))
    words = rf"config.json: .*\b{named} .*but this code computes"
    with pytest.raises(CheckpointError, match=words):
        Config.from_json(file)


@pytest.mark.parametrize("field, value", [
    ("text_config.rope_parameters.type", "mrope"), ("text_config.hidden_act", "swish"),
    ("text_config.use_sliding_window", None), ("text_config.sliding_window", 32768),
    ("text_config.max_window_layers", 1), ("text_config.attention_bias", True),
    ("text_config.attention_dropout", 0), ("text_config.max_position_embeddings", 128000),
    ("quantization_config", None), ("unsloth_fixed", True), ("torch_dtype", "float16"),
    ("vision_config.tokens_per_second", 2), ("use_cache", False)])
def test_what_changes_nothing_is_read(
        checkpoint: Path, tmp_path: Path, field: str, value: Any) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    part, name = at(config, field)
    part[name] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    got = Config.from_json(tmp_path / "config.json")
    assert got == Config.from_json(checkpoint / "config.json")


@pytest.mark.parametrize("changes", [
    {"rope_scaling": {"type": "mrope", "mrope_section": [3, 3, 2], "rope_theta": 500.0}},
    {"rms_norm_eps": None},
    {"tie_word_embeddings": True}])
def test_two_spellings_and_none_read_as_in_transformers(
        checkpoint: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    """None: the field is not there."""
    transformers = pytest.importorskip("transformers")
    config = json.loads((checkpoint / "config.json").read_text())
    for name, value in changes.items():
        config["text_config"].pop(name, None)
        if value is not None:
            config["text_config"][name] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    got = Config.from_json(tmp_path / "config.json")
    want = transformers.Qwen2_5_VLConfig.from_pretrained(tmp_path)
    rope = want.text_config.rope_parameters
    assert got.mrope_section == tuple(rope["mrope_section"])
    assert got.rope_theta == rope["rope_theta"]
    assert got.eps == want.text_config.rms_norm_eps
    assert got.tied == want.tie_word_embeddings


WRONG = [
    ("text_config", [{"hidden_size": 64}], "config.json of a Qwen2.5-VL"),
    ("text_config", "none", "config.json of a Qwen2.5-VL"),
    ("vision_config", [1], "config.json of a Qwen2.5-VL"),
    ("text_config.rope_parameters", "default", "config.json of a Qwen2.5-VL"),
    ("text_config.hidden_size", "64", "config.json of a Qwen2.5-VL"),
    ("text_config.hidden_size", 64.0, "no model has these sizes"),
    ("text_config.num_hidden_layers", True, "not expected"),
    ("text_config.num_attention_heads", 0, "config.json of a Qwen2.5-VL"),
    ("text_config.num_key_value_heads", 3, "but config.json asks for"),
    ("text_config.vocab_size", -5, "no model has these sizes"),
    ("text_config.rope_parameters.mrope_section", "233", "config.json of a Qwen2.5-VL"),
    ("text_config.rope_parameters.mrope_section", [2, 3, 4], "is not half of head_dim 16"),
    ("text_config.layer_types", 3, "config.json of a Qwen2.5-VL"),
    ("vision_config.patch_size", [14, 14], "no model has these sizes"),
    ("vision_config.fullatt_block_indexes", 7, "config.json of a Qwen2.5-VL"),
    ("vision_config.out_hidden_size", 32, "but config.json asks for")]


@pytest.mark.parametrize("field, value, words", WRONG, ids=[f"{f}={v}"[:50] for f, v, _ in WRONG])
def test_a_field_that_makes_no_such_model_is_one_line(
        checkpoint: Path, tmp_path: Path, field: str, value: Any, words: str) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    part, name = at(config, field)
    part[name] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(checkpoint / "model.safetensors")
    with pytest.raises(CheckpointError, match=words) as error:
        QwenVL.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)


def test_an_adapter_next_to_whole_weights_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(CheckpointError, match="adapter_config.json is next to whole weights"):
        QwenVL.from_pretrained(tmp_path)


# ---------------------------------------------------------------- names of tensors

def in_transformers_5(name: str) -> str:
    """The hub's name of a tensor -> the one that transformers 5 has in memory."""
    if name.startswith("visual."):
        return f"model.{name}"
    return name.replace("model.", "model.language_model.", 1)


LAYOUTS = {
    "hub": lambda name: name,
    "transformers 5": in_transformers_5,
    "DDP": lambda name: f"module.{name}",
    "compiled": lambda name: f"_orig_mod.{in_transformers_5(name)}",
    "compiled layers": lambda name: name.replace("layers.0.", "layers.0._orig_mod."),
    "both": lambda name: f"module._orig_mod.{name}",
    "FSDP": lambda name: f"_fsdp_wrapped_module.{name}".replace(
        "layers.1.", "layers.1._fsdp_wrapped_module._checkpoint_wrapped_module."),
    "PEFT": lambda name: f"base_model.model.{name}",
    "PEFT, transformers 5": lambda name: f"base_model.model.{in_transformers_5(name)}",
    "Lightning": lambda name: f"model.{name}",
    "Lightning, transformers 5": lambda name: f"model.{in_transformers_5(name)}",
    "parts": lambda name: name if name.startswith("visual.") else f"language_model.{name}"}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_known_prefixes_are_read_and_the_hubs_names_are_saved(
        checkpoint: Path, tmp_path: Path, layout: str) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    hub_names = {hub.own_name(name) for name in tensors}
    want = QwenVL.from_pretrained(checkpoint, dtype=None)
    renamed = {LAYOUTS[layout](hub.own_name(name)): x for name, x in tensors.items()}
    shutil.copyfile(checkpoint / "config.json", tmp_path / "config.json")
    save_file(renamed, tmp_path / "model.safetensors")
    got = QwenVL.from_pretrained(tmp_path, dtype=None)
    for name, x in want.state_dict().items():
        assert torch.equal(got.state_dict()[name], x)
    got.save_pretrained(tmp_path / "saved")
    assert load_file(tmp_path / "saved" / "model.safetensors").keys() == hub_names


def test_unknown_prefixes_are_named_with_what_is_expected(
        checkpoint: Path, tmp_path: Path) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    shutil.copyfile(checkpoint / "config.json", tmp_path / "config.json")
    save_file({f"policy.{name}": x for name, x in tensors.items()}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="named like policy.lm_head.weight, but lm_head"):
        QwenVL.from_pretrained(tmp_path)
    name = "visual.merger.ln_q.weight"
    save_file({**tensors, f"module.{name}": tensors[name].clone()}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="are one tensor under two names"):
        QwenVL.from_pretrained(tmp_path)
    adapter = {f"base_model.model.{name}": x for name, x in tensors.items()}
    adapter["base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"] = torch.ones(2, 64)
    save_file(adapter, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="1 tensors are not expected: base_model.*lora_A"):
        QwenVL.from_pretrained(tmp_path)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.bool])
def test_quantized_tensors_are_refused_by_name(
        checkpoint: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    name = next(name for name in tensors if name.endswith("layers.1.mlp.up_proj.weight"))
    tensors[name] = tensors[name].to(dtype)
    shutil.copyfile(checkpoint / "config.json", tmp_path / "config.json")
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="up_proj.weight is stored as .* no quantized"):
        QwenVL.from_pretrained(tmp_path, dtype=None)


# ---------------------------------------------------------------- folders

def test_names_are_ordered_as_numbers() -> None:
    names = ["checkpoint-500", "step_1000000", "checkpoint-1500", "seed10", "seed2", "step_999999",
             "checkpoint-best", "rft"]
    assert sorted(names, key=by_number) == [
        "checkpoint-500", "checkpoint-1500", "checkpoint-best", "rft", "seed2", "seed10",
        "step_999999", "step_1000000"]


def test_the_newest_checkpoint_of_another_program_is_found(tmp_path: Path) -> None:
    out = tmp_path / "trl"
    for step in (500, 1500, 1000):
        (out / f"checkpoint-{step}").mkdir(parents=True)
        (out / f"checkpoint-{step}" / "config.json").write_text("{}")
    # Broken off, and none at all.
    (out / "checkpoint-2000").mkdir()
    (out / "checkpoint-best").mkdir()
    (out / "checkpoint-best" / "config.json").write_text("{}")
    assert newest_step(out) == folder(out) == out / "checkpoint-1500"
    # eval shows all of a folder, and the newest of a stage in it.
    assert [stage.name for stage in evaluation.find_stages(out)] == [
        "checkpoint-500", "checkpoint-1000", "checkpoint-1500", "checkpoint-best"]
    [stage] = evaluation.find_stages(tmp_path)
    assert stage[:2] == ("trl", out / "checkpoint-1500")
    # A model of the folder's own comes first.
    (out / "config.json").write_text("{}")
    assert newest_step(out) == folder(out) == out
