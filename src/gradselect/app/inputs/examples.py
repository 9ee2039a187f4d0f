"""Examples for the trainer, made from rows of a file or a hub data set."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from gradselect import UsageError
from gradselect.app.data import (
    ChatColumns,
    Conversation,
    Origin,
    Row,
    Rows,
    columns_of,
    holds_messages,
    label_names,
    place_of,
    read_conversation,
    read_label,
    render,
    require_columns,
)
from gradselect.app.recipe import (
    ChatData,
    ClassificationData,
    FileData,
    PreferenceData,
    PromptCompletionData,
    PromptData,
    RandomData,
    TextData,
)

from .answer_rows import render_answers
from .empty_rows import without_empty_rows
from .repeated_rows import repetition_notes
from .sources import Source, read_sources


@dataclass(frozen=True, kw_only=True)
class Examples:
    """Data that a run trains and evaluates on.

    Args:
        train: columns input_ids and labels, not cut to `data.max_length`; the label of a token that does not count in
            the loss is -100. For classification: columns text, text_pair (or None) and labels (a number). For answers
            and prompts: those of `preference_dataset` and `prompt_dataset`.
        validation: examples of the same form.
        sources: origins of the examples, by name.
        labels: labels of a classification, in the order of their numbers. None: no labels, or scores.
        notes: facts about the data that the user must see, with numbers: rows that are left out, and so on.
    """

    train: Dataset
    validation: Dataset | None
    sources: dict[str, Source]
    labels: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class RenderedRows:
    """Rows of the data, checked and filled into their templates.

    Args:
        rows: for "train" and, if there is one, "validation": rows with the columns prompt and completion, text, or
            conversation; for classification text, text_pair and labels; for answers and prompts see `render_answers`.
        sources: origins of the rows, by the same names.
        labels: labels of a classification, in the order of their numbers. None: no labels, or scores.
        notes: facts about the rows that the user must see, with numbers.
    """

    rows: dict[str, list[dict[str, Any]]]
    sources: dict[str, Source]
    labels: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()


def render_examples(settings: FileData, *, seed: int) -> RenderedRows:
    """Read, check and render the rows of `settings`. `seed` draws the held-out share.

    Raises:
        UsageError: a file, column or row cannot be used; the error names it.
    """
    sources = read_sources(settings, seed=seed)
    _check_braces(sources["train"], settings)
    labels = _labels(sources["train"], settings)
    rows, notes = {}, []
    for name, source in sources.items():
        rendered = _render_rows(source, settings, labels)
        sources[name], rows[name], said = without_empty_rows(
            source, rendered, settings, where="" if name == "train" else " of the validation data"
        )
        notes += said
    notes += repetition_notes(sources, rows)
    return RenderedRows(rows=rows, sources=sources, labels=labels, notes=tuple(notes))


def _labels(train: Source, settings: FileData) -> tuple[str, ...] | None:
    if not isinstance(settings, ClassificationData) or settings.regression:
        return None
    require_columns(train.rows, [settings.label], path=train.path)
    return settings.labels or label_names([row[settings.label] for row in train.rows], path=train.path, rows=train.rows)


def _render_rows(source: Source, settings: FileData, labels: tuple[str, ...] | None) -> list[dict[str, Any]]:
    """Return the rows in the form of `Examples`."""
    if isinstance(settings, PreferenceData | PromptData):
        return render_answers(source, settings)
    _require_columns(source, settings)
    columns = _chat_columns(source, settings) if isinstance(settings, ChatData) else None
    examples = []
    for index, row in enumerate(source.rows):
        try:
            _check_cells(row, settings)
            examples.append(_render_row(row, settings, labels, columns))
        except UsageError as error:
            raise UsageError(f"{place_of(source.rows, index, path=source.path)}: {error}") from None
    return examples


def _require_columns(source: Source, settings: FileData) -> None:
    """Check that every row has the columns that are read."""
    first = source.rows[0]
    if isinstance(settings, ChatData) and settings.messages == "messages" and "messages" not in first:
        usual = [name for name in ("conversations", "conversation") if name in first]
        found = [name for name, value in first.items() if holds_messages(value) and name != "rejected"]
        other = "[prompt,completion]" if {"prompt", "completion"} <= {*found} else next(iter(usual + found), None)
        if other is not None:
            raise UsageError(
                f"{place_of(source.rows, 0, path=source.path)} has no column 'messages', but messages in "
                f"{other!r}; write data.messages={other}"
            )
    try:
        require_columns(source.rows, _columns_read(settings), path=source.path)
    except UsageError as error:
        raise UsageError(f"{error}{_setting_to_write(settings, first)}") from None


def _check_braces(source: Source, settings: FileData) -> None:
    """Refuse a template that is the bare name of a column: every row would have this word in place of its text."""
    for name in ("prompt", "completion", "text", "text_pair", "chosen", "rejected", "answer"):
        word = (getattr(settings, name, None) or "").strip()
        if word and word in source.rows[0]:
            raise UsageError(
                f"data.{name}={word!r} is this very word in every row; the text of this column of {source.path} is "
                f"written with braces: 'data.{name}={{{word}}}'"
            )


def _setting_to_write(settings: FileData, row: Row) -> str:
    """Return which setting names the column that a row lacks, for the end of a message."""
    fields = {name: getattr(settings, name, None) or "" for name in ("prompt", "completion", "text", "text_pair")}
    name = next((name for name, template in fields.items() if set(columns_of(template)) - row.keys()), None)
    if name is None or len(row) < 2:
        return ""
    other = list(row)[-1 if name == "completion" else 0]
    return f"; name the columns to read in data.{name}, e.g. 'data.{name}={{{other}}}'"


def _chat_columns(source: Source, settings: ChatData) -> ChatColumns:
    """Return where a row's conversation stands."""
    return ChatColumns(
        messages=settings.message_columns,
        tools=settings.tools or "tools",
        ignore=frozenset(settings.ignore or ()),
        roles=settings.roles or {},
        nulls_are_absent=source.rows.fills_with_nulls,
    )


