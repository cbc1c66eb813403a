"""Files: safetensors against the library's own, links and folders that change at once."""
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen import hub
from train import checkpoints


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_file_is_byte_for_byte_the_librarys(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """Empty tensors, scalars, names beyond ASCII, non-contiguous and long ones among them."""
    monkeypatch.setattr(hub, "PIECE", 7)
    tensors = {
        "z": torch.randn(3, 5), "a.weight": torch.randn(40), "empty": torch.randn(0, 4),
        "scalar": torch.randn(()), "b\u00e9ta": torch.randn(4, 3).T, "a": torch.randn(2, 1, 2)}
    ours = tmp_path / "ours"
    theirs = tmp_path / "theirs"
    shapes = {name: x.shape for name, x in tensors.items()}
    in_order = (tensors[name] for name in sorted(tensors))
    hub.write_tensors(ours, shapes, dtype, in_order, {"format": "pt"})
    stored = {name: x.to(dtype).contiguous() for name, x in tensors.items()}
    save_file(stored, theirs, metadata={"format": "pt"})
    assert ours.read_bytes() == theirs.read_bytes()
    for name, x in load_file(ours).items():
        assert torch.equal(x, stored[name])


def test_a_tensor_is_asked_for_when_the_one_before_it_is_written(tmp_path: Path) -> None:
    sizes = []

    def make() -> Iterator[torch.Tensor]:
        for _ in range(5):
            sizes.append((tmp_path / "x").stat().st_size)
            yield torch.zeros(2 ** 15)
    shapes = {str(i): (2 ** 15,) for i in range(5)}
    hub.write_tensors(tmp_path / "x", shapes, torch.float32, make(), {})
    for i, size in enumerate(sizes[1:]):
        assert size >= i * 2 ** 17


def test_a_tensor_of_another_shape_than_the_header_says_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="x is .2,., not .3,."):
        hub.write_tensors(
            tmp_path / "x", {"x": (3,)}, torch.float32, iter([torch.zeros(2)]), {})


def test_a_link_moves_and_a_folder_vanishes_under_its_name(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "file").write_text("x")
    for target in ("a", "b"):
        checkpoints.point(tmp_path / "latest", target)
        assert (tmp_path / "latest").readlink() == Path(target)
    checkpoints.remove_folder(tmp_path / "a", tmp_path / ".a.tmp")
    checkpoints.remove_folder(tmp_path / "nothing", tmp_path / ".nothing.tmp")
    assert [p.name for p in tmp_path.iterdir()] == ["latest"]


@pytest.fixture
def step(tmp_path: Path) -> Path:
    """A checkpoint's folder with one file."""
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "x").write_bytes(b"abc")
    return tmp_path


def test_a_file_that_changed_is_distinguished_from_one_that_did_not(step: Path) -> None:
    file = step / "state" / "x"
    entry = checkpoints.manifest_entry(file)
    # sha256sum of "abc", as the standard has it.
    assert entry["sha256"].startswith("ba7816bf") and entry["bytes"] == 3
    (step / hub.MANIFEST).write_text(json.dumps({"state/x": entry}))
    assert checkpoints.damage(step) is checkpoints.damage(step, "state/x") is None
    for content, words in ((b"abd", "not as it was written"), (b"ab", "has 2 bytes, but had 3")):
        file.write_bytes(content)
        assert words in checkpoints.damage(step) == checkpoints.damage(step, "state/x")
    file.unlink()
    assert "is missing" in checkpoints.damage(step) == checkpoints.damage(step, "state/x")


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"a": 1}', '{"a": {"bytes": "1"}}', "\0"])
def test_a_list_that_is_none_is_unreadable(step: Path, text: str) -> None:
    assert checkpoints.damage(step) is None
    (step / hub.MANIFEST).write_text(text)
    assert "manifest.json is unreadable" in checkpoints.damage(step)
