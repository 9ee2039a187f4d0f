"""Notes on rows: what `data.max_length` cut, dropped or packed, with numbers and what to type."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from gradselect.app.recipe import (
    ChatData,
    ClassificationData,
    Data,
    PreferenceData,
    PromptData,
    RandomData,
    TextData,
    is_packed,
)
from gradselect.app.results import TokenCounts


def row_notes(counts: Mapping[str, TokenCounts], settings: Data, *, max_length: int) -> list[str]:
    """Say how many examples were packed, continued, cut or dropped, and which share of the tokens that leaves out.

    Args:
        counts: of the rows "train" and "validation".
        settings: section `data` of the recipe.
        max_length: tokens of a row.

    Example:
        >>> counts = TokenCounts(examples=9, rows=9, examples_cut=2, tokens=900, tokens_in_rows=600)
        >>> settings = TextData(format="text", path="books.txt", packing=False)
        >>> row_notes({"train": counts}, settings, max_length=100)[0][:70]
        '2 of 9 documents are longer than data.max_length=100 and lose their en'
    """
    if isinstance(settings, RandomData):
        return []
    return [
        f"{'' if name == 'train' else f'{name}: '}{note}"
        for name, part in counts.items()
        for note in _notes(part, settings, is_train=name == "train", max_length=max_length)
    ]


def as_percent(share: float) -> str:
    """Format a share: "41 %", "0.31 %"."""
    percent = 100 * share
    if 0 < percent < 0.01:
        return "under 0.01 %"
    return f"{percent:.0f} %" if percent >= 9.95 or percent == 0 else f"{percent:.2g} %"


def _notes(counts: TokenCounts, settings: Data, *, is_train: bool, max_length: int) -> Iterator[str]:
    kind, limit = _kind(settings), f"data.max_length={max_length}"
    if is_packed(settings) and is_train:
        yield f"{counts.examples:,} examples were packed into {counts.rows:,} rows"
    if counts.examples_continued:
        yield (
            f"{counts.examples_continued:,} of {counts.examples:,} {kind} are longer than {limit} and go on in further "
            "rows: no token is left out"
        )
    if counts.examples_cut:
        yield (
            f"{counts.examples_cut:,} of {counts.examples:,} {kind} are longer than {limit} and lose their end: "
            f"{_left_out(counts)}; {_advice(settings, is_train=is_train)}"
        )
    if counts.examples_dropped and isinstance(settings, PreferenceData | PromptData):
        yield f"{counts.examples_dropped:,} of {counts.examples:,} {kind} were dropped: {_why_dropped(settings, limit)}"
    elif counts.examples_dropped:
        yield (
            f"{counts.examples_dropped:,} of {counts.examples:,} {kind} were dropped: no token to train on is left of "
            f"them, e.g. because their prompts alone reach {limit}"
        )
    if counts.examples_untrained:
        of_all = f"{counts.examples_untrained:,} of {counts.examples:,} {kind}"
        yield f"{of_all} have nothing to train on: they have a single token"


def _kind(settings: Data) -> str:
    match settings:
        case TextData():
            return "documents"
        case ChatData():
            return "conversations"
        case ClassificationData():
            return "texts"
        case PreferenceData():
            return "rows"
        case PromptData():
            return "prompts"
        case _:
            return "examples"


def _why_dropped(settings: Data, limit: str) -> str:
    if isinstance(settings, PromptData):
        return f"with trainer.max_completion_length tokens behind them they are longer than {limit}"
    return f"within {limit} an answer has no token, or two answers do not differ; raise data.max_length"


def _left_out(counts: TokenCounts) -> str:
    lost = counts.tokens - counts.tokens_in_rows
    words = f"{as_percent(counts.share_left_out)} of the tokens ({lost:,} of {counts.tokens:,})"
    share = counts.trained_share_left_out
    if share is None or abs(share - counts.share_left_out) < 0.01:
        return f"{words} are left out"
    return f"{words}, and {as_percent(share)} of those to train on, are left out"


def _advice(settings: Data, *, is_train: bool) -> str:
    if isinstance(settings, TextData) and is_train and not settings.packing:
        return "write data.packing=true, so that they go on in further rows, or raise data.max_length"
    return "raise data.max_length"
