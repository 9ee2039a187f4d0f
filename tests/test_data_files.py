"""Data files as they are found: JSON of every shape, long cells, compressed files."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import logging
import lzma
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from data_support import LINES, ROWS, put, texts
from pydantic import TypeAdapter

from gradselect import UsageError
from gradselect.app.data import ENDINGS, ending_of, place_of, read_rows, text_lines
from gradselect.app.data.rows import _READERS
from gradselect.app.data.text_lines import COMPRESSIONS
from gradselect.app.evaluate import EvaluationSettings
from gradselect.app.evaluate.problems import passages, read_source
from gradselect.app.inputs.examples import render_examples
from gradselect.app.recipe import Data

# JSON of every shape -------------------------------------------------------------------------------------------------

SHAPES: dict[str, tuple[str, str]] = {
    "lines in .json": ("a.json", LINES),
    "lines in .json after empty ones": ("a.json", "\n \n" + LINES.replace("\n", "\n\n")),
    "lines in .ndjson": ("a.ndjson", LINES),
    "a list in .jsonl": ("a.jsonl", json.dumps(ROWS)),
    "a long list in .jsonl": ("a.jsonl", json.dumps(ROWS, indent=2)),
    "under a key": ("a.json", json.dumps({"version": 1, "data": ROWS, "empty": [], "tags": ["x"]})),
    "below two keys": ("a.json", json.dumps({"data": {"train": ROWS}, "about": {"name": "x"}})),
    "as pandas writes a table": (
        "a.json",
        json.dumps({"schema": {"fields": [{"name": "text"}], "primaryKey": ["index"]}, "data": ROWS}),
    ),
}


@pytest.mark.parametrize(("name", "text"), SHAPES.values(), ids=list(SHAPES))
def test_json_of_every_shape_gives_the_same_rows(tmp_path: Path, name: str, text: str) -> None:
    assert read_rows(put(tmp_path, {name: text}) / name) == ROWS


def test_the_key_of_the_rows_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = put(tmp_path, {"a.json": json.dumps({"data": ROWS})}) / "a.json"
    read_rows(path)
    assert caplog.messages == [f"{path}: read the 3 rows under the key 'data'"]


def test_several_lists_are_named_with_what_to_type(tmp_path: Path) -> None:
    path = put(tmp_path, {"a.json": json.dumps({"train": ROWS, "test": ROWS[:1]})}) / "a.json"
    with pytest.raises(
        UsageError, match=r"several lists of rows: train \(3 rows\), test \(1 rows\); write data\.rows_key=tr"
    ):
        read_rows(path)
    assert read_rows(path, rows_key="test") == ROWS[:1]
    with pytest.raises(UsageError, match=r"rows_key='dev' holds no list of objects; lists of objects are: train"):
        read_rows(path, rows_key="dev")


def test_a_recipe_names_the_key_and_the_key_of_its_validation_data(tmp_path: Path) -> None:
    path = put(tmp_path, {"a.json": json.dumps({"train": ROWS, "test": ROWS[:1]})}) / "a.json"
    values = {"format": "text", "path": str(path), "rows_key": "train", "validation": "test"}
    rendered = render_examples(TypeAdapter(Data).validate_python(values), seed=0)
    assert {name: len(rows) for name, rows in rendered.rows.items()} == {"train": 3, "validation": 1}
    given = EvaluationSettings(model="any", task="loss", data=path, rows_key="test")
    assert len(read_source(given).rows) == 1


BROKEN_JSON: dict[str, tuple[str, str, list[str]]] = {
    "second line": ("a.json", '{"text": "a"}\n{"text": }\n', ["a.json, line 2: broken JSON"]),
    "second line no object": (
        "a.json",
        '{"text": "a"}\n\n[1]\n',
        ["a.json, line 3: expected an object", "a list: [1]"],
    ),
    "objects of several lines": ("a.json", '{\n"a": 1\n}\n{\n"a": 2\n}', ["line 3: another object follows", "jq -c"]),
    "list after a list": ("a.json", '[{"a": 1}]\n[{"a": 1}]', ["a.json, line 2: broken JSON (Extra data"]),
    "columns": ("a.json", '{"text": {"0": "a", "1": "b"}}', ["expected a list of objects", "orient='records'"]),
    "one conversation": ("a.json", '{"messages": [{"role": "user", "content": "x"}]}', ["expected a list of objects"]),
    "item under a key": ("a.json", '{"data": [{"text": "a"}, 7]}', ["a.json, item 2 of 'data': expected an object"]),
    "list with a number in .jsonl": ("a.jsonl", '[{"a": 1}, 7]', ["a.jsonl, line 1: expected an object", "a list"]),
    "key twice": ("a.json", '{"data": [{"a": 1}], "data": [{"a": 2}]}', ["the key 'data' stands twice"]),
}


@pytest.mark.parametrize(("name", "text", "said"), BROKEN_JSON.values(), ids=list(BROKEN_JSON))
def test_broken_json_is_named_with_its_line(tmp_path: Path, name: str, text: str, said: list[str]) -> None:
    with pytest.raises(UsageError) as raised:
        read_rows(put(tmp_path, {name: text}) / name)
    assert all(part in str(raised.value) for part in said), raised.value


@pytest.mark.parametrize(
    ("name", "text"), [("a.json", "[{}]"), ("a.json", LINES), ("a.jsonl", LINES), ("a.csv", "a\n1\n")]
)
def test_a_key_of_rows_that_does_not_fit_the_file_is_refused(tmp_path: Path, name: str, text: str) -> None:
    with pytest.raises(UsageError, match=r"data\.rows_key='data' is for .*leave it out"):
        read_rows(put(tmp_path, {name: text}) / name, rows_key="data")


# Places --------------------------------------------------------------------------------------------------------------


def test_rows_know_their_lines_through_slices_and_choices(tmp_path: Path) -> None:
    folder = put(
        tmp_path, {"a.jsonl": '{"n": 1}\n\n\n{"n": 2}\n{"n": 3}\n', "b.csv": 'n\n"1\n1"\n2\n', "c.txt": "\nx\n"}
    )
    rows = read_rows(folder / "a.jsonl")
    assert [rows.place(index) for index in range(3)] == [f"{folder / 'a.jsonl'}, line {line}" for line in (1, 4, 5)]
    assert rows[1:].place(0).endswith("line 4")
    assert rows[-1:] == [{"n": 3}]
    assert rows.take([2, 0]).place(0).endswith("line 5")
    assert rows.map(lambda row: {**row, "m": 1})[1:].place(1).endswith("line 5")
    table = read_rows(folder / "b.csv")
    assert [table.place(index)[-6:] for index in range(2)] == ["line 2", "line 4"]
    assert read_rows(folder / "c.txt").place(0).endswith("c.txt, line 2")
    assert place_of([{}], 0, path="x") == "x: row 1"


def test_held_out_rows_are_named_by_their_own_lines(tmp_path: Path) -> None:
    lines = [json.dumps({"text": None if number == 7 else "t"}) for number in range(1, 9)]
    path = put(tmp_path, {"a.jsonl": "\n".join(lines)}) / "a.jsonl"
    for seed in range(6):
        values = {"format": "text", "path": str(path), "validation": 0.5}
        with pytest.raises(UsageError, match=r"a\.jsonl, line 7: column 'text' is null"):
            render_examples(TypeAdapter(Data).validate_python(values), seed=seed)


# Tables --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.csv.gz"])
def test_long_cells_are_read_and_the_limit_of_the_process_stays(tmp_path: Path, name: str) -> None:
    before = csv.field_size_limit()
    long = "word " * 40_000 if "tsv" in name else 'line, "one"\n' * 20_000
    quoted = long if "tsv" in name else '"' + long.replace('"', '""') + '"'
    content = f"text\n{quoted}\nshort\n".encode()
    path = put(tmp_path, {name: gzip.compress(content) if name.endswith("gz") else content}) / name
    assert texts(path) == [long, "short"]
    assert csv.field_size_limit() == before


def test_an_open_quote_is_named_with_the_line_where_it_opens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gradselect.app.data.table_rows.LONGEST_FIELD", 200_000)
    before = csv.field_size_limit()
    text = 'a,b\n1,2\n3,"open\n' + "x,y\n" * 60_000
    path = put(tmp_path, {"a.csv": text}) / "a.csv"
    with pytest.raises(UsageError, match=r"a\.csv, line 3: broken line \(a cell of more than 200,000 char.*left open"):
        read_rows(path)
    path.write_text('a,b\n1,2\n3,"open\n4,5\n')
    with pytest.raises(UsageError, match=r"a\.csv, line 3: broken line \(unexpected end of data; is a quote sign left"):
        read_rows(path)
    assert csv.field_size_limit() == before


def test_tables_are_read_by_several_threads_at_once(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    path = put(tmp_path, {"a.csv": "text\n" + f"{'w' * 200_000}\n" * 20}) / "a.csv"
    found: list[int] = []
    threads = [threading.Thread(target=lambda: found.append(len(read_rows(path)))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [20] * 4
    assert csv.field_size_limit() == before


def test_cells_with_the_quotes_of_csv_in_a_tsv_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """`to_csv(sep="\\t")` of pandas doubles quote signs; they would be trained on."""
    path = put(tmp_path, {"a.tsv": 'text\n"plain"\n"he said ""so"""\n"\n'}) / "a.tsv"
    assert texts(path) == ['"plain"', '"he said ""so"""', '"']
    (said,) = caplog.messages
    assert said.startswith(f"{path}: cells of 1 of 3 rows are quoted as in CSV, the first in line 3")


