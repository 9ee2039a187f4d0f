"""Draft of a recipe: the format of the data from its columns, everything else from the recipes of the repository."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradselect.app.data import (
    Rows,
    check_local,
    ending_of,
    holds_messages,
    is_local,
    read_hub_rows,
    read_rows,
    whole_ending_of,
)
from gradselect.app.recipe import Recipe, as_typed, merge, parse_recipe, recipe_formats, with_overrides
from gradselect.integrations.reporting import FEW_LAYERS

from .formats import Guess, guess_format
from .rates import first_rate, size_of

SOURCE = "gradselect train MODEL DATA"
FEW_ROWS = 100
"""Fewer rows than this are all trained on."""
DEFAULTS: dict[str, Any] = {
    "method": {"name": "adagradselect", "fraction": 0.2},
    "run": {"epochs": 3, "batch_size": 8, "evaluate_every": 200, "save_every": 200},
}
METHOD_OF_FEW_LAYERS = {"name": "adagradselect", "fraction": 0.33, "blocks": "matrix"}
"""A third, because a fifth of six layers would be one."""
LINE = 68
"""Characters of a line of settings: with its heading it fits into 80 columns."""
VALIDATION = {"validation": 0.02, "validation_limit": 200}


@dataclass(frozen=True, kw_only=True)
class Draft:
    """A recipe, and how it came about.

    Args:
        recipe: the recipe.
        guess: format of the data. None: the user named it.
        written: what the draft and the user wrote, without the defaults of the schema.
        is_chat_model: True if the model is known to have a chat template.
        is_plain: True if no column of the first row holds messages.
        num_few_layers: layers of the model, if they are so few that matrices are selected. None: they are not.
        origin_of_rate: words on where the learning rate comes from. None: the user named it.
    """

    recipe: Recipe
    guess: Guess | None
    written: Mapping[str, Any]
    is_chat_model: bool
    is_plain: bool = True
    num_few_layers: int | None = None
    origin_of_rate: str | None = None

    def lines(self) -> Iterator[str]:
        """Yield lines for the user: the format, the recipe as words of a command, and what may be meant otherwise."""
        if self.guess is not None:
            yield f"format     {self.guess}"
        words = list(_words(self.written))
        for number, section in enumerate(self.written):
            part = [shlex.quote(word) for word in words if word.partition(".")[0] == section]
            for row, line in enumerate(_wrapped(part)):
                yield f"{'' if number or row else 'settings':<10} {line}"
        if self.origin_of_rate is not None:
            yield (
                f"note       optimizer.lr={self.recipe.optimizer.lr:g} to begin with, {self.origin_of_rate}; nothing "
                "matters more to the result: search it with `gradselect tune`"
            )
        if self.num_few_layers is not None:
            yield (
                f"note       method.blocks=matrix, as the model has {self.num_few_layers} layers: with few of them "
                "AdaGradSelect did better on matrices"
            )
        if self.is_chat_model and self.is_plain and not getattr(self.recipe.data, "as_chat", True):
            yield "note       the model has a chat template; a chat model needs data.as_chat=true"


def draft_recipe(model: str, data: str, overrides: Sequence[str] = ()) -> Draft:
    """Return a recipe that trains `model` on `data`, with `key=value` overrides on top.

    Args:
        model: folder of a checkpoint, or an id on the hub.
        data: a file, a folder, or the id of a data set on the hub.
        overrides: words such as "run.steps=20".

    Raises:
        UsageError: the data cannot be read, its columns fit several formats or none, or an override does not fit.

    Example:
        >>> draft_recipe("base", "train.jsonl", ["run.steps=20"]).recipe.run.steps  # doctest: +SKIP
        20
    """
    typed = with_overrides({}, overrides)
    given = typed.get("data")
    given = given if isinstance(given, dict) else {}
    rows = _read(data, given)
    if isinstance(limit := given.get("limit"), int) and limit > 0:  # others are for the recipe's checks
        rows = rows[:limit]
    guess = None
    if "format" not in given:
        guess = guess_format(rows, path=data, given=given, formats=recipe_formats())
    base: dict[str, Any] = {
        "model": {"path": model},
        "data": {
            "path": data,
            **({} if guess is None else guess.data),
            **(VALIDATION if len(rows) >= FEW_ROWS else {}),
        },
        **DEFAULTS,
    }
    if guess is not None and guess.trainer:
        base["trainer"] = dict(guess.trainer)
    base["run"] = {"output": f"runs/{_name_of(model)}-{_name_of(data)}", **base["run"]}
    if merge(base, typed)["data"].get("validation") is None:
        del base["run"]["evaluate_every"]
        base["data"].pop("validation_limit", None)
    saves = base["run"].pop("save_every")
    values = merge(base, typed)
    origin_of_rate, needs_rate = None, "lr" not in (values.get("optimizer") or {})
    # the recipe's checks see a stand-in
    stand_in = parse_recipe(merge(values, {"optimizer": {"lr": 1.0}} if needs_rate else {}), source=SOURCE)
    num_few_layers = None if {"name", "blocks"} & {*(typed.get("method") or ())} else _few_layers(stand_in)
    if num_few_layers is not None:
        values = merge({**base, "method": METHOD_OF_FEW_LAYERS}, typed)
    if stand_in.method.can_resume:
        values["run"].setdefault("save_every", saves)
    if needs_rate:
        rate, origin_of_rate = first_rate(stand_in)
        values = merge(values, {"optimizer": {"lr": rate}})
    recipe = parse_recipe(values, source=SOURCE)
    order = [name for name in ("model", "data", "trainer", "method", "optimizer", "run") if name in values]
    written = {name: values[name] for name in (*order, *(name for name in values if name not in order))}
    return Draft(
        recipe=recipe,
        guess=guess,
        written=written,
        is_chat_model=_has_chat_template(model),
        origin_of_rate=origin_of_rate,
        num_few_layers=num_few_layers,
        is_plain=not any(holds_messages(value) for row in rows[:1] for value in row.values()),
    )


def _few_layers(recipe: Recipe) -> int | None:
    num_layers = size_of(recipe, "num_hidden_layers")
    return num_layers if num_layers is not None and num_layers <= FEW_LAYERS else None


def _read(data: str, given: Mapping[str, Any]) -> Rows:
    """Read the rows whose columns decide, as training reads them."""
    split = str(given.get("split", "train"))
    if not is_local(data):
        subset = given.get("subset")
        return read_hub_rows(data, key="DATA", origin=data, subset=subset, split=split, subset_key="data.subset")[0]
    check_local(data, subset=given.get("subset"), split=split, default="train")
    columns = given.get("columns")
    columns = columns.split(",") if isinstance(columns, str) else columns
    return read_rows(data, columns=columns, rows_key=given.get("rows_key"), splits=(split,))


def _name_of(place: str) -> str:
    """Return a name for a folder of runs: the last part of a path or an id, without endings."""
    parts = [part for part in re.split(r"[/\\]", place.rstrip("/\\")) if part not in ("", ".", "..", "~")]
    name = parts[-1] if parts else "data"
    if ending_of(name) is not None:
        name = name[: -len(whole_ending_of(name))]
        # "gsm8k/train.jsonl" is GSM8K.
        name = parts[-2] if name in ("train", "data", "") and len(parts) > 1 else name
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "data"


def _has_chat_template(model: str) -> bool:
    """Return True if the files of the tokenizer on this machine hold a chat template."""
    from huggingface_hub import try_to_load_from_cache

    for name in ("chat_template.jinja", "tokenizer_config.json"):
        found = Path(model) / name if Path(model).is_dir() else try_to_load_from_cache(model, name)
        if not isinstance(found, str | Path) or not Path(found).is_file():
            continue
        try:
            if name.endswith(".jinja") or json.loads(Path(found).read_text("utf-8")).get("chat_template"):
                return True
        except (OSError, ValueError, AttributeError):
            continue
    return False


def _wrapped(words: Sequence[str]) -> Iterator[str]:
    """Yield lines of whole words."""
    line = ""
    for word in words:
        if line and len(line) + 1 + len(word) > LINE:
            yield line
            line = ""
        line = f"{line} {word}" if line else word
    yield line


def _words(values: Mapping[str, Any], above: str = "") -> Iterator[str]:
    """Yield the values as words of a command line."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _words(value, f"{above}{key}.")
        else:
            yield f"{above}{key}={_typed(value)}"


def _typed(value: Any) -> str:
    if isinstance(value, str):
        return as_typed(value)
    return f"{value:g}" if isinstance(value, float) else json.dumps(value)
