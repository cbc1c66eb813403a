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
    monkeypatch.setattr(bench, "ceilings", lambda device, dtype: {
        "matrix_TFLOPs": 0.1, "bandwidth_TBs": 0.01})
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


def test_the_ceilings_of_this_machine_are_plausible() -> None:
    measured = bench.ceilings(torch.device("cpu"), torch.float32)
    assert 0 < measured["matrix_TFLOPs"] < 1000 and 0 < measured["bandwidth_TBs"] < 100


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

@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """The machine's rate grows from row to row, then falls again."""
    rates = iter([2e-9, 8e-9, *[4e-9] * 9])
    monkeypatch.setattr(bench, "ceilings", lambda *_: {"matrix_TFLOPs": next(rates)})
    report = {"torch": "2", "rows": [], "matrix_TFLOPs": 1e-9}
    return Bench(tmp_path / "bench.json", torch.device("cpu"), torch.float32, 2, report)


def written(table: Bench) -> list[dict[str, Any]]:
    return json.loads(table.file.read_text())["rows"]


def nothing() -> None:
    pass


def test_a_row_is_written_as_soon_as_it_is_measured(table: Bench) -> None:
    seen = []
    table.compare("first", "peer", nothing, nothing, "rows/s", 8, flops=100.0)
    table.compare("second", "peer", lambda: seen.append(len(written(table))), nothing)
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
        table: Bench, capsys: pytest.CaptureFixture, refused: Callable[[], None]) -> None:
    calls = []

    def late() -> None:
        calls.append(1)
        if len(calls) == 2:
            refused()
    table.compare("one", "theirs fails", nothing, refused, "rows/s", 8)
    table.compare("two", "ours fails late", late, nothing)
    table.compare("three", "both fail", refused, refused)
    assert bench.clock(refused, table.device) is None
    table.add("four", "outside the timed calls", None, None, failed="four")
    table.compare("five", "none fails", nothing, nothing)
    one, two, three, four, five = written(table)
    assert one["ours"] > 0 and one["out_of_memory"] == ["theirs"]
    assert one["theirs"] is one["ratio"] is one["spread"] is None
    assert two["ours"] is None and two["theirs"] > 0 and two["out_of_memory"] == ["ours"]
    # It is not tried again.
    assert len(calls) == 2
    assert three["out_of_memory"] == ["ours", "theirs"] and four["out_of_memory"] == ["four"]
    assert five["ratio"] > 0 and "out_of_memory" not in five
    printed = capsys.readouterr().out
    for words in ("out of memory: theirs", "out of memory: ours", "ours and theirs", "four"):
        assert words in printed


def test_any_other_error_is_not_taken_for_a_lack_of_memory(table: Bench) -> None:
    def broken() -> None:
        raise RuntimeError("shapes do not fit")
    with pytest.raises(RuntimeError, match="do not fit"):
        table.compare("one", "peer", nothing, broken)
    with pytest.raises(RuntimeError, match="do not fit"):
        bench.clock(broken, table.device)
    assert not table.file.exists()


def test_a_row_that_a_gpu_has_no_memory_for_leaves_the_others(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """The command on a played GPU of 1 MB, which the models do not fit."""
    pytest.importorskip("transformers")
    folder = bench.write_checkpoint(tmp_path / "tiny", bench.SHAPES["tiny"], torch.float32)
    monkeypatch.setattr(bench, "write_checkpoint", lambda *_: folder)
    with PlayedDevice(total_bytes=10 ** 6):
        command(monkeypatch, "--shape", "tiny", "--only", "decode", "update", "--prompts", 1,
                "--tokens", 4, "--device", "cuda", "--out", tmp_path)
    rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert [r["out_of_memory"] for r in rows] == [["models"]]
    assert "out of memory: models" in capsys.readouterr().out


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


def test_flops_are_those_of_linear_layers_and_attention_by_hand(both: Bench) -> None:
    def weights(module: torch.nn.Module) -> int:
        linear = [m for m in module.modules() if isinstance(m, torch.nn.Linear)]
        return sum(m.weight.numel() for m in linear)
    tower, layers = both.ours.visual, both.ours.model.layers
    assert len(both.prompts[0].input_ids) == 68
    # 64 patches of width 64 in one window, two blocks: each sees each, scores and values.
    embedding = tower.patch_embed.proj.weight.numel() * 64
    vision = weights(tower.blocks) * 64 + weights(tower.merger) * 16 + 2 * 2 * 64 * 64 * 64
    # A prompt of 68 tokens, of which attention computes all pairs, and 8 x 3 fed tokens that see
    # it and themselves; 2 layers of 4 heads x 32. The last MLP has only the 8 x 4 rows that
    # predict.
    fed = 8 * 3
    language = weights(layers) * (68 + fed) - weights(layers[-1].mlp) * (68 + fed - 32)
    language += 2 * 2 * 128 * (68 * 68 + fed * (68 + 3))
    head = 1024 * 128 * 32
    # A backward pass is two forward passes: the pixels take no gradient, attention computes its
    # scores again, and the head its logits.
    scores = 64 * 64 * 64 * 2 + 128 * 2 * (68 * 68 + fed * (68 + 3))
    want = 2 * (3 * (vision + language) + 2 * embedding + 4 * head + scores)
    assert both.flops["update"] == pytest.approx(want, rel=0.01)
    assert both.flops["step"] == both.flops["sample"] + both.flops["update"]
