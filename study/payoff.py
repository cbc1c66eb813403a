"""The map: in which regimes does the positional term pay?

Its kernel's deviation is 1.25 sides of the true box, so it can tell near misses apart, not a wrong
choice from another. A row a regime: how SFT's answers miss, how many groups have no overlap, what
share of the update the term carries, what it changes beside IoU and format, and how large boxes
come out, for the mean of the kernel within a box favours boxes a little smaller than the target.

Records are N, seeds S, questions Q of G rollouts.
"""
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import reward
import rft
from data import load
from readers.base import Record
from report import metrics, page
from report import predictions as answers
from study import figure
from study.scores import (
    SPLITS,
    data_set,
    deviation_text,
    header,
    line,
    mean_text,
    predictions_of,
    read_row,
    seeds_with,
)

WITH = "positional"            # the arms that differ in the term alone
WITHOUT = "iou"
# What the regimes are, in the order of the map.
MAP = {
    "choice": "many things, full-sized", "small": "many things, half as long",
    "one": "one thing alone", "tiny": "one thing alone, tiny",
    "one-coarse": "one thing alone, SFT on boxes beside it"}
KERNEL = 1.25                  # deviations of the kernel, in sides of the true box
# Within so many deviations the kernel still tells positions apart: there it has 13% of its peak.
NEAR = 2
HIT = 0.5                      # IoU above which an answer is no miss
MISSES = ("near", "another thing", "elsewhere", "no box")


# ---------------------------------------------------------------- how answers miss

def kind_of_miss(record: Record, box: Sequence[float] | None) -> str | None:
    """One of MISSES, None for a hit.

    another thing: the box overlaps another thing of the scene more than the target. near: its
    centre lies within NEAR deviations of the kernel.
    """
    if box is None:
        return "no box"
    answered = torch.tensor(box, dtype=torch.float64)
    target = torch.tensor(record.box, dtype=torch.float64)
    iou = reward.iou(answered, target).item()
    if iou > HIT:
        return None
    others = [o.box for o in record.image.objects if tuple(o.box) != tuple(record.box)]
    if others:
        overlap = reward.iou(answered, torch.tensor(others, dtype=torch.float64)).max().item()
        if overlap > iou:
            return "another thing"
    side = target[2:] - target[:2]
    away = (answered[2:] + answered[:2] - target[2:] - target[:2]) / 2 / (KERNEL * side)
    return "near" if away.norm().item() <= NEAR else "elsewhere"


def miss_text(seeds: Sequence[Path], split: str, records: Sequence[Record]) -> str:
    """Shares of all SFT's answers that miss in each way, over all seeds."""
    counts = Counter()
    for seed in seeds:
        for record, box in zip(records, boxes_of(seed, "sft", split, records).tolist()):
            counts[kind_of_miss(record, None if np.isnan(box[0]) else box)] += 1
    return " / ".join(f"{counts[kind] / counts.total():.2f}" for kind in MISSES)


def boxes_of(seed: Path, arm: str, split: str, records: Sequence[Record]) -> Tensor:
    """An arm's boxes (N, 4), NaN where there is none."""
    predictions = predictions_of(seed / arm / f"eval_{split}", records)
    return answers.strict_boxes(records, predictions)


# ---------------------------------------------------------------- what the term does in training

def positional_share(rewards: dict[str, Tensor], weights: dict[str, float], divide: bool) -> float:
    """The share of the update that the term carries: sum |A - A without it| over sum |A|.

    rewards: term -> (Q, G); divide: advantages are divided by their group's deviation."""
    total = sum(weights[name] * value for name, value in rewards.items())
    rest = sum(weights[name] * value for name, value in rewards.items() if name != WITH)
    advantage = rft.advantages(total, divide)
    changed = (advantage - rft.advantages(rest, divide)).abs().sum()
    return (changed / advantage.abs().sum().clamp(min=1e-12)).item()


def update_share(arm: Path) -> float | None:
    """`positional_share` of a whole run, from its rollouts; None where none are logged."""
    lines = list(page.log_lines(arm / "rollouts.jsonl"))
    run = arm / "latest" / "run.json"
    if not lines or not run.exists():
        return None
    run_flags = json.loads(run.read_text(encoding="utf-8"))["flags"]
    weights = {name: weight for name, weight in run_flags["reward"].items() if weight}
    rewards = {}
    for name in weights:
        rewards[name] = torch.tensor([logged[name] for logged in lines])
    return positional_share(rewards, weights, not run_flags["no_std"])


def logged_mean(arm: Path, key: str) -> float | None:
    """Mean over the steps of a figure of metrics.jsonl."""
    values = [step[key] for step in page.log_lines(arm / "metrics.jsonl") if key in step]
    return sum(values) / len(values) if values else None


