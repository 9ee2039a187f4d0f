"""`calibration.json` of a comparison under a budget: the measured cost of a step of each method."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from gradselect.files import plain_or_packed, sealed, writing_aside

from .record import Number, Record

CALIBRATION = "calibration.json"
"""Name of the file, in the folder of the results."""


class KindCost(Record):
    """Cost of one kind of step, as ratios to the cost of a step of the reference in the same round.

    Attributes:
        ratio: median over the rounds.
        rounds: one ratio for each round.
    """

    ratio: Number
    rounds: list[Number] = Field(default_factory=list)


class MethodCalibration(Record):
    """Measurements of one method, and its share of the budget.

    Attributes:
        settings: of the method, as the suite writes them.
        by_kind: cost of a step of each kind: "explore" and "exploit" if blocks are selected, else "step".
        epoch_steps: optimizer steps of one pass over the data.
        block_names: names and aliases of the blocks, for a method that selects blocks.
        bytes: peak of what `counted` names.
        error: why the method could not be measured; empty if it could.
        steps: steps that fit. None: the method is left out, or the budget is of memory alone.
        ratio: mean cost of its steps, relative to the reference.
        step_cost: mean cost of its steps, in the unit of the calibration.
        spread: (largest - smallest) / median of the rounds.
        left_out: why the method does not run; empty if it does.
    """

    settings: dict[str, Any] = Field(default_factory=dict)
    by_kind: dict[str, KindCost] = Field(default_factory=dict)
    epoch_steps: int | None = None
    block_names: list[str] = Field(default_factory=list)
    bytes: int | None = None
    error: str = ""
    steps: int | None = None
    ratio: Number | None = None
    step_cost: Number | None = None
    spread: Number | None = None
    left_out: str = ""

    @property
    def num_rounds(self) -> int:
        """Number of rounds that measured it."""
        return max((len(cost.rounds) for cost in self.by_kind.values()), default=0)


class Calibration(Record):
    """Step costs of the methods of a suite on one machine.

    Attributes:
        machine: processor, device, cpus and threads.
        versions: of the packages that decide the speed.
        shared: fingerprint of what the methods share.
        unit: "seconds" or "FLOPs" of a step.
        counted: name of the counted bytes.
        reference: method that ratios are relative to.
        reference_rounds: mean cost of its steps in each round.
        reference_cost: median of them.
        budget: cost that every run may take, in the unit. None: memory is the only budget.
        budget_text: the budget as the suite writes it.
        run_steps: steps of a run without the budget.
        memory: bytes that a method may take. None: no limit.
        methods: by name.
    """

    format: int = 1
    made_at: str = ""
    machine: dict[str, Any] = Field(default_factory=dict)
    versions: dict[str, str] = Field(default_factory=dict)
    shared: str = ""
    unit: Literal["seconds", "FLOPs"] = "seconds"
    counted: str = ""
    reference: str
    reference_rounds: list[Number] = Field(default_factory=list)
    reference_cost: Number
    budget: Number | None = None
    budget_text: str = ""
    run_steps: int | None = None
    memory: int | None = None
    methods: dict[str, MethodCalibration]


class RunBudget(Record):
    """Budget of one run, in its result file.

    Attributes:
        text: the budget as the suite writes it.
        unit: "seconds" or "FLOPs".
        total: cost that the run may take; None for a budget of memory alone.
        steps: steps that fit; None for a budget of memory alone.
        step_cost: mean cost of a step in the calibration.
        ratio: of that cost to the reference's.
        spread: (largest - smallest) / median of the rounds of the calibration.
        rounds: number of rounds.
        reference: method that ratios are relative to.
        machine: that the calibration ran on.
        memory: bytes that the method may take.
        bytes: that it took in the calibration.
        counted: name of those bytes.
    """

    text: str = ""
    unit: str = "seconds"
    total: Number | None = None
    steps: int | None = None
    step_cost: Number | None = None
    ratio: Number | None = None
    spread: Number | None = None
    rounds: int | None = None
    reference: str = ""
    machine: dict[str, Any] = Field(default_factory=dict)
    memory: int | None = None
    bytes: int | None = None
    counted: str = ""


def read_calibration(folder: Path) -> Calibration | None:
    """Read the calibration of a folder of results; None if it has none.

    Raises:
        UsageError: it is damaged.
    """
    path = plain_or_packed(folder / CALIBRATION)
    return None if path is None else Calibration.read(path, name=CALIBRATION)


def write_calibration(folder: Path, calibration: Calibration) -> None:
    """Write the calibration atomically.

    Raises:
        UsageError: it cannot be written.
    """
    text = json.dumps(sealed(calibration.model_dump(mode="json")), indent=1, ensure_ascii=False)
    with writing_aside(folder / CALIBRATION) as aside:
        aside.write_text(text + "\n", "utf-8")
