"""The checkpoint's side of the input: coordinate frames, chat prompt, tokenizer, image to patches.

One sample's way: `Processor(image, text)` resizes, cuts patches and writes the chat
prompt -> the model answers in its own frame -> `Frame.to_image`, called by
`answer.locate`, brings the box back. Rewards and metrics only ever see pixels of the
original image, and coordinates are converted nowhere but here.
"""
import hashlib
import json
import math
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import Tensor

from qwen.answer import PROMPT, TAGS, Frame
from qwen.hub import (
    FAMILIES,
    CheckpointError,
    base_folder,
    newest_step,
    read_added_tokens,
    token_ids,
)
from readers.base import ASPECT, DataError, read_json
from readers.images import rgb

SPECIAL = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
# A family's name, the convention of its coordinates, the system turn of its chat template (None:
# it has none). `prompt_hash` covers this table.
CHAT_FORMATS = {
    "Qwen2VLProcessor": ("qwen2_vl", "1000", "You are a helpful assistant."),
    "Qwen2_5_VLProcessor": ("qwen2_5_vl", "absolute", "You are a helpful assistant."),
    "Qwen3VLProcessor": ("qwen3_vl", "1000", None)}
TOKENIZER_FILES = (
    "tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json",
    "preprocessor_config.json", "chat_template.json", "chat_template.jinja",
    "special_tokens_map.json", "added_tokens.json", "processor_config.json",
    "generation_config.json")
# Where the image processor's settings may stand, the first of them that has some.
IMAGE_FILES = ("processor_config.json", "preprocessor_config.json")
# What a checkpoint may say of an image's way to patches, and is done in any case; 3 is bicubic.
IMAGE_SETTINGS = {
    "do_resize": True, "do_rescale": True, "do_normalize": True, "do_convert_rgb": True,
    "do_center_crop": False, "resample": 3, "rescale_factor": 1 / 255}
# Qwen's pre-tokenizer: where a text is cut before merges apply.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+")


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
        channels, levels = table.shape
        # One lookup for all channels: channel c has its values at c * 256 and behind.
        first = torch.arange(channels, dtype=torch.int32, device=device) * levels
        places = values.int().add_(first[:, None, None]).flatten()
        one_frame = table.flatten().index_select(0, places).view(len(values), channels, 1, -1)
        return one_frame.expand(-1, -1, self.frames, -1).flatten(1)


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
    return hashlib.sha256(repr((PROMPT, CHAT_FORMATS)).encode()).hexdigest()[:12]


