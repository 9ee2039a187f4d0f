"""Watch over a model that others use too: what they thaw, add or load between two steps."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.utils.hooks import RemovableHandle

from .adapters import frozen_in_adapters
from .fingerprint import Fingerprints, check_fingerprints, fingerprints
from .freezing import freeze, is_frozen_for_now
from .hooks import make_no_hook, remove_all, remove_with
from .members import Members
from .passes import BackwardPasses


class ModelWatch:
    """Keeps a selection as it was selected, and refuses a model that is not the one the optimizer was built for.

    **Thawed by others.** `disable_adapter()` of PEFT leaves every weight of the adapter trainable. Parameters that are
    marked as frozen are frozen again before a forward pass that records a graph, and at the start of its backward pass,
    in which checkpointed layers run once more. A loss may call an inner model, so every module around the layers is
    watched; only the outermost one that is called does something. What the user froze in an adapter that is active,
    such as the A matrices of LoRA, is frozen again too.

    **Added, replaced or resized by others.** A trainer that wraps the model with an adapter after the optimizer was
    built adds weights that nothing would train. `load_state_dict(assign=True)` or a new head puts other parameters in
    the place of those that the optimizer trains. Every step looks.

    **Not loaded.** After `expect`, the weights of the next pass must have these fingerprints.

    Args:
        model: the whole model, without wrappers.
        owned: returns the parameters of the optimizer as they are now.
        passes: of the optimizer; backward passes are announced to them.
    """

    def __init__(self, model: nn.Module, owned: Callable[[], Sequence[Parameter]], passes: BackwardPasses) -> None:
        self._model = model
        self._passes = passes
        self._owned = weakref.WeakMethod(owned)  # pyright: ignore[reportArgumentType]
        self._members = Members(model, owned())
        self._expected: Mapping[str, Any] | None = None
        self._handles: list[RemovableHandle] = []
        remove_with(self, self._handles)
        self.open()

    def open(self) -> None:
        """Begin to watch, at the start and after `close`."""
        self._called: nn.Module | None = None
        self._frozen_by_user = frozen_in_adapters(self._model)
        before, after = _BeforeForward(self), _AfterForward(self)
        for module in modules_around_layers(self._model):
            self._handles.append(module.register_forward_pre_hook(before))
            self._handles.append(module.register_forward_hook(after, always_call=True))

    def close(self) -> None:
        """Remove all hooks; freeze a last time what the user froze."""
        self._refreeze_for_user()
        remove_all(self._handles)

    def fingerprints(self) -> Fingerprints:
        """Return the fingerprints of all weights."""
        return fingerprints(self._model.named_parameters())

    def expect(self, saved: Mapping[str, Any] | None) -> None:
        """Require these fingerprints of the weights in the next pass or step; None or none: accept any weights."""
        self._expected = saved or None

    def check(self) -> None:
        """Check that the model is the one that the optimizer was built for, once with the weights that are expected.

        Raises:
            UsageError: it is not.
        """
        self._called = None  # no forward pass is running at a step
        owned = self._owned()
        self._members.check(() if owned is None else owned())
        self.check_weights()

    def check_weights(self) -> None:
        """Check once that the weights are those that are expected, if any are.

        Raises:
            UsageError: names those that differ.
        """
        if self._expected is not None:
            check_fingerprints(self._expected, self._model.named_parameters())
            self._expected = None

    def before_forward(self, module: nn.Module) -> None:
        """Prepare the pass if the module is the outermost one that is called."""
        # torch calls no hook after an interruption from the keyboard: a module that is called again has ended so.
        if self._called is None or self._called is module:
            self._called = module
            self._passes.forget()
            self._passes.count_forward()
            self.check_weights()
            self.refreeze()

    def after_forward(self, module: nn.Module, output: Any) -> None:
        """Prepare the backward pass in the same way."""
        if self._called is module:
            self._called = None
            hook = _AtBackward(self)
            for tensor in tensors_of(output):
                if tensor.requires_grad:
                    tensor.register_hook(hook)

    def before_backward(self) -> None:
        """Announce the pass, and prepare it."""
        self._passes.announce()
        self.refreeze()

    def refreeze(self) -> None:
        """Freeze the parameters that are marked as frozen for the moment, or were frozen by the user, and are not."""
        self._refreeze_for_user()
        owned = self._owned()
        for parameter in () if owned is None else owned():
            if parameter.requires_grad and is_frozen_for_now(parameter):
                freeze(parameter, True)

    def _refreeze_for_user(self) -> None:
        for parameter in self._frozen_by_user:
            if parameter.requires_grad:
                parameter.requires_grad_(False)
                parameter.grad = None


class _Hook:
    """Hook that does not keep the watch alive."""

    def __init__(self, watch: ModelWatch) -> None:
        self._watch = weakref.ref(watch)

    @property
    def watch(self) -> ModelWatch | None:
        # torch.compile leaves this out: it could not see the flags of a later selection.
        return None if torch.compiler.is_compiling() else self._watch()

    def __reduce__(self) -> Any:
        return make_no_hook, ()


class _BeforeForward(_Hook):
    def __call__(self, module: nn.Module, _: Any) -> None:
        if (watch := self.watch) is not None and torch.is_grad_enabled():
            watch.before_forward(module)


class _AfterForward(_Hook):
    def __call__(self, module: nn.Module, _: Any, output: Any) -> None:
        if (watch := self.watch) is not None:
            watch.after_forward(module, output)


class _AtBackward(_Hook):
    def __call__(self, _: Tensor) -> None:
        if (watch := self.watch) is not None:
            watch.before_backward()


def tensors_of(output: Any) -> Iterator[Tensor]:
    """Yield the tensors of a model's output: a tensor, or sequences, mappings and dataclasses of outputs."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        yield from (tensor for value in output.values() for tensor in tensors_of(value))
    elif isinstance(output, list | tuple):
        yield from (tensor for value in output for tensor in tensors_of(value))
    elif is_dataclass(output) and not isinstance(output, type):
        yield from (tensor for field in fields(output) for tensor in tensors_of(getattr(output, field.name)))


def modules_around_layers(model: nn.Module) -> list[nn.Module]:
    """Return the model and the modules inside it that contain a list or an `nn.Sequential`, down to those."""
    around = [model]
    for child in model.children():
        if not _may_hold_layers(child) and any(map(_may_hold_layers, child.modules())):
            around += modules_around_layers(child)
    return around


def is_list(module: nn.Module) -> bool:
    """Return True for an `nn.ModuleList`, and for an `nn.ModuleDict` that numbers its modules.

    Example:
        >>> is_list(nn.ModuleDict({"0": nn.ReLU(), "1": nn.ReLU()}))
        True
    """
    if isinstance(module, nn.ModuleDict):
        return len(module) > 0 and all(key.isdecimal() for key in module)
    return isinstance(module, nn.ModuleList)


def _may_hold_layers(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential) or is_list(module)
