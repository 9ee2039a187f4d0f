"""SelectiveTraining: one argument of any Trainer does what factory and callback do apart."""

from __future__ import annotations

import copy
import gc
import json
import pickle
import weakref

import pytest
import torch
import transformers
from accelerate.state import GradientState
from peft import LoraConfig, get_peft_model
from test_integration_transformers import arguments, examples
from tiny_models import tiny_batch, tiny_llama, tiny_t5
from transformers import Trainer

import gradselect as gs
from gradselect.integrations.transformers import SelectionCallback, SelectiveOptimizerFactory, SelectiveTraining
from gradselect.integrations.transformers.frames import call_after_training

CHOICES = {
    "policy": {"policy": gs.AdaGradSelect(count=1, delta=9.0), "always": ("head",), "residency": gs.Drop()},
    "mask": {"mask": gs.ID3(density=0.05, steps=6), "always": ("lm_head.weight",)},
}


def build(folder, *, callbacks=(), model=None, **settings):
    others = {name: settings.pop(name) for name in ("optimizers", "optimizer_cls_and_kwargs") if name in settings}
    return Trainer(
        tiny_llama() if model is None else model,
        arguments(folder, **settings),
        train_dataset=examples(16),
        callbacks=list(callbacks),
        **others,
    )


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


# One argument ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CHOICES)
def test_it_is_the_factory_and_the_callback(kind, tmp_path):
    options = CHOICES[kind]
    settings = {"gradient_accumulation_steps": 2, "lr_scheduler_type": "linear", "weight_decay": 0.1}
    one = build(tmp_path / "one", callbacks=[SelectiveTraining(**options, jsonl=tmp_path / "one.jsonl")], **settings)
    args = arguments(tmp_path / "two", **settings)
    two = Trainer(
        tiny_llama(),
        args,
        train_dataset=examples(16),
        optimizer_cls_and_kwargs=(SelectiveOptimizerFactory, {"args": args, **options}),
        callbacks=[SelectionCallback(jsonl=tmp_path / "two.jsonl")],
    )
    logs = [list(trainer.state.log_history) for trainer in (one, two) if trainer.train()]
    assert same(weights(one.model), weights(two.model))
    assert (tmp_path / "one.jsonl").read_bytes() == (tmp_path / "two.jsonl").read_bytes()
    timeless = [
        [
            {key: value for key, value in entry.items() if "per_second" not in key and "runtime" not in key}
            for entry in log
        ]
        for log in logs
    ]
    assert timeless[0] == timeless[1]
    assert any("selection/state_bytes" in entry for entry in timeless[0])


@pytest.mark.parametrize(
    ("plain", "built"),
    [
        (
            {"name": "adagradselect", "count": 1, "delta": 9, "always": "head", "residency": "drop"},
            {"policy": gs.AdaGradSelect(count=1, delta=9.0, seed=7), "always": ("head",), "residency": gs.Drop()},
        ),
        ({"name": "id3", "density": 0.05}, {"mask": gs.ID3(density=0.05, steps=6)}),
        ({"name": "full"}, {"policy": gs.All(), "residency": gs.Keep()}),
    ],
    ids=lambda value: value.get("name"),
)
def test_plain_data_builds_the_same(plain, built, tmp_path):
    """The seed of the selection is that of the arguments; the steps of a mask are those of the run."""
    one = build(tmp_path / "one", callbacks=[SelectiveTraining(method=plain)], seed=7)
    two = build(tmp_path / "two", callbacks=[SelectiveTraining(**built)], seed=7)
    assert one.train().training_loss == two.train().training_loss
    assert same(weights(one.model), weights(two.model))


@pytest.mark.parametrize("rule", [gs.SGDRule(), gs.TorchRule(torch.optim.Adafactor)], ids=str)
def test_a_rule_without_betas_trains(rule, tmp_path):
    trainer = build(tmp_path, callbacks=[SelectiveTraining(policy=gs.Uniform(count=1), rule=rule)], max_steps=2)
    trainer.train()
    assert trainer.optimizer.optimizer.num_steps == 2


