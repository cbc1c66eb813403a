"""Speed of each part, compared with what a user would run instead, with the same weights.

Both sides run in one process, and their repeats alternate. A row has each side's median, and the
ratio with its range: above 1, ours is faster (or smaller). bench.json is written after each row.

    python -m tools.bench                                      the mid shape on a CPU, in minutes
    python -m tools.bench --device cuda --shape 3b             one GPU
    python -m tools.bench --shape Qwen3-VL-4B-Instruct/ --only decode update
"""
import copy
import gc
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from model import QwenVL
from qwen.generate import generate
from qwen.hub import Config, write_json
from qwen.processor import Pixels, Processor, Prompt
from train.dist import check_writable, choose_device, fail, peak_memory
from train.flags import DEVICE_FLAG, FlagParser, positive
from train.run import launch

PARTS = ("load", "prefill", "decode", "update", "step", "sft", "images", "numerics")
TEXT = 50                              # tokens of text in a prompt
GROUP = 8                              # rollouts of a prompt
SIDES = {"tiny": 112, "mid": 448}      # of the square image, in pixels; 800 for other shapes


def make_config(text: Sequence[int], vision: Sequence[int], full: list[int]) -> dict[str, Any]:
    """config.json of a Qwen2.5-VL; full: vision layers with attention to the whole image."""
    sizes = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers")
    vision_sizes = ("hidden_size", "intermediate_size", "num_heads", "depth")
    pairs = text[0] // text[2] // 2            # of rotated numbers in a head
    return dict(zip((*sizes, "vocab_size"), text, strict=True)) | {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl",
        "num_key_value_heads": 2, "tie_word_embeddings": True, "rms_norm_eps": 1e-6,
        "rope_theta": 1e6, "eos_token_id": 0, "vision_start_token_id": 1,
        "vision_end_token_id": 2, "image_token_id": 3, "video_token_id": 4,
        "rope_scaling": {
            "type": "mrope", "mrope_section": [pairs // 4, pairs * 3 // 8, pairs * 3 // 8]},
        "vision_config": dict(zip(vision_sizes, vision, strict=True)) | {
            "out_hidden_size": text[0], "window_size": 112, "fullatt_block_indexes": full}}


SHAPES = {
    # width, MLP, heads, layers, vocabulary; the same of the vision tower, without a vocabulary
    "tiny": make_config((128, 256, 4, 2, 1024), (64, 128, 2, 2), [1]),
    "mid": make_config((640, 1728, 10, 12, 8192), (512, 1376, 8, 8), [3, 7]),
    "3b": make_config((2048, 11008, 16, 36, 151_936), (1280, 3420, 16, 32), [7, 15, 23, 31])}

# Prints seconds and peak MiB of loading. Weights may be a memory map, so it reads all pages.
LOADER = """
import sys, time, torch
from {} as Model
def mib(key):
    return next(int(x.split()[1]) / 1024 for x in open("/proc/self/status") if x.startswith(key))
before, started = mib("VmRSS"), time.perf_counter()
model = Model.from_pretrained(sys.argv[1], dtype=getattr(torch, sys.argv[2]))
touched = sum(p.detach().flatten()[::512].float().sum().item() for p in model.parameters())
print(time.perf_counter() - started, mib("VmHWM") - before)
"""


def write_checkpoint(folder: Path, config: dict[str, Any], dtype: torch.dtype) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config)
    with torch.device("meta"):
        model = QwenVL(Config.from_json(folder / "config.json")).to(dtype)
    # A GPU fills billions of weights faster.
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


@dataclass
class Bench:
    """Both models with the same weights, the same inputs for both, and the table of rows."""
    file: Path                         # bench.json
    device: torch.device
    dtype: torch.dtype
    repeats: int
    report: dict[str, Any]             # content of the file, with "rows"
    ours: QwenVL | None = None
    theirs: nn.Module | None = None

    def open_models(self, folder: Path, side: int, questions: int, tokens: int) -> None:
        """Loads both models, and makes prompts for RFT and eight unequal records for SFT."""
        from transformers import AutoModelForImageTextToText
        ours = QwenVL.from_pretrained(folder, self.dtype, self.device).requires_grad_(True)
        ours.stop_ids = ()                       # so that all rollouts have `tokens` tokens
        theirs = AutoModelForImageTextToText.from_pretrained(
            folder, dtype=self.dtype, attn_implementation="sdpa").to(self.device)
        # Eight repeated prompts of the 3b shape (width 2,048) would keep more than 110 GB.
        self.checkpointing = self.device.type == "cuda" and ours.config.hidden >= 1024
        if self.checkpointing:
            theirs.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(0)
        ids = ours.config.vocab // 2
        self.tokens = tokens
        self.prompts = [random_prompt(ours, side) for _ in range(questions)]
        self.completions = torch.randint(8, ids, (questions, GROUP, tokens))
        self.records = [random_prompt(ours, side if i % 2 else side // 2, TEXT + 8 * (i % 5))
                        for i in range(8)]
        self.answers = [torch.randint(8, ids, (40 + 25 * (i % 6),)) for i in range(8)]
        # transformers' processor returns floats, so making them is not part of its time.
        self.floats = {id(p): p.pixel_values for p in self.prompts + self.records}
        self.ours, self.theirs = ours, theirs

    def train_mode(self, on: bool) -> None:
        on = on and self.checkpointing
        self.ours.visual.checkpointing = self.ours.model.checkpointing = on
        # transformers' model checkpoints only in training mode. It has no dropout.
        self.theirs.train(on)

    def padded(self, prompts: Sequence[Prompt],
               completions: Sequence[Tensor] = ()) -> dict[str, Tensor]:
        rows = [p.input_ids for p in prompts]
        if len(completions):
            rows = [torch.cat(pair) for pair in zip(rows, completions)]
        ids = pad_sequence(rows, True, -1, "left")                         # (B, T)
        inputs = {
            "input_ids": ids.clamp(min=0), "attention_mask": (ids >= 0).long(),
            "pixel_values": torch.cat([self.floats[id(p)] for p in prompts]),
            "image_grid_thw": torch.cat([p.image_grid_thw for p in prompts]),
            # Newer versions need to know which tokens are the image's.
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
        "ours" computes the prompt once; "repeated" (our model) and "theirs" once per rollout."""
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
        (-logp.mean()).backward()
        return logp.detach()

    def compare(self, name: str, peer: str, ours: Callable[[], Any], theirs: Callable[[], Any],
                *rate: Any) -> tuple[float, float]:
        """Times ours() and theirs() in turn, after a warm-up of each. rate: see `add`."""
        for model in filter(None, (self.ours, self.theirs)):
            model.zero_grad(set_to_none=True)
        synchronize = torch.get_device_module(self.device).synchronize
        pairs = []
        for _ in tqdm(range(self.repeats + 1), desc=f"{name}, {peer}", leave=False):
            times = []
            for work in (ours, theirs):
                synchronize()
                started = time.perf_counter()
                work()
                synchronize()
                times.append(time.perf_counter() - started)
            pairs.append(times)
        return self.add(name, peer, pairs[1:], *rate)

    def add(self, name: str, peer: str, pairs: Sequence[tuple[float, float]], unit: str = "s",
            amount: float = 0.0) -> tuple[float, float]:
        """Adds a row from pairs (ours, theirs) -> medians. amount: units per call, for rates."""
        ours, theirs = (statistics.median(side) for side in zip(*pairs))
        figures = (amount / ours, amount / theirs) if amount else (ours, theirs)
        ratio = theirs / ours
        ratios = [t / o for o, t in pairs]
        self.report["rows"].append({
            "name": name, "peer": peer, "ours": figures[0], "theirs": figures[1], "unit": unit,
            "ratio": ratio, "spread": [min(ratios), max(ratios)]})
        tqdm.write(f"{name:8} {peer:44} {figures[0]:12.4g} {figures[1]:12.4g} {unit:16} "
                   f"{ratio:6.2f}x   {min(ratios):.2f} .. {max(ratios):.2f}")
        self.write()
        return ours, theirs

    def write(self) -> None:
        self.report["peak_memory_GiB"] = peak_memory(self.device)
        temporary = self.file.with_suffix(".tmp")
        write_json(temporary, self.report)
        os.replace(temporary, self.file)


def measure(b: Bench, part: str, folder: Path) -> None:
    ours, theirs = b.ours, b.theirs
    if part == "load":
        runs = []                                # seconds and MiB: ours, theirs, ours, ...
        for _ in tqdm(range(b.repeats), desc="load", leave=False):
            for name in ("model import QwenVL", "transformers import AutoModelForImageTextToText"):
                output = subprocess.check_output(
                    [sys.executable, "-c", LOADER.format(name), str(folder), b.report["dtype"]],
                    text=True, cwd=Path(__file__).parents[1])
                runs.append([float(v) for v in output.split()])
        for unit, figures in zip(("s", "MiB at peak"), zip(*runs)):
            b.add("load", "transformers from_pretrained",
                  list(zip(figures[::2], figures[1::2])), unit)

    elif part == "images":
        # An 800 x 800 picture decoded, resized, normalized and cut, eight times per call.
        from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as peers
        limits = {"min_pixels": 56 * 56, "max_pixels": 28 * 28 * 1280}
        peer = peers.Qwen2VLImageProcessorPil(**limits)
        processor = Processor.__new__(Processor)         # without a tokenizer
        mean, std = (np.array(v, np.float32) for v in (peer.image_mean, peer.image_std))
        vars(processor).update(limits, patch=14, temporal_patch=2, merge=2, mean=mean, std=std)
        file = folder / "scene.jpg"
        noise = np.random.default_rng(0).integers(0, 255, (100, 100, 3), np.uint8)
        Image.fromarray(noise).resize((800, 800)).save(file)
        # Both make floats here, although a run leaves this last part to the device.
        b.compare(
            "images", "transformers image processor (PIL)",
            lambda: [processor.patches(Image.open(file))[0].normalised() for _ in range(8)],
            lambda: [peer(Image.open(file).convert("RGB"), return_tensors="pt") for _ in range(8)],
            "images/s", 8)

    elif part == "prefill":
        b.train_mode(False)
        b.compare("prefill", "transformers forward, no rollouts yet",
                  lambda: ours.prefill(b.prompts, GROUP, 1),
                  lambda: theirs(**b.padded(b.prompts), logits_to_keep=1, use_cache=True),
                  "prompt tokens/s", sum(len(p.input_ids) for p in b.prompts))

    elif part == "decode":
        whole = b.compare("decode", "transformers generate, prefill included",
                          lambda: b.sample("ours", b.tokens), lambda: b.sample("theirs", b.tokens),
                          "new tokens/s", len(b.prompts) * GROUP * b.tokens)
        first = b.compare("decode", "transformers generate, first token alone",
                          lambda: b.sample("ours", 1), lambda: b.sample("theirs", 1))
        step = [(w - f) / max(1, b.tokens - 1) for w, f in zip(whole, first)]
        b.add("decode", "transformers generate, one step (difference)", [step])

    elif part == "numerics":
        # How log-probabilities differ: sampled from scored, and float32 from this dtype.
        b.train_mode(False)
        prompts = b.prompts[:2]
        ids, sampled, _ = generate(
            ours, prompts, GROUP, b.tokens, 1.0, torch.arange(len(prompts)))
        completions = [list(group) for group in ids]                   # (Q, G, tokens)
        scored = ours.score(prompts, completions)[0].view(sampled.shape)
        scored32 = copy.deepcopy(ours).float().score(prompts, completions)[0].view(sampled.shape)
        b.report["numerics"] = {}
        for name, x in (("sampled_scored", sampled), ("dtype_float32", scored32)):
            difference = (x - scored).abs()
            largest, mean = difference.max().item(), difference.mean().item()
            b.report["numerics"][name] = {"largest": largest, "mean": mean}
            print(f"numerics: {name.replace('_', ' or ')}: log-probabilities differ by "
                  f"{largest:.1e} at most, {mean:.1e} on average")

    elif part == "update":
        for peer, side in (("ours, prompt repeated for each rollout", "repeated"),
                           ("transformers, prompt repeated", "theirs")):
            b.compare("update", peer, lambda: b.update("ours"), lambda: b.update(side),
                      "tokens/s", GROUP * b.tokens)
        theirs.zero_grad(set_to_none=True)
        gradients = []
        for side in ("ours", "repeated"):
            ours.zero_grad(set_to_none=True)
            b.update(side)
            gradients.append([p.grad for p in ours.parameters() if p.grad is not None])
        largest = max(((y - x).norm() / (x.norm() + 1e-12)).item() for x, y in zip(*gradients))
        b.report["rows"][-1]["gradient_difference"] = largest
        print("         largest relative difference of a gradient, prompt shared or repeated: "
              f"{largest:.1e}")

    elif part == "step":
        optimizers = {
            side: torch.optim.AdamW(model.parameters(), 1e-6, fused=b.device.type == "cuda")
            for side, model in (("ours", ours), ("theirs", theirs))}

        def step(side: str) -> None:
            b.sample(side, b.tokens)
            for q in range(len(b.prompts)):
                b.update(side, q)
            optimizers[side].step()
            optimizers[side].zero_grad(set_to_none=True)
        b.compare("step", "transformers generate and repeated update",
                  lambda: step("ours"), lambda: step("theirs"))

    elif part == "sft":
        inputs = b.padded(b.records, b.answers)
        labels = inputs["input_ids"].clone()
        for row, answer in zip(labels, b.answers):
            row[:-len(answer)] = -100                                  # not in the loss
        b.train_mode(True)
        answers = [[answer] for answer in b.answers]
        b.compare("sft", "transformers, padded batch of unequal records",
                  lambda: (-ours.score(b.records, answers)[0].mean()).backward(),
                  lambda: theirs(**b.padded(b.records, b.answers), labels=labels,
                                 use_cache=False).loss.backward(),
                  "tokens/s", inputs["attention_mask"].sum().item())


def main() -> None:
    parser = FlagParser(
        description="Measures the speed of each part, and of what a user would run instead")
    add = parser.add_argument
    add("--shape", default="mid",
        help=f"of the model, random weights: {', '.join(SHAPES)}, or a folder with a config.json")
    add("--device", **DEVICE_FLAG)
    add("--dtype", choices=("float32", "bfloat16"),
        help="default: bfloat16 on CUDA, float32 on a CPU")
    add("--repeats", type=positive, default=3, help="alternating repeats after one warm-up")
    add("--prompts", type=positive, default=8,
        help="questions in decode and step, eight rollouts each")
    add("--tokens", type=positive, help="tokens of a completion; default: 64, on CUDA 256")
    add("--only", nargs="+", choices=PARTS, default=PARTS, help="only these parts")
    add("--out", default=".", help="folder of bench.json")
    args = parser.parse_args()
    try:
        import transformers
    except ImportError:
        fail("the peers need transformers: pip install -r requirements-dev.txt")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    file = Path(args.shape) / "config.json"
    if args.shape not in SHAPES and not file.exists():
        fail(f"--shape {args.shape}: {file} does not exist; name a folder with a config.json, or "
             f"one of {', '.join(SHAPES)}")
    config = SHAPES.get(args.shape) or Config.from_json(file).raw
    device = torch.device(choose_device(args.device))
    cuda = device.type == "cuda"
    tokens = args.tokens or (256 if cuda else 64)
    dtype_name = args.dtype or ("bfloat16" if cuda else "float32")
    dtype = getattr(torch, dtype_name)
    name = torch.cuda.get_device_name() if cuda else f"{os.cpu_count()} CPU cores"
    report = {
        "device": name, "torch": torch.__version__, "shape": args.shape, "dtype": dtype_name,
        "tokens": tokens, "repeats": args.repeats, "rows": []}
    b = Bench(check_writable(args.out) / "bench.json", device, dtype, args.repeats, report)
    print(f"{args.shape} shape, {name}, {dtype_name}, torch {torch.__version__}, "
          f"{torch.get_num_threads()} threads")
    print(f"{'':8} {'compared with':44} {'ours':>12} {'theirs':>12} {'unit':16} {'ratio':>7}   "
          "least .. most")
    try:
        with tempfile.TemporaryDirectory() as temporary:
            folder = write_checkpoint(Path(temporary), config, dtype)
            # "load" comes first, while this process holds no model.
            for part in (p for p in PARTS if p in args.only):
                try:
                    if b.ours is None and part not in ("load", "images"):
                        b.open_models(folder, SIDES.get(args.shape, 800), args.prompts, tokens)
                    with torch.set_grad_enabled(part in ("update", "step", "sft")):
                        measure(b, part, folder)
                except (torch.OutOfMemoryError, MemoryError):
                    print(f"{part}: out of memory")
                b.write()
                # Free what a failed part held.
                gc.collect()
                torch.cuda.empty_cache()
    except KeyboardInterrupt:
        fail(f"stopped; what was measured is in {b.file}")
    print(f"written: {b.file}")


if __name__ == "__main__":
    launch(main)
