"""Qwen2.5-VL from its safetensors: vision tower, language model, one attention function.

Tokens are packed, (N, D), everywhere: the sequences of a batch lie one behind the other and no padding is computed, but that a decoding
step masks the ends of shorter prompts (`Cache`). A `Plan` says what may see what; a layer is norm, attention, norm, MLP and knows nothing
of batches. Two steps serve everything: prompts are prefilled, completions extend them, with gradient (`score`) or without (`prefill`,
`decode`; see generate.py), so that sampled and scored log-probabilities agree.

Shapes: N packed tokens, D width, H heads, KV key-value heads, hd head width, Q prompts, G rollouts of a prompt, V vocabulary.
Source: the Qwen2.5-VL report (arXiv 2502.13923) and the released checkpoints; module names are the checkpoint's names.
"""
import functools
import itertools
import json
import os
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils.checkpoint import checkpoint

NEVER = -1e30                     # logit of an id that must not be sampled; finite, so that 0 * log 0 stays 0
LOGITS_PER_CHUNK = 2 ** 25        # logits alive at once in `score` (float32: 0.1 GB); memory does not grow with tokens x vocabulary
PATCHES_AT_ONCE = 2048            # in a pass of the vision tower without gradient: more do not make it faster, but larger


class CheckpointError(Exception):
    """Weights that are missing or do not fit; one line: what is wrong, where, what to do."""


# --------------------------------------------------------------------------------------------------------------- configuration

@dataclass(frozen=True)
class VisionConfig:
    depth: int
    hidden: int
    heads: int
    intermediate: int
    out: int
    channels: int
    patch: int
    temporal_patch: int
    merge: int                    # merge x merge patches become one token of the language model
    window: int                   # pixels; patches attend within windows of this side ...
    full_blocks: tuple[int, ...]  # ... but in these blocks, where they see their whole image


