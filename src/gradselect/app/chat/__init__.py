"""Talk with a trained model in a terminal, in the form that it was trained on."""

from .conversation import Conversation, open_conversation
from .forms import AbstractForm, ChatForm, TemplateForm

__all__ = ["AbstractForm", "ChatForm", "Conversation", "TemplateForm", "open_conversation"]
