"""Bytes and time of a recipe before it runs."""

from .answer import Device, show
from .plain_values import as_json
from .planner import RecipePlanner
from .variants import plan_recipe

__all__ = ["Device", "RecipePlanner", "as_json", "plan_recipe", "show"]
