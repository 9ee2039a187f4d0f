"""Labels of points and lines in a chart, placed so that they do not overlap."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from gradselect.integrations.pictures import GREY, PALE

from .chart_style import FAR, HALO, Mark


def label_points(
    axes: Axes,
    points: Sequence[tuple[float, float, str]],
    *,
    obstacles: Sequence[tuple[float, float, float, float]] = (),
) -> None:
    """Write each name near its point, where it hides least of points, names, obstacles and frame.

    Args:
        points: x, y and name, in units of the axes. A point with an empty name is only kept free.
        obstacles: lines that names should not hide: x and y of one end, x and y of the other.
    """
    size = _settled(axes).dpi / 72
    places = axes.transData.transform([(x, y) for x, y, _ in points])
    taken = [Bbox.from_bounds(x - 6 * size, y - 6 * size, 12 * size, 12 * size) for x, y in places]
    taken += [_line_box(axes, ends, 2 * size) for ends in obstacles]
    for (x, y, name), place in zip(points, places, strict=True):
        if not name:
            continue
        text = axes.annotate(name, (x, y), (0, 0), textcoords="offset points", fontsize=9.5, va="center", ha="center")
        text.set_path_effects(HALO)
        box = text.get_window_extent()
        extent = (box.width, box.height)
        dx, dy = _best_offset(place, extent, taken, axes.bbox, size)
        text.set_position((dx / size, dy / size))
        taken.append(_box(place, (dx, dy), extent))
        _draw_leader(axes, (x, y), _box((0, 0), (dx / size, dy / size), (box.width / size, box.height / size)))


def _draw_leader(axes: Axes, point: tuple[float, float], box: Bbox) -> None:
    """Draw a line from a point to the nearest edge of its name, if that is far. `box` is relative to the point."""
    near = min(max(0.0, box.x0), box.x1), min(max(0.0, box.y0), box.y1)
    if math.hypot(*near) > FAR:
        line = {"arrowstyle": "-", "color": GREY, "linewidth": 0.7, "shrinkA": 0, "shrinkB": 6}
        axes.annotate("", point, near, textcoords="offset points", arrowprops=line)


def _settled(axes: Axes) -> Figure:
    """Fix the layout of the figure, so that places in pixels stay right."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    return figure


def _line_box(axes: Axes, ends: tuple[float, float, float, float], width: float) -> Bbox:
    (x0, y0), (x1, y1) = axes.transData.transform([ends[:2], ends[2:]])
    return Bbox.from_extents(min(x0, x1) - width, min(y0, y1) - width, max(x0, x1) + width, max(y0, y1) + width)


def _best_offset(
    place: np.ndarray, extent: tuple[float, float], taken: Sequence[Bbox], frame: Bbox, size: float
) -> tuple[float, float]:
    """Return the offset of the middle of a name in pixels: near, and hiding little."""
    distances, turns = np.meshgrid((9, 14, 20, 28, 38, 50, 64), 2 * np.pi * np.arange(16) / 16, indexing="ij")
    offsets = np.stack(
        [
            (np.cos(turns) * (extent[0] / 2 + distances * size)).ravel(),
            (np.sin(turns) * (extent[1] / 2 + distances * size)).ravel(),
        ],
        axis=1,
    )  # (112, 2)
    corners = np.concatenate([place + offsets - np.divide(extent, 2), place + offsets + np.divide(extent, 2)], axis=1)
    covered = _overlaps(corners, np.array([box.extents for box in taken])).sum(1)
    outside = extent[0] * extent[1] - _overlaps(corners, np.array([frame.extents]))[:, 0]
    best = offsets[np.argmin(covered + 3 * outside + distances.ravel() * size * 9)]
    return float(best[0]), float(best[1])


def _overlaps(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Areas that boxes share: (112, 4) and (30, 4) -> (112, 30). A box is x0, y0, x1, y1."""
    low = np.maximum(first[:, None, :2], second[None, :, :2])
    high = np.minimum(first[:, None, 2:], second[None, :, 2:])
    return np.clip(high - low, 0, None).prod(axis=2)


def _box(place: Any, offset: tuple[float, float], extent: tuple[float, float]) -> Bbox:
    width, height = extent
    return Bbox.from_bounds(place[0] + offset[0] - width / 2, place[1] + offset[1] - height / 2, width, height)


def label_ends(axes: Axes, ends: Sequence[tuple[float, float, str, Mark]]) -> None:
    """Write mark and name of each line in a column at the right, near the height of its end."""
    right = axes.get_yaxis_transform()
    texts = [
        axes.annotate(name, (1, y), (20, 0), xycoords=right, textcoords="offset points", va="center", fontsize=9.5,
                      annotation_clip=False)
        for _, y, name, _ in ends
    ]  # fmt: skip
    figure = _settled(axes)
    heights = axes.transData.transform([(x, y) for x, y, _, _ in ends])[:, 1]
    gap = 1.15 * max(text.get_window_extent().height for text in texts)
    places = _spread(heights, gap)
    # Lower, the names would hide the numbers of the axis.
    places += max(0.0, axes.bbox.y0 + gap / 2 - places.min())
    for (x, y, _, mark), text, height, place in zip(ends, texts, heights, places, strict=True):
        text.set_position((20, (place - height) * 72 / figure.dpi))
        level = float(axes.transAxes.inverted().transform((0, place))[1])
        column = 1 + 11 * figure.dpi / 72 / axes.bbox.width
        axes.plot(column, level, mark.shape, color=mark.colour, markerfacecolor=mark.face, markersize=6,
                  transform=axes.transAxes, clip_on=False)  # fmt: skip
        axes.annotate("", (x, y), (column, level), textcoords="axes fraction", annotation_clip=False,
                      arrowprops={"arrowstyle": "-", "color": PALE, "linewidth": 0.8, "shrinkA": 5, "shrinkB": 3},
                      zorder=0)  # fmt: skip


def _spread(heights: np.ndarray, gap: float) -> np.ndarray:
    """Return the nearest places in the same order that are `gap` apart. Clusters are centred at their mean."""
    clusters: list[list[int]] = []
    for index in np.argsort(heights, kind="stable"):
        clusters.append([int(index)])
        while len(clusters) > 1 and _bottom(clusters[-1], heights, gap) < _top(clusters[-2], heights, gap) + gap:
            clusters[-2:] = [clusters[-2] + clusters[-1]]
    places = np.empty(len(heights))
    for cluster in clusters:
        places[cluster] = _bottom(cluster, heights, gap) + gap * np.arange(len(cluster))
    return places


def _bottom(cluster: list[int], heights: np.ndarray, gap: float) -> float:
    return float(heights[cluster].mean()) - gap * (len(cluster) - 1) / 2


def _top(cluster: list[int], heights: np.ndarray, gap: float) -> float:
    return float(heights[cluster].mean()) + gap * (len(cluster) - 1) / 2
