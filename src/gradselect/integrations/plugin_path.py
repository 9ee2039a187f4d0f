"""Paths of the files that frameworks want to be told of."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from gradselect.usage import UsageError

PLUGIN_PATHS: Mapping[str, Path] = MappingProxyType({"swift": Path(__file__).parent / "swift" / "plugin.py"})
"""File of each framework that loads plug-ins by path."""


def plugin_path(framework: str) -> Path:
    """Return the file that makes gradselect known to a framework.

    Args:
        framework: "swift" for ms-swift's `--external_plugins`.

    Raises:
        UsageError: no such framework loads plug-ins by path.

    Example:
        >>> plugin_path("swift").name
        'plugin.py'
    """
    if framework not in PLUGIN_PATHS:
        raise UsageError(
            f"no plug-in file for {framework!r}; frameworks that load one by its path: {', '.join(PLUGIN_PATHS)}"
        )
    return PLUGIN_PATHS[framework]
