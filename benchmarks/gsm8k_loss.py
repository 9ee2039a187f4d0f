"""Held-out loss of fine-tuning methods on GSM8K at equal steps, each at its best learning rate.

    python benchmarks/gsm8k_loss.py --model MODEL --train TRAIN.jsonl --test TEST.jsonl
    python benchmarks/gsm8k_loss.py --table    # from benchmarks/results/gsm8k_loss.jsonl

Every run is `gradselect train` with `benchmarks/recipes/gsm8k_loss.yaml`, then `gradselect evaluate --task loss`. The
first seed finds the rate; further seeds run at that rate only. A run that is in the result file is not run again, so
the command resumes where it was stopped.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from common import RESULTS, ROOT, append_row, make_parser, markdown_table, parse, read_result, read_rows

RESULT = RESULTS / "gsm8k_loss.jsonl"
RECIPE = ROOT / "benchmarks" / "recipes" / "gsm8k_loss.yaml"

# Two of the six layers train at each step; the cumulative score explores for a third of the run.
ADAGRADSELECT = "name: adagradselect, fraction: 0.33, explore_steps: 33, among: [layer.*]"
UNIFORM = "name: uniform, fraction: 0.33, among: [layer.*]"
METHODS = {
    "AdaGradSelect 33 %": f"method={{{ADAGRADSELECT}}}",
    "AdaGradSelect 33 % + embedding": f"method={{{ADAGRADSELECT}, always: [embedding]}}",
    "full": "method.name=full",
    "LoRA r=64": "method={name: lora, rank: 64}",
    "LoRA r=64 + embedding": "method={name: lora, rank: 64, train_embedding: true}",
    "uniform 33 %": f"method={{{UNIFORM}}}",
    "uniform 33 % + embedding": f"method={{{UNIFORM}, always: [embedding]}}",
}
RATES: dict[str, tuple[float, ...]] = dict.fromkeys(METHODS, (3e-4, 1e-3, 3e-3)) | {"LoRA r=64": (1e-3, 3e-3, 1e-2)}

Row = dict[str, Any]


def search(arguments: argparse.Namespace, rates: Mapping[str, Sequence[float]], run: Callable[[Row], Row]) -> None:
    """Call `run` with method, lr and seed of each row that the result file lacks, and add what it returns."""
    for seed in range(arguments.seeds):
        for method in arguments.only or rates:
            for lr in rates[method] if seed == 0 else [best_rate(method, arguments.out)]:
                key = {"method": method, "lr": lr, "seed": seed}
                if not any(key.items() <= row.items() for row in read_rows(arguments.out)):
                    append_row(arguments.out, key | run(key))


def best_rate(method: str, results: Path) -> float:
    """Return the learning rate of the lowest loss with the first seed."""
    rows = [row for row in read_rows(results) if row["method"] == method and row["seed"] == 0]
    return min((row["loss"], row["lr"]) for row in rows)[1]


def train_and_evaluate(arguments: argparse.Namespace, setting: str, key: Row) -> Row:
    """Train with the method that the override `setting` names; return the figures of the run."""
    output, evaluated = arguments.work / "run", arguments.work / "loss"
    shutil.rmtree(output, ignore_errors=True)
    shutil.rmtree(evaluated, ignore_errors=True)
    fixed = [f"model.path={arguments.model}", f"data.path={arguments.train}", f"run.output={output}"]
    variable = [setting, f"optimizer.lr={key['lr']}", f"run.seed={key['seed']}", f"run.steps={arguments.steps}"]
    gradselect("train", str(RECIPE), *fixed, *variable)
    limit = ("--limit", str(arguments.limit)) if arguments.limit else ()
    where = ("--data", str(arguments.test), "--output", str(evaluated))
    gradselect("evaluate", str(output), "--task", "loss", *where, *limit)
    result = read_result(evaluated / "result.json")
    return {
        "steps": arguments.steps,
        "loss": result["loss"],
        "num_items": result["num_items"],
        "train_seconds": read_result(output / "run.json")["training_seconds"],
        "versions": result["versions"],
    }


def gradselect(*words: str) -> None:
    command = [str(Path(sys.executable).with_name("gradselect")), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout}\n{done.stderr}")


def table(rows: Sequence[Row]) -> str:
    """Return a line a method: the mean loss over seeds at each rate, the best in bold."""
    methods = dict.fromkeys(row["method"] for row in rows)
    return markdown_table(
        ["method", "lr: held-out loss, mean of seeds (each seed)", "best"],
        [[method, *cells([row for row in rows if row["method"] == method])] for method in methods],
    )


def cells(rows: Sequence[Row]) -> list[str]:
    losses = {lr: [row["loss"] for row in rows if row["lr"] == lr] for lr in sorted({row["lr"] for row in rows})}
    means = {lr: statistics.mean(found) for lr, found in losses.items()}
    each = (f"{lr:g}: {means[lr]:.3f} ({', '.join(f'{loss:.3f}' for loss in losses[lr])})" for lr in losses)
    return ["; ".join(each), f"**{min(means.values()):.3f}**"]


def parse_search(doc: str | None, *, out: Path, methods: Sequence[str], limit: int | None) -> argparse.Namespace:
    parser = make_parser(doc, out=out, steps=100, seeds=2)
    for name in ("model", "train", "test"):
        parser.add_argument(f"--{name}", type=Path)
    parser.add_argument("--work", type=Path, default=Path("runs", out.stem), help="the folder of runs")
    parser.add_argument("--limit", type=int, default=limit, help="evaluate on the first LIMIT test problems only")
    parser.add_argument("--only", nargs="+", choices=methods, help="these methods, e.g. to run two halves side by side")
    return parse(parser, "model", "train", "test")


def main() -> None:
    arguments = parse_search(__doc__, out=RESULT, methods=list(METHODS), limit=None)
    if not arguments.table:
        search(arguments, RATES, lambda key: train_and_evaluate(arguments, METHODS[key["method"]], key))
    print(table(read_rows(arguments.out)))


if __name__ == "__main__":
    main()
