"""The model and the tokenizer that a run starts from."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .. import UsageError
from ._recipe import ChatData, Data, ModelSettings, PromptCompletionData

_LOADING_ERRORS = (OSError, ValueError, ImportError, KeyError, RuntimeError, SafetensorError)


def load_model(settings: ModelSettings) -> PreTrainedModel:
    """The causal language model at `settings.path`, with all of its weights.

    Raises:
        UsageError: it cannot be had, is damaged, lacks weights, or could not be saved again.
    """
    _check_folder(settings.path)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            settings.path,
            revision=settings.revision,
            dtype=settings.dtype,
            attn_implementation=settings.attention,
            trust_remote_code=settings.trust_remote_code,
            output_loading_info=True,
        )
        model, report = loaded
        model.generation_config.validate(strict=True)
    except _LOADING_ERRORS as error:
        raise UsageError(f"model.path={settings.path!r} cannot be used: {_summary(error)}") from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise UsageError(
            f"model.path={settings.path!r} lacks {len(missing)} weights of a {type(model).__name__}, "
            f"{missing[0]!r} among them; give the checkpoint of a causal language model"
        )
    return model


def load_tokenizer(settings: ModelSettings, data: Data) -> PreTrainedTokenizerBase:
    """The tokenizer at `settings.path`, able to end a text and, where the data need it, to render a conversation.

    Raises:
        UsageError: it cannot.
    """
    _check_folder(settings.path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            settings.path, revision=settings.revision, trust_remote_code=settings.trust_remote_code
        )
    except _LOADING_ERRORS as error:
        raise UsageError(
            f"model.path={settings.path!r} cannot be used, there is no tokenizer: {_summary(error)}"
        ) from error
    if tokenizer.eos_token is None:
        raise UsageError(
            f"the tokenizer of {settings.path!r} has no end-of-text token, so a completion would have no end; "
            'add "eos_token" to its tokenizer_config.json'
        )
    is_chat = isinstance(data, ChatData) or (isinstance(data, PromptCompletionData) and data.as_chat)
    if is_chat and tokenizer.chat_template is None:
        raise UsageError(
            f"the tokenizer of {settings.path!r} has no chat template; "
            "take a chat model, or data.format=prompt-completion without as_chat"
        )
    return tokenizer


def resolve_max_length(max_length: int | None, *, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens of an example: `max_length`, or the model's context but no more than 1024.

    Raises:
        UsageError: more than the model has positions for, or tokens that the model has no embedding for.
    """
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if max_length is not None and positions is not None and max_length > positions:
        raise UsageError(
            f"data.max_length={max_length} is more than the model's {positions} positions; write at most that"
        )
    rows = next(model.get_input_embeddings().parameters()).shape[0]
    if len(tokenizer) > rows:
        raise UsageError(
            f"the tokenizer has {len(tokenizer)} tokens, the model embeddings for {rows}: they do not belong together"
        )
    return max_length or min(1024, positions or 1024)


@torch.no_grad()
def fingerprint(model: nn.Module) -> str:
    """SHA-256 of all names, shapes and types of parameters, and of up to 256 evenly spaced values of each."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        values = parameter.flatten()
        places = torch.linspace(0, values.numel() - 1, min(256, values.numel()), dtype=torch.float64).long()
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(values[places.to(values.device)].float().cpu().numpy().tobytes())
    return digest.hexdigest()


def _check_folder(path: str) -> None:
    if path.startswith((".", "/", "~")) and not Path(path).is_dir():
        raise UsageError(f"model.path={path!r}: no such folder; paths are relative to the folder the command runs in")


def _summary(error: Exception) -> str:
    """The first line of a library's error, without what follows."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
