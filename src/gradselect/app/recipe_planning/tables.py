"""Tables of settings and their bytes."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from gradselect.app.progress import print_table
from gradselect.planning import CATEGORIES
from gradselect.usage import write_size

from .variants import Setting

HEADINGS = {"state_on_device": "state", "state_on_host": "on host"}
SHORT = ("peak", "time", "state", "on host")
FULL = ("peak", "explore", "exploit", "time", "skipped", *(HEADINGS.get(name, name) for name in CATEGORIES))


def print_settings(console: Console, title: str, settings: Sequence[Setting], columns: Sequence[str]) -> None:
    """Print a row for each setting, with a column for each of some figures; below them, why some have none."""
    planned = {setting.name: _figures(setting) for setting in settings if setting.plan is not None}
    print_table(console, title, {name: {key: figures[key] for key in columns} for name, figures in planned.items()})
    for setting in settings:
        if setting.plan is None:
            console.print(f"not for this model: {setting.name}: {setting.fault}", highlight=False, markup=False)


def _figures(setting: Setting) -> dict[str, str]:
    """Return the figures of a setting by the heading of their column."""
    plan = setting.plan
    assert plan is not None
    peaks = {step.kind: write_size(step.peak_bytes) for step in plan.steps}
    return {
        "peak": write_size(plan.peak_bytes),
        "explore": peaks.get("explore", ""),
        "exploit": peaks.get("exploit", "") if len(plan.steps) > 1 else "",
        "time": f"{plan.relative_time:.2f}",
        "skipped": f"{plan.backward_skipped:.0%}",
        **{HEADINGS.get(name, name): write_size(getattr(plan.bytes, name)) for name in CATEGORIES},
    }
