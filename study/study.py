"""What ablate.sh found: tables of every regime and arm beside the SFT model they started from, of what each term adds, and a figure.

A difference is paired: both models answered the same scenes, which are resampled together for its 95% interval. Every seed has its own SFT
model and its own difference; the mean over seeds stands beside their standard deviation. What a term adds is the difference between two
arms that started from the same SFT models, over all seeds at once: its interval is of scenes, resampled with the answers of all seeds, and
the standard deviation beside it is of seeds.

Of a hundred such intervals, five leave 0 out by chance: which differences are the questions is to be written down before the runs. All
seeds share toy/base and the records of SFT; a seed is the order of the data and the sampling.

    python study/study.py ckpt/study           prints Markdown, writes study.md, study.json (the differences from SFT) and study.png there
"""
import json
import statistics
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data  # noqa: E402
import eval as evaluation  # noqa: E402
import metrics  # noqa: E402
import report  # noqa: E402
import runtime  # noqa: E402

ARMS = {"sft": "CoT-SFT", "base": "base", "direct": "GRPO from the base", "boxes": "CoT-SFT, then SFT on boxes",
        "iou": "GRPO: IoU + format", "giou": "+ GIoU", "diou": "+ DIoU", "center": "+ centre distance",
        "positional": "+ positional", "mean": "+ positional, mean weight", "variance": "+ positional, variance weight",
        "consistency": "RSGround-R1 (both weights)", "shuffled": "both weights, shuffled",
        "longer": "GRPO: IoU + format, twice the steps", "consistency-longer": "RSGround-R1, twice the steps", "own": "own variant"}
DATA = {"little": "synth", "small": "synth-small", "wide": "synth"}
CONTRASTS = (("iou", "direct"), ("giou", "iou"), ("diou", "iou"), ("center", "iou"), ("positional", "iou"), ("positional", "giou"),
             ("positional", "diou"), ("positional", "center"), ("mean", "positional"), ("variance", "positional"),
             ("consistency", "positional"), ("shuffled", "positional"), ("consistency", "shuffled"), ("consistency", "iou"),
             ("consistency", "boxes"), ("longer", "iou"), ("consistency-longer", "consistency"), ("consistency-longer", "longer"),
             ("own", "positional"))
TRAINED = ("no_overlap_groups", "no_overlap_advantage", "positional_alone_advantage", "zero_variance_groups", "entropy", "dispersion",
           "consistency_weight")


def row_of(folder):
    """The one row of a folder of scores, or None where it was not scored."""
    content = data.read_json(folder / "eval.json")
    return content and content["rows"][0]


def predictions_of(folder, records):
    file, = folder.glob("predictions_*.jsonl")
    found = evaluation.read_predictions(file, records)
    return [found[r.id] for r in records if r.id in found]


def mean_text(values):
    """Mean and standard deviation over seeds, as text."""
    values = [v for v in values if v is not None]
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}" if values else "-"


def scored(regime, arm, split, other="sft"):
    """The seeds' folders where both arms were scored, on as many scenes."""
    seeds = [s for s in sorted(regime.iterdir()) if row_of(s / arm / f"eval_{split}") and row_of(s / other / f"eval_{split}")]
    counts = {row_of(s / name / f"eval_{split}")["n"] for s in seeds for name in (arm, other)}
    if len(counts) > 1:
        runtime.fail(f"{regime}: scores of {' and '.join(map(str, sorted(counts)))} scenes can't be compared; give each a study of its own")
    return seeds


def line(cells):
    return "| " + " | ".join(cells) + " |\n"


