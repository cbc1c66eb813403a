"""Attention over packed tokens: which tokens attend to which, the sampling cache, the kernels.

Packed means that the sequences of a batch follow each other without padding in one tensor
(N, ...). A group is a prompt and G completions of it. The prompt is in the pack once; each
completion attends to it and to itself. Here a prompt p has 3 tokens, its completions a and b have
2 each, and `x` means that a query attends to a key:

                        keys
    row              0   1   2 | 3   4 | 5   6
          queries    p   p   p | a   a | b   b
     0       p       x         |       |
     1       p       x   x     |       |
     2       p       x   x   x |       |
             -----------------------------------
     3       a       x   x   x | x     |
     4       a       x   x   x | x   x |
             -----------------------------------
     5       b       x   x   x |       | x
     6       b       x   x   x |       | x   x

A mask of all pairs would be N x N. Instead, a `Plan` lists pieces. Each is a plain attention of
some query rows over some key rows: the three triangles on the diagonal, and the rectangle below
the prompt's triangle. Sequences of equal length, here a and b, share a piece.

>>> plan = Plan([3, 2, 2], prefix=[(3, 4)])
>>> for piece in plan.pieces:
...     print(piece)                                        # doctest: +NORMALIZE_WHITESPACE
Piece(query_rows=slice(0, 3, None), key_rows=slice(0, 3, None),
      sequences=1, causal=True, written_before=False)
Piece(query_rows=slice(3, 7, None), key_rows=slice(3, 7, None),
      sequences=2, causal=True, written_before=False)
Piece(query_rows=slice(3, 7, None), key_rows=slice(0, 3, None),
      sequences=1, causal=False, written_before=True)

Rows 3 to 6 are in two pieces. `merge_attended` averages the two outputs, weighted by the pieces'
log-sum-exp, which gives the softmax over both. If queries are 0, all scores are equal, and a
token's output is the mean of the values that it attends to. If values are row numbers, row 6 gets
(0 + 1 + 2 + 5 + 6) / 5:

>>> q = k = torch.zeros(7, 1, 8)
>>> v = torch.arange(7.0)[:, None, None].expand(7, 1, 8).contiguous()
>>> attention(q, k, v, plan)[:, 0, 0]
tensor([0.0000, 0.5000, 1.0000, 1.5000, 2.0000, 2.0000, 2.8000])

Sequences of equal length need not be neighbours. Then the rows are an index, not a slice:

>>> Plan([2, 3, 2]).pieces[0].query_rows
tensor([0, 1, 5, 6])

Shapes: N packed tokens, H query heads, KV key-value heads (H is a multiple of KV), hd head width,
Q prompts, G rollouts of a prompt, R = Q * G rollouts, S sequences of one length, L query rows and
M key rows of each, P tokens of the longest prompt.
Source: merging by log-sum-exp is FlashAttention's (arXiv 2205.14135, section 3.1); the pieces with
a shared prefix are ours.
"""
import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Rows = slice | Tensor             # rows of a packed tensor: a slice, or an index (rows,)
# Arguments of the variable-length kernel: `cumulative` lengths, int32 (sequences + 1,), of queries
# and of keys; the longest of each.
Boundaries = tuple[Tensor, Tensor, int, int]
CPU_BLOCK = 8                     # sampling on a CPU reads this many cached tokens at a time
# Where the variable-length kernel exists; the meta device counts memory with it.
KERNEL_DEVICES = ("cuda", "meta")
KERNEL_DTYPES = (torch.bfloat16, torch.float16)
CPU_KERNEL = True                 # tests turn it off, to run the plain formulas


@dataclass(frozen=True)
class Piece:
    query_rows: Rows
    key_rows: Rows
    sequences: int | Boundaries   # how rows are split; a number means equal parts
    causal: bool                  # each token attends to keys up to its own; else to all
    written_before: bool          # merge: an earlier piece has written these query rows


