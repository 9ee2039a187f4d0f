"""Preview of the data of a recipe: rows as the model reads them, lengths, and what is cut, dropped or empty."""

from .first_row import show_first_row
from .layout import as_json, show
from .preview import DataPreview, preview_data

__all__ = ["DataPreview", "as_json", "preview_data", "show", "show_first_row"]
