"""Rows of a run and their origins: files, folders, and data sets on the hub."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from pathlib import Path

from gradselect import UsageError
from gradselect.app.data import (
    VALIDATION_SPLITS,
    Rows,
    check_local,
    data_fingerprint,
    ending_of,
    is_local,
    names_split,
    place_of,
    read_hub_rows,
    read_rows,
)
from gradselect.app.recipe import FileData


@dataclass(frozen=True, kw_only=True)
class Source:
    """Rows and their origin.

    Args:
        path: for messages and `run.json`: path of the file, or id and split of the hub data set; for a held-out share
            also the number of rows. A resumed run may have another.
        fingerprint: SHA-256 of the file, or the fingerprint of the datasets library.
        rows: rows that are used.
        num_empty: rows that are left out because they are empty.
    """

    path: str
    fingerprint: str
    rows: Rows
    num_empty: int = 0

    def name_row(self, number: int) -> str:
        """Return the place of a row, counted from 1, for messages."""
        return place_of(self.rows, number - 1, path=self.path)

    def describe(self) -> dict[str, str | int]:
        """Return the entry of `run.json`."""
        empty = {"rows_empty": self.num_empty} if self.num_empty else {}
        return {"path": self.path, "fingerprint": self.fingerprint, "rows_used": len(self.rows), **empty}


def read_sources(settings: FileData, *, seed: int) -> dict[str, Source]:
    """Return the rows to train on ("train") and those to evaluate on, if any ("validation").

    `seed` draws the held-out share.

    Raises:
        UsageError: a file cannot be read, a setting does not fit it, or too few rows are left.
    """
    if is_local(settings.path):
        check_local(settings.path, subset=settings.subset, split=settings.split, default="train")
    if settings.validation is None and settings.validation_limit is not None:
        raise UsageError(
            f"data.validation_limit={settings.validation_limit} is for validation data, and data.validation is not "
            "set; write e.g. data.validation=0.02, or data.validation_limit=null"
        )
    train = _first(_read(settings.path, settings, splits=(settings.split,)), settings.limit)
    match settings.validation:
        case None:
            return {"train": train}
        case str(name) if names_split(name, of=settings.path, rows_key=settings.rows_key):
            validation = _read_split(name, settings)
        case str(name):
            validation = _read(name, settings, splits=VALIDATION_SPLITS)
        case share:
            train, validation = _hold_out(train, share, seed=seed)
    return {"train": train, "validation": _first(validation, settings.validation_limit)}


def _read_split(name: str, settings: FileData) -> Source:
    try:
        return _read(settings.path, settings, splits=(name,), is_validation=True)
    except UsageError as error:
        if not Path(name).exists():
            raise
        raise UsageError(f"{error}. If {name!r} here is meant, write data.validation=./{name}") from None


def _read(path: str, settings: FileData, *, splits: tuple[str, ...], is_validation: bool = False) -> Source:
    """Read a file, a folder, or a data set on the hub.

    Args:
        path: file, folder, or id on the hub.
        settings: how it is read.
        splits: splits that are meant, the best first.
        is_validation: they name a part of the source of the training data.
    """
    if is_local(path):
        return _read_local(path, settings, splits=splits, is_validation=is_validation)
    split = splits[0]
    name, subset = f"{path} [{split}]", settings.subset if path == settings.path else None
    rows, found = read_hub_rows(
        path, key="data.path", origin=name, subset=subset, split=split, subset_key="data.subset"
    )
    return Source(path=name, fingerprint=found, rows=rows)


def _read_local(path: str, settings: FileData, *, splits: tuple[str, ...], is_validation: bool) -> Source:
    name, rows_key = path, settings.rows_key
    if is_validation:
        if not Path(path).is_dir() and ending_of(path) != ".json":
            raise UsageError(
                f"data.validation={splits[0]!r} is no file here, and {path} has no splits; write a share (0.02) "
                "or a file"
            )
        name, rows_key = f"{path} [{splits[0]}]", None if Path(path).is_dir() else splits[0]
    rows = read_rows(path, columns=settings.columns, rows_key=rows_key, splits=splits, needs_split=is_validation)
    return Source(path=name, fingerprint=data_fingerprint(path, splits, needs_split=is_validation), rows=rows)


def _first(source: Source, limit: int | None) -> Source:
    return replace(source, rows=source.rows[:limit])


def _hold_out(source: Source, share: float, *, seed: int) -> tuple[Source, Source]:
    """Split off a random share of the rows. Both parts keep the file's order and have at least one row."""
    count = max(1, round(share * len(source.rows)))
    if count >= len(source.rows):
        raise UsageError(
            f"{source.path}: data.validation={share} holds out {count} of {len(source.rows)} rows and leaves none to "
            "train on; use a file with more rows, or name a validation file"
        )
    held_out = set(random.Random(f"validation/{seed}").sample(range(len(source.rows)), count))
    kept = source.rows.take([index for index in range(len(source.rows)) if index not in held_out])
    taken = source.rows.take(sorted(held_out))
    name = f"{source.path} ({count:,} of {len(source.rows):,} rows held out)"
    return replace(source, rows=kept), replace(source, path=name, rows=taken)
