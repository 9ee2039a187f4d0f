"""Answers to worked problems: extraction from text, and comparison by value."""

from .answer_judge import Judge
from .answers import boxed_or_stated, gsm8k_answer, last_boxed, last_number, last_stated, math_answer, trimmed
from .tasks import FIND_ANSWER, FIND_REFERENCE, gsm8k_reference, math_reference

__all__ = [
    "FIND_ANSWER",
    "FIND_REFERENCE",
    "Judge",
    "boxed_or_stated",
    "gsm8k_answer",
    "gsm8k_reference",
    "last_boxed",
    "last_number",
    "last_stated",
    "math_answer",
    "math_reference",
    "trimmed",
]
