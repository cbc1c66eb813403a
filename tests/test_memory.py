"""train/memory.py: bytes counted by hand, plans of real shapes, refusals, a dry run."""
import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import eval as evaluation
import rft
import sft
from data import load
from model import QwenVL
from played_device import PlayedDevice
from qwen import lora
from qwen.processor import Processor
from tools import bench
from train import dist, memory
from train.memory import GIB, ByteCounter, Pass, Step, meta_model


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


B7 = bench.SHAPES["3b"] | {
    "num_hidden_layers": 28, "hidden_size": 3584, "num_attention_heads": 28,
    "num_key_value_heads": 4, "intermediate_size": 18944, "vocab_size": 152_064,
    "tie_word_embeddings": False,
    "vision_config": bench.SHAPES["3b"]["vision_config"] | {"out_hidden_size": 3584}}


def narrow() -> dict[str, Any]:
    """config.json of 3B's widths, with two layers and two blocks."""
    config = bench.SHAPES["3b"]
    vision = config["vision_config"] | {"depth": 2, "fullatt_block_indexes": [1]}
    return config | {"num_hidden_layers": 2, "vocab_size": 8192, "vision_config": vision}


def write_config(folder: Path, config: dict[str, Any]) -> Path:
    """config.json, which is all that a plan reads of a model."""
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def passes_of(
        folder: Path, gpus: int, **changes: Any,
) -> tuple[QwenVL, dict[str, Pass], argparse.Namespace]:
    """The largest passes of rft.py with images of 800 x 800, 8 rollouts and 256 tokens."""
    args = flags(init=str(folder), **changes)
    model = meta_model(args)
    prompt = bench.random_prompt(model, 800)
    passes = memory.largest_passes(model, args, rft.step_size(args), gpus, prompt, prompt)
    return model, passes, args


def plan(
        tmp_path: Path, config: dict[str, Any], gpus: int, **changes: Any,
) -> tuple[float, dict[str, float], dict[str, dict[str, float]]]:
    """Of rft.py on such a model: peak, rows that are always there, rows by phase."""
    args = flags(init=str(write_config(tmp_path, config)), **changes)
    prompt = bench.random_prompt(meta_model(args), 800)
    peak, phases = memory.plan(args, rft.step_size(args), gpus, prompt, prompt)
    by_name = {phase.split(",")[0]: rows for phase, rows in phases.items()}
    return peak, by_name.pop("all the time"), by_name


def test_full_fine_tuning_of_3b_fits_one_card_of_80(tmp_path: Path) -> None:
    peak, always, phases = plan(tmp_path, bench.SHAPES["3b"], gpus=1)
    parameters = 3_754_622_976
    assert always["trained weights, float32"] == 4 * parameters
    assert always["moments, float32"] == 8 * parameters
    assert phases["while updating"]["gradients, float32"] == 4 * parameters
    assert always["reference, bfloat16, on each GPU"] == 2 * parameters
    assert 60 * GIB < peak < 79 * GIB


def test_adapters_of_3b_fit_one_card_of_24(tmp_path: Path) -> None:
    peak, always, phases = plan(tmp_path, bench.SHAPES["3b"], gpus=1, lora=64)
    # A and B of seven linear layers: 119.7 million numbers.
    assert always["trained weights, float32"] == 4 * 119_734_272
    assert always["frozen weights"] == 2 * 3_754_622_976
    assert not any("reference" in name for name in always)
    # A validation prefills more prompts than a step, and no more than fit.
    validation = sum(phases["while validating"].values())
    assert validation > sum(phases["while sampling"].values())
    assert 12 * GIB < peak < 23.5 * GIB


def test_7b_fits_eight_cards_of_80(tmp_path: Path) -> None:
    peak, always, _ = plan(tmp_path, B7, gpus=8)
    assert always["moments, float32"] == 8 * 8_292_166_656 / 8
    assert 30 * GIB < peak < 79 * GIB


