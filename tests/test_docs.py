"""docs/logs.md: it explains every key that the commands write, and no other."""
import json
import re
from pathlib import Path

from conftest import Run

LOGS = (Path(__file__).parents[1] / "docs" / "logs.md").read_text(encoding="utf-8")
# Keys that are logged only if something goes wrong.
TROUBLE = {"warning", "unreadable"}
TERMS = ("iou", "positional", "format")           # of the default reward


def explained(words: str) -> set[str]:
    """The keys in the table that follows these words."""
    lines = LOGS.split(words, 1)[1].split("| key | meaning |\n|---|---|\n", 1)[1].splitlines()
    keys = []
    for line in lines[:lines.index("") if "" in lines else len(lines)]:
        key, meaning = re.fullmatch(r"\| `([^`]+)` \| (.*) \|", line).groups()
        assert meaning.endswith("."), line
        keys.append(key)
    assert len(keys) == len(set(keys))
    return set(keys)


def test_every_key_of_metrics_jsonl_is_explained_and_no_other(
        tiny_checkpoint: Path, run: Run, tmp_path: Path) -> None:
    flags = ("--init", tiny_checkpoint, "--data", "synth", "--device", "cpu", "--steps", 1,
             "--every", 1, "--val", 2, "--max-new-tokens", 4)
    more = {"sft.py": ("--batch", 2), "rft.py": ("--prompts", 2, "--group", 2, "--resample", 1)}
    logged = set()
    for script, own in more.items():
        done = run(script, *flags, *own, "--out", tmp_path / script)
        assert done.returncode == 0, done.stderr
        logged |= json.loads((tmp_path / script / "metrics.jsonl").read_text()).keys()
    keys = explained("## metrics.jsonl") - {"TERM", "TERM_group_std"}
    for term in TERMS:
        keys |= {term, f"{term}_group_std"}
    assert logged - TROUBLE == keys - TROUBLE
