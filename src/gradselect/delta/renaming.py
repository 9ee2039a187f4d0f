"""Tensors that a base and the model trained from it have under other names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import replace
from typing import Any

from torch import Tensor

from .checkpoint import AbstractCheckpoint

LEGACY = {".gamma": ".weight", ".beta": ".bias"}
"""Ends of the names of norms in old checkpoints of BERT, and those that transformers saves them under."""


class Renamed(AbstractCheckpoint):
    """A checkpoint that shows tensors under other names.

    Args:
        source: the checkpoint.
        names: shown name by own name; the rest keep theirs.
    """

    def __init__(self, source: AbstractCheckpoint, names: Mapping[str, str]) -> None:
        self.source: Any = source
        shown = {names.get(name, name): name for name in source.contents.tensors}
        self._own = dict(sorted(shown.items()))
        tensors = {name: source.contents.tensors[own] for name, own in self._own.items()}
        self.contents = replace(source.contents, tensors=tensors)

    def tensor(self, name: str) -> Tensor:
        return self.source.tensor(self._own[name])

    def bits(self, name: str) -> Tensor:
        return self.source.bits(self._own[name])

    def digest(self, name: str) -> str:
        return self.source.digest(self._own[name])

    def file(self, name: str) -> bytes:
        return self.source.file(name)


def names_in_tuned(base: Set[str], tuned: Set[str]) -> dict[str, str]:
    """Return the tuned model's name of each tensor that the base has under another.

    A model without a head is saved without what stands before its names in a model with one: "encoder.layer.0..." and
    "bert.encoder.layer.0...". Old checkpoints of BERT call weight and bias of a norm gamma and beta.

    Args:
        base: names of the base's tensors.
        tuned: those of the tuned model.

    Returns:
        Names that differ. Empty if fewer than half of the tensors that are missing have a counterpart, or fewer than
        half of the base's tensors even so.
    """
    gone, new = base - tuned, tuned - base
    found = max((_matched(gone, new, prefix) for prefix in _prefixes(gone, new)), key=len, default={})
    are_most = 2 * len(found) >= len(gone) and 2 * (len(base & tuned) + len(found)) >= len(base)
    return found if are_most else {}


def _prefixes(gone: Iterable[str], new: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield what may stand before names of the base, and before those of the tuned model."""
    yield "", ""
    for first in sorted({f"{name.partition('.')[0]}." for name in new}):
        yield "", first
    for first in sorted({f"{name.partition('.')[0]}." for name in gone}):
        yield first, ""


def _matched(gone: Iterable[str], new: Set[str], prefix: tuple[str, str]) -> dict[str, str]:
    before, after = prefix
    pairs = {name: after + _todays(name).removeprefix(before) for name in gone if name.startswith(before)}
    taken: dict[str, str] = {tuned: name for name, tuned in sorted(pairs.items()) if tuned in new}
    return {name: tuned for tuned, name in taken.items()}


def _todays(name: str) -> str:
    for old, today in LEGACY.items():
        if name.endswith(old):
            return name.removesuffix(old) + today
    return name
