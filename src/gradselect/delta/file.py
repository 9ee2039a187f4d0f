"""Reading a delta: its manifest, the stored changes, and the checkpoint on its other side."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from gradselect.core import index_dtype
from gradselect.usage import UsageError

from .checkpoint import (
    AbstractCheckpoint,
    Contents,
    SafetensorsFile,
    TensorSpec,
    as_bits,
    digest,
    fingerprint,
    is_dtype,
    is_small_file,
    is_weight_file,
    memory,
)

FORMAT = "gradselect.delta"
VERSION = "2"
UNSEALED_VERSION = "1"  # without a digest of the manifest
RENAMED_VERSION = "3"  # with names of the base's tensors in the tuned model

Side: TypeAlias = Literal["base", "tuned"]
SIDES: tuple[Side, Side] = ("base", "tuned")


@dataclass(frozen=True, kw_only=True)
class Change:
    """Change of one tensor.

    stored: "dense": the XOR of all bit patterns; "sparse": flat indices, and the XOR there; "whole": the tensor of
        each side that has it, since it is new, gone, or of another shape or dtype.
    num_entries: entries that differ; of a tensor stored whole, all of the tuned one.
    """

    stored: str
    num_entries: int


class DeltaFile:
    """A delta on disk. Its manifest is checked when it is opened, its tensors when they are read.

    Raises:
        UsageError: it is missing, damaged, no delta, or of another version of the format.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise UsageError(f"there is no delta {path}; make one with: gradselect delta diff BASE TUNED {path}")
        self._file = SafetensorsFile(path)
        metadata = self._file.metadata
        if metadata.get("format") != FORMAT:
            raise UsageError(f"{path} is a safetensors file but no delta: its format is {metadata.get('format')!r}")
        version = metadata.get("version")
        if version not in (VERSION, UNSEALED_VERSION, RENAMED_VERSION):
            raise UsageError(
                f"{path} has version {version!r} of the format, this gradselect reads {UNSEALED_VERSION!r}, "
                f"{VERSION!r} and {RENAMED_VERSION!r}; update gradselect, or make the delta again"
            )
        text = metadata.get("manifest", "")
        if version != UNSEALED_VERSION and metadata.get("sha256") != digest_of(text.encode()):
            raise self.damaged("its manifest is not the one that was written: it has another SHA-256")
        try:
            self._read_manifest(json.loads(text))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise self.damaged(f"its manifest cannot be read, {error!r}") from None

    def _read_manifest(self, manifest: Any) -> None:
        self.contents: dict[Side, Contents] = {side: _contents(manifest[side]) for side in SIDES}
        self.digests: dict[Side, dict[str, str]] = {
            side: {name: str(entry["sha256"]) for name, entry in manifest[side]["tensors"].items()} for side in SIDES
        }
        self.file_digests: dict[Side, dict[str, str]] = {side: dict(manifest[side]["files"]) for side in SIDES}
        self.changes = {
            name: Change(stored=change["stored"], num_entries=int(change["entries"]))
            for name, change in manifest["changes"].items()
        }
        self.fingerprints: dict[Side, str] = {side: manifest[side]["fingerprint"] for side in SIDES}
        for side in SIDES:
            if fingerprint(self.digests[side]) != self.fingerprints[side]:
                raise ValueError(f"fingerprint of the {side}")
            _check_contents(self.contents[side])
        self._rename_base(manifest.get("renamed", {}))
        for name in sorted({*self.contents["base"].tensors, *self.contents["tuned"].tensors}):
            self._check_change(name)

    def _rename_base(self, renamed: Mapping[str, str]) -> None:
        """Take the tuned model's names for the base's tensors, as the changes have them."""
        self.renamed = {str(name): str(tuned) for name, tuned in renamed.items()}
        base, tuned = self.contents["base"].tensors, self.contents["tuned"].tensors
        names = {name: self.renamed.get(name, name) for name in base}
        if not (self.renamed.keys() <= base.keys() and set(self.renamed.values()) <= tuned.keys()):
            raise ValueError("renamed: a name that neither model has")
        if len(set(names.values())) < len(names):
            raise ValueError("renamed: two tensors with one name")
        tensors = {names[name]: spec for name, spec in base.items()}
        self.contents["base"] = replace(self.contents["base"], tensors=tensors)
        self.digests["base"] = {names[name]: digest for name, digest in self.digests["base"].items()}

    def _check_change(self, name: str) -> None:
        """Check that the stored change can make each side from the other."""
        before, after = (self.contents[side].tensors.get(name) for side in SIDES)
        stored = self.changes[name].stored if name in self.changes else None
        is_alike = before is not None and after is not None and before.is_like(after)
        if stored != "whole" and not (is_alike and stored in (None, "dense", "sparse")):
            raise ValueError(f"change of {name}: {stored}")

    def flip(self, name: str, bits: Tensor) -> Tensor:
        """Return the bits of the other side. XOR undoes itself, so this works in both directions."""
        change = self.changes[name]
        if change.stored == "dense":
            return bits ^ self._read(f"xor:{name}", dtype=bits.dtype, size=bits.numel())
        indices = self._read(f"index:{name}", dtype=index_dtype(bits.numel()), size=change.num_entries).long()
        flips = self._read(f"xor:{name}", dtype=bits.dtype, size=change.num_entries)
        if len(indices) and not (indices[0] >= 0 and indices[-1] < bits.numel() and (indices.diff() > 0).all()):
            raise self.damaged(f"the indices of {name} are not ascending within its {bits.numel():,} entries")
        result = bits.clone()
        result[indices] ^= flips
        return result

    def whole(self, side: Side, name: str) -> Tensor:
        """Return the bits of a tensor that is stored whole."""
        spec = self.contents[side].tensors[name]
        if self._file.layout(f"{side}:{name}") != (spec.dtype, spec.shape):
            raise self.damaged(f"the stored tensor {name} has another shape or dtype than its manifest says")
        return as_bits(self._file.tensor(f"{side}:{name}"))

    def file(self, side: Side, name: str) -> bytes:
        """Return a small file that differs between the sides."""
        stored = self._file.tensor(f"{side}_file:{name}")
        content = bytes(memory(stored))
        if digest_of(content) != self.file_digests[side][name]:
            raise self.damaged(f"its copy of {name} is not the one of the {side}")
        return content

    def stores_file(self, side: Side, name: str) -> bool:
        return f"{side}_file:{name}" in self._file.names

    def damaged(self, what: str) -> UsageError:
        return UsageError(f"the delta {self.path} is damaged: {what}; copy or make it again")

    def check_is(self, checkpoint: AbstractCheckpoint, *, side: Side, where: Path) -> None:
        """Check that `checkpoint` is the one this delta was made with.

        Raises:
            UsageError: names the first tensor, or small file, that differs.
        """
        theirs = self.contents[side].tensors
        ours = checkpoint.contents.tensors
        for name in sorted({*theirs, *ours}):
            if difference := self._difference(checkpoint, name, side=side):
                raise UsageError(f"{self.path} was made with another {side} model than {where}: {difference}")
        for name in self.contents[side].files:
            if not self.stores_file(side, name):
                self._check_file(checkpoint, name, side=side, where=where)

    def _difference(self, checkpoint: AbstractCheckpoint, name: str, *, side: Side) -> str | None:
        theirs = self.contents[side].tensors.get(name)
        ours = checkpoint.contents.tensors.get(name)
        if theirs is None or ours is None:
            return f"tensor {name} is in {'the delta' if ours is None else 'the model'} only"
        if not theirs.is_like(ours):
            return f"tensor {name} is {theirs.dtype} {list(theirs.shape)} there, {ours.dtype} {list(ours.shape)} here"
        if checkpoint.digest(name) == self.digests[side][name]:
            return None
        other: Side = "tuned" if side == "base" else "base"
        if checkpoint.digest(name) == self.digests[other].get(name):
            return f"tensor {name} is the {other} model's here; apply takes the base, revert the tuned model"
        return f"tensor {name} has other values"

    def _check_file(self, checkpoint: AbstractCheckpoint, name: str, *, side: Side, where: Path) -> None:
        has_it = name in checkpoint.contents.files
        if not has_it or digest_of(checkpoint.file(name)) != self.file_digests[side][name]:
            raise UsageError(
                f"{name} of {where} is {'another one' if has_it else 'missing; it is there'} in the {side} model that "
                f"{self.path} was made with; put that model's {name} there"
            )

    def _read(self, key: str, *, dtype: torch.dtype, size: int) -> Tensor:
        if key not in self._file.names:
            raise self.damaged(f"{key} is missing")
        tensor = self._file.tensor(key)
        if tensor.dtype != dtype or tensor.shape != (size,):
            raise self.damaged(f"{key} is {tensor.dtype} {list(tensor.shape)} instead of {dtype} [{size}]")
        return tensor


