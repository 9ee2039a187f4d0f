"""Rows with answers to compare, and rows with prompts to answer, checked and filled into their templates."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from gradselect import UsageError
from gradselect.app.data import (
    ChatColumns,
    Conversation,
    Message,
    Row,
    columns_of,
    holds_messages,
    message_roles,
    place_of,
    read_conversation,
    render,
    require_columns,
)
from gradselect.app.recipe import PreferenceData, PromptData

from .sources import Source

YES, NO = (True, 1, "true", "yes", "1"), (False, 0, "false", "no", "0")
_COLUMN = re.compile(r"\{([^{}?]+)\}")


@dataclass(frozen=True, kw_only=True)
class AnswerLayout:
    """Columns and templates of the rows of a file, decided by the first of them.

    Args:
        parts: names of the templates that are read: the answers of a row, best first; for prompts only "prompt".
        is_paired: True if a row has a better and a worse answer.
        has_messages: True if the answers, or the prompts to answer, are messages.
    """

    parts: tuple[str, ...]
    is_paired: bool = False
    has_messages: bool = False


def layout_of(source: Source, settings: PreferenceData | PromptData) -> AnswerLayout:
    """Return what the rows of a source hold.

    Raises:
        UsageError: the first row has neither a pair nor an answer with a label.
    """
    first = source.rows[0]
    if isinstance(settings, PromptData):
        return AnswerLayout(parts=("prompt",), has_messages=_holds_messages(first, settings.prompt))
    pair = (*columns_of(settings.chosen), *columns_of(settings.rejected))
    if all(column in first for column in pair):
        messages = _holds_messages(first, settings.chosen)
        return AnswerLayout(parts=("chosen", "rejected"), is_paired=True, has_messages=messages)
    rated = (*columns_of(settings.completion), settings.label)
    if all(column in first for column in rated):
        return AnswerLayout(parts=("completion",), has_messages=_holds_messages(first, settings.completion))
    missing = next(column for column in pair if column not in first)
    raise UsageError(
        f"{place_of(source.rows, 0, path=source.path)} has no column {missing!r}; its columns are: "
        f"{', '.join(map(str, first))}. Pairs need data.chosen and data.rejected, e.g. 'data.chosen={{best}}' "
        "'data.rejected={worst}'; single answers need data.completion and data.label"
    )


def render_answers(source: Source, settings: PreferenceData | PromptData) -> list[dict[str, Any]]:
    """Return the rows in the form that `answer_tokens` reads.

    Each has `prompt` and `answers` (texts), or `conversations`, one for each answer; and `good`, the label, or None.

    Raises:
        UsageError: a column is missing, or a row cannot be used; names the row.
    """
    layout = layout_of(source, settings)
    if not layout.has_messages:
        _check_plain(source, settings)
    require_columns(source.rows, _columns_read(settings, layout), path=source.path)
    columns = ChatColumns(
        tools=settings.tools or "tools",
        ignore=frozenset(settings.ignore or ()),
        roles=settings.roles or {},
        nulls_are_absent=source.rows.fills_with_nulls,
    )
    examples = []
    for index, row in enumerate(source.rows):
        try:
            examples.append(_render(row, settings, layout, columns))
        except UsageError as error:
            raise UsageError(f"{place_of(source.rows, index, path=source.path)}: {error}") from None
    return examples


def _check_plain(source: Source, settings: PreferenceData | PromptData) -> None:
    """Refuse settings of conversations where prompts and answers are plain text."""
    for name in ("roles",) if settings.as_chat else ("tools", "roles", "ignore"):
        if (value := getattr(settings, name)) is not None:
            raise UsageError(
                f"data.{name}={value!r} is for conversations, and prompts and answers of {source.path} are plain "
                f"text: leave it out{'' if name == 'roles' else ', or write data.as_chat=true'}"
            )


def _columns_read(settings: PreferenceData | PromptData, layout: AnswerLayout) -> list[str]:
    """Return the columns that every row must have. Where answers are messages, a row may have its prompt in them."""
    templates = [getattr(settings, part) for part in layout.parts]
    if not layout.has_messages:
        templates.append(settings.prompt)
    if isinstance(settings, PromptData) and settings.answer is not None:
        templates.append(settings.answer)
    labels = [settings.label] if isinstance(settings, PreferenceData) and not layout.is_paired else []
    tools = [settings.tools] if settings.tools else []
    return [column for template in templates for column in columns_of(template)] + labels + tools


def _render(
    row: Row, settings: PreferenceData | PromptData, layout: AnswerLayout, columns: ChatColumns
) -> dict[str, Any]:
    good = _read_label(row, settings) if isinstance(settings, PreferenceData) and not layout.is_paired else None
    if layout.has_messages:
        talks = tuple(_conversation(row, settings, part, columns) for part in layout.parts)
        _check_conversations(talks, settings)
        return {"conversations": talks, "good": good}
    _check_no_messages(row, settings, layout)
    prompt = render(settings.prompt, row)
    asked = {"role": "user", "content": prompt}
    if isinstance(settings, PromptData):
        return {"conversations": (_spoken(row, columns, [asked]),)} if settings.as_chat else {"prompt": prompt}
    answers = tuple(render(getattr(settings, part), row) for part in layout.parts)
    if not settings.as_chat:
        return {"prompt": prompt, "answers": answers, "good": good}
    talks = tuple(_spoken(row, columns, [asked, {"role": "assistant", "content": answer}]) for answer in answers)
    return {"conversations": talks, "good": good}


def _spoken(row: Row, columns: ChatColumns, messages: list[Message]) -> Conversation:
    """Return the conversation of rendered messages, with the tools of the row."""
    tools = {columns.tools: row[columns.tools]} if columns.tools in row else {}
    return read_conversation({**tools, "messages": messages}, columns)


def _conversation(row: Row, settings: PreferenceData | PromptData, part: str, columns: ChatColumns) -> Conversation:
    """Return the conversation that ends with an answer; of prompts, the one that asks for it."""
    answer = _only_column(getattr(settings, part), part)
    columns = replace(columns, messages=(answer,))
    if part != "prompt" and (prompt := _prompt_column(row, settings, columns, answer=answer)) is not None:
        columns = replace(columns, messages=(prompt, answer))
        if isinstance(row[prompt], str) and not holds_messages(row[prompt]):
            row = {**row, prompt: [{"role": "user", "content": row[prompt]}]}
    return read_conversation(row, columns)


def _prompt_column(row: Row, settings: PreferenceData | PromptData, columns: ChatColumns, *, answer: str) -> str | None:
    """Return the column with the prompt of an answer; None if the answer's column holds the whole conversation."""
    roles = message_roles(row, answer, columns)
    if roles[:1] != ["assistant"]:
        return None
    prompt = _only_column(settings.prompt, "prompt")
    if row.get(prompt) is not None:
        return prompt
    is_named = settings.prompt != type(settings).model_fields["prompt"].default
    if len(roles) > 1 and (prompt in row or not is_named):
        return None  # it begins with a greeting
    raise UsageError(
        f"the messages in {answer!r} begin with an answer, and the row has no {prompt!r} to it; name the column with "
        "the prompt in data.prompt, e.g. 'data.prompt={question}'"
    )


