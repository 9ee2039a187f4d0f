"""Cost of the checks in a step: what each takes, and step times of two versions of the library in one run.

    python benchmarks/hot_path.py                                  # shares of the checks; prints a table
    git worktree add /tmp/before v0.1.0                            # another version of the source, for example
    python benchmarks/hot_path.py --against /tmp/before/src        # and step times of both, in turns

Each case trains a Llama-type model with random weights. A check's share is the median, over steps after the first, of
its seconds divided by the seconds of its step. With `--against` each version runs in a process of its own; the two take
turns step by step, so that both meet the same noise, and the ratio is the median over rounds. Result:
benchmarks/results/hot_path.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

RESULT = Path(__file__).parent / "results" / "hot_path.json"
SHAPE = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 8, "num_attention_heads": 8}
VOCABULARY, BATCH, LENGTH = 4096, 8, 128

CASES: dict[str, tuple[str, str]] = {
    "uniform, float32": ("uniform", "float32"),
    "uniform, bfloat16": ("uniform", "bfloat16"),
    "adagradselect, float32": ("adagradselect", "float32"),
    "id3, bfloat16": ("id3", "bfloat16"),
}

CHECKS = {
    "gradselect.core.watch.ModelWatch": ("check", "before_forward", "after_forward", "refreeze"),
    "gradselect.core.state.BlockStates": ("follow_weights",),
    "gradselect.blocks.reach.Reach": ("conclude",),
}
"""Methods whose seconds are taken; one that runs within another counts once."""


def build(case: str) -> tuple[Any, Any]:
    import gradselect as gs

    method, dtype = CASES[case]
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **SHAPE)).to(getattr(torch, dtype)).train()
    if method == "id3":
        return model, gs.SparseOptimizer(model, gs.ID3(density=0.01, steps=20), lr=1e-4)
    policy = gs.Uniform(fraction=0.3) if method == "uniform" else gs.AdaGradSelect(fraction=0.3, explore_steps=8)
    return model, gs.BlockOptimizer(model, policy, lr=1e-4, rule=gs.AdamWRule(fused=True))


def steps(case: str) -> Iterator[float]:
    """Seconds of each step: forward, backward and update."""
    model, optimizer = build(case)
    for step in range(10**6):
        ids = torch.randint(VOCABULARY, (BATCH, LENGTH), generator=torch.Generator().manual_seed(step))
        start = time.perf_counter()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield time.perf_counter() - start


# Shares of the checks ------------------------------------------------------------------------------------------------


@contextmanager
def timed_checks() -> Iterator[dict[str, float]]:
    """Add up the seconds of every check, by name, in the dictionary that is given."""
    seconds: dict[str, float] = defaultdict(float)
    depth = 0
    undo: list[Callable[[], None]] = []

    def replace(owner: type, name: str) -> None:
        method = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            nonlocal depth
            depth += 1
            start = time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                depth -= 1
                if depth == 0:
                    seconds[f"{owner.__name__}.{name}"] += time.perf_counter() - start

        setattr(owner, name, timed)
        undo.append(lambda: setattr(owner, name, method))

    for path, names in CHECKS.items():
        module, _, kind = path.rpartition(".")
        owner = getattr(__import__(module, fromlist=[kind]), kind)
        for name in names:
            replace(owner, name)
    try:
        yield seconds
    finally:
        for each in undo:
            each()


def shares(case: str, *, rounds: int) -> dict[str, float]:
    """Median share of each check in a step, after the first one."""
    found: dict[str, list[float]] = defaultdict(list)
    with timed_checks() as seconds:
        for step, whole in enumerate(steps(case)):
            if step > 1:
                for name in {*seconds, *found}:
                    found[name].append(seconds.get(name, 0.0) / whole)
            seconds.clear()
            if step == rounds + 1:
                break
    return {name: statistics.median(values) for name, values in found.items()}


# Two versions --------------------------------------------------------------------------------------------------------


class Version:
    """A process that trains with the library in one folder, a step at a time."""

    def __init__(self, source: Path, case: str) -> None:
        environment = {**os.environ, "PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__, "--serve", case]
        self._process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def step(self) -> float:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("step\n")
        self._process.stdin.flush()
        return float(self._process.stdout.readline())

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def serve(case: str) -> None:
    for line, seconds in zip(sys.stdin, steps(case), strict=False):
        assert line
        print(seconds, flush=True)


def ratio(case: str, before: Path, *, rounds: int) -> dict[str, float]:
    """Median ratio of the step times, now to before, and its quartiles; the order changes with each round."""
    versions = {"now": Version(Path(__file__).parent.parent / "src", case), "before": Version(before, case)}
    ratios, times = [], defaultdict(list)
    for number in range(rounds + 3):
        order = ("now", "before") if number % 2 else ("before", "now")
        taken = {name: versions[name].step() for name in order}
        if number >= 3:
            ratios.append(taken["now"] / taken["before"])
            for name, seconds in taken.items():
                times[name].append(seconds)
    for version in versions.values():
        version.close()
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {
        "ratio": middle,
        "lower_quartile": low,
        "upper_quartile": high,
        **{f"milliseconds_{name}": 1000 * statistics.median(values) for name, values in times.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, help="folder with another version of the package gradselect")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.serve:
        serve(arguments.serve)
        return
    found: dict[str, Any] = {}
    for case in CASES:
        parts = shares(case, rounds=arguments.rounds)
        found[case] = {"share_of_all_checks": sum(parts.values()), "shares": parts}
        if arguments.against is not None:
            found[case] |= ratio(case, arguments.against, rounds=arguments.rounds)
        print(case, *(f"{name} {value:.4%}" for name, value in parts.items()), sep="\n  ")
        print(*(f"  {name} {value:.4f}" for name, value in found[case].items() if isinstance(value, float)), sep="\n")
    arguments.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
