"""A fine-tuning from beginning to end in minutes, offline: what `gradselect quickstart` does."""

from .files import base_folder, recipe_file
from .run import quickstart

__all__ = ["base_folder", "quickstart", "recipe_file"]
