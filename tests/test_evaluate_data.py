"""Problems and passages from rows, and errors in data."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gradselect import UsageError
from gradselect.app.cli.evaluate import _settings as read_options
from gradselect.app.data import Conversation, Origin, Rows
from gradselect.app.evaluate import EvaluationSettings
from gradselect.app.evaluate.problems import passages, problems, read_source
from gradselect.app.evaluate.written_texts import with_templates
from gradselect.app.recipe import parse_override
from gradselect.files import sealed

GSM8K = {"question": "How many is 2 + 3?", "answer": "2 + 3 = 5\n#### 5"}
MATH = {"problem": "Half of one?", "solution": "It is $\\boxed{\\frac12}$.", "level": 1}

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(*rows: Any, name: str = "data.jsonl") -> Path:
        path = tmp_path / name
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return path

    return write


def settings(task: str, data: Path | str, **changes: Any) -> EvaluationSettings:
    return EvaluationSettings(model="any", task=task, data=data, **changes)


def read_problems(given: EvaluationSettings) -> list[Any]:
    return problems(read_source(given), given)


def read_passages(given: EvaluationSettings) -> list[Any]:
    return passages(read_source(given), given)


def test_a_row_becomes_a_prompt_and_a_bare_reference(write: Write) -> None:
    (problem,) = read_problems(settings("gsm8k", write(GSM8K)))
    assert problem.prompt == "Question: How many is 2 + 3?\nAnswer:"
    assert (problem.index, problem.question, problem.reference) == (0, "How many is 2 + 3?", "5")


@pytest.mark.parametrize("column", ["question", "query", "problem", "instruction", "input"])
@pytest.mark.parametrize("placeholder", ["question", "query"])
def test_a_template_finds_the_question_under_every_usual_name(write: Write, column: str, placeholder: str) -> None:
    data = write({column: "2 + 3?", "answer": "5"})
    (problem,) = read_problems(settings("gsm8k", data, prompt=f"{{{placeholder}}} Think step by step.\nAnswer:"))
    assert problem.prompt == "2 + 3? Think step by step.\nAnswer:"


def test_a_column_of_that_very_name_goes_before_the_usual_names(write: Write) -> None:
    (problem,) = read_problems(settings("gsm8k", write({**GSM8K, "query": "other"}), prompt="{query}"))
    assert problem.prompt == "other"


def test_an_input_that_the_default_prompt_leaves_out_is_said(write: Write, caplog: pytest.LogCaptureFixture) -> None:
    data = write(
        {"instruction": "Add", "input": "", "output": "5"}, {"instruction": "Add", "input": "2, 3", "output": "5"}
    )
    read_problems(settings("gsm8k", data))
    assert "1 of 2 rows have text in the column 'input'" in caplog.text
    assert "line 2; to ask with it, write --prompt '{instruction}{?input:" in caplog.text
    caplog.clear()
    read_problems(settings("gsm8k", data, prompt="{instruction}{?input: {input}}"))
    assert caplog.text == ""


ALPACA = "{instruction}{?input:\n{input}}\n### Response:\n"


@pytest.mark.parametrize(
    ("trained", "given", "said"),
    [
        ({"prompt": ALPACA}, {}, f"give --prompt '{ALPACA}'".replace("\n", "\\n")),
        ({"prompt": ALPACA}, {"prompt": "{instruction}"}, None),
        ({"prompt": "{title}"}, {}, "give --prompt '{title}'"),
        ({"prompt": "Question: {instruction}\nAnswer:"}, {}, None),
        ({"prompt": "Question: {query}\nAnswer:", "as_chat": True}, {}, "Answer:' --as-chat"),
        ({"prompt": "Question: {query}\nAnswer:", "as_chat": True}, {"as_chat": True}, None),
        ({"format": "chat"}, {}, "give --as-chat"),
        ({"format": "chat"}, {"as_chat": True}, None),
        ({"format": "text", "text": "{text}"}, {}, None),
    ],
)
@pytest.mark.parametrize("task", ["gsm8k", "loss", "generation"])
def test_another_prompt_than_that_of_the_training_is_said(
    task: str,
    trained: dict[str, Any],
    given: dict[str, Any],
    said: str | None,
    write: Write,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The default prompt was asked of a model that had never seen it, and nothing said so."""
    data = {"format": "prompt-completion", **trained}
    (tmp_path / "run.json").write_text(json.dumps(sealed({"recipe": {"data": data}})), encoding="utf-8")
    rows = write({"instruction": "2 + 3?", "output": "5"})
    evaluated = EvaluationSettings(model=tmp_path, task=task, data=rows, **given)
    read = {"gsm8k": problems, "loss": passages, "generation": lambda source, each: with_templates(each, source)}[task]
    read(read_source(evaluated), evaluated)
    assert (said or "") in caplog.text
    assert bool(caplog.text) == (said is not None)


