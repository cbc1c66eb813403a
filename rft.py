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
(arXiv 2402.03300); that the loss is a mean over all tokens of the step is ours. Other
objectives (DAPO, Dr. GRPO, GSPO) are flags; README's table has their formulas.

    torchrun rft.py --data dior --epochs 0.4             one GPU; ckpt/sft -> ckpt/rft
    torchrun --nproc_per_node 8 rft.py --data dior       eight GPUs, the same result to rounding
    python rft.py                                        the embedded data on a laptop
"""
import argparse
import functools
import itertools
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import eval as evaluation
import reward
from data import open_image
from model import QwenVL
from qwen import answer, lora
from qwen.generate import generate
from qwen.hub import folder
from qwen.processor import Processor, Prompt
from readers.base import Record, UnreadableImage
from report import pictures
from train import checkpoints as saving
from train import dist, memory
from train import run as runtime

# exp() of a larger log-ratio is of no use and may be infinite.
MAX_LOG_RATIO = 20.0
# Keys of metrics.jsonl and rollouts.jsonl that no term of the reward may have.
RESERVED = {*runtime.LOG_KEYS, "id", "expression", "target", "boxes", "texts"}
# So many steps in a row in which nothing can be learned are a collapse. Ours.
COLLAPSED_AFTER = 10
# Nats a token; a token of probability 0.999 beside one other has 0.008. Ours.
LEAST_ENTROPY = 0.01
# How a group's loss may be weighted.
WEIGHTINGS = ("consistency", "mean", "variance", "off", "shuffled")
# How the losses of tokens become one, whose ratio is clipped, how the KL is estimated:
# policy_loss says what each is.
LOSSES = ("dapo", "grpo", "dr-grpo")
RATIOS = ("token", "sequence")
KLS = ("k3", "k1")

above_one = runtime.number(float, lambda v: 1 < v < math.inf, "a finite number above 1")


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
    add_rollout_flags(parser)
    add_objective_flags(parser)
    add_update_flags(parser)
    add_reward_flags(parser)
    add = parser.add_argument_group("watching").add_argument
    add("--every", type=runtime.positive, default=50,
        help="steps between checkpoints, pictures and validation")
    add("--val", type=runtime.natural, default=64,
        help="records of the val split in a validation; 0 for none")
    return parser


def add_rollout_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("rollouts").add_argument
    add("--prompts", type=runtime.positive, default=8,
        help="questions Q a step, over all processes")
    add("--group", type=runtime.positive, default=8, help="rollouts G of each question")
    add("--max-new-tokens", type=runtime.positive, default=256,
        help="tokens; a longer rollout is cut and counted as truncated")
    add("--temperature", type=runtime.above_zero, default=1.0,
        help="of sampling, and so of the scored log-probabilities")
    add("--resample", type=runtime.natural, default=0, metavar="N",
        help="groups whose rewards are all equal are replaced by fresh questions, "
        "up to N times a step")
    add("--cuda-graphs", action="store_true", help="decode by CUDA graphs")


def add_objective_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("objective").add_argument
    add("--loss", choices=LOSSES, default="dapo",
        help="mean over the step's tokens (dapo); over each completion's tokens, then over "
        "completions (grpo); their sum over completions x --max-new-tokens (dr-grpo)")
    add("--ratio", choices=RATIOS, default="token",
        help="to the old policy: each token's, or its whole completion's geometric mean (GSPO, "
        "whose clip is about 3e-4 4e-4)")
    add("--clip", type=runtime.not_negative, nargs=2, default=(0.2, 0.2), metavar=("LOW", "HIGH"),
        help="the ratio is clipped to 1 - LOW .. 1 + HIGH")
    add("--dual-clip", type=above_one, metavar="C",
        help="a negative advantage counts at most C times, however large the ratio")
    add("--beta", type=runtime.not_negative, default=0.04,
        help="weight of the KL to the starting policy; at 0 no reference model is kept")
    add("--kl", choices=KLS, default="k3",
        help="estimate of that KL; the gradient of k1 is noise around 0, k3 pulls back")
    add("--mask-truncated", action="store_true",
        help="do not learn from rollouts that were cut at --max-new-tokens")
    add("--no-std", action="store_true",
        help="do not divide advantages by their group's standard deviation")


def add_update_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("updates").add_argument
    add("--lr", type=runtime.above_zero, default=1e-6,
        help="peak learning rate; 1e-6 for a 3B model, about 1e-4 for the embedded one")
    add("--updates", type=runtime.positive, default=1, help="passes over a step's rollouts")
    add("--minibatches", type=runtime.positive, default=1, metavar="M",
        help="optimizer steps of a pass, each on Q / M of the questions")
    add("--importance-cap", type=runtime.above_zero, metavar="C",
        help="weigh each token by its scored over its sampled probability, C at most")


def add_reward_flags(parser: argparse.ArgumentParser) -> None:
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


def check_group_flags(args: argparse.Namespace) -> None:
    """Refuses flags that do not go together."""
    if args.prompts % dist.world():
        dist.fail(f"--prompts {args.prompts} is not a multiple of the "
                     f"{dist.world()} processes")
    if args.prompts // dist.world() % args.minibatches:
        dist.fail(f"--prompts {args.prompts} is not a multiple of --minibatches "
                     f"{args.minibatches} times {dist.world()} (processes)")
    if "format" in reward.TERMS:
        dist.fail("reward.TERMS has a term format, which is rft.py's own; name it otherwise")
    for name in args.reward:
        if name not in (*reward.TERMS, "format"):
            dist.fail(f"the run's reward has a term {name!r}, which reward.TERMS has not; "
                         "put it in there again")
        if name in RESERVED or name.endswith("_group_std") or "=" in name:
            dist.fail(f"a term of the reward can't be called {name!r}: the logs have that "
                         "name for something else")
    if not any(args.reward.values()):
        dist.fail("no term of --reward has a weight; give one another weight than 0")
    if args.group < 2:
        dist.fail("--group 1 leaves nothing to compare a rollout with; use 2 or more")


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


@dataclass(frozen=True)
class Objective:
    """What policy_loss is to compute; the defaults are those of rft.py."""

    loss: str = "dapo"                 # of LOSSES
    ratio: str = "token"               # of RATIOS
    kl: str = "k3"                     # of KLS
    dual_clip: float | None = None     # the most that a negative advantage counts
    # What grpo and dr-grpo divide by; like n_tokens over all micro-batches and processes.
    completions: int | None = None
    max_new_tokens: int | None = None

    @classmethod
    def of(cls, args: argparse.Namespace) -> "Objective":
        """The one that the flags ask for."""
        completions = args.prompts // args.minibatches * args.group
        return cls(
            args.loss, args.ratio, args.kl, args.dual_clip, completions, args.max_new_tokens)


def policy_loss(
        logp: Tensor, logp_old: Tensor, logp_ref: Tensor | None, advantage: Tensor,
        weight: Tensor, n_tokens: int, clip: Sequence[float] = (0.2, 0.2), beta: float = 0.0,
        lengths: Tensor | None = None, objective: Objective = Objective(),
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of some completions, and sums over their tokens for the log.

    logp, logp_old, logp_ref (None at beta 0), advantage, weight: packed (tokens,).
    lengths: (completions,) tokens of each; for the default objective they only count the
    completions that the clip cuts. n_tokens counts the optimizer step's, over all micro-batches
    and processes: losses and gradients simply add up.

    A token's gain is the clipped surrogate of PPO (arXiv 1707.06347; dual clip: arXiv
    1912.09729; the completion's ratio: GSPO, arXiv 2507.18071) minus beta times an estimate of
    the KL to the reference. Its loss is minus that, times its weight: its group's (section 3.4
    of RSGround-R1, second-hand; that the KL is multiplied too is our reading), or 0 where it is
    not to be learned from; then it is not counted. README's table has all the formulas.
    """
    log_ratio = logp - logp_old
    if objective.ratio == "sequence":
        log_ratio = completion_means(log_ratio, lengths)
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    surrogate = ratio * advantage
    gain = torch.minimum(surrogate, ratio.clamp(1 - clip[0], 1 + clip[1]) * advantage)
    if objective.dual_clip:
        least = torch.where(advantage < 0, objective.dual_clip * advantage, -torch.inf)
        gain = torch.maximum(gain, least)
    counted = weight > 0
    clipped = (gain != surrogate) & counted
    sums = {"clipped": clipped.float().sum()}
    if lengths is not None:
        cut = [of_completion.any() for of_completion in clipped.split(lengths.tolist())]
        sums["clipped_completions"] = torch.stack(cut).float().sum()
    if beta:
        log_ratio_ref = (logp_ref - logp).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        kl = -log_ratio_ref if objective.kl == "k1" else log_ratio_ref.exp() - log_ratio_ref - 1
        gain = gain - beta * kl
        sums["kl"] = (kl * counted).sum().detach()
    losses = -(weight.detach() * gain)        # (tokens,)
    return together(losses, n_tokens, lengths, objective), sums


