"""All that a run reads before it begins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ._data import Examples, load_examples
from ._model import load_classifier, load_model, load_tokenizer, resolve_max_length
from ._recipe import ClassificationData, Recipe


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """All that a run needs beside its recipe.

    Args:
        max_length: tokens of an example.
        head: names of the parameters of a classification head, which train with every method; else none.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    examples: Examples
    max_length: int
    head: Sequence[str] = ()


def read_inputs(recipe: Recipe) -> Inputs:
    """What the recipe names. Data first: a broken line should not wait for a large model to load.

    Raises:
        UsageError: something cannot be used.
    """
    examples = load_examples(recipe.data, seed=recipe.run.seed)
    tokenizer = load_tokenizer(recipe.model, recipe.data)
    if isinstance(recipe.data, ClassificationData):
        model, head = load_classifier(recipe.model, labels=examples.labels, tokenizer=tokenizer, seed=recipe.run.seed)
    else:
        model, head = load_model(recipe.model), ()
    max_length = resolve_max_length(recipe.data, model=model, tokenizer=tokenizer)
    return Inputs(model=model, tokenizer=tokenizer, examples=examples, max_length=max_length, head=head)
