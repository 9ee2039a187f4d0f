"""SPT: sensitivity-aware fine-tuning, with an adapter or a mask for each matrix."""

from .choice import Candidate, Choice, choose
from .conversion import SPT, convert, fold, is_converted

__all__ = ["SPT", "Candidate", "Choice", "choose", "convert", "fold", "is_converted"]
