"""Time and bytes of the optimizers that choose single weights, beside AdamW and the public package of ID3.

    python benchmarks/sparse_step.py                 # writes benchmarks/results/sparse_step.json and prints the tables
    python benchmarks/sparse_step.py --sizes 9M --rounds 3 --out /tmp/small.json
    python benchmarks/sparse_step.py --table

Randomly initialised decoders of 8.9 M (Llama, 8 x 256) and 55 M parameters (Qwen2, 24 x 384), fp32, budget 1 % of the
entries, T = 1000. Every method holds its own copy; the methods take turns, one step each a round.

What the optimizer costs is said in two ways: `direct` is the time in its backward hooks, `step` and `zero_grad`;
`difference` is the whole step less that of the same model without any optimizer in the same round, where gradients are
computed and dropped. Bytes come from a process of its own for each method: `live` counts every tensor that exists, at
the worst moment of a step on a batch of eight tokens (weights, gradients, state and what is computed on the way);
`resident` is what the operating system counts beyond the fresh model.

ID3 grows, so it stands in the table twice: at its first steps, and at its last ones with a set that was put together at
random and loaded.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import gradselect as gs

RESULT = Path(__file__).parent / "results" / "sparse_step.json"
LR = 1e-5
DENSITY = 0.01
STEPS = 1000
NOTHING = "no optimizer"
BASELINE = "AdamW fused, full"
PACKAGE = "ID3, package selective-optimizers"

SIZES: dict[str, transformers.PreTrainedConfig] = {
    "9M": transformers.LlamaConfig(
        num_hidden_layers=8,
        hidden_size=256,
        intermediate_size=683,
        num_attention_heads=4,
        vocab_size=10_000,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    ),
    "55M": transformers.Qwen2Config(
        num_hidden_layers=24,
        hidden_size=384,
        intermediate_size=1024,
        num_attention_heads=6,
        num_key_value_heads=6,
        vocab_size=32_000,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    ),
}


# The competitors: each from a fresh model and the number of steps that will be measured -----------------------------


class NoOptimizer:
    """Gradients are computed and dropped: what every method pays."""

    def __init__(self, model: nn.Module, num_steps: int) -> None:
        self._model = model

    def step(self) -> None: ...

    def zero_grad(self) -> None:
        self._model.zero_grad()


def adamw(model: nn.Module, num_steps: int) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0, fused=True)


def sparse(model: nn.Module, mask: gs.AbstractMask) -> gs.SparseOptimizer:
    return gs.SparseOptimizer(model, mask, lr=LR, weight_decay=0.0)


def first_id3(model: nn.Module, num_steps: int) -> gs.SparseOptimizer:
    return sparse(model, gs.ID3(density=DENSITY, steps=STEPS))


def last_id3(model: nn.Module, num_steps: int) -> gs.SparseOptimizer:
    """ID3 with so many steps to go: which entries joined when is drawn at random, all else is as it would be."""
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
    """`quota` in proportion to `sizes`; what rounding leaves goes to the largest."""
    counts = [quota * size // sum(sizes) for size in sizes]
    counts[sizes.index(max(sizes))] += quota - sum(counts)
    return counts


def entries(parameter: Tensor, count: int, taken: int) -> dict[str, Tensor]:
    """State of `count` random entries of a tensor that joined at random steps before step `taken`."""
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
    """As its documentation shows it; without `verify` it writes no copy of the model to the disk."""
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
    """Entries that ID3 unmasks in all."""
    return max(1, round(DENSITY * sum(p.numel() for p in model.parameters())))


# Time ----------------------------------------------------------------------------------------------------------------


@dataclass
class Method:
    """One competitor: its model, its optimizer and what was measured of it."""

    name: str
    model: nn.Module
    optimizer: Any
    hooks: Stopwatch
    seconds: list[float] = field(default_factory=list)
    direct_seconds: list[float] = field(default_factory=list)

    def step(self, tokens: Tensor, *, count: bool) -> None:
        """One training step; timed if it counts."""
        self.hooks.seconds = 0.0
        start = time.perf_counter()
        self.model(input_ids=tokens, labels=tokens).loss.backward()
        middle = time.perf_counter()
        self.optimizer.step()
        self.optimizer.zero_grad()
        end = time.perf_counter()
        if count:
            self.seconds.append(end - start)
            self.direct_seconds.append(end - middle + self.hooks.seconds)


@dataclass
class Stopwatch:
    """Adds up the time spent in hooks that were registered while it watched."""

    seconds: float = 0.0

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        original = torch.Tensor.register_post_accumulate_grad_hook

        def register(tensor: Tensor, hook: Callable[[Tensor], None]) -> Any:
            def timed(parameter: Tensor) -> None:
                start = time.perf_counter()
                hook(parameter)
                self.seconds += time.perf_counter() - start

            return original(tensor, timed)

        torch.Tensor.register_post_accumulate_grad_hook = register
        try:
            yield
        finally:
            torch.Tensor.register_post_accumulate_grad_hook = original


def fresh(size: str) -> nn.Module:
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(SIZES[size]).train()


def make(size: str, name: str, num_steps: int) -> Method:
    model, hooks = fresh(size), Stopwatch()
    with hooks.watching():
        return Method(name, model, METHODS[name](model, num_steps), hooks)


def measure_time(size: str, arguments: argparse.Namespace) -> list[Method]:
    """All methods, taking turns."""
    names = dict.fromkeys([NOTHING, *arguments.methods])
    methods = [make(size, name, arguments.warmup + arguments.rounds) for name in names]
    generator = torch.Generator().manual_seed(0)
    for round_number in range(-arguments.warmup, arguments.rounds):
        shape = (arguments.batch, arguments.length)
        tokens = torch.randint(0, SIZES[size].vocab_size, shape, generator=generator)
        for method in methods:
            method.step(tokens, count=round_number >= 0)
    return methods


# Bytes ---------------------------------------------------------------------------------------------------------------


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors that were made while it was on and still exist, and the most there ever were at once.

    What an operation allocates for itself inside its kernel is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now, self.peak = 0, 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in inputs:
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, num_bytes = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.now += num_bytes
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._remove, key, num_bytes)

    def _remove(self, key: int, num_bytes: int) -> None:
        self._known.discard(key)
        self.now -= num_bytes


def measure_bytes(size: str, name: str) -> dict[str, int]:
    """Of one method, in a process of its own."""
    command = [sys.executable, __file__, "--bytes-of", size, name]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def bytes_of(size: str, name: str) -> dict[str, int]:
    """Three steps on eight tokens; the third counts for `live`, all for `resident`."""
    model = fresh(size)
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    weights = sum(p.nbytes for p in model.parameters())
    tokens = torch.arange(8).view(1, 8)
    live = LiveBytes()
    with live:
        optimizer = METHODS[name](model, 3)
        for _ in range(3):
            live.peak = live.now
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


def rows_of(size: str, methods: list[Method], sizes: dict[str, dict[str, int]]) -> list[dict[str, Any]]:
    bare = methods[0].seconds
    rows = []
    for method in methods:
        differences = [own - without for own, without in zip(method.seconds, bare, strict=True)]
        rows.append(
            {
                "size": size,
                "method": method.name,
                "step_seconds": statistics.median(method.seconds),
                "direct_seconds": statistics.median(method.direct_seconds),
                "difference_seconds": statistics.median(differences),
            }
            | sizes.get(method.name, {})
        )
    return rows


def markdown(result: dict[str, Any]) -> str:
    """One table for each size."""
    tables = []
    for size in dict.fromkeys(row["size"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["size"] == size]
        tables.append(f"{size} parameters\n\n" + table(rows))
    return "\n\n".join(tables)


def table(rows: list[dict[str, Any]]) -> str:
    by_name = {row["method"]: row for row in rows}
    lines = [
        "| method | direct ms | difference ms | direct / AdamW's | package's direct / own "
        "| state, bytes per budgeted entry | peak live MB | peak resident beyond the model MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [row["method"], f"{1e3 * row['direct_seconds']:.1f}", f"{1e3 * row['difference_seconds']:.1f}"]
        cells.append(ratio(row, by_name.get(BASELINE)))
        cells.append(ratio(by_name.get(PACKAGE), row))
        if "state" in row:
            cells.append(f"{row['state'] / row['budget']:.1f}")
            cells += [f"{row[key] / 1e6:.1f}" for key in ("live_peak", "resident_beyond_model")]
        else:
            cells += [""] * 3
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def ratio(above: dict[str, Any] | None, below: dict[str, Any] | None) -> str:
    """Ratio of the medians of `direct`."""
    if above is None or below is None or NOTHING in (above["method"], below["method"]):
        return ""
    return f"{above['direct_seconds'] / below['direct_seconds']:.2f}"


def machine() -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        "processor": platform.machine(),
    }


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    if arguments.bytes_of:
        print(json.dumps(bytes_of(*arguments.bytes_of)))
        return
    if not arguments.table:
        rows = []
        for size in arguments.sizes:
            sizes = {name: measure_bytes(size, name) for name in arguments.methods} if arguments.bytes else {}
            rows += rows_of(size, measure_time(size, arguments), sizes)
        settings = {key: getattr(arguments, key) for key in ("rounds", "warmup", "batch", "length")}
        result = {"settings": settings | {"density": DENSITY, "steps": STEPS}, "machine": machine(), "rows": rows}
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(markdown(json.loads(arguments.out.read_text(encoding="utf-8"))))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-bytes", dest="bytes", action="store_false", help="time only")
    parser.add_argument("--bytes-of", nargs=2, metavar=("SIZE", "METHOD"), help="the bytes of one method, as JSON")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--table", action="store_true", help="print the table of the result file")
    return parser.parse_args()


if __name__ == "__main__":
    gc.disable()
    main()
