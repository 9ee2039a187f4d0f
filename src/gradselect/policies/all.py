"""All: full fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from gradselect.blocks import AbstractPolicy


@final
@dataclass(eq=False)
class All(AbstractPolicy):
    """Select every block at every step: the optimizer is plain AdamW.

    Example:
        >>> full = All()
    """

    def start(self) -> None:
        pass

    def propose(self, step: int) -> tuple[str, ...]:
        return self.names

    @property
    def coverage_steps(self) -> int:
        return 1
