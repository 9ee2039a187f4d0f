"""Table of a calibration, for the console."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from gradselect.app.progress import print_table
from gradselect.app.results import Calibration


def show_calibration(console: Console, calibration: Calibration, methods: Sequence[str]) -> None:
    """Print a row per method: cost of a step, ratio to the reference, spread of the rounds, steps of a run, bytes."""
    rows = {name: _figures(calibration, name) for name in methods}
    print_table(console, "method", rows, title=f"budget: {calibration.budget_text}")


def _figures(calibration: Calibration, name: str) -> dict[str, str]:
    own = calibration.methods[name]
    form = ".4f" if calibration.unit == "seconds" else ".3g"
    steps = "failed" if own.error else "left out" if own.left_out else f"{own.steps or calibration.run_steps:,}"
    return {
        f"{calibration.unit} a step": "-" if own.step_cost is None else format(own.step_cost, form),
        f"times {calibration.reference}": "-" if own.ratio is None else f"{own.ratio:.3f}",
        "spread": "-" if own.spread is None else f"{100 * own.spread:.0f} %",
        "rounds": str(own.num_rounds),
        "steps": steps,
        "MiB": "-" if own.bytes is None else f"{own.bytes / 2**20:,.1f}",
    }
