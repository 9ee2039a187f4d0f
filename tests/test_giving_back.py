"""What an optimizer changes on a model ends with the training: marks, hooks, and copies made on the way."""

from __future__ import annotations

import contextlib
import copy
import io
import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import tiny_batch, tiny_llama
from torch.optim.swa_utils import AveragedModel
from transformers import Trainer, TrainerCallback, TrainingArguments

import gradselect as gs
from gradselect.integrations.transformers import SelectionCallback, SelectiveOptimizerFactory

# peft uses a name that transformers has replaced since.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
]


CHOICES = {
    "blocks": {"policy": gs.Uniform(count=1)},
    "adagradselect": {"policy": gs.AdaGradSelect(count=1)},
    "mask": {"mask": gs.StaticMask(salience=gs.salience.magnitude, budget=5, among=("*q_proj*",))},
    "lift": {"mask": gs.LIFT(rank=2)},
}


def optimizer_of(model, choice, **settings):
    kind = gs.SparseOptimizer if "mask" in CHOICES[choice] else gs.BlockOptimizer
    extra = {} if kind is gs.SparseOptimizer else {"always": ()}
    options = dict(CHOICES[choice])
    if choice == "adagradselect":
        options["policy"] = gs.AdaGradSelect(count=1, explore_steps=2)
    return kind(model, *options.values(), lr=1e-2, **extra, **settings)


