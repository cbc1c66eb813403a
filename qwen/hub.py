"""qwen.hub."""
from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open
from torch import Tensor

# Elements of a tensor that are on the host at a time.
PIECE = 2 ** 20
# What safetensors calls the types of numbers.
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
# Lists the files of a checkpoint with their hashes.
MANIFEST = "manifest.json"


# ---------------------------------------------------------------- safetensors

def write_tensors(
        file: Path, shapes: Mapping[str, Sequence[int]], dtype: torch.dtype,
        tensors: Iterator[Tensor], metadata: Mapping[str, str],
) -> None:
    """Writes a safetensors file, byte for byte that of safetensors' own save_file.

    shapes: of each name. tensors: gives one for each name, by sorted name, on any device
    and in any type; each may be made when it is asked for, and is written as dtype. The
    header is known from the shapes, so that no more than a piece of a tensor is copied to
    the host.
    """
    names = sorted(shapes)
    with open(file, "wb") as stream:
        stream.write(tensors_header(names, shapes, dtype, metadata))
        for name in names:
            tensor = next(tensors)
            if tuple(tensor.shape) != tuple(shapes[name]):
                raise ValueError(f"{name} is {tuple(tensor.shape)}, not {tuple(shapes[name])}")
            write_tensor(stream, tensor, dtype)
        sync_stream(stream)


def tensors_header(
        names: Sequence[str], shapes: Mapping[str, Sequence[int]], dtype: torch.dtype,
        metadata: Mapping[str, str],
) -> bytes:
    """A safetensors file's beginning: its own length in 8 bytes, then JSON padded to 8."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name in names:
        begin = end
        end += tensor_bytes(shapes[name], dtype)
        entries[name] = {
            "dtype": DTYPES[dtype], "shape": list(shapes[name]), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def tensor_bytes(shape: Sequence[int], dtype: torch.dtype) -> int:
    """Bytes of a tensor of this shape."""
    return torch.Size(shape).numel() * dtype.itemsize


def write_tensor(stream: BinaryIO, tensor: Tensor, dtype: torch.dtype) -> None:
    """Appends a tensor's numbers, a piece at a time."""
    for piece in tensor.detach().reshape(-1).split(PIECE):
        on_host = piece.to(dtype).cpu().contiguous()
        stream.write(on_host.view(torch.uint8).numpy())


# ---------------------------------------------------------------- to the disk

def sync_stream(stream: BinaryIO) -> None:
    """Forces what was written to an open file to the disk."""
    stream.flush()
    os.fsync(stream.fileno())


# The families, by config.json's `model_type`, and relatives that are other models.
FAMILIES = {"qwen2_vl": "Qwen2-VL", "qwen2_5_vl": "Qwen2.5-VL", "qwen3_vl": "Qwen3-VL"}
OTHER_MODELS = {
    "qwen3_vl_moe": "Qwen3-VL-MoE", "qwen3_5": "Qwen3.5", "qwen3_5_moe": "Qwen3.5-MoE",
    "qwen2_5_omni": "Qwen2.5-Omni", "qwen3_omni_moe": "Qwen3-Omni"}
# The parts of the model as they are named here and in most checkpoints, and as transformers'
# modules and Qwen3-VL's checkpoints name them.
PARTS = {"model.": "model.language_model.", "visual.": "model.visual."}
# Markers that only prompts hold, by their text in the tokenizer.
VISION_MARKERS = (
    "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")
STOP_TOKENS = ("<|im_end|>", "<|endoftext|>")
# What a folder of an adapter has in place of config.json, as PEFT names it.
ADAPTER_CONFIG = "adapter_config.json"
# Where weights lie in several files, this one names them.
WEIGHT_INDEX = "model.safetensors.index.json"


class CheckpointError(Exception):
    """Weights that are missing or do not fit; one line: what is wrong, where, what to do."""


# What reading a file of another form may raise. (ArithmeticError and RecursionError: numbers
# of any size, and lists in lists.)
UNREADABLE = (
    OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError)


# ----------------------------------------------------------------------------- configuration

