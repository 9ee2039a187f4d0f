"""Quantised checkpoints: whose weights are codes, which no gradient moves."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .adapters import loading_of, register_own_adapters
from .pretrained import class_for


def quantisation_of(config: Any) -> str | None:
    """Return the name of the method that a configuration says its weights are quantised with; None if they are not."""
    for part in _parts(config):
        settings = getattr(part, "quantization_config", None)
        if settings is None:
            continue
        values = settings if isinstance(settings, dict) else settings.to_dict()
        if not values.get("dequantize"):
            return _name(values)
    return None


def is_quantised(model: Any) -> bool:
    """Return True if the weights of a model of transformers are codes now, whatever its checkpoint says."""
    return getattr(model, "hf_quantizer", None) is not None or bool(getattr(model, "is_quantized", False))


def num_trainable(config: Any, kind: Any, **options: Any) -> tuple[int, int] | None:
    """Return about how many weights of a quantised model can train, and how many there are; None if unknown.

    Builds no weights. All linear layers and stacked experts count as quantised, but the head and those that the
    configuration excludes.

    Args:
        config: configuration of the model.
        kind: e.g. `AutoModelForCausalLM`.
        options: arguments of `kind.from_config`.
    """
    kept = _excluded(config)
    try:
        with torch.device("meta"):
            model = class_for(kind, config, name="").from_config(config, **options)
    except Exception:  # a number in a message is not worth an error of its own
        return None
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    frozen: set[int] = set()
    for name, module in model.named_modules():
        if module is not head and not any(part in name for part in kept):
            frozen |= {id(weight) for weight in _coded(module)}
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters if id(p) not in frozen), sum(p.numel() for p in parameters)


def merge_command(adapter: str | Path, *, base: str | None = None) -> str:
    """Return the command that merges an adapter into `base`, by default the model that it was trained on."""
    code = "import gradselect.adapters; " if register_own_adapters(adapter) else ""
    kind, more = loading_of(adapter)
    if base is None:
        code += f"from peft import AutoPeftModelFor{kind} as Auto; "
        code += f"Auto.from_pretrained({str(adapter)!r}, dtype='auto'{more})"
    else:
        code += f"from peft import PeftModel; from transformers import AutoModelFor{kind} as Auto; "
        code += f"PeftModel.from_pretrained(Auto.from_pretrained({base!r}, dtype='auto'{more}), {str(adapter)!r})"
    return "python -c " + shlex.quote(code + ".merge_and_unload().save_pretrained('MERGED')")


def _coded(module: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of a module itself that are stored as codes. Three axes: experts, stacked."""
    least = 2 if isinstance(module, nn.Linear) else 3
    return [parameter for parameter in module.parameters(recurse=False) if parameter.ndim >= least]


def _parts(config: Any) -> Iterator[Any]:
    yield config
    text = config.get_text_config()
    if text is not config:
        yield text


def _name(values: dict[str, Any]) -> str:
    method = values.get("quant_method", "an unknown method")
    bits = {"load_in_4bit": " 4-bit", "load_in_8bit": " 8-bit"}
    return str(getattr(method, "value", method)) + next((text for key, text in bits.items() if values.get(key)), "")


def _excluded(config: Any) -> tuple[str, ...]:
    names: list[str] = []
    for part in _parts(config):
        settings = getattr(part, "quantization_config", None) or {}
        values = settings if isinstance(settings, dict) else settings.to_dict()
        for key in ("modules_to_not_convert", "llm_int8_skip_modules", "ignore", "ignored_layers"):
            names += [str(name) for name in values.get(key) or ()]
    return tuple(names)
