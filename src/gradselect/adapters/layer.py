"""The layer that every adapter derives from: it wraps a layer of the model and changes what that layer computes."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from gradselect.core import is_quantised
from gradselect.usage import UsageError

from .config import AdapterConfig

# Without the class that torch's own attention uses: that never calls the layer, but reads its weight.
UNKNOWN = (nn.modules.linear.NonDynamicallyQuantizableLinear,)


def sizes_of(layer: Any) -> tuple[int, int]:
    """Return the inputs and outputs of a plain layer."""
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features  # a quantised weight has another shape
    inputs, outputs = layer.weight.shape
    return inputs, outputs


def _wide(tensor: Tensor) -> Tensor:
    """Return a tensor in fp32, or in its own dtype if that is wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


class AdapterLinear(nn.Module, BaseTunerLayer):
    """A linear layer with adapters, of which the active ones change its function.

    A subclass says what its adapters do to the layer's input (`before`) and output (`after`), and, which must be the
    same function, to its weight and bias (`transformed`). Of several active adapters the second changes what the
    first has made of the layer, as merging one after the other does.

    Merging keeps the plain weights until they are asked back, which gives the same bits again.

    Args:
        base_layer: the layer, or another tuner's layer around it.
        adapter_name: name of the first adapter.
        config: its settings.
        path: name of the layer in the model, for errors.
    """

    known_layers: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear, Conv1D)
    """Classes of layers that the method can change."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: AdapterConfig, *, path: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.path = path
        self.merged_adapters = []
        self._active_adapter = adapter_name
        self._plain: tuple[Tensor, Tensor | None] | None = None
        self.in_features, self.out_features = sizes_of(self.plain_layer)
        self.make_dictionaries()
        self.update_layer(adapter_name, config)

    @abstractmethod
    def add(self, adapter: str, config: Any) -> None:
        """Put the parameters of a new adapter into the dictionaries that `adapter_layer_names` lists.

        Raises:
            UsageError: a setting does not fit the layer; names `self.path`.
        """

    def before(self, adapter: str, x: Tensor) -> Tensor:
        """Return the input of the layer as an adapter changes it."""
        return x

    def after(self, adapter: str, y: Tensor, x: Tensor) -> Tensor:
        """Return the output of the layer as an adapter changes it.

        Args:
            adapter: name of the adapter.
            y: output of the layer, of earlier adapters if there are any.
            x: input, before any adapter.
        """
        return y

    @abstractmethod
    def transformed(self, adapter: str, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return weight (outputs x inputs) and bias with which the plain layer does what layer and adapter do."""

    @property
    def plain_layer(self) -> Any:
        """The layer of the model, below all tuners."""
        return self.get_base_layer()

    def make_dictionaries(self) -> None:
        """Make the dictionaries of parameters by adapter that `adapter_layer_names` lists."""
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ParameterDict())

    def update_layer(self, adapter_name: str, config: AdapterConfig) -> None:
        """Add an adapter."""
        self.add(adapter_name, config)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or self.merged:
            return self.base_layer(x, *args, **kwargs)
        active = self._present(self.active_adapters)
        changed = x
        for adapter in reversed(active):
            changed = self.before(adapter, changed)
        y = self.base_layer(changed, *args, **kwargs)
        for adapter in active:
            y = self.after(adapter, y, x)
        return y

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put what adapters do into the weights of the layer.

        Args:
            safe_merge: check that the new weights are finite.
            adapter_names: the adapters. None: the active ones.

        Raises:
            UsageError: the weights are quantised.
            ValueError: the new weights are not finite.
        """
        names = self._present(check_adapters_to_merge(self, adapter_names))
        if not names:
            return
        layer = self.plain_layer
        # Also 8-bit floats, and tensors that show the dtype of what they stand for: their scales are elsewhere.
        if is_quantised(layer.weight):
            raise UsageError(
                f"{self.path!r} has quantised weights, which cannot take an adapter; load the base unquantised to "
                "merge, or keep the adapter beside its base"
            )
        plain = layer.weight.data, None if self._bias is None else self._bias.data
        weight, bias = self._oriented(_wide(plain[0])), None if plain[1] is None else _wide(plain[1])
        for name in names:
            weight, bias = self.transformed(name, weight, bias)
        if safe_merge and not all(part.isfinite().all() for part in (weight, bias) if part is not None):
            raise ValueError(f"the weights of {self.path!r} would not be finite with the adapters {names}")
        layer.weight.data = self._oriented(weight).to(plain[0].dtype).contiguous()
        if self._bias is not None and bias is not None and plain[1] is not None:
            self._bias.data = bias.to(plain[1].dtype)
        self._plain = self._plain or plain
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Put the plain weights back, bit for bit."""
        if self._plain is None:
            return
        weight, bias = self._plain
        layer = self.plain_layer
        layer.weight.data = weight.to(layer.weight.device)
        if self._bias is not None and bias is not None:
            self._bias.data = bias.to(layer.weight.device)
        self._plain = None
        self.merged_adapters.clear()

    @property
    def _bias(self) -> Tensor | None:
        return getattr(self.plain_layer, "bias", None)

    def _present(self, adapters: list[str]) -> list[str]:
        here = self._get_available_adapters()
        return [name for name in adapters if name in here]

    def _oriented(self, weight: Tensor) -> Tensor:
        """Return a weight as outputs x inputs, or such a one as the layer has it."""
        return weight if isinstance(self.plain_layer, nn.Linear) else weight.T

    def __repr__(self) -> str:
        return f"{type(self).__module__.rpartition('.')[2]}.{super().__repr__()}"
