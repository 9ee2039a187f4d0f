"""Conversations in the rows of a file: messages, tools and documents, as a chat template reads them."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from typing import Any

from gradselect import UsageError

from .cells import plain_value
from .chat_messages import Message, read_messages
from .json_values import parse_json, shown, without_nulls

SYSTEM, DOCUMENTS, TEMPLATE_ARGUMENTS, OLD_TOOLS = "system", "documents", "chat_template_kwargs", "functions"
"""Columns beside messages and tools that chat files have."""

OTHER_SYSTEMS = ("system_prompt", "system_message")
MEDIA = ("image", "images", "video", "videos", "audio", "audios")
"""Columns that belong to a conversation, and that no run reads."""


@dataclass(frozen=True, kw_only=True)
class ChatColumns:
    """Places of a conversation in a row.

    Args:
        messages: columns that hold messages. Several are joined in their order.
        tools: column that holds the tools that the assistant may call.
        ignore: columns, and keys of messages, that are left out on purpose.
        roles: roles of a chat template, by the names that the file has for them.
        nulls_are_absent: True for tables, which give each object the keys of all others, with null.
    """

    messages: tuple[str, ...] = ("messages",)
    tools: str = "tools"
    ignore: frozenset[str] = frozenset()
    roles: Mapping[str, str] = field(default_factory=dict)
    nulls_are_absent: bool = False


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """One conversation, as a chat template reads it.

    Args:
        messages: objects with a role, content and so on.
        tools: JSON schemas of the tools that the assistant may call.
        documents: documents for the assistant to read.
        template_arguments: further variables of the chat template.
        untrained: positions of the messages that the file takes out of the training, as with `weight: 0`.
        wanted: positions of the messages that the file marks as to be trained on, as with `weight: 1`.
        facts: what the user must be told of it: "hold `name`, which data.ignore leaves out".
    """

    messages: list[Message]
    tools: list[Any] | None = None
    documents: list[Any] | None = None
    template_arguments: dict[str, Any] = field(default_factory=dict)
    untrained: frozenset[int] = frozenset()
    wanted: frozenset[int] = frozenset()
    facts: tuple[str, ...] = ()

    @property
    def last_answer(self) -> int | None:
        """Position of the assistant's last message."""
        answers = [place for place, message in enumerate(self.messages) if message["role"] == "assistant"]
        return answers[-1] if answers else None


def read_conversation(row: Mapping[str, Any], columns: ChatColumns) -> Conversation:
    """Return the conversation of a row.

    Raises:
        UsageError: something in it is no message, or cannot reach a chat template; says what, and what to type.
    """
    reserved = {columns.tools, SYSTEM, DOCUMENTS, TEMPLATE_ARGUMENTS, OLD_TOOLS}
    _check_unread(row, ignore=columns.ignore | reserved | {*columns.messages})
    ignore = columns.ignore | ({columns.tools} if "tools" in columns.ignore else set())
    may_be_left_out = reserved | {*OTHER_SYSTEMS, *MEDIA}
    ignored = sorted(name for name in ignore & may_be_left_out if row.get(name) is not None)
    read_columns = [*columns.messages, *sorted(reserved - set(ignored))]
    row = {name: _cell(row[name], name, columns) for name in read_columns if name in row}
    _check_reserved(row, columns)
    found: list[Any] = []
    for column in columns.messages:
        found += _message_list(row[column], column)
    read = read_messages(found, ignore=columns.ignore, roles=columns.roles)
    messages, moved = _with_system(row, read.messages)
    return Conversation(
        messages=messages,
        tools=_tools(row.get(columns.tools), columns.tools),
        documents=_objects(row.get(DOCUMENTS), DOCUMENTS, like='{"title": "...", "text": "..."}'),
        template_arguments=_template_arguments(row.get(TEMPLATE_ARGUMENTS)),
        untrained=frozenset(place + moved for place in read.untrained),
        wanted=frozenset(place + moved for place in read.wanted),
        facts=(*(f"have the column `{name}`, which data.ignore leaves out" for name in ignored), *read.facts),
    )


def message_roles(row: Mapping[str, Any], column: str, columns: ChatColumns) -> list[str]:
    """Return the roles of the messages in one column, by their names in a chat template.

    Raises:
        UsageError: something in it is no message.
    """
    items = _message_list(_cell(row[column], column, columns), column)
    return [message["role"] for message in read_messages(items, ignore=columns.ignore, roles=columns.roles).messages]


def _cell(value: Any, column: str, columns: ChatColumns) -> Any:
    """Return a cell with only types that JSON has."""
    try:
        value = plain_value(value)
    except UsageError as error:
        raise UsageError(f"column {column!r} {error}") from None
    return without_nulls(value) if columns.nulls_are_absent else value


def holds_messages(value: Any) -> bool:
    """Return True if a cell holds messages, which no template of plain text should render."""
    value = parse_json(value) if isinstance(value, str) and value.lstrip().startswith("[") else value
    return isinstance(value, list) and bool(value) and all(_is_message(item) for item in value)


