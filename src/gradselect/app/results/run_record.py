"""`run.json` of a training run: what was trained, on what, and how it went."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from .record import Number, Record


class ModelFacts(Record):
    """The model before training."""

    class_name: str = Field(default="", alias="class")
    parameters: int | None = None
    fingerprint: str = ""
    is_local: bool = False


class MachineFacts(Record):
    """The machine that trained."""

    platform: str = ""
    device: str = ""
    cpus: int | None = None
    threads: int | None = None


class TokenCounts(Record):
    """Tokens of one pass over the data.

    Attributes:
        examples: in the data.
        rows: that the trainer reads. A packed row holds several examples.
        examples_cut: that lost their end, because they are longer than `data.max_length`.
        examples_continued: that go on in further rows.
        examples_dropped: without a token to train on, at least after the cut.
        examples_untrained: in the rows, but with a single token, which nothing predicts.
        tokens: in the data.
        tokens_in_rows: without those that were cut off or dropped.
        share_left_out: share of the data's tokens that are in no row.
        tokens_to_train: in the data, that the loss should count. None for classification.
        tokens_trained: in the rows, that the loss counts. Nothing predicts the first token of an example or piece.
        trained_share_left_out: share of the tokens to train on that the loss does not count.
    """

    examples: int
    rows: int
    examples_cut: int = 0
    examples_continued: int = 0
    examples_dropped: int = 0
    examples_untrained: int = 0
    tokens: int
    tokens_in_rows: int
    share_left_out: Number = 0.0
    tokens_to_train: int | None = None
    tokens_trained: int | None = None
    trained_share_left_out: Number | None = None

    @classmethod
    def of(cls, *, tokens: int, in_rows: int, to_train: int | None, trained: int | None, **examples: int) -> Self:
        """Return the counts with their shares."""
        return cls(
            **examples,
            tokens=tokens,
            tokens_in_rows=in_rows,
            share_left_out=_share_lost(in_rows, tokens) or 0.0,
            tokens_to_train=to_train,
            tokens_trained=trained,
            trained_share_left_out=_share_lost(trained, to_train),
        )


class StepSeconds(Record):
    """Median seconds over the steps of one kind."""

    steps: int
    median: Number
    forward: Number | None = None
    backward: Number | None = None
    optimizer: Number | None = None
    selection: Number | None = None


class Seconds(Record):
    """Seconds of the whole training, and of a step by kind: "explore" and "exploit", or "step"."""

    training: Number | None = None
    by_kind: dict[str, StepSeconds] = Field(default_factory=dict)


class AllocatorBytes(Record):
    """Bytes that torch's allocator held on a GPU."""

    peak: Number | None = None
    average: Number | None = None
    percentile_99: Number | None = Field(default=None, alias="99th")
    peak_by_kind: dict[str, Number] | None = None


class TrainingBytes(Record):
    """Bytes by category, of the process, and of the GPU if there was one."""

    peak: dict[str, Number] = Field(default_factory=dict)
    average: dict[str, Number] = Field(default_factory=dict)
    process: Number | None = None
    allocated: AllocatorBytes | None = None
    reserved: AllocatorBytes | None = None


class Flop(Record):
    """Upper limit of the speed-up over full fine-tuning, from the FLOPs of the blocks that were selected."""

    limit: Number | None = None
    speed_up: Number | None = None


class BlockSelection(Record):
    """Blocks that were trained, step by step."""

    blocks: list[str]
    updates: list[int]
    entropy: list[Number] = Field(default_factory=list)
    selected: list[list[int]] = Field(default_factory=list)
    explored: list[Literal[0, 1]] = Field(default_factory=list)
    unreached: list[str] = Field(default_factory=list)

    @model_validator(mode="after")
    def check_lengths(self) -> Self:
        num_blocks, num_steps = len(self.blocks), len(self.selected)
        if len(self.updates) != num_blocks:
            raise ValueError(f"{num_blocks} blocks, {len(self.updates)} update counts")
        if self.explored and len(self.explored) != num_steps:
            raise ValueError(f"{num_steps} selections, {len(self.explored)} explore marks")
        if any(not 0 <= index < num_blocks for step in self.selected for index in step):
            raise ValueError(f"a selection names a block beyond the {num_blocks} there are")
        return self


