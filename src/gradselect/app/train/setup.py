"""Build a trainer from a recipe and its inputs."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainingArguments
from transformers.trainer import OPTIMIZER_NAME
from transformers.trainer_callback import PrinterCallback
from trl.trainer.sft_config import SFTConfig

from gradselect import FixedEntries
from gradselect.app.inputs import Inputs, Rows, make_rows, num_prompts_per_step
from gradselect.app.models import check_causal
from gradselect.app.progress import SILENT, Stage, Stages
from gradselect.app.recipe import (
    AbstractMaskMethod,
    AbstractSamplingTrainer,
    AbstractTrainer,
    ClassificationData,
    RandomData,
    Recipe,
    RunFacts,
    SPTMethod,
    TokenData,
    is_packed,
)
from gradselect.app.runtime import RunFolder, broadcast_from_rank_0, num_processes

from .classifier import batch_loss, classifier_options
from .method_setup import mask_optimizer, method_parts
from .packing_check import check_packing
from .trackers import trackers
from .trainer import MetricsTrainer, RunTrainer, TokenTrainer
from .trainer_kinds import build_other_trainer, calibration_loss


def build_trainer(
    recipe: Recipe, inputs: Inputs, *, folder: RunFolder, stages: Stages = SILENT, checkpoint: Path | None = None
) -> RunTrainer:
    """Return a trainer for the recipe's method, without displays.

    Args:
        recipe: the recipe.
        inputs: its model, tokenizer and data.
        folder: folder of the run.
        stages: shows what is being done, also while the trainer runs.
        checkpoint: the run is to resume from it; rank 0 decides. None: it begins.

    Raises:
        UsageError: the method does not fit the model, or no example fits into `data.max_length`.
    """
    data, max_length, num_drawn = recipe.data, inputs.max_length, recipe.num_drawn_tokens
    rows = make_rows(
        inputs.examples,
        data,
        tokenizer=inputs.tokenizer,
        max_length=max_length,
        num_drawn=num_drawn,
        stages=stages,
    )
    with stages.open("preparing the method") as stage:
        return _build(recipe, inputs, rows, folder=folder, stages=stages, stage=stage, checkpoint=checkpoint)


def _build(
    recipe: Recipe,
    inputs: Inputs,
    rows: Mapping[str, Rows],
    *,
    folder: RunFolder,
    stages: Stages,
    stage: Stage,
    checkpoint: Path | None,
) -> RunTrainer:
    parts = method_parts(recipe, inputs, folder=folder)
    arguments = _arguments(recipe, folder=folder)
    if isinstance(recipe.method, AbstractMaskMethod):
        arguments["max_grad_norm"] = 0.0
    shared = {
        "folder": folder,
        "stages": stages,
        "keep_checkpoints": recipe.run.keep_checkpoints,
        "max_skipped_steps": recipe.run.max_skipped_steps,
        "token_counts": {name: part.counts for name, part in rows.items()},
        "can_resume": recipe.method.can_resume,
        "model": parts.model,
        "processing_class": inputs.tokenizer,
        "optimizer_cls_and_kwargs": parts.optimizer,
        "penalty": parts.penalty,
        "row_lengths": _lengths(rows["train"]) if recipe.run.group_by_length else None,
        "train_dataset": rows["train"].dataset,
        "eval_dataset": rows["validation"].dataset if "validation" in rows else None,
        "callbacks": [*parts.callbacks, *trackers(recipe, folder)],
    }
    if isinstance(recipe.trainer, AbstractTrainer):
        trainer = build_other_trainer(recipe, inputs, arguments=arguments, shared=shared)
    elif isinstance(recipe.data, ClassificationData):
        trainer = RunTrainer(args=TrainingArguments(**arguments), **classifier_options(inputs.tokenizer), **shared)
    else:
        data: Any = recipe.data
        trainer = TokenTrainer(args=SFTConfig(**arguments, **_token_arguments(data, inputs)), **shared)
    trainer.remove_callback(PrinterCallback)
    if not isinstance(recipe.data, ClassificationData | RandomData):
        check_causal(trainer.model, name=f"model.path={recipe.model.path!r}")
    if is_packed(recipe.data):
        # Before the optimizer marks what trains, and before anything is written.
        check_packing(trainer, _as_dataset(trainer.train_dataset)[:4]["input_ids"], max_length=inputs.max_length)
    if isinstance(recipe.method, AbstractMaskMethod):
        facts = _facts(trainer, recipe, num_batches=recipe.method.num_batches, stage=stage)
        facts = replace(facts, earlier=_earlier(recipe, checkpoint))
        factory, options = mask_optimizer(recipe.method, recipe, inputs, parts.model, facts)
        trainer.optimizer_cls_and_kwargs = (factory, options)
        if isinstance(mask := options["mask"], FixedEntries) and mask.about:
            trainer.notes = [*trainer.notes, mask.about]
    # Now rather than at the first step: a method that does not fit the model fails before anything is written.
    trainer.create_optimizer()
    return trainer


class _ShownBatches(list[Any]):
    """Batches that show how far an iteration is."""

    def __init__(self, batches: Iterable[Any], stage: Stage) -> None:
        super().__init__(batches)
        self._stage = stage

    def __iter__(self) -> Iterator[Any]:
        self._stage.become("calibrating the mask", total=len(self))
        for batch in super().__iter__():
            yield batch
            self._stage.advance()


def _facts(trainer: RunTrainer, recipe: Recipe, *, num_batches: int, stage: Stage) -> RunFacts:
    """Return facts for a mask. Its batches are drawn with their own generator and disturb no other draw.

    Every rank sees the batches of all ranks, or they would select different entries.
    """
    dataset, run, processes = _as_dataset(trainer.train_dataset), recipe.run, num_processes()
    count = min(len(dataset), num_batches * run.batch_size * processes)
    rows = random.Random(f"calibration/{run.seed}").sample(range(len(dataset)), count)
    drawn: Any = dataset.select(
        for_every_process(rows, batch_size=run.batch_size, processes=processes) if processes > 1 else rows
    )
    batches = _ShownBatches(trainer.get_eval_dataloader(drawn), stage) if rows else []
    return RunFacts(
        seed=run.seed,
        num_steps=num_steps_of(trainer, recipe),
        batches=batches,
        loss=loss_of_batch(trainer, recipe),
    )


def _earlier(recipe: Recipe, checkpoint: Path | None) -> dict[str, Any] | None:
    """Return the optimizer's state in a checkpoint, if the method reads from it what it has chosen."""
    if not isinstance(recipe.method, SPTMethod):
        return None
    found = broadcast_from_rank_0(None if checkpoint is None else str(checkpoint))
    return None if found is None else torch.load(Path(found) / OPTIMIZER_NAME, map_location="cpu", weights_only=True)


