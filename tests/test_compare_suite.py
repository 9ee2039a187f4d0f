"""The suite: what it may hold, what it says of mistakes, which runs it asks for."""

from __future__ import annotations

from pathlib import Path

import pytest
from compare_fixtures import BLOCKS, FULL, suite_values

from gradselect import UsageError
from gradselect.app.compare import load_suite
from gradselect.app.compare.schedule import best_rate, is_at_edge, rate_beyond, rung_runs, score_run
from gradselect.app.compare.suite import parse_suite, slug
from gradselect.app.recipe import load_recipe
from gradselect.app.recipe_planning.planner import RecipePlanner
from gradselect.methods.masks import SALIENCES

SUITES = Path(__file__).parents[1] / "suites"
MINE = ("quick", "paper", "paper-llama-3.2-1b", "paper-phi-4-mini", "peft", "salience")

BAD = {
    "unknown key": ({"seed": 3}, "seed: unknown key, did you mean 'seeds'?"),
    "unknown method": (
        {"methods": {"a": {"method": {"name": "adagradselct"}, "rates": [1]}}},
        "methods.a.method.name = 'adagradselct': unknown, did you mean 'adagradselect'?",
    ),
    "unknown key of a method": (
        {"methods": {"a": {"method": {"name": "lora", "rnak": 3}, "rates": [1]}}},
        "methods.a.method.rnak: unknown key, did you mean 'rank'?",
    ),
    "settings that a policy refuses": (
        {"methods": {"a": {"method": {"name": "uniform", "fraction": 2}, "rates": [1]}}},
        "outside (0, 1]",
    ),
    "no rates": ({"methods": {"a": {"method": {"name": "full"}, "rates": []}}}, "methods.a.rates"),
    "a rate twice": ({"methods": {"a": {"method": {"name": "full"}, "rates": [1, 1.0]}}}, "write each once"),
    "no methods": ({"methods": {}}, "methods = {}"),
    "two names of one file": ({"methods": {"a b": BLOCKS, "A-b": BLOCKS}}, "'a b' and 'A-b' would both be"),
    "a name of no letters": ({"methods": {"%": BLOCKS}}, "'%' has no letter"),
    "unknown key of an evaluation": (
        {"evaluations": {"t": {"task": "gsm8k", "limt": 3}}},
        "evaluations.t.limt: unknown key, did you mean 'limit'?",
    ),
    "an evaluation that makes no sense": (
        {"evaluations": {"t": {"task": "loss"}}},
        "evaluations.t: the task loss has no data of its own",
    ),
    "forgetting of answers": ({"forgetting": {"task": "gsm8k"}}, "write task: loss"),
    "ranking by a test": ({"rank_by": "sums"}, "rank_by = 'sums'"),
    "no seeds": ({"seeds": 0}, "seeds = 0"),
    "a name that is no file name": ({"name": "a/b"}, "name = 'a/b'"),
    "misspelt preparation": ({"prepare": [{"comand": "x"}]}, "prepare.0.comand: unknown key, did you mean 'command'?"),
}


def test_a_suite_drops_a_method_of_its_base(tmp_path: Path) -> None:
    suite = parse_suite(suite_values(tmp_path, methods={"a": FULL, "b": None}), source="s.yaml")
    assert list(suite.methods) == ["a"]


@pytest.mark.parametrize("case", BAD)
def test_mistakes_are_named(case: str, tmp_path: Path) -> None:
    changes, said = BAD[case]
    with pytest.raises(UsageError) as raised:
        parse_suite(suite_values(tmp_path, **changes), source="s.yaml")
    assert said in str(raised.value)
    assert str(raised.value).startswith("s.yaml is no valid suite:\n")


@pytest.mark.parametrize(
    ("section", "key"), [("optimizer", "lr"), ("run", "output"), ("run", "seed"), (None, "method")]
)
def test_what_differs_between_runs_is_not_shared(section: str | None, key: str, tmp_path: Path) -> None:
    values = suite_values(tmp_path)
    (values["recipe"][section] if section else values["recipe"])[key] = 1
    with pytest.raises(UsageError, match=f"{key} is not for a suite"):
        parse_suite(values, source="s.yaml")


def test_mistakes_in_the_recipe_are_named(tmp_path: Path) -> None:
    values = suite_values(tmp_path)
    values["recipe"]["run"]["stepz"] = 3
    with pytest.raises(UsageError, match=r"recipe\.run\.stepz: unknown key, did you mean 'steps'"):
        parse_suite(values, source="s.yaml")


def test_a_search_needs_held_out_examples(tmp_path: Path) -> None:
    values = suite_values(tmp_path)
    del values["recipe"]["data"]["validation"]
    with pytest.raises(UsageError, match="'full' has several rates"):
        parse_suite(values, source="s.yaml")
    assert parse_suite({**values, "methods": {"a": BLOCKS}}, source="s.yaml")


