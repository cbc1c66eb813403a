"""What ablate.sh measured: tables of every regime and arm, of what each term adds, and a figure.

A difference is paired: both models answered the same scenes, which are resampled together for its
95% interval. Every seed has its own SFT model and its own difference; the mean over seeds stands
beside their standard deviation. What a term adds is the difference between two arms that started
from the same SFT models, over all seeds at once: its interval is of scenes, resampled with the
answers of all seeds, and the standard deviation beside it is of seeds.

Of a hundred such intervals, five leave 0 out by chance: which differences are the questions is to
be written down before the runs. All seeds share toy/base and the records of SFT; a seed is the
order of the data and the sampling.

    python study/study.py ckpt/study

prints Markdown, and writes study.md, study.json (the differences from SFT) and study.png there.
"""
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import eval as evaluation  # noqa: E402
import metrics  # noqa: E402
import report  # noqa: E402
import runtime  # noqa: E402
from data import Record, load, read_json  # noqa: E402
from model import by_number  # noqa: E402

# Arms of ablate.sh, in the order of the tables: what they are called there.
ARMS = {
    "base": "base",
    "sft": "CoT-SFT",
    "boxes": "CoT-SFT, then SFT on boxes",
    "direct": "GRPO from the base",
    "iou": "GRPO: IoU + format",
    "giou": "+ GIoU",
    "diou": "+ DIoU",
    "center": "+ centre distance",
    "positional": "+ positional",
    "mean": "+ positional, mean weight",
    "variance": "+ positional, variance weight",
    "consistency": "RSGround-R1 (both weights)",
    "shuffled": "both weights, shuffled",
    "longer": "GRPO: IoU + format, twice the steps",
    "consistency-longer": "RSGround-R1, twice the steps",
    "own": "own variant",
}
# Regimes of ablate.sh, and the data set that each tests on.
REGIMES = {"little": "synth", "small": "synth-small", "wide": "synth"}
# Pairs of arms (a, b) whose difference a - b answers a question.
CONTRASTS = (
    # Does CoT-SFT matter?
    ("iou", "direct"), ("consistency", "iou"), ("consistency", "boxes"),
    # Which reward?
    ("giou", "iou"), ("diou", "iou"), ("center", "iou"), ("positional", "iou"),
    ("positional", "giou"), ("positional", "diou"), ("positional", "center"),
    # Which weight?
    ("mean", "positional"), ("variance", "positional"), ("consistency", "positional"),
    ("shuffled", "positional"), ("consistency", "shuffled"),
    # Twice the steps, and one's own.
    ("longer", "iou"), ("consistency-longer", "consistency"), ("consistency-longer", "longer"),
    ("own", "positional"),
)
# What is told of training beside the terms of the reward.
TRAINED = (
    "no_overlap_groups", "no_overlap_advantage", "positional_alone_advantage",
    "zero_variance_groups", "entropy", "dispersion", "consistency_weight",
)


# ---------------------------------------------------------------- what was scored

def read_row(folder: Path) -> dict[str, Any] | None:
    """The one row of a folder of scores, or None where it was not scored."""
    content = read_json(folder / "eval.json")
    if content is None:
        return None
    try:
        return content["rows"][0]
    except (KeyError, IndexError, TypeError):
        runtime.fail(f"{folder / 'eval.json'} has no row of scores; remove {folder} and run "
                     "ablate.sh again")


def rows_of(seeds: Sequence[Path], arm: str, scores: str) -> list[dict[str, Any] | None]:
    """The rows of an arm, one a seed; scores: name of the folder."""
    return [read_row(seed / arm / scores) for seed in seeds]


def seeds_with(regime: Path, arm: str, split: str, other: str = "sft") -> list[Path]:
    """The seeds' folders in which both arms were scored, on as many scenes."""
    seeds = []
    counts = set()
    for seed in sorted(regime.iterdir(), key=by_number):
        pair = [read_row(seed / name / f"eval_{split}") for name in (arm, other)]
        if all(pair):
            seeds.append(seed)
            counts.update(row["n"] for row in pair)
    if len(counts) > 1:
        numbers = " and ".join(map(str, sorted(counts)))
        runtime.fail(f"{regime}: scores of {numbers} scenes can't be compared; "
                     "give each a study of its own")
    return seeds


