"""report/watch.py and what a stage prints: its page, trackers, lengths of runs, --config."""
import argparse
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

import rft
import sft
from conftest import Forks, Run
from readers.base import Record, Records
from report import watch
from train import dist, flags
from train import run as runtime

RUN = {"stage": "rft", "command": "rft.py --out <b>", "data": "jsonl", "records": 1234}
# --data synth is slow to draw in a fork, so tests read a folder.
SMALL = ("--val", 2, "--max-new-tokens", 4, "--device", "cpu", "--data", "dior")


def lines_of(n: int) -> list[dict[str, Any]]:
    """Lines of n steps of half an hour; a validation every second one, a warning in 2 to 4."""
    lines = []
    for step in range(1, n + 1):
        line = {"step": step, "reward": step / n, "reward_group_std": 0.1, "iou": 0.2, "kl": 0.01,
                "iou_group_std": 0.1, "lr": 1e-4, "grad_norm": 2.0, "entropy": 0.5, "length": 40,
                "seconds_rollout": 600.0, "seconds_update": 900.0, "time": 1e9 + 1800 * step}
        if step % 2 == 0:
            line |= {"val_mIoU": 0.5 if step == 4 else 0.25, "val_Pr@0.5": 0.4, "val_failed": 0.0}
        if 2 <= step <= 4:
            line["warning"] = "rewards do not differ <i>"
        lines.append(line)
    return lines


@pytest.fixture
def answers(tmp_path: Path) -> list[watch.Answers]:
    Image.new("RGB", (400, 300), (90, 110, 80)).save(tmp_path / "a.png")
    record = Record("a", tmp_path / "a.png", "the <red> ship", (10, 10, 99, 90), "ship", (400, 300))
    row = {"step": 6, "id": "a", "expression": record.text, "target": record.box,
           "boxes": [[12.0, 10.0, 99.0, 80.0], None], "reward": [1.75, 0.0], "iou": [0.75, 0.0],
           "texts": ["<think>here</think>", "nowhere"]}
    return [(record, row)]


def test_the_page_of_a_running_stage(tmp_path: Path, answers: list[watch.Answers]) -> None:
    watch.write_report(tmp_path / "report.html", RUN, 10, lines_of(6), answers)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<meta http-equiv=refresh content=60>" in page
    # 4 steps of 600 + 900 seconds are left.
    assert "Running: step 6 of 10, 1:40:00 left without validations" in page
    assert "jsonl, 1,234 records" in page and "rft.py --out &lt;b&gt;" in page
    assert "Best validation, step 4: val mIoU 0.500, Pr@0.5 0.400, failed 0.000" in page
    assert "<p>Steps 2 to 4: rewards do not differ &lt;i&gt;</p>" in page
    # A drawing of each, with steps and hours below it: the sixth step comes 2.5 h after the first.
    titles = re.findall(r"<figcaption><b>([^<]+)</b>", page)
    assert titles == [
        "reward and its terms", "standard deviation in a group", "validation (share)",
        "KL (nats per token)", "entropy (nats per token)", "length (tokens)", "learning rate",
        "norm of the gradient", "duration of a step (seconds)"]
    assert page.count(">step 6</text>") == len(titles) == page.count(">2.5 h</text>")
    assert page.count("src=") == page.count('src="data:image/jpeg;base64,') == 1
    assert "the &lt;red&gt; ship" in page
    assert "<pre>reward 1.75, iou 0.75\n&lt;think&gt;here&lt;/think&gt;</pre>" in page
    assert "<pre>reward 0.00, iou 0.00\nnowhere</pre>" in page
    # Nothing asks another host. A link to a place on the page would end its reloads in Chromium.
    assert not re.search(r"<script|https?:|href=|url\(", page)
    assert [p.name for p in tmp_path.iterdir() if "report" in p.name] == ["report.html"]


def test_the_page_of_a_finished_stage_does_not_load_again(tmp_path: Path) -> None:
    watch.write_report(tmp_path / "report.html", RUN, 6, lines_of(6), [], "finished: <here>")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "refresh" not in page and "<b>finished: &lt;here&gt;</b>" in page
    # An earlier version's log has no time, a run without steps has no lines.
    old = [{k: v for k, v in line.items() if k != "time"} for line in lines_of(3)]
    for lines in (old, []):
        watch.write_report(tmp_path / "report.html", RUN, 6, lines, [])
        page = (tmp_path / "report.html").read_text(encoding="utf-8")
        assert " h</text>" not in page and f"step {len(lines)} of 6" in page


