"""Faults inside a run: NaN steps, and failures of memory, trackers, clocks and folders."""

from __future__ import annotations

import errno
import io
import itertools
import json
import os
import re
import shlex
import signal
import socket
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor
from torch.utils.tensorboard.writer import SummaryWriter
from train_fixtures import (
    ADAGRADSELECT,
    assert_same_weights,
    parse,
    quiet,
    weights,
)

from gradselect import UsageError
from gradselect.app.cli import main
from gradselect.app.recipe import Recipe
from gradselect.app.runtime.run_folder import RunFolder
from gradselect.app.train import train
from gradselect.app.train.failures import is_out_of_memory
from gradselect.app.train.trainer import RunTrainer, TokenTrainer
from gradselect.files.manifest import verify

# TRL 1.16 uses names that transformers 5.23 has replaced.
pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")

STEPS = 4


# Steps that come to no number ------------------------------------------------------------------------------------

SPOILED: dict[str, Callable[[Tensor], Tensor]] = {
    "loss": lambda loss: loss * float("nan"),
    # The value stays; its gradient is infinite.
    "gradient": lambda loss: loss + (loss - loss.detach()).sqrt(),
}


ID3 = {"name": "id3", "budget": 200}
SKIPPED: dict[str, tuple[dict[str, Any], str]] = {
    "adagradselect-loss": (ADAGRADSELECT, "loss"),
    "adagradselect-gradient": (ADAGRADSELECT, "gradient"),
    "id3-loss": (ID3, "loss"),
    "id3-gradient": (ID3, "gradient"),
    "adalora-loss": ({"name": "adalora", "rank": 3, "initial_rank": 4}, "loss"),
}


@pytest.mark.parametrize(("method", "fault"), SKIPPED.values(), ids=list(SKIPPED))
def test_a_step_without_a_number_changes_nothing_and_is_counted(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: dict[str, Any], fault: str
) -> None:
    """Neither weights nor optimizer state; the log, which is strict JSON, has only a skipped step."""
    seen: list[list[Tensor]] = []
    run = {"output": str(tmp_path / "out"), "steps": STEPS, "accumulation": 2}
    spoil(monkeypatch, SPOILED[fault], steps={2})
    watch_state(monkeypatch, seen)
    shown = io.StringIO()
    train(parse(place, method=method, run=run), console=Console(file=shown))
    changed = [not same(one, other) for one, other in itertools.pairwise(seen)]
    assert changed == [True, False, True]
    assert "of step 3 is" in shown.getvalue()
    assert "the step is skipped" in shown.getvalue()
    description = json.loads((tmp_path / "out" / "run.json").read_text(), parse_constant=pytest.fail)
    assert description["skipped_steps"] == 1
    assert [entry["step"] for entry in description["history"] if "loss" in entry] == [1, 2, 4]
    assert all(bool(value.isfinite().all()) for value in weights(tmp_path / "out").values())


