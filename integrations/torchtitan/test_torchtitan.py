"""Selective training inside torchtitan's own Trainer and checkpoints, on a CPU (see on_cpu.py for the stand-ins)."""

from __future__ import annotations

import doctest
import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from on_cpu import METHODS, STEPS, STOP, config, train, weights_of

import gradselect as gs
from gradselect.integrations import torchtitan as ours
from gradselect.integrations.torchtitan import SelectiveOptimizers, selective

warnings.filterwarnings("ignore")
HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    """Its Trainer sleeps for two seconds at the end."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)


def records_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "selection.jsonl").read_text().splitlines()]


def continued(whole: Path, again: Path) -> Path:
    """A folder that holds the checkpoint of step STOP of another run."""
    shutil.copytree(whole / "checkpoint" / f"step-{STOP}", again / "checkpoint" / f"step-{STOP}")
    return again


def difference(*folders: Path) -> float:
    one, other = (torch.load(folder / "weights.pt") for folder in folders)
    assert one.keys() == other.keys()
    return max((one[name].float() - other[name].float()).abs().max().item() for name in one)


RUNS = {
    "ada": {},
    "id3": {},
    "gmt": {},
    "adamw": {},
    "ada-chunked": {"global_batch_size": 4},
    "id3-chunked": {"global_batch_size": 4},
}


@pytest.mark.parametrize("kind", RUNS)
def test_it_trains_records_and_resumes_bitwise(kind, tmp_path):
    whole, again = tmp_path / "whole", tmp_path / "again"
    train(whole, kind, **RUNS[kind])
    train(continued(whole, again), kind, step=STOP, **RUNS[kind])
    assert difference(whole, again) == 0.0
    if kind != "adamw":
        assert len(records_of(whole)) == STEPS
        assert records_of(again) == records_of(whole)[STOP:]


def test_exactly_the_recorded_blocks_move(tmp_path):
    settings = config(tmp_path, "ada")
    trainer = settings.build()
    before = {name: value.full_tensor().clone() for name, value in weights_of(trainer).items()}
    blocks = gs.partition(trainer.model_parts[0])
    assert [block.name for block in blocks] == ["embedding", "layer.0", "layer.1", "layer.2", "norm", "head"]
    trainer.train()
    moved = {name for name, value in weights_of(trainer).items() if not torch.equal(before[name], value.full_tensor())}
    found = records_of(tmp_path)
    assert not any(record["explored"] for record in found[2:])  # explore_steps: 2
    selected = {name for record in found for name in record["selected"]}
    names = {block.name: block.parameter_names for block in blocks}
    expected = {name.replace("_checkpoint_wrapped_module.", "") for block in selected for name in names[block]}
    # Its checkpoints split the fused projection of queries, keys and values.
    assert {
        name for name in moved if "qkv" not in name and not name.endswith(("wq.weight", "wk.weight", "wv.weight"))
    } == {name for name in expected if "qkv" not in name}
    trainer.close()


def test_chunks_and_micro_batches_are_one_window(tmp_path):
    """A chunked loss runs passes of the head before that of the model: the first were taken for the whole step."""
    train(tmp_path / "chunked", "ada-chunked", global_batch_size=4)
    train(tmp_path / "one", "ada", global_batch_size=4)
    chunked, one = records_of(tmp_path / "chunked"), records_of(tmp_path / "one")
    assert [record["selected"] for record in chunked] == [record["selected"] for record in one]
    assert chunked[0]["norms"] == pytest.approx(one[0]["norms"], rel=1e-4)


def test_a_head_alone_trains_with_a_chunked_loss(tmp_path, monkeypatch):
    monkeypatch.setitem(METHODS, "head", {"name": "fixed", "names": ["head"]})
    train(tmp_path, "head-chunked")
    assert [record["selected"] for record in records_of(tmp_path)] == [["head"]] * STEPS


def test_a_checkpoint_loads_without_activation_checkpointing(tmp_path):
    train(tmp_path / "whole", "ada")
    train(continued(tmp_path / "whole", tmp_path / "again"), "ada-plain", step=STOP)
    assert records_of(tmp_path / "again") == records_of(tmp_path / "whole")[STOP:]


@pytest.mark.parametrize("kind", ["ada", "id3"])
def test_two_ranks_resume_bitwise(kind, tmp_path):
    whole, again = tmp_path / "whole", tmp_path / "again"
    run_two(whole, kind)
    run_two(continued(whole, again), kind, str(STOP))
    assert difference(whole, again) == 0.0
    assert records_of(again) == records_of(whole)[STOP:]


def run_two(*words: object) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", HERE / "on_cpu.py"]
    taken = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    env = {key: value for key, value in os.environ.items() if key not in taken}
    done = subprocess.run([*map(str, (*command, *words))], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


WRONG = {
    "fractoin": ({"name": "adagradselect", "fractoin": 0.3}, "fractoin"),
    "open explore steps": (
        {"name": "adagradselect", "fraction": 0.3, "preset": "paper"},
        r"torchtitan has no epochs; write e.g. explore_steps=",
    ),
    "weights": ({"name": "static", "salience": "magnitude", "density": 0.1}, "torchtitan loads weights after"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_work_is_refused(case, tmp_path):
    method, message = WRONG[case]
    with pytest.raises(gs.UsageError, match=message):
        selective(config(tmp_path, "adamw"), method).build()


def test_explore_steps_left_open_are_a_quarter_of_the_run(tmp_path):
    trainer = selective(config(tmp_path, "adamw", steps=12), {"name": "adagradselect", "fraction": 0.3}).build()
    assert trainer.optimizers._selective.policy.filled_explore_steps == 3
    trainer.close()


def test_cuda_graphs_are_refused(tmp_path):
    settings = config(tmp_path, "ada")
    settings.training.disable_cuda_graphs = False
    with pytest.raises(gs.UsageError, match="disable_cuda_graphs"):
        settings.build()


def test_other_optimizers_are_refused(tmp_path):
    settings = config(tmp_path, "ada")
    assert isinstance(settings.optimizer, SelectiveOptimizers.Config)
    with pytest.raises(gs.UsageError, match="has none"):
        selective(settings, METHODS["ada"])


def test_a_checkpoint_of_another_optimizer_is_refused(tmp_path):
    train(tmp_path / "whole", "adamw")
    with pytest.raises(BaseException, match=r"selective\.plain"):
        train(continued(tmp_path / "whole", tmp_path / "again"), "ada", step=STOP)


def test_examples_of_the_module_run():
    assert doctest.testmod(ours).failed == 0
