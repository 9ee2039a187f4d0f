"""Selective fine-tuning: train, at every step, only the part of the model that matters now."""

from ._errors import UsageError as UsageError

__version__ = "0.1.0.dev0"
