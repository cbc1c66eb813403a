"""README.md and docs/: links, commands, flags and names are right, and every logged key is
explained."""
import argparse
import ast
import importlib
import itertools
import json
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import cot
import eval as evaluation
import reward
import rft
import sft
from conftest import Run
from train.flags import as_typed

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
TEXTS = {page: page.read_text(encoding="utf-8") for page in PAGES}
METHOD = TEXTS[ROOT / "docs" / "method.md"]
LOGS = TEXTS[ROOT / "docs" / "logs.md"]
PARSERS = {"sft.py": sft.flags, "rft.py": rft.flags, "eval.py": evaluation.flags,
           "cot.py": cot.flags}
# Flags of other programs.
OTHER_FLAGS = {"--nproc_per_node", "--signal", "--requeue"}
HELP: dict[str, set[str]] = {}                    # script -> its flags, read once
# Keys that are logged only if something goes wrong.
TROUBLE = {"warning", "unreadable"}
TERMS = ("iou", "positional", "format")           # of the default reward


def options(parser: argparse.ArgumentParser) -> set[str]:
    """All flags of a script."""
    return set(itertools.chain.from_iterable(a.option_strings for a in parser._actions))


# ---------------------------------------------------------------- links

def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    found = set()
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE):
        plain = re.sub(r"[^\w\- ]", "", heading.lower())
        found.add(plain.replace(" ", "-"))
    return found


