"""A comparison end to end: what runs, what is written, what is not done again, what is refused."""

from __future__ import annotations

import gzip
import json
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from compare_fixtures import BLOCKS, FULL, MISFIT, Runner, make_suite, suite_values, write_place, write_suite
from safetensors.torch import save_file
from train_fixtures import weights, write_model, write_sums

from gradselect import UsageError
from gradselect.app.cli import main
from gradselect.app.compare import subprocesses as _process
from gradselect.app.compare.protocol import place_fingerprint
from gradselect.app.compare.subprocesses import failure_in
from gradselect.app.compare.suite import parse_suite
from gradselect.app.results import read_result
from gradselect.app.runtime import Preempted, RunFolder
from gradselect.files.checked_json import read_sealed, sealed

# TRL 1.16 uses names that transformers 5.23 has replaced.
pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")

ALL = [
    *("full.lr-0.001.seed-0.rate", "full.lr-0.01.seed-0.rate", "full.lr-0.01.seed-0.score"),
    *("uniform-2.lr-0.01.seed-0.score", "full.lr-0.01.seed-1.score", "uniform-2.lr-0.01.seed-1.score"),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_place(tmp_path_factory.mktemp("place"))


@pytest.fixture(scope="module")
def finished(place: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str], str]:
    """A results folder after the whole suite, the runs that it took and what was said."""
    folder = tmp_path_factory.mktemp("finished") / "results"
    with pytest.MonkeyPatch.context() as patch:
        runner = Runner(patch)
        runner(make_suite(place), folder)
    return folder, runner.ran, runner.said


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> Runner:
    return Runner(monkeypatch)


@pytest.fixture
def copy(finished: tuple[Path, list[str], str], tmp_path: Path) -> Path:
    """Its result files alone, to be damaged."""
    target = tmp_path / "results"
    target.mkdir()
    for file in finished[0].glob("*.json"):
        (target / file.name).write_bytes(file.read_bytes())
    return target


def values(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / f"{name}.json").read_text("utf-8"))


def change(path: Path, **own: Any) -> None:
    """Other values in our part of a result file."""
    content = json.loads(path.read_text("utf-8"))
    content["gradselect"] |= own
    path.write_text(json.dumps(sealed(content)), "utf-8")


def test_rates_are_searched_then_seeds_run_at_the_best(finished: tuple[Path, list[str], str]) -> None:
    folder, ran, said = finished
    assert ran == ALL
    assert sorted(path.stem for path in folder.glob("*.json")) == sorted(ALL)
    low, high = (values(folder, name)["gradselect"]["validation_loss"] for name in ALL[:2])
    assert high < low
    assert "the best rate 0.01 is at the edge" in said
    assert values(folder, ALL[2])["gradselect"]["rate_at_edge"] is True
    assert values(folder, ALL[3])["gradselect"]["rate_at_edge"] is None


def test_a_result_has_the_keys_of_peft_and_ours(finished: tuple[Path, list[str], str]) -> None:
    result = values(finished[0], "uniform-2.lr-0.01.seed-1.score")
    run, train, own = result["run_info"], result["train_info"], result["gradselect"]
    assert run["experiment_name"] == "sums/uniform 2/lr-0.01/seed-1"
    assert run["train_config"]["method"]["count"] == 2
    assert run["peft_config"] is None
    assert train["status"] == "success"
    assert [row["step"] for row in train["metrics"]] == [1, 2, 2]
    assert train["metrics"][-1]["forgetting"] == pytest.approx(own["forgetting"]["after"] - own["forgetting"]["before"])
    assert 0 < train["num_trainable_params"] < train["num_total_params"]
    assert set(result["meta_info"]) >= {"model_info", "dataset_info", "package_info", "system_info", "pytorch_info"}
    assert own["scores"]["sums"]["metric"] == "loss"
    assert (own["commit"], own["dirty"], own["role"]) == ("c0ffee", False, "score")
    assert len(own["selection"]["selected"]) == 2
    assert own["bytes"]["peak"]["together"] > own["bytes"]["peak"]["weights"] > 0
    assert sum(kind["steps"] for kind in own["seconds"]["by_kind"].values()) == 2


