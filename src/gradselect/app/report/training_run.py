"""One training run, as a report shows it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from gradselect.app.evaluate import SavedEvaluation
from gradselect.app.recipe import draws_answers
from gradselect.app.results import FinishedRun, MaskSelection, RunRecord
from gradselect.core import BlockHistory, EntryHistory

REWARD_FIGURES = {
    "reward": "Reward",
    "rewards/accuracies": "Share of pairs with the better answer preferred",
    "rewards/margins": "Margin of the better answer",
    "kl": "Divergence from the reference",
    "completions/mean_length": "Tokens of an answer",
}
"""Figures of the trainers of preferences and rewards, as TRL logs them, and their titles."""

Points = Sequence[tuple[int, float]]
"""Steps and values."""


@dataclass(frozen=True, kw_only=True)
class TrainingRun:
    """A run from the files that it left, finished or not.

    Args:
        folder: of the run.
        maker: program that wrote it: "gradselect train", "Trainer" or "records" if there are only those.
        method: settings of the method, its name under "name"; empty if they are unknown.
        num_steps: steps that the files tell of.
        planned_steps: steps that were asked for; None if that is unknown.
        history: what the Trainer logged, in order.
        selection: blocks or entries by step; None for a method that selects none.
        record: `run.json` of `gradselect train`.
        evaluations: of the trained model.
        notes: what is not in the files.
    """

    folder: Path
    maker: str
    method: Mapping[str, Any]
    num_steps: int
    planned_steps: int | None
    history: Sequence[Mapping[str, Any]]
    selection: BlockHistory | EntryHistory | None
    record: RunRecord | None
    evaluations: Sequence[SavedEvaluation]
    notes: Sequence[str]

    @property
    def title(self) -> str:
        return self.folder.resolve().name

    @property
    def finished(self) -> FinishedRun | None:
        return self.record if isinstance(self.record, FinishedRun) else None

    @property
    def is_finished(self) -> bool:
        """True if all steps were taken and, of `gradselect train`, the model is saved."""
        if self.record is not None:
            return self.finished is not None
        return self.planned_steps is not None and self.num_steps >= self.planned_steps

    @property
    def method_name(self) -> str:
        return str(self.method.get("name", "unknown method"))

    @property
    def trainer(self) -> Mapping[str, Any]:
        """Settings of the trainer that a recipe names, of preferences or rewards; empty for fine-tuning."""
        return {} if self.record is None else self.record.recipe.get("trainer") or {}

    @property
    def trainer_name(self) -> str:
        return str(self.trainer.get("name", ""))

    @cached_property
    def losses(self) -> Points:
        """Training loss by step."""
        return self.logged("loss")

    @cached_property
    def validation(self) -> Mapping[str, Points]:
        """Validation losses by step; of several data sets by their name. None of answers that a trainer draws."""
        if self.record is not None and draws_answers(self.record.recipe):
            return {}
        keys = {key: None for entry in self.history for key in entry if _is_validation_loss(key)}
        named = {key.removeprefix("eval_").removesuffix("loss").strip("_") or "validation": key for key in keys}
        return {name: points for name, key in named.items() if (points := self.logged(key))}

    def logged(self, key: str) -> Points:
        """Return steps and values of a figure that the Trainer logged; those that are not finite are left out."""
        found = {entry["step"]: entry[key] for entry in self.history if key in entry and "step" in entry}
        return [(step, float(value)) for step, value in found.items() if _is_finite(value)]

    @property
    def num_not_finite(self) -> int:
        """Number of logged training losses that are NaN or infinite."""
        return sum("loss" in entry and not _is_finite(entry["loss"]) for entry in self.history)

    @property
    def skipped_steps(self) -> int:
        if self.finished is not None:
            return self.finished.skipped_steps
        return sum("skipped" in entry for entry in self.history)

    @property
    def blocks(self) -> BlockHistory | None:
        return self.selection if isinstance(self.selection, BlockHistory) else None

    @property
    def entries(self) -> EntryHistory | None:
        return self.selection if isinstance(self.selection, EntryHistory) else None

    @property
    def mask(self) -> MaskSelection | None:
        """Entries at the end, of a finished run."""
        selection = None if self.finished is None else self.finished.selection
        return selection if isinstance(selection, MaskSelection) else None


def _is_validation_loss(key: str) -> bool:
    return key.startswith("eval_") and key.endswith("loss")


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
