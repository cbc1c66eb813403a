"""README.md: it stays short, and its numbers and reading order are those of the code."""
import argparse
import ast
import re
from pathlib import Path

import rft
import sft
from train.flags import default_epochs, set_steps

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_readme_stays_short() -> None:
    assert len(README.splitlines()) <= 170
    assert len(README.encode()) <= 12_000


def test_steps_by_number_of_records_are_those_of_the_stages() -> None:
    rows = re.findall(
        r"\| ([\d,]+) \| `--epochs ([\d.]+)` \| ([\d,]+) \| `--epochs ([\d.]+)` \| ([\d,]+) \|",
        README)
    assert len(rows) == 3
    batch, prompts = sft.flags().get_default("batch"), rft.flags().get_default("prompts")
    assert f"steps of {batch} records" in README and f"steps of {prompts} questions" in README
    for records, *columns in rows:
        n = int(records.replace(",", ""))
        stages = ("sft", "rft")
        for stage, epochs, steps, per_step in zip(
                stages, columns[::2], columns[1::2], (batch, prompts)):
            args = argparse.Namespace(steps=None, epochs=float(epochs), every=None)
            set_steps(args, stage, n, per_step)
            assert args.steps == int(steps.replace(",", ""))
            # They are what a stage chooses by itself.
            assert default_epochs(stage, n) == float(epochs)


def test_formulas_have_the_defaults_of_the_code() -> None:
    args = rft.flags().parse_args([])
    mean, variance = args.lambdas
    assert args.alpha / 2 == 1.25 and "sx = 1.25 W" in README
    assert variance == 1 and f"w = exp({mean:g} (1 - m) + v)" in README
    assert f"clip(r, {1 - args.clip[0]:g}, {1 + args.clip[1]:g}) A" in README
    assert f"- {args.beta:g} KL" in README
    assert args.group == 8 and "writes eight answers" in README
    assert args.reward == {"iou": 1, "positional": 0.1, "format": 1}
    assert "R = IoU + 0.1 P + format" in README


def test_the_reading_order_names_what_its_files_define() -> None:
    stops = re.findall(r"^(\d)\. (`\w.*)$", README, re.MULTILINE)
    assert [number for number, _ in stops] == list("123456789")
    for _, text in stops:
        files = re.findall(r"`([\w/]+\.py)`", text)
        defined = set()
        for file in files:
            tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
            defined |= {node.name for node in ast.walk(tree)
                        if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
        # Frame is the processor's import.
        names = set(re.findall(r"`([A-Za-z_]+)`", text)) - {"Frame"}
        assert names and names <= defined, text


def test_every_file_of_the_map_exists_and_every_script_and_folder_is_in_it() -> None:
    drawn = README.split("## The code\n\n```\n", 1)[1].split("```", 1)[0]
    named = set()
    for line in drawn.splitlines():
        named |= set(re.split(r"\s{3,}", line)[0].split())
    assert all((ROOT / name).exists() for name in named)
    modules = {path.name for path in ROOT.glob("*.py")}
    packages = {f"{path.parent.name}/" for path in ROOT.glob("*/__init__.py")}
    assert modules | packages <= named
