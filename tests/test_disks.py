"""File systems without links, fsync, locks or append; runs that were copied or whose base moved;
terminals that only show ASCII."""
import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

import eval as evaluation
from conftest import Forks, Run
from qwen.hub import newest_step
from readers.base import DataError
from tools import teacher
from train import checkpoints, dist
from train import run as runtime

NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
# Code that replaces a function of os, run before a script. Folders have no fsync, and no link is
# made.
POOR_DISK = """
import errno, os, stat
fsync = os.fsync
def fsync_files(descriptor):
    if stat.S_ISDIR(os.fstat(descriptor).st_mode):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    fsync(descriptor)
def no_links(*args, **more):
    raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
os.fsync, os.symlink = fsync_files, no_links
"""
NO_APPEND = """
import builtins, errno, os
before = builtins.open
def no_append(file, mode="r", *args, **more):
    if "a" in mode and os.path.exists(file):
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
    return before(file, mode, *args, **more)
builtins.open = no_append
"""
NO_FOLDER_RENAME = """
import errno, os
before = os.replace
def only_files(a, b):
    if os.path.isdir(a) and not os.path.islink(a):
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
    return before(a, b)
os.replace = only_files
"""


def failing(number: int) -> Callable[..., None]:
    def fail(*args: object, **more: object) -> None:
        raise OSError(number, os.strerror(number))
    return fail


@pytest.fixture
def sft(forks: Forks, tiny_checkpoint: Path, dior_root: Path,
        tmp_path: Path) -> Callable[..., tuple[int, str]]:
    """sft(out, flags..., spoil=...) -> exit status and output. Without --resume it is a run of two
    steps, each with a checkpoint."""
    def sft(out: Path, *flags: object, spoil: str = "") -> tuple[int, str]:
        output = tmp_path / "output.txt"
        output.unlink(missing_ok=True)
        new = ["--data", "dior", "--root", dior_root, "--init", tiny_checkpoint, "--steps", 2,
               "--batch", 2, "--val", 1, "--every", 1, "--max-new-tokens", 4, "--device", "cpu"]
        if "--resume" in flags:
            new = []
        pid = forks.start("sft.py", *new, "--out", out, *flags, stdout=output, spoil=spoil)
        return forks.wait(pid)[0], output.read_text(errors="replace")
    return sft


def steps_of(out: Path) -> list[int]:
    return [line["step"] for line in runtime.read_log(out / "metrics.jsonl")]


# ---------------------------------------------------------------- file systems

