"""LoRA: adapters beside frozen linear layers; made, read and written in PEFT's layout, merged.

A layer answers W x + b + alpha / rank * B (A x). W and b stay what they are, A and B are
trained: of a 3B model at rank 64 3% of its parameters. B is 0 at first, so the model
begins as its base.

A run that starts from an adapter trains that adapter on. So its checkpoint holds one
adapter over the base that it names, and PEFT loads it. Where a reference policy is
needed, it is the same model with its adapters as they were at the start (`reference`):
switched off, or a small second copy of them.

Source: LoRA (arXiv 2106.09685); names, files and the start of A are PEFT's. No dropout.

    python sft.py --lora 64 ...                    adapters alone are trained, saved and resumed
    python lora.py merge ckpt/sft merged/          full weights, which transformers loads
"""
from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from qwen.hub import (
    ADAPTER_CONFIG,
    CheckpointError,
    nested_name,
    own_name,
    read_adapter_config,
    write_json,
    write_tensors,
)

WEIGHTS = "adapter_model.safetensors"
# A tensor's name in the file, around the path of its layer.
KEY = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
# Fields of adapter_config.json that change nothing in what a trained adapter computes.
# Any other one that is set stands for a kind of adapter that is not implemented.
PLAIN_FIELDS = {
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path",
    "revision", "inference_mode", "r", "lora_alpha", "lora_dropout", "bias", "target_modules",
    "exclude_modules", "layers_to_transform", "layers_pattern", "init_lora_weights",
    "eva_config", "megatron_core", "qalora_group_size", "runtime_config"}
# Of these fields some values are plain. (Other starts than these change the base as well.)
PLAIN_VALUES = {
    "peft_type": ("LORA",), "bias": ("none",),
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal")}


class LoRALinear(nn.Linear):
    """A linear layer with an adapter; weight and bias keep their names, and are the base's.

    lora_A (rank, in), lora_B (out, rank). start_A, start_B: copies from where a run
    started, None where the adapter was 0 there."""

    def __init__(self, base: nn.Linear, A: Tensor, B: Tensor, alpha: float) -> None:
        super().__init__(
            base.in_features, base.out_features, base.bias is not None, device="meta")
        self.weight = base.weight
        self.bias = base.bias
        self.lora_A = nn.Parameter(A)
        self.lora_B = nn.Parameter(B)
        self.rank = len(A)
        self.alpha = alpha
        self.at_start = False
        self.register_buffer("start_A", None, persistent=False)
        self.register_buffer("start_B", None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in) -> (N, out)"""
        y = super().forward(x)
        A = self.start_A if self.at_start else self.lora_A
        B = self.start_B if self.at_start else self.lora_B
        if A is None:
            return y
        # One kernel scales, multiplies and adds.
        return torch.addmm(y, F.linear(x, A), B.T, alpha=self.alpha / self.rank)


def adapted(model: nn.Module) -> dict[str, LoRALinear]:
    """The layers with adapters, by name; {} where none has one."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def linears(model: nn.Module, vision: bool) -> dict[str, nn.Linear]:
    """The linear layers that may have an adapter: the language model's, then the vision tower's."""
    parts = ("model.layers.", "visual.") if vision else ("model.layers.",)
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.startswith(parts):
            found[name] = module
    return found


def saved_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that a checkpoint holds: all of them, or where there are adapters these."""
    adapters_alone = bool(adapted(model))
    for name, p in model.named_parameters():
        if not adapters_alone or is_adapter(name):
            yield name, p


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name is an adapter's."""
    return name.endswith((".lora_A", ".lora_B"))


# ---------------------------------------------------------------- before a run

def fit(model: nn.Module, args: argparse.Namespace) -> None:
    """Makes a loaded model what the flags train: with adapters under --lora, else without.

    An adapter that it starts from is merged without --lora. With it the adapter is trained
    on, as it is: its layers, its alpha (which the flags say from then on). CheckpointError
    where they ask for another one."""
    if not args.lora:
        merge(model)
        return
    layers = adapted(model)
    if not layers:
        args.lora_alpha = args.lora_alpha or 2.0 * args.lora
        add(model, args.lora, args.lora_alpha, args.lora_vision, args.seed)
        return
    layer = next(iter(layers.values()))
    vision = any(name.startswith("visual.") for name in layers)
    refusals = {
        f"--lora {args.lora}": args.lora != layer.rank and f"rank {layer.rank}",
        f"--lora-alpha {args.lora_alpha}":
            args.lora_alpha not in (None, layer.alpha) and f"alpha {layer.alpha:g}",
        "--lora-vision": args.lora_vision and not vision and "none in the vision tower",
        "--freeze-vision": args.freeze_vision and vision and "some in the vision tower"}
    for flag, there in refusals.items():
        if there:
            raise CheckpointError(
                f"{flag}, but the adapter in {args.init} has {there}, and is trained on as it "
                f"is; change the flag, or merge it first: python lora.py merge {args.init} OUT")
    args.lora_alpha = float(layer.alpha)
    args.lora_vision = vision


def add(model: nn.Module, rank: int, alpha: float, vision: bool, seed: int) -> None:
    """Gives the linear layers adapters: A at random, by the seed alike on all processes; B 0."""
    random = torch.Generator().manual_seed(seed)
    for name, linear in linears(model, vision).items():
        # PEFT's start: uniform within 1 / sqrt(in).
        bound = linear.in_features ** -0.5
        A = (torch.rand(rank, linear.in_features, generator=random) * 2 - 1) * bound
        B = torch.zeros(linear.out_features, rank)
        device = linear.weight.device
        put(model, name, LoRALinear(linear, A.to(device), B.to(device), alpha))


def put(model: nn.Module, name: str, layer: nn.Linear) -> None:
    """Puts a layer in the place of that of this name."""
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, layer)