@dataclass(frozen=True)
class Config:
    """What config.json says, from the hub (flat, `rope_scaling`) or as transformers writes it (`text_config`, `rope_parameters`)."""
    vocab: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    eps: float
    rope_theta: float
    mrope_section: tuple[int, ...]  # frequencies rotated by the time, height and width position; they sum to head_dim / 2
    tied: bool
    image_id: int
    marker_ids: tuple[int, ...]     # image, video and vision markers: never sampled
    stop_ids: tuple[int, ...]
    vision: VisionConfig
    raw: dict = field(repr=False, compare=False)

    @classmethod
    def from_json(cls, path):
        try:
            raw = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: not a readable config.json ({error})") from None
        if not isinstance(raw, dict):
            raise CheckpointError(f"{path}: not a JSON object; is this the config.json of a Qwen2.5-VL checkpoint?")
        if raw.get("model_type") != "qwen2_5_vl":
            raise CheckpointError(f"{path}: model_type is {raw.get('model_type')!r}; this code runs 'qwen2_5_vl' checkpoints")
        text = raw.get("text_config") or raw
        vision = raw.get("vision_config") or {}
        rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
        try:
            hidden, heads = text["hidden_size"], text["num_attention_heads"]
            vision_config = VisionConfig(
                vision["depth"], vision["hidden_size"], vision["num_heads"], vision["intermediate_size"], vision["out_hidden_size"],
                vision.get("in_channels", vision.get("in_chans", 3)), vision.get("patch_size", 14), vision.get("temporal_patch_size", 2),
                vision.get("spatial_merge_size", 2), vision["window_size"], tuple(vision["fullatt_block_indexes"]))
            eos = text.get("eos_token_id", raw.get("eos_token_id"))
            markers = [raw.get(f"{name}_token_id") for name in ("image", "video", "vision", "vision_start", "vision_end")]
            config = cls(
                text["vocab_size"], hidden, text["num_hidden_layers"], heads, text["num_key_value_heads"],
                text.get("head_dim") or hidden // heads, text["intermediate_size"], text.get("rms_norm_eps", 1e-6),
                rope.get("rope_theta") or text.get("rope_theta") or 1e6, tuple(rope["mrope_section"]),
                raw.get("tie_word_embeddings", text.get("tie_word_embeddings", False)), raw["image_token_id"],
                tuple(i for i in markers if i is not None), () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos),
                vision_config, raw)
        except KeyError as error:
            raise CheckpointError(f"{path}: {error} is missing; is this the config.json of a Qwen2.5-VL checkpoint?") from None
        except (TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
            raise CheckpointError(f"{path}: not the config.json of a Qwen2.5-VL checkpoint ({error})") from None
        if sum(config.mrope_section) * 2 != config.head_dim:
            raise CheckpointError(f"{path}: mrope_section {config.mrope_section} is not half the head width {config.head_dim}")
        return config


# --------------------------------------------------------------------------------------------------------------- what may see what

class Plan:
    """What may see what in one pass over packed tokens: made once, used by every layer.

    lengths: tokens of each sequence, in packed order; a token sees its own sequence, up to itself where `causal`.
    prefix:  (Q pairs of) prompt length, number of completion tokens: the first Q sequences are prompts, and behind all of them lie the
             completions in the same order; a completion token sees the whole of its prompt as well. That is a group: one prompt, G
             completions, none of which sees another.
    kept:    a list here receives every layer's (k, v), each (N, KV, hd): that is how prefill fills the cache.
    """

    def __init__(self, lengths, causal=True, prefix=(), kept=None, device="cpu"):
        self.lengths, self.causal, self.prefix, self.kept = [n for n in lengths if n], causal, list(prefix), kept
        self.prompt_tokens = sum(prompt for prompt, _ in self.prefix)
        if torch.device(device).type == "cuda":
            self.own = cumulative(self.lengths, device), max(self.lengths)
            prompts, seen = zip(*self.prefix) if self.prefix else ((), ())
            self.shared = (cumulative(seen, device), cumulative(prompts, device), max(seen, default=0), max(prompts, default=0))

    @functools.cached_property
    def pieces(self):
        """Rectangles of attention as (query rows, key rows, number of sequences in them, causal, own); sequences of one length go together,
        wherever they lie. Own rows come first; where `own` is False the same queries have been there before."""
        starts, found = {}, []
        for length, end in zip(self.lengths, itertools.accumulate(self.lengths)):
            starts.setdefault(length, []).append(end - length)
        for length, first in starts.items():
            rows = slice(first[0], first[-1] + length)
            if rows.stop - rows.start != len(first) * length:            # others lie between them
                rows = (torch.tensor(first)[:, None] + torch.arange(length)).flatten()
            found.append((rows, rows, len(first), self.causal, True))
        query, key = self.prompt_tokens, 0
        for prompt, seen in self.prefix:
            if seen:
                found.append((slice(query, query + seen), slice(key, key + prompt), 1, False, False))
            query, key = query + seen, key + prompt
        return found


class Cache:
    """Keys and values while sampling: each prompt's once, for its whole group, and those of every rollout's own tokens.

    prompt_k, prompt_v: per layer (Q, KV, P, hd), prompts of unequal length padded behind; blocked (Q, 1, 1, P) True on that padding.
    own_k, own_v: per layer (Q * G, KV, T, hd); `filled` tokens of it are valid, for all rollouts the same number. Attention reads whole
             buckets of them, masked behind `at` (`filled` on the device): shapes stay the same over many steps, as a CUDA graph needs.
    """

    def __init__(self, kept, lengths, group, max_tokens):
        Q, P, dev = len(lengths), max(lengths), kept[0][0].device
        n = torch.tensor(lengths, device=dev)
        self.blocked = (torch.arange(P, device=dev) >= n[:, None])[:, None, None, :]
        row = (n.cumsum(0) - n)[:, None] + torch.arange(P, device=dev).clamp(max=n[:, None] - 1)      # (Q, P) packed rows
        self.prompt_k, self.prompt_v = ([x[row].transpose(1, 2).contiguous() for x in xs] for xs in zip(*kept))
        KV, hd = kept[0][0].shape[1:]
        self.own_k, self.own_v = ([x.new_zeros(Q * group, KV, max_tokens, hd) for x in xs] for xs in zip(*kept))
        self.filled, self.at, self.unit = 0, torch.zeros(1, dtype=torch.long, device=dev), 64 if dev.type == "cuda" else 8

    @property
    def bucket(self):
        """Own tokens that the coming step reads."""
        return min(-(-(self.filled + 1) // self.unit) * self.unit, self.own_k[0].shape[2])

    def keep(self, questions, rollouts):
        """Go on with these questions (Q',) and rollouts (Q' * G',), indices into the present ones; the rest is dropped."""
        self.blocked = self.blocked[questions]
        for xs, index in ((self.prompt_k, questions), (self.prompt_v, questions), (self.own_k, rollouts), (self.own_v, rollouts)):
            for i in range(len(xs)):
                xs[i] = xs[i][index]

    def attend(self, layer, q, k, v):
        """One new token a rollout: q (R, H, hd), k and v (R, KV, hd) -> (R, H, hd). The prompt's keys are read once a group."""
        (Q, KV, P, hd), (R, H, _), T = self.prompt_k[layer].shape, q.shape, self.bucket
        for own, new in ((self.own_k, k), (self.own_v, v)):
            own[layer].index_copy_(2, self.at, new[:, :, None])
        G, shared = R // Q, H // KV                                      # rollouts of a prompt; query heads that share a key head

        def by_group(x):                                                 # (R, KV, H/KV, n) -> (Q, KV, G * H/KV, n)
            return x.reshape(Q, G, KV, shared, -1).transpose(1, 2).reshape(Q, KV, G * shared, -1)

        def by_rollout(x):                                               # and back
            return x.reshape(Q, KV, G, shared, -1).transpose(1, 2).reshape(R, KV, shared, -1)
        q = (q * hd ** -0.5).view(R, KV, shared, hd)
        far = by_group(q) @ self.prompt_k[layer].transpose(2, 3)                                      # (Q, KV, G * H/KV, P)
        near = by_group(q @ self.own_k[layer][:, :, :T].transpose(2, 3))                              # (Q, KV, G * H/KV, T)
        unseen = torch.cat((self.blocked, (torch.arange(T, device=q.device) > self.at).expand(Q, 1, 1, T)), -1)
        weights = torch.cat((far, near), -1).masked_fill_(unseen, -torch.inf).softmax(-1, dtype=torch.float32).to(v.dtype)
        far, near = weights[..., :P] @ self.prompt_v[layer], by_rollout(weights[..., P:]) @ self.own_v[layer][:, :, :T]
        return (by_rollout(far) + near).reshape(R, H, hd)


def cumulative(lengths, device):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)


def attention(q, k, v, plan, layer=0):
    """q (N, H, hd), k and v (N, KV, hd) -> (N, H, hd): softmax over what `plan` (a Plan, or a decode step's Cache) lets a token see."""
    if isinstance(plan, Cache):
        return plan.attend(layer, q, k, v)
    if plan.kept is not None:
        plan.kept.append((k, v))
    return PlannedAttention.apply(q, k, v, plan)


class PlannedAttention(torch.autograd.Function):
    """Exact attention by pieces. A token may appear in two of them, its own sequence and its prompt: they are merged by their
    log-sum-exp, and the backward of a flash kernel, given the merged output and log-sum-exp, is its exact share of the gradient."""

    @staticmethod
    def forward(ctx, q, k, v, plan):
        if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
            out, lse = cuda_flash(q, k, v, *plan.own[:1] * 2, *plan.own[1:] * 2, plan.causal)
            n = plan.prompt_tokens
            if plan.prefix and n < len(q):
                far, far_lse = cuda_flash(q[n:], k[:n], v[:n], *plan.shared, False)
                merge(out[n:], lse[:, n:], far, far_lse)
        else:
            out, lse = torch.empty_like(q), q.new_empty(q.shape[1], len(q), dtype=torch.float32)
            for rows, keys, n, causal, own in plan.pieces:
                o, log_sum = flash(batched(q[rows], n), batched(k[keys], n), batched(v[keys], n), causal)
                o, log_sum = o.transpose(1, 2).flatten(0, 1), log_sum.transpose(0, 1).flatten(1)     # (rows, H, hd), (H, rows)
                if own:
                    out[rows], lse[:, rows] = o, log_sum
                else:
                    merge(out[rows], lse[:, rows], o, log_sum)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.plan = plan
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, out, lse = ctx.saved_tensors
        plan, grad = ctx.plan, grad.contiguous()
        if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
            dq, dk, dv = cuda_flash_backward(grad, q, k, v, out, lse, *plan.own[:1] * 2, *plan.own[1:] * 2, plan.causal)
            n = plan.prompt_tokens
            if plan.prefix and n < len(q):
                far = cuda_flash_backward(grad[n:], q[n:], k[:n], v[:n], out[n:], lse[:, n:].contiguous(), *plan.shared, False)
                for total, share in zip((dq[n:], dk[:n], dv[:n]), far):
                    total += share
            return dq, dk, dv, None
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for rows, keys, n, causal, _ in plan.pieces:
            shares = flash_backward(*(batched(x, n) for x in (grad[rows], q[rows], k[keys], v[keys], out[rows])),
                                    lse[:, rows].unflatten(1, (n, -1)).transpose(0, 1), causal)
            for total, where, share in zip((dq, dk, dv), (rows, keys, keys), shares):
                total[where] += share.transpose(1, 2).flatten(0, 1)
        return dq, dk, dv, None


def batched(x, n):
    """(n * L, H, hd) -> (n, H, L, hd)"""
    return x.unflatten(0, (n, -1)).transpose(1, 2)


def merge(out, lse, far, far_lse):
    """Join attention over other keys, far (rows, H, hd) and far_lse (H, rows), into out and lse, in place."""
    total = torch.logaddexp(lse, far_lse)
    near_share, far_share = ((x - total).exp().transpose(0, 1)[..., None] for x in (lse, far_lse))
    out.copy_(out * near_share + far * far_share)
    lse.copy_(total)


def flash(q, k, v, causal):
    """q (S, H, L, hd), k and v (S, KV, M, hd) -> out like q, log-sum-exp (S, H, L) float32."""
    if q.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal)
    return plain(q, k, v, causal)


def flash_backward(grad, q, k, v, out, lse, causal):
    """Gradients of q, k, v, where out and lse are those over everything that the queries see, these keys and others."""
    if q.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(grad, q, k, v, out, lse, 0.0, causal)
    return plain_backward(grad, q, k, v, out, lse, causal)


def plain(q, k, v, causal):
    """The same spelled out: for devices and dtypes without a kernel, and to test the kernels against."""
    scores = scored(q, k, causal)
    return (scores.softmax(-1) @ v.float().repeat_interleave(q.shape[1] // v.shape[1], 1)).to(q.dtype), scores.logsumexp(-1)


def plain_backward(grad, q, k, v, out, lse, causal):
    H, KV = q.shape[1], k.shape[1]
    p = (scored(q, k, causal) - lse[..., None]).exp()                                                 # softmax over everything seen
    k_full, v_full = (x.float().repeat_interleave(H // KV, 1) for x in (k, v))
    ds = p * (grad.float() @ v_full.transpose(2, 3) - (grad * out).float().sum(-1, keepdim=True)) * q.shape[-1] ** -0.5
    dk, dv = ((x.transpose(2, 3) @ y.float()).unflatten(1, (KV, -1)).sum(2) for x, y in ((ds, q), (p, grad)))
    return (ds @ k_full).to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def scored(q, k, causal):
    scores = q.float() @ k.float().repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(2, 3) * q.shape[-1] ** -0.5
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1), -torch.inf)
    return scores


def cuda_flash(q, k, v, cu_q, cu_k, max_q, max_k, causal):
    """The variable-length kernel: q (N, H, hd), k and v (M, KV, hd), boundaries int32 -> out like q, log-sum-exp (H, N)."""
    return torch.ops.aten._flash_attention_forward(q, k, v, cu_q, cu_k, max_q, max_k, 0.0, causal, False)[:2]


def cuda_flash_backward(grad, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, causal):
    no_dropout = torch.empty(2, dtype=torch.uint64, device=q.device)
    return torch.ops.aten._flash_attention_backward(grad, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, 0.0, causal, no_dropout, no_dropout)


# --------------------------------------------------------------------------------------------------------------- shared pieces

class RMSNorm(nn.Module):
    def __init__(self, width, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x):
        y = x.float()
        return self.weight * (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class MLP(nn.Module):
    def __init__(self, width, inner, bias):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(width, inner, bias), nn.Linear(width, inner, bias)
        self.down_proj = nn.Linear(inner, width, bias)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def rotate(x, cos, sin):
    """x (N, H, hd) turned by angles whose cos and sin are (N, hd / 2) float32; dimension i is paired with i + hd / 2."""
    a, b = x.float().chunk(2, -1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((torch.addcmul(a * cos, b, sin, value=-1), torch.addcmul(b * cos, a, sin)), -1).to(x.dtype)


# --------------------------------------------------------------------------------------------------------------- vision tower

class PatchEmbed(nn.Module):
    def __init__(self, c):
        super().__init__()
        side = (c.temporal_patch, c.patch, c.patch)
        self.proj = nn.Conv3d(c.channels, c.hidden, kernel_size=side, stride=side, bias=False)

    def forward(self, x):                                               # the patches do not overlap: a matrix product
        return F.linear(x.to(self.proj.weight.dtype), self.proj.weight.flatten(1))


class VisionAttention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.heads = c.heads
        self.qkv, self.proj = nn.Linear(c.hidden, 3 * c.hidden), nn.Linear(c.hidden, c.hidden)

    def forward(self, x, rotation, plan):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(1)                            # (N, H, hd) each
        return self.proj(attention(rotate(q, *rotation), rotate(k, *rotation), v, plan).flatten(1))


class VisionBlock(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.norm1, self.norm2 = RMSNorm(c.hidden, 1e-6), RMSNorm(c.hidden, 1e-6)
        self.attn, self.mlp = VisionAttention(c), MLP(c.hidden, c.intermediate, bias=True)

    def forward(self, x, rotation, plan):
        x = x + self.attn(self.norm1(x), rotation, plan)
        return x + self.mlp(self.norm2(x))


class Merger(nn.Module):
    def __init__(self, c):
        super().__init__()
        wide = c.hidden * c.merge ** 2
        self.ln_q, self.mlp = RMSNorm(c.hidden, 1e-6), nn.Sequential(nn.Linear(wide, wide), nn.GELU(), nn.Linear(wide, c.out))

    def forward(self, x):
        return self.mlp(self.ln_q(x).view(-1, self.mlp[0].in_features))


class VisionTower(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.config, self.checkpointing = c, False
        self.patch_embed, self.merger = PatchEmbed(c), Merger(c)
        self.blocks = nn.ModuleList(VisionBlock(c) for _ in range(c.depth))

    def layout(self, grids):
        """grids: list of (t, h, w) in patches -> order of the tokens by window, tokens of each window and each image, (h, w) of each patch.

        Patches come merge x merge at a time, row by row; windows are whole numbers of such blocks and may be cut at the right and lower
        edge. Each of the first three is counted in blocks (tokens); positions are (patches, 2), in block order."""
        m = self.config.merge
        side = self.config.window // self.config.patch // m                                           # window side in tokens
        order, windows, images, positions, first = [], [], [], [], 0
        for t, h, w in grids:
            y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
            blocks = torch.stack((y, x), -1).view(h // m, m, w // m, m, 2).transpose(1, 2).reshape(-1, 2)
            positions.append(blocks.repeat(t, 1))
            rows, cols = torch.meshgrid(torch.arange(h // m), torch.arange(w // m), indexing="ij")
            window = (rows // side * -(-(w // m) // side) + cols // side).flatten()
            for _ in range(t):                                                                        # frames do not see each other
                order.append(window.argsort(stable=True) + first)
                windows += window.bincount().tolist()
                images.append(len(window))
                first += len(window)
        return torch.cat(order), windows, images, torch.cat(positions)

    def forward(self, pixel_values, grids):
        """pixel_values (patches, channels * temporal * patch * patch), grids list of (t, h, w) -> (tokens of the language model, out)."""
        c, dev = self.config, pixel_values.device
        order, windows, images, positions = self.layout(grids)
        unit = c.merge ** 2
        order, quarter = order.to(dev), c.hidden // c.heads // 4
        inverse_frequency = 10000.0 ** -(torch.arange(quarter, device=dev) / quarter)
        angles = (positions.to(dev)[:, :, None] * inverse_frequency).flatten(1)                       # (patches, hd / 2), height first
        angles = angles.unflatten(0, (-1, unit))[order].flatten(0, 1)
        rotation = angles.cos(), angles.sin()
        x = self.patch_embed(pixel_values).unflatten(0, (-1, unit))[order].flatten(0, 1)
        within_window = Plan([n * unit for n in windows], causal=False, device=dev)
        within_image = Plan([n * unit for n in images], causal=False, device=dev)
        for i, block in enumerate(self.blocks):
            plan = within_image if i in c.full_blocks else within_window
            x = checkpoint(block, x, rotation, plan, use_reentrant=False) if self.checkpointing else block(x, rotation, plan)
        return self.merger(x)[order.argsort()]


# --------------------------------------------------------------------------------------------------------------- language model

class Attention(nn.Module):
    def __init__(self, c, index):
        super().__init__()
        self.head_dim, self.index = c.head_dim, index
        self.q_proj = nn.Linear(c.hidden, c.heads * c.head_dim)
        self.k_proj, self.v_proj = (nn.Linear(c.hidden, c.kv_heads * c.head_dim) for _ in range(2))
        self.o_proj = nn.Linear(c.heads * c.head_dim, c.hidden, bias=False)

    def forward(self, x, rotation, plan):
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        return self.o_proj(attention(rotate(q, *rotation), rotate(k, *rotation), v, plan, self.index).flatten(1))


class Layer(nn.Module):
    def __init__(self, c, index):
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(c.hidden, c.eps), RMSNorm(c.hidden, c.eps)
        self.self_attn, self.mlp = Attention(c, index), MLP(c.hidden, c.intermediate, bias=False)

    def forward(self, x, rotation, plan, rows=slice(None)):
        x = (x + self.self_attn(self.input_layernorm(x), rotation, plan))[rows]
        return x + self.mlp(self.post_attention_layernorm(x))


class LanguageModel(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.config, self.checkpointing = c, False
        # zeros: they come from a checkpoint or from toy/pretrain.py (and a random start on the meta device imports 70 MB of torch)
        self.embed_tokens = nn.Embedding.from_pretrained(torch.zeros(c.vocab, c.hidden), freeze=False)
        self.layers = nn.ModuleList(Layer(c, i) for i in range(c.layers))
        self.norm = RMSNorm(c.hidden, c.eps)

    def forward(self, x, positions, plan, rows=slice(None)):
        """x (N, D) embeddings, positions (3, N) of time, height, width -> (N, D) hidden states; of `rows` alone, where given."""
        half = self.config.head_dim // 2
        inverse_frequency = self.config.rope_theta ** -(torch.arange(half, device=x.device) / half)
        axis = torch.arange(3, device=x.device).repeat_interleave(torch.tensor(self.config.mrope_section, device=x.device))
        angles = positions[axis].T * inverse_frequency                                                # (N, hd / 2)
        rotation = angles.cos(), angles.sin()
        for layer in self.layers:
            args = x, rotation, plan, rows if layer is self.layers[-1] else slice(None)               # no other row is read behind it
            x = checkpoint(layer, *args, use_reentrant=False) if self.checkpointing else layer(*args)
        return self.norm(x)


def positions(input_ids, grids, image_id, merge):
    """M-RoPE positions of one sequence: (T,) ids, its images' (t, h, w) in patches -> (3, T) time, height, width. A pure function.

    Text counts on, the same on all axes; an image's tokens lie on a grid that begins where the text stopped, and the text goes on behind
    the grid's longer side."""
    ids, out, i, start = input_ids.tolist(), [], 0, 0
    grids = iter(grids)
    while i < len(ids):
        if ids[i] == image_id:
            t, h, w = (n // d for n, d in zip(next(grids, (0, 0, 0)), (1, merge, merge)))
            if t * h * w == 0 or ids[i:i + t * h * w] != [image_id] * (t * h * w):
                raise ValueError(f"the image tokens from place {i} on do not match image_grid_thw: {t} x {h} x {w} were expected")
            out.append(torch.cartesian_prod(torch.arange(t), torch.arange(h), torch.arange(w)).view(-1, 3).T + start)
            i, start = i + t * h * w, start + max(h, w)
        else:
            n = next((n for n, token in enumerate(ids[i:]) if token == image_id), len(ids) - i)
            out.append((torch.arange(n) + start).expand(3, n))
            i, start = i + n, start + n
    if next(grids, None) is not None:
        raise ValueError("there are more images in image_grid_thw than in the tokens")
    return torch.cat(out, 1).to(input_ids.device)


# --------------------------------------------------------------------------------------------------------------- the whole model

class QwenVL(nn.Module):
    """Qwen2.5-VL for grounding. `stop_ids` end a completion; `banned` (V,) bool are ids that can't be sampled (image, video and vision
    markers, ids without a text): they have no probability in sampling and none in scoring."""

    def __init__(self, config):
        super().__init__()
        self.config, self.stored_dtype = config, torch.bfloat16
        self.visual, self.model = VisionTower(config.vision), LanguageModel(config)
        self.lm_head = nn.Linear(config.hidden, config.vocab, bias=False)
        self.tie()
        self.set_vocabulary({})

    def tie(self):
        if self.config.tied:
            self.lm_head.weight = self.model.embed_tokens.weight

    def set_vocabulary(self, token_ids):
        """token_ids: text -> id of all tokens of the tokenizer; empty where only config.json is known."""
        named = [token_ids.get(t) for t in ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")]
        banned = torch.ones(self.config.vocab, dtype=torch.bool) if token_ids else torch.zeros(self.config.vocab, dtype=torch.bool)
        banned[[i for i in token_ids.values() if i < self.config.vocab]] = False
        banned[[i for i in (*named, *self.config.marker_ids) if i is not None and i < self.config.vocab]] = True
        stops = [token_ids[t] for t in ("<|im_end|>", "<|endoftext|>") if t in token_ids]
        self.banned, self.stop_ids = banned, tuple(stops) or self.config.stop_ids

    @property
    def device(self):
        return self.model.norm.weight.device

    def embed(self, input_ids, pixel_values, grids):
        """(N,) packed ids with the images' patches -> (N, D): an image token's embedding is its row of the vision tower."""
        x = self.model.embed_tokens(input_ids)
        if pixel_values is not None and len(pixel_values):
            few = len(pixel_values) if torch.is_grad_enabled() else PATCHES_AT_ONCE
            images, begin, patches = [], 0, list(itertools.accumulate((t * h * w for t, h, w in grids), initial=0))
            if patches[-1] != len(pixel_values):
                raise ValueError(f"pixel_values has {len(pixel_values)} patches, image_grid_thw {patches[-1]}")
            for end in range(1, len(patches)):                           # one pass where it is kept for the gradient, else small ones
                if patches[end] - patches[begin] >= few or end == len(grids):
                    images.append(self.visual(pixel_values[patches[begin]:patches[end]].to(self.device), grids[begin:end]))
                    begin = end
            images = torch.cat(images)
            where = input_ids == self.config.image_id
            x = x.masked_scatter(where[:, None], images.to(x.dtype))
        return x

    def forward(self, input_ids, attention_mask=None, pixel_values=None, image_grid_thw=None):
        """(B, T) ids and mask (padding on either side) -> (B, T, V) logits in the compute dtype, 0 at padding. Arguments as in
        transformers; the images of all rows lie one behind the other in pixel_values (patches, D) and image_grid_thw (images, 3)."""
        mask = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        grids = [] if image_grid_thw is None else [tuple(g) for g in image_grid_thw.tolist()]
        merge, rows, place = self.config.vision.merge, [], 0
        for ids in (row[keep] for row, keep in zip(input_ids, mask)):
            left, n = int((ids == self.config.image_id).sum()), place
            while left > 0 and n < len(grids):
                left, n = left - grids[n][0] * grids[n][1] * grids[n][2] // merge ** 2, n + 1
            rows.append(positions(ids, grids[place:n], self.config.image_id, merge))
            place = n
        if place < len(grids):
            raise ValueError("there are more images in image_grid_thw than in the tokens")
        plan = Plan(mask.sum(1).tolist(), device=self.device)
        hidden = self.model(self.embed(input_ids[mask], pixel_values, grids), torch.cat(rows, 1), plan)
        logits = hidden.new_zeros(*input_ids.shape, self.config.vocab)
        logits[mask] = self.lm_head(hidden)
        return logits

    def pack(self, prompts):
        """Q prompts -> packed embeddings (N, D), positions (3, N), lengths. The vision tower runs once for all of them."""
        ids = torch.cat([p.input_ids for p in prompts]).to(self.device)
        grids = [[tuple(g) for g in p.image_grid_thw.tolist()] for p in prompts]
        where = torch.cat([positions(p.input_ids, g, self.config.image_id, self.config.vision.merge) for p, g in zip(prompts, grids)], 1)
        x = self.embed(ids, torch.cat([p.pixel_values for p in prompts]), sum(grids, []))
        return x, where.to(self.device), [len(p.input_ids) for p in prompts]

    def prefill(self, prompts, group, max_new_tokens):
        """Q prompts -> logits (Q, V) of the first new token, a Cache for G rollouts each, the position (Q,) of that token."""
        x, where, lengths = self.pack(prompts)
        plan = Plan(lengths, kept=[], device=self.device)
        last = torch.tensor(lengths, device=self.device).cumsum(0) - 1
        hidden = self.model(x, where, plan, last)
        first = torch.stack([p.max() + 1 for p in where.split(lengths, 1)])
        return self.lm_head(hidden), Cache(plan.kept, lengths, group, max_new_tokens), first

    def decode(self, tokens, position, cache):
        """One more token of every rollout: tokens (R,), position (R,) -> logits (R, V) of the token behind it."""
        hidden = self.model(self.model.embed_tokens(tokens), position.expand(3, -1), cache)
        cache.filled += 1
        cache.at += 1
        return self.lm_head(hidden)

    def score(self, prompts, completions, temperature=1.0):
        """Log-probabilities of completions, with gradient; every prompt and image is computed once for its whole group.

        prompts: Q of Prompt; completions: Q lists of G (L,) long tensors, end-of-turn included; unequal lengths are fine.
        -> logp (tokens,) and entropy (tokens,), float32, packed by question, rollout, token; the entropy carries no gradient."""
        x, where, lengths = self.pack(prompts)
        dev, N = self.device, len(x)
        first = [int(p.max()) + 1 for p in where.split(lengths, 1)]
        flat = [(q, c.to(dev)) for q, group in enumerate(completions) for c in group]
        fed = torch.cat([c[:-1] for _, c in flat])                                                    # nothing follows the last token
        along = torch.cat([first[q] + torch.arange(len(c) - 1, device=dev) for q, c in flat])
        seen = [sum(len(c) - 1 for c in group) for group in completions]
        plan = Plan(lengths + [len(c) - 1 for _, c in flat], prefix=zip(lengths, seen), device=dev)
        x = torch.cat((x, self.model.embed_tokens(fed).to(x.dtype)))
        ends, starts = list(itertools.accumulate(lengths)), itertools.accumulate((len(c) - 1 for _, c in flat), initial=N)
        rows = torch.cat([torch.tensor([ends[q] - 1, *range(start, start + len(c) - 1)]) for (q, c), start in zip(flat, starts)])
        hidden = self.model(x, torch.cat((where, along.expand(3, -1)), 1), plan, rows.to(dev))
        return self.log_probabilities(hidden, torch.cat([c for _, c in flat]), temperature)

    def distribution(self, logits, temperature):
        """(..., V) logits -> log-probabilities in float32 at this temperature, over the ids that can be sampled."""
        return (logits.float() / temperature).masked_fill(self.banned.to(logits.device), NEVER).log_softmax(-1)

    def log_probabilities(self, hidden, targets, temperature):
        """hidden (n, D), targets (n,) -> logp (n,), entropy (n,). Logits exist for one chunk at a time, forward and backward."""
        def chunk(hidden, targets):
            logp = self.distribution(self.lm_head(hidden), temperature)
            with torch.no_grad():
                entropy = -(logp.exp() * logp).sum(-1)
            return logp.gather(-1, targets[:, None])[:, 0], entropy
        size = max(1, LOGITS_PER_CHUNK // self.config.vocab)
        parts = [checkpoint(chunk, h, t, use_reentrant=False) if torch.is_grad_enabled() else chunk(h, t)
                 for h, t in zip(hidden.split(size), targets.split(size))]
        logp, entropy = zip(*parts)
        return torch.cat(logp), torch.cat(entropy)

    # ----------------------------------------------------------------------------------------------------------- checkpoints

    @classmethod
    def from_pretrained(cls, path, dtype=torch.bfloat16, device="cpu"):
        """A checkpoint folder in hub layout (or a stage's folder: its newest step). dtype None keeps the stored one. Strict: a tensor
        that is missing, unexpected or of another shape is a CheckpointError that names it. Tensors are memory-mapped, not read twice."""
        path = folder(path)
        with torch.device("meta"):
            model = cls(Config.from_json(path / "config.json"))
        wanted = {name: p.shape for name, p in model.state_dict().items()}
        if model.config.tied:
            wanted.pop("lm_head.weight")
        found, surplus = {}, {}
        for file in weight_files(path):
            try:
                with safe_open(file, "pt") as tensors:
                    for name in tensors.keys():
                        shape = tuple(tensors.get_slice(name).get_shape())
                        if name in wanted and shape != tuple(wanted[name]):
                            raise CheckpointError(f"{file}: {name} is {shape}, but config.json asks for {tuple(wanted[name])}")
                        tensor = read(tensors, name, dtype)
                        if name == "model.embed_tokens.weight":
                            model.stored_dtype = tensors.get_slice(name)[:0].dtype
                        (found if name in wanted else surplus)[name] = tensor.to(device)
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{file}: not a whole safetensors file ({error}); download it again") from None
        copy = surplus.pop("lm_head.weight", None) if model.config.tied else None
        if copy is not None and not torch.equal(copy, found.get("model.embed_tokens.weight", copy[:0])):
            raise CheckpointError(f"{path}: lm_head.weight differs from embed_tokens, but config.json says that they are tied")
        for what, names in (("missing", wanted.keys() - found.keys()), ("not expected", surplus.keys())):
            if names:
                some = ", ".join(sorted(names)[:3]) + (" ..." if len(names) > 3 else "")
                raise CheckpointError(f"{path}: {len(names)} tensors are {what}: {some}")
        model.load_state_dict(found, strict=False, assign=True)
        model.tie()
        model.set_vocabulary(read_token_ids(path))
        return model

    def check_processor(self, processor):
        """A Processor that cuts other patches or speaks in other ids than this model's is a CheckpointError that names the files."""
        vision, where = self.config.vision, processor.source
        for name, there, here in (("patch_size", processor.patch, vision.patch), ("merge_size", processor.merge, vision.merge),
                                  ("temporal_patch_size", processor.temporal_patch, vision.temporal_patch)):
            if there != here:
                raise CheckpointError(f"{where / 'preprocessor_config.json'}: {name} is {there}, but config.json asks for {here}; take "
                                      "both files from one checkpoint")
        image, last = processor.ids["<|image_pad|>"], max(processor.tokenizer.get_vocab().values())
        if image != self.config.image_id or last >= self.config.vocab:
            raise CheckpointError(f"{where}: the tokenizer is another model's: its <|image_pad|> is {image}, its last id {last}, but "
                                  f"config.json says {self.config.image_id} and {self.config.vocab} ids; take both from one checkpoint")

    def save_pretrained(self, path, tensors=None, shard_bytes=5 * 10 ** 9):
        """Writes config.json and safetensors in hub layout, in the checkpoint's own dtype. tensors: (name, tensor) pairs to write
        instead of the model's own, where those are sharded over processes."""
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        (path / "config.json").write_text(json.dumps(self.config.raw, indent=2) + "\n", encoding="utf-8")
        shards, size = [{}], 0
        for name, tensor in self.state_dict().items() if tensors is None else tensors:
            if name == "lm_head.weight" and self.config.tied:
                continue
            tensor = tensor.detach().to("cpu", self.stored_dtype).contiguous()
            if shards[-1] and size + tensor.nbytes > shard_bytes:
                shards, size = [*shards, {}], 0
            shards[-1][name] = tensor
            size += tensor.nbytes
        n = len(shards)
        names = [f"model-{i:05d}-of-{n:05d}.safetensors" for i in range(1, n + 1)] if n > 1 else ["model.safetensors"]
        for name, shard in zip(names, shards):
            save_file(shard, path / name, metadata={"format": "pt"})
        if shards[1:]:
            index = {"metadata": {"total_size": sum(t.nbytes for s in shards for t in s.values())},
                     "weight_map": {key: name for name, shard in zip(names, shards) for key in shard}}
            (path / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def newest_step(path):
    """A stage's folder -> its newest step; a checkpoint's folder, and any other path -> itself."""
    path = Path(path)
    return path if (path / "config.json").exists() or not (path / "latest").exists() else path / "latest"


def folder(path):
    """A checkpoint folder: the path itself, or the newest step of a stage's folder. CheckpointError where there is none."""
    path = Path(path)
    here = newest_step(path)
    if not (here / "config.json").exists():
        raise CheckpointError(f"no checkpoint at {path}: neither {path / 'config.json'} nor {path / 'latest' / 'config.json'} is there")
    return here


def read(tensors, name, dtype):
    """One tensor of an open safetensors file in this dtype (None: its own); converted piece by piece, so that it never exists twice."""
    part = tensors.get_slice(name)
    shape = part.get_shape()
    if not shape or dtype in (None, part[:0].dtype):
        return tensors.get_tensor(name).to(dtype=dtype)
    out = torch.empty(shape, dtype=dtype)
    rows = max(1, 2 ** 22 * shape[0] // max(1, out.numel()))
    for i in range(0, shape[0], rows):
        out[i:i + rows] = part[i:i + rows]
    return out


def weight_files(path):
    """The safetensors files of a checkpoint folder: one, or the shards that its index names."""
    index = path / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if not (path / names[0]).exists() and index.exists():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{index}: not a readable index ({error})") from None
    for name in names:
        if os.path.basename(name) != name or not (path / name).is_file():
            raise CheckpointError(f"no weights at {path / name}; a checkpoint is model.safetensors, or an index and the shards it names")
    return [path / name for name in names]


def read_token_ids(path):
    """Token text -> id, from tokenizer.json or from vocab.json and tokenizer_config.json in a checkpoint folder; {} without them."""
    def read(name):
        return json.loads((path / name).read_text(encoding="utf-8")) if (path / name).exists() else {}
    try:
        tokenizer = read("tokenizer.json")
        if tokenizer:
            return {**tokenizer["model"]["vocab"], **{t["content"]: t["id"] for t in tokenizer.get("added_tokens", [])}}
        added = read("tokenizer_config.json").get("added_tokens_decoder", {})
        return {**read("vocab.json"), **{t["content"]: int(i) for i, t in added.items()}} if (path / "vocab.json").exists() else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        files = "tokenizer.json is" if (path / "tokenizer.json").exists() else "vocab.json or tokenizer_config.json is"
        raise CheckpointError(f"{path}: {files} not a tokenizer's ({error}); copy it again from where the weights came from") from None