class Processor:
    """Image and expression -> Prompt, completion -> ids, ids -> text.

    For three families: Qwen2-VL, Qwen2.5-VL, Qwen3-VL.
    """

    def __init__(
            self, tokenizer: Tokenizer, image_config: dict[str, Any], family: str, source: Path,
    ) -> None:
        """family: a key of CHAT_FORMATS; source: the file that image_config stands in, beside the
        tokenizer's.

        KeyError, TypeError or ValueError where image_config lacks a value or has one that is
        not implemented.
        """
        self.tokenizer = tokenizer
        self.image_file = source
        self.source = source.parent
        # The same without added tokens: in it "<|im_end|>" is letters.
        plain = json.loads(tokenizer.to_str()) | {"added_tokens": [], "post_processor": None}
        self.ordinary = Tokenizer.from_str(json.dumps(plain))
        self.family, self.convention, self.system = CHAT_FORMATS[family]
        self.ids = {t: tokenizer.token_to_id(t) for t in (*SPECIAL, "<|endoftext|>")}
        # Tags of our answer format that are tokens: Qwen3-VL has <think> and </think>.
        added = {token.content: i for i, token in tokenizer.get_added_tokens_decoder().items()}
        self.tags = {tag: added[tag] for tag in TAGS if tag in added}
        refuse_image_settings(image_config)
        self.min_pixels, self.max_pixels = pixel_limits(image_config)
        self.patch = whole(image_config, "patch_size")
        self.temporal_patch = whole(image_config, "temporal_patch_size")
        self.merge = whole(image_config, "merge_size")
        self.mean = per_channel(image_config, "image_mean")
        self.std = per_channel(image_config, "image_std")

    @classmethod
    def from_pretrained(
            cls, path: str | Path, min_pixels: int | None = None, max_pixels: int | None = None,
    ) -> "Processor":
        """The processor of a checkpoint's folder, or of a stage's (its newest step).

        min_pixels, max_pixels: limits of the resized image instead of its own. DataError where
        files are missing or do not fit, or say other limits than run.json: a stage answers at
        the size that it was trained at.
        """
        path = newest_step(path)
        # An adapter from elsewhere lies alone: the files are beside its base.
        if not any((path / name).exists() for name in IMAGE_FILES):
            path = base_folder(path)
        file, image_config = read_image_config(path)
        if min_pixels:
            image_config["min_pixels"] = min_pixels
        if max_pixels:
            image_config["max_pixels"] = max_pixels
        tokenizer = read_tokenizer(path)
        try:
            processor = cls(tokenizer, image_config, read_family(path, image_config), file)
        except KeyError as error:
            raise DataError(
                f"{file}: {error} is missing; copy the file again from the hub page") from None
        except (TypeError, ValueError) as error:
            raise DataError(
                f"{file}: {error}; copy the file again from the hub page") from None
        if not min_pixels and not max_pixels:
            processor.refuse_other_limits()
        absent = [t for t in SPECIAL if processor.ids[t] is None]
        if absent:
            raise DataError(
                f"{path}: the tokenizer has no {', '.join(absent)}; is it that of a Qwen-VL "
                "model?")
        return processor

    def refuse_other_limits(self) -> None:
        """DataError where the run that wrote this checkpoint had other pixel limits."""
        trained = read_object(self.source / "run.json").get("pixels")
        limits = [self.min_pixels, self.max_pixels]
        if trained not in (None, limits):
            raise DataError(
                f"{self.image_file} resizes images to {limits[0]} to {limits[1]} pixels, but "
                f"run.json says that the checkpoint was trained with {trained}; set them in the "
                "file to what it was trained with")

    def check_fits(self, config: Any) -> None:
        """CheckpointError that names the files unless this processor belongs to a model of this
        model.Config: same family, same patches, same ids."""
        # Another family reads coordinates in another convention, and no later check would notice.
        if FAMILIES[self.family] != config.family:
            raise CheckpointError(
                f"{self.image_file}: the processor is that of {FAMILIES[self.family]}, but "
                f"config.json is that of {config.family}; take both files from one checkpoint")
        for name, ours, theirs in (
                ("patch_size", self.patch, config.vision.patch),
                ("merge_size", self.merge, config.vision.merge),
                ("temporal_patch_size", self.temporal_patch, config.vision.temporal_patch)):
            if ours != theirs:
                raise CheckpointError(
                    f"{self.image_file}: {name} is {ours}, but config.json asks for {theirs}; "
                    "take both files from one checkpoint")
        image_id = self.ids["<|image_pad|>"]
        last_id = max(self.tokenizer.get_vocab().values())
        if image_id != config.image_id or last_id >= config.vocab:
            raise CheckpointError(
                f"{self.source}: the tokenizer is another model's: its <|image_pad|> is {image_id}, "
                f"its last id {last_id}, but config.json says {config.image_id} and "
                f"{config.vocab} ids; take both from one checkpoint")

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
        ids = self.turns(PROMPT, image_tokens, text=text)
        frame = Frame(image.size, resized, self.convention)
        return Prompt(torch.tensor(ids), pixels, grid, frame)

    def turns(self, user: str, image_tokens: int, **blanks: str) -> list[int]:
        """The family's chat prompt as ids.

        System turn, the user's image and text, the beginning of the answer. With blanks,
        `user` is a template of ours that they fill in.
        """
        asked = self.tagged(user, **blanks) if blanks else self.words(user)
        start, end, vision_start, vision_end, image = (self.ids[t] for t in SPECIAL)
        ids = []
        if self.system is not None:
            ids += [start, *self.words(f"system\n{self.system}"), end, *self.words("\n")]
        ids += [start, *self.words("user\n")]
        ids += [vision_start, *[image] * image_tokens, vision_end]
        ids += [*asked, end, *self.words("\n")]
        ids += [start, *self.words("assistant\n")]
        return ids

    def words(self, text: str) -> list[int]:
        """Ordinary text -> ids; no special token is recognised in it.

        A lone surrogate, which no encoding has, becomes "?".
        """
        text = text.encode("utf-8", "replace").decode()
        return self.ordinary.encode(text, add_special_tokens=False).ids

    def tagged(self, ours: str, **blanks: str) -> list[int]:
        """A text of ours -> ids: as `words`, but for the tags that are tokens.

        blanks: what fills it in, where it is a template; that is ordinary text.
        """
        parts = re.split(f"({'|'.join(self.tags)})", ours) if self.tags else [ours]
        ids = []
        for part in parts:
            if part in self.tags:
                ids.append(self.tags[part])
            else:
                ids += self.words(part.format(**blanks) if blanks else part)
        return ids

    def encode(self, completion: str) -> Tensor:
        """A completion's text -> (L,) long, the end of the turn included."""
        return torch.tensor([*self.tagged(completion), self.end_id])

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
        # Readers of another age than ours look into the other file, or for the other names.
        limits = {"min_pixels": self.min_pixels, "max_pixels": self.max_pixels}
        edges = {"shortest_edge": self.min_pixels, "longest_edge": self.max_pixels}
        for name in IMAGE_FILES:
            content = read_object(self.source / name)
            image_config = image_part(name, content)
            if image_config:
                image_config |= limits
                if image_config.get("size"):
                    image_config["size"] = edges
                text = json.dumps(content, indent=2) + "\n"
                (path / name).write_text(text, encoding="utf-8")


# ---------------------------------------------------------------- a checkpoint's files

def read_object(file: Path) -> dict[str, Any]:
    """A JSON file's object, {} where there is no such file; DataError where it is none."""
    content = read_json(file)
    if content is not None and not isinstance(content, dict):
        raise DataError(f"{file}: not a JSON object; copy the file again from the hub page")
    return content or {}


