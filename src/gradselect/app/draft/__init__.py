"""Draft of a recipe from a model and data alone."""

from .draft import Draft, draft_recipe

__all__ = ["Draft", "draft_recipe"]
