"""Everything that a run reads before it begins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gradselect.app.models import check_tokens
from gradselect.app.progress import SILENT, Stages
from gradselect.app.recipe import ClassificationData, FileData, RandomData, Recipe
from gradselect.usage import printable

from .examples import Examples, RenderedRows, random_examples, render_examples, stand_in_tokenizer, with_labels
from .model import (
    check_base_can_train,
    load_classifier,
    load_config,
    load_model,
    load_tokenizer,
    num_embeddings,
    resolve_max_length,
)
from .tokenization import tokenize_examples


@dataclass(frozen=True, kw_only=True)
class DataInputs:
    """Data of a run, read without the weights of its model.

    Args:
        tokenizer: tokenizer of the model.
        examples: data to train and evaluate on.
        max_length: tokens of a row.
    """

    tokenizer: PreTrainedTokenizerBase
    examples: Examples
    max_length: int


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Everything that a run needs beside its recipe.

    Args:
        model: model to train.
        tokenizer: tokenizer of the model.
        examples: data to train and evaluate on.
        max_length: tokens of an example.
        head: parameter names of a classification head, which trains with every method. Empty for language models.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    examples: Examples
    max_length: int
    head: Sequence[str] = ()


def read_inputs(recipe: Recipe, *, stages: Stages = SILENT) -> Inputs:
    """Read model, tokenizer and data of the recipe. Data first: a broken line should not wait for a large model.

    Args:
        recipe: the recipe.
        stages: shows what is being read.

    Raises:
        UsageError: a file, model or tokenizer cannot be used.
    """
    match recipe.data:
        case RandomData():
            return _read_random(recipe, recipe.data, stages)
        case _:
            return _read_files(recipe, recipe.data, stages)


def read_data(recipe: Recipe, *, stages: Stages = SILENT) -> DataInputs:
    """Read data, tokenizer and configuration of the recipe, but no weights.

    Args:
        recipe: the recipe.
        stages: shows what is being read.

    Raises:
        UsageError: a file, configuration or tokenizer cannot be used.

    Example:
        >>> read_data(load_recipe("recipes/quickstart.yaml")).max_length  # doctest: +SKIP
        128
    """
    data, settings = recipe.data, recipe.model
    if isinstance(data, RandomData):
        tokenizer, config = stand_in_tokenizer(), load_config(settings)
        size = config.get_text_config().vocab_size
        examples = random_examples(data, num_embeddings=size, seed=recipe.run.seed)
    else:
        rendered, tokenizer = _read_rows(recipe, data, stages)
        config = load_config(settings)
        examples = tokenize_examples(rendered, data, tokenizer, stages=stages)
    max_length = resolve_max_length(data, config=config, tokenizer=tokenizer)
    return DataInputs(tokenizer=tokenizer, examples=examples, max_length=max_length)


def _read_rows(recipe: Recipe, data: FileData, stages: Stages) -> tuple[RenderedRows, PreTrainedTokenizerBase]:
    with stages.open(f"reading {printable(data.path)}") as stage:
        rendered = render_examples(data, seed=recipe.run.seed)
        stage.become("loading the tokenizer")
        return rendered, load_tokenizer(recipe.model, data)


def _read_files(recipe: Recipe, data: FileData, stages: Stages) -> Inputs:
    seed, device = recipe.run.seed, _device(recipe)
    rendered, tokenizer = _read_rows(recipe, data, stages)
    examples = tokenize_examples(rendered, data, tokenizer, stages=stages)
    with stages.open(f"loading {printable(recipe.model.path)}"):
        check_base_can_train(recipe)
        if isinstance(data, ClassificationData):
            labels, keeps_order = examples.labels, data.labels is not None
            found = load_classifier(
                recipe.model, labels=labels, keeps_order=keeps_order, tokenizer=tokenizer, seed=seed
            )
            model, head, examples = found.model, found.head, with_labels(examples, found.labels, notes=found.notes)
        else:
            model, head = load_model(recipe.model, seed=seed, device=device), ()
    max_length = resolve_max_length(data, config=model.config, tokenizer=tokenizer)
    check_tokens(model, tokenizer)
    return Inputs(model=model, tokenizer=tokenizer, examples=examples, max_length=max_length, head=head)


def _read_random(recipe: Recipe, data: RandomData, stages: Stages) -> Inputs:
    with stages.open(f"loading {printable(recipe.model.path)}"):
        check_base_can_train(recipe)
        model, tokenizer = load_model(recipe.model, seed=recipe.run.seed, device=_device(recipe)), stand_in_tokenizer()
    max_length = resolve_max_length(data, config=model.config, tokenizer=tokenizer)
    check_tokens(model, tokenizer)
    examples = random_examples(data, num_embeddings=num_embeddings(model), seed=recipe.run.seed)
    return Inputs(model=model, tokenizer=tokenizer, examples=examples, max_length=max_length)


def _device(recipe: Recipe) -> str:
    """Return the device that draws random weights. Billions take seconds on a GPU and minutes on a CPU."""
    return "cuda" if recipe.run.device == "auto" and torch.cuda.is_available() else "cpu"
