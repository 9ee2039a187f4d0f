"""The command `gradselect launch`. It needs no typer, so that it runs where only gradselect was added."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradselect as gs
from gradselect.integrations.launch import SETTINGS, environment, num_trained
from gradselect.usage import UsageError

HELP = """Usage: gradselect launch METHOD [KEY=VALUE]... -- COMMAND...

  Train selectively in any command that ends in a transformers Trainer. The command stays as it is; processes that it
  starts (accelerate, torchrun) train selectively too.

  gradselect launch adagradselect fraction=0.3 always=embedding -- trl sft --model_name_or_path ... --dataset_name ...
  gradselect launch id3 density=0.01 -- llamafactory-cli train recipe.yaml
  gradselect launch recipes/gsm8k.yaml jsonl=selection.jsonl -- axolotl train config.yaml

Arguments:
  METHOD       Name of a method that selects (adagradselect, gradnorm, uniform, lisa, badam, id3, static, gmt, ...), or
               a recipe, whose section `method` is taken. docs/recipes.md lists all names and keys.
  KEY=VALUE    Keys of the method; jsonl=FILE writes a record of each step to a file.
  COMMAND      The command, with its own arguments.

Exit codes: those of COMMAND; 2 for a usage error, or if COMMAND ended well and no Trainer has trained.
"""


def launch(words: Sequence[str]) -> int:
    """Run a command whose Trainers train selectively. Return its exit code.

    Args:
        words: METHOD [KEY=VALUE]... -- COMMAND...

    Raises:
        UsageError: the words do not fit, the command cannot be started, or nothing in it has trained.
    """
    if not words or words[0] in ("-h", "--help"):
        sys.stdout.write(HELP)
        return 0
    settings, command = _parse(words)
    jsonl = settings.pop("jsonl", None)
    gs.method(settings)
    _check(jsonl)
    with tempfile.TemporaryDirectory(prefix="gradselect-") as folder:
        trained = Path(folder) / "trained"
        code = _run(command, environment(settings, jsonl=jsonl, trained=trained))
        count = num_trained(trained)
    if count:
        _say(f"gradselect launch: {count} training{'s' * (count > 1)} with {settings['name']}")
    elif code == 0:
        raise UsageError(
            f"{command[0]!r} has ended, but no Trainer of transformers has trained in it, so nothing was selective; "
            "launch a command that trains, with a Python that reads PYTHONPATH (no -I, -E or -S)"
        )
    return code


def _parse(words: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Return the settings of the method and the command."""
    from gradselect.integrations.words import read_words

    if "--" not in words:
        raise UsageError(
            "gradselect launch needs -- before the command; write e.g. "
            "gradselect launch adagradselect fraction=0.2 -- trl sft ..."
        )
    split = list(words).index("--")
    (name, *pairs), command = words[:split] or [""], list(words[split + 1 :])
    if not name or "=" in name:
        raise UsageError(f"gradselect launch needs a method first, got {name!r}; write e.g. adagradselect fraction=0.2")
    if not command:
        raise UsageError("gradselect launch has no command behind --; write e.g. -- trl sft ...")
    typed = read_words([name, *(pair.removeprefix("method.") for pair in pairs)], source="gradselect launch")
    if not name.endswith((".yaml", ".yml")):
        return typed, command
    from gradselect.app.recipe import merge

    del typed["name"]  # which is the path
    return merge(_section(Path(name)), typed), command


def _check(jsonl: Any) -> None:
    """Refuse what would end the command at its first step, after minutes of loading."""
    if os.environ.get(SETTINGS):
        raise UsageError(
            "gradselect launch within gradselect launch: each chooses what its command trains; leave one of them out"
        )
    if jsonl is None:
        return
    if not isinstance(jsonl, str) or Path(jsonl).is_dir() or not Path(jsonl).absolute().parent.is_dir():
        raise UsageError(f"jsonl={jsonl!r} is no file in a folder that exists; write e.g. jsonl=selection.jsonl")


def _section(path: Path) -> dict[str, Any]:
    """Return the section `method` of a recipe, or a file that is such a section."""
    from gradselect.app.recipe import read_values

    values = read_values(path, kind="recipe", sections=("method",))
    section = values.get("method", values if "name" in values else None)
    if not isinstance(section, dict):
        raise UsageError(
            f"{path} has no section method; write one, e.g. method: {{name: adagradselect, fraction: 0.2}}"
        )
    return dict(section)


def _run(command: Sequence[str], environment: dict[str, str]) -> int:
    """Run the command, pass signals on, and return its exit code as a shell would."""
    try:
        process = subprocess.Popen(command, env=environment)
    except OSError as error:
        raise UsageError(f"{command[0]!r} cannot be started: {error.strerror}") from None
    # Ctrl-C reaches the command by itself: it is in the same process group.
    before = {
        signal.SIGINT: signal.signal(signal.SIGINT, signal.SIG_IGN),
        signal.SIGTERM: signal.signal(signal.SIGTERM, lambda number, _: process.send_signal(number)),
    }
    try:
        code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return code if code >= 0 else 128 - code


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
