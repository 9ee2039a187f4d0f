"""`gradselect data`: what a run would train on, as the model reads it, without weights."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from train_fixtures import MARKED_CHAT_TEMPLATE, write_model, write_recipe, write_sums

from gradselect.app.cli import main

TOOLS_TEMPLATE = "{% if tools %}{{ tools | tojson }}{% endif %}" + MARKED_CHAT_TEMPLATE.replace(
    "{% generation %}{{ message['content'] }}",
    "{% generation %}{{ message['content'] or '' }}"
    "{% for call in message['tool_calls'] or [] %}<call>{{ call['function'] | tojson }}</call>{% endfor %}",
)


@pytest.fixture(autouse=True)
def no_width(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers of pytest-xdist have a width, at which lines are wrapped."""
    monkeypatch.delenv("COLUMNS", raising=False)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with models without weights, and files of every format."""
    folder = tmp_path_factory.mktemp("data")
    for name, template in {"model": None, "chat": TOOLS_TEMPLATE}.items():
        write_model(folder / name, chat_template=template)
        (folder / name / "model.safetensors").unlink()
    widen(folder / "chat")
    write_sums(folder / "sums.jsonl")
    call = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": {"at": "sky"}}}
    turns = [
        {"role": "user", "content": "Up?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "blue"},
        {"role": "assistant", "content": "Blue."},
    ]
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
    write_lines(folder / "chat.jsonl", [{"messages": turns, "tools": [tool]}])
    write_lines(folder / "texts.jsonl", [{"text": "one\n\x1b[31mtwo"}, {"text": "long " * 20}, {"text": "three"}])
    labels = [{"sentence": f"number {n}", "label": "odd" if n % 2 else "even"} for n in range(9)]
    write_lines(folder / "labels.jsonl", labels)
    return folder


def widen(model: Path) -> None:
    """Let a model read longer rows."""
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 4096}))


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("\n".join(map(json.dumps, rows)))


def shown(place: Path, capsys: pytest.CaptureFixture[str], *options: str, **sections: Any) -> str:
    recipe = write_recipe(place, place / "recipe.yaml", **sections)
    with pytest.raises(SystemExit) as raised:
        main(["data", str(recipe), *options])
    if raised.value.code:
        raise raised.value
    return capsys.readouterr().out


def test_answers_are_marked_and_counted(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(place, capsys)
    assert "row 1 of 24: 10 tokens, 6 trained on\n  0+0?⟦ is 0<end>⟧" in text
    assert ", 24 rows, format prompt-completion" in text
    assert re.search(r"padding    [\d.]+ % of the tokens of batches of 4 rows", text)
    assert "steps      6 per epoch on one process (run.batch_size=4); 4 steps are 0.67 epochs" in text
    assert "lengths    min 10, median 15, 95 % up to 15, max 15 tokens of an example" in text


def test_tools_and_calls_are_seen_as_the_model_sees_them(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = {"format": "chat", "path": str(place / "chat.jsonl"), "loss_on": "answers", "max_length": 512}
    text = shown(place, capsys, data=data, model={"path": str(place / "chat")})
    assert '[{"type": "function", "function": {"name": "look"' in text
    assert 'assistant: ⟦<call>{"name": "look", "arguments": {"at": "sky"}}</call><end>⟧tool: blue' in text
    assert "assistant: ⟦Blue.<end>⟧" in text


def test_a_packed_text_shows_its_pieces_and_loses_nothing(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = {"format": "text", "path": str(place / "texts.jsonl"), "packing": True, "max_length": 64}
    text = shown(place, capsys, data=data)
    assert "1 of 3 documents are longer than data.max_length=64 and go on in further rows: no token is left out" in text
    assert "row 2 of 2: 3 pieces" in text
    assert "piece 3 of 3: 6 tokens, 5 trained on\n  t⟦hree<end>⟧" in text
    assert "gradselect train also checks" in text


def test_characters_that_move_the_cursor_are_shown_as_codes(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(place, capsys, "--row", "1", data={"format": "text", "path": str(place / "texts.jsonl")})
    assert "\x1b" not in text
    assert "  o⟦ne\n  \\x1b[31mtwo<end>⟧" in text


def test_what_is_cut_and_dropped_is_counted(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(shown(place, capsys, "--json", "data.max_length=6"))
    counts, notes = found["token_counts"]["train"], " ".join(found["notes"])
    assert counts["examples_cut"] + counts["examples_dropped"] == 24
    assert counts["tokens_in_rows"] == 6 * counts["rows"]
    assert "lose their end" in notes
    assert "were dropped" in notes


def test_labels_are_counted(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = {"format": "classification", "path": str(place / "labels.jsonl"), "validation": 0.12}
    text = shown(place, capsys, data=data)
    assert "labels     even 4, odd 4" in text or "labels     even 5, odd 3" in text
    assert "row 1 of 8: 8 tokens, 0 trained on, label even" in text
    assert "validation" in text


def test_scores_have_a_distribution(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_lines(place / "scores.jsonl", [{"sentence": f"number {n}", "label": n / 4} for n in range(9)])
    data = {"format": "classification", "path": str(place / "scores.jsonl"), "regression": True}
    text = shown(place, capsys, data=data)
    assert "scores     min 0, median 1, 95 % up to 2, max 2" in text
    assert "label 0.0" in text


def test_random_rows_are_shown_as_numbers(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(place, capsys, "--examples", "1", data={"format": "random", "length": 4, "rows": 5})
    assert "20 in the data, 20 (100 %) in rows, 15 (75 %) trained on" in text


def test_a_row_is_shown_whole_and_must_exist(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_lines(place / "one.jsonl", [{"text": "x" * 2000}])
    widen(model := write_model(place / "wide"))
    data = {"format": "text", "path": str(place / "one.jsonl"), "max_length": 4096}
    sections = {"data": data, "model": {"path": str(model)}}
    assert "x ... 1,404 characters ... x" in shown(place, capsys, **sections)
    assert "x" * 1999 in shown(place, capsys, "--row", "1", **sections)
    with pytest.raises(SystemExit, match="2"):
        shown(place, capsys, "--row", "2", **sections)
    assert "error: --row=2: the rows are numbered from 1 to 1" in capsys.readouterr().err


def test_without_an_encoding_for_them_marks_are_plain(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rich.console.Console.encoding", "ascii")
    assert "0+0?[[ is 0<end>]]" in shown(place, capsys, "--examples", "1")


def test_in_a_terminal_trained_text_has_a_colour_and_lines_fit(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"FORCE_COLOR": "1", "TERM": "xterm-256color", "COLUMNS": "60"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "0+0?\x1b[1;32m is 0<end>\x1b[0m" in shown(place, capsys, "--examples", "1")
    monkeypatch.setenv("NO_COLOR", "1")
    plain = shown(place, capsys, "--examples", "1")
    assert "0+0?⟦ is 0<end>⟧" in plain
    assert max(map(len, plain.splitlines())) <= 60 + len("\x1b[1m\x1b[0m")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.path=nowhere.jsonl", "no such file"),
        ("model.path=./nowhere", "no such folder"),
        ("data.prompt={nothing}", "nothing"),
        ("data.max_length=2", "leaves nothing of data.path"),
        ("data.maxlength=2", "unknown key"),
    ],
)
def test_mistakes_end_with_one_message(
    place: Path, capsys: pytest.CaptureFixture[str], override: str, words: str
) -> None:
    with pytest.raises(SystemExit, match="2"):
        shown(place, capsys, override)
    said = capsys.readouterr()
    assert words in said.err
    assert said.out == ""
