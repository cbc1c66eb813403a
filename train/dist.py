"""Processes, device, sharding (FSDP2), optimizer. Imports nothing else of this project.

Trained parameters, their moments and gradient sums are float32. Passes compute in bfloat16
on CUDA and in float32 on the CPU.

Gradients are summed over processes, not averaged, because a loss is already divided by the
token count of the whole step, over all processes. So the number of processes changes
rounding only.
"""
import faulthandler
import itertools
import math
import os
import resource
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from tqdm import tqdm

T = TypeVar("T")
# Seconds without a step before every process prints its stack.
STUCK_AFTER = 1800
# How long a process waits for another one.
GROUP_TIMEOUT = timedelta(seconds=2 * STUCK_AFTER)
# Tokens that a patch of a trained vision tower counts as in --micro-tokens. Calculated for
# the 3B model: the backward pass needs 2.02 MB per patch and 4.68 MB per token.
PATCH_TOKENS = 0.43
# Linux lists NVIDIA GPUs as /dev/nvidia0 ..., and the version of their driver here.
GPU_FILES = Path("/dev")
DRIVER_FILE = Path("/proc/driver/nvidia/version")
# Key-value store of all processes, alive before and after the process group.
STORE: dist.Store | None = None


# ---------------------------------------------------------------- processes

def rank() -> int:
    """Number of this process, from 0; torchrun sets it."""
    return int(os.environ.get("RANK", 0))


def world() -> int:
    """Number of processes."""
    return int(os.environ.get("WORLD_SIZE", 1))


def fail(message: object) -> NoReturn:
    """Ends the script after a user's mistake: one line on stderr, exit status 2.

    If several processes fail, only the first prints: the others made the same mistake, or
    fail because the first is gone.
    """
    if first_to_fail():
        print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    sys.exit(2)


def open_store() -> None:
    """Connects to the store of torchrun's processes, before they form a group.

    The store outlives the processes, so they can agree on which one prints an error.
    """
    global STORE
    if world() > 1:
        STORE, _, _ = next(dist.rendezvous("env://", timeout=GROUP_TIMEOUT))


def first_to_fail() -> bool:
    """Whether this process fails before all others, and so prints the error."""
    if STORE is None:
        return rank() == 0
    try:
        return STORE.compare_set("failed", "", str(rank())) == str(rank()).encode()
    except RuntimeError:
        # The store ended with the launcher. An error printed twice is better than none.
        return True


def lost_peer(error: Exception) -> bool:
    """Whether gloo or NCCL raised this error because another process is gone."""
    return isinstance(error, dist.DistError) or "/gloo/" in str(error)


def choose_device(asked: str | None) -> str:
    """"cuda" or "cpu": as --device asks, by default CUDA if torch can use it.

    If torch cannot use a GPU that is present, stop: a silent CPU run would be 100 times
    slower.
    """
    if asked == "cpu" or torch.cuda.is_available():
        return asked or "cuda"
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    gpu = ""
    if not hidden and any(GPU_FILES.glob("nvidia[0-9]*")):
        driver = "of an unknown version"
        if DRIVER_FILE.exists():
            words = DRIVER_FILE.read_text(encoding="utf-8", errors="replace").split()
            driver = next((word for word in words if word[:1].isdigit()), driver)
        built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
        gpu = f" (NVIDIA driver {driver}; torch {torch.__version__} {built})"
    if asked == "cuda":
        fail(f"--device cuda, but torch sees no CUDA device{gpu}; use --device cpu")
    if gpu:
        fail(f"torch cannot use the GPU{gpu}; install a torch that fits the driver "
             "(pytorch.org lists them), or use --device cpu")
    return "cpu"


def start(device: str, deterministic: bool = False) -> torch.device:
    """Joins the processes that torchrun started -> this process's device.

    device: "cuda" or "cpu". A single process on CUDA forms a group of its own, because only
    sharded models (FSDP2) have bfloat16 copies of float32 parameters to compute with.
    """
    faulthandler.enable()
    group: dict[str, Any] = {}
    words = f"the CPU, {torch.get_num_threads()} threads a process; torch {torch.__version__}"
    if device == "cuda":
        # The lengths of passes vary from step to step; blocks that can grow are reused.
        if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
            os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        torch.backends.cuda.matmul.allow_tf32 = True
        if deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            # Makes flash attention's backward pass add in a fixed order. warn_only, because
            # sampling sums float64 probabilities by a kernel that has no such order; rounding
            # there matters only if a draw lies within 1e-13 of a boundary.
            torch.use_deterministic_algorithms(True, warn_only=True)
        device = f"cuda:{torch.cuda.current_device()}"
        group["device_id"] = torch.device(device)
        gigabytes = torch.cuda.get_device_properties(device).total_memory / 1e9
        order = "deterministic" if deterministic else "a resume repeats it to rounding"
        words = (f"{world()} x {torch.cuda.get_device_name(device)} ({gigabytes:.0f} GB); torch "
                 f"{torch.__version__}, CUDA {torch.version.cuda}; {order}")
    if world() > 1 or device != "cpu":
        # gloo next to NCCL, because sums for the log are on the CPU.
        backend = "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"
        store = STORE if "RANK" in os.environ else dist.HashStore()
        if store is not None:
            group |= {"store": store, "rank": rank(), "world_size": world()}
        dist.init_process_group(backend, timeout=GROUP_TIMEOUT, **group)
    if rank() == 0:
        print(f"computing on {words}", flush=True)
    return torch.device(device)


