"""Tokenization of rendered rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from gradselect.app.recipe import ChatData, ClassificationData, FileData, PromptCompletionData, TextData

from .chat_tokens import chat_tokens
from .examples import Examples, RenderedRows
from .tokens import TokenExample, completion_tokens, text_tokens, token_dataset


def tokenize_examples(rendered: RenderedRows, settings: FileData, tokenizer: PreTrainedTokenizerBase) -> Examples:
    """Return the examples of rendered rows: token ids and labels; for classification the texts as they are.

    Raises:
        UsageError: the chat template cannot be used for a row, or for what is asked.
    """
    made = {name: _dataset(rows, settings, tokenizer) for name, rows in rendered.rows.items()}
    return Examples(
        train=made["train"], validation=made.get("validation"), sources=rendered.sources, labels=rendered.labels
    )


def _dataset(rows: Sequence[dict[str, Any]], settings: FileData, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    if isinstance(settings, ClassificationData):
        return Dataset.from_list(list(rows))
    return token_dataset(_tokens(rows, settings, tokenizer))


def _tokens(
    rows: Sequence[dict[str, Any]],
    settings: PromptCompletionData | ChatData | TextData,
    tokenizer: PreTrainedTokenizerBase,
) -> Iterator[TokenExample]:
    match settings:
        case TextData():
            return text_tokens([row["text"] for row in rows], tokenizer)
        case PromptCompletionData() if not settings.as_chat:
            prompts, completions = [row["prompt"] for row in rows], [row["completion"] for row in rows]
            return completion_tokens(prompts, completions, tokenizer, train_prompts=settings.loss_on == "all")
        case _:
            loss_on = "last-answer" if settings.loss_on == "completion" else settings.loss_on
            return chat_tokens([row["conversation"] for row in rows], tokenizer, loss_on=loss_on)
