"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL from their safetensors: vision tower, language model,
checkpoints in and out.

The three families are one language model and one vision tower. Where one of them departs
from the others, its name stands: a search for "Qwen2-VL" and "Qwen3-VL" finds every
difference.

Tokens are packed, (N, D), everywhere: the sequences of a batch lie one behind the
other, and no padding is computed. A `Plan` says what may see what (attention.py has a
drawing); a layer is norm, attention, norm, MLP and knows nothing of batches. Two steps
serve everything: prompts are prefilled, and completions extend them, with gradient
(`score`) or without (`prefill`, `decode`; see generate.py). So sampled and scored
log-probabilities agree.

Shapes: N packed tokens, D width, H heads, KV key-value heads, hd head width, Q prompts,
G rollouts of a prompt, R = Q * G rollouts, V vocabulary.
Source: the reports on Qwen2-VL (arXiv 2409.12191), Qwen2.5-VL (arXiv 2502.13923) and
Qwen3-VL (arXiv 2511.21631), and the released checkpoints; module names are the
checkpoint's names.
"""
from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qwen.attention import Cache, Plan, Rows, attention, cumulative, to_device
from qwen.hub import (
    ADAPTER_CONFIG,
    FAMILIES,
    STOP_TOKENS,
    UNREADABLE,
    VISION_MARKERS,
    WEIGHT_INDEX,
    CheckpointError,
    base_folder,
    folder,
    nested_name,
    object_in,
    own_name,
    read_config,
    read_tensor,
    read_token_ids,
    refuse,
    refuse_other_names,
    refuse_other_values,
    shard_index,
    tensor_bytes,
    weight_files,
    write_json,
    write_tensors,
)
from qwen.processor import Prompt

# Logit of an id that must not be sampled. It is finite, so that 0 * log 0 stays 0.
NEVER = -1e30
# Logits alive at once in `score` (float32: 0.1 GB). Without a limit memory would grow
# with tokens x vocabulary.
LOGITS_PER_CHUNK = 2 ** 25
# On CUDA more (1 GB): the head's gradient is a bfloat16 sum over the chunks, and rounded in each.
CUDA_LOGITS_PER_CHUNK = 2 ** 28
# Patches in a pass of the vision tower without gradient: more do not make it faster, but larger.
PATCHES_AT_ONCE = 2048
# On CUDA they do: fewer kernels are launched, and the host waits once a pass (1.3 GB at the
# widths of 3B).
CUDA_PATCHES_AT_ONCE = 2 ** 15
Grid = tuple[int, int, int]               # an image's frames, rows and columns, in patches
Rotation = tuple[Tensor, Tensor]          # cos and signed sin of rotary angles, (N, 1, hd) each
ALL_ROWS = slice(None)
# Beyond every checkpoint's numbers: such are a damaged file's. A tensor of sizes below them has
# a number of bytes that 64 bits can hold, so that its shape can be told from the stored one.
MOST = {
    "layers": 1000, "depth": 1000, "channels": 64, "patch": 64, "temporal_patch": 64, "merge": 64,
    **dict.fromkeys(("vocab", "image_id", "video_id", "marker_ids", "stop_ids"), 2 ** 22)}
MOST_OF_OTHERS = 2 ** 18
# Fields that count from 0, or are 0 in the families that have nothing of the kind.
FROM_ZERO = (
    "image_id", "video_id", "marker_ids", "stop_ids", "full_blocks", "deepstack", "window",
    "table_side")


@dataclass(frozen=True)
class VisionConfig:
    family: str                   # one of FAMILIES
    depth: int
    hidden: int
    heads: int
    intermediate: int
    out: int
    channels: int
    patch: int                    # side in pixels
    temporal_patch: int           # frames
    merge: int                    # merge x merge patches become one token of the language model
    window: int                   # pixels; patches attend within windows of this side ...
    full_blocks: tuple[int, ...]  # ... but in these blocks, where they see their whole frame
    # Qwen3-VL alone: the side of its square table of learned positions, and the blocks whose
    # output the language model's first layers receive as well.
    table_side: int = 0
    deepstack: tuple[int, ...] = ()

    @classmethod
    def from_dict(cls, vision: dict[str, Any], family: str) -> VisionConfig:
        """From config.json's `vision_config`; KeyError where a field is missing."""
        blocks = range(vision["depth"])
        if family == "Qwen2-VL":
            # Its hidden_size is the language model's width. It has no windows.
            hidden = vision["embed_dim"]
            own = {"intermediate": int(hidden * vision.get("mlp_ratio", 4)),
                   "out": vision["hidden_size"], "window": 0, "full_blocks": tuple(blocks)}
        else:
            hidden = vision["hidden_size"]
            own = {"intermediate": vision["intermediate_size"], "out": vision["out_hidden_size"]}
        if family == "Qwen2.5-VL":
            own |= {"window": vision["window_size"],
                    "full_blocks": tuple(vision["fullatt_block_indexes"])}
        if family == "Qwen3-VL":
            # It has no windows either.
            own |= {"window": 0, "full_blocks": tuple(blocks),
                    "table_side": math.isqrt(vision["num_position_embeddings"]),
                    "deepstack": tuple(vision["deepstack_visual_indexes"])}
        return cls(
            family=family,
            depth=vision["depth"],
            hidden=hidden,
            heads=vision["num_heads"],
            channels=vision.get("in_channels", vision.get("in_chans", 3)),
            patch=vision.get("patch_size", 16 if family == "Qwen3-VL" else 14),
            temporal_patch=vision.get("temporal_patch_size", 2),
            merge=vision.get("spatial_merge_size", 2),
            **own)


