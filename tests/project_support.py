"""Scripts of the repository that are no package."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent


def matrix() -> Any:
    """Return the script .ci/matrix.py as a module."""
    if not (ROOT / ".ci").exists():
        pytest.skip("an sdist has no .ci")
    spec = importlib.util.spec_from_file_location("matrix", ROOT / ".ci" / "matrix.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
