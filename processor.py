"""The checkpoint's side of the input: coordinate frames, chat prompt, tokenizer, image to patches.

One sample's way: `Processor(image, text)` resizes, cuts patches and writes the chat
prompt -> the model answers in its own frame -> `Frame.to_image`, called by
`answer.locate`, brings the box back. Rewards and metrics only ever see pixels of the
original image, and coordinates are converted nowhere but here.
"""
import hashlib
import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
)
from torch import Tensor

from answer import PROMPT, Box
from data import ASPECT, DataError, read_json
from images import rgb
from model import newest_step

SPECIAL = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
# A family's name, the convention of its coordinates, the system turn of its chat template (None:
# it has none). `prompt_hash` covers this table.
FAMILIES = {
    "Qwen2VLProcessor": ("qwen2_vl", "1000", "You are a helpful assistant."),
    "Qwen2_5_VLProcessor": ("qwen2_5_vl", "absolute", "You are a helpful assistant."),
    "Qwen3VLProcessor": ("qwen3_vl", "1000", None)}
TOKENIZER_FILES = (
    "tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json",
    "preprocessor_config.json", "chat_template.json", "chat_template.jinja",
    "special_tokens_map.json", "added_tokens.json", "processor_config.json",
    "generation_config.json")
# Qwen's pre-tokenizer: where a text is cut before merges apply.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+")


# ---------------------------------------------------------------- coordinates

@dataclass(frozen=True)
class Frame:
    """How a model's coordinates relate to an image.

    Qwen2.5-VL answers in pixels of the resized image ("absolute"), Qwen2-VL and Qwen3-VL in
    thousandths of its sides ("1000").
    """

    original: tuple[int, int]     # (width, height)
    resized: tuple[int, int]
    convention: str

    @property
    def extent(self) -> tuple[int, int]:
        """The coordinate of the right and of the lower edge in the model's frame."""
        return self.resized if self.convention == "absolute" else (1000, 1000)

    def to_model(self, box: Sequence[float]) -> Box:
        """Original pixels -> the model's coordinates, float."""
        return tuple(v * self.extent[i % 2] / self.original[i % 2] for i, v in enumerate(box))

    def to_image(self, box: Sequence[float]) -> Box:
        """The model's coordinates -> original pixels, float."""
        return tuple(v * self.original[i % 2] / self.extent[i % 2] for i, v in enumerate(box))


def to_model_frame(box: Sequence[float], frame: Frame) -> Box:
    """`Frame.to_model` as a function: original pixels -> the model's coordinates, float."""
    return frame.to_model(box)


def to_image_frame(box: Sequence[float], frame: Frame) -> Box:
    """`Frame.to_image` as a function: the model's coordinates -> original pixels, float."""
    return frame.to_image(box)


# ---------------------------------------------------------------- image to patches

def smart_resize(
        width: int, height: int, factor: int, min_pixels: int, max_pixels: int,
) -> tuple[int, int]:
    """The family's rule -> (width, height) of the resized image.

    Both sides are multiples of `factor`, the area lies between min_pixels and max_pixels, the
    aspect ratio is about kept. DataError for an image too long for the families.
    """
    if max(width, height) > ASPECT * min(width, height):
        raise DataError(
            f"an image of {width} x {height} is more than {ASPECT} times as long as wide; cut it "
            "before use")
    w = round(width / factor) * factor
    h = round(height / factor) * factor
    if w * h > max_pixels:
        shrink = math.sqrt(width * height / max_pixels)
        w = max(factor, math.floor(width / shrink / factor) * factor)
        h = max(factor, math.floor(height / shrink / factor) * factor)
    elif w * h < min_pixels:
        grow = math.sqrt(min_pixels / (width * height))
        w = math.ceil(width * grow / factor) * factor
        h = math.ceil(height * grow / factor) * factor
    return w, h


