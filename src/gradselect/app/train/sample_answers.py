"""Answers of the model at each validation: shown, and kept in `answers.jsonl`."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from gradselect.app.inputs import Inputs
from gradselect.app.models import context_of
from gradselect.app.progress import Stages, fitted
from gradselect.app.recipe import ClassificationData, Recipe
from gradselect.app.runtime import RunFolder
from gradselect.usage import first_line, shortened

from .answering import AbstractAnswerer, Answer, GreedyAnswerer, LabelPredictor, undisturbed
from .samples import Sample, new_tokens
from .trainer import RunTrainer

logger = logging.getLogger(__name__)


class SampleAnswers(TrainerCallback):
    """Answers the same validation rows after each evaluation. Has no effect on the training.

    If the model cannot answer, that is said once and nothing more is tried.

    Args:
        trainer: its model answers.
        answerer: answers the samples.
        stages: shows the answers.
        file: gets one line for each answer.
    """

    def __init__(self, trainer: RunTrainer, answerer: AbstractAnswerer, *, stages: Stages, file: Path) -> None:
        self._trainer = trainer
        self._answerer: AbstractAnswerer | None = answerer
        self._stages = stages
        self._file = file

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._answerer is None or self._is_stopping():
            return
        try:
            answers = self._answers(self._answerer)
            if self._is_stopping():
                return
            self._keep(self._answerer.samples, answers, step=state.global_step)
        except Exception as error:  # a model's own code; a run of days must not end with it
            self._answerer = None
            logger.warning("the model cannot answer validation rows and is not asked again: %s", first_line(error))
            return
        self._show(self._answerer, answers, step=state.global_step)

    def _is_stopping(self) -> bool:
        return bool(self._trainer.signals.received)

    def _answers(self, answerer: AbstractAnswerer) -> list[Answer]:
        model: Any = self._trainer.accelerator.unwrap_model(self._trainer.model)
        words = f"answering {len(answerer.samples)} validation rows"
        with self._stages.open(words) as stage, undisturbed(model):
            return answerer.answers(model, stage, is_stopping=self._is_stopping)

    def _keep(self, samples: Sequence[Sample], answers: Sequence[Answer], *, step: int) -> None:
        with self._file.open("a", encoding="utf-8") as file:
            for sample, answer in zip(samples, answers, strict=True):
                line = {
                    "step": step,
                    "row": sample.row,
                    "prompt": sample.prompt,
                    "reference": sample.reference,
                    "answer": answer.text,
                    "finished": answer.is_finished,
                }
                file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def _show(self, answerer: AbstractAnswerer, answers: Sequence[Answer], *, step: int) -> None:
        lines = [f"answers    after step {step}, {answerer.how}; all in {self._file}"]
        for sample, answer in zip(answerer.samples, answers, strict=True):
            lines += [
                f"  row {sample.row:<6,} {shortened(sample.prompt)}",
                f"    data     {shortened(sample.reference)}",
                f"    model    {shortened(answer.text)}{'' if answer.is_finished else ' (cut off)'}",
            ]
        self._stages.say(*(fitted(line, self._stages.console, indent=13) for line in lines))


def add_answers(
    trainer: RunTrainer,
    samples: Sequence[Sample],
    recipe: Recipe,
    inputs: Inputs,
    *,
    ends: Sequence[int],
    stages: Stages,
    folder: RunFolder,
) -> None:
    """Let the trainer answer samples at each evaluation.

    Args:
        trainer: the trainer.
        samples: at least one sample.
        recipe: the recipe.
        inputs: what it has read.
        ends: tokens that end what the model learns to write.
        stages: shows the answers.
        folder: folder of the run.
    """
    if isinstance(recipe.data, ClassificationData):
        rows: Any = trainer.eval_dataset

        def make_batch() -> Any:
            batch: Any = trainer.data_collator([rows[sample.row - 1] for sample in samples])
            return {name: value.to(trainer.args.device) for name, value in batch.items() if name != "labels"}

        answerer = LabelPredictor(samples, make_batch=make_batch, names=inputs.examples.labels)
    else:
        limit = new_tokens(context_of(inputs.model.config, inputs.tokenizer))
        answerer = GreedyAnswerer(samples, tokenizer=inputs.tokenizer, ends=ends, max_new_tokens=limit)
    trainer.add_callback(SampleAnswers(trainer, answerer, stages=stages, file=folder.answers_file))
