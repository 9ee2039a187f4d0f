"""BlockOptimizer: properties of every path."""

from __future__ import annotations

import copy
import dataclasses
import io
import json

import numpy
import pytest
import torch
from tiny_models import tiny_batch, tiny_llama

import gradselect as gs
from gradselect.reference import SelectiveAdamW

POLICIES = {
    "adagradselect": lambda: gs.AdaGradSelect(fraction=0.4, explore_steps=6),
    "adagradselect-covering": lambda: gs.AdaGradSelect(count=2, explore_steps=3, coverage=8, every=2),
    "gradnorm": lambda: gs.GradNormTopK(fraction=0.3),
    "grass": lambda: gs.GradNormTopK(count=2, refresh=3, temperature=0.1, ema=0.9, probe_steps=2),
    "uniform": lambda: gs.Uniform(count=2, every=2),
    "cyclic": lambda: gs.Cyclic(every=2),
    "fixed": lambda: gs.Fixed(("layer.2", "norm")),
    "all": lambda: gs.All(),
}
RESIDENCIES = {"keep": gs.Keep, "offload": gs.Offload, "drop": gs.Drop}


@pytest.fixture(params=POLICIES)
def policy(request: pytest.FixtureRequest) -> gs.AbstractPolicy:
    return POLICIES[request.param]()


