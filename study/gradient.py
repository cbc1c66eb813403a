"""How much of a policy gradient is signal, under each reward and weighting, before any training.

A step's gradient g is the true one plus the noise of its few rollouts. From several
batches of fresh questions, none of which trains:

    signal    |E g|^2 / E |g|^2: the share of a step's squared length that is not noise
    progress  <E g, E u> / sqrt(E |g|^2 E |u|^2), u the gradient of the mean IoU: how far
              one batch's step agrees with what raises the IoU on others; where g is u,
              it is the signal

Both are estimated from pairs of different batches, whose noise is independent, so they
are unbiased but for the ratio and may come out below 0. The standard errors are
jackknifed over batches: a dozen tell a half-trained model from a trained one, small
differences need hundreds. "as Adam sees it" divides each coordinate by its root mean
square over these very batches first, which biases it upwards; the row "dealt at random",
whose rewards are permuted within their groups and so teach nothing, shows by how much.

    python study/gradient.py --data synth --init ckpt/sft --temperature 0.6 --freeze-vision

takes the flags of rft.py, and --batches. Rewards and weightings are all tried on the same
rollouts, their advantages divided by std unless --no-std; those of u never are. What
concerns training alone (--lr, --out, --weighting) has no effect here. Every gradient is
kept whole in memory: for small models.

The measurement is ours.
"""
import argparse
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data  # noqa: E402
import rft  # noqa: E402
import runtime  # noqa: E402
from model import QwenVL  # noqa: E402
from processor import Processor  # noqa: E402

TARGET = "mean IoU"                                  # the variant whose gradient is u
WEIGHTINGS = ("consistency", "mean", "variance")


# ---------------------------------------------------------------- the gradients of a batch

def variants(terms: dict[str, Tensor], args: argparse.Namespace) -> dict[str, Tensor]:
    """What the same rollouts would teach under each reward and weighting.

    terms (Q, G) each, as rft.grade returns them -> name -> advantages times the weight of
    their group, (Q, G).
    """
    total = terms["reward"]
    divide_by_std = not args.no_std
    rewards = {"total": total}
    for name, weight in args.reward.items():
        rewards[f"total without {name}"] = total - weight * terms[name]
        rewards[f"{name} alone"] = terms[name]
    rewards["total, dealt at random"] = dealt_at_random(total, args.seed)
    advantages = {TARGET: rft.advantages(terms["iou"], False)}
    for name, reward in rewards.items():
        advantages[name] = rft.advantages(reward, divide_by_std)
    for weighting in WEIGHTINGS:
        weighted_args = argparse.Namespace(**vars(args) | {"weighting": weighting})
        weights = rft.group_weights(terms["iou"], weighted_args, 0)    # (Q,)
        advantages[f"total, weighted by {weighting}"] = advantages["total"] * weights[:, None]
    return advantages


def dealt_at_random(rewards: Tensor, seed: int) -> Tensor:
    """(Q, G) -> (Q, G): each group's rewards in a random order, the same at every step."""
    random = torch.Generator().manual_seed(seed)
    order = torch.rand(rewards.shape, generator=random).argsort(1)
    return rewards.gather(1, order)


