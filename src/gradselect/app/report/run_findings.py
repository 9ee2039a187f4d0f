"""Main figures of a run in words, for the top of its page and for the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields

from gradselect.app.evaluate import EvaluationResult, SavedEvaluation
from gradselect.core import BlockHistory, EntryHistory

from . import number_format as words
from .methods import ratio
from .training_run import REWARD_FIGURES, Points, TrainingRun

FEW = 6
"""Largest number of names in a sentence; further ones are counted."""


def run_findings(run: TrainingRun) -> Iterator[tuple[str, str]]:
    """Yield a word for each figure and its sentence."""
    yield "status", _status(run)
    yield from (("loss", sentence) for sentence in _losses(run))
    for key in ("reward", "rewards/accuracies"):
        if points := run.logged(key):
            yield "reward", _course(REWARD_FIGURES[key], points)
    if isinstance(run.selection, BlockHistory) and run.selection.steps:
        yield "blocks", _blocks(run.selection)
    if isinstance(run.selection, EntryHistory) and run.selection.steps:
        yield "entries", _entries(run, run.selection)
    yield from (("memory", sentence) for sentence in _bytes(run))
    yield from (("time", sentence) for sentence in _time(run))
    if run.skipped_steps:
        yield "skipped", f"{words.plural(run.skipped_steps, 'step')} skipped, because gradients were not finite."
    yield from (("answers", f"{summary(one)} ({one.folder.name}).") for one in run.evaluations)
    yield from (("note", f"{words.upper_first(note)}.") for note in run.notes)


def summary(evaluation: SavedEvaluation) -> str:
    """Return an evaluation's own line: "gsm8k: accuracy 41.2 % ..."."""
    known = {field.name for field in fields(EvaluationResult)}
    values = {name: value for name, value in evaluation.values.items() if name in known}
    try:
        return EvaluationResult(**values, items=evaluation.items).summary()
    except (TypeError, ValueError):  # of an older version, which wrote other fields
        return f"{evaluation.values['task']}: {evaluation.values['num_items']} items"


def _status(run: TrainingRun) -> str:
    of = f" of {run.planned_steps:,}" if run.planned_steps else ""
    text = f"{'Finished' if run.is_finished else 'Not finished'}: {run.num_steps:,}{of} steps"
    if run.record is None:
        return f"{text}." if run.planned_steps else f"{run.num_steps:,} steps are recorded."
    resumed = f", resumed from {run.record.resumed_from}" if run.record.resumed_from else ""
    on = f", on {run.record.processes} processes" if run.record.processes > 1 else ""
    return f"{text}{resumed}{on}."


def _losses(run: TrainingRun) -> Iterator[str]:
    if run.losses:
        yield _course("Training loss", run.losses)
    if run.num_not_finite:
        yield f"{words.plural(run.num_not_finite, 'logged training loss')} NaN or infinite."
    for name, points in run.validation.items():
        lowest = min(points, key=lambda point: point[1])
        low = f"; the lowest, {words.number(lowest[1])}, at step {lowest[0]:,}" if lowest[1] < points[-1][1] else ""
        title = "Validation loss" if name == "validation" else f"Validation loss of {name}"
        yield f"{_course(title, points).removesuffix('.')}{low}."


def _course(title: str, points: Points) -> str:
    (first, start), (last, end) = points[0], points[-1]
    if len(points) == 1:
        return f"{title} {words.number(end)} at step {last:,}."
    return f"{title} {words.number(start)} at step {first:,}, {words.number(end)} at step {last:,}."


def _blocks(history: BlockHistory) -> str:
    updates, num_steps = history.updates, len(history.steps)
    mean = sum(updates.values()) / num_steps
    share = words.share(ratio(mean, len(updates)))
    most = [name for name in sorted(updates, key=lambda name: -updates[name])[:3] if updates[name]]
    never = [name for name, count in updates.items() if not count]
    sentences = [
        f"A step trained {words.number(mean, digits=1)} of {len(updates)} blocks on average ({share})",
        f"{sum(history.explored):,} of {words.plural(num_steps, 'step')} explored",
        f"most updates: {', '.join(f'{name} {updates[name]:,}' for name in most)}",
        *([f"never trained: {_few(never)}"] if never else []),
    ]
    return "; ".join(sentences) + "."


def _entries(run: TrainingRun, history: EntryHistory) -> str:
    choices = None if run.mask is None else run.mask.entries_to_choose_from
    of = "" if not choices else f" of {choices:,} ({words.share(history.entries[-1] / choices, digits=2)})"
    mean = sum(history.overlap) / len(history.overlap)
    tensors = words.plural(len(history.by_tensor), "tensor")
    return (
        f"{history.entries[-1]:,}{of} entries train at the last step, in {tensors}; "
        f"from step to step {words.share(mean, digits=1)} of them stay on average."
    )


def _bytes(run: TrainingRun) -> Iterator[str]:
    if run.finished is not None:
        peak = run.finished.bytes.peak
        host = f", {words.num_bytes(peak['state_on_host'])} on the host" if peak.get("state_on_host") else ""
        yield (
            f"At the peak {words.num_bytes(peak.get('together'))} of weights, gradients and optimizer state together; "
            f"optimizer state {words.num_bytes(peak.get('state_on_device'))} on the device{host}."
        )
    elif run.selection is not None and run.selection.steps:
        yield f"Optimizer state and masters: at most {words.num_bytes(max(run.selection.state_bytes))} on the device."
    if run.blocks is not None and any(run.blocks.moved_bytes):
        mean = sum(run.blocks.moved_bytes) / len(run.blocks.moved_bytes)
        yield f"{words.num_bytes(mean)} moved between device and host in a step on average."


def _time(run: TrainingRun) -> Iterator[str]:
    if run.finished is not None:
        session = " in the last session" if run.finished.resumed_from else ""
        rate = run.finished.tokens_per_second
        per_second = "" if rate is None else f", {words.significant(rate)} tokens/s"
        yield f"{words.seconds(run.finished.training_seconds)} in training steps{per_second}{session}."
    elif run.record is None and (points := run.logged("train_runtime")):
        yield f"{words.seconds(points[-1][1])} in train()."


def _few(names: list[str]) -> str:
    return words.joined(names if len(names) <= FEW else [*names[: FEW - 1], f"{len(names) - FEW + 1} more"])
