"""Records on disk: what is written is what is read, in this version and in others."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from report_fixtures import result, write

from gradselect import UsageError
from gradselect.app.results import ResultFile, read_finished_run, read_result, read_run, write_result
from gradselect.files import read_json_text, sealed

COMMITTED = sorted((Path(__file__).parents[1] / "benchmarks" / "results").glob("small*/*.json.gz"))
STARTED: dict[str, Any] = {
    "status": "started",
    "recipe": {"run": {"steps": 3}},
    "model": {"class": "LlamaForCausalLM", "parameters": 7, "fingerprint": "f"},
    "data": {},
}
FINISHED: dict[str, Any] = {
    **STARTED,
    "status": "finished",
    "steps": 3,
    "training_loss": 1.5,
    "validation_loss": None,
    "tokens": 20,
    "training_seconds": 0,
    "seconds": {"training": 0, "by_kind": {}},
    "bytes": {"peak": {"together": 3}, "average": {}, "reserved": {"peak": 3, "average": 2.5, "99th": 2.9}},
    "selection": None,
    "history": [{"step": 1, "loss": 2}],
}


def without_seal(path: Path) -> dict[str, Any]:
    return {key: value for key, value in json.loads(read_json_text(path)).items() if key != "sha256"}


def write_run(path: Path, values: dict[str, Any]) -> Path:
    path.write_text(json.dumps(sealed(values)), "utf-8")
    return path


def test_committed_results_read_as_they_were_written() -> None:
    """Digests depend on every key and on 3 being no 3.0."""
    assert len(COMMITTED) > 50
    for path in COMMITTED:
        assert sealed(read_result(path).content.values()) == sealed(without_seal(path)), path.name


def test_a_result_survives_reading_and_writing(tmp_path: Path) -> None:
    first = write(tmp_path, result("full"))
    write_result(tmp_path / "again.json", read_result(first).content)
    assert without_seal(tmp_path / "again.json") == json.loads(first.read_text("utf-8"))


def test_numbers_that_are_not_finite_are_written_as_null(tmp_path: Path) -> None:
    values = result("full")
    values["gradselect"]["curves"]["train"]["loss"][3] = math.nan
    write_result(tmp_path / "x.json", ResultFile.check(values, name="x"))
    assert read_result(tmp_path / "x.json").record.curves["train"].loss[3] is None


def test_keys_of_newer_versions_are_kept(tmp_path: Path) -> None:
    values = result("full")
    values["gradselect"]["energy"] = {"joules": 3}
    assert read_result(write(tmp_path, values)).content.values()["gradselect"]["energy"] == {"joules": 3}


def test_keys_that_older_versions_did_not_write_have_defaults(tmp_path: Path) -> None:
    values = result("full")
    for key in ("rates", "flop", "curves", "command", "commit"):
        del values["gradselect"][key]
    record = read_result(write(tmp_path, values)).record
    assert (record.rates, record.flop, record.curves, record.command, record.commit) == ([], None, {}, [], None)
    assert read_run(write_run(tmp_path / "run.json", STARTED)).processes == 1


@pytest.mark.parametrize("status", ["success", "failed"])
def test_only_runs_with_an_outcome_are_results(tmp_path: Path, status: str) -> None:
    values = result("full")
    values["train_info"]["status"] = status
    assert read_result(write(tmp_path, values)).succeeded == (status == "success")
    values["train_info"]["status"] = "running"
    with pytest.raises(UsageError, match=r"\.json: damaged: train_info\.status: "):
        read_result(write(tmp_path, values))


def test_a_finished_run_reads_as_it_was_written(tmp_path: Path) -> None:
    run = read_finished_run(write_run(tmp_path / "run.json", FINISHED))
    assert run.bytes.reserved is not None
    assert run.bytes.reserved.percentile_99 == 2.9
    assert json.dumps(run.values()) == json.dumps({key: FINISHED[key] for key in run.values()})
    assert run.values().keys() == FINISHED.keys()


@pytest.mark.parametrize("key", ["status", "recipe", "model", "data"])
def test_a_missing_key_of_a_run_is_named_with_its_file(tmp_path: Path, key: str) -> None:
    values = {name: value for name, value in STARTED.items() if name != key}
    with pytest.raises(UsageError, match=rf"run\.json: damaged: {key}: "):
        read_run(write_run(tmp_path / "run.json", values))


def test_an_unfinished_run_is_not_read_as_a_finished_one(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"run\.json: damaged: status: 'started'; the run has not finished"):
        read_finished_run(write_run(tmp_path / "run.json", {**FINISHED, "status": "started"}))
