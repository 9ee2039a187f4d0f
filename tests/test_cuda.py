"""On a GPU every method trains as on a CPU: the same selections and draws, the same weights to rounding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from test_levers import large_llama
from test_mask_contract import BATCHES
from test_mask_contract import TABLE as MASKS
from test_policy_contract import TABLE as POLICIES
from test_real_model_suites import METHODS as DECODER_METHODS
from test_seeds_suites import SUITES as SEEDS
from tiny_models import tiny_batch, tiny_llama, tiny_qwen2
from torch import Tensor, nn
from train_fixtures import build, write_model, write_sums

import gradselect as gs
from gradselect.core.adamw_8bit import dequantise, quantise
from gradselect.entries.mask import AbstractMask
from gradselect.integrations.transformers import checkpoint_selected

DEVICE = "cuda"
NUM_STEPS = 6

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: make gpu"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning"),
]

RECIPES = DECODER_METHODS | {f"{name}, seeds": entry.method for name, entry in SEEDS["decoder"].methods.items()}


def batch_of(model: nn.Module, *, seed: int, device: str) -> dict[str, Tensor]:
    return {name: value.to(device) for name, value in tiny_batch(model, seed=seed).items()}


def train(model: nn.Module, optimizer: Any, steps: range, *, device: str) -> None:
    for step in steps:
        model(**batch_of(model, seed=step, device=device)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def assert_same_training(make: Callable[[str], tuple[nn.Module, Any]]) -> None:
    """Train in float64 on both devices; compare all weights, and the selections of each step where there are some.

    transformers computes norms and rotations in float32 all the same, and AdamW divides the differences by gradients of
    about their size: hence the tolerance, a thousandth of a step.
    """
    ends = []
    for device in ("cpu", DEVICE):
        model, optimizer = make(device)
        records: list[Any] = []
        if isinstance(optimizer, gs.BlockOptimizer):
            optimizer.add_record_hook(records.append)
        train(model, optimizer, range(NUM_STEPS), device=device)
        assert {parameter.device.type for parameter in model.parameters()} == {device}
        optimizer.close()
        ends.append((model.state_dict(), [record.selected for record in records]))
    (on_cpu, selected), (on_gpu, selected_too) = ends
    assert selected == selected_too
    for name, weight in on_cpu.items():
        torch.testing.assert_close(
            on_gpu[name].cpu(), weight, rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_selects_and_trains_as_on_a_cpu(name: str) -> None:
    kinds = {"misa": "matrix", "spectrum": "matrix", "stratified": "columns", "losia": "columns"}
    by = next((kind for start, kind in kinds.items() if name.startswith(start)), "layer")
    policy = POLICIES[name](0)
    if name == "spectrum, all":  # the names of matrices are longer
        policy = gs.Spectrum(fraction=1.0, among=("layer.1.*", "layer.3.*"))

    def make(device: str) -> tuple[nn.Module, Any]:
        model = tiny_llama(layers=5, tied=True, dtype=torch.float64).to(device)
        blocks = gs.partition(model, by=by, parts=4) if by == "columns" else gs.partition(model, by=by)
        return model, gs.BlockOptimizer(model, policy, blocks=blocks, lr=1e-2)

    assert_same_training(make)


@pytest.mark.parametrize("name", MASKS)
def test_every_mask_chooses_and_trains_as_on_a_cpu(name: str) -> None:
    def make(device: str) -> tuple[nn.Module, Any]:
        model = tiny_qwen2(layers=2, dtype=torch.float64).to(device)
        mask: AbstractMask = MASKS[name][0]()
        if getattr(mask, "batches", None) is BATCHES:
            moved = [{key: value.to(device) for key, value in batch.items()} for batch in BATCHES]
            mask = replace(cast(Any, mask), batches=moved)
        return model, gs.SparseOptimizer(model, mask, lr=1e-2)

    assert_same_training(make)


@pytest.mark.parametrize(
    "mask",
    [
        gs.ID3(budget=60, steps=3),
        gs.StaticMask(density=0.1, salience=gs.salience.magnitude, refresh_every=2),
        gs.TopGradient(density=0.1),
    ],
    ids=lambda mask: type(mask).__name__,
)
def test_a_model_may_move_to_its_device_after_its_mask_was_built(mask: AbstractMask) -> None:
    def make(device: str) -> tuple[nn.Module, Any]:
        model = tiny_qwen2(layers=2, dtype=torch.float64)
        optimizer = gs.SparseOptimizer(model, mask, lr=1e-2)
        return model.to(device), optimizer

    assert_same_training(make)


@pytest.mark.parametrize(
    "settings",
    [
        {"residency": gs.Offload()},
        {"residency": gs.Drop()},
        {"update_in_backward": True},
        {"residency": gs.Offload(), "update_in_backward": True},
        {"rule": gs.SGDRule()},
        {"weight_decay": 0.1},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_every_setting_of_blocks_trains(settings: dict[str, Any], dtype: torch.dtype) -> None:
    """In bfloat16 there are masters; the rounding of two devices differs, so that only the selections are equal."""
    policy = gs.AdaGradSelect(count=2, explore_steps=2)

    def make(device: str) -> tuple[nn.Module, Any]:
        model = tiny_llama(layers=4, tied=True, dtype=dtype).to(device)
        checkpoint_selected(cast(Any, model))
        return model, gs.BlockOptimizer(model, policy, lr=1e-2, **settings)

    if dtype == torch.float64:
        assert_same_training(make)
        return
    model, optimizer = make(DEVICE)
    train(model, optimizer, range(NUM_STEPS), device=DEVICE)
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())
    assert sum(optimizer.update_counts.values()) == 2 * NUM_STEPS


def test_offloaded_masters_in_bfloat16_are_bitwise_those_that_stay() -> None:
    ends = []
    for residency in (gs.Keep(), gs.Offload()):
        model = tiny_llama(layers=4, tied=True, dtype=torch.bfloat16).to(DEVICE)
        policy = gs.Uniform(count=2)
        optimizer = gs.BlockOptimizer(model, policy, lr=1e-2, residency=residency)
        train(model, optimizer, range(30), device=DEVICE)
        ends.append(model.state_dict())
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_a_mask_drawn_on_a_gpu_is_that_of_a_cpu_bitwise() -> None:
    chosen = []
    for device in ("cpu", DEVICE):
        model = tiny_llama(layers=2).to(device)
        optimizer = gs.SparseOptimizer(model, gs.SpaRTA(density=0.05), lr=1e-2)
        train(model, optimizer, range(1), device=device)
        chosen.append({name: indices.cpu().tolist() for name, indices in optimizer.entries.items()})
    assert chosen[0] == chosen[1]


RULES_OF_8_BITS = (gs.AdamW8bitRule(), gs.AdamW8bitRule(fused=True))


def is_quantised(optimizer: gs.BlockOptimizer) -> bool:
    return any(tensor.dtype == torch.uint8 for state in optimizer.state.values() for tensor in state.values())


def test_8_bit_moments_train_to_about_the_same_loss() -> None:
    losses = []
    for rule in (gs.AdamWRule(), *RULES_OF_8_BITS):
        model = large_llama().to(DEVICE)
        optimizer = gs.BlockOptimizer(model, gs.All(), lr=2e-3, rule=rule)
        train(model, optimizer, range(20), device=DEVICE)
        assert is_quantised(optimizer) == isinstance(rule, gs.AdamW8bitRule)
        losses.append(model(**batch_of(model, seed=0, device=DEVICE)).loss.item())
    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=0.1)


@pytest.mark.parametrize("rule", RULES_OF_8_BITS, ids=str)
def test_offloaded_8_bit_moments_are_bitwise_those_that_stay(rule: gs.AdamW8bitRule) -> None:
    """The copies of a block hold codes, scales, small moments in full precision and masters."""
    ends = []
    for residency in (gs.Keep(), gs.Offload()):
        model = large_llama(dtype=torch.bfloat16).to(DEVICE)
        optimizer = gs.BlockOptimizer(model, gs.Uniform(count=2), lr=1e-2, residency=residency, rule=rule)
        train(model, optimizer, range(30), device=DEVICE)
        assert is_quantised(optimizer)
        ends.append(model.state_dict())
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


@pytest.mark.parametrize("signed", [True, False])
def test_numbers_are_quantised_as_on_a_cpu_bitwise(signed: bool) -> None:
    values = torch.randn(2**16, generator=torch.Generator().manual_seed(0))
    values = values if signed else values.square()
    (codes, scales), (codes_there, scales_there) = (
        quantise(values.to(device), signed=signed) for device in ("cpu", DEVICE)
    )
    assert torch.equal(codes, codes_there.cpu())
    assert torch.equal(scales, scales_there.cpu())
    there = dequantise(codes_there, scales_there, signed=signed)
    assert torch.equal(dequantise(codes, scales, signed=signed), there.cpu())


@pytest.fixture(scope="module")
def wide_place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that is deep and wide enough for the methods of the suites, and data."""
    folder = tmp_path_factory.mktemp("wide")
    write_model(folder / "model", hidden_size=128, intermediate_size=128, num_hidden_layers=12)
    write_sums(folder / "sums.jsonl")
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", RECIPES)
def test_every_method_of_a_recipe_has_the_losses_of_a_cpu(
    name: str, dtype: str, wide_place: Path, tmp_path: Path
) -> None:
    """The whole way: recipe, trainer, optimizer, memory that is measured."""
    losses = {}
    for device in ("cpu", "auto"):
        trainer, _ = build(
            wide_place,
            tmp_path / device,
            model={"dtype": dtype},
            method=RECIPES[name].model_dump(mode="json", exclude_unset=True),
            run={"device": device, "steps": NUM_STEPS},
            optimizer={"lr": 1e-3},
        )
        trainer.train()
        losses[device] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        trainer.close()
        model: Any = trainer.model
        expected = "cpu" if device == "cpu" else DEVICE
        assert {parameter.device.type for parameter in model.parameters()} == {expected}
    assert len(losses["cpu"]) == NUM_STEPS
    assert losses["auto"] == pytest.approx(losses["cpu"], rel=2e-3 if dtype == "float32" else 5e-2)
