"""The tuner that every adapter derives from: it puts the layers of a method into a model."""

from __future__ import annotations

from collections import Counter
from copy import copy
from typing import Any, ClassVar, cast

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from gradselect.usage import UsageError, listed, nearest, parent

from .config import AdapterConfig
from .layer import UNKNOWN, AdapterLinear

MOST_NAMES = 8
"""Names that an error lists."""


def _numbers(config: AdapterConfig) -> list[int]:
    """Return the numbers of the layers that get adapters."""
    layers = config.layers_to_transform
    return [layers] if isinstance(layers, int) else list(layers or ())


def quoted(names: list[str]) -> str:
    """Return the first names in quotes, for an error; "none" if there are none."""
    return listed([repr(name) for name in names], most=MOST_NAMES) or "none"


class AdapterTuner(BaseTuner):
    """Puts the layers of a method into a model. If something does not fit, the model is as it was before.

    A subclass sets `prefix` (which begins the names of the layers' parameters) and `tuner_layer_cls`.
    """

    target_module_mapping = {}  # noqa: RUF012  # an attribute of PEFT
    uses_shared_state = False  # an attribute of PEFT from 0.21 on
    advice: ClassVar[str] = "Write e.g. target_modules='all-linear'"
    """Ends the error where targets match nothing."""

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Put layers with the adapter in place of those that its settings name.

        Raises:
            UsageError: a target matches nothing, or a layer that the method cannot change.
        """
        config: Any = self.peft_config[adapter_name]
        targets = config.target_modules
        if not config.inference_mode and isinstance(targets, set):
            self._check_all_match(targets, model)
        if not config.inference_mode and config.layers_to_transform is not None:
            self._check_layers_exist(config, model)
        already = set(self.targeted_module_names)
        self._count_uses(model)
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except UsageError:
            self._take_out(model, adapter_name, already)
            raise
        except ValueError as error:
            self._take_out(model, adapter_name, already)
            if "not found in the base model" not in str(error):
                raise
            raise UsageError(self._nothing_found(targets, model, layers=config.layers_to_transform)) from None

    @staticmethod
    def _check_target_module_exists(peft_config: Any, key: str) -> Any:
        """Match as PEFT does, and choose layers here: PEFT does so for last parts of names only."""
        everywhere = copy(peft_config)
        everywhere.layers_to_transform = None
        found = BaseTuner._check_target_module_exists(everywhere, key)
        if not found or peft_config.layers_to_transform is None:
            return found
        return peft_config.layer_number(key) in _numbers(peft_config)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Cast as PEFT does, which makes the parameters anew; those that did not train still do not."""
        trains = {name: parameter.requires_grad for name, parameter in self.named_parameters()}
        self._cast_factors(adapter_name, autocast_adapter_dtype)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(trains[name])

    def _cast_factors(self, adapter_name: str, autocast_adapter_dtype: bool) -> None:
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)

    def make_layer(self, target: nn.Module, adapter_name: str, config: Any, *, path: str) -> AdapterLinear:
        """Return the layer that takes the place of `target`."""
        return self._layer_class(target, adapter_name, config, path=path)

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, self._layer_class):
            target.update_layer(adapter_name, cast(AdapterConfig, peft_config))
            return
        self._check_layer(target.get_base_layer() if isinstance(target, BaseTunerLayer) else target, current_key)
        layer = self.make_layer(target, adapter_name, peft_config, path=current_key)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if isinstance(child, ModulesToSaveWrapper):
            # PEFT would look for its weight, and a head of several layers has none.
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    def _count_uses(self, model: nn.Module) -> None:
        """Count once in how many places each parameter stands, not for each layer anew."""
        self._uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))

    def _check_layer(self, layer: nn.Module, path: str) -> None:
        """Check that the method can change a layer.

        Raises:
            UsageError: it cannot.
        """
        method, known = self._method, self._layer_class.known_layers
        if not isinstance(layer, known) or isinstance(layer, UNKNOWN):
            raise UsageError(
                f"{method} cannot change {path!r}, which is of the class {type(layer).__name__}; it knows "
                f"{', '.join(kind.__name__ for kind in known)}; name layers in target_modules, and this one not"
            )
        weight = cast(Any, layer).weight
        if self._uses[id(weight)] > 1:
            raise UsageError(
                f"{path!r} shares its weight with another layer, which merging would change too; name layers in "
                "target_modules, and this one not, or load the model with tie_word_embeddings=False"
            )

    @property
    def _layer_class(self) -> type[AdapterLinear]:
        return cast(type[AdapterLinear], self.tuner_layer_cls)

    @property
    def _method(self) -> str:
        return self.prefix.removesuffix("_")

    def _check_all_match(self, targets: set[str], model: nn.Module) -> None:
        names = [name for name, _ in model.named_modules()]
        for target in sorted(targets):
            if not any(name == target or name.endswith(f".{target}") for name in names):
                raise UsageError(self._nothing_found({target}, model))

    def _check_layers_exist(self, config: AdapterConfig, model: nn.Module) -> None:
        numbers = (config.layer_number(name) for name, _ in model.named_modules())
        there = {number for number in numbers if number is not None}
        if unknown := [number for number in _numbers(config) if number not in there]:
            has = f"has the layers {sorted(there)}" if there else "has no numbered layers that layers_pattern finds"
            raise UsageError(
                f"layers_to_transform={config.layers_to_transform!r} names the layers {unknown}, and "
                f"{type(model).__name__} {has}; name layers that are there"
            )

    def _last_names(self, model: nn.Module) -> list[str]:
        """Return the last parts of the names of layers that the method can change."""
        names = [name for name, module in model.named_modules() if isinstance(module, self._layer_class.known_layers)]
        return sorted({name.rpartition(".")[2] for name in names})

    def _nothing_found(self, targets: Any, model: nn.Module, *, layers: Any = None) -> str:
        lasts = self._last_names(model)
        shown = targets if isinstance(targets, str) else sorted(targets or ())
        within = "" if layers is None else f" in layers_to_transform={layers!r}"
        near = f"; nearest: {nearest(str(shown[0]), lasts)}" if isinstance(shown, list) and shown and lasts else ""
        return (
            f"target_modules={shown!r} matches no layer that {self._method} can change{within}{near}; "
            f"{type(model).__name__} has {quoted(lasts)}. {self.advice}"
        )

    def _take_out(self, model: nn.Module, adapter_name: str, already: set[str]) -> None:
        """Undo an injection that failed."""
        for path, module in list(model.named_modules()):
            if not isinstance(module, self._layer_class):
                continue
            if module._all_available_adapter_names() in ([], [adapter_name]):
                setattr(model.get_submodule(parent(path)), path.rpartition(".")[2], module.base_layer)
            elif adapter_name in module._all_available_adapter_names():
                module.delete_adapter(adapter_name)
        self.targeted_module_names = [name for name in self.targeted_module_names if name in already]
