"""Style of the pictures."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib
import matplotlib.style
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

WIDTH = 5.6
"""Inches. Narrow with large letters, to be readable on a phone."""

DPI = 180
INK, GREY, PALE = "#1a1a1a", "#6b6b6b", "#d4d4d4"

SETTINGS: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 11,
    "axes.labelsize": 11,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "lines.linewidth": 1.8,
    "hatch.linewidth": 0.7,
    "axes.unicode_minus": True,
}


@contextmanager
def chart_settings() -> Iterator[None]:
    """Use matplotlib's defaults and ours, not the user's.

    Example:
        >>> with chart_settings():
        ...     figure = new_figure(height=2.0)
    """
    with matplotlib.style.context("default"), matplotlib.rc_context(SETTINGS):
        yield


def new_figure(*, height: float, width: float = WIDTH) -> Figure:
    """Return an empty figure, in inches, that is not on any screen.

    Example:
        >>> new_figure(height=2.0).get_size_inches().tolist()
        [5.6, 2.0]
    """
    figure = Figure(figsize=(width, height), layout="constrained", dpi=DPI)
    FigureCanvasAgg(figure)
    return figure


def to_png(figure: Figure) -> bytes:
    """Return the picture. The same figure gives the same bytes: no version or date is written.

    Example:
        >>> to_png(new_figure(height=1.0))[1:4]
        b'PNG'
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()


def to_pixels(figure: Figure) -> np.ndarray:
    """Return the picture as uint8 (height, width, 3).

    Example:
        >>> len(to_pixels(new_figure(height=1.0)))
        180
    """
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
