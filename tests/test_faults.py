"""The harness that breaks runs, files and input, in small; and that it would see what is wrong."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

fault_damage = importlib.import_module("fault_damage")
faults = importlib.import_module("faults")

# TRL 1.16 uses names that transformers 5.23 has replaced.
pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")


def test_a_killed_run_ends_as_if_nothing_had_happened(tmp_path: Path) -> None:
    """Once at a random moment, once before a random write."""
    result = tmp_path / "faults.json"
    command = [sys.executable, str(BENCHMARKS / "faults.py"), "kill", "--kills", "2", "--result", str(result)]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(result.read_text())["kill"]["outcomes"]["killed"] == 2


@pytest.fixture(scope="module")
def subjects(tmp_path_factory: pytest.TempPathFactory) -> list[fault_damage.Subject]:
    """What a run and its evaluation left."""
    folder = tmp_path_factory.mktemp("place")
    place = faults.make_place(folder / "place")
    faults.train_once(place, folder / "run")
    return list(fault_damage.subjects(place, folder / "run", result=faults.COMPARED))


def test_a_damaged_file_is_named_or_reads_as_it_was_written(
    subjects: list[fault_damage.Subject], tmp_path: Path
) -> None:
    """A flipped bit in a value of a result, of a trained model, or of a delta's own numbers was used in silence."""
    assert {subject.name for subject in subjects} == {
        "checkpoint", "delta", "model", "run.json", "evaluation", "comparison",
    }  # fmt: skip
    for subject in subjects:
        outcomes, failures = fault_damage.damage_files(subject, count=8, scratch=tmp_path, seed=0)
        assert failures == []
        assert outcomes["detected"] > 0, subject.name


def test_the_harness_sees_a_reader_that_believes_everything(
    subjects: list[fault_damage.Subject], tmp_path: Path
) -> None:
    (run,) = (subject for subject in subjects if subject.name == "run.json")
    trusting = fault_damage.Subject(
        name="trusting",
        folder=run.folder,
        read=lambda folder: json.loads((folder / "run.json").read_text("utf-8")),
        files=run.files,
    )
    outcomes, failures = fault_damage.damage_files(trusting, count=40, scratch=tmp_path, seed=0)
    assert outcomes["silent"] > 0
    assert outcomes["crashed"] > 0
    assert len(failures) == outcomes["silent"] + outcomes["crashed"]


def test_hostile_recipes_and_data_are_read_or_refused_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    failures: list[str] = []
    recipes = faults._fuzz_recipes(tmp_path, count=150, seed=1, failures=failures)
    data = faults._fuzz_data(count=60, seed=1, failures=failures)
    assert failures == []
    for outcomes in (recipes, data):
        assert outcomes["valid"] > 0
        assert outcomes["refused"] > 0


def test_the_harness_sees_a_crash_and_a_message_for_nobody() -> None:
    outcomes, failures = Counter(), []

    def fails(error: Exception) -> None:
        raise error

    faults._judge(lambda: fails(KeyError("a")), "one", outcomes, failures)
    faults._judge(lambda: fails(faults.UsageError("\x1b[31m")), "two", outcomes, failures)
    faults._judge(lambda: fails(faults.UsageError("recipe.yaml: no")), "three", outcomes, failures)
    assert outcomes == {"crashed": 1, "unclear": 1, "refused": 1}
    assert [failure.split(":")[0] for failure in failures] == ["one", "two"]


def test_the_table_shows_failures() -> None:
    soak = {"count": 20, "failures": ["threads: +1 after warm-up"], "grown": {"bytes": 2048}}
    assert "| 20 | 1 failures: +2 KiB |" in faults.table({"soak": soak})
    assert "| 20 | as expected: +2 KiB |" in faults.table({"soak": {**soak, "failures": []}})
