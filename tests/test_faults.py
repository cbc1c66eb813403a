"""What a run must survive: stop requests, kills, a full disk, damaged files, a lost process.

After each fault the resumed run must equal the uninterrupted one to the bit: weights, log
and rollouts.
"""
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from conftest import HERE, NIGHTLY, Forks
from train import checkpoints
from train import run as runtime

KILLS = 200 if NIGHTLY else 10


# ---------------------------------------------------------------- processes

class Process:
    """A stage that runs; its output goes into a file."""

    def __init__(self, forks: Forks, stage: str, *flags: object, output: Path,
                 **more: Any) -> None:
        self.forks = forks
        self.pid = forks.start(f"{stage}.py", *flags, stdout=output, **more)
        self.output = output

    def kill(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self) -> int:
        """Its exit status."""
        return self.forks.wait(self.pid)[0]

    def lines(self) -> list[str]:
        """What it printed, without progress bars."""
        if not self.output.exists():
            return []
        text = self.output.read_text().replace("\r", "\n")
        lines = [line.strip() for line in text.splitlines()]
        return [line for line in lines if line and "it/s]" not in line and "s/it]" not in line]


@pytest.fixture
def start(forks: Forks, tmp_path: Path) -> Callable[..., Process]:
    """start("sft", flags..., file_bytes=..., spoil=...) -> Process."""
    started = []

    def start(stage: str, *flags: object, **more: Any) -> Process:
        output = tmp_path / f"output_{len(started)}"
        process = Process(forks, stage, *flags, output=output, **more)
        started.append(process)
        return process
    return start


def pair(
        forks: Forks, folder: Path, stage: str, *flags: object, spoil: str = "",
) -> list[Process]:
    """Two processes of one run, as torchrun starts them; their output lies in a folder."""
    processes = []
    for environment in forks.ranks(2):
        output = folder / f"output_{environment['MASTER_PORT']}_{environment['RANK']}"
        processes.append(Process(
            forks, stage, *flags, output=output, environment=environment, spoil=spoil))
    return processes


# ---------------------------------------------------------------- runs and what they leave

