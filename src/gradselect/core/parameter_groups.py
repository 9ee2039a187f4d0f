"""Parameter groups, with and without weight decay, and the place of each block's parameters in them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch.nn import Parameter

from gradselect.usage import matching

from .block import Block

Group = dict[str, Any]


class ParameterTable:
    """Finds the parameters of a block in the optimizer's groups, where a wrapper may have replaced them.

    Args:
        groups: the optimizer's `param_groups`, which hold `param_names`.
        members: parameter names of each block, by block, in model order.
    """

    def __init__(self, groups: Sequence[Group], members: Mapping[str, Sequence[str]]) -> None:
        self.members = {block: tuple(names) for block, names in members.items()}
        self._groups = groups
        self._places = {
            name: (index, position)
            for index, group in enumerate(groups)
            for position, name in enumerate(group["param_names"])
        }

    @property
    def blocks(self) -> tuple[str, ...]:
        """Names of all blocks in model order."""
        return tuple(self.members)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all parameters in the order of the groups, as in torch's state_dict."""
        return tuple(self._places)

    def all(self) -> list[Parameter]:
        """Every parameter, in the order of `names`."""
        return self._find(self._places)

    def named(self) -> list[tuple[str, Parameter]]:
        """Every parameter with its name."""
        return list(zip(self.names, self.all(), strict=True))

    def of(self, block: str) -> list[Parameter]:
        """Parameters of one block."""
        return self._find(self.members[block])

    def by_group(self, block: str) -> list[tuple[Group, list[Parameter]]]:
        """Parameters of one block, with their group."""
        apart: dict[int, list[str]] = {}
        for name in self.members[block]:
            apart.setdefault(self._places[name][0], []).append(name)
        return [(self._groups[index], self._find(names)) for index, names in apart.items()]

    def _find(self, names: Iterable[str]) -> list[Parameter]:
        places = (self._places[name] for name in names)
        return [self._groups[index]["params"][position] for index, position in places]


def decay_groups(
    blocks: Sequence[Block], *, no_decay: str | Sequence[str] | None, weight_decay: float
) -> list[dict[str, Any]]:
    """Return a group with weight decay and one without, named, in model order; empty groups are left out.

    Raises:
        UsageError: a pattern of `no_decay` matches nothing.
    """
    named = [pair for block in blocks for pair in zip(block.parameter_names, block.parameters, strict=True)]
    undecayed = {name for name, parameter in named if parameter.ndim < 2}
    if no_decay is not None:
        undecayed = set(matching([name for name, _ in named], no_decay, kind="parameter that trains", key="no_decay"))
    decayed = [(name, parameter) for name, parameter in named if name not in undecayed]
    others = [(name, parameter) for name, parameter in named if name in undecayed]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
