"""First training row as the model reads it, for the start of a run."""

from __future__ import annotations

from datasets import Dataset
from rich.console import Console
from rich.text import Text

from gradselect.app.inputs import DataInputs, Inputs
from gradselect.app.progress import encodable
from gradselect.app.recipe import ClassificationData, PromptData, RandomData, Recipe

from .layout import TRAINED_STYLE, marks_of, print_line, tokens_of, visible
from .preview import shown_row
from .spans import Piece

LONGEST_SPAN = 300
"""Characters of a stretch of text; of a longer one the middle is left out."""
MOST_CHARACTERS = 1200
"""Characters of the row."""
MOST_PIECES = 2


def show_first_row(rows: Dataset, recipe: Recipe, inputs: Inputs | DataInputs, console: Console) -> None:
    """Print the first row: what counts in the loss is green, or stands in marks where there are no colours.

    Prints nothing for random tokens.

    Args:
        rows: rows that the trainer reads.
        recipe: the recipe.
        inputs: what was read for it.
        console: where to print.
    """
    if isinstance(recipe.data, RandomData) or console.quiet:
        return
    row, marks = shown_row(rows, 1, recipe, inputs), marks_of(console)
    together = Piece(spans=tuple(span for piece in row.pieces for span in piece.spans))
    is_prompt = isinstance(recipe.data, PromptData)
    tokens = f"{together.num_tokens:,} tokens, a prompt to answer" if is_prompt else tokens_of(together)
    facts = tokens + ("" if row.label is None else f", label {row.label}")
    if not isinstance(recipe.data, ClassificationData | PromptData):
        facts += f" ({' '.join(marks)})" if marks else " (green)"
    pieces = f" in {len(row.pieces):,} pieces" if len(row.pieces) > 1 else ""
    print_line(console, Text(f"first row  {facts}{pieces}; gradselect data shows more"), indent=11)
    room, left = MOST_CHARACTERS, together.num_tokens
    for piece in row.pieces[:MOST_PIECES]:
        text = Text()
        for span in piece.spans:
            words = encodable(visible(span, longest=LONGEST_SPAN), console)
            if len(words) > room:
                break
            room, left = room - len(words), left - span.num_tokens
            before, behind = marks if marks and span.is_trained else ("", "")
            text.append(f"{before}{words}{behind}", style=TRAINED_STYLE if span.is_trained and not marks else "")
        for line in text.split("\n", allow_blank=True):
            print_line(console, Text("  ").append_text(line), indent=2)
    if left:
        print_line(console, Text(f"  ... and {left:,} more tokens"))