@pytest.mark.parametrize(
    "plain",
    [{"name": "adagradselect", "fraction": 0.3, "always": ["norm"]}, "lisa", {"name": "id3", "density": 0.1}],
    ids=str,
)
def test_a_method_can_be_pickled(plain):
    """For processes that a notebook or a search starts."""
    method = gs.method(plain)
    copy = pickle.loads(pickle.dumps(method))
    assert copy == method
    assert copy.model_dump(exclude_unset=True) == method.model_dump(exclude_unset=True)


def test_a_mask_without_steps_takes_those_of_the_run_and_resumes_with_them(tmp_path):
    """ID3 spreads its budget over the steps of the run; a run that is continued for longer keeps the first number."""

    def part(steps):
        callbacks = [SelectiveTraining(mask=gs.ID3(budget=60), jsonl=tmp_path / "part.jsonl")]
        return build(tmp_path / "part", callbacks=callbacks, save_strategy="steps", save_steps=3, max_steps=steps)

    part(6).train()
    resumed = part(8)
    resumed.train(resume_from_checkpoint=str(tmp_path / "part" / "checkpoint-3"))
    counts = [
        sum(json.loads(line)["num_entries"].values()) for line in (tmp_path / "part.jsonl").read_text().splitlines()
    ]
    assert counts == [10, 20, 30, 40, 50, 60, 60, 60]
    assert resumed.optimizer.optimizer.mask.filled_steps == 6


def test_steps_that_nobody_fills_in_are_asked_for():
    model = tiny_llama()
    optimizer = gs.SparseOptimizer(model, mask=gs.ID3(density=0.01))
    model(**tiny_batch(model, seed=0)).loss.backward()
    with pytest.raises(gs.UsageError, match=r"steps=None is still open; write ID3\(..., steps=1000\)"):
        optimizer.step()


# Other trainers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CHOICES)
def test_seq2seq_trainer(kind, tmp_path):
    model = tiny_t5()
    rows = [{name: tensor[0] for name, tensor in tiny_batch(model, seed=seed, batch=1).items()} for seed in range(8)]
    usual = {"max_steps": 4, "use_cpu": True, "disable_tqdm": True, "report_to": "none", "save_strategy": "no"}
    before = weights(model)
    records = []
    trainer = transformers.Seq2SeqTrainer(
        model=model,
        args=transformers.Seq2SeqTrainingArguments(str(tmp_path), learning_rate=1e-2, **usual),
        train_dataset=rows,
        callbacks=[SelectiveTraining(**{kind: CHOICES[kind][kind]}, jsonl=tmp_path / "records.jsonl")],
    )
    trainer.train()
    records = (tmp_path / "records.jsonl").read_text().splitlines()
    assert len(records) == 4
    assert not same(weights(model), before)


