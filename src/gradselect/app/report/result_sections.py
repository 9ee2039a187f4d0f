"""Sections on results: scores, differences, the search of the learning rate, what is left out."""

from __future__ import annotations

from collections.abc import Iterator

from . import number_format as words
from .budget_section import left_out_for_memory
from .charts import draw_differences
from .comparison import Comparison
from .findings import disagreements
from .page import Part
from .run_tables import failed_table, rate_table, skipped_table
from .score_tables import difference_table, forgetting_table, pair_table, results_table
from .table import Namer

HOW_TO_READ = (
    "Every method is shown at its best learning rate: the one with the lowest validation loss. The table says if that "
    "is an edge of the grid.",
    "Scores are means over seeds. Intervals are from a bootstrap over items and seeds together; from Student's t over "
    "seeds if there are fewer than two items; from the items alone if there is one seed.",
    "A difference is significant if its p-value, adjusted by Holm for all differences of its table, is below 0.05 and "
    "its interval does not contain zero. Right and wrong answers to the same items are tested by McNemar's test, with "
    "several seeds by its version for clustered pairs. Losses are tested by the bootstrap.",
    "The time of a step is the median over the steps of its kind; of several kinds, the mean weighted by their number "
    "of steps. Speed-up: time of a full fine-tuning step / time of the method's step. FLOP limit: the largest speed-up "
    "that the selected blocks allow.",
    "Bytes are the exact sizes of weights, gradients, master weights and optimizer state. Activations are not counted.",
)


def result_parts(comparison: Comparison, name: Namer) -> Iterator[Part]:
    if not comparison.methods:
        yield Part(text="No method has a scored run yet. Below is the search of the learning rates.")
        return
    full = comparison.full
    relative = "The results contain no full fine-tuning, so no figure is relative to it." if full is None else ""
    yield Part(
        text=relative,
        table=results_table(comparison.methods, scores=comparison.scores, full=full, name=name),
    )
    if (forgotten := forgetting_table(comparison.methods, name=name)) is not None:
        text = "Loss on text that the base model knew, in nats per token, before and after the training."
        yield Part(title="Forgetting", text=text, table=forgotten)
    yield Part(title="How to read this", lines=HOW_TO_READ, is_folded=True)


def difference_parts(comparison: Comparison, name: Namer) -> Iterator[Part]:
    charts = tuple(
        draw_differences(tested, measure=scores.measure, reference=reference, marks=comparison.marks)
        for scores, reference, tested in comparison.differences
    )
    if charts:
        yield Part(charts=charts)
    for scores, reference, tested in comparison.differences:
        untested = words.joined(scores.untested(reference))
        yield Part(
            title=words.upper_first(scores.measure.title),
            text=f"Not tested, because no seed has items of both: {untested}." if untested else "",
            table=difference_table(tested, measure=scores.measure, reference=reference, name=name),
        )
    for scores, pairs in comparison.pairs:
        if len(scores.estimates) > 2:
            yield Part(
                title=f"All pairs: {scores.measure.title}",
                text="A star: significant among all pairs. Column numbers are the numbers of the rows.",
                table=pair_table(pairs, scores=scores, name=name),
                is_folded=True,
            )


def rate_parts(comparison: Comparison, name: Namer) -> Iterator[Part]:
    runs = comparison.results.runs
    if (table := rate_table(runs, name=name)) is None:
        return
    text = "Validation loss at the end of training, by learning rate."
    if any(run.record.share < 1 for run in runs):
        text += (
            " Rates were searched by successive halving: each row is a length of the runs, and the best of it went on "
            "to the next. Runs of all steps chose the rate."
        )
    yield Part(text=text, table=table, lines=tuple(disagreements(comparison)))


def left_out_parts(comparison: Comparison, name: Namer) -> Iterator[Part]:
    results = comparison.results
    if left_out := left_out_for_memory(comparison):
        yield Part(
            title="Too large for the memory",
            lines=tuple(f"{method} {reason}" for method, reason in left_out.items()),
        )
    if results.failed:
        yield Part(title="Failed runs", table=failed_table(results.failed, name=name))
    if results.skipped:
        yield Part(title="Unusable files", table=skipped_table(results.skipped))
    if results.dirty:
        yield Part(
            title="Uncommitted changes",
            text=f"{words.plural(len(results.dirty), 'run')} of a tree that differed from its commit; in no table.",
            lines=tuple(run.path.name for run in results.dirty),
        )
    if comparison.others:
        yield Part(
            title="Scored at another rate",
            text="The learning rate of these runs is not the best one of their method.",
            lines=tuple(run.path.name for run in comparison.others),
        )
