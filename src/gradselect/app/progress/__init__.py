"""Progress of long work: a live line in a terminal, a plain line now and then elsewhere. Imports nothing slow."""

from .stages import LINE_SECONDS, SILENT, Stage, Stages, clock, encodable, fitted

__all__ = ["LINE_SECONDS", "SILENT", "Stage", "Stages", "clock", "encodable", "fitted"]
