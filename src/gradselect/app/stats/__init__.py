"""Intervals, tests, bootstrap and metrics, on scipy and numpy; scores of texts, on sacrebleu."""

from .bootstrap import Outcomes, degrees_of_freedom, draw_means
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
from .text_scores import MEAN_CHRF, check_text_scores, chrf, corpus_scores

__all__ = [
    "MEAN_CHRF",
    "Interval",
    "Outcomes",
    "check_text_scores",
    "chrf",
    "class_metrics",
    "corpus_scores",
    "degrees_of_freedom",
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
