"""TRL's preference, reward and sampling trainers, with all their defaults, train only what is selected.

They checkpoint activations, and with an adapter they compute their reference with the adapter switched off, after which
PEFT leaves all of it trainable, in the middle of a step.
"""

from __future__ import annotations

import copy
from collections import Counter

import peft
import pytest
import torch
from packaging import version
from preference_support import KINDS, SAMPLING, Witness, build, foreign_marks, load_model, save_model
from transformers import TrainerCallback

import gradselect as gs
from gradselect.integrations.transformers import SelectionCallback

pytestmark = [
    # trl and peft use names that transformers has replaced since.
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*is deprecated:FutureWarning"),
]

CHOICES = {
    "uniform": lambda: gs.Uniform(count=1),
    "adagradselect": lambda: gs.AdaGradSelect(count=1, delta=9.0, explore_steps=3),
    "static": lambda: gs.StaticMask(density=0.05),
    "id3": lambda: gs.ID3(density=0.05, steps=3),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Folder of the model that every trainer starts from."""
    folder = tmp_path_factory.mktemp("base")
    save_model(folder)
    return folder


class Stop(TrainerCallback):
    """Saves and stops after these steps."""

    def __init__(self, *steps):
        self.steps = steps

    def on_step_end(self, args, state, control, **_):
        if state.global_step in self.steps:
            control.should_save = control.should_training_stop = True


def flags(model):
    return {name: parameter.requires_grad for name, parameter in model.named_parameters()}


def same_weights(first, second):
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    return all(torch.equal(one, other) for one, other in pairs)


def every_trainer(test):
    """Run a test with each trainer, with and without an adapter."""
    test = pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])(test)
    return pytest.mark.parametrize("kind", KINDS)(test)


# With all defaults -------------------------------------------------------------------------------------------------


@every_trainer
@pytest.mark.parametrize("choice", ["uniform", "static"])
def test_only_what_is_selected_has_gradients_and_changes(kind, lora, choice, base, tmp_path):
    witness = Witness()
    trainer = build(kind, base, tmp_path, CHOICES[choice](), lora=lora, callbacks=[witness])
    before = flags(trainer.model)
    trainer.train()
    witness.check(trainer.state.global_step)
    assert flags(trainer.model) == before
    assert not foreign_marks(trainer.model)


@every_trainer
@pytest.mark.parametrize("choice", ["adagradselect", "id3"])
def test_after_two_stops_it_ends_bitwise_equal(kind, lora, choice, base, tmp_path):
    """GRPO and RLOO too: the Trainer restores the random state, and by default no completion is used twice."""

    def go(folder, *callbacks, resume=None):
        witness = Witness()
        trainer = build(kind, base, folder, CHOICES[choice](), lora=lora, callbacks=[witness, *callbacks], max_steps=6)
        trainer.train(resume_from_checkpoint=resume and str(folder / f"checkpoint-{resume}"))
        witness.check(len(witness.records))
        return trainer, witness.records

    whole, records = go(tmp_path / "whole")
    parts = tmp_path / "parts"
    (first, begun), (second, continued) = go(parts, Stop(2)), go(parts, Stop(4), resume=2)
    last, ended = go(parts, resume=4)
    assert [trainer.state.global_step for trainer in (first, second, last)] == [2, 4, 6]
    assert same_weights(last.model, whole.model)
    assert [*begun, *continued, *ended] == records


# References --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("choice", ["adagradselect", "id3"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_a_reference_computed_before_training(kind, lora, choice, base, tmp_path):
    witness = Witness()
    trainer = build(
        kind, base, tmp_path, CHOICES[choice](), lora=lora, callbacks=[witness], precompute_ref_log_probs=True
    )
    trainer.train()
    witness.check(trainer.state.global_step)


@pytest.mark.parametrize("choice", ["adagradselect", "static"])
@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_a_reference_that_is_an_adapter_of_the_same_model(kind, choice, base, tmp_path):
    """TRL copies the adapter that the user made, and switches between both in each step."""
    model = peft.get_peft_model(load_model(kind, base), peft.LoraConfig(r=2, init_lora_weights=False))
    witness = Witness()
    trainer = build(kind, model, tmp_path, CHOICES[choice](), callbacks=[witness])
    trainer.train()
    witness.check(trainer.state.global_step)


@pytest.mark.parametrize("choice", ["adagradselect", "id3"])
@pytest.mark.parametrize("kind", SAMPLING)
def test_a_penalty_for_leaving_the_reference(kind, choice, base, tmp_path):
    witness = Witness()
    trainer = build(
        *(kind, base, tmp_path, CHOICES[choice]()),
        lora=True,
        callbacks=[witness],
        beta=0.1,
        num_iterations=2,
        gradient_accumulation_steps=2,
    )
    trainer.train()
    witness.check(trainer.state.global_step)


@pytest.mark.skipif(version.parse(peft.__version__) < version.parse("0.21"), reason="add_adapter thaws what is frozen")
@pytest.mark.parametrize("with_callback", [True, False])
@pytest.mark.parametrize("choice", ["uniform", "id3"])
@pytest.mark.parametrize("kind", ["dpo", "kto", "grpo"])
def test_what_the_user_froze_in_an_adapter_stays_frozen(kind, choice, with_callback, base, tmp_path):
    """PEFT thaws it in the middle of a step. With checkpoints, torch then refused the backward pass."""
    model = peft.get_peft_model(load_model(kind, base), peft.LoraConfig(r=2, init_lora_weights=False))
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    before, witness = flags(model), Witness()
    settings = {"beta": 0.1} if kind in SAMPLING else {}
    trainer = build(kind, model, tmp_path, CHOICES[choice](), callbacks=[witness], **settings)
    if not with_callback:
        trainer.remove_callback(SelectionCallback)
    trainer.train()
    if not with_callback:
        trainer.optimizer.optimizer.close()
    witness.check(trainer.state.global_step)
    assert {name: flag for name, flag in flags(model).items() if name in before} == before


# Checkpoints -------------------------------------------------------------------------------------------------------


def count_layer_runs(model):
    """Count the runs of each layer with gradients: one more for each checkpoint that the backward pass visits."""
    runs = Counter()

    def count(index):
        if torch.is_grad_enabled():
            runs[index] += 1

    for name, module in model.named_modules():
        if name.endswith("input_layernorm"):
            index = int(name.split(".")[-2])
            module.register_forward_pre_hook(lambda *_, index=index: count(index))
    return runs


@every_trainer
def test_checkpoints_below_the_selected_blocks_are_not_run_again(kind, lora, base, tmp_path):
    """TRL turns checkpointing off and on within the step, which made the backward pass visit every layer again."""
    trainer = build(kind, base, tmp_path, gs.Fixed(("layer.1",)), lora=lora)
    runs = count_layer_runs(trainer.model)
    trainer.train()
    assert runs == {0: 4, 1: 8}


@pytest.mark.parametrize("choice", ["adagradselect", "id3"])
@pytest.mark.parametrize("kind", ["dpo", "grpo"])
def test_reentrant_checkpoints_are_one_backward_pass(kind, choice, base, tmp_path, caplog):
    """Each of them runs a backward pass inside the pass."""

    def go(**settings):
        witness = Witness()
        trainer = build(kind, base, tmp_path, CHOICES[choice](), lora=True, callbacks=[witness], **settings)
        trainer.train()
        witness.check(4)
        return trainer.model, witness.records

    plain, records = go(gradient_checkpointing=False)
    reentrant, found = go(gradient_checkpointing_kwargs={"use_reentrant": True})
    assert found == records
    assert same_weights(reentrant, plain)
    assert "backward passes" not in caplog.text


def test_a_copy_of_the_model_can_require_gradients_of_its_inputs(base, tmp_path):
    class Copies(TrainerCallback):
        def on_step_end(self, args, state, control, *, model, **_):
            model.enable_input_require_grads()
            assert not model.model.embed_tokens._forward_hooks
            self.copy = copy.deepcopy(model)

    copies = Copies()
    trainer = build("dpo", base, tmp_path, CHOICES["uniform"](), callbacks=[copies], max_steps=1)
    trainer.train()
    for model in (copies.copy, trainer.model):
        model.enable_input_require_grads()
        assert len(model.model.embed_tokens._forward_hooks) == 1


# Evaluation --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("choice", ["adagradselect", "id3"])
@pytest.mark.parametrize("kind", ["dpo", "kto", "reward", "cpo"])
def test_an_evaluation_between_backward_pass_and_step_changes_nothing(kind, choice, base, tmp_path):
    class Evaluates(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **_):
            self.trainer.evaluate(self.trainer.train_dataset.select(range(4)))

    def go(*callbacks):
        witness = Witness()
        trainer = build(kind, base, tmp_path, CHOICES[choice](), lora=True, callbacks=[witness, *callbacks])
        for callback in callbacks:
            callback.trainer = trainer
        trainer.train()
        witness.check(4)
        return trainer.model, witness.records

    (plain, records), (evaluated, found) = go(), go(Evaluates())
    assert found == records
    assert same_weights(evaluated, plain)
