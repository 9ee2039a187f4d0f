"""Chat rows, from the file to the trained tokens: all that a row says reaches the model, or is refused by name."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import TypeAdapter, ValidationError
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from train_fixtures import CHAT_TEMPLATE, MARKED_CHAT_TEMPLATE, byte_tokenizer, parse, quiet, write_model
from transformers import PreTrainedTokenizerFast
from trl import chat_template_utils

from gradselect import UsageError
from gradselect.app.data import Conversation
from gradselect.app.evaluate import EvaluationSettings, evaluate
from gradselect.app.inputs import end_of_turn_tokens
from gradselect.app.inputs.chat_examples import chat_tokens
from gradselect.app.inputs.examples import Examples, render_examples
from gradselect.app.inputs.model import load_tokenizer
from gradselect.app.inputs.rows import token_rows
from gradselect.app.inputs.tokenization import tokenize_examples
from gradselect.app.inputs.tokens import token_dataset
from gradselect.app.recipe import Data, ModelSettings
from gradselect.app.train import train

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")

FULL_TEMPLATE = (
    "{%- if tools %}<tools>{{ tools | tojson }}\n{% endif %}"
    "{%- for document in documents or [] %}<doc>{{ document.text }}\n{% endfor %}"
    "{%- for m in messages %}"
    "{%- if m.role == 'assistant' %}<assistant>{% generation %}"
    "{%- if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{- m.content or '' }}"
    "{%- for call in m.tool_calls or [] %}<call>{{ call.function | tojson }}</call>{% endfor %}"
    "{{- eos_token }}{% endgeneration %}"
    "{%- else %}<{{ m.role }}>{{ m.content }}\n{% endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}<assistant>{% endif %}"
)
"""Renders everything, and marks answers."""

ASK, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


def calling(arguments: Any, **others: Any) -> dict[str, Any]:
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": arguments}}
    return {"role": "assistant", "tool_calls": [call], **others}


Load = Callable[..., Examples]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Return a function that tokenizes rows with a chat template, by default one that renders everything."""

    def load(*rows: Any, template: str = FULL_TEMPLATE, path: Path | None = None, **data: Any) -> Examples:
        file = path or tmp_path / "chat.jsonl"
        if path is None:
            file.write_text("\n".join(json.dumps(row) for row in rows), "utf-8")
        settings = TypeAdapter(Data).validate_python({"format": "chat", "path": str(file), **data})
        return tokenize_examples(render_examples(settings, seed=0), settings, byte_tokenizer(template))

    return load


def texts(examples: Examples, *, number: int = 0) -> tuple[str, list[str]]:
    """Return the text of an example, and each stretch of it that is trained."""
    tokenizer, row = byte_tokenizer(), examples.train[number]
    stretches: list[list[int]] = []
    before = -100
    for label in row["labels"]:
        if label != -100:
            stretches = [*stretches, []] if before == -100 else stretches
            stretches[-1].append(label)
        before = label
    return tokenizer.decode(row["input_ids"]), [tokenizer.decode(one) for one in stretches]


# What reaches the template --------------------------------------------------------------------------------------------


def test_tools_and_calls_with_different_arguments_stay_as_the_file_has_them(load: Load) -> None:
    """Arrow gives every object the keys of all others: the second call had `"place": null`."""
    rows = [{"messages": [ASK, calling(one)], "tools": [TOOL]} for one in ({"place": "Oslo"}, {"time": 3, "day": None})]
    examples = load(*rows)
    whole, trained = texts(examples)
    assert whole.startswith(f"<tools>{json.dumps([TOOL])}\n<user>hi\n")
    assert trained == ['<call>{"name": "weather", "arguments": {"place": "Oslo"}}</call><end>']
    assert '{"time": 3, "day": null}' in texts(examples, number=1)[0]


@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}])
def test_arguments_as_text_are_objects_for_the_template(load: Load, content: Any) -> None:
    """OpenAI's API gives text, which `tojson` would put into quotes once more."""
    examples = load({"messages": [ASK, calling('{"place": "Oslo"}', **content)], "tools": json.dumps([TOOL])})
    assert '"arguments": {"place": "Oslo"}}' in texts(examples)[0]
    assert examples.notes == ()


