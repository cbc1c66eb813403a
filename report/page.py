"""report.html: one self-contained page of an evaluation, readable on a phone.

It has no script, makes no request and stays under 5 MB. `safe` escapes all foreign text.
"""
import base64
import html
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from data import open_image
from readers.base import Record, in_words, read_log
from report import metrics
from report.pictures import ANSWER, LEGEND, TARGET, curve, draw_boxes, draw_rollouts, spread

PICTURES = 200                    # pictures on a page, at most
PICTURE_BYTES = 12_000            # bytes of a picture, at most
PICTURE_SIDE = 320                # pixels, longer side of a picture
# JPEG qualities to try until a picture fits; each try at the last quality also shrinks it.
QUALITIES = (75, 60, 40, 25, 12, 12, 12, 12)
LETTERS = 1000                    # letters of an answer, at most
VALUES = 60                       # lines of a breakdown, at most; values with most records
GROUPS = 4                        # groups of rollouts shown for a run
CASES = 6                         # best, median and worst cases of a row, at most this many each
BOXLESS = 3                       # cases shown for a row in which no answer has a box
# What is drawn, with its unit -> keys of metrics.jsonl that share the drawing.
CURVES = {
    "validation (share)": ("val_mIoU", "val_Pr@0.5", "val_failed"), "loss": ("loss",),
    "KL (nats per token)": ("kl",), "entropy (nats per token)": ("entropy",),
    "length (tokens)": ("length",), "rollouts (share)": ("truncated", "unparsable"),
    "scatter of a group's boxes (image sides)": ("dispersion",),
    "weight of a group": ("consistency_weight_min", "consistency_weight", "consistency_weight_max"),
    "learning rate": ("lr",), "norm of the gradient": ("grad_norm",),
    "duration of a step (seconds)": (
        "seconds", "seconds_rollout", "seconds_reward", "seconds_resample", "seconds_update"),
    "speed (tokens per second)": ("tokens_per_second",)}
STYLE = """
body{font:16px/1.45 system-ui,sans-serif;margin:0 auto;padding:0 12px;max-width:1200px;color:#222}
h1{font-size:1.4em}h2{font-size:1.15em;margin-top:2em}h3{font-size:1em}h4{font-size:.9em;
margin:.8em 0 .4em}.row{display:flex;flex-wrap:wrap;gap:12px}
h1,h2,h3,p,nav{overflow-wrap:anywhere}nav a{display:inline-block;padding:6px 12px 6px 0}
summary{margin-top:2em;cursor:pointer}summary h2{display:inline}div[id]{scroll-margin-top:3em}
.wide{overflow-x:auto;max-width:100%}table{border-collapse:collapse;font-size:.85em}
td,th{white-space:nowrap;padding:3px 8px;border-bottom:1px solid #ddd;text-align:right}
td:first-child,th:first-child{text-align:left;position:sticky;left:0;background:#fff;
min-width:7em;max-width:min(24em,36vw);white-space:normal;overflow-wrap:break-word}small{color:#666}
span{display:inline-block;max-width:100%;margin-left:.8em}
figure{margin:0;width:min(320px,100%);overflow-wrap:anywhere}img,svg{max-width:100%;height:auto}
figcaption{font-size:.85em}pre{white-space:pre-wrap;font-size:.75em;background:#f4f4f4;padding:6px;
margin:4px 0;max-height:14em;overflow:auto}.texts{max-height:22em;overflow:auto}
"""
Row = Mapping[str, Any]           # of eval.json, metrics.jsonl or rollouts.jsonl


class Case(NamedTuple):
    record: Record
    box: Sequence[float] | None   # of the answer, in original pixels
    iou: float
    text: str                     # of the answer


