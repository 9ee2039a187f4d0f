"""What the tests of searches share: trials as Optuna reads them, and a watch on connections."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
from sqlalchemy import event
from sqlalchemy.pool import Pool


@contextmanager
def stored_study(folder: Path) -> Iterator[optuna.Study]:
    """The only study in the folder of a search."""
    storage = optuna.storages.RDBStorage(f"sqlite:///{folder / 'trials.db'}")
    try:
        yield optuna.load_study(study_name=None, storage=storage)
    finally:
        storage.remove_session()
        storage.engine.dispose()


@contextmanager
def closing_connections() -> Iterator[None]:
    """Fail if a connection of SQLAlchemy that is opened here stays open. Python 3.13 warns when it is collected."""
    still_open = set[int]()

    def opened(connection: Any, record: Any) -> None:
        still_open.add(id(connection))

    def closed(connection: Any, record: Any) -> None:
        still_open.discard(id(connection))

    event.listen(Pool, "connect", opened)
    event.listen(Pool, "close", closed)
    try:
        yield
    finally:
        event.remove(Pool, "connect", opened)
        event.remove(Pool, "close", closed)
    assert not still_open
