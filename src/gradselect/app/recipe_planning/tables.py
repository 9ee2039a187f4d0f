"""Tables of settings and their bytes, in as many parts as the width of the terminal needs."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from gradselect.planning import CATEGORIES
from gradselect.usage import write_size

from .variants import Setting

HEADINGS = {"state_on_device": "state", "state_on_host": "on host"}
SHORT = ("peak", "time", "state")
FULL = ("peak", "explore", "exploit", "time", "skipped", *(HEADINGS.get(name, name) for name in CATEGORIES))
GAP = 2
MOST_OF_A_NAME = 32
"""Characters of a setting's name in one line. Longer ones are folded."""


def print_table(console: Console, title: str, settings: Sequence[Setting], columns: Sequence[str]) -> None:
    """Print a row for each setting, with a column for each of some figures; below them, why some have none."""
    planned = {setting.name: _figures(setting) for setting in settings if setting.plan is not None}
    width = min(MOST_OF_A_NAME, max(map(len, [title, *planned])))
    for part in _parts([*planned.values()], columns, room=console.width - width - GAP):
        table = Table(box=None, padding=(0, GAP, 0, 0), pad_edge=False, header_style="bold")
        table.add_column(title, overflow="fold", max_width=width, min_width=min(width, console.width // 3))
        for name in part:
            table.add_column(name, justify="right", no_wrap=True)
        for setting, figures in planned.items():
            table.add_row(setting, *(figures[name] for name in part))
        console.print(table, highlight=False)
        console.print()
    for setting in settings:
        if setting.plan is None:
            console.print(f"not for this model: {setting.name}: {setting.fault}", highlight=False, markup=False)


def _parts(rows: Sequence[dict[str, str]], columns: Sequence[str], *, room: int) -> list[list[str]]:
    """Divide the columns among tables that fit into `room` characters beside the names."""
    parts: list[list[str]] = [[]]
    used = 0
    for name in columns:
        width = GAP + max(map(len, [name, *(row[name] for row in rows)]))
        if used + width > room and parts[-1]:
            parts.append([])
            used = 0
        parts[-1].append(name)
        used += width
    return parts


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
