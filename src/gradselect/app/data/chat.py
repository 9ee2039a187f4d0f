"""Conversations, and checks of their messages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gradselect import UsageError


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """One conversation, as a chat template reads it.

    Args:
        messages: objects with a role, content and so on.
    """

    messages: list[dict[str, Any]]


def check_messages(messages: Any) -> list[dict[str, str]]:
    """Return role and content of each message of a conversation that ends with an answer of the assistant.

    Raises:
        UsageError: it is no such conversation.
    """
    well_formed = isinstance(messages, list) and all(
        isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)
        for message in messages
    )
    if not well_formed:
        raise UsageError(
            f'expected a list of messages like {{"role": "user", "content": "..."}}, got {str(messages)[:60]!r}'
        )
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise UsageError("a conversation must end with a message of the role 'assistant' that answers another one")
    return [{"role": message["role"], "content": message["content"]} for message in messages]
