"""Tokens of answers to compare, and of prompts to answer."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from datasets import Dataset, concatenate_datasets
from transformers import PreTrainedTokenizerBase

from gradselect import UsageError
from gradselect.app.data import Conversation

from .chat_examples import chat_tokens
from .chat_fields import FieldCheck
from .chat_shapes import best_shape
from .chat_template import ChatTemplate
from .notices import Notices, RowError
from .tokens import IGNORED, ROWS_AT_ONCE, TokenExample, completion_tokens, encode

EQUAL = "have two equal answers and are left out: neither can be preferred"


def preference_dataset(rows: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, notices: Notices) -> Dataset:
    """Return the tokens of answers with their prompts.

    Args:
        rows: rows of `render_answers`.
        tokenizer: encodes them.
        notices: takes what is left out.

    Returns:
        The columns `input_ids` and `labels` of the only or better answer, `rejected_ids` and `rejected_labels` of the
        worse one if there is one, else `good`, the label.

    Raises:
        UsageError: a conversation cannot be rendered, or no row is left.
    """
    is_chat = "conversations" in rows[0]
    count = len(rows[0]["conversations"] if is_chat else rows[0]["answers"])
    by_row = (
        _chat_answers(rows, count, tokenizer, notices) if is_chat else _text_answers(rows, count, tokenizer, notices)
    )
    examples = []
    for number, answers in sorted(by_row.items()):
        if len(answers) < count:
            continue  # one of the two is noted as left out
        if count == 2 and answers[0].ids == answers[1].ids:
            notices.add(EQUAL, number)
            continue
        examples.append(_columns(answers, rows[number - 1]["good"]))
    if not examples:
        raise UsageError("no row is left: every pair has two equal answers, or an answer that is empty")
    return _as_dataset(examples)


def _text_answers(
    rows: Sequence[dict[str, Any]], count: int, tokenizer: PreTrainedTokenizerBase, notices: Notices
) -> dict[int, list[TokenExample]]:
    prompts = [row["prompt"] for row in rows]
    found: dict[int, list[TokenExample]] = {}
    for place in range(count):
        answers = [row["answers"][place] for row in rows]
        encoded = completion_tokens(prompts, answers, tokenizer, train_prompts=False, notices=notices)
        for number, example in enumerate(encoded, start=1):
            found.setdefault(number, []).append(example)
    return found


def _chat_answers(
    rows: Sequence[dict[str, Any]], count: int, tokenizer: PreTrainedTokenizerBase, notices: Notices
) -> dict[int, list[TokenExample]]:
    """Return the tokens of conversations. All of them are rendered together, so that both answers have one form."""
    _check_template(tokenizer)
    talks = [row["conversations"][place] for place in range(count) for row in rows]
    ours, found = Notices(), {}
    try:
        for example in chat_tokens(talks, tokenizer, loss_on="last-answer", notices=ours):
            found.setdefault((example.row - 1) % len(rows) + 1, []).append(example)
    except RowError as error:
        raise RowError((error.row - 1) % len(rows) + 1, error.reason) from None
    for fact, numbers in ours.rows.items():
        for number in sorted({(number - 1) % len(rows) + 1 for number in numbers}):
            notices.add(fact, number)
    return found


def _columns(answers: Sequence[TokenExample], good: bool | None) -> dict[str, Any]:
    columns: dict[str, Any] = {"input_ids": list(answers[0].ids), "labels": _labels(answers[0])}
    if len(answers) == 2:
        columns |= {"rejected_ids": list(answers[1].ids), "rejected_labels": _labels(answers[1])}
    return columns if good is None else {**columns, "good": good}


def _labels(example: TokenExample) -> list[int]:
    return [token if on else IGNORED for token, on in zip(example.ids, example.is_trained, strict=True)]


def prompt_dataset(
    rows: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, notices: Notices, *, source: str
) -> Dataset:
    """Return prompts for a model to answer.

    Returns:
        The columns `prompt` (the text), `messages` (JSON of the conversation, "" for plain text), `input_ids`,
        `labels` (none of which counts in a loss), `source` and `row` (place in that source, from 0).

    Raises:
        UsageError: a conversation cannot be rendered; names the row.
    """
    is_chat = "conversations" in rows[0]
    talks = [row["conversations"][0] for row in rows] if is_chat else []
    texts = list(_asked(talks, tokenizer, notices)) if is_chat else [row["prompt"] for row in rows]
    examples = []
    for start in range(0, len(rows), ROWS_AT_ONCE):
        some = range(start, min(start + ROWS_AT_ONCE, len(rows)))
        encoded = encode([texts[place] for place in some], tokenizer, special=not is_chat)
        for place, ids in zip(some, encoded, strict=True):
            messages = json.dumps(talks[place].messages, ensure_ascii=False) if is_chat else ""
            examples.append(
                {
                    "prompt": texts[place],
                    "messages": messages,
                    "input_ids": ids,
                    "labels": [IGNORED] * len(ids),
                    "source": source,
                    "row": place,
                }
            )
    return _as_dataset(examples)


def _asked(talks: Sequence[Conversation], tokenizer: PreTrainedTokenizerBase, notices: Notices) -> Iterator[str]:
    """Yield the text of each conversation with the beginning of an answer behind it."""
    _check_template(tokenizer)
    template = ChatTemplate(tokenizer=tokenizer)
    shape = best_shape(template, talks)
    check = FieldCheck(template=template, notices=notices)
    shaped = [shape.apply(talk) for talk in talks]
    check.probe(list(enumerate(shaped, start=1)))
    for number, talk in enumerate(shaped, start=1):
        notices.add(talk.facts, number)
        try:
            text = template.render(talk, opens_answer=True)
            check.check(number, talk, text)
        except RowError:
            raise
        except UsageError as error:
            raise RowError(number, error) from None
        yield text


def _check_template(tokenizer: PreTrainedTokenizerBase) -> None:
    if tokenizer.chat_template is None:
        raise UsageError(
            "the data hold messages, but the model's tokenizer has no chat template; use a chat model, or data of text"
        )


def _as_dataset(examples: Sequence[dict[str, Any]]) -> Dataset:
    names, parts = list(examples[0]), []
    for start in range(0, len(examples), ROWS_AT_ONCE):
        some = examples[start : start + ROWS_AT_ONCE]
        parts.append(Dataset.from_dict({name: [one[name] for one in some] for name in names}))
    return concatenate_datasets(parts)
