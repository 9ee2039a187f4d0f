"""Every recipe in the repository is valid as it stands, and means what its comments say."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gradselect import UsageError
from gradselect.app.inputs.examples import render_examples
from gradselect.app.recipe import load_recipe
from gradselect.app.recipe.load import read_values

SHARED = Path(os.environ.get("GRADSELECT_SHARED", Path(__file__).parents[2] / "shared"))
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
    "method",
    [
        "full",
        "gradnorm",
        "uniform",
        "lora",
        "rslora",
        "dora",
        "ether",
        "etherplus",
        "propulsion",
        "lisa",
        "badam",
        "grass",
        "last",
    ],
)
def test_another_method_needs_only_its_own_keys(method: str) -> None:
    needs = {"gradnorm": ["method.count=2"], "uniform": ["method.fraction=0.2"], "grass": ["method.count=2"]}
    recipe = load_recipe(RECIPES / "gsm8k.yaml", [f"method.name={method}", *needs.get(method, [])])
    assert recipe.method.name == method


MASKS = {
    "id3": ["method.density=0.01"],
    "gmt": [],
    "static": ["method.density=0.01"],
    "lift": ["method.rank=32"],
    "bitfit": [],
    "sparsegrad": [],
    "meprop": [],
}


@pytest.mark.parametrize("method", MASKS)
def test_every_mask_needs_only_its_own_keys(method: str) -> None:
    overrides = [f"method.name={method}", *MASKS[method]]
    assert load_recipe(RECIPES / "gsm8k.yaml", overrides).method.name == method
    if method not in ("sparsegrad", "meprop"):
        on_lora = load_recipe(RECIPES / "gsm8k.yaml", [*overrides, "method.adapter.rank=4"]).method
        assert on_lora.model_dump()["adapter"]["rank"] == 4


GLUE = {
    "cola": ("0", "1"),
    "rte": ("entailment", "not_entailment"),
    "mrpc": ("0", "1"),
    "stsb": None,
    "sst2": ("0", "1"),
}


@pytest.mark.parametrize("task", GLUE)
def test_the_recipes_of_glue_read_its_files(task: str) -> None:
    folder = SHARED / "data" / f"glue_{task}"
    if not folder.is_dir():
        pytest.skip(f"no {folder}; set GRADSELECT_SHARED")
    files = [f"data.path={folder / 'dev.tsv'}", f"data.validation={folder / 'dev.tsv'}", "data.limit=50"]
    recipe = load_recipe(RECIPES / "glue" / f"{task}.yaml", [*files, "data.validation_limit=50"])
    examples = render_examples(recipe.data, seed=0)
    rows = examples.rows["train"]
    assert len(rows) == 50
    assert examples.labels == GLUE[task]
    assert all(len(row["text"]) > 5 for row in rows)
    assert all((row["text_pair"] is None) == (task in ("cola", "sst2")) for row in rows)


def test_of_several_bases_later_ones_go_over_earlier_ones(tmp_path: Path) -> None:
    text = {
        "a": "model: {path: a, dtype: float32}\nrun: {steps: 3, seed: 1}\n",
        "b": "model: {path: b}\nrun: {epochs: 2}\n",
        "c": "base: [a.yaml, b.yaml]\nrun: {seed: 5}\n",
        "d": "base: [a.yaml, d.yaml]\n",
    }
    for name, content in text.items():
        (tmp_path / f"{name}.yaml").write_text(content, encoding="utf-8")
    values = read_values(tmp_path / "c.yaml", kind="recipe", sections=())
    assert values == {"model": {"path": "b", "dtype": "float32"}, "run": {"seed": 5, "epochs": 2}}
    with pytest.raises(UsageError, match=r"d\.yaml is its own base"):
        read_values(tmp_path / "d.yaml", kind="recipe", sections=())
