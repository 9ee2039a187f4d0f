"""Time and bytes of one training step, method by method, against full fine-tuning in the same run.

    python benchmarks/step_time.py                      # writes benchmarks/results/step_time.json and prints the table
    python benchmarks/step_time.py --rounds 3 --layers 4 --hidden 64 --vocabulary 500 --out /tmp/small.json

Every method trains its own copy of one Qwen2-type model with random weights. The methods take turns, one step each a
round. A ratio is taken inside a round, and the table has its median. `limit` is the speed-up that the FLOPs allow for
the drawn steps, see `gradselect.blocks.StepCost`; `of limit` is the share of it that was reached.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import common
import torch
from torch import nn

import gradselect as gs
from gradselect.blocks import StepCost, speed_up_limit

RESULT = common.RESULTS / "step_time.json"
LR = 1e-5
LORA_RANKS = (16, 256)
SLICES = ("layer.*.columns.*",)


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


@dataclass(frozen=True, kw_only=True)
class Selection:
    """A policy on a partition: what makes the optimizer of a model.

    Args:
        policy: selects.
        partition: arguments of `gradselect.partition`.
        settings: further arguments of `BlockOptimizer`.
    """

    policy: gs.AbstractPolicy
    partition: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, model: nn.Module) -> gs.BlockOptimizer:
        blocks = gs.partition(model, **self.partition)
        return gs.BlockOptimizer(
            model, self.policy, blocks=blocks, lr=LR, rule=gs.AdamWRule(fused=True), **self.settings
        )

    def cost(self, model: nn.Module) -> StepCost:
        """Return the cost of steps of the model that `__call__` has partitioned."""
        return StepCost.of_model(model, gs.partition(model, **self.partition))


def exploiting(share: float, **settings: Any) -> Selection:
    """AdaGradSelect that explores in the first step alone."""
    return Selection(policy=gs.AdaGradSelect(fraction=share, explore_steps=1), settings=settings)


def cost_aware(**partition: Any) -> Selection:
    """Depths drawn by gain per time, the embedding left out, as many blocks as AdaGradSelect's 20 % of the layers."""
    among = SLICES if partition else ("layer.*",)
    share = 1 / 8 if partition else 0.2
    return Selection(policy=gs.CostAware(fraction=share, among=among, explore_steps=1), partition=partition)


