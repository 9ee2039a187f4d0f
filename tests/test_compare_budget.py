"""Equal time: the budget of a suite, its calibration, the steps of each method, and what is reused."""

from __future__ import annotations

import gc
import json
import math
import shutil
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from compare_fixtures import BLOCKS, FULL, MISFIT, Runner, make_suite, suite_values, write_place

import gradselect as gs
from gradselect import UsageError
from gradselect.app.compare import budget as _budget
from gradselect.app.compare import calibrating as _calibrating
from gradselect.app.compare import load_suite, turns_worker
from gradselect.app.compare import turn as _turn
from gradselect.app.compare.allotment import allot, kind_shares
from gradselect.app.compare.budget import Budget, with_steps
from gradselect.app.compare.calibration import Calibrator
from gradselect.app.compare.protocol import protocol_settings
from gradselect.app.compare.side_by_side import SideBySide
from gradselect.app.compare.suite import Suite, parse_suite
from gradselect.app.compare.turn import _growth, turn_recipe
from gradselect.app.compare.turns import MOST_TIMES, TURN_OF, Turn, TurnsJob, ratios
from gradselect.app.results import (
    CALIBRATION,
    Calibration,
    MethodCalibration,
    read_calibration,
    read_result,
    write_calibration,
)

# TRL 1.16 uses names that transformers 5.23 has replaced.
pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")

ADA = {"method": {"name": "adagradselect", "count": 2, "explore_steps": 25}, "rates": [1e-2]}
MACHINE = {"processor": "slow", "device": "cpu", "cpus": 2, "threads": 2}

