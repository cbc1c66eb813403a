"""Scores: every stage found under a checkpoint folder, side by side; or anyone's predictions.

Greedy answers by default; `--temperature 0 1` adds sampled ones. Every record counts, an answer without a valid box as IoU 0. Strict columns
use the format that the reward uses; lenient ones the first box that can be found in the text, which a model that was never taught our format
needs. Written: eval.json (the table), predictions.jsonl a stage (raw text, box, frame: anyone can score it again), pictures.

    python eval.py ckpt/
    torchrun --nproc_per_node 8 eval.py ckpt/rft --data dior --split test
    python eval.py --predictions theirs.jsonl --data dior --split test --coords original
"""
import json
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

import data
import reward
import runtime
from data import DataError
from generate import generate
from model import CheckpointError, QwenVL, folder

THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9)
OUTSIDE = "outside the image"     # parsed, but no area of it lies on the image
STAGES = ("base", "sft", "rft")   # the order of their rows


# ------------------------------------------------------------------------------------------------------------------ answers and metrics

def read_answer(text, frame, parse=reward.parse):
    """A completion's text -> (box in original pixels cut to the image, None) or (None, why there is none)."""
    box, failure = parse(text)
    if box is None:
        return None, failure
    box = reward.clamp_box(data.to_image_frame(box, frame), frame.original)
    return box, None if box else OUTSIDE


def lenient(text):
    box = reward.parse_box_lenient(text)
    return box, None if box else "no box found"


def metrics(pred, gt, size):
    """pred (N, 4) in original pixels, NaN where there is no box; gt (N, 4); size (N, 2) as width, height -> rates as fractions.

    Both are cut to the image first. Pr@t: share with IoU > t; mIoU; cIoU: sum of intersections over sum of unions, to which a miss adds its
    target's area; center_error: mean distance of the centres as in the positional reward, over the rows that have a box."""
    pred, gt, size = (torch.as_tensor(x, dtype=torch.float64) for x in (pred, gt, size))
    limit = torch.cat((size, size), -1)
    pred, gt = (torch.minimum(x.clamp(min=0), limit) for x in (pred, gt))
    valid = reward.area(pred) > 0                                        # False for NaN as well
    iou = reward.iou(pred, gt).where(valid, torch.zeros((), dtype=torch.float64))
    areas, target = reward.area(pred).where(valid, torch.zeros((), dtype=torch.float64)), reward.area(gt)
    inter = iou / (1 + iou) * (areas + target)
    error = reward.centre_error(pred, gt, size)[valid]
    return {**{f"Pr@{t}": (iou > t).double().mean().item() for t in THRESHOLDS}, "mIoU": iou.mean().item(),
            "cIoU": (inter.sum() / (areas + target - inter).sum()).item(),
            "center_error": error.mean().item() if len(error) else None, "n": len(iou)}


def tensors(boxes, records):
    """Boxes or None beside their records -> the arguments of `metrics`."""
    nothing = (torch.nan,) * 4
    return (torch.tensor([b or nothing for b in boxes], dtype=torch.float64), torch.tensor([r.box for r in records], dtype=torch.float64),
            torch.tensor([r.size for r in records], dtype=torch.float64))


def score(predictions, records):
    """predictions beside their records -> the row's metrics: strict, lenient, failures by class."""
    row = metrics(*tensors([p["box"] for p in predictions], records))
    found = metrics(*tensors([p["lenient"] for p in predictions], records))
    return {**row, "failures": dict(Counter(p["failure"] for p in predictions if p["failure"])),
            "lenient": {name: found[name] for name in ("Pr@0.5", "mIoU")}}


# ------------------------------------------------------------------------------------------------------------------ asking a model

def another_image(records, i):
    """For --blind: the next record's image that is not this one's, in this one's size."""
    n = len(records)
    other = next((records[j % n] for j in range(i + 1, i + n) if records[j % n].image != records[i].image), None)
    if other is None:
        raise DataError("--blind needs records on at least two images")
    return data.open_image(other).resize(records[i].size)


def evaluate(model, processor, records, temperature=0.0, max_new_tokens=256, size=16, seed=0, blind=False, name="eval"):
    """Answers to all records, in their order, each process doing its share: dicts of id, text, box (original pixels or None), failure, lenient
    (box or None), frame. temperature 0 is greedy; size: questions in a batch. Under `runtime.gathered` if the model is sharded."""
    mine = list(range(len(records)))[runtime.rank()::runtime.world()]
    out, hits = {}, 0.0
    with tqdm(total=len(mine), desc=name, unit="q", disable=runtime.rank() > 0, leave=False) as bar:
        for first in range(0, len(mine), size):
            part = mine[first:first + size]
            images = [another_image(records, i) if blind else data.open_image(records[i]) for i in part]
            prompts = [processor(image, records[i].text) for image, i in zip(images, part)]
            seeds = torch.tensor([seed * 1_000_003 + i for i in part])   # by the record's place: sharding changes no sample
            tokens, _, lengths = generate(model, prompts, 1, max_new_tokens, temperature, seeds)
            for i, prompt, t, n in zip(part, prompts, tokens[:, 0], lengths[:, 0]):
                text = processor.decode(t[:n])
                box, failure = read_answer(text, prompt.frame)
                out[i] = {"id": records[i].id, "text": text, "box": box, "failure": failure,
                          "lenient": read_answer(text, prompt.frame, lenient)[0], "frame": vars(prompt.frame)}
                hits += reward.iou(torch.tensor(box), torch.tensor(records[i].box)).item() if box else 0.0
            bar.update(len(part))
            bar.set_postfix_str(f"mIoU {hits / len(out):.3f}")
    if dist.is_initialized():
        shares = [None] * runtime.world()
        dist.all_gather_object(shares, out)
        out = {i: p for share in shares for i, p in share.items()}
    return [out[i] for i in range(len(records))]


