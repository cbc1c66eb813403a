"""What speedrun.sh tells at its end: a table, a picture, and what the last stage changed.

    python study/story.py ckpt          writes table.md and story.png there
"""
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data import load, open_image  # noqa: E402
from readers.base import Record, read_json  # noqa: E402
from report import (
    metrics,  # noqa: E402
    pictures,  # noqa: E402
)
from report import predictions as answers  # noqa: E402
from train import dist  # noqa: E402
from train.flags import FlagParser  # noqa: E402
from train.run import launch  # noqa: E402

STAGES = {
    "base": "base", "direct": "GRPO from the base", "sft": "CoT-SFT", "rft": "RSGround-R1"}
FIRST = "sft"                     # the last line is about the difference between these two
LAST = "rft"
SCENES = 6                        # of the picture, a row each

Row = Mapping[str, Any]           # of eval.json
Answers = Mapping[str, Sequence[answers.Prediction]]      # stage -> N predictions


def read_scores(folder: Path) -> dict[str, Any]:
    content = read_json(folder / "eval.json")
    if content is None:
        dist.fail(f"no scores in {folder}; run speedrun.sh first")
    return content


def row_of(content: Mapping[str, Any], stage: str, temperature: float = 0) -> Row | None:
    """A stage's row of eval.json, None where it was not scored."""
    for row in content["rows"]:
        if (row["stage"], row["temperature"]) == (stage, temperature):
            return row
    return None


def cell(row: Row | None, name: str) -> str:
    """A score as text, "" where there is none."""
    return "" if row is None else f"{row[name]:.3f}"


def table(
        scores: Mapping[str, Any], blind: Mapping[str, Any], full: Mapping[str, Any],
        novel: Mapping[str, Any],
) -> str:
    """Markdown: a line a stage, then two guesses that look at nothing.

    scores, blind: of one tiny thing a scene; full, novel: of the world as it is, and of what is
    unfamiliar there."""
    n = scores["rows"][0]["n"]
    lines = [[f"{n} test scenes of one tiny thing", "mIoU greedy [95%]", "Pr@0.5 greedy",
              "mIoU at T=1", "mIoU, many things, full-sized", "the same, unfamiliar"],
             ["---"] * 6]
    for stage, name in STAGES.items():
        row = row_of(scores, stage)
        if row is not None:
            low, high = row["ci"]["mIoU"]
            lines.append([
                name, f"{row['mIoU']:.3f} [{low:.3f}, {high:.3f}]", cell(row, "Pr@0.5"),
                cell(row_of(scores, stage, 1), "mIoU"), cell(row_of(full, stage), "mIoU"),
                cell(row_of(novel, stage), "mIoU")])
    unseen = row_of(blind, LAST)
    lines.append([f"{STAGES[LAST]} without seeing the image", cell(unseen, "mIoU"),
                  cell(unseen, "Pr@0.5"), "", "", ""])
    centre = scores["centre_box"]
    lines.append(["a box of the median size in the middle", cell(centre, "mIoU"),
                  cell(centre, "Pr@0.5"), "", cell(full["centre_box"], "mIoU"),
                  cell(novel["centre_box"], "mIoU")])
    return "".join("| " + " | ".join(cells) + " |\n" for cells in lines)


def read_answers(folder: Path, records: Sequence[Record]) -> Answers:
    """Stage -> its greedy predictions, in the order of the records."""
    answers = {}
    for stage in STAGES:
        file = folder / f"predictions_{stage}.jsonl"
        if file.exists():
            by_id = answers.read_predictions(file, records)
            answers[stage] = [by_id.get(record.id) for record in records]
    return answers


def picture(records: Sequence[Record], answers: Answers) -> Image.Image:
    """A row a scene, evenly spread, and a column a stage: target green, answer red."""
    drawn = []
    for i in pictures.spread(range(len(records)), SCENES):
        image = open_image(records[i])
        for stage, predictions in answers.items():
            box, _, _ = answers.read_prediction(predictions[i], records[i])
            iou = answers.strict_iou(records[i:i + 1], predictions[i:i + 1]).item()
            boxes = [(records[i].box, "lime")]
            if box:
                boxes.append((box, "red"))
            verdict = f"IoU {iou:.2f}" if box else "no box"
            caption = f"{STAGES[stage]}: {verdict}. {records[i].text}"
            drawn.append(pictures.draw_boxes(image, boxes, caption, width=224))
    return pictures.contact_sheet(drawn, columns=len(answers))


def comparison(records: Sequence[Record], answers: Answers) -> str:
    """One line: the difference in mIoU on the same scenes, its interval and p."""
    first, last = (answers.strict_iou(records, answers[stage]) for stage in (FIRST, LAST))
    test = metrics.paired(records, first, last)["mIoU"]
    low, high = test["ci"]
    return (f"{STAGES[LAST]} - {STAGES[FIRST]}, greedy, the same {len(records)} test scenes: "
            f"mIoU {test['difference']:+.3f}, 95% interval {low:+.3f} to {high:+.3f}, "
            f"p {test['p']:.3f}")


def main() -> None:
    parser = FlagParser("The table, picture and comparison of a run of speedrun.sh")
    parser.add_argument("ckpt", nargs="?", default="ckpt", help="its folder")
    ckpt = Path(parser.parse_args().ckpt)
    folders = ("eval", "eval_blind", "eval_full", "eval_novel")
    scores, blind, full, novel = (read_scores(ckpt / name) for name in folders)
    row = scores["rows"][0]
    records = list(load(row["data"], None, row["split"]))[:row["n"]]
    answers = read_answers(ckpt / "eval", records)
    missing = {FIRST, LAST} - answers.keys()
    if missing:
        dist.fail(f"no answers of {' and '.join(sorted(missing))} in {ckpt / 'eval'}; "
                     "run speedrun.sh again")
    text = table(scores, blind, full, novel)
    (ckpt / "table.md").write_text(text, encoding="utf-8")
    picture(records, answers).save(ckpt / "story.png")
    print(text)
    print(f"picture: {ckpt / 'story.png'}, report: {ckpt / 'eval' / 'report.html'}")
    print(comparison(records, answers))


if __name__ == "__main__":
    launch(main)
