"""A tokenizer's chat template, and the stretches of its text that are answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from gradselect import UsageError
from gradselect.app.data import Conversation
from gradselect.usage import first_line

Span = tuple[int, int]
"""Begin and end of a stretch of text, in characters."""


@dataclass(frozen=True, kw_only=True)
class ChatTemplate:
    """Renders conversations as text.

    Args:
        tokenizer: has the template and its special tokens.
        template: Jinja text. None: the tokenizer's own.
    """

    tokenizer: PreTrainedTokenizerBase
    template: str | None = None

    def source(self, conversation: Conversation) -> str:
        """Return the Jinja text that renders a conversation. A tokenizer may have one for each purpose."""
        tools: Any = conversation.tools
        return self.tokenizer.get_chat_template(self.template, tools)

    def render(self, conversation: Conversation, *, count: int | None = None, opens_answer: bool = False) -> str:
        """Return the text of the first `count` messages, by default of all.

        `opens_answer`: with the beginning of an answer of the assistant behind them.

        Raises:
            UsageError: the template cannot render them; with its own reason.
        """
        try:
            text: Any = self.tokenizer.apply_chat_template(
                conversation.messages[:count],
                tools=conversation.tools,
                documents=conversation.documents,
                chat_template=self.template,
                tokenize=False,
                add_generation_prompt=opens_answer,
                **conversation.template_arguments,
            )
        except _TEMPLATE_FAULTS as error:
            raise _cannot_render(error) from None
        return text

    def render_marked(self, conversation: Conversation, *, count: int | None = None) -> tuple[str, list[Span]]:
        """Return the text of the first `count` messages with the stretches that the template marks as generated.

        Raises:
            UsageError: the template cannot render them; with its own reason.
        """
        messages = [{key: value for key, value in one.items() if value is not None} for one in conversation.messages]
        variables: dict[str, Any] = {**self.tokenizer.special_tokens_map, **conversation.template_arguments}
        try:
            rendered: Any = render_jinja_template(
                conversations=[messages[:count]],
                tools=conversation.tools,
                documents=conversation.documents,
                chat_template=self.source(conversation),
                return_assistant_tokens_mask=True,
                **variables,
            )
        except _TEMPLATE_FAULTS as error:
            raise _cannot_render(error) from None
        (text,), (spans,) = rendered
        return text, spans


_TEMPLATE_FAULTS = (TemplateError, TypeError, ValueError, KeyError, IndexError, AttributeError)
"""Errors of a template that meets a message it is not made for."""


def _cannot_render(error: Exception) -> UsageError:
    return UsageError(
        f"the model's chat template cannot render the conversation: {first_line(error)}; change the row, or use a "
        "model whose template takes it"
    )


def writes_the_date(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return True if the tokenizer's template asks for the day, as those of Llama 3.2 and gpt-oss do."""
    template: Any = tokenizer.chat_template
    return "strftime_now" in (template if isinstance(template, str) else " ".join((template or {}).values()))


def marking_template(tokenizer: PreTrainedTokenizerBase) -> ChatTemplate | None:
    """Return a template that marks the answers: the tokenizer's own, or TRL's for its model family, or None."""
    from trl.chat_template_utils import get_training_chat_template, has_generation_markers

    if isinstance(tokenizer.chat_template, str) and has_generation_markers(tokenizer.chat_template):
        return ChatTemplate(tokenizer=tokenizer)
    try:
        return ChatTemplate(tokenizer=tokenizer, template=get_training_chat_template(tokenizer))
    except _TEMPLATE_FAULTS:
        return None
