"""Roles of messages, under the names that public data sets have for them."""

from __future__ import annotations

from collections.abc import Mapping

USUAL_ROLES = ("system", "developer", "user", "assistant", "tool")
"""Roles that chat templates know."""

CALL = "function_call"
"""Role of a message that is a call of a tool, as text."""

OTHER_NAMES = {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "ai": "assistant",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "tool_call": CALL,
    "function_call": CALL,
}
"""Roles by the names that ShareGPT files have for them."""


def sharegpt_role(name: str, roles: Mapping[str, str]) -> str | None:
    """Return the role that a ShareGPT file means by `name`, or None if the name is unknown.

    Example:
        >>> sharegpt_role("gpt", {}), sharegpt_role("Mensch", {"Mensch": "user"})
        ('assistant', 'user')
    """
    lower = name.lower()
    return roles.get(name) or (lower if lower in USUAL_ROLES else OTHER_NAMES.get(lower))


def known_names() -> str:
    """Return all names that `sharegpt_role` knows, for an error."""
    return ", ".join(sorted({*USUAL_ROLES, *OTHER_NAMES}))
