"""Evaluation: read the data, run the model, judge the answers, compute the figures."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

from gradselect.app.answers import FIND_ANSWER, Judge
from gradselect.app.data import Conversation
from gradselect.app.recipe import DEFAULT_PROMPT, EvaluationSettings
from gradselect.app.runtime import fast_bfloat16
from gradselect.app.stats import check_text_scores, mean_loss, mean_loss_interval, wilson_interval
from gradselect.usage import UsageError

from .classification import labelled_texts, measure_classification, with_recipe
from .generation import Answer, answer_all, greedy_config, resolve_max_new_tokens
from .language_model import LanguageModel, load, wrap
from .problems import Passage, Problem, Source, passages, problems, read_source
from .results import EvaluationResult, Item, ItemWriter, check_new_folder, plain_settings, versions
from .text_loss import SegmentLoss, score_all
from .tokens import Prompt, Segment, conversation_segments, encode_prompt, segments
from .written_texts import measure_generation, referenced, with_templates

Progress = Callable[[int, int], None]
"""Called with the number of finished items and of all items."""

MAX_NEW_TOKENS = {"gsm8k": 512, "math": 1024}

_log = logging.getLogger(__name__)


def evaluate(settings: EvaluationSettings, *, on_progress: Progress | None = None) -> EvaluationResult:
    """Evaluate the model that the settings name.

    Args:
        settings: model, task and data.
        on_progress: called before the first batch and after each.

    Returns:
        The figures. With `settings.output`, `result.json` holds them, and `items.jsonl` gets each item at once.

    Raises:
        UsageError: the model, the data or the settings cannot be used; says which, and what to write instead.

    Example:
        >>> settings = EvaluationSettings(model="out/model", task="gsm8k", data="test.jsonl")
        >>> evaluate(settings).summary()  # doctest: +SKIP
        'gsm8k: accuracy 41.2 % (95 % interval 38.6 to 43.9), 543 of 1319'
    """
    return _evaluate(lambda: load(settings), settings, on_progress)


def evaluate_model(
    model: Any, tokenizer: Any, settings: EvaluationSettings, *, on_progress: Progress | None = None
) -> EvaluationResult:
    """Evaluate a transformers model in memory, as `evaluate` does. `settings.model` is only its name in the result.

    The model runs in evaluation mode and returns to its mode. Dtype and device do not change.
    """
    was_training = model.training
    model.eval()
    try:
        return _evaluate(lambda: wrap(model, tokenizer, task=settings.task), settings, on_progress)
    finally:
        model.train(was_training)


def _evaluate(
    get_model: Callable[[], LanguageModel], settings: EvaluationSettings, on_progress: Progress | None
) -> EvaluationResult:
    with ExitStack() as stack:

        def get_fast_model() -> LanguageModel:
            found = get_model()
            if (note := stack.enter_context(fast_bfloat16(found.model, found.device.type))) is not None:
                _log.warning(note)
            return found

        return _measure(get_fast_model, settings, on_progress)


def _measure(
    get_model: Callable[[], LanguageModel], settings: EvaluationSettings, on_progress: Progress | None
) -> EvaluationResult:
    # All checks of settings and data come first: loading a large model takes long.
    if settings.harness:
        raise UsageError(f"harness={settings.harness} names tasks of lm-eval; call run_harness(settings)")
    if settings.output is not None:
        check_new_folder(settings.output)
    if settings.task == "classification":
        settings = with_recipe(settings)
    if settings.task == "generation":
        check_text_scores()
    source = read_source(settings)
    progress = on_progress or (lambda done, total: None)
    if settings.task == "loss":
        texts = passages(source, settings)
        result = _measure_loss(texts, get_model(), source, settings, progress)
    elif settings.task == "classification":
        rows = labelled_texts(source, settings)
        result = measure_classification(rows, get_model(), source, settings, progress)
    elif settings.task == "generation":
        settings = with_templates(settings, source)
        texts = referenced(source, settings)
        result = measure_generation(texts, get_model(), source, settings, progress)
    else:
        asked = problems(source, settings)
        with Judge() as judge:
            result = _measure_accuracy(asked, judge, get_model(), source, settings, progress)
    _warn(result)
    return result


def _measure_accuracy(
    asked: Sequence[Problem],
    judge: Judge,
    language_model: LanguageModel,
    source: Source,
    settings: EvaluationSettings,
    progress: Progress,
) -> EvaluationResult:
    assert settings.task is not None
    started, context = time.perf_counter(), language_model.context
    limit = resolve_max_new_tokens(settings.max_new_tokens, default=MAX_NEW_TOKENS[settings.task], context=context)
    prompts = _prompts(asked, language_model, settings, room=None if context is None else context - limit)
    config = greedy_config(language_model, max_new_tokens=limit, stop=settings.stop)
    answers = answer_all(prompts, language_model=language_model, config=config, batch_size=settings.batch_size)
    judged = _judged_batches(answers, asked, prompts, judge=judge, extract=FIND_ANSWER[settings.task])
    with ItemWriter(settings.output) as writer:
        items = _collect(judged, writer, progress, total=len(asked))
        num_correct = sum(item["correct"] for item in items)
        return writer.write_result(
            EvaluationResult(
                task=settings.task,
                num_items=len(items),
                accuracy=num_correct / len(items),
                interval=wilson_interval(num_correct=num_correct, num_items=len(items)),
                num_correct=num_correct,
                num_unanswered=sum(item["extracted"] is None for item in items),
                num_unfinished=sum(not item["finished"] for item in items),
                num_undecided=sum(not item["decided"] for item in items),
                num_truncated=sum(item["truncated"] for item in items),
                seconds=time.perf_counter() - started,
                data=source.describe(),
                settings=plain_settings(settings, prompt=settings.prompt or DEFAULT_PROMPT, max_new_tokens=limit),
                generation=config.to_diff_dict(),
                versions=versions("torch", "transformers", "math-verify"),
                items=items,
            )
        )


def _prompts(
    asked: Sequence[Problem], language_model: LanguageModel, settings: EvaluationSettings, *, room: int | None
) -> list[Prompt]:
    return [
        encode_prompt(problem.prompt, language_model=language_model, as_chat=settings.as_chat, room=room)
        for problem in asked
    ]


def _measure_loss(
    texts: Sequence[Passage],
    language_model: LanguageModel,
    source: Source,
    settings: EvaluationSettings,
    progress: Progress,
) -> EvaluationResult:
    started = time.perf_counter()
    scored = _segments(texts, language_model, source)
    with ItemWriter(settings.output) as writer:
        items = _collect(_scored_batches(scored, language_model, settings), writer, progress, total=len(scored))
        losses = [item["loss"] * item["num_tokens"] for item in items]
        num_tokens = [item["num_tokens"] for item in items]
        return writer.write_result(
            EvaluationResult(
                task="loss",
                num_items=len(items),
                loss=mean_loss(losses, num_tokens),
                interval=mean_loss_interval(losses, num_tokens),
                num_tokens=sum(num_tokens),
                num_truncated=sum(item["truncated"] for item in items),
                seconds=time.perf_counter() - started,
                data=source.describe(),
                settings=plain_settings(settings),
                versions=versions("torch", "transformers"),
                items=items,
            )
        )


def _collect(batches: Iterator[list[Item]], writer: ItemWriter, progress: Progress, *, total: int) -> list[Item]:
    """Write each item as soon as it is computed; return all."""
    progress(0, total)
    for batch in batches:
        for item in batch:
            writer.write(item)
        progress(writer.num_items, total)
    return writer.finish()


def _judged_batches(
    batches: Iterator[list[Answer]],
    asked: Sequence[Problem],
    prompts: Sequence[Prompt],
    *,
    judge: Judge,
    extract: Callable[[str], str | None],
) -> Iterator[list[Item]]:
    for answers in batches:
        yield [_judged(asked[a.index], prompts[a.index], a, judge=judge, extract=extract) for a in answers]


def _scored_batches(
    scored: Sequence[Segment], language_model: LanguageModel, settings: EvaluationSettings
) -> Iterator[list[Item]]:
    for losses in score_all(scored, language_model=language_model, batch_size=settings.batch_size):
        yield [_scored(scored[loss.index], loss) for loss in losses]


def _segments(texts: Sequence[Passage], language_model: LanguageModel, source: Source) -> list[Segment]:
    """Return every segment with tokens to score."""
    if isinstance(texts[0].prompt, Conversation):
        cut = [_conversation_segments(texts, language_model, source)]
    else:
        cut = (segments(row, passage, language_model=language_model) for row, passage in enumerate(texts))
    scored = [segment for row in cut for segment in row if segment.num_tokens > 0]
    if not scored:
        raise UsageError(f"{source.name}: nothing to score; a text needs two tokens, a target one")
    return scored


def _conversation_segments(texts: Sequence[Passage], language_model: LanguageModel, source: Source) -> list[Segment]:
    from gradselect.app.inputs import Notices, RowError

    talks, notices = [each.prompt for each in texts if isinstance(each.prompt, Conversation)], Notices()
    try:
        found = list(conversation_segments(talks, language_model=language_model, notices=notices))
    except RowError as error:
        raise error.at(source.name_row) from None
    except UsageError as error:
        raise UsageError(f"{source.name}: {error}") from None
    for line in notices.lines(len(talks), what="conversations", name_row=source.name_row):
        _log.warning("%s", line)
    return found


def _judged(
    problem: Problem, prompt: Prompt, answer: Answer, *, judge: Judge, extract: Callable[[str], str | None]
) -> Item:
    extracted = extract(answer.text)
    verdict = False if extracted is None else judge.equal(problem.reference, extracted)
    return {
        "index": problem.index,
        "question": problem.question,
        "reference": problem.reference,
        "prediction": answer.text,
        "extracted": extracted,
        "correct": verdict is True,
        "decided": verdict is not None,
        "finished": answer.finished,
        "truncated": prompt.truncated,
    }


def _scored(segment: Segment, segment_loss: SegmentLoss) -> Item:
    return {
        "index": segment_loss.index,
        "row": segment.row,
        "loss": segment_loss.loss / segment.num_tokens,
        "num_tokens": segment.num_tokens,
        "truncated": segment.truncated,
    }


def _warn(result: EvaluationResult) -> None:
    """Warn of truncated, unfinished and undecided items, which the figure does not show."""
    if result.num_truncated:
        lost = "end" if result.task == "classification" else "beginning"
        _log.warning(
            "%d of %d items lost their %s: too long for the context", result.num_truncated, result.num_items, lost
        )
    if result.num_unfinished:
        _log.warning("%d of %d answers were cut off by max_new_tokens", result.num_unfinished, result.num_items)
    if result.num_undecided:
        _log.warning("%d of %d answers could not be compared in time", result.num_undecided, result.num_items)
