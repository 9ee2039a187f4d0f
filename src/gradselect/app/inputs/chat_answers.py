"""Stretches of a rendered conversation that are answers."""

from __future__ import annotations

from gradselect import UsageError
from gradselect.app.data import Conversation

from .chat_selection import Selected
from .chat_shapes import texts_of
from .chat_template import ChatTemplate, Span

_ADVICE = "write data.loss_on=last-answer, which works with every template"


def marked_answers(template: ChatTemplate, selected: Selected) -> tuple[str, list[Span]]:
    """Return the text of a conversation, and the stretches that its template marks as answers.

    Raises:
        UsageError: the marks leave an answer out, or a part of it.
    """
    conversation = selected.conversation
    text, spans = template.render_marked(conversation)
    answers = [place for place, message in enumerate(conversation.messages) if message["role"] == "assistant"]
    if len(selected.answers) < len(answers):
        spans = [span for place in selected.answers for span in _spans_of(template, conversation, place)]
    marked = "".join(text[begin:end] for begin, end in spans)
    for place in selected.answers:
        for said in _said(conversation, place):
            if said not in marked and (said in text or not marked):
                raise UsageError(
                    f"message {place + 1}: the marks of the chat template ({{% generation %}}) leave out "
                    f"{said[:40]!r}, so it would not be trained on; {_ADVICE}"
                )
    return text, spans


def _spans_of(template: ChatTemplate, conversation: Conversation, place: int) -> list[Span]:
    """Return the marked stretches of one answer: those that are not there without it."""
    _, before = template.render_marked(conversation, count=place) if place else ("", [])
    _, spans = template.render_marked(conversation)
    _, here = template.render_marked(conversation, count=place + 1)
    return spans[len(before) : len(here)]


def _said(conversation: Conversation, place: int) -> list[str]:
    """Return texts that must be trained on: the content of an answer, and the names of the tools that it calls."""
    message = conversation.messages[place]
    names = [call.get("function", call)["name"] for call in message.get("tool_calls", ())]
    return [text for text in (*texts_of(message.get("content")), *names) if text]


def answers_between(template: ChatTemplate, selected: Selected) -> tuple[str, list[Span]]:
    """Return the text of a conversation, and its answers, found by rendering it up to each of them.

    An answer is what the template adds to the beginning of an answer, with the white space behind its end: the same
    stretch that trains with loss_on=last-answer.

    Raises:
        UsageError: the template renders a message otherwise when others follow it.
    """
    conversation = selected.conversation
    text = template.render(conversation)
    spans = []
    for place in selected.answers:
        opened = _opened(template, conversation, place)
        answered = template.render(conversation, count=place + 1)
        if not (answered.startswith(opened) and text.startswith(answered)):
            raise UsageError(
                f"message {place + 1}: data.loss_on=answers cannot tell where this answer stands: the chat template "
                "has no marks ({% generation %}) and renders messages otherwise when others follow; " + _ADVICE
            )
        spans.append((len(opened), len(answered)))
    return text, spans


def _opened(template: ChatTemplate, conversation: Conversation, place: int) -> str:
    """Return the text up to the beginning of an answer."""
    if place:
        return template.render(conversation, count=place, opens_answer=True)
    # Nothing comes before the first message, and templates render no empty conversation.
    first = texts_of(conversation.messages[0].get("content"))
    text = template.render(conversation, count=1)
    return text[: text.find(first[0])] if first and first[0] in text else ""


def thoughts_in(conversation: Conversation, place: int) -> list[str]:
    """Return the thoughts that stand in the text of an answer, between `<think>` and `</think>`."""
    texts = texts_of(conversation.messages[place].get("content"))
    thoughts = [text.partition("</think>")[0].partition("<think>")[2].strip() for text in texts if "</think>" in text]
    return [thought for thought in thoughts if thought]
