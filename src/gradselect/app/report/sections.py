"""A comparison -> the sections of the page."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from . import number_format as words
from . import tables as tables
from .chart_bars import draw_bytes, draw_time_parts
from .chart_lines import draw_lines, smoothed
from .chart_style import chart_settings
from .charts import (
    Axis,
    Chart,
    Line,
    Point,
    byte_axis,
    draw_differences,
    draw_plane,
    score_axis,
    score_points,
    slug,
    time_axis,
)
from .comparison import Comparison, compare_results
from .findings import facts, findings
from .methods import Method
from .page import Page, Part, Section
from .read_results import Results, flatten_settings
from .scores import VALIDATION
from .selection_charts import draw_selection
from .tables import Namer

HOW_TO_READ = (
    "Every method stands at its best learning rate, the one with the lowest validation loss; where that is an edge of "
    "its grid, the table says so.",
    "Scores are means over seeds. Their intervals are of a bootstrap over items and seeds at once (of Student's t over "
    "seeds where there are no items, of the items alone where there is one seed).",
    "A difference counts as more than chance if its p-value, adjusted by Holm for all differences of its table, is "
    "below 0.05 and its interval does not hold zero. Right and wrong answers to the same items: McNemar's test, with "
    "several seeds the one for clustered pairs. Losses: the bootstrap.",
    "A step's time is the median of the steps of its kind; over kinds it is the mean weighted by how many steps there "
    "were. Speed-up: full fine-tuning's step over the method's. FLOP limit: the speed-up that the blocks drawn "
    "allow.",
    "Bytes are those of weights, gradients, master weights and optimizer state, counted exactly; activations are not "
    "in them.",
)


def build_page(results: Results) -> Page:
    """Everything that is known of the results, in the order in which it is read."""
    comparison = compare_results(results)
    name = Namer(comparison.marks)
    with chart_settings():
        sections = (
            Section(key="results", title="Results", parts=tuple(_results(comparison, name))),
            Section(
                key="differences",
                title="Which differences are more than chance",
                parts=tuple(_differences(comparison, name)),
            ),
            Section(key="trade-offs", title="What a score costs", parts=tuple(_trade_offs(comparison))),
            Section(key="costs", title="Time and memory", parts=tuple(_costs(comparison, name))),
            Section(key="convergence", title="Convergence", parts=tuple(_convergence(comparison))),
            Section(key="selection", title="What was selected", parts=tuple(_selection(comparison, name))),
            Section(key="rates", title="Search of the learning rate", parts=tuple(_rates(comparison, name))),
            Section(key="left-out", title="Left out", parts=tuple(_left_out(comparison, name))),
            Section(key="protocol", title="Protocol, versions, commands", parts=tuple(_protocol(comparison))),
        )
    return Page(
        title=f"Comparison of methods: {results.runs[0].record.suite}",
        facts=tuple(facts(comparison)),
        findings=tuple(findings(comparison)),
        sections=tuple(section for section in sections if section.parts),
    )


def _results(comparison: Comparison, name: Namer) -> Iterator[Part]:
    if not comparison.methods:
        yield Part(text="No method has a scored run yet; below is the search of the learning rates.")
        return
    full = comparison.full
    relative = "There is no full fine-tuning among the results, so nothing is relative to it." if full is None else ""
    yield Part(
        text=relative,
        table=tables.results_table(comparison.methods, scores=comparison.scores, full=full, name=name),
    )
    yield Part(title="How to read this", lines=HOW_TO_READ, is_folded=True)


def _differences(comparison: Comparison, name: Namer) -> Iterator[Part]:
    charts = tuple(
        draw_differences(tested, measure=scores.measure, reference=reference, marks=comparison.marks)
        for scores, reference, tested in comparison.differences
    )
    if charts:
        yield Part(charts=charts)
    for scores, reference, tested in comparison.differences:
        yield Part(
            title=words.upper_first(scores.measure.title),
            table=tables.difference_table(tested, measure=scores.measure, reference=reference, name=name),
        )
    for scores, pairs in comparison.pairs:
        if len(scores.estimates) > 2:
            yield Part(
                title=f"All pairs: {scores.measure.title}",
                text="A star: more than chance among all pairs. Numbers above are those of the rows.",
                table=tables.pair_table(pairs, scores=scores, name=name),
                is_folded=True,
            )


def _trade_offs(comparison: Comparison) -> Iterator[Part]:
    charts = [*_time_against_memory(comparison), *_fronts(comparison), *_score_by_share(comparison)]
    if charts:
        yield Part(charts=tuple(charts))


def _time_against_memory(comparison: Comparison) -> Iterator[Chart]:
    memory_axis, memory = _memory_axis(comparison)
    points = [
        Point(name=method.name, x=held, y=seconds)
        for method in comparison.methods
        if (held := memory(method)) is not None and (seconds := method.training_seconds) is not None
    ]
    if len(points) > 1:
        yield draw_plane(
            points,
            x=memory_axis,
            y=time_axis([point.y for point in points]),
            marks=comparison.marks,
            name="time-memory",
            title="Training time against average memory",
            caption="Left and below is better; the thin lines cross at full fine-tuning.",
            reference=comparison.full and comparison.full.name,
        )


def _fronts(comparison: Comparison) -> Iterator[Chart]:
    if not comparison.scores:
        return
    scores = comparison.scores[0]
    memory_axis, memory = _memory_axis(comparison)
    by_time = score_points(comparison.methods, scores, lambda method: method.training_seconds)
    time = time_axis([point.x for point in by_time])
    by_memory = score_points(comparison.methods, scores, memory)
    for key, points, axis in (("time", by_time, time), ("memory", by_memory, memory_axis)):
        if len(points) > 1:
            yield draw_plane(
                points,
                x=axis,
                y=score_axis(scores.measure),
                marks=comparison.marks,
                name=f"score-{key}",
                title=f"{words.upper_first(scores.measure.title)} against {axis.title}",
                caption="Bars are 95 % intervals. The dashed line is the Pareto front of the means.",
                with_front=True,
            )


def _score_by_share(comparison: Comparison) -> Iterator[Chart]:
    if not comparison.scores:
        return
    scores = comparison.scores[0]
    points = score_points(comparison.methods, scores, lambda method: method.block_share)
    if len(points) > 1:
        yield draw_plane(
            points,
            x=Axis(title="blocks trained in a step", unit="%", size=0.01, show=words.share),
            y=score_axis(scores.measure),
            marks=comparison.marks,
            name="score-share",
            title=f"{words.upper_first(scores.measure.title)} against the share of blocks trained",
            caption="Bars are 95 % intervals. Methods that do not train whole blocks are not in it.",
        )


def _memory_axis(comparison: Comparison) -> tuple[Axis, Any]:
    """What the device had reserved, where all ran on one; else the bytes counted."""
    if all(method.reserved_average is not None for method in comparison.methods):

        def memory(method: Method) -> float | None:
            return method.reserved_average

        title = "average reserved memory"
    else:

        def memory(method: Method) -> float | None:
            return method.average_bytes

        title = "average bytes held"
    known = [held for method in comparison.methods if (held := memory(method)) is not None]
    return byte_axis(known, title), memory


def _costs(comparison: Comparison, name: Namer) -> Iterator[Part]:
    full = comparison.full
    timed = [method for method in comparison.methods if method.kinds()]
    counted = [method for method in comparison.methods if method.peak_bytes() is not None]
    charts = [
        *([draw_time_parts(timed, reference=full)] if timed else []),
        *([draw_bytes(counted, reference=full)] if counted else []),
    ]
    if charts:
        yield Part(charts=tuple(charts))
    if timed:
        yield Part(title="Seconds of a step", table=tables.time_table(timed, full=full, name=name))
    if counted:
        yield Part(title="Bytes", table=tables.bytes_table(counted, full=full, name=name))


def _convergence(comparison: Comparison) -> Iterator[Part]:
    curve, curves = _curves(comparison)
    if not curves:
        return
    last = max(times[-1] for _, times, _ in curves.values())
    axis = time_axis([last], title="training time")
    kinds = (
        ("steps", "step", "steps", lambda entry: entry[0]),
        ("seconds", axis.label, "time", lambda entry: [value / axis.size for value in entry[1]]),
    )
    charts = [
        draw_lines(
            [Line(name=method, x=along(entry), y=entry[2]) for method, entry in curves.items()],
            x_label=label,
            y_label=f"{curve} loss",
            marks=comparison.marks,
            name=f"loss-{key}",
            title=f"{words.upper_first(curve)} loss against {word}",
            caption="Mean over seeds"
            + ("." if curve == VALIDATION else ", and over the steps just before (a 25th of the run)."),
            reference=comparison.full and comparison.full.name,
        )
        for key, label, word, along in kinds
    ]
    yield Part(charts=tuple(charts))


def _curves(comparison: Comparison) -> tuple[str, dict[str, tuple[list[float], list[float], list[float]]]]:
    """The validation curves where every method has some, else those of training."""
    for curve in (VALIDATION, "train"):
        found = {method.name: method.curve(curve) for method in comparison.methods}
        known = {name: points for name, points in found.items() if len(points) > 1}
        if known and (curve == "train" or len(known) == len(found)):
            split = {name: tuple(map(list, zip(*points, strict=True))) for name, points in known.items()}
            return curve, {
                name: (steps, seconds, losses if curve == VALIDATION else smoothed(losses))
                for name, (steps, seconds, losses) in split.items()
            }
    return "train", {}


def _selection(comparison: Comparison, name: Namer) -> Iterator[Part]:
    selecting = [(method, blocks) for method in comparison.methods if (blocks := method.blocks) is not None]
    names = _file_names([method.name for method, _ in selecting])
    maps = [
        draw_selection(method, blocks, name=f"blocks-{names[method.name]}")
        for method, blocks in selecting
        if blocks.selected
    ]
    charts = [*_evenness(comparison), *maps]
    if charts:
        yield Part(charts=tuple(charts))
    if (table := tables.mask_table(comparison.methods, name=name)) is not None:
        yield Part(title="Single weights", table=table)


def _file_names(methods: Sequence[str]) -> dict[str, str]:
    """A name for the files of each method; where signs alone tell methods apart, a number does."""
    names: dict[str, str] = {}
    for method in sorted(methods):
        start = slug(method)
        taken = sum(other == start or other.startswith(f"{start}--") for other in names.values())
        names[method] = f"{start}--{taken + 1}" if taken else start
    return names


def _evenness(comparison: Comparison) -> Iterator[Chart]:
    lines = [
        Line(name=method.name, x=range(1, len(blocks.entropy) + 1), y=blocks.entropy)
        for method in comparison.methods
        if (blocks := method.blocks) is not None and len(blocks.entropy) > 1
    ]
    if lines:
        yield draw_lines(
            lines,
            x_label="step",
            y_label="selection entropy",
            marks=comparison.marks,
            name="entropy",
            title="How evenly the updates were spread over the blocks",
            caption="Normalised entropy of the update counts so far: 1 is every block equally often, 0 one block only. "
            f"Seed {comparison.methods[0].seeds[0]}.",
        )


def _rates(comparison: Comparison, name: Namer) -> Iterator[Part]:
    if (table := tables.rate_table(comparison.results.runs, name=name)) is not None:
        yield Part(text="Validation loss at the end, by rate.", table=table)


def _left_out(comparison: Comparison, name: Namer) -> Iterator[Part]:
    results = comparison.results
    if results.failed:
        yield Part(title="Failed runs", table=tables.failed_table(results.failed, name=name))
    if results.skipped:
        yield Part(title="Files that could not be used", table=tables.skipped_table(results.skipped))
    if results.dirty:
        yield Part(
            title="Uncommitted changes",
            text=f"{words.plural(len(results.dirty), 'run')} of a tree that differed from its commit: in no table.",
            lines=tuple(run.file for run in results.dirty),
        )
    if comparison.others:
        yield Part(
            title="Scored at another rate",
            text="These runs are scored at a rate that is not their method's best.",
            lines=tuple(run.file for run in comparison.others),
        )


def _protocol(comparison: Comparison) -> Iterator[Part]:
    runs = comparison.results.runs
    settings = [(key, _plain(value)) for key, value in flatten_settings(runs[0].record.protocol_settings)]
    if settings:
        text = "What all methods share."
        yield Part(
            title="Protocol", text=text, table=tables.pair_list(settings, titles=("Setting", "Value")), is_folded=True
        )
    methods = [
        (
            method.name,
            ", ".join(
                f"{key}: {_plain(value)}" for key, value in flatten_settings(method.runs[0].record.method_settings)
            ),
        )
        for method in comparison.methods
    ]
    if methods:
        yield Part(title="Methods", table=tables.pair_list(methods, titles=("Method", "Settings")), is_folded=True)
    if versions := _versions(comparison):
        yield Part(title="Versions", table=tables.pair_list(versions, titles=("What", "Version")), is_folded=True)
    commands = sorted({shlex.join(run.record.command) for run in runs if run.record.command})
    if commands:
        yield Part(title="Commands", lines=tuple(commands), is_folded=True)


def _versions(comparison: Comparison) -> list[tuple[str, str]]:
    """Packages and machine; where runs differ, all that occurred."""
    found: dict[str, set[str]] = {}
    for run in comparison.results.runs:
        described = {key: run.result.meta_info.get(key) for key in ("package_info", "system_info", "pytorch_info")}
        for key, value in flatten_settings(_only_known(described)):
            found.setdefault(key.removeprefix("package_info."), set()).add(_plain(value))
    return [(key, " | ".join(sorted(values))) for key, values in sorted(found.items())]


def _only_known(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)
