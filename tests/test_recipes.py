"""Every recipe in the repository is valid as it stands, and means what its comments say."""

from __future__ import annotations

from pathlib import Path

import pytest

from gradselect.train import load_recipe

RECIPES = Path(__file__).parents[1] / "recipes"
# A leading underscore marks a part that others name as their base.
WHOLE = sorted(path for path in RECIPES.rglob("*.yaml") if not path.name.startswith("_"))


@pytest.mark.parametrize("path", WHOLE, ids=lambda path: path.stem)
def test_every_recipe_is_valid(path: Path) -> None:
    assert load_recipe(path).run.output


def test_no_two_recipes_write_to_one_folder() -> None:
    outputs = [load_recipe(path).run.output for path in WHOLE]
    assert len(set(outputs)) == len(outputs) > 3


@pytest.mark.parametrize("share", [0.1, 0.2, 0.3])
@pytest.mark.parametrize("model", ["qwen2.5-0.5b", "llama-3.2-1b", "phi-4-mini"])
def test_the_paper_has_three_models_and_three_shares(model: str, share: float) -> None:
    recipe = load_recipe(RECIPES / "paper" / f"{model}.yaml", [f"method.fraction={share}"])
    assert recipe.data.path == "meta-math/MetaMathQA-40K"
    assert recipe.method.name == "adagradselect"
    assert recipe.method.fraction == share


def test_the_recipes_of_the_paper_take_the_same_number_of_examples_a_step() -> None:
    runs = [load_recipe(path).run for path in sorted((RECIPES / "paper").glob("[!_]*.yaml"))]
    assert {run.batch_size * run.accumulation for run in runs} == {16}


@pytest.mark.parametrize(
    "method", ["full", "gradnorm", "uniform", "lora", "rslora", "dora", "lisa", "badam", "grass", "last"]
)
def test_another_method_needs_only_its_own_keys(method: str) -> None:
    needs = {"gradnorm": ["method.count=2"], "uniform": ["method.fraction=0.2"], "grass": ["method.count=2"]}
    recipe = load_recipe(RECIPES / "gsm8k.yaml", [f"method.name={method}", *needs.get(method, [])])
    assert recipe.method.name == method
