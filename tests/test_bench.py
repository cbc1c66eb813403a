"""bench.py runs and writes what it says; memory does not grow with tokens times vocabulary."""
import argparse
import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from conftest import Run
from model import Config, QwenVL
from played_device import PlayedDevice
from tools import bench
from tools.bench import Table, Work

SCORE = """
import resource, sys, torch
from pathlib import Path
sys.path.insert(0, {here!r})
from model import QwenVL
from tools.bench import random_ids, random_prompt, write_checkpoint
folder = write_checkpoint(Path({folder!r}), "tiny", torch.float32, 151_936)
model = QwenVL.from_pretrained(folder, torch.float32).requires_grad_(True)

def update(rollouts):
    model.zero_grad(set_to_none=True)
    completions = [random_ids(model, 100, g) for g in range(rollouts)]
    logp, _ = model.score([random_prompt(model, 112, 0)], [completions])
    (-logp.mean()).backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

print(update(4), update(16))
"""


def test_memory_of_an_update_does_not_grow_with_tokens_times_vocabulary(tmp_path: Path) -> None:
    """1,200 more tokens would hold 1,200 x 151,936 more logits: 0.7 GB in float32.

    Each gradient of them would hold as much again.
    """
    code = SCORE.format(here=str(Path(__file__).parents[1]), folder=str(tmp_path))
    script = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert script.returncode == 0, script.stderr
    peak_of_4, peak_of_16 = map(float, script.stdout.split())
    assert peak_of_16 - peak_of_4 < 200, (peak_of_4, peak_of_16)