@dataclass(eq=False)
class Plan:
    """Which tokens attend to which in a pass over packed tokens; the same for all layers."""
    # Tokens of each sequence, in packed order. A completion of a single token has none: its last
    # token is not fed.
    lengths: Sequence[int]
    causal: bool = True           # attend to tokens up to oneself; else to the whole sequence
    # Q pairs (tokens of a prompt, tokens of all its completions), if the first Q sequences are
    # prompts. The others are their completions, in the same order, and also attend to their prompt.
    prefix: Sequence[tuple[int, int]] = ()
    kv_cache: list[tuple[Tensor, Tensor]] | None = None     # every layer appends (N, KV, hd) each
    device: torch.device | str = "cpu"
    starts: Tensor | None = None  # cumulative(lengths), if already on the device

    @functools.cached_property
    def pieces(self) -> list[Piece]:
        """For kernels that take sequences of one length: first all sequences over themselves, which
        writes each row once, then completions over their prompts."""
        starts_by_length: dict[int, list[int]] = {}
        for length, end in zip(self.lengths, itertools.accumulate(self.lengths)):
            if length:
                starts_by_length.setdefault(length, []).append(end - length)
        pieces = []
        for length, starts in starts_by_length.items():
            rows: Rows = slice(starts[0], starts[-1] + length)
            # A slice needs no copy, but may cover rows of other sequences.
            if rows.stop - rows.start != len(starts) * length:
                rows = (torch.tensor(starts)[:, None] + torch.arange(length)).flatten()
            pieces.append(Piece(rows, rows, len(starts), self.causal, written_before=False))
        query = sum(prompt for prompt, _ in self.prefix)
        key = 0
        for prompt, completions in self.prefix:
            if completions:
                rows, keys = slice(query, query + completions), slice(key, key + prompt)
                pieces.append(Piece(rows, keys, 1, False, written_before=True))
            query += completions
            key += prompt
        return pieces

    @functools.cached_property
    def kernel_pieces(self) -> list[Piece]:
        """For the variable-length kernel: at most two pieces, whatever the lengths."""
        starts = self.starts
        if starts is None:
            [starts] = to_device([cumulative([n for n in self.lengths if n])], self.device)
        starts = starts.int()
        longest = max(self.lengths)
        rows = slice(0, sum(self.lengths))
        boundaries = (starts, starts, longest, longest)
        own = Piece(rows, rows, boundaries, self.causal, written_before=False)
        if not any(tokens for _, tokens in self.prefix):
            return [own]
        # All completions of a prompt are one sequence of queries here.
        prompts, completions = zip(*self.prefix)
        starts = to_device([cumulative(completions), cumulative(prompts)], self.device)
        # An upper bound, at least 2: for 1 the kernel would assume that no sequence is empty.
        boundaries = (*(x.int() for x in starts), max(2, *completions), max(prompts))
        P = sum(prompts)
        shared = Piece(slice(P, rows.stop), slice(0, P), boundaries, False, written_before=True)
        return [own, shared]


def cumulative(lengths: Sequence[int]) -> Tensor:
    """Lengths -> (sequences + 1,): the first row of each in the pack, then the end."""
    return torch.tensor([0, *itertools.accumulate(lengths)])


def to_device(numbers: Sequence[Tensor], device: torch.device | str) -> list[Tensor]:
    """One copy for several long tensors, since the host waits for each copy."""
    flat = torch.cat([x.flatten() for x in numbers]).to(device)
    parts = flat.split([x.numel() for x in numbers])
    return [part.view(x.shape) for part, x in zip(parts, numbers)]


def attention(
        q: Tensor, k: Tensor, v: Tensor, plan: "Plan | Cache", layer: int = 0) -> Tensor:
    """q (N, H, hd), k and v (N, KV, hd) -> (N, H, hd).
    With a Plan: packed sequences. With a Cache: one more token of every rollout, in `layer`."""
    if isinstance(plan, Cache):
        return plan.attend(layer, q, k, v)
    if plan.kv_cache is not None:
        plan.kv_cache.append((k, v))
    return PlannedAttention.apply(q, k, v, plan)


