"""train.checkpoints."""
import argparse
import errno
import hashlib
import json
import os
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from model import QwenVL
from qwen import hub, lora
from qwen.hub import MANIFEST, CheckpointError, by_number, sync_stream
from qwen.processor import Processor
from readers.base import read_json
from train.dist import (
    ElsewhereError,
    all_gather,
    all_max,
    compute_dtype,
    fail,
    first_row,
    local_rows,
    rank,
    say,
    together,
    world,
    writable,
)

# What reading a damaged one raises.
UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)


def sync(path: Path) -> None:
    """Forces a file, or the list of names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def point(link: Path, target: str) -> None:
    """Makes a link name another target, at once."""
    # A link cannot be changed in place, but another can take its name.
    other = link.with_name(f".{link.name}.tmp")
    other.unlink(missing_ok=True)
    other.symlink_to(target)
    os.replace(other, link)
    sync(link.parent)


def remove_folder(folder: Path, aside: Path) -> None:
    """Removes a folder; it vanishes at once under its name, by a move to `aside`."""
    shutil.rmtree(aside, ignore_errors=True)
    if folder.exists():
        os.replace(folder, aside)
        shutil.rmtree(aside, ignore_errors=True)


# ---------------------------------------------------------------- hashes

def file_hash(file: Path) -> str:
    """The SHA-256 of a file, as sha256sum prints it."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_manifest(folder: Path, hashes: Mapping[str, str]) -> None:
    """Lists a folder's files: the hash of each path, with its size in bytes."""
    listed = {}
    for name in sorted(hashes):
        listed[name] = {"bytes": (folder / name).stat().st_size, "sha256": hashes[name]}
    with open(folder / MANIFEST, "wb") as stream:
        stream.write(json.dumps(listed, indent=2).encode() + b"\n")
        sync_stream(stream)


def read_manifest(folder: Path) -> dict[str, dict[str, Any]] | None:
    """File -> its "bytes" and "sha256"; None where there is no list. ValueError if unreadable."""
    file = folder / MANIFEST
    if not file.exists():
        return None
    listed = json.loads(file.read_bytes())
    for entry in listed.values():
        if not (isinstance(entry["bytes"], int) and isinstance(entry["sha256"], str)):
            raise ValueError("not a list of files")
    return listed


def is_whole(file: Path, listed: Mapping[str, Any]) -> bool:
    """Whether a file of a manifest is as it was written."""
    if not file.is_file() or file.stat().st_size != listed["bytes"]:
        return False
    return file_hash(file) == listed["sha256"]


def damage(file: Path, listed: Mapping[str, Any]) -> str:
    """What is wrong with a file that is not whole, in words."""
    if not file.is_file():
        return f"{file} is missing"
    size = file.stat().st_size
    if size != listed["bytes"]:
        return f"{file} has {size:,} bytes, but had {listed['bytes']:,} when it was written"
    return f"{file} is not as it was written"


# Bytes of a checkpoint's small files: tokenizer, settings, lists.
SMALL_FILES = 2 ** 24
# Of a run's folder: the records whose images can't be decoded.
UNREADABLE_LOG = "unreadable.jsonl"


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


# ---------------------------------------------------------------- model and optimizer

def open_model(
        folder: Path, device: torch.device | None = None, max_pixels: int | None = None,
) -> tuple[QwenVL, Processor]:
    """Model and processor of a checkpoint; a CheckpointError where they do not fit each other.

    With a device the model is there to answer, in what that device computes in
    (bfloat16 on CUDA, float32 on the CPU). Without one it is as stored, to be
    prepared for training.
    """
    dtype = None if device is None else compute_dtype(device)
    model = QwenVL.from_pretrained(folder, dtype, device or "cpu")
    processor = Processor.from_pretrained(folder, max_pixels=max_pixels)
    processor.check_fits(model.config)
    return model, processor


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
        listed = read_manifest(step)
        if listed is None:
            return (step / "run.json").exists()
        return is_whole(step / "run.json", listed["run.json"])
    except UNREADABLE:
        return False


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


def checkpoint_bytes(model: QwenVL) -> int:
    """What save() will write: weights as stored, float32 parameters, two moments of each."""
    state = 0
    for _, p in lora.saved_parameters(model):
        copies = 3 if p.requires_grad else 1
        state += copies * hub.tensor_bytes(p.shape, torch.float32)
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
        sync(folder / name)
    return {name: file_hash(folder / name) for name in written}


def finish_checkpoint(temporary: Path, folder: Path, hashes: dict[str, str]) -> None:
    """Lists the files of a checkpoint with their hashes, and gives it its name."""
    write_manifest(temporary, hashes)
    # The disk must know all of it, and the log of its steps, before it knows the name.
    for log_file in folder.parent.glob("*.jsonl"):
        sync(log_file)
    sync(temporary / "state")
    sync(temporary)
    remove_folder(folder, temporary.with_suffix(".old.tmp"))
    os.replace(temporary, folder)
    sync(folder.parent)
    point(folder.parent / "latest", folder.name)


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
    hub.write_tensors(
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
        point(out / "best", best.name)
    for folder in steps[:-keep]:
        remove_folder(folder / "state", out / f".{folder.name}.state.tmp")
    if keep_weights is not None:
        for folder in steps[:-max(keep, keep_weights)]:
            if folder != best:
                remove_folder(folder, out / f".{folder.name}.tmp")


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
        point(out / "latest", step.name)
    return step


def first_damage(step: Path) -> str | None:
    """What is wrong with the files of a checkpoint, in words; None where they are whole.

    The processes share the work, and come to one result.
    """
    if not (step / "state").is_dir():
        return f"{step / 'state'} is missing"
    try:
        listed = read_manifest(step)
    except UNREADABLE as error:
        return f"{step / hub.MANIFEST} is unreadable ({error})"
    if listed is None:
        # A checkpoint of an earlier version: load_state() looks at the headers.
        return None
    names = sorted(listed)
    place = len(names)
    for i in range(rank(), len(names), world()):
        if not is_whole(step / names[i], listed[names[i]]):
            place = i
            break
    place = -int(all_max(torch.tensor(-place)))
    if place == len(names):
        return None
    return damage(step / names[place], listed[names[place]])


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
