"""Rows of a data set on the hub."""

from __future__ import annotations

import re

from gradselect.app.runtime import check_hub
from gradselect.usage import UsageError, shortened

from .endings import ENDINGS
from .row import Origin, Rows

LONGEST_REASON = 600
"""Characters of a library's error in a message: that of files with unlike columns names them behind some 100."""
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
        UsageError: there is no such data set, configuration or split, its files cannot be read, or the hub cannot be
            reached.
    """
    from datasets import Dataset, load_dataset

    check_hub(name, key=key, kind="dataset")
    try:
        data = load_dataset(name, subset, split=split)
        assert isinstance(data, Dataset)
        rows = Rows.counted(data.to_list(), Origin(origin))  # decodes images and sound, if a package for it is there
    except Exception as error:  # of any kind: connections, files of other columns, scripts that no version runs now
        raise UsageError(f"{key}={name!r} {_explained(error, subset_key=subset_key)}") from None
    if not rows:
        raise UsageError(f"{key}={name!r}: the split {split!r} holds no rows")
    return rows, data._fingerprint


def _explained(error: Exception, *, subset_key: str) -> str:
    from datasets.exceptions import DatasetGenerationError

    if isinstance(error, DatasetGenerationError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # its own text says nothing
    text = " ".join(str(error).split()) or type(error).__name__
    known = _CONFIGURATIONS.search(text)
    if known is not None:
        names = [name.strip(" '\"") for name in known.group(1).split(",")]
        return f"has several configurations: {', '.join(names)}; choose one, e.g. {subset_key}={names[0]}"
    return (
        f"is no file here ({', '.join(ENDINGS)}), and cannot be read as a data set on the hub: "
        f"{shortened(text, limit=LONGEST_REASON)}"
    )
