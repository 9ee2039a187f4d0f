"""Heat map of the selected blocks over the steps."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gradselect.core import BlockHistory

from .style import GREY, INK, chart_settings, new_figure

MOST_COLUMNS = 240
"""Longer runs are drawn in stretches of steps: columns narrower than a pixel would show noise."""

MOST_ROWS = 34
"""With more blocks than this, only some are named."""


def draw_blocks(history: BlockHistory) -> Figure:
    """Draw blocks by step, explore steps above, and the updates of each block at the right.

    Args:
        history: of one step at least.

    Example:
        >>> history = BlockHistory()
        >>> history({"step": 0, "selected": ["layer.1"], "explored": True})
        >>> figure = draw_blocks(history)
    """
    with chart_settings():
        return _draw(history, history.updates)


def _draw(history: BlockHistory, updates: dict[str, int]) -> Figure:
    trained, edges = in_stretches(history)
    num_blocks = len(updates)
    height = max(1.0, min(6.5, 0.235 * num_blocks))
    figure = new_figure(height=1.75 + min(6.5, 0.235 * num_blocks))
    tops = (0.3 if any(history.explored) else 0.01, height)
    (strip, corner), (axes, bars) = figure.subplots(2, 2, width_ratios=(4, 1.25), height_ratios=tops)
    corner.set_visible(False)
    axes.pcolormesh(edges, np.arange(num_blocks + 1), trained, cmap="Greys", vmin=0, vmax=1, rasterized=True)
    draw_explore_steps(strip, history)
    shown = range(0, num_blocks, -(-num_blocks // MOST_ROWS))
    names = list(updates)
    axes.set_yticks([block + 0.5 for block in shown], [names[block] for block in shown], fontsize=9)
    axes.set_xlabel("step")
    axes.locator_params(axis="x", nbins=5, integer=True)
    _draw_bars(bars, list(updates.values()))
    for frame in (axes, bars):
        frame.set_ylim(num_blocks, 0)
    for frame in (axes, strip):
        frame.set_xlim(edges[0], edges[-1])
    return figure


def in_stretches(history: BlockHistory) -> tuple[np.ndarray, np.ndarray]:
    """Return the share of steps in which a block was trained, (blocks, stretches), and the limits of the stretches."""
    first, last = history.steps[0], history.steps[-1] + 1
    places = {name: place for place, name in enumerate(history.blocks)}
    chosen = np.zeros((len(places), last - first))
    for step, names in zip(history.steps, history.selected, strict=True):
        chosen[[places[name] for name in names], step - first] = 1
    edges = np.linspace(0, last - first, min(MOST_COLUMNS, last - first) + 1).round().astype(int)
    shares = np.stack([chosen[:, begin:end].mean(1) for begin, end in pairwise(edges)], axis=1)
    return shares, edges + first


def draw_explore_steps(strip: Axes, history: BlockHistory) -> None:
    """Draw a line for each explore step.

    Example:
        >>> history = BlockHistory()
        >>> history({"step": 0, "selected": ["layer.1"], "explored": True})
        >>> draw_explore_steps(new_figure(height=1.0).subplots(), history)
    """
    explored = np.asarray(history.steps)[np.asarray(history.explored, dtype=bool)]
    strip.vlines(explored + 0.5, 0, 1, color=INK, linewidth=0.8)
    strip.set_ylim(0, 1)
    strip.set_xticks([])
    strip.set_yticks([0.5], ["explore"], fontsize=9)
    strip.tick_params(axis="y", length=0)
    for side in ("left", "bottom"):
        strip.spines[side].set_visible(False)
    strip.set_visible(bool(explored.size))


def _draw_bars(bars: Axes, updates: list[int]) -> None:
    bars.barh(np.arange(len(updates)) + 0.5, updates, 0.75, color=GREY, edgecolor=INK, linewidth=0.5)
    if len(updates) <= MOST_ROWS:
        for block, count in enumerate(updates):
            bars.annotate(
                f"{count:,}", (count, block + 0.5), (3, 0), textcoords="offset points", va="center", fontsize=8
            )
    bars.set_xlim(0, 1.65 * max(1, *updates))
    bars.set_xticks([])
    bars.set_yticks([])
    bars.spines["bottom"].set_visible(False)
    bars.set_xlabel("updates")
