"""A checkpoint's folder: config.json, names of tensors, safetensors in and out, token ids.

A folder holds a model (config.json, *.safetensors, tokenizer files) or an adapter
(adapter_config.json, which names its base). CheckpointError if files are missing or do not fit."""
from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

# By `model_type` in config.json: the supported families, and relatives that are not supported.
FAMILIES = {"qwen2_vl": "Qwen2-VL", "qwen2_5_vl": "Qwen2.5-VL", "qwen3_vl": "Qwen3-VL"}
OTHER_MODELS = {
    "qwen3_vl_moe": "Qwen3-VL-MoE", "qwen3_5": "Qwen3.5", "qwen3_5_moe": "Qwen3.5-MoE",
    "qwen2_5_omni": "Qwen2.5-Omni", "qwen3_omni_moe": "Qwen3-Omni"}
ADAPTER_CONFIG = "adapter_config.json"                # PEFT's, in place of config.json
WEIGHT_INDEX = "model.safetensors.index.json"         # lists the files of sharded weights
MANIFEST = "manifest.json"                            # lists a step's files and their hashes
DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
PIECE = 2 ** 20                   # elements of a tensor that are copied to the host at a time
MALFORMED = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError)


class CheckpointError(Exception):
    """Files that are missing or do not fit. One line: what is wrong, where, what to do."""


# Supported values of fields in config.json. Any other value is an error that names the field.
# A null or missing field is always accepted; () means that no value is.
COMPUTED: dict[str, dict[str, tuple[Any, ...]]] = {
    "": {"quantization_config": (), "compression_config": ()},
    "text_config": {
        "quantization_config": (), "hidden_act": ("silu", "swish"), "attention_bias": (True,),
        "attention_dropout": (0,), "mlp_bias": (False,), "use_sliding_window": (False,),
        "partial_rotary_factor": (1,)},
    "rope_parameters": {
        "rope_type": ("default", "mrope"), "type": ("default", "mrope"),
        "partial_rotary_factor": (1,), "mrope_interleaved": (False,)},
    "vision_config": {"quantization_config": (), "hidden_act": ("silu", "swish")},
    "vision_config.rope_parameters": {
        "rope_type": ("axial", "default"), "type": ("axial", "default"),
        "rope_theta": (10000,), "partial_rotary_factor": (1,)}}
COMPUTED_BY_FAMILY = {
    ("Qwen2-VL", "vision_config", "hidden_act"): ("quick_gelu",),
    ("Qwen3-VL", "vision_config", "hidden_act"): ("gelu_pytorch_tanh", "gelu_new"),
    ("Qwen3-VL", "text_config", "attention_bias"): (False, True),
    ("Qwen3-VL", "rope_parameters", "mrope_interleaved"): (True,)}


@dataclass(frozen=True)
class VisionConfig:
    family: str
    depth: int
    hidden: int
    heads: int
    intermediate: int
    out: int
    channels: int
    patch: int                    # side in pixels
    temporal_patch: int           # frames
    merge: int                    # merge x merge patches become one token
    window: int                   # side in pixels; a patch attends within its window; 0: none
    full_blocks: tuple[int, ...]  # blocks in which a patch attends to its whole frame
    table_side: int               # Qwen3-VL: side of the square table of learned positions, or 0
    deepstack: tuple[int, ...]    # Qwen3-VL: blocks that also feed the language model's layers


