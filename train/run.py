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
import signal
import subprocess
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, NoReturn

import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

from data import add_reading_flags, load, refusal_summary
from qwen.hub import CheckpointError
from qwen.processor import prompt_hash
from readers.base import MOST_UNREADABLE, DataError, Record, Records, UnreadableImage
from train.checkpoints import UNREADABLE_LOG, read_run
from train.dist import (
    PATCH_TOKENS,
    STUCK_AFTER,
    T,
    all_max,
    all_sum,
    barrier,
    choose_device,
    fail,
    first_to_fail,
    gather_lists,
    lost_peer,
    open_store,
    print_above_bar,
    rank,
    world,
)

# So many steps in a row whose gradient is not finite mean that something is broken.
STOP_AFTER_SKIPPED = 5
# Flags that a resume may change. The root may move, since the data must have the
# run's hash.
FREE_ON_RESUME = (
    "root", "steps", "epochs", "device", "workers", "micro_tokens", "every", "val",
    "gradient_checkpointing", "deterministic", "plan", "gpus", "memory", "image", "keep",
    "keep_weights",
)
# The signals by which users and schedulers end a run, and whether one came.
FAREWELLS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
TOLD = threading.Event()
# Disk full, quota used up, file larger than the shell's limit.
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


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
            open_store()
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
        print_above_bar(f"warning, step {line['step']}: {line['warning']}")


def last_steps(lines: Sequence[dict[str, Any]], true_of: Callable[[dict[str, Any]], bool]) -> int:
    """Of how many steps in a row, up to the last, something is true."""
    return sum(1 for _ in itertools.takewhile(true_of, reversed(lines)))


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
