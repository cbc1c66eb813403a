"""Computes, before a run's first step, whether it fits in a GPU's memory. Ours.

Weights, gradients and moments follow from the number of parameters. Activations are counted, not
estimated: the largest passes of a step run on the meta device, on which tensors have shapes but
no data, and a tensor's bytes count from its creation until it is freed. On a GPU the same passes
also run for real before step 1 (`try_out`).
"""
import argparse
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model import QwenVL
from qwen import lora
from qwen.answer import PROMPT
from qwen.generate import draw
from qwen.hub import ADAPTER_CONFIG, Config, base_folder, folder, read_json_object
from qwen.processor import Pixels, Processor, Prompt, frame_by_coords
from readers.base import Record
from train.checkpoints import fill_moments
from train.dist import fail, gathered, memory_tokens, peak_memory, rank, world

GIB = 2 ** 30
# An allowance for CUDA's libraries, NCCL's buffers and free blocks that are too small.
RESERVE = 1.5 * GIB
TEXT_TOKENS = 48                # of an expression, if no data is read
# A validation answers at most this many records, and tokens of their prompts, at once. With a 3B
# model these take 4 GiB.
VALIDATION_RECORDS = 32
VALIDATION_TOKENS = 2 ** 14


@dataclass(frozen=True)
class Step:
    """The size of a training step, over all processes."""
    prompts: int               # questions of RFT, records of SFT
    group: int                 # completions of each prompt; 1 in SFT
    tokens: int                # the longest completion
    samples: bool              # whether the model samples the completions (RFT)
    updates: int = 1           # optimizer steps that share the prompts


@dataclass(frozen=True)
class Pass:
    """A pass over `prompts` copies of a prompt, each with `group` completions of `tokens`."""
    prompt: Prompt
    prompts: int
    group: int
    tokens: int
    trains: bool               # score and backward; else prefill and decode one token

    def run(self, model: QwenVL, reference: QwenVL | None = None) -> None:
        prompts = [self.prompt] * self.prompts
        if self.trains:
            completion = torch.zeros(self.tokens, dtype=torch.long)
            completions = [[completion] * self.group] * self.prompts
            logp, _ = model.score(prompts, completions)
            if reference is not None:
                with torch.no_grad(), lora.reference(reference):
                    reference.score(prompts, completions)
            (-logp.mean()).backward()
            return
        with torch.no_grad():
            logits, cache, positions = model.prefill(prompts, self.group, self.tokens)
            logits = logits.repeat_interleave(self.group, 0)
            uniform = torch.zeros(len(logits), dtype=torch.double, device=logits.device)
            tokens = draw(model.distribution(logits, 1.0), uniform)
            model.decode(tokens, positions.repeat_interleave(self.group), cache)


class ByteCounter(TorchDispatchMode):
    """Counts the peak bytes of tensors on the meta device that exist at once, without `known`."""

    def __init__(self, known: Sequence[Tensor] = ()) -> None:
        super().__init__()
        self.sizes = {tensor.untyped_storage()._cdata: 0 for tensor in known}
        self.live = self.peak = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (),
                           kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.is_meta:
                storage = tensor.untyped_storage()
                if storage._cdata not in self.sizes:
                    self.sizes[storage._cdata] = storage.nbytes()
                    self.live += storage.nbytes()
                    self.peak = max(self.peak, self.live)
                    weakref.finalize(storage, self.release, storage._cdata)
        return result

    def release(self, key: int) -> None:
        self.live -= self.sizes.pop(key)


