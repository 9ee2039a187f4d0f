"""Output of a run: the model, and `run.json` with everything needed to repeat it."""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from gradselect import BlockOptimizer, SparseOptimizer, UsageError, __version__
from gradselect.app.inputs import Inputs, fingerprint
from gradselect.app.recipe import Recipe, draws_answers, dump_recipe, todays_recipe
from gradselect.app.results import FinishedRun, RunRecord, SavedModel, TokenCounts, read_finished_run, read_run
from gradselect.app.runtime import RunFolder, num_processes
from gradselect.files import sealed, writing_aside
from gradselect.usage import find_differences

from .display import validation_figures
from .meter import Meter
from .trainer import RunTrainer

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "tokenizers", "safetensors")

# A string in JSON holds no newline.
_LIST_OF_NUMBERS = re.compile(r"\[\n([-+.,eE\d\s]*)\]")

FREE_TO_CHANGE = {
    *(f"recipe.run.{key}" for key in ("output", "device", "log_every", "evaluate_every", "save_every", "report_to")),
    *("recipe.run.keep_checkpoints", "recipe.run.max_skipped_steps", "recipe.run.sample_answers"),
    "recipe.model.gradient_checkpointing",
    # The content at these paths is compared, not the path.
    *("recipe.model.path", "recipe.model.revision", "recipe.model.trust_pickle"),
    *("recipe.data.path", "data.train.path", "data.validation.path", "model.is_local"),
}
"""Keys that may change when a run is resumed."""


def describe_start(recipe: Recipe, inputs: Inputs, *, command: Sequence[str]) -> RunRecord:
    """Return the record of a run before its first step."""
    model = inputs.model
    on_gpu = recipe.run.device != "cpu" and torch.cuda.is_available()
    values = {
        "status": "started",
        # A file name may hold bytes that are not text.
        "command": [word.encode("utf-8", "backslashreplace").decode("utf-8") for word in command],
        "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "processes": num_processes(),
        "resumed_from": None,
        "recipe": recipe.model_dump(mode="json"),
        "model": {
            "class": type(model).__name__,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "fingerprint": fingerprint(model),
            "is_local": Path(recipe.model.path).exists(),
        },
        "data": {name: source.describe() for name, source in inputs.examples.sources.items()},
        "versions": {"gradselect": __version__, "python": platform.python_version()}
        | {name: version(name) for name in PACKAGES},
        "machine": {
            "platform": platform.platform(),
            "device": torch.cuda.get_device_name() if on_gpu else "cpu",
            "cpus": os.cpu_count(),
            "threads": torch.get_num_threads(),
        },
    }
    return RunRecord.model_validate(values)


def describe_end(
    start: RunRecord,
    trainer: RunTrainer,
    meter: Meter,
    *,
    folder: RunFolder,
    notes: Sequence[str],
    saved: SavedModel | None = None,
) -> FinishedRun:
    """Complete the record after the last step. Tokens, seconds and bytes cover this session, the rest the whole run."""
    history = trainer.state.log_history
    optimizer: Any = trainer.optimizer
    values = {
        **start.values(),
        "status": "finished",
        "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "steps": trainer.state.global_step,
        "skipped_steps": sum("skipped" in entry for entry in history),
        "training_loss": _last(history, "loss"),
        "validation_loss": None if draws_answers(start.recipe) else _last(history, "eval_loss"),
        "validation": validation_figures(next((log for log in reversed(history) if "eval_loss" in log), {})),
        "tokens": trainer.num_tokens,
        "tokens_per_second": trainer.num_tokens / meter.total_seconds if meter.total_seconds else None,
        "notes": list(notes),
        **({} if saved is None else {"saved": saved.values()}),
        **meter.describe(),
        "flop": describe_flop(optimizer.optimizer, folder.records_file),
        "selection": describe_selection(optimizer.optimizer, folder.records_file),
        "history": history,
    }
    return FinishedRun.model_validate(values)


def check_same_run(folder: RunFolder, start: RunRecord) -> None:
    """Check that the run in `folder` is the one that `start` describes, and is not finished.

    Raises:
        UsageError: names what differs.
    """
    before = read_run(folder.run_file)
    if before.status == "finished":
        steps = read_finished_run(folder.run_file).steps
        raise UsageError(f"the run in {folder.root} has finished after {steps} steps; nothing is left to resume")
    if before.processes != start.processes:
        raise UsageError(
            f"the run in {folder.root} began on {before.processes} processes, this is one of {start.processes}; resume "
            f"on {before.processes}, or its batches would change"
        )
    different = list(differences(before.values(), start.values()))
    if different:
        heading = (
            f"the run in {folder.root} is another one; resume it with its own recipe, or choose another run.output. "
            "These differ:"
        )
        raise UsageError("\n  ".join([heading, *different]))


