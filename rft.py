"""Stage 2: GRPO with a continuous positional reward and a loss weighted by spatial consistency.

Per step: sample G answers to each of Q questions, reward them (reward.py), compare
each with its own group, weight the loss of each group by how far its answers fail or
scatter, and take one clipped policy-gradient step (or --updates of them). Boxes alone
are needed, no reasoning.

Source: RSGround-R1 (arXiv 2601.21634). The reward is R = IoU + 0.1 positional +
format (section 3.3), and the whole loss of a group is multiplied by its weight
(section 3.4); both second-hand. That the KL is part of what is multiplied, and that
weights are not renormalised over the step, is our reading. Some of the paper's
settings are not known; there the defaults are VLM-R1's (G 8, lr 1e-6, KL 0.04, clip
0.2, temperature 1, division by std) or, where marked so, ours. GRPO is DeepSeekMath's
(arXiv 2402.03300); that the loss is a mean over all tokens of the step is ours.

    torchrun rft.py --data dior --epochs 0.4             one GPU; ckpt/sft -> ckpt/rft
    torchrun --nproc_per_node 8 rft.py --data dior       eight GPUs, the same result to rounding
    python rft.py                                        the embedded data on a laptop
"""
import argparse
import functools
import itertools
import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import answer
import eval as evaluation
import pictures
import reward
import runtime
from data import Record, open_image
from generate import generate
from model import QwenVL, folder
from processor import Processor, Prompt

# exp() of a larger log-ratio is of no use and may be infinite.
MAX_LOG_RATIO = 20.0
# Keys of metrics.jsonl and rollouts.jsonl that no term of the reward may have.
RESERVED = {*runtime.LOG_KEYS, "id", "expression", "target", "boxes", "texts"}
# How a group's loss may be weighted.
WEIGHTINGS = ("consistency", "mean", "variance", "off", "shuffled")


class NamedWeights(argparse.Action):
    """NAME=WEIGHT ... -> a dict. Names are those of reward.TERMS, and "format"."""

    def __call__(
            self, parser: argparse.ArgumentParser, namespace: argparse.Namespace,
            values: Sequence[str], option: str | None = None,
    ) -> None:
        names = (*reward.TERMS, "format")
        weights: dict[str, float] = {}
        for text in values:
            name, _, weight = text.partition("=")
            if name not in names:
                raise argparse.ArgumentError(
                    self, f"{text}: no term is called {name!r}; there are {', '.join(names)}")
            if name in weights:
                raise argparse.ArgumentError(self, f"{text}: {name} comes twice")
            try:
                weights[name] = runtime.moderate(weight)
            except argparse.ArgumentTypeError:
                raise argparse.ArgumentError(
                    self, f"{text} is not NAME=WEIGHT with a finite number") from None
        # In one order, whatever the user's: the sum of the terms is then the same to
        # the bit.
        ordered = {name: weights[name] for name in names if name in weights}
        setattr(namespace, self.dest, ordered)


def flags() -> runtime.FlagParser:
    parser = runtime.FlagParser(
        "GRPO with a positional reward and consistency-weighted updates (stage 2)")
    runtime.add_common_flags(parser, "rft", "ckpt/sft", "0.4 epochs")
    add = parser.add_argument_group("policy gradient").add_argument
    add("--prompts", type=runtime.positive, default=8,
        help="questions Q a step, over all processes")
    add("--group", type=runtime.positive, default=8, help="rollouts G of each question")
    add("--max-new-tokens", type=runtime.positive, default=256,
        help="tokens; a longer rollout is cut and counted as truncated")
    add("--temperature", type=runtime.above_zero, default=1.0,
        help="of sampling, and so of the scored log-probabilities")
    add("--cuda-graphs", action="store_true", help="decode by CUDA graphs")
    add("--lr", type=runtime.above_zero, default=1e-6,
        help="peak learning rate; 1e-6 for a 3B model, about 1e-4 for the embedded one")
    add("--updates", type=runtime.positive, default=1,
        help="passes over a step's rollouts, an optimizer step each")
    add("--clip", type=runtime.not_negative, nargs=2, default=(0.2, 0.2), metavar=("LOW", "HIGH"),
        help="the ratio is clipped to 1 - LOW .. 1 + HIGH")
    add("--beta", type=runtime.not_negative, default=0.04,
        help="weight of the KL to the starting policy; at 0 no reference model is kept")
    add("--no-std", action="store_true",
        help="do not divide advantages by their group's standard deviation")
    add = parser.add_argument_group("reward").add_argument
    add("--reward", nargs="+", action=NamedWeights, default=dict(reward.DEFAULT_REWARD),
        metavar="NAME=WEIGHT",
        help=f"terms of the reward with their weights: {', '.join(reward.TERMS)}, format; at 0 a "
        f"term is logged alone; default: {runtime.as_typed(reward.DEFAULT_REWARD)}")
    add("--alpha", type=runtime.scale, default=2.5,
        help="scale of the positional term's kernel, in halves of the true box's sides")
    add("--weighting", choices=WEIGHTINGS, default="consistency",
        help="of a group's loss: by mean and variance of its IoU, by one, not at all, or the "
        "consistency weights dealt at random (control)")
    add("--lambdas", type=runtime.moderate, nargs=2, default=(1.2, 1.0),
        metavar=("MEAN", "VARIANCE"), help="of the consistency weight: "
        "exp(MEAN (1 - mean IoU) + VARIANCE variance), cut to 0.5 .. 3")
    add = parser.add_argument_group("watching").add_argument
    add("--every", type=runtime.positive, default=50,
        help="steps between checkpoints, pictures and validation")
    add("--val", type=runtime.natural, default=64,
        help="records of the val split in a validation; 0 for none")
    return parser


