"""Upper limit of the speed-up, from floating-point operations."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence

FULL_STEP = 6.0
"""FLOPs of a full step per parameter and token: forward 2, backward through activations 2, weight gradients 2."""

_LAYER = re.compile(r"^(.*\.)?layer\.\d+")


def step_time(*, depth: float, frozen: float) -> float:
    """FLOPs of a step per parameter and token: 2 + 2 d + 2 (1 - s).

    Args:
        depth: d, share of the layers that the backward pass visits.
        frozen: s, share of the entries without a gradient.
    """
    return 2 + 2 * depth + 2 * (1 - frozen)


def speed_up_limit(steps: Iterable[Collection[str]], sizes: Mapping[str, int]) -> float | None:
    """Upper limit of the speed-up over full fine-tuning: 6 / mean over steps of 2 + 2 d + 2 (1 - s).

    Averages times and not speed-ups, as a clock does: a step of time 6 and one of time 3 give 6 / 4.5.

    Args:
        steps: blocks that had gradients in each step: the selected ones, or all in an explore step.
        sizes: number of entries of each block, by name, in model order.

    Returns:
        The limit; None without a step.

    Example:
        >>> speed_up_limit([["layer.1"]], {"layer.0": 5, "layer.1": 5})
        1.5
    """
    times = [_time(trained, sizes) for trained in steps]
    return FULL_STEP * len(times) / sum(times) if times else None


def visited_share(trained: Collection[str], blocks: Sequence[str]) -> float:
    """Share of the layers that the backward pass visits: those at and above the lowest trained block.

    Blocks are in model order. A matrix, "layer.3.mlp.up_proj", counts as its layer. The share is 1.0 for a block below
    the layers and 0.0 for one above.
    """
    layers = list(dict.fromkeys(layer for name in blocks if (layer := layer_of(name)) is not None))
    if not layers:
        return 1.0 if trained else 0.0
    lowest = next((position for position, name in enumerate(blocks) if name in trained), len(blocks))
    above = {layer for name in blocks[lowest:] if (layer := layer_of(name)) is not None}
    return len(above) / len(layers)


def layer_of(block: str) -> str | None:
    """Return the layer of a block: "layer.3" for "layer.3.self_attn.q_proj"; None outside the layers."""
    match = _LAYER.match(block)
    return None if match is None else match.group()


def _time(trained: Collection[str], sizes: Mapping[str, int]) -> float:
    share = sum(size for name, size in sizes.items() if name in trained) / sum(sizes.values())
    return step_time(depth=visited_share(trained, list(sizes)), frozen=1 - share)
