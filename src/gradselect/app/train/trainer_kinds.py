"""The trainer of a recipe whose loss is not the likelihood of given text: rows, arguments, masks' batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn

from gradselect import UsageError
from gradselect.app.inputs import Inputs, check_prompts, num_prompts_per_step
from gradselect.app.recipe import (
    AbstractMaskMethod,
    AbstractSamplingTrainer,
    AbstractTrainer,
    AdaLoraMethod,
    DpoSettings,
    GrpoSettings,
    KtoSettings,
    OrpoSettings,
    Recipe,
    RlooSettings,
)

from .preference_trainers import (
    DpoTrainer,
    KtoTrainer,
    OrpoTrainer,
    dpo_options,
    dpo_rows,
    kto_options,
    kto_rows,
    orpo_options,
    orpo_rows,
    switch_off_dropout,
)
from .reference_model import check_neutral, reference_notes
from .rewards import make_rewards
from .sampling_trainers import (
    GrpoTrainer,
    RlooTrainer,
    grpo_options,
    prompt_rows,
    rloo_options,
)
from .trainer import MetricsTrainer, RunTrainer


def build_other_trainer(
    recipe: Recipe, inputs: Inputs, *, arguments: dict[str, Any], shared: dict[str, Any]
) -> MetricsTrainer:
    """Return the trainer of a recipe that names one.

    Args:
        recipe: the recipe.
        inputs: model, tokenizer and data.
        arguments: arguments of `TrainingArguments`.
        shared: arguments of `RunTrainer`.

    Raises:
        UsageError: trainer, method and data do not fit.
    """
    settings = recipe.trainer
    assert isinstance(settings, AbstractTrainer)
    _check_method(recipe)
    if settings.uses_reference and isinstance(shared["model"], PeftModel):
        check_neutral(shared["model"], inputs.examples.train[0]["input_ids"])
    if not isinstance(settings, AbstractSamplingTrainer):
        switch_off_dropout(shared["model"])
    rows = shared["train_dataset"]
    kind, options, convert = _kind(recipe, inputs, arguments, rows)
    notes = (*trainer_notes(recipe, rows), *reference_notes(recipe, shared["model"]))
    shared = {**shared, "train_dataset": convert(rows, True)}
    if shared["eval_dataset"] is not None:
        shared["eval_dataset"] = convert(shared["eval_dataset"], False)
    optimizer = shared.pop("optimizer_cls_and_kwargs")
    trainer = kind(**options, **shared)
    # TRL's trainers do not pass it on.
    trainer.optimizer_cls_and_kwargs = optimizer
    trainer.notes, trainer.plain_rows = notes, rows
    return trainer


Convert = Callable[[Dataset, bool], Dataset]
"""Maps rows, and True for those to train on, to the columns of a trainer."""


def _kind(
    recipe: Recipe, inputs: Inputs, arguments: dict[str, Any], rows: Dataset
) -> tuple[type[MetricsTrainer], dict[str, Any], Convert]:
    """Return the class of a trainer, its own options, and the conversion of its rows."""
    run = recipe.run
    match recipe.trainer:
        case DpoSettings() as settings:
            _check_pairs(rows, settings.name)
            return DpoTrainer, dpo_options(settings, arguments), lambda rows, _: dpo_rows(rows)
        case OrpoSettings() as settings:
            _check_pairs(rows, settings.name)
            options = orpo_options(settings, arguments, max_length=inputs.max_length)
            return OrpoTrainer, options, lambda rows, _: orpo_rows(rows)
        case KtoSettings() as settings:
            return (
                KtoTrainer,
                kto_options(settings, arguments),
                lambda rows, is_train: kto_rows(rows, batch_size=run.batch_size, seed=run.seed if is_train else None),
            )
        case GrpoSettings() | RlooSettings() as settings:
            check_prompts(rows, recipe, settings)
            is_grpo = isinstance(settings, GrpoSettings)
            options = grpo_options(settings, arguments) if is_grpo else rloo_options(settings, arguments)
            drawn = {"rewards": make_rewards(recipe, inputs), "token_ids": _token_ids(inputs)}
            return GrpoTrainer if is_grpo else RlooTrainer, {**options, **drawn}, lambda rows, _: prompt_rows(rows)
    raise AssertionError(recipe.trainer)


def _token_ids(inputs: Inputs) -> dict[str, list[int]]:
    parts = [inputs.examples.train, *([inputs.examples.validation] if inputs.examples.validation is not None else [])]
    return {prompt: ids for part in parts for prompt, ids in zip(part["prompt"], part["input_ids"], strict=True)}


def _check_method(recipe: Recipe) -> None:
    method, name = recipe.method, getattr(recipe.trainer, "name", "")
    if isinstance(method, AdaLoraMethod) and isinstance(recipe.trainer, DpoSettings | KtoSettings | RlooSettings):
        raise UsageError(
            f"method.name=adalora does not fit trainer.name={name}: TRL copies the adapter for its reference, and PEFT "
            "allows one AdaLoRA in a model; write method.name=lora"
        )
    needs_batches = isinstance(method, AbstractMaskMethod) and method.num_batches > 0
    if needs_batches and isinstance(recipe.trainer, AbstractSamplingTrainer):
        raise UsageError(
            f"method.name={method.name} needs batches before the first step, but trainer.name={name} draws its text "
            "during training; choose a mask that selects at the first step, e.g. method.name=static without "
            "method.calibration_batches"
        )


def _check_pairs(rows: Dataset, name: str) -> None:
    if "rejected_ids" not in rows.column_names:
        raise UsageError(
            f"trainer.name={name} compares two answers to a prompt, but the rows have one answer and a label; write "
            "trainer.name=kto, or name the columns of the answers in data.chosen and data.rejected"
        )


def trainer_notes(recipe: Recipe, rows: Dataset) -> list[str]:
    """Say what a trainer makes of the rows, with numbers."""
    settings, run = recipe.trainer, recipe.run
    if isinstance(settings, KtoSettings) and "rejected_ids" in rows.column_names:
        return [f"{len(rows):,} pairs are read as {2 * len(rows):,} answers, half of them good and half bad"]
    if not isinstance(settings, AbstractSamplingTrainer):
        return []
    number = num_prompts_per_step(settings, batch_size=run.batch_size, accumulation=run.accumulation)
    notes = [
        f"each step draws {number * settings.num_generations:,} answers of at most "
        f"{settings.max_completion_length:,} tokens, {settings.num_generations:,} to each of {number:,} prompts"
    ]
    if left := len(rows) % number:
        notes.append(f"in each epoch {left:,} of {len(rows):,} prompts, always others, do not fill a step: they rest")
    return notes


def calibration_loss(trainer: MetricsTrainer) -> Callable[[nn.Module, Any], Tensor]:
    """Return the loss of a batch by the trainer's own rule, for a mask that is estimated before the first step."""

    def loss(model: nn.Module, batch: Any) -> Tensor:
        num_tokens = getattr(trainer, "_total_train_tokens", 0)
        # Not RunTrainer's own method, which counts the batch as trained on.
        value: Any = super(RunTrainer, trainer).compute_loss(model, batch)
        trainer._total_train_tokens = num_tokens
        trainer.train_metrics().clear()
        return value

    return loss
