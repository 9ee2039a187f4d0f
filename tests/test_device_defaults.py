"""Defaults that follow the device: `rule=None` and `residency=None`.

An accelerator is played by a CPU: the function that asks for the kind of a device is replaced.
"""

from __future__ import annotations

import copy
import logging
from functools import partial

import pytest
import torch
from tiny_models import tiny_batch, tiny_llama
from torch import nn

import gradselect as gs
from gradselect.core import adamw, devices, residency
from gradselect.integrations.transformers.method_settings import method_settings
from gradselect.reference import SelectiveAdamW

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take every device for an accelerator with fused kernels."""
    for module in (devices, adamw, residency):
        for name in ("is_accelerator", "has_fused_kernels"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, lambda device: True)


def train(model: nn.Module, optimizer: gs.BlockOptimizer, steps: range) -> list[gs.StepRecord]:
    records = []
    for step in steps:
        model(**tiny_batch(model, seed=step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert optimizer.last_record is not None
        records.append(optimizer.last_record)
    return records


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(map(torch.equal, one.parameters(), other.parameters()))


@pytest.mark.parametrize(
    ("kind", "accelerates", "fuses"),
    [
        ("cpu", False, False),
        ("meta", False, False),
        ("cuda", True, True),
        ("xpu", True, True),
        ("mps", True, True),
        ("xla", True, False),
    ],
)
def test_kinds_of_devices(kind: str, accelerates: bool, fuses: bool) -> None:
    device = torch.device(kind)
    assert devices.is_accelerator(device) is accelerates
    assert devices.has_fused_kernels(device) is fuses
    assert gs.AdamWRule(fused=None).on(device) == gs.AdamWRule(fused=fuses)
    assert residency.default_residency(device) == (gs.Offload() if accelerates else gs.Keep())


def test_counters_are_where_the_kernel_reads_them(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.empty(1, device="meta")
    for fuses, place in ((False, "cpu"), (True, "meta")):
        monkeypatch.setattr(adamw, "has_fused_kernels", lambda device, fuses=fuses: fuses)
        assert gs.AdamWRule(fused=None).make_state(weight)["step"].device.type == place


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_cpu_they_are_the_loop_and_keep_bitwise(dtype: torch.dtype) -> None:
    one, other = tiny_llama(dtype=dtype), tiny_llama(dtype=dtype)
    policy = gs.AdaGradSelect(count=2, explore_steps=3)
    default = gs.BlockOptimizer(one, policy, lr=1e-2)
    given = gs.BlockOptimizer(other, policy, lr=1e-2, rule=gs.AdamWRule(), residency=gs.Keep())
    assert train(one, default, range(8)) == train(other, given, range(8))
    assert same(one, other)
    assert default.rule == given.rule
    assert default.residency == given.residency
    assert repr(default) == repr(given)
    assert "rule: AdamWRule(fused=False)\nresidency: Keep()" in repr(default)
    assert method_settings(default) == method_settings(given)


@pytest.mark.usefixtures("accelerator")
def test_on_an_accelerator_they_are_the_fused_kernel_and_offload_bitwise() -> None:
    one, other = tiny_llama(), tiny_llama()
    policy = gs.Uniform(count=2)
    default = gs.BlockOptimizer(one, policy, lr=1e-2)
    given = gs.BlockOptimizer(other, policy, lr=1e-2, rule=gs.AdamWRule(fused=True), residency=gs.Offload())
    records = train(one, default, range(8))
    assert records == train(other, given, range(8))
    assert any(record.moved_bytes for record in records)
    assert same(one, other)
    assert "rule: AdamWRule(fused=True)\nresidency: Offload(" in repr(default)
    assert method_settings(default) == method_settings(given)
    assert method_settings(default)["selection/rule/fused"] is True
    found = gs.plan(tiny_llama(), policy, batch_size=2, sequence_length=8)
    assert found == gs.plan(tiny_llama(), policy, batch_size=2, sequence_length=8, residency=gs.Offload())


@pytest.mark.usefixtures("accelerator")
def test_the_fused_kernel_equals_the_readable_twin() -> None:
    """In float64, where the kernel's rounding stays far below the tolerance."""
    ours, theirs = tiny_llama(dtype=torch.float64), tiny_llama(dtype=torch.float64)
    policy = gs.Uniform(count=2)
    optimizer = gs.BlockOptimizer(ours, policy, lr=1e-2)
    blocks = gs.partition(theirs)
    twin = SelectiveAdamW(blocks, policy.bind(blocks), lr=1e-2)
    for step in range(8):
        train(ours, optimizer, range(step, step + 1))
        theirs(**tiny_batch(theirs, seed=step)).loss.backward()
        twin.step()
        theirs.zero_grad()
    for name, weight in ours.named_parameters():
        torch.testing.assert_close(weight, theirs.get_parameter(name), rtol=1e-6, atol=1e-9)