def compare(regime, arms, split):
    """-> Markdown of one regime on one split, and (arm, seed, test) of the greedy differences."""
    records = data.load(DATA[regime.name], None, split)
    head = ["", "seeds", "mIoU greedy", "minus SFT, seed by seed [95%]", "mean", "Pr@0.5", "cIoU", "mIoU T=1", "no box"]
    text, tests = line(head) + line(["---"] * len(head)), []
    for arm in arms:
        seeds = scored(regime, arm, split)
        if not seeds:
            continue
        rows = [row_of(s / arm / f"eval_{split}") for s in seeds]
        warm = [row_of(s / arm / f"eval_{split}_T1") for s in seeds]
        found = []
        for s in seeds if arm != "sft" else ():
            sides = [predictions_of(s / name / f"eval_{split}", records) for name in ("sft", arm)]
            asked = [r for r in records if r.id in {p["id"] for p in sides[0]}]
            found.append(metrics.paired(asked, *(evaluation.strict_iou(asked, side) for side in sides))["mIoU"])
            tests.append((arm, s.name, found[-1]))
        each = "; ".join(f"{t['difference']:+.3f} [{t['ci'][0]:+.3f}, {t['ci'][1]:+.3f}]" for t in found)
        text += line([ARMS[arm], " ".join(s.name for s in seeds), mean_text([r["mIoU"] for r in rows]), each or "-",
                      mean_text([t["difference"] for t in found]), *(mean_text([r[k] for r in rows]) for k in ("Pr@0.5", "cIoU")),
                      mean_text([r and r["mIoU"] for r in warm]), mean_text([sum(r["failures"].values()) / r["n"] for r in rows])])
        for t in ("0.8", "0.6") if arm == "sft" else ():
            cooler = [row_of(s / arm / f"eval_{split}_T{t}") for s in seeds]
            text += line([f"SFT sampled at T={t}", "", mean_text([r and r["mIoU"] for r in cooler]), *["-"] * 6]) if any(cooler) else ""
    return text, tests


def answers(folder, records):
    """A folder's answers -> was there a box (N,), its IoU (N,), the distance of its centre from the target's (N,), 0 without a box."""
    found = evaluation.strict_boxes(records, predictions_of(folder, records))
    valid, iou, _, _, away = metrics.overlaps(found, *metrics.targets(records))
    return valid.numpy(), iou.numpy(), away.where(valid, 0.0).numpy()


def contrasts(regime, split):
    """Markdown: what one arm has more than another. Distances are over the scenes where both gave a box."""
    records = data.load(DATA[regime.name], None, split)
    head = ["", "seeds", "mIoU", "Pr@0.5", "box given", "centre distance", "mIoU, target under 1% of the image",
            "mIoU where SFT's box touched nothing", "centre distance there"]
    text = line(head) + line(["---"] * len(head))
    for arm, other in CONTRASTS:
        seeds = scored(regime, arm, split, other)
        if not seeds:
            continue
        asked = records[:row_of(seeds[0] / arm / f"eval_{split}")["n"]]
        (box, iou, _), (box_a, iou_a, away_a), (box_b, iou_b, away_b) = (
            [np.stack(x) for x in zip(*(answers(s / name / f"eval_{split}", asked) for s in seeds))] for name in ("sft", arm, other))
        small = [(x2 - x1) * (y2 - y1) < 0.01 * r.size[0] * r.size[1] for r in asked for x1, y1, x2, y2 in [r.box]]
        small = np.broadcast_to(small, box.shape)
        every, both, missed = np.ones_like(box), box_a & box_b, box & (iou == 0)                      # (seeds, N), as all of these
        columns = [(iou_a - iou_b, every), ((iou_a > 0.5) * 1.0 - (iou_b > 0.5), every), (box_a * 1.0 - box_b, every),
                   (away_a - away_b, both), (iou_a - iou_b, small), (iou_a - iou_b, missed), (away_a - away_b, missed & both)]
        bounds = metrics.intervals(asked, {i: ((v * among).sum(0), among.sum(0)) for i, (v, among) in enumerate(columns)})
        cells = []
        for i, (value, among) in enumerate(columns):
            each = [v[m].mean().item() for v, m in zip(value, among) if m.any()]
            spread = f" ± {statistics.stdev(each):.3f}" if len(each) > 1 else ""
            cells.append(f"{value[among].mean():+.3f} [{bounds[i][0]:+.3f}, {bounds[i][1]:+.3f}]{spread}" if each else "-")
        text += line([f"{ARMS[arm]} minus {ARMS[other]}", str(len(seeds)), *cells])
    return text


def kinds(regime, arms, split):
    """Markdown: mIoU by kind of expression, mean over seeds."""
    rows = {arm: [row_of(s / arm / f"eval_{split}") for s in scored(regime, arm, split)] for arm in arms}
    names = sorted({kind for found in rows.values() for r in found for kind in r["breakdowns"]["kind"]})
    text = line(["mIoU by kind", *names]) + line(["---"] * (1 + len(names)))
    return text + "".join(line([ARMS[arm], *(mean_text([r["breakdowns"]["kind"][k]["mIoU"] for r in found]) for k in names)])
                          for arm, found in rows.items() if found)


