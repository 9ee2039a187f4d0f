"""Run the tests on several Pythons, and with the oldest and the newest versions that pyproject.toml promises.

    python .ci/matrix.py --list
    python .ci/matrix.py                                  # all jobs whose Python is here, one after another
    python .ci/matrix.py py3.12-pinned -- -x tests/test_optimizer.py

Each job fills an environment of its own, .venv-matrix/<job> or FOLDER/<job>, and leaves there versions.txt and
test.log. An environment that is there is kept, and only what is missing is installed. Jobs whose Python is not here are
listed, and fail only if they were named. Needs nothing but Python; CI runs the same script.

Without an index of CPU builds pip takes builds of torch for CUDA, 5 GB for each environment:

    PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu python .ci/matrix.py
"""

from __future__ import annotations

import argparse
import glob
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENTS = ROOT / ".venv-matrix"
JOBS = {
    "py3.11-pinned": ("3.11", "pinned"),
    "py3.12-pinned": ("3.12", "pinned"),
    "py3.13-pinned": ("3.13", "pinned"),
    "py3.11-lowest": ("3.11", "lowest"),
    "py3.11-newest": ("3.11", "newest"),
    "py3.13-newest": ("3.13", "newest"),
}
"""Python and kind of versions: those of constraints.txt, the lower bounds of pyproject.toml, or what pip finds."""
EXTRAS = ("transformers", "train", "tune", "dev")
NOT_FOR_TESTS = ("ruff", "pyright", "import-linter")
STRICT = {"pinned": ("-W", "error"), "lowest": (), "newest": ()}
"""With other versions than the pinned ones, warnings of other packages are listed: see pyproject.toml."""


def main() -> None:
    """Run the jobs, and print a table of what came of them."""
    arguments, options = _split(sys.argv[1:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("jobs", nargs="*", metavar="JOB", help="default: all")
    parser.add_argument("--list", action="store_true", help="print the jobs and their Pythons")
    parser.add_argument("--folder", type=Path, default=ENVIRONMENTS, help="of the environments; default: .venv-matrix")
    parser.add_argument("--install-only", action="store_true", help="fill the environments, and run no test")
    chosen = parser.parse_args(arguments)
    unknown = [job for job in chosen.jobs if job not in JOBS]
    if unknown:
        parser.error(f"no job {unknown[0]!r}; there are: {', '.join(JOBS)}")
    if chosen.list:
        for job, (version, _) in JOBS.items():
            print(f"{job:<16} {find_python(version) or f'no Python {version} here'}")
        return
    rows = [
        _run(
            job,
            chosen.folder.absolute() / job,
            named=job in chosen.jobs,
            install_only=chosen.install_only,
            options=options,
        )
        for job in chosen.jobs or JOBS
    ]
    print("\n" + "\n".join(text for text, _ in rows))
    raise SystemExit(0 if all(good for _, good in rows) else 1)


def lowest_versions() -> list[str]:
    """Return `name==version` for every lower bound of pyproject.toml that the tests need."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    wanted = [*project["dependencies"], *(line for extra in EXTRAS for line in project["optional-dependencies"][extra])]
    oldest: dict[str, str] = {}
    for requirement in wanted:
        name, _, version = requirement.partition(">=")
        if name.startswith(("gradselect", *NOT_FOR_TESTS)) or not version:
            continue
        if _numbers(version) > _numbers(oldest.get(name, "0")):  # an extra may ask for more than the one it includes
            oldest[name] = version
    return [f"{name}=={version}" for name, version in oldest.items()]


def find_python(version: str) -> str | None:
    """Return a Python of this version, as `3.12`: the one that runs this, one on the path, or one of pyenv."""
    names = [sys.executable, shutil.which(f"python{version}") or ""]
    names += sorted(glob.glob(os.path.expanduser(f"~/.pyenv/versions/{version}.*/bin/python")), reverse=True)
    return next((name for name in names if name and _version_of(name) == version), None)


def _split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return our own words, and those behind -- for pytest."""
    end = list(words).index("--") if "--" in words else len(words)
    return list(words[:end]), list(words[end + 1 :])


def _run(job: str, folder: Path, *, named: bool, install_only: bool, options: Sequence[str]) -> tuple[str, bool]:
    version, kind = JOBS[job]
    python = find_python(version)
    if python is None:
        return f"{job:<16} no Python {version} here", not named
    start = time.monotonic()
    try:
        inside = _fill(folder, python=python, kind=kind)
    except subprocess.CalledProcessError as error:
        return f"{job:<16} cannot be installed: exit code {error.returncode}", False
    versions = _output([inside, "-m", "pip", "freeze", "--exclude-editable"])
    (folder / "versions.txt").write_text(versions, encoding="utf-8")
    found = " ".join(line for line in versions.splitlines() if re.match(r"(torch|transformers|trl)==", line))
    if install_only:
        return f"{job:<16} installed in {time.monotonic() - start:.0f} s: {found}", True
    command = [inside, "-m", "pytest", *STRICT[kind], *(options or ["--numprocesses", "auto"])]
    with (folder / "test.log").open("w", encoding="utf-8") as log:
        done = subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, check=False)
    lines = (folder / "test.log").read_text(encoding="utf-8").splitlines() or ["no output"]
    print(*(line for line in lines if line.startswith(("FAILED", "ERROR"))), sep="\n")
    text = f"{job:<16} {lines[-1].strip('= ')}, {time.monotonic() - start:.0f} s with installation: {found}"
    return text, done.returncode == 0


def _fill(folder: Path, *, python: str, kind: str) -> str:
    """Make the environment, and return its Python."""
    inside = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not inside.exists():
        subprocess.run([python, "-m", "venv", folder], check=True)
    install = [inside, "-m", "pip", "install", "--quiet", "--editable", ".[train,dev]"]
    if kind == "pinned":
        install += ["--constraint", "constraints.txt"]
    elif kind == "lowest":
        (folder / "lowest.txt").write_text("\n".join(lowest_versions()) + "\n", encoding="utf-8")
        install += ["--constraint", folder / "lowest.txt"]
    else:
        install += ["--upgrade", "--upgrade-strategy", "eager"]
    subprocess.run(install, cwd=ROOT, check=True)
    return str(inside)


def _version_of(python: str) -> str | None:
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    try:
        return _output([python, "-c", code]).strip()
    except (OSError, subprocess.CalledProcessError):  # a shim of pyenv whose version is not active
        return None


def _output(command: Sequence[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)))


if __name__ == "__main__":
    main()
