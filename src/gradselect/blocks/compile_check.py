"""Detects blocks that torch.compile left out of its graph."""

from __future__ import annotations

import logging
import sys
from collections import Counter
from collections.abc import Callable, Collection, Mapping

from torch import nn

from gradselect.parallel import unwrapping
from gradselect.slices import check_whole_layers
from gradselect.usage import UsageError

logger = logging.getLogger(__name__)

MAX_MISSES = 3
"""An expert without tokens misses a gradient now and then; a block outside the graph misses all."""


class UnreachedBlocks:
    """Detects blocks that torch.compile left out of its graph.

    Counts the steps in a row in which a block took part without a gradient, if the model is compiled. torch up to 2.9.1
    did not recompile when `requires_grad` changed after the first pass, so a block that was frozen then never trained,
    silently (pytorch/pytorch#139476).

    Args:
        model: trained by the optimizer.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._misses: Counter[str] = Counter()

    def check(
        self, selected: Collection[str], norms: Mapping[str, float], *, has_gradient: Callable[[str], bool]
    ) -> None:
        """Count blocks that took part in a backward pass and got no gradient, or only zeros.

        Args:
            selected: blocks that are about to be updated.
            norms: gradient norms of the blocks that were observed.
            has_gradient: returns True if a parameter of the block got a gradient.

        Raises:
            UsageError: a block was missed in `MAX_MISSES` steps in a row, while others were reached; or the model is
                sliced.
        """
        if not is_compiled(self._model):
            return
        check_not_sliced(self._model)
        reached = {name for name, norm in norms.items() if norm != 0.0} | set(filter(has_gradient, selected))
        for name in reached:
            del self._misses[name]
        if reached:
            self._misses.update({*selected, *norms} - reached)
        for name, misses in self._misses.items():
            if misses >= MAX_MISSES:
                raise UsageError(
                    f"block {name!r} took part in {misses} steps in a row and got no gradient, while others did. "
                    "Either torch.compile compiled it while it was frozen (pytorch#139476): update torch, or do not "
                    "compile. Or the loss never reaches it (an unused pooler): exclude it with the policy's among=..."
                )


def is_compiled(model: nn.Module) -> bool:
    """True if torch.compile has compiled something in this process, and a module of the model is to be compiled."""
    return has_compiled() and is_to_be_compiled(model)


def is_to_be_compiled(model: nn.Module) -> bool:
    """True if torch.compile wraps the model or a module of it."""
    return any(module._compiled_call_impl is not None or "_orig_mod" in module._modules for module in model.modules())


def check_not_sliced(model: nn.Module) -> None:
    """Refuse slices in a model that is to be compiled: each new set of slices would compile anew, without end.

    Raises:
        UsageError: there are slices.
    """
    check_whole_layers(model, to="torch.compile, which would compile anew for each new set of them,")


def has_compiled() -> bool:
    """True if torch.compile has compiled anything in this process."""
    # Compiling imports it; importing it here would be slow.
    module = sys.modules.get("torch._dynamo.utils")
    return module is not None and module.counters["frames"]["ok"] > 0


def warn_of_compiled_model(model: nn.Module) -> None:
    """Warn if the model is compiled as a whole, because such a graph serves one selection only; refuse slices.

    Raises:
        UsageError: a module is to be compiled, and the model is sliced.
    """
    if is_to_be_compiled(model):
        check_not_sliced(model)
    if any("_orig_mod" in each._modules or each._compiled_call_impl is not None for each in unwrapping(model)):
        logger.warning(
            "the model is compiled as a whole: each new selection compiles it again, and after "
            "torch._dynamo.config.recompile_limit times it runs uncompiled; compile its layers instead: "
            "gradselect.integrations.compile.compile_blocks(model)"
        )