# The fields of config.json, each behind the object that it stands in, and the values that this
# code computes (null and absent always are). transformers computes otherwise for others, so these
# are refused by name; an empty tuple is a field that is refused whatever it holds.
COMPUTED: dict[str, tuple[Any, ...]] = {
    "quantization_config": (),
    "compression_config": (),
    "text_config.quantization_config": (),
    "text_config.hidden_act": ("silu", "swish"),
    "text_config.attention_bias": (True,),
    "text_config.attention_dropout": (0,),
    "text_config.mlp_bias": (False,),
    "text_config.use_sliding_window": (False,),
    "text_config.partial_rotary_factor": (1,),
    "rope_scaling.rope_type": ("default", "mrope"),
    "rope_scaling.type": ("default", "mrope"),
    "rope_scaling.partial_rotary_factor": (1,),
    "rope_scaling.mrope_interleaved": (False,),
    "vision_config.quantization_config": (),
    "vision_config.hidden_act": ("silu", "swish"),
    "vision_config.rope_parameters.rope_type": ("axial", "default"),
    "vision_config.rope_parameters.type": ("axial", "default"),
    "vision_config.rope_parameters.rope_theta": (10000,),
    "vision_config.rope_parameters.partial_rotary_factor": (1,)}
# Where Qwen2-VL and Qwen3-VL differ from that.
COMPUTED_BY = {
    "Qwen2-VL": {"vision_config.hidden_act": ("quick_gelu",)},
    "Qwen3-VL": {
        "text_config.attention_bias": (False, True),
        "rope_scaling.mrope_interleaved": (True,),
        "vision_config.hidden_act": ("gelu_pytorch_tanh", "gelu_new")}}
# Fields that change nothing here: they speak of a random start, of positions and ids that text
# generation elsewhere asks for, of windows that are refused above, of a video's frames in time,
# of what transformers returns. All others are read by `Config.from_dicts`, or unknown to
# transformers as well.
HARMLESS = frozenset((
    "initializer_range", "max_position_embeddings", "max_window_layers", "sliding_window",
    "use_cache", "bos_token_id", "pad_token_id", "tokens_per_second", "_name_or_path",
    "architectures", "chunk_size_feed_forward", "dtype", "id2label", "is_encoder_decoder",
    "label2id", "output_attentions", "output_hidden_states", "problem_type", "return_dict",
    "transformers_version"))


def read_config(path: str | Path) -> dict[str, Any]:
    """config.json as it stands; CheckpointError where it is not that of one of FAMILIES."""
    try:
        raw = json.loads(Path(path).read_text(encoding="utf-8"))
    except UNREADABLE as error:
        raise CheckpointError(f"{path}: not a readable config.json ({error})") from None
    if not isinstance(raw, dict):
        raise CheckpointError(
            f"{path}: not a JSON object; is this the config.json of a Qwen-VL checkpoint?")
    model_type = raw.get("model_type")
    if model_type not in list(FAMILIES):
        name = OTHER_MODELS.get(str(model_type))
        raise CheckpointError(
            f"{path}: model_type is {model_type!r}{f' ({name})' if name else ''}; this code runs "
            f"dense checkpoints of {', '.join(FAMILIES.values())} ({', '.join(FAMILIES)})")
    return raw


def object_in(whole: dict[str, Any], name: str) -> dict[str, Any]:
    """The object under this name, {} where there is none; ValueError where it is something else."""
    part = whole.get(name) or {}
    if not isinstance(part, dict):
        raise ValueError(f"{name} is {short(part)}, not an object")
    return part


def short(value: Any) -> str:
    """A value of config.json as it stands there, cut to 60 characters."""
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def refuse_other_values(path: str | Path, raw: dict[str, Any], text: dict[str, Any]) -> None:
    """CheckpointError for a field of config.json whose value is not among COMPUTED.

    raw: the whole of config.json; text: its part on the language model, or the whole."""
    vision = object_in(raw, "vision_config")
    parts = [
        ("", "", raw),
        ("text_config", "" if text is raw else "text_config.", text),
        # Two names for one object.
        ("rope_scaling", "rope_scaling.", object_in(text, "rope_scaling")),
        ("rope_scaling", "rope_parameters.", object_in(text, "rope_parameters")),
        ("vision_config", "vision_config.", vision),
        ("vision_config.rope_parameters", "vision_config.rope_parameters.",
         object_in(vision, "rope_parameters"))]
    computed = COMPUTED | COMPUTED_BY.get(FAMILIES[raw["model_type"]], {})
    refused = []
    for field_name, values in computed.items():
        where, _, name = field_name.rpartition(".")
        for part, prefix, content in parts:
            value = content.get(name) if part == where else None
            if value is not None and value not in values:
                only = f"{json.dumps(values[0])} alone" if values else "nothing of the kind"
                refused.append((prefix + name, value, only))
    for kind in text.get("layer_types") or ():
        if kind != "full_attention":
            refused.append(("layer_types", kind, '"full_attention" alone'))
    if refused:
        name, value, only = refused[0]
        raise CheckpointError(
            f"{path}: {name} is {short(value)}, but this code computes {only}; take a checkpoint "
            "that does without it")


# --------------------------------------------------------------------- a checkpoint's files

