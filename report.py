"""report.html: one self-contained page of an evaluation, readable on a phone; no script, no request, nothing to install.

Whatever a data set, a model or a checkpoint's name says goes through `text`. Pictures are small JPEGs inside the page, at most PICTURES of
PICTURE_BYTES each, so that it stays under 5 MB.
"""
import html
import json
import math

import data
import pictures

PICTURES, PICTURE_BYTES = 200, 12_000
PICTURE_SIDE = 320                # pixels, longer side of a picture
LETTERS = 1000                    # of an answer that are shown, fewer where they take more room in HTML
VALUES = 60                       # lines of a breakdown, those of the most records
CURVES = (("consistency_weight_min", "consistency_weight", "consistency_weight_max"), ("dispersion",), ("length",), ("kl",), ("loss",),
          ("val_mIoU", "val_Pr@0.5"))
STYLE = """body{font:16px/1.45 system-ui,sans-serif;margin:0 auto;padding:0 12px;max-width:1000px;color:#222}
h1{font-size:1.4em}h2{font-size:1.15em;margin-top:2em}h3{font-size:1em}
.wide{overflow-x:auto}table{border-collapse:collapse;font-size:.85em}td,th{white-space:nowrap;
padding:3px 8px;border-bottom:1px solid #ddd;text-align:right}
td:first-child,th:first-child{text-align:left}small{color:#666}
.row{display:flex;flex-wrap:wrap;gap:12px}figure{margin:0;width:min(320px,100%);overflow-wrap:anywhere}img,svg{max-width:100%;height:auto}
figcaption{font-size:.85em}pre{white-space:pre-wrap;font-size:.75em;background:#f4f4f4;padding:6px;
margin:4px 0;max-height:14em;overflow:auto}"""


