"""Method sections in files that an earlier version wrote."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def todays_method(method: Mapping[str, Any]) -> dict[str, Any]:
    """Return a method section of a run or result file with today's keys.

    `units` is now `blocks`. The list `blocks` of the method `fixed` is now `names`.
    """
    values = dict(method)
    if values.get("name") == "fixed" and not isinstance(values.get("blocks", ""), str):
        values["names"] = values.pop("blocks")
    if "units" in values:
        values["blocks"] = values.pop("units")
    return values
