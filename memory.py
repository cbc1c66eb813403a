"""What a run needs of a GPU's memory, told before its first step. Ours.

Weights, gradients and moments follow from the number of parameters. What the passes need is
counted, not estimated: the costliest passes of a step run on the meta device, whose tensors
have shapes and no memory, and every tensor is counted from its making to its end. So the plan
needs no GPU, and it stays right when the model's code changes.

    python rft.py --plan --gpus 8 --memory 80 --init Qwen2.5-VL-7B-Instruct/ --image 800 800

On a GPU the same passes run before step 1 as well (`dry_step`): what does not fit is met in
the first minute, and not by the first long answer hours later.
"""
import argparse
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import generate
import lora
import runtime
from answer import PROMPT
from data import Record, load
from model import Config, QwenVL, base_folder, folder
from processor import Pixels, Processor, Prompt, smart_resize

GIB = 2 ** 30
# CUDA's own share of a GPU and what the allocator can't hand out: libraries, NCCL's buffers,
# blocks of the wrong size. An allowance, not a count.
RESERVE = 1.5 * GIB
# Ids of an expression where no data set says how long its longest is.
TEXT_TOKENS = 48
# What makes a run smaller, in the order in which it costs least: flags with their values.
REMEDIES = {
    "--gradient-checkpointing": ("gradient_checkpointing", True),
    "--micro-tokens 1024": ("micro_tokens", 1024),
    "--beta 0": ("beta", 0.0),
    "--lora 64": ("lora", 64),
}


# ---------------------------------------------------------------- counting

class ByteCounter(TorchDispatchMode):
    """Bytes of the tensors on the meta device that are alive, and their most so far.

    Tensors that share memory count once; those of `known`, such as a model's parameters,
    count nothing.
    """

    def __init__(self, known: Sequence[Tensor] = ()) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self.sizes = {tensor.untyped_storage()._cdata: 0 for tensor in known}

    def __torch_dispatch__(
            self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and tensor.is_meta:
                self.count(tensor.untyped_storage())
        return made

    def count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self.sizes:
            return
        self.sizes[key] = storage.nbytes()
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self.release, key)

    def release(self, key: int) -> None:
        self.live -= self.sizes.pop(key)


class NormShapes(torch.autograd.Function):
    """The shapes of RMSNorm as CUDA's kernel makes them: it keeps its input and a scale a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


@contextmanager
def whole_norms() -> Iterator[None]:
    """Inside, RMSNorm on the meta device is one operation, where torch takes it apart there.

    (A TorchFunctionMode would not do: it does not act within a backward pass, where layers are
    computed again.)
    """
    rms_norm = F.rms_norm

    def norm(x: Tensor, shape: Sequence[int], weight: Tensor, eps: float) -> Tensor:
        return NormShapes.apply(x, weight) if x.is_meta else rms_norm(x, shape, weight, eps)
    F.rms_norm = norm
    try:
        yield
    finally:
        F.rms_norm = rms_norm


# ---------------------------------------------------------------- the costliest passes

@dataclass(frozen=True)
class Step:
    """What a step of a stage is, over all processes."""

    groups: int                # questions, or records of a batch
    rollouts: int              # completions of each; 1 in SFT
    samples: bool              # whether the model writes the completions itself


@dataclass(frozen=True)
class Workload:
    """The costliest step that a process may meet."""

    prompt: Prompt             # the longest
    groups: int                # of this process
    groups_a_pass: int         # of them in one micro-batch
    rollouts: int              # of a group
    tokens: int                # of a completion at most
    samples: bool


def workload(
        model: QwenVL, processor: Processor, records: Sequence[Record], step: Step,
        args: argparse.Namespace) -> Workload:
    """This process's share of the costliest step that these records can make."""
    prompt = longest_of(processor, records)
    return share(model, prompt, step, args, runtime.world())


def share(
        model: QwenVL, prompt: Prompt, step: Step, args: argparse.Namespace, gpus: int,
) -> Workload:
    """A process's share of a step, all of whose prompts are this one."""
    groups = step.groups // gpus
    tokens = step.rollouts * args.max_new_tokens
    fit = args.micro_tokens // runtime.memory_tokens(model, prompt, tokens)
    return Workload(
        prompt, groups, min(groups, max(1, fit)), step.rollouts, args.max_new_tokens,
        step.samples)


