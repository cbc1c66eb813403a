"""Speed: each part of the work beside what a user would run instead, in one process and one run, with the same random weights.

Repeats alternate between ours and theirs; the median of each, the ratio of the medians, and the spread of the ratio over repeats. A ratio
above 1 means that ours is faster (or smaller). Peers: transformers' model, `generate` and image processor; and, for the update, our own
code fed a prompt G times over, as TRL's trainer feeds it to the model.

    python bench.py                                        the mid shape on this machine's CPU; minutes
    python bench.py --device cuda --shape 3b               one GPU
    python bench.py --shape tiny --only decode update      two parts, in seconds
"""
import copy
import gc
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm

import runtime
from data import Processor, Prompt
from generate import generate
from model import Config, QwenVL

# vision: depth, width, heads, inner width, full-attention blocks; language: layers, width, heads, KV heads, inner width; vocabulary; tied
SHAPES = {"tiny": ((2, 64, 2, 128, (1,)), (2, 128, 4, 2, 256), 1024, True),
          "mid": ((8, 512, 8, 1376, (3, 7)), (12, 640, 10, 2, 1728), 8192, True),
          "3b": ((32, 1280, 16, 3420, (7, 15, 23, 31)), (36, 2048, 16, 2, 11008), 151_936, True),
          "7b": ((32, 1280, 16, 3420, (7, 15, 23, 31)), (28, 3584, 28, 4, 18944), 152_064, False)}
PARTS = ("load", "prefill", "decode", "update", "step", "sft", "images", "numerics", "profile")
SIDE = {"tiny": 112, "mid": 448, "3b": 800, "7b": 800}                   # of the image, pixels
TEXT, GROUP = 50, 8                                                      # tokens of text in a prompt; rollouts of a prompt


