"""What both training stages call: flags, processes, optimizer, data order, log, checkpoints.

These are functions, no trainer: the training loops stand in sft.py and rft.py.

Precision: trained parameters, their moments and gradient sums are float32. CUDA
computes in bfloat16, the CPU in float32.

Gradients are summed over processes, not averaged, because a loss is already divided
by the token count of the whole step, over all processes. So the number of processes
changes rounding only.
"""
import argparse
import errno
import faulthandler
import functools
import importlib.metadata
import itertools
import json
import math
import os
import pickle
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Generic, NoReturn, TypeVar

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
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

import files
import lora
from data import (
    MOST_UNREADABLE,
    DataError,
    Record,
    Records,
    UnreadableImage,
    add_reading_flags,
    load,
    read_json,
    refusal_summary,
)
from model import CheckpointError, QwenVL, by_number
from processor import Processor, Prompt, prompt_hash

# Seconds without a step, after which every process prints where it is.
STUCK_AFTER = 1800
# So many steps in a row whose gradient is not finite mean that something is broken.
STOP_AFTER_SKIPPED = 5
# Flags that a resume may change. The root may move, since the data must have the
# run's hash.
FREE_ON_RESUME = (
    "root", "steps", "epochs", "device", "workers", "micro_tokens", "every", "val",
    "gradient_checkpointing", "deterministic", "plan", "gpus", "memory", "image", "keep",
    "keep_weights",
)
# What a patch of the trained vision tower counts in --micro-tokens: at the widths of the 3B
# model it keeps 2.02 MB for the backward pass, and a token 4.68 MB (counted, not measured).
PATCH_TOKENS = 0.43
# Where a Linux system shows its NVIDIA GPUs and their driver.
GPU_FILES = Path("/dev")
DRIVER_FILE = Path("/proc/driver/nvidia/version")
# Bytes of a checkpoint's small files: tokenizer, settings, lists.
SMALL_FILES = 2 ** 24

# How long a process waits for another one.
GROUP_TIMEOUT = timedelta(seconds=2 * STUCK_AFTER)
# The signals by which users and schedulers end a run, and whether one came.
FAREWELLS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
TOLD = threading.Event()
# Disk full, quota used up, file larger than the shell's limit.
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What the processes share before and behind their group; None for a lone process.
STORE: dist.Store | None = None

# Of a run's folder: the records whose images can't be decoded.
UNREADABLE_LOG = "unreadable.jsonl"

T = TypeVar("T")


# ---------------------------------------------------------------- flags and mistakes

