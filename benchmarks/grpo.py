"""Reinforcement learning of one random weight in a hundred, beside all of them, on the quickstart's word problems.

    python benchmarks/grpo.py --output benchmarks/results/grpo.json

Fine-tunes the quickstart's base until it solves some problems, draws answers with the recipe
`recipes/grpo-random-mask.yaml` and rewards them by the rule-based checker, with the random mask and with full training,
each at its own learning rate. Greedy answers to problems that none has seen are the judge.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from gradselect.app.evaluate import EvaluationSettings, evaluate
from gradselect.app.recipe import load_recipe
from gradselect.app.train import train

ROOT = Path(__file__).parents[1]
START_STEPS, STEPS, NUM_TEST = 150, 100, 200
VARIANTS = {"random 1 %": (), "full": ("method.name=full", "optimizer.lr=1e-3")}
NUM_EDGE = 10
"""Steps at either end of a run whose mean reward is reported."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=STEPS)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = compare(Path(folder), steps=arguments.steps)
    arguments.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def compare(folder: Path, *, steps: int, start_steps: int = START_STEPS) -> dict[str, Any]:
    """Return accuracy before and after, and the rewards, of each variant."""
    import sys

    sys.path.insert(0, str(ROOT / "quickstart"))
    from problems import problems

    for split, count in (("train", 4000), ("test", NUM_TEST)):
        lines = (json.dumps(row) + "\n" for row in problems(count=count, seed=1, split=split))
        (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    start = make_start(folder, steps=start_steps)
    result: dict[str, Any] = {"num_test": NUM_TEST, "steps": steps, "accuracy_before": accuracy(start, folder)}
    for name, changes in VARIANTS.items():
        result[name] = reinforce(start, folder, name=name, steps=steps, changes=changes)
    return result


def make_start(folder: Path, *, steps: int) -> Path:
    """Fine-tune the base of the quickstart for a few steps."""
    overrides = [
        *(f"model.path={ROOT / 'quickstart' / 'base'}", f"data.path={folder / 'train.jsonl'}"),
        *(f"run.output={folder / 'start'}", f"run.steps={steps}", "method.name=full", "run.report_to=[]"),
    ]
    return train(load_recipe(ROOT / "recipes" / "quickstart.yaml", overrides), console=Console())


def reinforce(start: Path, folder: Path, *, name: str, steps: int, changes: Sequence[str]) -> dict[str, Any]:
    """Run GRPO from `start`."""
    output = folder / name.split()[0]
    overrides = [
        *(f"model.path={start}", f"data.path={folder / 'train.jsonl'}", f"run.output={output}"),
        *(f"run.steps={steps}", "run.log_every=1", "run.report_to=[]", *changes),
    ]
    recipe = load_recipe(ROOT / "recipes" / "grpo-random-mask.yaml", overrides)
    train(recipe, console=Console())
    record = json.loads((output / "run.json").read_text(encoding="utf-8"))
    rewards = [entry["reward"] for entry in record["history"] if "reward" in entry]
    return {
        "learning_rate": recipe.optimizer.lr,
        "entries": (record["selection"] or {}).get("entries"),
        "reward_first": statistics.fmean(rewards[:NUM_EDGE]),
        "reward_last": statistics.fmean(rewards[-NUM_EDGE:]),
        "rewards": rewards,
        "accuracy_after": accuracy(output, folder),
        "state_bytes": record["bytes"]["peak"]["state_on_device"],
        "training_seconds": record["training_seconds"],
    }


def accuracy(model: Path, folder: Path) -> float | None:
    """Return the share of right greedy answers to the unseen problems."""
    settings = EvaluationSettings(
        model=model, task="gsm8k", data=folder / "test.jsonl", batch_size=100, max_new_tokens=80
    )
    return evaluate(settings).accuracy


if __name__ == "__main__":
    main()