def test_items_add_up_to_the_score(finished: tuple[Path, list[str], str]) -> None:
    own = values(finished[0], ALL[2])["gradselect"]
    items = own["items"]["sums"]
    assert [item["index"] for item in items] == list(range(6))
    loss = sum(item["loss"] for item in items) / sum(item["num_tokens"] for item in items)
    assert own["scores"]["sums"]["value"] == pytest.approx(loss)


def test_seconds_of_a_curve_end_at_those_of_the_training(finished: tuple[Path, list[str], str]) -> None:
    own = values(finished[0], ALL[2])["gradselect"]
    assert own["curves"]["train"]["step"] == [1, 2]
    assert own["curves"]["train"]["seconds"][-1] == pytest.approx(own["seconds"]["training"])
    assert own["curves"]["validation"]["loss"] == [own["validation_loss"]]


def test_what_did_not_move_is_not_shipped(finished: tuple[Path, list[str], str]) -> None:
    whole, part = (values(finished[0], name)["train_info"] for name in (ALL[2], ALL[3]))
    assert whole["num_trainable_params"] == whole["num_total_params"]
    assert part["file_size"] < whole["file_size"]


def test_who_has_the_base_is_shipped_no_tokenizer(tmp_path: Path) -> None:
    """A delta counted the small files of its run, an adapter none."""
    from gradselect.app.compare import measure

    base, run, sizes = tmp_path / "base", tmp_path / "run", []
    for size in (10, 100_000):
        for folder in (base, run):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            weight = torch.zeros(1_000_000)
            weight[0] = float(folder == run)
            save_file({"weight": weight}, folder / "model.safetensors")
            text = "".join(map(str, range(size)))
            (folder / "tokenizer.json").write_text(text, encoding="utf-8")
        settings = SimpleNamespace(path=str(base), revision=None, dtype="float32")
        job: Any = SimpleNamespace(recipe=SimpleNamespace(model=settings))
        sizes.append(measure._delta_of_run(job, RunFolder(run)).num_bytes)
    assert sizes[0] == sizes[1]


def test_the_search_asks_no_test_and_its_best_model_is_scored(finished: tuple[Path, list[str], str]) -> None:
    searched, scored = (values(finished[0], name) for name in ALL[1:3])
    assert searched["gradselect"]["scores"] == {}
    assert searched["gradselect"]["forgetting"] is None
    # Trained once: the very same seconds.
    assert searched["gradselect"]["seconds"] == scored["gradselect"]["seconds"]


def test_forgetting_of_the_base_is_measured_once(finished: tuple[Path, list[str], str]) -> None:
    before = {values(finished[0], name)["gradselect"]["forgetting"]["before"] for name in ALL[2:]}
    assert len(before) == 1
    assert list(read_sealed(finished[0] / "work" / "forgetting.json").values()) == list(before)


def test_models_are_deleted_when_they_are_measured(finished: tuple[Path, list[str], str]) -> None:
    assert not list((finished[0] / "work").rglob("*.safetensors"))


def test_seeds_differ_and_share_the_protocol(finished: tuple[Path, list[str], str]) -> None:
    results = [values(finished[0], name)["gradselect"] for name in ALL]
    assert len({result["protocol"] for result in results}) == 1
    first, second = (values(finished[0], name)["gradselect"] for name in (ALL[2], ALL[4]))
    assert first["validation_loss"] != second["validation_loss"]


def test_what_is_done_is_not_done_again(place: Path, copy: Path, runner: Runner) -> None:
    before = {path: path.read_bytes() for path in copy.glob("*.json")}
    summaries = runner(make_suite(place), copy)
    assert runner.ran == []
    assert {path: path.read_bytes() for path in copy.glob("*.json")} == before
    assert [len(summary.results) for summary in summaries] == [2, 2]