class FlagHelp(argparse.ArgumentDefaultsHelpFormatter):
    """--help with defaults; none behind a text that itself says what happens without the flag."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, False) or isinstance(action.default, dict):
            return action.help
        return super()._get_help_string(action)


class FlagParser(argparse.ArgumentParser):
    """A wrong flag is one line, exit status 2."""

    def __init__(self, description: str | None) -> None:
        super().__init__(description=description, formatter_class=FlagHelp)

    def error(self, message: str) -> NoReturn:
        fail(f"{message}; {self.prog} --help explains every flag")


def number(kind: type, in_range: Callable[[Any], bool], words: str) -> Callable[[str], Any]:
    """The type of a flag: turns text into a number of this kind, int or float.

    A number out of range, or no number at all, is refused as "... is not `words`".
    """
    def convert(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not in_range(value):
            raise argparse.ArgumentTypeError(f"{text} is not {words}")
        return value
    return convert


positive = number(int, lambda v: v > 0, "a whole number above 0")
natural = number(int, lambda v: v >= 0, "a whole number from 0 up")
# Seeds are multiplied by a million: the product must fit in 64 bits.
seed = number(int, lambda v: 0 <= v < 2 ** 31, f"a whole number from 0 to {2 ** 31 - 1}")
finite = number(float, math.isfinite, "a finite number")
above_zero = number(float, lambda v: 0 < v < math.inf, "a finite number above 0")
not_negative = number(float, lambda v: 0 <= v < math.inf, "a finite number from 0 up")


moderate = number(float, lambda v: abs(v) <= 1e6, "a number between -1e6 and 1e6")
scale = number(float, lambda v: 1e-3 <= v <= 1e6, "a number from 0.001 to 1e6")
epochs = number(float, lambda v: 0 < v <= 1e6, "a number above 0, up to 1e6")


def add_common_flags(
        parser: argparse.ArgumentParser, stage: str, init: str, length: str) -> None:
    """The flags that mean the same in every stage.

    init is the stage's default; length says in words how long it trains without
    --steps and --epochs.
    """
    run = parser.add_argument_group("run")
    add = run.add_argument
    add("--data", default="synth", help="data set: a name that data.py knows")
    add("--root", help="its folder; default data/<name>")
    add_reading_flags(add)
    add("--init", default=init,
        help="checkpoint to start from: a folder in hub layout, or a stage's")
    add("--out", default=f"ckpt/{stage}", help="folder for checkpoints, log and pictures")
    either = run.add_mutually_exclusive_group()
    either.add_argument("--steps", type=positive, help=f"optimizer steps; default {length}")
    either.add_argument("--epochs", type=epochs,
                        help="passes over the records, in place of --steps; parts of one are fine")
    add("--seed", type=seed, default=0, help="of data order and sampling")
    add("--resume", action="store_true",
        help="go on from the newest checkpoint in --out; flags not given are as in its run.json")
    add_device_flag(add)
    add("--deterministic", action="store_true",
        help="on CUDA: slower kernels that add up in one order, so that a resumed run equals an "
        "uninterrupted one to the bit; a CPU always does")
    add("--workers", type=natural,
        help="processes that prepare images ahead; default: 2 on CUDA, else 0: none")
    add_size_flags(parser)
    add_plan_flags(parser)


def add_size_flags(parser: argparse.ArgumentParser) -> None:
    """What a run takes of disk and memory, and what of the model it trains."""
    add = parser.add_argument_group("disk").add_argument
    add("--keep", type=positive, default=2,
        help="newest checkpoints that keep their training state, which --resume reads")
    add("--keep-weights", type=positive, metavar="N",
        help="newest checkpoints that stay, beside the best by validation; default: all")
    add = parser.add_argument_group("memory").add_argument
    add("--micro-tokens", type=positive, default=8192,
        help="packed tokens in one forward and backward pass, a patch of a trained vision tower "
        f"counted as {PATCH_TOKENS}: memory against speed")
    add("--gradient-checkpointing", action=argparse.BooleanOptionalAction,
        help="keep no activations within a layer: a third more compute, far less memory; "
        "default: on CUDA")
    add("--freeze-vision", action="store_true", help="train the language model alone")
    add("--max-pixels", type=positive,
        help="area of the resized image at most; default: the checkpoint's own")
    add = parser.add_argument_group("adapters").add_argument
    add("--lora", type=positive, metavar="RANK",
        help="train adapters of this rank beside the language model's linear layers, and the "
        "weights not at all; --lr about ten times as large; default: none")
    add("--lora-alpha", type=above_zero, metavar="ALPHA",
        help="an adapter counts ALPHA / RANK; default 2 RANK, or as the adapter in --init has it")
    add("--lora-vision", action="store_true",
        help="adapters beside the vision tower's linear layers as well")


def add_plan_flags(parser: argparse.ArgumentParser) -> None:
    """What memory.py is asked."""
    add = parser.add_argument_group("plan").add_argument
    add("--plan", action="store_true",
        help="print what the run would need of each GPU's memory, on any machine, and end; "
        "exit status 2 where it does not fit")
    add("--gpus", type=positive, default=1, help="--plan: processes, a GPU each")
    add("--memory", type=above_zero, default=80.0, help="--plan: GiB of a GPU: 24, 80")
    add("--image", type=positive, nargs=2, metavar=("WIDTH", "HEIGHT"),
        help="--plan: for images of this size, without looking at the data")


def add_device_flag(add: Callable[..., Any]) -> None:
    """--device, as every script has it; `choose_device` reads it."""
    add("--device", choices=("cuda", "cpu"),
        help="where to compute; default: cuda where torch can use it")


def parse(parser: argparse.ArgumentParser, stage: str) -> argparse.Namespace:
    """The command line's flags, with the defaults that depend on the device.

    With --resume, flags that are not given are as the run in --out had them, and one
    that would change the run's course is refused.
    """
    args = parser.parse_args()
    if args.resume:
        args = parse_resumed(parser, args, stage)
    else:
        check_adapter_flags(args)
    choose_device_flags(args)
    return args


def choose_device_flags(args: argparse.Namespace) -> None:
    """Fills in --device and the flags whose defaults depend on it."""
    # A plan is for GPUs, wherever it is made.
    args.device = "cuda" if args.plan else choose_device(args.device)
    if args.gradient_checkpointing is None:
        args.gradient_checkpointing = args.device == "cuda"
    if args.workers is None:
        args.workers = 2 if args.device == "cuda" else 0


def parse_resumed(
        parser: argparse.ArgumentParser, args: argparse.Namespace, stage: str,
) -> argparse.Namespace:
    """The flags of a run that goes on: the command line's, and else the run's own."""
    run = read_run(Path(args.out))
    if run["stage"] != stage:
        fail(f"--resume, but {args.out} holds a run of {run['stage']}.py; "
             f"name the --out of a run of {stage}.py")
    run_flags = {k: v for k, v in run["flags"].items() if k not in ("out", "resume")}
    # With the run's flags as defaults, a second reading keeps what the command line
    # says.
    parser.set_defaults(**run_flags)
    args = parser.parse_args()
    for name in vars(args):
        if name not in (*run_flags, *FREE_ON_RESUME, "out", "resume"):
            fail(f"--resume, but the run in {args.out} was begun by another version of {stage}.py, "
                 f"which knew no --{name.replace('_', '-')}; start another run with "
                 f"--init {args.out} and another --out")
    for name, run_value in run_flags.items():
        value = getattr(args, name)
        if name not in FREE_ON_RESUME and not same_value(value, run_value):
            fail(f"--resume with --{name.replace('_', '-')} {as_typed(value)}, "
                 f"but the run in {args.out} has {as_typed(run_value)}; leave the flag out, "
                 "or start another run with another --out")
    return args


def check_adapter_flags(args: argparse.Namespace) -> None:
    """Refuses flags about adapters that do not go together."""
    for name in ("lora_alpha", "lora_vision"):
        if getattr(args, name) and not args.lora:
            fail(f"--{name.replace('_', '-')} without --lora; give the adapters' rank as well")
    if args.lora_vision and args.freeze_vision:
        fail("--lora-vision trains what --freeze-vision keeps; leave one of them out")


def as_typed(value: Any) -> str:
    """A flag's value as one types it."""
    if isinstance(value, dict):
        return " ".join(f"{name}={as_typed(weight)}" for name, weight in value.items())
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value))
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


def set_steps(
        args: argparse.Namespace, records: int, per_step: int, **default: float) -> None:
    """Sets args.steps from --epochs, or where neither flag is given from the stage's default
    (steps=..., or epochs=...).

    args.epochs is None from then on: run.json records, and a resume reads, the steps.
    """
    if args.steps is None and args.epochs is None:
        vars(args).update(default)
    if args.epochs is not None:
        args.steps = max(1, round(args.epochs * records / per_step))
        args.epochs = None


def same_value(a: Any, b: Any) -> bool:
    """Whether two values of a flag are equal, or two ways to write the same path."""
    if isinstance(a, str) and isinstance(b, str):
        return a == b or os.path.realpath(a) == os.path.realpath(b)
    return a == b


def fail(message: object) -> NoReturn:
    """Ends the script after a user's mistake: one line, exit status 2.

    Where several processes fail, the first alone says why: the others meet the same
    mistake, or fail because the first is gone.
    """
    if first_to_fail():
        print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    sys.exit(2)


def main(stage: Callable[[], None], farewells: bool = False) -> NoReturn:
    """Runs a script's main function; the exit status is 2 after a user's mistake.

    farewells: SIGTERM, SIGINT and SIGUSR1 do not end the process, but make
    told_to_stop() true, which the stage asks between its steps.
    """
    if farewells:
        listen()
    status = exit_status(stage)
    # While the interpreter is taken down, torch's threads crash now and then (torch
    # 2.13, gloo), and torchrun would call a finished run a failed one. All files are
    # written by now, so several processes leave without that.
    if world() > 1:
        # With a process that is gone there is nothing to take leave of.
        if status == 0 and dist.is_initialized():
            dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(status)


