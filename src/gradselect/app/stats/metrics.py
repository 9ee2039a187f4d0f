"""How well predictions agree with references; None where a figure is not defined."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence


def class_metrics(references: Sequence[int], predictions: Sequence[int], *, num_labels: int) -> dict[str, float | None]:
    """Accuracy and Matthews correlation of predicted labels, and of two labels the F1 of the one with number 1."""
    metrics: dict[str, float | None] = {
        "accuracy": sum(map(int.__eq__, references, predictions)) / len(references),
        "matthews": matthews_correlation(references, predictions),
    }
    return metrics if num_labels != 2 else {**metrics, "f1": f1(references, predictions)}


def score_metrics(references: Sequence[float], predictions: Sequence[float]) -> dict[str, float | None]:
    """Both correlations of predicted scores."""
    return {"pearson": pearson(references, predictions), "spearman": spearman(references, predictions)}


def f1(references: Sequence[int], predictions: Sequence[int], *, positive: int = 1) -> float | None:
    """2 TP / (2 TP + FP + FN) = 2 TP / (positive references + positive predictions); None without any positive."""
    hits = sum(a == b == positive for a, b in zip(references, predictions, strict=True))
    total = references.count(positive) + predictions.count(positive)
    return 2 * hits / total if total else None


def matthews_correlation(references: Sequence[int], predictions: Sequence[int]) -> float | None:
    """The correlation of two classifications; None if one of them knows a single class.

        (n c - sum_k t_k p_k) / sqrt((n² - sum_k t_k²) (n² - sum_k p_k²))

    with n items, c of them right, and class k named t_k times by the references and p_k times by the predictions. Of
    two classes it is the Pearson correlation of 0 and 1.

    Reference: J. Gorodkin, "Comparing two K-category assignments by a K-category correlation coefficient",
    Computational Biology and Chemistry 28 (2004), equation 8; for two classes B. W. Matthews, BBA 405 (1975).
    """
    n = len(references)
    right = sum(a == b for a, b in zip(references, predictions, strict=True))
    true, predicted = Counter(references), Counter(predictions)
    # Whole numbers until the root: nothing is lost to rounding.
    above = n * right - sum(count * predicted[label] for label, count in true.items())
    spread = (n * n - sum(t * t for t in true.values())) * (n * n - sum(p * p for p in predicted.values()))
    return above / math.sqrt(spread) if spread else None


def pearson(x: Sequence[float], y: Sequence[float]) -> float | None:
    """sum (x_i - x̄)(y_i - ȳ) / sqrt(sum (x_i - x̄)² sum (y_i - ȳ)²); None if x or y is constant or not finite."""
    if len(set(x)) < 2 or len(set(y)) < 2 or not all(map(math.isfinite, [*x, *y])):
        return None
    dx, dy = _centred(x), _centred(y)
    # Each root on its own, so that the product of two small sums does not become zero.
    scale = math.sqrt(math.fsum(a * a for a in dx)) * math.sqrt(math.fsum(b * b for b in dy))
    return math.fsum(a * b for a, b in zip(dx, dy, strict=True)) / scale if scale else None


def spearman(x: Sequence[float], y: Sequence[float]) -> float | None:
    """The Pearson correlation of the ranks, where equal values share their mean rank."""
    return pearson(ranks(x), ranks(y)) if all(map(math.isfinite, [*x, *y])) else None


def ranks(values: Sequence[float]) -> list[float]:
    """Of each value its place among all, from 1; equal values share the mean of their places."""
    order = sorted(range(len(values)), key=values.__getitem__)
    places: dict[float, list[int]] = {}
    for place, index in enumerate(order, start=1):
        places.setdefault(values[index], []).append(place)
    return [sum(places[value]) / len(places[value]) for value in values]


def _centred(values: Sequence[float]) -> list[float]:
    mean = math.fsum(values) / len(values)
    return [value - mean for value in values]
