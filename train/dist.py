"""Processes, device, sharding (FSDP2), optimizer.

Gradients are summed over processes, not averaged: a loss is already divided by the token
count of the whole step, over all processes. So the number of processes affects only rounding.
"""
import faulthandler
import math
import os
import resource
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import fsdp
from torch.distributed.tensor import DTensor

# After this many seconds without a step every process prints its stack; after twice as many, a
# process that waits for another one gives up.
STUCK_AFTER = 1800
GROUP_TIMEOUT = timedelta(seconds=2 * STUCK_AFTER)
# In --micro-tokens, a patch of a trained vision tower counts as this many tokens: the backward
# pass of the 3B model needs 2.02 MB per patch and 4.68 MB per token.
PATCH_TOKENS = 0.43
# bfloat16 is slower than float32 on a CPU.
COMPUTE_DTYPES = {"cuda": torch.bfloat16, "cpu": torch.float32}
# Linux lists NVIDIA GPUs as /dev/nvidia0 ..., and the version of their driver in a file.
GPU_FILES = Path("/dev")
DRIVER_FILE = Path("/proc/driver/nvidia/version")
# Key-value store of all processes, which run.launch opens before the process group.
STORE: dist.Store | None = None


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def world() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def fail(message: object) -> NoReturn:
    """Ends the script after a user's mistake: one line on stderr, exit status 2."""
    if first_to_fail():
        print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    sys.exit(2)


def first_to_fail() -> bool:
    """Whether to print this process's error: the others usually fail because of the first."""
    if STORE is None:
        return rank() == 0
    try:
        return STORE.compare_set("failed", "", str(rank())) == str(rank()).encode()
    except RuntimeError:
        # The store ended with the launcher. An error printed twice is better than none.
        return True


def choose_device(asked: str | None) -> str:
    """"cuda" or "cpu": as --device asks, by default CUDA if torch can use it."""
    if asked == "cpu" or torch.cuda.is_available():
        return asked or "cuda"
    gpu = ""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if not hidden and any(GPU_FILES.glob("nvidia[0-9]*")):
        text = DRIVER_FILE.read_text(errors="replace") if DRIVER_FILE.exists() else ""
        driver = next((word for word in text.split() if word[0].isdigit()), "unknown")
        built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
        gpu = f" (NVIDIA driver {driver}; torch {torch.__version__} {built})"
    if asked == "cuda":
        fail(f"--device cuda, but torch sees no CUDA device{gpu}; use --device cpu")
    # If torch cannot use a GPU that is present, stop: a silent CPU run would be 100x slower.
    if gpu:
        fail(f"torch cannot use the GPU{gpu}; install a torch that fits the driver "
             "(pytorch.org lists them), or use --device cpu")
    return "cpu"


def start(device: str, deterministic: bool = False) -> torch.device:
    """Joins the processes that torchrun started -> this process's device. On CUDA a single process
    forms a group as well: only sharded models (FSDP2) have bfloat16 copies of float32 parameters
    to compute with."""
    faulthandler.enable()
    group: dict[str, Any] = {}
    words = f"the CPU, {torch.get_num_threads()} threads per process; torch {torch.__version__}"
    if device == "cuda":
        # The lengths of passes vary from step to step; blocks that can grow are reused.
        if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
            os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        torch.backends.cuda.matmul.allow_tf32 = True
        if deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            # For flash attention's backward pass. warn_only: sampling's float64 sums have no
            # deterministic kernel, but their rounding matters only within 1e-13 of a draw.
            torch.use_deterministic_algorithms(True, warn_only=True)
        device = f"cuda:{torch.cuda.current_device()}"
        group["device_id"] = torch.device(device)
        gigabytes = torch.cuda.get_device_properties(device).total_memory / 1e9
        order = "deterministic" if deterministic else "a resume repeats it up to rounding"
        words = (f"{world()} x {torch.cuda.get_device_name(device)} ({gigabytes:.0f} GB); torch "
                 f"{torch.__version__}, CUDA {torch.version.cuda}; {order}")
    if world() > 1 or device != "cpu":
        store = STORE if "RANK" in os.environ else dist.HashStore()
        if store is not None:
            group |= {"store": store, "rank": rank(), "world_size": world()}
        # gloo next to NCCL, because sums for the log are on the CPU.
        backend = "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, timeout=GROUP_TIMEOUT, **group)
    if rank() == 0:
        print(f"computing on {words}", flush=True)
    return torch.device(device)


