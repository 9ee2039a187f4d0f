"""Sentences at the top of the page."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from gradselect.app.results import reversals, rungs_of

from . import number_format as words
from .budget_section import budget_findings
from .comparison import Comparison
from .methods import Method, ratio
from .scores import FEW_ITEMS, Difference, Scores

FEW = 6
"""Largest number of names in a sentence; further ones are counted."""


def facts(comparison: Comparison) -> Iterator[str]:
    """Yield the counts, the protocol and the commits."""
    results = comparison.results
    yield words.plural(len(comparison.methods), "method")
    yield words.plural(sum(len(method.runs) for method in comparison.methods), "scored run")
    searched = [run.record.share for run in results.runs if run.record.role == "rate"]
    if searched:
        short = sum(share < 1 for share in searched)
        of_them = f" ({short:,} of them short)" if short else ""
        yield f"{words.plural(len(searched), 'run')} of the rate search{of_them}"
    yield f"protocol {results.runs[0].record.protocol[:12]}"
    commits = sorted({(run.record.commit or "no commit")[:12] for run in results.runs})
    yield f"{'commit' if len(commits) == 1 else 'commits'} {', '.join(commits)}"
    num_dirty = sum(run.record.dirty for run in results.runs)
    if num_dirty:
        yield f"{words.plural(num_dirty, 'run')} of a tree with uncommitted changes"


def findings(comparison: Comparison) -> Iterator[str]:
    """Yield the best method, the cheapest ones that are not shown to be worse than full fine-tuning, and limits."""
    if comparison.scores:
        yield _best(comparison)
    yield from budget_findings(comparison)
    yield from _cheap(comparison)
    yield from _edges(comparison)
    yield from _side_by_side(comparison)
    yield from _resumed(comparison)
    if found := list(disagreements(comparison)):
        lines = f"{words.plural(len(found), 'pair')} of rates"
        yield f"Short runs of the rate search and those of all steps put {lines} in another order; see its section."
    yield from _undefined(comparison)
    yield from _about_items(comparison)
    yield from _left_out(comparison)


def _best(comparison: Comparison) -> str:
    scores = comparison.scores[0]
    best = scores.best()
    estimate = scores.estimates[best]
    interval = scores.measure.show_interval(estimate.interval)
    known = f" (95 % interval {interval})" if interval else ""
    start = f"Best {scores.measure.title}: {best}, {scores.measure.show(estimate.value)}{known}."
    if len(scores.estimates) == 1:
        return f"{start} No other method has this score."
    if scores.table is None:
        return f"{start} Differences are not tested: that takes a mean over two items or more that all runs have."
    tested = [pair for of, pairs in comparison.pairs if of is scores for pair in pairs if pair.first == best]
    level = [pair.second for pair in tested if not pair.is_significant]
    untested = scores.untested(best)
    sentences = [start]
    if level:
        sentences.append(f"Not shown to be worse: {_few(level)}.")
    elif tested:
        sentences.append(
            f"It is significantly better than every other method{' that could be tested' if untested else ''}."
        )
    if untested:
        sentences.append(f"Not tested against it, because no seed has items of both: {_few(untested)}.")
    return " ".join(sentences)


def _cheap(comparison: Comparison) -> Iterator[str]:
    """Yield the cheapest methods that these runs do not show to be worse than full fine-tuning."""
    full = comparison.full
    if full is None or not comparison.differences:
        return
    scores, reference, tested = comparison.differences[0]
    if reference != full.name:
        return
    sign = 1 if scores.measure.higher_is_better else -1
    level = {one.first: one for one in tested if not (one.is_significant and sign * one.value < 0)}
    if not level:
        untested = scores.untested(full.name)
        rest = f"; not tested, because no seed has items of both: {_few(untested)}" if untested else ""
        others = "Every other method's" if not untested else "Every tested method's"
        yield f"{others} {scores.measure.title} is significantly worse than that of full fine-tuning{rest}."
        return
    costs = (
        ("Fastest to train", "training time", lambda method: method.training_seconds),
        ("Smallest on average", "average bytes", lambda method: method.average_bytes),
    )
    for what, cost_name, cost in costs:
        if cost(full) is not None:
            yield from _cheapest(comparison, level, scores, what=what, cost_name=cost_name, cost=cost)


def _cheapest(
    comparison: Comparison,
    level: Mapping[str, Difference],
    scores: Scores,
    *,
    what: str,
    cost_name: str,
    cost: Callable[[Method], float | None],
) -> Iterator[str]:
    """Yield the cheapest of the methods in `level`; nothing if the cost of none is known."""
    methods = {method.name: method for method in comparison.methods if method.name in level}
    prices = {name: price for name, method in methods.items() if (price := cost(method)) is not None}
    if not prices or comparison.full is None:
        return
    name = min(prices, key=lambda candidate: (prices[candidate], candidate))
    difference = f"{scores.measure.show_difference(level[name].value)} {scores.measure.unit}".strip()
    unknown = [other for other in methods if other not in prices]
    yield (
        f"{what} of the methods that are not shown to be worse than full fine-tuning: {name}, "
        f"{words.share(ratio(prices[name], cost(comparison.full)))} of the {cost_name} of full; {difference} (95 % "
        f"interval {scores.measure.show_interval(level[name].interval)})."
        + (f" Unknown {cost_name}: {_few(unknown)}." if unknown else "")
    )


def _undefined(comparison: Comparison) -> Iterator[str]:
    """Yield the runs that no mean holds: a correlation of constant predictions, or a loss that is not finite."""
    for scores in comparison.scores:
        counts = {
            method.name: (len(method.runs) - estimate.num_runs, len(method.runs))
            for method in comparison.methods
            if (estimate := scores.estimates.get(method.name)) is not None and estimate.num_runs < len(method.runs)
        }
        if counts:
            named = words.joined([f"{lost} of {of} runs of {name}" for name, (lost, of) in counts.items()])
            yield (
                f"{words.upper_first(scores.measure.title)} is undefined in {named}, as after training that collapsed. "
                "Means are over the other runs, and look better for it."
            )


def _about_items(comparison: Comparison) -> Iterator[str]:
    """Yield what makes intervals and tests over items rough: few items, or runs that lack some."""
    for scores in comparison.scores:
        if scores.table is None:
            continue
        number, most = scores.table.num_items, scores.table.most_items
        if number < most:
            yield (
                f"Intervals and tests of {scores.measure.title} are over the {words.plural(number, 'item')} that all "
                f"runs have; a run has {most:,}."
            )
        if number < FEW_ITEMS:
            yield (
                f"{words.upper_first(scores.measure.title)} has {words.plural(number, 'item')}. With fewer than "
                f"{FEW_ITEMS}, intervals of skewed values are too narrow."
            )


def _edges(comparison: Comparison) -> Iterator[str]:
    on_edge = [method.name for method in comparison.methods if method.edge in ("lowest", "highest")]
    if on_edge:
        yield f"Best rate at an edge of the grid, so a better one may lie beyond it: {_few(on_edge)}."


def _side_by_side(comparison: Comparison) -> Iterator[str]:
    jobs = sorted({run.record.jobs for method in comparison.methods for run in method.runs})
    if len(jobs) > 1:
        counts = words.joined([f"{count:,}" for count in jobs])
        yield f"Runs were made {counts} at a time, so times of steps do not compare among all methods."
    elif jobs and jobs[0] > 1:
        yield f"Runs were made {jobs[0]:,} side by side: times of steps hold for a shared machine."


def _resumed(comparison: Comparison) -> Iterator[str]:
    resumed = [method.name for method in comparison.methods for run in method.runs if run.record.resumed_from]
    if resumed:
        named = _few(list(dict.fromkeys(resumed)))
        yield (
            f"{words.plural(len(resumed), 'run')} went on from a checkpoint ({named}): the training time is that of "
            "the last session, extended to all steps; times of steps and bytes are those of that session."
        )


def disagreements(comparison: Comparison) -> Iterator[str]:
    """Yield a line for each pair of rates that short runs of the search and those of all steps put in another order."""
    runs = comparison.results.runs
    for method in sorted({run.record.method for run in runs if run.record.share < 1}):
        for pair in reversals(rungs_of(runs, method)):
            yield (
                f"{method}: at {words.share(pair.share)} of its steps {words.rate(pair.ahead)} was ahead of "
                f"{words.rate(pair.behind)}, at all steps it is behind."
            )


def _left_out(comparison: Comparison) -> Iterator[str]:
    results = comparison.results
    left = (
        (len(results.failed), "failed run"),
        (len(results.skipped), "unusable file"),
        (len(results.dirty), "run of a tree with uncommitted changes"),
        (len(comparison.others), "scored run at another rate than the best of its method"),
    )
    named = [f"{count} {one if count == 1 else _plural(one)}" for count, one in left if count]
    if named:
        yield f"Left out: {words.joined(named)}."


def _plural(words_of_one: str) -> str:
    head, *rest = words_of_one.split(" ")
    if head in ("failed", "unusable", "scored"):
        return " ".join([head, f"{rest[0]}s", *rest[1:]])
    return " ".join([f"{head}s", *rest])


def _few(names: list[str]) -> str:
    return words.joined(names if len(names) <= FEW else [*names[: FEW - 1], f"{len(names) - FEW + 1} more"])
