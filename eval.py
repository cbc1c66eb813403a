"""Scores: every stage found under a folder side by side, or anyone's predictions; a table, eval.json, report.html, predictions, pictures.

Boxes are clamped to the image and compared in pixels of the original image, as floats (no +1 pixel); one counts where IoU > t, strictly,
as in DIOR-RSVG's own evaluation (IoU >= t on opt, as in OPT-RSVG's; VRSBench's own metric stands beside ours as "vrsbench"). Every record
counts: what can't be parsed has IoU 0. The columns "lenient" read the same texts with `reward.parse_box_lenient`; they are for models that
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
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import ExifTags, Image, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm

import data
import report as page
import reward
import runtime
from data import DataError, Frame
from generate import generate
from model import CheckpointError

THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9)
AT_LEAST = ("opt",)                                       # data sets whose own evaluation counts IoU >= t
FAILURES = (*reward.FAILURES, "outside image", "no prediction")
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

def metrics(pred, gt, size, inclusive=False):
    """pred, gt (N, 4) xyxy in original pixels, size (N, 2) as (W, H) -> dict of floats, rates as fractions. All boxes are clamped first; a
    NaN row of pred, or one without area in the image, is a miss: its IoU is 0 and its target's area joins the union of cIoU.

    mIoU: mean IoU; Pr@t: share with IoU > t (>= t where inclusive); cIoU: sum of intersections over sum of unions; center_error: mean
    `reward.center_distance` over the valid rows, None where there is none; n: N."""
    valid, iou, inside, union, away = overlaps(pred, gt, size)
    n = len(gt)
    return {"mIoU": iou.sum().item() / max(n, 1), **{f"Pr@{t}": hits(iou, t, inclusive).sum().item() / max(n, 1) for t in THRESHOLDS},
            "cIoU": inside.sum().item() / max(union.sum().item(), 1e-12),
            "center_error": away[valid].mean().item() if valid.any() else None, "n": n}


def centre_box(records):
    """What a guess scores that looks at nothing: a box in the middle of each image, of the median width and height of these records."""
    gt, size = targets(records)
    half = ((gt[:, 2:] - gt[:, :2]) / size).median(0).values / 2
    return metrics(torch.cat((size * (0.5 - half), size * (0.5 + half)), 1), gt, size)


def overlaps(pred, gt, size):
    """As `metrics` -> (N,) each: is there a box, IoU, area of intersection and of union (pixels), `reward.center_distance` (of no meaning
    where there is no box)."""
    pred, gt, size = pred.double(), gt.double(), size.double()
    pred, gt = (box.clamp(min=0).minimum(size.repeat(1, 2)) for box in (pred, gt))
    valid = (pred[:, 2:] > pred[:, :2]).all(1)                           # (N,); False for NaN
    pred = torch.where(valid[:, None], pred, gt[:, :2].repeat(1, 2))     # a miss is a box without area
    return valid, reward.iou(pred, gt), *reward.intersection_union(pred, gt), reward.center_distance(pred, gt, size)


def hits(iou, t, inclusive):
    return iou >= t if inclusive else iou > t


def vrsbench_iou(pred, gt, size, grid=None):
    """As `metrics` -> (N,) IoU as VRSBench's own evaluation computes it: boxes cut down to whole hundredths of the image's sides, both ends
    counted in (+1). A box that is a line or a point has an area there, and is hit by one of the same cells. NaN rows are 0.
    grid (N, 4): the targets in whole hundredths as the data set itself gives them, NaN where it does not."""
    size = size.double().repeat(1, 2)
    p, g = ((100 * (box.double().clamp(min=0).minimum(size) / size) + 1e-6).floor() for box in (pred, gt))         # 29% is 29
    g = g if grid is None else torch.where(grid.isnan(), g, grid.double())
    inside = (torch.minimum(p[:, 2:], g[:, 2:]) - torch.maximum(p[:, :2], g[:, :2]) + 1).clamp(min=0).prod(1)
    area_p, area_g = ((box[:, 2:] - box[:, :2] + 1).prod(1) for box in (p, g))
    return (inside / (area_p + area_g - inside)).nan_to_num(0.0)


def vrsbench(pred, gt, size, unique, grid=None):
    """The official VRSBench metric: share of all samples with `vrsbench_iou` >= 0.5 and 0.7; unique: N of True, False or None (unknown)."""
    iou = vrsbench_iou(pred, gt, size, grid)
    parts = {"all": [True] * len(gt), "unique": [u is True for u in unique], "non_unique": [u is False for u in unique]}
    masks = {name: torch.tensor(mask, dtype=torch.bool) for name, mask in parts.items()}
    return {name: {"n": int(m.sum()), **{f"Acc@{t}": (iou[m] >= t).double().mean().item() for t in (0.5, 0.7)}}
            for name, m in masks.items() if m.any()}


def locate(box, frame):
    """A box in the model's frame, or None -> the same in original pixels, clamped, or None where nothing of it lies in the image."""
    return box and reward.clamp_box(data.to_image_frame(box, frame), frame.original)