def exit_status(stage: Callable[[], None]) -> int:
    """Runs a script's main function -> 0, 2 after a user's mistake, 1 after another error.

    What went wrong is said by one process, as in fail().
    """
    try:
        try:
            meet()
            stage()
        except (DataError, CheckpointError) as error:
            fail(error)
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            fail(f"{error.strerror}: {error.filename or 'a log'} could not be written; make room, "
                 "and go on with --resume")
    except SystemExit as leaving:
        return leaving.code or 0
    except KeyboardInterrupt:
        print(f"{Path(sys.argv[0]).name}: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except Exception as error:
        if world() == 1:
            raise
        if first_to_fail():
            if lost_peer(error):
                print("a process of this run is gone; what was saved stands, and --resume goes on",
                      file=sys.stderr)
            else:
                traceback.print_exc()
        return 1
    return 0


# ---------------------------------------------------------------- farewells

def listen() -> None:
    """From here on a farewell's signal sets TOLD and does nothing else.

    A second SIGINT ends the process at once. A thread hears them, because the main one may
    be within a library's code for a while.
    """
    heard, said = os.pipe()
    os.set_blocking(said, False)
    signal.set_wakeup_fd(said, warn_on_full_buffer=False)
    for number in FAREWELLS:
        signal.signal(number, lambda number, frame: None)
    threading.Thread(target=hear, args=(heard,), daemon=True).start()


def hear(pipe: int) -> None:
    """Reads the numbers of signals from a pipe."""
    interrupts = 0
    while True:
        for number in os.read(pipe, 64):
            if number in FAREWELLS:
                TOLD.set()
            interrupts += number == signal.SIGINT
            if interrupts == 2:
                # The bar has left the cursor in its line.
                print("\nleft at once; what was saved stands, and --resume goes on",
                      file=sys.stderr, flush=True)
                os._exit(128 + signal.SIGINT)


def deafen(worker: int) -> None:
    """In a process that prepares images: a farewell is the business of the one that trains.

    A scheduler sends its signals to all processes alike.
    """
    signal.set_wakeup_fd(-1)
    for number in FAREWELLS:
        signal.signal(number, signal.SIG_IGN)


def told_to_stop(out: Path) -> bool:
    """Whether a signal, or a file `stop` in `out`, tells the run to end before its next step.

    All processes come to the same answer, whichever of them was told.
    """
    told = TOLD.is_set() or rank() == 0 and (out / "stop").exists()
    return bool(all_max(torch.tensor(int(told))))


def say_farewell(out: Path, done: int, steps: int) -> None:
    """Ends a run that is saved behind `done` of `steps`: prints the command that goes on."""
    if rank():
        return
    # It is obeyed; a resume shall not stop at once.
    (out / "stop").unlink(missing_ok=True)
    if done == 0:
        # What the first answers met; a new run needs an empty folder.
        (out / UNREADABLE_LOG).unlink(missing_ok=True)
        print("stopped before the first step: nothing is lost; the same command starts again")
    elif done < steps:
        print(f"stopped behind step {done} of {steps}; go on with: {command_to_resume(out)}")


def command_to_resume(out: Path) -> str:
    """The command that goes on with a run, as one types it."""
    launcher = ["python"]
    if "TORCHELASTIC_RUN_ID" in os.environ:
        launcher = ["torchrun", "--nproc_per_node", os.environ["LOCAL_WORLD_SIZE"]]
    return shlex.join([*launcher, sys.argv[0], "--out", str(out), "--resume"])


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


# ---------------------------------------------------------------- model and optimizer

def open_checkpoint(
        folder: Path, device: torch.device | None = None, max_pixels: int | None = None,
) -> tuple[QwenVL, Processor]:
    """Model and processor of a checkpoint; a CheckpointError where they do not fit each other.

    With a device the model is there to answer, in what that device computes in
    (bfloat16 on CUDA, float32 on the CPU). Without one it is as stored, to be
    prepared for training.
    """
    dtype = None if device is None else compute_dtype_of(device)
    model = QwenVL.from_pretrained(folder, dtype, device or "cpu")
    processor = Processor.from_pretrained(folder, max_pixels=max_pixels)
    model.check_processor(processor)
    return model, processor


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


def parameter_part(name: str) -> str:
    """The part of the model that a parameter belongs to, in words."""
    if name.startswith("visual."):
        return "vision tower"
    if name.startswith("model.embed_tokens"):
        return "embeddings"
    if name.startswith("model.layers"):
        return "language layers"
    return "head and norm"


def print_parameters(model: nn.Module) -> None:
    """Table of each part's parameters and of those that are trained, on the first process."""
    if rank():
        return
    total = Counter()
    trained = Counter()
    for name, p in model.named_parameters():
        total[parameter_part(name)] += p.numel()
        trained[parameter_part(name)] += p.numel() if p.requires_grad else 0
    for part in total:
        print(f"  {part:16} {total[part]:14,} parameters, {trained[part]:14,} trained")


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


def stop_if_not_finite(lines: Sequence[dict[str, Any]], steps: int, out: Path) -> None:
    """Ends a run whose last gradients were not finite; lines: its log so far.

    So many in a row do not mend themselves; and a run must not end well on a skipped
    step.
    """
    skipped = last_steps(lines, lambda line: not line["finite"])
    done = lines[-1]["step"]
    if skipped >= STOP_AFTER_SKIPPED or skipped and done == steps:
        fail(f"no gradient is finite from step {done + 1 - skipped} on; lower --lr; "
             f"what was saved before stands in {out}, whose metrics.jsonl names the records")


def warn(
        lines: Sequence[dict[str, Any]], own: Sequence[Record], more: Sequence[str] = (),
) -> None:
    """Puts into the last of a log's lines what is wrong with its step, in words.

    own: this process's records of it; more: sentences of the stage's own. What the step before
    did not say is printed, too.
    """
    line = lines[-1]
    sentences = list(more)
    if not line["finite"]:
        names = ", ".join(gather_lists([record.id for record in own]))
        sentences.append(f"the gradient is not finite, and the step skipped; its records: {names}")
    if not sentences:
        return
    line["warning"] = "; ".join(sentences)
    said = lines[-2].get("warning") if len(lines) > 1 else None
    if rank() == 0 and line["warning"] != said:
        say(f"warning, step {line['step']}: {line['warning']}")


def last_steps(lines: Sequence[dict[str, Any]], true_of: Callable[[dict[str, Any]], bool]) -> int:
    """Of how many steps in a row, up to the last, something is true."""
    return sum(1 for _ in itertools.takewhile(true_of, reversed(lines)))


def peak_memory(model: QwenVL) -> float:
    """GiB that this process held at most, on its GPU or, on a CPU, altogether."""
    if model.device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2 ** 30
    # Linux counts in KiB, macOS in bytes.
    unit = 2 ** (20 if sys.platform == "linux" else 30)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


# ---------------------------------------------------------------- data order and log

def load_records(args: argparse.Namespace, split: str) -> tuple[Records, list[Record]]:
    """The records to train on, and the first --val records of the val split.

    There is one to train on at least, and with --resume they are those of the run;
    else a DataError or a line that says so. The first process prints how many there
    are, and how many were refused.
    """
    names = (split, "val") if args.val else (split,)
    loaded = {}
    # A program of one's own may call this without the flags on reading.
    given = {flag: vars(args).get(flag) for flag in ("coords", "stretch")}
    how = {flag: value for flag, value in given.items() if value}
    for name in names:
        loaded[name] = load(args.data, args.root, name, **how)
    refusals = {}
    for name, records in loaded.items():
        refusals[name] = refusal_summary(records, args.data, args.root, name)
    records = loaded[split]
    if not records:
        why = refusals[split] or "none was refused; is its share too small?"
        raise DataError(f"no record of {args.data} {split} to train on; {why}")
    if args.resume:
        check_run_data(args, split, records.hash)
    if rank() == 0:
        for name, split_records in loaded.items():
            refused = f"; {refusals[name]}" if refusals[name] else ""
            print(f"{len(split_records):,} records of {name}{refused}")
    return records, loaded.get("val", [])[:args.val]


def check_run_data(args: argparse.Namespace, split: str, data_hash: str) -> None:
    """A run goes on with its own records alone: the same place in another order means nothing."""
    run_hash = read_run(Path(args.out))["data_hash"]
    if run_hash != data_hash:
        fail(f"--resume, but the records of {args.data} {split} are not those of the run in "
             f"{args.out} ({data_hash}, not {run_hash}); "
             "name their --root, or start another run with another --out")


def batch(records: Sequence[Record], step: int, size: int, seed: int) -> list[Record]:
    """The `size` records of a step, over all processes: epochs follow one another, each shuffled.

    The order is a pure function of seed and step: a resume has no sampler state to
    restore, every process knows the whole batch, and workers can prepare any step.
    """
    return [record_at(records, place, seed) for place in range(step * size, (step + 1) * size)]


def record_at(records: Sequence[Record], place: int, seed: int) -> Record:
    """The record at a place of the order, counted from 0 over all epochs."""
    epoch, position = divmod(place, len(records))
    return records[epoch_order(len(records), seed, epoch)[position]]


# A batch lies in one epoch, or across the border of two.
@functools.lru_cache(maxsize=2)
def epoch_order(n: int, seed: int, epoch: int) -> list[int]:
    """The order of n records in an epoch."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(n, generator=generator).tolist()


@dataclass(frozen=True)
class Unreadable:
    """A record that was met in the order and whose image can't be decoded."""

    place: int                    # in the order
    id: str
    image: str
    problem: str                  # one line


@dataclass
class Share(Generic[T]):
    """This process's part of a step's batch."""

    records: list[Record]
    made: list[T]                 # of each record
    unreadable: list[Unreadable]  # those that others stand in for


def own_share(
        records: Sequence[Record], step: int, size: int, seed: int,
        make: Callable[[Record], T],
) -> Share[T]:
    """Every world()th record of a step's batch, each with what is made of it and its image.

    A record whose image can't be decoded is replaced by the one that stands `size` places later
    in the order (that of its place in the next step), or where that can't be either, by the one
    as far behind that. So what stands at a place depends on the order and the files alone: not
    on the process that opens them, nor on what was met before; and two places of a batch get
    different records, as long as it lies in one epoch.

    More unreadable ones than a run may have end the search: `Replacements` then ends the run.
    """
    share: Share[T] = Share([], [], [])
    for first_place in range(step * size + rank(), (step + 1) * size, world()):
        for place in itertools.count(first_place, size):
            if len({u.id for u in share.unreadable}) > MOST_UNREADABLE * len(records):
                return share
            record = record_at(records, place, seed)
            try:
                share.made.append(make(record))
            except UnreadableImage as error:
                share.unreadable.append(
                    Unreadable(place, record.id, str(record.image), str(error)))
                continue
            share.records.append(record)
            break
    return share


class Replacements:
    """Counts a run's unreadable records, over all processes and resumes, and names each image.

    They are kept in unreadable.jsonl of the run's folder, a line each, by the step that met it.
    """

    def __init__(self, out: Path, records: int) -> None:
        self.path = out / UNREADABLE_LOG
        self.limit = MOST_UNREADABLE * records
        self.total = records
        self.ids: set[str] = set()
        self.images: set[str] = set()
        if self.path.exists():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                self.remember(json.loads(line))

    def remember(self, line: dict[str, Any]) -> bool:
        """Counts a record -> is its image a new one?"""
        self.ids.add(line["id"])
        is_new = line["image"] not in self.images
        self.images.add(line["image"])
        return is_new

    def count(self, step: int, own: Sequence[Unreadable]) -> dict[str, int]:
        """Takes what each process met in a step -> what joins the log line.

        Ends the run, on all processes, where more than 1% of its records can't be read.
        """
        if not all_sum(torch.tensor(len(own))).item():
            return {"unreadable": len(self.ids)} if self.ids else {}
        for met in sorted(gather_lists(own), key=lambda met: met.place):
            if met.id in self.ids:
                continue
            line = {"step": step + 1, "id": met.id, "image": met.image, "problem": met.problem}
            is_new = self.remember(line)
            if rank() == 0:
                with open(self.path, "a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
                if is_new:
                    tqdm.write(f"{met.problem}; another record takes its place")
        if len(self.ids) > self.limit:
            fail(f"{len(self.ids):,} of {self.total:,} records met so far have an image that can't "
                 f"be decoded, more than {MOST_UNREADABLE:.0%}; {self.path} names them; python "
                 "data.py finds all")
        return {"unreadable": len(self.ids)}


def gather_lists(own: Sequence[T]) -> list[T]:
    """The processes' lists, one behind the other."""
    if not dist.is_initialized():
        return list(own)
    parts: list[Any] = [None] * world()
    dist.all_gather_object(parts, list(own))
    return list(itertools.chain.from_iterable(parts))


def prefetch(make: Callable[[int], T], steps: Sequence[int], workers: int) -> Iterator[T]:
    """Yields make(step) for each step, made ahead in this many processes (0: none).

    make is a pure function of the step. Its DataError is raised here, where the
    script can turn it into one line.
    """
    if not workers:
        yield from map(make, steps)
        return
    loader = torch.utils.data.DataLoader(
        PickledSteps(make, steps), batch_size=None, num_workers=workers, prefetch_factor=1,
        multiprocessing_context="fork", worker_init_fn=deafen)
    for pickled in loader:
        made = pickle.loads(pickled)
        if isinstance(made, DataError):
            raise made
        yield made


class PickledSteps(torch.utils.data.Dataset):
    """make(step) for each of the steps, pickled.

    Bytes travel from a worker through a pipe. Tensors would go through /dev/shm, of
    which a container has 64 MB.
    """

    def __init__(self, make: Callable[[int], Any], steps: Sequence[int]) -> None:
        self.make = make
        self.steps = steps

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, i: int) -> bytes:
        try:
            return pickle.dumps(self.make(self.steps[i]))
        except DataError as error:
            return pickle.dumps(error)


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


def begin(
        out: Path, step: int, model: nn.Module, logs: Sequence[str] = ("metrics.jsonl",),
) -> list[dict[str, Any]]:
    """Before a run starts behind `step`: prints what is trained, and cuts the logs of `out`.

    -> the lines of metrics.jsonl so far.
    """
    print_parameters(model)
    if rank() == 0:
        for name in (*logs, UNREADABLE_LOG):
            cut_log(out / name, step)
    barrier()
    return read_log(out / "metrics.jsonl")


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a JSONL; none where there is no file."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@contextmanager
def progress_bar(stage: str, first: int, steps: int) -> Iterator[tqdm]:
    """A bar over the steps from `first` on, on the first process."""
    bar = tqdm(
        range(first, steps), initial=first, total=steps, desc=stage, disable=rank() > 0)
    with bar:
        try:
            yield bar
        except Exception as error:
            # What ended the other process stands above, and shall be the last word.
            bar.leave = not lost_peer(error)
            raise


# What the keys of metrics.jsonl mean, with their units; README's glossary is this
# table. "TERM" stands for each term of the reward by its name.
LOG_KEYS = {
    "step": "steps so far: one batch each; with rft's --updates U and --minibatches M that is "
            "U x M optimizer steps",
    "loss": "sum over the step's completion tokens of each one's weight times loss, over their "
            "number (rft: or as --loss says); rft: mean over optimizer steps",
    "lr": "learning rate of the step",
    "grad_norm": "length of the gradient before it is cut to 1, over all parameters; rft: of the "
                 "last optimizer step",
    "finite": "false where a gradient was not finite, so that the step was skipped",
    "warning": "what is wrong with the step, in words; only where something is",
    "peak_GiB": "memory that the first process held at most so far",
    "val_mIoU": "mean IoU of greedy answers to --val records, where a validation was due",
    "val_Pr@0.5": "share of them with IoU above 0.5 (at least 0.5 on opt)",
    "val_failed": "share of them without a box",
    "unreadable": "records met so far whose image can't be decoded, so that others took their "
                  "places; where there are any",
    "completion_tokens": "sft: tokens that the loss is averaged over",
    "tokens_per_second": "sft: packed tokens, prompts and images included, a second",
    "reward": "rft: mean weighted sum of the reward's terms",
    "TERM": "rft: mean of a term before its weight; iou in any case",
    "reward_group_std": "rft: standard deviation of the reward within a group, mean",
    "TERM_group_std": "rft: the same of a term",
    "length": "rft: mean tokens of a completion, end of turn included",
    "truncated": "rft: share of rollouts that were cut at --max-new-tokens",
    "unparsable": "rft: share of rollouts without a box in the image",
    "unique": "rft: share of rollouts that are different texts in their group",
    "no_overlap_groups": "rft: share of groups in which no box touches the target",
    "no_overlap_advantage": "rft: share of the step's sum of |A| that they carry",
    "positional_alone_advantage": "rft: share of the step's sum of |A| in groups that the "
                                  "positional term alone tells apart; with that term",
    "zero_variance_groups": "rft: share of groups with equal rewards, which teach nothing; with "
                            "--resample those that are left",
    "resampled": "rft: groups that fresh questions replaced, over all turns; with --resample",
    "advantage": "rft: mean |A|",
    "consistency_weight": "rft: mean weight of a group's loss",
    "consistency_weight_min": "rft: the least of the step",
    "consistency_weight_max": "rft: the most of the step",
    "dispersion": "rft: scatter of a group's box centres in image sides, mean over groups "
                  "with two boxes or more",
    "entropy": "rft: mean entropy of the next token, nats; like clipped, kl and importance over "
               "the tokens that are learned from",
    "clipped": "rft: share of tokens whose gain --clip or --dual-clip cuts",
    "clipped_completions": "rft: share of completions with such a token",
    "kl": "rft: mean estimate (--kl) of the KL to the reference, nats a token; where --beta is "
          "above 0",
    "importance": "rft: mean of a token's scored over its sampled probability, cut at "
                  "--importance-cap; with that flag",
    "sampled_scored_max": "rft: largest difference between a token's log-probability when "
                          "sampled and when scored",
    "seconds_rollout": "rft: seconds of sampling",
    "seconds_reward": "rft: seconds of grading",
    "seconds_resample": "rft: seconds of sampling and grading again; with --resample",
    "seconds_update": "rft: seconds of scoring, gradients and optimizer",
}


def log(path: Path, line: dict[str, Any]) -> None:
    """Appends a line to a JSONL file, on the first process.

    It also winds up the watchdog, which prints all stacks when steps stop coming.
    """
    faulthandler.dump_traceback_later(STUCK_AFTER, repeat=True)
    if rank() == 0:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def cut_log(path: Path, step: int) -> None:
    """Removes the lines of later steps than `step`, and a last line that broke off, from a JSONL.

    A run that was killed may have logged steps past its last checkpoint; they come
    again.
    """
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    earlier = []
    for n, line in enumerate(lines, 1):
        try:
            if json.loads(line)["step"] <= step:
                earlier.append(line)
        except (ValueError, KeyError, TypeError):
            if n < len(lines):
                raise DataError(
                    f"{path}, line {n}: not a step's line; remove it to go on") from None
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(line + "\n" for line in earlier), encoding="utf-8")
    os.replace(temporary, path)


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


