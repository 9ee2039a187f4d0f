"""What pip installs: version, type marker, data files, requirements; and warnings as pyproject.toml wants them."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from project_support import matrix

import gradselect
from gradselect.app.doctor.packages import FEATURES
from gradselect.usage import needed_packages

ROOT = Path(__file__).parent.parent
PACKAGE = Path(gradselect.__file__).parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


def test_the_version_is_that_of_the_installed_package(monkeypatch: pytest.MonkeyPatch) -> None:
    assert gradselect.__version__ == importlib.metadata.version("gradselect")
    monkeypatch.delattr(gradselect, "__version__")
    monkeypatch.setattr("importlib.metadata.version", lambda _: "9.8.7")
    assert gradselect.__version__ == "9.8.7"


def test_a_tree_that_was_never_installed_has_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: str) -> str:
        raise importlib.metadata.PackageNotFoundError

    assert gradselect.__version__
    monkeypatch.delattr(gradselect, "__version__")
    monkeypatch.setattr("importlib.metadata.version", fails)
    assert gradselect.__version__ == "0+unknown"


def test_type_checkers_are_told_that_the_package_has_types() -> None:
    assert (PACKAGE / "py.typed").is_file()


def test_files_that_are_no_modules_are_in_the_package() -> None:
    assert list((PACKAGE / "app" / "report").glob("*.jinja"))
    assert (PACKAGE / "integrations" / "launch" / "autostart" / "sitecustomize.py").is_file()


def test_what_a_wheel_takes_from_outside_of_the_package_is_there_and_small() -> None:
    """An index takes 100 MB; a stranger's patience less."""
    taken = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    files = [file for source in taken for file in [ROOT / source, *(ROOT / source).rglob("*")]]
    assert all((ROOT / source).exists() for source in taken)
    assert sum(file.stat().st_size for file in files if file.is_file()) < 4_000_000


def test_an_installed_wheel_holds_them() -> None:
    if PACKAGE.is_relative_to(ROOT):
        pytest.skip("runs in the source tree; make wheel tests the wheel")
    assert (PACKAGE / "app" / "quickstart" / "base" / "model.safetensors").is_file()
    assert (PACKAGE / "app" / "quickstart" / "quickstart.yaml").read_text("utf-8") == (
        ROOT / "recipes" / "quickstart.yaml"
    ).read_text("utf-8")


def test_the_strongest_of_two_bounds_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A build may write the requirements of an included extra beside those of the extra that includes it."""
    requirements = ["x>=5.6; extra == 'train'", "x>=5.17; extra == 'train'", "x>=5.9; extra == 'train'"]
    monkeypatch.setattr("importlib.metadata.requires", lambda _: requirements)
    assert [package.requirement for package in needed_packages("train")] == ["x>=5.17"]


def test_the_doctor_looks_at_every_extra_for_users() -> None:
    extras = PROJECT["project"]["optional-dependencies"].keys()
    assert set(FEATURES.values()) == extras - {"dev", "docs", "release"}


def test_every_python_that_is_promised_is_tested() -> None:
    promised = {
        line.split(" :: ")[-1]
        for line in PROJECT["project"]["classifiers"]
        if re.fullmatch(r"Programming Language :: Python :: 3\.\d+", line)
    }
    oldest = PROJECT["project"]["requires-python"].removeprefix(">=")
    jobs = matrix().JOBS.values()
    assert {version for version, kind in jobs if kind == "pinned"} == promised
    assert (oldest, "lowest") in jobs
    assert oldest in promised


def test_the_lowest_versions_are_the_bounds_of_pyproject() -> None:
    lowest = dict(line.split("==") for line in matrix().lowest_versions())
    bounds = PROJECT["project"]["dependencies"] + PROJECT["project"]["optional-dependencies"]["train"]
    for name in ("torch", "safetensors", "trl", "typer"):
        assert f"{name}>={lowest[name]}" in bounds
    assert f"transformers>={lowest['transformers']}" in PROJECT["project"]["optional-dependencies"]["train"]
    assert not {"gradselect[train]", "ruff"} & lowest.keys()


WARNINGS = """
import warnings

def warn(kind, module):
    warnings.warn_explicit("old", kind, "file.py", 1, module=module)

def test_own(): warn(UserWarning, "gradselect.blocks.optimizer")
def test_foreign(): warn(UserWarning, "trl.trainer")
def test_announced(): warn(FutureWarning, "gradselect.blocks.optimizer")
"""


@pytest.mark.parametrize(
    ("options", "failing"), [((), {"own"}), (("-W", "error"), {"own", "foreign", "announced"})], ids=["plain", "strict"]
)
def test_own_warnings_are_errors_and_foreign_ones_are_listed(
    tmp_path: Path, options: tuple[str, ...], failing: set[str]
) -> None:
    (tmp_path / "test_warnings.py").write_text(WARNINGS)
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    command = [sys.executable, "-m", "pytest", f"--config-file={ROOT / 'pyproject.toml'}", f"--rootdir={tmp_path}"]
    command += ["-p", "no:cacheprovider", "-rf", *options, str(tmp_path / "test_warnings.py")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    assert set(re.findall(r"^FAILED .*::test_(\w+)", done.stdout, re.MULTILINE)) == failing, done.stdout
    assert "trl" in done.stdout or "file.py:1" in done.stdout
