"""The evaluated model with its tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gradselect.app.models import (
    able_to_pad,
    check_causal,
    check_complete,
    check_tokens,
    context_of,
    load_text_tokenizer,
    load_weights,
    num_labels_of,
)
from gradselect.app.recipe import EvaluationSettings
from gradselect.app.runtime import RunFolder, keep_freed_memory
from gradselect.usage import UsageError

from .trained_on import labels_of_run

FOLDER_MARKS = ("config.json", "adapter_config.json")
"""Every folder from `save_pretrained` of transformers or PEFT holds one of these."""


@dataclass(frozen=True, kw_only=True)
class LanguageModel:
    """A transformers model, its tokenizer and its context length.

    Args:
        model: model in evaluation mode.
        tokenizer: tokenizer of the same checkpoint.
        context: limit on the tokens of prompt and answer together; None if the architecture has no limit.
    """

    model: Any
    tokenizer: Any
    context: int | None

    @property
    def device(self) -> torch.device:
        """Device of the inputs."""
        return self.model.get_input_embeddings().weight.device

    @property
    def pad_token(self) -> int:
        """Id that pads a batch; it is masked, so any id works."""
        return next((t for t in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id) if t is not None), 0)


def load(settings: EvaluationSettings) -> LanguageModel:
    """Load the model that the settings name onto its device, in evaluation mode.

    Raises:
        UsageError: the path holds no complete checkpoint of a model for the task, or there is no such device.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    device = resolve_device(settings.device)
    keep_freed_memory(device.type)
    check_folder(settings.model)
    kind, wanted, head = AutoModelForCausalLM, "a causal language model", {}
    if settings.task == "classification":
        kind, wanted = AutoModelForSequenceClassification, "a model with a classification head"
        head = _head_of_adapter(settings.model)
    tokenizer = load_text_tokenizer(settings.model, key="model")
    model, missing = load_weights(kind, settings.model, key="model", dtype=settings.dtype, **head)
    check_complete(missing, model, settings.model, key="model", wanted=wanted)
    if settings.task == "classification":
        # As in training: the head of a decoder reads the last token that is no padding.
        model.config.get_text_config().pad_token_id = able_to_pad(tokenizer, settings.model).pad_token_id
    language_model = wrap(model.to(device).eval(), tokenizer, task=settings.task)
    if settings.task != "classification":
        check_causal(language_model.model, name=f"model={str(settings.model)!r}")
    return language_model


def _head_of_adapter(model: str | Path) -> dict[str, Any]:
    """Return what the base must be told of the head in an adapter's folder: it would have two outputs without names."""
    if (labels := labels_of_run(model)) is not None:
        return {"id2label": dict(enumerate(labels)), "label2id": {name: index for index, name in enumerate(labels)}}
    return {} if (num_labels := num_labels_of(model)) is None else {"num_labels": num_labels}


def wrap(model: Any, tokenizer: Any, *, task: str | None = None) -> LanguageModel:
    """Wrap a model in memory and its tokenizer, after a check that they fit each other and the task.

    Raises:
        UsageError: an encoder-decoder model without a classification head, or a tokenizer with more tokens than the
            model has embeddings.
    """
    if task != "classification" and model.config.get_text_config().is_encoder_decoder:
        raise UsageError(
            f"{type(model).__name__} is an encoder-decoder model; evaluate supports decoder-only models, and others "
            "with a classification head: task=classification"
        )
    check_tokens(model, tokenizer)
    return LanguageModel(model=model, tokenizer=tokenizer, context=context_of(model.config, tokenizer))


def resolve_device(name: str) -> torch.device:
    """Return the device for "auto" or a device name of torch.

    Raises:
        UsageError: torch knows no such device, or this machine has none.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if name == "auto":
        return torch.device("cpu") if accelerator is None else accelerator
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"device={name!r} is not a device; write auto, cpu, cuda or cuda:1") from None
    count = 0 if accelerator is None or accelerator.type != device.type else torch.accelerator.device_count()
    if device.type != "cpu" and (device.index or 0) >= count:
        raise UsageError(f"device={name!r}: this machine has {count} devices of that type; write device=auto")
    return device


def check_folder(model: str | Path) -> None:
    """Refuse a path that exists and is not a folder with a checkpoint, or that looks local and does not exist.

    Any other name may be an id on the hub.

    Raises:
        UsageError: says what the path is.
    """
    path = Path(model)
    if path.is_file():
        raise UsageError(f"model={str(model)!r} is a file; give its folder")
    if path.is_dir() and not any((path / mark).is_file() for mark in FOLDER_MARKS):
        folder = RunFolder(path)
        if folder.run_file.is_file():
            newest = folder.newest_checkpoint()
            advice = "" if newest is None else f", or give its newest checkpoint: {newest}"
            raise UsageError(
                f"model={str(model)!r} is a run that has no model yet: it has not finished, or keeps none (random "
                f"data); to finish it, add --resume to its command{advice}"
            )
        content = ", ".join(sorted(child.name for child in path.iterdir())[:8]) or "nothing"
        raise UsageError(
            f"model={str(model)!r} is not a model folder: it has no config.json; it holds {content}. "
            "Give the folder that save_pretrained wrote"
        )
    looks_local = path.is_absolute() or str(model).startswith((".", "~")) or str(model).count("/") > 1
    if looks_local and not path.exists():
        raise UsageError(f"model={str(model)!r}: no such folder; paths are relative to the folder the command runs in")