def _check_conversations(talks: tuple[Conversation, ...], settings: PreferenceData | PromptData) -> None:
    for talk in talks:
        roles = [message["role"] for message in talk.messages]
        if isinstance(settings, PromptData):
            if not roles or roles[-1] == "assistant":
                raise UsageError(
                    "the messages of the prompt end with an answer; take the assistant's last message out of the data, "
                    "or name its column in data.answer"
                )
        elif roles[-1:] != ["assistant"] or len(roles) < 2:
            raise UsageError(
                f"a conversation has the roles {', '.join(roles) or 'of no message'}; it must ask, and end with an "
                'answer of the role assistant (another name: data.roles={"bot": "assistant"})'
            )
    if len(talks) == 2 and talks[0].messages[:-1] != talks[1].messages[:-1]:
        raise UsageError(
            "the two conversations differ before their last message, so that more than the answers would be compared; "
            "let both have the same prompt"
        )


def _holds_messages(row: Row, template: str) -> bool:
    return any(holds_messages(row.get(column)) for column in columns_of(template))


def _only_column(template: str, part: str) -> str:
    found = _COLUMN.fullmatch(template.strip())
    if found is None:
        raise UsageError(
            f"the data hold messages, so data.{part}={template!r} must be one column in braces, e.g. "
            f"'data.{part}={{{part}}}'"
        )
    return found.group(1)


def _check_no_messages(row: Row, settings: PreferenceData | PromptData, layout: AnswerLayout) -> None:
    """Refuse messages in a row where the first row had text."""
    for part in dict.fromkeys(("prompt", *layout.parts)):
        if _holds_messages(row, getattr(settings, part)):
            raise UsageError(
                f"data.{part} holds messages here, but the answers (or the prompts of the first row) are text; give "
                "all rows one form: messages in both, or text in both"
            )


def _read_label(row: Row, settings: PreferenceData) -> bool:
    value = row[settings.label]
    plain = value.strip().lower() if isinstance(value, str) else value
    for answers, meaning in ((YES, True), (NO, False)):
        if any(plain == answer and isinstance(plain, str) == isinstance(answer, str) for answer in answers):
            return meaning
    raise UsageError(
        f"column {settings.label!r} is {value!r:.40}, which says neither good nor bad; write true or false, or 1 or 0"
    )
