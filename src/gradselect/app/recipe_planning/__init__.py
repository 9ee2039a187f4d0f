"""Bytes and time of a recipe before it runs."""

from .answer import show
from .plain_values import as_json
from .planner import RecipePlanner
from .variants import needed_bytes, plan_recipe

__all__ = ["RecipePlanner", "as_json", "needed_bytes", "plan_recipe", "show"]
