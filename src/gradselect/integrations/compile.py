"""torch.compile for models whose blocks are frozen and unfrozen during training.

    from gradselect.integrations.compile import compile_blocks

    compile_blocks(model)
    optimizer = gs.BlockOptimizer(model, policy=gs.AdaGradSelect(fraction=0.2, explore_steps=len(loader) // 4), lr=1e-5)

A compiled graph is valid for one pattern of `requires_grad`. A whole model has as many patterns as there are
selections. A layer has four: it trains or not, and something below it trains or not. Layers of one class share graphs.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from gradselect import partition
from gradselect.slices import check_whole_layers

NUM_VARIANTS = 16
"""Graphs per layer: trains or not, passes a gradient on or not, fixed or varying length, training or evaluation."""

logger = logging.getLogger(__name__)


def compile_blocks(model: nn.Module, **settings: Any) -> tuple[str, ...]:
    """Compile each layer of the model separately, in place. Names of parameters do not change.

    Call it before the first forward pass. Compilation ends when every variant of a layer has occurred, mostly within
    the first selections. `torch._dynamo.config.recompile_limit` counts the variants of all layers together; above it
    torch continues uncompiled. A limit that is too low is raised for the whole process.

    Args:
        model: its layers are those that `partition(model)` finds.
        settings: arguments of `torch.compile`, e.g. `backend`, `mode`. By default the second batch length compiles
            graphs for all lengths; with `dynamic=True` the first does.

    Returns:
        Names of the compiled modules.

    Raises:
        UsageError: the model has no repeated layers, or they are sliced.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(3)))
        >>> compile_blocks(model, backend="eager")
        ('0', '1', '2')
    """
    check_whole_layers(model, to="torch.compile, which would compile anew for each new set of them,")
    layers = [block for block in partition(model) if "layer." in block.name]
    names = tuple(_module_of(block.parameter_names) for block in layers)
    _raise_limit(NUM_VARIANTS * len(names))
    if _uses_cache(model):
        logger.warning(
            "the model keeps a key-value cache, so each layer compiles its own graphs; write "
            "model.config.use_cache = False before training"
        )
    for name in names:
        model.get_submodule(name).compile(**settings)
    return names


def _module_of(parameters: tuple[str, ...]) -> str:
    """Return the numbered module around all these parameters: "model.layers.3", even if only its attention trains."""
    apart = [name.split(".")[:-1] for name in parameters]
    common = []
    for parts in zip(*apart, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    while common and not common[-1].isdigit():
        common.pop()
    return ".".join(common)


def _raise_limit(needed: int) -> None:
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, needed)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, needed)


def _uses_cache(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "use_cache", False))
