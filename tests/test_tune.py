"""The search proposes the same whether interrupted or not, compares like with like, and ends in a recipe."""

import gc
import json
import re
import sqlite3
import weakref
from contextlib import closing

import optuna
import pytest
import torch
import yaml
from answer_support import prompt_recipe
from train_fixtures import ADAGRADSELECT, parse, quiet, write_recipe, write_sums
from tune_support import closing_connections, stored_study

from gradselect import UsageError
from gradselect.app import cli
from gradselect.app.recipe import load_recipe
from gradselect.app.train import train
from gradselect.app.tune import search_loop as _tune
from gradselect.app.tune import trial as _trial
from gradselect.app.tune import tune
from gradselect.app.tune.ranges import SearchRange, read_ranges, usual_ranges
from gradselect.app.tune.trial_table import TrialSummary, edge_notes

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")
SHORT = {"steps": 4, "evaluate_every": 1}
RATES = ["optimizer.lr=1e-4:1:log"]


@pytest.fixture
def recipe(place, tmp_path):
    return parse(place, data={"validation": 0.25}, run={**SHORT, "output": str(tmp_path / "out")})


@pytest.fixture(autouse=True)
def connections():
    with closing_connections():
        yield


def scripted(losses):
    """Trials that report these losses, one list for each, instead of training; asks the study as the real one does."""
    script = iter(losses)

    def carry_out(recipe, trial, *, folder, stages):
        for step, loss in enumerate(next(script), start=1):
            trial.report(loss, step)
            if trial.should_prune():
                return _trial.Outcome(end="pruned")
        return _trial.Outcome(end="finished", loss=loss)

    return carry_out


def tried(result):
    return [trial.values for trial in result.trials]


# what is searched -------------------------------------------------------------------------------------------


def test_the_usual_ranges_are_the_rate_and_what_the_method_has(place):
    plain, ours, counted = (
        {searched.key: searched for searched in usual_ranges(parse(place, method=method))}
        for method in ({"name": "full"}, ADAGRADSELECT, {"name": "adagradselect", "count": 2})
    )
    assert list(plain) == ["optimizer.lr"]
    assert (plain["optimizer.lr"].low, plain["optimizer.lr"].high) == pytest.approx((1e-3, 1e-1))
    assert list(ours) == ["optimizer.lr", "method.fraction", "method.delta"]
    assert ours["method.fraction"].high == 0.8
    assert list(counted) == ["optimizer.lr", "method.delta"]
    assert [str(searched) for searched in read_ranges((), parse(place))] == [str(plain["optimizer.lr"])]


def test_ranges_are_shown_without_digits_of_rounding_and_kept_with_them():
    searched = SearchRange(key="optimizer.lr", low=5e-8, high=5e-7 * 10, log=True)
    assert str(searched) == "optimizer.lr=5e-08:5e-06:log"
    assert searched.exact == "optimizer.lr=5e-08:4.9999999999999996e-06:log"


def test_a_fraction_is_never_searched_above_the_whole(place):
    ranges = usual_ranges(parse(place, method={"name": "adagradselect", "fraction": 0.7}))
    assert next(searched for searched in ranges if searched.key == "method.fraction").high == 1.0


def test_whole_numbers_stay_whole_and_floats_do_not(place):
    lora = parse(place, method={"name": "lora"})
    (rank,) = read_ranges(["method.rank=2:8"], lora)
    (alpha,) = read_ranges(["method.alpha=2:8"], lora)
    (dropout,) = read_ranges(["optimizer.warmup=0:1"], lora)
    assert (rank.whole, alpha.whole, dropout.whole) == (True, True, False)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("optimizer.lr", "is no range"),
        ("optimizer.lr=1e-4", "is no range"),
        ("optimizer.lr=1e-4:1e-3:exp", "is no range"),
        ("optimizer.lr=1e-4:many", "'many' is no number"),
        ("optimizer.lr=1e-3:1e-4", "LOW must be a number below HIGH"),
        ("optimizer.lr=nan:1", "LOW must be a number below HIGH"),
        ("optimizer.weight_decay=0:1:log", "LOW above 0"),
        ("optimizer.lrr=1e-4:1e-3", "did you mean 'optimizer.lr'?"),
        ("optimizer.schedule=1:2", "no number at 'optimizer.schedule'"),
        ("method.fraction=0.5:2", "fraction"),
        ("data.limit=4:8", "decides what a trial is measured on"),
        ("run.seed=0:8", "decides what a trial is measured on"),
    ],
)
def test_a_range_that_does_not_fit_is_refused_before_anything_runs(place, text, complaint):
    with pytest.raises(UsageError, match="--search") as caught:
        read_ranges([text], parse(place, data={"validation": 0.25}, method=ADAGRADSELECT))
    assert complaint in str(caught.value)


