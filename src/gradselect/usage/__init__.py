"""User input and messages: the one error, argument checks, name patterns, setting differences, byte sizes."""

from .byte_sizes import read_fractions, read_size, smallest_text, write_size
from .checks import (
    check_file_name,
    check_hyper_parameters,
    check_is,
    check_one_of,
    check_patterns,
    check_positive,
    check_whole,
    is_number,
)
from .differences import find_differences, flatten
from .errors import UsageError
from .installation import NeededPackage, install_command, installed_version, lacking_packages, needed_packages
from .names import as_tuple, beginnings, join, matches_any, matching, nearest, parent
from .text import first_line, listed, printable, shortened

__all__ = [
    "NeededPackage",
    "UsageError",
    "as_tuple",
    "beginnings",
    "check_file_name",
    "check_hyper_parameters",
    "check_is",
    "check_one_of",
    "check_patterns",
    "check_positive",
    "check_whole",
    "find_differences",
    "first_line",
    "flatten",
    "install_command",
    "installed_version",
    "is_number",
    "join",
    "lacking_packages",
    "listed",
    "matches_any",
    "matching",
    "nearest",
    "needed_packages",
    "parent",
    "printable",
    "read_fractions",
    "read_size",
    "shortened",
    "smallest_text",
    "write_size",
]
