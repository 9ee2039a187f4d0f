"""Cells: what each kind becomes in a template, what is refused, and rows that say nothing."""

from __future__ import annotations

import json
import re
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter
from train_fixtures import recipe_values, write_model

from gradselect import UsageError
from gradselect.app.data import (
    columns_of,
    label_names,
    optional_columns_of,
    read_label,
    read_rows,
    render,
    says_nothing,
)
from gradselect.app.evaluate import EvaluationSettings
from gradselect.app.evaluate.problems import problems, read_source
from gradselect.app.inputs import read_inputs
from gradselect.app.inputs.examples import RenderedRows, render_examples
from gradselect.app.recipe import Data, as_typed, read_typed
from gradselect.app.recipe.load import parse_recipe
from gradselect.app.recipe.overrides import parse_override

FORMATS = {
    "prompt-completion": {"prompt": "{question}", "completion": " {answer}"},
    "text": {"text": "{text}"},
    "classification": {"text": "{text}"},
}


def write(folder: Path, *rows: Any, name: str = "data.jsonl") -> str:
    path = folder / name
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), "utf-8")
    return str(path)


def render_file(path: str, form: str = "prompt-completion", **settings: Any) -> RenderedRows:
    values = {"format": form, "path": path, **FORMATS[form], **settings}
    return render_examples(TypeAdapter(Data).validate_python(values), seed=0)


CELLS: dict[str, tuple[Any, str]] = {
    "text": ("True 'as' it {is}", "True 'as' it {is}"),
    "true": (True, "true"),
    "false": (False, "false"),
    "whole number": (3, "3"),
    "huge whole number": (10**40, "1" + "0" * 40),
    "fraction": (2.5, "2.5"),
    "exponent": (1e-7, "1e-07"),
    "list": (["a", 'b "c"', None, True], '["a", "b \\"c\\"", null, true]'),
    "object": ({"a": {"b": [1, 2.5]}, "ü": "→"}, '{"a": {"b": [1, 2.5]}, "ü": "→"}'),
    "decimal": (Decimal("2.50"), "2.50"),
    "decimal with an exponent": (Decimal("1E+3"), "1000"),
    "date": (date(2024, 5, 1), "2024-05-01"),
    "timestamp": (datetime(2024, 5, 1, 12, 30), "2024-05-01T12:30:00"),
    "time": (time(12, 30), "12:30:00"),
    "object with a date": ({"at": date(2024, 5, 1), "of": Decimal("0.10")}, '{"at": "2024-05-01", "of": "0.10"}'),
}


@pytest.mark.parametrize(("value", "text"), CELLS.values(), ids=list(CELLS))
def test_a_cell_is_written_as_json_and_never_as_python(value: Any, text: str) -> None:
    assert render("<{cell}>", {"cell": value}) == f"<{text}>"


REFUSED: dict[str, tuple[Any, str]] = {
    "null": (None, "column 'cell' is null; fill it in, or drop the row"),
    "NaN": (float("nan"), "column 'cell' holds nan, which is no number"),
    "infinity in a list": ([1.0, float("inf")], "column 'cell' holds inf, which is no number"),
    "bytes": (b"\xff\x00", "column 'cell' holds bytes .*, which is no text; write text"),
    "bytes in an object": ({"a": b"x"}, "column 'cell' holds bytes"),
    "duration": (timedelta(seconds=1), "column 'cell' holds a timedelta"),
}


