"""Tables and figure of the study that ablate.py ran.

    python study/study.py ckpt/study

prints Markdown, and writes study.md, study.json (all differences) and study.png there.

Seeds are the unit: another seed has other records, another order and other samples, and arms are
compared within a seed. The t-interval over the seeds' differences is the answer. The interval over
scenes is another thing: a paired bootstrap that holds the trained models fixed, so it says what
other scenes would change, not what another training run would. Next to each difference is the
smallest true one that so many seeds show with a power of 80%.

S seeds, N scenes. Scores are in STUDY/SEED/ARM/eval_SCORE.
"""
import functools
import json
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import reward  # noqa: E402
from data import load  # noqa: E402
from readers.base import Record, read_log  # noqa: E402
from report import metrics  # noqa: E402
from report.predictions import read_predictions, sampled_boxes, strict_boxes  # noqa: E402
from study.ablate import ARMS, SCORES, SPREADS, TABLES, TERMS, Table  # noqa: E402
from toy.scenes import NAMES  # noqa: E402
from train.dist import fail  # noqa: E402
from train.flags import FlagParser  # noqa: E402
from train.run import launch  # noqa: E402

# Quantiles of Student's t with 1, 2, ... 30 degrees of freedom.
T_975 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160,
    2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056,
    2.052, 2.048, 2.045, 2.042)
T_80 = (
    1.376, 1.061, 0.978, 0.941, 0.920, 0.906, 0.896, 0.889, 0.883, 0.879, 0.876, 0.873, 0.870,
    0.868, 0.866, 0.865, 0.863, 0.862, 0.861, 0.860, 0.859, 0.858, 0.858, 0.857, 0.856, 0.856,
    0.855, 0.855, 0.854, 0.854)
THINGS = ((1, 1), (2, 3), (4, 6), (7, 9), (10, 12))    # in a scene, from and to
LEGEND = (
    "Brackets over seeds, and ± after a mean, are 95% t-intervals over seeds. Brackets over scenes "
    "are 95% intervals over scenes of the same trained models. Places: expressions that say where "
    "the object is; names: those that say what it is. pass@k: one of k samples at T=1 hits. "
    "touched: the box overlaps the target. By chance, 5 of 100 intervals exclude a true 0.\n\n")


# ---------------------------------------------------------------- what was scored

@functools.cache
def scored_records(name: str) -> list[Record]:
    """All records of one of SCORES."""
    return list(load(SCORES[name].data, None, SCORES[name].split))


def box_values(records: Sequence[Record], boxes: Tensor) -> dict[str, ndarray]:
    """Boxes (N, 4), NaN for none -> score -> (N,), NaN for records that do not count."""
    overlap = metrics.overlaps(boxes, *metrics.targets(records))
    iou = overlap.iou.numpy()
    hit = (iou > 0.5) * 1.0
    named = np.array([record.kind in NAMES for record in records])
    return {
        "Pr@0.5, places": np.where(named, np.nan, hit),
        "Pr@0.5, names": np.where(named, hit, np.nan),
        "Pr@0.5": hit,
        "mIoU": iou,
        "touched": (iou > 0) * 1.0,
        "no box": ~overlap.valid.numpy() * 1.0,
    }


def medoid(boxes: Tensor) -> Tensor:
    """Samples (N, k, 4), NaN for no box -> of each record the one that overlaps the others most."""
    iou = reward.iou(boxes[:, :, None], boxes[:, None]).nan_to_num(0.0)                # (N, k, k)
    # Without its IoU with itself. A sample without a box is chosen only if there is no other.
    others = iou.sum(2) - iou.diagonal(dim1=1, dim2=2)
    others = others.masked_fill(boxes[..., 0].isnan(), -1.0)
    return boxes[torch.arange(len(boxes)), others.argmax(1)]


