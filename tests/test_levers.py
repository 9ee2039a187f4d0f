"""Levers on memory: updates inside the backward pass, moments of 8 bits, checkpoints and chunked losses."""

from __future__ import annotations

import importlib
import io

import pytest
import torch
from tiny_models import tiny_batch, tiny_llama

import gradselect as gs

POLICIES = {
    "adagradselect": lambda: gs.AdaGradSelect(fraction=0.4, explore_steps=3, every=2),
    "gradnorm": lambda: gs.GradNormTopK(fraction=0.3),
    "grass": lambda: gs.GradNormTopK(count=2, refresh=3, temperature=0.1, ema=0.9, probe_steps=1),
    "uniform": lambda: gs.Uniform(count=2),
    "cyclic": lambda: gs.Cyclic(every=2, count=2),
    "fixed": lambda: gs.Fixed(("layer.2", "norm")),
    "all": lambda: gs.All(),
    "misa": lambda: gs.MISA(share=0.4, every=3),
}
SETTINGS = {
    "fp32, tied, checkpoints, embedding always": ({"tied": True}, {"residency": gs.Keep()}),
    "bf16 with masters, offload": ({"dtype": torch.bfloat16}, {"residency": gs.Offload()}),
}


def build(policy, model_settings, **settings):
    model = tiny_llama(layers=3, **model_settings)
    if model_settings.get("tied"):
        model._set_gradient_checkpointing(gradient_checkpointing_func=checkpoint)
        settings["always"] = "embedding"
    blocks = gs.partition(model, by="matrix") if isinstance(policy, gs.MISA) else None
    return model, gs.BlockOptimizer(model, policy, lr=1e-2, weight_decay=0.1, blocks=blocks, **settings)


def checkpoint(function, *inputs):
    return torch.utils.checkpoint.checkpoint(function, *inputs, use_reentrant=False)


def train(model, optimizer, steps, *, first=0, batch=tiny_batch):
    for step in range(first, first + steps):
        model(**batch(model, seed=step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def saved_and_loaded(state_dict):
    buffer = io.BytesIO()
    torch.save(state_dict, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


# Update inside the backward pass -----------------------------------------------------------------------------------


@pytest.mark.parametrize("case", SETTINGS)
@pytest.mark.parametrize("name", POLICIES)
def test_updating_in_the_backward_pass_is_the_ordinary_training_bitwise(name, case):
    """Weights, records and the whole optimizer state, through a resume in the middle."""
    model_settings, settings = SETTINGS[case]
    model, optimizer = build(POLICIES[name](), model_settings, **settings)
    records = []
    optimizer.add_record_hook(records.append)
    train(model, optimizer, 8)

    early, ours = build(POLICIES[name](), model_settings, update_in_backward=True, **settings)
    our_records = []
    ours.add_record_hook(our_records.append)
    train(early, ours, 4)
    other, again = build(POLICIES[name](), model_settings, update_in_backward=True, **settings)
    other.load_state_dict(early.state_dict())
    again.load_state_dict(saved_and_loaded(ours.state_dict()))
    again.add_record_hook(our_records.append)
    train(other, again, 4, first=4)

    assert our_records == records
    assert same(weights(other), weights(model))
    for key, state in optimizer.state_dict()["state"].items():
        assert same(again.state_dict()["state"][key], state)


def test_at_most_one_gradient_exists_in_steps_that_know_their_selection():
    model = tiny_llama(layers=3)
    live = []

    def count(_):
        live.append(sum(p.grad.nbytes for p in model.parameters() if p.grad is not None))

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(count)  # before the optimizer's own
    optimizer = gs.BlockOptimizer(
        model, gs.AdaGradSelect(fraction=0.5, explore_steps=1), lr=1e-2, always="head", update_in_backward=True
    )
    peaks = []
    for step in range(3):
        live.clear()
        model(**tiny_batch(model, seed=step)).loss.backward()
        peaks.append(max(live))
        assert (optimizer.memory()["gradients"] == 0) == (step > 0)
        optimizer.step()
        optimizer.zero_grad()
        if step > 0:
            members = {block.name: block.parameters for block in gs.partition(model)}
            moved = [p for name in optimizer.last_record.selected for p in members[name]]
            assert peaks[-1] == max(p.nbytes for p in moved)
            assert len(live) == len(moved)
    assert peaks[1] < peaks[0]


def test_what_the_user_thaws_in_between_does_not_move():
    model, optimizer = build(gs.Fixed(("layer.2",)), {}, update_in_backward=True)
    before = weights(model)
    model.requires_grad_(True)
    train(model, optimizer, 1)
    assert {name for name, weight in weights(model).items() if not torch.equal(weight, before[name])} == {
        name for name in before if ".layers.2." in name
    }


def test_a_second_backward_pass_before_the_step_is_refused_and_moves_nothing():
    model, optimizer = build(gs.Fixed(("layer.1", "layer.2")), {}, update_in_backward=True)
    model(**tiny_batch(model, seed=0)).loss.backward()
    once = weights(model)
    with pytest.raises(gs.UsageError, match="second backward pass"):
        model(**tiny_batch(model, seed=1)).loss.backward()
    assert same(weights(model), once)
    with pytest.raises(gs.UsageError, match=r"save after optimizer\.step"):
        optimizer.state_dict()
    optimizer.zero_grad()
    train(model, optimizer, 2)
    assert optimizer.num_steps == 2


def test_a_newer_optimizer_silences_the_older_ones_updates():
    model, older = build(gs.All(), {}, update_in_backward=True)
    newer = gs.BlockOptimizer(model, gs.All())
    before = weights(model)
    model(**tiny_batch(model, seed=0)).loss.backward()
    assert same(weights(model), before)
    newer.close()
    older.close()
    model(**tiny_batch(model, seed=0)).loss.backward()
    assert same(weights(model), before)


def test_what_needs_all_gradients_at_once_is_refused_with_an_update_in_the_backward_pass(monkeypatch):
    model = tiny_llama(layers=1)

    def build_with(**settings):
        return gs.BlockOptimizer(model, gs.All(), update_in_backward=True, **settings)

    scaler = torch.amp.GradScaler("cpu")
    with pytest.raises(gs.UsageError, match="accumulation_steps=2"):
        build_with(accumulation_steps=2)
    with pytest.raises(gs.UsageError, match="bfloat16, which needs no scaler"):
        build_with(grad_scaler=scaler)
    optimizer = build_with()
    with pytest.raises(gs.UsageError, match="accumulation_steps=3"):
        optimizer.accumulation_steps = 3
    with pytest.raises(gs.UsageError, match="grad_scaler"):
        optimizer.grad_scaler = scaler
    monkeypatch.setattr(importlib.import_module("gradselect._in_backward"), "is_running", lambda: True)
    with pytest.raises(gs.UsageError, match=r"torch\.distributed"):
        build_with()
