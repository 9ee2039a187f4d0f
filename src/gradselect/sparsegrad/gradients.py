"""Gradients of chosen weights, batch by batch, of a model that is left as it was."""

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
    """Call `visit(name, gradient)` for each of `parameters` in the backward pass of each batch; then the gradient goes.

    The model is in evaluation mode meanwhile, so without dropout. Afterwards its parameters and their gradients,
    `requires_grad`, the modes of its modules, its buffers and the global random state are what they were.

    Raises:
        UsageError: no batch, or a batch without a loss.
    """
    loss = loss or _loss_of_output

    def arrived(name: str, parameter: Parameter) -> None:
        assert parameter.grad is not None
        visit(name, parameter.grad)
        parameter.grad = None

    num_batches = 0
    with ExitStack() as stack:
        for context in (_unchanged_random_state(model), _unchanged_modules(model), torch.enable_grad()):
            stack.enter_context(context)
        stack.enter_context(_only_training(model, parameters))
        for name, parameter in parameters.items():
            hook = parameter.register_post_accumulate_grad_hook(lambda arrived_at, name=name: arrived(name, arrived_at))
            stack.callback(hook.remove)
        for batch in batches:
            loss(model, batch).backward()
            num_batches += 1
    if num_batches == 0:
        raise UsageError("batches is empty; give some batches of the training data, e.g. list(islice(loader, 16))")


def _loss_of_output(model: nn.Module, batch: Any) -> Tensor:
    """The loss that models of transformers compute themselves."""
    if not isinstance(batch, Mapping):
        raise UsageError(
            f"a batch is a {type(batch).__name__}, not a mapping for model(**batch); "
            "write loss=lambda model, batch: <a scalar>"
        )
    found = getattr(model(**batch), "loss", None)
    if found is None:
        raise UsageError(
            f"{type(model).__name__} gave no loss for a batch with {', '.join(map(repr, batch))}; "
            'put "labels" in, or write loss=lambda model, batch: <a scalar>'
        )
    return found


@contextmanager
def _only_training(model: nn.Module, parameters: Mapping[str, Parameter]) -> Iterator[None]:
    """Everything but `parameters` is frozen, and no parameter has a gradient; both are put back."""
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    chosen = set(parameters.values())
    try:
        for parameter, _, _ in before:
            parameter.requires_grad_(parameter in chosen)
            parameter.grad = None
        yield
    finally:
        for parameter, requires_grad, grad in before:
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad


@contextmanager
def _unchanged_modules(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; each module's mode and buffers are put back."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        if not isinstance(module, Bases)  # large, and nothing writes to them
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
    """The generators of the CPU and of the model's devices are put back."""
    devices = {parameter.device for parameter in model.parameters()} - {torch.device("cpu"), torch.device("meta")}
    kinds = {device.type for device in devices}
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        for kind in kinds:
            indices = [device.index for device in devices if device.type == kind]
            stack.enter_context(torch.random.fork_rng(devices=indices, device_type=kind))
        yield
