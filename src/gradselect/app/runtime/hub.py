"""The Hugging Face hub: one quick look at whether it can be reached, before libraries retry for half a minute."""

from __future__ import annotations

import os
import re
import sys
import threading
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

from gradselect.usage import UsageError, first_line

Kind = Literal["model", "dataset"]

CONNECT_SECONDS = 3.5
"""Limit for a connection. A hub that answers slowly is connected at once; only its answers take long."""
ANSWER_SECONDS = 0.5
"""An answer is not waited for: a connection is enough."""

_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)


class HubId(NamedTuple):
    """A setting that is a path, or an id on the hub."""

    key: str
    name: str
    kind: Kind


def check_ids(ids: Iterable[HubId]) -> Iterator[str]:
    """Check each id as `check_hub` does, before anything slow is imported; yield notes for the user.

    If the hub cannot be reached, copies on this machine are used from now on, and the libraries no longer try again.

    Raises:
        UsageError: an id is not in the cache, and the hub cannot be reached or is switched off.
    """
    for one in ids:
        check_hub(one.name, key=one.key, kind=one.kind)
        if _is_id(one.name) and not _is_offline() and (fault := hub_fault()) is not None:
            yield f"{fault}: the copy of {one.name} on this machine is used"
            _switch_off()


def check_hub(name: str, *, key: str, kind: Kind) -> None:
    """Check that an id can be downloaded, or is on this machine already. Paths are none of its business.

    Args:
        name: id on the hub: "Qwen/Qwen2.5-0.5B".
        key: name of the setting in errors: "model.path".
        kind: "model" or "dataset".

    Raises:
        UsageError: the id is not in the cache, and the hub cannot be reached or is switched off.
    """
    if _is_id(name) and not _is_cached(name, kind) and (fault := hub_fault()) is not None:
        here = "folder" if kind == "model" else "file or folder"
        raise UsageError(
            f"{key}={name!r} cannot be used: there is no such {here} here, no copy of it from the hub on this machine, "
            f"and {fault}. Give a {here}, or try again with a network"
        )


def _is_offline() -> bool:
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE


def _switch_off() -> None:
    """Switch the hub off for this process and for those that it starts."""
    from huggingface_hub import constants

    os.environ["HF_HUB_OFFLINE"] = "1"
    constants.HF_HUB_OFFLINE = True
    if "datasets" in sys.modules:
        sys.modules["datasets"].config.HF_HUB_OFFLINE = True


def _is_id(name: str) -> bool:
    return _ID.fullmatch(name) is not None and not Path(name).exists()


def _is_cached(name: str, kind: Kind) -> bool:
    """Return True if a snapshot of the id is on this machine, or a data set made from it."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE) / f"{kind}s--{name.replace('/', '--')}" / "snapshots"
    made = os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME) / "datasets"
    folders = [folder] if kind == "model" else [folder, Path(made) / name.replace("/", "___")]
    return any(one.is_dir() and any(one.iterdir()) for one in folders)


def hub_fault() -> str | None:
    """Return the reason why nothing can be downloaded, or None."""
    from huggingface_hub import constants

    if _is_offline():
        return "HF_HUB_OFFLINE is set"
    reason = _unreachable(constants.ENDPOINT)
    return None if reason is None else f"the hub {constants.ENDPOINT} cannot be reached ({reason})"


@cache
def _unreachable(endpoint: str) -> str | None:
    """Return why the endpoint cannot be reached, or None. Takes four seconds, unless the user asks for more."""
    limit = _connect_seconds()
    found: list[str | None] = []
    # A thread, because the look-up of the name has no limit of its own.
    thread = threading.Thread(target=lambda: found.append(_try_to_connect(endpoint, limit)), daemon=True)
    thread.start()
    thread.join(limit + ANSWER_SECONDS)
    return found[0] if found else f"no connection in {limit:g} seconds; for a slow network set HF_HUB_ETAG_TIMEOUT=60"


def _try_to_connect(endpoint: str, limit: float) -> str | None:
    # The library's own session: it knows the user's proxies and certificates.
    from huggingface_hub import get_session

    timeout: Any = (limit, ANSWER_SECONDS, ANSWER_SECONDS, limit)
    try:
        get_session().head(endpoint, timeout=timeout)
    except Exception as error:  # the library of the session has changed its name twice
        return None if type(error).__name__ == "ReadTimeout" else first_line(error)
    return None


def _connect_seconds() -> float:
    """Return the limit for a connection: longer if the user has asked the libraries for patience."""
    from huggingface_hub import constants

    asked = os.environ.get("HF_HUB_ETAG_TIMEOUT")
    return CONNECT_SECONDS if asked is None else max(CONNECT_SECONDS, float(constants.HF_HUB_ETAG_TIMEOUT))
