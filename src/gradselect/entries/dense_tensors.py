"""Tensors with state for every entry: those of a dense mask, and those that always train."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

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
from gradselect.parallel import as_dtensor, is_dtensor, local_part

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

        A mask on "gradient" also sets the gradient of other entries to zero. One that ranks momentum selects in
        `update`.
        """
        if self._mask is None or self._mask.ranks == "momentum":
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

    def update(self, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Apply the rule to each tensor that has a gradient, and free the gradient.

        Args:
            masks: as `select` returned them.

        Returns:
            The masks, those that were made from momentum among them.
        """
        used = dict(masks)
        ranks_momentum = self._mask is not None and self._mask.ranks == "momentum"
        by_momentum = frozenset(self._mask.names if self._mask is not None and ranks_momentum else ())
        for name in self.names:
            for group, (parameter,) in self._table.by_group(name):
                if name in by_momentum and parameter.grad is not None:
                    used[name] = self._update_by_momentum(parameter, group)
                elif name in masks:
                    self._update_masked(parameter, group, masks[name])
                else:
                    self._updates.update([parameter], group)
                parameter.grad = None
        return used

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
            self._update_some(parameter, group, lambda: mask)
            return
        assert parameter.grad is not None
        gradient, decay = local_part(parameter.grad), group["weight_decay"]
        if self._updates.rule.decouples_decay:
            weight.copy_(torch.where(mask, weight * (1 - group["lr"] * decay), weight))
        elif decay:
            # In the master's dtype: beside a gradient of half precision a small decay would be rounded away.
            gradient = gradient.to(weight.dtype).add(torch.where(mask, weight, 0.0), alpha=decay)
        self._updates.update([parameter], {**group, "weight_decay": 0.0}, gradient=gradient)

    def _update_by_momentum(self, parameter: Parameter, group: Group) -> Tensor:
        """Update the entries that the mask selects by the first moment, which has the step's gradient in it."""
        mask, name = self._mask, self._updates.rule.momentum_name
        assert mask is not None
        assert name is not None

        def chosen() -> Tensor:
            moment = self._states.of(parameter)[name].view_as(local_part(parameter))
            whole = as_dtensor(moment, like=parameter) if is_dtensor(parameter) else moment
            return mask.masks([whole])[0]

        return self._update_some(parameter, group, chosen)

    def _update_some(self, parameter: Parameter, group: Group, choose: Callable[[], Tensor]) -> Tensor:
        """Update a tensor, then put back the entries outside the mask that `choose` returns afterwards. Return it."""
        mine = local_part(parameter)
        weight = self._states.of(parameter).get(MASTER, mine)
        before, was_moved = weight.clone(), parameter in self._updates.moved
        self._updates.update([parameter], group)
        mask = choose()
        weight.copy_(torch.where(mask, weight, before))
        mine.copy_(weight)
        self._updates.wrote(parameter)
        if self._is_asked and not was_moved:
            self._updates.moved.discard(parameter)
            self._moved[parameter] = mask | self._moved[parameter] if parameter in self._moved else mask
        return mask

    def _gradients(self, names: Collection[str]) -> dict[str, Tensor]:
        """Local parts of the gradients that exist, by tensor name."""
        parameters = {name: self._table.of(name)[0] for name in names}
        return {name: local_part(p.grad) for name, p in parameters.items() if p.grad is not None}
