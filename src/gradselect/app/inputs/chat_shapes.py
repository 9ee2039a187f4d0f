"""The form in which a chat template takes contents and calls: some want text, others objects.

Templates do not say which form they take, and with the wrong one some write Python's repr, or nothing. So the forms are
tried on some conversations of the data.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Literal

from gradselect import UsageError
from gradselect.app.data import Conversation, Message

from .chat_template import ChatTemplate

STAND_IN = "\u2042 another text \u2042"
"""Takes the place of a content: if the rendered text stays the same, the content is not in it."""

NUM_TRIED = 8
"""Conversations of each kind on which the forms are tried."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Form of the messages for a template.

    Args:
        contents: "given": as in the data. "text": lists of text parts become one text, joined by line ends, as servers
            do, and objects become JSON. "parts": texts become lists with one text part.
        arguments: arguments of calls are objects, or their JSON text.
        missing: a message without content has none, or an empty text.
    """

    contents: Literal["given", "text", "parts"] = "given"
    arguments: Literal["objects", "text"] = "objects"
    missing: Literal["absent", "empty"] = "absent"

    def apply(self, conversation: Conversation) -> Conversation:
        """Return the conversation in this form."""
        if self == _SHAPES[0]:
            return conversation
        return replace(conversation, messages=[self._message(message) for message in conversation.messages])

    def joins(self, conversation: Conversation) -> bool:
        """Return True if several parts of a content become one text."""
        contents = [message.get("content") for message in conversation.messages]
        return self.contents == "text" and any(isinstance(one, list) and len(texts_of(one)) > 1 for one in contents)

    def _message(self, message: Message) -> Message:
        changed = dict(message)
        if self.missing == "empty":
            changed.setdefault("content", "")
        content = changed.get("content")
        if self.contents == "text" and isinstance(content, list | dict):
            changed["content"] = _as_text(content)
        if self.contents == "parts" and isinstance(content, str):
            changed["content"] = [{"type": "text", "text": content}]
        if self.arguments == "text" and "tool_calls" in changed:
            changed["tool_calls"] = [_with_text_arguments(call) for call in changed["tool_calls"]]
        return changed


_SHAPES = [
    Shape(contents=contents, arguments=arguments, missing=missing)
    for contents, arguments, missing in product(("given", "text", "parts"), ("objects", "text"), ("absent", "empty"))
]


def best_shape(template: ChatTemplate, conversations: Sequence[Conversation]) -> Shape:
    """Return the form with the fewest faults on a sample of the conversations; the given one if several are as good."""
    sample = list(_sample(conversations))
    best, fewest = _SHAPES[0], _num_faults(template, [_SHAPES[0].apply(one) for one in sample])
    tried = [[one.messages for one in sample]]
    for shape in _SHAPES[1:]:
        if not fewest:
            break
        shaped = [shape.apply(one) for one in sample]
        messages = [one.messages for one in shaped]
        if messages not in tried:
            tried.append(messages)
            faults = _num_faults(template, shaped)
            best, fewest = (shape, faults) if faults < fewest else (best, fewest)
    return best


def shows_python(conversation: Conversation, text: str) -> Any:
    """Return an object or list of a message that the text shows as Python writes it, or None."""
    for message in conversation.messages:
        calls = message.get("tool_calls") or []
        for value in (message.get("content"), *(call.get("function", call).get("arguments") for call in calls)):
            # JSON has no single quotes; without one both look the same.
            if isinstance(value, dict | list) and "'" in str(value) and str(value) in text:
                return value
    return None


def texts_of(content: Any) -> list[str]:
    """Return the texts of a content without white space around them; none for JSON objects of tools."""
    if isinstance(content, str):
        return [content.strip()]
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        return [part["text"].strip() for part in content]
    return []


def _sample(conversations: Sequence[Conversation]) -> Iterator[Conversation]:
    """Yield the first conversations of each kind whose form could matter."""
    left: dict[str, int] = dict.fromkeys(("any", "structured content", "calls", "no content"), NUM_TRIED)
    for conversation in conversations:
        kinds = _kinds(conversation)
        if any(left[kind] for kind in kinds):
            yield conversation
        for kind in kinds:
            left[kind] = max(0, left[kind] - 1)


def _kinds(conversation: Conversation) -> set[str]:
    kinds = {"any"}
    for message in conversation.messages:
        kinds |= {"structured content"} if isinstance(message.get("content"), dict | list) else set()
        kinds |= {"calls"} if "tool_calls" in message else set()
        kinds |= {"no content"} if "content" not in message else set()
    return kinds


def _num_faults(template: ChatTemplate, conversations: Sequence[Conversation]) -> int:
    """Count conversations that cannot be rendered, show Python's repr, or lose a content."""
    count = 0
    for conversation in conversations:
        try:
            text = template.render(conversation)
        except UsageError:
            count += 100
            continue
        count += 10 * (shows_python(conversation, text) is not None)
        count += sum(_is_lost(template, conversation, place, text) for place in range(len(conversation.messages)))
    return count


def _is_lost(template: ChatTemplate, conversation: Conversation, place: int, text: str) -> bool:
    """Return True if a content has no part in the text. It may stand there otherwise: templates cut thoughts off."""
    content = conversation.messages[place].get("content")
    if all(one in text for one in texts_of(content)):
        return False
    other: Any = STAND_IN if isinstance(content, str) else [{"type": "text", "text": STAND_IN}]
    messages = [*conversation.messages]
    messages[place] = {**messages[place], "content": other}
    try:
        return template.render(replace(conversation, messages=messages)) == text
    except UsageError:
        return False


def _as_text(content: Any) -> str:
    texts = [part["text"] for part in content] if texts_of(content) else None
    return json.dumps(content, ensure_ascii=False) if texts is None else "\n".join(texts)


def _with_text_arguments(call: Message) -> Message:
    function = call.get("function", call)
    if not isinstance(function.get("arguments"), dict | list):
        return call
    function = {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}
    return {**call, "function": function} if "function" in call else function
