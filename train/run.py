"""What both stages share: the order of the data, the log, and how a run starts and stops."""
import argparse
import faulthandler
import functools
import importlib.metadata
import itertools
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed
from torch import nn
from tqdm import tqdm

from data import load, refusal_summary
from qwen.hub import CheckpointError, newest_step
from qwen.processor import prompt_hash
from readers.base import (
    MOST_UNREADABLE, DataError, Record, Records, UnreadableImage, read_log)
from report import watch
from train import checkpoints, dist
from train.ahead import ahead
from train.flags import too_long_or_short

STOP_AFTER_SKIPPED = 5             # steps in a row without a finite gradient
# Schedulers and users send these signals to end a run. It stops after the current step.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
STOP_REQUESTED = threading.Event()
UNREADABLE_LOG = "unreadable.jsonl"
# The time left is in the postfix: tqdm's own counts validations as training.
BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"
PLAIN_EVERY = 60                   # seconds between lines about progress without a terminal


def load_records(args: argparse.Namespace, split: str) -> tuple[Records, list[Record]]:
    """The records to train on, which must not change on --resume, and those to validate on."""
    # Callers other than the stages may lack the flags about reading.
    reading = {flag: vars(args).get(flag) for flag in ("coords", "stretch")}
    splits = (split, "val") if args.val else (split,)
    loaded = {name: load(args.data, args.root, name, **reading) for name in splits}
    refusals = {name: refusal_summary(loaded[name], args.data, args.root, name) for name in splits}
    records = loaded[split]
    if not records:
        why = refusals[split] or "none was refused; is its share too small?"
        raise DataError(f"no record of {args.data} {split} to train on; {why}")
    old_hash = checkpoints.read_run(Path(args.out))["data_hash"] if args.resume else records.hash
    if old_hash != records.hash:
        dist.fail(f"--resume, but the records of {args.data} {split} are not those of the run in "
                  f"{args.out} ({records.hash}, not {old_hash}); name their --root, or start "
                  "another run with another --out")
    if dist.rank() == 0:
        for name, refused in refusals.items():
            use = "validate" if name == "val" else "train"
            print(f"{len(loaded[name]):,} records of {name}, the split to {use} on"
                  + (f"; {refused}" if refused else ""))
    return records, loaded.get("val", [])[:args.val]


def launch(main: Callable[[], None], catch_signals: bool = False) -> NoReturn:
    """Runs a script's main function, then exits with status 0, 2 (a user's mistake, a full disk),
    130 (Ctrl-C) or 1 (any other error). Only one process prints what went wrong.
    catch_signals: STOP_SIGNALS only set STOP_REQUESTED, so that `Run.steps` can finish its step."""
    if catch_signals:
        # A thread reads the signals, because the main thread may be in a long library call.
        read_end, write_end = os.pipe()
        os.set_blocking(write_end, False)
        signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
        for number in STOP_SIGNALS:
            signal.signal(number, lambda number, frame: None)
        threading.Thread(target=read_signals, args=(read_end,), daemon=True).start()
    # Texts and paths may hold characters that the terminal's encoding lacks.
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")
    status = 0
    try:
        try:
            if dist.world() > 1:
                dist.STORE, _, _ = next(torch.distributed.rendezvous(
                    "env://", timeout=dist.GROUP_TIMEOUT))
            main()
        except (DataError, CheckpointError) as error:
            dist.fail(error)
        except OSError as error:
            if error.errno not in checkpoints.DISK_FULL:
                raise
            dist.fail(f"{error.strerror}: {error.filename or 'a log'} could not be written; free "
                      "some space and continue with --resume")
    except SystemExit as leaving:
        status = leaving.code or 0
    except KeyboardInterrupt:
        print(f"{Path(sys.argv[0]).name}: interrupted", file=sys.stderr)
        status = 128 + signal.SIGINT
    except Exception as error:
        if dist.world() == 1:
            raise
        # The reason must be the last line, not the progress bar.
        for bar in list(tqdm._instances):
            bar.leave = False
            bar.close()
        if dist.first_to_fail():
            # gloo and NCCL raise these errors when another process has ended.
            if isinstance(error, torch.distributed.DistError) or "/gloo/" in str(error):
                print("a process of this run has ended; checkpoints are intact, continue with "
                      "--resume", file=sys.stderr)
            else:
                traceback.print_exc()
        status = 1
    # A clean shutdown would wait for a process that has failed.
    if torch.distributed.is_initialized() and (status == 0 or dist.world() == 1):
        torch.distributed.destroy_process_group()
    if dist.world() > 1:
        # torch's threads sometimes crash while the interpreter shuts down (torch 2.13, gloo), and
        # torchrun would report a finished run as failed. All files are written by now.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def read_signals(read_end: int) -> None:
    """Sets STOP_REQUESTED at a stop signal, and ends the process at a second SIGINT."""
    interrupts = 0
    while True:
        for number in os.read(read_end, 64):
            if number in STOP_SIGNALS:
                STOP_REQUESTED.set()
            interrupts += number == signal.SIGINT
            if interrupts == 2:
                # Begin a new line, because the progress bar ends without one.
                print("\nstopped at once; checkpoints are intact, continue with --resume",
                      file=sys.stderr, flush=True)
                os._exit(128 + signal.SIGINT)


