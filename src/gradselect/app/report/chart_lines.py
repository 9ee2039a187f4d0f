"""Line charts."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence

from gradselect.integrations.pictures import GREY, INK, new_figure, to_png

from .chart_labels import label_ends
from .charts import MOST_LINES, Chart, Line, Marks

LONGEST_TITLE = 28
"""Letters in one line above a small frame."""


def draw_lines(
    lines: Sequence[Line],
    *,
    x_label: str,
    y_label: str,
    marks: Marks,
    name: str,
    title: str,
    caption: str,
    reference: str | None = None,
) -> Chart:
    """Draw curves with names at their ends. Many curves get a frame each, with the reference grey and dashed."""
    figure_of = _draw_together if len(lines) <= MOST_LINES else _draw_apart
    ends = "; ".join(f"{line.name} ends at {line.y[-1]:.3f}" for line in lines)
    apart = "" if len(lines) <= MOST_LINES or reference is None else f" Grey and dashed: {reference}."
    above = " The start lies above the frame." if limits(lines)[1] < max(max(line.y) for line in lines) else ""
    return Chart(
        name=name,
        title=title,
        caption=caption + apart + above,
        alt=f"{title}. {ends}.",
        png=figure_of(lines, x_label, y_label, marks, reference),
    )


def limits(lines: Sequence[Line]) -> tuple[float, float]:
    """Limits of the frame. The first tenth of a run may exceed them: its high losses would flatten the rest."""
    low = min(min(line.y) for line in lines)
    high = max(max(line.y[len(line.y) // 10 :]) for line in lines)
    margin = 0.04 * (high - low) or 0.1
    return low - margin, high + margin


def smoothed(values: Sequence[float]) -> list[float]:
    """Mean over the last 25th of the run before each point, the point included."""
    window = max(1, len(values) // 25)
    return [math.fsum(values[max(0, end - window) : end]) / min(window, end) for end in range(1, len(values) + 1)]


def _draw_together(lines: Sequence[Line], x_label: str, y_label: str, marks: Marks, reference: str | None) -> bytes:
    figure = new_figure(height=4.1)
    axes = figure.subplots()
    for line in lines:
        mark = marks[line.name]
        every = max(1, len(line.x) // 6)
        axes.plot(
            line.x,
            line.y,
            color=mark.colour,
            linestyle=mark.dash,
            marker=mark.shape,
            markerfacecolor=mark.face,
            markevery=((len(line.x) - 1) % every, every),
            markersize=6,
        )
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.margins(x=0.02)
    axes.set_ylim(*limits(lines))
    label_ends(axes, [(line.x[-1], line.y[-1], line.name, marks[line.name]) for line in lines])
    return to_png(figure)


def _draw_apart(lines: Sequence[Line], x_label: str, y_label: str, marks: Marks, reference: str | None) -> bytes:
    rows = math.ceil(len(lines) / 2)
    figure = new_figure(height=0.7 + 1.35 * rows)
    frames = figure.subplots(rows, 2, sharex=True, sharey=True, squeeze=False).flatten()
    behind = next((line for line in lines if line.name == reference), None)
    for axes, line in zip(frames, lines, strict=False):
        if behind is not None and behind is not line:
            axes.plot(behind.x, behind.y, color=GREY, linestyle=(0, (3, 2)), linewidth=1.2)
        mark = marks[line.name]
        axes.plot(line.x, line.y, color=INK)
        axes.plot(line.x[-1], line.y[-1], mark.shape, color=mark.colour, markerfacecolor=mark.face, markersize=7)
        axes.set_title(textwrap.fill(line.name, LONGEST_TITLE), fontsize=10)
        axes.locator_params(nbins=4)
        axes.set_ylim(*limits(lines))
        axes.tick_params(labelsize=9)
    for axes in frames[len(lines) :]:
        axes.set_visible(False)
    frames[len(lines) - 2].tick_params(labelbottom=True)
    figure.supxlabel(x_label, fontsize=11)
    figure.supylabel(y_label, fontsize=11)
    return to_png(figure)