def together(
        losses: Tensor, n_tokens: int, lengths: Tensor | None, objective: Objective) -> Tensor:
    """Losses (tokens,) of some completions -> their share of the optimizer step's loss."""
    if objective.loss == "grpo":
        of_completions = losses / lengths.repeat_interleave(lengths).to(losses.device)
        return of_completions.sum() / objective.completions
    if objective.loss == "dr-grpo":
        return losses.sum() / (objective.completions * objective.max_new_tokens)
    return losses.sum() / n_tokens


def completion_means(x: Tensor, lengths: Tensor) -> Tensor:
    """x (tokens,), lengths (completions,) -> (tokens,): the mean over each one's completion."""
    means = torch.stack([of_completion.mean() for of_completion in x.split(lengths.tolist())])
    return means.repeat_interleave(lengths.to(x.device))


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
    weights = by_place(dist.all_gather(weights))
    random = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
    dealt = torch.randperm(len(weights), generator=random)
    return weights[dealt][dist.rank()::dist.world()]


def by_place(gathered: Tensor) -> Tensor:
    """(world * n,), each process's values one behind the other -> the same by place in the step.

    Process r has the places r, r + world, ... So what is dealt to a place does not
    depend on the number of processes.
    """
    return gathered.view(dist.world(), -1).T.flatten()


