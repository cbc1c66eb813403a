"""`python data.py --tile`: scenes and their boxes cut into a `jsonl` data set."""
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import data
from conftest import Run
from readers.base import DataError
from tools import check_data
from tools.tiles import HOLDS_IN_WHOLE

rng = np.random.default_rng(0)
Cut = Callable[..., str]          # runs data.py with these flags -> what it prints


@pytest.fixture
def cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> Cut:
    monkeypatch.chdir(tmp_path)

    def script(*flags: object) -> str:
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", ["data.py", *map(str, flags)])
        check_data.main()
        return capfd.readouterr().out
    return script


def scene(path: Path, size: tuple[int, int] = (200, 100)) -> np.ndarray:
    """An image of noise -> its pixels (H, W, 3)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels


def write(path: Path, *rows: dict[str, Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_boxes_by_hand(cut: Cut) -> None:
    """Two tiles of 100 x 100. Boxes of 50 x 10 px: in the left one; with 30 px in it and 20 in the
    right one (exactly 60%: kept, clipped); with 29 (of the right one: 21, so of none); and one of
    the right tile, moved by 100."""
    pixels = scene(Path("scenes/a.png"))
    boxes = [[10, 20, 60, 30], [70, 20, 120, 30], [71, 40, 121, 50], [130, 60, 180, 70]]
    rows = [{"image": "a.png", "text": f"ship {i}", "box": box, "category": "ship"}
            for i, box in enumerate(boxes)]
    write(Path("scenes/test.jsonl"), *rows)
    printed = cut("--tile", 100, "scenes", "out")
    first, second, last = lines(Path("out/test.jsonl"))
    assert first == {"image": "a_0_0.png", "id": "test-1_0_0", "text": "ship 0",
                     "box": [10, 20, 60, 30], "category": "ship", "scene": "a.png",
                     "corner": [0, 0]}
    assert (second["image"], second["box"]) == ("a_0_0.png", [70, 20, 100, 30])
    assert last["image"] == "a_100_0.png" and last["box"] == [30, 60, 80, 70]
    assert last["corner"] == [100, 0]
    assert (np.asarray(Image.open("out/a_0_0.png")) == pixels[:, :100]).all()
    assert (np.asarray(Image.open("out/a_100_0.png")) == pixels[:, 100:]).all()
    assert "left out: 1 records: no tile has 60% of the box" in printed
    assert "test: 3 records in tiles\n" in printed and "2 tiles of 1 images: out" in printed
    # The result is a data set.
    records = data.load("jsonl", "out", "test")
    assert [r.text for r in records] == ["ship 0", "ship 1", "ship 3"] and not records.refused
    assert [r.id for r in records] == ["test-1_0_0", "test-2_0_0", "test-4_100_0"]


def test_in_an_overlap_a_box_is_in_both_tiles(cut: Cut) -> None:
    scene(Path("scenes/a.png"), (160, 100))
    write(Path("scenes/train.jsonl"), {"image": "a.png", "text": "ship", "box": [70, 5, 90, 15]})
    cut("--tile", 100, "--overlap", 40, "scenes", "out")
    found = [(row["image"], row["box"]) for row in lines(Path("out/train.jsonl"))]
    assert found == [("a_0_0.png", [70, 5, 90, 15]), ("a_60_0.png", [10, 5, 30, 15])]


def test_expressions_that_may_not_hold_are_counted_and_left_out(cut: Cut) -> None:
    """In an image that is not cut they hold. A tile without a record is not written."""
    scene(Path("scenes/large.png"))
    scene(Path("scenes/small.png"), (90, 90))
    rows = []
    for image in ("large.png", "small.png"):
        for i, text in enumerate(("the leftmost ship", "the red ship", "a pool in the top left")):
            rows.append({"image": image, "text": text, "box": [10, 10 * i, 20, 10 * i + 5]})
    write(Path("scenes/train.jsonl"), *rows)
    printed = cut("--tile", 100, "scenes", "out")
    kept = [(row["image"], row["text"]) for row in lines(Path("out/train.jsonl"))]
    assert kept == [("large_0_0.png", "the red ship"), ("small_0_0.png", "the leftmost ship"),
                    ("small_0_0.png", "the red ship"), ("small_0_0.png", "a pool in the top left")]
    assert ("left out: 2 expressions that may not hold in a tile, such as 'the leftmost ship'; "
            "--keep-places keeps them\n") in printed
    assert sorted(p.name for p in Path("out").iterdir()) == [
        "large_0_0.png", "small_0_0.png", "train.jsonl"]
    cut("--tile", 100, "--keep-places", "scenes", "all")
    assert len(lines(Path("all/train.jsonl"))) == 6


@pytest.mark.parametrize("text", [
    "the leftmost ship", "the ship at the upper left", "The Largest pool", "the tiniest car",
    "the ship nearest to the pier", "the lowest house", "the most crowded harbor",
    "the ship in the center of the image", "the plane on the left side", "the upper-left ship",
    "the ship farthest to the left", "the second ship from the left", "the northern pool",
    "the ship left of the ship on the right", "the pool in the bottom right-hand corner",
    "the plane nearest to the top edge", "the lower left corner of this image"])
def test_superlatives_and_positions(text: str) -> None:
    assert HOLDS_IN_WHOLE.search(text)


@pytest.mark.parametrize("text", [
    "the red ship", "the ship left of the pier", "the ship to the left of the red pier",
    "the ship on the left side of the dock", "the ship above the pier", "the only ship",
    "the house higher up than the pool", "the house by the forest", "an almost white plane",
    "a ship on the lower right of the bridge", "the tank west of the river", "a guest house",
    "the ship on the right-hand side of the dock", "the tank in the center of a field"])
def test_names_and_relations(text: str) -> None:
    assert not HOLDS_IN_WHOLE.search(text)


def test_splits_are_those_of_the_files(cut: Cut) -> None:
    """No val is made of train; a split of another name is asked for."""
    for i in range(3):
        scene(Path(f"scenes/images/{i}.png"), (50, 50))
    write(Path("scenes/train.jsonl"), *(
        {"image": f"images/{i}.png", "text": "ship", "box": [1, 1, 9, 9]} for i in range(2)))
    write(Path("scenes/hard.jsonl"), {"image": "images/2.png", "text": "x", "box": [1, 1, 9, 9]})
    cut("--tile", 100, "scenes", "out")
    assert sorted(p.name for p in Path("out").glob("*.jsonl")) == ["train.jsonl"]
    assert sorted(p.name for p in Path("out/images").iterdir()) == ["0_0_0.png", "1_0_0.png"]
    cut("--tile", 100, "scenes", "hard", "--split", "hard")
    assert lines(Path("hard/hard.jsonl"))[0]["image"] == "images/2_0_0.png"


def test_tiles_held_out_of_train_share_their_scene(cut: Cut) -> None:
    """Without val.jsonl, the two tiles of a scene may be on both sides, so the cut says so."""
    scene(Path("scenes/a.png"))
    scene(Path("scenes/b.png"))
    boat = {"text": "the boat at the pier", "box": [1, 1, 9, 9]}
    write(Path("scenes/train.jsonl"), {"image": "a.png", **boat},
          {"image": "a.png", **boat, "box": [110, 1, 119, 9]})
    assert "no val: training will hold out tiles" in cut("--tile", 100, "scenes", "out")
    held_out, = data.load("jsonl", Path("out"), "val")
    trained, = data.load("jsonl", Path("out"), "sft")
    assert {held_out.image.name, trained.image.name} == {"a_0_0.png", "a_100_0.png"}

    assert "no val" not in cut("--tile", 200, "scenes", "whole")
    write(Path("scenes/valid.jsonl"), {"image": "b.png", **boat})
    assert "no val" not in cut("--tile", 100, "scenes", "apart")
    assert [row["scene"] for row in lines(Path("apart/val.jsonl"))] == ["b.png"]


def test_images_without_boxes(cut: Cut) -> None:
    """All tiles are written. Two images of one stem keep their suffixes apart."""
    scene(Path("scenes/a.png"))
    scene(Path("scenes/a.bmp"), (100, 100))
    printed = cut("--tile", 100, "scenes", "out")
    assert sorted(p.name for p in Path("out").iterdir()) == [
        "a.bmp_0_0.png", "a.png_0_0.png", "a.png_100_0.png"]
    assert "3 tiles of 2 images: out" in printed


@pytest.mark.parametrize("matrix", [
    (0.5, 0, 400_000.0, 0, -0.5, 5_000_000.0), (0.4, 0.3, 400_000.0, 0.3, -0.4, 5_000_000.0)])
def test_tiles_of_a_geotiff_keep_their_place(cut: Cut, matrix: tuple[float, ...]) -> None:
    rasterio = pytest.importorskip("rasterio")
    pixels = rng.integers(0, 256, (3, 100, 160), dtype=np.uint8)
    Path("scenes").mkdir()
    transform = rasterio.Affine(*matrix)
    with rasterio.open("scenes/a.tif", "w", driver="GTiff", width=160, height=100, count=3,
                       dtype="uint8", crs="EPSG:32632", transform=transform) as file:
        file.write(pixels)
    cut("--tile", 100, "--overlap", 40, "scenes", "out")
    for x in (0, 60):
        with rasterio.open(f"out/a_{x}_0.tif") as tile:
            assert tile.crs == "EPSG:32632"
            assert (tile.read() == pixels[:, :, x:x + 100]).all()
            # The same place on the map through the tile and through the scene.
            assert tile.transform @ (7.5, 3.25) == pytest.approx(
                transform @ (x + 7.5, 3.25), abs=1e-7)


@pytest.mark.parametrize("flags, says", [
    (("--tile", 100, "scenes"), "two folders, SCENES and OUT"),
    (("--tile", 100, "--overlap", 100, "scenes", "out"), "a smaller --overlap"),
    (("--tile", 100, "nothing", "out"), "nothing: no image to cut"),
    (("--tile", 100, "scenes", "scenes"), "scenes is not empty"),
])
def test_mistakes(cut: Cut, flags: tuple, says: str) -> None:
    scene(Path("scenes/a.png"))
    with pytest.raises(DataError, match=says):
        cut(*flags)


def test_the_real_command(run: Run, tmp_path: Path) -> None:
    scene(tmp_path / "scenes" / "a.png")
    (tmp_path / "scenes" / "b.png").write_bytes(b"no picture")
    done = run("data.py", "--tile", 100, tmp_path / "scenes", tmp_path / "out")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "b.png" in done.stderr
    (tmp_path / "scenes" / "b.png").unlink()
    done = run("data.py", "--tile", 100, tmp_path / "scenes", tmp_path / "again")
    assert done.returncode == 0 and "2 tiles of 1 images" in done.stdout