@pytest.mark.parametrize("number", NO_LINKS)
def test_without_links_a_file_names_the_step_and_all_readers_agree(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    for step in ("step_000002", "step_000010"):
        (tmp_path / step).mkdir()
        (tmp_path / step / "config.json").write_text("{}")
    monkeypatch.setattr(os, "symlink", failing(number))
    for target in ("step_000010", "step_000002"):
        checkpoints.point(tmp_path / "latest", target)
        assert (tmp_path / "latest").read_text() == f"{target}\n"
        assert newest_step(tmp_path) == newest_step(tmp_path / "latest") == tmp_path / target
        assert checkpoints.steps_so_far(tmp_path)[0] == tmp_path / target
        for path in (tmp_path, tmp_path / "latest"):
            assert evaluation.find_stages(path)[0].folder == tmp_path / target
    # The later step was left, as behind a link.
    assert checkpoints.steps_so_far(tmp_path) == [tmp_path / "step_000002"]
    monkeypatch.undo()
    checkpoints.point(tmp_path / "latest", "step_000010")
    assert os.readlink(tmp_path / "latest") == "step_000010"


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EPERM, errno.EBADF])
def test_an_fsync_that_is_not_there_is_lived_with_and_a_lost_write_is_not(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    monkeypatch.setattr(os, "fsync", failing(number))
    checkpoints.sync(tmp_path)
    checkpoints.try_disk(tmp_path)
    assert not list(tmp_path.iterdir())
    for lost in (errno.EIO, errno.ENOSPC):
        monkeypatch.setattr(os, "fsync", failing(lost))
        with pytest.raises(OSError, match=os.strerror(lost)):
            checkpoints.sync(tmp_path)


def test_a_run_on_a_poor_disk_saves_resumes_and_is_scored(
        sft: Callable[..., tuple[int, str]], run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    status, said = sft(out, spoil=POOR_DISK)
    assert status == 0, said
    assert (out / "latest").read_text() == "step_000002\n" and not (out / "latest").is_symlink()
    status, said = sft(out, "--resume", "--steps", 3, spoil=POOR_DISK)
    assert status == 0, said
    assert steps_of(out) == [1, 2, 3] and (out / "best").is_file()
    done = run("eval.py", out, "--device", "cpu", "--max-new-tokens", 4)
    assert done.returncode == 0, done.stderr
    [row] = json.loads((out / "eval" / "eval.json").read_text())["rows"]
    assert row["checkpoint"] == str(out / "step_000003")


@pytest.mark.parametrize("spoil, words", [
    (NO_APPEND, "nothing can be appended to a file in"),
    (NO_FOLDER_RENAME, "no checkpoint can be saved in")])
def test_what_a_run_needs_is_tried_before_step_1(
        sft: Callable[..., tuple[int, str]], tmp_path: Path, spoil: str, words: str) -> None:
    status, said = sft(tmp_path / "out", spoil=spoil)
    [line] = [line for line in said.splitlines() if line.startswith("sft.py: ")]
    assert status == 2 and words in line and "--out" in line and "Traceback" not in said
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_lock_that_is_not_there_is_no_other_process(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture,
        number: int) -> None:
    out = tmp_path / "cot.jsonl"
    with monkeypatch.context() as patched:
        patched.setattr(teacher.fcntl, "flock", failing(number))
        with teacher.open_explanations(out) as (file, finished):
            file.write(b'{"id": "1", "think": "a"}\n')
        assert finished == {}
    printed = "".join(capsys.readouterr())
    assert printed.count("\n") == 1 and "can't be locked" in printed and "another" not in printed
    with teacher.open_explanations(out) as (_, finished):
        with pytest.raises(DataError, match="another process"), teacher.open_explanations(out):
            pass
    assert list(finished) == ["1"]


# ---------------------------------------------------------------- copies

def without_latest(out: Path) -> None:
    (out / "latest").unlink()


def dangling(out: Path) -> None:
    checkpoints.point(out / "latest", "step_000009")


def as_a_folder(out: Path) -> None:
    """As `cp -rL` makes it."""
    step = (out / "latest").resolve()
    (out / "latest").unlink()
    shutil.copytree(step, out / "latest")


def only_latest(out: Path) -> None:
    as_a_folder(out)
    for step in out.glob("step_*"):
        shutil.rmtree(step)


@pytest.mark.parametrize("copy", [without_latest, dangling, as_a_folder, only_latest])
def test_a_copied_run_goes_on_from_its_newest_whole_step(
        sft: Callable[..., tuple[int, str]], tmp_path: Path,
        copy: Callable[[Path], None]) -> None:
    out = tmp_path / "out"
    status, said = sft(out)
    assert status == 0, said
    copy(out)
    newest = out / ("latest" if copy is only_latest else "step_000002")
    assert newest_step(out) == newest
    assert evaluation.find_stages(out)[0].folder == newest
    # A new run is not begun there, and nobody is advised to remove what is there.
    status, said = sft(out)
    assert status == 2 and "--resume" in said and "remove" not in said, said
    status, said = sft(out, "--resume", "--steps", 3)
    assert status == 0, said
    assert steps_of(out) == [1, 2, 3] and os.readlink(out / "latest") == "step_000003"


def test_a_copy_without_latest_whose_newest_step_is_damaged(
        sft: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    out = tmp_path / "out"
    sft(out)
    without_latest(out)
    (out / "step_000002" / "model.safetensors").write_bytes(b"cut")
    status, said = sft(out, "--resume")
    assert status == 0 and "continuing from step_000001" in said, said
    assert steps_of(out) == [1, 2] and newest_step(out) == out / "step_000002"


def test_a_folder_of_stages_is_not_to_be_removed(tmp_path: Path, capsys: pytest.CaptureFixture,
                                                 ) -> None:
    (tmp_path / "sft" / "step_000001").mkdir(parents=True)
    with pytest.raises(SystemExit):
        runtime.Run(SimpleNamespace(out=tmp_path, resume=False), "rft", [])
    assert "remove" not in capsys.readouterr().err


# ---------------------------------------------------------------- what a run began with

def test_another_cot_file_is_refused_and_a_moved_one_is_not(
        sft: Callable[..., tuple[int, str]], dior_root: Path, tmp_path: Path) -> None:
    import data
    cot = tmp_path / "cot.jsonl"
    lines = [{"id": record.id, "think": "it is red."} for record in data.load(
        "dior", dior_root, "sft")]
    cot.write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = tmp_path / "out"
    status, said = sft(out, "--cot", cot)
    assert status == 0, said
    before = cot.read_text()
    cot.write_text(before.replace("red", "blue", 1))
    status, said = sft(out, "--resume", "--steps", 3)
    [line] = [line for line in said.splitlines() if line.startswith("sft.py: ")]
    assert status == 2 and f"--cot {cot} has changed" in line
    moved = tmp_path / "moved.jsonl"
    moved.write_text(before)
    cot.unlink()
    status, said = sft(out, "--resume", "--steps", 3, "--cot", moved)
    assert status == 0 and steps_of(out) == [1, 2, 3], said


def test_a_base_that_has_moved_is_named_and_another_is_refused(
        sft: Callable[..., tuple[int, str]], tiny_checkpoint: Path, tmp_path: Path) -> None:
    base, moved, out = tmp_path / "base", tmp_path / "moved", tmp_path / "out"
    shutil.copytree(tiny_checkpoint, base)
    status, said = sft(out, "--init", base, "--lora", 2)
    assert status == 0, said
    base.rename(moved)
    status, said = sft(out, "--resume", "--steps", 3)
    assert status == 2 and "--init" in said.splitlines()[-1] and "moved" in said, said
    status, said = sft(out, "--resume", "--steps", 3, "--init", moved)
    assert status == 0 and steps_of(out) == [1, 2, 3], said
    weights = bytearray((moved / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (moved / "model.safetensors").write_bytes(weights)
    status, said = sft(out, "--resume", "--steps", 4)
    assert status == 2 and f"--init {moved} has changed" in said, said


def test_what_the_message_says_to_edit_is_no_damage(
        sft: Callable[..., tuple[int, str]], run: Run, tiny_checkpoint: Path, tmp_path: Path,
) -> None:
    base, moved, out = tmp_path / "base", tmp_path / "moved", tmp_path / "out"
    shutil.copytree(tiny_checkpoint, base)
    assert sft(out, "--init", base, "--lora", 2)[0] == 0
    base.rename(moved)
    done = run("eval.py", out, "--device", "cpu", "--max-new-tokens", 4)
    assert done.returncode == 2 and "set base_model_name_or_path in that file" in done.stderr
    file = out / "step_000002" / "adapter_config.json"
    config = json.loads(file.read_text()) | {"base_model_name_or_path": str(moved)}
    file.write_text(json.dumps(config))
    assert checkpoints.damage(out / "step_000002") is None
    done = run("eval.py", out, "--device", "cpu", "--max-new-tokens", 4)
    assert done.returncode == 0, done.stderr
    status, said = sft(out, "--resume", "--steps", 3, "--init", moved)
    assert status == 0 and "continuing from" not in said and steps_of(out) == [1, 2, 3], said


# ---------------------------------------------------------------- terminals

@pytest.fixture
def written_abroad(tmp_path: Path) -> Path:
    """A jsonl data set in a folder, with names and texts beyond ASCII."""
    root = tmp_path / "sc\u00e8nes \u8239"
    root.mkdir()
    rows = []
    for i in range(6):
        name = f"b\u00e2teau {i} \u8239.png"
        Image.new("RGB", (50, 50), (9 * i, 0, 0)).save(root / name)
        rows.append({"id": f"\u8239{i}", "image": name, "text": f"the \u8239 {i} \ud800",
                     "box": [1, 2, 30, 40]})
    rows.append({"id": "gone", "image": "\u6d77.png", "text": "x", "box": [1, 2, 3, 4]})
    for split in ("train", "val", "test"):
        (root / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


@pytest.mark.parametrize("locale", [
    {"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C"}, {"LC_ALL": "C", "PYTHONUTF8": "0"}])
def test_every_script_prints_on_a_terminal_that_only_shows_ascii(
        run: Run, written_abroad: Path, tiny_checkpoint: Path, tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch, locale: dict[str, str]) -> None:
    for name, value in locale.items():
        monkeypatch.setenv(name, value)
    data = ("--data", "jsonl", "--root", written_abroad)
    short = ("--max-new-tokens", 4, "--device", "cpu")
    train = (*data, *short, "--init", tiny_checkpoint, "--steps", 1, "--val", 1)
    ckpt = tmp_path / "\u8239"
    for script, *flags in (
            ("data.py", "jsonl", "--root", written_abroad, "--out", ckpt / "check.png"),
            ("cot.py", "jsonl", "--root", written_abroad, "--out", ckpt / "cot.png"),
            ("sft.py", *train, "--batch", 2, "--out", ckpt / "s\u00e8t"),
            ("sft.py", "--resume", "--steps", 2, "--out", ckpt / "s\u00e8t"),
            ("rft.py", *train, "--prompts", 2, "--group", 2, "--out", ckpt / "r\u00e8t"),
            ("eval.py", ckpt, *data, *short, "--split", "test"),
            ("eval.py", "--predictions", ckpt / "eval" / "predictions_s\u00e8t.jsonl", *data)):
        ckpt.mkdir(exist_ok=True)
        done = run(script, *flags)
        assert "UnicodeEncodeError" not in done.stderr, (script, done.stderr)
        assert done.returncode == 0, (script, done.stdout, done.stderr)


def test_launch_replaces_what_a_terminal_cannot_show(
        forks: Forks, tmp_path: Path) -> None:
    """So do all scripts that it starts: those of study/ and tools/ too."""
    script = tmp_path / "script.py"
    script.write_text(f"import sys\nsys.path[:0] = [{str(dist.__file__)[:-14]!r}]\n"
                      "from train.run import launch\n"
                      "launch(lambda: print('\\u00b1 \\u8239 \\udcc3'))\n")
    output = tmp_path / "output"
    pid = forks.start(script, stdout=output, environment={"PYTHONIOENCODING": "ascii"})
    assert forks.wait(pid) == [0]
    assert output.read_text() == "\\xb1 \\u8239 \\udcc3\n"
