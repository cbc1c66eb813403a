"""Speed: each part of the work beside what a user would run instead, with the same weights.

Both sides run in one process, with the same random weights, and repeats alternate between ours
and theirs. A row has the median of each, the ratio of the medians, and the spread of the ratio
over repeats. A ratio above 1 means that ours is faster (or smaller). Beside it stands what share
of the machine's matrix rate, measured in the same run, our side reaches.

A row is written to bench.json when it is measured. A side that runs out of memory says so in
its row, and the other rows go on.

Peers: transformers' model, `generate` and image processor; and, for the update, our own code
fed a prompt G times over, as TRL's trainer feeds it to the model.

    python bench.py                                      the mid shape on a CPU; minutes
    python bench.py --device cuda --shape 3b             one GPU
    python bench.py --shape tiny --only decode update    two parts, in seconds
"""
import argparse
import copy
import functools
import gc
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from model import Config, QwenVL
from qwen.generate import generate
from qwen.hub import nested_name
from qwen.processor import Pixels, Processor, Prompt
from train import dist
from train.flags import FlagParser, add_device_flag, positive
from train.run import launch

PARTS = ("load", "prefill", "decode", "update", "step", "sft", "images", "numerics", "profile")
# From this width on a GPU trains with gradient checkpointing: eight repeated prompts of the 3B
# shape (2,048) would keep more than 110 GB.
LARGE_WIDTH = 1024
TEXT = 50                         # tokens of text in a prompt
GROUP = 8                         # rollouts of a prompt


@dataclass(frozen=True)
class Shape:
    """Sizes of a model, and the side in pixels of the image that it is measured with."""

    depth: int                    # of the vision tower, in blocks
    vision_width: int
    vision_heads: int
    vision_inner: int             # width within the MLP
    full_blocks: tuple[int, ...]  # those that attend to the whole image
    layers: int                   # of the language model
    width: int
    heads: int
    kv_heads: int
    inner: int
    vocab: int
    tied: bool                    # the head is the embedding
    image_side: int
    family: str = "Qwen2.5-VL"
    head_dim: int | None = None   # of the language model; default: width / heads
    deepstack: tuple[int, ...] = ()      # Qwen3-VL's blocks whose output the first layers receive


SHAPES = {
    "tiny": Shape(
        depth=2, vision_width=64, vision_heads=2, vision_inner=128, full_blocks=(1,),
        layers=2, width=128, heads=4, kv_heads=2, inner=256,
        vocab=1024, tied=True, image_side=112),
    "mid": Shape(
        depth=8, vision_width=512, vision_heads=8, vision_inner=1376, full_blocks=(3, 7),
        layers=12, width=640, heads=10, kv_heads=2, inner=1728,
        vocab=8192, tied=True, image_side=448),
    "3b": Shape(
        depth=32, vision_width=1280, vision_heads=16, vision_inner=3420,
        full_blocks=(7, 15, 23, 31), layers=36, width=2048, heads=16, kv_heads=2, inner=11008,
        vocab=151_936, tied=True, image_side=800),
    "7b": Shape(
        depth=32, vision_width=1280, vision_heads=16, vision_inner=3420,
        full_blocks=(7, 15, 23, 31), layers=28, width=3584, heads=28, kv_heads=4, inner=18944,
        vocab=152_064, tied=False, image_side=800),
    "qwen2-tiny": Shape(
        depth=2, vision_width=64, vision_heads=2, vision_inner=128, full_blocks=(),
        layers=2, width=128, heads=4, kv_heads=2, inner=256,
        vocab=1024, tied=True, image_side=112, family="Qwen2-VL"),
    "qwen2-2b": Shape(
        depth=32, vision_width=1280, vision_heads=16, vision_inner=5120, full_blocks=(),
        layers=28, width=1536, heads=12, kv_heads=2, inner=8960,
        vocab=151_936, tied=True, image_side=800, family="Qwen2-VL"),
    "qwen3-tiny": Shape(
        depth=2, vision_width=64, vision_heads=2, vision_inner=128, full_blocks=(),
        layers=2, width=128, heads=4, kv_heads=2, inner=256,
        vocab=1024, tied=True, image_side=128, family="Qwen3-VL", head_dim=48, deepstack=(0,)),
    "qwen3-2b": Shape(
        depth=24, vision_width=1024, vision_heads=16, vision_inner=4096, full_blocks=(),
        layers=28, width=2048, heads=16, kv_heads=8, inner=6144,
        vocab=151_936, tied=True, image_side=800, family="Qwen3-VL", deepstack=(5, 11, 17)),
    "qwen3-4b": Shape(
        depth=24, vision_width=1024, vision_heads=16, vision_inner=4096, full_blocks=(),
        layers=36, width=2560, heads=32, kv_heads=8, inner=9728, vocab=151_936, tied=True,
        image_side=800, family="Qwen3-VL", head_dim=128, deepstack=(5, 11, 17)),
    "qwen3-8b": Shape(
        depth=27, vision_width=1152, vision_heads=16, vision_inner=4304, full_blocks=(),
        layers=36, width=4096, heads=32, kv_heads=8, inner=12288, vocab=151_936, tied=False,
        image_side=800, family="Qwen3-VL", deepstack=(8, 16, 24)),
}
# A family's `model_type` in config.json, and transformers' class.
MODELS = {
    "Qwen2-VL": ("qwen2_vl", "Qwen2VLForConditionalGeneration"),
    "Qwen2.5-VL": ("qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration"),
    "Qwen3-VL": ("qwen3_vl", "Qwen3VLForConditionalGeneration")}


