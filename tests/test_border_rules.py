"""Borders of a selection: coasting, re-warming and rates by visits, against a plain loop."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import pytest
import torch
from resume_support import assert_resumes
from slice_support import train as train_on_tokens
from tiny_models import tiny_llama
from torch import Tensor, nn

import gradselect as gs
from gradselect.integrations.transformers.method_settings import method_settings

COASTING = gs.Borders(coasting=2, coasting_decay=0.7)
REWARM = gs.Borders(rewarm_steps=3, rewarm_after=3)
WARM_RETURN = gs.Borders(rewarm_steps=4, rewarm_after=2, rewarm_first=False)
VISITS = gs.Borders(rate_by_visits=0.5, rate_cap=1.2)
EXIT = gs.Borders(exit_step=True)
EXIT_AND_MORE = gs.Borders(exit_step=True, rewarm_steps=3, rewarm_after=2, rate_by_visits=1.0)
EVERYTHING = gs.Borders(coasting=1, rewarm_steps=3, rewarm_after=2, rate_by_visits=1.0)
BORDERS = {
    "coasting": COASTING,
    "rewarm": REWARM,
    "rewarm of a return": WARM_RETURN,
    "visits": VISITS,
    "exit": EXIT,
    "exit and more": EXIT_AND_MORE,
    "everything": EVERYTHING,
}
POLICIES = {
    "uniform": lambda: gs.Uniform(count=2, seed=3),
    "cyclic": lambda: gs.Cyclic(every=2),
    "explore": lambda: gs.AdaGradSelect(count=2, explore_steps=4),
}
RESIDENCIES = {"keep": gs.Keep, "offload": gs.Offload, "drop": gs.Drop}
BETAS, EPS, DECAY, LR = (0.9, 0.999), 1e-8, 0.1, 1e-2


def small(dtype: torch.dtype = torch.float64) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(*(nn.Linear(6, 6, bias=False, dtype=dtype) for _ in range(5)))
    for parameter in model.parameters():
        parameter.data = torch.randn(6, 6, generator=generator).to(dtype) / 3
    return model


def loss_of(model: nn.Module, step: int) -> Tensor:
    dtype = next(model.parameters()).dtype
    rows = torch.randn(4, 6, generator=torch.Generator().manual_seed(step)).to(dtype)
    return (model(rows) - rows.flip(1)).square().mean()


def train(model: nn.Module, optimizer: gs.BlockOptimizer, steps: range) -> list[Any]:
    records = []
    for step in steps:
        loss_of(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
        records.append(optimizer.last_record)
    return records


def named(model: nn.Module) -> dict[str, Tensor]:
    return {f"layer.{number}": weight for number, weight in enumerate(model.parameters())}


class PlainLoop:
    """The readable twin: AdamW or SGD of full gradients, and the formulas of `Borders` written out, block by block."""

    def __init__(self, model: nn.Module, borders: gs.Borders, *, drops: bool, rule: gs.AbstractRule) -> None:
        self.model, self.borders, self.drops, self.rule = model, borders, drops, rule
        self.updated: dict[str, list[int]] = {name: [] for name in named(model)}
        self.state: dict[str, tuple[int, Tensor, Tensor]] = {}
        self.after = 1 if borders.exit_step else borders.coasting

    def step(self, step: int, selected: tuple[str, ...]) -> None:
        loss_of(self.model, step).backward()
        before = {name: len(steps) for name, steps in self.updated.items()}
        with torch.no_grad():
            for name, weight in named(self.model).items():
                assert weight.grad is not None
                last = self.updated[name][-1] if self.updated[name] else None
                age = math.inf if last is None else step - last
                if self.drops and name not in selected and age > self.after:
                    self.state.pop(name, None)
                if name in selected:
                    if self.drops and age > self.after + 1:
                        self.state.pop(name, None)
                    self.updated[name].append(step)
                    self.update(name, weight, weight.grad, LR * self.warm(name) * self.by_visits(name, before))
                elif age <= self.after:
                    factor = self.borders.coasting_decay**age * self.warm(name) * self.by_visits(name, before)
                    if self.borders.exit_step:
                        momentum = self.rule.momentum if isinstance(self.rule, gs.SGDRule) else BETAS[0]
                        factor *= sum(momentum**number for number in range(1000))
                    self.coast(name, weight, LR * factor)
        self.model.zero_grad()

    def warm(self, name: str) -> float:
        steps, wanted = self.updated[name], self.borders.rewarm_steps
        if not wanted:
            return 1.0
        number = 0 if self.borders.rewarm_first else -math.inf
        for before, now in zip([None, *steps], steps, strict=False):
            absence = 0 if before is None else now - before - 1
            returned = absence >= self.borders.rewarm_after or (self.drops and absence > self.after)
            number = 1 if returned else number + 1
        return 1.0 if number < 0 else min(1.0, number / wanted)

    def by_visits(self, name: str, visits: dict[str, int]) -> float:
        mean = sum(visits.values()) / len(visits)
        factor = ((1 + mean) / (1 + visits[name])) ** self.borders.rate_by_visits
        return max(1 / self.borders.rate_cap, min(self.borders.rate_cap, factor))

    def update(self, name: str, weight: Tensor, grad: Tensor, lr: float) -> None:
        time, mean, square = self.state.get(name, (0, torch.zeros_like(weight), torch.zeros_like(weight)))
        if isinstance(self.rule, gs.SGDRule):
            grad = grad + DECAY * weight
            mean = self.rule.momentum * mean + grad
            weight -= lr * (grad + self.rule.momentum * mean if self.rule.nesterov else mean)
        else:
            weight -= lr * DECAY * weight
            mean = BETAS[0] * mean + (1 - BETAS[0]) * grad
            square = BETAS[1] * square + (1 - BETAS[1]) * grad**2
            weight -= self.direction(time + 1, mean, square) * lr
        self.state[name] = time + 1, mean, square

    def coast(self, name: str, weight: Tensor, lr: float) -> None:
        time, mean, square = self.state[name]
        if isinstance(self.rule, gs.SGDRule):
            mean = self.rule.momentum * mean
            weight -= lr * (self.rule.momentum * mean if self.rule.nesterov else mean)
        else:
            mean = BETAS[0] * mean
            weight -= self.direction(time, mean, square) * lr
        self.state[name] = time, mean * (not self.borders.exit_step), square

    def direction(self, time: int, mean: Tensor, square: Tensor) -> Tensor:
        return mean / (1 - BETAS[0] ** time) / ((square / (1 - BETAS[1] ** time)).sqrt() + EPS)


def build(model: nn.Module, policy: gs.AbstractPolicy, borders: gs.Borders | None, **options: Any) -> gs.BlockOptimizer:
    options = {"lr": LR, "weight_decay": DECAY, **options}
    return gs.BlockOptimizer(model, policy, borders=borders, **options)


def assert_like_the_loop(borders: gs.Borders, policy: str, residency: str, **options: Any) -> None:
    ours, theirs = small(), small()
    optimizer = build(ours, POLICIES[policy](), borders, residency=RESIDENCIES[residency](), **options)
    twin = PlainLoop(theirs, borders, drops=residency == "drop", rule=optimizer.rule)
    for step in range(16):
        (record,) = train(ours, optimizer, range(step, step + 1))
        twin.step(step, record.selected)
        for name, weight in named(ours).items():
            # Bias corrections come from counters in fp32, and an exit step is nine coasting steps long.
            torch.testing.assert_close(weight, named(theirs)[name], rtol=0, atol=1e-7 if borders.exit_step else 1e-8)


@pytest.mark.parametrize("residency", RESIDENCIES)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("borders", BORDERS)
def test_equals_the_plain_loop(borders: str, policy: str, residency: str) -> None:
    assert_like_the_loop(BORDERS[borders], policy, residency)


@pytest.mark.parametrize("borders", ["everything", "exit"])
@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_coasts_as_the_plain_loop(nesterov: bool, borders: str) -> None:
    assert_like_the_loop(BORDERS[borders], "uniform", "drop", rule=gs.SGDRule(momentum=0.8, nesterov=nesterov))


def test_the_exit_step_is_that_of_misa() -> None:
    """Line 16 of its algorithm 1, with bias correction: beta1 / (1 - beta1) of a step, before the state is cleared."""
    model = small()
    optimizer = build(model, gs.Cyclic(every=3, order="ascending"), EXIT, residency=gs.Drop(), weight_decay=0.0)
    train(model, optimizer, range(3))
    first = next(iter(model.parameters()))
    state = {name: value.clone() for name, value in optimizer.state[first].items()}
    before = first.detach().clone()
    (record,) = train(model, optimizer, range(3, 4))
    assert (record.selected, record.coasted) == (("layer.1",), ("layer.0",))
    mean, square = (state[name] / (1 - beta**3) for name, beta in zip(("exp_avg", "exp_avg_sq"), BETAS, strict=True))
    expected = before - LR * BETAS[0] / (1 - BETAS[0]) * mean / (square.sqrt() + EPS)
    torch.testing.assert_close(first.detach(), expected, rtol=0, atol=1e-7)
    train(model, optimizer, range(4, 5))
    assert not optimizer.state.get(first)


@pytest.mark.parametrize("rule", [gs.AdamWRule(), gs.SGDRule(momentum=0.9)], ids=["adamw", "sgd"])
@pytest.mark.parametrize("residency", [gs.Keep(), gs.Offload()], ids=["keep", "offload"])
def test_the_exit_step_leaves_no_momentum_to_a_block_that_returns(
    residency: gs.AbstractResidency, rule: gs.AbstractRule
) -> None:
    """It moved by all of its momentum, and at its return by a part of that once more."""
    model, policy = small(), gs.Cyclic(every=1, order="ascending")
    optimizer = build(model, policy, EXIT, residency=residency, rule=rule, weight_decay=0.0)
    first, number = next(iter(model.parameters())), len(list(model.parameters()))
    train(model, optimizer, range(2))
    assert rule.momentum_name is not None
    assert not optimizer.state[first][rule.momentum_name].any()
    train(model, optimizer, range(2, number))
    before = first.detach().clone()
    (0.0 * loss_of(model, number)).backward()
    optimizer.step()
    assert optimizer.last_record.selected == ("layer.0",)
    assert torch.equal(first, before)


def test_a_checkpoint_without_an_exit_step_is_as_it_was() -> None:
    """Those of earlier versions do not know the setting."""
    optimizer = build(small(), gs.Uniform(count=1), COASTING)
    assert "exit_step" not in optimizer.borders
    assert build(small(), gs.Uniform(count=1), EXIT).borders["exit_step"] is True


@pytest.mark.parametrize("borders", BORDERS)
def test_updates_in_the_backward_pass_are_the_same(borders: str) -> None:
    for residency in (gs.Keep(), gs.Drop()):
        pair = []
        for in_backward in (False, True):
            model = small(torch.float32)
            optimizer = build(
                model, gs.Uniform(count=2), BORDERS[borders], residency=residency, update_in_backward=in_backward
            )
            pair.append((train(model, optimizer, range(10)), list(model.parameters()), optimizer.memory()))
        assert pair[0][0] == pair[1][0]
        assert pair[0][2] == pair[1][2]
        assert all(map(torch.equal, pair[0][1], pair[1][1]))


def test_settings_that_change_nothing_are_no_settings_bitwise() -> None:
    pair = []
    for borders in (None, gs.Borders(), gs.Borders(rewarm_steps=1)):
        model = small(torch.float32)
        pair.append((train(model, build(model, gs.Uniform(count=2), borders), range(8)), list(model.parameters())))
    for records, parameters in pair[1:]:
        assert records == pair[0][0]
        assert all(map(torch.equal, parameters, pair[0][1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("residency", RESIDENCIES)
def test_only_selected_and_coasting_blocks_move(residency: str, dtype: torch.dtype) -> None:
    """The copy follows by patches, so those hold what coasted; masters round to the weights that coasted."""
    model = tiny_llama(dtype=dtype)
    follower = copy.deepcopy(model)
    optimizer = build(model, gs.Cyclic(every=2), COASTING, residency=RESIDENCIES[residency]())
    members = {block.name: block.parameter_names for block in gs.partition(follower)}
    num_coasted = 0
    for step in range(8):
        before = copy.deepcopy(dict(model.named_parameters()))
        (record,) = train_on_tokens(model, optimizer, [step])
        moved = {n for n, parameter in model.named_parameters() if not torch.equal(parameter, before[n])}
        assert moved <= {name for block in (*record.selected, *record.coasted) for name in members[block]}
        assert all(not moved.isdisjoint(members[block]) for block in record.coasted)
        num_coasted += len(record.coasted)
        gs.delta.apply_patch(follower, optimizer.changed_entries())
        assert all(map(torch.equal, model.parameters(), follower.parameters()))
        assert not record.refreshed
    assert num_coasted >= 4


@pytest.mark.parametrize("settings", [{"coasting": 3}, {"exit_step": True}])
@pytest.mark.parametrize("frozen", [("weight",), ("weight", "bias")])
def test_what_is_frozen_while_the_optimizer_is_closed_does_not_coast(settings: Any, frozen: tuple[str, ...]) -> None:
    """A weight of the block, or the whole block, which has just left the selection."""
    model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(3)))
    policy = gs.Cyclic(every=2, order="ascending")
    optimizer = gs.BlockOptimizer(model, policy, lr=LR, borders=gs.Borders(**settings))
    train(model, optimizer, range(2))
    optimizer.close()
    for name in frozen:
        model[0].get_parameter(name).requires_grad_(False)
    before = {name: weight.detach().clone() for name, weight in model[0].named_parameters()}
    optimizer.reopen()
    (record,) = train(model, optimizer, range(2, 3))
    assert {name for name, weight in model[0].named_parameters() if torch.equal(weight, before[name])} == set(frozen)
    assert record.coasted == (() if len(frozen) == len(before) else ("layer.0",))


def test_what_coasts_goes_on_from_weights_that_something_else_wrote() -> None:
    model = small(torch.bfloat16)
    optimizer = build(model, gs.Cyclic(every=1, order="ascending"), COASTING)
    train(model, optimizer, range(1))
    with torch.no_grad():
        named(model)["layer.0"].fill_(4.0)
    (record,) = train(model, optimizer, range(1, 2))
    assert (record.coasted, record.refreshed) == (("layer.0",), ("layer.0",))
    assert (named(model)["layer.0"] - 4.0).abs().max() <= 2 * LR


@pytest.mark.parametrize("borders", ["coasting", "exit", "everything"])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("residency", RESIDENCIES)
def test_stopped_at_any_step_it_resumes_bitwise(residency: str, policy: str, borders: str) -> None:
    def built(weights: dict[str, Tensor] | None) -> tuple[nn.Module, gs.BlockOptimizer]:
        model = small(torch.bfloat16)
        if weights is not None:
            model.load_state_dict(weights)
        return model, build(model, POLICIES[policy](), BORDERS[borders], residency=RESIDENCIES[residency]())

    def change(stop: int, state: dict[str, Any]) -> None:
        if stop % 2:
            del state["selection"]  # torch.distributed.checkpoint leaves the text in the first group only

    def step(model: nn.Module, optimizer: gs.BlockOptimizer, number: int) -> Any:
        return train(model, optimizer, range(number, number + 1))

    assert_resumes(built, step, num_steps=10, change=change)


def test_what_coasts_stays_on_the_device_and_counts_for_its_limit() -> None:
    """A block of 6 x 6 fp32 numbers has two moments: 288 bytes; one is selected and two coast."""
    block = 2 * 36 * 4
    policy, limit = gs.Cyclic(every=1, order="ascending"), 3 * block
    model = small(torch.float32)
    records = train(model, build(model, policy, COASTING, residency=gs.Offload(max_device_bytes=limit)), range(8))
    assert [record.state_bytes for record in records] == [block, 2 * block, *[limit] * 6]
    assert [record.coasted for record in records[:4]] == [
        (),
        ("layer.0",),
        ("layer.0", "layer.1"),
        ("layer.1", "layer.2"),
    ]
    model = small(torch.float32)
    with pytest.raises(gs.UsageError, match=rf"takes {limit} bytes .* max_device_bytes={limit - 1}.*coast"):
        train(model, build(model, policy, COASTING, residency=gs.Offload(max_device_bytes=limit - 1)), range(8))


def test_a_plan_counts_what_coasts() -> None:
    model, policy = tiny_llama(dtype=torch.bfloat16), gs.Cyclic(every=1, among="layer.*")
    sizes: dict[str, Any] = {"batch_size": 2, "sequence_length": 8, "always": "norm", "residency": gs.Offload()}
    plain = gs.plan(model, policy, **sizes).bytes
    found = gs.plan(model, policy, **sizes, borders=COASTING).bytes
    optimizer = build(model, policy, COASTING, always="norm", residency=gs.Offload())
    most = 0
    for step in range(6):
        (record,) = train_on_tokens(model, optimizer, [step])
        most = max(most, record.state_bytes)
    assert found.masters + found.state_on_device == most > plain.masters + plain.state_on_device


def test_a_recipe_sets_them() -> None:
    values: dict[str, Any] = {"name": "uniform", "count": 1, "coasting": 2, "rewarm_steps": 5, "rate_by_visits": 0.5}
    optimizer = gs.method(values).make_optimizer(small(), lr=1e-3)
    assert isinstance(optimizer, gs.BlockOptimizer)
    assert {key: optimizer.borders[key] for key in list(values)[2:]} == dict(list(values.items())[2:])
    settings = method_settings(optimizer)
    assert settings["selection/borders/coasting"] == 2
    plain = gs.method({"name": "uniform", "count": 1}).make_optimizer(small(), lr=1e-3)
    assert not any("borders" in key for key in method_settings(plain))
    for wrong, message in (
        ({"coasting": -1}, r"coasting=-1 is not a whole number from 0 on"),
        ({"rate_by_visits": 2}, r"rate_by_visits=2.0 is outside"),
        ({"moment_bits": 8}, r"coasting=2 needs a rule .* AdamW8bitRule cannot"),
    ):
        with pytest.raises(gs.UsageError, match=message):
            gs.method({**values, **wrong})


def test_slices_coast_too() -> None:
    model = tiny_llama()
    blocks = gs.partition(model, by="columns", parts=4)
    optimizer = build(model, gs.Uniform(count=3), EVERYTHING, blocks=blocks, residency=gs.Offload())
    coasted = 0
    for step in range(4):
        before = {b.name: [p.detach().clone() for p in b.parameters] for b in blocks}
        (record,) = train_on_tokens(model, optimizer, [step])
        moved = {b.name for b in blocks if not all(map(torch.equal, b.parameters, before[b.name]))}
        assert moved == {*record.selected, *record.coasted}
        coasted += len(record.coasted)
    assert coasted


def test_records_say_what_happened_and_others_stay_as_they_were(tmp_path) -> None:
    for borders in (None, EVERYTHING):
        model = small()
        optimizer = build(model, gs.Cyclic(every=1, order="ascending"), borders)
        path = tmp_path / f"{borders is None}.jsonl"
        optimizer.add_record_hook(gs.JsonlWriter(path))
        train(model, optimizer, range(4))
    plain, said = (
        [json.loads(line) for line in path.read_text().splitlines()]
        for path in sorted(tmp_path.iterdir(), reverse=True)
    )
    assert not {"coasted", "rates"} & {key for line in plain for key in line}
    assert said[1]["coasted"] == ["layer.0"]
    # The first of three updates, of a block without visits where the mean is 1/5.
    assert said[1]["rates"] == {"layer.1": pytest.approx(1.2 / 3)}


def test_a_checkpoint_of_other_borders_is_refused() -> None:
    optimizer = build(small(), gs.Uniform(count=2), COASTING)
    for other in (None, VISITS):
        with pytest.raises(gs.UsageError, match=r"the checkpoint is of another run: borders: coasting=2 there"):
            build(small(), gs.Uniform(count=2), other).load_state_dict(optimizer.state_dict())
    old = build(small(), gs.Uniform(count=2), None).state_dict()
    del old["selection"]["borders"], old["selection"]["border_state"], old["selection"]["in_use"]
    build(small(), gs.Uniform(count=2), None).load_state_dict(old)
    with pytest.raises(gs.UsageError, match=r"borders: "):
        optimizer.load_state_dict(old)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"coasting": -1}, r"coasting=-1 is not a whole number from 0 on"),
        ({"coasting": 1.5}, r"coasting=1.5 is not a whole number"),
        ({"coasting_decay": 0.0}, r"coasting_decay=0.0 is outside \(0, 1\]"),
        ({"coasting_decay": 1.5}, r"coasting_decay=1.5 is outside"),
        ({"rewarm_steps": "10"}, r"rewarm_steps='10' is not a whole number"),
        ({"rewarm_after": 0}, r"rewarm_after=0 is not a whole number from 1 on"),
        ({"rate_by_visits": 1.5}, r"rate_by_visits=1.5 is outside"),
        ({"rate_by_visits": -0.5}, r"rate_by_visits=-0.5 is outside"),
        ({"rate_by_visits": math.nan}, r"rate_by_visits=nan is outside"),
        ({"rate_cap": 0.5}, r"rate_cap=0.5 is below 1"),
        (
            {"coasting_decay": 0.5},
            r"coasting_decay=0.5 changes nothing while coasting=0; write coasting=5 too, or leave",
        ),
        ({"rewarm_after": 3}, r"rewarm_after=3 changes nothing while rewarm_steps=0; write rewarm_steps=50 too"),
        ({"rewarm_first": False}, r"rewarm_first=False changes nothing while rewarm_steps=0"),
        ({"rate_cap": 2.0, "coasting": 1}, r"rate_cap=2.0 changes nothing while rate_by_visits=0.0"),
        ({"exit_step": 1}, r"exit_step=1 is no bool object"),
        ({"exit_step": True, "coasting": 2}, r"exit_step=True with coasting=2: .* leave one of them out"),
        ({"rewarm_first": "no"}, r"rewarm_first='no' is no bool object; write rewarm_first=False"),
    ],
    ids=str,
)
def test_settings_outside_their_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(gs.UsageError, match=message):
        gs.Borders(**settings)


@pytest.mark.parametrize(
    "rule",
    [gs.AdamW8bitRule(), gs.TorchRule(torch.optim.Adam), gs.SGDRule(momentum=0.0)],
    ids=["8 bit", "of torch", "without momentum"],
)
def test_rules_without_such_a_momentum_do_not_coast_and_may_do_the_rest(rule: gs.AbstractRule) -> None:
    with pytest.raises(gs.UsageError, match=r"coasting=2 needs a rule .* write rule=gs.AdamWRule\(\)"):
        build(small(), gs.Uniform(count=1), COASTING, rule=rule)
    model = small(torch.float32)
    rest = gs.Borders(rewarm_steps=2, rate_by_visits=0.5)
    (first, *_) = train(model, build(model, gs.Uniform(count=1), rest, rule=rule), range(3))
    assert first.rates == dict.fromkeys(first.selected, 0.5)
    with pytest.raises(gs.UsageError, match=r"borders=.* write borders=gs.Borders\(coasting=5\)"):
        build(small(), gs.Uniform(count=1), 5, rule=rule)  # pyright: ignore[reportArgumentType]
