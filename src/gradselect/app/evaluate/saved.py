"""Evaluations on disk, and those that belong to a run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradselect.usage import UsageError

from .results import read_evaluation

RESULT = "result.json"


@dataclass(frozen=True, kw_only=True)
class SavedEvaluation:
    """Files of an evaluation.

    Args:
        folder: with its files.
        values: content of its `result.json`.
        items: one for each problem, text or row.
    """

    folder: Path
    values: Mapping[str, Any]
    items: Sequence[dict[str, Any]]


def find_evaluations(run: Path, named: Sequence[Path] = ()) -> tuple[list[SavedEvaluation], list[str]]:
    """Return the evaluations of a run, and a note on each that cannot be read.

    They are those in its folder, those beside it that name it as their model, and those in `named`.

    Raises:
        UsageError: one of `named` is missing or damaged.
    """
    evaluations = {folder.resolve(): _read(folder) for folder in named}
    inside = [*run.glob(f"*/{RESULT}"), *run.glob(f"*/*/{RESULT}")]
    beside = [file for file in run.resolve().parent.glob(f"*/{RESULT}") if _is_of(file, run)]
    notes = []
    for folder in sorted({file.parent for file in (*inside, *beside)}):
        if folder.resolve() in evaluations:
            continue
        try:
            evaluations[folder.resolve()] = _read(folder)
        except UsageError as error:
            notes.append(f"evaluation left out: {error}")
    return list(evaluations.values()), notes


def _read(folder: Path) -> SavedEvaluation:
    values = read_evaluation(folder)
    return SavedEvaluation(folder=folder, values=values, items=values.pop("items"))


def _is_of(file: Path, run: Path) -> bool:
    """Return True if the result is of the model in this run's folder."""
    try:
        model = json.loads(file.read_text("utf-8"))["settings"]["model"]
        return Path(model).resolve() == run.resolve()
    except (OSError, ValueError, KeyError, TypeError):
        return False
