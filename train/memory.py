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
import functools
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model import Config, QwenVL
from qwen import generate, lora
from qwen.answer import PROMPT
from qwen.hub import ADAPTER_CONFIG, base_folder, folder
from qwen.processor import Pixels, Processor, Prompt, smart_resize
from readers.base import Record
from train import checkpoints, dist
from train import run as runtime

GIB = 2 ** 30
# CUDA's own share of a GPU and what the allocator can't hand out: libraries, NCCL's buffers,
# blocks of the wrong size. An allowance, not a count.
RESERVE = 1.5 * GIB
# Ids of an expression where no data set says how long its longest is.
TEXT_TOKENS = 48
# A validation answers so many records at once, or fewer where their prompts have more tokens
# together: at 3B's widths these take 4 GiB.
VALIDATION_RECORDS = 32
VALIDATION_TOKENS = 2 ** 14


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
    tokens: int                # of a completion at most
    samples: bool              # whether the model writes the completions itself
    updates: int = 1           # optimizer steps that share the groups out


# Of some records a stage's Step; of none, what is known without the data.
StepSize = Callable[[Processor, Sequence[Record]], Step]


@dataclass(frozen=True)
class Longest:
    """The longest prompts that a run meets."""

    train: Prompt
    val: Prompt | None         # None: there is none to validate on


@dataclass(frozen=True)
class Pass:
    """A pass over copies of one prompt."""

    prompt: Prompt
    groups: int                # copies of it
    rollouts: int              # completions of each
    tokens: int                # of a completion


@dataclass(frozen=True)
class Workload:
    """The costliest passes that a process may meet."""

    update: Pass               # a micro-batch, with its gradient
    sampling: Pass | None      # a step's rollouts
    validation: Pass | None    # the answers to some records at once