def test_a_template_that_joins_arguments_as_text_gets_text(load: Load) -> None:
    template = (
        "{% for m in messages %}{{ m.role + m.content }}{% for c in m.tool_calls %}[{{ 'f' + c.function.arguments }}]"
    )
    whole, _ = texts(
        load({"messages": [ASK, calling({"a": "ö"})]}, template=template + "{% endfor %}{{ '|' }}{% endfor %}")
    )
    assert whole == 'userhi|assistant[f{"a": "ö"}]|'


def test_a_template_never_shows_pythons_form_of_an_object(load: Load) -> None:
    template = (
        "{% for m in messages %}{{ m.role }}:{{ m.content }}{% for c in m.tool_calls %}{{ c.function.arguments }}"
    )
    rows = {"messages": [ASK, calling({"a": 1}), {"role": "tool", "content": {"t": [2]}}, ANSWER]}
    whole, _ = texts(load(rows, template=template + "{% endfor %}{{ '|' }}{% endfor %}"))
    assert whole == 'user:hi|assistant:{"a": 1}|tool:{"t": [2]}|assistant:hello|'


def test_the_old_function_call_becomes_a_call(load: Load) -> None:
    old = {"role": "assistant", "content": None, "function_call": {"name": "weather", "arguments": '{"a": 1}'}}
    rows = {"messages": [ASK, old, {"role": "function", "name": "weather", "content": "7"}, ANSWER]}
    whole, trained = texts(load(rows, loss_on="answers"))
    assert trained == ['<call>{"name": "weather", "arguments": {"a": 1}}</call><end>', "hello<end>"]
    assert "<tool>7" in whole


def test_thoughts_reach_the_template_also_under_several_names(load: Load) -> None:
    _, trained = texts(load({"messages": [ASK, {**ANSWER, "reasoning_content": "mm", "reasoning": "mm"}]}))
    assert trained == ["<think>mm</think>hello<end>"]


def test_thoughts_that_a_template_drops_from_earlier_turns_are_counted(load: Load) -> None:
    template = chat_template_utils.qwen3_chat_template
    talk = [ASK, {**ANSWER, "reasoning_content": "one"}, ASK, {**ANSWER, "reasoning_content": "two"}]
    examples = load({"messages": talk}, template=template)
    assert "two" in texts(examples)[1][0]
    assert "one" not in texts(examples)[0]
    assert any("`reasoning_content`" in note and "in a place where" in note for note in examples.notes)


