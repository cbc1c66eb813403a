"""How a run is watched: report.html of a stage, its figures in a tracker, words in the terminal.

Lines are those of metrics.jsonl, of all steps so far.
"""
import argparse
import importlib
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from readers.base import Record
from report.page import Row, curves, html_figure, html_page, safe

REFRESH = 60                      # seconds after which the page of a running stage loads again
RECENT = 20                       # steps whose mean duration predicts the time left
WARNINGS = 10                     # kinds of warnings on the page, at most; the last ones
ANSWERS = 4                       # records whose answers are shown, at most
# Keys of a line of rollouts.jsonl that are not a term of the reward.
NO_TERM = ("step", "id", "expression", "target", "boxes", "reward", "texts")
Answers = tuple[Record, Row]      # a record, and its line of rollouts.jsonl


def write_report(path: Path, run: Mapping[str, Any], steps: int, lines: Sequence[Row],
                 answers: Sequence[Answers], ended: str = "") -> None:
    """Writes a stage's page, whole or not at all. run: content of run.json; answers: of the last
    step; ended: how the run ended, in words, or "" while it goes on."""
    done = lines[-1]["step"] if lines else 0
    state = ended or (f"Running: step {done:,} of {steps:,}, {time_left(lines, steps)} left "
                      "without validations")
    body = (f"<p><b>{safe(state)}</b></p><p>{safe(run['data'])}, {run['records']:,} records; "
            f"written {time.strftime('%Y-%m-%d %H:%M:%S')}</p><pre>{safe(run['command'])}</pre>")
    if line := best(lines):
        body += f"<p>Best validation, step {line['step']:,}: {validation_words(line)}</p>"
    # The first and the last step of each warning.
    spans: dict[str, list[int]] = {}
    for line in lines:
        if "warning" in line:
            spans.setdefault(line["warning"], [line["step"], 0])[1] = line["step"]
    body += "<h2>Warnings</h2>" * bool(spans)
    for words, (first, last) in [*spans.items()][-WARNINGS:]:
        body += f"<p>Steps {first:,} to {last:,}: {safe(words)}</p>"
    body += f"<h2>Curves</h2><div class=row>{curves(lines)}</div>"
    figures = ""
    for record, row in answers[:ANSWERS]:
        texts = ""
        for i, text in enumerate(row["texts"]):
            scores = [f"reward {row['reward'][i]:.2f}"] if "reward" in row else []
            scores += [f"{name} {row[name][i]:.2f}" for name in row if name not in NO_TERM]
            texts += f"<pre>{safe(', '.join(scores))}\n{safe(text)}</pre>"
        caption = f"{safe(record.text)}<div class=texts>{texts}</div>"
        figures += html_figure(record, row["boxes"], row.get("reward"), caption, "")
    body += f"<h2>Answers at step {done:,}</h2><div class=row>{figures}</div>" * bool(figures)
    page = html_page(f"{run['stage']}: {path.parent}", body, 0 if ended else REFRESH)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(page, encoding="utf-8")
    temporary.replace(path)


def best(lines: Sequence[Row]) -> Row | None:
    """The line of the first step with the highest val_mIoU."""
    scored = (line for line in lines if "val_mIoU" in line)
    return max(scored, key=lambda line: line["val_mIoU"], default=None)


def validation_words(line: Row) -> str:
    """"val mIoU 0.412, Pr@0.5 0.430, failed 0.020"; "" for a step without a validation."""
    scores = {k.removeprefix("val_"): v for k, v in line.items() if k.startswith("val_")}
    return "val " * bool(scores) + ", ".join(f"{name} {v:.3f}" for name, v in scores.items())


def time_left(lines: Sequence[Row], steps: int) -> str:
    """Of training, as "1:23:45": validations and checkpoints are not counted."""
    recent = lines[-RECENT:]
    seconds = 0.0
    for line in recent:
        seconds += sum(v for key, v in line.items() if key.startswith("seconds"))
    left = steps - recent[-1]["step"] if recent else 0
    return tqdm.format_interval(left * seconds / max(1, len(recent)))


def open_tracker(args: argparse.Namespace, first: int) -> tuple[
        Callable[[Row, int], Any], Callable[[], Any]]:
    """For --track, a function that sends a step's figures, and one that ends the sending. A resumed
    run has its track_id, and so goes on with its curves; first: the step that it continues."""
    args.track_id = args.track_id or secrets.token_hex(4)
    out = Path(args.out)
    if args.track == "tensorboard":
        module = importlib.import_module("torch.utils.tensorboard")
        folder = out.parent / "tensorboard" / out.name
        writer = module.SummaryWriter(str(folder), purge_step=first + 1)
        return (lambda figures, step: [writer.add_scalar(*figure, step)
                                       for figure in figures.items()]), writer.close
    tracker = importlib.import_module(args.track)
    # trackio finds a run by its name, wandb by its id.
    more = {"id": args.track_id} if args.track == "wandb" else {}
    tracker.init(project="rsground", name=f"{out} {args.track_id}", config=vars(args),
                 resume="allow", **more)
    return lambda figures, step: tracker.log(figures, step=step), tracker.finish
