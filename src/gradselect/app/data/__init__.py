"""Data files: rows, templates, chat messages, labels, read and checked line by line."""

from .cells import cell_text, is_empty, label_text
from .chat import TEMPLATE_ARGUMENTS, ChatColumns, Conversation, holds_messages, read_conversation
from .chat_messages import REASONING, Message, is_blank
from .labels import label_names, read_label
from .row import Origin, Row, Rows, place_of
from .rows import ENDINGS, ending_of, read_rows, require_columns
from .template import check_template, columns_of, optional_columns_of, render, says_nothing

__all__ = [
    "ENDINGS",
    "REASONING",
    "TEMPLATE_ARGUMENTS",
    "ChatColumns",
    "Conversation",
    "Message",
    "Origin",
    "Row",
    "Rows",
    "cell_text",
    "check_template",
    "columns_of",
    "ending_of",
    "holds_messages",
    "is_blank",
    "is_empty",
    "label_names",
    "label_text",
    "optional_columns_of",
    "place_of",
    "read_conversation",
    "read_label",
    "read_rows",
    "render",
    "require_columns",
    "says_nothing",
]
