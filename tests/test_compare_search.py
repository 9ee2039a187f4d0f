"""Successive halving of learning rates, and forgetting on several sets: what runs, what is kept, what is said."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from compare_fixtures import BLOCKS, FULL, Runner, make_suite, suite_values, write_place
from report_fixtures import result, results_of, write

from gradselect import UsageError
from gradselect.app.compare.budget import with_share
from gradselect.app.compare.protocol import protocol_settings
from gradselect.app.compare.rate_search import FoundRate, find_rate, survivors
from gradselect.app.compare.schedule import PlannedRun
from gradselect.app.compare.search import Search
from gradselect.app.compare.suite import MethodEntry, parse_suite
from gradselect.app.report.comparison import compare_results
from gradselect.app.report.findings import disagreements, facts, findings
from gradselect.app.report.read_results import read_results
from gradselect.app.report.run_tables import rate_table
from gradselect.app.report.score_tables import forgetting_table, results_table
from gradselect.app.report.table import Namer
from gradselect.app.results import Rung, read_result, reversals
from gradselect.files.checked_json import read_sealed

# TRL 1.16 uses names that transformers 5.23 has replaced.
pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")

HALVING = {"kind": "halving", "shares": [0.5, 1.0], "keep": 0.5}
NAMES = [
    *(f"full.lr-{lr}.seed-0.share-0.5.rate" for lr in ("0.0001", "0.001", "0.01")),
    *("full.lr-0.001.seed-0.rate", "full.lr-0.01.seed-0.rate", "full.lr-0.01.seed-0.score"),
]

BAD = {
    "no kind": ({"search": {"keep": 0.5}}, "search.kind: missing"),
    "unknown kind": ({"search": {"kind": "random"}}, "search.kind = 'random': input should be 'halving'"),
    "a last rung that is short": ({"search": {**HALVING, "shares": [0.25, 0.5]}}, "search: shares=[0.25, 0.5]: each"),
    "rungs that do not grow": ({"search": {**HALVING, "shares": [0.5, 0.25, 1]}}, "write e.g. shares: [0.25, 1.0]"),
    "a rung alone": ({"search": {**HALVING, "shares": [1.0]}}, "search.shares"),
    "all are kept": ({"search": {**HALVING, "keep": 1}}, "search.keep = 1"),
    "unknown key": ({"search": {**HALVING, "share": 1}}, "search.share: unknown key, did you mean 'shares'?"),
    "a grid that shrinks": ({"widen": -1}, "widen = -1: input should be greater than or equal to 0"),
    "a set and named sets": (
        {"forgetting": {"task": "loss", "wikitext": {"task": "loss", "data": "x.txt"}}},
        "forgetting: task is a key of a single set, and wikitext the name of a set; write all sets by name",
    ),
    "forgetting of answers in a named set": (
        {"forgetting": {"sums": {"task": "gsm8k"}}},
        "forgetting.sums.task='gsm8k': forgetting is a loss; write task: loss",
    ),
    "unknown key of a named set": (
        {"forgetting": {"wikitext": {"task": "loss", "data": "x.txt", "limt": 3}}},
        "forgetting.wikitext.limt: unknown key, did you mean 'limit'?",
    ),
    "unknown key of a single set": (
        {"forgetting": {"task": "loss", "data": "x.txt", "limt": 3}},
        "forgetting.limt: unknown key, did you mean 'limit'?",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_mistakes_are_named(case: str, tmp_path: Path) -> None:
    changes, said = BAD[case]
    with pytest.raises(UsageError) as raised:
        parse_suite(suite_values(tmp_path, **changes), source="s.yaml")
    assert said in str(raised.value)


def search_of(**changes: Any) -> Search:
    return Search.model_validate({**HALVING, **changes})


class FakeRuns:
    """Gives the losses of a table by share and rate, and keeps what was asked for."""

    def __init__(self, losses: Mapping[float, Mapping[float, float | None]]) -> None:
        self.losses = losses
        self.ran: list[tuple[float, float]] = []
        self.said: list[str] = []

    def __call__(self, run: PlannedRun) -> Any:
        self.ran.append((run.share, run.lr))
        return SimpleNamespace(record=SimpleNamespace(validation_loss=self.losses[run.share].get(run.lr)))

    def find(self, search: Search | None, *rates: float, widen: int = 0) -> float | None:
        return self.found(search, *rates, widen=widen).best

    def found(self, search: Search | None, *rates: float, widen: int) -> FoundRate:
        entry = MethodEntry.model_validate({"method": {"name": "full"}, "rates": rates})
        return find_rate(
            "m", entry, search=search, widen=widen, ensure=self, forget=lambda losses: None, say=self.said.append
        )


def test_the_best_of_short_runs_go_on_and_full_ones_choose() -> None:
    """Of five rates three go on; the last rung chooses another one than the short runs would have."""
    short = {1.0: 0.5, 2.0: 0.4, 3.0: 0.1, 4.0: 0.2, 5.0: 0.9}
    runs = FakeRuns({0.25: short, 1.0: {2.0: 0.3, 3.0: 0.25, 4.0: 0.2}})
    assert runs.find(search_of(shares=[0.25, 1]), 1, 2, 3, 4, 5) == 4
    assert runs.ran == [*((0.25, rate) for rate in short), (1.0, 2.0), (1.0, 3.0), (1.0, 4.0)]
    first, disagreement = runs.said
    assert first == (
        "search     m: 25 % of its steps: 1 0.5000, 2 0.4000, 3 0.1000, 4 0.2000, 5 0.9000; to the next rung: 2, 3, 4"
    )
    assert disagreement.startswith("note       m: at 25 % of its steps 3 was ahead of 4, at all steps it is behind")


def test_two_rates_at_least_reach_the_last_rung_and_no_rung_runs_for_nothing() -> None:
    """Eight rates: 8, 4, 2 and 2. Three: the second short rung would drop none, so it does not run."""
    losses = {share: {float(rate): 1.0 / rate for rate in range(1, 9)} for share in (0.1, 0.3, 0.6, 1.0)}
    search = search_of(shares=[0.1, 0.3, 0.6, 1.0], keep=0.3)
    runs = FakeRuns(losses)
    assert runs.find(search, *range(1, 9)) == 8
    assert [share for share, _ in runs.ran] == [*[0.1] * 8, *[0.3] * 3, *[1.0] * 2]
    few = FakeRuns(losses)
    assert few.find(search, 1, 2) == 2
    assert few.ran == [(1.0, 1.0), (1.0, 2.0)]
    alone = FakeRuns(losses)
    assert (alone.find(search, 3), alone.ran) == (3, [])
    grid = FakeRuns(losses)
    assert grid.find(None, 1, 2, 3) == 3
    assert (grid.said, [share for share, _ in grid.ran]) == ([], [1.0] * 3)


def test_a_grid_is_widened_while_its_best_rate_is_at_the_edge() -> None:
    """At full length, in either direction, no farther than allowed, and not beyond a rate that failed."""
    up = FakeRuns({0.25: {1.0: 4.0, 2.0: 3.0, 4.0: 2.0}, 1.0: {2.0: 1.0, 4.0: 0.5, 8.0: 0.4, 16.0: 0.6}})
    assert up.found(search_of(shares=[0.25, 1]), 1, 2, 4, widen=3) == FoundRate(8.0, (1.0, 2.0, 4.0, 8.0, 16.0))
    assert up.ran[3:] == [(1.0, 2.0), (1.0, 4.0), (1.0, 8.0), (1.0, 16.0)]
    assert up.said[1:] == [
        f"search     m: the best rate {best} is at the edge of its grid; next: {beyond}"
        for best, beyond in ((4, 8), (8, 16))
    ]
    down = FakeRuns({1.0: {1.0: 1.0, 2.0: 2.0, 0.5: 0.9, 0.25: 0.8, 0.125: 0.7}})
    assert down.found(None, 2, 1, widen=2) == FoundRate(0.25, (2.0, 1.0, 0.5, 0.25))
    failed = FakeRuns({1.0: {1.0: 2.0, 2.0: 1.0, 4.0: None}})
    assert failed.found(None, 1, 2, widen=2) == FoundRate(2.0, (1.0, 2.0, 4.0))
    inside = FakeRuns({1.0: {1.0: 2.0, 2.0: 1.0, 4.0: 3.0}})
    assert inside.found(None, 1, 2, 4, widen=2) == FoundRate(2.0, (1.0, 2.0, 4.0))
    nothing = FakeRuns({1.0: {}})
    assert nothing.found(None, 1, 2, widen=2) == FoundRate(None, (1.0, 2.0))


def test_a_rate_without_a_loss_does_not_go_on() -> None:
    rung = Rung(share=0.5, losses={1.0: None, 2.0: float("nan"), 3.0: 2.0, 4.0: 1.0})
    assert survivors(rung, search_of()) == (3.0, 4.0)
    broken = FakeRuns({0.5: {}})
    assert broken.find(search_of(), 1, 2, 3) is None
    assert broken.said == [
        "search     m: 50 % of its steps: 1 has no loss, 2 has no loss, 3 has no loss; to the next rung: none"
    ]


def test_only_rates_of_both_rungs_can_disagree() -> None:
    short, full = Rung(share=0.5, losses={1.0: 3.0, 2.0: 2.0, 3.0: 1.0}), {2.0: 1.0, 3.0: 2.0}
    (found,) = reversals([short, Rung(share=1.0, losses=full)])
    assert (found.share, found.ahead, found.behind) == (0.5, 3.0, 2.0)
    assert reversals([short, Rung(share=1.0, losses={2.0: 2.0, 3.0: 1.0})]) == ()


def test_a_short_run_is_whole_with_its_phases_scaled(tmp_path: Path) -> None:
    method = {"name": "adagradselect", "count": 2, "explore_steps": 40, "every": 3}
    suite = make_suite(tmp_path, methods={"a": {"method": method, "rates": [1]}})
    recipe = suite.training_recipe("a", lr=1, seed=0, output="-")
    warm = recipe.optimizer.model_copy(update={"warmup": 10.0})
    steps = recipe.model_copy(update={"run": recipe.run.model_copy(update={"steps": 100}), "optimizer": warm})
    quarter: Any = with_share(steps, 0.25)
    assert (quarter.run.steps, quarter.method.explore_steps, quarter.method.every) == (25, 10, 3)
    assert quarter.optimizer.warmup == 2.0
    epochs = recipe.model_copy(update={"run": recipe.run.model_copy(update={"steps": None, "epochs": 2.0})})
    half: Any = with_share(epochs, 0.5)
    assert (half.run.steps, half.run.epochs, half.method.explore_steps) == (None, 1.0, 20)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_place(tmp_path_factory.mktemp("place"))


def halving_suite(place: Path) -> Any:
    """Three rates, of which two go on, and two sets to forget."""
    values = suite_values(
        place,
        search=HALVING,
        evaluations={},
        forgetting={
            name: {"task": "loss", "data": str(place / name), "limit": 3} for name in ("known.txt", "sums.jsonl")
        },
        seeds=1,
        methods={"full": {**FULL, "rates": [1e-4, 1e-3, 1e-2]}},
    )
    values["recipe"]["run"]["steps"] = 4
    return parse_suite(values, source="suite")


@pytest.fixture(scope="module")
def finished(place: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str], str, Any]:
    folder = tmp_path_factory.mktemp("finished") / "results"
    with pytest.MonkeyPatch.context() as patch:
        runner = Runner(patch)
        (summary,) = runner(halving_suite(place), folder)
    return folder, runner.ran, runner.said, summary


def copied(results: Path, folder: Path) -> Path:
    """Copy the result files, without the work in progress."""
    copy = folder / "results"
    copy.mkdir()
    for file in results.glob("*.json"):
        (copy / file.name).write_bytes(file.read_bytes())
    return copy


def values(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / f"{name}.json").read_text("utf-8"))


def test_short_runs_are_results_and_the_best_full_one_is_scored(finished: tuple[Path, list[str], str, Any]) -> None:
    folder, ran, said, summary = finished
    assert ran == NAMES
    assert sorted(path.stem for path in folder.glob("*.json")) == sorted(NAMES)
    short, full, score = (values(folder, name) for name in (NAMES[2], NAMES[4], NAMES[5]))
    assert [each["run_info"]["train_config"]["run"]["steps"] for each in (short, full)] == [2, 4]
    assert (short["gradselect"]["role"], short["gradselect"]["share"]) == ("rate", 0.5)
    assert "share" not in full["gradselect"]
    assert short["train_info"]["file_size"] is None
    # Trained once: the very same seconds.
    assert full["gradselect"]["seconds"] == score["gradselect"]["seconds"]
    assert score["gradselect"]["rate_at_edge"] is True
    assert score["gradselect"]["protocol_settings"]["search"] == HALVING
    assert not list((folder / "work").rglob("*.safetensors"))
    assert "search     full: 50 % of its steps: 0.0001 " in said
    assert "to the next rung: 0.001, 0.01" in said
    assert "rates by successive halving: runs of 50 %, 100 % of a method's steps; 50 % of the rates go on" in said
    assert [(rung.share, list(rung.losses)) for rung in summary.rungs] == [
        (0.5, [1e-4, 1e-3, 1e-2]),
        (1.0, [1e-3, 1e-2]),
    ]


def test_a_finished_search_is_not_repeated_and_a_missing_run_is(
    place: Path, finished: tuple[Path, list[str], str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner, copy = Runner(monkeypatch), copied(finished[0], tmp_path)
    runner(halving_suite(place), copy)
    assert runner.ran == []
    (copy / f"{NAMES[1]}.json").unlink()
    runner(halving_suite(place), copy)
    assert runner.ran == [NAMES[1]]
    with pytest.raises(UsageError, match=r"another protocol[\s\S]*search"):
        runner(halving_suite(place).model_copy(update={"search": None}), copy)


def test_a_widened_grid_is_part_of_the_results_and_no_new_protocol(
    place: Path, finished: tuple[Path, list[str], str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The best rate 0.01 is the highest, so 0.1 runs too; the results of the narrow grid are used again."""
    runner, copy = Runner(monkeypatch), copied(finished[0], tmp_path)
    (summary,) = runner(halving_suite(place).model_copy(update={"widen": 1, "seeds": 2}), copy)
    beyond, last = "full.lr-0.1.seed-0.rate", f"full.lr-{summary.lr:g}.seed-1.score"
    assert runner.ran[0] == beyond
    assert runner.ran[-1] == last
    assert summary.rates == (1e-4, 1e-3, 1e-2, 0.1)
    score = values(copy, last)["gradselect"]
    assert (score["rates"], score["rate_at_edge"]) == ([1e-4, 1e-3, 1e-2, 0.1], summary.lr == 0.1)
    assert "the best rate 0.01 is at the edge of its grid; next: 0.1" in runner.said
    (method,) = compare_results(read_results(copy, include_dirty=True)).methods
    assert method.rates == (1e-4, 1e-3, 1e-2, 0.1)


