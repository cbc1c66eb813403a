"""Evaluation: answers of every stage, or anyone's predictions, are scored side by side.

The way through: flags -> records (`load_eval_set`) -> a prediction for each record, from
a model (`evaluate`) or from a file (`read_predictions`) -> a row of scores (`score`,
`details`) -> a table on the terminal, and in one folder eval.json, report.html,
predictions and pictures (`add_row`, `finish`). `main` at the end calls them in turn.

Boxes are clamped to the image and compared in pixels of the original image, as floats
(no +1 pixel). One counts where IoU > t, strictly, as in DIOR-RSVG's own evaluation (IoU
>= t on opt, as in OPT-RSVG's; VRSBench's own metric stands beside ours as "vrsbench").
DIOR's own script also truncates the true boxes to whole pixels at its 640 px letterbox;
that is not copied here. Every record counts: what can't be parsed has IoU 0. The
columns "lenient" read the same texts with `answer.parse_box_lenient`; they are for
models that never saw our answer format. Intervals "ci" are 95% bootstraps over images.

    python eval.py ckpt/
                            greedy; data set and root as in training, split test
    python eval.py ckpt/ --temperature 0 1
                            greedy and sampled, a row each
    torchrun --nproc_per_node 8 eval.py ckpt/rft
                            records dealt out to eight GPUs, the same report
    python eval.py ckpt/ --temperature 1 --samples 8
                            pass@k and dispersion of eight samples as well
    python eval.py ckpt/ --image scene.jpg --text "the white plane left of the hangar"
                            one question: reasoning, box, picture
    python eval.py --predictions theirs.jsonl --data dior --coords original
                            anyone's answers
    python eval.py --compare a.jsonl b.jsonl --data dior
                            is B better than A? paired bootstrap over images

A predictions file has a line a record, {"id": ..., "text": ...} or {"id": ..., "box":
[x1, y1, x2, y2], or null}. In whose coordinates a text speaks is said by the line's "frame"
(our own files have it) or by --coords; a box is in original pixels, unless --coords says
otherwise. A record whose image can't be decoded is a miss, "unreadable image".
"""
import argparse
import functools
import itertools
import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from PIL import ExifTags, Image, ImageOps
from torch import Tensor
from tqdm import tqdm

import data
import reward
from model import QwenVL
from qwen import answer
from qwen.answer import Frame, locate
from qwen.generate import generate
from qwen.hub import CheckpointError, by_number, is_checkpoint, newest_step
from qwen.processor import Processor, Prompt, prompt_hash
from readers import base, images
from readers.base import DataError, Record, Records, UnreadableImage
from readers.images import ImageError, Stretch
from report import metrics, page, pictures
from report.metrics import THRESHOLDS
from report.predictions import (
    GREEDY,
    UNREADABLE,
    Prediction,
    Predictions,
    Sampling,
    read_prediction,
    read_predictions,
    sampled_boxes,
    strict_boxes,
    strict_iou,
    unreadable_prediction,
    vrsbench_box,
)
from train import checkpoints, memory
from train import dist as processes
from train import run as runtime

INCLUSIVE = ("opt",)              # data sets whose own evaluation counts IoU >= t
OUTCOMES = (*answer.FAILURES, "outside image", "no prediction", UNREADABLE)
STAGE_ORDER = ("base", "pretrain", "direct", "sft", "rft")      # in the table; others behind them
RED = (255, 64, 64)


# ---------------------------------------------------------------- flags

def flags() -> runtime.FlagParser:
    parser = runtime.FlagParser(
        "Scores: every stage found under a folder side by side, or anyone's predictions; "
        "a table, eval.json, report.html, predictions, pictures.")
    add = parser.add_argument
    add("ckpt", nargs="?", help="a checkpoint's folder, a stage's, or one that holds stages")
    add("--data", help="data set; default: the one recorded in the checkpoint, else synth")
    add("--root", help="its folder; default: as recorded, else data/<name>")
    add("--split", default="test", help="of the data set")
    add("--limit", type=runtime.positive, help="score the first LIMIT records only")
    add("--out", help="folder of the report; default CKPT/eval, or the predictions file without "
        "its suffix")
    add("--temperature", type=float, nargs="+", default=[0.0], help="one row each; 0 is greedy")
    add("--samples", type=runtime.positive, default=1,
        help="answers to each record at a temperature above 0: adds pass@k and dispersion; "
        "all other figures are of the first")
    add("--max-new-tokens", type=runtime.positive, default=256,
        help="tokens of an answer, reasoning included")
    add("--batch", type=runtime.positive, default=32, help="records answered at once")
    add("--blind", action="store_true",
        help="show another record's image: what is scored then was not seen")
    add("--predictions", help='score this JSONL file instead of running a model; a line a record: '
        '{"id": ..., "text": ...} or {"id": ..., "box": [x1, y1, x2, y2] in original pixels, or '
        'null}')
    add("--compare", nargs=2, metavar=("A", "B"),
        help="score two JSONL files and test whether B differs from A (paired bootstrap)")
    add("--image", help="a picture's file, turned upright as its EXIF says: answer --text about "
        "it, print the answer, draw its box")
    add("--text", help="what to look for in --image; the last of the stages under CKPT answers")
    add("--coords", choices=("original", "resized", "1000", "fraction"),
        help="coordinates of predictions, texts without a frame and boxes: pixels of the "
        "original image, pixels of the image as CKPT's processor resizes it, thousandths or "
        "fractions of its sides; without predictions, and with --data: as --data-coords")
    # Their defaults are the flags that the checkpoint was trained with.
    data.add_reading_flags(add, "--data-coords")
    add("--seed", type=int, default=0, help="of sampling")
    runtime.add_device_flag(add)
    return parser


