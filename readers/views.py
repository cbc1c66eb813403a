"""Pictures that nobody annotated: which to ask about, their tiles, and their place on a map.

rasterio, imported lazily, reads where an image lies on a map. Such an image stays as it is stored;
any other picture is turned upright by its EXIF, as viewers show it.
"""
import functools
import glob
import json
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image, ImageOps

from readers.base import DataError, Record, Stretch, UnreadableImage, read_json_lines
from readers.collect import IMAGE_SUFFIXES, visible_files
from readers.images import ImageError, read_orientation, read_rgb

Window = tuple[int, int, int, int]               # x1, y1, x2, y2: pixels of the picture


@dataclass(frozen=True)
class View:
    """A picture, or a tile of it: the image of a Record, opened when it is needed."""
    path: Path
    window: Window
    stretch: Stretch | None

    def draw(self) -> Image.Image:
        return read_picture(self.path, self.stretch)[0].crop(self.window)


@functools.lru_cache(maxsize=2)                  # a picture's tiles follow each other
def read_picture(path: Path, stretch: Stretch | None) -> tuple[Image.Image, bool, Any, Any]:
    """-> image, whether it is turned, and its place as `read_place` gives it."""
    try:
        image, (transform, crs) = read_rgb(path, stretch), read_place(path)
        orientation = 1 if crs else read_orientation(path)
    except (OSError, ImageError) as error:
        raise UnreadableImage(f"{path}: unreadable ({error})") from None
    image.getexif()[ExifTags.Base.Orientation] = orientation
    return ImageOps.exif_transpose(image), orientation != 1, transform, crs


def read_place(path: Path) -> tuple[Any, Any]:
    """-> rasterio's transform, from pixels to the map, and coordinate system of the map. Both None
    if the file lacks one of them, or rasterio is not installed."""
    try:
        import rasterio
    except ImportError:
        if path.suffix.lower().startswith(".tif"):
            warnings.warn("where a TIFF lies on the map needs: pip install rasterio", stacklevel=2)
        return None, None
    # An error means a format that GDAL does not know.
    with suppress(rasterio.errors.RasterioError), rasterio.open(path) as source:
        if source.crs and not source.transform.is_identity:
            return source.transform, source.crs
    return None, None


def windows(size: tuple[int, int], tile: int, overlap: int) -> list[Window]:
    """Windows of tile x tile pixels that cover an image, row by row. Neighbours share `overlap`
    pixels; the last ones, which end at the image's edge, may share more.

    >>> windows((1000, 500), tile=800, overlap=200)
    [(0, 0, 800, 500), (200, 0, 1000, 500)]
    """
    starts = []
    for side in size:
        steps = range(0, max(side - overlap, 1), tile - overlap)
        starts.append(sorted({min(start, max(side - tile, 0)) for start in steps}))
    return [(x, y, min(x + tile, size[0]), min(y + tile, size[1]))
            for y in starts[1] for x in starts[0]]


def view_records(identity: str, path: Path, text: str, stretch: Stretch | None,
                 tile: int | None, overlap: int) -> list[Record]:
    """A question about a picture -> a record without a box for each tile; tile None: for all."""
    stretch = tuple(stretch) if stretch else None
    size = read_picture(path, stretch)[0].size
    records = []
    for window in windows(size, tile or max(size), overlap):
        tile_size = (window[2] - window[0], window[3] - window[1])
        view = View(path, window, stretch)
        records.append(Record(identity, view, text, None, "", tile_size, stretch=stretch))
    return records


def read_questions(images: Sequence[str], text: str | None) -> list[tuple[str, Path, str]]:
    """--image and --text -> (id, path, expression) of each question."""
    questions = []
    for name in images:
        path = Path(name)
        if path.suffix == ".jsonl":
            for number, row in read_json_lines(path):
                image, expression = (row or {}).get("image"), (row or {}).get("text") or text
                if not isinstance(image, str) or not isinstance(expression, str):
                    raise DataError(f'{path}, line {number}: it needs an "image", a path from the '
                                    'folder of the file, and a "text", unless --text is given')
                identity = str(row.get("id", f"{path.stem}-{number}"))
                questions.append((identity, path.parent / image, expression))
            continue
        files = sorted(map(Path, glob.glob(name, recursive=True))) or [path]
        if path.is_dir():
            files = [p for p in visible_files(path, "*") if p.suffix.lower() in IMAGE_SUFFIXES]
        questions += [(str(file), file, text) for file in files]
    if not questions:
        raise DataError(f"--image {' '.join(images)}: no image there")
    return questions


def write_geojson(stem: Path, places: Sequence[tuple[Any, Any, dict[str, Any]]]) -> None:
    """places: transform, coordinate system and line of answers.jsonl of each box. Every system has
    a file, since a GeoJSON file has only one. The property lon_lat has the corners in degrees."""
    stem.with_name(f"{stem.name}.geojson").unlink(missing_ok=True)       # of an earlier question
    systems: dict[Any, list[dict[str, Any]]] = {}
    for (a, b, c, d, e, f, *_), crs, line in places:
        x1, y1, x2, y2 = line["box"]
        # Counterclockwise on the map, where y points up, also if the image is mirrored.
        corners = [(x1, y1), (x1, y2), (x2, y2), (x2, y1)][::-1 if a * e > b * d else 1]
        ring = [(a * x + b * y + c, d * x + e * y + f) for x, y in corners]
        keys = ("id", "image", "expression", "box", "score", "touches")
        properties = {key: line[key] for key in keys}
        with suppress(Exception):                # of any type, if it is no place on the earth
            from rasterio.warp import transform
            properties["lon_lat"] = list(zip(*transform(crs, "EPSG:4326", *zip(*ring))))
        systems.setdefault(crs, []).append({
            "type": "Feature", "properties": properties,
            "geometry": {"type": "Polygon", "coordinates": [[*ring, ring[0]]]}})
    for k, (system, features) in enumerate(systems.items(), 1):
        authority = system.to_authority()
        name = "urn:ogc:def:crs:{}::{}".format(*authority) if authority else system.to_wkt()
        file = stem.with_name(f"{stem.name}{f'_{k}' if k > 1 else ''}.geojson")
        file.write_text(json.dumps({
            "type": "FeatureCollection", "features": features,
            "crs": {"type": "name", "properties": {"name": name}}}) + "\n")
        print(f"on the map: {file}")