def said_in(prediction):
    """The frame of a prediction's text."""
    return Frame(**{k: v if k == "convention" else tuple(v) for k, v in prediction["frame"].items()})


def read_prediction(prediction, record):
    """-> strict box, lenient box (original pixels, clamped, or None), and the failure of the strict one: None or one of FAILURES."""
    if prediction is None:
        return None, None, "no prediction"
    if "text" in prediction:
        text, frame = prediction["text"], said_in(prediction)
        box, lenient, why = locate(reward.parse_box(text), frame), locate(reward.parse_box_lenient(text), frame), reward.failure(text)
    else:
        written, why = reward.checked(prediction["box"]) if prediction["box"] else (None, "no answer")
        box = lenient = None if why else reward.clamp_box(written, record.size)
    return box, lenient, why or (None if box else "outside image")


def on_grid(prediction, record):
    """As `read_prediction`'s strict box, but a line or a point within the image counts too: VRSBench's grid gives it an area."""
    box, _, why = read_prediction(prediction, record)
    if why == "no area":
        if "text" in prediction:
            flat = data.to_image_frame(reward.read_answer(prediction["text"])[0], said_in(prediction))
        else:
            flat = reward.checked(prediction["box"])[0]
        box = flat if 0 <= flat[0] <= flat[2] <= record.size[0] and 0 <= flat[1] <= flat[3] <= record.size[1] else None
    return box


def score(records, predictions, inclusive=False):
    """N records, N predictions (dicts as `evaluate` and `read_predictions` give them; None: there is none) -> part of an eval.json row."""
    strict, lenient, failures = zip(*(read_prediction(p, r) for p, r in zip(predictions, records, strict=True)))
    counts = Counter(failures)
    ours, theirs = (metrics(tensor(boxes), *targets(records), inclusive) for boxes in (strict, lenient))
    return {**ours, "failures": {why: counts[why] for why in FAILURES}, "lenient": theirs}


def tensor(boxes):
    """N boxes or None -> (N, 4) double, NaN where there is none."""
    return torch.tensor([box or [math.nan] * 4 for box in boxes], dtype=torch.float64)


def targets(records):
    """N records -> their boxes (N, 4) in original pixels, their images' sizes (N, 2) as (W, H), double."""
    return tuple(torch.tensor([getattr(r, key) for r in records], dtype=torch.float64) for key in ("box", "size"))


def answered(records, predictions):
    """N records and their predictions (or None) -> strict boxes (N, 4) in original pixels, double, NaN where there is none."""
    return tensor([read_prediction(p, r)[0] for p, r in zip(predictions, records, strict=True)])


