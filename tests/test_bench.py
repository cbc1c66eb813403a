"""tools/bench.py writes what it says; memory does not grow with tokens times vocabulary."""
import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import write_tiny
from model import Config, QwenVL
from played_device import PlayedDevice
from tools import bench
from tools.bench import Bench

SCORE = """
import resource, sys, torch
from pathlib import Path
sys.path.insert(0, {here!r})
from model import QwenVL
from tools.bench import SHAPES, random_prompt, write_checkpoint
config = SHAPES["tiny"] | {{"vocab_size": 151_936}}
folder = write_checkpoint(Path({folder!r}), config, torch.float32)
model = QwenVL.from_pretrained(folder, torch.float32).requires_grad_(True)

def update(rollouts):
    model.zero_grad(set_to_none=True)
    completions = [torch.randint(8, 1000, (100,)) for _ in range(rollouts)]
    logp, _ = model.score([random_prompt(model, 112)], [completions])
    (-logp.mean()).backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

print(update(2), update(8))
"""


def test_memory_of_an_update_does_not_grow_with_tokens_times_vocabulary(tmp_path: Path) -> None:
    """600 more tokens would hold 600 x 151,936 more logits: 0.36 GB in float32.

    Each gradient of them would hold as much again.
    """
    code = SCORE.format(here=str(Path(__file__).parents[1]), folder=str(tmp_path))
    script = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert script.returncode == 0, script.stderr
    peak_of_2, peak_of_8 = map(float, script.stdout.split())
    assert peak_of_8 - peak_of_2 < 200, (peak_of_2, peak_of_8)


