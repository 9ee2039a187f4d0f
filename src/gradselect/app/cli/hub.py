"""Look at the hub before anything slow is imported."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gradselect.app.runtime import HubId


def check_reachable(ids: Iterable[HubId], *, say: Callable[[str], None]) -> None:
    """Check that models and data on the hub can be had; say so if copies on this machine are used instead.

    Raises:
        UsageError: one of them cannot be had.
    """
    from gradselect.app.runtime import check_ids

    for note in check_ids(ids):
        say(f"note       {note}")
