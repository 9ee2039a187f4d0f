"""Token ids and labels of examples: the tokens that a model reads, and those that it learns to write.

The same ids and labels as TRL's own preparation gives, which stays their readable twin in the tests. Ours because TRL
renders conversations out of Arrow tables, which give every object the keys of all others. An end-of-text token that the
tokenizer appends to every text is dropped; TRL would have it twice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from datasets import Dataset, concatenate_datasets
from transformers import PreTrainedTokenizerBase

from gradselect.app.models import encode_open

from .notices import Notices

IGNORED = -100
"""Label of a token that counts in no loss."""

BROKEN_PROMPT = (
    "have a prompt that is encoded otherwise alone than with its answer behind it (a token spans both, or the template "
    "renders it otherwise): the answer is trained from where they differ"
)

ROWS_AT_ONCE = 1000
"""Rows whose tokens are held as Python numbers, which take eight times the memory of a table."""


@dataclass(frozen=True, kw_only=True)
class TokenExample:
    """Tokens of one example.

    Args:
        ids: token ids.
        is_trained: for each of them, True if it counts in the loss.
        row: number of its row, from 1; 0 where every row gives one example.
    """

    ids: Sequence[int]
    is_trained: Sequence[bool]
    row: int = 0


def token_dataset(examples: Iterable[TokenExample]) -> Dataset:
    """Return the examples as a data set with the columns `input_ids` and `labels`."""
    source, parts = iter(examples), []
    while batch := list(islice(source, ROWS_AT_ONCE)):
        labels = [
            [token if trained else IGNORED for token, trained in zip(one.ids, one.is_trained, strict=True)]
            for one in batch
        ]
        parts.append(Dataset.from_dict({"input_ids": [list(one.ids) for one in batch], "labels": labels}))
    return concatenate_datasets(parts)


def text_tokens(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[TokenExample]:
    """Yield the tokens of running texts, each ended by the end-of-text token. All of them train."""
    for batch in _batches(texts):
        for ids in encode([ended(text, tokenizer) for text in batch], tokenizer, special=True):
            yield TokenExample(ids=ids, is_trained=[True] * len(ids))


def completion_tokens(
    prompts: Sequence[str],
    completions: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    train_prompts: bool,
    notices: Notices | None = None,
) -> Iterator[TokenExample]:
    """Yield the tokens of prompts with their completions, each ended by the end-of-text token.

    `notices` takes prompts whose last token does not end with them.
    """
    row = 0
    wholes = [prompt + ended(completion, tokenizer) for prompt, completion in zip(prompts, completions, strict=True)]
    for some_prompts, some_wholes in zip(_batches(prompts), _batches(wholes), strict=True):
        before, both = (encode(texts, tokenizer, special=True) for texts in (some_prompts, some_wholes))
        for prompt, whole in zip(before, both, strict=True):
            row += 1
            start = 0 if train_prompts else common_prefix(prompt, whole)
            if notices is not None and not train_prompts and start < len(prompt):
                notices.add(BROKEN_PROMPT, row)
            yield TokenExample(ids=whole, is_trained=[place >= start for place in range(len(whole))])


def encode(texts: Sequence[str], tokenizer: Any, *, special: bool) -> list[list[int]]:
    """Return the token ids of each text; `special`: with the tokens that the tokenizer puts in front of every text."""
    if special:
        return encode_open(tokenizer, texts)
    return tokenizer(text=list(texts), add_special_tokens=False, verbose=False)["input_ids"]


def ended(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the text with the end-of-text token behind it, unless it is there."""
    end = str(tokenizer.eos_token)
    return text if text.endswith(end) else text + end


def common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """Return the number of tokens with which both begin.

    A tokenizer may merge the end of a prompt with the beginning of its completion: the merged token is trained.
    """
    shared = min(len(one), len(other))
    return next((place for place in range(shared) if one[place] != other[place]), shared)


def end_of_turn_tokens(tokenizer: Any, examples: Dataset) -> tuple[int, ...]:
    """Return the tokens that end what a model learns to write, the most common first.

    The last special or added token of each trained stretch; white space behind it does not matter. A stretch that ends
    with ordinary text gives none.

    Args:
        tokenizer: the tokenizer of the examples.
        examples: `Examples.train`: the columns `input_ids` and `labels`, not cut to `data.max_length`.

    Example:
        >>> from transformers import AutoTokenizer
        >>> tokenizer = AutoTokenizer.from_pretrained("Qwen/Qwen2.5-0.5B-Instruct")  # doctest: +SKIP
        >>> end_of_turn_tokens(tokenizer, inputs.examples.train)  # doctest: +SKIP
        (151645,)
    """
    added = {*tokenizer.get_added_vocab().values(), *tokenizer.all_special_ids}
    is_blank: dict[int, bool] = {}

    def is_space(token: int) -> bool:
        if token not in is_blank:
            is_blank[token] = token not in added and not tokenizer.decode([token]).strip()
        return is_blank[token]

    counts: Counter[int] = Counter()
    for labels in examples["labels"]:
        for position in _ends(labels):
            while position >= 0 and labels[position] != IGNORED and is_space(labels[position]):
                position -= 1
            if position >= 0 and labels[position] in added:
                counts[labels[position]] += 1
    return tuple(token for token, _ in counts.most_common())


def _ends(labels: Sequence[int]) -> Iterator[int]:
    """Yield the last position of each trained stretch."""
    for position, label in enumerate(labels):
        if label != IGNORED and (position + 1 == len(labels) or labels[position + 1] == IGNORED):
            yield position


def _batches(items: Sequence[str]) -> Iterator[Sequence[str]]:
    return (items[start : start + ROWS_AT_ONCE] for start in range(0, len(items), ROWS_AT_ONCE))
