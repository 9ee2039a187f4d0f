"""The recipe of GRPO with a random mask, on the quickstart's base and problems, and the table of its benchmark."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from train_fixtures import quiet

from gradselect.app.evaluate import EvaluationSettings, evaluate
from gradselect.app.recipe import Recipe, load_recipe
from gradselect.app.train import train
from gradselect.app.word_problems import problems

ROOT = Path(__file__).parent.parent
BASE = ROOT / "quickstart" / "base"
sys.path.insert(0, str(ROOT / "benchmarks"))

grpo = importlib.import_module("grpo")

# trl and peft use names that transformers has replaced since.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*is deprecated:FutureWarning")

REWARD = """
import json

def length(completions, question, **_):
    with open({notes!r}, "a") as file:
        file.writelines(json.dumps(pair) + "\\n" for pair in zip(question, completions))
    return [float(len(text)) for text in completions]
"""
"""A reward that differs between the answers of a model that solves nothing, and notes what it rewards."""


def short_recipe(folder: Path, *overrides: str) -> Recipe:
    """Return the recipe with a reward of this file beside its own, two steps, and answers of 24 tokens."""
    rows = problems(count=8, seed=0, split="train")
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    (folder / "mine.py").write_text(REWARD.format(notes=str(folder / "notes.jsonl")), "utf-8")
    return load_recipe(
        ROOT / "recipes" / "grpo-random-mask.yaml",
        [
            *(f"model.path={BASE}", f"data.path={folder / 'train.jsonl'}", f"run.output={folder / 'out'}"),
            *("run.steps=2", "run.log_every=1", "run.report_to=[]", "run.batch_size=8", "optimizer.warmup=0"),
            *(f"trainer.reward=[gsm8k, '{folder / 'mine.py'}:length']", "trainer.num_generations=4"),
            *("trainer.max_completion_length=24", *overrides),
        ],
    )


def test_one_weight_in_a_hundred_trains(tmp_path: Path) -> None:
    output = train(short_recipe(tmp_path), console=quiet())
    record = json.loads((output / "run.json").read_text("utf-8"))
    steps = [entry for entry in record["history"] if "reward" in entry]
    assert [entry["rewards/gsm8k/mean"] for entry in steps] == [0, 0]
    assert steps[0]["reward"] > 0
    before, after = (load_file(folder / "model.safetensors") for folder in (BASE, output))
    num_changed = sum(int((before[name] != after[name]).sum()) for name in before)
    entries = record["selection"]["entries"]
    assert entries == round(0.01 * record["model"]["parameters"])
    # Not every entry has a gradient: some belong to tokens that no text has.
    assert entries / 2 < num_changed <= entries


def test_what_is_rewarded_is_what_evaluation_judges(tmp_path: Path) -> None:
    """The most likely answers of a step, as the reward gets them, are the greedy answers of `gradselect evaluate`."""
    train(short_recipe(tmp_path, "trainer.top_k=1", "optimizer.lr=1e-30"), console=quiet())
    evaluate(
        EvaluationSettings(
            model=BASE,
            task="gsm8k",
            data=tmp_path / "train.jsonl",
            max_new_tokens=24,
            output=tmp_path / "evaluated",
        )
    )
    judged = [*map(json.loads, (tmp_path / "evaluated" / "items.jsonl").read_text("utf-8").splitlines())]
    rows = map(json.loads, (tmp_path / "train.jsonl").read_text("utf-8").splitlines())
    greedy = {row["question"]: item["prediction"] for row, item in zip(rows, judged, strict=True)}
    rewarded = [json.loads(line) for line in (tmp_path / "notes.jsonl").read_text("utf-8").splitlines()]
    assert len(rewarded) == 16
    assert all(text == greedy[question] for question, text in rewarded)
    # Some end by themselves, some are cut off.
    assert {item["finished"] for item in judged} == {True, False}


def test_the_page_has_the_table_of_the_result_file() -> None:
    result = grpo.read_result(grpo.RESULT)
    table = grpo.markdown(result)
    assert table in (ROOT / "docs" / "results.md").read_text("utf-8")
    best = result["runs"]["mask"]["learning_rate"]
    assert load_recipe(ROOT / "recipes" / "grpo-random-mask.yaml").optimizer.lr == best


def test_the_smallest_of_equal_rates_is_chosen() -> None:
    def run(rate: float, mean: float) -> dict[str, object]:
        return {"learning_rate": rate, "reward_last": {"mean": mean, "standard_error": 0.02}}

    assert grpo.choose_rate([run(1e-3, 0.20), run(1e-2, 0.29), run(3e-2, 0.30), run(1e-1, 0.1)]) == 1e-2
