"""SparseOptimizer in an unmodified transformers.Trainer, and in TRL's."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from test_integration_transformers import arguments, core, examples, same, weights
from tiny_models import tiny_llama, tiny_lora
from transformers import Trainer

import gradselect as gs
from gradselect.integrations.transformers import SelectionCallback, SelectiveOptimizerFactory


def build(folder, mask, *, model=None, data=16, callbacks=None, options=None, **settings):
    args = arguments(folder, **settings)
    return Trainer(
        model=tiny_llama() if model is None else model,
        args=args,
        train_dataset=examples(data),
        optimizer_cls_and_kwargs=(SelectiveOptimizerFactory, {"mask": mask, "args": args, **(options or {})}),
        callbacks=[SelectionCallback()] if callbacks is None else callbacks,
    )


# Resume ------------------------------------------------------------------------------------------------------------

RUNS = {
    "id3": (lambda: gs.ID3(budget=60, steps=6), {}, torch.float32),
    "id3-lean": (lambda: gs.ID3(budget=60, steps=6), {"lean_accumulation": True}, torch.float32),
    "id3-bf16": (lambda: gs.ID3(budget=60, steps=6), {"always": ("model.norm.weight",)}, torch.bfloat16),
    "static": (lambda: gs.StaticMask(density=0.01, refresh_every=2), {}, torch.float32),
    "gmt": (lambda: gs.GMT(fraction=0.1), {}, torch.float32),
    "top": (lambda: gs.TopGradient(density=0.02), {}, torch.float32),
}


@pytest.mark.parametrize("run", RUNS)
def test_stopped_and_resumed_it_ends_bitwise_equal(run, tmp_path):
    mask, options, dtype = RUNS[run]

    def start(folder, *, resume=None, **settings):
        trainer = build(
            folder,
            mask(),
            model=tiny_llama(layers=2, dtype=dtype),
            data=10,
            options=options,
            callbacks=[SelectionCallback(jsonl=folder / "selection.jsonl")],
            max_steps=6,  # 3 in an epoch, the last of which is of a single micro-batch
            gradient_accumulation_steps=2,
            warmup_steps=1,
            **settings,
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = start(tmp_path, save_strategy="steps", save_steps=1)
    lines = (tmp_path / "selection.jsonl").read_text()
    for stop in (2, 4):
        folder = tmp_path / f"resumed-{stop}"
        folder.mkdir()
        shutil.copy(tmp_path / "selection.jsonl", folder)
        resumed = start(folder, resume=str(tmp_path / f"checkpoint-{stop}"))
        assert same(weights(resumed.model), weights(whole.model)), stop
        assert (folder / "selection.jsonl").read_text() == lines
        ours, theirs = core(resumed).entries, core(whole).entries
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    records = [json.loads(line) for line in lines.splitlines()]
    assert [record["step"] for record in records] == list(range(6))
    if run == "id3":
        assert [sum(record["num_entries"].values()) for record in records] == [10, 20, 30, 40, 50, 60]


# Clipping ----------------------------------------------------------------------------------------------------------


def clipped(folder, *, options=None, mask=None, **settings):
    trainer = build(folder, mask or gs.GMT(fraction=1.0), options=options, **settings)
    trainer.train()
    return trainer


def test_everything_chosen_is_the_trainers_own_clipped_adamw(tmp_path):
    """The norm is summed in another order: equal to rounding."""
    args = arguments(tmp_path, max_grad_norm=0.1, weight_decay=0.1, optim="adamw_torch", save_strategy="no")
    theirs = Trainer(model=tiny_llama(), args=args, train_dataset=examples(16))
    theirs.train()
    ours = clipped(tmp_path, max_grad_norm=0.1, weight_decay=0.1)
    for name, value in weights(theirs.model).items():
        torch.testing.assert_close(weights(ours.model)[name], value, rtol=1e-4, atol=1e-6)
    norms = [
        [entry["grad_norm"] for entry in trainer.state.log_history if "loss" in entry] for trainer in (ours, theirs)
    ]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    assert min(norms[0]) > 0.1


WITHOUT_ARGS = {"args": None, "lr": 1e-2, "weight_decay": 0.0}


@pytest.mark.parametrize(
    ("options", "callbacks"), [({}, None), (WITHOUT_ARGS, None), ({}, [])], ids=["both", "callback", "factory"]
)
def test_the_clipping_of_the_arguments_is_kept_by_factory_or_callback(tmp_path, options, callbacks):
    mask = gs.ID3(density=0.5, steps=1)
    reference = clipped(tmp_path, mask=mask, options={"max_grad_norm": 1e-6}, max_grad_norm=0.0)
    trainer = clipped(tmp_path, mask=mask, options=options, callbacks=callbacks, max_grad_norm=1e-6)
    assert core(trainer).max_grad_norm == 1e-6
    assert same(weights(trainer.model), weights(reference.model))
    assert trainer.args.max_grad_norm == 1e-6


def test_while_it_trains_the_trainer_does_not_clip(tmp_path):
    seen = []

    class Watcher(SelectionCallback):
        def on_step_end(self, args, state, control, **parts):
            seen.append(args.max_grad_norm)
            super().on_step_end(args, state, control, **parts)

    trainer = clipped(tmp_path, max_grad_norm=0.5, callbacks=[Watcher()], max_steps=2)
    assert seen == [0.0, 0.0]
    assert trainer.args.max_grad_norm == 0.5


def test_no_clipping_stays_none(tmp_path):
    assert core(clipped(tmp_path, max_grad_norm=0.0, max_steps=1)).max_grad_norm is None


# Logs and use ------------------------------------------------------------------------------------------------------


def test_logs_say_how_many_entries_were_updated(tmp_path):
    trainer = build(tmp_path, gs.ID3(budget=60, steps=6), logging_steps=3)
    trainer.train()
    first, second = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert (first["selection/entries"], second["selection/entries"]) == (20, 50)
    assert first["selection/new"] == 10
    assert first["selection/overlap"] == 1.0
    assert second["selection/state_bytes"] == core(trainer).last_record.state_bytes
    assert second["grad_norm"] == core(trainer).last_record.grad_norm


def test_a_mask_can_choose_among_the_weights_of_an_adapter(tmp_path):
    model = tiny_lora()
    before = weights(model)
    build(tmp_path, gs.ID3(budget=40, steps=4), model=model, options={"weight_decay": 0.5}, max_steps=5).train()
    after = weights(model)
    changed = {name: int((after[name] != before[name]).sum()) for name in after}
    assert all("lora_" in name for name, count in changed.items() if count)
    assert 0 < sum(changed.values()) <= 40


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"policy": gs.All()}, "have 'policy' and 'mask'"),
        ({"residency": gs.Keep()}, "unknown option 'residency' in the kwargs"),
        ({"max_grad_nrom": 1.0}, "write 'max_grad_norm'"),
    ],
)
def test_options_that_do_not_fit_a_mask_are_refused(tmp_path, options, said):
    with pytest.raises(gs.UsageError, match=said):
        build(tmp_path, gs.BitFit(among=("*norm*",)), options=options).train()


def test_neither_policy_nor_mask_is_refused(tmp_path):
    with pytest.raises(gs.UsageError, match="have none"):
        SelectiveOptimizerFactory()(tiny_llama(), lr=1e-3)


@pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")
def test_trl_trains_with_a_mask(tmp_path):
    pytest.importorskip("trl")
    from test_integration_trl import build as build_sft

    trainer = build_sft(tmp_path, gs.ID3(budget=60, steps=3))
    trainer.train()
    assert sum(map(len, core(trainer).entries.values())) == 60