def train(model, optimizer, steps, first=0):
    for step in range(first, first + steps):
        model(**tiny_batch(model, seed=step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def flags(model):
    return {name: parameter.requires_grad for name, parameter in model.named_parameters()}


def traces(model):
    """Names of parameters and modules on which something of ours is left."""
    left = [
        name
        for name, parameter in model.named_parameters()
        if vars(parameter) or getattr(parameter, "_post_accumulate_grad_hooks", None)
    ]
    hooks = ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks", "_backward_pre_hooks")
    return left + [name for name, module in model.named_modules() if any(getattr(module, hook) for hook in hooks)]


def trainer_of(folder, model, choice=None, *, callbacks=(), **settings):
    usual = {
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
    }
    args = TrainingArguments(str(folder), **{**usual, **settings})
    rows = [{name: tensor[0] for name, tensor in tiny_batch(model, seed=seed, batch=1).items()} for seed in range(8)]
    more = {}
    if choice is not None:
        more["optimizer_cls_and_kwargs"] = (SelectiveOptimizerFactory, {"args": args, **CHOICES[choice]})
        callbacks = [SelectionCallback(), *callbacks]
    return Trainer(model=model, args=args, train_dataset=rows, callbacks=list(callbacks), **more)


class StopError(Exception):
    """Ends a training from inside."""


class Stopping(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        raise StopError


# After training ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("choice", CHOICES)
def test_after_train_the_model_is_as_the_user_had_it(choice, tmp_path):
    model = tiny_llama()
    model.model.embed_tokens.requires_grad_(False)
    before = flags(model)
    trainer = trainer_of(tmp_path, model, choice)
    trainer.train()
    assert flags(model) == before
    assert traces(model) == []
    assert trainer.args.max_grad_norm == 1.0


@pytest.mark.parametrize("choice", ["blocks", "mask"])
def test_a_second_stage_with_a_plain_trainer_trains_every_tensor(choice, tmp_path):
    """Stage two of supervised, then preference training moved 18 of 57 tensors and said nothing."""
    model = tiny_llama()
    first = trainer_of(tmp_path, model, choice)
    first.train()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer_of(tmp_path, model).train()
    assert not [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])]
    assert first.optimizer is not None


def test_an_exception_gives_the_model_and_the_arguments_back(tmp_path):
    model = tiny_llama()
    trainer = trainer_of(tmp_path, model, "mask", callbacks=[Stopping()])
    with pytest.raises(StopError):
        trainer.train()
    assert all(flags(model).values())
    assert traces(model) == []
    assert trainer.args.max_grad_norm == 1.0


def test_a_callback_that_was_added_later_gives_the_model_back_after_an_interruption(tmp_path):
    """Plugins add it with `add_callback`, and it hears first of a Trainer whose `train()` is running."""
    model = tiny_llama()
    trainer = trainer_of(tmp_path, model)
    trainer.optimizer_cls_and_kwargs = (SelectiveOptimizerFactory, {"args": trainer.args, **CHOICES["blocks"]})
    trainer.add_callback(SelectionCallback())
    trainer.add_callback(Stopping())
    for _ in range(2):
        with pytest.raises(StopError):
            trainer.train()
        assert all(flags(model).values())
        assert traces(model) == []


@pytest.mark.parametrize("is_late", [False, True])
def test_a_training_that_is_refused_before_its_first_step_gives_the_model_back(is_late, tmp_path):
    """The optimizer had frozen the model when it was built, and the callback did not know it yet."""
    model = tiny_llama()
    trainer_of(tmp_path, model, save_strategy="steps", save_steps=1, save_only_model=True).train()
    trainer = trainer_of(tmp_path, model, None if is_late else "blocks")
    if is_late:
        trainer.optimizer_cls_and_kwargs = (SelectiveOptimizerFactory, {"args": trainer.args, **CHOICES["blocks"]})
        trainer.add_callback(SelectionCallback())
    with pytest.raises(gs.UsageError, match="no optimizer state"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert all(flags(model).values())
    assert traces(model) == []


def test_an_interrupted_forward_pass_does_not_end_the_watch():
    """torch calls the hooks behind a forward pass after exceptions, but not after KeyboardInterrupt."""
    model = tiny_llama()
    optimizer = optimizer_of(model, "blocks")
    train(model, optimizer, 2)

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    handle = model.model.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(**tiny_batch(model, seed=0))
    handle.remove()
    model.requires_grad_(True)
    loss = model(**tiny_batch(model, seed=0)).loss
    frozen = [name for name, is_trainable in flags(model).items() if not is_trainable]
    loss.backward()
    assert frozen
    assert not [name for name in frozen if model.get_parameter(name).grad is not None]


@pytest.mark.parametrize("choice", CHOICES)
def test_state_that_is_loaded_while_it_is_closed_puts_nothing_on_the_model(choice):
    model = tiny_llama()
    optimizer = optimizer_of(model, choice)
    train(model, optimizer, 2)
    optimizer.close()
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert all(flags(model).values())
    assert traces(model) == []
    with optimizer:
        train(model, optimizer, 1, first=2)
    assert traces(model) == []


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("steps", [0, 2])
def test_a_dropped_optimizer_leaves_nothing_on_the_model(choice, steps):
    """Its hooks did nothing more, but stayed, and each new optimizer added others."""
    model = tiny_llama()
    optimizer = optimizer_of(model, choice)
    train(model, optimizer, steps)
    del optimizer
    assert all(flags(model).values())
    assert traces(model) == []


def test_the_next_train_takes_the_model_again_and_goes_on(tmp_path):
    model = tiny_llama()
    trainer = trainer_of(tmp_path, model, "adagradselect")
    trainer.train()
    trainer.train()
    assert trainer.optimizer.optimizer.num_steps == 6
    assert traces(model) == []


@pytest.mark.parametrize("choice", ["adagradselect", "mask"])
def test_the_end_of_a_with_block_gives_the_model_back(choice):
    model = tiny_llama()
    with contextlib.suppress(StopError), optimizer_of(model, choice) as optimizer:
        train(model, optimizer, 2)
        assert not all(flags(model).values())
        raise StopError
    assert all(flags(model).values())
    assert traces(model) == []
    with pytest.raises(gs.UsageError, match="closed"):
        train(model, optimizer, 1)


@pytest.mark.parametrize("choice", CHOICES)
def test_closed_and_opened_again_it_ends_as_if_it_had_never_been_closed(choice):
    ends = []
    for closes in (False, True):
        model = tiny_llama()
        optimizer = optimizer_of(model, choice)
        for step in range(4):
            train(model, optimizer, 1, first=step)
            if closes:
                optimizer.close()
                optimizer.reopen()
        ends.append(model.state_dict())
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


# What the user does in between -------------------------------------------------------------------------------------


@pytest.mark.parametrize("choice", ["adagradselect", "mask"])
def test_what_the_user_freezes_between_two_trainings_stays_frozen(choice, tmp_path):
    model = tiny_llama()
    first = trainer_of(tmp_path, model, choice)
    first.train()
    model.model.layers[0].requires_grad_(False)
    before = copy.deepcopy(model.model.layers[0].state_dict())
    first.train()
    second = trainer_of(tmp_path, model, choice)
    second.train()
    assert not any(parameter.requires_grad for parameter in model.model.layers[0].parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.model.layers[0].state_dict().items())
    assert "layer.0" not in getattr(second.optimizer.optimizer, "blocks", ())


def test_an_adapter_on_a_model_that_an_open_optimizer_holds_freezes_its_base():
    model = tiny_llama()
    older = optimizer_of(model, "adagradselect")
    train(model, older, 3)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    newer = gs.BlockOptimizer(adapted, gs.All(), lr=1e-2)
    names = [name for group in newer.param_groups for name in group["param_names"]]
    assert names
    assert all("lora_" in name for name in names)


def test_freezing_a_part_of_a_model_that_an_open_optimizer_holds_is_refused_where_nobody_can_tell():
    model = tiny_llama()
    older = gs.BlockOptimizer(model, gs.Fixed(("layer.0", "norm")), lr=1e-2)
    model.model.norm.requires_grad_(False)
    with pytest.raises(gs.UsageError, match=r"call close\(\) on that optimizer"):
        gs.BlockOptimizer(model, gs.All(), lr=1e-2)
    older.close()
    model.model.norm.requires_grad_(False)
    assert "norm" not in gs.BlockOptimizer(model, gs.All(), lr=1e-2).blocks


@pytest.mark.parametrize("choice", ["blocks", "mask"])
def test_an_adapter_that_is_added_after_the_optimizer_is_detected_before_the_first_step(choice):
    model = tiny_llama()
    optimizer = optimizer_of(model, choice)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    before = {name: parameter.detach().clone() for name, parameter in adapted.named_parameters()}
    adapted(**tiny_batch(model, seed=0)).loss.backward()
    with pytest.raises(gs.UsageError, match="an adapter was added"):
        optimizer.step()
    assert all(torch.equal(parameter, before[name]) for name, parameter in adapted.named_parameters())


def put_adapter(model):
    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))