def test_every_set_is_forgotten_by_name(finished: tuple[Path, list[str], str, Any]) -> None:
    folder, _, said, summary = finished
    own = values(folder, NAMES[5])
    forgetting = own["gradselect"]["forgetting"]
    assert list(forgetting) == ["known.txt", "sums.jsonl"]
    kept = read_sealed(folder / "work" / "forgetting.json")
    assert sorted(kept.values()) == sorted(one["before"] for one in forgetting.values())
    rises = [one["after"] - one["before"] for one in forgetting.values()]
    assert own["train_info"]["metrics"][-1]["forgetting"] == pytest.approx(sum(rises) / 2)
    assert values(folder, NAMES[4])["gradselect"]["forgetting"] is None
    assert "forgetting, nats per token" in said
    assert f"known.txt (base {forgetting['known.txt']['before']:.4f})" in said
    assert summary.forgotten("sums.jsonl")[0].rise == rises[1]
    comparison = compare_results(read_results(folder, include_dirty=False))
    table = forgetting_table(comparison.methods, name=Namer({}))
    assert table is not None
    assert [column.title for column in table.columns] == [
        "Method",
        "known.txt",
        "known.txt",
        "Rise",
        "sums.jsonl",
        "sums.jsonl",
        "Rise",
    ]
    headline = results_table(comparison.methods, scores=(), full=None, name=Namer({}))
    assert "Forgetting: sums.jsonl" in [column.title for column in headline.columns]


