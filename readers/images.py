"""An image's file -> 8-bit RGB pixels, as the file stores them.

Depth and transparency come from the file, not from the mode that PIL gives it: PIL takes the
high bytes of 16-bit colour alone, and a TIFF's fourth band for alpha. An orientation, of EXIF or
of a TIFF's tag, turns nothing: one rule for all formats, for boxes are in the stored grid.

Samples of more than 8 bits, and floats, are stretched (`Stretch`) or refused. Transparency is
composited on white, as transformers does.
"""
import io
import math
import struct
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, TiffImagePlugin
from PIL.ExifTags import Base

# What is wrong with a file is an error here, or does not concern its pixels.
warnings.filterwarnings("ignore", module=r"PIL\.")
# Aerial scenes are large, and one's own files no bombs.
Image.MAX_IMAGE_PIXELS = 1 << 31
DEEP = "16-bit or float image"
# (low, high): percentiles, of each band of an image, that become black and white.
Stretch = tuple[float, float]
# A transposition's inverse, by the orientation that asks for it.
UNDO = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_270}
# PIL's raw modes of 16-bit PNG samples -> those that give the other byte of each.
LOW_BYTES = {"RGB;16B": "RGB;16L", "RGBA;16B": "RGBA;16L"}


class ImageError(ValueError):
    """An image that can't be read; what is wrong with it, in few words."""


@dataclass(frozen=True)
class Header:
    """What an image's file says of itself."""

    size: tuple[int, int]         # (width, height) as stored
    deep: bool                    # are samples of more than 8 bits, or signed, or floats?
    opaque: bool                  # is nothing of it transparent?


# ---------------------------------------------------------------- any file

def read_header(path: Path) -> Header:
    """An image's header; its pixels are not decoded.

    FileNotFoundError, or ImageError where there is none that can be read.
    """
    try:
        with open(path, "rb") as file:
            tiff = read_tiff_tags(file)
            if tiff:
                return Header(tiff.size, tiff.deep, not tiff.extra)
            with Image.open(file) as image:
                return Header(image.size, is_deep(image), not has_alpha(image))
    except (FileNotFoundError, ImageError):
        raise
    except Exception as error:
        # On a damaged file PIL's plugins raise nearly anything.
        raise ImageError(one_line(error)) from None


def read_orientation(path: Path) -> int:
    """By which of EXIF's eight ways a viewer turns a picture; 1: not at all.

    As for `read_header`, but pixels may be decoded.
    """
    try:
        with open(path, "rb") as file:
            tiff = read_tiff_tags(file)
            if tiff:
                return tiff.number(Base.Orientation, 1)
            with Image.open(file) as image:
                return image.getexif().get(Base.Orientation, 1)
    except (FileNotFoundError, ImageError):
        raise
    except Exception as error:
        # On a damaged file PIL's plugins raise nearly anything.
        raise ImageError(one_line(error)) from None


def is_plain(path: Path) -> bool:
    """Does any program show the pixels that are read here, however it opens the file?"""
    header = read_header(path)
    return not header.deep and header.opaque and read_orientation(path) == 1


def read_rgb(path: Path, stretch: Stretch | None = None) -> Image.Image:
    """An image, decoded to its end -> PIL RGB, as stored.

    stretch: for samples of more than 8 bits; None refuses them. ImageError where it can't be
    read.
    """
    try:
        with open(path, "rb") as file:
            tiff = read_tiff_tags(file)
            if tiff:
                return tiff_rgb(file, tiff, stretch)
            with Image.open(file) as image:
                if is_deep(image):
                    return deep_rgb(file, image, stretch)
                return rgb(image)
    except ImageError:
        raise
    except Exception as error:
        # On a damaged file PIL's plugins raise nearly anything.
        raise ImageError(one_line(error)) from None


