"""Data of a recipe, prepared as `gradselect train` prepares it."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset

from gradselect import UsageError
from gradselect.app.inputs import (
    DataInputs,
    Inputs,
    LengthSampler,
    check_prompts,
    make_rows,
    num_prompts_per_step,
    padding_share,
    read_data,
    row_notes,
)
from gradselect.app.progress import SILENT, Stages
from gradselect.app.recipe import (
    AbstractSamplingTrainer,
    AbstractTrainer,
    ClassificationData,
    KtoSettings,
    RandomData,
    Recipe,
    is_packed,
)
from gradselect.app.results import TokenCounts

from .spans import Piece, pieces_of


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Distribution of numbers, e.g. tokens of the examples."""

    smallest: float
    median: float
    percentile_95: float
    largest: float


@dataclass(frozen=True, kw_only=True)
class Padding:
    """Share of padding in the tokens of the batches.

    Args:
        random: of batches drawn at random.
        grouped: with `run.group_by_length`.
    """

    random: float
    grouped: float


@dataclass(frozen=True, kw_only=True)
class ShownRow:
    """A row as the model reads it.

    Args:
        number: its place, from 1.
        pieces: examples in it; one, unless it is packed.
        label: label of a classified text, or its score.
    """

    number: int
    pieces: tuple[Piece, ...]
    label: str | None = None


@dataclass(frozen=True, kw_only=True)
class DataPreview:
    """Data that a run would train on.

    Args:
        recipe: the recipe.
        sources: path, fingerprint and number of rows of "train" and "validation".
        max_length: tokens of a row.
        counts: tokens of the rows "train" and "validation".
        lengths: tokens of the training examples, before they are cut.
        trained_lengths: those of them that count in the loss. None for classification.
        padding: of a batch. None for packed rows, random tokens, and trainers that build their rows themselves.
        steps_per_epoch: on one process.
        labels: number of training examples with each label. Empty if there are none.
        scores: distribution of the scores of a regression.
        notes: what is cut, dropped, packed, empty or left out.
        rows: rows to show.
    """

    recipe: Recipe
    sources: dict[str, dict[str, str | int]]
    max_length: int
    counts: dict[str, TokenCounts]
    lengths: Lengths
    trained_lengths: Lengths | None
    padding: Padding | None
    steps_per_epoch: int
    labels: dict[str, int]
    scores: Lengths | None
    notes: tuple[str, ...]
    rows: tuple[ShownRow, ...]


def preview_data(
    recipe: Recipe, *, num_examples: int = 3, row: int | None = None, stages: Stages = SILENT
) -> DataPreview:
    """Read and prepare the data of a recipe. Needs tokenizer and configuration of the model, but no weights.

    Args:
        recipe: the recipe.
        num_examples: number of rows to show, spread over the data.
        row: show only this row, from 1.
        stages: shows what is being done.

    Raises:
        UsageError: data, tokenizer or configuration cannot be used, nothing is left to train on, prompts do not fill a
            step, or there is no such row.
    """
    data = read_data(recipe, stages=stages)
    rows = make_rows(
        data.examples,
        recipe.data,
        tokenizer=data.tokenizer,
        max_length=data.max_length,
        num_drawn=recipe.num_drawn_tokens,
        stages=stages,
    )
    counts = {name: part.counts for name, part in rows.items()}
    train = rows["train"].dataset
    if isinstance(recipe.trainer, AbstractSamplingTrainer):
        check_prompts(train, recipe, recipe.trainer)
    numbers = _spread(train, num_examples) if row is None else [_checked(row, len(train))]
    targets = train["labels"] if isinstance(recipe.data, ClassificationData) else []
    has_scores = isinstance(recipe.data, ClassificationData) and recipe.data.regression
    trained = rows["train"].trained
    return DataPreview(
        recipe=recipe,
        sources={name: source.describe() for name, source in data.examples.sources.items()},
        max_length=data.max_length,
        counts=counts,
        lengths=_distribution(rows["train"].lengths),
        trained_lengths=None if trained is None else _distribution(trained),
        padding=_padding(train, recipe),
        steps_per_epoch=_steps_per_epoch(train, recipe),
        labels={} if has_scores else _count_labels(targets, data.examples.labels),
        scores=_distribution(targets) if has_scores else None,
        notes=(*data.examples.notes, *row_notes(counts, recipe.data, max_length=data.max_length), *_checks(recipe)),
        rows=tuple(shown_row(train, number, recipe, data) for number in numbers),
    )