def flags() -> FlagParser:
    parser = FlagParser(
        "Measures each part of the work beside what a user would run instead")
    add = parser.add_argument
    add("--shape", choices=SHAPES, default="mid", help="of the model, random weights")
    add_device_flag(add)
    add("--dtype", choices=("float32", "bfloat16"),
        help="default: bfloat16 on CUDA, float32 on a CPU")
    add("--repeats", type=positive, default=3,
        help="alternating repeats behind one warm-up")
    add("--prompts", type=positive, default=8,
        help="questions in decode and step, eight rollouts each")
    add("--tokens", type=positive, help="of a completion; default 64, on CUDA 256")
    add("--only", nargs="+", choices=PARTS, help="these rows alone")
    add("--out", default=".", help="folder of bench.json")
    return parser


# ---------------------------------------------------------------- random weights and inputs

def write_checkpoint(
        folder: Path, shape_name: str, dtype: torch.dtype, vocab: int | None = None) -> Path:
    """Random weights and config.json of a shape, in hub layout -> the folder."""
    shape = SHAPES[shape_name]
    folder.mkdir(parents=True, exist_ok=True)
    config_file = folder / "config.json"
    config_file.write_text(json.dumps(hub_config(shape, dtype, vocab or shape.vocab)))
    torch.manual_seed(0)
    with torch.device("meta"):
        model = QwenVL(Config.from_json(config_file))
    parameters = model.state_dict()
    qwen3 = shape.family == "Qwen3-VL"
    stored = {name: nested_name(name) if qwen3 else name for name in parameters}
    # A GPU is done with billions of random numbers in no time.
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tensors = {}
    for name, p in parameters.items():
        if shape.tied and name == "lm_head.weight":
            continue
        if name.endswith("weight") and ("norm" in name or "ln_q" in name):
            tensors[stored[name]] = torch.ones(p.shape, dtype=dtype)
        else:
            random = torch.empty(p.shape, dtype=dtype, device=device).normal_(0, 0.02)
            tensors[stored[name]] = random.cpu()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def hub_config(shape: Shape, dtype: torch.dtype, vocab: int) -> dict[str, Any]:
    """config.json as transformers reads it; the vocabulary's last ids are the special ones."""
    # Rotary frequencies are shared out over time, height and width.
    head_dim = shape.head_dim or shape.width // shape.heads
    frequencies = head_dim // 2
    time_share = frequencies // 4
    height_share = (frequencies - time_share) // 2
    sections = [time_share, height_share, frequencies - time_share - height_share]
    model_type, architecture = MODELS[shape.family]
    text = {
        "hidden_size": shape.width, "intermediate_size": shape.inner,
        "num_hidden_layers": shape.layers, "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
        "rope_scaling": {"type": "mrope", "mrope_section": sections}, "vocab_size": vocab,
        "max_position_embeddings": 32768, "hidden_act": "silu",
        "bos_token_id": vocab - 6, "eos_token_id": vocab - 5}
    whole = {
        "architectures": [architecture], "model_type": model_type,
        "tie_word_embeddings": shape.tied, "torch_dtype": dtype_name(dtype),
        "vision_start_token_id": vocab - 4, "vision_end_token_id": vocab - 3,
        "image_token_id": vocab - 2, "video_token_id": vocab - 1,
        "vision_config": vision_config(shape)}
    if shape.family != "Qwen3-VL":
        return {**whole, **text}
    rope = {"rope_type": "default", "mrope_interleaved": True, "mrope_section": sections}
    text |= {"head_dim": head_dim, "attention_bias": False, "rope_scaling": rope}
    return {**whole, "text_config": text}


