"""The recipe that a model was trained with."""

from __future__ import annotations

import logging
import shlex
from pathlib import Path
from typing import Any

from gradselect.app.data import Row, columns_of, render
from gradselect.app.recipe import EvaluationSettings, as_typed
from gradselect.app.runtime import RunFolder
from gradselect.files import read_sealed
from gradselect.usage import UsageError

_log = logging.getLogger(__name__)


def data_of_recipe(model: str | Path, *, format: str) -> dict[str, Any]:
    """Return section `data` of the recipe if `gradselect train` trained this model on this format; else {}."""
    data = _run_of(model)["recipe"]["data"]
    return data if data.get("format") == format else {}


def labels_of_run(model: str | Path) -> list[str] | None:
    """Return the names of a classifier's outputs if `gradselect train` left its adapter here."""
    return (_run_of(model).get("saved") or {}).get("labels")


def _run_of(model: str | Path) -> dict[str, Any]:
    folder = RunFolder(Path(model))
    if not folder.run_file.is_file() and folder.root.name == "adapter":
        folder = RunFolder(folder.root.parent)
    file = folder.run_file
    return read_sealed(file, needed=["recipe"]) if file.is_file() else {"recipe": {"data": {}}}


def say_other_prompt(settings: EvaluationSettings, prompt: str, row: Row) -> None:
    """Say that the model was trained on other prompts than the default one, if nobody named one.

    Args:
        settings: of the evaluation.
        prompt: the template in use.
        row: the first row, with the question under all of its names.
    """
    if settings.prompt is not None:
        return
    if not settings.as_chat and data_of_recipe(settings.model, format="chat"):
        _log.warning("the model was trained on conversations; to ask it through its chat template, give --as-chat")
    data = data_of_recipe(settings.model, format="prompt-completion")
    as_chat = bool(data.get("as_chat"))
    if data and not (as_chat == settings.as_chat and _asks_the_same(data["prompt"], prompt, row)):
        _log.warning(
            "the prompt is %r, which the model was not trained on; to ask as in its training, give --prompt %s%s",
            *(prompt, shlex.quote(as_typed(data["prompt"])), " --as-chat" if as_chat else ""),
        )


def say_other_text(settings: EvaluationSettings, template: str | None, row: Row) -> None:
    """Say that the model was trained on whole texts of another template, if no template is named.

    Args:
        settings: of the evaluation.
        template: the template of whole texts in use. None: the loss is that of completions.
        row: the first row.
    """
    if (settings.text, settings.prompt, settings.completion) != (None, None, None):
        return
    known = data_of_recipe(settings.model, format="text").get("text")
    if known not in (None, template) and {*columns_of(known)} <= {*row}:
        _log.warning(
            "the model was trained on whole texts by another template; for the loss of such texts give --text %s",
            shlex.quote(as_typed(known)),
        )


def _asks_the_same(template: str, other: str, row: Row) -> bool:
    """Return True if both templates write the same text: columns may have several names."""
    if any(column not in row for column in columns_of(template)):
        return False
    try:
        return render(template, row) == render(other, row)
    except UsageError:  # a cell that is refused later, with its line
        return True
