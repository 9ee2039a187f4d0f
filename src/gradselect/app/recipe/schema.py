"""The recipe of a training run: every key that a YAML file may hold, its type and its default."""

from __future__ import annotations

import os
from typing import Annotated, Literal, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    model_validator,
)

from gradselect.app.data import check_template

from .block_methods import AbstractBlockMethod, Method
from .settings import Settings


def check_place(path: str) -> str:
    """The path, ~ being the home folder.

    Raises:
        ValueError: no file can have such a name.
    """
    path = os.path.expanduser(path)
    if not path.strip() or len(path) > 4000 or any(len(os.fsencode(part)) > 255 for part in path.split("/")):
        raise ValueError(f"{path[:40]!r} is no path: it is empty, or longer than a file's name can be")
    return path


Place = Annotated[str, AfterValidator(check_place)]
"""A path, in which ~ stands for the home folder, or an id on the hub. In key=~/value a shell leaves the ~ alone."""

Count = Annotated[int, Field(ge=1, le=10**9)]
"""How many; whatever is above is a slip of the keyboard."""

Tokens = Annotated[int, Field(ge=1, le=2**24)]
"""Tokens of an example."""

Template = Annotated[str, AfterValidator(check_template)]
"""Text with columns of the data in braces: "Question: {question}\\nAnswer:"."""

LabelName = Annotated[str, BeforeValidator(str)]
"""A label as the data's column has it; YAML reads a bare 0 as a number."""


class ModelSettings(Settings):
    """The model to start from.

    Attributes:
        path: a folder with a Hugging Face checkpoint, or the id of one on the hub. For random weights the configuration
            alone is enough: a folder with a `config.json`, or such a file under any name.
        random_weights: draw the weights with the run's seed instead of reading them.
        revision: branch, tag or commit on the hub.
        dtype: of the weights. With bfloat16, whatever is trained has float32 master weights or float32 adapters.
        attention: implementation of the attention; "auto" is "sdpa" where the architecture has it, else "eager".
        gradient_checkpointing: compute activations again in the backward pass instead of keeping them.
        trust_remote_code: run Python code that comes with the checkpoint.
        trust_pickle: read weights from `pytorch_model.bin` where there are none in safetensors.
    """

    path: Place
    random_weights: bool = False
    revision: str | None = None
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    gradient_checkpointing: bool = False
    trust_remote_code: bool = False
    trust_pickle: bool = False


class AbstractDataSettings(Settings):
    """Where the examples come from and how many are used.

    Attributes:
        path: a `.jsonl`, `.json`, `.parquet`, `.csv`, `.tsv` or `.txt` file, or the id of a data set on the hub.
        columns: names of the columns of CSV and TSV files that have no line of names; a first line that says just the
            same names is skipped.
        subset: name of a configuration of the hub data set.
        split: split of the hub data set.
        limit: use only the first so many rows.
        validation: what the evaluation during training reads: a share of the training rows, held out (0.02); a file;
            or, for a hub data set, the name of one of its splits.
        validation_limit: use only the first so many rows of it.
        max_length: tokens of an example; longer ones are cut at the end. By default the model's context, at most 1024.
    """

    path: Place
    columns: tuple[str, ...] | None = None
    subset: str | None = None
    split: str = "train"
    limit: Count | None = None
    validation: Annotated[float, Field(gt=0, lt=1)] | Place | None = None
    validation_limit: Count | None = None
    max_length: Tokens | None = None


class AbstractTokenData(AbstractDataSettings):
    """Examples of which the model learns to write tokens.

    Attributes:
        packing: put several examples into one row of `max_length` tokens; attention stays inside each example.
    """

    packing: bool = False


class PromptCompletionData(AbstractTokenData):
    """A prompt that the model reads and a completion that it learns to write.

    Attributes:
        prompt: template of the prompt.
        completion: template of the completion; the end-of-text token is appended.
        as_chat: the prompt becomes the user's message and the completion the assistant's, in the model's chat template.
        loss_on: tokens that count in the loss.
    """

    format: Literal["prompt-completion"]
    prompt: Template = "{prompt}"
    completion: Template = "{completion}"
    as_chat: bool = False
    loss_on: Literal["completion", "all"] = "completion"


class ChatData(AbstractTokenData):
    """Conversations, rendered by the model's own chat template.

    Attributes:
        messages: the column that holds a list of messages, each an object with `role` and `content`.
        loss_on: tokens that count in the loss; "answers" are all the assistant's turns and need a chat template that
            marks them, "last-answer" works with every template.
    """

    format: Literal["chat"]
    messages: str = "messages"
    loss_on: Literal["last-answer", "answers", "all"] = "last-answer"


class TextData(AbstractTokenData):
    """Plain text: every token counts in the loss; the end-of-text token is appended.

    Attributes:
        text: template of an example.
    """

    format: Literal["text"]
    text: Template = "{text}"


