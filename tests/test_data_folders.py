"""Folders of shards, splits and patterns."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from data_support import LINES, ROWS, put, texts
from datasets import Dataset, DatasetDict
from pydantic import TypeAdapter
from train_fixtures import recipe_values

from gradselect import UsageError
from gradselect.app.compare.protocol import ADDED, _evaluation_settings
from gradselect.app.compare.suite import Evaluation
from gradselect.app.data import data_fingerprint, files_of, read_rows
from gradselect.app.evaluate import EvaluationSettings
from gradselect.app.evaluate.problems import passages, read_source
from gradselect.app.inputs.examples import render_examples
from gradselect.app.recipe import Data, RandomData
from gradselect.app.recipe.load import parse_recipe
from gradselect.app.train.progress import _next_command

# Folders -------------------------------------------------------------------------------------------------------------


def shards(name: str, count: int, *, of: int | None = None) -> dict[str, Any]:
    return {f"{name}-{n:05d}-of-{of or count:05d}.parquet": [{"text": f"{name}{n}"}] for n in range(count)}


FOLDERS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "shards": (shards("part", 3), ["part0", "part1", "part2"]),
    "numbered lines": ({f"{n}.jsonl": f'{{"text": "{n}"}}' for n in (10, 2, 1)}, ["1", "2", "10"]),
    "with other files": ({"a.txt": "x", "README.md": "#", "_SUCCESS": "", ".hidden.csv": "a"}, ["x"]),
    "train and test": ({**shards("train", 2), **shards("test", 1)}, ["train0", "train1"]),
    "below data": ({f"data/{k}": v for k, v in {**shards("train", 1), **shards("validation", 1)}.items()}, ["train0"]),
    "folders of splits": (
        {"train/a.csv": "text\n1\n", "train/b.csv": "text\n2\n", "dev/a.csv": "text\n3\n"},
        ["1", "2"],
    ),
    "names of splits": ({"my-train.txt": "1", "my-dev.txt": "2", "test.csv": "text\n3\n"}, ["1"]),
    "an empty shard": ({"a.txt": "1", "b.txt": ""}, ["1"]),
    "compressed": ({"a.txt.gz": gzip.compress(b"1"), "b.txt.gz": gzip.compress(b"2")}, ["1", "2"]),
}


@pytest.mark.parametrize(("files", "expected"), FOLDERS.values(), ids=list(FOLDERS))
def test_a_folder_is_read_as_one_data_set(tmp_path: Path, files: dict[str, Any], expected: list[str]) -> None:
    assert texts(put(tmp_path, files)) == expected


def test_what_is_read_of_a_folder_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    put(tmp_path, {**shards("train", 2), **shards("test", 1)})
    rows = read_rows(tmp_path)
    assert caplog.messages == [
        f"{tmp_path}: read 2 rows from 2 files, train-00000-of-00002.parquet to train-00001-of-00002.parquet; "
        "not read, of other splits: test-00000-of-00001.parquet"
    ]
    assert rows.place(1) == f"{tmp_path / 'train-00001-of-00002.parquet'}, row 1"


WRONG_FOLDERS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "two kinds": ({"a.jsonl": LINES, "b.csv": "text\n1\n"}, ["2 kinds: a.jsonl, b.csv", "/*.csv'"]),
    "packed and plain": ({"a.txt": "1", "a.txt.gz": gzip.compress(b"1")}, ["2 kinds: a.txt, a.txt.gz"]),
    "no data": ({"model.bin": "x"}, ["a folder without data files; it holds: model.bin"]),
    "a shard is missing": (shards("train", 3, of=4), ["1 of 4 shards are missing, the first is number 00003"]),
    "no such split": (shards("test", 2), ["no file of the split 'train'; there is: test (2 files", "data.split=test"]),
    "beside the splits": ({"train.txt": "1", "more.txt": "2"}, ["files of no split: more.txt", "/train.txt'"]),
    "several fit": (
        {**shards("train_sft", 1), **shards("train_gen", 1)},
        ["several splits fit 'train'", "data.split=train_"],
    ),
    "no such name": (shards("part", 2), ["no file of the split 'gold'; there is: part (2 files", "/*.parquet'"]),
    "folders that several fit": (
        {f"{k}/{name}": v for k in ("main", "more") for name, v in {**shards("train", 2), **shards("test", 1)}.items()},
        ["data.split=main/train", "/main/train-*.parquet'"],
    ),
    "a shard is missing below": (
        {f"data/{name}": v for name, v in shards("train", 3, of=4).items()},
        ["1 of 4 shards are missing", "/data/*.parquet'"],
    ),
    "languages": (
        {"en/a.txt": "1", "de/a.txt": "2"},
        ["no file of the split 'train'; there is: de (a.txt), en (a.txt)"],
    ),
}


@pytest.mark.parametrize(("files", "said"), WRONG_FOLDERS.values(), ids=list(WRONG_FOLDERS))
def test_a_folder_that_is_not_clear_is_refused_by_name(tmp_path: Path, files: dict[str, Any], said: list[str]) -> None:
    with pytest.raises(UsageError) as raised:
        read_rows(put(tmp_path, files), splits=("gold",) if "'gold'" in said[0] else ("train",))
    assert all(part in str(raised.value) for part in [str(tmp_path), *said]), raised.value


def test_a_split_and_a_pattern_choose_files(tmp_path: Path) -> None:
    put(tmp_path, {**shards("train_sft", 2), **shards("train_gen", 1), "notes.txt": "x"})
    assert texts(tmp_path / "train*") == ["train_gen0", "train_sft0", "train_sft1"]
    (tmp_path / "notes.txt").unlink()
    assert texts(tmp_path, splits=("train_gen",)) == ["train_gen0"]
    with pytest.raises(UsageError, match="no file matches"):
        read_rows(tmp_path / "*.csv")


def test_a_run_reads_the_splits_of_a_folder(tmp_path: Path) -> None:
    put(tmp_path, {**shards("train", 3), **shards("validation", 2)})

    def lengths(**changes: Any) -> dict[str, int]:
        values = {"format": "text", "path": str(tmp_path), **changes}
        rendered = render_examples(TypeAdapter(Data).validate_python(values), seed=0)
        return {name: len(rows) for name, rows in rendered.rows.items()}

    assert lengths() == {"train": 3}
    assert lengths(validation="validation") == {"train": 3, "validation": 2}
    assert lengths(split="validation", validation=str(tmp_path)) == {"train": 2, "validation": 2}
    with pytest.raises(UsageError, match="no file of the split 'holdout'"):
        lengths(validation="holdout")


def test_a_bare_word_is_a_split_and_no_folder_of_that_name_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder was read without a sign of it."""
    put(tmp_path / "data", {**shards("train", 3), **shards("test", 2)})
    put(tmp_path, {"rows.json": json.dumps({"train": ROWS, "test": ROWS[:2]})})
    for folder in ("test", "holdout"):
        put(tmp_path / folder, {"a.txt": "1\n"})
    monkeypatch.chdir(tmp_path)

    def validation(name: str, **source: Any) -> int:
        values = {"format": "text", "path": "data", "validation": name, **source}
        return len(render_examples(TypeAdapter(Data).validate_python(values), seed=0).rows["validation"])

    assert validation("test") == validation("test", path="rows.json", rows_key="train") == 2
    assert validation("./test") == validation("test", path="data/train-00000-of-00003.parquet") == 1
    with pytest.raises(UsageError, match=r"split 'holdout'.* write data\.validation=\./holdout"):
        validation("holdout")
    data = {"format": "text", "path": "data", "validation": "test"}
    recipe = parse_recipe(recipe_values(tmp_path, data=data), source="recipe")
    assert not isinstance(recipe.data, RandomData)
    assert _next_command(recipe, recipe.data, {}).endswith("--data data --split test")


