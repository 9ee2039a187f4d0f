"""Entry point of `gradselect`: the commands of the command line, and those that need none of its packages."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from gradselect.usage import UsageError

USAGE_EXIT_CODE = 2


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line. A `UsageError` prints one message and exits with code 2.

    `launch` and `plugin-path` are for other frameworks' environments, which may have neither typer nor rich; `doctor`
    and `--version` tell what an environment has.
    """
    words = sys.argv[1:] if arguments is None else list(arguments)
    if words[:1] in (["launch"], ["plugin-path"], ["doctor"], ["--version"]):
        raise SystemExit(_run_plain(words))
    from .command_line import main as run

    run(arguments)


def _run_plain(words: Sequence[str]) -> int:
    try:
        return _plain_command(words[0])(words[1:])
    except UsageError as error:
        sys.stderr.write(f"error: {error}\n")
        return USAGE_EXIT_CODE


def _plain_command(name: str) -> Callable[[Sequence[str]], int]:
    """Return a command that needs no package of the command line. Each imports its own."""
    if name == "launch":
        from .launch import launch

        return launch
    if name == "plugin-path":
        from .plugin_path import show_plugin_path

        return show_plugin_path
    if name == "doctor":
        from .doctor import doctor

        return doctor
    return _show_version


def _show_version(_: Sequence[str]) -> int:
    from gradselect import __version__

    sys.stdout.write(f"gradselect {__version__}\n")
    return 0
