"""Does `Offload()` hide its copies, and are they right? Needs a CUDA device; exits with 2 where there is none.

    python benchmarks/offload.py                          # writes benchmarks/results/offload.json
    python benchmarks/offload.py --preset qwen2.5-0.5b --fraction 0.1 --out /tmp/offload.json

Hidden: of the time that the copies take alone, one after the other from and to page-locked memory, the share by which a
step with `Offload()` is not slower than the same step with `Keep()`:

    hidden = 1 - (seconds of a step, Offload - seconds of a step, Keep) / seconds of its copies

Blocks are drawn uniformly at every step: no policy moves more. `waiting` is the twin whose host waits for every copy.

Right: layers of many weights and few tokens, whose copies take longer than the computation. After 300 steps with
another selection each, weights and state are bitwise those of the twin.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch
from common import GPU_WORKLOADS, RESULTS, machine, make_parser, parse, read_result, settings_of, write_result
from torch import Tensor, nn

import gradselect as gs
from gradselect.core.residency import AbstractMover, _Offloading
from gradselect.core.transfer import SynchronousStreams, Transfer

RESULT = RESULTS / "offload.json"
WARMUP = 30
"""Steps after which nearly every block has a state that can move."""


class WaitingStreams(SynchronousStreams):
    """Copies that are complete when `copy` returns, from and to page-locked memory: else the twin takes minutes."""

    def page_locked(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)


@dataclass(frozen=True, kw_only=True)
class Waiting(gs.Offload):
    """The twin of `Offload`: the same switches, but the host waits for every copy."""

    def open(self, device: torch.device) -> AbstractMover:
        transfer = Transfer(WaitingStreams(device), max_pinned_bytes=None)
        return _Offloading(transfer, max_device_bytes=self.max_device_bytes)


def compare_bits(device: torch.device, *, steps: int, width: int, layers: int = 10) -> dict[str, Any]:
    """Compare bitwise the weights and state of a run whose copies overlap, and of its twin."""
    ends = []
    for residency in (gs.Offload(), Waiting()):
        torch.manual_seed(0)
        linears = [nn.Linear(width, width, bias=False, device=device, dtype=torch.bfloat16) for _ in range(layers)]
        model = nn.Sequential(*linears)
        optimizer = gs.BlockOptimizer(model, gs.Uniform(count=3), lr=1e-3, residency=residency)
        inputs = torch.randn(2, width, device=device, dtype=torch.bfloat16)
        for _ in range(steps):
            model(inputs).float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append((model.state_dict(), optimizer.state_dict()["state"]))
    (weights, states), (twin_weights, twin_states) = ends
    is_equal = [torch.equal(weights[name], twin_weights[name]) for name in weights]
    is_equal += [torch.equal(states[i][name], twin_states[i][name]) for i in states for name in states[i]]
    is_finite = all(bool(weight.isfinite().all()) for weight in weights.values())
    return {"steps": steps, "tensors": len(is_equal), "equal": all(is_equal) and is_finite}


def measure(arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Measure seconds of a step and peak bytes with each residency, and the hidden share of the copies."""
    rows: dict[str, dict[str, float]] = {}
    for name, residency in (("keep", gs.Keep()), ("offload", gs.Offload()), ("waiting", Waiting())):
        rows[name] = run(arguments, device, residency)
        print(json.dumps({name: rows[name]}), flush=True)
        gc.collect()
        torch.cuda.empty_cache()  # the next one's peak is its own
    moved = rows["offload"]["moved_bytes_per_step"]
    copies = moved * seconds_per_byte(device)
    longer = rows["offload"]["seconds_per_step"] - rows["keep"]["seconds_per_step"]
    return {"methods": rows, "copy_seconds_per_step": copies, "hidden": 1 - longer / copies if copies else None}


def run(arguments: argparse.Namespace, device: torch.device, residency: gs.AbstractResidency) -> dict[str, float]:
    """Train with a new random selection at every step; the host runs ahead of the device as in training."""
    workload = GPU_WORKLOADS[arguments.preset]
    model = workload.model()
    policy = gs.Uniform(fraction=arguments.fraction)
    rule = gs.AdamWRule(fused=True)
    optimizer = gs.BlockOptimizer(model, policy, lr=1e-5, rule=rule, residency=residency)
    moved: list[int] = []
    optimizer.add_record_hook(lambda record: moved.append(record.moved_bytes))
    batch = next(workload.batches())
    start = 0.0
    for step in range(WARMUP + arguments.steps):
        if step == WARMUP:
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            start = time.perf_counter()
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.cuda.synchronize(device)
    return {
        "seconds_per_step": (time.perf_counter() - start) / arguments.steps,
        "moved_bytes_per_step": sum(moved[WARMUP:]) / arguments.steps,
        "peak_allocated_bytes": torch.cuda.max_memory_allocated(device),
        "peak_reserved_bytes": torch.cuda.max_memory_reserved(device),
    }


def seconds_per_byte(device: torch.device, *, num_bytes: int = 2**28, repeats: int = 20) -> float:
    """Return the time to copy one byte from or to page-locked memory: mean of both directions."""
    host = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(num_bytes, dtype=torch.uint8, device=device)
    start = 0.0
    for repeat in range(repeats + 1):
        if repeat == 1:
            torch.cuda.synchronize(device)
            start = time.perf_counter()
        there.copy_(host, non_blocking=True)
        host.copy_(there, non_blocking=True)
    torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / (2 * repeats * num_bytes)


def main() -> int:
    parser = make_parser(__doc__, out=RESULT, steps=50, switches=300, width=2048)
    parser.add_argument("--preset", choices=GPU_WORKLOADS, default="llama-3.2-3b")
    parser.add_argument("--fraction", type=float, default=0.2, help="share of the blocks that train")
    arguments = parse(parser)
    if not arguments.table:
        if not torch.cuda.is_available():
            print(
                "benchmarks/offload.py measures copies beside a computation: it needs a CUDA device, and there is none"
            )
            return 2
        device = torch.device("cuda")
        right = compare_bits(device, steps=arguments.switches, width=arguments.width)
        print(json.dumps(right), flush=True)  # known even if the time is over before the rest
        result = {
            "settings": settings_of(arguments),
            "machine": machine("cuda"),
            "right": right,
            "hidden": measure(arguments, device),
        }
        write_result(arguments.out, result)
    found = read_result(arguments.out)
    print(json.dumps(found, indent=1))
    return 0 if found["right"]["equal"] else 1


if __name__ == "__main__":
    sys.exit(main())