@functools.cache
def values(seed: Path, arm: str, name: str) -> dict[str, ndarray]:
    """Score -> (N,), as `box_values`; {} if the arm was not scored. name: one of SCORES.

    If NAME-8 was scored as well: pass@1, pass@8, and the scores of the medoid as "medoid SCORE".
    """
    folder = seed / arm / f"eval_{name}"
    if not (folder / "done").exists():
        return {}
    files = list(folder.glob("predictions_*.jsonl"))
    if len(files) != 1:
        fail(f"{len(files)} files predictions_*.jsonl in {folder}, which needs one; remove "
             f"{folder} and run ablate.sh again")
    by_id = read_predictions(files[0], scored_records(name))
    records = scored_records(name)[:len(by_id)]
    predictions = [by_id.get(record.id) for record in records]
    if not name.endswith("-8"):
        eight = values(seed, arm, f"{name}-8") if f"{name}-8" in SCORES else {}
        return box_values(records, strict_boxes(records, predictions)) | eight
    boxes = sampled_boxes(records, predictions)
    hits = np.stack([box_values(records, sample)["Pr@0.5"] for sample in boxes.unbind(1)])
    best = box_values(records, medoid(boxes))
    return {"pass@1": hits.mean(0), "pass@8": hits.max(0),
            **{f"medoid {score}": value for score, value in best.items()}}


# ---------------------------------------------------------------- statistics

def half_width(seeds: Sequence[float]) -> float:
    """Of the 95% t-interval of the mean; infinite with one seed."""
    n = len(seeds)
    return T_975[n - 2] * statistics.stdev(seeds) / math.sqrt(n) if n > 1 else math.inf


class Effect:
    """A difference between arms. seeds: the mean of each; scenes: the interval over scenes."""

    def __init__(self, seeds: dict[str, float], scenes: Sequence[float]) -> None:
        self.seeds = seeds
        self.scenes = tuple(scenes)
        self.mean = statistics.mean(seeds.values())
        half = half_width(list(seeds.values()))
        self.interval = (self.mean - half, self.mean + half)
        # (t_0.975 + t_0.8) sd / sqrt n, the true effect shown with a power of 80%.
        n = len(seeds)
        self.smallest = half * (1 + T_80[n - 2] / T_975[n - 2]) if n > 1 else math.inf


@functools.cache
def differences(seeds: tuple[Path, ...], arms: tuple[str, ...], name: str) -> dict[str, Effect]:
    """Score -> the first arm minus the second, or a contrast of four (ablate.Table), over the
    seeds in which all of them were scored."""
    found = {seed.name: [values(seed, arm, name) for arm in arms] for seed in seeds}
    found = {seed: of_arms for seed, of_arms in found.items() if all(of_arms)}
    signs = np.array([1, -1, -1, 1])[:len(arms), None]
    rows = {}                                    # score -> (S, N)
    for score in next(iter(found.values()))[0] if found else ():
        if all(score in scores for of_arms in found.values() for scores in of_arms):
            table = np.stack([(signs * [scores[score] for scores in of_arms]).sum(0)
                              for of_arms in found.values()])
            if not np.isnan(table).all():
                rows[score] = table
    rates = {}
    for score, table in rows.items():
        counted = ~np.isnan(table[0])
        rates[score] = np.where(counted, table.mean(0), 0), counted
        n = len(counted)
    drawn = metrics.bootstrap(scored_records(name)[:n], rates) if rates else {}
    return {score: Effect(dict(zip(found, np.nanmean(rows[score], 1).tolist())), scenes)
            for score, (_, scenes) in drawn.items()}


# ---------------------------------------------------------------- tables

def markdown(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(map(str, cells)) + " |\n" for cells in lines) + "\n"


def mean_text(seeds: Sequence[float]) -> str:
    if not seeds:
        return "-"
    half = half_width(seeds)
    return f"{statistics.mean(seeds):.3f}" + (f" ± {half:.3f}" if half < math.inf else "")


def interval_text(interval: Sequence[float]) -> str:
    low, high = interval
    return f"[{low:+.3f}, {high:+.3f}]" if high < math.inf else "-"


