"""Folders with an adapter of PEFT, or with one of our own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


def register_own_adapters(folder: str | Path) -> bool:
    """Make the adapters of this library known to PEFT if the folder holds one of them.

    Returns:
        True if it does.
    """
    if (kind := _read(folder, "peft_type")) is None:
        return False  # whoever loads the folder says more
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    import gradselect.adapters  # noqa: F401  # registers them; slow to import

    config = {key.value: value for key, value in PEFT_TYPE_TO_CONFIG_MAPPING.items()}.get(kind)
    return config is not None and config.__module__.startswith("gradselect.")


def base_of_shared_adapter(folder: str | Path) -> str | None:
    """Return the base of an adapter of which layers share weights; None for any other folder.

    transformers loads the base of an adapter, and puts layers into it without PEFT's model, which holds what they
    share.
    """
    kind = _read(folder, "peft_type")
    if kind is None or not register_own_adapters(folder):
        return None
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    tuner = {key.value: value for key, value in PEFT_TYPE_TO_TUNER_MAPPING.items()}[kind]
    return _read(folder, "base_model_name_or_path") if tuner.uses_shared_state else None


def loading_of(folder: str | Path) -> tuple[str, str]:
    """Return the end of the name of the Auto class that loads an adapter's model, and what else it must be told.

    A base without a classifier gets one of two outputs unless it is told how many the adapter's own, saved, has.
    """
    if _read(folder, "task_type") != "SEQ_CLS":
        return "CausalLM", ""
    num_labels = num_labels_of(folder)
    return "SequenceClassification", "" if num_labels is None else f", num_labels={num_labels}"


def num_labels_of(folder: str | Path) -> int | None:
    """Return the number of outputs of the classification head that an adapter brings; None if it brings none."""
    weights = Path(folder) / WEIGHTS
    if not weights.is_file():  # PEFT also reads adapter_model.bin
        return None
    from safetensors import safe_open

    heads = tuple(f".{name}." for name in saved_modules(folder))
    with safe_open(weights, framework="pt") as file:
        sizes = [file.get_slice(name).get_shape()[0] for name in file.keys() if any(head in name for head in heads)]  # noqa: SIM118
    return min(sizes, default=None)


def saved_modules(folder: str | Path) -> tuple[str, ...]:
    """Return the names of modules that an adapter brings whole, such as a classification head."""
    return tuple(_values(folder).get("modules_to_save") or ())


def _read(folder: str | Path, key: str) -> str | None:
    value = _values(folder).get(key)
    return None if value is None else str(value)


def _values(folder: str | Path) -> dict[str, Any]:
    try:
        values = json.loads((Path(folder) / CONFIG).read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}