@pytest.mark.parametrize("shape", bench.SHAPES)
def test_a_shape_is_one_that_transformers_knows(shape: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    raw = bench.SHAPES[shape]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    theirs_config = transformers.AutoConfig.from_pretrained(tmp_path)
    with torch.device("meta"):
        ours = QwenVL(Config.from_json(tmp_path / "config.json"))
        theirs = getattr(transformers, raw["architectures"][0])(theirs_config)
    assert sum(p.numel() for p in ours.parameters()) == theirs.num_parameters()


def command(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    """python -m tools.bench, in this process: it has transformers loaded."""
    monkeypatch.setattr(sys, "argv", ["bench.py", *map(str, words)])
    bench.main()


def test_the_table_has_a_row_for_every_part_and_transformers(
        monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    command(monkeypatch, "--shape", "tiny", "--repeats", 1, "--prompts", 2, "--tokens", 8,
            "--device", "cpu", "--out", tmp_path)
    report = json.loads((tmp_path / "bench.json").read_text())
    rows = report["rows"]
    names = {r["name"] for r in rows if "transformers" in r["peer"]}
    assert names == {"load", "prefill", "decode", "update", "step", "sft", "images"}
    for r in rows:
        # The difference of two noisy times, over too few tokens here, has either sign.
        if "(difference)" in r["peer"]:
            assert r["ratio"] == r["theirs"] / r["ours"]
            continue
        assert r["ours"] > 0 and r["theirs"] > 0, r
        assert r["spread"][0] <= r["ratio"] * 1.001 <= r["spread"][1] * 1.002, r
        # Above 1 means that ours is faster or smaller.
        if r["unit"] in ("s", "MiB at peak"):
            faster = r["theirs"] / r["ours"]
        else:
            faster = r["ours"] / r["theirs"]
        assert abs(faster / r["ratio"] - 1) < 1e-6
    assert report["numerics"]["sampled_scored"]["largest"] < 1e-4
    assert report["numerics"]["dtype_float32"]["largest"] < 1e-4
    differences = [r["gradient_difference"] for r in rows if "gradient_difference" in r]
    assert len(differences) == 1 and differences[0] < 1e-4


def test_a_shape_may_be_a_folder_with_a_config_json(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text(json.dumps(bench.SHAPES["tiny"]))
    monkeypatch.setitem(bench.SIDES, str(tmp_path), 112)
    command(monkeypatch, "--shape", tmp_path, "--only", "prefill", "--prompts", 1, "--tokens", 2,
            "--repeats", 1, "--device", "cpu", "--out", tmp_path)
    assert json.loads((tmp_path / "bench.json").read_text())["shape"] == str(tmp_path)
    with pytest.raises(SystemExit):
        command(monkeypatch, "--shape", tmp_path / "other", "--device", "cpu")
    assert "other/config.json does not exist" in capsys.readouterr().err


# ---------------------------------------------------------------- rows as they come

def test_a_row_is_written_as_soon_as_it_is_measured(tmp_path: Path) -> None:
    table = Bench(tmp_path / "bench.json", torch.device("cpu"), torch.float32, 2, {"rows": []})
    seen = []

    def written() -> list[dict[str, Any]]:
        return json.loads(table.file.read_text())["rows"]

    def nothing() -> None:
        pass
    seconds = table.compare("first", "peer", nothing, nothing, "rows/s", 8)
    table.compare("second", "peer", lambda: seen.append(len(written())), nothing)
    assert seen == [1, 1, 1] and [r["name"] for r in written()] == ["first", "second"]
    assert not list(tmp_path.glob("*.tmp"))
    first, second = written()
    assert [first["ours"], first["theirs"]] == pytest.approx([8 / s for s in seconds])
    assert second["unit"] == "s"


def as_cuda_refuses(*args: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def broken(*args: object) -> None:
    raise RuntimeError("shapes do not fit")


def test_a_part_that_runs_out_of_memory_says_so_and_the_rest_goes_on(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("transformers")
    words = ("--shape", "tiny", "--only", "update", "prefill", "--prompts", 1, "--tokens", 2,
             "--repeats", 1, "--device", "cpu", "--out", tmp_path)
    monkeypatch.setattr(QwenVL, "prefill", as_cuda_refuses)
    command(monkeypatch, *words)
    rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert [r["name"] for r in rows] == ["update"] * 2
    assert "prefill: out of memory" in capsys.readouterr().out
    # Any other error is not taken for a lack of memory.
    monkeypatch.setattr(QwenVL, "prefill", broken)
    with pytest.raises(RuntimeError, match="do not fit"):
        command(monkeypatch, *words)


def test_models_that_a_gpu_has_no_memory_for_leave_one_line_a_part(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """The command on a played GPU of 1 MB."""
    pytest.importorskip("transformers")
    folder = bench.write_checkpoint(tmp_path / "tiny", bench.SHAPES["tiny"], torch.float32)
    monkeypatch.setattr(bench, "write_checkpoint", lambda *_: folder)
    with PlayedDevice(total_bytes=10 ** 6):
        command(monkeypatch, "--shape", "tiny", "--only", "decode", "update", "--prompts", 1,
                "--tokens", 4, "--device", "cuda", "--out", tmp_path)
    assert json.loads((tmp_path / "bench.json").read_text())["rows"] == []
    printed = capsys.readouterr().out
    assert "decode: out of memory" in printed and "update: out of memory" in printed


# ---------------------------------------------------------------- both sides

def opened(folder: Path, questions: int, tokens: int) -> Bench:
    pytest.importorskip("transformers")
    b = Bench(folder / "bench.json", torch.device("cpu"), torch.float32, 1, {"rows": []})
    b.open_models(folder, 112, questions, tokens)
    return b


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """One question for both models."""
    folder = tmp_path_factory.mktemp("tiny")
    return opened(bench.write_checkpoint(folder, bench.SHAPES["tiny"], torch.float32), 1, 4)


@pytest.mark.parametrize("family", ["Qwen2-VL", "Qwen3-VL"])
def test_both_sides_of_a_comparison_run_every_family(family: str, tmp_path: Path) -> None:
    """One update and one sampling of each, and they compute the same."""
    write_tiny(tmp_path, family)
    b = opened(tmp_path, 2, 5)
    b.sample("ours", 3)
    b.sample("theirs", 3)
    # transformers' model leaves no id out.
    b.ours.banned[:] = False
    assert torch.allclose(b.update("ours"), b.update("theirs"), atol=1e-4)


def calls_of(module: torch.nn.Module, work: Callable[[], Any]) -> int:
    calls = []
    hook = module.register_forward_pre_hook(lambda *args: calls.append(1))
    work()
    hook.remove()
    return len(calls)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_both_sides_keep_activations_or_neither_does(both: Bench, checkpointing: bool) -> None:
    """A checkpointed layer runs a second time in the backward pass; the gradient is the same."""
    both = copy.copy(both)
    both.checkpointing = checkpointing
    if checkpointing:
        both.theirs.gradient_checkpointing_enable({"use_reentrant": False})
    ours = both.ours
    theirs = both.theirs.model
    gradients = []
    for side, layers in (
            ("ours", (ours.model.layers[0], ours.visual.blocks[0])),
            ("repeated", (ours.model.layers[0], ours.visual.blocks[0])),
            ("theirs", (theirs.language_model.layers[0], theirs.visual.blocks[0]))):
        ours.zero_grad(set_to_none=True)
        for layer in layers:
            assert calls_of(layer.mlp, lambda: both.update(side)) == (2 if checkpointing else 1)
        gradients.append({n: p.grad for n, p in ours.named_parameters() if p.grad is not None})
    for name, gradient in gradients[0].items():
        assert (gradients[1][name] - gradient).norm() < 1e-4 * gradient.norm() + 1e-12, name
    # Sampling is not concerned: transformers' model would do without its cache.
    both.sample("theirs", 1)
    assert not both.theirs.training and not ours.model.checkpointing
