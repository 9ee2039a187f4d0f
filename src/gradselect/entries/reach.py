"""Reach of the loss in the first step of a mask: entries in tensors that got no gradient are said, with numbers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping

from torch import nn

from gradselect.core import OutputProbes
from gradselect.usage import UsageError, listed

from .mask import AbstractCompactMask, AbstractMask, FromWeights

logger = logging.getLogger(__name__)


class EntryReach:
    """Looks once whether the entries of a mask lie where the loss reaches.

    Until it has looked, a probe on the model's output lets a loss be differentiated that reaches none of them.

    Args:
        model: trained by the optimizer.
        is_owner: returns False once a newer optimizer has the model.
    """

    def __init__(self, model: nn.Module, is_owner: Callable[[], bool]) -> None:
        self._is_owner = is_owner
        self._had_pass = False
        self._probes: OutputProbes | None = OutputProbes({}, self, whole=model)

    def is_listening(self) -> bool:
        return self._is_owner()

    def reached(self, name: str) -> None:
        self._had_pass = True

    def end(self) -> None:
        """Look no more."""
        if self._probes is not None:
            self._probes.remove()
            self._probes = None

    def look(self, mask: AbstractMask, planned: Mapping[str, int], arrived: Collection[str]) -> None:
        """Compare, in the first step, the tensors that hold entries with those that got a gradient.

        Args:
            mask: bound to its tensors.
            planned: number of entries that each tensor holds or will hold, where no gradient decides that.
            arrived: tensors that got a gradient.

        Raises:
            UsageError: the loss reaches none of the mask's tensors, or none that holds entries.
        """
        if self._probes is None or not (arrived or self._had_pass):
            return
        self.end()
        name = type(mask).__name__
        lost = {name: count for name, count in planned.items() if count and name not in arrived}
        num_lost, total = sum(lost.values()), sum(planned.values())
        if not total and isinstance(mask, AbstractCompactMask) and isinstance(mask.choice(0, 0), FromWeights):
            return  # everything that trains does so beside the mask
        if set(mask.names).isdisjoint(arrived) or (total and num_lost == total):
            raise UsageError(
                f"the loss reaches no tensor in which {name} has entries: {listed([*lost] or mask.names)} got no "
                'gradient in the first step; name tensors that it reaches, e.g. among=("*language_model*",)'
            )
        if lost:
            logger.warning(
                "%.0f %% of the entries of %s (%s of %s) lie in %d tensors that got no gradient in the first step: %s; "
                "leave them out with among=... to spend these entries elsewhere",
                *(100 * num_lost / total, name, f"{num_lost:,}", f"{total:,}", len(lost), listed([*lost])),
            )
