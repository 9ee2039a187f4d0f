"""Greedy answers to many prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from gradselect.app.models import generate_with, greedy_settings
from gradselect.usage import UsageError

from .language_model import LanguageModel
from .tokens import Prompt, longest_first, pad


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Text that the model wrote.

    Args:
        index: number of the prompt.
        text: text up to a stop string, without special tokens.
        finished: True if an end-of-text token or a stop string came before `max_new_tokens`.
    """

    index: int
    text: str
    finished: bool


def resolve_max_new_tokens(asked: int | None, *, default: int, context: int | None) -> int:
    """Return `asked`, else `default` limited to half of the context.

    Raises:
        UsageError: no context is left for the prompt.
    """
    if asked is None:
        return default if context is None else min(default, context // 2)
    if context is not None and asked >= context:
        raise UsageError(
            f"max_new_tokens={asked} leaves no room for a prompt in the model's context of {context} tokens; "
            f"write max_new_tokens={context // 2}"
        )
    return asked


def answer_all(
    prompts: Sequence[Prompt], *, language_model: LanguageModel, config: Any, batch_size: int
) -> Iterator[list[Answer]]:
    """Yield batches of answers, longest prompts first. `config` comes from `greedy_config`.

    In exact arithmetic an answer does not depend on its batch.
    """
    for batch in longest_first([len(prompt.ids) for prompt in prompts], batch_size=batch_size):
        texts = _answer_batch([prompts[index].ids for index in batch], language_model=language_model, config=config)
        yield [Answer(index=i, text=text, finished=done) for i, (text, done) in zip(batch, texts, strict=True)]


def greedy_config(language_model: LanguageModel, *, max_new_tokens: int, stop: Sequence[str]) -> Any:
    """Return the `greedy_settings` of the model."""
    return greedy_settings(
        language_model.model,
        language_model.tokenizer,
        pad_token=language_model.pad_token,
        max_new_tokens=max_new_tokens,
        stop_strings=list(stop) or None,
    )


@torch.inference_mode()
def _answer_batch(
    rows: Sequence[Sequence[int]], *, language_model: LanguageModel, config: Any
) -> list[tuple[str, bool]]:
    """Return (text, finished) for each prompt of a batch."""
    ids, mask = pad(rows, token=language_model.pad_token, left=True)
    output = generate_with(
        language_model.model,
        config,
        input_ids=ids.to(language_model.device),
        attention_mask=mask.to(language_model.device),
        tokenizer=language_model.tokenizer,
    )  # (16, 180 + 256)
    return [_read(row, config=config, tokenizer=language_model.tokenizer) for row in output[:, ids.shape[1] :].tolist()]


def _read(ids: list[int], *, config: Any, tokenizer: Any) -> tuple[str, bool]:
    """Return the text before the first end-of-text token or stop string, and True if there is one."""
    ends, stop = config.eos_token_id or (), config.stop_strings or ()
    end = next((place for place, token in enumerate(ids) if token in ends), len(ids))
    text = tokenizer.decode(ids[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    cut = min((text.find(string) for string in stop if string in text), default=len(text))
    return text[:cut], end < len(ids) or cut < len(text)
