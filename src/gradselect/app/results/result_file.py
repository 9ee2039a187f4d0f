"""One result file of `gradselect compare`: the keys of PEFT's method comparison, and under "gradselect" our own."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from gradselect.files import json_files, read_json_text, read_sealed, sealed, writing_aside
from gradselect.usage import UsageError

from .calibration_file import CALIBRATION, RunBudget
from .record import Number, Record
from .run_record import Flop, Seconds, Selection

FORMAT = 1
SUCCESS, FAILED = "success", "failed"
NO_RESULT = "no result of gradselect compare"
"""Beginning of the reason why a file, which may be whole, is skipped."""
Role = Literal["rate", "score"]
NullAsEmpty = BeforeValidator(lambda value: {} if value is None else value)


class RunInfo(Record):
    """Identity of the run, in the keys of PEFT."""

    created_at: str = ""
    total_time: Number | None = None
    experiment_name: str = ""
    peft_branch: str = ""
    train_config: dict[str, Any] = Field(default_factory=dict)
    peft_config: dict[str, Any] | None = None
    error_msg: str = ""


class TrainInfo(Record):
    """Cost and outcome of the training.

    Attributes:
        file_size: bytes of the file to ship; None for a model that is not kept.
        metrics: one row for each logged step, then one with the figures at the end.
    """

    accelerator_memory_reserved_avg: Number | None = None
    accelerator_memory_max: Number | None = None
    accelerator_memory_reserved_99th: Number | None = None
    train_time: Number | None = None
    file_size: Number | None = None
    num_trainable_params: int | None = None
    num_total_params: int | None = None
    status: Literal["success", "failed"]
    metrics: list[dict[str, Any]] = Field(default_factory=list)


class HeldBytes(Record):
    """Bytes by category at the peak and on average; peaks of the process and of torch's allocator."""

    peak: dict[str, Number] = Field(default_factory=dict)
    average: dict[str, Number] = Field(default_factory=dict)
    process: Number | None = None
    allocated: Number | None = None
    reserved: Number | None = None
    allocated_by_kind: dict[str, Number] | None = None


class Score(Record):
    """One figure of a trained model; `value` is None if it is undefined."""

    task: str = ""
    metric: str
    value: Number | None
    interval: tuple[Number, Number] | None = None
    num_items: int | None = None


class Forgetting(Record):
    """Loss on text that the base model knew, in nats per token."""

    before: Number
    after: Number

    @property
    def rise(self) -> float:
        """Loss of the trained model minus that of the base."""
        return self.after - self.before


class Item(Record):
    """Outcome of one item: right or wrong, its loss in nats, summed over its tokens, or the score of its text."""

    index: int
    correct: bool | None = None
    loss: Number | None = None
    num_tokens: int | None = None
    score: Number | None = None


class Curve(Record):
    """A loss along the run."""

    step: list[Number] = Field(default_factory=list)
    seconds: list[Number] = Field(default_factory=list)
    loss: list[Number | None] = Field(default_factory=list)

    @model_validator(mode="after")
    def check_lengths(self) -> Self:
        if not len(self.step) == len(self.seconds) == len(self.loss):
            raise ValueError(f"{len(self.step)} steps, {len(self.seconds)} times, {len(self.loss)} losses")
        return self