def vision_config(shape: Shape) -> dict[str, Any]:
    """config.json's part on the vision tower."""
    vision = {
        "depth": shape.depth, "hidden_size": shape.vision_width, "num_heads": shape.vision_heads,
        "intermediate_size": shape.vision_inner, "out_hidden_size": shape.width, "in_chans": 3,
        "patch_size": 14, "temporal_patch_size": 2, "spatial_merge_size": 2}
    if shape.family == "Qwen2-VL":
        return vision | {
            "embed_dim": shape.vision_width, "hidden_size": shape.width,
            "mlp_ratio": shape.vision_inner // shape.vision_width}
    if shape.family == "Qwen3-VL":
        return vision | {
            "patch_size": 16, "num_position_embeddings": 48 ** 2,
            "hidden_act": "gelu_pytorch_tanh", "deepstack_visual_indexes": list(shape.deepstack)}
    return vision | {
        "window_size": 112, "fullatt_block_indexes": list(shape.full_blocks),
        "hidden_act": "silu", "tokens_per_second": 2}


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def random_ids(model: QwenVL, n: int, seed: int) -> Tensor:
    """n ordinary ids, (n,)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, model.config.vocab - 8, (n,), generator=generator)


def random_prompt(model: QwenVL, side: int, seed: int, text: int = TEXT) -> Prompt:
    """Random ids and pixels: an image of about side x side pixels within `text` tokens."""
    config = model.config
    patch = config.vision.patch
    n = round(side / patch / 2)                      # tokens along a side, of 2 x 2 patches
    text_ids = random_ids(model, text, seed)
    image_ids = torch.tensor(
        [config.marker_ids[-2], *[config.image_id] * n * n, config.marker_ids[-1]])
    ids = torch.cat((text_ids[:4], image_ids, text_ids[4:]))
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(                          # (patches, channels, patch, patch)
        0, 256, ((2 * n) ** 2, 3, patch, patch), dtype=torch.uint8, generator=generator)
    pixels = Pixels(values, torch.linspace(-2, 2, 256).expand(3, -1), frames=2)
    return Prompt(ids, pixels, torch.tensor([[1, 2 * n, 2 * n]]), None)


# ---------------------------------------------------------------- both sides of a comparison

class Peer:
    """transformers' model with the same weights."""

    def __init__(self, folder: Path, dtype: torch.dtype, device: torch.device) -> None:
        import transformers
        config = json.loads((folder / "config.json").read_text())
        self.model = getattr(transformers, config["architectures"][0]).from_pretrained(
            folder, dtype=dtype, attn_implementation="sdpa").to(device)
        self.device = device
        # Its users' processor has made floats before the model is called.
        self.pixels: dict[int, Tensor] = {}

    def pixel_values(self, prompt: Prompt) -> Tensor:
        """(patches, D) float32 of a prompt, made once."""
        if id(prompt) not in self.pixels:
            self.pixels[id(prompt)] = prompt.pixel_values
        return self.pixels[id(prompt)]

    def pad(
            self, prompts: Sequence[Prompt], completions: Sequence[Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """The model's inputs, a padded row a prompt.

        Prompts alone are for generation and padded on the left; with a completion each they are
        for training and padded on the right.
        """
        rows = [p.input_ids for p in prompts]
        if completions is not None:
            rows = [torch.cat((ids, c)) for ids, c in zip(rows, completions)]
        width = max(map(len, rows))
        ids = torch.zeros(len(rows), width, dtype=torch.long)      # (B, T)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            places = slice(width - len(row), None) if completions is None else slice(len(row))
            ids[i, places] = row
            mask[i, places] = 1
        inputs = {
            "input_ids": ids,
            "attention_mask": mask,
            "pixel_values": torch.cat([self.pixel_values(p) for p in prompts]),
            "image_grid_thw": torch.cat([p.image_grid_thw for p in prompts]),
            # Newer versions ask which tokens are an image's.
            "mm_token_type_ids": (ids == self.model.config.image_token_id).int(),
        }
        return {name: x.to(self.device) for name, x in inputs.items()}

    def generate(self, prompts: Sequence[Prompt], group: int, tokens: int) -> Tensor:
        """`group` completions of exactly `tokens` tokens for each prompt."""
        return self.model.generate(
            **self.pad(prompts), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=True,
            temperature=1.0, top_k=0, top_p=1.0, num_return_sequences=group, eos_token_id=None,
            pad_token_id=0)

    def score(self, prompts: Sequence[Prompt], completions: Sequence[Tensor]) -> Tensor:
        """Log-probabilities (B, n) of completions of one length n, as TRL's trainer has them.

        Each completion has a padded row with its prompt, and only the last logits are computed.
        """
        n = len(completions[0])
        output = self.model(
            **self.pad(prompts, completions), logits_to_keep=n + 1, use_cache=False)
        logp = output.logits[:, :-1].float().log_softmax(-1)       # (B, n, V)
        targets = torch.stack(list(completions)).to(self.device)   # (B, n)
        return logp.gather(-1, targets[..., None])[..., 0]


@dataclass
class Workload:
    """What the rows work on: both models with the same weights, and the same inputs for both."""

    ours: QwenVL
    peer: Peer
    prompts: list[Prompt]            # Q
    completions: list[list[Tensor]]  # Q lists of GROUP, each (tokens,)
    tokens: int
    image_side: int                  # pixels
    checkpointing: bool = False      # passes with gradient keep no activations within a layer

    def __post_init__(self) -> None:
        if self.checkpointing:
            self.peer.model.gradient_checkpointing_enable({"use_reentrant": False})

    def sample_ours(self, tokens: int) -> None:
        seeds = torch.arange(len(self.prompts))
        generate(self.ours, self.prompts, GROUP, tokens, 1.0, seeds)

    def sample_theirs(self, tokens: int) -> None:
        self.peer.generate(self.prompts, GROUP, tokens)

    def update_ours(self, q: int = 0) -> None:
        """Forward and backward pass of a group, its prompt computed once."""
        with self.training():
            logp, _ = self.ours.score([self.prompts[q]], [self.completions[q]])
            group_loss(logp, q).backward()

    def update_repeated(self, q: int = 0) -> None:
        """The same by our model, with the prompt once for each rollout."""
        one_each = [[c] for c in self.completions[q]]
        with self.training():
            logp, _ = self.ours.score([self.prompts[q]] * GROUP, one_each)
            group_loss(logp, q).backward()

    def update_theirs(self, q: int = 0) -> None:
        """The same by transformers' model."""
        with self.training():
            logp = self.peer.score([self.prompts[q]] * GROUP, self.completions[q])
            group_loss(logp, q).backward()

    @contextmanager
    def training(self) -> Iterator[None]:
        """Inside, both models checkpoint where the workload says so."""
        self.set_checkpointing(self.checkpointing)
        try:
            yield
        finally:
            self.set_checkpointing(False)

    def set_checkpointing(self, on: bool) -> None:
        self.ours.visual.checkpointing = on
        self.ours.model.checkpointing = on
        # transformers' model checkpoints in training mode alone, and samples without a cache
        # then. It has no dropout.
        self.peer.model.train(on)

    def clear_gradients(self) -> None:
        self.ours.zero_grad(set_to_none=True)
        self.peer.model.zero_grad(set_to_none=True)


def group_loss(logp: Tensor, seed: int) -> Tensor:
    """A policy-gradient loss of random advantages over (rows, L) or packed log-probabilities."""
    generator = torch.Generator().manual_seed(seed)
    advantages = torch.randn(logp.numel(), generator=generator).to(logp.device)
    return -(logp.flatten() * advantages).sum() / logp.numel()


def open_workload(
        folder: Path, args: argparse.Namespace, dtype: torch.dtype, device: torch.device,
) -> Workload:
    """Loads both models and makes the inputs."""
    ours = QwenVL.from_pretrained(folder, dtype, device).requires_grad_(True)
    # Nothing stops a rollout: every one is as long as asked for.
    ours.stop_ids = ()
    peer = Peer(folder, dtype, device)
    side = SHAPES[args.shape].image_side
    prompts = [random_prompt(ours, side, q) for q in range(args.prompts)]
    completions = []
    for q in range(args.prompts):
        completions.append([random_ids(ours, args.tokens, 97 * q + g) for g in range(GROUP)])
    checkpointing = device.type == "cuda" and SHAPES[args.shape].width >= LARGE_WIDTH
    return Workload(ours, peer, prompts, completions, args.tokens, side, checkpointing)


# ---------------------------------------------------------------- measuring

def clock(work: Callable[[], Any], device: torch.device) -> float | None:
    """Seconds that work() takes, on CUDA until the device is done; None where the memory does not
    suffice."""
    gc.collect()
    synchronize(device)
    started = time.perf_counter()
    try:
        work()
        synchronize(device)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        return None
    return time.perf_counter() - started


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory did not suffice: a GPU's, torch's on the CPU, Python's, or
    that of a process of its own in its last words."""
    words = ("can't allocate memory", "not enough memory", "OutOfMemoryError", "MemoryError")
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return any(word in str(error) for word in words)


@dataclass(frozen=True)
class Work:
    """What a call of a row's side does."""

    unit: str = "s"            # the row is in seconds, or a rate such as "tokens/s"
    amount: float = 1.0        # of what the rate counts
    flops: float = 0.0         # of the matrix products that our way takes; 0: none to speak of

    def figure(self, seconds: float | None) -> float | None:
        """A call's seconds in this unit."""
        if seconds is None or self.unit == "s":
            return seconds
        return self.amount / seconds


@dataclass
class Row:
    """A row of bench.json; None where a side ran out of memory."""

    name: str
    peer: str
    ours: float | None
    theirs: float | None
    unit: str
    ratio: float | None          # above 1: ours is faster, or smaller
    spread: list[float] | None   # the least and the largest ratio of a repeat
    out_of_memory: tuple[str, ...] = ()       # the sides that did: "ours", "theirs"


class Table:
    """Measures rows, prints them as they come, and writes bench.json behind each."""

    def __init__(
            self, file: Path, repeats: int, device: torch.device, report: dict[str, Any],
            ceilings: Callable[[], dict[str, float]]) -> None:
        """report: what bench.json has beside the rows; ceilings: measures what is named there."""
        self.file = file
        self.repeats = repeats
        self.device = device
        self.ceilings = ceilings
        self.rows: list[dict[str, Any]] = []
        self.report = {**report, **ceilings(), "rows": self.rows}

    def compare(
            self, name: str, peer: str, ours: Callable[[], Any], theirs: Callable[[], Any],
            work: Work) -> tuple[float | None, float | None]:
        """Adds a row that times ours() and theirs() in turn, behind one warm-up each -> the
        median seconds of each, None of a side that ran out of memory."""
        self.raise_ceilings()
        sides = {"ours": ours, "theirs": theirs}
        times = {"ours": [], "theirs": []}
        for i in tqdm(range(self.repeats + 1), desc=f"{name}, {peer}", leave=False):
            for side in list(sides):
                seconds = clock(sides[side], self.device)
                if seconds is None:
                    # It would again. The other side is measured all the same.
                    del sides[side]
                    release(self.device)
                elif i > 0:
                    times[side].append(seconds)
        a, b = (statistics.median(times[side]) if side in sides else None for side in times)
        ratios = [t / o for o, t in zip(times["ours"], times["theirs"])]
        both = len(sides) == 2
        row = Row(name, peer, work.figure(a), work.figure(b), work.unit,
                  b / a if both else None, [min(ratios), max(ratios)] if both else None,
                  tuple(side for side in times if side not in sides))
        self.add(row, matrix_rate(work.flops, a))
        return a, b

    def raise_ceilings(self) -> None:
        """A CPU's cores may be others' for a while: its ceilings are the best of the whole run. A
        GPU is ours alone, and may have no room left for another try."""
        if self.device.type == "cpu":
            for name, value in self.ceilings().items():
                self.report[name] = max(self.report[name], value)

    def add(self, row: Row, more: dict[str, float] | None = None) -> None:
        """Keeps a row, with what else is known of it, prints and writes it."""
        values = asdict(row) | (more or {})
        if not row.out_of_memory:
            del values["out_of_memory"]
        self.rows.append(values)
        self.set_shares()
        figures = [f"{'no memory' if v is None else format(v, '.4g'):>12}"
                   for v in (row.ours, row.theirs)]
        line = f"{row.name:8} {row.peer:44} {' '.join(figures)} {row.unit:16} "
        if row.ratio is None:
            line += f"out of memory: {' and '.join(row.out_of_memory)}"
        else:
            line += f"{row.ratio:6.2f}x   {row.spread[0]:.2f} .. {row.spread[1]:.2f}"
        for key, ceiling in (("share", "matrix rate"), ("bandwidth_share", "bandwidth")):
            if key in values:
                line += f"   {values[key]:.0%} of the {ceiling}"
        tqdm.write(line)
        self.write()

    def set_shares(self) -> None:
        """Says in every row what share of the machine's ceilings ours reaches."""
        for row in self.rows:
            if "TFLOPs" in row:
                row["share"] = row["TFLOPs"] / self.report["matrix_TFLOPs"]
            if "TBs" in row:
                row["bandwidth_share"] = row["TBs"] / self.report["bandwidth_TBs"]

    def write(self) -> None:
        """Writes bench.json whole or not at all."""
        self.report["peak_memory_GiB"] = peak_memory(self.device)
        temporary = self.file.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.report, indent=2) + "\n")
        os.replace(temporary, self.file)

    def attempt(self, part: str, measure: Callable[[], Any]) -> Any:
        """measure() -> what it gives. Where memory does not suffice beside the rows' calls, a row
        says so, and the result is None."""
        try:
            return measure()
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
        release(self.device)
        self.add(Row(part, "beside the calls that are timed", None, None, "s", None, None, (part,)))
        return None


def release(device: torch.device) -> None:
    """Gives back what a failed call has left over."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def peak_memory(device: torch.device) -> float:
    """GiB at most so far, of the GPU or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2 ** 30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20


# ---------------------------------------------------------------- the rows

LOADER = """
import json, sys, time, torch
ours, folder, dtype = sys.argv[1] == "ours", sys.argv[2], getattr(torch, sys.argv[3])
if ours:
    from model import QwenVL as Model
else:
    import transformers
    [name] = json.load(open(folder + "/config.json"))["architectures"]
    Model = getattr(transformers, name)

def status(key):
    for line in open("/proc/self/status"):
        if line.startswith(key):
            return int(line.split()[1]) / 1024

memory_before = status("VmRSS")
started = time.perf_counter()
model = Model.from_pretrained(folder, dtype=dtype)
# Every page of the memory map is read.
touched = sum(p.detach().flatten()[::512].float().sum().item() for p in model.parameters())
print(time.perf_counter() - started, status("VmHWM") - memory_before)
"""


def bench_load(table: Table, folder: Path, dtype: torch.dtype) -> None:
    """Seconds and MiB of from_pretrained: ours beside transformers', a fresh process each.

    Every weight is read once, so that a memory map does not look as if it were free.
    """
    measured = {"ours": [], "theirs": []}                   # rows of seconds, MiB
    for _ in tqdm(range(table.repeats + 1), desc="load", leave=False):
        for side, results in measured.items():
            results.append(load_once(side, folder, dtype))
    # The first of each fills the file cache.
    ours = np.array(measured["ours"][1:])
    theirs = np.array(measured["theirs"][1:])
    for i, unit in enumerate(("s", "MiB at peak")):
        ratios = (theirs[:, i] / ours[:, i]).tolist()
        a = float(np.median(ours[:, i]))
        b = float(np.median(theirs[:, i]))
        table.add(Row("load", "transformers from_pretrained", a, b, unit, b / a,
                      [min(ratios), max(ratios)]))


def load_once(side: str, folder: Path, dtype: torch.dtype) -> list[float]:
    """Seconds and MiB of loading in a process of its own; side: "ours" or "theirs"."""
    loader = subprocess.run(
        [sys.executable, "-c", LOADER, side, str(folder), dtype_name(dtype)],
        capture_output=True, text=True, cwd=Path(__file__).parent, check=False)
    if loader.returncode:
        raise RuntimeError(loader.stderr)
    return [float(v) for v in loader.stdout.split()]


def bench_prefill(table: Table, w: Workload) -> None:
    """Prompts through the model once: ours packed, with room for rollouts, theirs padded."""
    @torch.no_grad()
    def ours() -> None:
        w.ours.prefill(w.prompts, GROUP, 1)

    @torch.no_grad()
    def theirs() -> None:
        w.peer.model(**w.peer.pad(w.prompts), logits_to_keep=1, use_cache=True)
    tokens = sum(len(p.input_ids) for p in w.prompts)
    table.compare("prefill", "transformers forward, no rollouts yet", ours, theirs,
                  Work("prompt tokens/s", tokens, prefill_flops(w.ours, w.prompts)))


def bench_decode(table: Table, w: Workload) -> None:
    """Sampling GROUP rollouts a prompt: ours over a shared prompt, theirs a row a rollout.

    Whole completions, then the first token alone; the difference is what one step costs.
    """
    flops = sampling_flops(w.ours, w.prompts, w.tokens)
    first_flops = prefill_flops(w.ours, w.prompts)
    whole = table.compare(
        "decode", "transformers generate, prefill included",
        lambda: w.sample_ours(w.tokens), lambda: w.sample_theirs(w.tokens),
        Work("new tokens/s", len(w.prompts) * GROUP * w.tokens, flops))
    first = table.compare(
        "decode", "transformers generate, first token alone",
        lambda: w.sample_ours(1), lambda: w.sample_theirs(1), Work(flops=first_flops))
    a, b = (one_step(*times, w.tokens) for times in zip(whole, first))
    ratio = None if None in (a, b) else b / a
    row = Row("decode", "transformers generate, one step (difference)", a, b, "s", ratio,
              ratio and [ratio, ratio],
              tuple(side for side, seconds in (("ours", a), ("theirs", b)) if seconds is None))
    table.add(row, matrix_rate((flops - first_flops) / (w.tokens - 1), a) | read_rate(w, a))


def one_step(whole: float | None, first: float | None, tokens: int) -> float | None:
    """Seconds of a token behind the first, from those of a completion and of its first token."""
    return None if None in (whole, first) else (whole - first) / (tokens - 1)


def bench_update(table: Table, w: Workload) -> None:
    """Forward and backward pass of one group: ours with the prompt computed once for all rollouts.

    Beside it, with the prompt repeated for each rollout, first our own model, then transformers'.
    """
    work = Work("tokens/s", GROUP * w.tokens,
                update_flops(w.ours, w.prompts[0], GROUP, w.tokens))
    w.clear_gradients()
    table.compare("update", "ours, prompt repeated for each rollout",
                  w.update_ours, w.update_repeated, work)
    w.clear_gradients()
    table.compare("update", "transformers, prompt repeated", w.update_ours, w.update_theirs, work)
    w.clear_gradients()
    row = table.rows[-1]
    row["gradient_difference"] = gradient_difference(w.ours, w.update_ours, w.update_repeated)
    print("         largest relative difference of a gradient, shared or repeated: "
          f"{row['gradient_difference']:.1e}")
    table.write()


def bench_step(table: Table, w: Workload) -> None:
    """An RFT step on either side: rollouts of all prompts, an update a group, AdamW."""
    fused = table.device.type == "cuda"
    our_optimizer = torch.optim.AdamW(w.ours.parameters(), lr=1e-6, fused=fused)
    their_optimizer = torch.optim.AdamW(w.peer.model.parameters(), lr=1e-6, fused=fused)

    def update(group_update: Callable[[int], None], optimizer: torch.optim.Optimizer) -> None:
        for q in range(len(w.prompts)):
            group_update(q)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def ours() -> None:
        w.sample_ours(w.tokens)
        update(w.update_ours, our_optimizer)

    def theirs() -> None:
        w.sample_theirs(w.tokens)
        update(w.update_theirs, their_optimizer)
    flops = sampling_flops(w.ours, w.prompts, w.tokens)
    flops += sum(update_flops(w.ours, p, GROUP, w.tokens) for p in w.prompts)
    table.compare("step", "transformers generate and repeated update", ours, theirs,
                  Work(flops=flops))
    w.clear_gradients()


def bench_sft(table: Table, w: Workload) -> None:
    """Forward and backward pass of eight unequal records: ours packed, theirs a padded batch."""
    prompts = []
    for i in range(8):
        side = w.image_side if i % 2 else w.image_side // 2
        prompts.append(random_prompt(w.ours, side, 50 + i, TEXT + 8 * (i % 5)))
    answers = [random_ids(w.ours, 40 + 25 * (i % 6), i) for i in range(8)]

    def ours() -> None:
        with w.training():
            logp, _ = w.ours.score(prompts, [[a] for a in answers])
            (-logp.mean()).backward()

    def theirs() -> None:
        batch = w.peer.pad(prompts, answers)
        labels = torch.full_like(batch["input_ids"], -100)       # -100: not in the loss
        for row, p, a in zip(labels, prompts, answers):
            row[len(p.input_ids):len(p.input_ids) + len(a)] = a
        with w.training():
            w.peer.model(**batch, labels=labels, use_cache=False).loss.backward()
    tokens = sum(len(p.input_ids) + len(a) for p, a in zip(prompts, answers))
    flops = sum(update_flops(w.ours, p, 1, len(a)) for p, a in zip(prompts, answers))
    w.clear_gradients()
    table.compare("sft", "transformers, padded batch of unequal records", ours, theirs,
                  Work("tokens/s", tokens, flops))
    w.clear_gradients()


def bench_images(table: Table) -> None:
    """An 800 x 800 picture decoded, resized, normalised and cut: ours, transformers' processor.

    Both run in this process, eight times a call.
    """
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    peer = Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=28 * 28 * 1280)
    # No tokenizer is at hand, and none is needed.
    processor = Processor.__new__(Processor)
    processor.patch = 14
    processor.temporal_patch = 2
    processor.merge = 2
    processor.min_pixels = 56 * 56
    processor.max_pixels = 28 * 28 * 1280
    processor.mean = np.array(peer.image_mean, np.float32)
    processor.std = np.array(peer.image_std, np.float32)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "scene.jpg"
        noise = np.random.default_rng(0).integers(0, 255, (100, 100, 3), np.uint8)
        Image.fromarray(noise).resize((800, 800)).save(file)

        def ours() -> list[Any]:
            # To floats, as the peer; a run leaves that last part to the device.
            return [processor.patches(Image.open(file))[0].normalised() for _ in range(8)]

        def theirs() -> list[Any]:
            return [peer(Image.open(file).convert("RGB"), return_tensors="pt")
                    for _ in range(8)]
        table.compare("images", "transformers image processor (PIL)", ours, theirs,
                      Work("images/s", 8))


