"""Answers to compare and prompts to answer: what is read, what is refused, and that the tokens are those of TRL."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from answer_support import pairs, preference_recipe, prompt_recipe, rated, said, write_place, write_rows
from datasets import Dataset
from train_fixtures import CHAT_TEMPLATE, byte_tokenizer, parse, write_model
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.kto_trainer import KTOTrainer

from gradselect import UsageError
from gradselect.app.inputs import make_rows, read_data
from gradselect.app.preview import preview_data
from gradselect.app.recipe import Recipe, dump_recipe, load_recipe
from gradselect.app.train.preference_trainers import dpo_rows, kto_rows, orpo_rows


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_place(tmp_path_factory.mktemp("place"))


def rows_of(recipe: Recipe) -> Any:
    data = read_data(recipe)
    return make_rows(
        data.examples,
        recipe.data,
        tokenizer=data.tokenizer,
        max_length=data.max_length,
        num_drawn=recipe.num_drawn_tokens,
    )["train"]


# Tokens ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["pairs", "split"])
def test_pairs_have_the_tokens_that_trl_makes(file: str, place: Path, tmp_path: Path) -> None:
    ours = dpo_rows(rows_of(preference_recipe(place, tmp_path, file=file)).dataset)
    stub = SimpleNamespace(_tokenizer=byte_tokenizer(CHAT_TEMPLATE))
    arguments = SimpleNamespace(dataset_num_proc=None, max_length=64, truncation_mode="keep_start")
    given = Dataset.from_json(str(place / f"{file}.jsonl"))
    theirs: Any = DPOTrainer._prepare_dataset(stub, given, stub._tokenizer, arguments, "train")  # type: ignore[arg-type]
    assert ours.to_list() == theirs.select_columns(ours.column_names).to_list()


def test_rated_answers_have_the_tokens_that_trl_makes(place: Path, tmp_path: Path) -> None:
    ours = kto_rows(
        rows_of(preference_recipe(place, tmp_path, trainer="kto", file="rated")).dataset, batch_size=4, seed=None
    )
    stub = SimpleNamespace(_tokenizer=byte_tokenizer(), calculate_KL=True, desirable_weight=1.0, undesirable_weight=1.0)
    arguments = SimpleNamespace(dataset_num_proc=None, max_length=64, per_device_train_batch_size=4)
    given = Dataset.from_json(str(place / "rated.jsonl"))
    theirs: Any = KTOTrainer._prepare_dataset(stub, given, stub._tokenizer, arguments, "train")  # type: ignore[arg-type]
    assert ours.to_list() == theirs.select_columns(ours.column_names).to_list()


def test_a_conversation_with_its_prompt_inside_is_the_same(place: Path, tmp_path: Path) -> None:
    split, whole = (rows_of(preference_recipe(place, tmp_path, file=file)).dataset for file in ("split", "whole"))
    assert split.to_list() == whole.to_list()


Q, A = said("user", "q"), said("assistant", "a")
HI, MORE, REJECTED = said("assistant", "hi"), said("user", "more"), said("assistant", "b")
FORMS: dict[str, tuple[list[dict[str, Any]], list[str]]] = {
    "answers of several messages": ([{"prompt": [Q], "chosen": [HI, MORE, A]}], ["qhimorea"]),
    "other names": ([{"prompt": "q", "chosen": [{"from": "GPT", "value": "a"}]}], ["qa"]),
    "a name of their own": ([{"prompt": "q", "chosen": [{"from": "Automat", "value": "a"}]}], ["qa"]),
    "a greeting": ([{"chosen": [Q, A]}, {"chosen": [HI, Q, A]}], ["qa", "hiqa"]),
    "a prompt of its own": ([{"prompt": None, "chosen": [Q, A]}, {"prompt": "q", "chosen": [A]}], ["qa", "qa"]),
    "a prompt beside": ([{"prompt": "no", "chosen": [Q, A]}], ["qa"]),
}


@pytest.mark.parametrize("as_text", [False, True])
@pytest.mark.parametrize("name", FORMS)
def test_the_prompt_is_found_in_every_form_of_messages(name: str, as_text: bool, place: Path, tmp_path: Path) -> None:
    """The role of an answer's first message was known in a list alone, and by four names; the prompt was lost."""
    rows, expected = FORMS[name]
    pairs = []
    for row in rows:
        cells = {**row, "rejected": [*row["chosen"][:-1], REJECTED]}
        pairs.append({key: json.dumps(cell) if as_text and type(cell) is list else cell for key, cell in cells.items()})
    data = {"path": str(write_rows(tmp_path / "talks.jsonl", pairs)), "roles": {"Automat": "assistant"}}
    found = rows_of(preference_recipe(place, tmp_path, data=data)).dataset
    texts = [byte_tokenizer().decode(row["input_ids"], skip_special_tokens=True) for row in found]
    assert [text.replace("user: ", "").replace("assistant: ", "") for text in texts] == expected