@functools.lru_cache(maxsize=2)        # a batch usually has records of one or two epochs
def epoch_order(n: int, seed: int, epoch: int) -> list[int]:
    """The order of n records in an epoch."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(n, generator=generator).tolist()


def record_at(records: Sequence[Record], place: int, seed: int) -> Record:
    """The record at a place in the order, counted from 0 over all epochs.
    The order is a pure function of the seed, so a resume restores no sampler, and every process
    knows the whole batch. With batches of b, step s has the places s * b to s * b + b - 1."""
    epoch, position = divmod(place, len(records))
    return records[epoch_order(len(records), seed, epoch)[position]]


@dataclass
class Batch:
    """This process's part of a step's records."""
    records: list[Record]
    inputs: list[Any]                  # made from each record: a prompt, or a training example
    unreadable: list[dict[str, Any]]   # records that were replaced: place, id, image, problem


class Run:
    """A run of a stage: its folder, log, checkpoints and steps. sft.main() shows its use."""

    def __init__(self, args: argparse.Namespace, stage: str, records: Records,
                 logs: Sequence[str] = ("metrics.jsonl",)) -> None:
        self.args, self.stage, self.records, self.logs = args, stage, records, logs
        self.out = Path(args.out)
        self.lines: list[dict[str, Any]] = []     # of metrics.jsonl
        self.unreadable: dict[str, str] = {}      # id -> image of records that were replaced
        self.answers: list[watch.Answers] = []    # the last ones, for report.html
        self.send = self.end_tracking = lambda *_: None      # functions of --track
        self.printed = -math.inf                  # when a plain line about progress was
        self.hashes: dict[str, str | None] = {}   # of what --init and --cot name
        if dist.rank():
            return                  # trial files are made, which others would find
        dist.check_writable(self.out, append=True)
        newest = newest_step(self.out)
        if newest != self.out and not args.resume:
            dist.fail(f"{self.out} already holds a run, up to {newest.name}; continue it with "
                      "--resume, or name another --out")
        if any(self.out.iterdir()) and not args.resume:
            dist.fail(f"{self.out} is not empty, but holds no checkpoint; name another --out")
        checkpoints.try_disk(self.out)
        # What --init and --cot name may move during a run, but not change.
        resumed = args.resume and newest != self.out
        old = checkpoints.read_run(self.out).get("hashes", {}) if resumed else {}
        for flag in {"init", "cot"} & vars(args).keys():
            path = getattr(args, flag)
            self.hashes[flag] = path and checkpoints.content_hash(path)
            if old.get(flag, self.hashes[flag]) != self.hashes[flag]:
                dist.fail(f"--resume, but --{flag} {path} has changed since the run in {self.out} "
                          "began; name what it was, or start another run with another --out")

    def begin(self, model: nn.Module, optimizer: torch.optim.Optimizer, processor: Any) -> None:
        """On --resume, restores the newest checkpoint and cuts logs. Prints what is trained."""
        self.model, self.optimizer, self.processor = model, optimizer, processor
        self.first = checkpoints.restore(self.out, model, optimizer) if self.args.resume else 0
        self.saved = self.first
        if dist.rank() == 0:
            print_parameters(model)
            for name in (*self.logs, UNREADABLE_LOG):
                cut_log(self.out / name, self.first)
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        self.lines = read_log(self.out / "metrics.jsonl")
        self.unreadable = {bad["id"]: bad["image"] for bad in read_log(self.out / UNREADABLE_LOG)}
        if self.args.track and dist.rank() == 0:
            try:
                self.send, self.end_tracking = watch.open_tracker(self.args, self.first)
            except Exception as error:      # it is not installed, has no key, no network
                dist.fail(f"--track {self.args.track}: {error}; pip install it, or log in to it")
        packages = ("torch", "numpy", "pillow", "safetensors", "tokenizers")
        # run.json has all that is needed to repeat the run and to evaluate it.
        self.description = {
            "stage": self.stage,
            "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            "commit": commit(),
            "data": self.args.data, "root": self.args.root, "records": len(self.records),
            "data_hash": self.records.hash, "prompt_hash": prompt_hash(), "hashes": self.hashes,
            "versions": {name: importlib.metadata.version(name) for name in packages},
            "processes": dist.world(), "device": self.args.device,
            "flags": {k: v for k, v in vars(self.args).items()
                      if k not in ("resume", "config")},
        }

    def batch(self, make: Callable[[Record], Any], size: int, step: int) -> Batch:
        """This process's records of a step (every dist.world()th), and what `make` makes of them.
        A record with an image that cannot be decoded is replaced by the one `size` places later,
        and so on. So replacements do not depend on the number of processes, and within an epoch
        the records of a batch differ. The search ends when more than MOST_UNREADABLE of the
        records have failed; `log` then stops the run."""
        batch = Batch([], [], [])
        for first_place in range(step * size + dist.rank(), (step + 1) * size, dist.world()):
            for place in itertools.count(first_place, size):
                failed = {bad["id"] for bad in batch.unreadable}
                if len(failed) > MOST_UNREADABLE * len(self.records):
                    return batch
                record = record_at(self.records, place, self.args.seed)
                try:
                    batch.inputs.append(make(record))
                    batch.records.append(record)
                    break
                except UnreadableImage as error:
                    batch.unreadable.append({"place": place, "id": record.id,
                                             "image": str(record.image), "problem": str(error)})
        return batch

    def steps(self, make: Callable[[Record], Any], size: int) -> Iterator[tuple[int, Batch]]:
        """Yields the remaining steps with their batches, until a signal or a file `stop`."""
        args, n = self.args, len(self.records)
        steps = range(self.first, args.steps)
        if dist.rank() == 0:
            after = f"; continuing after step {self.first:,}" * bool(self.first)
            print(f"{n:,} records; {args.steps:,} steps of {size} = {args.steps * size / n:.3g} "
                  f"passes; saves each {args.every} to {self.out}{after}", flush=True)
            for words in too_long_or_short(args, self.stage, n, size):
                print(f"warning: {words}", file=sys.stderr)
        batches = ahead(functools.partial(self.batch, make, size), steps)
        with tqdm(initial=self.first, total=args.steps, desc=self.stage, bar_format=BAR,
                  disable=dist.rank() > 0 or None) as self.bar:
            for step, batch in zip(steps, batches):
                # All processes stop together, even if only one got the signal.
                stop = STOP_REQUESTED.is_set() or dist.rank() == 0 and (self.out / "stop").exists()
                if dist.all_reduce(torch.tensor(int(stop)), "max"):
                    break
                yield step, batch

    def due(self, step: int) -> bool:
        """Whether a validation and a checkpoint follow this step."""
        return (step + 1) % self.args.every == 0 or step + 1 == self.args.steps

    def log(self, line: dict[str, Any], batch: Batch, warnings: Sequence[str] = (),
            show: Sequence[str] = ()) -> None:
        """Logs a step, saves a checkpoint if one is due, and stops a run that cannot continue.
        warnings: sentences about the step. show: keys of the line for the progress bar."""
        line["time"] = round(time.time(), 3)
        self.lines.append(line)
        self.count_unreadable(line, batch.unreadable)
        warnings = list(warnings)
        if not line["finite"]:
            names = ", ".join(dist.gather_lists([record.id for record in batch.records]))
            warnings.append(
                f"the gradient is not finite and the step was skipped; its records: {names}")
        if warnings:
            line["warning"] = "; ".join(warnings)
            before = self.lines[-2].get("warning") if len(self.lines) > 1 else None
            if dist.rank() == 0 and line["warning"] != before:
                tqdm.write(f"warning, step {line['step']}: {line['warning']}", file=sys.stderr)
        append_line(self.out / "metrics.jsonl", line)
        # The checkpoint comes last, so it never covers a step that is not logged.
        due = self.due(line["step"] - 1)
        if due:
            self.save(line)
        words = f"{watch.time_left(self.lines, self.args.steps)} left"
        for key in show:
            words += f", {key} {line[key]:.4g}" if key in line else ""
        words += ", warning" * bool(warnings)
        self.bar.set_postfix_str(words, refresh=False)
        self.bar.update()
        if dist.rank() == 0:
            if self.bar.disable and (due or time.monotonic() - self.printed > PLAIN_EVERY):
                self.printed = time.monotonic()
                print(f"{self.stage}: step {line['step']:,} of {self.args.steps:,}, {words}",
                      file=sys.stderr)
            if scores := watch.validation_words(line):
                tqdm.write(f"step {line['step']:,}: {scores}")
            figures = {k: v for k, v in line.items() if type(v) in (int, float)}
            self.attempt(f"--track {self.args.track}", self.send, figures, line["step"])
        if due and line["step"] < self.args.steps:      # end() writes the last one
            self.report()
        # A run does not recover from several skipped steps in a row, and must not end on one.
        skipped = trailing(self.lines, lambda line: not line["finite"])
        if skipped >= STOP_AFTER_SKIPPED or skipped and line["step"] == self.args.steps:
            self.report("stopped: no gradient is finite")
            dist.fail(f"no gradient is finite from step {line['step'] + 1 - skipped} on; lower "
                      f"--lr; {self.out} has the checkpoints before that, and its metrics.jsonl "
                      "names the records")

    def report(self, ended: str = "") -> None:
        """Writes report.html, on the first process. ended: how the run has ended, in words."""
        if dist.rank() == 0:
            self.attempt("report.html is not written", watch.write_report, self.out / "report.html",
                         self.description, self.args.steps, self.lines, self.answers, ended)

    def attempt(self, what: str, do: Callable[..., Any], *args: Any) -> None:
        """Calls what only shows the run: no error of it may stop the training."""
        try:
            do(*args)
        except Exception as error:
            tqdm.write(f"warning: {what}: {error}", file=sys.stderr)

    def count_unreadable(self, line: dict[str, Any], met: Sequence[dict[str, Any]]) -> None:
        """Logs the records that any process replaced; stops the run if there are too many."""
        if dist.all_reduce(torch.tensor(len(met))).item():
            for bad in sorted(dist.gather_lists(met), key=lambda bad: bad["place"]):
                if bad["id"] in self.unreadable:
                    continue
                if dist.rank() == 0 and bad["image"] not in self.unreadable.values():
                    tqdm.write(f"{bad['problem']}; another record takes its place")
                self.unreadable[bad["id"]] = bad["image"]
                kept = {key: bad[key] for key in ("id", "image", "problem")}
                append_line(self.out / UNREADABLE_LOG, {"step": line["step"], **kept})
            if len(self.unreadable) > MOST_UNREADABLE * len(self.records):
                dist.fail(f"so far {len(self.unreadable):,} of {len(self.records):,} records "
                          f"have an image that cannot be decoded, more than {MOST_UNREADABLE:.0%}; "
                          f"{self.out / UNREADABLE_LOG} names them; python data.py finds all")
        if self.unreadable:
            line["unreadable"] = len(self.unreadable)

    def save(self, line: dict[str, Any]) -> None:
        if checkpoints.save(self.out, line, self.model, self.optimizer, self.processor,
                            self.description, self.args):
            self.saved = line["step"]

    def end(self) -> None:
        """Saves the last step if it is not saved, and prints the command to resume."""
        done = self.lines[-1]["step"] if self.lines else self.saved
        launcher = ["python"]
        if "TORCHELASTIC_RUN_ID" in os.environ:
            launcher = ["torchrun", "--nproc_per_node", os.environ["LOCAL_WORLD_SIZE"]]
        resume = shlex.join([*launcher, sys.argv[0], "--out", str(self.out), "--resume"])
        # A stop request, or a full disk, leaves steps after the last checkpoint.
        if self.saved < done:
            self.save(self.lines[-1])
        if self.saved < done:
            dist.fail(f"step {done} could not be saved; free some space in {self.out}, then "
                      + (resume if self.saved else "start again"))
        if dist.rank():
            return
        # Remove the stop file, or the next run would stop at once.
        (self.out / "stop").unlink(missing_ok=True)
        self.attempt(f"--track {self.args.track}", self.end_tracking)
        if done == 0:
            # A new run needs an empty folder.
            (self.out / UNREADABLE_LOG).unlink(missing_ok=True)
            print("stopped before the first step: nothing is lost; the same command starts again")
            return
        if done < self.args.steps:
            words = f"stopped after step {done} of {self.args.steps}; resume with: {resume}"
        else:
            words = f"finished: {self.out / 'latest'} is step {done}"
            if best := watch.best(self.lines):
                words += (f", {self.out / 'best'} step {best['step']} "
                          f"(val mIoU {best['val_mIoU']:.3f})")
            # After CoT-SFT, RFT on the same data with a tenth of the learning rate; then eval.py.
            folder, next_ = Path(sys.argv[0]).parent, ["eval.py", str(self.out)]
            if self.stage == "sft":
                next_ = ["rft.py", "--init", str(self.out), "--out", str(self.out.with_name("rft")),
                         "--lr", f"{self.args.lr / 10:g}"]
                for flag in ("data", "root", "data-coords", "lora"):
                    value = getattr(self.args, flag.removeprefix("data-"))
                    next_ += [] if value is None else [f"--{flag}", str(value)]
            words += f"; next: {shlex.join([*launcher, str(folder / next_[0]), *next_[1:]])}"
        self.report(words)
        print(words)


def trailing(lines: Sequence[dict[str, Any]], holds: Callable[[dict[str, Any]], bool]) -> int:
    """The number of lines at the end for which `holds` is true."""
    return sum(1 for _ in itertools.takewhile(holds, reversed(lines)))


def append_line(path: Path, line: dict[str, Any]) -> None:
    """Appends a line to a JSONL file, on the first process, and restarts the watchdog."""
    faulthandler.dump_traceback_later(dist.STUCK_AFTER, repeat=True)
    if dist.rank() == 0:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def cut_log(path: Path, step: int) -> None:
    """Removes lines of steps after `step`, which will run again, and an incomplete last line."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    earlier = ""
    for n, line in enumerate(lines, 1):
        try:
            if json.loads(line)["step"] <= step:
                earlier += line + "\n"
        except (ValueError, KeyError, TypeError):
            if n < len(lines):
                raise DataError(
                    f"{path}, line {n}: not a step's line; remove it to continue") from None
    temporary = path.with_suffix(".tmp")
    temporary.write_text(earlier, encoding="utf-8")
    os.replace(temporary, path)


def commit() -> str | None:
    """Hash of the commit that this code is at; None outside of a repository."""
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False,
                         cwd=Path(__file__).parent)
    return git.stdout.strip() or None


def print_parameters(model: nn.Module) -> None:
    """Prints how many parameters each part has, and how many of them are trained."""
    parts = {"visual.": "vision tower", "model.embed_tokens": "embeddings",
             "model.layers": "language layers", "": "head and norm"}
    total, trained = Counter(), Counter()
    for name, p in model.named_parameters():
        part = next(words for start, words in parts.items() if name.startswith(start))
        total[part] += p.numel()
        trained[part] += p.numel() * p.requires_grad
    for part, n in total.items():
        print(f"  {part:16} {n:14,} parameters, {trained[part]:14,} trained")