@pytest.mark.parametrize("tokens", [256, 200, 64])
def test_the_costliest_micro_batch_uses_the_budget_up(tmp_path: Path, tokens: int) -> None:
    """One group of 256 tokens fills half of it; two with shorter answers fill all of it."""
    write_config(tmp_path, bench.SHAPES["3b"])
    model, passes, args = passes_of(tmp_path, 1, max_new_tokens=tokens)
    batch = passes["updating"]
    cost = batch.prompts * dist.memory_tokens(model, batch.prompt, 8 * batch.tokens)
    assert batch.tokens >= tokens and args.micro_tokens - 64 < cost <= args.micro_tokens


def test_a_step_without_more_groups_or_with_minibatches_has_smaller_micro_batches(
        tmp_path: Path) -> None:
    write_config(tmp_path, bench.SHAPES["3b"])
    for gpus, minibatches in ((8, 1), (1, 8)):
        _, passes, _ = passes_of(tmp_path, gpus, max_new_tokens=64, minibatches=minibatches)
        assert (passes["updating"].prompts, passes["updating"].tokens) == (1, 64)
        assert passes["sampling"].prompts == 8 // gpus
    # A group longer than the budget is a pass of its own.
    _, passes, _ = passes_of(tmp_path, 1, micro_tokens=1024)
    assert (passes["updating"].prompts, passes["updating"].tokens) == (1, 256)


def test_patches_count_if_anything_of_the_vision_tower_is_trained(tmp_path: Path) -> None:
    write_config(tmp_path, bench.SHAPES["tiny"])
    costs = []
    for changes in ({}, {"lora": 4}, {"lora": 4, "lora_vision": True}, {"freeze_vision": True}):
        model, passes, _ = passes_of(tmp_path, 1, **changes)
        prompt = passes["updating"].prompt
        costs.append(dist.memory_tokens(model, prompt, 0))
    tokens = len(prompt.input_ids)
    patches = len(prompt.pixels.values)
    with_patches = tokens + round(dist.PATCH_TOKENS * patches)
    assert costs == [with_patches, tokens, with_patches, tokens]


def test_a_patch_and_a_token_keep_what_the_budget_says(tmp_path: Path) -> None:
    """--micro-tokens counts a patch as PATCH_TOKENS of a token: without checkpointing they keep
    about so much at 3B widths."""
    args = flags(init=str(write_config(tmp_path, bench.SHAPES["3b"])), gradient_checkpointing=False)
    model = meta_model(args)
    prompt = bench.random_prompt(model, 800)
    kept = []
    for trained in (True, False):
        model.visual.requires_grad_(trained)
        with ByteCounter(list(model.parameters())) as counter:
            model.score([prompt], [[torch.zeros(256, dtype=torch.long)]])[0]
            kept.append(counter.peak)
    patch = (kept[0] - kept[1]) / len(prompt.pixels.values)
    token = kept[1] / (len(prompt.input_ids) + 255)
    assert 0.7 * dist.PATCH_TOKENS < patch / token < 1.4 * dist.PATCH_TOKENS


# ---------------------------------------------------------------- the commands

def test_a_plan_is_printed_without_a_gpu_and_its_status_says_whether_it_fits(
        tiny_checkpoint: Path, run: Callable[..., Any]) -> None:
    common = ("rft.py", "--init", tiny_checkpoint, "--plan")
    fits = run(*common, 2, 80, 112, 112)
    assert fits.returncode == 0 and "memory of each of 2 GPUs, GiB" in fits.stdout
    for row in ("trained weights, float32", "KV cache, prompts, logits", "needed at most"):
        assert row in fits.stdout
    tight = run(*common, 1, 1, 112, 112)
    assert tight.returncode == 2 and len(tight.stderr.strip().splitlines()) == 1
    assert "take more GPUs" in tight.stderr
    odd = run(*common, 3, 80, 112, 112)
    assert odd.returncode == 2 and "take a multiple" in odd.stderr


