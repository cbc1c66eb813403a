"""The end of speedrun.sh: a table, a picture, and the difference that the last stage makes.

    python study/story.py ckpt          writes table.md and story.png there
"""
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data import load, open_image  # noqa: E402
from readers.base import read_json  # noqa: E402
from report.metrics import overlaps, paired, targets  # noqa: E402
from report.pictures import contact_sheet, draw_boxes, spread  # noqa: E402
from report.predictions import read_predictions, strict_boxes  # noqa: E402
from train.dist import fail  # noqa: E402
from train.flags import FlagParser  # noqa: E402
from train.run import launch  # noqa: E402

STAGES = {
    "base": "base", "direct": "GRPO from the base", "sft": "CoT-SFT", "rft": "RSGround-R1"}
SCENES = 6                        # rows of the picture


def row_of(content: dict[str, Any], stage: str, temperature: float = 0) -> dict[str, Any]:
    """A stage's row of eval.json, {} if it was not scored."""
    for row in content["rows"]:
        if (row["stage"], row["temperature"]) == (stage, temperature):
            return row
    return {}


def cell(row: dict[str, Any], name: str) -> str:
    return f"{row[name]:.3f}" if row else ""


def table(
        scores: dict[str, Any], blind: dict[str, Any], full: dict[str, Any],
        novel: dict[str, Any],
) -> str:
    """Markdown from four eval.json: a line for each stage, then two guesses without the image.

    scores, blind: of one tiny thing a scene; full, novel: of the full-sized world, and of what is
    unfamiliar in it.
    """
    lines = [[f"{scores['rows'][0]['n']} test scenes of one tiny thing", "mIoU greedy [95%]",
              "Pr@0.5 greedy", "mIoU at T=1", "mIoU, many things, full-sized",
              "the same, unfamiliar"], ["---"] * 6]
    for stage, name in STAGES.items():
        row = row_of(scores, stage)
        if row:
            low, high = row["ci"]["mIoU"]
            lines.append([
                name, f"{row['mIoU']:.3f} [{low:.3f}, {high:.3f}]", cell(row, "Pr@0.5"),
                cell(row_of(scores, stage, 1), "mIoU"), cell(row_of(full, stage), "mIoU"),
                cell(row_of(novel, stage), "mIoU")])
    unseen = row_of(blind, "rft")
    lines.append([f"{STAGES['rft']} without seeing the image", cell(unseen, "mIoU"),
                  cell(unseen, "Pr@0.5"), "", "", ""])
    centre = scores["centre_box"]
    lines.append(["a box of the median size in the middle", cell(centre, "mIoU"),
                  cell(centre, "Pr@0.5"), "", cell(full["centre_box"], "mIoU"),
                  cell(novel["centre_box"], "mIoU")])
    return "".join("| " + " | ".join(cells) + " |\n" for cells in lines)


def main() -> None:
    parser = FlagParser(description="The table, picture and comparison of a run of speedrun.sh")
    parser.add_argument("ckpt", nargs="?", default="ckpt", help="its folder")
    ckpt = Path(parser.parse_args().ckpt)
    contents = []
    for name in ("eval", "eval_blind", "eval_full", "eval_novel"):
        contents.append(read_json(ckpt / name / "eval.json"))
        if contents[-1] is None:
            fail(f"no scores in {ckpt / name}; run speedrun.sh first")
    row = contents[0]["rows"][0]
    records = list(load(row["data"], None, row["split"]))[:row["n"]]
    answers = {}                  # stage -> its greedy predictions, one for each record
    for stage in STAGES:
        file = ckpt / "eval" / f"predictions_{stage}.jsonl"
        if file.exists():
            by_id = read_predictions(file, records)
            answers[stage] = [by_id.get(record.id) for record in records]
        elif stage in ("sft", "rft"):
            fail(f"no answers of {stage} in {ckpt / 'eval'}; run speedrun.sh again")
    # A row for each scene and a column for each stage: target green, answer red.
    boxes = {stage: strict_boxes(records, some) for stage, some in answers.items()}
    target, size = targets(records)
    ious = {stage: overlaps(pred, target, size).iou for stage, pred in boxes.items()}
    drawn = []
    for i in spread(range(len(records)), SCENES):
        image = open_image(records[i])
        for stage in answers:
            coloured = [(records[i].box, "lime")]
            verdict = "no box"
            if boxes[stage][i][0] == boxes[stage][i][0]:
                coloured.append((boxes[stage][i].tolist(), "red"))
                verdict = f"IoU {ious[stage][i]:.2f}"
            caption = f"{STAGES[stage]}: {verdict}. {records[i].text}"
            drawn.append(draw_boxes(image, coloured, caption, width=224))
    contact_sheet(drawn, columns=len(answers)).save(ckpt / "story.png")
    text = table(*contents)
    (ckpt / "table.md").write_text(text, encoding="utf-8")
    print(text)
    print(f"picture: {ckpt / 'story.png'}, report: {ckpt / 'eval' / 'report.html'}")
    test = paired(records, ious["sft"], ious["rft"])["mIoU"]
    low, high = test["ci"]
    print(f"{STAGES['rft']} - {STAGES['sft']}, greedy, the same {len(records)} test scenes: "
          f"mIoU {test['difference']:+.3f}, 95% interval {low:+.3f} to {high:+.3f}, "
          f"p {test['p']:.3f}")


if __name__ == "__main__":
    launch(main)
