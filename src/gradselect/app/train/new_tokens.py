"""Added tokens whose embeddings nothing has trained yet, and a method that may leave them so."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gradselect.app.inputs import Inputs
from gradselect.app.recipe import (
    AbstractAdapterMethod,
    AbstractBlockMethod,
    AbstractMaskMethod,
    AbstractPeerMethod,
    FullMethod,
    RandomData,
    Recipe,
)

NUM_EXAMPLES = 1000
"""Examples that are searched for added tokens."""
NUM_ROWS = 4096
"""Rows that show how far embeddings are from their mean."""
NEAR = 0.1
"""A row is new if it is this much nearer to the mean of all, or to zero, than rows usually are."""
NUM_NAMED = 5


def new_token_notes(recipe: Recipe, inputs: Inputs) -> list[str]:
    """Say which added tokens of the data have embeddings as they were made, and how to train them.

    transformers makes the rows of added tokens from the mean of all others. Call it when the method has been set up.
    """
    advice = _advice(recipe, inputs)
    if advice is None or isinstance(recipe.data, RandomData) or "input_ids" not in inputs.examples.train.column_names:
        return []
    rows = next(iter(inputs.model.get_input_embeddings().parameters())).detach()
    tokens = [token for token in _added_tokens(inputs) if token < len(rows)]
    new = [token for token, is_new in zip(tokens, _are_new(rows, tokens), strict=True) if is_new]
    if not new:
        return []
    names = [str(name) for name in inputs.tokenizer.convert_ids_to_tokens(new[:NUM_NAMED])]
    more = ", ..." if len(new) > NUM_NAMED else ""
    return [
        f"{len(new):,} added tokens of the data have embeddings that were never trained ({', '.join(names)}{more}): "
        f"they are the mean of all others, or zero. {advice}"
    ]


def _advice(recipe: Recipe, inputs: Inputs) -> str | None:
    """Say when the method trains the embedding; None if it does so at every step."""
    method = recipe.method
    start = f"method.name={method.name} trains"
    match method:
        case FullMethod():
            return None
        case AbstractBlockMethod():
            always = [*method.always]
            if any("embed" in name for name in always):
                return None
            return f"{start} the embedding only while it is selected; write method.always={['embedding', *always]}"
        case AbstractMaskMethod():
            return f"{start} only the selected entries of the embedding, if any"
        case AbstractAdapterMethod():
            embedding: Any = inputs.model.get_input_embeddings()
            if any(parameter.requires_grad for parameter in embedding.parameters()):
                return None
            return f"{start} no embedding; write method.train_embedding=true, if it is a LoRA"
        case AbstractPeerMethod():
            return f"{start} the embedding only if its package does"
    return None


def _added_tokens(inputs: Inputs) -> list[int]:
    """Return the added tokens in the examples, the tokenizer's special ones included."""
    tokenizer: Any = inputs.tokenizer
    added = {*tokenizer.get_added_vocab().values(), *tokenizer.all_special_ids}
    train = inputs.examples.train
    some = train.select(range(0, len(train), max(1, len(train) // NUM_EXAMPLES)))
    return sorted({token for ids in some["input_ids"] for token in ids} & added)


def _are_new(embeddings: Tensor, tokens: list[int]) -> list[bool]:
    """Return True for rows that lie at the mean of all rows, or at zero.

    Args:
        embeddings: (tokens, width).
        tokens: rows to look at.
    """
    mean = embeddings.mean(0, dtype=torch.float32)
    usual = embeddings[:: max(1, len(embeddings) // NUM_ROWS)].float()
    rows = embeddings[tokens].float()
    at_mean = (rows - mean).norm(dim=1) <= NEAR * (usual - mean).norm(dim=1).median()
    at_zero = rows.norm(dim=1) <= NEAR * usual.norm(dim=1).median()
    return (at_mean | at_zero).tolist()
