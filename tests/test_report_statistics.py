"""Intervals and tests of the report against formulas and other implementations."""

from __future__ import annotations

import math

import numpy as np
import pytest
from report_fixtures import result, write, write_all
from scipy import stats

from gradselect.app.report import number_format as words
from gradselect.app.report.budget_section import _ranking
from gradselect.app.report.chart_lines import smoothed
from gradselect.app.report.charts import Point, pareto_front, slug
from gradselect.app.report.comparison import compare_results
from gradselect.app.report.findings import findings
from gradselect.app.report.read_results import read_results
from gradselect.app.report.score_tables import results_table
from gradselect.app.report.scores import Difference, ItemTable, Measure
from gradselect.app.report.table import Namer
from gradselect.app.stats import (
    Outcomes,
    degrees_of_freedom,
    draw_means,
    mcnemar,
    percentile_interval,
    student_interval,
    two_sided_p,
)


def answers(*rows: str) -> np.ndarray:
    return np.array([[float(letter) for letter in row] for row in rows])


def scores_of(folder):
    return compare_results(read_results(folder, include_dirty=False)).scores


def said_of(folder):
    return " ".join(findings(compare_results(read_results(folder, include_dirty=False))))


def test_one_seed_is_tested_exactly():
    first, second = answers("1111111100" + "1" * 20), answers("0000000011" + "1" * 20)
    assert mcnemar(first, second) == pytest.approx(stats.binomtest(8, 10, 0.5).pvalue)


def test_several_seeds_with_one_answer_an_item_are_the_plain_statistic():
    """Where each item differs in at most one seed, items are independent pairs: (b - c)² / (b + c)."""
    first = np.zeros((2, 40))
    second = np.zeros((2, 40))
    first[0, :14] = 1
    second[1, 20:25] = 1
    assert mcnemar(first, second) == pytest.approx(stats.chi2.sf((14 - 5) ** 2 / 19, 1))


def test_repeated_answers_are_no_further_evidence():
    """Asking thrice with the same answers must not make the difference surer."""
    generator = np.random.default_rng(0)
    first = (generator.random((1, 300)) < 0.6).astype(float)
    second = (generator.random((1, 300)) < 0.5).astype(float)
    twice, thrice = (mcnemar(np.repeat(first, n, 0), np.repeat(second, n, 0)) for n in (2, 3))
    assert twice == pytest.approx(thrice)


def test_equal_answers_differ_by_nothing():
    same = answers("0110", "1100")
    assert mcnemar(same, same) == 1.0
    assert mcnemar(same[:1], same[:1]) == 1.0


def test_the_bootstrap_over_items_has_the_spread_of_a_share():
    gains = (np.random.default_rng(1).random((1, 500)) < 0.3).astype(float)
    drawn = Outcomes(gains=gains, weights=np.ones(500)).draw()
    share = gains.mean()
    assert drawn.std() == pytest.approx(math.sqrt(share * (1 - share) / 500), rel=0.06)
    assert drawn.mean() == pytest.approx(share, abs=0.003)


def test_losses_are_weighed_by_tokens():
    outcomes = Outcomes(gains=np.array([[2.0, 30.0]]), weights=np.array([1.0, 9.0]))
    assert outcomes.values() == pytest.approx([3.2])


def test_the_spread_over_seeds_is_unbiased():
    """Drawing n of n seeds would give (n - 1) / n of the variance of a mean: a third too little of three."""
    values = np.array([0.1, 0.4, 0.9])
    means = draw_means(np.tile(values, (40_000, 1)))
    assert means.var() == pytest.approx(values.var(ddof=1) / 3, rel=0.03)


def test_draws_are_the_same_every_time():
    outcomes = Outcomes(gains=np.random.default_rng(2).random((2, 30)), weights=np.ones(30))
    assert np.array_equal(outcomes.draw(), outcomes.draw())
    assert np.array_equal(draw_means(outcomes.draw()), draw_means(outcomes.draw()))


