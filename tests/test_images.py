"""readers/images.py: every depth, transparency and orientation that an image file can have.

tifffile writes what PIL cannot; transformers is the oracle of transparency.
"""
import io
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import data
from data import load
from readers import collect, images
from readers.base import DataError, Record, Refused
from readers.images import ImageError, opened, read_rgb

STRETCH = (2.0, 98.0)
KINDS = ("uint16", "int16", "uint32", "float32", "float64", "int8")


def header(path: Path) -> tuple[tuple[int, int], bool]:
    """The stored (width, height) of a file, and whether it is deep."""
    with opened(path) as (_, _, size, deep):
        return size, deep


def samples(kind: str = "uint16", bands: int = 3, height: int = 37, width: int = 53) -> np.ndarray:
    """(height, width, bands) of 0 to 99, which 8 bits of 16 would show as black."""
    rng = np.random.default_rng(bands)
    return (rng.random((height, width, bands)) * 100).astype(kind)


def by_hand(values: np.ndarray, stretch: tuple[float, float] = STRETCH) -> np.ndarray:
    """(H, W, bands) -> (H, W, 3) uint8: each band from its percentiles to 0..255."""
    pytest.importorskip("rasterio")
    bands = []
    for band in np.moveaxis(values.astype(np.float64), -1, 0):
        low, high = np.percentile(band, stretch)
        bands.append(np.rint(((band - low) / (high - low) * 255).clip(0, 255)))
    bands = bands * 3 if len(bands) == 1 else bands
    return np.stack(bands, -1).astype(np.uint8)


def write_tiff(path: Path, values: np.ndarray, **options: Any) -> None:
    tifffile = pytest.importorskip("tifffile")
    tifffile.imwrite(path, values, **options)