def test_kto_reads_a_pair_as_two_answers_in_an_order_of_the_seed(place: Path, tmp_path: Path) -> None:
    rows = rows_of(preference_recipe(place, tmp_path)).dataset
    plain, one, again, other = (kto_rows(rows, batch_size=4, seed=seed) for seed in (None, 0, 0, 1))
    assert plain["label"][:4] == [True, False, True, False]
    assert len(one) == 2 * len(rows)
    assert one.to_list() == again.to_list() != other.to_list()
    for row in one.to_list():
        assert row["KL_completion_ids"] != row["completion_ids"]


def test_orpo_counts_the_answer_only(place: Path, tmp_path: Path) -> None:
    row = orpo_rows(rows_of(preference_recipe(place, tmp_path, trainer="orpo")).dataset)[0]
    prompt = len("0+0?")
    for name in ("chosen", "rejected"):
        ids, labels = row[f"{name}_input_ids"], row[f"{name}_labels"]
        assert labels == [-100] * prompt + ids[prompt:]


# Cuts, and rows that are left out ----------------------------------------------------------------------------------


def test_what_is_cut_or_dropped_is_counted(place: Path, tmp_path: Path) -> None:
    """Of "10+10?" six bytes are the prompt. Within nine, " is" and " no" are left; within six nothing of an answer."""
    recipe = preference_recipe(place, tmp_path, data={"max_length": 9})
    found = preview_data(recipe)
    counts = found.counts["train"]
    assert (counts.examples, counts.rows, counts.examples_cut) == (12, 12, 12)
    assert counts.tokens_in_rows == 24 * 9
    assert any("12 of 12 rows are longer than data.max_length=9 and lose their end" in note for note in found.notes)
    within = preview_data(preference_recipe(place, tmp_path, data={"max_length": 6}))
    assert within.counts["train"].examples_dropped == 2
    assert any("2 of 12 rows were dropped" in note for note in within.notes)


def test_empty_and_equal_answers_are_left_out_with_numbers(place: Path, tmp_path: Path) -> None:
    rows = pairs(6)
    rows[1]["chosen"], rows[2]["rejected"], rows[4]["rejected"] = "", " ", rows[4]["chosen"]
    write_rows(tmp_path / "some.jsonl", rows)
    found = preview_data(preference_recipe(place, tmp_path, data={"path": str(tmp_path / "some.jsonl")}))
    notes = "\n".join(found.notes)
    assert found.counts["train"].rows == 3
    assert "1 of 6 rows has an empty chosen and is left out; the first: " in notes
    assert "1 of 6 rows has an empty rejected" in notes
    assert "1 of 4 rows have two equal answers and are left out" in notes


def test_prompts_that_leave_no_room_for_an_answer_are_dropped_with_numbers(place: Path, tmp_path: Path) -> None:
    found = preview_data(prompt_recipe(place, tmp_path, data={"max_length": 10}))
    assert found.counts["train"].rows == 10
    assert any("2 of 12 prompts were dropped: with trainer.max_completion_length" in note for note in found.notes)
    with pytest.raises(UsageError, match=r"every prompt is longer than the 3 tokens beside trainer\.max_completion"):
        preview_data(prompt_recipe(place, tmp_path, data={"max_length": 9}))


