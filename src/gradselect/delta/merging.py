"""Merging: several changes of one base as one checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from gradselect.usage import UsageError

from .checkpoint import AbstractCheckpoint, Contents, TensorSpec, as_bits
from .file import OtherSide
from .renaming import Renamed

Overlap: TypeAlias = Literal["error", "last", "sum", "mean"]
Whole: TypeAlias = Literal["error", "last"]

NUM_NAMED = 5  # tensors that an error names


class MergedCheckpoint(AbstractCheckpoint):
    """The base with the changes of several tuned models, entry by entry.

    An entry that one model changed has that model's value, to the bit; the rule `overlap` decides where several did.
    Some things cannot be taken entry by entry: small files, and tensors that are new, gone, or of another shape or
    dtype. They come from the model that changed them; the rule `whole` decides where several changed them differently.

    Raises:
        UsageError: there is an overlap that a rule does not allow.
    """

    def __init__(self, base: Renamed, tuned: Sequence[OtherSide], *, overlap: Overlap, whole: Whole) -> None:
        self._base = base
        self._tuned = tuned
        self._overlap: Overlap = overlap
        self._takes_last = "last" in (overlap, whole)
        self._names = sorted(set(base.contents.tensors).union(*(model.contents.tensors for model in tuned)))
        self._takers = {name: self._taker(name) for name in self._names}
        self._file_takers = {name: self._file_taker(name) for name in self._file_names()}
        self._check_overlap()
        self.contents = self._merged_contents()

    def bits(self, name: str) -> Tensor:
        taker = self._takers[name]
        if taker is not None:
            return taker.bits(name)
        before = self._base.tensor(name)
        changed = (model.bits(name) for model in self._changing(name))
        return combined_bits(before, changed, overlap=self._rule(before))

    def file(self, name: str) -> bytes:
        return self._file_takers[name].file(name)

    def _changing(self, name: str) -> list[OtherSide]:
        return [model for model in self._tuned if name in model.delta.changes]

    def _taker(self, name: str) -> AbstractCheckpoint | None:
        """Return the model whose tensor, or lack of one, is taken whole; None where entries of several are combined."""
        changing = self._changing(name)
        if len(changing) < 2:
            return changing[0] if changing else self._base
        if all(model.delta.changes[name].stored != "whole" for model in changing):
            return None
        self._check_same(f"tensor {name}", [model.delta.digests["tuned"].get(name) for model in changing])
        return changing[-1]

    def _file_names(self) -> list[str]:
        return sorted(set(self._base.contents.files).union(*(model.contents.files for model in self._tuned)))

    def _file_taker(self, name: str) -> AbstractCheckpoint:
        digests = [model.delta.file_digests for model in self._tuned]
        changing = [n for n, digest in enumerate(digests) if digest["base"].get(name) != digest["tuned"].get(name)]
        if not changing:
            return self._base
        self._check_same(name, [digests[n]["tuned"].get(name) for n in changing])
        return self._tuned[changing[-1]]

    def _check_same(self, what: str, digests: Sequence[str | None]) -> None:
        if not self._takes_last and len(set(digests)) > 1:
            raise UsageError(
                f"{len(digests)} of the deltas change {what}, each to something else, and it can only be taken whole; "
                'whole="last" (--whole last) takes the last one\'s'
            )

    def _check_overlap(self) -> None:
        combined = [name for name, taker in self._takers.items() if taker is None]
        if self._overlap == "last":
            return
        if self._overlap != "error":
            combined = [name for name in combined if self._rule(self._base.tensor(name)) == "error"]
        counts = {name: count for name in combined if (count := self._num_overlapping(name))}
        if counts:
            raise UsageError(_overlap_message(counts, overlap=self._overlap))

    def _rule(self, before: Tensor) -> Overlap:
        if _has_sum(before) or self._overlap in ("error", "last"):
            return self._overlap
        return "last" if self._takes_last else "error"

    def _num_overlapping(self, name: str) -> int:
        before = self._base.bits(name)
        count = torch.zeros(before.shape, dtype=torch.int16)
        for model in self._changing(name):
            count += model.bits(name) != before
        return int((count > 1).sum())

    def _merged_contents(self) -> Contents:
        """Return the contents in the base's shards; new tensors go into the last one."""
        base = self._base.contents
        last_shard = max(base.shards)
        tensors: dict[str, TensorSpec] = {}
        for name in self._names:
            spec = (self._takers[name] or self._base).contents.tensors.get(name)
            if spec is not None:
                shard = base.tensors[name].shard if name in base.tensors else last_shard
                tensors[name] = TensorSpec(dtype=spec.dtype, shape=spec.shape, shard=shard)
        used = {spec.shard for spec in tensors.values()}
        total_size = sum(spec.num_bytes for spec in tensors.values())
        return Contents(
            tensors=tensors,
            shards={shard: metadata for shard, metadata in base.shards.items() if shard in used},
            index=base.index if base.index is None else {**base.index, "total_size": total_size},
            files=tuple(name for name, taker in self._file_takers.items() if name in taker.contents.files),
        )


def combined_bits(before: Tensor, changed: Iterable[Tensor], *, overlap: Overlap) -> Tensor:
    """Return the bit patterns of the merged tensor, flat.

    With the base's w, the models' w_i and the set C of models that changed the entry:

        sum   w + Σ_{i in C} (w_i − w)          mean   w + Σ_{i in C} (w_i − w) / |C|

    in fp32, rounded once to the tensor's dtype; fp64 and complex tensors in their own. An entry that one model changed
    has that model's value, to the bit.

    Args:
        before: the base's tensor.
        changed: bit patterns of each model's, flat; one of them is in memory at a time.
        overlap: rule for entries that several changed; under "error" there are none.
    """
    old_bits = as_bits(before)
    result = old_bits.clone()
    if overlap in ("error", "last"):
        for bits in changed:
            result = torch.where(bits != old_bits, bits, result)
        return result
    wide = before.dtype if before.dtype in (torch.float64, torch.complex64) else torch.float32
    old = before.reshape(-1).to(wide)
    total, count = torch.zeros_like(old), torch.zeros(old.shape, dtype=torch.int16)
    for bits in changed:
        is_changed = bits != old_bits
        count += is_changed
        total += torch.where(is_changed, bits.view(before.dtype).to(wide) - old, 0)
        result = torch.where(is_changed, bits, result)
    combined = old + (total / count if overlap == "mean" else total)
    return torch.where(count > 1, as_bits(combined.to(before.dtype)), result)


def _has_sum(tensor: Tensor) -> bool:
    """Return True for floats. Sums of integers and flags cannot be rounded; 4-bit floats are packed in pairs."""
    return (tensor.is_floating_point() or tensor.is_complex()) and tensor.dtype != torch.float4_e2m1fn_x2


def _overlap_message(counts: Mapping[str, int], *, overlap: Overlap) -> str:
    named = ", ".join(f"{count:,} of {name}" for name, count in list(counts.items())[:NUM_NAMED])
    more = f" and others in {len(counts) - NUM_NAMED} more tensors" if len(counts) > NUM_NAMED else ""
    what = f"{sum(counts.values()):,} entries are changed by more than one delta: {named}{more}"
    if overlap == "error":
        return f'{what}; choose a rule for them: overlap="last", "sum" or "mean" (--overlap last)'
    return f'{what}; their dtype has no {overlap}; whole="last" (--whole last) takes the last one\'s'