def test_a_difference_between_seeds_alone_is_rarely_significant():
    """Three seeds of two methods that are alike, whose seeds differ far more than their items: with the quantiles of
    the normal distribution one comparison of five was significant. Tolerance: 200 comparisons."""
    generator, found = np.random.default_rng(5), 0
    for _ in range(200):
        drawn = generator.normal(0, 1, (1, 3)) + generator.normal(0, 0.05, (1000, 3))
        degrees = degrees_of_freedom(drawn, num_items=200)
        assert degrees > 1.9
        draws = draw_means(drawn)
        low, high = percentile_interval(draws, degrees=degrees)
        value = float(drawn.mean())
        found += two_sided_p(value, draws, degrees=degrees) < 0.05 and not low <= 0 <= high
    assert found <= 20


def test_an_interval_of_shares_ends_at_none_and_all():
    """Few right answers of three seeds had -2 % at the lower end."""
    gains = np.zeros((3, 100))
    gains[0, :30] = 1
    outcomes = Outcomes(gains=gains, weights=np.ones(100))
    rows = {("few", seed): seed for seed in range(3)}
    shares = ItemTable(rows=rows, outcomes=outcomes, drawn=outcomes.draw(), is_share=True, most_items=100)
    assert shares.interval("few")[0] == 0.0
    losses = ItemTable(rows=rows, outcomes=outcomes, drawn=outcomes.draw(), is_share=False, most_items=100)
    assert losses.interval("few")[0] < 0.0


def test_items_alone_have_as_many_degrees_of_freedom_as_items():
    drawn = Outcomes(gains=np.random.default_rng(6).random((1, 40)), weights=np.ones(40)).draw()
    assert degrees_of_freedom(drawn, num_items=40) == 39


def test_the_p_value_of_draws_is_the_normal_one():
    draws = np.random.default_rng(3).normal(0.5, 0.2, 4000)
    assert two_sided_p(0.5, draws) == pytest.approx(2 * stats.norm.sf(0.5 / draws.std(ddof=1)))
    assert percentile_interval(draws) == pytest.approx((0.5 - 0.392, 0.5 + 0.392), abs=0.03)


@pytest.mark.parametrize("num_seeds", [2, 4, 30])
def test_student_intervals_are_those_of_the_mean(num_seeds):
    values = np.random.default_rng(4).random(num_seeds)
    expected = stats.t.interval(0.95, num_seeds - 1, np.mean(values), stats.sem(values))
    assert student_interval(values.tolist()) == pytest.approx(expected)


def test_one_seed_has_no_interval():
    assert student_interval([0.4]) is None


def test_a_true_difference_is_found_and_none_is_not(tmp_path):
    """Two methods of one skill and a worse one, three seeds."""
    for seed in range(3):
        write(tmp_path, result("full", seed=seed, skill=0.6))
        write(tmp_path, result("alike", seed=seed, skill=0.6))
        write(tmp_path, result("worse", seed=seed, skill=0.4))
    for scores in scores_of(tmp_path):
        verdicts = {one.first: one.is_significant for one in scores.against("full")}
        assert verdicts == {"alike": False, "worse": True}, scores.measure.title
        worse = next(one for one in scores.against("full") if one.first == "worse")
        assert (worse.value < 0) == scores.measure.higher_is_better
        assert worse.adjusted >= worse.p_value


def test_pairs_can_be_significant_however_many_there_are(tmp_path):
    for place in range(20):
        write(tmp_path, result(f"m{place:02d}", skill=0.2 + 0.03 * place))
    for scores in scores_of(tmp_path):
        assert any(pair.is_significant for pair in scores.pairs())


def test_scores_are_means_over_seeds_with_an_interval_around_them(tmp_path):
    write_all(tmp_path, "full")
    accuracy, loss = scores_of(tmp_path)
    assert (accuracy.measure.title, loss.measure.title) == ("test accuracy", "stories loss")
    files = [result("full", seed=seed, skill=0.62) for seed in range(3)]
    expected = sum(file["gradselect"]["scores"]["test"]["value"] for file in files) / 3
    estimate = accuracy.estimates["full"]
    assert estimate.value == pytest.approx(expected)
    assert estimate.interval is not None
    assert estimate.interval[0] < expected < estimate.interval[1]
    assert estimate.source == "items and seeds"


