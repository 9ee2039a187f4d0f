"""Fine-tune a base model that solves no word problem into one that solves most: offline, in minutes.

    python quickstart/run.py            # or `make quickstart`, which installs first

Makes the problems, evaluates the base, trains it by `recipes/quickstart.yaml`, evaluates again on problems it has never
seen, times a few steps against full fine-tuning, and draws which blocks trained when. All of it lands in
`quickstart/out`, which is made anew.
"""

from __future__ import annotations

import json
import shutil
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from picture import Selections, as_text, draw
from problems import problems
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

import gradselect as gs
from gradselect.app.evaluate import EvaluationResult, EvaluationSettings, evaluate
from gradselect.app.recipe import Recipe, load_recipe
from gradselect.app.train import train

HERE = Path(__file__).parent
OUT = HERE / "out"
RECIPE = HERE.parent / "recipes" / "quickstart.yaml"
NUM_TRAIN, NUM_TEST = 8000, 200
TIMED_STEPS = 12


def main() -> None:
    console = Console()
    started = time.perf_counter()
    recipe = load_recipe(
        RECIPE, [f"model.path={HERE / 'base'}", f"data.path={OUT / 'train.jsonl'}", f"run.output={OUT / 'run'}"]
    )
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir()
    write_problems(OUT / "train.jsonl", count=NUM_TRAIN, split="train")
    write_problems(OUT / "test.jsonl", count=NUM_TEST, split="test")

    console.rule("1  the base model, before")
    before = solve(recipe.model.path)
    console.print(before.summary())
    console.rule("2  training")
    tuned = train(recipe, console=console)
    console.rule("3  the tuned model, after")
    after = solve(tuned)
    console.print(after.summary())
    console.rule("4  against full fine-tuning, step by step in turn")
    cost = compare_cost(recipe)
    console.rule("5  which blocks trained when")
    selections = Selections.read(OUT / "run" / "records.jsonl", blocks=cost["blocks"])
    draw(selections, OUT / "blocks.png")
    console.print(as_text(selections), highlight=False, markup=False)
    console.rule("result")
    show(console, before=before, after=after, cost=cost, seconds=time.perf_counter() - started)


def write_problems(path: Path, *, count: int, split: str) -> None:
    lines = (json.dumps(problem) + "\n" for problem in problems(count=count, seed=1, split=split))
    path.write_text("".join(lines), encoding="utf-8")


def solve(model: str | Path) -> EvaluationResult:
    """Evaluate greedy answers to the unseen problems."""
    settings = EvaluationSettings(
        model=model, task="gsm8k", data=OUT / "test.jsonl", batch_size=100, max_new_tokens=100
    )
    return evaluate(settings)


def compare_cost(recipe: Recipe) -> dict[str, Any]:
    """Measure seconds and bytes of a step: this recipe's method and full fine-tuning, in turn on the same batches.

    Exploration ends with the first step, so the timed steps are exploit steps.
    """
    method = recipe.method
    policy = gs.AdaGradSelect(fraction=method.fraction, among=method.among, explore_steps=1)
    ours = build(recipe, policy, always=method.always, residency=method.place())
    full = build(recipe, gs.All(), always=(), residency=gs.Keep())
    seconds: dict[str, list[float]] = {"ours": [], "full": []}
    state = {"ours": 0, "full": 0}
    for batch in batches(recipe, count=TIMED_STEPS + 2):
        for name, (model, optimizer) in (("ours", ours), ("full", full)):
            start = time.perf_counter()
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            seconds[name].append(time.perf_counter() - start)
            state[name] = max(state[name], optimizer.last_record.state_bytes)
    ratios = [f / o for f, o in zip(seconds["full"][2:], seconds["ours"][2:], strict=True)]
    return {
        "blocks": ours[1].blocks,
        "seconds": {name: statistics.median(values[2:]) for name, values in seconds.items()},
        "speed_up": statistics.median(ratios),
        "state_bytes": state,
    }


def build(recipe: Recipe, policy: gs.AbstractPolicy, **settings: Any) -> tuple[Any, gs.BlockOptimizer]:
    model = AutoModelForCausalLM.from_pretrained(recipe.model.path, dtype=torch.float32).train()
    return model, gs.BlockOptimizer(model, policy, lr=recipe.optimizer.lr, **settings)


def batches(recipe: Recipe, *, count: int) -> Iterator[dict[str, torch.Tensor]]:
    tokenizer = AutoTokenizer.from_pretrained(recipe.model.path)
    rows = [json.loads(line) for line in (OUT / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    size = recipe.run.batch_size
    for first in range(0, count * size, size):
        texts = [f"Question: {row['question']}\nAnswer: {row['answer']}" for row in rows[first : first + size]]
        tokens = tokenizer(texts, return_tensors="pt", padding=True)
        labels = tokens["input_ids"].masked_fill(tokens["attention_mask"] == 0, -100)
        yield {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"], "labels": labels}


def show(
    console: Console, *, before: EvaluationResult, after: EvaluationResult, cost: dict[str, Any], seconds: float
) -> None:
    table = Table(show_header=True)
    for heading in ("", "before", "after", "full fine-tuning"):
        table.add_column(heading, justify="left" if not heading else "right")
    table.add_row(f"right answers, {NUM_TEST} unseen problems", percent(before), percent(after), "")
    table.add_row("seconds a step", "", f"{cost['seconds']['ours']:.3f}", f"{cost['seconds']['full']:.3f}")
    table.add_row("speed-up of a step", "", f"{cost['speed_up']:.2f}", "1.00")
    table.add_row(
        "optimizer state on the device, peak", "", *(megabytes(cost["state_bytes"][n]) for n in ("ours", "full"))
    )
    console.print(table)
    console.print(f"model: {OUT / 'run'}   picture: {OUT / 'blocks.png'}   {seconds:.0f} s in all", highlight=False)
    training = json.loads((OUT / "run" / "run.json").read_text(encoding="utf-8"))
    summary = {
        "accuracy_before": before.accuracy,
        "accuracy_after": after.accuracy,
        "num_test": NUM_TEST,
        "total_seconds": seconds,
        "training_seconds": training["training_seconds"],
        "threads": torch.get_num_threads(),
        **cost,
    }
    (OUT / "quickstart.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")


def percent(result: EvaluationResult) -> str:
    assert result.accuracy is not None
    return f"{100 * result.accuracy:.1f} %"


def megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.1f} MB"


if __name__ == "__main__":
    main()