def test_templates_name_any_columns(write: Write) -> None:
    data = write({"body": "Two and three.", "question": "Sum?", "worked": "#### 5"})
    given = settings("gsm8k", data, prompt="{body} {question} {{x}}", completion="{worked}")
    (problem,) = read_problems(given)
    assert (problem.prompt, problem.reference) == ("Two and three. Sum? {x}", "5")


@pytest.mark.parametrize(
    ("row", "reference"),
    [
        (MATH, r"\frac12"),
        ({**MATH, "answer": "0.5"}, "0.5"),
        ({"query": "?", "response": "So.\nThe answer is: 0.5"}, "0.5"),
        ({"problem": "?", "answer": r"\left( 3, \frac{\pi}{2} \right)"}, r"( 3, \frac{\pi}{2} )"),
    ],
)
def test_a_competition_problem_has_its_answer_boxed_announced_or_bare(write: Write, row: Any, reference: str) -> None:
    (problem,) = read_problems(settings("math", write(row)))
    assert problem.reference == reference


def test_a_number_in_the_data_is_a_reference_too(write: Write) -> None:
    (problem,) = read_problems(settings("gsm8k", write({"input": "?", "target": 43.0})))
    assert problem.reference == "43.0"


def test_a_limit_takes_the_first_rows(write: Write) -> None:
    data = write(*({"question": "?", "answer": number} for number in range(5)))
    assert [problem.reference for problem in read_problems(settings("gsm8k", data, limit=2))] == ["0", "1"]


def test_every_file_format_gives_the_same_problems(write: Write, tmp_path: Path) -> None:
    import pandas

    frame = pandas.DataFrame([GSM8K, {"question": 'Say "a, b"?', "answer": "#### 7"}])
    frame.to_parquet(tmp_path / "data.parquet")
    frame.to_csv(tmp_path / "data.csv", index=False)
    frame.to_json(tmp_path / "data.json", orient="records")
    frame.to_json(tmp_path / "data.jsonl", orient="records", lines=True)
    first, *others = [
        read_problems(settings("gsm8k", tmp_path / f"data.{ending}")) for ending in ("parquet", "csv", "json", "jsonl")
    ]
    assert all(other == first for other in others)


def test_a_loss_reads_questions_pairs_conversations_and_text(write: Write) -> None:
    (passage,) = read_passages(settings("loss", write(GSM8K)))
    assert (passage.prompt, passage.target) == ("Question: How many is 2 + 3?\nAnswer:", " 2 + 3 = 5\n#### 5")
    (passage,) = read_passages(settings("loss", write({"prompt": "a|", "completion": "b"})))
    assert (passage.prompt, passage.target, passage.ends) == ("a|", "b", True)
    (passage,) = read_passages(settings("loss", write({"text": "a story"})))
    assert (passage.prompt, passage.target, passage.ends) == (None, "a story", True)
    messages = [{"role": role, "content": role[0]} for role in ("user", "assistant", "user", "assistant")]
    (passage,) = read_passages(settings("loss", write({"messages": messages})))
    assert isinstance(passage.prompt, Conversation)
    assert passage.prompt.messages == messages


TALK = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]


def test_a_loss_reads_conversations_in_several_columns(write: Write) -> None:
    (passage,) = read_passages(settings("loss", write({"prompt": TALK[:1], "completion": TALK[1:]})))
    assert isinstance(passage.prompt, Conversation)
    assert passage.prompt.messages == TALK
    (passage,) = read_passages(settings("loss", write({"conversations": [{"from": "gpt", "value": "a"}]})))
    assert isinstance(passage.prompt, Conversation)
    assert passage.prompt.messages == TALK[1:]


def test_templates_decide_what_a_loss_reads_where_the_columns_would_decide_otherwise(write: Write) -> None:
    """Templates were read, and then left aside in silence, where a row had messages or a text as well."""
    row = {"messages": TALK, "text": "all of it", "question": "q", "answer": "a"}
    (passage,) = read_passages(settings("loss", write(row), prompt="{question}|", completion="{answer}"))
    assert (passage.prompt, passage.target) == ("q|", "a")
    (passage,) = read_passages(settings("loss", write({**row, "messages": None}), completion="{answer}"))
    assert (passage.prompt, passage.target) == ("Question: q\nAnswer:", "a")


