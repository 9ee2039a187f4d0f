"""Table of a calibration, for the console."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from gradselect.app.results import Calibration


def calibration_table(calibration: Calibration, methods: Sequence[str]) -> Table:
    """One row per method: cost of a step, ratio to the reference, spread of the rounds, and the steps of a run."""
    is_seconds = calibration.unit == "seconds"
    table = Table(title=f"budget: {calibration.budget_text}", title_justify="left")
    table.add_column("method")
    headings = [f"{calibration.unit} a step", f"times {calibration.reference}", "spread", "rounds", "steps"]
    for heading in [*headings, *(["MiB"] if calibration.memory is not None else [])]:
        table.add_column(heading, justify="right")
    for name in methods:
        own = calibration.methods[name]
        cost = "-" if own.step_cost is None else f"{own.step_cost:.4f}" if is_seconds else f"{own.step_cost:.3g}"
        steps = "failed" if own.error else "left out" if own.left_out else f"{own.steps or calibration.run_steps:,}"
        memory = [] if calibration.memory is None else ["-" if own.bytes is None else f"{own.bytes / 2**20:,.1f}"]
        table.add_row(
            name,
            cost,
            "-" if own.ratio is None else f"{own.ratio:.3f}",
            "-" if own.spread is None else f"{100 * own.spread:.0f} %",
            str(own.num_rounds),
            steps,
            *memory,
        )
    return table
