"""Gradients of a model on some batches, without side effects on the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from gradselect.blocks import module_of_getter
from gradselect.entries import MaskTensor
from gradselect.usage import UsageError

Batch = Mapping[str, Any]
Loss = Callable[[nn.Module, Batch], Tensor]
"""(model, batch) -> the loss, a scalar."""
Scores = dict[str, Tensor]
"""Tensors by parameter name, in the parameter's shape, float32 or wider."""


def model_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return the loss that a transformers model computes itself; the batch must hold labels."""
    return model(**batch).loss


@dataclass(frozen=True, kw_only=True)
class Probe:
    """Runs a model on batches to score its tensors.

    The model runs in evaluation mode (no dropout, so results repeat) on leaves that share the memory of its weights,
    and on copies of its buffers. Its gradients, modes, buffers, hooks on parameters, `requires_grad` and the random
    state stay unchanged, also after an error.

    Args:
        model: any module.
        tensors: parameters of the model.
        batches: may be iterated several times.
        loss: mean over the batch.
        reached: names of the tensors of which a gradient was found so far.
    """

    model: nn.Module
    tensors: Sequence[MaskTensor]
    batches: Iterable[Batch]
    loss: Loss = model_loss
    reached: set[str] = field(default_factory=set)

    def mean(self, compute: Callable[[Batch], Scores]) -> Scores:
        """Return the mean over batches of `compute(batch)`.

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
        """Return dL/dw of one batch."""
        leaves = self.leaves()
        return self.derivatives(self.run(leaves, batch, self.loss), leaves)

    def hessian_products(self, batch: Batch, directions: Scores) -> Scores:
        """Return H v of one batch, H the Hessian of the loss: the gradient of sum(dL/dw * v)."""
        leaves = self.leaves()
        loss = self.run(leaves, batch, self.loss)
        with torch.enable_grad():
            gradients = torch.autograd.grad(loss, list(leaves.values()), create_graph=True, materialize_grads=True)
            pairs = zip(gradients, directions.values(), strict=True)
            product = torch.stack([(gradient * direction).sum().to(loss.device) for gradient, direction in pairs]).sum()
        return self.derivatives(product, leaves)

    def leaves(self) -> dict[str, Tensor]:
        """Return leaves that share the memory of the tensors."""
        return {tensor.name: tensor.parameter.detach().requires_grad_() for tensor in self.tensors}

    def run(self, leaves: Mapping[str, Tensor], batch: Batch, function: Loss) -> Tensor:
        """Return `function(model, batch)`, with `leaves` in place of parameters and copies in place of buffers.

        Raises:
            UsageError: the value is not a scalar, or not finite.
        """
        buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        swapped = {f"model.{name}": tensor for name, tensor in {**buffers, **leaves}.items()}
        with torch.enable_grad():
            value = functional_call(_Call(self.model, function), swapped, (batch,))
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise UsageError(
                f"the loss of a batch is not a scalar but {type(value).__name__}; put labels into batches, or write "
                "loss=lambda model, batch: ..."
            )
        if not torch.isfinite(value):
            raise UsageError(
                f"the loss of a batch is {value.item()}, so its gradients rank nothing; "
                "look for batches without any label"
            )
        return value

    def derivatives(self, value: Tensor, leaves: Mapping[str, Tensor]) -> Scores:
        """Return d value / d leaf; zero if the value does not depend on the leaf, which is then not in `reached`."""
        if not value.requires_grad:
            return {name: widened(torch.zeros_like(leaf)) for name, leaf in leaves.items()}
        derivatives = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
        found = dict(zip(leaves, derivatives, strict=True))
        self.reached.update(name for name, derivative in found.items() if derivative is not None)
        return {
            name: widened(torch.zeros_like(leaves[name]) if derivative is None else derivative)
            for name, derivative in found.items()
        }


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
    """Switch to evaluation mode; restore modes and random states on exit."""
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
    """Return the tensor in float32 or wider, so that products are not rounded to half precision."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def sum_of_outputs(model: nn.Module, batch: Batch) -> Tensor:
    """Return the sum of the output, or of the first output if there are several. With labels that would be the loss."""
    outputs = model(**{name: value for name, value in batch.items() if name != "labels"})
    return widened(outputs if isinstance(outputs, Tensor) else outputs[0]).sum()


def batch_of_ones(model: nn.Module) -> Batch:
    """Return a batch of input embeddings of ones.

    Raises:
        UsageError: the model has no `get_input_embeddings`, or not an `nn.Embedding` there.
    """
    embedding = module_of_getter(model, "get_input_embeddings")
    if not isinstance(embedding, nn.Embedding):
        raise UsageError(
            f"{type(model).__name__} does not name its input embedding, so synflow cannot build an input; "
            "write batches=[{...}] with an input for model(**batch)"
        )
    weight = embedding.weight
    return {"inputs_embeds": torch.ones(1, 2, embedding.embedding_dim, dtype=weight.dtype, device=weight.device)}
