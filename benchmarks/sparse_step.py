"""Time and bytes of the optimizers that train single entries, beside AdamW and the public package of ID3.

    python benchmarks/sparse_step.py                 # writes benchmarks/results/sparse_step.json and prints the tables
    python benchmarks/sparse_step.py --sizes 9M --rounds 3 --out /tmp/small.json
    python benchmarks/sparse_step.py --table

Decoders with random weights, 8.9 M (Llama, 8 x 256) and 55 M parameters (Qwen2, 24 x 384), fp32; budget 1 % of the
entries, T = 1000. Every method holds its own copy; the methods take turns, one step each a round.

The optimizer's cost is measured in two ways. `direct` is the time in its backward hooks, `step` and `zero_grad`.
`difference` is the whole step less the step of the same model without an optimizer in the same round, where gradients
are computed and dropped. Bytes come from a process of its own for each method: `live` counts every tensor that exists
at the worst moment of a step on eight tokens (weights, gradients, state, intermediate results); `resident` is what the
operating system counts beyond the fresh model.

ID3 grows, so the table has it twice: at its first steps, and at its last ones with a random set of entries, loaded.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import common
import torch
from torch import Tensor, nn

import gradselect as gs

RESULT = common.RESULTS / "sparse_step.json"
LR = 1e-5
DENSITY = 0.01
STEPS = 1000
NOTHING = "no optimizer"
BASELINE = "AdamW fused, full"
PACKAGE = "ID3, package selective-optimizers"

SIZES = {
    "9M": common.decoder_shape("llama", layers=8, width=256, mlp_width=683, heads=4, vocabulary=10_000, length=512),
    "55M": common.decoder_shape("qwen2", layers=24, width=384, mlp_width=1024, heads=6, vocabulary=32_000, length=512),
}


# The methods: each makes an optimizer from a fresh model and the number of steps to come ----------------------------


class NoOptimizer:
    """Drops the gradients: the cost that every method pays."""

    def __init__(self, model: nn.Module, num_steps: int) -> None:
        self._model = model

    def step(self) -> None: ...

    def zero_grad(self) -> None:
        self._model.zero_grad()


def adamw(model: nn.Module, num_steps: int) -> torch.optim.Optimizer:
    return common.fused_adamw(model, lr=LR)


def sparse(model: nn.Module, mask: gs.AbstractMask) -> gs.SparseOptimizer:
    return gs.SparseOptimizer(model, mask, lr=LR, weight_decay=0.0)


def first_id3(model: nn.Module, num_steps: int) -> gs.SparseOptimizer:
    return sparse(model, gs.ID3(density=DENSITY, steps=STEPS))


def last_id3(model: nn.Module, num_steps: int) -> gs.SparseOptimizer:
    """ID3 with `num_steps` steps to go. Which entries joined when is random; all else is as after a whole training."""
    optimizer = first_id3(model, num_steps)
    taken = STEPS - num_steps
    state_dict = optimizer.state_dict()
    named = dict(model.named_parameters())
    names = [name for group in state_dict["param_groups"] for name in group["param_names"]]
    quota = optimizer.mask.num_unmasked(taken - 1)
    counts = dealt_out([named[name].numel() for name in names], quota)
    state_dict["state"] = {i: entries(named[name], counts[i], taken) for i, name in enumerate(names)}
    state_dict["selection"]["step"] = taken
    optimizer.load_state_dict(state_dict)
    return optimizer


def dealt_out(sizes: list[int], quota: int) -> list[int]:
    """Share `quota` out in proportion to `sizes`; the largest gets the rest of the rounding."""
    counts = [quota * size // sum(sizes) for size in sizes]
    counts[sizes.index(max(sizes))] += quota - sum(counts)
    return counts


def entries(parameter: Tensor, count: int, taken: int) -> dict[str, Tensor]:
    """Return the state of `count` random entries that joined at random steps before step `taken`."""
    return {
        "indices": torch.randperm(parameter.numel())[:count],
        "joined_at": torch.randint(0, taken, (count,)).sort().values,
        "num_updates": torch.tensor(taken),
        "exp_avg": torch.zeros(count),
        "exp_avg_sq": torch.ones(count),
    }


def static(model: nn.Module, num_steps: int) -> gs.SparseOptimizer:
    return sparse(model, gs.StaticMask(salience=gs.salience.gradient, density=DENSITY))


def gmt(model: nn.Module, num_steps: int) -> gs.SparseOptimizer:
    return sparse(model, gs.GMT(fraction=0.2))


def package(model: nn.Module, num_steps: int) -> torch.optim.Optimizer:
    """The package as its documentation shows it. `verify=False`: it writes no copy of the model to the disk."""
    from selective_optimizers.wrap import get_selective_optimizer

    settings = {"budget": budget_of(model), "max_steps": STEPS, "eps": 0.1, "exp": 1.0, "verify": False}
    return get_selective_optimizer(torch.optim.AdamW, "id3")(model.parameters(), lr=LR, **settings)


METHODS: dict[str, Callable[[nn.Module, int], Any]] = {
    NOTHING: NoOptimizer,
    BASELINE: adamw,
    "ID3, first steps": first_id3,
    "ID3, last steps": last_id3,
    "StaticMask(gradient)": static,
    "GMT 20 %": gmt,
    PACKAGE: package,
}


def budget_of(model: nn.Module) -> int:
    """Return the number of entries that ID3 unmasks in all."""
    return max(1, round(DENSITY * sum(p.numel() for p in model.parameters())))


# Time ----------------------------------------------------------------------------------------------------------------


class HookTimer:
    """Measures the time in hooks that are registered while it watches.

    Attributes:
        laps: seconds of each backward pass.
    """

    def __init__(self) -> None:
        self.laps: list[float] = []
        self._seconds = 0.0

    def lap(self) -> None:
        self.laps.append(self._seconds)
        self._seconds = 0.0

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        original = torch.Tensor.register_post_accumulate_grad_hook

        def register(tensor: Tensor, hook: Callable[[Tensor], None]) -> Any:
            def timed(parameter: Tensor) -> None:
                start = time.perf_counter()
                hook(parameter)
                self._seconds += time.perf_counter() - start

            return original(tensor, timed)

        torch.Tensor.register_post_accumulate_grad_hook = register
        try:
            yield
        finally:
            torch.Tensor.register_post_accumulate_grad_hook = original


def make(size: str, name: str, num_steps: int) -> tuple[common.Method, HookTimer]:
    model, hooks = common.random_model(SIZES[size]), HookTimer()
    with hooks.watching():
        return common.Method(name, model, METHODS[name](model, num_steps), after_backward=hooks.lap), hooks


def measure_time(size: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Time all methods in turn. Returns a row a method."""
    names = dict.fromkeys([NOTHING, *arguments.methods])
    made = [make(size, name, arguments.warmup + arguments.rounds) for name in names]
    batches = common.random_batches(SIZES[size].vocab_size, batch=arguments.batch, length=arguments.length)
    common.take_turns([method for method, _ in made], batches, warmup=arguments.warmup, rounds=arguments.rounds)
    bare = made[0][0].seconds
    return [
        {
            "size": size,
            "method": method.name,
            "step_seconds": statistics.median(method.seconds),
            "direct_seconds": statistics.median(direct_seconds(method, hooks)),
            "difference_seconds": statistics.median(a - b for a, b in zip(method.seconds, bare, strict=True)),
        }
        for method, hooks in made
    ]


