"""Locks: one process at a time writes into a folder, takes its turn, or owns a piece of work."""

from __future__ import annotations

import errno
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from gradselect.usage import UsageError

LOCK_NAME = ".lock"
_WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)

logger = logging.getLogger(__name__)


@contextmanager
def locked(folder: Path, *, name: str = "run.output") -> Iterator[None]:
    """Hold an exclusive lock on the folder, creating it if needed. Released when the process ends.

    Args:
        folder: where the lock file is; a link in its place is refused.
        name: the setting that names the folder, for errors.

    Raises:
        UsageError: another process holds it; says which. Or the folder cannot be made or written to.
    """
    path = folder / LOCK_NAME
    lock = FileLock(path, blocking=False, on_acquired=_write_owner)
    _acquire(lock, folder, name=name, warn=True)
    try:
        yield
    finally:
        # Before the release: afterwards the file may be the next owner's. Windows deletes no open file.
        with suppress(PermissionError):
            path.unlink(missing_ok=True)
        lock.release()


@contextmanager
def taking_turns(folder: Path, *, seconds: float, name: str, warn: bool = True) -> Iterator[None]:
    """Wait until no other process has its turn in the folder, then hold the lock of `locked`.

    The lock file stays: whoever waits for it has it open.

    Args:
        folder: where the lock file is; made if needed.
        seconds: longest wait.
        name: the setting that names the folder, for errors.
        warn: say that a file system has no locks.

    Raises:
        UsageError: another process has held it all the time; says which. Or the folder cannot be made or written to.
    """
    lock = FileLock(folder / LOCK_NAME, timeout=seconds, on_acquired=_write_owner)
    _acquire(lock, folder, name=name, warn=warn)
    try:
        yield
    finally:
        lock.release()


@contextmanager
def owned(path: Path) -> Iterator[None]:
    """Own a piece of work until the block or the process ends. The file at `path` is the sign of it.

    Take and give back ownership in turns, or `is_owned` may see a state in between.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path, blocking=False, on_acquired=_write_owner)
    with suppress(OSError):  # without locks there is one process only
        lock.acquire()
    try:
        yield
    finally:
        with suppress(PermissionError):
            path.unlink(missing_ok=True)
        lock.release()


def is_owned(path: Path) -> bool:
    """Return True if a process that is alive owns the work of this file."""
    if not path.exists():
        return False
    lock = FileLock(path, blocking=False)
    try:
        lock.acquire()
    except Timeout:
        return True
    except OSError:
        return False
    lock.release()
    return False


def _acquire(lock: FileLock, folder: Path, *, name: str, warn: bool) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        owner = _owner(folder / LOCK_NAME)
        raise UsageError(
            f"{name}={folder} is in use by {owner}; wait until it has ended, or choose another {name}"
        ) from None
    except OSError as error:
        if error.errno not in _WITHOUT_LOCKS:
            what = "written to" if folder.is_dir() else "made"
            raise UsageError(f"{name}={folder} cannot be {what}: {error}") from None
        if warn:
            logger.warning("%s is on a file system without locks: start no second process with this folder", folder)


def _write_owner(descriptor: int) -> None:
    os.truncate(descriptor, 0)
    os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())


def _owner(path: Path) -> str:
    with suppress(OSError, UnicodeDecodeError):
        return path.read_text("utf-8")[:200] or "another process"
    return "another process"
