"""Runs of DPO, KTO, ORPO, GRPO and RLOO: they keep the guarantees of every run, and their own."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
from answer_support import preference_recipe, prompt_recipe, write_place
from peft import LoraConfig, get_peft_model
from rich.console import Console
from torch import nn
from train_fixtures import ADAGRADSELECT, assert_same_weights, quiet, train_until

from gradselect import UsageError
from gradselect.app.compare.result_record import curves
from gradselect.app.inputs import read_inputs
from gradselect.app.recipe import Recipe
from gradselect.app.recipe_planning import plan_recipe
from gradselect.app.report.read_run import read_training_run
from gradselect.app.runtime import RunFolder
from gradselect.app.train import build_trainer, num_steps_of, train
from gradselect.app.train.preference_trainers import DpoTrainer, KtoTrainer, switch_off_dropout
from gradselect.app.train.rewards import load_function, make_rewards
from gradselect.app.train.sampling_trainers import GrpoTrainer, PromptSampler, RlooTrainer

pytestmark = [
    # trl and peft use names that transformers has replaced since.
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*is deprecated:FutureWarning"),
]

MASK = {"name": "static", "density": 0.05}
LORA = {"name": "lora", "rank": 2}
SMALL_TOKENS = """
def num_small(completion_ids, **_):
    return [float(sum(token < 128 for token in ids)) for ids in completion_ids]
"""
"""A reward that half of a random model's tokens get."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_place(tmp_path_factory.mktemp("place"))
    (folder / "rewards.py").write_text(SMALL_TOKENS, "utf-8")
    return folder


def recipe_of(kind: str, place: Path, output: Path, **sections: Any) -> Recipe:
    if kind in ("grpo", "rloo"):
        settings = {"name": kind, "reward": f"{place / 'rewards.py'}:num_small", **sections.pop("trainer", {})}
        return prompt_recipe(place, output, trainer=settings, **sections)
    settings = {"name": kind, **sections.pop("trainer", {})}
    return preference_recipe(place, output, trainer=settings, **sections)


def record(run: Path) -> dict[str, Any]:
    return json.loads((run / "run.json").read_text("utf-8"))