def check_output(out: Path, resume: bool) -> None:
    """The output folder must be writable, and new or to be resumed.

    The first process looks, for all: so none takes another's trial file for a run's.
    """
    if rank():
        return
    writable(out)
    if resume:
        return
    if (out / "latest").exists():
        fail(f"{out} already holds a run, up to {(out / 'latest').resolve().name}; "
             "go on with --resume, or name another --out")
    if any(out.iterdir()):
        fail(f"{out} is not empty, but holds no checkpoint; remove it, or name another --out")


def read_run(out: Path) -> dict[str, Any]:
    """run.json of a run that is to be resumed: the newest that is as it was written."""
    latest = out / "latest"
    if not os.path.lexists(latest):
        fail(f"--resume, but there is no checkpoint in {out}; "
             "leave --resume out, or name the --out of the run")
    # save() replaces the link, which it could not do with a folder.
    if not latest.is_symlink():
        newest = max((p.name for p in out.glob("step_*")), key=by_number, default="copy")
        fail(f"{latest} is a folder, but must be a link to a step's (cp -rL follows links); "
             f"mv {latest} {out / 'copy'} && ln -s {newest} {latest}")
    candidates = resumable_steps(out)
    whole = [step for step in candidates if run_is_whole(step)]
    step = whole[0] if whole else candidates[0]
    run = read_json(step / "run.json")
    says_all = isinstance(run, dict) and {"stage", "data_hash"} <= run.keys()
    if not says_all or not isinstance(run.get("flags"), dict):
        fail(f"{step / 'run.json'} does not say how the run began; "
             f"start anew with --init {step}")
    return run


