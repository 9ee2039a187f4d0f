"""BIPEFT against uniform ranks at the same budget, on the quickstart's word problems.

    python benchmarks/adapter_search.py            # writes benchmarks/results/adapter_search.json
    python benchmarks/adapter_search.py --table    # prints the table of the result file

For each seed: a search on the training problems, a fifth of them held out for the choices; then, from the start and on
all training problems, the LoRA that was found and a LoRA of the same number of parameters with one rank on all layers;
with --random also rank 8 on layers drawn at random. All have the same steps and batches, and each the best of the same
rates. The figure is the loss on problems that neither the search nor a training has seen. What is done in --folder is
not done again. Needs runs/data/small, which `gradselect compare suites/small.yaml` makes.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import common
from peft import get_peft_model
from rich.console import Console

from gradselect.app.inputs import read_inputs
from gradselect.app.recipe import Recipe, parse_recipe
from gradselect.app.stats import student_interval
from gradselect.app.train import train
from gradselect.app.tune import tune_adapters
from gradselect.integrations.bipeft import Allocation, budget_of_rank, sites_of

RESULT = common.RESULTS / "adapter_search.json"
DATA = Path("runs/data/small")
RANK = 2
LARGEST = 8


def recipe(
    arguments: argparse.Namespace,
    *,
    method: dict[str, Any],
    seed: int,
    validation: Any,
    output: Path,
    rate: float,
    steps: int,
) -> Recipe:
    values = {
        "model": {"path": "quickstart/base", "dtype": "float32"},
        "data": {
            "format": "prompt-completion",
            "path": str(arguments.train),
            "prompt": "Question: {question}\nAnswer:",
            "completion": " {answer}",
            "validation": validation,
            "max_length": 128,
        },
        "method": method,
        "optimizer": {"lr": rate, "schedule": "cosine", "warmup": 0.05},
        "run": {
            "output": str(output),
            "steps": steps,
            "batch_size": arguments.batch,
            "seed": seed,
            "log_every": 10,
            "report_to": [],
            "device": "cpu",
        },
    }
    return parse_recipe(values, source="benchmark")


def drawn_layers(plain: Recipe, budget: int, *, seed: int) -> Allocation:
    """Return the largest rank on layers in random order, as many as fit the budget."""
    model = get_peft_model(read_inputs(plain).model, plain.method.peft_config(embedding="", head=()))
    sites = list(sites_of(model))
    assert budget == budget_of_rank(tuple(sites), rank=RANK)
    random.Random(f"layers/{seed}").shuffle(sites)
    ranks, left = dict[str, int](), budget
    for site in sites:
        if site.num_parameters(rank=LARGEST) <= left:
            ranks[site.name] = LARGEST
            left -= site.num_parameters(rank=LARGEST)
    return Allocation(
        ranks=ranks,
        num_parameters=budget - left,
        budget=budget,
        num_sites=len(sites),
        stable_from=None,
        num_steps=0,
        scale=sites[0].scale,
    )


def run_seed(arguments: argparse.Namespace, seed: int, folder: Path) -> dict[str, Any]:
    console, lora = Console(quiet=True), {"name": "lora", "rank": RANK}
    searched = recipe(
        arguments,
        method=lora,
        seed=seed,
        validation=0.2,
        output=folder / "search",
        rate=arguments.search_rate,
        steps=arguments.search_steps,
    )
    kept = folder / "tune" / "allocation.json"
    if not kept.exists():
        tune_adapters(searched, study=folder / "tune", ranks=(1, 4, LARGEST), seed=seed, console=console)
    found = Allocation(**json.loads(kept.read_text("utf-8")))
    methods = {"uniform": lora, "found": {"name": "peft", "type": "LORA", "options": found.options()}}
    if arguments.random:
        drawn = drawn_layers(searched, found.budget, seed=seed)
        methods["random"] = {"name": "peft", "type": "LORA", "options": drawn.options()}
    losses = dict[str, dict[str, float]]()
    for (name, method), rate in product(methods.items(), arguments.rates):
        output = folder / f"train-{name}-{rate}"
        if not (output / "run.json").exists():
            ours = recipe(
                arguments,
                method=method,
                seed=seed,
                validation=str(arguments.test),
                output=output,
                rate=rate,
                steps=arguments.steps,
            )
            train(ours, console=console)
        losses.setdefault(name, {})[str(rate)] = json.loads((output / "run.json").read_text("utf-8"))["validation_loss"]
        print(f"seed {seed}  {name} at {rate}: {losses[name][str(rate)]:.4f}", flush=True)
    return {
        "seed": seed,
        "budget": found.budget,
        "parameters": found.num_parameters,
        "layers": f"{len(found.ranks)} of {found.num_sites}",
        "ranks": dict(found.ranks),
        "stable_from": found.stable_from,
        "search_steps": found.num_steps,
        "losses": losses,
    }


def table(result: dict[str, Any]) -> str:
    """Return the losses at each method's best rate, and the paired differences from uniform ranks over seeds."""
    seeds = result["seeds"]
    best = {name: best_losses(seeds, name) for name in seeds[0]["losses"]}
    lines = ["| LoRA | best rate | loss on unseen problems | minus uniform | 95 % interval |", "|---|---|---|---|---|"]
    for name, (rate, losses) in best.items():
        gaps = [ours - theirs for ours, theirs in zip(losses, best["uniform"][1], strict=True)]
        between = student_interval(gaps)
        spread = "" if between is None else f"{between[0]:+.4f} to {between[1]:+.4f}"
        behind = ["", ""] if name == "uniform" else [f"{statistics.mean(gaps):+.4f}", spread]
        lines.append(f"| {name} | {rate} | {statistics.mean(losses):.4f} | {behind[0]} | {behind[1]} |")
    return "\n".join(lines)


