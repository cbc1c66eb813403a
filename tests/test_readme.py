"""README.md: its commands and files exist."""
import argparse
import itertools
import re
from pathlib import Path

import reward
import rft
import sft
from train import run as runtime

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SCRIPTS = {"sft.py": sft.flags, "rft.py": rft.flags}


def options(parser: argparse.ArgumentParser) -> set[str]:
    """All flags of a script."""
    return set(itertools.chain.from_iterable(a.option_strings for a in parser._actions))


def test_the_table_of_settings_has_the_defaults_of_the_code() -> None:
    args = rft.flags().parse_args([])
    table = README.split("## Whose settings", 1)[1].split("\n## ", 1)[0]
    weights = runtime.as_typed(args.reward)
    for text in (f"`--reward {weights}`", f"`--alpha {args.alpha:g}`",
                 f"`--weighting {args.weighting}`", f"`--prompts {args.prompts}`",
                 f"`--group {args.group}`", f"`--lr {args.lr:.0e}".replace("e-06", "e-6"),
                 f"--beta {args.beta:g} --clip {args.clip[0]:g} {args.clip[1]:g}`"):
        assert text in table, text
    assert f"`--lambdas {args.lambdas[0]:g} {args.lambdas[1]:g}`" in table
    assert args.temperature == 1 and "T=1" in table and not args.no_std


def test_the_table_of_objectives_has_the_choices_and_defaults_of_the_code() -> None:
    args = rft.flags().parse_args([])
    table = README.split("### Objectives", 1)[1].split("\n## ", 1)[0]
    rows = [line for line in table.splitlines() if line.startswith("| ")]
    for flag, choices in (("loss", rft.LOSSES), ("ratio", rft.RATIOS), ("kl", rft.KLS)):
        for choice in choices:
            row, = (line for line in rows if f"`--{flag} {choice}`" in line)
            assert ("*default*" in row) == (choice == getattr(args, flag)), row
    assert f"clip, *default* {args.clip[0]:g} {args.clip[1]:g} |" in table
    assert set(re.findall(r"--[a-z][a-z-]*", table)) <= options(rft.flags())
    for name in ("dual_clip", "mask_truncated", "importance_cap", "resample", "no_std"):
        assert not getattr(args, name) and f"--{name.replace('_', '-')}" in table
    assert args.updates == args.minibatches == 1


def test_files_and_flags_that_the_readme_names_exist() -> None:
    for name in re.findall(r"`((?:study/|toy/|tests/)?\w+\.(?:py|sh))`", README):
        assert (ROOT / name).exists(), name
    for script, flags in SCRIPTS.items():
        known = options(flags())
        for command in re.findall(rf"{re.escape(script)} ([^\n`#]*)", README):
            for flag in re.findall(r"--[a-z][a-z-]*", command):
                assert flag in known | {"--nproc_per_node"}, (script, flag)


def test_terms_that_the_readme_names_exist() -> None:
    named = re.search(r"`--reward ([^`]*)`", README)[1].split()
    assert {text.split("=")[0] for text in named} <= {*reward.TERMS, "format"}
