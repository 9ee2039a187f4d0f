"""Time and bytes of one training step, method by method, against full fine-tuning in the same run.

    python benchmarks/step_time.py                      # writes benchmarks/results/step_time.json and prints the table
    python benchmarks/step_time.py --rounds 3 --layers 4 --hidden 64 --vocabulary 500 --out /tmp/small.json

Every method trains its own copy of one Qwen2-type model with random weights. The methods take turns, one step each a
round. A ratio is taken inside a round, and the table has its median. `limit` is the speed-up that the FLOPs allow for
the selected blocks, see `gradselect.blocks.StepCost`.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import common
import torch
from torch import nn

import gradselect as gs
from gradselect.blocks import StepCost

RESULT = common.RESULTS / "step_time.json"
LR = 1e-5
LORA_RANKS = (16, 128, 256)


class UpdateClock:
    """Keeps the records of an optimizer, and the seconds of its updates: those between the phases of `step`."""

    def __init__(self, optimizer: gs.BlockOptimizer) -> None:
        self.seconds: list[float] = []
        self.records: list[gs.StepRecord] = []
        self._depth = 0
        self.begin()
        optimizer.phases(self._phase)
        optimizer.add_record_hook(self._end)

    def begin(self) -> None:
        """Call it between backward pass and `step`."""
        self._between, self._last_end = 0.0, math.inf

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        if not self._depth:
            self._between += max(0.0, time.perf_counter() - self._last_end)
        self._depth += 1
        yield
        self._depth -= 1
        self._last_end = time.perf_counter()

    def _end(self, record: gs.StepRecord) -> None:
        self.seconds.append(self._between)
        self.records.append(record)


def blocks(policy: gs.AbstractPolicy, **settings: Any) -> Callable[[nn.Module], gs.BlockOptimizer]:
    return partial(gs.BlockOptimizer, policy=policy, lr=LR, rule=gs.AdamWRule(fused=True), **settings)


def exploiting(share: float, **settings: Any) -> Callable[[nn.Module], gs.BlockOptimizer]:
    """AdaGradSelect that explores in the first step alone."""
    return blocks(gs.AdaGradSelect(fraction=share, explore_steps=1), **settings)


def badam_package(model: nn.Module) -> torch.optim.Optimizer:
    """BAdam by its authors' package, an outside reference."""
    import badam

    return badam.BlockOptimizer(
        base_optimizer=torch.optim.AdamW(model.parameters(), lr=LR),
        named_parameters_list=list(model.named_parameters()),
        switch_block_every=2,
        switch_mode="random",
        verbose=0,
    )


FULL = partial(common.fused_adamw, lr=LR)
OPTIMIZERS: dict[str, Callable[[nn.Module], Any]] = {
    "full, torch AdamW fused": FULL,
    "full, All()": blocks(gs.All()),
    "AdaGradSelect 10 %, exploit": exploiting(0.1),
    "AdaGradSelect 20 %, exploit": exploiting(0.2),
    "AdaGradSelect 20 %, exploit, Offload()": exploiting(0.2, residency=gs.Offload()),
    "AdaGradSelect 20 %, exploit, Drop()": exploiting(0.2, residency=gs.Drop()),
    "AdaGradSelect 20 %, exploit, embedding always": exploiting(0.2, always=("embedding",)),
    "AdaGradSelect 30 %, exploit": exploiting(0.3),
    "AdaGradSelect 20 %, explore": blocks(gs.AdaGradSelect(fraction=0.2, explore_steps=10**9)),
    "LISA, 2 layers + embedding, norm, head": blocks(
        gs.Uniform(count=2, every=20), always=("embedding", "norm", "head")
    ),
    "BAdam, 1 block": blocks(gs.Cyclic(every=2), residency=gs.Drop()),
}


