"""Section on the budget of the runs: what it was, what a step of each method costs, and how long the runs took."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from gradselect.app.results import RunBudget

from . import number_format as words
from .comparison import Comparison
from .methods import Method, ratio
from .page import Part
from .scores import Difference, Measure
from .table import Cell, Column, Namer, Table

OVER = 1.1
"""A run that took more than this many times its budget is named."""


def budgets(comparison: Comparison) -> dict[str, RunBudget]:
    """Return the budget of each method that ran under one."""
    found = {method.name: method.runs[0].record.budget for method in comparison.methods}
    return {name: budget for name, budget in found.items() if budget is not None}


def budget_parts(comparison: Comparison, name: Namer) -> Iterator[Part]:
    known = budgets(comparison)
    if not known:
        return
    methods = [method for method in comparison.methods if method.name in known]
    yield Part(text=_text(known), table=budget_table(methods, known, name=name))


def left_out_for_memory(comparison: Comparison) -> dict[str, str]:
    """Return the methods that did not fit into the memory, with their bytes in words."""
    calibration = comparison.results.calibration
    methods = {} if calibration is None else calibration.methods
    return {name: own.left_out for name, own in methods.items() if own.left_out}


def failed_to_calibrate(comparison: Comparison) -> dict[str, str]:
    """Return the methods that never ran because their calibration failed, with the error."""
    calibration = comparison.results.calibration
    methods = {} if calibration is None else calibration.methods
    ran = {method.name for method in comparison.methods}
    return {name: own.error for name, own in methods.items() if own.error and name not in ran}


def budget_table(methods: Sequence[Method], known: Mapping[str, RunBudget], *, name: Namer) -> Table:
    """Calibrated cost of a step, steps, and the measured training time of the runs."""
    unit = next(iter(known.values())).unit
    columns = (
        Column("Method", is_text=True),
        Column(f"{words.upper_first(unit)} a step", "calibration"),
        Column("Ratio", f"to {next(iter(known.values())).reference}"),
        Column("Spread", "of the rounds"),
        Column("Rounds"),
        Column("Steps", "that fit"),
        Column("Training time", "of the budget" if unit == "seconds" else ""),
        Column("Bytes", "calibration"),
    )
    rows = []
    for method in methods:
        own = known[method.name]
        rows.append(
            (
                name(method.name),
                Cell(words.seconds(own.step_cost) if unit == "seconds" else _flops(own.step_cost)),
                Cell(words.number(own.ratio)),
                Cell(words.share(own.spread)),
                Cell(words.UNKNOWN if own.rounds is None else f"{own.rounds:,}"),
                Cell(words.UNKNOWN if own.steps is None else f"{own.steps:,}"),
                Cell(words.seconds(method.training_seconds), _of_budget(method, own)),
                Cell(words.num_bytes(own.bytes if own.memory is not None else None)),
            )
        )
    return Table(columns=columns, rows=tuple(rows)).without_unknown()


def budget_findings(comparison: Comparison) -> Iterator[str]:
    """Yield who is ahead at equal cost, who took longer than planned, and who did not fit."""
    known = budgets(comparison)
    with_total = {name: budget for name, budget in known.items() if budget.total is not None}
    if with_total and comparison.differences:
        scores, reference, tested = comparison.differences[0]
        text = next(iter(with_total.values())).text
        yield f"At equal cost (budget {text}), {scores.measure.title}: " + _ranking(
            tested, reference=reference, measure=scores.measure, untested=scores.untested(reference)
        )
    over = {
        method.name: taken
        for method in comparison.methods
        if method.name in with_total and (taken := _taken(method, with_total[method.name])) is not None and taken > OVER
    }
    if over:
        named = words.joined([f"{name} ({words.share(taken)})" for name, taken in over.items()])
        yield f"Trained longer than their budget by more than a tenth: {named}. Compare their scores with care."
    larger = {
        method.name: held
        for method in comparison.methods
        if method.name in known and (held := _held(method)) > (known[method.name].memory or held)
    }
    if larger:
        named = words.joined([f"{name} ({words.num_bytes(held)})" for name, held in larger.items()])
        yield f"Held more in its run than the memory of the budget: {named}. The calibration had counted less."
    for name, reason in left_out_for_memory(comparison).items():
        calibration = comparison.results.calibration
        yield f"Left out for memory: {name} {reason} ({calibration.counted if calibration else ''})."
    for name, error in failed_to_calibrate(comparison).items():
        yield f"Not run, because its calibration failed: {name} ({error.splitlines()[0]})."


def _ranking(tested: Sequence[Difference], *, reference: str, measure: Measure, untested: Sequence[str] = ()) -> str:
    sign = 1 if measure.higher_is_better else -1
    groups = {
        f"ahead of {reference}": [one for one in tested if one.is_significant and sign * one.value > 0],
        "behind": [one for one in tested if one.is_significant and sign * one.value < 0],
        "not told apart": [one for one in tested if not one.is_significant],
    }
    return (
        "; ".join(
            f"{group}: {words.joined([_with_difference(one, measure) for one in found])}" if found else f"{group}: none"
            for group, found in groups.items()
        )
        + (f"; not tested: {words.joined(list(untested))}" if untested else "")
        + "."
    )


def _with_difference(one: Difference, measure: Measure) -> str:
    return f"{one.first} ({measure.show_difference(one.value)})"


def _text(known: Mapping[str, RunBudget]) -> str:
    one = next(iter(known.values()))
    ratios = "Ratios are medians over interleaved rounds."
    whose: dict[str, list[str]] = {}
    for name, budget in known.items():
        whose.setdefault(f"{budget.text}{_total(budget)}", []).append(name)
    if len(whose) > 1:
        each = "; ".join(f"{text}: {words.joined(names)}" for text, names in whose.items())
        return f"The runs had different budgets, or steps of different calibrations. {each}. {ratios}"
    memory = "" if one.memory is None else f" Memory: {words.num_bytes(one.memory)} of {one.counted}."
    return f"Every run had the same budget ({one.text}){_total(one)}. {ratios}{memory}"


def _total(budget: RunBudget) -> str:
    if budget.total is None:
        return ""
    if budget.unit == "seconds":
        return f", which is {words.seconds(budget.total)} of training steps"
    return f", which is {_flops(budget.total)} FLOPs"


def _taken(method: Method, budget: RunBudget) -> float | None:
    return ratio(method.training_seconds, budget.total) if budget.unit == "seconds" else None


def _held(method: Method) -> float:
    """Return the peak of the runs in the bytes that the budget counts."""
    on_device = method.most_held("allocated")
    return (on_device if on_device is not None else method.peak_bytes()) or 0.0


def _of_budget(method: Method, budget: RunBudget) -> str:
    taken = _taken(method, budget)
    return "" if taken is None else words.share(taken)


def _flops(value: float | None) -> str:
    return words.UNKNOWN if value is None else f"{value:.3g}"
