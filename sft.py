"""Stage 1: supervised fine-tuning on spatial reasoning that ends in a box (CoT-SFT).

A record's image and expression become a prompt. cot.py writes the completion from the record's
annotation (or reads it from your JSONL file): what is asked for, where the candidates are, which
one fits, then the box. The loss is minus the log-probability of the completion's tokens, end of
turn included, averaged over the tokens of the whole step.

This is our reading of the abstract of RSGround-R1 (arXiv 2601.21634). Its reasoning data is not
public; ours is synthetic, from annotations.

    python sft.py                                              drawn scenes, on a laptop
    torchrun sft.py --data dior --init Qwen2.5-VL-3B-Instruct/     one GPU; writes ckpt/sft
    torchrun --nproc_per_node 8 sft.py --data dior --init Qwen2.5-VL-3B-Instruct/
                                                  eight GPUs, same result up to rounding
"""
import argparse
import heapq
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import cot
import eval as evaluation
from data import open_image
from model import QwenVL
from qwen import lora
from qwen.hub import folder
from qwen.processor import Processor, Prompt, frame_by_coords
from readers.base import Record
from train import dist, memory
from train.checkpoints import open_model
from train.flags import (
    FlagParser, Values, above_zero, add_common_flags, natural, parse, positive, set_steps)
from train.run import Run, launch, load_records


def flags() -> FlagParser:
    parser = FlagParser(
        description="Supervised fine-tuning on spatial reasoning that ends in a box (stage 1)")
    add_common_flags(parser, "sft", init="toy/base")
    add = parser.add_argument_group("training").add_argument
    add("--batch", type=positive, default=16, help="records per step, over all processes")
    add("--lr", nargs="+", action=Values, default=1e-5, metavar=("LR", "WARMUP"),
        const=(("lr", above_zero, 1), ("warmup", natural, 1)),
        help="peak learning rate: 1e-5 for a 3B model, about 1e-3 for toy/base; "
        "default WARMUP: 3%% of the steps")
    add("--cot", metavar="FILE",
        help="JSONL of your own reasoning by record id; default: written from the annotations")
    add("--split", default="sft",
        help="split to train on; rft: the records of stage 2, as a control with --answer-only")
    add("--answer-only", action="store_true", help="no reasoning, only the answer: the baseline")
    add("--max-new-tokens", type=positive, default=256,
        help="longest answer in a validation, tokens")
    return parser


@dataclass
class Example:
    """What the model learns from one record."""
    prompt: Prompt             # image and expression
    completion: Tensor         # (L,) ids of reasoning, answer and end of turn


def make_example(record: Record, processor: Processor, write_completion: Any) -> Example:
    """write_completion: (record, frame) -> text with the box in that frame (cot.writer)."""
    prompt = processor(open_image(record), record.text)
    return Example(prompt, processor.encode(write_completion(record, prompt.frame)))


def train_step(
        model: QwenVL, optimizer: torch.optim.Optimizer, examples: Sequence[Example],
        args: argparse.Namespace, step: int) -> dict[str, Any]:
    """One step on this process's examples -> its log line."""
    started = time.perf_counter()
    # All losses are divided by this count over all processes and micro-batches, so each token
    # weighs the same for any number of them.
    completion_tokens = dist.all_reduce(
        torch.tensor(sum(len(e.completion) for e in examples))).item()
    loss_sum = 0.0
    costs = [dist.memory_tokens(model, e.prompt, len(e.completion)) for e in examples]
    for part in dist.micro_batches(costs, args.micro_tokens):
        # score() takes a list of completions for each prompt; here each has one.
        logp, _ = model.score([e.prompt for e in examples[part]],
                              [[e.completion] for e in examples[part]])    # (completion tokens,)
        loss = -logp.sum() / completion_tokens
        loss.backward()
        loss_sum += loss.item()
    lr = dist.lr_at(step, args.steps, args.lr, args.warmup)
    norm = dist.update(model, optimizer, lr)
    tokens = sum(len(e.prompt.input_ids) + len(e.completion) for e in examples)
    tokens = dist.all_reduce(torch.tensor(tokens)).item()
    seconds = time.perf_counter() - started
    return {
        "step": step + 1,
        "loss": dist.all_reduce(torch.tensor(loss_sum, dtype=torch.float64)).item(),
        "lr": lr,
        "grad_norm": norm,
        "finite": norm < float("inf"),
        "completion_tokens": completion_tokens,
        "tokens_per_second": tokens / seconds,
        "seconds": seconds,
        "peak_GiB": dist.peak_memory(model.device),
    }


def longest_step(
        args: argparse.Namespace, processor: Processor, records: Sequence[Record]) -> memory.Step:
    """The size of a step, for the plan of memory. Its completion is the longest of these records,
    or has --max-new-tokens if there are none."""
    tokens = args.max_new_tokens
    if records:
        write_completion = cot.writer(records, args.cot, args.answer_only)
        coords = "1000" if processor.convention == "1000" else "resized"
        texts = (write_completion(record, frame_by_coords(record.size, coords, processor))
                 for record in records)
        # The longest texts in letters include the longest in tokens, or nearly.
        longest = heapq.nlargest(64, texts, key=len)
        tokens = max(len(processor.encode(text)) for text in longest)
    return memory.Step(args.batch, 1, tokens, samples=False)


def main() -> None:
    args = parse(flags(), "sft")
    if args.batch % dist.world():
        dist.fail(f"--batch {args.batch} is not a multiple of the {dist.world()} processes")
    init = folder(args.init)
    records, val = ((), ()) if args.plan and args.image else load_records(args, args.split)
    if args.plan:
        processor = Processor.from_pretrained(init, max_pixels=args.max_pixels)
        memory.check_gpu(args, processor, records, val, longest_step(args, processor, records))
        return
    set_steps(args, "sft", len(records), args.batch)
    write_completion = cot.writer(records, args.cot, args.answer_only)
    run = Run(args, "sft", records)
    model, processor = open_model(init, max_pixels=args.max_pixels)
    lora.fit(model, args)
    device = dist.start(args.device, args.deterministic)
    step_of_run = longest_step(args, processor, records) if device.type != "cpu" else None
    memory.check_gpu(args, processor, records, val, step_of_run, device)
    lora.choose_trained(model, args.freeze_vision, args.gradient_checkpointing)
    model = dist.prepare(model, device)
    optimizer = dist.optimizer(model, args.lr)
    run.begin(model, optimizer, processor)
    memory.try_out(model, optimizer, None, processor, records, val, args, step_of_run)
    for step, batch in run.steps(
            lambda record: make_example(record, processor, write_completion), args.batch):
        line = train_step(model, optimizer, batch.inputs, args, step)
        if run.due(step):
            run.answers = []
            line |= evaluation.validate(model, processor, val, args, run.answers)
        run.log(line, batch, show=("loss", "tokens_per_second", "peak_GiB"))
    run.end()


if __name__ == "__main__":
    launch(main, catch_signals=True)
