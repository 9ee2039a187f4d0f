"""Charts of costs and scores."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

from gradselect.integrations.pictures import GREY, INK, PALE, new_figure, to_png

from . import number_format as words
from .chart_labels import label_points
from .chart_style import Mark
from .methods import Method
from .pareto import Point, pareto_front
from .scores import Difference, Measure, Scores

MOST_LINES = 6
"""Largest number of curves in one frame; more get a frame each."""

MOST_NAMES = 10
"""Most points with a name beside each. Of more, those on the front have one, and a key has all."""

LONGEST_OF_TWO = 36
"""Letters of the longest name in a key of two columns."""

WIDEST_RANGE = 4
"""Largest cost over the smallest; a wider range is drawn on a logarithmic scale."""

MOST_LETTERS = 45
"""Letters of the names in one line of a legend."""

LONGEST_LINE = 22
"""Letters in one line of a name beside bars."""

Marks = Mapping[str, Mark]


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A picture with its texts.

    Args:
        name: of its file, without the suffix.
        title: heading.
        caption: how to read it.
        alt: its content in words, for those who cannot see it.
        png: content of the file.
    """

    name: str
    title: str
    caption: str
    alt: str
    png: bytes


@dataclass(frozen=True, kw_only=True)
class Axis:
    """A quantity in a unit that suits the values.

    Args:
        is_cost: it may have a logarithmic scale.
    """

    title: str
    unit: str
    size: float
    show: Callable[[float], str]
    lower_is_better: bool | None = None
    is_cost: bool = False

    @property
    def label(self) -> str:
        return f"{self.title}, {self.unit}" if self.unit else self.title


@dataclass(frozen=True, kw_only=True)
class Line:
    """A method along an axis."""

    name: str
    x: Sequence[float]
    y: Sequence[float]


def time_axis(values: Sequence[float], title: str = "training time") -> Axis:
    most = max(values, default=0.0)
    unit, size = next(((u, s) for u, s in (("hours", 3600.0), ("minutes", 60.0)) if most >= 2 * s), ("seconds", 1.0))
    return Axis(title=title, unit=unit, size=size, show=words.seconds, lower_is_better=True, is_cost=True)


def byte_axis(values: Sequence[float], title: str) -> Axis:
    most = max(values, default=0.0)
    unit, size = next(((u, s) for u, s in (("GB", 1e9), ("MB", 1e6)) if most >= s), ("kB", 1e3))
    return Axis(title=title, unit=unit, size=size, show=words.num_bytes, lower_is_better=True, is_cost=True)


def score_axis(measure: Measure) -> Axis:
    unit = "%" if measure.is_share else measure.unit
    return Axis(
        title=measure.title,
        unit=unit,
        size=1 / measure.scale,
        show=measure.show,
        lower_is_better=not measure.higher_is_better,
    )


def score_points(methods: Sequence[Method], scores: Scores, cost: Callable[[Method], float | None]) -> list[Point]:
    """Methods that have both a cost and a score."""
    return [
        Point(
            name=method.name,
            x=x,
            y=scores.estimates[method.name].value,
            interval=scores.estimates[method.name].interval,
        )
        for method in methods
        if method.name in scores.estimates and (x := cost(method)) is not None
    ]


def draw_plane(
    points: Sequence[Point],
    *,
    x: Axis,
    y: Axis,
    marks: Marks,
    name: str,
    title: str,
    caption: str,
    reference: str | None = None,
    with_front: bool = False,
) -> Chart:
    """Draw methods as points with names.

    Args:
        reference: name of the method whose position is drawn as two thin lines.
        with_front: draw the Pareto front.
    """
    has_key = len(points) > MOST_NAMES
    columns = 1 if max(len(point.name) for point in points) > LONGEST_OF_TWO else 2
    extra = 0.19 * math.ceil(len(points) / columns) if has_key else 0.12 * max(0, len(points) - 8)
    figure = new_figure(height=4.1 + extra)
    axes = figure.subplots()
    for point in points:
        if point.name == reference:
            axes.axvline(point.x / x.size, color=PALE, linewidth=1, zorder=0)
            axes.axhline(point.y / y.size, color=PALE, linewidth=1, zorder=0)
    front = pareto_front(points, higher_is_better=not y.lower_is_better) if with_front else []
    named = [point.name for point in (front if has_key else points)]
    if has_key:
        _draw_key(figure, points, marks, columns)
        named.append(reference or "")
    plot_plane(axes, points, x=x, y=y, marks=marks, labels={name: name for name in named}, front=front)
    listed = "; ".join(f"{point.name}: {x.show(point.x)}, {y.show(point.y)}" for point in points)
    on_front = f" On the front: {words.joined([point.name for point in front])}." if with_front else ""
    return Chart(
        name=name,
        title=title,
        caption=caption + on_front,
        alt=f"{title}. {x.title}, {y.title} of each method. {listed}.{on_front}",
        png=to_png(figure),
    )