def predictions_of(folder: Path, records: Sequence[Record]) -> list[dict[str, Any]]:
    """A folder's predictions, in the order of records; records without one are left out."""
    files = list(folder.glob("predictions_*.jsonl"))
    if len(files) != 1:
        runtime.fail(f"{len(files)} files predictions_*.jsonl in {folder}, where one belongs; "
                     f"remove {folder} and run ablate.sh again")
    by_id = evaluation.read_predictions(files[0], records)
    return [by_id[r.id] for r in records if r.id in by_id]


def check_names(study: Path) -> None:
    """Refuses a study without scores, and scores of a regime or an arm that is not known here."""
    scores = sorted(study.glob("*/*/*/eval_*/eval.json"))
    for file in scores:
        regime, _, arm = file.relative_to(study).parts[:3]
        if regime not in REGIMES:
            runtime.fail(f"{study / regime}: no regime {regime}; there are {', '.join(REGIMES)}")
        if arm not in ARMS:
            runtime.fail(f"{file.parents[1]}: no arm {arm}; there are {', '.join(ARMS)}")
    if not any((study / name).is_dir() for name in REGIMES):
        runtime.fail(f"no regime ({', '.join(REGIMES)}) in {study}; run ablate.sh first")
    if not scores:
        runtime.fail(f"no scores in {study}; run ablate.sh first")


# ---------------------------------------------------------------- Markdown

def line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |\n"


def header(cells: Sequence[str]) -> str:
    return line(cells) + line(["---"] * len(cells))


def mean_text(values: Sequence[float | None]) -> str:
    """Mean and standard deviation over seeds; "-" without a value."""
    known = [v for v in values if v is not None]
    if not known:
        return "-"
    return f"{statistics.mean(known):.3f}{deviation_text(known)}"


def deviation_text(values: Sequence[float]) -> str:
    return f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""


def key_text(rows: Sequence[dict[str, Any] | None], key: str) -> str:
    """Mean over seeds of a figure of their rows."""
    return mean_text([row and row[key] for row in rows])


# ---------------------------------------------------------------- arms beside SFT

def arm_differences(
        seeds: Sequence[Path], arm: str, split: str, records: Sequence[Record],
) -> list[dict[str, Any]]:
    """An arm's mIoU minus that of its SFT model, a paired test a seed."""
    tests = []
    for seed in seeds:
        sft = predictions_of(seed / "sft" / f"eval_{split}", records)
        ours = predictions_of(seed / arm / f"eval_{split}", records)
        ids = {p["id"] for p in sft}
        answered = [r for r in records if r.id in ids]
        test = metrics.paired(
            answered, evaluation.strict_iou(answered, sft), evaluation.strict_iou(answered, ours))
        tests.append(test["mIoU"])
    return tests


def compare(
        regime: Path, arms: Sequence[str], split: str,
) -> tuple[str, list[tuple[str, str, dict[str, Any]]]]:
    """-> Markdown of one regime on one split, and (arm, seed, test) of the greedy differences."""
    records = load(REGIMES[regime.name], None, split)
    text = header(["", "seeds", "mIoU greedy", "minus SFT, seed by seed [95%]", "mean", "Pr@0.5",
                   "cIoU", "mIoU T=1", "no box"])
    tests = []
    for arm in arms:
        seeds = seeds_with(regime, arm, split)
        if not seeds:
            continue
        rows = rows_of(seeds, arm, f"eval_{split}")
        differences = [] if arm == "sft" else arm_differences(seeds, arm, split, records)
        tests += [(arm, seed.name, test) for seed, test in zip(seeds, differences)]
        each = [f"{t['difference']:+.3f} [{t['ci'][0]:+.3f}, {t['ci'][1]:+.3f}]"
                for t in differences]
        failed = [sum(row["failures"].values()) / row["n"] for row in rows]
        text += line([
            ARMS[arm], " ".join(seed.name for seed in seeds), key_text(rows, "mIoU"),
            "; ".join(each) or "-", mean_text([t["difference"] for t in differences]),
            key_text(rows, "Pr@0.5"), key_text(rows, "cIoU"),
            key_text(rows_of(seeds, arm, f"eval_{split}_T1"), "mIoU"), mean_text(failed)])
        if arm == "sft":
            text += cooler_sampling(seeds, split)
    return text, tests


def cooler_sampling(seeds: Sequence[Path], split: str) -> str:
    """The control of sharpening: SFT sampled at less than T=1."""
    text = ""
    for temperature in ("0.8", "0.6"):
        rows = rows_of(seeds, "sft", f"eval_{split}_T{temperature}")
        if any(rows):
            name = f"SFT sampled at T={temperature}"
            text += line([name, "", key_text(rows, "mIoU"), *["-"] * 6])
    return text


