"""runtime.py: flags, schedule, data order and log by hand, checkpoints as files.

Processes and resume: test_sft.py, test_rft.py.
"""
import argparse
import doctest
import json
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from model import Config, QwenVL
from qwen.hub import CheckpointError
from qwen.processor import Processor
from readers import base
from train import checkpoints, dist, flags
from train import run as runtime
from train.ahead import ahead


def test_examples_in_docstrings_hold() -> None:
    result = doctest.testmod(dist)
    assert result.attempted and not result.failed


# ---------------------------------------------------------------- flags and schedule

def mistake(capsys: pytest.CaptureFixture, call: Callable[..., Any], *args: Any) -> str:
    """The one line that a user's mistake is answered with."""
    with pytest.raises(SystemExit) as leaving:
        call(*args)
    lines = capsys.readouterr().err.strip().splitlines()
    assert leaving.value.code == 2 and len(lines) == 1
    return lines[0]


@pytest.mark.parametrize("kind, good, bad", [
    (flags.positive, ["1", "7"], ["0", "-1", "1.5", "nan", "many"]),
    (flags.natural, ["0", "7"], ["-1", "inf", ""]),
    (flags.natural, ["0", "2147483647"], ["-1", "2147483648", "9999999999999999"]),
    (flags.moderate, ["-1", "0", "1e-6"], ["nan", "inf", "-inf", "x"]),
    (flags.above_zero, ["1e-6", "2"], ["0", "-1", "nan", "inf"]),
    (flags.not_negative, ["0", "0.2"], ["-0.1", "nan", "inf"])])
def test_numbers_that_are_out_of_range_are_no_flags(
        kind: Callable[[str], Any], good: list[str], bad: list[str]) -> None:
    assert [kind(text) for text in good] == [float(text) for text in good]
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError, match=f"^{text} is not a "):
            kind(text)


def test_learning_rate_by_hand() -> None:
    # 100 steps: warm-up over 3, then a cosine from 1 to 0.1
    rates = [round(dist.lr_at(step, 100, 1.0), 4) for step in (0, 1, 2, 3)]
    assert rates == [0.3333, 0.6667, 1.0, 1.0]
    assert math.isclose(dist.lr_at(3 + 97 / 2, 100, 1.0), 0.55)
    assert math.isclose(dist.lr_at(99, 100, 1.0), 0.1, abs_tol=1e-3)
    assert dist.lr_at(0, 1, 1.0) == 1.0
    assert [dist.lr_at(step, 100, 1.0, 10) for step in (0, 4, 9, 10)] == [0.1, 0.5, 1.0, 1.0]
    assert dist.lr_at(0, 100, 1.0, 0) == 1.0


# ---------------------------------------------------------------- the device

@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """Plays a machine: its GPU files, its driver's file, whether torch can use CUDA."""
    def play(gpus: int = 0, driver: str = "", usable: bool = False) -> None:
        for i in range(gpus):
            (tmp_path / f"nvidia{i}").touch()
        if driver:
            (tmp_path / "version").write_text(driver)
        monkeypatch.setattr(dist, "GPU_FILES", tmp_path)
        monkeypatch.setattr(dist, "DRIVER_FILE", tmp_path / "version")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: usable)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return play


def test_the_device_is_cuda_where_torch_can_use_it(machine: Callable[..., None]) -> None:
    machine(gpus=1, usable=True)
    assert dist.choose_device(None) == dist.choose_device("cuda") == "cuda"
    assert dist.choose_device("cpu") == "cpu"


def test_a_machine_without_a_gpu_computes_on_the_cpu(
        machine: Callable[..., None], capsys: pytest.CaptureFixture) -> None:
    machine()
    assert dist.choose_device(None) == "cpu"
    assert "sees no CUDA device; use" in mistake(capsys, dist.choose_device, "cuda")


def test_a_gpu_that_torch_cant_use_is_not_left_for_the_cpu_unasked(
        machine: Callable[..., None], capsys: pytest.CaptureFixture,
        monkeypatch: pytest.MonkeyPatch) -> None:
    machine(gpus=2, driver="NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat")
    for asked in (None, "cuda"):
        line = mistake(capsys, dist.choose_device, asked)
        assert "NVIDIA driver 535.104.05" in line and torch.__version__ in line
        assert "--device cpu" in line
    assert dist.choose_device("cpu") == "cpu"
    # Whoever hides the GPUs has asked for the CPU.
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert dist.choose_device(None) == "cpu"


