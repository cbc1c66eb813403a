"""Stage 2: GRPO on groups of rollouts, with a continuous positional reward and a loss weighted by the rollouts' spatial consistency.

Per step: sample G answers to each of Q questions, reward them (reward.py), compare each with its own group, weight the loss of each group
by how far its rollouts fail or scatter, and take one clipped policy-gradient step (or --updates of them). Boxes alone are needed, no
reasoning.

Source: RSGround-R1 (arXiv 2601.21634): the reward is R = IoU + 0.1 positional + format (section 3.3), and the whole loss of a group is
multiplied by its weight (section 3.4); both second-hand. That the KL is part of what is multiplied, and that weights are not renormalised
over the step, is our reading. Where the paper's settings are not known, the defaults are VLM-R1's (G 8, lr 1e-6, KL 0.04, clip 0.2,
temperature 1). GRPO is DeepSeekMath's (arXiv 2402.03300); that the loss is a mean over all tokens of the step is ours.

    torchrun rft.py --data dior --epochs 0.4                     one GPU; starts from ckpt/sft, writes ckpt/rft
    torchrun --nproc_per_node 8 rft.py --data dior               eight GPUs, the same result to rounding
    python rft.py                                                the embedded data on a laptop
"""
import argparse
import json
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

import answer
import data
import eval as evaluation
import pictures
import reward
import runtime
from generate import generate
from model import folder

MAX_LOG_RATIO = 20.0              # exp() of more is of no use and may be infinite
REWARD = {"iou": 1.0, "positional": 0.1, "format": 1.0}
WEIGHTINGS = ("consistency", "mean", "variance", "off", "shuffled")