def test_one_key_has_one_range(place):
    with pytest.raises(UsageError, match="stands twice"):
        read_ranges(["optimizer.lr=1e-4:1e-3", "optimizer.lr=1e-5:1e-3"], parse(place))


# the course of a search -------------------------------------------------------------------------------------


def test_an_interrupted_search_goes_on_as_if_it_had_not_been(recipe, tmp_path, monkeypatch):
    losses = [[3.0], [2.0], [1.0], [4.0], [5.0], [0.5]]
    monkeypatch.setattr(_tune, "carry_out", scripted(losses))
    whole = tune(recipe, study=tmp_path / "whole", num_trials=6, search=RATES, console=quiet())

    def broken(*_, **__):
        raise KeyboardInterrupt

    halves = tmp_path / "halves"
    for first, number in ((0, 1), (1, 5)):
        monkeypatch.setattr(_tune, "carry_out", scripted(losses[first:]))
        tune(recipe, study=halves, num_trials=number, search=RATES, console=quiet())
        monkeypatch.setattr(_tune, "carry_out", broken)
        with pytest.raises(KeyboardInterrupt):
            tune(recipe, study=halves, num_trials=number + 1, search=RATES, console=quiet())
    monkeypatch.setattr(_tune, "carry_out", scripted(losses[5:]))
    resumed = tune(recipe, study=halves, num_trials=6, search=RATES, console=quiet())
    assert tried(resumed) == tried(whole)
    assert len({values["optimizer.lr"] for values in tried(whole)}) == 6
    assert resumed.best.loss == whole.best.loss == 0.5


def test_the_first_trial_has_the_recipe_s_own_values_and_the_seed_decides_the_rest(recipe, tmp_path, monkeypatch):
    def values(seed, search=RATES):
        monkeypatch.setattr(_tune, "carry_out", scripted([[1.0]] * 2))
        folder = tmp_path / f"{seed}{search}".replace("/", " ")
        return tried(tune(recipe, study=folder, num_trials=2, search=search, seed=seed, console=quiet()))

    first, other, outside = values(0), values(1), values(0, ["optimizer.lr=1e-6:1e-4"])
    assert first[0] == other[0] == {"optimizer.lr": recipe.optimizer.lr}
    assert first[1] != other[1]
    assert outside[0]["optimizer.lr"] <= 1e-4


def test_what_is_worse_than_the_median_is_pruned_and_recorded(recipe, tmp_path, monkeypatch):
    losses = [[3.0 + n / 10, 2.0] for n in range(5)] + [[9.0, 0.1], [2.9, 1.0]]
    monkeypatch.setattr(_tune, "carry_out", scripted(losses))
    result = tune(recipe, study=tmp_path / "study", num_trials=7, search=RATES, console=quiet())
    assert [trial.end for trial in result.trials] == [*["finished"] * 5, "pruned", "finished"]
    assert (result.trials[5].loss, result.trials[5].step) == (9.0, 1)
    assert result.best is result.trials[6]


