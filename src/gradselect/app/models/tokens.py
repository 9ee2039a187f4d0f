"""Texts as token ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gradselect.usage import UsageError


def encode_texts(tokenizer: Any, text: str, pair: str | None, *, max_length: int | None) -> dict[str, list[int]]:
    """Return ids, mask and, where the tokenizer has them, token types of a text or a pair of texts to classify.

    Beyond `max_length` tokens the end is cut off; of a pair, token by token, the end of the longer text.
    """
    cut = {} if max_length is None else {"truncation": True, "max_length": max_length}
    return dict(tokenizer(text, pair, verbose=False, **cut))


def able_to_pad(tokenizer: Any, path: str | Path) -> Any:
    """Let a decoder's tokenizer pad with its end-of-text token. The attention mask hides it.

    Raises:
        UsageError: it has no such token either.
    """
    if tokenizer.pad_token is None and tokenizer.eos_token is None:
        raise UsageError(f'the tokenizer of {str(path)!r} cannot pad; add "pad_token" to its tokenizer_config.json')
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
