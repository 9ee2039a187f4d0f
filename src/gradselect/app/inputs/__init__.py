"""Model, tokenizer and data of a run: read and checked."""

from .chat_examples import chat_tokens
from .length_notes import as_percent, row_notes
from .length_sampler import LengthSampler, padding_share
from .model import check_base_can_train, fingerprint, head_names
from .notices import Notices, RowError
from .prompts_per_step import check_prompts, num_prompts_per_step
from .rows import Rows, make_rows
from .run_inputs import DataInputs, Inputs, read_data, read_inputs
from .tokens import IGNORED, end_of_turn_tokens

__all__ = [
    "IGNORED",
    "DataInputs",
    "Inputs",
    "LengthSampler",
    "Notices",
    "RowError",
    "Rows",
    "as_percent",
    "chat_tokens",
    "check_base_can_train",
    "check_prompts",
    "end_of_turn_tokens",
    "fingerprint",
    "head_names",
    "make_rows",
    "num_prompts_per_step",
    "padding_share",
    "read_data",
    "read_inputs",
    "row_notes",
]
