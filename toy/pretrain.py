"""The small base: a Qwen2.5-VL shape trained from nothing on the embedded world, because real weights can't ship.

It ends up knowing what a pretrained model knows here: the things, their colours and where they lie. It has seen neither expressions that
need reasoning nor the answer format. Two parts: a dense vision warm-up (each image token says which object lies there, its colour and its
box; without it the language model finds nothing to read), then language: naming and listing objects with their boxes.

    python toy/pretrain.py                   writes ckpt/base; minutes on two CPU cores
"""
import json
import random
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import cot  # noqa: E402
import data  # noqa: E402
import runtime  # noqa: E402
from model import Config, Plan, QwenVL, read_token_ids  # noqa: E402
from toy import scenes  # noqa: E402

ADDED = ("<|endoftext|>", "<|im_start|>", "<|im_end|>",
         "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")
VOCABULARY = 768
NOTHING = "nothing"               # class of an image token without an object


# ------------------------------------------------------------------------------------------------------------------ the shape

def write_shape(out, seed):
    """Tokenizer, processor and config.json of the base, in hub layout."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    words = data.WORDS.replace(r"|\p{N}|", r"|\p{N}+|")                    # a number is one token here, where Qwen's has one a digit
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(words), "isolated"),
                                                       pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(corpus(seed), trainer)
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in ADDED])
    tokenizer.save(str(out / "tokenizer.json"))
    ids = {t: tokenizer.token_to_id(t) for t in ADDED}
    text = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 6, "num_key_value_heads": 2,
            "rms_norm_eps": 1e-6, "rope_theta": 100.0, "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]},
            "max_position_embeddings": 1024, "hidden_act": "silu", "vocab_size": -(-tokenizer.get_vocab_size() // 64) * 64}
    vision = {"depth": 4, "hidden_size": 128, "intermediate_size": 256, "num_heads": 4, "out_hidden_size": 192, "in_chans": 3,
              "patch_size": 14, "temporal_patch_size": 2, "spatial_merge_size": 2, "window_size": 56, "fullatt_block_indexes": [1, 3],
              "hidden_act": "silu", "tokens_per_second": 2}
    config = {"architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl", "torch_dtype": "bfloat16", **text,
              "tie_word_embeddings": True, "bos_token_id": ids["<|endoftext|>"], "eos_token_id": ids["<|im_end|>"],
              "image_token_id": ids["<|image_pad|>"], "video_token_id": ids["<|video_pad|>"], "vision_token_id": ids["<|vision_pad|>"],
              "vision_start_token_id": ids["<|vision_start|>"], "vision_end_token_id": ids["<|vision_end|>"], "vision_config": vision}
    processor = {"processor_class": "Qwen2_5_VLProcessor", "image_processor_type": "Qwen2VLImageProcessor", "patch_size": 14,
                 "temporal_patch_size": 2, "merge_size": 2, "min_pixels": 56 * 56, "max_pixels": 448 * 448,
                 "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
    tokens = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>",
              "added_tokens_decoder": {str(i): {"content": t, "special": True, "normalized": False, "lstrip": False, "rstrip": False,
                                                "single_word": False} for t, i in ids.items()}}
    for name, content in (("config", config), ("preprocessor_config", processor), ("tokenizer_config", tokens)):
        (out / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def corpus(seed):
    """Texts of the world for the tokenizer to learn its words from: prompts, reasoning, lists."""
    records = data.Records([data.Record(i, s, text, box, category, s.size, kind)
                            for i, s, text, box, category, kind in scenes.records("pretrain", 1500)], {})
    write = cot.writer("synth", records)
    frame = data.Frame((scenes.SIDE, scenes.SIDE), (scenes.SIDE, scenes.SIDE), "absolute")
    yield from (f"{n}" for n in range(scenes.SIDE + 1) for _ in range(300))
    for i, r in enumerate(records):
        yield data.PROMPT.format(text=r.text)
        yield write(r, frame, seed + i)
        yield from texts(r.image)
        yield "system\nYou are a helpful assistant.\nuser\nassistant\n"


def fresh_model(out, seed):
    torch.manual_seed(seed)
    model = QwenVL(Config.from_json(out / "config.json"))
    for name, p in model.named_parameters():
        if p.ndim > 1:
            nn.init.normal_(p, std=0.05 if "embed" in name else p[0].numel() ** -0.5)
        elif "bias" in name:
            nn.init.zeros_(p)
    model.set_vocabulary(read_token_ids(out))
    return model


# ------------------------------------------------------------------------------------------------------------------ part 1: vision

PATCHES = scenes.SIDE // 14       # a side


def dense_targets(scene):
    """What each image token should say of its four patches: kind and colour (tokens, 4) long, box (tokens, 4, 4) in sides of the image. A
    patch answers for the object that covers its centre, or whose centre it covers; else kind 0."""
    cell = scenes.SIDE / PATCHES
    kinds, colors = np.zeros((PATCHES, PATCHES), int), np.zeros((PATCHES, PATCHES), int)
    boxes = np.zeros((PATCHES, PATCHES, 4), np.float32)
    middle = (np.arange(PATCHES) + 0.5) * cell
    for o in scene.objects:
        x1, y1, x2, y2 = o.box
        covered = ((middle >= y1) & (middle <= y2))[:, None] & ((middle >= x1) & (middle <= x2))
        covered[int(o.center[1] // cell), int(o.center[0] // cell)] = True
        kinds[covered], colors[covered] = 1 + list(scenes.CATEGORIES).index(o.category), list(scenes.COLORS).index(o.color)
        boxes[covered] = np.array(o.box) / scenes.SIDE

    def by_token(a):
        a = torch.from_numpy(a).unflatten(0, (-1, 2)).unflatten(2, (-1, 2)).transpose(1, 2)           # row, column, row in it, column in it
        return a.flatten(2, 3).flatten(0, 1)
    return by_token(kinds), by_token(colors), by_token(boxes)


def warm_up(model, processor, batches, steps, lr):
    """Trains the vision tower with linear heads for category and colour on its tokens, whose rows become the embeddings of the words they
    stand for; and the lower half of the language model with one for the box, whose coordinates are told apart by the embeddings of their
    numbers. (The tower's positions are relative: where in the image a token lies is first known to layers that see <|vision_start|>.)"""
    width = model.config.hidden
    sizes = {"kind": 1 + len(scenes.CATEGORIES), "color": len(scenes.COLORS), "box": 4 * width}
    numbers = torch.tensor([processor.words(str(n)) for n in range(scenes.SIDE + 1)]).flatten()
    heads = nn.ModuleDict({name: nn.Linear(width, 4 * n) for name, n in sizes.items()})
    layers = model.model.layers
    model.model.layers = layers[:len(layers) // 2]
    params = [*model.visual.parameters(), *model.model.parameters(), *heads.parameters()]
    opt = torch.optim.AdamW(params, lr=lr, betas=(0.9, 0.95), weight_decay=0.01)
    with tqdm(range(steps), desc="vision") as bar:
        for step in bar:
            batch = next(batches)
            kinds, colors, boxes = (torch.cat(x) for x in zip(*(dense_targets(s) for s, *_ in batch)))
            x, where, lengths = model.pack([p for *_, p in batch])
            seen = torch.cat([p.input_ids for *_, p in batch]) == model.config.image_id
            y = model.model(x, where, Plan(lengths))
            kind, color, box = (heads[name](z[seen]).unflatten(1, (4, n)) for (name, n), z in zip(sizes.items(), (x, x, y)))
            there = kinds > 0
            loss_kind = F.cross_entropy(kind.flatten(0, 1), kinds.flatten()) + F.cross_entropy(kind[there], kinds[there])
            loss_color = F.cross_entropy(color[there], colors[there])
            logits = box[there].unflatten(-1, (4, width)) @ model.model.embed_tokens.weight[numbers].T                # (n, 4, numbers)
            near = -(torch.arange(len(numbers)) - boxes[there][..., None] * scenes.SIDE) ** 2 / 8                     # within some 2 px
            loss_box = -(near.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean()
            for group in opt.param_groups:
                group["lr"] = runtime.lr_at(step, steps, lr)
            (loss_kind + loss_color + loss_box).backward()
            nn.utils.clip_grad_norm_(params, 1.0)
            opt.step()
            opt.zero_grad()
            if step % 10 == 0:
                right = (kind.argmax(-1) == kinds)[there].float().mean()
                off = (logits.argmax(-1) - boxes[there] * scenes.SIDE).abs().mean()
                bar.set_postfix_str(f"kind {loss_kind:.2f} ({right:.2f}) color {loss_color:.3f} box {loss_box:.2f} ({off:.1f} px)")
    model.model.layers = layers
    with torch.no_grad():
        for name, words in (("kind", [NOTHING, *scenes.CATEGORIES]), ("color", list(scenes.COLORS))):
            for word, row in zip(words, heads[name].weight.unflatten(0, (4, -1)).mean(0)):
                ids = processor.words(f" {word}")
                if len(ids) == 1:
                    model.model.embed_tokens.weight[ids[0]] = row * 0.05 * width ** 0.5 / row.norm()


# ------------------------------------------------------------------------------------------------------------------ part 2: language

def spoken(box):
    """[x1, y1, x2, y2] in whole pixels; the world's images are not resized, so that is the model's frame."""
    return "[" + ", ".join(str(round(v)) for v in box) + "]"


def names(scene):
    """Colour and category of every object that they fit alone -> its box."""
    every = [f"the {o.color} {o.category}" for o in scene.objects]
    return {name: o.box for name, o in zip(every, scene.objects) if every.count(name) == 1}


def texts(scene, asked=""):
    """What is said of a scene: the box of the object asked for; unasked, the box of each that has a name, and all of them in a list."""
    named = [f"{name} {spoken(box)}" for name, box in names(scene).items() if asked in ("", name)]
    if asked:
        return named
    everything = sorted(scene.objects, key=lambda o: o.center[0])
    listed = "\n".join(f"{spoken(o.box)} {o.color} {o.category}" for o in everything)
    return [*named, listed]


def converse(model, processor, batches, steps, lr, out):
    """Trains everything on the texts of scenes; the prompt is an image and a name or nothing, computed once for all its texts."""
    vision = list(map(id, model.visual.parameters()))
    groups = [{"params": list(model.visual.parameters()), "scale": 0.3},
              {"params": [p for p in model.parameters() if id(p) not in vision], "scale": 1.0}]
    opt = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), weight_decay=0.01)
    smooth = None
    with tqdm(range(steps), desc="language") as bar:
        for step in bar:
            batch = next(batches)
            completions = [[processor.encode(t) for t in texts(s, asked)] for s, asked, _ in batch]
            logp, _ = model.score([p for *_, p in batch], completions)
            for group in opt.param_groups:
                group["lr"] = group["scale"] * runtime.lr_at(step, steps, lr)
            loss = -logp.mean()
            loss.backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            opt.step()
            opt.zero_grad()
            smooth = loss.item() if smooth is None else 0.95 * smooth + 0.05 * loss.item()
            runtime.log(out / "metrics.jsonl", {"step": step + 1, "loss": loss.item(), "grad_norm": norm.item()})
            bar.set_postfix_str(f"loss {smooth:.3f}")


def scene_batches(processor, size, seed, crowds):
    """Batches of (Scene, name asked for or "", Prompt) from the pretrain split, drawn ahead by a thread; crowds: for each batch the number
    of objects at most."""
    first, n, few, many = scenes.SPLITS["pretrain"]
    rng = random.Random(seed)

    def make(most):
        scene = scenes.scene(first + rng.randrange(n), few, min(most, many))
        pixels, grid, _ = processor.patches(scene.draw())
        asked = rng.choice(["", *names(scene)])
        ids = torch.tensor(processor.turns(asked, int(grid.prod()) // processor.merge ** 2))
        return scene, asked, data.Prompt(ids, pixels, grid, None)

    with ThreadPoolExecutor(1) as pool:
        ahead = None
        for most in [*crowds, None]:
            following = most and [pool.submit(make, most) for _ in range(size)]
            if ahead:
                yield [f.result() for f in ahead]
            ahead = following


def main():
    parser = runtime.Parser("Trains the small base on the embedded world from nothing")
    parser.add_argument("--out", default="ckpt/base", help="folder of the base")
    parser.add_argument("--vision-steps", type=runtime.positive, default=350, help="steps of the dense vision warm-up")
    parser.add_argument("--steps", type=runtime.positive, default=500, help="steps of language pretraining")
    parser.add_argument("--batch", type=runtime.positive, default=16, help="scenes a step")
    parser.add_argument("--seed", type=int, default=0, help="of weights and scenes")
    args = parser.parse_args()
    out = Path(args.out)
    if (out / "model.safetensors").exists():
        runtime.fail(f"{out} already holds a model; remove it, or name another --out")
    shutil.rmtree(out, ignore_errors=True)
    write_shape(out, args.seed)
    processor = data.Processor.from_pretrained(out)
    model = fresh_model(out, args.seed)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(processor.tokenizer.get_vocab())} tokens")
    warm_up(model, processor, scene_batches(processor, args.batch, args.seed, [5] * args.vision_steps), args.vision_steps, 2e-3)
    # one object first: to read a box off the image at all is learned in minutes; to find the right one among several comes after that
    crowds = [1 if i < 0.4 * args.steps else 2 if i < 0.6 * args.steps else 5 for i in range(args.steps)]
    converse(model, processor, scene_batches(processor, args.batch, args.seed + 1, crowds), args.steps, 2e-3, out)
    model.save_pretrained(out)
    print(f"written: {out}")


if __name__ == "__main__":
    runtime.main(main)
