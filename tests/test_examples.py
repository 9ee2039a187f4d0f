"""The examples run as they are printed, offline, and learn what they say."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState, GradientState
from transformers import LlamaForCausalLM

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(name, folder, monkeypatch):
    monkeypatch.chdir(folder)
    return runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def losses(log_history):
    return [log["loss"] for log in log_history if "loss" in log]


def test_own_loop(tmp_path, monkeypatch, capsys):
    names = run("own_loop.py", tmp_path, monkeypatch)
    assert names["losses"][-1] < names["losses"][0] / 20
    assert "step  60" in capsys.readouterr().out
    assert sum(names["optimizer"].update_counts.values()) == 3 * names["STEPS"]


def test_own_loop_masks(tmp_path, monkeypatch):
    names = run("own_loop_masks.py", tmp_path, monkeypatch)
    assert names["losses"][-1] < names["losses"][0] / 4
    num_chosen = sum(map(len, names["optimizer"].entries.values()))
    assert num_chosen == round(0.05 * sum(parameter.numel() for parameter in names["model"].parameters()))
    checkpoint = tmp_path / "tuned" / "model.safetensors"
    assert (tmp_path / "counting.safetensors").stat().st_size < checkpoint.stat().st_size / 5


def test_accelerate_loop(tmp_path, monkeypatch, capsys):
    names = run("accelerate_loop.py", tmp_path, monkeypatch)
    assert names["last_loss"] < names["first_loss"] / 20
    assert [record.step for record in names["begun"] + names["continued"]] == list(range(3 * names["EPOCHS"]))
    assert not any(record.explored for record in names["records"][3:])
    assert "bitwise the same weights" in capsys.readouterr().out
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def test_trainer(tmp_path, monkeypatch):
    trainer = run("trainer.py", tmp_path, monkeypatch)["trainer"]
    history = losses(trainer.state.log_history)
    assert history[-1] < history[0] / 20
    assert len((tmp_path / "runs/trainer/selection.jsonl").read_text().splitlines()) == trainer.state.global_step
    assert LlamaForCausalLM.from_pretrained(tmp_path / "runs/trainer/final").config.num_hidden_layers == 6


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")  # SFTConfig's own default
def test_trl_sft(tmp_path, monkeypatch):
    trainer = run("trl_sft.py", tmp_path, monkeypatch)["trainer"]
    history = losses(trainer.state.log_history)
    assert history[-1] < history[0] / 2
    records = [json.loads(line) for line in (tmp_path / "runs/trl_sft/selection.jsonl").read_text().splitlines()]
    assert {len(record["selected"]) for record in records} == {3}


def test_every_example_has_a_test():
    tested = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    assert {path.stem for path in EXAMPLES.glob("*.py")} <= tested
