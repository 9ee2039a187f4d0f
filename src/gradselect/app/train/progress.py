"""Progress of a run: a live line in a terminal, plain lines in a file."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

from gradselect import BlockOptimizer, SparseOptimizer
from gradselect.app.data import ending_of, is_local
from gradselect.app.models import merge_command
from gradselect.app.recipe import ClassificationData, FileData, PromptCompletionData, RandomData, Recipe
from gradselect.app.results import FinishedRun, RunRecord, SavedModel
from gradselect.app.runtime import RunFolder

from .meter import Meter


class ProgressDisplay(TrainerCallback):
    """Shows step, loss, learning rate, tokens per second, active blocks and bytes of weights, gradients and state.

    Args:
        console: shows the lines, and in a terminal a bar below them.
        meter: source of the bytes.
        count_tokens: returns the number of tokens that this session has trained on.
    """

    def __init__(self, console: Console, *, meter: Meter, count_tokens: Callable[[], int]) -> None:
        self._console = console
        self._meter = meter
        self._count_tokens = count_tokens
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            # Brackets around block names are not markup.
            TextColumn("{task.fields[status]}", markup=False),
            console=console,
            transient=True,
            refresh_per_second=2,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("train", total=None, status="")
        self._last = (0.0, 0)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._last = (time.perf_counter(), self._count_tokens())
        self._bar.update(self._task, total=state.max_steps, completed=state.global_step)
        self._bar.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
        self._bar.update(self._task, completed=state.global_step, status=_selected(parts["optimizer"].optimizer))

    def on_log(self, args: Any, state: Any, control: Any, *, logs: Mapping[str, float], **parts: Any) -> None:
        if "loss" in logs:
            _print(self._console, self._line(state, logs, parts))
        elif "eval_loss" in logs:
            figures = "  ".join(f"{name} {value:.4f}" for name, value in validation_figures(logs).items())
            _print(self._console, f"step {state.global_step}/{state.max_steps}  validation {figures}")

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Remove the bar, also after an error."""
        self._bar.stop()

    def _line(self, state: Any, logs: Mapping[str, float], parts: Mapping[str, Any]) -> str:
        fields = [
            f"step {state.global_step}/{state.max_steps}",
            f"loss {logs['loss']:.4f}",
            f"lr {logs['learning_rate']:.2e}",
            f"{self._rate():,.0f} tokens/s",
            _memory(self._meter.held_bytes),
            _selected(parts["optimizer"].optimizer),
        ]
        return "  ".join(field for field in fields if field)

    def _rate(self) -> float:
        """Return tokens per second since the last line."""
        then, before = self._last
        self._last = (time.perf_counter(), self._count_tokens())
        return (self._last[1] - before) / max(self._last[0] - then, 1e-9)


def _memory(held: Mapping[str, int]) -> str:
    """Format the MiB of each category that is not empty."""
    names = {"weights": "weights", "gradients": "gradients", "masters": "masters"}
    names |= {"state_on_device": "state", "state_on_host": "state on host"}
    return "MiB: " + ", ".join(f"{label} {held[name] / 2**20:.1f}" for name, label in names.items() if held.get(name))


def _selected(optimizer: Any) -> str:
    """Format the selection of the last step: its blocks, marked if they were explored, or its number of entries."""
    if isinstance(optimizer, SparseOptimizer) and optimizer.last_record is not None:
        return f"[{sum(optimizer.last_record.num_entries.values()):,} entries, {optimizer.last_record.num_new:,} new]"
    if not isinstance(optimizer, BlockOptimizer) or optimizer.last_record is None:
        return ""
    record = optimizer.last_record
    names = " ".join(record.selected) if len(record.selected) <= 6 else f"{len(record.selected)} blocks"
    return f"[{names}]{' explored' if record.explored else ''}"


def validation_figures(logs: Mapping[str, float]) -> dict[str, float]:
    """Return loss and metrics of an evaluation from the Trainer's log."""
    skipped = ("runtime", "per_second", "num_tokens")
    figures = {name.removeprefix("eval_"): value for name, value in logs.items() if name.startswith("eval_")}
    return {name: value for name, value in figures.items() if not name.endswith(skipped)}


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
        *(f"{name:<10} {source['path']} ({source['rows_used']:,} rows)" for name, source in start.data.items()),
        f"method     {recipe['method']['name']}",
        *(f"note       {note}" for note in notes),
    ]
    lines += [f"damaged    {path}: {fault}; not used, kept as damaged-{path.name}" for path, fault in damaged.items()]
    if resume:
        lines.append(f"resume     {checkpoint or 'no checkpoint yet: from the first step'}")
    _print(console, *lines)


def show_summary(console: Console, end: FinishedRun, *, recipe: Recipe, folder: RunFolder, num_messages: int) -> None:
    """Show the outcome, the files and what to type next."""
    losses = {"training loss": end.training_loss, "validation loss": end.validation_loss}
    lines = [
        f"finished {end.steps} steps in {end.training_seconds:,.0f} s  "
        + "  ".join(f"{name} {loss:.4f}" for name, loss in losses.items() if loss is not None),
        f"peak of weights, gradients and optimizer state: {end.peak_bytes['together'] / 2**20:,.1f} MiB",
    ]
    if isinstance(recipe.data, RandomData):
        _print(console, *lines, f"record of the run in {folder.run_file}; a model trained on random tokens is not kept")
        return
    lines += _saved_lines(end.saved or SavedModel(), recipe=recipe, folder=folder)
    if num_messages:
        lines.append(f"{num_messages} messages from libraries in {folder.messages_file}")
    _print(console, *lines, f"next: {_next_command(recipe, recipe.data)}")


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


def _next_command(recipe: Recipe, data: FileData) -> str:
    """Return the command that evaluates the trained model with the templates of its training."""
    task = "classification" if isinstance(data, ClassificationData) else "loss"
    words = ["gradselect", "evaluate", recipe.run.output, "--task", task, *_validation_options(data)]
    if isinstance(data, PromptCompletionData):
        # The command line reads \\n as a newline.
        templates = (template.replace("\n", "\\n") for template in (data.prompt, data.completion))
        words += [word for pair in zip(("--prompt", "--completion"), templates, strict=True) for word in pair]
        words += ["--as-chat"] if data.as_chat else []
    return shlex.join(words)


def _validation_options(data: FileData) -> list[str]:
    """Return the options that name the validation data, or a file to fill in."""
    name = data.validation
    if not isinstance(name, str):
        return ["--data", "TEST.jsonl"]
    if is_local(name):
        return ["--data", name, *(["--rows-key", data.rows_key] if data.rows_key else [])]
    return ["--data", data.path, "--rows-key" if ending_of(data.path) == ".json" else "--split", name]


def _print(console: Console, *lines: str) -> None:
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
