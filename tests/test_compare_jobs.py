"""Runs side by side: the places they get, what is said, and how all of them end."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from compare_fixtures import BLOCKS, FULL, Runner, make_suite, write_place, write_suite
from report_fixtures import result, results_of, write

from gradselect import UsageError
from gradselect.app.cli import main
from gradselect.app.compare import compare
from gradselect.app.compare import side_by_side as _side_by_side
from gradselect.app.compare import subprocesses as _process
from gradselect.app.compare.job import Job
from gradselect.app.compare.result_record import _identity
from gradselect.app.compare.side_by_side import SideBySide
from gradselect.app.report.comparison import compare_results
from gradselect.app.report.findings import findings
from gradselect.app.report.read_results import read_results
from gradselect.app.runtime import Preempted
from gradselect.files import sealed


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)


def environments(jobs: SideBySide, monkeypatch: pytest.MonkeyPatch) -> list[Mapping[str, str]]:
    """The environment of each place."""
    found: list[Mapping[str, str]] = []
    wait = threading.Barrier(jobs.count, timeout=30)

    def run_job(job_file: Path, log: Path, *, environment: Mapping[str, str], running: Any) -> None:
        found.append(environment)
        wait.wait()  # so that all places are taken

    monkeypatch.setattr(_side_by_side, "run_job", run_job)
    jobs.map(lambda number: jobs.run_job(Path(f"{number}"), Path("log")), range(jobs.count))
    return found


def test_a_processor_is_shared_by_its_threads(threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = SideBySide(3, device="auto")
    assert jobs.text == "3 runs side by side, each with 2 of 8 threads"
    assert environments(jobs, monkeypatch) == [{"OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2"}] * 3
    with pytest.raises(UsageError, match="--jobs=9: torch has 8 threads here; write --jobs 8 or less"):
        SideBySide(9, device="auto")


def test_each_run_has_an_accelerator_of_its_own(devices: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5, 6,7")
    jobs = SideBySide(2, device="auto")
    assert jobs.text == "2 runs side by side, each with an accelerator"
    assert jobs.alone == {"CUDA_VISIBLE_DEVICES": "5"}
    found = environments(jobs, monkeypatch)
    assert sorted(place["CUDA_VISIBLE_DEVICES"] for place in found) == ["5", "6"]
    with pytest.raises(
        UsageError,
        match=r"--jobs=4: 3 acc.* and --per-device is 1; write --jobs 3 or less, or --per-device 2",
    ):
        SideBySide(4, device="auto")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    found = environments(SideBySide(2, device="auto"), monkeypatch)
    assert sorted(place["CUDA_VISIBLE_DEVICES"] for place in found) == ["0", "1"]


def test_accelerators_are_shared_where_the_user_says_so(devices: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 16)
    jobs = SideBySide(5, device="auto", per_device=2)
    assert jobs.text == "5 runs side by side, each with an accelerator for 2 and 3 of 16 threads"
    found = environments(jobs, monkeypatch)
    assert sorted(place["CUDA_VISIBLE_DEVICES"] for place in found) == ["0", "0", "1", "1", "2"]
    assert {place["OMP_NUM_THREADS"] for place in found} == {"3"}
    with pytest.raises(UsageError, match=r"--jobs=7: .* and --per-device is 2; write --jobs 6 or less"):
        SideBySide(7, device="auto", per_device=2)
    with pytest.raises(UsageError, match="--per-device=2: runs are on the processor here; write --jobs 5 alone"):
        SideBySide(5, device="cpu", per_device=2)


def test_accelerators_are_shared_by_several_jobs_alone(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--per-device=2 is for runs side by side; write --jobs 2 as well"):
        compare(make_suite(write_place(tmp_path)), per_device=2, results=tmp_path / "results")


def test_methods_run_side_by_side_and_then_seeds(
    tmp_path: Path, threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two methods search at the same time: each of the first two runs waits for the other."""
    runner, suite = Runner(monkeypatch), make_suite(write_place(tmp_path), methods={"full": FULL, "uniform 2": BLOCKS})
    both, ran = threading.Barrier(2, timeout=30), []

    def run_job(job_file: Path, log: Path, *, environment: Mapping[str, str], running: Any) -> None:
        job = Job.model_validate_json(job_file.read_text("utf-8"))
        ran.append(job.result.name)
        if len(ran) <= 2:
            both.wait()
        made_up = result(job.method, lr=job.recipe.optimizer.lr, role=job.role, seed=job.recipe.run.seed)
        made_up["gradselect"] |= json.loads(json.dumps(_identity(job)))
        job.result.write_text(json.dumps(sealed(made_up)), "utf-8")

    monkeypatch.setattr(_side_by_side, "run_job", run_job)
    summaries = runner(suite, tmp_path / "results", side_by_side=SideBySide(2, device="cpu"))
    assert len(set(ran)) == len(ran) == 6
    assert [len(summary.results) for summary in summaries] == [2, 2]
    assert {each.record.jobs for summary in summaries for each in summary.results} == {2}
    assert [name.split(".seed-")[1] for name in ran[-2:]] == ["1.score.json"] * 2
    assert "jobs       2 runs side by side, each with 4 of 8 threads; times of steps hold for a shared" in runner.said
    assert "begins     full, lr 0.001, seed 0 (rate), in " in runner.said