def check_flags(args: argparse.Namespace) -> None:
    """Ends the script where flags do not go together."""
    files = args.predictions or args.compare
    if not args.ckpt and not files:
        processes.fail("name a checkpoint's folder (python eval.py ckpt/), or a file with "
                     "--predictions")
    if args.predictions and args.compare:
        processes.fail("--predictions scores one file, --compare two; name one of them")
    check_question_flags(args)
    if args.samples > 1 and (files or not max(args.temperature) > 0):
        processes.fail(f"--samples {args.samples} needs a checkpoint and a --temperature above 0: "
                     "greedy answers are all the same")
    if args.coords == "resized" and not args.ckpt:
        processes.fail("--coords resized needs a checkpoint, whose processor says how images were "
                     "resized: python eval.py CKPT --predictions ...; or give each line its "
                     '"frame"')
    if args.coords and not files:
        if not args.data or args.coords not in base.COORDS:
            processes.fail("--coords is about a file given with --predictions, or about the boxes "
                         f"of --data NAME: {', '.join(base.COORDS)}")
        args.data_coords = args.data_coords or args.coords
    if files and (args.blind or args.temperature != [0.0]):
        processes.fail("predictions are scored as they are; --blind and --temperature belong to a "
                     "checkpoint")
    in_range = all(0 <= t < math.inf for t in args.temperature)
    if not in_range or len(set(args.temperature)) < len(args.temperature):
        processes.fail(f"--temperature {args.temperature}: numbers from 0 up, each once")


def check_question_flags(args: argparse.Namespace) -> None:
    """--image and --text: both or none, and nothing that asks more than once."""
    if bool(args.image) != bool(args.text):
        processes.fail("--image and --text go together: a picture's file, and what to look for "
                     "in it")
    files = args.predictions or args.compare
    several = args.samples > 1 or len(args.temperature) > 1 or processes.world() > 1
    if args.image and (not args.ckpt or files or args.blind or several):
        processes.fail("--image asks one checkpoint once: one process, one --temperature, "
                     "no --predictions, --compare, --samples or --blind")


# ---------------------------------------------------------------- records and checkpoints

class Stage(NamedTuple):
    """A checkpoint that is evaluated."""

    name: str
    folder: Path


@dataclass
class EvalSet:
    """The records that are scored, and those that they are compared with."""

    name: str                     # of the data set
    root: str | None              # its folder; None: data/<name>
    split: str
    reading: base.Reading
    records: Records              # all usable ones of the split
    limit: int | None             # only the first are scored; None: all
    refused: str                  # one sentence on those that are not usable, or ""

    @property
    def scored(self) -> list[Record]:
        return list(self.records)[:self.limit]

    @property
    def inclusive(self) -> bool:
        """True where an IoU equal to the threshold counts."""
        return self.name in INCLUSIVE


def find_stages(path: str | Path) -> list[Stage]:
    """A checkpoint or a stage -> itself; another folder -> every stage in it."""
    path = Path(path)
    if is_checkpoint(path):
        here = path.resolve()
        name = here.name
        if name.startswith("step_"):
            name = f"{here.parent.name}_{name}"
        return [Stage(name, path)]
    if is_checkpoint(path / "latest"):
        return [newest_stage(path)]
    candidates = path.iterdir() if path.is_dir() else ()
    folders = [p for p in candidates if is_checkpoint(newest_step(p))]
    if not folders:
        raise CheckpointError(
            f"no checkpoint at {path}: neither config.json, nor latest/config.json, nor a folder "
            "that holds one of them; train one with sft.py, or name a downloaded one")
    order = {name: k for k, name in enumerate(STAGE_ORDER)}
    stages = [newest_stage(folder) for folder in folders]
    stages.sort(key=lambda stage: (order.get(stage.name, len(order)), by_number(stage.name)))
    return stages


def newest_stage(folder: Path) -> Stage:
    """A stage's folder -> the stage at its newest step, by the step's own name."""
    step = newest_step(folder)
    if step != folder:
        step = folder / step.resolve().name
    return Stage(folder.name or folder.resolve().name, step)


def read_run(stage: Stage) -> dict[str, Any]:
    """The checkpoint's run.json; {} for a downloaded one, which has none."""
    return base.read_json(stage.folder / "run.json") or {}


def stage_flags(stage: Stage) -> dict[str, Any]:
    """The flags that a checkpoint was trained with; {} where they are not known."""
    return read_run(stage).get("flags") or {}


def with_stretch(records: Sequence[Record], stretch: Stretch | None) -> list[Record]:
    """Records whose images, where they are of 16 bits or floats, are seen by a stretch."""
    stretch = tuple(stretch) if stretch else None
    if all(record.stretch == stretch for record in records):
        return list(records)
    return [replace(record, stretch=stretch) for record in records]