def one_line(error: Exception) -> str:
    """What an exception says; its kind, where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__


def rgb(image: Image.Image) -> Image.Image:
    """A PIL image of 8 bits a sample -> RGB, transparency composited on white.

    ImageError where that would clip it to white or black: 16-bit, 32-bit and float values.
    """
    if is_deep(image):
        raise ImageError(f"{DEEP}, scale it to 8 bits or give --stretch 2 98")
    if image.mode in ("La", "RGBa"):
        image = image.convert(image.mode.upper())
    if has_alpha(image):
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def has_alpha(image: Image.Image) -> bool:
    """Has a PIL image transparent pixels, or a place for them?"""
    return "A" in image.getbands() or image.info.get("transparency") is not None


def is_deep(image: Image.Image) -> bool:
    """Has an image that PIL opened, no TIFF, samples of more than 8 bits?

    PIL says so by its mode for gray alone; the decoder's arguments tell it of colour, before
    pixels are loaded.
    """
    if image.mode[0] in "IF":
        return True
    if image.format == "JPEG2000":
        return jpeg2000_bits(image) > 8
    for tile in getattr(image, "tile", ()):
        codec, _, _, args = tile
        args = args if isinstance(args, tuple) and args else (args,)
        # A raw mode "RGB;16B" is of 16 bits a sample; BMP's "BGR;16", of three samples.
        if codec == "SGI16" or str(args[0]).endswith((";16B", ";16L", ";16N")):
            return True
        if image.format == "PPM" and isinstance(args[-1], int) and args[-1] > 255:
            return True
    return False


def jpeg2000_bits(image: Image.Image) -> int:
    """Bits of a sample, of a JPEG 2000 file or code stream; 8 where pixels are loaded already."""
    if getattr(image, "fp", None) is None:
        return 8
    place = image.fp.tell()
    image.fp.seek(0)
    start = image.fp.read(4096)
    image.fp.seek(place)
    siz = start.find(b"\xff\x51")
    # Behind the marker: 36 bytes of sizes, the number of components, then each one's bits.
    return (start[siz + 40] & 127) + 1 if 0 <= siz < len(start) - 40 else 8


# ---------------------------------------------------------------- more than 8 bits

def deep_rgb(file: BinaryIO, image: Image.Image, stretch: Stretch | None) -> Image.Image:
    """An opened image of more than 8 bits a sample, no TIFF -> RGB."""
    if stretch is None:
        raise ImageError(f"{DEEP}, scale it to 8 bits or give --stretch 2 98")
    transparent = image.info.get("transparency")
    if image.mode[0] in "IF":
        samples = np.asarray(image)[..., None]
    elif image.format == "PNG":
        samples = png_samples(file, image)
    else:
        raise ImageError(
            f"{image.format} of more than 8 bits a sample in colour can't be read; convert it to "
            "PNG or TIFF")
    bands = samples.shape[-1]
    alpha = samples[..., -1] / 65535 if bands in (2, 4) else None
    if transparent is not None:
        # One value is transparent, wherever it stands.
        alpha = (samples != np.array(transparent)).any(-1).astype(np.float64)
    return stretched(samples[..., :3] if bands > 2 else samples[..., :1], alpha, stretch)


def png_samples(file: BinaryIO, image: Image.Image) -> np.ndarray:
    """A 16-bit PNG in colour, or gray with alpha -> (H, W, bands) uint16.

    PIL keeps one byte of each sample, the high one; decoded a second time as if its bytes were
    in the other order, the image gives the low one.
    """
    rawmode = image.tile[0].args
    if rawmode == "LA;16B":
        # Four bytes a pixel, as in 8-bit RGBA.
        gray_high, gray_low, alpha_high, alpha_low = np.moveaxis(
            decoded_as(file, "RGBA").astype(np.uint16), -1, 0)
        return np.stack((gray_high << 8 | gray_low, alpha_high << 8 | alpha_low), -1)
    high = decoded_as(file, rawmode).astype(np.uint16)
    return high << 8 | decoded_as(file, LOW_BYTES[rawmode])


def decoded_as(file: BinaryIO, rawmode: str) -> np.ndarray:
    """A PNG's pixels, unpacked by another of PIL's raw modes: (H, W, bands) uint8."""
    file.seek(0)
    with Image.open(file) as image:
        image.tile = [tile._replace(args=rawmode) for tile in image.tile]
        return np.array(image)


def stretched(colour: np.ndarray, alpha: np.ndarray | None, stretch: Stretch) -> Image.Image:
    """Samples (H, W, 1 or 3) of any kind, alpha (H, W) in 0..1 or None -> RGB on white.

    Each band by its own percentiles: the low one becomes black, the high one white. What is not
    finite, or wholly transparent, has no part in them; what is not finite becomes black.
    """
    height, width, bands = colour.shape
    pixels = np.empty((height, width, bands), np.uint8)
    seen = np.ones((height, width), bool) if alpha is None else alpha > 0
    for band in range(bands):
        values = colour[..., band].astype(np.float64)
        finite = np.isfinite(values)
        known = values[finite & seen]
        low, high = np.percentile(known, stretch) if len(known) else (0.0, 0.0)
        if high > low:
            with np.errstate(all="ignore"):
                scaled = (values - low) * (255 / (high - low))
        else:
            scaled = np.where(values > low, 255.0, 0.0)
        pixels[..., band] = np.rint(np.where(finite, scaled, 0.0).clip(0, 255))
    return on_white(pixels, alpha)


def on_white(pixels: np.ndarray, alpha: np.ndarray | None) -> Image.Image:
    """Pixels (H, W, 1 or 3) uint8, alpha (H, W) in 0..1 or None -> RGB on white."""
    pixels = np.broadcast_to(pixels, (*pixels.shape[:2], 3))
    if alpha is not None:
        opaque = np.nan_to_num(alpha).clip(0, 1)[..., None]
        pixels = np.rint(pixels * opaque + 255 * (1 - opaque)).astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(pixels))


# ---------------------------------------------------------------- TIFF

TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
# Compressions that are of bytes, whatever these mean: PackBits, LZW, deflate twice, LZMA, ZSTD.
OF_BYTES = (1, 5, 8, 32773, 32946, 34925, 50000)
# No compression makes more of a byte; what claims more is damaged.
LARGEST_RATIO = 5000
# What a TIFF's photometric tag says of its samples.
WHITE_IS_ZERO = 0
BLACK_IS_ZERO = 1
RGB_SAMPLES = 2


@dataclass(frozen=True)
class Tiff:
    """The tags of a TIFF's first image that say where its samples lie and what they are."""

    tags: dict[int, Any]
    order: str                    # of bytes: "<" or ">"

    def number(self, tag: int, default: int) -> int:
        """A tag's first number."""
        return self.numbers(tag, (default,))[0]

    def numbers(self, tag: int, default: tuple[int, ...] = ()) -> tuple[int, ...]:
        value = self.tags.get(tag, default)
        value = value if isinstance(value, tuple) else (value,)
        if not all(type(v) is int for v in value) or not value and default:
            raise ImageError(f"damaged: TIFF tag {tag} holds no whole numbers")
        return value

    @property
    def size(self) -> tuple[int, int]:
        width = self.number(256, 0)
        height = self.number(257, 0)
        if not (0 < width < 1 << 31 and 0 < height < 1 << 31):
            raise ImageError(f"damaged: a TIFF of {width} x {height} pixels")
        return width, height

    @property
    def bits(self) -> int:
        return max(self.numbers(258, (1,)))

    @property
    def deep(self) -> bool:
        return self.bits > 8 or max(self.numbers(339, (1,))) in (2, 3, 5, 6)

    @property
    def bands(self) -> int:
        return self.number(277, 1)

    @property
    def extra(self) -> tuple[int, ...]:
        """What bands beside gray or colour are: 0 not said, 1 and 2 alpha."""
        return self.numbers(338)


