"""The table of study/paper.sh: scores of every stage on every data set.

    python study/paper.py ckpt/paper/dior           prints Markdown, writes table.md there
"""
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from readers.base import read_json  # noqa: E402
from report.metrics import interval_text  # noqa: E402
from train.dist import fail  # noqa: E402
from train.flags import FlagParser  # noqa: E402
from train.run import launch  # noqa: E402

METRICS = ("Pr@0.5", "Pr@0.7", "mIoU")


def read_rows(out: Path) -> dict[str, list[dict[str, Any]]]:
    """Data set and split -> the rows of its eval.json; the one in domain comes first."""
    files = sorted(out.glob("eval_*/eval.json"), key=lambda f: f.stat().st_mtime)
    tables = {}
    for file in files:
        rows = read_json(file)["rows"]
        tables[f"{rows[0]['data']} {rows[0]['split']}"] = rows
    return tables


def table(tables: dict[str, list[dict[str, Any]]]) -> str:
    """Markdown: a line for each stage, three columns for each data set, 95% intervals."""
    head = ["stage"]
    for where, rows in tables.items():
        head += [f"{where} ({rows[0]['n']:,}): {metric}" for metric in METRICS]
    lines = [head, ["---"] * len(head)]
    for i, first in enumerate(next(iter(tables.values()))):
        cells = [first["stage"]]
        for rows in tables.values():
            for metric in METRICS:
                ci = interval_text(rows[i]["ci"][metric], rows[i]["images"])
                cells.append(f"{rows[i][metric]:.3f} {ci}")
        lines.append(cells)
    return "".join("| " + " | ".join(cells) + " |\n" for cells in lines)


def main() -> None:
    parser = FlagParser(description="The table of a run of study/paper.sh")
    parser.add_argument("out", help="its folder")
    out = Path(parser.parse_args().out)
    tables = read_rows(out)
    if not tables:
        fail(f"no eval_*/eval.json in {out}; run study/paper.sh first")
    text = table(tables)
    (out / "table.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    launch(main)
