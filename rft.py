"""Stage 2: GRPO with RSGround-R1's positional reward and consistency-weighted loss.

One step: sample G answers to each of Q questions, reward them, turn the rewards of each group
into advantages, weight the group's loss by how far its answers miss or scatter, and take one
clipped policy-gradient step. Training needs boxes only, no reasoning.

RSGround-R1 (arXiv 2601.21634): the reward is R = IoU + 0.1 positional + format (section 3.3), and
a group's whole loss is multiplied by its weight (section 3.4). We know both only second-hand.
Most other settings are VLM-R1's; docs/method.md has all formulas and the source of each setting.

Q questions per step over all processes, G rollouts each. Inside a step, the Q of a tensor's shape
counts only this process's questions.

    python rft.py --lr 1e-4                              drawn scenes, on a laptop
    torchrun rft.py --data dior --epochs 0.4             one GPU: ckpt/sft -> ckpt/rft
    torchrun --nproc_per_node 8 rft.py --data dior       eight GPUs, same result up to rounding
"""
import argparse
import functools
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import eval as evaluation
import reward
from data import open_image
from model import QwenVL
from qwen import lora
from qwen.answer import failure, form, format_ok, locate, parse_box
from qwen.generate import generate
from qwen.hub import folder
from qwen.processor import Processor, Prompt
from readers.base import Record, UnreadableImage, sha256
from report.pictures import draw_rollouts
from train import dist, memory
from train.checkpoints import open_model
from train.flags import (
    FlagParser, Values, above_zero, add_common_flags, as_typed, moderate, natural, not_negative,
    parse, positive, set_steps)
from train.run import Run, epoch_order, launch, load_records, record_at, trailing

MAX_LOG_RATIO = 20.0              # exp() of a larger log-ratio is useless, and may overflow
COLLAPSED_AFTER = 10              # steps in a row without a learning signal: then warn
LEAST_ENTROPY = 0.01              # nats per token; below this, answers are nearly identical
WEIGHTINGS = ("consistency", "mean", "variance", "off", "shuffled")
# Keys of metrics.jsonl and rollouts.jsonl (docs/logs.md) that no term of the reward may use.
RESERVED = set("""
    step time loss lr grad_norm finite warning peak_GiB val_mIoU val_Pr@0.5 val_failed unreadable
    reward length truncated unparsable unique no_overlap_groups no_overlap_advantage dispersion kl
    positional_alone_advantage zero_variance_groups resampled advantage consistency_weight
    consistency_weight_min consistency_weight_max clipped clipped_completions entropy seconds
    sampled_scored_max seconds_rollout seconds_reward seconds_resample seconds_update
    id expression target boxes texts""".split())


def named_weights(*texts: str) -> dict[str, float]:
    """"NAME=WEIGHT" each -> dict in a fixed order: sums must not depend on the user's."""
    names = (*reward.TERMS, "format")
    weights: dict[str, float] = {}
    for text in texts:
        name, _, weight = text.partition("=")
        if name not in names:
            raise argparse.ArgumentTypeError(
                f"{text}: no term is called {name!r}; there are {', '.join(names)}")
        if name in weights:
            raise argparse.ArgumentTypeError(f"{text}: {name} is given twice")
        try:
            weights[name] = moderate(weight)
        except argparse.ArgumentTypeError:
            raise argparse.ArgumentTypeError(
                f"{text} is not NAME=WEIGHT with a finite number") from None
    return {name: weights[name] for name in names if name in weights}


