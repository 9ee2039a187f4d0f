"""Rows that say nothing: they are left out of the training, counted, and said."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from gradselect import UsageError
from gradselect.app.data import optional_columns_of, place_of, says_nothing
from gradselect.app.recipe import (
    ClassificationData,
    FileData,
    PreferenceData,
    PromptCompletionData,
    PromptData,
    TextData,
)
from gradselect.usage import printable

from .answer_rows import layout_of
from .sources import Source


def without_empty_rows(
    source: Source, examples: Sequence[dict[str, Any]], settings: FileData, *, where: str = ""
) -> tuple[Source, list[dict[str, Any]], list[str]]:
    """Return source and examples without the rows whose prompt, completion or text is empty.

    A model that is trained on an empty completion learns to stop at once.

    Args:
        source: the rows.
        examples: what each row became.
        settings: the templates.
        where: what the notes call the data: " of the validation data".

    Returns:
        The source and the examples that are left, and a note for each part that is empty somewhere.

    Raises:
        UsageError: no row is left.
    """
    parts = _parts(settings, source)
    notes = list(_never_written(source, parts.values()))
    empty: dict[str, list[int]] = {}
    for index, row in enumerate(source.rows):
        if part := next((part for part, templates in parts.items() if _is_empty(templates, row)), None):
            empty.setdefault(part, []).append(index)
    left_out = {index for indices in empty.values() for index in indices}
    if not left_out:
        return source, list(examples), notes
    if len(left_out) == len(source.rows):
        raise _nothing_left(source, empty, parts)
    notes += [_note(source, part, indices, where=where) for part, indices in empty.items()]
    kept = [index for index in range(len(source.rows)) if index not in left_out]
    return (
        replace(source, rows=source.rows.take(kept), num_empty=len(left_out)),
        [examples[index] for index in kept],
        notes,
    )


def _parts(settings: FileData, source: Source) -> dict[str, tuple[str, ...]]:
    """Return the templates of each part of an example. A part is empty if all its templates are."""
    match settings:
        case PromptCompletionData():
            return {"completion": (settings.completion,), "prompt": (settings.prompt,)}
        case TextData():
            return {"text": (settings.text,)}
        case ClassificationData():
            return {"text": (settings.text, *([settings.text_pair] if settings.text_pair else []))}
        case PreferenceData() | PromptData():
            layout = layout_of(source, settings)
            asked = () if layout.has_messages else ("prompt",)
            return {part: (getattr(settings, part),) for part in dict.fromkeys((*layout.parts, *asked))}
    return {}  # the messages of a conversation are checked one by one


def _is_empty(templates: Sequence[str], row: dict[str, Any]) -> bool:
    return all(says_nothing(template, row) for template in templates)


def _note(source: Source, part: str, indices: Sequence[int], *, where: str) -> str:
    first = place_of(source.rows, indices[0], path=source.path)
    have, are = ("has", "is") if len(indices) == 1 else ("have", "are")
    return (
        f"{len(indices):,} of {len(source.rows):,} rows{where} {have} an empty {part} and {are} left out; the first: "
        f"{first}"
    )


def _nothing_left(source: Source, empty: dict[str, list[int]], parts: dict[str, tuple[str, ...]]) -> UsageError:
    part, indices = max(empty.items(), key=lambda item: len(item[1]))
    template = " and ".join(f"data.{part}={template!r}" for template in parts[part])
    advice = "; for text without prompts write data.format=text data.text='{...}'" if part == "prompt" else ""
    return UsageError(
        f"{source.path}: {len(indices):,} of {len(source.rows):,} rows have an empty {part}, and no row is left: every "
        f"column of {template} is empty; name columns that hold text{advice}"
    )


def _never_written(source: Source, parts: Iterable[tuple[str, ...]]) -> Iterator[str]:
    """Yield a note for each optional part whose column no row has: the name may be wrong."""
    for template in (template for templates in parts for template in templates):
        for column in optional_columns_of(template):
            if not any(column in row for row in source.rows):
                there = printable(", ".join(map(str, source.rows[0])))[:200]
                yield (
                    f"no row of {source.path} has the column {column!r}, so the optional part {{?{column}:...}} is "
                    f"never written; the columns are: {there}"
                )
