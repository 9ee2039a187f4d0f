"""Runs that stop, are killed, diverge or fill the disk keep whole files and resume without a trace."""

from __future__ import annotations

import errno
import io
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from train_fixtures import (
    ADAGRADSELECT,
    assert_same_weights,
    build,
    parse,
    quiet,
    weights,
    write_model,
    write_recipe,
    write_sums,
)

from gradselect import UsageError
from gradselect.app.cli import main
from gradselect.app.recipe import load_recipe
from gradselect.app.runtime import Preempted
from gradselect.app.runtime.run_folder import RunFolder, claimed
from gradselect.app.runtime.signals import watched_signals
from gradselect.app.train import run as run_module
from gradselect.app.train import train
from gradselect.app.train.checkpoints import delete_old_checkpoints, return_to
from gradselect.app.train.saving import save_model
from gradselect.app.train.trainer import RunTrainer, TokenTrainer
from gradselect.files.checked_json import sealed
from gradselect.files.lock import locked
from gradselect.files.manifest import MANIFEST_NAME, verify, write_manifest

# TRL 1.16 uses names that transformers 5.23 has replaced.
pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")


# Stopping and going on -------------------------------------------------------------------------------------------

LENGTH = {"steps": 4, "save_every": 2, "accumulation": 2}


@pytest.fixture(scope="module")
def whole(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output of an uninterrupted full fine-tuning of `LENGTH`."""
    output = tmp_path_factory.mktemp("whole") / "out"
    return train(parse(place, run={"output": str(output), **LENGTH}), console=quiet())


RESUMED: dict[str, dict[str, Any]] = {
    "full-bfloat16": {"model": {"dtype": "bfloat16"}},
    "adagradselect": {"method": ADAGRADSELECT},
    "lora": {"method": {"name": "lora", "dropout": 0.1}},
}


@pytest.mark.parametrize("sections", RESUMED.values(), ids=list(RESUMED))
def test_a_run_that_stops_goes_on_as_if_it_had_not(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sections: dict[str, Any]
) -> None:
    run = {**LENGTH, "report_to": ["tensorboard"]}
    whole, stopped = (
        parse(place, **sections, run={"output": str(tmp_path / name), **run}) for name in ("whole", "stopped")
    )
    train(whole, console=quiet())
    with monkeypatch.context() as patch:
        stop_before(patch, step=3, error=KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            train(stopped, console=quiet())
    train(stopped, console=quiet(), resume=True)
    assert_same_weights(tmp_path / "whole", tmp_path / "stopped")
    # The third step has been drawn twice.
    assert curves(tmp_path / "stopped") == curves(tmp_path / "whole")
    assert json.loads((tmp_path / "stopped" / "run.json").read_text())["resumed_from"] == "step-2"
    if (tmp_path / "whole" / "records.jsonl").exists():
        ours, theirs = ((tmp_path / name / "records.jsonl").read_text() for name in ("whole", "stopped"))
        assert ours == theirs


@pytest.fixture(autouse=True)
def _sigint_is_heard() -> Iterator[None]:
    """A shell that runs tests in the background makes them ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


KILLED_WHILE_SAVING = """
import os, signal, sys
import torch
torch.set_num_threads(1)
save, calls = torch.save, []

def save_or_die(*args, **options):
    calls.append(1)
    if len(calls) == {fatal_call}:
        os.kill(os.getpid(), signal.SIGKILL)
    save(*args, **options)

torch.save = save_or_die
from gradselect.app.cli import main
main(sys.argv[1:])
"""


def test_a_run_killed_while_it_saves_goes_on_from_the_checkpoint_before(
    place: Path, tmp_path: Path, whole: Path
) -> None:
    """No code of ours runs after SIGKILL: the files on disk at that moment must suffice."""
    killed = tmp_path / "killed"
    recipe = write_recipe(place, tmp_path / "recipe.yaml", run={"output": str(killed), **LENGTH})
    # Each checkpoint saves its parts with several calls; the sixth is in the middle of the second one.
    script = KILLED_WHILE_SAVING.format(fatal_call=6)
    done = subprocess.run([sys.executable, "-c", script, "train", str(recipe)], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert {path.name for path in (killed / "checkpoints").iterdir()} == {"step-2", ".step-4.partial"}
    train(load_recipe(recipe), console=quiet(), resume=True)
    assert_same_weights(whole, killed)


def test_a_checkpoint_too_many_of_a_killed_run_goes_when_it_is_resumed(whole: Path, tmp_path: Path) -> None:
    """Killed between writing one and deleting the one before."""
    folder = RunFolder(tmp_path / "killed")
    for step in (2, 4, 6):
        shutil.copytree(whole / "checkpoints" / "step-4", folder.checkpoint(step))
    return_to(folder, folder.checkpoint(6), damaged={}, keep=2)
    assert [path.name for path in folder.complete_checkpoints()] == ["step-4", "step-6"]


# A schedule that does not end at 0: one step too many would show.
TOLD: dict[str, dict[str, Any]] = {
    "data": {"validation": 0.25},
    "method": ADAGRADSELECT,
    "optimizer": {"lr": 1e-2, "schedule": "constant", "warmup": 0},
    "run": {"steps": 4, "accumulation": 2, "log_every": 3, "evaluate_every": 2, "report_to": ["tensorboard"]},
}


def test_a_run_told_to_stop_in_every_step_ends_as_one_that_was_not(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, records, curves and the log, whose lines fall between the stops; run.save_every is null."""
    whole, told = (
        parse(place, **{**TOLD, "run": {**TOLD["run"], "output": str(tmp_path / name)}}) for name in ("whole", "told")
    )
    train(whole, console=quiet())
    with monkeypatch.context() as patch:
        signal_in_every_step(patch)
        for step in range(1, 5):
            with pytest.raises(Preempted, match=r"^(143|130)$"):
                train(told, console=quiet(), resume=True)
            assert RunFolder(tmp_path / "told").newest_checkpoint() == tmp_path / "told/checkpoints" / f"step-{step}"
    train(told, console=quiet(), resume=True)
    assert_same_weights(tmp_path / "whole", tmp_path / "told")
    assert curves(tmp_path / "told") == curves(tmp_path / "whole")
    ours, theirs = (lasting_log(tmp_path / name) for name in ("told", "whole"))
    assert ours == theirs
    assert [entry["step"] for entry in ours if "loss" in entry] == [3]
    ours, theirs = ((tmp_path / name / "records.jsonl").read_text() for name in ("told", "whole"))
    assert ours == theirs


def test_the_command_line_says_how_to_go_on_and_exits_with_the_signals_code(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(place, tmp_path / "recipe.yaml", run={"output": str(tmp_path / "out"), "steps": 2})
    signal_in_every_step(monkeypatch)
    with pytest.raises(SystemExit) as ended:
        main(["train", str(recipe), "run.seed=1"])
    assert ended.value.code == 128 + signal.SIGTERM
    assert f"resume with: gradselect train {recipe} run.seed=1 --resume" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_the_second_signal_ends_the_process_at_once() -> None:
    child = os.fork()
    if child == 0:
        with watched_signals() as watch:
            os.kill(os.getpid(), signal.SIGINT)
            if watch.received == signal.SIGINT:
                os.kill(os.getpid(), signal.SIGTERM)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGTERM


def test_under_a_launcher_two_signals_at_once_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a single process too: torchrun forwards what the scheduler has sent to both."""
    monkeypatch.setenv("WORLD_SIZE", "1")
    with watched_signals() as watch:
        signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) == watch.receive
        signal.raise_signal(signal.SIGINT)
    assert watch.received == signal.SIGINT


def test_signals_are_the_callers_again_after_the_run_and_ignored_ones_stay_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN), signal.getsignal(signal.SIGTERM)
    try:
        with watched_signals() as watch:
            os.kill(os.getpid(), signal.SIGINT)
        assert watch.received == 0
        assert signal.getsignal(signal.SIGTERM) == before[1]
    finally:
        signal.signal(signal.SIGINT, before[0])


def test_a_finished_run_is_not_resumed(whole: Path, tmp_path: Path) -> None:
    """Its damaged checkpoints do not matter any more."""
    shutil.copytree(whole, tmp_path / "out")
    for checkpoint in RunFolder(tmp_path / "out").complete_checkpoints():
        (checkpoint / MANIFEST_NAME).write_text("")
    before = (whole / "run.json").read_bytes()
    with pytest.raises(UsageError, match="has finished after 4 steps"):
        train(load_recipe(whole / "recipe.yaml", [f"run.output={tmp_path / 'out'}"]), console=quiet(), resume=True)
    assert (tmp_path / "out" / "run.json").read_bytes() == before


@pytest.fixture
def stopped(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Output of a run that stopped after its first checkpoint."""
    with monkeypatch.context() as patch:
        stop_before(patch, step=1, error=KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            train(parse(place, run={"output": str(tmp_path / "out"), "save_every": 1}), console=quiet())
    return tmp_path / "out"


def test_another_recipe_does_not_resume_it(stopped: Path) -> None:
    overrides = ["optimizer.lr=0.5", "method.name=uniform", "method.count=1", "run.log_every=3"]
    with pytest.raises(UsageError, match="is another one") as raised:
        train(load_recipe(stopped / "recipe.yaml", overrides), console=quiet(), resume=True)
    said = str(raised.value)
    assert "optimizer.lr: 0.01 then, 0.5 now" in said
    assert "method.name: 'full' then, 'uniform' now" in said
    assert "log_every" not in said


def test_another_model_does_not_resume_it(stopped: Path, tmp_path: Path) -> None:
    other = write_model(tmp_path / "other", seed=1)
    with pytest.raises(UsageError, match=r"model\.fingerprint: .* then"):
        train(load_recipe(stopped / "recipe.yaml", [f"model.path={other}"]), console=quiet(), resume=True)


def test_other_data_do_not_resume_it(stopped: Path, tmp_path: Path) -> None:
    other = write_sums(tmp_path / "other.jsonl", rows=23)
    with pytest.raises(UsageError, match=r"data\.train\.fingerprint: .* then"):
        train(load_recipe(stopped / "recipe.yaml", [f"data.path={other}"]), console=quiet(), resume=True)


def test_a_moved_model_resumes_it(stopped: Path, tmp_path: Path) -> None:
    moved = write_model(tmp_path / "moved", seed=0)
    train(load_recipe(stopped / "recipe.yaml", [f"model.path={moved}"]), console=quiet(), resume=True)


def test_resume_begins_a_run_that_has_not_begun(place: Path, tmp_path: Path) -> None:
    shown = io.StringIO()
    recipe = parse(place, run={"output": str(tmp_path / "out"), "steps": 1})
    train(recipe, console=Console(file=shown), resume=True)
    assert "no checkpoint yet" in shown.getvalue()


# Damage ----------------------------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def make_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def make_link(path: Path) -> None:
    path.rename(path.parent.parent / "elsewhere")
    path.symlink_to(path.parent.parent / "elsewhere")


DAMAGE: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "flipped": ("optimizer.pt", flip, "optimizer.pt: its SHA-256"),
    "truncated": (
        "model.safetensors",
        lambda path: os.truncate(path, 9),
        r"model.safetensors: 9 bytes, and [\d,]+ were",
    ),
    "emptied": ("rng_state.pth", lambda path: path.write_bytes(b""), "rng_state.pth: 0 bytes"),
    "missing": ("scheduler.pt", Path.unlink, "scheduler.pt: missing"),
    "extra": ("pytorch_model.bin", lambda path: path.write_bytes(b"x"), "pytorch_model.bin: not among the files"),
    "swapped": ("scheduler.pt", lambda path: path.rename(path.with_name("optimizer.pt")), "scheduler.pt: missing"),
    "folder": ("trainer_state.json", make_folder, "trainer_state.json: missing"),
    "link": ("model.safetensors", make_link, "model.safetensors: no regular file"),
    "no manifest": (MANIFEST_NAME, Path.unlink, f"{MANIFEST_NAME}: missing"),
    "emptied manifest": (MANIFEST_NAME, lambda path: path.write_bytes(b""), f"{MANIFEST_NAME}: .*damaged"),
    "flipped manifest": (MANIFEST_NAME, flip, f"{MANIFEST_NAME}: "),
    "unsealed manifest": (
        MANIFEST_NAME,
        lambda path: path.write_text('{"version": 1, "step": 2, "files": {}}'),
        "it has no 'sha",
    ),
    "another's manifest": (
        MANIFEST_NAME,
        lambda path: write_manifest(path.parent, step=4),
        "step: it was written for step-4",
    ),
}


@pytest.mark.parametrize(("file", "damage", "said"), DAMAGE.values(), ids=list(DAMAGE))
def test_a_damaged_checkpoint_is_not_whole_and_the_file_is_named(
    whole: Path, tmp_path: Path, file: str, damage: Callable[[Path], Any], said: str
) -> None:
    checkpoint = shutil.copytree(whole / "checkpoints" / "step-2", tmp_path / "step-2")
    assert verify(checkpoint) is None
    damage(checkpoint / file)
    assert re.search(said, verify(checkpoint) or "is whole")


def test_damaged_checkpoints_are_named_and_passed_over_for_an_older_one(place: Path, tmp_path: Path) -> None:
    """And kept; they do not push out the one that the run resumed from."""
    run = {"output": str(tmp_path / "out"), "steps": 4, "save_every": 1, "keep_checkpoints": 3}
    whole = train(parse(place, method=ADAGRADSELECT, run=run), console=quiet())
    stopped = shutil.copytree(whole, tmp_path / "stopped")
    unfinish(stopped)
    flip(stopped / "checkpoints" / "step-4" / "model.safetensors")
    (stopped / "checkpoints" / "step-3" / "optimizer.pt").unlink()
    flip(stopped / "records.jsonl")
    shown = io.StringIO()
    train(load_recipe(whole / "recipe.yaml", [f"run.output={stopped}"]), resume=True, console=Console(file=shown))
    said = shown.getvalue()
    assert "checkpoints/step-4: model.safetensors: its SHA-256 is not that of the bytes that were written" in said
    assert "checkpoints/step-3: optimizer.pt: missing; not used, kept as damaged-step-3" in said
    assert_same_weights(whole, stopped)
    assert (stopped / "records.jsonl").read_text() == (whole / "records.jsonl").read_text()
    left = {path.name: verify(path) is None for path in (stopped / "checkpoints").glob("step-*")}
    assert left == {"step-2": True, "step-3": True, "step-4": True}
    assert len(list((stopped / "checkpoints").glob("damaged-step-*"))) == 2


def test_a_run_of_damaged_checkpoints_alone_says_so_and_changes_nothing(whole: Path, tmp_path: Path) -> None:
    stopped = shutil.copytree(whole, tmp_path / "stopped")
    unfinish(stopped)
    for step in (2, 4):
        flip(stopped / "checkpoints" / f"step-{step}" / "model.safetensors")
    before = {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()}
    with pytest.raises(UsageError, match=r"(?s)no checkpoint in .* is whole.*step-4: model.*step-2: model"):
        train(load_recipe(whole / "recipe.yaml", [f"run.output={stopped}"]), resume=True, console=quiet())
    assert {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()} == before


def test_a_run_killed_while_its_model_gets_its_place_has_no_model_or_a_whole_one(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, inputs = build(place, tmp_path / "out")
    folder, replace = RunFolder(tmp_path / "out"), os.replace
    renamed: list[str] = []
    # As often as it takes: the first time killed before the first renaming, then before the second, ...
    for most in itertools.count():
        renamed.clear()

        def killed(source: Any, target: Any, most: int = most) -> None:
            if len(renamed) == most:
                raise KeyboardInterrupt
            renamed.append(Path(target).name)
            replace(source, target)

        with monkeypatch.context() as patch, suppress(KeyboardInterrupt):
            patch.setattr("os.replace", killed)
            save_model(trainer, inputs, folder=folder)
            break
        assert not (folder.root / "config.json").exists()
    # The folder gets its name, then each file its place.
    assert set(renamed[1:]) == {path.name for path in folder.root.iterdir() if path.is_file()}
    assert set(renamed) > {"config.json", "model.safetensors"}


def test_resume_begins_a_run_that_was_killed_before_its_first_word(place: Path, tmp_path: Path) -> None:
    (tmp_path / "out" / "checkpoints").mkdir(parents=True)
    (tmp_path / "out" / ".run.json.partial").write_text("{")
    train(parse(place, run={"output": str(tmp_path / "out"), "steps": 1}), console=quiet(), resume=True)
    assert weights(tmp_path / "out")


def test_one_process_at_a_time_has_the_folder(place: Path, tmp_path: Path) -> None:
    recipe = parse(place, run={"output": str(tmp_path / "out"), "steps": 1})
    folder = RunFolder(tmp_path / "out")
    with claimed(folder, resume=False, messages=()):
        folder.run_file.write_text("{}")
        for resume in (False, True):
            with pytest.raises(UsageError, match=rf"in use by process {os.getpid()} on |is not empty"):
                train(recipe, console=quiet(), resume=resume)
        with pytest.raises(UsageError, match=rf"in use by process {os.getpid()} on "), locked(folder.root):
            pass
        folder.run_file.unlink()
    assert not folder.root.exists()
    # What a killed process leaves is nobody's.
    folder.root.mkdir()
    (folder.root / ".lock").write_text("process 1 on it")
    # The bytes of a file's name that is no text.
    train(recipe, console=quiet(), command=["gradselect", "train", "caf\udce9.yaml"])
    assert not (folder.root / ".lock").exists()
    (folder.root / ".lock").symlink_to(folder.run_file)
    with pytest.raises(UsageError, match="cannot be written to"), locked(folder.root):
        pass
    assert folder.run_file.stat().st_size


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS])
def test_a_file_system_without_locks_is_warned_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    def without_locks(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", without_locks)
    with locked(tmp_path / "out"):
        assert "without locks: start no second process" in caplog.text
    assert not any((tmp_path / "out").iterdir())


def test_an_old_checkpoint_that_was_moved_and_linked_goes_with_the_others(tmp_path: Path) -> None:
    """Deleting the target of the link failed, in this save and at the start of each resumed run."""
    folder, moved = RunFolder(tmp_path / "out"), tmp_path / "moved"
    for path in (moved, folder.checkpoint(4)):
        path.mkdir(parents=True)
    folder.checkpoint(2).symlink_to(moved)
    delete_old_checkpoints(folder, keep=1)
    assert [path.name for path in folder.checkpoints.iterdir()] == ["step-4"]
    assert moved.is_dir()


# What goes wrong -------------------------------------------------------------------------------------------------


def test_losses_that_stay_no_numbers_stop_the_run_and_leave_the_last_checkpoint(
    place: Path, tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bad step changes nothing: without its cause the run resumes from before it."""
    recipe = parse(place, run={"output": str(tmp_path / "out"), "max_skipped_steps": 0, **LENGTH})
    with monkeypatch.context() as patch:
        spoil_loss(patch, step=2)
        with pytest.raises(UsageError, match=r"step 3 is nan; .* last good checkpoint is .*step-2\. Try a smaller"):
            train(recipe, console=quiet())
    assert [path.name for path in (tmp_path / "out" / "checkpoints").iterdir()] == ["step-2"]
    assert not (tmp_path / "out" / "model.safetensors").exists()
    assert_same_weights(whole, train(recipe, console=quiet(), resume=True))


def test_a_base_of_nans_is_not_laid_to_the_learning_rate(tmp_path: Path) -> None:
    write_sums(tmp_path / "sums.jsonl")
    file = write_model(tmp_path / "model") / "model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values())).fill_(float("nan"))
    save_file(tensors, file, metadata={"format": "pt"})
    recipe = parse(tmp_path, run={"max_skipped_steps": 1})
    with pytest.raises(UsageError, match=r"step 2 is nan; .*No step had changed a weight, so the learning rate"):
        train(recipe, console=quiet())


def test_weights_that_are_no_numbers_are_never_saved(place: Path, tmp_path: Path) -> None:
    trainer, _ = build(place, tmp_path, run={"save_every": 1, "steps": 1})
    with torch.no_grad():
        next(iter(trainer.model.parameters()))[0, 0] = float("inf")  # pyright: ignore[reportOptionalMemberAccess]
    with pytest.raises(UsageError, match="weights are NaN or infinite"):
        trainer._save_checkpoint(trainer.model, None)  # pyright: ignore[reportArgumentType]
    assert RunFolder(tmp_path).complete_checkpoints() == []


def no_space(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def torn_archive(*_: Any, **__: Any) -> None:
    raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")


FULL_DISK: dict[str, tuple[str, Callable[..., None]]] = {
    "weights": ("transformers.modeling_utils.safe_save_file", no_space),
    "optimizer": ("torch.save", torn_archive),
    "state": ("transformers.trainer_callback.TrainerState.save_to_json", no_space),
}


@pytest.mark.parametrize(("writer", "failure"), FULL_DISK.values(), ids=list(FULL_DISK))
def test_a_full_disk_leaves_the_last_checkpoint(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writer: str, failure: Callable[..., None]
) -> None:
    recipe = parse(place, run={"output": str(tmp_path / "out"), **LENGTH})
    with monkeypatch.context() as patch:
        fail_at_step(patch, writer, failure, step=4)
        with pytest.raises(UsageError, match=r"could not write .*step-4: .* MiB free on the disk"):
            train(recipe, console=quiet())
    assert [path.name for path in (tmp_path / "out" / "checkpoints").iterdir()] == ["step-2"]


def test_a_disk_that_is_full_at_the_end_leaves_the_last_checkpoint(
    place: Path, tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = parse(place, run={"output": str(tmp_path / "out"), **LENGTH})
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "save_model", fails_to_save(patch))
        with pytest.raises(UsageError, match=r"could not write .*model"):
            train(recipe, console=quiet())
    left = {path.name for path in (tmp_path / "out").iterdir()} - {"messages.log"}
    assert left == {"checkpoints", "recipe.yaml", "run.json"}
    assert_same_weights(whole, train(recipe, console=quiet(), resume=True))


# Helpers ---------------------------------------------------------------------------------------------------------


def signal_in_every_step(patch: pytest.MonkeyPatch) -> None:
    """SIGTERM and SIGINT in turn, from inside the forward pass."""
    compute_loss = RunTrainer.compute_loss

    def told(self: RunTrainer, *args: Any, **options: Any) -> Any:
        if self.model is not None and self.model.training and not self.signals.received:
            os.kill(os.getpid(), (signal.SIGTERM, signal.SIGINT)[self.state.global_step % 2])
        return compute_loss(self, *args, **options)

    patch.setattr(RunTrainer, "compute_loss", told)


def unfinish(folder: Path) -> None:
    """Return the folder to the moment before the run ended."""
    description = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(sealed({**description, "status": "started"})))


def lasting_log(folder: Path) -> list[dict[str, float]]:
    """Return the log of steps and evaluations, without times."""
    history = json.loads((folder / "run.json").read_text())["history"]
    timed = ("runtime", "per_second")
    return [
        {name: value for name, value in entry.items() if not name.endswith(timed)}
        for entry in history
        if "train_runtime" not in entry
    ]


def curves(folder: Path) -> list[tuple[int, float]]:
    """Return the losses that TensorBoard shows.

    It reads files in the order of their names, which end with a count of this process: the 10th would precede the 9th.
    """
    files = sorted((folder / "tensorboard").iterdir(), key=lambda file: file.stat().st_mtime_ns)
    for number, file in enumerate(files):
        file.rename(file.with_name(f"events.out.tfevents.{number}"))
    accumulator = EventAccumulator(str(folder / "tensorboard")).Reload()
    return [(event.step, event.value) for event in accumulator.Scalars("train/loss")]


def stop_before(patch: pytest.MonkeyPatch, *, step: int, error: type[BaseException]) -> None:
    """Raise before the forward pass of step `step` (from 0)."""
    compute_loss = RunTrainer.compute_loss

    def stop(self: RunTrainer, *args: Any, **options: Any) -> Any:
        if self.state.global_step == step:
            raise error
        return compute_loss(self, *args, **options)

    patch.setattr(RunTrainer, "compute_loss", stop)


def spoil_loss(patch: pytest.MonkeyPatch, *, step: int) -> None:
    """Make TRL's loss NaN at step `step`."""
    parent = next(kind for kind in TokenTrainer.__mro__ if kind.__name__ == "SFTTrainer")
    compute_loss = parent.compute_loss

    def spoiled(self: RunTrainer, *args: Any, **options: Any) -> Any:
        loss = compute_loss(self, *args, **options)
        return loss * float("nan") if self.state.global_step == step else loss

    patch.setattr(parent, "compute_loss", spoiled)


def fail_at_step(patch: pytest.MonkeyPatch, writer: str, failure: Callable[..., None], *, step: int) -> None:
    """Replace a writer with `failure` while the checkpoint of this step is written."""
    save = RunTrainer._save_checkpoint

    def failing(self: RunTrainer, *args: Any) -> None:
        if self.state.global_step == step:
            patch.setattr(writer, failure)
        save(self, *args)

    patch.setattr(RunTrainer, "_save_checkpoint", failing)


def fails_to_save(patch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`save_model` on a disk that has just become full."""

    def save(*args: Any, **options: Any) -> None:
        patch.setattr("transformers.modeling_utils.safe_save_file", no_space)
        save_model(*args, **options)

    return save