# ---------------------------------------------------------------- rollouts and rewards

@dataclass
class Policy:
    """The model under training, and what goes with it."""

    model: QwenVL
    processor: Processor
    optimizer: torch.optim.Optimizer | None
    # The starting policy, None without a KL; under --lora the model itself, see lora.reference.
    reference: QwenVL | None

    def prompt(self, record: Record) -> Prompt:
        """A record's image and expression, as the model takes them."""
        return self.processor(open_image(record), record.text)


@dataclass
class Rollouts:
    """G sampled answers to each of Q questions."""

    records: list[Record]              # Q
    prompts: list[Prompt]              # Q
    completions: list[list[Tensor]]    # Q lists of G, each (L,) ids with the end of turn
    sampled_logp: list[list[Tensor]]   # the same: log-probabilities that they were drawn with
    texts: list[list[str]]             # Q lists of G
    truncated: Tensor | None = None    # (Q, G) bool: cut before its end of turn; sample() sets it

    def __getitem__(self, questions: slice) -> "Rollouts":
        """Those of some neighbouring questions."""
        return Rollouts(*(getattr(self, each.name)[questions] for each in fields(self)))

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
    """Q records, their prompts and seeds (Q,) -> G rollouts of each.

    Every process calls it at the same time, be it without a question (Q = 0).
    """
    # Sharded parameters are gathered once, for all the tokens of all processes.
    with dist.gathered(policy.model) as model:
        if not prompts:
            return Rollouts([], [], [], [], [])
        tokens, logprobs, lengths = generate(
            model, prompts, args.group, args.max_new_tokens, args.temperature, seeds,
            args.cuda_graphs)
    completions = []
    sampled_logp = []
    texts = []
    truncated = []
    # One wait for the device brings both to the host.
    on_host = torch.cat((tokens, lengths[..., None]), -1).tolist()
    for q, group in enumerate(on_host):
        ends = [rollout[-1] for rollout in group]
        completions.append([tokens[q, g, :n] for g, n in enumerate(ends)])
        sampled_logp.append([logprobs[q, g, :n] for g, n in enumerate(ends)])
        ids = [rollout[:n] for rollout, n in zip(group, ends)]
        texts.append([policy.processor.decode(of_rollout) for of_rollout in ids])
        truncated.append([of_rollout[-1] not in policy.model.stop_ids for of_rollout in ids])
    return Rollouts(
        list(records), list(prompts), completions, sampled_logp, texts, torch.tensor(truncated))


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
            dist.fail(f"the reward term {name} is not finite for every box; mend it there")
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


