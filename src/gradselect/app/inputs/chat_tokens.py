"""Tokens of conversations, and those of them that are answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from gradselect.app.data import Conversation

from .chat_template import ChatTemplate, marking_template
from .tokens import ROWS_AT_ONCE, TokenExample, common_prefix, encode


def chat_tokens(
    conversations: Sequence[Conversation],
    tokenizer: PreTrainedTokenizerBase,
    *,
    loss_on: Literal["last-answer", "answers", "all"],
) -> Iterator[TokenExample]:
    """Yield the tokens of each conversation, rendered with the chat template.

    Args:
        conversations: conversations that end with an answer of the assistant.
        tokenizer: has the chat template.
        loss_on: tokens that count in the loss.
    """
    make = {"last-answer": _last_answers, "answers": _all_answers, "all": _whole}[loss_on]
    for start in range(0, len(conversations), ROWS_AT_ONCE):
        yield from make(conversations[start : start + ROWS_AT_ONCE], tokenizer)


def _last_answers(conversations: Sequence[Conversation], tokenizer: PreTrainedTokenizerBase) -> Iterator[TokenExample]:
    template = ChatTemplate(tokenizer=tokenizer)
    asked = [template.render(one, count=-1, opens_answer=True) for one in conversations]
    answered = [template.render(one) for one in conversations]
    before, both = (encode(texts, tokenizer, special=False) for texts in (asked, answered))
    for prompt, whole in zip(before, both, strict=True):
        start = common_prefix(prompt, whole)
        yield TokenExample(ids=whole, is_trained=[place >= start for place in range(len(whole))])


def _whole(conversations: Sequence[Conversation], tokenizer: PreTrainedTokenizerBase) -> Iterator[TokenExample]:
    template = ChatTemplate(tokenizer=tokenizer)
    for ids in encode([template.render(one) for one in conversations], tokenizer, special=False):
        yield TokenExample(ids=ids, is_trained=[True] * len(ids))


def _all_answers(conversations: Sequence[Conversation], tokenizer: Any) -> Iterator[TokenExample]:
    template = marking_template(tokenizer)
    rendered = [template.render_marked(one) for one in conversations]
    encoded = tokenizer(text=[text for text, _ in rendered], add_special_tokens=False, verbose=False)
    for number, (_, spans) in enumerate(rendered):
        yield _marked(encoded, number, spans)


def _marked(encoded: Any, number: int, spans: Sequence[tuple[int, int]]) -> TokenExample:
    """Return one text of a batch; tokens that lie in a span, if only in part, are trained."""
    ids = encoded["input_ids"][number]
    is_trained = [False] * len(ids)
    for begin, end in spans:
        first, last = encoded.char_to_token(number, begin), encoded.char_to_token(number, end - 1)
        if first is None:
            break
        stop = last + 1 if last else len(ids)
        is_trained[first:stop] = [True] * (stop - first)
    return TokenExample(ids=ids, is_trained=is_trained)