class Cache:
    """Keys and values for sampling; those of a prompt are stored once for its whole group.

    prompt_k, prompt_v: per layer (Q, KV, P, hd), shorter prompts padded at the end.
    completion_k, completion_v: per layer (Q, KV, G, room, hd), room for the longest rollout.
    unseen: (Q, 1, 1, P + room), True at padding and at tokens not sampled yet.
    filled: number of cached tokens of each rollout, the same for all.
    place: (1,) filled - 1, on the device: the index of the newest token.

    Attention reads whole blocks of a rollout's tokens and masks the empty places, so shapes
    rarely change. On CUDA a block is the whole room, so one CUDA graph serves all steps. For a 3B
    model and 64 rollouts of 256 tokens, a step then reads at most 0.6 GB more than it needs, next
    to 6 GB of weights; capturing another graph would take as long as a dozen steps."""

    def __init__(self, plan: Plan, group: int, max_tokens: int) -> None:
        """plan: that of the prompts' pass, with starts and a filled kv_cache."""
        kv_cache = plan.kv_cache
        Q, P = len(plan.lengths), max(plan.lengths)
        _, KV, hd = kv_cache[0][0].shape
        device = plan.starts.device

        # Prompts are padded, so that each layer needs one matrix product for all of them.
        lengths = plan.starts.diff()[:, None]                                      # (Q, 1)
        place = torch.arange(P, device=device)
        self.unseen = torch.ones(Q, 1, 1, P + max_tokens, dtype=torch.bool, device=device)
        self.unseen[..., :P] = (place >= lengths)[:, None, None]
        # The packed row of each token of each prompt. Padding is masked, so any finite row
        # will do; it repeats the last token.
        row = plan.starts[:-1, None] + place.clamp(max=lengths - 1)                # (Q, P)
        self.prompt_k = [k[row].transpose(1, 2).contiguous() for k, _ in kv_cache]
        self.prompt_v = [v[row].transpose(1, 2).contiguous() for _, v in kv_cache]

        shape = (Q, KV, group, max_tokens, hd)
        self.completion_k = [k.new_zeros(shape) for k, _ in kv_cache]
        self.completion_v = [v.new_zeros(shape) for _, v in kv_cache]
        self.filled = 0
        self.place = torch.full((1,), -1, device=device)
        self.block = CPU_BLOCK if device.type == "cpu" else max_tokens

    def select(self, questions: Tensor, rollouts: Tensor) -> None:
        """Keeps the questions (Q',) and rollouts (Q' * G',) with these indices."""
        _, KV, G, _, _ = self.completion_k[0].shape
        self.unseen = self.unseen[questions]
        # Indices of (Q', KV, G').
        question = questions[:, None, None]
        head = torch.arange(KV, device=questions.device)[:, None]
        rollout = (rollouts % G).view(len(questions), 1, -1)
        # Layer by layer, so that only one layer is in memory twice.
        for layer in range(len(self.prompt_k)):
            self.prompt_k[layer] = self.prompt_k[layer][questions]
            self.prompt_v[layer] = self.prompt_v[layer][questions]
            self.completion_k[layer] = self.completion_k[layer][question, head, rollout]
            self.completion_v[layer] = self.completion_v[layer][question, head, rollout]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """One new token per rollout: q (R, H, hd), k and v (R, KV, hd) -> (R, H, hd)."""
        Q, KV, G, room, hd = self.completion_k[layer].shape
        P = self.prompt_k[layer].shape[2]
        if layer == 0:                          # one more token of every rollout
            self.filled += 1
            self.place += 1
            self.unseen.index_fill_(3, self.place + P, False)
        blocks = -(-self.filled // self.block)
        T = min(blocks * self.block, room)      # tokens of a rollout that this step reads

        # (R, heads, hd) -> (Q, KV, G, heads / KV, hd)
        q, k, v = (x.view(Q, G, KV, -1, hd).transpose(1, 2) for x in (q * hd ** -0.5, k, v))
        # The new token also attends to itself, so the cache is written first.
        self.completion_k[layer].index_copy_(3, self.place, k)
        self.completion_v[layer].index_copy_(3, self.place, v)
        completion_k = self.completion_k[layer][:, :, :, :T]       # (Q, KV, G, T, hd)
        completion_v = self.completion_v[layer][:, :, :, :T]

        # Scores over the prompt: one matrix product for all rollouts of a question. Scores over its
        # own tokens: one product per rollout. `shared` query heads share a key head.
        q = q.contiguous()                                    # (Q, KV, G, shared, hd)
        prompt_scores = q.flatten(2, 3) @ self.prompt_k[layer].transpose(2, 3)
        own_scores = (q @ completion_k.transpose(3, 4)).flatten(2, 3)

        # One softmax over both: (Q, KV, G * shared, P + T), in float32 inside the kernel.
        scores = torch.cat((prompt_scores, own_scores), -1)
        weights = scores.masked_fill_(self.unseen[..., :P + T], -torch.inf).softmax(-1)

        prompt_out = weights[..., :P] @ self.prompt_v[layer]
        own_out = weights[..., P:].unflatten(2, (G, -1)) @ completion_v
        out = prompt_out.view_as(own_out) + own_out           # (Q, KV, G, shared, hd)
        return out.transpose(1, 2).reshape(Q * G, -1, hd)


class PlannedAttention(torch.autograd.Function):
    """Exact attention by pieces, merged for a token in two pieces: own sequence and prompt.
    In the backward pass each piece's kernel gets the merged output and log-sum-exp. So
    exp(score - lse) is the weight in the softmax over all keys, and gradients of pieces add up."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> Tensor:
        N, H, _ = q.shape
        has_kernel = q.device.type in KERNEL_DEVICES and q.dtype in KERNEL_DTYPES
        ctx.pieces = plan.kernel_pieces if has_kernel else plan.pieces
        out = lse = None                                 # (N, H, hd), (H, N) float32
        for piece in ctx.pieces:
            rows, keys = piece.query_rows, piece.key_rows
            piece_out, piece_lse = attend(q[rows], k[keys], v[keys], piece)
            if piece.written_before:
                merge_attended(out, lse, rows, piece_out, piece_lse)
            elif len(piece_out) == N:
                out, lse = piece_out, piece_lse
            else:
                if out is None:
                    out, lse = torch.empty_like(q), q.new_empty(H, N, dtype=torch.float32)
                out[rows] = piece_out
                lse[:, rows] = piece_lse
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, out, lse = ctx.saved_tensors
        grad = grad.contiguous()
        totals = None
        for piece in ctx.pieces:
            rows, keys = piece.query_rows, piece.key_rows
            shares = attend_backward(
                grad[rows], q[rows], k[keys], v[keys], out[rows], lse[:, rows], piece)
            if len(shares[0]) == len(q):
                totals = shares
            else:
                if totals is None:
                    totals = [torch.zeros_like(x) for x in (q, k, v)]
                for total, its_rows, share in zip(totals, (rows, keys, keys), shares):
                    total[its_rows] += share
        return *totals, None


def merge_attended(
        out: Tensor, lse: Tensor, rows: Rows, more_out: Tensor, more_lse: Tensor) -> None:
    """Merges attention over more keys into these rows of out (N, H, hd), lse (H, N), in place.
    more_out (rows, H, hd), more_lse (H, rows): the same queries over other keys. An output's weight
    is exp(lse - total), its share of the sum of exponentials."""
    row_lse = lse[:, rows]
    total = torch.logaddexp(row_lse, more_lse)                             # (H, rows)
    share = (row_lse - total).exp().transpose(0, 1)[..., None]             # (rows, H, 1)
    more_share = (more_lse - total).exp().transpose(0, 1)[..., None]
    merged = out[rows] * share + more_out * more_share                     # float32
    # Assigning to a slice converts the dtype; assigning to an index does not.
    out[rows] = merged if isinstance(rows, slice) else merged.to(out.dtype)
    lse[:, rows] = total


def attend(q: Tensor, k: Tensor, v: Tensor, piece: Piece) -> tuple[Tensor, Tensor]:
    """A piece's q (rows, H, hd), k, v (keys, KV, hd) -> out like q, lse (H, rows) float32.
    Uses the variable-length kernel, the CPU's, or plain formulas on other devices."""
    if not isinstance(piece.sequences, int):
        return torch.ops.aten._flash_attention_forward(
            q, k, v, *piece.sequences, 0.0, piece.causal, False)[:2]
    S = piece.sequences
    q, k, v = (x.unflatten(0, (S, -1)).transpose(1, 2) for x in (q, k, v))  # (S, H, L, hd)
    if q.device.type == "cpu" and CPU_KERNEL:
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, lse = kernel(q, k, v, 0.0, piece.causal)
    else:
        scores, _, v_full = plain_scores(q, k, v, piece.causal)
        out = (scores.softmax(-1) @ v_full).to(q.dtype)
        lse = scores.logsumexp(-1)
    return out.transpose(1, 2).flatten(0, 1), lse.transpose(0, 1).flatten(1)


def attend_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
                    piece: Piece) -> Sequence[Tensor]:
    """A piece's share of the gradients of q, k and v.
    grad and out (like q) and lse (H, rows) are of the attention over all keys, not this piece's."""
    if not isinstance(piece.sequences, int):
        no_dropout = torch.empty(2, dtype=torch.uint64, device=q.device)
        return torch.ops.aten._flash_attention_backward(
            grad, q, k, v, out, lse.contiguous(), *piece.sequences, 0.0, piece.causal,
            no_dropout, no_dropout)
    S = piece.sequences
    grad, q, k, v, out = (x.unflatten(0, (S, -1)).transpose(1, 2) for x in (grad, q, k, v, out))
    lse = lse.unflatten(1, (S, -1)).transpose(0, 1)                        # (S, H, L)
    if q.device.type == "cpu" and CPU_KERNEL:
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        shares = kernel(grad, q, k, v, out, lse, 0.0, piece.causal)
    else:
        # arXiv 2205.14135, appendix B.2: the derivative of softmax subtracts the mean of dp under
        # p. Over all keys this mean is the dot product of output and gradient.
        scores, k_full, v_full = plain_scores(q, k, v, piece.causal)
        p = (scores - lse[..., None]).exp()                                # (S, H, L, M)
        dp = grad.float() @ v_full.transpose(2, 3)
        mean_dp = (grad * out).float().sum(-1, keepdim=True)
        ds = p * (dp - mean_dp) * q.shape[-1] ** -0.5
        # Gradients of query heads that share a key head add up.
        KV = k.shape[1]
        dk = (ds.transpose(2, 3) @ q.float()).unflatten(1, (KV, -1)).sum(2)
        dv = (p.transpose(2, 3) @ grad.float()).unflatten(1, (KV, -1)).sum(2)
        shares = [share.to(q.dtype) for share in (ds @ k_full, dk, dv)]
    return [share.transpose(1, 2).flatten(0, 1) for share in shares]


def plain_scores(
        q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor, Tensor]:
    """-> scaled scores (S, H, L, M), -inf if masked; k and v (S, H, M, hd); all float32."""
    shared = q.shape[1] // k.shape[1]             # query heads of one key head
    k, v = (x.float().repeat_interleave(shared, 1) for x in (k, v))
    scores = q.float() @ k.transpose(2, 3) * q.shape[-1] ** -0.5
    if causal:
        ones = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device)
        scores = scores.masked_fill(ones.triu(1), -torch.inf)
    return scores, k, v