def longest_prompt(
        processor: Processor, sizes: Sequence[tuple[int, int]], texts: Sequence[str]) -> Prompt:
    """The prompt of the image that is resized to the most patches, with the longest text.

    sizes: (width, height) of images; texts: expressions, of which the one with most letters is
    taken for the longest, or where there are none one of TEXT_TOKENS ids. Its pixels are 0.
    """
    factor = processor.patch * processor.merge
    most = 0
    for width, height in set(sizes):
        w, h = smart_resize(width, height, factor, processor.min_pixels, processor.max_pixels)
        if w * h > most:
            most = w * h
            rows, columns = h // processor.patch, w // processor.patch
    text = max(texts, key=len, default="")
    ids = processor.turns(PROMPT, rows * columns // processor.merge ** 2, text=text)
    if not texts:
        ids += [0] * TEXT_TOKENS
    shape = (rows * columns, 3, processor.patch, processor.patch)
    pixels = Pixels(
        torch.zeros(shape, dtype=torch.uint8), torch.zeros(3, 256), processor.temporal_patch)
    return Prompt(torch.tensor(ids), pixels, torch.tensor([[1, rows, columns]]), None)


def update_pass(model: QwenVL, reference: QwenVL | None, work: Workload) -> None:
    """Scores a micro-batch and takes its gradient, as a step does."""
    prompts = [work.prompt] * work.groups_a_pass
    completion = torch.zeros(work.tokens, dtype=torch.long)
    completions = [[completion] * work.rollouts] * work.groups_a_pass
    logp, _ = model.score(prompts, completions)
    if reference is not None:
        with torch.no_grad(), lora.reference(reference):
            reference.score(prompts, completions)
    (-logp.mean()).backward()


@torch.no_grad()
def sampling_pass(model: QwenVL, work: Workload) -> None:
    """Prefills all prompts of a step and decodes a token of each rollout, as a step does."""
    prompts = [work.prompt] * work.groups
    logits, cache, positions = model.prefill(prompts, work.rollouts, work.tokens)
    logits = logits.repeat_interleave(work.rollouts, 0)
    random = torch.zeros(len(logits), dtype=torch.double, device=logits.device)
    tokens = generate.draw(model.distribution(logits, 1.0), random)
    model.decode(tokens, positions.repeat_interleave(work.rollouts), cache)


# ---------------------------------------------------------------- the plan

@dataclass(frozen=True)
class Plan:
    """Bytes that one GPU needs, by what they are for.

    standing: there all the time; sampling, update: beside it in these phases of a step.
    """

    standing: dict[str, float]
    sampling: dict[str, float]
    update: dict[str, float]

    @property
    def peak(self) -> float:
        phases = (sum(self.sampling.values()), sum(self.update.values()))
        return sum(self.standing.values()) + max(phases)


def make_plan(model: QwenVL, work: Workload, gpus: int, reference: bool) -> Plan:
    """The plan of a run on so many GPUs.

    model: on the meta device, see `planned_model`. reference: whether the starting policy is
    scored as well; beside adapters it needs no weights of its own.
    """
    adapters = bool(lora.adapted(model))
    trained = trained_of(model)
    total = parameters_of(model)
    # Beside adapters the base lies in what it computes in.
    frozen = (total - trained) * (2 if adapters else 4)
    standing = {
        "trained weights, float32": 4 * trained / gpus,
        "frozen weights": frozen / gpus,
        "moments, float32": 8 * trained / gpus,
    }
    if reference and not adapters:
        standing["reference, bfloat16, on each GPU"] = 2 * total
    standing["CUDA and fragments (allowance)"] = RESERVE
    sampling = {}
    if work.samples:
        sampling["weights for sampling, bfloat16, on each GPU"] = 2 * total
        sampling["KV cache, prompts, logits"] = sampling_bytes(model, work)
    update = {
        "gradients, float32": 4 * trained / gpus,
        "layers gathered in bfloat16": gathered_bytes(model),
        "activations and logits": update_bytes(model, work, reference),
    }
    return Plan(standing, sampling, update)


def update_bytes(model: QwenVL, work: Workload, reference: bool) -> int:
    """The most that a forward and backward pass holds beside weights and gradients."""
    # A gradient leaves as soon as it is whole: it is reduced to its float32 part, which
    # make_plan counts.
    handles = [p.register_post_accumulate_grad_hook(drop_gradient)
               for p in model.parameters() if p.requires_grad]
    counter = ByteCounter(list(model.parameters()))
    with whole_norms(), counter:
        update_pass(model, model if reference else None, work)
    for handle in handles:
        handle.remove()
    return counter.peak


def drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def sampling_bytes(model: QwenVL, work: Workload) -> int:
    """The most that prefill and decoding hold beside the weights."""
    counter = ByteCounter(list(model.parameters()))
    with whole_norms(), counter:
        sampling_pass(model, work)
    return counter.peak


def gathered_bytes(model: QwenVL) -> int:
    """What FSDP2 gathers at once: embeddings and head throughout, and of the layers one in use
    and one ahead; with one part's gradient, in bfloat16 and in float32, on its way to where it
    is added up."""
    layers = [*model.model.layers, *model.visual.blocks]
    largest = max(parameters_of(layer) for layer in layers)
    outer = parameters_of(model) - sum(parameters_of(layer) for layer in layers)
    trained = [trained_of(layer) for layer in layers]
    largest_trained = max(*trained, trained_of(model) - sum(trained))
    return 2 * outer + 2 * 2 * largest + (2 + 4) * largest_trained


def parameters_of(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def trained_of(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def table(plan: Plan, gpus: int, available: float) -> str:
    """The plan as text, in GiB a GPU."""
    phases = {
        "all the time": plan.standing,
        "while sampling, beside that": plan.sampling,
        "while learning, beside that": plan.update,
    }
    lines = [f"memory of each of {gpus} GPU{'s' if gpus > 1 else ''}, GiB"]
    for phase, rows in phases.items():
        if rows:
            lines.append(f"  {phase}")
        for name, size in rows.items():
            if size:
                lines.append(f"    {name:46} {size / GIB:8.2f}")
    lines.append(f"  {'needed at most':48} {plan.peak / GIB:8.2f}")
    lines.append(f"  {'a GPU has':48} {available / GIB:8.2f}")
    return "\n".join(lines)


# ---------------------------------------------------------------- before a run

def planned_model(init: Path, args: argparse.Namespace) -> QwenVL:
    """The model that a run would train, on the meta device and in bfloat16."""
    with torch.device("meta"):
        model = QwenVL(Config.from_json(base_folder(init) / "config.json"))
    if args.lora:
        lora.add(model, args.lora, 1.0, args.lora_vision, args.seed)
    runtime.choose_trained(model, args.freeze_vision, args.gradient_checkpointing)
    return model.to(torch.bfloat16)


def plan_of(
        args: argparse.Namespace, step: Step, prompt: Prompt, gpus: int) -> Plan:
    """The plan of the run that the flags describe."""
    model = planned_model(folder(args.init), args)
    work = share(model, prompt, step, args, gpus)
    return make_plan(model, work, gpus, bool(getattr(args, "beta", 0)))


def show(args: argparse.Namespace, step: Step, split: str) -> None:
    """--plan: prints the table for --gpus of --memory; one line and exit status 2 where the run
    does not fit."""
    if step.groups % args.gpus:
        runtime.fail(f"{step.groups} records a step can't be shared out among --gpus {args.gpus}; "
                     "take a multiple")
    processor = Processor.from_pretrained(folder(args.init), max_pixels=args.max_pixels)
    if args.image:
        prompt = longest_prompt(processor, [tuple(args.image)], [])
    else:
        records = load(args.data, args.root, split, args.coords, args.stretch)
        prompt = longest_of(processor, records)
    check(args, step, prompt, args.gpus, args.memory * GIB)


def check_gpu(
        args: argparse.Namespace, step: Step, processor: Processor, records: Sequence[Record],
        device: torch.device) -> None:
    """Before a run on GPUs: the same table for what is there, and the same refusal."""
    if device.type == "cuda":
        available = torch.cuda.get_device_properties(device).total_memory
        check(args, step, longest_of(processor, records), runtime.world(), available)


def dry_step(
        model: QwenVL, opt: torch.optim.Optimizer, reference: QwenVL | None, work: Workload,
) -> None:
    """Runs the costliest passes of a step once, on a GPU, before step 1.

    Weights stay as they are, and moments come to lie there as 0, which is what the optimizer
    begins with. One line and exit status 2 where memory runs out.
    """
    if model.device.type != "cuda":
        return
    try:
        runtime.fill_moments(model, opt)
        if work.samples:
            with runtime.gathered(model) as sampler:
                sampling_pass(sampler, work)
        # The second finds the gradients of the first in its way, as in a step of several passes.
        for _ in range(2):
            update_pass(model, reference, work)
    except torch.OutOfMemoryError as error:
        runtime.fail(
            f"a step of the longest prompt and completions runs out of memory ({error}); lower "
            "--micro-tokens or --max-pixels, or see what --plan says of other flags")
    model.zero_grad(set_to_none=True)
    if runtime.rank() == 0:
        print(f"the costliest passes fit: {runtime.peak_memory(model):.2f} GiB at most",
              flush=True)


def longest_of(processor: Processor, records: Sequence[Record]) -> Prompt:
    sizes = [record.size for record in records]
    return longest_prompt(processor, sizes, [record.text for record in records])


def check(
        args: argparse.Namespace, step: Step, prompt: Prompt, gpus: int, available: float,
) -> None:
    """Prints the table; one line that names flags which help where a GPU has less."""
    plan = plan_of(args, step, prompt, gpus)
    if runtime.rank() == 0:
        print(table(plan, gpus, available), flush=True)
    if plan.peak <= available:
        return
    smaller = argparse.Namespace(**vars(args))
    taken = []
    for words, (name, value) in REMEDIES.items():
        present = getattr(smaller, name, value)
        if present == value or name == "micro_tokens" and present < value:
            continue
        setattr(smaller, name, value)
        taken.append(words)
        peak = plan_of(smaller, step, prompt, gpus).peak
        if peak <= available:
            runtime.fail(
                f"the run needs {plan.peak / GIB:.1f} GiB of a GPU that has "
                f"{available / GIB:.1f}; with {' '.join(taken)} it needs {peak / GIB:.1f}")
    runtime.fail(
        f"the run needs {plan.peak / GIB:.1f} GiB of a GPU that has {available / GIB:.1f}, and "
        f"{peak / GIB:.1f} with {' '.join(taken)}; take more GPUs, or smaller images by "
        "--max-pixels")
