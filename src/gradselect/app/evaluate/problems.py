"""Problems with a reference answer, and passages to score, made from rows of data."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradselect.app.answers import FIND_REFERENCE
from gradselect.app.data import (
    ChatColumns,
    Conversation,
    Origin,
    Row,
    Rows,
    cell_text,
    check_local,
    columns_of,
    data_fingerprint,
    ending_of,
    holds_messages,
    is_empty,
    is_local,
    is_pattern,
    place_of,
    read_bytes,
    read_conversation,
    read_hub_rows,
    read_rows,
    render,
    require_columns,
    says_nothing,
)
from gradselect.app.recipe import DEFAULT_PROMPT, HUB_DATA, EvaluationSettings
from gradselect.files import check_no_pointer
from gradselect.usage import UsageError

from .trained_on import data_of_recipe, say_other_prompt, say_other_text

_log = logging.getLogger(__name__)

QUESTION_COLUMNS = ("question", "query", "problem", "instruction", "input", "prompt")
ANSWER_COLUMNS = {
    "gsm8k": ("answer", "response", "output", "target", "solution", "completion"),
    "math": ("answer", "solution", "response", "output", "target", "completion"),
    # If the data have a worked answer beside the bare one, models are trained to write the worked one.
    "loss": ("solution", "response", "output", "answer", "target"),
}
"""Column names to try, in this order, when no template names one."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """Rows and their origin.

    Args:
        name: name of the file or data set.
        fingerprint: SHA-256 of the file, or the fingerprint of the datasets library.
        rows: the rows in use.
        is_running_text: the only row is the text of a whole file.
    """

    name: str
    fingerprint: str
    rows: Rows
    is_running_text: bool = False

    def name_row(self, number: int) -> str:
        """Return the place of a row, counted from 1, for messages."""
        return place_of(self.rows, number - 1, path=self.name)

    def describe(self) -> dict[str, str | int]:
        """Return the description that a result keeps."""
        return {"name": self.name, "fingerprint": self.fingerprint, "rows_used": len(self.rows)}


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A question with its reference answer.

    Args:
        index: row of the data, from 0.
        question: question as in the data.
        prompt: the filled template.
        reference: the bare answer, extracted by `answers.py`.
    """

    index: int
    question: str
    prompt: str
    reference: str


@dataclass(frozen=True, kw_only=True)
class Passage:
    """Text whose loss is measured.

    Args:
        prompt: text before the target, not scored. None for a running text. A conversation is scored in its last
            answer.
        target: text to score; empty for a conversation.
        ends: True if the end-of-text token belongs to the target.
    """

    prompt: str | Conversation | None
    target: str
    ends: bool


def read_source(settings: EvaluationSettings) -> Source:
    """Read the first `limit` rows that the settings name. A `.txt` file is one row of running text.

    Raises:
        UsageError: no such file or data set, or a line that cannot be read.
    """
    assert settings.task is not None
    data, subset = (settings.data, None) if settings.data is not None else HUB_DATA[settings.task]
    subset = settings.subset or subset
    path, splits = Path(data), (settings.split,)
    if not is_local(path):
        rows, fingerprint = read_hub_rows(
            str(data), key="data", origin=str(data), subset=subset, split=settings.split, subset_key="--subset"
        )
        return Source(name=str(data), fingerprint=fingerprint, rows=rows[: settings.limit])
    check_local(path, subset=settings.subset, split=settings.split, default="test")
    is_text = settings.task == "loss" and ending_of(path) == ".txt" and not is_pattern(path)
    if is_text:
        rows = Rows.counted([{"text": _read_text(path)}], Origin(str(data)))
    else:
        rows = read_rows(path, columns=settings.columns, rows_key=settings.rows_key, splits=splits)
    fingerprint = data_fingerprint(path, splits)
    return Source(name=str(data), fingerprint=fingerprint, rows=rows[: settings.limit], is_running_text=is_text)


