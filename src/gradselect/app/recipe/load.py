"""From a YAML file and `key=value` arguments to a checked recipe; a complaint is one line that says what to type."""

from __future__ import annotations

import difflib
import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from gradselect import UsageError
from gradselect.usage import printable

from .schema import Recipe

MOST_BYTES = 2**18
MOST_LEVELS = 32
MOST_VALUES = 20_000
"""Far above the largest recipe or suite that makes sense, far below what a machine notices."""

MOST_COMPLAINTS = 20
LONGEST_COMPLAINT = 1000
LONGEST_VALUE = 60

_UNWRITABLE = re.compile("[\0-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")
"""Control characters, and halves of a surrogate pair: no file can have them in its name, or be written with them."""


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in the YAML file at `path`, with `key=value` overrides such as "optimizer.lr=1e-4" on top.

    A recipe may name another one with `base:`, relative to its own folder, and then writes only what differs.

    Raises:
        UsageError: no such file, broken YAML, or keys and values that do not fit, one line for each.

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
    """The recipe made of plain `values`; `source` names them in errors.

    Raises:
        UsageError: with one line for each value that is wrong.
    """
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        lines = [f"  {line}" for line in explain(error, root=Recipe)]
        more = [f"  and {len(lines) - MOST_COMPLAINTS:,} more"] if len(lines) > MOST_COMPLAINTS else []
        raise UsageError("\n".join([f"{source} is no valid recipe:", *lines[:MOST_COMPLAINTS], *more])) from None


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML with every default written out; `load_recipe` reads it back."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def explain(error: ValidationError, *, root: type[BaseModel]) -> Iterator[str]:
    """One line for each problem of values meant for `root`: the key, the value got, what is allowed."""
    for problem in error.errors():
        yield _cut(_explain_one(problem, root=root), LONGEST_COMPLAINT)


def _explain_one(problem: Mapping[str, Any], *, root: type[BaseModel]) -> str:
    model, keys = _follow(problem["loc"], root=root)
    # A key that is no word could break the line.
    key = (
        ".".join(part if part.isidentifier() or part.isdigit() else _brief(part) for part in keys)
        or root.__name__.lower()
    )
    match problem["type"]:
        case "extra_forbidden":
            return f"{key}: unknown key{_nearest(keys[-1], list(model.model_fields) if model else [])}"
        case "missing":
            return f"{key}: missing; it has no default"
        case "union_tag_invalid":
            tag, known = problem["ctx"]["tag"], problem["ctx"]["expected_tags"].replace("'", "").split(", ")
            return (
                f"{key}.{problem['ctx']['discriminator'].strip(chr(39))} = {_brief(tag)}: unknown{_nearest(tag, known)}"
            )
        case "union_tag_not_found":
            return f"{key}.{problem['ctx']['discriminator'].strip(chr(39))}: missing; it has no default"
        case "value_error":
            return f"{key}: {problem['ctx']['error']}"
    return f"{key} = {_brief(problem['input'])}: {problem['msg'][0].lower()}{problem['msg'][1:]}"


def _follow(location: Sequence[str | int], *, root: type[BaseModel]) -> tuple[type[BaseModel] | None, list[str]]:
    """The settings class that holds the last key of a pydantic error, and the keys as the user wrote them.

    In a union pydantic puts the name of the variant between the keys; that is no key of the recipe.
    """
    model: type[BaseModel] | None = root
    options: dict[str, type[BaseModel]] = {}
    keys: list[str] = []
    for place, part in enumerate(map(str, location)):
        if part in options:
            model, options = options[part], {}
        elif model is None and not part.isdigit():
            continue
        else:
            keys.append(part)
            if model is not None and part in model.model_fields and place + 1 < len(location):
                settings = _settings_in(model.model_fields[part].annotation)
                options = _variants(settings) if len(settings) > 1 else {}
                model = settings[0] if len(settings) == 1 else None
    return model, keys


def _settings_in(annotation: Any) -> list[type[BaseModel]]:
    """The settings classes of an annotation: itself, or those of a union."""
    options = get_args(annotation) or (annotation,)
    return [option for option in options if isinstance(option, type) and issubclass(option, BaseModel)]


def _variants(settings: Sequence[type[BaseModel]]) -> dict[str, type[BaseModel]]:
    """The settings classes, by each of the names that choose them."""
    return {
        name: model
        for model in settings
        for field in ("name", "format")
        if field in model.model_fields
        for name in get_args(model.model_fields[field].annotation)
    }


def _brief(value: Any) -> str:
    """`value` as Python writes it, cut where it is long."""
    return _cut(repr(value), LONGEST_VALUE)


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[:limit]}..."


def _nearest(word: str, known: Sequence[str]) -> str:
    """What to type instead of `word`."""
    close = difflib.get_close_matches(word, known, n=1)
    listed = f" (known: {', '.join(known)})" if known else ""
    return f", did you mean {close[0]!r}?{listed}" if close else listed