def all_sum(x: Tensor) -> Tensor:
    """Sum over all processes."""
    if dist.is_initialized():
        x = x.clone()
        dist.all_reduce(x)
    return x


def all_max(x: Tensor) -> Tensor:
    """Maximum over all processes."""
    if dist.is_initialized():
        x = x.clone()
        dist.all_reduce(x, dist.ReduceOp.MAX)
    return x


def all_gather(x: Tensor) -> Tensor:
    """(n, ...) on each process, of one shape -> (world * n, ...), by rank."""
    if not dist.is_initialized():
        return x
    parts = [torch.empty_like(x) for _ in range(world())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def gather_lists(own: Sequence[T]) -> list[T]:
    """The items of all processes in one list, by rank; lengths may differ."""
    if not dist.is_initialized():
        return list(own)
    parts: list[Any] = [None] * world()
    dist.all_gather_object(parts, list(own))
    return list(itertools.chain.from_iterable(parts))


def barrier() -> None:
    """Waits for all processes."""
    if dist.is_initialized():
        dist.barrier()


@contextmanager
def raise_on_all_processes() -> Iterator[None]:
    """Waits for all processes at its end; an OSError inside one of them is raised in all.

    So no process waits forever for one that could not write. The first process with an
    error raises its own, the others an OSError without a text.
    """
    problem = None
    try:
        yield
    except OSError as error:
        problem = error
    first = -int(all_max(torch.tensor(-(rank() if problem else world()))))
    if first < world():
        raise problem if first == rank() else OSError()


def print_above_bar(text: str) -> None:
    """Prints a line on stderr, above the progress bar."""
    tqdm.write(text, file=sys.stderr)


def check_writable(folder: str | Path) -> Path:
    """Makes a folder and its parents; ends the script if no file can be written there."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        fail(f"nothing can be written to {folder} ({error.strerror}); "
             "name another folder with --out")
    return Path(folder)


# ---------------------------------------------------------------- model

def compute_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on CUDA, float32 on the CPU."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def prepare(
        model: nn.Module, device: torch.device, dtype: torch.dtype | None = None,
) -> nn.Module:
    """Makes a loaded model ready for training: float32, on the device, sharded by layers.

    requires_grad must be set before. dtype: of passes, default compute_dtype(device).
    A single process on the CPU does not shard and computes in float32.
    """
    if not dist.is_initialized():
        return model.float().to(device)
    dtype = dtype or compute_dtype(device)
    dtypes = {}
    if dtype != torch.float32:
        dtypes = {"param_dtype": dtype, "reduce_dtype": torch.float32}
    policy = MixedPrecisionPolicy(**dtypes, cast_forward_inputs=False)
    mesh = init_device_mesh(device.type, (world(),))
    # The base of LoRA adapters is never saved, so the compute dtype is enough for it. FSDP2
    # asks for one dtype only among the trained parameters of a module.
    adapted = any(hasattr(module, "lora_A") for module in model.modules())
    frozen_dtype = dtype if adapted else torch.float32
    # Inner modules first: an outer one takes the parameters that are left. A layer becomes
    # float32 just before it is sharded, so only one whole float32 layer exists at a time.
    modules = (*model.visual.blocks, *model.model.layers, model.visual, model)
    for module in modules:
        for x in (*module.parameters(), *module.buffers()):
            if x.is_floating_point():
                x.data = x.data.to(torch.float32 if x.requires_grad else frozen_dtype)
        fully_shard(module, mesh=mesh, mp_policy=policy)
    for module in modules:
        # Sum gradients: the loss is already divided by the token count of all processes.
        module.set_gradient_divide_factor(1.0)
        # With a divide factor FSDP2 uses a scaled sum that only NCCL has; this flag makes it
        # use the plain sum, which gloo has as well.
        module.set_force_sum_reduction_for_comms(True)
    # FSDP2 wraps forward() only; this method needs unsharded parameters as well.
    register_fsdp_forward_method(model, "score")
    return model


@contextmanager
def gathered(model: nn.Module) -> Iterator[nn.Module]:
    """The model to sample with: each process has all parameters, no pass communicates.

    Processes make different numbers of forward passes when they sample, because answers
    differ in length. With sharded parameters each pass would wait for the other processes,
    and the longest answer would wait forever. A model that is not sharded is yielded as is.
    """
    modules = [m for m in model.modules() if isinstance(m, FSDPModule)]
    for module in modules:
        module.unshard()
    try:
        yield unhooked(model) if modules else model
    finally:
        for module in modules:
            module.reshard()


def unhooked(module: nn.Module) -> nn.Module:
    """A copy of a module tree without FSDP2's hooks; parameters and buffers are shared.

    While parameters are gathered the hooks do nothing, but they take a fifth of the host's
    time in decoding, and cannot be captured in a CUDA graph.
    """
    # FSDP2 has put a class of its own before the module's.
    kind = next(c for c in type(module).__mro__ if not issubclass(c, FSDPModule))
    twin = kind.__new__(kind)
    nn.Module.__init__(twin)
    for name, value in vars(module).items():
        # nn.Module's own attributes, hooks among them, stay empty in the twin. A method among
        # the attributes is one that FSDP2 has wrapped.
        if name not in vars(twin) and not callable(getattr(kind, name, None)):
            setattr(twin, name, value)
    for name in ("_parameters", "_buffers", "_non_persistent_buffers_set"):
        vars(twin)[name].update(vars(module)[name])
    for name, child in module.named_children():
        twin._modules[name] = unhooked(child)
    return twin.train(module.training)


def local_rows(x: Tensor) -> Tensor:
    """This process's rows of a tensor: all of them if it is not sharded."""
    return x.to_local() if isinstance(x, DTensor) else x


# ---------------------------------------------------------------- optimizer

def optimizer(model: nn.Module, lr: float) -> torch.optim.AdamW:
    """AdamW on float32 parameters, without weight decay: fine-tuning runs are short."""
    trained = [p for p in model.parameters() if p.requires_grad]
    fused = trained[0].is_cuda or None
    return torch.optim.AdamW(trained, lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=fused)


def lr_at(step: int, steps: int, peak: float, warmup: float = 0.03) -> float:
    """Learning rate of step 0, ..., steps - 1: linear warm-up, then a cosine to peak / 10."""
    warmup_steps = max(1, round(warmup * steps))
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    angle = math.pi * (step - warmup_steps) / max(1, steps - warmup_steps)
    return peak * (0.1 + 0.9 * 0.5 * (1 + math.cos(angle)))


def update(model: nn.Module, opt: torch.optim.Optimizer, lr: float) -> float:
    """One optimizer step, gradient clipped to norm 1 -> the norm before clipping.

    The norm is over all parameters and processes. If it is not finite, the step is skipped.
    Gradients are cleared in any case.
    """
    trained = [p for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in trained])
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    if norm.isfinite():
        torch.nn.utils.clip_grads_with_norm_(trained, max_norm=1.0, total_norm=norm)
        for group in opt.param_groups:
            group["lr"] = lr
        opt.step()
    opt.zero_grad(set_to_none=True)
    return norm.item()


