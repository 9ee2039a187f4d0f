"""Points in a plane of cost and score, and their Pareto front."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gradselect.app.stats import Interval


@dataclass(frozen=True, kw_only=True)
class Point:
    """A method in a plane.

    Args:
        name: of the method.
        x: cost; less is better.
        y: score or loss.
        interval: of y; None if it is unknown.
    """

    name: str
    x: float
    y: float
    interval: Interval | None = None


def pareto_front(points: Sequence[Point], *, higher_is_better: bool) -> list[Point]:
    """Return the points that are better (y) than all points of the same or lower cost (x), the cheapest first."""
    sign = 1 if higher_is_better else -1
    front: list[Point] = []
    for point in sorted(points, key=lambda point: (point.x, -sign * point.y, point.name)):
        if not front or sign * point.y > sign * front[-1].y:
            front.append(point)
    return front