def gradients(
        model: QwenVL, processor: Processor, records: Sequence[data.Record], seeds: Tensor,
        args: argparse.Namespace,
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """One batch of rollouts on Q records with seeds (Q,).

    Returns name of a variant -> flat gradient (n,) of its policy loss, and name of a term
    of the reward -> its mean.
    """
    prompts = [processor(data.open_image(r), r.text) for r in records]
    completions, _, texts = rft.rollout(model, processor, prompts, args, seeds)
    terms, _ = rft.grade(texts, prompts, records, args)
    lengths = torch.tensor(
        [len(c) for c in itertools.chain.from_iterable(completions)])  # (Q * G,)
    logp, _ = model.score(prompts, completions, args.temperature)      # (tokens,)
    trained = [p for p in model.parameters() if p.requires_grad]
    flat = {}
    for name, advantage in variants(terms, args).items():
        advantage = advantage.flatten().repeat_interleave(lengths)     # (tokens,)
        weight = torch.ones_like(advantage)
        # Every variant starts from the policy that sampled: the ratio is 1, nothing is clipped.
        loss, _ = rft.policy_loss(logp, logp.detach(), None, advantage, weight, len(logp))
        parts = torch.autograd.grad(loss, trained, retain_graph=True, allow_unused=True)
        flat[name] = torch.cat([g.flatten() for g in parts if g is not None])
    return flat, {name: term.mean().item() for name, term in terms.items()}


# ---------------------------------------------------------------- signal and noise

def off_diagonal_mean(products: Tensor) -> Tensor:
    """(B, B) scalar products -> mean of those of different batches, whose noise is independent."""
    n = len(products)
    return (products.sum() - products.diag().sum()) / (n * (n - 1))


def signal_and_progress(gg: Tensor, gu: Tensor, uu: Tensor) -> Tensor:
    """Scalar products (B, B) of the batches' gradients g and u -> (2,)"""
    length = gg.diag().mean()
    signal = off_diagonal_mean(gg) / length
    progress = off_diagonal_mean(gu) / (length * uu.diag().mean()).sqrt()
    return torch.stack((signal, progress))


def estimate(g: Tensor, u: Tensor) -> tuple[tuple[float, float], tuple[float, float]]:
    """Gradients g of a variant and u of the mean IoU, (B, n) each.

    Returns (signal, its standard error), (progress, its standard error). The errors are
    the jackknife's: each batch is left out once.
    """
    products = (g @ g.T, g @ u.T, u @ u.T)                             # (B, B) each
    n = len(g)
    batches = torch.arange(n)
    replicates = []
    for i in range(n):
        rest = batches[batches != i]
        replicates.append(signal_and_progress(*(p[rest][:, rest] for p in products)))
    replicates = torch.stack(replicates)                               # (B, 2)
    squares = (replicates - replicates.mean(0)).square().sum(0)
    errors = (squares * (n - 1) / n).sqrt().tolist()
    signal, progress = signal_and_progress(*products).tolist()
    return (signal, errors[0]), (progress, errors[1])


def as_adam_sees(g: Tensor) -> Tensor:
    """(B, n) -> (B, n), each coordinate divided by its root mean square over the batches."""
    return g / (g.square().mean(0).sqrt() + 1e-12)


def table(gradients: dict[str, Tensor]) -> str:
    """Name of a variant -> its gradients (B, n) -> Markdown."""
    names = ("advantages", "signal", "progress", "signal, as Adam sees it",
             "progress, as Adam sees it")
    text = f"| {' | '.join(names)} |\n|{'---|' * len(names)}\n"
    u = gradients[TARGET]
    for name, g in gradients.items():
        estimates = *estimate(g, u), *estimate(as_adam_sees(g), as_adam_sees(u))
        cells = [f"{value:.3f} ± {error:.3f}" for value, error in estimates]
        text += f"| {name} | {' | '.join(cells)} |\n"
    return text


# ---------------------------------------------------------------- the script

def flags() -> runtime.FlagParser:
    parser = rft.flags()
    parser.description = ("Measures how much of the policy gradient of rft.py, under the same "
                          "flags, is signal")
    parser.add_argument("--batches", type=runtime.positive, default=12,
                        help="of --prompts questions each; three at least")
    return parser


def measure(
        model: QwenVL, processor: Processor, records: Sequence[data.Record],
        args: argparse.Namespace,
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """--batches batches -> name of a variant -> gradients (B, n), and each term's mean."""
    flat = {}     # name of a variant -> one gradient for each batch
    means = {}    # name of a term -> one mean for each batch
    with tqdm(range(args.batches), desc="gradients") as bar:
        for step in bar:
            questions = runtime.batch(records, step, args.prompts, args.seed)
            seeds = torch.arange(args.prompts) + step * args.prompts
            of_batch, of_terms = gradients(model, processor, questions, seeds, args)
            for name, gradient in of_batch.items():
                flat.setdefault(name, []).append(gradient)
            for name, mean in of_terms.items():
                means.setdefault(name, []).append(mean)
            bar.set_postfix_str(" ".join(f"{name} {v:.3f}" for name, v in of_terms.items()))
    return ({name: torch.stack(of_batches) for name, of_batches in flat.items()},
            {name: sum(of_batches) / len(of_batches) for name, of_batches in means.items()})


def main() -> None:
    args = flags().parse_args()
    rft.check(args)
    if args.batches < 3:
        runtime.fail(f"--batches {args.batches} has no pairs left once one is left out; "
                     "use 3 or more")
    records = data.load(args.data, args.root, "rft")
    init = Path(args.init)
    model, processor = runtime.open_checkpoint(init, max_pixels=args.max_pixels)
    model = runtime.prepare(model, runtime.start(args.device), args.freeze_vision)
    measured, means = measure(model, processor, records, args)
    if not measured["total"].any():
        runtime.fail(f"{init}: all answers of a group were rewarded alike, so there is no "
                     "gradient; train it longer first")
    terms = ", ".join(f"{name} {mean:.3f}" for name, mean in means.items())
    print(f"{init}, {args.data}, T={args.temperature:g}, {args.batches} batches of "
          f"{args.prompts} x {args.group} rollouts: {terms}\n")
    print(table(measured))


if __name__ == "__main__":
    runtime.main(main)
