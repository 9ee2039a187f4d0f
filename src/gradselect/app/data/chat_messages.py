"""Messages of a conversation: one form for the forms that chat files have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

from gradselect import UsageError

from .chat_calls import read_calls, spoken_calls
from .chat_roles import CALL, OTHER_NAMES, known_names, sharegpt_role
from .json_values import shown

Message = dict[str, Any]

TRAIN_MARKS = ("weight", "train", "train_on_turn", "training", "loss")
"""Keys of a message with which files say if it is trained on."""

REASONING = ("reasoning_content", "reasoning", "thinking")
"""Keys of a message with what the assistant thinks before it answers."""

TEXT_PARTS = ("text", "input_text", "output_text")


@dataclass(kw_only=True)
class ReadMessages:
    """Messages with what was noticed about them.

    Args:
        messages: messages with role, content and further keys. None of their values is null.
        untrained: positions of messages that the file takes out of the training.
        wanted: positions of messages that the file marks as to be trained on.
        facts: what the user must be told: "hold `name`, which data.ignore leaves out".
    """

    messages: list[Message] = field(default_factory=list)
    untrained: set[int] = field(default_factory=set)
    wanted: set[int] = field(default_factory=set)
    facts: list[str] = field(default_factory=list)


def read_messages(items: Sequence[Any], *, ignore: Set[str], roles: Mapping[str, str]) -> ReadMessages:
    """Return the messages of a list.

    ShareGPT's `from` and `value` become `role` and `content`. JSON text in tool calls becomes objects.

    Args:
        items: the list as it stands in the file.
        ignore: keys of messages that are left out.
        roles: roles of a chat template, by the names that the file has for them.

    Raises:
        UsageError: an item is no message; names its position from 1, and what to type.
    """
    read = ReadMessages()
    for number, item in enumerate(items, start=1):
        try:
            message = _read_message(item, read, ignore=ignore, roles=roles)
        except UsageError as error:
            raise UsageError(f"message {number}: {error}") from None
        read.messages.append(message)
    _rename_function_role(read.messages, items)
    return read


def _read_message(item: Any, read: ReadMessages, *, ignore: Set[str], roles: Mapping[str, str]) -> Message:
    if not isinstance(item, dict):
        raise UsageError(f'expected an object like {{"role": "user", "content": "..."}}, got {shown(item)}')
    message = {key: value for key, value in item.items() if value is not None}
    for key in sorted(ignore & message.keys() - {"role", "from"}):
        del message[key]
        read.facts.append(f"hold `{key}` in a message, which data.ignore leaves out")
    message = _with_role(message, read, roles)
    mark = _train_mark(message, read)
    if mark is not None:
        (read.wanted if mark else read.untrained).add(len(read.messages))
    _drop_copies(message)
    read_calls(message)
    _check_content(message)
    return message


def _with_role(message: Message, read: ReadMessages, roles: Mapping[str, str]) -> Message:
    """Return the message with role and content, also if it is one of ShareGPT."""
    if "content" not in message and "value" in message:
        message["content"] = message.pop("value")
    if "from" in message and "role" not in message:
        name = message.pop("from")
        role = sharegpt_role(name, roles) if isinstance(name, str) else None
        if role is None:
            raise UsageError(
                f'"from" is {shown(name)}, which is none of {known_names()}; say which role it is, e.g. '
                f'data.roles={{"{name}": "user"}}'
            )
        if role == CALL:
            return {**spoken_calls(message.pop("content", None)), **message}
        return {"role": role, **message}
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise UsageError(f'the message has no "role" ({shown(message)}); write {{"role": "user", "content": "..."}}')
    renamed = roles.get(role) or (OTHER_NAMES.get(role.lower()) if role.lower() in ("human", "gpt", "bot") else None)
    if renamed is not None and renamed != role:
        read.facts.append(f"have messages of the role {role!r}, taken as {renamed!r}")
    return {**message, "role": renamed or role}


def _train_mark(message: Message, read: ReadMessages) -> bool | None:
    """Take the keys out that say if a message is trained on, and return what they say."""
    marks: list[bool] = []
    for key in TRAIN_MARKS:
        if key not in message:
            continue
        value = message.pop(key)
        if value not in (0, 1):
            raise UsageError(
                f'"{key}" is {shown(value)}; a message is trained on (1 or true) or not (0 or false); write one of '
                f"them, or data.ignore=[{key}]"
            )
        marks.append(bool(value))
        if value and message["role"] != "assistant":
            read.facts.append(
                f"have `{key}: {shown(value)}` on a message of the role {message['role']!r}; only the assistant's train"
            )
    return all(marks) if marks else None


def _drop_copies(message: Message) -> None:
    """Keep one of several keys with the same thoughts: servers write them under all names."""
    for key in REASONING[1:]:
        if key in message and message[key] == message.get(REASONING[0]):
            del message[key]


def _check_content(message: Message) -> None:
    """Check that the content is text, a list of text parts, or, from a tool, any JSON object or list."""
    content = message.get("content")
    if content is None:
        if message["role"] == "assistant" and any(message.get(key) for key in ("tool_calls", *REASONING)):
            return
        raise UsageError(
            f'"content" of a message of the role {message["role"]!r} is null or missing; only an assistant\'s message '
            "with tool_calls may have none: fill it in, or drop the row"
        )
    if isinstance(content, str):
        return
    if isinstance(content, list) and all(isinstance(part, str) or _is_part(part) for part in content):
        message["content"] = [_text_part(part) for part in content]
        return
    if message["role"] in ("tool", "function", "ipython") and isinstance(content, dict | list):
        return
    raise UsageError(
        f'"content" is {shown(content)}; expected text, or a list like [{{"type": "text", "text": "..."}}]'
    )


def _is_part(part: Any) -> bool:
    return isinstance(part, dict) and isinstance(part.get("type"), str)


def _text_part(part: Any) -> Message:
    text = part if isinstance(part, str) else part.get("text")
    if isinstance(part, str) or (part["type"] in TEXT_PARTS and isinstance(text, str)):
        return {"type": "text", "text": text}
    raise UsageError(
        f'a part of "content" is of the type {part["type"]!r}; only text is trained here: take the part out, or drop '
        "the row"
    )


def _rename_function_role(messages: Sequence[Message], items: Sequence[Any]) -> None:
    """Give the answers to OpenAI's old `function_call` the role that answers to `tool_calls` have."""
    if any(isinstance(item, dict) and item.get("function_call") for item in items):
        for message in messages:
            if message["role"] == "function":
                message["role"] = "tool"


def is_blank(message: Message) -> bool:
    """Return True if a message of the assistant says nothing: no text, no call, no thought."""
    content = message.get("content")
    texts = [content] if isinstance(content, str) else [part["text"] for part in content or []]
    return not any(text.strip() for text in texts) and not any(message.get(key) for key in ("tool_calls", *REASONING))
