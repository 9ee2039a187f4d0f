"""Both optimizers in a loop of Accelerate, as docs/frameworks.md writes it: accumulation, clipping, checkpoints."""

from __future__ import annotations

import math

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import set_seed
from tiny_models import tiny_batch, tiny_llama
from torch.utils.data import DataLoader

import gradselect as gs

WINDOW, EPOCHS, BATCHES = 2, 3, 5
STEPS = math.ceil(BATCHES / WINDOW)
"""Steps of an epoch; the last has a single micro-batch."""


@pytest.fixture(autouse=True)
def own_state():
    """Accelerate keeps precision and accumulation for the whole process."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def blocks(model):
    return gs.BlockOptimizer(model, gs.AdaGradSelect(fraction=0.4, explore_steps=STEPS), lr=1e-2)


def entries(model):
    return gs.SparseOptimizer(model, gs.ID3(density=0.05, steps=EPOCHS * STEPS), lr=1e-2, max_grad_norm=0.1)


def train(make, folder, *, precision="no", stop_at=None, resume=False):
    """Return the model, the records, and for each micro-batch the names of the weights that it moved."""
    set_seed(0)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=WINDOW, mixed_precision=precision)
    rows = [
        {name: value[0] for name, value in tiny_batch(tiny_llama(), seed=n, batch=1).items()} for n in range(BATCHES)
    ]
    model, loader = tiny_llama(), DataLoader(rows)
    optimizer = make(model)
    optimizer.count_passes_if(lambda: accelerator.sync_gradients)
    records, moved = [], []
    optimizer.add_record_hook(records.append)
    model, prepared, loader = accelerator.prepare(model, optimizer, loader)
    if resume:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        accelerator.load_state(str(folder))
    for _ in range(optimizer.num_steps // STEPS, EPOCHS):
        for batch in loader:
            before = {name: value.clone() for name, value in model.state_dict().items()}
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch).loss)
                if accelerator.sync_gradients and make is blocks:
                    accelerator.clip_grad_norm_(model.parameters(), 0.1)
                prepared.step()
                prepared.zero_grad()
            moved.append({name for name, value in model.state_dict().items() if not torch.equal(value, before[name])})
        if optimizer.num_steps == stop_at:
            accelerator.save_state(str(folder))
            break
    return model, records, moved


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("make", [blocks, entries])
def test_stopped_and_resumed_it_ends_bitwise_equal(make, precision, tmp_path):
    whole, records, _ = train(make, tmp_path, precision=precision)
    _, begun, _ = train(make, tmp_path, precision=precision, stop_at=STEPS)
    resumed, continued, _ = train(make, tmp_path, precision=precision, resume=True)
    assert begun + continued == records
    assert len(records) == EPOCHS * STEPS
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in whole.state_dict().items())


def test_exactly_the_recorded_blocks_move(tmp_path):
    _, records, moved = train(blocks, tmp_path)
    members = {block.name: set(block.parameter_names) for block in gs.partition(tiny_llama())}
    expected = [set().union(*(members[name] for name in record.selected)) for record in records]
    assert [names for names in moved if names] == expected
    assert [bool(names) for names in moved] == [False, True, False, True, True] * EPOCHS
    assert not any(record.explored for record in records[STEPS:])