def measure(table: Table, folder: Path, args: argparse.Namespace, dtype: torch.dtype) -> None:
    """Measures the parts that are asked for."""
    try:
        import transformers
        transformers.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
    except ImportError:
        dist.fail("the peers need transformers: pip install -r requirements-dev.txt")
    parts = args.only or PARTS
    # First, while this process holds no model of its own.
    if "load" in parts:
        table.attempt("load", lambda: bench_load(table, folder, dtype))
    w = table.attempt("models", lambda: open_workload(folder, args, dtype, table.device))
    if w is None:
        return
    rows = {"prefill": bench_prefill, "decode": bench_decode, "update": bench_update,
            "step": bench_step, "sft": bench_sft}
    for part, bench in rows.items():
        if part in parts:
            table.attempt(part, functools.partial(bench, table, w))
            w.clear_gradients()
    if "images" in parts:
        bench_images(table)
    findings = {
        "numerics": lambda: numerics(w.ours, w.prompts[:2], w.tokens, table.device),
        "profile": lambda: profile(lambda: w.sample_ours(min(w.tokens, 16)), w.update_ours)}
    for part, find in findings.items():
        if part in parts:
            table.report[part] = table.attempt(part, find)
            table.write()


# ---------------------------------------------------------------- beside the table

def numerics(
        model: QwenVL, prompts: Sequence[Prompt], tokens: int, device: torch.device,
) -> dict[str, dict[str, float]]:
    """How far log-probabilities differ: sampled or scored, this dtype or float32, CUDA graphs."""
    seeds = torch.arange(len(prompts))
    ids, sampled, _ = generate(model, prompts, GROUP, tokens, 1.0, seeds)   # (Q, G, tokens) each
    completions = [list(group) for group in ids]
    with torch.no_grad():
        scored = model.score(prompts, completions)[0].view(sampled.shape)
        model32 = copy.deepcopy(model).float()
        scored32 = model32.score(prompts, completions)[0].view(sampled.shape)
    report = {
        "sampled_scored": logp_difference("sampled or scored", sampled, scored),
        "dtype_float32": logp_difference("this dtype or float32", scored, scored32),
    }
    if device.type == "cuda":
        graph_ids, by_graph, _ = generate(
            model, prompts, GROUP, tokens, 1.0, seeds, cuda_graphs=True)
        # A rollout is compared until a draw falls on the other side of a boundary.
        same = (graph_ids == ids).long().cumprod(-1).bool()
        equal = same.float().mean().item()
        report["graph_eager"] = {
            **logp_difference("by graph or eager", by_graph[same], sampled[same]),
            "tokens_equal": equal}
        print(f"numerics: by graph {equal:.1%} of the tokens lie before any that differs")
    return report