def test_a_study_with_enough_trials_trains_nothing(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(_tune, "carry_out", scripted([[1.0], [2.0]]))
    for _ in range(2):
        result = tune(recipe, study=tmp_path / "study", num_trials=2, search=RATES, console=quiet())
    assert len(result.trials) == 2


@pytest.mark.parametrize("change", ["rate", "ranges", "seed", "evaluations", "data"])
def test_another_search_is_refused_with_what_differs(place, recipe, tmp_path, monkeypatch, change):
    study = tmp_path / "study"
    monkeypatch.setattr(_tune, "carry_out", scripted([[1.0]]))
    tune(recipe, study=study, num_trials=1, search=RATES, console=quiet())
    sections = {"data": {"validation": 0.25}, "run": {**SHORT, "output": "elsewhere"}}
    options = {"search": RATES, "seed": 0}
    named = {
        "rate": "optimizer.lr: 0.01 then, 0.02 now",
        "ranges": "--search",
        "seed": "--seed: 0 then, 1 now",
        "evaluations": "run.evaluate_every: 1 then, 2 now",
        "data": "data.train.",
    }
    match change:
        case "rate":
            sections["optimizer"] = {"lr": 2e-2}
        case "ranges":
            options["search"] = ["optimizer.lr=1e-4:2:log"]
        case "seed":
            options["seed"] = 1
        case "evaluations":
            sections["run"]["evaluate_every"] = 2
        case "data":
            sections["data"]["path"] = str(write_sums(tmp_path / "others.jsonl", rows=25))
    with pytest.raises(UsageError, match="another one") as caught:
        tune(parse(place, **sections), study=study, num_trials=2, console=quiet(), **options)
    assert named[change] in str(caught.value)


def test_a_folder_with_something_else_is_left_alone(recipe, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="holds no study"):
        tune(recipe, study=tmp_path, num_trials=1, console=quiet())
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_damaged_file_of_trials_is_refused_and_left_alone(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(_tune, "carry_out", scripted([[1.0]]))
    tune(recipe, study=tmp_path / "study", num_trials=1, search=RATES, console=quiet())
    (tmp_path / "study" / "trials.db").write_bytes(b"cut off" * 100)
    with pytest.raises(
        UsageError, match=r"trials\.db cannot be read \(file is not a database\); choose another --study"
    ):
        tune(recipe, study=tmp_path / "study", num_trials=2, search=RATES, console=quiet())
    assert (tmp_path / "study" / "trials.db").read_bytes() == b"cut off" * 100


def test_trials_of_another_optuna_are_refused_and_left_alone(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(_tune, "carry_out", scripted([[1.0]]))
    tune(recipe, study=tmp_path / "study", num_trials=1, search=RATES, console=quiet())
    trials = tmp_path / "study" / "trials.db"
    with closing(sqlite3.connect(trials)) as connection, connection:
        connection.execute("UPDATE alembic_version SET version_num = 'v2.6.0.a'")
    before = trials.read_bytes()
    with pytest.raises(UsageError, match=r"schema v2\.6\.0\.a of another version of Optuna.*optuna storage upgrade"):
        tune(recipe, study=tmp_path / "study", num_trials=2, search=RATES, console=quiet())
    assert trials.read_bytes() == before


@pytest.mark.parametrize("where", ["opening", "trial"])
def test_an_error_leaves_no_connection_open(recipe, tmp_path, monkeypatch, where):
    def fails(*args, **options):
        options.get("storage") and options["storage"].get_all_studies()
        raise KeyboardInterrupt

    if where == "opening":
        monkeypatch.setattr(optuna, "create_study", fails)
    else:
        monkeypatch.setattr(_tune, "carry_out", fails)
    with pytest.raises(KeyboardInterrupt):
        tune(recipe, study=tmp_path / "study", num_trials=1, search=RATES, console=quiet())


def test_without_validation_examples_there_is_nothing_to_compare(place, tmp_path):
    with pytest.raises(UsageError, match=r"data\.validation=0\.05"):
        tune(parse(place), study=tmp_path / "study", console=quiet())
    assert not (tmp_path / "study").exists()


def test_trials_of_drawn_answers_are_refused(place, tmp_path):
    """The loss on held-out prompts says nothing of how good the answers are."""
    recipe = prompt_recipe(place, tmp_path / "out", data={"validation": 0.25})
    with pytest.raises(UsageError, match=r"trainer\.name=grpo says nothing of how good .* `gradselect evaluate`"):
        tune(recipe, study=tmp_path / "study", console=quiet())
    assert not (tmp_path / "study").exists()


def test_a_best_value_at_an_edge_is_said():
    best = TrialSummary(number=0, values={"a": 9.8, "b": 5.0}, end="finished", loss=1.0, step=1, seconds=1.0, reason="")
    low, middle = SearchRange(key="a", low=9.7, high=99.0, log=True), SearchRange(key="b", low=1, high=9)
    assert [note.partition(":")[0] for note in edge_notes(best, [low, middle])] == [
        "the best a, 9.8, lies at the lower edge of --search a=9.7"
    ]


# real trials ------------------------------------------------------------------------------------------------


def test_a_trial_trains_as_the_recipe_it_leaves_and_nothing_of_it_stays(place, recipe, tmp_path, monkeypatch):
    models = list[weakref.ref]()
    build = _trial.build_trainer

    def watched(*args, **options):
        trainer = build(*args, **options)
        models.append(weakref.ref(trainer.model))
        return trainer

    monkeypatch.setattr(_trial, "build_trainer", watched)
    monkeypatch.setattr(_trial, "_free_memory", lambda: gc.collect())
    study = tmp_path / "study"
    result = tune(recipe, study=study, num_trials=2, search=["optimizer.lr=0.01:1e30"], console=quiet())
    assert [model() for model in models] == [None, None]
    assert [trial.end for trial in result.trials] == ["finished", "stopped"]
    assert "nan" in result.trials[1].reason or "inf" in result.trials[1].reason
    assert result.path == study / "best.yaml"
    assert load_recipe(result.path) == result.recipe
    trained = train(load_recipe(study / "trials" / "0" / "recipe.yaml"), console=quiet())
    run = json.loads((trained / "run.json").read_text())
    assert run["validation_loss"] == result.best.loss
    assert not list((study / "trials" / "0").glob("**/checkpoints/*"))
    with stored_study(study) as stored:
        assert len(stored.trials) == 2


class _Full:
    """Stands for a function that runs out of memory in its second call."""

    def __init__(self, function, error):
        self.function, self.error, self.calls = function, error, 0

    def __call__(self, *args, **options):
        self.calls += 1
        if self.calls == 2:
            raise self.error
        return self.function(*args, **options)


MEMORY_ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
    MemoryError(),
]


@pytest.mark.parametrize("error", MEMORY_ERRORS, ids=["device", "host", "python"])
@pytest.mark.parametrize("where", ["read_inputs", "build_trainer", "_end_of_training"])
def test_a_trial_that_runs_out_of_memory_is_stopped_and_the_next_one_starts(
    recipe, tmp_path, monkeypatch, where, error
):
    """While it was built, the device's memory ended the search; the host's did so at any time."""
    monkeypatch.setattr(_trial, where, _Full(getattr(_trial, where), error))
    result = tune(recipe, study=tmp_path / "study", num_trials=3, search=RATES, console=quiet())
    assert [trial.end for trial in result.trials] == ["finished", "stopped", "finished"]
    assert result.trials[1].reason == "out of memory"
    assert len({str(values) for values in tried(result)}) == 3


@pytest.mark.parametrize("error", [UsageError("another model"), RuntimeError("a mistake of ours")])
def test_what_is_no_lack_of_memory_while_a_trial_is_built_ends_the_search(recipe, tmp_path, monkeypatch, error):
    monkeypatch.setattr(_trial, "build_trainer", _Full(_trial.build_trainer, error))
    with pytest.raises(type(error), match=str(error)):
        tune(recipe, study=tmp_path / "study", num_trials=2, search=RATES, console=quiet())


def test_a_pruned_trial_stops_training_and_the_next_one_is_whole(place, recipe, tmp_path, monkeypatch):
    asked = list[int]()

    def should_prune(trial):
        asked.append(trial.number)
        return trial.number == 0

    monkeypatch.setattr(optuna.Trial, "should_prune", should_prune)
    result = tune(recipe, study=tmp_path / "study", num_trials=2, search=RATES, console=quiet())
    assert [(trial.end, trial.step) for trial in result.trials] == [("pruned", 1), ("finished", 4)]
    assert asked == [0, 1, 1, 1]


def test_where_no_trial_finishes_the_reasons_are_told(recipe, tmp_path):
    with pytest.raises(UsageError, match="none of 1 trials finished") as caught:
        tune(recipe, study=tmp_path / "study", num_trials=1, search=["optimizer.lr=1e29:1e30"], console=quiet())
    assert re.search(r"(loss|gradient norm) of step \d is (nan|inf)", str(caught.value))


@pytest.mark.parametrize(
    ("reasons", "advice"),
    [
        (["out of memory", "the loss is nan", "out of memory"], "make the trials smaller, e.g. with run.batch_size"),
        (["the loss is nan", "out of memory", "the loss is nan"], "search smaller learning rates"),
    ],
)
def test_the_advice_is_against_what_ended_most_trials(reasons, advice, recipe, tmp_path, monkeypatch):
    script = iter(reasons)
    monkeypatch.setattr(_tune, "carry_out", lambda *_, **__: _trial.Outcome(end="stopped", reason=next(script)))
    with pytest.raises(UsageError) as caught:
        tune(recipe, study=tmp_path / "study", num_trials=3, search=RATES, console=quiet())
    first, most, once = str(caught.value).splitlines()
    assert first.startswith(f"none of 3 trials finished; {advice}")
    assert (most, once) == (f"  {reasons[0]} (2 trials)", f"  {reasons[1]}")


def test_the_command_ends_in_a_table_and_a_recipe(place, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(_tune, "carry_out", scripted([[2.0], [1.0]]))
    path = write_recipe(
        place, tmp_path / "r.yaml", data={"validation": 0.25}, run={"output": str(tmp_path / "out"), "steps": 4}
    )
    with pytest.raises(SystemExit) as ended:
        cli.main(["tune", str(path), "--trials", "2", *("--search", RATES[0]), "optimizer.warmup=0.5"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert "run.evaluate_every is not set" in shown
    assert "* " in shown
    best = yaml.safe_load((tmp_path / "out-tune" / "best.yaml").read_text())
    assert best["optimizer"]["warmup"] == 0.5
    assert f"gradselect train {tmp_path / 'out-tune' / 'best.yaml'}" in shown.replace("\n", "")
