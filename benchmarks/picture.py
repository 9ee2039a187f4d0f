"""The picture of README and start page, light and dark: blocks over steps beside quality against memory.

`python benchmarks/readme.py` draws it from committed results, together with the tables, and `--check` compares it.
"""

from __future__ import annotations

import functools
import html
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import matplotlib
from common import RESULTS, ROOT
from compared import comparison_of, method_of, scores_of
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import PathPatch
from matplotlib.path import Path as Outline
from matplotlib.transforms import Affine2D
from real_model import (
    FULL,
    LORA_WITH_EMBEDDING,
    SMALL_LORA,
    SUITES,
    WIDE_LORA,
    Suite,
    headline_suite,
    measures,
    variants,
)

from gradselect.app.report.chart_style import COLOURS, Mark
from gradselect.app.report.charts import byte_axis, plot_plane, score_axis, score_points
from gradselect.app.report.comparison import Comparison
from gradselect.app.report.methods import Method
from gradselect.app.report.pareto import Point
from gradselect.app.report.scores import Measure, Scores
from gradselect.app.report.selection_charts import history_of
from gradselect.core import BlockHistory
from gradselect.integrations.pictures import GREY, INK, PALE, chart_settings, draw_explore_steps, new_figure

FOLDER = ROOT / "docs" / "images"
FILES = {scheme: FOLDER / f"blocks-and-quality-{scheme}.svg" for scheme in ("light", "dark")}
OURS, LORA = COLOURS[0], COLOURS[1]
DARK = {
    "#ffffff": "#0d1117",
    INK: "#e6edf3",
    GREY: "#9198a1",
    PALE: "#3d444d",
    OURS: "#58a6ff",
    LORA: "#ff9e57",
}
"""Colour of the dark picture for each colour of the light one."""

MOST_POINTS = 11
"""Most methods that all have a name."""

NAMED = (FULL, SMALL_LORA, LORA_WITH_EMBEDDING, WIDE_LORA)
WITHOUT_GRADIENTS = (
    *("uniform", "stratified", "fixed", "paca", "s2ft", "last", "cyclic", "badam", "lisa", "hft", "spectrum"),
    *("sparta", "lora-sp"),
)
MOST_NAMES = 12
"""With more layers than this, only some are named."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is drawn of a folder of results.

    Args:
        folder: of the results.
        selection: method whose blocks are shown, of its first seed.
        measure: evaluation that says the quality.
        labels: names in the picture of the methods that have one.
        left_out: methods whose points lie far from the others; a line in the frame gives their figures.
    """

    folder: Path
    selection: str
    measure: str
    labels: Mapping[str, str]
    left_out: Sequence[str] = ()

    @property
    def comparison(self) -> Comparison:
        return comparison_of(self.folder)

    @property
    def scores(self) -> Scores:
        return scores_of(self.comparison, self.measure)

    @property
    def points(self) -> list[Point]:
        return score_points(self.comparison.methods, self.scores, Method.peak_bytes)


SMALL = Subject(
    folder=RESULTS / "small-equal-time",
    selection="AdaGradSelect matrices + embedding",
    measure="solved",
    labels={
        "full": "full fine-tuning",
        "LoRA r=16 + embedding": "LoRA r=16",
        "AdaGradSelect matrices + embedding": "AdaGradSelect, matrices",
        "AdaGradSelect 3 of 8 + embedding": "layers",
        "slices 1/4 + embedding": "slices 1/4",
        "slices 1/8 + embedding": "slices 1/8",
    },
    left_out=("LoRA r=256",),
)


@functools.cache
def subject() -> Subject:
    """Return the first suite on a real model that has results, or the small one: the same as the table of README.md."""
    shown = headline_suite(SUITES)
    return of_real_model(shown) if shown is not None and variants(shown.comparison) else SMALL


def of_real_model(suite: Suite) -> Subject:
    """Return what is drawn of a suite on a real model: the best AdaGradSelect, and all names if they are few."""
    methods = suite.comparison.methods
    ours = [method.name for method in variants(suite.comparison)]
    names = [method.name for method in methods] if len(methods) <= MOST_POINTS else [*NAMED, *ours]
    return Subject(
        folder=suite.folder,
        selection=ours[0],
        measure=measures(suite.comparison)[0].measure.name,
        labels={name: name for name in names} | {FULL: "full fine-tuning"},
    )


