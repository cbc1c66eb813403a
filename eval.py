"""Scores: every stage found under a folder side by side, or anyone's predictions; a table, eval.json, report.html, predictions, pictures.

Boxes are clamped to the image and compared in pixels of the original image, as floats (no +1 pixel); one counts where IoU > t, strictly,
as in DIOR-RSVG's own evaluation (IoU >= t on opt, as in OPT-RSVG's; VRSBench's own metric stands beside ours as "vrsbench"). Every record
counts: what can't be parsed has IoU 0. The columns "lenient" read the same texts with `answer.parse_box_lenient`; they are for models that
never saw our answer format. DIOR's own script also truncates the true boxes to whole pixels at its 640 px letterbox; that is not copied
here. Intervals "ci" are 95% bootstraps over images.

    python eval.py ckpt/                                         greedy; data set and root as in training, split test
    python eval.py ckpt/ --temperature 0 1                       greedy and sampled, a row each
    torchrun --nproc_per_node 8 eval.py ckpt/rft                 records dealt out to eight GPUs, the same report
    python eval.py ckpt/ --temperature 1 --samples 8             pass@k and dispersion of eight samples as well
    python eval.py ckpt/ --image scene.jpg --text "the small white plane left of the hangar"
    python eval.py --predictions theirs.jsonl --data dior --coords original
    python eval.py --compare a.jsonl b.jsonl --data dior         is B better than A? paired bootstrap over images

A predictions file has a line a record, {"id": ..., "text": ...} or {"id": ..., "box": [x1, y1, x2, y2] in original pixels, or null}. In
whose coordinates a text speaks is said by the line's "frame" (our own files have it) or by --coords.
"""
import itertools
import json
import math
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from PIL import ExifTags, Image, ImageOps
from tqdm import tqdm

import answer
import data
import metrics
import pictures
import report as page
import reward
import runtime
from answer import locate
from data import DataError
from generate import generate
from metrics import THRESHOLDS
from model import CheckpointError, newest_step
from processor import Frame, Processor, prompt_hash, smart_resize, to_image_frame

AT_LEAST = ("opt",)                                       # data sets whose own evaluation counts IoU >= t
OUTCOMES = (*answer.FAILURES, "outside image", "no prediction")
STORY = ("base", "pretrain", "sft", "rft")                # order of the stages in the table; others behind them
GREEN, RED = (64, 255, 64), (255, 64, 64)


def flags():
    parser = runtime.FlagParser(__doc__.split("\n")[0])
    add = parser.add_argument
    add("ckpt", nargs="?", help="a checkpoint's folder, a stage's, or one that holds stages")
    add("--data", help="data set; default: the one recorded in the checkpoint, else synth")
    add("--root", help="its folder; default: as recorded, else data/<name>")
    add("--split", default="test", help="of the data set")
    add("--limit", type=runtime.positive, help="score the first LIMIT records only")
    add("--out", help="folder of the report; default CKPT/eval, or the predictions file without its suffix")
    add("--temperature", type=float, nargs="+", default=[0.0], help="one row each; 0 is greedy")
    add("--samples", type=runtime.positive, default=1, help="answers to each record at a temperature above 0: adds pass@k and dispersion; "
        "all other figures are of the first")
    add("--max-new-tokens", type=runtime.positive, default=256, help="tokens of an answer, reasoning included")
    add("--batch", type=runtime.positive, default=32, help="records answered at once")
    add("--blind", action="store_true", help="show another record's image: what is scored then was not seen")
    add("--predictions", help='score this JSONL file instead of running a model; a line a record: {"id": ..., "text": ...} or {"id": '
        '..., "box": [x1, y1, x2, y2] in original pixels, or null}')
    add("--compare", nargs=2, metavar=("A", "B"), help="score two JSONL files and test whether B differs from A (paired bootstrap)")
    add("--image", help="a picture's file, turned upright as its EXIF says: answer --text about it, print the answer, draw its box")
    add("--text", help="what to look for in --image; the last of the stages under CKPT answers")
    add("--coords", choices=("original", "resized", "1000"), help="coordinates of texts without a frame: pixels of the original "
        "image, pixels of the image as CKPT's processor resizes it, or thousandths of its sides")
    add("--seed", type=int, default=0, help="of sampling")
    add("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu", help="where to compute")
    return parser


