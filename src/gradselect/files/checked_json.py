"""JSON files that know when they are damaged: each top-level key has the SHA-256 of its value beside it."""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gradselect.usage import UsageError

KEY = "sha256"


def sealed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values as JSON holds them, with the digest of each under "sha256". Unknown types become text.

    The digest covers the value, not its text: a file that is indented anew still matches.
    """
    plain = json.loads(json.dumps({name: value for name, value in values.items() if name != KEY}, default=str))
    return {**plain, KEY: _digests(plain)}


def read_json_text(path: Path) -> str:
    """Return the text of a JSON file; of a `.gz` file, what `gzip` packed.

    Raises:
        OSError: it cannot be read or unpacked.
        UnicodeDecodeError: it is no UTF-8.
    """
    data = path.read_bytes()
    if path.suffix == ".gz":
        try:
            data = gzip.decompress(data)
        except (EOFError, zlib.error) as error:
            raise OSError(f"cannot be unpacked: {error}") from None
    return data.decode("utf-8")


def plain_or_packed(path: Path) -> Path | None:
    """Return the file at `path`, or the one that `gzip` has made of it; None if there is neither."""
    candidates = (path, path.with_name(f"{path.name}.gz"))
    return next((each for each in candidates if each.exists()), None)


def json_files(folder: Path) -> list[Path]:
    """Return the JSON files of a folder, also those that `gzip` has packed, in order of names."""
    return sorted(path for pattern in ("*.json", "*.json.gz") for path in folder.glob(pattern))


def read_sealed(path: Path, *, needed: Sequence[str] = (), name: str | None = None) -> dict[str, Any]:
    """Return the values in a file, without their digests. A file from before there were digests is not checked.

    Args:
        path: of the file.
        needed: keys that it must have.
        name: name of the file in errors; by default its path.

    Raises:
        UsageError: names the file, and the key whose value is damaged.
    """
    name = name or str(path)
    try:
        values = json.loads(read_json_text(path))
    # A UnicodeDecodeError is a ValueError.
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{name}: damaged or half-written ({error}); put a copy back, or make it again") from None
    if not isinstance(values, dict):
        raise _damaged(name, f"it holds no object but {str(values)[:40]!r}")
    if KEY in values:
        seal = values.pop(KEY)
        _check_seal(name, values, seal if isinstance(seal, dict) else {})
    if missing := [key for key in needed if key not in values]:
        raise _damaged(name, f"it has no {missing[0]!r}")
    return values


def _check_seal(file: str, values: Mapping[str, Any], seal: Mapping[str, Any]) -> None:
    here = _digests(values)
    for name in sorted({*here, *seal}):
        if name not in here:
            raise _damaged(file, f"it has lost {name!r}")
        if here[name] != seal.get(name):
            raise _damaged(file, f"the value of {name!r} is not the one that was written")


def _digests(values: Mapping[str, Any]) -> dict[str, str]:
    return {
        name: hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
        for name, value in values.items()
    }


def _damaged(name: str, what: str) -> UsageError:
    return UsageError(f"{name}: damaged: {what}; put a copy back, or make it again")
