"""Pointers of Git LFS: what a clone holds in place of large files that were not fetched."""

from __future__ import annotations

from pathlib import Path

from gradselect.usage import UsageError

BEGINNING = b"version https://git-lfs.github.com/spec/"
LONGEST = 1024
"""Bytes of a pointer, by the specification of Git LFS."""


def check_no_pointer(path: Path) -> None:
    """Refuse a pointer of Git LFS: as a text it would be read as data, as weights it is called damaged.

    Raises:
        UsageError: the file is one.

    Example:
        >>> check_no_pointer(Path("no such file"))
    """
    try:
        if not path.is_file() or path.stat().st_size > LONGEST:
            return
        with path.open("rb") as file:
            is_pointer = file.read(len(BEGINNING)) == BEGINNING
    except OSError:  # whoever reads the file says more
        return
    if is_pointer:
        raise UsageError(f"{path} is a pointer of Git LFS and not the file itself; fetch it: git lfs pull")
