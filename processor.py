"""The checkpoint's side of the input: coordinate frames, chat prompt, tokenizer, image to patches.

One sample's way: `Processor(image, text)` resizes, cuts patches and writes the chat prompt -> the model answers in its own frame ->
`to_image_frame` brings the box back. Rewards and metrics only ever see pixels of the original image, and coordinates are converted nowhere
but here.
"""
import hashlib
import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from answer import PROMPT
from data import ASPECT, DataError, read_json, rgb
from model import newest_step

SPECIAL = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
# family: convention of its coordinates, system turn of its chat template (None: it has none)
FAMILIES = {"Qwen2VLProcessor": ("qwen2_vl", "1000", "You are a helpful assistant."),
            "Qwen2_5_VLProcessor": ("qwen2_5_vl", "absolute", "You are a helpful assistant."),
            "Qwen3VLProcessor": ("qwen3_vl", "1000", None)}
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json", "preprocessor_config.json", "chat_template.json",
                   "chat_template.jinja", "special_tokens_map.json", "added_tokens.json", "processor_config.json", "generation_config.json")
WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")


# ------------------------------------------------------------------------------------------------------------------ coordinates

@dataclass(frozen=True)
class Frame:
    """How a model's coordinates relate to an image. Qwen2.5-VL answers in pixels of the resized image ("absolute"), Qwen2-VL and Qwen3-VL
    in thousandths of its sides ("1000")."""
    original: tuple               # (width, height)
    resized: tuple
    convention: str

    @property
    def extent(self):
        """The coordinate of the right and of the lower edge in the model's frame."""
        return self.resized if self.convention == "absolute" else (1000, 1000)

    def to_model(self, box):
        """Original pixels -> the model's coordinates, float."""
        return tuple(v * self.extent[i % 2] / self.original[i % 2] for i, v in enumerate(box))

    def to_image(self, box):
        """The model's coordinates -> original pixels, float."""
        return tuple(v * self.original[i % 2] / self.extent[i % 2] for i, v in enumerate(box))


def to_model_frame(box, frame):
    """Original pixels -> the model's coordinates, float."""
    return frame.to_model(box)


def to_image_frame(box, frame):
    """The model's coordinates -> original pixels, float."""
    return frame.to_image(box)


# ------------------------------------------------------------------------------------------------------------------ the model's input

@dataclass(frozen=True)
class Prompt:
    """One record as the model sees it."""
    input_ids: torch.Tensor       # (T,) long
    pixel_values: torch.Tensor    # (patches, D) float32, in the vision tower's order
    image_grid_thw: torch.Tensor  # (1, 3) long: time, height, width in patches
    frame: Frame


def prompt_hash():
    """12 hex characters of everything that is said to the model beside image and expression; the checkpoint carries it."""
    return hashlib.sha256(repr((PROMPT, FAMILIES)).encode()).hexdigest()[:12]


def smart_resize(width, height, factor, min_pixels, max_pixels):
    """The family's rule: both sides multiples of `factor`, the area between min_pixels and max_pixels, the aspect ratio about kept."""
    if max(width, height) > ASPECT * min(width, height):
        raise DataError(f"an image of {width} x {height} is more than {ASPECT} times as long as wide; cut it before use")
    w, h = round(width / factor) * factor, round(height / factor) * factor
    if w * h > max_pixels:
        shrink = math.sqrt(width * height / max_pixels)
        w, h = (max(factor, math.floor(v / shrink / factor) * factor) for v in (width, height))
    elif w * h < min_pixels:
        grow = math.sqrt(min_pixels / (width * height))
        w, h = (math.ceil(v * grow / factor) * factor for v in (width, height))
    return w, h


