"""Checks of the section `trainer` against the other sections."""

from __future__ import annotations

from typing import Any

from .data_settings import ClassificationData, PreferenceData, PromptData
from .trainers import BUILT_IN_REWARDS, AbstractSamplingTrainer, AbstractTrainer, KtoSettings, SftSettings

USERS = {"preference": "dpo (or kto, orpo)", "prompts": "grpo (or rloo)"}
"""Trainers that read each format."""

NEEDS = {
    "preference": "the templates prompt, chosen and rejected (for kto also prompt, completion and the column label)",
    "prompts": "the template prompt, and answer for rewards that compare with a solution",
}
"""What the data of each format hold."""


def check_trainer(trainer: Any, data: Any, *, batch_size: int, accumulation: int) -> None:
    """Check that a trainer reads the data and can form its batches.

    Raises:
        ValueError: says what to write instead.
    """
    if not isinstance(trainer, AbstractTrainer):
        _check_supervised(trainer, data)
        return
    name = getattr(trainer, "name", "")
    if data.format != trainer.reads:
        raise ValueError(
            f"trainer.name={name} reads data.format={trainer.reads}, not {data.format}: {NEEDS[trainer.reads]}; or "
            "leave `trainer` out to fine-tune on the text itself"
        )
    if isinstance(trainer, KtoSettings) and trainer.loss == "kto" and batch_size < 2:
        raise ValueError(
            "trainer.name=kto estimates a divergence from the other answers of a forward pass, so run.batch_size=1 is "
            "too small; write run.batch_size=2 or more, or trainer.loss=apo_zero_unpaired"
        )
    if isinstance(trainer, AbstractSamplingTrainer):
        _check_groups(trainer, batch_size, accumulation)
        _check_answer(trainer, data)


def _check_supervised(trainer: Any, data: Any) -> None:
    if isinstance(data, PreferenceData | PromptData):
        raise ValueError(
            f"data.format={data.format} needs a trainer that reads it; write trainer.name={USERS[data.format]}"
        )
    if isinstance(trainer, SftSettings) and isinstance(data, ClassificationData):
        raise ValueError("trainer.name=sft is for language models; leave `trainer` out with data.format=classification")


def _check_groups(trainer: AbstractSamplingTrainer, batch_size: int, accumulation: int) -> None:
    number, group = batch_size * accumulation, trainer.num_generations
    if number % group:
        raise ValueError(
            f"run.batch_size={batch_size} x run.accumulation={accumulation} are {number} answers a step, which do not "
            f"form whole groups of trainer.num_generations={group}; write e.g. run.batch_size={group} "
            f"run.accumulation={max(1, number // group)}"
        )


def _check_answer(trainer: AbstractSamplingTrainer, data: PromptData) -> None:
    compared = [name for name in trainer.reward if name in BUILT_IN_REWARDS]
    if compared and data.answer is None:
        raise ValueError(
            f"trainer.reward={compared[0]} compares with a worked solution; name its column, e.g. "
            "'data.answer={answer}'"
        )
