"""Tables and figure of the study that ablate.py ran.

    python study/study.py ckpt/study

prints Markdown, and writes study.md, study.json (the differences from SFT) and study.png there.

Differences are paired: both models answered the same scenes, and a 95% interval resamples those
scenes together. Each seed has its own SFT model; the standard deviation after a mean is over
seeds. What a term adds is the difference between two arms that started from the same SFT models,
over all seeds at once. By chance, 5 of 100 such intervals exclude 0. All seeds share toy/base and
the SFT records; a seed sets the order of the data and the sampling.

S seeds, N scenes. Scores are in STUDY/REGIME/SEED/ARM/eval_SPLIT.
"""
import json
import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import reward  # noqa: E402
from data import load  # noqa: E402
from qwen.hub import by_number  # noqa: E402
from readers.base import Record, read_json, read_log  # noqa: E402
from report import metrics  # noqa: E402
from report.predictions import read_predictions, strict_boxes  # noqa: E402
from rft import advantages  # noqa: E402
from study.ablate import ARMS, REGIMES, TABLES, Table  # noqa: E402
from train.dist import fail  # noqa: E402
from train.flags import FlagParser  # noqa: E402
from train.run import launch  # noqa: E402

# `test` is in earlier studies; `novel` is the unfamiliar part of the full-sized world.
SPLITS = ("final", "test", "novel")
# Keys of metrics.jsonl that are tabulated with the terms of the reward.
TRAINED = (
    "no_overlap_groups", "no_overlap_advantage", "positional_alone_advantage",
    "zero_variance_groups", "entropy", "dispersion", "consistency_weight")
MISSES = ("near", "another thing", "elsewhere", "no box")
KERNEL = 1.25                  # deviation of the positional kernel, in sides of the true box
# A box is near within this many deviations, at which the kernel has 13% of its peak.
NEAR = 2


# ---------------------------------------------------------------- what was scored

def read_row(folder: Path) -> dict[str, Any] | None:
    """The row of a folder of scores, None if it was not scored."""
    content = read_json(folder / "eval.json")
    if content is None:
        return None
    try:
        return content["rows"][0]
    except (KeyError, IndexError, TypeError):
        fail(f"{folder / 'eval.json'} has no row of scores; remove {folder} and run ablate.sh "
             "again")


def seeds_with(regime: Path, split: str, *arms: str) -> list[Path]:
    """Folders of the seeds in which all these arms were scored, on equally many scenes."""
    seeds = []
    counts = set()
    for seed in sorted(regime.iterdir(), key=by_number):
        rows = [read_row(seed / arm / f"eval_{split}") for arm in arms]
        if all(rows):
            seeds.append(seed)
            counts.update(row["n"] for row in rows)
    if len(counts) > 1:
        fail(f"{regime}: scores of {' and '.join(map(str, sorted(counts)))} scenes cannot be "
             "compared; put each into a study of its own")
    return seeds


def scored_records(regime: Path, split: str, seeds: Sequence[Path]) -> list[Record]:
    """The N scenes that all arms of these seeds were scored on."""
    data = "synth" if split == "novel" else REGIMES[regime.name].data
    n = read_row(seeds[0] / "sft" / f"eval_{split}")["n"]
    return list(load(data, None, split))[:n]


class Answers(NamedTuple):
    """An arm's answers, each (S, N) unless noted."""

    boxes: np.ndarray          # (S, N, 4), NaN without a box
    has_box: np.ndarray
    iou: np.ndarray
    distance: np.ndarray       # of the centre from the target's, in image sides; 0 without a box


def read_answers(
        seeds: Sequence[Path], arm: str, split: str, records: Sequence[Record],
) -> Answers:
    answers = []
    for seed in seeds:
        folder = seed / arm / f"eval_{split}"
        files = list(folder.glob("predictions_*.jsonl"))
        if len(files) != 1:
            fail(f"{len(files)} files predictions_*.jsonl in {folder}, which needs one; remove "
                 f"{folder} and run ablate.sh again")
        by_id = read_predictions(files[0], records)
        boxes = strict_boxes(records, [by_id.get(record.id) for record in records])
        overlap = metrics.overlaps(boxes, *metrics.targets(records))
        distance = overlap.distance.where(overlap.valid, 0.0)
        answers.append([v.numpy() for v in (boxes, overlap.valid, overlap.iou, distance)])
    return Answers(*map(np.stack, zip(*answers)))


# ---------------------------------------------------------------- cells