# ---------------------------------------------------------------- arms beside each other

@dataclass
class Answers:
    """What an arm answered to N scenes in S seeds; each (S, N)."""

    has_box: np.ndarray
    iou: np.ndarray
    distance: np.ndarray       # of its centre from the target's; 0 without a box


def read_answers(
        seeds: Sequence[Path], arm: str, split: str, records: Sequence[Record]) -> Answers:
    has_box = []
    iou = []
    distance = []
    for seed in seeds:
        predictions = predictions_of(seed / arm / f"eval_{split}", records)
        boxes = evaluation.strict_boxes(records, predictions)
        valid, overlap, _, _, away = metrics.overlaps(boxes, *metrics.targets(records))
        has_box.append(valid.numpy())
        iou.append(overlap.numpy())
        distance.append(away.where(valid, 0.0).numpy())
    return Answers(np.stack(has_box), np.stack(iou), np.stack(distance))


def is_small(record: Record) -> bool:
    """Does the target cover less than 1% of its image?"""
    x1, y1, x2, y2 = record.box
    return (x2 - x1) * (y2 - y1) < 0.01 * record.size[0] * record.size[1]


def contrasts(regime: Path, split: str) -> str:
    """Markdown: what one arm has more than another."""
    records = load(REGIMES[regime.name], None, split)
    text = header(["", "seeds", "mIoU", "Pr@0.5", "box given", "centre distance",
                   "mIoU, target under 1% of the image", "mIoU where SFT's box touched nothing",
                   "centre distance there"])
    for arm, other in CONTRASTS:
        seeds = seeds_with(regime, arm, split, other)
        if not seeds:
            continue
        n = read_row(seeds[0] / arm / f"eval_{split}")["n"]
        sft, a, b = (read_answers(seeds, name, split, records[:n]) for name in ("sft", arm, other))
        cells = contrast_cells(records[:n], sft, a, b)
        text += line([f"{ARMS[arm]} minus {ARMS[other]}", str(len(seeds)), *cells])
    return text


def contrast_cells(
        records: Sequence[Record], sft: Answers, a: Answers, b: Answers) -> list[str]:
    """The differences a - b, each over the answers that it is about, with intervals."""
    everywhere = np.ones_like(sft.has_box)                         # (S, N), as all of these
    both = a.has_box & b.has_box
    small = np.broadcast_to([is_small(r) for r in records], everywhere.shape)
    missed = sft.has_box & (sft.iou == 0)
    hits = (a.iou > 0.5) * 1.0 - (b.iou > 0.5)
    boxes = a.has_box * 1.0 - b.has_box
    iou = a.iou - b.iou
    # Distances are told where both arms gave a box.
    distance = a.distance - b.distance
    columns = [(iou, everywhere), (hits, everywhere), (boxes, everywhere), (distance, both),
               (iou, small), (iou, missed), (distance, missed & both)]
    rates = {}
    for i, (value, among) in enumerate(columns):
        rates[i] = ((value * among).sum(0), among.sum(0))
    bounds = metrics.intervals(records, rates)
    cells = []
    for i, (value, among) in enumerate(columns):
        of_seeds = [v[m].mean().item() for v, m in zip(value, among) if m.any()]
        if not among.any():
            cells.append("-")
            continue
        low, high = bounds[i]
        cells.append(f"{value[among].mean():+.3f} [{low:+.3f}, {high:+.3f}]"
                     f"{deviation_text(of_seeds)}")
    return cells


def kinds(regime: Path, arms: Sequence[str], split: str) -> str:
    """Markdown: mIoU by kind of expression, mean over seeds."""
    by_arm = {}
    names = set()
    for arm in arms:
        rows = rows_of(seeds_with(regime, arm, split), arm, f"eval_{split}")
        by_arm[arm] = [row["breakdowns"]["kind"] for row in rows]
        for kind_scores in by_arm[arm]:
            names.update(kind_scores)
    text = header(["mIoU by kind", *sorted(names)])
    for arm, kind_scores in by_arm.items():
        cells = []
        for name in sorted(names):
            cells.append(mean_text([scores[name]["mIoU"] for scores in kind_scores]))
        if kind_scores:
            text += line([ARMS[arm], *cells])
    return text


# ---------------------------------------------------------------- training

