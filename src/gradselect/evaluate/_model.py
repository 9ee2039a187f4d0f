"""The model under evaluation, with its tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .._errors import UsageError
from ._settings import EvaluationSettings

FOLDER_MARKS = ("config.json", "adapter_config.json")
"""One of these is in every folder that `save_pretrained` of transformers or PEFT wrote."""


@dataclass(frozen=True, kw_only=True)
class LanguageModel:
    """A decoder-only model of transformers, its tokenizer, and how many tokens it can look back on.

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
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = resolve_device(settings.device)
    check_folder(settings.model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(settings.model)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            settings.model, dtype=settings.dtype, output_loading_info=True
        )
    except (OSError, ValueError, ImportError, KeyError, RuntimeError, SafetensorError) as error:
        # Whatever is wrong with a checkpoint comes out of transformers as one of these.
        raise UsageError(f"model={str(settings.model)!r} cannot be loaded: {_first_line(error)}") from error
    model, report = loaded
    _check_complete(settings.model, report)
    return wrap(model.to(device).eval(), tokenizer)


def wrap(model: Any, tokenizer: Any) -> LanguageModel:
    """A model in memory and its tokenizer, checked to fit each other.

    Raises:
        UsageError: an encoder-decoder model, or a tokenizer with more tokens than the model has embeddings.
    """
    config = model.config.get_text_config()
    if config.is_encoder_decoder:
        raise UsageError(f"{type(model).__name__} is an encoder-decoder model; evaluate reads decoder-only models")
    num_embeddings = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > num_embeddings:
        raise UsageError(
            f"the tokenizer has {len(tokenizer)} tokens and the model embeddings for {num_embeddings}; "
            "give the tokenizer of this model, or call model.resize_token_embeddings(len(tokenizer)) before training"
        )
    # Not every architecture has positions to run out of, and a tokenizer without a limit stores a huge number.
    limits = (getattr(config, "max_position_embeddings", None), tokenizer.model_max_length)
    known = [int(limit) for limit in limits if limit is not None and 0 < limit < 10**9]
    return LanguageModel(model=model, tokenizer=tokenizer, context=min(known, default=None))


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


def _check_complete(model: str | Path, report: Any) -> None:
    missing = sorted(report["missing_keys"])
    if missing:
        raise UsageError(
            f"model={str(model)!r}: the checkpoint lacks {len(missing)} weights, {missing[0]} among them, which would "
            "be random; give a checkpoint that was saved as a causal language model"
        )


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
