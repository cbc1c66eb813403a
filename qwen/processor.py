"""From image and expression to the model's input: resizing, patches, chat prompt, tokens."""
import hashlib
import json
import math
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import Tensor

from qwen.answer import PROMPT, TAGS, THINK, Frame
from qwen.hub import FAMILIES, CheckpointError, base_folder, newest_step, read_added_tokens
from readers.base import ASPECT, DataError, read_json, read_text
from readers.images import rgb

SPECIAL = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
# model_type, convention of coordinates (as in Frame), system turn (None without one).
CHAT_FORMATS = {
    "Qwen2VLProcessor": ("qwen2_vl", "1000", "You are a helpful assistant."),
    "Qwen2_5_VLProcessor": ("qwen2_5_vl", "absolute", "You are a helpful assistant."),
    "Qwen3VLProcessor": ("qwen3_vl", "1000", None)}
# Newer checkpoints have the image settings in the first file, under "image_processor". If both
# files exist, transformers reads the first.
IMAGE_FILES = ("processor_config.json", "preprocessor_config.json")
TOKENIZER_FILES = (
    *IMAGE_FILES, "tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json",
    "added_tokens.json", "special_tokens_map.json", "chat_template.json", "chat_template.jinja",
    "generation_config.json", "video_preprocessor_config.json")
# The only values that this code supports; 3 is bicubic.
IMAGE_SETTINGS = {
    "do_resize": True, "do_rescale": True, "do_normalize": True, "do_convert_rgb": True,
    "do_center_crop": False, "resample": 3, "rescale_factor": 1 / 255}
COPY_AGAIN = "copy the file again from the hub page"
# Qwen's pre-tokenizer cuts a text into these pieces before merges apply.
WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
         r"|\s*[\r\n]+|\s+(?!\S)|\s+")


