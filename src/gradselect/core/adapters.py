"""Adapters of PEFT, recognised by their attributes."""

from __future__ import annotations

from collections.abc import Iterator
from operator import attrgetter

from torch import nn
from torch.nn import Parameter

from .freezing import is_frozen_for_now


def frozen_in_adapters(model: nn.Module) -> list[Parameter]:
    """Return what the user froze in active adapters, which PEFT thaws whenever it switches them on."""
    return [each for each in weights_of_adapters(model) if not each.requires_grad and not is_frozen_for_now(each)]


def weights_of_adapters(model: nn.Module) -> Iterator[Parameter]:
    """Yield the weights of the active adapters, and of modules that PEFT trains whole beside them."""
    for module in model.modules():
        for attribute in getattr(module, "adapter_layer_names", ()):
            adapters = attrgetter(attribute)(module)
            for name in set(adapters).intersection(module.active_adapters):  # pyright: ignore
                adapter = adapters[name]
                if isinstance(adapter, Parameter):
                    yield adapter
                elif isinstance(adapter, nn.Module):
                    yield from adapter.parameters()
