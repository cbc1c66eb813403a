"""Files that are whole or not there: safetensors written a piece at a time, names that change
at once, and a list of hashes that tells a damaged file.

A machine may lose its power, and a disk its space, at any moment. So what others rely on is
written under another name, forced to the disk, and then renamed, which happens at once.
"""
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

# Elements of a tensor that are on the host at a time.
PIECE = 2 ** 20
# What safetensors calls the types of numbers.
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
# Lists the files of a checkpoint with their hashes.
MANIFEST = "manifest.json"
# What reading a damaged one raises.
UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)


# ---------------------------------------------------------------- safetensors

def write_tensors(
        file: Path, shapes: Mapping[str, Sequence[int]], dtype: torch.dtype,
        tensors: Iterator[Tensor], metadata: Mapping[str, str],
) -> None:
    """Writes a safetensors file, byte for byte that of safetensors' own save_file.

    shapes: of each name. tensors: gives one for each name, by sorted name, on any device
    and in any type; each may be made when it is asked for, and is written as dtype. The
    header is known from the shapes, so that no more than a piece of a tensor is copied to
    the host.
    """
    names = sorted(shapes)
    with open(file, "wb") as stream:
        stream.write(tensors_header(names, shapes, dtype, metadata))
        for name in names:
            tensor = next(tensors)
            if tuple(tensor.shape) != tuple(shapes[name]):
                raise ValueError(f"{name} is {tuple(tensor.shape)}, not {tuple(shapes[name])}")
            write_tensor(stream, tensor, dtype)
        sync_stream(stream)


def tensors_header(
        names: Sequence[str], shapes: Mapping[str, Sequence[int]], dtype: torch.dtype,
        metadata: Mapping[str, str],
) -> bytes:
    """A safetensors file's beginning: its own length in 8 bytes, then JSON padded to 8."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name in names:
        begin = end
        end += tensor_bytes(shapes[name], dtype)
        entries[name] = {
            "dtype": DTYPES[dtype], "shape": list(shapes[name]), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def tensor_bytes(shape: Sequence[int], dtype: torch.dtype) -> int:
    """Bytes of a tensor of this shape."""
    return torch.Size(shape).numel() * dtype.itemsize


def write_tensor(stream: BinaryIO, tensor: Tensor, dtype: torch.dtype) -> None:
    """Appends a tensor's numbers, a piece at a time."""
    for piece in tensor.detach().reshape(-1).split(PIECE):
        on_host = piece.to(dtype).cpu().contiguous()
        stream.write(on_host.view(torch.uint8).numpy())


# ---------------------------------------------------------------- to the disk

def sync_stream(stream: BinaryIO) -> None:
    """Forces what was written to an open file to the disk."""
    stream.flush()
    os.fsync(stream.fileno())


def sync(path: Path) -> None:
    """Forces a file, or the list of names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def point(link: Path, target: str) -> None:
    """Makes a link name another target, at once."""
    # A link cannot be changed in place, but another can take its name.
    other = link.with_name(f".{link.name}.tmp")
    other.unlink(missing_ok=True)
    other.symlink_to(target)
    os.replace(other, link)
    sync(link.parent)


def remove_folder(folder: Path, aside: Path) -> None:
    """Removes a folder; it vanishes at once under its name, by a move to `aside`."""
    shutil.rmtree(aside, ignore_errors=True)
    if folder.exists():
        os.replace(folder, aside)
        shutil.rmtree(aside, ignore_errors=True)


# ---------------------------------------------------------------- hashes

def file_hash(file: Path) -> str:
    """The SHA-256 of a file, as sha256sum prints it."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_manifest(folder: Path, hashes: Mapping[str, str]) -> None:
    """Lists a folder's files: the hash of each path, with its size in bytes."""
    listed = {}
    for name in sorted(hashes):
        listed[name] = {"bytes": (folder / name).stat().st_size, "sha256": hashes[name]}
    with open(folder / MANIFEST, "wb") as stream:
        stream.write(json.dumps(listed, indent=2).encode() + b"\n")
        sync_stream(stream)


def read_manifest(folder: Path) -> dict[str, dict[str, Any]] | None:
    """File -> its "bytes" and "sha256"; None where there is no list. ValueError if unreadable."""
    file = folder / MANIFEST
    if not file.exists():
        return None
    listed = json.loads(file.read_bytes())
    for entry in listed.values():
        if not (isinstance(entry["bytes"], int) and isinstance(entry["sha256"], str)):
            raise ValueError("not a list of files")
    return listed


def is_whole(file: Path, listed: Mapping[str, Any]) -> bool:
    """Whether a file of a manifest is as it was written."""
    if not file.is_file() or file.stat().st_size != listed["bytes"]:
        return False
    return file_hash(file) == listed["sha256"]


def damage(file: Path, listed: Mapping[str, Any]) -> str:
    """What is wrong with a file that is not whole, in words."""
    if not file.is_file():
        return f"{file} is missing"
    size = file.stat().st_size
    if size != listed["bytes"]:
        return f"{file} has {size:,} bytes, but had {listed['bytes']:,} when it was written"
    return f"{file} is not as it was written"