def test_packed_results_are_not_made_again(place: Path, copy: Path, runner: Runner) -> None:
    for path in list(copy.glob("*.lr-*.json")):
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    summaries = runner(make_suite(place), copy)
    assert runner.ran == []
    assert [len(summary.results) for summary in summaries] == [2, 2]


def test_only_what_is_missing_is_done(place: Path, copy: Path, runner: Runner) -> None:
    (copy / f"{ALL[4]}.json").unlink()
    runner(make_suite(place), copy, only=["full"])
    assert runner.ran == [ALL[4]]


def test_half_written_and_foreign_files_are_skipped_aloud(place: Path, copy: Path, runner: Runner) -> None:
    path = copy / f"{ALL[5]}.json"
    path.write_bytes(path.read_bytes()[:500])
    (copy / "notes.json").write_text("{}")
    runner(make_suite(place), copy)
    assert runner.ran == [ALL[5]]
    assert f"skipped    {path.name}: damaged or half-written" in runner.said
    assert "skipped    notes.json: no result of gradselect compare" in runner.said
    assert read_result(path).succeeded


def test_results_of_another_protocol_are_refused_by_name(place: Path, copy: Path, runner: Runner) -> None:
    suite = make_suite(place)
    longer = suite.model_copy(
        update={"recipe": suite.recipe.model_copy(update={"run": suite.recipe.run.model_copy(update={"steps": 3})})}
    )
    with pytest.raises(UsageError, match=r"another protocol[\s\S]*recipe\.run\.steps: 2 there, 3 here"):
        runner(longer, copy)
    assert runner.ran == []


def test_the_protocol_is_of_contents_and_not_of_places(place: Path, copy: Path, runner: Runner, tmp_path: Path) -> None:
    elsewhere = write_place(tmp_path / "elsewhere")
    runner(make_suite(elsewhere), copy)
    assert runner.ran == []
    with (elsewhere / "sums.jsonl").open("a") as file:
        file.write('{"question": "1+1?", "answer": "is 2"}\n')
    with pytest.raises(UsageError, match=r"recipe\.data\.fingerprint"):
        runner(make_suite(elsewhere), copy)


def test_a_tokenizer_saved_offline_makes_no_other_protocol(tmp_path: Path) -> None:
    settings = tmp_path / "tokenizer_config.json"
    fingerprints = []
    for text in ('{"local_files_only": false}', '{"local_files_only": true}', '{"add_bos_token": true}'):
        settings.write_text(text)
        fingerprints.append(place_fingerprint(tmp_path, kind="model"))
    online, offline, other = fingerprints
    assert online == offline != other


def test_a_run_that_fails_is_reported_and_the_rest_goes_on(place: Path, tmp_path: Path, runner: Runner) -> None:
    suite = make_suite(place, methods={"misfit": MISFIT, "uniform 2": BLOCKS}, seeds=1)
    misfit, other = runner(suite, tmp_path / "results")
    assert (len(misfit.results), len(other.results)) == (0, 1)
    result = read_result(tmp_path / "results" / "misfit.lr-0.01.seed-0.score.json")
    assert not result.succeeded
    assert "count=99 is more than the 6 blocks" in result.error
    assert "FAILED: " in runner.said
    runner(suite, tmp_path / "results")
    assert runner.ran == ["misfit.lr-0.01.seed-0.score"]


def test_a_rate_that_fails_loses(place: Path, tmp_path: Path, runner: Runner) -> None:
    def diverge(job: Any) -> None:
        if job.recipe.optimizer.lr == 1e-2:
            raise UsageError("the loss of step 2 is nan")

    runner.before_job = diverge
    (summary,) = runner(make_suite(place, methods={"full": FULL}, seeds=1), tmp_path / "results")
    assert (summary.lr, len(summary.results)) == (1e-3, 1)


