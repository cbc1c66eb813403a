"""Checkpoints of a run: written whole or not at all, checked, resumed.

    ckpt/sft/latest -> step_000200   the newest; `best` names the step of the highest val_mIoU
    ckpt/sft/step_000200/            weights and tokenizer in hub layout (adapters in PEFT's)
        run.json                     how the run began: flags, data, versions
        state/rank_00000_of_00008.safetensors    each process's float32 parameters and moments
        manifest.json                size and SHA-256 of all these files
"""
import argparse
import errno
import hashlib
import json
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from model import QwenVL
from qwen import lora
from qwen.hub import (
    ADAPTER_CONFIG, MALFORMED, MANIFEST, CheckpointError, base_folder, by_number,
    is_checkpoint, named_step, newest_step, write_json, write_tensors)
from qwen.processor import Processor
from readers.base import read_json
from train import dist
from train.dist import fail, gather_lists, raise_on_all_processes, rank, world

# Bytes of a checkpoint's small files, at most: tokenizer, settings, manifest.
SMALL_FILES = 2 ** 24
# Disk full, quota used up, file larger than the shell's limit.
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def open_model(
        folder: Path, device: torch.device | None = None,
        max_pixels: int | None = None) -> tuple[QwenVL, Processor]:
    """With a device: on it, in the dtype for its passes. Without: as stored, on the CPU."""
    dtype = None if device is None else dist.COMPUTE_DTYPES[device.type]
    model = QwenVL.from_pretrained(folder, dtype, device or "cpu")
    processor = Processor.from_pretrained(folder, max_pixels=max_pixels)
    processor.check_fits(model.config)
    return model, processor


def read_run(out: Path) -> dict[str, Any]:
    """The newest undamaged run.json of a run to resume."""
    steps = steps_so_far(out)
    if not steps:
        fail(f"--resume, but there is no checkpoint in {out}; "
             "leave --resume out, or name the --out of the run")
    step = next((step for step in steps if damage(step, "run.json") is None), steps[0])
    run = read_json(step / "run.json")
    if not isinstance(run, dict) or not {"stage", "data_hash", "flags"} <= run.keys():
        fail(f"{step / 'run.json'} does not say how the run began; "
             f"start a new one with --init {step}")
    return run


def steps_so_far(out: Path) -> list[Path]:
    """The folders of a run's steps, newest first. The first is the one that `latest` names, even if
    it is missing. Steps later than `latest` are ignored, because the run has gone back to it. In a
    partial copy, where `latest` or its step is missing, all steps count."""
    latest = named_step(out / "latest")
    steps = [p for p in out.glob("step_*") if p.name.removeprefix("step_").isdecimal()]
    if latest and latest.exists():
        steps = [p for p in steps if by_number(p) < by_number(latest)]
    steps.sort(key=by_number, reverse=True)
    if latest:
        return [latest, *steps]
    # Perhaps only `latest` was copied, as a folder.
    return steps or [out / "latest"] * is_checkpoint(out / "latest")


def sync(path: Path) -> None:
    """Forces a file, or the names in a folder, to the disk, if the file system can do that."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno in (*DISK_FULL, errno.EIO):
            raise


def point(link: Path, target: str) -> None:
    """Points a link at a target; without links, writes a file with the target's name instead.
    Atomic: the new one replaces the old one. A folder in its place gets another name."""
    other = link.with_name(f".{link.name}.tmp")
    other.unlink(missing_ok=True)
    try:
        other.symlink_to(target)
    except OSError:
        other.write_text(f"{target}\n", encoding="utf-8")
        sync(other)
    if link.is_dir() and not link.is_symlink():
        os.replace(link, tempfile.mkdtemp(prefix=f"{link.name}-copy-", dir=link.parent))
    os.replace(other, link)
    sync(link.parent)


def try_disk(out: Path) -> None:
    """Does twice what a save does, in a trial folder; ends the script if the file system can't."""
    try:
        with tempfile.TemporaryDirectory(prefix=".", suffix=".tmp", dir=out) as trial:
            hidden, step = Path(trial, "hidden"), Path(trial, "step")
            for _ in range(2):
                hidden.mkdir()
                write_json(hidden / "run.json", {"free": shutil.disk_usage(out).free})
                sync(hidden / "run.json")
                sync(hidden)
                remove_folder(step, Path(trial, "old"))
                os.replace(hidden, step)
                point(Path(trial, "latest"), step.name)
    except OSError as error:
        fail(f"no checkpoint can be saved in {out}: files and folders can't be renamed and "
             f"replaced there ({error.strerror or error}); name another folder with --out")


