"""Strata: candidates of a policy in groups of like blocks, and the share of each group that a draw selects."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal

from gradselect.blocks import layer_of
from gradselect.usage import UsageError

By = Literal["layer", "category"]

_SLICE = re.compile(r"(columns|rows)\.\d+")
_SUBLAYER = re.compile(r"^layer\.\d+\.")  # of T5


@dataclass(frozen=True)
class Strata:
    """Candidates by stratum, and the ranges of them that consecutive draws take.

    Let n be the number of blocks of a stratum and r the number of them in a draw: `count` (at most n), or
    max(1, `fraction` * n). Draw d takes floor(r (d + 1)) - floor(r d) blocks: r if it is whole, and r on average.
    Stratum j among those of the same size is j draws ahead, so that neighbours round up in turn.

    Args:
        members: names of the blocks of each stratum, in model order.
        fraction: share of each stratum, or None.
        count: number of blocks of each stratum, or None.
    """

    members: Mapping[str, tuple[str, ...]]
    fraction: float | None
    count: int | None

    @cached_property
    def of(self) -> Mapping[str, str]:
        """Stratum of each block."""
        return {name: stratum for stratum, names in self.members.items() for name in names}

    @cached_property
    def places(self) -> Mapping[str, int]:
        """Number of each stratum among those of the same size, from 0."""
        seen: Counter[int] = Counter()
        places = {}
        for stratum, names in self.members.items():
            places[stratum] = seen[len(names)]
            seen[len(names)] += 1
        return places

    def mean_count(self, stratum: str) -> float:
        """Return r, the mean number of blocks that a draw takes."""
        size = len(self.members[stratum])
        if self.count is not None:
            return float(min(self.count, size))
        assert self.fraction is not None
        return max(1.0, round(self.fraction * size, 9))  # 0.29 * 100 is below 29 as a float

    def taken(self, stratum: str, draw: int) -> tuple[int, int]:
        """Return how many blocks the draws before this one took, and how many this one takes."""
        mean = self.mean_count(stratum)
        before = math.floor(mean * draw)
        return before, math.floor(mean * (draw + 1)) - before

    def num_taken(self, stratum: str, draw: int) -> int:
        """Return how many blocks of the stratum a draw takes, which is as many draws ahead as its place."""
        return self.taken(stratum, draw + self.places[stratum])[1]

    def num_draws(self) -> int:
        """Return the number of consecutive draws that take each block once, if each goes on where the last ended."""
        return max(math.ceil(len(names) / self.mean_count(stratum)) for stratum, names in self.members.items())

    def contested(self) -> tuple[str, ...]:
        """Return the strata of which a draw leaves out blocks."""
        return tuple(stratum for stratum, names in self.members.items() if self.mean_count(stratum) < len(names))


@lru_cache(maxsize=64)
def strata_of(names: tuple[str, ...], by: By, fraction: float | None, count: int | None) -> Strata:
    """Divide blocks into strata.

    A block is judged by its name. Let `rest` be what follows its layer: "self_attn.q_proj", "columns.3", "vectors".

        by="layer"     the slices of a layer; its other blocks of matrices; its 1-D tensors ("vectors")
        by="category"  the slices of a layer; its matrices by the first word of `rest`, which names the module that
                       holds them ("self_attn", "mlp"; of T5's "layer.0.SelfAttention" the name after the number),
                       those that the layer holds itself together ("fc1", "fc2");
                       where a layer has one block of a category ("vectors", or the layer whole), such blocks of all
                       layers of a stack are one stratum

    A block outside the layers is a stratum of its own.

    Args:
        names: of the blocks, in model order.
        by: kind of strata.
        fraction: share of each stratum, or None.
        count: number of blocks of each stratum, or None.
    """
    keys = {name: _key(name, by) for name in names}
    if by == "category":
        sizes = Counter(keys.values())
        keys = {name: _over_layers(name, key) if sizes[key] == 1 else key for name, key in keys.items()}
    members: dict[str, list[str]] = {}
    for name, key in keys.items():
        members.setdefault(key, []).append(name)
    return Strata({key: tuple(several) for key, several in members.items()}, fraction, count)


def check_strata(strata: Strata, *, by: By) -> None:
    """Refuse strata in which nothing can be selected, and a count that none of them has.

    Raises:
        UsageError: says what to write.
    """
    sizes = [len(names) for names in strata.members.values()]
    largest = max(sizes)
    if largest == 1 and len(sizes) > 1:
        listed = ", ".join(list(strata.members)[:3])
        raise UsageError(
            f'strata by="{by}" hold one block each ({listed}, ...), so all {len(sizes)} would train at every step; '
            'divide the layers, with blocks=gs.partition(model, by="columns") or method.blocks=columns, or write '
            "policy=gs.All()"
        )
    if strata.count is not None and strata.count > largest:
        raise UsageError(
            f"count={strata.count} is more than the {largest} blocks of the largest stratum; write count={largest}"
        )


def _key(name: str, by: By) -> str:
    layer = layer_of(name)
    if layer is None or layer == name:
        return name
    rest = name[len(layer) + 1 :]
    if found := _SLICE.fullmatch(rest):
        return f"{layer}.{found.group(1)}"
    if rest == "vectors":
        return name
    module, dot, _ = _SUBLAYER.sub("", rest).partition(".")
    return f"{layer}.{module}" if by == "category" and dot else f"{layer}.matrices"


def _over_layers(name: str, key: str) -> str:
    layer = layer_of(name)
    if layer is None:
        return name
    return f"{layer.rpartition('.')[0]}.*{key[len(layer) :]}"
