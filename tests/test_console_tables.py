"""Tables of commands: nothing is cut, whatever the width of the terminal."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from gradselect.app.progress import print_table

HEADINGS = ("best rate", "steps", "validation loss", "solved", "seconds a step", "peak MiB", "seeds")
ROWS = {
    name: {heading: f"{number}.{place}234 ± 0.01" for place, heading in enumerate(HEADINGS)}
    for number, name in enumerate(("full", "AdaGradSelect 20 % of all blocks", "LoRA r=16 + E"))
}


@pytest.mark.parametrize("width", [50, 60, 80, 120, 300])
def test_no_figure_is_cut_and_no_line_is_wider_than_the_terminal(width: int) -> None:
    """In 80 columns a comparison ended in "AdaG…" and "0.00…"."""
    file = io.StringIO()
    print_table(Console(file=file, width=width), "method", ROWS, title="a comparison")
    lines = [line.rstrip() for line in file.getvalue().splitlines()]
    assert lines[0] == "a comparison"
    assert max(map(len, lines)) <= width
    assert "…" not in file.getvalue()
    for text in (*HEADINGS, *(cell for row in ROWS.values() for cell in row.values())):
        assert sum(line.count(text) for line in lines) == 1, text
    num_tables = sum(line.startswith("method") for line in lines)
    assert all(sum(line.startswith(name) for line in lines) == num_tables for name in ROWS)
    assert (num_tables == 1) == (width == 300)
