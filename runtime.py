"""What both training stages call: processes, sharding, optimizer, checkpoints and resume, the log. The loops stand in the stages.

Precision: trained parameters, their moments and gradient sums are float32; CUDA computes in bfloat16, the CPU in float32. Gradients are
summed over processes, not averaged: a loss is divided by the token count of the whole step, so the number of processes changes rounding
only.
"""
import argparse
import faulthandler
import functools
import importlib.metadata
import json
import math
import os
import pickle
import resource
import shutil
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from data import DataError, load, read_json, told_refused
from model import CheckpointError, QwenVL
from processor import Processor, prompt_hash

STUCK_AFTER = 1800                # seconds without a step: every process prints where it is
STOP_AFTER_SKIPPED = 5            # non-finite steps in a row: something is broken
FREE = ("root", "steps", "epochs", "device", "workers", "micro_tokens", "every", "val", "gradient_checkpointing")
                                  # what a resume may change; whatever its root, the data must have the run's hash


# ------------------------------------------------------------------------------------------------------------------ flags and mistakes

class Defaults(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):                                  # no "(default: None)" behind a text that says what happens then
        said = action.default in (None, False) or isinstance(action.default, dict)
        return action.help if said else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """A wrong flag is one line, exit status 2."""

    def __init__(self, description):
        super().__init__(description=description, formatter_class=Defaults)

    def error(self, message):
        fail(f"{message}; {self.prog} --help explains every flag")


def number(kind, fits, words):
    """-> the type of a flag: text -> a number of this kind, refused in these words where it does not fit."""
    def read(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not fits(value):
            raise argparse.ArgumentTypeError(f"{text} is not {words}")
        return value
    return read


positive = number(int, lambda v: v > 0, "a whole number above 0")
natural = number(int, lambda v: v >= 0, "a whole number from 0 up")
seed = number(int, lambda v: 0 <= v < 2 ** 31, f"a whole number from 0 to {2 ** 31 - 1}")    # a million times it fits in 64 bits
finite = number(float, math.isfinite, "a finite number")
above_zero = number(float, lambda v: 0 < v < math.inf, "a finite number above 0")
not_negative = number(float, lambda v: 0 <= v < math.inf, "a finite number from 0 up")


def add_common_flags(parser, stage, init, length):
    """The flags that mean the same in every stage. length: how long it trains without --steps and --epochs, in words."""
    run = parser.add_argument_group("run")
    add = run.add_argument
    add("--data", default="synth", help="data set: a name that data.py knows")
    add("--root", help="its folder; default data/<name>")
    add("--init", default=init, help="checkpoint to start from: a folder in hub layout, or a stage's")
    add("--out", default=f"ckpt/{stage}", help="folder for checkpoints, log and pictures")
    either = run.add_mutually_exclusive_group()
    either.add_argument("--steps", type=positive, help=f"optimizer steps; default {length}")
    either.add_argument("--epochs", type=above_zero, help="passes over the records, in place of --steps; parts of one are fine")
    add("--seed", type=seed, default=0, help="of data order and sampling")
    add("--resume", action="store_true", help="go on from the newest checkpoint in --out; flags not given are as in its run.json")
    add("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu", help="where to compute")
    add("--workers", type=natural, default=2 if torch.cuda.is_available() else 0, help="processes that prepare images ahead; 0: none")
    add = parser.add_argument_group("memory").add_argument
    add("--micro-tokens", type=positive, default=8192, help="packed tokens in one forward and backward pass: memory against speed")
    add("--gradient-checkpointing", action="store_true", help="keep no activations within a layer: a third more compute, far less memory")
    add("--freeze-vision", action="store_true", help="train the language model alone")
    add("--max-pixels", type=positive, help="area of the resized image at most; default: the checkpoint's own")


def parse(parser, stage):
    """The command line's flags. With --resume those not given are as the run in --out had them; one that changes its course is refused."""
    args = parser.parse_args()
    if not args.resume:
        return args
    run = recorded(Path(args.out))
    if run["stage"] != stage:
        fail(f"--resume, but {args.out} holds a run of {run['stage']}.py; name the --out of a run of {stage}.py")
    before = {name: value for name, value in run["flags"].items() if name not in ("out", "resume")}
    parser.set_defaults(**before)
    args = parser.parse_args()
    unknown = [name for name in vars(args) if name not in (*before, *FREE, "out", "resume")]
    if unknown:
        fail(f"--resume, but the run in {args.out} was begun by another version of {stage}.py, which knew no --"
             f"{unknown[0].replace('_', '-')}; start another run with --init {args.out} and another --out")

    def same(a, b):                                                      # however a path is written
        return a == b or isinstance(a, str) and isinstance(b, str) and os.path.realpath(a) == os.path.realpath(b)
    for name, value in before.items():
        if name not in FREE and not same(getattr(args, name), value):
            fail(f"--resume with --{name.replace('_', '-')} {as_typed(getattr(args, name))}, but the run in {args.out} has "
                 f"{as_typed(value)}; leave the flag out, or start another run with another --out")
    return args


def as_typed(value) -> str:
    """A flag's value as one types it."""
    if isinstance(value, dict):
        return " ".join(f"{name}={weight:g}" for name, weight in value.items())
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value))
    return str(value)


