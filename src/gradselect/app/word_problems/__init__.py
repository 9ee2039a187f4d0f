"""Generated grade-school word problems with worked answers, and the small language that they are written in.

Only Python itself is needed. `python quickstart/problems.py` writes them to a file.
"""

from .generation import TEMPLATES, Template, main, make_problem, problems, split_of, write_problems
from .grammar import LARGEST, OPERATIONS, SMALLEST, Misfit, calculate, choose, draw_cast, fill

__all__ = [
    "LARGEST",
    "OPERATIONS",
    "SMALLEST",
    "TEMPLATES",
    "Misfit",
    "Template",
    "calculate",
    "choose",
    "draw_cast",
    "fill",
    "main",
    "make_problem",
    "problems",
    "split_of",
    "write_problems",
]