def arm_table(
        records: Sequence[Record], scored: Mapping[str, Sequence[Mapping[str, ndarray]]],
        blind: Mapping[str, Sequence[Mapping[str, ndarray]]], metric_names: Sequence[str]) -> str:
    """Markdown: scores of each arm, of eight samples' medoid, and of guesses without the image.

    scored, blind: arm -> the `values` of each seed.
    """
    rows = [(ARMS[arm].title, seeds, "") for arm, seeds in scored.items()]
    # RFT may do no more than sharpen: the medoid of SFT's samples is its control.
    rows += [(f"{ARMS[arm].title}, medoid of eight samples", seeds, "medoid ")
             for arm, seeds in scored.items()
             if ARMS[arm].command.startswith("sft.py") and "medoid mIoU" in seeds[0]]
    rows += [(f"{ARMS[arm].title}, without the image", seeds, "") for arm, seeds in blind.items()]
    lines = []
    for title, seeds, prefix in rows:
        cells = []
        for metric in metric_names:
            known = [seed[prefix + metric] for seed in seeds if prefix + metric in seed]
            cells.append(mean_text([np.nanmean(v).item() for v in known if not np.isnan(v).all()]))
        lines.append([title, len(seeds), *cells])
    centre = metrics.centre_box(records)
    lines.append(["a box of the median size in the middle", "",
                  *(f"{centre[m]:.3f}" if m in centre else "-" for m in metric_names)])
    return markdown([f"{len(records):,} scenes", "seeds", *metric_names], lines)


def part_table(
        records: Sequence[Record], scored: Mapping[str, Sequence[Mapping[str, ndarray]]]) -> str:
    """Markdown: Pr@0.5 by kind of expression, and errors by the number of things in a scene."""
    kinds = np.array([record.kind for record in records])
    things = np.array([len(record.image.objects) for record in records])
    of_kinds = {kind: kinds == kind for kind in sorted(set(kinds))}
    of_things = {f"{low} to {high} things": (things >= low) & (things <= high)
                 for low, high in THINGS if ((things >= low) & (things <= high)).any()}
    text = ""
    for what, parts in (("Pr@0.5", of_kinds), ("errors", of_things)):
        rows = []
        for arm, seeds in scored.items():
            right = [seed["Pr@0.5"] for seed in seeds]
            shown = [1 - hit for hit in right] if what == "errors" else right
            cells = [mean_text([v[part].mean().item() for v in shown]) for part in parts.values()]
            rows.append([ARMS[arm].title, *cells])
        if len(parts) > 1:
            text += markdown([what, *parts], rows)
    return text


def curve_points(seeds: tuple[Path, ...], score: str) -> dict[str, list[tuple[float, Effect]]]:
    """Term -> for each spread: share of groups in which all answers miss, effect of the term."""
    points: dict[str, list[tuple[float, Effect]]] = {}
    for spread in SPREADS:
        without = f"coarse-{spread}-iou"
        logs = [read_log(seed / without / "metrics.jsonl") for seed in seeds]
        missing = [step["no_overlap_groups"] for log in logs for step in log]
        for term in TERMS:
            effects = differences(seeds, (f"coarse-{spread}-{term}", without), "tiny")
            if term != "iou" and effects and missing:
                points.setdefault(term, []).append((statistics.mean(missing), effects[score]))
    return points


def curve_table(seeds: tuple[Path, ...]) -> str:
    """Markdown: what each term adds, by the share of groups in which all answers miss."""
    text = ""
    for score in TABLES["curve"].metrics:
        rows = []
        for term, points in curve_points(seeds, score).items():
            for share, effect in points:
                rows.append([f"{TERMS[term][0]} minus IoU", f"{share:.3f}", len(effect.seeds),
                             f"{effect.mean:+.3f}", interval_text(effect.interval)])
        text += markdown(["", "groups that all miss", "seeds", score, "over seeds"], rows)
    return text


def deviation_at_equal(
        logs: Mapping[str, Sequence[Mapping[str, float]]], key: str) -> dict[str, float]:
    """Arm -> mean deviation within groups over the steps with a mean in the arms' common range."""
    low = max(min(step[key] for step in log) for log in logs.values())
    high = min(max(step[key] for step in log) for log in logs.values())
    found = {}
    for arm, log in logs.items():
        inside = [step[f"{key}_group_std"] for step in log if low <= step[key] <= high]
        if inside:
            found[arm] = statistics.mean(inside)
    return found


