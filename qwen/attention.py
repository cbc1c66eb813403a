"""Attention over packed tokens: what may see what, the cache of sampling, the kernels.

Packed means that the sequences of a batch lie one behind the other, without padding, in
one tensor (N, ...). A group is one prompt and G completions of it. The prompt is in the
pack once, every completion sees it, and no completion sees another. `x` marks who sees
whom in a pack of a prompt p of 3 tokens and two completions a and b of 2 tokens each:

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

A mask of all pairs would be N x N. A `Plan` cuts what is seen into pieces instead, each
a plain attention of some query rows over some key rows: the three triangles on the
diagonal, and the rectangle below the prompt's triangle. Sequences of one length make
one piece, here a and b.

>>> plan = Plan([3, 2, 2], prefix=[(3, 4)])
>>> for piece in plan.pieces:
...     print(piece)                                        # doctest: +NORMALIZE_WHITESPACE
Piece(query_rows=slice(0, 3, None), key_rows=slice(0, 3, None),
      sequences=1, causal=True, written_before=False)
Piece(query_rows=slice(3, 7, None), key_rows=slice(3, 7, None),
      sequences=2, causal=True, written_before=False)
Piece(query_rows=slice(3, 7, None), key_rows=slice(0, 3, None),
      sequences=1, causal=False, written_before=True)

The rows 3 to 6 stand in two pieces. Their two outputs are merged by weights that follow
from the pieces' log-sum-exp (`merge`), which gives the softmax over both. Where all
queries are 0, all scores are equal, and a token's output is the mean of the values it
sees. With the row number as value, row 6 gets (0 + 1 + 2 + 5 + 6) / 5:

>>> q = k = torch.zeros(7, 1, 8)
>>> v = torch.arange(7.0)[:, None, None].expand(7, 1, 8).contiguous()
>>> attention(q, k, v, plan)[:, 0, 0]
tensor([0.0000, 0.5000, 1.0000, 1.5000, 2.0000, 2.0000, 2.8000])

Sequences of one length need not be neighbours. Then the rows are an index, no slice:

>>> Plan([2, 3, 2]).pieces[0].query_rows
tensor([0, 1, 5, 6])

Shapes: N packed tokens, H query heads, KV key-value heads (H is a multiple of KV), hd
head width, Q prompts, G rollouts of a prompt, R = Q * G rollouts, S sequences of one
length, L query rows and M key rows of each, P places of the longest prompt.
Source: the merge by log-sum-exp is FlashAttention's (arXiv 2205.14135, section 3.1);
the shared prefix and its pieces are ours.
"""
import functools
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Rows = slice | Tensor             # rows of a packed tensor: a slice, or an index (rows,)
LayerKV = tuple[Tensor, Tensor]   # keys and values of one layer, each (N, KV, hd)
# On a CPU the cache's own tokens are read in buckets of this many: less is read in vain.
CPU_BUCKET = 8
# Where the variable-length kernel is: on CUDA, and as shapes alone on the meta device, so that
# memory.py counts what it takes.
KERNEL_DEVICES = ("cuda", "meta")


# ------------------------------------------------------------------------- what may see what

@dataclass(frozen=True)
class Piece:
    """One plain attention, out of which a pass is put together."""
    query_rows: Rows
    key_rows: Rows
    sequences: int                # of one length, that the rows are cut into; each sees itself
    causal: bool                  # a token sees its sequence up to itself, else all of it
    written_before: bool          # an earlier piece has these query rows: merge, don't write


@dataclass(frozen=True)
class Boundaries:
    """Where sequences begin and end, as a variable-length kernel wants it."""
    queries: Tensor               # (sequences + 1,) int32: first row of each, then the end
    keys: Tensor                  # the same of the keys
    longest_query: int
    longest_key: int