# ---------------------------------------------------------------- resampling

def resample(
        policy: Policy, rollouts: Rollouts, grades: Grades, fresh: Callable[[int], list[Record]],
        args: argparse.Namespace, step: int,
) -> dict[str, float]:
    """Puts fresh questions in the place of groups whose rewards are all equal.

    fresh: turn (1, 2, ...) -> this process's Q records of it, one a place. A group that
    does not vary either is replaced in the next turn; there are --resample turns at most.
    rollouts and grades are changed in place. -> what a step logs of it. Source: DAPO's
    dynamic sampling (arXiv 2503.14476); that there is a last turn, and which questions
    come, is ours.
    """
    if not args.resample:
        return {}
    started = time.perf_counter()
    replaced = 0
    for turn in range(1, args.resample + 1):
        flat = ~varies(grades.rewards)        # (Q,)
        # The processes go on, and stop, together: sampling gathers all their parameters.
        n_flat = int(dist.all_sum(flat.sum()))
        if not n_flat:
            break
        places = []
        records = []
        prompts = []
        questions = fresh(turn)
        for place in flat.nonzero().flatten().tolist():
            try:
                prompts.append(policy.prompt(questions[place]))
            except UnreadableImage:
                # The group stays for this turn. The image is counted where the run's own order
                # meets it.
                continue
            records.append(questions[place])
            places.append(place)
        again = sample(policy, records, prompts, step_seeds(args, step, turn)[places], args)
        if places:
            put_groups(rollouts, grades, again, grade(again, args), places)
        replaced += int(dist.all_sum(torch.tensor(len(places))))
    return {"resampled": replaced, "seconds_resample": time.perf_counter() - started}


def put_groups(
        rollouts: Rollouts, grades: Grades, again: Rollouts, graded: Grades,
        places: Sequence[int],
) -> None:
    """Overwrites the groups at these places with those of other rollouts, in their order."""
    for old, new in ((rollouts, again), (grades, graded)):
        for each in fields(old):
            overwrite(getattr(old, each.name), getattr(new, each.name), places)


def overwrite(old: list | Tensor | dict[str, Tensor], new: Any, places: Sequence[int]) -> None:
    """old[place] = new[0], new[1], ... in a list or a tensor, or in all tensors of a dict."""
    if isinstance(old, dict):
        for name, value in old.items():
            overwrite(value, new[name], places)
        return
    for i, place in enumerate(places):
        old[place] = new[i]


def fresh_records(
        records: Sequence[Record], args: argparse.Namespace, step: int, turn: int) -> list[Record]:
    """This process's records of a turn (1, 2, ...) of a step's resampling, one for each place.

    All records but those of the step's batch, in an order of the step's own, Q a turn;
    where there are too few they come again. So they are a function of seed, step, turn
    and place alone: whoever resumes, or runs on more processes, meets the same.
    """
    batch = runtime.batch(records, step, args.prompts, args.seed)
    taken = {record.id for record in batch}
    # Epochs before the first: the run itself meets none of these orders.
    order = runtime.epoch_order(len(records), args.seed, -1 - step)
    others = [i for i in order if records[i].id not in taken] or order
    first = (turn - 1) * args.prompts
    places = range(first + dist.rank(), first + args.prompts, dist.world())
    return [records[others[place % len(others)]] for place in places]


# ---------------------------------------------------------------- one step