def deviation_table(seeds: tuple[Path, ...]) -> str:
    """Markdown: do rewards scatter less within groups, among steps of equal mean reward?

    Rewards are compared between arms with the same terms, IoU between all.
    """
    found: dict[str, dict[str, list[float]]] = {}          # arm -> key -> value of each seed
    for seed in seeds:
        same_terms: dict[tuple, dict[str, Any]] = {}
        for arm in TABLES["weights"].arms:
            log = read_log(seed / arm / "metrics.jsonl")
            terms = tuple(key for key in (log[0] if log else ()) if key.endswith("_group_std"))
            if terms:
                same_terms.setdefault(terms, {})[arm] = log
        everyone = {arm: log for group in same_terms.values() for arm, log in group.items()}
        compared = [("reward", group) for group in same_terms.values()]
        for key, group in [*compared, ("iou", everyone)] if everyone else ():
            for arm, deviation in deviation_at_equal(group, key).items():
                found.setdefault(arm, {}).setdefault(key, []).append(deviation)
    rows = [[ARMS[arm].title, mean_text(row.get("reward", ())), mean_text(row.get("iou", ()))]
            for arm, row in found.items()]
    return markdown(["deviation within groups", "reward, at equal mean reward",
                     "IoU, at equal mean IoU"], rows)


def chapter(
        name: str, table: Table, seeds: tuple[Path, ...],
) -> tuple[str, dict[str, list[tuple[str, Effect]]], list[dict[str, Any]]]:
    """A table's Markdown, "" without a difference; score -> bars of the primary figure; all
    differences."""
    text = ""
    bars: dict[str, list[tuple[str, Effect]]] = {}
    found = []
    seeds = tuple(seed for seed in seeds if int(seed.name) < table.seeds)
    for score in table.scores:
        def read(which: str) -> dict[str, list[dict[str, ndarray]]]:
            of_arms = {arm: [values(seed, arm, which) for seed in seeds]
                       for arm in ARMS if arm in (*table.arms, "own")}
            return {arm: list(filter(None, rows)) for arm, rows in of_arms.items() if any(rows)}

        scored = read(score)
        if not scored or score.endswith("-8"):
            continue
        counts = {len(v) for rows in scored.values() for row in rows for v in row.values()}
        if len(counts) > 1:
            fail(f"{name}, {score}: scores of {' and '.join(map(str, sorted(counts)))} scenes "
                 "cannot be compared; run ablate.sh with one TEST")
        effects = {pair: differences(seeds, pair, score) for pair in table.contrasts}
        if not any(effects.values()):
            continue
        records = scored_records(score)[:counts.pop()]
        blind = read(f"{score}-blind") if f"{score}-blind" in SCORES else {}
        rows = []
        known = {metric for rows_of in scored.values() for row in rows_of for metric in row}
        metric_names = [metric for metric in table.metrics if metric in known]
        for metric in metric_names:
            for pair, by_metric in effects.items():
                if metric not in by_metric:
                    continue
                effect = by_metric[metric]
                titles = [ARMS[arm].title for arm in pair]
                title = " minus ".join(titles[:2])
                if len(pair) > 2:
                    title = f"({title}) minus ({' minus '.join(titles[2:])})"
                several = len(effect.seeds) > 1
                rows.append([
                    metric, title, f"{effect.mean:+.3f}", interval_text(effect.interval),
                    ", ".join(f"{v:+.3f}" for v in effect.seeds.values()),
                    interval_text(effect.scenes), f"{effect.smallest:.3f}" if several else "-"])
                found.append({
                    "table": name, "score": score, "metric": metric, "contrast": pair,
                    "mean": effect.mean, "over_seeds": effect.interval if several else None,
                    "seeds": effect.seeds, "over_scenes": effect.scenes,
                    "smallest": effect.smallest if several else None})
                if metric == table.metrics[0]:
                    bars.setdefault(f"{name}, {score}: {metric}", []).append((title, effect))
        head = ["", "difference", "mean", "over seeds", "each seed", "over scenes",
                "smallest effect shown"]
        text += (f"### {name}, {score}\n\n{arm_table(records, scored, blind, metric_names)}"
                 f"{markdown(head, rows)}{part_table(records, scored)}")
    if text:
        text = f"## {name}\n\n{table.question}\n\n{text}"
        text += {"curve": curve_table, "weights": deviation_table}.get(name, lambda _: "")(seeds)
    return text, bars, found


