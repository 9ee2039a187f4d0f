"""Parameters of a model that an optimizer was built for: those that others add, replace or resize are refused."""

from __future__ import annotations

from collections.abc import Sequence
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

    def check(self, owned: Sequence[Parameter]) -> None:
        """Check the model as it is now.

        Args:
            owned: as at the start, or what a wrapper has put in their place.

        Raises:
            UsageError: a parameter of the optimizer was resized or is no longer in the model, or one that is trainable
                is not the optimizer's.
        """
        here = _parameters_of(self._model)
        for name, shape, parameter in zip(self._names, self._shapes, owned, strict=True):
            if parameter.shape != shape:
                raise UsageError(
                    f"{name!r} has the shape {tuple(parameter.shape)}, and had {tuple(shape)} when the optimizer was "
                    "built, whose state has that shape. Build the optimizer after the change, such as "
                    "resize_token_embeddings"
                )
        known = set(map(id, owned))
        if not known <= here.keys():
            gone = [name for name, parameter in zip(self._names, owned, strict=True) if id(parameter) not in here]
            raise UsageError(
                f"{len(gone)} parameters of the optimizer are no longer in the model, {gone[0]!r} among them: they "
                "were replaced or removed after the optimizer was built, as by load_state_dict(..., assign=True), "
                "resize_token_embeddings or a new module, and it would train what the model does not use. Build the "
                "optimizer from the finished model; load weights with load_state_dict(...) without assign=True"
            )
        if any(here[key].requires_grad for key in here.keys() - known):
            self._refuse_additions(known)

    def _refuse_additions(self, known: set[int]) -> None:
        named = self._model.named_parameters()
        added = [name for name, parameter in named if parameter.requires_grad and id(parameter) not in known]
        raise UsageError(
            f"{len(added)} parameters of the model are trainable and unknown to its optimizer, {added[0]!r} among "
            "them: an adapter was added, or weights were thawed, after the optimizer was built, and nothing "
            "would train them. Build the optimizer from the finished model; in a trainer that adds an adapter "
            "itself, write optimizer_cls_and_kwargs=(SelectiveOptimizerFactory, {...}) instead of an optimizer"
        )


def _parameters_of(model: nn.Module) -> dict[int, Parameter]:
    """Return the parameters by id. Every step looks, so this is a plain loop and not `model.parameters()`."""
    found: dict[int, Parameter] = {}
    modules, seen = [model], {id(model)}
    for module in modules:
        for parameter in module._parameters.values():
            if parameter is not None:
                found[id(parameter)] = parameter
        for child in module._modules.values():
            if child is not None and id(child) not in seen:
                seen.add(id(child))
                modules.append(child)
    return found
