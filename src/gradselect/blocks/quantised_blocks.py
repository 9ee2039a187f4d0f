"""Blocks of a quantised model: shares of their weights that can train, and blocks that are no candidates."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from typing import NamedTuple

from torch import nn

from gradselect.core import ADVICE, Block, below, is_chosen, quantised_weights
from gradselect.usage import parent

from .structure import Layout

logger = logging.getLogger(__name__)

LEAST_SHARE = 0.01
"""A layer of which a smaller share can train is no candidate."""

MOST_NAMED = 8
"""Number of blocks that a message names one by one."""


class Share(NamedTuple):
    """Weights of a block's module: those that can train, and those that are quantised or integers."""

    num_trained: int
    num_fixed: int

    @property
    def value(self) -> float:
        """Share of the weights that can train."""
        return self.num_trained / (self.num_trained + self.num_fixed)


def trainable_shares(model: nn.Module, blocks: Sequence[Block]) -> dict[str, Share]:
    """Return the share of each layer-like block that can train, by block, where quantised weights make it less than 1.

    Counts all weights of the block's module. Layers with an adapter, or in which the user froze floating-point weights,
    are left out: what trains there was chosen.
    """
    fixed = quantised_weights(model)
    if not fixed:
        return {}
    layout = Layout(model, matrices=None)
    chosen = {layer for layer in layout.layers if is_chosen(model, layer, fixed)}
    shares = {}
    for block in blocks:
        homes = {layout.component(name) for name in block.parameter_names}
        home = next(iter(homes))
        if len(homes) > 1 or home not in layout.layers or home in chosen:
            continue
        if any(parameter.ndim > 1 for parameter in block.parameters):
            home = _common_parent(block.parameter_names)
        if num_fixed := below(fixed, home):
            shares[block.name] = Share(block.num_elements, num_fixed)
    return shares


def without_quantised(model: nn.Module, blocks: Sequence[Block], *, always: Collection[str]) -> tuple[Block, ...]:
    """Return the blocks that a policy may select: none of which quantised weights leave less than `LEAST_SHARE`.

    Says once what share of each block can train.

    Args:
        model: holds the blocks.
        blocks: its partition.
        always: names of blocks that train at every step; they are left out too.
    """
    shares = trainable_shares(model, blocks)
    left_out = [name for name, share in shares.items() if share.value < LEAST_SHARE and name not in always]
    if shares:
        said = [f"{name}: {share.value:.1%} of its weights can train" for name, share in shares.items()]
        more = f"; {len(said) - MOST_NAMED} more" if len(said) > MOST_NAMED else ""
        logger.warning(
            "quantised or integer weights cannot train. %s%s.%s",
            "; ".join(said[:MOST_NAMED]),
            more,
            f" {said_of(left_out, blocks)}" if left_out else "",
        )
    return tuple(block for block in blocks if block.name not in {*left_out, *always})


def said_of(left_out: Sequence[str], blocks: Sequence[Block]) -> str:
    """Return the sentence about blocks that are no candidates."""
    return (
        f"{len(left_out)} of {len(blocks)} blocks are no candidates, because less than {LEAST_SHARE:.0%} of their "
        f"weights can train; {ADVICE}; to train the little that can, name them in always=..."
    )


def _common_parent(names: Sequence[str]) -> str:
    paths = [parent(name).split(".") for name in names]
    shared = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared)
