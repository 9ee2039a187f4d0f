"""torch.compile for models of which blocks are frozen and thawed while they train.

    from gradselect.integrations.compile import compile_blocks

    compile_blocks(model)
    optimizer = gs.BlockOptimizer(model, policy=gs.AdaGradSelect(fraction=0.2, explore_steps=len(loader)), lr=1e-5)

A compiled graph holds for one pattern of `requires_grad`. Of a whole model there are as many patterns as selections; of
a layer there are four: whether it trains, and whether anything below it does. Layers of one class share their graphs.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from gradselect import partition

NUM_VARIANTS = 16
"""Of a layer: trains or not, a gradient passes through it or not, fixed or varying length, training or evaluation."""

logger = logging.getLogger(__name__)


def compile_blocks(model: nn.Module, **settings: Any) -> tuple[str, ...]:
    """Compile each layer of the model by itself, in place: names of parameters stay as they are.

    Call it before the first forward pass. Nothing compiles any more once each of a layer's variants was seen, mostly
    within the first selections. `torch._dynamo.config.recompile_limit` counts the variants of all layers together, and
    beyond it torch goes on uncompiled: it is raised for the whole process where it is too low.

    Args:
        model: its layers are those that `partition(model)` finds.
        settings: of `torch.compile`, e.g. `backend`, `mode`. By default the second length of a batch makes graphs for
            all lengths; with `dynamic=True` the first does.

    Returns:
        The names of the modules that were compiled.

    Raises:
        UsageError: the model has no repeated layers.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(3)))
        >>> compile_blocks(model, backend="eager")
        ('0', '1', '2')
    """
    layers = [block for block in partition(model) if "layer." in block.name]
    names = tuple(_module_of(block.parameter_names) for block in layers)
    _raise_limit(NUM_VARIANTS * len(names))
    if _uses_cache(model):
        logger.warning(
            "the model keeps a key-value cache, so that each layer compiles graphs of its own; write "
            "model.config.use_cache = False before training"
        )
    for name in names:
        model.get_submodule(name).compile(**settings)
    return names


def _module_of(parameters: tuple[str, ...]) -> str:
    """The numbered module that holds all of these parameters: "model.layers.3", though only its attention trains."""
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