def _padding(train: Dataset, recipe: Recipe) -> Padding | None:
    run, data = recipe.run, recipe.data
    if is_packed(data) or isinstance(data, RandomData) or isinstance(recipe.trainer, AbstractTrainer):
        return None
    lengths = [len(tokens) for tokens in train["input_ids"]]
    grouped = LengthSampler(lengths, batch_size=run.batch_size, seed=run.seed)
    return Padding(
        random=padding_share(random.Random(run.seed).sample(lengths, len(lengths)), batch_size=run.batch_size),
        grouped=padding_share([lengths[row] for row in grouped], batch_size=run.batch_size),
    )


def _steps_per_epoch(train: Dataset, recipe: Recipe) -> int:
    """Return the steps of an epoch on one process. A trainer may make several examples of a row."""
    run = recipe.run
    size = run.batch_size * run.accumulation
    if isinstance(recipe.trainer, AbstractSamplingTrainer):
        per_step = num_prompts_per_step(recipe.trainer, batch_size=run.batch_size, accumulation=run.accumulation)
        return len(train) // per_step
    is_split = isinstance(recipe.trainer, KtoSettings) and "rejected_ids" in train.column_names
    return -(-len(train) * (2 if is_split else 1) // size)


def _checks(recipe: Recipe) -> list[str]:
    """Name the checks that need the model's weights."""
    if isinstance(recipe.trainer, AbstractSamplingTrainer):
        return [
            f"the answers are drawn during training, up to {recipe.num_drawn_tokens:,} tokens behind each prompt; they "
            "are not shown here"
        ]
    if not is_packed(recipe.data):
        return []
    return ["gradselect train also checks that the model does not let packed examples see one another"]


def _distribution(numbers: Sequence[float]) -> Lengths:
    # A value that occurs, not one between two.
    found = np.percentile(np.asarray(numbers), [0, 50, 95, 100], method="inverted_cdf")
    smallest, median, percentile_95, largest = found.tolist()
    return Lengths(smallest=smallest, median=median, percentile_95=percentile_95, largest=largest)


def _count_labels(targets: Sequence[int], names: Sequence[str] | None) -> dict[str, int]:
    counts = Counter(targets)
    return {name: counts[number] for number, name in enumerate(names or ())}


def _spread(rows: Dataset, count: int) -> list[int]:
    """Return up to `count` numbers of rows, evenly spaced; packed rows from the fewest pieces to the most."""
    order = list(range(len(rows)))
    if "seq_lengths" in rows.column_names:
        pieces = [len(lengths) for lengths in rows["seq_lengths"]]
        order.sort(key=pieces.__getitem__)
    last, steps = len(order) - 1, max(1, count - 1)
    places = {round(place * last / steps) for place in range(count)}
    return [order[place] + 1 for place in sorted(places)]


def _checked(row: int, num_rows: int) -> int:
    if not 1 <= row <= num_rows:
        raise UsageError(f"--row={row}: the rows are numbered from 1 to {num_rows}")
    return row


def shown_row(train: Dataset, number: int, recipe: Recipe, data: DataInputs | Inputs) -> ShownRow:
    """Return row `number`, counted from 1, of the rows that the trainer reads."""
    row: Any = train[number - 1]
    tokenizer = None if isinstance(recipe.data, RandomData) else data.tokenizer
    label = None
    if isinstance(recipe.data, ClassificationData):
        names = data.examples.labels
        label = str(row["labels"]) if names is None else names[row["labels"]]
    if "good" in row:
        label = "good" if row["good"] else "bad"
    return ShownRow(number=number, pieces=pieces_of(row, tokenizer), label=label)