def image_part(name: str, content: dict[str, Any]) -> Any:
    """Of one of IMAGE_FILES, what is about images: None where it has nothing on them."""
    return content.get("image_processor") if name == "processor_config.json" else content or None


def read_image_config(path: Path) -> tuple[Path, dict[str, Any]]:
    """A checkpoint's folder -> the file with the image processor's settings, and those.

    They stand in processor_config.json, as newer checkpoints have it, else in
    preprocessor_config.json; with both files, transformers reads the first. DataError
    where neither has them.
    """
    for name in IMAGE_FILES:
        image_config = image_part(name, read_object(path / name))
        if isinstance(image_config, dict):
            return path / name, dict(image_config)
        if image_config is not None:
            raise DataError(
                f"{path / name}: image_processor is no JSON object; copy the file again from the "
                "hub page")
    raise DataError(
        f"no preprocessor_config.json at {path}; copy it there from the checkpoint's hub page")


def read_family(path: Path, image_config: dict[str, Any]) -> str:
    """The key of CHAT_FORMATS that a processor file names, or else config.json; DataError without."""
    whole_config = read_object(path / "processor_config.json")
    for name in (image_config.get("processor_class"), whole_config.get("processor_class")):
        if isinstance(name, str) and name in CHAT_FORMATS:
            return name
    model_type = read_object(base_folder(path) / "config.json").get("model_type")
    for name, (family, _, _) in CHAT_FORMATS.items():
        if family == model_type:
            return name
    raise DataError(
        f"{path}: neither preprocessor_config.json nor config.json names one of "
        f"{', '.join(CHAT_FORMATS)}")


def pixel_limits(image_config: dict[str, Any]) -> tuple[int, int]:
    """Least and largest area of the resized image, in pixels; ValueError where they are no such.

    transformers' precedence: min_pixels and max_pixels win over "size", whose edges are
    areas as well. Files between the two have min_pixels and max_pixels in "size".
    """
    size = image_config.get("size") or {}
    if not isinstance(size, dict):
        raise ValueError(f"size is {size!r}, not shortest_edge and longest_edge")
    limits = []
    for name, edge, default in (
            ("min_pixels", "shortest_edge", 56 * 56),
            ("max_pixels", "longest_edge", 28 * 28 * 1280)):
        given = [image_config.get(name), size.get(edge), size.get(name)]
        known = [limit for limit in given if limit is not None]
        if size and not known:
            raise ValueError(f"size has no {edge}")
        limits.append(whole({name: known[0] if known else default}, name))
    return limits[0], limits[1]


def refuse_image_settings(image_config: dict[str, Any]) -> None:
    """ValueError for a setting that makes other pixels than `Processor.patches` does."""
    for name, ours in IMAGE_SETTINGS.items():
        value = image_config.get(name)
        if value is not None and (
                not isinstance(value, (int, float)) or not abs(value - ours) < 1e-6):
            raise ValueError(f"{name} is {value!r}, but this code computes {ours} alone")


def whole(image_config: dict[str, Any], name: str) -> int:
    """A whole number above 0; ValueError where it is none, KeyError where it is missing."""
    value = image_config[name]
    if type(value) is not int or not 0 < value < 2 ** 31:
        raise ValueError(f"{name} is {value!r}, not a whole number above 0")
    return value


def per_channel(image_config: dict[str, Any], name: str) -> np.ndarray:
    """Three numbers as (3,) float32, of which none is 0 in image_std; ValueError for others."""
    values = image_config[name]
    numbers = isinstance(values, list) and all(type(v) in (int, float) for v in values)
    if not numbers or len(values) != 3 or not all(abs(v) < 1e6 for v in values):
        raise ValueError(f"{name} is {values!r}, not three numbers")
    if name == "image_std" and min(values) < 1e-6:
        raise ValueError(f"{name} is {values!r}, not three numbers above 0")
    return np.array(values, dtype=np.float32)


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
    tokenizer_config.json or added_tokens.json. The same text has the same ids every
    time, and all of them: tokenizer.json can hold how some earlier program cut, padded
    or (BPE dropout) scattered its texts, and the library would go on doing it.
    """
    try:
        if (path / "tokenizer.json").exists():
            tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
        else:
            tokenizer = build_tokenizer(path)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.model.dropout = None
        return tokenizer
    except (DataError, CheckpointError):
        raise
    except Exception as error:                       # the library raises nothing narrower
        told = " ".join(str(error).split())          # some of its messages have several lines
        raise DataError(f"{path}: the tokenizer is unreadable ({told})") from None


def build_tokenizer(path: Path) -> Tokenizer:
    """Qwen's tokenizer from vocab.json, merges.txt and the tokens added to them."""
    vocab = token_ids(read_object(path / "vocab.json"))
    if not vocab or not (path / "merges.txt").exists():
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
    for i, token in sorted(read_added_tokens(path).items()):
        tokenizer.add_tokens([AddedToken(**{"special": False} | token)])
        if tokenizer.token_to_id(token["content"]) != i:
            raise DataError(
                f"{path}: {token['content']} is to be {i}, but vocab.json leaves another id for "
                "it")
    return tokenizer
