"""What runs on a GPU alone: its stages, and what the committed results of one say."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY / "benchmarks"))

common = importlib.import_module("common")
gpu = importlib.import_module("gpu")
levers = importlib.import_module("levers")

RESULTS = [REPOSITORY / "benchmarks" / "results" / "gpu" / f"{shape}.json" for shape in gpu.SHAPES]


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    assert gpu.main() == 2
    assert "needs a CUDA device, and there is none; on a CPU: make test" in capsys.readouterr().err


def test_a_stage_that_fails_lets_the_next_one_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    ran: list[str] = []

    class Process:
        def __init__(self, words: list[str], **_: Any) -> None:
            self.script = words[1]
            self.is_interrupted = False
            ran.append(self.script)

        def wait(self, *, timeout: float) -> int:
            assert timeout <= gpu.LIMIT
            if "offload" in self.script and not self.is_interrupted:
                raise subprocess.TimeoutExpired(self.script, timeout)
            return 1 if "levers" in self.script else 0

        def send_signal(self, number: int) -> None:
            assert number == signal.SIGINT
            self.is_interrupted = True

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    monkeypatch.setattr(subprocess, "Popen", Process)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(tmp_path)])
    assert gpu.main() == 1
    assert ran == ["-m", "benchmarks/offload.py", "benchmarks/levers.py", "-m"]
    said = capsys.readouterr().out
    assert f"offload: stopped after {gpu.LIMIT} seconds" in said
    assert "shapes: ended with exit code 1" in said
    for line in ("tests: done", "offload: FAILED", "shapes: FAILED", "smollm2: done"):
        assert line in said


@pytest.mark.parametrize(("answer", "code"), [("raise SystemExit(3)", 3), ("pass", -signal.SIGKILL)])
def test_a_stage_whose_time_is_over_may_end_its_own_processes(answer: str, code: int) -> None:
    """It was killed at once, and the runs of a comparison trained on beside the next stage."""
    script = (
        f"import signal, time\ndef end(*_): {answer}\nsignal.signal(signal.SIGINT, end)\n"
        "print('ready', flush=True)\nwhile True: time.sleep(0.01)"
    )
    with subprocess.Popen([sys.executable, "-S", "-c", script], stdout=subprocess.PIPE) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == b"ready\n"
        gpu.interrupt(running, grace=60 if code > 0 else 0.1)
        assert running.returncode == code


def test_other_tests_see_no_gpu() -> None:
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""


def test_the_commands_of_the_stages_exist() -> None:
    for commands in gpu.stages(out=Path("out"), processes=2).values():
        for command in commands:
            assert command[0] == "-m" or (REPOSITORY / command[0]).is_file()
    presets = [command[-3] for command in gpu.stages(out=Path("out"), processes=2)["shapes"]]
    assert set(presets) <= set(levers.PRESETS)
    assert set(gpu.SETTINGS) <= set(levers.ON_GPU)
    suite = gpu.stages(out=Path("out"), processes=2)["smollm2"][0][3]
    assert (REPOSITORY / suite).is_file()


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_the_results_are_those_of_the_stage(path: Path) -> None:
    """`make gpu` measured all settings of `levers.py`, whose result would have failed the next test."""
    assert [row["name"] for row in common.read_result(path)["rows"]] == list(gpu.SETTINGS)


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_the_plan_is_the_peak_of_the_allocator_where_nothing_grows(path: Path) -> None:
    """The plans in the file are those of today, and differ from what was measured by at most 0.4 %."""
    result = common.read_result(path)
    preset = levers.PRESETS[result["settings"]["preset"]]
    steady = [row for row in result["rows"] if row["levers"]["policy"] == "all" and row["planned"]]
    assert len(steady) == 4
    for row in steady:
        workspace = max(other["left_before"] for other in result["rows"])  # cuBLAS keeps it from the first product on
        assert row["bytes"]["peak"] - workspace == pytest.approx(row["planned"], rel=0.004), row["name"]
    row = steady[0]
    assert levers.planned_bytes(preset, levers.Setting(**row["levers"])) == row["planned"]


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_selecting_blocks_takes_less_memory_than_full_and_lora(path: Path) -> None:
    rows = {row["name"]: row for row in common.read_result(path)["rows"]}
    assert rows["AdaGradSelect 20 %, offload"]["planned"] < rows["LoRA r=32"]["bytes"]["peak"]
    assert rows["LoRA r=32"]["bytes"]["peak"] < rows["full AdamW"]["bytes"]["peak"]
