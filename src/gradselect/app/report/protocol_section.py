"""Section on the protocol: settings, versions, commands."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from gradselect.usage import flatten

from .comparison import Comparison
from .page import Part
from .run_tables import pair_list

MACHINE = ("package_info", "system_info", "pytorch_info")


def protocol_parts(comparison: Comparison) -> Iterator[Part]:
    runs = comparison.results.runs
    if settings := _plain_settings(runs[0].record.protocol_settings):
        table = pair_list(settings, titles=("Setting", "Value"))
        yield Part(title="Protocol", text="Settings that all methods share.", table=table, is_folded=True)
    if comparison.methods:
        methods = [(method.name, _in_line(method.runs[0].record.method_settings)) for method in comparison.methods]
        yield Part(title="Methods", table=pair_list(methods, titles=("Method", "Settings")), is_folded=True)
    if versions := _versions(comparison):
        yield Part(title="Versions", table=pair_list(versions, titles=("Name", "Version")), is_folded=True)
    commands = sorted({shlex.join(run.record.command) for run in runs if run.record.command})
    if commands:
        yield Part(title="Commands", lines=tuple(commands), is_folded=True)


def _versions(comparison: Comparison) -> list[tuple[str, str]]:
    """Return packages and machine; if runs differ, all values."""
    found: dict[str, set[str]] = {}
    for run in comparison.results.runs:
        described = {key: value for key in MACHINE if (value := run.content.meta_info.get(key)) is not None}
        for key, value in _plain_settings(described):
            found.setdefault(key.removeprefix("package_info."), set()).add(value)
    return [(key, " | ".join(sorted(values))) for key, values in sorted(found.items())]


def _in_line(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}: {value}" for key, value in _plain_settings(settings))


def _plain_settings(settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return dotted keys and values as text, sorted by key."""
    return sorted((key, _plain(value)) for key, value in flatten(settings))


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)
