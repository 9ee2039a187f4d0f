"""Heat maps of the selected blocks over the steps."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from matplotlib.axes import Axes

from gradselect.app.results import BlockSelection

from . import number_format as words
from .chart_style import GREY, INK, new_figure, to_png
from .charts import Chart
from .methods import Method

MOST_COLUMNS = 240
"""Longer runs are drawn in stretches of steps: columns narrower than a pixel would show noise."""

MOST_ROWS = 34
"""With more blocks than this, only some are named."""


def draw_selection(method: Method, selection: BlockSelection, *, name: str) -> Chart:
    """Draw blocks by step, explore steps above, and the updates of each block at the right."""
    trained, edges = in_stretches(selection)
    num_blocks, num_steps = len(selection.blocks), len(selection.selected)
    figure = new_figure(height=1.75 + min(6.5, 0.235 * num_blocks))
    tops = (0.3 if any(selection.explored) else 0.01, max(1.0, min(6.5, 0.235 * num_blocks)))
    (strip, corner), (axes, bars) = figure.subplots(2, 2, width_ratios=(4, 1.25), height_ratios=tops)
    corner.set_visible(False)
    axes.pcolormesh(edges, np.arange(num_blocks + 1), trained, cmap="Greys", vmin=0, vmax=1, rasterized=True)
    _draw_strip(strip, selection)
    strip.set_visible(any(selection.explored))
    shown = range(0, num_blocks, -(-num_blocks // MOST_ROWS))
    axes.set_yticks([block + 0.5 for block in shown], [selection.blocks[block] for block in shown], fontsize=9)
    axes.set_xlabel("step")
    axes.locator_params(axis="x", nbins=5)
    bars.barh(np.arange(num_blocks) + 0.5, selection.updates, 0.75, color=GREY, edgecolor=INK, linewidth=0.5)
    if num_blocks <= MOST_ROWS:
        for block, count in enumerate(selection.updates):
            bars.annotate(
                f"{count:,}", (count, block + 0.5), (3, 0), textcoords="offset points", va="center", fontsize=8
            )
    bars.set_xlim(0, 1.65 * max(1, *selection.updates))
    bars.set_xticks([])
    bars.set_yticks([])
    bars.spines["bottom"].set_visible(False)
    bars.set_xlabel("updates")
    for frame in (axes, bars):
        frame.set_ylim(num_blocks, 0)
    strip.set_xlim(0, num_steps)
    axes.set_xlim(0, num_steps)
    return Chart(
        name=name,
        title=f"{method.name}: which blocks trained when",
        caption=_caption(method, selection, stretch=num_steps > MOST_COLUMNS),
        alt=_alt(method, selection),
        png=to_png(figure),
    )


def in_stretches(selection: BlockSelection) -> tuple[np.ndarray, np.ndarray]:
    """Return the share of steps in which a block was trained, (blocks, stretches), and the limits of the stretches."""
    num_steps = len(selection.selected)
    chosen = np.zeros((len(selection.blocks), num_steps))
    for step, blocks in enumerate(selection.selected):
        chosen[blocks, step] = 1
    edges = np.linspace(0, num_steps, min(MOST_COLUMNS, num_steps) + 1).round().astype(int)
    return np.stack([chosen[:, first:last].mean(1) for first, last in pairwise(edges)], axis=1), edges


def _draw_strip(strip: Axes, selection: BlockSelection) -> None:
    """Draw a line for each explore step."""
    strip.vlines(np.flatnonzero(selection.explored) + 0.5, 0, 1, color=INK, linewidth=0.8)
    strip.set_ylim(0, 1)
    strip.set_xticks([])
    strip.set_yticks([0.5], ["explore"], fontsize=9)
    strip.tick_params(axis="y", length=0)
    for side in ("left", "bottom"):
        strip.spines[side].set_visible(False)


def _caption(method: Method, selection: BlockSelection, *, stretch: bool) -> str:
    shade = "grey: share of the steps of a stretch in which the block trained" if stretch else "black: trained"
    explored = f"{sum(selection.explored):,} of {words.plural(len(selection.selected), 'step')} explored"
    return (
        f"{shade[0].upper()}{shade[1:]}. {explored} (the lines on top). "
        f"Right: updates of each block. Seed {method.seeds[0]}, {words.rate(method.lr)}."
    )


def _alt(method: Method, selection: BlockSelection) -> str:
    counts = "; ".join(f"{block} {count:,}" for block, count in zip(selection.blocks, selection.updates, strict=True))
    return f"Heat map of the blocks that {method.name} trained at each step. Updates by block: {counts}."
