"""Checkpoints of transformers, read with all that can be wrong with one turned into the user's words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from .._errors import UsageError

_LOADING_ERRORS = (OSError, ValueError, ImportError, KeyError, RuntimeError, SafetensorError)
"""Whatever is wrong with a checkpoint comes out of transformers as one of these."""


def load_weights(kind: Any, path: str | Path, *, key: str, **options: Any) -> tuple[Any, tuple[str, ...]]:
    """A model of an auto class of transformers, and the names of its weights that the checkpoint lacks.

    Args:
        kind: e.g. `AutoModelForCausalLM`.
        path: a folder, or an id on the hub.
        key: what the user calls it, in errors: "model.path".
        options: of `from_pretrained`.

    Raises:
        UsageError: it cannot be had or is damaged.
    """
    try:
        model, report = kind.from_pretrained(path, output_loading_info=True, **options)
    except _LOADING_ERRORS as error:
        raise UsageError(f"{key}={str(path)!r} cannot be used: {first_line(error)}") from error
    return model, tuple(sorted(report["missing_keys"]))


def load_configuration(path: str | Path, *, key: str, **options: Any) -> Any:
    """The configuration in a folder, in a file, or of an id on the hub; `options` change its values.

    Raises:
        UsageError: there is none, or it is damaged.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path, **options)
    except _LOADING_ERRORS as error:
        raise UsageError(
            f"{key}={str(path)!r} cannot be used, there is no configuration of a model: {first_line(error)}"
        ) from error


def draw_weights(kind: Any, config: Any, *, dtype: str, attention: str | None, key: str) -> Any:
    """A model of an auto class of transformers with the random weights that its training would begin from.

    Raises:
        UsageError: the auto class has no model of this configuration.
    """
    try:
        return kind.from_config(config, dtype=dtype, attn_implementation=attention)
    except _LOADING_ERRORS as error:
        raise UsageError(f"{key} cannot be used: {first_line(error)}") from error


def load_text_tokenizer(path: str | Path, *, key: str, **options: Any) -> Any:
    """The tokenizer of a checkpoint.

    Raises:
        UsageError: there is none, or it is damaged.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, **options)
    except _LOADING_ERRORS as error:
        raise UsageError(f"{key}={str(path)!r} cannot be used, there is no tokenizer: {first_line(error)}") from error


def check_complete(missing: tuple[str, ...], model: Any, path: str | Path, *, key: str, wanted: str) -> None:
    """The checkpoint lacks no weights.

    Raises:
        UsageError: names the first, and says that `wanted` is what to give.
    """
    if missing:
        raise UsageError(
            f"{key}={str(path)!r} lacks {len(missing)} weights of a {type(model).__name__}, {missing[0]!r} among them, "
            f"which would be random; give the checkpoint of {wanted}"
        )


def check_tokens(model: Any, tokenizer: Any) -> None:
    """The model has an embedding for every token.

    Raises:
        UsageError: otherwise.
    """
    rows = next(model.get_input_embeddings().parameters()).shape[0]
    if len(tokenizer) > rows:
        raise UsageError(
            f"the tokenizer has {len(tokenizer)} tokens, the model embeddings for {rows}: they do not belong together; "
            "give the tokenizer of this model, or call model.resize_token_embeddings(len(tokenizer)) before training"
        )


def context_of(model: Any, tokenizer: Any) -> int | None:
    """Tokens that the model can read at once; None where the architecture sets no limit.

    Of RoBERTa and its kin the tokenizer knows better: two of the model's positions are never used.
    """
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    # A tokenizer without a limit stores a huge number.
    known = [int(limit) for limit in (positions, tokenizer.model_max_length) if limit is not None and 0 < limit < 10**9]
    return min(known, default=None)


def first_line(error: Exception) -> str:
    """The first line of a library's error, without what follows."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
