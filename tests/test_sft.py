"""sft.py: what its loss counts, and the stage as a user runs it."""
import json
import math
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import data
import runtime
import sft
from model import CheckpointError, QwenVL
from processor import Processor, prompt_hash


@pytest.fixture
def parts(tiny_checkpoint, dior_root):
    model, processor = QwenVL.from_pretrained(tiny_checkpoint, dtype=None), Processor.from_pretrained(tiny_checkpoint)
    records = data.load("dior", dior_root, "train")
    completions = ["<think>a</think>", "the red one, of course", "x", '<answer>{"bbox_2d": [1, 2, 3, 4]}</answer>']
    return model, [(processor(data.open_image(r), r.text), processor.encode(c)) for r, c in zip(records, completions)]


def settings(**changes):
    return SimpleNamespace(**vars(sft.flags().parse_args([])) | {"micro_tokens": 10 ** 6, "steps": 100, "lr": 3e-3} | changes)


def gradient(monkeypatch, model, examples, micro_tokens):
    kept = {}

    def keep(model, opt, lr, max_norm=1.0):
        kept.update({n: p.grad.clone() for n, p in model.named_parameters()})
        model.zero_grad()
        return 1.0
    monkeypatch.setattr(runtime, "update", keep)
    return sft.train_step(model, None, examples, settings(micro_tokens=micro_tokens), 0), kept


def test_the_loss_is_the_mean_over_the_completions_tokens_end_of_turn_included(monkeypatch, parts):
    """Against the plain path: each sequence alone, all its logits, cross entropy on the completion's places."""
    model, examples = parts
    line, grads = gradient(monkeypatch, model, examples, 10 ** 6)
    losses, tokens = [], 0
    for prompt, completion in examples:
        ids = torch.cat((prompt.input_ids, completion))
        logits = model(ids[None], None, prompt.pixel_values, prompt.image_grid_thw)[0, len(prompt.input_ids) - 1:-1]
        logits = logits.masked_fill(model.banned, -torch.inf)
        losses.append(torch.nn.functional.cross_entropy(logits, completion, reduction="sum"))
        tokens += len(completion)
        assert completion[-1] == 258                                     # <|im_end|>
    want = sum(losses) / tokens
    want.backward()
    assert math.isclose(line["loss"], want.item(), rel_tol=1e-5) and line["completion_tokens"] == tokens
    for name, p in model.named_parameters():
        assert (grads[name] - p.grad).norm() <= 1e-4 * p.grad.norm(), name


def test_every_token_of_a_completion_has_its_term_and_padding_none(parts):
    model, examples = parts
    prompts, completions = zip(*examples)                                # of unequal length
    logp, _ = model.score(prompts, [[c] for c in completions])
    assert len(logp) == sum(map(len, completions))


@pytest.mark.parametrize("items", [1, 3])
def test_the_gradient_does_not_depend_on_the_micro_batch(monkeypatch, parts, items):
    model, examples = parts
    budget = max(sum(len(p.input_ids) + len(c) for p, c in examples[i:i + items]) for i in range(2)) if items > 1 else 1
    _, want = gradient(monkeypatch, model, examples, 10 ** 6)
    _, got = gradient(monkeypatch, model, examples, budget)
    assert all((got[n] - want[n]).norm() <= 1e-4 * want[n].norm() for n in want)


def test_one_batch_is_learned_by_heart(parts):
    model, examples = parts
    opt = runtime.optimizer(model, 3e-3)
    lines = [sft.train_step(model, opt, examples, settings(), step) for step in range(100)]
    assert lines[0]["loss"] > 3 and lines[-1]["loss"] < 0.01


def test_one_small_step_changes_the_float32_master(parts):
    """lr 1e-6 on a bfloat16 parameter would round away."""
    model, examples = parts
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    sft.train_step(model, runtime.optimizer(model, 1e-6), examples, settings(lr=1e-6, steps=10), 5)
    moved = [(p.detach() - before[n]).abs().max().item() for n, p in model.named_parameters()]
    assert all(m > 0 for m in moved) and max(moved) < 5e-6
    assert sum((p.detach().bfloat16() != before[n].bfloat16()).sum().item() for n, p in model.named_parameters()) < 2000


