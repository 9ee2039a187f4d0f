"""Gradients of a model on some batches, taken without leaving a trace in it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from gradselect.entries import MaskTensor
from gradselect.usage import UsageError

Batch = Mapping[str, Any]
Loss = Callable[[nn.Module, Batch], Tensor]
"""From a model and a batch to a scalar."""
Scores = dict[str, Tensor]
"""A tensor of each parameter's shape, float32 or wider, by name."""


def model_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The loss that the models of transformers compute themselves, where the batch holds labels."""
    return model(**batch).loss


@dataclass(frozen=True, kw_only=True)
class Probe:
    """A model, the tensors to score, and what to score them by.

    The model runs in evaluation mode (no dropout, so the answer is always the same) on leaves that share its weights'
    memory and on copies of its buffers. So its gradients, modes, buffers, hooks on parameters, `requires_grad` and the
    random state are left as they were, also after an error.

    Args:
        model: any module.
        tensors: parameters of it.
        batches: may be gone through several times.
        loss: mean over the batch.
    """

    model: nn.Module
    tensors: Sequence[MaskTensor]
    batches: Iterable[Batch]
    loss: Loss = model_loss

    def mean(self, compute: Callable[[Batch], Scores]) -> Scores:
        """Mean of what `compute` gives for each batch.

        Raises:
            UsageError: there is no batch.
        """
        total: Scores = {}
        num_batches = 0
        with untouched(self.model):
            for batch in self.batches:
                scores = compute(batch)
                total = {name: total[name].add_(score) for name, score in scores.items()} if total else scores
                num_batches += 1
        if num_batches == 0:
            raise UsageError("batches is empty; write e.g. batches=[next(iter(loader))]")
        return {name: score.div_(num_batches) for name, score in total.items()}

    def gradients(self, batch: Batch) -> Scores:
        """dL/dw of one batch."""
        leaves = self.leaves()
        return self.derivatives(self.run(leaves, batch, self.loss), leaves)

    def hessian_products(self, batch: Batch, directions: Scores) -> Scores:
        """H v of one batch, H the Hessian of the loss: the gradient of sum(dL/dw * v)."""
        leaves = self.leaves()
        loss = self.run(leaves, batch, self.loss)
        with torch.enable_grad():
            gradients = torch.autograd.grad(loss, list(leaves.values()), create_graph=True, materialize_grads=True)
            pairs = zip(gradients, directions.values(), strict=True)
            product = torch.stack([(gradient * direction).sum().to(loss.device) for gradient, direction in pairs]).sum()
        return self.derivatives(product, leaves)

    def leaves(self) -> dict[str, Tensor]:
        """Stand-ins of the tensors, in their memory."""
        return {tensor.name: tensor.parameter.detach().requires_grad_() for tensor in self.tensors}

    def run(self, stand_ins: Mapping[str, Tensor], batch: Batch, function: Loss) -> Tensor:
        """`function(model, batch)` with stand-ins for parameters, by name, and for all buffers.

        Raises:
            UsageError: the value is no scalar, or not finite.
        """
        buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        swapped = {f"model.{name}": tensor for name, tensor in {**buffers, **stand_ins}.items()}
        with torch.enable_grad():
            value = functional_call(_Call(self.model, function), swapped, (batch,))
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise UsageError(
                f"a batch gave no scalar loss but {type(value).__name__}; put labels into batches, or write "
                "loss=lambda model, batch: ..."
            )
        if not torch.isfinite(value):
            raise UsageError(
                f"a batch gives {value.item()}, so its gradients rank nothing; look for batches without any label"
            )
        return value

    def derivatives(self, value: Tensor, leaves: Mapping[str, Tensor]) -> Scores:
        """d value / d leaf; zero where the value does not depend on it."""
        derivatives = torch.autograd.grad(value, list(leaves.values()), materialize_grads=True)
        return {name: widened(derivative) for name, derivative in zip(leaves, derivatives, strict=True)}


class _Call(nn.Module):
    """`function(model, batch)` as a module, so that `functional_call` reaches the model inside."""

    def __init__(self, model: nn.Module, function: Loss) -> None:
        super().__init__()
        self.model = model
        self.function = function

    def forward(self, batch: Batch) -> Tensor:
        return self.function(self.model, batch)


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; modes and random states are put back."""
    modes = {module: module.training for module in model.modules()}
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(device.index for device in devices)):
        try:
            model.eval()
            yield
        finally:
            for module, training in modes.items():
                module.training = training


def widened(tensor: Tensor) -> Tensor:
    """In float32 at least: what half precision stores is not multiplied in it."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
