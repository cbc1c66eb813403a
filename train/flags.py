"""The flags of both stages, kinds of numbers, and what a resumed run takes from its run.json."""
import argparse
import json
import math
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from readers.base import COORDS, read_json
from train import dist
from train.checkpoints import read_run

# Flags that a resumed run may change. The root is safe, because load_records compares hashes.
FREE_ON_RESUME = (
    "out", "resume", "root", "steps", "epochs", "device", "micro_tokens", "every", "val",
    "gradient_checkpointing", "deterministic", "plan", "gpus", "memory", "image", "keep",
    "keep_weights", "track", "track_id", "config")
# Names in run.json with a value that another flag sets.
FLAG_OF = {"lora_alpha": "lora", "keep_weights": "keep", "lambdas": "weighting",
           "weight_of": "weighting", "warmup": "lr", "coords": "data-coords"}
# Values of flags that the run.json of earlier versions lacks.
NEW_FLAGS = {"warmup": None, "weight_of": "iou", "track": None, "track_id": None, "config": None}
# Flags of earlier versions, which run.json may still hold, and the only value that still works.
REMOVED_FLAGS = {"kl": "k3", "dual_clip": None, "importance_cap": None}
# Passes over 10,000 records or more, and steps between checkpoints, of runs that choose neither.
PASSES = {"sft": 1.0, "rft": 0.4}
EVERY = {"sft": 200, "rft": 50}
FEW_STEPS, MANY_PASSES = 20, 20   # fewer steps, or more passes, bring a warning
DEVICE_FLAG = {"choices": ("cuda", "cpu"),
               "help": "where to compute; default: cuda if torch can use it"}


class FlagParser(argparse.ArgumentParser):
    """Reports a wrong flag in one line, with exit status 2. Flags are not abbreviated, or a new one
    could change what a command means."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **settings)

    def format_help(self) -> str:
        """With defaults, except for flags that are off or describe their default."""
        for action in self._actions:
            off = any(action.default is value for value in (None, False, argparse.SUPPRESS))
            if action.help and not off and "default:" not in action.help:
                action.help += f" (default: {as_typed(action.default)})"
        return super().format_help()

    def error(self, message: str) -> NoReturn:
        dist.fail(f"{message}; {self.prog} --help explains every flag")


def number(kind: type, in_range: Callable[[Any], bool], words: str, text: str) -> Any:
    """A numeric flag's value; refuses others as "... is not `words`"."""
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    if not in_range(value):
        raise argparse.ArgumentTypeError(f"{text} is not {words}")
    return value


# Seeds are multiplied by a million, and the product must fit in 64 bits.
MOST = 2 ** 31
positive = partial(number, int, lambda v: 0 < v < MOST, f"a whole number from 1 to {MOST - 1}")
natural = partial(number, int, lambda v: 0 <= v < MOST, f"a whole number from 0 to {MOST - 1}")
above_zero = partial(
    number, float, lambda v: 1e-12 <= v <= 1e38, "a number from 1e-12 to 1e38")
not_negative = partial(number, float, lambda v: 0 <= v <= 1e6, "a number from 0 to 1e6")
moderate = partial(number, float, lambda v: abs(v) <= 1e6, "a number between -1e6 and 1e6")


class Values(argparse.Action):
    """A flag with several values, each stored under its own name; the last may be left out.
    const: for each name in order (name, function of its values or tuple of choices, number of
    values or None for all that are left)."""

    def __call__(self, parser: Any, namespace: Any, values: list[str], option: Any = None) -> None:
        setattr(namespace, self.dest, True)
        for name, kind, count in self.const:
            part = values[:count]
            values = values[len(part):]
            if not part:
                continue
            if count and len(part) < count:
                raise argparse.ArgumentError(self, f"{' '.join(part)}: {count} values belong here")
            try:
                if not isinstance(kind, tuple):
                    setattr(namespace, name, kind(*part))
                elif part[0] in kind:
                    setattr(namespace, name, part[0])
                else:
                    raise argparse.ArgumentTypeError(f"{part[0]} is not one of {', '.join(kind)}")
            except argparse.ArgumentTypeError as error:
                raise argparse.ArgumentError(self, str(error)) from None
        if values:
            raise argparse.ArgumentError(self, f"{' '.join(values)}: too many values")


