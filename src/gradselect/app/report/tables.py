"""The tables of the page: figures as text, without the columns that nothing is known of."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from . import number_format as words
from .chart_style import Mark
from .methods import CATEGORIES, PARTS, Method, ratio
from .read_results import Run, Skipped
from .scores import Difference, Measure, Scores

EDGES = {"lowest": "lowest tried", "highest": "highest tried", "only": "only one tried"}
LARGEST_TENSORS = 3


@dataclass(frozen=True)
class Cell:
    """One figure, with what belongs to it in small letters."""

    text: str
    detail: str = ""
    is_strong: bool = False
    mark: Markup | None = None


@dataclass(frozen=True)
class Column:
    """A heading, and how to fill the cell of a row."""

    title: str
    unit: str = ""
    is_text: bool = False


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of cells under columns; the first cell of a row names it."""

    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]

    def without_unknown(self) -> Table:
        """Without the columns in which no row knows anything."""
        known = [
            place
            for place, column in enumerate(self.columns)
            if column.is_text or any(row[place].text != words.UNKNOWN for row in self.rows)
        ]
        return Table(
            columns=tuple(self.columns[place] for place in known),
            rows=tuple(tuple(row[place] for place in known) for row in self.rows),
        )


class Namer:
    """Cells that name a method, with its mark."""

    def __init__(self, marks: Mapping[str, Mark]) -> None:
        self._marks = {name: mark.svg() for name, mark in marks.items()}

    def __call__(self, name: str, detail: str = "") -> Cell:
        return Cell(name, detail, mark=self._marks.get(name))


def results_table(methods: Sequence[Method], *, scores: Sequence[Scores], full: Method | None, name: Namer) -> Table:
    """The headline: what each method reaches and what it costs."""
    rows = []
    for method in methods:
        speed_up = None if full is None else ratio(full.step_seconds, method.step_seconds)
        rows.append(
            (
                name(method.name),
                Cell(words.rate(method.lr), EDGES.get(method.edge or "", "")),
                Cell(str(len(method.seeds))),
                *(_score_cell(found, method.name) for found in scores),
                Cell(words.number(method.forgetting, sign=True)),
                Cell(words.seconds(method.step_seconds)),
                Cell(words.times(speed_up)),
                Cell(words.times(method.flop_limit)),
                Cell(words.share(ratio(speed_up, method.flop_limit))),
                Cell(_split(method)),
                Cell(words.significant(method.tokens_per_second)),
                Cell(words.seconds(method.training_seconds)),
                _relative_cell(method.peak_bytes(), full and full.peak_bytes()),
                _relative_cell(method.average_bytes, full and full.average_bytes),
                Cell(words.num_bytes(method.file_size)),
                *([] if _has_validation(scores) else [Cell(words.number(method.validation_loss))]),
            )
        )
    columns = (
        Column("Method", is_text=True),
        Column("Best rate", is_text=True),
        Column("Seeds"),
        *(Column(words.upper_first(found.measure.title), _score_unit(found.measure)) for found in scores),
        Column("Forgetting", "nats per token"),
        Column("Step", "median"),
        Column("Speed-up", "over full"),
        Column("FLOP limit", "of the speed-up"),
        Column("Of the limit", "reached"),
        Column("Split of a step, %", "forward / backward / optimizer / selection"),
        Column("Tokens/s", "median"),
        Column("Training", "mean"),
        Column("Peak bytes", "held"),
        Column("Average bytes", "held"),
        Column("Ships", "file"),
        *([] if _has_validation(scores) else [Column("Validation loss", "nats per token")]),
    )
    return Table(columns=columns, rows=tuple(rows)).without_unknown()


def time_table(methods: Sequence[Method], *, full: Method | None, name: Namer) -> Table:
    """A step of each kind, and its parts."""
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
    """Bytes at the peak by category, on average, and of process and device."""
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
            _relative_cell(method.peak_bytes(), full and full.peak_bytes()),
            *(Cell(words.num_bytes(method.peak_bytes(category))) for category in CATEGORIES),
            _relative_cell(method.average_bytes, full and full.average_bytes),
            _relative_cell(method.reserved_average, full and full.reserved_average),
            *(
                _relative_cell(method.most_held(kind), full and full.most_held(kind))
                for kind in ("allocated", "reserved", "process")
            ),
            _count_cell(method.runs[0].result.train_info.num_trainable_params),
        )
        for method in methods
    )
    return Table(columns=columns, rows=rows).without_unknown()


