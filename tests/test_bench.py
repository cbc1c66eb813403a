"""bench.py runs and writes what it says; memory does not grow with tokens times vocabulary."""
import json
import subprocess
import sys
from pathlib import Path

import pytest

SCORE = """
import resource, sys, torch
sys.path.insert(0, {here!r})
from model import Config, Plan, QwenVL
from processor import Prompt
from bench import write_checkpoint, prompt, words
from pathlib import Path
model = QwenVL.from_pretrained(write_checkpoint(Path({folder!r}), "tiny", torch.float32, 151_936), torch.float32).requires_grad_(True)
def update(rollouts):
    model.zero_grad(set_to_none=True)
    logp, _ = model.score([prompt(model, 112, 0)], [[words(model, 100, g) for g in range(rollouts)]])
    (-logp.mean()).backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(update(4), update(16))
"""


def test_memory_of_an_update_does_not_grow_with_tokens_times_vocabulary(tmp_path):
    """1,200 more tokens would hold 1,200 x 151,936 more logits, 0.7 GB in float32 and as much again for each gradient of them."""
    code = SCORE.format(here=str(Path(__file__).parents[1]), folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    few, many = map(float, done.stdout.split())
    assert many - few < 200, (few, many)


def test_the_table_has_a_row_for_every_part_beside_transformers(run, tmp_path):
    pytest.importorskip("transformers")
    done = run("bench.py", "--shape", "tiny", "--repeats", 1, "--prompts", 2, "--tokens", 8, "--device", "cpu", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "bench.json").read_text())
    rows = report["rows"]
    assert {r["name"] for r in rows if "transformers" in r["peer"]} == {"load", "prefill", "decode", "update", "step", "sft", "images"}
    for r in rows:
        if "(difference)" in r["peer"]:                                  # of two noisy times, over too few tokens here: of either sign
            assert r["ratio"] == r["theirs"] / r["ours"]
            continue
        assert r["ours"] > 0 and r["theirs"] > 0 and r["spread"][0] <= r["ratio"] * 1.001 <= r["spread"][1] * 1.002, r
        faster = r["theirs"] / r["ours"] if r["unit"] in ("s", "MiB at peak") else r["ours"] / r["theirs"]
        assert abs(faster / r["ratio"] - 1) < 1e-6                       # above 1 means that ours is faster or smaller
    assert report["numerics"]["sampled_scored"]["largest"] < 1e-4 and report["numerics"]["dtype_float32"]["largest"] < 1e-4
    assert len(report["profile"]) == 10 and 0 < sum(e["share"] for e in report["profile"]) <= 1
    assert next(r for r in rows if "gradient_difference" in r)["gradient_difference"] < 1e-4
