"""StaticMask: every salience against its formula, and estimates without side effects."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from mask_support import best, offered, snapshot
from tiny_models import VOCABULARY, tiny_batch, tiny_bert, tiny_gpt2, tiny_llama, tiny_plain
from torch import Tensor, nn
from torch.nn import functional

from gradselect import SparseOptimizer, StaticMask, UsageError, salience
from gradselect.masks.calibration import Probe
from gradselect.masks.static import weight_scores

Weights = dict[str, Tensor]


def double_model() -> nn.Module:
    return tiny_plain(layers=2, tied=True).double()


def batches_of(model: nn.Module, count: int = 3) -> list[dict[str, Tensor]]:
    return [tiny_batch(model, seed=seed) for seed in range(count)]


def estimated(each: salience.AbstractSalience, model: nn.Module, batches: list[dict[str, Tensor]]) -> Weights:
    assert isinstance(each, salience.GradientSalience | salience.ModelSalience)
    return each.estimate(Probe(model=model, tensors=offered(model), batches=batches))


def gradients_of(model: nn.Module, batch: dict[str, Tensor]) -> Weights:
    twin = copy.deepcopy(model)
    twin(**batch).loss.backward()
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in twin.named_parameters()
    }


FORMULAS: dict[salience.AbstractSalience, Callable[[Tensor, list[Tensor]], Tensor]] = {
    salience.gradient: lambda _, g: (sum(g) / len(g)).abs(),  # type: ignore[union-attr]
    salience.snip: lambda w, g: (w * sum(g) / len(g)).abs(),  # type: ignore[union-attr]
    salience.force: lambda w, g: -w * sum(g) / len(g),
    salience.taylor: lambda w, g: sum((w * each) ** 2 for each in g) / len(g),  # type: ignore[return-value]
    salience.fisher: lambda _, g: sum(each**2 for each in g) / len(g),  # type: ignore[return-value]
}


def test_every_salience_of_gradients_has_its_formula_here() -> None:
    assert set(FORMULAS) == {each for each in vars(salience).values() if isinstance(each, salience.GradientSalience)}


@pytest.mark.parametrize("each", FORMULAS, ids=lambda each: each.name)
def test_a_salience_of_gradients_is_its_formula_over_the_batches(each: salience.GradientSalience) -> None:
    model = double_model()
    batches = batches_of(model)
    scores = estimated(each, model, batches)
    found = [gradients_of(model, batch) for batch in batches]
    for name, weight in model.named_parameters():
        expected = FORMULAS[each](weight.detach(), [gradients[name] for gradients in found])
        torch.testing.assert_close(scores[name], expected, rtol=1e-10, atol=1e-14)


def test_grasp_is_the_weight_times_the_hessian_times_the_mean_gradient() -> None:
    """H g from a central difference of gradients along g; a small step, because of the kinks of relu."""
    model = double_model()
    batches = batches_of(model)
    scores = estimated(salience.grasp, model, batches)

    def mean_gradients(along: Weights, length: float) -> Weights:
        moved = copy.deepcopy(model)
        with torch.no_grad():
            for name, parameter in moved.named_parameters():
                parameter.add_(along[name], alpha=length)
        found = [gradients_of(moved, batch) for batch in batches]
        return {name: sum(each[name] for each in found) / len(found) for name in found[0]}  # type: ignore[misc]

    direction = mean_gradients({name: torch.zeros_like(weight) for name, weight in model.named_parameters()}, 0.0)
    forward, backward = mean_gradients(direction, 1e-6), mean_gradients(direction, -1e-6)
    for name, weight in model.named_parameters():
        expected = weight.detach() * (forward[name] - backward[name]) / 2e-6
        torch.testing.assert_close(scores[name], expected, rtol=1e-4, atol=1e-8)
    assert sum(float(score.abs().sum()) for score in scores.values()) > 0


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2, tiny_bert])
def test_grasp_goes_through_the_attention_of_transformers(build: Callable[..., nn.Module]) -> None:
    model = build(layers=1)
    scores = estimated(salience.grasp, model, batches_of(model))
    query = next(score for name, score in scores.items() if "attn" in name or "query" in name)
    assert query.isfinite().all()
    assert query.abs().sum() > 0


def test_synflow_is_the_flow_through_the_absolute_weights() -> None:
    model = tiny_llama(layers=2, tied=True).double()
    with torch.no_grad():
        next(model.parameters())[0, :3] = torch.tensor([-0.0, 0.0, -1.0])
    before = snapshot(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.copy_(parameter.abs())
    twin(inputs_embeds=torch.ones(1, 2, 16, dtype=torch.float64)).logits.sum().backward()
    mask = StaticMask(salience=salience.synflow, budget=100).bind(offered(model))
    expected = {name: (p.detach() * p.grad).abs() for name, p in twin.named_parameters() if p.grad is not None}
    assert {name: each.tolist() for name, each in mask.choose(0, model).items()} == best(expected, 100)
    assert all(same_bits(before[name], each) for name, each in snapshot(model).items())


def test_synflow_takes_an_input_of_the_users() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(UsageError, match="Sequential does not name its input embedding"):
        SparseOptimizer(model, StaticMask(salience=salience.synflow, budget=5))
    batches = [{"input": torch.ones(1, 3)}]
    optimizer = SparseOptimizer(model, StaticMask(salience=salience.synflow, budget=5, batches=batches))
    twin = copy.deepcopy(model)
    for parameter in twin.parameters():
        parameter.data.abs_()
    twin(torch.ones(1, 3)).sum().backward()
    expected = {name: (p.detach() * p.grad).abs() for name, p in twin.named_parameters() if p.grad is not None}
    assert {name: each.tolist() for name, each in optimizer.entries.items()} == best(expected, 5)


def test_synflow_sums_the_logits_of_batches_that_hold_labels() -> None:
    """The first output of a model of transformers that gets labels is its loss."""
    model = tiny_llama(layers=2)
    batch = tiny_batch(model, seed=0)
    found = [
        StaticMask(salience=salience.synflow, budget=100, batches=[each]).bind(offered(model)).choose(0, model)
        for each in (batch, {name: value for name, value in batch.items() if name != "labels"})
    ]
    first, second = ({name: entries.tolist() for name, entries in each.items()} for each in found)
    assert first == second


def test_weights_are_bitwise_as_before_after_an_error_too() -> None:
    model = tiny_llama(layers=1)
    before = snapshot(model)
    mask = StaticMask(salience=salience.synflow, budget=5, batches=[{"inputs_embeds": torch.ones(1, 2, 5)}])
    with pytest.raises(RuntimeError):
        mask.bind(offered(model)).choose(0, model)
    assert model.training
    assert all(same_bits(before[name], each) for name, each in snapshot(model).items())


@pytest.mark.parametrize(
    ("each", "sign"), [(salience.magnitude, 1.0), (salience.smallest_magnitude, -1.0)], ids=["largest", "smallest"]
)
@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_magnitude_is_that_of_the_weights(each: salience.WeightSalience, sign: float, scope: str) -> None:
    model = tiny_llama(layers=1)
    mask = StaticMask(salience=each, budget=150, scope=scope).bind(offered(model))  # type: ignore[arg-type]
    scores = {name: sign * parameter.detach().abs() for name, parameter in model.named_parameters()}
    chosen = {name: indices.tolist() for name, indices in mask.choose(0, model).items()}
    if scope == "global":
        assert chosen == best(scores, 150)
    else:
        total = sum(score.numel() for score in scores.values())
        for name, score in scores.items():
            count = len(chosen.get(name, []))
            assert abs(count - 150 * score.numel() / total) < 1
            assert chosen.get(name, []) == best({name: score}, count).get(name, [])


def test_random_takes_every_entry_equally_often() -> None:
    """60 of 240 entries, 600 draws: each count is binomial, and 5 standard deviations are never left by chance."""
    model = nn.ParameterDict({"a": nn.Parameter(torch.zeros(200)), "b": nn.Parameter(torch.zeros(4, 10))})
    counts = {name: torch.zeros(parameter.numel()) for name, parameter in model.named_parameters()}
    for seed in range(600):
        mask = StaticMask(salience=salience.random, budget=60, seed=seed).bind(offered(model))
        chosen = mask.choose(0, model)
        assert sum(indices.numel() for indices in chosen.values()) == 60
        for name, indices in chosen.items():
            counts[name][indices] += 1
    bound = 5 * math.sqrt(600 * 0.25 * 0.75)
    assert all(((count - 150).abs() < bound).all() for count in counts.values())
    assert abs(counts["b"].sum() - 600 * 10) < 5 * math.sqrt(600 * 10)


def test_random_draws_otherwise_for_another_seed_step_or_tensor() -> None:
    first, second = offered(nn.ParameterDict({name: nn.Parameter(torch.zeros(50)) for name in "ab"}))

    def scores(tensor: object, seed: int, step: int) -> tuple[float, ...]:
        (chunk,) = weight_scores(salience.random, tensor, seed=seed, step=step)  # type: ignore[arg-type]
        return tuple(chunk.tolist())

    draws = {scores(tensor, seed, step) for tensor in (first, second) for seed in (0, 1) for step in (0, 7)}
    assert len(draws) == 8


def test_scores_of_a_half_precision_model_are_not_rounded_to_it() -> None:
    model = tiny_llama(layers=1, dtype=torch.bfloat16)
    for each in (salience.snip, salience.grasp):
        assert {score.dtype for score in estimated(each, model, batches_of(model)).values()} == {torch.float32}
    mask = StaticMask(salience=salience.snip, budget=1).bind(offered(model))
    third, gradient = torch.tensor([0.334, 0.71], dtype=torch.bfloat16)
    assert mask.score(third, gradient) == third.float() * gradient.float()


# Without a trace ---------------------------------------------------------------------------------------------------


class Noisy(nn.Module):
    """Dropout, a batch norm, a counter and a frozen layer."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, 8)
        self.norm = nn.BatchNorm1d(8)
        self.up = nn.Linear(8, 8)
        self.frozen = nn.Linear(8, 8)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        self.calls += 1
        hidden = functional.dropout(self.up(self.norm(self.tokens(input_ids))), training=self.training)
        return functional.cross_entropy(self.frozen(hidden), labels % 8)


