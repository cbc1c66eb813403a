"""How much of a policy gradient is signal, for each reward and weighting, before any training.

A step's gradient g is the true one plus the noise of its few rollouts. From several
batches of fresh questions, none of which trains:

    signal    |E g|^2 / E |g|^2: the share of a step's squared length that is not noise
    progress  <E g, E u> / sqrt(E |g|^2 E |u|^2), u the gradient of the mean IoU: how far one
              batch's step agrees with what raises the IoU on others; the signal,
              where g is u

Both are estimated from pairs of different batches, whose noise is independent, so
they are unbiased but for the ratio and may come out below 0. The standard errors are
jackknifed over batches: a dozen tell a half-trained model from a trained one, small
differences need hundreds. "as Adam sees it" divides each coordinate by its root mean
square over these very batches first, which biases it upwards; the row "dealt at
random", whose rewards are permuted within their groups and so teach nothing, shows by
how much.

    python study/gradient.py --data synth --init ckpt/sft --temperature 0.6
    --freeze-vision

Flags are those of rft.py, and --batches. Rewards and weightings are all tried on the
same rollouts, their advantages divided by std unless --no-std; those of u never are.
What concerns training alone (--lr, --out, --weighting) has no effect here. Every
gradient is kept whole in memory: for small models.
"""
import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import rft  # noqa: E402
from data import load, open_image  # noqa: E402
from readers.base import Record  # noqa: E402
from train import dist  # noqa: E402
from train.flags import positive  # noqa: E402
from train.run import launch, record_at  # noqa: E402

TARGET = "mean IoU"


def variants(grades: rft.Grades, args: argparse.Namespace) -> dict[str, Tensor]:
    """What the same rollouts would teach under each reward and weighting.

    -> name -> advantages times the weight of their group, (Q, G).
    """
    divide = not args.no_std
    total = grades.rewards                                         # (Q, G)
    rewards = {"total": total}
    for name, weight in args.reward.items():
        rewards[f"total without {name}"] = total - weight * grades.terms[name]
        rewards[f"{name} alone"] = grades.terms[name]
    random = torch.Generator().manual_seed(args.seed)
    dealt = torch.rand(total.shape, generator=random).argsort(1)
    rewards["total, dealt at random"] = total.gather(1, dealt)

    advantages = {TARGET: rft.advantages(grades.terms["iou"], divide_by_std=False)}
    for name, reward in rewards.items():
        advantages[name] = rft.advantages(reward, divide)
    for weighting in ("consistency", "mean", "variance"):
        settings = argparse.Namespace(**vars(args) | {"weighting": weighting})
        weight = rft.group_weights(grades.terms["iou"], settings, step=0)
        advantages[f"total, weighted by {weighting}"] = advantages["total"] * weight[:, None]
    return advantages