class Plan:
    """What may see what in one pass over packed tokens: made once, used by every layer.

    lengths:  tokens of each sequence, in packed order; a token sees its own sequence,
              up to itself where `causal`.
    prefix:   Q pairs (tokens of a prompt, tokens of all its completions). The first Q
              sequences are the prompts, and behind all of them lie the completions in
              the same order. A completion's token sees the whole of its prompt as well.
    kv_cache: a list here receives every layer's keys and values. So prefill fills the
              cache.
    starts:   cumulative(lengths), where it lies on the device already.
    """

    def __init__(
            self, lengths: Iterable[int], causal: bool = True,
            prefix: Iterable[tuple[int, int]] = (),
            kv_cache: list[LayerKV] | None = None,
            device: torch.device | str = "cpu",
            starts: Tensor | None = None) -> None:
        # A completion of one token feeds nothing: it is no sequence here, and counts 0 in its
        # prompt's pair.
        self.lengths = [n for n in lengths if n]
        self.causal = causal
        self.prefix = list(prefix)
        self.kv_cache = kv_cache
        self.device = device
        self.starts = starts
        self.prompt_tokens = sum(prompt for prompt, _ in self.prefix)

    @functools.cached_property
    def pieces(self) -> list[Piece]:
        """Pieces that cover all that is seen, those of a token's own sequence first.

        Every row is in exactly one of those, so the pieces of the prompts find it written."""
        return [*self.own_pieces(), *self.prefix_pieces()]

    def own_pieces(self) -> list[Piece]:
        """Each sequence over itself; sequences of one length are one piece."""
        starts_by_length: dict[int, list[int]] = {}
        for length, end in zip(self.lengths, itertools.accumulate(self.lengths)):
            starts_by_length.setdefault(length, []).append(end - length)
        pieces = []
        for length, starts in starts_by_length.items():
            rows: Rows = slice(starts[0], starts[-1] + length)
            # A slice is a view, an index copies; but a slice must not cover other sequences.
            if rows.stop - rows.start != len(starts) * length:
                rows = (torch.tensor(starts)[:, None] + torch.arange(length)).flatten()
            pieces.append(Piece(rows, rows, len(starts), self.causal, written_before=False))
        return pieces

    def prefix_pieces(self) -> list[Piece]:
        """All completions of a prompt over the prompt: neighbours, hence always slices."""
        pieces = []
        query = self.prompt_tokens
        key = 0
        for prompt, completions in self.prefix:
            if completions:
                query_rows = slice(query, query + completions)
                key_rows = slice(key, key + prompt)
                pieces.append(Piece(query_rows, key_rows, 1, causal=False, written_before=True))
            query += completions
            key += prompt
        return pieces

    # Boundaries are sent to the device once a pass, not once a layer.

    @functools.cached_property
    def own(self) -> Boundaries:
        """Each sequence over itself."""
        starts = self.starts
        if starts is None:
            [starts] = sent([cumulative(self.lengths)], self.device)
        starts = starts.int()
        longest = max(self.lengths)
        return Boundaries(starts, starts, longest, longest)

    @functools.cached_property
    def shared(self) -> Boundaries:
        """All completions of a prompt, as one sequence, over the prompt."""
        prompts = [prompt for prompt, _ in self.prefix]
        completions = [tokens for _, tokens in self.prefix]
        starts = sent([cumulative(completions), cumulative(prompts)], self.device)
        queries, keys = (x.int() for x in starts)
        # At a longest query of 1 the kernel lays queries out by sequence, where a prompt
        # without a fed token has none; the number is a bound, so 2 does no harm.
        return Boundaries(queries, keys, max([2, *completions]), max(prompts))


def cumulative(lengths: Sequence[int]) -> Tensor:
    """(sequences,) lengths -> (sequences + 1,): where each begins in the pack, then the end."""
    return torch.tensor([0, *itertools.accumulate(lengths)])


def sent(numbers: Sequence[Tensor], device: torch.device | str) -> list[Tensor]:
    """Long tensors from the host -> the same on the device, by one copy: at each copy the host
    waits for the device."""
    flat = torch.cat([x.flatten() for x in numbers]).to(device)
    parts = flat.split([x.numel() for x in numbers])
    return [part.view(x.shape) for part, x in zip(parts, numbers)]


