"""What the process of one run is told."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gradselect.app.recipe import Recipe, Settings

from .schedule import Role
from .suite import Evaluation


class Job(Settings):
    """One run; as JSON it is the argument of `python -m gradselect.app.compare.worker`.

    Attributes:
        suite: its name.
        protocol: fingerprint of the protocol.
        protocol_settings: what the fingerprint is of.
        method: its name in the suite.
        rates: the grid of the method.
        rate_at_edge: whether the best rate is the first or the last of the grid; None without a search.
        role: what the run is for.
        recipe: what to train.
        evaluations: what to ask the trained model; none where the rate is searched.
        forgetting: the loss to measure of the base and of the trained model.
        forgetting_file: where the loss of the base is kept.
        keep_training: another run with the same recipe will take over the trained model.
        may_reuse: take over a finished training of this very recipe, if it is there.
        resume: go on from a checkpoint of this training, if there is one.
        result: the file to write.
        commit: of the library, None where it is no checkout.
        dirty: whether the library's tracked files differ from the commit.
        command: what the user typed.
    """

    suite: str
    protocol: str
    protocol_settings: Mapping[str, Any]
    method: str
    rates: tuple[float, ...]
    rate_at_edge: bool | None
    role: Role
    recipe: Recipe
    evaluations: dict[str, Evaluation]
    forgetting: Evaluation | None
    forgetting_file: Path
    keep_training: bool
    may_reuse: bool
    resume: bool
    result: Path
    commit: str | None
    dirty: bool
    command: tuple[str, ...]

    @property
    def training(self) -> Path:
        """The output folder of the training."""
        return Path(self.recipe.run.output)
