"""Published evaluations through lm-eval, EleutherAI's language model evaluation harness."""

from __future__ import annotations

import difflib
import importlib.util
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gradselect.app.models import register_own_adapters
from gradselect.app.recipe import EvaluationSettings
from gradselect.files import make_folder, sealed, write_atomically
from gradselect.usage import UsageError

from .language_model import check_folder, resolve_device
from .results import check_new_folder, plain_settings, to_json, versions


@dataclass(frozen=True, kw_only=True)
class HarnessResult:
    """Figures from lm-eval.

    Args:
        scores: by task, then by lm-eval's name of the metric, such as "exact_match,strict-match"; its standard error
            is "exact_match_stderr,strict-match".
        seconds: wall-clock time, including loading the model.
        settings: settings as given.
        versions: versions of the software.
    """

    scores: Mapping[str, Mapping[str, float]]
    seconds: float
    settings: Mapping[str, Any]
    versions: Mapping[str, str]


def run_harness(settings: EvaluationSettings) -> HarnessResult:
    """Run the lm-eval tasks of `settings.harness` on the model, with the tasks' own prompts and decoding.

    With `settings.output`, `harness.json` holds the whole report of lm-eval, and `samples_<task>.jsonl` its items.

    Raises:
        UsageError: lm-eval is not installed, it knows no such task, or the settings name none.

    Example:
        >>> settings = EvaluationSettings(model="out/model", harness=("gsm8k",))
        >>> run_harness(settings).scores["gsm8k"]  # doctest: +SKIP
        {'exact_match,strict-match': 0.41, 'exact_match_stderr,strict-match': 0.013, ...}
    """
    if not settings.harness:
        raise UsageError("harness names no task; write e.g. harness=('gsm8k',)")
    if settings.output is not None:
        check_new_folder(settings.output)
        make_folder(Path(settings.output), name="output")
    check_folder(settings.model)
    started = time.perf_counter()
    report = _simple_evaluate(settings)
    result = HarnessResult(
        scores={task: _numbers(metrics) for task, metrics in report["results"].items()},
        seconds=time.perf_counter() - started,
        settings=plain_settings(settings),
        versions={**versions("torch", "transformers"), "lm-eval": report["lm_eval_version"]},
    )
    if settings.output is not None:
        _write(Path(settings.output), report, result)
    return result


def _simple_evaluate(settings: EvaluationSettings) -> dict[str, Any]:
    if importlib.util.find_spec("lm_eval") is None:
        raise UsageError("harness needs lm-eval; run: pip install 'lm-eval[hf]'")
    from lm_eval import simple_evaluate  # pyright: ignore[reportMissingImports]
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    arguments = _model_arguments(settings)
    # A few tasks read the model's arguments to fit their texts to its tokenizer.
    manager = TaskManager(metadata=arguments)
    return simple_evaluate(
        model="hf",
        model_args=arguments,
        tasks=_known_tasks(settings.harness, manager),
        task_manager=manager,
        num_fewshot=settings.num_fewshot,
        batch_size=settings.batch_size,
        device=str(resolve_device(settings.device)),
        limit=settings.limit,
        apply_chat_template=settings.as_chat,
        log_samples=settings.output is not None,
    )


def _model_arguments(settings: EvaluationSettings) -> dict[str, str]:
    adapter = Path(settings.model) / "adapter_config.json"
    if not adapter.is_file():
        return {"pretrained": str(settings.model), "dtype": settings.dtype}
    register_own_adapters(settings.model)  # in the process in which lm-eval loads it
    base = json.loads(adapter.read_text("utf-8"))["base_model_name_or_path"]
    return {"pretrained": base, "peft": str(settings.model), "dtype": settings.dtype}


def _known_tasks(names: Sequence[str], manager: Any) -> list[str]:
    """Return the tasks that match the names, or patterns such as "mmlu_*"."""
    found = {name: manager.match_tasks([name]) for name in names}
    unknown = [name for name, tasks in found.items() if not tasks]
    if unknown:
        near = difflib.get_close_matches(unknown[0], manager.all_tasks, n=3)
        instead = f"did you mean {' or '.join(near)}?" if near else "all names: lm-eval ls tasks"
        raise UsageError(f"lm-eval has no task {unknown[0]!r}; {instead}")
    return [task for tasks in found.values() for task in tasks]


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics without the names and counts beside them; drop standard errors that are not numbers."""
    return {name: float(value) for name, value in metrics.items() if "," in name and isinstance(value, int | float)}


def _write(folder: Path, report: Mapping[str, Any], result: HarnessResult) -> None:
    for task, samples in report["samples"].items():
        write_atomically(folder / f"samples_{task}.jsonl", "".join(json.dumps(s, default=str) + "\n" for s in samples))
    rest = {name: value for name, value in report.items() if name != "samples"}
    write_atomically(folder / "harness.json", to_json(sealed({**asdict(result), "report": rest})))
