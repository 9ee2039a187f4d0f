"""Held-out loss on GSM8K of methods that train single weights, at one budget and equal steps, each at its best rate.

    python benchmarks/gsm8k_masks.py --model MODEL --train TRAIN.jsonl --test TEST.jsonl
    python benchmarks/gsm8k_masks.py --table    # from benchmarks/results/gsm8k_masks.jsonl

As benchmarks/gsm8k_loss.py and with its recipe: every run is `gradselect train`, then `gradselect evaluate --task
loss`; the rate is chosen with the first seed, further seeds run at that rate only, and a row that stands in the result
file is not made again; nor is one of full fine-tuning that stands in gsm8k_loss.jsonl. Compact masks train 5 % of the
model's entries (LIFT as many, all of them in the linears of the layers); GMT moves a fifth of them at each step.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import gsm8k_loss
from safetensors import safe_open

RESULTS = Path(__file__).parent / "results" / "gsm8k_masks.jsonl"
DENSITY = 0.05
RATES = {
    "full": (1e-3, 3e-3),
    "GMT 20 %": (3e-4, 1e-3, 3e-3),
    "StaticMask(gradient)": (1e-3, 3e-3, 1e-2),
    "StaticMask(random)": (3e-3, 1e-2, 3e-2),
    "LIFT": (3e-3, 1e-2, 3e-2),
    "ID3": (3e-3, 1e-2, 3e-2),
}


def settings(model: Path) -> dict[str, str]:
    """What each method is in a recipe."""
    total, linears = num_entries(model)
    budget = round(DENSITY * total)
    return {
        "full": "method.name=full",
        "GMT 20 %": "method={name: gmt, fraction: 0.2}",
        "StaticMask(gradient)": f"method={{name: static, salience: gradient, budget: {budget}}}",
        "StaticMask(random)": f"method={{name: static, salience: random, budget: {budget}}}",
        "LIFT": f"method={{name: lift, density: {budget / linears:.6f}}}",
        "ID3": f"method={{name: id3, budget: {budget}}}",
    }


def num_entries(model: Path) -> tuple[int, int]:
    """Of the whole model, and of the matrices of its layers."""
    total, linears = 0, 0
    with safe_open(model / "model.safetensors", framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - no mapping
            rows, *columns = file.get_slice(name).get_shape()
            total += rows * (columns[0] if columns else 1)
            linears += rows * columns[0] if columns and ".layers." in name else 0
    return total, linears


def main() -> None:
    arguments = parse()
    if not arguments.table:
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        for seed in range(arguments.seeds):
            for method in arguments.only or RATES:
                for lr in RATES[method] if seed == 0 else [best_rate(method)]:
                    once(method, arguments, lr=lr, seed=seed)
    print(gsm8k_loss.table(read()))


def once(method: str, arguments: argparse.Namespace, *, lr: float, seed: int) -> None:
    """Make a row unless it is there."""
    key = {"method": method, "lr": lr, "seed": seed}
    if not any(key.items() <= row.items() for row in read()):
        row = borrowed(key, arguments) or key | gsm8k_loss.run(
            arguments, settings(arguments.model)[method], lr=lr, seed=seed
        )
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)


def borrowed(key: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any] | None:
    """The same run of the other benchmark."""
    wanted = key | {"steps": arguments.steps, "num_items": int(arguments.limit)}
    rows = [row for row in gsm8k_loss.read() if "before_clipping_fix" not in row]
    return next((row for row in rows if wanted.items() <= row.items()), None)


def best_rate(method: str) -> float:
    """The learning rate of the lowest loss with the first seed."""
    return min((row["loss"], row["lr"]) for row in read() if row["method"] == method and row["seed"] == 0)[1]


def read() -> list[dict[str, Any]]:
    if not RESULTS.exists():
        return []
    return [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--train", type=Path)
    parser.add_argument("--test", type=Path)
    parser.add_argument("--work", type=Path, default=Path("runs/gsm8k_masks"))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--limit", default="1319", help="the first so many test problems only")
    parser.add_argument("--only", nargs="+", choices=RATES, help="these methods, e.g. to run two halves side by side")
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    if not arguments.table and None in (arguments.model, arguments.train, arguments.test):
        parser.error("give --model, --train and --test, or --table")
    return arguments


if __name__ == "__main__":
    main()
