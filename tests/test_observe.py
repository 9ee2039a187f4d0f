"""Norms measured during the backward pass, and gradients freed when they cannot win."""

from __future__ import annotations

import gc
import json
import weakref

import pytest
import torch
from policy_support import Measured
from tiny_models import tiny_batch, tiny_llama, tiny_mixtral
from torch import nn

import gradselect as gs
from gradselect.blocks.observer import GradientObserver
from gradselect.core import gradients
from gradselect.core.freezing import Ownership
from gradselect.core.gradients import gradient_norm
from gradselect.reference import SelectiveAdamW, block_norms, top_blocks


def backward(model, *, seed=0):
    model(**tiny_batch(model, seed=seed)).loss.backward()


class IdleLayer(nn.Module):
    """Model with an unused half, like an expert without tokens."""

    def __init__(self):
        super().__init__()
        self.used = nn.Linear(4, 4)
        self.unused = nn.Linear(4, 4)

    def forward(self, x):
        return self.used(x)


def idle():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(*(IdleLayer() for _ in range(3)))


def observer_of(model, **settings):
    blocks = gs.partition(model)
    ownership = Ownership(model, list(model.parameters()))
    observer = GradientObserver({block.name: block.parameters for block in blocks}, ownership, **settings)
    observer.watch([block.name for block in blocks])
    return observer, blocks


@pytest.mark.parametrize("build", [tiny_llama, tiny_mixtral])
def test_norms_equal_the_readable_twin(build):
    """Tolerance: the hooks add squares in fp32, the twin in fp64."""
    model, twin = build(), build()
    observer, _ = observer_of(model)
    backward(model)
    backward(twin)
    assert observer.norms() == pytest.approx(block_norms(gs.partition(twin)), rel=1e-5)


@pytest.mark.parametrize("measure", ["l2", "l1", "taylor"])
@pytest.mark.parametrize("passes", [1, 2, 3])
def test_each_measure_equals_the_readable_twin(measure, passes):
    """One pass as announced, an accumulation window, and one pass more than announced, which is measured anew."""
    model, twin = tiny_llama(), tiny_llama()
    observer, _ = observer_of(model, measure=measure, accumulation_steps=min(passes, 2))
    for number in range(passes):
        backward(model, seed=number)
        backward(twin, seed=number)
    observer.finish_window()
    assert observer.norms() == pytest.approx(block_norms(gs.partition(twin), measure=measure), rel=1e-5)


