"""Model, tokenizer and data of a run: read and checked."""

from .model import fingerprint
from .run_inputs import Inputs, read_inputs
from .tokens import end_of_turn_tokens

__all__ = ["Inputs", "end_of_turn_tokens", "fingerprint", "read_inputs"]
