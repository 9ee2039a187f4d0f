"""Search for the values of a recipe that give the smallest validation loss, with Optuna.

Importing it loads neither Optuna nor a training framework.
"""

from .tuning import tune, tune_adapters

__all__ = ["tune", "tune_adapters"]
