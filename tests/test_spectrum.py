"""Spectrum: the signal-to-noise ratio of matrices, and the choice within each type."""

from __future__ import annotations

import copy
import math
import sys
from typing import Any

import pytest
import torch
from policy_support import through_torch
from tiny_models import tiny_batch, tiny_bert, tiny_llama
from torch import Tensor, nn

import gradselect as gs
from gradselect import UsageError
from gradselect.policies.spectrum import signal_to_noise


def plain_ratio(matrix: Tensor) -> float:
    """The formula, one singular value after the other, by the square roots of the eigenvalues of the Gram matrix."""
    rows, columns = matrix.shape
    gram = matrix.double() @ matrix.double().T if rows <= columns else matrix.double().T @ matrix.double()
    values = sorted(math.sqrt(max(value, 0.0)) for value in torch.linalg.eigvalsh(gram).tolist())

    def percentile(share: float) -> float:
        place = share * (len(values) - 1)
        below = math.floor(place)
        above = min(below + 1, len(values) - 1)
        return values[below] + (place - below) * (values[above] - values[below])

    threshold = (percentile(0.75) - percentile(0.25)) / 1.349 * (1 + math.sqrt(min(rows, columns) / max(rows, columns)))
    signal = noise = 0.0
    for value in values:
        if value > threshold:
            signal += value
        else:
            noise += value
    return signal / noise / values[-1] if noise else sys.float_info.max


@pytest.mark.parametrize("shape", [(12, 12), (8, 20), (20, 8), (16, 5)])
def test_the_ratio_is_that_of_the_formula(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    for rank in (1, 3):
        noise = torch.randn(shape, generator=generator)
        factors = torch.randn(shape[0], rank, generator=generator), torch.randn(rank, shape[1], generator=generator)
        matrix = noise + 2.0 * factors[0] @ factors[1]
        assert signal_to_noise(matrix) == pytest.approx(plain_ratio(matrix), rel=1e-4)


def test_a_matrix_of_zeros_has_no_signal_and_one_of_equal_values_no_noise() -> None:
    assert signal_to_noise(torch.zeros(4, 6)) == 0.0
    assert signal_to_noise(torch.eye(6)[:, :6] * 2) > 1e300


def with_signal(model: nn.Module, *, layers: dict[str, int]) -> nn.Module:
    """The model, with a strong direction in one layer of each type of matrix."""
    for name, parameter in model.named_parameters():
        for kind, layer in layers.items():
            if f"layers.{layer}." in name and f"{kind}.weight" in name:
                parameter.data += 5.0 / math.sqrt(parameter.numel())
    return model


def test_each_type_of_matrix_has_its_own_ranking() -> None:
    kinds = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    model = tiny_llama(layers=4)
    blocks = gs.partition(model, by="matrix")
    policy = gs.Spectrum(fraction=0.5).bind(blocks)
    selected = policy.propose(0)
    named = dict(model.named_parameters())
    for kind in kinds:
        folder = "mlp" if kind in kinds[4:] else "self_attn"
        ratios = [plain_ratio(named[f"model.layers.{layer}.{folder}.{kind}.weight"]) for layer in range(4)]
        best = sorted(range(4), key=lambda layer: -ratios[layer])[:2]
        expected = [f"layer.{layer}.{folder}.{kind}" for layer in sorted(best)]
        assert [name for name in selected if kind in name] == expected
    assert len(selected) == 2 * len(kinds)
    assert policy.propose(7) == selected


def train(model: nn.Module, optimizer: Any, steps: range) -> None:
    for step in steps:
        model(**tiny_batch(model, seed=step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def build(model: nn.Module) -> gs.BlockOptimizer:
    method: Any = gs.method({"name": "spectrum"})
    return method.make_optimizer(model, lr=1e-2)


def test_the_preset_trains_the_best_quarter_with_embedding_and_head_and_nothing_else() -> None:
    model = tiny_llama(layers=4)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = build(model)
    train(model, optimizer, range(2))
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert {"model.embed_tokens.weight", "lm_head.weight"} <= moved
    assert len(moved) == 7 + 2
    assert not any("norm" in name for name in moved)


def test_a_tied_head_and_a_classifier_are_fine() -> None:
    for model in (tiny_llama(layers=2, tied=True), tiny_bert(layers=2)):
        train(model, build(model), range(1))


def test_a_resumed_run_keeps_the_ratios_of_the_weights_before_training() -> None:
    """The weights that it loads may rank otherwise."""
    whole = tiny_llama(layers=4)
    optimizer = build(whole)
    train(whole, optimizer, range(2))
    weights, state = copy.deepcopy(whole.state_dict()), through_torch(optimizer.state_dict())
    train(whole, optimizer, range(2, 4))
    resumed = tiny_llama(layers=4)
    resumed.load_state_dict(weights)
    with_signal(resumed, layers={"q_proj": 3, "up_proj": 0})  # as if training had changed much
    again = build(resumed)
    assert again.trainable != optimizer.trainable
    resumed.load_state_dict(weights)
    again.load_state_dict(state)
    assert again.trainable == optimizer.trainable
    train(resumed, again, range(2, 4))
    for name, weight in whole.named_parameters():
        assert torch.equal(weight, resumed.get_parameter(name)), name


def test_a_matrix_that_the_loss_does_not_reach_gives_its_place_to_the_next() -> None:
    policy = gs.Spectrum(fraction=0.5).bind(gs.partition(tiny_llama(layers=4), by="matrix"))
    before = [name for name in policy.propose(0) if "up_proj" in name]
    policy.candidates = tuple(block for block in policy.candidates if block.name != before[0])
    after = [name for name in policy.propose(1) if "up_proj" in name]
    assert len(after) == len(before) == 2
    assert before[1] in after
    assert before[0] not in after


def test_blocks_of_whole_layers_are_refused_with_what_to_write() -> None:
    with pytest.raises(UsageError, match='by="matrix"'):
        gs.BlockOptimizer(tiny_llama(layers=2), gs.Spectrum())


def test_weights_that_are_not_finite_are_refused() -> None:
    model = tiny_llama(layers=2)
    model.get_parameter("model.layers.1.mlp.up_proj.weight").data[0, 0] = math.nan
    with pytest.raises(UsageError, match=r"'layer\.1\.mlp\.up_proj' holds weights that are not finite"):
        gs.BlockOptimizer(model, gs.Spectrum(), blocks=gs.partition(model, by="matrix"))
