"""What ablate.sh measured: a chapter for each of its tables, the map, and a figure.

A difference is paired: both models answered the same scenes, which are resampled together for its
95% interval. Every seed has its own SFT model and its own difference; the mean over seeds stands
beside their standard deviation. What a term adds is the difference between two arms that started
from the same SFT models, over all seeds at once: its interval is of scenes, resampled with the
answers of all seeds, and the standard deviation beside it is of seeds.

Of a hundred such intervals, five leave 0 out by chance: TABLES has the questions, written down
before the runs. All seeds share toy/base and the records of SFT; a seed is the order of the data
and the sampling. Beside the arms stand two guesses: without seeing the image, and a box of the
median size in the middle.

    python study/study.py ckpt/study

prints Markdown, and writes study.md, study.json (the differences from SFT) and study.png there.
"""
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data import load  # noqa: E402
from qwen.hub import by_number  # noqa: E402
from readers.base import Record  # noqa: E402
from report import (
    metrics,  # noqa: E402
    page,  # noqa: E402
    predictions,  # noqa: E402
)
from study import figure, payoff  # noqa: E402
from study.scores import (  # noqa: E402
    ARMS,
    REGIMES,
    SPLITS,
    TABLE_REGIMES,
    Answers,
    check_names,
    data_set,
    deviation_text,
    header,
    key_text,
    line,
    mean_text,
    predictions_of,
    read_answers,
    read_row,
    rows_of,
    seeds_with,
)
from train.flags import FlagParser  # noqa: E402
from train.run import launch  # noqa: E402


@dataclass(frozen=True)
class Table:
    """A question, the arms of ablate.sh that it needs, and the differences that answer it."""

    question: str
    arms: tuple[str, ...]
    contrasts: tuple[tuple[str, str], ...]      # (a, b): a - b


TABLES = {
    "start": Table(
        "Does CoT-SFT matter, what does RFT add to it, and what would SFT on the same boxes?",
        ("base", "direct", "iou", "consistency", "boxes"),
        (("iou", "direct"), ("iou", "sft"), ("consistency", "sft"), ("consistency", "iou"),
         ("consistency", "boxes"))),
    "reward": Table(
        "Does a term beside IoU and format raise mIoU, and does the positional one raise it more "
        "than GIoU, DIoU and centre distance?",
        ("iou", "giou", "diou", "center", "positional"),
        (("giou", "iou"), ("diou", "iou"), ("center", "iou"), ("positional", "iou"),
         ("positional", "giou"), ("positional", "diou"), ("positional", "center"),
         ("own", "positional"))),
    "weight": Table(
        "Do weights by mean, variance or both raise mIoU, and more than the same weights dealt to "
        "other groups?",
        ("positional", "mean", "variance", "consistency", "shuffled"),
        (("mean", "positional"), ("variance", "positional"), ("consistency", "positional"),
         ("shuffled", "positional"), ("consistency", "shuffled"))),
    "stability": Table(
        "Do rewards scatter less within groups under the weights, all through training, and do "
        "twice the steps help more with the paper's terms than without?",
        ("iou", "positional", "consistency", "longer", "consistency-longer"),
        (("longer", "iou"), ("consistency-longer", "consistency"),
         ("consistency-longer", "longer"))),
}
# What is told of training beside the terms of the reward.
TRAINED = (
    "no_overlap_groups", "no_overlap_advantage", "positional_alone_advantage",
    "zero_variance_groups", "entropy", "dispersion", "consistency_weight",
)


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
            answered, predictions.strict_iou(answered, sft), predictions.strict_iou(answered, ours))
        tests.append(test["mIoU"])
    return tests


def compare(
        regime: Path, arms: Sequence[str], split: str,
) -> tuple[str, list[tuple[str, str, dict[str, Any]]]]:
    """-> Markdown of one regime on one split, and (arm, seed, test) of the greedy differences."""
    records = load(data_set(regime, split), None, split)
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
    return text + guesses(regime, arms, split, records), tests


def guesses(regime: Path, arms: Sequence[str], split: str, records: Sequence[Record]) -> str:
    """What is scored without seeing the image: by an arm that is shown another, and by a box."""
    text = ""
    for arm in arms:
        rows = rows_of(sorted(regime.iterdir(), key=by_number), arm, f"eval_{split}_blind")
        if any(rows):
            text += line([f"{ARMS[arm]}, without seeing the image", "", key_text(rows, "mIoU"),
                          "-", "-", key_text(rows, "Pr@0.5"), *["-"] * 3])
    seeds = seeds_with(regime, "sft", split)
    if seeds:
        n = read_row(seeds[0] / "sft" / f"eval_{split}")["n"]
        box = metrics.centre_box(list(records)[:n])
        text += line(["a box of the median size in the middle", "", f"{box['mIoU']:.3f}", "-", "-",
                      f"{box['Pr@0.5']:.3f}", *["-"] * 3])
    return text


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