def wait_for(condition: Callable[[], bool], seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def steps_logged(out: Path) -> int:
    file = out / "metrics.jsonl"
    return file.read_text().count("\n") if file.exists() else 0


def log_of(out: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what is measured, which differs from run to run."""
    lines = []
    for line in runtime.read_log(out / "metrics.jsonl"):
        measured = [k for k in line if "second" in k or k in ("peak_GiB", "time")]
        lines.append({k: v for k, v in line.items() if k not in measured})
    return lines


def assert_same_run(out: Path, straight: Path) -> None:
    """Weights, log and rollouts are equal to the bit, and nothing is left over."""
    assert (out / "latest").resolve().name == (straight / "latest").resolve().name
    weights = "latest/model.safetensors"
    assert (out / weights).read_bytes() == (straight / weights).read_bytes()
    assert log_of(out) == log_of(straight)
    rollouts = straight / "rollouts.jsonl"
    if rollouts.exists():
        assert (out / "rollouts.jsonl").read_bytes() == rollouts.read_bytes()


def assert_whole_checkpoints(out: Path) -> None:
    """Each step that has its name can be read, and is as it was written."""
    for step in out.glob("step_*"):
        for name, entry in json.loads((step / "manifest.json").read_text()).items():
            # An older step may have lost its state, but not a part of it.
            if name.startswith("state/") and not (step / "state").exists():
                continue
            assert checkpoints.manifest_entry(step / name) == entry, (step, name)
        load_file(step / "model.safetensors")
    if os.path.lexists(out / "latest"):
        assert (out / "latest" / "state").is_dir()


@pytest.fixture(scope="module")
def flags_of(
        tiny_checkpoint: Path, dior_root: Path, tmp_path_factory: pytest.TempPathFactory,
        forks: Forks) -> dict[str, list[object]]:
    """The flags of a short run of either stage; its checkpoints come every third step."""
    common = ["--data", "dior", "--root", dior_root, "--val", 1, "--every", 3, "--steps", 8,
              "--device", "cpu"]
    sft_flags = [*common, "--init", tiny_checkpoint, "--batch", 2, "--lr", 1e-3,
                 "--max-new-tokens", 4]
    taught = tmp_path_factory.mktemp("taught") / "sft"
    lesson = ["--data", "dior", "--root", dior_root, "--init", tiny_checkpoint, "--device", "cpu",
              "--out", taught, "--steps", 60, "--batch", 8, "--lr", 5e-3, "--answer-only",
              "--micro-tokens", 10 ** 6, "--val", 0, "--every", 60]
    assert Process(forks, "sft", *lesson, output=taught.parent / "output").wait() == 0
    rft_flags = [*common, "--init", taught, "--prompts", 2, "--group", 4, "--lr", 1e-4,
                 "--max-new-tokens", 40, "--micro-tokens", 10 ** 6,
                 "--reward", "iou=1", "positional=0.5", "format=0"]
    return {"sft": sft_flags, "rft": rft_flags}


@pytest.fixture(scope="module")
def straight(
        flags_of: dict[str, list[object]], forks: Forks,
        tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """straight(stage): the folder of a run without a fault."""
    folders: dict[str, Path] = {}

    def straight(stage: str) -> Path:
        if stage not in folders:
            out = tmp_path_factory.mktemp("straight") / stage
            flags = [*flags_of[stage], "--keep", 9, "--out", out]
            assert Process(forks, stage, *flags, output=Path(f"{out}.output")).wait() == 0
            folders[stage] = out
        return folders[stage]
    return straight


# ---------------------------------------------------------------- stop requests

@pytest.mark.parametrize("stage, order", [
    ("rft", signal.SIGTERM), ("sft", signal.SIGINT), ("sft", signal.SIGUSR1), ("sft", "stop")])
def test_a_stop_request_finishes_the_step_saves_and_prints_how_to_resume(
        start: Callable[..., Process], flags_of: dict, straight: Callable[[str], Path],
        tmp_path: Path, stage: str, order: int | str) -> None:
    out = tmp_path / "out"
    process = start(stage, *flags_of[stage], "--out", out)
    wait_for(lambda: steps_logged(out) >= 1)
    if order == "stop":
        (out / "stop").touch()
    else:
        process.kill(order)
    assert process.wait() == 0
    done = steps_logged(out)
    assert 1 <= done < 8, "the machine is too slow to stop the run half way"
    assert (out / "latest").resolve().name == f"step_{done:06d}"
    assert process.lines()[-1] == (
        f"stopped after step {done} of 8; resume with: python {stage}.py --out {out} --resume")
    assert_whole_checkpoints(out)
    assert not (out / "stop").exists() and not list(out.glob(".*"))
    assert start(stage, "--out", out, "--resume").wait() == 0
    assert_same_run(out, straight(stage))


def test_a_signal_to_all_processes_of_a_job_leaves_the_ones_that_prepare_images_alone(
        start: Callable[..., Process], flags_of: dict, straight: Callable[[str], Path],
        tmp_path: Path) -> None:
    """As a scheduler sends it."""
    out = tmp_path / "out"
    process = start("sft", *flags_of["sft"], "--out", out)
    wait_for(lambda: steps_logged(out) >= 1)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait() == 0 and process.lines()[-1].startswith("stopped after step ")
    assert start("sft", "--out", out, "--resume").wait() == 0
    assert_same_run(out, straight("sft"))


def when(function: str) -> str:
    """Code that requests a stop while the run is in this function."""
    place, _, name = function.rpartition(".")
    return (f"import eval\nbefore = {function}\n"
            f"def requested(*args):\n    runtime.STOP_REQUESTED.set()\n    return before(*args)\n"
            f"{place}.{name} = requested\n")


@pytest.mark.parametrize("function, done", [
    ("stage.canary", 0), ("eval.validate", 3), ("checkpoints.save", 3)])
def test_a_stop_request_works_wherever_it_comes(
        start: Callable[..., Process], flags_of: dict, straight: Callable[[str], Path],
        tmp_path: Path, function: str, done: int) -> None:
    out = tmp_path / "out"
    command = ("rft", *flags_of["rft"], "--out", out)
    process = start(*command, spoil=when(function))
    assert process.wait() == 0
    assert steps_logged(out) == done
    assert_whole_checkpoints(out)
    if done:
        # The step that was due is saved once.
        assert [p.name for p in out.glob("step_*")] == [f"step_{done:06d}"]
        assert f"stopped after step {done} of 8" in process.lines()[-1]
        assert start("rft", "--out", out, "--resume").wait() == 0
    else:
        assert process.lines()[-1].startswith("stopped before the first step")
        assert not any(out.iterdir())
        assert start(*command).wait() == 0
    assert_same_run(out, straight("rft"))


def test_a_file_stop_from_before_a_resume_works_once(
        start: Callable[..., Process], straight: Callable[[str], Path], tmp_path: Path) -> None:
    out = interrupted(straight("sft"), tmp_path / "out", 3)
    (out / "stop").touch()
    process = start("sft", "--out", out, "--resume")
    assert process.wait() == 0 and "stopped after step 3 of 8" in process.lines()[-1]
    assert start("sft", "--out", out, "--resume").wait() == 0
    assert_same_run(out, straight("sft"))


def test_a_second_sigint_leaves_at_once_even_from_within_a_long_call(
        start: Callable[..., Process], flags_of: dict, straight: Callable[[str], Path],
        tmp_path: Path) -> None:
    out = interrupted(straight("sft"), tmp_path / "out", 3)
    process = start("sft", "--out", out, "--resume", spoil=(
        "import time\ndef step(*args):\n    print('\\ndeep', flush=True)\n    time.sleep(300)\n"
        "stage.train_step = step\n"))
    wait_for(lambda: "deep" in process.lines())
    process.kill(signal.SIGINT)
    time.sleep(0.5)
    began = time.monotonic()
    process.kill(signal.SIGINT)
    assert process.wait() == 130 and time.monotonic() - began < 10
    assert process.lines()[-1].startswith("stopped at once")
    assert "Traceback" not in process.output.read_text()
    assert start("sft", "--out", out, "--resume").wait() == 0
    assert_same_run(out, straight("sft"))


# ---------------------------------------------------------------- kills

def test_kills_at_random_moments_lose_nothing(
        start: Callable[..., Process], flags_of: dict, tmp_path: Path) -> None:
    """One run after another is killed and resumed, until it ends; a save comes every step."""
    flags = [*flags_of["rft"], "--every", 1]
    reference = tmp_path / "reference"
    began = time.monotonic()
    assert start("rft", *flags, "--out", reference).wait() == 0
    lasted = time.monotonic() - began
    moments = random.Random(0)
    out = tmp_path / "out"
    kills = 0
    status = 0
    while kills < KILLS or status != 0:
        resume = ["--resume"] if os.path.lexists(out / "latest") else flags
        if resume is flags:
            shutil.rmtree(out, ignore_errors=True)
        process = start("rft", *resume, "--out", out)
        if kills < KILLS:
            time.sleep(moments.uniform(0, lasted))
            process.kill(signal.SIGKILL)
        status = process.wait()
        assert status in (0, -signal.SIGKILL), process.lines()[-5:]
        assert_whole_checkpoints(out)
        if status == 0:
            assert_same_run(out, reference)
            shutil.rmtree(out)
        else:
            kills += 1


# The call of a save, counted from its begin, in which the process dies.
@pytest.mark.parametrize("function, call", [
    ("os.fsync", 8), ("os.replace", 1), ("os.replace", 2), ("os.replace", 4),
    ("shutil.rmtree", 1)])
def test_a_kill_at_each_turn_of_a_save_loses_nothing(
        start: Callable[..., Process], straight: Callable[[str], Path], tmp_path: Path,
        function: str, call: int) -> None:
    out = interrupted(straight("sft"), tmp_path / "out", 3)
    process = start("sft", "--out", out, "--resume", "--keep", 1, spoil=(
        "import os, shutil, signal\ncalls = []\nsave = checkpoints.save\n"
        "def dying(*args, **more):\n"
        "    calls.append(args)\n"
        f"    if len(calls) == {call}:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return before(*args, **more)\n"
        "def save_and_die(*args):\n"
        "    global before\n"
        f"    before = {function}\n"
        f"    {function} = dying\n"
        "    return save(*args)\n"
        "checkpoints.save = save_and_die\n"))
    assert process.wait() == -signal.SIGKILL
    assert_whole_checkpoints(out)
    assert (out / "latest").resolve().name in ("step_000003", "step_000006")
    assert start("sft", "--out", out, "--resume").wait() == 0
    assert_same_run(out, straight("sft"))
    assert not list(out.glob(".*"))


# ---------------------------------------------------------------- disks and files

def interrupted(straight: Path, out: Path, step: int) -> Path:
    """A copy of a run as if it had been killed some steps after a checkpoint."""
    shutil.copytree(straight, out, symlinks=True)
    for folder in out.glob("step_*"):
        if int(folder.name.removeprefix("step_")) > step:
            shutil.rmtree(folder)
    checkpoints.point(out / "latest", f"step_{step:06d}")
    return out


# Of a file's bytes: less than the weights have, and less than the training state has.
@pytest.mark.parametrize("file", ["model.safetensors", "state/rank_00000_of_00001.safetensors"])
def test_a_disk_that_fills_up_during_a_save_keeps_the_last_checkpoint_and_prints_a_line(
        start: Callable[..., Process], straight: Callable[[str], Path], tmp_path: Path,
        file: str) -> None:
    out = interrupted(straight("sft"), tmp_path / "out", 3)
    limit = (out / "latest" / file).stat().st_size - 1
    process = start("sft", "--out", out, "--resume", file_bytes=limit)
    assert process.wait() == 2
    said = process.lines()
    assert sum("is not saved: File too large" in line for line in said) == 3
    assert said[-1] == (f"sft.py: step 8 could not be saved; free some space in {out}, then python "
                        f"sft.py --out {out} --resume")
    assert "Traceback" not in process.output.read_text()
    assert_whole_checkpoints(out)
    assert (out / "latest").resolve().name == "step_000003" and not list(out.glob(".*"))
    assert start("sft", "--out", out, "--resume").wait() == 0
    assert_same_run(out, straight("sft"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 MiB, where one may be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no file system may be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


# With the look at the free space before a write, and without.
@pytest.mark.parametrize("spoil, words", [
    ("", "GiB are needed and 0.00 free"),
    ("import shutil, types\n"
     "shutil.disk_usage = lambda path: types.SimpleNamespace(free=2 ** 60)",
     "No space left on device")])
def test_a_small_disk_that_fills_up(
        start: Callable[..., Process], straight: Callable[[str], Path], small_disk: Path,
        spoil: str, words: str) -> None:
    out = interrupted(straight("sft"), small_disk / "out", 3)
    filler = small_disk / "filler"
    filler.write_bytes(b"\0" * (shutil.disk_usage(small_disk).free - 2 ** 19))
    process = start("sft", "--out", out, "--resume", spoil=spoil)
    assert process.wait() == 2
    assert any("step 6 is not saved" in line and words in line for line in process.lines())
    assert "could not be saved; free some space" in process.lines()[-1]
    assert_whole_checkpoints(out)
    filler.unlink()
    assert start("sft", "--out", out, "--resume").wait() == 0
    assert_same_run(out, straight("sft"))


def test_a_log_that_cant_be_written_is_one_line(capfd: pytest.CaptureFixture) -> None:
    def stage() -> None:
        runtime.append_line(Path("/dev/full"), {"step": 1})
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    with pytest.raises(SystemExit) as leaving:
        runtime.launch(stage)
    assert leaving.value.code == 2
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 1 and "No space left on device" in said[0] and "--resume" in said[0]


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-7])


def flip(file: Path) -> None:
    """A bit in the middle."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("damage, name", [
    (cut, "state/rank_00000_of_00001.safetensors"),
    (flip, "state/rank_00000_of_00001.safetensors"),
    (flip, "model.safetensors"), (flip, "run.json"), (cut, "manifest.json")])
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_it_goes_on(
        start: Callable[..., Process], straight: Callable[[str], Path], tmp_path: Path,
        damage: Callable[[Path], None], name: str) -> None:
    out = interrupted(straight("rft"), tmp_path / "out", 6)
    damage(out / "step_000006" / name)
    process = start("rft", "--out", out, "--resume")
    assert process.wait() == 0
    warnings = [line for line in process.lines() if line.startswith("warning: ")]
    # Its eight steps are warned about, too.
    warnings = [line for line in warnings if "steps are too few" not in line]
    assert len(warnings) == 1 and f"step_000006/{name}" in warnings[0]
    assert warnings[0].endswith("continuing from step_000003")
    assert_same_run(out, straight("rft"))
    assert_whole_checkpoints(out)