def set_steps(args, records: int, per_step: int, **default) -> None:
    """Turns --epochs, or where neither flag is given the default (steps=..., or epochs=...), into args.steps. args.epochs is None from
    then on: what run.json records, and a resume reads, are the steps."""
    if args.steps is None and args.epochs is None:
        vars(args).update(default)
    if args.epochs is not None:
        args.steps = max(1, round(args.epochs * records / per_step))
        args.epochs = None


def fail(message):
    """A user's mistake: one line, exit status 2. What every process meets before they join is said by the first alone; later a mistake
    may be one process's own (an image that only it opens), so it speaks itself."""
    if rank() == 0 or dist.is_initialized():
        print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    sys.exit(2)


def main(stage):
    """Runs a script's main function; the exit status is 2 after a user's mistake."""
    status = 0
    try:
        try:
            stage()
        except (DataError, CheckpointError) as error:
            fail(error)
    except SystemExit as leaving:
        status = leaving.code
    if dist.is_initialized():
        dist.destroy_process_group()
    if world() > 1:                                                      # all is written: leave without taking the interpreter down,
        sys.stdout.flush()                                               # where torch's threads crash now and then (torch 2.13, gloo)
        sys.stderr.flush()
        os._exit(status or 0)
    sys.exit(status)


# ------------------------------------------------------------------------------------------------------------------ processes

def rank():
    return int(os.environ.get("RANK", 0))


def world():
    return int(os.environ.get("WORLD_SIZE", 1))


def start(device):
    """Joins the other processes that torchrun started (NCCL or gloo) -> this process's device. CUDA is sharded even alone: that is where
    bfloat16 compute copies of float32 parameters come from."""
    faulthandler.enable()
    if device == "cuda":
        if not torch.cuda.is_available():
            fail("--device cuda, but torch sees no CUDA device; use --device cpu")
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        device = f"cuda:{torch.cuda.current_device()}"
        torch.backends.cuda.matmul.allow_tf32 = True
    if world() > 1 or device != "cpu":
        backend = "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"    # sums to log lie on the CPU
        alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        dist.init_process_group(backend, timeout=timedelta(seconds=2 * STUCK_AFTER), **alone)
    return torch.device(device)


def all_sum(x):
    """Sum of a tensor over all processes."""
    if dist.is_initialized():
        x = x.clone()
        dist.all_reduce(x)
    return x


def all_max(x):
    """Maximum of a tensor over all processes."""
    if dist.is_initialized():
        x = x.clone()
        dist.all_reduce(x, dist.ReduceOp.MAX)
    return x


def all_gather(x):
    """The processes' (n, ...) tensors of one shape, one behind the other: (world * n, ...)."""
    if not dist.is_initialized():
        return x
    parts = [torch.empty_like(x) for _ in range(world())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def barrier():
    if dist.is_initialized():
        dist.barrier()


# ------------------------------------------------------------------------------------------------------------------ model and optimizer

def prepare(model, device, freeze_vision=False, gradient_checkpointing=False):
    """A loaded model -> the same, float32, on the device, sharded layer by layer (FSDP2) unless this is one process on a CPU."""
    model.visual.requires_grad_(not freeze_vision)
    model.visual.checkpointing = model.model.checkpointing = gradient_checkpointing
    if not dist.is_initialized():
        return model.float().to(device)
    compute = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32} if device.type == "cuda" else {}
    policy = MixedPrecisionPolicy(**compute, cast_forward_inputs=False)
    mesh = init_device_mesh(device.type, (world(),))
    for module in (*model.visual.blocks, *model.model.layers, model.visual, model):
        fully_shard(module.float(), mesh=mesh, mp_policy=policy)         # one float32 layer at a time exists unsharded
    for module in sharded_modules(model):
        module.set_gradient_divide_factor(1.0)                           # a sum, not a mean ...
        module.set_force_sum_reduction_for_comms(True)                   # ... which gloo and NCCL know alike
    for name in ("score", "prefill", "decode"):
        register_fsdp_forward_method(model, name)
    return model


