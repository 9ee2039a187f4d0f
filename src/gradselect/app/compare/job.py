"""Input of the process of one run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gradselect.app.recipe import Recipe, Settings
from gradselect.app.results import BASE, Role, RunBudget

from .samples import Samples
from .suite import Evaluation


class Job(Settings):
    """One run. As JSON it is the argument of `python -m gradselect.app.compare.worker`.

    Attributes:
        suite: name of the suite.
        protocol: fingerprint of `protocol_settings`.
        method: name of the method in the suite.
        rates: learning rates of the method's grid.
        rate_at_edge: True if the best rate is the first or the last of the grid; None without a search.
        role: "rate" or "score".
        share: of the method's own steps that the recipe has.
        jobs: number of runs side by side.
        budget: under which the recipe got its steps; None without a budget.
        recipe: the training.
        evaluations: of the trained model; empty if the rate is searched.
        forgetting: losses to measure for the base and for the trained model, by name of the set.
        forgetting_file: keeps the losses of the base model.
        samples: prompts that the trained model answers; None for none.
        samples_file: gets the answers. Those of the base model are beside it.
        keep_training: keep the trained model for another run with the same recipe.
        may_reuse: reuse a finished training with exactly this recipe.
        resume: resume this training from a checkpoint, if there is one.
        result: the file to write.
        commit: of the library; None if it is no checkout.
        dirty: True if tracked files of the library differ from the commit.
        command: what the user typed.
    """

    suite: str
    protocol: str
    protocol_settings: Mapping[str, Any]
    method: str
    rates: tuple[float, ...]
    rate_at_edge: bool | None
    role: Role
    share: float = 1.0
    jobs: int = 1
    budget: RunBudget | None = None
    recipe: Recipe
    evaluations: dict[str, Evaluation]
    forgetting: dict[str, Evaluation]
    forgetting_file: Path
    samples: Samples | None = None
    samples_file: Path | None = None
    keep_training: bool
    may_reuse: bool
    resume: bool
    result: Path
    commit: str | None
    dirty: bool
    command: tuple[str, ...]

    @property
    def samples_base(self) -> Path | None:
        """File with the answers of the base model."""
        return None if self.samples_file is None else self.samples_file.with_name(BASE)

    @property
    def training(self) -> Path:
        """The output folder of the training."""
        return Path(self.recipe.run.output)
