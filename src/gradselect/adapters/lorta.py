"""LoRTA: the updates of all attention projections as one tensor of low rank."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self, final

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn import Parameter, functional
from transformers.pytorch_utils import Conv1D

from gradselect.core import ATTENTION_OUTPUTS, QUERIES_KEYS_VALUES, can_train
from gradselect.usage import UsageError, check_positive, check_whole

from .config import AdapterConfig
from .layer import AdapterLinear, sizes_of
from .projections import Projection, Projections, find_projections, heads_of, is_named
from .registration import register
from .tuner import AdapterTuner, quoted

FACTORS = ("lorta_A", "lorta_B", "lorta_C_l", "lorta_C_h", "lorta_C_m")


@final
@dataclass
class LortaConfig(AdapterConfig):
    """LoRTA: one tensor of rank r holds the updates of every attention projection.

    The update of head h of matrix m (query, key, value, output) in layer l is

        ΔW[l, m, h] = alpha / r · A diag(C_l[l] ⊙ C_m[m] ⊙ C_h[h]) B

    with A (width x r), B (r x head size), C_l (layers x r), C_m (matrices x r) and C_h (heads x r), which all layers
    share: r · (width + head size + layers + matrices + heads) parameters. No update is ever built while it trains: a
    layer computes with factors of rank r.

    **Heads.** Query, key and value projections write the heads, so ΔW[l, m, h] (width x head size) is the part of the
    update for the outputs of head h. An output projection reads them: there its transpose is the part for the inputs
    of head h. Where several heads share one key and value (grouped-query attention), the update of a shared head is
    the mean over the heads that share it. The paper leaves both open.

    Args:
        rank: r, at most the width.
        alpha: scale of the updates, beside 1 / rank.
        dropout: share of a layer's inputs that its adapter does not see in a training step.
        target_modules: None: every projection that the two lists of names find.
        heads_on_outputs: ends of the names of query, key and value projections.
        heads_on_inputs: ends of the names of output projections.
        num_heads: attention heads of the model. None: its configuration says.
        head_dim: numbers of a head. None: its configuration says.

    Example:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from gradselect.adapters import LortaConfig
        >>> model = torch.nn.ModuleDict({name: torch.nn.Linear(32, 32) for name in ("q_proj", "v_proj")})
        >>> model = get_peft_model(model, LortaConfig(rank=5, num_heads=4, head_dim=8))
        >>> model.get_nb_trainable_parameters()[0], 5 * (32 + 8 + 1 + 2 + 4)
        (235, 235)

    Reference: Hounie, Kanatsoulis, Tandon, Ribeiro, "LoRTA: Low Rank Tensor Adaptation of Large Language Models",
    arXiv 2410.04060, section 4.
    """

    method: ClassVar[str] = "lorta"

    target_modules: list[str] | str | None = None
    rank: int = 8
    alpha: float = 8.0
    dropout: float = 0.0
    heads_on_outputs: list[str] = field(default_factory=lambda: list(QUERIES_KEYS_VALUES))
    heads_on_inputs: list[str] = field(default_factory=lambda: list(ATTENTION_OUTPUTS))
    num_heads: int | None = None
    head_dim: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("rank", self.rank)
        check_positive("alpha", self.alpha, example=8.0)
        if not 0 <= self.dropout < 1:
            raise UsageError(f"dropout={self.dropout!r} is outside [0, 1); write e.g. dropout=0.1")
        for name in ("num_heads", "head_dim"):
            if (value := getattr(self, name)) is not None:
                check_whole(name, value)
        if self.target_modules == "all-linear":
            raise UsageError(
                "LoRTA adapts attention projections only; leave target_modules out, which takes them all (it was "
                "'all-linear')"
            )


class SharedFactors:
    """Factors of each adapter, which its layers share, and the place of each layer in the tensor.

    A layer holds this and not the parameters: they belong to the tuner, under one name.

    Args:
        factors: parameters by adapter, by name of the factor.
    """

    def __init__(self, factors: dict[str, nn.ParameterDict]) -> None:
        self.factors = factors
        self.places: dict[str, dict[str, Projection]] = {}

    def add(self, adapter: str, found: Projections, *, rank: int, like: Tensor) -> None:
        """Make the factors of a new adapter. B is zero, so that it begins as the base model.

        Args:
            adapter: its name.
            found: the layers that it adapts.
            rank: of the tensor.
            like: weight of which the factors have the device and, if it can train, the dtype.
        """
        sizes = {
            "lorta_A": found.width,
            "lorta_C_l": found.num_layers,
            "lorta_C_h": found.num_heads,
            "lorta_C_m": found.num_matrices,
        }
        for name, size in sizes.items():
            factor = torch.empty(size, rank)
            # As the authors: fan-in is the rank for all of them.
            nn.init.kaiming_uniform_(factor, a=math.sqrt(5) if name == "lorta_A" else 0.0)
            self._put(adapter, name, factor, like)
        self._put(adapter, "lorta_B", torch.zeros(rank, found.head_dim), like)
        self.places[adapter] = dict(found.places)

    def move(self, change: Callable[[Tensor], Tensor]) -> None:
        """Move or cast the factors of all adapters, as `nn.Module.to` does with those of a module."""
        for factors in self.factors.values():
            factors._apply(change)

    def drop(self, adapter: str) -> None:
        """Forget an adapter."""
        self.places.pop(adapter, None)
        for factors in self.factors.values():
            if adapter in factors:
                del factors[adapter]

    def _put(self, adapter: str, name: str, values: Tensor, like: Tensor) -> None:
        dtype = like.dtype if can_train(like) else torch.float32
        self.factors[name][adapter] = Parameter(values.to(like.device, dtype))


@final
class LortaLinear(AdapterLinear):
    """A linear layer whose update is part of the tensor.

    Args:
        shared: the factors.
    """

    adapter_layer_names = FACTORS
    other_param_names = ("lorta_settings",)
    shared: SharedFactors
    lorta_settings: dict[str, tuple[float, float]]

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: LortaConfig, *, path: str, shared: SharedFactors
    ) -> None:
        # Not attributes of the module: the factors would have a name in every layer.
        object.__setattr__(self, "shared", shared)
        object.__setattr__(self, "lorta_settings", {})
        super().__init__(base_layer, adapter_name, config, path=path)

    def __getattr__(self, name: str) -> Any:
        if name in FACTORS:
            return self.__dict__["shared"].factors[name]
        return super().__getattr__(name)

    def make_dictionaries(self) -> None:
        """Make none: the tuner has them."""

    def add(self, adapter: str, config: LortaConfig) -> None:
        self.lorta_settings[adapter] = (config.alpha / config.rank, config.dropout)

    def sides(self, adapter: str) -> tuple[Tensor, Tensor]:
        """Return the update, scaled, as two factors: (outputs x rank) and (rank x inputs)."""
        place = self.shared.places[adapter][self.path]
        width, head, layers, heads, matrices = (getattr(self, name)[adapter] for name in FACTORS)
        heads = heads.unflatten(0, (place.num_heads, -1)).mean(1)
        scale, _ = self.lorta_settings[adapter]
        coefficients = scale * heads * matrices[place.matrix] * layers[place.layer]
        all_heads = torch.einsum("hr,rd->hdr", coefficients, head).flatten(0, 1)  # (heads x head size, rank)
        return (width, all_heads.T) if place.heads_on_inputs else (all_heads, width.T)

    def shared_products(self) -> dict[Parameter, int]:
        """Return the entries of the two matrices that this layer multiplies, by the factor that each one stands for."""
        found: dict[Parameter, int] = {}
        for adapter in self._present(self.active_adapters):
            width, head, *coefficients = (getattr(self, name)[adapter] for name in FACTORS)
            other = self.in_features if self.shared.places[adapter][self.path].heads_on_inputs else self.out_features
            found |= dict.fromkeys(coefficients, 0) | {width: width.numel(), head: len(head) * other}
        return found

    def after(self, adapter: str, y: Tensor, x: Tensor) -> Tensor:
        _, dropout = self.lorta_settings[adapter]
        outputs, inputs = (side.to(x.device) for side in self.sides(adapter))
        x = functional.dropout(x.to(inputs.dtype), dropout, self.training)
        return y + functional.linear(functional.linear(x, inputs), outputs).to(y.dtype)

    def transformed(self, adapter: str, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        outputs, inputs = (side.to(weight) for side in self.sides(adapter))
        return weight + outputs @ inputs, bias

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # A model that was taken out of PEFT's holds its layers only, and they the factors. To move them twice is to
        # move them once.
        self.shared.move(fn)
        return super()._apply(fn, recurse)

    def _present(self, adapters: list[str]) -> list[str]:
        return [name for name in adapters if name in self.lorta_settings]

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Leave the factors where they are: other layers use them too."""


