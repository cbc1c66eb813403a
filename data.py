"""Records, images, coordinate frames and prompts: everything between a data set on disk and the model's input.

One sample's way: `load` reads the annotations -> `open_image` -> `Processor(image, text)` resizes, cuts patches and writes the chat
prompt -> the model answers in its own frame -> `to_image_frame` brings the box back. Boxes are xyxy, float; rewards and metrics only ever
see pixels of the original image, and coordinates are converted nowhere but here.

A new data set is one function in READERS: (root, split) -> Records.

    python data.py dior                       counts, refused records by reason, a contact sheet
"""
import argparse
import hashlib
import json
import math
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

PROMPT = ('Locate the object that is described: {text}\nFirst reason about positions in the image in <think> </think> tags, then answer '
          'with one box in <answer> </answer> tags, like <answer>{{"bbox_2d": [x1, y1, x2, y2]}}</answer>')
SPECIAL = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
# family: convention of its coordinates, system turn of its chat template (None: it has none)
FAMILIES = {"Qwen2VLProcessor": ("qwen2_vl", "1000", "You are a helpful assistant."),
            "Qwen2_5_VLProcessor": ("qwen2_5_vl", "absolute", "You are a helpful assistant."),
            "Qwen3VLProcessor": ("qwen3_vl", "1000", None)}
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json", "preprocessor_config.json", "chat_template.json",
                   "chat_template.jinja", "special_tokens_map.json", "added_tokens.json", "processor_config.json", "generation_config.json")
WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")


class DataError(Exception):
    """Data that is missing or does not fit; one line: what is wrong, where, what to do."""


# ------------------------------------------------------------------------------------------------------------------ records

@dataclass(frozen=True)
class Record:
    """One expression and its box."""
    id: str                       # unique in its data set
    image: object                 # path, or for `synth` a toy.scenes.Scene, which draws itself
    text: str                     # the expression, as its author wrote it
    box: tuple                    # (x1, y1, x2, y2), float pixels of the original image
    category: str
    size: tuple                   # (width, height) of the original image
    kind: str = ""                # kind of expression, where the data set knows it


class Records(list):
    """The usable records of a split, and `refused`: reason -> where, one entry for each that is not."""

    def __init__(self, records, refused):
        super().__init__(records)
        self.refused = refused

    @property
    def hash(self):
        """16 hex characters that change with any id, text, box or size."""
        lines = (json.dumps([r.id, r.text, r.box, r.category, r.size]) for r in self)
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def load(name, root=None, split="train"):
    """Records of a data set's split; "sft" and "rft" mean "train" where a data set has no split of that name."""
    if name not in READERS:
        raise DataError(f"no data set is called {name!r}; there are {', '.join(READERS)}")
    return READERS[name](Path(root) if root else Path("data") / name, split)


def open_image(record):
    """The record's image, PIL RGB; a synth record is drawn here."""
    if hasattr(record.image, "draw"):
        return record.image.draw()
    try:
        with Image.open(record.image) as image:
            return image.convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{record.image}: unreadable image of record {record.id} ({error})") from None


def read_synth(root, split):
    from toy import scenes  # drawn, not read: root is not used

    split = {"train": "rft"}.get(split, split)
    if split not in scenes.SPLITS:
        raise DataError(f"synth has no split {split!r}; it has {', '.join(scenes.SPLITS)}")
    return Records([Record(i, scene, text, tuple(map(float, box)), category, scene.size, kind)
                    for i, scene, text, box, category, kind in scenes.records(split)], {})


DIOR_WITHDRAWN = {"train": 15_328, "val": 3_832, "test": 19_160}