@pytest.mark.parametrize(("template", "text"), [(FULL_TEMPLATE, "a\nb"), (None, "ab")])
def test_parts_of_a_content_are_text(load: Load, template: str | None, text: str) -> None:
    takes_parts = (
        "{% for m in messages %}<{{ m.role }}>"
        "{% for p in m.content %}{{ p.text }}{% endfor %}{{ eos_token }}{% endfor %}"
    )
    parts = {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
    examples = load({"messages": [parts, ANSWER]}, template=template or takes_parts)
    whole, _ = texts(examples)
    assert f"<user>{text}" in whole
    assert "hello" in whole
    assert ("joined by line ends" in "".join(examples.notes)) == (template is not None)


def test_a_template_that_cuts_thoughts_off_gets_texts_as_they_are(load: Load) -> None:
    """With lists of parts this one would show the thoughts; a form is changed only where a content is lost."""
    template = (
        "{% for m in messages %}<{{ m.role }}>{% if m.content is string %}{{ m.content.split('</think>')[-1] }}"
        "{% else %}{{ m.content[0].text }}{% endif %}{{ eos_token }}{% endfor %}"
    )
    talk = [ASK, {**ANSWER, "content": "<think>mm</think>hello"}]
    examples = load({"messages": talk}, {"messages": [ASK, ANSWER]}, template=template)
    assert texts(examples)[0] == "<user>hi<end><assistant>hello<end>"
    assert examples.notes[0].startswith("1 of 2 conversations lose the thoughts (<think>) of an answer that trains")
    keeps = load({"messages": talk}, template=chat_template_utils.qwen3_chat_template)
    assert not any("thoughts" in note for note in keeps.notes)


def test_template_arguments_and_documents_and_the_column_system_are_used(load: Load) -> None:
    row = {"messages": [ASK, ANSWER], "documents": [{"title": "t", "text": "Doc."}], "system": "Be short."}
    assert texts(load(row))[0] == "<doc>Doc.\n<system>Be short.\n<user>hi\n<assistant>hello<end>"
    thinking = chat_template_utils.qwen3_chat_template
    for value, start in ((False, "hello"), (True, "<think>\n\n</think>\n\nhello")):
        row = {"messages": [ASK, ANSWER], "chat_template_kwargs": {"enable_thinking": value}}
        assert texts(load(row, template=thinking))[1][0].startswith(start)


def test_keys_that_a_table_fills_with_null_are_absent(load: Load, tmp_path: Path) -> None:
    messages = [[ASK, calling({"place": "Oslo"})], [ASK, calling({"time": 3}), {**ANSWER, "name": None}]]
    pq.write_table(pa.table({"messages": messages, "tools": [[TOOL], None]}), tmp_path / "chat.parquet")
    examples = load(path=tmp_path / "chat.parquet", loss_on="answers")
    assert texts(examples)[1] == ['<call>{"name": "weather", "arguments": {"place": "Oslo"}}</call><end>']
    assert texts(examples, number=1)[1][0] == '<call>{"name": "weather", "arguments": {"time": 3}}</call><end>'


def test_values_that_json_lacks_are_written_out_or_refused(load: Load, tmp_path: Path) -> None:
    path = tmp_path / "chat.parquet"
    for value, said in ((datetime(2024, 5, 1, 12), '{"when": "2024-05-01T12:00:00"}'), (b"x", None), (math.nan, None)):
        pq.write_table(pa.table({"messages": [[ASK, calling({"when": value})]]}), path)
        if said is not None:
            assert said in texts(load(path=path))[0]
            continue
        with pytest.raises(UsageError, match=r"chat\.parquet, row 1: column 'messages' holds (bytes|nan)"):
            load(path=path)


def test_messages_may_be_json_text_or_an_object_of_lists_or_several_columns(load: Load) -> None:
    as_lists = {"role": ["user", "assistant"], "content": ["hi", "hello"]}
    examples = load({"messages": json.dumps([ASK, ANSWER])}, {"messages": as_lists})
    assert texts(examples) == texts(examples, number=1) == ("<user>hi\n<assistant>hello<end>", ["hello<end>"])
    pair = load({"prompt": [ASK], "completion": [ANSWER]}, messages=["prompt", "completion"])
    assert texts(pair) == texts(examples)


def test_sharegpt_has_other_names_for_everything(load: Load) -> None:
    said = [
        ("Human", "q"),
        ("function_call", '{"name": "weather", "arguments": {}}'),
        ("observation", "7"),
        ("bard", "a"),
    ]
    row = {"id": "x1", "conversations": [{"from": name, "value": value} for name, value in said], "tools": [TOOL]}
    whole, trained = texts(load(row, messages="conversations", loss_on="answers"))
    assert "<user>q\n" in whole
    assert "<tool>7\n" in whole
    assert trained == ['<call>{"name": "weather", "arguments": {}}</call><end>', "a<end>"]


def test_names_of_both_forms_may_be_mixed(load: Load) -> None:
    talk = [{"role": "user", "value": "q"}, {"from": "gpt", "content": "a"}]
    assert texts(load({"messages": talk})) == ("<user>q\n<assistant>a<end>", ["a<end>"])


def test_an_unknown_name_of_a_role_can_be_given(load: Load) -> None:
    row = {"conversations": [{"from": "Mensch", "value": "q"}, {"from": "gpt", "value": "a"}]}
    with pytest.raises(UsageError, match=r"line 1: message 1: .*'Mensch', which is none of .*data\.roles=\{\"Mensch\""):
        load(row, messages="conversations")
    assert texts(load(row, messages="conversations", roles={"Mensch": "user"}))[1] == ["a<end>"]


# What is refused ------------------------------------------------------------------------------------------------------

NAMED = {**ASK, "name": "Ann"}
REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "tools": (
        {"messages": [ASK, ANSWER], "tools": [TOOL]},
        {"template": CHAT_TEMPLATE},
        r"chat\.jsonl, line 1: the chat template never renders `tools` \(1 conversation\).*data\.ignore=\[tools\]",
    ),
    "calls": (
        {"messages": [ASK, calling({"a": 1})]},
        {"template": CHAT_TEMPLATE},
        r"never renders `tool_calls` of messages of the role 'assistant' \(1 conversation\), so",
    ),
    "thoughts": (
        {"messages": [ASK, {**ANSWER, "reasoning_content": "mm"}]},
        {"template": CHAT_TEMPLATE},
        r"never renders `reasoning_content`.*data\.ignore=\[reasoning_content\]",
    ),
    "names": ({"messages": [NAMED, ANSWER]}, {}, r"never renders `name` of messages of the role 'user'"),
    "arguments": (
        {"messages": [ASK, ANSWER], "chat_template_kwargs": {"enable_thinking": True}},
        {},
        r"never renders `enable_thinking`.*data\.ignore=\[chat_template_kwargs\]",
    ),
    "a role": (
        {"messages": [{"role": "system", "content": "S"}, ASK, ANSWER]},
        {"template": "{% for m in messages if m.role != 'system' %}{{ m.role }}{{ m.content }}{% endfor %}"},
        r"never renders messages of the role 'system'.*data\.roles=\{\"system\": \"user\"\}",
    ),
    "an image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, ANSWER]},
        {},
        r"line 1: message 1: a part of \"content\" is of the type 'image_url'; only text is trained here",
    ),
    "null": (
        {"messages": [ASK, {"role": "assistant", "content": None}]},
        {},
        r"message 2: \"content\" .* null or missing",
    ),
    "half a weight": ({"messages": [ASK, {**ANSWER, "weight": 0.5}]}, {}, r"message 2: \"weight\" is 0\.5"),
    "weight in all": (
        {"messages": [ASK, {**ANSWER, "weight": 0}]},
        {"loss_on": "all"},
        r"message 2 is not to be trained on \(weight 0\).*data\.loss_on=answers",
    ),
    "a rule of the template": (
        {"messages": [ASK, ASK, ANSWER]},
        {"template": "{% if messages[1].role == 'user' %}{{ raise_exception('roles must alternate') }}{% endif %}"},
        r"line 1: the model's chat template cannot render the conversation: roles must alternate",
    ),
    "arguments that are no JSON": ({"messages": [ASK, calling("Oslo")]}, {}, r"'weather' are no JSON object: 'Oslo'"),
    "a tool without a name": (
        {"messages": [ASK, ANSWER], "tools": {"weather": {}}},
        {},
        r"column 'tools': a tool has no name",
    ),
    "functions": ({"messages": [ASK, ANSWER], "functions": [{"name": "f"}]}, {}, r"data\.tools=functions"),
    "another column": ({"conversations": [ASK, ANSWER]}, {}, r"write data\.messages=conversations"),
    "a column that another name gives away": ({"dialog": [ASK, ANSWER]}, {}, r"write data\.messages=dialog"),
    "a preference": ({"rejected": [ASK, ANSWER], "chosen": [ASK, ANSWER]}, {}, r"write data\.messages=chosen"),
    "two columns": ({"prompt": [ASK], "completion": [ANSWER]}, {}, r"write data\.messages=\[prompt,completion\]"),
    "pictures beside the messages": (
        {"messages": [ASK, ANSWER], "images": ["a.png"]},
        {},
        r"line 1: the column 'images' holds what the model would not see.*data\.ignore=\[images\]",
    ),
    "a system prompt under another name": (
        {"messages": [ASK, ANSWER], "system_prompt": "Be brief."},
        {},
        r"the column 'system_prompt' is not read; rename it to 'system'.*data\.ignore=\[system_prompt\]",
    ),
    "no answers": ({"messages": [ASK]}, {}, r"none of the 1 conversations has an answer.*their roles are user"),
    "marks without calls": (
        {"messages": [ASK, calling({"a": 1}, content="ok")]},
        {
            "template": MARKED_CHAT_TEMPLATE.replace(
                "{% endfor %}", "{% for c in message.tool_calls %}{{ c.function | tojson }}{% endfor %}{% endfor %}", 1
            ),
            "loss_on": "answers",
        },
        r"message 2: the marks of the chat template .* leave out 'weather'.*data\.loss_on=last-answer",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_reach_the_model_is_refused_by_name(load: Load, name: str) -> None:
    row, settings, message = REFUSED[name]
    with pytest.raises(UsageError, match=message):
        load(row, **settings)


def test_a_field_that_is_lost_in_one_row_only_is_refused_with_its_line(load: Load) -> None:
    """Some templates drop the calls of messages with text."""
    template = FULL_TEMPLATE.replace("in m.tool_calls or []", "in (m.tool_calls if not m.content else [])")
    rows = [{"messages": [ASK, calling({"n": n})]} for n in range(12)]
    with pytest.raises(UsageError, match=r"line 13: message 2: the chat template does not render `tool_calls`"):
        load(*rows, {"messages": [ASK, calling({"n": "x"}, content="I call.")]}, template=template)


def test_what_is_ignored_on_purpose_is_counted(load: Load) -> None:
    row = {"messages": [{**NAMED, "id": 3}, ANSWER], "tools": [TOOL], "images": ["a.png"]}
    examples = load(row, template=CHAT_TEMPLATE, ignore=["name", "id", "tools", "images", "other"])
    assert texts(examples)[0] == "user: hi<end>assistant: hello<end>"
    assert [note.split(";")[0] for note in sorted(examples.notes)] == [
        "1 of 1 conversations have the column `images`, which data.ignore leaves out",
        "1 of 1 conversations have the column `tools`, which data.ignore leaves out",
        "1 of 1 conversations hold `id` in a message, which data.ignore leaves out",
        "1 of 1 conversations hold `name` in a message, which data.ignore leaves out",
        "data.ignore names 'other', which no row and no message has",
    ]


def test_further_columns_of_a_row_are_columns(load: Load) -> None:
    assert load({"messages": [ASK, ANSWER], "id": "a", "score": 3, "meta": {"source": "x"}}).notes == ()


@pytest.mark.parametrize("name", ["content", "role", "messages"])
def test_what_is_trained_on_cannot_be_ignored(name: str) -> None:
    with pytest.raises(ValidationError, match="is what a run trains on"):
        TypeAdapter(Data).validate_python({"format": "chat", "path": "x.jsonl", "ignore": [name]})


def test_messages_are_no_text_of_a_template(load: Load) -> None:
    with pytest.raises(UsageError, match=r"data\.format=chat data\.messages=\[prompt,completion\]"):
        load({"prompt": [ASK], "completion": [ANSWER]}, format="prompt-completion")


# What is trained ------------------------------------------------------------------------------------------------------

BAD = {**ANSWER, "content": "bad"}


@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}, {"weight": 0.0}])
@pytest.mark.parametrize("template", [FULL_TEMPLATE, MARKED_CHAT_TEMPLATE, CHAT_TEMPLATE])
def test_a_message_of_weight_zero_is_read_and_not_trained_on(load: Load, template: str, mark: Any) -> None:
    talk = [ASK, {**BAD, **mark}, ASK, {**ANSWER, "weight": 1}, ASK, BAD | mark, ASK, ANSWER]
    examples = load({"messages": talk}, loss_on="answers", template=template)
    whole, trained = texts(examples)
    assert whole.count("bad") == 2
    assert trained == ["hello<end>", "hello<end>"]
    assert "have answers that are not to be trained on (weight 0)" in examples.notes[0]


