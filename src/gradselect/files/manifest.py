"""Manifest of a checkpoint: size and SHA-256 of each file, by which a whole checkpoint is told from a damaged one."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gradselect.usage import UsageError

from .checked_json import KEY, read_sealed, sealed

MANIFEST_NAME = "gradselect-manifest.json"
"""Not `manifest.json`: a model may bring a file of that name."""
VERSION = 1


def write_manifest(folder: Path, *, step: int) -> None:
    """Write the manifest of `folder`, a checkpoint after `step` steps that is otherwise complete."""
    files = {
        name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for name, path in sorted(_files(folder).items())
    }
    text = json.dumps(sealed({"version": VERSION, "step": step, "files": files}), indent=1)
    (folder / MANIFEST_NAME).write_text(text + "\n", "utf-8")


def sha256(path: str | Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify(folder: Path) -> str | None:
    """Return the first fault of the checkpoint in `folder`, whose name is `step-N`: the file and what is wrong.

    Reads every byte; loads and changes nothing.

    Returns:
        None if exactly the files of the manifest are there, each as it was written.

    Example:
        >>> verify(Path("run/checkpoints/step-200"))  # doctest: +SKIP
        'optimizer.pt: 1,024 bytes, and 88,310 were written'
    """
    try:
        return next(_problems(folder), None)
    except OSError as error:
        return f"{Path(error.filename or folder).name}: cannot be read ({error.strerror})"


def digests_of_model(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each file of a model from its manifest; empty for a model that has none.

    Raises:
        UsageError: the manifest is damaged.
    """
    path = folder / MANIFEST_NAME
    if not path.is_file():
        return {}
    files = _read_with_seal(path)["files"]
    try:
        return {name: file["sha256"] for name, file in files.items()}
    except (AttributeError, KeyError, TypeError):
        raise UsageError(f"{path}: damaged: 'files' has no SHA-256 of each; put a copy back, or delete it") from None


def newest_whole(checkpoints: Sequence[Path]) -> tuple[Path | None, dict[Path, str]]:
    """Return the last checkpoint that verifies, or None, and the fault of each one after it."""
    damaged: dict[Path, str] = {}
    for checkpoint in reversed(checkpoints):
        problem = verify(checkpoint)
        if problem is None:
            return checkpoint, damaged
        damaged[checkpoint] = problem
    return None, damaged


def _problems(folder: Path) -> Iterator[str]:
    if folder.is_symlink() or not folder.is_dir():
        yield f"{folder.name}: a file or a link, and no folder"
        return
    try:
        manifest = _read(folder)
    except UsageError as error:
        yield f"{MANIFEST_NAME}: {error}"
        return
    if folder.name != f"step-{manifest['step']}":
        yield f"{MANIFEST_NAME}: step: it was written for step-{manifest['step']}"
    yield from _differences(manifest["files"], _files(folder))


def _differences(expected: Mapping[str, Mapping[str, Any]], there: Mapping[str, Path]) -> Iterator[str]:
    """Yield faults, the cheap ones to find first."""
    for name in expected:
        if name not in there:
            yield f"{name}: missing"
    for name in there:
        if name not in expected and name != MANIFEST_NAME:
            yield f"{name}: not among the files that were written"
    for name, file in expected.items():
        info = there[name].lstat()
        if not stat.S_ISREG(info.st_mode):
            yield f"{name}: no regular file"
        elif info.st_size != file["bytes"]:
            yield f"{name}: {info.st_size:,} bytes, and {file['bytes']:,} were written"
    for name, file in expected.items():
        if sha256(there[name]) != file["sha256"]:
            yield f"{name}: its SHA-256 is not that of the bytes that were written"


def _read(folder: Path) -> dict[str, Any]:
    """Return the manifest.

    Raises:
        UsageError: it is missing, damaged, or of another version.
    """
    path = folder / MANIFEST_NAME
    if not path.is_file() or path.is_symlink():
        raise UsageError("missing: half-written, or by a version that wrote no manifests")
    manifest = _read_with_seal(path)
    if manifest["version"] != VERSION:
        raise UsageError(f"version {manifest['version']}, and this one reads version {VERSION}")
    return manifest


def _read_with_seal(path: Path) -> dict[str, Any]:
    manifest = read_sealed(path, needed=("version", "step", "files"))
    if KEY not in json.loads(path.read_bytes()):
        raise UsageError(f"{path}: damaged: it has no {KEY!r}; put a copy back, or make it again")
    return manifest


def _files(folder: Path) -> dict[str, Path]:
    """Return all files and links below a folder, by relative path. Links are not followed."""
    found = (Path(root) / name for root, folders, names in os.walk(folder) for name in (*names, *folders))
    return {path.relative_to(folder).as_posix(): path for path in found if path.is_symlink() or not path.is_dir()}