def train(run, checkpoint, root, out, *more, processes=None):
    done = run("sft.py", "--data", "dior", "--root", root, "--init", checkpoint, "--out", out, "--steps", 4, "--batch", 4,
               "--micro-tokens", 1, "--lr", 1e-3, "--val", 1, "--every", 2, "--max-new-tokens", 8, "--device", "cpu",
               *more, processes=processes)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_one_and_two_processes_and_a_resume_agree(run, tiny_checkpoint, dior_root, tmp_path):
    whole = train(run, tiny_checkpoint, dior_root, tmp_path / "one")
    two = train(run, tiny_checkpoint, dior_root, tmp_path / "two", processes=2)          # of which one has no record to validate
    assert all(math.isclose(a[k], b[k], rel_tol=1e-4) for a, b in zip(whole, two) for k in ("loss", "grad_norm"))
    straight = load_file(tmp_path / "one" / "latest" / "model.safetensors")
    shared = load_file(tmp_path / "two" / "latest" / "model.safetensors")
    assert all((straight[n] - shared[n]).abs().max() < 1e-4 for n in straight)

    (tmp_path / "one" / "latest").unlink()
    (tmp_path / "one" / "latest").symlink_to("step_000002")
    done = run("sft.py", "--out", tmp_path / "one", "--resume")           # all other flags are the run's
    assert done.returncode == 0, done.stderr
    again = [json.loads(line) for line in (tmp_path / "one" / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in again] == [line["loss"] for line in whole]          # bit for bit, and nothing logged twice
    resumed = load_file(tmp_path / "one" / "latest" / "model.safetensors")
    assert all(torch.equal(resumed[n], straight[n]) for n in straight)
    (tmp_path / "one" / "latest").unlink()
    (tmp_path / "one" / "latest").symlink_to("step_000002")
    train(run, tiny_checkpoint, dior_root, tmp_path / "one", "--resume", processes=2)     # one process's state read by two
    spread = load_file(tmp_path / "one" / "latest" / "model.safetensors")
    assert all((spread[n] - straight[n]).abs().max() < 1e-4 for n in straight)
    record = json.loads((tmp_path / "one" / "latest" / "run.json").read_text())
    assert record["data"] == "dior" and record["root"] == str(dior_root) and record["prompt_hash"] == prompt_hash()


def test_frozen_vision_stays_what_it_was(run, tiny_checkpoint, dior_root, tmp_path):
    train(run, tiny_checkpoint, dior_root, tmp_path / "out", "--freeze-vision")
    before, after = load_file(tiny_checkpoint / "model.safetensors"), load_file(tmp_path / "out" / "latest" / "model.safetensors")
    assert all(torch.equal(before[n], after[n]) == n.startswith("visual.") for n in before)


def test_ones_own_reasoning_is_read_and_its_mistakes_are_named(run, tiny_checkpoint, dior_root, tmp_path):
    records, file = data.load("dior", dior_root, "train"), tmp_path / "own.jsonl"
    file.write_text("".join(json.dumps({"id": r.id, "think": "it is there."}) + "\n" for r in records))
    train(run, tiny_checkpoint, dior_root, tmp_path / "out", "--cot", file)
    for text, words in [("{}\n", "line 1"), (json.dumps({"id": records[0].id, "think": "x"}), "no reasoning for"),
                        (json.dumps({"id": "0", "think": "</think>"}), "without <think>")]:
        file.write_text(text)
        done = run("sft.py", "--data", "dior", "--root", dior_root, "--init", tiny_checkpoint, "--out", tmp_path / "no",
                   "--cot", file)
        assert done.returncode == 2 and words in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_a_run_whose_gradient_stays_not_finite_stops(run, tiny_checkpoint, dior_root, tmp_path):
    done = run("sft.py", "--data", "dior", "--root", dior_root, "--init", tiny_checkpoint, "--out", tmp_path / "out", "--steps", 12,
               "--batch", 2, "--val", 0, "--every", 12, "--lr", 1e30, "--device", "cpu")
    assert done.returncode == 2 and "no gradient is finite from step 2 on" in done.stderr, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [line["finite"] for line in lines[-runtime.STOP_AFTER_SKIPPED:]] == [False] * runtime.STOP_AFTER_SKIPPED and len(lines) < 12


def test_a_last_step_whose_gradient_is_not_finite_is_no_success(monkeypatch, capfd, tiny_checkpoint, dior_root, tmp_path):
    here(monkeypatch, tiny_checkpoint, dior_root, tmp_path / "out", "--lr", 1e30, "--steps", 3)
    with pytest.raises(SystemExit) as leaving:
        sft.main()
    assert leaving.value.code == 2 and "no gradient is finite from step 2 on; lower --lr" in capfd.readouterr().err


def here(monkeypatch, checkpoint, root, out, *more):
    """The command line of a short run in this process."""
    flags = ["--data", "dior", "--root", root, "--init", checkpoint, "--out", out, "--batch", 2, "--val", 1, "--every", 2,
             "--max-new-tokens", 4, "--device", "cpu", *more]
    monkeypatch.setattr(sys, "argv", ["sft.py", *map(str, flags)])


def test_a_crash_between_checkpoint_and_log_loses_no_line(monkeypatch, tiny_checkpoint, dior_root, tmp_path):
    save = runtime.save

    def killed(*args):
        save(*args)
        raise KeyboardInterrupt
    monkeypatch.setattr(runtime, "save", killed)
    here(monkeypatch, tiny_checkpoint, dior_root, tmp_path / "out", "--steps", 4)
    with pytest.raises(KeyboardInterrupt):
        sft.main()
    monkeypatch.setattr(runtime, "save", save)
    here(monkeypatch, tiny_checkpoint, dior_root, tmp_path / "out", "--resume")
    sft.main()
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], "val_mIoU" in line) for line in lines] == [(1, False), (2, True), (3, False), (4, True)]


def test_an_output_or_a_processor_that_does_not_fit_is_said_before_training(monkeypatch, tiny_checkpoint, dior_root, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(QwenVL, "from_pretrained", lambda *a, **k: pytest.fail("the weights were loaded"))
    here(monkeypatch, tiny_checkpoint, dior_root, tmp_path / "file")
    with pytest.raises(SystemExit):
        sft.main()
    monkeypatch.undo()
    other = tmp_path / "other"
    other.mkdir()
    for file in tiny_checkpoint.iterdir():
        (other / file.name).write_text(file.read_text().replace('"patch_size": 14', '"patch_size": 16')) if "pre" in file.name else (
            other / file.name).symlink_to(file)
    here(monkeypatch, other, dior_root, tmp_path / "out")
    with pytest.raises(CheckpointError, match="patch_size is 16"):
        sft.main()