class NamedWeights(argparse.Action):
    """NAME=WEIGHT ... -> a dict. Names are those of reward.TERMS, and "format"."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: list[str],
                 option: str | None = None) -> None:
        weights: dict[str, float] = {}
        for text in values:
            name, _, weight = text.partition("=")
            if name not in (*reward.TERMS, "format"):
                raise argparse.ArgumentError(self, f"{text}: no term is called {name!r}; there are {', '.join((*reward.TERMS, 'format'))}")
            if name in weights:
                raise argparse.ArgumentError(self, f"{text}: {name} comes twice")
            try:
                weights[name] = runtime.finite(weight)
            except argparse.ArgumentTypeError:
                raise argparse.ArgumentError(self, f"{text} is not NAME=WEIGHT with a finite number") from None
        # In one order, whatever the user's: the sum of the terms is then the same to the bit.
        ordered = {name: weights[name] for name in (*reward.TERMS, "format") if name in weights}
        setattr(namespace, self.dest, ordered)


def flags():
    parser = runtime.FlagParser("GRPO with a positional reward and consistency-weighted updates (stage 2)")
    runtime.add_common_flags(parser, "rft", "ckpt/sft", "0.4 epochs")
    add = parser.add_argument_group("policy gradient").add_argument
    add("--prompts", type=runtime.positive, default=8, help="questions Q a step, over all processes")
    add("--group", type=runtime.positive, default=8, help="rollouts G of each question")
    add("--max-new-tokens", type=runtime.positive, default=256, help="tokens; a longer rollout is cut and counted as truncated")
    add("--temperature", type=runtime.above_zero, default=1.0, help="of sampling, and so of the scored log-probabilities")
    add("--cuda-graphs", action="store_true", help="decode by CUDA graphs; not measured yet, see LOG.md")
    add("--lr", type=runtime.above_zero, default=1e-6, help="peak learning rate; 1e-6 for a 3B model, about 1e-4 for the embedded one")
    add("--updates", type=runtime.positive, default=1, help="passes over a step's rollouts")
    add("--clip", type=runtime.not_negative, nargs=2, default=(0.2, 0.2), metavar=("LOW", "HIGH"),
        help="the ratio is clipped to 1 - LOW .. 1 + HIGH")
    add("--beta", type=runtime.not_negative, default=0.04, help="weight of the KL to the starting policy; at 0 no reference model is kept")
    add("--no-std", action="store_true", help="do not divide advantages by their group's standard deviation")
    add = parser.add_argument_group("reward").add_argument
    add("--reward", nargs="+", action=NamedWeights, default=dict(REWARD), metavar="NAME=WEIGHT",
        help=f"terms of the reward with their weights: {', '.join(reward.TERMS)}, format; at 0 a term is logged alone; default: "
        + " ".join(f"{name}={weight:g}" for name, weight in REWARD.items()))
    add("--alpha", type=runtime.above_zero, default=2.5, help="scale of the positional term's kernel, in halves of the true box's sides")
    add("--weighting", choices=WEIGHTINGS, default="consistency", help="of a group's loss: by mean and variance of its IoU, by one, "
        "not at all, or the consistency weights dealt at random (control)")
    add("--lambdas", type=runtime.finite, nargs=2, default=(1.2, 1.0), metavar=("MEAN", "VARIANCE"),
        help="of the consistency weight: exp(MEAN (1 - mean IoU) + VARIANCE variance), cut to 0.5 .. 3")
    add = parser.add_argument_group("watching").add_argument
    add("--every", type=runtime.positive, default=50, help="steps between checkpoints, pictures and validation")
    add("--val", type=runtime.natural, default=64, help="records of the val split in a validation; 0 for none")
    return parser


# ------------------------------------------------------------------------------------------------------------------ the objective

def advantages(rewards: torch.Tensor, divide_by_std: bool = True) -> torch.Tensor:
    """rewards (Q, G) -> advantages (Q, G): (R - mean) / (std + 1e-4) within a group, exactly 0 where all its rewards are equal.

    Source: GRPO (arXiv 2402.03300), as VLM-R1 computes it; without the division: Dr. GRPO (arXiv 2503.20783)."""
    advantage = rewards - rewards.mean(1, keepdim=True)
    if divide_by_std:
        advantage = advantage / (rewards.std(1, keepdim=True) + 1e-4)
    return advantage.masked_fill((rewards.amax(1) == rewards.amin(1))[:, None], 0.0)


def policy_loss(logp: torch.Tensor, logp_old: torch.Tensor, logp_ref: torch.Tensor | None, advantage: torch.Tensor,
                weight: torch.Tensor, n_tokens: int, clip: tuple[float, float] = (0.2, 0.2), beta: float = 0.0,
                ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """logp, logp_old, logp_ref (None at beta 0), advantage, weight: packed (tokens,) -> loss, and sums over tokens to log.

    n_tokens: of the whole step, over all micro-batches and ranks, so that losses and gradients simply add up. Clipped surrogate of PPO
    (arXiv 1707.06347) minus beta times the k3 estimate of the KL to the reference. The whole of a token's loss is multiplied by the weight
    of its group: section 3.4 of RSGround-R1 (second-hand); that the KL is part of it is our reading."""
    log_ratio = (logp - logp_old).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip[0], 1 + clip[1])
    gain = torch.minimum(ratio * advantage, clipped * advantage)
    sums = {"clipped": (ratio * advantage > clipped * advantage).float().sum().detach()}
    if beta:
        log_ref = (logp_ref - logp).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        kl = log_ref.exp() - log_ref - 1
        gain = gain - beta * kl
        sums["kl"] = kl.sum().detach()
    return -(weight.detach() * gain).sum() / n_tokens, sums


# ------------------------------------------------------------------------------------------------------------------ rollouts, rewards

def rollout(model, processor, prompts, args, seeds):
    """Q prompts -> completions (Q lists of G id tensors), their sampled log-probabilities alike, texts (Q lists of G)."""
    with runtime.gathered(model):
        tokens, logprobs, lengths = generate(model, prompts, args.group, args.max_new_tokens, args.temperature, seeds,
                                              args.cuda_graphs)
    completions = [[t[:n] for t, n in zip(*group)] for group in zip(tokens, lengths.tolist())]
    sampled = [[lp[:n] for lp, n in zip(*group)] for group in zip(logprobs, lengths.tolist())]
    return completions, sampled, [[processor.decode(c) for c in group] for group in completions]


def grade(texts, prompts, records, args):
    """texts (Q lists of G) -> the reward and its terms, each (Q, G); boxes (Q, G, 4) in original pixels, NaN where invalid.

    Where a box is invalid every term but the format is 0, whatever its function gives."""
    nothing = (torch.nan,) * 4
    boxes = torch.tensor([[answer.locate(answer.parse_box(t), p.frame) or nothing for t in group] for group, p in zip(texts, prompts)])
    target, size = (torch.tensor([getattr(r, name) for r in records], dtype=torch.float32)[:, None] for name in ("box", "size"))
    terms = {}
    for name in args.reward:
        if name == "format":
            terms[name] = torch.tensor([[float(answer.format_ok(t)) for t in group] for group in texts])
        else:
            value = term_function(name, args.alpha)(boxes, target, size)
            if value.shape != boxes.shape[:2]:
                raise ValueError(f"the reward term {name} has the shape {tuple(value.shape)}, not (Q, G) = {tuple(boxes.shape[:2])}")
            terms[name] = value.masked_fill(boxes.isnan().any(-1), 0.0)
    terms.setdefault("iou", reward.iou(boxes, target))                   # weights and log need it, be it rewarded or not
    return {"reward": sum(weight * terms[name] for name, weight in args.reward.items()), **terms}, boxes


def term_function(name: str, alpha: float) -> Callable:
    """The function of reward.TERMS of this name; the positional term with this alpha."""
    if name == "positional":
        return lambda pred, target, size: reward.positional(pred, target, alpha)
    return reward.TERMS[name]


def group_weights(iou: torch.Tensor, args: argparse.Namespace, step: int) -> torch.Tensor:
    """IoU rewards (Q, G) of this process's groups -> the weight (Q,) of each group's loss. No sum over the step is kept: weights are not
    renormalised (our reading of section 3.4).

    shuffled: the consistency weights of the whole step, dealt at random over its groups, on all processes alike. Ours, a control."""
    weight = partial(reward.consistency_weight, iou)
    mean, variance = args.lambdas
    if args.weighting == "off":
        return torch.ones(len(iou))
    if args.weighting == "mean":
        return weight(mean, 0.0)
    if args.weighting == "variance":
        return weight(0.0, variance)
    if args.weighting == "consistency":
        return weight(mean, variance)
    whole_step = by_place(runtime.all_gather(weight(mean, variance)))
    dealt = torch.randperm(len(whole_step), generator=torch.Generator().manual_seed(args.seed * 1_000_003 + step))
    return whole_step[dealt][runtime.rank()::runtime.world()]


def by_place(gathered: torch.Tensor) -> torch.Tensor:
    """(world * n,) with each process's values one behind the other -> the same by place in the step: process r has the places r,
    r + world, ... So what is dealt to a place does not depend on the number of processes."""
    return gathered.view(runtime.world(), -1).T.flatten()


# ------------------------------------------------------------------------------------------------------------------ the stage

def main():
    args = runtime.parse(flags(), "rft")
    check(args)
    records, val = runtime.load_records(args, "rft")
    runtime.set_steps(args, len(records), args.prompts, epochs=0.4)
    init, out = folder(args.init), Path(args.out)
    runtime.check_output(out, args.resume)
    model, processor = runtime.open_checkpoint(init, max_pixels=args.max_pixels)
    device = runtime.start(args.device)
    reference = None
    if args.beta:                                                        # in the compute dtype, frozen
        reference = runtime.open_checkpoint(init, device)[0].requires_grad_(False)
    model = runtime.prepare(model, device, args.freeze_vision, args.gradient_checkpointing)
    opt = runtime.optimizer(model, args.lr)
    first = runtime.restore(out, model, opt) if args.resume else 0
    run = runtime.run_description(args, "rft", records)
    runtime.begin(out, first, model, ("metrics.jsonl", "rollouts.jsonl"))

    def prompts_of(step):
        return [processor(data.open_image(r), r.text) for r in questions_of(records, args, step)]
    if not first:
        canary(model, processor, questions_of(records, args, 0), prompts_of(0), args)
    steps, skipped = range(first, args.steps), 0
    with tqdm(steps, initial=first, total=args.steps, desc="rft", disable=runtime.rank() > 0) as bar:
        for step, prompts in zip(bar, runtime.prefetch(prompts_of, steps, args.workers)):
            line, pictured = train_step(model, reference, opt, processor, questions_of(records, args, step), prompts, args, step)
            skipped = 0 if line["finite"] else skipped + 1
            due = (step + 1) % args.every == 0 or step + 1 == args.steps
            line |= evaluation.validate(model, processor, val, args) if due else {}
            if due and runtime.rank() == 0:
                pictured().save(out / f"rollouts_{step + 1:06d}.png")
            runtime.log(out / "metrics.jsonl", line)
            if due:                                                      # last: what a checkpoint covers is logged
                runtime.save(out, step + 1, model, opt, processor, run)
            kl = f"kl {line['kl']:.4f} " if "kl" in line else ""
            bar.set_postfix_str(f"reward {line['reward']:.3f} iou {line['iou']:.3f} tokens {line['length']:.0f} {kl}"
                                f"sampled-scored {line['sampled_scored_max']:.1e} peak {line['peak_GiB']:.1f} GiB")
            if skipped == runtime.STOP_AFTER_SKIPPED or skipped and step + 1 == args.steps:
                runtime.fail(f"no gradient is finite from step {step + 2 - skipped} on; lower --lr; what was saved before stands in {out}")


def questions_of(records, args, step):
    """This process's records of a step."""
    return runtime.batch(records, step, args.prompts, args.seed)[runtime.rank()::runtime.world()]


