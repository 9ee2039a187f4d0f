"""Bytes and time of a recipe before it runs."""

from .tables import as_json, show
from .variants import plan_recipe

__all__ = ["as_json", "plan_recipe", "show"]