def freeze_base(model: nn.Module) -> None:
    """Leaves the adapters alone to be trained."""
    for name, p in model.named_parameters():
        p.requires_grad_(is_adapter(name))


def choose_trained(
        model: nn.Module, freeze_vision: bool, gradient_checkpointing: bool) -> None:
    """Marks the parameters to train, and whether layers recompute their activations."""
    if adapted(model):
        freeze_base(model)
    else:
        model.visual.requires_grad_(not freeze_vision)
    model.visual.checkpointing = gradient_checkpointing
    model.model.checkpointing = gradient_checkpointing


def keep_start(model: nn.Module) -> None:
    """Remembers the adapters as they are, for `reference`; one that is 0 needs no memory."""
    for layer in adapted(model).values():
        if layer.lora_B.any():
            layer.start_A = layer.lora_A.detach().clone()
            layer.start_B = layer.lora_B.detach().clone()


@contextmanager
def reference(model: nn.Module) -> Iterator[None]:
    """Inside, adapters are what they were at `keep_start`; a model without any is unchanged.

    Nothing that is trained takes part, so nothing is kept for a gradient, be it switched
    on. It is: then images are passed as the policy passes them, in one go. So both answer
    alike to the bit, and a sharded model makes equally many passes on all processes."""
    layers = adapted(model).values()
    for layer in layers:
        layer.at_start = True
    try:
        with torch.set_grad_enabled(torch.is_grad_enabled() or bool(layers)):
            yield
    finally:
        for layer in layers:
            layer.at_start = False


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Adds the adapters to their layers' weights, which become float32, and takes them away.

    The sum rounds in bfloat16: a small adapter would vanish."""
    for name, layer in adapted(model).items():
        plain = nn.Linear(
            layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        product = layer.lora_B.float() @ layer.lora_A.float()              # (out, in)
        plain.weight = nn.Parameter(layer.weight.float() + product * (layer.alpha / layer.rank))
        plain.bias = layer.bias
        put(model, name, plain)


# ---------------------------------------------------------------- PEFT's files

def stored_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What an adapter's file holds: PEFT's names, sorted, with this model's tensors."""
    stored = {}
    for name, tensor in saved_parameters(model):
        stored[f"base_model.model.{nested_name(name)}.weight"] = tensor
    return dict(sorted(stored.items()))