def is_small(record: Record) -> bool:
    """Does the target cover less than 1% of its image?"""
    x1, y1, x2, y2 = record.box
    return (x2 - x1) * (y2 - y1) < 0.01 * record.size[0] * record.size[1]


def contrasts(
        regime: Path, pairs: Sequence[tuple[str, str]], split: str,
) -> tuple[str, list[figure.Bar]]:
    """What one arm has more than another -> Markdown, and the differences in mIoU for the figure.

    Pairs that were not scored are left out."""
    records = load(data_set(regime, split), None, split)
    text = ""
    bars = []
    for arm, other in pairs:
        seeds = seeds_with(regime, arm, split, other)
        if not seeds:
            continue
        n = read_row(seeds[0] / arm / f"eval_{split}")["n"]
        sft, a, b = (read_answers(seeds, name, split, records[:n]) for name in ("sft", arm, other))
        name = f"{ARMS[arm]} minus {ARMS[other]}"
        text += line([name, str(len(seeds)), *contrast_cells(records[:n], sft, a, b)])
        low, high = mean_interval(records[:n], a.iou - b.iou)
        of_seeds = (a.iou - b.iou).mean(1).tolist()
        bars.append(figure.Bar(f"{name}, {split}", low, high, of_seeds))
    head = header(["", "seeds", "mIoU", "Pr@0.5", "box given", "centre distance",
                   "mIoU, target under 1% of the image", "mIoU where SFT's box touched nothing",
                   "centre distance there"])
    return head + text, bars


def mean_interval(records: Sequence[Record], values: np.ndarray) -> list[float]:
    """95% interval over scenes of the mean of values (S, N)."""
    return metrics.intervals(records, {"mean": (values.mean(0), None)})["mean"]


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
            log = list(page.log_lines(seed / arm / "metrics.jsonl"))
            if (seed / arm / "done").exists() and log and "dispersion" in log[0]:
                logs[arm].append(log)
                for key in log[0]:
                    if key.endswith("_group_std"):
                        names.update({key.removesuffix("_group_std"): None, key: None})
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


# ---------------------------------------------------------------- the whole study

def chapter(
        name: str, table: Table, regime: Path,
) -> tuple[str, list[figure.Bar], list[tuple[str, str, str, str, dict[str, Any]]]]:
    """A table in one regime -> Markdown, "" where it was not run; its differences for the figure;
    (regime, split, arm, seed, test) of its arms beside SFT."""
    arms = tuple(arm for arm in ARMS if arm in ("sft", "own", *table.arms))
    text = ""
    bars = []
    tests = []
    for split in SPLITS:
        contrast_table, differences = contrasts(regime, table.contrasts, split)
        if not differences:
            continue
        arm_table, of_arms = compare(regime, arms, split)
        text += (f"### {name}, {regime.name}, {split}\n\n{arm_table}\n{contrast_table}\n"
                 f"{kinds(regime, arms, split)}\n")
        bars += differences
        tests += [(regime.name, split, *test) for test in of_arms]
    if text:
        text += training(regime, arms) + "\n"
    return text, bars, tests


def main() -> None:
    parser = FlagParser("Tables and figure of a study that ablate.sh ran")
    parser.add_argument("study", nargs="?", default="ckpt/study", help="its folder")
    study = Path(parser.parse_args().study)
    check_names(study)
    regimes = [study / name for name in REGIMES if (study / name).is_dir()]
    text = ""
    groups = []
    tests = {}
    for name, table in TABLES.items():
        chapters = ""
        for regime in regimes:
            if regime.name not in TABLE_REGIMES:
                continue
            told, bars, of_arms = chapter(name, table, regime)
            chapters += told
            if bars:
                groups.append(figure.Group(f"{name}, {regime.name}", bars))
            # Tables share arms.
            tests.update({test[:4]: test for test in of_arms})
        if chapters:
            text += f"## {name}\n\n{table.question}\n\n{chapters}"
    told, bars = payoff.chapter(regimes)
    text += told
    if bars:
        groups.append(figure.Group("map: with the positional term minus without", bars))
    (study / "study.md").write_text(text, encoding="utf-8")
    differences = json.dumps(list(tests.values()), indent=1) + "\n"
    (study / "study.json").write_text(differences, encoding="utf-8")
    if groups:
        figure.draw(groups).save(study / "study.png")
    print(text)


if __name__ == "__main__":
    launch(main)
