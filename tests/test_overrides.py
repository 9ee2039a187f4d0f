"""`key=value` words on top of a recipe: they displace rivals in the file, and need no quotes of their own."""

from __future__ import annotations

from typing import Any, get_args, get_origin

import pytest

from gradselect import UsageError
from gradselect.app.compare.suite import Evaluation
from gradselect.app.recipe import Recipe, merge, parse_recipe, with_overrides

VALUES: dict[str, Any] = {
    "model": {"path": "m"},
    "data": {"format": "prompt-completion", "path": "a.jsonl", "prompt": "{q}", "completion": "{a}", "limit": 9},
    "method": {"name": "adagradselect", "fraction": 0.2},
    "optimizer": {"lr": 1e-4},
    "run": {"output": "out", "epochs": 3},
}


def load(*overrides: str, method: dict[str, Any] | None = None) -> Recipe:
    values = {**VALUES, "method": method} if method else VALUES
    return parse_recipe(with_overrides(values, overrides), source="recipe.yaml")


@pytest.mark.parametrize(
    ("method", "override", "section", "left"),
    [
        (None, "run.steps=20", "run", {"steps": 20, "epochs": None}),
        (None, "method.count=3", "method", {"count": 3, "fraction": None}),
        ({"name": "uniform", "count": 3}, "method.fraction=0.5", "method", {"count": None, "fraction": 0.5}),
        ({"name": "id3", "budget": 9}, "method.density=0.1", "method", {"budget": None, "density": 0.1}),
        ({"name": "id3", "density": 0.1}, "method.budget=9", "method", {"budget": 9, "density": None}),
        ({"name": "lift", "rank": 8}, "method.density=0.1", "method", {"rank": None, "density": 0.1}),
        ({"name": "lift", "density": 0.1}, "method={name: lift, rank: 8}", "method", {"rank": 8, "density": None}),
        ({"name": "spt", "budget": 9, "rank": 4}, "method.density=0.1", "method", {"budget": None, "rank": 4}),
        ({"name": "spt", "density": 0.1}, "method.rank=4", "method", {"density": 0.1, "rank": 4}),
        (None, "run.steps=null", "run", {"epochs": 3.0}),
    ],
)
def test_a_value_displaces_its_rival_in_the_file(
    method: dict[str, Any] | None, override: str, section: str, left: dict[str, Any]
) -> None:
    found = getattr(load(override, method=method), section).model_dump()
    assert {key: found[key] for key in left} == left


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["run.steps=20", "run.epochs=3"], "got steps=20 and epochs=3.0; give one of them"),
        (["method.count=3", "method.fraction=0.2"], "got fraction=0.2 and count=3; give one of them"),
    ],
)
def test_two_rivals_on_the_command_line_are_refused(overrides: list[str], said: str, order: int) -> None:
    with pytest.raises(UsageError, match=said):
        load(*overrides[::order])


def test_a_file_displaces_rivals_of_its_base() -> None:
    assert merge({"run": {"epochs": 3, "seed": 1}}, {"run": {"steps": 5}}) == {"run": {"steps": 5, "seed": 1}}


def test_another_format_keeps_only_what_all_formats_share() -> None:
    data = load("data.format=chat", "data.messages=talk").data.model_dump(exclude_unset=True)
    assert data == {"format": "chat", "path": "a.jsonl", "limit": 9, "messages": "talk"}
    with pytest.raises(UsageError, match="'chats': unknown, did you mean 'chat'"):
        load("data.format=chats")


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("run.report_to=wandb", "run", "report_to", ("wandb",)),
        ("run.report_to=wandb,mlflow", "run", "report_to", ("wandb", "mlflow")),
        ("run.report_to=[wandb, mlflow]", "run", "report_to", ("wandb", "mlflow")),
        ("run.report_to=[]", "run", "report_to", ()),
        ("run.report_to=", "run", "report_to", ()),
        ("method.among=", "method", "among", None),
        ("method.always=embedding", "method", "always", ("embedding",)),
        ("method.always=embedding, norm", "method", "always", ("embedding", "norm")),
        ("method.among=layer.*", "method", "among", ("layer.*",)),
        ("optimizer.betas=0.9,0.95", "optimizer", "betas", (0.9, 0.95)),
        ("data.columns=question,answer", "data", "columns", ("question", "answer")),
        ("data.prompt={instruction} {input}\\nAnswer: #", "data", "prompt", "{instruction} {input}\nAnswer: #"),
        ("data.completion= {answer}", "data", "completion", " {answer}"),
        ('data.completion=" {answer}"', "data", "completion", " {answer}"),
    ],
)
def test_words_and_templates_need_no_quotes_of_their_own(override: str, section: str, key: str, value: Any) -> None:
    assert getattr(getattr(load(override), section), key) == value


@pytest.mark.parametrize("name", ["fixed", "sparsegrad", "lora", "id3"])
def test_every_key_of_several_words_takes_a_single_one(name: str) -> None:
    needs = {"fixed": {"names": ["norm"]}, "id3": {"density": 0.1}}
    settings = type(load(method={"name": name, **needs.get(name, {})}).method)
    options = {key: [field.annotation, *get_args(field.annotation)] for key, field in settings.model_fields.items()}
    keys = [key for key, kinds in options.items() if any(get_origin(kind) is tuple for kind in kinds)]
    for key in keys:
        found = load(f"method.{key}=one,two", method={"name": name, **needs.get(name, {})})
        assert getattr(found.method, key) == ("one", "two")
    assert keys


def test_a_word_of_its_own_stays_a_word() -> None:
    assert load("method.name=lora", "method.targets=all-linear").method.model_dump()["targets"] == "all-linear"


def test_a_wrong_word_is_named() -> None:
    with pytest.raises(UsageError, match="'wandbb'"):
        load("run.report_to=wandbb")


def test_a_text_that_may_hold_commas_is_not_split() -> None:
    assert Evaluation.model_validate({"task": "gsm8k", "stop": "\nSo, now"}).stop == ("\nSo, now",)