def run_is_whole(step: Path) -> bool:
    """Whether a checkpoint's run.json is as it was written, as far as its manifest says."""
    try:
        listed = files.read_manifest(step)
        if listed is None:
            return (step / "run.json").exists()
        return files.is_whole(step / "run.json", listed["run.json"])
    except files.UNREADABLE:
        return False


def run_description(args: argparse.Namespace, stage: str, records: Records) -> dict[str, Any]:
    """What run.json says of a run: all that is needed to do it again, and to evaluate it."""
    packages = ("torch", "numpy", "pillow", "safetensors", "tokenizers")
    return {
        "stage": stage,
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "commit": commit(),
        "data": args.data,
        "root": args.root,
        "records": len(records),
        "data_hash": records.hash,
        "prompt_hash": prompt_hash(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "processes": world(),
        "device": args.device,
        "flags": {k: v for k, v in vars(args).items() if k != "resume"},
    }


def commit() -> str | None:
    """Hash of the commit that this code stands at, or None outside of a repository."""
    git = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent,
        check=False)
    return git.stdout.strip() or None


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


@dataclass
class Checkpoints:
    """A run's checkpoints: what they are made of, and how far they reach."""

    out: Path
    args: argparse.Namespace           # --steps, --keep and --keep-weights count
    model: QwenVL
    optimizer: torch.optim.Optimizer
    processor: Processor
    run: dict[str, Any]                # run_description()
    saved: int                         # the newest step that is in one; 0: none

    def save(self, line: dict[str, Any]) -> None:
        """Saves the step that logged this line, and removes what need not stay."""
        scores = {key: value for key, value in line.items() if key.startswith("val_")}
        stands = save(self.out, line["step"], self.model, self.optimizer, self.processor,
                      self.run | scores)
        if stands:
            self.saved = line["step"]
            prune(self.out, self.args.keep, self.args.keep_weights)

    def end(self, lines: Sequence[dict[str, Any]]) -> None:
        """Ends the run behind its last step, finished or told to stop; lines: its log."""
        done = lines[-1]["step"] if lines else self.saved
        # A farewell, or a disk that was full, leaves steps behind the last checkpoint.
        if self.saved < done:
            self.save(lines[-1])
        if self.saved < done:
            fail(f"step {done} could not be saved; make room in {self.out}, then "
                 + (command_to_resume(self.out) if self.saved else "start again"))
        say_farewell(self.out, done, self.args.steps)