def png16(path: Path, values: np.ndarray, transparent: tuple[int, ...] | None = None) -> None:
    """A 16-bit PNG in colour, or with alpha, written by hand; a row each of PNG's five filters."""
    import struct
    import zlib

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(
            ">I", zlib.crc32(name + content))

    height, width, bands = values.shape
    raw = np.ascontiguousarray(values.astype(">u2")).view(np.uint8).reshape(height, -1)
    rows = b""
    pixel = 2 * bands
    for y, row in enumerate(raw.astype(int)):
        left = np.concatenate((np.zeros(pixel, int), row[:-pixel]))
        up = raw[y - 1].astype(int) if y else np.zeros_like(row)
        corner = np.concatenate((np.zeros(pixel, int), up[:-pixel]))
        estimate = left + up - corner
        distance = np.abs(np.stack((estimate - left, estimate - up, estimate - corner)))
        paeth = np.choose(distance.argmin(0), (left, up, corner))
        filtered = row - (0 * row, left, up, (left + up) // 2, paeth)[y % 5]
        rows += bytes([y % 5]) + (filtered % 256).astype(np.uint8).tobytes()
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[bands]
    content = b"\x89PNG\r\n\x1a\n" + chunk(
        b"IHDR", struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0))
    if transparent:
        content += chunk(b"tRNS", struct.pack(f">{len(transparent)}H", *transparent))
    path.write_bytes(content + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


# ---------------------------------------------------------------- depth

@pytest.mark.parametrize("order, kind", [*itertools.product("<>", KINDS)])
def test_a_tiff_of_any_depth_is_stretched_band_by_band(
        tmp_path: Path, order: str, kind: str,
) -> None:
    values = samples(kind)
    planes = np.ascontiguousarray(np.moveaxis(values, -1, 0))
    path = tmp_path / "1.tif"
    for tile, compression, planar in itertools.product(
            (None, (16, 32)), (None, "zlib"), ("contig", "separate")):
        predictor = compression is not None and "float" not in kind
        write_tiff(
            path, planes if planar == "separate" else values, byteorder=order, tile=tile,
            compression=compression, predictor=predictor, planarconfig=planar,
            photometric="rgb", rowsperstrip=None if tile else 8)
        assert header(path) == ((53, 37), True)
        assert np.array_equal(read_rgb(path, STRETCH), by_hand(values))
        with pytest.raises(ImageError, match="16-bit or float .* or give --stretch 2 98"):
            read_rgb(path)


@pytest.mark.parametrize("compression", ["tiff_lzw", "packbits", "tiff_adobe_deflate", "zstd"])
@pytest.mark.parametrize("kind, predictor", [("uint16", 1), ("uint16", 2), ("float32", 3)])
def test_a_tiff_in_any_compression_of_bytes_is_read(
        tmp_path: Path, compression: str, kind: str, predictor: int,
) -> None:
    """Written by libtiff, because tifffile lacks its predictors."""
    values = samples(kind, 1)
    path = tmp_path / "1.tif"
    Image.fromarray(values[..., 0]).save(
        path, compression=compression,
        tiffinfo={317: predictor} if compression != "packbits" else {})
    assert np.array_equal(read_rgb(path, STRETCH), by_hand(values))


@pytest.mark.parametrize("bands", [2, 3, 4])
def test_a_16_bit_png_in_colour_keeps_its_low_bytes(tmp_path: Path, bands: int) -> None:
    path = tmp_path / "1.png"
    values = samples("uint16", bands)
    colours = bands - (bands + 1) % 2
    if colours < bands:
        values[..., -1] = 65535                      # opaque
    png16(path, values)
    assert header(path)[1]
    assert np.array_equal(read_rgb(path, STRETCH), by_hand(values[..., :colours]))
    with pytest.raises(ImageError, match="16-bit"):
        read_rgb(path)
    # The same values in 8 bits are not stretched.
    eight = values[..., :colours].astype(np.uint8)
    Image.fromarray(eight[..., 0] if colours == 1 else eight).save(path)
    want = np.broadcast_to(eight, (*eight.shape[:2], 3))
    assert np.array_equal(read_rgb(path, STRETCH), want) and not header(path)[1]


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_a_16_bit_gray_image_is_stretched(tmp_path: Path, suffix: str) -> None:
    values = samples("uint16", 1)
    Image.fromarray(values[..., 0]).save(tmp_path / f"1.{suffix}")
    for stretch in (STRETCH, (0.0, 100.0), (10.0, 90.5)):
        got = read_rgb(tmp_path / f"1.{suffix}", stretch)
        assert got.mode == "RGB" and np.array_equal(got, by_hand(values, stretch))


def test_a_stretch_by_hand(tmp_path: Path) -> None:
    """0 to 100 in steps of 1: 2 becomes black, 98 white, 50 the middle; NaN is ignored."""
    ramp = np.append(np.arange(101, dtype=np.float32), np.float32("nan"))[None]
    path = tmp_path / "1.tif"
    Image.fromarray(ramp).save(path)
    got = np.asarray(read_rgb(path, STRETCH))[0, :, 0]
    assert got[[0, 2, 50, 98, 100]].tolist() == [0, 0, 128, 255, 255] and got[101] == 0
    assert got[3] == round(255 / 96)
    # An image of one value has no contrast.
    Image.fromarray(np.full((9, 9), 7.5, np.float32)).save(path)
    assert not np.asarray(read_rgb(path, STRETCH)).any()
    Image.fromarray(np.full((9, 9), np.nan, np.float32)).save(path)
    assert not np.asarray(read_rgb(path, STRETCH)).any()


def test_white_may_be_zero(tmp_path: Path) -> None:
    values = samples("uint16", 1)
    write_tiff(tmp_path / "1.tif", values[..., 0], photometric="miniswhite")
    want = 255 - by_hand(values, (5, 98)).astype(int)
    assert np.abs(np.asarray(read_rgb(tmp_path / "1.tif", (2, 95))) - want).max() <= 1


@pytest.mark.parametrize("values, options, says", [
    (samples("uint16", 5), {"photometric": "minisblack", "planarconfig": "contig"},
     "5 bands of 16 bits .* which are red, green and blue"),
    (samples("uint8", 7), {"photometric": "minisblack", "planarconfig": "contig"}, "7 bands"),
    (samples("complex64", 1)[..., 0], {}, "sample formats 5 and 6")])
def test_what_is_not_read_is_named(
        tmp_path: Path, values: np.ndarray, options: dict[str, Any], says: str,
) -> None:
    write_tiff(tmp_path / "1.tif", values, **options)
    with pytest.raises(ImageError, match=says) as error:
        read_rgb(tmp_path / "1.tif", STRETCH)
    assert "\n" not in str(error.value)


def test_colour_of_formats_of_which_pil_drops_the_low_bytes(tmp_path: Path) -> None:
    values = samples()
    path = tmp_path / "1.ppm"
    path.write_bytes(b"P6 53 37 65535\n" + values.astype(">u2").tobytes())
    assert header(path)[1] and np.array_equal(read_rgb(path, STRETCH), by_hand(values))
    with pytest.raises(ImageError, match="16-bit"):
        read_rgb(path)
    path.write_bytes(b"P6 53 37 255\n" + values.astype(np.uint8).tobytes())
    assert np.array_equal(read_rgb(path), values)

    path = tmp_path / "1.jp2"
    Image.fromarray(samples("uint8")).save(path, irreversible=False)
    assert np.array_equal(read_rgb(path), samples("uint8"))
    rasterio = pytest.importorskip("rasterio")
    with rasterio.open(path, "w", driver="JP2OpenJPEG", width=53, height=37, count=3,
                       dtype="uint16", quality=100, reversible=True) as file:
        file.write(np.moveaxis(values, -1, 0))
    assert header(path)[1] and np.array_equal(read_rgb(path, STRETCH), by_hand(values))
    with pytest.raises(ImageError, match="16-bit"):
        read_rgb(path)


# ---------------------------------------------------------------- transparency and bands

def see_through(mode: str, path: Path) -> None:
    """Writes an 8-bit image: one third transparent, one half transparent, one opaque."""
    rgba = np.zeros((6, 9, 4), np.uint8)
    rgba[..., :3] = (200, 30, 90)
    rgba[..., 3] = np.repeat([0, 100, 255], 3)
    image = Image.fromarray(rgba)
    if mode == "tRNS":
        image = image.convert("RGB")
        image.putpixel((0, 0), (1, 2, 3))
        image.save(path, transparency=(1, 2, 3))
    elif mode == "palette":
        image.convert("RGB").quantize(4).save(path, transparency=0)
    else:
        image.convert(mode).save(path)


@pytest.mark.parametrize("mode, suffix", [
    ("RGBA", "png"), ("LA", "png"), ("RGBA", "tif"), ("RGBA", "webp"), ("palette", "png"),
    ("palette", "gif"), ("tRNS", "png")])
def test_transparency_is_composited_on_white_as_transformers_does(
        tmp_path: Path, mode: str, suffix: str,
) -> None:
    transforms = pytest.importorskip("transformers.image_transforms")
    path = tmp_path / f"1.{suffix}"
    see_through(mode, path)
    got = np.asarray(read_rgb(path))
    want = transforms.convert_to_rgb(Image.open(path), return_numpy=True)
    assert np.array_equal(got, want)
    assert (got == 255).all(-1).any()
    # Not what PIL's own conversion gives.
    assert not np.array_equal(got, Image.open(path).convert("RGB"))


@pytest.mark.parametrize("kind", ["uint8", "uint16"])
@pytest.mark.parametrize("planar", ["contig", "separate"])
@pytest.mark.parametrize("extra", [(), (0,), (2,)])
def test_a_fourth_band_is_alpha_only_where_the_file_says_so(
        tmp_path: Path, kind: str, planar: str, extra: tuple[int, ...],
) -> None:
    path = tmp_path / "1.tif"
    values = samples(kind, 4)
    values[:, :20, 3] = 0
    write_tiff(
        path, values if planar == "contig" else np.ascontiguousarray(np.moveaxis(values, -1, 0)),
        photometric="rgb", planarconfig=planar, extrasamples=extra or (0,))
    if not extra:
        forget_extra_samples(path)
        assert 338 not in Image.open(path).tag_v2
    got = np.asarray(read_rgb(path, STRETCH))
    colour = values[..., :3] if kind == "uint8" else by_hand(values[..., :3])
    if extra == (2,):
        assert (got[:, :20] == 255).all()
    else:
        assert np.array_equal(got, colour)


def forget_extra_samples(path: Path) -> None:
    """Overwrites the tag 338 of a little-endian TIFF by a private one."""
    content = bytearray(path.read_bytes())
    place = content.find(b"\x52\x01\x03\x00\x01\x00\x00\x00")
    # 339, the sample format, follows it and says 1 for each band, which is the default.
    content[place:place + 2] = (337).to_bytes(2, "little")
    path.write_bytes(content)


def test_alpha_of_16_bits(tmp_path: Path) -> None:
    """Opaque: the colour; half transparent: half way to white; transparent: white."""
    values = np.zeros((3, 9, 4), np.uint16)
    values[..., :3] = np.arange(9)[:, None] * 100
    values[..., 3] = np.repeat([65535, 32768, 0], 3)
    png16(tmp_path / "1.png", values)
    write_tiff(tmp_path / "1.tif", values, photometric="rgb", extrasamples=(2,))
    # The six visible values go from 0 to 500.
    want = [0, 51, 102, 204, 229, 255, 255, 255, 255]
    for name in ("1.png", "1.tif"):
        got = np.asarray(read_rgb(tmp_path / name, (0, 100)))[0, :, 0].astype(int)
        assert np.abs(got - want).max() <= 1, got
    png16(tmp_path / "2.png", values[..., :3], (100, 100, 100))
    got = np.asarray(read_rgb(tmp_path / "2.png", (0, 100)))[0, :, 0]
    assert got[0] == 0 and got[1] == 255 and got[2] == 64


# ---------------------------------------------------------------- orientation

@pytest.mark.parametrize("suffix", ["tif", "jpg", "png", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_no_orientation_turns_size_or_pixels(
        tmp_path: Path, suffix: str, orientation: int,
) -> None:
    plain = tmp_path / f"plain.{suffix}"
    tagged = tmp_path / f"tagged.{suffix}"
    image = Image.fromarray(samples("uint8"))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(plain)
    image.save(tagged, exif=exif)
    assert header(tagged)[0] == (53, 37)
    assert images.read_orientation(tagged) == orientation
    assert images.is_plain(tagged) == (orientation == 1)
    assert np.array_equal(read_rgb(tagged), read_rgb(plain))


def test_a_tiff_of_16_bits_is_not_turned_either(tmp_path: Path) -> None:
    values = samples()
    write_tiff(
        tmp_path / "1.tif", values, photometric="rgb", extratags=[(274, 3, 1, 6, True)])
    assert images.read_orientation(tmp_path / "1.tif") == 6
    assert np.array_equal(read_rgb(tmp_path / "1.tif", STRETCH), by_hand(values))


# ---------------------------------------------------------------- in a data set

def one_record(folder: Path, name: str) -> None:
    (folder / "test.jsonl").write_text(
        f'{{"image": "{name}", "text": "a ship", "box": [1, 2, 30, 30]}}\n')


def test_a_data_set_of_16_bits_is_refused_with_the_flag_and_read_with_it(tmp_path: Path) -> None:
    values = samples()
    write_tiff(tmp_path / "1.tif", values, photometric="rgb")
    one_record(tmp_path, "1.tif")
    records = load("jsonl", tmp_path, "test")
    assert not records and records.refusals == {"16-bit or float image": 1}
    says = data.refusal_summary(records, "jsonl", tmp_path, "test")
    assert "--stretch 2 98 reads 16-bit and float images" in says
    record = load("jsonl", tmp_path, "test", stretch=[2, 98])[0]
    assert record.stretch == STRETCH and record.size == (53, 37)
    assert np.array_equal(data.open_image(record), by_hand(values))


def test_the_size_that_boxes_are_cut_to_is_the_stored_one(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (53, 37)).save(tmp_path / "1.tif", exif=exif)
    one_record(tmp_path, "1.tif")
    record = load("jsonl", tmp_path, "test")[0]
    assert record.size == data.open_image(record).size == (53, 37)
    assert record.box == (1.0, 2.0, 30.0, 30.0)


# ---------------------------------------------------------------- damaged files

def encoded(write: Callable[[Path], None], path: Path) -> bytes:
    write(path)
    return path.read_bytes()


@pytest.fixture(scope="module")
def whole_files(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, bytes]]:
    """(suffix, content) of small images of many kinds."""
    path = tmp_path_factory.mktemp("whole") / "1"
    plain = Image.fromarray(samples("uint8"))
    files = []
    for suffix in ("jpg", "png", "tif", "bmp", "webp", "gif", "jp2"):
        buffer = io.BytesIO()
        plain.save(buffer, {"jpg": "JPEG", "tif": "TIFF", "jp2": "JPEG2000"}.get(suffix, suffix))
        files.append((suffix, buffer.getvalue()))
    files.append(("png", encoded(lambda p: png16(p, samples()), path)))
    for options in ({}, {"compression": "zlib", "tile": (16, 16)}, {"bigtiff": True}):
        files.append(("tif", encoded(
            lambda p, o=options: write_tiff(p, samples(), photometric="rgb", **o), path)))
    buffer = io.BytesIO()
    Image.fromarray(samples("uint16", 1)[..., 0]).save(buffer, "TIFF", compression="tiff_lzw")
    files.append(("tif", buffer.getvalue()))
    return files


def test_a_damaged_image_is_one_line_or_an_image(
        whole_files: list[tuple[str, bytes]], tmp_path: Path,
) -> None:
    """Bytes flipped or cut: either an image of the header's size, or a DataError."""
    hypothesis = pytest.importorskip("hypothesis")
    strategies = pytest.importorskip("hypothesis.strategies")

    @hypothesis.given(strategies.data())
    def damage(draw: Any) -> None:
        suffix, content = draw.draw(strategies.sampled_from(whole_files))
        content = bytearray(content)
        # Half of the flips are in the header, which has most of the fields that matter.
        place = strategies.one_of(
            strategies.integers(0, min(len(content), 300) - 1),
            strategies.integers(0, len(content) - 1))
        for at, byte in draw.draw(strategies.lists(
                strategies.tuples(place, strategies.integers(0, 255)), max_size=6)):
            content[at] = byte
        content = content[:draw.draw(strategies.integers(0, len(content)))] if draw.draw(
            strategies.booleans()) else content
        path = tmp_path / f"1.{suffix}"
        path.write_bytes(content)
        for stretch in (None, STRETCH):
            collector = collect.Collector(tmp_path, exact=True)
            collector.stretch = stretch
            try:
                _, size, _ = collector.find(path.name)
            except Refused:
                size = None
            if size and size[0] * size[1] < 1 << 24:
                try:
                    image = data.open_image(
                        Record("1", path, "x", (0, 0, 1, 1), "", size, stretch=stretch))
                    assert image.size == size and image.mode == "RGB"
                except DataError as error:
                    assert "\n" not in str(error)
    damage()


def test_a_file_that_claims_to_be_huge_is_refused_before_memory_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "1.tif"
    for compression in (None, "zlib"):
        write_tiff(path, samples(), photometric="rgb", compression=compression, rowsperstrip=37)
        content = bytearray(path.read_bytes())
        for tag, value in ((256, 2_000_000_000), (257, 2_000_000_000), (278, 2_000_000_000)):
            head = tag.to_bytes(2, "little")
            place = content.find(head + b"\x04\x00\x01\x00\x00\x00")
            if place < 0:
                place = content.find(head + b"\x03\x00\x01\x00\x00\x00")
                content[place + 2] = 4
            content[place + 8:place + 12] = value.to_bytes(4, "little")
        path.write_bytes(content)
        with pytest.raises(ImageError, match="damaged"):
            read_rgb(path, STRETCH)


def test_a_pil_image_of_16_bits_is_refused_too(tmp_path: Path) -> None:
    """The processor takes PIL images that read_rgb has not seen."""
    png16(tmp_path / "1.png", samples())
    with pytest.raises(ImageError, match="16-bit"):
        images.rgb(Image.open(tmp_path / "1.png"))


def test_a_truncated_file_of_16_bits_is_refused_with_a_reason(tmp_path: Path) -> None:
    pytest.importorskip("rasterio")
    png16(tmp_path / "1.png", samples())
    write_tiff(tmp_path / "1.tif", samples(), photometric="rgb")
    write_tiff(tmp_path / "2.tif", samples(), photometric="rgb", compression="zlib", tile=(16, 16))
    for path in sorted(tmp_path.glob("*")):
        path.write_bytes(path.read_bytes()[:-500])
        with pytest.raises(ImageError, match="damaged, or of a kind that GDAL cannot read .*fail"):
            read_rgb(path, STRETCH)


def test_without_rasterio_one_line_says_how_to_install_it(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    png16(tmp_path / "1.png", samples())
    Image.fromarray(samples("uint8")).save(tmp_path / "8.tif")
    monkeypatch.setitem(sys.modules, "rasterio", None)
    one_record(tmp_path, "1.png")
    record, = load("jsonl", tmp_path, "test", stretch=[2, 98])
    # Not an UnreadableImage, which a run would replace by another record.
    with pytest.raises(DataError, match="not installed; pip install rasterio") as error:
        data.open_image(record)
    assert type(error.value) is DataError and "\n" not in str(error.value)
    assert np.array_equal(read_rgb(tmp_path / "8.tif"), samples("uint8"))