def load_eval_set(args: argparse.Namespace, stages: Sequence[Stage]) -> EvalSet:
    """The records that the flags name.

    Where they name no data set, it is the one that the last stage was trained on."""
    recorded = {}
    for run in [read_run(stage) for stage in stages]:
        if "data" in run:
            recorded = run
    name = args.data or recorded.get("data", "synth")
    root = args.root
    if not root and recorded.get("data") == name:
        root = recorded.get("root")
    reading = base.Reading(args.data_coords, args.stretch)
    if recorded.get("data") == name:
        run_flags = recorded.get("flags") or {}
        reading = base.Reading(
            args.data_coords or run_flags.get("coords"), args.stretch or run_flags.get("stretch"))
    records = data.load(name, root, args.split, reading.coords, reading.stretch)
    refused = data.refusal_summary(records, name, root, args.split)
    if not records:
        raise DataError(f"no usable record in the split {args.split} of {name}: "
                        f"{refused or 'it is empty'}")
    return EvalSet(name, root, args.split, reading, records, args.limit, refused)


def train_records(eval_set: EvalSet) -> list[Record] | None:
    """The records trained on, which those of another split are compared with.

    None where the split itself is trained on, and where the data set has no train split
    (a file of one's own). Validation may be held out of "train"; so it is compared with
    what SFT sees."""
    if eval_set.split in ("train", "sft", "rft"):
        return None
    split = "sft" if eval_set.split == "val" else "train"
    try:
        reading = eval_set.reading
        return list(data.load(
            eval_set.name, eval_set.root, split, reading.coords, reading.stretch))
    except DataError:
        return None


# ---------------------------------------------------------------- what was trained on

class TrainingSet(NamedTuple):
    """Records that a run was trained on."""

    name: str                     # of the data set
    root: str | None
    split: str
    coords: str | None            # as in `base.Reading`
    stretch: tuple[float, ...] | None


def training_sets(stage: Stage) -> list[TrainingSet]:
    """What a checkpoint was trained on: its own run's records, then those of the runs that it
    started from."""
    sets: dict[TrainingSet, None] = {}
    folder = stage.folder
    seen = set()
    while folder.resolve() not in seen and (folder / "run.json").exists():
        seen.add(folder.resolve())
        run = base.read_json(folder / "run.json")
        run_flags = run.get("flags") or {}
        if "data" in run:
            # rft.py has no --split.
            split = run_flags.get("split", "rft")
            stretch = run_flags.get("stretch")
            sets[TrainingSet(
                run["data"], run.get("root"), split, run_flags.get("coords"),
                tuple(stretch) if stretch else None)] = None
        folder = newest_step(Path(run_flags.get("init") or ""))
    return list(sets)


@functools.cache
def load_training_set(training_set: TrainingSet) -> Records | None:
    """Its records, read once; None where they can't be read any more."""
    try:
        return data.load(*training_set)
    except DataError:
        return None


@dataclass
class Overlap:
    """What of the scored records a checkpoint was trained on."""

    shared: list[str | None]      # of each, as `data.find_shared`
    unread: list[str]             # training sets that can't be read any more


def training_overlap(stage: Stage, records: Sequence[Record]) -> Overlap:
    """Records that are scored and were trained on, by image and box."""
    training = []
    unread = []
    for training_set in training_sets(stage):
        loaded = load_training_set(training_set)
        if loaded is None:
            unread.append(f"{training_set.name} {training_set.split}")
        training += loaded or []
    return Overlap(data.find_shared(records, training), unread)


def overlap_scores(
        overlap: Overlap, records: Sequence[Record], predictions: "Predictions",
        inclusive: bool,
) -> dict[str, Any]:
    """How many records were trained on, and the scores of those that were not."""
    rest = [i for i, what in enumerate(overlap.shared) if what != "record"]
    found: dict[str, Any] = {
        "records": len(records) - len(rest),
        "images": len(records) - overlap.shared.count(None),
        "unread": overlap.unread,
    }
    if 0 < len(rest) < len(records):
        others = [records[i] for i in rest]
        boxes = strict_boxes(others, [predictions[i] for i in rest])
        found["rest"] = metrics.metrics(boxes, *metrics.targets(others), inclusive)
    return found


def print_overlap(row: Mapping[str, Any]) -> None:
    """Says where a row's records were trained on, and what the others score."""
    trained_on = row.get("trained_on")
    if not trained_on:
        return
    if trained_on["unread"]:
        print(f"{row['stage']}: its training data can't be read ({', '.join(trained_on['unread'])})"
              "; whether scored records are among it is not known")
    if trained_on["records"]:
        print(f"{row['stage']}: {trained_on['records']:,} of {row['n']:,} scored records were in "
              "its training data, by image and box")
    if "rest" in trained_on:
        rest = trained_on["rest"]
        print(f"{row['stage']}: the other {rest['n']:,}: mIoU {rest['mIoU']:.3f}, "
              f"Pr@0.5 {rest['Pr@0.5']:.3f}")


