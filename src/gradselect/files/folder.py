"""Folders that a user names for what is to be written."""

from __future__ import annotations

import tempfile
from pathlib import Path

from gradselect.usage import UsageError


def make_folder(path: Path, *, name: str) -> Path:
    """Make a folder, unless it is there, and try to write to it.

    Args:
        path: the folder.
        name: the setting that names it, for errors.

    Raises:
        UsageError: it cannot be made or written to.

    Example:
        >>> make_folder(Path("results"), name="output")  # doctest: +SKIP
        PosixPath('results')
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        what = "written to" if path.is_dir() else "made"
        raise UsageError(f"{name}={path} cannot be {what}: {error.strerror}; name another folder") from None
    return path
