"""Writing safetensors files and checkpoints one tensor at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from gradselect.usage import UsageError

from .checkpoint import INDEX, AbstractCheckpoint, memory, num_bytes, width


@dataclass(frozen=True, kw_only=True)
class Part:
    """A tensor to write; it is read or computed when its turn comes."""

    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], Tensor]


def write_safetensors(path: Path, parts: Mapping[str, Part], metadata: Mapping[str, str]) -> None:
    """Write the parts as a safetensors file.

    The library's own writer needs all tensors in memory at once. The format: length of the header as 8 bytes, the
    header as JSON, and the bytes of all tensors without gaps; wide dtypes first, so that each is aligned.
    """
    order = sorted(parts, key=lambda name: (-width(parts[name].dtype), name))
    with path.open("wb") as file:
        file.write(_header({name: parts[name] for name in order}, metadata))
        for name in order:
            bits = parts[name].read()
            assert bits.numel() * bits.element_size() == num_bytes(parts[name].dtype, parts[name].shape), name
            file.write(memory(bits))


def write_checkpoint(folder: Path, checkpoint: AbstractCheckpoint) -> None:
    """Write a folder that loads like `checkpoint`, with the same shards and small files."""
    contents = checkpoint.contents
    folder.mkdir()
    for shard, metadata in contents.shards.items():
        parts = {
            name: Part(dtype=spec.dtype, shape=spec.shape, read=lambda name=name: checkpoint.bits(name))
            for name, spec in contents.tensors.items()
            if spec.shard == shard
        }
        write_safetensors(folder / shard, parts, metadata)
    if contents.index is not None:
        weight_map = {name: spec.shard for name, spec in contents.tensors.items()}
        index = json.dumps({"metadata": contents.index, "weight_map": weight_map}, indent=2, sort_keys=True) + "\n"
        _write_file(folder / INDEX, index.encode())
    for name in contents.files:
        _write_file(folder / name, checkpoint.file(name))


def free_file(path: Path) -> Path:
    """Return the absolute path, where there is no file or an empty one.

    Raises:
        UsageError: something else is there.
    """
    path = Path(os.path.abspath(path))
    if path.is_dir():
        raise UsageError(f"{path} is a folder; name a file, e.g. {path / 'delta.safetensors'}")
    if path.exists() and not (path.is_file() and path.stat().st_size == 0):
        raise UsageError(_taken(path))
    return path


def free_folder(path: Path) -> Path:
    """Return the absolute path, where there is no folder or an empty one.

    Raises:
        UsageError: something else is there.
    """
    path = Path(os.path.abspath(path))
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise UsageError(_taken(path))
    return path


def _taken(path: Path) -> str:
    return f"{path} exists already and is not empty; choose another name, or remove it first"


def _header(parts: Mapping[str, Part], metadata: Mapping[str, str]) -> bytes:
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    start = 0
    for name, part in parts.items():
        end = start + num_bytes(part.dtype, part.shape)
        header[name] = {"dtype": part.dtype, "shape": part.shape, "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_file(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
