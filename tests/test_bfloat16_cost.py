"""Products in bfloat16 on a CPU that has no instructions for it: through float32, and said."""

import io
import json
import logging
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn
from train_fixtures import parse, quiet

from gradselect.app.compare import turn
from gradselect.app.doctor import Status, devices
from gradselect.app.evaluate import evaluate
from gradselect.app.recipe import EvaluationSettings
from gradselect.app.runtime import bfloat16, fast_bfloat16
from gradselect.app.train import train
from gradselect.core import bfloat16_cost


def large(dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    return nn.Linear(4096, 4096, device="meta", dtype=dtype)


def note(model: nn.Module, device: str) -> str | None:
    with fast_bfloat16(model, device) as found:
        return found


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape).to(torch.bfloat16)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bfloat16, "bfloat16_cost", lambda: 16.4)


@pytest.fixture
def converted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[torch.Size, ...]]:
    """Shapes of the products that any of our kernels computes."""
    shapes = []
    converting = bfloat16._converting

    def watched(kernel):
        product = converting(kernel)

        def noted(keys, *tensors, **factors):
            shapes.append(tuple(tensor.shape for tensor in tensors))
            return product(keys, *tensors, **factors)

        return noted

    monkeypatch.setattr(bfloat16, "_converting", watched)
    return shapes


def test_the_cost_is_measured_once() -> None:
    ratio = bfloat16_cost()
    assert ratio > 0.0
    assert bfloat16_cost() is ratio


def test_every_product_is_that_of_float32_rounded_to_bfloat16() -> None:
    torch.manual_seed(0)
    left, right, added = random(5, 7), random(7, 3), random(5, 3)
    many, others, sums = random(2, 5, 7), random(2, 7, 3), random(2, 5, 3)
    with bfloat16.through_float32():
        found = {
            "mm": left @ right,
            "bmm": many @ others,
            "addmm": torch.addmm(added, left, right, beta=0.5, alpha=2.0),
            "baddbmm": torch.baddbmm(sums, many, others, beta=0.5, alpha=2.0),
        }
    expected = {
        "mm": left.float() @ right.float(),
        "bmm": many.float() @ others.float(),
        "addmm": 0.5 * added.float() + 2.0 * (left.float() @ right.float()),
        "baddbmm": 0.5 * sums.float() + 2.0 * (many.float() @ others.float()),
    }
    assert set(found) == set(bfloat16.PRODUCTS)
    for name, value in found.items():
        assert value.dtype == torch.bfloat16
        # Sum and product in one kernel or in two: the last bit before rounding may differ.
        torch.testing.assert_close(value.float(), expected[name].to(torch.bfloat16).float(), rtol=2**-7, atol=0.0)
    assert torch.equal(found["mm"], expected["mm"].to(torch.bfloat16))


def test_gradients_go_through_float32_too(converted: list[tuple[torch.Size, ...]]) -> None:
    torch.manual_seed(0)
    linear, inputs = nn.Linear(7, 3, dtype=torch.bfloat16), random(5, 7).requires_grad_()
    with bfloat16.through_float32():
        linear(inputs).sum().backward()
    grad = torch.ones(5, 3)
    assert len(converted) >= 3
    assert inputs.grad is not None
    assert torch.equal(inputs.grad, (grad @ linear.weight.float()).to(torch.bfloat16))
    assert linear.weight.grad is not None
    assert torch.equal(linear.weight.grad, (grad.T @ inputs.float()).to(torch.bfloat16))


def test_other_dtypes_keep_their_kernel_and_torch_gets_its_own_back(converted: list[tuple[torch.Size, ...]]) -> None:
    left, right = torch.randn(5, 7), torch.randn(7, 3)
    expected = left @ right
    with bfloat16.through_float32(), bfloat16.through_float32():
        assert torch.equal(left @ right, expected)
        assert (left.double() @ right.double()).dtype == torch.float64
    count = len(converted)
    assert count > 0
    left.to(torch.bfloat16) @ right.to(torch.bfloat16)
    assert len(converted) == count


@pytest.mark.usefixtures("slow")
def test_only_large_models_in_bfloat16_on_a_cpu_need_it(monkeypatch: pytest.MonkeyPatch) -> None:
    said = note(large(), "cpu")
    assert said is not None
    assert "take 16 times as long in bfloat16 as in float32" in said
    assert note(large(torch.float32), "cpu") is None
    assert note(nn.Linear(8, 8, dtype=torch.bfloat16), "cpu") is None
    assert note(large(), "cuda") is None
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert note(large(), "auto") is None
    assert note(large(), "cpu") is not None


def test_nothing_changes_where_bfloat16_is_fast(
    monkeypatch: pytest.MonkeyPatch, converted: list[tuple[torch.Size, ...]]
) -> None:
    monkeypatch.setattr(bfloat16, "bfloat16_cost", lambda: 0.6)
    with fast_bfloat16(large(), "cpu") as said:
        random(5, 7) @ random(7, 3)
    assert said is None
    assert converted == []


@pytest.mark.usefixtures("slow")
@pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")
def test_train_evaluate_and_the_calibration_of_compare_use_it(
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    converted: list[tuple[torch.Size, ...]],
) -> None:
    monkeypatch.setattr(bfloat16, "LARGE_MODEL", 1)
    written = io.StringIO()
    recipe = parse(place, model={"dtype": "bfloat16"}, run={"output": str(tmp_path / "out"), "steps": 1})
    train(recipe, console=Console(file=written, width=400))
    said = "take 16 times as long in bfloat16 as in float32: they go through float32"
    assert said in written.getvalue()
    notes = json.loads((tmp_path / "out" / "run.json").read_text())["notes"]
    assert sum(said in note for note in notes) == 1
    counts = [len(converted)]

    with caplog.at_level(logging.WARNING):
        settings = EvaluationSettings(
            model=tmp_path / "out", task="loss", data=place / "sums.jsonl", prompt="{question}", completion="{answer}"
        )
        evaluate(settings)
    assert said in caplog.text
    counts.append(len(converted))

    turn.measure_turn(recipe, method="ours", number=0, steps=3)
    counts.append(len(converted))
    assert 0 < counts[0] < counts[1] < counts[2]

    # Where it is not needed the same training takes torch's kernels.
    monkeypatch.setattr(bfloat16, "LARGE_MODEL", 10**9)
    train(
        recipe.model_copy(update={"run": recipe.run.model_copy(update={"output": str(tmp_path / "other")})}),
        console=quiet(),
    )
    assert len(converted) == counts[2]


@pytest.mark.parametrize(("ratio", "status"), [(0.6, Status.OK), (16.4, Status.NOTE)])
def test_doctor_has_a_line_of_it(ratio: float, status: Status, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "bfloat16_cost", lambda: ratio)
    monkeypatch.setattr(devices, "SETUPS", {})
    (found,) = [found for found in devices.examine_devices() if found.name == "cpu, bfloat16"]
    assert found.status is status
    assert "times as long as in float32" in found.text
