"""The contract of every update rule, from one table: rule x residency on blocks, rule x mask on entries."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import resume_support
import torch
from policy_support import through_torch
from resume_support import same
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.lr_scheduler import OneCycleLR

import gradselect as gs
from gradselect.entries.mask import AbstractCompactMask, AbstractDenseMask, AbstractMask, TopOfGradient

NUM_STEPS = 6
SETTINGS = {"lr": 1e-2, "weight_decay": 0.1, "no_decay": ()}
RESIDENCIES = {"keep": gs.Keep, "offload": gs.Offload, "drop": gs.Drop}
DTYPES = [torch.float32, torch.bfloat16]

State = dict[str, float]
"""Of one entry in the readable twin."""


# The twins: one entry, plain numbers -------------------------------------------------------------------------------


def adamw(weight: float, gradient: float, state: State, *, lr: float, decay: float) -> float:
    """Loshchilov, Hutter, arXiv 1711.05101, algorithm 2."""
    state["age"] = age = state.get("age", 0) + 1
    state["mean"] = 0.9 * state.get("mean", 0.0) + 0.1 * gradient
    state["square"] = 0.999 * state.get("square", 0.0) + 0.001 * gradient**2
    mean, square = state["mean"] / (1 - 0.9**age), state["square"] / (1 - 0.999**age)
    return weight - lr * decay * weight - lr * mean / (math.sqrt(square) + 1e-8)


def sgd(momentum: float, *, nesterov: bool = False) -> Callable[..., float]:
    """The formula that torch documents for `torch.optim.SGD`."""

    def update(weight: float, gradient: float, state: State, *, lr: float, decay: float) -> float:
        gradient += decay * weight
        state["buffer"] = momentum * state.get("buffer", 0.0) + gradient
        return weight - lr * (gradient + momentum * state["buffer"] if nesterov else state["buffer"])

    return update


# The tables --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Row:
    """A rule and what it promises.

    Attributes:
        rule: as a user writes it.
        entry: the formula on one number.
        words: 4-byte numbers of state a weight.
        torch: builds the optimizer of torch that it equals bitwise; None: there is none.
        alike: the rule that computes bitwise what this one does to entries; None: it refuses single entries.
    """

    rule: gs.AbstractRule
    entry: Callable[..., float]
    words: int
    torch: Callable[..., torch.optim.Optimizer] | None
    alike: gs.AbstractRule | None

    def bytes_of(self, weight: Tensor) -> int:
        """Bytes of the state of a weight, from the documentation of the rule."""
        if isinstance(self.rule, gs.AdamW8bitRule) and weight.numel() >= 4096:
            return 2 * weight.numel() + 2 * 4 * weight.numel() // 256
        return 4 * self.words * weight.numel()


def torch_adamw(parameters: Iterable[Tensor], **options: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1, foreach=False, **options)


def torch_sgd(parameters: Iterable[Tensor], **options: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=1e-2, weight_decay=0.1, foreach=False, **options)


RULES = {
    "adamw": Row(rule=gs.AdamWRule(), entry=adamw, words=2, torch=torch_adamw, alike=gs.AdamWRule()),
    "adamw, fused": Row(
        rule=gs.AdamWRule(fused=True),
        entry=adamw,
        words=2,
        torch=lambda parameters: torch_adamw(parameters, fused=True),
        alike=gs.AdamWRule(),
    ),
    "adamw, 8 bit": Row(rule=gs.AdamW8bitRule(), entry=adamw, words=2, torch=None, alike=None),
    "sgd": Row(
        rule=gs.SGDRule(),
        entry=sgd(0.9),
        words=1,
        torch=lambda parameters: torch_sgd(parameters, momentum=0.9),
        alike=gs.SGDRule(),
    ),
    "sgd, no momentum": Row(
        rule=gs.SGDRule(momentum=0), entry=sgd(0.0), words=0, torch=torch_sgd, alike=gs.SGDRule(momentum=0)
    ),
    "sgd, nesterov": Row(
        rule=gs.SGDRule(momentum=0.8, nesterov=True),
        entry=sgd(0.8, nesterov=True),
        words=1,
        torch=lambda parameters: torch_sgd(parameters, momentum=0.8, nesterov=True),
        alike=gs.SGDRule(momentum=0.8, nesterov=True),
    ),
    "adapted adamw": Row(
        rule=(adapted := gs.TorchRule(torch.optim.AdamW, foreach=False)),
        entry=adamw,
        words=2,
        torch=torch_adamw,
        alike=adapted,
    ),
}

# Of a model of 75 matrix entries and 15 biases.
MASKS: dict[str, Callable[[], AbstractMask]] = {
    "id3": lambda: gs.ID3(budget=24, steps=4),
    "static, refreshed": lambda: gs.StaticMask(budget=20, refresh_every=2),
    "top gradient": lambda: gs.TopGradient(density=0.3),
    "lift": lambda: gs.LIFT(density=0.3, approximation_rank=1, refresh_every=2),
    "bitfit": lambda: gs.BitFit(),
    "gmt, gradient": lambda: gs.GMT(fraction=0.3),
    "gmt, update": lambda: gs.GMT(fraction=0.3, mask="update"),
}
WHOLE: dict[str, Callable[[], AbstractMask]] = {
    "id3": lambda: gs.ID3(density=1.0, steps=1),
    "static": lambda: gs.StaticMask(density=1.0),
    "static, random": lambda: gs.StaticMask(salience=gs.salience.random, density=1.0),
    "top gradient": lambda: gs.TopGradient(density=1.0),
    "lift": lambda: gs.LIFT(density=1.0),
    "bitfit": lambda: gs.BitFit(),
    "gmt, gradient": lambda: gs.GMT(fraction=1.0),
    "gmt, update": lambda: gs.GMT(fraction=1.0, mask="update"),
}


def pairs(masks: Mapping[str, Callable[[], AbstractMask]]) -> list[Any]:
    """Return every rule with every mask that it works with."""
    return [
        pytest.param(row, make, id=f"{rule}-{mask}")
        for rule, row in RULES.items()
        for mask, make in masks.items()
        if row.alike is not None or isinstance(make(), AbstractDenseMask)
    ]


each_rule = pytest.mark.parametrize("row", RULES.values(), ids=RULES)
each_residency = pytest.mark.parametrize("residency", RESIDENCIES.values(), ids=RESIDENCIES)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
each_pair = pytest.mark.parametrize(("row", "make"), pairs(MASKS))


# Models and loops --------------------------------------------------------------------------------------------------


def make_model(dtype: torch.dtype = torch.float32, *, width: int = 64) -> nn.Sequential:
    """Three equal layers, matrix and bias. With the default width 8-bit moments are quantised."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(*(nn.Linear(width, width) for _ in range(3))).to(dtype)


