"""Style of the charts. A method has the same mark everywhere; marks differ in shape and dash, not in colour only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.markers import MarkerStyle
from matplotlib.path import Path as Outline
from matplotlib.patheffects import AbstractPathEffect, withStroke

from gradselect.integrations.pictures import INK

from .methods import Method

SHAPES = ("s", "^", "D", "v", "P", "X", "*", "p", ">", "h", "<", "d")
COLOURS = ("#0b559f", "#b3480f", "#0a6e4f", "#8b2a6b", "#6b5b00", "#4b3b8f")
DASHES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)), (0, (9, 3)))
HATCHES = ("", "////", "....", "xxxx", "----")
FILLS = ("#3b5b7a", "#dfe7ee", "#9bb3c8", "#f6f1e4", "#c9b98a")

FAR = 16
"""Distance in points from which a line joins a mark and its name."""

HALO: list[AbstractPathEffect] = [withStroke(linewidth=2.5, foreground="white")]
"""A white edge, so that letters are readable on lines."""


@dataclass(frozen=True, kw_only=True)
class Mark:
    """Mark of a method in every chart."""

    shape: str
    colour: str
    dash: Any
    is_hollow: bool

    @property
    def face(self) -> str:
        return "white" if self.is_hollow else self.colour

    def svg(self) -> Markup:
        """Return the shape as SVG, for the page."""
        style = MarkerStyle(self.shape)
        outline = style.get_path().transformed(style.get_transform())
        segments = outline.iter_segments(simplify=False)
        return Markup(
            '<svg class="mark" viewBox="-.75 -.75 1.5 1.5" aria-hidden="true"><path transform="scale(1,-1)" d="{}" '
            'fill="{}" stroke="{}" stroke-width=".16"/></svg>'
        ).format("".join(_command(vertices, int(code)) for vertices, code in segments), self.face, self.colour)


_COMMANDS = {Outline.MOVETO: "M", Outline.LINETO: "L", Outline.CURVE3: "Q", Outline.CURVE4: "C"}


def _command(vertices: Any, code: int) -> str:
    """Return a piece of an outline as a command of an SVG path."""
    if code == Outline.CLOSEPOLY:
        return "Z"
    return _COMMANDS[np.uint8(code)] + " ".join(f"{value:.3f}" for value in vertices)


def choose_marks(methods: Sequence[Method]) -> dict[str, Mark]:
    """Return a mark for each method: a black disc for full fine-tuning, then shapes in the order of the names.

    When the shapes run out, they are repeated hollow.
    """
    marks = {
        method.name: Mark(shape="o", colour=INK, dash="-", is_hollow=False) for method in methods if method.is_full
    }
    others = sorted({method.name for method in methods} - marks.keys())
    for place, name in enumerate(others):
        marks[name] = Mark(
            shape=SHAPES[place % len(SHAPES)],
            colour=COLOURS[place % len(COLOURS)],
            dash=DASHES[(place + 1) % len(DASHES)],
            is_hollow=place // len(SHAPES) % 2 == 1,
        )
    return marks
