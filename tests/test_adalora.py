"""AdaLoRA in somebody's own Trainer: ranks fall to the budget, or a message says why they would not."""

from __future__ import annotations

import logging

import peft
import pytest
import torch
from adapter_support import needs_add_adapter
from classification_fixtures import classify, write_place
from tiny_models import tiny_llama
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

import gradselect as gs
from gradselect.app.inputs import read_inputs
from gradselect.app.runtime.run_folder import RunFolder
from gradselect.app.train.setup import build_trainer
from gradselect.integrations.transformers import AdaLoraCallback, SelectiveTraining
from gradselect.integrations.transformers.adalora import ranks

# peft uses a name that transformers has replaced since.
pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")

STEPS = 12
ROWS = [{"input_ids": [n, n + 1, n + 2, n + 3], "labels": [n, n + 1, n + 2, n + 3]} for n in range(8)]


def config(**changes):
    settings = {"init_r": 4, "target_r": 2, "tinit": 2, "tfinal": 4, "deltaT": 2, "total_step": STEPS}
    return peft.AdaLoraConfig(**settings | changes, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def adapted(**changes):
    return peft.get_peft_model(tiny_llama(layers=2), config(**changes))


def trainer_of(model, folder, *callbacks, **settings):
    arguments = {"max_steps": STEPS, "learning_rate": 1e-2, "report_to": [], "use_cpu": True, "disable_tqdm": True}
    arguments |= {"per_device_train_batch_size": 4, "save_strategy": "no", "logging_strategy": "no"}
    return Trainer(model, TrainingArguments(folder, **arguments | settings), None, ROWS, callbacks=list(callbacks))


def total(model):
    return sum(ranks(model).values())


def test_in_a_trainer_ranks_fall_to_the_budget_only_with_the_callback(tmp_path):
    """Without it AdaLoRA is a LoRA of the initial rank: nothing in a Trainer lowers ranks."""
    alone, lowered = adapted(), adapted()
    trainer_of(alone, tmp_path).train()
    trainer_of(lowered, tmp_path, AdaLoraCallback()).train()
    num_matrices = 2 * 2
    assert total(alone) == 4 * num_matrices
    assert total(lowered) == 2 * num_matrices
    kept = lowered.peft_config["default"].rank_pattern
    assert sum(sum(row) for row in kept.values()) == 2 * num_matrices


def test_the_schedule_follows_the_number_of_steps_and_says_so(tmp_path, caplog):
    """PEFT's default tfinal=0 would put the last allocation behind the last step."""
    model = adapted(total_step=1000, tfinal=0)
    trainer_of(model, tmp_path, AdaLoraCallback()).train()
    assert "total_step=1000, tfinal=0 become 12, 1" in caplog.text
    assert total(model) == 2 * 4


def steps(model, callback, *, skipped=(), until=STEPS):
    """The loop of a Trainer, without one."""
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-2)
    state, control = TrainerState(max_steps=STEPS), TrainerControl()
    arguments = (None, state, control)
    callback.on_train_begin(*arguments, model=model, optimizer=optimizer)
    for step in range(until):
        state.global_step = step
        if step not in skipped:
            model(input_ids=torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss.backward()
        optimizer.step()
        callback.on_optimizer_step(*arguments, optimizer=optimizer)
        optimizer.zero_grad()
    callback.on_train_end(*arguments, model=model, optimizer=optimizer)


@pytest.mark.parametrize("skipped", [(), (8,), (5, 8, 9)])
def test_the_budget_is_met_when_the_step_of_the_last_allocation_is_skipped(skipped, caplog):
    """One allocation before the last, in step 5, leaves one rank too many; without it there is none to go on with."""
    model = adapted(deltaT=5)
    steps(model, AdaLoraCallback(), skipped=skipped)
    assert total(model) == 2 * 4
    assert "AdaLoRA" not in caplog.text


def test_a_training_that_ends_early_says_what_is_left_of_the_ranks(caplog):
    model = adapted()
    steps(model, AdaLoraCallback(), until=6)
    assert f"AdaLoRA: {total(model)} ranks are left in 4 matrices, but target_r=2 asks for 8" in caplog.text


def test_a_recipe_meets_the_budget_with_masters_for_a_head_in_bf16_too(tmp_path):
    """The head is PEFT's copy in bf16, which this library's optimizer trains; it keeps gradients for the scores."""
    place = write_place(tmp_path)
    method = {"name": "adalora", "rank": 2, "initial_rank": 4, "every": 2, "start": 0.1, "end": 0.6}
    recipe = classify(place, tmp_path / "out", method=method, model={"dtype": "bfloat16"}, run={"steps": 10})
    trainer = build_trainer(recipe, read_inputs(recipe), folder=RunFolder(tmp_path / "out"))
    assert isinstance(trainer.optimizer, gs.BlockOptimizer)
    trainer.train()
    assert total(trainer.model) == 2 * len(ranks(trainer.model)) > 0


def injected():
    model = tiny_llama(layers=2)
    model.add_adapter(config())
    return model


def frozen():
    return peft.get_peft_model(tiny_llama(layers=2), config(inference_mode=True))


@pytest.mark.parametrize(
    ("build", "words"),
    [
        pytest.param(
            injected,
            r"add_adapter throws the allocator.*write model = peft\.get_peft_model",
            marks=needs_add_adapter,
        ),
        (frozen, r"is frozen; load it with .*is_trainable=True"),
        (lambda: tiny_llama(layers=2), r"found no AdaLoRA in LlamaForCausalLM; write model = peft\.get_peft_model"),
        (lambda: adapted(total_step=1000, tinit=10), r"tinit=10, tfinal=4\) leaves no step.*12 steps; write"),
    ],
    ids=["add_adapter", "frozen", "none", "short"],
)
def test_an_adalora_whose_ranks_could_not_fall_is_refused(build, words):
    state = TrainerState(max_steps=STEPS)
    with pytest.raises(gs.UsageError, match=words):
        AdaLoraCallback().on_train_begin(None, state, TrainerControl(), model=build(), optimizer=None)


def test_a_resumed_training_is_refused():
    state = TrainerState(max_steps=STEPS, global_step=3)
    with pytest.raises(gs.UsageError, match=r"resumes after step 3, but checkpoints hold no scores"):
        AdaLoraCallback().on_train_begin(None, state, TrainerControl(), model=adapted(), optimizer=None)


def test_only_accelerate_s_wrapper_is_taken_off_an_optimizer():
    """Another one may keep an optimizer beside itself, whose gradients are not those of the AdaLoRA."""
    model = adapted()
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad])
    optimizer.optimizer = gs.SparseOptimizer(tiny_llama(layers=1), gs.ID3(density=0.1, steps=2))
    AdaLoraCallback().on_train_begin(
        None, TrainerState(max_steps=STEPS), TrainerControl(), model=model, optimizer=optimizer
    )


def test_a_mask_on_an_adalora_is_refused_with_the_callback_and_warned_of_without(tmp_path, caplog):
    mask = SelectiveTraining(mask=gs.ID3(density=0.1))
    with pytest.raises(gs.UsageError, match=r"SparseOptimizer with a selection frees them"):
        trainer_of(adapted(), tmp_path, mask, AdaLoraCallback()).train()
    with caplog.at_level(logging.WARNING):
        trainer_of(adapted(), tmp_path, SelectiveTraining(mask=gs.ID3(density=0.1)), max_steps=1).train()
    assert "AdaLoRA on 4 matrices trains here as a plain LoRA whose ranks never fall" in caplog.text
    assert "LoraConfig(r=...)" in caplog.text
