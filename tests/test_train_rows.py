"""Rows that a trainer reads: equal to TRL's where nothing is too long, and every token is accounted for."""

from __future__ import annotations

import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset
from train_fixtures import build, parse, quiet, write_model, write_sums
from trl.trainer.sft_trainer import SFTTrainer

from gradselect import UsageError
from gradselect.app.inputs import IGNORED, row_notes
from gradselect.app.inputs.rows import token_rows
from gradselect.app.recipe import TextData
from gradselect.app.results import RunRecord, TokenCounts, read_finished_run, read_run
from gradselect.app.runtime import RunFolder
from gradselect.app.train import train
from gradselect.app.train.run_record import write_run

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, sums, and documents of 50 and 130 letters."""
    folder = tmp_path_factory.mktemp("rows")
    write_model(folder / "model")
    write_sums(folder / "sums.jsonl")
    texts = ["a" * 50, "b" * 130]
    (folder / "texts.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return folder


def examples(lengths: list[int], *, prompt: int = 0) -> Dataset:
    """Examples of distinct tokens; the first `prompt` tokens of each do not count in the loss."""
    draw, rows = random.Random(0), []
    for length in lengths:
        ids = [draw.randrange(1, 50_000) for _ in range(length)]
        rows.append({"input_ids": ids, "labels": [IGNORED] * min(prompt, length) + ids[prompt:]})
    return Dataset.from_list(rows)


def prepared_by_trl(dataset: Dataset, *, max_length: int, packing: bool) -> list[Any]:
    arguments: Any = SimpleNamespace(
        dataset_num_proc=None,
        max_length=max_length,
        truncation_mode="keep_start",
        packing_strategy="bfd",
        shuffle_dataset=False,
    )
    prepare: Any = SFTTrainer._prepare_dataset
    return prepare(SimpleNamespace(), dataset, None, arguments, packing, None, "train").to_list()


@pytest.mark.parametrize("goes_on", [False, True])
def test_packed_rows_are_trls_if_everything_fits(goes_on: bool) -> None:
    dataset = examples([random.Random(n).randint(1, 30) for n in range(2300)])
    ours = token_rows(dataset, max_length=30, packing=True, goes_on=goes_on)
    assert ours.dataset.to_list() == prepared_by_trl(dataset, max_length=30, packing=True)


def test_cut_rows_are_trls() -> None:
    dataset = examples([random.Random(n).randint(1, 60) for n in range(1300)], prompt=25)
    ours = token_rows(dataset, max_length=30, packing=False, goes_on=False)
    assert ours.dataset.to_list() == prepared_by_trl(dataset, max_length=30, packing=False)
    assert ours.counts.examples_dropped == 1300 - len(ours.dataset)


def test_long_texts_go_on_in_further_rows_and_no_token_is_lost() -> None:
    # More than the thousand examples that are packed at a time.
    lengths = [random.Random(n).choice([1, 5, 16, 17, 32, 100]) for n in range(1500)]
    dataset = examples(lengths)
    rows, counts = (part := token_rows(dataset, max_length=16, packing=True, goes_on=True)).dataset, part.counts
    flat = sorted(token for ids in rows["input_ids"] for token in ids)
    assert flat == sorted(token for ids in dataset["input_ids"] for token in ids)
    assert all(len(ids) <= 16 and sum(pieces) == len(ids) for ids, pieces in zip(*columns(rows), strict=True))
    assert counts.tokens == counts.tokens_in_rows == sum(lengths)
    assert (counts.examples_continued, counts.examples_cut) == (sum(length > 16 for length in lengths), 0)
    assert counts.tokens_trained == sum(sum(pieces) - len(pieces) for pieces in rows["seq_lengths"])


def test_pieces_of_a_text_are_its_parts_in_order() -> None:
    (ids,) = (dataset := examples([40]))["input_ids"]
    rows = token_rows(dataset, max_length=16, packing=True, goes_on=True).dataset
    pieces = sorted((piece for piece in rows["input_ids"]), key=lambda piece: ids.index(piece[0]))
    assert pieces == [ids[:16], ids[16:32], ids[32:]]
    assert rows["labels"] == rows["input_ids"]


@pytest.mark.parametrize("packing", [False, True])
def test_answers_that_are_cut_are_counted(packing: bool) -> None:
    dataset = examples([10, 30, 30], prompt=6)
    counts = token_rows(dataset, max_length=20, packing=packing, goes_on=False).counts
    assert (counts.examples_cut, counts.tokens, counts.tokens_in_rows) == (2, 70, 50)
    assert (counts.tokens_to_train, counts.tokens_trained) == (4 + 24 + 24, 4 + 14 + 14)
    assert counts.share_left_out == pytest.approx(20 / 70, abs=1e-6)
    assert counts.trained_share_left_out == pytest.approx(20 / 52, abs=1e-6)


@pytest.mark.parametrize("packing", [False, True])
def test_prompts_that_fill_a_row_are_dropped_and_counted(packing: bool) -> None:
    part = token_rows(examples([10, 30], prompt=8), max_length=8, packing=packing, goes_on=False)
    assert (part.counts.examples_dropped, part.counts.rows, len(part.dataset)) == (2, 0, 0)


def test_counts_of_a_text_agree_with_its_rows() -> None:
    """A text of one token has nothing before it that could predict it, nor has the first token of a row."""
    part = token_rows(examples([1, 16, 33]), max_length=16, packing=False, goes_on=False)
    assert part.counts.examples_untrained == 1
    assert part.counts.tokens_trained == sum(len(ids) - 1 for ids in part.dataset["input_ids"])


def columns(rows: Dataset) -> tuple[Any, Any]:
    return rows["input_ids"], rows["seq_lengths"]


NOTES = {
    "packed text": (
        {"format": "text", "path": "{place}/texts.jsonl", "max_length": 64, "packing": True},
        ["2 examples were packed into", "1 of 2 documents are longer than data.max_length=64 and go on in further"],
    ),
    "text": (
        {"format": "text", "path": "{place}/texts.jsonl", "max_length": 64},
        ["1 of 2 documents are longer than data.max_length=64 and lose their end: 37 % of the tokens (67 of 182)"],
    ),
    "answers": (
        {"max_length": 10, "packing": True},
        ["of 24 examples are longer than data.max_length=10 and lose their end", "of those to train on, are left out"],
    ),
    "validation": (
        {"max_length": 64, "validation": "{place}/long.jsonl"},
        ["validation: 1 of 1 examples are longer than data.max_length=64 and lose their end"],
    ),
}


@pytest.mark.parametrize("kind", NOTES)
def test_what_is_cut_dropped_or_empty_is_said_with_numbers(place: Path, tmp_path: Path, kind: str) -> None:
    (place / "long.jsonl").write_text(json.dumps({"question": "2+2?", "answer": "4" * 100}))
    data, expected = NOTES[kind]
    filled = {key: value.format(place=place) if isinstance(value, str) else value for key, value in data.items()}
    trainer, inputs = build(place, tmp_path, data=filled)
    notes = row_notes(trainer.token_counts, parse(place, data=filled).data, max_length=inputs.max_length)
    assert all(any(words in note for note in notes) for words in expected), notes


def test_texts_of_one_token_are_said() -> None:
    counts = TokenCounts(examples=9, rows=9, examples_untrained=2, tokens=90, tokens_in_rows=90)
    (note,) = row_notes({"train": counts}, TextData(format="text", path="texts.txt"), max_length=64)
    assert note == "2 of 9 documents have nothing to train on: they have a single token"


def test_a_text_is_advised_to_be_packed_only_where_that_helps(place: Path, tmp_path: Path) -> None:
    data = {"format": "text", "path": str(place / "texts.jsonl"), "max_length": 64}
    for packing in (False, True):
        trainer, _ = build(place, tmp_path / str(packing), data={**data, "packing": packing})
        notes = row_notes(trainer.token_counts, parse(place, data={**data, "packing": packing}).data, max_length=64)
        assert any("data.packing=true" in note for note in notes) != packing


def test_run_json_has_the_counts(place: Path, tmp_path: Path) -> None:
    data = {"format": "text", "path": str(place / "texts.jsonl"), "max_length": 64, "packing": True}
    run = {"output": str(tmp_path / "out"), "steps": None, "epochs": 1, "batch_size": 1}
    train(parse(place, data=data, run=run), console=quiet())
    counts = json.loads((tmp_path / "out" / "run.json").read_text())["token_counts"]["train"]
    assert {name: counts[name] for name in ("examples", "examples_continued", "tokens", "tokens_in_rows")} == {
        "examples": 2,
        "examples_continued": 1,
        "tokens": 182,
        "tokens_in_rows": 182,
    }
    assert counts["share_left_out"] == 0
    end = read_finished_run(tmp_path / "out" / "run.json")
    assert end.tokens == 182
    assert end.token_counts["train"].tokens_trained == 182 - 2 - 2


def test_a_run_that_began_on_other_rows_is_not_resumed(place: Path, tmp_path: Path) -> None:
    """Earlier versions cut what goes on in further rows today: batches of the second half would be others."""
    data = {"format": "text", "path": str(place / "texts.jsonl"), "max_length": 64, "packing": True}
    recipe = parse(place, data=data, run={"output": str(tmp_path / "out"), "steps": 1, "batch_size": 1})
    train(recipe, console=quiet())
    file = tmp_path / "out" / "run.json"
    record = read_run(file).values() | {"status": "started"}
    del record["token_counts"]
    write_run(RunFolder(tmp_path / "out"), RunRecord.model_validate(record))
    with pytest.raises(UsageError, match="made other rows of the same data"):
        train(recipe, resume=True, console=quiet())
    assert read_run(file).token_counts == {}


def test_run_files_without_counts_are_still_read(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"status": "started", "recipe": {}, "model": {}, "data": {}}))
    assert read_run(tmp_path / "run.json").token_counts == {}


@pytest.mark.parametrize("packing", [False, True])
def test_data_without_a_token_to_train_on_are_refused(place: Path, tmp_path: Path, packing: bool) -> None:
    with pytest.raises(UsageError, match=r"data\.max_length=2 leaves nothing of data\.path"):
        build(place, tmp_path, data={"max_length": 2, "packing": packing})
