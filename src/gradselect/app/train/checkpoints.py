"""Checkpoints of a run: write on all ranks, find, delete."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from gradselect import MaskRecord, StepRecord, UsageError
from gradselect.app.runtime import RunFolder, barrier, is_rank_0
from gradselect.files import aside_of, newest_whole, remove, write_atomically, write_manifest, writing_aside


@contextmanager
def writing_checkpoint(folder: RunFolder, *, step: int) -> Iterator[Path]:
    """Yield a temporary folder for the checkpoint of this step, the same on all ranks.

    Write the checkpoint into one folder inside it. At the end rank 0 moves its content up, adds the records so far and
    the manifest, and renames the temporary folder.
    """
    target = folder.checkpoint(step)
    with writing_aside(target) if is_rank_0() else nullcontext(aside_of(target)) as aside:
        barrier()
        yield aside
        barrier()
        if is_rank_0():
            _move_up(aside)
            if folder.records_file.exists():
                shutil.copyfile(folder.records_file, aside / folder.records_file.name)
            write_manifest(aside, step=step)
    barrier()


def find_checkpoint(folder: RunFolder) -> tuple[Path | None, dict[Path, str]]:
    """Return the newest whole checkpoint, None if there is none, and the faults of newer ones.

    Raises:
        UsageError: all checkpoints are damaged.
    """
    found, damaged = newest_whole(folder.complete_checkpoints())
    if damaged and found is None:
        faults = [f"{path.name}: {fault}" for path, fault in damaged.items()]
        heading = (
            f"no checkpoint in {folder.checkpoints} is whole. Put back a copy of one; or start again from the first "
            f"step: move {folder.checkpoints} away and repeat this command. Nothing has been changed. Found:"
        )
        raise UsageError("\n  ".join([heading, *faults]))
    return found, damaged


def return_to(folder: RunFolder, checkpoint: Path | None, *, damaged: Mapping[Path, str], keep: int) -> None:
    """Restore the folder to the moment when `checkpoint` was written; without one, to before the first step.

    Cuts later records and answers, deletes half-written checkpoints and renames damaged ones, which may still be of
    use. Keeps the last `keep` of the others: a run killed between writing one and deleting another has left one too
    many.

    Raises:
        UsageError: the folder cannot be written to.
    """
    try:
        for half_written in folder.checkpoints.glob(aside_of(Path("step-*")).name):
            remove(half_written)
        for path in damaged:
            path.rename(_free_name(path.with_name(f"damaged-{path.name}")))
        _return_records(folder, checkpoint)
        _return_answers(folder, checkpoint)
        delete_old_checkpoints(folder, keep=keep)
    except OSError as error:
        raise UsageError(f"run.output={folder.root} cannot be written to: {error}") from error


def _return_records(folder: RunFolder, checkpoint: Path | None) -> None:
    kept = None if checkpoint is None else checkpoint / folder.records_file.name
    if kept is None or not kept.exists():
        folder.records_file.unlink(missing_ok=True)
        return
    with writing_aside(folder.records_file) as aside:
        shutil.copyfile(kept, aside)


def _return_answers(folder: RunFolder, checkpoint: Path | None) -> None:
    """Cut the answers that were written after the checkpoint, and a last line that is not whole."""
    file, step = folder.answers_file, 0 if checkpoint is None else folder.step_of(checkpoint)
    if not file.exists():
        return
    # Bytes: a text is also split at U+2028 and the like, and a process that was killed may leave half a character.
    lines = [line for line in file.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    write_atomically(file, b"".join(line for line in lines if json.loads(line)["step"] <= step))


def delete_old_checkpoints(folder: RunFolder, *, keep: int) -> None:
    """Delete all but the last `keep`. Renames each first, so that no half-deleted one looks whole."""
    for old in folder.complete_checkpoints()[:-keep]:
        os.replace(old, aside_of(old))
        remove(aside_of(old))


def _move_up(folder: Path) -> None:
    """Move the content of the only folder inside `folder` up one level."""
    (inner,) = folder.iterdir()
    for entry in list(inner.iterdir()):
        entry.rename(folder / entry.name)
    inner.rmdir()


def _free_name(path: Path) -> Path:
    names = (path.with_name(f"{path.name}{suffix}") for suffix in ("", *(f"-{number}" for number in range(2, 1000))))
    return next(name for name in names if not name.exists())


def write_window(folder: Path, window: Mapping[str, Any], *, process: int) -> None:
    """Write what rank `process` has not logged yet, as JSON."""
    _file(folder, process).write_text(json.dumps(window), "utf-8")


def read_window(folder: Path, *, process: int) -> dict[str, Any]:
    """Read what `write_window` wrote."""
    return json.loads(_file(folder, process).read_text("utf-8"))


def last_records(file: Path, count: int) -> list[StepRecord | MaskRecord]:
    """Return the last `count` records in a file of `JsonlWriter`; none if there is no file."""
    if not file.exists() or count == 0:
        return []
    lines = [json.loads(line) for line in file.read_text("utf-8").splitlines()[-count:]]
    return [StepRecord(**line) if "selected" in line else MaskRecord(**line) for line in lines]


def _file(folder: Path, process: int) -> Path:
    return folder / f"log_window_{process}.json"