def train_step(
        policy: Policy, records: Sequence[Record], prompts: Sequence[Prompt],
        args: argparse.Namespace, step: int, fresh: Callable[[int], list[Record]] | None = None,
) -> tuple[dict[str, Any], Rollouts, Grades]:
    """This process's part of a step -> its log line, and what was learned from.

    fresh: see resample()."""
    started = time.perf_counter()
    # 1. Each question is answered G times, at the sampling temperature.
    rollouts = sample(policy, records, prompts, step_seeds(args, step), args)
    sampled = time.perf_counter()

    # 2. Answers are rewarded; a group's rewards become advantages over its own mean, and
    #    its IoU the weight of its loss. Groups of equal rewards may be replaced before.
    grades = grade(rollouts, args)
    graded = time.perf_counter()
    resampled = resample(policy, rollouts, grades, fresh, args, step)
    refilled = time.perf_counter()
    weight = group_weights(grades.terms["iou"], args, step)        # (Q,)
    advantage = advantages(grades.rewards, not args.no_std)        # (Q, G)

    # 3. All losses of an optimizer step are divided by one count, over all processes and
    #    micro-batches: so each token weighs the same, however the step is cut.
    minibatches = cut_into_minibatches(policy.model, rollouts, advantage, weight, args)
    score_before_updates(policy, minibatches, args)

    # 4. Gradients add up over micro-batches, then the optimizer steps. From its second
    #    step on the policy has left the one that sampled, and the clip begins to act.
    lr = dist.lr_at(step, args.steps, args.lr)
    sums: Counter[str] = Counter()
    for minibatch in minibatches * args.updates:
        for batch in minibatch.batches:
            sums.update(accumulate_gradient(policy, batch, minibatch.n_tokens, args))
        grad_norm = dist.update(policy.model, policy.optimizer, lr)
        sums["not_finite"] += not grad_norm < float("inf")
    updated = time.perf_counter()

    # 5. The log line.
    line = {"step": step + 1, **summary(rollouts, grades, advantage, weight, args)}
    line |= update_summary(sums, minibatches, args)
    line |= {"lr": lr, "grad_norm": grad_norm, "finite": not sums["not_finite"], **resampled}
    line |= {"seconds_rollout": sampled - started, "seconds_reward": graded - sampled}
    peak = dist.peak_memory(policy.model.device)
    line |= {"seconds_update": updated - refilled, "peak_GiB": peak}
    return line, rollouts, grades


def step_seeds(args: argparse.Namespace, step: int, turn: int = 0) -> Tensor:
    """Seeds of this process's questions in a turn of resampling (0: none yet).

    Each depends on its place in the step alone.
    """
    places = range(dist.rank(), args.prompts, dist.world())
    first = ((args.seed + turn) * 1_000_003 + step) * args.prompts
    return torch.tensor([first + i for i in places])


@dataclass
class MicroBatch:
    """Some groups of a step, scored and learned from in one pass. Tensors are (tokens,)."""

    prompts: Sequence[Prompt]
    completions: list[list[Tensor]]
    lengths: Tensor                    # (completions,) tokens of each
    advantage: Tensor                  # of each token: its rollout's
    weight: Tensor                     # of each token: its group's, 0 where it is masked
    sampled_logp: Tensor
    old_logp: Tensor | None = None     # what the ratio is to: set_old_policy stores it
    ref_logp: Tensor | None = None     # of the reference: likewise
    sampled_scored: float = 0.0        # largest difference of sampled and scored log-probabilities
    importance: float = 0.0            # sum of the importance weights


@dataclass
class Minibatch:
    """What one optimizer step learns from."""

    batches: list[MicroBatch]          # this process's
    n_tokens: int                      # that are learned from, over all processes; 1 for none


def cut_into_minibatches(
        model: QwenVL, rollouts: Rollouts, advantage: Tensor, weight: Tensor,
        args: argparse.Namespace,
) -> list[Minibatch]:
    """Cuts a step into optimizer steps of equally many questions, neighbours in the step.

    advantage (Q, G), weight (Q,). So each holds the same questions whatever the number of
    processes.
    """
    weight = weight[:, None].expand_as(advantage)        # (Q, G)
    if args.mask_truncated:
        weight = weight.masked_fill(rollouts.truncated, 0.0)
    lengths = rollouts.lengths.masked_fill(weight == 0, 0)
    costs = []
    for prompt, tokens in zip(rollouts.prompts, rollouts.lengths.sum(1).tolist()):
        costs.append(dist.memory_tokens(model, prompt, tokens))
    parts = dist.equal_slices(len(weight), args.minibatches)
    counts = dist.all_sum(torch.stack([lengths[part].sum() for part in parts])).tolist()
    minibatches = []
    for part, n_tokens in zip(parts, counts):
        passes = dist.micro_batches(costs[part], args.micro_tokens)
        batches = cut_into_micro_batches(rollouts[part], advantage[part], weight[part], passes)
        minibatches.append(Minibatch(batches, max(1, n_tokens)))
    return minibatches