def details(records, predictions, name, known):
    """What else a row of eval.json says: 95% intervals "ci", "breakdowns", "vrsbench" on that data set, and where predictions carry several
    samples "pass" and "dispersion". known: the records of train (None: not there) and of the whole split, for what a record is compared
    with. The same numbers on every process and from a predictions file: the resampling is seeded."""
    inclusive = name in AT_LEAST
    pred, (target, size) = answered(records, predictions), targets(records)
    _, iou, inside, union, _ = overlaps(pred, target, size)
    hit = hits(iou, 0.5, inclusive).double()
    rates = {"mIoU": (iou, None), **{f"Pr@{t}": (hits(iou, t, inclusive).double(), None) for t in THRESHOLDS}, "cIoU": (inside, union)}
    extra = {"ci": intervals(records, rates), "breakdowns": {}}
    for by, values in properties(records, *known).items():
        groups = {value: [i for i, v in enumerate(values) if v == value] for value in sorted({v for v in values if v is not None})}
        if groups:
            extra["breakdowns"][by] = {value: {"n": len(rows), "mIoU": iou[rows].mean().item(), "Pr@0.5": hit[rows].mean().item()}
                                       for value, rows in groups.items()}
    if name == "vrsbench":
        flat = tensor([on_grid(p, r) for p, r in zip(predictions, records)])
        extra["vrsbench"] = vrsbench(flat, target, size, [r.unique for r in records], tensor([r.grid for r in records]))
    if any(p and "samples" in p for p in predictions):
        extra |= sampled(records, predictions, target, size, inclusive)
    return extra


def properties(records, train, split):
    """Property -> its value for each record, None where unknown. size: COCO's limits, 32 x 32 and 96 x 96 pixels; region: where in the
    image's three by three parts the target's centre lies; distractors: other annotated boxes of its category in its image (what no
    expression of train or of this split names is not counted); train image, train category: does train have them too."""
    boxes = defaultdict(set)
    for r in itertools.chain(train or (), split):
        boxes[r.image, r.category].add(r.box)
        for o in getattr(r.image, "objects", ()):                        # a drawn scene knows them all
            boxes[r.image, o.category].add(tuple(map(float, o.box)))
    images, categories = ({getattr(r, key) for r in train or ()} for key in ("image", "category"))
    values = defaultdict(list)
    for r in records:
        (x1, y1, x2, y2), (W, H), others = r.box, r.size, len(boxes[r.image, r.category] - {r.box})
        column, row = min(2, int(1.5 * (x1 + x2) / W)), min(2, int(1.5 * (y1 + y2) / H))
        area = (x2 - x1) * (y2 - y1)
        values["size"].append("small" if area < 32 ** 2 else "medium" if area < 96 ** 2 else "large")
        values["category"].append(r.category or None)
        values["region"].append(f"{('top', 'middle', 'bottom')[row]} {('left', 'centre', 'right')[column]}")
        values["kind"].append(r.kind or None)
        values["distractors"].append(str(others) if others < 3 else "3 or more")
        values["train image"].append(None if train is None else "also in train" if r.image in images else "disjoint")
        values["train category"].append(None if train is None or not r.category else "seen" if r.category in categories else "unseen")
    return values


def sampled(records, predictions, target, size, inclusive):
    """Of k samples a record: "pass" {j: chance that the best of j has IoU > 0.5}, unbiased, 1 - C(k - c, j) / C(k, j) for c hits (Chen et
    al., arXiv 2107.03374); "dispersion": mean `reward.dispersion` of the records with two valid boxes or more, in image sides."""
    k = max(len(p["samples"]) for p in predictions if p and "samples" in p)
    texts = [p.get("samples", ()) if p else () for p in predictions]
    found = [[read_prediction({**p, "text": text}, r)[0] for text in group] for group, p, r in zip(texts, predictions, records)]
    boxes = torch.stack([tensor([*group, *[None] * (k - len(group))]) for group in found])                           # (N, k, 4)
    valid = ~boxes[..., 0].isnan()
    each = [hits(overlaps(boxes[:, j], target, size)[1], 0.5, inclusive) for j in range(k)]
    right = torch.stack(each, 1).sum(1).tolist()
    tries = sorted({1, *(2 ** i for i in range(1, k.bit_length()) if 2 ** i <= k), k})
    scatter = reward.dispersion(boxes, valid, size)[valid.sum(1) >= 2]
    return {"samples": k, "pass": {str(j): sum(1 - math.comb(k - c, j) / math.comb(k, j) for c in right) / len(right) for j in tries},
            "dispersion": scatter.mean().item() if len(scatter) else None}