def share(
        model: QwenVL, longest: Longest, step: Step, args: argparse.Namespace, gpus: int,
) -> Workload:
    """A process's share of the costliest step and validation that these prompts can make."""
    groups = step.groups // gpus
    sampling = Pass(longest.train, groups, step.rollouts, step.tokens)
    validation = None
    if args.val and longest.val is not None:
        records = min(-(-args.val // gpus), validation_batch(longest.val))
        validation = Pass(longest.val, records, 1, args.max_new_tokens)
    update = costliest_update(model, sampling, groups // step.updates, args.micro_tokens)
    return Workload(update, sampling if step.samples else None, validation)


def costliest_update(model: QwenVL, step: Pass, groups: int, budget: int) -> Pass:
    """The micro-batch of such groups, of which an optimizer step has so many, that keeps most."""
    prompt = dist.memory_tokens(model, step.prompt, 0)
    fit = max(1, budget // (prompt + step.rollouts * step.tokens))
    if fit >= groups:
        return replace(step, groups=groups)
    # Of shorter prompts and completions more may come into one pass, until the budget is used
    # up. Longer completions of these groups stand for them.
    tokens = (budget // fit - prompt) // step.rollouts
    return replace(step, groups=fit, tokens=max(step.tokens, tokens))


def validation_batch(longest: Prompt) -> int:
    """How many records a validation answers at once; longest: of their prompts."""
    return min(VALIDATION_RECORDS, max(1, VALIDATION_TOKENS // len(longest.input_ids)))


def longest_of(
        processor: Processor, records: Sequence[Record], val: Sequence[Record]) -> Longest:
    """The longest prompts of the records to train on, and of those to validate on."""
    prompts = []
    for part in (records, val):
        texts = [record.text for record in part]
        sizes = [record.size for record in part]
        prompts.append(longest_prompt(processor, sizes, texts) if part else None)
    return Longest(*prompts)


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


def update_pass(model: QwenVL, reference: QwenVL | None, batch: Pass) -> None:
    """Scores a micro-batch and takes its gradient, as a step does."""
    prompts = [batch.prompt] * batch.groups
    completion = torch.zeros(batch.tokens, dtype=torch.long)
    completions = [[completion] * batch.rollouts] * batch.groups
    logp, _ = model.score(prompts, completions)
    if reference is not None:
        with torch.no_grad(), lora.reference(reference):
            reference.score(prompts, completions)
    (-logp.mean()).backward()


@torch.no_grad()
def sampling_pass(model: QwenVL, batch: Pass) -> None:
    """Prefills prompts and decodes a token of each rollout, as a step or a validation does."""
    prompts = [batch.prompt] * batch.groups
    logits, cache, positions = model.prefill(prompts, batch.rollouts, batch.tokens)
    logits = logits.repeat_interleave(batch.rollouts, 0)
    random = torch.zeros(len(logits), dtype=torch.double, device=logits.device)
    tokens = generate.draw(model.distribution(logits, 1.0), random)
    model.decode(tokens, positions.repeat_interleave(batch.rollouts), cache)


# ---------------------------------------------------------------- the plan

@dataclass(frozen=True)
class Plan:
    """Bytes that one GPU needs, by what they are for.

    standing: there all the time; sampling, update, validation: beside it in these phases.
    """

    standing: dict[str, float]
    sampling: dict[str, float]
    update: dict[str, float]
    validation: dict[str, float] = field(default_factory=dict)

    @property
    def peak(self) -> float:
        phases = (self.sampling, self.update, self.validation)
        return sum(self.standing.values()) + max(sum(phase.values()) for phase in phases)


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
    elif reference:
        starts = [p for name, p in model.named_buffers() if "start_" in name]
        standing["starting adapters, bfloat16, on each GPU"] = 2 * sum(p.numel() for p in starts)
    standing["CUDA and fragments (allowance)"] = RESERVE
    update = {
        "gradients, float32": 4 * trained / gpus,
        "layers gathered in bfloat16": gathered_bytes(model),
        "activations and logits": update_bytes(model, work.update, reference),
    }
    phases = []
    for batch in (work.sampling, work.validation):
        phases.append({} if batch is None else {
            "weights for sampling, bfloat16, on each GPU": 2 * total,
            "KV cache, prompts, logits": sampling_bytes(model, batch)})
    sampling, validation = phases
    return Plan(standing, sampling, update, validation)


def update_bytes(model: QwenVL, batch: Pass, reference: bool) -> int:
    """The most that a forward and backward pass holds beside weights and gradients."""
    # A gradient leaves as soon as it is whole: it is reduced to its float32 part, which
    # make_plan counts.
    handles = [p.register_post_accumulate_grad_hook(drop_gradient)
               for p in model.parameters() if p.requires_grad]
    counter = ByteCounter([*model.parameters(), *model.buffers()])
    with whole_norms(), counter:
        update_pass(model, model if reference else None, batch)
    for handle in handles:
        handle.remove()
    return counter.peak


def drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def sampling_bytes(model: QwenVL, batch: Pass) -> int:
    """The most that prefill and decoding hold beside the weights."""
    counter = ByteCounter([*model.parameters(), *model.buffers()])
    with whole_norms(), counter:
        sampling_pass(model, batch)
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
        "while validating, beside that": plan.validation,
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
    from_adapter = (init / ADAPTER_CONFIG).exists()
    if from_adapter:
        lora.load(model, init, None, "meta")
    lora.fit(model, argparse.Namespace(**vars(args)))
    if from_adapter and getattr(args, "beta", 0):
        for layer in lora.adapted(model).values():
            layer.start_A = layer.lora_A.detach()
            layer.start_B = layer.lora_B.detach()
    runtime.choose_trained(model, args.freeze_vision, args.gradient_checkpointing)
    return model.to(torch.bfloat16)


def plan_of(args: argparse.Namespace, step: Step, longest: Longest, gpus: int) -> Plan:
    """The plan of the run that the flags describe."""
    model = planned_model(folder(args.init), args)
    work = share(model, longest, step, args, gpus)
    return make_plan(model, work, gpus, bool(getattr(args, "beta", 0)))


def show(args: argparse.Namespace, step_size: StepSize, split: str) -> None:
    """--plan: prints the table for --gpus of --memory; one line and exit status 2 where the run
    does not fit."""
    processor = Processor.from_pretrained(folder(args.init), max_pixels=args.max_pixels)
    if args.image:
        prompt = longest_prompt(processor, [tuple(args.image)], [])
        longest = Longest(prompt, prompt)
        step = step_size(processor, [])
    else:
        run = Run(processor, *runtime.load_records(args, split), step_size)
        longest = run.longest
        step = run.step
    share_out = args.gpus * step.updates
    if step.groups % share_out:
        dist.fail(f"{step.groups} records a step can't be shared out among --gpus {args.gpus}"
                     f"{' and the minibatches' if step.updates > 1 else ''}; take a multiple of "
                     f"{share_out}")
    check(args, step, longest, args.gpus, args.memory * GIB)


@dataclass
class Run:
    """What a run's memory depends on beside its flags; looked up when it is asked for."""

    processor: Processor
    records: Sequence[Record]
    val: Sequence[Record]
    step_size: StepSize

    @functools.cached_property
    def step(self) -> Step:
        return self.step_size(self.processor, self.records)

    @functools.cached_property
    def longest(self) -> Longest:
        return longest_of(self.processor, self.records, self.val)


def check_gpu(args: argparse.Namespace, run: Run, device: torch.device) -> None:
    """Before a run on GPUs: the same table for what is there, and the same refusal."""
    if device.type == "cuda":
        available = torch.cuda.get_device_properties(device).total_memory
        check(args, run.step, run.longest, dist.world(), available)


def try_out(
        model: QwenVL, opt: torch.optim.Optimizer, reference: QwenVL | None, run: Run,
        args: argparse.Namespace) -> None:
    """Before step 1 on GPUs: the costliest passes that the run may meet (`dry_step`)."""
    if model.device.type == "cuda":
        work = share(model, run.longest, run.step, args, dist.world())
        dry_step(model, opt, reference, work)


def dry_step(
        model: QwenVL, opt: torch.optim.Optimizer, reference: QwenVL | None, work: Workload,
) -> None:
    """Runs the costliest passes of a step once, on a GPU, before step 1.

    Weights stay as they are, and moments come to lie there as 0, which is what the optimizer
    begins with. One line and exit status 2 where memory runs out.
    """
    try:
        checkpoints.fill_moments(model, opt)
        for batch in (work.sampling, work.validation):
            if batch is not None:
                with dist.gathered(model) as sampler:
                    sampling_pass(sampler, batch)
        # The second finds the gradients of the first in its way, as in a step of several passes.
        for _ in range(2):
            update_pass(model, reference, work.update)
    except torch.OutOfMemoryError as error:
        dist.fail(
            f"a step of the longest prompt and completions runs out of memory ({error}); lower "
            "--micro-tokens or --max-pixels, or see what --plan says of other flags")
    model.zero_grad(set_to_none=True)
    if dist.rank() == 0:
        print(f"the costliest passes fit: {dist.peak_memory(model.device):.2f} GiB at most",
              flush=True)


def check(
        args: argparse.Namespace, step: Step, longest: Longest, gpus: int, available: float,
) -> None:
    """Prints the table; one line that names flags which help where a GPU has less."""
    plan = plan_of(args, step, longest, gpus)
    if dist.rank() == 0:
        print(table(plan, gpus, available), flush=True)
    if plan.peak <= available:
        return

    def peak_with(names: Sequence[str]) -> float:
        smaller = argparse.Namespace(**vars(args) | {name: remedies[name] for name in names})
        return plan_of(smaller, step, longest, gpus).peak

    needs = f"the run needs {plan.peak / GIB:.1f} GiB of a GPU that has {available / GIB:.1f}"
    remedies = remedies_of(args)
    taken: list[str] = []
    peak = plan.peak
    for name in remedies:
        if peak > available:
            taken.append(name)
            peak = peak_with(taken)
    if peak > available:
        helps = peak < plan.peak
        least = f"{peak / GIB:.1f} with {as_flags(remedies)}; " if helps else ""
        dist.fail(f"{needs}; {least}take more GPUs, or smaller images by --max-pixels")
    # Of two that were taken the later may do alone. What changes the result goes first.
    for name in ("beta", "val", "micro_tokens", "gradient_checkpointing"):
        others = [other for other in taken if other != name]
        if name in taken and others and peak_with(others) <= available:
            taken = others
    dist.fail(
        f"{needs}; with {as_flags({name: remedies[name] for name in taken})} it needs "
        f"{peak_with(taken) / GIB:.1f}")


def remedies_of(args: argparse.Namespace) -> dict[str, Any]:
    """Flags with values that make this run smaller, in the order in which they cost least."""
    remedies = {}
    if not args.gradient_checkpointing:
        remedies["gradient_checkpointing"] = True
    if args.micro_tokens > 1024:
        remedies["micro_tokens"] = 1024
    if args.val:
        remedies["val"] = 0
    if getattr(args, "beta", 0) and not args.lora:
        remedies["beta"] = 0
    rank = lora.rank_of(folder(args.init)) or 64
    if not args.lora or args.lora > rank:
        remedies["lora"] = rank
    return remedies


def as_flags(remedies: dict[str, Any]) -> str:
    """The flags as one types them."""
    words = []
    for name, value in remedies.items():
        words.append(f"--{name.replace('_', '-')}")
        if value is not True:
            words.append(str(value))
    return " ".join(words)