def cut_patches(pixels: np.ndarray, patch: int, merge: int) -> np.ndarray:
    """Pixels (H, W, C) -> patches (C, N, patch, patch) in the vision tower's order.

    N = H * W / patch^2.

    The tower joins merge x merge neighbours to one token, and expects them one after the other: so
    patches are numbered block by block, and row by row within a block. An image of 2 x 4 patches,
    of one pixel each:

    >>> pixels = np.array([[0, 1, 2, 3],
    ...                    [4, 5, 6, 7]])[..., None]
    >>> cut_patches(pixels, patch=1, merge=2).flatten().tolist()
    [0, 1, 4, 5, 2, 3, 6, 7]
    """
    height, width, channels = pixels.shape
    axes = pixels.reshape(
        height // patch // merge,    # 0: row of the block
        merge,                       # 1: row of the patch in its block
        patch,                       # 2: row of the pixel in its patch
        width // patch // merge,     # 3: column of the block
        merge,                       # 4: column of the patch in its block
        patch,                       # 5: column of the pixel in its patch
        channels)                    # 6: channel
    ordered = axes.transpose(
        6,                           # each channel by itself
        0, 3,                        # blocks, row by row
        1, 4,                        # the patches of a block, row by row
        2, 5)                        # the pixels of a patch, row by row
    return ordered.reshape(channels, -1, patch, patch)


# ---------------------------------------------------------------- the model's input