class Effect(NamedTuple):
    mean: float
    low: float                 # its 95% interval over scenes
    high: float
    seeds: list[float]         # the mean of each seed

    def __str__(self) -> str:
        text = f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"
        return text + (f" ± {statistics.stdev(self.seeds):.3f}" if len(self.seeds) > 1 else "")


def effects(
        records: Sequence[Record], columns: Sequence[tuple[np.ndarray, np.ndarray]],
) -> list[Effect | str]:
    """(values, which of them count), both (S, N) -> an Effect each, "-" if none counts."""
    sums = {}
    for i, (values, counted) in enumerate(columns):
        if counted.any():
            sums[i] = (np.where(counted, values, 0).sum(0), counted.sum(0))
    drawn = metrics.bootstrap(records, sums)
    found: list[Effect | str] = ["-"] * len(columns)
    for i in sums:
        values, counted = columns[i]
        seeds = [v[c].mean().item() for v, c in zip(values, counted) if c.any()]
        found[i] = Effect(values[counted].mean().item(), *drawn[i][1], seeds)
    return found


def mean_text(values: Sequence[float | None]) -> str:
    """Mean ± standard deviation over seeds; "-" without a value."""
    known = [v for v in values if v is not None]
    if not known:
        return "-"
    deviation = f" ± {statistics.stdev(known):.3f}" if len(known) > 1 else ""
    return f"{statistics.mean(known):.3f}{deviation}"


def markdown(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(map(str, cells)) + " |\n" for cells in lines) + "\n"


# ---------------------------------------------------------------- the four tables

def arm_table(
        regime: Path, arms: Sequence[str], split: str,
) -> tuple[str, list[tuple[str, str, dict[str, Any]]]]:
    """Markdown: scores of each arm and of two guesses; (arm, seed, paired test against SFT)."""
    rows: list[list[object]] = []
    guesses: list[list[object]] = []
    tests = []

    def scores(seeds: Sequence[Path], arm: str, suffix: str, key: str) -> str:
        read = [read_row(seed / arm / f"eval_{split}{suffix}") for seed in seeds]
        return mean_text([row and row[key] for row in read])

    for arm in arms:
        seeds = seeds_with(regime, split, arm, "sft")
        if not seeds:
            continue
        cells = []
        differences = []
        if arm != "sft":
            records = scored_records(regime, split, seeds)
            ours, sft = (read_answers(seeds, name, split, records).iou for name in (arm, "sft"))
            for seed, a, b in zip(seeds, sft, ours):
                test = metrics.paired(records, torch.tensor(a), torch.tensor(b))["mIoU"]
                tests.append((arm, seed.name, test))
                differences.append(test["difference"])
                low, high = test["ci"]
                cells.append(f"{test['difference']:+.3f} [{low:+.3f}, {high:+.3f}]")
        failed = [read_row(seed / arm / f"eval_{split}") for seed in seeds]
        rows.append([
            ARMS[arm].title, " ".join(seed.name for seed in seeds), scores(seeds, arm, "", "mIoU"),
            "; ".join(cells) or "-", mean_text(differences), scores(seeds, arm, "", "Pr@0.5"),
            scores(seeds, arm, "", "cIoU"), scores(seeds, arm, "_T1", "mIoU"),
            mean_text([sum(row["failures"].values()) / row["n"] for row in failed])])
        for temperature in ("0.8", "0.6") if arm == "sft" else ():
            cooler = scores(seeds, arm, f"_T{temperature}", "mIoU")
            if cooler != "-":
                rows.append([f"SFT sampled at T={temperature}", "", cooler, *["-"] * 6])
        blind = scores(seeds, arm, "_blind", "mIoU")
        if blind != "-":
            guesses.append([f"{ARMS[arm].title}, without seeing the image", "", blind, "-", "-",
                            scores(seeds, arm, "_blind", "Pr@0.5"), *["-"] * 3])
    seeds = seeds_with(regime, split, "sft")
    if seeds:
        box = metrics.centre_box(scored_records(regime, split, seeds))
        guesses.append(["a box of the median size in the middle", "", f"{box['mIoU']:.3f}", "-",
                        "-", f"{box['Pr@0.5']:.3f}", *["-"] * 3])
    head = ["", "seeds", "mIoU greedy", "minus SFT, seed by seed [95%]", "mean", "Pr@0.5", "cIoU",
            "mIoU T=1", "no box"]
    return markdown(head, rows + guesses), tests