# ------------------------------------------------------------------------------------------------------------------ anyone's predictions

def read_predictions(path, records, coords):
    """A JSONL of {"id", "text"} or {"id", "box"} -> predictions beside the records; a record without a line is a miss.

    Boxes are xyxy in original pixels. Texts are in the frame of their line, or in `coords`: "original" pixels, "1000"; for "resized" a line
    must carry its frame, because the size that its model saw is known to that model alone."""
    known, found = {r.id: r for r in records}, {}
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: unreadable predictions ({error})") from None
    for n, text in enumerate(lines, 1):
        if not text.strip():
            continue
        where = f"{path}, line {n}"
        try:
            line = json.loads(text)
            identity = str(line["id"])
        except (ValueError, KeyError, TypeError, RecursionError):
            raise DataError(f'{where}: not a JSON object with an "id" beside "text" or "box"') from None
        if identity not in known:
            raise DataError(f"{where}: no record of this split has the id {identity!r}; --data, --root and --split must be those of the file")
        if identity in found:
            raise DataError(f"{where}: the id {identity!r} stands there for the second time")
        found[identity] = read_prediction(line, known[identity], coords, where)
    missing = {"text": None, "box": None, "lenient": None, "failure": "no prediction"}
    return [found.get(r.id) or {"id": r.id, **missing} for r in records]


def read_prediction(line, record, coords, where):
    """One line of a predictions file -> a prediction as `evaluate` makes it."""
    if isinstance(line.get("text"), str):
        if "frame" in line:
            try:
                frame = data.Frame(tuple(line["frame"]["original"]), tuple(line["frame"]["resized"]), line["frame"]["convention"])
            except (KeyError, TypeError):
                raise DataError(f'{where}: "frame" is an object of original, resized (width, height each) and convention') from None
        elif coords in ("original", "1000"):
            frame = data.Frame(record.size, record.size, "1000" if coords == "1000" else "absolute")
        else:
            raise DataError(f'{where}: a text without "frame"; say --coords original or 1000, or add the frame that its model saw')
        box, failure = read_answer(line["text"], frame)
        return {"id": record.id, "text": line["text"], "box": box, "failure": failure,
                "lenient": read_answer(line["text"], frame, lenient)[0], "frame": vars(frame)}
    box = line.get("box")
    if "box" not in line or not (box is None or isinstance(box, list) and len(box) == 4 and all(type(v) in (int, float) for v in box)):
        raise DataError(f'{where}: neither a "text" nor a "box" that is null or four numbers')
    box = box and reward.clamp_box(box, record.size)
    return {"id": record.id, "text": None, "box": box, "lenient": box, "failure": None if box else "no box"}


# ------------------------------------------------------------------------------------------------------------------ the report

def find_stages(path):
    """Checkpoint folders to score: the path itself, or those in it -> name -> folder."""
    path = Path(path)
    if (path / "config.json").exists() or (path / "latest").exists():
        return {read_run(folder(path)).get("stage", path.resolve().name): path}
    found = {p.name: p for p in sorted(path.iterdir()) if (p / "config.json").exists() or (p / "latest").exists()} if path.is_dir() else {}
    if not found:
        raise CheckpointError(f"no checkpoint at {path}: neither a config.json nor folders of stages (sft, rft) are there")
    return dict(sorted(found.items(), key=lambda item: STAGES.index(item[0]) if item[0] in STAGES else len(STAGES)))


def read_run(path):
    return data.read_json(Path(path) / "run.json") or {}


def print_table(rows):
    columns = [*(f"Pr@{t}" for t in THRESHOLDS), "mIoU", "cIoU", "center_error"]
    print("  ".join([f"{'stage':12}{'T':>4}{'n':>7}", *(f"{c:>6}" if c != "center_error" else "centre" for c in columns), "unparsed",
                     "lenient: Pr@0.5", "mIoU"]))
    for row in rows:
        numbers = [f"{row[c]:6.3f}" if row[c] is not None else "     -" for c in columns]
        unparsed = sum(row["failures"].values()) / row["n"]
        print("  ".join([f"{row['stage']:12}{row['temperature'] if row['temperature'] is not None else '-':>4}{row['n']:7}", *numbers,
                         f"{unparsed:8.3f}", f"{row['lenient']['Pr@0.5']:15.3f}", f"{row['lenient']['mIoU']:4.3f}"]))
    for row in rows:
        if row["failures"]:
            print(f"{row['stage']} at T {row['temperature']}: " + ", ".join(f"{n} {reason}" for reason, n in row["failures"].items()))


