"""Tables of single runs: the search, masks, failures, skipped files, settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gradselect.app.results import Result, Rung, Skipped, rungs_of

from . import number_format as words
from .methods import Method, ratio
from .table import Cell, Column, Namer, Table

LARGEST_TENSORS = 3


def rate_table(runs: Sequence[Result], *, name: Namer) -> Table | None:
    """Validation losses of the search, by method and rate, with a row for each length of the runs; None without one."""
    searched = [run for run in runs if run.record.role == "rate"]
    if not searched:
        return None
    rates = sorted({run.record.lr for run in searched})
    methods = sorted({run.record.method for run in searched}, key=lambda method: (method.casefold(), method))
    rungs = {method: rungs_of(searched, method) for method in methods}
    has_lengths = any(rung.share < 1 for found in rungs.values() for rung in found)
    rows = [
        (name(method, _length(rung) if has_lengths else ""), *_rate_cells(rungs[method], place, rates))
        for method in methods
        for place, rung in enumerate(rungs[method])
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


def _length(rung: Rung) -> str:
    return "all steps" if rung.share == 1 else f"{words.share(rung.share)} of its steps"


def _rate_cells(rungs: Sequence[Rung], place: int, rates: Sequence[float]) -> list[Cell]:
    """Cells of one rung. At full length the best rate is marked; in a short rung those that were dropped are."""
    rung, later = rungs[place], rungs[place + 1 :]
    grid = sorted({lr for each in rungs for lr in each.losses})
    best = rung.order[0] if rung.share == 1 and rung.order else None
    on_edge = len(grid) > 1 and best in (grid[0], grid[-1])

    def detail(lr: float) -> str:
        if lr == best:
            return "best, at the edge" if on_edge else "best"
        return "dropped" if later and lr in rung.losses and lr not in later[0].losses else ""

    return [
        Cell(words.number(rung.losses[lr]) if lr in rung.losses else "", detail(lr), is_strong=lr == best)
        for lr in rates
    ]


def _largest(by_tensor: Mapping[str, int]) -> str:
    order = sorted(by_tensor, key=lambda name: (-by_tensor[name], name))
    return ", ".join(f"{name} {by_tensor[name]:,}" for name in order[:LARGEST_TENSORS])
