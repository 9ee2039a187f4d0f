"""Sections on costs: time and memory, and what a score costs."""

from __future__ import annotations

from collections.abc import Iterator

from . import number_format as words
from .chart_bars import draw_bytes, draw_time_parts
from .charts import Axis, Chart, draw_plane, score_axis, score_points, time_axis
from .comparison import Comparison
from .cost_tables import bytes_table, time_table
from .front_sections import front_charts, front_parts, memory_axis
from .page import Part
from .pareto import Point
from .table import Namer


def trade_off_parts(comparison: Comparison, name: Namer) -> Iterator[Part]:
    charts = [*_time_against_memory(comparison), *front_charts(comparison), *_score_by_share(comparison)]
    if charts:
        yield Part(charts=tuple(charts))
    yield from front_parts(comparison, name)


def _time_against_memory(comparison: Comparison) -> Iterator[Chart]:
    axis, memory = memory_axis(comparison)
    points = [
        Point(name=method.name, x=held, y=seconds)
        for method in comparison.methods
        if (held := memory(method)) is not None and (seconds := method.training_seconds) is not None
    ]
    if len(points) > 1:
        yield draw_plane(
            points,
            x=axis,
            y=time_axis([point.y for point in points]),
            marks=comparison.marks,
            name="time-memory",
            title="Training time against average memory",
            caption="Left and down is better. The thin lines cross at full fine-tuning.",
            reference=comparison.full and comparison.full.name,
        )


def _score_by_share(comparison: Comparison) -> Iterator[Chart]:
    if not comparison.scores:
        return
    scores = comparison.scores[0]
    points = score_points(comparison.methods, scores, lambda method: method.block_share)
    if len(points) > 1:
        yield draw_plane(
            points,
            x=Axis(title="blocks trained in a step", unit="%", size=0.01, show=words.share),
            y=score_axis(scores.measure),
            marks=comparison.marks,
            name="score-share",
            title=f"{words.upper_first(scores.measure.title)} against the share of blocks trained",
            caption="Bars are 95 % intervals. Methods that do not train whole blocks are left out.",
        )


def cost_parts(comparison: Comparison, name: Namer) -> Iterator[Part]:
    full = comparison.full
    timed = [method for method in comparison.methods if method.kinds()]
    counted = [method for method in comparison.methods if method.peak_bytes() is not None]
    charts = [
        *([draw_time_parts(timed, reference=full)] if timed else []),
        *([draw_bytes(counted, reference=full)] if counted else []),
    ]
    if charts:
        yield Part(charts=tuple(charts))
    if timed:
        yield Part(title="Seconds per step", table=time_table(timed, full=full, name=name))
    if counted:
        yield Part(title="Bytes", table=bytes_table(counted, full=full, name=name))