def gradients(
        policy: rft.Policy, records: Sequence[Record], seeds: Tensor, args: argparse.Namespace,
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """One batch of rollouts -> name -> flat gradient of the policy loss, and mean rewards."""
    prompts = [policy.processor(open_image(r), r.text) for r in records]
    rollouts = rft.sample(policy, records, prompts, seeds, args)
    grades = rft.grade(rollouts, args)
    lengths = rollouts.lengths.flatten()
    logp, _ = policy.model.score(prompts, rollouts.completions, args.temperature)
    trained = [p for p in policy.model.parameters() if p.requires_grad]
    flat = {}
    for name, advantage in variants(grades, args).items():
        of_tokens = advantage.flatten().repeat_interleave(lengths)
        ones = torch.ones_like(of_tokens)
        loss, _ = rft.policy_loss(logp, logp.detach(), None, of_tokens, ones, len(logp))
        parts = torch.autograd.grad(loss, trained, retain_graph=True, allow_unused=True)
        flat[name] = torch.cat([g.flatten() for g in parts if g is not None])
    means = {"reward": grades.rewards.mean().item()}
    for name, term in grades.terms.items():
        means[name] = term.mean().item()
    return flat, means


def off_diagonal_mean(gram: Tensor) -> Tensor:
    """Mean of a square matrix off its diagonal: the scalar product of different batches."""
    n = len(gram)
    return (gram.sum() - gram.diag().sum()) / (n * (n - 1))


def estimate(g: Tensor, u: Tensor) -> tuple[tuple[float, float], tuple[float, float]]:
    """Gradients g of a variant and u of the mean IoU, each (B, n).

    -> (signal, its standard error), (progress, its standard error).
    """
    gg = g @ g.T                                                   # (B, B), as the next two
    gu = g @ u.T
    uu = u @ u.T

    def both(batches: Tensor) -> Tensor:
        """Signal and progress from these batches alone."""
        rows = batches[:, None]
        length_g = gg[rows, batches].diag().mean()
        length_u = uu[rows, batches].diag().mean()
        signal = off_diagonal_mean(gg[rows, batches]) / length_g
        progress = off_diagonal_mean(gu[rows, batches]) / (length_g * length_u).sqrt()
        return torch.stack((signal, progress))

    n = len(g)
    batches = torch.arange(n)
    left_out = torch.stack([both(batches[batches != i]) for i in batches])
    error = ((left_out - left_out.mean(0)).square().sum(0) * (n - 1) / n).sqrt()
    signal, progress = both(batches).tolist()
    signal_error, progress_error = error.tolist()
    return (signal, signal_error), (progress, progress_error)


def divide_as_adam(g: Tensor) -> Tensor:
    """Gradients (B, n), each coordinate over its root mean square."""
    return g / (g.square().mean(0).sqrt() + 1e-12)


def table(flat: dict[str, Tensor]) -> str:
    """name -> gradients (B, n) -> Markdown."""
    text = ("| advantages | signal | progress | signal, as Adam sees it "
            "| progress, as Adam sees it |\n|---|---|---|---|---|\n")
    u = flat[TARGET]
    for name, g in flat.items():
        pairs = (*estimate(g, u), *estimate(divide_as_adam(g), divide_as_adam(u)))
        cells = [f"{value:.3f} ± {error:.3f}" for value, error in pairs]
        text += f"| {name} | {' | '.join(cells)} |\n"
    return text


def mean_rewards(means: Sequence[dict[str, float]]) -> str:
    """Mean rewards of several batches -> their mean, in words."""
    words = []
    for name in means[0]:
        values = [mean[name] for mean in means]
        words.append(f"{name} {sum(values) / len(values):.3f}")
    return ", ".join(words)


def main() -> None:
    parser = rft.flags()
    parser.description = ("Measures how much of the policy gradient of rft.py, under the same "
                          "flags, is signal")
    parser.add_argument("--batches", type=positive, default=12,
                        help="of --prompts questions each; three at least")
    args = parser.parse_args()
    args.device = dist.choose_device(args.device)
    rft.check_group_flags(args)
    if args.batches < 3:
        dist.fail(f"--batches {args.batches} has no pairs left once one is left out; "
                     "use 3 or more")
    records = load(args.data, args.root, "rft")
    # No reference: what is measured is the gradient of the reward.
    args.beta = 0.0
    policy = rft.open_policy(Path(args.init), args, records)
    flat: dict[str, list[Tensor]] = {}
    means = []
    with tqdm(range(args.batches), desc="gradients") as bar:
        for step in bar:
            batch = [record_at(records, step * args.prompts + i, args.seed)
                     for i in range(args.prompts)]
            seeds = torch.arange(args.prompts) + step * args.prompts
            gradient, mean = gradients(policy, batch, seeds, args)
            means.append(mean)
            for name, g in gradient.items():
                flat.setdefault(name, []).append(g)
            bar.set_postfix_str(" ".join(f"{k} {v:.3f}" for k, v in mean.items()))
    if not any(g.any() for g in flat["total"]):
        dist.fail(f"{args.init}: all answers of a group were rewarded alike, so there is no "
                     "gradient; train it longer first")
    print(f"{args.init}, {args.data}, T={args.temperature:g}, {args.batches} batches of "
          f"{args.prompts} x {args.group} rollouts: {mean_rewards(means)}\n")
    print(table({name: torch.stack(parts) for name, parts in flat.items()}))


if __name__ == "__main__":
    launch(main)
