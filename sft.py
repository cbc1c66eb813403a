"""Stage 1: supervised fine-tuning on spatial reasoning that ends in a box (CoT-SFT).

One sample's way: a record's image and expression become a prompt. cot.py writes the
completion from the record's annotation (or reads it from a JSONL of yours): what is asked
for, where the candidates lie, why one fits, then the box. The model scores the completion
behind the prompt. The loss is minus the log-probability of the completion's tokens alone, end
of turn included, averaged over the tokens of the whole step.

Source: our reading of the abstract of RSGround-R1 (arXiv 2601.21634), whose reasoning data is
not public to us: ours is synthetic, from annotations.

    python sft.py                                              the embedded data on a laptop
    torchrun sft.py --data dior --init Qwen2.5-VL-3B-Instruct/     one GPU; writes ckpt/sft
    torchrun --nproc_per_node 8 sft.py --data dior --init Qwen2.5-VL-3B-Instruct/
                                          eight GPUs, the same result to rounding
"""
import argparse
import heapq
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import cot
import eval as evaluation
from data import open_image
from model import QwenVL
from qwen import lora
from qwen.answer import Frame
from qwen.hub import folder
from qwen.processor import Processor, Prompt, frame_by_coords
from readers.base import Record
from train import checkpoints as saving
from train import dist, memory
from train import run as runtime


def flags() -> runtime.FlagParser:
    parser = runtime.FlagParser(
        "Supervised fine-tuning on spatial reasoning that ends in a box (stage 1)")
    runtime.add_common_flags(parser, "sft", "toy/base", "1000")
    add = parser.add_argument_group("training").add_argument
    add("--batch", type=runtime.positive, default=16, help="records a step, over all processes")
    add("--lr", type=runtime.above_zero, default=1e-5,
        help="peak learning rate; 1e-5 for a 3B model, about 1e-3 for the embedded one")
    add("--cot", metavar="FILE",
        help="JSONL of your own reasoning by record id; default: written from the annotations")
    add("--split", default="sft", help="records to train on; rft: those of the second stage, "
        "with --answer-only their boxes alone, as a control")
    add("--answer-only", action="store_true",
        help="no reasoning, the answer alone: the baseline")
    add = parser.add_argument_group("watching").add_argument
    add("--every", type=runtime.positive, default=200,
        help="steps between checkpoints and validation")
    add("--val", type=runtime.natural, default=64,
        help="records of the val split in a validation; 0 for none")
    add("--max-new-tokens", type=runtime.positive, default=256,
        help="tokens of an answer in validation at most")
    return parser


# ---------------------------------------------------------------- one step

@dataclass
class Example:
    """What the model learns from one record."""

    prompt: Prompt             # image and expression, as the model takes them
    completion: Tensor         # ids of reasoning, answer and end of turn

    @property
    def tokens(self) -> int:
        """Packed tokens, those of the image included."""
        return len(self.prompt.input_ids) + len(self.completion)


def make_example(
        record: Record, processor: Processor, write_completion: Callable[[Record, Frame], str],
) -> Example:
    """A record's example; its completion gives the box in the frame of the prompt's image."""
    prompt = processor(open_image(record), record.text)
    return Example(prompt, processor.encode(write_completion(record, prompt.frame)))


def train_step(
        model: QwenVL, opt: torch.optim.Optimizer, examples: Sequence[Example],
        args: argparse.Namespace, step: int,
) -> dict[str, Any]:
    """One step on this process's examples -> the log line."""
    started = time.perf_counter()
    # All losses are divided by this one count, over all processes and micro-batches: so each
    # token weighs the same, however the step is cut.
    completion_tokens = dist.all_sum(
        torch.tensor(sum(len(e.completion) for e in examples))).item()
    loss = accumulate_gradient(model, examples, completion_tokens, args.micro_tokens)
    lr = dist.lr_at(step, args.steps, args.lr)
    norm = dist.update(model, opt, lr)
    tokens = dist.all_sum(torch.tensor(sum(e.tokens for e in examples))).item()
    return {
        "step": step + 1,
        "loss": dist.all_sum(torch.tensor(loss, dtype=torch.float64)).item(),
        "lr": lr,
        "grad_norm": norm,
        "finite": norm < float("inf"),
        "completion_tokens": completion_tokens,
        "tokens_per_second": tokens / (time.perf_counter() - started),
        "peak_GiB": dist.peak_memory(model.device),
    }


def accumulate_gradient(
        model: QwenVL, examples: Sequence[Example], completion_tokens: int, micro_tokens: int,
) -> float:
    """Adds the gradient up over micro-batches -> this process's part of the step's loss."""
    loss_sum = 0.0
    costs = [dist.memory_tokens(model, e.prompt, len(e.completion)) for e in examples]
    micro_batches = dist.micro_batches(costs, micro_tokens)
    for micro_batch in micro_batches:
        prompts = [e.prompt for e in examples[micro_batch]]
        # score() takes a list of completions a prompt; here each has one.
        completions = [[e.completion] for e in examples[micro_batch]]
        logp, _ = model.score(prompts, completions)        # (completion tokens,)
        loss = -logp.sum() / completion_tokens
        loss.backward()
        loss_sum += loss.item()
    return loss_sum


