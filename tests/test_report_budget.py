"""The report of runs under a budget: fronts, calibration, who is ahead at equal cost, who was left out."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from report_fixtures import MODEL_BYTES, results_of, write, write_all

from gradselect.app.report.budget_section import budget_findings, budget_parts, left_out_for_memory
from gradselect.app.report.comparison import Comparison, compare_results
from gradselect.app.report.front_sections import costs_of, front_parts, front_table, shown_scores
from gradselect.app.report.pareto import Point, pareto_front
from gradselect.app.report.read_results import read_results
from gradselect.app.report.sections import build_page
from gradselect.app.report.table import Namer, Table
from gradselect.app.results import CALIBRATION, Calibration, MethodCalibration, write_calibration

TIMES = {"full": 24.0, "AdaGradSelect 20 %": 23.0, "LoRA r=64": 30.0}
"""Budget of 24 seconds: 60 full steps. LoRA took a quarter longer."""


def slow_front(points: Sequence[Point], *, higher_is_better: bool) -> set[str]:
    """All points that no other one beats; of equal ones the first by name."""
    sign = 1 if higher_is_better else -1

    def beats(other: Point, point: Point) -> bool:
        no_worse = other.x <= point.x and sign * other.y >= sign * point.y
        better = other.x < point.x or sign * other.y > sign * point.y or other.name < point.name
        return other is not point and no_worse and better

    return {point.name for point in points if not any(beats(other, point) for other in points)}


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("higher_is_better", [True, False])
def test_the_front_is_what_no_other_point_beats(seed: int, higher_is_better: bool) -> None:
    """Whole numbers, so that there are ties in cost, in score and in both."""
    draw = random.Random(seed)
    points = [Point(name=str(n), x=draw.randrange(6), y=draw.randrange(6)) for n in range(draw.randrange(1, 15))]
    front = pareto_front(points, higher_is_better=higher_is_better)
    assert {point.name for point in front} == slow_front(points, higher_is_better=higher_is_better)
    assert [point.x for point in front] == sorted(point.x for point in front)


def with_budget(values: dict[str, Any], *, seconds: float, **changes: Any) -> dict[str, Any]:
    own = values["gradselect"]
    own["seconds"]["training"] = seconds
    own["budget"] = {
        "text": "time_of: full",
        "unit": "seconds",
        "total": 24.0,
        "steps": 60,
        "step_cost": 0.4,
        "ratio": 1.0,
        "spread": 0.05,
        "rounds": 5,
        "reference": "full",
        "bytes": 3 * MODEL_BYTES,
        "counted": "weights and state",
        **changes,
    }
    return values


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three methods at equal time, one that did not fit, and one that could not be measured."""
    folder = tmp_path_factory.mktemp("results")
    for name, seconds in TIMES.items():
        for values in results_of(name):
            ratio = {"full": 1.0, "AdaGradSelect 20 %": 0.75, "LoRA r=64": 1.25}[name]
            write(folder, with_budget(values, seconds=seconds, ratio=ratio, step_cost=0.4 * ratio))
    known = {
        **{name: MethodCalibration(steps=60) for name in TIMES},
        "big": MethodCalibration(left_out="takes 3.00 GiB of 2.00 GiB", bytes=3 * 2**30),
        "misfit": MethodCalibration(error="count=99 is more than the 6 blocks\nwrite count=6"),
    }
    calibration = Calibration(reference="full", reference_cost=0.4, methods=known, counted="weights and state")
    write_calibration(folder, calibration)
    return folder


@pytest.fixture(scope="module")
def comparison(folder: Path) -> Comparison:
    return compare_results(read_results(folder, include_dirty=False))


def texts(table: Table) -> list[list[str]]:
    return [[cell.text for cell in row] for row in table.rows]


def test_the_calibration_is_no_result_and_no_unusable_file(comparison: Comparison) -> None:
    assert comparison.results.skipped == ()
    assert comparison.results.calibration is not None


def test_fronts_are_tables_too(comparison: Comparison) -> None:
    """By hand: AdaGradSelect is cheaper than full in both costs, and full is better; LoRA is the smallest and worst."""
    accuracy, loss = shown_scores(comparison)
    assert (accuracy.measure.title, loss.measure.title) == ("test accuracy", "stories loss")
    costs = costs_of(comparison, accuracy)
    table = front_table(comparison.methods, scores=accuracy, costs=costs, name=Namer(comparison.marks))
    assert [column.title for column in table.columns] == [
        *("Method", "Test accuracy", "Training time", "On the front", "Average bytes held", "On the front")
    ]
    by_name = {row[0]: (row[3], row[5]) for row in texts(table)}
    order = [method.name for method in comparison.methods]
    assert order == ["full", "AdaGradSelect 20 %", "LoRA r=64"]
    assert by_name == {"full": ("yes", "yes"), "AdaGradSelect 20 %": ("yes", "yes"), "LoRA r=64": ("no", "yes")}
    assert len(list(front_parts(comparison, Namer(comparison.marks)))) == 2