# ------------------------------------------------------------------------------------------------------------------ scores

def said_in(prediction):
    """The frame of a prediction's text."""
    return Frame(**{k: v if k == "convention" else tuple(v) for k, v in prediction["frame"].items()})


def read_prediction(prediction, record):
    """-> strict box, lenient box (original pixels, clamped, or None), and the failure of the strict one: None or one of OUTCOMES."""
    if prediction is None:
        return None, None, "no prediction"
    if "text" in prediction:
        text, frame = prediction["text"], said_in(prediction)
        box, lenient, why = locate(answer.parse_box(text), frame), locate(answer.parse_box_lenient(text), frame), answer.failure(text)
    else:
        written, why = answer.checked(prediction["box"]) if prediction["box"] else (None, "no answer")
        box = lenient = None if why else answer.clamp_box(written, record.size)
    return box, lenient, why or (None if box else "outside image")


def on_grid(prediction, record):
    """As `read_prediction`'s strict box, but a line or a point within the image counts too: VRSBench's grid gives it an area."""
    box, _, why = read_prediction(prediction, record)
    if why == "no area":
        if "text" in prediction:
            flat = to_image_frame(answer.read_answer(prediction["text"])[0], said_in(prediction))
        else:
            flat = answer.checked(prediction["box"])[0]
        box = flat if 0 <= flat[0] <= flat[2] <= record.size[0] and 0 <= flat[1] <= flat[3] <= record.size[1] else None
    return box


def score(records, predictions, inclusive=False):
    """N records, N predictions (dicts as `evaluate` and `read_predictions` give them; None: there is none) -> part of an eval.json row."""
    strict, lenient, failures = zip(*(read_prediction(p, r) for p, r in zip(predictions, records, strict=True)))
    counts = Counter(failures)
    ours, theirs = (metrics.metrics(metrics.tensor(boxes), *metrics.targets(records), inclusive) for boxes in (strict, lenient))
    return {**ours, "failures": {why: counts[why] for why in OUTCOMES}, "lenient": theirs}


def answered(records, predictions):
    """N records and their predictions (or None) -> strict boxes (N, 4) in original pixels, double, NaN where there is none."""
    return metrics.tensor([read_prediction(p, r)[0] for p, r in zip(predictions, records, strict=True)])


def details(records, predictions, name, known):
    """What else a row of eval.json says: 95% intervals "ci", "breakdowns", "vrsbench" on that data set, and where predictions carry several
    samples "pass" and "dispersion". known: the records of train (None: not there) and of the whole split, for what a record is compared
    with. The same numbers on every process and from a predictions file: the resampling is seeded."""
    inclusive = name in AT_LEAST
    pred, (target, size) = answered(records, predictions), metrics.targets(records)
    _, iou, inside, union, _ = metrics.overlaps(pred, target, size)
    hit = metrics.hits(iou, 0.5, inclusive).double()
    rates = {"mIoU": (iou, None), **{f"Pr@{t}": (metrics.hits(iou, t, inclusive).double(), None) for t in THRESHOLDS},
             "cIoU": (inside, union)}
    extra = {"ci": metrics.intervals(records, rates), "breakdowns": {}}
    for by, values in metrics.properties(records, *known).items():
        groups = {value: [i for i, v in enumerate(values) if v == value] for value in sorted({v for v in values if v is not None})}
        if groups:
            extra["breakdowns"][by] = {value: {"n": len(rows), "mIoU": iou[rows].mean().item(), "Pr@0.5": hit[rows].mean().item()}
                                       for value, rows in groups.items()}
    if name == "vrsbench":
        flat = metrics.tensor([on_grid(p, r) for p, r in zip(predictions, records)])
        extra["vrsbench"] = metrics.vrsbench(flat, target, size, [r.unique for r in records], metrics.tensor([r.grid for r in records]))
    if any(p and "samples" in p for p in predictions):
        extra |= metrics.sampled(sampled_boxes(records, predictions), target, size, inclusive)
    return extra


