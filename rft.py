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
import argparse
import json
import time
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

import data
import eval as evaluation
import reward
import runtime
from generate import generate
from model import QwenVL

MAX_LOG_RATIO = 20.0              # exp() of more is of no use and may be infinite
STOP_AFTER_SKIPPED = 5            # non-finite steps in a row: something is broken


def flags():
    parser = argparse.ArgumentParser(description="GRPO with a positional reward and consistency-weighted updates (stage 2)",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    runtime.add_common_flags(parser, "rft")
    add = parser.add_argument_group("policy gradient").add_argument
    add("--prompts", type=int, default=16, help="questions Q a step, over all processes")
    add("--group", type=int, default=8, help="rollouts G of each question")
    add("--micro", type=int, default=1, help="groups in one forward and backward pass: memory against speed")
    add("--max-new-tokens", type=int, default=256, help="tokens; a longer rollout is cut and counted as truncated")
    add("--temperature", type=float, default=1.0, help="of sampling, and so of the scored log-probabilities")
    add("--lr", type=float, default=1e-6, help="peak learning rate; 1e-6 for a 3B model, about 1e-4 for the embedded one")
    add("--updates", type=int, default=1, help="passes over a step's rollouts")
    add("--clip", type=float, nargs=2, default=(0.2, 0.2), metavar=("LOW", "HIGH"), help="the ratio is clipped to 1 - LOW .. 1 + HIGH")
    add("--beta", type=float, default=0.0, help="weight of the KL to the starting policy; at 0 no reference model is kept")
    add("--no-std", action="store_true", help="do not divide advantages by their group's standard deviation")
    add("--freeze-vision", action="store_true", help="train the language model alone")
    add = parser.add_argument_group("reward").add_argument
    add("--weights", type=float, nargs=3, default=(1.0, 0.5, 0.5), metavar=("IOU", "POS", "FORMAT"), help="of the reward's terms")
    add("--positional", choices=reward.POSITIONAL, default="exp", help="shape of the positional term")
    add("--tau", type=float, default=0.1, help="its scale, in image diagonals (target diagonals where size-aware)")
    add("--weighting", choices=("coherent", "focus", "off", "shuffled"), default="coherent",
        help="groups that agree count more, groups that scatter count more, all alike, or the coherent weights dealt out at random (control)")
    add = parser.add_argument_group("watching").add_argument
    add("--every", type=int, default=50, help="steps between checkpoints, pictures and validation")
    add("--val", type=int, default=64, help="records of the val split in a validation; 0 for none")
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

def rollout(model, processor, records, args, seeds):
    """Q records -> prompts, completions (Q lists of G id tensors), sampled log-probabilities (packed), texts (Q lists of G)."""
    prompts = [processor(data.open_image(r), r.text) for r in records]
    tokens, logprobs, lengths = generate(model, prompts, args.group, args.max_new_tokens, args.temperature, seeds)
    completions = [[t[:n] for t, n in zip(*group)] for group in zip(tokens, lengths.tolist())]
    sampled = torch.cat([lp[:n] for q, ns in zip(logprobs, lengths.tolist()) for lp, n in zip(q, ns)])
    return prompts, completions, sampled, [[processor.decode(c) for c in group] for group in completions]


def grade(texts, prompts, records, args):
    """texts (Q lists of G) -> rewards by term, each (Q, G); boxes (Q, G, 4) in original pixels, NaN where invalid; valid (Q, G)."""
    boxes = torch.full((len(texts), args.group, 4), torch.nan)
    for q, (group, prompt, record) in enumerate(zip(texts, prompts, records)):
        for g, text in enumerate(group):
            box = reward.parse_box(text)
            box = box and reward.clamp_box(data.to_image_frame(box, prompt.frame), record.size)
            if box:
                boxes[q, g] = torch.tensor(box)
    valid = ~boxes[..., 0].isnan()
    target, size = (torch.tensor([getattr(r, name) for r in records], dtype=torch.float32)[:, None] for name in ("box", "size"))
    terms = {"iou": reward.iou(boxes, target), "positional": reward.positional(boxes, target, size, args.tau, args.positional),
             "format": torch.tensor([[float(reward.format_ok(t)) for t in group] for group in texts])}
    terms = {name: term if name == "format" else term.where(valid, torch.zeros(())) for name, term in terms.items()}
    terms["reward"] = sum(w * terms[name] for w, name in zip(args.weights, ("iou", "positional", "format")))
    return terms, boxes, valid


def group_weights(consistency, valid, args, generator):
    """consistency (Q,), valid (Q, G) -> weight (Q,) of each group in the update."""
    mode = "coherent" if args.weighting == "shuffled" else args.weighting
    weight = reward.update_weight(consistency, valid.float().mean(1), mode)
    if args.weighting == "shuffled":                                    # over the groups of all ranks, the same on each
        everyone = runtime.all_gather(weight)
        rank = dist.get_rank() if dist.is_initialized() else 0
        weight = everyone[torch.randperm(len(everyone), generator=generator)][rank * len(weight):][:len(weight)]
    return weight


# ------------------------------------------------------------------------------------------------------------------ the stage

def main():
    args = flags().parse_args()
    run = runtime.start(args, "rft")
    records = data.load(args.data, args.root, "rft")
    raise NotImplementedError


if __name__ == "__main__":
    runtime.main(main)
