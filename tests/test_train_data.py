"""Examples from rows: templates, formats, hold-out, and rows that cannot be used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from gradselect import UsageError
from gradselect.app.data.template import columns_of, render
from gradselect.app.draft import draft_recipe
from gradselect.app.evaluate import EvaluationSettings
from gradselect.app.evaluate.problems import read_source
from gradselect.app.inputs.examples import RenderedRows, render_examples
from gradselect.app.recipe import Data

ROWS = [{"question": f"q{n}", "answer": n} for n in range(10)]


def write(folder: Path, rows: list[Any], name: str = "data.jsonl") -> str:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return str(path)


def load(path: str, *, seed: int = 0, **settings: Any) -> RenderedRows:
    values = {"format": "prompt-completion", "prompt": "{question}", "completion": " {answer}", "path": path}
    if settings.get("format", "prompt-completion") != "prompt-completion":
        values = {"path": path}
    return render_examples(TypeAdapter(Data).validate_python({**values, **settings}), seed=seed)


def test_a_template_is_filled_with_columns_and_keeps_doubled_braces() -> None:
    template = "{a}: \\boxed{{{#1 b}}}\n"
    assert columns_of(template) == ("a", "#1 b")
    assert render(template, {"a": 1.5, "#1 b": "{x}"}) == "1.5: \\boxed{{x}}\n"


def test_prompt_and_completion_come_from_their_templates(tmp_path: Path) -> None:
    examples = load(write(tmp_path, ROWS), prompt="Question: {question}\nAnswer:")
    assert examples.rows["train"][3] == {"prompt": "Question: q3\nAnswer:", "completion": " 3"}
    assert "validation" not in examples.rows


def test_as_chat_makes_messages_of_them(tmp_path: Path) -> None:
    examples = load(write(tmp_path, ROWS), as_chat=True, completion="{answer}")
    assert examples.rows["train"][1]["conversation"].messages == [
        {"role": "user", "content": "q1"},
        {"role": "assistant", "content": "1"},
    ]


CONVERSATION = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "c"},
    {"role": "assistant", "content": "d", "weight": 1},
]


def test_a_conversation_keeps_its_messages(tmp_path: Path) -> None:
    (example,) = load(write(tmp_path, [{"chat": CONVERSATION}]), format="chat", messages="chat").rows["train"]
    assert [message["content"] for message in example["conversation"].messages] == ["a", "b", "c", "d"]


def test_text_is_its_template(tmp_path: Path) -> None:
    assert load(write(tmp_path, ROWS), format="text", text="{question}!").rows["train"][0] == {"text": "q0!"}


def test_limits_take_the_first_rows(tmp_path: Path) -> None:
    path = write(tmp_path, ROWS)
    examples = load(path, limit=3, validation=path, validation_limit=2)
    assert (len(examples.rows["train"]), len(examples.rows["validation"])) == (3, 2)
    assert examples.sources["train"].describe()["rows_used"] == 3


UNREAD = {
    "validation_limit": (5, r"data\.validation_limit=5 is for validation data, and data\.validation is not set"),
    "subset": ("main", r"subset='main' is for data sets on the hub; .*data\.jsonl is none: leave it out"),
    "split": ("dev", r"split='dev' is for data sets on the hub and for folders; .*data\.jsonl is neither"),
}


@pytest.mark.parametrize("key", UNREAD)
def test_what_is_not_read_is_refused(tmp_path: Path, key: str) -> None:
    value, said = UNREAD[key]
    path = write(tmp_path, ROWS)
    assert len(load(path, split="train").rows["train"]) == 10
    with pytest.raises(UsageError, match=said):
        load(path, **{key: value})
    if key == "validation_limit":
        return
    with pytest.raises(UsageError, match=said):
        read_source(EvaluationSettings(model="any", task="loss", data=path, **{key: str(value)}))
    with pytest.raises(UsageError, match=said):
        draft_recipe("any", path, [f"data.{key}={value}"])


def test_held_out_rows_are_not_trained_on_and_the_seed_decides_which(tmp_path: Path) -> None:
    path = write(tmp_path, ROWS)
    first, again, other = (load(path, validation=0.3, seed=seed).rows for seed in (1, 1, 2))
    held_out = first["validation"]
    assert len(held_out) == 3
    prompts = [row["prompt"] for row in [*first["train"], *held_out]]
    assert sorted(prompts) == sorted(row["question"] for row in ROWS)
    assert held_out == again["validation"]
    assert held_out != other["validation"]


def test_the_number_of_held_out_rows_is_in_their_name(tmp_path: Path) -> None:
    path = write(tmp_path, [{"question": f"q{n}", "answer": n} for n in range(1000)])
    train, validation = load(path, validation=0.02, validation_limit=5).sources.values()
    assert (train.path, len(train.rows)) == (path, 980)
    assert (validation.path, len(validation.rows)) == (f"{path} (20 of 1,000 rows held out)", 5)


def test_a_share_that_leaves_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds out 1 of 1 rows and leaves none"):
        load(write(tmp_path, ROWS[:1]), validation=0.5)


def test_a_missing_column_is_named_with_its_row(tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match="line 1 has no column 'query'; its columns are: question, answer; name the"
    ) as e:
        load(write(tmp_path, ROWS), prompt="{query}")
    assert str(e.value).endswith("in data.prompt, e.g. 'data.prompt={question}'")


@pytest.mark.parametrize("key", ["prompt", "completion"])
def test_the_bare_name_of_a_column_is_no_template(tmp_path: Path, key: str) -> None:
    """Every row was trained on the word "question"."""
    with pytest.raises(UsageError, match=rf"data\.{key}='question' is this very word .* 'data\.{key}={{question}}'"):
        load(write(tmp_path, ROWS), **{key: "question"})
    assert load(write(tmp_path, ROWS), **{key: "a question: "}).rows


def test_an_empty_value_is_named_with_its_row(tmp_path: Path) -> None:
    path = write(tmp_path, [*ROWS[:2], {"question": "q", "answer": None}])
    with pytest.raises(UsageError, match=r"data\.jsonl, line 3: column 'answer' is null"):
        load(path)


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ("hello", "the text in column 'messages' is no JSON ('hello')"),
        ("[{'role': 'user'}]", "is no JSON"),
        ({"role": "user"}, "expected a list of messages like"),
        ([{"role": "user"}], "message 1: \"content\" of a message of the role 'user' is null or missing"),
        ([{"role": "user", "content": 1}], 'message 1: "content" is 1; expected text'),
        ([{"content": "a"}], 'message 1: the message has no "role"'),
        (["a"], "message 1: expected an object like"),
    ],
)
def test_what_is_no_conversation_is_named_with_its_row(tmp_path: Path, messages: Any, said: str) -> None:
    path = write(tmp_path, [{"messages": CONVERSATION}, {"messages": messages}])
    with pytest.raises(UsageError, match="line 2: ") as raised:
        load(path, format="chat")
    assert said in str(raised.value)


def test_what_is_neither_a_file_nor_on_the_hub_is_said_to_be_so(tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match=r"data\.path='nobody/nothing' cannot be used: there is no such file or folder"
    ):
        load("nobody/nothing")
    with pytest.raises(UsageError, match="no such file"):
        load(str(tmp_path / "nix.csv"))