@pytest.mark.parametrize(("value", "said"), REFUSED.values(), ids=list(REFUSED))
def test_a_cell_without_a_text_is_refused_by_its_column(value: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        render("<{cell}>", {"cell": value})


@pytest.mark.parametrize("constant", ["NaN", "Infinity", "-Infinity"])
@pytest.mark.parametrize("name", ["data.jsonl", "data.json"])
def test_what_json_does_not_have_is_refused_with_its_line(tmp_path: Path, constant: str, name: str) -> None:
    path = write(tmp_path, {"a": "NaN is text here"}, f'{{"a": {constant}}}', name=name)
    with pytest.raises(UsageError, match=rf"{name}, line 2: {constant} is no value of JSON; fill it in, write null"):
        read_rows(path)


def test_a_number_that_no_float_holds_is_refused_with_its_line(tmp_path: Path) -> None:
    path = write(tmp_path, {"question": "q", "answer": 1}, "", '{"question": "q", "answer": 1e400}')
    with pytest.raises(UsageError, match=r"data\.jsonl, line 3: column 'answer' holds inf"):
        render_file(path)


def test_cells_of_parquet_are_read_whatever_their_type(tmp_path: Path) -> None:
    table = pyarrow.table(
        {
            "list": pyarrow.array([["a", "b"]]),
            "struct": pyarrow.array([{"x": 1, "y": None}]),
            "map": pyarrow.array([[("k", 1), ("l", 2)]], pyarrow.map_(pyarrow.string(), pyarrow.int64())),
            "at": pyarrow.array([datetime(2024, 5, 1, 1, 2, 3)], pyarrow.timestamp("us")),
            "decimal": pyarrow.array([Decimal("12.50")], pyarrow.decimal128(10, 2)),
            "code": pyarrow.array(["red"]).dictionary_encode(),
            "bytes": pyarrow.array([b"\xff"]),
            "half": pyarrow.array([0.5], pyarrow.float32()),
        }
    )
    pyarrow.parquet.write_table(table, tmp_path / "data.parquet")
    (row,) = read_rows(tmp_path / "data.parquet")
    text = render("{list} {struct} {map} {at} {decimal} {code} {half}", row)
    assert text == '["a", "b"] {"x": 1, "y": null} {"k": 1, "l": 2} 2024-05-01T01:02:03 12.50 red 0.5'
    with pytest.raises(UsageError, match=r"data\.parquet, row 1: column 'bytes' holds bytes"):
        render_file(str(tmp_path / "data.parquet"), "text", text="{bytes}")


# Optional parts ------------------------------------------------------------------------------------------------------

ALPACA = "{instruction}{?input:\n\n### Input:\n{input}}\n\n### Response:\n"


@pytest.mark.parametrize("row", [{}, {"input": None}, {"input": ""}, {"input": " \n"}, {"input": []}])
def test_an_optional_part_is_left_out_where_its_column_says_nothing(row: dict[str, Any]) -> None:
    assert render(ALPACA, {"instruction": "Rest.", **row}) == "Rest.\n\n### Response:\n"


@pytest.mark.parametrize(("cell", "text"), [("2 {x}", "2 {x}"), (0, "0"), (False, "false"), ([1], "[1]")])
def test_an_optional_part_is_written_where_its_column_says_something(cell: Any, text: str) -> None:
    written = render(ALPACA, {"instruction": "Double.", "input": cell})
    assert written == f"Double.\n\n### Input:\n{text}\n\n### Response:\n"


def test_columns_of_optional_parts_are_not_required() -> None:
    assert columns_of(ALPACA) == ("instruction",)
    assert optional_columns_of(ALPACA) == ("input",)
    assert columns_of("{?a:{b}} {a}") == ("a",)


def test_templates_that_had_a_meaning_keep_it() -> None:
    """A field with a colon was refused before there were optional parts; brackets and question marks are text."""
    row = {"?input": "x", "a b": "y"}
    assert render("[{?input}]? {{?a b:}} {a b} [[x]]", row) == "[x]? {?a b:} y [[x]]"
    assert render("{?a b:\\boxed{{{a b}}}}", row) == "\\boxed{y}"


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{?input:{input}", "ends with a brace of its own"),
        ("{?input:x}}", "Single '}'"),
        ("{?a:{?b:c}}", "an optional part holds plain columns only"),
        ("{a:x}", "or an optional part, as in {?input:Input: {input}}"),
        ("{?:x}", "plain name of a column"),
        ("{?a.b:x}", "plain name of a column"),
    ],
)
def test_a_wrong_optional_part_is_explained(template: str, said: str) -> None:
    with pytest.raises(UsageError) as raised:
        columns_of(template)
    assert said in str(raised.value)
    assert repr(template) in str(raised.value)


def test_a_missing_column_inside_a_kept_part_is_named_with_its_line(tmp_path: Path) -> None:
    path = write(tmp_path, {"question": "q", "answer": "a"}, {"question": "q", "answer": "a", "hint": "h"})
    with pytest.raises(UsageError, match="line 2: no column 'source', which an optional part"):
        render_file(path, prompt="{question}{?hint: ({hint} of {source})}")


def test_an_optional_column_that_no_row_has_is_said(tmp_path: Path) -> None:
    rendered = render_file(write(tmp_path, {"question": "q", "answer": "a"}), prompt="{question}{?inptu: {inptu}}")
    assert rendered.rows["train"][0]["prompt"] == "q"
    assert "no row of" in rendered.notes[0]
    assert "column 'inptu'" in rendered.notes[0]
    assert rendered.notes[0].endswith("the columns are: question, answer")


# Rows that say nothing -----------------------------------------------------------------------------------------------


def test_says_nothing_looks_at_the_columns_and_not_at_the_text_around_them() -> None:
    assert says_nothing("Answer: {a}", {"a": " "})
    assert says_nothing("Answer: {?a:{a}}", {})
    assert not says_nothing("{a}{b}", {"a": "", "b": 0})
    assert not says_nothing("Write a story:", {})


