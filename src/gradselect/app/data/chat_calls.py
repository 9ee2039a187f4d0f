"""Calls of tools: objects, whatever a file writes."""

from __future__ import annotations

from typing import Any

from gradselect import UsageError

from .json_values import parse_json, shown

Message = dict[str, Any]


def read_calls(message: Message) -> None:
    """Make the calls of a message objects in `tool_calls`, with objects as arguments.

    OpenAI's API writes arguments as JSON text; templates would put that text into quotes once more. Its older
    `function_call` becomes the only call of `tool_calls`.

    Raises:
        UsageError: a call is no object with a name, or its arguments are text but no JSON.
    """
    if "function_call" in message and not message.get("tool_calls"):
        call = _parsed(message.pop("function_call"), "function_call")
        message["tool_calls"] = [{"type": "function", "function": call}]
    if "tool_calls" not in message:
        return
    calls = _parsed(message["tool_calls"], "tool_calls")
    if not calls:
        del message["tool_calls"]
        return
    if not isinstance(calls, list):
        raise UsageError(f'"tool_calls": expected a list of calls, got {shown(calls)}; {_ADVICE}')
    message["tool_calls"] = [_call(call) for call in calls]


def spoken_calls(value: Any) -> Message:
    """Return the message of ShareGPT's role `function_call`, whose text holds one call or a list of them.

    Raises:
        UsageError: the text is no JSON of calls.
    """
    calls = parse_json(value) if isinstance(value, str) else value
    calls = [calls] if isinstance(calls, dict) else calls
    if not (isinstance(calls, list) and calls and all(isinstance(call, dict) and "name" in call for call in calls)):
        raise UsageError(
            f"the text of a function call is {shown(value)}; expected JSON like "
            '{"name": "get_weather", "arguments": {"place": "Oslo"}}; write that, or take it as the assistant\'s text: '
            'data.roles={"function_call": "assistant"}'
        )
    return {"role": "assistant", "tool_calls": [{"type": "function", "function": call} for call in calls]}


_ADVICE = (
    'a call is {"type": "function", "function": {"name": "...", "arguments": {...}}}; correct it, or write '
    "data.ignore=[tool_calls] to leave calls out"
)


def _call(call: Any) -> Message:
    """Return a call whose arguments are an object."""
    call = parse_json(call) if isinstance(call, str) else call
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise UsageError(f'"tool_calls" holds {shown(call)}; {_ADVICE}')
    if isinstance(function.get("arguments"), str):
        text = function["arguments"]
        arguments = parse_json(text) if text.strip() else {}
        if not isinstance(arguments, dict):
            raise UsageError(
                f'"arguments" of the call of {function["name"]!r} are no JSON object: {shown(text)}; {_ADVICE}'
            )
        function = {**function, "arguments": arguments}
    return {**call, "function": function} if "function" in call else function


def _parsed(value: Any, key: str) -> Any:
    if not isinstance(value, str) or not value.strip():
        return value or None
    parsed = parse_json(value)
    if parsed is None:
        raise UsageError(f'"{key}" is text but no JSON: {shown(value)}; {_ADVICE}')
    return parsed
