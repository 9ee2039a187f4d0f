"""BlockOptimizer in an unmodified transformers.Trainer."""

from __future__ import annotations

import functools
import json
import logging
import shutil
from collections import Counter
from dataclasses import fields

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_models import tiny_batch, tiny_llama, tiny_lora
from transformers import Trainer, TrainerCallback, TrainingArguments

import gradselect as gs
from gradselect.integrations.transformers import SelectionCallback, SelectiveOptimizerFactory, summarise

NEW_NAME = "activation_checkpointing"  # transformers before 5.20 or so has the old one only
CHECKPOINTING = (
    NEW_NAME if NEW_NAME in {field.name for field in fields(TrainingArguments)} else "gradient_checkpointing"
)


@functools.cache
def examples(count):
    model = tiny_llama(layers=1)
    batches = (tiny_batch(model, seed=seed, batch=1) for seed in range(count))
    return [{name: tensor[0] for name, tensor in batch.items()} for batch in batches]


def arguments(folder, **settings):
    usual = {
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "max_steps": 6,
        "save_strategy": "no",
        "logging_steps": 1,
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
    }
    return TrainingArguments(str(folder), **{**usual, **settings})


def build(folder, policy, *, model=None, data=16, callbacks=None, options=None, **settings):
    args = arguments(folder, **settings)
    return Trainer(
        model=tiny_llama() if model is None else model,
        args=args,
        train_dataset=examples(data) if isinstance(data, int) else data,
        eval_dataset=examples(2),
        optimizer_cls_and_kwargs=(SelectiveOptimizerFactory, {"policy": policy, "args": args, **(options or {})}),
        callbacks=[SelectionCallback()] if callbacks is None else callbacks,
    )


def core(trainer):
    """Return the BlockOptimizer inside Accelerate's wrapper."""
    return trainer.optimizer.optimizer


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


class Recorder(TrainerCallback):
    """Keeps the records of the run and the parameters that each step changed."""

    def __init__(self):
        self.records = []
        self.changed = []

    def on_train_begin(self, args, state, control, *, model, optimizer, **_):
        optimizer.optimizer.add_record_hook(self.records.append)
        self._before = weights(model)

    def on_step_end(self, args, state, control, *, model, **_):
        after = weights(model)
        self.changed.append({name for name in after if not torch.equal(after[name], self._before[name])})
        self._before = after


# Resume ------------------------------------------------------------------------------------------------------------

RUNS = {
    "adagradselect-offload": (lambda: gs.AdaGradSelect(count=2, delta=9.0), gs.Offload(), torch.float32),
    "adagradselect-drop": (lambda: gs.AdaGradSelect(among=("layer.*",), every=2), gs.Drop(), torch.float32),
    "adagradselect-offload-bf16": (
        lambda: gs.AdaGradSelect(count=3, delta=9.0, among=None),
        gs.Offload(),
        torch.bfloat16,
    ),
    "grass-offload": (lambda: gs.GradNormTopK(count=2, refresh=2, ema=0.9, probe_steps=2), gs.Offload(), torch.float32),
    "cyclic-keep": (lambda: gs.Cyclic(every=3), gs.Keep(), torch.float32),
}