def read_tiff_tags(file: BinaryIO) -> Tiff | None:
    """The tags of a TIFF, None for another file; the file is at its beginning again."""
    start = file.read(8)
    tiff = None
    if start[:4] in TIFF_STARTS:
        if b"+" in start[:4]:
            # The larger kind of TIFF has a header of 16 bytes.
            start += file.read(8)
        directory = TiffImagePlugin.ImageFileDirectory_v2(start)
        file.seek(directory.next)
        directory.load(file)
        tiff = Tiff(dict(directory), "<" if start[:2] == b"II" else ">")
    file.seek(0)
    return tiff


def tiff_rgb(file: BinaryIO, tiff: Tiff, stretch: Stretch | None) -> Image.Image:
    """A TIFF -> RGB."""
    if tiff.deep and stretch is None:
        raise ImageError(f"{DEEP}, scale it to 8 bits or give --stretch 2 98")
    if not tiff.deep and is_known_to_pil(file):
        return shallow_tiff_rgb(file, tiff)
    photometric = tiff.number(262, BLACK_IS_ZERO)
    gray = photometric in (WHITE_IS_ZERO, BLACK_IS_ZERO) and tiff.bands < 3
    colour = photometric == RGB_SAMPLES and tiff.bands >= 3
    # Scientific software says "gray" of three bands.
    if not gray and not colour and (photometric != BLACK_IS_ZERO or tiff.bands != 3):
        raise ImageError(
            f"a TIFF of {tiff.bands} bands of {tiff.bits} bits (photometric {photometric}) does "
            "not say which are red, green and blue; write three bands of it to a file")
    samples = tiff_samples(file, tiff)                         # (H, W, bands)
    pixels = samples[..., :1 if gray else 3]
    alpha = tiff_alpha(samples, tiff, pixels.shape[-1])
    if photometric == WHITE_IS_ZERO:
        # A stretch takes its black and white from the numbers, wherever they lie.
        pixels = -pixels.astype(np.float64) if tiff.deep else 255 - pixels
    if alpha is not None and tiff.extra[0] == 1:
        # Colours were multiplied by alpha.
        pixels = pixels / np.where(alpha > 0, alpha, 1)[..., None]
    if tiff.deep:
        return stretched(pixels, alpha, stretch)
    return on_white(pixels.clip(0, 255).astype(np.uint8), alpha)


