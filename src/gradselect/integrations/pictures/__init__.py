"""Pictures of a run's selection, drawn by matplotlib: blocks by step, entries by step."""

from .blocks import MOST_COLUMNS, draw_blocks, draw_explore_steps
from .entries import draw_entries
from .style import DPI, GREY, INK, PALE, chart_settings, new_figure, to_pixels, to_png

__all__ = [
    "DPI",
    "GREY",
    "INK",
    "MOST_COLUMNS",
    "PALE",
    "chart_settings",
    "draw_blocks",
    "draw_entries",
    "draw_explore_steps",
    "new_figure",
    "to_pixels",
    "to_png",
]
