"""SPT: the choice against its twin, conversion and back, on a language model and on a vision transformer."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from mask_support import snapshot
from policy_support import through_torch
from tiny_models import tiny_batch, tiny_bert, tiny_gpt2, tiny_llama
from torch import Tensor, nn

import gradselect as gs
from gradselect import UsageError
from gradselect.entries.mask import MaskTensor
from gradselect.reference import spt_choice
from gradselect.spt import Candidate, choose

PICTURE = {"image_size": 8, "patch_size": 4, "num_channels": 3, "num_labels": 3, "hidden_size": 16}


def tiny_vit(**options: Any) -> nn.Module:
    """A ViT classifier with random weights and no dropout."""
    config = transformers.ViTConfig(
        **PICTURE,  # type: ignore[arg-type]
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        **options,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.ViTForImageClassification(config)


def pictures(*, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "pixel_values": torch.randn(4, 3, 8, 8, generator=generator),
        "labels": torch.randint(0, 3, (4,), generator=generator),
    }


def batches_of(model: nn.Module, *, seeds: range) -> list[dict[str, Tensor]]:
    if isinstance(model, transformers.ViTForImageClassification):
        return [pictures(seed=seed) for seed in seeds]
    return [tiny_batch(model, seed=seed) for seed in seeds]


OPTIONS: dict[str, Any] = {"density": 0.08, "rank": 1, "matrix_share": 0.5, "dropout": 0.0}


def converted(model: nn.Module, **options: Any) -> Any:
    return gs.spt.convert(model, batches_of(model, seeds=range(100, 103)), **{**OPTIONS, **options})


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for batch in batches_of(model, seeds=steps):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


MODELS = {"llama": lambda: tiny_llama(layers=3), "gpt2": lambda: tiny_gpt2(layers=3), "vit": tiny_vit}
each_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)

# The choice --------------------------------------------------------------------------------------------------------


def problem(*, seed: int) -> tuple[list[Candidate], dict[str, Tensor]]:
    """Four matrices and two vectors of very different sensitivity, with ties and zeros."""
    generator = torch.Generator().manual_seed(seed)
    candidates, scores = [], {}
    for position, shape in enumerate([(8, 12), (10, 10), (6,), (14, 9), (11,), (3, 4)]):
        parameter = nn.Parameter(torch.zeros(shape))
        tensor = MaskTensor(name=f"t{position}", parameter=parameter, module=nn.Identity())
        cost = parameter.numel() if len(shape) == 1 else sum(shape)
        form = None if cost >= parameter.numel() and len(shape) == 2 else "adapter" if len(shape) == 2 else "whole"
        candidates.append(Candidate(tensor=tensor, form=form, cost=cost, share=0.5 if len(shape) == 2 else 0.3))
        values = torch.rand(shape, generator=generator) ** 4 * 10.0 ** torch.randint(-3, 1, (), generator=generator)
        values[values > values.median()] = (values[values > values.median()] * 20).round() / 20
        values[values < values.quantile(0.1)] = 0.0
        scores[tensor.name] = values
    return candidates, scores


@pytest.mark.parametrize("budget", [1, 7, 20, 21, 33, 60, 90, 120, 400])
def test_the_choice_is_that_of_sorting_every_score(budget: int) -> None:
    for seed in range(3):
        candidates, scores = problem(seed=seed)
        choice = choose(candidates, scores, budget=budget)
        costs = {each.tensor.name: each.cost for each in candidates if each.form is not None}
        shares = {each.tensor.name: each.share for each in candidates}
        dense, entries = spt_choice(scores, costs=costs, shares=shares, budget=budget)
        assert {*choice.adapters, *choice.whole} == dense
        assert {(name, i) for name, indices in choice.entries.items() for i in indices.tolist()} == entries
        positive = sum(int((scores[name] > 0).sum()) for name in scores if name not in dense)
        others = sum(costs[name] for name in dense)
        assert choice.num_trained == min(budget, others + positive)  # met exactly, unless nothing is left


def test_the_choices_of_the_table_hold_every_form() -> None:
    """Otherwise the test above would compare nothing of the rules."""
    found = [choose(*problem(seed=seed), budget=budget) for seed in range(3) for budget in (21, 60, 90, 120)]
    assert any(choice.adapters for choice in found)
    assert any(choice.whole for choice in found)
    assert all(choice.entries for choice in found[:1])


# Models ------------------------------------------------------------------------------------------------------------


def test_sensitivities_are_squared_gradients_of_batches() -> None:
    """Of each batch, not of their sum: a batch may undo what another one does."""
    model = tiny_llama(layers=2)
    batches = batches_of(model, seeds=range(100, 103))
    expected: dict[str, Tensor] = {}
    twin = copy.deepcopy(model).eval()
    for batch in batches:
        twin.zero_grad()
        twin(**batch).loss.backward()
        for name, parameter in twin.named_parameters():
            assert parameter.grad is not None
            expected[name] = expected.get(name, torch.zeros(())) + parameter.grad.square()
    among = ("*.q_proj.weight", "*.down_proj.weight", "*norm*")
    names = [name for name in expected if "q_proj" in name or "down_proj" in name or "norm" in name]
    # A rank at which no adapter is smaller than its matrix: every tensor but the vectors trains by its entries.
    spt = converted(model, budget=100, density=None, rank=32, among=among, vector_share=1.0)
    flat = torch.cat([expected[name].view(-1) for name in names])
    masked = torch.cat([torch.zeros(expected[name].numel(), dtype=torch.bool) for name in names])
    offsets = dict(zip(names, torch.tensor([0, *[expected[name].numel() for name in names]]).cumsum(0), strict=False))
    for name, indices in spt.choice.entries.items():
        masked[indices + offsets[name]] = True
    assert not spt.choice.adapters
    whole = sum(expected[name].numel() for name in spt.choice.whole)
    assert int(masked.sum()) + whole == 100
    left = [name for name in names if name not in spt.choice.whole]
    outside = torch.cat([(~masked[int(offsets[name]) :][: expected[name].numel()]) for name in left])
    values = torch.cat([expected[name].view(-1) for name in left])
    assert values[~outside].min() > values[outside].max() * 0.999  # up to the rounding of another order
    assert flat.numel() == masked.numel()


@each_model
def test_what_was_not_chosen_is_bit_identical_and_the_merged_model_is_plain(make: Any) -> None:
    model = make()
    before, keys = snapshot(model), list(model.state_dict())
    spt = converted(model)
    assert spt.choice.adapters
    assert spt.choice.num_masked
    assert spt.choice.num_trained == spt.choice.budget
    optimizer = gs.SparseOptimizer(model, mask=spt.mask, always=spt.always, lr=1e-2, weight_decay=0.5)
    train(model, optimizer, range(4))
    assert sum(map(len, optimizer.entries.values())) == spt.choice.num_masked
    trained = sum(p.numel() for name, p in model.named_parameters() if name in optimizer.always_trained)
    assert trained == spt.choice.num_adapter_entries + spt.choice.num_whole
    model.eval()
    batch = batches_of(model, seeds=range(7, 8))[0]
    with torch.no_grad():
        unmerged = model(**batch).logits
        optimizer.close()
        assert gs.spt.fold(model) == len(spt.choice.adapters)
        assert all(model.get_parameter(name).requires_grad for name in spt.choice.adapters)
        torch.testing.assert_close(model(**batch).logits, unmerged, rtol=1e-5, atol=1e-5)
    assert list(model.state_dict()) == keys
    for name, parameter in model.named_parameters():
        changed = (parameter != before[name]).view(-1)
        assert not changed.any() or name in {*spt.choice.adapters, *spt.choice.whole, *spt.choice.entries}
        if name in spt.choice.entries:
            outside = torch.ones_like(changed)
            outside[spt.choice.entries[name]] = False
            assert not (changed & outside).any()
            assert changed.any()
        elif name in {*spt.choice.adapters, *spt.choice.whole}:
            assert changed.any(), name


def test_a_classifier_of_pictures_trains_its_head_and_class_token_whole() -> None:
    """As in the paper; patch and position embeddings are frozen."""
    model = tiny_vit()
    before = snapshot(model)
    spt = converted(model)
    optimizer = gs.SparseOptimizer(
        model, mask=spt.mask, always=(*spt.always, "classifier.*", "*.cls_token"), lr=1e-2, weight_decay=0.0
    )
    train(model, optimizer, range(3))
    optimizer.close()
    gs.spt.fold(model)
    moved = {name for name, tensor in model.named_parameters() if not torch.equal(tensor, before[name])}
    assert {"classifier.weight", "classifier.bias", "vit.embeddings.cls_token"} <= moved
    assert not any("patch_embeddings" in name or "position_embeddings" in name for name in moved)


def test_the_loss_of_a_converted_model_is_that_before(recwarn: pytest.WarningsRecorder) -> None:
    model = tiny_vit()
    batch = pictures(seed=5)
    with torch.no_grad():
        before = model(**batch).loss
        state = torch.get_rng_state()
        converted(model)
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(model(**batch).loss, before)
    assert not recwarn.list


@pytest.mark.parametrize("make", [tiny_vit, lambda: tiny_llama(layers=3)], ids=["vit", "llama"])
def test_a_resumed_loop_goes_on_as_if_it_had_not_stopped(make: Any) -> None:
    whole = make()
    spt = converted(whole, seed=3)
    optimizer = gs.SparseOptimizer(whole, mask=spt.mask, always=spt.always, lr=1e-2)
    train(whole, optimizer, range(2))
    weights, state = copy.deepcopy(whole.state_dict()), through_torch(optimizer.state_dict())
    train(whole, optimizer, range(2, 4))
    resumed = make()
    again = gs.spt.convert(resumed, [], **OPTIONS, seed=3, earlier=state)
    assert again.always == spt.always
    assert again.mask.settings() == spt.mask.settings()
    assert again.choice.describe() == spt.choice.describe()
    resumed.load_state_dict(weights)
    continued = gs.SparseOptimizer(resumed, mask=again.mask, always=again.always, lr=1e-2)
    continued.load_state_dict(state)
    train(resumed, continued, range(2, 4))
    for name, weight in whole.named_parameters():
        assert torch.equal(weight, resumed.get_parameter(name)), name


def test_a_choice_that_the_state_does_not_tell_is_made_anew() -> None:
    """A vector that the user trains whole looks as if it had been chosen; another budget is another choice."""
    model = tiny_llama(layers=3)
    spt = converted(model)
    beside = next(name for name, _ in model.named_parameters() if "layernorm" in name and name not in spt.always)
    entries = {name: indices for name, indices in spt.mask.entries.items() if name != beside}
    mask = gs.FixedEntries(entries=entries, about=spt.mask.about)
    optimizer = gs.SparseOptimizer(model, mask=mask, always=(*spt.always, beside))
    train(model, optimizer, range(1))
    again = converted(tiny_llama(layers=3), earlier=optimizer.state_dict())
    assert again.mask.settings() == spt.mask.settings()
    other = converted(tiny_llama(layers=3), density=0.07, earlier=optimizer.state_dict())
    assert other.choice.budget < spt.choice.budget
    blocks = gs.BlockOptimizer(tiny_llama(layers=3), gs.Uniform(count=1))
    assert converted(tiny_llama(layers=3), earlier=blocks.state_dict()).mask.settings() == spt.mask.settings()


def test_other_entries_are_not_continued() -> None:
    model, other = tiny_llama(layers=2), tiny_llama(layers=2)
    first, second = converted(model, rank=32), converted(other, rank=32, density=0.07)
    optimizer = gs.SparseOptimizer(model, mask=first.mask, always=first.always)
    train(model, optimizer, range(1))
    with pytest.raises(UsageError, match="entries"):
        gs.SparseOptimizer(other, mask=second.mask, always=second.always).load_state_dict(optimizer.state_dict())


def test_a_model_in_which_every_matrix_gets_an_adapter_trains() -> None:
    """Then no entry is left for the mask."""
    model = tiny_llama(layers=2)
    weights = [name for name, _ in model.named_parameters() if ".mlp.up_proj" in name]
    spt = converted(model, budget=2 * (16 + 32), density=None, among=tuple(weights), matrix_share=0.02)
    assert set(spt.choice.adapters) == set(weights)
    assert spt.choice.num_masked == 0
    optimizer = gs.SparseOptimizer(model, mask=spt.mask, always=spt.always, lr=1e-2)
    assert optimizer.mask.names == ()
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(spt.always)
    before = snapshot(model)
    train(model, optimizer, range(2))
    assert {name for name, p in model.named_parameters() if not torch.equal(p, before[name])} == set(spt.always)


def test_a_budget_that_cannot_be_spent_is_said(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_llama(layers=2)
    weights = [name for name, _ in model.named_parameters() if ".mlp.up_proj" in name]
    converted(model, budget=500, density=None, among=tuple(weights), matrix_share=0.02)
    assert "trains 96 entries of a budget of 500: 96 in adapters of 2 matrices" in caplog.text


def test_a_half_precision_model_trains_its_entries_with_masters() -> None:
    model = tiny_llama(layers=2, dtype=torch.bfloat16)
    spt = converted(model)
    optimizer = gs.SparseOptimizer(model, mask=spt.mask, always=spt.always, lr=1e-2)
    train(model, optimizer, range(2))
    optimizer.close()
    gs.spt.fold(model)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_frozen_parameters_stay_frozen() -> None:
    model = tiny_bert(layers=2)
    model.get_parameter("bert.encoder.layer.0.intermediate.dense.weight").requires_grad_(False)
    spt = converted(model)
    names = {*spt.choice.adapters, *spt.choice.whole, *spt.choice.entries}
    assert "bert.encoder.layer.0.intermediate.dense.weight" not in names
    outside = {name for name in names if ".layer." not in name}
    assert outside <= {f"{module}.LayerNorm.{kind}" for module in ("bert.embeddings", "cls.predictions.transform")
                       for kind in ("weight", "bias")}  # fmt: skip


BAD: list[tuple[dict[str, Any], str]] = [
    ({"density": None}, "give one of them, e.g. density=0.01"),
    ({"budget": 10}, "give one of them, e.g. density=0.01"),
    ({"budget": 0, "density": None}, "budget=0 is not"),
    ({"budget": 10**9, "density": None}, "budget=1,000,000,000 is more than"),
    ({"density": 2.0}, "density=2.0 is outside"),
    ({"rank": 0}, "rank=0 is not"),
    ({"matrix_share": 0.0}, "matrix_share=0.0 is outside"),
    ({"vector_share": 5}, "vector_share=5 is outside"),
    ({"dropout": 1.0}, "dropout=1.0 is outside"),
    ({"seed": -1}, "seed=-1 is not"),
    ({"among": ("*.up_prj.weight",)}, "matches no parameter"),
    ({"among": ("*embed_tokens*",)}, "neither the matrix of a linear layer nor a vector"),
    ({"loss": lambda model, batch: model(**batch).loss * float("nan")}, "the loss of a batch is nan"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_arguments_are_refused_before_the_model_changes(options: dict[str, Any], message: str) -> None:
    model = tiny_llama(layers=2)
    keys = list(model.state_dict())
    with pytest.raises(UsageError, match=message):
        converted(model, **options)
    assert list(model.state_dict()) == keys
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_model_is_not_converted_twice_or_under_an_optimizer() -> None:
    model = tiny_llama(layers=2)
    spt = converted(model)
    with pytest.raises(UsageError, match=r"gs\.spt\.fold\(model\)"):
        converted(model)
    gs.spt.fold(model)
    spt = converted(model, rank=32)
    optimizer = gs.SparseOptimizer(model, mask=spt.mask, always=spt.always)
    with pytest.raises(UsageError, match=r"close\(\) that one"):
        converted(model)
    optimizer.close()


def test_a_model_without_layers_is_refused() -> None:
    with pytest.raises(UsageError, match="finds no linear layer and no vector"):
        gs.spt.convert(nn.Linear(4, 4), [{}], density=0.1)


def test_without_a_batch_nothing_can_be_chosen() -> None:
    with pytest.raises(UsageError, match="batches is empty"):
        gs.spt.convert(tiny_llama(layers=2), [], density=0.1)
