"""LoRA: adapters on frozen linear layers; made, read and written in PEFT's layout, merged.

An adapted layer computes W x + b + alpha / rank * B (A x). W and b are frozen; A and B are trained:
at rank 64, 3% of the parameters of a 3B model. B is 0 at first, so the model starts as its base.
Source: LoRA (arXiv 2106.09685). Names, files and initialisation are PEFT's. No dropout.

A run that starts from an adapter continues to train it, so a checkpoint holds one adapter and the
path of its base. The reference policy uses a copy of the adapters at the start, or none if B was 0.

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
from torch import Tensor, nn

from qwen.hub import (
    ADAPTER_CONFIG, CheckpointError, nested_name, own_name, read_json_object, read_tensors)

WEIGHTS = "adapter_model.safetensors"
PARTS = ("model.layers.", "visual.")      # their linear layers can have adapters; not the head
KEY = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
# Supported fields of adapter_config.json. If another one is set, the adapter is not plain LoRA.
PLAIN_FIELDS = {
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path",
    "revision", "inference_mode", "r", "lora_alpha", "lora_dropout", "bias", "target_modules",
    "exclude_modules", "layers_to_transform", "layers_pattern", "init_lora_weights",
    "eva_config", "megatron_core", "qalora_group_size", "runtime_config"}
# Files of weights next to an adapter, but for itself and the state of a training run.
OTHER_WEIGHTS = re.compile(
    r"(?!adapter_model\.|training_args|optimizer|scheduler|scaler|rng_state|random_states|sampler"
    r"|dl_state).+\.(bin|pt|pth|ckpt|pkl|pickle|safetensors)")
# Supported values of some of these fields. (Other initialisations also change the base.)
PLAIN_VALUES = {"peft_type": ("LORA",), "bias": ("none",),
                "init_lora_weights": (True, "gaussian", "eva", "orthogonal")}


class LoRALinear(nn.Linear):
    """A linear layer with an adapter: lora_A (rank, in), lora_B (out, rank).
    start_A, start_B: copies from the start of the run, None if B was 0."""

    def __init__(self, base: nn.Linear, A: Tensor, B: Tensor, alpha: float) -> None:
        super().__init__(base.in_features, base.out_features, base.bias is not None, device="meta")
        self.weight, self.bias = base.weight, base.bias
        self.lora_A, self.lora_B = nn.Parameter(A), nn.Parameter(B)
        self.rank, self.alpha = len(A), alpha
        self.at_start = False
        self.register_buffer("start_A", None, persistent=False)
        self.register_buffer("start_B", None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        A, B = (self.start_A, self.start_B) if self.at_start else (self.lora_A, self.lora_B)
        if A is None:
            return y
        # One kernel scales, multiplies and adds.
        return torch.addmm(y, F.linear(x, A), B.T, alpha=self.alpha / self.rank)


def adapted(model: nn.Module) -> dict[str, LoRALinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def saved_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The adapters' parameters; all parameters if there are no adapters."""
    only_adapters = bool(adapted(model))
    for name, p in model.named_parameters():
        if not only_adapters or name.endswith((".lora_A", ".lora_B")):
            yield name, p


def fit(model: nn.Module, args: argparse.Namespace) -> None:
    """With --lora, adds adapters to a loaded model or keeps those it has; without, merges them.
    Sets args.lora_alpha and args.lora_vision. CheckpointError if flags contradict the adapter."""
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
                    f"{flag}, but the adapter in {args.init} has {there}, which can't change; "
                    f"change the flag, or merge: python -m tools.merge_lora {args.init} OUT")
        args.lora_alpha = float(layer.alpha)
        args.lora_vision = vision


def add(model: nn.Module, rank: int, alpha: float, vision: bool, seed: int) -> None:
    """Adds adapters to the linear layers of the language model, with `vision` also of the vision
    tower. A depends only on the seed, so it is the same on all processes; B is 0."""
    random = torch.Generator().manual_seed(seed)
    parts = PARTS if vision else PARTS[:1]
    for name, linear in list(model.named_modules()):
        if not isinstance(linear, nn.Linear) or not name.startswith(parts):
            continue
        # As PEFT does: uniform within 1 / sqrt(in).
        bound = linear.in_features ** -0.5
        A = (torch.rand(rank, linear.in_features, generator=random) * 2 - 1) * bound
        B = torch.zeros(linear.out_features, rank, device=linear.weight.device)
        model.set_submodule(name, LoRALinear(linear, A.to(B.device), B, alpha))


def choose_trained(model: nn.Module, freeze_vision: bool, gradient_checkpointing: bool) -> None:
    """Sets requires_grad of all parameters, and gradient checkpointing of both towers."""
    if adapted(model):
        model.requires_grad_(False)
        for _, p in saved_parameters(model):
            p.requires_grad_(True)
    else:
        model.visual.requires_grad_(not freeze_vision)
    model.visual.checkpointing = gradient_checkpointing
    model.model.checkpointing = gradient_checkpointing


def keep_start(model: nn.Module) -> None:
    """Copies the adapters for `reference`; an adapter that is 0 needs no copy."""
    for layer in adapted(model).values():
        if layer.lora_B.any():
            layer.start_A = layer.lora_A.detach().clone()
            layer.start_B = layer.lora_B.detach().clone()