def test_runs_without_items_keep_their_scores_and_are_not_tested(tmp_path):
    for name in ("full", "other"):
        values = result(name)
        values["gradselect"]["items"] = {}
        write(tmp_path, values)
    accuracy = scores_of(tmp_path)[0]
    assert accuracy.pairs() == []
    assert accuracy.estimates["full"].interval is not None


def test_methods_without_a_common_seed_are_not_tested(tmp_path):
    write(tmp_path, result("full", seed=0))
    write(tmp_path, result("other", seed=1))
    assert scores_of(tmp_path)[0].pairs() == []


def with_one_item(name: str, loss: float):
    values = result(name)
    record = values["gradselect"]
    record["scores"] = {"stories": record["scores"]["stories"] | {"value": loss / 20, "num_items": 1}}
    record["items"] = {"stories": [{"index": 0, "loss": loss, "num_tokens": 20}]}
    return values


def test_a_single_item_shows_no_difference(tmp_path):
    """A text shorter than the context is one item: its bootstrap has no spread, and any difference had p = 0."""
    write(tmp_path, with_one_item("full", 50.0))
    write(tmp_path, with_one_item("other", 50.001))
    (loss,) = scores_of(tmp_path)
    assert loss.pairs() == []
    assert loss.estimates["full"].interval is None
    assert "Differences are not tested: that takes a mean over two items" in said_of(tmp_path)


@pytest.mark.parametrize(("skill", "low", "high"), [(-9.0, 0.0, 0.0188), (9.0, 0.9812, 1.0)])
def test_no_right_answer_at_all_still_leaves_room(skill, low, high, tmp_path):
    """The draws of 0 % do not vary, and the page showed an interval of 0.0 to 0.0."""
    for seed in range(2):
        write(tmp_path, result("full", seed=seed, skill=skill))
    accuracy = scores_of(tmp_path)[0]
    assert accuracy.measure.is_share
    assert accuracy.estimates["full"].interval == pytest.approx((low, high), abs=1e-4)


def test_few_items_are_said(tmp_path):
    for name in ("full", "other"):
        write(tmp_path, result(name, num_items=12))
    assert "Test accuracy has 12 items. With fewer than 30, intervals of skewed values are" in said_of(tmp_path)


def test_items_that_a_run_lacks_are_said(tmp_path):
    """A run with fewer items used to take those of all others out of every test, in silence."""
    write(tmp_path, result("full", num_items=60))
    write(tmp_path, result("other", num_items=40))
    assert "tests of test accuracy are over the 40 items that all runs have; a run has 60" in said_of(tmp_path)


def test_nothing_is_said_to_be_better_than_what_was_not_tested(tmp_path):
    """A method whose only run has another seed was counted among those that the best one is better than."""
    for seed in range(2):
        write(tmp_path, result("full", seed=seed, skill=0.8))
        write(tmp_path, result("worse", seed=seed, skill=0.4))
    write(tmp_path, result("alike", seed=5, skill=0.8))
    said = said_of(tmp_path)
    assert "better than every other method that could be tested" in said
    assert "Not tested against it, because no seed has items of both: alike." in said
    assert "Every other method's" not in said
    assert (
        "Every tested method's test accuracy is significantly worse than that of full fine-tuning; not tested" in said
    )
    (accuracy, *_) = scores_of(tmp_path)
    assert accuracy.untested("full") == ["alike"]


def test_a_method_alone_is_not_called_untested(tmp_path):
    write_all(tmp_path, "full")
    assert "No other method has this score." in said_of(tmp_path)


def test_an_unknown_cost_makes_no_method_worse(tmp_path):
    """Without the bytes of a method the page said that every other method was significantly worse."""
    write(tmp_path, result("full"))
    values = result("alike", skill=0.5)
    values["gradselect"]["bytes"] = None
    write(tmp_path, values)
    said = said_of(tmp_path)
    assert "significantly worse" not in said
    assert "Fastest to train of the methods that are not shown to be worse" in said