class RandomData(Settings):
    """Rows of random tokens, all of one length: to measure time and memory, where nothing is to be learnt.

    It needs no file and no tokenizer, and the trained model is not kept.

    Attributes:
        length: tokens of a row; all of them count in the loss.
        vocabulary: tokens are drawn from the first so many; by default from all that the model has.
        rows: how many there are.
    """

    format: Literal["random"]
    length: Annotated[int, Field(ge=2, le=2**24)]
    vocabulary: Annotated[int, Field(ge=2, le=10**9)] | None = None
    rows: Count = 512

    @model_validator(mode="after")
    def check_size(self) -> Self:
        if self.rows * self.length > 2**30:
            raise ValueError(f"rows={self.rows} of length={self.length} are more than 2**30 tokens; take fewer rows")
        return self

    @property
    def max_length(self) -> int:
        """Tokens of an example."""
        return self.length

    @property
    def validation(self) -> None:
        """There is nothing to evaluate on."""


class ClassificationData(AbstractDataSettings):
    """Texts or pairs of texts, each with a label, for a model with a classification head on top.

    Attributes:
        text: template of the text.
        text_pair: template of the second text, where there is one.
        label: the column that holds the label.
        labels: all labels as that column has them, in the order of the head's outputs. By default those of the training
            rows: numbers by size, else by the alphabet.
        regression: the labels are scores: one output and the squared error.
    """

    format: Literal["classification"]
    text: Template = "{sentence}"
    text_pair: Template | None = None
    label: str = "label"
    labels: tuple[LabelName, ...] | None = None
    regression: bool = False

    @model_validator(mode="after")
    def check_labels(self) -> Self:
        if self.labels is not None and (
            self.regression or len(set(self.labels)) != len(self.labels) or len(self.labels) < 2
        ):
            raise ValueError(
                f"labels={list(self.labels)} with regression={self.regression}; give two or more different labels, or, "
                "for scores, regression=true and no labels"
            )
        return self


TokenData = PromptCompletionData | ChatData | TextData
FileData = TokenData | ClassificationData
Data = Annotated[FileData | RandomData, Field(discriminator="format")]


def is_packed(data: Data) -> bool:
    """Whether several examples stand in one row."""
    return isinstance(data, TokenData) and data.packing


class OptimizerSettings(Settings):
    """AdamW and its schedule, the same for every method.

    Attributes:
        lr: learning rate after the warm-up.
        weight_decay: decoupled decay of matrices; biases and norms have none.
        betas: decay of the first and the second moment.
        eps: added to the denominator.
        max_grad_norm: gradients are scaled down to this L2 norm; 0 turns it off.
        schedule: course of the learning rate after the warm-up.
        warmup: steps of linear warm-up; below 1 a share of all steps.
    """

    lr: PositiveFloat
    weight_decay: NonNegativeFloat = 0.0
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8
    max_grad_norm: NonNegativeFloat = 1.0
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: NonNegativeFloat = 0.03


class RunSettings(Settings):
    """How long, where to, and what to write on the way.

    Attributes:
        output: the folder to create; holds the trained model, `run.json`, `records.jsonl` and the checkpoints.
        steps: optimizer steps to take; give this or `epochs`.
        epochs: passes over the data; give this or `steps`.
        batch_size: examples of one forward pass, on each device.
        accumulation: forward passes of one optimizer step.
        seed: of data order, adapters, dropout and block selection.
        device: "auto" takes an accelerator when there is one.
        log_every: steps between two log lines.
        evaluate_every: steps between two evaluations; none by default, and one at the end where there is validation
            data. This loss is the mean over batches; `gradselect evaluate --task loss` weighs every token alike.
        save_every: steps between two checkpoints; none by default.
        keep_checkpoints: older ones are deleted.
        max_skipped_steps: a step whose loss or gradient norm is NaN or infinite is skipped; so many in a row are, one
            more ends the run.
        report_to: trackers that get the curves.
    """

    output: Place
    steps: Count | None = None
    epochs: Annotated[float, Field(gt=0, le=10**6)] | None = None
    batch_size: Annotated[int, Field(ge=1, le=10**6)] = 8
    accumulation: Annotated[int, Field(ge=1, le=10**6)] = 1
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    device: Literal["auto", "cpu"] = "auto"
    log_every: Count = 10
    evaluate_every: Count | None = None
    save_every: Count | None = None
    keep_checkpoints: Count = 2
    max_skipped_steps: Annotated[int, Field(ge=0)] = 3
    report_to: tuple[Literal["tensorboard", "wandb", "trackio", "mlflow"], ...] = ("tensorboard",)

    @model_validator(mode="after")
    def check_length(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(
                f"got steps={self.steps} and epochs={self.epochs}; give one of them, e.g. run.steps=300 run.epochs=null"
            )
        return self


class Recipe(Settings):
    """Everything that decides a training run."""

    model: ModelSettings
    data: Data
    method: Method
    optimizer: OptimizerSettings
    run: RunSettings

    @model_validator(mode="after")
    def check_validation(self) -> Self:
        if self.run.evaluate_every is not None and self.data.validation is None:
            raise ValueError(
                f"run.evaluate_every={self.run.evaluate_every} needs examples to evaluate on; "
                "add e.g. data.validation=0.02, or set run.evaluate_every=null"
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
