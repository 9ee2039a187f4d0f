"""`gradselect tune --space adapters` ends in a recipe with an ordinary LoRA that keeps the budget."""

import ast
import json
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model
from train_fixtures import build, parse, quiet, write_recipe

from gradselect import UsageError
from gradselect.app import cli
from gradselect.app.inputs import read_inputs
from gradselect.app.recipe import load_recipe
from gradselect.app.train import train
from gradselect.app.tune import adapters as _adapters
from gradselect.app.tune import tune_adapters

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")
LORA = {"name": "lora", "rank": 2}
RANKS = (1, 2, 4)


def recipe_of(place, tmp_path, **sections):
    run = {"steps": 6, "output": str(tmp_path / "out"), **sections.pop("run", {})}
    return parse(place, **{"data": {"validation": 0.25}, "method": LORA, "run": run, **sections})


def test_what_is_found_has_the_parameters_of_the_recipe_s_rank_and_trains(place, tmp_path):
    recipe = recipe_of(place, tmp_path, run={"accumulation": 2})
    found = tune_adapters(recipe, ranks=RANKS, console=quiet())
    uniform = get_peft_model(read_inputs(recipe).model, recipe.method.peft_config(embedding="", head=()))
    budget = sum(p.numel() for p in uniform.parameters() if p.requires_grad)
    assert found.allocation.budget == budget
    assert 0.9 * budget < found.allocation.num_parameters <= budget
    assert load_recipe(found.path) == found.recipe
    kept = json.loads((found.path.parent / "allocation.json").read_text())
    assert kept["ranks"] == found.allocation.ranks
    options = found.recipe.method.options
    assert LoraConfig(**options).rank_pattern == options["rank_pattern"]
    trainer, _ = build(place, tmp_path / "again", method=found.recipe.method.model_dump())
    assert sum(p.numel() for p in trainer.model.parameters() if p.requires_grad) == found.allocation.num_parameters
    assert train(found.recipe, console=quiet()) == found.path.parent / "best"
    assert (found.path.parent / "best" / "model.safetensors").exists()


def test_the_search_needs_no_optuna(place, tmp_path, monkeypatch):
    """Neither the module nor what it imports from its folder."""
    folder, seen, waiting = Path(_adapters.__file__).parent, set(), {"adapters"}
    while waiting:
        seen.add(name := waiting.pop())
        tree = ast.parse((folder / f"{name}.py").read_text("utf-8"))
        imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        waiting |= {str(node.module) for node in imports if node.level == 1} - seen
        plain = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
        assert not [each for each in [*plain, *(str(node.module) for node in imports)] if each.startswith("optuna")]
    assert "study_folder" in seen
    monkeypatch.setattr("gradselect.app.tune.tuning.find_spec", lambda name: None)
    recipe = recipe_of(place, tmp_path, run={"steps": None, "epochs": 0.5, "batch_size": 4})
    assert tune_adapters(recipe, ranks=RANKS, console=quiet()).allocation.num_steps > 1


def test_checkpointing_does_not_change_what_is_found(place, tmp_path, monkeypatch):
    seen, search = [], _adapters.AdapterSearch

    def watched(model, *rest, **options):
        seen.append(model.base_model.model.is_gradient_checkpointing)
        return search(model, *rest, **options)

    monkeypatch.setattr(_adapters, "AdapterSearch", watched)
    found = [
        tune_adapters(
            recipe_of(place, tmp_path, model={"gradient_checkpointing": checkpointing}, run={"steps": 3}),
            study=tmp_path / str(checkpointing),
            ranks=RANKS,
            console=quiet(),
        ).allocation
        for checkpointing in (False, True)
    ]
    assert seen == [False, True]
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("sections", "complaint"),
    [
        ({"method": {"name": "full"}}, "not of method.name=full; write method.name=lora"),
        ({"method": {"name": "dora"}}, "not of method.name=dora"),
        ({"method": {**LORA, "train_embedding": True}}, "not of method.name=lora with method.train_embedding"),
        ({"data": {}}, r"data\.validation=0\.05"),
        ({"method": {"name": "lora", "rank": 4}}, "there is nothing to search; give less"),
    ],
)
def test_recipes_that_it_cannot_search_are_refused_and_nothing_is_left(place, tmp_path, sections, complaint):
    with pytest.raises(UsageError, match=complaint):
        tune_adapters(recipe_of(place, tmp_path, **sections), ranks=RANKS, console=quiet())
    assert not list((tmp_path / "out-tune").glob("*"))
    assert not (tmp_path / "out-tune" / "best.yaml").exists()


def test_a_folder_holds_one_search(place, tmp_path):
    recipe = recipe_of(place, tmp_path, run={"steps": 1})
    tune_adapters(recipe, ranks=RANKS, console=quiet())
    tune_adapters(recipe, ranks=RANKS, console=quiet())
    with pytest.raises(UsageError, match=r"--space adapters\.budget: None then, 200 now"):
        tune_adapters(recipe, ranks=RANKS, budget=200, console=quiet())


@pytest.mark.parametrize("ranks", [(), (0, 2), (4, 1)])
def test_ranks_that_make_no_sense_are_refused_at_once(place, tmp_path, ranks):
    """None was an IndexError, and 0 an error of PEFT."""
    with pytest.raises(UsageError, match="must be positive and ascend"):
        tune_adapters(recipe_of(place, tmp_path), ranks=ranks, console=quiet())


def test_the_command_shows_budget_and_ranks(place, tmp_path, capsys):
    path = write_recipe(
        place, tmp_path / "r.yaml", data={"validation": 0.25}, method=LORA, run={"output": str(tmp_path / "out")}
    )
    with pytest.raises(SystemExit) as ended:
        cli.main(["tune", str(path), "--space", "adapters", "--ranks", "1,2,4", "--budget", "500"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert "budget     500 parameters" in shown
    assert "ranks 1, 2, 4 or none on 28 layers, at most 4 steps" in shown
    assert "q_proj: rank " in shown
    assert f"gradselect train {tmp_path / 'out-tune' / 'best.yaml'}" in shown.replace("\n", "")


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--space", "layers"], "--space 'layers': there is no such space; write values or adapters"),
        (["--space", "adapters", "--trials", "3"], "--trials belongs to --space values"),
        (["--ranks", "1,4"], "--ranks belongs to --space adapters"),
        (["--space", "adapters", "--ranks", "1;4"], "--ranks '1;4': write ranks with commas between them"),
    ],
)
def test_options_of_the_other_space_are_refused(words, complaint, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["tune", "recipes/gsm8k.yaml", *words])
    assert ended.value.code == 2
    assert complaint in capsys.readouterr().err.replace("\n", " ")