def test_training_data_never_stand_in_for_a_split_that_is_not_there(tmp_path: Path) -> None:
    put(tmp_path, {"a.txt": "1\n", "b.txt": "2\n"})
    values = {"format": "text", "path": str(tmp_path), "validation": "validation"}
    with pytest.raises(UsageError, match="no file of the split 'validation'"):
        render_examples(TypeAdapter(Data).validate_python(values), seed=0)
    values["path"] = str(tmp_path / "a.txt")
    with pytest.raises(UsageError, match=r"data\.validation='validation' is no file here, and .*a\.txt has no splits"):
        render_examples(TypeAdapter(Data).validate_python(values), seed=0)


def test_what_the_datasets_library_saved_is_read(tmp_path: Path) -> None:
    data = Dataset.from_list([*ROWS, {"text": "four"}])
    data.save_to_disk(tmp_path / "one", num_shards=2)
    DatasetDict({"train": data, "test": data.select([0])}).save_to_disk(tmp_path / "both")
    assert read_rows(tmp_path / "one") == [*ROWS, {"text": "four"}]
    assert len(read_rows(tmp_path / "both")) == 4
    assert read_rows(tmp_path / "both", splits=("test",)) == ROWS[:1]


def test_an_evaluation_reads_folders_and_running_text(tmp_path: Path) -> None:
    put(tmp_path, {**{f"d/{k}": v for k, v in shards("test", 2).items()}, "a.txt.gz": gzip.compress(b"one\n\ntwo\n")})
    assert len(read_source(EvaluationSettings(model="any", task="loss", data=tmp_path / "d")).rows) == 2
    given = EvaluationSettings(model="any", task="loss", data=tmp_path / "a.txt.gz")
    (passage,) = passages(read_source(given), given)
    assert (passage.target, passage.ends) == ("one\n\ntwo\n", False)