def save(
        out: Path, step: int, model: QwenVL, opt: torch.optim.Optimizer, processor: Processor,
        run: dict[str, Any],
) -> bool:
    """Writes out/step_000200: weights (or adapters) and tokenizer, run.json, and state/.

    The folder appears whole or not at all, and `latest` moves to it at once: a run
    that is killed at any moment leaves its last checkpoint standing. False where the
    disk has no room or refuses: that is said in one line, and the last one stands.
    """
    name = f"step_{step:06d}"
    temporary = out / f".{name}.tmp"
    try:
        with together():
            if rank() == 0:
                begin_checkpoint(temporary, checkpoint_bytes(model))
        with together():
            hashes = write_files(temporary, step, model, opt, processor, run)
        state_hashes = gather_hashes(hashes[f"state/{state_file_name(rank())}"])
        with together():
            if rank() == 0:
                for r, state_hash in enumerate(state_hashes):
                    hashes[f"state/{state_file_name(r)}"] = state_hash
                finish_checkpoint(temporary, out / name, hashes)
    except OSError as error:
        if rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        if not isinstance(error, ElsewhereError):
            say(f"step {step} is not saved: {error.strerror} ({out}); what was saved before stands")
        return False
    return True


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


def checkpoint_bytes(model: QwenVL) -> int:
    """What save() will write: weights as stored, float32 parameters, two moments of each."""
    state = 0
    for _, p in lora.saved_parameters(model):
        copies = 3 if p.requires_grad else 1
        state += copies * files.tensor_bytes(p.shape, torch.float32)
    return model.stored_bytes() + state + SMALL_FILES


