"""Measures how much of a policy gradient is signal, for each reward and weighting.

A step's gradient g is the true one plus the noise of its few rollouts. Several batches of fresh
questions give, without any training:

    signal    |E g|^2 / E |g|^2: the share of a step's squared length that is not noise
    progress  <E g, E u> / sqrt(E |g|^2 E |u|^2), u the gradient of the mean IoU: how well a
              batch's step agrees with what raises the IoU on others; the signal, if g is u

Both are estimated from pairs of different batches, which have independent noise, so they are
unbiased except for the ratio, and may come out below 0. Standard errors are jackknifed over
batches: a dozen separate a half-trained model from a trained one, small differences need hundreds.
"as Adam sees it" first divides each coordinate by its root mean square over the same batches,
which biases the estimate upwards. The row "dealt at random" permutes the rewards within their
groups, so it teaches nothing; it shows the size of that bias.

    python study/gradient.py --data synth --init ckpt/sft --temperature 0.6 --freeze-vision

Flags are those of rft.py, and --batches. All rewards and weightings are tried on the same rollouts,
with advantages divided by their standard deviation unless --no-std; those of u never are. Flags
of training alone (--lr, --out, --weighting) have no effect. Every gradient is kept in memory, so
this is for small models.
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
from data import load  # noqa: E402
from readers.base import Record  # noqa: E402
from train.dist import fail  # noqa: E402
from train.flags import parse, positive  # noqa: E402
from train.run import launch, record_at  # noqa: E402

TARGET = "mean IoU"


def variants(groups: Sequence[rft.Group], args: argparse.Namespace) -> dict[str, Tensor]:
    """Name of a reward or weighting -> advantages times the weight of their group, (Q, G)."""
    divide = not args.no_std
    terms = {}
    for name in groups[0].terms:
        terms[name] = torch.stack([g.terms[name] for g in groups])
    total = torch.stack([g.reward for g in groups])                # (Q, G)
    rewards = {"total": total}
    for name, weight in args.reward.items():
        rewards[f"total without {name}"] = total - weight * terms[name]
        rewards[f"{name} alone"] = terms[name]
    random = torch.Generator().manual_seed(args.seed)
    dealt = torch.rand(total.shape, generator=random).argsort(1)
    rewards["total, dealt at random"] = total.gather(1, dealt)

    advantages = {TARGET: rft.advantages(terms["iou"], divide_by_std=False)}
    for name, reward in rewards.items():
        advantages[name] = rft.advantages(reward, divide)
    for weighting in ("consistency", "mean", "variance"):
        settings = argparse.Namespace(**vars(args) | {"weighting": weighting})
        weight = rft.group_weights(terms["iou"], settings, step=0)
        advantages[f"total, weighted by {weighting}"] = advantages["total"] * weight[:, None]
    return advantages


def gradients(
        policy: rft.Policy, records: Sequence[Record], seeds: Tensor, args: argparse.Namespace,
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """One batch of rollouts -> name -> flat gradient of the policy loss, and mean rewards."""
    prompts = [policy.prompt(record) for record in records]
    groups = [rft.grade(group, args) for group in rft.sample(policy, records, prompts, seeds, args)]
    completions = [group.completions for group in groups]
    lengths = torch.tensor([len(answer) for group in completions for answer in group])
    logp, _ = policy.model.score(prompts, completions, args.temperature)
    trained = [p for p in policy.model.parameters() if p.requires_grad]
    flat = {}
    for name, advantage in variants(groups, args).items():
        per_token = advantage.flatten().repeat_interleave(lengths)
        loss, _ = rft.policy_loss(
            logp, logp.detach(), None, per_token, torch.ones_like(per_token), len(logp))
        parts = torch.autograd.grad(loss, trained, retain_graph=True, allow_unused=True)
        flat[name] = torch.cat([g.flatten() for g in parts if g is not None])
    means = {"reward": torch.stack([group.reward for group in groups]).mean().item()}
    for name in groups[0].terms:
        means[name] = torch.stack([group.terms[name] for group in groups]).mean().item()
    return flat, means


def estimate(g: Tensor, u: Tensor) -> tuple[tuple[float, float], tuple[float, float]]:
    """Gradients g of a variant and u of the mean IoU, each (B, n).

    -> (signal, its standard error), (progress, its standard error).
    """
    gg, gu, uu = g @ g.T, g @ u.T, u @ u.T                         # (B, B)

    def both(batches: Tensor) -> Tensor:
        """Signal and progress from these batches alone."""
        rows = batches[:, None]
        n = len(batches)

        def between(gram: Tensor) -> Tensor:
            """Mean off the diagonal: the scalar product of different batches."""
            gram = gram[rows, batches]
            return (gram.sum() - gram.diag().sum()) / (n * (n - 1))

        length_g = gg[rows, batches].diag().mean()
        length_u = uu[rows, batches].diag().mean()
        return torch.stack((between(gg) / length_g, between(gu) / (length_g * length_u).sqrt()))

    n = len(g)
    batches = torch.arange(n)
    left_out = torch.stack([both(batches[batches != i]) for i in batches])
    error = ((left_out - left_out.mean(0)).square().sum(0) * (n - 1) / n).sqrt()
    signal, progress = both(batches).tolist()
    signal_error, progress_error = error.tolist()
    return (signal, signal_error), (progress, progress_error)


def table(flat: dict[str, Tensor]) -> str:
    """name -> gradients (B, n) -> Markdown."""
    text = ("| advantages | signal | progress | signal, as Adam sees it "
            "| progress, as Adam sees it |\n|---|---|---|---|---|\n")

    def as_adam(g: Tensor) -> Tensor:
        return g / (g.square().mean(0).sqrt() + 1e-12)

    u = flat[TARGET]
    for name, g in flat.items():
        pairs = (*estimate(g, u), *estimate(as_adam(g), as_adam(u)))
        cells = [f"{value:.3f} ± {error:.3f}" for value, error in pairs]
        text += f"| {name} | {' | '.join(cells)} |\n"
    return text


def main() -> None:
    parser = rft.flags()
    parser.description = ("Measures how much of the policy gradient of rft.py, with the same "
                          "flags, is signal")
    parser.add_argument("--batches", type=positive, default=12,
                        help="of --prompts questions each, 3 or more")
    args = parse(parser, "rft")
    rft.check_flags(args)
    if args.batches < 3:
        fail(f"--batches {args.batches} leaves no pairs when one is left out; use 3 or more")
    records = load(args.data, args.root, "rft", args.coords, args.stretch)
    # No reference model: this measures the gradient of the reward.
    args.beta = 0.0
    policy = rft.open_policy(Path(args.init), args, records)
    flat: dict[str, list[Tensor]] = {}
    means = []
    with tqdm(range(args.batches), desc="gradients") as bar:
        for step in bar:
            places = range(step * args.prompts, (step + 1) * args.prompts)
            batch = [record_at(records, place, args.seed) for place in places]
            gradient, mean = gradients(policy, batch, torch.tensor(places), args)
            means.append(mean)
            for name, g in gradient.items():
                flat.setdefault(name, []).append(g)
            bar.set_postfix_str(" ".join(f"{k} {v:.3f}" for k, v in mean.items()))
    if not any(g.any() for g in flat["total"]):
        fail(f"{args.init}: all answers of each group were rewarded alike, so there is no "
             "gradient; train it longer first")
    words = []
    for name in means[0]:
        words.append(f"{name} {sum(mean[name] for mean in means) / len(means):.3f}")
    print(f"{args.init}, {args.data}, T={args.temperature:g}, {args.batches} batches of "
          f"{args.prompts} x {args.group} rollouts: {', '.join(words)}\n")
    print(table({name: torch.stack(parts) for name, parts in flat.items()}))


if __name__ == "__main__":
    launch(main)