def sampled_boxes(records, predictions):
    """N records, N predictions that carry several samples (or None) -> (N, k, 4) double, NaN where there is no box or no sample."""
    k = max(len(p["samples"]) for p in predictions if p and "samples" in p)
    texts = [p.get("samples", ()) if p else () for p in predictions]
    found = [[read_prediction({**p, "text": text}, r)[0] for text in group] for group, p, r in zip(texts, predictions, records)]
    return torch.stack([metrics.tensor([*group, *[None] * (k - len(group))]) for group in found])


def overlap_of(records, predictions):
    """N records and their predictions (or None) -> IoU (N,) of the strict boxes, double."""
    return metrics.overlaps(answered(records, predictions), *metrics.targets(records))[1]


# ------------------------------------------------------------------------------------------------------------------ a model's answers

def evaluate(model, processor, records, *, temperature=0.0, max_new_tokens=256, batch=32, seed=0, samples=1, blind=False, label="eval"):
    """One answer to each record -> on every process, in the order of records: {"id", "text", "box" (original pixels, clamped, or None),
    "frame"}, and above one sample "samples", all texts, of which "text" is the first. Processes take records rank, rank + world, ...; an
    answer depends on its record's place and the seed alone.

    Runs under `runtime.gathered` where parameters are sharded. blind: see `strangers`."""
    shown = strangers(records) if blind else records
    mine = range(runtime.rank(), len(records), runtime.world())
    batches = [mine[i:i + batch] for i in range(0, len(mine), batch)]
    answers, total = [], 0.0

    def prepare(i):
        image = data.open_image(shown[i])
        return processor(image.resize(records[i].size) if blind else image, records[i].text)

    with ThreadPoolExecutor(8) as pool, tqdm(total=len(mine), desc=label, unit="rec", leave=False, disable=runtime.rank() > 0) as bar:
        ahead = pool.map(prepare, batches[0] if batches else ())         # images of the next batch, while this one is answered
        for places, following in itertools.zip_longest(batches, batches[1:], fillvalue=()):
            prompts, ahead = list(ahead), pool.map(prepare, following)
            seeds = torch.tensor([seed * 1_000_003 + i for i in places])
            tokens, _, lengths = generate(model, prompts, samples, max_new_tokens, temperature, seeds)
            for i, prompt, group, ends in zip(places, prompts, tokens.cpu(), lengths.tolist()):
                texts = [processor.decode(ids[:n]) for ids, n in zip(group, ends)]
                box = locate(answer.parse_box(texts[0]), prompt.frame)
                answers.append({"id": records[i].id, "text": texts[0], "box": box, "frame": asdict(prompt.frame)}
                               | ({"samples": texts} if samples > 1 else {}))
                total += reward.iou(torch.tensor(box), torch.tensor(records[i].box)).item() if box else 0.0
            bar.update(len(places))
            bar.set_postfix(mIoU=f"{total / len(answers):.3f}")
    if not dist.is_initialized():
        return answers
    shards = [None] * runtime.world()
    dist.all_gather_object(shards, answers)
    return [shards[i % len(shards)][i // len(shards)] for i in range(len(records))]


def validate(model, processor, records, args):
    """Greedy scores on a few records during training -> what joins the log line; nothing without records."""
    if not records:
        return {}
    with runtime.gathered(model):
        row = score(records, evaluate(model, processor, records, max_new_tokens=args.max_new_tokens, label="val"),
                    args.data in AT_LEAST)
    return {"val_mIoU": row["mIoU"], "val_Pr@0.5": row["Pr@0.5"], "val_failed": sum(row["failures"].values()) / row["n"]}


def strangers(records):
    """For each record the one whose image it is shown when blind: half the list further on, the first there with another image. That image
    is scaled to the size of the record's own, so that the frame, and all else that is not seen, stays what it was."""
    n = len(records)
    try:
        return [next(other for k in range(n) if (other := records[(i + n // 2 + k) % n]).image != records[i].image) for i in range(n)]
    except StopIteration:
        raise DataError("--blind needs records of at least two images; score more records") from None


# ------------------------------------------------------------------------------------------------------------------ anyone's answers

def read_predictions(path, records, coords=None, processor=None):
    """A predictions file -> dict id -> prediction, every text with its frame. One that does not fit these records is a DataError."""
    by_id, found, path, refused = {r.id: r for r in records}, {}, Path(path), getattr(records, "refusals", {})
    unknown = "check --data, --root and --split" + (f"; it may be one of those refused ({data.in_words(refused)})" if refused else "")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: unreadable predictions ({error})") from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                prediction = read_line(line, by_id, unknown, found, coords, processor)
            except (ValueError, OverflowError, RecursionError) as error:
                raise DataError(f"{path}, line {number}: {error}") from None
            found[prediction["id"]] = prediction
    return found


def read_line(line, by_id, unknown, found, coords, processor):
    """One line -> prediction; what is wrong with it is a ValueError. unknown: what to say of an id that no record has."""
    prediction = json.loads(line)
    if not isinstance(prediction, dict) or type(prediction.get("id")) not in (str, int):
        raise ValueError('not a JSON object with an "id" that is a text or a whole number')
    record = by_id.get(str(prediction["id"]))
    if record is None:
        raise ValueError(f"no record of this split has the id {str(prediction['id'])!r}; {unknown}")
    if record.id in found:
        raise ValueError(f"the id {record.id!r} comes a second time; one line a record")
    if isinstance(prediction.get("text"), str) and (prediction.get("frame") or coords):
        frame = prediction.get("frame") or asdict(frame_of(record, coords, processor))
        samples = prediction.get("samples")
        if samples is not None and not (isinstance(samples, list) and samples and all(isinstance(text, str) for text in samples)):
            raise ValueError('"samples" is not a list of texts')
        read = {"id": record.id, "text": prediction["text"], "frame": check_frame(frame, record)}
        return read | ({"samples": samples} if samples else {})
    if "box" not in prediction:
        raise ValueError('a text without a "frame" needs --coords original, resized or 1000' if isinstance(prediction.get("text"), str)
                         else 'neither a "text" nor a "box"')
    box = prediction["box"]
    if box is not None and not (isinstance(box, list) and len(box) == 4 and all(type(x) in (int, float) for x in box)):
        raise ValueError('"box" is neither four numbers nor null')
    return {"id": record.id, "box": box and [float(x) for x in box]}


def frame_of(record, coords, processor):
    """The frame of a text that carries none, from --coords."""
    resized = record.size
    if coords == "resized":
        factor = processor.patch * processor.merge
        resized = smart_resize(*record.size, factor, processor.min_pixels, processor.max_pixels)
    return Frame(record.size, resized, "1000" if coords == "1000" else "absolute")


def check_frame(frame, record):
    def size(value):
        return isinstance(value, (list, tuple)) and len(value) == 2 and all(type(x) is int and 0 < x < 10 ** 6 for x in value)
    if not (isinstance(frame, dict) and frame.keys() == {"original", "resized", "convention"} and size(frame["original"])
            and size(frame["resized"]) and frame["convention"] in ("absolute", "1000")):
        raise ValueError('"frame" is not {"original": [W, H], "resized": [W, H], "convention": "absolute" or "1000"}')
    if tuple(frame["original"]) != tuple(record.size):
        raise ValueError(f"the frame is of an image of {frame['original']}, the record's is {list(record.size)}: it belongs to other data")
    return frame


# ------------------------------------------------------------------------------------------------------------------ pictures

def sheet_of_answers(records, predictions, path, n=12):
    """Up to n records, evenly spread: the true box green, the answered one red, the expression and the IoU below."""
    shown = []
    for record, box, iou, _ in pictures.spread(judged(records, predictions), n):
        boxes = [(record.box, "lime"), *([(box, "red")] if box else ())]
        shown.append(pictures.draw_boxes(data.open_image(record), boxes, f"{record.text}: {f'IoU {iou:.2f}' if box else 'no box'}"))
    pictures.contact_sheet(shown).save(path)


# ------------------------------------------------------------------------------------------------------------------ the report

def find_stages(path):
    """Folder -> [(name, checkpoint folder)]: itself, if it is a checkpoint or a stage, otherwise every one of its folders that is."""
    path = Path(path)
    if (path / "config.json").exists():
        here = path.resolve()
        return [(f"{here.parent.name}_{here.name}" if here.name.startswith("step_") else here.name, path)]
    inside = [path, *(sorted(path.iterdir()) if path.is_dir() else ())]
    stages = [p for p in inside if (newest_step(p) / "config.json").exists()]
    if not stages:
        raise CheckpointError(f"no checkpoint at {path}: neither config.json, nor latest/config.json, nor a folder that holds one of them; "
                              "train one with sft.py, or name a downloaded one")
    stages = stages[:1] if stages[0] == path else stages
    known = {name: k for k, name in enumerate(STORY)}
    named = []
    for stage in stages:
        step = newest_step(stage)
        named.append((stage.name or stage.resolve().name, step if step == stage else stage / step.resolve().name))
    return sorted(named, key=lambda s: (known.get(s[0], len(known)), s[0]))


def print_table(rows, guess):
    head = ("mIoU", *(f"Pr@{t}" for t in THRESHOLDS), "cIoU", "center", "failed", "lenient: mIoU", "Pr@0.5")
    width = max(12, *(len(row["stage"]) for row in rows))
    print(f"{'stage':{width}} {'T':>4} {'n':>6} " + " ".join(f"{h:>6}" for h in head))
    for row in rows:
        kind = "" if row["temperature"] is None else f"{row['temperature']:g}"
        figures = [row["mIoU"], *(row[f"Pr@{t}"] for t in THRESHOLDS), row["cIoU"], row["center_error"],
                   sum(row["failures"].values()) / row["n"], row["lenient"]["mIoU"], row["lenient"]["Pr@0.5"]]
        cells = " ".join("-".rjust(max(6, len(h))) if x is None else f"{x:{max(6, len(h))}.3f}" for h, x in zip(head, figures))
        print(f"{row['stage']:{width}} {kind:>4} {row['n']:>6} {cells}{'  (blind)' if row['blind'] else ''}")
    print(f"a box of the median size in the middle of each image: mIoU {guess['mIoU']:.3f}, Pr@0.5 {guess['Pr@0.5']:.3f}")
    for row in rows:
        failed = ", ".join(f"{why} {n}" for why, n in row["failures"].items() if n)
        if failed:
            print(f"{row['stage']}{'' if row['temperature'] is None else ' T={:g}'.format(row['temperature'])}: {failed}")


def main():
    args = flags().parse_args()
    sys.stdout.reconfigure(errors="backslashreplace")                    # an answer, or a path, may hold what no encoding has
    check_flags(args)
    files = args.compare or ([args.predictions] if args.predictions else [])
    device = None if files else runtime.start(args.device)
    stages = find_stages(args.ckpt) if args.ckpt else []
    if args.image:
        return ask(*stages[-1], device, args)
    runs = {folder: data.read_json(folder / "run.json") or {} for _, folder in stages}
    recorded = next((run for run in reversed(runs.values()) if "data" in run), {})
    name = args.data or recorded.get("data", "synth")
    root = args.root or (recorded.get("root") if recorded.get("data") == name else None)
    records = data.load(name, root, args.split)
    refused = data.refusal_summary(records, name, root, args.split)
    if not records:
        raise DataError(f"no usable record in the split {args.split} of {name}: {refused or 'it is empty'}")
    common = {"data": name, "split": args.split, "data_hash": records.hash, "blind": args.blind, "refused": records.refusals}
    processor = Processor.from_pretrained(stages[-1][1]) if args.coords == "resized" else None
    given = [read_predictions(file, records, args.coords, processor) for file in files]
    known = (train_records(name, root, args.split), list(records))
    records = list(records)[:args.limit]
    beside = "_vs_".join((str(Path(files[0]).with_suffix("")), *(Path(file).stem for file in files[1:]))) if files else None
    out = Path(args.out or beside or Path(args.ckpt) / "eval")
    runtime.writable(out)                                                # before anything is computed that could be lost
    rows, cases, more = [], [], {"centre_box": metrics.centre_box(records)}

    def report(stage, checkpoint, temperature, predictions):
        rows.append({"stage": stage, "checkpoint": str(checkpoint), "temperature": temperature, **common,
                     **score(records, predictions, name in AT_LEAST), **details(records, predictions, name, known)})
        if runtime.rank() == 0:
            suffix = stage + (f"_T{temperature:g}" if temperature else "") + ("_blind" if args.blind else "")
            if not files:
                text = "".join(json.dumps(p) + "\n" for p in predictions)
                (out / f"predictions_{suffix}.jsonl").write_text(text, encoding="utf-8")
            (out / "eval.json").write_text(json.dumps({"rows": rows, **more}, indent=2) + "\n", encoding="utf-8")
            cases.append(judged(records, predictions))
            sheet_of_answers(records, predictions, out / f"overlays_{suffix}.png")

    if files:
        answers = [[found.get(r.id) for r in records] for found in given]
        if args.compare:
            a, b = (overlap_of(records, side) for side in answers)
            more["comparison"] = {"a": files[0], "b": files[1], **metrics.paired(records, a, b, name in AT_LEAST)}
        stems = [Path(file).stem.removeprefix("predictions_") for file in files]
        for file, stem, predictions in zip(files, stems, answers):
            named = stem if stems.count(stem) == 1 else f"{Path(file).resolve().parent.name}_{stem}"
            report(named, file, None, predictions)
    else:
        for stage, folder in stages:
            model, processor = runtime.open_checkpoint(folder, device)
            if runs[folder].get("prompt_hash", prompt_hash()) != prompt_hash() and runtime.rank() == 0:
                print(f"{folder}: trained with another prompt than answer.PROMPT; expect lower scores")
            for temperature in args.temperature:
                report(stage, folder, temperature, evaluate(
                    model, processor, records, temperature=temperature, max_new_tokens=args.max_new_tokens, batch=args.batch,
                    seed=args.seed, samples=args.samples if temperature else 1, blind=args.blind, label=f"{stage} T={temperature:g}"))
            del model                                                    # before the next one is loaded
    if runtime.rank() == 0:
        folders = [] if files else [(stage, folder.resolve().parent if (folder / "run.json").exists() else folder)
                                    for stage, folder in stages]         # a downloaded checkpoint lies in no stage's folder
        page.write(out / "report.html", rows, cases, folders, [*(known[0] or ()), *known[1]], more)
        print_table(rows, more["centre_box"])
        if refused:
            print(f"not scored: {refused}")
        for metric, test in more.get("comparison", {}).items():
            if isinstance(test, dict):
                low, high = test["ci"]
                print(f"B - A: {metric} {test['difference']:+.3f} (95% {low:+.3f} to {high:+.3f}), p {test['p']:.3f}")
        print(f"report, pictures{'' if files else ', predictions'}: {out}")


def judged(records, predictions):
    """-> (record, box or None, IoU, text) of each, for the report's cases."""
    boxes = [read_prediction(p, r)[0] for p, r in zip(predictions, records)]
    iou = reward.iou(metrics.tensor(boxes), torch.tensor([r.box for r in records], dtype=torch.float64)).tolist()
    return [(r, box, v, (p or {}).get("text", "")) for r, box, v, p in zip(records, boxes, iou, predictions)]


def ask(stage, folder, device, args):
    """One question about one picture: prints reasoning and box, and draws it. The picture is turned upright first, as its EXIF says and as
    viewers show it: the question speaks of what one sees. (A data set's images are taken as stored, see `data.open_image`.)"""
    path = Path(args.image)
    try:
        with Image.open(path) as file:
            turned = file.getexif().get(ExifTags.Base.Orientation, 1) != 1
            image = data.rgb(ImageOps.exif_transpose(file))
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"--image {path}: unreadable ({error})") from None
    out = Path(args.out or Path(args.ckpt) / "eval")
    runtime.writable(out)
    model, processor = runtime.open_checkpoint(folder, device)
    prompt = processor(image, args.text)
    (W, H), (w, h) = prompt.frame.original, prompt.frame.resized
    unit = processor.patch * processor.merge
    if round(W / unit) * round(H / unit) * unit ** 2 > processor.max_pixels:
        print(f"{path} has {W} x {H} pixels, more than the model's limit of {processor.max_pixels:,}: it is shrunk to {w} x {h}, and small "
              "objects may be lost; cut it into parts to keep them")
    tokens, _, lengths = generate(model, [prompt], 1, args.max_new_tokens, args.temperature[0], torch.tensor([args.seed]))
    text = processor.decode(tokens[0, 0].cpu()[:lengths[0, 0]])
    strict = locate(answer.parse_box(text), prompt.frame)
    box = strict or locate(answer.parse_box_lenient(text), prompt.frame)
    print(f"{stage}: {text}")
    if not box:
        print(f"no box: {answer.failure(text) or 'outside image'}")
        return
    pictures.overlay(image, [(box, args.text[:60], RED)], out / f"{path.stem}_answer.png")
    print(f"box in pixels of the picture{', turned upright as its EXIF says' if turned else ''}: {', '.join(f'{v:.1f}' for v in box)}"
          f"{'' if strict else ' (read leniently)'}")
    print(f"drawn: {out / f'{path.stem}_answer.png'}")


def train_records(name, root, split):
    """The records trained on that those of another split are compared with (validation may be held out of "train"), or None where the data
    set has none (a file of one's own)."""
    try:
        return None if split in ("train", "sft", "rft") else list(data.load(name, root, "sft" if split == "val" else "train"))
    except DataError:
        return None


def check_flags(args):
    files = args.predictions or args.compare
    if not args.ckpt and not files:
        runtime.fail("name a checkpoint's folder (python eval.py ckpt/), or a file with --predictions")
    if args.predictions and args.compare:
        runtime.fail("--predictions scores one file, --compare two; name one of them")
    if bool(args.image) != bool(args.text):
        runtime.fail("--image and --text go together: a picture's file, and what to look for in it")
    if args.image and (not args.ckpt or files or args.blind or args.samples > 1 or len(args.temperature) > 1 or runtime.world() > 1):
        runtime.fail("--image asks one checkpoint once: one process, one --temperature, no --predictions, --compare, --samples or --blind")
    if args.samples > 1 and not (max(args.temperature) > 0 and not files):
        runtime.fail(f"--samples {args.samples} needs a checkpoint and a --temperature above 0: greedy answers are all the same")
    if args.coords == "resized" and not args.ckpt:
        runtime.fail("--coords resized needs a checkpoint, whose processor says how images were resized: python eval.py CKPT --predictions "
                     '...; or give each line its "frame"')
    if args.coords and not files:
        runtime.fail("--coords is about a file given with --predictions")
    if files and (args.blind or args.temperature != [0.0]):
        runtime.fail("predictions are scored as they are; --blind and --temperature belong to a checkpoint")
    if min(args.temperature) < 0 or not all(map(math.isfinite, args.temperature)) or len(set(args.temperature)) < len(args.temperature):
        runtime.fail(f"--temperature {args.temperature}: numbers from 0 up, each once")


if __name__ == "__main__":
    runtime.main(main)