def write_checkpoint(folder, shape, dtype, vocab=None):
    """Random weights and config.json of a shape, in hub layout; the last ids of the vocabulary are the special ones."""
    (depth, width, heads, inner, full), (layers, hidden, q_heads, kv, mlp), size, tied = SHAPES[shape]
    vocab = vocab or size
    half = hidden // q_heads // 2
    section = [half // 4, (half - half // 4) // 2, half - half // 4 - (half - half // 4) // 2]
    config = {"architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl", "hidden_size": hidden,
              "intermediate_size": mlp, "num_hidden_layers": layers, "num_attention_heads": q_heads, "num_key_value_heads": kv,
              "rms_norm_eps": 1e-6, "rope_theta": 1e6, "rope_scaling": {"type": "mrope", "mrope_section": section}, "vocab_size": vocab,
              "max_position_embeddings": 32768, "hidden_act": "silu", "tie_word_embeddings": tied, "torch_dtype": str(dtype)[6:],
              "bos_token_id": vocab - 6, "eos_token_id": vocab - 5, "vision_start_token_id": vocab - 4, "vision_end_token_id": vocab - 3,
              "image_token_id": vocab - 2, "video_token_id": vocab - 1,
              "vision_config": {"depth": depth, "hidden_size": width, "intermediate_size": inner, "num_heads": heads, "in_chans": 3,
                                "out_hidden_size": hidden, "patch_size": 14, "temporal_patch_size": 2, "spatial_merge_size": 2,
                                "window_size": 112, "fullatt_block_indexes": list(full), "hidden_act": "silu", "tokens_per_second": 2}}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    with torch.device("meta"):
        shapes = {n: p.shape for n, p in QwenVL(Config.from_json(folder / "config.json")).state_dict().items()}
    tensors = {n: torch.ones(s, dtype=dtype) if "norm" in n or "ln_q" in n else torch.empty(s, dtype=dtype).normal_(0, 0.02)
               for n, s in shapes.items() if not (tied and n == "lm_head.weight")}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def words(model, n, seed):
    """n ordinary ids"""
    return torch.randint(0, model.config.vocab - 8, (n,), generator=torch.Generator().manual_seed(seed))


def prompt(model, side, seed, text=TEXT):
    """A prompt of random ids and pixels: an image of about side x side pixels, then `text` tokens."""
    n, c, ids = round(side / 28), model.config, words(model, text, seed)
    ids = torch.cat((ids[:4], torch.tensor([c.marker_ids[-2], *[c.image_id] * n * n, c.marker_ids[-1]]), ids[4:]))
    pixels = torch.randn((2 * n) ** 2, 3 * 2 * 14 * 14, generator=torch.Generator().manual_seed(seed))
    return Prompt(ids, pixels, torch.tensor([[1, 2 * n, 2 * n]]), None)


class Peer:
    """transformers' Qwen2.5-VL with the same weights."""

    def __init__(self, folder, dtype, device):
        from transformers import Qwen2_5_VLForConditionalGeneration
        self.model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa").to(device)
        self.device = device

    def batch(self, prompts, completions=None):
        """Prompts (with their completions) as a padded batch: left for generation, right for training."""
        rows = [p.input_ids if completions is None else torch.cat((p.input_ids, c)) for p, c in
                zip(prompts, completions or [None] * len(prompts))]
        width = max(map(len, rows))
        ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
        for i, row in enumerate(rows):
            where = slice(width - len(row), None) if completions is None else slice(len(row))
            ids[i, where], mask[i, where] = row, 1
        inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values": torch.cat([p.pixel_values for p in prompts]),
                  "image_grid_thw": torch.cat([p.image_grid_thw for p in prompts])}
        kinds = (ids == self.model.config.image_token_id).int()          # newer versions ask which tokens are an image's
        return {k: v.to(self.device) for k, v in {**inputs, "mm_token_type_ids": kinds}.items()}

    def generate(self, prompts, group, tokens):
        return self.model.generate(**self.batch(prompts), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=True, temperature=1.0,
                                   top_k=0, top_p=1.0, num_return_sequences=group, eos_token_id=None, pad_token_id=0)

    def score(self, prompts, completions):
        """Log-probabilities of completions of one length as TRL's trainer computes them: a padded row each, the last logits alone."""
        n = len(completions[0])
        logits = self.model(**self.batch(prompts, completions), logits_to_keep=n + 1, use_cache=False).logits[:, :-1]
        return logits.float().log_softmax(-1).gather(-1, torch.stack(completions).to(self.device)[..., None])[..., 0]


# ------------------------------------------------------------------------------------------------------------------ measuring

def clock(f, device):
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    f()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


class Table:
    """Rows of bench.json; every measurement alternates between ours and theirs."""

    def __init__(self, args, device):
        self.args, self.device, self.rows, self.more = args, device, [], {}

    def compare(self, name, peer, ours, theirs, amount=None, unit="s", subtract=None):
        """Times ours() and theirs(), one warm-up each. amount: units of work, for a rate; subtract: (ours, theirs) of seconds to take off.
        -> the medians in seconds."""
        pairs = []
        for i in tqdm(range(self.args.repeats + 1), desc=f"{name}, {peer}", leave=False):
            pair = clock(ours, self.device), clock(theirs, self.device)
            if i:
                pairs.append([t - s for t, s in zip(pair, subtract or (0, 0))])
        a, b = (statistics.median(t) for t in zip(*pairs))
        ratios = [theirs / ours for ours, theirs in pairs]
        rate = [amount / t for t in (a, b)] if amount else [a, b]
        self.add(name, peer, *rate, unit, b / a, [min(ratios), max(ratios)])
        return a, b

    def add(self, name, peer, ours, theirs, unit, ratio, spread):
        self.rows.append({"name": name, "peer": peer, "ours": ours, "theirs": theirs, "unit": unit, "ratio": ratio, "spread": spread})
        bounds = f"{spread[0]:.2f} .. {spread[1]:.2f}"
        tqdm.write(f"{name:8} {peer:44} {ours:12.4g} {theirs:12.4g} {unit:16} {ratio:6.2f}x   {bounds}")