def test_a_method_whose_rates_all_fail_is_said(place: Path, tmp_path: Path, runner: Runner) -> None:
    misfit = {**MISFIT, "rates": [1e-3, 1e-2]}
    (summary,) = runner(make_suite(place, methods={"misfit": misfit}), tmp_path / "results")
    assert summary.lr is None
    assert len(runner.ran) == 2
    assert "all failed" in runner.said


def test_results_of_a_dirty_tree_are_marked_and_replaced_by_clean_ones(
    place: Path, tmp_path: Path, runner: Runner
) -> None:
    suite = make_suite(place, methods={"uniform 2": BLOCKS}, seeds=1)
    runner.dirty = True
    runner(suite, tmp_path / "results")
    name = "uniform-2.lr-0.01.seed-0.score"
    assert values(tmp_path / "results", name)["gradselect"]["dirty"] is True
    assert "marked dirty" in runner.said
    runner(suite, tmp_path / "results")
    assert runner.ran == []
    runner.dirty = False
    runner(suite, tmp_path / "results")
    assert runner.ran == [name]
    assert values(tmp_path / "results", name)["gradselect"]["dirty"] is False


def test_a_method_with_other_settings_is_run_again(place: Path, copy: Path, runner: Runner) -> None:
    other = {"method": {"name": "uniform", "count": 3}, "rates": [1e-2]}
    runner(make_suite(place, methods={"full": FULL, "uniform 2": other}), copy)
    assert runner.ran == [ALL[3], ALL[5]]
    assert "uniform 2 had other settings" in runner.said
    assert (copy / "work" / "superseded" / f"{ALL[3]}.json").is_file()


def test_a_key_that_came_after_a_result_had_its_default_then(place: Path, copy: Path, runner: Runner) -> None:
    for name in (ALL[3], ALL[5]):
        older = values(copy, name)["gradselect"]["method_settings"]
        del older["update_in_backward"]
        change(copy / f"{name}.json", method_settings=older)
    runner(make_suite(place), copy)
    assert runner.ran == []


def test_scores_at_a_rate_that_is_no_longer_best_go_aside(place: Path, copy: Path, runner: Runner) -> None:
    change(copy / f"{ALL[0]}.json", validation_loss=0.0)
    runner(make_suite(place), copy, only=["full"])
    assert runner.ran == ["full.lr-0.001.seed-0.score", "full.lr-0.001.seed-1.score"]
    assert not (copy / f"{ALL[2]}.json").exists()


def test_an_interrupted_run_goes_on_from_its_checkpoint(place: Path, tmp_path: Path, runner: Runner) -> None:
    """Stopped after step 2 of 4, and resumed: the weights are those of a run that was never stopped."""
    from gradselect.app.compare import worker as _child

    suite = make_suite(place, methods={"uniform 2": BLOCKS}, seeds=1)
    run = suite.recipe.run.model_copy(update={"steps": 4, "save_every": 2})
    suite = suite.model_copy(update={"recipe": suite.recipe.model_copy(update={"run": run})})
    kept: dict[str, Any] = {}

    def keep(job: Any, run: Any) -> Any:
        kept[job.result.parent.name] = weights(job.training)
        kept["resumed_from"] = run.resumed_from
        return measure(job, run)

    measure = _child.measure_shipment
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_child, "measure_shipment", keep)
        runner(suite, tmp_path / "whole")
        patch.setattr("gradselect.app.train.trainer.RunTrainer.log", stop_after_a_checkpoint(tmp_path / "cut"))
        with pytest.raises(KeyboardInterrupt):
            runner(suite, tmp_path / "cut")
        patch.undo()
        patch.setattr(_child, "measure_shipment", keep)
        runner(suite, tmp_path / "cut", resume=True)
    assert kept["resumed_from"] == "step-2"
    assert all((kept["cut"][name] == kept["whole"][name]).all() for name in kept["whole"])
    found = {name: values(tmp_path / name, f"{runner.ran[-1]}") for name in ("cut", "whole")}
    assert (found["cut"]["gradselect"]["resumed_from"], "resumed_from" in found["whole"]["gradselect"]) == (
        "step-2",
        False,
    )
    cut = found["cut"]["gradselect"]
    assert sum(kind["steps"] for kind in cut["seconds"]["by_kind"].values()) == 2
    # Two steps were measured, of four: the time is that of four.
    measured = sum(kind["steps"] * kind["median"] for kind in cut["seconds"]["by_kind"].values())
    assert cut["seconds"]["training"] > 1.5 * measured
    assert (
        cut["curves"]["train"]["seconds"][-1] <= cut["seconds"]["training"] == found["cut"]["train_info"]["train_time"]
    )