def write_predictions(path, predictions):
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(p) + "\n" for p in predictions)


def picture(predictions, records, n=12):
    """Contact sheet of n records spread over the split: truth green, prediction red."""
    pairs = list(zip(predictions, records))[::max(1, len(records) // n)][:n]
    return data.contact_sheet([data.draw_boxes(data.open_image(r), [(r.box, "lime"), *([(p["box"], "red")] if p["box"] else [])], r.text)
                               for p, r in pairs])


def flags():
    parser = runtime.Parser("Scores every stage found under a checkpoint folder, or anyone's predictions")
    add = parser.add_argument
    add("checkpoint", nargs="?", help="a folder of stages (ckpt/), a stage (ckpt/rft), or a checkpoint")
    add("--data", help="data set; default: the one recorded in the checkpoint's run.json, else synth")
    add("--root", help="its folder; default: the recorded one, else data/<name>")
    add("--split", default="test", help="split to score")
    add("--limit", type=runtime.positive, help="score this many records, spread over the split")
    add("--out", help="folder of the report; default: the checkpoint's, or that of the predictions file")
    add("--temperature", type=float, nargs="+", default=[0.0], help="of sampling; 0 is greedy; several make several rows")
    add("--max-new-tokens", type=runtime.positive, default=256, help="tokens of an answer at most")
    add("--batch", type=runtime.positive, default=16, help="questions asked at once")
    add("--max-pixels", type=runtime.positive, help="area of the resized image at most; default: the checkpoint's own")
    add("--seed", type=int, default=0, help="of sampling")
    add("--blind", action="store_true", help="give every record another record's image: what can be had without looking")
    add("--predictions", help="score this JSONL instead of a model")
    add("--coords", choices=("original", "resized", "1000"), help="frame of its texts that carry none")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    return parser


def load_records(name, root, split, limit):
    records = data.load(name, root, split)
    refused = sum(map(len, records.refused.values()))
    if refused and runtime.rank() == 0:
        print(f"{name} {split}: {refused} records refused; `python data.py {name}` lists them")
    if not records:
        raise DataError(f"{name} {split}: no usable record")
    return [records[i * len(records) // limit] for i in range(limit)] if limit and limit < len(records) else list(records)


def main():
    args = flags().parse_args()
    if (args.checkpoint is None) == (args.predictions is None):
        runtime.fail("name a checkpoint folder or --predictions FILE, one of the two")
    if args.predictions:
        if not args.data:
            runtime.fail("--predictions needs --data, the data set that they are for")
        records = load_records(args.data, args.root, args.split, args.limit)
        predictions = read_predictions(args.predictions, records, args.coords)
        row = {"stage": Path(args.predictions).stem, "checkpoint": None, "data": args.data, "split": args.split, "temperature": None,
               **score(predictions, records)}
        out = Path(args.out or Path(args.predictions).parent)
        report(out, [row])
        picture(predictions, records).save(out / "overlays.png")
        return
    stages, rows = find_stages(args.checkpoint), []
    runs = {name: read_run(folder(path)) for name, path in stages.items()}
    recorded = next((run for run in reversed(runs.values()) if "data" in run), {})
    loaded = {}
    for name in stages:                                                  # data before weights
        run = runs[name] if "data" in runs[name] else recorded
        where = args.data or run.get("data", "synth"), args.root or (run.get("root") if args.data in (None, run.get("data")) else None)
        if where not in loaded:
            loaded[where] = load_records(*where, args.split, args.limit)
        runs[name] = where
    device = runtime.start(args.device)
    out = Path(args.out or args.checkpoint)
    for name, path in stages.items():
        records = loaded[runs[name]]
        model = QwenVL.from_pretrained(path, torch.float32 if device.type == "cpu" else torch.bfloat16, device)
        processor = data.Processor.from_pretrained(path, max_pixels=args.max_pixels)
        for temperature in args.temperature:
            predictions = evaluate(model, processor, records, temperature, args.max_new_tokens, args.batch, args.seed, args.blind,
                                   f"{name} T {temperature:g}")
            row = {"stage": name, "checkpoint": str(path), "data": runs[name][0], "split": args.split, "temperature": temperature,
                   "blind": args.blind, **score(predictions, records)}
            rows.append(row)
            if runtime.rank() == 0:
                where = out / name if len(stages) > 1 else out
                where.mkdir(parents=True, exist_ok=True)
                suffix = ("_blind" if args.blind else "") + (f"_T{temperature:g}" if temperature else "")
                write_predictions(where / f"predictions{suffix}.jsonl", predictions)
                picture(predictions, records).save(where / f"overlays{suffix}.png")
    if runtime.rank() == 0:
        report(out, rows)


def report(out, rows):
    out.mkdir(parents=True, exist_ok=True)
    (out / "eval.json").write_text(json.dumps({"rows": rows}, indent=1) + "\n", encoding="utf-8")
    print_table(rows)
    print(f"written: {out / 'eval.json'}")


if __name__ == "__main__":
    runtime.main(main)
