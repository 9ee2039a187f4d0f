"""From a recipe and what it names to a trainer that is ready to run."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, set_seed
from transformers.integrations.integration_utils import TensorBoardCallback
from transformers.trainer_callback import PrinterCallback
from trl.chat_template_utils import get_training_chat_template, has_generation_markers
from trl.trainer.sft_config import SFTConfig

from .. import UsageError, partition
from ..integrations.transformers import SelectionCallback, SelectiveOptimizerFactory
from ._data import Examples
from ._folder import RunFolder
from ._methods import AbstractAdapterMethod, AbstractBlockMethod, AllMethod, FullMethod
from ._recipe import ChatData, PromptCompletionData, Recipe
from ._trainer import RunTrainer


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """All that a run needs beside its recipe.

    Args:
        max_length: tokens of an example.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    examples: Examples
    max_length: int


def build_trainer(recipe: Recipe, inputs: Inputs, *, folder: RunFolder) -> RunTrainer:
    """A trainer for the recipe's method, without displays.

    Raises:
        UsageError: the method does not fit the model, or no example fits the length.
    """
    parts = _method_parts(recipe, inputs.model, folder=folder)
    trainer = RunTrainer(
        folder=folder,
        keep_checkpoints=recipe.run.keep_checkpoints,
        model=parts.model,
        args=_arguments(recipe, inputs, folder=folder),
        train_dataset=inputs.examples.train,
        eval_dataset=inputs.examples.validation,
        processing_class=inputs.tokenizer,
        optimizer_cls_and_kwargs=parts.optimizer,
        callbacks=[*parts.callbacks, *_trackers(recipe, folder)],
    )
    trainer.remove_callback(PrinterCallback)
    # Now rather than at the first step, so that what does not fit the model is said before anything is written.
    trainer.create_optimizer()
    for name, dataset in (("data.path", trainer.train_dataset), ("data.validation", trainer.eval_dataset)):
        if dataset is not None and len(_as_dataset(dataset)) == 0:
            raise UsageError(
                f"data.max_length={inputs.max_length} leaves nothing of {name}: every prompt alone is longer; raise it"
            )
    return trainer


def length_notes(trainer: RunTrainer, inputs: Inputs, *, packing: bool) -> list[str]:
    """What the limit on the length did to the training examples, in words."""
    prepared = _as_dataset(trainer.train_dataset)
    if packing:
        return [f"{len(inputs.examples.train):,} examples were packed into {len(prepared):,} rows"]
    limit = inputs.max_length
    num_cut = sum(len(tokens) >= limit for tokens in prepared["input_ids"])
    num_dropped = len(inputs.examples.train) - len(prepared)
    notes = {
        f"{num_cut:,} of {len(prepared):,} examples reach data.max_length={limit} and may have lost their end": num_cut,
        f"{num_dropped:,} examples were left out: their prompts alone reach data.max_length={limit}": num_dropped,
    }
    return [note for note, count in notes.items() if count]


@dataclass(frozen=True, kw_only=True)
class _MethodParts:
    """What a method changes about a trainer."""

    model: nn.Module
    optimizer: tuple[Any, dict[str, Any]] | None
    callbacks: list[TrainerCallback]


def _method_parts(recipe: Recipe, model: PreTrainedModel, *, folder: RunFolder) -> _MethodParts:
    method = recipe.method
    if isinstance(method, FullMethod) and recipe.model.dtype != "float32":
        method = method.with_masters()
    match method:
        case AbstractBlockMethod():
            return _MethodParts(
                model=model,
                optimizer=(SelectiveOptimizerFactory, _block_options(method, recipe, model)),
                callbacks=[SelectionCallback(jsonl=folder.records_file)],
            )
        case AbstractAdapterMethod():
            return _adapter_parts(method, recipe, model)
        case FullMethod():
            return _MethodParts(model=model, optimizer=None, callbacks=[])


def _adapter_parts(method: AbstractAdapterMethod, recipe: Recipe, model: PreTrainedModel) -> _MethodParts:
    adapted = _adapt(model, method, seed=recipe.run.seed)
    if all(parameter.dtype == torch.float32 for parameter in adapted.parameters() if parameter.requires_grad):
        return _MethodParts(model=adapted, optimizer=None, callbacks=[])
    # PEFT keeps a copied embedding in the model's type: it needs master weights as full fine-tuning does.
    options = _block_options(AllMethod(), recipe, adapted)
    return _MethodParts(model=adapted, optimizer=(SelectiveOptimizerFactory, options), callbacks=[SelectionCallback()])