def remove_folder(folder: Path, aside: Path) -> None:
    """Removes a folder. It is renamed first, so that no incomplete folder has its name."""
    shutil.rmtree(aside, ignore_errors=True)
    if folder.exists():
        os.replace(folder, aside)
        shutil.rmtree(aside, ignore_errors=True)


def save(
        out: Path, line: Mapping[str, Any], model: QwenVL, opt: torch.optim.Optimizer,
        processor: Processor, run: Mapping[str, Any], args: argparse.Namespace) -> bool:
    """Writes the checkpoint of the step that logged this line -> False if the disk is full.
    run: content of run.json, without the line's scores. All files are written to a hidden folder,
    which is renamed and linked when they are on the disk: a run killed at any moment keeps its last
    checkpoint. Then what --keep does not keep is removed."""
    step = line["step"]
    folder = out / f"step_{step:06d}"
    hidden = out / f".{folder.name}.tmp"
    written = [f"state/rank_{rank():05d}_of_{world():05d}.safetensors"]
    stored: dict[str, Tensor] = {}
    for content in model.stored_files().values():
        stored |= content
    tensors, rows = training_state(model, opt)
    try:
        with raise_on_all_processes():
            if rank() == 0:
                for unfinished in out.glob(".*.tmp"):
                    shutil.rmtree(unfinished, ignore_errors=True)
                (hidden / "state").mkdir(parents=True)
                # Weights as stored, float32 parameters, and two moments of each trained one.
                needed = SMALL_FILES
                needed += sum(x.numel() for x in stored.values()) * model.stored_dtype.itemsize
                for _, p in lora.saved_parameters(model):
                    needed += 4 * p.numel() * (3 if p.requires_grad else 1)
                free = shutil.disk_usage(out).free
                if free < needed:
                    need = f"{needed / 2 ** 30:.2f} GiB are needed and {free / 2 ** 30:.2f} free"
                    raise OSError(errno.ENOSPC, f"No space left on device, {need}")

        with raise_on_all_processes():
            # The device holds one whole tensor at a time.
            whole = (x.full_tensor() if isinstance(x, DTensor) else x for x in stored.values())
            try:
                if rank() == 0:
                    model.save_pretrained(hidden, whole)
                    processor.save_pretrained(hidden)
            finally:
                # full_tensor() needs all processes, even after an error in the first one.
                for _ in whole:
                    pass
            if rank() == 0:
                scores = {key: value for key, value in line.items() if key.startswith("val_")}
                pixels = [processor.min_pixels, processor.max_pixels]
                write_json(hidden / "run.json", {**run, **scores, "step": step, "pixels": pixels})
                written += [file.name for file in hidden.iterdir() if file.is_file()]
            # The optimizer does not count skipped steps. All parameters have the same count.
            count = int(next(iter(opt.state.values()), {"step": 0})["step"])
            metadata = {"rows": json.dumps(rows), "step": str(step), "optimizer_steps": str(count)}
            shapes = {name: x.shape for name, x in tensors.items()}
            in_order = (tensors[name] for name in sorted(tensors))
            write_tensors(hidden / written[0], shapes, torch.float32, in_order, metadata)
            for name in written:
                sync(hidden / name)
            entries = [(name, manifest_entry(hidden / name)) for name in written]

        manifest = dict(sorted(gather_lists(entries)))
        with raise_on_all_processes():
            if rank() == 0:
                write_json(hidden / MANIFEST, manifest)
                # All files and the log of these steps must be on the disk before the folder's name.
                for path in (hidden / MANIFEST, *out.glob("*.jsonl"), hidden / "state", hidden):
                    sync(path)
                remove_folder(folder, hidden.with_suffix(".old.tmp"))
                os.replace(hidden, folder)
                sync(out)
                point(out / "latest", folder.name)
    except OSError as error:
        if rank() == 0:
            shutil.rmtree(hidden, ignore_errors=True)
        if error.args:
            tqdm.write(f"step {step} is not saved: {error.strerror or error} ({out}); "
                       "earlier checkpoints are unchanged", file=sys.stderr)
        return False
    if rank() == 0:
        prune(out, args.keep, args.keep_weights)
    return True


