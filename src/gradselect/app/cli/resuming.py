"""Advice and exit code when a signal or Ctrl-C stops a command."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import typer

INTERRUPTED_EXIT_CODE = 130


@contextmanager
def advice_when_stopped(words: Sequence[str], *, interrupted: str = "interrupted; resume with") -> Iterator[None]:
    """Print the command that resumes the work if a signal stops the block; then exit.

    Args:
        words: words of the command that resumes.
        interrupted: text before that command after Ctrl-C.

    Raises:
        Preempted: re-raised; it has its own exit code.
        typer.Exit: after Ctrl-C, with exit code 130.
    """
    try:
        yield
    except SystemExit as stopped:
        # Imported late because it is slow, and a command says at once what it does.
        from gradselect.app.runtime import Preempted

        if isinstance(stopped, Preempted):
            typer.echo(f"{stopped.message}; resume with: {shlex.join(words)}", err=True)
        raise
    except KeyboardInterrupt:
        typer.echo(f"{interrupted}: {shlex.join(words)}", err=True)
        raise typer.Exit(INTERRUPTED_EXIT_CODE) from None
