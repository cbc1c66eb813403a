"""Stage 2: GRPO on groups of rollouts, with a continuous positional reward and updates weighted by the rollouts' spatial consistency.

Per step: sample G answers to each of Q questions, reward them (reward.py), compare each with its own group, weight the groups by how far
their boxes agree, and take one clipped policy-gradient step (or --updates of them). Boxes alone are needed, no reasoning.

Source: GRPO is DeepSeekMath's (arXiv 2402.03300) with token-level normalisation over the whole step's tokens; the positional reward and the
consistency weight are our reading of the abstract of RSGround-R1 (arXiv 2601.21634), whose formulas are not public to us. The weight is
scaled so that a step moves the policy as far as without it; otherwise its effect could not be told from another learning rate.

    torchrun rft.py --data dior                                  one GPU; starts from ckpt/sft, writes ckpt/rft
    torchrun --nproc_per_node 8 rft.py --data dior               eight GPUs, the same result to rounding
    python rft.py                                                the embedded data on a laptop
"""
import json
import time
from collections import Counter
from pathlib import Path

import torch
from tqdm import tqdm

import data
import eval as evaluation
import reward
import runtime
from generate import generate
from model import folder

MAX_LOG_RATIO = 20.0              # exp() of more is of no use and may be infinite


def flags():
    parser = runtime.FlagParser("GRPO with a positional reward and consistency-weighted updates (stage 2)")
    runtime.add_common_flags(parser, "rft", "ckpt/sft", 500)
    add = parser.add_argument_group("policy gradient").add_argument
    add("--prompts", type=runtime.positive, default=16, help="questions Q a step, over all processes")
    add("--group", type=runtime.positive, default=8, help="rollouts G of each question")
    add("--max-new-tokens", type=runtime.positive, default=256, help="tokens; a longer rollout is cut and counted as truncated")
    add("--temperature", type=runtime.above_zero, default=1.0, help="of sampling, and so of the scored log-probabilities")
    add("--cuda-graphs", action="store_true", help="decode by CUDA graphs; not measured yet, see LOG.md")
    add("--lr", type=runtime.above_zero, default=1e-6, help="peak learning rate; 1e-6 for a 3B model, about 1e-4 for the embedded one")
    add("--updates", type=runtime.positive, default=1, help="passes over a step's rollouts")
    add("--clip", type=runtime.not_negative, nargs=2, default=(0.2, 0.2), metavar=("LOW", "HIGH"),
        help="the ratio is clipped to 1 - LOW .. 1 + HIGH")
    add("--beta", type=runtime.not_negative, default=0.0, help="weight of the KL to the starting policy; at 0 no reference model is kept")
    add("--no-std", action="store_true", help="do not divide advantages by their group's standard deviation")
    add = parser.add_argument_group("reward").add_argument
    add("--weights", type=runtime.finite, nargs=3, default=(1.0, 0.5, 0.5), metavar=("IOU", "POS", "FORMAT"), help="of the reward's terms")
    add("--positional", choices=reward.POSITIONAL, default="exp", help="shape of the positional term")
    add("--tau", type=runtime.above_zero, default=0.1, help="its scale, in image sides over sqrt(2) (in target diagonals where size-aware: "
        "try 1)")
    add("--weighting", choices=(*reward.WEIGHTINGS, "shuffled"), default="coherent",
        help="of groups: more for those that agree, or that scatter (focus), none, or the coherent weights dealt at random (control)")
    add = parser.add_argument_group("watching").add_argument
    add("--every", type=runtime.positive, default=50, help="steps between checkpoints, pictures and validation")
    add("--val", type=runtime.natural, default=64, help="records of the val split in a validation; 0 for none")
    return parser


# ------------------------------------------------------------------------------------------------------------------ the objective