def peak_memory(device: torch.device) -> float:
    """GiB that this process has used at most: of the GPU, or on the CPU of main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2 ** 30
    # Linux counts in KiB, macOS in bytes.
    unit = 2 ** (20 if sys.platform == "linux" else 30)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def memory_tokens(model: nn.Module, prompt: Any, completion_tokens: int) -> int:
    """What --micro-tokens counts of a prompt and its completions.

    Packed tokens, and the image's patches by the memory that they need in comparison with a
    token (ours). A vision tower without trained parameters keeps nothing.
    """
    tokens = len(prompt.input_ids) + completion_tokens
    if any(p.requires_grad for p in model.visual.parameters()):
        tokens += round(PATCH_TOKENS * int(prompt.image_grid_thw.prod(-1).sum()))
    return tokens


def micro_batches(tokens: Sequence[int], budget: int) -> list[slice]:
    """Cuts this process's items of a step into micro-batches -> slices of neighbors.

    tokens: memory_tokens() of each item. The slices are as few as keep each within the
    budget, and equally long, give or take one item; an item alone may exceed the budget.
    Every process gets the same number of slices, because FSDP2 passes need all processes.

    >>> micro_batches([5, 1, 9, 2], budget=12)        # 6 and 11 tokens
    [slice(0, 2, None), slice(2, 4, None)]
    """
    count = 1
    while count < len(tokens):
        slices = equal_slices(len(tokens), count)
        if max(sum(tokens[s]) for s in slices) <= budget:
            break
        count += 1
    return equal_slices(len(tokens), int(all_max(torch.tensor(count))))


def equal_slices(n: int, count: int) -> list[slice]:
    """n items in `count` slices of neighbors; lengths differ by one at most."""
    edges = [n * i // count for i in range(count + 1)]
    return [slice(first, end) for first, end in zip(edges, edges[1:])]
