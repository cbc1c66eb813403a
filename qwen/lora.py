"""LoRA: adapters on frozen linear layers; made, read and written in PEFT's layout, merged.

An adapted layer computes W x + b + alpha / rank * B (A x). W and b are frozen, A and B are
trained: at rank 64, 3% of the parameters of a 3B model. B starts at 0, so the model starts
as its base.

A run that starts from an adapter continues to train it, so a checkpoint holds one adapter over
the base that it names, and PEFT loads it. The reference policy is the same model with its
adapters as they were at the start (`reference`): off, or a small second copy.

Source: LoRA (arXiv 2106.09685); names, files and the start of A are PEFT's. No dropout.

    python sft.py --lora 64 ...                      trains, saves and resumes only adapters
    python -m tools.merge_lora ckpt/sft merged/      full weights, which transformers loads
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

from qwen.hub import ADAPTER_CONFIG, CheckpointError, nested_name, own_name, read_json_object

WEIGHTS = "adapter_model.safetensors"
# The linear layers in these parts may have adapters: not the head.
PARTS = ("model.layers.", "visual.")
# A tensor's name in the file, around the path of its layer.
KEY = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
# Fields of adapter_config.json that do not change what a trained adapter computes. If any
# other is set, the adapter is of a kind that is not implemented.
PLAIN_FIELDS = {
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path",
    "revision", "inference_mode", "r", "lora_alpha", "lora_dropout", "bias", "target_modules",
    "exclude_modules", "layers_to_transform", "layers_pattern", "init_lora_weights",
    "eva_config", "megatron_core", "qalora_group_size", "runtime_config"}
# These fields must have one of these values. (Other starts change the base as well.)
PLAIN_VALUES = {
    "peft_type": ("LORA",), "bias": ("none",),
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal")}


class LoRALinear(nn.Linear):
    """A linear layer with an adapter; weight and bias are the base's and keep their names.

    lora_A (rank, in), lora_B (out, rank). start_A, start_B: copies from the start of a run,
    None if B was 0."""

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
    """The layers with adapters, by name; {} if there are none."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def saved_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that a checkpoint holds: the adapters', or all if there are none."""
    only_adapters = bool(adapted(model))
    for name, p in model.named_parameters():
        if not only_adapters or name.endswith((".lora_A", ".lora_B")):
            yield name, p


# ---------------------------------------------------------------- before a run

def fit(model: nn.Module, args: argparse.Namespace) -> None:
    """Gives a loaded model the adapters that --lora asks for; without it, merges what is there.

    An adapter that the run starts from is trained as it is, and `args` then say its alpha and
    layers. CheckpointError if the flags ask for another one."""
    layers = adapted(model)
    if not args.lora:
        merge(model)
    elif not layers:
        args.lora_alpha = args.lora_alpha or 2.0 * args.lora
        add(model, args.lora, args.lora_alpha, args.lora_vision, args.seed)
    else:
        layer = next(iter(layers.values()))
        vision = any(name.startswith("visual.") for name in layers)
        refusals = {
            f"--lora {args.lora}": args.lora != layer.rank and f"rank {layer.rank}",
            f"--lora {args.lora} {args.lora_alpha}":
                args.lora_alpha not in (None, layer.alpha) and f"alpha {layer.alpha:g}",
            "--lora-vision": args.lora_vision and not vision and "none in the vision tower",
            "--freeze-vision": args.freeze_vision and vision and "some in the vision tower"}
        for flag, there in refusals.items():
            if there:
                raise CheckpointError(
                    f"{flag}, but the adapter in {args.init} has {there} and is trained as it "
                    "is; change the flag, or merge it first: python -m tools.merge_lora "
                    f"{args.init} OUT")
        args.lora_alpha = float(layer.alpha)
        args.lora_vision = vision


def add(model: nn.Module, rank: int, alpha: float, vision: bool, seed: int) -> None:
    """Adds adapters to the language model's linear layers and, with `vision`, to the vision
    tower's. A is random by the seed, the same on all processes; B is 0."""
    random = torch.Generator().manual_seed(seed)
    parts = PARTS if vision else PARTS[:1]
    for name, linear in list(model.named_modules()):
        if not isinstance(linear, nn.Linear) or not name.startswith(parts):
            continue
        # PEFT's start: uniform within 1 / sqrt(in).
        bound = linear.in_features ** -0.5
        A = (torch.rand(rank, linear.in_features, generator=random) * 2 - 1) * bound
        B = torch.zeros(linear.out_features, rank)
        device = linear.weight.device
        model.set_submodule(name, LoRALinear(linear, A.to(device), B.to(device), alpha))