# ---------------------------------------------------------------- the stage

def step_size(
        args: argparse.Namespace, processor: Processor, records: Sequence[Record],
) -> memory.Step:
    """What a step is, for the plan of memory: with the longest completion of these records, or
    without any, of --max-new-tokens."""
    tokens = args.max_new_tokens
    if records:
        write_completion = cot.writer(records, args.cot, args.answer_only)
        coords = "1000" if processor.convention == "1000" else "resized"

        def completion(record: Record) -> str:
            return write_completion(record, frame_by_coords(record.size, coords, processor))

        # What has most letters has most tokens, or nearly.
        longest = heapq.nlargest(64, map(completion, records), key=len)
        tokens = max(len(processor.encode(text)) for text in longest)
    return memory.Step(args.batch, 1, tokens, samples=False)


def main() -> None:
    args = runtime.parse(flags(), "sft")
    if args.batch % dist.world():
        dist.fail(f"--batch {args.batch} is not a multiple of the {dist.world()} processes")
    if args.plan:
        records, val = ((), ()) if args.image else runtime.load_records(args, args.split)
        processor = Processor.from_pretrained(folder(args.init), max_pixels=args.max_pixels)
        memory.show(args, step_size(args, processor, records), records, val)
        return
    init = folder(args.init)
    records, val = runtime.load_records(args, args.split)
    runtime.set_steps(args, len(records), args.batch, steps=1000)
    write_completion = cot.writer(records, args.cot, args.answer_only)
    out = Path(args.out)
    saving.check_output(out, args.resume)
    model, processor = saving.open_model(init, max_pixels=args.max_pixels)
    lora.fit(model, args)
    device = dist.start(args.device, args.deterministic)
    step = step_size(args, processor, records)
    memory.check_gpu(args, processor, records, val, step, device)
    lora.choose_trained(model, args.freeze_vision, args.gradient_checkpointing)
    model = dist.prepare(model, device)
    opt = dist.optimizer(model, args.lr)
    first = saving.restore(out, model, opt) if args.resume else 0
    lines = runtime.begin(out, first, model)
    run = runtime.run_description(args, "sft", records)
    memory.try_out(model, opt, None, processor, records, val, args, step)
    checkpoints = saving.Checkpoints(out, args, model, opt, processor, run, first)

    def examples_of(step: int) -> runtime.Share[Example]:
        """This process's records of a step with their examples."""
        def example(record: Record) -> Example:
            return make_example(record, processor, write_completion)
        return runtime.own_share(records, step, args.batch, args.seed, example)

    train(checkpoints, lines, len(records), val, examples_of)


def train(
        checkpoints: saving.Checkpoints, lines: list[dict[str, Any]], n_records: int,
        val: Sequence[Record], examples_of: Callable[[int], runtime.Share[Example]],
) -> None:
    """The steps of a run from its last checkpoint on; lines: its log up to there.

    n_records: those to train on; examples_of: step -> this process's part of it.
    """
    args = checkpoints.args
    out = checkpoints.out
    model = checkpoints.model
    first = checkpoints.saved
    replacements = runtime.Replacements(out, n_records)
    with runtime.progress_bar("sft", first, args.steps) as bar:
        ahead = runtime.prefetch(examples_of, range(first, args.steps), args.workers)
        for step, share in zip(bar, ahead):
            if runtime.told_to_stop(out):
                break
            unreadable = replacements.count(step, share.unreadable)
            line = train_step(model, checkpoints.optimizer, share.made, args, step) | unreadable
            lines.append(line)
            runtime.warn(lines, share.records)
            due = (step + 1) % args.every == 0 or step + 1 == args.steps
            if due:
                line |= evaluation.validate(model, checkpoints.processor, val, args)
            runtime.log(out / "metrics.jsonl", line)
            # Last, so that a checkpoint never covers a step that is not logged.
            if due:
                checkpoints.save(line)
            bar.set_postfix_str(progress(line))
            runtime.stop_if_not_finite(lines, args.steps, out)
    checkpoints.end(lines)


def progress(line: dict[str, Any]) -> str:
    """A step's log line, as it stands behind the progress bar."""
    text = (f"loss {line['loss']:.4f} tokens/s {line['tokens_per_second']:.0f} "
            f"peak {line['peak_GiB']:.1f} GiB")
    if "val_mIoU" in line:
        text += f" val mIoU {line['val_mIoU']:.3f}"
    if "warning" in line:
        text += " warning"
    return text


if __name__ == "__main__":
    runtime.main(main, farewells=True)
