"""Ways into training frameworks; each module imports its framework, so none is imported by default."""

from __future__ import annotations