@pytest.mark.parametrize("measure", ["l1", "taylor"])
def test_a_policy_selects_by_its_measure_and_records_say_so(measure, tmp_path):
    """Each step has a loss of its own scale, which the gradient scaler's scale must not change."""
    model, twin = tiny_llama(), tiny_llama()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = gs.BlockOptimizer(model, Measured(measure), lr=1e-2, grad_scaler=scaler)
    optimizer.add_record_hook(gs.JsonlWriter(tmp_path / "selection.jsonl"))
    by_hand = SelectiveAdamW(gs.partition(twin), Measured(measure).bind(gs.partition(twin)), lr=1e-2)
    for step in range(3):
        scaler.scale(model(**tiny_batch(model, seed=step)).loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        backward(twin, seed=step)
        norms = block_norms(gs.partition(twin), measure=measure)
        assert optimizer.last_record.selected == by_hand.step()
        assert optimizer.last_record.norms == pytest.approx(norms, rel=1e-4)
        twin.zero_grad()
    assert optimizer.last_record.measure == measure
    assert {json.loads(line)["measure"] for line in (tmp_path / "selection.jsonl").read_text().splitlines()} == {
        measure
    }


def test_records_of_the_l2_norm_stay_as_they_were(tmp_path):
    model = tiny_llama()
    optimizer = gs.BlockOptimizer(model, gs.GradNormTopK(count=1), lr=1e-2)
    optimizer.add_record_hook(gs.JsonlWriter(tmp_path / "selection.jsonl"))
    backward(model)
    optimizer.step()
    assert "measure" not in json.loads((tmp_path / "selection.jsonl").read_text())


@pytest.mark.parametrize("shape", [(5, 3), (7,), (), (0, 3), (2, 3, 4)])
def test_measures_in_chunks_equal_those_of_the_whole(shape, monkeypatch):
    monkeypatch.setattr(gradients, "CHUNK", 4)
    generator = torch.Generator().manual_seed(0)
    parameter = nn.Parameter(torch.randn(shape, generator=generator).bfloat16())
    parameter.grad = torch.randn(shape, generator=generator).bfloat16()
    product = parameter.detach().float() * parameter.grad.float()
    assert gradient_norm([parameter], measure="l1") == pytest.approx(float(parameter.grad.float().abs().sum()))
    assert gradient_norm([parameter], measure="taylor") == pytest.approx(float(product.abs().sum()))


@pytest.mark.parametrize("keep", [0, 1, 2, 6, 7])
def test_streaming_keeps_exactly_the_best_blocks(keep):
    model, twin = tiny_llama(), tiny_llama()
    observer, blocks = observer_of(model)
    observer.stream(keep=keep, score=lambda _, norm: norm)
    backward(model)
    backward(twin)
    expected = top_blocks(block_norms(gs.partition(twin)), keep)
    for block in blocks:
        for name, parameter in zip(block.parameter_names, block.parameters, strict=True):
            if block.name in expected:
                assert torch.equal(parameter.grad, twin.get_parameter(name).grad)
            else:
                assert parameter.grad is None


def test_tie_goes_to_the_earlier_block_and_nan_ranks_last():
    model = tiny_llama()
    observer, blocks = observer_of(model)
    scores = {block.name: 1.0 for block in blocks} | {"embedding": float("nan"), "norm": 2.0}
    observer.stream(keep=2, score=lambda name, _: scores[name])
    backward(model)
    held = {block.name for block in blocks if block.parameters[0].grad is not None}
    assert held == {"norm", "layer.0"}


@pytest.mark.parametrize("count", [1, 2, 3])
def test_at_most_k_plus_one_blocks_hold_gradients_during_an_explore_step(count):
    """Peak of gradient bytes, checked each time a gradient has arrived."""
    model = tiny_llama(layers=6)
    optimizer = gs.BlockOptimizer(model, gs.GradNormTopK(count=count), lr=1e-2)
    blocks = gs.partition(model)
    seen = []

    def look(_):
        seen.append([b.name for b in blocks if any(p.grad is not None for p in b.parameters)])

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(look)
    backward(model)
    sizes = {block.name: sum(4 * p.numel() for p in block.parameters) for block in blocks}
    assert max(map(len, seen)) <= count + 1
    assert optimizer.memory()["gradients"] == sum(sizes[name] for name in seen[-1])
    assert len(seen[-1]) == count
    optimizer.step()
    assert set(optimizer.last_record.selected) == set(seen[-1])
    optimizer.zero_grad()
    assert optimizer.memory()["gradients"] == 0


def test_only_the_last_micro_batch_releases():
    model = tiny_llama()
    optimizer = gs.BlockOptimizer(model, gs.GradNormTopK(count=1), lr=1e-2, accumulation_steps=2)
    backward(model, seed=0)
    assert all(p.grad is not None for p in model.parameters())
    backward(model, seed=1)
    held = [b.name for b in gs.partition(model) if any(p.grad is not None for p in b.parameters)]
    optimizer.step()
    assert held == list(optimizer.last_record.selected)


def test_unused_parameter_leaves_its_block_measured_all_the_same():
    """A block completes when all its gradients have arrived; a gradient that never comes must not hide the block."""

    model = idle()
    optimizer = gs.BlockOptimizer(model, gs.GradNormTopK(count=1), lr=1e-2)
    model(torch.randn(2, 4, generator=torch.Generator().manual_seed(0))).square().sum().backward()
    optimizer.step()
    assert all(norm > 0 for norm in optimizer.last_record.norms.values())
    assert len(optimizer.last_record.norms) == 3
    assert sum(p.grad is not None for p in model.parameters()) == 2


def test_norm_of_bf16_gradients_is_summed_in_fp32():
    """In bf16 a sum of 4096 squares of 1 stalls at 256."""
    parameter = nn.Parameter(torch.zeros(4096, dtype=torch.bfloat16))
    parameter.grad = torch.ones(4096, dtype=torch.bfloat16)
    assert gradient_norm([parameter]) == 64.0


def test_discarded_optimizer_dies_at_once_and_gives_the_model_back():
    """Without the cycle collector, because two optimizer states may not fit on one device."""
    model = tiny_llama()
    optimizer = gs.BlockOptimizer(model, gs.Fixed(("layer.1",)), lr=1e-2)
    backward(model)
    optimizer.step()
    moment = weakref.ref(next(iter(optimizer.state.values()))["exp_avg"])
    gc.disable()
    try:
        del optimizer
        assert moment() is None
    finally:
        gc.enable()
    assert all(p.requires_grad for p in model.parameters())
    backward(model)
    assert all(p.grad is not None for p in model.parameters())


def test_explore_step_thaws_the_candidates_only():
    """Otherwise clipping sees gradients of blocks that do not take part."""
    model = tiny_llama()
    optimizer = gs.BlockOptimizer(model, gs.GradNormTopK(count=1, among=("layer.*",)), always=("norm",), lr=1e-2)
    backward(model)
    held = {b.name for b in gs.partition(model) if any(p.grad is not None for p in b.parameters)}
    optimizer.step()
    assert held == set(optimizer.last_record.selected)
    assert optimizer.last_record.norms.keys() == {f"layer.{i}" for i in range(4)}


def scaled_by(model, factor, *, layer):
    """Make the gradients that leave `layer` downwards larger by `factor`."""
    model.model.layers[layer].register_full_backward_hook(lambda _, grads, __: tuple(g * factor for g in grads))


def test_overflow_in_a_losing_block_reaches_the_scaler_and_the_clipper():
    """A block with infinite gradients can never win; if they were freed, nobody would see the overflow."""
    model = tiny_llama()
    scaled_by(model, float("inf"), layer=2)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = gs.BlockOptimizer(model, gs.GradNormTopK(count=1), lr=1e-2, grad_scaler=scaler)
    scaler.scale(model(**tiny_batch(model, seed=0)).loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert optimizer.last_record is None
    assert scaler.get_scale() == 512.0
    optimizer.zero_grad()
    backward(model)
    with pytest.raises(RuntimeError, match="non-finite"):
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)


@pytest.mark.parametrize("settings", [{"count": 1, "probe_steps": 2}, {"count": 2}])
def test_norms_of_incomplete_blocks_are_unscaled_and_taken_before_clipping(settings):
    """A block with an idle parameter never completes in the pass; probing leaves the scaler without a gradient."""

    def run(scaler, clip):
        model = idle()
        optimizer = gs.BlockOptimizer(model, gs.GradNormTopK(**settings), lr=1e-2, grad_scaler=scaler)
        loss = model(torch.ones(2, 4)).square().sum()
        (scaler.scale(loss) if scaler else loss).backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        scaler.step(optimizer) if scaler else optimizer.step()
        return optimizer.last_record.norms

    plain = run(None, clip=False)
    assert min(plain.values()) > 0
    assert run(None, clip=True) == plain
    assert run(torch.amp.GradScaler("cpu", init_scale=1024.0), clip=False) == pytest.approx(plain)


@pytest.mark.parametrize("finish", ["before unscale_", "after unscale_", "disabled"])
def test_norms_of_a_window_that_the_loop_finishes_early_are_unscaled_once(finish):
    """A window of one pass where two were announced: only the loop knows that it is over."""
    model, twin = tiny_llama(layers=2), tiny_llama(layers=2)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=finish != "disabled")
    settings = {"policy": gs.GradNormTopK(count=1), "lr": 1e-2, "accumulation_steps": 2, "grad_scaler": scaler}
    optimizer = gs.BlockOptimizer(model, **settings)
    scaler.scale(model(**tiny_batch(model, seed=0)).loss).backward()
    if finish != "after unscale_":
        optimizer.finish_window()
    scaler.unscale_(optimizer)
    optimizer.finish_window()
    scaler.step(optimizer)
    backward(twin)
    assert optimizer.last_record.norms == pytest.approx(block_norms(gs.partition(twin)), rel=1e-5)


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("policy", [gs.GradNormTopK(count=1), gs.MISA(share=0.4, every=2)], ids=["decides", "observes"])
def test_a_step_that_the_scaler_skips_leaves_nothing_behind_whoever_clears_its_gradients(policy, passes):
    """After `model.zero_grad()` the next step was selected by norms that were all NaN, or divided by the old scale."""

    def run(clears):
        model = tiny_llama()
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        optimizer = gs.BlockOptimizer(model, policy, lr=1e-2, accumulation_steps=passes, grad_scaler=scaler)
        records = []
        optimizer.add_record_hook(records.append)
        for step in range(6):
            for part in range(passes):
                loss = model(**tiny_batch(model, seed=step + 10 * part)).loss
                scaler.scale(loss * (torch.inf if step in (0, 3) else 1.0)).backward()
            scaler.step(optimizer)
            scaler.update()
            clears(model, optimizer)
        return records

    by_model = run(lambda model, _: model.zero_grad())
    assert by_model == run(lambda _, optimizer: optimizer.zero_grad())
    assert len(by_model) == 4


