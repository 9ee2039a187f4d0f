"""Borders of the library: what others do to an optimizer and its state_dict, and what people type first."""

from __future__ import annotations

import copy
import logging
import math

import pytest
import torch
from checkpoint_support import WAYS, step_idly
from tiny_models import tiny_batch, tiny_llama
from transformers import Trainer, TrainingArguments

import gradselect as gs
from gradselect.integrations.transformers import SelectionCallback, SelectiveOptimizerFactory, SelectiveTraining

MAKES = {
    "explore": lambda model: gs.BlockOptimizer(model, gs.AdaGradSelect(count=2, explore_steps=3), lr=1e-2),
    "uniform": lambda model: gs.BlockOptimizer(model, gs.Uniform(count=2), lr=1e-2),
    "offload": lambda model: gs.BlockOptimizer(model, gs.Cyclic(every=2), lr=1e-2, residency=gs.Offload()),
    "growing mask": lambda model: gs.SparseOptimizer(model, gs.ID3(density=0.02, steps=4), lr=1e-2),
    "dense mask": lambda model: gs.SparseOptimizer(model, gs.GMT(fraction=0.2), lr=1e-2),
}


def train(model, optimizer, steps, first=0):
    for step in range(first, first + steps):
        model(**tiny_batch(model, seed=step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


# State dicts that others take apart --------------------------------------------------------------------------------


@pytest.mark.parametrize("way", [way for way in WAYS if way != "by files"])
@pytest.mark.parametrize("make", ["explore", "growing mask", "dense mask"])
def test_a_state_dict_that_is_taken_apart_keeps_its_selection(make, way, tmp_path):
    """Helpers drop the top-level entry `selection`: resuming said that no BlockOptimizer wrote this."""
    model, again = tiny_llama(), tiny_llama()
    optimizer, resumed = MAKES[make](model), MAKES[make](again)
    train(model, optimizer, 3)
    again.load_state_dict(model.state_dict())
    WAYS[way](model, optimizer, again, resumed, folder=tmp_path)
    assert resumed.num_steps == 3
    train(model, optimizer, 4, first=3)
    train(again, resumed, 4, first=3)
    assert same(model.state_dict(), again.state_dict())


def test_state_that_is_lost_on_the_way_is_refused():
    model = tiny_llama()
    optimizer = MAKES["explore"](model)
    train(model, optimizer, 3)
    saved = optimizer.state_dict()
    saved["state"].popitem()
    with pytest.raises(gs.UsageError, match=r"the state of 1 of \d+ parameters was lost on the way"):
        MAKES["explore"](tiny_llama()).load_state_dict(saved)


@pytest.mark.parametrize("make", MAKES)
def test_a_step_of_zero_gradients_at_rate_0_counts_for_nothing(make):
    """torchtitan's `init_optim_state` counted as a step of ID3."""
    ends = []
    for is_idle in (False, True):
        model = tiny_llama()
        optimizer = MAKES[make](model)
        before = copy.deepcopy(model.state_dict())
        if is_idle:
            step_idly(optimizer)
            assert optimizer.num_steps == 0
            assert same(before, model.state_dict())
        train(model, optimizer, 5)
        ends.append(model.state_dict())
    assert same(*ends)


def test_what_an_idle_step_shows_is_no_state():
    """It stayed for good: with Drop all moments lay on the device."""
    model = tiny_llama()
    optimizer = gs.BlockOptimizer(model, gs.Cyclic(every=1), lr=1e-2, residency=gs.Drop())
    train(model, optimizer, 2)
    held = optimizer.memory()
    step_idly(optimizer)
    assert all(
        optimizer.state[parameter].keys() == {"step", "exp_avg", "exp_avg_sq"} for parameter in model.parameters()
    )
    assert optimizer.memory() == held
    assert optimizer.state_dict()["selection"]["with_state"] == []
    train(model, optimizer, 1, first=2)
    assert not any(optimizer.state.values())


def test_a_step_at_rate_0_with_gradients_counts():
    """Warmup begins at rate 0."""
    for make in MAKES:
        model = tiny_llama()
        optimizer = MAKES[make](model)
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        train(model, optimizer, 1)
        assert optimizer.num_steps == 1, make


# What people type --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call",
    [
        lambda model: gs.BlockOptimizer(model.parameters(), gs.All()),
        lambda model: gs.BlockOptimizer(list(model.parameters()), gs.All()),
        lambda model: gs.SparseOptimizer(model.parameters(), gs.ID3(density=0.1, steps=3)),
        lambda model: gs.partition(dict(model.named_parameters())),
    ],
)
def test_parameters_in_place_of_a_model_are_answered_with_what_to_type(call):
    with pytest.raises(gs.UsageError, match=r"pass the model itself and not model.parameters\(\)"):
        call(tiny_llama())


def test_a_wrapper_that_keeps_its_own_state_is_told_why_it_cannot_work():
    """schedule-free's wrapper ended in KeyError: 'exp_avg'."""
    model = tiny_llama()
    optimizer = gs.BlockOptimizer(model, gs.All(), lr=1e-2)
    for parameter in model.parameters():
        optimizer.state[parameter]["z"] = parameter.detach().clone()
    model(**tiny_batch(model, seed=0)).loss.backward()
    with pytest.raises(gs.UsageError, match=r"something else keeps 'z' in the optimizer's state.*schedule-free"):
        optimizer.step()


def arguments(folder, **settings):
    usual = {"max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "save_strategy": "no"}
    quiet = {"use_cpu": True, "disable_tqdm": True, "report_to": "none"}
    return TrainingArguments(str(folder), **{**usual, **quiet, **settings})


def trainer_of(folder, model, policy, *, options=None, args=None, **settings):
    args = args or arguments(folder, **settings)
    rows = [{name: tensor[0] for name, tensor in tiny_batch(model, seed=seed, batch=1).items()} for seed in range(24)]
    kwargs = {"args": args, "policy": policy, **(options or {})}
    return Trainer(
        model=model,
        args=args,
        train_dataset=rows,
        optimizer_cls_and_kwargs=(SelectiveOptimizerFactory, kwargs),
        callbacks=[SelectionCallback()],
    )


@pytest.mark.parametrize(
    ("policy", "expected", "explore_steps"),
    [
        (gs.AdaGradSelect(count=1), "about 1 of 4 steps", 1),  # N: a quarter of the run
        (gs.AdaGradSelect(count=1, preset="paper"), "about 1 of 4 steps", 4),  # 1 + 0.32 + 0.1 + 0.03, N: all of it
        (gs.AdaGradSelect(count=1, explore_steps=10**6), "about 4 of 4 steps", 10**6),
        (gs.GradNormTopK(count=1, refresh=2), "about 2 of 4 steps", None),
    ],
)
def test_exploring_is_bounded_by_the_run_and_announced(policy, expected, explore_steps, tmp_path, caplog):
    """Of an epoch of 1,831 steps 20 were run, and all 20 looked at all gradients, unsaid."""
    caplog.set_level(logging.WARNING)
    trainer = trainer_of(tmp_path, tiny_llama(), policy)
    trainer.train()
    assert expected in caplog.text
    if isinstance(policy, gs.AdaGradSelect):
        assert trainer.optimizer.optimizer.policy.known_explore_steps() == explore_steps


def test_a_run_that_ends_before_anything_is_selected_is_refused(tmp_path):
    """GRASS looks for 20 steps by default: a trial of 4 trained nothing and ended like any other."""
    with pytest.raises(gs.UsageError, match=r"the first 4 steps look .* ends after 4: .* a smaller probe_steps"):
        trainer_of(tmp_path, tiny_llama(), gs.GradNormTopK(count=1, probe_steps=4)).train()
    model = tiny_llama()
    before = copy.deepcopy(model.state_dict())
    trainer_of(tmp_path, model, gs.GradNormTopK(count=1, probe_steps=3)).train()
    assert any(not torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


class TooLarge(Trainer):
    """Has no memory for batches of more than two rows."""

    def training_step(self, model, inputs, *args, **options):
        if len(inputs["input_ids"]) > 2:
            raise RuntimeError("CUDA out of memory. Tried to allocate")
        return super().training_step(model, inputs, *args, **options)


@pytest.mark.parametrize("kwargs", [{"policy": gs.AdaGradSelect(count=1)}, {"mask": gs.ID3(density=0.1)}])
def test_an_attempt_without_a_step_decides_nothing_for_the_next_one(kwargs, tmp_path):
    """With auto_find_batch_size the steps of the first attempt, of larger batches, held for the whole run."""
    sizes = {"per_device_train_batch_size": 3, "auto_find_batch_size": True}
    args = arguments(tmp_path, max_steps=-1, num_train_epochs=1, **sizes)
    model = tiny_llama()
    rows = [{name: tensor[0] for name, tensor in tiny_batch(model, seed=seed, batch=1).items()} for seed in range(24)]
    trainer = TooLarge(model=model, args=args, train_dataset=rows, callbacks=[SelectiveTraining(**kwargs)])
    trainer.train()
    optimizer = trainer.optimizer.optimizer
    assert optimizer.num_steps == trainer.state.global_step == 12
    if "mask" in kwargs:
        assert optimizer.mask.filled_steps == 12
    else:
        assert optimizer.policy.known_explore_steps() == 12 // 4


class Poisoned(Trainer):
    """Has a loss of NaN in its second step."""

    def compute_loss(self, *args, **options):
        loss = super().compute_loss(*args, **options)
        return loss * float("nan") if self.state.global_step == 1 else loss


@pytest.mark.parametrize("kwargs", [{"policy": gs.Uniform(count=1)}, {"mask": gs.ID3(density=0.1)}])
def test_the_norm_of_a_skipped_step_is_logged(kwargs, tmp_path):
    """With a mask it was 0.0: the Trainer finds no gradients."""
    model = tiny_llama()
    rows = [{name: tensor[0] for name, tensor in tiny_batch(model, seed=seed, batch=1).items()} for seed in range(24)]
    selective = SelectiveTraining(**kwargs, skip_nonfinite=True)
    args = arguments(tmp_path, logging_steps=1)
    trainer = Poisoned(model=model, args=args, train_dataset=rows, callbacks=[selective])
    trainer.train()
    norms = [log["grad_norm"] for log in trainer.state.log_history if "grad_norm" in log]
    assert trainer.optimizer.optimizer.num_skipped == 1
    assert [math.isnan(norm) or norm == 0.0 for norm in norms] == [False, True, False, False]
    assert math.isnan(norms[1])


def test_a_second_training_says_that_it_goes_on(tmp_path, caplog):
    """It said that a step would explore, and none did: the optimizer was behind that."""
    trainer = trainer_of(tmp_path, tiny_llama(), gs.AdaGradSelect(count=1))
    trainer.train()
    caplog.clear()
    trainer.train()
    assert "about 0 of 4 steps will look at the gradients of all blocks: the optimizer has taken 4 steps" in caplog.text
    assert trainer.optimizer.optimizer.num_steps == 8


def test_blocks_that_never_train_are_named_with_their_weights(tmp_path, caplog):
    trainer = trainer_of(tmp_path, tiny_llama(tied=True), gs.AdaGradSelect(count=1), options={"always": ("norm",)})
    optimizer = trainer.create_optimizer()
    trainer.train()
    assert optimizer.never_trained == {"embedding": 64 * 16}
    all_weights = sum(weight.numel() for weight in trainer.model.parameters())
    assert f"1 of 6 blocks never train, embedding: 1,024 of {all_weights:,} weights" in caplog.text


MATRICES = (
    '; with few layers matrices did better: write blocks=gs.partition(model, by="matrix"), in a recipe '
    "method.blocks=matrix"
)


@pytest.mark.parametrize(
    ("layers", "policy", "said", "advice"),
    [
        (4, gs.GradNormTopK(count=1, refresh=None, among=("layers",)), True, ""),
        (4, gs.AdaGradSelect(count=1, delta=1e-9), True, MATRICES),
        (
            9,
            gs.AdaGradSelect(count=5, delta=1e-9),
            True,
            "; to have each train at least once in 4 steps, write coverage=4, in a recipe method.coverage=4",
        ),
        (9, gs.AdaGradSelect(count=1, delta=1e-9), True, ""),  # it would be 18 steps, and the run has 4
        (4, gs.AdaGradSelect(count=1, coverage=4), False, ""),
        (4, gs.Cyclic(every=1, among=("layers",)), False, ""),
    ],
)
def test_candidates_that_trained_in_no_step_are_said_at_the_end(layers, policy, said, advice, tmp_path, caplog):
    """Two of six layers of an encoder got all updates, and nothing but a picture showed it."""
    trainer = trainer_of(tmp_path, tiny_llama(layers=layers), policy)
    trainer.train()
    counts = trainer.optimizer.optimizer.update_counts
    never = [name for name in sorted(counts) if name.startswith("layer.") and not counts[name]]
    assert bool(never) is said
    message = (
        f"{len(never)} of {layers} candidate blocks trained in none of the 4 steps, {', '.join(never)}: "
        f"{2336 * len(never):,} of {2336 * layers:,} weights{advice}"
    )
    assert [message] * said == [line for line in caplog.messages if "candidate blocks trained" in line]


@pytest.mark.parametrize(
    ("policy", "said"),
    [
        (gs.Uniform(count=1), "embedding, norm, head can train too, as among=None means all blocks: 2,064 of "),
        (gs.GradNormTopK(count=1), 'weights; among=["layers"] leaves them out'),
        (gs.Uniform(count=1, among=("layers",)), ""),
        (gs.CostAware(count=1), ""),
        (gs.All(), ""),
    ],
    ids=repr,
)
def test_candidates_around_the_layers_are_said_where_among_was_left_open(policy, said, tmp_path, caplog):
    trainer_of(tmp_path, tiny_llama(), policy).train()
    assert said in caplog.text
    assert ("can train too" in caplog.text) == bool(said)


@pytest.mark.parametrize("by", ["arguments", "accelerate launch"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_is_refused_with_what_to_use_instead(stage, by, tmp_path):
    class Plugin:
        zero_stage = stage

    args = arguments(tmp_path)
    args.deepspeed = {"zero_optimization": {"stage": stage}} if by == "arguments" else None
    args.deepspeed_plugin = Plugin()
    with pytest.raises(gs.UsageError, match=rf"stage={stage}.*FSDP2.*DDP"):
        SelectiveOptimizerFactory()(tiny_llama(), args=args, policy=gs.All())
    with pytest.raises(gs.UsageError, match=rf"stage={stage}"):
        SelectionCallback().on_init_end(args, None, None, model=tiny_llama())  # pyright: ignore


@pytest.mark.parametrize(
    ("tied", "always", "said"),
    [
        (True, (), "the embedding has 3 rows more than the checkpoint"),
        (True, ("embedding",), ""),
        (False, (), "the embedding and the head each have 3 rows more than the checkpoint"),
        (False, ("embedding",), "the head has 3 rows more than the checkpoint"),
        (False, ("embedding", "head"), ""),
    ],
)
def test_new_tokens_that_the_method_may_not_train_are_said(tied, always, said, tmp_path, caplog):
    tiny_llama(tied=tied).save_pretrained(tmp_path / "base")
    model = type(tiny_llama()).from_pretrained(tmp_path / "base")
    model.resize_token_embeddings(model.config.vocab_size + 3)
    trainer = trainer_of(tmp_path, model, gs.Uniform(count=1), options={"always": always})
    trainer.train()
    assert said in caplog.text
    assert ("rows more than the checkpoint" in caplog.text) == bool(said)