@pytest.mark.parametrize("trainer", ["grpo", "rloo"])
def test_rates_of_drawn_answers_are_not_chosen_by_loss(trainer: str, tmp_path: Path) -> None:
    """Their loss on held-out prompts says nothing of how good the answers are."""
    values = suite_values(tmp_path)
    data = {"format": "prompts", "path": "p.jsonl", "prompt": "{question}", "answer": "{answer}", "validation": 0.2}
    run = {"steps": 2, "batch_size": 8}
    values["recipe"] |= {"data": data, "run": run, "trainer": {"name": trainer, "reward": "gsm8k"}}
    values |= {"evaluations": {"solved": {"task": "gsm8k", "data": "p.jsonl"}}, "forgetting": None}
    with pytest.raises(UsageError, match=rf"trainer\.name={trainer}: 'full' has several rates .* rates: \[0\.001\]"):
        parse_suite(values, source="s.yaml")
    assert parse_suite({**values, "methods": {"a": BLOCKS}}, source="s.yaml")


def test_methods_are_chosen_by_name_slug_and_glob(tmp_path: Path) -> None:
    methods = {"full": FULL, "LoRA r=2": BLOCKS, "LoRA r=4": BLOCKS}
    suite = parse_suite(suite_values(tmp_path, methods=methods), source="s.yaml")
    assert suite.chosen([]) == list(methods)
    assert suite.chosen(["lora r=4"]) == ["LoRA r=4"]
    assert suite.chosen(["lora-r-2", "full"]) == ["full", "LoRA r=2"]
    assert suite.chosen(["LoRA*"]) == ["LoRA r=2", "LoRA r=4"]
    with pytest.raises(UsageError, match="--only='ful' matches no method; nearest: 'full'"):
        suite.chosen(["ful"])


def test_a_run_gets_its_own_method_rate_seed_and_folder(tmp_path: Path) -> None:
    suite = parse_suite(suite_values(tmp_path), source="s.yaml")
    recipe = suite.training_recipe("uniform 2", lr=0.5, seed=7, output="x")
    assert (recipe.method.name, recipe.optimizer.lr, recipe.run.seed, recipe.run.output) == ("uniform", 0.5, 7, "x")
    assert recipe.data == suite.recipe.data


def test_files_are_named_by_method_rate_seed_and_role() -> None:
    assert slug("AdaGradSelect 20 %") == "adagradselect-20"
    assert score_run("LoRA r=16", lr=3e-5, seed=2).name == "lora-r-16.lr-3e-05.seed-2.score"


def test_the_lowest_loss_chooses_the_rate() -> None:
    rates = (1.0, 2.0, 3.0)
    assert [run.lr for run in rung_runs("full", rates)] == [1, 2, 3]
    assert best_rate({1: 0.5, 2: 0.4, 3: None}) == 2
    assert best_rate({1: 0.5, 2: 0.5}) == 1
    assert best_rate({1: None}) is None
    assert is_at_edge(1, rates)
    assert is_at_edge(3, rates)
    assert not is_at_edge(2, rates)
    assert is_at_edge(1, [1]) is None


def test_a_grid_goes_on_as_it_ends() -> None:
    """Also where it is not in order, and where its last two rates are no factor of two apart."""
    assert rate_beyond(0.048, [0.006, 0.048, 0.024, 0.012]) == 0.096
    assert rate_beyond(6e-3, [0.006, 0.048, 0.024, 0.012]) == 0.003
    assert rate_beyond(9.0, [1.0, 3.0, 9.0]) == 27.0


@pytest.mark.parametrize("name", MINE)
def test_suites_of_the_repository_are_valid(name: str) -> None:
    suite = load_suite(SUITES / f"{name}.yaml")
    assert suite.name == name
    assert any(entry.method.name == "full" for entry in suite.methods.values())


@pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")  # PEFT uses old names
def test_the_suite_of_saliences_trains_as_many_entries_as_its_lora_and_can_be_planned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(SUITES.parent)
    suite, planner = load_suite(SUITES / "salience.yaml"), RecipePlanner()
    budgets = {name: getattr(entry.method, "budget", None) for name, entry in suite.methods.items()}
    layers, width, inner = 8, 128, 256
    of_lora = layers * suite.methods["LoRA r=4"].method.rank * (4 * 2 * width + 3 * (width + inner))  # type: ignore[union-attr]
    assert {name for name, budget in budgets.items() if budget != of_lora} == {"full", "LoRA r=4"}
    saliences = {getattr(entry.method, "salience", None) for entry in suite.methods.values()}
    assert saliences - {None} == set(SALIENCES) - {"smallest_magnitude"}
    for name in ("full", "LoRA r=4", "gradient", "gradient, anew every 25 steps", "random"):
        plan = planner.plan(suite.training_recipe(name, lr=1e-3, seed=0, output=str(tmp_path)))
        assert plan.peak_bytes > 0


def test_overrides_replace_values_of_a_suite() -> None:
    suite = load_suite(SUITES / "quick.yaml", ["seeds=1", "recipe.run.steps=3"])
    assert (suite.seeds, suite.recipe.run.steps) == (1, 3)


def test_a_recipe_and_a_suite_in_each_other_s_place_are_named() -> None:
    """Each was answered with a list of a dozen missing and unknown keys."""
    recipe, suite = SUITES.parent / "recipes" / "gsm8k.yaml", SUITES / "small.yaml"
    with pytest.raises(UsageError, match=rf"gsm8k\.yaml is a recipe, .*: gradselect train {recipe};"):
        load_suite(recipe)
    with pytest.raises(UsageError, match=rf"small\.yaml is a suite, .*: gradselect compare {suite}$"):
        load_recipe(suite)
