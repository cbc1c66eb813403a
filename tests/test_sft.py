"""sft.py: what its loss counts, and the stage as a user runs it."""
import argparse
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import data
import sft
from conftest import Run
from model import QwenVL
from qwen.hub import CheckpointError
from qwen.processor import Processor, prompt_hash
from sft import Example
from train import checkpoints, dist
from train import run as runtime


@pytest.fixture
def parts(tiny_checkpoint: Path, dior_root: Path) -> tuple[QwenVL, list[Example]]:
    """A model and four examples, of unequal length."""
    model = QwenVL.from_pretrained(tiny_checkpoint, dtype=None)
    processor = Processor.from_pretrained(tiny_checkpoint)
    records = data.load("dior", dior_root, "train")
    completions = ["<think>a</think>", "the red one, of course", "x",
                   '<answer>{"bbox_2d": [1, 2, 3, 4]}</answer>']
    examples = []
    for record, completion in zip(records, completions):
        prompt = processor(data.open_image(record), record.text)
        examples.append(Example(prompt, processor.encode(completion)))
    return model, examples


# ---------------------------------------------------------------- one step

def settings(**changes: Any) -> argparse.Namespace:
    """The stage's flags: one micro-batch a step, and 100 steps, unless said otherwise."""
    defaults = vars(sft.flags().parse_args([]))
    return argparse.Namespace(
        **defaults | {"micro_tokens": 10 ** 6, "steps": 100, "lr": 3e-3} | changes)


