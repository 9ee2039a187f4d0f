"""`gradselect train` under torchrun: the run of one process on the same global batch, written once, and resumed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from train_fixtures import (
    ADAGRADSELECT,
    assert_same_weights,
    parse,
    quiet,
    weights,
    write_recipe,
)

from gradselect import UsageError
from gradselect.app.recipe import load_recipe
from gradselect.app.train import train
from gradselect.files.checked_json import sealed

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")


COMMAND = """
import atexit, json, os, sys
import torch.distributed as dist
from gradselect.app.cli import main
atexit.register(lambda: os.write(1, f"connected: {dist.is_initialized()}\\n".encode()))  # in one piece
*others, last = json.loads(sys.argv[1])
for words in others:
    try:
        main(words)
    except SystemExit as end:
        if end.code:
            raise
sys.argv[1:] = last
main()
"""
"""The command, once for each list of words, and at its very end a word on the group of processes."""

ID3 = {"name": "id3", "density": 0.02, "steps": 3, "always": ["*.norm.weight"]}


def torchrun(*trainings: list[str], processes: int = 2) -> str:
    """Train on processes that take several seconds to start. What they said."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    gradselect = [sys.executable, "-c", COMMAND]
    words = json.dumps([["train", *each] for each in trainings])
    command = [sys.executable, "-m", *launcher, "--no-python", *gradselect, words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def losses(folder: Path) -> list[float]:
    history = json.loads((folder / "run.json").read_text())["history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]


def selected(folder: Path) -> list[list[str]]:
    return [record["selected"] for record in records(folder)]


def pair(place: Path, name: str, **sections: dict[str, Any]) -> tuple[Path, Path, Path]:
    """A recipe for two processes with batches of 4 each, its output, and that of one process with batches of 8."""
    shared = {"accumulation": 2, "steps": 4, **sections.pop("run", {})}
    alone, together = place / f"{name}-alone", place / f"{name}-together"
    train(parse(place, **sections, run={**shared, "batch_size": 8, "output": str(alone)}), console=quiet())
    run = {**shared, "batch_size": 4, "output": str(together)}
    return write_recipe(place, place / f"{name}.yaml", **sections, run=run), alone, together


@pytest.fixture(scope="module")
def runs(place: Path) -> tuple[Path, Path, Path]:
    """A recipe, its output on one process, and on two."""
    recipe, alone, together = pair(place, "blocks", method=ADAGRADSELECT, run={"save_every": 2})
    (place / "said.txt").write_text(torchrun([str(recipe)]))
    return recipe, alone, together


@pytest.fixture(scope="module")
def resumed(runs: tuple[Path, Path, Path], place: Path) -> tuple[Path, tuple[Path, Path]]:
    """The run of two processes, resumed by two others; then a mask, alone and in these two."""
    recipe, _, together = runs
    stopped = place / "stopped"
    shutil.copytree(together, stopped)
    shutil.rmtree(stopped / "checkpoints" / "step-4")
    (stopped / "model.safetensors").unlink()
    description = json.loads((stopped / "run.json").read_text())
    (stopped / "run.json").write_text(json.dumps(sealed({**description, "status": "started"})))
    with pytest.raises(UsageError, match="began on 2 processes, this is one of 1"):
        train(load_recipe(str(recipe), [f"run.output={stopped}"]), resume=True, console=quiet())
    masks, alone, with_mask = pair(place, "masks", method=ID3)
    torchrun([str(recipe), f"run.output={stopped}", "--resume"], [str(masks)])
    return stopped, (alone, with_mask)


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


def test_two_processes_resume_bitwise(runs: tuple[Path, Path, Path], resumed: tuple[Path, tuple[Path, Path]]) -> None:
    stopped, together = resumed[0], runs[2]
    assert json.loads((stopped / "run.json").read_text())["resumed_from"] == "step-2"
    assert_same_weights(stopped, together)
    assert selected(stopped) == selected(together)


def test_two_processes_have_the_loss_curve_of_one_with_a_mask(resumed: tuple[Path, tuple[Path, Path]]) -> None:
    """fp32, equal to rounding: gradients are added in another order."""
    alone, together = resumed[1]
    ours, theirs = records(together), records(alone)
    assert len(theirs) == 4
    assert [each["num_entries"] for each in ours] == [each["num_entries"] for each in theirs]
    assert losses(together) == pytest.approx(losses(alone), rel=1e-4)
    moved = weights(together)
    assert all((moved[name] - value).abs().max() < 1e-3 for name, value in weights(alone).items())