# ---------------------------------------------------------------- the figure

def draw(
        groups: Sequence[tuple[str, Sequence[tuple[str, Effect]]]],
        curve: Mapping[str, Sequence[tuple[float, Effect]]], path: Path) -> None:
    """Groups of effects under titles, and the curve, in gray for black print."""
    try:
        import matplotlib
    except ImportError:
        print("no figure: matplotlib is not installed; pip install matplotlib")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot
    heights = [len(bars) + 1 for _, bars in groups] + [14] * bool(curve)
    figure, axes = pyplot.subplots(
        len(heights), squeeze=False, height_ratios=heights, layout="constrained",
        figsize=(11, 0.3 * sum(heights) + 1.6))
    figure.suptitle("Dots: means, hollow if the thick line holds 0. Thick lines, and those of the "
                    "curve: 95% over seeds.\nThin lines: 95% over scenes of the same models. "
                    "Ticks: seeds.", fontsize=10)
    for axis, (title, bars) in zip(axes[:, 0], groups):
        axis.set_title(title, loc="left", weight="bold", fontsize=10)
        axis.grid(axis="x", color="#cccccc")
        axis.axvline(0, color="black")
        for y, (_, effect) in enumerate(bars):
            if len(effect.seeds) > 1:
                axis.plot(effect.interval, [y, y], color="#aaaaaa", linewidth=6)
            axis.plot(effect.scenes, [y, y], color="black", linewidth=1)
            axis.plot(list(effect.seeds.values()), [y] * len(effect.seeds), "|", color="#444444",
                      markersize=10)
            fill = "white" if effect.interval[0] <= 0 <= effect.interval[1] else "black"
            axis.plot(effect.mean, y, "o", color="black", markerfacecolor=fill)
        axis.set_yticks(range(len(bars)), [label for label, _ in bars])
        axis.set_ylim(len(bars) - 0.5, -0.5)
    if curve:
        axis = axes[-1, 0]
        axis.set_title(f"curve: {TABLES['curve'].metrics[0]}, minus IoU and format alone",
                       loc="left", weight="bold", fontsize=10)
        axis.axhline(0, color="black")
        for i, (term, points) in enumerate(curve.items()):
            shares, effects = zip(*points)
            errors = [effect.mean - effect.interval[0] for effect in effects]
            # Terms are drawn side by side, so that their intervals can be told apart.
            axis.errorbar(
                [share + 0.006 * i for share in shares], [effect.mean for effect in effects],
                [error if error < math.inf else 0 for error in errors], marker="os^vDP"[i],
                color=("black", "#888888")[i % 2], capsize=3, label=TERMS[term][0])
        axis.set_xlabel("share of groups in which all answers miss")
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main() -> None:
    parser = FlagParser(description="Tables and figure of a study that ablate.sh ran")
    parser.add_argument("study", nargs="?", default="ckpt/study", help="its folder")
    study = Path(parser.parse_args().study)
    done = study.glob("[0-9]/*/eval_*/done")
    seeds = tuple(sorted({file.parents[2] for file in done}))
    if not seeds:
        fail(f"no scores in {study}; run ablate.sh first")
    text = LEGEND
    groups: list[tuple[str, list[tuple[str, Effect]]]] = []
    found = []
    for name, table in TABLES.items():
        chapter_text, bars, differences_of_table = chapter(name, table, seeds)
        text += chapter_text
        found += differences_of_table
        # The curve has a drawing of its own.
        groups += bars.items() if name != "curve" else ()
    (study / "study.md").write_text(text, encoding="utf-8")
    (study / "study.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    curve = curve_points(seeds, TABLES["curve"].metrics[0])
    if groups or curve:
        draw(groups, curve, study / "study.png")
    print(text)


if __name__ == "__main__":
    launch(main)
