"""Speed of each part, compared with what a user would run instead, with the same weights.

Both sides run in one process with the same random weights, and their repeats alternate. A row
has the median of each side, the ratio of the medians, and the ratio's range over the repeats. A
ratio above 1 means that ours is faster (or smaller). Our matrix products are also given as a
share of the rate that this machine reaches in a large product, measured in the same run.
bench.json is written after each row. If a side runs out of memory, its row says so and the
other rows go on.

Peers: transformers' model, `generate` and image processor. The update is also compared with our
own model fed the prompt once per rollout, as TRL's trainer does.

    python -m tools.bench                                      the mid shape on a CPU; minutes
    python -m tools.bench --device cuda --shape 3b             one GPU
    python -m tools.bench --shape Qwen3-VL-4B-Instruct/ --only decode update
"""
import copy
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.profiler import ProfilerActivity
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from model import QwenVL
from qwen.generate import generate
from qwen.hub import Config, write_json
from qwen.processor import Pixels, Processor, Prompt
from train.dist import check_writable, choose_device, fail, peak_memory
from train.flags import FlagParser, add_device_flag, positive
from train.run import launch

PARTS = ("load", "prefill", "decode", "update", "step", "sft", "images", "numerics", "profile")
# From this width on a GPU trains with gradient checkpointing: eight repeated prompts of the 3b
# shape (2,048) would keep more than 110 GB.
LARGE_WIDTH = 1024
TEXT = 50                              # tokens of text in a prompt
GROUP = 8                              # rollouts of a prompt
SIDES = {"tiny": 112, "mid": 448}      # of the square image, in pixels; 800 for other shapes
# config.json of each shape, a Qwen2.5-VL.
COMMON = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl",
    "tie_word_embeddings": True, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "eos_token_id": 0,
    "vision_start_token_id": 1, "vision_end_token_id": 2, "image_token_id": 3, "video_token_id": 4}
