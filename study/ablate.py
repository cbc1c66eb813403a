"""Runs the study on drawn scenes: four tables, each with its question.

    bash study/ablate.sh settings    how should RFT run after a good SFT?
    bash study/ablate.sh ladder      does each stage of the paper help?
    bash study/ablate.sh curve       does the positional term help where all answers miss?
    bash study/ablate.sh weights     do weights of groups help, with the term and without?

The primary figure of ladder, settings and weights is Pr@0.5 on places: expressions that say where
the object is (extreme, position, relation, two-step), not what it is. In ladder and weights it is
taken on the split `final`. This was written before any run.

A seed has SFT records of its own (`sft`, `sft-1` ... `sft-9`), order of data and samples, and may
have a base of its own. An arm's name means one setting in all tables, so arms that tables share,
or that others start from, are trained once a seed: STUDY/SEED/ARM.

Each table takes many hours on two cores. Stop it at any time: the same command resumes, and does
not repeat what is finished. It works seed by seed. At the end study.py writes tables and figure.
Settings are environment variables. A quick look, a variant of your own, and one core for a seed:

    STUDY=ckpt/look SEEDS=0 SFT=50 RFT=5 TEST=40 bash study/ablate.sh ladder
    ARMS="cot-rft own" OWN="--alpha 10" bash study/ablate.sh ladder
    OMP_NUM_THREADS=1 SEEDS=3 taskset -c 0 bash study/ablate.sh ladder

STUDY: output folder (ckpt/study). SEEDS: some of the table's. BASES: bases of seeds that have
their own, as in "3=ckpt/base3 4=ckpt/base4" (toy/base). ARMS: other arms than the table's. OWN:
flags of rft.py for the arm `own`; a study has one such arm. SFT, RFT: steps of the arms cot and
cot-rft (1000, 40); the steps of all other arms follow in proportion. TEST: scenes to score at
most (2000).
"""
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from data import load, open_image  # noqa: E402
from qwen.answer import Box  # noqa: E402
from qwen.hub import is_checkpoint, newest_step  # noqa: E402
from train.checkpoints import steps_so_far  # noqa: E402
from train.dist import fail  # noqa: E402

STEPS = {"sft.py": 1000, "rft.py": 40}
TOKENS = "--max-new-tokens 192"
SFT = f"sft.py --batch 16 --lr 1.5e-3 --freeze-vision --keep 1 1 {TOKENS}"
GRPO = ("rft.py --prompts 32 --temperature 0.8 --beta 0 --micro-tokens 16384 --freeze-vision "
        f"--keep 1 1 {TOKENS}")
# Where the table `settings` starts, and what it chose for all other tables.
LR = 2e-4
WARMUP = 3                     # steps
FIRST = f"{GRPO} --data synth --lr {LR} {WARMUP} --no-std"
RFT = FIRST
# Of the curve. Undivided, a group in which all answers miss has hardly any weight, because only
# the positional term differs there; so advantages are divided by their deviation.
MISSING = f"{GRPO} --data synth-tiny --lr 3e-4"
SPREADS = {0.5: 3, 1: 3, 1.5: 10, 2: 10, 3: 3}      # of the curve's boxes -> seeds

# Without --reward and --weighting: the paper's, IoU + 0.1 positional + format, both weights.
IOU = "--reward iou=1 format=1"
HARD = "--reward iou_hard=1 format=1"
HARD_WEIGHT = "--weighting consistency 1.2 1 iou_hard"
TERM = "positional=0.1"
OFF = "--weighting off"


class Arm(NamedTuple):
    title: str                 # in the tables
    start: str = ""            # arm that it starts from
    command: str = ""          # script and flags; "": the base of its seed, not trained
    times: float = 1           # times the script's STEPS
    seeds: int = 10            # of its tables, at most
    spread: float = 0          # SFT on boxes moved by a normal deviate of so many of their sides


