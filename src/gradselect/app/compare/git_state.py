"""Git commit of the library that computes."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gradselect.usage import listed

PACKAGE = Path(__file__).parents[1]


@dataclass(frozen=True, kw_only=True)
class SourceState:
    """State of the library's working tree.

    Args:
        commit: None if the library is installed and not a checkout.
        dirty: True if tracked files differ from that commit.
        changed: these files, from the top of the checkout.
    """

    commit: str | None
    dirty: bool
    changed: tuple[str, ...] = ()


def source_state() -> SourceState:
    """Return the state of the checkout that tracks this library; untracked in another checkout counts as none."""
    if _git("ls-files", "--error-unmatch", "__init__.py") is None:
        return SourceState(commit=None, dirty=False)
    commit = _git("rev-parse", "HEAD")
    changes = _git("status", "--porcelain", "--untracked-files=no")
    # Two letters, a blank, the path. The first letter may be a blank, which `_git` strips off the first line.
    changed = tuple(line.split(maxsplit=1)[1] for line in (changes or "").splitlines())
    return SourceState(commit=commit, dirty=bool(changes), changed=changed)


class WatchedSource:
    """The library's working tree, which may change while a comparison runs.

    Attributes:
        state: at the last look.

    Args:
        say: prints a line.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.state = SourceState(commit=None, dirty=False)
        self._say = say

    def look(self) -> None:
        """Look again. Say when the working tree begins to differ from its commit."""
        before, self.state = self.state, source_state()
        if self.state.dirty and not before.dirty:
            files = f" ({listed(self.state.changed)})" if self.state.changed else ""
            self._say(
                f"note       the clone differs from its last commit{files}: results are marked dirty, and tables omit "
                "them; keep a suite or recipe of your own in a new file, commit the changes, or see them with "
                "gradselect report --include-dirty"
            )


def _git(*words: str) -> str | None:
    """Return the output of git; None if it fails or is not installed."""
    try:
        done = subprocess.run(["git", "-C", str(PACKAGE), *words], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