LOADER = """
import sys, time, torch
ours, folder, dtype = sys.argv[1] == "ours", sys.argv[2], getattr(torch, sys.argv[3])
if ours:
    from model import QwenVL as Model
else:
    from transformers import Qwen2_5_VLForConditionalGeneration as Model
    import transformers.models.qwen2_5_vl.modeling_qwen2_5_vl
def status(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) / 1024
before, began = status("VmRSS"), time.perf_counter()
model = Model.from_pretrained(folder, dtype=dtype)
touched = sum(p.detach().flatten()[::512].float().sum().item() for p in model.parameters())   # every page of the memory map is read
print(time.perf_counter() - began, status("VmHWM") - before)
"""


def bench_load(table, folder, dtype):
    """A fresh process each; every weight is read once, so a memory map does not look as if it were free."""
    got = {"ours": [], "theirs": []}
    for _ in tqdm(range(table.args.repeats + 1), desc="load", leave=False):
        for who, results in got.items():
            done = subprocess.run([sys.executable, "-c", LOADER, who, str(folder), str(dtype)[6:]], capture_output=True, text=True,
                                  cwd=Path(__file__).parent, check=False)
            if done.returncode:
                raise RuntimeError(done.stderr)
            results.append([float(v) for v in done.stdout.split()])
    ours, theirs = (np.array(results[1:]) for results in got.values())   # the first fills the file cache
    for i, unit in enumerate(("s", "MiB at peak")):
        ratios = (theirs[:, i] / ours[:, i]).tolist()
        a, b = (float(np.median(x[:, i])) for x in (ours, theirs))
        table.add("load", "transformers from_pretrained", a, b, unit, b / a, [min(ratios), max(ratios)])


def group_loss(logp, seed):
    """A policy-gradient loss of random advantages over (rows, L) or packed log-probabilities."""
    weight = torch.randn(logp.numel(), generator=torch.Generator().manual_seed(seed)).to(logp.device)
    return -(logp.flatten() * weight).sum() / logp.numel()


