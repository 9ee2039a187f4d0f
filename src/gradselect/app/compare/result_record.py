"""Content of a result file, from a job and what came of it."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import accumulate
from statistics import fmean
from typing import TYPE_CHECKING, Any

from gradselect.app.recipe import draws_answers
from gradselect.app.results import (
    FAILED,
    FORMAT,
    SUCCESS,
    BlockSelection,
    ComparedRun,
    Curve,
    FinishedRun,
    Forgetting,
    HeldBytes,
    MaskSelection,
    ResultFile,
    RunInfo,
    StepSeconds,
    TrainInfo,
)

from .job import Job
from .measure import Shipment, items_of, score_of

if TYPE_CHECKING:
    from gradselect.app.evaluate import EvaluationResult


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Everything known of a run that succeeded.

    Args:
        run: `run.json` of the training.
        scores: by name of the evaluation.
        forgetting: losses on text that the base model knew.
        shipment: size of the file to ship.
        total_seconds: of training and evaluations, loading included.
    """

    run: FinishedRun
    scores: Mapping[str, EvaluationResult]
    forgetting: Forgetting | dict[str, Forgetting] | None
    shipment: Shipment
    total_seconds: float


def describe_success(job: Job, outcome: Outcome) -> ResultFile:
    """Return the result of a run that succeeded."""
    run = outcome.run
    return ResultFile(
        run_info=_run_info(job, created_at=run.started_at, total_time=outcome.total_seconds, error=""),
        train_info=_train_info(job, outcome),
        meta_info=_meta_info(job, run),
        gradselect=ComparedRun(
            **_identity(job),
            **_session(run),
            bytes=_held_bytes(run),
            flop=run.flop,
            validation_loss=run.validation_loss,
            scores={name: score_of(result, job.evaluations[name].metric) for name, result in outcome.scores.items()},
            forgetting=outcome.forgetting,
            items={name: items_of(result) for name, result in outcome.scores.items()},
            curves=curves(run),
            selection=run.selection,
        ),
    )


def describe_failure(job: Job, *, error: str, total_seconds: float) -> ResultFile:
    """Return the result of a run that failed."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return ResultFile(
        run_info=_run_info(job, created_at=now, total_time=total_seconds, error=error),
        train_info=TrainInfo(
            accelerator_memory_reserved_avg=0,
            accelerator_memory_max=0,
            accelerator_memory_reserved_99th=0,
            train_time=0.0,
            file_size=0,
            num_trainable_params=0,
            num_total_params=0,
            status=FAILED,
            metrics=[],
        ),
        meta_info={},
        gradselect=ComparedRun(
            **_identity(job),
            seconds=None,
            bytes=None,
            flop=None,
            validation_loss=None,
            scores={},
            forgetting=None,
            items={},
            curves={},
            selection=None,
        ),
    )


def _identity(job: Job) -> dict[str, Any]:
    """Return what tells this run from all others."""
    return {
        "format": FORMAT,
        "suite": job.suite,
        "protocol": job.protocol,
        "protocol_settings": dict(job.protocol_settings),
        "method": job.method,
        "method_settings": job.recipe.method.model_dump(mode="json"),
        "lr": job.recipe.optimizer.lr,
        "rates": list(job.rates),
        "rate_at_edge": job.rate_at_edge,
        "seed": job.recipe.run.seed,
        "role": job.role,
        "commit": job.commit,
        "dirty": job.dirty,
        "command": list(job.command),
        # Without a budget, alone and at full length there is no key, as in results of earlier versions.
        **({} if job.budget is None else {"budget": job.budget}),
        **({} if job.jobs == 1 else {"jobs": job.jobs}),
        **({} if job.share == 1 else {"share": job.share}),
    }


def _run_info(job: Job, *, created_at: str, total_time: float, error: str) -> RunInfo:
    recipe = job.recipe
    adapter = job.training / "adapter" / "adapter_config.json"
    return RunInfo(
        created_at=created_at,
        total_time=total_time,
        experiment_name=f"{job.suite}/{job.method}/lr-{recipe.optimizer.lr:.12g}/seed-{recipe.run.seed}{_length(job)}",
        peft_branch="",
        train_config=recipe.model_dump(mode="json", exclude={"run": {"output"}}),
        peft_config=json.loads(adapter.read_text("utf-8")) if adapter.is_file() else None,
        error_msg=error,
    )


def _length(job: Job) -> str:
    return "" if job.share == 1 else f"/share-{job.share:.12g}"


def _train_info(job: Job, outcome: Outcome) -> TrainInfo:
    run, reserved, selection = outcome.run, outcome.run.bytes.reserved, outcome.run.selection
    num_trained = outcome.shipment.num_trained
    if isinstance(selection, MaskSelection):
        num_trained = selection.entries + (selection.whole_entries or 0)
    return TrainInfo(
        accelerator_memory_reserved_avg=(reserved and reserved.average) or 0,
        accelerator_memory_max=(reserved and reserved.peak) or 0,
        accelerator_memory_reserved_99th=(reserved and reserved.percentile_99) or 0,
        train_time=_training_seconds(run),
        file_size=outcome.shipment.num_bytes,
        num_trainable_params=num_trained,
        num_total_params=run.model.parameters,
        status=SUCCESS,
        metrics=[*_progress_rows(job, run), _last_row(job, outcome)],
    )


def _progress_rows(job: Job, run: FinishedRun) -> list[dict[str, Any]]:
    """Return one row for each logged training loss, in PEFT's words. Figures that PEFT has and we have not are null."""
    curve, allocated, reserved = _curve(run, "loss"), run.bytes.allocated, run.bytes.reserved
    return [
        {
            "step": step,
            "valid accuracy": None,
            "train loss": loss,
            "train samples": step * _samples_per_step(job),
            "train time": seconds,
            "eval time": None,
            "tokens / sec": run.tokens_per_second,
            "mem allocated avg": allocated and allocated.average,
            "mem reserved avg": reserved and reserved.average,
            "elapsed time": seconds,
        }
        for step, seconds, loss in zip(curve.step, curve.seconds, curve.loss, strict=True)
    ]