# In the order of the tables.
ARMS = {
    "base": Arm("base"),
    "direct": Arm("GRPO from the base", "base", f"{RFT} {IOU} {OFF}"),
    "boxes": Arm("SFT on boxes", "base", f"{SFT} --data synth --answer-only"),
    "boxes-rft": Arm("SFT on boxes, GRPO", "boxes", f"{RFT} {IOU} {OFF}"),
    "cot": Arm("CoT-SFT", "base", f"{SFT} --data synth"),
    "cot-rft": Arm("CoT-SFT, GRPO", "cot", f"{RFT} {IOU} {OFF}"),
    "paper": Arm("RSGround-R1", "cot", RFT),
    "own": Arm("own variant", "cot", f"{RFT} {IOU} {OFF}"),
}
# One change each, with IoU + format alone.
for name, title, flags in (
        ("first", "first settings", FIRST),
        ("first-std", "divided by the deviation", FIRST.replace(" --no-std", "")),
        ("first-lr-half", "lr / 2", f"{FIRST} --lr {LR / 2:g} {WARMUP}"),
        ("first-lr-2", "lr x 2", f"{FIRST} --lr {2 * LR:g} {WARMUP}"),
        ("first-lr-4", "lr x 4", f"{FIRST} --lr {4 * LR:g} {WARMUP}"),
        ("first-g16", "G 16, Q 16", f"{FIRST} --group 16 --prompts 16"),
        ("first-g4", "G 4, Q 64", f"{FIRST} --group 4 --prompts 64"),
        ("first-kl", "KL 0.04", f"{FIRST} --beta 0.04"),
        ("first-longer", "twice the steps", FIRST),
        ("first-warmup", "warm-up of 10 steps", f"{FIRST} --lr {LR} 10")):
    ARMS[name] = Arm(title, "cot", f"{flags} {IOU} {OFF}", 2 if name == "first-longer" else 1)
SETTINGS = tuple(name for name in ARMS if name.startswith("first"))
# All after CoT-SFT; `cot-rft` has no weights and no term, `paper` has both of both.
WEIGHTS = ("mean", "variance", "consistency", "shuffled")
ARMS |= {name: Arm(f"{name} weight", "cot", f"{RFT} {IOU} --weighting {name}") for name in WEIGHTS}
ARMS["positional"] = Arm("positional", "cot", f"{RFT} {IOU} {TERM} {OFF}")
ARMS |= {f"positional-{name}": Arm(f"positional, {name} weight", "cot", f"{RFT} --weighting {name}")
         for name in WEIGHTS if name != "consistency"}
ARMS |= {
    "weight-hard": Arm("RSGround-R1, weight of hard IoU", "cot", f"{RFT} {HARD_WEIGHT}"),
    "hard": Arm("RSGround-R1, hard IoU in reward and weight", "cot",
                f"{RFT} {HARD} {TERM} {HARD_WEIGHT}"),
}
# Their names in the curve are coarse-SPREAD-NAME; they start from coarse-SPREAD.
TERMS = {
    "iou": ("IoU", IOU), "giou": ("+ GIoU", f"{IOU} giou=0.1"),
    "diou": ("+ DIoU", f"{IOU} diou=0.1"), "center": ("+ centre distance", f"{IOU} center=0.1"),
    "positional": ("+ positional", f"{IOU} {TERM}"), "hard": ("hard IoU", HARD),
    "hard-positional": ("hard IoU + positional", f"{HARD} {TERM}")}
for spread, seeds in SPREADS.items():
    start = f"coarse-{spread}"
    ARMS[start] = Arm(f"SFT on boxes moved by {spread}", "base", SFT, 0.1, seeds, spread)
    for name, (title, flags) in TERMS.items():
        ARMS[f"{start}-{name}"] = Arm(
            f"{title}, {spread}", start, f"{MISSING} {flags} {OFF}", 0.5, seeds)
CURVE = tuple(name for name in ARMS if name.startswith("coarse"))
CURVE_PAIRS = (*((name, "iou") for name in TERMS if name != "iou"), ("hard-positional", "hard"))


class Score(NamedTuple):
    data: str
    split: str
    scenes: int
    flags: str = "--batch 125"


# Folders of scores are called eval_NAME; NAME-8 has eight samples of each answer.
SCORES = {
    "final": Score("synth", "final", 2000),
    "small": Score("synth-small", "final", 2000),   # half-sized things
    "novel": Score("synth", "novel", 1000),         # held out of SFT and RFT, not of the base
    "tiny": Score("synth-tiny", "final", 500),
    "val": Score("synth", "val", 500),
    "final-8": Score("synth", "final", 2000, "--batch 32 --temperature 1 --samples 8"),
    "val-8": Score("synth", "val", 500, "--batch 32 --temperature 1 --samples 8"),
    "final-blind": Score("synth", "final", 2000, "--batch 125 --blind"),
}


class Table(NamedTuple):
    question: str
    seeds: int                                   # 0, 1, ...; study.py tabulates no others
    arms: tuple[str, ...]
    scores: tuple[str, ...]                      # of every arm
    # (a, b): a minus b; (a, b, c, d): what a minus b is more than c minus d
    contrasts: tuple[tuple[str, ...], ...]
    # The first is the primary figure; the last two of arms that were scored with eight samples.
    metrics: tuple[str, ...] = ("Pr@0.5, places", "Pr@0.5, names", "Pr@0.5", "mIoU", "no box",
                                "pass@1", "pass@8")
    more: tuple[tuple[str, str], ...] = ()       # (arm, score of this arm alone)


