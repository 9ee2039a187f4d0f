"""Devices of this machine: what they are, fused kernels, page-locked memory, training steps."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator

import torch

from gradselect import AdamWRule
from gradselect.core import SLOW_BFLOAT16, bfloat16_cost, has_fused_kernels, is_accelerator
from gradselect.usage import write_size

from .findings import Finding, Status
from .training_steps import SETUPS, train_a_few_steps

_PAGE_LOCKED_BYTES = 2**20


def examine_devices() -> Iterator[Finding]:
    """Yield the findings of the CPU and of every accelerator."""
    yield from _of_torch()
    for device in devices():
        yield _tried(f"device {device}", lambda device=device: (Status.OK, _describe(device)))
        yield _tried(f"{device}, fused AdamW", lambda device=device: _fused(device))
        if device.type == "cpu":
            yield _tried("cpu, bfloat16", _bfloat16)
        if is_accelerator(device):
            yield _tried(f"{device}, page-locked memory", lambda device=device: _page_locked(device))
        for name, setup in SETUPS.items():
            step = lambda device=device, setup=setup: train_a_few_steps(device, setup)  # noqa: E731
            yield _tried(f"{device}, training {name}", step)


def devices() -> list[torch.device]:
    """Return the CPU and the accelerators that torch can use."""
    found = [torch.device("cpu")]
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None:
        found += [torch.device(accelerator.type, index) for index in range(torch.accelerator.device_count())]
    return found


def _of_torch() -> Iterator[Finding]:
    """Yield a note if there is a GPU that torch cannot use."""
    if torch.cuda.is_available() or shutil.which("nvidia-smi") is None:
        return
    if torch.version.cuda is None:
        text, advice = "this torch is a build without CUDA", "install a build of torch with CUDA, see pytorch.org"
    else:
        text = f"this torch is built for CUDA {torch.version.cuda}, and finds no GPU"
        advice = "run nvidia-smi; a driver that is too old, or CUDA_VISIBLE_DEVICES, hides it"
    yield Finding(name="NVIDIA driver without a device", status=Status.NOTE, text=text, advice=advice)


def _describe(device: torch.device) -> str:
    if device.type == "cpu":
        return f"{torch.get_num_threads()} threads, {os.cpu_count()} CPUs"
    if device.type != "cuda":
        return f"accelerator {device.type}"
    properties = torch.cuda.get_device_properties(device)
    free, total = torch.cuda.mem_get_info(device)
    bfloat16 = "with" if torch.cuda.is_bf16_supported(including_emulation=False) else "without"
    return (
        f"{properties.name}, {write_size(total)} of memory, {write_size(free)} of it free, "
        f"compute capability {properties.major}.{properties.minor}, {bfloat16} bfloat16"
    )


def _tried(name: str, check: Callable[[], tuple[Status, str]]) -> Finding:
    try:
        status, text = check()
    except Exception as error:  # what is looked for here is anything that goes wrong
        return Finding.broken(name, error, advice="report it with the output of: gradselect doctor --json")
    return Finding(name=name, status=status, text=text)


def _fused(device: torch.device) -> tuple[Status, str]:
    """Update the same weights by the fused kernel and by the loop."""
    is_default = has_fused_kernels(device)
    updated = []
    for rule in (AdamWRule(fused=True), AdamWRule(fused=False)):
        weight = torch.linspace(-1, 1, 64).to(device)
        state, grad = rule.make_state(weight), torch.linspace(1, 2, 64).to(device)
        group = {"lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
        try:
            rule.update([weight], [grad], [state], group)
        except RuntimeError:
            if is_default or not rule.fused:
                raise
            return Status.NOTE, "not supported; AdamW runs as a loop"
        updated.append(weight)
    difference = (updated[0] - updated[1]).abs().max().item()
    if not difference < 1e-5:
        raise RuntimeError(f"differs from the loop by {difference:.1e}")
    return Status.OK, f"works{', and is the default' if is_default else ''}"


def _bfloat16() -> tuple[Status, str]:
    """Compare the matrix products of a step in bfloat16 with those in float32."""
    ratio = bfloat16_cost()
    if ratio < SLOW_BFLOAT16:
        return Status.OK, f"matrix products take {ratio:.1f} times as long as in float32"
    return Status.NOTE, (
        f"matrix products take {ratio:.0f} times as long as in float32; train, evaluate and compare let those "
        "of large models go through float32; a loop of your own is faster in float32"
    )


def _page_locked(device: torch.device) -> tuple[Status, str]:
    """Copy to the device and back without waiting in between."""
    if device.type != "cuda":
        return Status.NOTE, "copies of state wait; only CUDA copies beside the computation"
    try:
        host = torch.arange(_PAGE_LOCKED_BYTES // 8, pin_memory=True)
    except RuntimeError as error:
        return Status.NOTE, f"none is left ({' '.join(str(error).split())[:120]}); copies of state wait"
    back = torch.empty_like(host, pin_memory=True)
    back.copy_(host.to(device, non_blocking=True), non_blocking=True)
    torch.cuda.synchronize(device)
    if not host.is_pinned() or not torch.equal(host, back):
        raise RuntimeError("a copy through page-locked memory came back different")
    return Status.OK, "works"
