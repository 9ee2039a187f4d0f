"""Packages that this one needs, and those that are missing or too old."""

from __future__ import annotations

import importlib.metadata
import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class NeededPackage:
    """A package that gradselect or one of its extras needs.

    Args:
        name: name on the index.
        requirement: as pip takes it: "typer>=0.20".
        oldest: oldest version that will do; empty if any will.
        installed: version that is here; None if the package is missing.

    Example:
        >>> NeededPackage(name="rich", requirement="rich>=14.0", oldest="14.0", installed="13.9.4").lack
        'rich 13.9.4 is older than 14.0'
    """

    name: str
    requirement: str
    oldest: str
    installed: str | None

    @property
    def lack(self) -> str:
        """Reason why it will not do; empty if it will."""
        if self.installed is None:
            return f"no {self.name}"
        if _numbers(self.installed) < _numbers(self.oldest):
            return f"{self.name} {self.installed} is older than {self.oldest}"
        return ""


def needed_packages(extra: str | None = None) -> list[NeededPackage]:
    """Return the packages of an extra, or those that the library always needs, by name.

    Example:
        >>> needed_packages("no such extra")
        []
    """
    try:
        requirements = importlib.metadata.requires("gradselect") or []
    except importlib.metadata.PackageNotFoundError:  # a source tree that was never installed
        return []
    found: dict[str, NeededPackage] = {}
    for requirement in requirements:
        text, _, marker = (part.strip() for part in requirement.partition(";"))
        name = re.split(r"[^A-Za-z0-9._-]", text)[0]
        of_extra = re.search(r"extra == ['\"]([^'\"]+)['\"]", marker)
        if name == "gradselect" or (of_extra and of_extra[1]) != extra:
            continue
        oldest = re.search(r">=\s*([\w.]+)", text)
        package = NeededPackage(
            name=name, requirement=text, oldest=oldest[1] if oldest else "", installed=installed_version(name)
        )
        # An extra that includes another one may ask for a newer version of the same package.
        if name not in found or _numbers(found[name].oldest) < _numbers(package.oldest):
            found[name] = package
    return list(found.values())


def lacking_packages(extra: str) -> list[NeededPackage]:
    """Return the packages of an extra that are missing or too old.

    Example:
        >>> lacking_packages("no such extra")
        []
    """
    return [package for package in needed_packages(extra) if package.lack]


def install_command(packages: Iterable[NeededPackage]) -> str:
    """Return the command that installs them.

    Example:
        >>> install_command([NeededPackage(name="rich", requirement="rich>=14.0", oldest="14.0", installed=None)])
        "pip install 'rich>=14.0'"
    """
    return " ".join(["pip install", *(shlex.quote(package.requirement) for package in packages)])


def installed_version(name: str) -> str | None:
    """Return the version of an installed package; None if there is none.

    Example:
        >>> installed_version("no such package")
    """
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    """Return the numbers that a version begins with: 2.13.0+cpu is (2, 13, 0)."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, found[0].split("."))) if found else ()
