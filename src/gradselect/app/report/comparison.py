"""Input of all sections, computed once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from .chart_style import Mark, choose_marks
from .methods import Method, collect_methods, find_full
from .read_results import Result, Results
from .scores import Difference, Scores, collect_scores


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Methods and scores of a folder of results.

    Args:
        results: of the folder.
        methods: the best first; without scores the fastest first.
        others: scored runs whose rate is not the best of their method.
        scores: one per measure; the first ranks the methods.
    """

    results: Results
    methods: tuple[Method, ...]
    others: tuple[Result, ...]
    scores: tuple[Scores, ...]

    @property
    def full(self) -> Method | None:
        """Full fine-tuning, which speed and memory are relative to."""
        return find_full(self.methods)

    @cached_property
    def marks(self) -> dict[str, Mark]:
        return choose_marks(self.methods)

    @cached_property
    def differences(self) -> list[tuple[Scores, str, list[Difference]]]:
        """Reference and differences of every other method to it, for each measure that has items.

        The reference is full fine-tuning, or the best method if that has no score.
        """
        found = []
        for scores in self.scores:
            has_full = self.full is not None and self.full.name in scores.estimates
            reference = self.full.name if self.full is not None and has_full else scores.best()
            if tested := scores.against(reference):
                found.append((scores, reference, tested))
        return found

    @cached_property
    def pairs(self) -> list[tuple[Scores, list[Difference]]]:
        """Differences of all pairs, for each measure that has items."""
        return [(scores, tested) for scores in self.scores if (tested := scores.pairs())]


def compare_results(results: Results) -> Comparison:
    """Collect the methods at their best rates, sorted, and their scores."""
    methods, others = collect_methods(results.runs)
    scores = collect_scores(methods)

    def order(method: Method) -> tuple[float, str]:
        return scores[0].order(method.name) if scores else (method.step_seconds or math.inf, method.name)

    return Comparison(
        results=results,
        methods=tuple(sorted(methods, key=order)),
        others=tuple(others),
        scores=tuple(scores),
    )
