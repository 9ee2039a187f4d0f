"""Folders with an adapter of PEFT, or with one of our own."""

from __future__ import annotations

import json
from pathlib import Path

CONFIG = "adapter_config.json"


def register_own_adapters(folder: str | Path) -> bool:
    """Make the adapters of this library known to PEFT if the folder holds one of them.

    Returns:
        True if it does.
    """
    path = Path(folder) / CONFIG
    try:
        kind = str(json.loads(path.read_text("utf-8"))["peft_type"])
    except (OSError, ValueError, KeyError, TypeError):
        return False  # whoever loads the folder says more
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    import gradselect.adapters  # noqa: F401  # registers them; slow to import

    config = {key.value: value for key, value in PEFT_TYPE_TO_CONFIG_MAPPING.items()}.get(kind)
    return config is not None and config.__module__.startswith("gradselect.")