def contrast_table(
        regime: Path, pairs: Sequence[tuple[str, str]], split: str,
) -> tuple[str, list[tuple[str, Effect]]]:
    """Markdown: one arm minus another; the differences in mIoU for the figure."""
    rows: list[list[object]] = []
    bars = []
    for arm, other in pairs:
        seeds = seeds_with(regime, split, arm, other, "sft")
        if not seeds:
            continue
        records = scored_records(regime, split, seeds)
        a, b, sft = (read_answers(seeds, name, split, records) for name in (arm, other, "sft"))
        everywhere = np.ones_like(sft.has_box)
        both = a.has_box & b.has_box
        target, size = metrics.targets(records)
        area = (target[:, 2:] - target[:, :2]).prod(1) / size.prod(1)
        small = everywhere & (area < 0.01).numpy()
        missed = sft.has_box & (sft.iou == 0)
        iou = a.iou - b.iou
        distance = a.distance - b.distance
        hits = (a.iou > 0.5) * 1.0 - (b.iou > 0.5)
        found = effects(records, [
            (iou, everywhere), (hits, everywhere), (a.has_box * 1.0 - b.has_box, everywhere),
            (distance, both), (iou, small), (iou, missed), (distance, missed & both)])
        title = f"{ARMS[arm].title} minus {ARMS[other].title}"
        rows.append([title, len(seeds), *found])
        bars.append((f"{title}, {split}", found[0]))
    head = ["", "seeds", "mIoU", "Pr@0.5", "box given", "centre distance",
            "mIoU, target under 1% of the image", "mIoU where SFT's box touched nothing",
            "centre distance there"]
    return markdown(head, rows), bars


def kind_table(regime: Path, arms: Sequence[str], split: str) -> str:
    """Markdown: mIoU by kind of expression, mean over seeds."""
    scores = {}
    for arm in arms:
        rows = [read_row(seed / arm / f"eval_{split}") for seed in seeds_with(regime, split, arm)]
        if rows:
            scores[arm] = [row["breakdowns"]["kind"] for row in rows]
    names = sorted({name for kinds in scores.values() for kind in kinds for name in kind})
    rows = []
    for arm, kinds in scores.items():
        cells = [ARMS[arm].title]
        for name in names:
            cells.append(mean_text([kind[name]["mIoU"] for kind in kinds]))
        rows.append(cells)
    return markdown(["mIoU by kind", *names], rows)


