"""study/paper.sh: the paper's experiment from a base to one table, tiny, with a real server."""
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from test_cot import FakeServer

ROOT = Path(__file__).parents[1]


@pytest.fixture
def server() -> Iterator[FakeServer]:
    """A teacher on the loopback, which answers rightly."""
    server = FakeServer()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def data_root(dior_root: Path, tmp_path: Path) -> Path:
    """A folder with DIOR-RSVG's layout and a data set that nothing is trained on."""
    root = tmp_path / "data"
    shutil.copytree(dior_root, root / "dior")
    (root / "jsonl").mkdir()
    Image.new("RGB", (120, 90), "green").save(root / "jsonl" / "field.png")
    line = {"image": "field.png", "text": "the field", "box": [10, 10, 60, 50]}
    (root / "jsonl" / "test.jsonl").write_text(json.dumps(line) + "\n")
    return root


def environment(server: FakeServer, init: Path, data_root: Path, out: Path) -> dict[str, str]:
    short = "--every 1 --val 0 --device cpu"
    return {
        **os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PY": sys.executable,
        "INIT": str(init), "ROOT": str(data_root), "OUT": str(out), "OUTSIDE": "jsonl",
        "TEACHER": server.url, "MODEL": "big", "COT_FLAGS": "--parallel 2",
        "SFT_FLAGS": f"--steps 3 --batch 2 {short} --max-new-tokens 8",
        "RFT_FLAGS": f"--steps 2 --prompts 2 --group 2 {short} --max-new-tokens 8",
        "EVAL_FLAGS": "--device cpu --max-new-tokens 8",
    }


def run_paper(env: dict[str, str], stop_at: Path | None = None) -> subprocess.Popen:
    """Runs the script to its end, or kills it with all its children when stop_at appears."""
    script = subprocess.Popen(
        ["bash", "study/paper.sh", "dior"], cwd=ROOT, env=env, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
    while stop_at and not stop_at.exists() and script.poll() is None:
        time.sleep(0.05)
    if stop_at:
        os.killpg(script.pid, 9)
    return script


def test_the_whole_experiment_goes_on_where_it_was_stopped(
        server: FakeServer, tiny_checkpoint: Path, data_root: Path, tmp_path: Path) -> None:
    out = tmp_path / "paper"
    env = environment(server, tiny_checkpoint, data_root, out)
    # Stopped while the teacher writes, in the middle of SFT, and of RFT.
    for stop_at in (out / "cot.jsonl", out / "stages/sft/latest", out / "stages/rft/latest"):
        run_paper(env, stop_at).communicate()
        assert stop_at.exists()
    script = run_paper(env)
    printed, _ = script.communicate()
    assert script.returncode == 0, printed

    # All 16 training records have the teacher's reasoning, each once.
    lines = [json.loads(line) for line in (out / "cot.jsonl").read_text().splitlines()]
    assert len(lines) == 16 and len({line["id"] for line in lines}) == 16
    # A stage that was stopped went on: its log has every step once.
    for stage, steps in (("sft", 3), ("rft", 2)):
        log = (out / "stages" / stage / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in log] == list(range(1, steps + 1))
    run = json.loads((out / "stages/sft/latest/run.json").read_text())
    assert run["flags"]["cot"] == str(out / "cot.jsonl")
    # One table: base, CoT-SFT and RFT, in domain and outside of it.
    table = (out / "table.md").read_text()
    assert table in printed
    rows = table.splitlines()
    assert "dior test (4): Pr@0.5" in rows[0] and "jsonl test (1): mIoU" in rows[0]
    assert [row.split(" | ")[0] for row in rows[2:]] == ["| base", "| sft", "| rft"]

    # What is finished is not done again.
    requests = len(server.requests)
    again = run_paper(env)
    printed, _ = again.communicate()
    assert again.returncode == 0 and table in printed
    assert len(server.requests) == requests


def test_without_a_data_set_or_a_base_it_says_so_in_one_line() -> None:
    script = subprocess.run(
        ["bash", "study/paper.sh", "dior"], cwd=ROOT, capture_output=True, text=True,
        env={"PATH": os.environ["PATH"]})
    assert script.returncode == 2 and len(script.stderr.splitlines()) == 1
    assert "INIT=CHECKPOINT" in script.stderr