def train_step(model, reference, opt, processor, questions, prompts, args, step):
    """One step: rollouts, rewards, weights, --updates passes of clipped policy gradient -> the log line, and who draws its picture."""
    clock = [time.perf_counter()]
    places = range(runtime.rank(), args.prompts, runtime.world())        # of this process's questions among the step's
    seeds = torch.tensor([(args.seed * 1_000_003 + step) * args.prompts + i for i in places])
    completions, sampled, texts = rollout(model, processor, prompts, args, seeds)
    clock.append(time.perf_counter())

    terms, boxes = grade(texts, prompts, questions, args)
    valid, size = ~boxes[..., 0].isnan(), torch.tensor([r.size for r in questions], dtype=torch.float32)
    weight = group_weights(terms["iou"], args, step)                     # (Q,)
    advantage = advantages(terms["reward"], not args.no_std)             # (Q, G)
    lengths = torch.tensor([[len(c) for c in group] for group in completions])
    n_tokens = runtime.all_sum(lengths.sum()).item()                     # once, before any micro-batch
    clock.append(time.perf_counter())

    packed = [len(p.input_ids) + int(n.sum()) for p, n in zip(prompts, lengths)]
    micro = runtime.micro_batches(packed, args.micro_tokens)
    old, ref, sums, norms = {}, {}, Counter(), []
    lr = runtime.lr_at(step, args.steps, args.lr)
    for _ in range(args.updates):
        for m in micro:
            runtime.sync_gradients(model, m is micro[-1])
            logp, entropy = model.score(prompts[m], completions[m], args.temperature)
            if m.start not in old:                                       # the first pass: on policy by definition
                old[m.start] = logp.detach()
                apart = logp.detach() - torch.cat([lp for group in sampled[m] for lp in group])
                sums["sampled_scored"] = max(sums["sampled_scored"], apart.abs().max().item())
                if reference is not None:
                    with torch.no_grad():
                        ref[m.start] = reference.score(prompts[m], completions[m], args.temperature)[0]
            of_tokens = partial(per_token, lengths=lengths[m], device=logp.device)
            loss, logged = policy_loss(logp, old[m.start], ref.get(m.start), of_tokens(advantage[m]),
                                       of_tokens(weight[m, None].expand_as(lengths[m])), n_tokens, args.clip, args.beta)
            loss.backward()
            for name, value in (("loss", loss.detach()), ("entropy", entropy.sum()), *logged.items()):
                sums[name] += value.item()
        norms.append(runtime.update(model, opt, lr))
    clock.append(time.perf_counter())
    line = summary(step, terms, boxes, valid, size, weight, advantage, lengths, texts, sums, n_tokens, args)
    line |= {"lr": lr, "grad_norm": norms[-1], "finite": all(n < float("inf") for n in norms),
             **{f"seconds_{name}": b - a for name, a, b in zip(("rollout", "reward", "update"), clock, clock[1:])},
             "peak_GiB": runtime.peak_memory(model)}
    keep_rollouts(Path(args.out), step, questions, texts, terms, boxes)
    first = questions[0]
    return line, lambda: pictures.draw_rollouts(data.open_image(first), boxes[0], terms["reward"][0], first.box, first.text)


