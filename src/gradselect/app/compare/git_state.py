"""Which version of this library computes."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).parents[1]


@dataclass(frozen=True, kw_only=True)
class SourceState:
    """The state of the library's working tree.

    Args:
        commit: None where the library is installed and not a checkout.
        dirty: whether tracked files differ from that commit.
    """

    commit: str | None
    dirty: bool


def source_state(package: Path = PACKAGE) -> SourceState:
    """The state of the checkout that `package` belongs to; one that lies untracked inside another is none."""
    if _git(package, "ls-files", "--error-unmatch", "__init__.py") is None:
        return SourceState(commit=None, dirty=False)
    commit = _git(package, "rev-parse", "HEAD")
    changes = _git(package, "status", "--porcelain", "--untracked-files=no")
    return SourceState(commit=commit, dirty=bool(changes))


def _git(folder: Path, *words: str) -> str | None:
    """What git says, or None if it says no or is not installed."""
    try:
        done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