BAD = {
    "two budgets": ({"time_of": "full", "seconds": 5}, "got time_of='full' and seconds=5.0; give one of them"),
    "no budget": ({"rounds": 3}, "it limits nothing; write time_of: full"),
    "a share of nothing": ({"seconds": 5, "share": 0.5}, "share=0.5 is a factor on time_of"),
    "a method that is not there": (
        {"time_of": "fall"},
        "budget.time_of='fall' names no method of this suite; write one",
    ),
    "a size of no unit": ({"memory": "2 elephants"}, "'2 elephants' is no size"),
    "a number of nothing": (
        600,
        "budget: got 600, which does not say what it is of; write time_of: full, seconds: 600",
    ),
    "no time": ({"seconds": 0}, "budget.seconds = 0"),
    "too few rounds": (
        {"seconds": 5, "rounds": 2},
        "budget: rounds=2: the median of fewer than 3 rounds keeps the one that another process disturbed",
    ),
    "too few steps of a turn": ({"seconds": 5, "round_steps": 3}, "write round_steps: 4 or more"),
    "unknown key": ({"tme_of": "full"}, "budget.tme_of: unknown key, did you mean 'time_of'?"),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_place(tmp_path_factory.mktemp("place"))


def make(folder: Path, budget: Mapping[str, Any], *, steps: int = 100, **methods: Any) -> Suite:
    values = suite_values(folder, budget=dict(budget), methods=methods or {"full": FULL, "ada": ADA})
    values["recipe"]["run"]["steps"] = steps
    return parse_suite(values, source="suite")


class FakeMachine:
    """Measures without a clock: the costs of a step by method and kind, times a factor of each round."""

    def __init__(
        self, costs: Mapping[str, Mapping[str, float]], *, factors: Mapping[str, Sequence[float]] | None = None
    ) -> None:
        self.costs, self.factors = costs, factors or {}
        self.measured: list[list[str]] = []
        self.bytes = dict.fromkeys(costs, 100)

    def __call__(self, names: Sequence[str], first: int) -> list[Turn]:
        self.measured.append(list(names))
        return [self._turn(name, number) for number in range(first, first + 3) for name in names]

    def _turn(self, name: str, number: int) -> Turn:
        factors = self.factors.get(name, [1.0])
        kinds = [kind for kind in self.costs[name] for _ in range(8 // len(self.costs[name]))]
        return Turn(
            method=name,
            number=number,
            kinds=tuple(kinds),
            costs=tuple(self.costs[name][kind] * factors[number % len(factors)] for kind in kinds),
            bytes=self.bytes[name],
            counted="weights",
            epoch_steps=40,
            block_names=("layer.0",),
        )


def calibrate(
    suite: Suite,
    machine: FakeMachine,
    *,
    known: Calibration | None = None,
    facts: Mapping[str, Any] = MACHINE,
    said: list[str] | None = None,
) -> Calibration:
    calibrator = Calibrator(
        suite, measure=machine, shared="x", machine=facts, say=(said if said is not None else []).append
    )
    missing = calibrator.missing(list(suite.methods), known)
    calibration = calibrator.calibrate(missing, known) if missing or known is None else known
    return allot(suite, calibration, list(suite.methods))


@pytest.mark.parametrize("case", BAD)
def test_mistakes_in_a_budget_are_named(case: str, tmp_path: Path) -> None:
    budget, said = BAD[case]
    with pytest.raises(UsageError) as raised:
        parse_suite(suite_values(tmp_path, budget=budget), source="s.yaml")
    assert said in str(raised.value)


def test_a_budget_is_read_and_written_as_people_write_it(tmp_path: Path) -> None:
    suite = make(tmp_path, {"time_of": "full", "share": 0.5, "memory": "1.5GiB"})
    assert suite.budget is not None
    assert suite.budget.memory == 3 * 2**29
    assert suite.budget.text() == "time_of: full, share: 0.5, memory: 1.5GiB"
    assert Budget.model_validate({"flops": "1e15"}).text() == "flops: 1e+15"


def test_the_equal_time_suite_drops_its_budget_with_null() -> None:
    folder = Path(__file__).parents[1] / "suites"
    suite = load_suite(folder / "small-equal-time.yaml")
    assert suite.budget is not None
    assert (suite.budget.time_of, suite.seeds) == ("full", 5)
    # What both suites have is the same method, whatever this one drops or adds: only the time differs.
    plain = load_suite(folder / "small.yaml").methods
    both = [name for name in suite.methods if name in plain]
    assert {"full", "AdaGradSelect 3 of 8 + embedding"} <= set(both)
    assert [suite.methods[name].method for name in both] == [plain[name].method for name in both]
    assert load_suite(folder / "small-equal-time.yaml", ["budget=null"]).budget is None


def test_phases_keep_their_share_and_periods_their_length(tmp_path: Path) -> None:
    method = {"name": "adagradselect", "count": 2, "explore_steps": 25, "every": 3}
    suite = make(tmp_path, {"time_of": "a"}, a={"method": method, "rates": [1]})
    recipe = suite.training_recipe("a", lr=1, seed=0, output="-")
    recipe = recipe.model_copy(update={"optimizer": recipe.optimizer.model_copy(update={"warmup": 10.0})})
    longer = with_steps(recipe, steps=150, run_steps=100)
    own: Any = longer.method
    assert (longer.run.steps, own.explore_steps, own.every, longer.optimizer.warmup) == (150, 38, 3, 15.0)
    assert with_steps(recipe, steps=1, run_steps=100).method.explore_steps == 1  # pyright: ignore
    assert with_steps(recipe, steps=100, run_steps=100) == recipe


def test_the_reference_has_its_own_steps_and_a_faster_method_more(tmp_path: Path) -> None:
    """By hand: ada costs 1.0 and 0.5 of a full step; of n steps the expected number explores."""
    suite = make(tmp_path, {"time_of": "full"})
    machine = FakeMachine({"full": {"step": 2.0}, "ada": {"explore": 2.0, "exploit": 1.0}})
    found = calibrate(suite, machine)
    ada = found.methods["ada"]
    assert (found.methods["full"].steps, found.methods["full"].ratio, found.budget) == (100, 1.0, 200.0)
    assert ada.steps is not None
    policy_steps = {n: _explored(round(n / 4), n) for n in (ada.steps, ada.steps + 1)}
    costs = {n: 2.0 * explored + 1.0 * (n - explored) for n, explored in policy_steps.items()}
    assert costs[ada.steps] <= 200 < costs[ada.steps + 1]
    assert ada.step_cost == pytest.approx(costs[ada.steps] / ada.steps)


def _explored(explore_steps: int, num_steps: int) -> float:
    """Expected explore steps, from the formula of AdaGradSelect with epsilon_end = 0.01."""
    return sum(math.exp(math.log(0.01) * t / explore_steps) for t in range(min(explore_steps, num_steps)))


def test_half_the_time_and_a_time_in_seconds(tmp_path: Path) -> None:
    costs = {"full": {"step": 2.0}, "ada": {"explore": 2.0, "exploit": 2.0}}
    half = calibrate(make(tmp_path, {"time_of": "full", "share": 0.5}), FakeMachine(costs))
    timed = calibrate(make(tmp_path, {"seconds": 61}), FakeMachine(costs))
    assert [half.methods[name].steps for name in costs] == [50, 50]
    assert [timed.methods[name].steps for name in costs] == [30, 30]


def test_a_budget_shorter_than_a_step_names_the_method_and_the_least(tmp_path: Path) -> None:
    costs = {"full": {"step": 2.0}, "ada": {"explore": 7.0, "exploit": 3.0}}
    with pytest.raises(
        UsageError, match=r"budget\.seconds=5 is 5 s and shorter than one step of 'ada', which takes 7 s"
    ):
        calibrate(make(tmp_path, {"seconds": 5}), FakeMachine(costs))
    with pytest.raises(UsageError, match=r"write budget\.share=0\.035 or more"):
        calibrate(make(tmp_path, {"time_of": "full", "share": 0.01}), FakeMachine(costs))


def test_a_method_that_takes_too_much_memory_is_left_out(tmp_path: Path) -> None:
    machine = FakeMachine({"full": {"step": 1.0}, "ada": {"explore": 1.0, "exploit": 1.0}})
    machine.bytes["full"] = 3000
    found = calibrate(make(tmp_path, {"memory": 2048}), machine)
    assert found.methods["full"].left_out == "takes 2.93 KiB of 2.00 KiB"
    assert (found.methods["ada"].left_out, found.methods["ada"].steps, found.budget) == ("", None, None)


def test_rounds_that_vary_are_repeated_and_the_median_of_all_is_kept(tmp_path: Path) -> None:
    """The first three rounds vary by 0.5, the next three by nothing."""
    said: list[str] = []
    factors = {"ada": [1.0, 1.5, 1.0, 1.1, 1.1, 1.1]}
    machine = FakeMachine({"full": {"step": 1.0}, "ada": {"explore": 1.0, "exploit": 1.0}}, factors=factors)
    found = calibrate(make(tmp_path, {"time_of": "full"}), machine, said=said)
    assert machine.measured == [["full", "ada"], ["full", "ada"]]
    assert "the rounds vary: ada by 50 %" in said[0]
    assert found.methods["ada"].by_kind["exploit"].ratio == pytest.approx(1.1)
    assert (found.methods["ada"].num_rounds, found.methods["ada"].spread) == (6, pytest.approx(0.5 / 1.1))


def test_rounds_that_never_settle_are_kept_and_said(tmp_path: Path) -> None:
    said: list[str] = []
    machine = FakeMachine({"full": {"step": 1.0}, "b": {"step": 1.0}, "c": {"step": 1.0}}, factors={"b": [1, 2]})
    suite = make(tmp_path, {"time_of": "full"}, full=FULL, b=FULL, c=FULL)
    found = calibrate(suite, machine, said=said)
    assert machine.measured == [["full", "b", "c"], ["full", "b"], ["full", "b"]]
    assert "still vary: b by 100 %; the medians of all rounds are kept" in said[-1]
    assert (found.methods["b"].num_rounds, found.methods["c"].num_rounds) == (9, 3)


def test_a_reference_that_fails_in_a_repeated_round_ends_the_calibration_in_words(tmp_path: Path) -> None:
    """The other methods of that round had nothing to be compared with: a KeyError."""

    class FailsLater(FakeMachine):
        def _turn(self, name: str, number: int) -> Turn:
            is_late = name == "full" and number > 3
            return Turn(method=name, number=number, error="out of memory") if is_late else super()._turn(name, number)

    machine = FailsLater({"full": {"step": 1.0}, "b": {"step": 1.0}}, factors={"b": [1, 2]})
    suite = make(tmp_path, {"time_of": "full"}, full=FULL, b=FULL)
    with pytest.raises(UsageError, match="the calibration of 'full' failed: out of memory"):
        calibrate(suite, machine)


def test_a_burst_of_another_process_counts_little_and_a_dear_step_counts() -> None:
    quiet = Turn(method="full", number=0, kinds=("step",) * 4, costs=(2.0, 2.0, 4.0, 2.0))
    burst = Turn(method="a", number=0, kinds=("exploit",) * 4, costs=(1.0, 90.0, 2.0, 1.0))
    assert ratios(burst, quiet) == {"exploit": pytest.approx((1 + 1.5 * MOST_TIMES + 2 + 1) / 10)}
    mixed = Turn(method="b", number=0, kinds=("explore", "explore", "exploit", "exploit"), costs=(2.0, 2.0, 2.0, 1.0))
    assert ratios(mixed, quiet) == {"explore": 1.0, "exploit": 0.5}  # on the same batches: 4 / 4 and 3 / 6


def test_what_is_known_is_not_measured_again(tmp_path: Path) -> None:
    costs = {"full": {"step": 2.0}, "ada": {"explore": 2.0, "exploit": 1.0}, "new": {"step": 4.0}}
    machine = FakeMachine(costs)
    known = calibrate(make(tmp_path, {"time_of": "full"}), machine)
    again = calibrate(make(tmp_path, {"time_of": "full"}), machine, known=known)
    assert len(machine.measured) == 1
    assert again.methods == known.methods
    # A new method is compared with the reference, on a machine that is twice as slow at the moment.
    slower = FakeMachine({name: {kind: 2 * cost for kind, cost in kinds.items()} for name, kinds in costs.items()})
    more = make(tmp_path, {"time_of": "full"}, full=FULL, ada=ADA, new=BLOCKS)
    found = calibrate(more, slower, known=known)
    assert slower.measured == [["full", "new"]]
    assert {name: found.methods[name] for name in known.methods} == known.methods
    assert (found.methods["new"].steps, found.budget) == (50, known.budget)


def test_a_key_that_a_calibration_does_not_know_counts_with_its_default(tmp_path: Path) -> None:
    machine = FakeMachine({"full": {"step": 2.0}, "ada": {"explore": 2.0, "exploit": 1.0}})
    suite = make(tmp_path, {"time_of": "full"})
    known = calibrate(suite, machine)
    assert known.methods["ada"].settings.pop("preset") is None
    calibrate(suite, machine, known=known)
    known.methods["ada"].settings["fraction"] = 0.9
    calibrate(suite, machine, known=known)
    assert machine.measured == [["full", "ada"], ["full", "ada"]]


def test_another_machine_or_another_reference_is_measured_anew(tmp_path: Path) -> None:
    costs = {"full": {"step": 2.0}, "ada": {"explore": 2.0, "exploit": 1.0}}
    machine = FakeMachine(costs)
    suite = make(tmp_path, {"time_of": "full"})
    known = calibrate(suite, machine)
    calibrate(suite, machine, known=known, facts={**MACHINE, "cpus": 4})
    calibrate(make(tmp_path, {"time_of": "ada"}), machine, known=known)
    assert machine.measured == [["full", "ada"], ["full", "ada"], ["ada", "full"]]
    other = Calibrator(suite, measure=machine, shared="x", machine={**MACHINE, "cpus": 4}, say=print)
    assert other.difference(known) == (
        "it was made on another machine: slow, 2 CPUs, 2 threads there, slow, 4 CPUs, 2 threads here"
    )

    # An older calibration says nothing of the instructions of its processor.
    newer = Calibrator(suite, measure=machine, shared="x", machine={**MACHINE, "instructions": "AVX2"}, say=print)
    assert newer.difference(known) is None
    known.machine["instructions"] = "AVX512"
    assert newer.difference(known) == (
        "it was made on another machine: slow with AVX512, 2 CPUs, 2 threads there, slow with AVX2, 2 CPUs, 2 threads "
        "here"
    )


@pytest.mark.parametrize(("factor", "is_said"), [(2, False), (0.5, False), (4, True), (0.25, True)])
def test_a_reference_of_quite_another_speed_is_said(factor: float, is_said: bool, tmp_path: Path) -> None:
    costs = {"full": {"step": 2.0}, "ada": {"explore": 2.0, "exploit": 1.0}, "new": {"step": 4.0}}
    known = calibrate(make(tmp_path, {"time_of": "full"}), FakeMachine(costs))
    other = FakeMachine({name: {kind: factor * cost for kind, cost in kinds.items()} for name, kinds in costs.items()})
    said: list[str] = []
    calibrate(make(tmp_path, {"time_of": "full"}, full=FULL, ada=ADA, new=BLOCKS), other, known=known, said=said)
    assert any("begin another folder" in line for line in said) == is_said


def test_a_short_turn_sees_both_kinds_of_steps(tmp_path: Path) -> None:
    suite = make(tmp_path, {"time_of": "a"}, a={"method": {**ADA["method"], "every": 50}, "rates": [1]})
    turn = turn_recipe(suite.training_recipe("a", lr=1, seed=0, output="-"), number=3, steps=11, output="x")
    own: Any = turn.method
    assert (turn.run.steps, turn.run.seed, own.explore_steps, own.epsilon_end, own.every) == (13, 3, 5, 1.0, 2)
    assert turn.data == suite.recipe.data


def test_a_kind_that_no_turn_has_seen_counts_as_the_others(tmp_path: Path) -> None:
    recipe = make(tmp_path, {"time_of": "ada"}).training_recipe("ada", lr=1, seed=0, output="-")
    known = MethodCalibration(by_kind={"exploit": {"ratio": 0.5}}, block_names=["layer.0"])  # pyright: ignore
    assert kind_shares(recipe, known, steps=100) == {"exploit": 1.0}


def test_the_budget_takes_the_place_of_the_steps_in_the_protocol(place: Path) -> None:
    plain = protocol_settings(make_suite(place))
    timed = protocol_settings(make_suite(place, budget={"seconds": 5}))
    held = protocol_settings(make_suite(place, budget={"memory": "1GiB"}))
    shared = protocol_settings(make_suite(place, budget={"time_of": "full", "share": 0.5}))
    assert held == plain
    assert plain["recipe"]["run"]["steps"] == 2
    assert "budget" not in plain
    assert "steps" not in timed["recipe"]["run"]
    assert timed["budget"] == {"seconds": 5.0, "flops": None}
    assert shared["budget"] == {"time_of": "full", "share": 0.5, "of": {"steps": 2, "epochs": None}}


def run_turns(job_file: Path, log: Path, *, worker: str, environment: Mapping[str, str]) -> None:
    """Take the turns of a calibration in this process, with costs that no clock decides."""
    assert (worker, environment) == ("turns_worker", {})
    job = TurnsJob.model_validate_json(job_file.read_text("utf-8"))
    turns_worker.main(str(job_file))
    content = json.loads(job.result.read_text("utf-8"))
    for turn in content["turns"]:
        turn["costs"] = [2.0 if turn["method"] == "full" else 1.0] * len(turn["costs"])
    job.result.write_text(json.dumps(content), "utf-8")


def with_turns_here(patch: pytest.MonkeyPatch) -> Runner:
    patch.setattr(_calibrating, "run_job", run_turns)
    # Costs that no clock decides need no more rounds.
    patch.setattr(_budget, "LEAST_ROUNDS", 1)
    patch.setattr(_budget, "LEAST_ROUND_STEPS", 2)
    return Runner(patch)


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> Runner:
    """Calibrates in this process too."""
    return with_turns_here(monkeypatch)


METHODS = {"full": {**FULL, "rates": [1e-2]}, "uniform 2": BLOCKS}


def small_suite(place: Path, budget: Mapping[str, Any], **methods: Any) -> Suite:
    budget = {**budget, "rounds": 1, "round_steps": 2}
    return make_suite(place, budget=budget, methods={**METHODS, **methods}, seeds=1, evaluations={}, forgetting=None)


@dataclass(frozen=True)
class Compared:
    """A comparison at equal time: real turns and runs; only the clock is not real.

    Attributes:
        first: what a call that only calibrates two of the methods returned, the runs and files it made, and its words.
    """

    folder: Path
    first: tuple[list[Any], list[str], list[str], str]
    summaries: list[Any]
    said: str


@pytest.fixture(scope="module")
def compared(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Compared:
    """Full fine-tuning, a method that is twice as fast, and one whose calibration fails. No test changes the folder."""
    folder = tmp_path_factory.mktemp("compared") / "results"
    with pytest.MonkeyPatch.context() as patch:
        run, suite = with_turns_here(patch), small_suite(place, {"time_of": "full"}, misfit=MISFIT)
        nothing = run(suite, folder, only=["full", "uniform 2"], calibrate_only=True)
        first = nothing, run.ran, [path.name for path in folder.glob("*.json")], run.said
        summaries = run(suite, folder)
    return Compared(folder, first, summaries, run.said)


@pytest.fixture
def folder(compared: Compared, tmp_path: Path) -> Path:
    """Its results and its calibration, to be changed."""
    return shutil.copytree(compared.folder, tmp_path / "results")


def test_a_calibration_alone_trains_nothing(compared: Compared) -> None:
    summaries, ran, names, said = compared.first
    assert (summaries, ran, names) == ([], [], ["calibration.json"])
    assert "MiB" in said
    assert "leave out --calibrate-only to begin" in said


def test_a_comparison_at_equal_time(compared: Compared) -> None:
    full, uniform, misfit = compared.summaries
    names = {path.stem for path in compared.folder.glob("*.json")}
    assert names == {"full.lr-0.01.seed-0.score", "uniform-2.lr-0.01.seed-0.score", "calibration"}
    assert [summary.results[0].content.run_info.train_config["run"]["steps"] for summary in (full, uniform)] == [2, 4]
    own = uniform.results[0].record.budget
    assert (own.steps, own.ratio, own.total, own.text, own.rounds) == (4, 0.5, 4.0, "time_of: full", 1)
    assert sum(kind.steps for kind in uniform.results[0].record.seconds.by_kind.values()) == 4
    assert misfit.results == ()
    assert [summary.steps for summary in (full, uniform)] == [2, 4]
    assert "best rate  steps " in compared.said
    assert "failed     misfit: its calibration failed: " in compared.said
    assert "count=99 is more than the 6 blocks" in compared.said


def test_nothing_is_measured_and_nothing_runs_again(place: Path, folder: Path, runner: Runner) -> None:
    calibration = read_calibration(folder)
    runner(small_suite(place, {"time_of": "full"}), folder)
    assert runner.ran == []
    assert "is used again" in runner.said
    assert calibration is not None
    assert read_calibration(folder) == calibration


def test_a_limit_of_memory_leaves_out_what_does_not_fit(place: Path, folder: Path, runner: Runner) -> None:
    calibration = read_calibration(folder)
    assert calibration is not None
    limit = {"time_of": "full", "memory": (calibration.methods["full"].bytes or 0) - 1}
    (uniform,) = runner(small_suite(place, limit), folder)
    assert uniform.steps == 4
    assert runner.ran == []
    assert "left out   full: takes " in runner.said
    assert not (folder / "full.lr-0.01.seed-0.score.json").exists()
    assert read_result(folder / "uniform-2.lr-0.01.seed-0.score.json").record.budget is not None

    # With less than anybody takes: refused, and nothing is moved.
    before = sorted(path.name for path in folder.rglob("*.json"))
    with pytest.raises(
        UsageError, match=r"too small for every method: the smallest, 'uniform 2', takes .*; write budget"
    ):
        runner(small_suite(place, {**limit, "memory": 1024}), folder)
    assert sorted(path.name for path in folder.rglob("*.json")) == before


def test_on_another_machine_it_is_refused_beside_results_unless_the_user_asks_for_it(
    place: Path, folder: Path, runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite, calibration = small_suite(place, {"time_of": "full"}), read_calibration(folder)
    assert calibration is not None
    elsewhere = {**calibration.machine, "cpus": 99}
    monkeypatch.setattr(_calibrating, "machine_facts", lambda device: elsewhere)
    with pytest.raises(UsageError, match=r"cannot be used here: it was made on another machine.*--recalibrate"):
        runner(suite, folder)
    runner(suite, folder, only=["uniform 2"], recalibrate=True)
    again = read_calibration(folder)
    assert again is not None
    assert (again.machine, runner.ran) == (elsewhere, [])


def test_a_budget_that_was_too_short_is_corrected_without_measuring_again(
    place: Path, tmp_path: Path, runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        UsageError, match=r"budget\.seconds=1 is 1 s and shorter than one step of 'full', which takes 2 s"
    ):
        runner(small_suite(place, {"seconds": 1}), tmp_path / "results", only=["full"])
    monkeypatch.setattr(_calibrating, "run_job", lambda *_, **__: "measured again")
    (full,) = runner(small_suite(place, {"seconds": 4}), tmp_path / "results", only=["full"])
    assert full.steps == 2


def test_a_calibration_that_gives_results_other_steps_is_refused_before_anything_moves(
    place: Path, folder: Path, runner: Runner
) -> None:
    suite, known = small_suite(place, {"time_of": "full"}), read_calibration(folder)
    assert known is not None
    uniform = known.methods["uniform 2"]
    kinds = {kind: cost.model_copy(update={"ratio": cost.ratio / 2}) for kind, cost in uniform.by_kind.items()}
    of_another = {**known.methods, "uniform 2": uniform.model_copy(update={"by_kind": kinds})}
    write_calibration(folder, known.model_copy(update={"methods": of_another}))
    before = {path: path.read_bytes() for path in folder.rglob("*.json")}
    for only in (["full"], []):
        with pytest.raises(UsageError, match=r"other steps than they have(.|\n)*--recalibrate(.|\n)*") as caught:
            runner(suite, folder, only=only)
        assert str(caught.value).endswith("\n  uniform 2: 4 steps then, 8 now (1 result)")
    assert {path: path.read_bytes() for path in folder.rglob("*.json")} == before

    # The user asks for it, for one method: the results of the other stay, and it is said.
    runner(suite, folder, only=["full"], recalibrate=True)
    assert "note       uniform 2: results with steps of an older calibration stay" in runner.said
    runner(suite, folder)
    assert "an older calibration" not in runner.said
    assert runner.ran == []


def test_what_another_comparison_has_measured_meanwhile_is_kept(
    place: Path, folder: Path, runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two calls with other methods into one folder: the second waits for the lock, and finds what the first wrote."""
    suite, known = small_suite(place, {"time_of": "full"}), read_calibration(folder)
    assert known is not None
    # Three times as slow as what the second measures.
    slow = {"methods": {"full": known.methods["full"]}, "reference_rounds": [6.0], "reference_cost": 6.0}
    first = allot(suite, known.model_copy(update=slow), ["full"])
    (folder / CALIBRATION).unlink()

    @contextmanager
    def late(root: Path, *, name: str) -> Iterator[None]:
        write_calibration(root, first)
        yield

    monkeypatch.setattr(_calibrating, "locked", late)
    runner(suite, folder, only=["uniform 2"])
    both = read_calibration(folder)
    assert both is not None
    assert (both.methods["full"], both.budget) == (first.methods["full"], first.budget)
    assert (both.budget, both.methods["uniform 2"].steps) == (12.0, 4)
    assert runner.ran == []


def test_a_calibration_has_one_accelerator_of_several(
    place: Path, tmp_path: Path, runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that sees several refuses to train."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")

    def measure(job_file: Path, log: Path, *, environment: Mapping[str, str], **_: Any) -> str:
        log.touch()
        return f"it has {environment}"

    monkeypatch.setattr(_calibrating, "run_job", measure)
    with pytest.raises(UsageError, match=r"the calibration failed: it has .'CUDA_VISIBLE_DEVICES': '5'.\n"):
        runner(small_suite(place, {"time_of": "full"}), tmp_path / "results", side_by_side=SideBySide(2, device="auto"))


def test_a_process_that_is_ended_names_the_method_whose_turn_it_was(
    place: Path, tmp_path: Path, runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(job_file: Path, log: Path, **_: Any) -> str:
        log.write_text(f"{TURN_OF}full\nLoading weights\n{TURN_OF}uniform 2\nLoading weights\n", "utf-8")
        return "the process was ended by signal 9"

    monkeypatch.setattr(_calibrating, "run_job", killed)
    with pytest.raises(UsageError, match="the calibration failed at the turn of 'uniform 2': the process was ended by"):
        runner(small_suite(place, {"time_of": "full"}), tmp_path / "results")
    assert read_calibration(tmp_path / "results") is None


def test_a_method_that_breaks_does_not_end_the_calibration_of_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measure(recipe: Any, *, method: str, number: int, **_: Any) -> Turn:
        if method == "ada":
            raise RuntimeError("no kernel for this shape\nat line 3")
        return Turn(method=method, number=number, kinds=("step",), costs=(1.0,))

    monkeypatch.setattr(turns_worker, "measure_turn", measure)
    suite = make(tmp_path, {"time_of": "full"})
    recipes = {name: suite.training_recipe(name, lr=1, seed=0, output="-") for name in suite.methods}
    job = TurnsJob(recipes=recipes, first=0, rounds=2, steps=2, result=tmp_path / "turns.json")
    turns = list(turns_worker.take_turns(job))
    assert [(turn.method, turn.error) for turn in turns] == [
        ("full", ""),
        ("ada", "RuntimeError: no kernel for this shape"),
        ("full", ""),
    ]
    said = capsys.readouterr()
    assert said.out.splitlines() == [f"{TURN_OF}full", f"{TURN_OF}ada", f"{TURN_OF}full"]
    assert "at line 3" in said.err


@pytest.mark.parametrize(("device", "num_turns"), [("auto", 3), ("cpu", 2)])
def test_on_an_accelerator_the_first_turn_of_each_method_is_not_counted(
    device: str, num_turns: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It page-locks host memory and loads kernels; a method that fails in it has no turn any more."""
    taken: list[tuple[str, int]] = []

    def measure(recipe: Any, *, method: str, number: int, **_: Any) -> Turn:
        taken.append((method, number))
        if method == "ada":
            raise RuntimeError("no kernel for this shape")
        return Turn(method=method, number=number, kinds=("step",), costs=(float(len(taken)),))

    monkeypatch.setattr(turns_worker, "measure_turn", measure)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    suite, run = make(tmp_path, {"time_of": "full"}), {"device": device}
    recipes = {name: suite.training_recipe(name, lr=1, seed=0, output="-") for name in suite.methods}
    recipes = {
        name: recipe.model_copy(update={"run": recipe.run.model_copy(update=run)}) for name, recipe in recipes.items()
    }
    job = TurnsJob(recipes=recipes, first=4, rounds=2, steps=2, result=tmp_path / "turns.json")
    turns = list(turns_worker.take_turns(job))
    assert [number for method, number in taken if method == "full"] == [4, 4, 5][-num_turns:]
    assert [turn.number for turn in turns if turn.method == "full"] == [4, 5]
    assert [turn.error for turn in turns if turn.method == "ada"] == ["RuntimeError: no kernel for this shape"]


def test_the_memory_of_a_turn_that_failed_is_free_in_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU it counted as that of the next method."""

    class Trainer:
        def __init__(self) -> None:
            self.itself = self

    left: list[weakref.ref[Trainer]] = []

    def measure(_: Any, *, method: str, number: int, **__: Any) -> Turn:
        if not left:
            trainer = Trainer()
            left.append(weakref.ref(trainer))
            raise torch.OutOfMemoryError("CUDA out of memory")
        assert left[0]() is None
        return Turn(method=method, number=number, kinds=("step",), costs=(1.0,))

    monkeypatch.setattr(_turn, "_measure", measure)
    suite = make(tmp_path, {"time_of": "full"})
    recipes = {name: suite.training_recipe(name, lr=1, seed=0, output="-") for name in ("full", "ada")}
    job = TurnsJob(recipes=recipes, first=0, rounds=1, steps=2, result=tmp_path / "turns.json")
    gc.disable()
    try:
        failed, taken = turns_worker.take_turns(job)
    finally:
        gc.enable()
    assert (failed.error, taken.error) == ("out of memory: CUDA out of memory", "")


def test_state_that_a_run_on_the_cpu_adds_counts_on_a_machine_with_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """`Offload()` copies nothing there, so all of its state lies in the memory that the budget limits."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    model = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(3)))
    options = {"blocks": gs.partition(model), "policy": gs.Cyclic(every=1), "always": ()}
    optimizer = gs.BlockOptimizer(model, options["policy"], lr=1e-2, residency=gs.Offload())
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    assert _growth(model, optimizer, options) == 2 * 8 * (16 + 4)


def test_recalibrating_needs_a_budget(place: Path, tmp_path: Path, runner: Runner) -> None:
    with pytest.raises(UsageError, match=r"--recalibrate: the suite 'sums' has no budget"):
        runner(make_suite(place), tmp_path / "results", recalibrate=True)
    with pytest.raises(UsageError, match=r"--calibrate-only: .*or write e.g. budget.time_of=full"):
        runner(make_suite(place), tmp_path / "results", calibrate_only=True)


def test_flops_are_counted_and_not_timed(place: Path, tmp_path: Path) -> None:
    """The last layers alone cost less than all: by torch's counter, without a clock."""
    methods = {"full": FULL, "last": {"method": {"name": "last", "count": 1}, "rates": [1e-2]}}
    suite = make_suite(place, methods=methods, budget={"flops": 1e9})
    recipes = {name: suite.training_recipe(name, lr=1e-2, seed=0, output="-") for name in methods}
    job = TurnsJob(recipes=recipes, first=0, rounds=1, steps=2, count_flops=True, result=tmp_path / "turns.json")
    full, last = sorted(turns_worker.take_turns(job), key=lambda turn: turn.method)
    assert len(full.costs) == len(last.costs) == 2
    assert all(cost == round(cost) and cost > 1e5 for cost in full.costs)
    assert all(part < 0.8 * whole for part, whole in zip(last.costs, full.costs, strict=True))
