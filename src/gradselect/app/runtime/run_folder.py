"""Output folder of a run: the paths in it, and who may write into it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from gradselect import UsageError
from gradselect.files import LOCK_NAME, aside_of, locked, remove

_STEP = re.compile(r"step-\d{1,15}", re.ASCII)


@dataclass(frozen=True)
class RunFolder:
    """Paths in the output folder of a run.

    model.safetensors, config.json, tokenizer files ...   the trained model, once the run has finished
    adapter/           the adapter before merging, for the methods that train one
    recipe.yaml        the recipe with every default written out
    run.json           what was run, on what, and how it went
    records.jsonl      one selection record a step, for the methods that select blocks
    answers.jsonl      what the model answered to some validation rows at each evaluation
    checkpoints/step-N what `--resume` continues from, each with a manifest; it skipped damaged-step-N
    tensorboard/       curves
    messages.log       warnings and log lines of the libraries
    """

    root: Path

    @property
    def run_file(self) -> Path:
        return self.root / "run.json"

    @property
    def recipe_file(self) -> Path:
        return self.root / "recipe.yaml"

    @property
    def records_file(self) -> Path:
        return self.root / "records.jsonl"

    @property
    def answers_file(self) -> Path:
        return self.root / "answers.jsonl"

    @property
    def messages_file(self) -> Path:
        return self.root / "messages.log"

    @property
    def curves(self) -> Path:
        return self.root / "tensorboard"

    @property
    def adapter(self) -> Path:
        return self.root / "adapter"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    def is_used(self) -> bool:
        """Return True if the folder holds more than a run leaves that was killed at its very beginning."""
        if not self.root.is_dir():
            return self.root.exists()
        return any(not self._is_of_no_run(entry) for entry in self.root.iterdir())

    def _is_of_no_run(self, entry: Path) -> bool:
        if entry == self.checkpoints and entry.is_dir():
            return not any(entry.iterdir())
        return entry in (aside_of(self.run_file), self.root / LOCK_NAME)

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step-{step}"

    def step_of(self, checkpoint: Path) -> int:
        """Return the number of the step after which a checkpoint was written."""
        return int(checkpoint.name.removeprefix("step-"))

    def complete_checkpoints(self) -> list[Path]:
        """Return the checkpoints, oldest first. Half-written ones have another name and are not among them."""
        found = (path for path in self.checkpoints.glob("step-*") if _STEP.fullmatch(path.name))
        return sorted(found, key=self.step_of)

    def newest_checkpoint(self) -> Path | None:
        return next(reversed(self.complete_checkpoints()), None)


@contextmanager
def claimed(folder: RunFolder, *, resume: bool, messages: Sequence[str]) -> Iterator[RunFolder]:
    """Lock the folder for a run, creating it if needed; at the end append `messages` to its log.

    Raises:
        UsageError: it is not empty and this is no resume, it cannot be made, or another process writes to it.
    """
    # Before anything is written, the lock included: the folder may belong to something else.
    _check_may_be_used(folder, resume=resume)
    was_there = folder.root.exists()
    try:
        with locked(folder.root):
            _check_may_be_used(folder, resume=resume)
            is_new = not folder.is_used()
            try:
                yield folder
            finally:
                if is_new and not folder.run_file.exists():
                    _clear(folder.root)
                else:
                    _keep(messages, folder)
    finally:
        if not was_there:
            # rmdir deletes an empty folder only.
            with suppress(OSError):
                folder.root.rmdir()


def _check_may_be_used(folder: RunFolder, *, resume: bool) -> None:
    if not folder.is_used():
        return
    if not resume:
        raise UsageError(
            f"run.output={folder.root} exists and is not empty; choose another one, e.g. run.output={folder.root}-2, "
            "or continue the run in it: --resume"
        )
    if not folder.run_file.is_file():
        raise UsageError(f"run.output={folder.root} holds no run to resume: it has no {folder.run_file.name}")


def _clear(root: Path) -> None:
    """Delete what a run left that never began, so that a corrected recipe finds the name free."""
    for entry in root.iterdir():
        if entry.name != LOCK_NAME:
            remove(entry)


def _keep(messages: Sequence[str], folder: RunFolder) -> None:
    if messages:
        # On a full disk the error that led here says so.
        with suppress(OSError), folder.messages_file.open("a", encoding="utf-8") as file:
            file.writelines(f"{message}\n" for message in messages)
