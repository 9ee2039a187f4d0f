"""Greedy answers of the base model and of a trained model to the prompts of a suite."""

from __future__ import annotations

from pathlib import Path

from gradselect import UsageError
from gradselect.app.evaluate import (
    EvaluationSettings,
    answer_all,
    encode_prompt,
    greedy_config,
    load_language_model,
    resolve_max_new_tokens,
)
from gradselect.app.results import SampledAnswer, SampleFile, read_sample_file, write_samples
from gradselect.files import plain_or_packed

from .job import Job
from .protocol import local_folder
from .samples import Samples, read_prompts

BATCH_SIZE = 16


def sample_answers(job: Job) -> None:
    """Write the answers of the trained model and, if no run has yet, those of the base model.

    Raises:
        UsageError: the prompts cannot be read, or a model cannot be asked.
    """
    base = job.samples_base
    if job.samples is None or job.samples_file is None or base is None:
        return
    prompts, recipe = read_prompts(job.samples), job.recipe
    asked = {"chat": job.samples.chat, "max_new_tokens": job.samples.max_new_tokens}
    if not _is_answered(base, job, prompts):
        folder = local_folder(recipe.model.path, revision=recipe.model.revision)
        answers = answer(job.samples, prompts, model=folder, dtype=recipe.model.dtype, device=recipe.run.device)
        write_samples(base, SampleFile(protocol=job.protocol, answers=answers, **asked))
    answers = answer(job.samples, prompts, model=job.training, dtype="auto", device=recipe.run.device)
    own = SampleFile(
        protocol=job.protocol,
        method=job.method,
        lr=recipe.optimizer.lr,
        seed=recipe.run.seed,
        answers=answers,
        **asked,
    )
    write_samples(job.samples_file, own)


def answer(
    samples: Samples, prompts: tuple[str, ...], *, model: str | Path, dtype: str, device: str
) -> list[SampledAnswer]:
    """Return the model's greedy answers, in the order of the prompts.

    Raises:
        UsageError: the model cannot be loaded, or has no chat template.
    """
    # The task only says that it is a language model.
    settings = EvaluationSettings(model=model, task="loss", data="-", dtype=dtype, device=device)
    language_model = load_language_model(settings)
    limit = resolve_max_new_tokens(samples.max_new_tokens, default=0, context=language_model.context)
    room = None if language_model.context is None else language_model.context - limit
    encoded = [
        encode_prompt(prompt, language_model=language_model, as_chat=samples.chat, room=room) for prompt in prompts
    ]
    config = greedy_config(language_model, max_new_tokens=limit, stop=())
    batches = answer_all(encoded, language_model=language_model, config=config, batch_size=BATCH_SIZE)
    answers = sorted((each for batch in batches for each in batch), key=lambda each: each.index)
    return [
        SampledAnswer(prompt=prompt, answer=each.text, finished=each.finished, truncated=ids.truncated)
        for prompt, each, ids in zip(prompts, answers, encoded, strict=True)
    ]


def _is_answered(base: Path, job: Job, prompts: tuple[str, ...]) -> bool:
    """True if the file of the base model has its answers to what this job asks."""
    assert job.samples is not None
    found = plain_or_packed(base)
    if found is None:
        return False
    try:
        known = read_sample_file(found)
    except UsageError:
        return False
    return (known.protocol, known.asked) == (job.protocol, (job.samples.chat, job.samples.max_new_tokens, prompts))