SHAPES = {
    "tiny": COMMON | {
        "num_hidden_layers": 2, "hidden_size": 128, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 256, "vocab_size": 1024,
        "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]},
        "vision_config": {
            "depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 2,
            "out_hidden_size": 128, "window_size": 112, "fullatt_block_indexes": [1]}},
    "mid": COMMON | {
        "num_hidden_layers": 12, "hidden_size": 640, "num_attention_heads": 10,
        "num_key_value_heads": 2, "intermediate_size": 1728, "vocab_size": 8192,
        "rope_scaling": {"type": "mrope", "mrope_section": [8, 12, 12]},
        "vision_config": {
            "depth": 8, "hidden_size": 512, "intermediate_size": 1376, "num_heads": 8,
            "out_hidden_size": 640, "window_size": 112, "fullatt_block_indexes": [3, 7]}},
    "3b": COMMON | {
        "num_hidden_layers": 36, "hidden_size": 2048, "num_attention_heads": 16,
        "num_key_value_heads": 2, "intermediate_size": 11008, "vocab_size": 151_936,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "vision_config": {
            "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16,
            "out_hidden_size": 2048, "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31]}},
}
# Loads a checkpoint in a process of its own: prints seconds, and MiB at the peak. All pages of
# the weights are read, which may be a memory map.
LOADER = """
import json, sys, time, torch
side, folder, dtype = sys.argv[1:]
if side == "ours":
    from model import QwenVL as Model
else:
    import transformers
    [name] = json.load(open(folder + "/config.json"))["architectures"]
    Model = getattr(transformers, name)
def mib(key):
    return next(int(x.split()[1]) / 1024 for x in open("/proc/self/status") if x.startswith(key))
before, started = mib("VmRSS"), time.perf_counter()
model = Model.from_pretrained(folder, dtype=getattr(torch, dtype))
touched = sum(p.detach().flatten()[::512].float().sum().item() for p in model.parameters())
print(time.perf_counter() - started, mib("VmHWM") - before)
"""


# ---------------------------------------------------------------- weights, inputs, time

def write_checkpoint(folder: Path, config: dict[str, Any], dtype: torch.dtype) -> Path:
    """Random weights of this config.json, in hub layout -> the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config)
    with torch.device("meta"):
        model = QwenVL(Config.from_json(folder / "config.json")).to(dtype)
    # A GPU fills billions of weights in no time.
    model.to_empty(device="cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    for name, p in model.named_parameters():
        norm = name.endswith("weight") and ("norm" in name or "ln_q" in name)
        nn.init.ones_(p) if norm else nn.init.normal_(p, std=0.02)
    model.stored_dtype = dtype
    model.save_pretrained(folder)
    return folder


def random_prompt(model: QwenVL, side: int, text: int = TEXT) -> Prompt:
    """Random ids and pixels: an image of about side x side pixels within `text` tokens."""
    c, patch = model.config, model.config.vision.patch
    n = round(side / patch / 2)                      # tokens along a side, of 2 x 2 patches
    # Special ids are below 8 here, and in the upper half in checkpoints from elsewhere.
    text_ids = torch.randint(8, c.vocab // 2, (text,))
    start, end = c.marker_ids[-2:]
    image_ids = torch.tensor([start, *[c.image_id] * n * n, end])
    ids = torch.cat((text_ids[:4], image_ids, text_ids[4:]))
    values = torch.randint(0, 256, ((2 * n) ** 2, 3, patch, patch), dtype=torch.uint8)
    pixels = Pixels(values, torch.linspace(-2, 2, 256).expand(3, -1), frames=2)
    return Prompt(ids, pixels, torch.tensor([[1, 2 * n, 2 * n]]), None)


def clock(work: Callable[[], Any], device: torch.device) -> float | None:
    """Seconds that work() takes, on CUDA until the device is done; None if memory runs out."""
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.synchronize()
    started = time.perf_counter()
    try:
        work()
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - started
    except (RuntimeError, MemoryError) as error:
        # torch's words on a CPU, and the last words of the process that loads.
        words = ("can't allocate memory", "not enough memory", "OutOfMemoryError", "MemoryError")
        if not any(word in f"{type(error).__name__} {error}" for word in words):
            raise
    # Here the error is gone, and with it the failed call's tensors.
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
    return None


def ceilings(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Matrix rate in this dtype and memory bandwidth that this machine reaches now."""
    n, size = (8192, 2 ** 31) if device.type == "cuda" else (1024, 2 ** 27)
    a, b = torch.randn(2, n, n, device=device).to(dtype)
    source, target = torch.zeros(2, size, dtype=torch.uint8, device=device)
    products = [clock(lambda: [a @ b for _ in range(10)], device) for _ in range(3)]
    copies = [clock(lambda: target.copy_(source), device) for _ in range(3)]
    return {"matrix_TFLOPs": 10 * 2 * n ** 3 / min(products) / 1e12,
            "bandwidth_TBs": 2 * size / min(copies) / 1e12}            # read and written


# ---------------------------------------------------------------- both sides and the table

@dataclass
class Bench:
    """Both models with the same weights, the same inputs for both, and the table of rows."""

    file: Path                         # bench.json
    device: torch.device
    dtype: torch.dtype
    repeats: int
    report: dict[str, Any]             # content of the file, with "rows"
    ours: nn.Module | None = None
    theirs: nn.Module | None = None

    def open_models(self, folder: Path, side: int, questions: int, tokens: int) -> None:
        """Loads both models, makes prompts with GROUP completions each, and eight unequal records
        for SFT; counts the FLOPs of our passes."""
        import transformers
        ours = QwenVL.from_pretrained(folder, self.dtype, self.device).requires_grad_(True)
        ours.stop_ids = ()                       # all rollouts are as long as asked for
        [name] = json.loads((folder / "config.json").read_text())["architectures"]
        theirs = getattr(transformers, name).from_pretrained(
            folder, dtype=self.dtype, attn_implementation="sdpa").to(self.device)
        self.ours, self.theirs = ours, theirs
        self.checkpointing = self.device.type == "cuda" and ours.config.hidden >= LARGE_WIDTH
        if self.checkpointing:
            theirs.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(0)
        ids = ours.config.vocab // 2
        self.tokens = tokens
        self.prompts = [random_prompt(ours, side) for _ in range(questions)]
        self.completions = torch.randint(8, ids, (questions, GROUP, tokens))
        self.advantages = torch.randn(GROUP * tokens, device=self.device)
        self.records = [random_prompt(ours, side if i % 2 else side // 2, TEXT + 8 * (i % 5))
                        for i in range(8)]
        self.answers = [torch.randint(8, ids, (40 + 25 * (i % 6),)) for i in range(8)]
        # Users of transformers' processor have floats before the model is called.
        self.floats = {id(p): p.pixel_values for p in self.prompts + self.records}
        # On the meta device nothing is computed, and float32 attention is plain matrix products (of
        # all pairs, causal or not). A step of decoding sees half a completion on average.
        with torch.device("meta"):
            shadow = QwenVL(ours.config)
        totals = [0]
        with FlopCounterMode(display=False) as counter:
            with torch.no_grad():
                _, cache, positions = shadow.prefill(self.prompts, GROUP, max(1, tokens // 2))
                totals.append(counter.get_total_flops())
                positions = positions.repeat_interleave(GROUP)
                shadow.decode(positions, positions, cache)
            totals.append(counter.get_total_flops())
            shadow.score(self.prompts[:1], [list(self.completions[0])])[0].sum().backward()
            totals.append(counter.get_total_flops())
            shadow.score(self.records, [[a] for a in self.answers])[0].sum().backward()
            totals.append(counter.get_total_flops())
        prefill, token, update, sft = (after - before for before, after in zip(totals, totals[1:]))
        sample = prefill + (tokens - 1) * token
        self.flops = {"prefill": prefill, "token": token, "update": update, "sft": sft,
                      "sample": sample, "step": sample + questions * update}

    def train_mode(self, on: bool) -> None:
        """Before passes with gradient: both models checkpoint, if `checkpointing` says so."""
        on = on and self.checkpointing
        self.ours.visual.checkpointing = self.ours.model.checkpointing = on
        # transformers' model checkpoints only in training mode, and samples without a cache in
        # it. It has no dropout.
        self.theirs.train(on)

    def padded(
            self, prompts: Sequence[Prompt],
            completions: Sequence[Tensor] = ()) -> dict[str, Tensor]:
        """The inputs of transformers' model, a row per prompt, padded on the left for generation,
        or with a completion each on the right for training."""
        rows, side = [p.input_ids for p in prompts], "left"
        if len(completions):
            rows, side = [torch.cat((ids, c)) for ids, c in zip(rows, completions)], "right"
        ids = pad_sequence(rows, True, padding_side=side)                  # (B, T)
        inputs = {
            "input_ids": ids,
            "attention_mask": pad_sequence([x >= 0 for x in rows], True, padding_side=side).long(),
            "pixel_values": torch.cat([self.floats[id(p)] for p in prompts]),
            "image_grid_thw": torch.cat([p.image_grid_thw for p in prompts]),
            # Newer versions want to know which tokens are an image's.
            "mm_token_type_ids": (ids == self.ours.config.image_id).int()}
        return {name: x.to(self.device) for name, x in inputs.items()}

    def sample(self, side: str, tokens: int) -> None:
        """GROUP rollouts of exactly `tokens` tokens for each prompt; side: "ours" or "theirs"."""
        self.train_mode(False)
        if side == "ours":
            seeds = torch.arange(len(self.prompts))
            generate(self.ours, self.prompts, GROUP, tokens, 1.0, seeds)
        else:
            self.theirs.generate(
                **self.padded(self.prompts), max_new_tokens=tokens, min_new_tokens=tokens,
                do_sample=True, temperature=1.0, top_k=0, top_p=1.0, num_return_sequences=GROUP,
                eos_token_id=None, pad_token_id=0)

    def update(self, side: str, q: int = 0) -> Tensor:
        """Forward and backward pass of a group -> its log-probabilities (GROUP * tokens,).

        side: "ours" computes the prompt once, "repeated" is our model with the prompt once per
        rollout, "theirs" the same by transformers' model."""
        self.train_mode(True)
        prompts = [self.prompts[q]] * GROUP
        completions = self.completions[q]                                  # (GROUP, tokens)
        if side == "ours":
            logp, _ = self.ours.score(prompts[:1], [list(completions)])
        elif side == "repeated":
            logp, _ = self.ours.score(prompts, [[c] for c in completions])
        else:
            # As TRL's trainer: only the logits that predict the completion.
            logits = self.theirs(
                **self.padded(prompts, completions), use_cache=False,
                logits_to_keep=self.tokens + 1).logits[:, :-1]             # (GROUP, tokens, V)
            targets = completions.to(self.device)[..., None]
            logp = logits.float().log_softmax(-1).gather(-1, targets).flatten()
        (-(logp * self.advantages).mean()).backward()
        return logp.detach()

    def compare(
            self, name: str, peer: str, ours: Callable[[], Any], theirs: Callable[[], Any],
            unit: str = "s", amount: float = 1.0, flops: float = 0.0) -> list[float | None]:
        """Adds a row that times ours() and theirs() in turn, after a warm-up of each -> the
        median seconds of each, None for a side that ran out of memory.

        unit: "s", or a rate of which a call has `amount`; flops: of our call."""
        for model in filter(None, (self.ours, self.theirs)):
            model.zero_grad(set_to_none=True)
        gc.collect()
        if self.device.type == "cpu":
            # Other programs may use the cores for a while: the best of the whole run counts.
            for key, value in ceilings(self.device, self.dtype).items():
                self.report[key] = max(self.report.get(key, 0), value)
        work = {"ours": ours, "theirs": theirs}
        seconds = {"ours": [], "theirs": []}
        for i in tqdm(range(self.repeats + 1), desc=f"{name}, {peer}", leave=False):
            for side in list(work):
                taken = clock(work[side], self.device)
                if taken is None:
                    del work[side]               # it would run out of memory again
                elif i > 0:
                    seconds[side].append(taken)
        medians = [statistics.median(seconds[s]) if s in work else None for s in seconds]
        figures = [s if s is None or unit == "s" else amount / s for s in medians]
        ratios = [t / o for o, t in zip(*seconds.values())]
        self.add(name, peer, *figures, unit, ratios, medians[0], flops)
        return medians

    def add(
            self, name: str, peer: str, ours: float | None, theirs: float | None,
            unit: str = "s", ratios: Sequence[float] = (), seconds: float | None = None,
            flops: float = 0.0, read: float = 0.0, failed: str = "") -> None:
        """Adds a row, prints it and writes the file.

        ours, theirs: None if memory ran out. ratios: of the repeats. seconds: of a call of ours,
        flops and read: its FLOPs and the bytes it must read. failed: a part without any row."""
        row = {"name": name, "peer": peer, "ours": ours, "theirs": theirs, "unit": unit,
               "ratio": None, "spread": None}
        if ours is not None and theirs is not None:
            ratio = ours / theirs if unit.endswith("/s") else theirs / ours
            least, most = min(ratios, default=ratio), max(ratios, default=ratio)
            row |= {"ratio": ratio, "spread": [least, most]}
            note = f"{ratio:6.2f}x   {least:.2f} .. {most:.2f}"
        else:
            sides = [side for side in ("ours", "theirs") if row[side] is None]
            row["out_of_memory"] = [failed] if failed else sides
            note = f"out of memory: {' and '.join(row['out_of_memory'])}"
        # The difference of two noisy times may be below 0.
        timed = seconds is not None and seconds > 0
        if timed and flops:
            row |= {"TFLOP": flops / 1e12, "TFLOPs": flops / seconds / 1e12}
        if timed and read:
            row |= {"GB": read / 1e9, "TBs": read / seconds / 1e12}
        self.report["rows"].append(row)
        for rate, share, ceiling, words in (
                ("TFLOPs", "share", "matrix_TFLOPs", "matrix rate"),
                ("TBs", "bandwidth_share", "bandwidth_TBs", "bandwidth")):
            for each in self.report["rows"]:
                if rate in each:
                    each[share] = each[rate] / self.report[ceiling]
            if rate in row:
                note += f"   {row[share]:.0%} of the {words}"
        figures = [f"{'no memory' if v is None else format(v, '.4g'):>12}" for v in (ours, theirs)]
        tqdm.write(f"{name:8} {peer:44} {' '.join(figures)} {unit:16} {note}")
        self.write()

    def write(self) -> None:
        """Writes bench.json whole or not at all."""
        self.report["peak_memory_GiB"] = peak_memory(self.device)
        temporary = self.file.with_suffix(".tmp")
        write_json(temporary, self.report)
        os.replace(temporary, self.file)


# ---------------------------------------------------------------- the rows

def measure_alone(b: Bench, part: str, folder: Path) -> None:
    """Adds the rows of a part that uses no model of this process; folder: of the checkpoint."""
    if part == "load":
        pairs = {"ours": [], "theirs": []}                             # of seconds and MiB
        for _ in tqdm(range(b.repeats), desc="load", leave=False):
            for side, results in pairs.items():
                process = subprocess.run(
                    [sys.executable, "-c", LOADER, side, str(folder), b.report["dtype"]],
                    capture_output=True, text=True, cwd=Path(__file__).parents[1], check=False)
                if process.returncode:
                    raise RuntimeError(process.stderr)
                results.append([float(v) for v in process.stdout.split()])
        for i, unit in enumerate(("s", "MiB at peak")):
            ours, theirs = ([pair[i] for pair in results] for results in pairs.values())
            b.add("load", "transformers from_pretrained", statistics.median(ours),
                  statistics.median(theirs), unit, [t / o for o, t in zip(ours, theirs)])
        return
    # An 800 x 800 picture decoded, resized, normalized and cut, eight times per call.
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    limits = {"min_pixels": 56 * 56, "max_pixels": 28 * 28 * 1280}
    peer = Qwen2VLImageProcessorPil(**limits)
    processor = Processor.__new__(Processor)         # without a tokenizer
    vars(processor).update(
        limits, patch=14, temporal_patch=2, merge=2, mean=np.array(peer.image_mean, np.float32),
        std=np.array(peer.image_std, np.float32))
    file = folder / "scene.jpg"
    noise = np.random.default_rng(0).integers(0, 255, (100, 100, 3), np.uint8)
    Image.fromarray(noise).resize((800, 800)).save(file)
    # To floats, as the peer; a run leaves this last part to the device.
    b.compare(
        "images", "transformers image processor (PIL)",
        lambda: [processor.patches(Image.open(file))[0].normalised() for _ in range(8)],
        lambda: [peer(Image.open(file).convert("RGB"), return_tensors="pt") for _ in range(8)],
        "images/s", 8)


def measure(b: Bench, part: str) -> None:
    """Adds the rows of a part that runs both models."""
    ours, theirs, prompts, tokens = b.ours, b.theirs, b.prompts, b.tokens
    if part == "prefill":
        b.train_mode(False)
        with torch.no_grad():
            b.compare(
                "prefill", "transformers forward, no rollouts yet",
                lambda: ours.prefill(prompts, GROUP, 1),
                lambda: theirs(**b.padded(prompts), logits_to_keep=1, use_cache=True),
                "prompt tokens/s", sum(len(p.input_ids) for p in prompts), b.flops["prefill"])

    elif part == "decode":
        whole = b.compare(
            "decode", "transformers generate, prefill included", lambda: b.sample("ours", tokens),
            lambda: b.sample("theirs", tokens), "new tokens/s", len(prompts) * GROUP * tokens,
            b.flops["sample"])
        first = b.compare(
            "decode", "transformers generate, first token alone",
            lambda: b.sample("ours", 1), lambda: b.sample("theirs", 1), flops=b.flops["prefill"])
        one = [None if None in (w, f) else (w - f) / max(1, tokens - 1)
               for w, f in zip(whole, first)]
        # A step must read the language model's weights once, each prompt's keys and values once
        # per group, and those of the rollouts' own tokens (half of them, on average).
        c = ours.config
        weights = sum(p.numel() for p in ours.model.layers.parameters()) + c.vocab * c.hidden
        cached = sum(len(p.input_ids) + GROUP * tokens / 2 for p in prompts)
        numbers = weights + cached * 2 * c.kv_heads * c.head_dim * c.layers
        b.add("decode", "transformers generate, one step (difference)", *one, seconds=one[0],
              flops=b.flops["token"], read=numbers * b.dtype.itemsize)

    elif part == "update":
        for peer, side in (("ours, prompt repeated for each rollout", "repeated"),
                           ("transformers, prompt repeated", "theirs")):
            b.compare("update", peer, lambda: b.update("ours"), lambda: b.update(side),
                      "tokens/s", GROUP * tokens, b.flops["update"])
        gradients = []
        for side in ("ours", "repeated"):
            ours.zero_grad(set_to_none=True)
            theirs.zero_grad(set_to_none=True)
            b.update(side)
            gradients.append({n: p.grad for n, p in ours.named_parameters() if p.grad is not None})
        shared, repeated = gradients
        largest = max(((repeated[n] - x).norm() / (x.norm() + 1e-12)).item()
                      for n, x in shared.items())
        b.report["rows"][-1]["gradient_difference"] = largest
        print("         largest relative difference of a gradient, prompt shared or repeated: "
              f"{largest:.1e}")

    elif part == "step":
        fused = b.device.type == "cuda"
        optimizers = {side: torch.optim.AdamW(model.parameters(), lr=1e-6, fused=fused)
                      for side, model in (("ours", ours), ("theirs", theirs))}

        def step(side: str) -> None:
            b.sample(side, tokens)
            for q in range(len(prompts)):
                b.update(side, q)
            optimizers[side].step()
            optimizers[side].zero_grad(set_to_none=True)
        b.compare("step", "transformers generate and repeated update",
                  lambda: step("ours"), lambda: step("theirs"), flops=b.flops["step"])

    elif part == "sft":
        lengths = [(len(p.input_ids), len(a)) for p, a in zip(b.records, b.answers)]
        labels = b.padded(b.records, b.answers)["input_ids"]
        for row, (prompt, answer) in zip(labels, lengths):
            row[:prompt] = row[prompt + answer:] = -100                # not in the loss
        b.train_mode(True)
        b.compare(
            "sft", "transformers, padded batch of unequal records",
            lambda: (-ours.score(b.records, [[a] for a in b.answers])[0].mean()).backward(),
            lambda: theirs(**b.padded(b.records, b.answers), labels=labels,
                           use_cache=False).loss.backward(),
            "tokens/s", sum(map(sum, lengths)), b.flops["sft"])


def inspect(b: Bench, part: str) -> None:
    """numerics: how far log-probabilities differ, sampled or scored, in this dtype or float32, by
    CUDA graphs or without. profile: the ten largest operations of sampling and an update."""
    report = b.report[part] = {} if part == "numerics" else []
    if part == "profile":
        cuda = b.device.type == "cuda"
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
        with torch.profiler.profile(activities=activities) as profiler:
            b.sample("ours", min(b.tokens, 16))
            b.update("ours")
        # An operation's own microseconds, on CUDA the GPU's.
        key = "self_device_time_total" if cuda else "self_cpu_time_total"
        events = sorted(profiler.key_averages(), key=lambda e: -getattr(e, key))
        total = sum(getattr(e, key) for e in events)
        for e in events[:10]:
            ms, share = getattr(e, key) / 1e3, getattr(e, key) / total
            report.append({"name": e.key, "ms": ms, "calls": e.count, "share": share})
            print(f"profile: {share:6.1%} {ms:10.1f} ms {e.count:8} x {e.key[:90]}")
        return
    b.train_mode(False)
    sampling = (b.ours, b.prompts[:2], GROUP, b.tokens, 1.0, torch.arange(len(b.prompts[:2])))
    ids, sampled, _ = generate(*sampling)                              # (Q, G, tokens) each
    completions = [list(group) for group in ids]
    with torch.no_grad():
        scored = b.ours.score(b.prompts[:2], completions)[0].view(sampled.shape)
        ours32 = copy.deepcopy(b.ours).float()
        scored32 = ours32.score(b.prompts[:2], completions)[0].view(sampled.shape)
    pairs = {"sampled_scored": (sampled, scored), "dtype_float32": (scored, scored32)}
    if b.device.type == "cuda":
        graph_ids, by_graph, _ = generate(*sampling, cuda_graphs=True)
        # A rollout is compared up to the first token that differs.
        same = (graph_ids == ids).long().cumprod(-1).bool()
        pairs["graph_eager"] = (by_graph[same], sampled[same])
    for name, (x, y) in pairs.items():
        difference = (x - y).abs()
        report[name] = {"largest": difference.max().item(), "mean": difference.mean().item()}
        print(f"numerics: {name.replace('_', ' or ')}: log-probabilities differ by "
              f"{report[name]['largest']:.1e} at most, {report[name]['mean']:.1e} on average")
    if "graph_eager" in report:
        report["graph_eager"]["tokens_equal"] = same.float().mean().item()


# ---------------------------------------------------------------- the command

def main() -> None:
    parser = FlagParser("Measures each part, and what a user would run instead")
    add = parser.add_argument
    add("--shape", default="mid",
        help=f"of the model, random weights: {', '.join(SHAPES)}, or a folder with a config.json")
    add_device_flag(add)
    add("--dtype", choices=("float32", "bfloat16"),
        help="default: bfloat16 on CUDA, float32 on a CPU")
    add("--repeats", type=positive, default=3, help="alternating repeats after one warm-up")
    add("--prompts", type=positive, default=8,
        help="questions in decode and step, eight rollouts each")
    add("--tokens", type=positive, help="of a completion; default 64, on CUDA 256")
    add("--only", nargs="+", choices=PARTS, help="only these parts")
    add("--out", default=".", help="folder of bench.json")
    args = parser.parse_args()
    try:
        import transformers
    except ImportError:
        fail("the peers need transformers: pip install -r requirements-dev.txt")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    config = SHAPES.get(args.shape)
    if config is None:
        file = Path(args.shape) / "config.json"
        if not file.exists():
            fail(f"--shape {args.shape}: {file} does not exist; name a folder with a config.json, "
                 f"or one of {', '.join(SHAPES)}")
        config = Config.from_json(file).raw
    device = torch.device(choose_device(args.device))
    cuda = device.type == "cuda"
    tokens = args.tokens or (256 if cuda else 64)
    dtype_name = args.dtype or ("bfloat16" if cuda else "float32")
    dtype = getattr(torch, dtype_name)
    name = torch.cuda.get_device_name() if cuda else f"{os.cpu_count()} CPU cores"
    report = {
        "device": name, "torch": torch.__version__, "shape": args.shape, "dtype": dtype_name,
        "tokens": tokens, "repeats": args.repeats, **ceilings(device, dtype), "rows": []}
    b = Bench(check_writable(args.out) / "bench.json", device, dtype, args.repeats, report)
    print(f"{args.shape} shape, {name}, {dtype_name}, torch {torch.__version__}, "
          f"{torch.get_num_threads()} threads; {report['matrix_TFLOPs']:.3g} TFLOP/s in a "
          f"matrix product, {report['bandwidth_TBs']:.3g} TB/s in a copy")
    print(f"{'':8} {'compared with':44} {'ours':>12} {'theirs':>12} {'unit':16} {'ratio':>7}   "
          "least .. most   ours")
    try:
        with tempfile.TemporaryDirectory() as temporary:
            folder = write_checkpoint(Path(temporary), config, dtype)
            # "load" comes first, while this process holds no model.
            for part in ("load", "models", *PARTS[1:]):
                if part == "models":
                    side = SIDES.get(args.shape, 800)
                    work = partial(b.open_models, folder, side, args.prompts, tokens)
                elif args.only and part not in args.only:
                    continue
                elif part in ("load", "images"):
                    work = partial(measure_alone, b, part, folder)
                else:
                    work = partial(inspect if part in ("numerics", "profile") else measure, b, part)
                if clock(work, device) is None:
                    b.add(part, "outside the timed calls", None, None, failed=part)
                    if part == "models":
                        break
                b.write()
    except KeyboardInterrupt:
        fail(f"stopped; what was measured is in {b.file}")
    print(f"written: {b.file}")


if __name__ == "__main__":
    launch(main)