def noisy_model() -> Noisy:
    model = Noisy()
    model.frozen.requires_grad_(False)
    model.norm.eval()
    return model


def noisy_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    torch.rand(3)  # a loss that draws random numbers itself
    return model(**batch)


@pytest.mark.parametrize("each", [salience.gradient, salience.fisher, salience.grasp], ids=lambda each: each.name)
def test_estimating_leaves_the_model_and_the_random_state_as_they_were(each: salience.AbstractSalience) -> None:
    model = noisy_model()
    tokens = torch.arange(12) % VOCABULARY
    model(tokens, tokens).backward()
    calls = []
    model.up.weight.register_post_accumulate_grad_hook(lambda parameter: calls.append(parameter))
    before, random_state = snapshot(model), torch.get_rng_state()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    mask = StaticMask(
        salience=each, budget=9, batches=[{"input_ids": tokens, "labels": tokens}] * 2, loss=noisy_loss
    ).bind([tensor for tensor in offered(model) if tensor.parameter.requires_grad])
    first, second = mask.choose(0, model), mask.choose(0, model)
    assert sum(indices.numel() for indices in first.values()) == 9
    assert all(torch.equal(first[name], second[name]) for name in first)  # no dropout
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(same_bits(before[name], value) for name, value in snapshot(model).items())
    assert calls == []
    assert all(parameter.grad is grads[name] for name, parameter in model.named_parameters())
    assert model.training
    assert not model.norm.training
    assert model.up.weight.requires_grad
    assert not model.frozen.weight.requires_grad


