"""Trains the small base, with the architecture of Qwen2.5-VL, from scratch on the embedded world.

The repository cannot contain real weights; this base replaces them. In the end it knows what a
pretrained model would know about this world: the objects, their colors and positions, and the
words of place (left, above, nearest to, ...). It answers the request for one box in the answer
format if only one object has the name. Expressions that need reasoning (a choice by position, size
or relation) it has only met in questions for a point: never in the answer format, never with the
candidates listed.

There are two losses in one loop. The dense ones ask each image token for the object there, its
color and its box; without them the language model finds nothing to read. Language starts after
--warm steps: boxes and points of objects by name, by category, and the reverse.

    python toy/pretrain.py                   writes ckpt/base and a model card with its scores;
                                             hours on two CPU cores
    python toy/pretrain.py --resume          resumes
    python toy/pretrain.py --init toy/base --warm 0 --lr 1.5e-3 --out ckpt/longer
                                             trains a base further, with new moments and heads
"""
import argparse
import functools
import itertools
import json
import math
import os
import random
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import eval as evaluation  # noqa: E402
import reward  # noqa: E402
from cot import noun_phrase, point_text, writer  # noqa: E402
from data import load  # noqa: E402
from model import Config, QwenVL  # noqa: E402
from qwen.answer import PROMPT, Frame, write  # noqa: E402
from qwen.attention import Plan  # noqa: E402
from qwen.generate import generate  # noqa: E402
from qwen.hub import folder, read_token_ids  # noqa: E402
from qwen.processor import WORDS, Processor, Prompt  # noqa: E402
from readers.base import Record, Records  # noqa: E402
from report import metrics  # noqa: E402
from report.predictions import sampled_boxes, strict_boxes  # noqa: E402
from toy import scenes  # noqa: E402
from train.dist import fail  # noqa: E402
from train.flags import FlagParser, natural, positive  # noqa: E402
from train.run import append_line, commit, cut_log, launch  # noqa: E402

SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
    "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
)
VOCABULARY = 768
# Images of this world are not resized, so the model's frame is in their pixels.
FRAME = Frame((scenes.SIDE, scenes.SIDE), (scenes.SIDE, scenes.SIDE), "absolute")
PATCH = 8                      # pixels: small objects and crowded scenes need fine patches
PATCHES = scenes.SIDE // PATCH    # per image side


# ---------------------------------------------------------------- shape and tokenizer

# Heads are narrow and images small: with these sections of the rotary embedding, rows and columns
# rotate fast enough to be distinguished, while half of a head hardly rotates, so words can find
# objects by content at any distance.
TEXT_SHAPE = {
    "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 5,
    "num_attention_heads": 4, "num_key_value_heads": 4, "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0, "rope_scaling": {"type": "mrope", "mrope_section": [1, 2, 13]},
    "max_position_embeddings": 1024, "hidden_act": "silu",
}
VISION_SHAPE = {
    "depth": 4, "hidden_size": 128, "intermediate_size": 256, "num_heads": 4,
    "out_hidden_size": 128, "in_chans": 3, "patch_size": PATCH, "temporal_patch_size": 2,
    "spatial_merge_size": 2, "window_size": 64, "fullatt_block_indexes": [1, 3],
    "hidden_act": "silu", "tokens_per_second": 2,
}
PROCESSOR_CONFIG = {
    "processor_class": "Qwen2_5_VLProcessor", "image_processor_type": "Qwen2VLImageProcessor",
    "patch_size": PATCH, "temporal_patch_size": 2, "merge_size": 2, "min_pixels": 56 * 56,
    "max_pixels": 448 * 448, "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}


def write_shape(out: Path, seed: int) -> None:
    """Writes the base's tokenizer, processor and config.json, in hub layout."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(seed)
    tokenizer.save(str(out / "tokenizer.json"))
    ids = {token: tokenizer.token_to_id(token) for token in SPECIAL_TOKENS}
    configs = {
        "config": model_config(tokenizer, ids),
        "preprocessor_config": PROCESSOR_CONFIG,
        "tokenizer_config": tokenizer_config(ids),
    }
    for name, content in configs.items():
        text = json.dumps(content, indent=2) + "\n"
        (out / f"{name}.json").write_text(text, encoding="utf-8")


def train_tokenizer(seed: int) -> Tokenizer:
    """Byte-level BPE like Qwen's, with a vocabulary of this world's words."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(WORDS), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False)
    tokenizer.train_from_iterator(corpus(seed), trainer)
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS])
    return tokenizer


