"""Questions about pictures that nobody annotated (`eval.py --image`, `eval.ask`), their tiles, and
their boxes on a map."""
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import eval as evaluation
from conftest import Run
from qwen.hub import CheckpointError
from readers import views
from readers.base import DataError, Record
from report.predictions import read_predictions
from test_eval import FakeProcessor, stage

rasterio = pytest.importorskip("rasterio")
UTM = "EPSG:32632"
ROOT = Path(__file__).parents[1]
Ask = Callable[..., str]                         # runs eval.py with these flags -> its output


def geotiff(path: Path, matrix: Sequence[float] | None, crs: str | None = UTM,
            size: tuple[int, int] = (80, 60), colour: int = 10) -> Path:
    """An RGB GeoTIFF of one colour. matrix: a to f of rasterio's transform."""
    transform = rasterio.Affine(*matrix) if matrix else None
    with rasterio.open(path, "w", driver="GTiff", width=size[0], height=size[1], count=3,
                       dtype="uint8", crs=crs, transform=transform) as file:
        file.write(np.full((3, size[1], size[0]), colour, np.uint8))
    return path


# ---------------------------------------------------------------- windows

def test_windows_by_hand() -> None:
    assert views.windows((300, 200), 100, 0) == [
        (0, 0, 100, 100), (100, 0, 200, 100), (200, 0, 300, 100),
        (0, 100, 100, 200), (100, 100, 200, 200), (200, 100, 300, 200)]
    # Steps of 60: 0, 60, 120, and the last window ends at 210.
    assert [w[::2] for w in views.windows((210, 50), 100, 40)] == [
        (0, 100), (60, 160), (110, 210)]
    assert views.windows((90, 250), 100, 50) == [
        (0, 0, 90, 100), (0, 50, 90, 150), (0, 100, 90, 200), (0, 150, 90, 250)]


@pytest.mark.parametrize("tile, overlap", [(1, 0), (7, 0), (7, 3), (7, 6), (30, 29)])
def test_windows_cover_each_pixel_and_share_the_overlap(tile: int, overlap: int) -> None:
    for width in range(1, 40):
        seen = np.zeros(width, int)
        found = views.windows((width, 5), tile, overlap)
        for x1, _, x2, _ in found:
            seen[x1:x2] += 1
            assert x2 - x1 == min(tile, width)
        rows = len({w[1] for w in found})
        columns = sorted({w[::2] for w in found})
        assert (seen == 0).sum() == 0 and len(columns) * rows == len(found)
        assert all(a[1] - b[0] >= overlap for a, b in zip(columns, columns[1:]))


# ---------------------------------------------------------------- places on a map

def on_map(file: Path, box: Sequence[float]) -> tuple[list[list[float]], dict[str, Any]]:
    """The polygon of a box in an image's GeoJSON, and its properties."""
    line = dict.fromkeys(("id", "expression", "score", "touches")) | {
        "image": str(file), "box": box}
    views.write_geojson(file, [(*views.read_place(file), line)])
    [feature] = json.loads(file.with_name(f"{file.name}.geojson").read_text())["features"]
    [ring] = feature["geometry"]["coordinates"]
    return ring, feature["properties"]


def test_a_box_on_a_map_by_hand(tmp_path: Path) -> None:
    """Pixels of 0.5 m, the image's corner at (400000, 5000000)."""
    file = geotiff(tmp_path / "a.tif", (0.5, 0, 400_000, 0, -0.5, 5_000_000))
    ring, properties = on_map(file, (10.0, 20.0, 30.0, 60.0))
    assert ring == [[400_005, 4_999_990], [400_005, 4_999_970], [400_015, 4_999_970],
                    [400_015, 4_999_990], [400_005, 4_999_990]]
    assert properties["image"] == str(file)


