"""Activation checkpointing in which the backward pass ends at the lowest selected block."""

from __future__ import annotations

import functools
import warnings
import weakref
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, TrainingArguments

_METHOD = "enable_input_require_grads"


def checkpoint_selected(model: PreTrainedModel) -> None:
    """Turn on activation checkpointing for the layers that the backward pass visits.

    Those are the layers above the lowest selected block. Use it in place of `model.activation_checkpointing_enable()`
    (formerly `gradient_checkpointing_enable`). That method also makes the output of the embedding require a gradient,
    so every layer keeps its input and runs a second time, frozen ones too. Checkpoints that are not reentrant, like
    these, do not need that. In a Trainer, `SelectionCallback` does the same.

    Args:
        model: a model of transformers. It checkpoints in training mode.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> model = BertModel(BertConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, vocab_size=16))
        >>> checkpoint_selected(model)
        >>> [layer.gradient_checkpointing for layer in model.encoder.layer]
        [True, True]
    """
    # transformers before 5.23 has the old name only; newer versions warn about it.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    _release_inputs(model)


def shorten_backward(model: nn.Module, args: TrainingArguments) -> None:
    """Let the backward pass end at the lowest selected block, with activation checkpointing too."""
    if not is_reentrant(args, model):
        _release_inputs(model)


def keep_backward_short(model: nn.Module, args: TrainingArguments) -> None:
    """Do the same until `restore_inputs`.

    TRL's trainers turn checkpointing off and on again within a step, around a generation or a pass of the reference
    model, which would make the output of the embedding require a gradient again.
    """
    if is_reentrant(args, model):
        return
    _release_inputs(model)
    for module in _pretrained(model):
        vars(module)[_METHOD] = _NoInputGradients(module)


def restore_inputs(model: nn.Module) -> None:
    """Give transformers' method back that makes the output of the embedding require a gradient."""
    for module in _pretrained(model):
        if isinstance(vars(module).get(_METHOD), _NoInputGradients):
            del vars(module)[_METHOD]


class _NoInputGradients:
    """Stands before a model's `enable_input_require_grads` and does nothing; in a copy of the model it is that method.

    Args:
        model: held weakly.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = weakref.ref(model)

    def __call__(self) -> None:
        pass

    def __reduce__(self) -> Any:
        return getattr, (self._model(), _METHOD)


def is_reentrant(args: TrainingArguments, model: nn.Module | None = None) -> bool:
    """Return True if activation checkpoints are reentrant: their input must require a gradient.

    Frameworks turn checkpointing on by themselves, and put functions of their own in place of torch's, so the model's
    own function is tried too.
    """
    settings = args.gradient_checkpointing_kwargs
    is_asked_for = bool(args.gradient_checkpointing) and isinstance(settings, dict) and settings.get("use_reentrant")
    return bool(is_asked_for) or (model is not None and _loses_gradients(model))


class _Layer(nn.Module):
    """One weight, as a layer that trains."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden * self.weight


def _loses_gradients(model: nn.Module) -> bool:
    """Return True if a layer that trains would get no gradient from an input that requires none."""
    functions = (
        getattr(module, "_gradient_checkpointing_func", None)
        for module in model.modules()
        if getattr(module, "gradient_checkpointing", False)
    )
    checkpoint = next((each for each in functions if each is not None), None)
    if checkpoint is None:
        return False
    with torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of what is looked for here
        return not checkpoint(functools.partial(_Layer().__call__), torch.ones(1)).requires_grad


def _release_inputs(model: nn.Module) -> None:
    """Stop making the output of the embedding require a gradient.

    A model knows its last hook only, so one that asked for it twice cannot undo it.
    """
    for module in _pretrained(model):
        module.disable_input_require_grads()
    for module in model.modules():
        for number, hook in list(module._forward_hooks.items()):
            if getattr(hook, "__qualname__", "").startswith(f"{PreTrainedModel.__name__}.{_METHOD}."):
                del module._forward_hooks[number]


def _pretrained(model: nn.Module) -> list[PreTrainedModel]:
    return [module for module in model.modules() if isinstance(module, PreTrainedModel)]
