"""Rows that a trainer reads, made from examples: cut to `data.max_length`, or packed. Every token is accounted for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase
from trl.data_utils import pack_dataset

from gradselect import UsageError
from gradselect.app.models import encode_texts
from gradselect.app.progress import SILENT, Stages
from gradselect.app.recipe import ClassificationData, Data, PreferenceData, PromptData, TextData, is_packed
from gradselect.app.results import TokenCounts

from .answer_cuts import cut_answers, drop_long_prompts
from .examples import Examples
from .tokens import IGNORED

Numbers = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Rows to train or evaluate on.

    Args:
        dataset: columns input_ids and labels; packed rows also have seq_lengths, the lengths of their pieces.
            For classification: what the tokenizer gives, and labels.
        counts: tokens before and after.
        lengths: tokens of each example, before it was cut.
        trained: those of them that count in the loss. None for classification.
    """

    dataset: Dataset
    counts: TokenCounts
    lengths: Sequence[int]
    trained: Sequence[int] | None


def make_rows(
    examples: Examples,
    settings: Data,
    *,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    num_drawn: int = 0,
    stages: Stages = SILENT,
) -> dict[str, Rows]:
    """Return the rows for "train" and, if there are such examples, "validation", which is never packed.

    Without packing, longer examples lose their end. With packing, a text goes on in further rows; an answer does not,
    because a row without its prompt would teach to write it from nothing. `stages` shows how far it is.

    Args:
        examples: the examples.
        settings: section `data` of the recipe.
        tokenizer: encodes texts to classify.
        max_length: tokens of a row.
        num_drawn: tokens that the trainer draws behind each prompt, at most.

    Raises:
        UsageError: nothing is left to train or evaluate on.
    """
    datasets = {"train": examples.train, "validation": examples.validation}
    rows = {}
    for name, dataset in datasets.items():
        if dataset is None:
            continue
        if isinstance(settings, ClassificationData):
            rows[name] = _classification_rows(dataset, tokenizer, max_length=max_length, stages=stages)
        elif isinstance(settings, PreferenceData):
            with stages.open("cutting rows to data.max_length"):
                kept, counts, lengths, trained = cut_answers(dataset, max_length=max_length)
            rows[name] = Rows(dataset=kept, counts=counts, lengths=lengths, trained=trained)
        elif isinstance(settings, PromptData):
            kept, counts, lengths = drop_long_prompts(dataset, max_length=max_length - num_drawn)
            rows[name] = Rows(dataset=kept, counts=counts, lengths=lengths, trained=None)
        else:
            packing = is_packed(settings) and name == "train"
            goes_on = packing and isinstance(settings, TextData)
            with stages.open("packing rows" if packing else "cutting rows to data.max_length"):
                rows[name] = token_rows(dataset, max_length=max_length, packing=packing, goes_on=goes_on)
        if not len(rows[name].dataset):
            key = "data.path" if name == "train" else "data.validation"
            raise UsageError(_explain_nothing(rows[name].counts, key, max_length=max_length, num_drawn=num_drawn))
    return rows


def token_rows(examples: Dataset, *, max_length: int, packing: bool, goes_on: bool) -> Rows:
    """Return rows of token ids and labels.

    Args:
        examples: columns input_ids and labels.
        max_length: tokens of a row.
        packing: put several examples into one row.
        goes_on: with packing, an example that is longer than a row goes on in further ones instead of being cut.
    """
    found = _survey(examples, max_length=max_length)
    # A text of one token has no next token to predict, but it is there. Without labels there is nothing to see.
    is_kept = found.labelled if goes_on else found.labelled_after_cut
    rows = examples.select_columns(["input_ids", "labels"])
    if not is_kept.all():
        rows = rows.select(np.flatnonzero(is_kept))
    if not goes_on and len(rows) and found.lengths.max() > max_length:
        rows = rows.with_format("arrow").map(_cut, batched=True, fn_kwargs={"max_length": max_length}).with_format(None)
    if packing and len(rows):
        rows = pack_dataset(rows, max_length, "bfd_split" if goes_on else "bfd")
    return Rows(
        dataset=rows,
        counts=_count(found, is_kept, num_rows=len(rows), max_length=max_length, goes_on=goes_on),
        lengths=found.lengths.tolist(),
        trained=found.trained.tolist(),
    )