def per_token(values: torch.Tensor, lengths: torch.Tensor, device: torch.device) -> torch.Tensor:
    """values (Q, G) of rollouts with these lengths (Q, G) -> packed (tokens,), each token its rollout's value."""
    return values.flatten().repeat_interleave(lengths.flatten()).to(device)


def varies(term: torch.Tensor) -> torch.Tensor:
    """(Q, G) -> (Q,) bool: do a group's values differ?"""
    return term.amax(1) > term.amin(1)


def positional_alone(terms: dict[str, torch.Tensor], weights: dict[str, float]) -> torch.Tensor:
    """Groups (Q,) bool in which no term of the reward but the positional one tells rollouts apart."""
    others = [varies(terms[name]) for name, weight in weights.items() if weight and name != "positional"]
    alone = varies(terms["positional"]) & (weights["positional"] != 0)
    for other in others:
        alone = alone & ~other
    return alone


def summary(step, terms, boxes, valid, size, weight, advantage, lengths, texts, sums, n_tokens, args):
    """What a step logs, over the groups of all ranks."""
    scatter, measured = reward.dispersion(boxes, valid, size), valid.sum(1) >= 2
    n, apart = args.prompts * args.group, terms["iou"].amax(1) == 0      # apart: no box of the group touches the target
    local = {**{name: term.sum() / n for name, term in terms.items()},
             **{f"{name}_group_std": term.std(1).nan_to_num().sum() / args.prompts for name, term in terms.items()},
             "length": lengths.sum() / n, "truncated": (lengths == args.max_new_tokens).sum() / n, "unparsable": (~valid).sum() / n,
             "no_overlap_groups": apart.sum() / args.prompts, "no_overlap_advantage": advantage[apart].abs().sum() / n,
             "zero_variance_groups": (~varies(terms["reward"])).sum() / args.prompts,
             "unique": sum(len(set(group)) for group in texts) / n,
             "consistency_weight": weight.sum() / args.prompts, "advantage": advantage.abs().sum() / n,
             "scattered": scatter[measured].sum(), "measured": measured.sum(),
             "entropy": sums["entropy"] / (n_tokens * args.updates),
             "clipped": sums["clipped"] / (n_tokens * args.updates), "loss": sums["loss"] / args.updates}
    if args.beta:
        local["kl"] = sums["kl"] / (n_tokens * args.updates)
    if "positional" in args.reward:
        local["positional_alone_advantage"] = advantage[positional_alone(terms, args.reward)].abs().sum() / n
    total = runtime.all_sum(torch.tensor([float(v) for v in local.values()], dtype=torch.float64)).tolist()
    line = dict(zip(local, total))
    line["dispersion"] = line.pop("scattered") / max(1.0, line.pop("measured"))
    for name in ("no_overlap_advantage", "positional_alone_advantage"):  # their share of the step's sum of |A|
        if name in line:
            line[name] /= max(1e-12, line["advantage"])
    line["consistency_weight_min"] = -runtime.all_max(-weight.min()).item()
    line["consistency_weight_max"] = runtime.all_max(weight.max()).item()
    return {"step": step + 1, **line, "sampled_scored_max": runtime.all_max(torch.tensor(sums["sampled_scored"])).item()}