def evaluate(
        model: QwenVL, processor: Processor, records: Sequence[Record],
        sampling: Sampling = GREEDY, label: str = "eval",
) -> list[Prediction]:
    """A model's prediction for each record, in their order, the same on every process.

    Processes take records rank, rank + world, ... An answer depends on its record's
    place and the seed alone, not on its batch. Boxes are strict, clamped, in original
    pixels. A sharded model comes as `processes.gathered` yields it.

    label: of the progress bar."""
    shown = other_images(records) if sampling.blind else records
    places = range(processes.rank(), len(records), processes.world())
    batches = [places[i:i + sampling.batch] for i in range(0, len(places), sampling.batch)]
    predictions: list[Prediction] = []
    iou_sum = 0.0

    def make_prompt(i: int) -> Prompt | None:
        try:
            image = data.open_image(shown[i])
        except UnreadableImage:
            return None
        # Another image takes the size of the record's own, so that the frame, and all
        # else that is not seen, stays what it is.
        if sampling.blind:
            image = image.resize(records[i].size)
        return processor(image, records[i].text)

    bar = tqdm(total=len(places), desc=label, unit="rec", leave=False,
               disable=processes.rank() > 0)
    with ThreadPoolExecutor(8) as pool, bar:
        for batch, prompts in prompts_ahead(pool, make_prompt, batches):
            seeds = torch.tensor([sampling.seed * 1_000_003 + i for i in batch])
            asked = [records[i] for i in batch]
            answered = answer_records(model, processor, asked, prompts, sampling, seeds)
            for record, prediction in zip(asked, answered):
                predictions.append(prediction)
                if prediction["box"]:
                    box = torch.tensor(prediction["box"])
                    iou_sum += reward.agreement(box, torch.tensor(record.box)).item()
            bar.update(len(batch))
            bar.set_postfix(mIoU=f"{iou_sum / len(predictions):.3f}")
    return gather_predictions(predictions, len(records))


def prompts_ahead(
        pool: ThreadPoolExecutor, make_prompt: Callable[[int], Prompt | None],
        batches: Sequence[range],
) -> Iterator[tuple[range, list[Prompt | None]]]:
    """Batches of places -> each with its prompts, None where an image can't be decoded.

    Threads prepare the images of the next batch while this one is answered."""
    coming = pool.map(make_prompt, batches[0] if batches else ())
    for batch, next_batch in itertools.zip_longest(batches, batches[1:], fillvalue=()):
        prompts = list(coming)
        coming = pool.map(make_prompt, next_batch)
        yield batch, prompts


def answer_records(
        model: QwenVL, processor: Processor, records: Sequence[Record],
        prompts: Sequence[Prompt | None], sampling: Sampling, seeds: Tensor,
) -> list[Prediction]:
    """Q records, their prompts and seeds (Q,) -> Q predictions.

    A record whose image can't be decoded has no prompt: nothing is asked, and it is a miss."""
    readable = [q for q, prompt in enumerate(prompts) if prompt is not None]
    texts = {}
    if readable:
        asked = [prompts[q] for q in readable]
        groups = sample_texts(model, processor, asked, sampling, seeds[readable])
        texts = dict(zip(readable, groups))
    predictions = []
    for q, record in enumerate(records):
        prediction = unreadable_prediction(record)
        if q in texts:
            prediction = make_prediction(record, prompts[q].frame, texts[q])
        predictions.append(prediction)
    return predictions


def sample_texts(
        model: QwenVL, processor: Processor, prompts: Sequence[Prompt],
        sampling: Sampling, seeds: Tensor,
) -> list[list[str]]:
    """Q prompts, seeds (Q,) -> Q lists of `sampling.samples` texts."""
    tokens, _, lengths = generate(
        model, prompts, sampling.samples, sampling.max_new_tokens, sampling.temperature, seeds)
    groups = []
    for group, group_lengths in zip(tokens.cpu(), lengths.tolist()):  # (G, L), G
        groups.append([processor.decode(ids[:n]) for ids, n in zip(group, group_lengths)])
    return groups


def make_prediction(record: Record, frame: Frame, texts: Sequence[str]) -> Prediction:
    """All sampled texts of a record -> its prediction, which is the first one's."""
    box = locate(answer.parse_box(texts[0]), frame)
    prediction: Prediction = {
        "id": record.id, "text": texts[0], "box": box, "frame": asdict(frame)}
    if len(texts) > 1:
        prediction["samples"] = texts
    return prediction


