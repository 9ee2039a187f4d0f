"""Preview of data as lines of text and as JSON."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.text import Text

from gradselect.app.inputs import as_percent
from gradselect.app.recipe import ClassificationData, PromptData, is_packed
from gradselect.usage import printable

from .preview import DataPreview, Lengths, ShownRow
from .spans import Piece, Span

LONGEST_SPAN = 600
"""Characters of a stretch of text; of a longer one the middle is left out."""

MOST_PIECES = 3
"""Pieces of a packed row that are shown."""

MOST_LABELS = 20
TRAINED_STYLE = "bold green"


def show(found: DataPreview, console: Console, *, whole: bool) -> None:
    """Print sources, counts, lengths, notes and rows.

    Args:
        found: the preview.
        console: where to print. With colours trained text is green, without it stands in marks. Lines are wrapped in a
            terminal, and elsewhere if the variable COLUMNS is set.
        whole: show the whole text of the rows.
    """
    for heading, line in _facts(found):
        print_line(console, Text(f"{heading:<11}").append(line), indent=11)
    marks = marks_of(console)
    for row in found.rows:
        console.print()
        print_line(console, Text(_title(found, row), style="bold"))
        hidden = 0 if whole else max(0, len(row.pieces) - MOST_PIECES)
        for number, piece in enumerate(row.pieces[: len(row.pieces) - hidden], start=1):
            if len(row.pieces) > 1:
                heading = piece.name or f"piece {number} of {len(row.pieces)}"
                print_line(console, Text(f"  {heading}: {tokens_of(piece)}", style="dim"))
            for line in _text(piece, marks, whole=whole).split("\n", allow_blank=True):
                print_line(console, Text("  ").append_text(line), indent=2)
        if hidden:
            print_line(console, Text(f"  and {hidden:,} more pieces; --row {row.number} shows all", style="dim"))
    if found.rows and not isinstance(found.recipe.data, ClassificationData | PromptData):
        name = f"{marks[0]} {marks[1]}" if marks else "green"
        words = f"\n{name}: tokens that the loss counts. Nothing predicts the first token of a piece."
        print_line(console, Text(words))


def as_json(found: DataPreview) -> dict[str, Any]:
    """Return the preview as plain values."""
    lengths = {"all": found.lengths, "trained": found.trained_lengths}
    return {
        "format": found.recipe.data.format,
        "packing": is_packed(found.recipe.data),
        "max_length": found.max_length,
        "data": found.sources,
        "token_counts": {name: counts.values() for name, counts in found.counts.items()},
        "lengths": {name: asdict(part) for name, part in lengths.items() if part is not None},
        "padding": None if found.padding is None else asdict(found.padding),
        "steps_per_epoch": found.steps_per_epoch,
        "labels": found.labels,
        "scores": None if found.scores is None else asdict(found.scores),
        "notes": list(found.notes),
        "rows": [asdict(row) for row in found.rows],
    }


def _facts(found: DataPreview) -> Iterator[tuple[str, str]]:
    data, train = found.recipe.data, found.counts["train"]
    for name, source in found.sources.items():
        heading = "data" if name == "train" else name
        yield heading, f"{printable(str(source['path']))}, {source['rows_used']:,} rows, format {data.format}"
    for name, counts in found.counts.items():
        heading = "tokens" if name == "train" else ""
        where = "" if name == "train" else f"{name}: "
        left = as_percent(1 - counts.share_left_out)
        line = f"{where}{counts.tokens:,} in the data, {counts.tokens_in_rows:,} ({left}) in rows"
        if counts.tokens_trained is not None:
            share = as_percent(counts.tokens_trained / max(1, counts.tokens_in_rows))
            line += f", {counts.tokens_trained:,} ({share}) trained on"
        yield heading, line
    yield "lengths", f"{_lengths(found.lengths)} tokens of an example"
    if found.trained_lengths is not None:
        yield "", f"{_lengths(found.trained_lengths)} of them trained on"
    packed = ""
    if is_packed(data):
        packed = f", {as_percent(train.tokens_in_rows / (train.rows * found.max_length))} full"
    yield "rows", f"{train.rows:,} of at most {found.max_length:,} tokens{packed}"
    continued = f"{train.examples_continued:,} go on in further rows, "
    lost = f"{train.examples_dropped:,} dropped, {train.examples_untrained:,} of a single token"
    yield "cut", f"{train.examples_cut:,} examples lose their end, {continued if is_packed(data) else ''}{lost}"
    if found.padding is not None:
        yield "padding", _padding(found)
    if found.labels:
        shares = [f"{printable(name)} {count:,}" for name, count in found.labels.items()]
        more = f" and {len(shares) - MOST_LABELS:,} more" if len(shares) > MOST_LABELS else ""
        yield "labels", ", ".join(shares[:MOST_LABELS]) + more
    if found.scores is not None:
        yield "scores", _lengths(found.scores)
    yield "steps", _steps(found)
    for note in found.notes:
        yield "note", printable(note)


def print_line(console: Console, line: Text, *, indent: int = 0) -> None:
    """Print a line; what is wrapped stands `indent` columns to the right."""
    line.rstrip()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.print(line, soft_wrap=True)
        return
    head, rest = line[:indent], line[indent:]
    for part in rest.wrap(console, max(20, console.width - indent)):
        part.rstrip()
        console.print(head + part, soft_wrap=True)
        head = Text(" " * indent)


def _lengths(found: Lengths) -> str:
    smallest, median, percentile_95, largest = (_number(value) for value in asdict(found).values())
    return f"min {smallest}, median {median}, 95 % up to {percentile_95}, max {largest}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) else f"{value:.4g}"


def _padding(found: DataPreview) -> str:
    assert found.padding is not None
    run, at_random, grouped = found.recipe.run, as_percent(found.padding.random), as_percent(found.padding.grouped)
    if run.group_by_length:
        return f"{grouped} of the tokens of batches of {run.batch_size} rows; {at_random} without run.group_by_length"
    line = f"{at_random} of the tokens of batches of {run.batch_size} rows"
    return f"{line}; run.group_by_length=true leaves {grouped}" if at_random != grouped else line


def _steps(found: DataPreview) -> str:
    run, per_epoch = found.recipe.run, found.steps_per_epoch
    times = f" x run.accumulation={run.accumulation}" if run.accumulation > 1 else ""
    line = f"{per_epoch:,} per epoch on one process (run.batch_size={run.batch_size}{times})"
    if run.steps is not None:
        return f"{line}; {run.steps:,} steps are {run.steps / per_epoch:,.2f} epochs"
    return f"{line}; run.epochs={run.epochs or 1:g}"


def _title(found: DataPreview, row: ShownRow) -> str:
    together = Piece(spans=tuple(span for piece in row.pieces for span in piece.spans))
    kind = "answers" if row.pieces[0].name else "pieces"
    pieces = f"{len(row.pieces):,} {kind}, " if len(row.pieces) > 1 else ""
    label = "" if row.label is None else f", label {printable(row.label)}"
    return f"row {row.number:,} of {found.counts['train'].rows:,}: {pieces}{tokens_of(together)}{label}"


def tokens_of(piece: Piece) -> str:
    """Return the numbers of tokens of a piece."""
    return f"{piece.num_tokens:,} tokens, {piece.num_trained:,} trained on"


def marks_of(console: Console) -> tuple[str, str] | None:
    """Return what stands around trained text; None: it has a colour."""
    if console.color_system is not None and not console.no_color:
        return None
    try:
        "⟦⟧".encode(console.encoding)
    except (UnicodeEncodeError, LookupError):
        return "[[", "]]"
    return "⟦", "⟧"


def _text(piece: Piece, marks: tuple[str, str] | None, *, whole: bool) -> Text:
    text = Text()
    for span in piece.spans:
        words = visible(span, longest=None if whole else LONGEST_SPAN)
        if not span.is_trained:
            text.append(words)
        elif marks is None:
            text.append(words, style=TRAINED_STYLE)
        else:
            text.append(f"{marks[0]}{words}{marks[1]}")
    return text


def visible(span: Span, *, longest: int | None) -> str:
    """Return the text of a span; characters other than line ends that cannot be shown become escape codes.

    If it is longer than `longest` characters, its middle is left out.
    """
    text = span.text
    if longest is not None and len(text) > longest:
        half = longest // 2
        text = f"{text[:half]} ... {len(text) - 2 * half:,} characters ... {text[-half:]}"
    return "\n".join(printable(line) for line in text.split("\n"))