# ---------------------------------------------------------------- data order, micro-batches, log

def test_a_budget_counts_the_patches_that_a_trained_tower_keeps(tiny_checkpoint: Path) -> None:
    model = QwenVL.from_pretrained(tiny_checkpoint, torch.float32)
    processor = Processor.from_pretrained(tiny_checkpoint)
    prompt = processor(Image.new("RGB", (112, 84)), "the ship")     # 8 x 6 patches
    tokens = len(prompt.input_ids) + 100
    assert dist.memory_tokens(model, prompt, 100) == tokens + round(0.43 * 48)
    model.visual.requires_grad_(False)
    assert dist.memory_tokens(model, prompt, 100) == tokens


def test_every_epoch_has_each_record_once_in_an_order_of_its_own() -> None:
    records = list(range(10))
    steps = [runtime.record_at(records, place, seed=0) for place in range(20)]
    flat = steps                                                     # two epochs
    assert sorted(flat[:10]) == sorted(flat[10:]) == records
    assert flat[:10] != flat[10:]
    again = [runtime.record_at(records, place, seed=1) for place in range(20)]
    assert again != steps


def test_micro_batches_keep_within_the_budget_and_leave_nothing_out() -> None:
    tokens = [5, 1, 9, 2, 2, 30, 4, 4]
    for budget in (1, 9, 12, 40, 100):
        slices = dist.micro_batches(tokens, budget)
        places = []
        for s in slices:
            places += range(s.start, s.stop)
            assert sum(tokens[s]) <= budget or s.stop - s.start == 1
        assert places == list(range(len(tokens)))
    assert len(dist.micro_batches(tokens, 1)) == 8
    assert len(dist.micro_batches(tokens, 100)) == 1


def test_steps_made_ahead_are_those_made_here_and_an_error_comes_at_its_step() -> None:
    def make(step: int) -> int:
        if step == 7:
            raise base.DataError("scene.jpg: unreadable")
        return 3 * step
    assert list(ahead(make, range(2, 7))) == [6, 9, 12, 15, 18]
    steps = ahead(make, range(5, 9))
    assert [next(steps), next(steps)] == [15, 18]
    with pytest.raises(base.DataError, match=r"^scene\.jpg: unreadable$"):
        next(steps)