def training_table(regime: Path, arms: Sequence[str]) -> str:
    """Markdown: means over the first and the last tenth of the steps, over seeds.

    Every term of the reward has its mean and its standard deviation within a group; "-" if an arm
    does not log it.
    """
    logs: dict[str, list[list[dict[str, Any]]]] = {}
    terms: dict[str, None] = {}
    for arm in arms:
        for seed in sorted(regime.iterdir(), key=by_number):
            log = read_log(seed / arm / "metrics.jsonl")
            if (seed / arm / "done").exists() and log and "dispersion" in log[0]:
                logs.setdefault(arm, []).append(log)
                for key in log[0]:
                    if key.endswith("_group_std"):
                        terms.update({key.removesuffix("_group_std"): None, key: None})
    rows = []
    for arm, seeds in logs.items():
        cells = [ARMS[arm].title]
        for key in (*terms, *TRAINED):
            if any(key not in step for log in seeds for step in log):
                cells.append("-")
                continue
            ends = []
            for log in seeds:
                tenth = max(1, len(log) // 10)
                values = [step[key] for step in log]
                ends.append([np.mean(values[:tenth]), np.mean(values[-tenth:])])
            cells.append("{:.3f} → {:.3f}".format(*np.mean(ends, 0)))
        rows.append(cells)
    return markdown(["first → last tenth of the steps", *terms, *TRAINED], rows)


# ---------------------------------------------------------------- the map

def kind_of_miss(record: Record, box: Sequence[float] | None) -> str | None:
    """One of MISSES, None for an IoU above 0.5.

    another thing: the box overlaps another object more than the target. near: its centre lies
    within NEAR deviations of the positional kernel.
    """
    if box is None:
        return "no box"
    answered = torch.tensor(box, dtype=torch.float64)
    target = torch.tensor(record.box, dtype=torch.float64)
    iou = reward.iou(answered, target).item()
    if iou > 0.5:
        return None
    for thing in record.image.objects:
        other = torch.tensor(thing.box, dtype=torch.float64)
        if tuple(thing.box) != tuple(record.box) and reward.iou(answered, other).item() > iou:
            return "another thing"
    side = target[2:] - target[:2]
    away = (answered[2:] + answered[:2] - target[2:] - target[:2]) / 2 / (KERNEL * side)
    return "near" if away.norm().item() <= NEAR else "elsewhere"


def positional_share(rewards: dict[str, Tensor], weights: dict[str, float], divide: bool) -> float:
    """Share of the update that the positional term causes: sum |A - A without it| / sum |A|.

    rewards: term -> (Q, G); divide: whether advantages are divided by their group's deviation.
    """
    total = sum(weights[name] * value for name, value in rewards.items())
    rest = sum(weights[name] * value for name, value in rewards.items() if name != "positional")
    advantage = advantages(total, divide)
    changed = (advantage - advantages(rest, divide)).abs().sum()
    return (changed / advantage.abs().sum().clamp(min=1e-12)).item()


def logged_share(arm: Path) -> float | None:
    """`positional_share` of a whole run, None if it logged no rollouts."""
    lines = read_log(arm / "rollouts.jsonl")
    run = read_json(arm / "latest" / "run.json")
    if not lines or not run:
        return None
    weights = {name: weight for name, weight in run["flags"]["reward"].items() if weight}
    rewards = {}
    for name in weights:
        rewards[name] = torch.tensor([line[name] for line in lines])
    return positional_share(rewards, weights, not run["flags"]["no_std"])


def map_row(regime: Path, split: str, seeds: Sequence[Path]) -> tuple[list[object], Effect]:
    """A regime's row of the map, and the effect of the positional term on mIoU."""
    records = scored_records(regime, split, seeds)
    sft, without, with_term = (
        read_answers(seeds, arm, split, records) for arm in ("sft", "iou", "positional"))
    misses: Counter = Counter()
    for boxes in sft.boxes.tolist():
        for record, box in zip(records, boxes):
            misses[kind_of_miss(record, None if box[0] != box[0] else box)] += 1
    logs = [read_log(seed / "positional" / "metrics.jsonl") for seed in seeds]

    def logged_mean(key: str) -> str:
        means = []
        for log in logs:
            values = [step[key] for step in log if key in step]
            if values:
                means.append(sum(values) / len(values))
        return mean_text(means)

    # Side of a box (root of its area) over the target's, as a logarithm, if the box touches it:
    # the mean of the kernel within a box favours boxes a little smaller than the target.
    target, _ = metrics.targets(records)
    area = (target[:, 2:] - target[:, :2]).prod(1).numpy()
    sides = []
    for answers in (without, with_term):
        with np.errstate(invalid="ignore", divide="ignore"):
            ratio = (answers.boxes[..., 2:] - answers.boxes[..., :2]).prod(-1) / area
            sides.append(np.where(answers.iou > 0, np.log(ratio) / 2, np.nan))
    change = sides[1] - sides[0]
    gain = with_term.iou - without.iou
    effect, ratio = effects(records, [
        (gain, np.ones_like(gain, bool)), (change, ~np.isnan(change))])
    medians = [f"{np.exp(np.nanmedian(side)):.3f}" if np.isfinite(side).any() else "-"
               for side in sides]
    if isinstance(ratio, Effect):
        low, high = np.exp(ratio.low), np.exp(ratio.high)
        ratio = f"x {np.exp(ratio.mean):.3f} [{low:.3f}, {high:.3f}]"
    return [
        f"{regime.name}: {REGIMES[regime.name].title}", len(seeds), mean_text(sft.iou.mean(1)),
        " / ".join(f"{misses[kind] / misses.total():.2f}" for kind in MISSES),
        logged_mean("no_overlap_groups"),
        mean_text([logged_share(seed / "positional") for seed in seeds]),
        logged_mean("positional_alone_advantage"), effect, *medians, ratio,
        f"{metrics.centre_box(records)['mIoU']:.3f}"], effect


def map_chapter(regimes: Sequence[Path]) -> tuple[str, list[tuple[str, Effect]]]:
    """Markdown: a table of the regimes for each split, "" if none was run; bars of the figure."""
    text = ""
    bars = []
    for split in SPLITS[:-1]:
        rows = []
        for regime in regimes:
            if regime.name in TABLES["map"].regimes:
                seeds = seeds_with(regime, split, "positional", "iou", "sft")
                if seeds:
                    row, effect = map_row(regime, split, seeds)
                    rows.append(row)
                    bars.append((f"{row[0]}, {split}", effect))
        if rows:
            text += f"### map, {split}\n\n" + markdown([
                "regime", "seeds", "SFT's mIoU", f"SFT's misses: {', '.join(MISSES)}",
                "groups without overlap", "share of the update due to the term",
                "in groups that only it tells apart", "mIoU, with the term minus without",
                "side over the target's, without", "with", "with over without",
                "centre box's mIoU"], rows)
    return f"## map\n\n{TABLES['map'].question}\n\n{text}" if text else "", bars


# ---------------------------------------------------------------- the whole study

def chapter(
        name: str, table: Table, regime: Path,
) -> tuple[str, list[tuple[str, Effect]], dict[tuple, dict[str, Any]]]:
    """A table in one regime: Markdown ("" if it was not run), bars of the figure, tests by
    (regime, split, arm, seed)."""
    arms = [arm for arm in ARMS if arm in ("sft", "own", *table.arms)]
    text = ""
    bars = []
    tests = {}
    for split in SPLITS:
        contrasts, effects_of_split = contrast_table(regime, table.contrasts, split)
        if effects_of_split:
            scores, tests_of_split = arm_table(regime, arms, split)
            text += (f"### {name}, {regime.name}, {split}\n\n{scores}{contrasts}"
                     f"{kind_table(regime, arms, split)}")
            bars += effects_of_split
            for arm, seed, test in tests_of_split:
                tests[regime.name, split, arm, seed] = test
    return text + training_table(regime, arms) if text else "", bars, tests


def draw(groups: Sequence[tuple[str, Sequence[tuple[str, Effect]]]], path: Path) -> None:
    """Effects with their intervals, in groups under titles, over one axis, for black print."""
    try:
        import matplotlib
    except ImportError:
        print("no figure: matplotlib is not installed; pip install matplotlib")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot
    heights = [len(bars) + 1 for _, bars in groups]
    figure, axes = pyplot.subplots(
        len(groups), squeeze=False, sharex=True, height_ratios=heights, layout="constrained",
        figsize=(10, 0.3 * sum(heights) + 1.2))
    for axis, (title, bars) in zip(axes[:, 0], groups):
        axis.set_title(title, loc="left", weight="bold", fontsize=10)
        axis.grid(axis="x", color="#cccccc")
        axis.axvline(0, color="black")
        for y, (_, effect) in enumerate(bars):
            axis.plot([effect.low, effect.high], [y, y], color="black")
            axis.plot(effect.seeds, [y] * len(effect.seeds), "|", color="#555555", markersize=10)
            fill = "white" if effect.low <= 0 <= effect.high else "black"
            axis.plot(effect.mean, y, "o", color="black", markerfacecolor=fill)
        axis.set_yticks(range(len(bars)), [label for label, _ in bars])
        axis.set_ylim(len(bars) - 0.5, -0.5)
    axes[-1, 0].set_xlabel("difference in mIoU (0 to 1), 95% interval over scenes\n"
                           "small lines: seeds; hollow: the interval holds 0")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main() -> None:
    parser = FlagParser(description="Tables and figure of a study that ablate.sh ran")
    parser.add_argument("study", nargs="?", default="ckpt/study", help="its folder")
    study = Path(parser.parse_args().study)
    scores = sorted(study.glob("*/*/*/eval_*/eval.json"))
    if not scores:
        fail(f"no scores in {study}; run ablate.sh first")
    for file in scores:
        regime, _, arm = file.relative_to(study).parts[:3]
        for kind, name, known in (("regime", regime, REGIMES), ("arm", arm, ARMS)):
            if name not in known:
                fail(f"{file.parents[1]}: no {kind} {name}; there are {', '.join(known)}")
    regimes = [study / name for name in REGIMES if (study / name).is_dir()]
    text = ""
    groups = []
    tests: dict[tuple, dict[str, Any]] = {}
    for name, table in TABLES.items():
        chapters = ""
        for regime in regimes:
            if regime.name in ("tiny", "little", "wide") and table.contrasts:
                chapter_text, bars, more = chapter(name, table, regime)
                chapters += chapter_text
                groups.append((f"{name}, {regime.name}", bars))
                tests |= more          # tables share arms
        if chapters:
            text += f"## {name}\n\n{table.question}\n\n{chapters}"
    map_text, bars = map_chapter(regimes)
    text += map_text
    groups.append(("map: with the positional term minus without", bars))
    (study / "study.md").write_text(text, encoding="utf-8")
    differences = [[*key, test] for key, test in tests.items()]
    (study / "study.json").write_text(json.dumps(differences, indent=1) + "\n", encoding="utf-8")
    groups = [group for group in groups if group[1]]
    if groups:
        draw(groups, study / "study.png")
    print(text)


if __name__ == "__main__":
    launch(main)
