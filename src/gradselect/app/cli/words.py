"""The first words of a command: a recipe, or a model and data."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gradselect.usage import UsageError

from .hub import check_reachable

if TYPE_CHECKING:
    from gradselect.app.recipe import Recipe

METAVAR = "RECIPE | MODEL DATA"
HELP = "Recipe, a YAML file (see recipes/). Or a model and data, each a path or an id on the hub, and no recipe."
_OVERRIDE = re.compile(r"[A-Za-z_]\w*(\.[^=/]+)*=")


def read_words(
    first: str, words: Sequence[str], *, command: str, say: Callable[[str], None], needs_data: bool = True
) -> Recipe:
    """Return the recipe that a command names, after a look at the hub. A drafted recipe is shown.

    Args:
        first: first word: a recipe or a model.
        words: further words: `key=value`, after a model the data.
        command: for errors: "gradselect train".
        say: shows a line to the user.
        needs_data: check that data on the hub can be reached.

    Raises:
        UsageError: the words name neither, or the recipe, the model or the data cannot be used.
    """
    from gradselect.app.recipe import ids_of_recipe, load_recipe

    if _is_recipe(first, words, command=command):
        for word in words:
            if not _is_override(word) and _exists(Path(word)):
                raise UsageError(f"{word!r} stands behind a recipe, which names its own data; write data.path={word}")
        recipe = load_recipe(first, words)
    else:
        recipe = _drafted(first, words, command=command, say=say)
    check_reachable(ids_of_recipe(recipe, needs_data=needs_data), say=say)
    return recipe


def _drafted(model: str, words: Sequence[str], *, command: str, say: Callable[[str], None]) -> Recipe:
    from gradselect.app.draft import draft_recipe
    from gradselect.app.runtime import HubId

    data = words[0] if words else None
    if data is None or _is_override(data):
        raise UsageError(f"{model} is a model; name the data to train it on as well: {command} {model} DATA.jsonl")
    for word in words[1:]:
        if not _is_override(word):
            raise UsageError(f"{word!r} is no override; after MODEL and DATA write key=value, e.g. run.steps=100")
    check_reachable([HubId("MODEL", model, "model")], say=say)
    draft = draft_recipe(model, data, words[1:])
    for line in draft.lines():
        say(line)
    if command == "gradselect train":
        say(f"recipe     will be in {draft.recipe.run.output}/recipe.yaml, with every default")
    return draft.recipe


def _is_recipe(first: str, words: Sequence[str], *, command: str) -> bool:
    """Tell a recipe from a model.

    Raises:
        UsageError: it is neither; says what to type.
    """
    from gradselect.app.data import ending_of

    path, usage = Path(first), f"{command} RECIPE, or {command} MODEL DATA"
    if _is_override(first):
        raise UsageError(f"{first!r} stands where a recipe or a model is expected: {usage}")
    if path.suffix in (".yaml", ".yml"):
        return True
    if _exists(path) and path.is_dir():
        if any((path / name).is_file() for name in ("config.json", "adapter_config.json")):
            return False
        if (path / "recipe.yaml").is_file():
            raise UsageError(
                f"{first} is the folder of a run that has no model yet; to go on with it: {command} {path}/recipe.yaml "
                "--resume"
            )
        raise UsageError(f"{first} is a folder without config.json, so no model, and no recipe: {usage}")
    if _exists(path):
        if _is_configuration(path):
            return False
        if ending_of(path) is not None:
            raise UsageError(f"{first} is data; the model comes first: {command} MODEL {first}")
        return True
    if words and not _is_override(words[0]):
        return False
    raise UsageError(
        f"{first}: no such recipe here. If it is a model on the hub, name the data as well: {command} {first} DATA"
    )


def _is_configuration(path: Path) -> bool:
    if path.suffix != ".json":
        return False
    try:
        return "model_type" in json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, TypeError, RecursionError):
        return False


def _is_override(word: str) -> bool:
    return _OVERRIDE.match(word) is not None and not _exists(Path(word))


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # the name is too long
        return False
