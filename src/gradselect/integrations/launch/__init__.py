"""Selective training in commands that know nothing of it, by the environment of their processes.

`environment` returns variables for a command. In each Python process of it, `autostart/sitecustomize.py` waits until
transformers.trainer is imported, and then calls `make_trainers_selective`.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SETTINGS = "GRADSELECT_LAUNCH"
"""Variable that tells the processes of a command what to train."""

AUTOSTART = Path(__file__).parent / "autostart"

__all__ = ["SETTINGS", "environment", "num_trained"]


def environment(method: Mapping[str, Any], *, jsonl: str | None, trained: Path) -> dict[str, str]:
    """Return the environment in which every Trainer of a command trains selectively.

    Args:
        method: plain data for `gradselect.method`.
        jsonl: file for the records.
        trained: file that gets a line for each training that begins.

    Example:
        >>> environment({"name": "full"}, jsonl=None, trained=Path("trained"))["GRADSELECT_LAUNCH"]
        '{"method": {"name": "full"}, "jsonl": null, "trained": "trained"}'
    """
    settings = {"method": dict(method), "jsonl": jsonl and str(Path(jsonl).absolute()), "trained": str(trained)}
    paths = [str(AUTOSTART), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), SETTINGS: json.dumps(settings)}


def num_trained(trained: Path) -> int:
    """Return the number of trainings that have begun, counted once for all processes of this machine.

    Example:
        >>> num_trained(Path("no such file"))
        0
    """
    return len(trained.read_text().splitlines()) if trained.exists() else 0


def make_trainers_selective(trainer_class: Any, settings: Mapping[str, Any]) -> None:
    """Make every Trainer selective that this process will build.

    Not by the list of default callbacks: ms-swift replaces it.

    Args:
        trainer_class: `transformers.Trainer`, whose `__init__` gets another in front.
        settings: what `environment` wrote.

    Example:
        >>> import transformers
        >>> class Trainer(transformers.Trainer):
        ...     pass
        >>> make_trainers_selective(Trainer, {"method": "full", "jsonl": None, "trained": "trained"})
        >>> "__init__" in vars(Trainer)
        True
    """
    from transformers import TrainerCallback

    from gradselect.integrations.transformers import SelectiveTraining
    from gradselect.usage import UsageError

    selective = SelectiveTraining(method=settings["method"], jsonl=settings["jsonl"])

    class NoteTraining(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
            # Once on each machine: every machine has a launcher of its own, which counts.
            if state.is_local_process_zero:
                with open(settings["trained"], "a") as file:
                    file.write(f"{os.getpid()}\n")

    build = trainer_class.__init__

    @functools.wraps(build)
    def build_and_attach(self: Any, *args: Any, **kwargs: Any) -> None:
        build(self, *args, **kwargs)
        try:
            selective.attach(self)
        except UsageError as error:
            raise UsageError(
                f"`gradselect launch` gives every Trainer of its command SelectiveTraining, and here: {error}; or run "
                "the command without `gradselect launch`"
            ) from None
        self.add_callback(NoteTraining())

    trainer_class.__init__ = build_and_attach