def is_checkpoint(path: Path) -> bool:
    """Whether a folder holds a model's config.json, or an adapter's configuration."""
    return (path / "config.json").exists() or (path / ADAPTER_CONFIG).exists()


def newest_step(path: str | Path) -> Path:
    """A stage's folder -> its newest step; a checkpoint's folder, and any other path -> itself.

    Other programs' stages hold checkpoint-500, checkpoint-1500, and name none the latest."""
    path = Path(path)
    if is_checkpoint(path):
        return path
    if (path / "latest").exists():
        return path / "latest"
    steps = [p for p in path.glob("checkpoint-*") if re.fullmatch("[0-9]+", p.name[11:])]
    return max(filter(is_checkpoint, steps), key=by_number, default=path)


def by_number(path: str | Path) -> list[str | int]:
    """The key that sorts names by the numbers in them: checkpoint-500 before checkpoint-1500."""
    parts = re.split("([0-9]+)", Path(path).name)
    return [int(part) if i % 2 else part for i, part in enumerate(parts)]


def base_folder(path: Path) -> Path:
    """A checkpoint's folder -> itself; an adapter's -> that of the base which it names.

    CheckpointError where no base is there, or whole weights lie beside the adapter: which of
    them were meant is not known."""
    file = path / ADAPTER_CONFIG
    if not file.exists():
        return path
    if any((path / name).exists() for name in ("model.safetensors", WEIGHT_INDEX)):
        raise CheckpointError(
            f"{path}: {ADAPTER_CONFIG} lies beside whole weights; merge the adapter into them, "
            "or move it to a folder of its own")
    name = str(read_adapter_config(file).get("base_model_name_or_path") or "")
    base = newest_step(name)
    if not name or not (base / "config.json").exists():
        raise CheckpointError(
            f"{file}: the base checkpoint {name!r} is not there; name its folder as "
            "base_model_name_or_path in that file")
    return base


def read_adapter_config(file: Path) -> dict[str, Any]:
    """adapter_config.json as it stands; CheckpointError where it is not a JSON object."""
    try:
        config = read_json(file)
    except UNREADABLE as error:
        raise CheckpointError(f"{file}: not readable ({error})") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{file}: not a JSON object; is this an adapter's configuration?")
    return config


def folder(path: str | Path) -> Path:
    """A checkpoint folder: the path itself, or the newest step of a stage's folder.

    CheckpointError where there is none."""
    path = Path(path)
    newest = newest_step(path)
    if not is_checkpoint(newest):
        raise CheckpointError(
            f"no checkpoint at {path}: neither {path / 'config.json'} nor "
            f"{path / 'latest' / 'config.json'} nor a folder checkpoint-N with one is there")
    return newest


def nested_name(name: str) -> str:
    """A parameter's or module's name here -> as transformers' modules have it."""
    for ours, theirs in PARTS.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name


# What programs put into a parameter's name that wrap modules: DDP, torch.compile, FSDP,
# gradient checkpointing, Lightning; and PEFT, before a whole model's names.
WRAPPERS = re.compile(
    r"^base_model\.model\.|(?:^|(?<=\.))(?:module|_orig_mod|_fsdp_wrapped_module"
    r"|_checkpoint_wrapped_module|_forward_module)\.")
# A model that holds the whole one in a field of its own calls it "model".
HOLDERS = re.compile(r"^(?:model\.)+(?=(?:model|language_model|visual|lm_head)\.)")


def own_name(stored_name: str) -> str:
    """A tensor's name in a checkpoint of any layout -> the hub's, which are ours.

    >>> own_name("model.language_model.norm.weight")        # as transformers 5 writes it
    'model.norm.weight'
    >>> own_name("module._orig_mod.model.visual.merger.ln_q.weight")
    'visual.merger.ln_q.weight'
    """
    name = HOLDERS.sub("", WRAPPERS.sub("", stored_name))
    if name.startswith("language_model."):
        name = name.removeprefix("language_model.").removeprefix("model.")
        return name if name.startswith("lm_head.") else f"model.{name}"
    return name


def refuse_other_names(path: Path, missing: Iterable[str], surplus: Sequence[str]) -> None:
    """CheckpointError where a missing tensor is there under a name that `own_name` doesn't know."""
    for name in sorted(missing):
        # A block's tensor is known by what follows its part of the model.
        tail = name.split(".", 1)[1] if name.count(".") > 2 else name
        found = [other for other in surplus if other.endswith(f".{tail}")]
        if found:
            raise CheckpointError(
                f"{path}: the tensors are named like {found[0]}, where {name} is expected; rename "
                "them")


