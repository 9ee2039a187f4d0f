"""The recipe of a training run: every key that a YAML file may hold, its type and its default."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveFloat, model_serializer, model_validator

from gradselect.methods import AbstractBlockMethod, Method, Settings

from .data_settings import ClassificationData, Data, RandomData, is_packed
from .trainer_checks import check_trainer
from .trainers import AbstractSamplingTrainer, AbstractTrainer, Trainer
from .values import Count, Place


class ModelSettings(Settings):
    """The model to start from.

    Attributes:
        path: a folder with a Hugging Face checkpoint, or the id of one on the hub. For random weights the configuration
            is enough: a folder with a `config.json`, or such a file under any name.
        random_weights: draw the weights with the run's seed instead of reading them.
        revision: branch, tag or commit on the hub.
        dtype: dtype of the weights. With bfloat16, trained weights have fp32 masters, and adapters are fp32.
        attention: implementation of attention. "auto" is "sdpa" if the architecture supports it, else "eager".
        gradient_checkpointing: compute activations again in the backward pass instead of keeping them.
        trust_remote_code: run Python code that comes with the checkpoint.
        trust_pickle: read weights from `pytorch_model.bin` if there are none in safetensors.
        pooler_in_head: of a classifier whose checkpoint has a pooler: train the pooler whole with every method, as a
            part of the head. A pooler that the checkpoint lacks is a part of it anyway.
    """

    path: Place
    random_weights: bool = False
    revision: str | None = None
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    gradient_checkpointing: bool = False
    trust_remote_code: bool = False
    trust_pickle: bool = False
    pooler_in_head: bool = False

    @model_serializer(mode="wrap")
    def without_default_head(self, write: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        """Leave the pooler out where nothing is said of it, as recipes of earlier versions do."""
        return {key: value for key, value in write(self).items() if key != "pooler_in_head" or value}


class OptimizerSettings(Settings):
    """AdamW and its schedule. Every method has the same keys.

    Attributes:
        lr: learning rate after the warm-up.
        weight_decay: decoupled weight decay of matrices. Biases and norms have none.
        betas: decay of the first and the second moment.
        eps: added to the denominator.
        max_grad_norm: clip gradients to this L2 norm. 0 turns clipping off.
        schedule: schedule of the learning rate after the warm-up.
        warmup: steps of linear warm-up. Below 1: a share of all steps.
    """

    lr: PositiveFloat
    weight_decay: NonNegativeFloat = 0.0
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8
    max_grad_norm: NonNegativeFloat = 1.0
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: NonNegativeFloat = 0.03


class RunSettings(Settings):
    """Length of the run, its output, and what it writes during training.

    Attributes:
        output: folder to create. Holds the trained model, `run.json`, `records.jsonl` and the checkpoints.
        steps: optimizer steps. Give this or `epochs`.
        epochs: passes over the data. Give this or `steps`.
        batch_size: examples in one forward pass, on each device.
        accumulation: forward passes in one optimizer step.
        group_by_length: put rows of about the same length into a batch, which then has little padding. The order of the
            rows is less random. Not with packing, which leaves no padding, nor with `trainer`.
        seed: seed of data order, adapters, dropout and selection.
        device: "auto" uses an accelerator if there is one.
        log_every: steps between two log lines.
        evaluate_every: steps between two evaluations. Default: one evaluation, at the end, if there is validation data.
            This loss is the mean over batches; `gradselect evaluate --task loss` weighs every token alike.
        save_every: steps between two checkpoints. Default: no checkpoints.
        keep_checkpoints: number of checkpoints to keep. Older ones are deleted.
        max_skipped_steps: a step whose loss or gradient norm is NaN or infinite is skipped. More than this many such
            steps in a row end the run.
        report_to: trackers that receive the curves.
        sample_answers: validation rows that the model answers at each evaluation, on the console and in
            `answers.jsonl`; 0: none. Has no effect on the training.
    """

    output: Place
    steps: Count | None = None
    epochs: Annotated[float, Field(gt=0, le=10**6)] | None = None
    batch_size: Annotated[int, Field(ge=1, le=10**6)] = 8
    accumulation: Annotated[int, Field(ge=1, le=10**6)] = 1
    group_by_length: bool = False
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    device: Literal["auto", "cpu"] = "auto"
    log_every: Count = 10
    evaluate_every: Count | None = None
    save_every: Count | None = None
    keep_checkpoints: Count = 2
    max_skipped_steps: Annotated[int, Field(ge=0)] = 3
    report_to: tuple[Literal["tensorboard", "wandb", "trackio", "mlflow"], ...] = ("tensorboard",)
    sample_answers: Annotated[int, Field(ge=0, le=64)] = 3

    @model_validator(mode="after")
    def check_length(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(f"got steps={self.steps} and epochs={self.epochs}; give one of them, e.g. run.steps=300")
        return self

    @model_serializer(mode="wrap")
    def without_default_order(self, write: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        """Leave the order of rows out where it says nothing, as recipes of earlier versions do."""
        values = write(self)
        return {key: value for key, value in values.items() if key != "group_by_length" or value}


class Recipe(Settings):
    """All settings of a training run."""

    model: ModelSettings
    data: Data
    method: Method
    optimizer: OptimizerSettings
    run: RunSettings
    trainer: Trainer = None

    @model_validator(mode="after")
    def check_validation(self) -> Self:
        if self.run.evaluate_every is not None and self.data.validation is None:
            raise ValueError(
                f"run.evaluate_every={self.run.evaluate_every} needs examples to evaluate on; "
                "add e.g. data.validation=0.02, or set run.evaluate_every=null"
            )
        return self

    @model_validator(mode="after")
    def check_head(self) -> Self:
        if self.model.pooler_in_head and not isinstance(self.data, ClassificationData):
            raise ValueError(
                f"model.pooler_in_head=true is for a classifier, and data.format={self.data.format} has none; leave it "
                "out, or write data.format=classification"
            )
        return self

    @model_validator(mode="after")
    def check_trainer(self) -> Self:
        check_trainer(self.trainer, self.data, batch_size=self.run.batch_size, accumulation=self.run.accumulation)
        return self

    @model_serializer(mode="wrap")
    def without_default_trainer(self, write: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        """Leave the section out where it says nothing, as recipes of earlier versions do."""
        values = write(self)
        return {key: value for key, value in values.items() if key != "trainer" or value is not None}

    @model_validator(mode="after")
    def check_order(self) -> Self:
        if not self.run.group_by_length:
            return self
        if isinstance(self.data, RandomData) or is_packed(self.data):
            cause = f"data.format={self.data.format}" if isinstance(self.data, RandomData) else "data.packing=true"
            raise ValueError(
                f"run.group_by_length=true has no effect with {cause}, where all rows have one length; leave it out"
            )
        if isinstance(self.trainer, AbstractTrainer):
            raise ValueError(
                f"run.group_by_length=true does not go with trainer.name={self.trainer.name}, which draws the order of "
                "its rows itself; leave it out"
            )
        return self

    @property
    def num_drawn_tokens(self) -> int:
        """Tokens that the trainer draws behind each prompt, at most."""
        return self.trainer.max_completion_length if isinstance(self.trainer, AbstractSamplingTrainer) else 0

    @model_validator(mode="after")
    def check_checkpoints(self) -> Self:
        if self.run.save_every is not None and not self.method.can_resume:
            raise ValueError(
                f"method.name={self.method.name} cannot resume from a checkpoint, because its package keeps part of "
                f"its state to itself; write run.save_every=null (it was {self.run.save_every})"
            )
        return self

    @model_validator(mode="after")
    def check_update_in_backward(self) -> Self:
        in_backward = isinstance(self.method, AbstractBlockMethod) and self.method.update_in_backward
        if in_backward and (self.optimizer.max_grad_norm > 0 or self.run.accumulation > 1):
            raise ValueError(
                f"method.update_in_backward=true with optimizer.max_grad_norm={self.optimizer.max_grad_norm:g} and "
                f"run.accumulation={self.run.accumulation}: clipping and accumulation need all gradients at once; set "
                "optimizer.max_grad_norm=0 run.accumulation=1"
            )
        return self
