"""Settings that may be ids on the hub."""

from __future__ import annotations

from collections.abc import Iterator

from gradselect.app.data import is_local
from gradselect.app.runtime import HubId

from .data_settings import RandomData
from .evaluation_settings import HUB_DATA, EvaluationSettings
from .schema import Recipe


def ids_of_recipe(recipe: Recipe, *, needs_data: bool = True) -> Iterator[HubId]:
    """Yield the model and the data of a recipe that are no files of this machine."""
    yield HubId("model.path", recipe.model.path, "model")
    if needs_data and not isinstance(recipe.data, RandomData) and not is_local(recipe.data.path):
        yield HubId("data.path", recipe.data.path, "dataset")


def ids_of_evaluation(settings: EvaluationSettings) -> Iterator[HubId]:
    """Yield the model and the data of an evaluation that are no files of this machine. lm-eval loads its own data."""
    yield HubId("model", str(settings.model), "model")
    if settings.task is not None:
        data = HUB_DATA[settings.task][0] if settings.data is None else str(settings.data)
        if not is_local(data):
            yield HubId("data", data, "dataset")