def training_state(model: nn.Module, opt: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict]:
    """This process's part of what a resume needs.
    -> its rows of "master/<parameter>", "exp_avg/<parameter>", "exp_avg_sq/<parameter>", not
    copied; and for each parameter its whole "shape" and the number of this process's "first" row.
    FSDP2 cuts dimension 0 into equal parts: 10 rows over 4 processes begin at 0, 3, 6 and 9."""
    tensors, rows = {}, {}
    for name, p in lora.saved_parameters(model):
        sharded = isinstance(p, DTensor)
        first = min(rank() * math.ceil(len(p) / world()), len(p)) if sharded else 0
        rows[name] = {"shape": list(p.shape), "first": first}
        for kind, x in {"master": p.data, **opt.state.get(p, {})}.items():
            if kind != "step":
                tensors[f"{kind}/{name}"] = x.to_local() if sharded else x
    return tensors, rows


def prune(out: Path, keep: int, keep_weights: int | None) -> None:
    """Points `best` at the first step with the highest val_mIoU. Removes the training state of all
    but the `keep` newest steps, and whole steps except the `keep_weights` newest and the best."""
    steps = steps_so_far(out)
    best, highest = None, -math.inf
    for step in reversed(steps):
        run = {} if damage(step, "run.json") else read_json(step / "run.json")
        if run.get("val_mIoU", -math.inf) > highest:
            best, highest = step, run["val_mIoU"]
    if best:
        point(out / "best", best.name)
    for step in steps[keep:]:
        remove_folder(step / "state", out / f".{step.name}.state.tmp")
    for step in steps[max(keep, keep_weights or len(steps)):]:
        if step != best:
            remove_folder(step, out / f".{step.name}.tmp")