def cut_into_micro_batches(
        rollouts: Rollouts, advantage: Tensor, weight: Tensor, passes: Sequence[slice],
) -> list[MicroBatch]:
    """Cuts groups into passes of neighbours; advantage and weight, both (Q, G), are laid out
    by token."""
    lengths = rollouts.lengths        # (Q, G)
    batches = []
    for groups in passes:
        of_rollout = lengths[groups].flatten()
        sampled_logp = torch.cat([torch.cat(group) for group in rollouts.sampled_logp[groups]])
        batches.append(MicroBatch(
            rollouts.prompts[groups], rollouts.completions[groups], of_rollout,
            advantage[groups].flatten().repeat_interleave(of_rollout),
            weight[groups].flatten().repeat_interleave(of_rollout), sampled_logp))
    return batches


def score_before_updates(
        policy: Policy, minibatches: Sequence[Minibatch], args: argparse.Namespace) -> None:
    """Scores all rollouts by the policy that sampled, where importance weights will need it.

    In a step with minibatches most are scored first when the policy has moved.
    """
    if not args.importance_cap or args.minibatches == 1:
        return
    for minibatch in minibatches:
        for batch in minibatch.batches:
            with torch.no_grad():
                scored, _ = policy.model.score(batch.prompts, batch.completions, args.temperature)
            set_old_policy(policy, batch, scored, args)


def set_old_policy(
        policy: Policy, batch: MicroBatch, scored: Tensor, args: argparse.Namespace) -> None:
    """Stores what a micro-batch's loss compares the policy with; once, at the first scoring.

    scored: (tokens,) log-probabilities without gradient. In the only optimizer step of a
    batch they are the old ones: it is on policy by definition, and how far the sampler's
    lie from them is rounding, which is watched. With more steps the sampler's are, so
    that the clip bounds the whole way from the policy that sampled. With importance
    weights the scored ones are again, and a weight, scored over sampled probability,
    makes up for the rest of the way (truncated importance sampling, as in TRL's
    vllm_importance_sampling_correction "token_truncate"): it multiplies the advantage,
    so the surrogate alone.
    """
    batch.sampled_scored = (scored - batch.sampled_logp).abs().max().item()
    several = args.updates * args.minibatches > 1
    batch.old_logp = scored
    if args.importance_cap:
        log_ratio = (scored - batch.sampled_logp).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        importance = log_ratio.exp().clamp(max=args.importance_cap)
        batch.advantage = batch.advantage.to(scored.device) * importance
        batch.importance = importance[batch.weight.to(scored.device) > 0].sum().item()
    elif several:
        batch.old_logp = batch.sampled_logp
    if policy.reference is not None:
        with torch.no_grad(), lora.reference(policy.reference):
            batch.ref_logp, _ = policy.reference.score(
                batch.prompts, batch.completions, args.temperature)


def accumulate_gradient(
        policy: Policy, batch: MicroBatch, n_tokens: int, args: argparse.Namespace,
) -> dict[str, float]:
    """Adds a micro-batch's gradient to the step's -> its loss, and sums over its tokens."""
    logp, entropy = policy.model.score(batch.prompts, batch.completions, args.temperature)
    if batch.old_logp is None:
        set_old_policy(policy, batch, logp.detach(), args)
    weight = batch.weight.to(logp.device)
    loss, sums = policy_loss(
        logp, batch.old_logp, batch.ref_logp, batch.advantage.to(logp.device), weight, n_tokens,
        args.clip, args.beta, batch.lengths, Objective.of(args))
    loss.backward()
    sums |= {"loss": loss.detach(), "entropy": (entropy * (weight > 0)).sum()}
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
        "truncated": rollouts.truncated.sum() / n,
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
    line["consistency_weight_min"] = -dist.all_max(-weight.min()).item()
    line["consistency_weight_max"] = dist.all_max(weight.max()).item()
    return line


