"""Tokenization of rendered rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from gradselect import UsageError
from gradselect.app.progress import SILENT, Stage, Stages
from gradselect.app.recipe import (
    ChatData,
    ClassificationData,
    FileData,
    PreferenceData,
    PromptCompletionData,
    PromptData,
    TextData,
)

from .answer_tokens import preference_dataset, prompt_dataset
from .chat_examples import chat_tokens
from .chat_template import writes_the_date
from .examples import Examples, RenderedRows
from .notices import Notices, RowError
from .tokens import TokenExample, completion_tokens, end_of_turn_tokens, text_tokens, token_dataset


def tokenize_examples(
    rendered: RenderedRows, settings: FileData, tokenizer: PreTrainedTokenizerBase, *, stages: Stages = SILENT
) -> Examples:
    """Return the examples of rendered rows: token ids and labels; for classification the texts as they are.

    Args:
        rendered: the rows.
        settings: section `data` of the recipe.
        tokenizer: tokenizer of the model.
        stages: shows how far it is.

    Raises:
        UsageError: the chat template cannot be used for a row, or for what is asked.
    """
    made, notes = {}, [*rendered.notes]
    for name, rows in rendered.rows.items():
        source, notices = rendered.sources[name], Notices()
        try:
            with stages.open(f"tokenizing {_named(name)}", total=len(rows)) as stage:
                made[name] = _dataset(rows, settings, tokenizer, notices, stage, source=name)
        except RowError as error:
            raise error.at(source.name_row) from None
        except UsageError as error:
            raise UsageError(f"{source.path}: {error}") from None
        what = _kind(settings)
        notes += notices.lines(len(rows), what=what, name_row=source.name_row)
    if is_chat(settings) or any("conversations" in row for row in rendered.rows["train"][:1]):
        notes += _template_notes(made["train"], settings, tokenizer)
    if isinstance(settings, ChatData):
        notes += _idle_ignores(rendered, settings)
    return Examples(
        train=made["train"],
        validation=made.get("validation"),
        sources=rendered.sources,
        labels=rendered.labels,
        notes=tuple(notes),
    )


NO_END = (
    "the chat template puts no special token behind an answer, or its marks leave it out: the model does not learn to "
    "stop, and generates until its limit"
)


DATED = (
    "the chat template asks for the day's date: on another day, also after a stop, a run may read other tokens; the "
    'column chat_template_kwargs can fix it, for many models with {"date_string": "26 Jul 2024"}'
)


def is_chat(settings: FileData) -> bool:
    """Return True if the examples go through the chat template."""
    return isinstance(settings, ChatData) or (isinstance(settings, PromptCompletionData) and settings.as_chat)


def _template_notes(examples: Dataset, settings: FileData, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return notes on what the chat template makes of the answers."""
    # With loss_on=all the last message may be anyone's, and its end says nothing of the answers.
    trains_answers = isinstance(settings, PreferenceData) or (
        isinstance(settings, ChatData | PromptCompletionData) and settings.loss_on != "all"
    )
    is_endless = trains_answers and not end_of_turn_tokens(tokenizer, examples)
    return [*([NO_END] if is_endless else []), *([DATED] if writes_the_date(tokenizer) else [])]


def _idle_ignores(rendered: RenderedRows, settings: ChatData) -> list[str]:
    """Return a note for each name in data.ignore that no row has."""
    facts = {fact for rows in rendered.rows.values() for row in rows for fact in row["conversation"].facts}
    return [
        f"data.ignore names {name!r}, which no row and no message has"
        for name in settings.ignore or ()
        if not any(f"`{name}`" in fact for fact in facts)
    ]


def _named(part: str) -> str:
    return "training rows" if part == "train" else f"{part} rows"


def _kind(settings: FileData) -> str:
    if isinstance(settings, PreferenceData | PromptData):
        return "rows"
    return "conversations" if is_chat(settings) else "examples"


def _dataset(
    rows: Sequence[dict[str, Any]],
    settings: FileData,
    tokenizer: PreTrainedTokenizerBase,
    notices: Notices,
    stage: Stage,
    *,
    source: str,
) -> Dataset:
    match settings:
        case ClassificationData():
            return Dataset.from_list(list(rows))
        case PreferenceData():
            return preference_dataset(rows, tokenizer, notices)
        case PromptData():
            return prompt_dataset(rows, tokenizer, notices, source=source)
    return token_dataset(_counted(_tokens(rows, settings, tokenizer, notices), stage))


def _counted(examples: Iterator[TokenExample], stage: Stage) -> Iterator[TokenExample]:
    for example in examples:
        stage.advance()
        yield example


def _tokens(
    rows: Sequence[dict[str, Any]],
    settings: PromptCompletionData | ChatData | TextData,
    tokenizer: PreTrainedTokenizerBase,
    notices: Notices,
) -> Iterator[TokenExample]:
    match settings:
        case TextData():
            return text_tokens([row["text"] for row in rows], tokenizer)
        case PromptCompletionData() if not settings.as_chat:
            prompts, completions = [row["prompt"] for row in rows], [row["completion"] for row in rows]
            train_prompts = settings.loss_on == "all"
            return completion_tokens(prompts, completions, tokenizer, train_prompts=train_prompts, notices=notices)
        case _:
            loss_on = "last-answer" if settings.loss_on == "completion" else settings.loss_on
            return chat_tokens([row["conversation"] for row in rows], tokenizer, loss_on=loss_on, notices=notices)