class MaskSelection(Record):
    """Entries that a mask selected.

    Attributes:
        entries: number of entries in the mask at the end.
        whole_entries: number of entries beside the mask that train whole: a head, `always`, the adapters of SPT. None
            in files of earlier versions.
    """

    mask: str
    settings: dict[str, Any] = Field(default_factory=dict)
    entries: int
    entries_to_choose_from: int | None = None
    entries_by_tensor: dict[str, int] = Field(default_factory=dict)
    overlap: Number | None = None
    whole_entries: int | None = None


Selection = BlockSelection | MaskSelection


class RunRecord(Record):
    """A training run from its first step on.

    Attributes:
        status: "finished" only when everything else is written.
        resumed_from: name of the checkpoint.
        recipe: every key, defaults written out.
        data: path, fingerprint and rows of "train" and "validation".
        token_counts: tokens of one pass over each of them: in the data, in the rows, trained on.
    """

    status: Literal["started", "finished"]
    command: list[str] = Field(default_factory=list)
    started_at: str = ""
    processes: int = 1
    resumed_from: str | None = None
    recipe: dict[str, Any]
    model: ModelFacts
    data: dict[str, dict[str, Any]]
    token_counts: dict[str, TokenCounts] = Field(default_factory=dict)
    versions: dict[str, str] = Field(default_factory=dict)
    machine: MachineFacts = MachineFacts()


class SavedModel(Record):
    """The folder that a run leaves.

    Attributes:
        form: "adapter" on a quantised base, which it cannot be merged into.
        beside_the_weights: files copied from the base's folder.
        left_out: files and folders of the base that were not copied, such as its README.md.
        untrained_weights: those among them that hold the base's weights in other formats.
        eos_token_ids: tokens that end a generated text; None for a model that writes none.
        turn_ends: those among them that the data added to the base's.
        labels: names of the outputs of a classifier with an adapter, whose own folder has no config.json.
    """

    form: Literal["model", "adapter"] = "model"
    beside_the_weights: list[str] = Field(default_factory=list)
    left_out: list[str] = Field(default_factory=list)
    untrained_weights: list[str] = Field(default_factory=list)
    eos_token_ids: list[int] | None = None
    turn_ends: list[str] = Field(default_factory=list)
    labels: list[str] | None = None


class FinishedRun(RunRecord):
    """A training run that has ended well.

    Attributes:
        tokens: trained on in the last session; like all seconds and bytes. Everything else is of the whole run.
        history: what the Trainer logged, in order.
    """

    finished_at: str = ""
    steps: int
    skipped_steps: int = 0
    training_loss: Number | None
    validation_loss: Number | None
    validation: dict[str, Any] = Field(default_factory=dict)
    tokens: int
    tokens_per_second: Number | None = None
    notes: list[str] = Field(default_factory=list)
    saved: SavedModel | None = None
    steps_by_kind: dict[str, int] = Field(default_factory=dict)
    median_step_seconds: dict[str, Number] = Field(default_factory=dict)
    training_seconds: Number
    peak_bytes: dict[str, Number] = Field(default_factory=dict)
    seconds: Seconds
    bytes: TrainingBytes
    flop: Flop = Flop()
    selection: Selection | None
    history: list[dict[str, Any]]

    @field_validator("status")
    @classmethod
    def check_status(cls, status: str) -> str:
        if status != "finished":
            raise ValueError(f"{status!r}; the run has not finished")
        return status


def _share_lost(left: int | None, whole: int | None) -> float | None:
    return round(1 - left / whole, 6) if left is not None and whole else None


def read_run(path: Path) -> RunRecord:
    """Read a `run.json`, finished or not.

    Raises:
        UsageError: it is damaged or half-written; names the key.
    """
    return RunRecord.read(path, name=str(path))


def read_finished_run(path: Path) -> FinishedRun:
    """Read the `run.json` of a finished run.

    Raises:
        UsageError: it is damaged, half-written or not finished; names the key.
    """
    return FinishedRun.read(path, name=str(path))