def update_summary(
        sums: Counter[str], minibatches: Sequence[Minibatch], args: argparse.Namespace,
) -> dict[str, float]:
    """What a step logs of its update: means over the tokens of all processes and passes."""
    n_tokens = sum(minibatch.n_tokens for minibatch in minibatches)
    own = {name: sums[name] / (n_tokens * args.updates) for name in ("entropy", "clipped")}
    n = args.prompts * args.group
    own["clipped_completions"] = sums["clipped_completions"] / (n * args.updates)
    # A loss is divided by its optimizer step's count already.
    own["loss"] = sums["loss"] / (args.updates * args.minibatches)
    if args.beta:
        own["kl"] = sums["kl"] / (n_tokens * args.updates)
    batches = list(itertools.chain.from_iterable(m.batches for m in minibatches))
    if args.importance_cap:
        own["importance"] = sum(batch.importance for batch in batches) / n_tokens
    line = sum_over_processes(own)
    # Later minibatches may have been scored by a policy that has left the sampler.
    largest = torch.tensor(max(batch.sampled_scored for batch in minibatches[0].batches))
    line["sampled_scored_max"] = dist.all_max(largest).item()
    return line


def collapse(lines: Sequence[dict[str, Any]]) -> list[str]:
    """A sentence on each way in which the last steps of a log can't teach any more."""
    equal = runtime.last_steps(lines, lambda line: line["zero_variance_groups"] > 1 - 1e-6)
    # It is 0 to the bit where no token at all is learned from: --mask-truncated has left all out.
    certain = runtime.last_steps(lines, lambda line: 0 < line["entropy"] < LEAST_ENTROPY)
    found = []
    if equal >= COLLAPSED_AFTER:
        found.append(f"for {COLLAPSED_AFTER} steps or more no group's rewards differ: all "
                     "advantages are 0")
    if certain >= COLLAPSED_AFTER:
        found.append(f"for {COLLAPSED_AFTER} steps or more the entropy is under {LEAST_ENTROPY} "
                     "nats: a group's answers are all but the same")
    return found


def sum_over_processes(own: dict[str, Any]) -> dict[str, float]:
    """Each figure summed over all processes, in one exchange."""
    values = torch.tensor([float(v) for v in own.values()], dtype=torch.float64)
    return dict(zip(own, dist.all_sum(values).tolist()))


def log_rollouts(path: Path, step: int, rollouts: Rollouts, grades: Grades) -> None:
    """Appends every rollout of the first process with its rewards, a line a question."""
    if dist.rank():
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
    if dist.rank():
        return
    record = rollouts.records[0]
    picture = pictures.draw_rollouts(
        open_image(record), grades.boxes[0].tolist(), grades.rewards[0].tolist(), record.box,
        record.text)
    picture.save(path)


def canary(
        policy: Policy, records: Sequence[Record], prompts: Sequence[Prompt],
        args: argparse.Namespace,
) -> None:
    """Says before step 1 what the starting policy answers.

    A reward that can't rise is seen here, and not in an hour.
    """
    seeds = torch.arange(len(records)) + 7_777 * (dist.rank() + 1)
    rollouts = sample(policy, records, prompts, seeds, args)
    terms = grade(rollouts, args).terms
    texts = itertools.chain.from_iterable(rollouts.texts)
    outcomes = Counter(answer.failure(text) or "parsed" for text in texts)
    names = ("parsed", *answer.FAILURES)
    counts = dist.all_sum(torch.tensor([outcomes[name] for name in names])).tolist()
    n = sum(counts)
    iou = dist.all_sum(terms["iou"].sum()).item()
    format_ok = dist.all_sum(format_reward(rollouts.texts).sum()).item()
    if dist.rank() == 0:
        told = ", ".join(f"{count} {name}" for name, count in zip(names, counts) if count)
        print(f"before step 1: mean IoU {iou / n:.3f}, format {format_ok / n:.3f} "
              f"over {n} sampled answers; {told}")
        if iou == 0:
            print("warning: no answer touches its target; the IoU reward is silent until one does")


# ---------------------------------------------------------------- the stage

def main() -> None:
    args = runtime.parse(flags(), "rft")
    check_group_flags(args)
    if args.plan:
        records, val = ((), ()) if args.image else runtime.load_records(args, "rft")
        memory.show(args, step_size(args), records, val)
        return
    init = folder(args.init)
    records, val = runtime.load_records(args, "rft")
    runtime.set_steps(args, len(records), args.prompts, epochs=0.4)
    out = Path(args.out)
    saving.check_output(out, args.resume)
    policy = open_policy(init, args, records, val)
    first = saving.restore(out, policy.model, policy.optimizer) if args.resume else 0
    lines = runtime.begin(out, first, policy.model, ("metrics.jsonl", "rollouts.jsonl"))
    run = runtime.run_description(args, "rft", records)
    checkpoints = saving.Checkpoints(
        out, args, policy.model, policy.optimizer, policy.processor, run, first)
    memory.try_out(policy.model, policy.optimizer, policy.reference, policy.processor, records, val,
                   args, step_size(args))
    train(policy, checkpoints, lines, records, val)