@final
class LortaModel(AdapterTuner):
    """PEFT's side of LoRTA: it holds the factors."""

    prefix = "lorta_"
    tuner_layer_cls = LortaLinear
    uses_shared_state = True
    advice = "Leave target_modules out, which takes all attention projections"

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        if not hasattr(self, "lorta_A"):
            for name in FACTORS:
                setattr(self, name, nn.ParameterDict())
            self.shared = SharedFactors({name: getattr(self, name) for name in FACTORS})
        # Not to be found by its settings: two adapters may have the same object.
        self._adding = adapter_name
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except Exception:
            self.shared.drop(adapter_name)
            raise

    def make_layer(self, target: nn.Module, adapter_name: str, config: Any, *, path: str) -> LortaLinear:
        return LortaLinear(target, adapter_name, config, path=path, shared=self.shared)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.shared.drop(adapter_name)

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        if peft_config.target_modules is None:
            names = [*peft_config.heads_on_outputs, *peft_config.heads_on_inputs]
            paths = [path for path, module in self._linear_layers() if is_named(path, names)]
            if not paths:
                raise UsageError(
                    f"LoRTA finds no attention projection by name in {type(self.model).__name__}, which has "
                    f"{quoted(self._last_names(self.model))}. LortaConfig takes other names in heads_on_outputs and "
                    "heads_on_inputs. Where one layer holds query, key and value (GPT-2, Phi-3), train a LoRA: "
                    "peft.LoraConfig(r=8), in a recipe method={name: lora, rank: 8}"
                )
            peft_config.target_modules = {name for name in names if any(is_named(path, [name]) for path in paths)}
        return peft_config

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        """Make the factors, before any layer changes."""
        layers = {}
        for path, module in self._layers():
            if self._check_target_module_exists(peft_config, path):
                self._check_layer(module, path)
                layers[path] = sizes_of(module)
        if not layers:
            return  # the injection says so
        found = find_projections(
            layers,
            heads=heads_of(model, num_heads=peft_config.num_heads, head_dim=peft_config.head_dim),
            on_outputs=peft_config.heads_on_outputs,
            on_inputs=peft_config.heads_on_inputs,
        )
        if peft_config.rank > found.width:
            raise UsageError(
                f"rank={peft_config.rank} is above the width of the projections, {found.width}: an adapter would cost "
                f"more than the layers themselves; write e.g. rank={min(8, found.width)}"
            )
        first: Any = dict(self._layers())[next(iter(layers))]
        self.shared.add(self._adding, found, rank=peft_config.rank, like=first.weight)

    def _cast_factors(self, adapter_name: str, autocast_adapter_dtype: bool) -> None:
        super()._cast_factors(adapter_name, autocast_adapter_dtype)
        for name in FACTORS:
            factors = getattr(self, name)
            if autocast_adapter_dtype and factors[adapter_name].dtype in (torch.float16, torch.bfloat16):
                factors[adapter_name] = nn.Parameter(factors[adapter_name].detach().float())

    def _layers(self) -> list[tuple[str, nn.Module]]:
        """Return the modules of the plain model, by path; those below a tuner's layer have its path."""
        found, inside = [], ()
        for path, module in self.model.named_modules():
            if path.startswith(inside):
                continue
            if isinstance(module, BaseTunerLayer):
                inside = (*inside, f"{path}.")
                module = module.get_base_layer()
            found.append((path, module))
        return found

    def _linear_layers(self) -> list[tuple[str, nn.Module]]:
        return [(path, module) for path, module in self._layers() if isinstance(module, (nn.Linear, Conv1D))]


register(LortaConfig, LortaModel)
