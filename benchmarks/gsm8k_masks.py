"""Held-out loss on GSM8K of methods that train single entries, at one budget and equal steps, each at its best rate.

    python benchmarks/gsm8k_masks.py --model MODEL --train TRAIN.jsonl --test TEST.jsonl
    python benchmarks/gsm8k_masks.py --table    # from benchmarks/results/gsm8k_masks.jsonl

The work is that of benchmarks/gsm8k_loss.py. A run of full fine-tuning that is in its result file is taken from there.
Compact masks train 5 % of the model's entries (LIFT as many, all of them in the linears of the layers); GMT moves a
fifth of the entries at each step.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import gsm8k_loss
from common import RESULTS, read_rows
from gsm8k_loss import Row
from safetensors import safe_open

RESULT = RESULTS / "gsm8k_masks.jsonl"
DENSITY = 0.05
RATES: dict[str, tuple[float, ...]] = {
    "full": (1e-3, 3e-3),
    "GMT 20 %": (3e-4, 1e-3, 3e-3),
    "StaticMask(gradient)": (1e-3, 3e-3, 1e-2),
    "StaticMask(random)": (3e-3, 1e-2, 3e-2),
    "LIFT": (3e-3, 1e-2, 3e-2),
    "ID3": (3e-3, 1e-2, 3e-2),
}


def settings(model: Path) -> dict[str, str]:
    """Return each method as an override of a recipe."""
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
    """Count the entries of the whole model, and of the matrices of its layers."""
    total, linears = 0, 0
    with safe_open(model / "model.safetensors", framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - no mapping
            rows, *columns = file.get_slice(name).get_shape()
            total += rows * (columns[0] if columns else 1)
            linears += rows * columns[0] if columns and ".layers." in name else 0
    return total, linears


def borrowed(key: Row, arguments: argparse.Namespace) -> Row | None:
    """Return the same run of the other benchmark."""
    wanted = key | {"steps": arguments.steps, "num_items": arguments.limit}
    rows = [row for row in read_rows(gsm8k_loss.RESULT) if "before_clipping_fix" not in row]
    return next((row for row in rows if wanted.items() <= row.items()), None)


def main() -> None:
    arguments = gsm8k_loss.parse_search(__doc__, out=RESULT, methods=list(RATES), limit=1319)

    def run(key: Row) -> Row:
        setting = settings(arguments.model)[key["method"]]
        return borrowed(key, arguments) or gsm8k_loss.train_and_evaluate(arguments, setting, key)

    if not arguments.table:
        gsm8k_loss.search(arguments, RATES, run)
    print(gsm8k_loss.table(read_rows(arguments.out)))


if __name__ == "__main__":
    main()
