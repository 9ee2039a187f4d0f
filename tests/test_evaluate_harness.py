"""The call of lm-eval, which a fake module replaces."""

from __future__ import annotations

import importlib.machinery
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from gradselect import UsageError
from gradselect.app.evaluate import EvaluationSettings, evaluate, run_harness

REPORT = {
    "results": {
        "gsm8k": {
            "alias": "gsm8k",
            "sample_len": 7,
            "exact_match,strict-match": 0.5,
            "exact_match_stderr,strict-match": 0.1,
            "bleu,none": 3.0,
            "bleu_stderr,none": "N/A",
        }
    },
    "lm_eval_version": "0.4.13",
    "samples": {"gsm8k": [{"doc_id": 0, "resps": [["18"]]}, {"doc_id": 1, "odd": {1}}]},
    "config": {"model": "hf", "model_dtype": complex},
}


class FakeTaskManager:
    all_tasks = ("gsm8k", "mmlu_law", "mmlu_history")

    def __init__(self, *, metadata: dict[str, str]) -> None:
        self.metadata = metadata

    def match_tasks(self, patterns: list[str]) -> list[str]:
        import fnmatch

        return sorted(task for task in self.all_tasks for pattern in patterns if fnmatch.fnmatch(task, pattern))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Arguments of the calls of the fake `lm_eval.simple_evaluate`."""
    received: list[dict[str, Any]] = []

    def simple_evaluate(**arguments: Any) -> dict[str, Any]:
        received.append(arguments)
        return {name: REPORT[name] for name in REPORT if name != "samples" or arguments["log_samples"]}

    package, tasks = ModuleType("lm_eval"), ModuleType("lm_eval.tasks")
    package.__spec__ = importlib.machinery.ModuleSpec("lm_eval", None, is_package=True)
    vars(package).update(simple_evaluate=simple_evaluate, tasks=tasks)
    vars(tasks).update(TaskManager=FakeTaskManager)
    monkeypatch.setitem(sys.modules, "lm_eval", package)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", tasks)
    return received


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    return tmp_path / "model"


def test_the_settings_reach_the_harness(calls: list[dict[str, Any]], model: Path) -> None:
    run_harness(
        EvaluationSettings(
            model=model, harness=("gsm8k",), num_fewshot=5, batch_size=4, limit=10, device="cpu", dtype="bfloat16"
        )
    )
    (arguments,) = calls
    assert arguments.pop("task_manager").metadata == arguments["model_args"]
    assert arguments == {
        "model": "hf",
        "model_args": {"pretrained": str(model), "dtype": "bfloat16"},
        "tasks": ["gsm8k"],
        "num_fewshot": 5,
        "batch_size": 4,
        "device": "cpu",
        "limit": 10,
        "apply_chat_template": False,
        "log_samples": False,
    }


def test_the_call_fits_the_harness_where_it_is_installed(calls: list[dict[str, Any]], model: Path) -> None:
    run_harness(EvaluationSettings(model=model, harness=("gsm8k",), device="cpu"))
    for name in ("lm_eval", "lm_eval.tasks"):
        del sys.modules[name]
    lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    import inspect

    inspect.signature(lm_eval.simple_evaluate).bind(**calls[0])


def test_scores_are_the_metrics_of_each_task(calls: list[dict[str, Any]], model: Path) -> None:
    result = run_harness(EvaluationSettings(model=model, harness=("gsm8k",), device="cpu"))
    assert result.scores == {
        "gsm8k": {"exact_match,strict-match": 0.5, "exact_match_stderr,strict-match": 0.1, "bleu,none": 3.0}
    }
    assert result.versions["lm-eval"] == "0.4.13"


def test_the_whole_report_and_every_sample_are_written(
    calls: list[dict[str, Any]], model: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    result = run_harness(EvaluationSettings(model=model, harness=("gsm8k",), device="cpu", output=output))
    stored = json.loads((output / "harness.json").read_text("utf-8"))
    assert stored["scores"] == result.scores
    assert stored["report"]["config"]["model"] == "hf"
    assert "samples" not in stored["report"]
    samples = (output / "samples_gsm8k.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(sample)["doc_id"] for sample in samples] == [0, 1]
    with pytest.raises(UsageError, match="exists already"):
        run_harness(EvaluationSettings(model=model, harness=("gsm8k",), device="cpu", output=output))
    assert len(calls) == 1


def test_a_pattern_stands_for_all_its_tasks(calls: list[dict[str, Any]], model: Path) -> None:
    run_harness(EvaluationSettings(model=model, harness=("mmlu_*", "gsm8k"), device="cpu"))
    assert calls[0]["tasks"] == ["mmlu_history", "mmlu_law", "gsm8k"]


@pytest.mark.usefixtures("calls")
@pytest.mark.parametrize(("name", "instead"), [("gsm9k", "did you mean gsm8k?"), ("zzz", "lm-eval ls tasks")])
def test_an_unknown_task_is_named(model: Path, name: str, instead: str) -> None:
    with pytest.raises(UsageError, match=f"lm-eval has no task '{name}'") as error:
        run_harness(EvaluationSettings(model=model, harness=("gsm8k", name), device="cpu"))
    assert instead in str(error.value)


def test_an_adapter_is_loaded_onto_its_base(calls: list[dict[str, Any]], model: Path) -> None:
    (model / "config.json").unlink()
    (model / "adapter_config.json").write_text('{"base_model_name_or_path": "base"}')
    run_harness(EvaluationSettings(model=model, harness=("gsm8k",), device="cpu"))
    assert calls[0]["model_args"] == {"pretrained": "base", "peft": str(model), "dtype": "auto"}


def test_without_the_harness_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch, model: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'lm-eval\[hf\]'"):
        run_harness(EvaluationSettings(model=model, harness=("gsm8k",)))


def test_the_harness_and_the_own_tasks_are_not_mixed_up(model: Path) -> None:
    with pytest.raises(UsageError, match="harness names no task"):
        run_harness(EvaluationSettings(model=model, task="gsm8k"))
    with pytest.raises(UsageError, match="call run_harness"):
        evaluate(EvaluationSettings(model=model, harness=("gsm8k",)))