def test_the_loss_of_whole_texts_has_a_template_too(write: Write) -> None:
    """A training on `data.text` of several columns could not be evaluated as it was trained."""
    row = {"title": "T", "body": "b", "text": "other", "messages": TALK, "prompt": "p", "completion": "c"}
    (passage,) = read_passages(settings("loss", write(row), text="{title}\n{body}"))
    assert (passage.prompt, passage.target, passage.ends) == (None, "T\nb", True)
    with pytest.raises(UsageError, match="line 1 has no column 'head'"):
        read_passages(settings("loss", write(row), text="{head}"))
    with pytest.raises(UsageError, match="line 1: column 'messages' holds messages of a conversation"):
        read_passages(settings("loss", write(row), text="{messages}"))
    for name, value in {"prompt": "{title}", "completion": "{body}", "as_chat": True}.items():
        with pytest.raises(UsageError, match=f"{name}=.* beside text='{{title}}'"):
            settings("loss", write(row), text="{title}", **{name: value})


@pytest.mark.parametrize(
    ("trained", "given", "said"),
    [
        ("{title}\n{body}", {}, "give --text '{title}\\n{body}'"),
        ("{title}\n{body}", {"text": "{title}\n{body}"}, ""),
        ("{title}\n{body}", {"completion": "{body}", "prompt": "{title}"}, ""),
        ("{text}", {}, ""),
        ("{head}", {}, ""),
    ],
)
def test_another_text_than_that_of_the_training_is_said(
    trained: str, given: dict[str, str], said: str, write: Write, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The loss of other texts than those of the training was far off, and nothing said why."""
    data = {"format": "text", "text": trained}
    (tmp_path / "run.json").write_text(json.dumps(sealed({"recipe": {"data": data}})), encoding="utf-8")
    evaluated = EvaluationSettings(
        model=tmp_path, task="loss", data=write({"title": "T", "body": "b", "text": "other"}), **given
    )
    passages(read_source(evaluated), evaluated)
    assert said in caplog.text
    assert bool(caplog.text) == bool(said)


def test_a_text_is_not_read_as_a_chat_in_silence(write: Write) -> None:
    with pytest.raises(UsageError, match="line 1 has no column 'answer'"):
        read_passages(settings("loss", write({"text": "a story"}), as_chat=True))


def test_a_template_on_the_command_line_is_that_of_the_training() -> None:
    typed = "{a}\\t{b}\\n"
    names = ("text", "text_pair", "labels", "columns", "harness")
    given = read_options(
        model="m", task="loss", data="d", prompt=typed, completion="{c}", stop=None, **dict.fromkeys(names)
    )
    assert given.prompt == parse_override(f"data.prompt={typed}")["data"]["prompt"] == "{a}\t{b}\n"


def test_a_loss_prefers_the_worked_answer_to_the_bare_one(write: Write) -> None:
    (passage,) = read_passages(settings("loss", write({**MATH, "answer": "0.5"})))
    assert passage.target == " It is $\\boxed{\\frac12}$."


def test_a_text_file_is_one_running_text_with_its_empty_lines(write: Write) -> None:
    (passage,) = read_passages(settings("loss", write("one", "", "two", name="data.txt")))
    assert (passage.prompt, passage.target, passage.ends) == (None, "one\n\ntwo\n", False)


def test_as_chat_a_pair_is_a_question_and_its_answer(write: Write) -> None:
    (passage,) = read_passages(settings("loss", write(GSM8K), as_chat=True, prompt="{question}"))
    assert isinstance(passage.prompt, Conversation)
    assert passage.prompt.messages == [
        {"role": "user", "content": "How many is 2 + 3?"},
        {"role": "assistant", "content": "2 + 3 = 5\n#### 5"},
    ]


WRONG_ROWS = [
    ("gsm8k", [GSM8K, {"question": "?"}], {}, r"line 2 has no column 'answer'; its columns are: .*question"),
    ("gsm8k", [{"a": 1, "b": 2}], {}, r"line 1 has no column 'answer'; its columns are: a, b"),
    ("gsm8k", [{"a": 1, "answer": 2}], {}, r"line 1 has no column 'question'; its columns are: a, answer"),
    ("gsm8k", [GSM8K], {"prompt": "{body}"}, r"line 1 has no column 'body'"),
    ("gsm8k", [GSM8K], {"completion": "{worked}"}, r"line 1 has no column 'worked'"),
    ("gsm8k", [GSM8K, {"question": "?", "answer": None}], {}, r"line 2: column 'answer' is null"),
    ("gsm8k", [GSM8K, {"question": "?", "answer": "none"}], {}, r"line 2: the answer 'none' holds no number"),
    ("gsm8k", [{"question": " ", "answer": "1"}], {"prompt": "{question}"}, r"line 1: the prompt is empty"),
    ("math", [{**MATH, "solution": "no\nbox"}], {}, r"line 1: the answer 'no\\nbox' holds no \\boxed"),
    ("loss", [{"a": 1}], {}, r"line 1 has no column 'answer'; its columns are: a"),
    ("loss", [{"prompt": "p", "completion": "c"}, {"prompt": "p"}], {}, r"line 2 has no column 'completion'"),
    ("loss", [{"messages": [{"role": "user"}]}], {}, r"line 1: message 1: \"content\" .* is null or missing"),
    ("gsm8k", [{"prompt": TALK, "answer": "1"}], {}, r"line 1: column 'question' holds messages of a conversation"),
    ("loss", [{"messages": "?"}], {}, r"line 1: the text in column 'messages' is no JSON"),
    ("loss", [{"text": "t"}, {"txt": "t"}], {}, r"line 2 has no column 'text'; its columns are: txt"),
]


@pytest.mark.parametrize(("task", "rows", "changes", "message"), WRONG_ROWS)
def test_a_wrong_row_is_named(write: Write, task: str, rows: list[Any], changes: Any, message: str) -> None:
    given = settings(task, write(*rows), **changes)
    with pytest.raises(UsageError, match=message) as error:
        read_passages(given) if task == "loss" else read_problems(given)
    assert "data.jsonl" in str(error.value)


@pytest.mark.parametrize("task", ["gsm8k", "loss"])
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.jsonl", None, "no such file"),
        ("broken.jsonl", b'{"question": "?", "answer": "1"}\n{"question": }\n', "line 2: broken JSON"),
        ("empty.jsonl", b"", "no rows"),
        ("latin.jsonl", b'{"question": "?", "answer": "1"}\n{"question": "caf\xe9"}\n', "line 2: not UTF-8 .byte 0xe9"),
        ("data.xlsx", b"PK", "cannot read files ending in '.xlsx'"),
        ("data.parquet", b"PAR1 no", "not a readable Parquet file"),
    ],
)
def test_an_unreadable_file_is_explained(
    tmp_path: Path, task: str, name: str, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=message) as error:
        read_source(settings(task, tmp_path / name))
    assert name in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (b" \n\n", "holds no text"),
        (b"one\ntwo \xff\n", "line 2: not UTF-8 .byte 0xff at offset 8"),
    ],
)
def test_an_unreadable_text_is_explained(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "data.txt").write_bytes(content)
    with pytest.raises(UsageError, match=message):
        read_source(settings("loss", tmp_path / "data.txt"))


def test_a_data_set_that_is_nowhere_is_explained() -> None:
    with pytest.raises(UsageError, match="there is no such file or folder here, no copy of it from the hub"):
        read_source(settings("gsm8k", "nobody/nothing-of-the-kind"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"task": "gsm9k"}, "task='gsm9k' is not one of gsm8k, math, generation, loss"),
        ({}, "no task is named; write task=gsm8k"),
        ({"task": "loss"}, "write data="),
        ({"task": "gsm8k", "harness": ("gsm8k",)}, "give one of them"),
        ({"harness": ("gsm8k",), "data": "d.jsonl"}, "bring their own"),
        ({"harness": ("gsm8k",), "max_new_tokens": 5}, "bring their own"),
        ({"task": "gsm8k", "num_fewshot": 5}, "write it with harness"),
        ({"task": "gsm8k", "batch_size": 0}, "batch_size=0 is not a positive number"),
        ({"task": "gsm8k", "limit": -1}, "limit=-1 is not a positive number"),
        ({"task": "gsm8k", "max_new_tokens": 0}, "max_new_tokens=0 is not a positive number"),
        ({"task": "gsm8k", "dtype": "int8"}, "dtype='int8' is not one of"),
        ({"task": "gsm8k", "prompt": "Answer:"}, "prompt='Answer:' names no column"),
        ({"task": "gsm8k", "prompt": "{question"}, "a literal brace is written twice"),
        ({"task": "loss", "data": "d", "max_new_tokens": 5}, "max_new_tokens=5 is for tasks whose answers the model"),
        ({"task": "loss", "data": "d", "stop": ("x",)}, "is for tasks whose answers the model writes, not for loss"),
        ({"task": "classification", "data": "d", "as_chat": True}, "as_chat is not for the task classification"),
        ({"task": "gsm8k", "stop": ("",)}, "empty stop string"),
    ],
)
def test_a_wrong_setting_says_what_to_write(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        EvaluationSettings(model="any", **values)


@pytest.mark.parametrize(
    ("task", "given", "read"), [("gsm8k", None, "main"), ("gsm8k", "socratic", "socratic"), ("math", "some", "some")]
)
def test_a_configuration_without_data_is_one_of_the_tasks_own(
    task: str, given: str | None, read: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def hub(name: str, *, subset: str | None, **_: Any) -> tuple[Rows, str]:
        asked.append(subset)
        return Rows.counted([GSM8K], Origin(name)), "print"

    monkeypatch.setattr("gradselect.app.evaluate.problems.read_hub_rows", hub)
    read_source(EvaluationSettings(model="any", task=task, subset=given))
    assert asked == [read]
