"""Trainers that compare answers: DPO, KTO and ORPO of TRL, as the command line runs them."""

from __future__ import annotations

import random
import warnings
from typing import Any

from datasets import Dataset
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.kto_config import KTOConfig
from trl.trainer.kto_trainer import KTOTrainer

from gradselect.app.inputs import IGNORED
from gradselect.app.recipe import DpoSettings, KtoSettings, OrpoSettings

from .reference_model import drop_reference_adapter, reference_copy
from .trainer import MetricsTrainer

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # TRL warns that everything in this room may change; the tests would see it
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer


class _ReferenceTrainer(MetricsTrainer):
    """Common part of DPO and KTO: the reference. The rows are tokens already."""

    def __init__(self, *, model: nn.Module, keeps_reference: bool, **others: Any) -> None:
        reference = reference_copy(model) if keeps_reference and not isinstance(model, PeftModel) else None
        super().__init__(model=model, ref_model=reference, **others)
        drop_reference_adapter(model)

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        return dataset


class DpoTrainer(_ReferenceTrainer, DPOTrainer):
    """`RunTrainer` for direct preference optimization."""


class KtoTrainer(_ReferenceTrainer, KTOTrainer):
    """`RunTrainer` for KTO."""


def _as_it_is(row: dict[str, Any]) -> dict[str, Any]:
    return row


class OrpoTrainer(MetricsTrainer, ORPOTrainer):
    """`RunTrainer` for ORPO."""

    # Not a method: TRL maps it over the rows, and datasets would hash the whole trainer.
    tokenize_row: Any = staticmethod(_as_it_is)

    def train_metrics(self) -> Any:
        return self._stored_metrics["train"]

    def _count_tokens(self, inputs: dict[str, Any]) -> int:
        return int(inputs["chosen_attention_mask"].sum() + inputs["rejected_attention_mask"].sum())


def switch_off_dropout(model: nn.Module) -> None:
    """Set the dropout of a model to 0, as TRL does where answers are compared. That of an adapter stays.

    A recipe asks for it by name, and TRL would drop it without a word.
    """
    of_adapters = {
        id(part)
        for layer in model.modules()
        if isinstance(layer, BaseTunerLayer)
        for name, part in layer.named_modules()
        if not name.startswith("base_layer")
    }
    for module in model.modules():
        if isinstance(module, nn.Dropout) and id(module) not in of_adapters:
            module.p = 0.0


def dpo_options(settings: DpoSettings, arguments: dict[str, Any]) -> dict[str, Any]:
    """Return arguments and reference of `DpoTrainer`. The rows are cut already."""
    config = DPOConfig(
        **arguments,
        disable_dropout=False,
        beta=settings.beta,
        loss_type=[settings.loss],
        label_smoothing=settings.label_smoothing,
        precompute_ref_log_probs=settings.precompute_reference,
        max_length=None,
    )
    return {"args": config, "keeps_reference": not settings.precompute_reference}


def kto_options(settings: KtoSettings, arguments: dict[str, Any]) -> dict[str, Any]:
    """Return arguments and reference of `KtoTrainer`. The rows are cut and in the order of the training already."""
    config = KTOConfig(
        **arguments,
        disable_dropout=False,
        beta=settings.beta,
        loss_type=settings.loss,
        desirable_weight=settings.desirable_weight,
        undesirable_weight=settings.undesirable_weight,
        precompute_ref_log_probs=settings.precompute_reference,
        train_sampling_strategy="sequential",
        max_length=None,
    )
    return {"args": config, "keeps_reference": not settings.precompute_reference}


def orpo_options(settings: OrpoSettings, arguments: dict[str, Any], *, max_length: int) -> dict[str, Any]:
    """Return arguments of `OrpoTrainer`."""
    config = ORPOConfig(
        **arguments,
        disable_dropout=False,
        beta=settings.beta,
        max_length=max_length,
        max_completion_length=max_length,
        remove_unused_columns=False,
    )
    return {"args": config}


def dpo_rows(rows: Dataset) -> Dataset:
    """Return pairs of answers in the columns of DPO: the prompt ends where the first of the answers begins."""
    columns: dict[str, list[Any]] = {"prompt_ids": [], "chosen_ids": [], "rejected_ids": []}
    for row in _as_dicts(rows):
        start = min(_start(row["labels"]), _start(row["rejected_labels"]))
        columns["prompt_ids"].append(row["input_ids"][:start])
        columns["chosen_ids"].append(row["input_ids"][start:])
        columns["rejected_ids"].append(row["rejected_ids"][start:])
    return Dataset.from_dict(columns)


def kto_rows(rows: Dataset, *, batch_size: int, seed: int | None) -> Dataset:
    """Return single answers in the columns of KTO, those of pairs one by one.

    The divergence is estimated from prompts with the answer to another prompt of the same forward pass. So the order is
    drawn here, with `seed`, and stays in all epochs. None: the order of the file.
    """
    singles = []
    for row in _as_dicts(rows):
        if "good" in row:
            singles.append((row["input_ids"], row["labels"], row["good"]))
        else:
            singles.append((row["input_ids"], row["labels"], True))
            singles.append((row["rejected_ids"], row["rejected_labels"], False))
    if seed is not None:
        random.Random(f"kto/{seed}").shuffle(singles)
    starts = [_start(labels) for _, labels, _ in singles]
    answers = [ids[start:] for (ids, _, _), start in zip(singles, starts, strict=True)]
    return Dataset.from_dict(
        {
            "prompt_ids": [ids[:start] for (ids, _, _), start in zip(singles, starts, strict=True)],
            "completion_ids": answers,
            "KL_completion_ids": [answers[place] for place in other_answers(len(answers), batch_size)],
            "label": [good for _, _, good in singles],
        }
    )


def other_answers(count: int, batch_size: int) -> list[int]:
    """Return, for each of `count` prompts, the place of the answer that is put behind it to estimate the divergence.

    The one before it in the same batch, for the first the last. A batch of one row takes that of the row before.

    Example:
        >>> other_answers(5, 2)
        [1, 0, 3, 2, 3]
    """
    places = []
    for place in range(count):
        first = place // batch_size * batch_size
        last = min(first + batch_size, count) - 1
        places.append(place - 1 if place > first or last == first else last)
    return places


def orpo_rows(rows: Dataset) -> Dataset:
    """Return pairs of answers in the columns of ORPO."""
    columns: dict[str, list[Any]] = {}
    for row in _as_dicts(rows):
        parts = {"chosen": (row["input_ids"], row["labels"]), "rejected": (row["rejected_ids"], row["rejected_labels"])}
        for name, (ids, labels) in parts.items():
            columns.setdefault(f"{name}_input_ids", []).append(ids)
            columns.setdefault(f"{name}_attention_mask", []).append([1] * len(ids))
            columns.setdefault(f"{name}_labels", []).append(labels)
    return Dataset.from_dict(columns)


def _as_dicts(rows: Dataset) -> list[dict[str, Any]]:
    return rows.to_list()


def _start(labels: list[int]) -> int:
    """Return the place of the first token of an answer."""
    return next(place for place, label in enumerate(labels) if label != IGNORED)
