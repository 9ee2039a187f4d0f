"""Plan of a recipe as tables and as JSON."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from gradselect.planning import CATEGORIES
from gradselect.usage import write_size

from .variants import RULE, RecipePlan, Setting

HEADINGS = {"state_on_device": "state", "state_on_host": "on host"}


def show(found: RecipePlan, console: Console) -> None:
    """Print two tables, the best setting, and notes."""
    console.print(_table("Methods", [found.own, *found.methods]))
    console.print(_table(f"Levers of {found.own.name}", found.levers))
    if found.best is not None and found.best.plan is not None:
        console.print(f"best that fits: {found.best.name}, peak {write_size(found.best.plan.peak_bytes)}")
        console.print(
            f"add to the command: {_quoted(found.best)}" if found.best.changes else "the recipe fits as written"
        )
        console.print(f"best: {RULE}.", style="dim")
    for note in _notes(found):
        console.print(f"note: {note}", highlight=False, markup=False)


def as_json(found: RecipePlan) -> dict[str, Any]:
    """Return the same as plain values, sizes in bytes."""
    return {
        "own": _setting_json(found.own),
        "methods": [_setting_json(setting) for setting in found.methods],
        "levers": [_setting_json(setting) for setting in found.levers],
        "best": None if found.best is None else _setting_json(found.best),
    }


def _table(title: str, settings: Any) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("setting", overflow="fold")
    for name in ("peak", "explore", "exploit", "time", "skipped"):
        table.add_column(name, justify="right")
    for name in CATEGORIES:
        table.add_column(HEADINGS.get(name, name), justify="right")
    for setting in settings:
        table.add_row(*_row(setting))
    return table


def _row(setting: Setting) -> list[str]:
    if setting.plan is None:
        return [f"{setting.name}: {setting.fault}"]
    plan = setting.plan
    peaks = {step.kind: write_size(step.peak_bytes) for step in plan.steps}
    return [
        setting.name,
        write_size(plan.peak_bytes),
        peaks.get("explore", ""),
        peaks.get("exploit", "") if len(plan.steps) > 1 else "",
        f"{plan.relative_time:.2f}",
        f"{plan.backward_skipped:.0%}",
        *(write_size(getattr(plan.bytes, name)) for name in CATEGORIES),
    ]


def _setting_json(setting: Setting) -> dict[str, Any]:
    if setting.plan is None:
        return {"name": setting.name, "changes": list(setting.changes), "fault": setting.fault}
    plan = setting.plan
    return {
        "name": setting.name,
        "changes": list(setting.changes),
        "peak_bytes": plan.peak_bytes,
        "bytes": asdict(plan.bytes),
        "relative_time": plan.relative_time,
        "backward_skipped": plan.backward_skipped,
        "steps": {
            step.kind: {
                "peak_bytes": step.peak_bytes,
                "relative_time": step.relative_time,
                "backward_skipped": step.backward_skipped,
                "moments": {name: asdict(moment) for name, moment in step.moments.items()},
            }
            for step in plan.steps
        },
        "notes": list(plan.notes),
    }


def _notes(found: RecipePlan) -> list[str]:
    settings = [found.own, *found.methods, *found.levers]
    return list(dict.fromkeys(note for setting in settings if setting.plan for note in setting.plan.notes))


def _quoted(setting: Setting) -> str:
    return " ".join(map(shlex.quote, setting.changes))
