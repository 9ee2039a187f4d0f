"""Charts of many methods stay readable."""

from __future__ import annotations

import pytest
from matplotlib.figure import Figure

from gradselect.app.report.chart_lines import LONGEST_TITLE, draw_lines
from gradselect.app.report.chart_style import Mark
from gradselect.app.report.charts import MOST_NAMES, Axis, Line, byte_axis, draw_plane
from gradselect.app.report.pareto import Point

MARK = Mark(shape="s", colour="#0b559f", dash="-", is_hollow=False)


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Figures that become pictures."""
    kept: list[Figure] = []
    for module in ("charts", "chart_lines"):
        monkeypatch.setattr(f"gradselect.app.report.{module}.to_png", lambda figure: kept.append(figure) or b"")
    return kept


def draw(num_methods: int, *, last: float) -> None:
    """Draw methods of which the dearer is the worse, and the last costs `last` bytes."""
    costs = [1e6 + place for place in range(num_methods - 1)] + [last]
    points = [Point(name=f"method {place}", x=x, y=1 - place / 100) for place, x in enumerate(costs)]
    quality = Axis(title="quality", unit="", size=1.0, show=str, lower_is_better=False)
    draw_plane(
        points,
        x=byte_axis(costs, "bytes"),
        y=quality,
        marks={point.name: MARK for point in points},
        name="plane",
        title="Quality",
        caption="",
        with_front=True,
    )


def test_few_methods_are_named_beside_their_marks(figures: list[Figure]) -> None:
    draw(MOST_NAMES, last=2e6)
    assert {text.get_text() for text in figures[0].axes[0].texts} >= {f"method {place}" for place in range(MOST_NAMES)}
    assert figures[0].legends == []
    assert figures[0].axes[0].get_xscale() == "linear"


def test_of_many_methods_the_front_is_named_and_a_key_has_all(figures: list[Figure]) -> None:
    draw(MOST_NAMES + 1, last=2e6)
    assert {text.get_text() for text in figures[0].axes[0].texts} - {""} == {"method 0"}
    listed = {text.get_text() for text in figures[0].legends[0].get_texts()}
    assert listed == {f"method {place}" for place in range(MOST_NAMES + 1)}


def test_a_cost_far_above_the_others_leaves_them_room(figures: list[Figure]) -> None:
    draw(3, last=8e6)
    assert figures[0].axes[0].get_xscale() == "log"


def test_long_names_above_small_frames_are_broken(figures: list[Figure]) -> None:
    names = [f"a method whose name is longer than the frame {place}" for place in range(7)]
    lines = [Line(name=name, x=[0, 1], y=[1.0, 0.5]) for name in names]
    marks = dict.fromkeys(names, MARK)
    draw_lines(lines, x_label="step", y_label="loss", marks=marks, name="loss", title="Loss", caption="")
    titles = [axes.get_title() for axes in figures[0].axes[:7]]
    assert [title.replace("\n", " ") for title in titles] == names
    assert max(len(line) for title in titles for line in title.split("\n")) <= LONGEST_TITLE
