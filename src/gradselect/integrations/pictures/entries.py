"""Entries of a mask over the steps."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter

from gradselect.core import EntryHistory

from .style import INK, chart_settings, new_figure


def draw_entries(history: EntryHistory) -> Figure:
    """Draw the entries in the set, those that are new in it, and the share of the last set that is kept, by step.

    Args:
        history: of one step at least.

    Example:
        >>> history = EntryHistory()
        >>> history({"step": 0, "num_entries": {"w": 4}, "num_new": 4, "overlap": 1.0})
        >>> figure = draw_entries(history)
    """
    with chart_settings():
        figure = new_figure(height=4.8)
        entries, new, overlap = figure.subplots(3, 1, sharex=True)
        _draw_line(entries, history.steps, history.entries, "entries")
        _draw_line(new, history.steps, history.new, "new")
        _draw_line(overlap, history.steps, history.overlap, "overlap", form="{x:.2f}")
        overlap.set_xlabel("step")
        return figure


def _draw_line(
    axes: Axes, steps: Sequence[int], values: Sequence[float], label: str, *, form: str = "{x:,.0f}"
) -> None:
    axes.plot(steps, values, color=INK, linewidth=1.2, marker="." if len(steps) < 60 else "", markersize=4)
    axes.set_ylabel(label)
    axes.set_ylim(0, 1.1 * max(1, *values))
    axes.locator_params(axis="x", nbins=5, integer=True)
    axes.locator_params(axis="y", nbins=4)
    axes.yaxis.set_major_formatter(StrMethodFormatter(form))
