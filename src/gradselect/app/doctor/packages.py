"""Versions, and which features the installed packages are enough for."""

from __future__ import annotations

import platform
import shutil
import sys
from collections.abc import Iterator

from gradselect import __version__
from gradselect.usage import NeededPackage, install_command, installed_version, needed_packages

from .findings import Finding, Status

FEATURES = {
    "Trainer of transformers": "transformers",
    "gradselect train, evaluate, compare, report": "train",
    "gradselect tune": "tune",
    "gradselect evaluate --task generation": "generation",
    "gradselect evaluate --harness": "harness",
    "methods of other packages, for comparison": "peers",
}
"""Features and the extras that they need."""
ALSO_NAMED = ("bitsandbytes", "torchao", "deepspeed", "liger-kernel", "kernels", "triton")
"""Packages that decide what torch and transformers do; their versions belong into a report of a fault."""


def versions() -> Iterator[Finding]:
    """Yield Python, this package, and what it always needs."""
    python = f"{platform.python_version()}, {platform.system()} {platform.release()}, {platform.machine()}"
    yield Finding(name="python", status=Status.OK, text=f"{python}, {sys.executable}")
    yield Finding(name="gradselect", status=Status.OK, text=__version__)
    for package in needed_packages():
        yield _of_package(package)
    named = [f"{name} {version}" for name in ALSO_NAMED if (version := installed_version(name))]
    if named:
        yield Finding(name="also here", status=Status.OK, text=", ".join(named))


def features() -> Iterator[Finding]:
    """Yield a finding for each feature that needs more than the library does."""
    yield Finding(name="own training loops", status=Status.OK, text="ready")
    for name, extra in FEATURES.items():
        yield _of_feature(name, needed_packages(extra))
    compiler = shutil.which("g++") or shutil.which("clang++") or shutil.which("cl")
    if compiler:
        yield Finding(name="torch.compile on a CPU", status=Status.OK, text=f"compiler {compiler}")
    else:
        yield Finding(
            name="torch.compile on a CPU",
            status=Status.MISSING,
            text="no C++ compiler",
            advice="install g++ or clang",
        )


def _of_package(package: NeededPackage) -> Finding:
    if package.lack:
        return Finding(name=package.name, status=Status.BROKEN, text=package.lack, advice=install_command([package]))
    return Finding(name=package.name, status=Status.OK, text=str(package.installed))


def _of_feature(name: str, packages: list[NeededPackage]) -> Finding:
    lacking = [package for package in packages if package.lack]
    if not packages:
        text = "its packages are not known: gradselect was not installed with pip"
        return Finding(name=name, status=Status.NOTE, text=text, advice="pip install gradselect")
    if not lacking:
        return Finding(name=name, status=Status.OK, text="ready")
    text = ", ".join(package.lack for package in lacking)
    return Finding(name=name, status=Status.MISSING, text=text, advice=install_command(lacking))