def percentiles(low: float, high: float) -> list[float]:
    if not 0 <= low < high <= 100:
        raise argparse.ArgumentTypeError(
            f"{low:g} {high:g} are not two percentiles, the lower one first")
    return [low, high]


def add_reading_flags(add: Callable[..., argparse.Action], *other: str) -> None:
    """add: a parser's add_argument. other: --coords, in scripts where it means the same."""
    add("--data-coords", *other, dest="coords" if other else "data_coords", choices=list(COORDS),
        help="unit of the boxes, if the data set leaves it open: fractions, 100ths or 1000ths of "
        "the image's sides, or pixels (the default)")
    add("--stretch", type=float, nargs=2, action=Values, metavar=("LOW", "HIGH"),
        const=[("stretch", percentiles, 2)],
        help="percentiles of each band that become black and white in 16-bit or float images, as "
        "in 2 98; else these are refused")


def add_common_flags(parser: argparse.ArgumentParser, stage: str, init: str) -> None:
    """The flags of both stages. init: its default."""
    run = parser.add_argument_group("run")
    add = run.add_argument
    add("--data", default="synth", help="data set: a name that data.py knows")
    add("--root", help="its folder; default data/<name>")
    add_reading_flags(add, "--coords")
    add("--init", default=init, help="folder to start from: a checkpoint in hub layout, or a stage")
    add("--out", default=f"ckpt/{stage}", help="folder for checkpoints, log and pictures")
    either = run.add_mutually_exclusive_group()
    either.add_argument("--steps", type=positive, help="optimizer steps, instead of --epochs")
    either.add_argument("--epochs", type=above_zero,
                        help=f"passes over the records, may be a fraction; default: "
                        f"{PASSES[stage]:g} from 10,000 records on, more for fewer records")
    add("--seed", type=natural, default=0, help="seed of data order and sampling")
    add("--resume", action="store_true",
        help="continue from the newest checkpoint in --out, with the flags in its run.json")
    add("--config", metavar="RUN.JSON",
        help="repeat the run that wrote this file: its flags are the defaults of this run")
    add("--device", **DEVICE_FLAG)
    add("--deterministic", action="store_true",
        help="slower CUDA kernels: a resumed run equals an unbroken one to the bit, as on the CPU")
    add = parser.add_argument_group("watching").add_argument
    add("--every", type=positive,
        help="steps between checkpoints, validations, pictures and writings of report.html; "
        f"default: a fifth of the steps, {EVERY[stage]} at most")
    add("--track", choices=("wandb", "tensorboard", "trackio"),
        help="send the figures of metrics.jsonl there as well")
    add("--val", type=natural, default=64, help="records of the val split to validate on; 0: none")
    add = parser.add_argument_group("disk").add_argument
    add("--keep", nargs="+", action=Values, default=2, metavar=("STATES", "WEIGHTS"),
        const=(("keep", positive, 1), ("keep_weights", positive, 1)),
        help="how many of the newest checkpoints keep their training state (for --resume), and "
        "how many are kept at all, besides the best by validation; default: 2, and all")
    add = parser.add_argument_group("memory").add_argument
    add("--micro-tokens", type=positive, default=8192,
        help="packed tokens in one pass (a patch of a trained vision tower counts "
        f"{dist.PATCH_TOKENS}): more is faster and needs more memory")
    add("--gradient-checkpointing", action=argparse.BooleanOptionalAction,
        help="a third more compute, far less memory; default: on CUDA only")
    add("--freeze-vision", action="store_true", help="train the language model only")
    add("--max-pixels", type=positive,
        help="largest area of the resized image; default: the checkpoint's own")
    add = parser.add_argument_group("adapters").add_argument
    add("--lora", nargs="+", action=Values, metavar=("RANK", "ALPHA"),
        const=(("lora", positive, 1), ("lora_alpha", above_zero, 1)),
        help="instead of the weights, train adapters of this rank, scaled by ALPHA / RANK, in the "
        "language model's linear layers; use an --lr ten times as large; default ALPHA: 2 RANK, or "
        "that of the adapter in --init")
    add("--lora-vision", action="store_true", help="adapters in the vision tower too")
    add = parser.add_argument_group("plan").add_argument
    add("--plan", nargs="*", action=Values, default=False, metavar=("GPUS", "GIB"),
        const=(("gpus", positive, 1), ("memory", above_zero, 1),
               ("image", lambda width, height: [positive(width), positive(height)], 2)),
        help="only print the memory per GPU of a run on GPUS GPUs of GIB each; exit status 2 if it "
        "does not fit. Needs no GPU, and no data if the images' WIDTH HEIGHT follow; "
        "default: 1 80")
    parser.set_defaults(
        keep_weights=None, lora_alpha=None, warmup=None, gpus=1, memory=80.0, image=None,
        track_id=None)