def flags() -> FlagParser:
    parser = FlagParser(
        description="GRPO with a positional reward and consistency-weighted updates (stage 2)")
    add_common_flags(parser, "rft", init="ckpt/sft")
    add = parser.add_argument_group("rollouts").add_argument
    add("--prompts", type=positive, default=8, help="questions Q per step, over all processes")
    add("--group", type=positive, default=8, help="rollouts G per question")
    add("--max-new-tokens", type=positive, default=256, help="longer rollouts are truncated")
    add("--temperature", type=above_zero, default=1.0, help="of sampling and of scoring")
    add("--resample", type=natural, default=0, metavar="N",
        help="replace groups of equal rewards by new questions, up to N times (DAPO)")
    add("--cuda-graphs", action="store_true", help="decode with CUDA graphs")
    add = parser.add_argument_group("objective").add_argument
    add("--loss", choices=("grpo", "dapo", "dr-grpo"), default="grpo",
        help="mean over each completion's tokens, then over completions (grpo); over the step's "
        "tokens (dapo); sum divided by completions times --max-new-tokens (dr-grpo)")
    add("--ratio", choices=("token", "sequence"), default="token",
        help="probability ratio to the old policy: one per token, or one per completion, its "
        "geometric mean (GSPO: with --clip 3e-4 4e-4)")
    add("--clip", type=not_negative, nargs=2, default=(0.2, 0.2), metavar=("LOW", "HIGH"),
        help="clip the ratio to 1 - LOW .. 1 + HIGH; acts only with several optimizer steps")
    add("--beta", type=not_negative, default=0.04,
        help="weight of the KL to the starting policy; 0: no reference model")
    add("--mask-truncated", action="store_true", help="do not learn from truncated rollouts")
    add("--no-std", action="store_true", help="do not divide advantages by their group's std")
    add = parser.add_argument_group("updates").add_argument
    add("--lr", nargs="+", action=Values, default=1e-6, metavar=("LR", "WARMUP"),
        const=(("lr", above_zero, 1), ("warmup", natural, 1)),
        help="peak learning rate: 1e-6 for a 3B model, about 1e-4 for toy/base; "
        "default WARMUP: 3%% of the steps")
    add("--updates", type=positive, default=1, help="passes over a step's rollouts")
    add("--minibatches", type=positive, default=1, metavar="M",
        help="optimizer steps per pass; each uses Q / M questions")
    add = parser.add_argument_group("reward").add_argument
    add("--reward", nargs="+", action=Values, default=dict(reward.DEFAULT_REWARD),
        metavar="NAME=WEIGHT", const=[("reward", named_weights, None)],
        help=f"terms and their weights: {', '.join(reward.TERMS)}, format; a term of weight 0 is "
        f"only logged; default: {as_typed(reward.DEFAULT_REWARD)}")
    add("--alpha", type=above_zero, default=2.5,
        help="std of the positional term's kernel, in halves of the true box's sides")
    add("--weighting", nargs="+", action=Values, default="consistency",
        metavar=("NAME", "MEAN VARIANCE IOU"),
        const=(("weighting", WEIGHTINGS, 1),
               ("lambdas", lambda mean, variance: [moderate(mean), moderate(variance)], 2),
               ("weight_of", ("iou", "iou_hard"), 1)),
        help="weight of a group's loss. consistency: exp(MEAN (1 - mean IoU) + VARIANCE (variance "
        "of IoU)), clipped to 0.5 .. 3; mean, variance: only that part; off: 1; shuffled: the "
        "consistency weights dealt at random, a control. With iou_hard as IOU, an IoU counts as 1 "
        "above 0.5, else as 0; default: consistency 1.2 1 iou")
    parser.set_defaults(lambdas=(1.2, 1.0), weight_of="iou")
    return parser


def check_flags(args: argparse.Namespace) -> None:
    """Refuses flags that do not fit each other, or warns."""
    if args.prompts % (dist.world() * args.minibatches):
        dist.fail(f"--prompts {args.prompts} is not a multiple of {dist.world()} processes times "
                  f"--minibatches {args.minibatches}")
    if args.group < 2:
        dist.fail("--group 1 leaves nothing to compare a rollout with; use 2 or more")
    if "format" in reward.TERMS:
        dist.fail("reward.TERMS has a term called format, which rft.py computes itself; rename it")
    for name in args.reward:
        if name not in (*reward.TERMS, "format"):
            dist.fail(f"the run rewards {name!r}, which reward.TERMS lacks; add it there again")
        if name in RESERVED or name.endswith("_group_std") or "=" in name:
            dist.fail(f"a term cannot be called {name!r}: the logs use that name; rename it")
    if not any(args.reward.values()):
        dist.fail("no term of --reward has a weight; give one a weight other than 0")
    if args.ratio == "sequence" and args.loss != "grpo" and dist.rank() == 0:
        print(f"warning: with --ratio sequence, --loss {args.loss} weights a completion by "
              "its length; GSPO is --loss grpo", file=sys.stderr)


# ---------------------------------------------------------------- the objective