def save(model: nn.Module, path: Path, whole: Iterator[Tensor]) -> None:
    """Writes adapter_model.safetensors, in the base's own dtype, and adapter_config.json.

    whole: gives the tensors of stored_tensors(), in its order, unsharded."""
    layers = adapted(model)
    shapes = {name: tensor.shape for name, tensor in stored_tensors(model).items()}
    layer = next(iter(layers.values()))
    path.mkdir(parents=True, exist_ok=True)
    write_tensors(path / WEIGHTS, shapes, model.stored_dtype, whole, {"format": "pt"})
    write_json(path / ADAPTER_CONFIG, {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(model.base.resolve()),
        "inference_mode": True,
        "r": layer.rank,
        "lora_alpha": int(layer.alpha) if layer.alpha == int(layer.alpha) else layer.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        # Whole names: by its last word, gate_proj would be the vision tower's as well.
        "target_modules": [nested_name(name) for name in layers]})


def load(
        model: nn.Module, path: Path, dtype: torch.dtype | None,
        device: torch.device | str) -> None:
    """Gives a loaded base the adapters of a folder, in this dtype (None: as stored).

    CheckpointError where they are of another kind or do not fit."""
    config = read_config(path)
    file = path / WEIGHTS
    try:
        tensors = load_file(file)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: no whole safetensors file ({error}); "
                              "copy it again from where it came from") from None
    known = linears(model, vision=True)
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = KEY.fullmatch(key)
        name = own_name(match[1]) if match else ""
        if name not in known:
            raise CheckpointError(
                f"{file}: {key} is no adapter of a linear layer of the language model or the "
                "vision tower; others are not implemented")
        pairs.setdefault(name, {})[match[2]] = tensor.to(device, dtype)
    if not pairs:
        raise CheckpointError(f"{file}: there is no adapter in it")
    for name, pair in pairs.items():
        check_shapes(file, name, known[name], pair, config["r"])
        put(model, name, LoRALinear(known[name], pair["A"], pair["B"], config["lora_alpha"]))


def check_shapes(
        file: Path, name: str, linear: nn.Linear, pair: dict[str, Tensor], rank: int) -> None:
    """CheckpointError where an adapter's A and B do not fit its layer and rank."""
    expected = {"A": (rank, linear.in_features), "B": (linear.out_features, rank)}
    for part, shape in expected.items():
        there = tuple(pair[part].shape) if part in pair else "missing"
        if there != shape:
            raise CheckpointError(
                f"{file}: lora_{part} of {name} is {there}, but base and rank ask for {shape}; "
                "is it an adapter of another base?")


def rank_of(path: Path) -> int | None:
    """The rank of the adapter in a folder, None where it holds none."""
    return read_config(path)["r"] if (path / ADAPTER_CONFIG).exists() else None


def read_config(path: Path) -> dict[str, Any]:
    """adapter_config.json of a folder; CheckpointError where it asks for more than plain LoRA."""
    file = path / ADAPTER_CONFIG
    config = read_adapter_config(file)
    for name, value in config.items():
        plain = name in PLAIN_FIELDS if name not in PLAIN_VALUES else value in PLAIN_VALUES[name]
        if value and not plain:
            raise CheckpointError(
                f"{file}: {name} is {value!r}, a kind of adapter that is not implemented; merge "
                "it with PEFT, and start from that")
    r = config.get("r")
    alpha = config.get("lora_alpha")
    if not isinstance(r, int) or r < 1 or not isinstance(alpha, (int, float)):
        raise CheckpointError(f"{file}: r is {r!r} and lora_alpha {alpha!r}; is this the "
                              "adapter_config.json of a LoRA adapter?")
    return config


# ---------------------------------------------------------------- the command

def store_as(model: nn.Module, dtype: str) -> None:
    """Weights will be written in this dtype, and config.json says so."""
    model.stored_dtype = getattr(torch, dtype)
    raw = model.config.raw
    for part in (raw, raw.get("text_config", {}), raw.get("vision_config", {})):
        for key in ("torch_dtype", "dtype"):
            if key in part:
                part[key] = dtype