def tiff_alpha(samples: np.ndarray, tiff: Tiff, colours: int) -> np.ndarray | None:
    """The alpha (H, W) in 0..1 of samples (H, W, bands), where the file says that it has one."""
    if samples.shape[-1] == colours or not tiff.extra or tiff.extra[0] not in (1, 2):
        return None
    alpha = samples[..., colours]
    if alpha.dtype.kind == "f":
        return alpha.astype(np.float64)
    return alpha / np.iinfo(alpha.dtype).max


def is_known_to_pil(file: BinaryIO) -> bool:
    """Does PIL open this TIFF? It does not know three bands called gray, and the like."""
    try:
        with Image.open(file):
            return True
    except Image.UnidentifiedImageError:
        return False
    finally:
        file.seek(0)


def shallow_tiff_rgb(file: BinaryIO, tiff: Tiff) -> Image.Image:
    """A TIFF of 8 bits a sample at most, decoded by PIL, as stored."""
    with Image.open(file) as image:
        # PIL turns a TIFF, and no other image, as its orientation says.
        turned_by = image.getexif().get(Base.Orientation, 1)
        image.load()
        stored = image.copy()
    if turned_by in UNDO:
        stored = stored.transpose(UNDO[turned_by])
    if stored.mode == "RGBA" and not tiff.extra:
        # A fourth band that nothing calls alpha is one of another wavelength.
        stored = Image.merge("RGB", stored.split()[:3])
    return rgb(stored)


