"""Reinforcement learning of one random weight in a hundred, beside all of them, on the quickstart's word problems.

    python benchmarks/grpo.py
    python benchmarks/grpo.py --rates mask=1e-2,3e-2 full=1e-4,1e-3
    python benchmarks/grpo.py --table

Fine-tunes the quickstart's base until it solves some problems, then runs `recipes/grpo-random-mask.yaml` with its mask
and with full training: a short run at each learning rate, then a longer one at the smallest rate whose reward at the
end is within one standard error of the best. All runs see the same problems in the same order. Greedy answers to
problems that no run has seen are the judge. The result file is written after each run; a measurement that was stopped
goes on where it was, if the settings are the same.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, ROOT, machine, make_parser, markdown_table, parse, read_result, settings_of, write_result
from rich.console import Console

from gradselect.app.evaluate import EvaluationSettings, evaluate
from gradselect.app.recipe import load_recipe
from gradselect.app.train import train
from gradselect.app.word_problems import problems

RESULT = RESULTS / "grpo.json"
RECIPE = ROOT / "recipes" / "grpo-random-mask.yaml"
METHODS = {"mask": ("random 1 %", ()), "full": ("full", ("method.name=full",))}
"""Name in the table, and changes to the recipe."""
RATES = {"mask": [1e-2, 3e-2, 1e-1], "full": [1e-4, 3e-4, 1e-3]}
NUM_EDGE = 10
"""Steps at either end of a run whose mean reward is reported."""


def main() -> None:
    parser = make_parser(__doc__, out=RESULT, threads=1, start=80, sweep=25, steps=90, problems=4000, test=400)
    parser.add_argument("--rates", nargs="+", type=parse_rates, metavar="mask=RATE,...", help="rates of the sweep")
    arguments = parse(parser)
    if not arguments.table:
        arguments.rates = RATES | dict(arguments.rates or ())
        torch.set_num_threads(arguments.threads)
        with tempfile.TemporaryDirectory() as folder:
            measure(arguments, Path(folder))
    print(markdown(read_result(arguments.out)))


def parse_rates(text: str) -> tuple[str, list[float]]:
    """Parse `mask=1e-2,3e-2`."""
    name, _, rates = text.partition("=")
    if name not in METHODS:
        raise argparse.ArgumentTypeError(f"{text!r} names none of {', '.join(METHODS)}; write e.g. mask=1e-2,3e-2")
    return name, [float(rate) for rate in rates.split(",")]


def measure(arguments: argparse.Namespace, folder: Path) -> None:
    """Make the start model, run the sweep and the long runs, and write the result file after each."""
    for split, count in (("train", arguments.problems), ("test", arguments.test)):
        lines = (json.dumps(row) + "\n" for row in problems(count=count, seed=1, split=split))
        (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    start = make_start(folder, steps=arguments.start)
    result = begin_or_go_on(arguments, before=accuracy(start, folder))
    for name, rates in arguments.rates.items():
        for rate in rates[len(result["sweep"][name]) :]:
            run, _ = reinforce(start, folder, method=name, rate=rate, steps=arguments.sweep)
            result["sweep"][name].append(run)
            write_result(arguments.out, result)
    for name in [name for name in METHODS if name not in result["runs"]]:
        rate = choose_rate(result["sweep"][name])
        run, model = reinforce(start, folder, method=name, rate=rate, steps=arguments.steps)
        result["runs"][name] = run | {"after": accuracy(model, folder)}
        write_result(arguments.out, result)


def begin_or_go_on(arguments: argparse.Namespace, *, before: dict[str, Any]) -> dict[str, Any]:
    """Return the result file if it is an unfinished measurement with these settings, else an empty result."""
    settings = settings_of(arguments)
    if arguments.out.exists():
        found = read_result(arguments.out)
        if found.get("settings") == settings and found["before"] == before and len(found["runs"]) < len(METHODS):
            return found | {"went_on": [*found.get("went_on", []), machine()]}
    sweep = {name: [] for name in METHODS}
    return {
        "machine": machine(),
        "settings": settings,
        "edge_steps": NUM_EDGE,
        "before": before,
        "sweep": sweep,
        "runs": {},
    }


def choose_rate(runs: Sequence[dict[str, Any]]) -> float:
    """Return the smallest rate of a sweep whose reward at the end is within one standard error of the best.

    The run at the chosen rate is longer, and its rate stays high for longer: of equals the smaller one is safer.
    """
    best = max((run["reward_last"] for run in runs), key=lambda reward: reward["mean"])
    least = best["mean"] - best["standard_error"]
    return min(run["learning_rate"] for run in runs if run["reward_last"]["mean"] >= least)


def make_start(folder: Path, *, steps: int) -> Path:
    """Fine-tune the base of the quickstart for a few steps."""
    overrides = [
        *(f"model.path={ROOT / 'quickstart' / 'base'}", f"data.path={folder / 'train.jsonl'}"),
        *(f"run.output={folder / 'start'}", f"run.steps={steps}", "method.name=full", "run.report_to=[]"),
    ]
    return train(load_recipe(ROOT / "recipes" / "quickstart.yaml", overrides), console=Console())


def reinforce(start: Path, folder: Path, *, method: str, rate: float, steps: int) -> tuple[dict[str, Any], Path]:
    """Run GRPO from `start`. Returns what to keep of it, and its model."""
    output = folder / f"{method}-{rate:g}-{steps}"
    overrides = [
        *(f"model.path={start}", f"data.path={folder / 'train.jsonl'}", f"run.output={output}"),
        *(f"run.steps={steps}", "run.log_every=1", "run.report_to=[]", f"optimizer.lr={rate}", *METHODS[method][1]),
    ]
    train(load_recipe(RECIPE, overrides), console=Console())
    record = json.loads((output / "run.json").read_text(encoding="utf-8"))
    history = [entry for entry in record["history"] if "reward" in entry]
    rewards = [entry["reward"] for entry in history]
    return {
        "learning_rate": rate,
        "steps": steps,
        "entries": (record["selection"] or {}).get("entries"),
        "reward_first": mean_and_error(rewards[:NUM_EDGE]),
        "reward_last": mean_and_error(rewards[-NUM_EDGE:]),
        "rewards": rewards,
        "answer_tokens": [entry["completions/mean_length"] for entry in history],
        "state_bytes": record["bytes"]["peak"]["state_on_device"],
        "tokens_per_second": record["tokens_per_second"],
        "training_seconds": record["training_seconds"],
    }, output


def mean_and_error(rewards: Sequence[float]) -> dict[str, float]:
    """Return the mean of the rewards of steps, each with its own problems, and its standard error."""
    return {"mean": statistics.fmean(rewards), "standard_error": statistics.stdev(rewards) / math.sqrt(len(rewards))}


def accuracy(model: Path, folder: Path) -> dict[str, Any]:
    """Return the share of right greedy answers to the unseen problems, with its 95 % interval."""
    settings = EvaluationSettings(
        model=model, task="gsm8k", data=folder / "test.jsonl", batch_size=100, max_new_tokens=80
    )
    found = evaluate(settings)
    assert found.interval is not None
    return {"accuracy": found.accuracy, "interval": [*found.interval], "num_problems": found.num_items}


def markdown(result: dict[str, Any]) -> str:
    """Return the table of the long runs, and under it that of the sweep."""
    edge, before = result["edge_steps"], result["before"]
    lines = [
        [
            METHODS[name][0],
            f"{run['learning_rate']:g}",
            *(with_error(run[key]) for key in ("reward_first", "reward_last")),
            *(with_interval(found) for found in (before, run["after"])),
            f"{run['state_bytes']:,}",
        ]
        for name, run in result["runs"].items()
    ]
    ends = (f"reward, first {edge} steps", f"last {edge} steps")
    headings = ["trained", "rate", *ends, "greedy accuracy before", "after", "bytes of optimizer state"]
    rates = [
        [METHODS[name][0], f"{run['learning_rate']:g}", with_error(run["reward_first"]), with_error(run["reward_last"])]
        for name, runs in result["sweep"].items()
        for run in runs
    ]
    return "\n\n".join([markdown_table(headings, lines), markdown_table(["trained", "rate", *ends], rates)])


def with_error(value: dict[str, float]) -> str:
    return f"{value['mean']:.3f} ± {value['standard_error']:.3f}"


def with_interval(value: dict[str, Any]) -> str:
    low, high = value["interval"]
    return f"{100 * value['accuracy']:.1f} % ({100 * low:.1f} to {100 * high:.1f})"


if __name__ == "__main__":
    main()