@pytest.mark.parametrize("shape", bench.SHAPES)
def test_a_shape_is_one_that_transformers_knows(shape: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = bench.SHAPES[shape]
    raw = bench.hub_config(sizes, torch.bfloat16, sizes.vocab)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    theirs_config = transformers.AutoConfig.from_pretrained(tmp_path)
    with torch.device("meta"):
        ours = QwenVL(Config.from_json(tmp_path / "config.json"))
        theirs = getattr(transformers, raw["architectures"][0])(theirs_config)
    assert sum(p.numel() for p in ours.parameters()) == theirs.num_parameters()


@pytest.mark.parametrize("shape", ["qwen2-tiny", "qwen3-tiny"])
def test_both_sides_of_a_comparison_run_every_family(shape: str, tmp_path: Path) -> None:
    """One update and one sampling of each, and they compute the same."""
    pytest.importorskip("transformers")
    args = argparse.Namespace(shape=shape, prompts=2, tokens=5)
    w = bench.open_workload(
        bench.write_checkpoint(tmp_path, shape, torch.float32), args, torch.float32,
        torch.device("cpu"))
    w.sample_ours(3)
    w.sample_theirs(3)
    # transformers' model leaves no id out.
    w.ours.banned[:] = False
    with torch.no_grad():
        logp, _ = w.ours.score([w.prompts[0]], [w.completions[0]])
        theirs = w.peer.score([w.prompts[0]] * bench.GROUP, w.completions[0])
    assert torch.allclose(logp, theirs.flatten(), atol=1e-4)


def test_the_table_has_a_row_for_every_part_beside_transformers(
        run: Run, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    script = run("tools/bench.py", "--shape", "tiny", "--repeats", 1, "--prompts", 2, "--tokens", 8,
                 "--device", "cpu", "--out", tmp_path)
    assert script.returncode == 0, script.stderr
    report = json.loads((tmp_path / "bench.json").read_text())
    rows = report["rows"]
    names = {r["name"] for r in rows if "transformers" in r["peer"]}
    assert names == {"load", "prefill", "decode", "update", "step", "sft", "images"}
    assert 0 < report["matrix_TFLOPs"] < 1000 and 0 < report["bandwidth_TBs"] < 100
    for r in rows:
        assert ("share" in r) == (r["name"] not in ("load", "images") and r["ours"] > 0)
        if "share" in r:
            assert 0 < r["share"] == r["TFLOPs"] / report["matrix_TFLOPs"]
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
    assert len(report["profile"]) == 10
    assert 0 < sum(event["share"] for event in report["profile"]) <= 1
    differences = [r["gradient_difference"] for r in rows if "gradient_difference" in r]
    assert len(differences) == 1 and differences[0] < 1e-4


# ---------------------------------------------------------------- rows as they come

@pytest.fixture
def table(tmp_path: Path) -> Table:
    """Its machine grows faster from row to row, then slower again."""
    rates = iter([1e-9, 2e-9, 8e-9, *[4e-9] * 9])
    return Table(tmp_path / "bench.json", 2, torch.device("cpu"), {"torch": "2"},
                 lambda: {"matrix_TFLOPs": next(rates)})


def written(table: Table) -> list[dict[str, Any]]:
    return json.loads(table.file.read_text())["rows"]


def nothing() -> None:
    pass


def test_a_row_is_written_as_soon_as_it_is_measured(table: Table) -> None:
    seen = []
    table.compare("first", "peer", nothing, nothing, Work("rows/s", 8, flops=100.0))
    table.compare("second", "peer", lambda: seen.append(len(written(table))), nothing, Work())
    assert seen == [1, 1, 1] and [r["name"] for r in written(table)] == ["first", "second"]
    assert not list(table.file.parent.glob("*.tmp"))
    first, second = written(table)
    # Every share is of the best rate of the run so far.
    assert first["share"] == pytest.approx(first["TFLOPs"] / 8e-9)
    assert first["TFLOPs"] == pytest.approx(100e-12 * first["ours"] / 8)
    assert "share" not in second and second["unit"] == "s"


def too_much() -> None:
    # As the CPU's allocator refuses it.
    torch.empty(2 ** 50)


def as_cuda_refuses() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


@pytest.mark.parametrize("refused", [too_much, as_cuda_refuses])
def test_a_side_that_runs_out_of_memory_says_so_and_the_rest_goes_on(
        table: Table, capsys: pytest.CaptureFixture, refused: Callable[[], None]) -> None:
    calls = []

    def late() -> None:
        calls.append(1)
        if len(calls) == 2:
            refused()
    table.compare("one", "theirs fails", nothing, refused, Work("rows/s", 8))
    table.compare("two", "ours fails late", late, nothing, Work())
    table.compare("three", "both fail", refused, refused, Work())
    table.attempt("four", refused)
    table.compare("five", "none fails", nothing, nothing, Work())
    one, two, three, four, five = written(table)
    assert one["ours"] > 0 and one["out_of_memory"] == ["theirs"]
    assert one["theirs"] is one["ratio"] is one["spread"] is None
    assert two["ours"] is None and two["theirs"] > 0 and two["out_of_memory"] == ["ours"]
    # It is not tried again.
    assert len(calls) == 2
    assert three["out_of_memory"] == ["ours", "theirs"] and four["out_of_memory"] == ["four"]
    assert five["ratio"] > 0 and "out_of_memory" not in five
    said = capsys.readouterr().out
    for words in ("out of memory: theirs", "out of memory: ours", "ours and theirs", "four"):
        assert words in said


def test_any_other_error_is_not_taken_for_a_lack_of_memory(table: Table) -> None:
    def broken() -> None:
        raise RuntimeError("shapes do not fit")
    with pytest.raises(RuntimeError, match="do not fit"):
        table.compare("one", "peer", nothing, broken, Work())
    with pytest.raises(RuntimeError, match="do not fit"):
        table.attempt("one", broken)
    assert not table.file.exists()


# ---------------------------------------------------------------- both sides

@pytest.fixture(scope="module")
def workload(tmp_path_factory: pytest.TempPathFactory) -> bench.Workload:
    """One question for both models."""
    pytest.importorskip("transformers")
    folder = bench.write_checkpoint(tmp_path_factory.mktemp("tiny"), "tiny", torch.float32)
    args = SimpleNamespace(shape="tiny", prompts=1, tokens=4)
    return bench.open_workload(folder, args, torch.float32, torch.device("cpu"))


def calls_of(module: torch.nn.Module, work: Callable[[], None]) -> int:
    calls = []
    hook = module.register_forward_pre_hook(lambda *args: calls.append(1))
    work()
    hook.remove()
    return len(calls)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_both_sides_keep_activations_or_neither_does(
        workload: bench.Workload, checkpointing: bool) -> None:
    """A checkpointed layer runs a second time in the backward pass; the gradient is the same."""
    workload = dataclasses.replace(workload, checkpointing=checkpointing)
    ours = workload.ours
    theirs = workload.peer.model.model
    for update, layers in (
            (workload.update_ours, (ours.model.layers[0], ours.visual.blocks[0])),
            (workload.update_repeated, (ours.model.layers[0], ours.visual.blocks[0])),
            (workload.update_theirs, (theirs.language_model.layers[0], theirs.visual.blocks[0]))):
        for layer in layers:
            assert calls_of(layer.mlp, update) == (2 if checkpointing else 1)
    workload.clear_gradients()
    difference = bench.gradient_difference(ours, workload.update_ours, workload.update_repeated)
    assert difference < 1e-4
    # Sampling is not concerned: transformers' model would do without its cache.
    assert not workload.peer.model.training and not ours.model.checkpointing


def test_flops_are_those_that_torch_counts_and_attentions_by_hand(
        workload: bench.Workload) -> None:
    """torch's counter knows every matrix product but those within a kernel of attention."""
    from torch.utils.flop_counter import FlopCounterMode
    model = workload.ours
    with FlopCounterMode(display=False) as counter:
        workload.update_ours()
    workload.clear_gradients()
    # 64 patches of width 64 in one window, two blocks: each sees each, scores and values.
    tower = 2 * (2 * 2 * 64 * 64 * 64)
    # A prompt of 68 tokens sees half of itself, 8 x 3 fed tokens it and half of 4; 2 layers of
    # 4 heads x 32.
    language = 2 * (2 * 2 * 128 * (68 * 68 / 2 + 8 * 3 * (68 + 2)))
    # The pixels take no gradient. The head is computed twice forward, a chunk at a time.
    spared = 2 * model.visual.patch_embed.proj.weight.numel() * 64
    again = 2 * 1024 * 128 * 8 * 4
    want = bench.update_flops(model, workload.prompts[0], bench.GROUP, 4)
    counted = counter.get_total_flops() + 3 * (tower + language) + spared - again
    assert counted == pytest.approx(want, rel=0.01)


def test_a_row_that_a_gpu_has_no_memory_for_leaves_the_others(
        tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """bench.py's own loop on a played GPU of 1 MB, where the models do not fit."""
    pytest.importorskip("transformers")
    with PlayedDevice(total_bytes=10 ** 6):
        table = Table(tmp_path / "bench.json", 1, torch.device("cuda"), {}, dict)
        folder = bench.write_checkpoint(tmp_path / "tiny", "tiny", torch.float32)
        args = SimpleNamespace(shape="tiny", prompts=1, tokens=4, only=["decode", "update"])
        bench.measure(table, folder, args, torch.float32)
    assert [r["out_of_memory"] for r in written(table)] == [["models"]]
    assert "out of memory: models" in capsys.readouterr().out
