"""Pretrained models and tokenizers, from disk or from the hub, checked before they are loaded."""

from .adapters import loading_of, num_labels_of, register_own_adapters
from .causal import at_rest, check_causal
from .folder import files_beside_weights
from .greedy import generate_with, greedy_settings
from .pretrained import (
    check_complete,
    check_tokens,
    context_of,
    draw_weights,
    load_configuration,
    load_text_tokenizer,
    load_weights,
)
from .quantised import is_quantised, merge_command, num_trainable, quantisation_of
from .tokens import able_to_pad, encode_open, encode_texts

__all__ = [
    "able_to_pad",
    "at_rest",
    "check_causal",
    "check_complete",
    "check_tokens",
    "context_of",
    "draw_weights",
    "encode_open",
    "encode_texts",
    "files_beside_weights",
    "generate_with",
    "greedy_settings",
    "is_quantised",
    "load_configuration",
    "load_text_tokenizer",
    "load_weights",
    "loading_of",
    "merge_command",
    "num_labels_of",
    "num_trainable",
    "quantisation_of",
    "register_own_adapters",
]
