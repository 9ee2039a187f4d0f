"""Tensors with state for every entry: those of a dense mask, and those that always train."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from gradselect.core import (
    MASTER,
    SELECTION,
    BlockStates,
    Group,
    ParameterTable,
    Phases,
    WeightUpdates,
    dense,
    in_phase,
    squared_norm,
)
from gradselect.parallel import local_part

from .mask import AbstractDenseMask, AbstractMask


class DenseTensors:
    """Updates whole tensors, under a dense mask if there is one.

    Args:
        names: of the tensors.
        table: finds their parameters.
        states: hold their state.
        updates: apply the rule.
        mask: of the optimizer; a compact one has no effect here.
        phases: of the optimizer.
    """

    def __init__(
        self,
        names: Sequence[str],
        table: ParameterTable,
        states: BlockStates,
        updates: WeightUpdates,
        *,
        mask: AbstractMask,
        phases: Phases,
    ) -> None:
        self.names = tuple(names)
        self._table = table
        self._states = states
        self._updates = updates
        self._mask = mask if isinstance(mask, AbstractDenseMask) else None
        self._phases = phases
        self._is_asked = False
        self._moved: dict[Tensor, Tensor] = {}

    @property
    def has_gradients(self) -> bool:
        """True if one of the tensors has a gradient."""
        return bool(self.with_gradients)

    @property
    def with_gradients(self) -> tuple[str, ...]:
        """Names of the tensors that have a gradient."""
        return tuple(self._gradients(self.names))

    def squared_norms(self) -> list[tuple[Tensor, Tensor]]:
        """Sum of squares of each gradient, after the tensor of the gradient."""
        gradients = self._gradients(self.names)
        return [(self._table.of(name)[0], squared_norm(dense(each))) for name, each in gradients.items()]

    def scale_gradients(self, factor: Tensor) -> None:
        """Multiply all gradients, as clipping does."""
        for gradient in self._gradients(self.names).values():
            gradient.mul_(factor.to(gradient))

    @in_phase(SELECTION)
    def select(self) -> dict[str, Tensor]:
        """Select entries by the dense mask: by name of each tensor with a gradient, bool, shape of the local part.

        A mask on "gradient" also sets the gradient of other entries to zero.
        """
        if self._mask is None:
            return {}
        whole = {
            name: parameter.grad
            for name in self._mask.names
            for parameter in self._table.of(name)
            if parameter.grad is not None
        }
        masks = self._mask.masks([dense(gradient) for gradient in whole.values()])
        if self._mask.mask == "gradient":
            for gradient, mask in zip(map(local_part, whole.values()), masks, strict=True):
                gradient.masked_fill_(~mask, 0.0)
        return dict(zip(whole, masks, strict=True))

    def update(self, masks: Mapping[str, Tensor]) -> None:
        """Apply the rule to each tensor that has a gradient, and free the gradient."""
        for name in self.names:
            for group, (parameter,) in self._table.by_group(name):
                if name in masks:
                    self._update_masked(parameter, group, masks[name])
                else:
                    self._updates.update([parameter], group)
                parameter.grad = None

    def take_moved(self) -> dict[Tensor, Tensor | None]:
        """Return flat indices (int64, ascending) of entries that moved since the last call, by parameter; None: all.

        Lists entries of a mask on "update" from the second call on: a mask of one byte an entry is kept meanwhile.
        """
        masked = {parameter: mask.view(-1).nonzero().view(-1) for parameter, mask in self._moved.items()}
        whole = dict.fromkeys(self._updates.moved)
        self._moved.clear()
        self._updates.moved.clear()
        self._is_asked = True
        return {**masked, **whole}

    def num_bytes(self) -> int:
        """Bytes of state and masters."""
        return sum(map(self._states.num_bytes, self.names))

    def _update_masked(self, parameter: Parameter, group: Group, mask: Tensor) -> None:
        """Update a tensor that has a gradient; weight decay acts only on entries of the mask.

        Args:
            parameter: the tensor.
            group: hyper-parameters.
            mask: bool, shape of the local part. On "gradient" the gradient is already zero outside the mask, and
                moments move all entries. On "update" moments see the whole gradient, and entries outside the mask do
                not move.
        """
        assert self._mask is not None
        mine = local_part(parameter)
        weight = self._states.of(parameter).get(MASTER, mine)
        if self._mask.mask == "update":
            before, was_moved = weight.clone(), parameter in self._updates.moved
            self._updates.update([parameter], group)
            weight.copy_(torch.where(mask, weight, before))
            mine.copy_(weight)
            self._updates.wrote(parameter)
            if self._is_asked and not was_moved:
                self._updates.moved.discard(parameter)
                self._moved[parameter] = mask | self._moved[parameter] if parameter in self._moved else mask
            return
        assert parameter.grad is not None
        gradient, decay = local_part(parameter.grad), group["weight_decay"]
        if self._updates.rule.decouples_decay:
            weight.copy_(torch.where(mask, weight * (1 - group["lr"] * decay), weight))
        elif decay:
            # In the master's dtype: beside a gradient of half precision a small decay would be rounded away.
            gradient = gradient.to(weight.dtype).add(torch.where(mask, weight, 0.0), alpha=decay)
        self._updates.update([parameter], {**group, "weight_decay": 0.0}, gradient=gradient)

    def _gradients(self, names: Collection[str]) -> dict[str, Tensor]:
        """Local parts of the gradients that exist, by tensor name."""
        parameters = {name: self._table.of(name)[0] for name in names}
        return {name: local_part(p.grad) for name, p in parameters.items() if p.grad is not None}
