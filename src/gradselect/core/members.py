"""Parameters of a model that an optimizer was built for: those that others add, replace or resize are refused."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from operator import attrgetter, is_, methodcaller
from typing import final

from torch import nn
from torch.nn import Parameter

from gradselect.usage import UsageError


@final
class Members:
    """Checks that an optimizer still trains the parameters of its model, and all that are trainable.

    Args:
        model: the whole model, without wrappers.
        owned: parameters of the optimizer.
    """

    def __init__(self, model: nn.Module, owned: Sequence[Parameter]) -> None:
        self._model = model
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._names = [names.get(id(parameter), "a weight") for parameter in owned]
        self._shapes = [parameter.shape for parameter in owned]
        self._modules: list[nn.Module] = []
        self._parts: list[object] = []
        self._others: list[Parameter] = []

    def check(self, owned: Sequence[Parameter]) -> None:
        """Check the model as it is now.

        Every step does so, on an accelerator while it would wait for work. So a model that holds the same modules and
        parameters as at the last check is not walked again.

        Args:
            owned: as at the start, or what a wrapper has put in their place.

        Raises:
            UsageError: a parameter of the optimizer was resized or is no longer in the model, or one that is trainable
                is not the optimizer's.
        """
        for name, shape, parameter in zip(self._names, self._shapes, owned, strict=True):
            if parameter.shape != shape:
                raise UsageError(
                    f"{name!r} has the shape {tuple(parameter.shape)}, and had {tuple(shape)} when the optimizer was "
                    "built, whose state has that shape. Build the optimizer after the change, such as "
                    "resize_token_embeddings"
                )
        parts = [*owned, *_parts_of(self._modules)]
        if not self._modules or len(parts) != len(self._parts) or not all(map(is_, parts, self._parts)):
            self._walk(owned)
        if any(parameter.requires_grad for parameter in self._others):
            self._refuse_additions(set(map(id, owned)))

    def _walk(self, owned: Sequence[Parameter]) -> None:
        """Find every parameter of the model. Refuse if one of `owned` is not among them."""
        self._modules = list(self._model.modules())
        self._parts = [*owned, *_parts_of(self._modules)]
        here = {id(parameter): parameter for parameter in self._model.parameters()}
        gone = [name for name, parameter in zip(self._names, owned, strict=True) if id(parameter) not in here]
        if gone:
            self._modules = []  # the next check walks again
            raise UsageError(
                f"{len(gone)} parameters of the optimizer are no longer in the model, {gone[0]!r} among them: they "
                "were replaced or removed after the optimizer was built, as by load_state_dict(..., assign=True), "
                "resize_token_embeddings or a new module, and it would train what the model does not use. Build the "
                "optimizer from the finished model; load weights with load_state_dict(...) without assign=True"
            )
        known = set(map(id, owned))
        self._others = [parameter for key, parameter in here.items() if key not in known]

    def _refuse_additions(self, known: set[int]) -> None:
        named = self._model.named_parameters()
        added = [name for name, parameter in named if parameter.requires_grad and id(parameter) not in known]
        raise UsageError(
            f"{len(added)} parameters of the model are trainable and unknown to its optimizer, {added[0]!r} among "
            "them: an adapter was added, or weights were thawed, after the optimizer was built, and nothing "
            "would train them. Build the optimizer from the finished model; in a trainer that adds an adapter "
            "itself, write optimizer_cls_and_kwargs=(SelectiveOptimizerFactory, {...}) instead of an optimizer"
        )


def _parts_of(modules: Sequence[nn.Module]) -> Iterable[object]:
    """Return the parameters and children of each module."""
    values = methodcaller("values")
    parameters = map(values, map(attrgetter("_parameters"), modules))
    children = map(values, map(attrgetter("_modules"), modules))
    return chain.from_iterable(chain(parameters, children))
