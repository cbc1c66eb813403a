"""Sampling: each prompt and its image prefilled once, then G rollouts of it decoded
token by token over the shared prefix.

A rollout depends on its prompt, its seed and its place in the group alone, not on the
batch that it runs in: token k of rollout g draws one number from a counter-based
generator at (seed, g, k) and inverts the distribution function there. (Rounding differs
with the batch; a draw that close to a boundary may fall on the other side.) Temperature
and the ids that can't be sampled are `QwenVL.distribution`'s, here and in scoring.

Shapes: Q prompts, G rollouts of a prompt, R = Q * G rollouts, V vocabulary. Finished
rollouts leave the batch: Q', G' and R' are what is left of them.
"""
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from model import QwenVL
from qwen.attention import Cache, to_device
from qwen.processor import Prompt

# Tokens between looks at who has finished: each look waits for the device.
CHECK_EVERY = 8
# The batch shrinks where at most this share of it would remain. A smaller batch costs a
# copy of the cache; with CUDA graphs a captured graph as well, so it must save more.
SHRINK_TO = 0.75
SHRINK_TO_WITH_GRAPHS = 0.5


class Graph:
    """QwenVL.decode as a CUDA graph: one launch a token instead of a thousand.

    A graph reads and writes fixed memory at fixed shapes: the weights, the cache, the tokens
    that go in. The cache's shapes hold for all steps of a batch, so a graph is captured once
    for each batch size. One is kept at a time: a batch never grows again, the next call has
    another cache, and weights that are gathered once more lie elsewhere."""

    def __init__(self, model: QwenVL, cache: Cache) -> None:
        self.model = model
        self.cache = cache
        self.tokens = torch.empty(0)

    def __call__(self, tokens: Tensor, positions: Tensor) -> Tensor:
        if len(tokens) != len(self.tokens):
            self.capture(tokens, positions)
        self.tokens.copy_(tokens)
        self.positions.copy_(positions)
        self.graph.replay()
        # The graph has counted on the device; the host's count is not a part of it.
        self.cache.filled += 1
        return self.logits

    def capture(self, tokens: Tensor, positions: Tensor) -> None:
        """Records one step without taking it: the cache counts on as if nothing had happened."""
        cache = self.cache
        self.tokens = tokens.clone()
        self.positions = positions.clone()
        # Once outside of the graph, on a stream of its own: libraries allocate what they need.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self.model.decode(self.tokens, self.positions, cache)
        torch.cuda.current_stream().wait_stream(side)
        cache.filled -= 1
        cache.place -= 1
        # Recording runs nothing on the device, but the host counts.
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.logits = self.model.decode(self.tokens, self.positions, cache)
        cache.filled -= 1


@dataclass
class Batch:
    """The rollouts that are being decoded, one a row: (R',), where nothing else is said."""
    slots: Tensor                 # which of all R rollouts it is
    uniforms: Tensor              # (R', max_new_tokens) double: the number that draws each token
    first_positions: Tensor       # position of its first new token
    done: Tensor                  # bool: it has sampled a stop token
    tokens: Tensor                # the token that it sampled last

    def select(self, rows: Tensor) -> None:
        """Goes on with these rows alone."""
        for each in fields(self):
            setattr(self, each.name, getattr(self, each.name)[rows])


@dataclass
class Results:
    """What all R rollouts have sampled; 0 behind a rollout's end."""
    tokens: Tensor                # (R, max_new_tokens) long
    logprobs: Tensor              # (R, max_new_tokens) float32
    lengths: Tensor               # (R,) long

    def record(self, k: int, batch: Batch, logp: Tensor) -> None:
        """Takes down token k of the rollouts that go on; logp (R', V)."""
        # A finished rollout may stay in the batch as a filler: what it samples counts for
        # nothing. `done` is that before token k, so that a stop token itself is taken down.
        live = ~batch.done
        self.tokens[batch.slots, k] = batch.tokens * live
        self.logprobs[batch.slots, k] = logp.gather(-1, batch.tokens[:, None])[:, 0] * live
        self.lengths[batch.slots] += live

    def by_group(self, group: int) -> tuple[Tensor, Tensor, Tensor]:
        """tokens (Q, G, L), logprobs (Q, G, L), lengths (Q, G), L the longest rollout."""
        L = int(self.lengths.max())
        tokens = self.tokens[:, :L].view(-1, group, L)
        logprobs = self.logprobs[:, :L].view(-1, group, L)
        return tokens, logprobs, self.lengths.view(-1, group)