def test_a_step_without_a_number_ends_a_run_that_moves_weights_in_the_backward_pass(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was reported as skipped, and training continued with NaN weights."""
    spoil(monkeypatch, SPOILED["loss"], steps={2})
    method = {"name": "uniform", "fraction": 0.4, "update_in_backward": True}
    run = {"output": str(tmp_path / "out"), "steps": STEPS, "save_every": 1}
    recipe = parse(place, method=method, optimizer={"max_grad_norm": 0}, run=run)
    with pytest.raises(UsageError, match=r"loss of step 3 is nan.*no step can be skipped.*last good .*step-2"):
        train(recipe, console=quiet())


def test_steps_without_a_number_end_a_run_only_when_too_many_come_in_a_row(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a row across a resume too."""
    run = {"steps": 6, "max_skipped_steps": 1, "save_every": 1}
    spoil(monkeypatch, SPOILED["loss"], steps={0, 2, 4, 5})
    recipe = parse(place, run={**run, "output": str(tmp_path / "out")})
    for _ in range(2):
        with pytest.raises(UsageError, match=r"the loss of step 6 is nan; training has stopped and the last .*step-5"):
            train(recipe, console=quiet(), resume=True)
    history = json.loads((tmp_path / "out" / "checkpoints" / "step-5" / "trainer_state.json").read_text())[
        "log_history"
    ]
    assert [entry["step"] for entry in history if "skipped" in entry] == [1, 3, 5]
    monkeypatch.undo()
    train(recipe, console=quiet(), resume=True)
    assert json.loads((tmp_path / "out" / "run.json").read_text())["skipped_steps"] == 3


# What the machine lacks ------------------------------------------------------------------------------------------


def test_out_of_memory_names_the_plan_that_finds_what_fits(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command can be typed as it stands; the checkpoint resumes with less memory and the same result."""
    whole = train(parse(place, run={"output": str(tmp_path / "whole"), "steps": 2}), console=quiet())
    recipe = parse(place, run={"output": str(tmp_path / "out"), "steps": 2, "save_every": 1})
    with monkeypatch.context() as patch:
        raise_at(patch, step=1, error=torch.OutOfMemoryError("CUDA out of memory"))
        with pytest.raises(UsageError, match=r"out of memory .*step-1, is whole") as raised:
            train(recipe, console=quiet())
    command = re.search(r"gradselect (plan .*)", str(raised.value))
    assert command is not None
    with pytest.raises(SystemExit, match=r"^0$"):
        main(shlex.split(command[1]))
    assert "fits" in capsys.readouterr().out
    sparing = recipe.model_copy(update={"model": recipe.model.model_copy(update={"gradient_checkpointing": True})})
    assert_same_weights(whole, train(sparing, console=quiet(), resume=True))


def test_out_of_memory_before_the_first_step_is_said_and_leaves_nothing(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that does not fit the device ended in a traceback."""

    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(RunTrainer, "create_optimizer", full)
    with pytest.raises(UsageError, match=r"out of memory .*type: gradselect plan RECIPE --fit"):
        train(parse(place, run={"output": str(tmp_path / "out")}), console=quiet())
    assert not (tmp_path / "out").exists()


def test_out_of_memory_is_known_on_device_and_host_and_is_no_other_error() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(MemoryError())
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(raised.value)
    assert not is_out_of_memory(RuntimeError("a mistake of ours"))


def test_a_tracker_that_fails_is_named_once_and_the_run_goes_on(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(SummaryWriter, "add_scalar", unreachable)
    shown = io.StringIO()
    run = {"output": str(tmp_path / "out"), "report_to": ["tensorboard"]}
    train(parse(place, run=run), console=Console(file=shown))
    assert shown.getvalue().count("run.report_to=tensorboard has failed; the run continues without it: no route") == 1
    assert weights(tmp_path / "out")


def test_a_clock_that_jumps_back_changes_no_duration(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = itertools.count(2e9, -3600.0)
    monkeypatch.setattr(time, "time", lambda: next(times))
    train(parse(place, run={"output": str(tmp_path / "out")}), console=quiet())
    description = json.loads((tmp_path / "out" / "run.json").read_text())
    assert 0 < description["training_seconds"] < 3600
    assert description["tokens_per_second"] > 0


def test_an_output_that_cannot_be_made_is_said_before_anything_is_read(place: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"run\.output=.* cannot be made: "):
        train(parse(place, run={"output": str(tmp_path / "file" / "out")}), console=quiet())


def test_an_output_that_becomes_read_only_ends_the_run_with_one_message(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = parse(place, method=ADAGRADSELECT, run={"output": str(tmp_path / "out"), "save_every": 1})
    opened = Path.open

    def read_only(self: Path, mode: str = "r", *args: Any, **options: Any) -> Any:
        if self.name == "records.jsonl" and mode == "a":
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))
        return opened(self, mode, *args, **options)

    monkeypatch.setattr(Path, "open", read_only)
    with pytest.raises(UsageError, match=r"training has stopped: .*Read-only file system: .*records.jsonl"):
        train(recipe, console=quiet())


def test_a_data_loader_worker_that_dies_ends_the_run_with_one_message(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No recipe uses workers; code that builds on the trainer may."""
    raise_at(monkeypatch, step=1, error=RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly"))
    with pytest.raises(UsageError, match=r"DataLoader worker .* exited unexpectedly.*step-1, is whole"):
        train(parse(place, run={"output": str(tmp_path / "out"), "save_every": 1}), console=quiet())


# Several processes -----------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_two_processes_skip_the_same_step_and_stop_after_the_same(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only one of them has the bad loss, and only one gets the signal."""
    run = {"output": str(tmp_path / "out"), "steps": 4, "batch_size": 2}
    recipe = parse(place, method=ADAGRADSELECT, run=run)
    port = free_port()
    codes = in_processes(2, lambda rank: train_as(rank, recipe, port=port, patch=monkeypatch))
    assert codes == [128 + signal.SIGTERM] * 2
    (checkpoint,) = RunFolder(tmp_path / "out").complete_checkpoints()
    assert checkpoint.name == "step-3"
    assert verify(checkpoint) is None
    history = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if "skipped" in entry] == [2]
    assert [json.loads(line)["step"] for line in (checkpoint / "records.jsonl").read_text().splitlines()] == [0, 1]


def train_as(rank: int, recipe: Recipe, *, port: int, patch: pytest.MonkeyPatch) -> None:
    """Train on two processes; the second has a bad loss in step 2 and gets SIGTERM in step 3."""
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in environment.items():
        patch.setenv(name, str(value))
    torch.set_num_threads(1)
    if rank == 1:
        spoil(patch, SPOILED["loss"], steps={1})
        tell(patch, signal.SIGTERM, step=2)
    train(recipe, console=quiet())


def in_processes(count: int, work: Callable[[int], None]) -> list[int]:
    """Fork a process for each number, run `work(number)` in it, and return the exit codes."""
    children: list[int] = []
    for rank in range(count):
        with warnings.catch_warnings():  # of Python 3.12 and newer; torch's threads hold no lock here
            warnings.filterwarnings("ignore", ".*multi-threaded, use of fork", DeprecationWarning)
            children.append(os.fork())
        if children[-1] == 0:
            signal.alarm(120)  # processes that wait for one another are to fail, not to hang
            try:
                work(rank)
            except SystemExit as ended:
                os._exit(ended.code if isinstance(ended.code, int) else 1)
            except BaseException:
                traceback.print_exc()
            os._exit(70)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


# Helpers ---------------------------------------------------------------------------------------------------------


def spoil(patch: pytest.MonkeyPatch, change: Callable[[Tensor], Tensor], *, steps: set[int]) -> None:
    """Change TRL's training loss in these steps (from 0), in the first micro-batch."""
    parent = next(kind for kind in TokenTrainer.__mro__ if kind.__name__ == "SFTTrainer")
    compute_loss = parent.compute_loss

    def spoiled(self: RunTrainer, *args: Any, **options: Any) -> Any:
        loss = compute_loss(self, *args, **options)
        is_first = not self.accelerator.sync_gradients or self.args.gradient_accumulation_steps == 1
        return change(loss) if self.state.global_step in steps and is_first else loss

    patch.setattr(parent, "compute_loss", spoiled)


def watch_state(patch: pytest.MonkeyPatch, seen: list[list[Tensor]]) -> None:
    """Copy weights and optimizer state to `seen` after every step."""
    log = RunTrainer._maybe_log_save_evaluate

    def watched(self: RunTrainer, *args: Any, **options: Any) -> None:
        optimizer: Any = self.optimizer
        states = optimizer.optimizer.state_dict()["state"].values()
        held = [value for state in states for value in state.values() if isinstance(value, Tensor)]
        if len(seen) < self.state.global_step:
            model: Any = self.model
            seen.append([value.detach().clone() for value in (*model.parameters(), *held)])
        log(self, *args, **options)

    patch.setattr(RunTrainer, "_maybe_log_save_evaluate", watched)


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


def tell(patch: pytest.MonkeyPatch, number: int, *, step: int) -> None:
    """Send this process a signal from inside the forward pass of step `step` (from 0)."""
    compute_loss = RunTrainer.compute_loss

    def told(self: RunTrainer, *args: Any, **options: Any) -> Any:
        if self.state.global_step == step and not self.signals.received:
            os.kill(os.getpid(), number)
        return compute_loss(self, *args, **options)

    patch.setattr(RunTrainer, "compute_loss", told)


def raise_at(patch: pytest.MonkeyPatch, *, step: int, error: Exception) -> None:
    compute_loss = RunTrainer.compute_loss

    def failing(self: RunTrainer, *args: Any, **options: Any) -> Any:
        if self.state.global_step == step:
            raise error
        return compute_loss(self, *args, **options)

    patch.setattr(RunTrainer, "compute_loss", failing)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