def test_they_are_decided_where_the_model_is_at_its_first_update(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Trainer moves the model after the optimizer was built. Saved, it may go elsewhere for a moment."""

    def come_from_elsewhere() -> None:
        assert optimizer._states._open is not None
        optimizer._states._open = torch.device("meta"), *optimizer._states._open[1:]

    def is_on_accelerator(answer: bool) -> None:
        monkeypatch.setattr(residency, "is_accelerator", lambda device: answer)
        monkeypatch.setattr(adamw, "has_fused_kernels", lambda device: answer)

    model = tiny_llama()
    optimizer = gs.BlockOptimizer(model, gs.Uniform(count=1))
    assert (optimizer.rule, optimizer.residency) == (gs.AdamWRule(), gs.Keep())
    come_from_elsewhere()
    is_on_accelerator(True)
    assert (optimizer.rule, optimizer.residency) == (gs.AdamWRule(fused=True), gs.Offload())
    train(model, optimizer, range(2))
    assert optimizer.memory()["state_on_host"] > 0
    come_from_elsewhere()
    is_on_accelerator(False)
    assert optimizer.residency == gs.Offload()


def test_a_run_goes_on_on_another_kind_of_device_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def build(accelerates: bool) -> tuple[nn.Module, gs.BlockOptimizer]:
        monkeypatch.setattr(residency, "is_accelerator", lambda device: accelerates)
        monkeypatch.setattr(adamw, "has_fused_kernels", lambda device: accelerates)
        model = tiny_llama()
        return model, gs.BlockOptimizer(model, gs.Uniform(count=2), lr=1e-2)

    caplog.set_level(logging.INFO, logger="gradselect")
    for first in (False, True):
        model, optimizer = build(first)
        before = train(model, optimizer, range(4))
        saved, weights = copy.deepcopy((optimizer.state_dict(), model.state_dict()))
        selected = [record.selected for record in train(model, optimizer, range(4, 8))]
        for second in (first, not first):
            caplog.clear()
            model, optimizer = build(second)
            model.load_state_dict(weights)
            optimizer.load_state_dict(saved)
            assert optimizer.rule == gs.AdamWRule(fused=second)
            assert [record.selected for record in train(model, optimizer, range(4, 8))] == selected
            said = [record.message for record in caplog.records if "the checkpoint was written with" in record.message]
            assert len(said) == (first is not second)
            if said:
                assert f"fused={first} and a residency with frees_device={first}" in said[0]
                assert f"fused={second} and frees_device={second}" in said[0]
        assert len(before) == 4


def test_a_plan_on_meta_takes_the_accelerator_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.device("meta"):
        model = tiny_llama()
    plan = partial(gs.plan, model, gs.Uniform(count=1), batch_size=2, sequence_length=8)
    for found, place in ((None, gs.Keep()), (torch.device("cuda"), gs.Offload())):
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available, found=found: found)
        assert plan() == plan(residency=place)


@pytest.mark.usefixtures("accelerator")
def test_entries_take_the_fused_kernel_for_whole_tensors_and_keep_their_state() -> None:
    model = tiny_llama()
    optimizer = gs.SparseOptimizer(model, gs.TopGradient(density=0.1), always=("*norm*",), lr=1e-2)
    assert (optimizer.rule, optimizer.residency) == (gs.AdamWRule(fused=True), gs.Keep())
    model(**tiny_batch(model, seed=0)).loss.backward()
    optimizer.step()


@pytest.mark.gpu
@needs_cuda
def test_on_cuda_the_defaults_equal_the_loop_and_keep_to_rounding() -> None:
    policy = gs.AdaGradSelect(count=2, explore_steps=3)
    one, other = tiny_llama(dtype=torch.float64), tiny_llama(dtype=torch.float64)
    default = gs.BlockOptimizer(one, policy, lr=1e-2)
    given = gs.BlockOptimizer(other, policy, lr=1e-2, rule=gs.AdamWRule(), residency=gs.Keep())
    one.cuda()
    other.cuda()
    for step in range(10):
        for model, optimizer in ((one, default), (other, given)):
            batch = {name: value.cuda() for name, value in tiny_batch(model, seed=step).items()}
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert (default.rule, default.residency) == (gs.AdamWRule(fused=True), gs.Offload())
    assert default.memory()["state_on_host"] > 0
    for ours, theirs in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)


@pytest.mark.gpu
@needs_cuda
def test_a_run_of_a_cpu_goes_on_on_cuda_and_back() -> None:
    model = tiny_llama(dtype=torch.float64)
    optimizer = gs.BlockOptimizer(model, gs.Uniform(count=2), lr=1e-2)
    train(model, optimizer, range(4))
    for device in ("cuda", "cpu"):
        saved, weights = copy.deepcopy((optimizer.state_dict(), model.state_dict()))
        model = tiny_llama(dtype=torch.float64).to(device)
        model.load_state_dict(weights)
        optimizer = gs.BlockOptimizer(model, gs.Uniform(count=2), lr=1e-2)
        optimizer.load_state_dict(saved)
        batch = {name: value.to(device) for name, value in tiny_batch(model, seed=4).items()}
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert optimizer.rule == gs.AdamWRule(fused=device == "cuda")


def test_a_word_is_no_choice_of_the_kernel() -> None:
    """ "no" would be true."""
    with pytest.raises(gs.UsageError, match=r"fused='no' is no bool object; write fused=True, fused=False"):
        gs.AdamWRule(fused="no")  # pyright: ignore[reportArgumentType]