# ---------------------------------------------------------------- two processes

TWO = ["--steps", 24, "--every", 8]


@pytest.fixture(scope="module")
def straight_two(
        forks: Forks, flags_of: dict, tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A run of sft.py by two processes without a fault."""
    out = tmp_path_factory.mktemp("straight") / "two"
    processes = pair(forks, out.parent, "sft", *flags_of["sft"], *TWO, "--out", out)
    assert [process.wait() for process in processes] == [0, 0]
    return out


def resume_by_two(forks: Forks, out: Path) -> None:
    processes = pair(forks, out.parent, "sft", "--out", out, "--resume")
    assert [process.wait() for process in processes] == [0, 0]


def test_one_of_two_is_told_and_both_stop_behind_the_same_step(
        forks: Forks, flags_of: dict, straight_two: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    processes = pair(forks, tmp_path, "sft", *flags_of["sft"], *TWO, "--out", out)
    wait_for(lambda: steps_logged(out) >= 1)
    processes[1].kill(signal.SIGUSR1)
    assert [process.wait() for process in processes] == [0, 0]
    assert "stopped after step" in processes[0].lines()[-1]
    assert not any("stopped" in line for line in processes[1].lines())
    assert_whole_checkpoints(out)
    resume_by_two(forks, out)
    assert_same_run(out, straight_two)


@pytest.mark.parametrize("error, status, words", [
    ("base.DataError", 2, ["sft.py: scene.jpg: unreadable"]),
    ("ValueError", 1, ["ValueError: scene.jpg: unreadable"])])
def test_what_ended_one_of_two_is_said_once_and_by_none_but_it(
        forks: Forks, flags_of: dict, tmp_path: Path, error: str, status: int,
        words: list[str]) -> None:
    spoil = ("import os\nmake = stage.make_example\n"
             "def broken(record, *rest):\n"
             "    if os.environ['RANK'] == '1' and os.path.exists(GO):\n"
             f"        raise {error}('scene.jpg: unreadable')\n"
             "    return make(record, *rest)\n"
             "stage.make_example = broken\n").replace("GO", repr(str(tmp_path / "go")))
    out = tmp_path / "out"
    processes = pair(forks, tmp_path, "sft", *flags_of["sft"], *TWO, "--out", out, spoil=spoil)
    wait_for(lambda: steps_logged(out) >= 2)
    (tmp_path / "go").touch()
    began = time.monotonic()
    assert [process.wait() for process in processes] == [1, status]
    assert time.monotonic() - began < 60
    texts = [process.output.read_text() for process in processes]
    assert "Traceback" not in texts[0] and "gloo" not in "".join(texts)
    assert "a process of this run has ended" not in texts[0]
    assert ("Traceback" in texts[1]) == (status == 1)
    assert processes[1].lines()[-1:] == words and "unreadable" not in texts[0]


@pytest.mark.parametrize("killed", [0, 1])
def test_when_one_of_two_is_killed_the_other_ends_and_says_one_line(
        forks: Forks, flags_of: dict, straight_two: Path, tmp_path: Path, killed: int,
) -> None:
    out = tmp_path / "out"
    processes = pair(forks, tmp_path, "sft", *flags_of["sft"], *TWO, "--out", out)
    wait_for(lambda: steps_logged(out) >= 9)
    processes[killed].kill(signal.SIGKILL)
    began = time.monotonic()
    other = processes[1 - killed]
    # What torchrun does to the rest.
    other.kill(signal.SIGTERM)
    assert processes[killed].wait() == -signal.SIGKILL and other.wait() == 1
    assert time.monotonic() - began < 60
    text = other.output.read_text()
    assert other.lines()[-1].startswith("a process of this run has ended")
    assert "Traceback" not in text
    assert_whole_checkpoints(out)
    resume_by_two(forks, out)
    assert_same_run(out, straight_two)


@pytest.mark.parametrize("rank, place", [("0", "model"), ("1", "train.checkpoints")])
def test_a_disk_that_is_full_for_one_of_two_keeps_none_waiting(
        forks: Forks, straight_two: Path, tmp_path: Path, rank: str, place: str) -> None:
    """The first process fails at the weights, which both gather; the other at its state."""
    out = interrupted(straight_two, tmp_path / "out", 16)
    spoil = ("import errno, os, sys\n"
             "def full(file, shapes, dtype, tensors, metadata):\n"
             "    next(tensors)\n"
             "    raise OSError(errno.ENOSPC, 'No space left on device')\n"
             f"if os.environ['RANK'] == '{rank}':\n"
             f"    sys.modules[{place!r}].write_tensors = full\n")
    processes = pair(forks, tmp_path, "sft", "--out", out, "--resume", spoil=spoil)
    assert [process.wait() for process in processes] == [2, 2]
    said = processes[0].lines() + processes[1].lines()
    # When it was due, and once more at the end.
    assert sum("step 24 is not saved: No space left" in line for line in said) == 2
    assert sum("step 24 could not be saved; free some space" in line for line in said) == 1
    assert_whole_checkpoints(out)
    assert (out / "latest").resolve().name == "step_000016" and not list(out.glob(".*"))
    resume_by_two(forks, out)
    assert_same_run(out, straight_two)


def torchrun(*command: object, output: Path) -> subprocess.Popen:
    """The real launcher with two processes."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
                   "PYTHONPATH": str(HERE)}
    with open(output, "w") as stream:
        return subprocess.Popen(
            [*launcher, *map(str, command)], stdout=stream, stderr=stream, env=environment)