def train(model, optimizer, steps, *, first=0, clip=None, after_step=lambda: None):
    for step in range(first, first + steps):
        model(**tiny_batch(model, seed=step)).loss.backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        after_step()


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def saved_and_loaded(state_dict):
    buffer = io.BytesIO()
    torch.save(state_dict, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


# It is AdamW -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_selecting_everything_is_adamw_bitwise(tied):
    ours, theirs = tiny_llama(tied=tied), tiny_llama(tied=tied)
    optimizer = gs.BlockOptimizer(ours, policy=gs.All(), lr=1e-2, weight_decay=0.1)
    matrices = [p for p in theirs.parameters() if p.ndim >= 2]
    vectors = [p for p in theirs.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    twin = torch.optim.AdamW(groups, lr=1e-2, foreach=False)
    for _ in range(20):
        train(ours, optimizer, 1, clip=0.5)
        train(theirs, twin, 1, clip=0.5)
        assert same(weights(ours), weights(theirs))


def test_selecting_everything_in_bf16_without_masters_is_adamw_bitwise():
    ours, theirs = tiny_llama(dtype=torch.bfloat16), tiny_llama(dtype=torch.bfloat16)
    train(ours, gs.BlockOptimizer(ours, gs.All(), lr=1e-2, no_decay=(), master_dtype=None), 5)
    train(theirs, torch.optim.AdamW(theirs.parameters(), lr=1e-2, foreach=False), 5)
    assert same(weights(ours), weights(theirs))


def test_equals_the_readable_twin(policy):
    """The twin rounds in another order than torch. In float64, where that stays far below the tolerance.

    In float32 some processors exceeded 1e-3: where v is near eps^2, Adam amplifies a difference of rounding.
    """
    ours, theirs = tiny_llama(dtype=torch.float64), tiny_llama(dtype=torch.float64)
    optimizer = gs.BlockOptimizer(ours, policy, lr=1e-2)
    blocks = gs.partition(theirs)
    twin = SelectiveAdamW(blocks, policy.bind(blocks), lr=1e-2)
    for step in range(12):
        train(ours, optimizer, 1, first=step)
        theirs(**tiny_batch(theirs, seed=step)).loss.backward()
        assert twin.step() == optimizer.last_record.selected
        theirs.zero_grad()
    for name, weight in weights(ours).items():
        torch.testing.assert_close(weight, theirs.get_parameter(name).detach(), rtol=1e-6, atol=1e-9)


# Unselected means untouched ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("residency", RESIDENCIES.values(), ids=RESIDENCIES)
def test_unselected_blocks_are_bit_identical(policy, residency, dtype):
    model = tiny_llama(dtype=dtype)
    optimizer = gs.BlockOptimizer(model, policy, lr=1e-2, weight_decay=0.5, residency=residency())
    blocks = {block.name: block.parameter_names for block in gs.partition(model)}
    before = weights(model)
    moved = set()

    def check():
        after = weights(model)
        for name, members in blocks.items():
            touched = any(not torch.equal(before[member], after[member]) for member in members)
            assert touched == (name in optimizer.last_record.selected), name
            moved.update([name] if touched else [])
        before.update(after)

    train(model, optimizer, 12, after_step=check)
    assert moved


def test_always_blocks_train_at_every_step_beside_the_choice():
    model = tiny_llama()
    optimizer = gs.BlockOptimizer(model, gs.Uniform(count=1), always=("embedding", "head"), lr=1e-2)
    selections = []
    train(model, optimizer, 8, after_step=lambda: selections.append(optimizer.last_record.selected))
    assert all({"embedding", "head"} <= set(selection) and len(selection) == 3 for selection in selections)
    assert optimizer.update_counts["embedding"] == 8


# Resume ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("residency", RESIDENCIES.values(), ids=RESIDENCIES)
def test_stopped_at_any_step_it_resumes_bitwise(policy, residency, dtype):
    def build():
        model = tiny_llama(layers=3, dtype=dtype)
        return model, gs.BlockOptimizer(model, policy, lr=1e-2, residency=residency())

    model, optimizer = build()
    records = []
    optimizer.add_record_hook(records.append)
    states = []
    train(
        model,
        optimizer,
        9,
        after_step=lambda: states.append((saved_and_loaded(optimizer.state_dict()), copy.deepcopy(model.state_dict()))),
    )
    for stop, (optimizer_state, model_state) in enumerate(states[:-1], start=1):
        resumed, again = build()
        resumed.load_state_dict(model_state)
        again.load_state_dict(optimizer_state)
        continued = []
        again.add_record_hook(continued.append)
        train(resumed, again, 9 - stop, first=stop)
        assert same(weights(model), weights(resumed)), f"stopped after {stop}"
        assert continued == records[stop:]
        assert again.memory() == optimizer.memory()


def test_state_survives_a_load_with_its_dtype_and_is_copied():
    """torch's own load_state_dict casts the fp32 moments of a bf16 weight to bf16."""
    model = tiny_llama(dtype=torch.bfloat16)
    optimizer = gs.BlockOptimizer(model, gs.All(), lr=1e-2)
    train(model, optimizer, 1)
    other = gs.BlockOptimizer(tiny_llama(dtype=torch.bfloat16), gs.All(), lr=1e-2)
    other.load_state_dict(optimizer.state_dict())
    for mine, theirs in zip(optimizer.state.values(), other.state.values(), strict=True):
        assert theirs["exp_avg"].dtype == theirs["master"].dtype == torch.float32
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)
        assert all(mine[key].data_ptr() != theirs[key].data_ptr() for key in mine)


@pytest.mark.parametrize("theirs", [None, torch.float32])
def test_a_checkpoint_with_other_masters_is_refused_and_changes_nothing(theirs):
    """Otherwise loaded blocks would continue with masters of the checkpoint's dtype, or without any."""
    ours = torch.float32 if theirs is None else None
    pair = []
    for master_dtype, lr in ((theirs, 1e-2), (ours, 1e-3)):
        model = tiny_llama(dtype=torch.bfloat16)
        pair.append(gs.BlockOptimizer(model, gs.Cyclic(every=1), lr=lr, master_dtype=master_dtype))
        train(model, pair[-1], 2)
    before = saved_and_loaded(pair[1].state_dict())
    with pytest.raises(gs.UsageError, match=f"write master_dtype={theirs}"):
        pair[1].load_state_dict(pair[0].state_dict())
    after = saved_and_loaded(pair[1].state_dict())
    assert [before[what] for what in ("selection", "param_groups")] == [after["selection"], after["param_groups"]]
    assert all(same(state, after["state"][number]) for number, state in before["state"].items())


@pytest.mark.parametrize("residency", RESIDENCIES)
def test_what_is_loaded_is_what_was_saved(residency):
    """With Keep, a block that was never selected was counted as on the device."""
    model = tiny_llama()
    optimizer = gs.BlockOptimizer(model, gs.Cyclic(every=1), lr=1e-2, residency=RESIDENCIES[residency]())
    train(model, optimizer, 2)
    selection = optimizer.state_dict()["selection"]
    optimizer.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    assert optimizer.state_dict()["selection"] == selection


def test_state_may_be_read_and_copied_as_that_of_torchs_optimizers():
    """Reading a missing state leaves an empty one there."""
    model, twin = tiny_llama(), tiny_llama()
    pair = [gs.BlockOptimizer(each, gs.Cyclic(every=1), lr=1e-2, residency=gs.Offload()) for each in (model, twin)]
    for step in range(4):
        assert all(pair[0].state[parameter] is not None for parameter in model.parameters())
        for each, optimizer in zip((model, twin), pair, strict=True):
            train(each, optimizer, 1, first=step)
    assert same(weights(model), weights(twin))
    assert [pair[0].memory(), pair[0].last_record] == [pair[1].memory(), pair[1].last_record]
    assert len(copy.deepcopy(pair[0].state)) == len(pair[0].state)
    pair[1].load_state_dict(saved_and_loaded(pair[0].state_dict()))
    assert len(pair[1].state) < len(pair[0].state)


def test_loading_its_own_state_changes_nothing_even_before_the_first_step():
    """Accelerate does this when it prepares an optimizer."""
    model, twin = tiny_llama(), tiny_llama()
    optimizer = gs.BlockOptimizer(model, gs.AdaGradSelect(fraction=0.4, explore_steps=4), lr=1e-2)
    straight = gs.BlockOptimizer(twin, gs.AdaGradSelect(fraction=0.4, explore_steps=4), lr=1e-2)
    for step in range(6):
        optimizer.load_state_dict(optimizer.state_dict())
        train(model, optimizer, 1, first=step)
        train(twin, straight, 1, first=step)
    assert same(weights(model), weights(twin))


def test_checkpoint_of_another_policy_model_or_optimizer_is_refused():
    model = tiny_llama()
    optimizer = gs.BlockOptimizer(model, gs.Uniform(count=2), lr=1e-2)
    train(model, optimizer, 1)
    before = weights(model)
    with pytest.raises(gs.UsageError, match=r"policy: 'Cyclic' there, 'Uniform' here"):
        optimizer.load_state_dict(gs.BlockOptimizer(tiny_llama(), gs.Cyclic(every=2)).state_dict())
    with pytest.raises(gs.UsageError, match=r"policy settings: count=1 there, count=2 here"):
        optimizer.load_state_dict(gs.BlockOptimizer(tiny_llama(), gs.Uniform(count=1)).state_dict())
    with pytest.raises(gs.UsageError, match=r"blocks: layer.2=None there"):
        optimizer.load_state_dict(gs.BlockOptimizer(tiny_llama(layers=2), gs.Uniform(count=2)).state_dict())
    with pytest.raises(gs.UsageError, match="always"):
        optimizer.load_state_dict(gs.BlockOptimizer(tiny_llama(), gs.Uniform(count=2), always=("norm",)).state_dict())
    with pytest.raises(gs.UsageError, match="not written by BlockOptimizer"):
        optimizer.load_state_dict(torch.optim.AdamW(model.parameters()).state_dict())
    of_old = optimizer.state_dict()
    del of_old["selection"]["rule"]
    with pytest.raises(gs.UsageError, match=r"does not say what its rule was: an older version"):
        optimizer.load_state_dict(of_old)
    assert same(before, weights(model))
    assert optimizer.state


@pytest.mark.parametrize("kind", ["blocks", "mask"])
def test_what_is_no_state_dict_is_refused_with_what_to_pass(kind):
    """A whole checkpoint in its place ended in KeyError: 'param_groups'."""
    model = tiny_llama()
    mask = gs.StaticMask(salience=gs.salience.magnitude, budget=5)
    optimizer = gs.BlockOptimizer(model, gs.All()) if kind == "blocks" else gs.SparseOptimizer(model, mask)
    checkpoint = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3}
    with pytest.raises(gs.UsageError, match=r"load_state_dict\(checkpoint\['optimizer'\]\)"):
        optimizer.load_state_dict(checkpoint)
    for wrong in ({}, [], None, {"state": {}, "param_groups": []}, model.state_dict()):
        with pytest.raises(gs.UsageError, match=r"pass what optimizer.state_dict\(\) returned"):
            optimizer.load_state_dict(wrong)
    optimizer.load_state_dict(checkpoint["optimizer"])


