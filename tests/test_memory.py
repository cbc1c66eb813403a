"""memory.py: tensors counted by hand, plans of the real shapes, the refusal, the dry step."""
import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import bench
import lora
import memory
import rft
import runtime
from memory import GIB, ByteCounter, Step
from model import QwenVL
from played_device import PlayedDevice
from processor import Processor


def meta(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")


def test_tensors_count_from_their_making_to_their_end() -> None:
    known = meta(1000)
    with ByteCounter([known]) as counter:
        a = meta(10)                  # 40 bytes
        view = a[:5]
        assert counter.live == 40
        b = a + 1
        assert counter.live == 80
        known.view(10, 100)
        assert counter.live == 80
        del a, b
        # The view holds the storage.
        assert counter.live == 40 and view.shape == (5,)
        del view
    assert counter.live == 0 and counter.peak == 80


def test_what_a_backward_pass_keeps_counts_and_checkpointing_keeps_less() -> None:
    def squares(x: Tensor) -> Tensor:
        for _ in range(4):
            x = x * x                 # keeps its input
        return x

    peaks = []
    for keep in (True, False):
        x = meta(250).requires_grad_()
        with ByteCounter([x]) as counter:
            y = squares(x) if keep else checkpoint(squares, x, use_reentrant=False)
            kept = counter.live
            y.sum().backward()
        # Of four products the last is kept as the output alone.
        assert kept == (4000 if keep else 1000)
        peaks.append(counter.peak)
    assert peaks[0] >= 5000


# ---------------------------------------------------------------- plans of the real shapes

def flags(**changes: Any) -> argparse.Namespace:
    """rft.py's defaults on a GPU."""
    args = rft.flags().parse_args([])
    args.device = "cuda"
    args.gradient_checkpointing = True
    vars(args).update(changes)
    return args


def plan(tmp_path: Path, shape: str, gpus: int, **changes: Any) -> memory.Plan:
    """Of rft.py with images of 800 x 800, G 8 and 256 tokens on a model of this shape."""
    sizes = bench.SHAPES[shape]
    config = bench.hub_config(sizes, torch.bfloat16, sizes.vocab)
    (tmp_path / "config.json").write_text(json.dumps(config))
    args = flags(init=str(tmp_path), **changes)
    model = memory.planned_model(tmp_path, args)
    prompt = bench.random_prompt(model, 800, seed=0)
    work = memory.share(model, prompt, rft.step_size(args), args, gpus)
    return memory.make_plan(model, work, gpus, reference=bool(args.beta))


def test_full_fine_tuning_of_3b_fits_one_card_of_80(tmp_path: Path) -> None:
    full = plan(tmp_path, "3b", gpus=1)
    parameters = 3_754_622_976
    assert full.standing["trained weights, float32"] == 4 * parameters
    assert full.standing["moments, float32"] == 8 * parameters
    assert full.update["gradients, float32"] == 4 * parameters
    assert full.standing["reference, bfloat16, on each GPU"] == 2 * parameters
    assert 60 * GIB < full.peak < 79 * GIB


def test_adapters_of_3b_fit_one_card_of_24(tmp_path: Path) -> None:
    adapters = plan(tmp_path, "3b", gpus=1, lora=64)
    # A and B of seven linear layers: 119.7 million numbers.
    assert adapters.standing["trained weights, float32"] == 4 * 119_734_272
    assert adapters.standing["frozen weights"] == 2 * 3_754_622_976
    assert not any("reference" in name for name in adapters.standing)
    assert 12 * GIB < adapters.peak < 23.5 * GIB


def test_7b_fits_eight_cards_of_80(tmp_path: Path) -> None:
    sharded = plan(tmp_path, "7b", gpus=8)
    assert sharded.standing["moments, float32"] == 8 * 8_292_166_656 / 8
    assert 30 * GIB < sharded.peak < 79 * GIB


def test_a_patch_and_a_token_keep_what_the_budget_says(tmp_path: Path) -> None:
    """--micro-tokens counts a patch as PATCH_TOKENS of a token: without checkpointing they keep
    about so much at 3B widths."""
    sizes = bench.SHAPES["3b"]
    config = bench.hub_config(sizes, torch.bfloat16, sizes.vocab)
    (tmp_path / "config.json").write_text(json.dumps(config))
    args = flags(init=str(tmp_path), gradient_checkpointing=False)
    model = memory.planned_model(tmp_path, args)
    prompt = bench.random_prompt(model, 800, seed=0)
    kept = []
    for trained in (True, False):
        model.visual.requires_grad_(trained)
        with ByteCounter(list(model.parameters())) as counter:
            model.score([prompt], [[torch.zeros(256, dtype=torch.long)]])[0]
            kept.append(counter.peak)
    patch = (kept[0] - kept[1]) / len(prompt.pixels)
    token = kept[1] / (len(prompt.input_ids) + 255)
    assert 0.7 * runtime.PATCH_TOKENS < patch / token < 1.4 * runtime.PATCH_TOKENS


# ---------------------------------------------------------------- the commands

def test_a_plan_is_printed_without_a_gpu_and_its_status_says_whether_it_fits(
        tiny_checkpoint: Path, run: Callable[..., Any]) -> None:
    common = ("rft.py", "--plan", "--init", tiny_checkpoint, "--image", 112, 112)
    fits = run(*common, "--gpus", 2)
    assert fits.returncode == 0 and "memory of each of 2 GPUs, GiB" in fits.stdout
    for row in ("trained weights, float32", "KV cache, prompts, logits", "needed at most"):
        assert row in fits.stdout
    tight = run(*common, "--memory", 1)
    assert tight.returncode == 2 and len(tight.stderr.strip().splitlines()) == 1
    assert "take more GPUs" in tight.stderr
    odd = run(*common, "--gpus", 3)
    assert odd.returncode == 2 and "take a multiple" in odd.stderr


def test_a_plan_of_sft_looks_at_the_data(
        tiny_checkpoint: Path, run: Callable[..., Any]) -> None:
    plan = run("sft.py", "--plan", "--init", tiny_checkpoint, "--batch", 4)
    assert plan.returncode == 0 and "while sampling" not in plan.stdout
    assert "gradients, float32" in plan.stdout


def test_a_refusal_names_the_flags_that_help(
        tiny_checkpoint: Path, capsys: pytest.CaptureFixture) -> None:
    processor = Processor.from_pretrained(tiny_checkpoint)
    prompt = memory.longest_prompt(processor, [(112, 112), (280, 140)], ["a", "the longer one"])
    assert prompt.image_grid_thw.tolist() == [[1, 10, 20]]
    args = flags(init=str(tiny_checkpoint), gradient_checkpointing=False, max_new_tokens=64)
    needed = memory.plan_of(args, Step(8, 8, True), prompt, 1).peak
    with pytest.raises(SystemExit) as leaving:
        memory.check(args, Step(8, 8, True), prompt, 1, needed - 1)
    line = capsys.readouterr().err.strip()
    assert leaving.value.code == 2 and "\n" not in line
    assert "with --gradient-checkpointing it needs" in line


def test_the_longest_prompt_has_the_most_patches_and_the_longest_text(
        tiny_checkpoint: Path) -> None:
    processor = Processor.from_pretrained(tiny_checkpoint)
    short = memory.longest_prompt(processor, [(112, 112)], ["the ship"])
    long = memory.longest_prompt(processor, [(112, 112)], ["the ship", "the ship at the pier"])
    assert len(long.input_ids) - len(short.input_ids) == len(" at the pier")
    unknown = memory.longest_prompt(processor, [(112, 112)], [])
    empty = processor.turns(memory.PROMPT, 16, text="")
    assert len(unknown.input_ids) == len(empty) + memory.TEXT_TOKENS


# ---------------------------------------------------------------- beside a played device

@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of 3B's widths, of two layers and two blocks."""
    sizes = replace(
        bench.SHAPES["3b"], depth=2, full_blocks=(1,), layers=2, vocab=8192, image_side=112)
    with mock.patch.dict(bench.SHAPES, wide=sizes):
        return bench.write_checkpoint(
            tmp_path_factory.mktemp("wide"), "wide", torch.bfloat16)


@pytest.mark.parametrize("changes", [
    {"gradient_checkpointing": True}, {"gradient_checkpointing": False}, {"lora": 16}])
def test_the_plan_counts_what_a_device_of_true_widths_holds(
        wide: Path, changes: dict[str, Any]) -> None:
    args = flags(init=str(wide), max_new_tokens=24, **changes)
    planned = memory.planned_model(wide, args)
    prompt = bench.random_prompt(planned, 112, seed=0)
    work = memory.Workload(prompt, 2, 2, 4, 24, samples=True)
    update = memory.update_bytes(planned, work, reference=False)
    sampling = memory.sampling_bytes(planned, work)
    with PlayedDevice() as gpu:
        model = QwenVL.from_pretrained(wide, torch.bfloat16, "cuda")
        if args.lora:
            lora.add(model, args.lora, 1.0, False, 0)
            model.to(torch.bfloat16)
        runtime.choose_trained(model, False, args.gradient_checkpointing)
        # On a GPU too a whole gradient leaves as soon as it is reduced.
        for p in model.parameters():
            if p.requires_grad:
                p.register_post_accumulate_grad_hook(memory.drop_gradient)
        standing = gpu.live_bytes
        expected = memory.make_plan(planned, work, 1, False)
        weights = expected.sampling["weights for sampling, bfloat16, on each GPU"]
        assert abs(standing / weights - 1) < 0.1
        gpu.reset_peak()
        memory.update_pass(model, None, work)
        assert abs((gpu.peak_bytes - standing) / update - 1) < 0.1
        gpu.reset_peak()
        memory.sampling_pass(model, work)
        assert abs((gpu.peak_bytes - standing) / sampling - 1) < 0.1


def test_a_dry_step_leaves_weights_and_puts_moments_in_place(tiny_checkpoint: Path) -> None:
    processor = Processor.from_pretrained(tiny_checkpoint)
    prompt = memory.longest_prompt(processor, [(112, 112)], ["the ship"])
    work = memory.Workload(prompt, 2, 1, 3, 8, samples=True)
    with PlayedDevice() as gpu:
        model = QwenVL.from_pretrained(tiny_checkpoint, torch.float32, "cuda").requires_grad_()
        opt = runtime.optimizer(model, 1e-3)
        before = [p.detach().clone() for p in model.parameters()]
        memory.dry_step(model, opt, None, work)
        for p, was in zip(model.parameters(), before, strict=True):
            assert torch.equal(p, was) and p.grad is None
            assert opt.state[p]["step"] == 0 and not opt.state[p]["exp_avg"].any()
        gpu.memory.total = gpu.live_bytes + 1000
        with pytest.raises(SystemExit) as leaving:
            memory.dry_step(model, opt, None, work)
    assert leaving.value.code == 2
