"""Lines that explain what is wrong with a user's values: the key, the value, and what to type."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from gradselect.usage import shortened

from .settings import Settings

MAX_LINE = 1000
"""Characters of an explanation."""

MAX_VALUE = 60
"""Characters of a value inside an explanation."""

ELSEWHERE = {
    "bipeft": "it is a search of layers and ranks: gradselect tune RECIPE --space adapters",
    "ether+": "write etherplus",
    "pafi": "write name=static salience=smallest_magnitude",
    "speft": "write name=static, and the salience to compare, e.g. salience=snip",
}
"""Advice on names of methods of the literature that are spelled otherwise here."""

MEANT = {"model": "path", "data": "path", "method": "name", "trainer": "name"}
"""Key of a section that a word in the place of the whole section most likely stands for."""

OF_ADAPTERS = ("alpha", "dropout", "rank", "targets")
"""Keys of a LoRA, which a mask on one has inside `adapter`."""


def explain(error: ValidationError, *, root: type[BaseModel]) -> Iterator[str]:
    """Yield one line for each problem of values for `root`: the key, the value, and what is allowed."""
    for problem in error.errors():
        yield cut(_explain_one(problem, root=root), MAX_LINE)


def brief(value: Any) -> str:
    """Return `value` as Python writes it, cut if it is long."""
    return cut(repr(value), MAX_VALUE)


def cut(text: str, limit: int) -> str:
    """Return the text, cut to `limit` characters."""
    return text if len(text) <= limit else f"{text[:limit]}..."


def _explain_one(problem: Mapping[str, Any], *, root: type[BaseModel]) -> str:
    model, keys = _follow(problem["loc"], root=root)
    # A key that is no identifier could break the line.
    key = (
        ".".join(part if part.isidentifier() or part.isdigit() else brief(part) for part in keys)
        or root.__name__.lower()
    )
    match problem["type"]:
        case "extra_forbidden":
            return _explain_unknown(key, keys[-1], problem["input"], model=model)
        case "missing":
            return f"{key}: missing; it has no default"
        case "union_tag_invalid":
            tag, known = problem["ctx"]["tag"], problem["ctx"]["expected_tags"].replace("'", "").split(", ")
            advice = ELSEWHERE.get(tag.lower()) if keys[-1] == "method" else None
            return (
                f"{key}.{_tag_key(problem)} = {brief(tag)}: unknown{f'; {advice}' if advice else _nearest(tag, known)}"
            )
        case "union_tag_not_found":
            return f"{key}.{_tag_key(problem)}: missing; it has no default"
        case "value_error":
            return f"{key}: {problem['ctx']['error']}"
        case "model_type" | "model_attributes_type":
            return _explain_section(key, keys[-1:], problem["input"], model=model)
    return f"{key} = {brief(problem['input'])}: {problem['msg'][0].lower()}{problem['msg'][1:]}"


def _explain_section(key: str, last: Sequence[str], value: Any, *, model: type[BaseModel] | None) -> str:
    """Say that a section has keys: `method=lora` is short for none of them."""
    name = last[0] if last else ""
    field = None if model is None else model.model_fields.get(name)
    settings = [] if field is None else _settings_in(field.annotation)
    said = f"{key} = {brief(value)}: input should be a section of keys"
    if name in MEANT and isinstance(value, str):
        return f"{said}; write {key}.{MEANT[name]}={_typed(value)}"
    known = f" (known: {', '.join(settings[0].model_fields)})" if len(settings) == 1 else ""
    return f"{said}; write {key}.KEY=VALUE{known}"


def _typed(value: Any) -> str:
    """Return a value as one writes it behind `key=`, without characters that a terminal obeys."""
    return shortened(value) if isinstance(value, str) else brief(value)


def _explain_unknown(key: str, name: str, value: Any, *, model: type[BaseModel] | None) -> str:
    if model is not None and issubclass(model, Settings) and name in model.renamed:
        today = f"{key.removesuffix(name)}{model.renamed[name]}"
        return f"{key} is now {today}: write {today}={_typed(value)}"
    known = list(model.model_fields) if model else []
    if name in OF_ADAPTERS and "adapter" in known:
        advice = f"write {key.removesuffix(name)}adapter={{{name}: {_typed(value)}}}"
        return f"{key}: unknown key; it is one of the adapter: {advice}"
    return f"{key}: unknown key{_nearest(name, known)}"


def _tag_key(problem: Mapping[str, Any]) -> str:
    """Return the key that selects the variant of a union: "name" or "format"."""
    return problem["ctx"]["discriminator"].strip("'")


def _follow(location: Sequence[str | int], *, root: type[BaseModel]) -> tuple[type[BaseModel] | None, list[str]]:
    """Return the settings class that holds the last key of a pydantic error, and the keys as the user wrote them.

    In a union pydantic puts the name of the variant between the keys. That name is no key of the recipe, and neither is
    the empty name of what is the only one of its kind.
    """
    model: type[BaseModel] | None = root
    options: dict[str, type[BaseModel]] = {}
    keys: list[str] = []
    for place, part in enumerate(map(str, location)):
        if part in options:
            model, options = options[part], {}
        elif not part or (model is None and not part.isdigit()):
            continue
        else:
            keys.append(part)
            if model is not None and part in model.model_fields and place + 1 < len(location):
                settings = _settings_in(model.model_fields[part].annotation)
                options = _variants(settings) if len(settings) > 1 else {}
                model = settings[0] if len(settings) == 1 else None
    return model, keys


def _settings_in(annotation: Any) -> list[type[BaseModel]]:
    """Return the settings classes of an annotation: the class itself, or those of a union."""
    options = get_args(annotation) or (annotation,)
    return [option for option in options if isinstance(option, type) and issubclass(option, BaseModel)]


def _variants(settings: Sequence[type[BaseModel]]) -> dict[str, type[BaseModel]]:
    """Return the settings classes by each name that selects them."""
    return {
        name: model
        for model in settings
        for field in ("name", "format")
        if field in model.model_fields
        for name in get_args(model.model_fields[field].annotation)
    }


def _nearest(word: str, known: Sequence[str]) -> str:
    """Return advice on what to type instead of `word`."""
    close = difflib.get_close_matches(word, known, n=1) or difflib.get_close_matches(word.lower(), known, n=1)
    listed = f" (known: {', '.join(known)})" if known else ""
    return f", did you mean {close[0]!r}?{listed}" if close else listed
