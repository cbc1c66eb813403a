"""The small base: a Qwen2.5-VL shape trained from nothing on the embedded world, because real weights can't ship.

It ends up knowing what a pretrained model knows here: the things, their colours and where they lie. It has seen neither expressions that
need reasoning nor the answer format. Two losses in one loop: dense ones (each image token says which object lies there, its colour and its
box; without them the language model finds nothing to read), and, after a while, language: boxes and points of things by name, by category,
and the other way round.

    python toy/pretrain.py                   writes ckpt/base, a model card with its scores beside it; hours on two CPU cores
    python toy/pretrain.py --resume          goes on where it was stopped
"""
import itertools
import json
import math
import os
import random
import re
import shutil
import sys
from dataclasses import replace
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
import reward  # noqa: E402
import runtime  # noqa: E402
from answer import PROMPT  # noqa: E402
from attention import Plan  # noqa: E402
from generate import generate  # noqa: E402
from model import Config, QwenVL, read_token_ids  # noqa: E402
from processor import WORDS, Frame, Processor, Prompt  # noqa: E402
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
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(WORDS), "isolated"),
                                                       pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(corpus(seed), trainer)
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in ADDED])
    tokenizer.save(str(out / "tokenizer.json"))
    ids = {t: tokenizer.token_to_id(t) for t in ADDED}
    # Heads are narrow and images small: with these sections rows and columns turn fast enough to be told apart, and half of a head hardly
    # turns at all, so that words can look for things by what they are, however far away.
    text = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 5, "num_attention_heads": 4, "num_key_value_heads": 4,
            "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "rope_scaling": {"type": "mrope", "mrope_section": [1, 2, 13]},
            "max_position_embeddings": 1024, "hidden_act": "silu", "vocab_size": -(-tokenizer.get_vocab_size() // 64) * 64}
    vision = {"depth": 4, "hidden_size": 128, "intermediate_size": 256, "num_heads": 4, "out_hidden_size": 128, "in_chans": 3,
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
    records = data.Records([data.Record(str(i), s, text, box, category, s.size, kind) for i, s, text, box, category, kind
                            in scenes.records(replace(scenes.SPLITS["pretrain"], scenes=1500))], {})
    write = cot.writer(records)
    for i, r in enumerate(records):
        yield PROMPT.format(text=r.text)
        yield write(r, FRAME)
        yield from (text for question in questions(r.image, random.Random(seed + i)) for text in question)
        yield "system\nYou are a helpful assistant.\nuser\nassistant\n"


def fresh_model(out, seed):
    """Random weights; residual branches begin small beside the words they are added to."""
    torch.manual_seed(seed)
    model = QwenVL(Config.from_json(out / "config.json"))
    for name, p in model.named_parameters():
        if p.ndim > 1:
            small = 0.2 if name.endswith(("o_proj.weight", "down_proj.weight", "attn.proj.weight")) else 1.0
            nn.init.normal_(p, std=0.05 if "embed_tokens" in name else small * p[0].numel() ** -0.5)
        elif "bias" in name:
            nn.init.zeros_(p)
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


FRAME = Frame((scenes.SIDE,) * 2, (scenes.SIDE,) * 2, "absolute")


def around(box):
    """A point near the centre, as the reasoning will write it."""
    return f"near {cot.near(box, FRAME)}"


MANNERS = ("{}",) * 12 + ("look at the picture. {}", "{} be brief.", "this was taken from above.\n{}",
                         "{}\nlook at the whole image first, then say what is asked, once and in the form that is asked for, like this.")


LISTS, OTHERS = 3, 3              # pairs for a scene at most


def questions(scene, rng):
    """Some (question, answer) pairs: each thing that has a name, by box or point; the things of each category; what lies near a point."""
    pairs, lists = [], []
    for name, o in names(scene):
        if rng.random() < 0.6:
            pairs.append((rng.choice(("{}", "where is {}?", "locate {}.", "i look for {}.")).format(name), f"{name} {spoken(o.box)}"))
        else:
            pairs.append((rng.choice(("point to {}.", "about where is {}?")).format(name), f"{name} {around(o.box)}"))
    ordered = sorted(scene.objects, key=lambda o: o.center[0])
    listed = {o.category: [p for p in ordered if p.category == o.category] for o in ordered}
    listed |= {f"{o.color} {o.category}": same for o in ordered if len(same := [p for p in listed[o.category] if p.color == o.color]) > 1}
    for phrase, things in listed.items():
        say = rng.choice((spoken, around))
        lists.append((f"list every {phrase}{'' if say is spoken else ' by a point'}.",
                      ", ".join(f"{cot.called(o)} {say(o.box)}" for o in things)))
    for o in rng.sample(ordered, min(2, len(ordered))):
        pairs.append((f"what is {around(o.box)}?", f"{cot.called(o)} {spoken(o.box)}"))
    chosen = rng.sample(lists, min(LISTS, len(lists))) + rng.sample(pairs, min(OTHERS, len(pairs)))
    return [(rng.choice(MANNERS).format(question), answer) for question, answer in chosen]


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


def circles(width):
    """Numbers as points on circles of many periods, tens and hundreds among them: (113, width), of length 1. Near numbers lie near."""
    periods = torch.cat((torch.logspace(math.log10(5), math.log10(240), width // 2 - 8), torch.tensor([10.0, 100.0] * 4)))
    angle = torch.arange(scenes.SIDE + 1)[:, None] * 2 * math.pi / periods
    return F.normalize(torch.cat((angle.cos(), angle.sin()), 1), dim=1)


def digit_aims():
    """The bump about a number as its digits see it: (113, 3, 10), how likely each digit is at a place of a number, behind those before."""
    aims, near = torch.zeros(scenes.SIDE + 1, 3, 10), bump(torch.arange(scenes.SIDE + 1))
    for n, place in itertools.product(range(scenes.SIDE + 1), range(3)):
        for m in map(str, range(max(0, n - 9), min(scenes.SIDE, n + 9) + 1)):
            if len(m) > place < len(str(n)) and m[:place] == str(n)[:place]:
                aims[n, place, int(m[place])] += near[n, int(m)]
    return aims / aims.sum(-1, keepdim=True).clamp(min=1e-9)


def talk(processor, pairs, soft, vocab):
    """(question, answer) pairs -> ids (L,) that follow the image, and what to aim at in the answer and its end, (A, V)."""
    digits = processor.encode("0123456789")[:10]
    for question, answer in pairs:
        ask = processor.turns(question, 0)
        ask = ask[ask.index(processor.ids["<|vision_end|>"]) + 1:]
        say = processor.encode(answer)
        aims = F.one_hot(say, vocab).float()
        is_digit = torch.isin(say, digits)
        numbers, place, n = re.findall(r"\d+", answer), 0, 0
        for i in is_digit.nonzero()[:, 0].tolist():
            aims[i, digits], place = soft[int(numbers[n]), place], place + 1
            if place == len(numbers[n]):
                n, place = n + 1, 0
        yield torch.cat((torch.tensor(ask), say)), aims


def train(model, processor, args, out):
    """The dense losses throughout, language from step --warm on. Images are computed once for all that is said of them.

    Category and colour are read off the tower's tokens by linear heads; at step --warm these rows become the embeddings of the words they
    stand for. The box is read half-way up the language model: the tower's positions are relative, where in the image a token lies is first
    known to layers that see <|vision_start|>."""
    split, width = scenes.SPLITS["pretrain"], model.config.hidden
    soft, points, embedding = digit_aims(), circles(width), model.model.embed_tokens.weight
    heads = nn.ModuleDict({"kind": nn.Linear(width, 4 * (1 + len(scenes.CATEGORIES))), "color": nn.Linear(width, 4 * len(scenes.COLORS)),
                           "box": nn.Linear(width, 16 * width)})
    halfway = []
    model.model.layers[len(model.model.layers) // 2 - 1].register_forward_hook(lambda layer, given, y: halfway.append(y))
    params = [*model.parameters(), *heads.parameters()]
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    rest = [p for p in params if not any(p is m for m in matrices)]
    optimizers = (torch.optim.Muon(matrices, lr=args.lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
                  torch.optim.AdamW(rest, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.01))
    kept, first = {"model": model, "heads": heads, "muon": optimizers[0], "adamw": optimizers[1]}, 0
    if args.resume:
        state = torch.load(out / "state.pt")
        first = state.pop("step")
        for name, part in state.items():
            kept[name].load_state_dict(part)
    runtime.cut_log(out / "metrics.jsonl", first)

    image = processor.turns("", PATCHES ** 2 // 4)
    image = torch.tensor(image[:image.index(processor.ids["<|vision_end|>"]) + 1])
    seen = (image == model.config.image_id).repeat(args.batch)

    def inputs(step):
        rng = random.Random(f"{args.seed} {step}")
        looked = [scenes.scene(split.first + rng.randrange(split.scenes), split) for _ in range(args.batch)]
        prompts = [Prompt(image, *processor.patches(s.draw())[:2], None) for s in looked]
        said = [list(talk(processor, questions(s, rng), soft, model.config.vocab)) if step >= args.warm else [] for s in looked]
        return prompts, said, [torch.cat(t) for t in zip(*(dense_targets(s) for s in looked))]
    with tqdm(range(first, args.steps), initial=first, total=args.steps, desc="pretrain") as bar:
        for step in bar:
            prompts, said, (kinds, colors, boxes) = inputs(step)
            x, where, lengths = model.pack(prompts)
            tokens = x[seen]
            told = [ids for group in said for ids, _ in group]
            lasting, start = [len(ids) - 1 for ids in told], int(where[:, :len(image)].max()) + 1
            if told:
                x = torch.cat((x, model.model.embed_tokens(torch.cat([ids[:-1] for ids in told]))))
                where = torch.cat((where, torch.cat([start + torch.arange(n) for n in lasting]).expand(3, -1)), 1)
            groups = zip(lengths, (sum(len(ids) - 1 for ids, _ in group) for group in said))
            halfway.clear()
            hidden = model.model(x, where, Plan(lengths + lasting, prefix=groups))

            there = kinds > 0
            half = model.model.norm(halfway[0][:len(seen)][seen])
            kind, color, box = (heads[k](y).unflatten(1, (4, -1)) for k, y in (("kind", tokens), ("color", tokens), ("box", half)))
            box = box[there].unflatten(-1, (4, width)) @ points.T                                     # (n, 4, numbers)
            loss = (F.cross_entropy(kind.flatten(0, 1), kinds.flatten()) + F.cross_entropy(kind[there], kinds[there])
                    + F.cross_entropy(color[there], colors[there]) + F.cross_entropy(box.flatten(0, 1), bump(boxes[there]).flatten(0, 1)))
            line = {"step": step + 1, "kind": (kind.argmax(-1) == kinds)[there].float().mean().item(),
                    "pixels_off": (box.argmax(-1) - boxes[there]).abs().mean().item()}
            if told:
                aims = [aim for group in said for _, aim in group]
                answer = torch.cat([torch.arange(n) >= n - len(aim) for n, aim in zip(lasting, aims)])
                language = F.cross_entropy(model.lm_head(hidden[len(seen):][answer]), torch.cat(aims))
                loss = loss + 2 * language
                line["language"] = language.item()
            loss.backward()
            line["grad_norm"] = nn.utils.clip_grad_norm_(params, 1.0).item()
            for opt in optimizers:
                for group in opt.param_groups:
                    group["lr"] = runtime.lr_at(step, args.steps, args.lr)
                opt.step()
                opt.zero_grad()
            if step + 1 == args.warm:
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
            if (step + 1) % args.every == 0:
                torch.save({"step": step + 1, **{name: part.state_dict() for name, part in kept.items()}}, out / "state.tmp")
                os.replace(out / "state.tmp", out / "state.pt")


def scores(model, processor, n=400):
    """What the base knows of val scenes: mean IoU and share of IoU above 0.5 of boxes asked for by name; share of objects whose colour and
    category it names when asked what is near their centre; how many of each were asked for."""
    asked = []                                                           # (scene, question, box or None, name)
    for i in range(n):
        s = scenes.scene(scenes.SPLITS["val"].first + i, scenes.SPLITS["val"])
        rng = random.Random(i)
        named, o = names(s), rng.choice(s.objects)
        asked += [(s, f"where is {name}?", p.box, None) for name, p in named and [rng.choice(named)]]
        asked.append((s, f"what is {around(o.box)}?", None, f"{cot.called(o)} "))
    hits, named = [], []
    for first in tqdm(range(0, len(asked), 100), desc="scores"):
        part, prompts = asked[first:first + 100], []
        for s, question, _, _ in part:
            pixels, grid, _ = processor.patches(s.draw())
            prompts.append(Prompt(torch.tensor(processor.turns(question, PATCHES ** 2 // 4)), pixels, grid, None))
        tokens, _, lengths = generate(model, prompts, 1, 32, 0.0, torch.zeros(len(part), dtype=torch.long))
        for (_, _, box, name), ids, length in zip(part, tokens, lengths):
            text = processor.decode(ids[0, :length[0]])
            said = re.findall(r"\d+", text)[-4:]
            if box is None:
                named.append(text.startswith(name))
            else:
                said = torch.tensor([float(v) for v in said] if len(said) == 4 else [math.nan] * 4)
                hits.append(reward.iou(said[None, None], torch.tensor(box)[None, None]).item())
    hits = np.array(hits)
    return {"pointing_mIoU": hits.mean(), "pointing_Pr50": (hits > 0.5).mean(), "pointed": len(hits),
            "named": float(np.mean(named)), "asked_for_name": len(named)}


CARD = """# toy/base: a small Qwen2.5-VL shape that knows the embedded world

Trained from nothing by `{command}` at commit {commit},
on scenes of the `pretrain` split of toy/scenes.py that draw themselves: {steps:,} steps of {batch} scenes. {parameters:,} parameters,
bfloat16, hub layout, its own tokenizer with single-digit numbers.

It names things, lists them, and gives their boxes and points. It has seen neither expressions that need reasoning nor the answer format,
nor snow, nor the pairs of category and colour that `scenes.unseen` keeps for the novel split.

On scenes of the val split, asked for things by a name that is theirs alone ({pointed}): mean IoU of the box {pointing_mIoU:.3f}, IoU above
0.5 for {pointing_Pr50:.3f}. Asked what is near an object's centre ({asked_for_name}): colour and category right for {named:.3f}.
"""


def main():
    parser = runtime.FlagParser("Trains the small base on the embedded world from nothing")
    add = parser.add_argument
    add("--out", default="ckpt/base", help="folder of the base")
    add("--resume", action="store_true", help="go on where --out was stopped")
    add("--steps", type=runtime.positive, default=14_000, help="steps")
    add("--warm", type=runtime.positive, default=100, help="the first of them, without language")
    add("--batch", type=runtime.positive, default=16, help="scenes a step")
    add("--lr", type=float, default=3e-3, help="peak learning rate")
    add("--seed", type=int, default=0, help="of weights and scenes")
    add("--every", type=runtime.positive, default=500, help="steps between states to resume from")
    args = parser.parse_args()
    out = Path(args.out)
    if (out / "model.safetensors").exists():
        runtime.fail(f"{out} already holds a model; remove it, or name another --out")
    if args.resume and not (out / "state.pt").exists():
        runtime.fail(f"no state.pt in {out} to resume from; begin without --resume")
    if not args.resume:
        shutil.rmtree(out, ignore_errors=True)
        write_shape(out, args.seed)
    processor = Processor.from_pretrained(out)
    model = fresh_model(out, args.seed)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(processor.tokenizer.get_vocab())} tokens")
    train(model, processor, args, out)
    model.save_pretrained(out)
    model = QwenVL.from_pretrained(out, torch.float32)                   # as it is stored
    card = {**scores(model, processor), "steps": args.steps, "batch": args.batch, "parameters": sum(p.numel() for p in model.parameters()),
            "command": " ".join(["python toy/pretrain.py", *sys.argv[1:]]), "commit": runtime.commit()}
    (out / "README.md").write_text(CARD.format(**card), encoding="utf-8")
    print(CARD.format(**card))
    (out / "state.pt").unlink(missing_ok=True)
    print(f"written: {out}")


if __name__ == "__main__":
    runtime.main(main)