def is_pinned() -> bool:
    """Return True if the installed matplotlib draws the committed files to the byte: that of constraints.txt."""
    return f"matplotlib=={version('matplotlib')}\n" in (ROOT / "constraints.txt").read_text(encoding="utf-8")


def markdown(page: Path) -> str:
    """Return the picture for a page, with its content in words."""
    files = (FILES["light"], FILES["dark"], ROOT / "docs" / "results.md")
    light, dark, results = (file.relative_to(page.parent).as_posix() for file in files)
    has_one_seed = any(len(method.seeds) == 1 for method in subject().comparison.methods)
    over = ", over the test items alone where there is one seed" if has_one_seed else ""
    has_short_form = any(point.name.endswith(" + E") for point in subject().points)
    embedding = " E: the embedding trains too." if has_short_form else ""
    return (
        "<picture>\n"
        f'  <source media="(prefers-color-scheme: dark)" srcset="{dark}">\n'
        f'  <img alt="{html.escape(in_words(subject()))}" src="{light}" width="100%">\n'
        "</picture>\n\n"
        f"*Left: what one run trained, step by step. Right: means and 95 % intervals{over}; every "
        f"method has as many steps as fit the same time.{embedding} [Results]({results}).*"
    )


def in_words(subject: Subject) -> str:
    """Return the content of the picture in one paragraph."""
    measure, points = subject.scores.measure, subject.points
    axis = byte_axis([point.x for point in points], "")
    listed = "; ".join(
        f"{subject.labels.get(point.name, point.name)} {measure.show(point.y)}, {axis.show(point.x)}"
        for point in points
        if point.name in {*subject.labels, *subject.left_out}
    )
    return (
        f"Left: the blocks that {subject.selection} trained at each step. Right: {title_of(measure)} against the peak "
        f"of weights, gradients and optimizer state. {listed}."
    )


def title_of(measure: Measure) -> str:
    return "problems solved" if measure.name == "solved" else measure.title


def draw(subject: Subject) -> dict[str, str]:
    """Return the SVG of each scheme. The same results give the same text."""
    with chart_settings(), matplotlib.rc_context({"svg.hashsalt": "gradselect", "svg.fonttype": "path"}):
        light = to_svg(new_picture(subject))
    return {"light": light, "dark": darkened(light)}


def darkened(svg: str) -> str:
    """Return the picture in its dark colours.

    Raises:
        SystemExit: a colour has no dark counterpart.
    """
    if strange := set(re.findall(r"#[0-9a-f]{6}\b", svg)) - DARK.keys():
        raise SystemExit(f"benchmarks/picture.py: no dark colour for {', '.join(sorted(strange))}")
    return re.sub(r"#[0-9a-f]{6}\b", lambda colour: DARK[colour[0]], svg)


