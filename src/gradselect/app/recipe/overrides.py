"""Values on top of others: `key=value` words of a command over a file, a file over its base."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args

from pydantic.fields import FieldInfo

from gradselect import UsageError
from gradselect.app.data import check_template
from gradselect.methods import MAX_LINE, cut

from .data_settings import AbstractDataSettings, AbstractTokenData, FileData
from .plain_yaml import read_typed, read_yaml

RIVALS = (("steps", "epochs"), ("fraction", "count"), ("density", "budget"))
"""Keys of one section that say the same thing in two ways."""

RIVALS_OF = {"lift": (("density", "rank"),)}
"""Further ones, by the name of the method: the `rank` of others, such as `spt`, is not another way to say `density`."""

_FORMATS = {get_args(data.model_fields["format"].annotation)[0]: data for data in get_args(FileData)}


def _is_template(field: FieldInfo) -> bool:
    parts = [*field.metadata, *(part for option in get_args(field.annotation) for part in get_args(option))]
    return any(getattr(part, "func", None) is check_template for part in parts)


TEMPLATES = {name for data in _FORMATS.values() for name, field in data.model_fields.items() if _is_template(field)}
"""Keys whose values are templates. In YAML their braces, colons and # would have a meaning of their own."""


def recipe_formats() -> tuple[str, ...]:
    """Return the formats of data in files."""
    return tuple(_FORMATS)


def with_overrides(values: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Return the values of a file with `key=value` overrides on top.

    Raises:
        UsageError: an override is not of the form key=value.

    Example:
        >>> with_overrides({"run": {"epochs": 3}}, ["run.steps=20"])
        {'run': {'steps': 20}}
    """
    changes: dict[str, Any] = {}
    for override in overrides:
        changes = _merged(changes, parse_override(override), displacing=False)
    return merge(values, changes)


def parse_override(override: str) -> dict[str, Any]:
    """Return `{"optimizer": {"lr": "1e-4"}}` for "optimizer.lr=1e-4".

    The value is YAML, except that of a template, which is text as typed unless it begins with a quote sign:
    `data.prompt={instruction} {input}\\nAnswer:`.

    Raises:
        UsageError: the text is not of the form key=value.
    """
    key, equals, text = override.partition("=")
    if not (key and equals):
        raise UsageError(f"{override!r} is no override; write key=value, e.g. optimizer.lr=1e-4")
    is_text = key.rpartition(".")[2] in TEMPLATES and text.strip()[:1] not in ("", '"', "'") and text != "null"
    try:
        value: Any = read_typed(text) if is_text else read_yaml(text)
    except ValueError as error:
        raise UsageError(
            f"{override!r:.80}: the value is no valid YAML: {cut(str(error), MAX_LINE)}; a text with signs of YAML "
            f"needs quotes of its own: '{key}=\"...\"'"
        ) from None
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def merge(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of `over` on top of those of `under`, section by section.

    A section that names another method replaces the section below it: the keys of one method do not fit another. One
    that names another format of data keeps the keys that all formats share. A value displaces its rival below it:
    `steps` displaces `epochs`.
    """
    return _merged(under, over, displacing=True)


def _merged(under: Mapping[str, Any], over: Mapping[str, Any], *, displacing: bool) -> dict[str, Any]:
    merged = dict(under)
    if displacing:
        for key in _displaced(under, over):
            merged.pop(key, None)
    for key, value in over.items():
        below = merged.get(key)
        if isinstance(below, dict) and isinstance(value, dict) and not _is_another(below, value):
            merged[key] = _merged(below, value, displacing=displacing)
        else:
            merged[key] = value
    return merged


def _is_another(below: Mapping[str, Any], value: Mapping[str, Any]) -> bool:
    return "name" in below and "name" in value and below["name"] != value["name"]


def _displaced(under: Mapping[str, Any], over: Mapping[str, Any]) -> Iterator[str]:
    """Yield the keys of a section that have no place beside those of `over`."""
    given = {key for key, value in over.items() if value is not None}
    names = {name for name in (under.get("name"), over.get("name")) if isinstance(name, str)}
    for pair in (*RIVALS, *(pair for name in names for pair in RIVALS_OF.get(name, ()))):
        for key, rival in (pair, pair[::-1]):
            if key in given and rival in under and rival not in over:
                yield rival
    if "format" in given and under.get("format") not in (None, over["format"]):
        known = _FORMATS.get(over["format"]) if isinstance(over["format"], str) else None
        shared = {*AbstractDataSettings.model_fields, *AbstractTokenData.model_fields, "format"}
        if known is not None:
            yield from (key for key in under if key not in shared.intersection(known.model_fields))
