"""Reading data files: formats, and errors that name the file and the line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from gradselect import UsageError
from gradselect.app.data.rows import read_rows, require_columns
from gradselect.files.manifest import sha256

ROWS = [{"question": "2+2?", "answer": 'the "sum"\nis 4'}, {"question": "ü → ?", "answer": ""}]
AS_TEXT = {
    "a.jsonl": '{"question": "2+2?", "answer": "the \\"sum\\"\\nis 4"}\n\n{"question": "ü → ?", "answer": ""}\n',
    "a.json": '[{"question": "2+2?", "answer": "the \\"sum\\"\\nis 4"},\n {"question": "ü → ?", "answer": ""}]',
    "a.csv": 'question,answer\n2+2?,"the ""sum""\nis 4"\nü → ?,\n',
    "A.JSONL": '{"question": "2+2?", "answer": "the \\"sum\\"\\nis 4"}\n{"question": "ü → ?", "answer": ""}',
}


@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "byte-order-mark"])
@pytest.mark.parametrize("name", AS_TEXT)
def test_every_text_format_gives_the_same_rows(tmp_path: Path, name: str, mark: str) -> None:
    path = tmp_path / name
    path.write_text(mark + AS_TEXT[name], "utf-8")
    assert read_rows(path) == ROWS


def test_parquet_gives_the_same_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    assert read_rows(path) == ROWS


def test_a_quote_sign_in_tsv_is_a_character(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_text('text\tlabel\n"so\t1\nhe said "yes"\t0\n', "utf-8")
    assert read_rows(path) == [{"text": '"so', "label": "1"}, {"text": 'he said "yes"', "label": "0"}]


def test_txt_is_one_row_a_line(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"one \r\n\n  two\n")
    assert read_rows(path) == [{"text": "one "}, {"text": "  two"}]


BROKEN: dict[str, tuple[str, bytes, list[str]]] = {
    "broken line": ("a.jsonl", b'{"a": 1}\n{"a": \n', ["line 2", "broken JSON"]),
    "line that ends too early": ("a.jsonl", b'{"a": 1}\n{"a"\n{"a": 2}\n', ["line 2", "broken JSON"]),
    "no object": ("a.jsonl", b'{"a": 1}\n\n[1, 2]\n', ["line 3", "a list: [1, 2]"]),
    "number": ("a.jsonl", b"17\n", ["line 1", "a number: 17"]),
    "broken list": ("a.json", b'[{"a": 1},\n {"a": }]', ["line 2", "broken JSON"]),
    "no list": ("a.json", b'{"a": 1}', ["expected a list of objects", ".jsonl"]),
    "item": ("a.json", b'[{"a": 1}, "b"]', ["item 2", "a string"]),
    "latin-1": ("a.jsonl", '{"a": "x"}\n{"a": "ü"}\n'.encode("latin-1"), ["line 2", "not UTF-8", "0xfc", "iconv"]),
    "latin-1 csv": ("a.csv", "a,b\n1,2\n3,ü\n".encode("latin-1"), ["line 3", "not UTF-8"]),
    "utf-16": ("a.csv", "a,b\n".encode("utf-16"), ["line 1", "not UTF-8", "-f UTF-16"]),
    "a key twice": ("a.jsonl", b'{"a": "x"}\n{"a": {"b": 1, "b": 2}}\n', ["line 2", "'b' stands twice"]),
    "field missing": ("a.csv", b"a,b\n1,2\n3\n", ["line 3", "expected 2 fields", "got 1"]),
    "field too many": ("a.tsv", b"a\tb\n1\t2\t3\n", ["line 2", "expected 2 fields", "got 3"]),
    "open quote": ("a.csv", b'a,b\n1,"2\n', ["line 2", "broken line"]),
    "carriage returns": ("a.csv", b"a,b\r1,2\r", ["line 1", "a carriage return", "tr '\\r' '\\n' < a.csv > lines.csv"]),
    "several lines": ("a.jsonl", b'{\n "a": 1\n}\n', ["line 1", "the line ends within an object", "jq -c . FILE"]),
    "pointer": ("a.txt", b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 5\n", ["git lfs pull"]),
    "empty jsonl": ("a.jsonl", b"", ["holds no rows"]),
    "blank jsonl": ("a.jsonl", b"\n \n", ["holds no rows"]),
    "empty json": ("a.json", b"", ["holds no rows"]),
    "empty csv": ("a.csv", b"", ["holds no rows"]),
    "header only": ("a.csv", b"a,b\n", ["holds no rows"]),
    "empty txt": ("a.txt", b"\n\n", ["holds no rows"]),
    "no parquet": ("a.parquet", b"PAR1 no", ["not a readable Parquet file"]),
    "empty parquet": ("a.parquet", b"", ["not a readable Parquet file"]),
    "unknown ending": ("a.xlsx", b"x", ["'.xlsx'", ".jsonl", ".parquet"]),
}


@pytest.mark.parametrize(("name", "content", "said"), BROKEN.values(), ids=list(BROKEN))
def test_a_file_that_cannot_be_read_is_named_with_its_line(
    tmp_path: Path, name: str, content: bytes, said: list[str]
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UsageError) as raised:
        read_rows(path)
    assert all(part in str(raised.value) for part in [str(path), *said]), raised.value
    assert "\n" not in str(raised.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nix\.jsonl: no such file"):
        read_rows(tmp_path / "nix.jsonl")


def test_a_missing_column_is_named_with_its_row_and_what_there_is() -> None:
    rows: list[dict[str, Any]] = [{"question": "a", "answer": "b"}, {"question": "c", "anwser": "d"}]
    require_columns(rows, ["question"], path="x.jsonl")
    with pytest.raises(UsageError, match=r"x\.jsonl: row 2 has no column 'answer'; its columns are: question, anwser"):
        require_columns(rows, ["question", "answer"], path="x.jsonl")


def test_the_fingerprint_is_that_of_the_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"abc")
    assert sha256(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
