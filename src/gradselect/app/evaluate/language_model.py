"""The model under evaluation, with its tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gradselect.app.models import check_complete, check_tokens, context_of, load_text_tokenizer, load_weights
from gradselect.app.recipe import EvaluationSettings
from gradselect.usage import UsageError

FOLDER_MARKS = ("config.json", "adapter_config.json")
"""One of these is in every folder that `save_pretrained` of transformers or PEFT wrote."""


@dataclass(frozen=True, kw_only=True)
class LanguageModel:
    """A model of transformers, its tokenizer, and how many tokens it can look back on.

    Args:
        model: in evaluation mode.
        tokenizer: of the same checkpoint.
        context: tokens of prompt and answer together; None where the architecture sets no limit.
    """

    model: Any
    tokenizer: Any
    context: int | None

    @property
    def device(self) -> torch.device:
        """Where the inputs belong."""
        return self.model.get_input_embeddings().weight.device

    @property
    def pad_token(self) -> int:
        """Id that fills up a batch; it is masked, so any id will do."""
        return next((t for t in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id) if t is not None), 0)


def load(settings: EvaluationSettings) -> LanguageModel:
    """The model that the settings name, on its device, in evaluation mode.

    Raises:
        UsageError: no checkpoint of a decoder-only model there, a part of it missing, or no such device.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    device = resolve_device(settings.device)
    check_folder(settings.model)
    kind, wanted = AutoModelForCausalLM, "a causal language model"
    if settings.task == "classification":
        kind, wanted = AutoModelForSequenceClassification, "a model with a classification head"
    tokenizer = load_text_tokenizer(settings.model, key="model")
    model, missing = load_weights(kind, settings.model, key="model", dtype=settings.dtype)
    check_complete(missing, model, settings.model, key="model", wanted=wanted)
    return wrap(model.to(device).eval(), tokenizer)


def wrap(model: Any, tokenizer: Any) -> LanguageModel:
    """A model in memory and its tokenizer, checked to fit each other.

    Raises:
        UsageError: an encoder-decoder model, or a tokenizer with more tokens than the model has embeddings.
    """
    if model.config.get_text_config().is_encoder_decoder:
        raise UsageError(f"{type(model).__name__} is an encoder-decoder model; evaluate does not read those")
    check_tokens(model, tokenizer)
    return LanguageModel(model=model, tokenizer=tokenizer, context=context_of(model, tokenizer))


def resolve_device(name: str) -> torch.device:
    """The device that "auto" or a name of torch stands for.

    Raises:
        UsageError: torch knows no such device, or this machine has none.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if name == "auto":
        return torch.device("cpu") if accelerator is None else accelerator
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"device={name!r} is no device; write auto, cpu, cuda or cuda:1") from None
    there = 0 if accelerator is None or accelerator.type != device.type else torch.accelerator.device_count()
    if device.type != "cpu" and (device.index or 0) >= there:
        raise UsageError(f"device={name!r}: this machine has {there} devices of that type; write device=auto")
    return device


def check_folder(model: str | Path) -> None:
    """What stands at this path, if anything, is a folder with a checkpoint; else it may be an id on the hub.

    Raises:
        UsageError: otherwise.
    """
    path = Path(model)
    if path.is_file():
        raise UsageError(f"model={str(model)!r} is a file; give the folder it lies in")
    if path.is_dir() and not any((path / mark).is_file() for mark in FOLDER_MARKS):
        there = ", ".join(sorted(child.name for child in path.iterdir())[:8]) or "nothing"
        raise UsageError(
            f"model={str(model)!r} is no model folder: it has no config.json; it holds {there}. "
            "Give the folder that save_pretrained wrote"
        )
    looks_local = path.is_absolute() or str(model).startswith((".", "~")) or str(model).count("/") > 1
    if looks_local and not path.exists():
        raise UsageError(f"model={str(model)!r}: no such folder; paths are relative to the folder the command runs in")
