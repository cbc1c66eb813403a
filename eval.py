"""Evaluation: scores every stage, or anyone's predictions, in one table.

Records -> a prediction for each, from a model (`evaluate`) or a file -> a row of scores
(`score_predictions`, `details`) -> a table on the terminal, and in one folder eval.json,
report.html, predictions and pictures. docs/logs.md explains the keys of eval.json.

Boxes are clamped to the image and compared in pixels of the original image, as floats (no +1
pixel). A box counts if IoU > t, as in DIOR-RSVG's evaluation (IoU >= t on opt, as in
OPT-RSVG's); DIOR-RSVG's script also cuts the true boxes to whole pixels at its 640 px
letterbox, which is not copied here. Every record counts: an answer without a box has IoU 0.
Columns "lenient" read the same answers with `answer.parse_box_lenient`, for models that were
not trained on our format. Intervals are 95% bootstraps over images.

    python eval.py ckpt/                           greedy, on the data set of training, split test
    python eval.py ckpt/ --temperature 0 1         greedy and sampled, a row each
    torchrun --nproc_per_node 8 eval.py ckpt/rft   the same report from eight GPUs
    python eval.py ckpt/ --temperature 1 --samples 8               adds pass@k and dispersion
    python eval.py ckpt/ --image scene.jpg --text "the white plane left of the hangar"
    python eval.py --predictions theirs.jsonl --data dior --coords original
    python eval.py --compare a.jsonl b.jsonl --data dior           is B better than A?

A predictions file has one line per record: {"id": ..., "text": ...} or {"id": ..., "box":
[x1, y1, x2, y2] or null}. The line's "frame" (our own files have it) or --coords gives the
coordinates of a text. A box is in original pixels unless --coords says otherwise.
"""
import argparse
import functools
import json
import math
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import ExifTags, ImageOps
from torch import Tensor
from tqdm import tqdm

import data
from model import QwenVL
from qwen import answer
from qwen.answer import locate
from qwen.generate import generate
from qwen.hub import CheckpointError, by_number, is_checkpoint, newest_step
from qwen.processor import Processor, Prompt, prompt_hash
from readers.base import COORDS, DataError, Record, Records, UnreadableImage, read_json
from readers.images import ImageError, read_orientation, read_rgb
from report import metrics, page, pictures
from report.metrics import THRESHOLDS
from report.predictions import (
    UNREADABLE,
    Prediction,
    Predictions,
    read_prediction,
    read_predictions,
    sampled_boxes,
    strict_boxes,
    strict_iou,
    vrsbench_box,
)
from reward import agreement
from train import dist, memory
from train.ahead import ahead
from train.checkpoints import open_model
from train.dist import check_writable, fail, gather_lists, gathered, rank, world
from train.flags import FlagParser, add_device_flag, positive
from train.run import launch

INCLUSIVE = ("opt",)              # data sets that count IoU >= t
OUTCOMES = (*answer.FAILURES, "outside image", "no prediction", UNREADABLE)
STAGE_ORDER = ("base", "pretrain", "direct", "sft", "rft")      # in the table; others follow
RED = (255, 64, 64)


# ---------------------------------------------------------------- flags

