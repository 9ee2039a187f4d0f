"""Forward passes on the meta device: shapes and autograd, no data."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import Parameter, functional
from torch.overrides import TorchFunctionMode

from gradselect.core import is_frozen_for_now
from gradselect.slices import sliced_linears
from gradselect.usage import UsageError

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Tokens of one forward pass.

    Args:
        batch: number of rows.
        length: tokens of a row.
        masked: True if attention gets a mask, because rows are padded or packed.
    """

    batch: int
    length: int
    masked: bool = False


def meta_copy(model: Model, *, checkpointing: bool = False) -> Model:
    """Return a copy of the model on the meta device, as it is while it trains.

    The copy is in training mode, and parameters that an optimizer has frozen for this step require a gradient. Flash
    and flex attention become SDPA, which keeps the same tensors.

    Args:
        model: any module; it stays as it is.
        checkpointing: switch the cache of keys and values off, as transformers does with gradient checkpointing.
    """
    wholes = [sliced.whole_weight for sliced in sliced_linears(model).values()]
    twins: dict[int, Any] = {id(tensor): tensor.to("meta") for tensor in (*model.buffers(), *wholes)}
    for parameter in model.parameters():
        trains = parameter.requires_grad or is_frozen_for_now(parameter)
        twins[id(parameter)] = Parameter(parameter.detach().to("meta"), requires_grad=trains)
    copied: Any = copy.deepcopy(model, twins).train()
    config = getattr(copied, "config", None)
    if getattr(config, "_attn_implementation", None) not in (None, "eager", "sdpa"):
        copied.set_attn_implementation("sdpa")
    if checkpointing and config is not None:
        config.get_text_config().use_cache = False
    return copied


def run_on_meta(model: nn.Module, rows: Rows) -> Tensor:
    """Return the logits of a forward pass on the meta device. Attention counts as a fused kernel unless it is eager.

    Args:
        model: on the meta device; a model of transformers, or one that takes tokens and returns logits.
        rows: the tokens.

    Raises:
        UsageError: the model does not run on the meta device, or returns no logits.
    """
    tokens = torch.zeros(rows.batch, rows.length, dtype=torch.int64, device="meta")
    inputs = {"attention_mask": torch.ones_like(tokens)} if rows.masked else {}
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = tokens
    try:
        with _WithoutData(answer=not rows.masked):
            output = model(tokens, **inputs)
    except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
        raise UsageError(
            f"the activations of {type(model).__name__} cannot be counted: its forward pass does not run on the meta "
            f"device ({str(error).splitlines()[0]})"
        ) from error
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor):
        raise UsageError(
            f"the activations of {type(model).__name__} cannot be counted: it returns {type(output).__name__} without "
            "logits; plan with the model that you train, e.g. AutoModelForCausalLM"
        )
    return logits


class _WithoutData(TorchFunctionMode):
    """Makes a forward pass on the meta device keep what it keeps on an accelerator.

    * The meta device computes SDPA by its formula, which saves all probabilities.
    * It saves the mask of a dropout as numbers, not as one byte an entry.
    * Models ask for values that the meta device lacks: do all tokens count, is no row packed?

    Args:
        answer: to such questions. False makes transformers build the mask.
    """

    def __init__(self, *, answer: bool) -> None:
        super().__init__()
        self._answer = answer

    def __torch_function__(
        self, function: Any, types: Any, arguments: tuple[Any, ...] = (), options: dict[str, Any] | None = None
    ) -> Any:
        options = options or {}
        if function is functional.scaled_dot_product_attention:
            return _attend(*arguments, **options)
        if function is functional.dropout:
            return _drop(*arguments, **options)
        if function is Tensor.__bool__ and arguments[0].is_meta:
            return self._answer
        return function(*arguments, **options)


def _attend(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options: Any) -> Tensor:
    # torch turns a boolean mask into numbers of the query's type before it picks a kernel.
    mask = attn_mask.to(query.dtype) if attn_mask is not None and attn_mask.dtype is torch.bool else attn_mask
    return _FusedAttention.apply(query, key, value, mask)


def _drop(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    return torch.native_dropout(x, p, train=True)[0] if training and p > 0 else x


class _FusedAttention(torch.autograd.Function):
    """Saves what fused kernels save: queries, keys, values, mask, output, and one number a head and token."""

    @staticmethod
    def forward(context: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        batch, heads, length, _ = query.shape  # (4, 16, 512, 64)
        # Tokens before heads, as the kernels write it: no copy is needed to join the heads.
        output = query.new_empty(batch, length, heads, value.shape[-1]).transpose(1, 2)
        numbers = query.new_empty(query.shape[:-1], dtype=torch.float32)
        context.save_for_backward(query, key, value, mask, output, numbers)
        return output