def advantages(rewards: Tensor, divide_by_std: bool = True) -> Tensor:
    """rewards (Q, G) -> (Q, G): (R - mean) / (std + 1e-4) in a group, 0 if all are equal.

    std divides by G - 1. Source: GRPO (arXiv 2402.03300), VLM-R1; undivided, Dr. GRPO (2503.20783).
    """
    advantage = rewards - rewards.mean(1, keepdim=True)
    if divide_by_std:
        advantage = advantage / (rewards.std(1, keepdim=True) + 1e-4)
    return advantage.masked_fill(~varies(rewards)[:, None], 0.0)


def varies(values: Tensor) -> Tensor:
    """(Q, G) -> (Q,) bool: do the values of a group differ?"""
    return values.amax(1) > values.amin(1)


def policy_loss(
        logp: Tensor, logp_old: Tensor, logp_ref: Tensor | None, advantage: Tensor,
        weight: Tensor, n_tokens: int, clip: Sequence[float] = (0.2, 0.2), beta: float = 0.0,
        lengths: Tensor | None = None, *, loss: str = "dapo", ratio: str = "token",
        completions: int = 0, max_new_tokens: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
    """One micro-batch's share of an optimizer step's loss, and sums over its tokens for the log.

    Tensors are packed (tokens,), except lengths (completions,); logp_ref is None if beta is 0.
    n_tokens (without masked ones) and completions count the whole optimizer step, over all
    micro-batches and processes, so shares and gradients add up. A token's gain is PPO's clipped
    surrogate (arXiv 1707.06347) minus beta times the KL to the reference (estimator k3). Its loss
    is -weight * gain; weight is its group's, or 0 if it is masked. We assume that the weight
    multiplies the KL too.
    """
    log_ratio = logp - logp_old
    if ratio == "sequence":
        # GSPO (arXiv 2507.18071): one ratio per completion, the geometric mean over its tokens.
        means = torch.stack([part.mean() for part in log_ratio.split(lengths.tolist())])
        log_ratio = means.repeat_interleave(lengths.to(means.device))
    r = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    surrogate = r * advantage
    gain = torch.minimum(surrogate, r.clamp(1 - clip[0], 1 + clip[1]) * advantage)
    counted = weight > 0
    clipped = (gain != surrogate) & counted
    sums = {"clipped": clipped.float().sum()}
    if lengths is not None:
        per_completion = [part.any() for part in clipped.split(lengths.tolist())]
        sums["clipped_completions"] = torch.stack(per_completion).float().sum()
    if beta:
        d = (logp_ref - logp).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        kl = d.exp() - d - 1
        gain = gain - beta * kl
        sums["kl"] = (kl * counted).sum().detach()
    losses = -(weight.detach() * gain)                             # (tokens,)
    if loss == "grpo":
        losses = losses / lengths.repeat_interleave(lengths).to(losses.device)
        return losses.sum() / completions, sums
    if loss == "dr-grpo":
        return losses.sum() / (completions * max_new_tokens), sums
    return losses.sum() / n_tokens, sums


def group_weights(iou: Tensor, args: argparse.Namespace, step: int) -> Tensor:
    """IoU (Q, G) of this process's groups -> weights (Q,) of their losses."""
    if args.weighting == "off":
        return torch.ones(len(iou))
    mean, variance = args.lambdas
    if args.weight_of == "iou_hard":
        iou = reward.hard(iou)
    weights = reward.consistency_weight(
        iou, 0.0 if args.weighting == "variance" else mean,
        0.0 if args.weighting == "mean" else variance)
    if args.weighting == "shuffled":
        # The control deals the step's weights to its groups at random, in the same way on all
        # processes. Process r has questions r, r + world, ..., so the transpose puts the gathered
        # weights in the order of the questions.
        gathered = torch.tensor(dist.gather_lists(weights.tolist()), dtype=weights.dtype)
        weights = gathered.view(dist.world(), -1).T.flatten()
        random = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        weights = weights[torch.randperm(len(weights), generator=random)][dist.rank()::dist.world()]
    return weights


# ---------------------------------------------------------------- rollouts and rewards

@dataclass
class Policy:
    model: QwenVL
    processor: Processor
    optimizer: torch.optim.Optimizer | None
    reference: QwenVL | None          # None without a KL; with --lora the model itself

    def prompt(self, record: Record) -> Prompt:
        return self.processor(open_image(record), record.text)


@dataclass
class Group:
    """One question, its G sampled answers, and their rewards."""

    record: Record
    prompt: Prompt
    completions: list[Tensor]         # G x (L,) ids, with the end of turn
    sampled_logp: list[Tensor]        # G x (L,) log-probabilities at sampling
    texts: list[str]                  # G
    truncated: Tensor                 # (G,) bool: cut before the end of turn
    # Set by grade():
    boxes: Tensor | None = None       # (G, 4) original pixels, NaN if invalid
    terms: dict[str, Tensor] = field(default_factory=dict)        # name -> (G,)
    reward: Tensor | None = None      # (G,) weighted sum of the terms


def sample(
        policy: Policy, records: Sequence[Record], prompts: Sequence[Prompt], seeds: Tensor,
        args: argparse.Namespace) -> list[Group]:
    """G rollouts for each of Q prompts. Every process must call it, even with Q = 0."""
    # Sharded parameters are gathered once, not for each token.
    with dist.gathered(policy.model) as model:
        if not prompts:
            return []
        tokens, logprobs, lengths = generate(
            model, prompts, args.group, args.max_new_tokens, args.temperature, seeds,
            args.cuda_graphs)
    on_host = torch.cat((tokens, lengths[..., None]), -1).tolist()     # one wait for the device
    groups = []
    for q, rollouts in enumerate(on_host):
        ids = [rollout[:rollout[-1]] for rollout in rollouts]
        groups.append(Group(
            records[q], prompts[q],
            [tokens[q, g, :len(own)] for g, own in enumerate(ids)],
            [logprobs[q, g, :len(own)] for g, own in enumerate(ids)],
            [policy.processor.decode(own) for own in ids],
            torch.tensor([own[-1] not in policy.model.stop_ids for own in ids])))
    return groups


def grade(group: Group, args: argparse.Namespace) -> Group:
    """Text -> box -> terms of the reward -> their weighted sum, in place.

    An invalid box earns 0 in every term but the format, whatever the term's function returns.
    """
    boxes = [locate(parse_box(text), group.prompt.frame) for text in group.texts]
    group.boxes = torch.tensor([box or (torch.nan,) * 4 for box in boxes])             # (G, 4)
    pred = group.boxes[None]                                                           # (1, G, 4)
    target = torch.tensor(group.record.box, dtype=torch.float32)[None, None]           # (1, 1, 4)
    size = torch.tensor(group.record.size, dtype=torch.float32)[None, None]            # (1, 1, 2)
    invalid = group.boxes.isnan().any(-1)
    for name in args.reward:
        if name == "format":
            # As in VLM-R1: reasoning, then one box. docs/method.md has the differences.
            group.terms[name] = torch.tensor([float(format_ok(text)) for text in group.texts])
            continue
        term = reward.TERMS[name]
        if term is reward.positional:
            term = functools.partial(term, alpha=args.alpha)
        value = torch.as_tensor(term(pred, target, size))
        if value.shape != (1, len(boxes)):
            raise ValueError(f"the reward term {name} has the shape {tuple(value.shape)}, "
                             f"not (Q, G) = {(1, len(boxes))}")
        group.terms[name] = value[0].float().masked_fill(invalid, 0.0)
        if not group.terms[name].isfinite().all():
            dist.fail(f"the reward term {name} is not finite for every box; fix it in reward.py")
    group.reward = sum(weight * group.terms[name] for name, weight in args.reward.items())
    # The weights of groups and the log need the IoU even if it is not rewarded.
    group.terms.setdefault("iou", reward.agreement(pred, target)[0])
    return group


def step_seeds(args: argparse.Namespace, step: int, turn: int = 0) -> Tensor:
    """A seed for each question of this process. turn: of resampling; 0 is the first sampling."""
    first = (args.seed * 1_000_003 + step) * args.prompts
    seeds = range(first + dist.rank(), first + args.prompts, dist.world())
    if turn:
        # Seeds of the first sampling are not negative, so these belong to no other run.
        seeds = [~int.from_bytes(sha256(f"{args.prompts} {s} {turn}")[:7], "big") for s in seeds]
    return torch.tensor(seeds)


def fresh_records(
        records: Sequence[Record], args: argparse.Namespace, step: int, turn: int) -> list[Record]:
    """This process's records for a turn (1, 2, ...) of resampling, one for each of its questions.

    Each step shuffles the records that are not in it. Each turn takes the next Q of them, over all
    processes, and begins again after the last. The choice depends only on seed, step and turn.
    """
    Q = args.prompts
    taken = {record_at(records, place, args.seed).id for place in range(step * Q, (step + 1) * Q)}
    # Epochs below 0 are used only here.
    order = epoch_order(len(records), args.seed, -1 - step)
    others = [i for i in order if records[i].id not in taken] or order
    places = range((turn - 1) * Q + dist.rank(), turn * Q, dist.world())
    return [records[others[place % len(others)]] for place in places]


def resample(
        policy: Policy, groups: list[Group], fresh: Callable[[int], list[Record]],
        args: argparse.Namespace, step: int) -> dict[str, float]:
    """Replaces groups of equal rewards by groups of new questions, in place -> log entries.

    fresh: turn -> one record per group. DAPO's dynamic sampling (arXiv 2503.14476); the limit of
    --resample turns is ours.
    """
    if not args.resample:
        return {}
    started = time.perf_counter()
    replaced = 0
    for turn in range(1, args.resample + 1):
        flat = [i for i, group in enumerate(groups) if not varies(group.reward[None])]
        # Processes continue and stop together: sampling gathers sharded parameters.
        if not dist.all_reduce(torch.tensor(len(flat))):
            break
        questions = fresh(turn)
        places, prompts = [], []
        for i in flat:
            try:
                prompts.append(policy.prompt(questions[i]))
            except UnreadableImage:
                continue              # the group stays; Run reports the image when it opens it
            places.append(i)
        seeds = step_seeds(args, step, turn)[places]
        new = sample(policy, [questions[i] for i in places], prompts, seeds, args)
        for i, group in zip(places, new):
            groups[i] = grade(group, args)
        replaced += int(dist.all_reduce(torch.tensor(len(places))))
    return {"resampled": replaced, "seconds_resample": time.perf_counter() - started}


# ---------------------------------------------------------------- one step

@dataclass
class MicroBatch:
    """Some groups that are scored in one pass. Tensors are packed (tokens,), except lengths."""

    groups: list[Group]
    lengths: Tensor                   # (completions,) tokens of each
    advantage: Tensor                 # of the token's rollout
    weight: Tensor                    # of the token's group; 0 if masked
    n_tokens: int                     # unmasked ones of the optimizer step, over all processes
    # Set at the first scoring:
    old_logp: Tensor | None = None
    ref_logp: Tensor | None = None
    sampled_scored: float = 0.0       # largest |sampled - scored log-probability|


def train_step(
        policy: Policy, records: Sequence[Record], prompts: Sequence[Prompt],
        args: argparse.Namespace, step: int,
        fresh: Callable[[int], list[Record]] | None = None) -> tuple[dict[str, Any], list[Group]]:
    """One step -> its log line, over all processes, and this process's groups.

    fresh: see resample(); needed with --resample.
    """
    started = time.perf_counter()
    # 1. Sample G answers to each question.
    groups = sample(policy, records, prompts, step_seeds(args, step), args)
    sampled = time.perf_counter()

    # 2. Reward them. Rewards become advantages within a group; IoU becomes the group's weight.
    for group in groups:
        grade(group, args)
    graded = time.perf_counter()
    resampled = resample(policy, groups, fresh, args, step)             # only with --resample
    update_started = time.perf_counter()
    rewards = torch.stack([group.reward for group in groups])                          # (Q, G)
    advantage = advantages(rewards, not args.no_std)                                   # (Q, G)
    weight = group_weights(torch.stack([g.terms["iou"] for g in groups]), args, step)  # (Q,)

    # 3. Cut the step into optimizer steps (usually one), and those into micro-batches. Each loss is
    #    divided by the totals of its whole optimizer step, so the number of micro-batches and of
    #    processes affects only rounding.
    minibatches = cut(policy.model, groups, advantage, weight, args)

    # 4. Accumulate gradients, which FSDP2 sums over processes in each backward pass. Then update()
    #    clips their norm and steps. Old and reference log-probabilities stay for all passes.
    lr = dist.lr_at(step, args.steps, args.lr, args.warmup)
    sums: Counter[str] = Counter()
    for minibatch in minibatches * args.updates:
        for batch in minibatch:
            prompts = [group.prompt for group in batch.groups]
            completions = [group.completions for group in batch.groups]
            logp, entropy = policy.model.score(prompts, completions, args.temperature)
            if batch.old_logp is None:
                # The first scoring sets what ratio and KL compare with. With one optimizer step the
                # old policy is the one that is scored, so the ratio is 1; sampled log-probabilities
                # differ from scored ones by rounding, which is logged. With several optimizer steps
                # the old policy is the sampler, so the clip limits the distance from it.
                sampled_logp = torch.cat([x for g in batch.groups for x in g.sampled_logp])
                batch.sampled_scored = (logp.detach() - sampled_logp).abs().max().item()
                several = args.updates * args.minibatches > 1
                batch.old_logp = sampled_logp if several else logp.detach()
                if policy.reference is not None:
                    with torch.no_grad(), lora.reference(policy.reference):
                        batch.ref_logp, _ = policy.reference.score(
                            prompts, completions, args.temperature)
            advantage_, weight_ = batch.advantage.to(logp.device), batch.weight.to(logp.device)
            loss, batch_sums = policy_loss(
                logp, batch.old_logp, batch.ref_logp, advantage_, weight_, batch.n_tokens,
                args.clip, args.beta, batch.lengths, loss=args.loss, ratio=args.ratio,
                completions=args.prompts // args.minibatches * args.group,
                max_new_tokens=args.max_new_tokens)
            loss.backward()
            batch_sums |= {"loss": loss.detach(), "entropy": (entropy * (weight_ > 0)).sum()}
            # Wait for the device once, not for each sum.
            values = torch.stack(list(batch_sums.values())).tolist()
            sums.update(dict(zip(batch_sums, values)))
        grad_norm = dist.update(policy.model, policy.optimizer, lr)
        sums["not_finite"] += not grad_norm < float("inf")
    updated = time.perf_counter()

    # 5. One log line.
    line = {"step": step + 1, **summary(groups, advantage, weight, args),
            **update_summary(sums, minibatches, args),
            "lr": lr, "grad_norm": grad_norm, "finite": not sums["not_finite"], **resampled,
            "seconds_rollout": sampled - started, "seconds_reward": graded - sampled,
            "seconds_update": updated - update_started,
            "peak_GiB": dist.peak_memory(policy.model.device)}
    return line, groups


def cut(
        model: QwenVL, groups: list[Group], advantage: Tensor, weight: Tensor,
        args: argparse.Namespace) -> list[list[MicroBatch]]:
    """Cuts a step's groups, in order, into optimizer steps of equal size, and each of these into
    micro-batches. advantage (Q, G), weight (Q,)."""
    weight = weight[:, None].expand_as(advantage)                                      # (Q, G)
    if args.mask_truncated:
        weight = weight.masked_fill(torch.stack([g.truncated for g in groups]), 0.0)
    lengths = torch.tensor([list(map(len, group.completions)) for group in groups])   # (Q, G)
    counted = lengths.masked_fill(weight == 0, 0)
    costs = [dist.memory_tokens(model, group.prompt, int(n))
             for group, n in zip(groups, lengths.sum(1))]
    parts = dist.equal_slices(len(groups), args.minibatches)
    counts = dist.all_reduce(torch.stack([counted[part].sum() for part in parts])).tolist()
    minibatches = []
    for part, n_tokens in zip(parts, counts):
        minibatch = []
        for within in dist.micro_batches(costs[part], args.micro_tokens):
            s = slice(part.start + within.start, part.start + within.stop)
            n = lengths[s].flatten()
            minibatch.append(MicroBatch(
                groups[s], n, advantage[s].flatten().repeat_interleave(n),
                weight[s].flatten().repeat_interleave(n), max(1, n_tokens)))
        minibatches.append(minibatch)
    return minibatches


# ---------------------------------------------------------------- the log

def over_processes(means: dict[str, Any], sums: dict[str, Any]) -> dict[str, float]:
    """This process's means and sums -> those of all processes, which have equally many groups."""
    own = [float(v) / dist.world() for v in means.values()] + [float(v) for v in sums.values()]
    values = dist.all_reduce(torch.tensor(own, dtype=torch.float64)).tolist()
    return dict(zip([*means, *sums], values))


def summary(
        groups: list[Group], advantage: Tensor, weight: Tensor, args: argparse.Namespace,
) -> dict[str, float]:
    """The entries of a step's log line about its rollouts, over the groups of all processes."""
    n_groups = len(groups)
    n = n_groups * args.group
    logged = {"reward": torch.stack([group.reward for group in groups])}               # (Q, G)
    for name in groups[0].terms:
        logged[name] = torch.stack([group.terms[name] for group in groups])
    boxes = torch.stack([group.boxes for group in groups])                             # (Q, G, 4)
    valid = ~boxes[..., 0].isnan()
    size = torch.tensor([group.record.size for group in groups], dtype=torch.float32)
    dispersion = reward.dispersion(boxes, valid, size)
    several_boxes = valid.sum(1) >= 2
    no_overlap = logged["iou"].amax(1) == 0
    means = {
        **{name: value.sum() / n for name, value in logged.items()},
        **{f"{name}_group_std": value.std(1).sum() / n_groups for name, value in logged.items()},
        "length": torch.tensor(sum(len(c) for g in groups for c in g.completions)) / n,
        "truncated": torch.stack([group.truncated for group in groups]).sum() / n,
        "unparsable": (~valid).sum() / n,
        "no_overlap_groups": no_overlap.sum() / n_groups,
        "no_overlap_advantage": advantage[no_overlap].abs().sum() / n,
        "zero_variance_groups": (~varies(logged["reward"])).sum() / n_groups,
        "unique": sum(len(set(group.texts)) for group in groups) / n,
        "consistency_weight": weight.sum() / n_groups,
        "advantage": advantage.abs().sum() / n,
    }
    sums = {"dispersion": dispersion[several_boxes].sum(), "several": several_boxes.sum()}
    if "positional" in args.reward:
        # Groups in which only the positional term of the reward varies.
        alone = torch.tensor(args.reward["positional"] != 0) & varies(logged["positional"])
        for name, factor in args.reward.items():
            if factor and name != "positional":
                alone = alone & ~varies(logged[name])
        means["positional_alone_advantage"] = advantage[alone].abs().sum() / n
    line = over_processes(means, sums)
    line["dispersion"] /= max(1.0, line.pop("several"))
    # These two are logged as shares of the step's total |A|.
    for name in ("no_overlap_advantage", "positional_alone_advantage"):
        if name in line:
            line[name] /= max(1e-12, line["advantage"])
    line["consistency_weight_min"] = -dist.all_reduce(-weight.min(), "max").item()
    line["consistency_weight_max"] = dist.all_reduce(weight.max(), "max").item()
    return line


def update_summary(
        sums: Counter[str], minibatches: list[list[MicroBatch]], args: argparse.Namespace,
) -> dict[str, float]:
    """The log line's entries about the update: means over tokens of all processes and passes."""
    n_tokens = args.updates * sum(minibatch[0].n_tokens for minibatch in minibatches)
    names = ("entropy", "clipped", "kl") if args.beta else ("entropy", "clipped")
    own = {name: sums[name] / n_tokens for name in names}
    completions = args.prompts * args.group * args.updates
    own["clipped_completions"] = sums["clipped_completions"] / completions
    own["loss"] = sums["loss"] / (args.updates * args.minibatches)
    # Each is already divided by a number over all processes.
    line = over_processes(means={}, sums=own)
    # Only the first optimizer step scores with the policy that sampled.
    largest = torch.tensor(max(batch.sampled_scored for batch in minibatches[0]))
    line["sampled_scored_max"] = dist.all_reduce(largest, "max").item()
    return line


def collapse(lines: Sequence[dict[str, Any]]) -> list[str]:
    """Warnings if recent steps gave no learning signal."""
    equal = trailing(lines, lambda line: line["zero_variance_groups"] > 1 - 1e-6)
    # The entropy is exactly 0 if --mask-truncated has masked every token.
    certain = trailing(lines, lambda line: 0 < line["entropy"] < LEAST_ENTROPY)
    found = []
    if equal >= COLLAPSED_AFTER:
        found.append(f"no group's rewards have differed for {COLLAPSED_AFTER} steps or more: all "
                     "advantages are 0")
    if certain >= COLLAPSED_AFTER:
        found.append(f"the entropy has been below {LEAST_ENTROPY} nats for {COLLAPSED_AFTER} "
                     "steps or more: a group's answers are nearly identical")
    return found


def canary(
        policy: Policy, records: Sequence[Record], prompts: Sequence[Prompt],
        args: argparse.Namespace) -> None:
    """Prints how the starting policy answers: a reward without signal is visible before step 1."""
    seeds = torch.arange(len(records)) + 7_777 * (dist.rank() + 1)
    groups = [grade(group, args) for group in sample(policy, records, prompts, seeds, args)]
    texts = [text for group in groups for text in group.texts]
    outcomes = Counter(dist.gather_lists([failure(text) or form(text) for text in texts]))
    iou, formatted = over_processes({}, {
        "iou": sum(group.terms["iou"].sum() for group in groups),
        "format": sum(map(format_ok, texts))}).values()
    n = outcomes.total()
    if dist.rank() == 0:
        parts = ", ".join(f"{count} {name}" for name, count in outcomes.most_common())
        print(f"before step 1: mean IoU {iou / n:.3f}, format {formatted / n:.3f} over {n} sampled "
              f"answers; form of the box, or why there is none: {parts}")
        if iou == 0:
            print("warning: no answer touches its target; the IoU term is 0 until one does")


# ---------------------------------------------------------------- the stage

def step_size(args: argparse.Namespace) -> memory.Step:
    """The size of a step, for the plan of memory."""
    return memory.Step(
        args.prompts, args.group, args.max_new_tokens, samples=True, updates=args.minibatches)


def open_policy(
        init: Path, args: argparse.Namespace, records: Sequence[Record],
        val: Sequence[Record] = ()) -> Policy:
    """Opens the model to train, its optimizer and, if beta is above 0, the frozen reference."""
    model, processor = open_model(init, max_pixels=args.max_pixels)
    lora.fit(model, args)
    device = dist.start(args.device, args.deterministic)
    memory.check_gpu(args, processor, records, val, step_size(args), device)
    reference = None
    if args.beta and args.lora:
        # No second model is needed: the base is frozen, so only the adapters differ.
        lora.keep_start(model)
        reference = model
    elif args.beta:
        reference, _ = open_model(init)
        # As for the trained model (lora.fit): merge in the stored dtype, then cast.
        lora.merge(reference)
        reference = reference.to(device, dist.COMPUTE_DTYPES[device.type]).requires_grad_(False)
    lora.choose_trained(model, args.freeze_vision, args.gradient_checkpointing)
    model = dist.prepare(model, device)
    return Policy(model, processor, dist.optimizer(model, args.lr), reference)


def main() -> None:
    args = parse(flags(), "rft")
    check_flags(args)
    if args.plan:
        data = ((), ()) if args.image else load_records(args, "rft")
        processor = Processor.from_pretrained(folder(args.init), max_pixels=args.max_pixels)
        memory.check_gpu(args, processor, *data, step_size(args))
        return
    init = folder(args.init)
    records, val = load_records(args, "rft")
    set_steps(args, "rft", len(records), args.prompts)
    run = Run(args, "rft", records, logs=("metrics.jsonl", "rollouts.jsonl"))
    policy = open_policy(init, args, records, val)
    run.begin(policy.model, policy.optimizer, policy.processor)
    memory.try_out(policy.model, policy.optimizer, policy.reference, policy.processor, records,
                   val, args, step_size(args))
    if run.first == 0:
        batch = run.batch(policy.prompt, args.prompts, 0)
        canary(policy, batch.records, batch.inputs, args)
    for step, batch in run.steps(policy.prompt, args.prompts):
        fresh = functools.partial(fresh_records, records, args, step)
        line, groups = train_step(policy, batch.records, batch.inputs, args, step, fresh)
        run.answers = []
        for g in groups:
            boxes = []
            for box in g.boxes.tolist():
                boxes.append(None if box[0] != box[0] else [round(v, 1) for v in box])
            row = {"step": step + 1, "id": g.record.id, "expression": g.record.text,
                   "target": g.record.box, "boxes": boxes}
            for name, value in {"reward": g.reward, **g.terms}.items():
                row[name] = [round(v, 4) for v in value.tolist()]
            run.answers.append((g.record, {**row, "texts": g.texts}))
        if dist.rank() == 0:
            with open(run.out / "rollouts.jsonl", "a", encoding="utf-8") as file:
                for _, row in run.answers:
                    file.write(json.dumps(row) + "\n")
        if run.due(step):
            line |= evaluation.validate(policy.model, policy.processor, val, args)
            if dist.rank() == 0:
                g = groups[0]
                picture = draw_rollouts(open_image(g.record), g.boxes.tolist(), g.reward.tolist(),
                                        g.record.box, g.record.text)
                picture.save(run.out / f"rollouts_{step + 1:06d}.png")
        run.log(line, batch, collapse([*run.lines, line]),
                show=("reward", "iou", "length", "kl", "sampled_scored_max", "peak_GiB"))
    run.end()


if __name__ == "__main__":
    launch(main, catch_signals=True)