def manifest_entry(file: Path) -> dict[str, Any]:
    """A file's size, and its hash as sha256sum prints it."""
    with open(file, "rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"bytes": file.stat().st_size, "sha256": digest}


def content_hash(path: str | Path) -> str:
    """64 hex characters for the bytes of a file, or of a checkpoint's weights and its base's."""
    path = newest_step(path)
    files = [path] if path.is_file() else []
    for folder in dict.fromkeys((path, base_folder(path))):
        files += sorted(folder.glob("*.safetensors"))
    with ThreadPoolExecutor() as pool:
        digests = [entry["sha256"] for entry in pool.map(manifest_entry, files)]
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def damage(step: Path, only: str | None = None) -> str | None:
    """What is wrong with a checkpoint's files, in words; None if they are as written.
    only: a file that this process checks. Without it, the files are split over all processes."""
    if not only and not (step / "state").is_dir():
        return f"{step / 'state'} is missing"
    listed = {}
    try:
        # Checkpoints of earlier versions have no manifest; restore() looks at the headers.
        if (step / MANIFEST).exists():
            for name, entry in json.loads((step / MANIFEST).read_bytes()).items():
                listed[name] = {"bytes": int(entry["bytes"]), "sha256": entry["sha256"]}
    except (OSError, *MALFORMED) as error:
        return f"{step / MANIFEST} is unreadable ({error})"
    found = []
    for name in [only] if only else sorted(listed)[rank()::world()]:
        file = step / name
        if not file.is_file():
            found.append(f"{file} is missing")
        elif name == ADAPTER_CONFIG:
            continue      # if the base has moved, the user sets its folder in this file
        elif name in listed and file.stat().st_size != listed[name]["bytes"]:
            found.append(f"{file} has {file.stat().st_size:,} bytes, but had "
                         f"{listed[name]['bytes']:,} when it was written")
        elif name in listed and manifest_entry(file) != listed[name]:
            found.append(f"{file} is not as it was written")
    return min(found if only else gather_lists(found), default=None)


@torch.no_grad()
def restore(out: Path, model: nn.Module, opt: torch.optim.Optimizer) -> int:
    """Fills parameters and optimizer from the newest undamaged checkpoint -> its step.

    If `latest` names another one, prints why, and moves the link. Any number of processes may have
    written the checkpoint: each process reads the rows that it needs from each file. The second of
    two processes needs rows 5 to 9 of 10. If four processes wrote them, it reads

        file       0        1        2       3
        rows    0 1 2    3 4 5    6 7 8      9
        read               5      6 7 8      9"""
    damages = []
    for step in steps_so_far(out):
        if damages and not (step / "state").exists():
            continue
        problem = damage(step)
        if problem is None:
            break
        damages.append(problem)
    else:
        raise CheckpointError(f"{damages[0]}; no earlier step in {out} is whole and has its "
                              "training state; start a new run with --init")
    if rank() == 0:
        for problem in damages:
            tqdm.write(f"warning: {problem}; continuing from {step.name}", file=sys.stderr)
        if step.name != "latest":
            point(out / "latest", step.name)
    paths = sorted((step / "state").glob("rank_*.safetensors"))
    if not paths or len(paths) != int(paths[0].stem[-5:]):
        raise CheckpointError(f"{step / 'state'}: files of the training state are missing; "
                              f"start a new run with --init {step}")
    files = []
    for path in paths:
        try:
            file = safe_open(path, "pt")
            metadata = file.metadata()
            files.append((file, json.loads(metadata["rows"])))
            saved_step = int(metadata["step"])
            optimizer_steps = float(metadata["optimizer_steps"])
        except (SafetensorError, OSError, *MALFORMED) as error:
            raise CheckpointError(
                f"{path}: not a whole training state ({error}); point {out / 'latest'} at an "
                f"earlier step, or start a new run with --init {step}") from None
    for name, p in lora.saved_parameters(model):
        if files[0][1].get(name, {}).get("shape") != list(p.shape):
            raise CheckpointError(f"{step / 'state'}: {name} does not fit this model; "
                                  "resume with the --init of the run")
    opt.state.clear()
    fill_moments(model, opt, optimizer_steps, set(files[0][0].keys()))
    tensors, rows = training_state(model, opt)
    for key, target in tensors.items():
        name = key.partition("/")[2]
        begin = rows[name]["first"]
        for file, file_rows in files:
            stored = file.get_slice(key)
            file_begin = file_rows[name]["first"]
            first = max(begin, file_begin)
            end = min(begin + len(target), file_begin + stored.get_shape()[0])
            if first < end:
                target[first - begin:end - begin] = stored[first - file_begin:end - file_begin]
    return saved_step


def fill_moments(
        model: nn.Module, opt: torch.optim.Optimizer, steps: float = 0.0,
        stored: set[str] | None = None) -> None:
    """Gives AdamW the state that its first step would create, with this count of steps. stored:
    names of a training state; only parameters with moments in it get a state."""
    for name, p in model.named_parameters():
        wanted = stored is None or f"exp_avg/{name}" in stored
        if wanted and p.requires_grad and p not in opt.state:
            # The fused AdamW counts on the GPU.
            count = torch.tensor(steps, device=p.device if p.is_cuda else "cpu")
            opt.state[p] = {"step": count, "exp_avg": torch.zeros_like(p.data),
                            "exp_avg_sq": torch.zeros_like(p.data)}
