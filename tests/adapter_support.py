"""Adapters for the tests: the settings, the dense twin and the number of parameters of each."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import peft
import pytest
import torch
import transformers
from packaging import version
from tiny_models import seeded, tiny_bert, tiny_gpt2, tiny_llama
from torch import Tensor, nn
from transformers.integrations.peft import MIN_PEFT_VERSION

from gradselect import adapters, reference
from gradselect.adapters.layer import AdapterLinear

needs_add_adapter = pytest.mark.skipif(
    version.parse(peft.__version__) < version.parse(MIN_PEFT_VERSION),
    reason=f"add_adapter of transformers {transformers.__version__} needs PEFT {MIN_PEFT_VERSION}",
)


@dataclass(frozen=True, kw_only=True)
class AdapterCase:
    """One adapter.

    Args:
        config: class of its settings.
        settings: its own settings.
        twin: returns weight (outputs x inputs) and bias of a layer of the model with its adapter "default", from dense
            matrices.
        count: returns the number of parameters by the paper's formula, from the adapted model.
        targets: layers to adapt, some and not all.
        is_neutral: True if a new adapter changes nothing.
        is_shared: True if layers share weights, which the tuner holds.
        takes_linears: True if it can change every linear layer.
        models: return tiny models that the adapter fits, a decoder without biases first.
    """

    config: Any
    settings: dict[str, Any] = field(default_factory=dict)
    twin: Callable[[Any], tuple[Tensor, Tensor | None]]
    count: Callable[[Any], int]
    targets: list[str] = field(default_factory=lambda: ["q_proj", "down_proj"])
    is_neutral: bool = True
    is_shared: bool = False
    takes_linears: bool = True
    models: tuple[Callable[[], nn.Module], ...] = (
        lambda: tiny_llama(layers=2),
        lambda: with_biases(tiny_bert(layers=2)),
        lambda: with_biases(tiny_gpt2(layers=2)),
    )

    def build(self) -> Any:
        """Return the first model."""
        return self.models[0]()

    def make(self, **settings: Any) -> Any:
        """Return settings; by default those of a language model with adapters on all linear layers."""
        return self.config(**{"task_type": "CAUSAL_LM", **self.settings, **settings})

    def adapted(self, *, noise: float = 0.3, model: nn.Module | None = None, **settings: Any) -> Any:
        """Return a tiny model in PEFT.

        Args:
            noise: deviation of what is added to the adapter, which makes a neutral one change something.
            model: what to adapt. None: a new model.
            settings: settings beside the case's own.
        """
        base: Any = self.build() if model is None else model
        return disturbed(wrapped(base, self.make(**settings)), noise)


def wrapped(model: Any, config: Any) -> Any:
    """Return a model in PEFT, always with the same new weights."""
    with warnings.catch_warnings():
        # peft asks transformers 5 for a property that was renamed
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        return seeded(lambda: peft.get_peft_model(model, config))


def disturbed(model: Any, noise: float, *, seed: int = 1) -> Any:
    """Add noise to everything that trains."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += noise * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    return model


