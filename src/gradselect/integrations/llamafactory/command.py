"""Runs LLaMA-Factory's own launcher, with selective training at the end of it."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gradselect.usage import UsageError

from .sections import Sections, read_sections

PROGRAM = "python -m gradselect.integrations.llamafactory"
USAGE = f"usage: {PROGRAM} train FILE.yaml [key=value ...]"
_TRAININGS = {
    False: {"train": ("llamafactory.train.tuner", "run_exp")},
    True: {
        "train": ("llamafactory.v1.trainers.sft_trainer", "run_sft"),
        "sft": ("llamafactory.v1.trainers.sft_trainer", "run_sft"),
        "rm": ("llamafactory.v1.trainers.rm_trainer", "run_rm"),
    },
}
"""Commands that train, and the function that does so, by whether it is LLaMA-Factory's v1."""

_ARGUMENTS = "GRADSELECT_LLAMAFACTORY_ARGUMENTS"
"""Environment variable with the arguments for torchrun's processes: the launcher cuts those it passes at spaces."""


def main(arguments: Sequence[str]) -> int:
    """Train as `llamafactory-cli` does, and return the exit code.

    Args:
        arguments: command, YAML file, `key=value`.
    """
    if any(each in ("-h", "--help", "help") for each in arguments[:1]):
        sys.stdout.write(f"{USAGE}\n")
        return 0
    return _exit_code(_launch, arguments)


def main_of_worker() -> int:
    """Train on the device of this process, and return the exit code."""
    return _exit_code(_work, json.loads(os.environ[_ARGUMENTS]))


def _exit_code(run: Callable[[Sequence[str]], None], arguments: Sequence[str]) -> int:
    try:
        run(arguments)
    except UsageError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except subprocess.CalledProcessError as error:  # torchrun's processes have said why
        return error.returncode if error.returncode > 0 else 128 - error.returncode
    return 0


def _launch(arguments: Sequence[str]) -> None:
    command, sections = _read(arguments)
    is_v1 = _is_v1()
    _version().check(sections)
    module, function = _TRAININGS[is_v1][command]
    training = importlib.import_module(module)
    launcher = importlib.import_module("llamafactory.v1.launcher" if is_v1 else "llamafactory.launcher")
    # The launcher trains in this process with a function that it imports when it needs it, or, with several devices,
    # has torchrun start its own file.
    original = getattr(training, function)
    worker = str(Path(__file__).with_name("worker.py"))
    os.environ[_ARGUMENTS] = json.dumps(list(arguments))
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])  # torchrun
    sys.argv = [PROGRAM, *arguments]
    with (
        _replaced(training, function, lambda: _version().train(sections, original)),
        _replaced(launcher, "__file__", worker),
    ):
        launcher.launch()


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _work(arguments: Sequence[str]) -> None:
    command, sections = _read(arguments)
    module, function = _TRAININGS[_is_v1()][command]
    _version().train(sections, getattr(importlib.import_module(module), function))


def _version() -> Any:
    """Return the module for the version of LLaMA-Factory that runs."""
    return importlib.import_module(f"{__package__}.version{int(_is_v1())}")


def _read(arguments: Sequence[str]) -> tuple[str, Sections]:
    """Return the command and what its file holds."""
    commands = _TRAININGS[_is_v1()]
    if not arguments or arguments[0] not in commands:
        given = arguments[0] if arguments else "nothing"
        raise UsageError(
            f"{PROGRAM} trains (commands: {', '.join(commands)}), and got {given!r}; {USAGE}; "
            "everything else: llamafactory-cli"
        )
    if len(arguments) < 2 or not arguments[1].endswith((".yaml", ".yml")):
        given = repr(arguments[1]) if len(arguments) > 1 else "nothing"
        raise UsageError(f"{arguments[0]} needs a YAML file with a section 'gradselect', and got {given}; {USAGE}")
    return arguments[0], read_sections(Path(arguments[1]), arguments[2:])


def _is_v1() -> bool:
    try:
        from llamafactory.extras.misc import is_env_enabled  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        if error.name != "llamafactory":
            raise
        raise UsageError(f"no package llamafactory beside {sys.executable}; pip install llamafactory") from None
    return is_env_enabled("USE_V1")
