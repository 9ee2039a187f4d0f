"""BIPEFT against uniform ranks at the same budget, on the quickstart's word problems.

    python benchmarks/adapter_search.py            # writes benchmarks/results/adapter_search.json
    python benchmarks/adapter_search.py --table    # prints the table of the result file

For each seed: a search on the training problems, a fifth of them held out for the choices; then, from the start and on
all training problems, the LoRA that was found and a LoRA of the same number of parameters with one rank on all layers;
with --random also rank 8 on layers drawn at random. All have the same steps and batches, and each the best of the same
rates, by the loss on problems of the training file that are held out. The figure is the loss on test problems, which
neither the search nor a training nor the choice of a rate has seen. What is done in --folder is not done again; with
other arguments or data the folder is refused. Needs runs/data/small, which `gradselect compare suites/small.yaml`
makes.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from collections import defaultdict
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import common
from peft import get_peft_model
from rich.console import Console

from gradselect.app.evaluate import evaluate
from gradselect.app.inputs import read_inputs
from gradselect.app.recipe import EvaluationSettings, Recipe, parse_recipe
from gradselect.app.stats import student_interval
from gradselect.app.train import train
from gradselect.app.tune import tune_adapters
from gradselect.files import sha256, write_atomically
from gradselect.integrations.bipeft import Allocation, budget_of_rank, sites_of

RESULT = common.RESULTS / "adapter_search.json"
DATA = Path("runs/data/small")
TEMPLATES = {"prompt": "Question: {question}\nAnswer:", "completion": " {answer}"}
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
            **TEMPLATES,
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
    held_out, losses = defaultdict[str, dict[str, float]](dict), defaultdict[str, dict[str, float]](dict)
    for (name, method), rate in product(methods.items(), arguments.rates):
        output = folder / f"train-{name}-{rate}"
        if not (output / "run.json").exists():
            ours = recipe(
                arguments,
                method=method,
                seed=seed,
                validation=str(arguments.held_out),
                output=output,
                rate=rate,
                steps=arguments.steps,
            )
            train(ours, console=console)
        held_out[name][str(rate)] = json.loads((output / "run.json").read_text("utf-8"))["validation_loss"]
        losses[name][str(rate)] = test_loss(output, arguments.test)
        print(f"seed {seed}  {name} at {rate}: {held_out[name][str(rate)]:.4f} held out", flush=True)
    return {
        "seed": seed,
        "budget": found.budget,
        "parameters": found.num_parameters,
        "layers": f"{len(found.ranks)} of {found.num_sites}",
        "ranks": dict(found.ranks),
        "stable_from": found.stable_from,
        "search_steps": found.num_steps,
        "held_out": held_out,
        "losses": losses,
    }


def test_loss(model: Path, test: Path) -> float:
    settings = EvaluationSettings(model=model, task="loss", data=test, device="cpu", **TEMPLATES)
    loss = evaluate(settings).loss
    assert loss is not None
    return loss


def table(result: dict[str, Any]) -> str:
    """Return the losses at each method's best rate, and the paired differences from uniform ranks over seeds.

    Results of before there were held-out problems have their rates chosen by the losses that they report.
    """
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
    """Return the rate of the smallest mean loss on held-out problems, and its loss for each seed."""
    by_rate = {
        rate: statistics.mean(seed.get("held_out", seed["losses"])[name][rate] for seed in seeds)
        for rate in seeds[0]["losses"][name]
    }
    best = min(by_rate, key=lambda rate: by_rate[rate])
    return best, [seed["losses"][name][best] for seed in seeds]


def rows_of(name: str, first: int, count: int, *, output: Path) -> Path:
    """Write some rows of a data file, and return their file."""
    lines = (DATA / name).read_text("utf-8").splitlines(keepends=True)[first : first + count]
    if len(lines) < count:
        raise SystemExit(f"{DATA / name} has no {count} rows after the first {first}; ask for fewer")
    write_atomically(output, "".join(lines))
    return output


def check_folder(folder: Path, setup: dict[str, Any]) -> None:
    """Write the setup into a new folder, or check that what is done there was done with the same one.

    Raises:
        SystemExit: it was not; names the arguments that differ.
    """
    file = folder / "setup.json"
    if not file.exists() and any(folder.glob("*")):
        raise SystemExit(f"{folder} holds something, and does not say with which arguments; name a new --folder")
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(setup, indent=2) + "\n")
    before = json.loads(file.read_text("utf-8"))
    if different := [f"{key}={before.get(key)}" for key in {**before, **setup} if before.get(key) != setup.get(key)]:
        raise SystemExit(f"{folder} was made with {', '.join(different)}; name a new --folder, or these arguments")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--search-steps", type=int, default=250)
    parser.add_argument("--search-rate", type=float, default=3e-2)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-2, 3e-2, 1e-1])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--num-test", type=int, default=400)
    parser.add_argument("--num-train", type=int, default=3600)
    parser.add_argument("--num-held-out", type=int, default=400)
    parser.add_argument("--random", action="store_true")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--folder", type=Path, default=Path("runs/adapter-search"))
    arguments = parser.parse_args()
    if not arguments.table:
        names = ("search_steps", "search_rate", "steps", "batch", "rates", "num_train", "num_held_out", "num_test")
        setup = {name: getattr(arguments, name) for name in names}
        data = {name: sha256(DATA / name) for name in ("train.jsonl", "test.jsonl")}
        check_folder(arguments.folder, {**setup, "data": data})
        arguments.train = rows_of("train.jsonl", 0, arguments.num_train, output=arguments.folder / "train.jsonl")
        arguments.held_out = rows_of(
            "train.jsonl", arguments.num_train, arguments.num_held_out, output=arguments.folder / "held-out.jsonl"
        )
        arguments.test = rows_of("test.jsonl", 0, arguments.num_test, output=arguments.folder / "test.jsonl")
        result: dict[str, Any] = {"setup": {**setup, "rank": RANK}, "seeds": []}
        for seed in range(arguments.seeds):
            result["seeds"].append(run_seed(arguments, seed, arguments.folder / str(seed)))
            RESULT.write_text(json.dumps(result, indent=2) + "\n", "utf-8")
    print(table(json.loads(RESULT.read_text("utf-8"))))


if __name__ == "__main__":
    main()
