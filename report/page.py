"""report.html: one self-contained page of an evaluation, readable on a phone.

No script, no request, nothing to install. Whatever a data set, a model or a
checkpoint's name says goes through `text`. Pictures are small JPEGs inside the page, at
most PICTURES of PICTURE_BYTES each, so that it stays under 5 MB.
"""
import html
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import data
from readers import base
from readers.base import Record
from report import pictures, predictions

PICTURES = 200
PICTURE_BYTES = 12_000
PICTURE_SIDE = 320                # pixels, longer side of a picture
LETTERS = 1000                    # of an answer that are shown; fewer if long in HTML
VALUES = 60                       # lines of a breakdown, those of the most records
GROUPS = 4                        # groups of rollouts shown of a run
CASES = 6                         # each of a row's best, median and worst cases at most
BOXLESS = 3                       # cases of a row whose answers have no box at all
# Keys of metrics.jsonl that share a drawing; those of the reward are in
# `reward_curves`.
CURVES = (
    ("consistency_weight_min", "consistency_weight", "consistency_weight_max"), ("dispersion",),
    ("length",), ("kl",), ("loss",), ("val_mIoU", "val_Pr@0.5"))
STYLE = (
    "body{font:16px/1.45 system-ui,sans-serif;margin:0 auto;padding:0 12px;max-width:1000px;"
    "color:#222}\n"
    "h1{font-size:1.4em}h2{font-size:1.15em;margin-top:2em}h3{font-size:1em}\n"
    "h4{font-size:.9em;margin:.8em 0 .4em}\n"
    "h1,h2,h3,p,nav{overflow-wrap:anywhere}nav a{display:inline-block;padding:6px 12px 6px 0}\n"
    ".wide{overflow-x:auto;max-width:100%}table{border-collapse:collapse;font-size:.85em}\n"
    "td,th{white-space:nowrap;padding:3px 8px;border-bottom:1px solid #ddd;text-align:right}\n"
    "td:first-child,th:first-child{text-align:left;position:sticky;left:0;background:#fff;\n"
    "max-width:9em;white-space:normal;overflow-wrap:anywhere}small{color:#666}\n"
    ".row{display:flex;flex-wrap:wrap;gap:12px}figure{margin:0;width:min(320px,100%);"
    "overflow-wrap:anywhere}img,svg{max-width:100%;height:auto}\n"
    "figcaption{font-size:.85em}pre{white-space:pre-wrap;font-size:.75em;background:#f4f4f4;"
    "padding:6px;\n"
    "margin:4px 0;max-height:14em;overflow:auto}")
ColouredBoxes = Sequence[tuple[predictions.Box, pictures.Colour]]
Row = Mapping[str, Any]           # of eval.json
Line = Mapping[str, Any]          # of metrics.jsonl or rollouts.jsonl


class Case(NamedTuple):
    """One record and what was answered."""

    record: Record
    box: Sequence[float] | None   # original pixels
    iou: float
    text: str


class Training(NamedTuple):
    """A stage's logs."""

    name: str
    metrics: list[Line]
    groups: list[tuple[Line, Record]]         # lines of rollouts.jsonl that are shown


class Section(NamedTuple):
    """A part of the page that the contents lead to."""

    title: str                    # HTML, as the body
    body: str


# ---------------------------------------------------------------- the page