class OtherSide(AbstractCheckpoint):
    """The tuned model, read from the base through a delta; or the base, from the tuned one.

    Every tensor is compared with its digest in the delta, so a wrong one is never returned.
    """

    def __init__(self, source: AbstractCheckpoint, delta: DeltaFile, *, side: Side) -> None:
        self.delta = delta
        self.contents = delta.contents[side]
        self._source = source
        self._side: Side = side
        self._checked: set[str] = set()

    def bits(self, name: str) -> Tensor:
        bits = self._made(name)
        if name not in self._checked:
            if digest(self.contents.tensors[name], bits) != self.delta.digests[self._side][name]:
                raise self.delta.damaged(f"{name} does not become the {self._side} model's")
            self._checked.add(name)
        return bits

    def file(self, name: str) -> bytes:
        if self.delta.stores_file(self._side, name):
            return self.delta.file(self._side, name)
        return self._source.file(name)

    def _made(self, name: str) -> Tensor:
        change = self.delta.changes.get(name)
        if change is None:
            return self._source.bits(name)
        if change.stored == "whole":
            return self.delta.whole(self._side, name)
        return self.delta.flip(name, self._source.bits(name))


def _contents(described: Mapping[str, Any]) -> Contents:
    return Contents(
        tensors={
            name: TensorSpec(
                dtype=str(entry["dtype"]), shape=tuple(map(int, entry["shape"])), shard=str(entry["shard"])
            )
            for name, entry in described["tensors"].items()
        },
        shards={name: dict(metadata) for name, metadata in described["shards"].items()},
        index=None if described["index"] is None else dict(described["index"]),
        files=tuple(described["files"]),
    )


def _check_contents(contents: Contents) -> None:
    """Check names, dtypes and headers. A delta may come from anywhere, and must not write outside of the folder."""
    strange = [name for name in contents.shards if not is_weight_file(name)]
    strange += [name for name in contents.files if not is_small_file(name)]
    strange += [spec.shard for spec in contents.tensors.values() if spec.shard not in contents.shards]
    strange += [spec.dtype for spec in contents.tensors.values() if not is_dtype(spec.dtype)]
    # Other types in a header would be written into a file that nobody can read.
    strange += [
        part for shard in contents.shards.values() for part in (*shard, *shard.values()) if type(part) is not str
    ]
    if strange:
        raise ValueError(f"{strange[0]!r} is no file, dtype or header of a checkpoint")


def digest_of(content: bytes) -> str:
    """Return the SHA-256 in hexadecimal."""
    return hashlib.sha256(content).hexdigest()