def test_one_callback_serves_two_stages(tmp_path):
    """Each Trainer gets an optimizer of its own; after each the model is given back."""
    selective = SelectiveTraining(policy=gs.Cyclic(every=2))
    model = tiny_llama()
    first = build(tmp_path / "first", model=model, callbacks=[selective])
    first.train()
    second = build(tmp_path / "second", model=model, callbacks=[selective])
    second.train()
    assert first.optimizer is not second.optimizer
    assert second.optimizer.optimizer.num_steps == 6
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_trainer_without_a_name_trains_and_is_freed():
    """`Trainer(...).train()`: while it runs, nothing but the call holds the Trainer."""

    class Plain:
        def train(self):
            return "trained"

    class Calls:
        number = 0

        def count(self):
            self.number += 1

    calls = Calls()

    def watched():
        trainer = Plain()
        call_after_training(trainer, calls.count)
        return trainer

    result = watched().train()  # not in an assert, which pytest takes apart into names
    assert result == "trained"
    trainer = watched()
    assert (trainer.train(), trainer.train(), calls.number) == ("trained", "trained", 3)
    gone = weakref.ref(trainer)
    gc.disable()
    try:
        del trainer
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("how", ["cloudpickle", "deepcopy"])
def test_a_copied_trainer_trains_as_the_first_one_and_alone(how, tmp_path, monkeypatch):
    """Ray's search of hyperparameters pickles the Trainer without its model; each trial trains a copy."""
    cloudpickle = pytest.importorskip("cloudpickle")
    # Once a Trainer has trained in the process, no Trainer can be pickled: this holds weak references.
    monkeypatch.setattr(GradientState, "_shared_state", {})
    trainer = Trainer(
        model_init=lambda: tiny_llama(),
        args=arguments(tmp_path, max_steps=3),
        train_dataset=examples(16),
        callbacks=[SelectiveTraining(**CHOICES["policy"], jsonl=tmp_path / "s.jsonl")],
    )
    trainer.model = None
    copied = copy.deepcopy(trainer) if how == "deepcopy" else pickle.loads(cloudpickle.dumps(trainer))
    copied.train()
    lines = (tmp_path / "s.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2]
    assert trainer.optimizer is None
    assert all(parameter.requires_grad for parameter in copied.model.parameters())
    trainer.train()
    assert same(weights(trainer.model), weights(copied.model))


def test_a_second_one_that_comes_late_is_refused(tmp_path):
    trainer = build(tmp_path, callbacks=[SelectiveTraining(policy=gs.Cyclic())])
    trainer.add_callback(SelectiveTraining(policy=gs.Cyclic()))
    with pytest.raises(gs.UsageError, match="SelectiveTraining was added after the Trainer was built"):
        trainer.train()


def test_it_can_be_attached_to_a_trainer_that_is_built(tmp_path):
    early = build(tmp_path / "early", callbacks=[SelectiveTraining(**CHOICES["policy"])])
    late = build(tmp_path / "late")
    SelectiveTraining(**CHOICES["policy"]).attach(late)
    assert early.train().training_loss == late.train().training_loss
    assert same(weights(early.model), weights(late.model))


# Bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_replicas_with_checkpointing_look_for_unused_parameters(tmp_path):
    """The Trainer has told Accelerate its own default, which is False here, before any callback is called."""
    callbacks = [SelectiveTraining(policy=gs.Uniform(count=1))]
    trainer = build(tmp_path, callbacks=callbacks, gradient_checkpointing=True)
    assert trainer.accelerator.ddp_handler.to_kwargs()["find_unused_parameters"] is True


def test_only_a_trainer_of_transformers_can_be_attached_to():
    with pytest.raises(gs.UsageError, match="no Trainer object; write SelectiveTraining"):
        SelectiveTraining(policy=gs.Uniform(count=1)).attach(tiny_llama())


def test_added_too_late_it_refuses_to_train(tmp_path):
    trainer = build(tmp_path)
    trainer.add_callback(SelectiveTraining(**CHOICES["policy"]))
    with pytest.raises(gs.UsageError, match=r"added after the Trainer was built.*\.attach\(trainer\)"):
        trainer.train()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"need one of 'policy'.*and have none"),
        ({"policy": gs.All(), "mask": gs.ID3(density=0.1)}, r"have 'policy' and 'mask'"),
        ({"policy": gs.All(), "residancy": gs.Drop()}, r"unknown option 'residancy'.*write 'residency'"),
        ({"method": {"name": "adagradselect", "fractoin": 0.3}}, r"method.fractoin: unknown key.*'fraction'"),
        ({"method": "lora"}, r"method.name='lora' does not select blocks or entries"),
        ({"method": {"name": "id3", "density": 0.1, "adapter": {"rank": 4}}}, r"method.adapter=.*peft.get_peft_model"),
    ],
)
def test_bad_options_are_refused_before_there_is_a_trainer(options, message):
    with pytest.raises(gs.UsageError, match=message):
        SelectiveTraining(**options)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"name": "sparsegrad"}, r"looks at 8 batches before the first step"),
        ({"name": "fixed", "names": ["layer.99"]}, r"layer\.99"),
    ],
)
def test_a_method_that_does_not_fit_the_trainer_is_refused_before_the_first_step(method, message, tmp_path):
    trainer = build(tmp_path, callbacks=[SelectiveTraining(method=method)])
    before = weights(trainer.model)
    with pytest.raises(gs.UsageError, match=message):
        trainer.train()
    assert same(weights(trainer.model), before)


