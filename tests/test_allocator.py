"""Main memory that a training on the CPU keeps between its steps."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from train_fixtures import parse, quiet, write_model, write_sums

from gradselect.app.compare import turn
from gradselect.app.evaluate import language_model
from gradselect.app.recipe import EvaluationSettings
from gradselect.app.runtime import allocator, keep_freed_memory
from gradselect.app.train import run, train

needs_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc gives large blocks back at once")

MEASURE = f"""
import importlib.util, resource, sys
from types import SimpleNamespace

BLOCK = 128 * 2**20
sys.modules["torch"] = SimpleNamespace()  # a CPU asks nothing of it, and its import takes seconds
if "keep" in sys.argv:
    spec = importlib.util.spec_from_file_location("allocator", {allocator.__file__!r})
    allocator = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(allocator)
    if "old" in sys.argv:
        allocator._MMAP_THRESHOLD = 1  # the largest of the fast blocks: glibc refuses so large a value
    assert allocator.keep_freed_memory("cpu")
bytearray(BLOCK)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
again = bytearray(BLOCK)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.fixture(autouse=True)
def glibc_as_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("MALLOC_", "GLIBC_TUNABLES"))]:
        monkeypatch.delenv(name)


def faults_of_a_second_block(*arguments: str) -> int:
    """Return the page faults of memory that was freed just before, in a process of its own: settings stay with it."""
    command = [sys.executable, "-c", MEASURE, *arguments]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@needs_glibc
def test_freed_memory_is_used_again_without_page_faults() -> None:
    assert faults_of_a_second_block() >= 64  # 2 MB pages at the largest
    assert faults_of_a_second_block("keep") < 8


@needs_glibc
def test_an_old_glibc_that_refuses_the_threshold_keeps_memory_too() -> None:
    assert faults_of_a_second_block("keep", "old") < 8


@needs_glibc
def test_a_variable_about_something_else_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_ARENA_MAX", "2")
    assert faults_of_a_second_block("keep") < 8


@pytest.mark.parametrize("variable", ["MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"])
def test_settings_of_the_user_stay(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "1")
    assert not keep_freed_memory("cpu")


def test_an_accelerator_keeps_its_own_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert not keep_freed_memory("auto")


@needs_glibc
def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert not keep_freed_memory("cpu")


@pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")
def test_train_evaluate_and_the_calibration_of_compare_ask_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_model(tmp_path / "model")
    write_sums(tmp_path / "sums.jsonl")
    asked = []
    for module in (run, turn, language_model):
        monkeypatch.setattr(module, "keep_freed_memory", lambda device, module=module: asked.append((module, device)))
    recipe = parse(tmp_path, run={"output": str(tmp_path / "out"), "steps": 1, "device": "cpu"})
    train(recipe, console=quiet())
    language_model.load(EvaluationSettings(model=tmp_path / "out", task="loss", data=tmp_path / "sums.jsonl"))
    turn.measure_turn(recipe, method="ours", number=0, steps=3)
    assert asked[:2] == [(run, "cpu"), (language_model, "cpu")]
    assert (turn, "cpu") in asked
