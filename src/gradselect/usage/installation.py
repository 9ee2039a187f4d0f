"""Packages that an extra of this one needs."""

from __future__ import annotations

import importlib.metadata
import re
import shlex


def missing_packages(extra: str) -> list[str]:
    """Return the packages of an extra that are not installed, as `pip install` takes them.

    Example:
        >>> missing_packages("no such extra")
        []
    """
    try:
        requirements = importlib.metadata.requires("gradselect") or []
    except importlib.metadata.PackageNotFoundError:  # a source tree that was never installed
        return []
    found = []
    for requirement in requirements:
        package, _, marker = requirement.partition(";")
        name = re.split(r"[^A-Za-z0-9._-]", package.strip())[0]
        if re.search(rf"extra == ['\"]{re.escape(extra)}['\"]", marker) and name != "gradselect" and not _is_here(name):
            found.append(shlex.quote(package.strip()))
    return found


def _is_here(name: str) -> bool:
    try:
        importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