@pytest.mark.parametrize("run", RUNS)
def test_stopped_after_any_step_and_resumed_it_ends_bitwise_equal(run, tmp_path):
    policy, residency, dtype = RUNS[run]

    def start(folder, *, resume=None, **settings):
        trainer = build(
            folder,
            policy(),
            model=tiny_llama(layers=3, dtype=dtype),
            data=10,
            options={"residency": residency},
            callbacks=[SelectionCallback(jsonl=folder / "selection.jsonl")],
            max_steps=7,  # 5 in an epoch
            warmup_steps=2,
            **settings,
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = start(tmp_path, save_strategy="steps", save_steps=1)
    lines = (tmp_path / "selection.jsonl").read_text()
    for stop in range(1, 7):
        folder = tmp_path / f"resumed-{stop}"
        folder.mkdir()
        shutil.copy(tmp_path / "selection.jsonl", folder)
        resumed = start(folder, resume=str(tmp_path / f"checkpoint-{stop}"))
        assert same(weights(resumed.model), weights(whole.model)), stop
        assert core(resumed).update_counts == core(whole).update_counts
        assert (folder / "selection.jsonl").read_text() == lines
    records = [json.loads(line) for line in lines.splitlines()]
    assert len({tuple(record["selected"]) for record in records}) > 1
    assert {record["explored"] for record in records} == ({False} if run == "cyclic-keep" else {True, False})


def test_the_saved_optimizer_is_tensors_and_plain_values(tmp_path):
    build(tmp_path, gs.AdaGradSelect(), save_strategy="steps", save_steps=3, max_steps=3).train()
    saved = torch.load(tmp_path / "checkpoint-3" / "optimizer.pt", weights_only=True)
    assert saved["selection"]["step"] == 3


def test_resuming_without_saved_optimizer_is_refused(tmp_path):
    build(tmp_path, gs.Cyclic(), save_strategy="steps", save_steps=2, max_steps=2, save_only_model=True).train()
    with pytest.raises(gs.UsageError, match=r"after step 2.*save_only_model=False"):
        build(tmp_path, gs.Cyclic()).train(resume_from_checkpoint=True)


def test_resuming_with_another_policy_is_refused(tmp_path):
    build(tmp_path, gs.Cyclic(), save_strategy="steps", save_steps=2, max_steps=2).train()
    with pytest.raises(gs.UsageError, match="policy"):
        build(tmp_path, gs.Uniform(count=2)).train(resume_from_checkpoint=True)


# It is the Trainer's training --------------------------------------------------------------------------------------


def test_selecting_everything_is_the_trainers_adamw_bitwise(tmp_path):
    """With accumulation, an incomplete last window of the epoch, clipping, decay groups, warmup and a cosine."""
    settings = {
        "gradient_accumulation_steps": 3,
        "max_steps": 8,
        "max_grad_norm": 0.1,
        "weight_decay": 0.1,
        "warmup_steps": 3,
        "lr_scheduler_type": "cosine",
        "adam_beta2": 0.95,
        "adam_epsilon": 1e-6,
    }
    ours = build(tmp_path, gs.All(), **settings)
    ours.train()
    theirs = Trainer(
        tiny_llama(),
        arguments(tmp_path, **settings),
        train_dataset=examples(16),
        optimizer_cls_and_kwargs=(
            torch.optim.AdamW,
            {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-6, "foreach": False},
        ),
    )
    theirs.train()
    assert same(weights(ours.model), weights(theirs.model))
    for name in ("loss", "learning_rate", "grad_norm"):
        rows = [[log[name] for log in run.state.log_history if name in log] for run in (ours, theirs)]
        assert rows[0] == rows[1]
        assert len(rows[0]) == 8


@pytest.mark.parametrize("policy", [gs.AdaGradSelect(count=2, delta=9.0), gs.GradNormTopK(count=1)], ids=type)
def test_unselected_blocks_are_bit_identical(policy, tmp_path):
    recorder = Recorder()
    trainer = build(tmp_path, policy, callbacks=[SelectionCallback(), recorder], max_steps=8, weight_decay=0.5)
    members = {block.name: set(block.parameter_names) for block in gs.partition(trainer.model)}
    trainer.train()
    for record, changed in zip(recorder.records, recorder.changed, strict=True):
        assert changed == set().union(*(members[name] for name in record.selected))
    assert len({record.selected for record in recorder.records}) > 1


def test_with_accumulation_norms_are_of_the_whole_window(tmp_path):
    """The epoch has windows of 3 and 2 micro-batches. A learning rate of 0 keeps the weights, so a second run that sees
    the same gradients gives the expected norms."""

    class Norms(TrainerCallback):
        def __init__(self):
            self.seen = []

        def on_pre_optimizer_step(self, args, state, control, *, model, **_):
            names = {block.name: block.parameters for block in gs.partition(model)}
            self.seen.append({n: float(torch.cat([p.grad.flatten() for p in ps]).norm()) for n, ps in names.items()})

    settings = {"learning_rate": 0.0, "gradient_accumulation_steps": 3, "max_steps": 4, "max_grad_norm": 0.0}
    recorder, norms = Recorder(), Norms()
    callbacks = [SelectionCallback(), recorder]
    # Without arguments the factory cannot know of the accumulation; the callback does.
    options = {"args": None, "lr": 0.0}
    build(tmp_path, gs.GradNormTopK(count=2), callbacks=callbacks, options=options, data=10, **settings).train()
    build(tmp_path, gs.All(), callbacks=[SelectionCallback(), norms], data=10, **settings).train()
    assert len(recorder.records) == 4
    for record, seen in zip(recorder.records, norms.seen, strict=True):
        assert record.norms == pytest.approx(seen, rel=1e-5)


def test_norms_of_a_short_window_are_taken_before_clipping(tmp_path):
    """16 examples are 8 micro-batches of 2: with 3 of them a step, the third step of an epoch has 2."""

    def norms(clip):
        recorder = Recorder()
        policy = gs.GradNormTopK(count=1)
        settings = {"gradient_accumulation_steps": 3, "max_steps": 3, "max_grad_norm": clip, "learning_rate": 0.0}
        build(tmp_path / str(clip), policy, callbacks=[SelectionCallback(), recorder], **settings).train()
        return [record.norms for record in recorder.records]

    assert norms(1e-6) == norms(0.0)


def test_accumulation_that_nobody_announced_is_found_and_said(tmp_path, caplog):
    trainer = build(
        tmp_path,
        gs.GradNormTopK(count=2),
        callbacks=[],
        options={"accumulation_steps": 1},
        gradient_accumulation_steps=2,
    )
    trainer.train()
    assert "accumulation_steps=<backward passes per step>" in caplog.text
    assert core(trainer).num_steps == 6


def test_arguments_announce_the_accumulation_without_the_callback(tmp_path):
    trainer = build(tmp_path, gs.GradNormTopK(count=2), callbacks=[], gradient_accumulation_steps=2)
    trainer.train()
    assert core(trainer).accumulation_steps == 2


def test_a_step_that_the_gradient_scaler_skips_counts_for_nothing(tmp_path):
    class Overflow(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, *, model, **_):
            if state.global_step == 1:
                next(p for p in model.parameters() if p.grad is not None).grad.fill_(float("inf"))

    def run(scaler):
        recorder = Recorder()
        trainer = build(
            tmp_path,
            gs.GradNormTopK(count=2),
            callbacks=[SelectionCallback(), recorder, *([Overflow()] if scaler else [])],
            learning_rate=0.0,
            max_grad_norm=0.0,
            max_steps=4,
        )
        # As Accelerate has it for fp16, which it allows on a GPU only.
        trainer.accelerator.scaler = scaler
        trainer.train()
        return [record.norms for record in recorder.records]

    plain = run(None)
    assert run(torch.amp.GradScaler("cpu", init_scale=2.0**10)) == [plain[0], *plain[2:]]


def test_training_again_goes_on_with_the_same_optimizer(tmp_path):
    trainer = build(
        tmp_path, gs.AdaGradSelect(), callbacks=[SelectionCallback(jsonl=tmp_path / "s.jsonl")], max_steps=3
    )
    trainer.train()
    trainer.train()
    assert [json.loads(line)["step"] for line in (tmp_path / "s.jsonl").read_text().splitlines()] == list(range(6))
    assert trainer.state.log_history[0]["selection/blocks"] == 1


def test_training_begins_again_after_an_interruption_within_a_window(tmp_path):
    class Interrupt(TrainerCallback):
        def on_substep_end(self, args, state, control, **_):
            raise KeyboardInterrupt

    trainer = build(tmp_path, gs.GradNormTopK(count=2), gradient_accumulation_steps=2, max_steps=2)
    trainer.add_callback(Interrupt)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.remove_callback(Interrupt)
    trainer.train()
    assert sum(core(trainer).update_counts.values()) == 2 * 2


def test_with_a_new_model_and_optimizer_records_begin_anew(tmp_path):
    args = arguments(tmp_path, max_steps=2)
    trainer = Trainer(
        model_init=lambda: tiny_llama(),  # the Trainer refuses a function that takes more than a trial
        args=args,
        train_dataset=examples(16),
        optimizer_cls_and_kwargs=(SelectiveOptimizerFactory, {"policy": gs.Cyclic(), "args": args}),
        callbacks=[SelectionCallback(jsonl=tmp_path / "s.jsonl")],
    )
    trainer.train()
    trainer.train()
    assert [json.loads(line)["step"] for line in (tmp_path / "s.jsonl").read_text().splitlines()] == [0, 1]


# Activation checkpointing ------------------------------------------------------------------------------------------


def count_layer_runs(model):
    """Count the runs of each layer: one more for each checkpoint that the backward pass visits."""
    runs = Counter()
    for name, module in model.named_modules():
        if name.endswith("input_layernorm"):
            index = int(name.split(".")[-2])
            module.register_forward_pre_hook(lambda *_, index=index: runs.update([index]))
    return runs


@pytest.mark.parametrize("model", [tiny_llama, tiny_lora])
def test_with_checkpointing_layers_below_the_selected_ones_do_not_run_backward(model, tmp_path):
    def train(**settings):
        trainer = build(tmp_path, gs.Fixed(("layer.2",)), model=model(), max_steps=2, **settings)
        runs = count_layer_runs(trainer.model)
        trainer.train()
        return weights(trainer.model), runs

    plain, once = train()
    checkpointed, twice = train(**{CHECKPOINTING: True})
    assert once == {0: 2, 1: 2, 2: 2, 3: 2}
    assert twice == {0: 2, 1: 2, 2: 4, 3: 4}
    assert same(plain, checkpointed)
    assert not same(plain, weights(model()))


def test_reentrant_checkpointing_trains_right_and_says_what_it_costs(tmp_path, caplog):
    def train(**settings):
        trainer = build(tmp_path, gs.Fixed(("layer.2",)), max_steps=2, **settings)
        trainer.train()
        return weights(trainer.model)

    reentrant = train(**{CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": True}})
    assert "every layer" in caplog.text
    assert same(reentrant, train())
    assert not same(reentrant, weights(tiny_llama()))


# What the callback passes to the optimizer ---------------------------------------------------------------------------


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_in_the_paper_s_setting_explore_steps_are_the_steps_of_one_epoch(drop_last, accumulation, tmp_path):
    settings = {"dataloader_drop_last": drop_last, "gradient_accumulation_steps": accumulation}
    policy = gs.AdaGradSelect(preset="paper")
    trainer = build(tmp_path, policy, data=9, max_steps=-1, num_train_epochs=1, **settings)
    trainer.train()
    policy, steps = core(trainer).policy, trainer.state.global_step
    assert policy.explore_probability(steps - 1) > 0
    assert policy.explore_probability(steps) == 0
    assert policy.explore_probability(1) == pytest.approx(policy.epsilon_end ** (1 / steps))


def test_explore_steps_are_a_quarter_of_a_run_that_is_shorter_than_four_epochs(tmp_path):
    trainer = build(tmp_path, gs.AdaGradSelect(), data=6, max_steps=-1, num_train_epochs=2)
    trainer.train()
    policy, steps = core(trainer).policy, trainer.state.global_step
    assert policy.known_explore_steps() == round(steps / 4) < steps / 2


def test_without_a_known_length_explore_steps_are_shares_of_all_steps(tmp_path):
    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self):
            while True:
                yield from examples(4)

    for preset, num_explored in (("paper", 5), (None, 1)):
        trainer = build(tmp_path, gs.AdaGradSelect(preset=preset), data=Endless(), max_steps=5)
        trainer.train()
        assert core(trainer).policy.explore_probability(num_explored - 1) > 0
        assert core(trainer).policy.explore_probability(num_explored) == 0


def test_given_explore_steps_stay(tmp_path):
    trainer = build(tmp_path, gs.AdaGradSelect(explore_steps=2), max_steps=3)
    trainer.train()
    assert core(trainer).policy.explore_probability(2) == 0


def test_another_optimizer_is_refused(tmp_path):
    trainer = Trainer(tiny_llama(), arguments(tmp_path), train_dataset=examples(4), callbacks=[SelectionCallback()])
    with pytest.raises(gs.UsageError, match=r"the Trainer has AdamW.*SelectiveTraining"):
        trainer.train()


def test_a_rate_in_the_arguments_that_does_not_count_is_named(tmp_path, caplog):
    build(tmp_path, gs.All(), options={"args": None, "lr": 1e-3}, max_steps=1).train()
    assert "lr=0.01" in caplog.text
    assert "weight_decay" not in caplog.text  # left at its default in both, so no setting is ignored


def test_agreeing_arguments_are_not_warned_about(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="gradselect"):
        build(tmp_path, gs.All(), weight_decay=0.3, max_steps=1).train()
    assert not caplog.text


# Logs --------------------------------------------------------------------------------------------------------------


def test_logs_reach_the_history_and_tensorboard(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    recorder = Recorder()
    trainer = build(
        tmp_path,
        gs.AdaGradSelect(fraction=0.4),
        callbacks=[SelectionCallback(), recorder],
        options={"residency": gs.Offload()},
        report_to=["tensorboard"],
        logging_steps=3,
    )
    trainer.train()
    board = EventAccumulator(str(tmp_path / "board")).Reload()
    expected = {3: summarise(recorder.records[:3]), 6: summarise(recorder.records[3:])}
    for log in trainer.state.log_history[:2]:
        values = {name: value for name, value in log.items() if name.startswith("selection/")}
        assert values == expected[log["step"]]
        for name, value in values.items():
            shown = {event.step: event.value for event in board.Scalars(f"train/{name}")}
            assert shown[log["step"]] == pytest.approx(value)
    for name, count in core(trainer).update_counts.items():
        assert trainer.state.log_history[-1][f"selection/updates/{name}"] == count
        assert board.Scalars(f"train/selection/updates/{name}")[-1].value == count


def test_logs_of_an_evaluation_stay_as_they_are(tmp_path):
    trainer = build(tmp_path, gs.All(), max_steps=1, logging_steps=2, eval_strategy="steps", eval_steps=1)
    trainer.train()
    evaluation = trainer.state.log_history[0]
    assert "eval_loss" in evaluation
    assert not any(name.startswith("selection/") for name in evaluation)


def test_a_summary_is_over_all_steps_since_the_last_log():
    def record(step, selected, explored, state_bytes, moved_bytes, entropy):
        return gs.StepRecord(
            step=step,
            selected=selected,
            explored=explored,
            state_bytes=state_bytes,
            moved_bytes=moved_bytes,
            selection_entropy=entropy,
        )

    assert summarise([record(0, ("a",), True, 8, 0, 0.0), record(1, ("a", "b"), False, 4, 6, 0.9)]) == {
        "selection/blocks": 1.5,
        "selection/explored": 0.5,
        "selection/entropy": 0.9,
        "selection/state_bytes": 8,
        "selection/moved_bytes": 3.0,
    }


# The factory -------------------------------------------------------------------------------------------------------


def test_arguments_may_come_second_as_axolotl_passes_them(tmp_path):
    args = arguments(
        tmp_path, weight_decay=0.2, adam_beta1=0.8, adam_beta2=0.9, adam_epsilon=1e-5, gradient_accumulation_steps=4
    )
    optimizer = SelectiveOptimizerFactory()(tiny_llama(), args, policy=gs.All())
    assert optimizer.defaults == {"lr": 1e-2, "weight_decay": 0.2, "betas": (0.8, 0.9), "eps": 1e-5}
    assert optimizer.accumulation_steps == 4


def test_options_count_more_than_arguments(tmp_path):
    optimizer = SelectiveOptimizerFactory()(tiny_llama(), arguments(tmp_path), policy=gs.All(), lr=3.0)
    assert optimizer.defaults["lr"] == 3.0


@pytest.mark.parametrize("wrapper", [torch.nn.DataParallel, torch.nn.Module], ids=["wrapped", "plain"])
def test_a_wrapper_for_data_parallelism_is_taken_off(wrapper):
    model = tiny_llama()
    wrapped = torch.nn.DataParallel(model) if wrapper is torch.nn.DataParallel else model
    optimizer = SelectiveOptimizerFactory()(wrapped, policy=gs.All(), lr=1e-3)
    assert optimizer.param_groups[0]["param_names"][0] == "model.embed_tokens.weight"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 1e-3}, "need one of 'policy'"),
        ({"policy": gs.All()}, "no 'lr'.*TrainingArguments"),
        ({"policy": gs.All(), "lr": 1e-3, "residence": gs.Keep()}, "'residence'.*write 'residency'"),
        ({"policy": gs.All(), "lr": 1e-3, "zzz": 1}, "'zzz'.*known are policy, always, lr"),
        ({"policy": gs.All(), "lr": -1}, "lr=-1"),
    ],
)
def test_what_is_wrong_with_the_kwargs_is_said(options, message):
    with pytest.raises(gs.UsageError, match=message):
        SelectiveOptimizerFactory()(tiny_llama(layers=2), **options)
