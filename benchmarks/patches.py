"""Bytes of the patch of a step, beside the bytes of the model: what an inference engine takes after each step.

    python benchmarks/patches.py                     # writes benchmarks/results/patches.json and prints the table
    python benchmarks/patches.py --table

A model of a published shape with random weights, bf16, random tokens. A copy takes each patch and must then be equal to
the trained model bit for bit. `changed` counts the weights of the patch whose bits differ from those before it: a
bf16 weight often rounds back to what it was. ID3 has reached its budget in the last of the steps.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import common
import torch
from torch import Tensor, nn

import gradselect as gs

RESULT = common.RESULTS / "patches.json"
SHAPE = "qwen2.5-0.5b"
LENGTH = 16
LR = 1e-5

METHODS: dict[str, Callable[[nn.Module, int], Any]] = {
    "AdaGradSelect, 30 % of the blocks": lambda model, steps: gs.BlockOptimizer(
        model, gs.AdaGradSelect(fraction=0.3, explore_steps=max(1, steps // 4)), lr=LR, residency=gs.Offload()
    ),
    "ID3, 1 %": lambda model, steps: gs.SparseOptimizer(model, gs.ID3(density=0.01, steps=steps), lr=LR),
    "random entries, 1 %": lambda model, steps: gs.SparseOptimizer(
        model, gs.StaticMask(salience=gs.salience.random, density=0.01), lr=LR
    ),
}


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    config = common.published_shape(SHAPE)
    rows = {name: run(build, config, arguments.steps) for name, build in METHODS.items()}
    return {"settings": common.settings_of(arguments), "machine": common.machine(), "shape": SHAPE, "methods": rows}


def run(build: Callable[[nn.Module, int], Any], config: Any, steps: int) -> list[dict[str, Any]]:
    """Train; return one row for each step."""
    model = common.random_model(config, dtype=torch.bfloat16)
    follower, optimizer = copy.deepcopy(model), build(model, steps)
    batches = common.random_batches(config.vocab_size, batch=1, length=LENGTH)
    rows = []
    for step in range(steps):
        model(**next(batches)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        start = time.perf_counter()
        patch = optimizer.changed_entries()
        seconds = time.perf_counter() - start
        num_changed = changed(follower, patch)
        gs.delta.apply_patch(follower, patch)
        assert all(map(torch.equal, follower.parameters(), model.parameters())), step
        rows.append(
            {
                "step": step,
                "bytes": patch.num_bytes,
                "model_bytes": patch.model_bytes,
                "entries": patch.num_entries,
                "changed": num_changed,
                "seconds": seconds,
            }
        )
    return rows


def changed(follower: nn.Module, patch: gs.Patch) -> int:
    """Number of weights of the patch whose bits differ from those of the copy."""
    count = 0
    for name, change in patch.items():
        before = follower.get_parameter(name).detach().view(-1)
        if isinstance(change, Tensor):
            after = change.view(-1)
        else:
            before, after = before.index_select(0, change.indices), change.values
        count += int((before.view(torch.int16) != after.view(torch.int16)).sum())
    return count


def markdown(result: dict[str, Any]) -> str:
    rows = []
    for name, steps in result["methods"].items():
        sizes = [step["bytes"] for step in steps]
        whole = steps[0]["model_bytes"]
        share = statistics.median(step["changed"] / step["entries"] for step in steps)
        rows.append(
            f"| {name} | {statistics.median(sizes) / 1e6:,.1f} | {min(sizes) / 1e6:,.1f} to {max(sizes) / 1e6:,.1f} | "
            f"{statistics.median(sizes) / whole:.1%} | {whole / 1e6:,.1f} | {share:.0%} |"
        )
    head = [
        "| method | MB a step, median | from, to | of the model | model, MB | weights whose bits changed |",
        "|---|---|---|---|---|---|",
    ]
    return "\n".join([*head, *rows])


def main() -> None:
    parser = common.make_parser(__doc__, out=RESULT, steps=12, threads=1)
    common.measure_and_print(common.parse(parser), measure, markdown)


if __name__ == "__main__":
    main()
