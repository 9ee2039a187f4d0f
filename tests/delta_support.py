"""Checkpoint folders for the tests of delta files, and how to compare them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from gradselect.delta.checkpoint import INDEX, WEIGHTS

Tensors = dict[str, torch.Tensor]


def write_model(
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
    *,
    shards: Sequence[Sequence[str]] = (),
    files: Mapping[str, str] | None = None,
) -> Path:
    """A checkpoint folder: one weight file, or one for each group of names in `shards`, and small files."""
    folder.mkdir(parents=True)
    for name, text in {"config.json": '{"model_type": "none"}', **(files or {})}.items():
        (folder / name).write_text(text, encoding="utf-8")
    if not shards:
        save_file(dict(tensors), folder / WEIGHTS, metadata={"format": "pt"})
        return folder
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        shard = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file({name: tensors[name] for name in names}, folder / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, shard)
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}), encoding="utf-8")
    return folder


def read_model(folder: Path) -> Tensors:
    """All tensors of the folder."""
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def small_files(folder: Path) -> dict[str, bytes]:
    """Contents of what is not weights; of the index, what it means."""
    contents = {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".safetensors"}
    if INDEX in contents:
        contents[INDEX] = json.dumps(json.loads(contents[INDEX]), sort_keys=True).encode()
    return contents


def everything(folder: Path) -> dict[str, bytes]:
    """Every file below the folder, to the byte."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal dtype, shape and bit patterns; NaN equals itself, 0.0 is not -0.0."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def same_model(a: Path, b: Path) -> bool:
    """Equal tensors to the bit, equal sharding, equal small files."""
    ours, theirs = read_model(a), read_model(b)
    shards = [sorted(path.name for path in folder.glob("*.safetensors")) for folder in (a, b)]
    return (
        ours.keys() == theirs.keys()
        and all(same_bits(ours[name], theirs[name]) for name in ours)
        and shards[0] == shards[1]
        and small_files(a) == small_files(b)
    )


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def with_changes(tensor: torch.Tensor, entries: Sequence[int], change: float = 1.0) -> torch.Tensor:
    """A copy with `change` added to some entries, by flat index."""
    result = tensor.clone()
    result.view(-1)[list(entries)] += change
    return result