def flags() -> FlagParser:
    parser = FlagParser(
        "Scores every stage found in a folder, or anyone's predictions: a table, eval.json, "
        "report.html, predictions, pictures.")
    add = parser.add_argument
    add("ckpt", nargs="?", help="folder of a checkpoint, of a stage, or of several stages")
    add("--data", help="data set; default: the one recorded in the checkpoint, else synth")
    add("--root", help="its folder; default: as recorded, else data/<name>")
    add("--split", default="test", help="of the data set")
    add("--limit", type=positive, help="score the first LIMIT records only")
    add("--out", help="folder of the report; default CKPT/eval, or named after the predictions")
    add("--temperature", type=float, nargs="+", default=[0.0], help="one row each; 0 is greedy")
    add("--samples", type=positive, default=1, help="answers to each record at a temperature "
        "above 0, for pass@k and dispersion; all other scores use the first")
    add("--max-new-tokens", type=positive, default=256, help="of an answer with its reasoning")
    add("--batch", type=positive, default=32, help="records answered at once")
    add("--blind", action="store_true", help="show another record's image: a score without sight")
    add("--predictions", help='score this JSONL file instead of a model; one line per record: '
        '{"id": ..., "text": ...} or {"id": ..., "box": [x1, y1, x2, y2] or null}')
    add("--compare", nargs=2, metavar=("A", "B"),
        help="score two JSONL files and test whether B differs from A (paired bootstrap)")
    add("--image", help="a picture's file, turned upright by its EXIF: answer --text about it, "
        "print the answer and draw its box")
    add("--text", help="what to look for in --image; the last stage in CKPT answers")
    add("--coords", choices=("original", "resized", "1000", "fraction"),
        help="coordinates of predictions, both boxes and texts without a frame: pixels of the "
        "original image, pixels of the image as CKPT's processor resizes it, thousandths or "
        "fractions of its sides; without predictions, and with --data: as --data-coords")
    # Their defaults are the flags that the checkpoint was trained with.
    data.add_reading_flags(add, "--data-coords")
    add("--seed", type=int, default=0, help="of sampling")
    add_device_flag(add)
    return parser


def refuse_mistakes(args: argparse.Namespace) -> None:
    """Ends the script if flags do not go together."""
    files = args.predictions or args.compare
    several = args.samples > 1 or len(args.temperature) > 1 or world() > 1
    if args.coords and not files and args.data and args.coords in COORDS:
        args.data_coords = args.data_coords or args.coords
        args.coords = None
    mistakes = (
        (not args.ckpt and not files,
         "name a checkpoint's folder (python eval.py ckpt/), or a file with --predictions"),
        (args.predictions and args.compare,
         "--predictions scores one file, --compare two; name one of them"),
        (bool(args.image) != bool(args.text),
         "--image and --text go together: a picture's file, and what to look for in it"),
        (args.image and (not args.ckpt or files or args.blind or several),
         "--image asks one checkpoint once: one process, one --temperature, no --predictions, "
         "--compare, --samples or --blind"),
        (args.samples > 1 and (files or not max(args.temperature) > 0),
         f"--samples {args.samples} needs a checkpoint and a --temperature above 0: greedy answers "
         "are all the same"),
        (args.coords == "resized" and not args.ckpt,
         "--coords resized needs a checkpoint, because its processor resizes the images: python "
         'eval.py CKPT --predictions ...; or give each line its "frame"'),
        (args.coords and not files,
         "--coords is about a file given with --predictions, or about the boxes of --data NAME: "
         f"{', '.join(COORDS)}"),
        (files and (args.blind or args.temperature != [0.0]),
         "predictions are scored as they are; --blind and --temperature belong to a checkpoint"),
        (not all(0 <= t < math.inf for t in args.temperature)
         or len(set(args.temperature)) < len(args.temperature),
         f"--temperature {args.temperature}: give numbers from 0 up, each once"))
    for is_mistake, message in mistakes:
        if is_mistake:
            fail(message)


# ---------------------------------------------------------------- checkpoints and records

class Stage(NamedTuple):
    """A checkpoint to evaluate."""

    name: str
    folder: Path
    run: dict[str, Any]           # its run.json; {} for a downloaded one


def find_stages(path: str | Path) -> list[Stage]:
    """A checkpoint or a stage -> itself; another folder -> every stage in it."""
    path = Path(path)
    if is_checkpoint(path):
        here = path.resolve()
        name = f"{here.parent.name}_{here.name}" if here.name.startswith("step_") else here.name
        return [Stage(name, path, read_json(path / "run.json") or {})]
    folders = path.iterdir() if path.is_dir() else ()
    stages = []
    for folder in [path] if is_checkpoint(path / "latest") else folders:
        step = newest_step(folder)
        if is_checkpoint(step):
            # "latest" is a link; the step's own name is shown.
            step = folder if step == folder else folder / step.resolve().name
            run_json = read_json(step / "run.json") or {}
            stages.append(Stage(folder.name or folder.resolve().name, step, run_json))
    if not stages:
        raise CheckpointError(
            f"no checkpoint at {path}: it has no config.json, no latest/config.json, and no folder "
            "with one of them; train one with sft.py, or name a downloaded one")
    order = {name: k for k, name in enumerate(STAGE_ORDER)}
    return sorted(stages, key=lambda s: (order.get(s.name, len(order)), by_number(s.name)))