def sharded_modules(model):
    return [m for m in model.modules() if isinstance(m, FSDPModule)]


@contextmanager
def gathered(model):
    """Inside, every process holds all parameters: forward passes communicate nothing, so processes may make different numbers of them."""
    modules = sharded_modules(model)
    for m in modules:
        m.set_reshard_after_forward(False, recurse=False)
        m.unshard()
    try:
        yield
    finally:
        for m in modules:
            m.reshard()
            m.set_reshard_after_forward(m is not model, recurse=False)


def sync_gradients(model, now):
    """Reduce gradients over processes in the coming backward pass, or keep adding them up locally (all but a step's last micro-batch)."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(now)


def print_parameters(model):
    """Table of what is trained, once, on the first process."""
    if rank():
        return
    parts = {"vision tower": "visual.", "embeddings": "model.embed_tokens", "language layers": "model.layers", "head and norm": ""}
    counts = {name: [0, 0] for name in parts}
    for name, p in model.named_parameters():
        part = next(k for k, prefix in parts.items() if name.startswith(prefix))
        counts[part][0] += p.numel()
        counts[part][1] += p.numel() * p.requires_grad
    for part, (n, trained) in counts.items():
        print(f"  {part:16} {n:14,} parameters, {'trained' if trained else 'frozen'}")


def optimizer(model, lr):
    """AdamW on float32 parameters, without weight decay: fine-tuning runs are short."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=trained[0].is_cuda or None)


def lr_at(step, steps, peak, warmup=0.03):
    """Learning rate of step 0, 1, ..., steps - 1: linear warm-up over a share of the steps, then a cosine to a tenth of the peak."""
    rise = max(1, round(warmup * steps))
    if step < rise:
        return peak * (step + 1) / rise
    return peak * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise))))


def update(model, opt, lr, max_norm=1.0):
    """Clips the gradient's norm over all parameters and processes, steps, clears -> the norm before clipping. A gradient that is not finite
    changes nothing; the caller sees it in the norm."""
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(grads)
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    if norm.isfinite():
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for g in grads:
            (g.to_local() if isinstance(g, DTensor) else g).mul_(scale)
        for group in opt.param_groups:
            group["lr"] = lr
        opt.step()
    opt.zero_grad(set_to_none=True)
    return norm.item()


# ------------------------------------------------------------------------------------------------------------------ data and log

def load_records(args, split):
    """The records to train on, one at least and with --resume those of the run, and --val of the val split; prints what was refused."""
    loaded = {name: load(args.data, args.root, name) for name in ((split, "val") if args.val else (split,))}
    refused = {name: told_refused(some, args.data, args.root, name) for name, some in loaded.items()}
    records = loaded[split]
    if not records:
        raise DataError(f"no record of {args.data} {split} to train on; {refused[split] or 'none was refused; is its share too small?'}")
    if args.resume and (before := recorded(Path(args.out))["data_hash"]) != records.hash:
        fail(f"--resume, but the records of {args.data} {split} are not those of the run in {args.out} ({records.hash}, not {before}); "
             "name their --root, or start another run with another --out")
    if rank() == 0:
        for name, some in loaded.items():
            print(f"{len(some):,} records of {name}" + (f"; {refused[name]}" if refused[name] else ""))
    return records, loaded.get("val", [])[:args.val]