def problems(source: Source, settings: EvaluationSettings) -> list[Problem]:
    """Return every row as a problem of task gsm8k or math.

    Raises:
        UsageError: a missing column, an empty value, or a reference without an answer; names the row.
    """
    assert settings.task is not None
    rows = source.rows.map(with_question)
    prompt = settings.prompt or DEFAULT_PROMPT
    say_unread_input(source, prompt)
    say_other_prompt(settings, prompt, rows[0])
    completion = settings.completion or _answer_template(source, ANSWER_COLUMNS[settings.task])
    require(rows, prompt, completion, name=source.name)
    find = FIND_REFERENCE[settings.task]

    def problem(index: int, row: Row) -> Problem:
        check_cells(row, prompt)
        text = render(prompt, row)
        if says_nothing(prompt, row) or not text.strip():
            raise UsageError("the prompt is empty")
        reference = find(render(completion, row))
        question = text if is_empty(row.get("question")) else cell_text(row["question"])
        return Problem(index=index, question=question, prompt=text, reference=reference)

    return list(each_row(rows, problem, name=source.name))


def passages(source: Source, settings: EvaluationSettings) -> list[Passage]:
    """Return every row as a passage of task loss. Templates decide the format, else the columns of the first row.

    Raises:
        UsageError: columns of no known format, a missing column or an empty value; names the row.
    """
    if (chat := chat_columns(source, settings)) is not None:
        require(source.rows, *(f"{{{column}}}" for column in chat.messages), name=source.name)

        def conversation(_: int, row: Row) -> Passage:
            return Passage(prompt=read_conversation(row, chat), target="", ends=True)

        return list(each_row(source.rows, conversation, name=source.name))
    template = _text_template(source, settings)
    say_other_text(settings, template, source.rows[0])
    if template is not None:
        ends = not source.is_running_text
        require(source.rows, template, name=source.name)
        say_empty(source.rows, (template,), what="text", name=source.name)

        def document(_: int, row: Row) -> Passage:
            check_cells(row, template)
            return Passage(prompt=None, target=render(template, row), ends=ends)

        return list(each_row(source.rows, document, name=source.name))
    return _completions(source, settings)


def _completions(source: Source, settings: EvaluationSettings) -> list[Passage]:
    as_is = "prompt" in source.rows[0] and "completion" in source.rows[0]
    rows = source.rows.map(with_question)
    prompt = settings.prompt or ("{prompt}" if as_is else DEFAULT_PROMPT)
    say_unread_input(source, prompt)
    say_other_prompt(settings, prompt, rows[0])
    completion = settings.completion or (
        "{completion}" if as_is else f" {_answer_template(source, ANSWER_COLUMNS['loss'])}"
    )
    require(rows, prompt, completion, name=source.name)

    def passage(_: int, row: Row) -> Passage:
        check_cells(row, prompt + completion)
        asked, target = render(prompt, row), render(completion, row)
        if settings.as_chat:
            talk = [{"role": "user", "content": asked}, {"role": "assistant", "content": target.strip()}]
            return Passage(prompt=Conversation(messages=talk), target="", ends=True)
        return Passage(prompt=asked, target=target, ends=True)

    found = list(each_row(rows, passage, name=source.name))
    say_empty(rows, (completion,), what="target", name=source.name)
    return found


def _text_template(source: Source, settings: EvaluationSettings) -> str | None:
    """Return the template of whole texts. None: templates or columns name prompts and completions."""
    others = settings.prompt is not None or settings.completion is not None or settings.as_chat
    return settings.text or (None if others or "text" not in source.rows[0] else "{text}")