@torch.no_grad()
def generate(
        model: QwenVL, prompts: Sequence[Prompt], group: int, max_new_tokens: int,
        temperature: float, seeds: Tensor,
        cuda_graphs: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """prompts: Q of Prompt, group: rollouts G of each, temperature 0 is greedy, seeds (Q,) long
    -> tokens (Q, G, L) long, logprobs (Q, G, L) float32, lengths (Q, G); L is the
    longest rollout, and what lies behind a length is 0.

    A rollout ends with a stop token, which is part of it, or at max_new_tokens.
    Log-probabilities are those at the sampling temperature (at 1 where greedy)."""
    logits, cache, first_positions = model.prefill(prompts, group, max_new_tokens)
    # The first token's distribution is the prompt's; each of its rollouts draws from it.
    logits = logits.repeat_interleave(group, 0)                            # (R, V)
    # None may be: an empty tensor would else be of floats.
    stop_ids = torch.tensor(model.stop_ids, dtype=torch.long)
    seeds, stop_ids = to_device((seeds, stop_ids), model.device)
    batch = start_batch(first_positions, seeds, group, max_new_tokens)
    results = start_results(len(batch.slots), max_new_tokens, model.device)
    decode = decoder(model, cache, cuda_graphs)
    shrink_to = SHRINK_TO_WITH_GRAPHS if cuda_graphs else SHRINK_TO
    for k in range(max_new_tokens):
        logp = model.distribution(logits, temperature or 1.0)              # (R', V)
        if temperature:
            batch.tokens = draw(logp, batch.uniforms[:, k])
        else:
            batch.tokens = logp.argmax(-1)
        results.record(k, batch, logp)
        batch.done = batch.done | torch.isin(batch.tokens, stop_ids)
        # The last token is not fed: nothing follows it.
        if k + 1 == max_new_tokens:
            break
        if (k + 1) % CHECK_EVERY == 0:
            rows = unfinished(batch.done.view(len(cache.unseen), -1), shrink_to)
            if rows is not None:
                if not rows.numel():
                    break
                shrink(batch, cache, rows)
        logits = decode(batch.tokens, batch.first_positions + k)
    return results.by_group(group)


def start_batch(
        first_positions: Tensor, seeds: Tensor, group: int, max_new_tokens: int) -> Batch:
    """All R rollouts, before their first token; first_positions and seeds are (Q,)."""
    device = first_positions.device
    slots = torch.arange(len(first_positions) * group, device=device)
    seeds = seeds.repeat_interleave(group)
    # Drawn at once: token by token it would be thirty kernels for each.
    steps = torch.arange(max_new_tokens, device=device)
    return Batch(
        slots=slots,
        uniforms=uniform(seeds[:, None], (slots % group)[:, None], steps),
        first_positions=first_positions.repeat_interleave(group),
        done=torch.zeros(len(slots), dtype=torch.bool, device=device),
        tokens=torch.zeros_like(slots))


def start_results(rollouts: int, max_new_tokens: int, device: torch.device) -> Results:
    return Results(
        tokens=torch.zeros(rollouts, max_new_tokens, dtype=torch.long, device=device),
        logprobs=torch.zeros(rollouts, max_new_tokens, device=device),
        lengths=torch.zeros(rollouts, dtype=torch.long, device=device))


def decoder(
        model: QwenVL, cache: Cache, cuda_graphs: bool) -> Callable[[Tensor, Tensor], Tensor]:
    """A function of tokens (R',) and positions (R',): one step of the model -> logits (R', V)."""
    if cuda_graphs:
        return Graph(model, cache)
    return lambda tokens, positions: model.decode(tokens, positions, cache)


def shrink(batch: Batch, cache: Cache, rows: Tensor) -> None:
    """Goes on with these rows (Q'', G'') of the batch; a line of `rows` is one question's."""
    rows_a_question = len(batch.done) // len(cache.unseen)
    questions = rows[:, 0] // rows_a_question
    cache.select(questions, rows.flatten())
    batch.select(rows.flatten())


def unfinished(done: Tensor, share: float) -> Tensor | None:
    """done (Q', G') -> rows (Q'', G'') of the batch to go on with: None where more than
    this share of them would remain, an empty tensor where all are done.

    Questions that are through are dropped. The others keep as many rows as the one with
    most unfinished rollouts needs, as the batch stays a rectangle: finished ones fill
    it up."""
    going_on = (~done).sum(1)                                              # (Q',)
    # The host waits for the device here, and for both numbers at once.
    counts = torch.stack(((going_on > 0).sum(), going_on.max()))
    question_count, width = counts.tolist()
    if question_count * width > share * done.numel():
        return None
    # False sorts before True, and stable keeps questions and rollouts in order.
    questions = (going_on == 0).long().argsort(stable=True)[:question_count]
    unfinished_first = done[questions].long().argsort(dim=1, stable=True)[:, :width]
    return questions[:, None] * done.shape[1] + unfinished_first


# -------------------------------------------------------------------------- random numbers

def draw(logp: Tensor, u: Tensor) -> Tensor:
    """Inverse of the distribution function: logp (R, V), u (R,) in [0, 1) -> ids (R,).

    An id without probability has no width."""
    cdf = logp.exp().cumsum(-1, dtype=torch.double)
    # Rounding leaves the sum beside 1: u is scaled to it, so that no draw falls behind the end.
    return torch.searchsorted(cdf, (u * cdf[:, -1])[:, None], right=True)[:, 0]


def uniform(seeds: Tensor, places: Tensor, k: Tensor | int) -> Tensor:
    """One number in [0, 1) for each (seed, place in the group, token k): long tensors that
    broadcast -> double.

    SplitMix64's finaliser (Steele, Lea, Flood 2014) over a counter. The factors are odd
    64-bit constants, written as int64; products are modulo 2^64."""
    x = seeds * -7046029254386353131
    for part in (places, torch.zeros_like(places) + k):
        x = mix(x + (part + 1) * -4658895280553007687)
    # 52 bits fill a double's mantissa.
    return shifted(x, 12).double() * 2.0 ** -52


def mix(x: Tensor) -> Tensor:
    x = (x ^ shifted(x, 30)) * -4658895280553007687
    x = (x ^ shifted(x, 27)) * -7723592293110705685
    return x ^ shifted(x, 31)


def shifted(x: Tensor, n: int) -> Tensor:
    """Logical right shift of int64."""
    return (x >> n) & ((1 << (64 - n)) - 1)