def read_dior(root, split):
    """DIOR-RSVG as it is downloaded. A split file holds indices of <object>s, counted from 0 over all XML files sorted by path: every
    object counts, a refused one too, or all later indices would shift."""
    split = {"sft": "train", "rft": "train"}.get(split, split)
    if split not in DIOR_WITHDRAWN:
        raise DataError(f"dior has no split {split!r}; it has train, val, test")
    wanted = set(dior_indices(root)[split])
    folder, images = root / "Annotations", root / "JPEGImages"
    files = (p for p in folder.rglob("*.xml") if not p.name.startswith("._") and "__MACOSX" not in p.parts)
    files = sorted(files, key=lambda p: p.as_posix())
    if not files:
        zipped = " (Annotations.zip is there: unzip it)" if (root / "Annotations.zip").exists() else ""
        raise DataError(f"no annotations at {folder}/*.xml{zipped}; --root must name the folder that holds Annotations and JPEGImages")
    records, refused, index = [], {}, -1
    for file in files:
        try:
            tree = ElementTree.parse(file).getroot()
        except (ElementTree.ParseError, OSError) as error:
            raise DataError(f"{file}: unreadable annotation ({error}); without its objects every later index would be wrong") from None
        name = (tree.findtext("filename") or "").strip()
        size, trouble = None, None
        for item in tree.findall("object"):
            index += 1
            if index not in wanted:
                continue
            if size is None and trouble is None:                         # once a file, and only where it is asked for
                size, trouble = image_size(images, name)
            box, no_box = read_box(item.find("bndbox"), size)
            text = (item.findtext("description") or "").strip()
            reason = trouble or no_box or (None if text else "empty text")
            if reason:
                refused.setdefault(reason, []).append(f"{file}, object {index}")
            else:
                records.append(Record(str(index), images / name, text, box, (item.findtext("name") or "").strip(), size))
    beyond = sum(i > index for i in wanted)
    if beyond:
        raise DataError(f"{root / split}.txt: {beyond} of {len(wanted)} indices are beyond the {index + 1} objects found in {folder}; "
                        "annotations are missing, or the split files belong to other data")
    return Records(records, refused)


def dior_indices(root):
    """The split files that are there: name -> indices. They must be whole numbers, disjoint, and of the current generation."""
    splits = {}
    for name in DIOR_WITHDRAWN:
        file = root / f"{name}.txt"
        try:
            splits[name] = [int(line) for line in file.read_text().split()]
        except OSError:
            raise DataError(f"no split file {file}; --root must name the folder that holds Annotations, JPEGImages, train.txt, val.txt, "
                            "test.txt") from None
        except ValueError as error:
            raise DataError(f"{file}: not one index a line ({error})") from None
    for name, indices in splits.items():
        if len(indices) == DIOR_WITHDRAWN[name]:
            raise DataError(f"{root / name}.txt has {len(indices)} lines: the split generation withdrawn by its authors in 2023, which "
                            "leaks test into train beside the current one; download the current train.txt, val.txt, test.txt")
    every = [i for indices in splits.values() for i in indices]
    if len(set(every)) < len(every) or min(every, default=0) < 0:
        twice = sorted(i for i in set(every) if every.count(i) > 1)[:3] if len(every) < 10_000 else "some"
        raise DataError(f"{root}: the split files overlap or repeat an index ({twice}); test would leak into train: download them again")
    return splits


def image_size(folder, name):
    """(width, height) of an image of a data set, or None and the reason why it can't be used."""
    path = folder / name
    if not name or not path.resolve().is_relative_to(folder.resolve()):
        return None, "image outside the data set"
    try:
        with Image.open(path) as image:
            return image.size, None
    except FileNotFoundError:
        return None, "missing image"
    except (OSError, ValueError, Image.DecompressionBombError):
        return None, "unreadable image"


def read_box(tag, size):
    """A bndbox tag -> box cut to the image, or None and the reason why there is none."""
    try:
        box = [float(tag.findtext(name)) for name in ("xmin", "ymin", "xmax", "ymax")]
    except (AttributeError, TypeError, ValueError):
        return None, "no box"
    if size:
        box = [min(max(v, 0.0), float(size[i % 2])) for i, v in enumerate(box)]
    return (tuple(box), None) if box[2] > box[0] and box[3] > box[1] else (None, "empty box")


READERS = {"synth": read_synth, "dior": read_dior}


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


def to_model_frame(box, frame):
    """Original pixels -> the model's coordinates, float."""
    return tuple(v * frame.extent[i % 2] / frame.original[i % 2] for i, v in enumerate(box))


