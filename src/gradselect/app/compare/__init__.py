"""Fair comparison: a suite in, one result file per run out. Importing it loads no training framework."""

from .comparison import compare
from .git_state import source_state
from .suite import Suite, load_suite

__all__ = ["Suite", "compare", "load_suite", "source_state"]
