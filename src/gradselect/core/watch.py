"""Watch over a model that others use too: what they thaw, add or load between two steps."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import Parameter
from torch.utils.hooks import RemovableHandle

from gradselect.usage import UsageError

from .fingerprint import Fingerprints, check_fingerprints, fingerprints
from .freezing import freeze, is_frozen_for_now


class ModelWatch:
    """Keeps a selection as it was selected, and refuses a model that is not the one the optimizer was built for.

    **Thawed by others.** `disable_adapter()` of PEFT leaves every weight of the adapter trainable. Before a forward
    pass that records a graph, parameters that are marked as frozen are frozen again. The whole model and its outermost
    repeated layers are watched: a checkpoint that recomputes activations in the backward pass runs a layer alone, and a
    loss may call the inner model.

    **Added by others.** A trainer that wraps the model with an adapter after the optimizer was built adds weights that
    nothing would train.

    **Not loaded.** After `expect`, the weights of the next pass must have these fingerprints.

    Args:
        model: the whole model, without wrappers.
        owned: returns the parameters of the optimizer as they are now.
    """

    def __init__(self, model: nn.Module, owned: Callable[[], Sequence[Parameter]]) -> None:
        self._model = model
        self._owned = weakref.WeakMethod(owned)  # pyright: ignore[reportArgumentType]
        self._expected: Mapping[str, Any] | None = None
        self._handles: list[RemovableHandle] = []
        self.open()

    def open(self) -> None:
        """Begin to watch, at the start and after `close`."""
        self._is_checked = False
        for module in (self._model, *outermost_layers(self._model)):
            self._handles.append(module.register_forward_pre_hook(_BeforeForward(self)))
        weakref.finalize(self, _remove, self._handles).atexit = False

    def close(self) -> None:
        """Remove all hooks."""
        _remove(self._handles)

    def fingerprints(self) -> Fingerprints:
        """Return the fingerprints of all weights."""
        return fingerprints(self._model.named_parameters())

    def expect(self, saved: Mapping[str, Any] | None) -> None:
        """Require these fingerprints of the weights in the next pass or step; None or none: accept any weights."""
        self._expected = saved or None

    def check(self) -> None:
        """Check once that the model is the one that the optimizer was built for, with the weights that are expected.

        Raises:
            UsageError: it is not.
        """
        if not self._is_checked:
            self._is_checked = True
            self._check_additions()
        self.check_weights()

    def check_weights(self) -> None:
        """Check once that the weights are those that are expected, if any are.

        Raises:
            UsageError: names those that differ.
        """
        if self._expected is not None:
            check_fingerprints(self._expected, self._model.named_parameters())
            self._expected = None

    def _check_additions(self) -> None:
        owned = self._owned()
        known = set(map(id, () if owned is None else owned()))
        named = self._model.named_parameters()
        added = [name for name, parameter in named if parameter.requires_grad and id(parameter) not in known]
        if added:
            raise UsageError(
                f"{len(added)} parameters of the model are trainable and not among those of its optimizer, {added[0]!r} "
                "among them: an adapter was added, or weights were thawed, after the optimizer was built, and nothing "
                "would train them. Build the optimizer from the finished model; in a trainer that adds an adapter "
                "itself, give optimizer_cls_and_kwargs=(SelectiveOptimizerFactory, {...}) instead of an optimizer"
            )


class _BeforeForward:
    """Hook before the forward pass of one module. It does not keep the watch alive."""

    def __init__(self, watch: ModelWatch) -> None:
        self._watch = weakref.ref(watch)
        self._parameters: tuple[Parameter, ...] | None = None

    def __call__(self, module: nn.Module, _: Any) -> None:
        # torch.compile leaves this out: it could not see the flags of a later selection.
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return
        watch = self._watch()
        if watch is None:
            return
        watch.check_weights()
        if self._parameters is None:  # in the first pass: until then a wrapper may replace them
            self._parameters = tuple(module.parameters())
        refreeze(self._parameters)


def refreeze(parameters: Iterable[Parameter]) -> None:
    """Freeze the parameters that are marked as frozen for the moment, and are not frozen."""
    for parameter in parameters:
        if parameter.requires_grad and is_frozen_for_now(parameter):
            freeze(parameter, True)


def outermost_layers(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the children of each `nn.ModuleList` and `nn.Sequential`, but not those inside of such a child."""
    for child in model.children():
        if isinstance(model, nn.ModuleList | nn.Sequential):
            yield child
        else:
            yield from outermost_layers(child)


def _remove(handles: list[RemovableHandle]) -> None:
    while handles:
        handles.pop().remove()
