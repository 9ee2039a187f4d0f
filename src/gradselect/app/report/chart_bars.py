"""Stacked bars of time and bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes

from gradselect.integrations.pictures import INK, new_figure, to_png

from . import number_format as words
from .chart_style import FILLS, HATCHES
from .charts import MOST_LETTERS, Axis, Chart, byte_axis, in_lines
from .methods import CATEGORIES, PARTS, Method


def draw_time_parts(methods: Sequence[Method], *, reference: Method | None) -> Chart:
    """Draw the seconds of a step as bars, by part."""
    rows = [(_kind_name(method, kind), method, kind) for method in methods for kind in method.kinds()]
    parts = [[method.kind_seconds(kind, part) or 0.0 for part in PARTS] for _, method, kind in rows]
    wholes = [method.kind_seconds(kind) or sum(row) for (_, method, kind), row in zip(rows, parts, strict=True)]
    stacked = [[*row, max(0.0, whole - sum(row))] for row, whole in zip(parts, wholes, strict=True)]
    full = None if reference is None else reference.step_seconds
    return _draw_stacks(
        [row[0] for row in rows],
        stacked,
        [*PARTS, "other"],
        totals=wholes,
        axis=Axis(title="median step", unit="milliseconds", size=1e-3, show=words.seconds),
        reference=full,
        name="step-parts",
        title="Time of a step, by part",
        caption="Medians over the steps of each kind."
        + ("" if full is None else f" Line: a step of full fine-tuning; {words.TIMES}: time relative to it."),
    )


def draw_bytes(methods: Sequence[Method], *, reference: Method | None) -> Chart:
    """Draw the bytes at the peak as bars, by category."""
    values = [[method.peak_bytes(category) or 0.0 for category in CATEGORIES] for method in methods]
    totals = [method.peak_bytes() or sum(row) for method, row in zip(methods, values, strict=True)]
    full = None if reference is None else reference.peak_bytes()
    return _draw_stacks(
        [method.name for method in methods],
        values,
        [category.replace("_", " ") for category in CATEGORIES],
        totals=totals,
        axis=byte_axis(totals, "peak"),
        reference=full,
        name="bytes",
        title="Bytes at the peak, by category",
        caption="Exact bytes of tensors, without activations. Each category has its own peak, which may be at another "
        "step. So the figure at the end, the peak of all together, can be less than the bar."
        + ("" if full is None else f" Line: peak of full fine-tuning; {words.TIMES}: peak relative to it."),
    )


def _draw_stacks(
    names: Sequence[str],
    values: Sequence[Sequence[float]],
    parts: Sequence[str],
    *,
    totals: Sequence[float],
    axis: Axis,
    reference: float | None,
    name: str,
    title: str,
    caption: str,
) -> Chart:
    """Draw horizontal bars of stacked parts, each part with its own hatching, and the total at the end."""
    shown = [place for place in range(len(parts)) if any(row[place] > 0.005 * max(totals) for row in values)]
    figure = new_figure(height=1.5 + 0.36 * len(names))
    axes = figure.subplots()
    ends = [0.0] * len(names)
    for place in shown:
        widths = [row[place] / axis.size for row in values]
        style: Any = {"color": FILLS[place], "hatch": HATCHES[place], "edgecolor": INK, "linewidth": 0.6}
        axes.barh(range(len(names)), widths, 0.72, ends, label=parts[place], **style)
        ends = [end + width for end, width in zip(ends, widths, strict=True)]
    _draw_totals(axes, ends, totals, axis=axis, reference=reference)
    axes.set_yticks(range(len(names)), [in_lines(row_name) for row_name in names], fontsize=9.5)
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.45 * max(ends))
    axes.set_xlabel(axis.label)
    letters = sum(len(parts[place]) for place in shown)
    columns = len(shown) if letters < MOST_LETTERS else 3
    figure.legend(loc="outside upper left", ncols=columns, frameon=False, fontsize=9.5, handlelength=1.6)
    listed = "; ".join(
        f"{row_name}: {axis.show(total)} ("
        + ", ".join(f"{parts[place]} {axis.show(row[place])}" for place in shown)
        + ")"
        for row_name, row, total in zip(names, values, totals, strict=True)
    )
    return Chart(name=name, title=title, caption=caption, alt=f"{title}. {listed}.", png=to_png(figure))


def _draw_totals(
    axes: Axes, ends: Sequence[float], totals: Sequence[float], *, axis: Axis, reference: float | None
) -> None:
    """Write each total behind its bar, and draw the reference as a line."""
    for place, (end, total) in enumerate(zip(ends, totals, strict=True)):
        relative = "" if not reference else f"  {words.times(total / reference)}"
        axes.annotate(
            f"{axis.show(total)}{relative}", (end, place), (5, 0), textcoords="offset points", va="center", fontsize=9,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.2},
        )  # fmt: skip
    if reference:
        axes.axvline(reference / axis.size, color=INK, linewidth=1, linestyle=(0, (4, 2)))


def _kind_name(method: Method, kind: str) -> str:
    return method.name if kind == "step" else f"{method.name}, {kind}"
