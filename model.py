"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: vision tower, language model, scores, checkpoints.

The three families share this code. Search for "Qwen2-VL", "Qwen2.5-VL" and "Qwen3-VL" to find
every difference.

Tokens are packed everywhere, (N, D): the sequences of a batch follow each other in one tensor,
without padding. A `Plan` defines which tokens attend to which (see the drawing in
qwen/attention.py), so layers need not know about batches. Training computes prompts and
completions in one pack (`score`); sampling computes token by token (`prefill`, then `decode`).

Shapes: N packed tokens, D width, H heads, KV key-value heads, hd head width, Q prompts,
G rollouts of a prompt, R = Q * G rollouts, V vocabulary.
Sources: arXiv 2409.12191 (Qwen2-VL), 2502.13923 (Qwen2.5-VL), 2511.21631 (Qwen3-VL), and the
released checkpoints. Module names are the checkpoints' names.
"""
from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

from qwen import lora
from qwen.attention import Cache, Plan, Rows, attention, cumulative, to_device
from qwen.hub import (
    ADAPTER_CONFIG, WEIGHT_INDEX, CheckpointError, Config, VisionConfig, base_folder, folder,
    nested_name, read_token_ids, read_weights, write_json, write_tensors)
from qwen.processor import Prompt

STOP_TOKENS = ("<|im_end|>", "<|endoftext|>")
# Markers that occur only in prompts.
VISION_MARKERS = (
    "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")
NEVER = -1e30                     # logit of a banned id; finite, so that 0 * log 0 stays 0
# Logits in memory at once in `score`: 0.1 GB in float32; 1 GB on CUDA, where the head's gradient
# is summed over chunks in bfloat16, and fewer chunks round less often.
LOGITS_PER_CHUNK = 2 ** 25
CUDA_LOGITS_PER_CHUNK = 2 ** 28
# Patches in one pass of the vision tower without gradient. Only CUDA gains from larger passes, by
# fewer kernel launches; they take 1.3 GB for a 3B model.
PATCHES_AT_ONCE = 2048
CUDA_PATCHES_AT_ONCE = 2 ** 15
Grid = tuple[int, int, int]               # an image's frames, rows and columns, in patches
Rotation = tuple[Tensor, Tensor]          # cos, signed sin of rotary angles, (N, 1, hd) each
# Added to Qwen3-VL's image tokens after the first layers (arXiv 2406.04334): the tokens' rows in
# the pack, and features (image tokens, D) for each of these layers.
Deepstack = tuple[Tensor, list[Tensor]]
ALL_ROWS = slice(None)
checkpoint = partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)


# ---------------------------------------------------------------- layers of both towers

class MLP(nn.Module):
    def __init__(self, width: int, inner: int, bias: bool) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias)
        self.up_proj = nn.Linear(width, inner, bias)
        self.down_proj = nn.Linear(inner, width, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def rotation_by(angles: Tensor) -> Rotation:
    """Rotary angles (N, hd / 2) -> what `rotate` needs to turn dimensions i and i + hd / 2, (a, b),
    into (a cos - b sin, b cos + a sin)."""
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), -1)[:, None], torch.cat((-sin, sin), -1)[:, None]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (N, heads, hd), rotated in float32."""
    y = x.float()
    partner = y.roll(y.shape[-1] // 2, -1)
    return (y * cos).addcmul_(partner, sin).to(x.dtype)


# ---------------------------------------------------------------- vision tower

VISION_NORM = {"Qwen2-VL": nn.LayerNorm, "Qwen2.5-VL": nn.RMSNorm, "Qwen3-VL": nn.LayerNorm}


class QuickGELU(nn.Module):
    """arXiv 1606.08415, section 2."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class VisionAttention(nn.Module):
    def __init__(self, c: VisionConfig) -> None:
        super().__init__()
        self.heads = c.heads
        self.qkv = nn.Linear(c.hidden, 3 * c.hidden)
        self.proj = nn.Linear(c.hidden, c.hidden)

    def forward(self, x: Tensor, rotation: Rotation, plan: Plan) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3 * self.heads, -1))              # (N, 3 * H, hd)
        qk, v = qkv.split((2 * self.heads, self.heads), 1)
        q, k = rotate(qk, *rotation).split(self.heads, 1)
        return self.proj(attention(q, k, v, plan).flatten(1))


class VisionBlock(nn.Module):
    def __init__(self, c: VisionConfig) -> None:
        super().__init__()
        self.norm1 = VISION_NORM[c.family](c.hidden, 1e-6)
        self.norm2 = VISION_NORM[c.family](c.hidden, 1e-6)
        self.attn = VisionAttention(c)
        if c.family == "Qwen2.5-VL":
            self.mlp = MLP(c.hidden, c.intermediate, bias=True)
        else:
            name, activation = "linear_fc", nn.GELU(approximate="tanh")
            if c.family == "Qwen2-VL":
                name, activation = "fc", QuickGELU()
            self.mlp = nn.Sequential(OrderedDict({
                f"{name}1": nn.Linear(c.hidden, c.intermediate),
                "activation": activation,
                f"{name}2": nn.Linear(c.intermediate, c.hidden)}))

    def forward(self, x: Tensor, rotation: Rotation, plan: Plan) -> Tensor:
        x = x + self.attn(self.norm1(x), rotation, plan)
        return x + self.mlp(self.norm2(x))


def merger(c: VisionConfig, deepstack: bool = False) -> nn.Sequential:
    """(tokens, merge * merge, hidden) patches -> (tokens, out).
    Qwen3-VL's deepstack mergers normalise a token's joined patches; other mergers, each patch."""
    wide = c.hidden * c.merge ** 2
    qwen3 = c.family == "Qwen3-VL"
    norm = VISION_NORM[c.family](wide if deepstack else c.hidden, 1e-6)
    first = {"norm" if qwen3 else "ln_q": norm, "join": nn.Flatten(1)}
    if deepstack:
        first = {"join": nn.Flatten(1), "norm": norm}
    fc1, gelu, fc2 = nn.Linear(wide, wide), nn.GELU(), nn.Linear(wide, c.out)
    if qwen3:
        mlp = {"linear_fc1": fc1, "gelu": gelu, "linear_fc2": fc2}
    else:
        mlp = {"mlp": nn.Sequential(fc1, gelu, fc2)}
    return nn.Sequential(OrderedDict(first | mlp))


def frame_layout(height: int, width: int, c: VisionConfig) -> tuple[Tensor, Tensor, list[int]]:
    """A frame of height x width patches -> row and column of each patch (patches, 2); token
    numbers in the order of the windows (tokens,); the number of tokens in each window.

    Patches are in the order of pixel_values: tokens row by row, and the patches of a token next to
    each other. Windows consist of whole tokens; at the right and lower edge they may be smaller."""
    m = c.merge
    grid = torch.cartesian_prod(torch.arange(height), torch.arange(width))
    grid = grid.view(height // m, m, width // m, m, 2)
    patch_positions = grid.transpose(1, 2).reshape(-1, 2)
    # Windows are numbered row by row. Without windows, the whole frame is one window.
    side = c.window // c.patch // m if c.window else max(height, width)    # in tokens
    windows_per_row = -(-(width // m) // side)
    row, column = patch_positions[::m * m].T // m                          # (tokens,) each
    window = row // side * windows_per_row + column // side
    return patch_positions, window.argsort(stable=True), window.bincount().tolist()


class VisionTower(nn.Module):
    def __init__(self, c: VisionConfig) -> None:
        super().__init__()
        self.config = c
        self.checkpointing = False
        side = (c.temporal_patch, c.patch, c.patch)
        convolution = nn.Conv3d(c.channels, c.hidden, side, side, bias=c.family == "Qwen3-VL")
        self.patch_embed = nn.ModuleDict({"proj": convolution})
        if c.family == "Qwen3-VL":
            zeros = torch.zeros(c.table_side ** 2, c.hidden)
            self.pos_embed = nn.Embedding.from_pretrained(zeros, freeze=False)
        self.merger = merger(c)
        self.deepstack_merger_list = nn.ModuleList(merger(c, True) for _ in c.deepstack)
        self.blocks = nn.ModuleList(VisionBlock(c) for _ in range(c.depth))

    def learned_positions(self, frames: Sequence[Tensor]) -> Tensor:
        """Qwen3-VL: row and column of each frame's patches, (patches, 2) -> (patches, hidden).
        The table of side x side positions is stretched over the frame, corner to corner, and
        interpolated bilinearly."""
        side = self.config.table_side
        places = [frame * (side - 1) / frame.amax(0).clamp(min=1) for frame in frames]
        place = torch.cat(places).to(self.pos_embed.weight.device)         # (patches, 2)
        before = place.long()
        after = (before + 1).clamp(max=side - 1)
        row, column = torch.stack((before, after), -1).unbind(1)           # (patches, 2)
        share = place - before
        row_share, column_share = torch.stack((1 - share, share), -1).unbind(1)
        index = (row[:, :, None] * side + column[:, None]).flatten(1)      # (patches, 4)
        weight = (row_share[:, :, None] * column_share[:, None]).flatten(1)
        return (self.pos_embed(index) * weight[:, :, None]).sum(1)

    def forward(self, pixel_values: Tensor, grids: Sequence[Grid]) -> Tensor:
        """pixel_values (patches, channels * temporal * patch * patch) of all images -> (image
        tokens, out); Qwen3-VL: with deepstack features appended, `out` for each level."""
        c = self.config
        device = pixel_values.device
        joined = c.merge ** 2                                              # patches per token

        # Tokens are ordered by frame, then by window, so every frame and window is contiguous.
        frames, orders, window_patches, frame_patches = [], [], [], []
        start = 0
        for count, height, width in grids:
            patch_positions, token_order, window_tokens = frame_layout(height, width, c)
            for _ in range(count):
                frames.append(patch_positions)
                orders.append(token_order + start)
                window_patches += [n * joined for n in window_tokens]
                frame_patches.append(len(patch_positions))
                start += len(token_order)
        order, positions, window_starts, frame_starts = to_device(
            (torch.cat(orders), torch.cat(frames), cumulative(window_patches),
             cumulative(frame_patches)), device)
        within_window = Plan(window_patches, False, device=device, starts=window_starts)
        within_frame = Plan(frame_patches, False, device=device, starts=frame_starts)

        # Half of the frequencies encode a patch's row, the other half its column.
        positions = positions.unflatten(0, (-1, joined))[order].flatten(0, 1)
        quarter = c.hidden // c.heads // 4
        inverse_frequency = 10000.0 ** -(torch.arange(quarter, device=device) / quarter)
        rotation = rotation_by((positions[:, :, None] * inverse_frequency).flatten(1))

        # Patches do not overlap, so the checkpoint's convolution is a matrix product.
        proj = self.patch_embed.proj
        x = F.linear(pixel_values.to(proj.weight.dtype), proj.weight.flatten(1), proj.bias)
        if c.family == "Qwen3-VL":
            x = x + self.learned_positions(frames).to(x.dtype)
        x = x.unflatten(0, (-1, joined))[order].flatten(0, 1)
        deepstack = []
        for i, block in enumerate(self.blocks):
            plan = within_frame if i in c.full_blocks else within_window
            run = partial(checkpoint, block) if self.checkpointing else block
            x = run(x, rotation, plan)
            if i in c.deepstack:
                deepstack_merger = self.deepstack_merger_list[c.deepstack.index(i)]
                deepstack.append(deepstack_merger(x.unflatten(0, (-1, joined))))
        tokens = self.merger(x.unflatten(0, (-1, joined)))
        if deepstack:
            tokens = torch.cat((tokens, *deepstack), 1)
        return tokens[order.argsort()]                     # back in the order of pixel_values


# ---------------------------------------------------------------- language model

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
        self.q_norm = nn.RMSNorm(c.head_dim, c.eps) if qwen3 else nn.Identity()
        self.k_norm = nn.RMSNorm(c.head_dim, c.eps) if qwen3 else nn.Identity()

    def forward(self, x: Tensor, rotation: Rotation, plan: Plan | Cache) -> Tensor:
        q = self.q_norm(self.q_proj(x).unflatten(-1, (-1, self.head_dim)))     # (N, H, hd)
        k = self.k_norm(self.k_proj(x).unflatten(-1, (-1, self.head_dim)))     # (N, KV, hd)
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim))
        # Queries and keys are rotated together, to launch half as many kernels.
        qk = rotate(torch.cat((q, k), 1), *rotation)
        q, k = qk.split((q.shape[1], k.shape[1]), 1)
        return self.o_proj(attention(q, k, v, plan, self.index).flatten(1))


class Layer(nn.Module):
    def __init__(self, c: Config, index: int) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(c.hidden, c.eps)
        self.post_attention_layernorm = nn.RMSNorm(c.hidden, c.eps)
        self.self_attn = Attention(c, index)
        self.mlp = MLP(c.hidden, c.intermediate, bias=False)

    def forward(self, x: Tensor, rotation: Rotation, plan: Plan | Cache,
                output_rows: Rows = ALL_ROWS) -> Tensor:
        """(N, D) -> (output rows, D). Attention needs all rows, the MLP only the output rows."""
        x = (x + self.self_attn(self.input_layernorm(x), rotation, plan))[output_rows]
        return x + self.mlp(self.post_attention_layernorm(x))


class LanguageModel(nn.Module):
    def __init__(self, c: Config) -> None:
        super().__init__()
        self.config = c
        self.checkpointing = False
        # Zeros: random initialisation on the meta device would import another 70 MB of torch.
        zeros = torch.zeros(c.vocab, c.hidden)
        self.embed_tokens = nn.Embedding.from_pretrained(zeros, freeze=False)
        self.layers = nn.ModuleList(Layer(c, i) for i in range(c.layers))
        self.norm = nn.RMSNorm(c.hidden, c.eps)

    def forward(self, x: Tensor, positions: Tensor, plan: Plan | Cache,
                output_rows: Rows = ALL_ROWS, deepstack: Deepstack | None = None) -> Tensor:
        """x (N, D) embeddings, positions (3, N) of time, height, width -> (output rows, D)."""
        c = self.config
        half = c.head_dim // 2
        # M-RoPE: each frequency rotates by one of the three axes. No index tensor selects the axes,
        # because a CUDA graph cannot capture its copy to the device.
        if c.family == "Qwen3-VL":
            # The axes alternate until the sections of height and width are full; then time.
            axes = [i % 3 if i < 3 * c.mrope_section[i % 3] else 0 for i in range(half)]
            rows = torch.stack([positions[axis] for axis in axes])         # (hd / 2, N)
        else:
            # One section after the other.
            rows = torch.cat([axis.expand(n, -1) for axis, n in zip(positions, c.mrope_section)])
        inverse_frequency = c.rope_theta ** -(torch.arange(half, device=rows.device) / half)
        rotation = rotation_by(rows.T * inverse_frequency)

        image_rows, features = deepstack or (None, [])
        # The last layer computes only the output rows, unless deepstack adds to its image rows.
        skipping = len(self.layers) > len(features)
        for i, layer in enumerate(self.layers):
            rows = output_rows if skipping and layer is self.layers[-1] else ALL_ROWS
            run = partial(checkpoint, layer) if self.checkpointing else layer
            x = run(x, rotation, plan, rows)
            if i < len(features):
                x = x.index_add(0, image_rows, features[i])
        return self.norm(x if skipping else x[output_rows])


# ---------------------------------------------------------------- layout of a pack

def mrope_positions(sequences: Sequence[Tensor], grids: Sequence[Grid], image_id: int, merge: int,
                    refused_id: int | None = None) -> list[Tensor]:
    """M-RoPE positions: ids (T,) of each sequence -> (3, T) time, height, width of each.

    grids: the images of all sequences; ValueError if they do not match the image tokens.
    refused_id: id of video tokens; if given, a video raises ValueError. Text positions count up,
    the same on all axes. An image's tokens form a grid that starts at the next position, and text
    continues after its longer side. Two tokens of text, an image of 2 x 3 tokens, one of text:

    >>> ids = torch.tensor([5, 5, 9, 9, 9, 9, 9, 9, 5])
    >>> mrope_positions([ids], [(1, 4, 6)], image_id=9, merge=2)[0]
    tensor([[0, 1, 2, 2, 2, 2, 2, 2, 5],
            [0, 1, 2, 2, 2, 3, 3, 3, 5],
            [0, 1, 2, 3, 4, 2, 3, 4, 5]])
    """
    images = iter(grids)
    positions = []
    for ids in map(Tensor.tolist, sequences):
        if refused_id is not None and (refused_id in ids or any(t > 1 for t, _, _ in grids)):
            raise ValueError("a video; this code reads only images with Qwen3-VL")
        parts = []
        place = 0                 # index of the next token in the sequence
        start = 0                 # position of this token, or of the image that begins with it
        while place < len(ids):
            if ids[place] == image_id:
                frames, height, width = next(images, (0, 0, 0))
                height, width = height // merge, width // merge
                count = frames * height * width
                if count == 0 or ids[place:place + count] != [image_id] * count:
                    raise ValueError(f"the image tokens from place {place} on do not match "
                                     f"image_grid_thw, {frames} x {height} x {width} tokens")
                axes = (torch.arange(frames), torch.arange(height), torch.arange(width))
                parts.append(torch.cartesian_prod(*axes).view(-1, 3).T + start)
                start += max(height, width)
            else:
                count = [*ids[place:], image_id].index(image_id)
                parts.append((torch.arange(count) + start).expand(3, count))
                start += count
            place += count
        positions.append(torch.cat(parts, 1))
    if next(images, None) is not None:
        raise ValueError("there are more images in image_grid_thw than in the tokens")
    return positions


def completion_layout(
        prompt_lengths: Sequence[int], first_positions: Sequence[int],
        completion_lengths: Sequence[Sequence[int]]) -> tuple[
            list[int], list[tuple[int, int]], Tensor, Tensor]:
    """Layout of completions in a pack: they follow all prompts, ordered by question and rollout.
    Token 0 is predicted by the prompt's last row, token k by the row of token k - 1. So the last
    of L tokens is not fed: a completion has L - 1 rows. Fed token k has position first + k.

    Prompts p and q of 4 and 3 tokens; completions a and b of p and c of q, of 2, 3 and 1 tokens:

        row        0   1   2   3  | 4   5   6  | 7  | 8   9
        token      p0  p1  p2  p3 | q0  q1  q2 | a0 | b0  b1
        predicts               a0 |         c0 | a1 | b1  b2
                               b0 |

    >>> layout = completion_layout([4, 3], [4, 2], [[2, 3], [1]])
    >>> fed_lengths, prefix, positions, predicting_rows = layout
    >>> fed_lengths                          # of each completion
    [1, 2, 0]
    >>> prefix                               # tokens of a prompt, fed tokens of its group
    [(4, 3), (3, 0)]
    >>> positions                            # of a0 | b0, b1, the same on all axes
    tensor([4, 4, 5])
    >>> predicting_rows                      # of a0, a1 | b0, b1, b2 | c0
    tensor([3, 7, 3, 8, 9, 6])
    """
    fed_lengths, prefix, fed_positions, predicting_rows = [], [], [], []
    prompt_end = 0
    start = sum(prompt_lengths)                  # row of the next completion's token 0
    for prompt, first, group in zip(prompt_lengths, first_positions, completion_lengths):
        prompt_end += prompt
        for length in group:
            fed = length - 1
            fed_lengths.append(fed)
            fed_positions += range(first, first + fed)
            predicting_rows += [prompt_end - 1, *range(start, start + fed)]
            start += fed
        prefix.append((prompt, sum(group) - len(group)))
    return (fed_lengths, prefix, torch.tensor(fed_positions, dtype=torch.long),
            torch.tensor(predicting_rows, dtype=torch.long))


# ---------------------------------------------------------------- the whole model

class QwenVL(nn.Module):
    """stop_ids: ids that end a completion. banned (V,) bool: ids that get probability 0 in sampling
    and scoring (image, video and vision markers, ids without text)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.stored_dtype = torch.bfloat16       # what save_pretrained writes
        self.base_dtype: torch.dtype | None = None         # if it has loaded an adapter: its base's
        self.base: Path | None = None            # the folder that the weights come from
        # Qwen3-VL needs timestamps in the text between a video's frames; they are not supported.
        self.refused_id = config.video_id if config.family == "Qwen3-VL" else None
        self.visual = VisionTower(config.vision)
        self.model = LanguageModel(config)
        self.lm_head = nn.Linear(config.hidden, config.vocab, bias=False)
        if config.tied:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.set_vocabulary({})

    def set_vocabulary(self, token_ids: dict[str, int]) -> None:
        """token_ids: text -> id; {} without a tokenizer."""
        # The embedding has more rows than the tokenizer has tokens, so some ids have no text.
        vocab = range(self.config.vocab)
        with_text = set(token_ids.values()) or set(vocab)
        markers = {*self.config.marker_ids, *map(token_ids.get, VISION_MARKERS)}
        banned = torch.tensor([i not in with_text or i in markers for i in vocab])
        # A buffer moves to the device with the weights; this one is not saved.
        self.register_buffer("banned", banned.to(self.device), persistent=False)
        stop_ids = tuple(token_ids[text] for text in STOP_TOKENS if text in token_ids)
        self.stop_ids = stop_ids or self.config.stop_ids

    @property
    def device(self) -> torch.device:
        return self.model.norm.weight.device

    def embed(self, input_ids: Tensor, pixel_values: Tensor | None,
              grids: Sequence[Grid]) -> tuple[Tensor, Deepstack | None]:
        """(N,) packed ids and the images' patches -> embeddings (N, D), Qwen3-VL's deepstack."""
        x = self.model.embed_tokens(input_ids)
        if pixel_values is None or not len(pixel_values):
            return x, None
        ends = list(itertools.accumulate((t * h * w for t, h, w in grids), initial=0))
        n = len(pixel_values)
        if ends[-1] != n:
            raise ValueError(f"pixel_values has {n} patches, image_grid_thw {ends[-1]}")
        # One pass if gradients are needed, else small passes of whole images.
        limit = PATCHES_AT_ONCE if self.device.type == "cpu" else CUDA_PATCHES_AT_ONCE
        if torch.is_grad_enabled():
            limit = n
        passes = []
        begin = 0                                # first image of the next pass
        for end in range(1, len(ends)):          # one past that pass's last image
            if ends[end] - ends[begin] >= limit or end == len(grids):
                pixels = pixel_values[ends[begin]:ends[end]].to(self.device)
                passes.append(self.visual(pixels, grids[begin:end]))
                begin = end
        images, *features = torch.cat(passes).to(x.dtype).split(self.config.hidden, 1)
        is_image = input_ids == self.config.image_id
        x = x.masked_scatter(is_image[:, None], images)
        if not features:
            return x, None
        # The size is given, so the host need not wait for the device to count.
        return x, (torch.nonzero_static(is_image, size=len(images))[:, 0], features)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None,
                pixel_values: Tensor | None = None, image_grid_thw: Tensor | None = None) -> Tensor:
        """As in transformers: (B, T) ids and mask (padding on either side), pixel_values (patches,
        D) and image_grid_thw (images, 3) of all sequences -> (B, T, V) logits, 0 at padding.
        Our scripts call score, prefill and decode instead."""
        c = self.config
        mask = (torch.ones_like(input_ids) if attention_mask is None else attention_mask).bool()
        grids = [] if image_grid_thw is None else list(map(tuple, image_grid_thw.tolist()))
        sequences = [ids[keep] for ids, keep in zip(input_ids, mask)]
        positions = mrope_positions(sequences, grids, c.image_id, c.vision.merge, self.refused_id)
        plan = Plan(mask.sum(1).tolist(), device=self.device)
        x, deepstack = self.embed(input_ids[mask], pixel_values, grids)
        hidden = self.model(x, torch.cat(positions, 1).to(x.device), plan, deepstack=deepstack)
        logits = hidden.new_zeros(*input_ids.shape, c.vocab)
        logits[mask] = self.lm_head(hidden)
        return logits

    # ---------------------------------------------------------------- sampling and scoring

    def pack(self, prompts: Sequence[Prompt]) -> tuple[
            Tensor, Tensor, list[int], list[int], Deepstack | None]:
        """Q prompts -> embeddings (N, D), positions (3, N), the length of each prompt, the position
        after each prompt, Qwen3-VL's deepstack."""
        c = self.config
        grids = torch.cat([prompt.image_grid_thw for prompt in prompts]).tolist()
        ids = [prompt.input_ids for prompt in prompts]
        parts = mrope_positions(ids, grids, c.image_id, c.vision.merge, self.refused_id)
        first_positions = [int(part.max()) + 1 for part in parts]
        lengths = [len(part) for part in ids]
        ids, positions = to_device((torch.cat(ids), torch.cat(parts, 1)), self.device)
        # Prompts hold bytes, which are normalised on the device.
        values = torch.cat([prompt.pixels.values for prompt in prompts])
        dtype = self.visual.patch_embed.proj.weight.dtype
        pixels = replace(prompts[0].pixels, values=values).normalised(self.device, dtype)
        x, deepstack = self.embed(ids, pixels, grids)
        return x, positions, lengths, first_positions, deepstack

    def prefill(self, prompts: Sequence[Prompt], group: int,
                max_new_tokens: int) -> tuple[Tensor, Cache, Tensor]:
        """Q prompts -> logits (Q, V) of the first new token, a Cache for G rollouts of each prompt,
        the position (Q,) of that token."""
        x, positions, lengths, first_positions, deepstack = self.pack(prompts)
        starts, first_positions = to_device(
            (cumulative(lengths), torch.tensor(first_positions)), self.device)
        plan = Plan(lengths, kv_cache=[], device=self.device, starts=starts)
        hidden = self.model(x, positions, plan, starts[1:] - 1, deepstack)     # last rows
        return self.lm_head(hidden), Cache(plan, group, max_new_tokens), first_positions

    def decode(self, tokens: Tensor, position: Tensor, cache: Cache) -> Tensor:
        """Each rollout's newest token (R,), and its position (R,) -> logits (R, V) of the next."""
        x = self.model.embed_tokens(tokens)
        return self.lm_head(self.model(x, position.expand(3, -1), cache))

    def distribution(self, logits: Tensor, temperature: float) -> Tensor:
        """(..., V) logits -> float32 log-probabilities of the ids that can be sampled."""
        scaled = logits.float() / temperature
        return scaled.masked_fill(self.banned, NEVER).log_softmax(-1)

    def score(self, prompts: Sequence[Prompt], completions: Sequence[Sequence[Tensor]],
              temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """Q prompts, each with G completions (L,), end-of-turn included -> logp (tokens,) and
        entropy (tokens,), float32, packed by question, rollout, token. Entropy has no gradient.
        Each prompt and image is computed once for its whole group."""
        x, positions, prompt_lengths, first_positions, deepstack = self.pack(prompts)
        lengths = [list(map(len, group)) for group in completions]
        fed_lengths, prefix, fed_positions, rows = completion_layout(
            prompt_lengths, first_positions, lengths)
        flat = [c.to(self.device) for c in itertools.chain.from_iterable(completions)]
        targets = torch.cat(flat)                                          # (tokens,)
        fed = torch.cat([completion[:-1] for completion in flat])
        x = torch.cat((x, self.model.embed_tokens(fed).to(x.dtype)))
        positions = torch.cat((positions, fed_positions.to(self.device).expand(3, -1)), 1)
        plan = Plan(prompt_lengths + fed_lengths, prefix=prefix, device=self.device)
        hidden = self.model(x, positions, plan, rows.to(self.device), deepstack)   # (tokens, D)

        def score_chunk(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
            logp = self.distribution(self.lm_head(hidden), temperature)
            with torch.no_grad():
                entropy = -(logp.exp() * logp).sum(-1)
            return logp.gather(-1, targets[:, None])[:, 0], entropy

        # Logits (tokens, V) would be the largest tensor of all, so they are computed in chunks,
        # and again in the backward pass.
        limit = LOGITS_PER_CHUNK if hidden.device.type == "cpu" else CUDA_LOGITS_PER_CHUNK
        size = max(1, limit // self.config.vocab)
        chunks = zip(hidden.split(size), targets.split(size))
        logps, entropies = zip(*(checkpoint(score_chunk, *chunk) for chunk in chunks))
        return torch.cat(logps), torch.cat(entropies)

    # ---------------------------------------------------------------- checkpoints

    @classmethod
    def from_pretrained(cls, path: str | Path, dtype: torch.dtype | None = torch.bfloat16,
                        device: torch.device | str = "cpu") -> QwenVL:
        """Reads a checkpoint's folder, a stage's (its newest step) or an adapter's (with its base).
        dtype None: as stored. CheckpointError if tensors are missing, unexpected or misshaped."""
        path = folder(path)
        base = base_folder(path)
        config = Config.from_json(base / "config.json")
        try:
            with torch.device("meta"):
                model = cls(config)
        except Exception as error:               # torch raises several types about sizes
            reason = str(error).splitlines()[0]
            raise CheckpointError(f"{base / 'config.json'}: no model has these sizes ({reason}); "
                                  "copy the file again from where it came from") from None
        shapes = {name: p.shape for name, p in model.state_dict().items()}
        if config.tied:
            shapes.pop("lm_head.weight")
        tensors, model.stored_dtype = read_weights(base, shapes, config.tied, dtype, device)
        model.load_state_dict(tensors, strict=False, assign=True)
        # load_state_dict has replaced the embedding, so the head is tied to it again.
        if config.tied:
            model.lm_head.weight = model.model.embed_tokens.weight
        model.set_vocabulary(read_token_ids(path) or read_token_ids(base))
        model.base = base
        if (path / ADAPTER_CONFIG).exists():
            lora.load_adapter(model, path, dtype, device)
        return model

    def save_pretrained(self, path: str | Path, whole: Iterator[Tensor] | None = None,
                        shard_bytes: int = 5 * 10 ** 9) -> None:
        """Writes config.json and safetensors in hub layout, or only adapters in PEFT's layout.
        whole: if the model is sharded over processes, its full tensors in the order of
        stored_files(); each is requested when it is written."""
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        files = self.stored_files(shard_bytes)
        if whole is None:
            whole = itertools.chain.from_iterable(x.values() for x in files.values())
        if layers := lora.adapted(self):
            layer = next(iter(layers.values()))
            alpha = int(layer.alpha) if layer.alpha == int(layer.alpha) else layer.alpha
            write_json(path / ADAPTER_CONFIG, {
                "peft_type": "LORA", "task_type": "CAUSAL_LM",
                "base_model_name_or_path": str(self.base.resolve()), "inference_mode": True,
                "r": layer.rank, "lora_alpha": alpha, "lora_dropout": 0.0, "bias": "none",
                # Full names, because "gate_proj" would also match layers of the vision tower.
                "target_modules": [nested_name(name) for name in layers]})
        else:
            write_json(path / "config.json", self.config.raw)
        weight_map, total = {}, 0
        for file, tensors in files.items():
            shapes = {name: tensor.shape for name, tensor in tensors.items()}
            write_tensors(path / file, shapes, self.stored_dtype, whole, {"format": "pt"})
            weight_map |= dict.fromkeys(tensors, file)
            total += sum(x.numel() for x in tensors.values()) * self.stored_dtype.itemsize
        if len(files) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            write_json(path / WEIGHT_INDEX, index)

    def stored_files(self, shard_bytes: int = 5 * 10 ** 9) -> dict[str, dict[str, Tensor]]:
        """What save_pretrained writes: file -> tensor name (sorted) -> tensor of this model. A file
        is at most `shard_bytes` long, unless a single tensor is longer."""
        if lora.adapted(self):
            names = {f"base_model.model.{nested_name(n)}.weight": p
                     for n, p in lora.saved_parameters(self)}
            return {lora.WEIGHTS: dict(sorted(names.items()))}
        shards: list[dict[str, Tensor]] = [{}]
        size = 0
        for name, tensor in self.state_dict().items():
            if name == "lm_head.weight" and self.config.tied:
                continue
            n = tensor.numel() * self.stored_dtype.itemsize
            if shards[-1] and size + n > shard_bytes:
                shards.append({})
                size = 0
            stored_name = nested_name(name) if self.config.family == "Qwen3-VL" else name
            shards[-1][stored_name] = tensor
            size += n
        n = len(shards)
        names = ["model.safetensors"] if n == 1 else [
            f"model-{i:05d}-of-{n:05d}.safetensors" for i in range(1, n + 1)]
        return {name: dict(sorted(shard.items())) for name, shard in zip(names, shards)}