def training(regime, arms):
    """Markdown: what the steps logged, mean of the first and of the last tenth of them, mean over seeds; "-" where an arm logs no such
    figure. Of the reward and of whatever terms it has, the mean and the standard deviation within a group."""
    logs = {}
    for arm in arms:
        read = [list(report.log_lines(s / arm / "metrics.jsonl")) for s in sorted(regime.iterdir()) if (s / arm / "done").exists()]
        logs[arm] = [log for log in read if log and "dispersion" in log[0]]
    logged = [log[0] for several in logs.values() for log in several]
    terms = list(dict.fromkeys(k for first in logged for keys in report.reward_curves([first]) for k in keys))
    names = [*terms, *TRAINED]
    text = line(["first → last tenth of the steps", *names]) + line(["---"] * (1 + len(names)))
    for arm, several in logs.items():
        if several:
            text += line([ARMS[arm], *(ends(several, name) for name in names)])
    return text


def ends(logs, name) -> str:
    """A figure of metrics.jsonl: its mean over the first tenth of the steps and over the last, mean over seeds."""
    if not all(name in step for log in logs for step in log):
        return "-"
    first, last = [], []
    for log in logs:
        tenth = max(1, len(log) // 10)
        first.append(np.mean([step[name] for step in log[:tenth]]))
        last.append(np.mean([step[name] for step in log[-tenth:]]))
    return f"{np.mean(first):.3f} → {np.mean(last):.3f}"


def figure(tests, path):
    """tests: (regime, split, arm, seed, test) -> a picture: each difference from SFT with its interval, a line an arm and seed."""
    high, left, width = 17, 280, 900
    ends = [v for *_, t in tests for v in t["ci"]]
    low, most = min(-0.01, *ends), max(0.01, *ends)
    image = Image.new("RGB", (width, high * (len(tests) + 2)), "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(12)

    def at(v):
        return left + (width - left - 20) * (v - low) / (most - low)
    pen.line([at(0), high, at(0), image.height - high], fill="#999999")
    pen.text((left, 1), "mIoU greedy, minus SFT: difference and 95% interval over scenes", fill="black", font=font)
    for value in (low, 0, most):
        pen.text((at(value) - 15, image.height - high), f"{value:+.2f}", fill="black", font=font)
    for i, (regime, split, arm, seed, t) in enumerate(tests):
        y = high * (i + 1.5)
        pen.text((4, y - 8), f"{regime}, {split}: {ARMS[arm]}, seed {seed}", fill="black", font=font)
        pen.line([at(t["ci"][0]), y, at(t["ci"][1]), y], fill="#1f77b4", width=2)
        pen.ellipse([at(t["difference"]) - 3, y - 3, at(t["difference"]) + 3, y + 3], fill="#d62728")
    image.save(path)


def main():
    parser = runtime.FlagParser("Tables and figure of a study that ablate.sh ran")
    parser.add_argument("study", nargs="?", default="ckpt/study", help="its folder")
    study = Path(parser.parse_args().study)
    regimes = [study / name for name in DATA if (study / name).is_dir()]
    if not regimes:
        runtime.fail(f"no regime ({', '.join(DATA)}) in {study}; run ablate.sh first")
    text, tests = "", []
    for regime in regimes:
        for split in ("test", "novel"):
            if not any(regime.glob(f"*/*/eval_{split}/eval.json")):
                continue
            table, found = compare(regime, ARMS, split)
            text += f"### {regime.name}, {split}\n\n{table}\n{contrasts(regime, split)}\n{kinds(regime, ARMS, split)}\n"
            tests += [(regime.name, split, *t) for t in found]
        text += training(regime, ARMS) + "\n"
    (study / "study.md").write_text(text, encoding="utf-8")
    (study / "study.json").write_text(json.dumps([[*where, t] for *where, t in tests], indent=1) + "\n", encoding="utf-8")
    if tests:
        figure(tests, study / "study.png")
    print(text)


if __name__ == "__main__":
    runtime.main(main)