def _block_options(method: AbstractBlockMethod, recipe: Recipe, model: nn.Module) -> dict[str, Any]:
    """Arguments of `gradselect.BlockOptimizer`."""
    blocks = [block.name for block in partition(model)]
    return {
        "policy": method.policy(seed=recipe.run.seed, blocks=blocks),
        "always": method.always,
        "residency": method.place(),
        "lr": recipe.optimizer.lr,
        "weight_decay": recipe.optimizer.weight_decay,
        "betas": recipe.optimizer.betas,
        "eps": recipe.optimizer.eps,
        "master_dtype": torch.float32,
        "accumulation_steps": recipe.run.accumulation,
    }


def _adapt(model: PreTrainedModel, method: AbstractAdapterMethod, *, seed: int) -> PeftModel:
    """The model with an adapter, drawn with `seed`, that is all that trains."""
    embedding = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is embedding).rpartition(".")[2]
    set_seed(seed)
    try:
        config = method.peft_config(embedding=name)
        adapted = get_peft_model(model, config)
    except (ValueError, TypeError, KeyError) as error:
        raise UsageError(f"method: PEFT refuses this adapter: {error}") from error
    if config.is_prompt_learning:
        raise UsageError(f"method.type={config.peft_type} cannot be merged into a plain model; take another adapter")
    assert isinstance(adapted, PeftModel)
    return adapted


def _arguments(recipe: Recipe, inputs: Inputs, *, folder: RunFolder) -> SFTConfig:
    optimizer, run = recipe.optimizer, recipe.run
    schedule = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}[optimizer.schedule]
    return SFTConfig(
        output_dir=str(folder.checkpoints),
        max_steps=run.steps or -1,
        num_train_epochs=run.epochs or 1,
        per_device_train_batch_size=run.batch_size,
        per_device_eval_batch_size=run.batch_size,
        gradient_accumulation_steps=run.accumulation,
        learning_rate=optimizer.lr,
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.betas[0],
        adam_beta2=optimizer.betas[1],
        adam_epsilon=optimizer.eps,
        max_grad_norm=optimizer.max_grad_norm,
        lr_scheduler_type=schedule,
        warmup_steps=optimizer.warmup,
        optim="adamw_torch_fused",
        seed=run.seed,
        use_cpu=run.device == "cpu",
        dataloader_pin_memory=run.device != "cpu" and torch.accelerator.is_available(),
        # The model's own type decides; automatic mixed precision would upcast only what trains at the moment.
        bf16=False,
        gradient_checkpointing=recipe.model.gradient_checkpointing,
        logging_steps=run.log_every,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if run.evaluate_every else "no",
        eval_steps=run.evaluate_every,
        save_strategy="steps" if run.save_every else "no",
        save_steps=run.save_every or 0,
        report_to=[name for name in run.report_to if name != "tensorboard"],
        disable_tqdm=True,
        **_data_arguments(recipe, inputs),
    )


def _data_arguments(recipe: Recipe, inputs: Inputs) -> dict[str, Any]:
    data = recipe.data
    if isinstance(data, ChatData) and data.loss_on == "answers":
        _check_marks_answers(inputs.tokenizer)
    return {
        "max_length": inputs.max_length,
        "packing": data.packing,
        "eval_packing": False,
        "assistant_only_loss": isinstance(data, ChatData) and data.loss_on == "answers",
        "completion_only_loss": False if isinstance(data, PromptCompletionData) and data.loss_on == "all" else None,
    }


def _check_marks_answers(tokenizer: PreTrainedTokenizerBase) -> None:
    if isinstance(tokenizer.chat_template, str) and has_generation_markers(tokenizer.chat_template):
        return
    try:
        # TRL has templates with marks for the common families.
        get_training_chat_template(tokenizer)
    except ValueError:
        raise UsageError(
            "data.loss_on=answers: the model's chat template does not mark the assistant's turns "
            "({% generation %}); write data.loss_on=last-answer"
        ) from None


def _trackers(recipe: Recipe, folder: RunFolder) -> list[TrainerCallback]:
    """The curves that lie in the output folder; other trackers are the Trainer's own.

    Raises:
        UsageError: one of those is not installed.
    """
    for name in recipe.run.report_to:
        if find_spec(name) is None:
            raise UsageError(f"run.report_to={name} is not installed; run: pip install {name}")
    if "tensorboard" not in recipe.run.report_to:
        return []
    callback = TensorBoardCallback()
    callback.logging_dir = str(folder.curves)
    return [callback]


def _as_dataset(dataset: Any) -> Dataset:
    assert isinstance(dataset, Dataset)
    return dataset
