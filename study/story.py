"""The end of speedrun.sh: a table, a picture, and what the method adds to GRPO from the base.

    python study/story.py ckpt          writes table.md and story.png there
"""
import sys
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data import load  # noqa: E402
from readers.base import Record, read_json  # noqa: E402
from report import metrics  # noqa: E402
from report.predictions import Prediction, read_predictions, strict_boxes  # noqa: E402
from study.picture import STAGES, is_place, picture  # noqa: E402
from train.dist import fail  # noqa: E402
from train.flags import FlagParser  # noqa: E402
from train.run import launch  # noqa: E402


def table(records: Sequence[Record], boxes: dict[str, Tensor]) -> str:
    """Markdown. boxes: row's name -> (N, 4) of its answers, NaN for no box."""
    places = [i for i, record in enumerate(records) if is_place(record)]
    names = [i for i, record in enumerate(records) if not is_place(record)]
    parts = [(part, [records[i] for i in part])
             for part in (places, names, list(range(len(records))))]
    lines = [
        [f"{len(records)} test scenes", f"Pr@0.5 on places ({len(places)})",
         f"on names ({len(names)})", "on all", "mIoU of all", "no box"],
        ["---"] * 6]
    for name, pred in boxes.items():
        scores = [metrics.metrics(pred[part], *metrics.targets(some)) if some else {"n": 0}
                  for part, some in parts]
        missing = pred[:, 0].isnan().double().mean().item()
        lines.append([name, *row_cells(scores), f"{missing:.3f}"])
    # The box has the median size of the records that it is scored on.
    guesses = [metrics.centre_box(some) if some else {"n": 0} for _, some in parts]
    lines.append(["a box of the median size in the middle", *row_cells(guesses), "0.000"])
    return "".join("| " + " | ".join(cells) + " |\n" for cells in lines)


def row_cells(scores: Sequence[metrics.Scores]) -> list[str]:
    """scores: of places, names and all."""
    values = [*((part, "Pr@0.5") for part in scores), (scores[-1], "mIoU")]
    return [f"{part[name]:.3f}" if part["n"] else "-" for part, name in values]


def gain(records: Sequence[Record], ious: dict[str, Tensor]) -> str:
    """The last line: RSGround-R1 minus GRPO from the base on the same scenes."""
    places = [i for i, record in enumerate(records) if is_place(record)]
    name = f"{STAGES['rft']} - {STAGES['direct']}"
    if not places:
        return f"{name}: none of the {len(records)} scenes has an expression of a place"
    test = metrics.paired(
        [records[i] for i in places], ious["direct"][places], ious["rft"][places])["Pr@0.5"]
    interval = "no interval over one scene"
    if test["ci"]:
        low, high = test["ci"]
        interval = f"95% interval over scenes {low:+.3f} to {high:+.3f}"
    return (f"{name}, Pr@0.5 on the same {len(places)} places: {test['difference']:+.3f}, "
            f"{interval}. One seed is one seed: seeds differ too, and the interval does not "
            "cover that.")


def main() -> None:
    parser = FlagParser(description="The table, last line and picture of a run of speedrun.sh")
    parser.add_argument("ckpt", nargs="?", default="ckpt", help="its folder")
    ckpt = Path(parser.parse_args().ckpt)
    content = read_json(ckpt / "eval" / "eval.json")
    if content is None:
        fail(f"no scores in {ckpt / 'eval'}; run speedrun.sh first")
    row = content["rows"][0]
    records = list(load(row["data"], None, row["split"]))[:row["n"]]

    def read(name: str) -> list[Prediction | None]:
        file = ckpt / name
        if not file.exists():
            fail(f"there is no {file}; run speedrun.sh again")
        by_id = read_predictions(file, records)
        return [by_id.get(record.id) for record in records]

    answers = {stage: read(f"eval/predictions_{stage}.jsonl") for stage in STAGES}
    boxes = {stage: strict_boxes(records, answers[stage]) for stage in STAGES}
    target, size = metrics.targets(records)
    ious = {stage: metrics.overlaps(boxes[stage], target, size).iou for stage in STAGES}
    samples = {}
    for stage in ("sft", "rft"):
        some = read(f"eval_samples_{stage}/predictions_{stage}_T1.jsonl")
        samples[stage] = some[:sum(prediction is not None for prediction in some)]
    rows = {name: boxes[stage] for stage, name in STAGES.items()}
    rows[f"{STAGES['rft']} without the image"] = strict_boxes(
        records, read("eval_blind/predictions_rft_blind.jsonl"))

    text = table(records, rows)
    (ckpt / "table.md").write_text(text, encoding="utf-8")
    picture(records, answers, boxes, ious, samples).save(ckpt / "story.png")
    print(text)
    print(f"picture: {ckpt / 'story.png'}, report: {ckpt / 'eval' / 'report.html'}")
    print(gain(records, ious))


if __name__ == "__main__":
    launch(main)