# ------------------------------------------------------------------------------------------------------------------ chance

def resample(records, draws=2000, seed=0):
    """How often each of I images is drawn in each resample: counts (draws, I), and each record's image (N,). Images are drawn, not records:
    those of one image share what is hard about it."""
    places = {}
    image = np.array([places.setdefault(r.image, len(places)) for r in records])
    return np.random.default_rng(seed).multinomial(len(places), np.full(len(places), 1 / len(places)), size=draws), image


def intervals(records, rates):
    """rates: name -> (values (N,), weights (N,) or None for 1 each), a rate being sum of values over sum of weights -> name -> [low, high],
    95% percentile bootstrap over images."""
    counts, image = resample(records)
    found = {}
    for name, (values, weights) in rates.items():
        above, below = (np.bincount(image, v, counts.shape[1]) for v in (values, np.ones(len(records)) if weights is None else weights))
        found[name] = np.percentile(counts @ above / np.maximum(counts @ below, 1e-12), (2.5, 97.5)).tolist()
    return found


def paired(records, a, b, inclusive=False):
    """Predictions a and b of the same records -> name -> {"difference" (b - a), "ci" (95%), "p"}: both are resampled by the same images,
    and p is two-sided: twice the share of resamples whose difference is 0 or on the rarer side of it, counted with one more at 0."""
    iou = [overlaps(answered(records, side), *targets(records))[1] for side in (a, b)]
    counts, image = resample(records)
    n = counts @ np.bincount(image, minlength=counts.shape[1])
    found = {}
    for name, (x, y) in {"mIoU": iou, **{f"Pr@{t}": [hits(v, t, inclusive).double() for v in iou] for t in THRESHOLDS}}.items():
        apart = counts @ np.bincount(image, (y - x).numpy(), counts.shape[1]) / n
        p = min(1.0, 2 * min(((apart <= 0).sum() + 1) / (len(apart) + 1), ((apart >= 0).sum() + 1) / (len(apart) + 1)))
        found[name] = {"difference": (y - x).mean().item(), "ci": np.percentile(apart, (2.5, 97.5)).tolist(), "p": p}
    return found


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
                box = locate(reward.parse_box(texts[0]), prompt.frame)
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
        resized = data.smart_resize(*record.size, factor, processor.min_pixels, processor.max_pixels)
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

