"""Charts of one run: losses, selection, bytes."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence

from gradselect.integrations.pictures import INK, draw_entries, new_figure, to_png

from . import number_format as words
from .chart_lines import draw_lines, smoothed
from .chart_style import COLOURS, DASHES, SHAPES, Mark
from .charts import Chart, Line, byte_axis
from .selection_charts import draw_history
from .training_run import REWARD_FIGURES, TrainingRun

MOST_POINTS = 400
"""Longer curves are drawn in stretches of steps."""


def loss_charts(run: TrainingRun) -> Iterator[Chart]:
    """Yield losses against steps, then gradient norm and learning rate."""
    lines = [
        Line(name=name, x=[s for s, _ in points], y=[y for _, y in points]) for name, points in run.validation.items()
    ]
    if len(run.losses) > 1:
        steps, losses = zip(*run.losses, strict=True)
        lines.insert(0, Line(name="training", x=steps, y=smoothed(losses)))
    lines = [line for line in lines if len(line.x) > 1 or line.name != "training"]
    if lines:
        yield draw_lines(
            lines,
            x_label="step",
            y_label="loss",
            marks=_marks([line.name for line in lines]),
            name="loss",
            title="Loss",
            caption="Training loss: mean over the steps just before, a 25th of the run.",
        )
    for key, title in (*REWARD_FIGURES.items(), ("grad_norm", "Gradient norm"), ("learning_rate", "Learning rate")):
        points = run.logged(key)
        if len(points) > 1:
            yield _one_line(title, [s for s, _ in points], [y for _, y in points], name=re.sub("[_/]", "-", key))


def selection_charts(run: TrainingRun) -> Iterator[Chart]:
    """Yield the picture of the selection: blocks by step, or entries by step."""
    if run.blocks is not None and run.blocks.steps:
        yield draw_history(run.blocks, name="blocks", title="Which blocks trained when", of=run.method_name)
    elif run.entries is not None and run.entries.steps:
        history = run.entries
        yield Chart(
            name="entries",
            title="Entries that train, by step",
            caption="Entries in the set; new: that the last step's set did not hold; overlap: share of the last step's "
            "set that is still in the set.",
            alt=f"{history.entries[0]:,} entries at the first step, {history.entries[-1]:,} at the last; "
            f"overlap {min(history.overlap):.2f} at the lowest.",
            png=to_png(draw_entries(history)),
        )


def byte_charts(run: TrainingRun) -> Iterator[Chart]:
    """Yield bytes of state on the device, and bytes moved, by step."""
    if run.selection is None or not run.selection.steps:
        return
    steps = run.selection.steps
    series: list[tuple[str, str, Sequence[float], Callable[[Sequence[float]], float]]] = [
        ("state-bytes", "Optimizer state and masters on the device", run.selection.state_bytes, max)
    ]
    if run.blocks is not None and any(run.blocks.moved_bytes):
        series.append(("moved-bytes", "Bytes moved between device and host", run.blocks.moved_bytes, _mean))
    for name, title, values, summarise in series:
        if any(values) and len(steps) > 1:
            axis = byte_axis(values, title)
            x, y = _in_stretches(steps, [value / axis.size for value in values], summarise)
            kind = "the most" if summarise is max else "the mean"
            detail = f" Each point: {kind} of a stretch of steps." if len(steps) > MOST_POINTS else ""
            yield _one_line(title, x, y, name=name, label=axis.unit, caption=f"By step.{detail}")


def _one_line(
    title: str, x: Sequence[float], y: Sequence[float], *, name: str, label: str = "", caption: str = "By step."
) -> Chart:
    figure = new_figure(height=2.8)
    axes = figure.subplots()
    axes.plot(x, y, color=INK, linewidth=1.4)
    axes.set_xlabel("step")
    axes.set_ylabel(label or title.lower())
    lowest, highest = min(0, 1.08 * min(y)), 1.08 * max(y)
    axes.set_ylim(lowest, highest if highest > 0 else 0 if lowest else 1)
    axes.margins(x=0.01)
    axes.locator_params(axis="x", nbins=6, integer=True)
    axes.locator_params(axis="y", nbins=5)
    return Chart(
        name=name,
        title=title,
        caption=caption,
        alt=f"{title}: {words.significant(y[0])} {label} at the first step, {words.significant(y[-1])} at the last.",
        png=to_png(figure),
    )


def _marks(names: Sequence[str]) -> dict[str, Mark]:
    marks = {"training": Mark(shape="", colour=INK, dash="-", is_hollow=False)}
    for place, name in enumerate(name for name in names if name != "training"):
        marks[name] = Mark(
            shape=SHAPES[place % len(SHAPES)],
            colour=COLOURS[place % len(COLOURS)],
            dash=DASHES[(place + 1) % len(DASHES)],
            is_hollow=False,
        )
    return marks


def _in_stretches(
    x: Sequence[float], y: Sequence[float], summarise: Callable[[Sequence[float]], float]
) -> tuple[list[float], list[float]]:
    size = math.ceil(len(x) / MOST_POINTS)
    starts = range(0, len(x), size)
    return [x[start] for start in starts], [summarise(y[start : start + size]) for start in starts]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
