"""Reading and writing of recipes: a YAML file and `key=value` arguments become a checked recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from gradselect import UsageError

from .explanations import MAX_LINE, brief, cut, explain
from .methods import todays_method
from .plain_yaml import read_typed, read_yaml
from .schema import Recipe

MAX_BYTES = 2**18
"""Far above the largest recipe or suite that makes sense."""

TEMPLATES = ("prompt", "completion", "text", "text_pair")
"""Keys whose values are templates. In YAML their braces, colons and # would have a meaning of their own."""

MAX_LINES = 20
"""Explanations in one error."""


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Return the recipe in the YAML file at `path`, with `key=value` overrides such as "optimizer.lr=1e-4" on top.

    A recipe may name another one with `base:`, relative to its own folder, and then writes only what differs.

    Raises:
        UsageError: the file is missing, the YAML is broken, or keys and values do not fit; one line for each problem.

    Example:
        >>> load_recipe("recipes/gsm8k.yaml", ["method.fraction=0.1", "run.output=runs/tenth"]).method.fraction
        0.1
    """
    changes: dict[str, Any] = {}
    for override in overrides:
        changes = merge(changes, parse_override(override))
    values = read_values(Path(path), kind="recipe", sections=tuple(Recipe.model_fields))
    return parse_recipe(merge(values, changes), source=str(path))


def parse_recipe(values: Mapping[str, Any], *, source: str) -> Recipe:
    """Return the recipe made of plain `values`. Errors name `source`.

    Raises:
        UsageError: has one line for each wrong value.
    """
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        lines = [f"  {line}" for line in explain(error, root=Recipe)]
        more = [f"  and {len(lines) - MAX_LINES:,} more"] if len(lines) > MAX_LINES else []
        raise UsageError("\n".join([f"{source} is no valid recipe:", *lines[:MAX_LINES], *more])) from None


def dump_recipe(recipe: Recipe) -> str:
    """Return the recipe as YAML with every default written out. `load_recipe` reads it back."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def todays_recipe(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return the recipe in a run file, which an earlier version may have written, with today's keys."""
    method = recipe.get("method")
    return {**recipe, "method": todays_method(method)} if isinstance(method, Mapping) else dict(recipe)


def read_values(path: Path, *, kind: str, sections: Sequence[str], above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Return the values of a file, merged onto those of its base.

    Args:
        path: path of the YAML file.
        kind: kind of the file for errors, e.g. "recipe".
        sections: sections that it may hold, for errors.
        above: files whose bases led to this one.

    Raises:
        UsageError: the file is missing, the YAML is broken, or the file is its own base.
    """
    if path.resolve() in map(Path.resolve, above):
        raise UsageError(f"{path} is its own base")
    if not _is_file(path):
        named_by = f" (the base of {above[-1]})" if above else ""
        raise UsageError(f"{cut(str(path), MAX_LINE)}: no such {kind}{named_by}")
    values = _read_mapping(path, sections=sections)
    base = values.pop("base", None)
    if base is None:
        return values
    below = read_values(path.parent / str(base), kind=kind, sections=sections, above=(*above, path))
    return merge(below, values)


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

    A section that names another method replaces the section below it: the keys of one method do not fit another.
    """
    merged = dict(under)
    for key, value in over.items():
        below = merged.get(key)
        if isinstance(below, dict) and isinstance(value, dict) and not _is_another(below, value):
            merged[key] = merge(below, value)
        else:
            merged[key] = value
    return merged


def _is_another(below: Mapping[str, Any], value: Mapping[str, Any]) -> bool:
    return "name" in below and "name" in value and below["name"] != value["name"]


def _read_mapping(path: Path, *, sections: Sequence[str]) -> dict[str, Any]:
    try:
        values = read_yaml(_read_text(path))
    # A UnicodeDecodeError is a ValueError.
    except ValueError as error:
        raise UsageError(f"{path} is no valid YAML: {cut(str(error), MAX_LINE)}") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise UsageError(f"{path}: expected the sections {', '.join(sections)}, got {brief(values)}")
    return values


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # the name is too long
        return False


def _read_text(path: Path) -> str:
    with path.open("rb") as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise ValueError(f"it is larger than the limit of {MAX_BYTES:,} bytes")
    return content.decode("utf-8-sig")
