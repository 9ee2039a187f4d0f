"""The output folder of a run; whatever is written into it is whole or is not there."""

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
    """Where a run keeps what.

    model.safetensors, config.json, tokenizer files ...   the trained model, once the run has finished
    adapter/           the adapter before it was merged, for the methods that train one
    recipe.yaml        the recipe with every default written out
    run.json           what was run, on what, and how it went
    records.jsonl      one selection record a step, for the methods that select blocks
    checkpoints/step-N what `--resume` continues from, each with a manifest; damaged-step-N is one that it passed over
    tensorboard/       curves
    messages.log       what the libraries had to say
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
        """Whether there is anything in it beside what a run that was killed at its very beginning leaves."""
        if not self.root.is_dir():
            return self.root.exists()
        return any(not self._is_of_no_run(entry) for entry in self.root.iterdir())

    def _is_of_no_run(self, entry: Path) -> bool:
        if entry == self.checkpoints and entry.is_dir():
            return not any(entry.iterdir())
        return entry in (aside_of(self.run_file), self.root / LOCK_NAME)

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step-{step}"

    def complete_checkpoints(self) -> list[Path]:
        """The checkpoints, oldest first; one that was not written to its end has another name and is not among them."""
        found = (path for path in self.checkpoints.glob("step-*") if _STEP.fullmatch(path.name))
        return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))

    def newest_checkpoint(self) -> Path | None:
        return next(reversed(self.complete_checkpoints()), None)


@contextmanager
def claimed(folder: RunFolder, *, resume: bool, messages: Sequence[str]) -> Iterator[RunFolder]:
    """The folder, made for a new run or left as it is for `resume`; at the end `messages` are kept in it.

    Raises:
        UsageError: there is something in it and this is no resume, it cannot be made, or another process writes to it.
    """
    # Before anything is written, a lock included: it may be a folder of something else.
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
            # Only an empty one goes.
            with suppress(OSError):
                folder.root.rmdir()


def _check_may_be_used(folder: RunFolder, *, resume: bool) -> None:
    if not folder.is_used():
        return
    if not resume:
        raise UsageError(
            f"run.output={folder.root} exists and is not empty; choose another one, e.g. run.output={folder.root}-2, "
            "or go on with the run in it: --resume"
        )
    if not folder.run_file.is_file():
        raise UsageError(f"run.output={folder.root} holds no run to resume: it has no {folder.run_file.name}")


def _clear(root: Path) -> None:
    """Nothing has begun: a corrected recipe should find the name free."""
    for entry in root.iterdir():
        if entry.name != LOCK_NAME:
            remove(entry)


def _keep(messages: Sequence[str], folder: RunFolder) -> None:
    if messages:
        # Should the disk be full, the error that led here says so.
        with suppress(OSError), folder.messages_file.open("a", encoding="utf-8") as file:
            file.writelines(f"{message}\n" for message in messages)