def test_a_signal_ends_all_and_begins_none(tmp_path: Path, threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first two jobs wait for each other, then one tells the comparison to end. Both keep what they have."""
    job = tmp_path / "job"
    job.write_text(
        f"#!/bin/sh\ntrap 'echo kept; exit 143' TERM\ntouch $3.begun\n"
        f"while [ $(ls {tmp_path}/*.begun | wc -l) -lt 2 ]; do sleep 0.02; done\n"
        f"mkdir {tmp_path}/first 2> {tmp_path}/err && kill -TERM $PPID\nsleep 20 & wait\n"
    )
    job.chmod(0o755)
    monkeypatch.setattr(_process.sys, "executable", str(job))
    jobs = SideBySide(2, device="cpu")
    with pytest.raises(Preempted, match="143") as raised:
        jobs.map(lambda number: jobs.run_job(tmp_path / f"{number}.json", tmp_path / f"{number}.log"), range(5))
    assert raised.value.message == "SIGTERM: the comparison has stopped"
    assert sorted(path.name for path in tmp_path.glob("*.begun")) == ["0.json.begun", "1.json.begun"]
    assert [(tmp_path / f"{number}.log").read_text() for number in (0, 1)] == ["kept\n"] * 2


def test_an_error_of_one_lets_no_other_run_begin(threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs, begun, failed = SideBySide(2, device="cpu"), [], threading.Event()

    def run_job(job_file: Path, log: Path, **_: Any) -> None:
        begun.append(job_file.name)

    def act(number: int) -> None:
        if number == 0:
            raise UsageError("the disk is full")
        while not jobs._is_over and not failed.wait(0.01):
            pass
        jobs.run_job(Path(f"{number}"), Path("log"))

    monkeypatch.setattr(_side_by_side, "run_job", run_job)
    with pytest.raises(UsageError, match="the disk is full"):
        jobs.map(act, range(4))
    assert begun == []


def test_the_command_refuses_more_jobs_than_there_are_threads(
    tmp_path: Path, threads: None, capsys: pytest.CaptureFixture[str]
) -> None:
    suite = write_suite(write_place(tmp_path), tmp_path / "suite.yaml")
    with pytest.raises(SystemExit) as raised:
        main(["compare", str(suite), "--jobs", "99", "--results", str(tmp_path / "results")])
    assert raised.value.code == 2
    assert "--jobs=99: torch has 8 threads here; write --jobs 8 or less" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


def test_the_report_says_that_runs_shared_the_machine(tmp_path: Path) -> None:
    for place, values in enumerate(results_of("full", seeds=2)):
        values["gradselect"]["jobs"] = 2
        write(tmp_path / "all", values)
        if place % 2:
            del values["gradselect"]["jobs"]
        write(tmp_path / "some", values)

    def found(name: str) -> str:
        return " ".join(findings(compare_results(read_results(tmp_path / name, include_dirty=False))))

    assert "Runs were made 2 side by side: times of steps hold for a shared machine." in found("all")
    assert "Runs were made 1 and 2 at a time, so times of steps do not compare among all methods." in found("some")