@pytest.fixture
def stage(tmp_path: Path) -> runtime.Run:
    args = argparse.Namespace(
        **vars(rft.flags().parse_args([])) | {"out": str(tmp_path / "out"), "steps": 9, "every": 2})
    run = runtime.Run(args, "rft", Records([], {}))
    run.description = RUN
    run.bar = SimpleNamespace(disable=True, set_postfix_str=lambda *_, **__: 0, update=lambda: 0)
    run.save = lambda line: None
    return run


def test_a_page_that_cannot_be_written_is_a_warning(
        stage: runtime.Run, capfd: pytest.CaptureFixture) -> None:
    (stage.out / "report.html").mkdir()
    for line in lines_of(4):
        stage.log({**line, "finite": True}, runtime.Batch([], [], []))
    said = capfd.readouterr().err
    assert said.count("report.html is not written: ") == 2 and len(stage.lines) == 4


def test_a_tracker_that_fails_does_not_stop_a_run(
        stage: runtime.Run, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("no network")

    monkeypatch.setitem(sys.modules, "trackio", SimpleNamespace(
        init=lambda **_: None, log=broken, finish=broken))
    stage.args.track = "trackio"
    stage.send, stage.end_tracking = watch.open_tracker(stage.args, 0)
    stage.log({"step": 1, "finite": True}, runtime.Batch([], [], []))
    stage.attempt("--track trackio", stage.end_tracking)
    assert capfd.readouterr().err.count("warning: --track trackio: no network") == 2


def test_tensorboard_gets_each_figure_and_drops_steps_that_run_again(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    class Writer:
        def __init__(self, folder: str, purge_step: int) -> None:
            seen.append((folder, purge_step))

        def add_scalar(self, *what: Any) -> None:
            seen.append(what)

        def close(self) -> None:
            seen.append("closed")

    monkeypatch.setitem(
        sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    args = argparse.Namespace(track="tensorboard", track_id=None, out=str(tmp_path / "rft"))
    send, end = watch.open_tracker(args, first=4)
    send({"iou": 0.5, "time": 9.0}, 5)
    end()
    assert seen == [
        (str(tmp_path / "tensorboard" / "rft"), 5), ("iou", 0.5, 5), ("time", 9.0, 5), "closed"]


# ---------------------------------------------------------------- real stages

def logged(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_words_and_page_of_a_stage_stopped_resumed_and_repeated(
        tiny_checkpoint: Path, dior_root: Path, run: Run, tmp_path: Path) -> None:
    one = tmp_path / "one"
    done = run("sft.py", *SMALL, "--root", dior_root, "--init", tiny_checkpoint, "--steps", 4,
               "--every", 2, "--batch", 4, "--lr", 2e-4, 1, "--answer-only", "--out", one)
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert f"16 records; 4 steps of 4 = 1 passes; saves each 2 to {one}" in said
    validations = [line for line in said if re.match(r"step \d: val mIoU ", line)]
    assert [line[:7] for line in validations] == ["step 2:", "step 4:"]
    assert re.fullmatch(
        rf"finished: {one}/latest is step 4, {one}/best step [24] \(val mIoU 0\.\d+\); "
        rf"next: python .*/rft.py --init {one} --out {tmp_path}/rft --lr 2e-05 --data dior "
        rf"--root {dior_root}", said[-1])
    # Without a terminal there are lines in place of a bar: the first step, and where it saves.
    lines = done.stderr.splitlines()
    assert lines[0] == ("warning: 4 steps are too few to learn much; --epochs 10 would be 40 "
                        "steps")
    assert [re.sub("left.*", "left", line) for line in lines[1:]] == [
        f"sft: step {step} of 4, 00:00 left" for step in (1, 2, 4)] and "\r" not in done.stderr
    page = (one / "report.html").read_text()
    assert "refresh" not in page and "finished: " in page and page.count("<img") == 2
    assert "<b>loss</b>" in page and ">step 1</text>" in page

    resumed = run("sft.py", "--resume", "--out", one, "--steps", 6)
    assert resumed.returncode == 0, resumed.stderr
    assert f"to {one}; continuing after step 4" in resumed.stdout
    page = (one / "report.html").read_text()
    assert ">step 1</text>" in page and ">step 6</text>" in page

    # --config repeats it elsewhere; the command line wins.
    file = one / "step_000002" / "run.json"
    again = run("sft.py", "--config", file, "--out", tmp_path / "again")
    assert again.returncode == 0, again.stderr
    for a, b in zip(logged(one), logged(tmp_path / "again"), strict=False):
        if a["step"] <= 4:
            assert a["loss"] == b["loss"] and a["lr"] == b["lr"]
    was = json.loads(file.read_text())["flags"]
    flags_now = json.loads((tmp_path / "again/latest/run.json").read_text())["flags"]
    assert flags_now == {**was, "out": str(tmp_path / "again")}
    other = run("sft.py", "--config", file, "--out", tmp_path / "other", "--epochs", 1, "--batch",
                2, "--val", 0)
    assert other.returncode == 0, other.stderr
    assert len(logged(tmp_path / "other")) == 8 and "val_mIoU" not in logged(tmp_path / "other")[-1]


def test_the_page_and_the_tracker_of_rft(
        tiny_checkpoint: Path, dior_root: Path, forks: Forks, tmp_path: Path) -> None:
    calls = tmp_path / "calls"
    fake = f"""
import json, sys, types
def note(*what, **more):
    with open({str(calls)!r}, "a") as file:
        file.write(json.dumps([what, more], default=str) + "\\n")
sys.modules["wandb"] = types.SimpleNamespace(
    init=lambda **more: note("init", **more), finish=lambda: note("finish"),
    log=lambda figures, step: note("log", figures, step))
"""
    out = tmp_path / "rft"
    first = ("--root", dior_root, "--init", tiny_checkpoint, "--prompts", 2, "--group", 2,
             "--track", "wandb", *SMALL, "--steps", 2, "--every", 1)
    for more in (first, ("--resume", "--steps", 3)):
        pid = forks.start("rft.py", "--out", out, *more, stdout=tmp_path / "said", spoil=fake)
        assert forks.wait(pid) == [0], (tmp_path / "said").read_text()
    seen = [json.loads(line) for line in calls.read_text().splitlines()]
    assert [what[0] for what, _ in seen] == [
        "init", "log", "log", "finish", "init", "log", "finish"]
    begun, resumed = (more for what, more in seen if what[0] == "init")
    # The resumed run goes on in the same place.
    assert begun["id"] == resumed["id"] and begun["resume"] == "allow"
    assert begun["config"]["prompts"] == 2
    sent = [what[1:] for what, _ in seen if what[0] == "log"]
    for (figures, step), line in zip(sent, logged(out), strict=True):
        assert step == line["step"] and line["time"] > 1.7e9
        assert figures == {k: v for k, v in line.items() if k not in ("finite", "warning")}
    page = (out / "report.html").read_text()
    # Two questions of the last step, each with its two answers.
    assert page.count("<img") == 2 and page.count("<pre>reward ") == 4
    assert f"next: python eval.py {out}" in (tmp_path / "said").read_text().splitlines()[-1]


def test_mistakes_are_one_line(run: Run, tmp_path: Path, tiny_checkpoint: Path) -> None:
    sft_run = {"stage": "sft", "flags": vars(sft.flags().parse_args([]))}
    files = {}
    for name, content in {
            "text": "words", "list": "[1]", "rft": json.dumps({**sft_run, "stage": "rft"}),
            "flag": json.dumps({**sft_run, "flags": {"nothing": 1}}),
            "value": json.dumps({**sft_run, "flags": {"lr": "fast"}})}.items():
        files[name] = tmp_path / f"{name}.json"
        files[name].write_text(content)
    for flags_, words in (
            (("--config", tmp_path / "none.json"), "that is no run.json of a run of sft.py"),
            (("--config", files["text"]), "text.json: unreadable"),
            (("--config", files["list"]), "that is no run.json of a run of sft.py"),
            (("--config", files["rft"]), "that is no run.json of a run of sft.py"),
            (("--config", files["flag"]), "this version has no flag nothing"),
            (("--config", files["value"]), "argument --lr: fast is not a number"),
            (("--config", files["flag"], "--resume"), "leave one of them out"),
            (("--track", "trackio", "--init", tiny_checkpoint, "--data", "synth-tiny", "--steps", 1,
              "--val", 0, "--device", "cpu"), "--track trackio: No module named 'trackio'")):
        done = run("sft.py", *flags_, "--out", tmp_path / "out")
        lines = done.stderr.splitlines()
        assert done.returncode == 2 and len(lines) == 1 and words in lines[0], done.stderr
        assert not any((tmp_path / "out").glob("*"))


# ---------------------------------------------------------------- lengths and recorded flags

def test_the_length_of_a_run_follows_the_number_of_records(capsys: pytest.CaptureFixture) -> None:
    # sqrt(10,000 / records) passes, 1 to 10 of them, to one digit; of RFT 0.4 as many.
    for stage, records, epochs, steps, every in (
            ("sft", 100, 10, 62, 13), ("sft", 1_000, 3, 188, 38), ("sft", 30_000, 1, 1875, 200),
            ("rft", 100, 4, 50, 10), ("rft", 1_000, 1, 125, 25), ("rft", 27_000, 0.4, 1350, 50)):
        args = argparse.Namespace(steps=None, epochs=None, every=None)
        flags.set_steps(args, stage, records, 16 if stage == "sft" else 8)
        assert (args.steps, args.every) == (steps, every)
        assert capsys.readouterr().out == (
            f"chosen for {records:,} records: --epochs {epochs} --every {every}\n")
    args = argparse.Namespace(steps=7, epochs=None, every=3)
    flags.set_steps(args, "rft", 1_000, 8)
    assert (args.steps, args.every) == (7, 3) and not capsys.readouterr().out


def test_a_run_that_is_too_long_or_too_short_is_told_what_would_suit() -> None:
    def advice(stage: str, steps: int, records: int, per_step: int) -> list[str]:
        return flags.too_long_or_short(
            argparse.Namespace(steps=steps), stage, records, per_step)

    assert not advice("sft", 20, 16, 16) and not advice("rft", 1_500, 30_000, 8)
    # 1,000 steps of 16 are 160 passes over 100 records.
    assert advice("sft", 1_000, 100, 16) == [
        "160 passes over the same records teach them by heart; --epochs 10 would be 62 steps"]
    assert advice("rft", 19, 1_000, 8) == [
        "19 steps are too few to learn much; --epochs 1 would be 125 steps"]
    # 10 passes over 12 records are 7 steps of 16, but 20 of 6.
    assert advice("sft", 7, 12, 16) == [
        "7 steps are too few to learn much; --batch 6 --epochs 10 would be 20 steps"]


@pytest.mark.parametrize("stage", [sft, rft])
def test_recorded_flags_are_those_of_a_repeated_run(
        stage: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    name = stage.__name__
    file = tmp_path / "run.json"

    def parse(*words: str) -> dict[str, Any]:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *words])
        return json.loads(json.dumps(vars(flags.parse(stage.flags(), name))))

    for words in (
            "", "--lora 8 --lora-vision --no-gradient-checkpointing --keep 3 9 --stretch 2 98",
            "--lr 3e-4 7 --gradient-checkpointing --root /a/b --data-coords 1000 --deterministic",
            "--reward iou=1 giou=0.25 --weighting shuffled 0.5 2 iou_hard --clip 0.1 0.3"):
        if "--reward" in words and stage is sft:
            continue
        recorded = parse(*words.split(), "--device", "cpu", "--steps", "70")
        file.write_text(json.dumps({"stage": name, "flags": recorded}))
        repeated = {**recorded, "config": str(file)}
        assert parse("--config", str(file)) == repeated
        # The command line comes first.
        assert parse("--config", str(file), "--lr", "0.5") == {**repeated, "lr": 0.5}
        assert parse("--config", str(file), "--epochs", "2") == {
            **repeated, "epochs": 2, "steps": None}


# ---------------------------------------------------------------- figures over processes

@pytest.fixture
def two_processes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The other process has the same figures."""
    monkeypatch.setattr(dist, "world", lambda: 2)
    monkeypatch.setattr(dist, "all_reduce", lambda x, op="sum": 2 * x if op == "sum" else x)
    yield


def test_a_figure_says_how_processes_share_it(two_processes: None) -> None:
    assert rft.over_processes({"mean": torch.tensor(0.25)}, {"sum": 3}) == {"mean": 0.25, "sum": 6}
