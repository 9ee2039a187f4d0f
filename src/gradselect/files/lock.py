"""One process at a time writes into the folder of a run."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from gradselect.usage import UsageError

LOCK_NAME = ".lock"
_WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)

logger = logging.getLogger(__name__)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """No other process is inside with the same folder, which is made; a process that ends in any way is inside no more.

    Raises:
        UsageError: another one is; says which. Or the folder cannot be made or written to.
    """
    path = folder / LOCK_NAME
    try:
        file = _lock(path)
    except OSError as error:
        what = "written to" if folder.is_dir() else "made"
        raise UsageError(f"run.output={folder} cannot be {what}: {error}") from None
    with file:
        try:
            yield
        finally:
            # While it is locked still: by now another process may wait for nothing but the name.
            path.unlink(missing_ok=True)


def _lock(path: Path) -> IO[str]:
    """The file at `path`, made and locked, with what this process is called in it."""
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        # A link would have what it leads to emptied.
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW), "r+", encoding="utf-8")
        _lock_file(file, path)
        if _is_at(path, file):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
            return file
        # Its owner has taken it away after it was opened here.
        file.close()


def _lock_file(file: IO[str], path: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = file.read(200) or "another process"
        file.close()
        raise UsageError(
            f"run.output={path.parent} is in use by {owner}, which trains there; wait until it has ended, or choose "
            "another run.output"
        ) from None
    except OSError as error:
        if error.errno not in _WITHOUT_LOCKS:
            file.close()
            raise
        logger.warning("%s is on a file system without locks: start no second process with this folder", path.parent)


def _is_at(path: Path, file: IO[str]) -> bool:
    return path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno()))
