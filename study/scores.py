"""What ablate.sh left: the scores and answers of every regime, seed and arm, and cells of tables.

A study's folder has REGIME/SEED/ARM/eval_SPLIT, each of one evaluation. Records are N, seeds S.
"""
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qwen.hub import by_number
from readers.base import Record, read_json
from report import metrics, predictions
from train import dist

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
# Regimes of ablate.sh, and the data set that each trains and tests on.
REGIMES = {
    "tiny": "synth-tiny", "little": "synth", "wide": "synth", "choice": "synth",
    "small": "synth-small", "one": "synth-one", "one-coarse": "synth-one"}
# Those of the four tables; the map tells of its own.
TABLE_REGIMES = ("tiny", "little", "wide")
# Splits that are scored: final, which no choice has seen; test, of earlier studies; and what is
# unfamiliar, which is of the full-sized world in every regime.
SPLITS = ("final", "test", "novel")


# ---------------------------------------------------------------- what was scored

def data_set(regime: Path, split: str) -> str:
    """Name of the data set whose split a regime's arms were scored on."""
    return "synth" if split == "novel" else REGIMES[regime.name]


def read_row(folder: Path) -> dict[str, Any] | None:
    """The one row of a folder of scores, or None where it was not scored."""
    content = read_json(folder / "eval.json")
    if content is None:
        return None
    try:
        return content["rows"][0]
    except (KeyError, IndexError, TypeError):
        dist.fail(f"{folder / 'eval.json'} has no row of scores; remove {folder} and run "
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
        dist.fail(f"{regime}: scores of {numbers} scenes can't be compared; "
                     "give each a study of its own")
    return seeds


def predictions_of(folder: Path, records: Sequence[Record]) -> list[dict[str, Any]]:
    """A folder's predictions, in the order of records; records without one are left out."""
    files = list(folder.glob("predictions_*.jsonl"))
    if len(files) != 1:
        dist.fail(f"{len(files)} files predictions_*.jsonl in {folder}, where one belongs; "
                     f"remove {folder} and run ablate.sh again")
    by_id = predictions.read_predictions(files[0], records)
    return [by_id[r.id] for r in records if r.id in by_id]


def check_names(study: Path) -> None:
    """Refuses a study without scores, and scores of a regime or an arm that is not known here."""
    scores = sorted(study.glob("*/*/*/eval_*/eval.json"))
    for file in scores:
        regime, _, arm = file.relative_to(study).parts[:3]
        if regime not in REGIMES:
            dist.fail(f"{study / regime}: no regime {regime}; there are {', '.join(REGIMES)}")
        if arm not in ARMS:
            dist.fail(f"{file.parents[1]}: no arm {arm}; there are {', '.join(ARMS)}")
    if not any((study / name).is_dir() for name in REGIMES):
        dist.fail(f"no regime ({', '.join(REGIMES)}) in {study}; run ablate.sh first")
    if not scores:
        dist.fail(f"no scores in {study}; run ablate.sh first")


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


# ---------------------------------------------------------------- answers

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
        boxes = predictions.strict_boxes(records, predictions)
        valid, overlap, _, _, away = metrics.overlaps(boxes, *metrics.targets(records))
        has_box.append(valid.numpy())
        iou.append(overlap.numpy())
        distance.append(away.where(valid, 0.0).numpy())
    return Answers(np.stack(has_box), np.stack(iou), np.stack(distance))
