"""Evaluation: scores every stage, or anyone's predictions, in one table.

Prints a table, and writes eval.json (keys: docs/logs.md), report.html, predictions and pictures.

Boxes are clamped to the image and compared in pixels of the original image, as floats (no +1
pixel). A box counts if IoU > t (IoU >= t on opt). An answer without a box has IoU 0. The columns
"lenient" read the same answers with `answer.parse_box_lenient`, for models not trained on our
format. What the script of the data set's authors would print is in `official` (docs/data.md).
Intervals: 95%, over images.

    python eval.py ckpt/                           greedy, test split of the data trained on
    python eval.py ckpt/ --temperature 0 1         a row for greedy, a row for sampled
    torchrun --nproc_per_node 8 eval.py ckpt/rft   the same report from eight GPUs
    python eval.py ckpt/ --temperature 1 --samples 8               adds pass@k and dispersion
    python eval.py ckpt/ --image scene.jpg --text "the white plane left of the hangar"
    python eval.py ckpt/rft --image tiles/ --text "the pool"       or "*.tif", or list.jsonl
    python eval.py --predictions theirs.jsonl --data dior --coords original
    python eval.py --compare a.jsonl b.jsonl --data dior           is B better than A?
"""
import functools
import itertools
import json
import math
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

import data
from model import QwenVL
from qwen import answer
from qwen.answer import Box
from qwen.generate import generate
from qwen.hub import CheckpointError, by_number, is_checkpoint, newest_step
from qwen.processor import Processor, Prompt, frame_by_coords, prompt_hash
from readers import views
from readers.base import COORDS, DataError, Record, Records, UnreadableImage, read_json
from report import metrics, page, pictures, predictions
from reward import agreement
from train import dist, memory
from train.ahead import ahead
from train.checkpoints import open_model
from train.dist import check_writable, fail, gather_lists, gathered, rank, world
from train.flags import DEVICE_FLAG, FlagParser, add_reading_flags, natural, not_negative, positive
from train.run import launch

INCLUSIVE = ("opt",)              # data sets that count IoU >= t
OUTCOMES = (*answer.FAILURES, "outside image", "no prediction", predictions.UNREADABLE)
STAGE_ORDER = ("base", "pretrain", "direct", "sft", "rft")      # in the table; others follow
RED = (255, 64, 64)
SIDES = ("left", "top", "right", "bottom")
EDGE = 2                          # pixels: a box that ends nearer to an edge touches it
load_once = functools.cache(data.load)           # stages may share training data
open_once = functools.lru_cache(maxsize=1)(open_model)


def flags() -> FlagParser:
    parser = FlagParser(
        description="Scores every stage in a folder, or predictions: a table, and a report.")
    add = parser.add_argument
    add("ckpt", nargs="*", help="folders of checkpoints, of stages, or of several stages each")
    add("--data", help="data set; default: the one recorded in the checkpoint, else synth")
    add("--root", help="its folder; default: as recorded, else data/<name>")
    add("--split", default="test", help="of the data set")
    add("--limit", type=positive, help="score only the first LIMIT records")
    add("--out", help="folder of the report; default: named after the predictions, or CKPT/eval, "
        "or for several CKPT and a folder of weights ckpt/eval_NAME")
    add("--temperature", type=not_negative, nargs="+", default=[0.0], help="a row each; 0: greedy")
    add("--samples", type=positive, default=1, help="sampled answers to each record, for pass@k")
    add("--max-new-tokens", type=positive, default=256, help="of an answer with its reasoning")
    add("--batch", type=positive, default=32, help="records answered at once")
    add("--blind", action="store_true", help="show another record's image: score without sight")
    either = parser.add_mutually_exclusive_group().add_argument
    either("--predictions", help="score this JSONL file instead of a model; its lines are "
        '{"id": ..., "text": ...} or {"id": ..., "box": [x1, y1, x2, y2] or null}')
    either("--compare", nargs=2, metavar=("A", "B"), help="two such files: is B better than A?")
    add("--image", nargs="+", help="pictures, turned upright by their EXIF: print and draw the box "
        "that the last stage in CKPT answers to --text. Files, folders, patterns such as 'a/*.tif' "
        'or JSONL files with lines {"image": path from the file, "text": ...}')
    add("--text", help="what to look for in --image")
    add("--tile", type=positive, help="ask about each tile of --image, of this side in pixels, and "
        "take the likeliest answer that has a box")
    add("--overlap", type=natural, default=0, help="pixels that neighbours of --tile share")
    add("--coords", choices=("original", "resized", "1000", "100", "fraction"), help="coordinates "
        "of predicted boxes and of texts without a frame: pixels of the original image, pixels of "
        "it as CKPT's processor resizes it, 1000ths, 100ths or fractions of its sides; else as "
        "--data-coords")
    # Without these flags, those that the checkpoint was trained with are used.
    add_reading_flags(add)
    add("--seed", type=int, default=0, help="of sampling")
    add("--device", **DEVICE_FLAG)
    return parser


