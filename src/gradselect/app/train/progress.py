"""Lines at the start and at the end of a run."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from gradselect.app.data import columns_of, ending_of, holds_messages, names_split
from gradselect.app.models import merge_command
from gradselect.app.progress import fitted
from gradselect.app.recipe import (
    BUILT_IN_REWARDS,
    AbstractSamplingTrainer,
    ClassificationData,
    FileData,
    PreferenceData,
    PromptCompletionData,
    PromptData,
    RandomData,
    Recipe,
    TextData,
    as_typed,
)
from gradselect.app.results import FinishedRun, RunRecord, SavedModel
from gradselect.app.runtime import RunFolder, describe_messages


def show_start(
    console: Console,
    start: RunRecord,
    *,
    notes: Sequence[str],
    checkpoint: Path | None,
    damaged: Mapping[Path, str],
    resume: bool,
) -> None:
    """Show model, data and method, and the checkpoint to resume from, with those that were damaged."""
    recipe = start.recipe
    lines = [
        f"model      {recipe['model']['path']} ({start.model.parameters:,} parameters, {recipe['model']['dtype']})",
        *(f"{name:<10} {source['path']}, {source['rows_used']:,} rows" for name, source in start.data.items()),
        f"method     {recipe['method']['name']}",
        *([f"trainer    {recipe['trainer']['name']}"] if recipe.get("trainer") else []),
        *(f"note       {note}" for note in notes),
    ]
    lines += [f"damaged    {path}: {fault}; not used, kept as damaged-{path.name}" for path, fault in damaged.items()]
    if resume:
        lines.append(f"resume     {checkpoint or 'no checkpoint yet: from the first step'}")
    _print(console, *(fitted(line, console, indent=11) for line in lines))


def show_summary(
    console: Console,
    end: FinishedRun,
    *,
    recipe: Recipe,
    folder: RunFolder,
    messages: Sequence[str],
    first_row: Mapping[str, Any],
) -> None:
    """Show the outcome, the files and what to type next, which depends on the form of the first row of the data."""
    losses = {"training loss": end.training_loss, "validation loss": end.validation_loss}
    lines = [
        "  ".join([f"finished {end.steps} steps in {end.training_seconds:,.0f} s", *_named_losses(losses)]),
    ]
    if peak := end.peak_bytes["together"]:  # none if a resume took no step
        lines.append(f"peak of weights, gradients and optimizer state: {peak / 2**20:,.1f} MiB")
    if isinstance(recipe.data, RandomData):
        _print(console, *lines, f"record of the run in {folder.run_file}; a model trained on random tokens is not kept")
        return
    lines += _saved_lines(end.saved or SavedModel(), recipe=recipe, folder=folder)
    if (about := describe_messages(messages, folder.messages_file)) is not None:
        lines.append(about)
    following = _next_command(recipe, recipe.data, first_row)
    others = [shlex.join(["gradselect", name, recipe.run.output]) for name in _other_commands(recipe.data, following)]
    _print(console, *lines, f"also: {', '.join(others)}", f"next: {following}")


def _saved_lines(saved: SavedModel, *, recipe: Recipe, folder: RunFolder) -> list[str]:
    """Say what is in the folder of the run beside the weights, and what is not."""
    if saved.form == "adapter":
        lines = [
            f"adapter in {folder.root}, record of the run in {folder.run_file}. Its base {recipe.model.path} is "
            "quantised and cannot take the sum: it stays as it is. To merge it into an unquantised copy of the base:",
            f"  {merge_command(folder.adapter, base='UNQUANTISED_BASE')}",
        ]
    else:
        lines = [f"model in {folder.root}, record of the run in {folder.run_file}"]
    beside = [f"copied from the base: {_named(saved.beside_the_weights)}"] if saved.beside_the_weights else []
    if saved.untrained_weights:
        beside.append(f"left out, because they hold its untrained weights: {_named(saved.untrained_weights)}")
    if saved.turn_ends:
        beside.append(f"generate() also stops at {', '.join(saved.turn_ends)}")
    return lines + (["; ".join(beside)] if beside else [])


def _named(names: Sequence[str], *, most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _named_losses(losses: Mapping[str, float | None]) -> list[str]:
    return [f"{name} {loss:.4f}" for name, loss in losses.items() if loss is not None]


def _next_command(recipe: Recipe, data: FileData, first_row: Mapping[str, Any]) -> str:
    """Return the command that evaluates the trained model with the templates of its training.

    It is a chat where no evaluation reads such data: answers with labels, rewards of the user, answers in messages.
    """
    if not _is_evaluated(recipe, data, first_row):
        return shlex.join(["gradselect", "chat", recipe.run.output])
    task = "classification" if isinstance(data, ClassificationData) else "loss"
    if isinstance(recipe.trainer, AbstractSamplingTrainer):
        task = next((name for name in recipe.trainer.reward if name in BUILT_IN_REWARDS), "gsm8k")
    words = ["gradselect", "evaluate", recipe.run.output, "--task", task, *_validation_options(data)]
    words += [word for name, text in _templates(data).items() if text for word in (name, as_typed(text))]
    if isinstance(data, PromptCompletionData | PreferenceData | PromptData):
        words += ["--as-chat"] if data.as_chat else []
    return shlex.join(words)


def _templates(data: FileData) -> dict[str, str | None]:
    """Return the templates that the evaluation does not find by itself."""
    match data:
        case PromptCompletionData() | PreferenceData() | PromptData():
            return {"--prompt": data.prompt, "--completion": _reference_template(data)}
        case TextData(text=template) if template != "{text}":
            return {"--text": template}
    return {}


def _other_commands(data: FileData, following: str) -> tuple[str, ...]:
    """Return the names of further commands that take the folder of the run."""
    can_talk = not isinstance(data, ClassificationData) and not following.startswith("gradselect chat")
    return ("report", *(["chat"] if can_talk else []))


def _is_evaluated(recipe: Recipe, data: FileData, first_row: Mapping[str, Any]) -> bool:
    if isinstance(recipe.trainer, AbstractSamplingTrainer) and not {*recipe.trainer.reward} & {*BUILT_IN_REWARDS}:
        return False
    if not isinstance(data, PreferenceData | PromptData):
        return True
    if isinstance(data, PreferenceData) and not {*columns_of(data.chosen)} <= {*first_row}:
        return False
    return not any(holds_messages(value) for value in first_row.values())


def _reference_template(data: PromptCompletionData | PreferenceData | PromptData) -> str | None:
    match data:
        case PromptCompletionData():
            return data.completion
        case PreferenceData():
            return data.chosen
    return data.answer


def _validation_options(data: FileData) -> list[str]:
    """Return the options that name the validation data, or a file to fill in."""
    name = data.validation
    if not isinstance(name, str):
        return ["--data", "TEST.jsonl"]
    if names_split(name, of=data.path, rows_key=data.rows_key):
        key = "--rows-key" if ending_of(data.path) == ".json" else "--split"
        return ["--data", data.path, *(["--subset", data.subset] if data.subset else []), key, name]
    rows_key = ["--rows-key", data.rows_key] if data.rows_key else []
    has_no_header = data.columns and ending_of(name) in (".csv", ".tsv")
    return ["--data", name, *rows_key, *(["--columns", ",".join(data.columns or ())] if has_no_header else [])]


def _print(console: Console, *lines: str) -> None:
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
