"""Tokens of conversations, and those of them that are answers."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from gradselect import UsageError
from gradselect.app.data import Conversation

from .chat_answers import answers_between, marked_answers, thoughts_in
from .chat_fields import FieldCheck
from .chat_selection import LossOn, Selected, select
from .chat_shapes import best_shape
from .chat_template import ChatTemplate, Span, marking_template
from .notices import Notices, RowError
from .tokens import BROKEN_PROMPT, ROWS_AT_ONCE, TokenExample, common_prefix, encode

JOINED = "have contents of several parts, joined by line ends: the chat template takes text only"
CUT_THOUGHTS = "lose the thoughts (<think>) of an answer that trains: the chat template cuts them off"
OTHERWISE = "are rendered by TRL's training template otherwise than by the model's own chat template"


def chat_tokens(
    conversations: Sequence[Conversation],
    tokenizer: PreTrainedTokenizerBase,
    *,
    loss_on: LossOn,
    notices: Notices | None = None,
) -> Iterator[TokenExample]:
    """Yield the tokens of each conversation that has something to train on, rendered with the chat template.

    Args:
        conversations: the conversations, in the order of their rows.
        tokenizer: has the chat template.
        loss_on: tokens that count in the loss.
        notices: takes what is left out.

    Raises:
        UsageError: the template leaves something out that a conversation says, or cannot render it; names the row.
    """
    notices = Notices() if notices is None else notices
    selected = select(conversations, loss_on=loss_on, notices=notices)
    marking = marking_template(tokenizer) if loss_on == "answers" else None
    template = marking or ChatTemplate(tokenizer=tokenizer)
    shape = best_shape(template, [one.conversation for one in selected])
    for one in selected:
        if shape.joins(one.conversation):
            notices.add(JOINED, one.row)
    selected = [replace(one, conversation=shape.apply(one.conversation)) for one in selected]
    check = FieldCheck(template=template, notices=notices)
    check.probe([(one.row, one.conversation) for one in selected])
    maker = _Maker(template=template, is_marking=marking is not None, tokenizer=tokenizer, check=check)
    make = {"last-answer": maker.last_answers, "answers": maker.answers, "all": maker.wholes}[loss_on]
    for start in range(0, len(selected), ROWS_AT_ONCE):
        yield from make(selected[start : start + ROWS_AT_ONCE])


@dataclass(frozen=True, kw_only=True)
class _Maker:
    """Makes the examples of some conversations at a time.

    Args:
        template: renders them.
        is_marking: True if the template marks answers.
        tokenizer: encodes them.
        check: checks that nothing is lost.
    """

    template: ChatTemplate
    is_marking: bool
    tokenizer: Any
    check: FieldCheck

    def last_answers(self, batch: Sequence[Selected]) -> Iterator[TokenExample]:
        """Yield examples in which the last answer is trained."""
        texts = [self._rendered(one) for one in batch]
        asked = [_in_row(one.row, lambda one=one: self._asked(one)) for one in batch]
        before, both = (encode(each, self.tokenizer, special=False) for each in (asked, texts))
        for one, prompt, whole in zip(batch, before, both, strict=True):
            start = common_prefix(prompt, whole)
            if start < len(prompt):
                self.check.notices.add(BROKEN_PROMPT, one.row)
            yield TokenExample(ids=whole, is_trained=[place >= start for place in range(len(whole))], row=one.row)

    def wholes(self, batch: Sequence[Selected]) -> Iterator[TokenExample]:
        """Yield examples in which every token is trained."""
        texts = [self._rendered(one) for one in batch]
        for one, ids in zip(batch, encode(texts, self.tokenizer, special=False), strict=True):
            yield TokenExample(ids=ids, is_trained=[True] * len(ids), row=one.row)

    def answers(self, batch: Sequence[Selected]) -> Iterator[TokenExample]:
        """Yield examples in which all answers are trained."""
        if not self.tokenizer.is_fast:
            raise UsageError(
                "data.loss_on=answers needs a fast tokenizer, which knows where its tokens stand in the text; write "
                "data.loss_on=last-answer"
            )
        find = marked_answers if self.is_marking else answers_between
        found = [_in_row(one.row, lambda one=one: find(self.template, one)) for one in batch]
        for one, (text, _) in zip(batch, found, strict=True):
            _in_row(one.row, lambda one=one, text=text: self._check(one, text))
            self._compare(one, text)
        encoded = self.tokenizer(text=[text for text, _ in found], add_special_tokens=False, verbose=False)
        for number, (one, (_, spans)) in enumerate(zip(batch, found, strict=True)):
            yield replace(_marked(encoded, number, spans), row=one.row)

    def _asked(self, one: Selected) -> str:
        return self.template.render(one.conversation, count=one.answers[0], opens_answer=True)

    def _rendered(self, one: Selected) -> str:
        """Return the text of a conversation, checked."""

        def render() -> str:
            text = self.template.render(one.conversation)
            self._check(one, text)
            return text

        return _in_row(one.row, render)

    def _check(self, one: Selected, text: str) -> None:
        """Check that a text holds its conversation, and note answers whose thoughts are cut off."""
        self.check.check(one.row, one.conversation, text)
        if any(thought not in text for place in one.answers for thought in thoughts_in(one.conversation, place)):
            self.check.notices.add(CUT_THOUGHTS, one.row)

    def _compare(self, one: Selected, text: str) -> None:
        """Note if the model's own template, with which it is used later, gives another text."""
        if self.template.template is None:
            return
        try:
            own = ChatTemplate(tokenizer=self.tokenizer).render(one.conversation)
        except UsageError:
            own = None
        if own != text:
            self.check.notices.add(OTHERWISE, one.row)


def _in_row(row: int, do: Callable[[], Any]) -> Any:
    """Do something, and name the row if it cannot be done."""
    try:
        return do()
    except UsageError as error:
        raise RowError(row, error) from None


def _marked(encoded: Any, number: int, spans: Sequence[Span]) -> TokenExample:
    """Return one text of a batch; tokens that lie in a span, if only in part, are trained.

    A character may have no token, such as a line end that the tokenizer drops, or several.
    """
    ids = encoded["input_ids"][number]
    starts, stops = ([offset[side] for offset in encoded[number].offsets] for side in (0, 1))
    is_trained = [False] * len(ids)
    for begin, end in spans:
        first, last = bisect_right(stops, begin), bisect_left(starts, end)
        is_trained[first:last] = [True] * (last - first)
    return TokenExample(ids=ids, is_trained=is_trained)