def chat_columns(source: Source, settings: EvaluationSettings) -> ChatColumns | None:
    """Return where a row's conversation stands: as in the recipe of the training, or in the usual columns.

    None: the rows hold no conversations, or templates name other columns.
    """
    if (settings.text, settings.prompt, settings.completion) != (None, None, None):
        return None
    known = data_of_recipe(settings.model, format="chat")
    named = known.get("messages") or "messages"
    messages = tuple([named] if isinstance(named, str) else named)
    if any(column not in source.rows[0] for column in messages):
        messages = tuple(column for column in ("messages", "conversations") if column in source.rows[0])[:1]
    if not messages:
        pair = ("prompt", "completion")
        messages = pair if all(holds_messages(source.rows[0].get(column)) for column in pair) else ()
    if not messages:
        return None
    return ChatColumns(
        messages=messages,
        tools=known.get("tools") or "tools",
        ignore=frozenset(known.get("ignore") or ()),
        roles=known.get("roles") or {},
        nulls_are_absent=source.rows.fills_with_nulls,
    )


def check_cells(row: Row, template: str) -> None:
    """Refuse messages where text is expected.

    Raises:
        UsageError: names the column.
    """
    found = [column for column in columns_of(template) if holds_messages(row.get(column))]
    if found:
        raise UsageError(
            f"column {found[0]!r} holds messages of a conversation, where text is expected; name a column with text in "
            "the templates, or, for the loss, call the column of the messages `messages`"
        )


def with_question(row: Row) -> Row:
    """Return the row with its question also under the names that templates use."""
    column = next((column for column in QUESTION_COLUMNS if column in row), None)
    return row if column is None else {"question": row[column], "query": row[column], **row}


def _answer_template(source: Source, columns: Sequence[str]) -> str:
    column = next((column for column in columns if column in source.rows[0]), None)
    if column is None:
        require_columns(source.rows[:1], ["answer"], path=source.name)
    return f"{{{column}}}"


def require(rows: Sequence[Row], *templates: str, name: str) -> None:
    require_columns(rows, [column for template in templates for column in columns_of(template)], path=name)


def each_row(rows: Sequence[Row], make: Callable[[int, Row], Any], *, name: str) -> Iterator[Any]:
    for index, row in enumerate(rows):
        try:
            yield make(index, row)
        except UsageError as error:
            raise UsageError(f"{place_of(rows, index, path=name)}: {error}") from None


def say_unread_input(source: Source, prompt: str) -> None:
    """Say how many rows of instructions have an input that the default prompt leaves out."""
    column = next((name for name in QUESTION_COLUMNS if name in source.rows[0]), None)
    if prompt != DEFAULT_PROMPT or column != "instruction":
        return
    found = [number for number, row in enumerate(source.rows, start=1) if not is_empty(row.get("input"))]
    if found:
        _log.warning(
            "%d of %d rows have text in the column 'input', which the default prompt leaves out; the first: %s; to ask "
            "with it, write --prompt '{instruction}{?input:\\n\\n{input}}\\n'",
            *(len(found), len(source.rows), source.name_row(found[0])),
        )


def say_empty(rows: Rows, templates: Sequence[str], *, what: str, name: str) -> None:
    """Say how many rows have an empty text: they count in the figures, as in those of others.

    Raises:
        UsageError: all have.
    """
    empty = [index for index, row in enumerate(rows) if all(says_nothing(template, row) for template in templates)]
    if not empty:
        return
    if len(empty) == len(rows):
        raise UsageError(
            f"{name}: nothing to score: all {len(rows):,} rows have an empty {what}; name columns that hold text"
        )
    _log.warning(
        "%d of %d rows have an empty %s and count as they are; the first: %s",
        *(len(empty), len(rows), what, place_of(rows, empty[0], path=name)),
    )


def _read_text(path: Path) -> str:
    if not path.is_file():
        raise UsageError(f"{path}: no such file; paths are relative to the folder the command runs in")
    check_no_pointer(path)
    data = read_bytes(path)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UsageError(
            f"{path}, line {line}: not UTF-8 (byte 0x{data[error.start]:02x} at offset {error.start}); "
            "convert the file, e.g. with iconv"
        ) from None
    if not text.strip():
        raise UsageError(f"{path}: the file holds no text")
    return text
