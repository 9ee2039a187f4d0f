"""A mask in the simplest way: dense gradients, everything sorted, nothing freed."""

from __future__ import annotations

import torch
from tiny_models import tiny_batch
from torch import Tensor, nn

from gradselect.entries.mask import AbstractCompactMask, FromWeights, MaskTensor, TopOfGradient

Entries = dict[str, list[int]]


def offered(model: nn.Module) -> list[MaskTensor]:
    """Return every parameter of the model as the `MaskTensor` that an optimizer passes to `bind`."""
    modules = dict(model.named_modules())
    return [
        MaskTensor(name=name, parameter=parameter, module=modules[name.rpartition(".")[0]])
        for name, parameter in model.named_parameters()
    ]


def gradients(model: nn.Module, *, seed: int) -> dict[str, Tensor]:
    """Return the gradients of a random batch; clear them in the model."""
    model(**tiny_batch(model, seed=seed)).loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = None
    return {name: gradient for name, gradient in found.items() if gradient is not None}


def best(scores: dict[str, Tensor], count: int) -> Entries:
    """The `count` entries of largest score, from one sorted list of all; ties to the earlier one; NaN never."""
    ranked = sorted(
        ((-score, position, index, name) for position, (name, values) in enumerate(scores.items())
         for index, score in enumerate(values.double().reshape(-1).tolist()) if score == score),
    )  # fmt: skip
    chosen: Entries = {}
    for _, _, index, name in ranked[:count]:
        chosen.setdefault(name, []).append(index)
    return {name: sorted(indices) for name, indices in chosen.items()}


def next_entries(
    mask: AbstractCompactMask, model: nn.Module, step: int, entries: Entries, found: dict[str, Tensor]
) -> Entries:
    """The set of step `step`, from that of the step before and the step's gradients."""
    choice = mask.choice(step, sum(map(len, entries.values())))
    if choice is None:
        return entries
    if isinstance(choice, FromWeights):
        return as_lists(mask.choose(step, model))
    assert isinstance(choice, TopOfGradient)
    scores = {tensor.name: mask.score(tensor.parameter.detach().clone(), found[tensor.name]) for tensor in mask.tensors}
    if not choice.replace:
        for name, indices in entries.items():
            scores[name].view(-1)[indices] = torch.nan
    if isinstance(choice.counts, int):
        chosen = best(scores, choice.counts)
    else:
        each = [best({name: scores[name]}, count) for name, count in choice.counts.items()]
        chosen = {name: indices for part in each for name, indices in part.items()}
    if choice.replace:
        return chosen
    return {
        name: sorted(entries.get(name, []) + chosen.get(name, []))
        for name in mask.names
        if name in {**entries, **chosen}
    }


def as_lists(indices: dict[str, Tensor]) -> Entries:
    return {name: chosen.tolist() for name, chosen in indices.items() if chosen.numel()}


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Weights and buffers, copied."""
    return {name: tensor.detach().clone() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
