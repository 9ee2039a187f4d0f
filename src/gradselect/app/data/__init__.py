"""Data files: rows, templates, chat messages, labels, read and checked line by line."""

from .chat import Conversation, check_messages
from .labels import label_names, read_label
from .rows import ENDINGS, Row, read_rows, require_columns
from .template import check_template, columns_of, render

__all__ = [
    "ENDINGS",
    "Conversation",
    "Row",
    "check_messages",
    "check_template",
    "columns_of",
    "label_names",
    "read_label",
    "read_rows",
    "render",
    "require_columns",
]