def test_a_file_of_records_that_is_no_file_name_is_refused():
    for wrong in (5, "", ["selection.jsonl"]):
        for make in (
            lambda wrong: SelectiveTraining(policy=gs.All(), jsonl=wrong),
            lambda wrong: SelectionCallback(jsonl=wrong),
        ):
            with pytest.raises(gs.UsageError, match=r"jsonl=.* is no file name; write e.g. jsonl='selection.jsonl'"):
                make(wrong)
        with pytest.raises(gs.UsageError, match=r"path=.* is no file name"):
            gs.JsonlWriter(wrong)


def test_an_option_that_the_method_decides_is_refused(tmp_path):
    trainer = build(
        tmp_path, callbacks=[SelectiveTraining(method={"name": "uniform", "count": 1}, residency=gs.Drop())]
    )
    with pytest.raises(gs.UsageError, match=r"residency=.* beside a method: it is a key of the method"):
        trainer.train()


def test_a_second_optimizer_is_refused(tmp_path):
    model = tiny_llama()
    selective = SelectiveTraining(policy=gs.All())
    adamw = torch.optim.AdamW(model.parameters())
    with pytest.raises(gs.UsageError, match=r"the Trainer has optimizers= and SelectiveTraining"):
        build(tmp_path, model=model, callbacks=[selective], optimizers=(adamw, None))
    with pytest.raises(gs.UsageError, match=r"the Trainer has optimizer_cls_and_kwargs= and SelectiveTraining"):
        build(tmp_path, callbacks=[selective], optimizer_cls_and_kwargs=(torch.optim.AdamW, {"lr": 1e-3}))
    with pytest.raises(gs.UsageError, match=r"one of two SelectiveTraining"):
        build(tmp_path, callbacks=[selective, SelectiveTraining(policy=gs.All())])
    with pytest.raises(gs.UsageError, match=r"leave SelectionCallback out"):
        build(tmp_path, callbacks=[SelectionCallback(), selective])


def test_another_optimizer_in_the_arguments_is_said(tmp_path, caplog):
    build(tmp_path, callbacks=[SelectiveTraining(policy=gs.All())], optim="adafactor")
    assert "TrainingArguments(optim='adafactor') is not used" in caplog.text
    caplog.clear()
    build(tmp_path, callbacks=[SelectiveTraining(policy=gs.All())])
    assert "is not used" not in caplog.text


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft uses it
@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("adapted", [False, True])
def test_a_selection_within_an_adapter_is_said(adapted, attached, tmp_path, caplog):
    """A recipe with a LoRA trained a part of the LoRA, and nothing said so."""
    lora = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["norm"])
    model = get_peft_model(tiny_llama(), lora) if adapted else tiny_llama()
    trainable = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    selective = SelectiveTraining(policy=gs.Cyclic(every=2))
    trainer = build(tmp_path, model=model, callbacks=[] if attached else [selective])
    if attached:
        selective.attach(trainer)
    assert (f"the method selects among its {trainable:,} weights" in caplog.text) == adapted
    assert ("to train the model's own weights leave the adapter out" in caplog.text) == adapted


def test_the_factory_takes_arguments_by_position_too(tmp_path):
    """Axolotl passes its arguments by position, also when they are among the kwargs."""
    args = arguments(tmp_path)
    for keywords in ({}, {"args": args}):
        optimizer = SelectiveOptimizerFactory()(tiny_llama(), args, policy=gs.Uniform(count=1), **keywords)
        assert optimizer.defaults["lr"] == args.learning_rate