# ---------------------------------------------------------------- sizes

def log_sides(boxes: Tensor, records: Sequence[Record]) -> np.ndarray:
    """(N, 4) -> (N,): the logarithm of a box's side beside the target's, NaN where it does not
    touch the target. The side is the root of the area."""
    target, size = metrics.targets(records)
    overlap = metrics.overlaps(boxes, target, size)
    area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    ratio = (area / (target[:, 2:] - target[:, :2]).prod(1)).sqrt().log()
    return ratio.where(overlap.iou > 0, torch.nan).numpy()


def pooled(records: Sequence[Record], values: np.ndarray) -> tuple[float, list[float]]:
    """Values (S, N), NaN where there is none -> their mean and its 95% interval over scenes."""
    known = ~np.isnan(values)
    sums = (np.where(known, values, 0).sum(0), known.sum(0))
    return values[known].mean().item(), metrics.intervals(records, {"mean": sums})["mean"]


def size_cells(records: Sequence[Record], without: np.ndarray, with_term: np.ndarray) -> list[str]:
    """Log sides (S, N) of both arms -> median sides beside the target's, and with over without
    where both touch it, with its interval."""
    both = with_term - without
    cells = [f"{np.exp(np.nanmedian(sides)):.3f}" if np.isfinite(sides).any() else "-"
             for sides in (without, with_term)]
    if np.isnan(both).all():
        return [*cells, "-"]
    mean, (low, high) = pooled(records, both)
    return [*cells, f"x {np.exp(mean):.3f} [{np.exp(low):.3f}, {np.exp(high):.3f}]"]


# ---------------------------------------------------------------- the map

def regime_row(regime: Path, split: str, seeds: Sequence[Path]) -> tuple[str, figure.Bar]:
    """A regime's line of the map, and the term's effect for the figure."""
    n = read_row(seeds[0] / WITH / f"eval_{split}")["n"]
    records = list(load(data_set(regime, split), None, split))[:n]
    iou: dict[str, list[np.ndarray]] = {WITHOUT: [], WITH: []}
    sides: dict[str, list[np.ndarray]] = {WITHOUT: [], WITH: []}
    target, size = metrics.targets(records)
    for seed in seeds:
        for arm in (WITHOUT, WITH):
            boxes = boxes_of(seed, arm, split, records)
            iou[arm].append(metrics.overlaps(boxes, target, size).iou.numpy())
            sides[arm].append(log_sides(boxes, records))
    gain = np.stack(iou[WITH]) - np.stack(iou[WITHOUT])            # (S, N)
    mean, (low, high) = pooled(records, gain)
    arms = [seed / WITH for seed in seeds]
    sft = [read_row(seed / "sft" / f"eval_{split}")["mIoU"] for seed in seeds]
    of_seeds = gain.mean(1).tolist()
    bar = figure.Bar(f"{regime.name}: {MAP[regime.name]}, {split}", low, high, of_seeds)
    return line([
        f"{regime.name}: {MAP[regime.name]}", str(len(seeds)), mean_text(sft),
        miss_text(seeds, split, records),
        mean_text([logged_mean(arm, "no_overlap_groups") for arm in arms]),
        mean_text([update_share(arm) for arm in arms]),
        mean_text([logged_mean(arm, "positional_alone_advantage") for arm in arms]),
        f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]{deviation_text(of_seeds)}",
        *size_cells(records, np.stack(sides[WITHOUT]), np.stack(sides[WITH])),
        f"{metrics.centre_box(records)['mIoU']:.3f}"]), bar


def chapter(regimes: Sequence[Path]) -> tuple[str, list[figure.Bar]]:
    """Markdown: the map over the regimes that were run, "" where none of them was; the effects."""
    text = ""
    bars = []
    for split in SPLITS[:-1]:
        rows = ""
        for regime in regimes:
            seeds = seeds_with(regime, WITH, split, WITHOUT) if regime.name in MAP else []
            if seeds:
                row, bar = regime_row(regime, split, seeds)
                rows += row
                bars.append(bar)
        if rows:
            text += f"### map, {split}\n\n" + header([
                "regime", "seeds", "SFT's mIoU", f"SFT's misses: {', '.join(MISSES)}",
                "groups without overlap", "share of the update that the term carries",
                "in groups that it alone tells apart", "mIoU, with the term minus without",
                "side beside the target's, without", "with", "with over without",
                "centre box's mIoU"]) + rows + "\n"
    if not text:
        return "", []
    text = ("## map\n\nDoes the positional term raise mIoU where answers miss by imprecision, and "
            "not where they miss by a wrong choice? Does it make boxes smaller?\n\n" + text)
    return text, bars
