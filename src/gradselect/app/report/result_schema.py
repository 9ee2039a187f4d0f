"""What a result file of `gradselect compare` holds, as far as the report reads it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

FORMAT = 1


class _Part(BaseModel):
    # Keys that a later version adds do not make a file unreadable.
    model_config = ConfigDict(extra="ignore", frozen=True)


class RunInfo(_Part):
    """What was run."""

    experiment_name: str = ""
    error_msg: str = ""


class TrainInfo(_Part):
    """What the training came to, in the keys of PEFT's method comparison."""

    status: str
    accelerator_memory_reserved_avg: float | None = None
    accelerator_memory_max: float | None = None
    train_time: float | None = None
    file_size: float | None = None
    num_trainable_params: int | None = None
    num_total_params: int | None = None
    metrics: list[dict[str, Any]] = Field(default_factory=list)


class StepSeconds(_Part):
    """Medians over the steps of one kind."""

    steps: int
    median: float
    forward: float | None = None
    backward: float | None = None
    optimizer: float | None = None
    selection: float | None = None


class Seconds(_Part):
    """Seconds of training, and of a step by its kind: "explore" and "exploit", or "step"."""

    training: float | None = None
    by_kind: dict[str, StepSeconds] = Field(default_factory=dict)


class Bytes(_Part):
    """Bytes by category at the peak and on average, and what process and device held at most."""

    peak: dict[str, float] = Field(default_factory=dict)
    average: dict[str, float] = Field(default_factory=dict)
    process: float | None = None
    allocated: float | None = None
    reserved: float | None = None


class Flop(_Part):
    """The speed-up over full fine-tuning that the FLOPs of the drawn selections allow."""

    limit: float | None = None


class Score(_Part):
    """One figure of a finished model."""

    task: str = ""
    metric: str
    value: float | None
    interval: tuple[float, float] | None = None
    num_items: int | None = None


class Forgetting(_Part):
    """Loss on text that the base knew."""

    before: float
    after: float


class Curve(_Part):
    """A loss along the run."""

    step: list[float] = Field(default_factory=list)
    seconds: list[float] = Field(default_factory=list)
    loss: list[float | None] = Field(default_factory=list)


class BlockSelection(_Part):
    """Which blocks were trained at which step."""

    blocks: list[str]
    updates: list[int]
    entropy: list[float] = Field(default_factory=list)
    selected: list[list[int]] = Field(default_factory=list)
    explored: list[bool] = Field(default_factory=list)


class MaskSelection(_Part):
    """Which single weights were trained."""

    mask: str
    entries: int
    entries_to_choose_from: int | None = None
    entries_by_tensor: dict[str, int] = Field(default_factory=dict)


class Item(_Part):
    """The outcome of one item: right or wrong, or the summed loss of its tokens in nats."""

    index: int
    correct: bool | None = None
    loss: float | None = None
    num_tokens: int | None = None


class Record(_Part):
    """The part of a result file under the key "gradselect"."""

    format: int
    suite: str
    protocol: str
    protocol_settings: dict[str, Any] = Field(default_factory=dict)
    method: str
    method_settings: dict[str, Any] = Field(default_factory=dict)
    lr: float
    rates: list[float] = Field(default_factory=list)
    seed: int
    role: Literal["rate", "score"]
    commit: str | None = None
    dirty: bool = False
    command: list[str] = Field(default_factory=list)
    seconds: Seconds | None = None
    bytes: Bytes | None = None
    flop: Flop | None = None
    validation_loss: float | None = None
    scores: dict[str, Score] | None = None
    forgetting: Forgetting | None = None
    items: dict[str, list[Item]] | None = None
    curves: dict[str, Curve] | None = None
    selection: BlockSelection | MaskSelection | None = None


class ResultFile(_Part):
    """A whole result file."""

    run_info: RunInfo = Field(default_factory=RunInfo)
    train_info: TrainInfo
    meta_info: dict[str, Any] = Field(default_factory=dict)
    gradselect: Record
