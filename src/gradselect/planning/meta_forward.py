"""The bytes that autograd keeps of any model, counted by running its forward pass on the meta device."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import Parameter, functional
from torch.overrides import TorchFunctionMode

from gradselect.core import is_frozen_for_now
from gradselect.usage import UsageError

from .tape import Rows

Model = TypeVar("Model", bound=nn.Module)


def on_meta(model: Model) -> Model:
    """A copy of the model without its numbers; what an optimizer has frozen for the moment trains in it."""
    if all(parameter.is_meta for parameter in model.parameters()):
        return model
    twins: dict[int, Any] = {id(buffer): buffer.to("meta") for buffer in model.buffers()}
    for parameter in model.parameters():
        trains = parameter.requires_grad or is_frozen_for_now(parameter)
        twins[id(parameter)] = Parameter(parameter.detach().to("meta"), requires_grad=trains)
    return copy.deepcopy(model, twins)


def count_saved(model: nn.Module, trained: Collection[str], rows: Rows) -> int:
    """Bytes of all that a forward pass and its loss keep for the backward pass, without weights.

    No byte of data is touched: the model stands on the meta device. Attention counts as a fused kernel.

    Args:
        model: on the meta device; a model of transformers, or one that takes tokens and returns logits.
        trained: names of the parameters that have a gradient.
        rows: the tokens.

    Raises:
        UsageError: the model cannot be run on the meta device.
    """
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in weights:
            # The tensor stays with its number, or another one would get it.
            kept.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    try:
        _set_trainable(model, trained.__contains__)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), _WithoutData():
            _loss(model, rows)
    finally:
        _set_trainable(model, before.__getitem__)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def _loss(model: nn.Module, rows: Rows) -> Any:
    tokens = torch.zeros(rows.batch, rows.length, dtype=torch.int64, device="meta")
    is_pair = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    try:
        output = model(tokens, decoder_input_ids=tokens) if is_pair else model(tokens)
    except (RuntimeError, NotImplementedError, TypeError) as error:
        raise UsageError(
            f"the activations of {type(model).__name__} cannot be counted: its forward pass does not run on the meta "
            f"device ({str(error).splitlines()[0]})"
        ) from error
    logits = getattr(output, "logits", output)
    # Of a classifier, one row of logits an example.
    targets = tokens if logits.ndim == 3 else tokens[:, 0]
    return functional.cross_entropy(logits.flatten(0, -2).float(), targets.flatten())


def _set_trainable(model: nn.Module, trains: Callable[[str], bool]) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trains(name))


class _Attention(torch.autograd.Function):
    """Keeps what the fused kernels keep: queries, keys, values, the output, and a number a head and token."""

    @staticmethod
    def forward(context: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        batch, heads, length, _ = query.shape  # (4, 16, 512, 64)
        # Tokens before heads, as the kernels write it: no copy is needed to join the heads.
        output = query.new_empty(batch, length, heads, value.shape[-1]).transpose(1, 2)
        numbers = query.new_empty(query.shape[:-1], dtype=torch.float32)
        context.save_for_backward(query, key, value, output, numbers)
        return output


class _WithoutData(TorchFunctionMode):
    """What the meta device cannot say itself.

    Attention would count as its plain formula, which keeps all probabilities. And models ask whether all tokens count,
    whether no row is packed: yes.
    """

    def __torch_function__(
        self, function: Any, types: Any, arguments: tuple[Any, ...] = (), options: dict[str, Any] | None = None
    ) -> Any:
        if function is functional.scaled_dot_product_attention:
            return _Attention.apply(*arguments[:3])
        if function is Tensor.__bool__ and arguments[0].is_meta:
            return True
        return function(*arguments, **(options or {}))