@pytest.mark.parametrize(
    ("batches", "loss", "message"),
    [
        ([], None, "batches is empty"),
        ([{"input_ids": torch.ones(1, 4, dtype=torch.long)}], None, "put labels into batches"),
        (
            [{"input_ids": torch.ones(1, 4, dtype=torch.long)}],
            lambda model, batch: model(**batch).logits,
            "not a scalar",
        ),
        (
            [dict.fromkeys(("input_ids", "labels"), torch.ones(1, 1, dtype=torch.long))],
            lambda model, batch: model(**batch).logits.sum() * math.nan,
            "the loss of a batch is nan",
        ),
    ],
    ids=["no batch", "no labels", "not a scalar", "nan"],
)
def test_batches_that_give_no_loss_are_refused(batches: list[dict[str, Tensor]], loss, message: str) -> None:
    model = tiny_llama(layers=1)
    with pytest.raises(UsageError, match=message):
        SparseOptimizer(model, StaticMask(budget=5, batches=batches, loss=loss))
    assert model.training


def test_a_tensor_that_the_loss_does_not_reach_scores_zero() -> None:
    model = nn.ModuleDict({"used": nn.Linear(2, 1), "unused": nn.Linear(2, 1)})
    mask = StaticMask(
        density=0.5, batches=[{"x": torch.ones(1, 2)}], loss=lambda model, batch: model.used(batch["x"]).sum()
    )
    chosen = mask.bind(offered(model)).choose(0, model)
    assert {name: indices.tolist() for name, indices in chosen.items()} == {"used.weight": [0, 1], "used.bias": [0]}


