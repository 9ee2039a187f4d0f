"""Protocol: the settings that runs must share for one table, and their fingerprint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ValidationError

from gradselect import UsageError
from gradselect.app.data import VALIDATION_SPLITS, data_fingerprint, is_pattern
from gradselect.app.recipe import HUB_DATA, RandomData, Recipe, todays_method
from gradselect.files import sha256
from gradselect.usage import find_differences, first_line

from .suite import Evaluation, Suite

FREE = {
    "model": {"path", "revision", "trust_pickle"},
    "data": {"path", "validation"},
    "optimizer": {"lr"},
    "run": {
        "output",
        "seed",
        "device",
        "log_every",
        "save_every",
        "keep_checkpoints",
        "report_to",
        "sample_answers",
        "max_skipped_steps",
    },
}
"""Keys of a recipe in which runs of one protocol may differ. Of paths the contents are compared."""

ADDED = {"rows_key", "tools", "roles", "ignore"}
"""Keys that earlier versions did not have. At their default they are no part of a protocol, so that old results fit."""

MODEL_FILES = ("*.safetensors", "*.bin", "*config.json", "tokenizer*", "*.model", "vocab*", "merges.txt", "*.jinja")
"""Files that decide what a model computes."""

OFFLINE, ONLINE = b'"local_files_only": true', b'"local_files_only": false'
"""What transformers writes into tokenizer_config.json when it saves with and without HF_HUB_OFFLINE."""


def protocol_settings(suite: Suite) -> dict[str, Any]:
    """Return plain values of everything that the suite's methods share, with fingerprints in place of paths.

    Raises:
        UsageError: a model or data set is neither on the disk nor on the hub.
    """
    forgetting = {name: _evaluation_settings(entry) for name, entry in suite.forgetting.items()}
    # Without a search of its own there is no key, as in protocols of earlier versions.
    search = {} if suite.search is None else {"search": suite.search.model_dump(mode="json")}
    return {
        **_length_settings(suite),
        "evaluations": {name: _evaluation_settings(entry) for name, entry in suite.evaluations.items()},
        "forgetting": forgetting.get("", forgetting or None),
        "rank_by": suite.rank_by,
        **search,
    }


def protocol_hash(settings: Mapping[str, Any]) -> str:
    """SHA-256 of the settings; the order of keys does not matter."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def protocol_differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """Return one line for each difference, e.g. "recipe.run.steps: 300 there, 100 here"."""
    return [f"{key}: {old!r} there, {new!r} here" for key, old, new in find_differences(there, here)]


def has_settings(method: BaseModel, settings: Mapping[str, Any]) -> bool:
    """True if the method has settings that were written earlier. Keys of newer versions count with their defaults."""
    try:
        return type(method).model_validate(todays_method(settings)) == method
    except ValidationError:
        return False


def place_fingerprint(
    place: str | Path, *, kind: Literal["model", "dataset"], revision: str | None = None, split: str = "train"
) -> str:
    """SHA-256 of a file or of the files of a model or data set; for an id on the hub, the id and its commit.

    `split` says which files of a folder of data are meant.

    Raises:
        UsageError: there is neither.
    """
    path = Path(place)
    if kind == "dataset" and (path.exists() or is_pattern(path)):
        return data_fingerprint(path, (split,))
    if path.is_file():
        return sha256(path)
    if path.is_dir():
        files = sorted({file for pattern in MODEL_FILES for file in path.glob(pattern)})
        lines = "".join(f"{file.name} {_model_file_digest(file)}\n" for file in files)
        return hashlib.sha256(lines.encode()).hexdigest()
    return f"{place}@{_hub_commit(str(place), kind=kind, revision=revision)}"


def _model_file_digest(file: Path) -> str:
    """SHA-256 of a file of a model. A tokenizer is the same, whether it was saved offline or not."""
    if file.name != "tokenizer_config.json":
        return sha256(file)
    return hashlib.sha256(file.read_bytes().replace(OFFLINE, ONLINE)).hexdigest()


def local_folder(place: str, *, revision: str | None) -> Path:
    """Return the folder of a model that was loaded before, on the disk or in the cache of the hub."""
    from huggingface_hub import snapshot_download

    path = Path(place)
    return path if path.is_dir() else Path(snapshot_download(place, revision=revision, local_files_only=True))


def _length_settings(suite: Suite) -> dict[str, Any]:
    """Return the recipe's settings. A budget takes the place of its number of steps, which differs among methods.

    Memory is no part: it decides which methods run, and changes none of them.
    """
    recipe, budget = _recipe_settings(suite.recipe), suite.budget
    if budget is None or not budget.limits_steps:
        return {"recipe": recipe}
    length = {key: recipe["run"].pop(key) for key in ("steps", "epochs")}
    if budget.time_of is None:
        return {"recipe": recipe, "budget": {"seconds": budget.seconds, "flops": budget.flops}}
    return {"recipe": recipe, "budget": {"time_of": budget.time_of, "share": budget.share, "of": length}}


def _recipe_settings(recipe: Recipe) -> dict[str, Any]:
    values = recipe.model_dump(mode="json", exclude={"method": True, **FREE})
    data = recipe.data
    model = place_fingerprint(recipe.model.path, kind="model", revision=recipe.model.revision)
    values["model"]["fingerprint"] = model
    values["data"] = _without_unset(values["data"])
    if not isinstance(data, RandomData):
        values["data"]["fingerprint"] = place_fingerprint(data.path, kind="dataset", split=data.split)
        if isinstance(data.validation, str) and Path(data.validation).exists():
            values["data"]["validation"] = data_fingerprint(data.validation, VALIDATION_SPLITS)
        elif isinstance(data.validation, str) and Path(data.path).is_dir():
            values["data"]["validation"] = data_fingerprint(data.path, (data.validation,), needs_split=True)
        else:
            values["data"]["validation"] = data.validation
    return values


def _evaluation_settings(evaluation: Evaluation) -> dict[str, Any]:
    # Results without the key `metric` stay of the same protocol.
    free = {"data", "device", "batch_size"} | ({"metric"} if evaluation.metric is None else set())
    values = _without_unset(evaluation.model_dump(mode="json", exclude=free))
    data = HUB_DATA[evaluation.task][0] if evaluation.data is None else evaluation.data
    return {**values, "fingerprint": place_fingerprint(data, kind="dataset", split=evaluation.split)}


def _without_unset(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in ADDED or value is not None}


def _hub_commit(name: str, *, kind: Literal["model", "dataset"], revision: str | None) -> str:
    """Return the commit of `revision`: from the hub, or without a network from its cache."""
    from huggingface_hub import HfApi, snapshot_download

    looked_for = []
    try:
        return str(HfApi().repo_info(name, repo_type=kind, revision=revision).sha)
    except (OSError, ValueError) as error:
        looked_for.append(first_line(error))
    try:
        folder = snapshot_download(name, repo_type=kind, revision=revision, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{name!r} is neither a file or folder here (paths are relative to the folder the command runs in) nor a "
            f"{kind} on the hub ({looked_for[0]}) nor in its cache ({first_line(error)})"
        ) from None
    return Path(folder).name
