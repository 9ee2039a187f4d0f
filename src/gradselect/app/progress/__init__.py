"""Output of commands: progress in a live line or in plain lines, tables that fit. Imports nothing slow."""

from .stages import LINE_SECONDS, SILENT, Stage, Stages, clock, encodable, fitted
from .tables import print_table

__all__ = ["LINE_SECONDS", "SILENT", "Stage", "Stages", "clock", "encodable", "fitted", "print_table"]