def load_split(
        args: argparse.Namespace, stages: Sequence[Stage],
) -> tuple[Records, list[Record] | None, dict[str, Any]]:
    """-> all usable records of the split, those trained on, and how both were read.

    Without --data and --root, fills in those that the last stage was trained on. The records
    trained on are None if this split is itself trained on, or without a train split.
    """
    recorded = next((stage.run for stage in reversed(stages) if "data" in stage.run), {})
    args.data = args.data or recorded.get("data", "synth")
    how = {"coords": args.data_coords, "stretch": args.stretch}
    if recorded.get("data") == args.data:
        args.root = args.root or recorded.get("root")
        trained_with = recorded.get("flags") or {}
        how = {flag: value or trained_with.get(flag) for flag, value in how.items()}
    records = data.load(args.data, args.root, args.split, **how)
    if not records:
        refused = data.refusal_summary(records, args.data, args.root, args.split)
        raise DataError(f"no usable record in the split {args.split} of {args.data}: "
                        f"{refused or 'it is empty'}")
    train = None
    if args.split not in ("train", "sft", "rft"):
        # Validation records may be held out of "train"; SFT never sees them.
        split = "sft" if args.split == "val" else "train"
        with suppress(DataError):
            train = list(data.load(args.data, args.root, split, **how))
    return records, train, how


load_once = functools.cache(data.load)           # stages may share training data


def training_overlap(
        stage: Stage, records: Sequence[Record], predictions: Predictions, inclusive: bool,
) -> dict[str, Any]:
    """How many records this run, or a run it started from, was trained on; scores of the rest.

    "records" counts by image and box, "images" by image alone (`data.find_shared`).
    """
    training, unread, sources, seen = [], [], set(), set()
    folder, run_json = stage.folder, stage.run
    while run_json and folder.resolve() not in seen:
        seen.add(folder.resolve())
        trained_with = run_json.get("flags") or {}
        split = trained_with.get("split", "rft")                   # rft.py has no --split
        stretch = trained_with.get("stretch")
        source = (run_json.get("data"), run_json.get("root"), split, trained_with.get("coords"),
                  tuple(stretch) if stretch else None)
        if "data" in run_json and source not in sources:
            sources.add(source)
            try:
                training += load_once(*source)
            except DataError:
                unread.append(f"{run_json['data']} {split}")
        folder = newest_step(Path(trained_with.get("init") or ""))
        run_json = read_json(folder / "run.json")
    shared = data.find_shared(records, training)
    rest = [i for i, what in enumerate(shared) if what != "record"]
    found = {"records": len(records) - len(rest), "images": len(records) - shared.count(None),
             "unread": unread}
    if 0 < len(rest) < len(records):
        others = [records[i] for i in rest]
        boxes = strict_boxes(others, [predictions[i] for i in rest])
        found["rest"] = metrics.metrics(boxes, *metrics.targets(others), inclusive)
    return found


# ---------------------------------------------------------------- a model's answers

