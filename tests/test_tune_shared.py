"""Studies of several processes, trials that cannot fit the memory, CMA-ES."""

import itertools
import json
import math
import sqlite3
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import optuna
import pytest
from train_fixtures import parse, quiet
from tune_support import closing_connections, stored_study

from gradselect import UsageError
from gradselect.app.recipe_planning import RecipePlanner
from gradselect.app.runtime import Memory
from gradselect.app.tune import memory_check as _memory
from gradselect.app.tune import proposals as _proposals
from gradselect.app.tune import search_loop as _tune
from gradselect.app.tune import study_folder as _folder
from gradselect.app.tune import trial as _trial
from gradselect.app.tune import tune
from gradselect.app.tune.proposals import CmaEsSampler, _place, _value, next_trial
from gradselect.app.tune.ranges import SearchRange, read_ranges, with_values
from gradselect.app.tune.search_loop import SearchOptions, search
from gradselect.app.tune.study import ended
from gradselect.app.tune.study_folder import StudyFolder
from gradselect.files import is_owned, owned

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")
RATES = ["optimizer.lr=1e-4:1:log"]


@pytest.fixture
def recipe(place, tmp_path):
    return parse(place, data={"validation": 0.25}, run={"steps": 4, "output": str(tmp_path / "out")})


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(_tune, "WAIT_SECONDS", 0.01)


@pytest.fixture(autouse=True)
def connections():
    with closing_connections():
        yield


def by(loss_of, seen=None):
    """Trials whose loss is a function of the recipe, instead of training."""

    def carry_out(recipe, trial, *, folder, stages):
        if seen is not None:
            seen.append(recipe)
        loss = loss_of(recipe)
        trial.report(loss, 4)
        return _trial.Outcome(end="finished", loss=loss)

    return carry_out


def rates(result):
    return [trial.values["optimizer.lr"] for trial in result.trials]


# several processes ------------------------------------------------------------------------------------------


@pytest.fixture
def without_models(monkeypatch):
    """No model is loaded or planned. In threads it must not be: transformers loads one at a time in a process."""

    class Fits:
        note = ""

        def __init__(self, recipe, *, limit):
            pass

        def complaint(self, recipe):
            return ""

    def describe(recipe, options, *, stages):
        parts = {"recipe": recipe.model_dump(mode="json"), "model": {}, "data": {}}
        return {**parts, "search": [], "seed": 0, "sampler": "tpe"}

    monkeypatch.setattr(_tune, "MemoryCheck", Fits)
    monkeypatch.setattr(_tune, "_describe", describe)


def work(recipe, folder, *, num_trials):
    options = SearchOptions(ranges=read_ranges(RATES, recipe), num_trials=num_trials, seed=0)
    return search(recipe, folder=StudyFolder(folder), options=options, console=quiet())


