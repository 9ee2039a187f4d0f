"""Intervals, tests, bootstrap and metrics, on scipy and numpy."""

from .bootstrap import Outcomes, draw_means
from .intervals import (
    Interval,
    mean_and_deviation,
    mean_loss,
    mean_loss_interval,
    percentile_interval,
    student_interval,
    wilson_interval,
)
from .metrics import class_metrics, score_metrics
from .paired_tests import holm_adjusted, mcnemar, two_sided_p

__all__ = [
    "Interval",
    "Outcomes",
    "class_metrics",
    "draw_means",
    "holm_adjusted",
    "mcnemar",
    "mean_and_deviation",
    "mean_loss",
    "mean_loss_interval",
    "percentile_interval",
    "score_metrics",
    "student_interval",
    "two_sided_p",
    "wilson_interval",
]