@dataclass(frozen=True)
class Config:
    """What config.json says, from the hub (flat, `rope_scaling`) or as transformers
    writes it (`text_config`, `rope_parameters`)."""
    family: str                     # one of FAMILIES
    vocab: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    eps: float
    rope_theta: float
    # Frequencies rotated by the time, height and width position; they sum to head_dim / 2.
    mrope_section: tuple[int, ...]
    attention_bias: bool            # of queries, keys and values
    tied: bool                      # the head is the embedding
    image_id: int
    video_id: int | None
    marker_ids: tuple[int, ...]     # image, video and vision markers: never sampled
    stop_ids: tuple[int, ...]
    vision: VisionConfig
    raw: dict[str, Any] = field(repr=False, compare=False)

    @classmethod
    def from_json(cls, path: str | Path) -> Config:
        """From a config.json; CheckpointError where it is another model's or not whole."""
        raw = read_config(path)
        whose = f"the config.json of a {FAMILIES[raw['model_type']]} checkpoint"
        try:
            text = object_in(raw, "text_config") or raw
            # transformers prefers the older name, too.
            rope = object_in(text, "rope_scaling") or object_in(text, "rope_parameters")
            refuse_other_values(path, raw, text)
            config = cls.from_dicts(raw, text, rope)
            check_numbers(config)
        except KeyError as error:
            raise CheckpointError(f"{path}: {error} is missing; is this {whose}?") from None
        except UNREADABLE as error:
            raise CheckpointError(f"{path}: not {whose} ({error})") from None
        if sum(config.mrope_section) * 2 != config.head_dim:
            raise CheckpointError(
                f"{path}: mrope_section {config.mrope_section} is not half the head width "
                f"{config.head_dim}")
        return config

    @classmethod
    def from_dicts(
            cls, raw: dict[str, Any], text: dict[str, Any],
            rope: dict[str, Any]) -> Config:
        """raw: the whole of config.json; text: its part on the language model; rope: of
        that, the part on positions. KeyError where a field is missing."""
        family = FAMILIES[raw["model_type"]]
        hidden = text["hidden_size"]
        heads = text["num_attention_heads"]
        vision = VisionConfig.from_dict(object_in(raw, "vision_config"), family)
        eos = text.get("eos_token_id", raw.get("eos_token_id"))
        stop_ids = [] if eos is None else [eos] if isinstance(eos, int) else eos
        kinds = ("image", "video", "vision", "vision_start", "vision_end")
        marker_ids = [raw.get(f"{kind}_token_id") for kind in kinds]
        return cls(
            family=family,
            vocab=text["vocab_size"],
            hidden=hidden,
            layers=text["num_hidden_layers"],
            heads=heads,
            kv_heads=text["num_key_value_heads"],
            head_dim=text.get("head_dim") or (128 if family == "Qwen3-VL" else hidden // heads),
            intermediate=text["intermediate_size"],
            eps=text.get("rms_norm_eps", 1e-6 if family == "Qwen3-VL" else 1e-5),
            rope_theta=rope.get("rope_theta") or text.get("rope_theta") or (
                5e5 if family == "Qwen3-VL" else 1e6),
            mrope_section=tuple(rope["mrope_section"]),
            attention_bias=text.get("attention_bias", False) if family == "Qwen3-VL" else True,
            tied=raw.get("tie_word_embeddings") or text.get("tie_word_embeddings") or False,
            image_id=raw["image_token_id"],
            video_id=raw.get("video_token_id"),
            marker_ids=tuple(i for i in marker_ids if i is not None),
            stop_ids=tuple(stop_ids),
            vision=vision,
            raw=raw)


def check_numbers(config: Config | VisionConfig) -> None:
    """ValueError where a field is of another type, or numbers do not go together."""
    for one in fields(config):
        value = getattr(config, one.name)
        if value is None and "None" in one.type:
            continue
        whole = value if isinstance(value, tuple) else (value,)
        most = MOST.get(one.name, MOST_OF_OTHERS)
        least = 0 if one.name in FROM_ZERO else 1
        if "int" in one.type:
            fits = all(type(i) is int and least <= i <= most for i in whole)
        elif one.type == "float":
            fits = type(value) in (int, float) and 0 < value < 1e30
        else:
            fits = type(value) is bool or one.type != "bool"
        if not fits:
            raise ValueError(f"{one.name} is {value!r}")
    if isinstance(config, VisionConfig):
        windows = any(block not in config.full_blocks for block in range(config.depth))
        fits = (config.hidden % (4 * config.heads) == 0
                and all(block < config.depth for block in config.deepstack)
                and (config.window >= config.patch * config.merge or not windows))
    else:
        check_numbers(config.vision)
        fits = (config.heads % config.kv_heads == 0 and len(config.mrope_section) == 3
                and config.image_id < config.vocab and config.vision.out == config.hidden)
    if not fits:
        raise ValueError("its numbers do not go together")


# ----------------------------------------------------------------------- layers of both parts

class RMSNorm(nn.Module):
    """In float32, whatever comes in."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class MLP(nn.Module):
    def __init__(self, width: int, inner: int, bias: bool) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias)
        self.up_proj = nn.Linear(width, inner, bias)
        self.down_proj = nn.Linear(inner, width, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def rotation_by(angles: Tensor) -> Rotation:
    """(N, hd / 2) rotary angles -> what `rotate` takes.

    Dimension i is paired with i + hd / 2, and (a, b) turns to (a cos - b sin, b cos + a sin)."""
    cos = angles.cos()
    sin = angles.sin()
    return torch.cat((cos, cos), -1)[:, None], torch.cat((-sin, sin), -1)[:, None]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (N, heads, hd) turned by a `Rotation`, in float32."""
    y = x.float()
    partner = y.roll(y.shape[-1] // 2, -1)
    return (y * cos).addcmul_(partner, sin).to(x.dtype)


# ------------------------------------------------------------------------------ vision tower

class PatchEmbed(nn.Module):
    def __init__(self, c: VisionConfig) -> None:
        super().__init__()
        side = (c.temporal_patch, c.patch, c.patch)
        self.proj = nn.Conv3d(
            c.channels, c.hidden, kernel_size=side, stride=side, bias=c.family == "Qwen3-VL")

    def forward(self, x: Tensor) -> Tensor:
        # The patches do not overlap, so the checkpoint's convolution is a matrix product.
        weight = self.proj.weight
        return F.linear(x.to(weight.dtype), weight.flatten(1), self.proj.bias)


def vision_norm(c: VisionConfig) -> nn.Module:
    """Qwen2-VL and Qwen3-VL take the mean off as well, and add a bias."""
    if c.family == "Qwen2.5-VL":
        return RMSNorm(c.hidden, 1e-6)
    return nn.LayerNorm(c.hidden, 1e-6)


class Qwen2VisionMLP(nn.Module):
    """Qwen2-VL's, without a gate; GELU is x sigmoid(1.702 x) (arXiv 1606.08415, section 2)."""

    def __init__(self, c: VisionConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(c.hidden, c.intermediate)
        self.fc2 = nn.Linear(c.intermediate, c.hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        return self.fc2(x * torch.sigmoid(1.702 * x))


class Qwen3VisionMLP(nn.Module):
    """Qwen3-VL's, without a gate; GELU is the one with tanh (arXiv 1606.08415, section 2)."""

    def __init__(self, c: VisionConfig) -> None:
        super().__init__()
        self.linear_fc1 = nn.Linear(c.hidden, c.intermediate)
        self.linear_fc2 = nn.Linear(c.intermediate, c.hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_fc2(F.gelu(self.linear_fc1(x), approximate="tanh"))


def vision_mlp(c: VisionConfig) -> nn.Module:
    if c.family == "Qwen2-VL":
        return Qwen2VisionMLP(c)
    if c.family == "Qwen3-VL":
        return Qwen3VisionMLP(c)
    return MLP(c.hidden, c.intermediate, bias=True)


class VisionAttention(nn.Module):
    def __init__(self, c: VisionConfig) -> None:
        super().__init__()
        self.heads = c.heads
        self.qkv = nn.Linear(c.hidden, 3 * c.hidden)
        self.proj = nn.Linear(c.hidden, c.hidden)

    def forward(self, x: Tensor, rotation: Rotation, plan: Plan) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3 * self.heads, -1))                  # (N, 3 * H, hd)
        qk, v = qkv.split((2 * self.heads, self.heads), 1)
        q, k = rotate(qk, *rotation).split(self.heads, 1)
        out = attention(q, k, v, plan)
        return self.proj(out.flatten(1))


class VisionBlock(nn.Module):
    def __init__(self, c: VisionConfig) -> None:
        super().__init__()
        self.norm1 = vision_norm(c)
        self.norm2 = vision_norm(c)
        self.attn = VisionAttention(c)
        self.mlp = vision_mlp(c)

    def forward(self, x: Tensor, rotation: Rotation, plan: Plan) -> Tensor:
        x = x + self.attn(self.norm1(x), rotation, plan)
        return x + self.mlp(self.norm2(x))


class Merger(nn.Module):
    """merge x merge patches, which lie one behind the other, become one token."""

    def __init__(self, c: VisionConfig) -> None:
        super().__init__()
        wide = c.hidden * c.merge ** 2
        self.ln_q = vision_norm(c)
        self.mlp = nn.Sequential(nn.Linear(wide, wide), nn.GELU(), nn.Linear(wide, c.out))

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.ln_q(x).view(-1, self.mlp[0].in_features))


class Qwen3Merger(nn.Module):
    """Qwen3-VL's Merger, by other names; normalised behind the join for deepstack."""

    def __init__(self, c: VisionConfig, deepstack: bool) -> None:
        super().__init__()
        self.wide = c.hidden * c.merge ** 2
        self.norm = nn.LayerNorm(self.wide, 1e-6) if deepstack else vision_norm(c)
        self.linear_fc1 = nn.Linear(self.wide, self.wide)
        self.linear_fc2 = nn.Linear(self.wide, c.out)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x.view(-1, *self.norm.normalized_shape)).view(-1, self.wide)
        return self.linear_fc2(F.gelu(self.linear_fc1(x)))


@dataclass(frozen=True)
class FrameLayout:
    """Where the patches of one frame lie, and how its windows cut it."""
    patch_positions: Tensor       # (patches, 2): row and column, in the order of pixel_values
    token_order: Tensor           # (tokens,): the frame's tokens, window by window
    window_tokens: list[int]      # tokens of each window, in that order


def frame_layout(height: int, width: int, c: VisionConfig) -> FrameLayout:
    """Layout of a frame of height x width patches.

    pixel_values has the patches of a token one behind the other, merge x merge of them,
    and the tokens row by row. Windows are whole numbers of tokens, so a window is named
    by token; those at the right and lower edge may be cut."""
    m = c.merge
    # Row and column of every patch, brought into the order of pixel_values: the token's
    # row, the token's column, then row and column within the token.
    row, column = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    grid = torch.stack((row, column), -1).view(height // m, m, width // m, m, 2)
    patch_positions = grid.transpose(1, 2).reshape(-1, 2)
    # The number of each token's window; windows count row by row. Qwen2-VL and Qwen3-VL have
    # none: the frame is one.
    side = c.window // c.patch // m if c.window else max(height, width)    # in tokens
    windows_a_row = -(-(width // m) // side)
    row, column = torch.meshgrid(
        torch.arange(height // m), torch.arange(width // m), indexing="ij")
    window = (row // side * windows_a_row + column // side).flatten()      # (tokens,)
    # A stable sort by window makes each window's tokens neighbours and leaves them row
    # by row.
    return FrameLayout(
        patch_positions=patch_positions,
        token_order=window.argsort(stable=True),
        window_tokens=window.bincount().tolist())


class VisionTower(nn.Module):
    def __init__(self, c: VisionConfig) -> None:
        super().__init__()
        self.config = c
        self.checkpointing = False
        self.patch_embed = PatchEmbed(c)
        if c.family == "Qwen3-VL":
            zeros = torch.zeros(c.table_side ** 2, c.hidden)
            self.pos_embed = nn.Embedding.from_pretrained(zeros, freeze=False)
            self.merger = Qwen3Merger(c, deepstack=False)
            self.deepstack_merger_list = nn.ModuleList(
                Qwen3Merger(c, deepstack=True) for _ in c.deepstack)
        else:
            self.merger = Merger(c)
        self.blocks = nn.ModuleList(VisionBlock(c) for _ in range(c.depth))

    def learned_positions(self, frames: Sequence[FrameLayout]) -> Tensor:
        """Qwen3-VL's learned positions -> (patches, hidden), in the order of pixel_values.

        The table has side x side of them. A frame is laid over it, corner on corner, and
        a patch takes the four around it, bilinearly."""
        side = self.config.table_side
        places = []
        for frame in frames:
            last = frame.patch_positions.amax(0).clamp(min=1)              # row, column
            places.append(frame.patch_positions * (side - 1) / last)
        # One copy to the device: (patches, 2).
        place = torch.cat(places).to(self.pos_embed.weight.device)
        before = place.long()
        behind = (before + 1).clamp(max=side - 1)
        row, column = torch.stack((before, behind), -1).unbind(1)          # (patches, 2) each
        share = place - before
        row_share, column_share = torch.stack((1 - share, share), -1).unbind(1)
        index = (row[:, :, None] * side + column[:, None]).flatten(1)      # (patches, 4)
        weight = (row_share[:, :, None] * column_share[:, None]).flatten(1)
        around = self.pos_embed(index)                                     # (patches, 4, hidden)
        return (around * weight[:, :, None]).sum(1)

    def rotation(self, positions: Tensor) -> Rotation:
        """positions (patches, 2) -> cos and sin: half of the frequencies turn by the
        row, the other half by the column."""
        quarter = self.config.hidden // self.config.heads // 4
        exponent = torch.arange(quarter, device=positions.device) / quarter
        inverse_frequency = 10000.0 ** -exponent
        angles = (positions[:, :, None] * inverse_frequency).flatten(1)    # (patches, hd / 2)
        return rotation_by(angles)

    def forward(self, pixel_values: Tensor, grids: Sequence[Grid]) -> Tensor:
        """pixel_values (patches, channels * temporal * patch * patch), grids of all
        images in patches -> (tokens of the language model, out). Behind that width
        Qwen3-VL's has its deepstack features, side by side, of `out` each."""
        c = self.config
        device = pixel_values.device
        patches_a_token = c.merge ** 2
        frames = []
        for count, height, width in grids:
            frames += [frame_layout(height, width, c)] * count

        # One order for all tokens: frame by frame, and window by window within a frame.
        # So every window, and every frame, is one sequence of the pack. Frames of a
        # video do not see each other.
        orders = []
        window_patches = []
        frame_patches = []
        start = 0
        for frame in frames:
            tokens = len(frame.token_order)
            orders.append(frame.token_order + start)
            window_patches += [n * patches_a_token for n in frame.window_tokens]
            frame_patches.append(tokens * patches_a_token)
            start += tokens
        positions = torch.cat([frame.patch_positions for frame in frames])
        order, positions, window_starts, frame_starts = to_device(
            (torch.cat(orders), positions, cumulative(window_patches),
             cumulative(frame_patches)), device)
        within_window = Plan(window_patches, False, device=device, starts=window_starts)
        within_frame = Plan(frame_patches, False, device=device, starts=frame_starts)

        def by_window(x: Tensor) -> Tensor:
            """(patches, ...) from the order of pixel_values to that of windows, by token."""
            return x.unflatten(0, (-1, patches_a_token))[order].flatten(0, 1)

        rotation = self.rotation(by_window(positions))
        x = self.patch_embed(pixel_values)
        if c.family == "Qwen3-VL":
            x = x + self.learned_positions(frames).to(x.dtype)
        tokens = self.through_blocks(by_window(x), rotation, within_window, within_frame)
        # The inverse of a permutation is what sorts it.
        return tokens[order.argsort()]

    def through_blocks(
            self, x: Tensor, rotation: Rotation, within_window: Plan,
            within_frame: Plan) -> Tensor:
        """(patches, hidden) window by window -> tokens in that order, as `forward` has them."""
        c = self.config
        deepstack = []
        for i, block in enumerate(self.blocks):
            plan = within_frame if i in c.full_blocks else within_window
            if self.checkpointing:
                x = checkpoint(block, x, rotation, plan, use_reentrant=False)
            else:
                x = block(x, rotation, plan)
            if i in c.deepstack:
                deepstack.append(self.deepstack_merger_list[c.deepstack.index(i)](x))
        tokens = self.merger(x)
        return torch.cat((tokens, *deepstack), 1) if deepstack else tokens


# ---------------------------------------------------------------------------- language model

class Attention(nn.Module):
    def __init__(self, c: Config, index: int) -> None:
        super().__init__()
        qwen3 = c.family == "Qwen3-VL"
        self.head_dim = c.head_dim
        self.index = index
        self.q_proj = nn.Linear(c.hidden, c.heads * c.head_dim, c.attention_bias)
        self.k_proj = nn.Linear(c.hidden, c.kv_heads * c.head_dim, c.attention_bias)
        self.v_proj = nn.Linear(c.hidden, c.kv_heads * c.head_dim, c.attention_bias)
        self.o_proj = nn.Linear(c.heads * c.head_dim, c.hidden, c.attention_bias and qwen3)
        # Qwen3-VL normalises the query and the key of each head.
        self.q_norm = RMSNorm(c.head_dim, c.eps) if qwen3 else nn.Identity()
        self.k_norm = RMSNorm(c.head_dim, c.eps) if qwen3 else nn.Identity()

    def forward(self, x: Tensor, rotation: Rotation, plan: Plan | Cache) -> Tensor:
        q = self.q_norm(self.q_proj(x).unflatten(-1, (-1, self.head_dim)))     # (N, H, hd)
        k = self.k_norm(self.k_proj(x).unflatten(-1, (-1, self.head_dim)))     # (N, KV, hd)
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim))
        # Turned together: half as many kernels are launched.
        qk = rotate(torch.cat((q, k), 1), *rotation)
        q, k = qk.split((q.shape[1], k.shape[1]), 1)
        out = attention(q, k, v, plan, self.index)
        return self.o_proj(out.flatten(1))


class Layer(nn.Module):
    def __init__(self, c: Config, index: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden, c.eps)
        self.post_attention_layernorm = RMSNorm(c.hidden, c.eps)
        self.self_attn = Attention(c, index)
        self.mlp = MLP(c.hidden, c.intermediate, bias=False)

    def forward(
            self, x: Tensor, rotation: Rotation, plan: Plan | Cache,
            output_rows: Rows = ALL_ROWS) -> Tensor:
        """(N, D) -> (output rows, D). Attention needs keys and values of all rows, the
        MLP behind it no row but those that go out."""
        x = (x + self.self_attn(self.input_layernorm(x), rotation, plan))[output_rows]
        return x + self.mlp(self.post_attention_layernorm(x))


@dataclass(frozen=True)
class Deepstack:
    """What Qwen3-VL adds to its image tokens behind the first layers (arXiv 2406.04334)."""
    rows: Tensor                  # (image tokens,) of the pack
    features: tuple[Tensor, ...]  # (image tokens, D) for the first layer, for the second ...


class LanguageModel(nn.Module):
    def __init__(self, c: Config) -> None:
        super().__init__()
        self.config = c
        self.checkpointing = False
        # Zeros: the weights come from a checkpoint or from toy/pretrain.py. (A random
        # start on the meta device imports 70 MB of torch.)
        zeros = torch.zeros(c.vocab, c.hidden)
        self.embed_tokens = nn.Embedding.from_pretrained(zeros, freeze=False)
        self.layers = nn.ModuleList(Layer(c, i) for i in range(c.layers))
        self.norm = RMSNorm(c.hidden, c.eps)

    def rotation(self, positions: Tensor) -> Rotation:
        """positions (3, N) -> cos and sin: each frequency turns by one of the three axes."""
        c = self.config
        half = c.head_dim // 2
        device = positions.device
        inverse_frequency = c.rope_theta ** -(torch.arange(half, device=device) / half)
        # Rows, where an index made here would do, wait for no device and can be captured in a
        # CUDA graph.
        if c.family == "Qwen3-VL":
            # The axes take turns, until height and width have filled their sections.
            turns = [i % 3 if i < 3 * c.mrope_section[i % 3] else 0 for i in range(half)]
            axes = positions.unbind()
            rows = torch.stack([axes[turn] for turn in turns])                 # (hd / 2, N)
        else:
            # Each axis fills its section of the frequencies.
            rows = torch.cat(
                [axis.expand(n, -1) for axis, n in zip(positions, c.mrope_section)])
        return rotation_by(rows.T * inverse_frequency)                         # (N, hd / 2)

    def forward(
            self, x: Tensor, positions: Tensor, plan: Plan | Cache,
            output_rows: Rows = ALL_ROWS, deepstack: Deepstack | None = None) -> Tensor:
        """x (N, D) embeddings, positions (3, N) of time, height, width -> hidden states
        (N, D), or of the output rows alone, where given."""
        rotation = self.rotation(positions)
        features = deepstack.features if deepstack else ()
        # The last layer's other rows are read by no layer behind it, so it skips them; but not
        # before what deepstack adds behind it.
        skipping = len(self.layers) > len(features)
        for i, layer in enumerate(self.layers):
            rows = output_rows if skipping and layer is self.layers[-1] else ALL_ROWS
            if self.checkpointing:
                x = checkpoint(layer, x, rotation, plan, rows, use_reentrant=False)
            else:
                x = layer(x, rotation, plan, rows)
            if i < len(features):
                x = x.index_add(0, deepstack.rows, features[i])
        return self.norm(x if skipping else x[output_rows])


# -------------------------------------------------------------------- positions and score rows

def mrope_positions(input_ids: Tensor, grids: Sequence[Grid], image_id: int, merge: int) -> Tensor:
    """M-RoPE positions of one sequence: (T,) ids -> (3, T) time, height, width.

    grids: the sequence's images, in patches; ValueError where they do not fit the image
    tokens. Text counts on, the same on all axes. An image's tokens lie on a grid that
    begins where the text stopped, and the text goes on behind the grid's longer side.
    Two tokens of text, an image of 2 x 3 tokens (id 9), one of text:

    >>> mrope_positions(torch.tensor([5, 5, 9, 9, 9, 9, 9, 9, 5]), [(1, 4, 6)], image_id=9, merge=2)
    tensor([[0, 1, 2, 2, 2, 2, 2, 2, 5],
            [0, 1, 2, 2, 2, 3, 3, 3, 5],
            [0, 1, 2, 3, 4, 2, 3, 4, 5]])
    """
    ids = input_ids.tolist()
    images = iter(grids)
    parts = []
    place = 0                     # of a token in the sequence
    start = 0                     # position of a text token there, or of an image's first corner
    while place < len(ids):
        if ids[place] == image_id:
            frames, height, width = next(images, (0, 0, 0))
            height //= merge
            width //= merge
            count = frames * height * width
            if count == 0 or ids[place:place + count] != [image_id] * count:
                raise ValueError(
                    f"the image tokens from place {place} on do not match image_grid_thw: "
                    f"{frames} x {height} x {width} were expected")
            axes = (torch.arange(frames), torch.arange(height), torch.arange(width))
            parts.append(torch.cartesian_prod(*axes).view(-1, 3).T + start)
            start += max(height, width)
        else:
            count = 1
            while place + count < len(ids) and ids[place + count] != image_id:
                count += 1
            parts.append((torch.arange(count) + start).expand(3, count))
            start += count
        place += count
    if next(images, None) is not None:
        raise ValueError("there are more images in image_grid_thw than in the tokens")
    return torch.cat(parts, 1).to(input_ids.device)


@dataclass(frozen=True)
class CompletionLayout:
    """Where the completions of a pack lie: behind all prompts, by question, by rollout.

    A completion of L tokens is counted in three ways, which differ by one:
    - fed are its tokens 0 to L - 2, as nothing follows the last one: L - 1 rows;
    - positions belong to fed tokens: token k has its prompt's first position + k;
    - predicted are all L tokens: token 0 by the prompt's last row, token k by the row of
      token k - 1. So a prompt's last row stands once for each of its completions.

    Prompts p and q of 4 and 3 tokens; completions a and b of p, of 2 and 3 tokens, and
    c of q, of 1 token, of which nothing is fed:

        row        0   1   2   3  | 4   5   6  | 7  | 8   9
        token      p0  p1  p2  p3 | q0  q1  q2 | a0 | b0  b1
        predicts               a0 |         c0 | a1 | b1  b2
                               b0 |
    """
    fed_lengths: list[int]        # fed tokens of each completion
    prefix: list[tuple[int, int]]     # of each question: tokens of its prompt, fed tokens of
                                      # all its completions; this is Plan's prefix
    positions: Tensor             # (fed tokens,) M-RoPE position, the same on all axes
    predicting_rows: Tensor       # (tokens,) packed row whose hidden state predicts each token


def completion_layout(
        prompt_lengths: Sequence[int], first_positions: Sequence[int],
        completion_lengths: Sequence[Sequence[int]]) -> CompletionLayout:
    """Layout of Q prompts with their completions; lengths count the end-of-turn as well.

    first_positions: of each prompt's first completion token. It is smaller than the
    prompt's length where the prompt has an image, whose tokens share positions.

    The pack that CompletionLayout draws, where q's image makes positions start at 2:

    >>> layout = completion_layout([4, 3], [4, 2], [[2, 3], [1]])
    >>> layout.fed_lengths
    [1, 2, 0]
    >>> layout.prefix
    [(4, 3), (3, 0)]
    >>> layout.positions                         # of a0 | b0, b1
    tensor([4, 4, 5])
    >>> layout.predicting_rows                   # of a0, a1 | b0, b1, b2 | c0
    tensor([3, 7, 3, 8, 9, 6])
    """
    fed_lengths = []
    prefix = []
    fed_positions = []
    predicting_rows = []
    prompt_end = 0
    start = sum(prompt_lengths)                  # row of the coming completion's token 0
    for prompt, first, group in zip(prompt_lengths, first_positions, completion_lengths):
        prompt_end += prompt
        fed_of_group = 0
        for length in group:
            # The last token is predicted, not fed.
            fed = length - 1
            fed_lengths.append(fed)
            fed_positions += range(first, first + fed)
            # The prompt's last row predicts token 0, every fed token the one behind it.
            predicting_rows += [prompt_end - 1, *range(start, start + fed)]
            start += fed
            fed_of_group += fed
        prefix.append((prompt, fed_of_group))
    return CompletionLayout(
        fed_lengths, prefix,
        positions=torch.tensor(fed_positions, dtype=torch.long),
        predicting_rows=torch.tensor(predicting_rows, dtype=torch.long))


# --------------------------------------------------------------------------- the whole model

class PackedPrompts(NamedTuple):
    """Q prompts in one pack."""
    x: Tensor                     # (N, D) embeddings
    positions: Tensor             # (3, N)
    lengths: list[int]            # of each prompt
    first_positions: list[int]    # the position that follows each prompt
    deepstack: Deepstack | None   # Qwen3-VL's


class QwenVL(nn.Module):
    """One of FAMILIES for grounding.

    stop_ids: ids that end a completion.
    banned:   (V,) bool, ids that can't be sampled: image, video and vision markers, ids
              without a text. They have no probability in sampling and none in scoring."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.stored_dtype = torch.bfloat16
        # The folder that the weights come from, where they do.
        self.base: Path | None = None
        self.visual = VisionTower(config.vision)
        self.model = LanguageModel(config)
        self.lm_head = nn.Linear(config.hidden, config.vocab, bias=False)
        self.tie()
        self.set_vocabulary({})

    def tie(self) -> None:
        """Makes the head the embedding, where config.json says so."""
        if self.config.tied:
            self.lm_head.weight = self.model.embed_tokens.weight

    def set_vocabulary(self, token_ids: dict[str, int]) -> None:
        """token_ids: text -> id of the tokenizer's tokens; {} where only config.json is known."""
        # The embedding has more rows than the tokenizer has tokens: such an id has no
        # text. Without a tokenizer every id passes for one with a text.
        with_text = set(token_ids.values()) if token_ids else set(range(self.config.vocab))
        markers = {token_ids[text] for text in VISION_MARKERS if text in token_ids}
        samplable = with_text - markers - set(self.config.marker_ids)
        banned = torch.tensor([i not in samplable for i in range(self.config.vocab)])
        # A buffer moves to the device with the weights, and stays there; no file holds it.
        self.register_buffer("banned", banned.to(self.device), persistent=False)
        stop_ids = tuple(token_ids[text] for text in STOP_TOKENS if text in token_ids)
        self.stop_ids = stop_ids or self.config.stop_ids

    @property
    def device(self) -> torch.device:
        return self.model.norm.weight.device

    def embed(
            self, input_ids: Tensor, pixel_values: Tensor | None,
            grids: Sequence[Grid]) -> tuple[Tensor, Deepstack | None]:
        """(N,) packed ids with the images' patches -> (N, D): an image token's
        embedding is its row of the vision tower. Beside it Qwen3-VL's deepstack."""
        x = self.model.embed_tokens(input_ids)
        if pixel_values is None or not len(pixel_values):
            return x, None
        embedded = self.embed_images(pixel_values, grids).to(x.dtype)
        images, *features = embedded.split(self.config.hidden, 1)
        is_image = input_ids == self.config.image_id
        x = x.masked_scatter(is_image[:, None], images)
        if not features:
            return x, None
        # Their number is known, so the host waits for no count.
        rows = torch.nonzero_static(is_image, size=len(images))[:, 0]
        return x, Deepstack(rows, tuple(features))

    def embed_images(self, pixel_values: Tensor, grids: Sequence[Grid]) -> Tensor:
        """(patches, ...) of all images -> (image tokens, D), as the vision tower has it.

        The vision tower runs in one pass where that is kept for the gradient, else in
        small ones, of whole images."""
        ends = list(itertools.accumulate((t * h * w for t, h, w in grids), initial=0))
        if ends[-1] != len(pixel_values):
            raise ValueError(
                f"pixel_values has {len(pixel_values)} patches, image_grid_thw {ends[-1]}")
        limit = PATCHES_AT_ONCE if self.device.type == "cpu" else CUDA_PATCHES_AT_ONCE
        if torch.is_grad_enabled():
            limit = len(pixel_values)
        passes = []
        begin = 0                                # first image of the coming pass
        for end in range(1, len(ends)):          # one past its last
            if ends[end] - ends[begin] >= limit or end == len(grids):
                pixels = pixel_values[ends[begin]:ends[end]].to(self.device)
                passes.append(self.visual(pixels, grids[begin:end]))
                begin = end
        return torch.cat(passes)

    def forward(
            self, input_ids: Tensor, attention_mask: Tensor | None = None,
            pixel_values: Tensor | None = None, image_grid_thw: Tensor | None = None) -> Tensor:
        """(B, T) ids and mask (padding on either side) -> (B, T, V) logits in the
        compute dtype, 0 at padding.

        The interface that transformers' users know, with its arguments; training,
        sampling and evaluation call score, prefill and decode. The images of all
        sequences lie one behind the other in pixel_values (patches, D) and
        image_grid_thw (images, 3)."""
        if attention_mask is None:
            mask = torch.ones_like(input_ids, dtype=torch.bool)
        else:
            mask = attention_mask.bool()
        grids = [] if image_grid_thw is None else as_grids(image_grid_thw)
        sequences = [ids[keep] for ids, keep in zip(input_ids, mask)]
        positions = self.positions_of_batch(sequences, grids)
        plan = Plan(mask.sum(1).tolist(), device=self.device)
        x, deepstack = self.embed(input_ids[mask], pixel_values, grids)
        hidden = self.model(x, positions, plan, deepstack=deepstack)
        logits = hidden.new_zeros(*input_ids.shape, self.config.vocab)
        logits[mask] = self.lm_head(hidden)
        return logits

    def positions(self, ids: Tensor, grids: Sequence[Grid]) -> Tensor:
        """One sequence's ids (T,) and images -> M-RoPE positions (3, T)."""
        c = self.config
        if c.family == "Qwen3-VL":
            # It tells the frames of a video apart by times written between them.
            if c.video_id in ids.tolist() or any(frames > 1 for frames, _, _ in grids):
                raise ValueError("a video; this code reads Qwen3-VL's images alone")
        return mrope_positions(ids, grids, c.image_id, c.vision.merge)

    def positions_of_batch(self, sequences: list[Tensor], grids: Sequence[Grid]) -> Tensor:
        """Unpadded ids of each sequence, the images of all -> packed positions (3, N).

        Which images are a sequence's follows from its number of image tokens."""
        c = self.config
        parts = []
        begin = 0                                # the sequence's first image
        for ids in sequences:
            image_tokens = int((ids == c.image_id).sum())
            end = begin
            while image_tokens > 0 and end < len(grids):
                frames, height, width = grids[end]
                image_tokens -= frames * height * width // c.vision.merge ** 2
                end += 1
            parts.append(self.positions(ids, grids[begin:end]))
            begin = end
        if begin < len(grids):
            raise ValueError("there are more images in image_grid_thw than in the tokens")
        return torch.cat(parts, 1)

    def pack(self, prompts: Sequence[Prompt]) -> PackedPrompts:
        """Q prompts, one behind the other, as the language model takes them.

        The vision tower runs once for all of them."""
        grids = []
        parts = []
        for prompt in prompts:
            own_grids = as_grids(prompt.image_grid_thw)
            parts.append(self.positions(prompt.input_ids, own_grids))
            grids += own_grids
        ids = torch.cat([prompt.input_ids for prompt in prompts])
        ids, positions = to_device((ids, torch.cat(parts, 1)), self.device)
        dtype = self.visual.patch_embed.proj.weight.dtype
        x, deepstack = self.embed(ids, pixels_on(prompts, self.device, dtype), grids)
        lengths = [len(prompt.input_ids) for prompt in prompts]
        # Positions are made on the host, which so needs not wait for the device to read them.
        first_positions = [int(part.max()) + 1 for part in parts]
        return PackedPrompts(x, positions, lengths, first_positions, deepstack)

    # ------------------------------------------------------------------- sampling and scoring

    def prefill(
            self, prompts: Sequence[Prompt], group: int,
            max_new_tokens: int) -> tuple[Tensor, Cache, Tensor]:
        """Q prompts -> logits (Q, V) of the first new token, a Cache for G rollouts of
        each, the position (Q,) of that token."""
        x, positions, lengths, first_positions, deepstack = self.pack(prompts)
        starts, first_positions = to_device(
            (cumulative(lengths), torch.tensor(first_positions)), self.device)
        plan = Plan(lengths, kv_cache=[], device=self.device, starts=starts)
        last_rows = starts[1:] - 1
        hidden = self.model(x, positions, plan, last_rows, deepstack)
        return self.lm_head(hidden), Cache(plan, group, max_new_tokens), first_positions

    def decode(self, tokens: Tensor, position: Tensor, cache: Cache) -> Tensor:
        """One more token of every rollout: tokens (R,), position (R,) -> logits (R, V)
        of the token behind it."""
        # All layers put the token at the same place.
        cache.admit()
        x = self.model.embed_tokens(tokens)
        hidden = self.model(x, position.expand(3, -1), cache)
        return self.lm_head(hidden)

    def score(
            self, prompts: Sequence[Prompt], completions: Sequence[Sequence[Tensor]],
            temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """Log-probabilities of completions, with gradient; every prompt and image is
        computed once for its whole group.

        prompts: Q of Prompt; completions: Q lists of G (L,) long tensors, end-of-turn
        included; unequal lengths are fine.
        -> logp (tokens,) and entropy (tokens,), float32, packed by question, rollout,
        token; the entropy carries no gradient."""
        # The prompts with their images come first in the pack: (N, D), (3, N).
        x, positions, prompt_lengths, first_positions, deepstack = self.pack(prompts)

        # The completions come behind them, each from the position where its prompt stopped.
        completion_lengths = [lengths_of(group) for group in completions]
        layout = completion_layout(prompt_lengths, first_positions, completion_lengths)

        # All tokens of the completions are predicted, and all but each last one are fed.
        in_order = itertools.chain.from_iterable(completions)
        flat = [completion.to(self.device) for completion in in_order]
        targets = torch.cat(flat)                                          # (tokens,)
        fed = torch.cat([completion[:-1] for completion in flat])
        x = torch.cat((x, self.model.embed_tokens(fed).to(x.dtype)))
        fed_positions = layout.positions.to(self.device).expand(3, -1)
        positions = torch.cat((positions, fed_positions), 1)

        # A completion sees its prompt and itself, never another one.
        plan = Plan(
            prompt_lengths + layout.fed_lengths, prefix=layout.prefix, device=self.device)

        # The head reads the rows that predict a token; a prompt's last row serves its group.
        rows = layout.predicting_rows.to(self.device)
        hidden = self.model(x, positions, plan, rows, deepstack)               # (tokens, D)
        return self.log_probabilities(hidden, targets, temperature)

    def distribution(self, logits: Tensor, temperature: float) -> Tensor:
        """(..., V) logits -> log-probabilities in float32 at this temperature, over the
        ids that can be sampled."""
        scaled = logits.float() / temperature
        return scaled.masked_fill(self.banned, NEVER).log_softmax(-1)

    def log_probabilities(
            self, hidden: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """hidden (n, D), targets (n,) -> logp (n,), entropy (n,).

        Logits (n, V) would be the largest tensor of all: they exist for one chunk at a
        time, forward and, as the chunk is computed again there, backward."""
        def of_chunk(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
            logp = self.distribution(self.lm_head(hidden), temperature)
            with torch.no_grad():
                entropy = -(logp.exp() * logp).sum(-1)
            return logp.gather(-1, targets[:, None])[:, 0], entropy

        limit = LOGITS_PER_CHUNK if hidden.device.type == "cpu" else CUDA_LOGITS_PER_CHUNK
        size = max(1, limit // self.config.vocab)
        logps = []
        entropies = []
        for chunk in zip(hidden.split(size), targets.split(size)):
            if torch.is_grad_enabled():
                logp, entropy = checkpoint(of_chunk, *chunk, use_reentrant=False)
            else:
                logp, entropy = of_chunk(*chunk)
            logps.append(logp)
            entropies.append(entropy)
        return torch.cat(logps), torch.cat(entropies)

    # ------------------------------------------------------------------------------ checkpoints

    @classmethod
    def from_pretrained(
            cls, path: str | Path, dtype: torch.dtype | None = torch.bfloat16,
            device: torch.device | str = "cpu") -> QwenVL:
        """A checkpoint folder in hub layout (or a stage's folder: its newest step), or an
        adapter's, over the base that it names (lora.py).

        dtype None keeps the stored one. Strict: a tensor that is missing, unexpected or
        of another shape is a CheckpointError that names it. Tensors are memory-mapped,
        not read twice."""
        # lora.py stands on this module.
        from qwen import lora
        path = folder(path)
        base = base_folder(path)
        # On the meta device no memory is spent on weights that the checkpoint replaces.
        with torch.device("meta"):
            model = cls(Config.from_json(base / "config.json"))
        tensors = model.read_weights(base, dtype, device)
        model.load_state_dict(tensors, strict=False, assign=True)
        # Assigning has replaced the embedding, but not the head that is tied to it.
        model.tie()
        model.set_vocabulary(read_token_ids(path) or read_token_ids(base))
        model.base = base
        if (path / ADAPTER_CONFIG).exists():
            lora.load(model, path, dtype, device)
        return model

    def read_weights(
            self, path: Path, dtype: torch.dtype | None,
            device: torch.device | str) -> dict[str, Tensor]:
        """Name -> tensor of exactly this model's weights, from a checkpoint folder."""
        shapes = {name: tuple(p.shape) for name, p in self.state_dict().items()}
        if self.config.tied:
            shapes.pop("lm_head.weight")
        tensors = {}
        surplus = {}
        stored_names = {}         # by the name of the parameter here
        for file in weight_files(path):
            try:
                with safe_open(file, "pt") as stored:
                    for stored_name in stored.keys():
                        name = own_name(stored_name)
                        if name in stored_names:
                            raise CheckpointError(
                                f"{path}: {stored_names[name]} and {stored_name} are one tensor "
                                "under two names; remove one of them")
                        stored_names[name] = stored_name
                        tensor = read_tensor(file, stored, stored_name, shapes.get(name), dtype)
                        if name == "model.embed_tokens.weight":
                            self.stored_dtype = stored.get_slice(stored_name)[:0].dtype
                        part = tensors if name in shapes else surplus
                        part[name] = tensor.to(device)
            except (SafetensorError, OSError) as error:
                raise CheckpointError(
                    f"{file}: not a whole safetensors file ({error}); download it again") from None
        # A tied checkpoint may carry the head as well, if it is the embedding.
        head = surplus.pop("lm_head.weight", None) if self.config.tied else None
        if head is not None:
            embedding = tensors.get("model.embed_tokens.weight", head[:0])
            if not torch.equal(head, embedding):
                raise CheckpointError(
                    f"{path}: lm_head.weight differs from embed_tokens, but config.json says that "
                    "they are tied")
        stored_surplus = [stored_names[name] for name in surplus]
        refuse_other_names(path, shapes.keys() - tensors.keys(), stored_surplus)
        refuse(path, "missing", map(self.stored_name, shapes.keys() - tensors.keys()))
        refuse(path, "not expected", stored_surplus)
        return tensors

    def stored_name(self, name: str) -> str:
        """A parameter's name in the checkpoint's files; Qwen3-VL's has both parts in "model."."""
        return nested_name(name) if self.config.family == "Qwen3-VL" else name

    def save_pretrained(
            self, path: str | Path, whole: Iterator[Tensor] | None = None,
            shard_bytes: int = 5 * 10 ** 9) -> None:
        """Writes config.json and safetensors in hub layout, in the checkpoint's own dtype; of
        a model with adapters these alone, in PEFT's layout.

        whole: gives the tensors in the order of stored_files(), where the model's own are
        sharded over processes. One at a time is asked for, and written."""
        from qwen import lora
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        shards = self.stored_files(shard_bytes)
        if whole is None:
            whole = itertools.chain.from_iterable(shard.values() for shard in shards)
        if lora.adapted(self):
            lora.save(self, path, whole)
            return
        write_json(path / "config.json", self.config.raw)
        if len(shards) == 1:
            names = ["model.safetensors"]
        else:
            n = len(shards)
            names = [f"model-{i:05d}-of-{n:05d}.safetensors" for i in range(1, n + 1)]
        for name, shard in zip(names, shards):
            shapes = {key: tensor.shape for key, tensor in shard.items()}
            write_tensors(path / name, shapes, self.stored_dtype, whole, {"format": "pt"})
        if len(shards) > 1:
            index = {
                "metadata": {"total_size": self.stored_bytes()},
                "weight_map": shard_index(names, shards)}
            write_json(path / WEIGHT_INDEX, index)

    def stored_files(self, shard_bytes: int = 5 * 10 ** 9) -> list[dict[str, Tensor]]:
        """What save_pretrained writes: for each file of at most so many bytes (more where one
        tensor has more) the names in it, sorted, with this model's tensors."""
        from qwen import lora
        if lora.adapted(self):
            return [lora.stored_tensors(self)]
        shards: list[dict[str, Tensor]] = [{}]
        size = 0
        for name, tensor in self.state_dict().items():
            if name == "lm_head.weight" and self.config.tied:
                continue
            n = tensor_bytes(tensor.shape, self.stored_dtype)
            if shards[-1] and size + n > shard_bytes:
                shards.append({})
                size = 0
            shards[-1][self.stored_name(name)] = tensor
            size += n
        return [dict(sorted(shard.items())) for shard in shards]

    def stored_bytes(self) -> int:
        """Bytes of what save_pretrained writes."""
        tensors = itertools.chain.from_iterable(shard.values() for shard in self.stored_files())
        return sum(tensor_bytes(tensor.shape, self.stored_dtype) for tensor in tensors)


def as_grids(image_grid_thw: Tensor) -> list[Grid]:
    """(images, 3) -> an image's frames, rows and columns each."""
    return [tuple(grid) for grid in image_grid_thw.tolist()]


def pixels_on(prompts: Sequence[Prompt], device: torch.device, dtype: torch.dtype) -> Tensor:
    """The patches of prompts on the device, one behind the other: (patches, D).

    Prompts of one Processor bring bytes, which are normalised there; any other objects have
    `pixel_values`."""
    if not hasattr(prompts[0], "pixels"):
        return torch.cat([prompt.pixel_values for prompt in prompts]).to(device)
    # Joined on the host: one copy waits once.
    values = torch.cat([prompt.pixels.values for prompt in prompts])
    return replace(prompts[0].pixels, values=values).normalised(device, dtype)


def lengths_of(completions: Sequence[Tensor]) -> list[int]:
    return [len(completion) for completion in completions]
