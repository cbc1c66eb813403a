"""Reads an image file as 8-bit RGB pixels, in the orientation in which the file stores them.

No orientation (of EXIF or a TIFF tag) is applied, because boxes refer to the stored pixels.
Transparent pixels are composited on white, as transformers does. Depth and transparency come from
the file, not from PIL's mode: PIL keeps only the high bytes of 16-bit colour, and takes any fourth
band of a TIFF for alpha. More than 8 bits per sample, or floats, need a `Stretch` and rasterio."""
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin, TiffImagePlugin, UnidentifiedImageError
from PIL.ExifTags import Base

from readers.base import DataError, Stretch

# Their warnings do not concern pixels, or the same problem raises an error here.
warnings.filterwarnings("ignore", module=r"PIL\.|rasterio")
Image.MAX_IMAGE_PIXELS = 1 << 31     # aerial scenes are large, and are no decompression bombs
# Bytes of a PNG's texts and profile. By default PIL refuses the image after one MB.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 1 << 28
# No others, since PIL would run Ghostscript to draw an EPS.
FORMATS = ("JPEG", "PNG", "TIFF", "BMP", "DIB", "WEBP", "GIF", "JPEG2000", "PPM", "AVIF")
LARGEST_RATIO = 5000              # no compression saves more; a file that claims so is damaged
DEEP = "16-bit or float image"
STRETCH_IT = f"{DEEP}, scale it to 8 bits or give --stretch 2 98"
# TIFF tags, and values of the photometric tag.
WIDTH, HEIGHT, BITS, PHOTOMETRIC, BANDS, EXTRA_BANDS, FORMAT = 256, 257, 258, 262, 277, 338, 339
WHITE_IS_ZERO, BLACK_IS_ZERO, RGB = 0, 1, 2


class ImageError(ValueError):
    """The message is a short reason why an image cannot be read."""


@contextmanager
def opened(path: Path) -> Iterator[
        tuple[Image.Image | None, dict[int, Any], tuple[int, int], bool]]:
    """Yields the image as PIL opens it, not yet decoded; its TIFF tags, or {}; the stored (width,
    height); whether it is deep, which means samples of more than 8 bits, signed samples or floats.
    Any error up to the end of the `with` block becomes ImageError, except FileNotFoundError."""
    try:
        # To open a pipe would wait for a program that writes into it.
        if not stat.S_ISREG(path.stat().st_mode):
            raise ImageError("not a regular file")
        with open(path, "rb") as file:
            start = file.read(16)
            if start[:4] not in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
                image = Image.open(file, formats=FORMATS)
                yield image, {}, image.size, is_deep(image)
                return
            # The header of a BigTIFF has 16 bytes, that of a TIFF 8.
            tags = TiffImagePlugin.ImageFileDirectory_v2(start[:16 if b"+" in start[:4] else 8])
            file.seek(tags.next)
            tags.load(file)
            deep = max(tags.get(BITS, (1,))) > 8 or max(tags.get(FORMAT, (1,))) in (2, 3, 5, 6)
            image = None          # if deep, or unknown to PIL
            with suppress(UnidentifiedImageError):
                image = None if deep else Image.open(file, formats=FORMATS)
            yield image, dict(tags), (tags[WIDTH], tags[HEIGHT]), deep
    except (FileNotFoundError, ImageError, DataError):
        raise
    except Exception as error:    # on a damaged file, PIL's plugins raise almost any type
        raise ImageError(" ".join(str(error).split()) or type(error).__name__) from None


def read_orientation(path: Path) -> int:
    """EXIF orientation, 1 to 8: how viewers turn the picture. May decode the pixels."""
    with opened(path) as (image, tags, _, _):
        return (tags or image.getexif()).get(Base.Orientation, 1)


def is_plain(path: Path) -> bool:
    """Whether every program shows exactly the pixels that `read_rgb` returns."""
    with opened(path) as (image, tags, _, deep):
        transparent = EXTRA_BANDS in tags if tags else image.has_transparency_data
    return not deep and not transparent and read_orientation(path) == 1


def read_rgb(path: Path, stretch: Stretch | None = None) -> Image.Image:
    """A whole image as PIL RGB, as stored. stretch: for deep images; None refuses them."""
    with opened(path) as (image, tags, _, deep):
        if deep and stretch is None:
            raise ImageError(STRETCH_IT)
        if deep or image is None:
            colour, alpha = read_samples(path, image, tags)
            pixels = stretched(colour, alpha, stretch) if deep else colour.clip(0, 255)
            if alpha is not None:
                alpha = np.nan_to_num(alpha).clip(0, 1)[..., None]
                pixels = np.rint(pixels.astype(np.uint8) * alpha + 255 * (1 - alpha))
            pixels = np.broadcast_to(pixels.astype(np.uint8), (*pixels.shape[:2], 3))
            return Image.fromarray(pixels.copy())
        if tags:
            # PIL would turn a TIFF on loading. The copy has the size of the stored pixels.
            image.getexif()[Base.Orientation] = 1
            image = image.copy()
            if image.mode == "RGBA" and EXTRA_BANDS not in tags:
                # A fourth band that the file does not declare as alpha may be near infrared.
                image = Image.merge("RGB", image.split()[:3])
        return rgb(image)


