"""Sampling: each prompt and its image prefilled once, then G rollouts decoded token by token.

A rollout does not depend on its batch: token k of rollout g is drawn by inverting the
distribution function at a random number that a counter-based generator gives for (seed, g, k).
(Rounding depends on the batch, and can change a draw that is very close to a boundary.)

Shapes: Q prompts, G rollouts of a prompt, R = Q * G rollouts, V vocabulary; Q', G' and R' after
finished rollouts have left the batch.
"""
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model import QwenVL
from qwen.attention import Cache, to_device
from qwen.processor import Prompt

# Tokens between checks for finished rollouts; at each check the host waits for the device.
CHECK_EVERY = 8
# The batch shrinks if at most this share of it would remain. Shrinking copies the cache. With CUDA
# graphs it also needs another capture, so the share is lower.
SHRINK_TO = 0.75
SHRINK_TO_WITH_GRAPHS = 0.5


@torch.no_grad()
def generate(model: QwenVL, prompts: Sequence[Prompt], group: int, max_new_tokens: int,
             temperature: float, seeds: Tensor,
             cuda_graphs: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Q prompts, G rollouts of each (group), temperature (0 is greedy), seeds (Q,) long
    -> tokens (Q, G, L) long, logprobs (Q, G, L) float32, lengths (Q, G) long.
    L is the longest rollout; shorter ones are padded with 0. A rollout includes its stop token.
    Log-probabilities are those at the sampling temperature (at 1 if greedy)."""
    logits, cache, positions = model.prefill(prompts, group, max_new_tokens)
    device = model.device
    # The dtype is given because there may be no stop ids, and an empty tensor is float.
    stop_ids = torch.tensor(model.stop_ids, dtype=torch.long)
    seeds, stop_ids = to_device((seeds, stop_ids), device)

    # One row per rollout; `slots` numbers them among all R. A prompt's logits predict the first
    # token of each of its rollouts.
    logits = logits.repeat_interleave(group, 0)                            # (R, V)
    positions = positions.repeat_interleave(group)         # of each rollout's first new token
    R = len(positions)
    slots = torch.arange(R, device=device)
    done = torch.zeros(R, dtype=torch.bool, device=device)
    # Draw all random numbers at once: to draw them for one token would launch thirty kernels.
    steps = torch.arange(max_new_tokens, device=device)
    uniforms = uniform(seeds.repeat_interleave(group)[:, None], (slots % group)[:, None], steps)

    all_tokens = torch.zeros(R, max_new_tokens, dtype=torch.long, device=device)
    all_logprobs = torch.zeros(R, max_new_tokens, device=device)
    lengths = torch.zeros(R, dtype=torch.long, device=device)
    decode = Graph(model) if cuda_graphs else model.decode
    shrink_to = SHRINK_TO_WITH_GRAPHS if cuda_graphs else SHRINK_TO
    for k in range(max_new_tokens):
        logp = model.distribution(logits, temperature or 1.0)              # (R', V)
        tokens = draw(logp, uniforms[:, k]) if temperature else logp.argmax(-1)
        # A finished rollout may stay in the batch; its samples are ignored.
        live = ~done
        all_tokens[slots, k] = tokens * live
        all_logprobs[slots, k] = logp.gather(-1, tokens[:, None])[:, 0] * live
        lengths[slots] += live
        done = done | torch.isin(tokens, stop_ids)
        if k + 1 == max_new_tokens:
            break
        if (k + 1) % CHECK_EVERY == 0:
            questions = len(cache.unseen)
            rows = unfinished(done.view(questions, -1), shrink_to)         # (Q', G')
            if rows is not None:
                if not rows.numel():
                    break
                kept_questions = rows[:, 0] // (len(done) // questions)
                rows = rows.flatten()
                cache.select(kept_questions, rows)
                tokens, positions, slots, done, uniforms = (
                    x[rows] for x in (tokens, positions, slots, done, uniforms))
        logits = decode(tokens, positions + k, cache)
    L = int(lengths.max())
    return (all_tokens[:, :L].view(-1, group, L), all_logprobs[:, :L].view(-1, group, L),
            lengths.view(-1, group))


def unfinished(done: Tensor, share: float) -> Tensor | None:
    """done (Q', G') bool -> rows (Q'', G'') of the batch to keep; empty if all are done, None if
    more than this share of them would remain.
    The batch stays a rectangle: finished questions are dropped, and each other question keeps as
    many rows as the question with the most unfinished rollouts."""
    live = (~done).sum(1)                                                  # (Q',)
    # Both numbers in one copy, because the host waits for each copy.
    question_count, width = torch.stack(((live > 0).sum(), live.max())).tolist()
    if question_count * width > share * done.numel():
        return None
    # False sorts before True.
    questions = (live == 0).long().argsort(stable=True)[:question_count]
    unfinished_first = done[questions].long().argsort(dim=1, stable=True)[:, :width]
    return questions[:, None] * done.shape[1] + unfinished_first


@dataclass
class Graph:
    """QwenVL.decode as a CUDA graph: one launch per token instead of a thousand.
    A graph works on fixed memory of fixed shapes: weights, cache, input tokens. The cache's shapes
    stay the same for all steps, so each batch size needs one capture. Only the latest graph is
    kept: batches never grow, and the next call has another cache."""
    model: QwenVL
    tokens: Tensor | None = None  # the captured step's input

    def __call__(self, tokens: Tensor, positions: Tensor, cache: Cache) -> Tensor:
        if self.tokens is None or len(tokens) != len(self.tokens):
            self.tokens = tokens.clone()
            self.positions = positions.clone()
            # Warm up on a separate stream, so that libraries allocate memory; then reset counts.
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                self.model.decode(self.tokens, self.positions, cache)
            torch.cuda.current_stream().wait_stream(side)
            cache.filled -= 1
            cache.place -= 1
            # Recording changes only the count on the host; a replay, only the one on the device.
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.logits = self.model.decode(self.tokens, self.positions, cache)
            cache.filled -= 1
        self.tokens.copy_(tokens)
        self.positions.copy_(positions)
        self.graph.replay()
        cache.filled += 1
        return self.logits


def draw(logp: Tensor, u: Tensor) -> Tensor:
    """Inverse of the distribution function: logp (R, V), u (R,) in [0, 1) -> ids (R,).
    An id of probability 0 is never drawn."""
    cdf = logp.exp().cumsum(-1, dtype=torch.double)
    # Rounding makes the sum differ from 1, so u is scaled to it.
    return torch.searchsorted(cdf, (u * cdf[:, -1])[:, None], right=True)[:, 0]


def uniform(seeds: Tensor, places: Tensor, k: Tensor | int) -> Tensor:
    """One double in [0, 1) for each (seed, place in the group, token k); broadcasts.
    SplitMix64's finaliser (Steele, Lea, Flood 2014) over a counter, with its 64-bit constants
    written as int64; products are modulo 2^64, and the masks make shifts logical."""
    x = seeds * -7046029254386353131
    for part in (places, torch.zeros_like(places) + k):
        x = x + (part + 1) * -4658895280553007687
        for n, factor in ((30, -4658895280553007687), (27, -7723592293110705685), (31, 1)):
            x = (x ^ (x >> n & (1 << 64 - n) - 1)) * factor
    # 52 bits fill a double's mantissa.
    return (x >> 12 & (1 << 52) - 1).double() * 2.0 ** -52
