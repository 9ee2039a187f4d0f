"""Pictures of what was selected over the steps."""

from __future__ import annotations

from gradselect.app.results import BlockSelection
from gradselect.core import BlockHistory
from gradselect.integrations.pictures import MOST_COLUMNS, draw_blocks, to_png

from . import number_format as words
from .charts import Chart
from .methods import Method


def draw_selection(method: Method, selection: BlockSelection, *, name: str) -> Chart:
    """Draw blocks by step, explore steps above, and the updates of each block at the right."""
    return draw_history(
        history_of(selection),
        name=name,
        title=f"{method.name}: which blocks trained when",
        of=method.name,
        detail=f" Seed {method.seeds[0]}, {words.rate(method.lr)}.",
    )


def draw_history(history: BlockHistory, *, name: str, title: str, of: str, detail: str = "") -> Chart:
    """Draw blocks by step. `of` names what was trained, for those who cannot see the picture."""
    num_steps = len(history.steps)
    is_long = num_steps > MOST_COLUMNS
    shade = "Grey: share of the steps of a stretch in which the block trained" if is_long else "Black: trained"
    explored = f"{sum(history.explored):,} of {words.plural(num_steps, 'step')} explored"
    counts = "; ".join(f"{block} {count:,}" for block, count in history.updates.items())
    return Chart(
        name=name,
        title=title,
        caption=f"{shade}. {explored} (the lines on top). Right: updates of each block.{detail}",
        alt=f"Heat map of the blocks that {of} trained at each step. Updates by block: {counts}.",
        png=to_png(draw_blocks(history)),
    )


def history_of(selection: BlockSelection) -> BlockHistory:
    """Return the selection as a history, from step 0."""
    names = selection.blocks
    return BlockHistory(
        names=names,
        steps=list(range(len(selection.selected))),
        selected=[tuple(names[place] for place in step) for step in selection.selected],
        explored=[bool(mark) for mark in selection.explored] or [False] * len(selection.selected),
    )