def main():
    parser = runtime.FlagParser("Measures each part of the work beside what a user would run instead")
    parser.add_argument("--shape", choices=SHAPES, default="mid", help="of the model, random weights")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu", help="where")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on CUDA, float32 on a CPU")
    parser.add_argument("--repeats", type=runtime.positive, default=3, help="alternating repeats behind one warm-up")
    parser.add_argument("--prompts", type=runtime.positive, default=8, help="questions in decode and step, eight rollouts each")
    parser.add_argument("--tokens", type=runtime.positive, help="of a completion; default 64, on CUDA 256")
    parser.add_argument("--only", nargs="+", choices=PARTS, help="these rows alone")
    parser.add_argument("--out", default=".", help="folder of bench.json")
    args = parser.parse_args()
    args.tokens = args.tokens or (256 if args.device == "cuda" else 64)
    device = torch.device(args.device)
    dtype = getattr(torch, args.dtype or ("bfloat16" if args.device == "cuda" else "float32"))
    wanted = args.only or PARTS
    Path(args.out).mkdir(parents=True, exist_ok=True)
    table = Table(args, device)
    print(f"{args.shape} shape, {args.device}, {str(dtype)[6:]}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"{'':8} {'beside':44} {'ours':>12} {'theirs':>12} {'unit':16} {'ratio':>7}   least .. most")
    with tempfile.TemporaryDirectory() as folder:
        measure(table, write_checkpoint(Path(folder), args.shape, dtype), dtype, wanted)
    hardware = torch.cuda.get_device_name() if device.type == "cuda" else f"{os.cpu_count()} CPU cores"
    report = {"device": hardware, "torch": torch.__version__, "shape": args.shape, "dtype": str(dtype)[6:], "tokens": args.tokens,
              "repeats": args.repeats, "rows": table.rows, **table.more}
    if device.type == "cuda":
        report |= ceilings(device)
        for row in table.rows:
            for key, most in (("TBs", "bandwidth_TBs"), ("TFLOPs", "matrix_TFLOPs")):
                if key in row:
                    row["share"] = row[key] / report[most]
                    print(f"{row['name']}: {row[key]:.3g} {key}, {row['share']:.0%} of the {report[most]:.3g} measured in this run")
        report["peak_memory_GiB"] = torch.cuda.max_memory_allocated() / 2 ** 30
    else:
        report["peak_memory_GiB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20
    (Path(args.out) / "bench.json").write_text(json.dumps(report, indent=2) + "\n")
    print(f"written: {Path(args.out) / 'bench.json'}")


def measure(table, folder, dtype, wanted):
    args, device, side, L = table.args, table.device, SIDE[table.args.shape], table.args.tokens
    try:
        import transformers
        transformers.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
    except ImportError:
        runtime.fail("the peers need transformers: pip install -r requirements-dev.txt")
    if "load" in wanted:
        bench_load(table, folder, dtype)
    ours = QwenVL.from_pretrained(folder, dtype, device).requires_grad_(True)
    ours.stop_ids = ()                                                   # end of turn is off: every rollout is as long as asked
    peer = Peer(folder, dtype, device)
    prompts = [prompt(ours, side, i) for i in range(args.prompts)]
    completions = [[words(ours, L, 97 * q + g) for g in range(GROUP)] for q in range(args.prompts)]
    seeds = torch.arange(args.prompts)

    def prefill_ours():
        with torch.no_grad():
            ours.prefill(prompts, GROUP, 1)

    def prefill_peer():
        with torch.no_grad():
            peer.model(**peer.batch(prompts), logits_to_keep=1, use_cache=True)
    if "prefill" in wanted:
        table.compare("prefill", "transformers forward, no rollouts yet", prefill_ours, prefill_peer,
                      sum(len(p.input_ids) for p in prompts), "prompt tokens/s")
    if "decode" in wanted:
        whole = table.compare("decode", "transformers generate, prefill included", lambda: generate(ours, prompts, GROUP, L, 1.0, seeds),
                              lambda: peer.generate(prompts, GROUP, L), args.prompts * GROUP * L, "new tokens/s")
        first = table.compare("decode", "transformers generate, first token alone", lambda: generate(ours, prompts, GROUP, 1, 1.0, seeds),
                              lambda: peer.generate(prompts, GROUP, 1))
        a, b = ((w - f) / (L - 1) for w, f in zip(whole, first))
        table.add("decode", "transformers generate, one step (difference)", a, b, "s", b / a, [b / a, b / a])
        if device.type == "cuda":
            table.rows[-1] |= share_of_bandwidth(ours, prompts, L, a)

    def clear():
        ours.zero_grad(set_to_none=True)
        peer.model.zero_grad(set_to_none=True)

    def update_ours(q=0):
        group_loss(ours.score([prompts[q]], [completions[q]])[0], q).backward()

    def update_repeated(q=0):
        group_loss(ours.score([prompts[q]] * GROUP, [[c] for c in completions[q]])[0], q).backward()

    def update_peer(q=0):
        group_loss(peer.score([prompts[q]] * GROUP, completions[q]), q).backward()
    if "update" in wanted:
        clear()
        table.compare("update", "ours, prompt repeated for each rollout", update_ours, update_repeated, GROUP * L, "tokens/s")
        clear()
        table.compare("update", "transformers, prompt repeated", update_ours, update_peer, GROUP * L, "tokens/s")
        clear()
        table.rows[-1]["gradient_difference"] = gradient_difference(ours, update_ours, update_repeated)
        print(f"         largest relative difference of a gradient, shared or repeated: {table.rows[-1]['gradient_difference']:.1e}")
        if device.type == "cuda":
            table.rows[-1] |= share_of_compute(ours, prompts[0], L, table.rows[-1]["ours"] / (GROUP * L))
    if "step" in wanted:
        optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-6, fused=device.type == "cuda") for m in (ours, peer.model)]

        def step(roll, update, opt):
            roll()
            for q in range(args.prompts):
                update(q)
            opt.step()
            opt.zero_grad(set_to_none=True)
        table.compare("step", "transformers generate and repeated update",
                      lambda: step(lambda: generate(ours, prompts, GROUP, L, 1.0, seeds), update_ours, optimizers[0]),
                      lambda: step(lambda: peer.generate(prompts, GROUP, L), update_peer, optimizers[1]))
        del optimizers
    if "sft" in wanted:
        mixed = [prompt(ours, side if i % 2 else side // 2, 50 + i, TEXT + 8 * (i % 5)) for i in range(8)]
        answers = [words(ours, 40 + 25 * (i % 6), i) for i in range(8)]

        def sft_ours():
            (-ours.score(mixed, [[a] for a in answers])[0].mean()).backward()

        def sft_peer():
            batch = peer.batch(mixed, answers)
            labels = torch.full_like(batch["input_ids"], -100)
            for row, p, a in zip(labels, mixed, answers):
                row[len(p.input_ids):len(p.input_ids) + len(a)] = a
            peer.model(**batch, labels=labels, use_cache=False).loss.backward()
        clear()
        table.compare("sft", "transformers, padded batch of unequal records", sft_ours, sft_peer,
                      sum(len(p.input_ids) + len(a) for p, a in zip(mixed, answers)), "tokens/s")
        clear()
    if "images" in wanted:
        images(table)
    if "numerics" in wanted:
        table.more["numerics"] = numerics(ours, prompts[:2], L, device)
    if "profile" in wanted:
        table.more["profile"] = profile(lambda: generate(ours, prompts, GROUP, min(L, 16), 1.0, seeds), update_ours)


def images(table):
    """One 800 x 800 photograph-like picture through decoding, resizing, normalising and patching, in this process."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    theirs = Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=28 * 28 * 1280)
    ours = Processor.__new__(Processor)
    ours.patch, ours.temporal_patch, ours.merge, ours.min_pixels, ours.max_pixels = 14, 2, 2, 56 * 56, 28 * 28 * 1280
    ours.mean, ours.std = (np.array(v, np.float32) for v in (theirs.image_mean, theirs.image_std))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "scene.jpg"
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (100, 100, 3), np.uint8)).resize((800, 800)).save(file)
        table.compare("images", "transformers image processor (PIL)", lambda: [ours.patches(Image.open(file)) for _ in range(8)],
                      lambda: [theirs(Image.open(file).convert("RGB"), return_tensors="pt") for _ in range(8)], 8, "images/s")


def numerics(model, prompts, L, device):
    """Largest and mean difference of log-probabilities: sampled or scored, in this dtype or in float32, by CUDA graphs or without."""
    def apart(name, a, b):
        difference = (a - b).abs()
        print(f"numerics: {name}: log-probabilities differ by {difference.max():.1e} at most, {difference.mean():.1e} on average")
        return {"largest": difference.max().item(), "mean": difference.mean().item()}
    tokens, sampled, _ = generate(model, prompts, GROUP, L, 1.0, torch.arange(len(prompts)))
    completions = [list(group) for group in tokens]
    with torch.no_grad():
        scored = model.score(prompts, completions)[0].view(sampled.shape)
        float32 = copy.deepcopy(model).float().score(prompts, completions)[0].view(sampled.shape)
    found = {"sampled_scored": apart("sampled or scored", sampled, scored),
             "dtype_float32": apart("this dtype or float32", scored, float32)}
    if device.type == "cuda":
        again, by_graph, _ = generate(model, prompts, GROUP, L, 1.0, torch.arange(len(prompts)), cuda_graphs=True)
        same = (again == tokens).long().cumprod(-1).bool()               # until a draw falls on the other side of a boundary
        found["graph_eager"] = {**apart("by graph or eager", by_graph[same], sampled[same]), "tokens_equal": same.float().mean().item()}
        print(f"numerics: by graph {found['graph_eager']['tokens_equal']:.1%} of the tokens lie before any that differs")
    return found


def profile(*works):
    """The ten largest operations of one pass of each work, by their own time (on CUDA, the device's)."""
    from torch.profiler import ProfilerActivity
    cuda = torch.cuda.is_available()
    with torch.profiler.profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda) as recorded:
        for work in works:
            work()
    own = "self_device_time_total" if cuda else "self_cpu_time_total"
    events = sorted(recorded.key_averages(), key=lambda e: -getattr(e, own))
    total = sum(getattr(e, own) for e in events)
    largest = [{"name": e.key, "ms": getattr(e, own) / 1e3, "calls": e.count, "share": getattr(e, own) / total} for e in events[:10]]
    for e in largest:
        print(f"profile: {e['share']:6.1%} {e['ms']:10.1f} ms {e['calls']:8} x {e['name'][:90]}")
    return largest


def gradient_difference(model, first, second):
    """Largest, over parameters, of the norm of the difference of two gradients over the norm of the first."""
    first()
    kept = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    second()
    worst = max(((p.grad - kept[n]).norm() / (kept[n].norm() + 1e-12)).item() for n, p in model.named_parameters() if n in kept)
    model.zero_grad(set_to_none=True)
    return worst


# ------------------------------------------------------------------------------------------------------------------ against the machine

def ceilings(device):
    """Matrix rate and memory bandwidth as this GPU reaches them now."""
    n = 8192
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    big = torch.empty(2 ** 31, dtype=torch.uint8, device=device)
    for f in (lambda: a @ b, lambda: big.clone()):
        f()
    matrix = min(clock(lambda: [a @ b for _ in range(10)], device) / 10 for _ in range(5))
    copy = min(clock(lambda: big.clone(), device) for _ in range(5))
    return {"matrix_TFLOPs": 2 * n ** 3 / matrix / 1e12, "bandwidth_TBs": 2 * big.nbytes / copy / 1e12}


def share_of_bandwidth(model, prompts, L, seconds):
    """Bytes that a decoding step must read at least: the language model's weights once, each prompt's keys and values once a group, those
    of the rollouts' own tokens (half of them, on average) -> GB and TB/s. The share is that of `bandwidth_TBs`."""
    c, each = model.config, model.model.norm.weight.element_size()
    weights = sum(p.numel() for p in model.model.layers.parameters()) + c.vocab * c.hidden
    kept = sum(len(p.input_ids) + GROUP * L / 2 for p in prompts) * 2 * c.kv_heads * c.head_dim * c.layers
    return {"GB_per_step": (weights + kept) * each / 1e9, "TBs": (weights + kept) * each / 1e12 / seconds}


def share_of_compute(model, p, L, groups_per_second):
    """Model FLOPs of a group-shared update (forward and backward, vision tower and attention included) -> per group, and TFLOP/s."""
    c = model.config
    patches, prompt_tokens = len(p.pixel_values), len(p.input_ids)
    tokens = prompt_tokens + GROUP * (L - 1)
    weights = {"vision": sum(m.weight.numel() for m in model.visual.blocks.modules() if isinstance(m, nn.Linear)),
               "language": sum(m.weight.numel() for m in model.model.layers.modules() if isinstance(m, nn.Linear))}
    window = (c.vision.window // c.vision.patch) ** 2
    seen = sum(patches if i in c.vision.full_blocks else min(window, patches) for i in range(c.vision.depth))
    attention = 2 * patches * seen * 2 * c.vision.hidden + c.layers * 2 * 2 * c.heads * c.head_dim * (
        prompt_tokens ** 2 / 2 + GROUP * (L - 1) * (prompt_tokens + L / 2))
    forward = 2 * (weights["vision"] * patches + weights["language"] * tokens + c.vocab * c.hidden * GROUP * L
                   + sum(m.weight.numel() for m in model.visual.merger.modules() if isinstance(m, nn.Linear)) * patches
                   // c.vision.merge ** 2) + attention
    return {"TFLOP_per_group": 3 * forward / 1e12, "TFLOPs": 3 * forward * groups_per_second / 1e12}


if __name__ == "__main__":
    runtime.main(main)
