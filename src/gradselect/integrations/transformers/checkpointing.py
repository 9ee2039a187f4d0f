"""Activation checkpointing in which the backward pass ends at the lowest selected block."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel, TrainingArguments


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
    # transformers before 5.20 or so has the old name only; newer versions warn about it.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    _release_inputs(model)


def keep_backward_short(model: nn.Module, args: TrainingArguments) -> None:
    """Let the backward pass end at the lowest selected block, with activation checkpointing too."""
    if not is_reentrant(args):
        _release_inputs(model)


def is_reentrant(args: TrainingArguments) -> bool:
    """Return True if activation checkpoints are reentrant: their input must require a gradient."""
    settings = args.gradient_checkpointing_kwargs
    return bool(args.gradient_checkpointing) and isinstance(settings, dict) and bool(settings.get("use_reentrant"))


def _release_inputs(model: nn.Module) -> None:
    """Stop making the output of the embedding require a gradient."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.disable_input_require_grads()