def test_the_preview_shows_both_answers_and_the_steps(place: Path, tmp_path: Path) -> None:
    found = preview_data(preference_recipe(place, tmp_path), row=1)
    assert [piece.name for piece in found.rows[0].pieces] == ["chosen", "rejected"]
    assert found.rows[0].pieces[1].spans[-1].text == " no 0, not<end>"
    assert found.steps_per_epoch == 3
    assert preview_data(preference_recipe(place, tmp_path, trainer="kto")).steps_per_epoch == 6
    assert preview_data(prompt_recipe(place, tmp_path)).steps_per_epoch == 6


def test_the_preview_refuses_prompts_that_do_not_fill_a_step_as_training_does(place: Path, tmp_path: Path) -> None:
    """It said that an epoch has no steps, or with `run.steps` ended in a ZeroDivisionError."""
    with pytest.raises(UsageError, match=r"a step takes 2 different prompts .* but there are 1; give more rows"):
        preview_data(prompt_recipe(place, tmp_path, data={"limit": 1}))


# Refusals ----------------------------------------------------------------------------------------------------------

ANSWER = said("assistant", "b")
BAD_ROWS = {
    "no rejected": (
        [{"prompt": "a", "chosen": "b"}],
        "dpo",
        "has no column 'rejected'; its columns are: prompt, chosen",
    ),
    "one without": ([*pairs(2), {"prompt": "a", "chosen": "b"}], "dpo", "line 3 has no column 'rejected'"),
    "label": ([{**rated()[0], "label": "perhaps"}], "kto", "'perhaps', which says neither good nor bad"),
    "different prompts": (
        [
            {
                "chosen": [said("user", "a"), said("assistant", "b")],
                "rejected": [said("user", "c"), said("assistant", "d")],
            }
        ],
        "dpo",
        "differ before their last message",
    ),
    "no answer": (
        [{"prompt": "a", "chosen": [said("user", "b")], "rejected": [said("user", "c")]}],
        "dpo",
        "roles user",
    ),
    "no prompt": (
        [{name: [*asked, ANSWER] for name in ("chosen", "rejected")} for asked in ([said("user", "a")], [])],
        "dpo",
        "line 2: the messages in 'chosen' begin with an answer, and the row has no 'prompt' to it",
    ),
    "all equal": ([{"prompt": "a", "chosen": "b", "rejected": "b"}], "dpo", "every pair has two equal answers"),
    "mixed": (
        [*pairs(1), {"prompt": "a", "chosen": [said("assistant", "b")], "rejected": "c"}],
        "dpo",
        "give all rows one",
    ),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_rows_that_cannot_be_used_are_refused(name: str, place: Path, tmp_path: Path) -> None:
    rows, trainer, words = BAD_ROWS[name]
    write_rows(tmp_path / "bad.jsonl", rows)
    with pytest.raises(UsageError, match=r"bad\.jsonl") as found:
        read_data(preference_recipe(place, tmp_path, trainer=trainer, data={"path": str(tmp_path / "bad.jsonl")}))
    assert words in str(found.value)


def test_a_column_of_prompts_that_is_named_must_be_there(place: Path, tmp_path: Path) -> None:
    rows = [{"q": "q", "chosen": [HI, Q, A], "rejected": [HI, Q, REJECTED]}]
    data = {"path": str(write_rows(tmp_path / "bad.jsonl", rows)), "prompt": "{question}"}
    with pytest.raises(UsageError, match=r"line 1: the messages in 'chosen' begin with .* has no 'question' to it"):
        read_data(preference_recipe(place, tmp_path, data=data))


TOOLS_TEMPLATE = "{% if tools %}{{ tools[0].name }}|{% endif %}" + CHAT_TEMPLATE


@pytest.mark.parametrize("data", [{"tools": "calls"}, {}])
@pytest.mark.parametrize("kind", ["preference", "prompts"])
def test_the_tools_of_a_plain_prompt_reach_the_chat_template(
    kind: str, data: dict[str, Any], place: Path, tmp_path: Path
) -> None:
    """They were asked for in every row, and dropped."""
    model = {"path": str(write_model(tmp_path / "model", chat_template=TOOLS_TEMPLATE)), "dtype": "float32"}
    rows = [{**row, data.get("tools", "tools"): [{"name": "add"}]} for row in [*pairs(2), *pairs(2)]]
    data = {"path": str(write_rows(tmp_path / "rows.jsonl", rows)), "as_chat": True, **data}
    recipe = (
        preference_recipe(place, tmp_path, data=data, model=model)
        if kind == "preference"
        else prompt_recipe(place, tmp_path, data={"answer": "{chosen}", "prompt": "{prompt}", **data}, model=model)
    )
    text = byte_tokenizer().decode(read_data(recipe).examples.train[0]["input_ids"])
    assert text.startswith("add|user: 0+0?<end>assistant: ")


IDLE = {
    "tools": ({"tools": "prompt"}, r"data\.tools='prompt' is for conversations, and .* or write data\.as_chat=true"),
    "ignore": ({"ignore": ["tools"]}, r"data\.ignore=\('tools',\) is for conversations"),
    "roles": ({"roles": {"Mensch": "user"}, "as_chat": True}, r"data\.roles=.* are plain text: leave it out$"),
}


@pytest.mark.parametrize(("data", "words"), IDLE.values(), ids=list(IDLE))
def test_settings_of_conversations_are_refused_for_plain_text(
    data: dict[str, Any], words: str, place: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=words):
        read_data(preference_recipe(place, tmp_path, data=data))


def test_a_prompt_that_ends_with_an_answer_is_refused(place: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "bad.jsonl", [{"prompt": [said("user", "a"), said("assistant", "b")], "answer": "1"}])
    with pytest.raises(UsageError, match="the messages of the prompt end with an answer"):
        read_data(prompt_recipe(place, tmp_path, file="asked", data={"path": str(tmp_path / "bad.jsonl")}))


GRPO = {"name": "grpo", "reward": "gsm8k", "num_generations": 4}
BAD_RECIPES = {
    "no trainer": ({}, {"format": "preference"}, "write trainer.name=dpo (or kto, orpo)"),
    "sft": ({"name": "sft"}, {"format": "prompts"}, "write trainer.name=grpo (or rloo)"),
    "format": ({"name": "dpo"}, {"format": "prompts"}, "trainer.name=dpo reads data.format=preference, not prompts"),
    "no reward": ({"name": "grpo"}, {"format": "prompts"}, "reward is missing: name what rewards an answer"),
    "word": ({**GRPO, "reward": "fun"}, {"format": "prompts"}, "reward='fun' is none of gsm8k, math and no function"),
    "no solution": (GRPO, {"format": "prompts"}, "name its column, e.g. 'data.answer={answer}'"),
    "groups": ({**GRPO, "num_generations": 3}, {"format": "prompts", "answer": "{answer}"}, "do not form whole groups"),
    "weights": ({**GRPO, "reward_weights": [1, 2]}, {"format": "prompts"}, "[1.0, 2.0] for 1 rewards"),
    "key": ({"name": "dpo", "bta": 1}, {"format": "preference"}, "trainer.bta: unknown key, did you mean 'beta'?"),
    "name": ({"name": "ppo"}, {"format": "preference"}, "trainer.name = 'ppo': unknown"),
    "smoothing": (
        {"name": "dpo", "label_smoothing": 0.1},
        {"format": "preference"},
        "loss=robust is the one that uses it",
    ),
}


@pytest.mark.parametrize("name", BAD_RECIPES)
def test_a_trainer_that_does_not_fit_is_refused(name: str, place: Path, tmp_path: Path) -> None:
    trainer, data, words = BAD_RECIPES[name]
    with pytest.raises(UsageError) as found:
        parse(place, data={"path": "some.jsonl", **data}, **({"trainer": trainer} if trainer else {}))
    assert words in str(found.value)


def test_kto_needs_another_answer_in_the_batch(place: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"run\.batch_size=1 is too small"):
        preference_recipe(place, tmp_path, trainer="kto", run={"batch_size": 1})


def test_a_recipe_without_a_trainer_is_written_as_before(place: Path, tmp_path: Path) -> None:
    """Run folders of earlier versions have no such section, and must resume."""
    plain = parse(place)
    assert "trainer" not in dump_recipe(plain)
    assert "trainer" not in plain.model_dump(mode="json")
    recipe = preference_recipe(place, tmp_path)
    (tmp_path / "again.yaml").write_text(dump_recipe(recipe), "utf-8")
    assert load_recipe(tmp_path / "again.yaml") == recipe