@pytest.mark.parametrize(
    ("sign", "said"), [(";", "semicolons; save it with commas"), ("\t", "tabs; let the name of the")]
)
def test_a_table_with_another_sign_between_its_cells_is_recognised(tmp_path: Path, sign: str, said: str) -> None:
    path = put(tmp_path, {"a.csv": f"text{sign}label\na{sign}1\n"}) / "a.csv"
    values = {"format": "text", "path": str(path)}
    with pytest.raises(UsageError, match=rf"a\.csv, line 2 has no column 'text'.*separated by {said}"):
        render_examples(TypeAdapter(Data).validate_python(values), seed=0)


def test_tables_fill_with_nulls_and_json_does_not(tmp_path: Path) -> None:
    put(tmp_path, {"a.ndjson": LINES, "b.json": json.dumps(ROWS), "c.parquet": ROWS})
    found = [read_rows(tmp_path / name)[:2].fills_with_nulls for name in ("a.ndjson", "b.json", "c.parquet")]
    assert found == [False, False, True]


# Compressed files ----------------------------------------------------------------------------------------------------


def zstd(content: bytes) -> bytes:
    return bytes(pyarrow.compress(content, codec="zstd", asbytes=True))


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".zst": zstd,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}


@pytest.mark.parametrize("ending", PACKERS)
def test_compressed_files_give_the_same_rows_or_are_refused(tmp_path: Path, ending: str) -> None:
    pack, content = PACKERS[ending], LINES.encode() * 400
    folder = put(tmp_path, {f"a.jsonl{ending}": pack(content), f"a.json{ending}": pack(json.dumps(ROWS).encode())})
    assert read_rows(folder / f"a.jsonl{ending}") == ROWS * 400
    assert read_rows(folder / f"a.json{ending}") == ROWS
    put(folder, {f"two.jsonl{ending}": pack(LINES.encode()) * 2, f"cut.jsonl{ending}": pack(content)[:-9]})
    assert read_rows(folder / f"two.jsonl{ending}") == ROWS * 2
    put(folder, {f"plain.jsonl{ending}": LINES})
    for name in (f"cut.jsonl{ending}", f"plain.jsonl{ending}"):
        with pytest.raises(UsageError, match=rf"{name}: damaged or cut off, or no \{ending} file"):
            read_rows(folder / name)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json.gz", "a.csv.zst"])