@pytest.mark.parametrize("page", [*PAGES, ROOT / "LOG.md"], ids=lambda page: page.name)
def test_links_and_anchors_resolve(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if link.startswith("http"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.read_text(encoding="utf-8")), link


# ---------------------------------------------------------------- commands

def commands(text: str) -> Iterator[list[str]]:
    """The words of each command, from python, torchrun or bash on, in bash blocks and in lines."""
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    programs = "(?:python|torchrun|bash) "
    lines += re.findall(rf"`([^`\n]*{programs}[^`\n]*(?:\.py|\.sh|-m )[^`\n]*)`", text)
    for line in lines:
        words = shlex.split(line, comments=True)
        for i, word in enumerate(words):
            if word in ("python", "torchrun", "bash"):
                yield words[i:]
                break


def script_and_flags(words: list[str]) -> tuple[str, list[str]]:
    """A command's script, as a path, and the words after it."""
    if words[1] == "-m":
        return words[2].replace(".", "/") + ".py", words[3:]
    start = next(i for i, word in enumerate(words) if word.endswith((".py", ".sh")))
    return words[start], words[start + 1:]


@pytest.fixture
def known_flags(run: Run) -> Callable[[str], set[str]]:
    """A script's path -> its flags, as its --help has them."""
    def known(script: str) -> set[str]:
        if script not in HELP:
            done = run(script, "--help")
            assert done.returncode == 0, done.stderr
            HELP[script] = set(re.findall(r"--[a-z][a-z-]*", done.stdout))
        return HELP[script]
    return known


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_name_scripts_and_flags_that_exist(
        page: Path, known_flags: Callable[[str], set[str]]) -> None:
    for words in commands(TEXTS[page]):
        script, flags = script_and_flags(words)
        assert (ROOT / script).exists(), words
        # Placeholders and variables of the shell are not flags.
        flags = [word for word in flags if word != "&" and not word.startswith("$")]
        if script in PARSERS:
            PARSERS[script]().parse_args(flags)
        elif script.endswith(".py"):
            assert {word for word in flags if word.startswith("--")} <= known_flags(script), words


def test_every_flag_that_is_mentioned_exists(known_flags: Callable[[str], set[str]]) -> None:
    known = set(OTHER_FLAGS)
    for flags in PARSERS.values():
        known |= options(flags())
    for script in ("data.py", "tools/bench.py", "tools/merge_lora.py"):
        known |= known_flags(script)
    for page, text in TEXTS.items():
        if page.parent.name == "results":
            continue                             # tables of former versions
        assert set(re.findall(r"(?<![\w-])--[a-z][a-z_-]*", text)) <= known, page


@pytest.mark.parametrize("script", PARSERS)
def test_no_flag_can_be_abbreviated(script: str, capsys: pytest.CaptureFixture) -> None:
    parser = PARSERS[script]()
    assert parser.parse_args(["--root", "y"]).root == "y"
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(["--roo", "y"])
    assert stop.value.code == 2
    assert "unrecognized arguments: --roo" in capsys.readouterr().err
    # Every script has this parser.
    for file in (*ROOT.glob("*.py"), *ROOT.glob("*/*.py")):
        if file.parent.name != "tests":
            expected = 1 if file.name == "flags.py" else 0
            assert file.read_text().count("ArgumentParser)") == expected, file
            assert "ArgumentParser(" not in file.read_text(), file


def test_help_says_a_default_once_and_as_it_is_typed() -> None:
    for script, flags in PARSERS.items():
        parser = flags()
        parser.format_help()                     # appends the defaults
        helps = {action.option_strings[-1]: action.help or ""
                 for action in parser._actions if action.option_strings}
        assert all(text.count("default:") <= 1 for text in helps.values()), script
        assert helps["--seed"].endswith(" (default: 0)")
    words = " ".join(rft.flags().format_help().split())
    assert "several optimizer steps (default: 0.2 0.2)" in words


def test_the_unit_of_a_data_sets_boxes_has_one_name(
        known_flags: Callable[[str], set[str]]) -> None:
    for script in (*PARSERS, "data.py"):
        assert {"--data", "--data-coords", "--root"} <= known_flags(script), script
    # What already took --coords still does.
    for parser in (sft.flags(), rft.flags()):
        for flag in ("--coords", "--data-coords"):
            assert parser.parse_args([flag, "1000"]).coords == "1000"
    for parser in (evaluation.flags(), cot.flags()):
        args = parser.parse_args(["x", "--coords", "1000", "--data-coords", "fraction"])
        assert (args.coords, args.data_coords) == ("1000", "fraction")
    for words in (["dior"], ["--data", "dior"]):
        assert cot.flags().parse_args(words).name == "dior"


# ---------------------------------------------------------------- names

def defined(file: Path) -> set[str]:
    """Names that a module defines, at the top or as methods."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_names_in_code_marks_exist(page: Path) -> None:
    if page.parent.name == "results":
        return
    for name in re.findall(r"`((?:\w+/)*\w+\.(?:py|sh))`", TEXTS[page]):
        assert (ROOT / name).exists(), name
    modules = {path.stem: path for path in (*ROOT.glob("*.py"), *ROOT.glob("qwen/*.py"))}
    for module, name in re.findall(r"`(\w+)\.(\w+)`", TEXTS[page]):
        if module in modules and name not in ("py", "json", "jsonl"):
            assert name in defined(modules[module]), f"{module}.{name}"


# ---------------------------------------------------------------- docs/method.md

def test_the_table_of_settings_has_the_defaults_of_the_code() -> None:
    args = rft.flags().parse_args([])
    table = METHOD.split("## Settings", 1)[1].split("\n## ", 1)[0]
    weights = as_typed(args.reward)
    low, high = args.clip
    for text in (f"`--reward {weights}`", f"`--alpha {args.alpha:g}`",
                 f"`--weighting {args.weighting}`", f"`--prompts {args.prompts}`",
                 f"`--group {args.group}`", f"`--lr {args.lr:.0e}`".replace("e-06", "e-6"),
                 f"`--beta {args.beta:g} --clip {low:g} {high:g}`",
                 f"`--weighting consistency {args.lambdas[0]:g} {args.lambdas[1]:g}`",
                 f"`--temperature {args.temperature:g}`", f"`--loss {args.loss}`",
                 f"`--max-new-tokens {args.max_new_tokens}`"):
        assert text in table, text
    assert not args.no_std


def test_the_table_of_objectives_has_the_choices_and_defaults_of_the_code() -> None:
    parser = rft.flags()
    args = parser.parse_args([])
    table = METHOD.split("## Objectives", 1)[1].split("\n## ", 1)[0]
    rows = [line for line in table.splitlines() if line.startswith("| ")]
    choices = {action.dest: action.choices for action in parser._actions}
    for flag in ("loss", "ratio"):
        for choice in choices[flag]:
            row, = (line for line in rows if f"`--{flag} {choice}`" in line)
            assert ("*default*" in row) == (choice == getattr(args, flag)), row
    assert f"clip, *default* {args.clip[0]:g} {args.clip[1]:g} |" in table
    assert f"KL, *default* {args.beta:g} |" in table
    for name in ("mask_truncated", "resample", "no_std"):
        assert not getattr(args, name) and f"--{name.replace('_', '-')}" in table
    assert args.updates == args.minibatches == 1


def test_every_term_and_weighting_is_in_the_method() -> None:
    for name in (*reward.TERMS, "format"):
        assert f"| `{name}` |" in METHOD, name
    assert all(re.search(rf"`(--weighting )?{name}`", METHOD) for name in rft.WEIGHTINGS)


# ---------------------------------------------------------------- docs/data.md

def test_every_data_set_is_in_the_readme_and_the_data_page() -> None:
    data = importlib.import_module("data")
    table = TEXTS[ROOT / "docs" / "data.md"]
    for name in data.READERS:
        assert f"`{name}`" in TEXTS[ROOT / "README.md"] and f"`{name}`" in table, name
    for name, counts in data.PUBLISHED.items():
        cells = [f"{counts[s]:,}" if s in counts else "" for s in ("train", "val", "test")]
        row = re.sub(r" +", " ", f"| `{name}` | {' | '.join(cells)} |")
        assert row in table, row


# ---------------------------------------------------------------- docs/logs.md

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