def parse(parser: argparse.ArgumentParser, stage: str) -> argparse.Namespace:
    """The command line. With --resume, defaults are run.json's, and few of them may change. With
    --config, the flags of a run.json come first, as words of a command line."""
    args = parser.parse_args()
    if args.config and args.resume:
        dist.fail("--config starts another run, and --resume continues one; leave one of them out")
    if args.config:
        run = read_json(Path(args.config))
        recorded = run.get("flags") if isinstance(run, dict) else None
        if not isinstance(recorded, dict) or run.get("stage") != stage:
            dist.fail(f"--config {args.config}, but that is no run.json of a run of {stage}.py")
        # Some belong to that run alone, and --epochs replaces --steps.
        own = ["config", "track_id", "plan", "gpus", "memory", "image", "workers"]
        own += ["steps"] if args.epochs else []
        flags = {k: v for k, v in recorded.items()
                 if k not in own and (k, v) not in REMOVED_FLAGS.items()}
        words: list[str] = []
        for action in parser._actions:
            several = isinstance(action, Values)
            names = [part[0] for part in action.const] if several else [action.dest]
            value, *others = [flags.pop(name, None) for name in names]
            if isinstance(value, bool):
                # The second spelling of --gradient-checkpointing is --no-gradient-checkpointing.
                words += action.option_strings[:1] if value else action.option_strings[1:]
            elif value is not None:
                words.append(action.option_strings[0])
                for part in (value, *(other for other in others if other is not None)):
                    typed = as_typed(part)
                    words += typed.split() if isinstance(part, (dict, list)) else [typed]
        if flags:
            dist.fail(f"--config {args.config}: this version has no flag {min(flags)}")
        args = parser.parse_args([*words, *sys.argv[1:]])
    # run.json has it, and eval.py may run in another folder.
    args.root = args.root and os.path.abspath(args.root)
    if args.resume:
        known = vars(args).keys()
        run = read_run(Path(args.out))
        if run["stage"] != stage:
            dist.fail(f"--resume, but {args.out} holds a run of {run['stage']}.py; "
                      f"name the --out of a run of {stage}.py")
        dropped = ("out", "resume", "workers")
        old_flags = {k: v for k, v in NEW_FLAGS.items() if k in known}
        old_flags |= {k: v for k, v in run["flags"].items() if k not in dropped}
        parser.set_defaults(**{k: v for k, v in old_flags.items() if k in known})
        args = parser.parse_args()
        # What has moved can be named anew: Run compares the content with the run's, if it has it.
        moved = {name for name in ("init", "cot") if run.get("hashes", {}).get(name)
                 or not os.path.exists(old_flags.get(name) or ".")}
        for name in {*known, *old_flags} - {*FREE_ON_RESUME} - moved:
            flag = f"--{FLAG_OF.get(name, name).replace('_', '-')}"
            if name not in old_flags or name not in known and (
                    old_flags[name] != REMOVED_FLAGS.get(name)):
                dist.fail(f"--resume, but the run in {args.out} was started by another version of "
                          f"{stage}.py: {flag} is only known to one of them; start another run "
                          f"with --init {args.out} and another --out")
            new, old = getattr(args, name, None), old_flags[name]
            same_path = isinstance(new, str) and isinstance(old, str) and (
                os.path.realpath(new) == os.path.realpath(old))
            # run.json has lists where the command line has tuples.
            if name in known and json.dumps(new) != json.dumps(old) and not same_path:
                dist.fail(f"--resume with {flag} {as_typed(new)}, but the run in {args.out} has "
                          f"{as_typed(old)}; leave the flag out, or name another --out")
        if not os.path.exists(args.init):
            dist.fail(f"--resume, but the run's --init {args.init} is not there; if it has moved, "
                      "name its new place with --init")
    if args.lora_vision and not args.lora:
        dist.fail("--lora-vision without --lora; give the adapters' rank too")
    if args.lora_vision and args.freeze_vision:
        dist.fail("--lora-vision trains what --freeze-vision freezes; leave one of them out")
    # A plan is for GPUs, whatever machine prints it.
    args.device = "cuda" if args.plan else dist.choose_device(args.device)
    if args.gradient_checkpointing is None:
        args.gradient_checkpointing = args.device == "cuda"
    return args