def thaw_head(model):
    model.lm_head.requires_grad_(True)
    return model


def assign_weights(model):
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    return model


def put_head(model):
    model.lm_head = torch.nn.Linear(*reversed(model.lm_head.weight.shape), bias=False)
    model.lm_head.requires_grad_(False)
    return model


def take_layer_away(model):
    model.model.layers = model.model.layers[:-1]
    return model


def widen_embedding(model):
    weight = model.model.embed_tokens.weight
    weight.data = torch.cat([weight.data, weight.data[:1]])
    return model


@pytest.mark.parametrize(
    ("change", "frozen", "message"),
    [
        (put_adapter, None, "an adapter was added"),
        (thaw_head, "lm_head", "'lm_head.weight' among them: an adapter was added, or weights were thawed"),
        (assign_weights, None, "are no longer in the model, 'model.embed_tokens.weight' among them"),
        (put_head, None, "1 parameters of the optimizer are no longer in the model, 'lm_head.weight' among them"),
        (take_layer_away, None, "are no longer in the model, 'model.layers.3"),
        (widen_embedding, None, r"'model.embed_tokens.weight' has the shape \(65, 16\), and had"),
    ],
)
@pytest.mark.parametrize("choice", ["blocks", "mask"])
def test_a_model_that_is_rebuilt_between_two_steps_is_refused(choice, change, frozen, message):
    """Only the first step looked once, and training went on with nothing, or with a part, of what was asked for."""
    model = tiny_llama(tied=False)
    if frozen is not None:
        model.get_submodule(frozen).requires_grad_(False)
    optimizer = optimizer_of(model, choice)
    train(model, optimizer, 1)
    changed = change(model)
    changed(**tiny_batch(model, seed=0)).loss.backward()
    before = {name: parameter.detach().clone() for name, parameter in changed.named_parameters()}
    for _ in range(2):
        with pytest.raises(gs.UsageError, match=message):
            optimizer.step()
    assert all(torch.equal(parameter, before[name]) for name, parameter in changed.named_parameters())


def test_a_model_that_is_put_right_again_goes_on():
    model = tiny_llama(tied=False)
    optimizer = optimizer_of(model, "blocks")
    train(model, optimizer, 1)
    head = model.lm_head
    put_head(model)
    with pytest.raises(gs.UsageError, match=r"'lm_head.weight' among them"):
        train(model, optimizer, 1)
    model.lm_head = head
    train(model, optimizer, 1)
    assert optimizer.num_steps == 2


def test_a_parametrisation_that_keeps_the_parameters_goes_on():
    model = tiny_llama()
    optimizer = optimizer_of(model, "blocks")
    train(model, optimizer, 1)
    torch.nn.utils.parametrize.register_parametrization(model.model.norm, "weight", torch.nn.Identity())
    train(model, optimizer, 1)
    assert optimizer.num_steps == 2


# Copies ------------------------------------------------------------------------------------------------------------


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def saved_whole(model):
    file = io.BytesIO()
    torch.save(model, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled, saved_whole, lambda model: AveragedModel(model).module])
@pytest.mark.parametrize("choice", ["blocks", "mask"])
def test_a_copy_made_during_training_has_the_users_marks(choice, duplicate):
    model = tiny_llama()
    model.model.norm.requires_grad_(False)
    before = flags(model)
    optimizer = optimizer_of(model, choice)
    train(model, optimizer, 2)
    held = flags(model)
    copied = duplicate(model)
    assert flags(copied) == before
    assert not [name for name, parameter in copied.named_parameters() if vars(parameter)]
    assert flags(model) == held != before
    train(model, optimizer, 1)
