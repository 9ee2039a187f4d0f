"""Random masks of the literature: SpaRTA, and the two readings of LoRA-SP."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from mask_support import offered, snapshot
from tiny_models import tiny_batch, tiny_bert, tiny_gpt2, tiny_llama, tiny_t5
from torch import nn

import gradselect as gs
from gradselect import UsageError
from gradselect.entries import generator_of
from gradselect.methods import RunFacts, parse_method

# PEFT uses names that transformers 5.23 has replaced.
pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")


def tiny_distilbert() -> nn.Module:
    return transformers.DistilBertModel(
        transformers.DistilBertConfig(vocab_size=32, dim=16, hidden_dim=32, n_layers=1, n_heads=4)
    )


def tiny_rwkv() -> nn.Module:
    return transformers.RwkvModel(transformers.RwkvConfig(vocab_size=32, hidden_size=16, num_hidden_layers=2))


# SpaRTA ------------------------------------------------------------------------------------------------------------


def test_each_entry_is_drawn_by_itself() -> None:
    """The twin asks for one number after the other."""
    model = tiny_llama(layers=2)
    mask = gs.SpaRTA(density=0.05, seed=7).bind(offered(model))
    total, candidates = sum(p.numel() for p in model.parameters()), sum(tensor.numel for tensor in mask.tensors)
    probability = 0.05 * total / candidates
    for tensor in mask.tensors:
        generator = generator_of(seed=7, step=0, name=tensor.name)
        draws = [float(torch.rand(1, generator=generator, dtype=torch.float64)) for _ in range(tensor.numel)]
        expected = [index for index, draw in enumerate(draws) if draw < probability]
        assert mask.choose(0, model).get(tensor.name, torch.tensor([])).tolist() == expected


def test_the_number_of_entries_varies_around_the_share_of_the_whole_model() -> None:
    model = tiny_llama(layers=4)
    total = sum(p.numel() for p in model.parameters())
    counts = []
    for seed in range(30):
        mask = gs.SpaRTA(density=0.05, seed=seed).bind(offered(model))
        counts.append(sum(map(len, mask.choose(0, model).values())))
    mean, deviation = sum(counts) / 30, (0.05 * total) ** 0.5
    assert len(set(counts)) > 10
    assert abs(mean - 0.05 * total) < 4 * deviation / 30**0.5
    assert mask.expected_entries == round(0.05 * total)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (tiny_llama(layers=1), {"v_proj.weight", "o_proj.weight"}),
        (tiny_bert(layers=1), {"value.weight", "value.bias", "dense.weight", "dense.bias"}),
        (tiny_t5(layers=1), {"v.weight", "o.weight"}),
        (tiny_distilbert(), {"v_lin.weight", "v_lin.bias", "out_lin.weight", "out_lin.bias"}),
        (tiny_rwkv(), {"value.weight"}),
    ],
    ids=["llama", "bert", "t5", "distilbert", "rwkv"],
)
def test_values_and_outputs_of_attention_are_drawn_from(model: nn.Module, expected: set[str]) -> None:
    names = gs.SpaRTA(density=0.01).bind(offered(model)).names
    assert {name.rpartition(".")[0].rpartition(".")[2] + "." + name.rpartition(".")[2] for name in names} == expected
    assert all("attention" in name.lower() or "attn" in name for name in names)


def test_a_draw_of_no_entry_is_refused_with_what_to_write() -> None:
    """Training ended in torch's error of a loss without a gradient."""
    model = tiny_llama(layers=1)
    total = sum(parameter.numel() for parameter in model.parameters())
    with pytest.raises(gs.UsageError, match=r"is less than one of them.* write density=\S+ or more"):
        gs.SpaRTA(density=0.4 / total).bind(offered(model))
    masks = [gs.SpaRTA(density=0.6 / total, seed=seed).bind(offered(model)) for seed in range(20)]
    empty = next(mask for mask in masks if not any(len(mask._drawn(tensor)) for tensor in mask.tensors))
    with pytest.raises(gs.UsageError, match=rf"drew no entry with seed={empty.seed}, where 1 were expected"):
        empty.choose(0, model)


def test_a_model_whose_projections_have_other_names_is_refused_with_what_to_write() -> None:
    with pytest.raises(UsageError, match=r'among=\("\*\.c_attn\.\*"'):
        gs.SpaRTA(density=0.01).bind(offered(tiny_gpt2(layers=1)))
    assert gs.SpaRTA(density=0.01, among=("*.c_attn.*",)).bind(offered(tiny_gpt2(layers=1))).names


# LoRA-SP -----------------------------------------------------------------------------------------------------------


def lora(model: nn.Module) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))  # type: ignore[arg-type]


@pytest.mark.parametrize("refresh_every", [None, 1], ids=["once", "each step"])
def test_half_of_each_matrix_of_a_lora_trains(refresh_every: int | None) -> None:
    model = lora(tiny_llama(layers=2))
    before = snapshot(model)
    mask = gs.StaticMask(salience=gs.salience.random, density=0.5, scope="tensor", refresh_every=refresh_every)
    optimizer = gs.SparseOptimizer(model, mask, lr=1e-2, weight_decay=0.0)
    sets = []
    for step in range(3):
        sets.append({name: set(indices.tolist()) for name, indices in optimizer.entries.items()})
        model(**tiny_batch(model, seed=step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters() if ".lora_" in name}
    halves = {name: size // 2 for name, size in sizes.items()}
    assert all({name: len(indices) for name, indices in each.items()} == halves for each in sets)
    assert (sets[0] == sets[1] == sets[2]) == (refresh_every is None)
    ever = {name: set.union(*(each.get(name, set()) for each in sets)) for name in sizes}
    for name, parameter in model.named_parameters():
        moved = (parameter != before[name]).view(-1).nonzero().view(-1).tolist()
        assert set(moved) <= ever.get(name, set())
    assert any(len(indices) > sizes[name] // 2 for name, indices in ever.items()) == (refresh_every == 1)


def test_a_tensor_of_no_entries_draws_none() -> None:
    """It was a traceback of torch.cat."""
    model = nn.ParameterDict({"full": nn.Parameter(torch.ones(40)), "empty": nn.Parameter(torch.ones(0))})
    optimizer = gs.SparseOptimizer(model, gs.SpaRTA(density=0.5, among=("*",)))
    assert list(optimizer.entries) == ["full"]
    optimizer.close()


def test_the_preset_is_that_mask() -> None:
    method: Any = parse_method({"name": "lora-sp", "refresh_every": 1})
    mask = method.plain_mask(RunFacts(seed=4, num_steps=10))
    expected = gs.StaticMask(salience=gs.salience.random, density=0.5, scope="tensor", refresh_every=1, seed=4)
    assert mask.settings() == expected.settings()
    assert method.adapter.rank == 16


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"adapter": None}, "adapter=None is no LoRA"),
        ({"adapter": {"name": "ether"}}, "adapter=ether is no LoRA"),
        ({"density": 0}, "density"),
        ({"refresh_every": 0}, "refresh_every"),
    ],
)
def test_a_wrong_preset_is_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        gs.method({"name": "lora-sp", **values})


def test_in_a_loop_of_ones_own_the_preset_says_what_to_write() -> None:
    with pytest.raises(UsageError, match=r"wrap the model with peft\.get_peft_model and write"):
        gs.method("lora-sp").make_optimizer(tiny_llama(layers=1), lr=1e-3)  # type: ignore[attr-defined]
