"""The command `gradselect plugin-path`. It needs no typer, so that it runs where only gradselect was added."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from gradselect.integrations.plugin_path import PLUGIN_PATHS, plugin_path
from gradselect.usage import UsageError

HELP = f"""Usage: gradselect plugin-path FRAMEWORK

  Print the path of the file that makes gradselect known to a framework which loads plug-ins by path:
  {", ".join(PLUGIN_PATHS)}.

  swift sft --external_plugins $(gradselect plugin-path swift) ...
"""


def show_plugin_path(words: Sequence[str]) -> int:
    """Print the path of a framework's plug-in. Return the exit code.

    Raises:
        UsageError: not one known framework is named.
    """
    if list(words) in ([], ["-h"], ["--help"]):
        sys.stdout.write(HELP)
        return 0
    if len(words) > 1:
        raise UsageError(f"gradselect plugin-path takes one framework, got {' '.join(words)}")
    sys.stdout.write(f"{plugin_path(words[0])}\n")
    return 0
