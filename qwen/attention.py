"""Attention over packed tokens: what may see what, the cache for sampling, the kernels.

Packed means that the sequences of a batch follow each other without padding in one tensor
(N, ...). A group is one prompt and G completions of it. The prompt is in the pack once, every
completion sees it, and no completion sees another. `x` marks who sees whom in a pack of a prompt
p of 3 tokens and two completions a and b of 2 tokens each:

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

A mask of all pairs would be N x N. A `Plan` cuts what is seen into pieces instead, each a plain
attention of some query rows over some key rows: the three triangles on the diagonal, and the
rectangle below the prompt's triangle. Sequences of equal length make one piece, here a and b.

>>> plan = Plan([3, 2, 2], prefix=[(3, 4)])
>>> for piece in plan.pieces:
...     print(piece)                                        # doctest: +NORMALIZE_WHITESPACE
Piece(query_rows=slice(0, 3, None), key_rows=slice(0, 3, None),
      sequences=1, causal=True, written_before=False)
Piece(query_rows=slice(3, 7, None), key_rows=slice(3, 7, None),
      sequences=2, causal=True, written_before=False)
Piece(query_rows=slice(3, 7, None), key_rows=slice(0, 3, None),
      sequences=1, causal=False, written_before=True)

Rows 3 to 6 are in two pieces. `merge_attended` joins their two outputs, with weights that follow
from the pieces' log-sum-exp; the result is the softmax over both. If all queries are 0, all scores
are equal, and a token's output is the mean of the values it sees. With the row number as value,
row 6 gets (0 + 1 + 2 + 5 + 6) / 5:

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
Source: merging by log-sum-exp is FlashAttention's (arXiv 2205.14135, section 3.1); the shared
prefix and its pieces are ours.
"""
import functools
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Rows = slice | Tensor             # rows of a packed tensor: a slice, or an index (rows,)
# Sequences of unequal length, as the variable-length kernel takes them: the first row of
# each and the end, int32 (sequences + 1,), of queries and of keys; the longest of each.
Boundaries = tuple[Tensor, Tensor, int, int]
# On a CPU, sampling reads a rollout's cached tokens in blocks of this size.
CPU_BLOCK = 8
# Where the variable-length kernel exists; on the meta device as shapes, to count memory.
KERNEL_DEVICES = ("cuda", "meta")
KERNEL_DTYPES = (torch.bfloat16, torch.float16)
CPU_KERNEL = True                 # tests turn it off to run the formulas spelled out


# ---------------------------------------------------------------- what may see what

@dataclass(frozen=True)
class Piece:
    """One plain attention; a pass consists of several."""

    query_rows: Rows
    key_rows: Rows
    sequences: int | Boundaries   # that the rows are cut into; a number if of equal length
    causal: bool                  # a token sees its sequence up to itself, else all of it
    written_before: bool          # an earlier piece has written these query rows: merge


