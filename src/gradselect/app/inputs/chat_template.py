"""A tokenizer's chat template, and the stretches of its text that are answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template
from trl.chat_template_utils import get_training_chat_template, has_generation_markers

from gradselect import UsageError
from gradselect.app.data import Conversation


@dataclass(frozen=True, kw_only=True)
class ChatTemplate:
    """Renders conversations as text.

    Args:
        tokenizer: has the template and its special tokens.
        template: Jinja text. None: the tokenizer's own.
    """

    tokenizer: PreTrainedTokenizerBase
    template: str | None = None

    def render(self, conversation: Conversation, *, count: int | None = None, opens_answer: bool = False) -> str:
        """Return the text of the first `count` messages, by default of all.

        `opens_answer`: with the beginning of an answer of the assistant behind them.
        """
        text: Any = self.tokenizer.apply_chat_template(
            conversation.messages[:count],
            chat_template=self.template,
            tokenize=False,
            add_generation_prompt=opens_answer,
        )
        return text

    def render_marked(self, conversation: Conversation) -> tuple[str, list[tuple[int, int]]]:
        """Return the text with begin and end of each stretch that the template marks as generated."""
        messages = [{key: value for key, value in one.items() if value is not None} for one in conversation.messages]
        special_tokens: dict[str, Any] = self.tokenizer.special_tokens_map
        rendered: Any = render_jinja_template(
            conversations=[messages],
            chat_template=self.tokenizer.get_chat_template(self.template),
            return_assistant_tokens_mask=True,
            **special_tokens,
        )
        (text,), (spans,) = rendered
        return text, spans


def marking_template(tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
    """Return a template that marks the answers: the tokenizer's own, or TRL's for its model family.

    Raises:
        UsageError: there is none.
    """
    if isinstance(tokenizer.chat_template, str) and has_generation_markers(tokenizer.chat_template):
        return ChatTemplate(tokenizer=tokenizer)
    try:
        # TRL has templates with marks for common model families.
        return ChatTemplate(tokenizer=tokenizer, template=get_training_chat_template(tokenizer))
    except ValueError:
        raise UsageError(
            "data.loss_on=answers: the model's chat template does not mark the assistant's turns "
            "({% generation %}); write data.loss_on=last-answer"
        ) from None
