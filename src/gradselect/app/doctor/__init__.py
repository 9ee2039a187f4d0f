"""Look at an installation: versions, features, devices, and a training step on each device. Needs torch only."""

from .examination import examine
from .findings import Finding, Status

__all__ = ["Finding", "Status", "examine"]