def evaluate(
        model: QwenVL, processor: Processor, records: Sequence[Record], *,
        temperature: float = 0.0, samples: int = 1, max_new_tokens: int = 256, batch: int = 32,
        seed: int = 0, blind: bool = False, label: str = "eval",
) -> list[Prediction]:
    """A model's prediction for each record, in order, the same on every process.

    Each process answers records rank, rank + world, ... An answer depends on its record's place
    and the seed, not on its batch. Boxes are strict, clamped, in original pixels. A sharded
    model must be gathered (`train.dist.gathered`). label: of the progress bar.
    """
    n = len(records)
    shown = list(records)
    for i, record in enumerate(records if blind else ()):
        # The record half the list further on lends its image, or the next one with another.
        later = (records[(i + n // 2 + k) % n] for k in range(n))
        shown[i] = next((other for other in later if other.image != record.image), None)
    if None in shown:
        raise DataError("--blind needs records of at least two images; score more records")
    places = range(rank(), n, world())
    batches = [places[i:i + batch] for i in range(0, len(places), batch)]

    def make_prompts(places: range) -> dict[int, Prompt]:
        prompts = {}
        for i in places:
            try:
                image = data.open_image(shown[i])
            except UnreadableImage:
                continue                         # a miss, see below
            # With --blind the record's size is kept, so the prompt stays the same.
            image = image.resize(records[i].size) if blind else image
            prompts[i] = processor(image, records[i].text)
        return prompts

    own: dict[int, Prediction] = {}              # by place
    iou = 0.0
    with tqdm(total=len(places), desc=label, unit="rec", leave=False, disable=rank() > 0) as bar:
        for prompts, answered in zip(ahead(make_prompts, batches), batches):
            for i in answered:
                own[i] = {"id": records[i].id, "box": None, "failure": UNREADABLE}
            seeds = torch.tensor([seed * 1_000_003 + i for i in prompts])
            groups = sample_texts(
                model, processor, list(prompts.values()), seeds, samples, max_new_tokens,
                temperature)
            for (i, prompt), texts in zip(prompts.items(), groups):
                box = locate(answer.parse_box(texts[0]), prompt.frame)
                own[i] = {"id": records[i].id, "text": texts[0], "box": box,
                          "frame": asdict(prompt.frame)}
                if samples > 1:
                    own[i]["samples"] = texts
                if box:
                    iou += agreement(torch.tensor(box), torch.tensor(records[i].box)).item()
            bar.update(len(answered))
            bar.set_postfix(mIoU=f"{iou / len(own):.3f}")
    everyone = dict(gather_lists(list(own.items())))
    return [everyone[i] for i in range(n)]


def sample_texts(
        model: QwenVL, processor: Processor, prompts: Sequence[Prompt], seeds: Tensor,
        samples: int, max_new_tokens: int, temperature: float,
) -> list[list[str]]:
    """Q prompts, seeds (Q,) -> Q lists of `samples` texts."""
    if not prompts:
        return []
    tokens, _, lengths = generate(model, prompts, samples, max_new_tokens, temperature, seeds)
    groups = []
    for group, group_lengths in zip(tokens.cpu(), lengths.tolist()):  # (G, L), G
        groups.append([processor.decode(ids[:n]) for ids, n in zip(group, group_lengths)])
    return groups


def validate(
        model: QwenVL, processor: Processor, records: Sequence[Record], args: argparse.Namespace,
) -> dict[str, float]:
    """Greedy scores during training -> keys of the stage's log line; {} without records."""
    if not records:
        return {}
    longest = memory.longest_prompt(processor, records)
    with gathered(model) as whole:
        predictions = evaluate(
            whole, processor, records, max_new_tokens=args.max_new_tokens,
            batch=memory.validation_batch(longest), label="val")
    row = score_predictions(records, predictions, args.data in INCLUSIVE)
    failed = sum(row["failures"].values()) / row["n"]
    return {"val_mIoU": row["mIoU"], "val_Pr@0.5": row["Pr@0.5"], "val_failed": failed}


# ---------------------------------------------------------------- a row of eval.json

def score_predictions(
        records: Sequence[Record], predictions: Predictions, inclusive: bool = False,
) -> dict[str, Any]:
    """N records and their predictions -> scores, strict and lenient, and reasons for no box."""
    pairs = zip(predictions, records, strict=True)
    strict, lenient, failures = zip(*(read_prediction(p, record) for p, record in pairs))
    target, size = metrics.targets(records)
    counts = Counter(failures)
    return {
        **metrics.metrics(metrics.box_tensor(strict), target, size, inclusive),
        "failures": {outcome: counts[outcome] for outcome in OUTCOMES},
        "lenient": metrics.metrics(metrics.box_tensor(lenient), target, size, inclusive),
    }


def details(
        records: Sequence[Record], predictions: Predictions, name: str,
        train: Sequence[Record] | None, split: Sequence[Record],
) -> dict[str, Any]:
    """The rest of a row: intervals, breakdowns, VRSBench's own metric, scores of samples.

    name: of the data set; train, split: as in `metrics.properties`. Resampling is seeded, so
    every process, and a rescored predictions file, gives the same numbers.
    """
    inclusive = name in INCLUSIVE
    target, size = metrics.targets(records)
    overlap = metrics.overlaps(strict_boxes(records, predictions), target, size)
    rates = {"mIoU": (overlap.iou, None)}
    for t in THRESHOLDS:
        rates[f"Pr@{t}"] = (metrics.hits(overlap.iou, t, inclusive).double(), None)
    rates["cIoU"] = (overlap.intersection, overlap.union)
    properties = metrics.properties(records, train, split)
    row = {"ci": metrics.intervals(records, rates),
           "breakdowns": metrics.breakdowns(properties, overlap.iou, inclusive)}
    if name == "vrsbench":
        boxes = [vrsbench_box(p, record) for p, record in zip(predictions, records)]
        row["vrsbench"] = metrics.vrsbench(
            metrics.box_tensor(boxes), target, size, [record.unique for record in records],
            metrics.box_tensor([record.grid for record in records]))
    if any(p and "samples" in p for p in predictions):
        row |= metrics.sampled(sampled_boxes(records, predictions), target, size, inclusive)
    return row


def print_report(
        rows: Sequence[Mapping[str, Any]], summary: Mapping[str, Any], refused: str) -> None:
    """The table of scores; why answers have no box; training overlap; the comparison."""
    rates = ["mIoU", *(f"Pr@{t}" for t in THRESHOLDS), "cIoU"]
    head = [*rates, "center", "failed", "lenient: mIoU", "Pr@0.5"]
    width = max(12, *(len(row["stage"]) for row in rows))
    print(f"{'stage':{width}} {'T':>4} {'n':>6}", *(f"{name:>6}" for name in head))
    notes, overlaps = [], []
    for row in rows:
        stage, n, lenient = row["stage"], row["n"], row["lenient"]
        failures = {why: count for why, count in row["failures"].items() if count}
        scores = [*(row[rate] for rate in rates), row["center_error"],
                  sum(failures.values()) / n, lenient["mIoU"], lenient["Pr@0.5"]]
        temperature = "" if row["temperature"] is None else f"{row['temperature']:g}"
        line = f"{stage:{width}} {temperature:>4} {n:>6}"
        for name, value in zip(head, scores):
            cell = "-" if value is None else f"{value:.3f}"
            line += f" {cell:>{max(6, len(name))}}"
        print(line + ("  (blind)" if row["blind"] else ""))
        if failures:
            at = f" T={temperature}" if temperature else ""
            notes.append(f"{stage}{at}: {', '.join(f'{k} {v}' for k, v in failures.items())}")
        known = row.get("trained_on", {})
        if known.get("unread"):
            overlaps.append(
                f"{stage}: its training data can't be read ({', '.join(known['unread'])}); "
                "whether it contains scored records is unknown")
        if known.get("records"):
            overlaps.append(f"{stage}: {known['records']:,} of {n:,} scored records were in its "
                            "training data, by image and box")
        if "rest" in known:
            rest = known["rest"]
            overlaps.append(f"{stage}: the other {rest['n']:,}: mIoU {rest['mIoU']:.3f}, "
                            f"Pr@0.5 {rest['Pr@0.5']:.3f}")
    notes += overlaps
    if refused:
        notes.append(f"not scored: {refused}")
    for name, test in summary.get("comparison", {}).items():
        if isinstance(test, dict):               # the other entries are the files' paths
            low, high = test["ci"]
            notes.append(f"B - A: {name} {test['difference']:+.3f} "
                         f"(95% {low:+.3f} to {high:+.3f}), p {test['p']:.3f}")
    guess = summary["centre_box"]
    print("a box of the median size in the middle of each image: "
          f"mIoU {guess['mIoU']:.3f}, Pr@0.5 {guess['Pr@0.5']:.3f}")
    print("".join(note + "\n" for note in notes), end="")


# ---------------------------------------------------------------- one question about one picture

def ask(stage: Stage, device: torch.device, args: argparse.Namespace) -> None:
    """Asks for --text in --image: prints reasoning and box, and draws the box."""
    path = Path(args.image)
    stretch = args.stretch or (stage.run.get("flags") or {}).get("stretch")
    try:
        # Viewers turn a picture upright, and the question is about what the user sees. (Images
        # of a data set are used as stored, see `data.open_image`.)
        orientation = read_orientation(path)
        image = read_rgb(path, stretch)
        image.getexif()[ExifTags.Base.Orientation] = orientation
        image = ImageOps.exif_transpose(image)
    except (OSError, ImageError) as error:
        raise DataError(f"--image {path}: unreadable ({error})") from None
    out = check_writable(args.out or Path(args.ckpt) / "eval")
    model, processor = open_model(stage.folder, device)
    prompt = processor(image, args.text)
    width, height = image.size
    resized_width, resized_height = prompt.frame.resized
    unit = processor.patch * processor.merge
    if round(width / unit) * round(height / unit) * unit ** 2 > processor.max_pixels:
        print(f"{path} has {width} x {height} pixels, more than the model's limit of "
              f"{processor.max_pixels:,}: it is shrunk to {resized_width} x {resized_height}, and "
              "small objects may be lost; cut it into parts to keep them")
    [[text]] = sample_texts(
        model, processor, [prompt], torch.tensor([args.seed]), 1, args.max_new_tokens,
        args.temperature[0])
    print(f"{stage.name}: {text}")
    strict = locate(answer.parse_box(text), prompt.frame)
    box = strict or locate(answer.parse_box_lenient(text), prompt.frame)
    if not box:
        print(f"no box: {answer.failure(text) or 'outside image'}")
        return
    drawing = out / f"{path.stem}_answer.png"
    pictures.overlay(image, [(box, args.text[:60], RED)], drawing)
    upright = "" if orientation == 1 else ", turned upright by its EXIF"
    print(f"box in pixels of the picture{upright}: {', '.join(f'{v:.1f}' for v in box)}"
          f"{'' if strict else ' (read leniently)'}\ndrawn: {drawing}")


# ---------------------------------------------------------------- the whole evaluation

def all_predictions(
        args: argparse.Namespace, files: Sequence[str], stages: Sequence[Stage],
        records: Records, stretch: Sequence[float] | None, device: torch.device | None,
) -> Iterator[tuple[Stage | None, dict[str, Any], list[Record], Predictions]]:
    """Yields a stage (None for a file), the first keys of its row, records and predictions:
    for each file, or for each stage at each temperature. stretch: if a stage recorded none."""
    scored = list(records)[:args.limit]
    processor = None
    if args.coords == "resized":
        processor = Processor.from_pretrained(stages[-1].folder)
    stems = [Path(file).stem.removeprefix("predictions_") for file in files]
    for file, stem in zip(files, stems):
        by_id = read_predictions(file, records, args.coords, processor)
        # Folders distinguish two files of one name.
        name = stem if stems.count(stem) == 1 else f"{Path(file).resolve().parent.name}_{stem}"
        head = {"stage": name, "checkpoint": file, "temperature": None}
        yield None, head, scored, [by_id.get(record.id) for record in scored]
    for stage in () if files else stages:
        # A stage sees images as it was trained to.
        own = args.stretch or (stage.run.get("flags") or {}).get("stretch") or stretch
        own = tuple(own) if own else None
        seen = [replace(record, stretch=own) for record in scored]
        model, processor = open_model(stage.folder, device)
        if rank() == 0 and stage.run.get("prompt_hash", prompt_hash()) != prompt_hash():
            print(f"{stage.folder}: trained with another prompt than answer.PROMPT; expect lower "
                  "scores")
        for temperature in args.temperature:
            predictions = evaluate(
                model, processor, seen, temperature=temperature,
                samples=args.samples if temperature else 1, max_new_tokens=args.max_new_tokens,
                batch=args.batch, seed=args.seed, blind=args.blind,
                label=f"{stage.name} T={temperature:g}")
            head = {"stage": stage.name, "checkpoint": str(stage.folder),
                    "temperature": temperature}
            yield stage, head, seen, predictions
        del model                                # its memory is free before the next one loads


def main() -> None:
    args = flags().parse_args()
    # Answers and paths may hold characters that the terminal's encoding lacks.
    sys.stdout.reconfigure(errors="backslashreplace")
    refuse_mistakes(args)
    files = args.compare or ([args.predictions] if args.predictions else [])
    device = None if files else dist.start(dist.choose_device(args.device))
    stages = find_stages(args.ckpt) if args.ckpt else []
    if args.image:
        ask(stages[-1], device, args)
        return

    # 1. Records, predictions from files, and the folder of the report. If that can't be written
    #    to, the script ends before a model runs.
    records, train, how = load_split(args, stages)
    inclusive = args.data in INCLUSIVE
    summary = {"centre_box": metrics.centre_box(list(records)[:args.limit])}
    found = all_predictions(args, files, stages, records, how["stretch"], device)
    if files:
        found = list(found)
    if args.compare:
        a, b = (strict_iou(scored, predictions) for _, _, scored, predictions in found)
        tests = metrics.paired(list(records)[:args.limit], a, b, inclusive)
        summary["comparison"] = {"a": files[0], "b": files[1], **tests}
    stems = [str(Path(file).with_suffix("")) for file in files[:1]]
    stems += [Path(file).stem for file in files[1:]]
    out = check_writable(args.out or "_vs_".join(stems) or Path(args.ckpt) / "eval")

    # 2. A row for each file, or for each stage and temperature; eval.json grows with them.
    rows, cases = [], []
    for stage, head, scored, predictions in found:
        temperature = f"_T{head['temperature']:g}" if head["temperature"] else ""
        suffix = f"{head['stage']}{temperature}{'_blind' if args.blind else ''}"
        if rank() == 0 and stage:
            lines = "".join(json.dumps(prediction) + "\n" for prediction in predictions)
            (out / f"predictions_{suffix}.jsonl").write_text(lines, encoding="utf-8")
        row = {**head, "data": args.data, "split": args.split, "data_hash": records.hash,
               "stretch": scored[0].stretch, "blind": args.blind, "refused": records.refusals}
        if stage:
            row["trained_on"] = training_overlap(stage, scored, predictions, inclusive)
        row |= score_predictions(scored, predictions, inclusive)
        row |= details(scored, predictions, args.data, train, records)
        rows.append(row)
        if rank() > 0:
            continue
        text = json.dumps({"rows": rows, **summary}, indent=2) + "\n"
        (out / "eval.json").write_text(text, encoding="utf-8")
        cases.append([])
        ious = strict_iou(scored, predictions).tolist()
        for record, prediction, iou in zip(scored, predictions, ious):
            box, _, _ = read_prediction(prediction, record)
            text = (prediction or {}).get("text", "")
            cases[-1].append(page.Case(record, box, iou, text))
        drawn = []
        for record, box, iou, _ in pictures.spread(cases[-1], 12):
            boxes = [(record.box, "lime"), (box, "red")] if box else [(record.box, "lime")]
            caption = f"{record.text}: {f'IoU {iou:.2f}' if box else 'no box'}"
            drawn.append(pictures.draw_boxes(data.open_or_blank(record), boxes, caption))
        pictures.contact_sheet(drawn).save(out / f"overlays_{suffix}.png")
    if rank() > 0:
        return

    # 3. The report, with the logs of stages. They lie in the folder above the step's.
    logs = []
    for stage in () if files else stages:
        logs.append((stage.name, stage.folder.resolve().parent if stage.run else stage.folder))
    page.write_page(out / "report.html", rows, cases, logs, [*(train or ()), *records], summary)
    print_report(rows, summary, data.refusal_summary(records, args.data, args.root, args.split))
    print(f"report, pictures{'' if files else ', predictions'}: {out}")


if __name__ == "__main__":
    launch(main)