def keep_rollouts(out, step, questions, texts, terms, boxes):
    """Every rollout of the first rank with its rewards, a line a question."""
    if runtime.rank():
        return
    with open(out / "rollouts.jsonl", "a", encoding="utf-8") as file:
        for q, (record, group) in enumerate(zip(questions, texts)):
            rewards = {name: [round(v, 4) for v in term[q].tolist()] for name, term in terms.items()}
            valid = [None if b[0] != b[0] else [round(v, 1) for v in b] for b in boxes[q].tolist()]
            line = {"step": step + 1, "id": record.id, "expression": record.text, "target": record.box, "boxes": valid, **rewards}
            file.write(json.dumps({**line, "texts": group}) + "\n")


def canary(model, processor, questions, prompts, args):
    """Before step 1: what the starting policy answers, so that a reward that can't rise is seen now and not in an hour."""
    completions, _, texts = rollout(model, processor, prompts, args, torch.arange(len(questions)) + 7_777 * (runtime.rank() + 1))
    terms, _ = grade(texts, prompts, questions, args)
    wrong = Counter(answer.failure(t) or "parsed" for group in texts for t in group)
    seen = runtime.all_sum(torch.tensor([terms["iou"].sum(), terms["format"].sum(), terms["iou"].numel()]))
    counts = runtime.all_sum(torch.tensor([wrong[name] for name in ("parsed", *answer.FAILURES)])).tolist()
    if runtime.rank() == 0:
        print(f"before step 1: mean IoU {seen[0] / seen[2]:.3f}, format {seen[1] / seen[2]:.3f} over {int(seen[2])} sampled answers; "
              + ", ".join(f"{n} {name}" for name, n in zip(("parsed", *answer.FAILURES), counts) if n))
        if seen[0] == 0:
            print("warning: no answer touches its target; the IoU reward is silent until one does")


def check(args):
    """Flags that do not go together."""
    if args.prompts % runtime.world():
        runtime.fail(f"--prompts {args.prompts} is not a multiple of the {runtime.world()} processes")
    if args.group < 2:
        runtime.fail("--group 1 leaves nothing to compare a rollout with; use 2 or more")


if __name__ == "__main__":
    runtime.main(main)