def num_steps_of(trainer: RunTrainer, recipe: Recipe) -> int:
    """Return the number of optimizer steps of the run."""
    run, rows = recipe.run, len(_as_dataset(trainer.train_dataset))
    if isinstance(recipe.trainer, AbstractSamplingTrainer):  # prompts that do not fill a step rest
        per_step = num_prompts_per_step(recipe.trainer, batch_size=run.batch_size, accumulation=run.accumulation)
        per_epoch = rows // per_step
    else:
        per_epoch = -(-rows // (run.batch_size * num_processes() * run.accumulation))
    return run.steps or math.ceil((run.epochs or 1) * per_epoch)


def loss_of_batch(trainer: RunTrainer, recipe: Recipe) -> Any:
    """Return the loss of a batch for masks and searches. None: the model computes it from the labels of a batch."""
    if isinstance(recipe.trainer, AbstractTrainer):
        assert isinstance(trainer, MetricsTrainer)
        return calibration_loss(trainer)
    return batch_loss if isinstance(recipe.data, ClassificationData) else None


def for_every_process(rows: Sequence[int], *, batch_size: int, processes: int) -> list[int]:
    """Repeat each whole batch of rows once per rank: the loader deals batches out in turn."""
    batches = [rows[start : start + batch_size] for start in range(0, len(rows) - batch_size + 1, batch_size)]
    return [row for batch in batches for _ in range(processes) for row in batch]


def _arguments(recipe: Recipe, *, folder: RunFolder) -> dict[str, Any]:
    """Return the keyword arguments of `TrainingArguments`."""
    optimizer, run = recipe.optimizer, recipe.run
    schedule = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}[optimizer.schedule]
    return {
        "output_dir": str(folder.checkpoints),
        "max_steps": run.steps or -1,
        "num_train_epochs": run.epochs or 1,
        "per_device_train_batch_size": run.batch_size,
        "per_device_eval_batch_size": run.batch_size,
        "gradient_accumulation_steps": run.accumulation,
        "learning_rate": optimizer.lr,
        "weight_decay": optimizer.weight_decay,
        "adam_beta1": optimizer.betas[0],
        "adam_beta2": optimizer.betas[1],
        "adam_epsilon": optimizer.eps,
        "max_grad_norm": optimizer.max_grad_norm,
        "lr_scheduler_type": schedule,
        "warmup_steps": optimizer.warmup,
        "optim": "adamw_torch_fused",
        "seed": run.seed,
        "use_cpu": run.device == "cpu",
        "dataloader_pin_memory": run.device != "cpu" and torch.accelerator.is_available(),
        # The model's dtype decides. Autocast would upcast only the blocks that train at the moment.
        "bf16": False,
        # With checkpointing the Trainer turns it off, and gradients of changing blocks would not be averaged.
        "ddp_find_unused_parameters": True,
        "gradient_checkpointing": recipe.model.gradient_checkpointing,
        "logging_steps": run.log_every,
        "logging_nan_inf_filter": False,
        "eval_strategy": "steps" if run.evaluate_every else "no",
        "eval_steps": run.evaluate_every,
        "save_strategy": "steps" if run.save_every else "no",
        "save_steps": run.save_every or 0,
        "report_to": [],
        "disable_tqdm": True,
    }


def _token_arguments(data: TokenData | RandomData, inputs: Inputs) -> dict[str, Any]:
    """Return the keyword arguments that only `SFTConfig` has. The rows are cut and packed already."""
    return {
        "max_length": inputs.max_length,
        "packing": is_packed(data),
        "eval_packing": False,
        "dataset_kwargs": {"skip_prepare_dataset": True},
    }


def _lengths(rows: Rows) -> list[int]:
    return [len(tokens) for tokens in _as_dataset(rows.dataset)["input_ids"]]


def _as_dataset(dataset: Any) -> Dataset:
    assert isinstance(dataset, Dataset)
    return dataset