def _count(found: _Survey, is_kept: NDArray[np.bool_], *, num_rows: int, max_length: int, goes_on: bool) -> TokenCounts:
    num_long = int(((found.lengths > max_length) & is_kept).sum())
    left = found.lengths if goes_on else np.minimum(found.lengths, max_length)
    # Nothing predicts the first token of a further piece.
    num_further = np.maximum(0, -(-found.lengths // max_length) - 1)
    trained = found.trained - num_further if goes_on else found.trained_after_cut
    return TokenCounts.of(
        examples=len(is_kept),
        rows=num_rows,
        examples_cut=0 if goes_on else num_long,
        examples_continued=num_long if goes_on else 0,
        examples_dropped=int((~is_kept).sum()),
        examples_untrained=int((is_kept & (found.trained == 0)).sum()),
        tokens=int(found.lengths.sum()),
        in_rows=int(left[is_kept].sum()),
        to_train=int(found.trained.sum()),
        trained=int(trained[is_kept].sum()),
    )


@dataclass(frozen=True, kw_only=True)
class _Survey:
    """Numbers of each example.

    Args:
        lengths: tokens.
        trained: tokens that count in the loss; never the first, which nothing predicts.
        trained_after_cut: the same within the first `max_length` tokens.
        labelled: True if any token has a label.
        labelled_after_cut: the same within the first `max_length` tokens.
    """

    lengths: Numbers
    trained: Numbers
    trained_after_cut: Numbers
    labelled: NDArray[np.bool_]
    labelled_after_cut: NDArray[np.bool_]


def _survey(examples: Dataset, *, max_length: int) -> _Survey:
    parts = [_survey_table(table, max_length) for table in examples.with_format("arrow").iter(batch_size=10_000)]
    lengths, *rest = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    trained, trained_after_cut, labelled, labelled_after_cut = rest
    return _Survey(
        lengths=lengths,
        trained=trained,
        trained_after_cut=trained_after_cut,
        labelled=labelled > 0,
        labelled_after_cut=labelled_after_cut > 0,
    )


def _survey_table(table: Any, max_length: int) -> tuple[Numbers, ...]:
    labels = table["labels"].combine_chunks()
    lengths = labels.value_lengths().to_numpy(zero_copy_only=False).astype(np.int64)
    # total[i]: labels before token i of all examples, end to end
    total = np.concatenate([[0], np.cumsum(labels.flatten().to_numpy() != IGNORED)])
    starts = np.cumsum(lengths) - lengths
    ends, cuts = starts + lengths, starts + np.minimum(lengths, max_length)
    seconds = starts + np.minimum(lengths, 1)
    return (
        lengths,
        total[ends] - total[seconds],
        total[cuts] - total[seconds],
        total[ends] - total[starts],
        total[cuts] - total[starts],
    )


def _cut(table: Any, *, max_length: int) -> Any:
    cut: Any = pc.list_slice  # pyright: ignore[reportAttributeAccessIssue]
    return pa.table({name: cut(table[name], 0, max_length) for name in table.column_names})


def _explain_nothing(counts: TokenCounts, key: str, *, max_length: int, num_drawn: int) -> str:
    if num_drawn:
        return (
            f"data.max_length={max_length} leaves nothing of {key}: every prompt is longer than the "
            f"{max(0, max_length - num_drawn)} tokens beside trainer.max_completion_length={num_drawn}; raise "
            "data.max_length, or lower trainer.max_completion_length"
        )
    if not counts.tokens_to_train:
        return f"{key}: no example has a token to train on"
    return f"data.max_length={max_length} leaves nothing of {key}: every prompt alone is longer; raise it"


def _classification_rows(
    examples: Dataset, tokenizer: PreTrainedTokenizerBase, *, max_length: int, stages: Stages
) -> Rows:
    rows, lengths = [], []
    with stages.open("tokenizing texts") as stage:
        for example in stage.count(examples.to_list()):
            encoded = encode_texts(tokenizer, example["text"], example["text_pair"], max_length=max_length)
            length = len(encoded["input_ids"])
            if length >= max_length:
                whole = encode_texts(tokenizer, example["text"], example["text_pair"], max_length=None)
                length = len(whole["input_ids"])
            rows.append({**encoded, "labels": example["labels"]})
            lengths.append(length)
    return Rows(
        dataset=Dataset.from_list(rows),
        counts=TokenCounts.of(
            examples=len(rows),
            rows=len(rows),
            examples_cut=sum(length > max_length for length in lengths),
            tokens=sum(lengths),
            in_rows=sum(len(row["input_ids"]) for row in rows),
            to_train=None,
            trained=None,
        ),
        lengths=lengths,
        trained=None,
    )