def to_image_frame(box, frame):
    """The model's coordinates -> original pixels, float."""
    return tuple(v * frame.original[i % 2] / frame.extent[i % 2] for i, v in enumerate(box))


def format_box(box, frame):
    """A box in original pixels as the model is taught to write it: "[x1, y1, x2, y2]", whole numbers in its frame, never without area."""
    x1, y1, x2, y2 = (round(v) for v in to_model_frame(box, frame))
    right, low = frame.extent
    x1, y1 = min(max(x1, 0), right - 1), min(max(y1, 0), low - 1)
    return f"[{x1}, {y1}, {min(max(x2, x1 + 1), right)}, {min(max(y2, y1 + 1), low)}]"


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
    if max(width, height) > 200 * min(width, height):
        raise DataError(f"an image of {width} x {height} is more than 200 times as long as wide; cut it before use")
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
        path = Path(path)
        path = path if (path / "config.json").exists() or not (path / "latest").exists() else path / "latest"
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
        x = np.asarray(image.convert("RGB").resize((w, h), Image.Resampling.BICUBIC)).reshape(h // p // m, m, p, w // p // m, m, p, 3)
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


def read_json(path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: unreadable ({error})") from None


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


# ------------------------------------------------------------------------------------------------------------------ pictures

def draw_boxes(image, boxes, caption="", width=336):
    """PIL image, boxes as (xyxy in its pixels, colour) -> PIL image of this width with the boxes on it and the caption beneath."""
    scale = width / image.width
    picture = image.resize((width, round(image.height * scale)), Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(picture)
    for box, colour in boxes:
        pen.rectangle([v * scale for v in box], outline=colour, width=2)
    font, lines = ImageFont.load_default(13), [""]
    for word in caption.encode("ascii", "replace").decode().split():
        lines = [*lines[:-1], f"{lines[-1]} {word}".strip()] if font.getlength(f"{lines[-1]} {word}") < width - 8 else [*lines, word]
    whole = Image.new("RGB", (width, picture.height + 16 * len(lines) + 6), "white")
    whole.paste(picture)
    ImageDraw.Draw(whole).text((4, picture.height + 2), "\n".join(lines), fill="black", font=font, spacing=2)
    return whole


def contact_sheet(pictures, columns=4):
    """PIL images of one width -> one, in rows."""
    rows = [pictures[i:i + columns] for i in range(0, len(pictures), columns)]
    heights = [max(p.height for p in row) for row in rows]
    sheet = Image.new("RGB", (max(len(row) for row in rows) * (pictures[0].width + 8), sum(heights) + 8 * len(rows)), "white")
    for i, row in enumerate(rows):
        for j, picture in enumerate(row):
            sheet.paste(picture, (j * (picture.width + 8), sum(heights[:i]) + 8 * i))
    return sheet


def main():
    parser = argparse.ArgumentParser(description="Checks a data set: counts, refused records by reason, a contact sheet")
    parser.add_argument("name", help=f"one of {', '.join(READERS)}")
    parser.add_argument("--root", help="its folder; default data/<name>")
    parser.add_argument("--split", nargs="+", default=["train", "val", "test"], help="splits to check")
    parser.add_argument("--show", type=int, default=12, help="records of the first split on the contact sheet")
    parser.add_argument("--out", default="data_check.png", help="where the contact sheet goes")
    args = parser.parse_args()
    try:
        for split in args.split:
            records = load(args.name, args.root, split)
            refused = sum(map(len, records.refused.values()))
            print(f"{args.name} {split}: {len(records):,} records, {refused:,} refused, {len(set(r.image for r in records)):,} images, "
                  f"{len(set(r.category for r in records))} categories, hash {records.hash}")
            for reason, places in records.refused.items():
                print(f"  {reason}: {len(places)}", *(f"    {place}" for place in places), sep="\n")
            if split == args.split[0] and records:
                shown = records[::max(1, len(records) // args.show)][:args.show]
                contact_sheet([draw_boxes(open_image(r), [(r.box, "red")], r.text) for r in shown]).save(args.out)
                print(f"  {len(shown)} of them with their boxes: {args.out}")
    except DataError as error:
        print(f"data.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
