"""Rows of answers and of prompts, cut to `data.max_length`. Every token is accounted for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from datasets import Dataset

from gradselect.app.results import TokenCounts

from .tokens import IGNORED


def cut_answers(examples: Dataset, *, max_length: int) -> tuple[Dataset, TokenCounts, list[int], list[int]]:
    """Return answers with their prompts without what lies beyond `max_length`.

    A row whose answer is gone is dropped. So is a pair whose answers are equal after the cut.

    Returns:
        The rows, their counts, and for each answer its tokens and those of them that are trained, before the cut.
    """
    parts = [("input_ids", "labels"), ("rejected_ids", "rejected_labels")]
    parts = [part for part in parts if part[0] in examples.column_names]
    sums = dict.fromkeys(("tokens", "in_rows", "to_train", "trained"), 0)
    lengths, trained, kept, num_cut = [], [], [], 0
    for row in examples.to_list():
        answers = [(row[ids], row[labels]) for ids, labels in parts]
        here = [(ids[:max_length], labels[:max_length]) for ids, labels in answers]
        lengths += [len(ids) for ids, _ in answers]
        trained += [_num_trained(labels) for _, labels in answers]
        sums["tokens"] += sum(len(ids) for ids, _ in answers)
        sums["to_train"] += sum(_num_trained(labels) for _, labels in answers)
        if not all(_num_trained(labels) for _, labels in here) or (len(here) == 2 and here[0][0] == here[1][0]):
            continue
        num_cut += any(len(ids) > max_length for ids, _ in answers)
        sums["in_rows"] += sum(len(ids) for ids, _ in here)
        sums["trained"] += sum(_num_trained(labels) for _, labels in here)
        cut = dict(zip([name for part in parts for name in part], [one for pair in here for one in pair], strict=True))
        kept.append({**row, **cut})
    counts = TokenCounts.of(
        examples=len(examples),
        rows=len(kept),
        examples_cut=num_cut,
        examples_dropped=len(examples) - len(kept),
        **sums,
    )
    return _dataset(kept, examples), counts, lengths, trained


def drop_long_prompts(examples: Dataset, *, max_length: int) -> tuple[Dataset, TokenCounts, list[int]]:
    """Return the prompts of at most `max_length` tokens. None is cut: an answer to half a question is worth nothing."""
    lengths = [len(ids) for ids in examples["input_ids"]]
    kept = [place for place, length in enumerate(lengths) if length <= max_length]
    counts = TokenCounts.of(
        examples=len(lengths),
        rows=len(kept),
        examples_dropped=len(lengths) - len(kept),
        tokens=sum(lengths),
        in_rows=sum(lengths[place] for place in kept),
        to_train=None,
        trained=None,
    )
    return examples if len(kept) == len(lengths) else examples.select(kept), counts, lengths


def _num_trained(labels: Sequence[int]) -> int:
    return sum(label != IGNORED for label in labels[1:])


def _dataset(rows: Sequence[dict[str, Any]], like: Dataset) -> Dataset:
    return Dataset.from_dict({name: [row[name] for row in rows] for name in like.column_names}, features=like.features)
