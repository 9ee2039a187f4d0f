"""Weights that something else than the optimizer sets: masters follow, and a resume proves that it has its own."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import tiny_batch, tiny_llama
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import gradselect as gs
from gradselect.core.fingerprint import fingerprints
from gradselect.integrations.transformers import SelectionCallback, SelectiveOptimizerFactory

MAKES = {
    "keep": lambda model: gs.BlockOptimizer(model, gs.Uniform(count=2), lr=1e-2),
    "offload": lambda model: gs.BlockOptimizer(model, gs.Uniform(count=2), lr=1e-2, residency=gs.Offload()),
    "in backward": lambda model: gs.BlockOptimizer(model, gs.Uniform(count=2), lr=1e-2, update_in_backward=True),
    "mask": lambda model: gs.SparseOptimizer(model, gs.TopGradient(density=0.2), lr=1e-2),
    "dense mask": lambda model: gs.SparseOptimizer(model, gs.GMT(fraction=0.2), lr=1e-2),
}


def train(model, optimizer, steps, first=0):
    for step in range(first, first + steps):
        model(**tiny_batch(model, seed=step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def load(model, values):
    model.load_state_dict(values)


@torch.no_grad()
def through_data(model, values):
    """Averages of weights are often written so; no version counter sees it."""
    for name, parameter in model.named_parameters():
        parameter.data.copy_(values[name])


@torch.no_grad()
def swap(model, values):
    for name, parameter in model.named_parameters():
        parameter.data = values[name].clone()


# Masters -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", [load, through_data, swap])
@pytest.mark.parametrize("make", MAKES)
def test_masters_follow_weights_that_something_else_has_set(make, write):
    """The next step wrote the old weights back: a loaded best model, or an average, was lost in silence."""
    model = tiny_llama(dtype=torch.bfloat16)
    optimizer = MAKES[make](model)
    train(model, optimizer, 3)
    values = {name: value + 1.0 for name, value in model.state_dict().items()}
    write(model, values)
    records = []
    optimizer.add_record_hook(records.append)
    train(model, optimizer, 3, first=3)
    assert any(record.refreshed for record in records)
    for name, value in model.state_dict().items():
        assert float((value - values[name]).abs().max()) < 0.2, name


@pytest.mark.parametrize("make", MAKES)
def test_nothing_is_refreshed_while_only_the_optimizer_writes(make):
    model = tiny_llama(dtype=torch.bfloat16)
    optimizer = MAKES[make](model)
    records = []
    optimizer.add_record_hook(records.append)
    train(model, optimizer, 4)
    optimizer.load_state_dict(optimizer.state_dict())
    train(model, optimizer, 4, first=4)
    assert [record.refreshed for record in records] == [()] * 8


@pytest.mark.parametrize("make", MAKES)
def test_a_nan_that_the_optimizer_wrote_itself_is_no_change_of_others(make):
    """NaN equals nothing: each step of a run that has diverged would be said to follow somebody."""
    model = tiny_llama(dtype=torch.bfloat16)
    optimizer = MAKES[make](model)
    train(model, optimizer, 2)
    for group in optimizer.param_groups:
        group["lr"] = float("nan")
    records = []
    optimizer.add_record_hook(records.append)
    train(model, optimizer, 4, first=2)
    assert any(parameter.isnan().any() for parameter in model.parameters())
    assert [record.refreshed for record in records] == [()] * 4


def test_only_values_that_changed_are_taken_over():
    """A reset of a few rows must not round the masters of the others."""
    model = tiny_llama(dtype=torch.bfloat16)
    optimizer = gs.BlockOptimizer(model, gs.Fixed(("embedding",)), lr=1e-4)
    train(model, optimizer, 2)
    embedding = model.model.embed_tokens.weight
    before = optimizer.state[embedding]["master"].clone()
    with torch.no_grad():
        embedding[3] = 7.0
    optimizer._updates.follow_weights(["embedding"])
    after = optimizer.state[embedding]["master"]
    assert torch.equal(after[3], torch.full_like(after[3], 7.0))
    rest = [row for row in range(len(after)) if row != 3]
    assert torch.equal(after[rest], before[rest])
    assert not torch.equal(after[rest], embedding[rest].float())


@pytest.mark.parametrize("make", ["keep", "mask"])
def test_a_model_that_is_cast_after_its_optimizer_was_built_gets_masters(make):
    model = tiny_llama()
    optimizer = MAKES[make](model)
    train(model, optimizer, 2)
    model.to(torch.bfloat16)
    train(model, optimizer, 2, first=2)
    assert optimizer.memory()["masters"] > 0


def test_dropping_masters_is_said(caplog):
    gs.BlockOptimizer(tiny_llama(dtype=torch.bfloat16), gs.Cyclic(every=3), residency=gs.Drop())
    gs.BlockOptimizer(tiny_llama(), gs.Cyclic(every=3), residency=gs.Drop())
    assert caplog.text.count("Drop() forgets the master weights") == 1


def arguments(folder, **settings):
    usual = {
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "max_steps": 4,
        "save_steps": 2,
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
    }
    return TrainingArguments(str(folder), **{**usual, **settings})


def trainer_of(folder, model, callbacks=(), policy=None, **settings):
    args = arguments(folder, **settings)
    rows = [{name: tensor[0] for name, tensor in tiny_batch(model, seed=seed, batch=1).items()} for seed in range(8)]
    return Trainer(
        model=model,
        args=args,
        train_dataset=rows,
        eval_dataset=rows[:2],
        optimizer_cls_and_kwargs=(SelectiveOptimizerFactory, {"args": args, "policy": policy or gs.Cyclic(every=1)}),
        callbacks=[SelectionCallback(), *callbacks],
    )


def test_the_best_model_that_a_trainer_loads_is_trained_on(tmp_path):
    """`load_best_model_at_end`, then a second `train()` of the same Trainer.

    The highest loss counts as the best here, so that it is not the last model.
    """
    model = tiny_llama(dtype=torch.bfloat16)
    settings = {
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": True,
        "eval_strategy": "steps",
        "eval_steps": 2,
    }
    trainer = trainer_of(tmp_path, model, policy=gs.All(), **settings)
    trainer.train()
    records = []
    trainer.optimizer.optimizer.add_record_hook(records.append)
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    trainer.train()
    assert records[0].refreshed


class Average(TrainerCallback):
    """Moving average of weights that replaces them after each step."""

    def on_train_begin(self, args, state, control, *, model, **_):
        self.average = [parameter.detach().clone() for parameter in model.parameters()]

    def on_step_end(self, args, state, control, *, model, **_):
        for average, parameter in zip(self.average, model.parameters(), strict=True):
            average.lerp_(parameter.data, 0.1)
            parameter.data.copy_(average)


def test_an_average_that_replaces_the_weights_is_trained_on(tmp_path):
    model = tiny_llama(dtype=torch.bfloat16)
    start = copy.deepcopy(model.state_dict())
    average = Average()
    trainer = trainer_of(tmp_path, model, [average], policy=gs.All(), learning_rate=0.5, save_strategy="no")
    records = []
    trainer.create_optimizer()
    trainer.optimizer.add_record_hook(records.append)
    trainer.train()
    assert [bool(record.refreshed) for record in records] == [False, True, True, True]
    moved = max(float((start[name] - value).abs().max()) for name, value in model.state_dict().items())
    assert moved < 0.5  # four plain steps of 0.5 would move about 2


# Fingerprints ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", ["keep", "mask"])
@pytest.mark.parametrize("wrong", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_a_loop_that_did_not_load_a_weight_is_refused_by_its_name(make, wrong):
    model = tiny_llama()
    optimizer = MAKES[make](model)
    train(model, optimizer, 3)
    saved, weights = optimizer.state_dict(), model.state_dict()

    again = tiny_llama()
    resumed = MAKES[make](again)
    resumed.load_state_dict(saved)
    values = dict(weights)
    values[wrong] = values[wrong] + 0.5
    again.load_state_dict(values)
    with pytest.raises(gs.UsageError, match=wrong):
        train(again, resumed, 1)
    again.load_state_dict(weights)
    train(again, resumed, 1)


def test_other_weights_can_be_accepted():
    model = tiny_llama()
    optimizer = MAKES["keep"](model)
    train(model, optimizer, 1)
    again = tiny_llama()
    with torch.no_grad():
        again.model.norm.weight += 1.0
    resumed = MAKES["keep"](again)
    resumed.load_state_dict(optimizer.state_dict())
    resumed.refresh_masters()
    train(again, resumed, 1)
    assert resumed.num_steps == 2


def qwen3_moe():
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=64,
            hidden_size=16,
            intermediate_size=32,
            moe_intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=8,
            num_experts=2,
            num_experts_per_tok=2,
        )
    )


def gpt_neox():
    torch.manual_seed(0)
    return GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            attention_dropout=0.0, hidden_dropout=0.0,
        )
    )  # fmt: skip


def test_complex_weights_and_single_numbers_have_a_fingerprint():
    weights = {"complex": torch.ones(2, dtype=torch.complex128), "single": torch.tensor(1.0, dtype=torch.float64)}
    sums = fingerprints([(name, torch.nn.Parameter(weight)) for name, weight in weights.items()])
    one = torch.ones(1, dtype=torch.float64).view(torch.int64).item()
    wrapped = (2 * one + 2**63) % 2**64 - 2**63
    assert sums == {"complex": ["complex128", wrapped], "single": ["float64", one]}


def test_a_trainer_that_leaves_converted_weights_unloaded_is_refused(tmp_path):
    """transformers 5 saves experts under other names, and its Trainer loads by plain names, not strictly."""
    trainer_of(tmp_path, qwen3_moe(), policy=gs.All()).train()
    resumed = trainer_of(tmp_path, qwen3_moe(), policy=gs.All(), max_steps=6)
    with pytest.raises(gs.UsageError, match=r"weights are not those .*experts.*from_pretrained"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


@pytest.mark.parametrize("build", [qwen3_moe, gpt_neox])
def test_the_advice_of_that_refusal_resumes_bitwise(build, tmp_path):
    whole = trainer_of(tmp_path, build(), policy=gs.All())
    whole.train()
    model = type(build()).from_pretrained(tmp_path / "checkpoint-2")
    resumed = trainer_of(tmp_path / "again", model, policy=gs.All())
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    ends = whole.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
