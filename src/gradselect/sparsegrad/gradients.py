"""Gradients of some weights, batch by batch, without side effects on the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from gradselect.usage import UsageError

from .rotated import Bases

Loss = Callable[[nn.Module, Any], Tensor]
"""(model, batch) -> the loss, a scalar."""


def visit_gradients(
    model: nn.Module,
    parameters: Mapping[str, Parameter],
    batches: Iterable[Any],
    *,
    loss: Loss | None,
    visit: Callable[[str, Tensor], None],
) -> None:
    """Call `visit(name, gradient)` for each of `parameters` in the backward pass of each batch, then free the gradient.

    The model runs in evaluation mode, so without dropout. Parameters, gradients, `requires_grad`, modes of modules,
    buffers and the global random state are restored.

    Raises:
        UsageError: no batch, or a batch without a loss.
    """
    loss = loss or _loss_of_output

    def visit_and_free(name: str, parameter: Parameter) -> None:
        assert parameter.grad is not None
        visit(name, parameter.grad)
        parameter.grad = None

    num_batches = 0
    with ExitStack() as stack:
        for context in (_unchanged_random_state(model), _unchanged_modules(model), torch.enable_grad()):
            stack.enter_context(context)
        stack.enter_context(_only_training(model, parameters))
        for name, parameter in parameters.items():
            hook = parameter.register_post_accumulate_grad_hook(lambda weight, name=name: visit_and_free(name, weight))
            stack.callback(hook.remove)
        for batch in batches:
            loss(model, batch).backward()
            num_batches += 1
    if num_batches == 0:
        raise UsageError("batches is empty; pass batches of the training data, e.g. list(islice(loader, 16))")


def _loss_of_output(model: nn.Module, batch: Any) -> Tensor:
    """Return the loss that a transformers model computes itself."""
    if not isinstance(batch, Mapping):
        raise UsageError(
            f"a batch is a {type(batch).__name__}, not a mapping for model(**batch); "
            "write loss=lambda model, batch: <a scalar>"
        )
    found = getattr(model(**batch), "loss", None)
    if found is None:
        raise UsageError(
            f"{type(model).__name__} returned no loss for a batch with {', '.join(map(repr, batch))}; "
            'add "labels", or write loss=lambda model, batch: <a scalar>'
        )
    return found


@contextmanager
def _only_training(model: nn.Module, parameters: Mapping[str, Parameter]) -> Iterator[None]:
    """Freeze everything except `parameters` and take gradients away; restore both on exit."""
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    training = set(parameters.values())
    try:
        for parameter, _, _ in before:
            parameter.requires_grad_(parameter in training)
            parameter.grad = None
        yield
    finally:
        for parameter, requires_grad, grad in before:
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad


@contextmanager
def _unchanged_modules(model: nn.Module) -> Iterator[None]:
    """Switch to evaluation mode; restore modes and buffers on exit."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        if not isinstance(module, Bases)  # large, and never written to
        for name, buffer in module.named_buffers(recurse=False)
    ]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training
        for module, name, buffer, values in buffers:
            buffer.copy_(values)
            setattr(module, name, buffer)


@contextmanager
def _unchanged_random_state(model: nn.Module) -> Iterator[None]:
    """Restore the generators of the CPU and of the model's devices on exit."""
    devices = {parameter.device for parameter in model.parameters()} - {torch.device("cpu"), torch.device("meta")}
    kinds = {device.type for device in devices}
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        for kind in kinds:
            indices = [device.index for device in devices if device.type == kind]
            stack.enter_context(torch.random.fork_rng(devices=indices, device_type=kind))
        yield