def test_weights_and_the_last_answer(load: Load) -> None:
    rows = [[ASK, {**BAD, "weight": 0}], [ASK, {**BAD, "weight": 1}, ASK, ANSWER]]
    examples = load(*({"messages": one} for one in rows))
    assert [len(examples.train), *texts(examples)[1]] == [1, "hello<end>"]
    left_out, earlier = examples.notes
    assert left_out.startswith("1 of 2 conversations are left out: their last answer is not to be trained on")
    assert earlier.startswith("1 of 2 conversations mark an earlier answer as to be trained on (weight 1)")


def test_empty_answers_are_not_trained_on_and_counted(load: Load) -> None:
    empty = {"role": "assistant", "content": " "}
    examples = load({"messages": [ASK, empty]}, {"messages": [ASK, empty, ASK, ANSWER]}, loss_on="answers")
    assert texts(examples)[1] == ["hello<end>"]
    assert examples.notes[0].startswith("2 of 2 conversations have an empty answer, which is not trained on")


def test_conversations_that_end_with_the_user_are_cut_and_those_without_answers_left_out(load: Load) -> None:
    rows = [[ASK, ANSWER, ASK], [ASK], [], [ANSWER]]
    examples = load(*({"messages": one} for one in rows))
    assert texts(examples) == ("<user>hi\n<assistant>hello<end>", ["hello<end>"])
    assert [note.split(";")[0] for note in examples.notes] == [
        "1 of 4 conversations end with messages of other roles than the assistant",
        "2 of 4 conversations have no message of the assistant and are left out",
        "1 of 4 conversations begin with their only answer and are left out: it answers nothing",
    ]
    assert "line 2" in examples.notes[1]