def direct_seconds(method: common.Method, hooks: HookTimer) -> list[float]:
    counted = hooks.laps[-len(method.seconds) :]
    return [step + in_hooks for step, in_hooks in zip(method.optimizer_seconds, counted, strict=True)]


# Bytes ---------------------------------------------------------------------------------------------------------------


def measure_bytes(size: str, name: str) -> dict[str, int]:
    """Return the bytes of one method, from a process of its own."""
    command = [sys.executable, __file__, "--bytes-of", size, name]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def bytes_of(size: str, name: str) -> dict[str, int]:
    """Train three steps on eight tokens; `live_peak` is of the third, `resident_beyond_model` of all."""
    model = common.random_model(SIZES[size])
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    weights = sum(parameter.nbytes for parameter in model.parameters())
    tokens = torch.arange(8).view(1, 8)
    live = common.LiveBytes()
    with live:
        optimizer = METHODS[name](model, 3)
        for _ in range(3):
            live.reset_peak()
            model(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    gc.collect()
    return {
        "weights": weights,
        "state": live.now,
        "live_peak": weights + live.peak,
        "resident_beyond_model": 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - resident),
        "budget": budget_of(model),
    }


# Result --------------------------------------------------------------------------------------------------------------


def markdown(result: dict[str, Any]) -> str:
    """Return one table for each size."""
    tables = []
    for size in dict.fromkeys(row["size"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["size"] == size]
        tables.append(f"{size} parameters\n\n" + table(rows))
    return "\n\n".join(tables)


def table(rows: list[dict[str, Any]]) -> str:
    by_name = {row["method"]: row for row in rows}
    headings = ["method", "direct ms", "difference ms", "direct / AdamW's", "package's direct / own"]
    headings += ["state, bytes per budgeted entry", "peak live MB", "peak resident beyond the model MB"]
    return common.markdown_table(
        headings,
        [
            [
                row["method"],
                f"{1e3 * row['direct_seconds']:.1f}",
                f"{1e3 * row['difference_seconds']:.1f}",
                ratio(row, by_name.get(BASELINE)),
                ratio(by_name.get(PACKAGE), row),
                *bytes_cells(row),
            ]
            for row in rows
        ],
    )


def bytes_cells(row: dict[str, Any]) -> list[str]:
    if "state" not in row:
        return [""] * 3
    peaks = (common.megabytes(row[key]) for key in ("live_peak", "resident_beyond_model"))
    return [f"{row['state'] / row['budget']:.1f}", *peaks]


def ratio(above: dict[str, Any] | None, below: dict[str, Any] | None) -> str:
    """Format the ratio of the medians of `direct`."""
    if above is None or below is None or NOTHING in (above["method"], below["method"]):
        return ""
    return f"{above['direct_seconds'] / below['direct_seconds']:.2f}"


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    rows = []
    for size in arguments.sizes:
        sizes = {name: measure_bytes(size, name) for name in arguments.methods} if arguments.bytes else {}
        rows += [row | sizes.get(row["method"], {}) for row in measure_time(size, arguments)]
    settings = {key: getattr(arguments, key) for key in ("rounds", "warmup", "batch", "length")}
    return {"settings": settings | {"density": DENSITY, "steps": STEPS}, "machine": common.machine(), "rows": rows}


def main() -> None:
    parser = common.make_parser(__doc__, out=RESULT, rounds=20, warmup=3, batch=2, length=64, threads=2)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--no-bytes", dest="bytes", action="store_false", help="time only")
    parser.add_argument("--bytes-of", nargs=2, metavar=("SIZE", "METHOD"), help="print the bytes of one method as JSON")
    arguments = common.parse(parser)
    if arguments.bytes_of:
        torch.set_num_threads(arguments.threads)
        print(json.dumps(bytes_of(*arguments.bytes_of)))
    else:
        common.measure_and_print(arguments, measure, markdown)


if __name__ == "__main__":
    gc.disable()
    main()
