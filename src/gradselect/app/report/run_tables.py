"""Tables of single runs: the search, masks, failures, skipped files, settings."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from gradselect.app.results import Result, Skipped

from . import number_format as words
from .methods import Method, ratio
from .table import Cell, Column, Namer, Table

LARGEST_TENSORS = 3


def rate_table(runs: Sequence[Result], *, name: Namer) -> Table | None:
    """Validation losses of the search, by method and rate; None without a search."""
    searched = [run for run in runs if run.record.role == "rate"]
    if not searched:
        return None
    losses = {(run.record.method, run.record.lr): run.record.validation_loss for run in searched}
    rates = sorted({lr for _, lr in losses})
    rows = [
        (name(method), *(_rate_cells(method, rates, losses)))
        for method in sorted({method for method, _ in losses}, key=lambda method: (method.casefold(), method))
    ]
    return Table(columns=(Column("Method", is_text=True), *(Column(words.rate(lr)) for lr in rates)), rows=tuple(rows))


def mask_table(methods: Sequence[Method], *, name: Namer) -> Table | None:
    """Entries that the masks selected; None without masks."""
    masked = [(method, method.mask) for method in methods if method.mask is not None]
    if not masked:
        return None
    rows = tuple(
        (
            name(method.name),
            Cell(mask.mask),
            Cell(f"{mask.entries:,}"),
            Cell(words.share(ratio(mask.entries, mask.entries_to_choose_from), digits=2)),
            Cell(f"{len(mask.entries_by_tensor):,}"),
            Cell(_largest(mask.entries_by_tensor)),
        )
        for method, mask in masked
    )
    columns = (
        Column("Method", is_text=True),
        Column("Mask", is_text=True),
        Column("Entries"),
        Column("Of all candidates"),
        Column("Tensors"),
        Column("Most entries in", is_text=True),
    )
    return Table(columns=columns, rows=rows)


def failed_table(runs: Sequence[Result], *, name: Namer) -> Table:
    """Failed runs and their errors."""
    columns = tuple(Column(title, is_text=True) for title in ("Method", "Rate", "Seed", "File", "Error"))
    return Table(
        columns=columns,
        rows=tuple(
            (
                name(run.record.method),
                Cell(words.rate(run.record.lr)),
                Cell(str(run.record.seed)),
                Cell(run.path.name),
                Cell(run.content.run_info.error_msg.strip() or "no message"),
            )
            for run in runs
        ),
    )


def skipped_table(skipped: Sequence[Skipped]) -> Table:
    """Files that are no usable results, and why."""
    return Table(
        columns=(Column("File", is_text=True), Column("Why", is_text=True)),
        rows=tuple((Cell(one.file), Cell(one.reason)) for one in skipped),
    )


def pair_list(pairs: Sequence[tuple[str, object]], *, titles: tuple[str, str]) -> Table:
    """Keys and values."""
    return Table(
        columns=tuple(Column(title, is_text=True) for title in titles),
        rows=tuple((Cell(key), Cell(str(value))) for key, value in pairs),
    )


def _rate_cells(method: str, rates: Sequence[float], losses: Mapping[tuple[str, float], float | None]) -> list[Cell]:
    known = {lr: loss for lr in rates if (loss := losses.get((method, lr))) is not None and math.isfinite(loss)}
    best = min(known, key=lambda lr: (known[lr], lr), default=None)
    tried = [lr for lr in rates if (method, lr) in losses]
    on_edge = len(tried) > 1 and best in (tried[0], tried[-1])
    show: Callable[[float], Cell] = lambda lr: Cell(  # noqa: E731
        words.number(known.get(lr)) if (method, lr) in losses else "",
        ("best, at the edge" if on_edge else "best") if lr == best else "",
        is_strong=lr == best,
    )
    return [show(lr) for lr in rates]


def _largest(by_tensor: Mapping[str, int]) -> str:
    order = sorted(by_tensor, key=lambda name: (-by_tensor[name], name))
    return ", ".join(f"{name} {by_tensor[name]:,}" for name in order[:LARGEST_TENSORS])