def all_reduce(x: Tensor, op: str = "sum") -> Tensor:
    """Each element's "sum" or "max" over all processes."""
    if dist.is_initialized():
        x = x.clone()
        dist.all_reduce(x, dist.ReduceOp.MAX if op == "max" else dist.ReduceOp.SUM)
    return x


def gather_lists(own: Sequence[Any]) -> list[Any]:
    """The items of all processes in one list, by rank; lengths may differ."""
    if not dist.is_initialized():
        return list(own)
    parts: list[Any] = [None] * world()
    dist.all_gather_object(parts, list(own))
    return sum(parts, [])


@contextmanager
def raise_on_all_processes() -> Iterator[None]:
    """Waits for all processes at its end. If one has an OSError in the block, all raise one: the
    first process with an error its own, the others an OSError without text."""
    own = None
    try:
        yield
    except OSError as error:
        own = error
    first = -int(all_reduce(torch.tensor(-(rank() if own else world())), "max"))
    if first < world():
        raise own if first == rank() else OSError()


def check_writable(folder: str | Path, append: bool = False) -> Path:
    """Makes a folder with its parents; ends the script if no file can be written there, or, with
    `append`, if no line can be appended to one."""
    work = "written to"
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder) as trial:
            if append:
                work = "appended to a file in"
                for _ in range(2):
                    with open(trial.name, "a", encoding="utf-8") as log:
                        log.write("{}\n")
    except OSError as error:
        fail(f"nothing can be {work} {folder} ({error.strerror}); "
             "name another folder with --out")
    return Path(folder)


def prepare(
        model: nn.Module, device: torch.device, dtype: torch.dtype | None = None) -> nn.Module:
    """Makes a loaded model ready for training: float32, on the device, sharded by layers. Set
    requires_grad first. dtype: that of passes; a single CPU process computes in float32."""
    if not dist.is_initialized():
        return model.float().to(device)
    dtype = dtype or COMPUTE_DTYPES[device.type]
    policy = fsdp.MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    mesh = dist.init_device_mesh(device.type, (world(),))
    # The frozen base of adapters is never saved, so it can be in the dtype of passes. (FSDP2 asks
    # for one dtype only among the trained parameters of a module.)
    adapted = any(hasattr(module, "lora_A") for module in model.modules())
    frozen_dtype = dtype if adapted else torch.float32
    # Inner modules first: an outer one takes what is left. Each becomes float32 just before it
    # is sharded, so only one whole float32 layer exists at a time.
    modules = (*model.visual.blocks, *model.model.layers, model.visual, model)
    for module in modules:
        for x in (*module.parameters(), *module.buffers()):
            if x.is_floating_point():
                x.data = x.data.to(torch.float32 if x.requires_grad else frozen_dtype)
        fsdp.fully_shard(module, mesh=mesh, mp_policy=policy)
    for module in modules:
        # FSDP2 averages by default. The flag avoids its scaled sum, which only NCCL has.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    # FSDP2 wraps forward() only; this method needs unsharded parameters as well.
    fsdp.register_fsdp_forward_method(model, "score")
    return model


@contextmanager
def gathered(model: nn.Module) -> Iterator[nn.Module]:
    """The model to sample with: each process has all parameters, so no pass communicates. Processes
    need different numbers of passes; with sharded parameters, the one with most would hang."""
    modules = [m for m in model.modules() if isinstance(m, fsdp.FSDPModule)]
    for module in modules:
        module.unshard()
    try:
        yield unhooked(model) if modules else model
    finally:
        for module in modules:
            module.reshard()


