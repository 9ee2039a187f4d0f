"""Greedy decoding with the settings of a model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

KEPT = (
    "bos_token_id",
    "use_cache",
    "repetition_penalty",
    "no_repeat_ngram_size",
    "encoder_repetition_penalty",
    "exponential_decay_length_penalty",
    "bad_words_ids",
    "sequence_bias",
    "suppress_tokens",
    "begin_suppress_tokens",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "remove_invalid_values",
)
"""Settings of a model that say which tokens it may write. All others would change how answers are searched or cut."""


def greedy_settings(model: Any, tokenizer: Any, *, pad_token: int, ends: Iterable[int] = (), **changes: Any) -> Any:
    """Return a generation config that is greedy, for `generate_with`.

    The model's own end-of-text tokens, repetition penalties, and suppressed or forced tokens stay. What else its
    generation config holds is put aside: sampling, beams, guesses from the prompt, stop strings, limits.

    Args:
        model: the model.
        tokenizer: its end-of-text token ends an answer too.
        pad_token: pads answers that end before others.
        ends: tokens that end an answer beside those that the generation config names.
        changes: other values, such as `max_new_tokens`.
    """
    from transformers import GenerationConfig

    own = model.generation_config
    configured = own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]
    known = {token for token in (*configured, tokenizer.eos_token_id, *ends) if token is not None}
    kept = {name: getattr(own, name) for name in KEPT}
    settings = {**kept, "do_sample": False, "eos_token_id": sorted(known) or None, "pad_token_id": pad_token, **changes}
    return GenerationConfig(**settings)


def generate_with(model: Any, config: Any, **inputs: Any) -> Tensor:
    """Return what the model writes with the settings of `config` and no others.

    transformers fills every None from the model's own generation config, which is replaced meanwhile.
    """
    own = model.generation_config
    model.generation_config = config
    try:
        return model.generate(generation_config=config, **inputs)
    finally:
        model.generation_config = own