def write(path, rows, cases, stages, records=(), more=None):
    """rows: of eval.json; cases: for each row a list of (record, box or None, IoU, text); stages: (name, folder with metrics.jsonl);
    records: where the images of rollouts are looked for; more: the rest of eval.json (centre_box, comparison)."""
    by_id = {r.id: r for r in records}
    logs = [(name, list(log_lines(folder / "metrics.jsonl")), list(log_lines(folder / "rollouts.jsonl"))) for name, folder in stages]
    groups = [(name, pictures.spread([x for x in rollouts if x.get("id") in by_id and by_id[x["id"]].text == x.get("expression")], 4))
              for name, _, rollouts in logs]
    each = max(0, min(6, (PICTURES - sum(len(lines) for _, lines in groups)) // (3 * max(1, len(rows)))))
    refused = rows[0].get("refused", {})
    lost = f"; {sum(refused.values()):,} more are refused ({text(data.in_words(refused))}) and not scored" if refused else ""
    parts = [f"<h1>Evaluation</h1><p>{text(rows[0]['data'])}, split {text(rows[0]['split'])}, {rows[0]['n']:,} records{lost}</p>",
             "<h2>Scores</h2><p>In brackets 95% intervals, resampled over images.</p>",
             score_tables(rows), guessed(more["centre_box"]) if more else "", compared((more or {}).get("comparison"))]
    for name, lines, _ in logs:
        curves = "".join(pictures.curve([(text(k), [(x["step"], x[k]) for x in lines if plottable(x, k)]) for k in keys])
                         for keys in (*reward_curves(lines), *CURVES))
        if curves:
            parts.append(f"<h2>Training: {text(name)}</h2><div class=row>{curves}</div>")
    for name, lines in groups:
        if lines:
            parts.append(f"<h2>Groups of rollouts: {text(name)}</h2><p>Green: the target; the redder a box, the less its reward.</p>"
                         f"<div class=row>{''.join(group(line, by_id[line['id']]) for line in lines)}</div>")
    for row, some in zip(rows, cases) if each else ():
        parts.append(f"<h2>Cases: {label(row)}</h2><p>Green: the target; red: the answer.</p>")
        for title, chosen in choose(some, each):
            parts.append(f"<h3>{title}</h3><div class=row>{''.join(case(*c) for c in chosen)}</div>")
    parts.append(breakdowns(rows))
    page = ('<!DOCTYPE html><html lang=en><head><meta charset=utf-8><meta name=viewport content="width=device-width,initial-scale=1">'
            "<meta http-equiv=Content-Security-Policy content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">"
            f"<title>Evaluation</title><style>{STYLE}</style></head><body>{''.join(parts)}</body></html>\n")
    path.write_text(page, encoding="utf-8")


def text(anything):
    """Safe in HTML, between tags and in quotes, never of more than 2 * LETTERS; what no encoding has, a lone surrogate, becomes "?"."""
    safe = [html.escape(str(anything)[:n]).encode("utf-8", "replace") for n in (LETTERS, LETTERS // 6)]
    return (safe[0] if len(safe[0]) < 2 * LETTERS else safe[1]).decode()


def label(row):
    return text(row["stage"] + ("" if row["temperature"] is None else f" T={row['temperature']:g}") + (" blind" if row["blind"] else ""))


def html_table(head, lines):
    cells = "".join(f"<tr>{''.join(f'<td>{c}</td>' for c in line)}</tr>" for line in lines)
    return f"<div class=wide><table><tr>{''.join(f'<th>{h}</th>' for h in head)}</tr>{cells}</table></div>"


def score_tables(rows):
    names = list(rows[0]["ci"])
    tries = sorted({k for row in rows for k in row.get("pass", ())}, key=int)
    lines = []
    for row in rows:
        figures = [f"{row[k]:.3f} <small>[{row['ci'][k][0]:.3f}, {row['ci'][k][1]:.3f}]</small>" for k in names]
        figures += [f"{row['pass'][k]:.3f}" if k in row.get("pass", ()) else "-" for k in tries]
        lines.append([label(row), *figures, f"{sum(row['failures'].values()) / row['n']:.3f}"])
    page = html_table(["stage", *names, *(f"pass@{k}" for k in tries), "failed"], lines)
    official = [(label(row), part, values) for row in rows for part, values in row.get("vrsbench", {}).items()]
    if official:
        page += "<h3>VRSBench's own metric</h3>" + html_table(["stage", "part", "n", "Acc@0.5", "Acc@0.7"], [
            [name, text(part), values["n"], f"{values['Acc@0.5']:.3f}", f"{values['Acc@0.7']:.3f}"] for name, part, values in official])
    return page


def guessed(guess):
    return f"<p>A box of the median size in the middle of each image: mIoU {guess['mIoU']:.3f}, Pr@0.5 {guess['Pr@0.5']:.3f}.</p>"


def compared(comparison):
    tests = {name: test for name, test in (comparison or {}).items() if isinstance(test, dict)}
    lines = [[text(name), f"{t['difference']:+.3f} <small>[{t['ci'][0]:+.3f}, {t['ci'][1]:+.3f}]</small>", f"{t['p']:.3f}"]
             for name, t in tests.items()]
    return "<h3>Second minus first, the same images</h3>" + html_table(["", "difference", "p"], lines) if lines else ""


def breakdowns(rows):
    """One table a property: Pr@0.5 of every row, for each of its values."""
    page = ""
    for by, values in rows[0]["breakdowns"].items():
        most = sorted(values, key=lambda value: -values[value]["n"])[:VALUES]
        shown = [(value, first) for value, first in values.items() if value in most]
        found = [row["breakdowns"][by] for row in rows]
        lines = [[text(value[:60]), first["n"], *(f"{f[value]['mIoU']:.3f} / {f[value]['Pr@0.5']:.3f}" for f in found)]
                 for value, first in shown]
        page += f"<h3>By {text(by)}</h3>" + html_table(["mIoU / Pr@0.5", "n", *map(label, rows)], lines)
        page += f"<p>and {len(values) - VALUES} more in eval.json</p>" if len(values) > VALUES else ""
    return f"<h2>Breakdowns</h2>{page}" if page else ""


# ------------------------------------------------------------------------------------------------------------------ training

def log_lines(path):
    """The whole JSON objects of a JSONL file, which a run may still be writing; none where there is no file."""
    if path.exists():
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    value = json.loads(line)
                except ValueError:
                    continue
                if isinstance(value, dict):
                    yield value


def reward_curves(lines) -> list[tuple[str, ...]]:
    """The curves of the reward: its terms, and their standard deviation within a group. Whatever terms a run had, each is logged beside
    a key NAME_group_std, by which it is known here."""
    suffix = "_group_std"
    deviations = list(dict.fromkeys(key for line in lines for key in line if key.endswith(suffix)))
    return [tuple(key.removesuffix(suffix) for key in deviations), tuple(deviations)]


def plottable(line, key):
    return all(type(line.get(k)) in (int, float) and math.isfinite(line[k]) for k in ("step", key))


def group(line, record):
    """A line of rollouts.jsonl -> figure."""
    low, high = min(line["reward"]), max(line["reward"])
    drawn = [(box, (255, int(200 * (r - low) / (high - low + 1e-6)), 0)) for box, r in zip(line["boxes"], line["reward"]) if box]
    rewards = ", ".join(f"{r:.2f}" for r in line["reward"])
    caption = f"<b>step {text(line['step'])}</b> {text(record.text)}<br>rewards {rewards}"
    return html_figure(record, [*drawn, (record.box, "lime")], caption, line["texts"][0])


# ------------------------------------------------------------------------------------------------------------------ cases

def choose(cases, each):
    """-> ("Best", cases), ("Median", ...), ("Worst", ...) by IoU, `each` of each at most and none twice."""
    ranked, taken = sorted(range(len(cases)), key=lambda i: -cases[i][2]), set()
    middle = max(0, (len(ranked) - each) // 2)
    for title, places in (("Best", ranked[:each]), ("Worst", ranked[::-1][:each]), ("Median", ranked[middle:middle + each])):
        places = [i for i in places if i not in taken]
        taken.update(places)
        if places:
            yield title, [cases[i] for i in places]


def case(record, box, iou, answer):
    said = f"IoU {iou:.2f}" if box else "no box"
    return html_figure(record, [(record.box, "lime"), *([(box, "red")] if box else ())], f"<b>{said}</b> {text(record.text)}", answer)


def html_figure(record, boxes, caption, answer):
    """caption is HTML, answer is not."""
    said = f"<pre>{text(answer)}</pre>" if answer else ""
    return f'<figure><img alt="" src="{picture(record, boxes)}"><figcaption>{caption}{said}</figcaption></figure>'


def picture(record, boxes):
    """-> data URI of a JPEG of PICTURE_BYTES at most."""
    image = data.open_image(record)
    wide = max(16, round(PICTURE_SIDE * min(1, image.width / image.height)))
    return pictures.jpeg_uri(pictures.draw_boxes(image, boxes, width=wide), PICTURE_BYTES)