def test_accuracy_and_loss_are_drawn_against_time_and_memory(folder: Path) -> None:
    page = build_page(read_results(folder, include_dirty=False))
    names = {chart.name: chart for chart in page.charts}
    assert {"score-time", "score-memory", "score-loss-time", "score-loss-memory"} <= set(names)
    assert "On the front: AdaGradSelect 20 % and full." in names["score-time"].caption
    assert "budget" in [section.key for section in page.sections]


def test_the_calibration_and_the_time_taken_are_shown(comparison: Comparison) -> None:
    (part,) = budget_parts(comparison, Namer(comparison.marks))
    assert "(time_of: full), which is 24.0\N{NO-BREAK SPACE}s of training steps" in part.text
    assert part.table is not None
    rows = {row[0].text: row for row in part.table.rows}
    lora = [cell.text.replace("\N{NO-BREAK SPACE}", " ") for cell in rows["LoRA r=64"]]
    assert lora == ["LoRA r=64", "500 ms", "1.250", "5 %", "5", "60", "30.0 s"]
    assert rows["LoRA r=64"][6].detail == "125\N{NO-BREAK SPACE}%"


def test_who_is_ahead_at_equal_cost_is_a_finding(comparison: Comparison) -> None:
    ranking, over, left_out, failed = budget_findings(comparison)
    assert ranking.startswith("At equal cost (budget time_of: full), test accuracy: ahead of full: none; behind: LoRA")
    assert "not told apart: AdaGradSelect 20 % (" in ranking
    assert over.startswith("Trained longer than their budget by more than a tenth: LoRA r=64 (125")
    assert left_out == "Left out for memory: big takes 3.00 GiB of 2.00 GiB (weights and state)."
    assert failed == "Not run, because its calibration failed: misfit (count=99 is more than the 6 blocks)."
    assert left_out_for_memory(comparison) == {"big": "takes 3.00 GiB of 2.00 GiB"}


def test_flops_and_memory_have_their_own_words(tmp_path: Path) -> None:
    for values in results_of("full", seeds=2):
        own = {"unit": "FLOPs", "total": 1e15, "step_cost": 2e13, "memory": 2**31, "text": "flops: 1e+15, memory: 2GiB"}
        write(tmp_path, with_budget(values, seconds=24, **own))
    comparison = compare_results(read_results(tmp_path, include_dirty=False))
    (part,) = budget_parts(comparison, Namer(comparison.marks))
    assert "which is 1e+15 FLOPs" in part.text
    assert "of weights and state" in part.text
    assert part.table is not None
    assert part.table.columns[1].title == "FLOPs a step"
    assert texts(part.table)[0][1] == "2e+13"


def test_budgets_that_differ_are_not_called_the_same(tmp_path: Path) -> None:
    """A limit of memory may change between two calls: it changes no run."""
    for name, changes in {"full": {}, "LoRA r=64": {"memory": 2**31, "text": "time_of: full, memory: 2GiB"}}.items():
        for values in results_of(name, seeds=1):
            write(tmp_path, with_budget(values, seconds=24, **changes))
    comparison = compare_results(read_results(tmp_path, include_dirty=False))
    (part,) = budget_parts(comparison, Namer(comparison.marks))
    assert "the same budget" not in part.text
    spent = "which is 24.0\N{NO-BREAK SPACE}s of training steps"
    assert f"time_of: full, memory: 2GiB, {spent}: LoRA r=64" in part.text
    assert f"time_of: full, {spent}: full" in part.text


def test_a_run_that_held_more_than_its_budget_is_named(tmp_path: Path) -> None:
    for values in results_of("full", seeds=2):
        write(tmp_path, with_budget(values, seconds=24, total=None, steps=None, memory=MODEL_BYTES))
    (found,) = budget_findings(compare_results(read_results(tmp_path, include_dirty=False)))
    assert found.startswith("Held more in its run than the memory of the budget: full (16.8\N{NO-BREAK SPACE}MB)")


def test_a_damaged_calibration_is_named_and_the_page_is_made(tmp_path: Path) -> None:
    write_all(tmp_path, "full", "LoRA r=64", seeds=2)
    (tmp_path / CALIBRATION).write_text("{")
    results = read_results(tmp_path, include_dirty=False)
    assert [skipped.file for skipped in results.skipped] == [CALIBRATION]
    assert results.calibration is None
    comparison = compare_results(results)
    assert list(budget_findings(comparison)) == []
    assert list(budget_parts(comparison, Namer(comparison.marks))) == []
