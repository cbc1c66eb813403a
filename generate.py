"""Sampling: each prompt and its image prefilled once, then G rollouts of it decoded token by token over a shared prefix.

A rollout depends on its prompt, its seed and its place in the group alone, not on the batch it runs in: token k of rollout g draws one
number from a counter-based generator at (seed, g, k) and inverts the distribution function there. (Rounding differs with the batch; a draw
that close to a boundary may fall on the other side.) Temperature and the ids that can't be sampled are `QwenVL.distribution`'s, here and in
scoring.
"""
import torch

CHECK_EVERY = 8                   # tokens between looks at who has finished: each look waits for the device


class Graph:
    """QwenVL.decode as a CUDA graph: one launch a token instead of hundreds. Captured anew when the batch or the cache's bucket changes."""

    def __init__(self, model, cache):
        self.model, self.cache, self.shape = model, cache, None

    def __call__(self, token, position):
        if self.shape != (len(token), self.cache.bucket):
            self.capture(token, position)
        self.token.copy_(token)
        self.position.copy_(position)
        self.graph.replay()
        self.cache.filled += 1
        return self.logits

    def capture(self, token, position):
        cache, self.shape = self.cache, (len(token), self.cache.bucket)
        self.token, self.position, filled = token.clone(), position.clone(), cache.filled
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):                                    # once outside: libraries allocate what they need
            self.model.decode(self.token, self.position, cache)
        torch.cuda.current_stream().wait_stream(side)
        cache.filled = filled
        cache.at.fill_(filled)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):                               # recorded, not run; but the count on the host goes up
            self.logits = self.model.decode(self.token, self.position, cache)
        cache.filled = filled


@torch.no_grad()
def generate(model, prompts, group, max_new_tokens, temperature, seeds, cuda_graphs=False):
    """prompts: Q of Prompt, group: rollouts G of each, temperature 0 is greedy, seeds (Q,) long
    -> tokens (Q, G, L) long, logprobs (Q, G, L) float32, lengths (Q, G); L is the longest rollout, what lies behind a length is 0.

    A rollout ends with a stop token, which is part of it, or at max_new_tokens. Log-probabilities are those at the sampling temperature
    (at 1 where greedy)."""
    Q, R, dev = len(prompts), len(prompts) * group, model.device
    logits, cache, position = model.prefill(prompts, group, max_new_tokens)
    logits, position = logits.repeat_interleave(group, 0), position.repeat_interleave(group)
    decode = Graph(model, cache) if cuda_graphs else lambda token, position: model.decode(token, position, cache)
    slots = torch.arange(R, device=dev)                                  # which rollout a row of the batch is
    seed, place = seeds.to(dev).repeat_interleave(group), slots % group
    done, stop = torch.zeros(R, dtype=torch.bool, device=dev), torch.tensor(model.stop_ids, device=dev)
    tokens = torch.zeros(R, max_new_tokens, dtype=torch.long, device=dev)
    logprobs, lengths = torch.zeros(R, max_new_tokens, device=dev), torch.zeros(R, dtype=torch.long, device=dev)
    for k in range(max_new_tokens):
        logp = model.distribution(logits, temperature or 1.0)
        token = draw(logp, uniform(seed, place, k)) if temperature else logp.argmax(-1)
        live = ~done
        tokens[slots, k] = token * live
        logprobs[slots, k] = logp.gather(-1, token[:, None])[:, 0] * live
        lengths[slots] += live
        done = done | torch.isin(token, stop)
        if (k + 1) % CHECK_EVERY == 0:
            rows = unfinished(done.view(len(cache.blocked), -1), 0.5 if cuda_graphs else 0.75)
            if rows is not None:
                if not rows.numel():
                    break
                questions = rows[:, 0] // (len(done) // len(cache.blocked))
                cache.keep(questions, rows.flatten())
                slots, seed, place, done, token, position = (x[rows.flatten()] for x in (slots, seed, place, done, token, position))
        if k + 1 < max_new_tokens:
            logits = decode(token, position + k)
    longest = int(lengths.max())
    return tokens[:, :longest].view(Q, group, -1), logprobs[:, :longest].view(Q, group, -1), lengths.view(Q, group)


def unfinished(done, worth):
    """done (Q', G') -> rows (Q'', G'') of the batch to go on with, or None where more than the share `worth` of them would remain.

    Questions that are through are dropped, the others keep as many rows as the one with most unfinished rollouts needs."""
    questions = (~done).any(1).nonzero()[:, 0]
    width = int((~done).sum(1).max())
    if len(questions) * width > worth * done.numel():
        return None
    unfinished_first = done[questions].long().argsort(dim=1, stable=True)[:, :width]
    return questions[:, None] * done.shape[1] + unfinished_first


def draw(logp, u):
    """Inverse of the distribution function: logp (R, V), u (R,) in [0, 1) -> ids (R,). An id without probability has no width."""
    cdf = logp.exp().cumsum(-1, dtype=torch.double)
    return torch.searchsorted(cdf, (u * cdf[:, -1])[:, None], right=True)[:, 0]


def uniform(seed, place, k):
    """One number in [0, 1) for each (seed, place in the group, token): SplitMix64's finaliser over a counter; (R,) long -> (R,) double."""
    x = seed * -7046029254386353131                                      # odd constants, modulo 2^64
    for part in (place, torch.full_like(place, k)):
        x = mix(x + (part + 1) * -4658895280553007687)
    return shifted(x, 12).double() * 2.0 ** -52


def mix(x):
    x = (x ^ shifted(x, 30)) * -4658895280553007687
    x = (x ^ shifted(x, 27)) * -7723592293110705685
    return x ^ shifted(x, 31)


def shifted(x, n):
    """Logical right shift of int64."""
    return (x >> n) & ((1 << (64 - n)) - 1)
