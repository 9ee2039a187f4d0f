"""Reads the folder of a run: of `gradselect train`, of a transformers Trainer, or a file of selection records."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gradselect.app.evaluate import find_evaluations
from gradselect.app.results import BlockSelection, FinishedRun, RunRecord, read_finished_run, read_run
from gradselect.app.runtime import RunFolder
from gradselect.core import BlockHistory, EntryHistory, read_history
from gradselect.usage import UsageError

from .selection_charts import history_of
from .trainer_checkpoint import TrainerCheckpoint, find_checkpoint
from .training_run import TrainingRun

History = BlockHistory | EntryHistory


def is_run(path: Path) -> bool:
    """Return True if `path` is a folder of a run, or a file of selection records."""
    if path.is_file():
        return path.suffix == ".jsonl"
    return RunFolder(path).run_file.is_file() or find_checkpoint(path) is not None or bool(_record_files(path))


def read_training_run(path: Path, *, records: Path | None = None, evaluations: Sequence[Path] = ()) -> TrainingRun:
    """Read a run.

    Args:
        path: folder of a run, or a file of selection records.
        records: file of the selection records, if it is not in the folder.
        evaluations: output folders of `gradselect evaluate` beside those that are found.

    Raises:
        UsageError: a file is damaged, or there are several files of records; names it.
    """
    if path.is_file():
        return _read_records_only(path)
    if RunFolder(path).run_file.is_file():
        return _read_own(RunFolder(path), records=records, evaluations=evaluations)
    return _read_trainer(path, records=records, evaluations=evaluations)


def _read_own(folder: RunFolder, *, records: Path | None, evaluations: Sequence[Path]) -> TrainingRun:
    record = read_run(folder.run_file)
    if record.status == "finished":
        record = read_finished_run(folder.run_file)
    checkpoint = None if isinstance(record, FinishedRun) else find_checkpoint(folder.root)
    file = records or folder.records_file
    selection = read_history(file, names=_block_names(record, checkpoint)) if file.is_file() else _selection_of(record)
    history = record.history if isinstance(record, FinishedRun) else [] if checkpoint is None else checkpoint.history
    recorded = 0 if selection is None or not selection.steps else selection.steps[-1] + 1
    known = record.steps if isinstance(record, FinishedRun) else 0 if checkpoint is None else checkpoint.num_steps
    found, notes = find_evaluations(folder.root, evaluations)
    return TrainingRun(
        folder=folder.root,
        maker="gradselect train",
        method=record.recipe.get("method", {}),
        num_steps=max(known, recorded),
        planned_steps=record.recipe.get("run", {}).get("steps") or (checkpoint and checkpoint.planned_steps),
        history=history,
        selection=selection,
        record=record,
        evaluations=found,
        notes=[*_missing(record, checkpoint, recorded), *notes],
    )


def _read_trainer(path: Path, *, records: Path | None, evaluations: Sequence[Path]) -> TrainingRun:
    checkpoint = find_checkpoint(path)
    selection = _read_selection(path, records, checkpoint)
    recorded = 0 if selection is None or not selection.steps else selection.steps[-1] + 1
    found, notes = find_evaluations(path, evaluations)
    if checkpoint is None:
        advice = "a Trainer writes it beside each checkpoint, or by trainer.save_state()"
        notes = [f"no trainer_state.json in the folder, so losses are unknown: {advice}", *notes]
    if selection is None:
        notes = [f"no selection records in {path}; name their file: --records FILE", *notes]
    return TrainingRun(
        folder=path,
        maker="Trainer" if checkpoint is not None else "records",
        method={} if checkpoint is None else checkpoint.method,
        num_steps=max(0 if checkpoint is None else checkpoint.num_steps, recorded),
        planned_steps=None if checkpoint is None else checkpoint.planned_steps,
        history=[] if checkpoint is None else checkpoint.history,
        selection=selection,
        record=None,
        evaluations=found,
        notes=notes,
    )


def _read_records_only(path: Path) -> TrainingRun:
    selection = read_history(path)
    if selection is None:
        raise UsageError(f"{path} holds no selection record yet")
    return TrainingRun(
        folder=path,
        maker="records",
        method={},
        num_steps=selection.steps[-1] + 1,
        planned_steps=None,
        history=[],
        selection=selection,
        record=None,
        evaluations=[],
        notes=["from the records alone: losses, times and settings are unknown; give the folder of the run for those"],
    )


def _read_selection(path: Path, records: Path | None, checkpoint: TrainerCheckpoint | None) -> History | None:
    files = [records] if records is not None else _record_files(path)
    if len(files) > 1:
        listed = ", ".join(file.name for file in files)
        raise UsageError(f"{path} holds several files of selection records ({listed}); choose one: --records FILE")
    return read_history(files[0], names=() if checkpoint is None else checkpoint.blocks) if files else None


def _record_files(path: Path) -> list[Path]:
    """Return the files of selection records in a folder, or beside a checkpoint's folder."""
    folders = [path, path.parent] if path.name.startswith("checkpoint-") else [path]
    return [file for folder in folders for file in sorted(folder.glob("*.jsonl")) if _holds_records(file)]


def _holds_records(file: Path) -> bool:
    try:
        with file.open(encoding="utf-8") as lines:
            first = json.loads(next(lines, "null"))
    except (OSError, ValueError):
        return False
    return isinstance(first, dict) and "step" in first and ("selected" in first or "num_entries" in first)


def _block_names(record: RunRecord, checkpoint: TrainerCheckpoint | None) -> Sequence[str]:
    if isinstance(record, FinishedRun) and isinstance(record.selection, BlockSelection):
        return record.selection.blocks
    return () if checkpoint is None else checkpoint.blocks


def _selection_of(record: RunRecord) -> History | None:
    selection = record.selection if isinstance(record, FinishedRun) else None
    return history_of(selection) if isinstance(selection, BlockSelection) and selection.selected else None


def _missing(record: RunRecord, checkpoint: TrainerCheckpoint | None, recorded: int) -> Iterable[str]:
    if isinstance(record, FinishedRun):
        return
    yield "the run has not finished: times, bytes and the last losses are written at its end"
    if checkpoint is None:
        yield "no checkpoint yet, so losses are unknown"
    elif recorded > checkpoint.num_steps:
        yield f"losses up to the newest checkpoint, step {checkpoint.num_steps:,}; selection up to step {recorded:,}"


def method_words(method: Mapping[str, Any]) -> list[str]:
    """Return the settings of a method that say something: "fraction 0.2"."""
    return [
        f"{key} {value}" for key, value in method.items() if key != "name" and value not in (None, False, [], "", {})
    ]