def _check_cells(row: Row, settings: FileData) -> None:
    """Refuse messages where text is expected."""
    if not isinstance(settings, ChatData):
        found = [column for column in _columns_read(settings) if holds_messages(row[column])]
        if found:
            raise UsageError(
                f"column {found[0]!r} holds messages of a conversation; write data.format=chat "
                f"data.messages=[{','.join(found)}]"
            )


def _columns_read(settings: FileData) -> tuple[str, ...]:
    """Return the columns that every row must have. `render_answers` reads those of answers and prompts."""
    match settings:
        case PromptCompletionData():
            return (*columns_of(settings.prompt), *columns_of(settings.completion))
        case ChatData():
            return settings.message_columns if settings.tools is None else (*settings.message_columns, settings.tools)
        case TextData():
            return columns_of(settings.text)
        case ClassificationData():
            return (*columns_of(settings.text), *columns_of(settings.text_pair or ""), settings.label)
    return ()


def _render_row(
    row: Row, settings: FileData, labels: tuple[str, ...] | None, columns: ChatColumns | None
) -> dict[str, Any]:
    match settings:
        case PromptCompletionData():
            prompt, completion = render(settings.prompt, row), render(settings.completion, row)
            if not settings.as_chat:
                return {"prompt": prompt, "completion": completion}
            question, answer = {"role": "user", "content": prompt}, {"role": "assistant", "content": completion}
            return {"conversation": Conversation(messages=[question, answer])}
        case ChatData():
            assert columns is not None
            return {"conversation": read_conversation(row, columns)}
        case TextData():
            return {"text": render(settings.text, row)}
        case ClassificationData():
            pair = None if settings.text_pair is None else render(settings.text_pair, row)
            return {
                "text": render(settings.text, row),
                "text_pair": pair,
                "labels": read_label(row[settings.label], labels=labels),
            }
    raise AssertionError(settings.format)


def with_labels(examples: Examples, labels: tuple[str, ...] | None, *, notes: tuple[str, ...]) -> Examples:
    """Return texts to classify with their labels numbered in the order of `labels`, and with further notes."""
    new = replace(examples, labels=labels, notes=(*examples.notes, *notes))
    if labels is None or labels == examples.labels:
        return new
    numbers = [labels.index(label) for label in examples.labels or ()]

    def numbered(dataset: Dataset) -> Dataset:
        column: Any = [numbers[label] for label in dataset["labels"]]
        return dataset.remove_columns("labels").add_column("labels", column)

    validation = None if examples.validation is None else numbered(examples.validation)
    return replace(new, train=numbered(examples.train), validation=validation)


_END = "<end>"


def random_examples(settings: RandomData, *, num_embeddings: int, seed: int) -> Examples:
    """Draw rows of random tokens. The same seed gives the same rows on every machine.

    Args:
        settings: number and length of the rows, and the vocabulary.
        num_embeddings: number of tokens of the model.
        seed: seed of the draw.

    Raises:
        UsageError: the vocabulary is larger than the model's.
    """
    vocabulary = num_embeddings if settings.vocabulary is None else settings.vocabulary
    if vocabulary > num_embeddings:
        raise UsageError(
            f"data.vocabulary={vocabulary} is more than the model's {num_embeddings} tokens; write at most that"
        )
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(vocabulary, (settings.rows, settings.length), generator=generator)
    rows = [{"input_ids": row, "labels": row} for row in tokens.tolist()]
    fingerprint = hashlib.sha256(tokens.numpy().tobytes()).hexdigest()
    return Examples(
        train=Dataset.from_list(rows),
        validation=None,
        sources={
            "train": Source(
                path=f"random tokens [{vocabulary}]",
                fingerprint=fingerprint,
                rows=Rows.counted(rows, Origin("random tokens")),
            )
        },
    )


def stand_in_tokenizer() -> PreTrainedTokenizerBase:
    """Return a tokenizer with one token, which ends and pads: trainers need one although there is no text."""
    tokenizer = Tokenizer(WordLevel({_END: 0}, unk_token=_END))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=_END, pad_token=_END)
