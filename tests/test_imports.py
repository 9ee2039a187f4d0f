"""The public list is right, and importing the library is cheap. Who may import whom stands in pyproject.toml."""

from __future__ import annotations

import subprocess
import sys
from types import ModuleType

import pytest

import gradselect

HEAVY = ("transformers", "trl", "peft", "datasets", "accelerate", "pydantic", "typer", "numpy.testing", "matplotlib")
LIGHT_PARTS = {
    "gradselect": HEAVY,
    "gradselect.app.compare": ("trl", "peft", "transformers.trainer", "matplotlib"),
    "gradselect.app.evaluate": ("transformers", "trl", "datasets", "math_verify"),
    "gradselect.app.recipe": ("transformers", "trl", "datasets"),
    "gradselect.app.tune": ("optuna", "trl", "transformers"),
    "gradselect.app.cli": ("transformers", "trl", "peft", "datasets", "pydantic"),
}


def test_the_application_can_be_imported_without_modules_of_unix() -> None:
    """Windows has neither `fcntl` nor `resource`; filelock and psutil do without them there, and only there."""
    code = (
        "import filelock, psutil, sys; sys.modules.update(fcntl=None, resource=None); "
        "import gradselect.app.cli, gradselect.app.compare, gradselect.app.evaluate, gradselect.app.train"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_public_list_is_what_the_module_offers():
    public = {name for name, value in vars(gradselect).items() if not name.startswith("_")}
    modules = {name for name in public if isinstance(getattr(gradselect, name), ModuleType)}
    assert len(set(gradselect.__all__)) == len(gradselect.__all__)
    assert public - modules == set(gradselect.__all__) - modules
    assert set(gradselect.__all__) & modules == {"salience"}


@pytest.mark.parametrize("name", LIGHT_PARTS)
def test_an_import_loads_nothing_heavier_than_it_needs(name: str) -> None:
    code = f"import {name}, sys; sys.exit(' '.join(n for n in {LIGHT_PARTS[name]!r} if n in sys.modules) or 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
