"""What a user meets: the one error, checks of arguments, patterns of names, templates, sizes in bytes."""

from .byte_sizes import read_fractions, read_size, smallest_text, write_size
from .checks import check_hyper_parameters, check_is, check_one_of, check_patterns, check_positive, check_whole
from .errors import UsageError
from .names import as_tuple, beginnings, join, matches, matches_any, matching, nearest, parent
from .text import first_line, printable

__all__ = [
    "UsageError",
    "as_tuple",
    "beginnings",
    "check_hyper_parameters",
    "check_is",
    "check_one_of",
    "check_patterns",
    "check_positive",
    "check_whole",
    "first_line",
    "join",
    "matches",
    "matches_any",
    "matching",
    "nearest",
    "parent",
    "printable",
    "read_fractions",
    "read_size",
    "smallest_text",
    "write_size",
]