def refuse(path: Path, what: str, names: Iterable[str]) -> None:
    """CheckpointError that counts these tensors and names the first three, where there are any."""
    names = sorted(names)
    if names:
        named = ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")
        raise CheckpointError(f"{path}: {len(names)} tensors are {what}: {named}")


def read_tensor(
        file: Path, stored: safe_open, name: str, expected: tuple[int, ...] | None,
        dtype: torch.dtype | None) -> Tensor:
    """One tensor of an open safetensors file in this dtype (None: its own).

    CheckpointError where its shape is not the expected one (None: any)."""
    part = stored.get_slice(name)
    shape = tuple(part.get_shape())
    if expected is not None and part.get_dtype() not in ("F64", "F32", "F16", "BF16"):
        raise CheckpointError(
            f"{file}: {name} is stored as {part.get_dtype()}; this code reads no quantized "
            "weights, take the checkpoint they were made from")
    if expected is not None and shape != expected:
        raise CheckpointError(f"{file}: {name} is {shape}, but config.json asks for {expected}")
    if not shape or dtype in (None, part[:0].dtype):
        return stored.get_tensor(name).to(dtype=dtype)
    # Converted some rows at a time, so that it never exists twice.
    tensor = torch.empty(shape, dtype=dtype)
    rows = max(1, 2 ** 22 * shape[0] // max(1, tensor.numel()))
    for i in range(0, shape[0], rows):
        tensor[i:i + rows] = part[i:i + rows]
    return tensor


def shard_index(names: Sequence[str], shards: Sequence[dict[str, Tensor]]) -> dict[str, str]:
    """Name of a tensor -> the file that has it."""
    weight_map = {}
    for name, shard in zip(names, shards):
        weight_map.update(dict.fromkeys(shard, name))
    return weight_map


def write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a checkpoint folder: one, or the shards that its index names."""
    index = path / WEIGHT_INDEX
    names = ["model.safetensors"]
    if not (path / names[0]).exists() and index.exists():
        try:
            content = json.loads(index.read_text(encoding="utf-8"))
            names = sorted({str(name) for name in content["weight_map"].values()})
        except UNREADABLE as error:
            raise CheckpointError(f"{index}: not a readable index ({error})") from None
    present = os.listdir(path)
    for name in names:
        # An index names files beside it, and no others of this machine.
        if name not in present:
            raise CheckpointError(
                f"no weights at {path / name}; a checkpoint is model.safetensors, or an index and "
                "the shards it names")
    return [path / name for name in names]


def read_token_ids(path: Path) -> dict[str, int]:
    """Token text -> id, from tokenizer.json, or from vocab.json and the tokens added to
    it, in a checkpoint folder; {} without them."""
    file = path / "tokenizer.json"
    try:
        tokenizer = read_json(file)
        if tokenizer:
            added = {token["content"]: token["id"] for token in tokenizer.get("added_tokens", [])}
            return token_ids({**tokenizer["model"]["vocab"], **added})
        file = path / "vocab.json"
        if not file.exists():
            return {}
        vocab = token_ids(read_json(file))
        added = {token["content"]: i for i, token in read_added_tokens(path).items()}
        return {**vocab, **added}
    except UNREADABLE as error:
        raise not_a_tokenizer(file, error) from None


def read_added_tokens(path: Path) -> dict[int, dict[str, Any]]:
    """Id -> the token, its text under "content", of tokens added to vocab.json.

    tokenizer_config.json lists them as "added_tokens_decoder"; older checkpoints have
    text and id alone in added_tokens.json. Where both have a token, they must agree."""
    file = path / "tokenizer_config.json"
    try:
        decoder = read_json(file).get("added_tokens_decoder", {})
        added = {int(i): dict(token) for i, token in decoder.items()}
        known = {token["content"]: i for i, token in added.items()}
        file = path / "added_tokens.json"
        for text, i in token_ids(read_json(file)).items():
            if known.get(text, i) != i or added.get(i, {"content": text})["content"] != text:
                raise ValueError(f"{text} is {i} here, but not in tokenizer_config.json")
            added.setdefault(i, {"content": text})
    except UNREADABLE as error:
        raise not_a_tokenizer(file, error) from None
    return added


def token_ids(vocab: dict[str, int]) -> dict[str, int]:
    """A vocabulary as it is; ValueError where an id is no whole number from 0 up."""
    for text, i in vocab.items():
        if type(i) is not int or i < 0:
            raise ValueError(f"the id of {text!r} is {i!r}")
    return vocab


def not_a_tokenizer(file: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{file.parent}: {file.name} is not a tokenizer's ({error}); copy it again from where the "
        "weights came from")


def read_json(file: Path) -> Any:
    """What a JSON file holds; {} where there is no such file."""
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
