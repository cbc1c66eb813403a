"""train.dist."""
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

from model import QwenVL
from qwen import lora
from qwen.processor import Prompt

T = TypeVar("T")
# Seconds without a step, after which every process prints where it is.
STUCK_AFTER = 1800
# What a patch of the trained vision tower counts in --micro-tokens: at the widths of the 3B
# model it keeps 2.02 MB for the backward pass, and a token 4.68 MB (counted, not measured).
PATCH_TOKENS = 0.43
# Where a Linux system shows its NVIDIA GPUs and their driver.
GPU_FILES = Path("/dev")
DRIVER_FILE = Path("/proc/driver/nvidia/version")
# How long a process waits for another one.
GROUP_TIMEOUT = timedelta(seconds=2 * STUCK_AFTER)
# What the processes share before and behind their group; None for a lone process.
STORE: dist.Store | None = None
T = TypeVar("T")


def fail(message: object) -> NoReturn:
    """Ends the script after a user's mistake: one line, exit status 2.

    Where several processes fail, the first alone says why: the others meet the same
    mistake, or fail because the first is gone.
    """
    if first_to_fail():
        print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    sys.exit(2)


# ---------------------------------------------------------------- processes

def rank() -> int:
    """Number of this process, from 0; torchrun sets it."""
    return int(os.environ.get("RANK", 0))


def world() -> int:
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE", 1))


def meet() -> None:
    """Opens the store that torchrun's processes share, before they join a group.

    It outlives each of them: so they can agree on who speaks, whichever is gone.
    """
    global STORE
    if world() > 1:
        STORE, _, _ = next(dist.rendezvous("env://", timeout=GROUP_TIMEOUT))


def first_to_fail() -> bool:
    """Whether this process is the first of all that fails: it alone says why."""
    if STORE is None:
        return rank() == 0
    try:
        return STORE.compare_set("failed", "", str(rank())) == str(rank()).encode()
    except RuntimeError:
        # The store is gone with the launcher: silence would be worse than a repetition.
        return True


def lost_peer(error: Exception) -> bool:
    """Whether an error came about because another process is gone, as gloo or NCCL tell it."""
    return isinstance(error, dist.DistError) or "/gloo/" in str(error)


def choose_device(asked: str | None) -> str:
    """"cuda" or "cpu": what --device asks for, and without it CUDA where torch can use it.

    A GPU that is there and that torch can't use is never left for the CPU unasked: that
    would be a run a hundred times slower, and nothing would say so.
    """
    if asked == "cuda" and not torch.cuda.is_available():
        fail(f"--device cuda, but torch sees no CUDA device{unusable_gpu()}; use --device cpu")
    if asked is None and not torch.cuda.is_available() and unusable_gpu():
        fail(f"torch can't use the GPU{unusable_gpu()}; install a torch that fits the driver "
             "(pytorch.org lists them), or ask for --device cpu")
    return asked or ("cuda" if torch.cuda.is_available() else "cpu")


