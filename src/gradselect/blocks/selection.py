"""Selection of the coming step, as the policy proposes or decides it."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Mapping, Sequence

from gradselect.core import selection_entropy
from gradselect.usage import listed

from .policy import AbstractPolicy
from .reach import Reach

logger = logging.getLogger(__name__)


class StepSelection:
    """Selection of the coming step: proposed before its forward pass, or decided from the norms of its gradients.

    Blocks that train always are added to it; blocks that the loss does not reach, or that the user froze, are left out.

    Attributes:
        proposal: what the policy proposed, without `always`; None: it decides from norms.
        update_counts: number of updates of each block.

    Args:
        policy: bound to the blocks that may be selected.
        blocks: names of all blocks, in model order.
        always: names of the blocks that train at every step.
        reach: knows the blocks that the loss does not reach.
    """

    def __init__(self, policy: AbstractPolicy, blocks: Sequence[str], always: Sequence[str], reach: Reach) -> None:
        self._policy = policy
        self._blocks = tuple(blocks)
        self._always = tuple(always)
        self._reach = reach
        self._candidates = policy.candidates
        self._observed: tuple[str, ...] = ()
        self._has_said_broken = False
        self.proposal: tuple[str, ...] | None = ()
        self.update_counts = dict.fromkeys(self._blocks, 0)

    def propose(self, step: int) -> None:
        """Ask the policy for the selection of `step`, among the blocks that are not known to be unreached or frozen."""
        self._policy.candidates = self._reach.candidates_of(self._candidates)
        self.proposal = self._reach.propose(self._policy, step)
        self._observed = () if not self.proposal else self._policy.observed(step)

    def decide(self, step: int, norms: Mapping[str, float]) -> tuple[str, ...]:
        """Return the selection of `step`: as proposed, or from the norms."""
        self._say_broken(step, norms)
        return self.with_always(self._policy.decide(step, norms) if self.proposal is None else self.proposal)

    def _say_broken(self, step: int, norms: Mapping[str, float]) -> None:
        broken = [name for name, norm in norms.items() if not math.isfinite(norm)]
        if broken and not self._has_said_broken:
            self._has_said_broken = True
            logger.warning(
                "step %d: the gradient norms of %d of %d blocks are NaN or infinite: %s. Such a block ranks last, and "
                "its norm counts for nothing; if all are, the first blocks of the model are selected. Build the "
                "optimizer with skip_nonfinite=True to skip such steps",
                *(step, len(broken), len(norms), listed(broken)),
            )

    def commit(self, step: int, selected: Sequence[str], norms: Mapping[str, float]) -> None:
        """Count a step that has updated `selected`: in the policy and in the update counts."""
        self._policy.commit(step, [name for name in selected if name not in self._always], norms)
        for name in selected:
            self.update_counts[name] += 1

    def with_always(self, selected: Collection[str]) -> tuple[str, ...]:
        """Return these blocks and those of `always`, without unreached and frozen ones, in model order."""
        left_out = self._reach.left_out
        return tuple(
            name for name in self._blocks if (name in selected or name in self._always) and name not in left_out
        )

    @property
    def proposed(self) -> tuple[str, ...]:
        """Blocks that the coming step updates; empty if that is not known before it."""
        return () if self.proposal is None else self.with_always(self.proposal)

    @property
    def trainable(self) -> tuple[str, ...]:
        """Blocks that take part in the coming backward pass."""
        return self.with_always(self._policy.names if self.proposal is None else {*self.proposal, *self._observed})

    @property
    def candidate_counts(self) -> dict[str, int]:
        """Number of updates of each candidate of the policy."""
        return {name: self.update_counts[name] for name in self._policy.names}

    @property
    def entropy(self) -> float:
        """Entropy of the updates over the candidates."""
        return selection_entropy(self.candidate_counts)