@contextmanager
def reference(model: nn.Module) -> Iterator[None]:
    """Context in which the adapters are those of `keep_start`. Gradients stay on, so the vision
    tower runs in one pass, as for the policy: results are equal to the bit, and all processes of a
    sharded model run equally many passes. All tensors used are frozen, so nothing is stored."""
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
    """Merges adapters into weights, in float32: bfloat16 would round small adapters away."""
    model.stored_dtype = model.base_dtype or model.stored_dtype
    for name, layer in adapted(model).items():
        plain = nn.Linear(layer.in_features, layer.out_features, False, device="meta")
        product = layer.lora_B.float() @ layer.lora_A.float()              # (out, in)
        plain.weight = nn.Parameter(layer.weight.float() + product * (layer.alpha / layer.rank))
        plain.bias = layer.bias
        model.set_submodule(name, plain)


def targeted(config: dict[str, Any], name: str) -> bool:
    """Whether adapter_config.json names this layer. PEFT's rules: a text is a pattern for the whole
    name; a list has names or their ends, and layers_to_transform then has the numbers of blocks."""
    found = []
    for given in (config.get("target_modules") or (), config.get("exclude_modules") or ()):
        found.append(re.fullmatch(given, name) if isinstance(given, str)
                     else any(f".{name}".endswith(f".{end}") for end in given))
    blocks = config.get("layers_to_transform")
    if blocks not in (None, []):
        patterns = config.get("layers_pattern") or "[^.]*"
        patterns = patterns if isinstance(patterns, str) else "|".join(patterns)
        block = re.match(rf"(?:.*?\.)?(?:{patterns})\.(\d+)\.", name)
        blocks = [blocks] if isinstance(blocks, int) else blocks
        found[0] = found[0] and block and int(block[1]) in blocks
    return bool(found[0] and not found[1])


def load_adapter(model: nn.Module, path: Path, dtype: torch.dtype | None,
                 device: torch.device | str) -> None:
    """Adds the adapter in a folder to its loaded base, in this dtype (None: as stored).
    CheckpointError unless it is plain LoRA and fits the base."""
    file = path / ADAPTER_CONFIG
    config = read_json_object(file)
    for name, value in config.items():
        plain = name in PLAIN_FIELDS and value in PLAIN_VALUES.get(name, (value,))
        if value and not plain:
            raise CheckpointError(f"{file}: {name} is {value!r}, a kind of adapter that is not "
                                  "implemented; merge it with PEFT, and start from the result")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, (int, float)):
        raise CheckpointError(f"{file}: r is {rank!r} and lora_alpha {alpha!r}; is this the "
                              "adapter_config.json of a LoRA adapter?")
    file = path / WEIGHTS
    if others := sorted(p.name for p in path.iterdir() if OTHER_WEIGHTS.fullmatch(p.name)):
        raise CheckpointError(
            f"{path}: {', '.join(others[:3])} next to the adapter may hold more trained weights, "
            "which are not read; merge all where they were trained, or move away what is not used")
    pickled = file.with_suffix(".bin")
    if pickled.exists() and not file.exists():
        raise CheckpointError(
            f"{pickled}: pickles are not read; convert it: python -c \"import torch, "
            "safetensors.torch as s; s.save_file({k: v.clone().contiguous() for k, v in "
            f"torch.load('{pickled}', weights_only=True).items()}}, '{file}')\"")
    modules = dict(model.named_modules())
    pairs: dict[str, dict[str, Tensor]] = {}
    dtypes = set()
    name_of = str                 # our name of a module -> its name in the program that trained it
    for key, tensor in read_tensors(file).items():
        match = KEY.fullmatch(key)
        name = own_name(match[1]) if match else ""
        if not isinstance(modules.get(name), nn.Linear) or not name.startswith(PARTS):
            raise CheckpointError(
                f"{file}: {key} is not an adapter of a linear layer of the language model or "
                "the vision tower; merge it with PEFT, and start from the result")
        pairs.setdefault(name, {})[match[2]] = tensor.to(device, dtype)
        dtypes.add(tensor.dtype)
        name_of = str if match[1] == name else nested_name
    if not pairs:
        raise CheckpointError(f"{file}: it holds no adapter; copy it again")
    absent = [name for name, module in modules.items() if name not in pairs
              and isinstance(module, (nn.Linear, nn.Embedding)) and targeted(config, name_of(name))]
    if absent:
        raise CheckpointError(
            f"{file}: it has {len(pairs)} layers, but not {', '.join(absent[:3])} and the like, "
            f"{len(absent)} in all, which {ADAPTER_CONFIG} names too; copy both again")
    model.base_dtype = model.stored_dtype
    model.stored_dtype = max(dtypes, key=lambda dtype: dtype.itemsize)
    for name, pair in pairs.items():
        linear = modules[name]
        for part, shape in (("A", (rank, linear.in_features)), ("B", (linear.out_features, rank))):
            there = tuple(pair[part].shape) if part in pair else "missing"
            if there != shape:
                raise CheckpointError(f"{file}: lora_{part} of {name} is {there}, but base and "
                                      f"rank ask for {shape}; is it an adapter of another base?")
        model.set_submodule(name, LoRALinear(linear, pair["A"], pair["B"], alpha))