def test_hooks_of_loading_run():
    """torch's own, as of `register_load_state_dict_pre_hook`, were left out."""
    optimizer = gs.BlockOptimizer(tiny_llama(), gs.All(), lr=1e-3)
    state_dict = optimizer.state_dict()
    loaded = []

    def with_rate(_, given):
        return {**given, "param_groups": [{**group, "lr": 0.5} for group in given["param_groups"]]}

    optimizer.register_load_state_dict_pre_hook(with_rate)
    optimizer.register_load_state_dict_post_hook(lambda each: loaded.append(each.param_groups[0]["lr"]))
    optimizer.load_state_dict(state_dict)
    assert loaded == [0.5]
    assert state_dict["param_groups"][0]["lr"] == 1e-3


def widened(model, optimizer):
    model.float()
    return model, optimizer


def loaded_wider(model, optimizer):
    wider = tiny_llama()
    wider.load_state_dict(model.state_dict())
    again = gs.BlockOptimizer(wider, gs.All(), lr=1e-4)
    again.load_state_dict(optimizer.state_dict())
    return wider, again


@pytest.mark.parametrize("widen", [widened, loaded_wider])
def test_weights_that_are_half_precision_no_longer_have_no_masters(widen):
    """Weights that something else set were overwritten by masters that did not follow."""
    model = tiny_llama(dtype=torch.bfloat16)
    optimizer = gs.BlockOptimizer(model, gs.All(), lr=1e-4)
    train(model, optimizer, 2)
    masters = {name: optimizer.state[weight]["master"].clone() for name, weight in model.named_parameters()}
    model, optimizer = widen(model, optimizer)
    rate, optimizer.param_groups[0]["lr"], optimizer.param_groups[1]["lr"] = 1e-4, 0.0, 0.0
    train(model, optimizer, 1)
    assert same(weights(model), masters), "the digits that bf16 cannot hold are kept"
    assert optimizer.memory()["masters"] == 0
    model.load_state_dict({name: torch.zeros_like(value) for name, value in model.state_dict().items()})
    for group in optimizer.param_groups:
        group["lr"] = rate
    train(model, optimizer, 1)
    assert max(p.abs().max().item() for p in model.parameters()) < 1e-3


