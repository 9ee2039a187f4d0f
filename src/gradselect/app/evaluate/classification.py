"""Evaluation of a classification head on texts with known labels or scores."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from gradselect.app.data import Row, columns_of, ending_of, read_label, render, require_columns
from gradselect.app.models import encode_texts
from gradselect.app.recipe import EvaluationSettings
from gradselect.app.stats import class_metrics, score_metrics, wilson_interval
from gradselect.usage import UsageError

from .language_model import LanguageModel
from .problems import Source, each_row, say_empty
from .results import EvaluationResult, Item, ItemWriter, plain_settings, versions
from .tokens import longest_first
from .trained_on import data_of_recipe


@dataclass(frozen=True, kw_only=True)
class LabelledText:
    """One row of the data.

    Args:
        index: number of the row, from 0.
        text: the filled template.
        pair: the second text, if any.
    """

    index: int
    text: str
    pair: str | None


def with_recipe(settings: EvaluationSettings) -> EvaluationSettings:
    """Fill missing settings from the recipe of the training, else with the usual column names."""
    known = {"text": "{sentence}", "label": "label"} | data_of_recipe(settings.model, format="classification")
    columns = settings.columns
    if columns is None and known.get("columns") and ending_of(str(settings.data)) in (".csv", ".tsv"):
        columns = tuple(known["columns"])
    return replace(
        settings,
        text=settings.text or known["text"],
        text_pair=settings.text_pair or known.get("text_pair"),
        label=settings.label or known["label"],
        columns=columns,
    )


def labelled_texts(source: Source, settings: EvaluationSettings) -> list[LabelledText]:
    """Return every row with its label.

    Raises:
        UsageError: a missing column or an empty value; names the row.
    """
    text, pair, label = settings.text, settings.text_pair, settings.label
    assert text is not None
    assert label is not None
    require_columns(source.rows, [*columns_of(text), *columns_of(pair or ""), label], path=source.name)

    def labelled(index: int, row: Row) -> LabelledText:
        second = None if pair is None else render(pair, row)
        return LabelledText(index=index, text=render(text, row), pair=second)

    found = list(each_row(source.rows, labelled, name=source.name))
    say_empty(source.rows, (text, *([pair] if pair else [])), what="text", name=source.name)
    return found


def measure_classification(
    texts: Sequence[LabelledText],
    language_model: LanguageModel,
    source: Source,
    settings: EvaluationSettings,
    progress: Any,
) -> EvaluationResult:
    """Predict labels or scores of all texts and compare them with the data.

    Raises:
        UsageError: a label that the model does not know, labels that do not fit its outputs, or outputs that are not
            finite.
    """
    started = time.perf_counter()
    labels = _labels(language_model.model.config, settings)
    references = _references(source, settings, labels)
    max_length = _max_length(settings, language_model)
    encoded = [encode_texts(language_model.tokenizer, each.text, each.pair, max_length=None) for each in texts]
    num_truncated = 0 if max_length is None else sum(len(row["input_ids"]) > max_length for row in encoded)
    with ItemWriter(settings.output) as writer:
        progress(0, len(texts))
        for batch in longest_first([len(row["input_ids"]) for row in encoded], batch_size=settings.batch_size):
            outputs = _outputs([texts[index] for index in batch], language_model, max_length=max_length)
            for index, logits in zip(batch, outputs.tolist(), strict=True):
                writer.write(_item(texts[index], logits, references[index], labels))
            progress(writer.num_items, len(texts))
        items = writer.finish()
        _check_finite(items, source)
        return writer.write_result(
            EvaluationResult(
                task="classification",
                num_items=len(items),
                **_figures(items, labels),
                num_truncated=num_truncated,
                seconds=time.perf_counter() - started,
                data=source.describe(),
                settings=plain_settings(settings, labels=labels, max_length=max_length),
                versions=versions("torch", "transformers"),
                items=items,
            )
        )


def _labels(config: Any, settings: EvaluationSettings) -> tuple[str, ...] | None:
    """Return the label of each output; None if the single output is a score."""
    if config.num_labels == 1:
        if settings.labels is not None:
            raise UsageError(f"labels={list(settings.labels)}: the model has one output, a score; leave labels out")
        return None
    labels = settings.labels or tuple(config.id2label[number] for number in range(config.num_labels))
    if len(labels) != config.num_labels:
        raise UsageError(f"labels={list(labels)} names {len(labels)}, but the model has {config.num_labels} outputs")
    if twice := [label for label in dict.fromkeys(labels) if labels.count(label) > 1]:
        raise UsageError(
            f"labels={list(labels)}: {twice[0]!r} stands for several outputs, so that right and wrong cannot be told "
            "apart; give each output a label of its own, e.g. --labels negative,positive"
        )
    return labels


def _references(source: Source, settings: EvaluationSettings, labels: Sequence[str] | None) -> list[int | float]:
    label = settings.label
    assert label is not None
    return list(each_row(source.rows, lambda _, row: read_label(row[label], labels=labels), name=source.name))


def _max_length(settings: EvaluationSettings, language_model: LanguageModel) -> int | None:
    """Return the `max_length` of the training, limited to the context."""
    limits = (data_of_recipe(settings.model, format="classification").get("max_length"), language_model.context)
    return min((limit for limit in limits if limit is not None), default=None)


@torch.inference_mode()
def _outputs(texts: Sequence[LabelledText], language_model: LanguageModel, *, max_length: int | None) -> torch.Tensor:
    """Return float32 logits, (texts, labels)."""
    tokenizer = language_model.tokenizer
    rows = [encode_texts(tokenizer, each.text, each.pair, max_length=max_length) for each in texts]
    batch = tokenizer.pad(rows, return_tensors="pt").to(language_model.device)
    return language_model.model(**batch).logits.float()


def _item(text: LabelledText, logits: Sequence[float], reference: int | float, labels: Sequence[str] | None) -> Item:
    pair = {} if text.pair is None else {"text_pair": text.pair}
    item = {"index": text.index, "text": text.text, **pair}
    if labels is None:
        return {**item, "reference": reference, "prediction": logits[0]}
    best = max(range(len(logits)), key=logits.__getitem__)
    probabilities = torch.tensor(logits).softmax(0).tolist()
    return {
        **item,
        "reference": labels[int(reference)],
        "prediction": labels[best],
        "correct": best == reference,
        "probabilities": dict(zip(labels, probabilities, strict=True)),
    }


def _check_finite(items: Sequence[Item], source: Source) -> None:
    """Refuse labels from outputs that are no numbers: of several NaN the first counts as the largest.

    Scores need no such check: their correlation is then undefined.

    Raises:
        UsageError: an output is NaN or infinite; says of how many texts.
    """
    lost = [item for item in items if not all(map(math.isfinite, item.get("probabilities", {}).values()))]
    if lost:
        raise UsageError(
            f"the outputs of the model for {len(lost):,} of {len(items):,} texts are NaN or infinite; the first: "
            f"{source.name_row(lost[0]['index'] + 1)}. Its training may have diverged; in float16 try --dtype float32"
        )


def _figures(items: Sequence[Item], labels: Sequence[str] | None) -> dict[str, Any]:
    references, predictions = [item["reference"] for item in items], [item["prediction"] for item in items]
    if labels is None:
        return {"metrics": score_metrics(references, predictions)}
    numbers = {label: number for number, label in enumerate(labels)}
    metrics = class_metrics(
        [numbers[name] for name in references], [numbers[name] for name in predictions], num_labels=len(labels)
    )
    num_correct = sum(item["correct"] for item in items)
    return {
        "accuracy": metrics.pop("accuracy"),
        "interval": wilson_interval(num_correct=num_correct, num_items=len(items)),
        "num_correct": num_correct,
        "metrics": metrics,
    }
