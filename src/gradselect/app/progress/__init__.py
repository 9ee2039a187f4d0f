"""Progress of long work: a live line in a terminal, a plain line now and then elsewhere. Imports nothing slow."""

from .stages import SILENT, Stage, Stages

__all__ = ["SILENT", "Stage", "Stages"]