def backward(model: nn.Sequential, step: int) -> None:
    first = next(model.parameters())
    inputs = torch.randn(4, first.shape[1], generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    functional.mse_loss(model(inputs.to(first.dtype)).double(), inputs.roll(1, 1)).backward()


def train(model: nn.Sequential, optimizer: torch.optim.Optimizer, steps: Iterable[int]) -> None:
    for step in steps:
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_resumes(build: Callable[[], tuple[nn.Sequential, Any]]) -> None:
    """Stop after each step, save with torch, load into a new pair, go on."""

    def built(state: dict[str, Tensor] | None) -> tuple[nn.Module, Any]:
        model, optimizer = build()
        if state is not None:
            model.load_state_dict(state)
        return model, optimizer

    def step(model: Any, optimizer: Any, number: int) -> Any:
        train(model, optimizer, [number])
        return optimizer.last_record

    resume_support.assert_resumes(built, step, num_steps=NUM_STEPS)


def test_every_exported_rule_has_a_row() -> None:
    exported = {getattr(gs, name) for name in gs.__all__}
    rules = {each for each in exported if inspect.isclass(each) and issubclass(each, gs.AbstractRule)}
    assert {type(row.rule) for row in RULES.values()} == rules - {gs.AbstractRule}


# Blocks ------------------------------------------------------------------------------------------------------------


@each_residency
@pytest.mark.parametrize(
    "row", [row for row in RULES.values() if row.torch], ids=[k for k, r in RULES.items() if r.torch]
)
def test_selecting_everything_is_the_optimizer_of_torch_bitwise(row: Row, residency: Callable[[], Any]) -> None:
    """With clipping and a scheduler of the learning rate and, where there is one, of the momentum."""
    ours, theirs = make_model(), make_model()
    optimizer = gs.BlockOptimizer(ours, gs.All(), rule=row.rule, residency=residency(), **SETTINGS)
    assert row.torch is not None
    pair = [(ours, optimizer), (theirs, row.torch(theirs.parameters()))]
    options = {"max_lr": 2e-2, "total_steps": 9, "cycle_momentum": row.words == 1}
    schedulers = [OneCycleLR(each, **options) for _, each in pair]
    for step in range(8):
        for (model, each), scheduler in zip(pair, schedulers, strict=True):
            backward(model, step)
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            each.step()
            each.zero_grad()
            scheduler.step()
        assert same(weights(ours), weights(theirs)), step


@each_rule
def test_a_bf16_model_follows_its_masters_bitwise(row: Row) -> None:
    """They move as an fp32 model does that gets the same gradients."""
    model, master = make_model(torch.bfloat16), make_model()
    master.load_state_dict(model.state_dict())
    pair = [gs.BlockOptimizer(each, gs.All(), rule=row.rule, **SETTINGS) for each in (model, master)]
    for step in range(NUM_STEPS):
        backward(model, step)
        for ours, theirs in zip(model.parameters(), master.parameters(), strict=True):
            assert ours.grad is not None
            theirs.grad = ours.grad.float()
        for optimizer in pair:
            optimizer.step()
            optimizer.zero_grad()
        for ours, theirs in zip(model.parameters(), master.parameters(), strict=True):
            assert torch.equal(ours, theirs.bfloat16())
            assert torch.equal(pair[0].state[ours]["master"], theirs)


@each_dtype
@each_residency
@each_rule
def test_unselected_blocks_are_bit_identical(row: Row, residency: Callable[[], Any], dtype: torch.dtype) -> None:
    model = make_model(dtype)
    optimizer = gs.BlockOptimizer(model, gs.Cyclic(every=1), rule=row.rule, residency=residency(), **SETTINGS)
    for step in range(NUM_STEPS):
        before = weights(model)
        train(model, optimizer, [step])
        assert optimizer.last_record is not None
        (selected,) = optimizer.last_record.selected
        for name, weight in weights(model).items():
            assert torch.equal(weight, before[name]) == (f"layer.{name[0]}" != selected), name


@each_dtype
@each_residency
@each_rule
def test_blocks_resume_at_every_step_bitwise(row: Row, residency: Callable[[], Any], dtype: torch.dtype) -> None:
    def build() -> tuple[nn.Sequential, gs.BlockOptimizer]:
        model = make_model(dtype)
        return model, gs.BlockOptimizer(model, gs.Uniform(count=2), rule=row.rule, residency=residency(), **SETTINGS)

    assert_resumes(build)


@each_dtype
@each_residency
@each_rule
def test_state_of_blocks_is_counted_exactly(row: Row, residency: Callable[[], Any], dtype: torch.dtype) -> None:
    model = make_model(dtype)
    optimizer = gs.BlockOptimizer(
        model, gs.Cyclic(every=1, order="ascending"), rule=row.rule, residency=residency(), **SETTINGS
    )
    of_rule = sum(row.bytes_of(parameter) for parameter in model[0].parameters())
    of_master = 4 * (64 * 64 + 64) if dtype == torch.bfloat16 else 0
    had_a_turn: set[str] = set()
    for step in range(2 * len(model)):
        train(model, optimizer, [step])
        assert optimizer.last_record is not None
        had_a_turn.update(optimizer.last_record.selected)
        (coming,) = optimizer.trainable
        resident = {"keep": len(had_a_turn), "offload": int(coming in had_a_turn), "drop": 0}
        name = next(name for name, each in RESIDENCIES.items() if each is residency)
        on_host = len(had_a_turn) - resident[name] if name == "offload" else 0
        memory = optimizer.memory()
        assert memory["masters"] == resident[name] * of_master
        assert memory["state_on_device"] == resident[name] * of_rule
        assert memory["state_on_host"] == on_host * (of_rule + of_master)
        num_held = len(had_a_turn) if name == "keep" else 1
        assert optimizer.last_record.state_bytes == num_held * (of_rule + of_master)


@each_rule
def test_two_runs_are_bitwise_equal(row: Row) -> None:
    ends = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        model = make_model()
        optimizer = gs.BlockOptimizer(model, gs.GradNormTopK(count=1), rule=row.rule, **SETTINGS)
        train(model, optimizer, range(NUM_STEPS))
        ends.append((weights(model), optimizer.state_dict()))
    assert same(*ends)


# Entries -----------------------------------------------------------------------------------------------------------


def sparse(model: nn.Module, mask: AbstractMask, rule: gs.AbstractRule, **changes: Any) -> gs.SparseOptimizer:
    return gs.SparseOptimizer(model, mask, rule=rule, **{**SETTINGS, **changes})


def masks_of(optimizer: gs.SparseOptimizer, model: nn.Module) -> dict[str, Tensor]:
    """What the mask selects of the gradients that exist, or the set as it is, as bool tensors by name."""
    mask, named = optimizer.mask, dict(model.named_parameters())
    if isinstance(mask, AbstractDenseMask):
        gradients = [named[name].grad for name in mask.names]
        assert all(gradient is not None for gradient in gradients)
        return dict(zip(mask.names, mask.masks(gradients), strict=True))  # type: ignore[arg-type]
    found = {name: torch.zeros_like(parameter, dtype=torch.bool) for name, parameter in named.items()}
    for name, indices in optimizer.entries.items():
        found[name].view(-1)[indices] = True
    return found


def step_of(model: nn.Sequential, optimizer: gs.SparseOptimizer, step: int) -> dict[str, Tensor]:
    """Train one step; return which entries it moved."""
    mask = optimizer.mask
    count = sum(map(len, optimizer.entries.values()))
    joins = isinstance(mask, AbstractCompactMask) and isinstance(mask.choice(step, count), TopOfGradient)
    before = masks_of(optimizer, model) if isinstance(mask, AbstractCompactMask) else {}
    backward(model, step)
    if isinstance(mask, AbstractDenseMask):
        before = masks_of(optimizer, model)
    optimizer.step()
    optimizer.zero_grad()
    # A mask that reads weights has selected for the coming step already.
    return masks_of(optimizer, model) if joins else before


@each_dtype
@pytest.mark.parametrize(("row", "make"), pairs(WHOLE))
def test_a_mask_of_every_entry_is_the_rule_on_whole_tensors_bitwise(
    row: Row, make: Callable[[], AbstractMask], dtype: torch.dtype
) -> None:
    ours, theirs = make_model(dtype, width=12), make_model(dtype, width=12)
    optimizer = sparse(ours, make(), row.rule)
    is_dense = isinstance(optimizer.mask, AbstractDenseMask)
    for name, parameter in theirs.named_parameters():
        parameter.requires_grad_(name in optimizer.mask.names)
    rule = row.rule if is_dense else row.alike
    blocks = gs.BlockOptimizer(theirs, gs.All(), rule=rule, **SETTINGS)
    train(ours, optimizer, range(NUM_STEPS))
    train(theirs, blocks, range(NUM_STEPS))
    # The fused kernel rounds the decay in another order than the product with 1 - lr decay does.
    rounds = is_dense and optimizer.mask.mask == "gradient" and getattr(row.rule, "fused", False)  # type: ignore[attr-defined]
    for name, weight in weights(ours).items():
        tolerance = {"rtol": 1e-5, "atol": 1e-7} if rounds else {"rtol": 0.0, "atol": 0.0}
        torch.testing.assert_close(weight, weights(theirs)[name], **tolerance)


@pytest.mark.parametrize("max_grad_norm", [None, 0.3], ids=["", "clipped"])
@each_pair
def test_entries_move_as_in_the_readable_twin(
    row: Row, make: Callable[[], AbstractMask], max_grad_norm: float | None
) -> None:
    """Entry by entry in plain numbers, in float64, while entries join and leave."""
    model = make_model(torch.float64, width=5)
    optimizer = sparse(model, make(), row.rule, lr=0.1, max_grad_norm=max_grad_norm)
    kind = optimizer.mask.mask if isinstance(optimizer.mask, AbstractDenseMask) else "compact"
    states: dict[tuple[str, int], State] = {}
    num_left = 0
    for step in range(8):
        twin = make_model(torch.float64, width=5)
        twin.load_state_dict(model.state_dict())
        backward(twin, step)
        moving = step_of(model, optimizer, step)
        entries = []
        for name, parameter in twin.named_parameters():
            assert parameter.grad is not None
            chosen = moving.get(name, torch.zeros_like(parameter)).flatten().tolist()
            entries += [
                ((name, index), *values)
                for index, values in enumerate(
                    zip(parameter.flatten().tolist(), parameter.grad.flatten().tolist(), chosen, strict=True)
                )
            ]
        applied = [gradient for _, _, gradient, is_in in entries if is_in or kind == "update"]
        norm = math.sqrt(sum(gradient**2 for gradient in applied))
        factor = 1.0 if max_grad_norm is None else min(1.0, max_grad_norm / (norm + 1e-6))
        assert optimizer.last_record is not None
        assert optimizer.last_record.grad_norm == pytest.approx(norm, rel=1e-9)
        for (name, index), weight, gradient, is_in in entries:
            expected = weight
            if kind == "compact" and not is_in:
                num_left += states.pop((name, index), None) is not None
            else:
                is_seen = is_in or kind == "update"
                state = states.setdefault((name, index), {})
                moved = row.entry(
                    weight, factor * gradient if is_seen else 0.0, state, lr=0.1, decay=0.1 if is_seen else 0.0
                )
                expected = moved if is_in or kind == "gradient" else weight
            found = model.get_parameter(name).detach().flatten()[index].item()
            assert found == pytest.approx(expected, rel=1e-9, abs=1e-12), (step, name, index)
    leaves = isinstance(optimizer.mask, (gs.StaticMask, gs.TopGradient, gs.LIFT))
    assert (num_left > 0) == leaves


@each_dtype
@each_pair
def test_entries_outside_the_set_are_bit_identical(
    row: Row, make: Callable[[], AbstractMask], dtype: torch.dtype
) -> None:
    """With a mask on gradients, moments go on where the mask has been: entries that never were in it stay."""
    model = make_model(dtype, width=5)
    optimizer = sparse(model, make(), row.rule, lr=0.1)
    ever = {name: torch.zeros_like(parameter, dtype=torch.bool) for name, parameter in model.named_parameters()}
    for step in range(NUM_STEPS):
        before = weights(model)
        moving = step_of(model, optimizer, step)
        if getattr(optimizer.mask, "mask", None) == "gradient":
            moving = {name: ever[name].logical_or_(mask) for name, mask in moving.items()}
        moved = {name: weight != before[name] for name, weight in weights(model).items()}
        assert any(each.any() for each in moved.values())
        for name, each in moved.items():
            assert not (each & ~moving[name] if name in moving else each).any(), name


@each_pair
def test_entries_resume_at_every_step_bitwise(row: Row, make: Callable[[], AbstractMask]) -> None:
    def build() -> tuple[nn.Sequential, gs.SparseOptimizer]:
        model = make_model(torch.bfloat16, width=5)
        return model, sparse(model, make(), row.rule, max_grad_norm=0.5)

    assert_resumes(build)


@each_dtype
@each_pair
def test_state_of_entries_is_counted_exactly(row: Row, make: Callable[[], AbstractMask], dtype: torch.dtype) -> None:
    """Compact: an int32 index and the rule's numbers an entry, and one bit a tensor and update, in whole bytes."""
    model = make_model(dtype, width=5)
    optimizer = sparse(model, make(), row.rule)
    train(model, optimizer, range(NUM_STEPS))
    memory, record = optimizer.memory(), optimizer.last_record
    assert record is not None
    is_dense = isinstance(optimizer.mask, AbstractDenseMask)
    count = sum(p.numel() for p in model.parameters()) if is_dense else sum(map(len, optimizer.entries.values()))
    state_bytes = count * 4 * row.words
    assert memory["masters"] == (4 * count if dtype == torch.bfloat16 else 0)
    assert memory["state_on_host"] == 0
    num_tensors = 0 if is_dense else len(optimizer.mask.names)
    assert memory["state_on_device"] == state_bytes + (0 if is_dense else 4 * count) + num_tensors
    if optimizer.mask.choice(NUM_STEPS, count) is None if not is_dense else True:  # type: ignore[attr-defined]
        assert record.state_bytes == memory["masters"] + memory["state_on_device"]


@pytest.mark.parametrize("make", MASKS.values(), ids=MASKS)
def test_whole_tensors_beside_a_mask_follow_the_rule(make: Callable[[], AbstractMask]) -> None:
    ours, theirs = make_model(width=5), make_model(width=5)
    always = "1.weight" if isinstance(make(), gs.BitFit) else "1.bias"
    optimizer = sparse(ours, make(), gs.SGDRule(), always=always)
    train(ours, optimizer, [0])
    twin = torch_sgd([theirs.get_parameter(always)], momentum=0.9)
    train(theirs, twin, [0])
    assert torch.equal(ours.get_parameter(always), theirs.get_parameter(always))


# Refusals ----------------------------------------------------------------------------------------------------------


class SignSGD(gs.AbstractRule):
    """A rule of a user, for whole tensors."""

    state_names = ()
    hyper_parameters = ("lr", "weight_decay")

    def make_state(self, weight: Tensor) -> dict[str, Tensor]:
        return {"step": torch.zeros(())}

    def update(
        self,
        weights: Sequence[Tensor],
        grads: Sequence[Tensor],
        states: Sequence[dict[str, Tensor]],
        group: Mapping[str, Any],
    ) -> None:
        for weight, grad in zip(weights, grads, strict=True):
            weight.sub_(grad.sign(), alpha=group["lr"])


@pytest.mark.parametrize("rule", [gs.AdamW8bitRule(), SignSGD()], ids=["8 bit", "custom"])
def test_a_rule_for_whole_tensors_is_refused_for_entries_and_accepted_with_state_for_all(rule: gs.AbstractRule) -> None:
    for make in MASKS.values():
        if isinstance(make(), AbstractDenseMask):
            model = make_model(width=5)
            before = weights(model)
            train(model, sparse(model, make(), rule), range(2))
            assert not same(before, weights(model))
        else:
            with pytest.raises(gs.UsageError, match=rf"^{type(rule).__name__} .*; write rule=gs.AdamWRule\(\)$"):
                sparse(make_model(width=5), make(), rule)


@pytest.mark.parametrize("settings", [{"betas": (0.9, 0.95)}, {"eps": 1e-6}])
@pytest.mark.parametrize("row", [RULES["sgd"], RULES["sgd, no momentum"]], ids=["momentum", "none"])
def test_a_setting_that_the_rule_ignores_is_refused_by_name(row: Row, settings: dict[str, Any]) -> None:
    (name,) = settings
    for build in (gs.BlockOptimizer, gs.SparseOptimizer):
        chooses = gs.All() if build is gs.BlockOptimizer else gs.BitFit()
        with pytest.raises(gs.UsageError, match=rf"^{name}=.* has no meaning for SGDRule; leave {name} out$"):
            build(make_model(width=5), chooses, rule=row.rule, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("settings", [{"momentum": 1.0}, {"momentum": -0.1}, {"momentum": 0, "nesterov": True}])
def test_a_momentum_that_cannot_be_is_refused_with_one_that_can(settings: dict[str, Any]) -> None:
    with pytest.raises(gs.UsageError, match=r"write momentum=0\.9$"):
        gs.SGDRule(**settings)


def test_a_class_in_place_of_a_rule_is_refused() -> None:
    for build, chooses in ((gs.BlockOptimizer, gs.All()), (gs.SparseOptimizer, gs.BitFit())):
        with pytest.raises(gs.UsageError, match=r"rule=gs.AdamWRule\(\)"):
            build(make_model(width=5), chooses, rule=gs.SGDRule)  # type: ignore[arg-type]


OTHERS = [
    pytest.param(written.rule, read.rule, id=f"{first} to {second}")
    for first, written in RULES.items()
    for second, read in RULES.items()
    if {first, second} != {"adamw", "adamw, fused"} and first != second
]


@pytest.mark.parametrize(("written", "read"), OTHERS)
def test_a_checkpoint_of_another_rule_is_refused_and_changes_nothing(
    written: gs.AbstractRule, read: gs.AbstractRule
) -> None:
    def blocks(rule: gs.AbstractRule) -> tuple[nn.Sequential, Any]:
        model = make_model(width=5)
        return model, gs.BlockOptimizer(model, gs.All(), rule=rule)

    def entries(rule: gs.AbstractRule) -> tuple[nn.Sequential, Any]:
        model = make_model(width=5)
        return model, gs.SparseOptimizer(model, gs.GMT(), rule=rule)

    for build in (blocks, entries):
        (model, theirs), (own, ours) = build(written), build(read)
        train(model, theirs, [0])
        train(own, ours, [0])
        before = through_torch(ours.state_dict())
        with pytest.raises(gs.UsageError, match=r"rule: '.*' there, '"):
            ours.load_state_dict(theirs.state_dict())
        assert same(before, through_torch(ours.state_dict()))


def test_fused_and_unfused_adamw_read_one_anothers_checkpoints() -> None:
    for first, second in ((False, True), (True, False)):
        model, other = make_model(width=5), make_model(width=5)
        optimizer = sparse(model, gs.TopGradient(density=0.3), gs.AdamWRule(fused=first))
        train(model, optimizer, range(2))
        again = sparse(other, gs.TopGradient(density=0.3), gs.AdamWRule(fused=second))
        again.load_state_dict(through_torch(optimizer.state_dict()))
        other.load_state_dict(model.state_dict())
        assert same(again.state_dict(), optimizer.state_dict())


def test_a_checkpoint_of_entries_from_before_there_were_rules_is_one_of_adamw() -> None:
    def build(rule: gs.AbstractRule) -> tuple[nn.Sequential, gs.SparseOptimizer]:
        model = make_model(width=5)
        return model, sparse(model, gs.TopGradient(density=0.3), rule)

    model, optimizer = build(gs.AdamWRule())
    train(model, optimizer, range(3))
    old = through_torch(optimizer.state_dict())
    del old["selection"]["rule"]  # type: ignore[attr-defined]
    resumed, again = build(gs.AdamWRule())
    resumed.load_state_dict(model.state_dict())
    again.load_state_dict(old)
    train(model, optimizer, [3])
    train(resumed, again, [3])
    assert same(weights(model), weights(resumed))
    with pytest.raises(gs.UsageError, match="rule: 'AdamWRule' there, 'SGDRule"):
        build(gs.SGDRule())[1].load_state_dict(old)


def test_a_schedule_of_momentum_needs_a_momentum() -> None:
    """Without a buffer the scheduler's momentum would be ignored."""
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    optimizer = gs.BlockOptimizer(model, gs.All(), rule=gs.SGDRule(momentum=0), lr=0.1)
    with pytest.raises(ValueError, match="momentum"):
        torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=4)