def _last_row(job: Job, outcome: Outcome) -> dict[str, Any]:
    run, sets = outcome.run, outcome.forgetting
    rises = [one.rise for one in ([sets] if isinstance(sets, Forgetting) else (sets or {}).values())]
    accuracies = [result.accuracy for result in outcome.scores.values() if result.accuracy is not None]
    return {
        "step": run.steps,
        "test accuracy": accuracies[0] if accuracies else None,
        "train loss": run.training_loss,
        "train samples": run.steps * _samples_per_step(job),
        # Of a resumed run only those of its last session are known.
        "train total tokens": run.tokens if run.resumed_from is None else None,
        "forgetting": fmean(rises) if rises else None,
    }


def _samples_per_step(job: Job) -> int:
    return job.recipe.run.batch_size * job.recipe.run.accumulation


def _meta_info(job: Job, run: FinishedRun) -> dict[str, Any]:
    import torch

    uname = platform.uname()
    return {
        "model_info": {"id": job.recipe.model.path, **run.model.values()},
        "dataset_info": run.data,
        "package_info": {f"{name}-version": version for name, version in run.versions.items()},
        "system_info": {
            "system": uname.system,
            "release": uname.release,
            "version": uname.version,
            "machine": uname.machine,
            "processor": uname.processor,
            "accelerator": run.machine.device,
            "cpus": run.machine.cpus,
            "threads": run.machine.threads,
        },
        "pytorch_info": torch.__config__.show(),
    }


def _held_bytes(run: FinishedRun) -> HeldBytes:
    """Return peaks as numbers, and beside them what torch's allocator held in each kind of step."""
    measured = run.bytes
    return HeldBytes(
        peak=measured.peak,
        average=measured.average,
        process=measured.process,
        allocated=measured.allocated and measured.allocated.peak,
        reserved=measured.reserved and measured.reserved.peak,
        allocated_by_kind=measured.allocated and measured.allocated.peak_by_kind,
    )


def curves(run: FinishedRun) -> dict[str, Curve]:
    """Return the losses that the run logged, over steps and over seconds of training."""
    train = {"train": _curve(run, "loss")}
    return train if draws_answers(run.recipe) else {**train, "validation": _curve(run, "eval_loss")}


def _curve(run: FinishedRun, key: str) -> Curve:
    """Return the logged values of `key`, over steps and over seconds of training."""
    logged = [entry for entry in run.history if key in entry]
    ends = _ends_of_steps(run)
    return Curve(
        step=[entry["step"] for entry in logged],
        seconds=[ends[entry["step"] - 1] if ends else 0.0 for entry in logged],
        loss=[entry[key] for entry in logged],
    )


def _session(run: FinishedRun) -> dict[str, Any]:
    """Return the seconds of the run and, if it was resumed, from where; results of whole runs have no such key."""
    if run.resumed_from is None:
        return {"seconds": run.seconds}
    seconds = run.seconds.model_copy(update={"training": _training_seconds(run)})
    return {"seconds": seconds, "resumed_from": run.resumed_from}


def _training_seconds(run: FinishedRun) -> float | None:
    """Return the seconds of the whole training; of a resumed run those of its last session, extended to all steps."""
    if run.resumed_from is None:
        return run.training_seconds
    ends = _ends_of_steps(run)
    return ends[-1] if ends and ends[-1] > 0 else None


def _ends_of_steps(run: FinishedRun) -> list[float]:
    """Return the seconds of training at the end of each step.

    Each step counts as the median of its kind; the sum is scaled to the seconds of the whole training. Those of a
    resumed run are of its last session, and so are the steps that were measured.
    """
    by_kind = run.seconds.by_kind
    explored = run.selection.explored if isinstance(run.selection, BlockSelection) else []
    if len(explored) == run.steps:
        kinds = ["explore" if flag else "exploit" for flag in explored]
    else:
        kinds = [next(iter(by_kind), "step")] * run.steps
    lengths = [_median_seconds(by_kind, kind) for kind in kinds]
    whole = math.fsum(lengths)
    if run.resumed_from is not None:
        whole = math.fsum(figures.steps * figures.median for figures in by_kind.values())
    scale = run.training_seconds / whole if whole else 0.0
    return [seconds * scale for seconds in accumulate(lengths)]


def _median_seconds(by_kind: Mapping[str, StepSeconds], kind: str) -> float:
    """Return the median of a kind. A resumed run may lack the kind in its last session: then the longest median."""
    known = by_kind.get(kind)
    return known.median if known else max((figures.median for figures in by_kind.values()), default=0.0)