def best_losses(seeds: Sequence[dict[str, Any]], name: str) -> tuple[str, list[float]]:
    """Return the rate of the smallest mean loss, and its loss for each seed."""
    by_rate = {rate: [seed["losses"][name][rate] for seed in seeds] for rate in seeds[0]["losses"][name]}
    return min(by_rate.items(), key=lambda item: statistics.mean(item[1]))


def head_of(name: str, count: int, *, folder: Path) -> Path:
    """Write the first rows of a data file, and return their file."""
    lines = (DATA / name).read_text("utf-8").splitlines(keepends=True)
    (folder / name).write_text("".join(lines[:count]), "utf-8")
    return folder / name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--search-steps", type=int, default=250)
    parser.add_argument("--search-rate", type=float, default=3e-2)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-2, 3e-2, 1e-1])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--num-test", type=int, default=400)
    parser.add_argument("--num-train", type=int, default=4000)
    parser.add_argument("--random", action="store_true")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--folder", type=Path, default=Path("runs/adapter-search"))
    arguments = parser.parse_args()
    if not arguments.table:
        arguments.folder.mkdir(parents=True, exist_ok=True)
        arguments.train = head_of("train.jsonl", arguments.num_train, folder=arguments.folder)
        arguments.test = head_of("test.jsonl", arguments.num_test, folder=arguments.folder)
        setup = {
            name: getattr(arguments, name)
            for name in ("search_steps", "search_rate", "steps", "batch", "rates", "num_train", "num_test")
        }
        result: dict[str, Any] = {"setup": {**setup, "rank": RANK}, "seeds": []}
        for seed in range(arguments.seeds):
            result["seeds"].append(run_seed(arguments, seed, arguments.folder / str(seed)))
            RESULT.write_text(json.dumps(result, indent=2) + "\n", "utf-8")
    print(table(json.loads(RESULT.read_text("utf-8"))))


if __name__ == "__main__":
    main()
