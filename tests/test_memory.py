"""Freed means freed: bytes by category, exact, for each residency; and the FLOPs that freezing saves."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_batch, tiny_llama
from torch.utils.flop_counter import FlopCounterMode

import gradselect as gs


def elements(model):
    return {block.name: block.num_elements for block in gs.partition(model)}


def run(model, optimizer, steps):
    records = []
    optimizer.add_record_hook(records.append)
    for step in range(steps):
        model(**tiny_batch(model, seed=step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return records


def cyclic(model, **settings):
    return gs.BlockOptimizer(model, gs.Cyclic(every=2, order="ascending"), lr=1e-2, **settings)


@pytest.mark.parametrize(("dtype", "moments", "master"), [(torch.float32, 8, 0), (torch.bfloat16, 8, 4)])
class TestStateBytes:
    """Run cyclic for five steps, two per block: two blocks were selected before, the third is selected now."""

    def test_keep(self, dtype, moments, master):
        model = tiny_llama(dtype=dtype)
        optimizer = cyclic(model, residency=gs.Keep())
        records = run(model, optimizer, 5)
        touched = sum(list(elements(model).values())[:3])
        memory = optimizer.memory()
        assert memory["state_on_device"] == moments * touched
        assert memory["masters"] == master * touched
        assert memory["state_on_host"] == 0
        assert records[-1].state_bytes == (moments + master) * touched
        assert all(record.moved_bytes == 0 for record in records)

    def test_offload(self, dtype, moments, master):
        model = tiny_llama(dtype=dtype)
        optimizer = cyclic(model, residency=gs.Offload())
        records = run(model, optimizer, 5)
        first, second, third = list(elements(model).values())[:3]
        memory = optimizer.memory()
        assert memory["state_on_device"] == moments * third
        assert memory["masters"] == master * third
        assert memory["state_on_host"] == (moments + master) * (first + second)
        assert [record.state_bytes // (moments + master) for record in records] == [first, first, second, second, third]
        assert [record.moved_bytes // (moments + master) for record in records] == [0, 0, first, 0, second]

    def test_offload_brings_state_back(self, dtype, moments, master):
        model = tiny_llama(dtype=dtype)
        optimizer = gs.BlockOptimizer(model, gs.Cyclic(every=1, order="ascending"), lr=1e-2, residency=gs.Offload())
        records = run(model, optimizer, 2 * len(optimizer.blocks))
        sizes = list(elements(model).values())
        second_round = [record.moved_bytes // (moments + master) for record in records[len(sizes) :]]
        left = [sizes[-1], *sizes[:-1]]
        assert second_round == [out + back for out, back in zip(left, sizes, strict=True)]

    def test_drop(self, dtype, moments, master):
        model = tiny_llama(dtype=dtype)
        optimizer = cyclic(model, residency=gs.Drop())
        records = run(model, optimizer, 5)
        third = list(elements(model).values())[2]
        memory = optimizer.memory()
        assert memory["state_on_device"] == moments * third
        assert memory["masters"] == master * third
        assert memory["state_on_host"] == 0
        assert len(optimizer.state) == sum(len(b.parameters) for b in gs.partition(model) if b.name == "layer.1")
        assert all(record.moved_bytes == 0 for record in records)


@pytest.mark.parametrize("residency", [gs.Offload(), gs.Drop()])
def test_state_has_left_the_device_before_the_next_forward(residency):
    model = tiny_llama()
    optimizer = gs.BlockOptimizer(model, gs.Cyclic(every=1), lr=1e-2, residency=residency)
    run(model, optimizer, 1)
    assert optimizer.memory()["state_on_device"] == 0


def test_state_of_the_next_selection_is_on_the_device_before_its_forward():
    """Blocks that were selected before come back; one that is selected again does not move."""
    model = tiny_llama(layers=2)
    optimizer = gs.BlockOptimizer(model, gs.Cyclic(every=1, order="ascending"), lr=1e-2, residency=gs.Offload())
    sizes = list(elements(model).values())
    run(model, optimizer, len(sizes))
    assert optimizer.memory()["state_on_device"] == 8 * sizes[0]
    assert optimizer.memory()["state_on_host"] == 8 * sum(sizes[1:])
    fixed = gs.BlockOptimizer(model, gs.Fixed(("layer.1",)), lr=1e-2, residency=gs.Offload())
    assert all(record.moved_bytes == 0 for record in run(model, fixed, 3))
    assert fixed.memory()["state_on_device"] == 8 * elements(model)["layer.1"]


def test_newly_frozen_block_holds_no_gradient_even_without_zero_grad():
    model = tiny_llama()
    optimizer = gs.BlockOptimizer(model, gs.Cyclic(every=1), lr=1e-2)
    model(**tiny_batch(model, seed=0)).loss.backward()
    optimizer.step()
    assert optimizer.memory()["gradients"] == 0


def test_gradients_of_unselected_blocks_are_released_even_if_the_user_thawed_them():
    model = tiny_llama()
    optimizer = gs.BlockOptimizer(model, gs.Fixed(("layer.1",)), lr=1e-2)
    model.requires_grad_(True)
    model(**tiny_batch(model, seed=0)).loss.backward()
    optimizer.step()
    assert optimizer.memory()["gradients"] == 4 * elements(model)["layer.1"]
    assert [n for n, p in model.named_parameters() if p.requires_grad and "layers.1." not in n] == []


def test_bytes_equal_the_tensors_that_exist():
    """`memory()` only counts, so compare it with the tensors."""
    model = tiny_llama(dtype=torch.bfloat16)
    optimizer = gs.BlockOptimizer(model, gs.GradNormTopK(count=2), lr=1e-2, residency=gs.Drop())
    run(model, optimizer, 4)
    tensors = [t for state in optimizer.state.values() for name, t in state.items() if name != "step"]
    memory = optimizer.memory()
    assert memory["masters"] + memory["state_on_device"] == sum(t.numel() * t.element_size() for t in tensors)
    assert memory["weights"] == sum(p.numel() * p.element_size() for p in model.parameters())


def test_state_of_an_unselected_block_is_the_users_choice():
    """Kept and offloaded moments continue; dropped ones start again at step 1."""
    counters = {}
    for residency in (gs.Keep(), gs.Offload(), gs.Drop()):
        model = tiny_llama(layers=2)
        optimizer = cyclic(model, residency=residency)
        run(model, optimizer, 2 * len(optimizer.blocks) + 1)
        counters[type(residency)] = optimizer.state[model.model.embed_tokens.weight]["step"].item()
    assert counters == {gs.Keep: 3.0, gs.Offload: 3.0, gs.Drop: 1.0}


def flops_of_backward(model):
    loss = model(**tiny_batch(model, seed=0)).loss
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    return counter.get_total_flops()


def saved_bytes(model):
    """Bytes of distinct activations that autograd keeps for the backward pass."""
    storages = {}

    def pack(tensor):
        if not isinstance(tensor, torch.nn.Parameter):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**tiny_batch(model, seed=0))
    return sum(storages.values())


def test_exploit_steps_compute_no_weight_gradient_of_frozen_blocks_and_nothing_below():
    model = tiny_llama(layers=4)
    full = flops_of_backward(model)
    model.zero_grad()

    def frozen_but(*names):
        optimizer = gs.BlockOptimizer(model, gs.Fixed(names))
        flops = flops_of_backward(model)
        gradients = {name for name, p in model.named_parameters() if p.grad is not None}
        optimizer.zero_grad()
        optimizer.close()
        members = {b.name: set(b.parameter_names) for b in gs.partition(model)}
        assert gradients == set().union(*(members[name] for name in names))
        return flops

    head, layers = frozen_but("head"), [frozen_but(f"layer.{i}") for i in range(4)]
    # Each layer lower adds one layer's backward through activations and nothing else: the steps are equal.
    through_one_layer = layers[2] - layers[3]
    assert through_one_layer > 0
    assert layers[1] - layers[2] == layers[0] - layers[1] == through_one_layer
    # Only weight gradients are missing when the lowest layer trains: of the three other layers, and of the head. The
    # head alone is one weight gradient and nothing else.
    weights_of_three_layers = full - frozen_but("layer.0", "head")
    assert full - layers[0] == weights_of_three_layers + head
    assert layers[3] - head < 0.35 * full


def test_nothing_is_saved_for_the_backward_pass_below_the_lowest_selected_block():
    model = tiny_llama(layers=4)
    bytes_by_lowest = []
    for lowest in range(4):
        optimizer = gs.BlockOptimizer(model, gs.Fixed((f"layer.{lowest}",)))
        bytes_by_lowest.append(saved_bytes(model))
        optimizer.close()
    drops = [higher - lower for lower, higher in zip(bytes_by_lowest[1:], bytes_by_lowest[:-1], strict=True)]
    assert all(drop > 0 for drop in drops)
    assert bytes_by_lowest[3] < 0.6 * saved_bytes(model)


def test_weights_outside_the_mask_are_counted_as_they_are_now():
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    optimizer = gs.SparseOptimizer(model, gs.BitFit())
    model[1].weight.data = model[1].weight.data.bfloat16()
    assert optimizer.memory()["weights"] == (64 + 8) * 4 + 64 * 2 + 8 * 4