def check_group_flags(args: argparse.Namespace) -> None:
    """Refuses flags that do not go together."""
    if args.prompts % runtime.world():
        runtime.fail(f"--prompts {args.prompts} is not a multiple of the "
                     f"{runtime.world()} processes")
    if "format" in reward.TERMS:
        runtime.fail("reward.TERMS has a term format, which is rft.py's own; name it otherwise")
    for name in args.reward:
        if name not in (*reward.TERMS, "format"):
            runtime.fail(f"the run's reward has a term {name!r}, which reward.TERMS has not; "
                         "put it in there again")
        if name in RESERVED or name.endswith("_group_std") or "=" in name:
            runtime.fail(f"a term of the reward can't be called {name!r}: the logs have that "
                         "name for something else")
    if not any(args.reward.values()):
        runtime.fail("no term of --reward has a weight; give one another weight than 0")
    if args.group < 2:
        runtime.fail("--group 1 leaves nothing to compare a rollout with; use 2 or more")


# ---------------------------------------------------------------- the objective

def advantages(rewards: Tensor, divide_by_std: bool = True) -> Tensor:
    """rewards (Q, G) -> advantages (Q, G): (R - mean) / (std + 1e-4) within a group.

    std is the sample's (over G - 1). Exactly 0 where all rewards of a group are
    equal. Source: GRPO (arXiv 2402.03300), as VLM-R1 computes it; without the
    division: Dr. GRPO (arXiv 2503.20783).
    """
    advantage = rewards - rewards.mean(1, keepdim=True)
    if divide_by_std:
        advantage = advantage / (rewards.std(1, keepdim=True) + 1e-4)
    return advantage.masked_fill(~varies(rewards)[:, None], 0.0)