def training(regime: Path, arms: Sequence[str]) -> str:
    """Markdown: what the steps logged, first and last tenth of them, mean over seeds.

    Of the reward and of whatever terms a run had, the mean and the standard deviation within a
    group; "-" where an arm logs no such figure.
    """
    logs: dict[str, list[list[dict[str, Any]]]] = {}
    names: dict[str, None] = {}
    for arm in arms:
        logs[arm] = []
        for seed in sorted(regime.iterdir(), key=by_number):
            log = list(report.log_lines(seed / arm / "metrics.jsonl"))
            if (seed / arm / "done").exists() and log and "dispersion" in log[0]:
                logs[arm].append(log)
                for keys in report.reward_curves(log[:1]):
                    names.update(dict.fromkeys(keys))
    columns = [*names, *TRAINED]
    text = header(["first → last tenth of the steps", *columns])
    for arm, of_seeds in logs.items():
        if of_seeds:
            text += line([ARMS[arm], *(ends_text(of_seeds, name) for name in columns)])
    return text


def ends_text(logs: Sequence[list[dict[str, Any]]], key: str) -> str:
    """A figure of metrics.jsonl over the first tenth of the steps and over the last."""
    first = []
    last = []
    for log in logs:
        if any(key not in step for step in log):
            return "-"
        tenth = max(1, len(log) // 10)
        first.append(np.mean([step[key] for step in log[:tenth]]))
        last.append(np.mean([step[key] for step in log[-tenth:]]))
    return f"{np.mean(first):.3f} → {np.mean(last):.3f}"


# ---------------------------------------------------------------- the figure

ROW = 17                       # pixels, height of a line of the figure
LABELS = 280                   # pixels, width of its labels
WIDTH = 900


def draw_differences(tests: Sequence[tuple[str, str, str, str, dict[str, Any]]]) -> Image.Image:
    """(regime, split, arm, seed, test) -> a line each: the difference from SFT, its interval."""
    ends = [test["ci"] for *_, test in tests]
    low = min(-0.01, *(bounds[0] for bounds in ends))
    high = max(0.01, *(bounds[1] for bounds in ends))
    image = Image.new("RGB", (WIDTH, ROW * (len(tests) + 2)), "white")
    pen = ImageDraw.Draw(image)
    font = ImageFont.load_default(12)

    def x_of(value: float) -> float:
        return LABELS + (WIDTH - LABELS - 20) * (value - low) / (high - low)

    bottom = image.height - ROW
    pen.line([x_of(0), ROW, x_of(0), bottom], fill="#999999")
    pen.text((LABELS, 1), "mIoU greedy, minus SFT: difference and 95% interval over scenes",
             fill="black", font=font)
    for value in (low, 0, high):
        pen.text((x_of(value) - 15, bottom), f"{value:+.2f}", fill="black", font=font)
    for i, (regime, split, arm, seed, test) in enumerate(tests):
        y = ROW * (i + 1.5)
        label = f"{regime}, {split}: {ARMS[arm]}, seed {seed}"
        pen.text((4, y - 8), label, fill="black", font=font)
        left, right = test["ci"]
        pen.line([x_of(left), y, x_of(right), y], fill="#1f77b4", width=2)
        dot = x_of(test["difference"])
        pen.ellipse([dot - 3, y - 3, dot + 3, y + 3], fill="#d62728")
    return image


def main() -> None:
    parser = runtime.FlagParser("Tables and figure of a study that ablate.sh ran")
    parser.add_argument("study", nargs="?", default="ckpt/study", help="its folder")
    study = Path(parser.parse_args().study)
    check_names(study)
    regimes = [study / name for name in REGIMES if (study / name).is_dir()]
    arms = tuple(ARMS)
    text = ""
    tests = []
    for regime in regimes:
        for split in ("test", "novel"):
            if not any(regime.glob(f"*/*/eval_{split}/eval.json")):
                continue
            table, differences = compare(regime, arms, split)
            text += f"### {regime.name}, {split}\n\n{table}\n"
            text += f"{contrasts(regime, split)}\n{kinds(regime, arms, split)}\n"
            tests += [(regime.name, split, *test) for test in differences]
        text += training(regime, arms) + "\n"
    (study / "study.md").write_text(text, encoding="utf-8")
    (study / "study.json").write_text(json.dumps(tests, indent=1) + "\n", encoding="utf-8")
    if tests:
        draw_differences(tests).save(study / "study.png")
    print(text)


if __name__ == "__main__":
    runtime.main(main)
