"""A checkpoint for a delta: tensors as bit patterns, small files, and a digest of each."""

from __future__ import annotations

import abc
import ctypes
import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gradselect.files import belongs, beside_weights, is_safe
from gradselect.usage import UsageError, matches_any

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
EARLIER = ("*config.json",)
"""Names that deltas of earlier versions may list beside those that belong to a model today."""
# An integer of the same width holds every bit pattern: NaN payloads and -0.0 are compared and kept exactly.
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """dtype, shape and file of one tensor."""

    dtype: str  # as safetensors writes it, e.g. "BF16"
    shape: tuple[int, ...]
    shard: str  # name of the file it is in

    @property
    def num_entries(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return num_bytes(self.dtype, self.shape)

    def is_like(self, other: TensorSpec) -> bool:
        """Return True if shape and dtype are equal; the files may differ."""
        return (self.dtype, self.shape) == (other.dtype, other.shape)


@dataclass(frozen=True, kw_only=True)
class Contents:
    """Contents of a checkpoint, without the bytes."""

    tensors: Mapping[str, TensorSpec]
    shards: Mapping[str, Mapping[str, str]]  # the metadata of each weight file, e.g. {"format": "pt"}
    index: Mapping[str, Any] | None  # the metadata of the index; None: all weights are in one file
    files: tuple[str, ...]


class AbstractCheckpoint(abc.ABC):
    """A model on disk, or made from one by a delta. Its tensors are read one at a time."""

    contents: Contents

    @abc.abstractmethod
    def bits(self, name: str) -> Tensor:
        """Return the tensor's bit patterns as integers, flat. Do not write to them."""

    @abc.abstractmethod
    def file(self, name: str) -> bytes:
        """Return the bytes of a small file."""

    @cached_property
    def _digests(self) -> dict[str, str]:
        return {}

    def digest(self, name: str) -> str:
        """Return the SHA-256 of the tensor's dtype, shape and bytes."""
        if name not in self._digests:
            self._digests[name] = digest(self.contents.tensors[name], self.bits(name))
        return self._digests[name]

    def fingerprint(self) -> str:
        """Return one digest of all tensors: the same for every sharding and order of files."""
        return fingerprint({name: self.digest(name) for name in self.contents.tensors})


class CheckpointFolder(AbstractCheckpoint):
    """A Hugging Face folder with `model.safetensors`, or with shards and their index.

    Raises:
        UsageError: there is no such folder, it holds no weights in safetensors, or they are damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not folder.is_dir():
            raise UsageError(f"{folder} is no folder; name one with a {WEIGHTS} and a config.json")
        self._shard_of, index = _weight_map(folder)
        if not self._shard_of:
            raise UsageError(f"the weights in {folder} have no tensor")
        self._shards = {shard: SafetensorsFile(folder / shard) for shard in sorted(set(self._shard_of.values()))}
        self.contents = Contents(
            tensors={name: self._spec(name) for name in sorted(self._shard_of)},
            shards={name: shard.metadata for name, shard in self._shards.items()},
            index=index,
            files=tuple(sorted(_small_files(folder))),
        )

    def tensor(self, name: str) -> Tensor:
        return self._shards[self._shard_of[name]].tensor(name)

    def bits(self, name: str) -> Tensor:
        return as_bits(self.tensor(name))

    def file(self, name: str) -> bytes:
        try:
            return (self.folder / name).read_bytes()
        except OSError as error:
            raise UsageError(f"{self.folder / name} cannot be read: {error}") from None

    def _spec(self, name: str) -> TensorSpec:
        shard = self._shard_of[name]
        dtype, shape = self._shards[shard].layout(name)
        return TensorSpec(dtype=dtype, shape=shape, shard=shard)


class SafetensorsFile:
    """A safetensors file, mapped into memory: only requested tensors are read.

    Raises:
        UsageError: it is missing, cut off or something else.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = safe_open(path, framework="pt")
        except (OSError, SafetensorError) as error:
            raise UsageError(f"{path} is no whole safetensors file ({error}); copy or save it again") from None
        self.names = frozenset(self._file.keys())
        self.metadata: dict[str, str] = self._file.metadata() or {}

    def layout(self, name: str) -> tuple[str, tuple[int, ...]]:
        """Return dtype and shape of a tensor, without reading its bytes."""
        if name not in self.names:
            raise UsageError(f"{self.path} is damaged or not the file it should be: it has no tensor {name}")
        view = self._file.get_slice(name)
        return view.get_dtype(), tuple(view.get_shape())

    def tensor(self, name: str) -> Tensor:
        try:
            return self._file.get_tensor(name)
        except SafetensorError as error:
            raise UsageError(f"tensor {name} of {self.path} cannot be read: {error}") from None


def as_bits(tensor: Tensor) -> Tensor:
    """Return the bit patterns as integers of the same width, flat, in the same memory."""
    return tensor.reshape(-1).view(BITS[tensor.element_size()])


def memory(bits: Tensor) -> memoryview:
    """Return the bytes of a contiguous CPU tensor without a copy; valid as long as the tensor lives."""
    size = bits.numel() * bits.element_size()
    # Without numpy, which torch does not require.
    return memoryview((ctypes.c_char * size).from_address(bits.data_ptr()))


def num_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Return the bytes of a tensor. safetensors' codes name the width: "F8_E4M3" has 8 bits."""
    return math.prod(shape) * width(dtype) // 8


def width(dtype: str) -> int:
    """Return the bits of one entry."""
    return 8 if dtype == "BOOL" else int(re.sub(r"[A-Z]+(\d+).*", r"\1", dtype))


def is_dtype(dtype: str) -> bool:
    """Return True if the text has the form of a safetensors code."""
    return re.fullmatch(r"BOOL|[A-Z]+\d+(_\w+)?", dtype) is not None


def digest(spec: TensorSpec, bits: Tensor) -> str:
    """Return the SHA-256 of dtype, shape and bytes."""
    result = hashlib.sha256(json.dumps([spec.dtype, spec.shape]).encode())
    result.update(memory(bits))
    return result.hexdigest()


def fingerprint(digests: Mapping[str, str]) -> str:
    """Return the SHA-256 of the names and digests of all tensors."""
    return hashlib.sha256(json.dumps(sorted(digests.items())).encode()).hexdigest()


def is_small_file(name: str) -> bool:
    """Return True if a file of this name, relative to a checkpoint, may belong to the model.

    Folders are those of chat templates and of modules; only the checkpoint itself knows their names.
    """
    return is_safe(name) and ("/" in name or belongs(name) or matches_any(name, EARLIER))


def is_weight_file(name: str) -> bool:
    """Return True for a plain name of a safetensors file: neither a path nor hidden."""
    return re.fullmatch(r"\w[\w.-]*\.safetensors", name) is not None


def _small_files(folder: Path) -> set[str]:
    beside = beside_weights(folder)
    return {*beside.belonging, *(name for name in beside.others if matches_any(name, EARLIER))}


def _weight_map(folder: Path) -> tuple[dict[str, str], dict[str, Any] | None]:
    """Return the file of every tensor and the metadata of the index. Like transformers, prefer the single file."""
    if (folder / WEIGHTS).is_file():
        return dict.fromkeys(SafetensorsFile(folder / WEIGHTS).names, WEIGHTS), None
    if not (folder / INDEX).is_file():
        raise UsageError(_without_weights(folder))
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        shard_of = {str(name): str(shard) for name, shard in index["weight_map"].items()}
        metadata = dict(index.get("metadata") or {})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UsageError(f"{folder / INDEX} is no index of shards ({error!r}); save the model again") from None
    strange = sorted(shard for shard in set(shard_of.values()) if not is_weight_file(shard))
    if strange:
        raise UsageError(f"{folder / INDEX} names {strange[0]!r}, which is no safetensors file beside it")
    return shard_of, metadata


def _without_weights(folder: Path) -> str:
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")):
        return (
            f"{folder} holds its weights as a torch pickle; convert it first: "
            f"AutoModelForCausalLM.from_pretrained({str(folder)!r}, dtype='auto').save_pretrained(new_folder)"
        )
    if (folder / "adapter_model.safetensors").is_file():
        return (
            f"{folder} holds an adapter, no model; merge it first: model.merge_and_unload().save_pretrained(new_folder)"
        )
    return f"{folder} holds no weights: neither {WEIGHTS} nor {INDEX} is there"
