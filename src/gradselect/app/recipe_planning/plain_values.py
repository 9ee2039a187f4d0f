"""Plan of a recipe as plain values for JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from .variants import RecipePlan, Setting


def as_json(found: RecipePlan) -> dict[str, Any]:
    """Return the same as plain values, sizes in bytes."""
    return {
        "own": _setting_json(found.own),
        "methods": [_setting_json(setting) for setting in found.methods],
        "levers": [_setting_json(setting) for setting in found.levers],
        "best": None if found.best is None else _setting_json(found.best),
    }


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
                "every": step.every,
                "moments": {name: asdict(moment) for name, moment in step.moments.items()},
            }
            for step in plan.steps
        },
        "notes": list(plan.notes),
    }