TABLES = {
    "ladder": Table(
        "Does each stage help: GRPO, reasoning in SFT, GRPO after it, the paper's term and "
        "weights?",
        5, ("base", "direct", "boxes", "boxes-rft", "cot", "cot-rft", "paper"),
        ("final", "small", "novel"),
        (("direct", "base"), ("cot", "boxes"), ("cot-rft", "direct"), ("cot-rft", "cot"),
         ("boxes-rft", "boxes"), ("paper", "cot-rft"), ("paper", "direct"), ("paper", "cot"),
         ("own", "cot-rft")),
        more=(("cot", "final-8"), ("paper", "final-blind"))),
    "settings": Table(
        "Which settings of RFT help after a good SFT, one change at a time?",
        3, SETTINGS, ("val", "val-8"), tuple((name, "first") for name in SETTINGS[1:])),
    "curve": Table(
        "Does a term next to IoU and format help, by the share of groups in which all answers "
        "miss? The more coarsely SFT places its boxes, the larger is that share.",
        10, CURVE, ("tiny",),
        tuple((f"coarse-{spread}-{name}", f"coarse-{spread}-{other}")
              for spread in SPREADS for name, other in CURVE_PAIRS),
        metrics=("mIoU", "touched")),
    "weights": Table(
        "Do weights of groups help, with the positional term and without, and more than the same "
        "weights dealt to other groups? Does it matter whether the IoU is hard?",
        10, ("cot", "cot-rft", *WEIGHTS, "positional", "positional-mean", "positional-variance",
             "paper", "positional-shuffled", "weight-hard", "hard"), ("final",),
        (*((name, "cot-rft") for name in WEIGHTS), ("consistency", "shuffled"),
         ("positional", "cot-rft"), ("positional-mean", "positional"),
         ("positional-variance", "positional"), ("paper", "positional"),
         ("positional-shuffled", "positional"), ("paper", "positional-shuffled"),
         ("paper", "consistency"), ("paper", "positional", "consistency", "cot-rft"),
         ("paper", "cot-rft"),
         ("weight-hard", "positional"), ("weight-hard", "paper"), ("hard", "weight-hard"))),
}


# ---------------------------------------------------------------- running

def command(*words: object) -> None:
    """Runs a script of ours; ends this process if it fails."""
    status = subprocess.run([sys.executable, *map(str, words)]).returncode
    if status:
        sys.exit(status)


def moved(box: Box, size: tuple[int, int], spread: float, rng: random.Random) -> Box:
    """The box shifted by a normal deviate of `spread` times its sides, within the image."""
    edges = list(box)
    for axis in (0, 1):
        step = rng.gauss(0, spread * (box[axis + 2] - box[axis]))
        step = min(max(step, -box[axis]), size[axis] - box[axis + 2])
        edges[axis] += step
        edges[axis + 2] += step
    return tuple(round(v, 2) for v in edges)


