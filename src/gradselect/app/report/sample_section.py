"""Section with the answers of the base model and of each method to a few prompts, one below the other."""

from __future__ import annotations

from collections.abc import Iterator

from gradselect.app.results import SampledAnswer, SampleFile

from . import number_format as words
from .comparison import Comparison
from .page import Part
from .table import Cell, Column, Namer, Table

MOST_CHARACTERS = 600
"""Characters of a prompt or an answer that the page shows."""


def sample_parts(comparison: Comparison, name: Namer) -> Iterator[Part]:
    """Yield a table for each prompt: the prompt, the answer of the base model, and that of each method."""
    base = comparison.results.samples.base
    known = answers_of(comparison)
    if base is None or not known:
        return
    fitting = {method: file for method, file in known.items() if file.asked == base.asked}
    yield Part(text=_text(base), lines=tuple(_left_out(comparison, known, fitting)))
    for place, asked in enumerate(base.answers):
        rows = [
            (Cell("Prompt", "its beginning was cut off" if asked.truncated else ""), Cell(cut(asked.prompt))),
            (Cell("base model"), _answer(asked, base)),
            *((name(method), _answer(file.answers[place], file)) for method, file in fitting.items()),
        ]
        columns = (Column("Model", is_text=True), Column("Answer", is_text=True))
        yield Part(title=f"Prompt {place + 1}", table=Table(columns=columns, rows=tuple(rows)))


def cut(text: str, *, most: int = MOST_CHARACTERS) -> str:
    """Return the text without surrounding blank lines; of a long one the beginning and its number of characters."""
    text = text.strip()
    if len(text) <= most:
        return text
    return f"{text[:most].rstrip()} [cut here: {len(text):,} characters in all]"


def answers_of(comparison: Comparison) -> dict[str, SampleFile]:
    """Return the answers of the runs that are in the tables, in the order of the methods."""
    files = {(file.method, file.lr): file for file in comparison.results.samples.methods if file.seed == 0}
    found = {method.name: files.get((method.name, method.lr)) for method in comparison.methods if 0 in method.seeds}
    return {name: file for name, file in found.items() if file is not None}


def _text(base: SampleFile) -> str:
    how = "each prompt a user's message in the chat template" if base.chat else "each prompt as it stands"
    return (
        f"Greedy answers of the base model and of seed 0 of each method at its best rate; {how}, at most "
        f"{words.plural(base.max_new_tokens, 'token')} an answer. Texts of more than {MOST_CHARACTERS} characters are "
        "cut. Nothing here is a score."
    )


def _left_out(comparison: Comparison, known: dict[str, SampleFile], fitting: dict[str, SampleFile]) -> Iterator[str]:
    missing = [method.name for method in comparison.methods if method.name not in known]
    if missing:
        yield f"No answers of {words.joined(missing)}."
    if other := [name for name in known if name not in fitting]:
        yield f"Answers to other prompts than those of the base model, so not shown: {words.joined(other)}."


def _answer(each: SampledAnswer, file: SampleFile) -> Cell:
    detail = "" if each.finished else f"stopped after {words.plural(file.max_new_tokens, 'token')}"
    return Cell(cut(each.answer) or "(empty)", detail)