class _PlainLoader(yaml.SafeLoader):
    """YAML of plain values only: no tags of objects, no key twice, nothing that grows beyond its text.

    PyYAML would take the last of equal keys in silence; and an alias of an alias of an alias, which costs it nothing,
    has a billion parts for whoever looks at the values ("billion laughs").
    """

    _num_levels = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self._num_levels == MOST_LEVELS:
            raise yaml.MarkedYAMLError(problem=f"more than {MOST_LEVELS} levels deep", problem_mark=self.get_mark())
        self._num_levels += 1
        node = super().compose_node(parent, index)
        self._num_levels -= 1
        return node

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None:
            _num_nodes(node, known={}, depth=0)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            # One that cannot be hashed is what the parent complains of.
            if isinstance(key, Hashable):
                if key in seen:
                    raise yaml.MarkedYAMLError(
                        problem=f"the key {key!r:.60} stands twice", problem_mark=key_node.start_mark
                    )
                seen.add(key)
        return super().construct_mapping(node, deep=deep)

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> str:
        text = super().construct_scalar(node)
        if _UNWRITABLE.search(text):
            raise yaml.MarkedYAMLError(
                problem=f"{text!r:.60} holds a character that cannot be written", problem_mark=node.start_mark
            )
        return text


def _num_nodes(node: yaml.Node, *, known: dict[int, int], depth: int) -> int:
    """Values in a document with every alias written out; None stands for one that is being counted."""
    if depth > MOST_LEVELS:
        raise yaml.MarkedYAMLError(
            problem=f"more than {MOST_LEVELS} levels deep, or an alias of itself", problem_mark=node.start_mark
        )
    if id(node) not in known:
        parts = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
        children = [] if isinstance(node, yaml.ScalarNode) else parts
        known[id(node)] = 1 + sum(_num_nodes(child, known=known, depth=depth + 1) for child in children)
    if known[id(node)] > MOST_VALUES:
        raise yaml.MarkedYAMLError(
            problem=f"more than {MOST_VALUES:,} values with its aliases written out", problem_mark=node.start_mark
        )
    return known[id(node)]


def _read_yaml(text: str) -> Any:
    """The values in a YAML text.

    Raises:
        ValueError: what is wrong, in one line.
    """
    try:
        return yaml.load(text, Loader=_PlainLoader)
    except RecursionError:
        raise ValueError(f"more than {MOST_LEVELS} levels deep") from None
    # PyYAML lets through what Python says of a value that only looks like a date (2024-13-45) or a number.
    except (yaml.YAMLError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(printable(" ".join(str(error).split()))) from None


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long
        return False


def _read_text(path: Path) -> str:
    with path.open("rb") as file:
        content = file.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise ValueError(f"it has more than the {MOST_BYTES:,} bytes of the largest sensible one")
    return content.decode("utf-8-sig")


def read_values(path: Path, *, kind: str, sections: Sequence[str], above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The values of a file on top of those of its base.

    Args:
        path: of the YAML file.
        kind: what it should be, for errors, e.g. "recipe".
        sections: what it may hold, for errors.
        above: the files whose bases led here.

    Raises:
        UsageError: no such file, broken YAML, or a file that is its own base.
    """
    if path.resolve() in map(Path.resolve, above):
        raise UsageError(f"{path} is its own base")
    if not _is_file(path):
        raise UsageError(
            f"{_cut(str(path), LONGEST_COMPLAINT)}: no such {kind}" + (f" (the base of {above[-1]})" if above else "")
        )
    try:
        values = _read_yaml(_read_text(path))
    # A UnicodeDecodeError is a ValueError.
    except ValueError as error:
        raise UsageError(f"{path} is no valid YAML: {_cut(str(error), LONGEST_COMPLAINT)}") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise UsageError(f"{path}: expected the sections {', '.join(sections)}, got {_brief(values)}")
    base = values.pop("base", None)
    if base is None:
        return values
    below = read_values(path.parent / str(base), kind=kind, sections=sections, above=(*above, path))
    return merge(below, values)


def parse_override(override: str) -> dict[str, Any]:
    """`{"optimizer": {"lr": "1e-4"}}` for "optimizer.lr=1e-4".

    Raises:
        UsageError: it is not of the form key=value.
    """
    key, equals, text = override.partition("=")
    if not (key and equals):
        raise UsageError(f"{override!r} is no override; write key=value, e.g. optimizer.lr=1e-4")
    try:
        value = _read_yaml(text)
    except ValueError as error:
        raise UsageError(
            f"{override!r:.80}: the value is no valid YAML: {_cut(str(error), LONGEST_COMPLAINT)}"
        ) from None
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def merge(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Values of `over` on those of `under`, section by section.

    A section that names another method replaces the one below, for the keys of one method do not fit another.
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