def test_ownership_ends_with_the_process_that_has_it(tmp_path):
    path = tmp_path / "running" / "0"
    code = "import filelock, sys; f = filelock.FileLock(sys.argv[1]); f.acquire(); print('has it', flush=True); input()"
    with owned(path):
        assert is_owned(path)
    assert not is_owned(path)
    path.parent.mkdir(exist_ok=True)
    other = subprocess.Popen([sys.executable, "-c", code, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with other:
        assert other.stdout.readline() == b"has it\n"
        assert is_owned(path)
        other.kill()
    assert path.exists()
    assert not is_owned(path)


@pytest.mark.usefixtures("without_models")
def test_two_workers_share_the_trials_of_one_study(recipe, tmp_path, monkeypatch):
    """Both are in a trial at once, none carries out another's, and both return the same."""
    together, carried_out = threading.Barrier(2, timeout=60), []

    def carry_out(recipe, trial, *, folder, stages):
        carried_out.append((threading.get_ident(), trial.number))
        if trial.number in (0, 1):
            together.wait()
        trial.report(recipe.optimizer.lr, 4)
        return _trial.Outcome(end="finished", loss=recipe.optimizer.lr)

    monkeypatch.setattr(_tune, "carry_out", carry_out)
    with ThreadPoolExecutor(2) as pool:
        workers = [pool.submit(work, recipe, tmp_path / "study", num_trials=5) for _ in range(2)]
        faults = [fault for worker in workers if (fault := worker.exception()) is not None]
        assert not [fault for fault in faults if not isinstance(fault, threading.BrokenBarrierError)]
        first, second = (worker.result() for worker in workers)
    assert sorted(number for _, number in carried_out) == list(range(5))
    assert len({worker for worker, _ in carried_out}) == 2
    assert first == second
    assert not any((tmp_path / "study" / "running").iterdir())
    monkeypatch.setattr(_tune, "carry_out", by(lambda recipe: recipe.optimizer.lr))
    alone = work(recipe, tmp_path / "alone", num_trials=5)
    assert sorted(rates(first)) == sorted(rates(alone))  # the first five draws know nothing of other trials


@pytest.mark.usefixtures("without_models")
def test_a_trial_whose_process_dies_is_carried_out_by_another(recipe, tmp_path, monkeypatch):
    begun, waits, said = threading.Event(), threading.Event(), []

    def dies(recipe, trial, *, folder, stages):
        begun.set()
        stages.say = lambda *lines: said.extend(lines)
        assert waits.wait(60)
        raise KeyboardInterrupt

    def wait(worker, num_running):
        assert num_running == 1
        waits.set()

    monkeypatch.setattr(_tune, "carry_out", dies)
    monkeypatch.setattr(_tune._Worker, "_wait", wait)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(work, recipe, tmp_path / "study", num_trials=1)
        assert begun.wait(60)
        monkeypatch.setattr(_tune, "carry_out", by(lambda recipe: recipe.optimizer.lr))
        second = pool.submit(work, recipe, tmp_path / "study", num_trials=1)
        with pytest.raises(KeyboardInterrupt):
            first.result()
        result = second.result()
    assert [(trial.number, trial.values) for trial in result.trials] == [(1, {"optimizer.lr": recipe.optimizer.lr})]


@pytest.mark.usefixtures("without_models")
def test_a_process_of_an_older_version_that_locks_the_study_is_named(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(_folder, "TURN_SECONDS", 0.05)
    monkeypatch.setattr(_tune, "carry_out", by(lambda recipe: 1.0))
    work(recipe, tmp_path / "study", num_trials=1)
    in_use = pytest.raises(UsageError, match=r"--study=.*study is in use by process \d+ on ")
    with StudyFolder(tmp_path / "study").turn(), in_use:
        work(recipe, tmp_path / "study", num_trials=2)
    assert len(work(recipe, tmp_path / "study", num_trials=2).trials) == 2


@pytest.mark.usefixtures("without_models")
def test_a_study_of_an_older_version_goes_on_as_it_would_have(recipe, tmp_path, monkeypatch):
    """Such a study knows no sampler and no numbers of draws."""
    monkeypatch.setattr(_tune, "carry_out", by(lambda recipe: recipe.optimizer.lr))
    whole = work(recipe, tmp_path / "whole", num_trials=6)
    work(recipe, tmp_path / "old", num_trials=2)
    description = json.loads((tmp_path / "old" / "study.json").read_text())
    assert description.pop("sampler") == "tpe"
    (tmp_path / "old" / "study.json").write_text(json.dumps(description))
    with sqlite3.connect(tmp_path / "old" / "trials.db") as database:
        assert database.execute("DELETE FROM trial_user_attributes WHERE key = 'draw'").rowcount == 2
    database.close()
    assert rates(work(recipe, tmp_path / "old", num_trials=6)) == rates(whole)


# memory -----------------------------------------------------------------------------------------------------


def test_a_trial_that_cannot_fit_is_vetoed_with_numbers_and_does_not_count(recipe, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(_tune, "carry_out", by(lambda recipe: 1.0 / recipe.run.batch_size, seen))
    planner, larger = RecipePlanner(), with_values(recipe, {"run.batch_size": 8}, source="test")
    limit = (planner.plan(recipe).peak_bytes + planner.plan(larger).peak_bytes) // 2
    result = tune(
        recipe,
        study=tmp_path / "study",
        num_trials=3,
        search=["run.batch_size=2:14"],
        fit=limit,
        console=quiet(),
    )
    vetoed = [trial for trial in result.trials if trial.end == "vetoed"]
    assert vetoed
    assert len(result.trials) - len(vetoed) == 3 == len(seen)
    assert max(recipe.run.batch_size for recipe in seen) < 8 <= min(trial.values["run.batch_size"] for trial in vetoed)
    assert "its planned peak is " in vetoed[0].reason
    assert " of --fit" in vetoed[0].reason
    with stored_study(tmp_path / "study") as study:
        kept = study.trials[vetoed[0].number]
    assert (kept.state.name, kept.user_attrs["reason"]) == ("PRUNED", vetoed[0].reason)
    assert not (tmp_path / "study" / "trials" / str(kept.number)).exists()


def test_where_nothing_fits_the_search_ends_with_advice(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(_tune, "carry_out", by(lambda recipe: 1.0))
    monkeypatch.setattr(_tune, "MOST_VETOES", 3)
    with pytest.raises(UsageError, match="the last 3 proposals cannot fit; search smaller values"):
        tune(recipe, study=tmp_path / "study", num_trials=1, search=RATES, fit=1000, console=quiet())
    # The vetoes of that call do not end one with more memory.
    found = tune(recipe, study=tmp_path / "study", num_trials=1, search=RATES, fit=10**12, console=quiet())
    assert [trial.end for trial in found.trials] == ["vetoed"] * 3 + ["finished"]


def test_the_machine_s_own_memory_is_the_limit_without_fit(recipe, monkeypatch):
    check = _memory.MemoryCheck(recipe, limit=None)
    assert check.complaint(recipe) == check.note == ""
    monkeypatch.setattr(_memory, "device_memory", lambda device: Memory(name="this machine's memory", num_bytes=1000))
    assert "more than the 1000 B of this machine's memory" in _memory.MemoryCheck(recipe, limit=None).complaint(recipe)


def test_a_recipe_without_a_plan_is_searched_and_it_is_said_but_not_with_fit(place, tmp_path):
    recipe = parse(place, data={"validation": 0.25}, method={"name": "sparsegrad"})
    check = _memory.MemoryCheck(recipe, limit=None)
    assert check.complaint(recipe) == ""
    assert "no trial is checked for its memory" in check.note
    with pytest.raises(UsageError, match=r"--fit needs a plan of the trials: method\.name=sparsegrad"):
        _memory.MemoryCheck(recipe, limit=10**9)


# CMA-ES -----------------------------------------------------------------------------------------------------


def test_a_sampler_that_is_not_there_is_refused(recipe, tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="--sampler 'cma': there is no such sampler; write tpe or cmaes"):
        tune(recipe, study=tmp_path / "study", sampler="cma", console=quiet())
    monkeypatch.setattr(_proposals, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="needs the package cmaes; run: pip install cmaes"):
        tune(recipe, study=tmp_path / "study", sampler="cmaes", console=quiet())
    assert not (tmp_path / "study").exists()


def test_a_study_keeps_its_sampler(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(_tune, "carry_out", by(lambda recipe: 1.0))
    tune(recipe, study=tmp_path / "study", num_trials=1, search=RATES, console=quiet())
    with pytest.raises(UsageError, match="--sampler: 'tpe' then, 'cmaes' now"):
        tune(recipe, study=tmp_path / "study", num_trials=2, search=RATES, sampler="cmaes", console=quiet())


def test_every_value_of_a_range_has_its_place():
    whole = SearchRange(key="n", low=2, high=5, whole=True)
    assert [_value(whole, place) for place in (0.0, 0.2499, 0.2501, 0.99, 1.0)] == [2, 2, 3, 5, 5]
    log, plain = SearchRange(key="lr", low=1e-5, high=1e-2, log=True), SearchRange(key="x", low=-1.0, high=3.0)
    for searched in (whole, log, plain):
        for place in (0.0, 0.1, 0.5, 1.0):
            value = _value(searched, place)
            assert searched.low <= value <= searched.high
            assert _value(searched, _place(searched, value)) == pytest.approx(value)


def test_cma_es_comes_closer_from_generation_to_generation_interrupted_or_not():
    ranges = [
        SearchRange(key="lr", low=1e-4, high=1.0, log=True),
        SearchRange(key="size", low=1, high=16, whole=True),
        SearchRange(key="x", low=-1.0, high=1.0),
    ]

    def study_of(num_trials, *, interrupted=()):
        study = optuna.create_study(direction="minimize")
        while (number := len(ended(study))) < num_trials:
            trial = next_trial(study, ranges, own={"lr": 1e-3, "size": 3, "x": 0.0}, seed=1, sampler="cmaes")
            if number in interrupted:
                interrupted = [other for other in interrupted if other != number]
                study.tell(trial, state=optuna.trial.TrialState.FAIL)
                continue
            trial.set_user_attr("end", "finished")
            lr, size, x = (trial.params[searched.key] for searched in ranges)
            study.tell(trial, abs(math.log10(lr) + 1.5) + abs(size - 10) / 5 + abs(x - 0.4))
        return ended(study)

    size, trials = 7, study_of(64)  # 4 + floor(3 ln 3)
    assert trials[0].params == {"lr": 1e-3, "size": 3, "x": 0.0}
    losses = [trial.value for trial in trials[1:]]
    means = [sum(losses[start : start + size]) / size for start in range(0, 63, size)]
    assert means[-1] < means[0] / 4
    generations = [trial.user_attrs.get("generation") for trial in trials]
    assert generations == [None, *(number // size for number in range(63))]
    assert all(isinstance(trial.params["size"], int) for trial in trials)
    broken = study_of(20, interrupted=[0, 5, 15])
    assert [trial.params for trial in broken] == [trial.params for trial in trials[:20]]


def test_a_generation_is_told_its_first_trials_by_rank_pruned_ones_last():
    """Twin: the same points told to the package by hand."""
    import cmaes
    import numpy as np

    ranges = [SearchRange(key="x", low=0.0, high=1.0), SearchRange(key="y", low=0.0, high=1.0)]
    study = optuna.create_study(direction="minimize")
    points = [(number / 10, 1 - number / 20) for number in range(9)]
    distributions = {searched.key: _proposals._distribution(searched) for searched in ranges}
    for number, point in enumerate(points):
        end = {1: "pruned", 2: "vetoed"}.get(number, "finished")
        study.add_trial(
            optuna.trial.create_trial(
                state=optuna.trial.TrialState.COMPLETE if end == "finished" else optuna.trial.TrialState.PRUNED,
                value=float(-number) if end == "finished" else None,
                intermediate_values={1: -99.0} if end == "pruned" else {},
                params=dict(zip("xy", point, strict=True)),
                distributions=distributions,
                user_attrs={"end": end, "generation": 0},
            )
        )
    sampler = CmaEsSampler(ranges, own={"x": 0.5, "y": None}, seed=7)
    proposal = sampler.sample_relative(study, study.trials[0], {})
    told = [0, 1, 3, 4, 5, 6]  # the first six without the vetoed one; the other two come too late
    order = [6, 5, 4, 3, 0, 1]  # by loss, then the pruned one
    assert sorted(order) == told
    twin = cmaes.CMA(mean=np.array([0.5, 0.5]), sigma=1 / 6, bounds=np.array([[0.0, 1.0]] * 2), seed=7)
    twin.tell([(np.array(points[number]), float(rank)) for rank, number in enumerate(order)])
    assert sampler.generation == 1
    assert list(proposal.values()) == pytest.approx(twin.ask().tolist())


def test_draws_of_trials_that_run_at_once_have_different_numbers():
    class Trial:
        def __init__(self, draw):
            self.user_attrs = {} if draw is None else {"draw": draw}

    free = _proposals._free_draw
    assert free([], []) == 0
    assert free([Trial(None), Trial(None)], []) == 2
    assert free([Trial(0), Trial(2)], [Trial(1)]) == 3
    assert free([Trial(0), Trial(2)], []) == 1  # left by a trial that was interrupted
    for alive in itertools.permutations([Trial(0), Trial(1), Trial(2)], 2):
        assert free([], alive) not in {trial.user_attrs["draw"] for trial in alive}
