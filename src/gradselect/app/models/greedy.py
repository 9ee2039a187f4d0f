"""Greedy decoding with the settings of a model."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

NEUTRAL = {
    "do_sample": False,
    "num_beams": 1,
    "num_return_sequences": 1,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "min_p": None,
    "top_h": None,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "penalty_alpha": 0.0,
    "length_penalty": 1.0,
    "early_stopping": False,
    "max_length": None,
    "min_length": 0,
    "return_dict_in_generate": False,
}
"""Greedy decoding. Settings that it ignores, or that `max_new_tokens` replaces, have their defaults.

The defaults are written out because transformers fills a None from the model's own config.
"""
NO_LIMITS = {"min_new_tokens": 0, "max_time": 1e9}
"""Limits whose default is None: values that limit nothing, for a model that sets them."""


def greedy_settings(model: Any, tokenizer: Any, *, pad_token: int, ends: Iterable[int] = (), **changes: Any) -> Any:
    """Return a copy of the model's generation config, made greedy.

    Its end-of-text tokens, repetition penalties, and suppressed or forced tokens stay.

    Args:
        model: the model.
        tokenizer: its end-of-text token ends an answer too.
        pad_token: pads answers that end before others.
        ends: tokens that end an answer beside those that the generation config names.
        changes: other values, such as `max_new_tokens`.
    """
    config = copy.deepcopy(model.generation_config)
    configured = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    known = {token for token in (*configured, tokenizer.eos_token_id, *ends) if token is not None}
    no_limits = {name: value for name, value in NO_LIMITS.items() if getattr(config, name) is not None}
    config.update(**NEUTRAL, **no_limits, eos_token_id=sorted(known) or None, pad_token_id=pad_token, **changes)
    return config