def gradient(
        monkeypatch: pytest.MonkeyPatch, model: QwenVL, examples: list[Example],
        micro_tokens: int,
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The log line of a step, and the gradient that it would have taken."""
    gradients = {}

    def keep_gradient(model: QwenVL, opt: None, lr: float) -> float:
        gradients.update({n: p.grad.clone() for n, p in model.named_parameters()})
        model.zero_grad()
        return 1.0
    monkeypatch.setattr(dist, "update", keep_gradient)
    line = sft.train_step(model, None, examples, settings(micro_tokens=micro_tokens), 0)
    return line, gradients


def test_the_loss_is_the_mean_over_the_completions_tokens_end_of_turn_included(
        monkeypatch: pytest.MonkeyPatch, parts: tuple) -> None:
    """Against the plain path: each sequence alone, all its logits, cross entropy behind it."""
    model, examples = parts
    line, gradients = gradient(monkeypatch, model, examples, 10 ** 6)
    losses = []
    tokens = 0
    for example in examples:
        prompt = example.prompt
        ids = torch.cat((prompt.input_ids, example.completion))
        logits = model(ids[None], None, prompt.pixel_values, prompt.image_grid_thw)[0]   # (T, V)
        # The logits at a place are those of the next token.
        logits = logits[len(prompt.input_ids) - 1:-1].masked_fill(model.banned, -torch.inf)
        losses.append(torch.nn.functional.cross_entropy(
            logits, example.completion, reduction="sum"))
        tokens += len(example.completion)
        assert example.completion[-1] == 258                        # <|im_end|>
    expected = sum(losses) / tokens
    expected.backward()
    assert math.isclose(line["loss"], expected.item(), rel_tol=1e-5)
    assert line["completion_tokens"] == tokens
    for name, p in model.named_parameters():
        assert (gradients[name] - p.grad).norm() <= 1e-4 * p.grad.norm(), name


def test_every_token_of_a_completion_has_its_term_and_padding_none(parts: tuple) -> None:
    model, examples = parts
    prompts = [e.prompt for e in examples]
    logp, _ = model.score(prompts, [[e.completion] for e in examples])
    assert len(logp) == sum(len(e.completion) for e in examples)


@pytest.mark.parametrize("items", [1, 3])
def test_the_gradient_does_not_depend_on_the_micro_batch(
        monkeypatch: pytest.MonkeyPatch, parts: tuple, items: int) -> None:
    model, examples = parts
    tokens = [len(e.prompt.input_ids) + len(e.completion) for e in examples]
    budget = max(sum(tokens[:3]), sum(tokens[1:])) if items == 3 else 1
    _, expected = gradient(monkeypatch, model, examples, 10 ** 6)
    _, got = gradient(monkeypatch, model, examples, budget)
    for name in expected:
        assert (got[name] - expected[name]).norm() <= 1e-4 * expected[name].norm(), name


def test_one_batch_is_learned_by_heart(parts: tuple) -> None:
    model, examples = parts
    opt = dist.optimizer(model, 3e-3)
    lines = [sft.train_step(model, opt, examples, settings(), step) for step in range(100)]
    assert lines[0]["loss"] > 3 and lines[-1]["loss"] < 0.01


def test_one_small_step_changes_the_float32_master(parts: tuple) -> None:
    """lr 1e-6 on a bfloat16 parameter would round away."""
    model, examples = parts
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    sft.train_step(
        model, dist.optimizer(model, 1e-6), examples, settings(lr=1e-6, steps=10), 5)
    changed_in_bfloat16 = 0
    for name, p in model.named_parameters():
        assert 0 < (p.detach() - before[name]).abs().max() < 5e-6, name
        changed_in_bfloat16 += (p.detach().bfloat16() != before[name].bfloat16()).sum().item()
    assert changed_in_bfloat16 < 2000


# ---------------------------------------------------------------- the command

def read_log(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoint / "model.safetensors")


def point_latest_at(out: Path, step: str) -> None:
    """As if the run had been interrupted behind an earlier step."""
    (out / "latest").unlink()
    (out / "latest").symlink_to(step)


@pytest.fixture
def train(run: Run, tiny_checkpoint: Path, dior_root: Path) -> Callable[..., list[dict]]:
    """train(out, more flags) runs four steps of the command -> the lines of its log."""
    def train(out: Path, *more: object, processes: int | None = None) -> list[dict]:
        script = run(
            "sft.py", "--data", "dior", "--root", dior_root, "--init", tiny_checkpoint,
            "--out", out, "--steps", 4, "--batch", 4, "--micro-tokens", 1, "--lr", 1e-3,
            "--val", 1, "--every", 2, "--max-new-tokens", 8, "--device", "cpu", *more,
            processes=processes)
        assert script.returncode == 0, script.stderr
        return read_log(out)
    return train


def test_one_and_two_processes_and_a_resume_agree(
        run: Run, train: Callable, dior_root: Path, tmp_path: Path) -> None:
    one = tmp_path / "one"
    lines = train(one)
    # Of two processes, one has no record to validate.
    two_lines = train(tmp_path / "two", processes=2)
    for a, b in zip(lines, two_lines):
        for key in ("loss", "grad_norm"):
            assert math.isclose(a[key], b[key], rel_tol=1e-4), key
    straight = weights(one / "latest")
    shared = weights(tmp_path / "two" / "latest")
    assert all((straight[n] - shared[n]).abs().max() < 1e-4 for n in straight)

    point_latest_at(one, "step_000002")
    script = run("sft.py", "--out", one, "--resume")                # all other flags are the run's
    assert script.returncode == 0, script.stderr
    # Bit for bit, and nothing is logged twice.
    assert [line["loss"] for line in read_log(one)] == [line["loss"] for line in lines]
    resumed = weights(one / "latest")
    assert all(torch.equal(resumed[n], straight[n]) for n in straight)

    # One process's state is read by two.
    point_latest_at(one, "step_000002")
    train(one, "--resume", processes=2)
    resumed_by_two = weights(one / "latest")
    assert all((resumed_by_two[n] - straight[n]).abs().max() < 1e-4 for n in straight)
    description = json.loads((one / "latest" / "run.json").read_text())
    assert description["data"] == "dior" and description["root"] == str(dior_root)
    assert description["prompt_hash"] == prompt_hash()


def test_a_relative_root_is_recorded_so_that_another_folder_finds_it(
        run: Run, tiny_checkpoint: Path, dior_root: Path, tmp_path: Path) -> None:
    script = run(
        "sft.py", "--data", "dior", "--root", dior_root.name, "--init", tiny_checkpoint,
        "--out", tmp_path / "out", "--steps", 1, "--batch", 1, "--val", 0, "--device", "cpu",
        cwd=dior_root.parent)
    assert script.returncode == 0, script.stderr
    description = json.loads((tmp_path / "out" / "latest" / "run.json").read_text())
    assert description["root"] == description["flags"]["root"] == str(dior_root)
    script = run("eval.py", tmp_path / "out", "--limit", 1, "--max-new-tokens", 2, cwd=tmp_path)
    assert script.returncode == 0, script.stderr


def test_frozen_vision_stays_what_it_was(
        train: Callable, tiny_checkpoint: Path, tmp_path: Path) -> None:
    train(tmp_path / "out", "--freeze-vision")
    before = weights(tiny_checkpoint)
    after = weights(tmp_path / "out" / "latest")
    for name in before:
        assert torch.equal(before[name], after[name]) == name.startswith("visual."), name


def test_ones_own_reasoning_is_read_and_its_mistakes_are_named(
        run: Run, train: Callable, tiny_checkpoint: Path, dior_root: Path, tmp_path: Path,
) -> None:
    def line(**fields: str) -> str:
        return json.dumps(fields) + "\n"
    records = data.load("dior", dior_root, "train")
    file = tmp_path / "own.jsonl"
    file.write_text("".join(line(id=r.id, think="it is there.") for r in records))
    train(tmp_path / "out", "--cot", file)
    for text, words in [("{}\n", "line 1"),
                        (line(id=records[0].id, think="x"), "no reasoning for"),
                        (line(id="0", think="</think>"), "remove the <think>")]:
        file.write_text(text)
        script = run("sft.py", "--data", "dior", "--root", dior_root, "--init", tiny_checkpoint,
                     "--out", tmp_path / "no", "--cot", file)
        assert script.returncode == 2 and words in script.stderr
        assert len(script.stderr.strip().splitlines()) == 1


def test_a_run_whose_gradient_stays_not_finite_stops(
        run: Run, tiny_checkpoint: Path, dior_root: Path, tmp_path: Path) -> None:
    script = run("sft.py", "--data", "dior", "--root", dior_root, "--init", tiny_checkpoint,
                 "--out", tmp_path / "out", "--steps", 12, "--batch", 2, "--val", 0,
                 "--every", 12, "--lr", 1e30, "--device", "cpu")
    assert script.returncode == 2, script.stderr
    assert "no gradient is finite from step 2 on" in script.stderr
    lines = read_log(tmp_path / "out")
    last = lines[-runtime.STOP_AFTER_SKIPPED:]
    assert [line["finite"] for line in last] == [False] * runtime.STOP_AFTER_SKIPPED
    # Each names the records of its batch.
    records = data.load("dior", dior_root, "sft")
    for line in last:
        names = [runtime.record_at(records, 2 * line["step"] - 2 + i, 0).id for i in range(2)]
        assert line["warning"].endswith(f"its records: {', '.join(names)}")
    assert "warning" not in lines[0]
    assert script.stderr.count("warning, step ") == runtime.STOP_AFTER_SKIPPED
    assert len(lines) < 12


# ---------------------------------------------------------------- the stage in this process

@pytest.fixture
def set_flags(
        monkeypatch: pytest.MonkeyPatch, tiny_checkpoint: Path, dior_root: Path,
) -> Callable[..., None]:
    """set_flags(out, more flags) makes this process's command line that of a short run."""
    def set_flags(out: Path, *more: object, init: Path = tiny_checkpoint) -> None:
        flags = ["--data", "dior", "--root", dior_root, "--init", init, "--out", out,
                 "--batch", 2, "--val", 1, "--every", 2, "--max-new-tokens", 4,
                 "--device", "cpu", *more]
        monkeypatch.setattr(sys, "argv", ["sft.py", *map(str, flags)])
    return set_flags


def test_a_last_step_whose_gradient_is_not_finite_is_no_success(
        set_flags: Callable, capfd: pytest.CaptureFixture, tmp_path: Path) -> None:
    set_flags(tmp_path / "out", "--lr", 1e30, "--steps", 3)
    with pytest.raises(SystemExit) as leaving:
        sft.main()
    assert leaving.value.code == 2
    assert "no gradient is finite from step 2 on; lower --lr" in capfd.readouterr().err


def test_a_crash_between_checkpoint_and_log_loses_no_line(
        monkeypatch: pytest.MonkeyPatch, set_flags: Callable, tmp_path: Path) -> None:
    save = checkpoints.save

    def save_and_die(*args: Any) -> None:
        save(*args)
        raise KeyboardInterrupt
    monkeypatch.setattr(checkpoints, "save", save_and_die)
    set_flags(tmp_path / "out", "--steps", 4)
    with pytest.raises(KeyboardInterrupt):
        sft.main()
    monkeypatch.setattr(checkpoints, "save", save)
    set_flags(tmp_path / "out", "--resume")
    sft.main()
    lines = [(line["step"], "val_mIoU" in line) for line in read_log(tmp_path / "out")]
    assert lines == [(1, False), (2, True), (3, False), (4, True)]


def test_an_output_that_cant_be_written_to_is_said_before_the_weights_are_loaded(
        monkeypatch: pytest.MonkeyPatch, set_flags: Callable, tmp_path: Path) -> None:
    def load_weights(*args: Any, **more: Any) -> None:
        pytest.fail("the weights were loaded")
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(QwenVL, "from_pretrained", load_weights)
    set_flags(tmp_path / "file")
    with pytest.raises(SystemExit):
        sft.main()


def test_a_processor_that_does_not_fit_is_said_before_training(
        set_flags: Callable, tiny_checkpoint: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for file in tiny_checkpoint.iterdir():
        (other / file.name).symlink_to(file)
    text = (tiny_checkpoint / "preprocessor_config.json").read_text()
    (other / "preprocessor_config.json").unlink()
    (other / "preprocessor_config.json").write_text(
        text.replace('"patch_size": 14', '"patch_size": 16'))
    set_flags(tmp_path / "out", init=other)
    with pytest.raises(CheckpointError, match="patch_size is 16"):
        sft.main()