def write(
        path: Path, rows: Sequence[Row], cases: Sequence[Sequence[Case]],
        stages: Sequence[tuple[str, Path]], records: Sequence[Record] = (),
        summary: Mapping[str, Any] | None = None,
) -> None:
    """Writes the page of an evaluation: its scores, then the stages, the last of them first.

    rows: of eval.json; cases: those of each row; stages: (name, folder with
    metrics.jsonl); records: where the images of rollouts are looked for; summary: the
    rest of eval.json (centre_box, comparison)."""
    summary = summary or {}
    by_id = {record.id: record for record in records}
    trainings = [read_training(name, folder, by_id) for name, folder in stages]
    # Groups of rollouts come first; what is left of PICTURES is shared by the rows'
    # three kinds.
    left = PICTURES - sum(len(training.groups) for training in trainings)
    cases_each = max(0, min(CASES, left // (3 * max(1, len(rows)))))
    sections = [Section("Scores", score_section(rows, summary))]
    for name in reversed(stage_names(rows, trainings)):
        of_stage = [(row, some) for row, some in zip(rows, cases) if row["stage"] == name]
        body = "".join(case_section(row, some, cases_each) for row, some in of_stage)
        for training in trainings:
            if training.name == name:
                body += training_section(training) + rollout_section(training)
        sections.append(Section(text(name), body))
    sections.append(Section("Breakdowns", breakdown_section(rows)))
    sections = [section for section in sections if section.body]
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    page = ("<!DOCTYPE html><html lang=en><head><meta charset=utf-8>"
            '<meta name=viewport content="width=device-width,initial-scale=1">'
            f'<meta http-equiv=Content-Security-Policy content="{policy}">'
            f"<title>Evaluation</title><style>{STYLE}</style></head>"
            f"<body>{heading(rows[0])}{headline(rows)}{contents(sections)}"
            f"{html_sections(sections)}</body></html>\n")
    path.write_text(page, encoding="utf-8")


def stage_names(rows: Sequence[Row], trainings: Sequence[Training]) -> list[str]:
    """The stages that were scored or trained, in their order, each once."""
    names = [row["stage"] for row in rows] + [training.name for training in trainings]
    return list(dict.fromkeys(names))


def contents(sections: Sequence[Section]) -> str:
    """A line of links to the sections."""
    links = "".join(f'<a href="#s{i}">{section.title}</a>' for i, section in enumerate(sections))
    return f"<nav>{links}</nav>"


def html_sections(sections: Sequence[Section]) -> str:
    """The sections under their headings; links lead to their numbers."""
    body = ""
    for i, section in enumerate(sections):
        body += f'<h2 id="s{i}">{section.title}</h2>{section.body}'
    return body


def text(value: object) -> str:
    """A value as text that is safe in HTML, between tags and in quotes.

    It has 2 * LETTERS at most. What no encoding has, a lone surrogate, becomes "?"."""
    # A letter takes up to six in HTML: a sixth of the text always fits.
    for letters in (LETTERS, LETTERS // 6):
        safe = html.escape(str(value)[:letters]).encode("utf-8", "replace")
        if len(safe) < 2 * LETTERS:
            break
    return safe.decode()


def label(row: Row) -> str:
    """What a row is called in tables and headings, HTML."""
    temperature = "" if row["temperature"] is None else f" T={row['temperature']:g}"
    return text(row["stage"] + temperature + (" blind" if row["blind"] else ""))


def html_table(head: Sequence[str], lines: Sequence[Sequence[object]]) -> str:
    """Cells are HTML."""
    header = "".join(f"<th>{cell}</th>" for cell in head)
    body = ""
    for line in lines:
        cells = "".join(f"<td>{cell}</td>" for cell in line)
        body += f"<tr>{cells}</tr>"
    return f"<div class=wide><table><tr>{header}</tr>{body}</table></div>"


# ---------------------------------------------------------------- scores

def heading(row: Row) -> str:
    refused = row.get("refused", {})
    note = ""
    if refused:
        reasons = text(base.in_words(refused))
        note = f"; {sum(refused.values()):,} more are refused ({reasons}) and not scored"
    return (f"<h1>Evaluation</h1><p>{text(row['data'])}, split {text(row['split'])}, "
            f"{row['n']:,} records{note}</p>")


def headline(rows: Sequence[Row]) -> str:
    """The last stage in one line; of its rows the first, which is greedy where one is."""
    row = next(row for row in rows if row["stage"] == rows[-1]["stage"])
    low, high = row["ci"]["mIoU"]
    failed = sum(row["failures"].values())
    return (f"<p><b>{label(row)}</b>: mIoU {row['mIoU']:.3f} [{low:.3f}, {high:.3f}], "
            f"Pr@0.5 {row['Pr@0.5']:.3f}, {failed:,} of {row['n']:,} answers without a box.</p>")


def score_section(rows: Sequence[Row], summary: Mapping[str, Any]) -> str:
    """All scores, the guess that looks at nothing, and the comparison."""
    return ("<p>In brackets 95% intervals, resampled over images.</p>"
            + score_table(rows) + vrsbench_table(rows)
            + (guess_line(summary["centre_box"]) if summary else "")
            + comparison_table(summary.get("comparison", {})))


def score_table(rows: Sequence[Row]) -> str:
    """Scores with their intervals, pass@k where there are samples, and failures."""
    names = list(rows[0]["ci"])
    tries: set[str] = set()
    for row in rows:
        tries.update(row.get("pass", ()))
    sample_counts = sorted(tries, key=int)
    lines = []
    for row in rows:
        cells = [label(row)]
        for name in names:
            low, high = row["ci"][name]
            cells.append(f"{row[name]:.3f} <small>[{low:.3f}, {high:.3f}]</small>")
        for k in sample_counts:
            cells.append(f"{row['pass'][k]:.3f}" if k in row.get("pass", ()) else "-")
        cells.append(f"{sum(row['failures'].values()) / row['n']:.3f}")
        lines.append(cells)
    return html_table(["stage", *names, *(f"pass@{k}" for k in sample_counts), "failed"], lines)


def vrsbench_table(rows: Sequence[Row]) -> str:
    """VRSBench's own metric, "" for other data sets."""
    lines = []
    for row in rows:
        for part, scores in row.get("vrsbench", {}).items():
            lines.append([label(row), text(part), scores["n"], f"{scores['Acc@0.5']:.3f}",
                          f"{scores['Acc@0.7']:.3f}"])
    if not lines:
        return ""
    head = ["stage", "part", "n", "Acc@0.5", "Acc@0.7"]
    return "<h3>VRSBench's own metric</h3>" + html_table(head, lines)


def guess_line(guess: Mapping[str, Any]) -> str:
    return ("<p>A box of the median size in the middle of each image: "
            f"mIoU {guess['mIoU']:.3f}, Pr@0.5 {guess['Pr@0.5']:.3f}.</p>")


def comparison_table(comparison: Mapping[str, Any]) -> str:
    """What B has more than A, "" where nothing is compared."""
    lines = []
    for name, test in comparison.items():
        # Beside the tests stand the paths of both files.
        if isinstance(test, dict):
            low, high = test["ci"]
            difference = f"{test['difference']:+.3f} <small>[{low:+.3f}, {high:+.3f}]</small>"
            lines.append([text(name), difference, f"{test['p']:.3f}"])
    if not lines:
        return ""
    head = ["", "difference", "p"]
    return "<h3>Second minus first, the same images</h3>" + html_table(head, lines)


def breakdown_section(rows: Sequence[Row]) -> str:
    return "".join(breakdown_table(rows, name) for name in rows[0]["breakdowns"])


def breakdown_table(rows: Sequence[Row], name: str) -> str:
    """One property: mIoU and Pr@0.5 of every row, for each of its values."""
    tables = [row["breakdowns"][name] for row in rows]
    first = tables[0]
    most = set(sorted(first, key=lambda value: -first[value]["n"])[:VALUES])
    lines = []
    for value in first:
        if value in most:
            scores = [f"{t[value]['mIoU']:.3f} / {t[value]['Pr@0.5']:.3f}" for t in tables]
            lines.append([text(value[:60]), first[value]["n"], *scores])
    head = ["mIoU / Pr@0.5", "n", *map(label, rows)]
    more = f"<p>and {len(first) - VALUES} more in eval.json</p>" if len(first) > VALUES else ""
    return f"<h3>By {text(name)}</h3>{html_table(head, lines)}{more}"


# ---------------------------------------------------------------- training

def read_training(name: str, folder: Path, by_id: Mapping[str, Record]) -> Training:
    """The logs of a stage's folder; empty where it has none."""
    groups = []
    for line in log_lines(folder / "rollouts.jsonl"):
        record = by_id.get(line.get("id"))
        # Another data set may have the same id; its expression is another.
        if record and record.text == line.get("expression"):
            groups.append((line, record))
    metrics = list(log_lines(folder / "metrics.jsonl"))
    return Training(name, metrics, list(pictures.spread(groups, GROUPS)))


def log_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The JSON objects of a JSONL file, none where there is no file.

    A line that is not whole is skipped, for a run may still be writing it."""
    if path.exists():
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    value = json.loads(line)
                except ValueError:
                    continue
                if isinstance(value, dict):
                    yield value


def training_section(training: Training) -> str:
    """A run's curves, "" where it logged none."""
    curves = ""
    for keys in (*reward_curves(training.metrics), *CURVES):
        series = [(text(key), points(training.metrics, key)) for key in keys]
        curves += pictures.curve(series)
    if not curves:
        return ""
    return f"<h3>Training: {text(training.name)}</h3><div class=row>{curves}</div>"


def reward_curves(lines: Sequence[Line]) -> list[tuple[str, ...]]:
    """The curves of the reward: its terms, and their standard deviation within a group.

    Whatever terms a run had, each is known by a key NAME_group_std beside its own."""
    suffix = "_group_std"
    deviations: dict[str, None] = {}
    for line in lines:
        deviations.update((key, None) for key in line if key.endswith(suffix))
    return [tuple(key.removesuffix(suffix) for key in deviations), tuple(deviations)]


def points(lines: Sequence[Line], key: str) -> list[tuple[float, float]]:
    """(step, value) of a key, where both are numbers that can be drawn."""
    return [(line["step"], line[key]) for line in lines if plottable(line, key)]


def plottable(line: Line, key: str) -> bool:
    values = (line.get("step"), line.get(key))
    return all(type(value) in (int, float) and math.isfinite(value) for value in values)


def rollout_section(training: Training) -> str:
    """Some of a run's groups, "" where none is known."""
    if not training.groups:
        return ""
    figures = "".join(rollout_figure(line, record) for line, record in training.groups)
    return (f"<h3>Groups of rollouts: {text(training.name)}</h3>"
            "<p>Green: the target; the redder a box, the less its reward.</p>"
            f"<div class=row>{figures}</div>")


def rollout_figure(line: Line, record: Record) -> str:
    """A line of rollouts.jsonl -> figure."""
    boxes = pictures.rollout_boxes(line["boxes"], line["reward"], record.box)
    rewards = ", ".join(f"{reward:.2f}" for reward in line["reward"])
    caption = f"<b>step {text(line['step'])}</b> {text(record.text)}<br>rewards {rewards}"
    return html_figure(record, boxes, caption, line["texts"][0])


# ---------------------------------------------------------------- cases

def case_section(row: Row, cases: Sequence[Case], each: int) -> str:
    """A row's best, median and worst cases, `each` of each at most; "" for 0.

    Where no answer has a box, a few are enough."""
    if not each:
        return ""
    section = f"<h3>Cases: {label(row)}</h3><p>Green: the target; red: the answer.</p>"
    chosen_cases = list(choose(cases, each))
    if not any(case.box for case in cases):
        chosen_cases = [("No answer has a box", cases[:min(each, BOXLESS)])]
    for title, chosen in chosen_cases:
        figures = "".join(case_figure(case) for case in chosen)
        section += f"<h4>{title}</h4><div class=row>{figures}</div>"
    return section


def choose(cases: Sequence[Case], each: int) -> Iterator[tuple[str, list[Case]]]:
    """-> ("Best", cases), ("Worst", ...), ("Median", ...) by IoU, none twice."""
    ranked = sorted(range(len(cases)), key=lambda i: -cases[i].iou)
    middle = max(0, (len(ranked) - each) // 2)
    candidates = {
        "Best": ranked[:each],
        "Worst": ranked[::-1][:each],
        "Median": ranked[middle:middle + each],
    }
    taken: set[int] = set()
    for title, places in candidates.items():
        fresh = [i for i in places if i not in taken]
        taken.update(fresh)
        if fresh:
            yield title, [cases[i] for i in fresh]


def case_figure(case: Case) -> str:
    boxes = [(case.record.box, "lime")]
    if case.box:
        boxes.append((case.box, "red"))
    verdict = f"IoU {case.iou:.2f}" if case.box else "no box"
    caption = f"<b>{verdict}</b> {text(case.record.text)}"
    return html_figure(case.record, boxes, caption, case.text)


def html_figure(
        record: Record, boxes: ColouredBoxes, caption: str, answer: str,
) -> str:
    """A record's image with boxes, and what was answered. caption is HTML already."""
    quoted = f"<pre>{text(answer)}</pre>" if answer else ""
    return (f'<figure><img alt="" src="{picture_uri(record, boxes)}">'
            f"<figcaption>{caption}{quoted}</figcaption></figure>")


def picture_uri(record: Record, boxes: ColouredBoxes) -> str:
    """A record's image with boxes -> data URI of a JPEG of PICTURE_BYTES at most."""
    image = data.open_or_blank(record)
    width = max(16, round(PICTURE_SIDE * min(1, image.width / image.height)))
    return pictures.jpeg_uri(pictures.draw_boxes(image, boxes, width=width), PICTURE_BYTES)
