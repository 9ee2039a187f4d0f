"""Training of a model with a classification head: padding, loss, metrics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import DataCollatorWithPadding, EvalPrediction, PreTrainedTokenizerBase

from gradselect.app.stats import class_metrics, score_metrics


def classifier_options(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return the options of `RunTrainer` that a classifier needs: padding by batch, loss and metrics."""
    return {
        "data_collator": DataCollatorWithPadding(tokenizer),
        "compute_loss_func": label_loss,
        "compute_metrics": validation_metrics,
        "preprocess_logits_for_metrics": _logits,
    }


def label_loss(outputs: Any, labels: Tensor, *, num_items_in_batch: Tensor | int | None = None) -> Tensor:
    """Return the cross entropy of labels, or the squared error of scores, in float32.

    Args:
        outputs: with `logits`, (examples, labels).
        labels: int64 numbers of labels, or scores, (examples,).
        num_items_in_batch: divisor of the sum, the number of examples in all micro-batches of the step: gradient
            accumulation then gives the mean over the step. By default the number of these examples.
    """
    logits = outputs.logits.float()
    if labels.is_floating_point():
        loss = functional.mse_loss(logits.squeeze(-1), labels.float(), reduction="sum")
    else:
        loss = functional.cross_entropy(logits, labels, reduction="sum")
    return loss / (len(labels) if num_items_in_batch is None else num_items_in_batch)


def batch_loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Return the mean `label_loss` of a batch."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    return label_loss(model(**inputs), batch["labels"])


def _logits(outputs: Tensor | tuple[Any, ...], labels: Tensor) -> Tensor:
    """Return the first output. Others, such as hidden states, would be kept for the whole validation set."""
    return outputs[0] if isinstance(outputs, tuple) else outputs


def validation_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Return accuracy etc., or correlations, over the whole validation set, without undefined ones."""
    logits, labels = torch.as_tensor(prediction.predictions), torch.as_tensor(prediction.label_ids)
    if labels.is_floating_point():
        metrics = score_metrics(labels.tolist(), logits.squeeze(-1).tolist())
    else:
        metrics = class_metrics(labels.tolist(), logits.argmax(-1).tolist(), num_labels=logits.shape[-1])
    return {name: value for name, value in metrics.items() if value is not None}
