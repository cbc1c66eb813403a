"""Stage 1: supervised fine-tuning on spatial reasoning that ends in a box (CoT-SFT).

Each record's completion is written from its annotation by cot.py (or read from a JSONL of yours): what is asked for, where the candidates
lie, why one fits, then the box. The loss is on the completion alone, end of turn included, averaged over the tokens of the whole step.

Source: our reading of the abstract of RSGround-R1 (arXiv 2601.21634), whose reasoning data is not public to us: ours is synthetic, from
annotations.

    torchrun sft.py --data dior --init Qwen2.5-VL-3B-Instruct/                        one GPU; writes ckpt/sft
    torchrun --nproc_per_node 8 sft.py --data dior --init Qwen2.5-VL-3B-Instruct/     eight GPUs, the same result to rounding
    python sft.py                                                                     the embedded data on a laptop
"""
import time
from pathlib import Path

import torch
from tqdm import tqdm

import cot
import data
import eval as evaluation
import runtime
from model import folder


def flags():
    parser = runtime.Parser("Supervised fine-tuning on spatial reasoning that ends in a box (stage 1)")
    runtime.add_common_flags(parser, "sft", "toy/base", "1000")
    add = parser.add_argument_group("training").add_argument
    add("--batch", type=runtime.positive, default=16, help="records a step, over all processes")
    add("--lr", type=runtime.above_zero, default=1e-5, help="peak learning rate; 1e-5 for a 3B model, about 1e-3 for the embedded one")
    add("--cot", metavar="FILE", help="JSONL of your own reasoning by record id; default: written from the annotations")
    add("--split", default="sft", help="records to train on; rft: those of the second stage, with --answer-only "
        "their boxes alone, as a control")
    add("--answer-only", action="store_true", help="no reasoning, the answer alone: the baseline")
    add = parser.add_argument_group("watching").add_argument
    add("--every", type=runtime.positive, default=200, help="steps between checkpoints and validation")
    add("--val", type=runtime.natural, default=64, help="records of the val split in a validation; 0 for none")
    add("--max-new-tokens", type=runtime.positive, default=256, help="tokens of an answer in validation at most")
    return parser


def train_step(model, opt, examples, args, step):
    """examples: this process's (Prompt, completion ids) of the step -> the log line."""
    began = time.perf_counter()
    n_tokens = runtime.all_sum(torch.tensor(sum(len(c) for _, c in examples))).item()                 # once, before any micro-batch
    loss_sum = 0.0
    micro = runtime.micro_batches([len(p.input_ids) + len(c) for p, c in examples], args.micro_tokens)
    for m in micro:
        prompts, completions = zip(*examples[m])
        runtime.sync_gradients(model, m is micro[-1])
        logp, _ = model.score(prompts, [[c] for c in completions])
        loss = -logp.sum() / n_tokens
        loss.backward()
        loss_sum += loss.item()
    lr = runtime.lr_at(step, args.steps, args.lr)
    norm = runtime.update(model, opt, lr)
    fed = runtime.all_sum(torch.tensor(sum(len(p.input_ids) + len(c) for p, c in examples))).item()
    return {"step": step + 1, "loss": runtime.all_sum(torch.tensor(loss_sum, dtype=torch.float64)).item(), "lr": lr, "grad_norm": norm,
            "finite": norm < float("inf"), "completion_tokens": n_tokens, "tokens_per_second": fed / (time.perf_counter() - began),
            "peak_GiB": runtime.peak_memory(model)}


def main():
    args = runtime.parse(flags(), "sft")
    if args.batch % runtime.world():
        runtime.fail(f"--batch {args.batch} is not a multiple of the {runtime.world()} processes")
    records, val = runtime.load_records(args, args.split)
    runtime.set_steps(args, len(records), args.batch, steps=1000)
    reason = cot.writer(records, args.cot, args.answer_only)
    init, out = folder(args.init), Path(args.out)
    runtime.check_output(out, args.resume)
    model, processor = runtime.open_checkpoint(init, max_pixels=args.max_pixels)
    model = runtime.prepare(model, runtime.start(args.device), args.freeze_vision, args.gradient_checkpointing)
    opt = runtime.optimizer(model, args.lr)
    first = runtime.restore(out, model, opt) if args.resume else 0
    run = runtime.describe(args, "sft", records)
    runtime.begin(out, first, model)

    def examples_of(step):
        """This process's (Prompt, completion ids) of a step."""
        examples = []
        for place, record in enumerate(runtime.batch(records, step, args.batch, args.seed)):
            if place % runtime.world() == runtime.rank():
                prompt = processor(data.open_image(record), record.text)
                examples.append((prompt, processor.encode(reason(record, prompt.frame))))
        return examples
    steps, skipped = range(first, args.steps), 0
    with tqdm(steps, initial=first, total=args.steps, desc="sft", disable=runtime.rank() > 0) as bar:
        for step, examples in zip(bar, runtime.ahead(examples_of, steps, args.workers)):
            line = train_step(model, opt, examples, args, step)
            skipped = 0 if line["finite"] else skipped + 1
            due = (step + 1) % args.every == 0 or step + 1 == args.steps
            line |= evaluation.validate(model, processor, val, args) if due else {}
            runtime.log(out / "metrics.jsonl", line)
            if due:                                                      # last: what a checkpoint covers is logged
                runtime.save(out, step + 1, model, opt, processor, run)
            bar.set_postfix_str(f"loss {line['loss']:.4f} tokens/s {line['tokens_per_second']:.0f} "
                                f"peak {line['peak_GiB']:.1f} GiB"
                                + (f" val mIoU {line['val_mIoU']:.3f}" if "val_mIoU" in line else ""))
            if skipped == runtime.STOP_AFTER_SKIPPED or skipped and step + 1 == args.steps:
                runtime.fail(f"no gradient is finite from step {step + 2 - skipped} on; lower --lr; what was saved before stands in {out}")


if __name__ == "__main__":
    runtime.main(main)