def model_config(tokenizer: Tokenizer, ids: dict[str, int]) -> dict[str, Any]:
    """config.json; the vocabulary is rounded up to a multiple of 64."""
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "torch_dtype": "bfloat16",
        **TEXT_SHAPE,
        "vocab_size": -(-tokenizer.get_vocab_size() // 64) * 64,
        "tie_word_embeddings": True,
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_token_id": ids["<|vision_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "vision_config": VISION_SHAPE,
    }


def tokenizer_config(ids: dict[str, int]) -> dict[str, Any]:
    added = {}
    for token, i in ids.items():
        added[str(i)] = {"content": token, "special": True, "normalized": False,
                         "lstrip": False, "rstrip": False, "single_word": False}
    return {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>", "added_tokens_decoder": added}


def corpus(seed: int) -> Iterator[str]:
    """Yields texts that train the tokenizer: prompts, reasoning, lists."""
    split = replace(scenes.SPLITS["pretrain"], scenes=1500)
    records = []
    for r in scenes.records(split):
        records.append(
            Record(str(r.number), r.scene, r.text, r.box, r.category, r.scene.size, r.kind))
    write_completion = writer(Records(records, {}))
    for i, record in enumerate(records):
        yield PROMPT.format(text=record.text)
        yield write_completion(record, FRAME)
        for pair in question_answer_pairs(record.image, random.Random(seed + i)):
            yield from pair
        yield "system\nYou are a helpful assistant.\nuser\nassistant\n"
        yield f"the leftmost so far, not. so it is the one near {point_text(record.box, FRAME)}."


def fresh_model(out: Path, seed: int) -> QwenVL:
    """Random weights; residual branches start small relative to the embeddings."""
    torch.manual_seed(seed)
    model = QwenVL(Config.from_json(out / "config.json"))
    # The outputs of these matrices are added to the residual stream.
    residual_outputs = ("o_proj.weight", "down_proj.weight", "attn.proj.weight")
    for name, p in model.named_parameters():
        if p.ndim > 1:
            scale = 0.2 if name.endswith(residual_outputs) else 1.0
            std = 0.05 if "embed_tokens" in name else scale * p[0].numel() ** -0.5
            nn.init.normal_(p, std=std)
        elif "bias" in name:
            nn.init.zeros_(p)
    model.set_vocabulary(read_token_ids(out))
    return model


# ---------------------------------------------------------------- questions and answers

# Text around a question: mostly none. With some, the base also follows longer requests.
REQUESTS = ("{}",) * 12 + (
    "look at the picture. {}",
    "{} be brief.",
    "this was taken from above.\n{}",
    "{}\nlook at the whole image first, then say what is asked, once and in the form that is "
    "asked for, like this.",
)
BOX_QUESTIONS = ("{}", "where is {}?", "locate {}.", "i look for {}.")
POINT_QUESTIONS = ("point to {}.", "about where is {}?")
# Axis of the center, and the sign for which the farther object has the larger coordinate.
COMPARISONS = {
    "farther left": (0, -1), "farther right": (0, 1), "farther up": (1, -1), "farther down": (1, 1),
}
# At most this many question and answer pairs of a scene.
MAX_LISTS = 3
MAX_OTHERS = 3
MAX_PLACES = 3
# Tokens of an answer in the format, enough for the reasoning of CoT-SFT.
MAX_NEW_TOKENS = 192

Pair = tuple[str, str]         # question, answer


def box_text(box: scenes.Box) -> str:
    """A box in whole pixels: "[x1, y1, x2, y2]"."""
    return "[" + ", ".join(str(round(v)) for v in box) + "]"


def near_text(box: scenes.Box) -> str:
    """A point near the center, as the reasoning writes it: "near (45, 60)"."""
    return f"near {point_text(box, FRAME)}"


def unique_names(scene: scenes.Scene) -> list[tuple[str, scenes.Object]]:
    """(name, object) if the name, a category with or without a color, fits only this object."""
    names = []
    for phrase, pool in scenes.noun_phrases(scene).items():
        if len(pool) == 1:
            names.append((f"the {phrase}", pool[0]))
    return names


def question_answer_pairs(scene: scenes.Scene, rng: random.Random) -> list[Pair]:
    """Some pairs: boxes or points of named objects, lists, and what is near a point."""
    others = [name_pair(name, o, rng) for name, o in unique_names(scene)]
    lists = list_pairs(scene, rng)
    from_left = sorted(scene.objects, key=lambda o: o.center[0])
    for o in rng.sample(from_left, min(2, len(from_left))):
        answer = f"{noun_phrase(o)} {box_text(o.box)}"
        others.append((f"what is {near_text(o.box)}?", answer))
    pairs = rng.sample(lists, min(MAX_LISTS, len(lists)))
    pairs += rng.sample(others, min(MAX_OTHERS, len(others)))
    pairs += place_pairs(scene, rng)
    pairs = [(rng.choice(REQUESTS).format(question), answer) for question, answer in pairs]
    return pairs + grounding_pairs(scene, rng)


def grounding_pairs(scene: scenes.Scene, rng: random.Random) -> list[Pair]:
    """The request of all stages for a named object, answered by a short thought and its box.

    Empty if no object of the scene has a name of its own.
    """
    names = unique_names(scene)
    if not names:
        return []
    name, o = rng.choice(names)
    think = f"{name}. {noun_phrase(o)} {near_text(o.box)}."
    return [(PROMPT.format(text=name), write(think, box_text(o.box)))]


def name_pair(name: str, o: scenes.Object, rng: random.Random) -> Pair:
    """A question for a named object, by box or point."""
    if rng.random() < 0.6:
        return rng.choice(BOX_QUESTIONS).format(name), f"{name} {box_text(o.box)}"
    return rng.choice(POINT_QUESTIONS).format(name), f"{name} {near_text(o.box)}"


def list_pairs(scene: scenes.Scene, rng: random.Random) -> list[Pair]:
    """Lists of the objects of each category, and of a color if several have it."""
    from_left = sorted(scene.objects, key=lambda o: o.center[0])
    pools = {}
    for o in from_left:
        pools[o.category] = [p for p in from_left if p.category == o.category]
    for o in from_left:
        same_color = [p for p in pools[o.category] if p.color == o.color]
        if len(same_color) > 1:
            pools[f"{o.color} {o.category}"] = same_color
    pairs = []
    for phrase, pool in pools.items():
        place_text = rng.choice((box_text, near_text))
        manner = "" if place_text is box_text else " by a point"
        answer = ", ".join(f"{noun_phrase(o)} {place_text(o.box)}" for o in pool)
        pairs.append((f"list every {phrase}{manner}.", answer))
    return pairs


def place_pairs(scene: scenes.Scene, rng: random.Random) -> list[Pair]:
    """The words of place: parts of the image, comparisons, relations, and points of expressions.

    No answer is in the answer format or lists candidates: reasoning is left to CoT-SFT.
    """
    names = unique_names(scene)
    pairs = []
    for name, o in rng.sample(names, min(2, len(names))):
        for region in scenes.REGIONS:
            if scenes.in_region(o, region, 0):
                pairs.append((f"in which part of the image is {name}?", f"at the {region}"))
    for _ in range(3 if len(names) > 1 else 0):
        (name, o), (other_name, other) = rng.sample(names, 2)
        if o is other:             # by category and with its color
            continue
        word = rng.choice((*COMPARISONS, "larger", "smaller"))
        if word in COMPARISONS:
            axis, sign = COMPARISONS[word]
            lead = sign * (o.center[axis] - other.center[axis])
            clear = abs(lead) > scenes.MARGIN
        else:
            lead = o.size - other.size if word == "larger" else other.size - o.size
            clear = scenes.sizes_distinct(o.size, other.size)
        if clear:
            answer = name if lead > 0 else other_name
            pairs.append((f"which is {word}, {name} or {other_name}?", answer))
        for relation in scenes.RELATIONS:
            if scenes.lies_on_side(o, other, relation, -scenes.MARGIN):
                pairs.append((f"how does {name} lie to {other_name}?", f"{relation} it"))
    asked = [e for e in scenes.expressions(scene, rng) if e.kind != "category"]
    for e in rng.sample(asked, min(3, len(asked))):
        question = rng.choice(POINT_QUESTIONS).format(e.text)
        pairs.append((question, f"{e.text} {near_text(e.target.box)}"))
    return rng.sample(pairs, min(MAX_PLACES, len(pairs)))


class Answer(NamedTuple):
    """A question and its answer for training."""

    ids: Tensor                # (L,) after the image, with the end of turn
    targets: Tensor            # (A, V) distributions for the last A ids, which are the answer's

    @property
    def inputs(self) -> int:
        """Number of tokens that the model reads: all but the last."""
        return len(self.ids) - 1


def encode_answers(
        processor: Processor, pairs: Sequence[Pair], digit_distributions: Tensor, vocab: int,
) -> Iterator[Answer]:
    """Yields the pairs as ids, with soft targets for the digits of numbers (`digit_targets`)."""
    digit_ids = processor.encode("0123456789")[:10]
    for question, answer in pairs:
        question_ids = processor.turns(question, 0)
        # The part after the image, which is computed once for all pairs of the scene.
        vision_end = question_ids.index(processor.ids["<|vision_end|>"])
        question_ids = question_ids[vision_end + 1:]
        answer_ids = processor.encode(answer)
        targets = F.one_hot(answer_ids, vocab).float()
        soft_targets = []
        for number in re.finditer(r"\d+", answer):
            digits = number[0]
            # The digit of "bbox_2d" is not a number.
            if answer[number.start() - 1] == "_":
                soft_targets.extend(F.one_hot(torch.tensor([int(d) for d in digits]), 10).float())
            else:
                soft_targets.extend(digit_distributions[int(digits)][:len(digits)])
        is_digit = torch.isin(answer_ids, digit_ids)
        for i, distribution in zip(is_digit.nonzero()[:, 0].tolist(), soft_targets):
            targets[i, digit_ids] = distribution
        yield Answer(torch.cat((torch.tensor(question_ids), answer_ids)), targets)


# ---------------------------------------------------------------- targets

class DenseTargets(NamedTuple):
    """Targets of the image tokens; each has four patches."""

    kinds: Tensor              # (tokens, 4) long: 1 + the category's index, 0 for no object
    colors: Tensor             # (tokens, 4) long
    boxes: Tensor              # (tokens, 4, 4) pixels


def dense_targets(scene: scenes.Scene) -> DenseTargets:
    """A patch's target is the object that covers its center, or has its own center in the patch."""
    cell = scenes.SIDE / PATCHES
    kinds = np.zeros((PATCHES, PATCHES), int)
    colors = np.zeros((PATCHES, PATCHES), int)
    boxes = np.zeros((PATCHES, PATCHES, 4), np.float32)
    centers = (np.arange(PATCHES) + 0.5) * cell
    for o in scene.objects:
        x1, y1, x2, y2 = o.box
        rows = (centers >= y1) & (centers <= y2)
        columns = (centers >= x1) & (centers <= x2)
        covered = rows[:, None] & columns
        # A small object may cover no patch's center.
        covered[int(o.center[1] // cell), int(o.center[0] // cell)] = True
        kinds[covered] = 1 + list(scenes.CATEGORIES).index(o.category)
        colors[covered] = list(scenes.COLORS).index(o.color)
        boxes[covered] = o.box
    return DenseTargets(by_token(kinds), by_token(colors), by_token(boxes))


def by_token(grid: np.ndarray) -> Tensor:
    """(rows, columns, ...) of patches -> (tokens, 4, ...): a token has 2 x 2 patches."""
    patches = torch.from_numpy(grid).unflatten(0, (-1, 2)).unflatten(2, (-1, 2))
    # (row, row in token, column, column in token) -> (row, column, row in token, column in token)
    patches = patches.transpose(1, 2)
    return patches.flatten(2, 3).flatten(0, 1)


def soft_numbers(numbers: Tensor) -> Tensor:
    """Numbers (...) -> distributions over 0 to 112, (..., 113).

    Each is a bump of one pixel around the number, because a near miss is better than a far one.
    """
    distance = torch.arange(scenes.SIDE + 1) - numbers[..., None]
    return (-distance ** 2 / 2).softmax(-1)


@functools.cache
def digit_targets() -> Tensor:
    """The bump around a number as distributions of its digits, (113, 3, 10).

    Probability of each digit at each place of a number, given the digits before.
    """
    targets = torch.zeros(scenes.SIDE + 1, 3, 10)
    bumps = soft_numbers(torch.arange(scenes.SIDE + 1))        # (113, 113)
    for number, place in itertools.product(range(scenes.SIDE + 1), range(3)):
        digits = str(number)
        if place >= len(digits):
            continue
        # Numbers further away have no weight.
        for other in range(max(0, number - 9), min(scenes.SIDE, number + 9) + 1):
            other_digits = str(other)
            if len(other_digits) > place and other_digits[:place] == digits[:place]:
                targets[number, place, int(other_digits[place])] += bumps[number, other]
    return targets / targets.sum(-1, keepdim=True).clamp(min=1e-9)


def number_embeddings(width: int) -> Tensor:
    """Numbers as points on circles of many periods, (113, width), of length 1.

    Near numbers have near points. Periods of 10 and 100 help with the digits.
    """
    periods = torch.logspace(math.log10(5), math.log10(240), width // 2 - 8)
    periods = torch.cat((periods, torch.tensor([10.0, 100.0] * 4)))
    angle = torch.arange(scenes.SIDE + 1)[:, None] * 2 * math.pi / periods
    return F.normalize(torch.cat((angle.cos(), angle.sin()), 1), dim=1)


# ---------------------------------------------------------------- one step

@dataclass
class SceneBatch:
    """The scenes of a step."""

    prompts: list[Prompt]              # images
    answers: list[list[Answer]]        # of each scene; empty during --warm
    targets: DenseTargets              # for all image tokens

    @property
    def all_answers(self) -> list[Answer]:
        return list(itertools.chain.from_iterable(self.answers))


def scene_batch(
        step: int, processor: Processor, vocab: int, args: argparse.Namespace) -> SceneBatch:
    """The scenes of a step, a pure function of the step and --seed."""
    split = scenes.SPLITS["pretrain"]
    rng = random.Random(f"{args.seed} {step}")
    seeds = [split.first_seed + rng.randrange(split.scenes) for _ in range(args.batch)]
    batch_scenes = [scenes.make_scene(seed, split) for seed in seeds]
    # The part that a scene's questions share: the turn up to the end of the image.
    ids = processor.turns("", PATCHES ** 2 // 4)
    image_ids = torch.tensor(ids[:ids.index(processor.ids["<|vision_end|>"]) + 1])
    prompts = []
    answers: list[list[Answer]] = []
    for scene in batch_scenes:
        pixels, grid, _ = processor.patches(scene.draw())
        prompts.append(Prompt(image_ids, pixels, grid, None))
        pairs = question_answer_pairs(scene, rng) if step >= args.warm else []
        answers.append(list(encode_answers(processor, pairs, digit_targets(), vocab)))
    per_scene = [dense_targets(scene) for scene in batch_scenes]
    targets = DenseTargets(*(torch.cat(parts) for parts in zip(*per_scene)))
    return SceneBatch(prompts, answers, targets)


class Readout(NamedTuple):
    """Hidden states of one pass over a batch."""

    tower: Tensor              # (tokens, D) image tokens after the vision tower
    halfway: Tensor            # (tokens, D) image tokens after half of the language model
    answers: Tensor            # (inputs, D) last hidden states of all answers' inputs


class Pretraining:
    """The model with the heads that only training needs.

    Linear heads predict category and color from the tower's tokens, and the box from the middle of
    the language model: the tower's positions are relative, so only layers that see
    <|vision_start|> know a token's position in the image.
    """

    def __init__(self, model: QwenVL, lr: float) -> None:
        width = model.config.hidden
        self.model = model
        self.heads = nn.ModuleDict({
            "kind": nn.Linear(width, 4 * (1 + len(scenes.CATEGORIES))),
            "color": nn.Linear(width, 4 * len(scenes.COLORS)),
            "box": nn.Linear(width, 16 * width),
        })
        self.number_points = number_embeddings(width)
        self.middle_outputs: list[Tensor] = []
        middle = model.model.layers[len(model.model.layers) // 2 - 1]
        middle.register_forward_hook(lambda layer, _, out: self.middle_outputs.append(out))
        self.parameters = [*model.parameters(), *self.heads.parameters()]
        self.muon, self.adamw = make_optimizers(model, self.parameters, lr)

    def parts(self) -> dict[str, Any]:
        """The parts of a state to resume from."""
        return {"model": self.model, "heads": self.heads, "muon": self.muon, "adamw": self.adamw}

    def read_out(self, batch: SceneBatch) -> Readout:
        """One pass: an image is computed once for all its answers."""
        model = self.model
        # (N, D), (3, N), Q lengths, Q positions after them
        x, positions, lengths, starts, deepstack = model.pack(batch.prompts)
        prompt_tokens = len(x)
        image_ids = torch.cat([prompt.input_ids for prompt in batch.prompts])
        is_image = image_ids == model.config.image_id              # (N,)
        tower = x[is_image]
        answers = batch.all_answers
        inputs = [answer.inputs for answer in answers]
        if answers:
            # All prompts have the same length, so all answers start at the same position.
            answer_positions = torch.cat([starts[0] + torch.arange(n) for n in inputs])
            positions = torch.cat((positions, answer_positions.expand(3, -1)), 1)
            input_ids = torch.cat([answer.ids[:-1] for answer in answers])
            x = torch.cat((x, model.model.embed_tokens(input_ids)))
        # Each answer sees its own scene's prompt, and no other answer.
        prefix = []
        for length, group in zip(lengths, batch.answers):
            prefix.append((length, sum(answer.inputs for answer in group)))
        # Filled again by the hook.
        self.middle_outputs.clear()
        plan = Plan(lengths + inputs, prefix=prefix)
        hidden = model.model(x, positions, plan, deepstack=deepstack)
        halfway = model.model.norm(self.middle_outputs[0][:prompt_tokens][is_image])
        return Readout(tower, halfway, hidden[prompt_tokens:])

    def dense_loss(
            self, readout: Readout, targets: DenseTargets) -> tuple[Tensor, dict[str, float]]:
        """Loss of the heads, and their accuracy on patches with an object."""
        kinds, colors, boxes = targets
        kind = self.heads["kind"](readout.tower).unflatten(1, (4, -1))     # (tokens, 4, kinds)
        color = self.heads["color"](readout.tower).unflatten(1, (4, -1))
        box = self.heads["box"](readout.halfway).unflatten(1, (4, -1))
        covered = kinds > 0                                                # (tokens, 4)
        width = self.number_points.shape[1]
        box = box[covered].unflatten(-1, (4, width)) @ self.number_points.T    # (n, 4, numbers)
        # Most patches show the ground: the second term gives objects the same weight.
        loss = (F.cross_entropy(kind.flatten(0, 1), kinds.flatten())
                + F.cross_entropy(kind[covered], kinds[covered])
                + F.cross_entropy(color[covered], colors[covered])
                + F.cross_entropy(box.flatten(0, 1), soft_numbers(boxes[covered]).flatten(0, 1)))
        right = (kind.argmax(-1) == kinds)[covered]
        return loss, {
            "kind": right.float().mean().item(),
            "pixels_off": (box.argmax(-1) - boxes[covered]).abs().mean().item(),
        }

    def language_loss(self, readout: Readout, answers: Sequence[Answer]) -> Tensor:
        """Cross-entropy of the answers' tokens, not of the questions'."""
        is_answer = torch.cat(
            [torch.arange(a.inputs) >= a.inputs - len(a.targets) for a in answers])
        logits = self.model.lm_head(readout.answers[is_answer])            # (A, V)
        return F.cross_entropy(logits, torch.cat([a.targets for a in answers]))

    def train_step(self, batch: SceneBatch, lr: float) -> dict[str, float]:
        """One update; returns its metrics."""
        readout = self.read_out(batch)
        loss, metrics = self.dense_loss(readout, batch.targets)
        if batch.all_answers:
            language = self.language_loss(readout, batch.all_answers)
            loss = loss + 2 * language
            metrics["language"] = language.item()
        loss.backward()
        metrics["grad_norm"] = nn.utils.clip_grad_norm_(self.parameters, 1.0).item()
        for opt in (self.muon, self.adamw):
            for group in opt.param_groups:
                group["lr"] = lr
            opt.step()
            opt.zero_grad()
        return metrics

    def name_words(self, processor: Processor) -> None:
        """Sets the embeddings of categories and colors to the heads' rows.

        Language then starts with words that already match the tower's tokens.
        """
        embedding = self.model.model.embed_tokens.weight
        width = embedding.shape[1]
        words_of_head = {"kind": [None, *scenes.CATEGORIES], "color": list(scenes.COLORS)}
        with torch.no_grad():
            for name, words in words_of_head.items():
                rows = self.heads[name].weight.unflatten(0, (4, -1)).mean(0)
                for word, row in zip(words, rows):
                    ids = processor.words(f" {word}") if word else []
                    if len(ids) == 1:
                        embedding[ids[0]] = 0.05 * width ** 0.5 * F.normalize(row, dim=0)
        # The moments belong to the old rows and would pull the new ones away.
        self.adamw.state.pop(embedding, None)


def make_optimizers(
        model: QwenVL, parameters: Sequence[nn.Parameter], lr: float,
) -> tuple[torch.optim.Muon, torch.optim.AdamW]:
    """Muon for the model's matrices, AdamW for embeddings, vectors and heads."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    matrix_ids = {id(p) for p in matrices}
    rest = [p for p in parameters if id(p) not in matrix_ids]
    muon = torch.optim.Muon(matrices, lr=lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.95), weight_decay=0.01)
    return muon, adamw


# ---------------------------------------------------------------- training

def train(model: QwenVL, processor: Processor, args: argparse.Namespace, out: Path) -> None:
    """Dense losses in all steps, language after --warm of them."""
    pretraining = Pretraining(model, args.lr)
    first = load_pretraining(out, pretraining) if args.resume else 0
    cut_log(out / "metrics.jsonl", first)
    steps = range(first, args.steps)
    with tqdm(steps, initial=first, total=args.steps, desc="pretrain") as bar:
        for step in bar:
            lr = lr_at(step, args.steps, args.lr)
            batch = scene_batch(step, processor, model.config.vocab, args)
            line = {"step": step + 1, **pretraining.train_step(batch, lr)}
            if step + 1 == args.warm:
                pretraining.name_words(processor)
            append_line(out / "metrics.jsonl", line)
            if step % 10 == 0:
                bar.set_postfix_str(
                    f"kind {line['kind']:.2f} box {line['pixels_off']:.1f} px "
                    f"text {line.get('language', math.nan):.3f}")
            if (step + 1) % args.every == 0:
                save_pretraining(out, pretraining, step + 1)


def lr_at(step: int, steps: int, peak: float) -> float:
    """Warm-up, constant, linear to 0 over the last quarter.

    Runs of different --steps are equal up to the decay, so --resume can end one early or late.
    """
    warmup_steps = max(1, min(240, round(0.03 * steps)))
    return peak * min(1.0, (step + 1) / warmup_steps, (steps - step) / (0.25 * steps))


def save_pretraining(out: Path, pretraining: Pretraining, step: int) -> None:
    """Writes state.pt atomically."""
    states = {name: part.state_dict() for name, part in pretraining.parts().items()}
    torch.save({"step": step, **states}, out / "state.tmp")
    os.replace(out / "state.tmp", out / "state.pt")


def load_pretraining(out: Path, pretraining: Pretraining) -> int:
    """Loads state.pt; returns its number of steps."""
    state = torch.load(out / "state.pt")
    for name, part in pretraining.parts().items():
        part.load_state_dict(state[name])
    return state["step"]


# ---------------------------------------------------------------- scores

@dataclass
class Question:
    """A question to the base, and the right answer: a box, or the start of a text."""

    scene: scenes.Scene
    text: str
    box: scenes.Box | None = None
    name: str = ""


def val_questions(n: int) -> list[Question]:
    """Two questions about each of n val scenes: a named object's box, and what is near a point."""
    questions = []
    split = scenes.SPLITS["val"]
    for i in range(n):
        scene = scenes.make_scene(split.first_seed + i, split)
        rng = random.Random(i)
        names = unique_names(scene)
        o = rng.choice(scene.objects)
        if names:
            name, named_object = rng.choice(names)
            questions.append(Question(scene, f"where is {name}?", box=named_object.box))
        questions.append(
            Question(scene, f"what is {near_text(o.box)}?", name=f"{noun_phrase(o)} "))
    return questions


def answer_questions(
        model: QwenVL, processor: Processor, questions: Sequence[Question]) -> list[str]:
    """The model's answers, greedy."""
    prompts = []
    for question in questions:
        pixels, grid, _ = processor.patches(question.scene.draw())
        ids = torch.tensor(processor.turns(question.text, int(grid.prod()) // 4))
        prompts.append(Prompt(ids, pixels, grid, None))
    seeds = torch.zeros(len(prompts), dtype=torch.long)
    tokens, _, lengths = generate(model, prompts, 1, 32, 0.0, seeds)       # (Q, 1, L), (Q, 1)
    return [processor.decode(ids[0, :n[0]]) for ids, n in zip(tokens, lengths)]


def answer_iou(answer: str, box: scenes.Box) -> float:
    """IoU of an answer's last four numbers, 0 if it has fewer."""
    numbers = [float(v) for v in re.findall(r"\d+", answer)[-4:]]
    if len(numbers) < 4:
        return 0.0
    return reward.iou(torch.tensor(numbers), torch.tensor(box)).item()


def scores(model: QwenVL, processor: Processor, n: int = 400) -> dict[str, float]:
    """What the base knows about n val scenes.

    pointing_mIoU, pointing_Pr50: of boxes of named objects. named: the share of objects for which
    it answers color and category when asked what is near their center. pointed, asked_for_name:
    the numbers of questions.
    """
    questions = val_questions(n)
    ious = []
    named = []
    for first in tqdm(range(0, len(questions), 100), desc="scores"):
        part = questions[first:first + 100]
        for question, answer in zip(part, answer_questions(model, processor, part)):
            if question.box is None:
                named.append(answer.startswith(question.name))
            else:
                ious.append(answer_iou(answer, question.box))
    iou = np.array(ious)
    return {"pointing_mIoU": iou.mean(), "pointing_Pr50": (iou > 0.5).mean(),
            "pointed": len(iou), "named": float(np.mean(named)), "asked_for_name": len(named)}


SAMPLES = 8                    # answers to a record, like a group of RFT


def zero_shot_scores(model: QwenVL, processor: Processor, n: int = 500) -> dict[str, Any]:
    """Scores of the base on n val records, with the prompt of the stages.

    zero_shot_mIoU, zero_shot_Pr50, no_box: of greedy answers. pass_8: the probability that the
    best of eight answers sampled at T=1 has IoU above 0.5. asked: the number of records. tables:
    Markdown, greedy IoU above 0.5 by kind of expression and by the scene's number of objects.
    """
    records = load("synth", None, "val")[:n]
    greedy = evaluation.evaluate(model, processor, records, max_new_tokens=MAX_NEW_TOKENS)
    row = evaluation.score_predictions(records, greedy)
    predictions = evaluation.evaluate(
        model, processor, records, temperature=1.0, samples=SAMPLES,
        max_new_tokens=MAX_NEW_TOKENS)
    boxes = sampled_boxes(records, predictions)               # (N, samples, 4)
    target, size = metrics.targets(records)
    sampled = metrics.sampled(boxes, target, size, inclusive=False)
    properties = {
        "kind": [record.kind for record in records],
        "objects in the scene": [f"{len(record.objects):2}" for record in records]}
    iou = metrics.overlaps(strict_boxes(records, greedy), target, size).iou
    tables = []
    for name, rows in metrics.breakdowns(properties, iou, inclusive=False).items():
        tables.append(f"| {name} | records | IoU above 0.5 |\n|---|---|---|\n" + "".join(
            f"| {value.strip()} | {row['n']} | {row['Pr@0.5']:.3f} |\n"
            for value, row in rows.items()))
    return {"zero_shot_mIoU": row["mIoU"], "zero_shot_Pr50": row["Pr@0.5"],
            "no_box": sum(row["failures"].values()) / len(records), "asked": len(records),
            "pass_8": sampled["pass"][str(SAMPLES)], "tables": "\n".join(tables)}


CARD = """# toy/base: a small Qwen2.5-VL shape that knows the embedded world

Trained {start}, by `{command}` at commit {commit},
on scenes of the `pretrain` split of toy/scenes.py that draw themselves: \
{steps:,} steps of {batch} scenes. {parameters:,} parameters,
bfloat16, hub layout, its own tokenizer with single-digit numbers.

It names objects, lists them, gives their boxes and points, and knows the words of place: which part
of the image, which of two is farther left, how one lies to the other, about where an expression's
object is. With the prompt of the stages it was only asked for objects with a unique name. \
What the `novel` split holds out of SFT and RFT, it has seen.

On scenes of the val split, asked for things by a name that is theirs alone ({pointed}): \
mean IoU of the box {pointing_mIoU:.3f}, IoU above
0.5 for {pointing_Pr50:.3f}. Asked what is near an object's centre ({asked_for_name}): \
colour and category right for {named:.3f}.

Asked as the stages ask, for the val split's expressions of all kinds ({asked}): \
greedy mean IoU {zero_shot_mIoU:.3f}, IoU above 0.5 for {zero_shot_Pr50:.3f},
no box in the format for {no_box:.3f}; \
the best of eight answers at T=1 has IoU above 0.5 for {pass_8:.3f}.

{tables}"""


def write_card(out: Path, args: argparse.Namespace) -> None:
    """Scores the stored base, and writes and prints its model card."""
    model = QwenVL.from_pretrained(out, torch.float32)
    processor = Processor.from_pretrained(out)
    start = f"on from {args.init} of that commit" if args.init else "from nothing"
    card = CARD.format(
        **scores(model, processor), **zero_shot_scores(model, processor), steps=args.steps,
        batch=args.batch, parameters=count_parameters(model), commit=commit(), start=start,
        command=" ".join(["python toy/pretrain.py", *sys.argv[1:]]))
    (out / "README.md").write_text(card, encoding="utf-8")
    print(card)


def count_parameters(model: QwenVL) -> int:
    return sum(p.numel() for p in model.parameters())


def flags() -> FlagParser:
    parser = FlagParser(description="Trains the small base on the embedded world from scratch")
    add = parser.add_argument
    add("--out", default="ckpt/base", help="folder of the base")
    add("--resume", action="store_true", help="resume the run in --out")
    add("--steps", type=positive, default=14_000, help="steps")
    add("--init", help="a base to train further; default: random weights and a new tokenizer")
    add("--warm", type=natural, default=100, help="first steps, which are without language")
    add("--batch", type=positive, default=16, help="scenes per step")
    add("--lr", type=float, default=3e-3, help="peak learning rate")
    add("--seed", type=int, default=0, help="of weights and scenes")
    add("--every", type=positive, default=500,
        help="steps between states to resume from")
    return parser


def main() -> None:
    args = flags().parse_args()
    out = Path(args.out)
    if (out / "model.safetensors").exists():
        fail(f"{out} already holds a model; remove it, or name another --out")
    if args.resume and not (out / "state.pt").exists():
        fail(f"no state.pt in {out} to resume from; leave out --resume")
    init = folder(args.init) if args.init else None
    if not args.resume:
        shutil.rmtree(out, ignore_errors=True)
        if init:
            shutil.copytree(
                init, out, ignore=shutil.ignore_patterns("*.safetensors", "README.md"))
        else:
            write_shape(out, args.seed)
    processor = Processor.from_pretrained(out)
    model = fresh_model(out, args.seed)
    if init:
        model.load_state_dict(QwenVL.from_pretrained(init, torch.float32).state_dict())
    tokens = len(processor.tokenizer.get_vocab())
    print(f"{count_parameters(model):,} parameters, {tokens} tokens")
    train(model, processor, args, out)
    model.save_pretrained(out)
    write_card(out, args)
    (out / "state.pt").unlink(missing_ok=True)
    print(f"written: {out}")


if __name__ == "__main__":
    launch(main)