def test_protocols_without_these_keys_are_those_of_earlier_versions(place: Path) -> None:
    plain = protocol_settings(make_suite(place))
    assert set(plain) == {"recipe", "evaluations", "forgetting", "rank_by"}
    assert plain["forgetting"]["task"] == "loss"
    assert protocol_settings(make_suite(place, forgetting=None))["forgetting"] is None
    named = protocol_settings(make_suite(place, forgetting={"a": {"task": "loss", "data": str(place / "known.txt")}}))
    assert named["forgetting"] == {"a": plain["forgetting"]}


def test_a_base_may_be_freed_of_its_single_set(place: Path) -> None:
    given = {"task": None, "data": None, "a": {"task": "loss", "data": "x.txt"}}
    assert list(make_suite(place, forgetting=given).forgetting) == ["a"]
    assert list(make_suite(place, methods={"u": BLOCKS}).forgetting) == [""]


def short_results(folder: Path) -> Path:
    """A made-up search in two rungs, whose order at full length is another one."""
    for values_of_run in results_of("full"):
        if values_of_run["gradselect"]["role"] == "score" or values_of_run["gradselect"]["lr"] != 3e-4:
            write(folder, values_of_run)
    for lr, loss in ((3e-4, 1.9), (1e-3, 1.7), (3e-3, 1.6)):
        values_of_run = result("full", lr=lr, role="rate")
        values_of_run["gradselect"] |= {"share": 0.25, "validation_loss": loss}
        (folder / f"full.lr-{lr:g}.seed-0.share-0.25.rate.json").write_text(json.dumps(values_of_run), "utf-8")
    return folder