def gather_predictions(predictions: list[Prediction], n: int) -> list[Prediction]:
    """Each process's share of n predictions -> all of them in the order of records."""
    if not dist.is_initialized():
        return predictions
    shares: list[Any] = [None] * processes.world()
    dist.all_gather_object(shares, predictions)
    return [shares[i % len(shares)][i // len(shares)] for i in range(n)]


def other_images(records: Sequence[Record]) -> list[Record]:
    """For each record the one whose image is shown in place of its own when blind.

    That is the record half the list further on, or the next with another image."""
    n = len(records)
    if len({record.image for record in records}) < 2:
        raise DataError("--blind needs records of at least two images; score more records")
    shown = []
    for i, record in enumerate(records):
        j = (i + n // 2) % n
        while records[j].image == record.image:
            j = (j + 1) % n
        shown.append(records[j])
    return shown


def validate(
        model: QwenVL, processor: Processor, records: Sequence[Record],
        args: argparse.Namespace,
) -> dict[str, float]:
    """Greedy scores on a few records during training -> what joins the log line.

    {} without records. args: the stage's flags; --data and --max-new-tokens count."""
    if not records:
        return {}
    longest = memory.longest_prompt(processor, records)
    sampling = Sampling(
        max_new_tokens=args.max_new_tokens, batch=memory.validation_batch(longest))
    with processes.gathered(model) as whole:
        predictions = evaluate(whole, processor, records, sampling, "val")
        row = score(records, predictions, args.data in INCLUSIVE)
    return {
        "val_mIoU": row["mIoU"],
        "val_Pr@0.5": row["Pr@0.5"],
        "val_failed": failed_share(row),
    }


def score(
        records: Sequence[Record], predictions: Predictions, inclusive: bool = False,
) -> dict[str, Any]:
    """N records and their predictions -> the scores of an eval.json row."""
    pairs = zip(predictions, records, strict=True)
    readings = [read_prediction(p, record) for p, record in pairs]
    target, size = metrics.targets(records)
    strict = metrics.tensor([reading.box for reading in readings])
    lenient = metrics.tensor([reading.lenient for reading in readings])
    failures = Counter(reading.failure for reading in readings)
    return {
        **metrics.metrics(strict, target, size, inclusive),
        "failures": {outcome: failures[outcome] for outcome in OUTCOMES},
        "lenient": metrics.metrics(lenient, target, size, inclusive),
    }


def failed_share(row: Mapping[str, Any]) -> float:
    """The share of a row's records that have no strict box."""
    return sum(row["failures"].values()) / row["n"]


def details(
        records: Sequence[Record], predictions: Predictions, name: str,
        train: Sequence[Record] | None, split: Sequence[Record],
) -> dict[str, Any]:
    """What else an eval.json row says of N predictions, beside `score`.

    name: of the data set. A record is compared with train, the records trained on (None:
    there are none), and split, all records of the split that these belong to.

    The numbers are the same on every process and from a predictions file, for the
    resampling is seeded."""
    inclusive = name in INCLUSIVE
    target, size = metrics.targets(records)
    overlap = metrics.overlaps(strict_boxes(records, predictions), target, size)
    properties = metrics.properties(records, train, split)
    row = {
        "ci": score_intervals(records, overlap, inclusive),
        "breakdowns": breakdowns(properties, overlap.iou, inclusive),
    }
    if name == "vrsbench":
        boxes = [vrsbench_box(p, record) for p, record in zip(predictions, records)]
        grid = metrics.tensor([record.grid for record in records])
        unique = [record.unique for record in records]
        row["vrsbench"] = metrics.vrsbench(
            metrics.tensor(boxes), target, size, unique, grid)
    if any(p and "samples" in p for p in predictions):
        samples = sampled_boxes(records, predictions)
        row |= metrics.sampled(samples, target, size, inclusive)
    return row


def score_intervals(
        records: Sequence[Record], overlap: metrics.Overlaps, inclusive: bool,
) -> dict[str, list[float]]:
    """Score -> its 95% interval [low, high]."""
    rates = {"mIoU": (overlap.iou, None)}
    for t in THRESHOLDS:
        rates[f"Pr@{t}"] = (metrics.hits(overlap.iou, t, inclusive).double(), None)
    rates["cIoU"] = (overlap.intersection, overlap.union)
    return metrics.intervals(records, rates)


def breakdowns(
        properties: Mapping[str, Sequence[str | None]], iou: Tensor, inclusive: bool,
) -> dict[str, dict[str, dict[str, float]]]:
    """Scores by the value of each property; a property that no record has is left out.

    properties: as `metrics.properties`; iou (N,)
    -> property -> value -> {"n", "mIoU", "Pr@0.5"}."""
    right = metrics.hits(iou, 0.5, inclusive).double()
    tables = {}
    for name, values in properties.items():
        places: dict[str, list[int]] = {}
        for i, value in enumerate(values):
            if value is not None:
                places.setdefault(value, []).append(i)
        table = {}
        for value in sorted(places):
            rows = places[value]
            table[value] = {"n": len(rows), "mIoU": iou[rows].mean().item(),
                            "Pr@0.5": right[rows].mean().item()}
        if table:
            tables[name] = table
    return tables


# ---------------------------------------------------------------- what eval.json says

# Every key of a row of eval.json in one sentence with its unit. "a/b" is key b within
# a; "*" is any key, of which the sentence says what it is.
ROW_KEYS = {
    "stage": "Name of the stage, or of the predictions file.",
    "checkpoint": "Folder of the checkpoint, or path of the predictions file.",
    "temperature": "Sampling temperature, 0 for greedy answers; null for a predictions file.",
    "data": "Name of the data set.",
    "split": "The split of the data set.",
    "data_hash":
        "16 hex characters that change with any id, text, box, category or size of the split's "
        "records.",
    "stretch":
        "Percentiles [low, high] that became black and white in images of 16 bits or floats; null "
        "where these are refused.",
    "blind": "True where each record was shown another record's image.",
    "refused/*": "Records of the split that are not usable, and not scored, for this reason.",
    "trained_on/records":
        "Scored records whose image and box (IoU 0.9 or more) were in the training data of this "
        "checkpoint or of one that it started from.",
    "trained_on/images": "Scored records whose image was.",
    "trained_on/unread": "Names of training data that could not be read any more.",
    "trained_on/rest/*":
        "The same score, mIoU to n, of the records that were not trained on, where some were.",
    "mIoU": "Mean IoU, 0 to 1; a record without a box has IoU 0.",
    **{f"Pr@{t}": f"Share of records whose IoU is above {t} (on opt: at least {t}), 0 to 1."
       for t in THRESHOLDS},
    "cIoU":
        "Sum of intersections over sum of unions, 0 to 1; a record without a box adds its "
        "target's area to the unions.",
    "center_error":
        "Mean distance of the box's centre from the target's, x in image widths and y in image "
        "heights, over sqrt(2), 0 to 1, of the records that have a box; null where none has.",
    "n": "Records scored.",
    "failures/*": "Records that have no box for this reason.",
    "lenient/*": "The same score, mIoU to n, of texts read by answer.parse_box_lenient.",
    "ci/*": "95% interval [low, high] of this score: percentile bootstrap over images.",
    "breakdowns/*/*/n": "Records that have this value of this property.",
    "breakdowns/*/*/mIoU": "Their mean IoU, 0 to 1.",
    "breakdowns/*/*/Pr@0.5": "Their Pr@0.5, 0 to 1.",
    "vrsbench/*/n":
        "Records of this part of VRSBench: all, unique (the target is the only object of its "
        "category in its image) or non_unique.",
    **{f"vrsbench/*/Acc@{t}":
       f"Share of this part with IoU of at least {t} in VRSBench's own metric, on whole "
       "hundredths of the image's sides, 0 to 1."
       for t in metrics.VRSBENCH_THRESHOLDS},
    "samples":
        "Answers to a record, the most that one has; pass and dispersion are of all, the rest is "
        "of the first.",
    "pass/*":
        "Chance that of this many answers the best has IoU above 0.5 (on opt: at least 0.5), "
        "mean over records, 0 to 1.",
    "dispersion":
        "How far the centres of a record's boxes scatter over its samples, in image sides, 0 to "
        "sqrt(1/2), mean of the records with two boxes or more; null where none has.",
}
# The same of eval.json itself, beside "rows".
FILE_KEYS = {
    "centre_box/*":
        "The same score, mIoU to n, of a box in the middle of each image, of the median width "
        "and height of the records' boxes.",
    "comparison/a": "Path of the first of two predictions files.",
    "comparison/b": "Path of the second of two predictions files.",
    "comparison/*/difference": "This score of the second file minus that of the first.",
    "comparison/*/ci":
        "95% interval [low, high] of the difference: bootstrap over images, the same for both.",
    "comparison/*/p": "Two-sided p of the difference, 0 to 1.",
}


class Source(NamedTuple):
    """Where a row's predictions come from: the first keys of the row."""

    stage: str
    checkpoint: str
    temperature: float | None     # None: predictions from a file


@dataclass
class Evaluation:
    """The rows of eval.json as they come, and what else the report shows."""

    eval_set: EvalSet
    train: list[Record] | None    # as `train_records`
    out: Path                     # folder of the report
    blind: bool
    summary: dict[str, Any]       # of eval.json beside "rows": see FILE_KEYS
    rows: list[dict[str, Any]] = field(default_factory=list)
    cases: list[list[page.Case]] = field(default_factory=list)       # of each row

    def file_suffix(self, source: Source) -> str:
        """What tells a row's files from those of others."""
        temperature = f"_T{source.temperature:g}" if source.temperature else ""
        return source.stage + temperature + ("_blind" if self.blind else "")


def add_row(
        evaluation: Evaluation, source: Source, predictions: Predictions,
        overlap: Overlap | None = None, stretch: Stretch | None = None,
) -> None:
    """Scores predictions; the first process writes eval.json so far, and a picture.

    overlap: with the training data, where that is known. stretch: what the images were seen
    by."""
    eval_set = evaluation.eval_set
    records = with_stretch(eval_set.scored, stretch)
    trained_on = {}
    if overlap:
        trained_on["trained_on"] = overlap_scores(
            overlap, records, predictions, eval_set.inclusive)
    evaluation.rows.append({
        **source._asdict(),
        "data": eval_set.name,
        "split": eval_set.split,
        "data_hash": eval_set.records.hash,
        "stretch": records[0].stretch,
        "blind": evaluation.blind,
        "refused": eval_set.records.refusals,
        **trained_on,
        **score(records, predictions, eval_set.inclusive),
        **details(records, predictions, eval_set.name, evaluation.train, eval_set.records),
    })
    if processes.rank() == 0:
        content = {"rows": evaluation.rows, **evaluation.summary}
        text = json.dumps(content, indent=2) + "\n"
        (evaluation.out / "eval.json").write_text(text, encoding="utf-8")
        cases = judge(records, predictions)
        evaluation.cases.append(cases)
        sheet = evaluation.out / f"overlays_{evaluation.file_suffix(source)}.png"
        draw_cases(cases).save(sheet)


def judge(records: Sequence[Record], predictions: Predictions) -> list[page.Case]:
    """N records and their predictions -> what the report shows of each."""
    ious = strict_iou(records, predictions).tolist()
    cases = []
    for record, prediction, iou in zip(records, predictions, ious):
        box = read_prediction(prediction, record).box
        text = (prediction or {}).get("text", "")
        cases.append(page.Case(record, box, iou, text))
    return cases


def draw_cases(cases: Sequence[page.Case], n: int = 12) -> Image.Image:
    """A sheet of n cases at most, evenly spread: target green, answer red."""
    drawn = []
    for record, box, iou, _ in pictures.spread(cases, n):
        boxes = [(record.box, "lime")]
        if box:
            boxes.append((box, "red"))
        caption = f"{record.text}: {f'IoU {iou:.2f}' if box else 'no box'}"
        drawn.append(pictures.draw_boxes(data.open_or_blank(record), boxes, caption))
    return pictures.contact_sheet(drawn)


# ---------------------------------------------------------------- on the terminal

def print_table(rows: Sequence[Mapping[str, Any]], guess: Mapping[str, Any]) -> None:
    """A line a row, the guess that looks at nothing, and why answers give no box."""
    rates = [f"Pr@{t}" for t in THRESHOLDS]
    head = ["mIoU", *rates, "cIoU", "center", "failed", "lenient: mIoU", "Pr@0.5"]
    width = max(12, *(len(row["stage"]) for row in rows))
    columns = " ".join(f"{name:>6}" for name in head)
    print(f"{'stage':{width}} {'T':>4} {'n':>6} {columns}")
    for row in rows:
        scores = [
            row["mIoU"], *(row[rate] for rate in rates), row["cIoU"], row["center_error"],
            failed_share(row), row["lenient"]["mIoU"], row["lenient"]["Pr@0.5"]]
        cells = " ".join(table_cell(value, name) for name, value in zip(head, scores))
        temperature = "" if row["temperature"] is None else f"{row['temperature']:g}"
        blind = "  (blind)" if row["blind"] else ""
        print(f"{row['stage']:{width}} {temperature:>4} {row['n']:>6} {cells}{blind}")
    print("a box of the median size in the middle of each image: "
          f"mIoU {guess['mIoU']:.3f}, Pr@0.5 {guess['Pr@0.5']:.3f}")
    for row in rows:
        failures = ", ".join(f"{why} {n}" for why, n in row["failures"].items() if n)
        temperature = "" if row["temperature"] is None else f" T={row['temperature']:g}"
        if failures:
            print(f"{row['stage']}{temperature}: {failures}")


def table_cell(value: float | None, name: str) -> str:
    """A score under its column's name, "-" where there is none."""
    width = max(6, len(name))
    return "-".rjust(width) if value is None else f"{value:{width}.3f}"


def print_comparison(comparison: Mapping[str, Any]) -> None:
    for name, test in comparison.items():
        if isinstance(test, dict):
            low, high = test["ci"]
            print(f"B - A: {name} {test['difference']:+.3f} "
                  f"(95% {low:+.3f} to {high:+.3f}), p {test['p']:.3f}")


# ---------------------------------------------------------------- one question about one picture

def ask(stage: Stage, device: torch.device, args: argparse.Namespace) -> None:
    """Asks for --text in --image: prints reasoning and box, and draws the box."""
    path = Path(args.image)
    stretch = args.stretch or stage_flags(stage).get("stretch")
    image, turned = open_picture(path, stretch)
    out = processes.check_writable(args.out or Path(args.ckpt) / "eval")
    model, processor = checkpoints.open_model(stage.folder, device)
    prompt = processor(image, args.text)
    print_if_shrunk(path, prompt.frame, processor)
    sampling = Sampling(args.temperature[0], max_new_tokens=args.max_new_tokens)
    seeds = torch.tensor([args.seed])
    [[text]] = sample_texts(model, processor, [prompt], sampling, seeds)
    print(f"{stage.name}: {text}")
    strict = locate(answer.parse_box(text), prompt.frame)
    box = strict or locate(answer.parse_box_lenient(text), prompt.frame)
    if not box:
        print(f"no box: {answer.failure(text) or 'outside image'}")
        return
    drawing = out / f"{path.stem}_answer.png"
    pictures.overlay(image, [(box, args.text[:60], RED)], drawing)
    upright = ", turned upright as its EXIF says" if turned else ""
    numbers = ", ".join(f"{v:.1f}" for v in box)
    leniently = "" if strict else " (read leniently)"
    print(f"box in pixels of the picture{upright}: {numbers}{leniently}")
    print(f"drawn: {drawing}")


def open_picture(path: Path, stretch: Stretch | None = None) -> tuple[Image.Image, bool]:
    """A picture's file -> RGB image, and whether it was turned, as its EXIF says.

    Viewers turn it too, and the question speaks of what one sees. (A data set's images
    are taken as stored, see `data.open_image`.)"""
    try:
        orientation = images.read_orientation(path)
        image = images.read_rgb(path, stretch)
        image.getexif()[ExifTags.Base.Orientation] = orientation
        return ImageOps.exif_transpose(image), orientation != 1
    except (OSError, ImageError) as error:
        raise DataError(f"--image {path}: unreadable ({error})") from None


def print_if_shrunk(path: Path, frame: Frame, processor: Processor) -> None:
    """Warns where the picture has more pixels than the model takes."""
    width, height = frame.original
    resized_width, resized_height = frame.resized
    unit = processor.patch * processor.merge
    if round(width / unit) * round(height / unit) * unit ** 2 > processor.max_pixels:
        print(f"{path} has {width} x {height} pixels, more than the model's limit of "
              f"{processor.max_pixels:,}: it is shrunk to {resized_width} x {resized_height}, and "
              "small objects may be lost; cut it into parts to keep them")


# ---------------------------------------------------------------- the whole evaluation

def main() -> None:
    args = flags().parse_args()
    # An answer, or a path, may hold what no encoding has.
    sys.stdout.reconfigure(errors="backslashreplace")
    check_flags(args)
    files = args.compare or ([args.predictions] if args.predictions else [])
    device = None if files else processes.start(processes.choose_device(args.device))
    stages = find_stages(args.ckpt) if args.ckpt else []
    if args.image:
        ask(stages[-1], device, args)
        return
    eval_set = load_eval_set(args, stages)
    file_predictions = read_files(files, eval_set, args.coords, stages)
    train = train_records(eval_set)
    # A folder that can't be written to is said before anything is computed that could
    # be lost.
    out = processes.check_writable(output_folder(args, files))
    summary = {"centre_box": metrics.centre_box(eval_set.scored)}
    evaluation = Evaluation(eval_set, train, out, args.blind, summary)
    if files:
        score_files(evaluation, files, file_predictions)
    else:
        score_stages(evaluation, stages, device, args)
    if processes.rank() == 0:
        finish(evaluation, [] if files else stages)
        print(f"report, pictures{'' if files else ', predictions'}: {out}")


def output_folder(args: argparse.Namespace, files: Sequence[str]) -> Path:
    """--out, else a folder beside the first file, else one in the checkpoint's."""
    if args.out:
        return Path(args.out)
    if not files:
        return Path(args.ckpt) / "eval"
    names = [str(Path(files[0]).with_suffix("")), *(Path(file).stem for file in files[1:])]
    return Path("_vs_".join(names))


def read_files(
        files: Sequence[str], eval_set: EvalSet, coords: str | None,
        stages: Sequence[Stage],
) -> list[dict[str, Prediction]]:
    """Predictions files -> each as `read_predictions`."""
    processor = None
    if coords == "resized":
        processor = Processor.from_pretrained(stages[-1].folder)
    return [read_predictions(file, eval_set.records, coords, processor) for file in files]


def score_files(
        evaluation: Evaluation, files: Sequence[str],
        file_predictions: Sequence[Mapping[str, Prediction]],
) -> None:
    """A row for each predictions file; of two, the comparison as well."""
    records = evaluation.eval_set.scored
    sides = []
    for predictions in file_predictions:
        sides.append([predictions.get(record.id) for record in records])
    if len(files) == 2:
        a, b = (strict_iou(records, side) for side in sides)
        tests = metrics.paired(records, a, b, evaluation.eval_set.inclusive)
        evaluation.summary["comparison"] = {"a": files[0], "b": files[1], **tests}
    stems = [Path(file).stem.removeprefix("predictions_") for file in files]
    for file, stem, side in zip(files, stems, sides):
        # Two files of one name are told apart by their folders.
        folder = Path(file).resolve().parent.name
        name = stem if stems.count(stem) == 1 else f"{folder}_{stem}"
        add_row(
            evaluation, Source(name, file, None), side,
            stretch=evaluation.eval_set.reading.stretch)


def score_stages(
        evaluation: Evaluation, stages: Sequence[Stage], device: torch.device,
        args: argparse.Namespace,
) -> None:
    """A row for each checkpoint and temperature; predictions are written as well."""
    for stage in stages:
        # A stage sees images as it was trained to.
        stretch = args.stretch or stage_flags(stage).get("stretch")
        stretch = stretch or evaluation.eval_set.reading.stretch
        records = with_stretch(evaluation.eval_set.scored, stretch)
        model, processor = checkpoints.open_model(stage.folder, device)
        if processes.rank() == 0:
            print_if_other_prompt(stage)
        overlap = training_overlap(stage, records)
        for temperature in args.temperature:
            # Greedy answers are all the same: one is enough.
            samples = args.samples if temperature else 1
            sampling = Sampling(
                temperature, samples, args.max_new_tokens, args.batch, args.seed, args.blind)
            label = f"{stage.name} T={temperature:g}"
            predictions = evaluate(model, processor, records, sampling, label)
            source = Source(stage.name, str(stage.folder), temperature)
            if processes.rank() == 0:
                lines = "".join(json.dumps(p) + "\n" for p in predictions)
                file = f"predictions_{evaluation.file_suffix(source)}.jsonl"
                (evaluation.out / file).write_text(lines, encoding="utf-8")
            add_row(evaluation, source, predictions, overlap, stretch)
        # Its memory is free before the next one is loaded.
        del model


def print_if_other_prompt(stage: Stage) -> None:
    """Warns where the checkpoint was trained to answer another prompt than ours."""
    if read_run(stage).get("prompt_hash", prompt_hash()) != prompt_hash():
        print(f"{stage.folder}: trained with another prompt than answer.PROMPT; "
              "expect lower scores")


def finish(evaluation: Evaluation, stages: Sequence[Stage]) -> None:
    """Writes report.html and prints the scores.

    stages: those whose training is shown."""
    eval_set = evaluation.eval_set
    training = []
    for stage in stages:
        # A downloaded checkpoint lies in no stage's folder.
        trained_here = (stage.folder / "run.json").exists()
        folder = stage.folder.resolve().parent if trained_here else stage.folder
        training.append((stage.name, folder))
    known_records = [*(evaluation.train or ()), *eval_set.records]
    page.write_page(
        evaluation.out / "report.html", evaluation.rows, evaluation.cases, training,
        known_records, evaluation.summary)
    print_table(evaluation.rows, evaluation.summary["centre_box"])
    for row in evaluation.rows:
        print_overlap(row)
    if eval_set.refused:
        print(f"not scored: {eval_set.refused}")
    print_comparison(evaluation.summary.get("comparison", {}))


if __name__ == "__main__":
    runtime.main(main)
