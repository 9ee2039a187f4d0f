"""Held-out loss of fine-tuning methods on GSM8K at equal steps, each at its best learning rate.

    python benchmarks/gsm8k_loss.py --model MODEL --train TRAIN.jsonl --test TEST.jsonl
    python benchmarks/gsm8k_loss.py --table    # from benchmarks/results/gsm8k_loss.jsonl

Every run is `gradselect train` with `benchmarks/recipes/gsm8k_loss.yaml`, then `gradselect evaluate --task loss`.
The rate is chosen with the first seed; further seeds run at that rate only. A run that stands in the result file is
not done again, so the command continues where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RECIPE = HERE / "recipes" / "gsm8k_loss.yaml"
RESULTS = HERE / "results" / "gsm8k_loss.jsonl"

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
RATES = dict.fromkeys(METHODS, (3e-4, 1e-3, 3e-3)) | {"LoRA r=64": (1e-3, 3e-3, 1e-2)}


def main() -> None:
    arguments = parse()
    if not arguments.table:
        done = {(row["method"], row["lr"], row["seed"]) for row in read()}
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        for seed in range(arguments.seeds):
            for method in arguments.only or METHODS:
                for lr in RATES[method] if seed == 0 else [best_rate(method)]:
                    if (method, lr, seed) not in done:
                        row = {"method": method, "lr": lr, "seed": seed} | run(
                            arguments, METHODS[method], lr=lr, seed=seed
                        )
                        with RESULTS.open("a", encoding="utf-8") as file:
                            file.write(json.dumps(row) + "\n")
                        print(json.dumps(row), flush=True)
    print(table(read()))


def best_rate(method: str) -> float:
    """The learning rate of the lowest loss with the first seed."""
    return min((row["loss"], row["lr"]) for row in read() if row["method"] == method and row["seed"] == 0)[1]


def run(arguments: argparse.Namespace, setting: str, *, lr: float, seed: int) -> dict[str, Any]:
    """Train and evaluate one configuration."""
    output = arguments.work / "run"
    shutil.rmtree(output, ignore_errors=True)
    fixed = [f"model.path={arguments.model}", f"data.path={arguments.train}", f"run.output={output}"]
    variable = [setting, f"optimizer.lr={lr}", f"run.seed={seed}", f"run.steps={arguments.steps}"]
    gradselect("train", str(RECIPE), *fixed, *variable)
    shutil.rmtree(arguments.work / "loss", ignore_errors=True)
    limit = ("--limit", arguments.limit) if arguments.limit else ()
    gradselect(
        *("evaluate", str(output), "--task", "loss", "--data", str(arguments.test), *limit),
        *("--output", str(arguments.work / "loss")),
    )
    trained = json.loads((output / "run.json").read_text(encoding="utf-8"))
    evaluated = json.loads((arguments.work / "loss" / "result.json").read_text(encoding="utf-8"))
    return {
        "steps": arguments.steps,
        "loss": evaluated["loss"],
        "num_items": evaluated["num_items"],
        "train_seconds": trained["training_seconds"],
        "versions": evaluated["versions"],
    }


def gradselect(*words: str) -> None:
    command = [str(Path(sys.executable).with_name("gradselect")), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout}\n{done.stderr}")


def read() -> list[dict[str, Any]]:
    if not RESULTS.exists():
        return []
    return [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]


def table(rows: list[dict[str, Any]]) -> str:
    """Per method: the mean loss over seeds at each rate, the best rate in bold."""
    lines = [
        "| method | lr: held-out loss, mean of seeds (each seed) | best |",
        "|---|---|---|",
    ]
    for method in dict.fromkeys(row["method"] for row in rows):
        cells, best = [], float("inf")
        of_method = [row for row in rows if row["method"] == method]
        for lr in sorted({row["lr"] for row in of_method}):
            losses = [row["loss"] for row in of_method if row["lr"] == lr]
            cells.append(f"{lr:g}: {statistics.mean(losses):.3f} ({', '.join(f'{loss:.3f}' for loss in losses)})")
            best = min(best, statistics.mean(losses))
        lines.append(f"| {method} | {'; '.join(cells)} | **{best:.3f}** |")
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--train", type=Path)
    parser.add_argument("--test", type=Path)
    parser.add_argument("--work", type=Path, default=Path("runs/gsm8k_loss"))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--limit", help="the first so many test problems only")
    parser.add_argument("--only", nargs="+", choices=METHODS, help="these methods, e.g. to run two halves side by side")
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    if not arguments.table and None in (arguments.model, arguments.train, arguments.test):
        parser.error("give --model, --train and --test, or --table")
    return arguments


if __name__ == "__main__":
    main()
