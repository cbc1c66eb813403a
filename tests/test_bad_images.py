"""Undecodable images do not end a run of sft.py, rft.py or eval.py.

Replacements are worked out by hand; one process, two processes and a resume agree on them.
"""
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import data
from conftest import Run
from data import load
from readers.base import Record, Records
from train import run as training

RECORDS = 120
BATCH = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 records to train on, 4 to validate on, 6 to test on; each image can be decoded."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for split, n in (("train", RECORDS), ("val", 4), ("test", 6)):
        lines = []
        for i in range(n):
            name = f"{split}{i}.png"
            pixels = rng.integers(0, 255, (30, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name)
            lines.append({"id": f"{split}{i}", "image": name, "text": "a ship",
                          "box": [5, 6, 20, 25]})
        (root / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root


@pytest.fixture
def damaged(folder: Path, tmp_path: Path) -> Callable[..., Path]:
    """damaged("train3", ...) -> a copy of the folder in which these can't be decoded."""
    def damage(*names: str) -> Path:
        root = tmp_path / "damaged"
        shutil.copytree(folder, root)
        for name in names:
            path = root / f"{name}.png"
            path.write_bytes(path.read_bytes()[:-2000])
        return root
    return damage


def ids_in_order(records: Sequence[Record], step: int, steps: int = 1) -> list[str]:
    """Ids of the records of some steps, nothing replaced."""
    ids = []
    for s in range(step, step + steps):
        ids += [training.record_at(records, s * BATCH + i, 0).id for i in range(BATCH)]
    return ids


# ---------------------------------------------------------------- the rule

def shares(
        monkeypatch: pytest.MonkeyPatch, out: Path, records: Records, step: int, world: int,
) -> tuple[list[str], list[str]]:
    """Ids by place of a step as `world` processes have them, and those that were replaced."""
    monkeypatch.setenv("WORLD_SIZE", str(world))
    ids = [""] * BATCH
    unreadable = []
    run = training.Run(SimpleNamespace(out=out, resume=True, seed=0), "rft", records)
    for rank in range(world):
        monkeypatch.setenv("RANK", str(rank))
        share = run.batch(lambda r: data.open_image(r).size, BATCH, step)
        assert share.inputs == [(40, 30)] * len(share.records)
        ids[rank::world] = [record.id for record in share.records]
        unreadable += [met["id"] for met in share.unreadable]
    return ids, sorted(unreadable)


def test_a_bad_record_is_replaced_by_the_one_a_batch_later_whoever_opens_it(
        folder: Path, damaged: Callable[..., Path], monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path,
) -> None:
    order = ids_in_order(load("jsonl", folder, "rft"), 0, 4)
    # The third of the first batch, and what would take its place.
    root = damaged(order[2], order[2 + BATCH])
    monkeypatch.setattr(training, "MOST_UNREADABLE", 0.1)
    records = load("jsonl", root, "rft")
    for world in (1, 2, 4):
        first, unreadable = shares(monkeypatch, tmp_path, records, 0, world)
        assert first == [order[0], order[1], order[2 + 2 * BATCH], order[3]]
        assert unreadable == sorted([order[2], order[2 + BATCH]])
        second, unreadable = shares(monkeypatch, tmp_path, records, 1, world)
        assert second == [order[4], order[5], order[10], order[7]]
        assert unreadable == [order[2 + BATCH]]
        # Replacements do not change later steps.
        assert shares(monkeypatch, tmp_path, records, 2, world) == (order[8:12], [])


def test_an_order_of_bad_records_alone_has_an_end(
        damaged: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:
    records = load("jsonl", damaged(*(f"train{i}" for i in range(RECORDS))), "rft")
    monkeypatch.setenv("WORLD_SIZE", "1")
    args = SimpleNamespace(out=tmp_path, resume=True, seed=0)
    share = training.Run(args, "rft", records).batch(data.open_image, BATCH, 0)
    # One in 120 may be met.
    assert not share.records and len(share.unreadable) == 2


def test_replacements_are_counted_named_once_and_kept(
        tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:
    def bad(i: int, image: str = "a.png") -> dict[str, Any]:
        return {"place": 3 + i, "id": f"r{i}", "image": image, "problem": f"{image}: bad {i}"}

    def counted(run: training.Run, step: int, *met: dict[str, Any]) -> dict[str, int]:
        line = {"step": step}
        run.count_unreadable(line, met)
        return line

    args = SimpleNamespace(out=tmp_path, resume=True, data="jsonl", root=None, device="cpu",
                           track=None)
    records = Records([Record("r", tmp_path, "x", (0, 0, 1, 1), "", (9, 9))] * 300, {})
    run = training.Run(args, "sft", records)
    assert counted(run, 1) == {"step": 1}
    assert counted(run, 2, bad(0)) == {"step": 2, "unreadable": 1}
    assert counted(run, 3, bad(0), bad(1)) == {"step": 3, "unreadable": 2}
    assert counted(run, 4) == {"step": 4, "unreadable": 2}
    # Two records of one image.
    assert capfd.readouterr().out == "a.png: bad 0; another record takes its place\n"
    lines = [json.loads(line) for line in (tmp_path / "unreadable.jsonl").read_text().splitlines()]
    assert [(line["step"], line["id"], line["image"]) for line in lines] == [
        (2, "r0", "a.png"), (3, "r1", "a.png")]
    # A run that is resumed after step 2 has met only the first.
    monkeypatch.setattr(training.checkpoints, "restore", lambda *_: 2)
    resumed = training.Run(args, "sft", records)
    resumed.begin(torch.nn.Linear(1, 1), None, None)
    capfd.readouterr()
    assert counted(resumed, 3, bad(0), bad(1)) == {"step": 3, "unreadable": 2}
    assert not capfd.readouterr().out
    assert counted(resumed, 4, bad(2)) == {"step": 4, "unreadable": 3}
    with pytest.raises(SystemExit) as stop:
        counted(resumed, 5, bad(9, "b.png"))
    error = capfd.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    assert "so far 4 of 300 records have an image that cannot be decoded, more than 1%" in error



# ---------------------------------------------------------------- the real scripts

def log_of(out: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """A log without what no two runs share."""
    lines = []
    for text in (out / name).read_text().splitlines():
        line = json.loads(text)
        for key in [k for k in line if k.startswith(("seconds", "peak", "tokens_per", "time"))]:
            del line[key]
        lines.append(line)
    return lines


def resume_after(out: Path, step: int, copy: Path) -> None:
    """A copy of a run's folder, as after a crash after that step."""
    shutil.copytree(out, copy, symlinks=True)
    for later in sorted(copy.glob("step_*")):
        if int(later.name[5:]) > step:
            shutil.rmtree(later)
    (copy / "latest").unlink()
    (copy / "latest").symlink_to(f"step_{step:06d}")


def test_sft_goes_on_and_a_resume_and_two_processes_take_the_same_records(
        folder: Path, damaged: Callable[..., Path], tiny_checkpoint: Path, run: Run, tmp_path: Path,
) -> None:
    """Images are prepared in threads, a step ahead."""
    bad = ids_in_order(load("jsonl", folder, "sft"), 1)[1]
    root = damaged(bad, "val2")
    flags = ("--data", "jsonl", "--root", root, "--init", tiny_checkpoint, "--steps", 3, "--batch",
             BATCH, "--every", 1, "--keep", 9, "--val", 4, "--max-new-tokens", 4, "--answer-only",
             "--device", "cpu")
    one = tmp_path / "one"
    done = run("sft.py", *flags, "--out", one)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"{bad}.png: unreadable image of record {bad} (") == 1
    assert [line.get("unreadable") for line in log_of(one)] == [None, 1, 1]
    assert [line["id"] for line in log_of(one, "unreadable.jsonl")] == [bad]
    # The bad image of val is a miss.
    assert all(line["val_failed"] >= 0.25 for line in log_of(one))
    resumed = tmp_path / "resumed"
    resume_after(one, 1, resumed)
    done = run("sft.py", "--out", resumed, "--resume")
    assert done.returncode == 0, done.stderr
    assert log_of(resumed) == log_of(one)
    assert log_of(resumed, "unreadable.jsonl") == log_of(one, "unreadable.jsonl")
    weights = "latest/model.safetensors"
    assert (resumed / weights).read_bytes() == (one / weights).read_bytes()
    two = tmp_path / "two"
    done = run("sft.py", *flags, "--out", two, processes=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"{bad}.png: unreadable image of record {bad} (") == 1
    assert log_of(two, "unreadable.jsonl") == log_of(one, "unreadable.jsonl")
    for a, b in zip(log_of(one), log_of(two), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["completion_tokens"] == b["completion_tokens"]


@pytest.mark.parametrize("processes", [None, 2])
def test_more_than_one_in_a_hundred_end_a_run_in_one_line(
        folder: Path, damaged: Callable[..., Path], tiny_checkpoint: Path, run: Run, tmp_path: Path,
        processes: int | None,
) -> None:
    order = ids_in_order(load("jsonl", folder, "sft"), 0, 2)
    root = damaged(order[0], order[5])
    done = run(
        "sft.py", "--data", "jsonl", "--root", root, "--init", tiny_checkpoint, "--steps", 3,
        "--batch", BATCH, "--val", 0, "--answer-only", "--device", "cpu", "--out",
        tmp_path / "out", processes=processes)
    says = "so far 2 of 120 records have an image that cannot be decoded"
    assert done.stderr.count(says) == 1, done.stderr
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert len(log_of(tmp_path / "out")) == 1


def test_rft_samples_the_replacement_on_one_process_and_two(
        folder: Path, damaged: Callable[..., Path], tiny_checkpoint: Path, run: Run, tmp_path: Path,
) -> None:
    order = ids_in_order(load("jsonl", folder, "rft"), 0, 3)
    root = damaged(order[2])
    expected = [order[0], order[1], order[2 + BATCH], *order[3:8]]
    for name, processes in (("one", None), ("two", 2)):
        done = run(
            "rft.py", "--data", "jsonl", "--root", root, "--init", tiny_checkpoint, "--steps", 2,
            "--prompts", BATCH, "--group", 2, "--max-new-tokens", 4, "--val", 0, "--device", "cpu",
            "--out", tmp_path / name, processes=processes)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("another record takes its place") == 1
        assert [line["unreadable"] for line in log_of(tmp_path / name)] == [1, 1]
        sampled = [line["id"] for line in log_of(tmp_path / name, "rollouts.jsonl")]
        # The log is of the first process.
        assert sampled == expected[::processes or 1]


def test_eval_counts_a_bad_image_as_a_miss_and_goes_on(
        damaged: Callable[..., Path], tiny_checkpoint: Path, run: Run, tmp_path: Path,
) -> None:
    root = damaged("test1", "test4")
    flags = ("--data", "jsonl", "--root", root, "--split", "test")
    out = tmp_path / "out"
    done = run("eval.py", tiny_checkpoint, *flags, "--max-new-tokens", 4, "--batch", 2,
               "--out", out, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert "unreadable image 2" in done.stdout
    row = json.loads((out / "eval.json").read_text())["rows"][0]
    assert row["n"] == 6 and row["failures"]["unreadable image"] == 2 and row["stretch"] is None
    assert sum(row["failures"].values()) == 6
    assert (out / "report.html").exists()
    file = next(out.glob("predictions_*.jsonl"))
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["id"] for line in lines] == [f"test{i}" for i in range(6)]
    assert lines[1] == {"id": "test1", "box": None, "failure": "unreadable image"}
    # Scored again from the file, it is what it was.
    again = tmp_path / "again"
    done = run("eval.py", "--predictions", file, *flags, "--out", again)
    assert done.returncode == 0, done.stderr
    second = json.loads((again / "eval.json").read_text())["rows"][0]
    assert second["failures"] == row["failures"] and second["mIoU"] == row["mIoU"]


def test_a_batch_of_bad_images_alone_is_answered_by_misses(
        damaged: Callable[..., Path], tiny_checkpoint: Path, run: Run, tmp_path: Path,
) -> None:
    root = damaged(*(f"test{i}" for i in range(6)))
    done = run(
        "eval.py", tiny_checkpoint, "--data", "jsonl", "--root", root, "--max-new-tokens", 4,
        "--out", tmp_path / "out", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert "unreadable image 6" in done.stdout
