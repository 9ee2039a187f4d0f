"""Classes of torch.optim as rules: a table of those that pass, and a reason for each that does not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from policy_support import through_torch
from test_rule_contract import assert_resumes, backward, same, train, weights
from torch import Tensor, nn
from torch.optim import Optimizer

import gradselect as gs
from gradselect import UsageError
from gradselect.integrations import distributed

LR, DECAY = 1e-2, 0.1
WHOLE_SHARED = "keeps numbers that several entries share"


# Classes that are not torch's --------------------------------------------------------------------------------------


class Lion(Optimizer):
    """Chen et al., arXiv 2302.06675, algorithm 2; writes through `.data` and keeps a plain number, as some do."""

    def __init__(
        self, params: Any, lr: float = 1e-4, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0
    ):
        assert lr > 0
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["step"], state["mean"] = 0, torch.zeros_like(p)
                state["step"] += 1
                first, second = group["betas"]
                p.data.mul_(1 - group["lr"] * group["weight_decay"])
                p.data = p.data - group["lr"] * (first * state["mean"] + (1 - first) * p.grad).sign()
                state["mean"] = second * state["mean"] + (1 - second) * p.grad


class Halved(Tensor):
    """A tensor of a class of its own that keeps its numbers in half precision, as quantised moments do."""

    @staticmethod
    def __new__(cls, values: Tensor) -> Any:
        return Tensor._make_wrapper_subclass(
            cls, values.shape, strides=values.stride(), dtype=torch.float32, device=values.device
        )

    def __init__(self, values: Tensor) -> None:
        self.values = values

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["values"], None

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, Tensor], context: Any, size: Any, stride: Any) -> Any:
        return cls(inner["values"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError(func)


class HalfMomentum(Optimizer):
    """SGD whose momentum is of class `Halved`; its learning rate is a tensor, as torchao's is."""

    def __init__(self, params: Any, lr: float = 1e-3) -> None:
        super().__init__(params, {"lr": torch.tensor(lr), "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            assert isinstance(group["lr"], Tensor)
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["momentum"] = Halved(torch.zeros_like(p, dtype=torch.bfloat16))
                values = state["momentum"].values
                values.copy_(0.9 * values.float() + p.grad)
                p -= group["lr"] * values.float()


# The table ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Row:
    """A class that may be a rule.

    Attributes:
        kind: the class.
        options: of the class.
        whole: why it cannot move single entries; "": it can.
        decay: weight decay of the run; 0.0 where the class has none.
        matrices_only: True if it takes nothing else.
    """

    kind: type[Optimizer]
    options: dict[str, Any] = field(default_factory=dict)
    whole: str = ""
    decay: float = DECAY
    matrices_only: bool = False

    @property
    def rule(self) -> gs.TorchRule:
        return gs.TorchRule(self.kind, **self.options)

    def plain(self, model: nn.Module) -> Optimizer:
        rates = {"lr": LR} | ({"weight_decay": self.decay} if self.decay else {})
        return self.kind(model.parameters(), **rates, **self.options)


TABLE = {
    "AdamW": Row(kind=torch.optim.AdamW),
    "AdamW, amsgrad": Row(kind=torch.optim.AdamW, options={"amsgrad": True}),
    "AdamW, fused": Row(kind=torch.optim.AdamW, options={"fused": True}),
    "AdamW, foreach": Row(kind=torch.optim.AdamW, options={"foreach": True}),
    "Adam": Row(kind=torch.optim.Adam, options={"betas": (0.8, 0.9)}),
    "Adamax": Row(kind=torch.optim.Adamax),
    "RAdam": Row(kind=torch.optim.RAdam),
    "NAdam": Row(kind=torch.optim.NAdam, whole="keeps mu_product for all entries of a tensor together"),
    "Adafactor": Row(kind=torch.optim.Adafactor, whole=WHOLE_SHARED),
    "Adagrad": Row(kind=torch.optim.Adagrad),
    "Adagrad, from 0.1": Row(
        kind=torch.optim.Adagrad,
        options={"initial_accumulator_value": 0.1},
        whole="starts with a state that is not zero",
    ),
    "Adadelta": Row(kind=torch.optim.Adadelta),
    "RMSprop": Row(kind=torch.optim.RMSprop, options={"momentum": 0.9, "centered": True}),
    "Rprop": Row(kind=torch.optim.Rprop, decay=0.0, whole="starts with a state that is not zero"),
    "ASGD": Row(kind=torch.optim.ASGD, whole=WHOLE_SHARED),
    "SGD": Row(kind=torch.optim.SGD),
    "SGD, momentum": Row(kind=torch.optim.SGD, options={"momentum": 0.9, "nesterov": True}),
    "SGD, dampening": Row(
        kind=torch.optim.SGD,
        options={"momentum": 0.9, "dampening": 0.5},
        whole="starts with a state that is not zero",
    ),
    "Muon": Row(kind=torch.optim.Muon, whole="takes tensors of some shapes only", matrices_only=True),
    "Lion": Row(kind=Lion),
    "momentum in a class of its own": Row(kind=HalfMomentum, whole=WHOLE_SHARED, decay=0.0),
}
each_row = pytest.mark.parametrize("row", TABLE.values(), ids=TABLE)


def make_model(row: Row, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(*(nn.Linear(8, 8, bias=not row.matrices_only) for _ in range(3))).to(dtype)


def options(row: Row, **changes: Any) -> dict[str, Any]:
    return {"rule": row.rule, "lr": LR, "weight_decay": row.decay, "no_decay": (), **changes}


@each_row
def test_selecting_everything_is_the_class_itself_bitwise(row: Row) -> None:
    for residency in (gs.Keep, gs.Offload):
        ours, theirs = make_model(row), make_model(row)
        pair = [(ours, gs.BlockOptimizer(ours, gs.All(), residency=residency(), **options(row)))]
        pair.append((theirs, row.plain(theirs)))
        schedulers = []
        if row.kind is not HalfMomentum:  # a scheduler would put a number in the place of its tensor
            schedulers = [torch.optim.lr_scheduler.LinearLR(each, 1e-3, total_iters=3) for _, each in pair]
        for step in range(6):
            for model, optimizer in pair:
                train(model, optimizer, [step])
            for scheduler in schedulers:
                scheduler.step()
            assert same(weights(ours), weights(theirs)), step


RUNS = [(torch.float32, gs.Keep), (torch.bfloat16, gs.Offload), (torch.bfloat16, gs.Drop)]


@pytest.mark.parametrize(
    ("row", "run"),
    [(row, RUNS[(number + each) % 3]) for number, row in enumerate(TABLE.values()) for each in range(1 + (number < 2))],
    ids=lambda each: each.kind.__name__ if isinstance(each, Row) else each[1].__name__,
)
def test_blocks_take_turns_resume_and_have_masters(row: Row, run: Any) -> None:
    dtype, residency = run

    def build() -> tuple[nn.Sequential, gs.BlockOptimizer]:
        model = make_model(row, dtype)
        return model, gs.BlockOptimizer(model, gs.Uniform(count=2), residency=residency(), **options(row))

    assert_resumes(build)
    model, optimizer = build()
    train(model, optimizer, range(3))
    state = optimizer.state_dict()["state"]
    assert same(through_torch(state), state)
    for parameter in model.parameters():
        for name, value in optimizer.state.get(parameter, {}).items():
            assert type(value) is Tensor, name
    before = weights(model)
    train(model, optimizer, [3])
    assert optimizer.last_record is not None
    selected = optimizer.last_record.selected
    for name, each in weights(model).items():
        assert f"layer.{name[0]}" in selected or torch.equal(each, before[name])


@each_row
def test_entries_move_as_in_the_class_or_are_refused(row: Row) -> None:
    assert row.rule.why_whole_tensors == row.whole
    assert row.rule.works_on_shards == (row.whole != WHOLE_SHARED and not row.matrices_only)
    ours, theirs = make_model(row), make_model(row)
    if row.whole:
        with pytest.raises(UsageError, match=rf"TorchRule\({row.kind.__name__}\) {row.whole}, and StaticMask selects"):
            gs.SparseOptimizer(ours, gs.StaticMask(density=0.5), **options(row))
        return
    pair = [(ours, gs.SparseOptimizer(ours, gs.StaticMask(density=1.0), **options(row)))]
    pair.append((theirs, row.plain(theirs)))
    for step in range(5):
        for model, optimizer in pair:
            train(model, optimizer, [step])
        assert same(weights(ours), weights(theirs)), step


def test_entries_that_join_late_have_an_age_of_their_own() -> None:
    """Each moves as a tensor of its own would from the step on at which it joined."""
    row = TABLE["RAdam"]
    ours, twin = make_model(row), make_model(row)
    optimizer = gs.SparseOptimizer(ours, gs.ID3(density=0.3, steps=3), **options(row, weight_decay=0.0))
    alone: dict[tuple[str, int], tuple[nn.Parameter, Optimizer]] = {}
    for step in range(8):
        twin.load_state_dict(ours.state_dict())
        twin.zero_grad()
        backward(twin, step)
        train(ours, optimizer, [step])
        for name, indices in optimizer.entries.items():
            before, gradient = twin.get_parameter(name).detach().view(-1), twin.get_parameter(name).grad
            assert gradient is not None
            for index in indices.tolist():
                if (name, index) not in alone:
                    single = nn.Parameter(before[index].clone())
                    alone[name, index] = single, torch.optim.RAdam([single], lr=LR)
                single, of_single = alone[name, index]
                single.grad = gradient.view(-1)[index]
                of_single.step()
                torch.testing.assert_close(single.detach(), ours.get_parameter(name).detach().view(-1)[index])


@pytest.mark.parametrize("mask", ["gradient", "update"])
def test_dense_masks_take_whole_tensor_rules(mask: Any) -> None:
    for name in ("Adafactor", "Muon", "NAdam"):
        row = TABLE[name]
        model = make_model(row)
        optimizer = gs.SparseOptimizer(model, gs.GMT(fraction=0.3, mask=mask), **options(row))
        before = weights(model)
        train(model, optimizer, range(2))
        assert not same(weights(model), before)


def test_options_are_in_the_groups_where_schedulers_change_them() -> None:
    row = TABLE["SGD, momentum"]
    ours, theirs = make_model(row), make_model(row)
    pair = [(ours, gs.BlockOptimizer(ours, gs.All(), **options(row))), (theirs, row.plain(theirs))]
    schedulers = [torch.optim.lr_scheduler.OneCycleLR(each, max_lr=2e-2, total_steps=9) for _, each in pair]
    for step in range(8):
        for (model, optimizer), scheduler in zip(pair, schedulers, strict=True):
            train(model, optimizer, [step])
            scheduler.step()
        assert pair[0][1].param_groups[0]["momentum"] == pair[1][1].param_groups[0]["momentum"]
    assert same(weights(ours), weights(theirs))


def test_a_rule_of_other_options_does_not_load_the_state() -> None:
    row = TABLE["SGD, momentum"]
    first, second = make_model(row), make_model(row)
    optimizer = gs.BlockOptimizer(first, gs.All(), **options(row))
    other = gs.BlockOptimizer(second, gs.All(), **options(TABLE["SGD, dampening"]))
    with pytest.raises(UsageError, match=r"nesterov=True\)' there"):
        other.load_state_dict(optimizer.state_dict())


def test_updates_in_the_backward_pass_and_patches() -> None:
    row = TABLE["Adafactor"]
    ours, theirs = make_model(row), make_model(row)
    follower = copy.deepcopy(ours)
    inside = gs.BlockOptimizer(ours, gs.Cyclic(every=1), update_in_backward=True, **options(row))
    after = gs.BlockOptimizer(theirs, gs.Cyclic(every=1), **options(row))
    for step in range(4):
        train(ours, inside, [step])
        train(theirs, after, [step])
        gs.delta.apply_patch(follower, inside.changed_entries())
        assert same(weights(ours), weights(theirs))
        assert same(weights(ours), weights(follower))


# Refused -----------------------------------------------------------------------------------------------------------


class Base(Optimizer):
    """Gradient descent, to be spoilt by the classes below."""

    def __init__(self, params: Any, lr: float = 1e-3) -> None:
        super().__init__(params, {"lr": lr})

    def spoil(self, group: dict[str, Any], p: Tensor) -> None: ...

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                self.spoil(group, p)
                p -= group["lr"] * p.grad


class CountsInGroup(Base):
    def spoil(self, group: dict[str, Any], p: Tensor) -> None:
        group["k"] = group.get("k", 0) + 1


class CountsInItself(Base):
    num_steps = 0

    def spoil(self, group: dict[str, Any], p: Tensor) -> None:
        self.num_steps += 1


class StateOfNothing(Base):
    def spoil(self, group: dict[str, Any], p: Tensor) -> None:
        self.state["all"]["norm"] = p.norm()


class KeepsList(Base):
    def spoil(self, group: dict[str, Any], p: Tensor) -> None:
        self.state[p]["history"] = [p.clone()]


class MakesStateLate(Base):
    def spoil(self, group: dict[str, Any], p: Tensor) -> None:
        state = self.state[p]
        state["n"] = state.get("n", 0) + 1
        if state["n"] == 2:
            state["late"] = torch.zeros_like(p)


class ChangesDtype(Base):
    def spoil(self, group: dict[str, Any], p: Tensor) -> None:
        self.state[p]["mean"] = self.state[p]["mean"].half() if self.state[p] else torch.zeros_like(p)


class ClipsTogether(Base):
    def spoil(self, group: dict[str, Any], p: Tensor) -> None:
        p -= torch.stack([each.grad.norm() for each in group["params"]]).norm() * p.grad


class TakesName(Base):
    def spoil(self, group: dict[str, Any], p: Tensor) -> None:
        self.state[p]["master"] = p.clone()


class Averages(Base):
    def train(self) -> None: ...

    def eval(self) -> None: ...


class NoRate(Optimizer):
    def __init__(self, params: Any) -> None:
        super().__init__(params, {})

    def step(self, closure: Any = None) -> None: ...


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (torch.optim.LBFGS, "LBFGS cannot be a rule: its step needs a closure"),
        (torch.optim.SparseAdam, "SparseAdam cannot be a rule: a trial step failed: .*dense gradients"),
        (CountsInGroup, r"CountsInGroup .* for all weights together in its parameter groups: \['k'\]"),
        (CountsInItself, r"for all weights together: \['num_steps'\]"),
        (StateOfNothing, "belongs to no weight"),
        (KeepsList, "keeps a list as state 'history'"),
        (MakesStateLate, "makes or changes state after the first update"),
        (ChangesDtype, "makes or changes state after the first update"),
        (ClipsTogether, "ClipsTogether .* it couples them"),
        (TakesName, "a state named 'master'"),
        (Averages, "Averages .* averages weights"),
        (NoRate, "no lr in its parameter groups"),
    ],
)
def test_what_cannot_be_a_rule_is_refused_with_the_reason(kind: type[Optimizer], message: str) -> None:
    for write in (gs.TorchRule, lambda kind: gs.BlockOptimizer(nn.Sequential(nn.Linear(2, 2)), gs.All(), rule=kind)):
        with pytest.raises(UsageError, match=message):
            write(kind)


def blocks(model: nn.Module, **changes: Any) -> gs.BlockOptimizer:
    return gs.BlockOptimizer(model, gs.All(), **changes)


ADAFACTOR = torch.optim.Adafactor
MISTAKES: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "a class": (lambda model: blocks(model, rule=torch.optim.AdamW), r"write rule=gs\.TorchRule\(AdamW\)"),
    "an optimizer": (
        lambda model: blocks(model, rule=torch.optim.AdamW(model.parameters())),
        r"an optimizer of its own.*gs\.TorchRule\(AdamW\)",
    ),
    "no class": (lambda _: gs.TorchRule("adafactor"), "takes an optimizer class and got str"),
    "lr": (
        lambda _: gs.TorchRule(ADAFACTOR, lr=1e-3),
        r"lr of TorchRule\(Adafactor, \.\.\.\) belongs to the optimizer",
    ),
    "unknown option": (lambda _: gs.TorchRule(ADAFACTOR, beta=1), "unexpected keyword argument 'beta'"),
    "betas": (lambda model: blocks(model, rule=gs.TorchRule(ADAFACTOR), betas=(0.8, 0.9)), "betas=.* no meaning"),
    "no decay": (
        lambda model: blocks(model, rule=gs.TorchRule(torch.optim.Rprop), weight_decay=0.1),
        r"TorchRule\(Rprop\) has no weight decay",
    ),
    "vectors": (
        lambda model: blocks(model, rule=gs.TorchRule(torch.optim.Muon)),
        r"'0.bias' of shape \[4\]: Muon refuses it: .*p.ndim != 1",
    ),
}


