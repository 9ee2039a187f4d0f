"""Agreement of predictions with references. A figure that is not defined is None."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any

from scipy import stats


def class_metrics(references: Sequence[int], predictions: Sequence[int], *, num_labels: int) -> dict[str, float | None]:
    """Accuracy and Matthews correlation of predicted labels; for two labels also the F1 of label 1."""
    metrics: dict[str, float | None] = {
        "accuracy": sum(map(int.__eq__, references, predictions)) / len(references),
        "matthews": matthews_correlation(references, predictions),
    }
    return metrics if num_labels != 2 else {**metrics, "f1": f1(references, predictions)}


def score_metrics(references: Sequence[float], predictions: Sequence[float]) -> dict[str, float | None]:
    """Pearson and Spearman correlation of predicted scores."""
    return {"pearson": pearson(references, predictions), "spearman": spearman(references, predictions)}


def f1(references: Sequence[int], predictions: Sequence[int]) -> float | None:
    """2 TP / (2 TP + FP + FN) = 2 TP / (references of class 1 + predictions of class 1); None without any."""
    hits = sum(a == b == 1 for a, b in zip(references, predictions, strict=True))
    total = references.count(1) + predictions.count(1)
    return 2 * hits / total if total else None


def matthews_correlation(references: Sequence[int], predictions: Sequence[int]) -> float | None:
    """Correlation of two classifications; None if one of them has a single class.

        (n c - sum_k t_k p_k) / sqrt((n² - sum_k t_k²) (n² - sum_k p_k²))

    with n items, c of them right, and class k named t_k times by the references and p_k times by the predictions. For
    two classes it is the Pearson correlation of 0 and 1. scipy has no such correlation for more than two.

    Reference: J. Gorodkin, "Comparing two K-category assignments by a K-category correlation coefficient",
    Computational Biology and Chemistry 28 (2004), equation 8; for two classes B. W. Matthews, BBA 405 (1975).
    """
    n = len(references)
    right = sum(a == b for a, b in zip(references, predictions, strict=True))
    true, predicted = Counter(references), Counter(predictions)
    # Integers until the square root: no rounding error.
    above = n * right - sum(count * predicted[label] for label, count in true.items())
    spread = (n * n - sum(t * t for t in true.values())) * (n * n - sum(p * p for p in predicted.values()))
    return above / math.sqrt(spread) if spread else None


def pearson(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Pearson correlation; None if x or y is constant or not finite."""
    if len(set(x)) < 2 or len(set(y)) < 2 or not all(map(math.isfinite, [*x, *y])):
        return None
    with warnings.catch_warnings():
        # Scores of an untrained head can be nearly constant; the figure is shown all the same.
        warnings.simplefilter("ignore", stats.NearConstantInputWarning)
        result: Any = stats.pearsonr(x, y)
    return float(result.statistic) if math.isfinite(result.statistic) else None


def spearman(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Pearson correlation of the ranks, where equal values share their mean rank."""
    if not all(map(math.isfinite, [*x, *y])):
        return None
    return pearson(stats.rankdata(x).tolist(), stats.rankdata(y).tolist())
