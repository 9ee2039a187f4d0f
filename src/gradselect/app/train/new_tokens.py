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
    RandomData,
    Recipe,
)
from gradselect.usage import matches_any

NUM_EXAMPLES = 1000
"""Examples that are searched for added tokens."""
NUM_ROWS = 4096
"""Rows that show how far embeddings are from their mean."""
NEAR = 0.1
"""A row is new if it is this much nearer to the mean of all, or to zero, than rows usually are."""
NUM_NAMED = 5


def new_token_notes(recipe: Recipe, inputs: Inputs) -> list[str]:
    """Say which added tokens of the data have rows as they were made in the embedding or an untied head.

    transformers makes the rows of added tokens from the mean of all others. Call it when the method has been set up.
    """
    tables = _may_stay_untrained(recipe.method, inputs.model)
    if not tables or isinstance(recipe.data, RandomData) or "input_ids" not in inputs.examples.train.column_names:
        return []
    added, new = _added_tokens(inputs), dict[str, list[int]]()
    for part, rows in tables.items():
        tokens = [token for token in added if token < len(rows)]
        new[part] = [token for token, is_new in zip(tokens, _are_new(rows, tokens), strict=True) if is_new]
    new = {part: tokens for part, tokens in new.items() if tokens}
    if not new:
        return []
    every = sorted(set().union(*new.values()))
    names = [str(name) for name in inputs.tokenizer.convert_ids_to_tokens(every[:NUM_NAMED])]
    more = ", ..." if len(every) > NUM_NAMED else ""
    where = " and ".join(f"{len(tokens):,} rows of the {part}" for part, tokens in new.items())
    return [
        f"{len(every):,} added tokens of the data were never trained ({', '.join(names)}{more}): {where} are the mean "
        f"of all others, or zero. {_advice(recipe.method, inputs.model, list(new))}"
    ]


def _may_stay_untrained(method: Any, model: Any) -> dict[str, Tensor]:
    """Return the weights with a row for each token, "embedding" and "head", that do not train at every step.

    A tied head is the embedding.
    """
    names = {id(weight): name for name, weight in model.named_parameters(remove_duplicate=False)}
    modules = {"embedding": model.get_input_embeddings(), "head": model.get_output_embeddings()}
    weights_of = {part: [] if module is None else [*module.parameters()] for part, module in modules.items()}
    if weights_of["head"] and weights_of["head"][0] is weights_of["embedding"][0]:
        del weights_of["head"]
    found: dict[str, Tensor] = {}
    for part, weights in weights_of.items():
        match method:
            case _ if not weights:
                is_trained = True
            case AbstractBlockMethod():
                is_trained = any(part[:5] in name for name in method.always)  # a block may be named "embed_tokens"
            case AbstractMaskMethod():
                is_trained = matches_any(names[id(weights[0])], method.always)
            case AbstractAdapterMethod():
                is_trained = any(weight.requires_grad for weight in weights)
            case _:
                is_trained = not isinstance(method, AbstractPeerMethod)
        if not is_trained:
            found[part] = weights[0].detach()
    return found


def _advice(method: Any, model: Any, parts: list[str]) -> str:
    """Say when the method trains these parts, "embedding" or "head", and how it trains them always."""
    start, them = f"method.name={method.name} trains", " and ".join(f"the {part}" for part in parts)
    match method:
        case AbstractBlockMethod():
            when = "it is" if len(parts) == 1 else "they are"
            return f"{start} {them} only while {when} selected; write method.always={[*parts, *method.always]}"
        case AbstractMaskMethod():
            return f"{start} only the selected entries of {them}, if any"
        case AbstractAdapterMethod():
            nothing = f"{start} no {' and no '.join(parts)}"
            if "head" not in parts:
                return f"{nothing}; write method.train_embedding=true, if it is a LoRA"
            whole = (model.get_input_embeddings(), model.get_output_embeddings())
            names = [name.rpartition(".")[2] for name, module in model.named_modules() if module in whole]
            options = f"target_modules: all-linear, modules_to_save: [{', '.join(names)}]"
            return f"{nothing}; a LoRA that trains both is method='{{name: peft, type: LORA, options: {{{options}}}}}'"
    return f"{start} {them} only if its package does"


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
