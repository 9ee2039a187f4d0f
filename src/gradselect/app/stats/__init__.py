"""Intervals, tests and metrics."""

from .bootstrap import Interval, Outcomes, draw_means, mcnemar, percentile_interval, student_interval, two_sided_p
from .intervals import mean_loss, mean_loss_interval, wilson_interval
from .metrics import class_metrics, score_metrics
from .tests import holm_adjusted, mean_and_deviation

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
