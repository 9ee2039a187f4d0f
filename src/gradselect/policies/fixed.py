"""Fixed: the same blocks at every step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from gradselect.blocks import AbstractPolicy, taking_part
from gradselect.usage import check_patterns


@final
@dataclass(eq=False)
class Fixed(AbstractPolicy):
    """Select the named blocks at every step.

    Args:
        blocks: names, aliases or globs, e.g. `("layer.4", "layer.5")` or `("layer.*", "head")`.

    Example:
        >>> last_two = Fixed(("layer.4", "layer.5"))
    """

    blocks: Sequence[str]

    def __post_init__(self) -> None:
        self.blocks = check_patterns("blocks", self.blocks)

    def start(self) -> None:
        self.candidates = taking_part(self.candidates, self.blocks)

    def propose(self, step: int) -> tuple[str, ...]:
        return self.names

    @property
    def coverage_steps(self) -> int:
        return 1
