"""Settings that all adapters share."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

from peft import PeftConfig

from gradselect.usage import UsageError

from .registration import check_is_registered, peft_type


@dataclass
class AdapterConfig(PeftConfig):
    """Settings that all adapters of this package share; the other arguments are those of `peft.PeftConfig`.

    Args:
        target_modules: "all-linear" (every linear layer but the head), names of layers or of modules' last parts
            (["q_proj", "v_proj"]), or one regular expression.
        exclude_modules: names, or a regular expression, of layers that stay as they are.
        layers_to_transform: numbers of the model's layers that get adapters, whatever `target_modules` is. None: all.
        layers_pattern: name of the list of layers in the model, for `layers_to_transform`. None: the first part of a
            path that a number follows.
        modules_to_save: names of modules that train whole beside the adapter, as a classification head.

    Raises:
        UsageError: `layers_pattern` without `layers_to_transform`.
    """

    method: ClassVar[str]
    """Name of the method in lower case. In PEFT its type is the same in capitals."""

    target_modules: list[str] | str | None = "all-linear"
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_is_registered(type(self))
        self.peft_type = peft_type(self.method)
        # PEFT compares and saves them as sets.
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            setattr(self, name, value if value is None or isinstance(value, str) else set(value))
        if self.layers_pattern and self.layers_to_transform is None:
            raise UsageError(
                f"layers_pattern={self.layers_pattern!r} says where the layers of layers_to_transform are, which is "
                "left out; write e.g. layers_to_transform=[0, 1], or leave layers_pattern out"
            )

    def layer_number(self, path: str) -> int | None:
        """Return the number of the layer that a module is in; None outside of layers.

        Example:
            >>> from gradselect.adapters import EtherConfig
            >>> EtherConfig().layer_number("model.layers.3.self_attn.q_proj")
            3
        """
        patterns = [self.layers_pattern] if isinstance(self.layers_pattern, str) else self.layers_pattern
        match = re.search(rf"(?:^|\.)(?:{'|'.join(patterns or ['[^.]+'])})\.(\d+)\.", path)
        return None if match is None else int(match[1])
