"""`gradselect train` under torchrun: the run of one process on the same global batch, written once, and resumed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from train_fixtures import (
    ADAGRADSELECT,
    assert_same_weights,
    parse,
    quiet,
    weights,
    write_model,
    write_recipe,
    write_sums,
)

from gradselect import UsageError
from gradselect.app.recipe import load_recipe
from gradselect.app.train import train
from gradselect.files.checked_json import sealed

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")


COMMAND = """
import atexit, os
import torch.distributed as dist
from gradselect.app.cli import main
atexit.register(lambda: os.write(1, f"connected: {dist.is_initialized()}\\n".encode()))  # in one piece
main()
"""
"""The command, and at its very end a word on the group of processes."""


def torchrun(*words: str, processes: int = 2) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    gradselect = [sys.executable, "-c", COMMAND]
    command = [sys.executable, "-m", *launcher, "--no-python", *gradselect, "train", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def losses(folder: Path) -> list[float]:
    history = json.loads((folder / "run.json").read_text())["history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def selected(folder: Path) -> list[list[str]]:
    return [json.loads(line)["selected"] for line in (folder / "records.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A recipe, its output on one process with batches of 8, and on two with batches of 4 each."""
    place = tmp_path_factory.mktemp("place")
    write_model(place / "model")
    write_sums(place / "sums.jsonl")
    shared = {"accumulation": 2, "save_every": 2, "steps": 4}
    alone, together = place / "alone", place / "together"
    train(parse(place, method=ADAGRADSELECT, run={**shared, "batch_size": 8, "output": str(alone)}), console=quiet())
    recipe = write_recipe(
        place, place / "recipe.yaml", method=ADAGRADSELECT, run={**shared, "batch_size": 4, "output": str(together)}
    )
    (place / "said.txt").write_text(torchrun(str(recipe)))
    return recipe, alone, together


def test_finished_processes_leave_no_group_behind(runs: tuple[Path, Path, Path]) -> None:
    """Its threads could abort a process while the interpreter shut down: exit code -6 after a whole run."""
    said = (runs[0].parent / "said.txt").read_text()
    assert said.count("connected: False") == 2
    assert "connected: True" not in said


def test_two_processes_have_the_loss_curve_of_one(runs: tuple[Path, Path, Path]) -> None:
    """fp32, equal to rounding: gradients are added in another order."""
    _, alone, together = runs
    assert losses(together) == pytest.approx(losses(alone), rel=1e-4)
    assert selected(together) == selected(alone)
    assert len(losses(alone)) == 4
    moved = weights(together)
    for name, value in weights(alone).items():
        assert torch.allclose(moved[name], value, atol=1e-3), name


def test_one_process_writes_for_all(runs: tuple[Path, Path, Path]) -> None:
    _, alone, together = runs
    of_one, of_two = ({path.name for path in folder.iterdir()} for folder in (alone, together))
    assert of_two - {"messages.log"} == of_one - {"messages.log"}
    description = json.loads((together / "run.json").read_text())
    assert description["status"] == "finished"
    assert description["tokens"] == json.loads((alone / "run.json").read_text())["tokens"]
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= {path.name for path in (together / "checkpoints/step-4").iterdir()}


def test_two_processes_resume_bitwise(runs: tuple[Path, Path, Path], tmp_path: Path) -> None:
    recipe, _, together = runs
    stopped = tmp_path / "stopped"
    shutil.copytree(together, stopped)
    shutil.rmtree(stopped / "checkpoints" / "step-4")
    (stopped / "model.safetensors").unlink()
    description = json.loads((stopped / "run.json").read_text())
    (stopped / "run.json").write_text(json.dumps(sealed({**description, "status": "started"})))
    with pytest.raises(UsageError, match="began on 2 processes, this is one of 1"):
        train(load_recipe(str(recipe), [f"run.output={stopped}"]), resume=True, console=quiet())
    torchrun(str(recipe), f"run.output={stopped}", "--resume")
    assert_same_weights(stopped, together)
    assert selected(stopped) == selected(together)