def test_a_log_is_cut_behind_the_step_that_a_run_goes_on_from(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for step in (1, 2, 3):
        runtime.append_line(path, {"step": step})
    # A crash while a line was written leaves these.
    for broken in ('{"step": 4, "lo', '{"step": 2, "each": {"iou": 0}', "\0\0"):
        path.write_text(path.read_text() + broken)
        runtime.cut_log(path, 2)
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        assert lines == [{"step": 1}, {"step": 2}]
    # No crash leaves this.
    path.write_text('{"step": 1}\n{"st\n{"step": 2}\n')
    with pytest.raises(base.DataError, match="metrics.jsonl, line 2"):
        runtime.cut_log(path, 2)


def test_a_stage_needs_a_record_and_says_what_was_refused(
        tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    def args(name: str, root: Path | None = None) -> SimpleNamespace:
        return SimpleNamespace(data=name, root=root, val=2, resume=False)

    def write(name: str, **line: str) -> None:
        line |= {"text": "x", "box": [0, 0, 1, 1]}
        (tmp_path / name).write_text(json.dumps(line))
    none_refused = (r"no record of synth:0.00001 sft to train on; "
                    r"none was refused; is its share too small\?")
    with pytest.raises(base.DataError, match=none_refused):
        runtime.load_records(args("synth:0.00001"), "sft")
    write("train.jsonl", id="1", image="none.png")
    write("val.jsonl", id="2", image="none.png")
    all_refused = (r"to train on; 1 of 1 records are refused \(missing image: 1\); "
                   r"python data.py jsonl")
    with pytest.raises(base.DataError, match=all_refused):
        runtime.load_records(args("jsonl", tmp_path), "train")
    Image.new("RGB", (9, 9)).save(tmp_path / "one.png")
    write("train.jsonl", id="1", image="one.png")
    capsys.readouterr()
    records, val = runtime.load_records(args("jsonl", tmp_path), "train")
    assert len(records) == 1 and not val
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "1 records of train, the split to train on"
    assert printed[1].startswith(
        "0 records of val, the split to validate on; 1 of 1 records are refused (missing image: 1)")


# ---------------------------------------------------------------- model and optimizer

def test_clipping_and_a_gradient_that_is_not_finite() -> None:
    layer = torch.nn.Linear(2, 1, bias=False)
    opt = torch.optim.SGD(layer.parameters(), lr=0.0)
    before = layer.weight.detach().clone()
    layer.weight.grad = torch.tensor([[3.0, 4.0]])
    assert dist.update(layer, opt, lr=1.0) == 5.0
    assert torch.allclose(before - layer.weight, torch.tensor([[0.6, 0.8]]), atol=1e-5)
    assert layer.weight.grad is None
    before = layer.weight.detach().clone()
    layer.weight.grad = torch.tensor([[torch.nan, 1.0]])
    assert math.isnan(dist.update(layer, opt, lr=1.0))
    assert torch.equal(layer.weight, before)


def test_the_table_counts_the_parameters_that_are_trained_and_no_others(
        tiny_checkpoint: Path, capsys: pytest.CaptureFixture) -> None:
    """A part is not "trained" as a whole because one of its parameters is."""
    model = QwenVL.from_pretrained(tiny_checkpoint, dtype=None)
    model.requires_grad_(False)
    bias = model.visual.blocks[0].attn.qkv.bias.requires_grad_(True)
    norm = model.model.layers[0].input_layernorm.weight.requires_grad_(True)
    runtime.print_parameters(model)
    table = {}
    for line in capsys.readouterr().out.splitlines():
        part, counts = line.strip().split("  ", 1)
        total, trained = counts.replace(" parameters", "").replace(" trained", "").split(", ")
        table[part] = (int(total.replace(",", "")), int(trained.replace(",", "")))
    assert list(table) == ["vision tower", "embeddings", "language layers", "head and norm"]
    assert [trained for _, trained in table.values()] == [len(bias), 0, len(norm), 0]
    vision = sum(p.numel() for p in model.visual.parameters())
    everything = sum(p.numel() for p in model.parameters())
    assert table["vision tower"][0] == vision
    assert sum(total for total, _ in table.values()) == everything


# ---------------------------------------------------------------- checkpoints

RUN = {"stage": "sft", "data_hash": "0123", "flags": {}}
ALL = SimpleNamespace(keep=9, keep_weights=None)


@pytest.fixture
def saved(
        tiny_checkpoint: Path, tmp_path: Path,
) -> tuple[Path, QwenVL, torch.optim.Optimizer]:
    """A stage's folder with the checkpoints of two steps, and what they were made of."""
    model = QwenVL.from_pretrained(tiny_checkpoint, dtype=None)
    processor = Processor.from_pretrained(tiny_checkpoint)
    opt = dist.optimizer(model, 1e-3)
    sum(p.square().sum() for p in model.parameters()).backward()
    dist.update(model, opt, 1e-3)
    for step in (1, 2):
        assert checkpoints.save(tmp_path / "out", {"step": step}, model, opt, processor, RUN, ALL)
    return tmp_path / "out", model, opt


def test_a_step_holds_all_that_is_needed_and_latest_names_the_newest(
        saved: tuple, tiny_checkpoint: Path) -> None:
    out, model, opt = saved
    assert (out / "latest").resolve().name == "step_000002"
    assert not list(out.glob(".*"))
    names = {p.name for p in (out / "latest").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "preprocessor_config.json",
            "run.json", "manifest.json", "state"} <= names
    reopened = QwenVL.from_pretrained(out, dtype=None)                # a stage's folder, too
    for a, b in zip(reopened.parameters(), model.parameters()):
        assert torch.equal(a, b)

    restored = QwenVL.from_pretrained(tiny_checkpoint, dtype=None)
    restored_opt = dist.optimizer(restored, 1e-3)
    assert checkpoints.restore(out, restored, restored_opt) == 2
    for a, b in zip(restored.parameters(), model.parameters()):
        assert torch.equal(a, b)
        for kind in ("step", "exp_avg", "exp_avg_sq"):
            assert torch.equal(restored_opt.state[a][kind], opt.state[b][kind])


def rename_state(step: Path) -> None:
    file = next((step / "state").iterdir())
    file.rename(file.with_name("rank_00000_of_00002.safetensors"))


def cut_state(step: Path) -> None:
    file = next((step / "state").iterdir())
    file.write_bytes(file.read_bytes()[:-1])


def flip_a_bit(file: Path) -> None:
    """In the middle of a file."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


DAMAGES = {
    "is missing": rename_state,
    "bytes, but had": cut_state,
    "safetensors is not as it was written": lambda step: flip_a_bit(
        next((step / "state").iterdir())),
    "model.safetensors is not as it was written": lambda step: flip_a_bit(
        step / "model.safetensors"),
    "run.json is not as it was written": lambda step: flip_a_bit(step / "run.json"),
    "state is missing": lambda step: shutil.rmtree(step / "state"),
    "manifest.json is unreadable": lambda step: (step / "manifest.json").write_text("{"),
    "step_000002": shutil.rmtree,
}


@pytest.mark.parametrize("words", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_goes_on(
        saved: tuple, capsys: pytest.CaptureFixture, words: str) -> None:
    out, model, opt = saved
    DAMAGES[words](out / "step_000002")
    assert checkpoints.read_run(out)["step"] in (1, 2)
    assert checkpoints.restore(out, model, opt) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and words in lines[0] and "continuing from step_000001" in lines[0]
    assert (out / "latest").resolve().name == "step_000001"
    # Where it is the last one, there is nothing to go on from.
    cut_state(out / "step_000001")
    with pytest.raises(CheckpointError, match="step_000001.*bytes, but had.*start a new run"):
        checkpoints.restore(out, model, opt)


def test_a_state_without_a_manifest_that_is_cut_off_is_refused_by_name(saved: tuple) -> None:
    """As checkpoints of earlier versions are."""
    out, model, opt = saved
    (out / "latest" / "manifest.json").unlink()
    file = next((out / "latest" / "state").iterdir())
    for size in (0, 100, file.stat().st_size - 1):
        file.write_bytes(file.read_bytes()[:size])
        with pytest.raises(CheckpointError, match=(
                r"rank_00000_of_00001.safetensors: .*latest at an earlier step")):
            checkpoints.restore(out, model, opt)


def test_a_state_of_another_model_is_refused(saved: tuple) -> None:
    out, _, opt = saved
    with pytest.raises(CheckpointError, match="weight does not fit this model; resume with the"):
        checkpoints.restore(out, torch.nn.Linear(2, 1), opt)


def test_an_interrupted_save_keeps_the_last_checkpoint(
        saved: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any, **more: Any) -> None:
        raise KeyboardInterrupt
    out, model, opt = saved
    processor = Processor.from_pretrained(out)
    monkeypatch.setattr(type(model), "save_pretrained", interrupted)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.save(out, {"step": 3}, model, opt, processor, {}, ALL)
    monkeypatch.undo()
    assert (out / "latest").resolve().name == "step_000002"
    assert not (out / "step_000003").exists()
    # What is left over is in nobody's way.
    checkpoints.save(out, {"step": 3}, model, opt, processor, {}, ALL)
    assert (out / "latest").resolve().name == "step_000003"


@pytest.mark.parametrize("keep, keep_weights, states, weights", [
    (2, None, [4, 5], [1, 2, 3, 4, 5]),
    (1, None, [5], [1, 2, 3, 4, 5]),
    (2, 1, [4, 5], [2, 4, 5]),           # a state goes on from weights
    (1, 2, [5], [2, 4, 5]),
    (9, 9, [1, 2, 3, 4, 5], [1, 2, 3, 4, 5])])
def test_the_newest_states_and_the_best_weights_stay(
        saved: tuple, keep: int, keep_weights: int | None, states: list[int],
        weights: list[int]) -> None:
    out, model, opt = saved
    processor = Processor.from_pretrained(out)
    shutil.rmtree(out / "step_000001")
    # Of equals the first is the best; a step without a validation is none. A step after
    # the newest one is ignored: the run has gone back to before it.
    scores = {1: 0.2, 2: 0.7, 3: None, 4: 0.7, 5: 0.1}
    for step, score in scores.items():
        line = {"step": step} if score is None else {"step": step, "val_mIoU": score}
        if step < 5:
            assert checkpoints.save(out, line, model, opt, processor, RUN, ALL)
    shutil.copytree(out / "step_000004", out / "step_000010")
    args = SimpleNamespace(keep=keep, keep_weights=keep_weights)
    assert checkpoints.save(out, line, model, opt, processor, RUN, args)
    left = [p for p in sorted(out.glob("step_*")) if p.name != "step_000010"]
    assert [int(p.name[5:]) for p in left] == weights
    assert [int(p.name[5:]) for p in left if (p / "state").exists()] == states
    assert (out / "best").resolve().name == "step_000002"
    assert QwenVL.from_pretrained(out / "best").device.type == "cpu"
    assert not list(out.glob(".*")) and (out / "step_000010" / "state").exists()
    assert checkpoints.restore(out, model, opt) == 5


def test_a_checkpoint_that_has_no_room_is_not_begun_and_the_last_one_stands(
        saved: tuple, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    out, model, opt = saved
    processor = Processor.from_pretrained(out)
    parameters = sum(p.numel() for p in model.parameters())
    # Weights in float32, as they are stored; parameters and two moments in the state.
    needed = 4 * parameters + 3 * 4 * parameters + checkpoints.SMALL_FILES
    written = sum(p.stat().st_size for p in (out / "latest/").rglob("*") if p.is_file())
    assert written < needed < written + 2 * checkpoints.SMALL_FILES
    for free, fits in ((needed - 1, False), (needed, True)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
        assert checkpoints.save(out, {"step": 3}, model, opt, processor, RUN, ALL) == fits
        assert (out / "step_000003").exists() == fits and not list(out.glob(".*"))
        said = capsys.readouterr().err.splitlines()
        assert len(said) == (not fits)
    monkeypatch.undo()
    assert (out / "latest").resolve().name == "step_000003"


def peak_kib() -> int:
    """Most memory that this process has held since the last reset, in KiB."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_saving_holds_a_piece_of_a_tensor_and_no_copy_of_the_model(
        tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Weights of 40 MiB and a state of 240 MiB, both in another type than they are held in.

    So each piece is a copy, as it is of a tensor on a GPU.
    """
    config = json.loads((tiny_checkpoint / "config.json").read_text())
    processor = Processor.from_pretrained(tiny_checkpoint)
    out = tmp_path / "out"
    # The first, small one is not measured: it loads the code.
    for vocab in (10_000, 327_680):
        (tmp_path / "config.json").write_text(json.dumps({**config, "vocab_size": vocab}))
        model = QwenVL(Config.from_json(tmp_path / "config.json")).double()
        opt = dist.optimizer(model, 1e-3)
        for p in model.parameters():
            opt.state[p] = {"step": torch.tensor(1.0), "exp_avg": p, "exp_avg_sq": p}
        Path("/proc/self/clear_refs").write_text("5")
        held = peak_kib()
        assert checkpoints.save(out, {"step": vocab}, model, opt, processor, {}, ALL)
    assert (out / "latest" / "model.safetensors").stat().st_size > 40 * 2 ** 20
    assert peak_kib() - held < 36 * 2 ** 10


def test_weights_are_saved_in_the_checkpoints_own_dtype_and_masters_in_float32(
        tiny_checkpoint: Path, tmp_path: Path) -> None:
    half = QwenVL.from_pretrained(tiny_checkpoint, dtype=None)
    half.stored_dtype = torch.bfloat16
    half.save_pretrained(tmp_path / "half")
    for name in ("tokenizer.json", "preprocessor_config.json"):
        (tmp_path / "half" / name).write_bytes((tiny_checkpoint / name).read_bytes())
    model = QwenVL.from_pretrained(tmp_path / "half", dtype=None)
    model = dist.prepare(model, torch.device("cpu"))
    assert all(p.dtype == torch.float32 for p in model.parameters())
    processor = Processor.from_pretrained(tmp_path / "half")
    opt = dist.optimizer(model, 1e-3)
    checkpoints.save(tmp_path / "out", {"step": 1}, model, opt, processor, {}, ALL)
    step = tmp_path / "out" / "latest"
    weights = load_file(step / "model.safetensors")
    assert {x.dtype for x in weights.values()} == {torch.bfloat16}
    masters = load_file(next((step / "state").iterdir()))
    assert {x.dtype for x in masters.values()} == {torch.float32}


def test_an_output_that_cant_be_written_to_is_refused_before_anything_is_loaded(
        tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    folders = [tmp_path / "file", tmp_path / "file" / "in"]
    if sys.platform == "linux":
        folders.append(Path("/proc/here"))
    for folder in folders:
        args = SimpleNamespace(out=folder, resume=False)
        for words in (mistake(capsys, runtime.Run, args, "sft", []),
                      mistake(capsys, dist.check_writable, folder)):
            assert f"nothing can be written to {folder} (" in words and "--out" in words
    nested = tmp_path / "a" / "b"
    assert dist.check_writable(nested) == nested and not list(nested.iterdir())
    # An empty folder is a new one.
    runtime.Run(SimpleNamespace(out=nested, resume=False), "sft", [])


# ---------------------------------------------------------------- flags of a resumed run

def parse(monkeypatch: pytest.MonkeyPatch, *words: object) -> argparse.Namespace:
    """A stage's flags, as read from this command line."""
    parser = flags.FlagParser()
    flags.add_common_flags(parser, "sft", "toy/base")
    parser.add_argument("--lr", type=flags.above_zero, default=1e-5)
    parser.add_argument("--weights", type=float, nargs=3, default=(1.0, 0.5, 0.5))
    monkeypatch.setattr(sys, "argv", ["sft.py", *map(str, words)])
    return flags.parse(parser, "sft")


@pytest.fixture
def run_folder(saved: tuple, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stage's folder with the run.json of a run with some flags, on no records."""
    out, model, opt = saved
    args = parse(monkeypatch, "--out", out, "--data", "dior", "--lr", 1e-4, "--init", "toy/base",
                 "--steps", 4, "--freeze-vision")
    given = {name: value for name, value in vars(args).items() if name != "resume"}
    run = {"stage": "sft", "data_hash": base.Records([], {}).hash, "flags": given}
    processor = Processor.from_pretrained(out)
    assert checkpoints.save(out, {"step": 2}, model, opt, processor, run, ALL)
    return out


def test_a_resume_takes_up_the_flags_of_its_run(
        run_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    out = run_folder
    args = parse(monkeypatch, "--out", out, "--resume", "--steps", 6,
                 "--init", "./toy/../toy/base/", "--weights", 1, 0.5, 0.5)
    assert (args.data, args.lr, args.freeze_vision) == ("dior", 1e-4, True)
    assert (args.steps, args.resume, args.out) == (6, True, str(out))
    moved = out.rename(out.parent / "moved")
    args = parse(monkeypatch, "--out", moved, "--resume", "--root", "elsewhere")
    assert args.out == str(moved)
    for given, words in [
            (("--lr", 1e-3), f"--lr 0.001, but the run in {moved} has 0.0001"),
            (("--data", "synth"), "--data synth"),
            (("--init", "other"), "--init other"),
            (("--seed", 1), "--seed 1"),
            (("--max-pixels", 9), "--max-pixels 9")]:
        assert words in mistake(capsys, parse, monkeypatch, "--out", moved, "--resume", *given)


def test_a_resume_goes_on_with_no_other_stage_data_or_folder(
        run_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    def resume() -> argparse.Namespace:
        return parse(monkeypatch, "--out", run_folder, "--resume")
    latest = run_folder / "latest"
    file = latest / "run.json"
    record = base.Record("1", "", "x", (0, 0, 1, 1), "", (9, 9))
    other_records = base.Records([record], {})
    monkeypatch.setattr(runtime, "load", lambda *_, **__: other_records)
    words = mistake(capsys, runtime.load_records, resume(), "sft")
    assert "the records of dior sft are not those of the run" in words
    # With a manifest a changed run.json would be passed over for the one before.
    (latest / "manifest.json").unlink()
    shutil.rmtree(run_folder / "step_000001")
    run = json.loads(file.read_text())
    file.write_text(json.dumps({**run, "stage": "rft"}))
    assert "holds a run of rft.py" in mistake(capsys, resume)
    for broken in ("[]", "{}"):
        file.write_text(broken)
        assert "run.json does not say how the run began" in mistake(capsys, resume)
    file.unlink()
    assert "run.json does not say how the run began" in mistake(capsys, resume)
    shutil.rmtree(latest.resolve())
    latest.unlink()
    assert "there is no checkpoint in" in mistake(capsys, resume)


# ---------------------------------------------------------------- the model to sample with

# A process samples 8 tokens or 24 from the gathered model, then all take a step.
GATHERED = """
import functools, sys, torch
sys.path[:0] = [{root!r}]
from train import dist, run as runtime
from qwen.generate import generate
from model import QwenVL
from qwen.processor import Prompt, Pixels

path, dtype = sys.argv[1], getattr(torch, sys.argv[2])
device = dist.start("cpu")
plain = QwenVL.from_pretrained(path, dtype)
model = QwenVL.from_pretrained(path, torch.float32)
model.visual.checkpointing = model.model.checkpointing = True
model = dist.prepare(model, device, dtype)
torch.manual_seed(0)
pixels = Pixels(torch.zeros(16, 3, 14, 14, dtype=torch.uint8), torch.rand(3, 256), 2)
ids = torch.tensor([5, 6, *[model.config.image_id] * 4, 7])
prompts = [Prompt(ids, pixels, torch.tensor([[1, 4, 4]]), None)]
plain.stop_ids = model.stop_ids = (270,)
sample = functools.partial(
    generate, prompts=prompts, group=2, max_new_tokens=8 + 16 * dist.rank(), temperature=1.0,
    seeds=torch.tensor([dist.rank()]))
with dist.gathered(model) as whole:
    assert type(whole) is QwenVL and whole is not model
    for module in whole.modules():
        assert not module._forward_pre_hooks and not module._forward_hooks
    # No weight is there twice, and all have the dtype that is computed in.
    assert [*map(id, whole.parameters())] == [*map(id, model.parameters())]
    assert {{p.dtype for p in whole.parameters()}} == {{dtype}}
    assert (whole.lm_head.weight is whole.model.embed_tokens.weight) == model.config.tied
    assert whole.stop_ids == (270,) and whole.banned is model.banned
    assert whole.visual.checkpointing and whole.model.checkpointing
    assert whole.state_dict().keys() == plain.state_dict().keys()
    got = sample(whole)
want = sample(plain)
# Gathered weights lie elsewhere in memory, and products may differ by a rounding with the place.
assert torch.equal(got[0], want[0]) and torch.equal(got[2], want[2])
atol = 0.05 if dtype == torch.bfloat16 else 1e-5
torch.testing.assert_close(got[1], want[1], rtol=0, atol=atol)
assert got[2].min() == 8 + 16 * dist.rank()
assert model.lm_head.weight.shape == plain.lm_head.weight.shape
logp, _ = model.score(prompts, [[*got[0][0, :, :8]]])
logp.sum().backward()
assert all(p.grad.to_local().dtype == torch.float32 for p in model.parameters())
runtime.launch(lambda: None)
"""


@pytest.mark.parametrize("tied, dtype", [(True, "bfloat16"), (False, "float32")])
def test_a_gathered_model_samples_without_hooks_and_without_the_other_process(
        run: Callable, tiny_checkpoint: Path, tmp_path: Path, tied: bool, dtype: str) -> None:
    path = tmp_path / "checkpoint"
    shutil.copytree(tiny_checkpoint, path)
    if not tied:
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
        weights = load_file(path / "model.safetensors")
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].roll(1, 0)
        save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    script = tmp_path / "script.py"
    script.write_text(GATHERED.format(root=str(Path(runtime.__file__).parents[1])))
    done = run(script, path, dtype, processes=2)
    assert done.returncode == 0, done.stderr


def test_a_model_that_is_not_sharded_is_gathered_as_it_is(tiny_checkpoint: Path) -> None:
    model = dist.prepare(QwenVL.from_pretrained(tiny_checkpoint), torch.device("cpu"))
    with dist.gathered(model) as whole:
        assert whole is model
