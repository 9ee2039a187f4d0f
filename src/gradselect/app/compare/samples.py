"""The section `samples` of a suite: prompts that the base model and every method answer, to be read by people."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from gradselect import UsageError
from gradselect.app.data import place_of, read_rows
from gradselect.app.recipe import Place, Recipe, Settings

MOST_PROMPTS = 50
"""More are no few, and nobody reads their answers."""


class Samples(Settings):
    """Prompts to answer.

    Attributes:
        prompts: file with one prompt a line (`.txt`), or with a column `prompt` (`.jsonl`, `.json`, `.csv` ...).
        chat: give each prompt as a user's message in the model's chat template; without it as it stands.
        max_new_tokens: limit on the tokens of an answer.
    """

    prompts: Place
    chat: bool = False
    max_new_tokens: Annotated[int, Field(ge=1, le=10_000)] = 60


def read_prompts(samples: Samples) -> tuple[str, ...]:
    """Return the prompts.

    Raises:
        UsageError: no such file, a row without a prompt, or more prompts than anybody reads.
    """
    rows = read_rows(samples.prompts)
    if len(rows) > MOST_PROMPTS:
        raise UsageError(
            f"samples.prompts={samples.prompts!r} holds {len(rows):,} prompts, and samples are for reading; "
            f"write {MOST_PROMPTS} or fewer into a file of their own"
        )
    column = "text" if rows and set(rows[0]) == {"text"} else "prompt"
    prompts = [row.get(column) for row in rows]
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, str) or not prompt.strip():
            where = place_of(rows, index, path=samples.prompts)
            raise UsageError(
                f'{where}: no prompt; write {{"prompt": "..."}} on each line, or one prompt a line in .txt'
            )
    return tuple(str(prompt) for prompt in prompts)


def check_samples(samples: Samples, recipe: Recipe) -> None:
    """Check that the base model can be asked, before anything trains.

    Raises:
        UsageError: the prompts cannot be read, the model has no chat template, or no room for an answer.
    """
    from gradselect.app.evaluate import resolve_max_new_tokens
    from gradselect.app.models import context_of, load_configuration, load_text_tokenizer

    read_prompts(samples)
    model = recipe.model
    origin = {"revision": model.revision, "trust_remote_code": model.trust_remote_code}
    tokenizer = load_text_tokenizer(model.path, key="recipe.model.path", **origin)
    if samples.chat and tokenizer.chat_template is None:
        raise UsageError(
            f"samples.chat=true: the tokenizer of recipe.model.path={model.path!r} has no chat template; write "
            "samples.chat=false, which gives the prompts as they stand"
        )
    config = load_configuration(model.path, key="recipe.model.path", **origin)
    resolve_max_new_tokens(samples.max_new_tokens, default=0, context=context_of(config, tokenizer))