def write_coarse(out: Path, spread: float, seed: str) -> None:
    """Writes a tenth of a seed's SFT records as --data jsonl, with boxes of the right size at
    inaccurate places. A model trained on them chooses the right thing and answers near it."""
    out.mkdir(parents=True, exist_ok=True)
    rng = random.Random(int(seed))
    lines = []
    records = load("synth", None, sft_split(seed))
    for record in records[:len(records) // 10]:
        image = f"{record.id}.png"
        open_image(record).save(out / image)
        lines.append(json.dumps({
            "id": record.id, "image": image, "text": record.text, "category": record.category,
            "box": moved(record.box, record.size, spread, rng)}) + "\n")
    # Written last: a folder that has it is complete.
    (out / "sft.jsonl").write_text("".join(lines), encoding="utf-8")


def sft_split(seed: str) -> str:
    return "sft" if seed == "0" else f"sft-{seed}"


def trained(name: str, seed: str, settings: dict[str, str]) -> tuple[Path, str]:
    """An arm's model, trained once, and its recipe: all commands from the base on.

    What it starts from is trained first; what was stopped resumes.
    """
    arm = ARMS[name]
    if not arm.command:
        bases = dict(pair.split("=", 1) for pair in settings["BASES"].split())
        base = bases.get(seed, "toy/base")
        return Path(base), base
    init, recipe = trained(arm.start, seed, settings)
    script, *flags = arm.command.split()
    asked = int(settings[script.removesuffix(".py").upper()])
    flags += ["--steps", str(max(1, round(arm.times * asked))), "--seed", seed]
    if script == "sft.py":
        flags += ["--split", "sft" if arm.spread else sft_split(seed)]
    if name == "own":
        flags += shlex.split(settings["OWN"])
    recipe += f" > {script} {shlex.join(flags)}"
    out = Path(settings["STUDY"]) / seed / name
    if (out / "done").exists():
        if (out / "done").read_text(encoding="utf-8") != f"{recipe}\n":
            fail(f"{out} was trained with other settings; move it away, or name another STUDY")
        return out, recipe
    if arm.spread:
        moved_boxes = out.with_name(f"{name}-boxes")
        if not (moved_boxes / "sft.jsonl").exists():
            write_coarse(moved_boxes, arm.spread, seed)
        flags += ["--data", "jsonl", "--root", moved_boxes, "--val", 0]
    resume = any(out.glob("step_*")) or (out / "latest").exists()
    if not resume:
        shutil.rmtree(out, ignore_errors=True)
    command(script, *flags, "--init", init, "--out", out, *["--resume"] * resume)
    # A stage that is stopped saves a checkpoint and exits with 0, too.
    run = json.loads((steps_so_far(out)[0] / "run.json").read_text(encoding="utf-8"))
    if run["step"] != run["flags"]["steps"]:
        print(f"ablate.py: stopped in {out}; the same command resumes", file=sys.stderr)
        sys.exit(130)
    (out / "done").write_text(f"{recipe}\n", encoding="utf-8")
    return out, recipe


def score(name: str, seed: str, which: str, settings: dict[str, str]) -> None:
    """Trains an arm and scores it, once; again with another TEST, or if it was stopped."""
    model, recipe = trained(name, seed, settings)
    data, split, scenes, flags = SCORES[which]
    limit = min(scenes, int(settings["TEST"]))
    flags = f"--data {data} --split {split} --limit {limit} {TOKENS} {flags}"
    out = Path(settings["STUDY"]) / seed / name / f"eval_{which}"
    done = out / "done"
    recipe += f" > eval.py {flags}\n"
    if not done.exists() or done.read_text(encoding="utf-8") != recipe:
        shutil.rmtree(out, ignore_errors=True)
        command("eval.py", model, *flags.split(), "--out", out)
        done.write_text(recipe, encoding="utf-8")


def read_settings(table: Table) -> dict[str, str]:
    """The environment's settings, with defaults; ends this process if one is wrong."""
    settings = {
        "STUDY": "ckpt/study", "SEEDS": " ".join(map(str, range(table.seeds))), "BASES": "",
        "ARMS": "", "OWN": "", "SFT": str(STEPS["sft.py"]), "RFT": str(STEPS["rft.py"]),
        "TEST": "2000"}
    settings = {name: os.environ.get(name) or value for name, value in settings.items()}
    for name in settings["ARMS"].split():
        if name not in ARMS:
            fail(f"ARMS: there is no {name}; use some of {', '.join(ARMS)}")
    for seed in settings["SEEDS"].split():
        if seed not in map(str, range(table.seeds)):
            fail(f"SEEDS: {seed} is not a seed of this table, which has 0 to {table.seeds - 1}")
    for pair in settings["BASES"].split():
        _, _, base = pair.partition("=")
        if not is_checkpoint(newest_step(base)):
            fail(f"BASES: {pair} is not SEED=FOLDER with a model in the folder")
    for name in ("SFT", "RFT", "TEST"):
        if not settings[name].isdigit():
            fail(f"{name}={settings[name]} is not a whole number")
    if "own" in settings["ARMS"].split() and not settings["OWN"]:
        fail('the arm own needs OWN: flags of rft.py, for example OWN="--alpha 10"')
    return settings


def main() -> None:
    os.chdir(ROOT)
    if {"-h", "--help"} & {*sys.argv}:
        print(__doc__)
        return
    if len(sys.argv) != 2 or sys.argv[1] not in TABLES:
        fail(f"name one table: {', '.join(TABLES)}")
    table = TABLES[sys.argv[1]]
    settings = read_settings(table)
    # Waiting threads spin briefly, then sleep.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    # Ctrl-C stops the stage, which saves a checkpoint; this process waits for it.
    signal.signal(signal.SIGINT, lambda *_: None)
    for seed in settings["SEEDS"].split():
        arms = settings["ARMS"].split()
        for name in arms or [name for name in table.arms if int(seed) < ARMS[name].seeds]:
            more = [which for arm, which in table.more if arm == name]
            for which in (*table.scores, *more):
                score(name, seed, which, settings)
    command("study/study.py", settings["STUDY"])


if __name__ == "__main__":
    main()
