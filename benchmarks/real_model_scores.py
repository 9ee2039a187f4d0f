"""Scores, costs and forgetting of the suites on a real model, for docs/results.md and the README."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from common import markdown_table, megabytes
from compared import cost_of_a_step, steps_of, with_interval
from real_model import (
    LORA_WITH_EMBEDDING,
    ONCE,
    SUITES,
    Suite,
    headline_methods,
    headline_suite,
    measures,
    seeds_text,
    title_of,
    value_of,
    variants,
)
from real_model_memory import limits
from real_model_questions import questions

from gradselect.app.report.budget_section import failed_to_calibrate, left_out_for_memory
from gradselect.app.report.comparison import Comparison
from gradselect.app.report.methods import Method
from gradselect.app.report.score_tables import forgetting_names

FORGOTTEN = {"wikitext": "WikiText-2"}


def section(suite: Suite) -> str:
    """Return heading, scores and answers to the questions; nothing before there are results."""
    if not suite.is_shown:
        return ""
    comparison = suite.comparison
    parts = (
        f"## {suite.title}",
        f"`gradselect compare suites/{suite.name}.yaml`. {suite.task} Test items: {_items(comparison)}.",
        scores_table(comparison),
        "\n".join(f"* {line}" for line in _notes(comparison)),
        questions(suite),
        limits(comparison),
    )
    return "\n\n".join(part for part in parts if part)


def scores_table(comparison: Comparison) -> str:
    """One row a method: cost, scores, loss against full fine-tuning, what was forgotten, bytes."""
    found, sets = measures(comparison), forgetting_names(comparison.methods)
    full = _reference(comparison)
    to_full = {scores.measure.name: {one.first: one for one in scores.against(full)} for scores in found if full}
    lesser = {scores.measure.name for scores in found if full and not scores.measure.higher_is_better}
    is_timed = any(cost_of_a_step(method) for method in comparison.methods)
    headings = ["method", "seeds", "steps", *(["step"] if is_timed else [])]
    for scores in found:
        headings += [title_of(scores.measure), *(["less full's"] if scores.measure.name in lesser else [])]
    headings += [*(FORGOTTEN.get(name, name or "forgetting") for name in sets), "peak MB"]

    def cells(method: Method) -> list[str]:
        row = [method.name, str(len(method.seeds)), str(steps_of(method))]
        if is_timed:
            row.append(cost_of_a_step(method))
        for scores in found:
            difference = to_full.get(scores.measure.name, {}).get(method.name)
            value = value_of(scores, method.name, interval=scores is found[0])
            if scores.measure.name in lesser:
                row += [value, with_interval(difference, scale=1, decimals=3)]
            else:
                row.append(f"**{value}**" if difference is not None and difference.is_significant else value)
        rises = [method.forgetting(name) for name in sets]
        held = method.peak_bytes()
        return [
            *row,
            *("" if rise is None else f"{rise:+.3f}" for rise in rises),
            "" if held is None else megabytes(held, digits=0),
        ]

    ordered = sorted(comparison.methods, key=lambda method: found[-1].order(method.name))
    return markdown_table(headings, map(cells, ordered))


def _notes(comparison: Comparison) -> Iterator[str]:
    """Yield how to read the table, and what is not in it."""
    yield "Each method is at its rate of the lowest held-out loss. Best loss first; losses are in nats per token."
    if (calibration := comparison.results.calibration) is not None:
        machine, rounds = calibration.machine, len(calibration.reference_rounds)
        place = (
            f"{machine.get('threads')} threads of a CPU" if machine.get("device") == "cpu" else machine.get("device")
        )
        yield (
            f"`step`: its cost against a step of {calibration.reference}, which takes {calibration.reference_cost:.3g} "
            f"{calibration.unit}; the median of {rounds} interleaved rounds on {place}."
        )
    yield f"Intervals are of 95 %. {seeds_text(len(method.seeds) for method in comparison.methods)}"
    if _reference(comparison):
        yield (
            "`less full's`: paired difference to full fine-tuning. Bold, there and in other scores: a difference to "
            "full that is more than chance after Holm's correction for the rows of the column."
        )
    if before := _losses_of_base(comparison):
        names = " and ".join(f"`{FORGOTTEN.get(name, name or 'forgetting')}`" for name in before)
        values = " and ".join(f"{value:.3f}" for value in before.values())
        yield f"{names}: rise of the loss on text that the base knew, from {values}."
    yield "`peak MB`: weights, gradients, masters and state, counted."
    yield from legend(method.name for method in comparison.methods)
    yield from _left_out(comparison)


def legend(names: Iterable[str]) -> list[str]:
    """Return a sentence for each short form in the names of methods."""
    known = list(names)
    forms = {
        "`+ E`: the embedding trains too, at every step.": any(name.endswith(" + E") for name in known),
        "`drop`: a layer has masters and moments only while it trains; selected again, it begins with new ones.": any(
            name.endswith(", drop") for name in known
        ),
        f"`{ONCE}`: the six layers of the largest gradients in the first step train, and no others.": ONCE in known,
    }
    return [text for text, is_used in forms.items() if is_used]


def _reference(comparison: Comparison) -> str | None:
    return comparison.full.name if comparison.full is not None else None


def _losses_of_base(comparison: Comparison) -> dict[str, float]:
    first = comparison.methods[0]
    return {name: first.forgotten(name)[0].before for name in first.forgetting_names}


def _items(comparison: Comparison) -> str:
    scores = comparison.methods[0].runs[0].record.scores
    return ", ".join(f"`{name}` {score.num_items:,}" for name, score in scores.items() if score.num_items)


def _left_out(comparison: Comparison) -> Iterator[str]:
    """Yield the methods that are not in the table, and why."""
    scored = {method.name for method in comparison.methods}
    calibration = comparison.results.calibration
    searched = {run.record.method for run in comparison.results.runs} - scored
    if searched:
        yield f"No score yet, only a search of the rate: {', '.join(sorted(searched))}."
    if failed := {run.record.method for run in comparison.results.failed} - scored - searched:
        yield f"Failed: {', '.join(sorted(failed))}."
    broken, large = failed_to_calibrate(comparison), left_out_for_memory(comparison)
    if broken:
        yield f"Could not be calibrated: {', '.join(broken)}."
    if large:
        yield f"Too large for the memory: {', '.join(large)}."
    calibrated = set() if calibration is None else set(calibration.methods)
    if waiting := calibrated - scored - searched - failed - set(broken) - set(large):
        yield f"Calibrated but not run: {', '.join(sorted(waiting))}."


def headline() -> str:
    """A few methods of the first suite that has several seeds of them, else of the first with results; or nothing."""
    if (suite := headline_suite(SUITES)) is None:
        return ""
    comparison = suite.comparison
    ours = variants(comparison)
    known = {method.name: method for method in comparison.methods}
    names = headline_methods(comparison)
    found = measures(comparison)
    rows = []
    for name in names:
        held = known[name].peak_bytes()
        rows.append(
            [
                name,
                str(steps_of(known[name])),
                cost_of_a_step(known[name]),
                *(value_of(scores, name, interval=scores is found[0]) for scores in (found[0], found[-1])),
                "" if held is None else megabytes(held, digits=0),
            ]
        )
    counts = {len(known[name].seeds) for name in names}
    seeds = " to ".join(str(count) for count in sorted({min(counts), max(counts)}))
    over = " over the test items alone" if counts == {1} else ", over the test items alone where there is one seed"
    shown = [method.name for method in ours if method.name in names]
    small = f", and the one among those that hold no more than {LORA_WITH_EMBEDDING}" if len(shown) > 1 else ""
    chosen = (
        f"\nOf {len(ours)} variants of AdaGradSelect the one of the lowest held-out loss{small}."
        if len(ours) > 1
        else ""
    )
    return (
        (
            f"`gradselect compare suites/{suite.name}.yaml`: {suite.task}{chosen}\nEach at its best learning rate, "
            f"{seeds} {'seed' if seeds == '1' else 'seeds'}, with 95 % intervals{over if 1 in counts else ''}:\n\n"
        )
        + markdown_table(
            [
                "method",
                "steps in the same time",
                "time of a step",
                title_of(found[0].measure),
                title_of(found[-1].measure),
                "peak MB of weights, gradients, state",
            ],
            rows,
        )
        + "".join(f"\n{line}" for line in ["", *legend(names)])
    )
