"""One training run, from a recipe to a plain Hugging Face checkpoint."""

from __future__ import annotations

import atexit
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

from datasets import Dataset
from rich.console import Console

from gradselect import UsageError
from gradselect.app.inputs import Inputs, read_inputs, row_notes
from gradselect.app.preview import show_first_row
from gradselect.app.progress import Stages
from gradselect.app.recipe import Recipe
from gradselect.app.recipe import dump_recipe as dump_recipe
from gradselect.app.recipe import load_recipe as load_recipe
from gradselect.app.runtime import Preempted as Preempted
from gradselect.app.runtime import (
    RunFolder,
    barrier,
    broadcast_from_rank_0,
    claimed,
    collected_messages,
    disconnect,
    fast_bfloat16,
    is_rank_0,
    keep_freed_memory,
    num_processes,
    take_device,
    watched_signals,
)

from .checkpoints import find_checkpoint, return_to
from .display import ProgressDisplay
from .failures import describe_kept, describe_out_of_memory, is_dead_worker, is_out_of_memory
from .meter import Meter
from .new_tokens import new_token_notes
from .progress import show_start, show_summary
from .run_record import (
    check_same_rows,
    check_same_run,
    describe_end,
    describe_start,
    write_run,
    write_start,
)
from .sample_answers import add_answers
from .samples import choose_samples
from .saving import plan_saving, save_model
from .setup import build_trainer
from .trainer import RunTrainer


def run(recipe: Recipe, *, resume: bool, command: Sequence[str], console: Console, messages: Sequence[str]) -> Path:
    """Carry out a recipe; see `train`. `messages` is the growing list of the libraries' messages."""
    take_device(recipe.run.device)
    keep_freed_memory(recipe.run.device)
    folder = RunFolder(Path(recipe.run.output))
    console = console if is_rank_0() else Console(quiet=True)
    stages = Stages(console)
    with claimed(folder, resume=resume, messages=messages) if is_rank_0() else nullcontext(), ExitStack() as stack:
        # 1 read the inputs
        inputs = read_inputs(recipe, stages=stages)
        start = describe_start(recipe, inputs, command=command)
        if is_rank_0() and folder.run_file.exists():
            check_same_run(folder, start)
        checkpoint, damaged = find_checkpoint(folder) if resume and is_rank_0() else (None, {})
        start = start.model_copy(update={"resumed_from": None if checkpoint is None else checkpoint.name})

        # 2 set up
        slow = stack.enter_context(fast_bfloat16(inputs.model, recipe.run.device))
        saving = plan_saving(recipe, inputs)
        samples, sample_notes = choose_samples(recipe, inputs)
        with _explained(recipe, folder):
            trainer = build_trainer(recipe, inputs, folder=folder, stages=stages, checkpoint=checkpoint)
        counted = row_notes(trainer.token_counts, recipe.data, max_length=inputs.max_length)
        counted = [*counted, *trainer.notes, *([] if slow is None else [slow])]
        notes = [*inputs.examples.notes, *counted, *sample_notes, *saving.notes, *new_token_notes(recipe, inputs)]
        start = start.model_copy(update={"token_counts": trainer.token_counts})
        if is_rank_0() and folder.run_file.exists():
            check_same_rows(folder, trainer.token_counts)
        barrier()  # rank 0 has found the folder usable
        if is_rank_0():
            return_to(folder, checkpoint, damaged=damaged, keep=recipe.run.keep_checkpoints)
            write_start(folder, start, recipe)
        found = broadcast_from_rank_0(None if checkpoint is None else str(checkpoint))
        show_start(console, start, notes=notes, checkpoint=checkpoint, damaged=damaged, resume=resume)
        rows = trainer.train_dataset if trainer.plain_rows is None else trainer.plain_rows
        show_first_row(cast(Dataset, rows), recipe, inputs, console)

        if samples and is_rank_0():
            add_answers(trainer, samples, recipe, inputs, ends=saving.ends, stages=stages, folder=folder)

        # 3 train and evaluate
        with watched_signals() as trainer.signals, _explained(recipe, folder):
            with closing(trainer):
                meter = _train_and_evaluate(trainer, checkpoint=found, stages=stages)

            # 4 save; run.json says "finished" only when everything else is written
            if is_rank_0():
                with stages.open("saving the model"):
                    saved = save_model(trainer, inputs, folder=folder, plan=saving) if saving.is_kept else None
                    end = describe_end(start, trainer, meter, folder=folder, notes=notes, saved=saved)
                    write_run(folder, end)
                first_row = _first_row(inputs)
                show_summary(console, end, recipe=recipe, folder=folder, messages=messages, first_row=first_row)
            barrier()
    return folder.root


def _first_row(inputs: Inputs) -> Mapping[str, Any]:
    source = inputs.examples.sources.get("train")
    return source.rows[0] if source is not None and len(source.rows) else {}


@contextmanager
def _explained(recipe: Recipe, folder: RunFolder) -> Iterator[None]:
    """Explain what to do when memory, disk or data fail during a run."""
    try:
        yield
    except OSError as error:
        raise UsageError(f"training has stopped: {error}; {describe_kept(folder)}") from error
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            raise UsageError(describe_out_of_memory(error, recipe=recipe, folder=folder)) from error
        if is_dead_worker(error):
            raise UsageError(f"training has stopped: {error}; {describe_kept(folder)}") from error
        raise


def _train_and_evaluate(trainer: RunTrainer, *, checkpoint: str | None, stages: Stages) -> Meter:
    meter = _train(trainer, checkpoint=checkpoint, stages=stages)
    trainer.stop_on_signal()
    _evaluate(trainer)
    trainer.stop_on_signal()
    trainer.check_weights()
    trainer.sum_tokens_over_ranks()
    return meter


def _train(trainer: RunTrainer, *, checkpoint: str | None, stages: Stages) -> Meter:
    meter = Meter(trainer)
    display = ProgressDisplay(
        stages,
        meter=meter,
        count_tokens=lambda: trainer.num_tokens,
        evaluates_last=trainer.eval_dataset is not None,
    )
    trainer.add_callback(meter)
    trainer.add_callback(display)
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    finally:
        display.close()
        meter.close()
    return meter


def _evaluate(trainer: RunTrainer) -> None:
    """Evaluate after the last step, unless that is done already."""
    evaluated: list[Any] = [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry]
    if trainer.eval_dataset is not None and trainer.state.global_step not in evaluated:
        trainer.evaluate()


def train(recipe: Recipe, *, resume: bool = False, console: Console | None = None, command: Sequence[str] = ()) -> Path:
    """Fine-tune a model with a recipe.

    Args:
        recipe: model, data, method and settings, e.g. from `load_recipe`.
        resume: continue from the newest whole checkpoint in `recipe.run.output`; without one, from the first step.
        console: shows the progress; by default on standard output.
        command: the command that the user typed, kept in `run.json`.

    Returns:
        The output folder: a plain Hugging Face checkpoint with `run.json` beside it.

    Raises:
        UsageError: recipe, data or model cannot be used, or training failed; everything written before is whole.
        Preempted: SIGTERM or SIGINT was received during training; a checkpoint is kept. It is a `SystemExit` with code
            143 or 130.

    Example:
        >>> train(load_recipe("recipes/gsm8k.yaml", ["run.steps=100"]))  # doctest: +SKIP
    """
    console = (console or Console()) if is_rank_0() else Console(quiet=True)
    if num_processes() > 1:
        # Not at the end of a run: another one may follow in these processes.
        atexit.register(disconnect)
    with collected_messages(console) as messages:
        return run(recipe, resume=resume, command=command, console=console, messages=messages)