def tiff_samples(file: BinaryIO, tiff: Tiff) -> np.ndarray:
    """All samples of a TIFF: (height, width, bands), of its own kind of numbers.

    ImageError, by name, for what is not read here.
    """
    width, height = tiff.size
    dtype = tiff_dtype(tiff)
    tiled = 322 in tiff.tags
    block_width = tiff.number(322, width) if tiled else width
    block_height = tiff.number(323, height) if tiled else min(tiff.number(278, height), height)
    if not 0 < block_width < 1 << 31 or not 0 < block_height < 1 << 31:
        raise ImageError("damaged: strips or tiles without pixels")
    across = -(-width // block_width)
    down = -(-height // block_height)
    planes = tiff.bands if tiff.number(284, 1) == 2 else 1
    block_bands = tiff.bands // planes
    offsets = tiff.numbers(324 if tiled else 273)
    lengths = tiff.numbers(325 if tiled else 279)
    if min(len(offsets), len(lengths)) < across * down * planes:
        raise ImageError("damaged: strips or tiles are missing")
    blocks = []
    for i in range(across * down * planes):
        row = i // across % down
        # A tile is whole, also past the edge; the last strip ends with the image.
        rows = block_height if tiled else min(block_height, height - row * block_height)
        file.seek(offsets[i])
        blocks.append(read_block(
            file.read(lengths[i]), (rows, block_width, block_bands), dtype, tiff))
    samples = np.empty((height, width, tiff.bands), dtype.newbyteorder("="))
    for i, block in enumerate(blocks):
        top = i // across % down * block_height
        left = i % across * block_width
        plane = i // (across * down)
        area = samples[top:top + block_height, left:left + block_width]
        area[..., plane:plane + block_bands] = block[:area.shape[0], :area.shape[1]]
    return samples


def tiff_dtype(tiff: Tiff) -> np.dtype:
    """The kind of numbers that a TIFF's samples are; ImageError, by name, for others."""
    bits = set(tiff.numbers(258, (1,)))
    # Undefined is what the default is.
    formats = {1 if kind == 4 else kind for kind in tiff.numbers(339, (1,))}
    kinds = {(1, n): f"u{n // 8}" for n in (8, 16, 32, 64)}
    kinds |= {(2, n): f"i{n // 8}" for n in (8, 16, 32, 64)}
    kinds |= {(3, n): f"f{n // 8}" for n in (16, 32, 64)}
    kind = (min(formats), min(bits))
    if len(bits) > 1 or len(formats) > 1 or kind not in kinds:
        raise ImageError(
            f"TIFF samples of {', '.join(map(str, sorted(bits)))} bits, sample format "
            f"{', '.join(map(str, sorted(formats)))}, can't be read; convert them to 16 bits or "
            "float32")
    if not 0 < tiff.bands <= 1024:
        raise ImageError(f"damaged: a TIFF of {tiff.bands} bands")
    for tag, known, name in (
            (259, OF_BYTES, "compression"), (317, (1, 2, 3), "predictor"), (266, (1,), "bit order"),
            (284, (1, 2), "planar configuration")):
        value = tiff.number(tag, 1)
        if value not in known:
            raise ImageError(
                f"TIFF {name} {value} of {tiff.bits}-bit samples can't be read; write the image "
                "without compression")
    return np.dtype(tiff.order + kinds[kind])


def read_block(
        data: bytes, shape: tuple[int, int, int], dtype: np.dtype, tiff: Tiff,
) -> np.ndarray:
    """A strip's or a tile's bytes -> its samples, (rows, columns, bands)."""
    size = math.prod(shape) * dtype.itemsize
    compression = tiff.number(259, 1)
    if compression != 1:
        data = decompress(data, compression, size)
    if len(data) < size:
        raise ImageError("damaged: a strip or a tile ends early")
    predictor = tiff.number(317, 1)
    rows, columns, bands = shape
    if predictor == 3:
        # Of a row all highest bytes come first, then all second ones; each byte is a difference.
        differences = np.frombuffer(data, np.uint8, size).reshape(rows, -1, bands)
        planes = differences.cumsum(1, np.uint8).reshape(rows, dtype.itemsize, -1)
        ordered = np.ascontiguousarray(planes.transpose(0, 2, 1))
        return ordered.view(dtype.newbyteorder(">")).reshape(shape)
    samples = np.frombuffer(data, dtype, math.prod(shape)).reshape(shape)
    if predictor == 2:
        # Each sample is the difference to its neighbour on the left.
        whole = np.dtype(f"u{dtype.itemsize}")
        differences = samples.view(whole.newbyteorder(tiff.order))
        samples = differences.cumsum(1, whole).view(dtype.newbyteorder("="))
    return samples


def decompress(data: bytes, compression: int, size: int) -> bytes:
    """A compressed strip -> `size` bytes, or more.

    PIL decodes it as an image of one row of gray bytes: the compressions of OF_BYTES do not
    depend on what the bytes mean.
    """
    if not 0 < size <= LARGEST_RATIO * len(data):
        raise ImageError("damaged: a strip or a tile ends early")
    # Kinds of a tag's value.
    short = 3
    long = 4
    tags = [
        (256, long, size), (257, long, 1), (258, short, 8), (259, short, compression),
        (262, short, 1), (273, long, 8 + 2 + 9 * 12 + 4), (277, short, 1), (278, long, 1),
        (279, long, len(data))]
    directory = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    head = struct.pack("<4sIH", b"II*\0", 8, len(tags))
    with Image.open(io.BytesIO(head + directory + bytes(4) + data)) as row:
        return row.tobytes()