def as_typed(value: Any) -> str:
    """A flag's value as a user types it."""
    if isinstance(value, dict):
        return " ".join(f"{name}={as_typed(weight)}" for name, weight in value.items())
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value))
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


def default_epochs(stage: str, records: int) -> float:
    """Passes over the records, to one digit: 10, 3, 1 over 100, 1,000, 10,000 for CoT-SFT."""
    return float(f"{PASSES[stage] * min(10.0, max(1.0, (10_000 / records) ** 0.5)):.1g}")


def set_steps(args: argparse.Namespace, stage: str, records: int, per_step: int) -> None:
    """Sets args.steps and args.every, and prints what was chosen by the number of records."""
    chosen = []
    if args.steps is None and args.epochs is None:
        args.epochs = default_epochs(stage, records)
        chosen.append(f"--epochs {args.epochs:g}")
    if args.epochs is not None:
        args.steps = max(1, round(args.epochs * records / per_step))
        args.epochs = None
    if args.every is None:
        args.every = min(EVERY[stage], -(-args.steps // 5))
        chosen.append(f"--every {args.every}")
    if chosen and dist.rank() == 0:
        print(f"chosen for {records:,} records: {' '.join(chosen)}")


def too_long_or_short(args: argparse.Namespace, stage: str, records: int,
                      per_step: int) -> list[str]:
    """Warnings about the length of a run, each with a length that would suit."""
    passes, batch = args.steps * per_step / records, per_step
    epochs = default_epochs(stage, records)
    if epochs * records / batch < FEW_STEPS:
        batch = max(1, int(epochs * records / FEW_STEPS / dist.world())) * dist.world()
    flag = "--batch" if stage == "sft" else "--prompts"
    suits = (f"{flag} {batch} " * (batch != per_step)
             + f"--epochs {epochs:g} would be {epochs * records / batch:,.0f} steps")
    found = []
    if passes > MANY_PASSES:
        found.append(f"{passes:.3g} passes over the same records teach them by heart; {suits}")
    if args.steps < FEW_STEPS:
        found.append(f"{args.steps} steps are too few to learn much; {suits}")
    return found
