"""Activation checkpoints that a framework or the user turns on, rather than the Trainer's arguments."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_batch, tiny_llama
from torch.utils.checkpoint import checkpoint
from transformers import Trainer, TrainingArguments

import gradselect as gs
from gradselect.integrations.transformers import SelectiveTraining


def train(model: torch.nn.Module, folder: Path, **settings: object) -> Trainer:
    rows = [{name: rows[0] for name, rows in tiny_batch(model, seed=seed, batch=1).items()} for seed in range(4)]
    args = TrainingArguments(
        str(folder), max_steps=3, use_cpu=True, save_strategy="no", report_to="none", disable_tqdm=True, **settings
    )
    callback = SelectiveTraining(policy=gs.Fixed(("layer.1", "layer.3")))
    trainer = Trainer(model, args, train_dataset=rows, callbacks=[callback])
    trainer.train()
    return trainer


def checkpoint_with(model: torch.nn.Module, *, reentrant: bool) -> None:
    """Turn checkpointing on as ms-swift does, which decides about the function behind the Trainer's back."""
    model.train()
    for layer in model.model.layers:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=reentrant)
    model.enable_input_require_grads()


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_that_the_arguments_do_not_know_train_right(
    reentrant: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """Reentrant ones gave no gradients: the embedding's output was kept from requiring one, and nothing trained."""
    model, plain = tiny_llama(), tiny_llama()
    checkpoint_with(model, reentrant=reentrant)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    train(model, tmp_path)
    train(plain, tmp_path)
    after = model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in plain.state_dict().items())
    moved = {name.split(".")[2] for name, value in before.items() if not torch.equal(value, after[name])}
    assert moved == {"1", "3"}
    assert ("with reentrant checkpoints the backward pass visits every layer" in caplog.text) == reentrant
    assert ('write gradient_checkpointing_kwargs={"use_reentrant": False}' in caplog.text) == reentrant


@pytest.mark.parametrize(("given", "used"), [(None, True), (False, False)])
def test_replicas_get_what_they_need_unless_the_user_says_otherwise(given: bool | None, used: bool, tmp_path: Path):
    """The Trainer's own default is False with activation checkpointing, and would not average the gradients."""
    assert train(tiny_llama(), tmp_path, ddp_find_unused_parameters=given).args.ddp_find_unused_parameters is used