# In the optimizer --------------------------------------------------------------------------------------------------


def test_without_batches_the_set_is_that_of_the_first_gradient() -> None:
    model = tiny_llama(layers=1)
    twin = copy.deepcopy(model)
    optimizer = SparseOptimizer(model, StaticMask(budget=50))
    assert optimizer.entries == {}
    for seed in range(3):
        model(**tiny_batch(model, seed=seed)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    scores = {name: gradient.abs() for name, gradient in gradients_of(twin, tiny_batch(twin, seed=0)).items()}
    assert {name: indices.tolist() for name, indices in optimizer.entries.items()} == best(scores, 50)


def test_entries_that_stay_at_a_refresh_keep_their_moments() -> None:
    model = tiny_llama(layers=1)
    optimizer = SparseOptimizer(model, StaticMask(budget=200, refresh_every=2), lr=1e-2)

    def first_moments() -> dict[tuple[int, int], float]:
        states = optimizer.state_dict()["state"]
        return {
            (tensor, index): moment
            for tensor, state in states.items()
            for index, moment in zip(state["indices"].tolist(), state["exp_avg"].tolist(), strict=True)
        }

    for seed in range(2):
        model(**tiny_batch(model, seed=seed)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    before = first_moments()
    names = [name for group in optimizer.param_groups for name in group["param_names"]]
    found = gradients_of(model, tiny_batch(model, seed=2))
    model(**tiny_batch(model, seed=2)).loss.backward()
    optimizer.step()
    after = first_moments()
    stayed = set(before) & set(after)
    assert 0 < len(stayed) < 200
    assert optimizer.last_record is not None
    assert optimizer.last_record.overlap == len(stayed) / 200
    for tensor, index in after:
        gradient = float(found[names[tensor]].view(-1)[index])
        expected = 0.9 * before.get((tensor, index), 0.0) + 0.1 * gradient
        assert after[tensor, index] == pytest.approx(expected, rel=1e-5, abs=1e-12)


def same_bits(first: Tensor, second: Tensor) -> bool:
    """Equal, the sign of zero included."""
    return torch.equal(first, second) and torch.equal(torch.signbit(first), torch.signbit(second))
