"""Evaluation of texts that a model writes against references: data to text, summaries, translations."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from gradselect.app.data import Row, columns_of, is_empty, render, require_columns, says_nothing
from gradselect.app.recipe import DEFAULT_PROMPT, EvaluationSettings
from gradselect.app.stats import MEAN_CHRF, chrf, corpus_scores, mean_loss, mean_loss_interval
from gradselect.usage import UsageError

from .generation import Answer, answer_all, greedy_config, resolve_max_new_tokens
from .language_model import LanguageModel
from .problems import Source, check_cells, each_row, require, say_unread_input, with_question
from .results import EvaluationResult, Item, ItemWriter, plain_settings, versions
from .tokens import Prompt, encode_prompt
from .trained_on import say_other_prompt

REFERENCE_COLUMNS = ("references", "reference", "target", "completion", "output", "response", "answer")
"""Column names to try, in this order, when no template names one."""

MAX_NEW_TOKENS = 256


@dataclass(frozen=True, kw_only=True)
class Referenced:
    """A prompt with the texts that a good answer resembles.

    Args:
        index: row of the data, from 0.
        prompt: the filled template.
        references: one or several, without blanks around them.
    """

    index: int
    prompt: str
    references: tuple[str, ...]


def with_templates(settings: EvaluationSettings, source: Source) -> EvaluationSettings:
    """Fill missing templates by the usual column names.

    Raises:
        UsageError: there is no usual column with references.
    """
    prompt = settings.prompt or ("{prompt}" if "prompt" in source.rows[0] else DEFAULT_PROMPT)
    say_unread_input(source, prompt)
    say_other_prompt(settings, prompt, with_question(source.rows[0]))
    return replace(settings, prompt=prompt, completion=settings.completion or _reference_template(source))


def referenced(source: Source, settings: EvaluationSettings) -> list[Referenced]:
    """Return every row as a prompt with its references.

    Raises:
        UsageError: a missing column, an empty prompt or reference; names the row.
    """
    prompt, completion = settings.prompt, settings.completion
    assert prompt is not None
    assert completion is not None
    rows = source.rows.map(with_question)
    require(rows, prompt, completion, name=source.name)

    def read(index: int, row: Row) -> Referenced:
        check_cells(row, prompt + completion)
        text = render(prompt, row)
        if says_nothing(prompt, row) or not text.strip():
            raise UsageError("the prompt is empty")
        return Referenced(index=index, prompt=text, references=_references(row, completion))

    return list(each_row(rows, read, name=source.name))


def measure_generation(
    asked: Sequence[Referenced],
    language_model: LanguageModel,
    source: Source,
    settings: EvaluationSettings,
    progress: Callable[[int, int], None],
) -> EvaluationResult:
    """Let the model write a text for each prompt, and score it against its references."""
    started, context = time.perf_counter(), language_model.context
    limit = resolve_max_new_tokens(settings.max_new_tokens, default=MAX_NEW_TOKENS, context=context)
    room = None if context is None else context - limit
    prompts = [
        encode_prompt(each.prompt, language_model=language_model, as_chat=settings.as_chat, room=room) for each in asked
    ]
    config = greedy_config(language_model, max_new_tokens=limit, stop=settings.stop)
    answers = answer_all(prompts, language_model=language_model, config=config, batch_size=settings.batch_size)
    with ItemWriter(settings.output) as writer:
        progress(0, len(asked))
        for item in _items(answers, asked, prompts):
            writer.write(item)
            progress(writer.num_items, len(asked))
        items = writer.finish()
        scores, ones = [item["score"] for item in items], [1] * len(items)
        together = corpus_scores([item["prediction"].strip() for item in items], [item["references"] for item in items])
        return writer.write_result(
            EvaluationResult(
                task="generation",
                num_items=len(items),
                metrics={MEAN_CHRF: mean_loss(scores, ones), **together},
                interval=mean_loss_interval(scores, ones),
                num_unfinished=sum(not item["finished"] for item in items),
                num_truncated=sum(item["truncated"] for item in items),
                seconds=time.perf_counter() - started,
                data=source.describe(),
                settings=plain_settings(settings, max_new_tokens=limit),
                generation=config.to_diff_dict(),
                versions=versions("torch", "transformers", "sacrebleu"),
                items=items,
            )
        )


def _items(batches: Iterator[list[Answer]], asked: Sequence[Referenced], prompts: Sequence[Prompt]) -> Iterator[Item]:
    for answer in (answer for batch in batches for answer in batch):
        row = asked[answer.index]
        yield {
            "index": row.index,
            "question": row.prompt,
            "references": list(row.references),
            "prediction": answer.text,
            "score": chrf(answer.text.strip(), row.references),
            "finished": answer.finished,
            "truncated": prompts[answer.index].truncated,
        }


def _references(row: Row, template: str) -> tuple[str, ...]:
    (column, *others) = columns_of(template)
    cell = row[column]
    is_list = not others and template.strip() == f"{{{column}}}" and isinstance(cell, list | tuple)
    texts = list(cell) if is_list else [render(template, row)]
    if not texts or any(not isinstance(text, str) or is_empty(text) for text in texts):
        raise UsageError(f"column {column!r}: a reference is missing or no text; write a text, or a list of texts")
    return tuple(text.strip() for text in texts)


def _reference_template(source: Source) -> str:
    column = next((column for column in REFERENCE_COLUMNS if column in source.rows[0]), None)
    if column is None:
        require_columns(source.rows[:1], ["references"], path=source.name)
    return f"{{{column}}}"