def unhooked(module: nn.Module) -> nn.Module:
    """A copy of a module tree without FSDP2's hooks; parameters and buffers are shared. Hooks take
    a fifth of the host's time in decoding, and cannot be captured in a CUDA graph."""
    # The module's own class, not the subclass that FSDP2 made of it.
    kind = next(c for c in type(module).__mro__ if not issubclass(c, fsdp.FSDPModule))
    twin = kind.__new__(kind)
    nn.Module.__init__(twin)
    for name, value in vars(module).items():
        # The twin's hooks stay empty, and methods that FSDP2 has wrapped are not copied.
        if name not in vars(twin) and not callable(getattr(kind, name, None)):
            setattr(twin, name, value)
    for name in ("_parameters", "_buffers", "_non_persistent_buffers_set"):
        vars(twin)[name].update(vars(module)[name])
    for name, child in module.named_children():
        twin._modules[name] = unhooked(child)
    return twin.train(module.training)


def optimizer(model: nn.Module, lr: float) -> torch.optim.AdamW:
    """AdamW on float32 parameters, without weight decay: fine-tuning runs are short."""
    trained = [p for p in model.parameters() if p.requires_grad]
    fused = trained[0].is_cuda or None
    return torch.optim.AdamW(trained, lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=fused)


def lr_at(step: int, steps: int, peak: float, warmup_steps: int | None = None) -> float:
    """Learning rate of step 0, ..., steps - 1: linear warm-up (default: 3% of the steps), then a
    cosine to peak / 10."""
    if warmup_steps is None:
        warmup_steps = max(1, round(0.03 * steps))
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    angle = math.pi * (step - warmup_steps) / max(1, steps - warmup_steps)
    return peak * (0.1 + 0.9 * 0.5 * (1 + math.cos(angle)))


def update(model: nn.Module, opt: torch.optim.Optimizer, lr: float) -> float:
    """One optimizer step with the gradient clipped to norm 1 -> its norm before clipping. If the
    norm is not finite, the step is skipped."""
    trained = [p for p in model.parameters() if p.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in trained])
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    if norm.isfinite():
        nn.utils.clip_grads_with_norm_(trained, max_norm=1.0, total_norm=norm)
        for group in opt.param_groups:
            group["lr"] = lr
        opt.step()
    opt.zero_grad(set_to_none=True)
    return norm.item()


def peak_memory(device: torch.device) -> float:
    """Most memory that this process has used so far, in GiB: on the GPU, or main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2 ** 30
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / 2 ** (20 if sys.platform == "linux" else 30)      # KiB; macOS: bytes


def memory_tokens(model: nn.Module, prompt: Any, completion_tokens: int) -> int:
    """What --micro-tokens counts: packed tokens, and patches if the vision tower is trained."""
    tokens = len(prompt.input_ids) + completion_tokens
    if any(p.requires_grad for p in model.visual.parameters()):
        tokens += round(PATCH_TOKENS * int(prompt.image_grid_thw.prod(-1).sum()))
    return tokens


def micro_batches(tokens: Sequence[int], budget: int) -> list[slice]:
    """Cuts this process's items of a step into micro-batches within a budget.

    tokens: memory_tokens() of each item; one alone may exceed the budget. Every process gets the
    same number of slices, because FSDP2's passes need all processes.

    >>> micro_batches([5, 1, 9, 2], budget=12)        # 6 and 11 tokens
    [slice(0, 2, None), slice(2, 4, None)]
    """
    n = len(tokens)
    count = 1
    while count < n and max(sum(tokens[s]) for s in equal_slices(n, count)) > budget:
        count += 1
    return equal_slices(n, int(all_reduce(torch.tensor(count), "max")))


def equal_slices(n: int, count: int) -> list[slice]:
    """Cuts n items into `count` slices; lengths differ by one at most."""
    edges = [n * i // count for i in range(count + 1)]
    return [slice(first, end) for first, end in zip(edges, edges[1:])]