def logp_difference(name: str, a: Tensor, b: Tensor) -> dict[str, float]:
    """Largest and mean difference, printed as well."""
    difference = (a - b).abs()
    largest = difference.max().item()
    mean = difference.mean().item()
    print(f"numerics: {name}: log-probabilities differ by {largest:.1e} at most, "
          f"{mean:.1e} on average")
    return {"largest": largest, "mean": mean}


def profile(*works: Callable[[], Any]) -> list[dict[str, Any]]:
    """The ten largest operations of one pass of each work, by their own time (CUDA: the GPU's)."""
    from torch.profiler import ProfilerActivity
    activities = [ProfilerActivity.CPU]
    own_time = "self_cpu_time_total"
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
        own_time = "self_device_time_total"
    with torch.profiler.profile(activities=activities) as profiler:
        for work in works:
            work()
    events = sorted(profiler.key_averages(), key=lambda e: -getattr(e, own_time))
    total = sum(getattr(e, own_time) for e in events)                  # microseconds
    largest = []
    for event in events[:10]:
        microseconds = getattr(event, own_time)
        share = microseconds / total
        largest.append({"name": event.key, "ms": microseconds / 1e3, "calls": event.count,
                        "share": share})
        print(f"profile: {share:6.1%} {microseconds / 1e3:10.1f} ms {event.count:8} x "
              f"{event.key[:90]}")
    return largest