@pytest.mark.parametrize("policy", [gs.GradNormTopK(count=1), gs.MISA(share=0.4, every=2)], ids=["decides", "observes"])
def test_norms_that_are_not_finite_are_said_once_by_name(policy, caplog):
    model = tiny_llama()
    optimizer = gs.BlockOptimizer(model, policy, lr=1e-2)
    for _ in range(2):
        loss = model(**tiny_batch(model, seed=0)).loss
        (loss * torch.nan).backward()
        optimizer.step()
        optimizer.zero_grad()
    [said] = [record.getMessage() for record in caplog.records if "NaN or infinite" in record.getMessage()]
    num_measured = len(optimizer.last_record.norms)
    assert f"step 0: the gradient norms of {num_measured} of {num_measured} blocks are NaN or infinite: " in said
    assert "skip_nonfinite=True" in said


def test_at_most_k_blocks_hold_gradients_after_a_pass_with_idle_parameters():
    model = idle()
    optimizer = gs.BlockOptimizer(model, gs.GradNormTopK(count=1), lr=1e-2)
    model(torch.ones(2, 4)).square().sum().backward()
    assert sum(p.grad is not None for p in model.parameters()) == 2
    assert optimizer.memory()["gradients"] == 4 * (16 + 4)


def test_sparse_gradient_is_refused_by_name_in_an_explore_step():
    layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
    model = nn.Sequential(nn.Embedding(8, 4, sparse=True), *layers)
    gs_optimizer = gs.BlockOptimizer(model, gs.GradNormTopK(count=1), lr=1e-2)
    with pytest.raises(gs.UsageError, match="sparse=False"):
        model(torch.tensor([1, 2])).sum().backward()
    gs_optimizer.close()