def begin_checkpoint(temporary: Path, needed: int) -> None:
    """Makes an empty folder to write to; an OSError where the disk has less than is needed."""
    out = temporary.parent
    out.mkdir(parents=True, exist_ok=True)
    # What a run that was killed has left takes room.
    for left in out.glob(".*.tmp"):
        if left.is_dir() and not left.is_symlink():
            shutil.rmtree(left, ignore_errors=True)
    free = shutil.disk_usage(out).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}, {needed / 2 ** 30:.2f} GiB "
                      f"are needed and {free / 2 ** 30:.2f} free")
    (temporary / "state").mkdir(parents=True)


def write_files(
        folder: Path, step: int, model: QwenVL, opt: torch.optim.Optimizer,
        processor: Processor, run: dict[str, Any],
) -> dict[str, str]:
    """Writes this process's files of a checkpoint, down to the disk -> the hash of each."""
    save_weights(folder, model, processor)
    written = []
    if rank() == 0:
        limits = [processor.min_pixels, processor.max_pixels]
        description = json.dumps({**run, "step": step, "pixels": limits}, indent=2) + "\n"
        (folder / "run.json").write_text(description, encoding="utf-8")
        written += [file.name for file in folder.iterdir() if file.is_file()]
    save_state(folder / "state", step, model, opt)
    written.append(f"state/{state_file_name(rank())}")
    for name in written:
        files.sync(folder / name)
    return {name: files.file_hash(folder / name) for name in written}


def finish_checkpoint(temporary: Path, folder: Path, hashes: dict[str, str]) -> None:
    """Lists the files of a checkpoint with their hashes, and gives it its name."""
    files.write_manifest(temporary, hashes)
    # The disk must know all of it, and the log of its steps, before it knows the name.
    for log_file in folder.parent.glob("*.jsonl"):
        files.sync(log_file)
    files.sync(temporary / "state")
    files.sync(temporary)
    files.remove_folder(folder, temporary.with_suffix(".old.tmp"))
    os.replace(temporary, folder)
    files.sync(folder.parent)
    files.point(folder.parent / "latest", folder.name)


def gather_hashes(own: str) -> list[str]:
    """The hash that each process has of its file of the state, by rank."""
    digest = torch.tensor(list(bytes.fromhex(own)), dtype=torch.uint8)
    return [bytes(row).hex() for row in all_gather(digest[None]).tolist()]


def state_file_name(of_rank: int) -> str:
    return f"rank_{of_rank:05d}_of_{world():05d}.safetensors"


def save_state(
        folder: Path, step: int, model: nn.Module, opt: torch.optim.Optimizer) -> None:
    """Writes this process's file of the training state.

    Its tensors are "master/<parameter>", "exp_avg/<parameter>" and
    "exp_avg_sq/<parameter>"; its metadata say which rows these are.
    """
    tensors = {}
    rows = {}
    for key, p in lora.saved_parameters(model):
        rows[key] = {"shape": list(p.shape), "first": first_row(p)}
        tensors[f"master/{key}"] = local_rows(p)
        for kind, x in opt.state.get(p, {}).items():
            if kind != "step":
                tensors[f"{kind}/{key}"] = local_rows(x)
    # The optimizer counts the steps that were not skipped, the same for every
    # parameter.
    states = list(opt.state.values())
    optimizer_steps = int(states[0]["step"]) if states else 0
    metadata = {
        "rows": json.dumps(rows), "step": str(step), "optimizer_steps": str(optimizer_steps)}
    shapes = {name: x.shape for name, x in tensors.items()}
    in_order = (tensors[name] for name in sorted(tensors))
    files.write_tensors(
        folder / state_file_name(rank()), shapes, torch.float32, in_order, metadata)


def save_weights(folder: Path, model: QwenVL, processor: Processor) -> None:
    """Writes weights and tokenizer in hub layout, on the first process."""
    whole = gather_tensors(model)
    try:
        if rank() == 0:
            model.save_pretrained(folder, whole)
            processor.save_pretrained(folder)
    finally:
        # Gathering takes every process, also one that writes nothing, or no more.
        for _ in whole:
            pass


def gather_tensors(model: QwenVL) -> Iterator[Tensor]:
    """The whole tensors of the weights, in the order of their files.

    One at a time exists unsharded, on the device.
    """
    for shard in model.stored_files():
        for x in shard.values():
            yield x.full_tensor() if isinstance(x, DTensor) else x


# ---------------------------------------------------------------- which checkpoints there are

def step_number(folder: Path | str) -> int:
    """step_000200 -> 200."""
    return int(Path(folder).name.removeprefix("step_"))


def steps_so_far(out: Path) -> list[Path]:
    """The folders of a run's steps, oldest first, up to the one that `latest` names.

    Later ones are of a course that the run has left.
    """
    newest = step_number(os.readlink(out / "latest"))
    folders = [p for p in out.glob("step_*") if p.name.removeprefix("step_").isdecimal()]
    return sorted((p for p in folders if step_number(p) <= newest), key=step_number)


def resumable_steps(out: Path) -> list[Path]:
    """The step that `latest` names, then those before it that have their training state."""
    newest = out / os.readlink(out / "latest")
    earlier = [p for p in steps_so_far(out) if p != newest and (p / "state").exists()]
    return [newest, *reversed(earlier)]


def prune(out: Path, keep: int, keep_weights: int | None) -> None:
    """Removes what the run in `out` need not keep, and lets `best` name its best step.

    `keep` newest steps keep their training state. The weights of every step stay, or of
    `keep_weights` newest ones and the best.
    """
    if rank():
        return
    steps = steps_so_far(out)
    best = best_step(steps)
    if best is not None:
        files.point(out / "best", best.name)
    for folder in steps[:-keep]:
        files.remove_folder(folder / "state", out / f".{folder.name}.state.tmp")
    if keep_weights is not None:
        for folder in steps[:-max(keep, keep_weights)]:
            if folder != best:
                files.remove_folder(folder, out / f".{folder.name}.tmp")