def smart_resize(
        width: int, height: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """-> (width, height), multiples of `factor`: nearly the same aspect ratio, and an area between
    the limits. DataError if one side is too long for the other."""
    if max(width, height) > ASPECT * min(width, height):
        raise DataError(f"an image of {width} x {height} is over {ASPECT} times as long as wide; "
                        "cut it")
    w, h = round(width / factor) * factor, round(height / factor) * factor
    if w * h > max_pixels:
        shrink = math.sqrt(width * height / max_pixels)
        w, h = (max(factor, math.floor(v / shrink / factor) * factor) for v in (width, height))
    elif w * h < min_pixels:
        grow = math.sqrt(min_pixels / (width * height))
        w, h = (math.ceil(v * grow / factor) * factor for v in (width, height))
    return w, h


def cut_patches(pixels: np.ndarray, patch: int, merge: int) -> np.ndarray:
    """Pixels (H, W, C) -> patches (N, C, patch, patch), block by block, because the vision tower
    merges merge x merge neighbours into one token. An image of 2 x 4 patches of one pixel:

    >>> pixels = np.array([[0, 1, 2, 3],
    ...                    [4, 5, 6, 7]])[..., None]
    >>> cut_patches(pixels, patch=1, merge=2).flatten().tolist()
    [0, 1, 4, 5, 2, 3, 6, 7]
    """
    height, width, channels = pixels.shape
    rows, columns = height // patch // merge, width // patch // merge      # of blocks
    axes = pixels.reshape(rows, merge, patch, columns, merge, patch, channels)
    # Axes 0 and 3 number blocks, 1 and 4 the patches of a block, 2 and 5 a patch's pixels.
    return axes.transpose(0, 3, 1, 4, 6, 2, 5).reshape(-1, channels, patch, patch)


@dataclass(frozen=True)
class Pixels:
    """An image's patches as bytes: the model's floats would take eight times as long to send."""
    values: Tensor                # (patches, channels, patch, patch) uint8
    table: Tensor                 # (channels, 256) float32: normalised value of each byte
    frames: int                   # per temporal patch; a still image is repeated in each

    def normalised(
            self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
        """-> (patches, channels * frames * patch^2)"""
        values = self.values.to(device, non_blocking=True)
        table = self.table.to(device, dtype)
        # One lookup for all channels: channel c starts at c * 256.
        first = torch.arange(len(table), dtype=torch.int32, device=device) * 256
        places = values.int().add_(first[:, None, None]).flatten()
        one_frame = table.flatten().index_select(0, places).view(len(values), len(table), 1, -1)
        return one_frame.expand(-1, -1, self.frames, -1).flatten(1)


@dataclass(frozen=True)
class Prompt:
    input_ids: Tensor             # (T,) long
    pixels: Pixels
    image_grid_thw: Tensor        # (1, 3) long: time, height, width in patches
    frame: Frame

    @property
    def pixel_values(self) -> Tensor:
        return self.pixels.normalised()


def prompt_hash() -> str:
    """12 hex digits that change with the prompt or a chat format."""
    return hashlib.sha256(repr((PROMPT, CHAT_FORMATS)).encode()).hexdigest()[:12]


@dataclass(eq=False)
class Processor:
    """Image and expression -> Prompt, completion <-> ids. Threads may share one."""
    tokenizer: Tokenizer
    ordinary: Tokenizer           # has no added tokens: reads "<|im_end|>" as letters
    source: Path                  # folder of the tokenizer's files
    ids: dict[str, int | None]    # of SPECIAL and <|endoftext|>
    end_id: int                   # end of the assistant's turn
    tags: dict[str, int]          # those TAGS that are one token: Qwen3-VL's <think>
    opening: str                  # how the chat prompt opens the answer: "<think>\n" or ""
    image_file: Path              # file of the image settings
    family: str                   # config.json's model_type
    convention: str               # of coordinates, as in Frame
    system: str | None            # text of the system turn
    min_pixels: int               # of the resized image
    max_pixels: int
    patch: int                    # side in pixels
    temporal_patch: int           # frames
    merge: int                    # merge x merge patches are one token
    mean: np.ndarray              # (3,) float32
    std: np.ndarray

    @classmethod
    def from_pretrained(cls, path: str | Path, min_pixels: int | None = None,
                        max_pixels: int | None = None) -> "Processor":
        """path: a checkpoint, or a stage's folder (its newest step). Given limits replace the
        file's. DataError if files are missing or wrong."""
        folder = newest_step(path)
        if not any((folder / name).exists() for name in IMAGE_FILES):
            folder = base_folder(folder)         # of an adapter made elsewhere
        settings = read_settings(folder, min_pixels, max_pixels)
        tokenizer = read_tokenizer(folder)
        ids = {t: tokenizer.token_to_id(t) for t in (*SPECIAL, "<|endoftext|>")}
        for token in SPECIAL:
            if ids[token] is None:
                raise DataError(f"{folder}: the tokenizer has no {token}; use a Qwen-VL model's")
        added = tokenizer.get_added_tokens_decoder().items()
        tags = {token.content: i for i, token in added if token.content in TAGS}
        plain = json.loads(tokenizer.to_str()) | {"added_tokens": [], "post_processor": None}
        ordinary = Tokenizer.from_str(json.dumps(plain))
        # The template of a Thinking model ends with "<think>\n", so its answers begin after it.
        template = ""
        for name in ("tokenizer_config.json", "chat_template.json"):
            template = read_object(folder / name).get("chat_template") or template
        if (folder / "chat_template.jinja").exists():
            template = read_text(folder / "chat_template.jinja")
        _, found, end = str(template).rpartition("add_generation_prompt")
        match = re.search(r"<think>(\\n|\n)*(?!.*</think>)", end if found else "", re.DOTALL)
        opening = match[0].replace("\\n", "\n") if match else ""
        return cls(
            tokenizer, ordinary, folder, ids, ids["<|im_end|>"], tags, opening, **settings)

    def check_fits(self, config: Any) -> None:
        """CheckpointError unless this belongs to a model of this model.Config."""
        image, vision = self.image_file, config.vision
        # With the coordinates of another family, training would run but learn wrong boxes.
        for file, name, ours, theirs in (
                (image, "the family", FAMILIES[self.family], config.family),
                (image, "patch_size", self.patch, vision.patch),
                (image, "merge_size", self.merge, vision.merge),
                (image, "temporal_patch_size", self.temporal_patch, vision.temporal_patch),
                (self.source, "<|image_pad|>", self.ids["<|image_pad|>"], config.image_id)):
            if ours != theirs:
                raise CheckpointError(f"{file}: {name} is {ours}, but config.json asks for "
                                      f"{theirs}; take all files from one checkpoint")
        last_id = max(self.tokenizer.get_vocab().values())
        if last_id >= config.vocab:
            raise CheckpointError(f"{self.source}: the last id is {last_id}, but config.json has "
                                  f"{config.vocab} ids; take all files from one checkpoint")

    def __call__(self, image: Image.Image, text: str) -> Prompt:
        pixels, grid, resized = self.patches(image)
        ids = self.turns(PROMPT, int(grid.prod()) // self.merge ** 2, text=text)
        return Prompt(torch.tensor(ids), pixels, grid, Frame(image.size, resized, self.convention))

    def patches(self, image: Image.Image) -> tuple[Pixels, Tensor, tuple[int, int]]:
        """-> patches, image_grid_thw (1, 3), resized (width, height)"""
        width, height = frame_by_coords(image.size, "resized", self).resized
        resized = rgb(image).resize((width, height), Image.Resampling.BICUBIC)
        values = torch.from_numpy(cut_patches(np.asarray(resized), self.patch, self.merge))
        shades = np.arange(256, dtype=np.float32)[:, None]
        table = torch.from_numpy(((shades / 255 - self.mean) / self.std).T.copy())
        grid = torch.tensor([[1, height // self.patch, width // self.patch]])
        return Pixels(values, table, self.temporal_patch), grid, (width, height)

    def turns(self, user: str, image_tokens: int, **blanks: str) -> list[int]:
        """The family's chat prompt as ids, up to the start of the answer. With blanks, `user` is a
        template that they fill in."""
        start, end, vision_start, vision_end, image = (self.ids[t] for t in SPECIAL)
        ids = []
        if self.system is not None:
            ids += [start, *self.words(f"system\n{self.system}"), end, *self.words("\n")]
        ids += [start, *self.words("user\n"), vision_start, *[image] * image_tokens, vision_end]
        ids += [*self.words(user, tags=bool(blanks), **blanks), end, *self.words("\n")]
        return [*ids, start, *self.words(f"assistant\n{self.opening}", tags=True)]

    def words(self, text: str, /, tags: bool = False, **blanks: str) -> list[int]:
        """Text -> ids. Special tokens are read as letters, because an expression may contain
        anything; only with `tags`, self.tags are tokens. Blanks fill in `text`, a template."""
        known = self.tags if tags else {}
        ids = []
        for part in re.split(f"({'|'.join(known)})", text) if known else [text]:
            if part in known:
                ids.append(known[part])
            else:
                part = part.format(**blanks) if blanks else part
                part = part.encode("utf-8", "replace").decode()        # lone surrogates -> "?"
                ids += self.ordinary.encode(part, add_special_tokens=False).ids
        return ids

    def encode(self, completion: str) -> Tensor:
        """Completion -> (L,) long, with the end of the turn, without what the prompt has opened."""
        if self.opening:
            thinks = completion.startswith(THINK[0])
            completion = completion.removeprefix(THINK[0]) if thinks else THINK[1] + completion
        return torch.tensor([*self.words(completion, tags=True), self.end_id])

    def decode(self, ids: Tensor | list[int]) -> str:
        """Ids -> completion, without the stop token at its end, with what the prompt has opened."""
        ids = ids.tolist() if isinstance(ids, Tensor) else list(ids)
        if ids and ids[-1] in (self.end_id, self.ids["<|endoftext|>"]):
            ids.pop()
        text = self.tokenizer.decode(ids, skip_special_tokens=False)
        opened = self.opening and not text.lstrip().startswith(THINK[0])
        return THINK[0] + text if opened else text

    def save_pretrained(self, path: str | Path) -> None:
        """Copies the tokenizer's and processor's files, with the pixel limits in use."""
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        for name in TOKENIZER_FILES:
            if (self.source / name).exists():
                shutil.copyfile(self.source / name, path / name)
        # Both files, and both names of the limits, because other programs may read either.
        for name in IMAGE_FILES:
            content = read_object(self.source / name)
            image = content.get("image_processor") if name == IMAGE_FILES[0] else content
            if image:
                image |= {"min_pixels": self.min_pixels, "max_pixels": self.max_pixels}
                if image.get("size"):
                    image["size"] = {
                        "shortest_edge": self.min_pixels, "longest_edge": self.max_pixels}
                (path / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def frame_by_coords(size: tuple[int, int], coords: str, processor: Processor | None) -> Frame:
    """size: (width, height). coords: original (pixels), resized (pixels after the processor's
    resizing), 1000, 100 or fraction (of the sides)."""
    resized = {"fraction": (1, 1), "100": (100, 100)}.get(coords, size)
    if coords == "resized":
        factor = processor.patch * processor.merge
        resized = smart_resize(*size, factor, processor.min_pixels, processor.max_pixels)
    return Frame(size, resized, "1000" if coords == "1000" else "absolute")


def read_object(file: Path) -> dict[str, Any]:
    """{} without the file."""
    content = read_json(file)
    if content is not None and not isinstance(content, dict):
        raise DataError(f"{file}: not a JSON object; {COPY_AGAIN}")
    return content or {}


def read_settings(folder: Path, min_pixels: int | None, max_pixels: int | None) -> dict[str, Any]:
    """-> fields of Processor. DataError for missing, wrong and unsupported settings."""
    file = folder / IMAGE_FILES[0]
    nested = read_object(file)
    image = nested.get("image_processor")
    if image is None:
        file = folder / IMAGE_FILES[1]
        image = read_object(file)
    if image == {}:
        raise DataError(f"no {IMAGE_FILES[1]} at {folder}; copy it there from the hub page")
    settings: dict[str, Any] = {"image_file": file}
    try:
        for name, ours in IMAGE_SETTINGS.items():
            value = image.get(name)
            equal = isinstance(value, (int, float)) and abs(value - ours) < 1e-6
            if value is not None and not equal:
                raise ValueError(f"{name} is {value!r}, but this code supports only {ours}")
        # As in transformers, min_pixels and max_pixels override "size"; its "edges" are areas too.
        size = image.get("size") or {}
        if not isinstance(size, dict):
            raise ValueError(f"size is {size!r}, not shortest_edge and longest_edge")
        whole = {f"{x}_size": image.get(f"{x}_size") for x in ("patch", "merge", "temporal_patch")}
        for name, edge, choice, default in (
                ("min_pixels", "shortest_edge", min_pixels, 56 * 56),
                ("max_pixels", "longest_edge", max_pixels, 28 * 28 * 1280)):
            values = (choice or None, image.get(name), size.get(edge), size.get(name))
            known = [value for value in values if value is not None]
            if size and not known:
                raise ValueError(f"size has no {edge}")
            whole[name] = known[0] if known else default
        for name, value in whole.items():
            if type(value) is not int or not 0 < value < 2 ** 31:
                raise ValueError(f"{name} is {value!r}, not a whole number above 0")
            settings[name.removesuffix("_size")] = value
        for name, least, above in (("image_mean", -1e6, ""), ("image_std", 1e-6, " above 0")):
            values = np.array(image.get(name), dtype=np.float32)
            if values.shape != (3,) or not ((least <= values) & (values < 1e6)).all():
                raise ValueError(f"{name} is {image.get(name)!r}, not three numbers{above}")
            settings[name.removeprefix("image_")] = values
    except (AttributeError, TypeError, ValueError, ArithmeticError) as error:
        raise DataError(f"{file}: {error}; {COPY_AGAIN}") from None

    limits = [settings["min_pixels"], settings["max_pixels"]]
    trained = read_object(folder / "run.json").get("pixels") or limits
    if trained != limits and not min_pixels and not max_pixels:
        raise DataError(f"{file} resizes images to {limits[0]} to {limits[1]} pixels, but run.json "
                        f"says it was trained with {trained}; write these into the first file")

    names = (image.get("processor_class"), nested.get("processor_class"))
    rows = [row for name, row in CHAT_FORMATS.items() if name in names]
    if not rows:
        model_type = read_object(base_folder(folder) / "config.json").get("model_type")
        rows = [row for row in CHAT_FORMATS.values() if row[0] == model_type]
    if not rows:
        raise DataError(f"{folder}: neither {IMAGE_FILES[1]} nor config.json names one of "
                        f"{', '.join(CHAT_FORMATS)}; copy both again from the hub page")
    settings["family"], settings["convention"], settings["system"] = rows[0]
    return settings


def read_tokenizer(folder: Path) -> Tokenizer:
    """From tokenizer.json, or from vocab.json, merges.txt and a file of added tokens."""
    try:
        if (folder / "tokenizer.json").exists():
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        else:
            files = folder / "vocab.json", folder / "merges.txt"
            if not all(file.exists() for file in files):
                raise DataError(f"no tokenizer at {folder}: neither tokenizer.json nor vocab.json "
                                "with merges.txt; copy them from the hub page")
            tokenizer = Tokenizer(models.BPE.from_file(*map(str, files)))
            tokenizer.normalizer = normalizers.NFC()
            tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
                pre_tokenizers.Split(Regex(WORDS), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
            tokenizer.decoder = decoders.ByteLevel()
            for i, token in sorted(read_added_tokens(folder).items()):
                tokenizer.add_tokens([AddedToken(**{"special": False} | token)])
                if tokenizer.token_to_id(token["content"]) != i:
                    raise DataError(f"{folder}: {token['content']} should have id {i}, but "
                                    f"vocab.json leaves another one for it; {COPY_AGAIN}")
        # tokenizer.json may say that texts are cut, padded or (BPE dropout) randomised.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.model.dropout = None
        return tokenizer
    except (DataError, CheckpointError):
        raise
    except Exception as error:                   # the library raises nothing narrower
        reason = " ".join(str(error).split())    # on one line
        raise DataError(f"{folder}: the tokenizer is unreadable ({reason}); {COPY_AGAIN}") from None
