"""FixedEntries: entries that the user names."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self, final

import torch
from torch import Tensor, nn

from gradselect.entries import SELECTABLE, AbstractCompactMask, FromWeights, Indices, MaskTensor
from gradselect.usage import UsageError, check_is, matching


@final
@dataclass(eq=False, kw_only=True)
class FixedEntries(AbstractCompactMask):
    """Select the entries that `entries` names, at step 0; the set never changes.

    A checkpoint keeps their number and a digest, so that a run with other entries cannot be resumed by mistake.

    Args:
        entries: flat indices by parameter name, integers, ascending, each once. A tensor may have none; if none has
            any, the mask selects from no tensor, and only what the optimizer's `always` names trains.
        about: words for the record of a run, e.g. how the entries were found.
        among: names or globs that narrow `entries` down. None: all of them.

    Raises:
        UsageError: indices that are not ascending integers; at `bind`, a name that no trainable parameter has, or an
            index beyond its end.

    Example:
        >>> import torch
        >>> import gradselect as gs
        >>> model = torch.nn.Linear(3, 2)
        >>> optimizer = gs.SparseOptimizer(model, gs.FixedEntries(entries={"weight": torch.tensor([0, 5])}))
        >>> optimizer.entries
        {'weight': tensor([0, 5])}
    """

    entries: Mapping[str, Tensor]
    about: str = ""

    def __post_init__(self) -> None:
        check_is(self.entries, Mapping, name="entries", example='entries={"layers.0.up.weight": torch.tensor([0, 5])}')
        self.entries = {name: _checked(name, indices) for name, indices in self.entries.items()}

    def bind(self, tensors: Sequence[MaskTensor]) -> Self:
        matching([tensor.name for tensor in tensors], list(self.entries), key="entries", kind=SELECTABLE)
        if any(map(len, self.entries.values())):
            return super().bind(tensors)
        bound = copy.copy(self)
        bound.tensors = ()
        return bound

    def can_use(self, tensor: MaskTensor) -> bool:
        return tensor.name in self.entries

    def start(self) -> None:
        for tensor in self.tensors:
            indices = self.entries[tensor.name]
            if len(indices) and int(indices[-1]) >= tensor.numel:
                raise UsageError(
                    f"entries: index {int(indices[-1])} is beyond the {tensor.numel:,} entries of {tensor.name!r}; "
                    "give flat indices of the whole tensor, from 0"
                )

    def choice(self, step: int, num_chosen: int) -> FromWeights | None:
        return FromWeights() if step == 0 else None

    def choose(self, step: int, model: nn.Module) -> Indices:
        found = {tensor.name: self.entries[tensor.name].to(tensor.parameter.device) for tensor in self.tensors}
        return {name: indices for name, indices in found.items() if len(indices)}

    def settings(self) -> dict[str, Any]:
        """Return the settings; `entries` becomes their number and a digest."""
        digest = hashlib.blake2b(digest_size=8)
        for name, indices in self.entries.items():
            places = torch.arange(1, len(indices) + 1, device=indices.device)
            marks = [int(each.sum()) for each in (indices, indices.square(), indices * places)]
            digest.update(f"{name}/{len(indices)}/{marks}".encode())
        count = sum(map(len, self.entries.values()))
        text = f"{count:,} entries of {len(self.entries):,} tensors, {digest.hexdigest()}"
        return super().settings() | {"entries": text}


def _checked(name: str, indices: object) -> Tensor:
    """Return the indices as int64.

    Raises:
        UsageError: they are no integers, or not ascending from 0.
    """
    tensor = torch.as_tensor(indices)
    if tensor.numel() and (tensor.ndim != 1 or tensor.is_floating_point() or tensor.dtype == torch.bool):
        raise UsageError(
            f"entries[{name!r}] is not a list of flat indices but {tensor.dtype} of shape {tuple(tensor.shape)}; write "
            "e.g. mask.view(-1).nonzero().view(-1)"
        )
    tensor = tensor.reshape(-1).to(torch.int64)
    if len(tensor) and (int(tensor[0]) < 0 or not bool((tensor[1:] > tensor[:-1]).all())):
        raise UsageError(f"entries[{name!r}] must ascend from 0, each index once; write indices.unique()")
    return tensor
