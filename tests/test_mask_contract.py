"""The contract of every mask, from one table: a new mask is one row."""

import copy
import functools
import inspect
from collections.abc import Callable

import pytest
import torch
from mask_support import as_lists, gradients, next_entries, offered, snapshot
from policy_support import through_torch
from resume_support import assert_resumes
from tiny_models import tiny_batch, tiny_qwen2
from torch import nn

import gradselect as gs
from gradselect import UsageError, masks, salience
from gradselect.entries.mask import AbstractCompactMask, AbstractDenseMask, AbstractMask, FromWeights, TopOfGradient

NUM_STEPS = 6
LAYERS = 2


def make_model(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Biases, norms, matrices, a tied embedding."""
    return copy.deepcopy(built_model(dtype))


@functools.cache
def built_model(dtype: torch.dtype) -> nn.Module:
    return tiny_qwen2(layers=LAYERS, dtype=dtype)


BATCHES = [tiny_batch(make_model(), seed=seed) for seed in (101, 102)]
NUM_ENTRIES = sum(parameter.numel() for parameter in make_model().parameters())

LAST = "model.layers.1.mlp.down_proj.weight"
FIXED = {"model.layers.0.self_attn.q_proj.bias": torch.tensor([0, 3, 15]), LAST: torch.tensor([7, 511])}

# What to build, and how many entries it promises at a step, where that is a number of its own settings.
TABLE: dict[str, tuple[Callable[[], AbstractMask], Callable[[int], int] | None]] = {
    "id3": (lambda: gs.ID3(budget=60, steps=4), lambda step: 15 * min(step + 1, 4)),
    "id3, ragged": (lambda: gs.ID3(budget=5, steps=3, exponent=2.0), lambda step: (2, 4, 5)[min(step, 2)]),
    "id3, more steps than entries": (lambda: gs.ID3(budget=2, steps=5), lambda step: min(step + 1, 2)),
    "id3, density": (
        lambda: gs.ID3(density=0.5, steps=2, among="*mlp*"),
        lambda step: LAYERS * 3 * 16 * 32 * min(step + 1, 2) // 4,
    ),
    "gmt": (lambda: gs.GMT(fraction=0.3), None),
    "gmt, global": (lambda: gs.GMT(fraction=0.1, scope="global"), lambda _: round(0.1 * NUM_ENTRIES)),
    "gmt, update": (lambda: gs.GMT(fraction=0.3, mask="update"), None),
    "top gradient": (lambda: gs.TopGradient(density=0.1, among="*mlp*"), lambda _: LAYERS * 3 * 51),
    "lift": (lambda: gs.LIFT(rank=1), lambda _: LAYERS * (2 * 32 + 2 * 24 + 3 * 48)),
    "lift, density": (
        lambda: gs.LIFT(density=0.1, approximation_rank=3, refresh_every=2, among="*mlp*"),
        lambda _: 306,
    ),
    "lift, blocks": (
        lambda: gs.LIFT(rank=1, block_size=4, refresh_every=3, seed=5),
        lambda _: LAYERS * (4 * 32 + 3 * 48),
    ),
    "bitfit": (lambda: gs.BitFit(), lambda _: LAYERS * 32),
    "bitfit, norms": (lambda: gs.BitFit(among="*norm*"), lambda _: (2 * LAYERS + 1) * 16),
    "fixed entries": (lambda: gs.FixedEntries(entries=FIXED), lambda _: 5),
    "fixed entries, none in one": (lambda: gs.FixedEntries(entries={**FIXED, LAST: torch.tensor([])}), lambda _: 3),
    "mofo": (lambda: gs.MoFO(fraction=0.1), None),
    "mofo, mlp": (lambda: gs.MoFO(fraction=0.25, among="*mlp*"), None),
    "sparta": (lambda: gs.SpaRTA(density=0.02, seed=3), None),
    "sparta, all": (lambda: gs.SpaRTA(density=0.01, among="*"), None),
    "static": (lambda: gs.StaticMask(budget=70), lambda _: 70),
    "static, per tensor": (lambda: gs.StaticMask(budget=70, scope="tensor"), lambda _: 70),
    "static, random per tensor": (
        lambda: gs.StaticMask(salience=salience.random, budget=70, scope="tensor"),
        lambda _: 70,
    ),
    "static, refreshed": (lambda: gs.StaticMask(density=0.02, refresh_every=2), lambda _: round(0.02 * NUM_ENTRIES)),
    "static, batches": (lambda: gs.StaticMask(budget=70, batches=BATCHES, refresh_every=3), lambda _: 70),
    "static, whole": (lambda: gs.StaticMask(density=1.0, among="*mlp*"), lambda _: LAYERS * 3 * 512),
} | {
    f"static, {each.name}": (
        lambda each=each: gs.StaticMask(
            salience=each, budget=41, refresh_every=4, batches=BATCHES if each.needs_batches else None
        ),
        lambda _: 41,
    )
    for each in vars(salience).values()
    if isinstance(each, salience.AbstractSalience)
}
COMPACT = {name: row for name, row in TABLE.items() if isinstance(row[0](), AbstractCompactMask)}

each_mask = pytest.mark.parametrize("make", [make for make, _ in TABLE.values()], ids=TABLE)
each_compact_mask = pytest.mark.parametrize("make", [make for make, _ in COMPACT.values()], ids=COMPACT)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        model(**tiny_batch(model, seed=step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_every_exported_mask_has_a_row_and_is_final() -> None:
    exported = {value for value in vars(masks).values() if inspect.isclass(value)}
    assert exported == {type(make()) for make, _ in TABLE.values()}
    assert all(getattr(mask, "__final__", False) for mask in exported)


def test_every_salience_is_there_under_its_name() -> None:
    names = {"gradient", "magnitude", "smallest_magnitude", "random", "snip"}
    names |= {"force", "taylor", "fisher", "synflow", "grasp"}
    found = {name: value for name, value in vars(salience).items() if isinstance(value, salience.AbstractSalience)}
    assert set(found) == names
    assert all(value.name == name and value.__doc__ for name, value in found.items())


# The answers alone -------------------------------------------------------------------------------------------------


@each_compact_mask
def test_chosen_entries_are_of_offered_tensors_ascending_and_in_range(make: Callable[[], AbstractCompactMask]) -> None:
    model = make_model()
    mask = make().bind(offered(model))
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    for step in range(NUM_STEPS):
        if isinstance(mask.choice(step, 0), FromWeights):
            for name, indices in mask.choose(step, model).items():
                assert name in mask.names
                assert indices.dtype == torch.int64
                assert indices[0] >= 0
                assert indices[-1] < sizes[name]
                assert bool((indices[1:] > indices[:-1]).all())


@pytest.mark.parametrize("name", [name for name, (_, count) in TABLE.items() if count is not None])
def test_exactly_as_many_entries_are_chosen_as_promised(name: str) -> None:
    make, promised = TABLE[name]
    model = make_model()
    mask = make().bind(offered(model))
    entries: dict[str, list[int]] = {}
    for step in range(NUM_STEPS):
        found = gradients(model, seed=step)
        if isinstance(mask, AbstractDenseMask):
            masked = mask.masks(list(found.values()))
            assert sum(int(each.sum()) for each in masked) == promised(step)
        else:
            entries = next_entries(mask, model, step, entries, found)
            assert sum(map(len, entries.values())) == promised(step)


@each_mask
def test_asking_changes_nothing_and_is_answered_alike_twice(make: Callable[[], AbstractMask]) -> None:
    model = make_model()
    model.model.layers[0].eval()
    model.model.norm.requires_grad_(False)
    mask = make().bind([tensor for tensor in offered(model) if tensor.parameter.requires_grad])
    before, modes = snapshot(model), [module.training for module in model.modules()]
    trains = [parameter.requires_grad for parameter in model.parameters()]
    found = gradients(model, seed=0)
    answers = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        if isinstance(mask, AbstractDenseMask):
            answers.append([each.tolist() for each in mask.masks(list(found.values()))])
        else:
            answers.append([next_entries(mask, model, step, {}, found) for step in range(NUM_STEPS)])
        assert torch.equal(torch.get_rng_state(), state)
    assert answers[0] == answers[1]
    after = snapshot(model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert modes == [module.training for module in model.modules()]
    assert trains == [parameter.requires_grad for parameter in model.parameters()]
    assert all(parameter.grad is None for parameter in model.parameters())


@each_compact_mask
def test_a_score_is_elementwise(make: Callable[[], AbstractCompactMask]) -> None:
    """The optimizer scores in chunks."""
    mask = make().bind(offered(make_model()))
    if any(isinstance(mask.choice(step, 0), TopOfGradient) for step in range(NUM_STEPS)):
        generator = torch.Generator().manual_seed(0)
        weight, gradient = torch.randn(2, 6, 5, generator=generator)
        score = mask.score(weight.clone(), gradient.clone())
        assert score.shape == weight.shape
        rows = [mask.score(weight[row].clone(), gradient[row].clone()) for row in range(6)]
        assert torch.equal(score, torch.stack(rows))


@each_mask
def test_settings_are_plain_and_tell_masks_apart(make: Callable[[], AbstractMask]) -> None:
    mask = make().bind(offered(make_model()))
    settings = mask.settings()
    assert through_torch(settings) == settings == make().settings()
    # "global" and "tensor" of one mask, two budgets, two saliences: all differ.
    same = [other for other, _ in TABLE.values() if type(other()) is type(mask) and other().settings() == settings]
    assert len(same) == 1


@each_mask
def test_binding_leaves_the_original_unbound(make: Callable[[], AbstractMask]) -> None:
    mask = make()
    before = copy.copy(vars(mask))
    mask.bind(offered(make_model()))
    assert vars(mask) == before
    assert mask.names == ()


@each_mask
def test_a_glob_that_matches_nothing_is_refused_with_the_nearest_names(make: Callable[[], AbstractMask]) -> None:
    mask = make()
    mask.among = ("model.layers.0.mlp.up_prj.weight",)
    with pytest.raises(UsageError, match=r"nearest: 'model\.layers\.0\.mlp\.up_proj\.weight'"):
        mask.bind(offered(make_model()))


@each_mask
def test_only_what_among_matches_is_chosen_from(make: Callable[[], AbstractMask]) -> None:
    mask = make()
    mask.among = "*norm*" if isinstance(mask, gs.BitFit) else "*.1.mlp.*"
    bound = mask.bind(offered(make_model()))
    assert bound.names
    assert all("norm" in name or ".1.mlp." in name for name in bound.names)


# In the optimizer --------------------------------------------------------------------------------------------------


@each_compact_mask
def test_the_optimizer_holds_the_entries_that_a_sort_of_everything_finds(make: Callable[[], AbstractMask]) -> None:
    model = make_model()
    optimizer = gs.SparseOptimizer(model, make(), lr=1e-2)
    mask = optimizer.mask
    assert isinstance(mask, AbstractCompactMask)
    expected: dict[str, list[int]] = {}
    for step in range(4):
        twin = make_model()
        twin.load_state_dict(model.state_dict())
        reference = make().bind(offered(twin))
        assert isinstance(reference, AbstractCompactMask)
        expected = next_entries(reference, twin, step, expected, gradients(twin, seed=step))
        model(**tiny_batch(model, seed=step)).loss.backward()
        if isinstance(mask.choice(step, 0), FromWeights):
            assert as_lists(optimizer.entries) == expected  # before the step, from the weights before it
        optimizer.step()
        optimizer.zero_grad()
        if not isinstance(mask.choice(step + 1, 0), FromWeights):
            assert as_lists(optimizer.entries) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@each_mask
def test_entries_that_were_never_in_the_mask_are_bit_identical(
    make: Callable[[], AbstractMask], dtype: torch.dtype
) -> None:
    model = make_model(dtype)
    optimizer = gs.SparseOptimizer(model, make(), lr=1e-2, weight_decay=0.5)
    before = snapshot(model)
    ever = {name: torch.zeros(parameter.numel(), dtype=torch.bool) for name, parameter in model.named_parameters()}
    moments = {name: torch.zeros(parameter.shape) for name, parameter in model.named_parameters()}
    for step in range(5):
        planned = optimizer.entries
        model(**tiny_batch(model, seed=step)).loss.backward()
        mask = optimizer.mask
        if isinstance(mask, AbstractDenseMask):
            found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
            if mask.ranks == "momentum":
                found = {name: moments[name].lerp_(gradient.float(), 0.1) for name, gradient in found.items()}
            for name, each in zip(found, mask.masks(list(found.values())), strict=True):
                ever[name] |= each.reshape(-1)
        optimizer.step()
        optimizer.zero_grad()
        for entries in (planned, optimizer.entries):
            for name, indices in entries.items():
                ever[name][indices] = True
    moved = {name: (parameter.detach() != before[name]).view(-1) for name, parameter in model.named_parameters()}
    assert any(each.any() for each in moved.values())
    for name, each in moved.items():
        assert not (each & ~ever[name]).any(), name


@each_mask
def test_stopped_and_resumed_at_any_step_it_ends_bitwise_alike(make: Callable[[], AbstractMask]) -> None:
    def built(weights: dict[str, torch.Tensor] | None) -> tuple[nn.Module, gs.SparseOptimizer]:
        model = make_model()
        if weights is not None:
            model.load_state_dict(weights)
        return model, gs.SparseOptimizer(model, make(), lr=1e-2)

    def step(model: nn.Module, optimizer: gs.SparseOptimizer, number: int) -> object:
        train(model, optimizer, range(number, number + 1))
        return optimizer.last_record

    assert_resumes(built, step, num_steps=NUM_STEPS)


@each_compact_mask
def test_a_half_precision_model_has_masters_of_its_entries_only(make: Callable[[], AbstractMask]) -> None:
    model = make_model(torch.bfloat16)
    optimizer = gs.SparseOptimizer(model, make(), lr=1e-2)
    train(model, optimizer, range(3))
    assert optimizer.memory()["masters"] == 4 * sum(indices.numel() for indices in optimizer.entries.values())


# Wrong settings ----------------------------------------------------------------------------------------------------

BAD_SETTINGS: list[tuple[Callable[[], AbstractMask], str]] = [
    (lambda: gs.ID3(steps=5), "give one of them"),
    (lambda: gs.ID3(budget=4, density=0.1, steps=5), "give one of them"),
    (lambda: gs.ID3(budget=0, steps=5), "budget=0 is not"),
    (lambda: gs.ID3(budget=4, steps=0), "steps=0 is not"),
    (lambda: gs.ID3(density=0.0, steps=5), "density=0.0 is outside"),
    (lambda: gs.ID3(density=1.1, steps=5), "density=1.1 is outside"),
    (lambda: gs.ID3(budget=4, steps=5, eps=0.0), "eps=0.0 is outside"),
    (lambda: gs.GMT(fraction=0.0), "fraction=0.0 is outside"),
    (lambda: gs.GMT(fraction=70), "fraction=70 is outside"),
    (lambda: gs.GMT(scope="layer"), 'scope="tensor" or scope="global"'),  # type: ignore[arg-type]
    (lambda: gs.GMT(mask="weights"), 'mask="gradient" or mask="update"'),  # type: ignore[arg-type]
    (lambda: gs.MoFO(fraction=0.0), "fraction=0.0 is outside"),
    (lambda: gs.MoFO(fraction=15), "fraction=15 is outside"),
    (lambda: gs.SpaRTA(density=0.0), "density=0.0 is outside"),
    (lambda: gs.SpaRTA(seed=-1), "seed=-1 is not"),
    (lambda: gs.FixedEntries(entries=[0, 1]), "is no Mapping object"),  # type: ignore[arg-type]
    (lambda: gs.FixedEntries(entries={"w": torch.tensor([0.5])}), "is not a list of flat indices"),
    (lambda: gs.FixedEntries(entries={"w": torch.tensor([True])}), "is not a list of flat indices"),
    (lambda: gs.FixedEntries(entries={"w": torch.tensor([[0, 1]])}), "is not a list of flat indices"),
    (lambda: gs.FixedEntries(entries={"w": torch.tensor([1, 1])}), r"write indices\.unique\(\)"),
    (lambda: gs.FixedEntries(entries={"w": torch.tensor([-1, 1])}), "must ascend from 0"),
    (lambda: gs.TopGradient(density=-0.1), "density=-0.1 is outside"),
    (lambda: gs.LIFT(), "give one of them, e.g. rank=32"),
    (lambda: gs.LIFT(rank=4, density=0.1), "give one of them, e.g. rank=32"),
    (lambda: gs.LIFT(rank=0), "rank=0 is not"),
    (lambda: gs.LIFT(rank=1, approximation_rank=0), "approximation_rank=0 is not"),
    (lambda: gs.LIFT(rank=1, refresh_every=0), "refresh_every=0 is not"),
    (lambda: gs.LIFT(density=2.0), "density=2.0 is outside"),
    (lambda: gs.LIFT(rank=1, block_size=3), "block_size=1 or block_size=4"),
    (lambda: gs.LIFT(rank=1, seed=-1), "seed=-1 is not"),
    (lambda: gs.StaticMask(), "give one of them"),
    (lambda: gs.StaticMask(budget=1, density=0.1), "give one of them"),
    (lambda: gs.StaticMask(budget=0), "budget=0 is not"),
    (lambda: gs.StaticMask(budget=1.5), "budget=1.5 is not"),  # type: ignore[arg-type]
    (lambda: gs.StaticMask(density=0), "density=0 is outside"),
    (lambda: gs.StaticMask(budget=1, scope="layer"), "scope='layer' is unknown"),  # type: ignore[arg-type]
    (lambda: gs.StaticMask(budget=1, refresh_every=0), "refresh_every=0 is not"),
    (lambda: gs.StaticMask(budget=1, seed=-1), "seed=-1 is not"),
    (lambda: gs.StaticMask(salience="gradient", budget=1), "salience=gradselect.salience.gradient"),  # type: ignore[arg-type]
    (lambda: gs.StaticMask(salience=salience.Snip, budget=1), "or another of fisher"),  # type: ignore[arg-type]
    (lambda: gs.StaticMask(salience=salience.grasp, budget=1), "grasp needs batches"),
    (lambda: gs.StaticMask(salience=salience.random, budget=1, batches=BATCHES), "reads weights only"),
    (lambda: gs.StaticMask(budget=1, batches=iter(BATCHES)), r"write batches=list\(...\)"),
    (lambda: gs.StaticMask(budget=1, loss=lambda model, batch: model(**batch).loss), "leave loss out"),
]


@pytest.mark.parametrize(("make", "message"), BAD_SETTINGS, ids=[message for _, message in BAD_SETTINGS])
def test_a_wrong_setting_is_refused_with_what_to_write(make: Callable[[], AbstractMask], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make()


MISFITS: list[tuple[AbstractMask, str]] = [
    (gs.ID3(budget=10**6, steps=5), "budget=1,000,000 is more than"),
    (gs.StaticMask(budget=NUM_ENTRIES + 1), f"write budget={NUM_ENTRIES}"),
    (gs.SpaRTA(density=0.5), "write density=0.1"),
    (gs.SpaRTA(among="*.nothing.*"), "matches no parameter"),
    (gs.FixedEntries(entries={"model.norm.weigth": torch.tensor([0])}), "nearest: 'model.norm.weight'"),
    (gs.FixedEntries(entries={"model.norm.weight": torch.tensor([16])}), "index 16 is beyond the 16 entries"),
    (gs.FixedEntries(entries={"model.norm.weight": torch.tensor([])}), "nothing would train: FixedEntries has no"),
    (gs.LIFT(rank=1000), "lets every matrix train whole"),
    (gs.LIFT(rank=1, among="*norm*"), "finds no tensor"),
    (gs.BitFit(among="*up_proj*"), "finds no tensor"),
]


@pytest.mark.parametrize(("mask", "message"), MISFITS, ids=[message for _, message in MISFITS])
def test_settings_that_do_not_fit_the_model_are_refused_on_binding(mask: AbstractMask, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        gs.SparseOptimizer(make_model(), mask)