class Plan:
    """What may see what in one pass over packed tokens: made once, used by every layer.

    lengths:  tokens of each sequence, in packed order; a token sees its own sequence,
              up to itself if `causal`.
    prefix:   Q pairs (tokens of a prompt, tokens of all its completions). The first Q
              sequences are the prompts; all completions follow, in the same order. A
              completion's token sees its whole prompt as well.
    kv_cache: a list, to which every layer appends its keys and values, each (N, KV, hd).
    starts:   cumulative(lengths), if it is on the device already.
    """

    def __init__(
            self, lengths: Iterable[int], causal: bool = True,
            prefix: Iterable[tuple[int, int]] = (),
            kv_cache: list[tuple[Tensor, Tensor]] | None = None,
            device: torch.device | str = "cpu", starts: Tensor | None = None) -> None:
        # A completion's last token is not fed, so one of a single token is no sequence here.
        self.lengths = [n for n in lengths if n]
        self.causal = causal
        self.prefix = list(prefix)
        self.kv_cache = kv_cache
        self.device = device
        self.starts = starts

    @functools.cached_property
    def pieces(self) -> list[Piece]:
        """For kernels that take sequences of one length.

        The first pieces show each token its own sequence and write every row once; the
        others show the completions their prompts.
        """
        starts_by_length: dict[int, list[int]] = {}
        for length, end in zip(self.lengths, itertools.accumulate(self.lengths)):
            starts_by_length.setdefault(length, []).append(end - length)
        pieces = []
        for length, starts in starts_by_length.items():
            rows: Rows = slice(starts[0], starts[-1] + length)
            # A slice is a view and an index copies, but a slice covers all rows between.
            if rows.stop - rows.start != len(starts) * length:
                rows = (torch.tensor(starts)[:, None] + torch.arange(length)).flatten()
            pieces.append(Piece(rows, rows, len(starts), self.causal, written_before=False))
        # A prompt's completions are neighbours, so their rows are always slices.
        query = sum(prompt for prompt, _ in self.prefix)
        key = 0
        for prompt, completions in self.prefix:
            if completions:
                query_rows = slice(query, query + completions)
                key_rows = slice(key, key + prompt)
                pieces.append(Piece(query_rows, key_rows, 1, False, written_before=True))
            query += completions
            key += prompt
        return pieces

    @functools.cached_property
    def kernel_pieces(self) -> list[Piece]:
        """For the variable-length kernel: two pieces at most, for any lengths."""
        starts = self.starts
        if starts is None:
            [starts] = to_device([cumulative(self.lengths)], self.device)
        starts = starts.int()
        longest = max(self.lengths)
        rows = slice(0, sum(self.lengths))
        boundaries = (starts, starts, longest, longest)
        own = Piece(rows, rows, boundaries, self.causal, written_before=False)
        prompts = [prompt for prompt, _ in self.prefix]
        completions = [tokens for _, tokens in self.prefix]
        if not any(completions):
            return [own]
        # All completions of a prompt are one sequence here, and see all of the prompt.
        starts = to_device([cumulative(completions), cumulative(prompts)], self.device)
        # For a longest query of 1 the kernel assumes one row per sequence, but a prompt may
        # have none. The number is an upper bound, so 2 is correct.
        query_starts, key_starts = (x.int() for x in starts)
        boundaries = (query_starts, key_starts, max([2, *completions]), max(prompts))
        P = sum(prompts)
        shared = Piece(slice(P, rows.stop), slice(0, P), boundaries, False, written_before=True)
        return [own, shared]


def cumulative(lengths: Sequence[int]) -> Tensor:
    """(sequences,) lengths -> (sequences + 1,): first row of each in the pack, then the end."""
    return torch.tensor([0, *itertools.accumulate(lengths)])


def to_device(numbers: Sequence[Tensor], device: torch.device | str) -> list[Tensor]:
    """Several long tensors to the device by one copy: the host waits at each copy."""
    flat = torch.cat([x.flatten() for x in numbers]).to(device)
    parts = flat.split([x.numel() for x in numbers])
    return [part.view(x.shape) for part, x in zip(parts, numbers)]


def attention(
        q: Tensor, k: Tensor, v: Tensor, plan: "Plan | Cache", layer: int = 0) -> Tensor:
    """q (N, H, hd), k and v (N, KV, hd) -> (N, H, hd): softmax over what a token sees.

    A Plan is a pass over packed sequences; a Cache is one more token of every rollout, and
    holds keys and values of all layers, hence `layer`.
    """
    if isinstance(plan, Cache):
        return plan.attend(layer, q, k, v)
    if plan.kv_cache is not None:
        plan.kv_cache.append((k, v))
    return PlannedAttention.apply(q, k, v, plan)


# ---------------------------------------------------------------- the cache for sampling