def advantages(reward, weight, divide_by_std=True):
    """reward (Q, G), weight (Q,) -> advantages (Q, G) float32, over the groups of all ranks; our reading of the consistency guidance.

    (R - mean) / (std + 1e-4) within a group, exactly 0 where all rewards are equal; then times the group's weight, scaled so that the sum
    of |A| over the step stays what it was. One weight a group: its advantages still sum to 0."""
    plain = reward - reward.mean(1, keepdim=True)
    if divide_by_std:
        plain = plain / (reward.std(1, keepdim=True) + 1e-4)
    plain = plain.masked_fill((reward.amax(1) == reward.amin(1))[:, None], 0.0)
    weighted = plain * weight[:, None]
    before, after = runtime.all_sum(torch.stack((plain.abs().sum(), weighted.abs().sum()))).tolist()
    return weighted * (before / after) if after > 0 else plain


def policy_loss(logp, logp_old, logp_ref, advantage, n_tokens, clip=(0.2, 0.2), beta=0.0):
    """logp, logp_old, logp_ref (None at beta 0), advantage: packed (tokens,) -> loss, and sums over tokens to log.

    n_tokens: of the whole step, over all micro-batches and ranks, so that losses and gradients simply add up. Clipped surrogate of PPO
    (arXiv 1707.06347) minus beta times the k3 estimate of the KL to the reference."""
    log_ratio = (logp - logp_old).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip[0], 1 + clip[1])
    gain = torch.minimum(ratio * advantage, clipped * advantage)
    sums = {"clipped": (ratio * advantage > clipped * advantage).float().sum().detach()}
    if beta:
        away = (logp_ref - logp).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        kl = away.exp() - away - 1
        gain = gain - beta * kl
        sums["kl"] = kl.sum().detach()
    return -gain.sum() / n_tokens, sums


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
    """texts (Q lists of G) -> the reward and its terms, each (Q, G); boxes (Q, G, 4) in original pixels, NaN where invalid."""
    nothing = (torch.nan,) * 4
    boxes = torch.tensor([[evaluation.locate(reward.parse_box(t), p.frame) or nothing for t in group] for group, p in zip(texts, prompts)])
    target, size = (torch.tensor([getattr(r, name) for r in records], dtype=torch.float32)[:, None] for name in ("box", "size"))
    terms = {"iou": reward.iou(boxes, target), "positional": reward.positional(boxes, target, size, args.tau, args.positional),
             "format": torch.tensor([[float(reward.format_ok(t)) for t in group] for group in texts])}
    return {"reward": sum(w * term for w, term in zip(args.weights, terms.values(), strict=True)), **terms}, boxes


def group_weights(consistency, valid_share, args, step):
    """consistency (Q,), valid_share (Q,) -> weight (Q,) of each group in the update."""
    if args.weighting != "shuffled":
        return reward.update_weight(consistency, valid_share, args.weighting)
    weights = runtime.all_gather(reward.update_weight(consistency, valid_share, "coherent"))          # of all ranks, the same on each
    dealt = torch.randperm(len(weights), generator=torch.Generator().manual_seed(args.seed * 1_000_003 + step))
    return weights[dealt][runtime.rank() * len(consistency):][:len(consistency)]


# ------------------------------------------------------------------------------------------------------------------ the stage

