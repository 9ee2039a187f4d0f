"""Pretrained models and tokenizers, from disk or from the hub, checked before they are loaded."""

from .pretrained import (
    check_complete,
    check_tokens,
    context_of,
    draw_weights,
    load_configuration,
    load_text_tokenizer,
    load_weights,
)
from .tokens import encode_texts

__all__ = [
    "check_complete",
    "check_tokens",
    "context_of",
    "draw_weights",
    "encode_texts",
    "load_configuration",
    "load_text_tokenizer",
    "load_weights",
]