class Processor:
    """Image and expression -> Prompt, completion -> ids, ids -> text, for the three families (Qwen2-VL, Qwen2.5-VL, Qwen3-VL)."""

    def __init__(self, tokenizer, image, family, source):
        self.tokenizer, self.source = tokenizer, source
        bare = json.loads(tokenizer.to_str())                            # the same without added tokens: in it "<|im_end|>" is letters
        self.ordinary = Tokenizer.from_str(json.dumps({**bare, "added_tokens": [], "post_processor": None}))
        self.family, self.convention, self.system = FAMILIES[family]
        self.ids = {t: tokenizer.token_to_id(t) for t in (*SPECIAL, "<|endoftext|>")}
        size = image.get("size", {})
        self.min_pixels = image.get("min_pixels") or size.get("min_pixels") or size.get("shortest_edge") or 56 * 56
        self.max_pixels = image.get("max_pixels") or size.get("max_pixels") or size.get("longest_edge") or 28 * 28 * 1280
        self.patch, self.temporal_patch, self.merge = image["patch_size"], image["temporal_patch_size"], image["merge_size"]
        self.mean, self.std = (np.array(image[name], dtype=np.float32) for name in ("image_mean", "image_std"))

    @classmethod
    def from_pretrained(cls, path, min_pixels=None, max_pixels=None):
        """A checkpoint's folder, or a stage's (its newest step). min_pixels, max_pixels: limits of the resized image instead of its own."""
        path = newest_step(path)
        image, whole = read_json(path / "preprocessor_config.json"), read_json(path / "processor_config.json")
        image = image or (whole or {}).get("image_processor")
        if not image:
            raise DataError(f"no preprocessor_config.json at {path}; copy it there from the checkpoint's hub page")
        name = image.get("processor_class") or (whole or {}).get("processor_class")
        if name not in FAMILIES:
            kind = (read_json(path / "config.json") or {}).get("model_type")
            name = next((n for n, (family, *_) in FAMILIES.items() if family == kind), None)
        if name is None:
            raise DataError(f"{path}: neither preprocessor_config.json nor config.json names one of {', '.join(FAMILIES)}")
        image = {**image, **{k: v for k, v in (("min_pixels", min_pixels), ("max_pixels", max_pixels)) if v}}
        try:
            processor = cls(read_tokenizer(path), image, name, path)
        except KeyError as error:
            raise DataError(f"{path / 'preprocessor_config.json'}: {error} is missing; copy the file again from the hub page") from None
        absent = [t for t in SPECIAL if processor.ids[t] is None]
        if absent:
            raise DataError(f"{path}: the tokenizer has no {', '.join(absent)}; is it that of a Qwen-VL model?")
        return processor

    @property
    def end_id(self):
        """End of the assistant's turn."""
        return self.ids["<|im_end|>"]

    def __call__(self, image, text):
        """PIL image, expression -> Prompt. Nothing is ever cut off; an expression is ordinary text, whatever it contains."""
        pixels, grid, resized = self.patches(image)
        ids = self.turns(PROMPT.format(text=text), int(grid.prod()) // self.merge ** 2)
        return Prompt(torch.tensor(ids), pixels, grid, Frame(image.size, resized, self.convention))

    def turns(self, user, image_tokens):
        """The family's chat prompt as ids: system turn, the user's image and text, the beginning of the answer."""
        start, end, vision_start, vision_end, image = (self.ids[t] for t in SPECIAL)
        system = [] if self.system is None else [start, *self.words(f"system\n{self.system}"), end, *self.words("\n")]
        user = [start, *self.words("user\n"), vision_start, *[image] * image_tokens, vision_end, *self.words(user), end, *self.words("\n")]
        return [*system, *user, start, *self.words("assistant\n")]

    def words(self, text):
        """Ordinary text -> ids; no special token is recognised in it. A lone surrogate, which no encoding has, becomes "?"."""
        return self.ordinary.encode(text.encode("utf-8", "replace").decode(), add_special_tokens=False).ids

    def encode(self, completion):
        """A completion's text -> (L,) long, the end of the turn included."""
        return torch.tensor([*self.words(completion), self.end_id])

    def decode(self, ids):
        """Ids of a completion -> its text, without the stop token at its end."""
        ids = [int(i) for i in ids]
        if ids and ids[-1] in (self.end_id, self.ids["<|endoftext|>"]):
            ids = ids[:-1]
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    def patches(self, image):
        """PIL image -> pixel_values (patches, channels * temporal * patch * patch), image_grid_thw (1, 3), resized (width, height).

        Patches come merge x merge at a time, as the tower joins them; a still image fills both frames of the temporal patch."""
        p, m = self.patch, self.merge
        w, h = smart_resize(*image.size, p * m, self.min_pixels, self.max_pixels)
        x = np.asarray(rgb(image).resize((w, h), Image.Resampling.BICUBIC)).reshape(h // p // m, m, p, w // p // m, m, p, 3)
        x = x.transpose(6, 0, 3, 1, 4, 2, 5).reshape(3, -1, 1, p, p)     # channel; block row, block column, patch in block; pixel
        shades = (np.arange(256, dtype=np.float32)[:, None] / 255 - self.mean) / self.std             # (256, 3): all values there are
        out = np.empty((x.shape[1], 3, self.temporal_patch, p, p), np.float32)
        for channel in range(3):
            out[:, channel] = shades[:, channel][x[channel]]
        return torch.from_numpy(out.reshape(len(out), -1)), torch.tensor([[1, h // p, w // p]]), (w, h)

    def save_pretrained(self, path):
        """Copies the tokenizer's and the processor's files, with the pixel limits in force."""
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        for name in TOKENIZER_FILES:
            if (self.source / name).exists():
                shutil.copyfile(self.source / name, path / name)
        config = read_json(self.source / "preprocessor_config.json")
        if config:
            config |= {"min_pixels": self.min_pixels, "max_pixels": self.max_pixels}
            (path / "preprocessor_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def read_tokenizer(path):
    """tokenizer.json, or vocab.json + merges.txt with the added tokens of tokenizer_config.json -> tokenizers.Tokenizer."""
    if (path / "tokenizer.json").exists():
        try:
            return Tokenizer.from_file(str(path / "tokenizer.json"))
        except Exception as error:                                       # the library raises nothing narrower
            raise DataError(f"{path / 'tokenizer.json'}: unreadable ({error})") from None
    vocab = read_json(path / "vocab.json")
    if vocab is None or not (path / "merges.txt").exists():
        raise DataError(f"no tokenizer at {path}: neither tokenizer.json nor vocab.json and merges.txt are there")
    lines = (path / "merges.txt").read_text(encoding="utf-8").split("\n")
    merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(WORDS), "isolated"),
                                                       pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    added = (read_json(path / "tokenizer_config.json") or {}).get("added_tokens_decoder", {})
    for i, token in sorted(added.items(), key=lambda item: int(item[0])):
        tokenizer.add_tokens([AddedToken(**{k: v for k, v in token.items() if k != "special"}, special=token.get("special", False))])
        if tokenizer.token_to_id(token["content"]) != int(i):
            raise DataError(f"{path / 'tokenizer_config.json'}: {token['content']} is to be {i}, but vocab.json leaves another id for it")
    return tokenizer
