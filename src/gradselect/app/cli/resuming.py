"""What a command says when a signal or Ctrl-C stops it: the line that continues the work, and the exit code."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import typer

INTERRUPTED_EXIT_CODE = 130


@contextmanager
def advice_when_stopped(words: Sequence[str], *, interrupted: str = "interrupted; go on with") -> Iterator[None]:
    """Print the command that continues the work when the block is stopped, then let the process end.

    Args:
        words: the command that continues, word by word.
        interrupted: what is said before that command after Ctrl-C.

    Raises:
        Preempted: passed on; it carries its own exit code.
        typer.Exit: after Ctrl-C, with exit code 130.
    """
    from gradselect.app.runtime import Preempted

    try:
        yield
    except Preempted as stopped:
        typer.echo(f"{stopped.message}; go on with: {shlex.join(words)}", err=True)
        raise
    except KeyboardInterrupt:
        typer.echo(f"{interrupted}: {shlex.join(words)}", err=True)
        raise typer.Exit(INTERRUPTED_EXIT_CODE) from None
