"""The public list is right, and importing the library is cheap. Who may import whom stands in pyproject.toml."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import gradselect

HEAVY = ("transformers", "trl", "peft", "datasets", "accelerate", "pydantic", "typer", "numpy.testing", "matplotlib")
LIGHT_PARTS = {
    "gradselect.public_names": HEAVY,  # what the first name of `gradselect` that is asked for loads
    "gradselect.app.cli": ("transformers", "trl", "peft", "datasets", "pydantic"),
    "gradselect.app.recipe": ("transformers", "trl", "datasets"),
    "gradselect.app.evaluate": ("transformers", "trl", "datasets", "math_verify", "lm_eval"),
    "gradselect.app.tune": ("transformers", "trl", "optuna"),
    "gradselect.app.compare": ("transformers.trainer", "trl", "peft", "matplotlib"),
}
"""Packages that each part must not load. In this order: a part that may load one stands behind those that may not."""

CODE = f"""
import filelock, psutil, importlib, json, sys  # both do without modules of Unix on Windows, and only there
sys.modules.update(fcntl=None, resource=None)
loaded = {{}}
for name, heavy in {LIGHT_PARTS!r}.items():
    importlib.import_module(name)
    loaded[name] = [package for package in heavy if package in sys.modules]
import gradselect.app.train
print(json.dumps(loaded))
"""


@pytest.fixture(scope="module")
def loaded() -> dict[str, list[str]]:
    """Import everything in one fresh process that has neither `fcntl` nor `resource`, as on Windows."""
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", LIGHT_PARTS)
def test_an_import_loads_nothing_heavier_than_it_needs(name: str, loaded: dict[str, list[str]]) -> None:
    assert loaded[name] == []


def test_the_application_can_be_imported_without_modules_of_unix(loaded: dict[str, list[str]]) -> None:
    assert loaded.keys() == LIGHT_PARTS.keys()


def test_a_type_checker_sees_the_names_and_no_others():
    """A module with `__getattr__` would have every name for it, misspelt ones too."""
    tree = ast.parse(Path(gradselect.__file__).read_text())
    seen = [name for name in tree.body if not (isinstance(name, ast.If) and "not" in ast.unparse(name.test))]
    assert "import *" in "".join(map(ast.unparse, seen))
    assert "__getattr__" not in "".join(map(ast.unparse, seen))
    with pytest.raises(AttributeError, match="module 'gradselect' has no attribute 'Adagradselect'"):
        _ = gradselect.Adagradselect


def test_a_name_that_was_replaced_stays_so(monkeypatch):
    monkeypatch.setattr(gradselect, "plan", None)
    assert not hasattr(gradselect, "misspelt")
    assert gradselect.plan is None


def test_public_list_is_what_the_module_offers():
    public = {name for name, value in vars(gradselect).items() if not name.startswith("_")}
    modules = {name for name in public if isinstance(getattr(gradselect, name), ModuleType)}
    assert len(set(gradselect.__all__)) == len(gradselect.__all__)
    assert public - modules == set(gradselect.__all__) - modules
    assert set(gradselect.__all__) & modules == {"salience"}


def test_the_command_line_speaks_before_torch_is_loaded() -> None:
    code = "import sys, gradselect.app.cli.command_line; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_name_that_is_not_there_is_refused() -> None:
    assert "AdaGradSelect" in dir(gradselect)
    with pytest.raises(AttributeError, match="module 'gradselect' has no attribute 'AdamSelect'"):
        _ = gradselect.AdamSelect  # pyright: ignore[reportAttributeAccessIssue]
