"""Greedy answers to many prompts."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .._errors import UsageError
from ._model import LanguageModel
from ._tokens import Prompt, longest_first, pad

SAMPLING = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "top_h",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
    "penalty_alpha",
    "dola_layers",
    "num_beam_groups",
    "diversity_penalty",
    "length_penalty",
    "early_stopping",
    "max_length",
    "min_length",
)
"""What a checkpoint's generation config may hold that has no meaning for greedy decoding with `max_new_tokens`."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the model wrote.

    Args:
        index: of the prompt.
        text: up to a stop string, without special tokens.
        finished: whether the model ended it, by an end-of-text token or a stop string, before `max_new_tokens`.
    """

    index: int
    text: str
    finished: bool


def resolve_max_new_tokens(asked: int | None, *, default: int, context: int | None) -> int:
    """`asked`, or `default` limited to half of the context.

    Raises:
        UsageError: nothing of the context is left for the prompt.
    """
    if asked is None:
        return default if context is None else min(default, context // 2)
    if context is not None and asked >= context:
        raise UsageError(
            f"max_new_tokens={asked} leaves no room for a prompt in the model's context of {context} tokens; "
            f"write max_new_tokens={context // 2}"
        )
    return asked


@contextlib.contextmanager
def greedy(language_model: LanguageModel, *, max_new_tokens: int) -> Iterator[dict[str, Any]]:
    """While it lasts the model decodes greedily; gives the generation config where it differs from the library's.

    Of the model's own config, end-of-text tokens, penalties on repetition, and suppressed or forced tokens stay.
    """
    model = language_model.model
    kept = model.generation_config
    # transformers fills what a config leaves open from the model's own, so the model's own is replaced.
    model.generation_config = greedy_config(language_model, max_new_tokens=max_new_tokens)
    try:
        yield model.generation_config.to_diff_dict()
    finally:
        model.generation_config = kept


def answer_all(
    prompts: Sequence[Prompt], *, language_model: LanguageModel, batch_size: int, stop: Sequence[str]
) -> Iterator[list[Answer]]:
    """Batches of answers, longest prompts first, within `greedy`.

    In exact arithmetic an answer does not depend on its batch.
    """
    for batch in longest_first([len(prompt.ids) for prompt in prompts], batch_size=batch_size):
        texts = _answer_batch([prompts[index].ids for index in batch], language_model=language_model, stop=stop)
        yield [Answer(index=i, text=text, finished=done) for i, (text, done) in zip(batch, texts, strict=True)]


def greedy_config(language_model: LanguageModel, *, max_new_tokens: int) -> Any:
    """The model's generation config, made greedy."""
    config = copy.deepcopy(language_model.model.generation_config)
    config.update(**dict.fromkeys(SAMPLING))
    config.update(
        do_sample=False,
        num_beams=1,
        num_return_sequences=1,
        max_new_tokens=max_new_tokens,
        eos_token_id=_end_tokens(language_model) or None,
        pad_token_id=language_model.pad_token,
    )
    return config


def _end_tokens(language_model: LanguageModel) -> list[int]:
    """Every end-of-text token that the generation config or the tokenizer names."""
    configured = language_model.model.generation_config.eos_token_id
    listed = configured if isinstance(configured, list) else [configured]
    return sorted({token for token in (*listed, language_model.tokenizer.eos_token_id) if token is not None})


@torch.inference_mode()
def _answer_batch(
    rows: Sequence[Sequence[int]], *, language_model: LanguageModel, stop: Sequence[str]
) -> list[tuple[str, bool]]:
    """Text and whether it is finished, for each prompt of a batch."""
    ids, mask = pad(rows, token=language_model.pad_token, left=True)
    stopping = {"stop_strings": list(stop), "tokenizer": language_model.tokenizer} if stop else {}
    output = language_model.model.generate(
        input_ids=ids.to(language_model.device), attention_mask=mask.to(language_model.device), **stopping
    )  # (16, 180 + 256)
    ends = set(_end_tokens(language_model))
    return [
        _read(row, ends=ends, stop=stop, tokenizer=language_model.tokenizer)
        for row in output[:, ids.shape[1] :].tolist()
    ]


def _read(ids: list[int], *, ends: set[int], stop: Sequence[str], tokenizer: Any) -> tuple[str, bool]:
    """Text before the first end-of-text token or stop string, and whether there is one."""
    end = next((place for place, token in enumerate(ids) if token in ends), len(ids))
    text = tokenizer.decode(ids[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    cut = min((text.find(string) for string in stop if string in text), default=len(text))
    return text[:cut], end < len(ids) or cut < len(text)