class Cache:
    """Keys and values for sampling, a prompt's once for its whole group.

    prompt_k, prompt_v: per layer (Q, KV, P, hd), shorter prompts padded at the end.
    completion_k, completion_v: per layer (Q, KV, G, room, hd), room for the longest rollout.
    unseen: (Q, 1, 1, P + room), True at padding and at tokens not sampled yet.
    filled: tokens of each rollout in the cache, the same number for all.
    place: (1,) index of the newest of them, filled - 1, on the device.

    Attention reads whole blocks of a rollout's tokens and masks what is not filled. So
    shapes stay the same for many steps, and what changes at every step is on the device: a
    CUDA graph needs both. On CUDA a block is the whole room, so one graph serves all steps of
    a batch. With 3B's widths, 64 rollouts and room for 256 tokens each, a step reads at most
    0.6 GB more than it must, half of that on average, next to 6 GB of weights; capturing
    again takes as long as a dozen steps.
    """

    def __init__(self, plan: Plan, group: int, max_tokens: int) -> None:
        """plan: of the pass over the packed prompts; it has starts and a filled kv_cache."""
        kv_cache = plan.kv_cache
        Q = len(plan.lengths)
        P = max(plan.lengths)
        _, KV, hd = kv_cache[0][0].shape
        device = kv_cache[0][0].device

        # Padded to one tensor a layer, one matrix product serves all prompts in every step.
        first_rows = plan.starts[:-1, None]                                        # (Q, 1)
        lengths = plan.starts.diff()[:, None]
        place = torch.arange(P, device=device)
        self.unseen = torch.ones(Q, 1, 1, P + max_tokens, dtype=torch.bool, device=device)
        self.unseen[..., :P] = (place >= lengths)[:, None, None]
        # The packed row of each token of each prompt. Padding repeats the prompt's last
        # token: any finite row will do, as it is masked.
        row = first_rows + place.clamp(max=lengths - 1)                            # (Q, P)
        self.prompt_k = [k[row].transpose(1, 2).contiguous() for k, _ in kv_cache]
        self.prompt_v = [v[row].transpose(1, 2).contiguous() for _, v in kv_cache]

        # All memory for the rollouts' own tokens at once, filled step by step.
        shape = (Q, KV, group, max_tokens, hd)
        self.completion_k = [k.new_zeros(shape) for k, _ in kv_cache]
        self.completion_v = [v.new_zeros(shape) for _, v in kv_cache]
        self.filled = 0
        self.place = torch.full((1,), -1, device=device)
        self.block = CPU_BLOCK if device.type == "cpu" else max_tokens

    def admit(self) -> None:
        """Makes room for one more token of every rollout, before the first layer writes it."""
        P = self.prompt_k[0].shape[2]
        self.filled += 1
        self.place += 1
        self.unseen.index_fill_(3, self.place + P, False)

    def select(self, questions: Tensor, rollouts: Tensor) -> None:
        """Keeps these questions (Q',) and rollouts (Q' * G',), indices; drops the rest."""
        _, KV, G, _, _ = self.completion_k[0].shape
        self.unseen = self.unseen[questions]
        # Indices of (Q', KV, G').
        question = questions[:, None, None]
        head = torch.arange(KV, device=questions.device)[:, None]
        rollout = (rollouts % G).view(len(questions), 1, -1)
        # Layer by layer in place, so that only one layer is in memory twice.
        for layer in range(len(self.prompt_k)):
            self.prompt_k[layer] = self.prompt_k[layer][questions]
            self.prompt_v[layer] = self.prompt_v[layer][questions]
            self.completion_k[layer] = self.completion_k[layer][question, head, rollout]
            self.completion_v[layer] = self.completion_v[layer][question, head, rollout]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """One new token a rollout: q (R, H, hd), k and v (R, KV, hd) -> (R, H, hd).

        The prompt's keys and values are read once a group, not once a rollout.
        """
        Q, KV, G, room, hd = self.completion_k[layer].shape
        P = self.prompt_k[layer].shape[2]
        blocks = -(-self.filled // self.block)
        T = min(blocks * self.block, room)      # tokens of a rollout that this step reads

        # (R, heads, hd) -> (Q, KV, G, heads / KV, hd): heads of one key head are together.
        q, k, v = (
            x.view(Q, G, KV, -1, hd).transpose(1, 2) for x in (q * hd ** -0.5, k, v))
        # The new token sees itself: its keys and values go into the cache first.
        self.completion_k[layer].index_copy_(3, self.place, k)
        self.completion_v[layer].index_copy_(3, self.place, v)
        completion_k = self.completion_k[layer][:, :, :, :T]       # (Q, KV, G, T, hd)
        completion_v = self.completion_v[layer][:, :, :, :T]

        # Scores over the prompt: one matrix product a question, for all of its rollouts.
        # Over a rollout's own tokens: one a rollout. `shared` query heads share a key head.
        q = q.contiguous()                                    # (Q, KV, G, shared, hd)
        prompt_scores = q.flatten(2, 3) @ self.prompt_k[layer].transpose(2, 3)
        own_scores = (q @ completion_k.transpose(3, 4)).flatten(2, 3)

        # One softmax over both: (Q, KV, G * shared, P + T). Kernels compute it in float32.
        # A token sees neither the padding of a shorter prompt nor what is not filled yet.
        scores = torch.cat((prompt_scores, own_scores), -1)
        scores = scores.masked_fill_(self.unseen[..., :P + T], -torch.inf)
        weights = scores.softmax(-1)

        # The values go the same two ways as the scores, and their sums add up.
        prompt_out = weights[..., :P] @ self.prompt_v[layer]
        own_out = weights[..., P:].unflatten(2, (G, -1)) @ completion_v
        out = prompt_out.view_as(own_out) + own_out           # (Q, KV, G, shared, hd)
        return out.transpose(1, 2).reshape(Q * G, -1, hd)


# ---------------------------------------------------------------- attention by pieces

class PlannedAttention(torch.autograd.Function):
    """Exact attention by pieces.

    A token may be in two pieces, its own sequence and its prompt: their outputs are merged.
    In the backward pass a piece's kernel gets the merged output and log-sum-exp. Then
    exp(score - lse) is the weight in the softmax over everything, the kernel returns this
    piece's exact share of the gradient, and the shares add up.
    """

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
    """Joins attention over more keys into these rows of out (N, H, hd), lse (H, N), in place.

    more_out (rows, H, hd), more_lse (H, rows): the same queries over the other keys. The
    softmax over all keys weighs each output by its share of the sum of exponentials,
    exp(lse - total).
    """
    # Indexing with a tensor copies, so the result is assigned to the rows.
    row_lse = lse[:, rows]
    total = torch.logaddexp(row_lse, more_lse)                             # (H, rows)
    share = (row_lse - total).exp().transpose(0, 1)[..., None]             # (rows, H, 1)
    more_share = (more_lse - total).exp().transpose(0, 1)[..., None]
    merged = out[rows] * share + more_out * more_share                     # float32
    # Assigning to a slice converts the dtype; assigning to an index does not.
    out[rows] = merged if isinstance(rows, slice) else merged.to(out.dtype)
    lse[:, rows] = total


# ---------------------------------------------------------------- the kernels

def attend(q: Tensor, k: Tensor, v: Tensor, piece: Piece) -> tuple[Tensor, Tensor]:
    """A piece's q (rows, H, hd), k, v (keys, KV, hd) -> out like q, lse (H, rows) float32.

    By the variable-length kernel, the CPU's, or spelled out for other devices and dtypes.
    """
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


def attend_backward(
        grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
        piece: Piece) -> Sequence[Tensor]:
    """Gradients of q, k and v by this piece's share in the attention over all that is seen.

    grad, out like q, and lse (H, rows) are over all keys that the queries see.
    """
    if not isinstance(piece.sequences, int):
        no_dropout = torch.empty(2, dtype=torch.uint64, device=q.device)
        return torch.ops.aten._flash_attention_backward(
            grad, q, k, v, out, lse.contiguous(), *piece.sequences, 0.0, piece.causal,
            no_dropout, no_dropout)
    S = piece.sequences
    grad, q, k, v, out = (
        x.unflatten(0, (S, -1)).transpose(1, 2) for x in (grad, q, k, v, out))
    lse = lse.unflatten(1, (S, -1)).transpose(0, 1)                        # (S, H, L)
    if q.device.type == "cpu" and CPU_KERNEL:
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        shares = kernel(grad, q, k, v, out, lse, 0.0, piece.causal)
    else:
        # arXiv 2205.14135, appendix B.2. The softmax's derivative subtracts from dp its
        # mean under p, which over all keys is the product of output and gradient.
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
    """-> scaled scores (S, H, L, M), -inf if unseen; k and v (S, H, M, hd); all float32."""
    shared = q.shape[1] // k.shape[1]             # query heads of one key head
    k, v = (x.float().repeat_interleave(shared, 1) for x in (k, v))
    scores = q.float() @ k.transpose(2, 3) * q.shape[-1] ** -0.5
    if causal:
        ones = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device)
        scores = scores.masked_fill(ones.triu(1), -torch.inf)
    return scores, k, v