def best_step(steps: Sequence[Path]) -> Path | None:
    """The step with the highest val_mIoU in its run.json, the first of equals."""
    scores = {}
    for folder in steps:
        run = read_json(folder / "run.json") if run_is_whole(folder) else None
        if run and "val_mIoU" in run:
            scores[folder] = run["val_mIoU"]
    return max(scores, key=scores.__getitem__, default=None)


def newest_whole(out: Path) -> Path:
    """The newest step of a run whose files are as they were written.

    Where that is not the one that `latest` names, the first process says why, and
    `latest` moves.
    """
    damages = []
    for step in resumable_steps(out):
        damage = first_damage(step)
        if damage is None:
            break
        damages.append(damage)
    else:
        raise CheckpointError(f"{damages[0]}; no earlier step in {out} is whole and has its "
                              "training state; start anew with --init")
    if damages and rank() == 0:
        for damage in damages:
            say(f"warning: {damage}; going on from {step.name}")
        files.point(out / "latest", step.name)
    return step


def first_damage(step: Path) -> str | None:
    """What is wrong with the files of a checkpoint, in words; None where they are whole.

    The processes share the work, and come to one result.
    """
    if not (step / "state").is_dir():
        return f"{step / 'state'} is missing"
    try:
        listed = files.read_manifest(step)
    except files.UNREADABLE as error:
        return f"{step / files.MANIFEST} is unreadable ({error})"
    if listed is None:
        # A checkpoint of an earlier version: load_state() looks at the headers.
        return None
    names = sorted(listed)
    place = len(names)
    for i in range(rank(), len(names), world()):
        if not files.is_whole(step / names[i], listed[names[i]]):
            place = i
            break
    place = -int(all_max(torch.tensor(-place)))
    if place == len(names):
        return None
    return files.damage(step / names[place], listed[names[place]])


# ---------------------------------------------------------------- a training state, read

@dataclass
class StateFile:
    """One process's file of the training state, opened."""

    tensors: safe_open                 # "master/<parameter>", "exp_avg/<parameter>", ...
    rows: dict[str, dict[str, Any]]    # parameter -> "shape" of the whole, "first" row in the file
    step: int
    optimizer_steps: float

    def read_into(self, target: Tensor, first: int, kind: str, key: str) -> None:
        """Copies what this file has of rows `first`, `first` + 1, ... of a tensor."""
        stored = self.tensors.get_slice(f"{kind}/{key}")
        stored_first = self.rows[key]["first"]
        stored_rows = range(stored_first, stored_first + stored.get_shape()[0])
        rows = shared_rows(range(first, first + len(target)), stored_rows)
        if rows:
            source = stored[rows.start - stored_first:rows.stop - stored_first]
            target[rows.start - first:rows.stop - first] = source.to(target.device)


def shared_rows(a: range, b: range) -> range:
    """The rows that two parts of a tensor have in common, numbered as in the whole tensor.

    Of 10 rows the second of two processes has 5 to 9. Written by four processes, they
    lie in four files: rows 0 to 2, 3 to 5, 6 to 8, and 9. The second file has one of
    them, the third has three, the first has none.

    >>> shared_rows(range(5, 10), range(3, 6)), shared_rows(range(5, 10), range(6, 9))
    (range(5, 6), range(6, 9))
    >>> len(shared_rows(range(5, 10), range(0, 3)))
    0
    """
    return range(max(a.start, b.start), min(a.stop, b.stop))


def open_state(step: Path) -> list[StateFile]:
    """The files of a checkpoint's training state; a CheckpointError if it is not whole."""
    paths = sorted((step / "state").glob("rank_*.safetensors"))
    if not paths or len(paths) != int(paths[0].stem.rsplit("_", 1)[1]):
        raise CheckpointError(f"{step / 'state'}: the training state is not whole; "
                              f"start anew with --init {step}")
    opened = []
    for path in paths:
        try:
            tensors = safe_open(path, "pt")
            metadata = tensors.metadata()
            opened.append(StateFile(
                tensors, json.loads(metadata["rows"]), int(metadata["step"]),
                float(metadata["optimizer_steps"])))
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{path}: not a whole training state ({error}); point {step.parent / 'latest'} at "
                f"an earlier step, or start anew with --init {step}") from None
    return opened


def restore(out: Path, model: nn.Module, opt: torch.optim.Optimizer) -> int:
    """Fills parameters and optimizer from the newest whole checkpoint of `out` -> its step.

    Any number of processes may have written it.
    """
    return load_state(newest_whole(out), model, opt)


@torch.no_grad()
def load_state(step: Path, model: nn.Module, opt: torch.optim.Optimizer) -> int:
    """Fills parameters and optimizer from a checkpoint's training state -> its step."""
    parts = open_state(step)
    # A parameter that was frozen has no moments. The first process has rows of every
    # parameter.
    stored_names = set(parts[0].tensors.keys())
    for key, p in lora.saved_parameters(model):
        stored = parts[0].rows.get(key)
        if stored is None or stored["shape"] != list(p.shape):
            raise CheckpointError(f"{step / 'state'}: {key} does not fit this model; "
                                  "resume with the --init of the run")
        targets = {"master": p.data}
        if f"exp_avg/{key}" in stored_names:
            opt.state[p] = empty_moments(p, parts[0].optimizer_steps)
            targets["exp_avg"] = opt.state[p]["exp_avg"]
            targets["exp_avg_sq"] = opt.state[p]["exp_avg_sq"]
        for kind, target in targets.items():
            for part in parts:
                part.read_into(local_rows(target), first_row(p), kind, key)
    return parts[0].step


def fill_moments(model: nn.Module, opt: torch.optim.Optimizer) -> None:
    """Puts AdamW's state in place before its first step, which would make the same."""
    for p in model.parameters():
        if p.requires_grad and p not in opt.state:
            opt.state[p] = empty_moments(p, 0.0)


def empty_moments(p: Tensor, optimizer_steps: float) -> dict[str, Tensor]:
    """AdamW's state of a parameter after so many steps, its moments still to be filled."""
    steps = torch.tensor(optimizer_steps)
    return {
        # The fused AdamW counts on the GPU.
        "step": steps.to(p.device) if p.is_cuda else steps,
        "exp_avg": torch.zeros_like(p.data),
        "exp_avg_sq": torch.zeros_like(p.data),
    }
