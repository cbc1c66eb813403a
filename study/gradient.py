"""How much of a policy gradient is signal, under each term of the reward and each weighting, before any training.

A step's gradient g is the true one plus the noise of its few rollouts. From several batches of fresh questions, none of which trains:

    signal    |E g|^2 / E |g|^2: the share of a step's squared length that is not noise
    progress  <E g, E u> / sqrt(E |g|^2 E |u|^2), u the gradient of the mean IoU: how far one batch's step agrees with what raises the IoU
              on others; where g is u, it is the signal

Both are estimated from pairs of different batches, whose noise is independent, so they are unbiased but for the ratio and may come out
below 0. The standard errors are jackknifed over batches: a dozen tell a half-trained model from a trained one, small differences need
hundreds. "as Adam sees it" divides each coordinate by its root mean square over these very batches first, which biases it upwards; the row
"dealt at random", whose rewards are permuted within their groups and so teach nothing, shows by how much.

    python study/gradient.py --data synth --init ckpt/sft --temperature 0.6 --freeze-vision           flags as of rft.py, and --batches

Rewards and weightings are all tried on the same rollouts, their advantages divided by std unless --no-std; those of u never are. What
concerns training alone (--lr, --out, --weighting) has no effect here. Every gradient is kept whole in memory: for small models.
"""
import argparse
import sys
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data  # noqa: E402
import rft  # noqa: E402
import runtime  # noqa: E402

TARGET = "mean IoU"


def variants(terms, args):
    """What the same rollouts would teach under each reward and weighting: name -> advantages times the weight of their group, (Q, G).
    terms: as rft.grade returns them."""
    total, std = terms["reward"], not args.no_std
    dealt = torch.rand(total.shape, generator=torch.Generator().manual_seed(args.seed)).argsort(1)
    rewards = {"total": total}
    for name, weight in args.reward.items():
        rewards[f"total without {name}"] = total - weight * terms[name]
        rewards[f"{name} alone"] = terms[name]
    rewards["total, dealt at random"] = total.gather(1, dealt)
    found = {TARGET: rft.advantages(terms["iou"], False)}
    for name, value in rewards.items():
        found[name] = rft.advantages(value, std)
    for weighting in ("consistency", "mean", "variance"):
        weight = rft.group_weights(terms["iou"], argparse.Namespace(**vars(args) | {"weighting": weighting}), 0)
        found[f"total, weighted by {weighting}"] = rft.advantages(total, std) * weight[:, None]
    return found


def gradients(model, processor, questions, seeds, args):
    """One batch of rollouts -> name -> flat gradient of the policy loss, and the mean of each term of the reward."""
    prompts = [processor(data.open_image(r), r.text) for r in questions]
    completions, _, texts = rft.rollout(model, processor, prompts, args, seeds)
    terms, _ = rft.grade(texts, prompts, questions, args)
    lengths = torch.tensor([len(c) for group in completions for c in group])
    logp, _ = model.score(prompts, completions, args.temperature)
    trained, found = [p for p in model.parameters() if p.requires_grad], {}
    for name, advantage in variants(terms, args).items():
        of_tokens = advantage.flatten().repeat_interleave(lengths)
        loss, _ = rft.policy_loss(logp, logp.detach(), None, of_tokens, torch.ones_like(of_tokens), len(logp))
        parts = torch.autograd.grad(loss, trained, retain_graph=True, allow_unused=True)
        found[name] = torch.cat([g.flatten() for g in parts if g is not None])
    return found, {name: term.mean().item() for name, term in terms.items()}


def off_diagonal_mean(gram):
    """Mean of a square matrix off its diagonal: the scalar product of different batches."""
    n = len(gram)
    return (gram.sum() - gram.diag().sum()) / (n * (n - 1))


def estimate(g, u):
    """Gradients g of a variant and u of the mean IoU, (B, n) each -> (signal, its standard error), (progress, its standard error)."""
    grams = [a @ b.T for a, b in ((g, g), (g, u), (u, u))]

    def both(keep):
        gg, gu, uu = (m[keep][:, keep] for m in grams)
        length = gg.diag().mean()
        return torch.stack((off_diagonal_mean(gg) / length, off_diagonal_mean(gu) / (length * uu.diag().mean()).sqrt()))
    every, n = torch.arange(len(g)), len(g)
    left_out = torch.stack([both(every[every != i]) for i in every])
    error = ((left_out - left_out.mean(0)).square().sum(0) * (n - 1) / n).sqrt()
    return tuple(zip(both(every).tolist(), error.tolist()))


def table(found):
    """name -> gradients (B, n) -> Markdown"""
    def as_adam(g):
        return g / (g.square().mean(0).sqrt() + 1e-12)
    text = "| advantages | signal | progress | signal, as Adam sees it | progress, as Adam sees it |\n|---|---|---|---|---|\n"
    for name, g in found.items():
        pairs = *estimate(g, found[TARGET]), *estimate(as_adam(g), as_adam(found[TARGET]))
        text += f"| {name} | " + " | ".join(f"{value:.3f} ± {error:.3f}" for value, error in pairs) + " |\n"
    return text


def main():
    parser = rft.flags()
    parser.description = "Measures how much of the policy gradient of rft.py, under the same flags, is signal"
    parser.add_argument("--batches", type=runtime.positive, default=12, help="of --prompts questions each; three at least")
    args = parser.parse_args()
    rft.check(args)
    if args.batches < 3:
        runtime.fail(f"--batches {args.batches} has no pairs left once one is left out; use 3 or more")
    records, init = data.load(args.data, args.root, "rft"), Path(args.init)
    model, processor = runtime.open_checkpoint(init, max_pixels=args.max_pixels)
    model = runtime.prepare(model, runtime.start(args.device), args.freeze_vision)
    found, means = {}, []
    with tqdm(range(args.batches), desc="gradients") as bar:
        for step in bar:
            questions = runtime.batch(records, step, args.prompts, args.seed)
            one, mean = gradients(model, processor, questions, torch.arange(args.prompts) + step * args.prompts, args)
            means.append(mean)
            for name, g in one.items():
                found.setdefault(name, []).append(g)
            bar.set_postfix_str(" ".join(f"{k} {v:.3f}" for k, v in mean.items()))
    if not any(g.any() for g in found["total"]):
        runtime.fail(f"{init}: all answers of a group were rewarded alike, so there is no gradient; train it longer first")
    print(f"{init}, {args.data}, T={args.temperature:g}, {args.batches} batches of {args.prompts} x {args.group} rollouts: "
          + ", ".join(f"{k} {sum(m[k] for m in means) / len(means):.3f}" for k in means[0]) + "\n")
    print(table({name: torch.stack(g) for name, g in found.items()}))


if __name__ == "__main__":
    runtime.main(main)