@pytest.mark.parametrize(
    ("form", "good", "bad", "part"),
    [
        ("prompt-completion", {"question": "q", "answer": "a"}, {"question": "q", "answer": "\n"}, "completion"),
        ("prompt-completion", {"question": "q", "answer": "a"}, {"question": "", "answer": "a"}, "prompt"),
        ("text", {"text": "t"}, {"text": " "}, "text"),
    ],
)
def test_rows_that_say_nothing_are_left_out_counted_and_said(
    tmp_path: Path, form: str, good: Any, bad: Any, part: str
) -> None:
    path = write(tmp_path, good, "", bad, good, bad)
    rendered = render_file(path, form)
    assert len(rendered.rows["train"]) == 2
    (note,) = rendered.notes
    assert note == f"2 of 4 rows have an empty {part} and are left out; the first: {path}, line 3"
    assert rendered.sources["train"].describe()["rows_used"] == 2
    assert rendered.sources["train"].describe()["rows_empty"] == 2
    with pytest.raises(UsageError, match=rf"data\.jsonl: 2 of 2 rows have an empty {part}, and no row is left"):
        render_file(write(tmp_path, bad, bad), form)


def test_nothing_is_said_of_rows_that_say_something(tmp_path: Path) -> None:
    rendered = render_file(write(tmp_path, {"question": "q", "answer": 0}, {"question": "q", "answer": False}))
    assert [row["completion"] for row in rendered.rows["train"]] == [" 0", " false"]
    assert rendered.notes == ()
    assert "rows_empty" not in rendered.sources["train"].describe()


def test_validation_rows_that_are_trained_on_are_counted_and_said(tmp_path: Path) -> None:
    """A file with repeated rows showed a validation loss of rows that the model had learnt by heart."""
    one, two, other = ({"question": name, "answer": "a"} for name in ("one", "two", "other"))
    folder = tmp_path / "validation"
    folder.mkdir()
    held_out = write(folder, two, one, two, {**one, "answer": "b"})
    rendered = render_file(write(tmp_path, one, other, two), validation=held_out)
    assert rendered.notes == (
        "3 of 4 rows of the validation data are in the training data too, so the validation loss is not that of unseen "
        f"text; keep each row once. The first: {held_out}, line 1",
    )
    assert (len(rendered.rows["train"]), len(rendered.rows["validation"])) == (3, 4)
    path = write(tmp_path, *[one] * 4)
    (note,) = render_file(path, validation=0.25).notes
    assert note.startswith("1 of 1 rows of the validation data is in the training data too")
    assert render_file(write(tmp_path, one, two), validation=write(folder, other)).notes == ()


def test_of_conversations_the_whole_of_them_is_compared(tmp_path: Path) -> None:
    asked, answered = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    talk, longer = {"messages": [asked, answered]}, {"messages": [asked, answered, asked, answered]}
    folder = tmp_path / "validation"
    folder.mkdir()
    values = {"format": "chat", "path": write(tmp_path, talk), "validation": write(folder, longer, talk)}
    (note,) = render_examples(TypeAdapter(Data).validate_python(values), seed=0).notes
    assert note.startswith("1 of 2 rows of the validation data is")
    assert note.endswith("line 2")


def test_empty_cells_of_a_table_are_empty_answers(tmp_path: Path) -> None:
    """`to_csv` of pandas writes a missing cell as an empty one."""
    path = write(tmp_path, "question,answer", "a,1", "b,", "c,NaN", name="data.csv")
    rendered = render_file(path)
    assert [row["completion"] for row in rendered.rows["train"]] == [" 1", " NaN"]
    assert rendered.notes[0].endswith("data.csv, line 3")


def test_what_is_left_out_stands_in_the_notes_of_a_run(tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    path = write(tmp_path, {"question": "1+1?", "answer": "2"}, {"question": "2+2?", "answer": ""})
    inputs = read_inputs(parse_recipe(recipe_values(tmp_path, data={"path": path}), source="recipe"))
    assert len(inputs.examples.train) == 1
    assert inputs.examples.notes[0].startswith("1 of 2 rows has an empty completion and is left out")


def test_a_question_of_an_evaluation_is_json_too(tmp_path: Path) -> None:
    path = write(tmp_path, {"question": {"a": True}, "answer": 4})
    given = EvaluationSettings(model="any", task="gsm8k", data=path)
    (problem,) = problems(read_source(given), given)
    assert (problem.question, problem.reference) == ('{"a": true}', "4")
    write(tmp_path, {"question": "q", "answer": 4}, "", {"question": " ", "answer": 4})
    with pytest.raises(UsageError, match=r"data\.jsonl, line 3: the prompt is empty"):
        problems(read_source(given), given)


# Labels --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("label", "said"),
    [
        ("", "the label is empty"),
        (" ", "the label is empty"),
        (None, "the label is null"),
        ([1], r"the label is \[1\], and a label is one text or number"),
        ({"a": 1}, ".*a label is one text or number"),
    ],
)
def test_what_is_no_label_is_refused_with_its_line(tmp_path: Path, label: Any, said: str) -> None:
    path = write(tmp_path, {"text": "a", "label": 0}, {"text": "b", "label": 1}, {"text": "c", "label": label})
    for more in ({}, {"labels": [0, 1]}):
        with pytest.raises(UsageError, match=rf"data\.jsonl, line 3: {said}"):
            render_file(path, "classification", **more)