def longest_prompt(processor: Processor, records: Sequence[Record],
                   image: tuple[int, int] | None = None) -> Prompt | None:
    """The prompt with the most patches and the longest text of these records, or of an image of
    this (width, height) and TEXT_TOKENS tokens; None without either."""
    if not records and not image:
        return None
    sizes = {record.size for record in records} or {tuple(image)}
    resized = [frame_by_coords(size, "resized", processor).resized for size in sizes]
    width, height = max(resized, key=lambda size: size[0] * size[1])
    rows, columns = height // processor.patch, width // processor.patch
    text = max((record.text for record in records), key=len, default="")
    ids = processor.turns(PROMPT, rows * columns // processor.merge ** 2, text=text)
    if not records:
        ids += [0] * TEXT_TOKENS
    patches = torch.zeros(rows * columns, 3, *[processor.patch] * 2, dtype=torch.uint8)
    pixels = Pixels(patches, torch.zeros(3, 256), processor.temporal_patch)
    return Prompt(torch.tensor(ids), pixels, torch.tensor([[1, rows, columns]]), None)


def validation_batch(longest: Prompt) -> int:
    return min(VALIDATION_RECORDS, max(1, VALIDATION_TOKENS // len(longest.input_ids)))


def largest_passes(model: QwenVL, args: argparse.Namespace, step: Step, gpus: int,
                   longest: Prompt, longest_val: Prompt | None) -> dict[str, Pass]:
    """The largest passes that a process may run: sampling, updating, validating."""
    passes = {}
    prompts, tokens = step.prompts // gpus, step.tokens
    if step.samples:
        passes["sampling"] = Pass(longest, prompts, step.group, tokens, False)
    # As many prompts with full completions as --micro-tokens allows.
    prompt_tokens = memory_tokens(model, longest, 0)
    fit = max(1, args.micro_tokens // (prompt_tokens + step.group * tokens))
    prompts //= step.updates
    if fit < prompts:
        # With shorter completions, more prompts fit into a pass, up to the same budget. In their
        # place, these prompts get longer completions, which take as much.
        prompts = fit
        tokens = max(tokens, (args.micro_tokens // fit - prompt_tokens) // step.group)
    passes["updating"] = Pass(longest, prompts, step.group, tokens, True)
    if args.val and longest_val is not None:
        records = min(-(-args.val // gpus), validation_batch(longest_val))
        passes["validating"] = Pass(longest_val, records, 1, args.max_new_tokens, False)
    return passes


def peak_bytes(model: QwenVL, work: Pass, reference: bool = False) -> int:
    """The most that a pass holds in addition to weights and gradients; model: see meta_model."""
    # Drop complete gradients: a run reduces them to float32 shards, which `plan` counts.
    hooks = [p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
             for p in model.parameters() if p.requires_grad]
    counter = ByteCounter([*model.parameters(), *model.buffers()])
    # CUDA's RMSNorm kernel keeps its input and one number per row, but on the meta device RMSNorm
    # is many operations. LayerNorm is a single one there, and keeps nearly the same.
    with counter, mock.patch.object(F, "rms_norm", lambda x, shape, weight, eps: F.layer_norm(
            x, shape, weight, None, eps)):
        work.run(model, model if reference else None)
    for hook in hooks:
        hook.remove()
    return counter.peak


def meta_model(args: argparse.Namespace) -> QwenVL:
    """The model that the flags train, on the meta device in bfloat16."""
    init = folder(args.init)
    with torch.device("meta"):
        model = QwenVL(Config.from_json(base_folder(init) / "config.json"))
    from_adapter = (init / ADAPTER_CONFIG).exists()
    if from_adapter:
        lora.load_adapter(model, init, None, "meta")
    # lora.fit() writes to the flags it is given.
    lora.fit(model, argparse.Namespace(**vars(args)))
    if from_adapter and getattr(args, "beta", 0):
        # As lora.keep_start() does, but that looks at values, which the meta device lacks.
        for layer in lora.adapted(model).values():
            layer.start_A = layer.lora_A.detach()
            layer.start_B = layer.lora_B.detach()
    lora.choose_trained(model, args.freeze_vision, args.gradient_checkpointing)
    return model.to(torch.bfloat16)


def plan(args: argparse.Namespace, step: Step, gpus: int, longest: Prompt,
         longest_val: Prompt | None) -> tuple[float, dict[str, dict[str, float]]]:
    """What a run needs of each GPU -> peak bytes; bytes by phase and purpose. The phase "all the
    time" adds to each other phase."""
    model = meta_model(args)
    passes = largest_passes(model, args, step, gpus, longest, longest_val)
    adapters = bool(lora.adapted(model))
    reference = bool(getattr(args, "beta", 0))
    counts = []
    for module in (model, *model.model.layers, *model.visual.blocks):
        numbers = [(p.numel(), p.numel() * p.requires_grad) for p in module.parameters()]
        counts.append(map(sum, zip(*numbers)))
    (total, trained), *layers = counts
    layers, trained_layers = zip(*layers)
    always = {
        "trained weights, float32": 4 * trained / gpus,
        # Under adapters the base is stored in the compute dtype.
        "frozen weights": (2 if adapters else 4) * (total - trained) / gpus,
        "moments, float32": 8 * trained / gpus}
    if reference and not adapters:
        always["reference, bfloat16, on each GPU"] = 2 * total
    elif reference:
        starts = [x.numel() for name, x in model.named_buffers() if "start_" in name]
        always["starting adapters, bfloat16, on each GPU"] = 2 * sum(starts)
    always["CUDA and fragments (allowance)"] = RESERVE
    phases = {"all the time": always}
    # FSDP2 keeps embeddings and head gathered, and two layers: the one in use and the next. While a
    # part's gradient is reduced, it exists in bfloat16 and in float32.
    gathers = 2 * (total - sum(layers)) + 2 * 2 * max(layers)
    gathers += (2 + 4) * max(*trained_layers, trained - sum(trained_layers))
    for name, work in passes.items():
        held = peak_bytes(model, work, reference)
        rows = {"weights for sampling, bfloat16, on each GPU": 2 * total,
                "KV cache, prompts, logits": held}
        if work.trains:
            rows = {"gradients, float32": 4 * trained / gpus,
                    "layers gathered in bfloat16": gathers, "activations and logits": held}
        phases[f"while {name}, in addition"] = rows
    peaks = [sum(rows.values()) for rows in phases.values()]
    return peaks[0] + max(peaks[1:]), phases


def check_gpu(args: argparse.Namespace, processor: Processor, records: Sequence[Record],
              val: Sequence[Record], step: Step, device: torch.device | None = None) -> None:
    """Prints what a run needs of each GPU. If a GPU has less, names the first flag that helps, and
    exits with status 2. On a CPU, does nothing.
    device: None for --plan, which names the GPUs, and without records the image's size."""
    gpus, available = args.gpus, args.memory * GIB
    processor.check_fits(Config.from_json(base_folder(folder(args.init)) / "config.json"))
    if device is None and step.prompts % (gpus * step.updates):
        minibatches = " and the minibatches" if step.updates > 1 else ""
        fail(f"{step.prompts} records per step do not divide among {gpus} GPUs"
             f"{minibatches}; take a multiple of {gpus * step.updates}")
    if device is not None:
        if device.type == "cpu":
            return
        gpus, available = world(), torch.cuda.get_device_properties(device).total_memory
    image = None if records else args.image
    longest = [longest_prompt(processor, part, image) for part in (records, val)]
    peak, phases = plan(args, step, gpus, *longest)
    lines = [f"memory of each of {gpus} GPU{'s' if gpus > 1 else ''}, GiB"]
    for phase, rows in phases.items():
        lines.append(f"  {phase}")
        lines += [f"    {name:46} {size / GIB:8.2f}" for name, size in rows.items() if size]
    lines += [f"  {'needed at most':48} {peak / GIB:8.2f}",
              f"  {'a GPU has':48} {available / GIB:8.2f}"]
    if rank() == 0:
        print("\n".join(lines), flush=True)
    if peak <= available:
        return
    needs = f"the run needs {peak / GIB:.1f} GiB of a GPU that has {available / GIB:.1f}"
    # What costs only speed comes first, then what changes the run.
    adapter = folder(args.init) / ADAPTER_CONFIG
    lora_rank = read_json_object(adapter)["r"] if adapter.exists() else 64
    remedies = {
        "--gradient-checkpointing": {"gradient_checkpointing": True},
        "--micro-tokens 1024": {"micro_tokens": 1024},
        "--val 0": {"val": 0},
        "--beta 0": {"beta": 0.0},
        f"--lora {lora_rank}": {"lora": lora_rank}}
    remedies |= {f"{n * gpus} GPUs": {"gpus": n * gpus} for n in (2, 4, 8)
                 if step.prompts % (n * gpus * step.updates) == 0}
    for words, changes in remedies.items():
        changed = argparse.Namespace(**{**vars(args), "gpus": gpus, **changes})
        lower, _ = plan(changed, step, changed.gpus, *longest)
        if lower <= available:
            fail(f"{needs}; with {words} it needs {lower / GIB:.1f}")
    fail(f"{needs}; take more GPUs, or smaller images with --max-pixels")


def try_out(model: QwenVL, optimizer: torch.optim.Optimizer, reference: QwenVL | None,
            processor: Processor, records: Sequence[Record], val: Sequence[Record],
            args: argparse.Namespace, step: Step) -> None:
    """On GPUs, runs the largest passes once before step 1. If memory runs out, prints one line and
    exits with status 2. Does not change weights; allocates the optimizer's moments as zeros."""
    if model.device.type == "cpu":
        return
    longest = [longest_prompt(processor, part) for part in (records, val)]
    try:
        fill_moments(model, optimizer)
        for work in largest_passes(model, args, step, world(), *longest).values():
            if work.trains:
                # Twice: in a step of several passes, the second starts with the first's gradients.
                work.run(model, reference)
                work.run(model, reference)
                model.zero_grad(set_to_none=True)
            else:
                with gathered(model) as sampler:
                    work.run(sampler)
    except torch.OutOfMemoryError as error:
        fail(f"a step of the longest prompt and completions runs out of memory ({error}); lower "
             "--micro-tokens or --max-pixels, or see what --plan prints with other flags")
    if rank() == 0:
        print(f"the largest passes fit: {peak_memory(model.device):.2f} GiB at most", flush=True)
