"""Weights that cannot train: quantised ones and integers, counted by the names of their tensors."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from gradselect.usage import beginnings, join, parent

from .freezing import is_frozen_for_now

PACKAGES = ("torchao", "optimum.quanto", "bitsandbytes", "hqq", "compressed_tensors", "gptqmodel", "auto_gptq", "awq")
"""Packages of quantised tensors that show the dtype of their dequantised values."""

WORDS_OF_BUFFERS = ("weight", "codes", "w_q")
"""Buffers whose name holds one of these keep weights; others of integers are positions and counters."""

ADVICE = (
    "train an adapter on this base (in a recipe: method: {name: lora}; in Python: peft.get_peft_model), or load it "
    "unquantised"
)

BITS_OF_PACKED = 4
"""Assumed where weights are packed into larger integers and the module does not say how many bits each takes."""


def can_train(parameter: Tensor) -> bool:
    """True if the dtype has gradients: floating or complex numbers of more than 8 bits."""
    return (parameter.is_floating_point() or parameter.is_complex()) and parameter.dtype.itemsize > 1


def quantised_weights(model: nn.Module) -> dict[str, int]:
    """Return the number of weights of each tensor that is quantised or of integers, by its name in the model.

    Parameters and buffers count, because GPTQ and AWQ keep weights in buffers. Packed weights count one by one; where
    nothing says how many bits each takes, 4 are assumed.
    """
    found: dict[str, int] = {}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if is_quantised(parameter):
                found[join(path, name)] = _num_weights(parameter, module)
        for name, buffer in module.named_buffers(recurse=False):
            if _holds_weights(name, buffer):
                found[join(path, name)] = _num_weights(buffer, module)
    return found


def is_quantised(parameter: Parameter) -> bool:
    """True if the parameter is stored quantised or as integers, so that it has no gradient."""
    if not can_train(parameter):
        return True
    # Some store packed bits under a floating dtype, or show the dtype of the values.
    return not parameter.requires_grad and type(parameter).__module__.startswith(PACKAGES)


def is_chosen(model: nn.Module, path: str, fixed: Mapping[str, int]) -> bool:
    """True if somebody chose what trains at or below `path`: with an adapter of PEFT, or by freezing other weights.

    Args:
        model: holds quantised weights.
        path: of a module; "" is the whole model.
        fixed: as `quantised_weights` returns them. Scales beside such weights were not frozen by a user.
    """
    module = model.get_submodule(path)
    # By name: the library does not import PEFT.
    if any(kind.__name__ == "BaseTunerLayer" for each in module.modules() for kind in type(each).__mro__):
        return True
    quantised = {parent(name) for name in fixed}
    return any(
        not (parameter.requires_grad or is_frozen_for_now(parameter))
        and can_train(parameter)
        and parent(join(path, name)) not in quantised
        for name, parameter in module.named_parameters()
    )


def below(counts: Mapping[str, int], path: str) -> int:
    """Return the sum of the counts of tensors at or below `path`; "" is the whole model."""
    return sum(count for name, count in counts.items() if not path or path in beginnings(name))


def nothing_trains(model: nn.Module) -> str:
    """Return the message about a model of which no parameter can train."""
    kind = type(model).__name__
    if num_fixed := sum(quantised_weights(model).values()):
        return f"no parameter of {kind} can train: {num_fixed:,} weights are quantised or integers; {ADVICE}"
    return f"no parameter of {kind} requires a gradient; call model.requires_grad_(True)"


def _holds_weights(name: str, buffer: Tensor) -> bool:
    if can_train(buffer) or buffer.dtype is torch.bool or buffer.ndim < 2:
        return False
    return any(word in name.lower() for word in WORDS_OF_BUFFERS)


def _num_weights(tensor: Tensor, module: nn.Module) -> int:
    shape = getattr(getattr(tensor, "quant_state", None), "shape", None)
    if shape is not None:
        return torch.Size(shape).numel()
    is_packed = type(tensor).__name__ == "Params4bit" or (not can_train(tensor) and tensor.dtype.itemsize >= 4)
    if not is_packed:
        return tensor.numel()
    bits = next(
        (bits for name in ("bits", "w_bit", "nbits") if isinstance(bits := getattr(module, name, None), int)), 0
    )
    return tensor.numel() * tensor.dtype.itemsize * 8 // (bits or BITS_OF_PACKED)
