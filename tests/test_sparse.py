"""SparseOptimizer: properties that hold for every mask."""

from __future__ import annotations

import copy
import gc
import json

import pytest
import torch
from tiny_models import tiny_batch, tiny_llama
from torch.nn import functional

import gradselect as gs
from gradselect.entries import store as _entries
from gradselect.entries.store import EntryStore, index_dtype
from gradselect.reference import DenseID3

ENTRY_BYTES = 12
MASTER_BYTES = 4


def train(model, optimizer, steps, *, first=0):
    for step in range(first, first + steps):
        model(**tiny_batch(model, seed=step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def id3(**changes):
    return gs.ID3(**{"budget": 130, "steps": 8} | changes)


# The update --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("budget", "steps"), [(80, 8), (130, 8), (3, 8)])
@pytest.mark.parametrize("exponent", [0.0, 1.0, -0.5])
def test_equals_the_dense_twin(budget, steps, exponent):
    """Same entries at every step; values to rounding, as the twin writes the formula out in another order."""
    ours, theirs = tiny_llama(), tiny_llama()
    mask = gs.ID3(budget=budget, steps=steps, exponent=exponent, eps=0.1)
    optimizer = gs.SparseOptimizer(ours, mask, lr=1e-2, weight_decay=0.5)
    twin = DenseID3(
        dict(theirs.named_parameters()),
        budget=budget,
        steps=steps,
        exponent=exponent,
        eps=0.1,
        lr=1e-2,
        weight_decay=0.5,
    )
    for step in range(11):
        train(ours, optimizer, 1, first=step)
        theirs(**tiny_batch(theirs, seed=step)).loss.backward()
        twin.step()
        theirs.zero_grad()
        expected = {name: chosen.flatten().nonzero().flatten() for name, chosen in twin.masks.items() if chosen.any()}
        assert same(optimizer.entries, expected)
    for name, weight in weights(ours).items():
        torch.testing.assert_close(weight, theirs.get_parameter(name).detach(), rtol=1e-4, atol=1e-6)


def test_clipping_is_torchs_over_what_is_applied():
    ours, theirs = tiny_llama(), tiny_llama()
    optimizer = gs.SparseOptimizer(ours, gs.StaticMask(density=1.0), lr=1e-2, weight_decay=0.0, max_grad_norm=0.1)
    twin = torch.optim.AdamW(theirs.parameters(), lr=1e-2, weight_decay=0.0, foreach=False)
    for step in range(4):
        train(ours, optimizer, 1, first=step)
        theirs(**tiny_batch(theirs, seed=step)).loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.1)
        assert optimizer.last_record.grad_norm == pytest.approx(float(norm), rel=1e-5)
        twin.step()
        twin.zero_grad()
    for name, weight in weights(ours).items():
        torch.testing.assert_close(weight, theirs.get_parameter(name).detach(), rtol=1e-4, atol=1e-6)


def test_whole_tensors_train_as_with_adamw_beside_the_mask():
    ours, theirs = tiny_llama(), tiny_llama()
    optimizer = gs.SparseOptimizer(ours, id3(), always="model.norm.weight", lr=1e-2)
    before = weights(ours)
    train(ours, optimizer, 1)
    norm = theirs.get_parameter("model.norm.weight")
    theirs(**tiny_batch(theirs, seed=0)).loss.backward()
    torch.optim.AdamW([norm], lr=1e-2, weight_decay=0.0, foreach=False).step()
    assert torch.equal(weights(ours)["model.norm.weight"], norm)
    assert not torch.equal(norm, before["model.norm.weight"])
    assert "model.norm.weight" not in optimizer.entries


@pytest.mark.parametrize("mask", [id3(), gs.GMT()])
def test_a_double_precision_model_trains_with_double_precision_state(mask):
    model = tiny_llama(dtype=torch.float64)
    optimizer = gs.SparseOptimizer(model, mask, always="model.norm.weight", max_grad_norm=1.0)
    before = weights(model)
    train(model, optimizer, 2)
    assert not same(weights(model), before)
    assert all(state["exp_avg"].dtype == torch.float64 for state in optimizer.state_dict()["state"].values())


def test_a_scheduler_and_a_closure_work():
    model = tiny_llama()
    optimizer = gs.SparseOptimizer(model, id3(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.5, total_iters=4)

    def closure():
        loss = model(**tiny_batch(model, seed=0)).loss
        loss.backward()
        return loss.detach()

    losses = []
    for _ in range(12):
        losses.append(float(optimizer.step(closure)))
        optimizer.zero_grad()
        scheduler.step()
    assert losses[-1] < losses[0]
    assert optimizer.param_groups[0]["lr"] == 1e-2


def test_a_step_without_gradients_counts_for_nothing():
    model = tiny_llama()
    optimizer = gs.SparseOptimizer(model, id3())
    optimizer.step()
    assert optimizer.num_steps == 0
    assert optimizer.last_record is None
    assert not optimizer.entries


# Memory ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "bytes_each"), [(torch.float32, 12), (torch.bfloat16, 16)])
def test_state_grows_with_the_budget_and_not_with_the_model(dtype, bytes_each):
    """Beside the entries' bytes only one bit for each tensor and update is held."""
    for layers in (2, 6):
        model = tiny_llama(layers=layers, dtype=dtype)
        optimizer = gs.SparseOptimizer(model, id3(budget=640, steps=16))
        train(model, optimizer, 16)
        memory = optimizer.memory()
        assert sum(map(len, optimizer.entries.values())) == 640
        state_bytes = memory["masters"] + memory["state_on_device"]
        assert 0 <= state_bytes - 640 * bytes_each <= len(optimizer.mask.names) * 16 / 8
        assert optimizer.last_record.state_bytes == state_bytes
        assert memory["gradients"] == 0
        model(**tiny_batch(model, seed=0)).loss.backward()
        assert optimizer.memory()["gradients"] == 640 * 4
        assert len(optimizer.state) == 0


def tensors_alive():
    return [thing for thing in gc.get_objects() if type(thing) is torch.Tensor]


def test_tensors_alive_after_a_step_are_the_models_and_the_state():
    """No other tensor of the model's size exists: counts every tensor that the interpreter knows."""
    model = tiny_llama()
    gc.collect()
    before = {id(thing) for thing in tensors_alive()}
    optimizer = gs.SparseOptimizer(model, id3(budget=64, steps=4))
    train(model, optimizer, 4)
    gc.collect()
    new = [tensor for tensor in tensors_alive() if id(tensor) not in before]
    corrections = 2 * 8 * 200  # of the bias corrections by age, float64
    assert sum(tensor.nbytes for tensor in new) <= 64 * ENTRY_BYTES * 3 + corrections


@pytest.mark.parametrize("accumulation", [False, True])
def test_one_whole_gradient_is_alive_at_a_time(accumulation):
    """Checked each time a gradient is complete: small ones may wait, up to a quarter of the largest together."""
    model = tiny_llama()
    most = []
    for parameter in model.parameters():  # before the optimizer's own hooks, which free what they see
        parameter.register_post_accumulate_grad_hook(lambda _: most.append(optimizer.memory()["gradients"]))
    optimizer = gs.SparseOptimizer(
        model, id3(), accumulation_steps=2 if accumulation else 1, lean_accumulation=accumulation
    )
    largest = max(parameter.nbytes for parameter in model.parameters())
    for step in range(3):
        for _ in range(1 + accumulation):
            model(**tiny_batch(model, seed=step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    of_entries = 130 * 4
    assert largest <= max(most) <= largest * 5 // 4 + of_entries


def test_a_dense_mask_leaves_nothing_but_moments_behind():
    """The record of the first step has the moments that were made in it; masks, a byte a weight, are gone."""
    model = tiny_llama()
    optimizer = gs.SparseOptimizer(model, gs.GMT())
    num_weights = sum(parameter.numel() for parameter in model.parameters())
    gc.collect()
    before = {id(thing) for thing in tensors_alive()}
    train(model, optimizer, 1)
    gc.collect()
    new = [tensor for tensor in tensors_alive() if id(tensor) not in before]
    assert optimizer.last_record.state_bytes == 8 * num_weights
    assert sum(tensor.nbytes for tensor in new) <= 8 * num_weights + 4 * len(optimizer.mask.names)


def test_memory_counts_masters_apart():
    model = tiny_llama(dtype=torch.bfloat16)
    optimizer = gs.SparseOptimizer(model, id3(budget=64, steps=1))
    train(model, optimizer, 1)
    assert optimizer.memory()["masters"] == 64 * MASTER_BYTES
    without = gs.SparseOptimizer(tiny_llama(dtype=torch.bfloat16), id3(budget=64, steps=1), master_dtype=None)
    assert without.memory()["masters"] == 0


def test_indices_of_large_tensors_are_wide():
    assert index_dtype(2**31) == torch.int32
    assert index_dtype(2**31 + 1) == torch.int64


# Gradient accumulation ---------------------------------------------------------------------------------------------


def halves(model, seed):
    batch = tiny_batch(model, seed=seed)
    return [{key: value[rows] for key, value in batch.items()} for rows in (slice(0, 1), slice(1, 2))]


def accumulate(model, optimizer, steps):
    for step in range(steps):
        for half in halves(model, step):
            (model(**half).loss / 2).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_exact_accumulation_equals_gradients_that_were_summed_before():
    ours, theirs = tiny_llama(), tiny_llama()
    optimizer = gs.SparseOptimizer(ours, id3(), lr=1e-2, accumulation_steps=2)
    twin = gs.SparseOptimizer(theirs, id3(), lr=1e-2)
    accumulate(ours, optimizer, 6)
    for step in range(6):
        sum(theirs(**half).loss / 2 for half in halves(theirs, step)).backward()
        twin.step()
        twin.zero_grad()
    assert same(optimizer.entries, twin.entries)
    for name, weight in weights(ours).items():
        torch.testing.assert_close(weight, weights(theirs)[name], rtol=1e-5, atol=1e-6)


def test_lean_accumulation_sums_exactly_for_entries_chosen_before():
    """The mask is random, so gradients select nothing; sums have the same terms in the same order."""
    mask = gs.StaticMask(salience=gs.salience.random, density=0.3)
    exact, lean = tiny_llama(), tiny_llama()
    accumulate(exact, gs.SparseOptimizer(exact, mask, lr=1e-2, accumulation_steps=2), 4)
    accumulate(lean, gs.SparseOptimizer(lean, mask, lr=1e-2, accumulation_steps=2, lean_accumulation=True), 4)
    assert same(weights(exact), weights(lean))


def test_lean_accumulation_keeps_the_budget():
    model = tiny_llama()
    optimizer = gs.SparseOptimizer(model, id3(), accumulation_steps=2, lean_accumulation=True)
    accumulate(model, optimizer, 9)
    assert sum(map(len, optimizer.entries.values())) == 130


def test_a_window_may_end_early():
    ours, theirs = tiny_llama(), tiny_llama()
    train(ours, gs.SparseOptimizer(ours, id3(), lr=1e-2, accumulation_steps=3), 3)
    train(theirs, gs.SparseOptimizer(theirs, id3(), lr=1e-2), 3)
    assert same(weights(ours), weights(theirs))


def test_no_entry_is_selected_by_a_part_of_a_step_whose_passes_nobody_announced(caplog):
    """It would be trained for the whole run, because of the first of several passes; the next step knows better."""

    def entries(**settings):
        model = tiny_llama()
        optimizer = gs.SparseOptimizer(model, id3(), **settings)
        for step in range(3):
            for part in range(3):
                model(**tiny_batch(model, seed=3 * step + part)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            yield optimizer.last_record.num_new, optimizer.last_record.grad_norm

    announced, found = list(entries(accumulation_steps=3)), list(entries())
    assert [new for new, _ in announced] == [17, 17, 16]
    assert [new for new, _ in found] == [0, 34, 16]
    assert found[2][1] > 0
    assert caplog.text.count("accumulation_steps=<backward passes per step>") == 1


def test_several_passes_select_the_entries_of_their_sum():
    """Of the only step that selects, whatever the number of passes before it."""

    def entries(num_first, **settings):
        model = tiny_llama()
        optimizer = gs.SparseOptimizer(model, gs.StaticMask(budget=50), lr=0.0, **settings)
        for num_passes in (num_first, 3):
            for part in range(num_passes):
                model(**tiny_batch(model, seed=part)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return {name: indices.tolist() for name, indices in optimizer.entries.items()}

    announced = entries(3, accumulation_steps=3)
    assert entries(3) == entries(4) == announced


def test_a_step_of_zero_gradients_selects_nothing(caplog):
    """A reward that is the same for all completions, as often at the start, says nothing about entries."""
    model = tiny_llama()
    optimizer = gs.SparseOptimizer(model, gs.StaticMask(budget=50), lr=1e-3)
    for scale in (0.0, 0.0, 1.0):
        (scale * model(**tiny_batch(model, seed=0)).loss).backward()
        optimizer.step()
        optimizer.zero_grad()
    twin = gs.SparseOptimizer(other := tiny_llama(), gs.StaticMask(budget=50), lr=1e-3)
    other(**tiny_batch(other, seed=0)).loss.backward()
    twin.step()
    assert {name: found.tolist() for name, found in optimizer.entries.items()} == {
        name: found.tolist() for name, found in twin.entries.items()
    }
    assert caplog.text.count("all its gradients are zero") == 1
    assert optimizer.num_steps == 3


@pytest.mark.parametrize("lean", [False, True])
def test_no_entry_joins_twice_in_an_unannounced_pass(lean):
    layer = torch.nn.Linear(4, 1, bias=False)
    optimizer = gs.SparseOptimizer(layer, id3(budget=4, steps=1), lean_accumulation=lean)
    for _ in range(2):
        layer(torch.ones(1, 4)).sum().backward()
        layer(torch.ones(1, 4)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.entries["weight"].tolist() == [0, 1, 2, 3]


# Which tensors -----------------------------------------------------------------------------------------------------


def test_what_cannot_train_is_frozen_until_the_optimizer_is_closed():
    model = tiny_llama()
    mask = gs.StaticMask(salience=gs.salience.magnitude, budget=3, among=("*q_proj*",))
    optimizer = gs.SparseOptimizer(model, mask)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == set(optimizer.entries)
    train(model, optimizer, 2)
    optimizer.close()
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_tensor_whose_share_of_the_choice_is_nothing_is_frozen_from_the_start():
    model = torch.nn.Sequential(torch.nn.Linear(40, 40), torch.nn.Linear(40, 2))
    optimizer = gs.SparseOptimizer(model, gs.StaticMask(budget=4, scope="tensor"))
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    model(torch.ones(1, 40)).sum().backward()
    optimizer.step()
    assert trainable == set(optimizer.entries) == {"0.weight"}


def test_dropping_the_optimizer_gives_the_model_back():
    model = tiny_llama()
    optimizer = gs.SparseOptimizer(model, id3(among=("*q_proj*",)))
    assert not model.model.norm.weight.requires_grad
    del optimizer
    gc.collect()
    assert model.model.norm.weight.requires_grad
    train(model, gs.SparseOptimizer(model, id3()), 2)


def test_when_id3_has_spent_its_budget_tensors_without_entries_are_frozen():
    model = tiny_llama()
    optimizer = gs.SparseOptimizer(model, id3(budget=4, steps=2))
    train(model, optimizer, 2)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == set(optimizer.entries)
    before = optimizer.entries
    train(model, optimizer, 2, first=2)
    assert same(optimizer.entries, before)


def test_an_older_optimizer_falls_silent():
    model = tiny_llama()
    older = gs.SparseOptimizer(model, id3())
    newer = gs.SparseOptimizer(model, id3())
    train(model, newer, 2)
    model(**tiny_batch(model, seed=0)).loss.backward()
    with pytest.raises(gs.UsageError, match="newer optimizer"):
        older.step()


def test_a_tensor_without_gradient_neither_moves_nor_ages():
    """Bias correction counts the updates of a tensor: one that joins the graph late is updated as if it began then."""

    def two():
        return torch.nn.ModuleDict({name: torch.nn.Linear(4, 4, bias=False) for name in ("used", "late")})

    torch.manual_seed(0)
    model = two()
    twin = copy.deepcopy(model)
    everything = gs.StaticMask(salience=gs.salience.random, density=1.0)
    optimizer = gs.SparseOptimizer(model, everything, lr=1e-2, weight_decay=0.1)
    before = model["late"].weight.detach().clone()
    for _ in range(3):
        model["used"](torch.ones(1, 4)).sum().backward()
        optimizer.step()
    assert torch.equal(model["late"].weight, before)
    model["late"](torch.ones(1, 4)).sum().backward()
    optimizer.step()
    twin["late"](torch.ones(1, 4)).sum().backward()
    torch.optim.AdamW(twin["late"].parameters(), lr=1e-2, weight_decay=0.1, foreach=False).step()
    assert torch.equal(model["late"].weight, twin["late"].weight)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_only_adapter_weights_of_a_peft_model_are_masked():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_llama(), peft.LoraConfig(r=4, target_modules="all-linear"))
    before = weights(model)
    optimizer = gs.SparseOptimizer(model, id3(budget=20, steps=4), lr=1e-2)
    train(model, optimizer, 4)
    assert all("lora_" in name for name in optimizer.mask.names)
    moved = {name for name, weight in weights(model).items() if not torch.equal(weight, before[name])}
    assert moved
    assert moved <= set(optimizer.entries)


def test_newcomers_and_overlap_are_reported(tmp_path):
    model = tiny_llama()
    optimizer = gs.SparseOptimizer(model, gs.TopGradient(density=0.1), lr=1e-2)
    optimizer.add_record_hook(gs.JsonlWriter(tmp_path / "records.jsonl"))
    sets = []
    for step in range(4):
        train(model, optimizer, 1, first=step)
        sets.append({(name, index) for name, indices in optimizer.entries.items() for index in indices.tolist()})
        record = optimizer.last_record
        assert sum(record.num_entries.values()) == len(sets[-1])
        if step:
            kept = len(sets[-1] & sets[-2])
            assert record.num_new == len(sets[-1]) - kept
            assert record.overlap == pytest.approx(kept / len(sets[-2]))
    lines = (tmp_path / "records.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2, 3]


# The store ---------------------------------------------------------------------------------------------------------


def test_survivors_keep_moments_and_age_through_any_changes():
    """Against plain dictionaries: entries join and leave at random, tensors miss gradients at random."""
    generator = torch.Generator().manual_seed(0)

    def draw(high):
        return int(torch.randint(high, (), generator=generator))

    sizes = {"a": 40, "b": 1, "c": 70}
    parameters = {name: torch.nn.Parameter(torch.zeros(size)) for name, size in sizes.items()}
    store = EntryStore(parameters, rule=gs.AdamWRule(), master_dtype=None)
    group = {"lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
    ages = {name: {} for name in sizes}
    means = {name: {} for name in sizes}
    for _ in range(60):
        for name, size in sizes.items():
            present = store.indices(name).tolist()
            kept = torch.tensor([draw(4) > 0 for _ in present], dtype=torch.bool)
            store.keep({name: kept})
            for index, stays in zip(present, kept.tolist(), strict=True):
                if not stays:
                    del ages[name][index], means[name][index]
            fresh = sorted({draw(size) for _ in range(draw(4))} - set(ages[name]))
            store.add({name: (torch.tensor(fresh, dtype=torch.int64), None)})
            ages[name] |= dict.fromkeys(fresh, 0)
            means[name] |= dict.fromkeys(fresh, 0.0)
        for name, size in sizes.items():
            if draw(3):
                gradient = torch.randn(size, generator=generator)
                store.read(name, gradient)
                for index in ages[name]:
                    ages[name][index] += 1
                    means[name][index] = 0.9 * means[name][index] + 0.1 * float(gradient[index])
        store.update(group)
        for name in sizes:
            state = store.state(name)
            assert sorted(state["indices"].tolist()) == sorted(ages[name])
            assert state["joined_at"].dtype == torch.int32
            age = (state["num_updates"] - state["joined_at"]).tolist()
            assert dict(zip(state["indices"].tolist(), age, strict=True)) == ages[name]
            for index, mean in zip(state["indices"].tolist(), state["exp_avg"].tolist(), strict=True):
                assert mean == pytest.approx(means[name][index], abs=1e-6)
        again = EntryStore(parameters, rule=gs.AdamWRule(), master_dtype=None)
        again.load({name: store.state(name) for name in sizes})
        assert all(same(again.state(name), store.state(name)) for name in sizes)


def test_the_store_goes_along_with_a_model_that_moves_to_another_device():
    """The meta device, the only other one that is always there; tests/test_cuda.py moves a model to a GPU."""
    parameters = {name: torch.nn.Parameter(torch.zeros(8, dtype=torch.bfloat16)) for name in "ab"}
    store = EntryStore(parameters, rule=gs.AdamWRule(), master_dtype=torch.float32)
    store.add({name: (torch.tensor([1, 5]), None) for name in "ab"})
    store.parameters = {name: torch.nn.Parameter(weight.detach().to("meta")) for name, weight in parameters.items()}
    store.read("a", torch.zeros(8, device="meta"))
    held = [store._indices, store._gradients, store._cohorts._joined, *store._arrays.values()]
    assert {tensor.device.type for tensor in held} == {"meta"}
    store.restart()
    store.parameters["b"] = parameters["b"]
    with pytest.raises(gs.UsageError, match=r"moved to several devices \(cpu, meta\) .* build the Sparse"):
        store.read("a", torch.zeros(8, device="meta"))


def widened(model, optimizer):
    model.float()
    return model, optimizer


def loaded_wider(model, optimizer):
    wider = tiny_llama()
    wider.load_state_dict(model.state_dict())
    again = gs.SparseOptimizer(wider, gs.StaticMask(density=0.2), lr=1e-4)
    again.load_state_dict(optimizer.state_dict())
    return wider, again


@pytest.mark.parametrize("widen", [widened, loaded_wider])
def test_weights_that_are_half_precision_no_longer_have_no_masters(widen):
    """As of a BlockOptimizer. Masters were rounded to the weights, and stayed."""
    model = tiny_llama(dtype=torch.bfloat16)
    optimizer = gs.SparseOptimizer(model, gs.StaticMask(density=0.2), lr=1e-4)
    train(model, optimizer, 3)
    numbers = {name: number for number, (name, _) in enumerate(optimizer._table.named())}
    saved = optimizer.state_dict()["state"]
    masters = {name: saved[numbers[name]]["master"] for name in optimizer.entries}
    places = {name: saved[numbers[name]]["indices"].long() for name in masters}
    model, optimizer = widen(model, optimizer)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    train(model, optimizer, 1)
    found = {name: weights(model)[name].view(-1)[places[name]] for name in masters}
    assert same(found, masters), "the digits that bf16 cannot hold are kept"
    assert optimizer.memory()["masters"] == 0
    again = gs.SparseOptimizer(model, gs.StaticMask(density=0.2), lr=1e-4)
    again.load_state_dict(optimizer.state_dict())


def test_how_many_entries_are_updated_together_changes_nothing(monkeypatch):
    """Entries of several ages, some in tensors without a gradient, as after changes of the set."""
    stepped = []
    for run in (1, 64, 1 << 22):
        monkeypatch.setattr(_entries, "RUN", run)
        model = tiny_llama(dtype=torch.bfloat16)
        train(model, gs.SparseOptimizer(model, gs.TopGradient(density=0.2), lr=1e-2), 5)
        stepped.append(weights(model))
    assert same(stepped[0], stepped[1])
    assert same(stepped[0], stepped[2])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_masters_and_moments_have_the_dtype_that_is_asked_for(dtype):
    """For selected entries and for tensors that train whole."""
    model = tiny_llama(dtype=torch.bfloat16)
    optimizer = gs.SparseOptimizer(model, id3(), always="model.norm.weight", master_dtype=dtype)
    train(model, optimizer, 2)
    for state in optimizer.state_dict()["state"].values():
        assert all(state[key].dtype == dtype for key in ("exp_avg", "exp_avg_sq", "master"))


# Errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1.0}, "lr=-1.0"),
        ({"max_grad_norm": 0.0}, "max_grad_norm=0.0"),
        ({"accumulation_steps": 0}, "accumulation_steps=0"),
        ({"accumulation_steps": 1.5}, "accumulation_steps=1.5"),
        ({"always": "nothing.*"}, "always='nothing.*'"),
        ({"no_decay": "nothing.*"}, "matches no parameter"),
        ({"mask": gs.AdaGradSelect(fraction=0.2)}, "mask="),
        ({"mask": id3(budget=10**9)}, "budget=1,000,000,000 is more than"),
        ({"mask": id3(among=("*q_porj*",))}, "q_proj"),
        ({"mask": id3(), "always": "*"}, "no tensor"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    model = tiny_llama()
    with pytest.raises(gs.UsageError, match=message.replace("*", r"\*")):
        gs.SparseOptimizer(model, **{"mask": id3()} | settings)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_mask_on_a_frozen_or_quantised_tensor_is_refused():
    model = tiny_llama()
    model.model.norm.weight.requires_grad_(False)
    with pytest.raises(gs.UsageError, match="frozen or quantised"):
        gs.SparseOptimizer(model, id3(among=("model.norm.weight",)))
    with pytest.raises(gs.UsageError, match="one in always trains whole"):
        gs.SparseOptimizer(model, id3(among=("*embed_tokens*",)), always="*embed_tokens*")
    model.requires_grad_(False)
    with pytest.raises(gs.UsageError, match="requires a gradient"):
        gs.SparseOptimizer(model, id3())


def test_a_sparse_gradient_is_refused():
    embedding = torch.nn.Embedding(8, 4, sparse=True)
    optimizer = gs.SparseOptimizer(embedding, id3(budget=4, steps=1))
    with pytest.raises(gs.UsageError, match="sparse gradients"):
        embedding(torch.tensor([1])).sum().backward()
    assert optimizer.num_steps == 0


@pytest.mark.parametrize("is_unscaled", [False, True])
@pytest.mark.parametrize("mask", [id3(budget=4, steps=1), gs.GMT()], ids=["compact", "dense"])
def test_a_gradient_scaler_is_refused(mask, is_unscaled):
    """After `unscale_`, which found no gradients, steps were taken with scaled ones."""
    model = torch.nn.Linear(4, 4)
    optimizer = gs.SparseOptimizer(model, mask)
    scaler = torch.amp.GradScaler("cpu", enabled=True)
    scaler.scale(functional.mse_loss(model(torch.ones(1, 4)), torch.zeros(1, 4))).backward()
    if is_unscaled:
        scaler.unscale_(optimizer)
    with pytest.raises(gs.UsageError, match="bfloat16"):
        scaler.step(optimizer)
    assert optimizer.num_steps == 0
    optimizer.zero_grad()
    functional.mse_loss(model(torch.ones(1, 4)), torch.zeros(1, 4)).backward()
    optimizer.step()
    assert optimizer.num_steps == 1


def test_a_tensor_that_is_not_contiguous_is_refused():
    model = torch.nn.Linear(4, 6, bias=False)
    model.weight = torch.nn.Parameter(torch.zeros(4, 6).t())
    with pytest.raises(gs.UsageError, match="contiguous"):
        gs.SparseOptimizer(model, id3(budget=4, steps=1))


def test_checkpoints_of_others_are_refused():
    ours = gs.SparseOptimizer(tiny_llama(), id3())
    with pytest.raises(gs.UsageError, match="not written by SparseOptimizer"):
        ours.load_state_dict(gs.BlockOptimizer(tiny_llama(), gs.All()).state_dict())
    with pytest.raises(gs.UsageError, match="mask settings"):
        ours.load_state_dict(gs.SparseOptimizer(tiny_llama(), id3(eps=0.2)).state_dict())
    with pytest.raises(gs.UsageError, match="mask"):
        ours.load_state_dict(gs.SparseOptimizer(tiny_llama(), gs.TopGradient(density=0.1)).state_dict())
    with pytest.raises(gs.UsageError, match="tensors"):
        ours.load_state_dict(gs.SparseOptimizer(tiny_llama(layers=2), id3()).state_dict())


@pytest.mark.parametrize("mask", [id3(), gs.GMT()])
def test_checkpoints_with_and_without_masters_are_not_mixed(mask):
    with_masters = gs.SparseOptimizer(tiny_llama(dtype=torch.bfloat16), mask)
    without = gs.SparseOptimizer(tiny_llama(dtype=torch.bfloat16), mask, master_dtype=None)
    with pytest.raises(gs.UsageError, match="master values"):
        with_masters.load_state_dict(without.state_dict())
    with pytest.raises(gs.UsageError, match="master values"):
        without.load_state_dict(with_masters.state_dict())


def test_it_cannot_be_copied_or_widened():
    optimizer = gs.SparseOptimizer(tiny_llama(), id3())
    with pytest.raises(gs.UsageError, match="copied or pickled"):
        copy.deepcopy(optimizer)
    with pytest.raises(gs.UsageError, match="fixed"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))]})