# Guarantees of every run -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "method"),
    [("dpo", ADAGRADSELECT), ("kto", MASK), ("orpo", ADAGRADSELECT), ("grpo", MASK), ("rloo", ADAGRADSELECT)],
)
def test_a_run_that_stops_goes_on_as_if_it_had_not(
    kind: str, method: dict[str, Any], place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Past the end of an epoch: a sampler with one generator for all epochs would begin again."""
    run = {"save_every": 1, "log_every": 2, "steps": 4, "batch_size": 8}
    data = {"limit": 8 if kind in ("kto", "grpo", "rloo") else 12}
    if kind in ("grpo", "rloo"):
        data["limit"] = 4
    recipes = [
        recipe_of(kind, place, tmp_path / name, method=method, run=run, data=data) for name in ("whole", "stopped")
    ]
    train(recipes[0], console=quiet())
    train_until(recipes[1], step=3, monkeypatch=monkeypatch)
    train(recipes[1], console=quiet(), resume=True)
    whole, stopped = (record(tmp_path / name) for name in ("whole", "stopped"))
    assert stopped["resumed_from"] == "step-3"
    assert_same_weights(tmp_path / "whole", tmp_path / "stopped")
    assert timeless(whole["history"]) == timeless(stopped["history"])


def timeless(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {name: value for name, value in entry.items() if "step_time" not in name and "runtime" not in name}
        for entry in history
        if "train_runtime" not in entry
    ]


@pytest.mark.parametrize("kind", ["dpo", "grpo"])
def test_a_step_with_a_loss_that_is_nan_changes_nothing(
    kind: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(kind, place, tmp_path / "out", run={"steps": 2})
    parent: Any = next(one for one in build(recipe, tmp_path)[0].__mro__ if one.__module__.startswith("trl."))
    compute_loss = parent.compute_loss

    def spoilt(self: Any, *args: Any, **options: Any) -> Any:
        loss = compute_loss(self, *args, **options)
        return loss * math.nan if self.state.global_step == 1 else loss

    monkeypatch.setattr(parent, "compute_loss", spoilt)
    train(recipe, console=quiet())
    found = record(tmp_path / "out")
    assert found["skipped_steps"] == 1
    assert "loss: nan" in str(found["history"])


def build(recipe: Recipe, folder: Path) -> tuple[type, Any, Any]:
    inputs = read_inputs(recipe)
    trainer = build_trainer(recipe, inputs, folder=RunFolder(folder / "built"))
    return type(trainer), trainer, inputs


@pytest.mark.parametrize("kind", ["dpo", "grpo"])
def test_evaluations_do_not_change_the_training(kind: str, place: Path, tmp_path: Path) -> None:
    """GRPO draws answers in an evaluation too."""
    shown = io.StringIO()
    for name, every in (("often", 1), ("never", None)):
        run = {"evaluate_every": every, "steps": 3}
        console = Console(file=shown, width=2000)
        train(recipe_of(kind, place, tmp_path / name, run=run, data={"validation": 0.34}), console=console)
    line = next(line for line in shown.getvalue().splitlines() if line.startswith("step 1/3  validation"))
    assert ("  reward " in line, " loss " in line) == (kind == "grpo", kind != "grpo"), line
    assert_same_weights(tmp_path / "often", tmp_path / "never")
    often, never = record(tmp_path / "often"), record(tmp_path / "never")
    assert often["validation"]["loss"] == never["validation"]["loss"]
    # The loss of drawn answers is no measure of the model, so nothing calls it the validation loss.
    assert often["validation_loss"] == (None if kind == "grpo" else often["validation"]["loss"])
    found = read_training_run(tmp_path / "often")
    assert found.finished is not None
    assert set(curves(found.finished)) == {"train"} | set(found.validation)
    assert bool(found.validation) == (kind != "grpo")


def test_the_order_of_prompts_is_that_of_seed_and_epoch() -> None:
    def order(epoch: int, *, seed: int = 0) -> list[int]:
        sampler = PromptSampler(7, group=2, per_step=3, repeats=2, seed=seed)
        sampler.set_epoch(epoch)
        assert len(list(sampler)) == len(sampler) == 24
        return list(sampler)

    assert order(1) == order(1)
    assert len({tuple(order(0)), tuple(order(1)), tuple(order(0, seed=1))}) == 3
    assert order(0)[:6] == order(0)[6:12]


# The reference -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [ADAGRADSELECT, LORA], ids=["blocks", "lora"])
@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_the_reference_may_be_computed_before_training(
    kind: str, method: dict[str, Any], place: Path, tmp_path: Path
) -> None:
    """The same numbers up to rounding: the batches are padded otherwise."""
    losses = []
    for early in (False, True):
        recipe = recipe_of(kind, place, tmp_path / str(early), method=method, trainer={"precompute_reference": early})
        losses.append([entry["loss"] for entry in record(train(recipe, console=quiet()))["history"] if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_the_reference_is_the_model_before_training(place: Path, tmp_path: Path) -> None:
    """With weights that do not move nothing is preferred to it: the loss is log 2 at every step."""
    for name, method in (("full", {"name": "full"}), ("lora", LORA)):
        out = train(preference_recipe(place, tmp_path / name, method=method, optimizer={"lr": 1e-30}), console=quiet())
        losses = [entry["loss"] for entry in record(out)["history"] if "loss" in entry]
        assert losses == pytest.approx([math.log(2)] * 4, abs=1e-6)
        assert any(("frozen copy" if name == "full" else "switched off") in note for note in record(out)["notes"])


WITH_REFERENCE = {"dpo": DpoTrainer, "kto": KtoTrainer, "grpo": GrpoTrainer, "rloo": RlooTrainer}


@pytest.mark.parametrize("kind", WITH_REFERENCE)
def test_no_second_adapter_stays_on_the_model(kind: str, place: Path, tmp_path: Path) -> None:
    """TRL adds a copy of the adapter as the reference, which would be saved and counted."""
    settings = {"beta": 0.1}
    _, trainer, _ = build(recipe_of(kind, place, tmp_path, method=LORA, trainer=settings), tmp_path)
    assert isinstance(trainer, WITH_REFERENCE[kind])
    assert list(trainer.model.peft_config) == ["default"]
    assert not any(".ref." in name for name, _ in trainer.model.named_parameters())


def test_only_the_dropout_of_adapters_stays_where_answers_are_compared(place: Path, tmp_path: Path) -> None:
    for kind in ("dpo", "kto", "orpo"):
        _, trainer, _ = build(recipe_of(kind, place, tmp_path, method={**LORA, "dropout": 0.5}), tmp_path)
        assert {part.p for part in trainer.model.modules() if isinstance(part, nn.Dropout)} == {0.5}
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1))
    model = get_peft_model(model, LoraConfig(target_modules=["0"], lora_dropout=0.5))
    switch_off_dropout(model)
    assert [part.p for part in model.modules() if isinstance(part, nn.Dropout)] == [0.5, 0.0]


def test_a_mask_of_a_run_with_rewards_spends_its_budget_in_the_steps_that_fill(place: Path, tmp_path: Path) -> None:
    """Eight prompts, three of them a step: two steps, and two prompts rest."""
    run = {"steps": None, "epochs": 1, "batch_size": 12}
    recipe = recipe_of("grpo", place, tmp_path, method={"name": "id3", "budget": 90}, run=run, data={"limit": 8})
    _, trainer, _ = build(recipe, tmp_path)
    trainer.train()
    assert trainer.state.global_step == num_steps_of(trainer, recipe) == 2
    assert sum(trainer.optimizer.optimizer.last_record.num_entries.values()) == 90


def test_an_adapter_that_changes_the_model_at_once_is_refused(place: Path, tmp_path: Path) -> None:
    method = {
        "name": "peft",
        "type": "LORA",
        "options": {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": False},
    }
    with pytest.raises(UsageError, match="changes the model before its first step"):
        build(preference_recipe(place, tmp_path, method=method), tmp_path)


def test_what_does_not_fit_together_is_refused(place: Path, tmp_path: Path) -> None:
    for kind in ("dpo", "rloo"):
        with pytest.raises(UsageError, match=rf"method\.name=adalora does not fit trainer\.name={kind}"):
            build(recipe_of(kind, place, tmp_path, method={"name": "adalora", "rank": 2}), tmp_path)
    with pytest.raises(UsageError, match=r"needs batches before the first step, but trainer\.name=grpo draws"):
        build(prompt_recipe(place, tmp_path, method={**MASK, "calibration_batches": 1}), tmp_path)
    with pytest.raises(UsageError, match=r"trainer\.name=orpo compares two answers"):
        build(preference_recipe(place, tmp_path, trainer="orpo", file="rated"), tmp_path)
    with pytest.raises(UsageError, match=r"a step takes 2 different prompts .* but there are 1"):
        build(prompt_recipe(place, tmp_path, data={"limit": 1}), tmp_path)


def test_a_plan_says_what_it_leaves_out(place: Path, tmp_path: Path) -> None:
    plan = plan_recipe(preference_recipe(place, tmp_path), fractions=[0.5]).own.plan
    assert plan is not None
    assert any("frozen copy of the model that is the reference, 56.69 KiB" in note for note in plan.notes)
    drawn = plan_recipe(prompt_recipe(place, tmp_path), fractions=[0.5]).own.plan
    assert drawn is not None
    assert any("drawing answers" in note for note in drawn.notes)


# Rewards -----------------------------------------------------------------------------------------------------------


def test_random_entries_learn_what_is_rewarded(place: Path, tmp_path: Path) -> None:
    """One in twenty weights, drawn before the first step."""
    recipe = recipe_of(
        "grpo",
        place,
        tmp_path / "out",
        method={**MASK, "salience": "random"},
        optimizer={"lr": 0.3, "schedule": "constant"},
        run={"steps": 16, "batch_size": 32},
    )
    rewards = [entry["reward"] for entry in record(train(recipe, console=quiet()))["history"] if "reward" in entry]
    assert sum(rewards[-4:]) / 4 > sum(rewards[:4]) / 4 + 1


def rewards_of(place: Path, tmp_path: Path, source: str, **trainer: Any) -> Any:
    (tmp_path / "mine.py").write_text(source, "utf-8")
    recipe = prompt_recipe(place, tmp_path, trainer={"reward": f"{tmp_path / 'mine.py'}:mine", **trainer})
    return make_rewards(recipe, read_inputs(recipe))


def call(reward: Any, completions: list[str], **more: Any) -> Any:
    count = len(completions)
    given = {"prompts": ["p"] * count, "completions": completions, "messages": [""] * count, **more}
    return reward(source=["train"] * count, row=list(range(count)), **given)


def test_a_function_gets_the_columns_and_what_it_asks_for(place: Path, tmp_path: Path) -> None:
    lengths = "[len(c + q + a) for c, q, a in zip(completions, question, answer)]"
    source = f"def mine(completions, question, answer):\n    return {lengths}\n"
    (reward,) = rewards_of(place, tmp_path, source)
    assert call(reward, ["ab", "c"]) == [2 + 4 + 8, 1 + 4 + 8]


def test_messages_are_given_as_messages(place: Path, tmp_path: Path) -> None:
    lengths = "[len(p[0]['content'] + c[0]['content']) for p, c in zip(prompts, completions)]"
    source = f"def mine(prompts, completions, **_):\n    return {lengths}\n"
    (reward,) = rewards_of(place, tmp_path, source)
    assert call(reward, ["ab"], messages=[json.dumps([{"role": "user", "content": "abc"}])]) == [5]


def test_the_answer_checker_rewards_right_answers(place: Path, tmp_path: Path) -> None:
    recipe = prompt_recipe(place, tmp_path)
    (reward,) = make_rewards(recipe, read_inputs(recipe))
    assert call(reward, ["It is 0.", "so 2", "none", "#### 7"]) == [1.0, 1.0, 0.0, 0.0]
    reward.close()


BAD_REWARDS = {
    "nan": ("return [float('nan')] * len(completions)", "returned nan for an answer to .*line 1"),
    "none": ("return [None] * len(completions)", "returned None for an answer.*needs a second reward"),
    "count": ("return [1.0]", "returned 1 rewards for 2 answers"),
    "number": ("return 1.0", "returned 1.0, which is no list of numbers"),
    "raises": ("return [1 / 0]", r"raised ZeroDivisionError: division by zero \(mine\.py, line 2\)"),
}


@pytest.mark.parametrize("name", BAD_REWARDS)
def test_a_reward_that_fails_is_named(name: str, place: Path, tmp_path: Path) -> None:
    body, words = BAD_REWARDS[name]
    (reward,) = rewards_of(place, tmp_path, f"def mine(completions, **_):\n    {body}\n")
    with pytest.raises(UsageError, match=f"trainer.reward=.*mine.py:mine {words}"):
        call(reward, ["a", "b"])


def test_one_of_several_rewards_may_have_no_opinion(place: Path, tmp_path: Path) -> None:
    function = f"{tmp_path / 'mine.py'}:mine"
    source = "def mine(completions, **_):\n    return [None] * len(completions)\n"
    rewards = rewards_of(place, tmp_path, source, reward=[function, "gsm8k"], reward_weights=[1, 0.5])
    assert call(rewards[0], ["a"]) == [None]


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (
            "def mine(completions, points):\n    return []\n",
            "asks for 'points', which is no column; it can ask for .*answer",
        ),
        ("async def mine(**_):\n    return []\n", "is an async function"),
        ("def other():\n    pass\n", "has no function 'mine'; its functions are: other"),
        ("import no_such_module\n", "cannot be imported: ModuleNotFoundError"),
    ],
)
def test_a_function_that_cannot_be_used_is_refused_before_anything_is_written(
    source: str, words: str, place: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=words):
        rewards_of(place, tmp_path, source)


def test_a_function_is_found_by_file_or_module(place: Path) -> None:
    assert load_function("math:fsum") is math.fsum
    with pytest.raises(UsageError, match="no such file; paths are relative"):
        load_function(f"{place}/nothing.py:mine")


def test_a_failing_reward_ends_the_run_and_harms_no_checkpoint(place: Path, tmp_path: Path) -> None:
    value = "0.0 if trainer_state.global_step < 2 else float('nan')"
    source = f"def mine(completions, trainer_state, **_):\n    return [{value}] * len(completions)\n"
    (tmp_path / "mine.py").write_text(source, "utf-8")
    recipe = prompt_recipe(
        place, tmp_path / "out", trainer={"reward": f"{tmp_path / 'mine.py'}:mine"}, run={"save_every": 2}
    )
    with pytest.raises(UsageError, match="returned nan for an answer to"):
        train(recipe, console=quiet())
    assert RunFolder(tmp_path / "out").newest_checkpoint() == RunFolder(tmp_path / "out").checkpoint(2)