def write_page(path: Path, rows: Sequence[Row], cases: Sequence[Sequence[Case]],
               stages: Sequence[tuple[str, Path]], records: Sequence[Record] = (),
               summary: Mapping[str, Any] | None = None) -> None:
    """Writes the page of an evaluation: its scores, then the stages, the last one first.
    rows: of eval.json; cases: those of each row; stages: (name, folder with metrics.jsonl);
    records: for the images of rollouts; summary: the rest of eval.json (centre_box, comparison)."""
    # Another data set may have the same id, with another expression.
    known = {(record.id, record.text): record for record in records}
    groups: dict[str, Sequence[tuple[Row, Record]]] = {}
    for name, folder in stages:
        lines = read_log(folder / "rollouts.jsonl")
        pairs = [(line, known.get((line.get("id"), line.get("expression")))) for line in lines]
        groups[name] = spread([pair for pair in pairs if pair[1]], GROUPS)
    # Cases share the pictures that are left after the groups of rollouts.
    left = PICTURES - sum(map(len, groups.values()))
    cases_each = max(0, min(CASES, left // (3 * max(1, len(rows)))))
    sections = [("Scores", score_section(rows, summary or {}))]
    by_stage = dict.fromkeys([*(row["stage"] for row in rows), *groups], "")
    for row, some in zip(rows, cases):
        by_stage[row["stage"]] += case_section(row, some, cases_each)
    for name, folder in stages:
        by_stage[name] += training_section(name, folder, groups[name])
    sections += [(safe(name), section) for name, section in reversed(by_stage.items())]
    # A table for each property: mIoU and Pr@0.5 of every row, for each value.
    section = ""
    for name, values in rows[0]["breakdowns"].items():
        most = sorted(values, key=lambda value: -values[value]["n"])[:VALUES]
        lines = []
        for value in values:
            if value in most:
                scores = [row["breakdowns"][name][value] for row in rows]
                cells = [f"{score['mIoU']:.3f} / {score['Pr@0.5']:.3f}" for score in scores]
                lines.append([safe(value[:60]), values[value]["n"], *cells])
        head = ["mIoU / Pr@0.5", "n", *map(label, rows)]
        section += html_table(head, lines, f"By {safe(name)}")
        if len(values) > VALUES:
            section += f"<p>and {len(values) - VALUES} more in eval.json</p>"
    sections.append(("Breakdowns", section))
    contents = body = ""
    for i, (title, section) in enumerate(section for section in sections if section[1]):
        contents += f'<a href="#s{i}">{title}</a>'
        # The scores and the last stage are open. A link opens what its anchor is folded in.
        body += (f"<details{' open' * (i < 2)}><summary><h2>{title}</h2></summary>"
                 f'<div id="s{i}">{section}</div></details>')

    # The headline is for the last stage's first temperature.
    row = next(row for row in rows if row["stage"] == rows[-1]["stage"])
    ci = metrics.interval_text(row["ci"]["mIoU"], row["images"])
    note = ""
    if refused := rows[0].get("refused"):
        note = (f"; {sum(refused.values()):,} more are refused ({safe(in_words(refused))}) "
                "and not scored")
    path.write_text(html_page(
        "Evaluation",
        f"<p>{safe(rows[0]['data'])}, split {safe(rows[0]['split'])}, "
        f"{rows[0]['n']:,} records{note}</p>"
        f"<p><b>{label(row)}</b>: mIoU {row['mIoU']:.3f} {ci}, "
        f"Pr@0.5 {row['Pr@0.5']:.3f}, {sum(row['failures'].values()):,} of {row['n']:,} answers "
        f"without a box.</p><nav>{contents}</nav>{body}"), encoding="utf-8")


def html_page(title: str, body: str, refresh: int = 0) -> str:
    """A whole page. body is HTML; refresh: seconds after which it is loaded again, or 0."""
    again = f"<meta http-equiv=refresh content={refresh}>" if refresh else ""
    return ("<!DOCTYPE html><html lang=en><head><meta charset=utf-8>"
            f'<meta name=viewport content="width=device-width,initial-scale=1">{again}'
            "<meta http-equiv=Content-Security-Policy "
            "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">"
            f"<title>{safe(title)}</title><style>{STYLE}</style></head>"
            f"<body><h1>{safe(title)}</h1>{body}</body></html>\n")


def safe(value: object) -> str:
    """Text that is safe in HTML, between tags and in quotes; less than 2 * LETTERS bytes."""
    # Escaped, a letter takes up to six bytes, so a sixth of LETTERS always fits.
    for letters in (LETTERS, LETTERS // 6):
        # UTF-8 cannot encode a lone surrogate.
        escaped = html.escape(str(value)[:letters]).encode("utf-8", "replace")
        if len(escaped) < 2 * LETTERS:
            break
    return escaped.decode()


def label(row: Row) -> str:
    """A row's name in tables and headings, in HTML."""
    temperature = "" if row["temperature"] is None else f" T={row['temperature']:g}"
    return safe(row["stage"] + temperature + (" blind" if row["blind"] else ""))


def html_table(head: Sequence[str], lines: Sequence[Sequence[object]], title: str = "") -> str:
    """head, lines and title are HTML. "" if there are no lines."""
    if not lines:
        return ""
    body = "".join(f"<th>{cell}</th>" for cell in head)
    for line in lines:
        body += "</tr><tr>" + "".join(f"<td>{cell}</td>" for cell in line)
    heading = f"<h3>{title}</h3>" if title else ""
    return f"{heading}<div class=wide><table><tr>{body}</tr></table></div>"


def score_section(rows: Sequence[Row], summary: Mapping[str, Any]) -> str:
    names = list(rows[0]["ci"])
    sample_counts = sorted({k for row in rows for k in row.get("pass", ())}, key=int)
    scores, official, official_rates, differences = [], [], [], []
    for row in rows:
        cells = [label(row)]
        for name in names:
            ci = metrics.interval_text(row["ci"][name], row["images"])
            cells.append(f"{row[name]:.3f} <small>{ci}</small>")
        for k in sample_counts:
            cells.append(f"{row['pass'][k]:.3f}" if k in row.get("pass", ()) else "-")
        scores.append([*cells, f"{sum(row['failures'].values()) / row['n']:.3f}"])
        for part, score in metrics.official_parts(row):
            official_rates = [rate for rate in score if rate != "n"]
            values = [f"{score[rate]:.3f}" for rate in official_rates]
            official.append([label(row), part, score["n"], *values])
    for name, test in summary.get("comparison", {}).items():
        # The comparison also holds the paths of both files.
        if isinstance(test, dict):
            ci = metrics.interval_text(test["ci"], rows[0]["images"], "+")
            cell = f"{test['difference']:+.3f} <small>{ci}</small>"
            differences.append([safe(name), cell, f"{test['p']:.3f}" if test["ci"] else "-"])
    head = ["stage", *names, *(f"pass@{k}" for k in sample_counts), "failed"]
    section = "<p>In brackets: 95% intervals, resampled over images.</p>" + html_table(head, scores)
    head = ["stage", "part", "n", *official_rates]
    section += html_table(head, official, f"As the authors of {safe(rows[0]['data'])} count")
    if summary:
        guess = summary["centre_box"]
        section += ("<p>A box of the median size in the middle of each image: "
                    f"mIoU {guess['mIoU']:.3f}, Pr@0.5 {guess['Pr@0.5']:.3f}.</p>")
    head = ["", "difference", "p"]
    return section + html_table(head, differences, "Second minus first, the same images")


def curves(lines: Sequence[Row]) -> str:
    """Drawings of what metrics.jsonl has, over steps and hours."""
    def points(key: str) -> list[tuple[float, float]]:
        pairs = [(line.get("step"), line.get(key)) for line in lines]
        return [pair for pair in pairs
                if all(type(v) in (int, float) and math.isfinite(v) for v in pair)]

    times = points("time")
    hours = {step: (time - times[0][1]) / 3600 for step, time in times}
    # Every term of the reward has a key NAME_group_std next to its own.
    deviations = dict.fromkeys(k for line in lines for k in line if k.endswith("_group_std"))
    rewards = [key.removesuffix("_group_std") for key in deviations]
    figures = ""
    drawings = {"reward and its terms": rewards, "standard deviation in a group": deviations}
    for title, keys in (drawings | CURVES).items():
        figures += curve(title, [(safe(key), points(key)) for key in keys], hours)
    return figures


def training_section(name: str, folder: Path, groups: Sequence[tuple[Row, Record]]) -> str:
    """A run's curves and some of its groups of rollouts; "" without logs."""
    drawn, figures, section = curves(read_log(folder / "metrics.jsonl")), "", ""
    for line, record in groups:
        caption = f"<b>step {safe(line['step'])}</b> {safe(record.text)}<br>rewards "
        caption += ", ".join(f"{reward:.2f}" for reward in line["reward"])
        figures += html_figure(record, line["boxes"], line["reward"], caption, line["texts"][0])
    if drawn:
        section = f"<h3>Training: {safe(name)}</h3><div class=row>{drawn}</div>"
    if figures:
        section += f"<h3>Groups of rollouts: {safe(name)}</h3><div class=row>{figures}</div>"
    return section


def case_section(row: Row, cases: Sequence[Case], each: int) -> str:
    """A row's best, worst and median cases by IoU, `each` at most, none twice; "" if each is 0."""
    if not each:
        return ""
    ranked = sorted(cases, key=lambda case: -case.iou)
    middle = max(0, (len(ranked) - each) // 2)
    choices = {"No answer has a box": cases[:min(each, BOXLESS)]}
    if any(case.box for case in cases):
        choices = {"Best": ranked[:each], "Worst": ranked[::-1][:each],
                   "Median": ranked[middle:middle + each]}
    section = f"<h3>Cases: {label(row)}</h3>"
    shown: set[int] = set()
    for title, chosen in choices.items():
        figures = ""
        for case in chosen:
            if id(case) not in shown:
                verdict = f"IoU {case.iou:.2f}" if case.box else "no box"
                caption = f"<b>{verdict}</b> {safe(case.record.text)}"
                figures += html_figure(case.record, [case.box], None, caption, case.text)
        shown.update(map(id, chosen))
        if figures:
            section += f"<h4>{title}</h4><div class=row>{figures}</div>"
    return section


def html_figure(record: Record, boxes: Sequence[Any], rewards: Sequence[float] | None,
                caption: str, answer: str) -> str:
    """A record's image with its target and the answered boxes, and an answer. caption is HTML."""
    image = open_image(record, or_blank=True)
    width = max(16, round(PICTURE_SIDE * min(1, image.width / image.height)))
    if rewards is None:
        coloured = [(record.box, TARGET)] + [(box, ANSWER) for box in boxes if box]
        picture = draw_boxes(image, coloured, width=width, legend=LEGEND[:len(coloured)])
    else:
        picture = draw_rollouts(image, boxes, rewards, record.box, width=width)
    for quality in QUALITIES:
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=quality, optimize=True)
        if file.tell() <= PICTURE_BYTES:
            break
        if quality == QUALITIES[-1]:
            picture = picture.resize([max(1, round(v * 0.7)) for v in picture.size])
    jpeg = base64.b64encode(file.getvalue()).decode()
    if answer:
        caption += f"<pre>{safe(answer)}</pre>"
    return (f'<figure><img alt="" src="data:image/jpeg;base64,{jpeg}">'
            f"<figcaption>{caption}</figcaption></figure>")