def test_an_interrupted_run_of_other_steps_begins_anew(
    place: Path, tmp_path: Path, runner: Runner, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was resumed, refused as another run, and its rate lost."""
    suite = make_suite(place, methods={"uniform 2": BLOCKS}, seeds=1)

    def of_steps(steps: int) -> Any:
        run = suite.recipe.run.model_copy(update={"steps": steps, "save_every": 2})
        return suite.model_copy(update={"recipe": suite.recipe.model_copy(update={"run": run})})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gradselect.app.train.trainer.RunTrainer.log", stop_after_a_checkpoint(tmp_path / "cut"))
        with pytest.raises(KeyboardInterrupt):
            runner(of_steps(4), tmp_path / "cut")
    runner(of_steps(3), tmp_path / "cut", resume=True)
    found = values(tmp_path / "cut", runner.ran[-1])["gradselect"]
    assert "resumed_from" not in found
    assert sum(kind["steps"] for kind in found["seconds"]["by_kind"].values()) == 3
    assert "is made again: run.steps: 4 then, 3 now" in capsys.readouterr().out


def test_a_finished_training_is_taken_over_only_with_the_same_data_and_model(tmp_path: Path, runner: Runner) -> None:
    """`--resume` compared the recipes alone, and put a training on other data into the new protocol."""
    from gradselect.app.compare import worker as _child

    place, trained = write_place(tmp_path), []
    suite = make_suite(place, methods={"uniform 2": BLOCKS}, seeds=1)
    original = _child.train

    def count(recipe: Any, **options: Any) -> Any:
        trained.append(recipe.run.seed)
        return original(recipe, **options)

    def interrupt(job: Any) -> Any:
        raise KeyboardInterrupt

    def run_until_scored(*, resume: bool) -> int:
        with pytest.raises(KeyboardInterrupt):
            runner(suite, tmp_path / "results", resume=resume)
        return len(trained)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_child, "train", count)
        patch.setattr(_child, "measure_scores", interrupt)
        assert run_until_scored(resume=False) == 1
        assert run_until_scored(resume=True) == 1
        write_sums(place / "sums.jsonl", rows=30)
        assert run_until_scored(resume=True) == 2
        write_model(place / "model", seed=1)
        assert run_until_scored(resume=True) == 3


def stop_after_a_checkpoint(folder: Path) -> Any:
    from transformers import Trainer

    def log(self: Any, *arguments: Any, **options: Any) -> None:
        if list(folder.glob("work/*/checkpoints/step-2")):
            raise KeyboardInterrupt
        Trainer.log(self, *arguments, **options)

    return log


def test_speed_and_memory_alone_need_no_data(place: Path, tmp_path: Path, runner: Runner) -> None:
    values = suite_values(place, evaluations={}, forgetting=None, methods={"uniform 2": BLOCKS}, seeds=1)
    values["recipe"]["data"] = {"format": "random", "length": 8, "rows": 16}
    (summary,) = runner(parse_suite(values, source="suite"), tmp_path / "results")
    (result,) = summary.results
    assert result.content.train_info.file_size is None
    assert result.record.validation_loss is None
    assert summary.step_seconds > 0
    with pytest.raises(UsageError, match="trained on random data is not kept"):
        parse_suite({**values, "evaluations": {"a": {"task": "loss", "data": "x.jsonl"}}}, source="suite")


def test_preparations_run_where_their_product_is_missing(place: Path, tmp_path: Path, runner: Runner) -> None:
    made = tmp_path / "made.txt"
    command = f"python -c \"open('{made}', 'a').write('x')\""
    suite = make_suite(
        place, prepare=[{"command": command, "makes": str(made)}], methods={"uniform 2": BLOCKS}, seeds=1
    )
    runner(suite, tmp_path / "results")
    runner(suite, tmp_path / "results")
    assert made.read_text() == "x"


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("python -c 'raise SystemExit(3)'", "failed"),
        ("python -c 'pass'", "did not make"),
        ("nosuchprogram --x", "cannot be run"),
    ],
)
def test_a_preparation_that_fails_is_named(
    command: str, said: str, place: Path, tmp_path: Path, runner: Runner
) -> None:
    suite = make_suite(place, prepare=[{"command": command, "makes": str(tmp_path / "none")}])
    with pytest.raises(UsageError, match=said):
        runner(suite, tmp_path / "results")


def test_the_command_runs_each_run_in_a_process_of_its_own(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One process here: a Python that loads torch and transformers takes ten seconds."""
    suite = write_suite(place, tmp_path / "suite.yaml", methods={"b": BLOCKS}, evaluations={}, seeds=1)
    with pytest.raises(SystemExit) as raised:
        main(["compare", str(suite), "--results", str(tmp_path / "results")])
    assert raised.value.code == 0
    assert "results in" in capsys.readouterr().out
    result = read_result(tmp_path / "results" / "b.lr-0.01.seed-0.score.json")
    assert result.succeeded
    assert result.record.command == ["gradselect", "compare", str(suite), "--results", str(tmp_path / "results")]
    assert "finished 2 steps" in (tmp_path / "results" / "work" / "b.lr-0.01.seed-0.score.log").read_text()


def test_the_command_says_by_its_exit_code_that_runs_are_missing(
    place: Path, tmp_path: Path, runner: Runner, capsys: pytest.CaptureFixture[str]
) -> None:
    suite = write_suite(place, tmp_path / "suite.yaml", methods={"misfit": MISFIT}, seeds=1)
    with pytest.raises(SystemExit) as raised:
        main(["compare", str(suite), "--results", str(tmp_path / "results")])
    assert raised.value.code == 1
    assert "count=99 is more than the 6 blocks" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "code", "said"),
    [
        ("step 1\nerror: no such file\n  second line\n", 2, "no such file\n  second line"),
        ("Traceback ...\nKeyError: 'x'\n", 1, "KeyError: 'x' (exit code 1)"),
        ("", 1, "it said nothing (exit code 1)"),
        ("step 1\n", -9, "ended by signal 9"),
    ],
)
def test_why_a_process_failed_is_read_from_what_it_said(text: str, code: int, said: str) -> None:
    assert said in failure_in(text, code)


def test_an_unknown_method_on_the_command_line_is_an_error(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    suite = write_suite(place, tmp_path / "suite.yaml")
    with pytest.raises(SystemExit) as raised:
        main(["compare", str(suite), "--only", "ful"])
    assert raised.value.code == 2
    assert "--only='ful' matches no method; nearest: 'full'" in capsys.readouterr().err


def test_a_signal_goes_on_to_the_run_and_waits_for_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The job here tells the comparison to end, and needs a while to keep what it has."""
    job = tmp_path / "job"
    job.write_text("#!/bin/sh\ntrap 'sleep 0.3; echo kept; exit 143' TERM\nkill -TERM $PPID\nsleep 9 & wait\n")
    job.chmod(0o755)
    monkeypatch.setattr(_process.sys, "executable", str(job))
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Preempted, match="143"):
        _process.run_job(tmp_path / "job.json", tmp_path / "log")
    assert (tmp_path / "log").read_text() == "kept\n"
    assert signal.getsignal(signal.SIGTERM) == before
