"""Atomic writes: a file or folder appears whole under its name, or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from gradselect.usage import UsageError


def writing_aside(target: Path) -> AbstractContextManager[Path]:
    """Give a path to write a file or a folder to. It is renamed to `target` when the block ends without an error.

    Raises:
        UsageError: the disk is full or cannot be written to. Whatever had the name before is untouched.
    """
    return _replacing(target, aside_of(target))


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a small file, text as UTF-8. If several processes write it at once, the last one wins.

    Raises:
        UsageError: as `writing_aside` does.
    """
    with _replacing(path, path.with_name(f".{path.name}.{os.getpid()}.partial")) as aside:
        aside.write_bytes(content.encode() if isinstance(content, str) else content)


def aside_of(target: Path) -> Path:
    """Return the path that `writing_aside` writes to: the same in every process."""
    return target.with_name(f".{target.name}.partial")


@contextmanager
def _replacing(target: Path, aside: Path) -> Iterator[Path]:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        remove(aside)
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
        with suppress(OSError):
            remove(aside)


def _unwritable(target: Path, error: Exception) -> str:
    there = next(parent for parent in target.absolute().parents if parent.exists())
    free = shutil.disk_usage(there).free / 2**20
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return f"could not write {target}: {reason} ({free:,.0f} MiB free on the disk); what was saved before is intact"


def flush_names(folder: Path) -> None:
    """Flush names and renames in `folder` to the disk; a power cut undoes a rename whose folder was not flushed."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flush(path: Path) -> None:
    """Flush the bytes before the rename, so that a power cut leaves no empty file of that name."""
    for entry in [path, *path.rglob("*")]:
        if entry.is_dir():
            flush_names(entry)
        else:
            with entry.open("rb") as stream:
                os.fsync(stream.fileno())


def remove(path: Path) -> None:
    """Delete a file, a link (not its target) or a folder; do nothing if there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
