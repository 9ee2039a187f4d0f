"""Token ids of prompts to continue and of segments to score."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gradselect.app.data import Conversation
from gradselect.app.models import encode_open
from gradselect.usage import UsageError

from .language_model import LanguageModel
from .problems import Passage

if TYPE_CHECKING:
    from gradselect.app.inputs import Notices


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """Tokens to continue; `truncated` is True if their beginning was cut off."""

    ids: Sequence[int]
    truncated: bool


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Tokens of one forward pass.

    Args:
        row: row of the data, from 0.
        ids: token ids, at most the context length.
        start: position of the first scored token, at least 1: nothing predicts the first token.
        truncated: True if the beginning was cut off.
    """

    row: int
    ids: Sequence[int]
    start: int
    truncated: bool

    @property
    def num_tokens(self) -> int:
        """Number of scored tokens."""
        return max(0, len(self.ids) - self.start)


def encode_prompt(text: str, *, language_model: LanguageModel, as_chat: bool, room: int | None) -> Prompt:
    """Encode the prompt, as a user's message if `as_chat`, and keep at most its last `room` tokens.

    Raises:
        UsageError: `as_chat` without a chat template in the tokenizer.
    """
    tokenizer = language_model.tokenizer
    if as_chat:
        ids = tokenizer(_chat(tokenizer, text), add_special_tokens=False, verbose=False)["input_ids"]
    else:
        (ids,) = encode_open(tokenizer, [text])
    return Prompt(ids=_last(ids, room, tokenizer), truncated=room is not None and len(ids) > room)


def conversation_segments(
    conversations: Sequence[Conversation], *, language_model: LanguageModel, notices: Notices
) -> Iterator[Segment]:
    """Yield each conversation as one segment that is scored in its last answer, with the tokens of a training.

    Raises:
        UsageError: the tokenizer has no chat template, or it leaves something out that a conversation says.
    """
    from gradselect.app.inputs import chat_tokens

    tokenizer: Any = language_model.tokenizer
    _check_chat(tokenizer)
    for example in chat_tokens(conversations, tokenizer, loss_on="last-answer", notices=notices):
        start = example.is_trained.index(True) if any(example.is_trained) else len(example.ids)
        yield _segment(example.row - 1, list(example.ids), start, language_model)


def segments(row: int, passage: Passage, *, language_model: LanguageModel) -> list[Segment]:
    """Return the segments of a passage: pieces of a running text, or one prompt with its target.

    A running text is cut into pieces of the context length. Each piece begins with the last token of the previous one,
    so every token except the first is predicted exactly once. A prompt with target that exceeds the context loses its
    beginning.
    """
    if passage.prompt is None:
        return _pieces(row, passage, language_model=language_model)
    before, ids = _encode_pair(passage, language_model.tokenizer)
    # A tokenizer may merge the end of the prompt with the beginning of the target; the merged token is scored.
    start = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(before, ids, strict=False)))
    return [_segment(row, ids, start, language_model)]


def _segment(row: int, ids: list[int], start: int, language_model: LanguageModel) -> Segment:
    """Return the last tokens that fit into the context, scored from `start`."""
    kept = _last(ids, language_model.context, language_model.tokenizer)
    start = max(1, max(1, start) - (len(ids) - len(kept)))
    return Segment(row=row, ids=kept, start=start, truncated=len(kept) < len(ids))


def pad(rows: Sequence[Sequence[int]], *, token: int, left: bool) -> tuple[Tensor, Tensor]:
    """Return ids and attention mask of a batch, int64, (rows, longest row), e.g. (16, 180)."""
    longest = max(map(len, rows))
    fill = [[token] * (longest - len(row)) for row in rows]
    ones = [[1] * len(row) for row in rows]
    zeros = [[0] * len(gap) for gap in fill]
    join = (lambda gap, row: [*gap, *row]) if left else (lambda gap, row: [*row, *gap])
    return torch.tensor([*map(join, fill, rows)]), torch.tensor([*map(join, zeros, ones)])


def longest_first(lengths: Sequence[int], *, batch_size: int) -> Iterator[list[int]]:
    """Yield batches of indices of similar length, longest first: little padding, and memory runs out early or never."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    return (order[begin : begin + batch_size] for begin in range(0, len(order), batch_size))


def _pieces(row: int, passage: Passage, *, language_model: LanguageModel) -> list[Segment]:
    (ids,) = encode_open(language_model.tokenizer, [passage.target])
    ids = _ended(ids, language_model.tokenizer) if passage.ends else ids
    length = language_model.context or len(ids)
    begins = range(0, len(ids) - 1, max(1, length - 1))
    return [Segment(row=row, ids=ids[begin : begin + length], start=1, truncated=False) for begin in begins]


def _encode_pair(passage: Passage, tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the ids of the prompt, and of prompt and target together."""
    assert isinstance(passage.prompt, str)
    before, both = encode_open(tokenizer, [passage.prompt, passage.prompt + passage.target])
    return before, _ended(both, tokenizer) if passage.ends else both


def _chat(tokenizer: Any, text: str) -> str:
    """Return a user's message with the beginning of its answer."""
    _check_chat(tokenizer)
    messages = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def _check_chat(tokenizer: Any) -> None:
    if tokenizer.chat_template is None:
        raise UsageError("the model's tokenizer has no chat template; leave as_chat off, or evaluate a chat model")


def _ended(ids: list[int], tokenizer: Any) -> list[int]:
    """Append the end-of-text token unless it is there or the tokenizer has none."""
    return ids if tokenizer.eos_token_id in (None, ids[-1] if ids else None) else [*ids, tokenizer.eos_token_id]


def _last(ids: list[int], room: int | None, tokenizer: Any) -> list[int]:
    """Return the last `room` ids; a beginning-of-text token stays in front, because models attend to it."""
    if room is None or len(ids) <= room:
        return ids
    if room > 1 and ids[0] == tokenizer.bos_token_id:
        return [ids[0], *ids[len(ids) - room + 1 :]]
    return ids[-room:]