def to_svg(figure: Figure) -> str:
    """Return the figure as SVG. Short numbers and ids by their order keep it small and the same on every processor."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    svg = re.sub(r"[ \t]+\n", "\n", buffer.getvalue())
    svg = re.sub(r'(?<= d=")[^"]+', lambda outline: re.sub(r"-?\d+\.\d{3,}", in_hundredths, outline[0]), svg)
    names = dict.fromkeys(re.findall(r'(?<= id=")[\w-]+', svg))
    order = {name: f"i{place}" for place, name in enumerate(names)}
    return re.sub(r'(?<= id=")[\w-]+|(?<=#)[\w-]+(?=[")])', lambda name: order.get(name[0], name[0]), svg)


def in_hundredths(number: re.Match[str]) -> str:
    return f"{float(number[0]):.2f}".rstrip("0").rstrip(".")


def new_picture(subject: Subject) -> Figure:
    method = method_of(subject.comparison, subject.selection)
    assert method.blocks is not None
    history = history_of(method.blocks)
    figure = new_figure(width=9.0, height=4.1)
    rows = [["explored", "quality"], ["trained", "quality"]]
    frames = figure.subplot_mosaic(rows, width_ratios=(1, 1.4), height_ratios=(1, 18))
    draw_explore_steps(frames["explored"], history)
    draw_trained(frames["trained"], history)
    draw_quality(frames["quality"], subject)
    frames["explored"].set_xlim(frames["trained"].get_xlim())
    frames["explored"].set_title(f"{subject.labels[subject.selection]}: trained blocks by step", loc="right", x=1.02)
    return figure


def draw_trained(axes: Axes, history: BlockHistory) -> None:
    """Draw each block as a row, with a bar for each unbroken stretch of steps in which it trained."""
    bars = [
        Outline.unit_rectangle().transformed(Affine2D().scale(end - start, 0.8).translate(start, row + 0.1))
        for row, block in enumerate(history.blocks)
        for start, end in stretches_of([block in selected for selected in history.selected])
    ]
    axes.add_patch(PathPatch(Outline.make_compound_path(*bars), facecolor=OURS, linewidth=0))
    rows = sorted_rows(history.blocks)
    for first, _ in list(rows.values())[1:]:
        axes.axhline(first, color=PALE, linewidth=0.6)
    shown = list(rows)[:: -(-len(rows) // MOST_NAMES)]
    axes.set_yticks([sum(rows[name]) / 2 for name in shown], shown)
    axes.tick_params(axis="y", length=0)
    axes.set_xlim(0, len(history.selected))
    axes.set_ylim(len(history.blocks), 0)
    axes.set_xlabel("step")
    axes.locator_params(axis="x", nbins=5, integer=True)


def stretches_of(trained: Sequence[bool]) -> list[tuple[int, int]]:
    """Return the first step of each unbroken stretch of True, and the one behind its last."""
    steps = [step for step, is_trained in enumerate(trained) if is_trained]
    starts = [step for step in steps if step == 0 or not trained[step - 1]]
    ends = [step + 1 for step in steps if step + 1 == len(trained) or not trained[step + 1]]
    return list(zip(starts, ends, strict=True))


def sorted_rows(blocks: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Return the first row and the one behind the last of each layer: "layer.3.mlp.up_proj" is of "layer.3"."""
    layers = [".".join(block.split(".")[:2]) for block in blocks]
    return {layer: (layers.index(layer), len(layers) - layers[::-1].index(layer)) for layer in dict.fromkeys(layers)}


def draw_quality(axes: Axes, subject: Subject) -> None:
    """Draw the measure against the peak of counted bytes."""
    points, measure = subject.points, subject.scores.measure
    shown = [point for point in points if point.name not in subject.left_out]
    y = replace(score_axis(measure), title=title_of(measure))
    x = byte_axis([point.x for point in shown], "peak of weights, gradients, state")
    marks = {method.name: mark_of(method) for method in subject.comparison.methods}
    handles = [
        Line2D([], [], color=OURS, marker="D", markerfacecolor=face, linestyle="", markersize=7, label=label)
        for face, label in ((OURS, "selected by gradients"), ("white", "without gradients"))
        if any(mark.shape == "D" and mark.face == face for mark in marks.values())
    ]
    axes.legend(handles=handles, loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False, borderaxespad=0.2,
                handletextpad=0.1, columnspacing=1.2)  # fmt: skip
    for name in subject.left_out:
        far = next(point for point in points if point.name == name)
        where = f"not shown: {name}, {measure.show(far.y)}, {x.show(far.x)}"
        axes.text(0.99, 0.01, where, transform=axes.transAxes, ha="right", va="bottom", fontsize=9.5, color=GREY)
    plot_plane(axes, shown, x=x, y=y, marks=marks, labels=subject.labels)


def mark_of(method: Method) -> Mark:
    """Return a disc for full fine-tuning, a square for adapters, else a diamond, hollow if gradients do not select."""
    settings = method.runs[0].record.method_settings
    if method.is_full:
        return Mark(shape="o", colour=INK, dash="-", is_hollow=False)
    if "rank" in settings:
        return Mark(shape="s", colour=LORA, dash="-", is_hollow=False)
    is_hollow = settings["name"] in WITHOUT_GRADIENTS or method.name.startswith("uniform")
    return Mark(shape="D", colour=OURS, dash="-", is_hollow=is_hollow)
