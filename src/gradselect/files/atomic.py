"""Atomic writes: a file or folder appears whole under its name, or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from gradselect.usage import UsageError


@contextmanager
def writing_aside(target: Path) -> Iterator[Path]:
    """A path to write a file or a folder to; it takes the name `target` when the block ends without an error.

    Raises:
        UsageError: the disk is full or cannot be written to; what had the name before is untouched.
    """
    aside = aside_of(target)
    remove(aside)
    try:
        aside.parent.mkdir(parents=True, exist_ok=True)
        yield aside
        _flush(aside)
        if target.is_dir():
            remove(target)
        os.replace(aside, target)
        flush_names(target.parent)
    # torch.save reports a full disk as a RuntimeError without a cause, safetensors as an error of its own.
    except (OSError, RuntimeError, SafetensorError) as error:
        raise UsageError(_unwritable(target, error)) from error
    finally:
        remove(aside)


def aside_of(target: Path) -> Path:
    """Where `writing_aside` writes."""
    return target.with_name(f".{target.name}.partial")


def _unwritable(target: Path, error: Exception) -> str:
    there = next(parent for parent in target.absolute().parents if parent.exists())
    free = shutil.disk_usage(there).free / 2**20
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return f"could not write {target}: {reason} ({free:,.0f} MiB free on the disk); what was saved before it is whole"


def flush_names(folder: Path) -> None:
    """Make what is named and renamed in `folder` reach the disk: a power cut undoes a rename whose folder has not."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flush(path: Path) -> None:
    """Make the bytes reach the disk before the name does, so that a power cut leaves no empty file of that name."""
    for entry in [path, *path.rglob("*")]:
        if entry.is_dir():
            flush_names(entry)
        else:
            with entry.open("rb") as stream:
                os.fsync(stream.fileno())


def remove(path: Path) -> None:
    """A file, a link or a folder, whether it is there or not."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
