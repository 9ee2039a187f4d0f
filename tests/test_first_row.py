"""The first training row at the start of a run."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from classification_fixtures import classify, write_place
from rich.console import Console
from train_fixtures import parse, write_model

from gradselect.app.inputs import make_rows, read_data
from gradselect.app.preview import show_first_row
from gradselect.app.progress import Stages
from gradselect.app.recipe import Recipe


@pytest.fixture(autouse=True)
def _no_width(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever runs the tests may have set the width of a terminal."""
    monkeypatch.delenv("COLUMNS", raising=False)


def shown(recipe: Recipe, **options: Any) -> list[str]:
    """Return the lines that a run of the recipe begins with."""
    data, file = read_data(recipe), io.StringIO()
    rows = make_rows(data.examples, recipe.data, tokenizer=data.tokenizer, max_length=data.max_length)
    show_first_row(rows["train"].dataset, recipe, data, Console(**{"file": file, "width": 80} | options))
    return file.getvalue().splitlines()


def test_what_counts_in_the_loss_is_marked(place: Path) -> None:
    assert shown(parse(place)) == [
        "first row  10 tokens, 6 trained on (⟦ ⟧); gradselect data shows more",
        "  0+0?⟦ is 0<end>⟧",
    ]


def test_in_a_terminal_it_is_green(place: Path) -> None:
    lines = shown(parse(place), force_terminal=True, color_system="standard", width=80)
    assert "(green)" in lines[0]
    assert lines[1] == "  0+0?\x1b[1;32m is 0<end>\x1b[0m"


def test_a_long_row_is_cut_and_the_rest_counted(tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    rows = [{"question": "q" * 20, "answer": "a" * 400}] * 2
    (tmp_path / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 512}))
    (line,) = shown(parse(tmp_path, data={"max_length": 512}))[1:]
    assert line.startswith(f"  {'q' * 20}⟦ aaa")
    assert " ... 106 characters ... " in line
    assert line.endswith("<end>⟧")


def test_of_packed_rows_two_pieces_are_shown(place: Path) -> None:
    lines = shown(parse(place, data={"packing": True, "max_length": 64}))
    assert "pieces; gradselect data shows more" in lines[0]
    assert lines[-1].startswith("  ... and ")
    assert lines[-1].endswith(" more tokens")
    assert len(lines) == 4


def test_a_text_is_shown_with_its_label(tmp_path: Path) -> None:
    place = write_place(tmp_path)
    lines = shown(classify(place, tmp_path / "out"))
    assert lines[0].endswith("label bad; gradselect data shows more")
    assert 'b "text of length' in lines[1]


def test_a_console_of_another_encoding_gets_escape_codes(tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    rows = [{"question": "é?", "answer": "→"}] * 2
    (tmp_path / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    file = io.TextIOWrapper(io.BytesIO(), encoding="latin-1", write_through=True)
    recipe = parse(tmp_path)
    data = read_data(recipe)
    rows = make_rows(data.examples, recipe.data, tokenizer=data.tokenizer, max_length=data.max_length)
    show_first_row(rows["train"].dataset, recipe, data, Console(file=file, width=80))
    Stages(Console(file=file, width=80)).say("→")
    assert file.buffer.getvalue().decode("latin-1").splitlines()[1:] == [  # pyright: ignore
        "  é?[[ \\u2192<end>]]",
        "\\u2192",
    ]


def test_random_tokens_are_not_shown(place: Path) -> None:
    assert shown(parse(place, data={"format": "random", "length": 8, "rows": 4})) == []
