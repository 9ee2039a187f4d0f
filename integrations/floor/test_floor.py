"""The main tests of integrations pass with the oldest versions that pyproject.toml allows."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted(
    path.name
    for pattern in ("integration_*", "trainer_*", "accelerate", "giving_back", "reach_models", "methods*")
    for path in (ROOT / "tests").glob(f"test_{pattern}.py")
)


def test_the_versions_are_the_oldest():
    lines = (Path(sys.executable).parent / "oldest.txt").read_text().split()
    for name, oldest in (line.split("==") for line in lines):
        assert version(name.split("[")[0]).startswith(oldest), name


@pytest.mark.parametrize("name", FILES)
def test_file_passes(name):
    """Old versions warn of what newer ones have changed, so warnings of others are no errors here."""
    command = [sys.executable, "-m", "pytest", f"tests/{name}", "-p", "no:cacheprovider"]
    for kind in ("DeprecationWarning", "FutureWarning"):
        command += ["-W", f"ignore::{kind}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800)
    assert done.returncode in (0, 5), done.stdout[-6000:]