def check_same_rows(folder: RunFolder, counts: Mapping[str, TokenCounts]) -> None:
    """Check that the run in `folder` began on rows with these counts; else its batches would change.

    Raises:
        UsageError: it did not.
    """
    before = read_run(folder.run_file).token_counts
    # Versions that counted nothing cut what goes on in further rows today.
    is_same = before == counts if before else not any(part.examples_continued for part in counts.values())
    if not is_same:
        raise UsageError(
            f"the run in {folder.root} began with another version of gradselect or of its tokenizer, which made other "
            "rows of the same data; resume it there, or start again with another run.output"
        )


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """Yield one line for each difference of recipe, model and data."""
    old, new = ({key: side[key] for key in ("recipe", "model", "data")} for side in (before, now))
    for key, then, here in find_differences(old | {"recipe": todays_recipe(old["recipe"])}, new):
        if key not in FREE_TO_CHANGE:
            yield f"{key.removeprefix('recipe.')}: {then!r} then, {here!r} now"


def write_start(folder: RunFolder, start: RunRecord, recipe: Recipe) -> None:
    # run.json first: a folder that has it can be resumed, whatever else is missing.
    write_run(folder, start)
    with writing_aside(folder.recipe_file) as aside:
        aside.write_text(dump_recipe(recipe), "utf-8")


def write_run(folder: RunFolder, record: RunRecord) -> None:
    with writing_aside(folder.run_file) as aside:
        aside.write_text(as_json(sealed(record.values())) + "\n", "utf-8")


def as_json(value: Any) -> str:
    """Format as indented JSON with each list of numbers on one line: a run has thousands of steps."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    return _LIST_OF_NUMBERS.sub(lambda found: "[" + " ".join(found.group(1).split()) + "]", text)


def _last(history: Sequence[Mapping[str, float]], key: str) -> float | None:
    return next((entry[key] for entry in reversed(history) if key in entry), None)


def describe_selection(optimizer: torch.optim.Optimizer, records_file: Path) -> dict[str, Any] | None:
    """Return the blocks updated in each step, or the numbers of a mask; None if nothing is selected.

    For blocks: their names; `updates` by block; and for each step of the whole run the indices of the blocks
    `selected`, 1 if all gradients were read (`explored`), and the `entropy` of all updates so far. `unreached` names
    the blocks that the loss has not reached.
    """
    if isinstance(optimizer, SparseOptimizer):
        return _describe_mask(optimizer)
    if not isinstance(optimizer, BlockOptimizer) or not records_file.exists():
        return None
    records = read_records(records_file)
    places = {name: place for place, name in enumerate(optimizer.blocks)}
    return {
        "blocks": list(optimizer.blocks),
        "updates": list(optimizer.update_counts.values()),
        "entropy": [record["selection_entropy"] for record in records],
        "selected": [[places[name] for name in record["selected"]] for record in records],
        "explored": [int(record["explored"]) for record in records],
        "unreached": list(optimizer.unreached),
    }


def describe_flop(optimizer: torch.optim.Optimizer, records_file: Path) -> dict[str, Any]:
    """Return the limit of the speed-up over full fine-tuning; None if no blocks are selected."""
    # Here rather than above: the comparison imports the training that it compares.
    from gradselect.blocks import StepCost, speed_up_limit

    if not isinstance(optimizer, BlockOptimizer) or not records_file.exists():
        return {"limit": None, "speed_up": None}
    # If all gradients were read, all blocks have a norm.
    steps = [{*record["selected"], *record["norms"]} for record in read_records(records_file)]
    cost = StepCost.of_model(optimizer._model, optimizer._table.members)
    return {"limit": speed_up_limit(steps, cost), "speed_up": None}


def read_records(path: Path) -> Sequence[Mapping[str, Any]]:
    """Read the records of all steps, in order."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def _describe_mask(optimizer: SparseOptimizer) -> dict[str, Any]:
    record = optimizer.last_record
    by_tensor = {} if record is None else dict(record.num_entries)
    whole = [parameter.numel() for name, parameter in optimizer._table.named() if name in optimizer.always_trained]
    return {
        "mask": type(optimizer.mask).__name__,
        "settings": optimizer.mask.settings(),
        "entries": sum(by_tensor.values()),
        "entries_to_choose_from": sum(tensor.numel for tensor in optimizer.mask.tensors),
        "entries_by_tensor": by_tensor,
        "overlap": None if record is None else record.overlap,
        "whole_entries": sum(whole),
    }
