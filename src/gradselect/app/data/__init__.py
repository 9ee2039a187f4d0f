"""Data files: rows, templates, chat messages, labels, read and checked line by line."""

from .cells import cell_text, is_empty, label_text
from .chat import TEMPLATE_ARGUMENTS, ChatColumns, Conversation, holds_messages, message_roles, read_conversation
from .chat_messages import REASONING, Message, is_blank
from .endings import ENDINGS, ending_of, whole_ending_of
from .hub_rows import read_hub_rows
from .labels import label_names, read_label
from .row import Origin, Row, Rows, place_of
from .rows import other_sign, read_rows, require_columns, shown_columns
from .shards import VALIDATION_SPLITS, check_local, data_fingerprint, files_of, is_local, is_pattern, names_split
from .template import check_template, columns_of, optional_columns_of, render, says_nothing
from .text_lines import read_bytes

__all__ = [
    "ENDINGS",
    "REASONING",
    "TEMPLATE_ARGUMENTS",
    "VALIDATION_SPLITS",
    "ChatColumns",
    "Conversation",
    "Message",
    "Origin",
    "Row",
    "Rows",
    "cell_text",
    "check_local",
    "check_template",
    "columns_of",
    "data_fingerprint",
    "ending_of",
    "files_of",
    "holds_messages",
    "is_blank",
    "is_empty",
    "is_local",
    "is_pattern",
    "label_names",
    "label_text",
    "message_roles",
    "names_split",
    "optional_columns_of",
    "other_sign",
    "place_of",
    "read_bytes",
    "read_conversation",
    "read_hub_rows",
    "read_label",
    "read_rows",
    "render",
    "require_columns",
    "says_nothing",
    "shown_columns",
    "whole_ending_of",
]
