"""Rows that stand in the training data and in the validation data: they are kept, counted, and said."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gradselect.app.data import place_of

from .sources import Source


def repetition_notes(sources: Mapping[str, Source], examples: Mapping[str, Sequence[dict[str, Any]]]) -> list[str]:
    """Return a note if rows of the validation data are rows of the training data too.

    Their loss is that of rows that were trained on, and may be smallest where a model learnt them by heart.

    Args:
        sources: rows of "train" and, if there is one, "validation".
        examples: what each row became. Rows are the same if this is.
    """
    if "validation" not in examples:
        return []
    keys = [repr(example) for example in examples["validation"]]
    wanted = set(keys)
    trained_on = {key for key in map(repr, examples["train"]) if key in wanted}
    indices = [index for index, key in enumerate(keys) if key in trained_on]
    if not indices:
        return []
    source = sources["validation"]
    first = place_of(source.rows, indices[0], path=source.path)
    are = "is" if len(indices) == 1 else "are"
    return [
        f"{len(indices):,} of {len(keys):,} rows of the validation data {are} in the training data too, so the "
        f"validation loss is not that of unseen text; keep each row once. The first: {first}"
    ]