@pytest.mark.parametrize(("write", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_refused_with_what_to_write(write: Callable[[nn.Module], Any], message: str) -> None:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(2)))
    with pytest.raises(UsageError, match=message):
        write(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_trial_reads_no_random_numbers_of_the_caller() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    gs.TorchRule(Lion)
    assert torch.equal(torch.rand(2), expected)


def test_the_page_has_a_row_for_each_class() -> None:
    page = (Path(__file__).parents[1] / "docs" / "training-loops.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| ")]
    for row in (row for row in TABLE.values() if row.kind is not HalfMomentum):
        said = f"no: {row.whole}" if row.whole else "yes"
        assert any(f"`{row.kind.__name__}`" in line and said in line.split("|")[3] for line in rows), row.kind


def test_state_in_a_class_of_its_own_passes_through_a_distributed_checkpoint(tmp_path: Path) -> None:
    """Its tensors have names with dots, which were taken for the end of the parameter's name."""

    def build() -> tuple[nn.Module, gs.BlockOptimizer]:
        model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(2)))
        return model, gs.BlockOptimizer(model, gs.All(), rule=gs.TorchRule(HalfMomentum), lr=LR, weight_decay=0.0)

    (model, optimizer), (other, loaded) = build(), build()
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    distributed.save(tmp_path / "checkpoint", model=model, optimizer=optimizer)
    distributed.load(tmp_path / "checkpoint", model=other, optimizer=loaded)
    assert same(weights(model), weights(other))
    states = [[*each.state.values()] for each in (optimizer, loaded)]
    assert [[*state] for state in states[0]] == [[*state] for state in states[1]]
    for one, two in zip(*states, strict=True):
        assert all(torch.equal(value, two[name]) for name, value in one.items())