@dataclass(frozen=True)
class Pixels:
    """The patches of an image as bytes, in the vision tower's order.

    Between processes, and to the device, they travel so: an eighth of what the model's
    floats take, which hold each pixel of a still image once a frame.
    """

    values: Tensor                # (patches, channels, patch, patch) uint8
    table: Tensor                 # (channels, 256) float32: what each byte is normalised to
    frames: int                   # of the temporal patch; a still image fills all of them

    def __len__(self) -> int:
        return len(self.values)

    def normalised(
            self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """(patches, D) as the model takes them, made on the device; D = channels * frames *
        patch^2, 1,176 for Qwen2.5-VL."""
        values = self.values.to(device, non_blocking=True)
        table = self.table.to(device, dtype)
        # An index by bytes would be a mask.
        channels = [row[values[:, c].int()] for c, row in enumerate(table)]
        one_frame = torch.stack(channels, 1)[:, :, None]           # (patches, channels, 1, p, p)
        return one_frame.expand(-1, -1, self.frames, -1, -1).flatten(1)


@dataclass(frozen=True)
class Prompt:
    """One record as the model sees it."""

    input_ids: Tensor             # (T,) long
    pixels: Pixels
    image_grid_thw: Tensor        # (1, 3) long: time, height, width in patches
    frame: Frame

    @property
    def pixel_values(self) -> Tensor:
        """(patches, D) float32, as transformers' processor gives them."""
        return self.pixels.normalised()


def prompt_hash() -> str:
    """12 hex characters of all that is said to the model beside image and expression.

    The checkpoint carries it.
    """
    return hashlib.sha256(repr((PROMPT, FAMILIES)).encode()).hexdigest()[:12]


class Processor:
    """Image and expression -> Prompt, completion -> ids, ids -> text.

    For three families: Qwen2-VL, Qwen2.5-VL, Qwen3-VL.
    """

    def __init__(
            self, tokenizer: Tokenizer, image_config: dict[str, Any], family: str, source: Path,
    ) -> None:
        """family: a key of FAMILIES; source: the folder that tokenizer and image_config come from.

        KeyError where image_config lacks a value.
        """
        self.tokenizer = tokenizer
        self.source = source
        # The same without added tokens: in it "<|im_end|>" is letters.
        plain = json.loads(tokenizer.to_str()) | {"added_tokens": [], "post_processor": None}
        self.ordinary = Tokenizer.from_str(json.dumps(plain))
        self.family, self.convention, self.system = FAMILIES[family]
        self.ids = {t: tokenizer.token_to_id(t) for t in (*SPECIAL, "<|endoftext|>")}
        self.min_pixels = pixel_limit(image_config, "min_pixels", "shortest_edge") or 56 * 56
        self.max_pixels = (
            pixel_limit(image_config, "max_pixels", "longest_edge") or 28 * 28 * 1280)
        self.patch = image_config["patch_size"]
        self.temporal_patch = image_config["temporal_patch_size"]
        self.merge = image_config["merge_size"]
        self.mean = np.array(image_config["image_mean"], dtype=np.float32)
        self.std = np.array(image_config["image_std"], dtype=np.float32)

    @classmethod
    def from_pretrained(
            cls, path: str | Path, min_pixels: int | None = None, max_pixels: int | None = None,
    ) -> "Processor":
        """The processor of a checkpoint's folder, or of a stage's (its newest step).

        min_pixels, max_pixels: limits of the resized image instead of its own. DataError where
        files are missing or do not fit.
        """
        path = newest_step(path)
        image_config, family = read_image_config(path)
        if min_pixels:
            image_config["min_pixels"] = min_pixels
        if max_pixels:
            image_config["max_pixels"] = max_pixels
        try:
            processor = cls(read_tokenizer(path), image_config, family, path)
        except KeyError as error:
            raise DataError(
                f"{path / 'preprocessor_config.json'}: {error} is missing; copy the file again "
                "from the hub page") from None
        absent = [t for t in SPECIAL if processor.ids[t] is None]
        if absent:
            raise DataError(
                f"{path}: the tokenizer has no {', '.join(absent)}; is it that of a Qwen-VL "
                "model?")
        return processor

    @property
    def end_id(self) -> int:
        """End of the assistant's turn."""
        return self.ids["<|im_end|>"]

    def __call__(self, image: Image.Image, text: str) -> Prompt:
        """An image and an expression -> Prompt.

        Nothing is ever cut off; an expression is ordinary text, whatever it contains.
        """
        pixels, grid, resized = self.patches(image)
        image_tokens = int(grid.prod()) // self.merge ** 2
        ids = self.turns(PROMPT.format(text=text), image_tokens)
        frame = Frame(image.size, resized, self.convention)
        return Prompt(torch.tensor(ids), pixels, grid, frame)

    def turns(self, user: str, image_tokens: int) -> list[int]:
        """The family's chat prompt as ids.

        System turn, the user's image and text, the beginning of the answer.
        """
        start, end, vision_start, vision_end, image = (self.ids[t] for t in SPECIAL)
        ids = []
        if self.system is not None:
            ids += [start, *self.words(f"system\n{self.system}"), end, *self.words("\n")]
        ids += [start, *self.words("user\n")]
        ids += [vision_start, *[image] * image_tokens, vision_end]
        ids += [*self.words(user), end, *self.words("\n")]
        ids += [start, *self.words("assistant\n")]
        return ids

    def words(self, text: str) -> list[int]:
        """Ordinary text -> ids; no special token is recognised in it.

        A lone surrogate, which no encoding has, becomes "?".
        """
        text = text.encode("utf-8", "replace").decode()
        return self.ordinary.encode(text, add_special_tokens=False).ids

    def encode(self, completion: str) -> Tensor:
        """A completion's text -> (L,) long, the end of the turn included."""
        return torch.tensor([*self.words(completion), self.end_id])

    def decode(self, ids: Tensor | Sequence[int]) -> str:
        """Ids of a completion -> its text, without the stop token at its end."""
        ids = ids.tolist() if isinstance(ids, Tensor) else list(ids)
        if ids and ids[-1] in (self.end_id, self.ids["<|endoftext|>"]):
            ids = ids[:-1]
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    def patches(self, image: Image.Image) -> tuple[Pixels, Tensor, tuple[int, int]]:
        """An image -> its patches, image_grid_thw (1, 3), resized (width, height)."""
        width, height = smart_resize(
            *image.size, self.patch * self.merge, self.min_pixels, self.max_pixels)
        resized = rgb(image).resize((width, height), Image.Resampling.BICUBIC)
        patches = cut_patches(np.asarray(resized), self.patch, self.merge)     # (3, N, p, p)
        values = torch.from_numpy(np.ascontiguousarray(patches.swapaxes(0, 1)))
        # There are 256 values a channel at most: each is normalised once, then looked up.
        shades = np.arange(256, dtype=np.float32)[:, None]
        table = torch.from_numpy(((shades / 255 - self.mean) / self.std).T.copy())
        grid = torch.tensor([[1, height // self.patch, width // self.patch]])
        return Pixels(values, table, self.temporal_patch), grid, (width, height)

    def save_pretrained(self, path: str | Path) -> None:
        """Copies the tokenizer's and the processor's files, with the pixel limits in force."""
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        for name in TOKENIZER_FILES:
            if (self.source / name).exists():
                shutil.copyfile(self.source / name, path / name)
        config = read_json(self.source / "preprocessor_config.json")
        if config:
            config |= {"min_pixels": self.min_pixels, "max_pixels": self.max_pixels}
            text = json.dumps(config, indent=2) + "\n"
            (path / "preprocessor_config.json").write_text(text, encoding="utf-8")


# ---------------------------------------------------------------- a checkpoint's files

def pixel_limit(image_config: dict[str, Any], name: str, edge: str) -> int | None:
    """A limit of the resized image, in pixels, or None where the file gives none.

    Files of different age give it at the top, or in "size" under either name.
    """
    size = image_config.get("size", {})
    return image_config.get(name) or size.get(name) or size.get(edge)


def read_image_config(path: Path) -> tuple[dict[str, Any], str]:
    """A checkpoint's folder -> the image processor's settings, and a key of FAMILIES.

    They stand in preprocessor_config.json, or in processor_config.json as newer checkpoints have
    it; the family may be named in config.json alone. DataError where none says it.
    """
    whole = read_json(path / "processor_config.json") or {}
    image_config = read_json(path / "preprocessor_config.json") or whole.get("image_processor")
    if not image_config:
        raise DataError(
            f"no preprocessor_config.json at {path}; copy it there from the checkpoint's hub page")
    name = image_config.get("processor_class") or whole.get("processor_class")
    if name in FAMILIES:
        return dict(image_config), name
    model_type = (read_json(path / "config.json") or {}).get("model_type")
    for name, (family, _, _) in FAMILIES.items():
        if family == model_type:
            return dict(image_config), name
    raise DataError(
        f"{path}: neither preprocessor_config.json nor config.json names one of "
        f"{', '.join(FAMILIES)}")


def frame_by_coords(
        size: tuple[int, int], coords: str, processor: Processor | None) -> Frame:
    """The frame of numbers about an image of this size, by the name that --coords gives it.

    original: pixels of the image; resized: pixels of the image as the processor resizes it;
    1000: thousandths of its sides; fraction: parts of its sides.
    """
    resized = size
    if coords == "fraction":
        return Frame(size, (1, 1), "absolute")
    if coords == "resized":
        factor = processor.patch * processor.merge
        resized = smart_resize(*size, factor, processor.min_pixels, processor.max_pixels)
    return Frame(size, resized, "1000" if coords == "1000" else "absolute")


def read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a checkpoint's folder; DataError where there is none.

    From tokenizer.json, or from vocab.json and merges.txt with the added tokens of
    tokenizer_config.json.
    """
    if (path / "tokenizer.json").exists():
        try:
            return Tokenizer.from_file(str(path / "tokenizer.json"))
        except Exception as error:                   # the library raises nothing narrower
            raise DataError(f"{path / 'tokenizer.json'}: unreadable ({error})") from None
    vocab = read_json(path / "vocab.json")
    if vocab is None or not (path / "merges.txt").exists():
        raise DataError(
            f"no tokenizer at {path}: neither tokenizer.json nor vocab.json and merges.txt are "
            "there")
    lines = (path / "merges.txt").read_text(encoding="utf-8").split("\n")
    merges = [
        tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(WORDS), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    add_tokens(tokenizer, path / "tokenizer_config.json")
    return tokenizer


def add_tokens(tokenizer: Tokenizer, file: Path) -> None:
    """Adds what "added_tokens_decoder" lists; DataError where a token would get another id."""
    added = (read_json(file) or {}).get("added_tokens_decoder", {})
    for i, token in sorted(added.items(), key=lambda item: int(item[0])):
        tokenizer.add_tokens([AddedToken(**{"special": False} | token)])
        if tokenizer.token_to_id(token["content"]) != int(i):
            raise DataError(
                f"{file}: {token['content']} is to be {i}, but vocab.json leaves another id for "
                "it")
