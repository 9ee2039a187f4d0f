"""Model, tokenizer and data of a run: read and checked."""

from .model import fingerprint
from .run_inputs import Inputs, read_inputs

__all__ = ["Inputs", "fingerprint", "read_inputs"]