def test_keys_of_later_versions_are_no_part_of_a_protocol_at_their_default(tmp_path: Path) -> None:
    """Results of earlier versions stay of the same protocol."""
    path = put(tmp_path, {"a.json": json.dumps({"data": ROWS})}) / "a.json"
    plain = _evaluation_settings(Evaluation(task="loss", data=path))
    assert not ADDED & plain.keys()
    assert _evaluation_settings(Evaluation(task="loss", data=path, rows_key="data"))["rows_key"] == "data"


def test_the_fingerprint_of_a_folder_is_that_of_the_files_that_are_read(tmp_path: Path) -> None:
    put(tmp_path, {**shards("train", 2), **shards("test", 1)})
    before = data_fingerprint(tmp_path)
    put(tmp_path, {"test-00000-of-00001.parquet": [{"text": "other"}]})
    assert data_fingerprint(tmp_path) == before
    put(tmp_path, {"train-00001-of-00002.parquet": [{"text": "other"}]})
    assert data_fingerprint(tmp_path) != before
    assert files_of(tmp_path / "x.jsonl") == [tmp_path / "x.jsonl"]


@pytest.mark.parametrize(
    ("data", "options"),
    [
        ({"path": "shards", "validation": "test"}, "--data shards --split test"),
        ({"path": "a.json", "rows_key": "train", "validation": "dev"}, "--data a.json --rows-key dev"),
        ({"path": "a.json", "rows_key": "rows", "validation": "b.json"}, "--data b.json --rows-key rows"),
        ({"path": "a.jsonl", "validation": "b.jsonl"}, "--data b.jsonl"),
        ({"path": "owner/set", "validation": "test"}, "--data owner/set --split test"),
        ({"path": "owner/set", "subset": "s", "validation": "test"}, "--data owner/set --subset s --split test"),
        ({"path": "owner/set", "subset": "s", "validation": "b.jsonl"}, "--data b.jsonl"),
        ({"path": "a.csv", "columns": ["n", "text"], "validation": "b.csv"}, "--data b.csv --columns n,text"),
        ({"path": "a.csv", "columns": ["n", "text"], "validation": "b.jsonl"}, "--data b.jsonl"),
        ({"path": "a.jsonl", "validation": 0.1}, "--data TEST.jsonl"),
        ({"path": "a.jsonl", "text": "{head}\n{body}"}, r"--data TEST.jsonl --text '{head}\n{body}'"),
    ],
)
def test_the_next_command_names_the_validation_data(tmp_path: Path, data: dict[str, Any], options: str) -> None:
    recipe = parse_recipe(recipe_values(tmp_path, data={"format": "text", **data}), source="recipe")
    assert not isinstance(recipe.data, RandomData)
    assert _next_command(recipe, recipe.data, {}).endswith(f"--task loss {options}")