def test_a_file_that_unpacks_to_more_than_the_machine_holds_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    pack = PACKERS[Path(name).suffix]
    content = b'[{"a": "' + b" " * 3_000_000 if name == "a.json.gz" else b'{"text": "t"}\n' * 200_000
    path = put(tmp_path, {name: pack(content)}) / name
    monkeypatch.setattr(text_lines, "machine_bytes", lambda: 2**21)
    with pytest.raises(UsageError, match=rf"{name}: its text is more than .* more than this machine can hold"):
        read_rows(path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (gzip.compress(b"{}", mtime=0), "this is gzip; add .gz to its name"),
        (zstd(b"{}" * 50), "this is zstd; add .zst to its name"),
        (b"PK\x03\x04\x14\x00\xff", "a zip archive or a spreadsheet; unpack it"),
    ],
)
def test_a_file_under_a_wrong_name_is_recognised(tmp_path: Path, content: bytes, said: str) -> None:
    with pytest.raises(UsageError, match=rf"a\.jsonl, line 1: not UTF-8 .*{said}"):
        read_rows(put(tmp_path, {"a.jsonl": content}) / "a.jsonl")


def test_a_file_that_may_not_be_read_is_the_users_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = put(tmp_path, {"a.jsonl": LINES}) / "a.jsonl"

    def refused(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refused)
    with pytest.raises(UsageError, match=r"a\.jsonl: it cannot be read \(.*Permission denied"):
        read_rows(path)


def test_empty_texts_of_an_evaluation_are_counted_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    path = put(tmp_path, {"a.jsonl": '{"text": "t"}\n\n{"text": " "}\n'}) / "a.jsonl"
    given = EvaluationSettings(model="any", task="loss", data=path)
    assert len(passages(read_source(given), given)) == 2
    assert caplog.messages == [f"1 of 2 rows have an empty text and count as they are; the first: {path}, line 3"]
    path.write_text('{"text": ""}\n')
    with pytest.raises(UsageError, match="all 1 rows have an empty text"):
        passages(read_source(given), given)


# The table of the docs -----------------------------------------------------------------------------------------------


def test_the_table_of_the_docs_names_every_ending_and_no_other() -> None:
    page = (Path(__file__).parents[1] / "docs" / "data.md").read_text("utf-8")
    table = page.split("## Files")[1].split("\n## ")[0]
    named = {
        ending
        for line in table.splitlines()
        if line.startswith("|")
        for ending in re.findall(r"`(\.\w+)`", line.split("|")[1])
    }
    assert named == {*ENDINGS, *COMPRESSIONS}
    assert set(_READERS) == set(ENDINGS)
    assert all(ending_of(f"x{ending}") == ending for ending in ENDINGS)
