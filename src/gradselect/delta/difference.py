"""Making a delta from two checkpoints."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gradselect.core import index_dtype

from .checkpoint import AbstractCheckpoint, TensorSpec, width
from .file import FORMAT, RENAMED_VERSION, VERSION, Change, Side, digest_of
from .renaming import Renamed
from .write import Part, write_safetensors

BIT_DTYPES = {1: "U8", 2: "I16", 4: "I32", 8: "I64"}
INDEX_DTYPES = {torch.int32: "I32", torch.int64: "I64"}


def write_delta(
    path: Path, own_base: AbstractCheckpoint, tuned: AbstractCheckpoint, *, renamed: Mapping[str, str] | None = None
) -> None:
    """Write the delta between two checkpoints. Reads both several times, tensor by tensor.

    Args:
        path: the file.
        own_base: the base, under its own names.
        tuned: the tuned model.
        renamed: its names of tensors that the base has under others.
    """
    base = Renamed(own_base, renamed) if renamed else own_base
    changes = {name: change for name in _names(base, tuned) if (change := change_of(base, tuned, name))}
    parts: dict[str, Part] = {}
    for name, change in changes.items():
        parts |= _parts(base, tuned, name, change)
    models: dict[Side, AbstractCheckpoint] = {"base": base, "tuned": tuned}
    file_digests = {
        side: {name: digest_of(model.file(name)) for name in model.contents.files} for side, model in models.items()
    }
    for side, name in _changed_files(file_digests["base"], file_digests["tuned"]):
        parts[f"{side}_file:{name}"] = _file_part(models[side].file(name))
    manifest = {
        "base": _described(own_base, file_digests["base"]),
        "tuned": _described(tuned, file_digests["tuned"]),
        **({"renamed": dict(renamed)} if renamed else {}),
        "changes": {name: {"stored": c.stored, "entries": c.num_entries} for name, c in changes.items()},
    }
    text = json.dumps(manifest, separators=(",", ":"), sort_keys=True)
    version = RENAMED_VERSION if renamed else VERSION
    write_safetensors(
        path, parts, {"format": FORMAT, "version": version, "manifest": text, "sha256": digest_of(text.encode())}
    )


def change_of(base: AbstractCheckpoint, tuned: AbstractCheckpoint, name: str) -> Change | None:
    """Return how one tensor changed and the smaller way to store it; None if it is the same to the bit."""
    before, after = base.contents.tensors.get(name), tuned.contents.tensors.get(name)
    if before is None or after is None or not before.is_like(after):
        return Change(stored="whole", num_entries=after.num_entries if after else 0)
    flips = base.bits(name) ^ tuned.bits(name)
    count = int(flips.count_nonzero())
    if count == 0:
        return None
    sparse_bytes = count * (index_dtype(flips.numel()).itemsize + flips.element_size())
    return Change(
        stored="sparse" if sparse_bytes < flips.numel() * flips.element_size() else "dense", num_entries=count
    )


def _names(base: AbstractCheckpoint, tuned: AbstractCheckpoint) -> list[str]:
    return sorted({*base.contents.tensors, *tuned.contents.tensors})


def _parts(base: AbstractCheckpoint, tuned: AbstractCheckpoint, name: str, change: Change) -> dict[str, Part]:
    """Return the tensors that the delta stores for one change."""
    if change.stored == "whole":
        return {
            f"{side}:{name}": Part(dtype=spec.dtype, shape=spec.shape, read=lambda model=model: model.bits(name))
            for side, model in (("base", base), ("tuned", tuned))
            if (spec := model.contents.tensors.get(name))
        }

    def flips() -> Tensor:
        return base.bits(name) ^ tuned.bits(name)

    spec = base.contents.tensors[name]
    num_words = spec.num_bytes // _word_bytes(spec)
    bit_dtype = BIT_DTYPES[_word_bytes(spec)]
    if change.stored == "dense":
        return {f"xor:{name}": Part(dtype=bit_dtype, shape=(num_words,), read=flips)}
    narrow, shape = index_dtype(num_words), (change.num_entries,)

    def changed_flips() -> Tensor:
        values = flips()
        return values[values != 0]

    def indices() -> Tensor:
        return flips().nonzero().flatten().to(narrow)

    return {
        f"index:{name}": Part(dtype=INDEX_DTYPES[narrow], shape=shape, read=indices),
        f"xor:{name}": Part(dtype=bit_dtype, shape=shape, read=changed_flips),
    }


def _word_bytes(spec: TensorSpec) -> int:
    """Return the bytes of the integers that hold the bits. Entries narrower than a byte are packed into bytes."""
    return max(1, width(spec.dtype) // 8)


def _changed_files(base: Mapping[str, str], tuned: Mapping[str, str]) -> list[tuple[Side, str]]:
    """Return side and name of each file that the other side lacks or has with other bytes."""
    changed: list[tuple[Side, str]] = [("base", name) for name in base if tuned.get(name) != base[name]]
    return changed + [("tuned", name) for name in tuned if base.get(name) != tuned[name]]


def _file_part(content: bytes) -> Part:
    data = torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else torch.empty(0, dtype=torch.uint8)
    return Part(dtype="U8", shape=(len(content),), read=lambda: data)


def _described(model: AbstractCheckpoint, file_digests: Mapping[str, str]) -> dict[str, Any]:
    contents = model.contents
    return {
        "fingerprint": model.fingerprint(),
        "tensors": {
            name: {"dtype": spec.dtype, "shape": spec.shape, "shard": spec.shard, "sha256": model.digest(name)}
            for name, spec in contents.tensors.items()
        },
        "shards": contents.shards,
        "index": contents.index,
        "files": file_digests,
    }
