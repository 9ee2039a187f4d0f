"""Fine-tune a base model that solves no word problem into one that solves most: offline, in minutes."""

from __future__ import annotations

import json
import shlex
import time
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from gradselect import UsageError
from gradselect.app.evaluate import EvaluationResult, EvaluationSettings, evaluate
from gradselect.app.recipe import load_recipe
from gradselect.app.train import train
from gradselect.app.word_problems import write_problems

from .cost import Cost, compare_cost
from .files import base_folder, recipe_file
from .picture import Selections, as_text, draw

NUM_TRAIN, NUM_TEST = 8000, 200
TIMED_STEPS = 12


def quickstart(output: str | Path, *, steps: int | None = None, console: Console | None = None) -> Path:
    """Train the base model on generated word problems, and show what came of it.

    Makes the problems, evaluates the base, trains it, evaluates again on problems it has never seen, times a few steps
    against full fine-tuning, and draws which blocks trained when.

    Args:
        output: new folder for data, model, picture and `quickstart.json`.
        steps: number of optimizer steps. None: those of the recipe.
        console: shows progress and results. None: standard output.

    Returns:
        The folder of the trained model.

    Raises:
        UsageError: the folder holds something, or this installation lacks the base model.
    """
    console = console or Console()
    started = time.perf_counter()
    output = _checked(Path(output))
    words = [f"model.path={base_folder()}", f"data.path={output / 'train.jsonl'}", f"run.output={output / 'run'}"]
    recipe = load_recipe(recipe_file(), words if steps is None else [*words, f"run.steps={steps}"])
    output.mkdir(parents=True, exist_ok=True)
    write_problems(output / "train.jsonl", count=NUM_TRAIN, split="train")
    write_problems(output / "test.jsonl", count=NUM_TEST, split="test")

    console.rule("1  the base model, before")
    before = _solve(recipe.model.path, test=output / "test.jsonl")
    console.print(before.summary())
    console.rule("2  training")
    tuned = train(recipe, console=console)
    console.rule("3  the tuned model, after")
    after = _solve(tuned, test=output / "test.jsonl")
    console.print(after.summary())
    console.rule("4  against full fine-tuning, step by step in turn")
    cost = compare_cost(recipe, output / "train.jsonl", num_steps=TIMED_STEPS)
    console.rule("5  which blocks trained when")
    selections = Selections.read(tuned / "records.jsonl", blocks=cost.blocks)
    draw(selections, output / "blocks.png")
    console.print(as_text(selections), highlight=False, markup=False)
    console.rule("result")
    seconds = time.perf_counter() - started
    _show(console, before=before, after=after, cost=cost)
    console.print(f"model: {tuned}   picture: {output / 'blocks.png'}   {seconds:.0f} s in all", highlight=False)
    console.print(f"next: gradselect chat {shlex.quote(str(tuned))}", highlight=False, markup=False, soft_wrap=True)
    _write_summary(output, before=before, after=after, cost=cost, seconds=seconds)
    return tuned


def _checked(output: Path) -> Path:
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise UsageError(f"{output} exists and is not empty; name a new folder: gradselect quickstart {output}-2")
    return output


def _solve(model: str | Path, *, test: Path) -> EvaluationResult:
    """Evaluate greedy answers to the unseen problems."""
    return evaluate(EvaluationSettings(model=model, task="gsm8k", data=test, batch_size=100, max_new_tokens=100))


def _show(console: Console, *, before: EvaluationResult, after: EvaluationResult, cost: Cost) -> None:
    table = Table(show_header=True)
    for heading in ("", "before", "after", "full fine-tuning"):
        table.add_column(heading, justify="left" if not heading else "right")
    table.add_row(f"right answers, {NUM_TEST} unseen problems", _percent(before), _percent(after), "")
    table.add_row("seconds a step", "", f"{cost.seconds['ours']:.3f}", f"{cost.seconds['full']:.3f}")
    table.add_row("speed-up of a step", "", f"{cost.speed_up:.2f}", "1.00")
    state = (f"{cost.state_bytes[name] / 1e6:.1f} MB" for name in ("ours", "full"))
    table.add_row("optimizer state on the device, peak", "", *state)
    console.print(table)


def _write_summary(
    output: Path, *, before: EvaluationResult, after: EvaluationResult, cost: Cost, seconds: float
) -> None:
    training = json.loads((output / "run" / "run.json").read_text(encoding="utf-8"))
    summary = {
        "accuracy_before": before.accuracy,
        "accuracy_after": after.accuracy,
        "num_test": NUM_TEST,
        "total_seconds": seconds,
        "training_seconds": training["training_seconds"],
        "threads": torch.get_num_threads(),
        **asdict(cost),
    }
    (output / "quickstart.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")


def _percent(result: EvaluationResult) -> str:
    assert result.accuracy is not None
    return f"{100 * result.accuracy:.1f} %"
