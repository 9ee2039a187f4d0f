"""Text of a row, split where training begins and ends."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from gradselect.app.inputs import IGNORED


@dataclass(frozen=True, kw_only=True)
class Span:
    """Neighbouring tokens that all count in the loss, or none of which does.

    Args:
        text: their text, with special tokens.
        is_trained: True if they count.
        num_tokens: their number.
    """

    text: str
    is_trained: bool
    num_tokens: int


@dataclass(frozen=True, kw_only=True)
class Piece:
    """An example in a row, or the part of a long one that the row has room for.

    Args:
        spans: its text.
        name: "chosen" or "rejected" where a row compares two answers.
    """

    spans: tuple[Span, ...]
    name: str | None = None

    @property
    def num_tokens(self) -> int:
        return sum(span.num_tokens for span in self.spans)

    @property
    def num_trained(self) -> int:
        return sum(span.num_tokens for span in self.spans if span.is_trained)


def pieces_of(row: Mapping[str, Any], tokenizer: Any) -> tuple[Piece, ...]:
    """Return the pieces of a row; `tokenizer`: None shows the numbers of the tokens."""
    if "rejected_ids" in row:
        both = {"chosen": ("input_ids", "labels"), "rejected": ("rejected_ids", "rejected_labels")}
        return tuple(
            Piece(spans=tuple(_spans(row[ids], row[labels], tokenizer)), name=name)
            for name, (ids, labels) in both.items()
        )
    labels = row["labels"] if isinstance(row["labels"], list) else [IGNORED] * len(row["input_ids"])
    pieces, start = [], 0
    for length in row.get("seq_lengths") or [len(row["input_ids"])]:
        part = slice(start, start + length)
        pieces.append(Piece(spans=tuple(_spans(row["input_ids"][part], labels[part], tokenizer))))
        start += length
    return tuple(pieces)


def _spans(ids: Sequence[int], labels: Sequence[int], tokenizer: Any) -> Iterator[Span]:
    # Nothing predicts the first token of a piece.
    trained = [place > 0 and label != IGNORED for place, label in enumerate(labels)]
    start, before = 0, ""
    for is_trained, group in groupby(trained):
        end = start + len(list(group))
        # Of the whole text up to here: a tokenizer may drop the space at the beginning of what it decodes.
        whole = _decode(ids[:end], tokenizer)
        is_continued = whole.startswith(before)
        text = whole[len(before) :] if is_continued else _decode(ids[start:end], tokenizer)
        yield Span(text=text, is_trained=is_trained, num_tokens=end - start)
        start, before = end, whole


def _decode(ids: Sequence[int], tokenizer: Any) -> str:
    if tokenizer is None:
        return "".join(f"{token} " for token in ids)
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
