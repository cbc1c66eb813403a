"""Runs the study: the paper's four ablations with their controls, and a map of regimes.

    bash study/ablate.sh start       does CoT-SFT matter?
    bash study/ablate.sh reward      which reward?
    bash study/ablate.sh weight      which weight of a group?
    bash study/ablate.sh stability   is training more stable, and do more steps help?
    bash study/ablate.sh map         in which regimes does the positional term pay?

Each takes hours on two cores. Stop it at any time: the same command resumes, and does not repeat
what is finished. Tables share the runs that they have in common. At the end study.py writes the
tables and the figure. All arms of a table have the same questions and steps.

Settings are environment variables. A quick look, a variant of your own, and one core for a seed:

    STUDY=ckpt/look SEEDS=0 SFT=100 RFT=20 TEST=40 bash study/ablate.sh reward
    ARMS=own OWN="--alpha 10" bash study/ablate.sh
    OMP_NUM_THREADS=1 SEEDS=0 taskset -c 0 bash study/ablate.sh

STUDY: output folder (ckpt/study). SEEDS (0 1 2). SFT: steps of CoT-SFT (100). RFT: steps of RFT
(90). TEST: scenes of the split `final` to score (2000). ARMS, REGIMES: other ones than the
table's. OWN: flags of rft.py for the arm `own`; a study has one such arm.
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
from train.dist import fail  # noqa: E402

IOU = "--reward iou=1 format=1"
SPREAD = 0.5                   # deviation of a coarse box's position, in its own sides


class Arm(NamedTuple):
    title: str                 # in the tables
    flags: str = ""            # of its script
    init: str = "sft"          # "sft": the SFT model of its seed
    steps: int = 1             # times the steps of RFT
    script: str = "rft.py"     # "": nothing is trained, `init` is scored


# In the order of the tables. Without --reward: the paper's, IoU + 0.1 positional + format.
ARMS = {
    "base": Arm("base", init="toy/base", script=""),
    "sft": Arm("CoT-SFT", script=""),
    # As long as RFT: an RFT step of 256 rollouts costs what 10 SFT steps of 32 answers cost.
    "boxes": Arm("CoT-SFT, then SFT on boxes", "--split rft --answer-only --batch 32 --lr 5e-4",
                 steps=10, script="sft.py"),
    "direct": Arm("GRPO from the base", f"{IOU} --weighting off", init="toy/base"),
    "iou": Arm("GRPO: IoU + format", f"{IOU} --weighting off"),
    "giou": Arm("+ GIoU", f"{IOU} giou=0.1 --weighting off"),
    "diou": Arm("+ DIoU", f"{IOU} diou=0.1 --weighting off"),
    "center": Arm("+ centre distance", f"{IOU} center=0.1 --weighting off"),
    "positional": Arm("+ positional", f"{IOU} positional=0.1 --weighting off"),
    "mean": Arm("+ positional, mean weight", "--weighting mean"),
    "variance": Arm("+ positional, variance weight", "--weighting variance"),
    "consistency": Arm("RSGround-R1 (both weights)", "--weighting consistency"),
    "shuffled": Arm("both weights, shuffled", "--weighting shuffled"),
    "longer": Arm("GRPO: IoU + format, twice the steps", f"{IOU} --weighting off", steps=2),
    "consistency-longer": Arm(
        "RSGround-R1, twice the steps", "--weighting consistency", steps=2),
    "own": Arm("own variant", "--weighting off"),
}


class Regime(NamedTuple):
    title: str
    data: str                  # to train RFT on and to score
    rft: int = 1               # RFT takes this fraction 1/rft of the steps
    flags: str = ""            # of rft.py
    sft_data: str = "synth:0.1"
    sft_steps: int = 1         # times the steps of CoT-SFT


# Divided by their deviation, the advantages of a group with boxes one pixel apart weigh as much as
# those of a group with different choices, so the tables use --no-std if scenes have many things.
# Undivided, a group without any overlap, in which only the positional term differs, has almost no
# weight, so the regimes of the map divide.
REGIMES = {
    "tiny": Regime("one thing alone, tiny", "synth-tiny", rft=3),
    "little": Regime("many things, SFT on a tenth of its records", "synth", flags="--no-std"),
    "wide": Regime("many things, SFT on all of its records", "synth", flags="--no-std",
                   sft_data="synth", sft_steps=10),
    "choice": Regime("many things, full-sized", "synth"),
    "small": Regime("many things, half as long", "synth-small"),
    "one": Regime("one thing alone", "synth-one", rft=3),
    "one-coarse": Regime("one thing alone, SFT on inaccurate boxes", "synth-one", rft=3,
                         sft_data="coarse"),
}


class Table(NamedTuple):
    question: str
    arms: tuple[str, ...]
    regimes: tuple[str, ...]
    blind: str                                   # arm that is also scored without the image
    contrasts: tuple[tuple[str, str], ...] = ()  # (a, b): a minus b answers the question


# The questions were written before the runs.
TABLES = {
    "start": Table(
        "Does CoT-SFT matter, what does RFT add to it, and what would SFT on the same boxes?",
        ("base", "direct", "iou", "consistency", "boxes"), ("tiny", "little"), "consistency",
        (("iou", "direct"), ("iou", "sft"), ("consistency", "sft"), ("consistency", "iou"),
         ("consistency", "boxes"))),
    "reward": Table(
        "Does a term next to IoU and format raise mIoU, and does the positional one raise it more "
        "than GIoU, DIoU and centre distance?",
        ("iou", "giou", "diou", "center", "positional"), ("tiny",), "positional",
        (("giou", "iou"), ("diou", "iou"), ("center", "iou"), ("positional", "iou"),
         ("positional", "giou"), ("positional", "diou"), ("positional", "center"),
         ("own", "positional"))),
    "weight": Table(
        "Do weights by mean, variance or both raise mIoU, and more than the same weights dealt to "
        "other groups?",
        ("positional", "mean", "variance", "consistency", "shuffled"), ("tiny",), "consistency",
        (("mean", "positional"), ("variance", "positional"), ("consistency", "positional"),
         ("shuffled", "positional"), ("consistency", "shuffled"))),
    "stability": Table(
        "Do rewards scatter less within groups under the weights, all through training, and do "
        "twice the steps help more with the paper's terms than without?",
        ("iou", "positional", "consistency", "longer", "consistency-longer"), ("tiny",),
        "consistency-longer",
        (("longer", "iou"), ("consistency-longer", "consistency"),
         ("consistency-longer", "longer"))),
    "map": Table(
        "Does the positional term raise mIoU if answers miss by imprecision, and not if they miss "
        "by a wrong choice? Does it make boxes smaller?",
        ("iou", "positional"), ("choice", "small", "one", "tiny", "one-coarse"), "positional"),
}


# ---------------------------------------------------------------- running

def command(*words: object) -> None:
    """Runs a script of ours; ends this process if it fails."""
    status = subprocess.run([sys.executable, *map(str, words)]).returncode
    if status:
        sys.exit(status)


def train(out: Path, script: str, flags: str) -> None:
    """Trains once; resumes if it was stopped."""
    if (out / "done").exists():
        return
    resume = (out / "latest").is_symlink()
    if not resume:
        shutil.rmtree(out, ignore_errors=True)
    command(script, *shlex.split(flags), "--out", out, *["--resume"] * resume)
    # A stage that is stopped saves a checkpoint and exits with 0, too.
    run = json.loads((out / "latest" / "run.json").read_text(encoding="utf-8"))
    if run["step"] != run["steps"]:
        print(f"ablate.py: stopped in {out}; the same command resumes", file=sys.stderr)
        sys.exit(130)
    (out / "done").touch()


def score(out: Path, model: object, flags: str) -> None:
    """Scores once with these flags; again with others, or if it was stopped."""
    done = out / "done"
    if not done.exists() or done.read_text(encoding="utf-8") != f"{model} {flags}\n":
        shutil.rmtree(out, ignore_errors=True)
        command("eval.py", model, *flags.split(), "--out", out)
        done.write_text(f"{model} {flags}\n", encoding="utf-8")


def moved(box: Box, size: tuple[int, int], rng: random.Random) -> Box:
    """The box shifted by a normal deviate of half its sides, within the image."""
    edges = list(box)
    for axis in (0, 1):
        step = rng.gauss(0, SPREAD * (box[axis + 2] - box[axis]))
        step = min(max(step, -box[axis]), size[axis] - box[axis + 2])
        edges[axis] += step
        edges[axis + 2] += step
    return tuple(round(v, 2) for v in edges)


def write_coarse(out: Path) -> None:
    """Writes the SFT records as --data jsonl, with boxes of the right size at inaccurate places.

    A model trained on them chooses the right thing and answers near it.
    """
    out.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    lines = []
    for record in load("synth:0.1", None, "sft"):
        image = f"{Path(record.id).name}.png"
        open_image(record).save(out / image)
        lines.append(json.dumps({
            "id": record.id, "image": image, "text": record.text, "category": record.category,
            "box": moved(record.box, record.size, rng)}) + "\n")
    # Written last: a folder that has it is complete.
    (out / "train.jsonl").write_text("".join(lines), encoding="utf-8")


def run_seed(
        name: str, seed: str, arms: list[str], blind: str, settings: dict[str, str],
) -> None:
    """Trains and scores the arms in one regime with one seed."""
    regime = REGIMES[name]
    out = Path(settings["STUDY"])
    always = f"--freeze-vision --max-new-tokens 160 --seed {seed}"
    data = f"--data {regime.sft_data}"
    if regime.sft_data == "coarse":
        data = f"--data jsonl --root {shlex.quote(str(out / 'coarse'))}"
        if not (out / "coarse" / "train.jsonl").exists():
            write_coarse(out / "coarse")
    steps = int(settings["SFT"]) * regime.sft_steps
    sft = out / f"sft_{regime.sft_data.replace(':', '_')}" / seed
    train(sft, "sft.py", f"{data} --init toy/base --steps {steps} --every {steps} --batch 16 "
                         f"--lr 1.5e-3 {always}")
    for arm_name in ("sft", *arms):
        arm = ARMS[arm_name]
        init = sft if arm.init == "sft" else arm.init
        folder = out / name / seed / arm_name
        steps = -(-int(settings["RFT"]) // regime.rft) * arm.steps
        flags = (f"--init {shlex.quote(str(init))} --steps {steps} --data {regime.data} {always} "
                 f"{arm.flags}")
        if arm.script == "rft.py":
            own = settings["OWN"] if arm_name == "own" else ""
            train(folder, arm.script,
                  f"--prompts 32 --temperature 0.8 --lr 3e-4 --beta 0 --every 40 "
                  f"--micro-tokens 16384 {regime.flags} {flags} {own}")
        elif arm.script:
            train(folder, arm.script, f"--every {steps} {flags}")
        # All ways of scoring use the same scenes.
        common = f"--limit {settings['TEST']} --max-new-tokens 160 --batch 125"
        final = f"--data {regime.data} --split final {common}"
        scores = {"final": final, "final_T1": f"{final} --temperature 1",
                  "novel": f"--data synth --split novel {common}"}
        if arm_name == blind:
            scores["final_blind"] = f"{final} --blind"
        if arm_name == "sft":
            # RFT may do no more than sharpen: SFT sampled at lower temperatures is its control.
            scores["final_T0.8"] = f"{final} --temperature 0.8"
            scores["final_T0.6"] = f"{final} --temperature 0.6"
        for split, flags in scores.items():
            score(folder / f"eval_{split}", folder if arm.script else init, flags)


def main() -> None:
    os.chdir(ROOT)
    names = sys.argv[1:]
    if len(names) > 1 or names and names[0] not in TABLES:
        fail(f"no table {' '.join(names)}; give one of {', '.join(TABLES)}")
    table = TABLES[names[0]] if names else None
    known_arms = [name for name in ARMS if name != "sft"]
    settings = {
        "STUDY": "ckpt/study", "SEEDS": "0 1 2", "SFT": "100", "RFT": "90", "TEST": "2000",
        "OWN": "", "ARMS": " ".join(table.arms if table else known_arms[:-1]),
        "REGIMES": " ".join(table.regimes if table else ("tiny", "little"))}
    settings = {name: os.environ.get(name) or value for name, value in settings.items()}
    for setting, known in (("ARMS", known_arms), ("REGIMES", REGIMES)):
        for name in settings[setting].split():
            if name not in known:
                fail(f"{setting}: there is no {name}; use some of {', '.join(known)}")
    for name in ("SFT", "RFT", "TEST"):
        if not settings[name].isdigit():
            fail(f"{name}={settings[name]} is not a whole number")
    if "own" in settings["ARMS"].split() and not settings["OWN"]:
        fail('the arm own needs OWN: flags of rft.py, for example OWN="--alpha 10"')
    # Waiting threads spin briefly, then sleep.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    # Ctrl-C stops the stage, which saves a checkpoint; this process waits for it.
    signal.signal(signal.SIGINT, lambda *_: None)
    for seed in settings["SEEDS"].split():
        for regime in settings["REGIMES"].split():
            run_seed(regime, seed, settings["ARMS"].split(), table.blind if table else "", settings)
    command("study/study.py", settings["STUDY"])


if __name__ == "__main__":
    main()
