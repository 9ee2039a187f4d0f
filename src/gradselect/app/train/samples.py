"""Validation rows that a model answers during training, so that one can read what it has learnt."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from gradselect.app.inputs import IGNORED, Inputs
from gradselect.app.models import context_of
from gradselect.app.recipe import ChatData, ClassificationData, PromptCompletionData, Recipe

MAX_NEW_TOKENS = 128
"""Tokens of an answer."""

UNKNOWN_BEGINNING = (
    "no answers are shown at the validations: with data.loss_on=all no token says where an answer begins; "
    "run.sample_answers=0 leaves out this note"
)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A validation row to answer.

    Args:
        row: its number, from 1.
        prompt: text of the prompt, with special tokens; for classification the text.
        reference: answer in the data.
        ids: tokens of the prompt; none for classification.
    """

    row: int
    prompt: str
    reference: str
    ids: Sequence[int] = ()


def choose_samples(recipe: Recipe, inputs: Inputs) -> tuple[list[Sample], list[str]]:
    """Return up to `run.sample_answers` validation rows, evenly spaced, and notes for the user.

    Left out are rows whose prompt is longer than `data.max_length`, or leaves no room for an answer.
    """
    rows, data, count = inputs.examples.validation, recipe.data, recipe.run.sample_answers
    if rows is None or not count:
        return [], []
    if isinstance(data, ClassificationData):
        names = inputs.examples.labels
        return [_classified(rows[place], place, names) for place in _spread(len(rows), count)], []
    if not isinstance(data, PromptCompletionData | ChatData):
        return [], []
    if data.loss_on == "all":
        return [], [UNKNOWN_BEGINNING]
    context = context_of(inputs.model.config, inputs.tokenizer)
    room = inputs.max_length if context is None else min(inputs.max_length, context - new_tokens(context))
    found = (_first_answerable(rows, part, inputs.tokenizer, room=room) for part in _parts(len(rows), count))
    return [sample for sample in found if sample is not None], []


def new_tokens(context: int | None) -> int:
    """Return the limit on the tokens of an answer: at most half of the context."""
    return MAX_NEW_TOKENS if context is None else min(MAX_NEW_TOKENS, context // 2)


def _spread(num_rows: int, count: int) -> list[int]:
    return [part.start for part in _parts(num_rows, count)]


def _parts(num_rows: int, count: int) -> Iterator[range]:
    """Yield `count` ranges of about one length that make up all rows; fewer if there are fewer rows."""
    count = min(count, num_rows)
    bounds = [number * num_rows // count for number in range(count + 1)]
    return (range(start, end) for start, end in pairwise(bounds))


def _first_answerable(rows: Any, places: Sequence[int], tokenizer: Any, *, room: int) -> Sample | None:
    for place in places:
        row = rows[place]
        stretch = last_trained(row["labels"])
        if stretch.start and len(stretch) and stretch.start <= room:
            prompt, answer = row["input_ids"][: stretch.start], row["input_ids"][stretch.start : stretch.stop]
            return Sample(
                row=place + 1,
                prompt=tokenizer.decode(prompt, skip_special_tokens=False),
                reference=tokenizer.decode(answer, skip_special_tokens=True),
                ids=tuple(prompt),
            )
    return None


def last_trained(labels: Sequence[int]) -> range:
    """Return the places of the last stretch of tokens that count in the loss; an empty range if none does.

    Example:
        >>> last_trained([-100, 5, -100, 7, 8])
        range(3, 5)
    """
    stop = len(labels)
    while stop and labels[stop - 1] == IGNORED:
        stop -= 1
    start = stop
    while start and labels[start - 1] != IGNORED:
        start -= 1
    return range(start, stop)


def _classified(row: Mapping[str, Any], place: int, names: Sequence[str] | None) -> Sample:
    prompt = row["text"] if row["text_pair"] is None else f"{row['text']}\n{row['text_pair']}"
    reference = f"{row['labels']:g}" if names is None else str(names[row["labels"]])
    return Sample(row=place + 1, prompt=prompt, reference=reference)
