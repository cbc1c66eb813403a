"""The small base: a Qwen2.5-VL shape trained from nothing on the embedded world, because real weights can't ship.

It ends up knowing what a pretrained model knows here: the things, their colours and where they lie. It has seen neither expressions that
need reasoning nor the answer format. Two losses in one loop: dense ones (each image token says which object lies there, its colour and its
box; without them the language model finds nothing to read), and, after a while, language: boxes and points of
things by name, by category, and the other way round.

    python toy/pretrain.py                   writes ckpt/base; minutes on two CPU cores
"""
import json
import math
import random
import shutil
import sys
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
    # Heads are narrow and images small: with these sections rows and columns turn fast enough to be told apart, and half of a head hardly
    # turns at all, so that words can look for things by what they are, however far away.
    text = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4,
            "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "rope_scaling": {"type": "mrope", "mrope_section": [1, 2, 13]},
            "max_position_embeddings": 1024, "hidden_act": "silu", "vocab_size": -(-tokenizer.get_vocab_size() // 64) * 64}
    vision = {"depth": 3, "hidden_size": 128, "intermediate_size": 256, "num_heads": 4, "out_hidden_size": 128, "in_chans": 3,
              "patch_size": 14, "temporal_patch_size": 2, "spatial_merge_size": 2, "window_size": 56, "fullatt_block_indexes": [2],
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
        yield from (text for question in questions(r.image, random.Random(i)) for text in question)
        yield "system\nYou are a helpful assistant.\nuser\nassistant\n"


def number_ids(processor):
    return torch.tensor([processor.words(str(n)) for n in range(scenes.SIDE + 1)])[:, 0]


def fresh_model(out, seed, processor):
    """Random weights; residual branches begin small beside the words they are added to, and numbers as points on circles of many periods,
    so that near numbers have near embeddings."""
    torch.manual_seed(seed)
    model = QwenVL(Config.from_json(out / "config.json"))
    width = model.config.hidden
    for name, p in model.named_parameters():
        if p.ndim > 1:
            small = 0.2 if name.endswith(("o_proj.weight", "down_proj.weight", "attn.proj.weight")) else 1.0
            nn.init.normal_(p, std=0.05 if "embed_tokens" in name else small * p[0].numel() ** -0.5)
        elif "bias" in name:
            nn.init.zeros_(p)
    numbers = number_ids(processor)
    angle = torch.arange(len(numbers))[:, None] * 2 * math.pi / torch.logspace(math.log10(6), math.log10(240), width // 2)
    circles = torch.cat((angle.cos(), angle.sin()), 1) @ torch.linalg.qr(torch.randn(width, width))[0]
    with torch.no_grad():
        model.model.embed_tokens.weight[numbers] = 0.05 * width ** 0.5 * F.normalize(circles, dim=1)
    model.set_vocabulary(read_token_ids(out))
    return model


# ------------------------------------------------------------------------------------------------------------------ what is said of a scene

def spoken(box):
    """[x1, y1, x2, y2] in whole pixels; the world's images are not resized, so that is the model's frame."""
    return "[" + ", ".join(str(round(v)) for v in box) + "]"


def names(scene):
    """Names that fit one object alone, with it: category, or colour and category."""
    every = [(name, o) for o in scene.objects for name in (f"the {o.category}", f"the {o.color} {o.category}")]
    return [(name, o) for name, o in every if [n for n, _ in every].count(name) == 1]


def around(box):
    """A point near the centre, as the reasoning will write it: in tens of pixels."""
    return "near ({}, {})".format(*(10 * round((a + b) / 20) for a, b in (box[::2], box[1::2])))


MANNERS = ("{}",) * 4 + ("look at the picture. {}", "{} be brief.", "this was taken from above.\n{}",
                         "{}\nlook at the whole image first, then say what is asked, once and in the form that is asked for, like this.")


def questions(scene, rng):
    """(question, answer) pairs: each thing that has a name, by box or point; the things of each category; what lies near a point."""
    pairs = []
    for name, o in names(scene):
        if rng.random() < 0.6:
            pairs.append((rng.choice(("{}", "where is {}?", "locate {}.", "i look for {}.")).format(name), f"{name} {spoken(o.box)}"))
        else:
            pairs.append((rng.choice(("point to {}.", "about where is {}?")).format(name), f"{name} {around(o.box)}"))
    ordered = sorted(scene.objects, key=lambda o: o.center[0])
    for category in {o.category: None for o in ordered}:
        say = rng.choice((spoken, around))
        pairs.append((f"list every {category}{'' if say is spoken else ' by a point'}.",
                      ", ".join(f"a {o.color} {o.category} {say(o.box)}" for o in ordered if o.category == category)))
    for o in rng.sample(ordered, min(2, len(ordered))):
        pairs.append((f"what is {around(o.box)}?", f"a {o.color} {o.category} {spoken(o.box)}"))
    return [(rng.choice(MANNERS).format(question), answer) for question, answer in pairs]


PATCHES = scenes.SIDE // 14       # a side


def dense_targets(scene):
    """What each image token should say of its four patches: kind and colour (tokens, 4) long, box (tokens, 4, 4) in pixels. A patch answers
    for the object that covers its centre, or whose centre it covers; else kind 0."""
    cell = scenes.SIDE / PATCHES
    kinds, colors = np.zeros((PATCHES, PATCHES), int), np.zeros((PATCHES, PATCHES), int)
    boxes = np.zeros((PATCHES, PATCHES, 4), np.float32)
    middle = (np.arange(PATCHES) + 0.5) * cell
    for o in scene.objects:
        x1, y1, x2, y2 = o.box
        covered = ((middle >= y1) & (middle <= y2))[:, None] & ((middle >= x1) & (middle <= x2))
        covered[int(o.center[1] // cell), int(o.center[0] // cell)] = True
        kinds[covered], colors[covered] = 1 + list(scenes.CATEGORIES).index(o.category), list(scenes.COLORS).index(o.color)
        boxes[covered] = o.box

    def by_token(a):
        a = torch.from_numpy(a).unflatten(0, (-1, 2)).unflatten(2, (-1, 2)).transpose(1, 2)           # row, column, row in it, column in it
        return a.flatten(2, 3).flatten(0, 1)
    return by_token(kinds), by_token(colors), by_token(boxes)


# ------------------------------------------------------------------------------------------------------------------ training

def bump(wanted):
    """Numbers (...) -> what to aim at instead, (..., 113): a bump of one pixel about each, because a near miss is better than a far one."""
    return (-(torch.arange(scenes.SIDE + 1) - wanted[..., None]) ** 2 / 2).softmax(-1)


def talk(processor, pairs):
    """(question, answer) pairs -> ids (L,) that follow the image, how many of them are the answer and its end."""
    for question, answer in pairs:
        ask = processor.turns(question, 0)
        ask = ask[ask.index(processor.ids["<|vision_end|>"]) + 1:]
        say = processor.encode(answer)
        yield torch.cat((torch.tensor(ask), say)), len(say)


def train(model, processor, steps, warm, batch, lr, seed, out):
    """The dense losses throughout, language from step `warm` on. Images are computed once for all that is said of them.

    Category and colour are read off the tower's tokens by linear heads; at step `warm` these rows become the embeddings of the words they
    stand for. The box is read half-way up the language model, whose coordinates are told apart by the embeddings of their numbers: the
    tower's positions are relative, where in the image a token lies is first known to layers that see <|vision_start|>."""
    first_scene, n_scenes, few, many = scenes.SPLITS["pretrain"]
    rng, width = random.Random(seed), model.config.hidden
    numbers, embedding = number_ids(processor), model.model.embed_tokens.weight
    aims = torch.eye(model.config.vocab)                                 # what to aim at for each token: itself, but numbers
    aims[numbers[:, None], numbers] = bump(torch.arange(len(numbers)))
    heads = nn.ModuleDict({"kind": nn.Linear(width, 4 * (1 + len(scenes.CATEGORIES))), "color": nn.Linear(width, 4 * len(scenes.COLORS)),
                           "box": nn.Linear(width, 16 * width)})
    halfway = []
    hook = model.model.layers[len(model.model.layers) // 2 - 1].register_forward_hook(lambda layer, given, y: halfway.append(y))
    params = [*model.parameters(), *heads.parameters()]
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    rest = [p for p in params if not any(p is m for m in matrices)]
    optimizers = (torch.optim.Muon(matrices, lr=lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
                  torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.95), weight_decay=0.01))

    image = processor.turns("", PATCHES ** 2 // 4)
    image = torch.tensor(image[:image.index(processor.ids["<|vision_end|>"]) + 1])
    seen = (image == model.config.image_id).repeat(batch)
    with tqdm(range(steps), desc="pretrain") as bar:
        for step in bar:
            looked = [scenes.scene(first_scene + rng.randrange(n_scenes), few, many) for _ in range(batch)]
            x, where, lengths = model.pack([data.Prompt(image, *processor.patches(s.draw())[:2], None) for s in looked])
            tokens = x[seen]
            said = [list(talk(processor, questions(s, rng))) if step >= warm else [] for s in looked]
            told = [ids for group in said for ids, _ in group]
            lasting, start = [len(ids) - 1 for ids in told], int(where[:, :len(image)].max()) + 1
            if told:
                x = torch.cat((x, model.model.embed_tokens(torch.cat([ids[:-1] for ids in told]))))
                where = torch.cat((where, torch.cat([start + torch.arange(n) for n in lasting]).expand(3, -1)), 1)
            groups = zip(lengths, (sum(len(ids) - 1 for ids, _ in group) for group in said))
            halfway.clear()
            hidden = model.model(x, where, Plan(lengths + lasting, prefix=groups))

            kinds, colors, boxes = (torch.cat(t) for t in zip(*(dense_targets(s) for s in looked)))
            there = kinds > 0
            half = model.model.norm(halfway[0][:len(seen)][seen])
            kind, color, box = (heads[k](y).unflatten(1, (4, -1)) for k, y in (("kind", tokens), ("color", tokens), ("box", half)))
            box = box[there].unflatten(-1, (4, width)) @ embedding[numbers].T                         # (n, 4, numbers)
            loss = (F.cross_entropy(kind.flatten(0, 1), kinds.flatten()) + F.cross_entropy(kind[there], kinds[there])
                    + F.cross_entropy(color[there], colors[there]) + F.cross_entropy(box.flatten(0, 1), bump(boxes[there]).flatten(0, 1)))
            line = {"step": step + 1, "kind": (kind.argmax(-1) == kinds)[there].float().mean().item(),
                    "pixels_off": (box.argmax(-1) - boxes[there]).abs().mean().item()}
            if told:
                answer = torch.cat([torch.arange(len(ids) - 1) >= len(ids) - 1 - n for group in said for ids, n in group])
                wanted = torch.cat([ids[1:] for ids in told])[answer]
                language = F.cross_entropy(model.lm_head(hidden[len(seen):][answer]), aims[wanted])
                loss = loss + 2 * language
                line["language"] = language.item()
            loss.backward()
            line["grad_norm"] = nn.utils.clip_grad_norm_(params, 1.0).item()
            for opt in optimizers:
                for group in opt.param_groups:
                    group["lr"] = runtime.lr_at(step, steps, lr)
                opt.step()
                opt.zero_grad()
            if step + 1 == warm:
                with torch.no_grad():
                    for name, called in (("kind", [None, *scenes.CATEGORIES]), ("color", list(scenes.COLORS))):
                        for word, row in zip(called, heads[name].weight.unflatten(0, (4, -1)).mean(0)):
                            ids = word and processor.words(f" {word}")
                            if ids and len(ids) == 1:
                                embedding[ids[0]] = 0.05 * width ** 0.5 * F.normalize(row, dim=0)
                optimizers[1].state.pop(embedding, None)
            runtime.log(out / "metrics.jsonl", line)
            if step % 10 == 0:
                bar.set_postfix_str(f"kind {line['kind']:.2f} box {line['pixels_off']:.1f} px text {line.get('language', math.nan):.3f}")
    hook.remove()


def main():
    parser = runtime.Parser("Trains the small base on the embedded world from nothing")
    parser.add_argument("--out", default="ckpt/base", help="folder of the base")
    parser.add_argument("--steps", type=runtime.positive, default=1500, help="steps")
    parser.add_argument("--warm", type=runtime.positive, default=100, help="the first of them, without language")
    parser.add_argument("--batch", type=runtime.positive, default=16, help="scenes a step")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0, help="of weights and scenes")
    args = parser.parse_args()
    out = Path(args.out)
    if (out / "model.safetensors").exists():
        runtime.fail(f"{out} already holds a model; remove it, or name another --out")
    shutil.rmtree(out, ignore_errors=True)
    write_shape(out, args.seed)
    processor = data.Processor.from_pretrained(out)
    model = fresh_model(out, args.seed, processor)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(processor.tokenizer.get_vocab())} tokens")
    train(model, processor, args.steps, args.warm, args.batch, args.lr, args.seed, out)
    model.save_pretrained(out)
    print(f"written: {out}")


if __name__ == "__main__":
    runtime.main(main)