def batch(records, step, size, seed):
    """The `size` records of a step: epochs one behind the other, each in an order of its own. A pure function: a resume needs no state."""
    places = range(step * size, (step + 1) * size)
    return [records[order(len(records), seed, i // len(records))[i % len(records)]] for i in places]


@functools.lru_cache(maxsize=2)
def order(n, seed, epoch):
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)).tolist()


class Inputs(torch.utils.data.Dataset):
    """make(step) for a run of steps; what a worker returns are plain bytes through a pipe (tensors would go through /dev/shm, of which a
    container has 64 MB)."""

    def __init__(self, make, steps):
        self.make, self.steps = make, steps

    def __len__(self):
        return len(self.steps)

    def __getitem__(self, i):
        try:
            return pickle.dumps(self.make(self.steps[i]))
        except DataError as error:                                       # raised where it can be said in one line
            return pickle.dumps(error)


def ahead(make, steps, workers):
    """Yields make(step) for each step, prepared ahead in this many processes; make is a pure function of the step."""
    if not workers:
        yield from map(make, steps)
        return
    loader = torch.utils.data.DataLoader(Inputs(make, steps), batch_size=None, num_workers=workers, prefetch_factor=1,
                                         multiprocessing_context="fork")
    for made in map(pickle.loads, loader):
        if isinstance(made, DataError):
            raise made
        yield made


def micro_batches(tokens, budget):
    """Packed tokens of each item -> slices of neighbouring items, as few as keep each within the budget (an item alone may exceed it), and
    equally many on every process, which must take part in each other's passes."""
    def cut(n):
        edges = [len(tokens) * i // n for i in range(n + 1)]
        return [slice(a, b) for a, b in zip(edges, edges[1:])]
    enough = next(n for n in range(1, len(tokens) + 1) if n == len(tokens) or all(sum(tokens[s]) <= budget for s in cut(n)))
    return cut(int(all_max(torch.tensor(enough))))


def peak_memory(model):
    """GiB that this process held at most, on its GPU or, on a CPU, altogether."""
    if model.device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2 ** 30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** (20 if sys.platform == "linux" else 30)


def log(path, line):
    """Appends a line to a JSONL file, on the first process; also feeds the watchdog that prints all stacks when steps stop coming."""
    faulthandler.dump_traceback_later(STUCK_AFTER, repeat=True)
    if rank() == 0:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def cut_log(path, step):
    """Removes from a JSONL what a run that went on past its last checkpoint has logged of later steps, and a last line that broke off."""
    if not path.exists():
        return
    lines, kept = path.read_text(encoding="utf-8", errors="replace").splitlines(), []
    for n, line in enumerate(lines, 1):
        try:
            kept += [line] if json.loads(line)["step"] <= step else []
        except (ValueError, KeyError, TypeError):
            if n < len(lines):
                raise DataError(f"{path}, line {n}: not a step's line; remove it to go on") from None
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    os.replace(temporary, path)


# ------------------------------------------------------------------------------------------------------------------ checkpoints

def writable(folder):
    """Makes a folder, with those above it, and tries that a file can be written there -> its path."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        fail(f"nothing can be written to {folder} ({error.strerror}); name another folder with --out")
    return Path(folder)


def check_output(out, resume):
    """The output folder must be writable, and new or to be resumed. The first process looks, for all: none sees another's trial file."""
    if rank():
        return
    writable(out)
    if not resume and (out / "latest").exists():
        fail(f"{out} already holds a run, up to {(out / 'latest').resolve().name}; go on with --resume, or name another --out")
    if not resume and any(out.iterdir()):
        fail(f"{out} is not empty, but holds no checkpoint; remove it, or name another --out")


def open_checkpoint(folder, device=None, max_pixels=None):
    """-> QwenVL and Processor of a checkpoint, which fit each other, or a CheckpointError: to answer on a device, in what it computes in
    (bfloat16 on CUDA, float32 on CPU), or without one as stored, to be prepared for training."""
    dtype = None if device is None else torch.bfloat16 if device.type == "cuda" else torch.float32
    model = QwenVL.from_pretrained(folder, dtype, device or "cpu")
    processor = Processor.from_pretrained(folder, max_pixels=max_pixels)
    model.check_processor(processor)
    return model, processor


def recorded(out):
    """run.json of the newest checkpoint of a run that is to be resumed."""
    latest = out / "latest"
    if not os.path.exists(latest):
        fail(f"--resume, but there is no checkpoint in {out}; leave --resume out, or name the --out of the run")
    if not latest.is_symlink():
        newest = max((p.name for p in out.glob("step_*")), default="copy")
        fail(f"{latest} is a folder, but must be a link to a step's (cp -rL follows links); mv {latest} {out / 'copy'} && "
             f"ln -s {newest} {latest}")
    run = read_json(latest / "run.json")
    if not isinstance(run, dict) or not isinstance(run.get("flags"), dict) or not {"stage", "data_hash"} <= run.keys():
        fail(f"{latest / 'run.json'} does not say how the run began; copy it there from another step, or start anew with --init {latest}")
    return run


def begin(out, step, model, logs=("metrics.jsonl",)):
    """Says what is trained by a run that starts behind `step`, and cuts off what was logged of later steps."""
    print_parameters(model)
    if rank() == 0:
        for name in logs:
            cut_log(out / name, step)
    barrier()


def commit():
    """Hash of the commit that this code stands at, or None outside of a repository."""
    here = {"capture_output": True, "text": True, "cwd": Path(__file__).parent, "check": False}
    return subprocess.run(["git", "rev-parse", "HEAD"], **here).stdout.strip() or None


def describe(args, stage, records):
    """What run.json says of a run: all that is needed to do it again, and to evaluate it."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "numpy", "pillow", "safetensors", "tokenizers")}
    return {"stage": stage, "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]), "commit": commit(), "data": args.data,
            "root": args.root, "records": len(records), "data_hash": records.hash, "prompt_hash": prompt_hash(), "versions": versions,
            "processes": world(), "device": args.device, "flags": {k: v for k, v in vars(args).items() if k != "resume"}}


def local(x):
    return x.to_local() if isinstance(x, DTensor) else x


def first_row(p):
    """Where this process's rows of a parameter begin (FSDP2 splits dimension 0 into equal parts, the last ones shorter or empty)."""
    return min(rank() * -(-p.shape[0] // world()), p.shape[0]) if isinstance(p, DTensor) else 0


def save(out, step, model, opt, processor, run):
    """Writes out/step_000200: weights and tokenizer in hub layout, run.json, and state/, where each process puts its own rows of parameters
    and moments. The folder appears whole or not at all, and `latest` moves to it at once."""
    name, temporary = f"step_{step:06d}", out / f".step_{step:06d}.tmp"
    if rank() == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        (temporary / "state").mkdir(parents=True)
    barrier()
    tensors, rows = {}, {}
    for key, p in model.named_parameters():
        rows[key] = {"shape": list(p.shape), "first": first_row(p)}
        for kind, x in (("master", p), *((k, v) for k, v in opt.state.get(p, {}).items() if k != "step")):
            tensors[f"{kind}/{key}"] = local(x.detach()).contiguous()
    steps = next((int(s["step"]) for s in opt.state.values()), 0)
    save_file(tensors, temporary / "state" / f"rank_{rank():05d}_of_{world():05d}.safetensors",
              metadata={"rows": json.dumps(rows), "step": str(step), "optimizer_steps": str(steps)})
    full = ((key, p.full_tensor() if isinstance(p, DTensor) else p) for key, p in model.state_dict().items())
    if rank() == 0:
        model.save_pretrained(temporary, full)
        processor.save_pretrained(temporary)
        (temporary / "run.json").write_text(json.dumps({**run, "step": step}, indent=2) + "\n", encoding="utf-8")
    else:
        for _ in full:                                                   # gathering takes every process
            pass
    barrier()
    if rank() == 0:
        shutil.rmtree(out / name, ignore_errors=True)
        os.replace(temporary, out / name)
        link = out / ".latest.tmp"
        link.unlink(missing_ok=True)
        link.symlink_to(name)
        os.replace(link, out / "latest")
    barrier()


def restore(out, model, opt):
    """Fills parameters and optimizer from the newest checkpoint of out, written by any number of processes -> its step."""
    files = sorted((out / "latest" / "state").glob("rank_*.safetensors"))
    if not files or len(files) != int(files[0].stem.rsplit("_", 1)[1]):
        raise CheckpointError(f"{out / 'latest' / 'state'}: the training state is not whole; start anew with --init {out / 'latest'}")
    opened, rows = [], []
    for file in files:
        try:
            opened.append(safe_open(file, "pt"))
            rows.append(json.loads(opened[-1].metadata()["rows"]))
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{file}: not a whole training state ({error}); point {out / 'latest'} at an earlier step, or start anew "
                                  f"with --init {out / 'latest'}") from None
    meta = opened[0].metadata()
    names = [set(f.keys()) for f in opened]
    with torch.no_grad():
        for key, p in model.named_parameters():
            if key not in rows[0] or rows[0][key]["shape"] != list(p.shape):
                raise CheckpointError(f"{out / 'latest' / 'state'}: {key} does not fit this model; resume with the --init of the run")
            targets = {"master": p.data}
            if f"exp_avg/{key}" in names[0]:
                opt.state[p] = {"step": torch.tensor(float(meta["optimizer_steps"])), "exp_avg": torch.zeros_like(p.data),
                                "exp_avg_sq": torch.zeros_like(p.data)}
                if p.is_cuda:
                    opt.state[p]["step"] = opt.state[p]["step"].to(p.device)
                targets |= {k: opt.state[p][k] for k in ("exp_avg", "exp_avg_sq")}
            for kind, target in targets.items():
                mine, begin = local(target), first_row(p)
                for f, layout in zip(opened, rows):
                    part, first = f.get_slice(f"{kind}/{key}"), layout[key]["first"]
                    if mine.ndim == 0:
                        mine.copy_(f.get_tensor(f"{kind}/{key}"))
                        continue
                    low, high = max(begin, first), min(begin + len(mine), first + part.get_shape()[0])
                    if low < high:
                        mine[low - begin:high - begin] = part[low - first:high - first].to(mine.device)
    return int(meta["step"])
