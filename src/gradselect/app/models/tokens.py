"""Texts as token ids."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gradselect.usage import UsageError


def encode_texts(tokenizer: Any, text: str, pair: str | None, *, max_length: int | None) -> dict[str, list[int]]:
    """Return ids, mask and, where the tokenizer has them, token types of a text or a pair of texts to classify.

    Beyond `max_length` tokens the end is cut off; of a pair, token by token, the end of the longer text.
    """
    cut = {} if max_length is None else {"truncation": True, "max_length": max_length}
    return dict(tokenizer(text, pair, verbose=False, **cut))


def encode_open(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Return the token ids of texts that may go on: without the end-of-text token that some tokenizers append.

    After that token a model begins a new text. The tokens in front of every text stay, and so does an end of text that
    is written in a text itself.
    """
    ids = tokenizer(text=list(texts), verbose=False)["input_ids"]
    # The longest, as a short one may be an end of text itself, and many tokenizers put the same token in front.
    longest = max(range(len(texts)), key=lambda place: len(texts[place]))
    bare = tokenizer(text=texts[longest], add_special_tokens=False, verbose=False)["input_ids"]
    is_closed = bare and ids[longest][-len(bare) - 1 :] == [*bare, tokenizer.eos_token_id]
    return [each[:-1] for each in ids] if is_closed else ids


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
