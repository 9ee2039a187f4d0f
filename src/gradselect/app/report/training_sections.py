"""Sections on the course of the training: losses, and what was selected."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from . import number_format as words
from .chart_lines import draw_lines, smoothed
from .charts import Chart, Line, slug, time_axis
from .comparison import Comparison
from .page import Part
from .run_tables import mask_table
from .scores import VALIDATION
from .selection_charts import draw_selection
from .table import Namer


def convergence_parts(comparison: Comparison) -> Iterator[Part]:
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
            + ("." if curve == VALIDATION else " and over the steps just before, a 25th of the run."),
            reference=comparison.full and comparison.full.name,
        )
        for key, label, word, along in kinds
    ]
    yield Part(charts=tuple(charts))


def _curves(comparison: Comparison) -> tuple[str, dict[str, tuple[list[float], list[float], list[float]]]]:
    """Return the validation curves if every method has some, else the training curves."""
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


def selection_parts(comparison: Comparison, name: Namer) -> Iterator[Part]:
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
    if (table := mask_table(comparison.methods, name=name)) is not None:
        yield Part(title="Entries", table=table)


def _file_names(methods: Sequence[str]) -> dict[str, str]:
    """Return a file name for each method. Names that differ in punctuation only get a number."""
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
            title="Evenness of the updates over the blocks",
            caption="Normalized entropy of the update counts so far: 1 if all blocks have as many, 0 if one has all. "
            f"Seed {comparison.methods[0].seeds[0]}.",
        )
