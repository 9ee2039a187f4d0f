"""The result of a run: PEFT's keys, and beside them our own."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import accumulate
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gradselect.app.evaluate import EvaluationResult
from gradselect.app.recipe import Method

from .job import Job
from .measure import Shipment, items_of, score_of
from .results import FAILED, FORMAT, SUCCESS

Run = Mapping[str, Any]
"""What `run.json` of a training holds."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """All that is known of a run that succeeded.

    Args:
        run: what `run.json` of the training holds.
        scores: by name of the evaluation.
        forgetting: the loss on text that the base knew, "before" and "after".
        shipment: what must be handed on.
        total_seconds: of training and evaluations, loading included.
    """

    run: Run
    scores: Mapping[str, EvaluationResult]
    forgetting: Mapping[str, float] | None
    shipment: Shipment
    total_seconds: float


def describe_success(job: Job, outcome: Outcome) -> dict[str, Any]:
    """The content of the result file of a run that succeeded."""
    run = outcome.run
    return {
        "run_info": _run_info(job, created_at=run["started_at"], total_time=outcome.total_seconds, error=""),
        "train_info": _train_info(job, outcome),
        "meta_info": _meta_info(job, run),
        "gradselect": {
            **_identity(job),
            "seconds": run["seconds"],
            "bytes": _bytes(run["bytes"]),
            "flop": run["flop"],
            "validation_loss": run["validation_loss"],
            "scores": {name: score_of(result) for name, result in outcome.scores.items()},
            "forgetting": outcome.forgetting,
            "items": {name: items_of(result) for name, result in outcome.scores.items()},
            "curves": {"train": _curve(run, "loss"), "validation": _curve(run, "eval_loss")},
            "selection": run["selection"],
        },
    }


def describe_failure(job: Job, *, error: str, total_seconds: float) -> dict[str, Any]:
    """The content of the result file of a run that failed."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return {
        "run_info": _run_info(job, created_at=now, total_time=total_seconds, error=error),
        "train_info": {
            "accelerator_memory_reserved_avg": 0,
            "accelerator_memory_max": 0,
            "accelerator_memory_reserved_99th": 0,
            "train_time": 0.0,
            "file_size": 0,
            "num_trainable_params": 0,
            "num_total_params": 0,
            "status": FAILED,
            "metrics": [],
        },
        "meta_info": {},
        "gradselect": {
            **_identity(job),
            **dict.fromkeys(("seconds", "bytes", "flop", "validation_loss", "forgetting", "selection")),
            **{name: {} for name in ("scores", "items", "curves")},
        },
    }


def method_settings(method: Method) -> dict[str, Any]:
    """The settings of a method as plain values, defaults written out."""
    return method.model_dump(mode="json")


def _identity(job: Job) -> dict[str, Any]:
    """What tells this run from all others."""
    return {
        "format": FORMAT,
        "suite": job.suite,
        "protocol": job.protocol,
        "protocol_settings": job.protocol_settings,
        "method": job.method,
        "method_settings": method_settings(job.recipe.method),
        "lr": job.recipe.optimizer.lr,
        "rates": list(job.rates),
        "rate_at_edge": job.rate_at_edge,
        "seed": job.recipe.run.seed,
        "role": job.role,
        "commit": job.commit,
        "dirty": job.dirty,
        "command": list(job.command),
    }


def _run_info(job: Job, *, created_at: str, total_time: float, error: str) -> dict[str, Any]:
    recipe = job.recipe
    adapter = job.training / "adapter" / "adapter_config.json"
    return {
        "created_at": created_at,
        "total_time": total_time,
        "experiment_name": f"{job.suite}/{job.method}/lr-{recipe.optimizer.lr:.12g}/seed-{recipe.run.seed}",
        "peft_branch": "",
        "train_config": recipe.model_dump(mode="json", exclude={"run": {"output"}}),
        "peft_config": json.loads(adapter.read_text("utf-8")) if adapter.is_file() else None,
        "error_msg": error,
    }


def _train_info(job: Job, outcome: Outcome) -> dict[str, Any]:
    run = outcome.run
    reserved = run["bytes"]["reserved"] or {}
    selection = run["selection"] or {}
    return {
        "accelerator_memory_reserved_avg": reserved.get("average") or 0,
        "accelerator_memory_max": reserved.get("peak") or 0,
        "accelerator_memory_reserved_99th": reserved.get("99th") or 0,
        "train_time": run["training_seconds"],
        "file_size": outcome.shipment.num_bytes,
        "num_trainable_params": selection.get("entries", outcome.shipment.num_trained),
        "num_total_params": run["model"]["parameters"],
        "status": SUCCESS,
        "metrics": [*_progress_rows(job, run), _last_row(job, outcome)],
    }