class Competitor:
    """A method, and the bytes of its gradients after the backward pass at their most."""

    def __init__(self, name: str, model: nn.Module, make_optimizer: Callable[[nn.Module], Any]) -> None:
        self.gradient_bytes = 0
        self.method = common.Method(name, model, make_optimizer(model), after_backward=self._after_backward)
        self.clock = UpdateClock(own) if isinstance(own := self.method.optimizer, gs.BlockOptimizer) else None

    def _after_backward(self) -> None:
        self.gradient_bytes = max(self.gradient_bytes, common.gradient_bytes(self.method.model.parameters()))
        if self.clock is not None:
            self.clock.begin()

    def row(self, baseline: common.Method) -> dict[str, Any]:
        own, state = self.method, common.state_bytes(self.method.optimizer)
        return {
            "method": own.name,
            **common.ratio_columns("speed_up", baseline.seconds, own.seconds),
            "flop_limit": self._flop_limit(),
            "seconds": statistics.median(own.seconds),
            "optimizer_seconds": statistics.median(own.optimizer_seconds),
            "bookkeeping_share": self._bookkeeping_share(),
            "state_on_device_bytes": state["device"],
            "state_on_host_bytes": state["host"],
            "gradient_bytes_after_backward": self.gradient_bytes,
        }

    def _flop_limit(self) -> float | None:
        own = self.method
        if self.clock is None:
            return None
        records = self.clock.records[-len(own.seconds) :]
        cost = StepCost.of_model(own.model, gs.partition(own.model))
        return statistics.mean(1.0 if r.explored else 1 / cost.relative_time(r.selected) for r in records)

    def _bookkeeping_share(self) -> float | None:
        own = self.method
        if self.clock is None:
            return None
        updates = self.clock.seconds[-len(own.seconds) :]
        rest = [step - update for step, update in zip(own.optimizer_seconds, updates, strict=True)]
        return statistics.median(rest) / statistics.median(own.seconds)


def competitors(arguments: argparse.Namespace) -> Iterator[Competitor]:
    """Yield the baseline first: ratios are taken against it."""
    config = common.decoder_shape(
        "qwen2",
        layers=arguments.layers,
        width=arguments.hidden,
        mlp_width=8 * arguments.hidden // 3,
        heads=max(1, arguments.hidden // 64),
        vocabulary=arguments.vocabulary,
        length=arguments.length,
    )
    for name, make_optimizer in OPTIMIZERS.items():
        yield Competitor(name, common.random_model(config), make_optimizer)
    for rank in LORA_RANKS:
        yield Competitor(
            f"LoRA r={rank}, all linears (PEFT)", common.with_lora(common.random_model(config), rank=rank), FULL
        )
    try:
        yield Competitor("BAdam, package `badam`", common.random_model(config), badam_package)
    except ImportError:
        print("the package `badam` is not installed (extra `peers`): left out")


def markdown(result: dict[str, Any]) -> str:
    headings = ["method", "speed-up", "min-max", "limit", "optimizer s", "bookkeeping"]
    return common.markdown_table(
        [*headings, "state MB", "on host MB", "gradients MB"],
        [
            [
                row["method"],
                f"{row['speed_up']:.2f}",
                f"{row['speed_up_min']:.2f}-{row['speed_up_max']:.2f}",
                "" if row["flop_limit"] is None else f"{row['flop_limit']:.2f}",
                f"{row['optimizer_seconds']:.3f}",
                "" if row["bookkeeping_share"] is None else f"{100 * row['bookkeeping_share']:.2f} %",
                common.megabytes(row["state_on_device_bytes"], digits=0),
                common.megabytes(row["state_on_host_bytes"], digits=0),
                common.megabytes(row["gradient_bytes_after_backward"], digits=0),
            ]
            for row in result["methods"]
        ],
    )


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    found = list(competitors(arguments))
    methods = [each.method for each in found]
    batches = common.random_batches(arguments.vocabulary, batch=arguments.batch, length=arguments.length)
    common.take_turns(methods, batches, warmup=arguments.warmup, rounds=arguments.rounds)
    rows = [each.row(methods[0]) for each in found]
    return {"settings": common.settings_of(arguments), "machine": common.machine(), "methods": rows}


def main() -> None:
    sizes = {"layers": 24, "hidden": 384, "vocabulary": 32_000, "batch": 8, "length": 128}
    arguments = common.parse(common.make_parser(__doc__, out=RESULT, rounds=10, warmup=2, **sizes, threads=2))
    common.measure_and_print(arguments, measure, markdown)


if __name__ == "__main__":
    main()