TRANSFORMS = {
    "north up": (0.3, 0, 400_000.123, 0, -0.3, 5_000_000.456),
    "rotated": (0.26, 0.15, 400_000.0, 0.15, -0.26, 5_000_000.0),
    "turned by 90": (0, 0.5, 400_000.0, 0.5, 0, 5_000_000.0),
    "south up": (0.3, 0, 400_000.0, 0, 0.3, 5_000_000.0),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_corners_are_those_of_rasterios_transform(name: str, tmp_path: Path) -> None:
    file = geotiff(tmp_path / "a.tif", TRANSFORMS[name])
    box = (3.25, 7.5, 41.125, 50.75)
    ring, properties = on_map(file, box)
    with rasterio.open(file) as source:
        # The inverse of its own transform gives the pixels back.
        pixels = [(~source.transform) @ point for point in ring]
        degrees = rasterio.warp.transform(source.crs, "EPSG:4326", *zip(*ring[:4]))
    corners = {(3.25, 7.5), (3.25, 50.75), (41.125, 50.75), (41.125, 7.5)}
    for point in corners:
        assert min(max(abs(p[0] - point[0]), abs(p[1] - point[1])) for p in pixels) < 1e-6
    assert ring[0] == ring[4] and len(set(map(tuple, ring))) == 4
    twice_area = sum(a[0] * b[1] - a[1] * b[0] for a, b in zip(ring, ring[1:]))
    assert twice_area > 0                        # counterclockwise
    assert np.allclose(properties["lon_lat"], list(zip(*degrees)), atol=1e-12, rtol=0)
    longitude, latitude = properties["lon_lat"][0]
    assert 7.7 < longitude < 7.8 and 45.1 < latitude < 45.2


def test_an_image_without_a_place_has_none(tmp_path: Path) -> None:
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    files = [tmp_path / "a.png", geotiff(tmp_path / "no_crs.tif", TRANSFORMS["rotated"], None),
             geotiff(tmp_path / "no_transform.tif", None)]
    for file in files:
        assert views.read_place(file) == (None, None)
    # Neither is a local system on the earth, but it has coordinates.
    local = geotiff(tmp_path / "b.tif", TRANSFORMS["rotated"], 'LOCAL_CS["site",UNIT["metre",1]]')
    ring, properties = on_map(local, (1.0, 1.0, 2.0, 2.0))
    assert len(ring) == 5 and "lon_lat" not in properties


def test_without_rasterio_a_tiff_has_no_place_and_one_line_says_so(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = geotiff(tmp_path / "a.tif", TRANSFORMS["rotated"])
    monkeypatch.setitem(sys.modules, "rasterio", None)
    with pytest.warns(UserWarning, match="pip install rasterio"):
        assert views.read_place(file) == (None, None)


# ---------------------------------------------------------------- which pictures

def test_questions_of_a_folder_a_pattern_and_a_list(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a/b").mkdir(parents=True)
    for name in ("a/2.PNG", "a/1.tif", "a/.hidden.png", "a/note.txt", "a/b/3.jpg"):
        Path(name).touch()
    asked = views.read_questions(["a"], "the pool")
    assert asked == [("a/1.tif", Path("a/1.tif"), "the pool"),
                     ("a/2.PNG", Path("a/2.PNG"), "the pool")]
    assert [q[0] for q in views.read_questions(["a/**/*.jpg"], "x")] == ["a/b/3.jpg"]
    assert [q[0] for q in views.read_questions(["a/2.PNG", "none.png"], "x")] == [
        "a/2.PNG", "none.png"]
    Path("a/list.jsonl").write_text(
        '{"image": "2.PNG", "text": "the red car"}\n\n{"image": "b/3.jpg", "id": 7}\n')
    assert views.read_questions(["a/list.jsonl"], "the pool") == [
        ("list-1", Path("a/2.PNG"), "the red car"), ("7", Path("a/b/3.jpg"), "the pool")]
    with pytest.raises(DataError, match='list.jsonl, line 3: it needs an "image"'):
        views.read_questions(["a/list.jsonl"], None)
    Path("empty").mkdir()
    with pytest.raises(DataError, match="--image empty: no image there"):
        views.read_questions(["empty"], "x")


# ---------------------------------------------------------------- the script

# Red of the first pixel of what is shown -> the box in its own pixels, or None, and each token's
# log-probability.
ANSWERS = {
    10: ((8, 4, 28, 24), -0.5), 20: ((0, 10, 16, 30), -0.1), 30: (None, -0.01),
    40: ((12, 12, 40, 39), -0.9)}


class Exact(FakeProcessor):
    """Nothing is resized, so boxes are pixels of what is shown."""

    def __call__(self, image: Image.Image, text: str) -> SimpleNamespace:
        prompt = super().__call__(image, text)
        prompt.frame = evaluation.answer.Frame(image.size, image.size, "absolute")
        return prompt


def fake_generate(
        model: None, prompts: Sequence[SimpleNamespace], group: int, max_new_tokens: int,
        temperature: float, seeds: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    texts, logprobs = [], []
    for prompt in prompts:
        box, logprob = ANSWERS[prompt.colour]
        texts.append(f'<answer>{{"bbox_2d": {list(box)}}}</answer>' if box else "none")
        logprobs.append(logprob)
    tokens = torch.zeros(len(texts), 1, max(map(len, texts)), dtype=torch.long)
    chances = torch.zeros(tokens.shape)
    for i, text in enumerate(texts):
        tokens[i, 0, :len(text)] = torch.tensor(list(map(ord, text)))
        chances[i, 0, :len(text)] = logprobs[i]
    return tokens, chances, torch.tensor([[len(text)] for text in texts])


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> Ask:
    monkeypatch.setattr(evaluation, "generate", fake_generate)
    monkeypatch.setattr(evaluation, "open_model", lambda folder, device: (None, Exact()))
    stage(tmp_path / "ckpt" / "rft", tmp_path)
    monkeypatch.chdir(tmp_path)

    def ask(*flags: object) -> str:
        capfd.readouterr()
        command = ["eval.py", "ckpt", *flags, "--device", "cpu"]
        monkeypatch.setattr(sys, "argv", list(map(str, command)))
        evaluation.main()
        return capfd.readouterr().out
    return ask


def paint(path: Path, *colours: int, side: int = 40) -> Path:
    """Tiles of these colours from left to right."""
    image = Image.new("RGB", (side * len(colours), side))
    for i, colour in enumerate(colours):
        image.paste((colour, 0, 0), (side * i, 0, side * (i + 1), side))
    image.save(path)
    return path


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_folder_of_pictures(script: Ask, tmp_path: Path) -> None:
    """Two have a box, one has none, one is no picture; one lies on a map."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    geotiff(folder / "a.tif", (0.5, 0, 400_000, 0, -0.5, 5_000_000), colour=10)
    paint(folder / "b.png", 20)
    paint(folder / "c.png", 30)
    (folder / "d.png").write_bytes(b"no picture")
    printed = script("--image", "pictures", "--text", "the pool", "--batch", 2)
    out = tmp_path / "ckpt" / "eval"
    a, b, c = lines_of(out / "answers.jsonl")
    assert (a["id"], a["image"], a["expression"]) == ("pictures/a.tif",) * 2 + ("the pool",)
    assert (a["box"], a["score"], a["touches"]) == ([8, 4, 28, 24], -0.5, [])
    assert (b["box"], b["score"], b["touches"]) == ([0, 10, 16, 30], -0.1, ["left"])
    assert (c["box"], c["failure"], c["touches"]) == (None, "no answer", [])
    assert ("pictures/a.tif, the pool; box in pixels of the picture: 8.0, 4.0, 28.0, 24.0; "
            "score -0.500; drawn: ckpt/eval/a_answer_1.png\n") in printed
    assert "score -0.100; it may be cut at the left; drawn" in printed
    assert "pictures/c.png, the pool; no box: no answer\n" in printed
    assert "not asked: pictures/d.png: unreadable" in printed
    assert "\nanswers: ckpt/eval/answers.jsonl\non the map: ckpt/eval/answers.geojson\n" in printed
    assert sorted(p.name for p in out.iterdir()) == [
        "a_answer_1.png", "answers.geojson", "answers.jsonl", "b_answer_2.png"]
    assert Image.open(out / "b_answer_2.png").getpixel((0, 20)) == evaluation.RED
    # One feature, in the image's own coordinates.
    collection = json.loads((out / "answers.geojson").read_text())
    assert collection["type"] == "FeatureCollection"
    assert collection["crs"] == {"type": "name",
                                 "properties": {"name": "urn:ogc:def:crs:EPSG::32632"}}
    [feature] = collection["features"]
    assert feature["geometry"] == {"type": "Polygon", "coordinates": [[
        [400_004, 4_999_998], [400_004, 4_999_988], [400_014, 4_999_988], [400_014, 4_999_998],
        [400_004, 4_999_998]]]}
    properties = feature["properties"]
    assert properties["box"] == [8, 4, 28, 24] and properties["score"] == -0.5
    assert len(properties.pop("lon_lat")) == 4
    assert set(properties) == {"id", "image", "expression", "box", "score", "touches"}


def test_the_lines_are_predictions_that_can_be_scored(script: Ask, tmp_path: Path) -> None:
    paint(tmp_path / "1.png", 10)
    paint(tmp_path / "2.png", 20, 10)
    lines = [{"image": "1.png", "text": "the pool"}, {"image": "2.png", "text": "the car"}]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    records = [Record(f"test-{i}", None, "x", (0.0, 0.0, 1.0, 1.0), "", size)
               for i, size in ((1, (40, 40)), (2, (80, 40)))]
    for tile in ((), ("--tile", 40)):
        script("--image", "test.jsonl", *tile)
        read = read_predictions(tmp_path / "ckpt" / "eval" / "answers.jsonl", records)
        assert evaluation.predictions.strict_boxes(records, list(read.values())).tolist() == [
            [8, 4, 28, 24], [0, 10, 16, 30]]


def test_files_of_two_coordinate_systems(script: Ask, tmp_path: Path) -> None:
    geotiff(tmp_path / "a.tif", TRANSFORMS["north up"])
    geotiff(tmp_path / "b.tif", TRANSFORMS["north up"], "EPSG:32633")
    geotiff(tmp_path / "c.tif", TRANSFORMS["north up"])
    printed = script("--image", "a.tif", "b.tif", "c.tif", "--text", "x", "--out", "asked")
    named = {}
    for name in ("answers.geojson", "answers_2.geojson"):
        collection = json.loads((tmp_path / "asked" / name).read_text())
        ids = [feature["properties"]["id"] for feature in collection["features"]]
        named[collection["crs"]["properties"]["name"]] = ids
        assert f"on the map: asked/{name}" in printed
    assert named == {"urn:ogc:def:crs:EPSG::32632": ["a.tif", "c.tif"],
                     "urn:ogc:def:crs:EPSG::32633": ["b.tif"]}


def test_an_image_without_a_place_gives_no_geojson(script: Ask, tmp_path: Path) -> None:
    geotiff(tmp_path / "a.tif", TRANSFORMS["north up"])
    script("--image", "a.tif", "--text", "x", "--out", "asked")
    assert (tmp_path / "asked" / "a_answer.geojson").exists()
    geotiff(tmp_path / "a.tif", None, None)
    views.read_picture.cache_clear()
    printed = script("--image", "a.tif", "--text", "x", "--out", "asked")
    assert not list((tmp_path / "asked").glob("*.geojson")) and "map" not in printed


def test_a_picture_on_a_map_is_never_turned(tmp_path: Path) -> None:
    """Its transform is about stored pixels, whatever its orientation tag says."""
    tags = {}
    with Image.open(geotiff(tmp_path / "a.tif", TRANSFORMS["north up"])) as image:
        for tag in (33550, 33922, 34735, 34736, 34737):
            if tag in image.tag_v2:
                tags[tag] = image.tag_v2[tag]
        for name, some in (("on_map", {274: 6, **tags}), ("off_map", {274: 6})):
            image.save(tmp_path / f"{name}.tif", tiffinfo=some)
    image, turned, _, crs = views.read_picture(tmp_path / "on_map.tif", None)
    assert image.size == (80, 60) and crs and not turned
    image, turned, _, crs = views.read_picture(tmp_path / "off_map.tif", None)
    assert image.size == (60, 80) and not crs and turned


def test_the_likeliest_tile_with_a_box_answers(script: Ask, tmp_path: Path) -> None:
    """Tiles of 40: -0.5, -0.01 without a box, -0.1 (at its left edge), -0.9."""
    paint(tmp_path / "scene.png", 10, 30, 20, 40)
    printed = script("--image", "scene.png", "--text", "x", "--tile", 40)
    [line] = lines_of(tmp_path / "ckpt" / "eval" / "scene_answer.jsonl")
    assert line["box"] == [80, 10, 96, 30] and line["score"] == -0.1
    assert line["tile"] == [80, 0, 120, 40] and line["touches"] == ["left"]
    assert "box in pixels of the picture: 80.0, 10.0, 96.0, 30.0\nscore -0.100" in printed
    # The tiles at 0, 20, 40 ... show colours of two tiles; the first pixel is the left one's.
    script("--image", "scene.png", "--text", "x", "--tile", 40, "--overlap", 20)
    [line] = lines_of(tmp_path / "ckpt" / "eval" / "scene_answer.jsonl")
    assert line["tile"] == [80, 0, 120, 40]
    paint(tmp_path / "none.png", 30, 30)
    assert "no box: no answer" in script("--image", "none.png", "--text", "x", "--tile", 40)


@pytest.mark.parametrize("box, touches", [
    ((2, 2, 38, 38), []), ((1, 2, 39, 38), ["left", "right"]),
    ((0, 0, 40, 40), ["left", "top", "right", "bottom"])])
def test_which_edges_a_box_touches(box: tuple, touches: list[str]) -> None:
    view = views.View(Path("a.png"), (100, 200, 140, 240), None)
    record = Record("a", view, "x", None, "", (40, 40))
    line = evaluation.likeliest([record], [{"id": "a", "box": [*map(float, box)], "score": -1.0}])
    assert line["touches"] == touches
    assert line["box"] == (box[0] + 100, box[1] + 200, box[2] + 100, box[3] + 200)


def test_an_answer_in_another_format_is_read_leniently(
        script: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ANSWERS, 10, (None, -0.2))
    monkeypatch.setattr(FakeProcessor, "decode", lambda self, ids: "[10, 10, 20, 20]")
    paint(tmp_path / "a.png", 10)
    printed = script("--image", "a.png", "--text", "x")
    assert "10.0, 10.0, 20.0, 20.0\nscore -0.200\nread leniently: no answer" in printed


@pytest.mark.parametrize("flags, says", [
    (("--image", "a.png"), "--image and --text go together"),
    (("--text", "x"), "--image and --text go together"),
    (("--tile", "40"), "--tile is about --image"),
    (("--image", "a.png", "--text", "x", "--tile", "40", "--overlap", "40"), "smaller than --tile"),
    (("other", "--image", "a.png", "--text", "x"), "--image asks one checkpoint"),
])
def test_a_wrong_question_is_one_line(
        script: Ask, flags: tuple[str, ...], says: str, capfd: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        script(*flags)
    error = capfd.readouterr().err
    assert stop.value.code == 2 and says in error and error.count("\n") == 1


# ---------------------------------------------------------------- from Python

def test_ask_from_python_is_what_the_script_answers(
        tiny_checkpoint: Path, run: Run, tmp_path: Path) -> None:
    """A random model: no box, but text and score are those of eval.py. The score is a mean."""
    Image.new("RGB", (60, 50), "red").save(tmp_path / "a.png")
    box, text, score = evaluation.ask(
        tiny_checkpoint, tmp_path / "a.png", "the ship", max_new_tokens=6, device="cpu")
    done = run("eval.py", tiny_checkpoint, "--image", tmp_path / "a.png", "--text", "the ship",
               "--max-new-tokens", 6, "--device", "cpu", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    [line] = lines_of(tmp_path / "out" / "a_answer.jsonl")
    assert box is None and (text, score) == (line["text"], pytest.approx(line["score"], abs=1e-5))
    model, processor = evaluation.open_model(tiny_checkpoint, torch.device("cpu"))
    prompt = processor(Image.open(tmp_path / "a.png"), "the ship")
    _, logprobs, lengths = evaluation.generate(model, [prompt], 1, 6, 0.0, torch.tensor([0]))
    n = int(lengths)
    assert score == pytest.approx(logprobs[0, 0, :n].mean().item(), abs=1e-5)
    before = evaluation.open_once.cache_info().hits
    evaluation.ask(tiny_checkpoint, tmp_path / "a.png", "x", max_new_tokens=1, device="cpu")
    assert evaluation.open_once.cache_info().hits == before + 1


# ---------------------------------------------------------------- where eval.py writes

@pytest.mark.parametrize("flags", [
    ("--image", "a.png", "--text", "x"), ("--data", "synth-one", "--limit", 2, "--split", "val")])
def test_nothing_is_written_into_a_folder_of_weights(
        flags: tuple, tiny_checkpoint: Path, run: Run, tmp_path: Path) -> None:
    Image.new("RGB", (60, 50), "red").save(tmp_path / "a.png")
    before = sorted(tiny_checkpoint.rglob("*"))
    done = run(ROOT / "eval.py", tiny_checkpoint, *flags, "--max-new-tokens", 2, "--device", "cpu",
               cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(tiny_checkpoint.rglob("*")) == before
    out = tmp_path / "ckpt" / f"eval_{tiny_checkpoint.name}"
    assert list(out.iterdir()) and str(out.relative_to(tmp_path)) in done.stdout


def test_several_checkpoints_have_names_of_their_own(
        script: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    for name in ("b/rft", "a/rft", "a/sft"):
        stage(tmp_path / name, tmp_path)

    class Stopped(Exception):
        pass

    def stop(args: Any, stages: Sequence[evaluation.Stage]) -> None:
        seen.append([stage.name for stage in stages])
        raise Stopped
    monkeypatch.setattr(evaluation, "load_split", stop)
    for folders in (("b/rft", "a"), ("b/rft", "a/sft"), ("a/sft/step_000010", "b")):
        monkeypatch.setattr(sys, "argv", ["eval.py", *folders, "--device", "cpu"])
        with pytest.raises(Stopped):
            evaluation.main()
    assert seen == [["sft", "rft", "a_rft_step_000010"], ["sft", "rft"],
                    ["rft", "sft_step_000010"]]
    monkeypatch.setattr(sys, "argv", ["eval.py", "a", "nothing", "--device", "cpu"])
    with pytest.raises(CheckpointError, match="nothing"):
        evaluation.main()
