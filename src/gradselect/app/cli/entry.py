"""Entry point of `gradselect`: the commands of the command line, and those that need none of its packages."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from gradselect.usage import UsageError

USAGE_EXIT_CODE = 2


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line. A `UsageError` prints one message and exits with code 2.

    `launch` and `plugin-path` are for other frameworks' environments, which may have neither typer nor rich.
    """
    words = sys.argv[1:] if arguments is None else list(arguments)
    if words[:1] in (["launch"], ["plugin-path"]):
        raise SystemExit(_run_plain(words))
    from .command_line import main as run

    run(arguments)


def _run_plain(words: Sequence[str]) -> int:
    try:
        if words[0] == "launch":
            from .launch import launch

            return launch(words[1:])
        from .plugin_path import show_plugin_path

        return show_plugin_path(words[1:])
    except UsageError as error:
        sys.stderr.write(f"error: {error}\n")
        return USAGE_EXIT_CODE