def slices(parts: int, *, layers: int | None = None, by: str = "columns") -> Selection:
    """One of `parts` ranges of each layer, another one at each step; if `layers` is given, of their upper half only."""
    where = SLICES if layers is None else tuple(f"layer.{n}.columns.*" for n in range(layers // 2, layers))
    among = tuple(name.replace("columns", by) for name in where)
    policy = gs.Stratified(count=1, order="rotate", among=among)
    return Selection(policy=policy, partition={"by": by, "parts": parts})


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


def optimizers(layers: int) -> dict[str, Callable[[nn.Module], Any]]:
    """Return what makes the optimizer of each method; `layers` is their number."""
    return {
        "full, torch AdamW fused": FULL,
        "full, All()": Selection(policy=gs.All()),
        "AdaGradSelect 10 %, exploit": exploiting(0.1),
        "AdaGradSelect 20 %, exploit": exploiting(0.2),
        "AdaGradSelect 20 %, exploit, Offload()": exploiting(0.2, residency=gs.Offload()),
        "AdaGradSelect 20 %, exploit, Drop()": exploiting(0.2, residency=gs.Drop()),
        "AdaGradSelect 20 %, exploit, embedding always": exploiting(0.2, always=("embedding",)),
        "AdaGradSelect 30 %, exploit": exploiting(0.3),
        "AdaGradSelect 20 %, explore": Selection(policy=gs.AdaGradSelect(fraction=0.2, explore_steps=10**9)),
        "cost-aware, 20 % of layers, exploit": cost_aware(),
        "slices, 1/4 of the columns": slices(4),
        "slices, 1/8 of the columns": slices(8),
        "slices, 1/8 of the rows": slices(8, by="rows"),
        "slices, 1/8 of the columns, upper half": slices(8, layers=layers),
        "slices, 1/8, cost-aware, exploit": cost_aware(by="columns", parts=8),
        "LISA, 2 layers + embedding, norm, head": Selection(
            policy=gs.Uniform(count=2, every=20), settings={"always": ("embedding", "norm", "head")}
        ),
        "BAdam, 1 block": Selection(policy=gs.Cyclic(every=2), settings={"residency": gs.Drop()}),
    }


class Competitor:
    """A method, and the bytes of its gradients after the backward pass at their most."""

    def __init__(self, name: str, model: nn.Module, make_optimizer: Callable[[nn.Module], Any]) -> None:
        self.gradient_bytes = 0
        self.make_optimizer = make_optimizer
        self.method = common.Method(name, model, make_optimizer(model), after_backward=self._after_backward)
        self.clock = UpdateClock(own) if isinstance(own := self.method.optimizer, gs.BlockOptimizer) else None

    def _after_backward(self) -> None:
        self.gradient_bytes = max(self.gradient_bytes, common.gradient_bytes(self.method.model.parameters()))
        if self.clock is not None:
            self.clock.begin()

    def row(self, baseline: common.Method) -> dict[str, Any]:
        own, state, limit = self.method, common.state_bytes(self.method.optimizer), self._flop_limit()
        speed_up = common.ratio_columns("speed_up", baseline.seconds, own.seconds)
        return {
            "method": own.name,
            **speed_up,
            "flop_limit": limit,
            "limit_reached": None if limit is None else speed_up["speed_up"] / limit,
            "seconds": statistics.median(own.seconds),
            "optimizer_seconds": statistics.median(own.optimizer_seconds),
            "bookkeeping_share": self._bookkeeping_share(),
            "state_on_device_bytes": state["device"],
            "state_on_host_bytes": state["host"],
            "gradient_bytes_after_backward": self.gradient_bytes,
        }

    def _flop_limit(self) -> float | None:
        """Return the speed-up that FLOPs allow; None for an optimizer that does not tell what it trains."""
        model = self.method.model
        if self.clock is None or not isinstance(self.make_optimizer, Selection):
            trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
            cost = StepCost.of_model(model, {"trained": trained})
            return 1 / cost.relative_time(["trained"]) if self.make_optimizer is FULL else None
        cost, records = self.make_optimizer.cost(model), self.clock.records[-len(self.method.seconds) :]
        trained = [cost.weights if record.explored else record.selected for record in records]
        return speed_up_limit(trained, cost)

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
    for name, make_optimizer in optimizers(arguments.layers).items():
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
    """Return the table of a result; without the share of the limit for a result that was made before it had one."""
    rows = [_cells(row) for row in result["methods"]]
    unknown = {"of limit"} if all("limit_reached" not in row for row in result["methods"]) else set()
    headings = [heading for heading in rows[0] if heading not in unknown]
    return common.markdown_table(headings, [[cells[heading] for heading in headings] for cells in rows])


def _cells(row: Mapping[str, Any]) -> dict[str, str]:
    return {
        "method": row["method"],
        "speed-up": f"{row['speed_up']:.2f}",
        "min-max": f"{row['speed_up_min']:.2f}-{row['speed_up_max']:.2f}",
        "limit": "" if row["flop_limit"] is None else f"{row['flop_limit']:.2f}",
        "of limit": "" if row.get("limit_reached") is None else f"{100 * row['limit_reached']:.0f} %",
        "optimizer s": f"{row['optimizer_seconds']:.3f}",
        "bookkeeping": "" if row["bookkeeping_share"] is None else f"{100 * row['bookkeeping_share']:.2f} %",
        "state MB": common.megabytes(row["state_on_device_bytes"], digits=0),
        "on host MB": common.megabytes(row["state_on_host_bytes"], digits=0),
        "gradients MB": common.megabytes(row["gradient_bytes_after_backward"], digits=0),
    }


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