def test_a_conversation_that_begins_with_an_answer_trains_on_it(load: Load) -> None:
    talk = [ANSWER, ASK, {**ANSWER, "content": "two"}]
    for template in (FULL_TEMPLATE, CHAT_TEMPLATE):
        assert texts(load({"messages": talk}, loss_on="answers", template=template))[1] == ["hello<end>", "two<end>"]


def test_all_answers_without_marks_are_those_with_marks() -> None:
    """The slow way to find answers is the twin of the marks."""
    talks = [[ASK, ANSWER, ASK, BAD], [{"role": "system", "content": "S"}, ASK, ANSWER], [ANSWER, ASK, BAD]]
    found = []
    for template in (MARKED_CHAT_TEMPLATE, CHAT_TEMPLATE):
        conversations = [Conversation(messages=talk) for talk in talks]
        examples = token_dataset(chat_tokens(conversations, byte_tokenizer(template), loss_on="answers"))
        found.append([(row["input_ids"], row["labels"]) for row in examples])
    assert found[0] == found[1]


def words_tokenizer(template: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer of words, which drops white space."""
    tokenizer = Tokenizer(models.WordLevel({"?": 0, "<end>": 1, "hello": 2, "two": 3}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?", eos_token="<end>")
    fast.chat_template = template
    return fast


@pytest.mark.parametrize("opening", ["", " "])
def test_characters_without_a_token_move_no_end_of_an_answer(opening: str) -> None:
    """Everything behind an answer was trained on if the line end behind its last token had none of its own."""
    template = "{% for m in messages %}{{ m.role + ':' + m.content + eos_token }}\n{% endfor %}"
    template += "{% if add_generation_prompt %}assistant:{% endif %}"
    talk = [ASK, {**ANSWER, "content": opening + "hello"}, ASK, {**ANSWER, "content": opening + "two"}]
    (example,) = chat_tokens([Conversation(messages=talk)], words_tokenizer(template), loss_on="answers")
    trained = [token for token, on in zip(example.ids, example.is_trained, strict=True) if on]
    assert trained == [2, 1, 3, 1]


def test_a_last_character_of_several_tokens_trains_whole(load: Load) -> None:
    endless = MARKED_CHAT_TEMPLATE.replace("{{ eos_token }}{% endgeneration %}", "{% endgeneration %}")
    examples = load({"messages": [ASK, {**ANSWER, "content": "ja 🦊"}]}, template=endless, loss_on="answers")
    assert texts(examples)[1] == ["ja 🦊"]


def test_an_answer_without_a_token_is_dropped_and_the_others_train() -> None:
    """An answer that had no token ended the search for the others."""
    template = MARKED_CHAT_TEMPLATE.replace("{{ eos_token }}{% endgeneration %}", "{% endgeneration %}{{ eos_token }}")
    tokenizer = words_tokenizer(template)
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("-", "")
    talk = [ASK, {**ANSWER, "content": "-"}, ASK, ANSWER]
    examples = token_dataset(
        chat_tokens([Conversation(messages=talk[:end]) for end in (2, 4)], tokenizer, loss_on="answers")
    )
    assert [[label for label in row["labels"] if label != -100] for row in examples] == [[], [2]]
    rows = token_rows(examples, max_length=64, packing=False, goes_on=False)
    assert (rows.counts.rows, rows.counts.examples_dropped) == (1, 1)


def test_answers_that_cannot_be_found_are_refused(load: Load) -> None:
    rewrites = "{% for m in messages %}{{ m.role }}{{ '' if loop.last else '!' }}{{ m.content }}{% endfor %}"
    with pytest.raises(UsageError, match=r"line 1: message 2: data\.loss_on=answers cannot tell where"):
        load({"messages": [ASK, ANSWER, ASK, ANSWER]}, template=rewrites, loss_on="answers")


def test_another_text_of_trls_template_is_said(load: Load) -> None:
    """TRL's template with marks writes the empty thoughts that Qwen3's own leaves out of earlier turns."""
    template = chat_template_utils.qwen3_chat_template
    one, two = ({"messages": [ASK, ANSWER] * turns} for turns in (1, 2))
    assert not any("TRL" in note for note in load(one, template=template, loss_on="answers").notes)
    notes = load(one, two, template=template, loss_on="answers").notes
    assert any(note.startswith("1 of 2 conversations are rendered by TRL's training template") for note in notes)


def test_an_answer_without_an_end_is_said(load: Load) -> None:
    row, endless = {"messages": [ASK, ANSWER]}, "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    assert "the model does not learn to stop" in load(row, template=endless).notes[-1]
    examples = load(row)
    assert examples.notes == ()
    assert end_of_turn_tokens(byte_tokenizer(), examples.train) == (256,)


def test_a_template_that_asks_for_the_day_is_said(load: Load) -> None:
    notes = load({"messages": [ASK, ANSWER]}, template=FULL_TEMPLATE + "{{ strftime_now('%d %b %Y') }}").notes
    assert "asks for the day's date" in notes[-1]


def test_a_run_says_what_it_left_out_and_its_evaluation_reads_the_same_columns(tmp_path: Path) -> None:
    write_model(tmp_path / "model", chat_template=CHAT_TEMPLATE)
    rows = [[("Mensch", "q"), ("gpt", str(n)), ("Mensch", "bye")] for n in range(4)]
    talks = [{"talk": [{"from": name, "value": text, "id": text} for name, text in row]} for row in rows]
    (tmp_path / "chat.jsonl").write_text("\n".join(map(json.dumps, talks)), "utf-8")
    chat = {"messages": "talk", "roles": {"Mensch": "user"}, "ignore": ["id"], "path": str(tmp_path / "chat.jsonl")}
    recipe = parse(tmp_path, data={"format": "chat", **chat}, run={"steps": 1})
    folder = train(recipe, console=quiet())
    notes = json.loads((folder / "run.json").read_text())["notes"]
    assert [note.split(";")[0] for note in notes] == [
        "4 of 4 conversations hold `id` in a message, which data.ignore leaves out",
        "4 of 4 conversations end with messages of other roles than the assistant",
    ]
    result = evaluate(EvaluationSettings(model=folder, task="loss", data=tmp_path / "chat.jsonl", device="cpu"))
    assert (result.num_items, result.num_tokens) == (4, 4 * len("0>"))  # the answer and the end of text


@pytest.mark.parametrize(
    ("data", "advice"),
    [
        ({"format": "chat"}, "conversations need one: take a chat model, such as the -Instruct version"),
        ({"format": "prompt-completion", "as_chat": True}, "leave data.as_chat out, or take a chat model"),
    ],
    ids=["conversations", "as chat"],
)
def test_a_model_without_a_chat_template_is_refused_with_what_fits_the_data(
    tmp_path: Path, data: dict[str, Any], advice: str
) -> None:
    write_model(tmp_path / "model")
    settings = TypeAdapter(Data).validate_python({"path": "chat.jsonl", **data})
    with pytest.raises(UsageError, match=advice):
        load_tokenizer(ModelSettings(path=str(tmp_path / "model")), settings)