def test_nan_is_no_label(tmp_path: Path) -> None:
    table = pyarrow.table({"text": ["a", "b", "c"], "label": [0.0, 1.0, float("nan")]})
    pyarrow.parquet.write_table(table, tmp_path / "data.parquet")
    with pytest.raises(UsageError, match=r"data\.parquet, row 3: the label holds nan"):
        render_file(str(tmp_path / "data.parquet"), "classification")
    path = write(tmp_path, "text,label", "a,0", "b,1", "c,nan", name="data.csv")
    with pytest.raises(UsageError, match=r"data\.csv, line 4: the label is 'nan', and the others are numbers"):
        render_file(path, "classification")


def test_a_boolean_label_is_that_of_json_and_that_of_older_models() -> None:
    assert label_names([True, False], path="x") == ("false", "true")
    assert read_label(True, labels=("false", "true")) == 1
    assert read_label(True, labels=("False", "True")) == 1
    settings = TypeAdapter(Data).validate_python({"format": "classification", "path": "x", "labels": [False, True]})
    assert settings.labels == ("false", "true")


# Templates in recipes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("typed", "value"),
    [
        ("data.prompt={instruction} {input}", "{instruction} {input}"),
        ("data.prompt=Question: {q}\\nAnswer:", "Question: {q}\nAnswer:"),
        ("data.completion= {answer}", " {answer}"),
        ("data.text=### {a} # {b}", "### {a} # {b}"),
        ("data.prompt={a}{?b:\\n{b}}", "{a}{?b:\n{b}}"),
        ('data.prompt="{a}\\n"', "{a}\n"),
        ("data.prompt='{a}\\n'", "{a}\\n"),
        ("data.text_pair=null", None),
    ],
)
def test_a_template_on_the_command_line_is_text_as_typed(typed: str, value: str | None) -> None:
    (found,) = parse_override(typed)["data"].values()
    assert found == value


@given(st.text("\\\\nt\n\tx{}", max_size=12))
def test_what_is_printed_of_a_template_can_be_typed(text: str) -> None:
    """LaTeX such as \\text came back with a tab for its first letters."""
    assert read_typed(as_typed(text)) == text
    assert not {"\n", "\t"} & {*as_typed(text)}


@pytest.mark.parametrize(
    ("typed", "text"),
    [
        (r"a\\text", r"a\text"),
        (r"\\\n", "\\\n"),
        (r"\frac{1}{2}\\", r"\frac{1}{2}\\"),
        (r"\\x\n", "\\\\x\n"),
    ],
)
def test_a_backslash_that_is_to_stay_is_doubled_before_n_and_t(typed: str, text: str) -> None:
    assert read_typed(typed) == text


def test_other_values_on_the_command_line_say_which_quotes_are_missing() -> None:
    with pytest.raises(UsageError) as raised:
        parse_override("run.output={a} {b}")
    assert "needs quotes of its own: 'run.output=\"...\"'" in str(raised.value)


def test_a_template_without_quotes_in_a_file_says_so(tmp_path: Path) -> None:
    values = recipe_values(tmp_path, data={"completion": {"answer": None}})
    with pytest.raises(UsageError, match=r'data\.completion: in YAML a text that begins.*; write "\{answer\}"'):
        parse_recipe(values, source="recipe")


def test_the_recipe_for_alpaca_in_the_docs_fills_both_kinds_of_rows(tmp_path: Path) -> None:
    page = (Path(__file__).parents[1] / "docs" / "data.md").read_text("utf-8")
    (block,) = (block for block in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL) if "alpaca" in block)
    rows = [
        {"instruction": "Add.", "input": "2, 3", "output": "5"},
        {"instruction": "Rest.", "input": "", "output": "."},
    ]
    settings = {**yaml.safe_load(block)["data"], "path": write(tmp_path, *rows)}
    first, second = render_examples(TypeAdapter(Data).validate_python(settings), seed=0).rows["train"]
    assert first["prompt"] == "### Instruction:\nAdd.\n\n### Input:\n2, 3\n\n### Response:\n"
    assert second["prompt"] == "### Instruction:\nRest.\n\n### Response:\n"
