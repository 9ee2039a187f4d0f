"""What is said where bfloat16 is slow: many CPUs have no instructions for it."""

import io
import json
import logging
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn
from train_fixtures import parse

from gradselect.app.doctor import Status, devices
from gradselect.app.evaluate import language_model
from gradselect.app.recipe import EvaluationSettings
from gradselect.app.runtime import bfloat16, slow_bfloat16_note
from gradselect.app.train import train
from gradselect.core import bfloat16_cost


def large(dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    return nn.Linear(4096, 4096, device="meta", dtype=dtype)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bfloat16, "bfloat16_cost", lambda: 16.4)


def test_the_cost_is_measured_once() -> None:
    ratio = bfloat16_cost()
    assert ratio > 0.0
    assert bfloat16_cost() is ratio


@pytest.mark.usefixtures("slow")
def test_a_large_model_in_bfloat16_is_said_to_be_slow_with_what_to_type() -> None:
    said = slow_bfloat16_note(large(), "cpu", advice="write model.dtype=float32")
    assert said is not None
    assert "take 16 times as long as in float32; write model.dtype=float32" in said


@pytest.mark.usefixtures("slow")
def test_nothing_is_said_of_other_dtypes_small_models_and_accelerators(monkeypatch: pytest.MonkeyPatch) -> None:
    assert slow_bfloat16_note(large(torch.float32), "cpu", advice="") is None
    assert slow_bfloat16_note(nn.Linear(8, 8, dtype=torch.bfloat16), "cpu", advice="") is None
    assert slow_bfloat16_note(large(), "cuda:1", advice="") is None
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert slow_bfloat16_note(large(), "auto", advice="") is None
    assert slow_bfloat16_note(large(), "cpu", advice="") is not None


def test_nothing_is_said_where_bfloat16_is_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bfloat16, "bfloat16_cost", lambda: 0.6)
    assert slow_bfloat16_note(large(), "cpu", advice="") is None


@pytest.mark.usefixtures("slow")
@pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")
def test_train_and_evaluate_say_it(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(bfloat16, "LARGE_MODEL", 1)
    written = io.StringIO()
    recipe = parse(place, model={"dtype": "bfloat16"}, run={"output": str(tmp_path / "out"), "steps": 1})
    train(recipe, console=Console(file=written, width=400))
    assert "take 16 times as long as in float32; model.dtype=float32 trains faster" in written.getvalue()
    notes = json.loads((tmp_path / "out" / "run.json").read_text())["notes"]
    assert sum("bfloat16 is slow" in note for note in notes) == 1
    with caplog.at_level(logging.WARNING):
        language_model.load(EvaluationSettings(model=tmp_path / "out", task="loss", data=place / "sums.jsonl"))
    assert "--dtype float32 is faster" in caplog.text


@pytest.mark.parametrize(("ratio", "status"), [(0.6, Status.OK), (16.4, Status.NOTE)])
def test_doctor_has_a_line_of_it(ratio: float, status: Status, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "bfloat16_cost", lambda: ratio)
    monkeypatch.setattr(devices, "SETUPS", {})
    (found,) = [found for found in devices.examine_devices() if found.name == "cpu, bfloat16"]
    assert found.status is status
    assert "times as long as in float32" in found.text