def difference_table(differences: Sequence[Difference], *, measure: Measure, reference: str, name: Namer) -> Table:
    """Each method against the reference."""
    rows = tuple(
        (
            name(difference.first),
            Cell(measure.show_difference(difference.value), is_strong=difference.is_significant),
            Cell(measure.show_interval(difference.interval)),
            Cell(words.probability(difference.p_value)),
            Cell(words.probability(difference.adjusted)),
            Cell(verdict(difference, measure), is_strong=difference.is_significant),
        )
        for difference in differences
    )
    columns = (
        Column("Method", is_text=True),
        Column(f"minus {reference}", measure.unit),
        Column("95 % interval", "items and seeds"),
        Column("p", "McNemar" if measure.is_share else "bootstrap"),
        Column("p", "by Holm"),
        Column("Verdict", is_text=True),
    )
    return Table(columns=columns, rows=rows)


def verdict(difference: Difference, measure: Measure) -> str:
    if not difference.is_significant:
        return "not told apart"
    return "better" if (difference.value > 0) == measure.higher_is_better else "worse"


def pair_table(pairs: Sequence[Difference], *, scores: Scores, name: Namer) -> Table:
    """Row minus column for every pair; the methods that stand in it are numbered from the best."""
    by_pair = {(pair.first, pair.second): (pair, 1) for pair in pairs}
    by_pair |= {(pair.second, pair.first): (pair, -1) for pair in pairs}
    names = [known for known in sorted(scores.estimates, key=scores.order) if any(known in key for key in by_pair)]

    def cell(row: str, column: str) -> Cell:
        if (row, column) not in by_pair:
            return Cell("" if row == column else words.UNKNOWN)
        pair, sign = by_pair[row, column]
        star = " *" if pair.is_significant else ""
        return Cell(scores.measure.show_difference(sign * pair.value) + star, is_strong=pair.is_significant)

    return Table(
        columns=(Column("Row minus column", is_text=True), *(Column(str(place)) for place in range(1, len(names) + 1))),
        rows=tuple(
            (Cell(f"{place} {row}", mark=name(row).mark), *(cell(row, column) for column in names))
            for place, row in enumerate(names, start=1)
        ),
    )


def rate_table(runs: Sequence[Run], *, name: Namer) -> Table | None:
    """Validation loss of the search by method and rate; None without a search."""
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
    """What the masks chose; None without masks."""
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
        Column("Of those to choose from"),
        Column("Tensors"),
        Column("Most entries in", is_text=True),
    )
    return Table(columns=columns, rows=rows)


def failed_table(runs: Sequence[Run], *, name: Namer) -> Table:
    """Runs that ended in an error."""
    columns = tuple(Column(title, is_text=True) for title in ("Method", "Rate", "Seed", "File", "What happened"))
    return Table(
        columns=columns,
        rows=tuple(
            (
                name(run.record.method),
                Cell(words.rate(run.record.lr)),
                Cell(str(run.record.seed)),
                Cell(run.file),
                Cell(run.result.run_info.error_msg.strip() or "no message"),
            )
            for run in runs
        ),
    )


def skipped_table(skipped: Sequence[Skipped]) -> Table:
    """Files that are no results."""
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


def _score_cell(scores: Scores, name: str) -> Cell:
    estimate = scores.estimates.get(name)
    if estimate is None:
        return Cell(words.UNKNOWN)
    text = scores.measure.show(estimate.value)
    return Cell(text, scores.measure.show_interval(estimate.interval), is_strong=name == scores.best())


def _score_unit(measure: Measure) -> str:
    return "mean, 95 %" if measure.higher_is_better else f"{measure.unit}, 95 %"


def _split(method: Method) -> str:
    """Shares of a step, over its kinds as the step itself."""
    parts = [method.part_seconds(part) for part in PARTS]
    if method.step_seconds is None or all(part is None for part in parts):
        return words.UNKNOWN
    shares = [None if part is None else 100 * part / method.step_seconds for part in parts]
    return " / ".join(words.number(each, digits=0 if each is None or each >= 2 else 1) for each in shares)


def _has_validation(scores: Sequence[Scores]) -> bool:
    return any(found.measure.name == "validation" for found in scores)


def _relative_cell(value: float | None, reference: float | None) -> Cell:
    relative = ratio(value, reference)
    return Cell(words.num_bytes(value), "" if relative is None else f"{words.share(relative)} of full")


def _part_cell(value: float | None, step: float | None) -> Cell:
    part = ratio(value, step)
    return Cell(words.seconds(value), "" if part is None else words.share(part, digits=1 if part < 0.1 else 0))


def _count_cell(count: int | None) -> Cell:
    return Cell(words.UNKNOWN if count is None else f"{count:,}")


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
