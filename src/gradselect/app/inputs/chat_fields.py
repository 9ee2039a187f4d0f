"""Checks that everything that a conversation says is in the text that the chat template makes of it.

A template leaves out what it does not know, without a word: tools, calls, thoughts, whole roles.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from gradselect import UsageError
from gradselect.app.data import REASONING, TEMPLATE_ARGUMENTS, Conversation, Message

from .chat_shapes import NUM_TRIED, STAND_IN, shows_python, texts_of
from .chat_template import ChatTemplate
from .notices import Notices, RowError


@dataclass(frozen=True, kw_only=True)
class Field:
    """One thing that a conversation says.

    Args:
        name: column of the row, or key of the message.
        value: its value, which is not empty.
        place: position of the message; None for a column of the row.
        role: role of the message.
        call: True for the arguments of the message's calls.
    """

    name: str
    value: Any
    place: int | None = None
    role: str | None = None
    call: bool = False

    @property
    def key(self) -> str:
        """Name to write into data.ignore."""
        is_argument = self.place is None and self.name not in ("tools", "documents")
        return TEMPLATE_ARGUMENTS if is_argument else self.name

    @property
    def kind(self) -> str:
        """Description for messages, which is the same for all fields that a template treats alike."""
        if self.place is None:
            return f"`{self.name}`"
        if self.name == "content":
            return f"messages of the role {self.role!r}"
        return f"`{self.name}`{' (the arguments)' if self.call else ''} of messages of the role {self.role!r}"


@dataclass(kw_only=True)
class FieldCheck:
    """Checks conversations against one template.

    Args:
        template: the template.
        notices: takes what is left out by design: ids that connect calls with their answers, earlier thoughts.
        left_out: kinds of fields that the template never renders, and may.
    """

    template: ChatTemplate
    notices: Notices
    left_out: set[str] = field(default_factory=set)

    def probe(self, conversations: Sequence[tuple[int, Conversation]]) -> None:
        """Try each kind of field on the first conversations that have it.

        Args:
            conversations: conversations with the numbers of their rows.

        Raises:
            UsageError: the template never renders some of them; names them and what to type.
        """
        found: dict[str, list[tuple[int, Conversation, Field]]] = {}
        for row, conversation in conversations:
            for one in fields_of(conversation):
                tried = found.setdefault(one.kind, [])
                if len(tried) < NUM_TRIED:
                    tried.append((row, conversation, one))
        never = {kind: tried for kind, tried in found.items() if not any(self._survives(*one) for one in tried)}
        self.left_out = {kind for kind, tried in never.items() if all(map(_is_link, *zip(*tried, strict=True)))}
        lost = {kind: tried for kind, tried in never.items() if kind not in self.left_out}
        if lost:
            raise _never_rendered(lost, conversations)

    def _survives(self, row: int, conversation: Conversation, one: Field) -> bool:
        try:
            return self._is_rendered(conversation, one)
        except UsageError as error:
            raise RowError(row, error) from None

    def check(self, row: int, conversation: Conversation, text: str) -> None:
        """Check that a text holds all that its conversation says.

        Raises:
            UsageError: something is missing, or stands there as Python writes it.
        """
        if (value := shows_python(conversation, text)) is not None:
            raise UsageError(
                f"the chat template writes {str(value)[:60]!r}, an object as Python writes it, and the model would "
                "learn that; use a model whose template writes JSON"
            )
        for one in fields_of(conversation):
            if one.kind in self.left_out:
                self.notices.add(UNRENDERED_LINKS, row)
            elif not _is_evident(one, text) and not self._is_rendered(conversation, one, text=text):
                if one.name not in _OPTIONAL:
                    raise _lost(one)
                self.notices.add(f"have {one.kind} in a place where the chat template does not render it", row)

    def _is_rendered(self, conversation: Conversation, one: Field, *, text: str | None = None) -> bool:
        """Return True if the text changes with the field: the given text, or, without one, any that could hold it."""
        if one.name in conversation.template_arguments and one.place is None:
            return re.search(rf"\b{re.escape(one.name)}\b", self.template.source(conversation)) is not None
        other = without(conversation, one)
        ends: list[int | None] = [None]
        if text is None and one.place is not None and one.name in _OPTIONAL:
            # Thoughts of earlier turns may be left out by design: if they are the last ones, they should be there.
            ends.append(one.place + 1)
        text = self.template.render(conversation) if text is None else text
        for end in ends:
            try:
                before = text if end is None else self.template.render(conversation, count=end)
                if before != self.template.render(other, count=end):
                    return True
            except UsageError:
                return True  # the template reads the field: it cannot do without
        return False


UNRENDERED_LINKS = "have `tool_call_id` or `name` in a tool's message, which the chat template leaves out, as most do"

_OPTIONAL = REASONING
"""Keys that templates leave out in some places by design."""


def fields_of(conversation: Conversation) -> Iterator[Field]:
    """Yield everything that a conversation says beside its roles."""
    if conversation.tools:
        yield Field(name="tools", value=conversation.tools)
    if conversation.documents:
        yield Field(name="documents", value=conversation.documents)
    for name, value in conversation.template_arguments.items():
        yield Field(name=name, value=value)
    for place, message in enumerate(conversation.messages):
        role = message["role"]
        for name, value in message.items():
            if name != "role" and value not in (None, "", [], {}) and value is not False:
                yield Field(name=name, value=value, place=place, role=role)
        if arguments := [one for one in map(_arguments, message.get("tool_calls", ())) if one not in (None, {}, "{}")]:
            yield Field(name="tool_calls", value=arguments, place=place, role=role, call=True)


def without(conversation: Conversation, one: Field) -> Conversation:
    """Return the conversation without a field; a content becomes another one."""
    if one.place is None:
        if one.name in ("tools", "documents"):
            return replace(conversation, **{one.name: None})
        arguments = {name: value for name, value in conversation.template_arguments.items() if name != one.name}
        return replace(conversation, template_arguments=arguments)
    message = dict(conversation.messages[one.place])
    if one.name == "content":
        message["content"] = STAND_IN if isinstance(one.value, str) else [{"type": "text", "text": STAND_IN}]
    elif one.call:
        message["tool_calls"] = [_without_arguments(call) for call in message["tool_calls"]]
    else:
        del message[one.name]
        message.setdefault("content", "")
    messages = [*conversation.messages]
    messages[one.place] = message
    return replace(conversation, messages=messages)


def _is_evident(one: Field, text: str) -> bool:
    """Return True if a text holds the value, or all texts of it. False says nothing: it may be written otherwise."""
    if one.name == "content":
        expected = texts_of(one.value) or [STAND_IN]
    elif one.call:
        expected = [leaf for arguments in one.value for leaf in _leaves(arguments)]
    elif one.name in ("tools", "tool_calls"):
        expected = [str(item.get("function", item).get("name", STAND_IN)) for item in one.value]
    else:
        expected = [one.value.strip()] if isinstance(one.value, str) else [STAND_IN]
    return all(leaf in text for leaf in expected)


def _leaves(value: Any) -> Iterator[str]:
    """Yield the texts in a JSON value; for anything else a text that is nowhere."""
    match value:
        case dict():
            for item in value.values():
                yield from _leaves(item)
        case list():
            for item in value:
                yield from _leaves(item)
        case str():
            yield value
        case bool() | None:
            yield STAND_IN
        case _:
            yield str(value)


def _is_link(row: int, conversation: Conversation, one: Field) -> bool:
    """Return True for keys that only connect a call with its answer: most templates leave them out."""
    if one.role != "tool" or one.place is None:
        return False
    called = {
        call.get("function", call).get("name")
        for message in conversation.messages[: one.place]
        for call in message.get("tool_calls", ())
    }
    return one.name == "tool_call_id" or (one.name == "name" and one.value in called)


def _arguments(call: Message) -> Any:
    return call.get("function", call).get("arguments")


def _without_arguments(call: Message) -> Message:
    function = call.get("function", call)
    function = {**function, "arguments": {} if isinstance(function.get("arguments"), dict) else "{}"}
    return {**call, "function": function} if "function" in call else function


def _never_rendered(
    lost: dict[str, list[tuple[int, Conversation, Field]]], conversations: Sequence[tuple[int, Conversation]]
) -> RowError:
    """Return the error that names all kinds of fields that the template never renders."""
    fields = [tried[0][2] for tried in lost.values()]
    # Arguments are lost with their calls.
    fields = [
        one for one in fields if not one.call or not any(each.name == one.name and not each.call for each in fields)
    ]
    rows = {one.kind: [row for row, each in conversations if _has(each, one.kind)] for one in fields}
    named = " and ".join(f"{kind} ({_conversations(len(found))})" for kind, found in rows.items())
    roles = [one.role for one in fields if one.name == "content"]
    keys = list(dict.fromkeys(one.key for one in fields if one.name != "content"))
    advice = ["use a model whose template does"]
    advice += [f"leave them out with data.ignore=[{','.join(keys)}]"] if keys else []
    other = "system" if roles == ["developer"] else "user"
    advice += [f'give that role another name, e.g. data.roles={{"{roles[0]}": "{other}"}}'] if roles else []
    reason = f"the chat template never renders {named}, so the model would not see them: {', or '.join(advice)}"
    return RowError(min(found[0] for found in rows.values()), reason)


def _has(conversation: Conversation, kind: str) -> bool:
    return any(one.kind == kind for one in fields_of(conversation))


def _conversations(count: int) -> str:
    return f"{count:,} conversation{'s' if count > 1 else ''}"


def _lost(one: Field) -> UsageError:
    where = "" if one.place is None else f"message {one.place + 1}: "
    advice = "take it out of the row" if one.name == "content" else f"data.ignore=[{one.key}]"
    return UsageError(
        f"{where}the chat template does not render {one.kind} here, though it does elsewhere; change the row, use a "
        f"model whose template does, or leave it out ({advice})"
    )
