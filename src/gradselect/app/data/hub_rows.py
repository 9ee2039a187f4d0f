"""Rows of a data set on the hub."""

from __future__ import annotations

import re

from gradselect.app.runtime import check_hub
from gradselect.usage import UsageError, first_line

from .endings import ENDINGS
from .row import Origin, Rows

_CONFIGURATIONS = re.compile(r"(?:available configs|Available): \[(.+?)\]")


def read_hub_rows(
    name: str, *, key: str, origin: str, subset: str | None = None, split: str = "train", subset_key: str
) -> tuple[Rows, str]:
    """Return the rows of a split and its fingerprint.

    Args:
        name: id of the data set.
        key: name of the setting in errors: "data.path".
        origin: name of the rows in messages.
        subset: configuration of the data set.
        split: split to read.
        subset_key: setting of the configuration, for errors: "data.subset".

    Raises:
        UsageError: there is no such data set, configuration or split, or the hub cannot be reached.
    """
    from datasets import Dataset, load_dataset

    check_hub(name, key=key, kind="dataset")
    try:
        data = load_dataset(name, subset, split=split)
    except (OSError, ValueError) as error:  # errors of the datasets library and of connections are among these
        raise UsageError(f"{key}={name!r} {_explained(error, subset_key=subset_key)}") from None
    assert isinstance(data, Dataset)
    rows = Rows.counted(data.to_list(), Origin(origin))
    if not rows:
        raise UsageError(f"{key}={name!r}: the split {split!r} holds no rows")
    return rows, data._fingerprint


def _explained(error: Exception, *, subset_key: str) -> str:
    known = _CONFIGURATIONS.search(" ".join(str(error).split()))
    if known is not None:
        names = [name.strip(" '\"") for name in known.group(1).split(",")]
        return f"has several configurations: {', '.join(names)}; choose one, e.g. {subset_key}={names[0]}"
    return f"is neither a file ({', '.join(ENDINGS)}) nor a data set on the hub: {first_line(error)}"