def gradient_difference(
        model: QwenVL, first: Callable[[], None], second: Callable[[], None]) -> float:
    """How far two gradients differ: the norm of the difference over that of the first, at worst.

    first() and second() add a gradient to the parameters; the worst is over parameters.
    """
    first()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    second()
    differences = []
    for name, p in model.named_parameters():
        if name in gradients:
            reference = gradients[name]
            difference = (p.grad - reference).norm() / (reference.norm() + 1e-12)
            differences.append(difference.item())
    model.zero_grad(set_to_none=True)
    return max(differences)


# ---------------------------------------------------------------- against the machine

def ceilings(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Matrix rate in this dtype and memory bandwidth, as this machine reaches them in this run."""
    cuda = device.type == "cuda"
    n = 8192 if cuda else 1024
    a = torch.randn(n, n, device=device).to(dtype)
    b = torch.randn(n, n, device=device).to(dtype)
    source = torch.zeros(2 ** (31 if cuda else 27), dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)

    def multiply() -> None:
        for _ in range(10):
            a @ b
    multiply()
    multiply_time = min(clock(multiply, device) for _ in range(5)) / 10
    copy_time = min(clock(lambda: target.copy_(source), device) for _ in range(5))
    return {
        "matrix_TFLOPs": 2 * n ** 3 / multiply_time / 1e12,
        "bandwidth_TBs": 2 * source.nbytes / copy_time / 1e12,     # read and written
    }


def matrix_rate(flops: float, seconds: float | None) -> dict[str, float]:
    """TFLOP of a call, and TFLOP/s where it takes these seconds; {} where it has no matrix products
    or ran out of memory."""
    # The difference of two noisy times may be below 0.
    if not flops or seconds is None or seconds <= 0:
        return {}
    return {"TFLOP": flops / 1e12, "TFLOPs": flops / seconds / 1e12}


def read_rate(w: Workload, seconds: float | None) -> dict[str, float]:
    """GB that a decoding step must read at least, and TB/s where it takes these seconds.

    They are the language model's weights once, each prompt's keys and values once a group, and
    those of the rollouts' own tokens (half of them, on average).
    """
    config = w.ours.config
    if seconds is None or seconds <= 0:
        return {}
    weights = sum(p.numel() for p in w.ours.model.layers.parameters())
    weights += config.vocab * config.hidden
    cached_tokens = sum(len(p.input_ids) + GROUP * w.tokens / 2 for p in w.prompts)
    kv_cache = cached_tokens * 2 * config.kv_heads * config.head_dim * config.layers
    read = (weights + kv_cache) * w.ours.model.norm.weight.element_size()
    return {"GB": read / 1e9, "TBs": read / seconds / 1e12}


# FLOPs of matrix products: a multiplication with its addition counts as two, a backward pass as
# two forward passes. What gradient checkpointing computes again is not counted.

def prefill_flops(model: QwenVL, prompts: Sequence[Prompt]) -> float:
    """Of prompts with their images, and each prompt's last row through the head."""
    flops = 0.0
    for prompt in prompts:
        n = len(prompt.input_ids)
        # Half of the prompt is seen on average.
        flops += tower_flops(model, len(prompt.pixels)) + language_flops(model, n, 1, n * n / 2)
    return flops


def sampling_flops(model: QwenVL, prompts: Sequence[Prompt], tokens: int) -> float:
    """Of GROUP rollouts of each prompt over a cache; a rollout's last token is not fed."""
    flops = prefill_flops(model, prompts)
    fed = GROUP * (tokens - 1)
    for prompt in prompts:
        seen = len(prompt.input_ids) + tokens / 2
        flops += language_flops(model, fed, fed, fed * seen)
    return flops


def update_flops(model: QwenVL, prompt: Prompt, rollouts: int, tokens: int) -> float:
    """Of a forward and backward pass over a prompt and its completions, the prompt once."""
    n = len(prompt.input_ids)
    fed = rollouts * (tokens - 1)
    pairs = n * n / 2 + fed * (n + tokens / 2)
    forward = language_flops(model, n + fed, rollouts * tokens, pairs)
    return 3 * (forward + tower_flops(model, len(prompt.pixels)))


def language_flops(model: QwenVL, tokens: int, predicted: int, pairs: float) -> float:
    """Of tokens through the layers, rows through the head, and pairs of a query and a key."""
    config = model.config
    layers = model.model.layers
    products = linear_weights(layers) * tokens + config.vocab * config.hidden * predicted
    # The last layer's MLP runs for the rows alone that the head reads.
    products -= linear_weights(layers[-1].mlp) * (tokens - predicted)
    # Scores and weighted values.
    attended = 2 * config.layers * config.heads * config.head_dim * pairs
    return 2 * (products + attended)


def tower_flops(model: QwenVL, patches: int) -> float:
    """Of an image's patches through the vision tower."""
    vision = model.config.vision
    tower = model.visual
    window = (vision.window // vision.patch) ** 2                  # patches
    seen = 0                                                       # by a patch, over all blocks
    for block in range(vision.depth):
        seen += patches if block in vision.full_blocks else min(window, patches)
    products = (linear_weights(tower.blocks) + tower.patch_embed.proj.weight.numel()) * patches
    mergers = nn.ModuleList([tower.merger, *getattr(tower, "deepstack_merger_list", [])])
    products += linear_weights(mergers) * patches // vision.merge ** 2
    return 2 * (products + 2 * vision.hidden * seen * patches)


def linear_weights(module: nn.Module) -> int:
    """Weights of the linear layers within a module."""
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))


