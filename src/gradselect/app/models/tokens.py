"""Texts as token ids."""

from __future__ import annotations

from typing import Any


def encode_texts(tokenizer: Any, text: str, pair: str | None, *, max_length: int | None) -> dict[str, list[int]]:
    """Return ids, mask and, where the tokenizer has them, token types of a text or a pair of texts to classify.

    Beyond `max_length` tokens the end is cut off; of a pair, token by token, the end of the longer text.
    """
    cut = {} if max_length is None else {"truncation": True, "max_length": max_length}
    return dict(tokenizer(text, pair, verbose=False, **cut))