def choose_trained(
        model: nn.Module, freeze_vision: bool, gradient_checkpointing: bool) -> None:
    """Marks the parameters to train, and whether layers recompute their activations."""
    if adapted(model):
        model.requires_grad_(False)
        for _, p in saved_parameters(model):
            p.requires_grad_(True)
    else:
        model.visual.requires_grad_(not freeze_vision)
    model.visual.checkpointing = gradient_checkpointing
    model.model.checkpointing = gradient_checkpointing


def keep_start(model: nn.Module) -> None:
    """Keeps copies of the adapters for `reference`; none of an adapter that is 0."""
    for layer in adapted(model).values():
        if layer.lora_B.any():
            layer.start_A = layer.lora_A.detach().clone()
            layer.start_B = layer.lora_B.detach().clone()


@contextmanager
def reference(model: nn.Module) -> Iterator[None]:
    """Inside, adapters are as they were at `keep_start`; a model without any is unchanged.

    With gradients on, the vision tower runs in one pass, as for the policy: so both give the
    same bits, and all processes of a sharded model make equally many passes. Nothing that is
    trained takes part, so nothing is kept for a backward pass."""
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
    """Adds the adapters to their layers' weights, which become float32, and removes them.

    In bfloat16 the sum would round small adapters away."""
    for name, layer in adapted(model).items():
        plain = nn.Linear(
            layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        product = layer.lora_B.float() @ layer.lora_A.float()              # (out, in)
        plain.weight = nn.Parameter(layer.weight.float() + product * (layer.alpha / layer.rank))
        plain.bias = layer.bias
        model.set_submodule(name, plain)


# ---------------------------------------------------------------- PEFT's files

def adapter_config(model: nn.Module) -> dict[str, Any]:
    """The adapter_config.json of a model with adapters."""
    layers = adapted(model)
    layer = next(iter(layers.values()))
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(model.base.resolve()),
        "inference_mode": True,
        "r": layer.rank,
        "lora_alpha": int(layer.alpha) if layer.alpha == int(layer.alpha) else layer.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        # Full names: "gate_proj" alone would match the vision tower's as well.
        "target_modules": [nested_name(name) for name in layers]}


def read_adapter_config(path: Path) -> dict[str, Any]:
    """adapter_config.json of a folder; CheckpointError unless it is plain LoRA's."""
    file = path / ADAPTER_CONFIG
    config = read_json_object(file)
    for name, value in config.items():
        plain = name in PLAIN_FIELDS and value in PLAIN_VALUES.get(name, (value,))
        if value and not plain:
            raise CheckpointError(
                f"{file}: {name} is {value!r}, a kind of adapter that is not implemented; "
                "merge it with PEFT, and start from that")
    r = config.get("r")
    alpha = config.get("lora_alpha")
    if not isinstance(r, int) or r < 1 or not isinstance(alpha, (int, float)):
        raise CheckpointError(f"{file}: r is {r!r} and lora_alpha {alpha!r}; is this the "
                              "adapter_config.json of a LoRA adapter?")
    return config


def load_adapter(
        model: nn.Module, path: Path, dtype: torch.dtype | None,
        device: torch.device | str) -> None:
    """Adds the adapter in a folder to its loaded base, in this dtype (None: as stored)."""
    config = read_adapter_config(path)
    file = path / WEIGHTS
    try:
        tensors = load_file(file)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: not a whole safetensors file ({error}); copy it "
                              "again from where it came from") from None
    modules = dict(model.named_modules())
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = KEY.fullmatch(key)
        name = own_name(match[1]) if match else ""
        if not isinstance(modules.get(name), nn.Linear) or not name.startswith(PARTS):
            raise CheckpointError(
                f"{file}: {key} is not an adapter of a linear layer of the language model or "
                "the vision tower; merge it with PEFT, and start from that")
        pairs.setdefault(name, {})[match[2]] = tensor.to(device, dtype)
    if not pairs:
        raise CheckpointError(f"{file}: it holds no adapter; copy it again")
    rank, alpha = config["r"], config["lora_alpha"]
    for name, pair in pairs.items():
        linear = modules[name]
        expected = {"A": (rank, linear.in_features), "B": (linear.out_features, rank)}
        for part, shape in expected.items():
            there = tuple(pair[part].shape) if part in pair else "missing"
            if there != shape:
                raise CheckpointError(
                    f"{file}: lora_{part} of {name} is {there}, but base and rank ask for "
                    f"{shape}; is it an adapter of another base?")
        model.set_submodule(name, LoRALinear(linear, pair["A"], pair["B"], alpha))
