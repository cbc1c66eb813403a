"""bench.py runs and writes what it says; memory does not grow with tokens times vocabulary."""
import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import bench
from model import Config, QwenVL

SCORE = """
import resource, sys, torch
from pathlib import Path
sys.path.insert(0, {here!r})
from model import QwenVL
from bench import random_ids, random_prompt, write_checkpoint
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
        run: Callable[..., subprocess.CompletedProcess], tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    bench = run("bench.py", "--shape", "tiny", "--repeats", 1, "--prompts", 2, "--tokens", 8,
                "--device", "cpu", "--out", tmp_path)
    assert bench.returncode == 0, bench.stderr
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
    assert len(report["profile"]) == 10
    assert 0 < sum(event["share"] for event in report["profile"]) <= 1
    differences = [r["gradient_difference"] for r in rows if "gradient_difference" in r]
    assert len(differences) == 1 and differences[0] < 1e-4