def train(
        policy: Policy, checkpoints: saving.Checkpoints, lines: list[dict[str, Any]],
        records: Sequence[Record], val: Sequence[Record],
) -> None:
    """The steps of a run from its last checkpoint on; lines: its log up to there."""
    args = checkpoints.args
    out = checkpoints.out
    first = checkpoints.saved
    replacements = runtime.Replacements(out, len(records))

    def prompts_of(step: int) -> runtime.Share[Prompt]:
        """This process's records of a step with their prompts."""
        return runtime.own_share(records, step, args.prompts, args.seed, policy.prompt)

    if not first:
        share = prompts_of(0)
        replacements.count(0, share.unreadable)
        canary(policy, share.records, share.made, args)
    with runtime.progress_bar("rft", first, args.steps) as bar:
        ahead = runtime.prefetch(prompts_of, range(first, args.steps), args.workers)
        for step, share in zip(bar, ahead):
            if runtime.told_to_stop(out):
                break
            unreadable = replacements.count(step, share.unreadable)
            fresh = functools.partial(fresh_records, records, args, step)
            line, rollouts, grades = train_step(
                policy, share.records, share.made, args, step, fresh)
            lines.append(line)
            line |= unreadable
            runtime.warn(lines, rollouts.records, collapse(lines))
            log_rollouts(out / "rollouts.jsonl", step, rollouts, grades)
            due = (step + 1) % args.every == 0 or step + 1 == args.steps
            if due:
                line |= evaluation.validate(policy.model, policy.processor, val, args)
                draw_first_group(out / f"rollouts_{step + 1:06d}.png", rollouts, grades)
            runtime.log(out / "metrics.jsonl", line)
            # Last, so that a checkpoint never covers a step that is not logged.
            if due:
                checkpoints.save(line)
            bar.set_postfix_str(progress(line))
            runtime.stop_if_not_finite(lines, args.steps, out)
    checkpoints.end(lines)


def step_size(args: argparse.Namespace) -> memory.Step:
    """What a step is, for the plan of memory."""
    return memory.Step(
        args.prompts, args.group, args.max_new_tokens, samples=True, updates=args.minibatches)


def open_policy(
        init: Path, args: argparse.Namespace, records: Sequence[Record],
        val: Sequence[Record] = ()) -> Policy:
    """The model to train with its optimizer, and where there is a KL the reference."""
    model, processor = saving.open_model(init, max_pixels=args.max_pixels)
    lora.fit(model, args)
    device = dist.start(args.device, args.deterministic)
    memory.check_gpu(args, processor, records, val, step_size(args), device)
    reference = None
    if args.beta and args.lora:
        # No second model: the base is frozen, so the adapters tell the two policies apart.
        lora.keep_start(model)
        reference = model
    elif args.beta:
        reference = open_reference(init, device)
    lora.choose_trained(model, args.freeze_vision, args.gradient_checkpointing)
    model = dist.prepare(model, device)
    return Policy(model, processor, dist.optimizer(model, args.lr), reference)


def open_reference(init: Path, device: torch.device) -> QwenVL:
    """The starting policy once more, in the compute dtype and frozen: it is only read."""
    model, _ = saving.open_model(init)
    # In the order of the model under training: merged as stored, rounded behind that.
    lora.merge(model)
    return model.to(device, dist.compute_dtype(device)).requires_grad_(False)


def progress(line: dict[str, Any]) -> str:
    """A step's log line, as it stands behind the progress bar."""
    kl = f"kl {line['kl']:.4f} " if "kl" in line else ""
    return (f"reward {line['reward']:.3f} iou {line['iou']:.3f} tokens {line['length']:.0f} {kl}"
            f"sampled-scored {line['sampled_scored_max']:.1e} peak {line['peak_GiB']:.1f} GiB"
            + (" warning" if "warning" in line else ""))


if __name__ == "__main__":
    runtime.main(main, farewells=True)
