"""Tables and a figure of what ablate.sh trained and scored.

Every arm of every regime stands beside the SFT model that it started from, then two arms
beside each other: what a term of the reward or a weighting adds.

A difference is paired: both models answered the same scenes, and these are resampled
together for its 95% interval. Every seed has its own SFT model and its own difference;
the mean over seeds stands beside their standard deviation. What a term adds is the
difference between two arms that started from the same SFT models, over all seeds at
once: its interval is of scenes, resampled with the answers of all seeds, and the
standard deviation beside it is of seeds.

Of a hundred such intervals, five leave 0 out by chance: which differences are the
questions is to be written down before the runs. All seeds share toy/base and the records
of SFT; a seed is the order of the data and the sampling.

    python study/study.py ckpt/study

prints Markdown and writes study.md, study.json (the differences from SFT) and study.png
there.
"""
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data  # noqa: E402
import eval as evaluation  # noqa: E402
import metrics  # noqa: E402
import report  # noqa: E402
import runtime  # noqa: E402

# The arms of ablate.sh, as the tables call them.
ARMS = {
    "sft": "CoT-SFT",
    "base": "base",
    "direct": "GRPO from the base",
    "boxes": "CoT-SFT, then SFT on boxes",
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
# The regimes of ablate.sh, and the data set that each is scored on.
DATA = {"little": "synth", "small": "synth-small", "wide": "synth"}
SPLITS = ("test", "novel")
# The questions: what has the first arm more than the second?
CONTRASTS = (
    # Does CoT-SFT matter?
    ("iou", "direct"),
    # Which reward: does the positional term add to IoU, and more than other terms do?
    ("giou", "iou"), ("diou", "iou"), ("center", "iou"), ("positional", "iou"),
    ("positional", "giou"), ("positional", "diou"), ("positional", "center"),
    # Which weight: does each part act, and does it matter which group gets which weight?
    ("mean", "positional"), ("variance", "positional"), ("consistency", "positional"),
    ("shuffled", "positional"), ("consistency", "shuffled"),
    # Both terms together, beside none and beside plain SFT on the same boxes.
    ("consistency", "iou"), ("consistency", "boxes"),
    # Stability: what do twice the steps change?
    ("longer", "iou"), ("consistency-longer", "consistency"), ("consistency-longer", "longer"),
    ("own", "positional"),
)
# Figures of metrics.jsonl that the training table shows behind the terms of the reward.
TRAINING_KEYS = (
    "no_overlap_groups",
    "no_overlap_advantage",
    "positional_alone_advantage",
    "zero_variance_groups",
    "entropy",
    "dispersion",
    "consistency_weight",
)


@dataclass
class Difference:
    """One arm and seed minus the SFT model that it started from, greedy mIoU."""

    regime: str
    split: str
    arm: str
    seed: str
    test: dict[str, Any]    # "difference", "ci" (95%), "p", as metrics.paired gives them


# ---------------------------------------------------------------- reading the folders

def read_row(folder: Path) -> dict[str, Any] | None:
    """The row of eval.json in a folder of scores, or None where nothing was scored."""
    content = data.read_json(folder / "eval.json")
    if content is None:
        return None
    try:
        return content["rows"][0]
    except (KeyError, IndexError, TypeError):
        runtime.fail(f"{folder / 'eval.json'} has no row of scores; remove {folder} and run "
                     "ablate.sh again")


def read_rows(
        seeds: Sequence[Path], arm: str, split: str, temperature: str = "",
) -> list[dict[str, Any] | None]:
    """The rows of an arm's seeds, at temperature 0 unless another one is named."""
    scores = f"eval_{split}_T{temperature}" if temperature else f"eval_{split}"
    return [read_row(seed / arm / scores) for seed in seeds]


def read_predictions(folder: Path, records: Sequence[data.Record]) -> list[dict[str, Any]]:
    """The answers in a folder of scores, in the records' order; some may have none."""
    files = list(folder.glob("predictions_*.jsonl"))
    if len(files) != 1:
        runtime.fail(f"{len(files)} files predictions_*.jsonl in {folder}, where one belongs; "
                     f"remove {folder} and run ablate.sh again")
    predictions = evaluation.read_predictions(files[0], records)
    return [predictions[r.id] for r in records if r.id in predictions]


def seeds_with_scores(regime: Path, arm: str, split: str, other: str = "sft") -> list[Path]:
    """The seeds' folders in which both arms were scored. All must have answered as many scenes."""
    seeds = []
    counts = set()
    for seed in sorted(regime.iterdir()):
        rows = [read_row(seed / name / f"eval_{split}") for name in (arm, other)]
        if all(rows):
            seeds.append(seed)
            counts |= {row["n"] for row in rows}
    if len(counts) > 1:
        runtime.fail(f"{regime}: scores of {' and '.join(map(str, sorted(counts)))} scenes "
                     "can't be compared; give each a study of its own")
    return seeds


def check_names(study: Path) -> None:
    """Refuses a study without scores, and scores of a regime or an arm that is not known here."""
    scores = sorted(study.glob("*/*/*/eval_*/eval.json"))
    for file in scores:
        regime, _, arm = file.relative_to(study).parts[:3]
        if regime not in DATA:
            runtime.fail(f"{study / regime}: no regime {regime}; there are {', '.join(DATA)}")
        if arm not in ARMS:
            runtime.fail(f"{file.parents[1]}: no arm {arm}; there are {', '.join(ARMS)}")
    if not any((study / regime).is_dir() for regime in DATA):
        runtime.fail(f"no regime ({', '.join(DATA)}) in {study}; run ablate.sh first")
    if not scores:
        runtime.fail(f"no scores in {study}; run ablate.sh first")


# ---------------------------------------------------------------- Markdown

def markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |\n"


def markdown_head(names: Sequence[str]) -> str:
    return markdown_row(names) + markdown_row(["---"] * len(names))


def deviation_text(values: Sequence[float]) -> str:
    """Standard deviation over seeds, as text; nothing for a single seed."""
    return f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""


def mean_text(values: Sequence[float | None]) -> str:
    """Mean and standard deviation over seeds, as text; None: the seed has no such figure."""
    numbers = [v for v in values if v is not None]
    if not numbers:
        return "-"
    return f"{statistics.mean(numbers):.3f}{deviation_text(numbers)}"


def interval_text(difference: float, interval: Sequence[float]) -> str:
    low, high = interval
    return f"{difference:+.3f} [{low:+.3f}, {high:+.3f}]"


# ---------------------------------------------------------------- each arm beside SFT

def arm_table(regime: Path, split: str) -> tuple[str, list[Difference]]:
    """Markdown of one regime on one split, and the differences of its arms from SFT."""
    records = data.load(DATA[regime.name], None, split)
    text = markdown_head(["", "seeds", "mIoU greedy", "minus SFT, seed by seed [95%]", "mean",
                          "Pr@0.5", "cIoU", "mIoU T=1", "no box"])
    differences = []
    for arm in ARMS:
        seeds = seeds_with_scores(regime, arm, split)
        if not seeds:
            continue
        of_arm = []
        if arm != "sft":
            for seed in seeds:
                test = difference_from_sft(seed, arm, split, records)
                of_arm.append(Difference(regime.name, split, arm, seed.name, test))
        text += arm_row(seeds, arm, split, of_arm)
        if arm == "sft":
            text += cooler_rows(seeds, split)
        differences += of_arm
    return text, differences


def difference_from_sft(
        seed: Path, arm: str, split: str, records: Sequence[data.Record],
) -> dict[str, Any]:
    """An arm's greedy mIoU minus SFT's on the same scenes, as metrics.paired gives it."""
    sft = read_predictions(seed / "sft" / f"eval_{split}", records)
    other = read_predictions(seed / arm / f"eval_{split}", records)
    ids = {prediction["id"] for prediction in sft}
    answered = [r for r in records if r.id in ids]
    sft_iou = evaluation.overlap_of(answered, sft)
    other_iou = evaluation.overlap_of(answered, other)
    return metrics.paired(answered, sft_iou, other_iou)["mIoU"]


def arm_row(seeds: Sequence[Path], arm: str, split: str, differences: Sequence[Difference]) -> str:
    rows = read_rows(seeds, arm, split)
    sampled = read_rows(seeds, arm, split, "1")
    tests = [d.test for d in differences]
    by_seed = "; ".join(interval_text(t["difference"], t["ci"]) for t in tests)
    return markdown_row([
        ARMS[arm],
        " ".join(seed.name for seed in seeds),
        mean_text([row["mIoU"] for row in rows]),
        by_seed or "-",
        mean_text([t["difference"] for t in tests]),
        mean_text([row["Pr@0.5"] for row in rows]),
        mean_text([row["cIoU"] for row in rows]),
        mean_text([row and row["mIoU"] for row in sampled]),
        mean_text([sum(row["failures"].values()) / row["n"] for row in rows]),
    ])


def cooler_rows(seeds: Sequence[Path], split: str) -> str:
    """SFT sampled at low temperatures: RFT might do no more than sharpen it (a control)."""
    text = ""
    for temperature in ("0.8", "0.6"):
        rows = read_rows(seeds, "sft", split, temperature)
        if any(rows):
            miou = mean_text([row and row["mIoU"] for row in rows])
            text += markdown_row([f"SFT sampled at T={temperature}", "", miou, *["-"] * 6])
    return text


# ---------------------------------------------------------------- one arm beside another

@dataclass
class Answers:
    """What the seeds of an arm answered to N records; each (seeds, N)."""

    given: np.ndarray       # bool: is there a box?
    iou: np.ndarray         # 0 without a box
    distance: np.ndarray    # of its centre from the target's, in image sides; 0 without a box


@dataclass
class Column:
    """A figure of the contrast table: the mean of values where mask is true; both (seeds, N)."""

    values: np.ndarray
    mask: np.ndarray


def read_answers(
        seeds: Sequence[Path], arm: str, split: str, records: Sequence[data.Record],
) -> Answers:
    given = []
    iou = []
    distance = []
    for seed in seeds:
        predictions = read_predictions(seed / arm / f"eval_{split}", records)
        boxes = evaluation.answered(records, predictions)
        has_box, overlap, _, _, away = metrics.overlaps(boxes, *metrics.targets(records))
        given.append(has_box.numpy())
        iou.append(overlap.numpy())
        distance.append(away.where(has_box, 0.0).numpy())
    return Answers(np.stack(given), np.stack(iou), np.stack(distance))


def contrast_table(regime: Path, split: str) -> str:
    """Markdown: what one arm has more than another. Distances: where both gave a box."""
    records = data.load(DATA[regime.name], None, split)
    text = markdown_head(["", "seeds", "mIoU", "Pr@0.5", "box given", "centre distance",
                          "mIoU, target under 1% of the image",
                          "mIoU where SFT's box touched nothing", "centre distance there"])
    for arm, other in CONTRASTS:
        seeds = seeds_with_scores(regime, arm, split, other)
        if not seeds:
            continue
        # ablate.sh had eval.py score the first n records of the split.
        scored = records[:read_row(seeds[0] / arm / f"eval_{split}")["n"]]
        sft, first, second = (
            read_answers(seeds, name, split, scored) for name in ("sft", arm, other))
        columns = contrast_columns(sft, first, second, small_targets(scored))
        cells = column_texts(columns, scored)
        text += markdown_row([f"{ARMS[arm]} minus {ARMS[other]}", str(len(seeds)), *cells])
    return text


def small_targets(records: Sequence[data.Record]) -> np.ndarray:
    """(N,) bool: does the target fill less than 1% of its image?"""
    small = []
    for record in records:
        x1, y1, x2, y2 = record.box
        width, height = record.size
        small.append((x2 - x1) * (y2 - y1) < 0.01 * width * height)
    return np.array(small)


def contrast_columns(sft: Answers, a: Answers, b: Answers, small: np.ndarray) -> list[Column]:
    """a minus b, a column for each figure of the contrast table; small (N,)."""
    everywhere = np.ones_like(sft.given)
    both_given = a.given & b.given
    # SFT answered with a box that lies apart from the target: there IoU alone is silent.
    missed = sft.given & (sft.iou == 0)
    iou = a.iou - b.iou
    hits = (a.iou > 0.5) * 1.0 - (b.iou > 0.5)
    distance = a.distance - b.distance
    return [
        Column(iou, everywhere),
        Column(hits, everywhere),
        Column(a.given * 1.0 - b.given, everywhere),
        Column(distance, both_given),
        Column(iou, np.broadcast_to(small, iou.shape)),
        Column(iou, missed),
        Column(distance, missed & both_given),
    ]


def column_texts(columns: Sequence[Column], records: Sequence[data.Record]) -> list[str]:
    """Each column's mean over all seeds, its interval over scenes, its deviation over seeds."""
    # A scene is resampled with the answers of all seeds: seeds are not more scenes.
    sums = {}
    for i, column in enumerate(columns):
        sums[i] = ((column.values * column.mask).sum(0), column.mask.sum(0))
    intervals = metrics.intervals(records, sums)
    texts = []
    for i, column in enumerate(columns):
        if not column.mask.any():
            texts.append("-")
            continue
        by_seed = []
        for values, mask in zip(column.values, column.mask):
            if mask.any():
                by_seed.append(values[mask].mean().item())
        mean = column.values[column.mask].mean()
        texts.append(interval_text(mean, intervals[i]) + deviation_text(by_seed))
    return texts


# ---------------------------------------------------------------- kinds of expressions, training

def kind_table(regime: Path, split: str) -> str:
    """Markdown: mIoU by kind of expression, mean over seeds."""
    breakdowns = {}    # arm -> one breakdown by kind for each seed
    kinds = set()
    for arm in ARMS:
        rows = read_rows(seeds_with_scores(regime, arm, split), arm, split)
        breakdowns[arm] = [row["breakdowns"]["kind"] for row in rows]
        kinds.update(*breakdowns[arm])
    text = markdown_head(["mIoU by kind", *sorted(kinds)])
    for arm, by_seed in breakdowns.items():
        if by_seed:
            cells = [ARMS[arm]]
            for kind in sorted(kinds):
                cells.append(mean_text([by_kind[kind]["mIoU"] for by_kind in by_seed]))
            text += markdown_row(cells)
    return text


def read_training_logs(regime: Path, arm: str) -> list[list[dict[str, Any]]]:
    """The lines of metrics.jsonl of each seed whose training is done; those of rft.py alone."""
    logs = []
    for seed in sorted(regime.iterdir()):
        if (seed / arm / "done").exists():
            log = list(report.log_lines(seed / arm / "metrics.jsonl"))
            if log and "dispersion" in log[0]:
                logs.append(log)
    return logs


def training_table(regime: Path) -> str:
    """Markdown: what the steps logged, at their beginning and at their end, mean over seeds.

    Of the reward and of whatever terms it has: the mean, and the standard deviation
    within a group. "-": an arm logs no such figure.
    """
    logs = {arm: read_training_logs(regime, arm) for arm in ARMS}
    keys = {}    # a dict keeps the order in which they are met
    for of_arm in logs.values():
        for log in of_arm:
            for curves in report.reward_curves(log[:1]):
                keys |= dict.fromkeys(curves)
    names = [*keys, *TRAINING_KEYS]
    text = markdown_head(["first → last tenth of the steps", *names])
    for arm, of_arm in logs.items():
        if of_arm:
            text += markdown_row([ARMS[arm], *(first_to_last(of_arm, name) for name in names)])
    return text


def first_to_last(logs: Sequence[Sequence[dict[str, Any]]], name: str) -> str:
    """A logged figure: its mean over the first tenth of the steps and over the last one."""
    first = []
    last = []
    for log in logs:
        if any(name not in step for step in log):
            return "-"
        tenth = max(1, len(log) // 10)
        first.append(np.mean([step[name] for step in log[:tenth]]))
        last.append(np.mean([step[name] for step in log[-tenth:]]))
    return f"{np.mean(first):.3f} → {np.mean(last):.3f}"


# ---------------------------------------------------------------- the figure

@dataclass
class Axis:
    """The figure's horizontal axis: differences from low to high between two edges in pixels."""

    low: float
    high: float
    left: int = 280
    right: int = 880

    def x(self, value: float) -> float:
        return self.left + (self.right - self.left) * (value - self.low) / (self.high - self.low)


LINE = 17      # height of a line of the figure, pixels
WIDTH = 900    # of the figure, pixels


def draw_figure(differences: Sequence[Difference]) -> Image.Image:
    """Each difference from SFT with its interval, a line an arm and seed."""
    axis = Axis(-0.01, 0.01)
    for difference in differences:
        low, high = difference.test["ci"]
        axis.low = min(axis.low, low)
        axis.high = max(axis.high, high)
    image = Image.new("RGB", (WIDTH, LINE * (len(differences) + 2)), "white")
    pen = ImageDraw.Draw(image)
    draw_axis(pen, axis, image.height - LINE)
    for i, difference in enumerate(differences):
        draw_difference(pen, axis, LINE * (i + 1.5), difference)
    return image


def draw_axis(pen: ImageDraw.ImageDraw, axis: Axis, bottom: int) -> None:
    """The title, the line at 0 and the numbers under it."""
    font = ImageFont.load_default(12)
    zero = axis.x(0)
    pen.line([zero, LINE, zero, bottom], fill="#999999")
    title = "mIoU greedy, minus SFT: difference and 95% interval over scenes"
    pen.text((axis.left, 1), title, fill="black", font=font)
    for value in (axis.low, 0, axis.high):
        pen.text((axis.x(value) - 15, bottom), f"{value:+.2f}", fill="black", font=font)


def draw_difference(
        pen: ImageDraw.ImageDraw, axis: Axis, y: float, difference: Difference,
) -> None:
    """One line: its name, its interval, and a dot at the difference."""
    d = difference
    label = f"{d.regime}, {d.split}: {ARMS[d.arm]}, seed {d.seed}"
    pen.text((4, y - 8), label, fill="black", font=ImageFont.load_default(12))
    low, high = d.test["ci"]
    pen.line([axis.x(low), y, axis.x(high), y], fill="#1f77b4", width=2)
    x = axis.x(d.test["difference"])
    pen.ellipse([x - 3, y - 3, x + 3, y + 3], fill="#d62728")


# ---------------------------------------------------------------- the script

def main() -> None:
    parser = runtime.FlagParser("Tables and figure of a study that ablate.sh ran")
    parser.add_argument("study", nargs="?", default="ckpt/study", help="its folder")
    study = Path(parser.parse_args().study)
    check_names(study)
    text = ""
    differences = []
    for regime in (study / name for name in DATA if (study / name).is_dir()):
        for split in SPLITS:
            if not any(regime.glob(f"*/*/eval_{split}/eval.json")):
                continue
            table, of_split = arm_table(regime, split)
            differences += of_split
            contrasts = contrast_table(regime, split)
            kinds = kind_table(regime, split)
            text += f"### {regime.name}, {split}\n\n{table}\n{contrasts}\n{kinds}\n"
        text += training_table(regime) + "\n"
    (study / "study.md").write_text(text, encoding="utf-8")
    rows = [astuple(difference) for difference in differences]
    (study / "study.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    if differences:
        draw_figure(differences).save(study / "study.png")
    print(text)


if __name__ == "__main__":
    runtime.main(main)