def attention(q: Tensor, k: Tensor, v: Tensor, plan: "Plan | Cache", layer: int = 0) -> Tensor:
    """q (N, H, hd), k and v (N, KV, hd) -> (N, H, hd): softmax over what `plan` shows a token.

    A Plan is a pass over packed sequences, a Cache one more token of every rollout; the
    cache has keys and values of every layer and asks for this layer's number."""
    if isinstance(plan, Cache):
        return plan.attend(layer, q, k, v)
    if plan.kv_cache is not None:
        plan.kv_cache.append((k, v))
    return PlannedAttention.apply(q, k, v, plan)


# ---------------------------------------------------------------------- the cache of sampling

class Cache:
    """Keys and values while sampling: a prompt's once for its whole group, and every rollout's.

    prompt_k, prompt_v: per layer (Q, KV, P, hd), shorter prompts padded behind.
    completion_k, completion_v: per layer (Q, KV, G, room, hd), room the most tokens of a
        rollout; a step reads the first T = bucket of them.
    unseen: (Q, 1, 1, P + room), True where a prompt is padded and where no token is yet.
    filled: tokens of each rollout that are in there, the same number for all.
    place: (1,) that of the newest of them, filled - 1, on the device.

    Attention reads whole buckets of a rollout's tokens and masks what is not filled. So
    shapes stay the same over many steps, and what changes from step to step lies on the
    device: both are what a CUDA graph needs.

    On CUDA the bucket is the whole room, so that one graph serves all steps of a batch. With
    3B's widths, 64 rollouts and room for 256 tokens each a step reads at most 0.6 GB more
    than it must, on average half of that, beside 6 GB of weights; capturing once more takes
    as long as a dozen steps.
    """

    def __init__(self, plan: Plan, group: int, max_tokens: int) -> None:
        """plan: of the pass over the packed prompts that has filled its kv_cache."""
        kv_cache = plan.kv_cache
        Q = len(plan.lengths)
        P = max(plan.lengths)
        _, KV, hd = kv_cache[0][0].shape
        device = kv_cache[0][0].device

        # Prompts of unequal length are padded behind, to one tensor a layer: so one
        # matrix product serves all of them in every step.
        first_rows = plan.own.queries[:-1, None]                                   # (Q, 1)
        lengths = plan.own.queries.diff()[:, None]
        place = torch.arange(P, device=device)
        self.unseen = torch.ones(Q, 1, 1, P + max_tokens, dtype=torch.bool, device=device)
        self.unseen[..., :P] = (place >= lengths)[:, None, None]
        # The packed row of each place of each prompt. Padding repeats the prompt's last
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
        self.bucket_size = CPU_BUCKET if device.type == "cpu" else max_tokens

    @property
    def questions(self) -> int:
        """Q, the prompts that are still in the batch."""
        return len(self.unseen)

    @property
    def bucket(self) -> int:
        """Tokens of each rollout that the present step reads: whole buckets, its own included."""
        buckets = -(-self.filled // self.bucket_size)
        return min(buckets * self.bucket_size, self.completion_k[0].shape[3])

    def admit(self) -> None:
        """Makes the place of one more token of every rollout, before the first layer fills it."""
        P = self.prompt_k[0].shape[2]
        self.filled += 1
        self.place += 1
        self.unseen.index_fill_(3, self.place + P, False)

    def select(self, questions: Tensor, rollouts: Tensor) -> None:
        """Goes on with these questions (Q',) and rollouts (Q' * G',), indices into the
        present ones; the rest is dropped."""
        _, KV, G, _, _ = self.completion_k[0].shape
        self.unseen = self.unseen[questions]
        # Indices of (Q', KV, G').
        question = questions[:, None, None]
        head = torch.arange(KV, device=questions.device)[:, None]
        rollout = (rollouts % G).view(len(questions), 1, -1)
        # Layer by layer in place: no more than one layer is there twice.
        for layer in range(len(self.prompt_k)):
            self.prompt_k[layer] = self.prompt_k[layer][questions]
            self.prompt_v[layer] = self.prompt_v[layer][questions]
            self.completion_k[layer] = self.completion_k[layer][question, head, rollout]
            self.completion_v[layer] = self.completion_v[layer][question, head, rollout]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """One new token a rollout: q (R, H, hd), k and v (R, KV, hd) -> (R, H, hd).

        The prompt's keys and values are read once a group, not once a rollout."""
        Q, KV, G, _, hd = self.completion_k[layer].shape
        P = self.prompt_k[layer].shape[2]
        T = self.bucket

        def by_group(x: Tensor) -> Tensor:
            """(R, heads, hd) -> (Q, KV, G, heads / KV, hd): who shares a key head is together."""
            return x.view(Q, G, KV, -1, hd).transpose(1, 2)

        # The new token sees itself: its keys and values go into the cache first.
        self.completion_k[layer].index_copy_(3, self.place, by_group(k))
        self.completion_v[layer].index_copy_(3, self.place, by_group(v))
        completion_k = self.completion_k[layer][:, :, :, :T]               # (Q, KV, G, T, hd)
        completion_v = self.completion_v[layer][:, :, :, :T]

        # Scores over the prompt: one matrix product a question, for all of its rollouts.
        # Over a rollout's own tokens: one a rollout. `shared` query heads share a key head.
        q = by_group(q * hd ** -0.5).contiguous()                     # (Q, KV, G, shared, hd)
        prompt_scores = q.flatten(2, 3) @ self.prompt_k[layer].transpose(2, 3)
        own_scores = (q @ completion_k.transpose(3, 4)).flatten(2, 3)

        # One softmax over both: (Q, KV, G * shared, P + T). Kernels compute it in float32.
        # A token sees neither the padding of a shorter prompt nor the bucket's unfilled rest.
        scores = torch.cat((prompt_scores, own_scores), -1)
        scores = scores.masked_fill_(self.unseen[..., :P + T], -torch.inf)
        weights = scores.softmax(-1)

        # The values take the same two ways as the scores, and their sums add up.
        prompt_out = weights[..., :P] @ self.prompt_v[layer]
        own_out = weights[..., P:].unflatten(2, (G, -1)) @ completion_v
        out = prompt_out.view_as(own_out) + own_out                   # (Q, KV, G, shared, hd)
        return out.transpose(1, 2).reshape(Q * G, -1, hd)


# ------------------------------------------------------------------------ attention by pieces

@dataclass(frozen=True)
class Attended:
    """Queries, keys, values and what attention made of them, as a backward pass needs it.

    `out` and `lse` may be over more keys than `k`: over all that the queries see."""
    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor                   # like q
    lse: Tensor                   # log-sum-exp of the scores, float32


class PlannedAttention(torch.autograd.Function):
    """Exact attention by pieces.

    A token may appear in two pieces, its own sequence and its prompt: they are merged
    by their log-sum-exp. Backward, a kernel that is given the merged output and
    log-sum-exp returns this piece's exact share of the gradient: with the merged
    log-sum-exp exp(score - lse) is the weight in the softmax over everything, and the
    shares add up."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> Tensor:
        forward = forward_cuda if has_kernel(q) else forward_pieces
        out, lse = forward(q, k, v, plan)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.plan = plan
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        attended = Attended(*ctx.saved_tensors)
        backward = backward_cuda if has_kernel(attended.q) else backward_pieces
        dq, dk, dv = backward(grad.contiguous(), attended, ctx.plan)
        return dq, dk, dv, None


def has_kernel(q: Tensor) -> bool:
    """Whether CUDA's variable-length kernel takes these: it knows no float32."""
    return q.device.type in KERNEL_DEVICES and q.dtype in (torch.bfloat16, torch.float16)


def forward_cuda(q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    """(N, H, hd) -> out (N, H, hd), lse (H, N): two launches, whatever the lengths are."""
    out, lse = cuda_flash(q, k, v, plan.own, plan.causal)
    P = plan.prompt_tokens
    if plan.prefix and P < len(q):
        prefix_out, prefix_lse = cuda_flash(q[P:], k[:P], v[:P], plan.shared, False)
        merge(out, lse, slice(P, None), prefix_out, prefix_lse)
    return out, lse


def backward_cuda(
        grad: Tensor, attended: Attended, plan: Plan) -> tuple[Tensor, Tensor, Tensor]:
    """grad like out -> gradients of q, k and v."""
    a = attended
    dq, dk, dv = cuda_flash_backward(grad, a, plan.own, plan.causal)
    P = plan.prompt_tokens
    if plan.prefix and P < len(a.q):
        completions = Attended(a.q[P:], a.k[:P], a.v[:P], a.out[P:], a.lse[:, P:].contiguous())
        shares = cuda_flash_backward(grad[P:], completions, plan.shared, False)
        for total, share in zip((dq[P:], dk[:P], dv[:P]), shares):
            total += share
    return dq, dk, dv


def forward_pieces(q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    """(N, H, hd) -> out (N, H, hd), lse (H, N): one kernel call a piece."""
    N, H, _ = q.shape
    out = torch.empty_like(q)
    lse = q.new_empty(H, N, dtype=torch.float32)
    for piece in plan.pieces:
        rows = piece.query_rows
        keys = piece.key_rows
        S = piece.sequences
        piece_out, piece_lse = flash(
            batched(q[rows], S), batched(k[keys], S), batched(v[keys], S), piece.causal)
        piece_out = packed(piece_out)                                      # (rows, H, hd)
        piece_lse = piece_lse.transpose(0, 1).flatten(1)                   # (H, rows)
        if piece.written_before:
            merge(out, lse, rows, piece_out, piece_lse)
        else:
            out[rows] = piece_out
            lse[:, rows] = piece_lse
    return out, lse


def backward_pieces(
        grad: Tensor, attended: Attended, plan: Plan) -> tuple[Tensor, Tensor, Tensor]:
    """grad like out -> gradients of q, k and v, summed over the pieces."""
    q, k, v = attended.q, attended.k, attended.v
    dq = torch.zeros_like(q)
    dk = torch.zeros_like(k)
    dv = torch.zeros_like(v)
    for piece in plan.pieces:
        rows = piece.query_rows
        keys = piece.key_rows
        S = piece.sequences
        of_piece = Attended(
            batched(q[rows], S), batched(k[keys], S), batched(v[keys], S),
            batched(attended.out[rows], S),
            attended.lse[:, rows].unflatten(1, (S, -1)).transpose(0, 1))   # (S, H, L)
        shares = flash_backward(batched(grad[rows], S), of_piece, piece.causal)
        dq[rows] += packed(shares[0])
        dk[keys] += packed(shares[1])
        dv[keys] += packed(shares[2])
    return dq, dk, dv


def batched(x: Tensor, sequences: int) -> Tensor:
    """S packed sequences of one length, (S * L, H, hd) -> (S, H, L, hd)."""
    return x.unflatten(0, (sequences, -1)).transpose(1, 2)


def packed(x: Tensor) -> Tensor:
    """The way back, (S, H, L, hd) -> (S * L, H, hd)."""
    return x.transpose(1, 2).flatten(0, 1)


def merge(out: Tensor, lse: Tensor, rows: Rows, more_out: Tensor, more_lse: Tensor) -> None:
    """Joins attention over other keys into these rows of out (N, H, hd) and lse (H, N), in place.

    more_out (rows, H, hd), more_lse (H, rows): the same queries over the other keys.
    A softmax over both sets of keys weighs each output by its set's share of the sum of
    exponentials, exp(lse - total)."""
    # Out of an index comes a copy, so the result is assigned to the rows, not copied into them.
    row_lse = lse[:, rows]
    total = torch.logaddexp(row_lse, more_lse)                             # (H, rows)
    share = (row_lse - total).exp().transpose(0, 1)[..., None]             # (rows, H, 1)
    more_share = (more_lse - total).exp().transpose(0, 1)[..., None]
    merged = out[rows] * share + more_out * more_share                     # float32
    # Assigning to a slice converts on the way; assigning to an index wants the same dtype.
    out[rows] = merged if isinstance(rows, slice) else merged.to(out.dtype)
    lse[:, rows] = total


# -------------------------------------------------------------------------------- the kernels

def flash(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """q (S, H, L, hd), k and v (S, KV, M, hd) -> out like q, lse (S, H, L) float32."""
    if q.device.type == "cpu":
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return kernel(q, k, v, 0.0, causal)
    return plain(q, k, v, causal)


def flash_backward(
        grad: Tensor, attended: Attended, causal: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v by these keys' share in the attention over all that is seen."""
    a = attended
    if a.q.device.type == "cpu":
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        return kernel(grad, a.q, a.k, a.v, a.out, a.lse, 0.0, causal)
    return plain_backward(grad, a, causal)


def plain(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """`flash` spelled out: for devices and dtypes without a kernel, and to test kernels by."""
    scores = plain_scores(q, k, causal)
    out = scores.softmax(-1) @ for_query_heads(v, q.shape[1])
    return out.to(q.dtype), scores.logsumexp(-1)


def plain_backward(
        grad: Tensor, attended: Attended, causal: bool) -> tuple[Tensor, Tensor, Tensor]:
    """`flash_backward` spelled out (arXiv 2205.14135, appendix B.2)."""
    a = attended
    H = a.q.shape[1]
    KV = a.k.shape[1]
    k_full = for_query_heads(a.k, H)
    v_full = for_query_heads(a.v, H)
    # The weights in the softmax over all that is seen, as `lse` is over all of it.
    p = (plain_scores(a.q, a.k, causal) - a.lse[..., None]).exp()          # (S, H, L, M)
    # The softmax's derivative takes the mean of dp under p from dp. That mean, over all
    # that is seen, is the product of the output and its gradient.
    dp = grad.float() @ v_full.transpose(2, 3)
    mean_dp = (grad * a.out).float().sum(-1, keepdim=True)
    ds = p * (dp - mean_dp) * a.q.shape[-1] ** -0.5
    dq = ds @ k_full
    # Query heads that share a key head add up.
    dk = (ds.transpose(2, 3) @ a.q.float()).unflatten(1, (KV, -1)).sum(2)
    dv = (p.transpose(2, 3) @ grad.float()).unflatten(1, (KV, -1)).sum(2)
    return dq.to(a.q.dtype), dk.to(a.k.dtype), dv.to(a.v.dtype)


def plain_scores(q: Tensor, k: Tensor, causal: bool) -> Tensor:
    """q (S, H, L, hd), k (S, KV, M, hd) -> scaled scores (S, H, L, M), -inf where unseen."""
    k_full = for_query_heads(k, q.shape[1])
    scores = q.float() @ k_full.transpose(2, 3) * q.shape[-1] ** -0.5
    if causal:
        ones = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device)
        scores = scores.masked_fill(ones.triu(1), -torch.inf)
    return scores


def for_query_heads(x: Tensor, heads: int) -> Tensor:
    """(S, KV, M, hd) -> (S, H, M, hd) float32: a key head once for each of its query heads."""
    return x.float().repeat_interleave(heads // x.shape[1], 1)


def cuda_flash(
        q: Tensor, k: Tensor, v: Tensor, boundaries: Boundaries,
        causal: bool) -> tuple[Tensor, Tensor]:
    """The variable-length kernel: q (N, H, hd), k and v (M, KV, hd) -> out like q, lse (H, N)."""
    b = boundaries
    outputs = torch.ops.aten._flash_attention_forward(
        q, k, v, b.queries, b.keys, b.longest_query, b.longest_key, 0.0, causal, False)
    return outputs[:2]


def cuda_flash_backward(
        grad: Tensor, attended: Attended, boundaries: Boundaries,
        causal: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, as `flash_backward`, by the variable-length kernel."""
    a = attended
    b = boundaries
    no_dropout = torch.empty(2, dtype=torch.uint64, device=a.q.device)
    return torch.ops.aten._flash_attention_backward(
        grad, a.q, a.k, a.v, a.out, a.lse, b.queries, b.keys, b.longest_query, b.longest_key,
        0.0, causal, no_dropout, no_dropout)