def test_a_plan_with_files_of_two_checkpoints_is_refused_in_one_line(
        tiny_checkpoint: Path, run: Callable[..., Any], tmp_path: Path) -> None:
    mixed = shutil.copytree(tiny_checkpoint, tmp_path / "mixed")
    config = json.loads((mixed / "config.json").read_text())
    config["image_token_id"] += 1
    (mixed / "config.json").write_text(json.dumps(config))
    done = run("rft.py", "--plan", 1, 80, 112, 112, "--init", mixed)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1
    assert "<|image_pad|>" in done.stderr and "take all files from one checkpoint" in done.stderr


def test_a_plan_of_sft_looks_at_the_data(
        tiny_checkpoint: Path, run: Callable[..., Any]) -> None:
    plan = run("sft.py", "--plan", "--init", tiny_checkpoint, "--batch", 4)
    assert plan.returncode == 0 and "while sampling" not in plan.stdout
    assert "gradients, float32" in plan.stdout and "while validating" in plan.stdout


def test_sft_plans_for_its_longest_completion(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """--max-new-tokens is of validation; one's own reasoning may be much longer."""
    processor = Processor.from_pretrained(tiny_checkpoint)
    records = load("synth", None, "sft")[:20]
    reasoning = tmp_path / "cot.jsonl"
    lines = [{"id": record.id, "think": "x" * (900 + i)} for i, record in enumerate(records)]
    reasoning.write_text("".join(json.dumps(line) + "\n" for line in lines))
    args = sft.flags().parse_args(["--cot", str(reasoning), "--batch", "4"])
    assert 919 < sft.longest_step(args, processor, records).tokens < 1100
    args = sft.flags().parse_args(["--answer-only", "--batch", "4"])
    assert sft.longest_step(args, processor, records).tokens < 100
    # The data are not looked at.
    assert sft.longest_step(args, processor, []).tokens == args.max_new_tokens


def test_a_plan_of_data_without_a_record_says_so(
        tiny_checkpoint: Path, run: Callable[..., Any], tmp_path: Path) -> None:
    for split in ("rft", "val"):
        line = {"image": "missing.png", "text": "the ship", "box": [1, 1, 5, 5]}
        (tmp_path / f"{split}.jsonl").write_text(json.dumps(line) + "\n")
    refused = run("rft.py", "--plan", "--init", tiny_checkpoint, "--data", "jsonl",
                  "--root", tmp_path)
    assert refused.returncode == 2 and len(refused.stderr.strip().splitlines()) == 1
    assert "no record of jsonl rft to train on" in refused.stderr


def test_a_validation_answers_fewer_records_of_longer_prompts_at_once(
        tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    processor = Processor.from_pretrained(tiny_checkpoint)
    records = load("synth", None, "val")[:5]
    batches = []

    def count(model: QwenVL, processor: Processor, prompts: Any, *rest: Any) -> tuple[list, list]:
        batches.append(len(prompts))
        return [["no box"]] * len(prompts), [[0.0]] * len(prompts)
    monkeypatch.setattr(evaluation, "sample_texts", count)
    model = QwenVL.from_pretrained(tiny_checkpoint, torch.float32)
    longest = memory.longest_prompt(processor, records)
    for limit in (memory.VALIDATION_TOKENS, 2 * len(longest.input_ids), 1):
        monkeypatch.setattr(memory, "VALIDATION_TOKENS", limit)
        evaluation.validate(model, processor, records, flags(val=5))
    assert batches == [5, 2, 2, 1, 1, 1, 1, 1, 1]


def records_of(*sizes_and_texts: tuple[tuple[int, int], str]) -> list[Any]:
    return [SimpleNamespace(size=size, text=text) for size, text in sizes_and_texts]


def test_a_refusal_names_the_first_flags_that_help(
        tiny_checkpoint: Path, capsys: pytest.CaptureFixture) -> None:
    processor = Processor.from_pretrained(tiny_checkpoint)
    records = records_of(((112, 112), "a"), ((280, 140), "the longer one"))
    prompt = memory.longest_prompt(processor, records)
    assert prompt.image_grid_thw.tolist() == [[1, 10, 20]]
    step = Step(8, 8, 64, True)
    args = flags(init=str(tiny_checkpoint), gradient_checkpointing=False, max_new_tokens=64)
    needed, _ = memory.plan(args, step, 1, prompt, None)
    args.memory = (needed - 1) / GIB
    with pytest.raises(SystemExit) as leaving:
        memory.check_gpu(args, processor, records, [], step)
    line = capsys.readouterr().err.strip()
    assert leaving.value.code == 2 and "\n" not in line
    assert "with --gradient-checkpointing it needs" in line


@pytest.mark.parametrize("given, limit, proposed", [
    ({}, "lora 64", "with --lora 64 it needs"),
    ({"lora": 128}, "lora 64", "with --lora 64 it needs"),
    ({}, "2 GPUs", "with 2 GPUs it needs"),
    ({"lora": 8, "beta": 0.0}, "half", None),
    ({"lora": 8, "micro_tokens": 512, "val": 0}, "half", None)])
def test_a_refusal_names_no_flag_that_does_not_help(
        tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch,
        given: dict[str, Any], limit: str, proposed: str | None) -> None:
    """A KL or long passes are not given up for nothing, and a rank never grows."""
    args = flags(init=str(write_config(tmp_path, narrow())), max_new_tokens=16, **given)
    prompt = bench.random_prompt(meta_model(args), 112)
    monkeypatch.setattr(
        memory, "longest_prompt", lambda _, records, image: prompt if records else None)
    step = Step(2, 2, 16, True)

    def needed(gpus: int = 1, **changes: Any) -> float:
        smaller = argparse.Namespace(**vars(args) | changes)
        return memory.plan(smaller, step, gpus, prompt, None)[0]
    available = needed() / 2
    if limit == "lora 64":
        available = needed(lora=64)
    if limit == "2 GPUs":
        # Adapters are not among the remedies of a run of adapters.
        args.lora, args.beta = 8, 0.0
        available = needed(gpus=2)
    args.memory = available / GIB
    any_processor = SimpleNamespace(check_fits=lambda config: None)
    with pytest.raises(SystemExit) as leaving:
        memory.check_gpu(args, any_processor, [None], [], step)
    line = capsys.readouterr().err.strip()
    assert leaving.value.code == 2 and "\n" not in line
    assert proposed in line if proposed else "--lora" not in line and "more GPUs" in line


def test_a_plan_from_an_adapter_has_that_adapters_layers_and_its_start(
        tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model = QwenVL.from_pretrained(tiny_checkpoint, None)
    lora.add(model, 4, 8.0, True, 0)
    model.save_pretrained(tmp_path)
    processor = Processor.from_pretrained(tiny_checkpoint)
    processor.save_pretrained(tmp_path)
    adapters = 4 * sum(p.numel() for _, p in lora.saved_parameters(model))
    args = flags(init=str(tmp_path), lora=4)
    prompt = memory.longest_prompt(processor, [], (112, 112))
    always = memory.plan(args, rft.step_size(args), 1, prompt, prompt)[1]["all the time"]
    assert always["trained weights, float32"] == adapters
    assert always["starting adapters, bfloat16, on each GPU"] == adapters / 2
    # Without --lora the adapter is merged, and the rank that can be proposed is its own.
    small = {"init": str(tmp_path), "image": (112, 112), "micro_tokens": 64, "val": 0, "beta": 0.0}
    args = flags(lora=4, **small)
    memory_of_rank_4 = memory.plan(args, rft.step_size(args), 1, prompt, prompt)[0] / GIB
    args = flags(memory=memory_of_rank_4, **small)
    assert not lora.adapted(meta_model(args))
    with pytest.raises(SystemExit):
        memory.check_gpu(args, processor, [], [], rft.step_size(args))
    assert "with --lora 4 it needs" in capsys.readouterr().err


def test_the_longest_prompt_has_the_most_patches_and_the_longest_text(
        tiny_checkpoint: Path) -> None:
    processor = Processor.from_pretrained(tiny_checkpoint)
    size = (112, 112)
    short = memory.longest_prompt(processor, records_of((size, "the ship")))
    long = memory.longest_prompt(
        processor, records_of((size, "the ship"), (size, "the ship at the pier")))
    assert len(long.input_ids) - len(short.input_ids) == len(" at the pier")
    unknown = memory.longest_prompt(processor, [], size)
    empty = processor.turns(memory.PROMPT, 16, text="")
    assert len(unknown.input_ids) == len(empty) + memory.TEXT_TOKENS
    assert memory.longest_prompt(processor, []) is None


# ---------------------------------------------------------------- on a played device

@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of 3B's widths, of two layers and two blocks."""
    return bench.write_checkpoint(tmp_path_factory.mktemp("wide"), narrow(), torch.bfloat16)


@pytest.mark.parametrize("changes", [
    {"gradient_checkpointing": True}, {"gradient_checkpointing": False}, {"lora": 16}])
def test_the_plan_counts_what_a_device_of_true_widths_holds(
        wide: Path, changes: dict[str, Any]) -> None:
    args = flags(init=str(wide), max_new_tokens=24, **changes)
    planned = meta_model(args)
    prompt = bench.random_prompt(planned, 112)
    update = Pass(prompt, 2, 4, 24, trains=True)
    sampling = Pass(prompt, 2, 4, 24, trains=False)
    _, phases = memory.plan(args, Step(2, 4, 24, True), 1, prompt, None)
    [weights] = [rows["weights for sampling, bfloat16, on each GPU"]
                 for phase, rows in phases.items() if "sampling" in phase]
    with PlayedDevice() as gpu:
        model = QwenVL.from_pretrained(wide, torch.bfloat16, "cuda")
        if args.lora:
            lora.add(model, args.lora, 1.0, False, 0)
            model.to(torch.bfloat16)
        lora.choose_trained(model, False, args.gradient_checkpointing)
        # As under FSDP2 on a GPU, a complete gradient is dropped once it is reduced.
        for p in model.parameters():
            if p.requires_grad:
                p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        standing = gpu.live_bytes
        assert abs(standing / weights - 1) < 0.1
        for work in (update, sampling):
            gpu.reset_peak()
            work.run(model)
            counted = memory.peak_bytes(planned, work)
            assert abs((gpu.peak_bytes - standing) / counted - 1) < 0.1


def test_the_passes_before_step_1_leave_weights_and_put_moments_in_place(
        tiny_checkpoint: Path) -> None:
    processor = Processor.from_pretrained(tiny_checkpoint)
    records = records_of(((112, 112), "the ship"))
    args = flags(init=str(tiny_checkpoint), max_new_tokens=8)
    step = Step(2, 3, 8, True)
    with PlayedDevice() as gpu:
        model = QwenVL.from_pretrained(tiny_checkpoint, torch.float32, "cuda").requires_grad_()
        opt = dist.optimizer(model, 1e-3)
        before = [p.detach().clone() for p in model.parameters()]
        memory.try_out(model, opt, None, processor, records, records, args, step)
        for p, was in zip(model.parameters(), before, strict=True):
            assert torch.equal(p, was) and p.grad is None
            assert opt.state[p]["step"] == 0 and not opt.state[p]["exp_avg"].any()
        gpu.memory.total = gpu.live_bytes + 1000
        with pytest.raises(SystemExit) as leaving:
            memory.try_out(model, opt, None, processor, records, records, args, step)
    assert leaving.value.code == 2