def main():
    args = runtime.parse(flags(), "rft")
    check(args)
    records, val = runtime.load_records(args, "rft")
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
            bar.set_postfix_str(f"reward {line['reward']:.3f} iou {line['iou']:.3f} tokens {line['length']:.0f} kl {line['kl']:.4f} "
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
    consistency = reward.spatial_consistency(boxes, valid, size)
    weight = group_weights(consistency, valid.float().mean(1), args, step)
    advantage = advantages(terms["reward"], weight, not args.no_std)     # (Q, G)
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
            each = advantage[m].flatten().repeat_interleave(lengths[m].flatten()).to(logp.device)
            loss, logged = policy_loss(logp, old[m.start], ref.get(m.start), each, n_tokens, args.clip, args.beta)
            loss.backward()
            for name, value in (("loss", loss.detach()), ("entropy", entropy.sum()), *logged.items()):
                sums[name] += value.item()
        norms.append(runtime.update(model, opt, lr))
    clock.append(time.perf_counter())
    line = summary(step, terms, boxes, valid, size, consistency, weight, advantage, lengths, texts, sums, n_tokens, args)
    line |= {"lr": lr, "grad_norm": norms[-1], "finite": all(n < float("inf") for n in norms),
             **{f"seconds_{name}": b - a for name, a, b in zip(("rollout", "reward", "update"), clock, clock[1:])},
             "peak_GiB": runtime.peak_memory(model)}
    keep_rollouts(Path(args.out), step, questions, texts, terms, boxes)
    return line, lambda: picture(questions[0], boxes[0], terms["reward"][0])


def summary(step, terms, boxes, valid, size, consistency, weight, advantage, lengths, texts, sums, n_tokens, args):
    """What a step logs, over the groups of all ranks."""
    scatter, measured = reward.dispersion(boxes, valid, size), valid.sum(1) >= 2
    n, apart = args.prompts * args.group, terms["iou"].amax(1) == 0      # apart: no box of the group touches the target
    local = {**{name: term.sum() / n for name, term in terms.items()},
             **{f"{name}_group_std": term.std(1).nan_to_num().sum() / args.prompts for name, term in terms.items()},
             "length": lengths.sum() / n, "truncated": (lengths == args.max_new_tokens).sum() / n, "unparsable": (~valid).sum() / n,
             "no_overlap_groups": apart.sum() / args.prompts, "no_overlap_advantage": advantage[apart].abs().sum() / n,
             "zero_variance_groups": (terms["reward"].amax(1) == terms["reward"].amin(1)).sum() / args.prompts,
             "unique": sum(len(set(group)) for group in texts) / n,
             "consistency": consistency.sum() / args.prompts, "weight": weight.sum() / args.prompts, "advantage": advantage.abs().sum() / n,
             "scattered": scatter[measured].sum(), "measured": measured.sum(),
             "entropy": sums["entropy"] / (n_tokens * args.updates), "kl": sums["kl"] / (n_tokens * args.updates),
             "clipped": sums["clipped"] / (n_tokens * args.updates), "loss": sums["loss"] / args.updates}
    total = runtime.all_sum(torch.tensor([float(v) for v in local.values()], dtype=torch.float64)).tolist()
    line = dict(zip(local, total))
    line["dispersion"] = line.pop("scattered") / max(1.0, line.pop("measured"))
    line["no_overlap_advantage"] /= max(1e-12, line["advantage"])        # their share of the step's sum of |A|
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


def picture(record, boxes, rewards):
    """One group's boxes over its image, the redder the less its reward; the target in green."""
    low, high = rewards.min().item(), rewards.max().item()
    shades = [int(255 * (r - low) / (high - low + 1e-6)) for r in rewards.tolist()]
    drawn = [(b, (255, s, 0)) for b, s in zip(boxes.tolist(), shades) if b[0] == b[0]]
    return data.draw_boxes(data.open_image(record), [*drawn, (record.box, "lime")], f"{record.text} (reward {low:.2f} to {high:.2f})")


def canary(model, processor, questions, prompts, args):
    """Before step 1: what the starting policy answers, so that a reward that can't rise is seen now and not in an hour."""
    completions, _, texts = rollout(model, processor, prompts, args, torch.arange(len(questions)) + 7_777 * (runtime.rank() + 1))
    terms, _ = grade(texts, prompts, questions, args)
    wrong = Counter(reward.failure(t) or "parsed" for group in texts for t in group)
    seen = runtime.all_sum(torch.tensor([terms["iou"].sum(), terms["format"].sum(), terms["iou"].numel()]))
    counts = runtime.all_sum(torch.tensor([wrong[name] for name in ("parsed", *reward.FAILURES)])).tolist()
    if runtime.rank() == 0:
        print(f"before step 1: mean IoU {seen[0] / seen[2]:.3f}, format {seen[1] / seen[2]:.3f} over {int(seen[2])} sampled answers; "
              + ", ".join(f"{n} {name}" for name, n in zip(("parsed", *reward.FAILURES), counts) if n))
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
