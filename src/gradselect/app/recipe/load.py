"""Reading and writing of recipes: a YAML file and `key=value` arguments become a checked recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from gradselect import UsageError
from gradselect.methods import MAX_LINE, brief, cut, explain, todays_method

from .overrides import merge, with_overrides
from .plain_yaml import read_yaml
from .schema import Recipe

MAX_BYTES = 2**18
"""Far above the largest recipe or suite that makes sense."""

MAX_LINES = 20
"""Explanations in one error."""


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Return the recipe in the YAML file at `path`, with `key=value` overrides such as "optimizer.lr=1e-4" on top.

    An override displaces a rival in the file: `run.steps=20` takes the place of `epochs`.

    A recipe may name another one with `base:`, relative to its own folder, and then writes only what differs. Of
    several, as a list, later ones go over earlier ones.

    Raises:
        UsageError: the file is missing, the YAML is broken, or keys and values do not fit; one line for each problem.

    Example:
        >>> load_recipe("recipes/gsm8k.yaml", ["method.fraction=0.1", "run.output=runs/tenth"]).method.fraction
        0.1
    """
    values = read_values(Path(path), kind="recipe", sections=tuple(Recipe.model_fields))
    if "methods" in values and "method" not in values:
        raise UsageError(f"{path} is a suite, which compares methods, and no recipe; write: gradselect compare {path}")
    return parse_recipe(with_overrides(values, overrides), source=str(path))


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
    method, run = recipe.get("method"), recipe.get("run")
    changes = {"method": todays_method(method)} if isinstance(method, Mapping) else {}
    if isinstance(run, Mapping):
        changes["run"] = {"sample_answers": 0, **run}  # earlier versions had none
    return {**recipe, **changes}


def read_values(path: Path, *, kind: str, sections: Sequence[str], above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Return the values of a file, merged onto those of its bases, of which later ones go over earlier ones.

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
    bases = values.pop("base", None)
    below = dict[str, Any]()
    for base in () if bases is None else bases if isinstance(bases, list) else (bases,):
        found = read_values(path.parent / str(base), kind=kind, sections=sections, above=(*above, path))
        below = merge(below, found)
    return merge(below, values)


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