def test_the_report_shows_each_rung_and_where_rungs_disagree(tmp_path: Path) -> None:
    results = read_results(short_results(tmp_path / "results"), include_dirty=False)
    comparison = compare_results(results)
    table = rate_table(results.runs, name=Namer({}))
    assert table is not None
    assert results.skipped == ()
    short, full = [[f"{cell.text} {cell.detail}".strip() for cell in row] for row in table.rows]
    assert short == ["full 25\N{NO-BREAK SPACE}% of its steps", "1.900 dropped", "1.700", "1.600"]
    assert full[:2] == ["full all steps", ""]
    assert full[2].endswith(" best")
    (line,) = disagreements(comparison)
    assert line == ("full: at 25\N{NO-BREAK SPACE}% of its steps 3e-3 was ahead of 1e-3, at all steps it is behind.")
    assert "5 runs of the rate search (3 of them short)" in list(facts(comparison))
    assert any(found.startswith("Short runs of the rate search") for found in findings(comparison))


def test_old_and_new_forms_of_forgetting_are_read(tmp_path: Path) -> None:
    old = result("full")
    new = result("full", seed=1)
    new["gradselect"]["forgetting"] = {"a": {"before": 1.0, "after": 1.5}}
    one, other = (read_result(write(tmp_path, each)).record.forgotten for each in (old, new))
    assert list(one) == [""]
    assert other["a"].rise == 0.5
    broken = result("full", seed=2)
    broken["gradselect"]["forgetting"] = {"before": 2.0}
    with pytest.raises(UsageError, match="forgetting"):
        read_result(write(tmp_path, broken))