def test_a_cost_that_some_methods_lack_is_said(tmp_path):
    for name in ("full", "one", "other"):
        values = result(name)
        if name == "other":
            values["gradselect"]["bytes"] = None
        write(tmp_path, values)
    assert "Unknown average bytes: other." in said_of(tmp_path)


def test_runs_that_went_on_from_a_checkpoint_are_said(tmp_path):
    for name in ("full", "other"):
        values = result(name)
        if name == "other":
            values["gradselect"]["resumed_from"] = "step-40"
        write(tmp_path, values)
    assert "1 run went on from a checkpoint (other): the training time is that of the last session" in said_of(tmp_path)


def test_runs_of_which_a_score_is_undefined_are_counted(tmp_path):
    """A run that collapsed to one label has no Matthews correlation, and the mean of the others looked whole."""
    for name in ("full", "other"):
        for seed in range(3):
            values = result(name, seed=seed)
            record = values["gradselect"]
            value = None if (name, seed) == ("other", 0) else 0.5 + 0.01 * seed
            record["scores"] = {"cola": {"task": "classification", "metric": "matthews", "value": value}}
            record["items"] = {}
            write(tmp_path, values)
    (matthews,) = scores_of(tmp_path)
    assert (matthews.estimates["full"].num_runs, matthews.estimates["other"].num_runs) == (3, 2)
    assert "Cola matthews is undefined in 1 of 3 runs of other, as after training that collapsed." in said_of(tmp_path)
    comparison = compare_results(read_results(tmp_path, include_dirty=False))
    table = results_table(comparison.methods, scores=comparison.scores, full=comparison.full, name=Namer({}))
    details = {row[0].text: row[3].detail for row in table.rows}
    assert "2 of 3 seeds" in details["other"]
    assert "seeds" not in details["full"]


def test_a_budget_names_what_was_not_tested():
    one = Difference(first="a", second="full", value=0.1, interval=(-0.1, 0.3), p_value=0.4, adjusted=0.4)
    measure = Measure(name="test", metric="accuracy")
    assert _ranking([one], reference="full", measure=measure, untested=["b"]).endswith("(+10.0); not tested: b.")


def test_the_front_holds_what_no_other_beats():
    points = [
        Point(name=name, x=x, y=y) for name, x, y in [("a", 1, 5), ("b", 2, 4), ("c", 3, 7), ("d", 3, 6), ("e", 4, 7)]
    ]
    assert [point.name for point in pareto_front(points, higher_is_better=True)] == ["a", "c"]
    assert [point.name for point in pareto_front(points, higher_is_better=False)] == ["a", "b"]


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (words.number(-0.0004, digits=3, sign=True), "0.000"),
        (words.number(-1.5, digits=1), "\N{MINUS SIGN}1.5"),
        (words.number(math.nan), "\N{EN DASH}"),
        (words.seconds(0.4123), "412 ms"),
        (words.seconds(90), "90.0 s"),
        (words.seconds(150), "2.50 min"),
        (words.num_bytes(54_321_000), "54.3 MB"),
        (words.num_bytes(999), "999 B"),
        (words.share(0.4549), "45 %"),
        (words.times(1.428), "1.43\N{MULTIPLICATION SIGN}"),
        (words.rate(0.0003), "3e-4"),
        (words.rate(0.00015), "1.5e-4"),
        (words.probability(0.0002), "< 0.001"),
        (words.significant(12345.6), "12,346"),
    ],
)
def test_figures_are_written_for_people(shown, expected):
    assert shown.replace("\N{NO-BREAK SPACE}", " ") == expected


def test_names_make_file_names():
    assert slug("AdaGradSelect 20 % + Embedding") == "adagradselect-20-embedding"
    assert slug("%") == "method"


def test_smoothing_never_looks_ahead():
    values = [float(value) for value in range(100)]
    assert smoothed(values)[:3] == [0.0, 0.5, 1.0]
    assert smoothed(values)[99] == pytest.approx(sum(range(96, 100)) / 4)
