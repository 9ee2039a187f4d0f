"""gradselect chat: the prompt is that of the training, answers are those of generate(), nothing is dropped silently."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from train_fixtures import CHAT_TEMPLATE, parse, quiet, write_model, write_sums
from transformers import AutoModelForCausalLM, AutoTokenizer

from gradselect import UsageError
from gradselect.app.chat import ChatForm, TemplateForm, open_conversation
from gradselect.app.chat.forms import form_for
from gradselect.app.cli import main
from gradselect.app.results import RunRecord
from gradselect.app.train import train
from gradselect.files import sealed

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("chat")
    write_model(root / "model", chat_template=CHAT_TEMPLATE)
    write_model(root / "bare")
    write_sums(root / "sums.jsonl")
    recipe = parse(root, data={"prompt": "Q: {question}\nA:"}, run={"output": str(root / "run"), "steps": 1})
    train(recipe, console=quiet())
    return root


def chat(monkeypatch, typed: str, *words: object) -> int:
    monkeypatch.setattr("sys.stdin", io.StringIO(typed))
    try:
        main(["chat", *map(str, words)])
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def expected(folder: Path, prompt: str, *, count: int) -> str:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(prompt, return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=count, do_sample=False)
    return tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


def test_a_run_answers_in_the_prompt_that_it_was_trained_on(root):
    conversation = open_conversation(root / "run", max_new_tokens=8)
    assert isinstance(conversation.form, TemplateForm)
    assert conversation.form.fields == ("question",)
    pieces: list[str] = []
    answer = conversation.answer({"question": "2+6?"}, write=pieces.append)
    assert answer == "".join(pieces) == expected(root / "run", "Q: 2+6?\nA:", count=8)
    assert conversation.turns == []


@pytest.mark.parametrize("data", [{"format": "preference"}, {"format": "prompts"}])
@pytest.mark.parametrize(
    ("changes", "form"),
    [({"prompt": "Q: {question}\nA:"}, TemplateForm), ({"prompt": "Q: {q}", "as_chat": True}, ChatForm)],
)
def test_after_preferences_and_rewards_the_prompt_is_that_of_the_training_too(root, tmp_path, data, changes, form):
    values = json.loads((root / "run" / "run.json").read_text())
    values["recipe"]["data"] = {"as_chat": False} | data | changes
    (tmp_path / "run.json").write_text(json.dumps(sealed(values)))
    tokenizer = AutoTokenizer.from_pretrained(root / "model")
    found = form_for(tmp_path, tokenizer, system=None, as_chat=False)
    assert isinstance(found, form)
    assert found.fields == (("question",) if form is TemplateForm else ("you",))


def test_a_chat_model_sees_the_turns_before(root):
    conversation = open_conversation(root / "model", max_new_tokens=4, system="be brief")
    assert isinstance(conversation.form, ChatForm)
    first = conversation.answer({"you": "a"}, write=lambda text: None)
    prompt = f"system: be brief<end>user: a<end>assistant: {first}<end>user: b<end>assistant: "
    conversation._config.update(max_new_tokens=2)
    ids = conversation.form.encode({"you": "b"}, conversation.turns, conversation._model)
    assert conversation._model.tokenizer.decode(ids) == prompt
    conversation.clear()
    assert conversation.turns == []


def test_the_oldest_turns_leave_a_full_context_and_are_counted(root):
    conversation = open_conversation(root / "model", max_new_tokens=4)
    for _ in range(3):
        conversation.answer({"you": "12345678"}, write=lambda text: None)
    assert conversation.num_forgotten == 1
    with pytest.raises(UsageError, match=r"tokens; the model's context of 64 has room for 60 beside an answer of 4"):
        conversation.answer({"you": "1" * 80}, write=lambda text: None)


def test_drawn_answers_differ_and_follow_the_seed(root):
    conversation = open_conversation(root / "run", max_new_tokens=12, temperature=5.0)
    answers = []
    with torch.random.fork_rng():
        for seed in (0, 1, 0):
            torch.manual_seed(seed)
            answers.append(conversation.answer({"question": "2"}, write=lambda text: None))
    assert answers[0] == answers[2] != answers[1]


def test_the_command_answers_each_line_and_ends(root, monkeypatch, capsys):
    assert chat(monkeypatch, "1+1?\n\n/clear\n2+2?\n/exit\nnot read\n", root / "run", "--max-new-tokens", 3) == 0
    out = capsys.readouterr().out
    assert "the prompt is that of the training, 'Q: {question}\\nA:'; it holds no earlier turn" in out
    assert out.count("question> ") == 5
    assert "not read" not in out


def test_the_command_says_what_left_the_context(root, monkeypatch, capsys):
    typed = "12345678\n" * 3 + "1" * 80 + "\n"
    assert chat(monkeypatch, typed, root / "model", "--max-new-tokens", 4) == 0
    err = capsys.readouterr().err
    assert "note       the context is full; oldest turns forgotten so far: 1" in err
    assert "the prompt has" in err


def test_a_model_without_chat_template_goes_on_from_the_words(root, monkeypatch, capsys):
    assert chat(monkeypatch, "2\n", root / "bare", "--max-new-tokens", 2) == 0
    assert "the model goes on from your words" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("folder", "words", "message"),
    [
        ("bare", ["--as-chat"], "has no chat template"),
        ("run", ["--system", "be brief"], "--system needs a chat template"),
        ("run", ["--temperature", "-1"], "temperature=-1.0 is negative"),
        ("run", ["--temperature", "nan"], "temperature=nan is negative or no number"),
        ("run", ["--max-new-tokens", "64"], "leaves no room for a prompt"),
        ("run", ["--dtype", "int3"], "dtype='int3'"),
        ("nothing/here/at-all", [], "no such folder"),
    ],
)
def test_what_cannot_be_is_refused(root, monkeypatch, capsys, folder, words, message):
    assert chat(monkeypatch, "hello\n", root / folder, *words) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"status": "started"}, "has not finished; resume it with --resume"),
        ({"format": "classification"}, "has trained a classification head, which writes no text"),
        ({"format": "random"}, "no model was kept"),
    ],
)
def test_a_run_without_a_model_that_writes_is_refused(root, tmp_path, monkeypatch, capsys, changes, message):
    values = json.loads((root / "run" / "run.json").read_text())
    values = {key: value for key, value in values.items() if key in RunRecord.model_fields}
    values["status"] = changes.get("status", values["status"])
    values["recipe"]["data"]["format"] = changes.get("format", "prompt-completion")
    (tmp_path / "run.json").write_text(json.dumps(sealed(values)))
    assert chat(monkeypatch, "hello\n", tmp_path) == 2
    assert message in capsys.readouterr().err