@dataclass(frozen=True)
class Config:
    family: str                     # a value of FAMILIES
    vocab: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    eps: float
    rope_theta: float
    # Frequencies rotated by the time, height and width position; they sum to head_dim / 2.
    mrope_section: tuple[int, ...]
    attention_bias: bool            # of queries, keys and values
    tied: bool                      # the head is the embedding
    image_id: int
    video_id: int | None
    marker_ids: tuple[int, ...]     # image, video and vision markers: never sampled
    stop_ids: tuple[int, ...]
    vision: VisionConfig
    raw: dict[str, Any] = field(repr=False, compare=False)

    @classmethod
    def from_json(cls, path: str | Path) -> Config:
        """Reads the hub's form (flat, `rope_scaling`) and the form that transformers 5 writes
        (`text_config`, `rope_parameters`). CheckpointError for any other model."""
        raw = read_json_object(Path(path))
        model_type = raw.get("model_type")
        if model_type not in list(FAMILIES):
            name = OTHER_MODELS.get(str(model_type), "another model")
            raise CheckpointError(
                f"{path}: model_type is {model_type!r} ({name}); this code runs dense checkpoints "
                f"of {', '.join(FAMILIES.values())} ({', '.join(FAMILIES)})")
        family = FAMILIES[model_type]
        qwen2, qwen25, qwen3 = (family == name for name in FAMILIES.values())
        try:
            text, vision = raw.get("text_config") or raw, raw["vision_config"]
            parts = [
                ("", raw), ("text_config", text), ("rope_parameters", text.get("rope_scaling")),
                ("rope_parameters", text.get("rope_parameters")), ("vision_config", vision),
                ("vision_config.rope_parameters", vision.get("rope_parameters"))]
            found = [("layer_types", x, ("full_attention",)) for x in text.get("layer_types") or ()]
            for part, content in parts:
                for name, values in COMPUTED[part].items():
                    values = COMPUTED_BY_FAMILY.get((family, part, name), values)
                    found.append((f"{part} {name}".strip(), (content or {}).get(name), values))
            for name, value, values in found:
                if value is not None and value not in values:
                    only = f"only {json.dumps(values[0])}" if values else "no such thing"
                    raise CheckpointError(f"{path}: {name} is {json.dumps(value)[:60]}, but this "
                                          f"code computes {only}; take a checkpoint without it")

            # Qwen2-VL's hidden_size is the language model's width.
            width = vision["embed_dim"] if qwen2 else vision["hidden_size"]
            mlp_width = int(width * vision.get("mlp_ratio", 4)) if qwen2 else None
            depth = vision["depth"]
            vision_config = VisionConfig(
                family=family, depth=depth, hidden=width, heads=vision["num_heads"],
                intermediate=mlp_width or vision["intermediate_size"],
                out=vision["hidden_size"] if qwen2 else vision["out_hidden_size"],
                channels=vision.get("in_channels", vision.get("in_chans", 3)),
                patch=vision.get("patch_size", 16 if qwen3 else 14),
                temporal_patch=vision.get("temporal_patch_size", 2),
                merge=vision.get("spatial_merge_size", 2),
                window=vision["window_size"] if qwen25 else 0,
                full_blocks=tuple(vision["fullatt_block_indexes"] if qwen25 else range(depth)),
                table_side=math.isqrt(vision["num_position_embeddings"]) if qwen3 else 0,
                deepstack=tuple(vision["deepstack_visual_indexes"] if qwen3 else ()))

            # As in transformers, the older name takes precedence.
            rope = text.get("rope_scaling") or text.get("rope_parameters") or {}
            hidden, heads = text["hidden_size"], text["num_attention_heads"]
            head_dim = text.get("head_dim") or (128 if qwen3 else hidden // heads)
            sections = tuple(rope["mrope_section"])
            if sum(sections) * 2 != head_dim:
                raise ValueError(f"mrope_section {sections} is not half of head_dim {head_dim}")
            theta = rope.get("rope_theta") or text.get("rope_theta") or (5e5 if qwen3 else 1e6)
            eos = text.get("eos_token_id", raw.get("eos_token_id", ()))
            markers = ("image", "video", "vision", "vision_start", "vision_end")
            marker_ids = [raw.get(f"{marker}_token_id") for marker in markers]
            return cls(
                family=family, vocab=text["vocab_size"], hidden=hidden,
                layers=text["num_hidden_layers"], intermediate=text["intermediate_size"],
                heads=heads, kv_heads=text["num_key_value_heads"], head_dim=head_dim,
                eps=text.get("rms_norm_eps", 1e-6 if qwen3 else 1e-5),
                rope_theta=theta, mrope_section=sections,
                attention_bias=text.get("attention_bias", False) if qwen3 else True,
                tied=bool(raw.get("tie_word_embeddings") or text.get("tie_word_embeddings")),
                image_id=raw["image_token_id"], video_id=raw.get("video_token_id"),
                marker_ids=tuple(i for i in marker_ids if i is not None),
                stop_ids=(eos,) if isinstance(eos, int) else tuple(eos or ()),
                vision=vision_config, raw=raw)
        except MALFORMED as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else error
            raise CheckpointError(f"{path}: not the config.json of a {family} checkpoint "
                                  f"({reason}); copy it again from where it came from") from None


def is_checkpoint(path: Path) -> bool:
    return (path / "config.json").exists() or (path / ADAPTER_CONFIG).exists()


def by_number(path: str | Path) -> list[str | int]:
    """Sort key that puts checkpoint-500 before checkpoint-1500."""
    parts = re.split("([0-9]+)", Path(path).name)
    return [int(part) if i % 2 else part for i, part in enumerate(parts)]


def named_step(link: Path) -> Path | None:
    """The folder that `latest` or `best` names, even if it is missing. Each is a link, or a file
    with the folder's name if the file system has no links. None if it is neither."""
    with suppress(OSError, ValueError):
        name = os.readlink(link) if link.is_symlink() else link.read_text(encoding="utf-8")
        return link.parent / name.strip()
    return None


def newest_step(path: str | Path) -> Path:
    """A folder with several steps -> the one that `latest` names, or else the newest; `latest` or
    `best` -> the step that it names; any other path -> itself."""
    path = Path(path)
    if is_checkpoint(path):
        return path
    link = path if path.name in ("latest", "best") else path / "latest"
    named = named_step(link)
    if named and is_checkpoint(named):
        return named
    # In copies of a run `latest` may be missing, or a folder. Other programs write no link.
    steps = [p for p in path.glob("*") if re.fullmatch("(step_|checkpoint-)[0-9]+", p.name)]
    return max(filter(is_checkpoint, steps), key=by_number,
               default=link if is_checkpoint(link) else path)


def folder(path: str | Path) -> Path:
    """As newest_step; CheckpointError if there is no checkpoint."""
    newest = newest_step(path)
    if not is_checkpoint(newest):
        raise CheckpointError(f"no checkpoint at {path}: no config.json there, in a folder "
                              "`latest`, step_N or checkpoint-N; check the path, or train it")
    return newest


def base_folder(path: Path) -> Path:
    """A model's folder -> itself; an adapter's -> the folder of its base."""
    file = path / ADAPTER_CONFIG
    if not file.exists():
        return path
    if any((path / name).exists() for name in ("model.safetensors", WEIGHT_INDEX)):
        raise CheckpointError(
            f"{path}: {ADAPTER_CONFIG} is next to whole weights, and only one can be loaded; "
            "merge the adapter into them, or move it to another folder")
    name = str(read_json_object(file).get("base_model_name_or_path") or "")
    base = newest_step(name)
    if not name or not (base / "config.json").exists():
        raise CheckpointError(f"{file}: the base checkpoint {name!r} is not there; set "
                              "base_model_name_or_path in that file to its folder")
    return base


def nested_name(name: str) -> str:
    """Our name of a parameter or module -> transformers 5's, also used in Qwen3-VL's files."""
    if name.startswith("visual."):
        return f"model.{name}"
    return re.sub(r"^model\.", "model.language_model.", name)


# Prefixes that DDP, torch.compile, FSDP, gradient checkpointing, Lightning and PEFT add.
WRAPPERS = re.compile(
    r"^base_model\.model\.|(?:^|(?<=\.))(?:module|_orig_mod|_fsdp_wrapped_module"
    r"|_checkpoint_wrapped_module|_forward_module)\.")
# Prefix if the model was saved as the field "model" of another object.
HOLDERS = re.compile(r"^(?:model\.)+(?=(?:model|language_model|visual|lm_head)\.)")


def own_name(stored_name: str) -> str:
    """A tensor's name in a checkpoint of any layout -> ours (the hub's for Qwen2.5-VL).

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


def read_tensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)        # memory-mapped until it is converted or copied to a GPU
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: not a whole safetensors file ({error}); copy it again "
                              "from where it came from") from None


def read_weights(path: Path, shapes: Mapping[str, Sequence[int]], tied: bool,
                 dtype: torch.dtype | None, device: torch.device | str,
                 ) -> tuple[dict[str, Tensor], torch.dtype]:
    """Tensors of exactly these names and shapes, and the stored dtype of the embedding.
    dtype None: no conversion. A tied checkpoint may also hold the head, equal to the embedding."""
    index = path / WEIGHT_INDEX
    files = {"model.safetensors"}
    if not (path / "model.safetensors").exists() and index.exists():
        weight_map = read_json_object(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise CheckpointError(f"{index}: it has no weight_map; copy it again")
        files = set(map(str, weight_map.values()))
    # An index could name any path; only files of this folder are read.
    for file in sorted(files - set(os.listdir(path))):
        pickles = ", ".join(sorted(p.name for p in path.glob("*.bin"))[:3])
        remedy = (f"pickles are not read ({pickles}): load it in transformers and save it again "
                  "with save_pretrained" if pickles else
                  "a checkpoint is model.safetensors, or an index and the files that it lists")
        raise CheckpointError(f"no weights at {path / file}; {remedy}")
    tensors: dict[str, Tensor] = {}
    stored_names: dict[str, str] = {}
    stored_dtype = torch.bfloat16
    for file in sorted(files):
        for stored_name, tensor in read_tensors(path / file).items():
            name = own_name(stored_name)
            if name in tensors:
                raise CheckpointError(f"{path}: {stored_names[name]} and {stored_name} are one "
                                      "tensor under two names; remove one of them")
            if name in shapes and tensor.dtype not in DTYPES:
                raise CheckpointError(
                    f"{path / file}: {stored_name} is stored as {tensor.dtype}; this code reads "
                    "no quantized weights, use the checkpoint they were made from")
            if name in shapes and tensor.shape != shapes[name]:
                raise CheckpointError(
                    f"{path / file}: {stored_name} is {tuple(tensor.shape)}, but config.json "
                    f"asks for {tuple(shapes[name])}; take both from one checkpoint")
            if name == "model.embed_tokens.weight":
                stored_dtype = tensor.dtype
            stored_names[name] = stored_name
            tensors[name] = tensor.to(device, dtype)
    if tied and "lm_head.weight" in tensors:
        head = tensors.pop("lm_head.weight")
        if not torch.equal(head, tensors.get("model.embed_tokens.weight", head[:0])):
            raise CheckpointError(
                f"{path}: lm_head.weight differs from embed_tokens, but config.json says that they "
                "are tied; set tie_word_embeddings to false in it")
    missing = sorted(shapes.keys() - tensors.keys())
    surplus = sorted(stored_names[name] for name in tensors.keys() - shapes.keys())
    for name in missing:
        # To detect an unknown prefix, compare names of blocks without their first word.
        tail = name.split(".", 1)[1] if name.count(".") > 2 else name
        for other in surplus:
            if other.endswith(f".{tail}"):
                raise CheckpointError(
                    f"{path}: tensors are named like {other}, but {name} is expected; rename them")
    for what, names in (("missing", missing), ("not expected", surplus)):
        if names:
            first = ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")
            raise CheckpointError(f"{path}: {len(names)} tensors are {what}: {first}; take "
                                  "config.json and weights from one checkpoint")
    return tensors, stored_dtype


def write_tensors(file: Path, shapes: Mapping[str, Sequence[int]], dtype: torch.dtype,
                  tensors: Iterator[Tensor], metadata: Mapping[str, str]) -> None:
    """Writes the same bytes as safetensors' save_file, but copies only PIECE elements to the host.
    tensors: sorted by name, on any device, of any dtype; each is requested when it is written."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, shape in sorted(shapes.items()):
        begin = end
        end += math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name, shape in sorted(shapes.items()):
            tensor = next(tensors)
            if tuple(tensor.shape) != tuple(shape):
                raise ValueError(f"{name} is {tuple(tensor.shape)}, not {tuple(shape)}")
            for piece in tensor.detach().reshape(-1).split(PIECE):
                stream.write(piece.to(dtype).cpu().contiguous().view(torch.uint8).numpy())


def read_token_ids(path: Path) -> dict[str, int]:
    """Token text -> id, from tokenizer.json, else vocab.json with added tokens; {} without both."""
    file = next(filter(Path.exists, (path / "tokenizer.json", path / "vocab.json")), None)
    if file is None:
        return {}
    content = read_json_object(file)
    try:
        if file.name == "vocab.json":
            ids = content | {token["content"]: i for i, token in read_added_tokens(path).items()}
        else:
            added = {x["content"]: x["id"] for x in content.get("added_tokens", ())}
            ids = content["model"]["vocab"] | added
        if not all(isinstance(i, int) for i in ids.values()):
            raise ValueError("an id is not a whole number")
    except MALFORMED as error:
        raise CheckpointError(
            f"{file}: not a tokenizer's ({error}); copy it again from where it came from") from None
    return ids


def read_added_tokens(path: Path) -> dict[int, dict[str, Any]]:
    """Tokens added to vocab.json: id -> token, with its text under "content".
    From tokenizer_config.json and, in older checkpoints, added_tokens.json; both must agree."""
    added: dict[int, dict[str, Any]] = {}
    if (path / "tokenizer_config.json").exists():
        decoder = read_json_object(path / "tokenizer_config.json").get("added_tokens_decoder", {})
        added = {int(i): dict(token) for i, token in decoder.items()}
    known = {token["content"]: i for i, token in added.items()}
    if (path / "added_tokens.json").exists():
        for text, i in read_json_object(path / "added_tokens.json").items():
            same = added.setdefault(i, {"content": text})["content"] == text
            if not isinstance(i, int) or not same or known.get(text, i) != i:
                raise CheckpointError(f"{path}: {text} is {i!r} in added_tokens.json, but not in "
                                      "tokenizer_config.json; take both from one checkpoint")
    return added


def read_json_object(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"a {type(content).__name__}")
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: not a readable JSON object ({error}); copy it again "
                              "from where it came from") from None
    return content


def write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
