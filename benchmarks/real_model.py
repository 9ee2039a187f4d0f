"""Suites on a real model, and what their tables share."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from common import RESULTS
from compared import comparison_of, peak

from gradselect.app.report.comparison import Comparison
from gradselect.app.report.methods import Method
from gradselect.app.report.scores import Measure, Scores

OURS = "adagradselect"
FULL, SMALL_LORA, LORA_WITH_EMBEDDING, WIDE_LORA = "full", "LoRA r=16", "LoRA r=16 + E", "LoRA r=256"
ONCE = "six by the first gradient"
TITLES = {"accuracy": "%", "mean_chrf": "chrF"}
"""Behind the name of an evaluation, in place of the metric's own name."""


@dataclass(frozen=True, kw_only=True)
class Suite:
    """A suite whose section appears once its results are in benchmarks/results.

    Args:
        name: of the suite, and of the folder of its results.
        title: heading of the section.
        task: what every method does, in one or two sentences.
        ahead_by: points that AdaGradSelect is asked to be ahead of a method; below 0 it may be that far behind.
        results: folder of all results.
    """

    name: str
    title: str
    task: str
    ahead_by: Mapping[str, float] = field(default_factory=dict)
    results: Path = RESULTS

    @property
    def folder(self) -> Path:
        return self.results / self.name

    @property
    def is_shown(self) -> bool:
        """True if a method has a score."""
        return any(self.folder.glob("*.score.json*"))

    @property
    def comparison(self) -> Comparison:
        return comparison_of(self.folder)


ASKED = {FULL: -0.5, WIDE_LORA: 3.0}
"""Half a point behind full fine-tuning at most, and three points ahead of LoRA r=256, as the paper has it."""

SUITES = (
    Suite(
        name="smollm2",
        title="SmolLM2-135M at equal time",
        task="SmolLM2-135M-Instruct learns to answer word problems of ASDiv by their formula. Every method trains for "
        "the time that full fine-tuning takes for 72 steps of 16.",
        ahead_by=ASKED,
    ),
    Suite(
        name="smollm2-half",
        title="SmolLM2-135M in half of the time",
        task="SmolLM2-135M-Instruct learns to answer word problems of ASDiv by their formula. Every method trains for "
        "the time that full fine-tuning takes for 36 steps of 16, about half a pass over the data.",
        ahead_by=ASKED,
    ),
    Suite(
        name="smollm2-steps",
        title="SmolLM2-135M in equal steps",
        task="The same task in 36 steps of 16 for every method, whatever they cost.",
        ahead_by=ASKED,
    ),
    Suite(
        name="smollm2-memory",
        title="SmolLM2-135M at equal time in 1.2 GB",
        task="The same task in the time of 72 full steps, for methods that hold at most 1.2 GB of weights, gradients, "
        "masters and state. Full fine-tuning holds more and is only the measure of time.",
        ahead_by=ASKED,
    ),
    Suite(
        name="e2e",
        title="SmolLM2-135M describes restaurants",
        task="SmolLM2-135M-Instruct learns to describe restaurants from their fields (E2E). Every method trains for "
        "the time that full fine-tuning takes for 36 steps of 16. chrF is the mean over test restaurants, of 100.",
    ),
)


def variants(comparison: Comparison) -> list[Method]:
    """Return the variants of AdaGradSelect, that of the lowest held-out loss first: no test item decides."""
    found = [method for method in comparison.methods if method.runs[0].record.method_settings.get("name") == OURS]
    losses = held_out_losses(found)
    return sorted(found, key=lambda method: (losses[method.name] is None, losses[method.name], method.name))


def held_out_losses(methods: Sequence[Method]) -> dict[str, float | None]:
    """Return the mean loss on held-out rows over the seeds that all methods have: each seed holds out other rows."""
    shared = set.intersection(*(set(method.seeds) for method in methods)) if methods else set()
    found = {}
    for method in methods:
        losses = [run.record.validation_loss for run in method.runs if run.record.seed in shared]
        known = [loss for loss in losses if loss is not None and math.isfinite(loss)]
        found[method.name] = math.fsum(known) / len(known) if len(known) == len(losses) > 0 else None
    return found


def headline_methods(comparison: Comparison) -> list[str]:
    """Return the methods of README's table: full fine-tuning, AdaGradSelect, the choice made once, LoRA.

    Of AdaGradSelect they are the best variant, and the best that holds no more than LoRA with the embedding.
    """
    known = {method.name for method in comparison.methods}
    ours = variants(comparison)
    best = [method.name for method in (*ours[:1], *holding_no_more(comparison, ours, LORA_WITH_EMBEDDING)[:1])]
    names = dict.fromkeys((FULL, *best, ONCE, SMALL_LORA, LORA_WITH_EMBEDDING, WIDE_LORA))
    return [name for name in names if name in known]


def holding_no_more(comparison: Comparison, methods: Sequence[Method], other: str) -> list[Method]:
    """Return the methods whose runs hold no more bytes than those of `other`; none if it has no results."""
    if all(method.name != other for method in comparison.methods):
        return []
    return [method for method in methods if peak(comparison, method.name) <= peak(comparison, other)]


def headline_suite(suites: Sequence[Suite]) -> Suite | None:
    """Return the first suite with several seeds of each method of README's table, else the first with results."""
    shown = [suite for suite in suites if suite.is_shown]
    for suite in shown:
        names = headline_methods(suite.comparison)
        if all(len(method.seeds) > 1 for method in suite.comparison.methods if method.name in names):
            return suite
    return shown[0] if shown else None


def twin_of(name: str) -> str:
    """Return the name of the method that draws as many of the same blocks uniformly."""
    return f"uniform {name.removeprefix('AdaGradSelect ')}"


def measures(comparison: Comparison) -> list[Scores]:
    """Return the scores in the order of the columns: those that a task is judged by, then losses."""
    return sorted(comparison.scores, key=lambda scores: not scores.measure.higher_is_better)


def title_of(measure: Measure) -> str:
    return measure.title if measure.metric == "loss" else f"{measure.name} {TITLES.get(measure.metric, measure.metric)}"


FRACTIONS = ("f1", "matthews", "spearman", "pearson")
"""Metrics that are at most 1; others are in percent or points."""


def decimals_of(measure: Measure) -> int:
    return 3 if measure.metric in ("loss", *FRACTIONS) else 1


def value_of(scores: Scores, name: str, *, interval: bool) -> str:
    """Write a score, with its interval if that is asked for."""
    if (estimate := scores.estimates.get(name)) is None:
        return ""
    scale, decimals = scores.measure.scale, decimals_of(scores.measure)
    text = f"{scale * estimate.value:.{decimals}f}"
    if not interval or estimate.interval is None:
        return text
    low, high = (scale * limit for limit in estimate.interval)
    return f"{text} ({low:.{decimals}f} to {high:.{decimals}f})"


def seeds_text(counts: Iterable[int]) -> str:
    """Say what the intervals are over."""
    known = set(counts)
    if known == {1}:
        return "There is one seed: an interval is over the test items alone, and leaves out what another seed changes."
    if 1 in known:
        return (
            "Where `seeds` is 1 an interval is over the test items alone, and leaves out what another seed changes; "
            "else it is over items and seeds."
        )
    return "They are over items and seeds."