def policy_loss(
        logp: Tensor, logp_old: Tensor, logp_ref: Tensor | None, advantage: Tensor,
        weight: Tensor, n_tokens: int, clip: Sequence[float] = (0.2, 0.2), beta: float = 0.0,
        lengths: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of some completions, and sums over their tokens for the log.

    logp, logp_old, logp_ref (None at beta 0), advantage, weight: packed (tokens,).
    n_tokens counts the whole step, over all micro-batches and processes: losses and
    gradients simply add up. lengths: (completions,) tokens of each, to count those that
    the clip cuts; what is to be done per completion, such as a sequence's ratio, splits
    the packed tensors by them.

    A token's gain is the clipped surrogate of PPO (arXiv 1707.06347) minus beta times
    the k3 estimate of the KL to the reference; its loss is minus that, multiplied by
    the weight of its group: section 3.4 of RSGround-R1 (second-hand). That the KL is
    part of what is multiplied is our reading.
    """
    log_ratio = (logp - logp_old).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio = log_ratio.exp()
    clipped_ratio = ratio.clamp(1 - clip[0], 1 + clip[1])
    gain = torch.minimum(ratio * advantage, clipped_ratio * advantage)
    clipped = ratio * advantage > clipped_ratio * advantage
    sums = {"clipped": clipped.float().sum()}
    if lengths is not None:
        cut = [of_completion.any() for of_completion in clipped.split(lengths.tolist())]
        sums["clipped_completions"] = torch.stack(cut).float().sum()
    if beta:
        log_ratio_ref = (logp_ref - logp).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        kl = log_ratio_ref.exp() - log_ratio_ref - 1
        gain = gain - beta * kl
        sums["kl"] = kl.sum().detach()
    return -(weight.detach() * gain).sum() / n_tokens, sums


def group_weights(iou: Tensor, args: argparse.Namespace, step: int) -> Tensor:
    """IoU rewards (Q, G) of this process's groups -> weights (Q,) of their losses.

    shuffled: the consistency weights of the whole step, dealt at random over its
    groups, on all processes alike. Ours, a control.
    """
    mean, variance = args.lambdas
    if args.weighting == "off":
        return torch.ones(len(iou))
    if args.weighting == "mean":
        return reward.consistency_weight(iou, mean, 0.0)
    if args.weighting == "variance":
        return reward.consistency_weight(iou, 0.0, variance)
    weights = reward.consistency_weight(iou, mean, variance)
    if args.weighting == "consistency":
        return weights
    weights = by_place(runtime.all_gather(weights))
    random = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
    dealt = torch.randperm(len(weights), generator=random)
    return weights[dealt][runtime.rank()::runtime.world()]


def by_place(gathered: Tensor) -> Tensor:
    """(world * n,), each process's values one behind the other -> the same by place in the step.

    Process r has the places r, r + world, ... So what is dealt to a place does not
    depend on the number of processes.
    """
    return gathered.view(runtime.world(), -1).T.flatten()


# ---------------------------------------------------------------- rollouts and rewards

@dataclass
class Policy:
    """The model under training, and what goes with it."""

    model: QwenVL
    processor: Processor
    optimizer: torch.optim.Optimizer | None
    reference: QwenVL | None           # the starting policy; None without a KL

    def prompt(self, record: Record) -> Prompt:
        """A record's image and expression, as the model takes them."""
        return self.processor(open_image(record), record.text)


@dataclass
class Rollouts:
    """G sampled answers to each of Q questions."""

    records: Sequence[Record]          # Q
    prompts: Sequence[Prompt]          # Q
    completions: list[list[Tensor]]    # Q lists of G, each (L,) ids with the end of turn
    sampled_logp: list[list[Tensor]]   # the same: log-probabilities that they were drawn with
    texts: list[list[str]]             # Q lists of G

    @property
    def lengths(self) -> Tensor:
        """(Q, G) tokens of each completion."""
        lengths = [len(c) for c in itertools.chain.from_iterable(self.completions)]
        return torch.tensor(lengths).view(len(self.completions), -1)


@dataclass
class Grades:
    """What the rollouts earned."""

    rewards: Tensor        # (Q, G)
    terms: dict[str, Tensor]           # name of a term -> (Q, G)
    boxes: Tensor        # (Q, G, 4) in original pixels, NaN where invalid

    @property
    def valid(self) -> Tensor:
        """(Q, G) bool: is there a box?"""
        return ~self.boxes[..., 0].isnan()


def sample(
        policy: Policy, records: Sequence[Record], prompts: Sequence[Prompt], seeds: Tensor,
        args: argparse.Namespace,
) -> Rollouts:
    """Q records, their prompts and seeds (Q,) -> G rollouts of each."""
    # Sharded parameters are gathered once, for all the tokens of all processes.
    with runtime.gathered(policy.model):
        tokens, logprobs, lengths = generate(
            policy.model, prompts, args.group, args.max_new_tokens, args.temperature, seeds,
            args.cuda_graphs)
    completions = []
    sampled_logp = []
    texts = []
    ids_on_host = tokens.tolist()
    for q, ends in enumerate(lengths.tolist()):
        completions.append([tokens[q, g, :n] for g, n in enumerate(ends)])
        sampled_logp.append([logprobs[q, g, :n] for g, n in enumerate(ends)])
        texts.append(
            [policy.processor.decode(ids_on_host[q][g][:n]) for g, n in enumerate(ends)])
    return Rollouts(records, prompts, completions, sampled_logp, texts)


def grade(rollouts: Rollouts, args: argparse.Namespace) -> Grades:
    """Text -> box -> terms of the reward -> their weighted sum.

    Where a box is invalid every term but the format is 0, whatever its function
    gives.
    """
    boxes = locate_boxes(rollouts)        # (Q, G, 4)
    target = torch.tensor([r.box for r in rollouts.records], dtype=torch.float32)[:, None]
    size = torch.tensor([r.size for r in rollouts.records], dtype=torch.float32)[:, None]
    invalid = boxes.isnan().any(-1)        # (Q, G)
    terms = {}
    for name in args.reward:
        if name == "format":
            terms[name] = format_reward(rollouts.texts)
            continue
        value = torch.as_tensor(term_function(name, args.alpha)(boxes, target, size))
        if value.shape != invalid.shape:
            raise ValueError(f"the reward term {name} has the shape {tuple(value.shape)}, "
                             f"not (Q, G) = {tuple(invalid.shape)}")
        terms[name] = value.float().masked_fill(invalid, 0.0)
        if not terms[name].isfinite().all():
            runtime.fail(f"the reward term {name} is not finite for every box; mend it there")
    rewards = torch.zeros(invalid.shape)
    for name, weight in args.reward.items():
        rewards = rewards + weight * terms[name]
    # The weights of groups and the log need the IoU, be it rewarded or not; it is 0
    # where a box is invalid.
    terms.setdefault("iou", reward.agreement(boxes, target))
    return Grades(rewards, terms, boxes)


def locate_boxes(rollouts: Rollouts) -> Tensor:
    """The box of each rollout in original pixels, cut to the image: (Q, G, 4), NaN for none."""
    boxes = []
    for prompt, group in zip(rollouts.prompts, rollouts.texts):
        for text in group:
            box = answer.locate(answer.parse_box(text), prompt.frame)
            boxes.append(box or (torch.nan,) * 4)
    return torch.tensor(boxes).view(len(rollouts.texts), -1, 4)


def format_reward(texts: Sequence[Sequence[str]]) -> Tensor:
    """Q lists of G texts -> (Q, G): 1 for reasoning, then one box, in our tags; else 0.

    The image is not looked at: a box outside of it is well formed, too.

    Source: VLM-R1's format reward, which the paper uses (second-hand).
    """
    rewards = [float(answer.format_ok(text)) for text in itertools.chain.from_iterable(texts)]
    return torch.tensor(rewards).view(len(texts), -1)


def term_function(name: str, alpha: float) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The function of reward.TERMS of this name; the positional term with this alpha."""
    function = reward.TERMS[name]
    if function is reward.positional_term:
        return functools.partial(function, alpha=alpha)
    return function


# ---------------------------------------------------------------- one step

def train_step(
        policy: Policy, records: Sequence[Record], prompts: Sequence[Prompt],
        args: argparse.Namespace, step: int,
) -> tuple[dict[str, Any], Rollouts, Grades]:
    """This process's records and prompts of a step -> the log line, and what was sampled."""
    started = time.perf_counter()
    # 1. Each question is answered G times, at the sampling temperature.
    rollouts = sample(policy, records, prompts, step_seeds(args, step), args)
    sampled = time.perf_counter()

    # 2. Answers are rewarded; a group's rewards become advantages over its own mean, and
    #    its IoU the weight of its loss.
    grades = grade(rollouts, args)
    weight = group_weights(grades.terms["iou"], args, step)        # (Q,)
    advantage = advantages(grades.rewards, not args.no_std)        # (Q, G)
    graded = time.perf_counter()

    # 3. All losses are divided by this one count, over all processes and micro-batches:
    #    so each token weighs the same, however the step is cut.
    n_tokens = runtime.all_sum(rollouts.lengths.sum()).item()
    costs = []
    for prompt, tokens in zip(prompts, rollouts.lengths.sum(1).tolist()):
        costs.append(runtime.memory_tokens(policy.model, prompt, tokens))
    passes = runtime.micro_batches(costs, args.micro_tokens)
    batches = cut_into_micro_batches(rollouts, advantage, weight, passes)

    # 4. Gradients add up over micro-batches, then the optimizer steps. From the second
    #    pass on the policy has left the one that sampled, and the clip begins to act.
    lr = runtime.lr_at(step, args.steps, args.lr)
    sums: Counter[str] = Counter()
    for _ in range(args.updates):
        for batch in batches:
            sums.update(accumulate_gradient(policy, batch, n_tokens, args))
        grad_norm = runtime.update(policy.model, policy.optimizer, lr)
        sums["not_finite"] += not grad_norm < float("inf")
    updated = time.perf_counter()

    # 5. The log line.
    line = {"step": step + 1, **summary(rollouts, grades, advantage, weight, args)}
    line |= update_summary(sums, batches, n_tokens, args)
    line |= {"lr": lr, "grad_norm": grad_norm, "finite": not sums["not_finite"]}
    line |= {"seconds_rollout": sampled - started, "seconds_reward": graded - sampled}
    line |= {"seconds_update": updated - graded, "peak_GiB": runtime.peak_memory(policy.model)}
    return line, rollouts, grades


def step_seeds(args: argparse.Namespace, step: int) -> Tensor:
    """Seeds of this process's questions: each depends on its place in the step alone."""
    places = range(runtime.rank(), args.prompts, runtime.world())
    return torch.tensor([(args.seed * 1_000_003 + step) * args.prompts + i for i in places])


@dataclass
class MicroBatch:
    """Some groups of a step, scored and learned from in one pass. Tensors are (tokens,)."""

    prompts: Sequence[Prompt]
    completions: list[list[Tensor]]
    lengths: Tensor                    # (completions,) tokens of each
    advantage: Tensor                  # of each token: its rollout's
    weight: Tensor                     # of each token: its group's
    sampled_logp: Tensor
    old_logp: Tensor | None = None     # of the policy that sampled: the first pass stores it
    ref_logp: Tensor | None = None     # of the reference: likewise
    sampled_scored: float = 0.0        # largest difference of sampled and scored log-probabilities


def cut_into_micro_batches(
        rollouts: Rollouts, advantage: Tensor, weight: Tensor, passes: Sequence[slice],
) -> list[MicroBatch]:
    """Cuts a step into passes of neighbouring groups; advantage (Q, G) and weight (Q,) are
    laid out by token."""
    lengths = rollouts.lengths        # (Q, G)
    batches = []
    for groups in passes:
        of_rollout = lengths[groups].flatten()
        of_group = lengths[groups].sum(1)
        sampled_logp = torch.cat([torch.cat(group) for group in rollouts.sampled_logp[groups]])
        batches.append(MicroBatch(
            rollouts.prompts[groups], rollouts.completions[groups], of_rollout,
            advantage[groups].flatten().repeat_interleave(of_rollout),
            weight[groups].repeat_interleave(of_group), sampled_logp))
    return batches


def accumulate_gradient(
        policy: Policy, batch: MicroBatch, n_tokens: int, args: argparse.Namespace,
) -> dict[str, float]:
    """Adds a micro-batch's gradient to the step's -> its loss, and sums over its tokens."""
    logp, entropy = policy.model.score(batch.prompts, batch.completions, args.temperature)
    if batch.old_logp is None:
        # The first pass is on policy by definition: its own log-probabilities are the
        # old ones, and how far the sampler's lie from them is rounding, which is
        # watched.
        batch.old_logp = logp.detach()
        batch.sampled_scored = (batch.old_logp - batch.sampled_logp).abs().max().item()
        if policy.reference is not None:
            with torch.no_grad():
                batch.ref_logp, _ = policy.reference.score(
                    batch.prompts, batch.completions, args.temperature)
    loss, sums = policy_loss(
        logp, batch.old_logp, batch.ref_logp, batch.advantage.to(logp.device),
        batch.weight.to(logp.device), n_tokens, args.clip, args.beta, batch.lengths)
    loss.backward()
    sums |= {"loss": loss.detach(), "entropy": entropy.sum()}
    # One wait for the device, not one for each sum.
    return dict(zip(sums, torch.stack(list(sums.values())).tolist()))


# ---------------------------------------------------------------- the log

def varies(values: Tensor) -> Tensor:
    """(Q, G) -> (Q,) bool: do the values of a group differ?"""
    return values.amax(1) > values.amin(1)


def positional_alone(terms: dict[str, Tensor], weights: dict[str, float]) -> Tensor:
    """Groups (Q,) bool in which no term of the reward but the positional one varies."""
    alone = varies(terms["positional"]) & (weights["positional"] != 0)
    for name, weight in weights.items():
        if weight and name != "positional":
            alone = alone & ~varies(terms[name])
    return alone


def summary(
        rollouts: Rollouts, grades: Grades, advantage: Tensor, weight: Tensor,
        args: argparse.Namespace,
) -> dict[str, float]:
    """What a step logs of its rollouts, over the groups of all processes."""
    valid = grades.valid
    lengths = rollouts.lengths
    size = torch.tensor([r.size for r in rollouts.records], dtype=torch.float32)
    dispersion = reward.dispersion(grades.boxes, valid, size)
    several_boxes = valid.sum(1) >= 2
    no_overlap = grades.terms["iou"].amax(1) == 0
    logged = {"reward": grades.rewards, **grades.terms}
    n_groups = args.prompts
    n = args.prompts * args.group
    own = {
        **{name: value.sum() / n for name, value in logged.items()},
        **{f"{name}_group_std": value.std(1).sum() / n_groups for name, value in logged.items()},
        "length": lengths.sum() / n,
        "truncated": (lengths == args.max_new_tokens).sum() / n,
        "unparsable": (~valid).sum() / n,
        "no_overlap_groups": no_overlap.sum() / n_groups,
        "no_overlap_advantage": advantage[no_overlap].abs().sum() / n,
        "zero_variance_groups": (~varies(grades.rewards)).sum() / n_groups,
        "unique": sum(len(set(group)) for group in rollouts.texts) / n,
        "consistency_weight": weight.sum() / n_groups,
        "advantage": advantage.abs().sum() / n,
        "dispersion": dispersion[several_boxes].sum(),
        "groups_with_boxes": several_boxes.sum(),
    }
    if "positional" in args.reward:
        alone = positional_alone(grades.terms, args.reward)
        own["positional_alone_advantage"] = advantage[alone].abs().sum() / n
    line = sum_over_processes(own)
    line["dispersion"] /= max(1.0, line.pop("groups_with_boxes"))
    # Of these two the share of the step's sum of |A| is told.
    for name in ("no_overlap_advantage", "positional_alone_advantage"):
        if name in line:
            line[name] /= max(1e-12, line["advantage"])
    line["consistency_weight_min"] = -runtime.all_max(-weight.min()).item()
    line["consistency_weight_max"] = runtime.all_max(weight.max()).item()
    return line


def update_summary(
        sums: Counter[str], batches: Sequence[MicroBatch], n_tokens: int,
        args: argparse.Namespace,
) -> dict[str, float]:
    """What a step logs of its update: means over the tokens of all processes and passes."""
    own = {name: sums[name] / (n_tokens * args.updates) for name in ("entropy", "clipped")}
    n = args.prompts * args.group
    own["clipped_completions"] = sums["clipped_completions"] / (n * args.updates)
    # A loss is divided by the step's tokens already.
    own["loss"] = sums["loss"] / args.updates
    if args.beta:
        own["kl"] = sums["kl"] / (n_tokens * args.updates)
    line = sum_over_processes(own)
    largest = torch.tensor(max(batch.sampled_scored for batch in batches))
    line["sampled_scored_max"] = runtime.all_max(largest).item()
    return line


def sum_over_processes(own: dict[str, Any]) -> dict[str, float]:
    """Each figure summed over all processes, in one exchange."""
    values = torch.tensor([float(v) for v in own.values()], dtype=torch.float64)
    return dict(zip(own, runtime.all_sum(values).tolist()))


def log_rollouts(path: Path, step: int, rollouts: Rollouts, grades: Grades) -> None:
    """Appends every rollout of the first process with its rewards, a line a question."""
    if runtime.rank():
        return
    logged = {"reward": grades.rewards, **grades.terms}
    with open(path, "a", encoding="utf-8") as file:
        for q, record in enumerate(rollouts.records):
            boxes = []
            for box, valid in zip(grades.boxes[q].tolist(), grades.valid[q].tolist()):
                boxes.append([round(v, 1) for v in box] if valid else None)
            line = {"step": step + 1, "id": record.id, "expression": record.text,
                    "target": record.box, "boxes": boxes}
            for name, value in logged.items():
                line[name] = [round(v, 4) for v in value[q].tolist()]
            file.write(json.dumps({**line, "texts": rollouts.texts[q]}) + "\n")


def draw_first_group(path: Path, rollouts: Rollouts, grades: Grades) -> None:
    """Writes a picture of the first question's boxes, on the first process."""
    if runtime.rank():
        return
    record = rollouts.records[0]
    picture = pictures.draw_rollouts(
        open_image(record), grades.boxes[0], grades.rewards[0], record.box, record.text)
    picture.save(path)


def canary(
        policy: Policy, records: Sequence[Record], prompts: Sequence[Prompt],
        args: argparse.Namespace,
) -> None:
    """Says before step 1 what the starting policy answers.

    A reward that can't rise is seen here, and not in an hour.
    """
    seeds = torch.arange(len(records)) + 7_777 * (runtime.rank() + 1)
    rollouts = sample(policy, records, prompts, seeds, args)
    terms = grade(rollouts, args).terms
    texts = itertools.chain.from_iterable(rollouts.texts)
    outcomes = Counter(answer.failure(text) or "parsed" for text in texts)
    names = ("parsed", *answer.FAILURES)
    counts = runtime.all_sum(torch.tensor([outcomes[name] for name in names])).tolist()
    n = sum(counts)
    iou = runtime.all_sum(terms["iou"].sum()).item()
    format_ok = runtime.all_sum(format_reward(rollouts.texts).sum()).item()
    if runtime.rank() == 0:
        told = ", ".join(f"{count} {name}" for name, count in zip(names, counts) if count)
        print(f"before step 1: mean IoU {iou / n:.3f}, format {format_ok / n:.3f} "
              f"over {n} sampled answers; {told}")
        if iou == 0:
            print("warning: no answer touches its target; the IoU reward is silent until one does")


# ---------------------------------------------------------------- the stage

def main() -> None:
    args = runtime.parse(flags(), "rft")
    check_group_flags(args)
    records, val = runtime.load_records(args, "rft")
    runtime.set_steps(args, len(records), args.prompts, epochs=0.4)
    out = Path(args.out)
    init = folder(args.init)
    runtime.check_output(out, args.resume)
    policy = open_policy(init, args)
    first = runtime.restore(out, policy.model, policy.optimizer) if args.resume else 0
    run = runtime.run_description(args, "rft", records)
    runtime.begin(out, first, policy.model, ("metrics.jsonl", "rollouts.jsonl"))

    replacements = runtime.Replacements(out, len(records))

    def prompts_of(step: int) -> runtime.Share[Prompt]:
        """This process's records of a step with their prompts."""
        return runtime.own_share(records, step, args.prompts, args.seed, policy.prompt)

    if not first:
        share = prompts_of(0)
        replacements.count(0, share.unreadable)
        canary(policy, share.records, share.made, args)
    steps = range(first, args.steps)
    skipped = 0
    bar = tqdm(
        steps, initial=first, total=args.steps, desc="rft", disable=runtime.rank() > 0)
    with bar:
        for step, share in zip(bar, runtime.prefetch(prompts_of, steps, args.workers)):
            unreadable = replacements.count(step, share.unreadable)
            line, rollouts, grades = train_step(policy, share.records, share.made, args, step)
            line |= unreadable
            skipped = 0 if line["finite"] else skipped + 1
            log_rollouts(out / "rollouts.jsonl", step, rollouts, grades)
            due = (step + 1) % args.every == 0 or step + 1 == args.steps
            if due:
                line |= evaluation.validate(policy.model, policy.processor, val, args)
                draw_first_group(out / f"rollouts_{step + 1:06d}.png", rollouts, grades)
            runtime.log(out / "metrics.jsonl", line)
            # Last, so that a checkpoint never covers a step that is not logged.
            if due:
                runtime.save(out, step + 1, policy.model, policy.optimizer, policy.processor, run)
            bar.set_postfix_str(progress(line))
            runtime.stop_if_not_finite(skipped, step, args.steps, out)


def open_policy(init: Path, args: argparse.Namespace) -> Policy:
    """The model to train with its optimizer, and where there is a KL the frozen reference."""
    model, processor = runtime.open_checkpoint(init, max_pixels=args.max_pixels)
    device = runtime.start(args.device, args.deterministic)
    reference = None
    if args.beta:
        # In the compute dtype: it is only read.
        reference = runtime.open_checkpoint(init, device)[0].requires_grad_(False)
    model = runtime.prepare(model, device, args.freeze_vision, args.gradient_checkpointing)
    return Policy(model, processor, runtime.optimizer(model, args.lr), reference)


def progress(line: dict[str, Any]) -> str:
    """A step's log line, as it stands behind the progress bar."""
    kl = f"kl {line['kl']:.4f} " if "kl" in line else ""
    return (f"reward {line['reward']:.3f} iou {line['iou']:.3f} tokens {line['length']:.0f} {kl}"
            f"sampled-scored {line['sampled_scored_max']:.1e} peak {line['peak_GiB']:.1f} GiB")


if __name__ == "__main__":
    runtime.main(main)