class Stage(NamedTuple):
    name: str
    folder: Path                  # or the path of a predictions file
    run: dict[str, Any]           # content of its run.json; {} without one


def find_stages(*paths: str | Path) -> list[Stage]:
    """A folder of a checkpoint or stage -> that one; any other folder -> every stage in it."""
    found = {}                                   # name -> checkpoint
    for path in paths:
        # A file: `latest`, on a file system without links.
        path = newest_step(path) if Path(path).is_file() else Path(path)
        steps = {}
        if is_checkpoint(path):
            here = path.resolve()
            parent = f"{here.parent.name}_" if here.name.startswith("step_") else ""
            steps[parent + here.name] = path
        else:
            newest = newest_step(path)
            is_run = newest != path and not newest.name.startswith("checkpoint-")
            for folder in [path] if is_run else path.glob("*"):
                if is_checkpoint(step := newest_step(folder)):
                    steps[folder.name or folder.resolve().name] = step
        if not steps:
            raise CheckpointError(
                f"no checkpoint at {path}: no config.json or latest/config.json in it or in its "
                "subfolders; train one with sft.py, or name a downloaded one")
        for name, step in steps.items():
            # Stages of one name in several runs are told apart by their paths.
            found["_".join(step.parts).strip("/_") if name in found else name] = step
    names = sorted(found, key=lambda name: ((*STAGE_ORDER, name).index(name), by_number(name)))
    return [Stage(name, found[name], read_json(found[name] / "run.json") or {}) for name in names]


def load_split(args: Namespace, stages: Sequence[Stage]) -> tuple[Records, Records | None]:
    """-> the split; the training records (None if this is a training split, or there are none).
    Sets --data and --root to the last stage's if not given."""
    recorded = next((stage.run for stage in reversed(stages) if "data" in stage.run), {})
    args.data = args.data or recorded.get("data", "synth")
    trained_with = {}
    if recorded.get("data") == args.data:
        args.root = args.root or recorded.get("root")
        trained_with = recorded.get("flags") or {}
    coords = args.data_coords or trained_with.get("coords")
    stretch = args.stretch or trained_with.get("stretch")
    records = data.load(args.data, args.root, args.split, coords, stretch)
    if not records:
        refused = data.refusal_summary(records, args.data, args.root, args.split)
        raise DataError(f"no usable record in the split {args.split} of {args.data}: "
                        f"{refused or 'it is empty'}")
    train = None
    if not data.TRAINING.fullmatch(args.split):
        # "train" may contain the validation records; "sft" does not.
        split = "sft" if args.split == "val" else "train"
        with suppress(DataError):
            train = data.load(args.data, args.root, split, coords, stretch)
    return records, train


def training_overlap(stage: Stage, records: Sequence[Record], answers: predictions.Predictions,
                     inclusive: bool) -> dict[str, Any]:
    """How many records the stage, or one it started from, was trained on; scores of the rest."""
    training, unread, seen = [], [], set()
    folder, run_json = stage.folder, stage.run
    while run_json and folder.resolve() not in seen:
        seen.add(folder.resolve())
        trained_with = run_json.get("flags") or {}
        if "data" in run_json:
            split = trained_with.get("split", "rft")               # rft.py has no --split
            try:
                training += load_once(
                    run_json["data"], run_json.get("root"), split, trained_with.get("coords"),
                    tuple(trained_with.get("stretch") or ()))
            except DataError:
                unread.append(f"{run_json['data']} {split}")
        folder = newest_step(trained_with.get("init") or "")
        run_json = read_json(folder / "run.json")
    shared = data.find_shared(records, training)
    rest = [i for i, what in enumerate(shared) if what != "record"]
    found = {"records": len(records) - len(rest), "images": len(records) - shared.count(None),
             "unread": list(dict.fromkeys(unread))}
    if 0 < len(rest) < len(records):
        boxes = predictions.strict_boxes(records, answers)
        rows = (values[rest] for values in (boxes, *metrics.targets(records)))
        found["rest"] = metrics.metrics(*rows, inclusive)
    return found