def plot_plane(
    axes: Axes,
    points: Sequence[Point],
    *,
    x: Axis,
    y: Axis,
    marks: Marks,
    labels: Mapping[str, str],
    front: Sequence[Point] = (),
) -> None:
    """Draw points into a frame, with their intervals, a front, and a label beside each point that has one."""
    for point in points:
        _draw_point(axes, point, marks[point.name], x.size, y.size)
    _draw_front(axes, front, x, y)
    axes.set_xlabel(_with_direction(x))
    axes.set_ylabel(_with_direction(y))
    axes.margins(x=0.16, y=0.14)
    axes.locator_params(nbins=6)
    costs = [point.x for point in points]
    if x.is_cost and max(costs) > WIDEST_RANGE * min(costs) > 0:
        axes.set_xlabel(f"{_with_direction(x)}, logarithmic")
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.xaxis.set_minor_locator(NullLocator())
    label_points(
        axes,
        [(point.x / x.size, point.y / y.size, labels.get(point.name, "")) for point in points],
        obstacles=[*_interval_lines(points, x, y), *_front_lines(front, x, y)],
    )


def _draw_key(figure: Figure, points: Sequence[Point], marks: Marks, columns: int) -> None:
    """Write mark and name of every point below the frame."""
    handles = [
        Line2D([], [], linestyle="", marker=mark.shape, color=mark.colour, markerfacecolor=mark.face, label=point.name)
        for point in points
        for mark in [marks[point.name]]
    ]
    spaces = {"labelspacing": 0.3, "handletextpad": 0.1, "columnspacing": 0.8}
    figure.legend(handles=handles, loc="outside lower left", ncols=columns, frameon=False, fontsize=8.5, **spaces)


def _draw_front(axes: Axes, front: Sequence[Point], x: Axis, y: Axis) -> None:
    if len(front) > 1:
        where = [point.x / x.size for point in front], [point.y / y.size for point in front]
        axes.plot(*where, drawstyle="steps-post", color=GREY, linewidth=1.2, linestyle=(0, (4, 2)), zorder=1)


def draw_differences(differences: Sequence[Difference], *, measure: Measure, reference: str, marks: Marks) -> Chart:
    """Draw the difference of each method to the reference, with its interval."""
    figure = new_figure(height=1.3 + 0.34 * len(differences))
    axes = figure.subplots()
    axes.axvline(0, color=GREY, linewidth=1)
    for place, difference in enumerate(differences):
        low, high = (limit * measure.scale for limit in difference.interval)
        axes.plot([low, high], [place, place], color=INK, linewidth=2.2 if difference.is_significant else 1)
        mark = marks[difference.first]
        value = difference.value * measure.scale
        axes.plot(value, place, mark.shape, color=mark.colour, markerfacecolor=mark.face, markersize=8)
    names = [in_lines(f"{one.first}{' *' if one.is_significant else ''}") for one in differences]
    axes.set_yticks(range(len(differences)), names, fontsize=9.5)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(differences) - 0.4, -0.6)
    axes.locator_params(axis="x", nbins=6)
    better = "right" if measure.higher_is_better else "left"
    axes.set_xlabel(f"difference{measure.unit and ', '}{measure.unit}")
    axes.spines["left"].set_visible(False)
    listed = "; ".join(
        f"{difference.first}: {measure.show_difference(difference.value)} "
        f"({measure.show_interval(difference.interval)}){' significant' if difference.is_significant else ''}"
        for difference in differences
    )
    return Chart(
        name=f"difference-{slug(measure.name)}-{slug(measure.metric)}",
        title=words.upper_first(f"{measure.title}: difference to {reference}"),
        caption=f"Bars are 95 % intervals over items and seeds; {better} of zero is better than {reference}. "
        "A star and a thick bar: significant.",
        alt=f"{measure.title} of each method minus that of {reference}. {listed}.",
        png=to_png(figure),
    )


def slug(name: str) -> str:
    """Return a name as part of a file name."""
    kept = "".join(letter if letter.isascii() and letter.isalnum() else "-" for letter in name.lower())
    return "-".join(part for part in kept.split("-") if part) or "method"


def in_lines(name: str) -> str:
    """Break a long name into lines, so that it leaves room for the bars."""
    return "\n".join(textwrap.wrap(name, LONGEST_LINE))


def _draw_point(axes: Axes, point: Point, mark: Mark, x_size: float, y_size: float) -> None:
    if point.interval is not None:
        low, high = (limit / y_size for limit in point.interval)
        axes.plot([point.x / x_size] * 2, [low, high], color=GREY, linewidth=1, zorder=2)
    axes.plot(
        point.x / x_size,
        point.y / y_size,
        mark.shape,
        color=mark.colour,
        markerfacecolor=mark.face,
        markersize=9,
        markeredgewidth=1.4,
        zorder=3,
    )


def _interval_lines(points: Sequence[Point], x: Axis, y: Axis) -> list[tuple[float, float, float, float]]:
    return [
        (point.x / x.size, point.interval[0] / y.size, point.x / x.size, point.interval[1] / y.size)
        for point in points
        if point.interval is not None
    ]


def _front_lines(front: Sequence[Point], x: Axis, y: Axis) -> list[tuple[float, float, float, float]]:
    """Return the horizontal parts of the front."""
    return [
        (first.x / x.size, first.y / y.size, second.x / x.size, first.y / y.size) for first, second in pairwise(front)
    ]


def _with_direction(axis: Axis) -> str:
    if axis.lower_is_better is None:
        return axis.label
    return f"← better    {axis.label}" if axis.lower_is_better else f"{axis.label}    better →"