def _is_message(item: Any) -> bool:
    return isinstance(item, dict) and any(keys <= item.keys() for keys in ({"role", "content"}, {"from", "value"}))


def _check_unread(row: Mapping[str, Any], *, ignore: Set[str]) -> None:
    """Refuse columns of a conversation that would be lost."""
    for name in (*OTHER_SYSTEMS, *MEDIA):
        if name in ignore or row.get(name) in (None, "", [], {}):
            continue
        reason = (
            "is not read; rename it to 'system', so that it becomes the first message,"
            if name in OTHER_SYSTEMS
            else "holds what the model would not see, as only text is trained here; drop such rows,"
        )
        raise UsageError(f"the column {name!r} {reason} or write data.ignore=[{name}] to leave it out")


def _check_reserved(row: Mapping[str, Any], columns: ChatColumns) -> None:
    """Refuse a column of tools in the old form: it would be lost."""
    if row.get(OLD_TOOLS) and columns.tools != OLD_TOOLS:
        raise UsageError(
            f"the column {OLD_TOOLS!r} is not read; write data.tools={OLD_TOOLS}, or data.ignore=[{OLD_TOOLS}] to "
            "leave it out"
        )


def _message_list(value: Any, column: str) -> list[Any]:
    """Return the items of a cell with messages: a list, JSON text, or an object of equally long lists."""
    if isinstance(value, str):
        parsed = parse_json(value)
        if parsed is None:
            raise UsageError(
                f"the text in column {column!r} is no JSON ({shown(value)}); write the messages as a JSON list, as "
                "json.dumps gives it, or name another column in data.messages"
            )
        value = parsed
    if isinstance(value, dict) and _are_columns(value):
        # Tables may keep a list of objects as an object of lists.
        value = [dict(zip(value, items, strict=True)) for items in zip(*value.values(), strict=True)]
    if not isinstance(value, list):
        raise UsageError(
            f"column {column!r}: expected a list of messages like "
            f'{{"role": "user", "content": "..."}}, got {shown(value)}'
        )
    return value


def _are_columns(value: Mapping[str, Any]) -> bool:
    lists = [items for items in value.values() if isinstance(items, list)]
    return len(lists) == len(value) > 0 and len({len(items) for items in lists}) == 1


def _with_system(row: Mapping[str, Any], messages: list[Message]) -> tuple[list[Message], int]:
    """Put the text of the column `system` in front; return also the number of messages that were added."""
    text = row.get(SYSTEM)
    if text is None or text == "":
        return messages, 0
    first = messages[0] if messages else {}
    if first.get("role") == "system" and first.get("content") == text:
        return messages, 0
    if not isinstance(text, str) or first.get("role") in ("system", "developer"):
        raise UsageError(
            f"the column 'system' ({shown(text)}) cannot become the first message: "
            f"{'it is no text' if not isinstance(text, str) else 'the messages begin with one of that role'}; write "
            "data.ignore=[system] to leave it out"
        )
    return [{"role": "system", "content": text}, *messages], 1


def _tools(value: Any, column: str) -> list[Any] | None:
    like = '{"type": "function", "function": {"name": "...", ...}}'
    tools = _objects(value, column, like=like)
    for tool in tools or []:
        if not tool.keys() & {"function", "name", "type"}:
            raise UsageError(f"column {column!r}: a tool has no name ({shown(tool)}); write it like {like}")
    return tools


def _objects(value: Any, column: str, *, like: str) -> list[Any] | None:
    """Return a list of objects, given as such or as JSON text; None if it is empty."""
    parsed = _parsed(value)
    items = [parsed] if isinstance(parsed, dict) else parsed
    items = [_parsed(item) for item in items] if isinstance(items, list) else items
    if items is None or items == []:
        return None
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise UsageError(
            f"column {column!r}: expected a list of objects like {like}, or that list as JSON text, got "
            f"{shown(value)}; write data.ignore=[{column}] to leave the column out"
        )
    return items


def _template_arguments(value: Any) -> dict[str, Any]:
    parsed = _parsed(value)
    if parsed is None:
        return {}
    if not isinstance(parsed, dict):
        raise UsageError(
            f'column {TEMPLATE_ARGUMENTS!r}: expected an object like {{"enable_thinking": false}}, got {shown(value)}'
        )
    if taken := sorted(parsed.keys() & _TAKEN):
        raise UsageError(
            f"column {TEMPLATE_ARGUMENTS!r} sets {taken[0]!r}, which a run sets itself; take it out of the data"
        )
    return parsed


_TAKEN = {
    "messages",
    "tools",
    "documents",
    "chat_template",
    "add_generation_prompt",
    "continue_final_message",
    "tokenize",
}


def _parsed(value: Any) -> Any:
    """Return the value of JSON text, and anything else as it is; None for empty text."""
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    parsed = parse_json(value)
    return value if parsed is None and value.strip() != "null" else parsed