# ---------------------------------------------------------------- the run

def main() -> None:
    args = flags().parse_args()
    args.device = dist.choose_device(args.device)
    args.tokens = args.tokens or (256 if args.device == "cuda" else 64)
    device = torch.device(args.device)
    cuda = device.type == "cuda"
    dtype = getattr(torch, args.dtype or ("bfloat16" if cuda else "float32"))
    out = dist.check_writable(args.out)
    name = torch.cuda.get_device_name() if cuda else f"{os.cpu_count()} CPU cores"
    report = {
        "device": name, "torch": torch.__version__, "shape": args.shape,
        "dtype": dtype_name(dtype), "tokens": args.tokens, "repeats": args.repeats}
    table = Table(
        out / "bench.json", args.repeats, device, report, lambda: ceilings(device, dtype))
    print(f"{args.shape} shape, {name}, {dtype_name(dtype)}, torch {torch.__version__}, "
          f"{torch.get_num_threads()} threads; {table.report['matrix_TFLOPs']:.3g} TFLOP/s in a "
          f"matrix product, {table.report['bandwidth_TBs']:.3g} TB/s in a copy")
    print(f"{'':8} {'beside':44} {'ours':>12} {'theirs':>12} {'unit':16} {'ratio':>7}   "
          "least .. most   ours")
    table.write()
    try:
        with tempfile.TemporaryDirectory() as folder:
            measure(table, write_checkpoint(Path(folder), args.shape, dtype), args, dtype)
    except KeyboardInterrupt:
        dist.fail(f"stopped; what was measured stands in {table.file}")
    print(f"written: {table.file}")


if __name__ == "__main__":
    launch(main)