def evaluate(
        model: QwenVL, processor: Processor, records: Sequence[Record], *,
        temperature: float = 0.0, samples: int = 1, max_new_tokens: int = 256, batch: int = 32,
        seed: int = 0, blind: bool = False, label: str = "eval") -> list[predictions.Prediction]:
    """A prediction for each record, on every process; they do not depend on the batch size. A
    sharded model must be gathered (`train.dist.gathered`)."""
    n = len(records)
    shown = list(records)
    for i, record in enumerate(records if blind else ()):
        # The image of the record half the list ahead, or of the next record with another image.
        later = (records[(i + n // 2 + k) % n] for k in range(n))
        shown[i] = next((other for other in later if other.image != record.image), None)
    if None in shown:
        raise DataError("--blind needs records of at least two images; score more records")
    places = range(rank(), n, world())
    batches = [places[i:i + batch] for i in range(0, len(places), batch)]

    def make_prompts(places: range) -> dict[int, Prompt]:
        prompts = {}
        for i in places:
            with suppress(UnreadableImage):      # a miss
                image = data.open_image(shown[i])
                # With --blind the record's size is kept, so the prompt stays the same.
                image = image.resize(records[i].size) if blind else image
                prompts[i] = processor(image, records[i].text)
        return prompts

    own = {i: {"id": records[i].id, "box": None, "failure": predictions.UNREADABLE} for i in places}
    iou = 0.0
    hidden = rank() > 0 or (None if label == "val" else False)      # None: without a terminal
    with tqdm(total=len(places), desc=label, unit="rec", leave=False, disable=hidden) as bar:
        for prompts, asked in zip(ahead(make_prompts, batches), batches):
            seeds = [seed * 1_000_003 + i for i in prompts]
            groups, scores = sample_texts(model, processor, list(prompts.values()), seeds, samples,
                                          max_new_tokens, temperature)
            for (i, prompt), texts, means in zip(prompts.items(), groups, scores):
                box = answer.locate(answer.parse_box(texts[0]), prompt.frame)
                own[i] = {"id": records[i].id, "text": texts[0], "box": box,
                          "frame": asdict(prompt.frame), "score": round(means[0], 6)}
                if samples > 1:
                    own[i]["samples"] = texts
                if box and records[i].box:
                    iou += agreement(torch.tensor(box), torch.tensor(records[i].box)).item()
            bar.update(len(asked))
            if records[0].box:
                bar.set_postfix(mIoU=f"{iou / max(1, bar.n):.3f}")
    everyone = dict(gather_lists(list(own.items())))
    return [everyone[i] for i in range(n)]


def sample_texts(
        model: QwenVL, processor: Processor, prompts: Sequence[Prompt], seeds: Sequence[int],
        samples: int, max_new_tokens: int, temperature: float,
) -> tuple[list[list[str]], list[list[float]]]:
    """-> each prompt's texts, and the mean log-probability of a token of each text."""
    if not prompts:
        return [], []
    tokens, logprobs, lengths = generate(
        model, prompts, samples, max_new_tokens, temperature, torch.tensor(seeds))
    groups = []
    for group, group_lengths in zip(tokens.cpu(), lengths.tolist()):  # (G, L), G
        groups.append([processor.decode(ids[:n]) for ids, n in zip(group, group_lengths)])
    return groups, (logprobs.sum(-1) / lengths).tolist()


def validate(model: QwenVL, processor: Processor, records: Sequence[Record],
             args: Namespace, shown: list[Any] | None = None) -> dict[str, float]:
    """Greedy scores during training, for the stage's log line; {} without records. The first
    records and their answers are put into `shown`, as report.watch has them."""
    if not records:
        return {}
    longest = memory.longest_prompt(processor, records)
    with gathered(model) as whole:
        answers = evaluate(whole, processor, records, max_new_tokens=args.max_new_tokens,
                           batch=memory.validation_batch(longest), label="val")
    for record, found in zip(records[:4], answers) if shown is not None else ():
        box = found["box"]
        iou = agreement(torch.tensor(box), torch.tensor(record.box)).item() if box else 0.0
        shown.append((record, {"boxes": [box], "iou": [iou], "texts": [found.get("text", "")]}))
    row = score_predictions(records, answers, args.data in INCLUSIVE)
    failed = sum(row["failures"].values()) / row["n"]
    return {"val_mIoU": row["mIoU"], "val_Pr@0.5": row["Pr@0.5"], "val_failed": failed}


def score_predictions(records: Sequence[Record], answers: predictions.Predictions,
                      inclusive: bool = False) -> dict[str, Any]:
    strict, lenient, failures = zip(*map(predictions.read_prediction, answers, records))
    target, size = metrics.targets(records)
    return {
        **metrics.metrics(metrics.box_tensor(strict), target, size, inclusive),
        "failures": {outcome: failures.count(outcome) for outcome in OUTCOMES},
        "lenient": metrics.metrics(metrics.box_tensor(lenient), target, size, inclusive)}


def details(records: Sequence[Record], answers: predictions.Predictions, name: str,
            train: Sequence[Record] | None, split: Sequence[Record]) -> dict[str, Any]:
    """The other keys of a row. name: of the data set; train, split: as in `metrics.properties`."""
    inclusive = name in INCLUSIVE
    target, size = metrics.targets(records)
    overlap = metrics.overlaps(predictions.strict_boxes(records, answers), target, size)
    scores = metrics.record_scores(overlap.iou, inclusive)
    rates = {rate: (values, None) for rate, values in scores.items()}
    rates["cIoU"] = (overlap.intersection, overlap.union)
    properties = metrics.properties(records, train, split)
    row = {"images": len({record.image for record in records}),
           "ci": {rate: ci for rate, (_, ci) in metrics.bootstrap(records, rates).items()},
           "breakdowns": metrics.breakdowns(properties, overlap.iou, inclusive)}
    if official := metrics.official(name, predictions.raw_boxes(answers), records):
        row["official"] = official
    if any(p and "samples" in p for p in answers):
        boxes = predictions.sampled_boxes(records, answers)
        row |= metrics.sampled(boxes, target, size, inclusive)
    return row


def print_report(
        rows: Sequence[Mapping[str, Any]], summary: Mapping[str, Any], refused: str) -> None:
    head = [*rows[0]["ci"], "center", "failed", "lenient: mIoU", "Pr@0.5"]
    width = max(12, *(len(row["stage"]) for row in rows))
    print(f"{'stage':{width}} {'T':>4} {'n':>6}", *(f"{name:>6}" for name in head))
    guess = summary["centre_box"]
    notes = ["a box of the median size in the middle of each image: "
             f"mIoU {guess['mIoU']:.3f}, Pr@0.5 {guess['Pr@0.5']:.3f}"]
    for row in rows:
        stage, n, lenient = row["stage"], row["n"], row["lenient"]
        failures = {why: count for why, count in row["failures"].items() if count}
        scores = [*(row[rate] for rate in row["ci"]), row["center_error"],
                  sum(failures.values()) / n, lenient["mIoU"], lenient["Pr@0.5"]]
        temperature = "" if row["temperature"] is None else f"{row['temperature']:g}"
        cells = ["-" if value is None else f"{value:.3f}" for value in scores]
        cells = [f"{cell:>{max(6, len(name))}}" for name, cell in zip(head, cells)]
        print(f"{stage:{width}} {temperature:>4} {n:>6}", *cells, *[" (blind)"] * row["blind"])
        at = f" T={temperature}" if temperature else ""
        if failures:
            notes.append(f"{stage}{at}: {', '.join(f'{k} {v}' for k, v in failures.items())}")
        if row["images"] < metrics.FEW_IMAGES:
            ci = metrics.interval_text(row["ci"]["mIoU"], row["images"])
            notes.append(f"{stage}: mIoU {row['mIoU']:.3f}, {ci}")
        for part, scores in metrics.official_parts(row):
            figures = [f"{rate} {value:.3f}" for rate, value in scores.items() if rate != "n"]
            notes.append(f"{stage}{at}, as the authors of {row['data']} count, {part} "
                         f"({scores['n']}): {', '.join(figures)}")
        known = row.get("trained_on", {})
        if known.get("unread"):
            notes.append(f"{stage}: its training data can't be read "
                         f"({', '.join(known['unread'])}); it may contain scored records")
        if known.get("records"):
            notes.append(f"{stage}: {known['records']:,} of {n:,} scored records were in its "
                         "training data, by image and box")
        if rest := known.get("rest"):
            notes.append(f"{stage}: the other {rest['n']:,}: mIoU {rest['mIoU']:.3f}, "
                         f"Pr@0.5 {rest['Pr@0.5']:.3f}")
    if refused:
        notes.append(f"not scored: {refused}")
    for name, test in summary.get("comparison", {}).items():
        if isinstance(test, dict):               # the other entries are the files' paths
            p = f", p {test['p']:.3f}" if test["ci"] else ""
            notes.append(f"B - A: {name} {test['difference']:+.3f} "
                         f"({metrics.interval_text(test['ci'], rows[0]['images'], '+')}){p}")
    print(*notes, sep="\n")


def ask(checkpoint: str | Path, image: str | Path, text: str, tile: int | None = None,
        overlap: int = 0, max_new_tokens: int = 256,
        device: str | None = None) -> tuple[Box | None, str, float]:
    """For Python: the greedy answer of the last stage in a folder about a picture -> box in pixels
    of the picture (turned upright by its EXIF), reasoning and answer, mean log-probability of a
    token. The model stays loaded until another one is asked."""
    stage = find_stages(checkpoint)[-1]
    model, processor = open_once(stage.folder.resolve(), torch.device(dist.choose_device(device)))
    stretch = (stage.run.get("flags") or {}).get("stretch")
    views.read_picture.cache_clear()             # the file may have changed
    records = views.view_records("", Path(image), text, stretch, tile, overlap)
    line = likeliest(records, evaluate(model, processor, records, max_new_tokens=max_new_tokens))
    return line["box"], line["text"], line["score"]


def likeliest(
        records: Sequence[Record], answers: Sequence[predictions.Prediction]) -> dict[str, Any]:
    """Answers about each view of a picture -> the one with the highest score, or, if some have a
    box, the highest of those: a line of answers.jsonl."""
    lines = []
    for record, prediction in zip(records, answers, strict=True):
        strict, lenient, failure = predictions.read_prediction(prediction, record)
        x, y, right, bottom = tile = record.image.window
        box, touches = strict or lenient, []
        if box:
            gaps = (box[0], box[1], right - x - box[2], bottom - y - box[3])
            touches = [side for side, gap in zip(SIDES, gaps) if gap < EDGE]
            box = (box[0] + x, box[1] + y, box[2] + x, box[3] + y)
        line = {"text": "", "score": -math.inf, **prediction, "image": str(record.image.path),
                "expression": record.text, "box": box, "failure": failure, "touches": touches}
        if len(records) > 1:      # the coordinates in the text are those of the tile
            line |= {"tile": tile, "frame": None}
        lines.append(line)
    return max(lines, key=lambda line: (line["box"] is not None, line["score"]))


def ask_pictures(stage: Stage, device: torch.device, args: Namespace, out: str | Path) -> None:
    """--image: prints answers, and writes them as JSON lines, drawings and GeoJSON."""
    stretch = args.stretch or (stage.run.get("flags") or {}).get("stretch")
    asked, errors = [], []
    for question in views.read_questions(args.image, args.text):
        try:
            asked.append(views.view_records(*question, stretch, args.tile, args.overlap))
        except UnreadableImage as error:
            errors.append(error)
    if not asked:
        raise errors[0]
    one = len(asked) + len(errors) == 1
    out = check_writable(out)
    file = out / (f"{asked[0][0].image.path.stem}_answer.jsonl" if one else "answers.jsonl")
    model, processor = open_model(stage.folder, device)
    answers = iter(evaluate(
        model, processor, [*itertools.chain(*asked)], temperature=args.temperature[0],
        max_new_tokens=args.max_new_tokens, batch=args.batch, seed=args.seed, label=stage.name))
    lines = [likeliest(records, [*itertools.islice(answers, len(records))]) for records in asked]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    places = []                                  # of boxes on a map
    for i, ([record, *_], line) in enumerate(zip(asked, lines), 1):
        path, box = record.image.path, line["box"]
        # A line for each question, or several lines for a single one.
        said = [f"{stage.name}: {line['text']}"] if one else [f"{path}, {record.text}"]
        w, h = record.size
        if w * h > processor.max_pixels:
            resized = frame_by_coords(record.size, "resized", processor).resized
            said.append(f"{w} x {h} pixels, more than the model's limit of "
                        f"{processor.max_pixels:,}, are shrunk to {resized[0]} x {resized[1]}: "
                        "small objects may be lost; --tile asks about parts")
        if box:
            image, turned, transform, crs = views.read_picture(path, record.stretch)
            drawing = out / f"{path.stem}_answer{'' if one else f'_{i}'}.png"
            pictures.overlay(image, [(box, record.text[:60], RED)]).save(drawing)
            said += [f"box in pixels of the picture{', turned upright by its EXIF' * turned}: "
                     + ", ".join(f"{v:.1f}" for v in box), f"score {line['score']:.3f}"]
            said += [f"read leniently: {line['failure']}"] * bool(line["failure"])
            said += [f"it may be cut at the {side}" for side in line["touches"]]
            said.append(f"drawn: {drawing}")
            places += [(transform, crs, line)] * bool(crs)
        else:
            said.append(f"no box: {line['failure']}")
        print(*said, sep="\n" if one else "; ")
    print(*[f"not asked: {error}" for error in errors], f"answers: {file}", sep="\n")
    views.write_geojson(file.with_suffix(""), places)


def stage_answers(args: Namespace, stages: Sequence[Stage], records: Sequence[Record],
                  device: torch.device) -> Iterator[tuple[Any, ...]]:
    """Yields stage, temperature, the records as the stage sees them, its answers."""
    for stage in stages:
        # A stage gets images stretched as in its training.
        own = args.stretch or (stage.run.get("flags") or {}).get("stretch")
        seen = [replace(r, stretch=tuple(own) if own else r.stretch) for r in records]
        model, processor = open_model(stage.folder, device)
        if rank() == 0 and stage.run.get("prompt_hash", prompt_hash()) != prompt_hash():
            print(f"{stage.folder}: not trained with answer.PROMPT; expect lower scores")
        for temperature in args.temperature:
            yield stage, temperature, seen, evaluate(
                model, processor, seen, temperature=temperature, seed=args.seed, blind=args.blind,
                samples=args.samples if temperature else 1, max_new_tokens=args.max_new_tokens,
                batch=args.batch, label=f"{stage.name} T={temperature:g}")
        del model                                # free its memory before the next one loads


def main() -> None:
    args = flags().parse_args()
    files = args.compare or ([args.predictions] if args.predictions else [])
    several = args.samples > 1 or len(args.temperature) > 1 or world() > 1
    if args.coords in COORDS and args.data and not files:
        args.data_coords, args.coords = args.data_coords or args.coords, None
    mistakes = (
        (not args.ckpt and not files,
         "name a checkpoint's folder (python eval.py ckpt/), or a file with --predictions"),
        (args.text and not args.image or not args.text and any(
            not name.endswith(".jsonl") for name in args.image or ()),
         "--image and --text go together; give both of them"),
        (args.image and (len(args.ckpt) != 1 or files or args.blind or several),
         "--image asks one checkpoint once: one process, one --temperature, no --predictions, "
         "--compare, --samples or --blind"),
        (args.samples > 1 and (files or max(args.temperature) == 0),
         "--samples needs a checkpoint and a --temperature above 0: greedy answers are the same"),
        (args.coords == "resized" and not args.ckpt,
         "--coords resized needs a checkpoint's processor: python eval.py CKPT --predictions ..."),
        (args.coords and not files, "--coords is about a file given with --predictions, or about "
         f"the boxes of --data NAME: {', '.join(COORDS)}"),
        (files and (args.blind or args.temperature != [0.0]),
         "predictions are scored as they are; --blind and --temperature belong to a checkpoint"),
        (args.tile and not args.image, "--tile is about --image; python data.py --tile cuts data"),
        (args.overlap >= (args.tile or 1), "--overlap must be smaller than --tile"),
        (len(set(args.temperature)) < len(args.temperature), "give each --temperature once"))
    for is_mistake, message in mistakes:
        if is_mistake:
            fail(message)

    device = None if files else dist.start(dist.choose_device(args.device))
    stages = find_stages(*args.ckpt)
    if files and not args.data and not any("data" in stage.run for stage in stages):
        fail("predictions are scored on the records of a data set: name it with --data")
    if files:
        out = Path(files[0]).with_name("_vs_".join(Path(file).stem for file in files))
    elif len(args.ckpt) == 1 and not is_checkpoint(Path(args.ckpt[0])):
        out = Path(args.ckpt[0]) / "eval"
    else:                         # a folder of weights stays as it is
        out = Path("ckpt", "_".join(["eval", *(stage.name for stage in stages)]))
    out = args.out or out
    if args.image:
        return ask_pictures(stages[-1], device, args, out)

    # 1. Records, predictions from files, and the report's folder, before a model runs.
    records, train = load_split(args, stages)
    scored = records[:args.limit]
    inclusive = args.data in INCLUSIVE
    summary = {"centre_box": metrics.centre_box(scored)}
    target, size = metrics.targets(scored)
    resizer = Processor.from_pretrained(stages[-1].folder) if args.coords == "resized" else None
    stems = [Path(file).stem.removeprefix("predictions_") for file in files]
    found = []
    for file, stem in zip(files, stems):
        by_id = predictions.read_predictions(file, records, args.coords, resizer)
        # Two files of one name are named by their folders too.
        name = stem if stems.count(stem) == 1 else f"{Path(file).resolve().parent.name}_{stem}"
        answers = [by_id.get(record.id) for record in scored]
        found.append((Stage(name, file, {}), None, scored, answers))
    if args.compare:
        boxes = [predictions.strict_boxes(scored, answers) for *_, answers in found]
        a, b = (metrics.overlaps(pred, target, size).iou for pred in boxes)
        tests = metrics.paired(scored, a, b, inclusive)
        summary["comparison"] = {"a": files[0], "b": files[1], **tests}
    out = check_writable(out)

    # 2. A row for each file, or for each stage and temperature; eval.json grows with them.
    rows, cases = [], []
    found = found or stage_answers(args, stages, scored, device)
    for stage, temperature, scored, answers in found:
        if rank() > 0:
            continue
        suffix = stage.name + (f"_T{temperature:g}" if temperature else "") + "_blind" * args.blind
        row = {"stage": stage.name, "checkpoint": str(stage.folder), "temperature": temperature,
               "data": args.data, "split": args.split, "data_hash": records.hash,
               "stretch": scored[0].stretch, "blind": args.blind, "refused": records.refusals}
        if not files:
            lines = "".join(json.dumps(prediction) + "\n" for prediction in answers)
            (out / f"predictions_{suffix}.jsonl").write_text(lines)
            row["trained_on"] = training_overlap(stage, scored, answers, inclusive)
        row |= score_predictions(scored, answers, inclusive)
        row |= details(scored, answers, args.data, train, records)
        rows.append(row)
        (out / "eval.json").write_text(json.dumps({"rows": rows, **summary}, indent=2) + "\n")
        drawn = []
        answered, _, _ = zip(*map(predictions.read_prediction, answers, scored))
        ious = metrics.overlaps(metrics.box_tensor(answered), target, size).iou.tolist()
        texts = [(prediction or {}).get("text", "") for prediction in answers]
        cases.append(list(map(page.Case, scored, answered, ious, texts)))
        for record, box, iou, _ in pictures.spread(cases[-1], 12):
            boxes = [(record.box, pictures.TARGET)] + [(box, pictures.ANSWER)] * bool(box)
            caption = f"{record.text}: {f'IoU {iou:.2f}' if box else 'no box'}"
            image = data.open_image(record, or_blank=True)
            drawn.append(pictures.draw_boxes(image, boxes, caption, legend=pictures.LEGEND))
        pictures.contact_sheet(drawn).save(out / f"overlays_{suffix}.png")
    if rank() > 0:
        return

    # 3. The report, with the stages' logs, which are in the folder above a step's.
    logs = [(stage.name, stage.folder.resolve().parent if stage.run else stage.folder)
            for stage in ([] if files else stages)]
    page.write_page(out / "report.html", rows, cases, logs, [*(train or ()), *records], summary)
    print_report(rows, summary, data.refusal_summary(records, args.data, args.root, args.split))
    print(f"report, pictures{'' if files else ', predictions'}: {out}")


if __name__ == "__main__":
    launch(main)
