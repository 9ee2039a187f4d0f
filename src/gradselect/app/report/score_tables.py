"""Tables of scores: the headline, differences to the reference, all pairs."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from gradselect.app.stats import student_interval

from . import number_format as words
from .methods import PARTS, Method, ratio
from .scores import VALIDATION, Difference, Measure, Scores
from .table import Cell, Column, Namer, Table, relative_cell

EDGES = {"lowest": "lowest tried", "highest": "highest tried", "only": "only one tried"}


def results_table(methods: Sequence[Method], *, scores: Sequence[Scores], full: Method | None, name: Namer) -> Table:
    """Headline: score and cost of each method."""
    has_validation = any(found.measure.name == VALIDATION for found in scores)
    sets = forgetting_names(methods)

    def speed_up(method: Method) -> float | None:
        return None if full is None else ratio(full.step_seconds, method.step_seconds)

    def row(method: Method) -> tuple[Cell, ...]:
        return (
            name(method.name),
            Cell(words.rate(method.lr), EDGES.get(method.edge or "", "")),
            Cell(str(len(method.seeds))),
            *(_score_cell(found, method) for found in scores),
            *(Cell(words.number(method.forgetting(known), sign=True)) for known in sets),
            Cell(words.seconds(method.step_seconds)),
            Cell(words.times(speed_up(method))),
            Cell(words.times(method.flop_limit)),
            Cell(words.share(ratio(speed_up(method), method.flop_limit))),
            Cell(_split(method)),
            Cell(words.significant(method.tokens_per_second)),
            Cell(words.seconds(method.training_seconds)),
            relative_cell(method.peak_bytes(), full and full.peak_bytes()),
            relative_cell(method.average_bytes, full and full.average_bytes),
            Cell(words.num_bytes(method.file_size)),
            *([] if has_validation else [Cell(words.number(method.validation_loss))]),
        )

    columns = _result_columns(scores, sets, has_validation=has_validation)
    return Table(columns=columns, rows=tuple(map(row, methods))).without_unknown()


def _result_columns(scores: Sequence[Scores], sets: Sequence[str], *, has_validation: bool) -> tuple[Column, ...]:
    return (
        Column("Method", is_text=True),
        Column("Best rate", is_text=True),
        Column("Seeds"),
        *(Column(words.upper_first(found.measure.title), _score_unit(found.measure)) for found in scores),
        *(Column(f"Forgetting: {known}" if known else "Forgetting", "nats per token") for known in sets),
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
        *([] if has_validation else [Column("Validation loss", "nats per token")]),
    )


def forgetting_names(methods: Sequence[Method]) -> list[str]:
    """Return the sets on which forgetting was measured, as the suite orders them; the only one may have no name."""
    return list(dict.fromkeys(name for method in methods for name in method.forgetting_names))


def forgetting_table(methods: Sequence[Method], *, name: Namer) -> Table | None:
    """Loss on each set that the base knew: of the base, of the trained models, and the rise with its interval."""
    sets = forgetting_names(methods)
    if not sets:
        return None
    columns = [Column("Method", is_text=True)]
    for known in sets:
        title = known or "Loss"
        columns += [Column(title, "base"), Column(title, "trained"), Column("Rise", "mean, 95 % over seeds")]
    rows = [
        (name(method.name), *(cell for known in sets for cell in _before_and_after(method, known)))
        for method in methods
    ]
    return Table(columns=tuple(columns), rows=tuple(rows)).without_unknown()


def _before_and_after(method: Method, known: str) -> list[Cell]:
    losses = method.forgotten(known)
    if not losses:
        return [Cell(words.UNKNOWN)] * 3
    rises = [one.rise for one in losses]
    interval = student_interval(rises)
    spread = (
        "" if interval is None else f"{words.number(interval[0], sign=True)} to {words.number(interval[1], sign=True)}"
    )
    return [
        Cell(words.number(fmean(one.before for one in losses))),
        Cell(words.number(fmean(one.after for one in losses))),
        Cell(words.number(fmean(rises), sign=True), spread),
    ]


def difference_table(differences: Sequence[Difference], *, measure: Measure, reference: str, name: Namer) -> Table:
    """Differences of each method to the reference."""
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
    """Row minus column for every pair. Methods are numbered from the best."""
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


def _score_cell(scores: Scores, method: Method) -> Cell:
    estimate = scores.estimates.get(method.name)
    if estimate is None:
        return Cell(words.UNKNOWN)
    text = scores.measure.show(estimate.value)
    some = f"{estimate.num_runs} of {len(method.runs)} seeds" if estimate.num_runs < len(method.runs) else ""
    detail = ", ".join(part for part in (scores.measure.show_interval(estimate.interval), some) if part)
    return Cell(text, detail, is_strong=method.name == scores.best())


def _score_unit(measure: Measure) -> str:
    return "mean, 95 %" if measure.higher_is_better else f"{measure.unit}, 95 %"


def _split(method: Method) -> str:
    """Shares of the parts of a step, in percent; kinds of steps are weighted as for the whole step."""
    parts = [method.part_seconds(part) for part in PARTS]
    if method.step_seconds is None or all(part is None for part in parts):
        return words.UNKNOWN
    shares = [None if part is None else 100 * part / method.step_seconds for part in parts]
    return " / ".join(words.number(each, digits=0 if each is None or each >= 2 else 1) for each in shares)
