"""SPT: sensitivity-aware fine-tuning, with an adapter or a mask for each matrix."""

from .candidates import candidate_names
from .choice import Candidate, Choice, choose
from .conversion import SPT, convert, fold, forecast, is_converted

__all__ = ["SPT", "Candidate", "Choice", "candidate_names", "choose", "convert", "fold", "forecast", "is_converted"]