class ComparedRun(Record):
    """The part "gradselect" of a result file.

    Attributes:
        protocol: fingerprint of `protocol_settings`.
        rates: the grid of the method.
        rate_at_edge: True if the best rate is the first or the last of the grid; None without a search.
        commit: of the library; None if it was no checkout.
        dirty: True if the library differed from that commit.
        share: of the method's own steps, for a short run of the search; 1 for every other run.
        jobs: number of runs that were made side by side.
        resumed_from: checkpoint that the training went on from; None if it was never interrupted. Its training time is
            that of the last session, extended to all steps, and its bytes are of that session.
        budget: under which the method got its steps; None without a budget.
        validation_loss: None if it is undefined, or if the run failed.
        forgetting: losses on text that the base knew, of the only set or by the name of each set.
    """

    format: int
    suite: str
    protocol: str
    protocol_settings: dict[str, Any] = Field(default_factory=dict)
    method: str
    method_settings: dict[str, Any]
    lr: float
    rates: list[float] = Field(default_factory=list)
    rate_at_edge: bool | None = None
    seed: int
    role: Role
    share: Annotated[float, Field(gt=0, le=1)] = 1.0
    commit: str | None = None
    dirty: bool
    jobs: int = 1
    resumed_from: str | None = None
    command: list[str] = Field(default_factory=list)
    budget: RunBudget | None = None
    seconds: Seconds | None = None
    bytes: HeldBytes | None = None
    flop: Flop | None = None
    validation_loss: Number | None = None
    scores: Annotated[dict[str, Score], NullAsEmpty] = Field(default_factory=dict)
    forgetting: Forgetting | dict[str, Forgetting] | None = None
    items: Annotated[dict[str, list[Item]], NullAsEmpty] = Field(default_factory=dict)
    curves: Annotated[dict[str, Curve], NullAsEmpty] = Field(default_factory=dict)
    selection: Selection | None = None

    @property
    def forgotten(self) -> dict[str, Forgetting]:
        """Losses on text that the base knew, by the name of the set; that of an only set without a name is empty."""
        if self.forgetting is None:
            return {}
        return {"": self.forgetting} if isinstance(self.forgetting, Forgetting) else self.forgetting


class ResultFile(Record):
    """A whole result file."""

    run_info: RunInfo
    train_info: TrainInfo
    meta_info: dict[str, Any]
    gradselect: ComparedRun


@dataclass(frozen=True, kw_only=True)
class Result:
    """A result file that has been read."""

    path: Path
    content: ResultFile

    @property
    def record(self) -> ComparedRun:
        """The part of the file that is ours."""
        return self.content.gradselect

    @property
    def succeeded(self) -> bool:
        return self.content.train_info.status == SUCCESS

    @property
    def error(self) -> str:
        """Why the run failed; empty if it did not."""
        return self.content.run_info.error_msg


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """A file that is no usable result, and why."""

    file: str
    reason: str


def result_paths(folder: Path) -> list[Path]:
    """Return the JSON files of a folder that may be results, also those that `gzip` has packed, in order of names."""
    return [path for path in json_files(folder) if path.name.removesuffix(".gz") != CALIBRATION]


def read_result(path: Path) -> Result:
    """Read a result file, also one that `gzip` has packed.

    Raises:
        UsageError: it is half-written, damaged, or not a result of this format; names file and key.
    """
    name = path.name
    _check_holds_object(path, name=name)
    values = read_sealed(path, name=name)
    own = values.get("gradselect")
    if not isinstance(own, dict):
        raise UsageError(f"{name}: {NO_RESULT}: it has no part 'gradselect'")
    if own.get("format") != FORMAT:
        raise UsageError(f"{name}: format {own.get('format')!r}; this version reads format {FORMAT}")
    return Result(path=path, content=ResultFile.check(values, name=name))


def _check_holds_object(path: Path, *, name: str) -> None:
    """Tell a whole file of something else from a damaged result."""
    try:
        values = json.loads(read_json_text(path))
    except (OSError, ValueError, RecursionError):
        return  # the reader says what is wrong
    if not isinstance(values, dict):
        raise UsageError(f"{name}: {NO_RESULT}: it holds no object but {str(values)[:40]!r}")


def write_result(path: Path, content: ResultFile) -> None:
    """Write a result file atomically; a number that is not finite becomes null.

    Raises:
        UsageError: it cannot be written.
    """
    text = json.dumps(sealed(_finite(content.values())), indent=1, ensure_ascii=False, allow_nan=False)
    with writing_aside(path) as aside:
        aside.write_text(text + "\n", "utf-8")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
