"""Build wheel and sdist, look at both, and test the installed wheel while the source tree is out of the way.

    python .ci/wheel.py                    # the tests of TESTS
    python .ci/wheel.py -- -n auto tests   # others; what stands behind -- goes to pytest

The wheel is installed with the extra `train` into build/wheel/venv. The tests are those of the unpacked sdist, whose
src folder is removed, so `import gradselect` can only find the wheel.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PLACE = ROOT / "build" / "wheel"
TESTS = (
    "tests/test_packaging.py",
    "tests/test_quickstart.py",
    "tests/test_doctor.py",
    "tests/test_completion.py",
    "tests/test_cli.py",
    "tests/test_launch.py",
    "tests/test_report_run.py",
    "tests/test_optimizer.py",
    "tests/test_policy_contract.py",
    "tests/test_mask_contract.py",
    "tests/test_delta.py",
    "tests/test_examples.py",
)
"""Tests of what only a wheel can break: data files, entry points, the public names; and one of each part."""


def main() -> None:
    """Build, look, install, test."""
    words = sys.argv[1:]
    options = words[words.index("--") + 1 :] if "--" in words else list(TESTS)
    dist = PLACE / "dist"
    for folder in (dist, PLACE / "tests"):
        shutil.rmtree(folder, ignore_errors=True)
    _run([sys.executable, "-m", "build", "--outdir", dist, *_isolation()])
    wheel, sdist = next(dist.glob("*.whl")), next(dist.glob("*.tar.gz"))
    _run([sys.executable, "-m", "twine", "check", "--strict", wheel, sdist])
    _run([sys.executable, "-m", "check_wheel_contents", wheel])
    (ROOT / "dist").mkdir(exist_ok=True)
    for file in (wheel, sdist):
        shutil.copy(file, ROOT / "dist")

    python = _install(wheel)
    tests = _unpacked(sdist)
    _run([python, "-m", "pytest", "-p", "no:cacheprovider", *options], folder=tests)
    sys.stdout.write(f"{wheel.name}  {wheel.stat().st_size / 1e6:.1f} MB, tested; in dist/\n")


def _isolation() -> list[str]:
    """Build with what is installed here where the network lacks: GRADSELECT_NO_ISOLATION=1."""
    return ["--no-isolation"] if os.environ.get("GRADSELECT_NO_ISOLATION") else []


def _install(wheel: Path) -> Path:
    venv = PLACE / "venv"
    python = venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not python.exists():
        _run([sys.executable, "-m", "venv", venv])
    pip = [python, "-m", "pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt"]
    _run([*pip, f"{wheel}[train]", "pytest", "pytest-xdist", "hypothesis", "optuna", "pyright"])
    _run([*pip, "--no-deps", "--force-reinstall", wheel])  # also where the version is the same as before
    return python


def _unpacked(sdist: Path) -> Path:
    """Return the folder of the sdist without its sources."""
    with tarfile.open(sdist) as archive:
        archive.extractall(PLACE / "tests", filter="data")
    (folder,) = (PLACE / "tests").iterdir()
    shutil.rmtree(folder / "src")
    return folder


def _run(command: Sequence[str | Path], *, folder: Path = ROOT) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([str(word) for word in command], cwd=folder, env=environment, check=True)


if __name__ == "__main__":
    main()