def process_of_rank(launcher: subprocess.Popen, rank: int) -> int:
    """The id of one of torchrun's processes."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    for pid in map(int, children):
        if f"\0RANK={rank}\0" in Path(f"/proc/{pid}/environ").read_text():
            return pid
    raise AssertionError(children)


def test_under_torchrun_a_stop_request_is_in_time_and_a_kill_ends_all(
        forks: Forks, flags_of: dict, straight_two: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    output = tmp_path / "output"
    launcher = torchrun(
        HERE / "sft.py", *flags_of["sft"], *TWO, "--out", out, output=output)
    wait_for(lambda: steps_logged(out) >= 1)
    launcher.send_signal(signal.SIGTERM)
    # Its own status is an error: it got the signal as well, and ended its processes.
    assert launcher.wait(60) != 0
    said = output.read_text()
    resume = f"torchrun --nproc_per_node 2 {HERE / 'sft.py'} --out {out} --resume"
    assert f"resume with: {resume}" in said
    assert_whole_checkpoints(out)
    done = steps_logged(out)
    assert (out / "latest").resolve().name == f"step_{done:06d}" and done < 24

    launcher = torchrun(HERE / "sft.py", "--out", out, "--resume", output=output)
    wait_for(lambda: steps_logged(out) > done)
    os.kill(process_of_rank(launcher, 1), signal.SIGKILL)
    assert launcher.wait(60) != 0
    said = output.read_text()
    # One is torchrun's own.
    assert said.count("Traceback") == 1 and said.count("a process of this run has ended") <= 1
    assert_whole_checkpoints(out)
    resume_by_two(forks, out)
    assert_same_run(out, straight_two)


def test_under_torchrun_a_mistake_is_one_line_without_a_traceback_of_ours(
        flags_of: dict, tmp_path: Path) -> None:
    script = tmp_path / "broken.py"
    script.write_text(
        "import os, sft\nfrom readers import base\nfrom train import run as runtime\n"
        "def broken(*args):\n"
        "    raise base.DataError('scene.jpg: unreadable')\n"
        "if os.environ['RANK'] == '1':\n"
        "    sft.make_example = broken\n"
        "runtime.launch(sft.main, catch_signals=True)\n")
    output = tmp_path / "output"
    launcher = torchrun(
        script, *flags_of["sft"], "--out", tmp_path / "out", output=output)
    assert launcher.wait(120) != 0
    said = output.read_text()
    assert said.count("broken.py: scene.jpg: unreadable") == 1 and said.count("Traceback") == 1
    assert "exitcode  : 2" in said