def unusable_gpu() -> str:
    """Of GPUs that torch does not see: " (NVIDIA driver 535.0; torch 2.13.0 for CUDA 13.0)"; ""
    where there are none."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if hidden or not any(GPU_FILES.glob("nvidia[0-9]*")):
        return ""
    driver = "of an unknown version"
    if DRIVER_FILE.exists():
        words = DRIVER_FILE.read_text(encoding="utf-8", errors="replace").split()
        driver = next((word for word in words if word[:1].isdigit()), driver)
    built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    return f" (NVIDIA driver {driver}; torch {torch.__version__} {built})"


def start(device: str, deterministic: bool = False) -> torch.device:
    """Joins the processes that torchrun started -> this process's device ("cuda" or "cpu" given).

    On CUDA a lone process joins a group of its own: only sharded models (FSDP2) have
    bfloat16 copies of their float32 parameters to compute with. The first process prints
    where it computes.
    """
    faulthandler.enable()
    group = {}
    if device == "cuda":
        prepare_cuda(deterministic)
        device = f"cuda:{torch.cuda.current_device()}"
        group["device_id"] = torch.device(device)
    if world() > 1 or device != "cpu":
        # Beside NCCL stands gloo, because the sums that are logged lie on the CPU.
        backend = "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"
        store = STORE if "RANK" in os.environ else dist.HashStore()
        if store is not None:
            group |= {"store": store, "rank": rank(), "world_size": world()}
        dist.init_process_group(backend, timeout=GROUP_TIMEOUT, **group)
    if rank() == 0:
        print(f"computing on {device_words(device, deterministic)}", flush=True)
    return torch.device(device)


def prepare_cuda(deterministic: bool) -> None:
    """Settings of CUDA, before anything lies there."""
    # Freed blocks of one size serve another: passes differ in length from step to step.
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    torch.backends.cuda.matmul.allow_tf32 = True
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        # Flash attention's backward pass else adds up by atomics. Warned about, not refused,
        # is the sum of float64 probabilities that sampling inverts: what rounding changes
        # there would have to lie within 1e-13 of a draw.
        torch.use_deterministic_algorithms(True, warn_only=True)


def device_words(device: str, deterministic: bool) -> str:
    """A device with what a log should know of it: name, memory, versions."""
    if device == "cpu":
        return f"the CPU, {torch.get_num_threads()} threads a process; torch {torch.__version__}"
    gigabytes = torch.cuda.get_device_properties(device).total_memory / 1e9
    order = "deterministic" if deterministic else "a resume repeats it to rounding"
    return (f"{torch.cuda.get_device_name(device)} ({gigabytes:.0f} GB), {world()} of them; torch "
            f"{torch.__version__}, CUDA {torch.version.cuda}; {order}")


def all_sum(x: Tensor) -> Tensor:
    """Sum of a tensor over all processes."""
    if dist.is_initialized():
        x = x.clone()
        dist.all_reduce(x)
    return x


def all_max(x: Tensor) -> Tensor:
    """Maximum of a tensor over all processes."""
    if dist.is_initialized():
        x = x.clone()
        dist.all_reduce(x, dist.ReduceOp.MAX)
    return x


def all_gather(x: Tensor) -> Tensor:
    """The processes' (n, ...) tensors of one shape, one behind the other: (world * n, ...)."""
    if not dist.is_initialized():
        return x
    parts = [torch.empty_like(x) for _ in range(world())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def barrier() -> None:
    """Waits until every process is here."""
    if dist.is_initialized():
        dist.barrier()


def compute_dtype_of(device: torch.device) -> torch.dtype:
    """What passes on this device compute in: bfloat16 on CUDA, float32 on the CPU."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def prepare(
        model: QwenVL, device: torch.device, freeze_vision: bool = False,
        gradient_checkpointing: bool = False, compute_dtype: torch.dtype | None = None,
) -> QwenVL:
    """Makes a loaded model ready for training: float32, on the device, sharded (FSDP2).

    Of a model with adapters these alone are trained; the base is only read, and where it is
    sharded it lies in what it computes in.

    compute_dtype: of a sharded model's passes; None is bfloat16 on CUDA and float32 on the
    CPU. One process on a CPU shards nothing: it has neither peers nor another dtype to
    compute in.
    """
    choose_trained(model, freeze_vision, gradient_checkpointing)
    if not dist.is_initialized():
        return model.float().to(device)
    if compute_dtype is None:
        compute_dtype = compute_dtype_of(device)
    shard(model, device, compute_dtype)
    # FSDP2 wraps forward() alone; this method needs unsharded parameters as well.
    register_fsdp_forward_method(model, "score")
    return model


def choose_trained(
        model: QwenVL, freeze_vision: bool, gradient_checkpointing: bool) -> None:
    """Says which parameters are trained, and whether layers keep their activations."""
    if lora.adapted(model):
        lora.freeze_base(model)
    else:
        model.visual.requires_grad_(not freeze_vision)
    model.visual.checkpointing = gradient_checkpointing
    model.model.checkpointing = gradient_checkpointing


def shard(model: QwenVL, device: torch.device, compute_dtype: torch.dtype) -> None:
    """Spreads the parameters over the processes, layer by layer; gradients will be sums."""
    dtypes = {}
    if compute_dtype != torch.float32:
        dtypes = {"param_dtype": compute_dtype, "reduce_dtype": torch.float32}
    policy = MixedPrecisionPolicy(**dtypes, cast_forward_inputs=False)
    mesh = init_device_mesh(device.type, (world(),))
    # Beside adapters the base is only read: it lies in what it computes in. (FSDP2 asks
    # for one dtype among the trained parameters of a module alone.)
    frozen_dtype = compute_dtype if lora.adapted(model) else torch.float32
    # Each layer becomes float32 just before it is sharded, so that one float32 layer
    # at a time exists whole. The inner modules come first: an outer one takes the
    # parameters that are left.
    for module in (*model.visual.blocks, *model.model.layers, model.visual, model):
        for x in (*module.parameters(), *module.buffers()):
            dtype = torch.float32 if x.requires_grad else frozen_dtype
            if x.is_floating_point() and x.dtype != dtype:
                x.data = x.data.to(dtype)
        fully_shard(module, mesh=mesh, mp_policy=policy)
    for module in sharded_modules(model):
        # FSDP2 averages gradients. A loss is already divided by the token count of
        # all processes, so the average would divide a second time.
        module.set_gradient_divide_factor(1.0)
        # A divide factor makes FSDP2 ask for NCCL's own multiplied sum, which gloo
        # does not have. This flag makes it ask for the plain sum that both have.
        module.set_force_sum_reduction_for_comms(True)


def sharded_modules(model: nn.Module) -> list[FSDPModule]:
    """The modules whose parameters are gathered and dropped together."""
    return [m for m in model.modules() if isinstance(m, FSDPModule)]


@contextmanager
def gathered(model: QwenVL) -> Iterator[QwenVL]:
    """The model to sample with: every process holds all parameters, and passes communicate
    nothing.

    In rollouts and validation processes make different numbers of forward passes, as their
    answers end at different lengths; with sharded parameters each pass would wait for the
    other processes, and the longest answer would wait forever. A model that is not sharded
    is yielded as it is.
    """
    modules = sharded_modules(model)
    for module in modules:
        module.unshard()
    try:
        yield unhooked(model) if modules else model
    finally:
        for module in modules:
            module.reshard()


def unhooked(module: nn.Module) -> nn.Module:
    """A second module of the same parameters, buffers and attributes, and the same of all
    modules in it, without FSDP2's hooks.

    The hooks find nothing to gather while parameters are whole, but cost the host a fifth of
    the time of a step that decodes, and can't be captured in a CUDA graph.
    """
    # FSDP2 has put a class of its own before the module's.
    kind = next(c for c in type(module).__mro__ if not issubclass(c, FSDPModule))
    twin = kind.__new__(kind)
    nn.Module.__init__(twin)
    for name, value in vars(module).items():
        # nn.Module's own, hooks among it, are empty in the twin; a method that stands among the
        # attributes is one that FSDP2 has wrapped.
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


def lr_at(step: int, steps: int, peak: float, warmup: float = 0.03) -> float:
    """Learning rate of step 0, 1, ..., steps - 1.

    It rises linearly over a share of the steps, then falls by a cosine to a tenth of
    the peak.
    """
    warmup_steps = max(1, round(warmup * steps))
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    angle = math.pi * (step - warmup_steps) / max(1, steps - warmup_steps)
    return peak * (0.1 + 0.9 * 0.5 * (1 + math.cos(angle)))


def update(
        model: nn.Module, opt: torch.optim.Optimizer, lr: float, max_norm: float = 1.0) -> float:
    """One optimizer step -> the gradient's norm over all parameters and processes.

    The gradient is clipped to max_norm first and cleared at the end; the norm is that
    before clipping. A gradient that is not finite changes nothing: the caller sees it
    in the norm.
    """
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    if norm.isfinite():
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for gradient in gradients:
            local_rows(gradient).mul_(scale)
        for group in opt.param_groups:
            group["lr"] = lr
        opt.step()
    opt.zero_grad(set_to_none=True)
    return norm.item()


def peak_memory(model: QwenVL) -> float:
    """GiB that this process held at most, on its GPU or, on a CPU, altogether."""
    if model.device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2 ** 30
    # Linux counts in KiB, macOS in bytes.
    unit = 2 ** (20 if sys.platform == "linux" else 30)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def gather_lists(own: Sequence[T]) -> list[T]:
    """The processes' lists, one behind the other."""
    if not dist.is_initialized():
        return list(own)
    parts: list[Any] = [None] * world()
    dist.all_gather_object(parts, list(own))
    return list(itertools.chain.from_iterable(parts))


def memory_tokens(model: QwenVL, prompt: Prompt, completion_tokens: int) -> int:
    """What --micro-tokens counts of a prompt with its completions: packed tokens, and the
    image's patches by the memory that they keep beside a token's (ours).

    A vision tower of which nothing is trained keeps nothing.
    """
    tokens = len(prompt.input_ids) + completion_tokens
    if any(p.requires_grad for p in model.visual.parameters()):
        tokens += round(PATCH_TOKENS * int(prompt.image_grid_thw.prod(-1).sum()))
    return tokens


def micro_batches(tokens: Sequence[int], budget: int) -> list[slice]:
    """Cuts a process's items of a step into micro-batches -> slices of neighbouring items.

    tokens: of each item, as `memory_tokens` counts. The slices have equally many items, to one,
    and are as few as keep each within the budget; an item alone may exceed it. Every
    process gets equally many slices, because each takes part in the others' forward
    and backward passes (FSDP2): all follow the one that needs most.

    >>> micro_batches([5, 1, 9, 2], budget=12)        # 6 and 11 tokens
    [slice(0, 2, None), slice(2, 4, None)]
    """
    count = 1
    while count < len(tokens) and largest_slice(tokens, count) > budget:
        count += 1
    return equal_slices(len(tokens), int(all_max(torch.tensor(count))))


def largest_slice(tokens: Sequence[int], count: int) -> int:
    """Tokens of the largest micro-batch, if the items are cut into this many."""
    return max(sum(tokens[s]) for s in equal_slices(len(tokens), count))


def equal_slices(n: int, count: int) -> list[slice]:
    """n items in `count` runs of neighbours, whose lengths differ by one at most."""
    edges = [n * i // count for i in range(count + 1)]
    return [slice(first, end) for first, end in zip(edges, edges[1:])]


# ---------------------------------------------------------------- checkpoints

def writable(folder: str | Path) -> Path:
    """Makes a folder, with those above it, and tries that a file can be written there."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        fail(f"nothing can be written to {folder} ({error.strerror}); "
             "name another folder with --out")
    return Path(folder)


# A step's folder holds the whole weights for users (hub layout; adapters alone, in PEFT's,
# where these are trained) and, in state/, what a resume needs: one file a process, with its
# rows of every float32 parameter and moment. Rows are those of dimension 0, along which
# FSDP2 cuts a tensor. A resume on another number of processes copies into each process's
# rows what each file has of them.

def local_rows(x: Tensor) -> Tensor:
    """This process's rows of a tensor: all of them where it is not sharded."""
    return x.to_local() if isinstance(x, DTensor) else x


def first_row(x: Tensor) -> int:
    """Where this process's rows begin in the whole tensor.

    FSDP2 splits dimension 0 into equal parts; the last ones may be shorter or empty.
    10 rows over 4 processes are 3, 3, 3 and 1, and begin at 0, 3, 6 and 9.
    """
    if not isinstance(x, DTensor):
        return 0
    rows = x.shape[0]
    rows_per_process = -(-rows // world())        # rounded up
    return min(rank() * rows_per_process, rows)


class ElsewhereError(OSError):
    """Another process met an OSError, and says it."""


@contextmanager
def together() -> Iterator[None]:
    """Ends when every process is here; an OSError that one of them met inside is raised in all.

    So no process waits for one that could not write. The first of those that met one has
    its own, the others an ElsewhereError.
    """
    problem = None
    try:
        yield
    except OSError as error:
        problem = error
    place = world() if problem is None else rank()
    first = -int(all_max(torch.tensor(-place)))
    if first < world():
        raise problem if first == rank() else ElsewhereError


def say(words: str) -> None:
    """Prints a line above the progress bar."""
    tqdm.write(words, file=sys.stderr)
