"""The tables of suites/seeds in docs/results.md."""

import importlib
import json
import sys
from pathlib import Path

import pytest
from report_fixtures import block_selection, result, write
from test_compare_budget import ADA, FULL, FakeMachine, calibrate, make

from gradselect.app.results import write_calibration
from gradselect.usage import UsageError

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

pack_results = importlib.import_module("pack_results")
readme = importlib.import_module("readme")
seed_methods = importlib.import_module("seed_methods")


def suite_in(folder: Path) -> seed_methods.Suite:
    return seed_methods.Suite(name="few", title="Few", task="It learns.", results=folder)


def test_a_suite_without_results_has_no_section_and_all_have_a_place(tmp_path: Path) -> None:
    assert seed_methods.section(suite_in(tmp_path)) == ""
    assert {suite.name for suite in seed_methods.SUITES} <= readme.PAGES[readme.TABLES].keys()
    for suite in seed_methods.SUITES:
        assert (Path(__file__).parent.parent / seed_methods.file_of(suite)).exists()


def test_methods_stand_beside_lora_with_entries_state_and_steps(tmp_path: Path) -> None:
    for name, skill in {"LoRA": 0.4, "ada": 0.7}.items():
        write(tmp_path / "few", result(name, seed=0, skill=skill))
    without = seed_methods.section(suite_in(tmp_path))
    assert "less LoRA's" in without
    assert "--calibrate-only" not in without
    assert without.index("| ada |") < without.index("| LoRA |")  # the lower loss first

    steps = tmp_path / "few-steps"
    steps.mkdir()
    known = calibrate(
        make(tmp_path, {"time_of": "full"}, full=FULL, ada=ADA),
        FakeMachine({"full": {"step": 2.0}, "ada": {"explore": 2.0, "exploit": 1.0}}),
    )
    write_calibration(steps, known)
    row = next(line for line in seed_methods.section(suite_in(tmp_path)).splitlines() if line.startswith("| ada |"))
    assert row.endswith(f"| {known.methods['ada'].ratio:.2f} |")


def test_where_answers_alone_are_scored_nothing_is_called_a_loss(tmp_path: Path) -> None:
    for name in ("LoRA", "ada"):
        values = result(name)
        del values["gradselect"]["scores"]["stories"]
        write(tmp_path / "few", values)
    section = seed_methods.section(suite_in(tmp_path))
    assert "test %" in section
    assert "less LoRA's" not in section
    assert "paired difference" not in section


def test_a_score_without_items_has_intervals_over_seeds_and_it_is_said(tmp_path: Path) -> None:
    for name, seed in (("LoRA", 0), ("LoRA", 1), ("ada", 0)):
        values = result(name, seed=seed)
        score = {"task": "classification", "metric": "spearman", "value": 0.8 + seed / 100, "interval": None}
        values["gradselect"] |= {"scores": {"dev": {**score, "num_items": 200}}, "items": None}
        write(tmp_path / "few", values)
    section = seed_methods.section(suite_in(tmp_path))
    assert "Where `seeds` is 1 there is none. Where there are several seeds they are Student's t over the" in section
    assert "items and seeds" not in section
    assert "test items" not in section


def test_entries_of_blocks_are_those_that_moved_in_the_run(tmp_path: Path) -> None:
    """Result files hold no sizes of blocks, so the most that train at a step is not known."""
    write(tmp_path / "few", result("LoRA"))
    assert "all that moved" not in seed_methods.section(suite_in(tmp_path))
    blocks = block_selection(steps=60, count=2, seed=0, explores=True)
    write(tmp_path / "more", result("ada", selection=blocks))
    section = seed_methods.section(seed_methods.Suite(name="more", title="", task="", results=tmp_path))
    assert "of methods of blocks all that moved in the run" in section


def test_a_calibration_alone_can_be_packed_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "few-steps"
    folder.mkdir()
    with pytest.raises(UsageError, match="holds no results"):
        pack_results.pack(folder, tmp_path / "packed")
    write_calibration(
        folder,
        calibrate(
            make(tmp_path, {"time_of": "full"}),
            FakeMachine({"full": {"step": 2.0}, "ada": {"explore": 2.0, "exploit": 1.0}}),
        ),
    )
    packed = pack_results.pack(folder, tmp_path / "packed")
    assert list(packed.files) == ["calibration.json.gz"]
    assert pack_results.write(packed, replace=False) == 1
    assert seed_methods.read_calibration(tmp_path / "packed").reference == "full"
    (tmp_path / "few").mkdir()
    (tmp_path / "few" / "notes.json").write_text(json.dumps({}))
    with pytest.raises(UsageError):
        pack_results.pack(tmp_path / "few", tmp_path / "other")