def overlay(image, boxes, path=None):
    """Draws (box in the image's pixels, label, colour) triples on a copy of a PIL image; written to path where one is given."""
    image = image.convert("RGB")
    draw, width = ImageDraw.Draw(image), max(1, round(max(image.size) / 200))
    for (x1, y1, x2, y2), label, colour in boxes:
        draw.rectangle((x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)), outline=colour, width=width)
        font = ImageFont.load_default(max(10, max(image.size) // 40))
        draw.text((x1 + width, y1 + width), label.encode("ascii", "replace").decode(), fill=colour, font=font)
    if path:
        image.save(path)
    return image


def contact_sheet(records, predictions, path, n=12):
    """Up to n records, evenly spread: the true box green, the answered one red, the expression and the IoU below."""
    shown = []
    for record, box, iou, _ in page.spread(judged(records, predictions), n):
        boxes = [(record.box, "lime"), *([(box, "red")] if box else ())]
        shown.append(data.draw_boxes(data.open_image(record), boxes, f"{record.text}: {f'IoU {iou:.2f}' if box else 'no box'}"))
    data.contact_sheet(shown).save(path)


# ------------------------------------------------------------------------------------------------------------------ the report

def find_stages(path):
    """Folder -> [(name, checkpoint folder)]: itself, if it is a checkpoint or a stage, otherwise every one of its folders that is."""
    path = Path(path)
    if (path / "config.json").exists():
        here = path.resolve()
        return [(f"{here.parent.name}_{here.name}" if here.name.startswith("step_") else here.name, path)]
    inside = [path, *(sorted(path.iterdir()) if path.is_dir() else ())]
    stages = [p for p in inside if (p / "config.json").exists() or (p / "latest" / "config.json").exists()]
    if not stages:
        raise CheckpointError(f"no checkpoint at {path}: neither config.json, nor latest/config.json, nor a folder that holds one of them; "
                              "train one with sft.py, or name a downloaded one")
    stages = stages[:1] if stages[0] == path else stages
    known = {name: k for k, name in enumerate(STORY)}
    return sorted(((p.name or p.resolve().name, newest(p)) for p in stages), key=lambda s: (known.get(s[0], len(known)), s[0]))


def newest(stage):
    """A stage's folder -> that of its newest step."""
    return stage if (stage / "config.json").exists() else stage / (stage / "latest").resolve().name


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
    refused = data.told_refused(records, name, root, args.split)
    if not records:
        raise DataError(f"no usable record in the split {args.split} of {name}: {refused or 'it is empty'}")
    common = {"data": name, "split": args.split, "data_hash": records.hash, "blind": args.blind, "refused": records.refusals}
    processor = data.Processor.from_pretrained(stages[-1][1]) if args.coords == "resized" else None
    given = [read_predictions(file, records, args.coords, processor) for file in files]
    known = (train_records(name, root, args.split), list(records))
    records = list(records)[:args.limit]
    beside = "_vs_".join((str(Path(files[0]).with_suffix("")), *(Path(file).stem for file in files[1:]))) if files else None
    out = Path(args.out or beside or Path(args.ckpt) / "eval")
    runtime.writable(out)                                                # before anything is computed that could be lost
    rows, cases, more = [], [], {"centre_box": centre_box(records)}

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
            contact_sheet(records, predictions, out / f"overlays_{suffix}.png")

    if files:
        answers = [[found.get(r.id) for r in records] for found in given]
        if args.compare:
            more["comparison"] = {"a": files[0], "b": files[1], **paired(records, *answers, name in AT_LEAST)}
        stems = [Path(file).stem.removeprefix("predictions_") for file in files]
        for file, stem, predictions in zip(files, stems, answers):
            named = stem if stems.count(stem) == 1 else f"{Path(file).resolve().parent.name}_{stem}"
            report(named, file, None, predictions)
    else:
        for stage, folder in stages:
            model, processor = runtime.open_checkpoint(folder, device)
            if runs[folder].get("prompt_hash", data.prompt_hash()) != data.prompt_hash() and runtime.rank() == 0:
                print(f"{folder}: trained with another prompt than data.PROMPT; expect lower scores")
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
    iou = reward.iou(tensor(boxes), torch.tensor([r.box for r in records], dtype=torch.float64)).tolist()
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
    answer = processor.decode(tokens[0, 0].cpu()[:lengths[0, 0]])
    strict = locate(reward.parse_box(answer), prompt.frame)
    box = strict or locate(reward.parse_box_lenient(answer), prompt.frame)
    print(f"{stage}: {answer}")
    if not box:
        print(f"no box: {reward.failure(answer) or 'outside image'}")
        return
    overlay(image, [(box, args.text[:60], RED)], out / f"{path.stem}_answer.png")
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