def _progress_rows(job: Job, run: Run) -> list[dict[str, Any]]:
    """One row for each logged training loss, in PEFT's words; what it measures along the way and we do not is null."""
    curve, allocated, reserved = _curve(run, "loss"), run["bytes"]["allocated"] or {}, run["bytes"]["reserved"] or {}
    return [
        {
            "step": step,
            "valid accuracy": None,
            "train loss": loss,
            "train samples": step * _samples_of_a_step(job),
            "train time": seconds,
            "eval time": None,
            "tokens / sec": run["tokens_per_second"],
            "mem allocated avg": allocated.get("average"),
            "mem reserved avg": reserved.get("average"),
            "elapsed time": seconds,
        }
        for step, seconds, loss in zip(curve["step"], curve["seconds"], curve["loss"], strict=True)
    ]


def _last_row(job: Job, outcome: Outcome) -> dict[str, Any]:
    run, forgetting = outcome.run, outcome.forgetting
    accuracies = [result.accuracy for result in outcome.scores.values() if result.accuracy is not None]
    return {
        "step": run["steps"],
        "test accuracy": accuracies[0] if accuracies else None,
        "train loss": run["training_loss"],
        "train samples": run["steps"] * _samples_of_a_step(job),
        "train total tokens": run["tokens"],
        "forgetting": None if forgetting is None else forgetting["after"] - forgetting["before"],
    }


def _samples_of_a_step(job: Job) -> int:
    return job.recipe.run.batch_size * job.recipe.run.accumulation


def _meta_info(job: Job, run: Run) -> dict[str, Any]:
    import torch

    uname = platform.uname()
    return {
        "model_info": {"id": job.recipe.model.path, **run["model"]},
        "dataset_info": run["data"],
        "package_info": {f"{name}-version": version for name, version in run["versions"].items()},
        "system_info": {
            "system": uname.system,
            "release": uname.release,
            "version": uname.version,
            "machine": uname.machine,
            "processor": uname.processor,
            "accelerator": run["machine"]["device"],
            "cpus": run["machine"]["cpus"],
            "threads": run["machine"]["threads"],
        },
        "pytorch_info": torch.__config__.show(),
    }


def _bytes(measured: Mapping[str, Any]) -> dict[str, Any]:
    """Peaks as numbers; what torch's allocator held in each kind of step beside them."""
    allocated, reserved = measured["allocated"] or {}, measured["reserved"] or {}
    return {
        **measured,
        "allocated": allocated.get("peak"),
        "reserved": reserved.get("peak"),
        "allocated_by_kind": allocated.get("peak_by_kind"),
    }


def _curve(run: Run, key: str) -> dict[str, list[Any]]:
    """The values of `key` that the run has logged, over steps and over seconds of training."""
    logged = [entry for entry in run["history"] if key in entry]
    ends = _ends_of_steps(run)
    return {
        "step": [entry["step"] for entry in logged],
        "seconds": [ends[entry["step"] - 1] if ends else 0.0 for entry in logged],
        "loss": [entry[key] for entry in logged],
    }


def _ends_of_steps(run: Run) -> list[float]:
    """Seconds of training at the end of each step: each as long as the median of its kind, scaled to the whole."""
    by_kind = run["seconds"]["by_kind"]
    explored = (run["selection"] or {}).get("explored") or []
    if len(explored) == run["steps"]:
        kinds = ["explore" if flag else "exploit" for flag in explored]
    else:
        kinds = [next(iter(by_kind), "step")] * run["steps"]
    lengths = [_median_seconds(by_kind, kind) for kind in kinds]
    whole = math.fsum(lengths)
    scale = run["training_seconds"] / whole if whole else 0.0
    return [seconds * scale for seconds in accumulate(lengths)]


def _median_seconds(by_kind: Mapping[str, Mapping[str, float]], kind: str) -> float:
    """A resumed run may have seen no step of this kind in its last session: then as long as any other."""
    known: Sequence[float] = [figures["median"] for name, figures in by_kind.items() if name == kind]
    return known[0] if known else max((figures["median"] for figures in by_kind.values()), default=0.0)
