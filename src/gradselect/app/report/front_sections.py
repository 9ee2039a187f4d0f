"""Scores and losses against time and against memory, with Pareto fronts: charts, and the same as tables."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from . import number_format as words
from .charts import Axis, Chart, byte_axis, draw_plane, score_axis, score_points, time_axis
from .comparison import Comparison
from .methods import Method
from .page import Part
from .pareto import Point, pareto_front
from .scores import Scores
from .table import Cell, Column, Namer, Table

YES, NO = "yes", "no"


@dataclass(frozen=True, kw_only=True)
class Cost:
    """A cost that scores are shown against.

    Args:
        key: of it in names of charts.
        axis: its axis.
        points: of the methods.
    """

    key: str
    axis: Axis
    points: tuple[Point, ...]


def shown_scores(comparison: Comparison) -> list[Scores]:
    """Return the measure that ranks the methods and, if that is no loss, the first loss."""
    first = list(comparison.scores[:1])
    losses = [scores for scores in comparison.scores if not scores.measure.higher_is_better]
    return [*first, *(losses[:1] if first and first[0].measure.higher_is_better else [])]


def front_charts(comparison: Comparison) -> Iterator[Chart]:
    """Draw each of these measures against each cost that at least two methods have."""
    for place, scores in enumerate(shown_scores(comparison)):
        for cost in costs_of(comparison, scores):
            yield draw_plane(
                cost.points,
                x=cost.axis,
                y=score_axis(scores.measure),
                marks=comparison.marks,
                name=f"score-{cost.key}" if place == 0 else f"score-loss-{cost.key}",
                title=f"{words.upper_first(scores.measure.title)} against {cost.axis.title}",
                caption="Bars are 95 % intervals. The dashed line is the Pareto front of the means.",
                with_front=True,
            )


def front_parts(comparison: Comparison, name: Namer) -> Iterator[Part]:
    """Yield a table for each measure: its values, the costs, and which methods are on which front."""
    for scores in shown_scores(comparison):
        if costs := costs_of(comparison, scores):
            yield Part(
                title=f"Pareto fronts: {scores.measure.title}",
                text="On the front: no other method has a better mean at the same or a lower cost.",
                table=front_table(comparison.methods, scores=scores, costs=costs, name=name),
            )


def front_table(methods: Sequence[Method], *, scores: Scores, costs: Sequence[Cost], name: Namer) -> Table:
    """Value of each method, and of each cost the figure and "yes" if the method is on the front."""
    fronts = {cost.key: _front_names(cost, scores) for cost in costs}
    columns = [Column("Method", is_text=True), Column(words.upper_first(scores.measure.title))]
    for cost in costs:
        columns += [Column(words.upper_first(cost.axis.title)), Column("On the front", cost.key)]
    rows = []
    for method in methods:
        if method.name not in scores.estimates:
            continue
        cells = [name(method.name), Cell(scores.measure.show(scores.estimates[method.name].value))]
        for cost in costs:
            found = {point.name: point for point in cost.points}.get(method.name)
            cells += _cost_cells(cost, found, is_on_front=method.name in fronts[cost.key])
        rows.append(tuple(cells))
    return Table(columns=tuple(columns), rows=tuple(rows))


def _cost_cells(cost: Cost, found: Point | None, *, is_on_front: bool) -> list[Cell]:
    if found is None:
        return [Cell(words.UNKNOWN), Cell(words.UNKNOWN)]
    return [Cell(cost.axis.show(found.x)), Cell(YES if is_on_front else NO, is_strong=is_on_front)]


def _front_names(cost: Cost, scores: Scores) -> set[str]:
    return {point.name for point in pareto_front(cost.points, higher_is_better=scores.measure.higher_is_better)}


def costs_of(comparison: Comparison, scores: Scores) -> list[Cost]:
    """Return the training time and the memory of the methods that have a score; without those of a single method."""
    axis, memory = memory_axis(comparison)
    by_time = score_points(comparison.methods, scores, lambda method: method.training_seconds)
    by_memory = score_points(comparison.methods, scores, memory)
    found = (
        Cost(key="time", axis=time_axis([point.x for point in by_time]), points=tuple(by_time)),
        Cost(key="memory", axis=axis, points=tuple(by_memory)),
    )
    return [cost for cost in found if len(cost.points) > 1]


def memory_axis(comparison: Comparison) -> tuple[Axis, Callable[[Method], float | None]]:
    """Axis and value of memory: reserved on the device if all methods ran on one, else the counted bytes."""
    on_device = all(method.reserved_average is not None for method in comparison.methods)

    def memory(method: Method) -> float | None:
        return method.reserved_average if on_device else method.average_bytes

    known = [held for method in comparison.methods if (held := memory(method)) is not None]
    return byte_axis(known, "average reserved memory" if on_device else "average bytes held"), memory