def trains(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of everything that trains."""
    return {name: each.detach().clone() for name, each in model.named_parameters() if each.requires_grad}


def layers_of(model: nn.Module) -> list[Any]:
    """Return the layers that have adapters."""
    return [module for module in model.modules() if isinstance(module, AdapterLinear)]


def plain(layer: Any) -> tuple[Tensor, Tensor | None]:
    """Return weight (outputs x inputs) and bias below the adapter."""
    base = layer.get_base_layer()
    return base.weight if isinstance(base, nn.Linear) else base.weight.T, getattr(base, "bias", None)


def ether_twin(layer: Any) -> tuple[Tensor, Tensor | None]:
    weight, bias = plain(layer)
    return reference.ether_weight(weight, layer.ether_u["default"]), bias


def etherplus_twin(layer: Any) -> tuple[Tensor, Tensor | None]:
    weight, bias = plain(layer)
    inputs, outputs = (
        tuple(getattr(layer, f"etherplus_{side}_{name}")["default"] for name in "uv") for side in ("in", "out")
    )
    return reference.etherplus_weight(weight, inputs=inputs, outputs=outputs), bias


def propulsion_twin(layer: Any) -> tuple[Tensor, Tensor | None]:
    scale = 1 + layer.propulsion_scale_bias["default"]
    return reference.propulsion_weight(*plain(layer), scale=scale, degree=layer.degrees["default"])


def hiwi_twin(layer: Any) -> tuple[Tensor, Tensor | None]:
    weight, bias = plain(layer)
    assert bias is not None
    return weight, reference.hiwi_bias(bias, layer.hiwi_down["default"], layer.hiwi_up["default"])


def lorta_twin(layer: Any) -> tuple[Tensor, Tensor | None]:
    """The place of the layer is read off its path here; rank 3 and alpha 6."""
    weight, bias = plain(layer)
    factors = [getattr(layer, f"lorta_{name}")["default"] for name in ("A", "B", "C_l", "C_m", "C_h")]
    width, head, layers, matrices, heads = factors
    number = int(next(part for part in layer.path.split(".") if part.isdecimal()))
    last = layer.path.rpartition(".")[2]
    kind = next(kinds.index(last) for kinds in LORTA_KINDS if last in kinds)
    is_output = kind == 3
    update = reference.lorta_update(
        *(width, head, (layers[number], matrices[kind]), heads),
        num_heads=(layer.in_features if is_output else layer.out_features) // head.shape[1],
        heads_on_inputs=is_output,
    )
    return weight + 6 / 3 * update, bias


LORTA_KINDS = ("q_proj", "k_proj", "v_proj", "o_proj"), ("query", "key", "value", "dense")


def with_biases(model: nn.Module) -> nn.Module:
    """Give a model biases that are not zero, as those of a trained one."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def untied_gpt2() -> nn.Module:
    """A decoder with biases and a head of its own."""
    config = tiny_gpt2(layers=2).config
    config.tie_word_embeddings = False
    return with_biases(seeded(lambda: transformers.GPT2LMHeadModel(config)))


ADAPTERS = {
    "ether": AdapterCase(
        config=adapters.EtherConfig,
        settings={"num_blocks": 4},
        twin=ether_twin,
        count=lambda model: sum(layer.in_features for layer in layers_of(model)),
        is_neutral=False,
    ),
    "etherplus": AdapterCase(
        config=adapters.EtherPlusConfig,
        settings={"num_blocks": 4},
        twin=etherplus_twin,
        count=lambda model: sum(2 * (layer.in_features + layer.out_features) for layer in layers_of(model)),
    ),
    "hiwi": AdapterCase(
        config=adapters.HiwiConfig,
        settings={"rank": 3},
        twin=hiwi_twin,
        count=lambda model: sum(2 * 3 * layer.out_features for layer in layers_of(model)),
        targets=["c_fc"],
        takes_linears=False,
        models=(untied_gpt2, lambda: with_biases(tiny_bert(layers=2))),
    ),
    "lorta": AdapterCase(
        config=adapters.LortaConfig,
        settings={"rank": 3, "alpha": 6.0},
        twin=lorta_twin,
        # r (d + d_head + layers + heads + matrices)
        count=lambda model: 3 * (16 + 4 + 2 + 4 + 4),
        targets=["q_proj", "o_proj"],
        is_shared=True,
        takes_linears=False,
        models=(lambda: tiny_llama(layers=2), lambda: tiny_bert(layers=2)),
    ),
    "propulsion": AdapterCase(
        config=adapters.PropulsionConfig,
        settings={"degree": 3},
        twin=propulsion_twin,
        count=lambda model: sum(layer.out_features for layer in layers_of(model)),
    ),
}
