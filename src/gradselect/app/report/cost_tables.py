"""Tables of costs: seconds of a step, and bytes."""

from __future__ import annotations

from collections.abc import Sequence

from . import number_format as words
from .methods import CATEGORIES, PARTS, Method, ratio
from .table import Cell, Column, Namer, Table, relative_cell


def time_table(methods: Sequence[Method], *, full: Method | None, name: Namer) -> Table:
    """Seconds of a step of each kind, and of its parts."""
    rows = []
    for method in methods:
        for kind in method.kinds():
            step = method.kind_seconds(kind)
            rows.append(
                (
                    name(method.name, "" if kind == "step" else kind),
                    Cell(f"{method.kind_steps(kind):,}"),
                    Cell(words.seconds(step)),
                    Cell(words.times(None if full is None else ratio(full.step_seconds, step))),
                    *(_part_cell(method.kind_seconds(kind, part), step) for part in PARTS),
                )
            )
    parts = (Column(part.capitalize()) for part in PARTS)
    columns = (Column("Method", is_text=True), Column("Steps"), Column("Step", "median"), Column("Speed-up"), *parts)
    return Table(columns=columns, rows=tuple(rows)).without_unknown()


def bytes_table(methods: Sequence[Method], *, full: Method | None, name: Namer) -> Table:
    """Peak bytes by category, average bytes, and bytes of process and device."""
    columns = (
        Column("Method", is_text=True),
        Column("Peak", "together"),
        *(Column(category.replace("_", " ").capitalize(), "peak") for category in CATEGORIES),
        Column("Average", "together"),
        Column("Reserved", "device, average"),
        Column("Allocated", "device, peak"),
        Column("Reserved", "device, peak"),
        Column("Process", "peak"),
        Column("Trainable", "parameters"),
    )
    rows = tuple(
        (
            name(method.name),
            relative_cell(method.peak_bytes(), full and full.peak_bytes()),
            *(Cell(words.num_bytes(method.peak_bytes(category))) for category in CATEGORIES),
            relative_cell(method.average_bytes, full and full.average_bytes),
            relative_cell(method.reserved_average, full and full.reserved_average),
            *(
                relative_cell(method.most_held(kind), full and full.most_held(kind))
                for kind in ("allocated", "reserved", "process")
            ),
            _count_cell(method.runs[0].content.train_info.num_trainable_params),
        )
        for method in methods
    )
    return Table(columns=columns, rows=rows).without_unknown()


def _part_cell(value: float | None, step: float | None) -> Cell:
    part = ratio(value, step)
    return Cell(words.seconds(value), "" if part is None else words.share(part, digits=1 if part < 0.1 else 0))


def _count_cell(count: int | None) -> Cell:
    return Cell(words.UNKNOWN if count is None else f"{count:,}")