def rgb(image: Image.Image) -> Image.Image:
    """PIL image of 8 bits per sample -> RGB on white; ImageError if PIL would clip its samples."""
    if is_deep(image):
        raise ImageError(STRETCH_IT)
    if image.mode in ("La", "RGBa"):
        image = image.convert(image.mode.upper())
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def is_deep(image: Image.Image) -> bool:
    """Whether the file of a PIL image (not a TIFF) has more than 8 bits per sample."""
    if image.format == "JPEG2000" and getattr(image, "fp", None):
        image.fp.seek(0)
        start = image.fp.read(4096)
        # The bits of the first component come 40 bytes after the start of the marker SIZ.
        siz = start.find(b"\xff\x51")
        return 0 <= siz < len(start) - 40 and start[siz + 40] & 127 > 7
    # PIL's mode shows the depth of gray. The depth of colour is in the arguments of the decoder.
    for tile in getattr(image, "tile", ()):
        args = tile.args if isinstance(tile.args, tuple) and tile.args else (tile.args,)
        is_deep_ppm = image.format == "PPM" and isinstance(args[-1], int) and args[-1] > 255
        # "RGB;16B" has 16 bits per sample; BMP's "BGR;16" has 16 bits for all three.
        if is_deep_ppm or str(args[0]).endswith((";16B", ";16L", ";16N")):
            return True
    return image.mode[0] in "IF"


def read_samples(path: Path, image: Image.Image | None, tags: dict[int, Any]) -> tuple[Any, Any]:
    """Colour (H, W, 1 or 3) in the file's own type and range, and alpha (H, W) in 0..1 or None."""
    bands, photometric = tags.get(BANDS, 1), tags.get(PHOTOMETRIC, BLACK_IS_ZERO)
    # Scientific software marks three bands of colour as gray.
    allowed = (RGB,) if bands > 3 else (BLACK_IS_ZERO, RGB if bands == 3 else WHITE_IS_ZERO)
    if photometric not in allowed:
        raise ImageError(f"a TIFF of {bands} bands of {max(tags.get(BITS, (1,)))} bits does not "
                         "say which are red, green and blue; write three bands of it to a file")
    try:
        import rasterio
    except ImportError:
        raise DataError(f"{path}: more than 8 bits per sample need rasterio, which is not "
                        "installed; pip install rasterio") from None
    try:
        # Do not list the image's folder on each open: it may hold a million files.
        with rasterio.Env(GDAL_DISABLE_READDIR_ON_OPEN="EMPTY_DIR"), rasterio.open(path) as source:
            dtype = np.dtype(source.dtypes[0])
            if dtype.kind == "c":
                raise ImageError("complex samples (TIFF sample formats 5 and 6); write float32")
            size = source.width * source.height * source.count * dtype.itemsize
            if size > LARGEST_RATIO * path.stat().st_size:
                raise ImageError("damaged: the file is too short for its size in pixels")
            samples = np.moveaxis(source.read(), 0, -1)
            kinds = [kind.name for kind in source.colorinterp]
    except rasterio.errors.RasterioError as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise ImageError(f"damaged, or of a kind that GDAL cannot read ({reason})") from None
    n = 1 if len(kinds) < 3 else 3
    colour, alpha = samples[..., :n], None
    if photometric == WHITE_IS_ZERO:
        colour = 255 - colour if dtype == np.uint8 else -colour.astype(np.float64)
    if "alpha" in kinds[n:n + 1]:
        alpha = samples[..., n] / np.float64(1 if dtype.kind == "f" else np.iinfo(dtype).max)
        if tags.get(EXTRA_BANDS, (0,))[0] == 1:    # colours are premultiplied
            colour = colour / np.where(alpha > 0, alpha, 1)[..., None]
    elif image and image.info.get("transparency") is not None:
        alpha = (samples != np.array(image.info["transparency"])).any(-1).astype(np.float64)
    return colour, alpha


def stretched(colour: np.ndarray, alpha: np.ndarray | None, stretch: Stretch) -> np.ndarray:
    """Samples (H, W, 1 or 3) -> uint8. Percentiles of the visible ones become black and white."""
    pixels = np.empty(colour.shape, np.uint8)
    for band in range(colour.shape[-1]):
        values = colour[..., band].astype(np.float64)
        finite = np.isfinite(values)
        known = values[finite if alpha is None else finite & (alpha > 0)]
        low, high = np.percentile(known, stretch) if len(known) else (0.0, 0.0)
        with np.errstate(all="ignore"):
            scaled = (values - low) * (255 / (high - low)) if high > low else (values > low) * 255
        # NaN and infinite samples become black.
        pixels[..., band] = np.rint(np.where(finite, scaled, 0.0).clip(0, 255))
    return pixels
