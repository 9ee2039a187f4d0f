"""Preview of the data of a recipe: rows as the model reads them, lengths, and what is cut, dropped or empty."""

from .layout import as_json, show
from .preview import DataPreview, preview_data

__all__ = ["DataPreview", "as_json", "preview_data", "show"]
