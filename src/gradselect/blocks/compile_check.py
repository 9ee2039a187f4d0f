"""Whether what was selected also trains: a compiled graph may have been made while a block was frozen."""

from __future__ import annotations

import logging
import sys
from collections import Counter
from collections.abc import Collection

from torch import nn

from gradselect.parallel import unwrapping
from gradselect.usage import UsageError

logger = logging.getLogger(__name__)

MAX_MISSES = 3
"""An expert without tokens gets no gradient now and then; a block that the graph leaves out never does."""


class UnreachedBlocks:
    """Counts in how many steps in a row a block took part without a gradient, where anything was compiled.

    torch 2.9.1 and others before it did not compile anew when `requires_grad` changed after the first pass, so that a
    block which was frozen then trained never, in silence (pytorch/pytorch#139476).
    """

    def __init__(self) -> None:
        self._misses: Counter[str] = Counter()

    def check(self, *, reached: Collection[str], missed: Collection[str]) -> None:
        """After a backward pass.

        Args:
            reached: blocks that got a gradient.
            missed: blocks that took part and got none, or zeros alone.

        Raises:
            UsageError: one was missed in `MAX_MISSES` steps in a row, while others were reached.
        """
        for name in reached:
            del self._misses[name]
        if reached:
            self._misses.update(missed)
        for name, misses in self._misses.items():
            if misses >= MAX_MISSES:
                raise UsageError(
                    f"block {name!r} took part in {misses} steps in a row and got no gradient, while others did. "
                    "Either torch.compile has compiled it while it was frozen (pytorch#139476): update torch, or do "
                    "not compile. Or the loss never reaches it (an unused pooler): keep it out with the policy's "
                    "among=..."
                )


def has_compiled() -> bool:
    """Whether torch.compile has compiled anything in this process."""
    # Whoever compiles has imported it, which is slow.
    module = sys.modules.get("torch._dynamo.utils")
    return module is not None and module.counters["frames"]["ok"] > 0


def warn_of_whole(model: nn.Module) -> None:
    """A compiled graph of a whole model holds for one selection."""
    if any("_orig_mod" in each._modules or each._compiled_call_impl is not None for each in unwrapping(model)):
        logger.warning(
            "the model is compiled as a whole: once more for each new selection, and after "
            "torch._dynamo.config.recompile_limit of them it runs uncompiled; compile its layers instead: "
            "gradselect.integrations.compile.compile_blocks(model)"
        )