# Loops -------------------------------------------------------------------------------------------------------------


def test_closure_is_evaluated_with_gradients():
    model, twin = tiny_llama(), tiny_llama()
    optimizer = gs.BlockOptimizer(model, gs.GradNormTopK(count=2), lr=1e-2)
    straight = gs.BlockOptimizer(twin, gs.GradNormTopK(count=2), lr=1e-2)

    def closure():
        optimizer.zero_grad()
        loss = model(**tiny_batch(model, seed=0)).loss
        loss.backward()
        return loss

    assert optimizer.step(closure).item() > 0
    train(twin, straight, 1)
    assert same(weights(model), weights(twin))


def test_scheduler_sets_the_rate_of_fixed_groups():
    model = tiny_llama()
    optimizer = gs.BlockOptimizer(model, gs.Uniform(count=1), lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    groups = [list(map(id, group["params"])) for group in optimizer.param_groups]
    train(model, optimizer, 3, after_step=scheduler.step)
    assert [group["lr"] for group in optimizer.param_groups] == [0.125, 0.125]
    assert groups == [list(map(id, group["params"])) for group in optimizer.param_groups]
    with pytest.raises(gs.UsageError, match="fixed"):
        optimizer.add_param_group({"params": []})


def accumulate(model, optimizer, steps, *, parts):
    for step in range(steps):
        batch = tiny_batch(model, seed=step, batch=4)
        for part in range(parts):
            rows = slice(part * 4 // parts, (part + 1) * 4 // parts)
            (model(**{key: value[rows] for key, value in batch.items()}).loss / parts).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("name", ["adagradselect", "gradnorm", "grass", "uniform"])
def test_accumulated_micro_batches_equal_the_whole_batch(name):
    """Tolerance: gradients of halves are added in another order than those of the whole batch."""
    whole, halves = tiny_llama(), tiny_llama()
    first = gs.BlockOptimizer(whole, POLICIES[name](), lr=1e-3)
    second = gs.BlockOptimizer(halves, POLICIES[name](), lr=1e-3, accumulation_steps=2)
    accumulate(whole, first, 6, parts=1)
    accumulate(halves, second, 6, parts=2)
    assert first.update_counts == second.update_counts
    for name, weight in weights(whole).items():
        torch.testing.assert_close(weight, weights(halves)[name], rtol=1e-3, atol=1e-4)


def test_selection_holds_through_an_accumulation_window():
    model = tiny_llama()
    optimizer = gs.BlockOptimizer(model, gs.Uniform(count=1, every=1), lr=1e-2, accumulation_steps=3)
    for step in range(4):
        trainable = []
        for _ in range(3):
            model(**tiny_batch(model, seed=step)).loss.backward()
            trainable.append([name for name, p in model.named_parameters() if p.requires_grad])
        assert trainable[0] == trainable[1] == trainable[2]
        optimizer.step()
        optimizer.zero_grad()


def test_a_window_cut_short_is_stepped_with_what_is_there():
    """The last accumulation window of an epoch can hold fewer micro-batches."""
    model = tiny_llama()
    optimizer = gs.BlockOptimizer(model, gs.GradNormTopK(count=2), lr=1e-2, accumulation_steps=4)
    train(model, optimizer, 2)
    assert len(optimizer.last_record.selected) == 2
    assert len(optimizer.last_record.norms) == len(optimizer.blocks)


def test_clipping_sees_the_selected_blocks_only():
    model = tiny_llama()
    optimizer = gs.BlockOptimizer(model, gs.GradNormTopK(count=2), lr=1e-2)
    model(**tiny_batch(model, seed=0)).loss.backward()
    total = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3).item()
    optimizer.step()
    record = optimizer.last_record
    assert total == pytest.approx(sum(record.norms[name] ** 2 for name in record.selected) ** 0.5, rel=1e-5)


def test_grad_scaler_norms_are_unscaled_and_a_skipped_step_counts_for_nothing():
    model, twin = tiny_llama(), tiny_llama()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    optimizer = gs.BlockOptimizer(model, gs.AdaGradSelect(count=2, explore_steps=50), lr=1e-2, grad_scaler=scaler)
    straight = gs.BlockOptimizer(twin, gs.AdaGradSelect(count=2, explore_steps=50), lr=1e-2)
    for step in range(5):
        loss = model(**tiny_batch(model, seed=step)).loss
        overflow = step == 2
        scaler.scale(loss * (float("inf") if overflow else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if not overflow:
            train(twin, straight, 1, first=step)
            assert optimizer.last_record.selected == straight.last_record.selected
            assert optimizer.last_record.norms == pytest.approx(straight.last_record.norms, rel=1e-3)
    assert optimizer.last_record.step == 3


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")  # its new name is too new
def test_gradient_checkpointing_gives_the_same_steps(policy):
    def run(checkpointing):
        model = tiny_llama()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.train()
        optimizer = gs.BlockOptimizer(model, policy, lr=1e-2)
        train(model, optimizer, 6)
        return weights(model)

    assert same(run(True), run(False))


def test_step_without_gradients_counts_for_nothing():
    model = tiny_llama()
    optimizer = gs.BlockOptimizer(model, gs.GradNormTopK(count=2), lr=1e-2)
    before = weights(model)
    optimizer.step()
    assert optimizer.last_record is None
    assert same(before, weights(model))


def test_zeros_instead_of_none_on_request():
    model = tiny_llama()
    optimizer = gs.BlockOptimizer(model, gs.Fixed(("layer.1",)), lr=1e-2)
    model(**tiny_batch(model, seed=0)).loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    gradients = {name for name, p in model.named_parameters() if p.grad is not None}
    assert gradients
    assert all("layers.1." in name for name in gradients)


@pytest.mark.parametrize("rule", [gs.AdamWRule(), gs.AdamWRule(fused=True)])
def test_it_learns(rule):
    model = tiny_llama()
    optimizer = gs.BlockOptimizer(
        model, gs.AdaGradSelect(fraction=0.4, among=None, explore_steps=10), lr=1e-2, rule=rule
    )
    losses = []
    for _ in range(30):
        loss = model(**tiny_batch(model, seed=0)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_two_runs_are_bitwise_equal(policy):
    models = [tiny_llama(), tiny_llama()]
    for model in models:
        train(model, gs.BlockOptimizer(model, policy, lr=1e-2), 8)
    assert same(weights(models[0]), weights(models[1]))


# Several optimizers on one model ------------------------------------------------------------------------------------


def test_a_newer_optimizer_takes_the_model_over():
    """As when a notebook cell runs again: the older optimizer must not freeze, release or step any more."""
    model, twin = tiny_llama(), tiny_llama()
    older = gs.BlockOptimizer(model, gs.GradNormTopK(count=1), lr=1e-2)
    newer = gs.BlockOptimizer(model, gs.GradNormTopK(count=3), lr=1e-2)
    assert newer.blocks == older.blocks
    straight = gs.BlockOptimizer(twin, gs.GradNormTopK(count=3), lr=1e-2)
    train(model, newer, 3)
    train(twin, straight, 3)
    assert same(weights(model), weights(twin))
    model(**tiny_batch(model, seed=0)).loss.backward()
    with pytest.raises(gs.UsageError, match="newer optimizer"):
        older.step()


@pytest.mark.parametrize("settings", [{"accumulation_steps": 0}, {"accumulation_steps": 2, "update_in_backward": True}])
def test_an_optimizer_that_is_refused_takes_nothing_over(settings):
    model = tiny_llama()
    optimizer = gs.BlockOptimizer(model, gs.Cyclic(every=1), lr=1e-2)
    with pytest.raises(gs.UsageError, match="accumulation_steps"):
        gs.BlockOptimizer(model, gs.All(), **settings)
    train(model, optimizer, 2)
    assert optimizer.num_steps == 2


def test_closing_gives_the_model_back():
    model = tiny_llama()
    optimizer = gs.BlockOptimizer(model, gs.Fixed(("layer.1",)), lr=1e-2)
    assert not all(p.requires_grad for p in model.parameters())
    optimizer.close()
    assert all(p.requires_grad for p in model.parameters())
    model(**tiny_batch(model, seed=0)).loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_closing_the_older_optimizer_leaves_the_newer_one_alone():
    model = tiny_llama()
    older = gs.BlockOptimizer(model, gs.Fixed(("layer.1",)), lr=1e-2)
    gs.BlockOptimizer(model, gs.Fixed(("layer.2",)), lr=1e-2)
    newer = gs.BlockOptimizer(model, gs.Fixed(("layer.2",)), lr=1e-2)
    older.close()
    assert newer.trainable == ("layer.2",)
    assert all(("layers.2." in name) == p.requires_grad for name, p in model.named_parameters())


def test_what_the_user_freezes_after_an_optimizer_is_gone_stays_out():
    """As before adapters are added to a model that was trained by blocks: its base must stay frozen."""
    model = tiny_llama()
    optimizer = gs.BlockOptimizer(model, gs.Fixed(("layer.1",)), lr=1e-2)
    del optimizer
    model.requires_grad_(False)
    model.model.layers[2].requires_grad_(True)
    assert [block.name for block in gs.partition(model)] == ["layer.2"]


def test_masters_follow_weights_that_were_loaded_in_between():
    model = tiny_llama(dtype=torch.bfloat16)
    optimizer = gs.BlockOptimizer(model, gs.All(), lr=1e-4)
    train(model, optimizer, 2)
    model.load_state_dict({name: torch.zeros_like(value) for name, value in model.state_dict().items()})
    optimizer.refresh_masters()
    train(model, optimizer, 1)
    assert max(p.abs().max().item() for p in model.parameters()) < 1e-3


def test_copying_or_pickling_the_optimizer_says_what_to_save():
    optimizer = gs.BlockOptimizer(tiny_llama(), gs.All())
    with pytest.raises(gs.UsageError, match="state_dict"):
        copy.deepcopy(optimizer)
    with pytest.raises(gs.UsageError, match="state_dict"):
        torch.save(optimizer, io.BytesIO())


def test_record_hook_can_be_removed():
    model = tiny_llama()
    optimizer = gs.BlockOptimizer(model, gs.Uniform(count=1))
    records = []
    handle = optimizer.add_record_hook(records.append)
    train(model, optimizer, 1)
    handle.remove()
    train(model, optimizer, 1)
    assert [record.step for record in records] == [0]


def test_records_are_json_and_every_step_stands_once_after_a_resume(tmp_path):
    path = tmp_path / "records.jsonl"
    record = gs.StepRecord(
        step=0, selected=("norm",), explored=True, state_bytes=8, moved_bytes=0, selection_entropy=0.0
    )
    writer = gs.JsonlWriter(path)
    for step in range(4):
        writer(dataclasses.replace(record, step=step, norms={"norm": float("inf")}))
    with path.open("a") as file:
        file.write('{"step": 4, "sel')  # as a kill leaves it
    again = gs.JsonlWriter(path)
    for step in (2, 3):
        again(dataclasses.replace(record, step=step))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    assert lines[0]["norms"] == {"norm": None}


def test_steps_that_run_again_in_one_process_stand_once(tmp_path, caplog):
    """A loop that goes back to an earlier state, or a second `train()` of a Trainer, goes on with the same writer."""
    record = gs.StepRecord(step=0, selected=(), explored=True, state_bytes=8, moved_bytes=0, selection_entropy=0.0)
    writer = gs.JsonlWriter(tmp_path / "records.jsonl")
    for step in (0, 1, 2, 3, 2, 3, 4, 0, 1):
        writer(dataclasses.replace(record, step=step, moved_bytes=step))
        if step == 4:
            steps = [json.loads(line)["step"] for line in writer.path.read_text().splitlines()]
            assert steps == [0, 1, 2, 3, 4]
    assert len(writer.path.read_text().splitlines()) == 2
    assert not caplog.records


@pytest.mark.parametrize(
    "build",
    [
        lambda model, number: gs.BlockOptimizer(
            model, gs.AdaGradSelect(fraction=number(0.5), explore_steps=4, delta=number(2.0)), lr=number(0.01)
        ),
        lambda model, number: gs.SparseOptimizer(model, gs.ID3(density=number(0.1), steps=4), eps=number(1e-8)),
    ],
    ids=["blocks", "entries"],
)
def test_numbers_of_numpy_are_plain_numbers_in_a_state_dict(build):
    """numpy.float64 is a float, so it passes all checks; torch.load(weights_only=True) refuses it."""
    states = []
    for number in (numpy.float64, float):
        model = tiny_llama(layers=2)
        optimizer = build(model, number)
        train(model, optimizer, 2)
        states.append(saved_and_loaded(optimizer.state_dict()))
        optimizer.load_state_dict(states[-1])
    assert states[0]["selection"] == states[1]["selection"]
    assert states[0]["param_groups"] == states[1]["param_groups"]


def test_a_rate_of_single_precision_is_saved_as_a_plain_number():
    """numpy.float32 is no float, and torch lets it through as a rate."""
    model = tiny_llama(layers=2)
    optimizer = gs.BlockOptimizer(model, gs.Uniform(count=1), lr=numpy.float32(0.5))
    train(model, optimizer, 1)
    rate = saved_and_loaded(optimizer.state_dict())["param_groups"][0]["lr"]
    assert (rate, type(rate)) == (0.5, float)


def test_records_that_a_new_run_replaces_are_said(tmp_path, caplog):
    """Two trainings of one command, or two trials, with one file."""
    record = gs.StepRecord(step=0, selected=(), explored=True, state_bytes=8, moved_bytes=0, selection_entropy=0.0)
    path = tmp_path / "records.jsonl"
    first = gs.JsonlWriter(path)
    for step in range(3):
        first(dataclasses.replace(record, step=step))
    assert not caplog.records
    gs.JsonlWriter(path)(dataclasses.replace(record, step=2))
    assert not caplog.records
    gs.JsonlWriter(path)(record)
    assert "records.jsonl holds 3 records of another run, which this one replaces" in caplog.text


@pytest.mark.parametrize("text", ['{"question": "1 + 1", "answer": 2}\n', "notes", "[1]\n", '{"step": null}\n', "3\n"])
def test_a_file_of_something_else_is_no_place_for_records(text, tmp_path):
    record = gs.StepRecord(step=0, selected=(), explored=True, state_bytes=8, moved_bytes=0, selection_entropy=0.0)
    path = tmp_path / "data.jsonl"
    path.write_text(text)
    with pytest.raises(gs.UsageError, match=r"data\.jsonl holds something else than records .* stays as it is"):
        gs.JsonlWriter(path)(record)
    assert path.read_text() == text


@pytest.mark.parametrize("name", ["no/such.jsonl", "."])
def test_records_without_a_folder_are_refused(name, tmp_path):
    record = gs.StepRecord(step=0, selected=(), explored=True, state_bytes=8, moved_bytes=0, selection_entropy=0.0)
    with pytest.raises(gs.UsageError, match=r"records cannot be written to .*make the folder first"):
        gs.JsonlWriter(tmp_path / name)(record)


def test_resume_with_a_scheduler_continues_its_rates():
    def build():
        model = tiny_llama()
        optimizer = gs.BlockOptimizer(model, gs.AdaGradSelect(fraction=0.4, explore_steps=4), lr=1e-2)
        return model, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=8)

    model, optimizer, scheduler = build()
    train(model, optimizer, 4, after_step=scheduler.step)
    saved = [saved_and_loaded(part.state_dict()) for part in (model, optimizer, scheduler)]
    train(model, optimizer, 4, first=4, after_step=scheduler.step)
    resumed, again, rates = parts = build()
    for part, state in zip(parts, saved, strict=True):
        part.load_state_dict(state)
    train(resumed, again, 4, first=4, after_step=rates.step)
    assert same(weights(model), weights(resumed))


def test_parameters_frozen_by_the_user_stay_frozen():
    model = tiny_llama()
    model.model.embed_tokens.weight.requires_grad_(False)
    optimizer = gs.BlockOptimizer(model, gs.All(), lr=1e-2)
    assert "embedding" not in optimizer.blocks
    before = model.model.embed_tokens.weight.clone()
    train(model, optimizer, 2)
    assert torch.equal(before, model.model.embed_tokens.weight)
    assert optimizer.memory()["weights"] == sum(4 * p.numel() for p in model.parameters())


# Bad input ---------------------------------------------------------------------------------------------------------


def test_objects_are_told_from_classes_and_names():
    with pytest.raises(gs.UsageError, match=r"write policy=gs.AdaGradSelect"):
        gs.BlockOptimizer(tiny_llama(), policy="adagradselect")
    with pytest.raises(gs.UsageError, match=r"write residency=gs.Offload\(\)"):
        gs.BlockOptimizer(tiny_llama(), gs.All(), residency=gs.Offload)


def test_partition_that_leaves_something_out_is_refused():
    model = tiny_llama()
    with pytest.raises(gs.UsageError, match="is in no block"):
        gs.BlockOptimizer(model, gs.All(), blocks=gs.partition(model)[:2])
    with pytest.raises(gs.UsageError, match="no parameter of the model"):
        gs.BlockOptimizer(model, gs.All(), blocks=[*gs.partition(model), *gs.partition(tiny_llama())])


def test_blocks_that_train_always_are_not_for_the_policy_to_name():
    with pytest.raises(gs.UsageError, match="the policy does not select blocks in `always`"):
        gs.BlockOptimizer(tiny_llama(), gs.Fixed(("layer.0",)), always=("layer.0",))


def test_open_epoch_length_is_refused_before_anything_moves():
    model = tiny_llama()
    optimizer = gs.BlockOptimizer(model, gs.AdaGradSelect(fraction=0.4), lr=1e-2)
    before = weights(model)
    model(**tiny_batch(model, seed=0)).loss.backward()
    with pytest.raises(gs.UsageError, match=r"explore_steps=len\(loader\)"):
        optimizer.step()
    assert same(before, weights(model))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1.0}, "lr=-1.0"),
        ({"lr": float("nan")}, "lr=nan"),
        ({"eps": -1e-8}, "eps"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1"),
        ({"lr": "1e-3"}, "lr='1e-3' must be a finite number >= 0; write e.g. lr=0.001"),
        ({"weight_decay": None}, "weight_decay=None must be a finite number"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"betas": 0.9}, r"betas=0.9 must be two numbers"),
        ({"master_dtype": "float32"}, "master_dtype='float32' is no dtype object; write master_dtype=torch.float32"),
        ({"grad_scaler": True}, "grad_scaler=True is no GradScaler object"),
        ({"blocks": "matrix"}, r"blocks='matrix' is no Block object; write blocks=gs.partition\(model"),
        ({"accumulation_steps": 0}, "accumulation_steps=0"),
        ({"always": ("embeding",)}, "embedding"),
        ({"no_decay": ("*.bais",)}, r"no_decay='\*.bais' matches no parameter"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(gs.UsageError, match=message):
        gs.BlockOptimizer(tiny_llama(), gs.All(), **settings)


def test_unannounced_backward_passes_are_expected_from_the_next_step_on(caplog):
    """Contrastive losses with a gradient cache, and loops that accumulate, run several passes per step."""

    def records(**settings):
        model = tiny_llama()
        optimizer = gs.BlockOptimizer(model, gs.GradNormTopK(count=1), lr=0.0, **settings)
        for step in range(3):
            for part in range(3):
                model(**tiny_batch(model, seed=3 * step + part)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            yield optimizer.last_record

    announced, found = list(records(accumulation_steps=3)), list(records())
    assert caplog.text.count("accumulation_steps=<backward passes per step>") == 1
    assert found[0] != announced[0]
    assert [record.norms for record in found[1:]] == [record.norms for record in announced[1:]]


def test_sparse_gradients_are_refused():
    layers = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(2))
    model = torch.nn.Sequential(torch.nn.Embedding(8, 4, sparse=True), *layers)
    optimizer = gs.BlockOptimizer(model, gs.All(), lr=1e-2)
    model(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(gs.UsageError, match="sparse=False"):
        optimizer.step()
