"""Random weights of a configuration and random tokens: time and memory without a checkpoint or data."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from train_fixtures import ADAGRADSELECT, parse, quiet, write_model, write_sums
from transformers import AutoConfig, AutoModelForCausalLM

from gradselect import UsageError
from gradselect.app.compare.suite import load_suite
from gradselect.app.inputs import read_inputs
from gradselect.app.recipe.load import parse_recipe
from gradselect.app.train import train

# TRL 1.16 uses names that transformers 5.23 has replaced.
pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")

SUITES = Path(__file__).parents[1] / "suites"
SHAPES = {
    "qwen2.5-0.5b": (494_032_768, True),
    "llama-3.2-1b": (1_235_814_400, True),
    "llama-3.2-3b": (3_212_749_824, True),
    "phi-4-mini": (3_836_021_760, True),
}
"""Published numbers of parameters, and True if the head is the embedding."""

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "tie_word_embeddings": True,
}
RANDOM = {"format": "random", "length": 12, "rows": 8}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with only a configuration."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text(json.dumps(CONFIG))
    return folder


def settings(place: Path, **sections: Any) -> dict[str, Any]:
    model = {"path": str(place / "model"), "random_weights": True, **sections.pop("model", {})}
    return {"model": model, "data": {**RANDOM, **sections.pop("data", {})}, **sections}


def weights_of(place: Path, **sections: Any) -> dict[str, torch.Tensor]:
    return read_inputs(parse(place, **settings(place, **sections))).model.state_dict()


# Random weights --------------------------------------------------------------------------------------------------


def test_a_configuration_alone_makes_a_model_in_the_type_asked_for(place: Path) -> None:
    inputs = read_inputs(parse(place, **settings(place, model={"dtype": "bfloat16", "attention": "eager"})))
    assert inputs.model.config.hidden_size == 16
    assert {parameter.dtype for parameter in inputs.model.parameters()} == {torch.bfloat16}
    assert inputs.model.config._attn_implementation == "eager"
    assert inputs.model.lm_head.weight is inputs.model.get_input_embeddings().weight
    assert all(layer.self_attn.q_proj.weight.std() > 0 for layer in inputs.model.model.layers)


def test_the_configuration_may_be_a_file_of_any_name(place: Path, tmp_path: Path) -> None:
    file = tmp_path / "tiny.json"
    file.write_text(json.dumps(CONFIG))
    one, other = weights_of(place), weights_of(place, model={"path": str(file)})
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_weights_follow_the_seed_alone(place: Path) -> None:
    first, again, other = (weights_of(place, run={"seed": seed}) for seed in (1, 1, 2))
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(first[name], again[name])
    assert not torch.equal(first[name], other[name])


def test_weights_that_are_there_are_not_read(tmp_path: Path) -> None:
    write_model(tmp_path / "model", seed=9)
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "model").state_dict()
    drawn = weights_of(tmp_path)
    assert drawn.keys() == read.keys()
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(drawn[name], read[name])


def test_random_weights_can_learn_from_a_file_and_are_kept(tmp_path: Path) -> None:
    """Training from scratch, with the tokenizer beside the configuration."""
    (write_model(tmp_path / "model") / "model.safetensors").unlink()
    write_sums(tmp_path / "sums.jsonl")
    out = train(parse(tmp_path, model={"random_weights": True}), console=quiet())
    assert AutoModelForCausalLM.from_pretrained(out).config.hidden_size == 16


@pytest.mark.parametrize(
    ("path", "message"),
    [("nothing/here.json", "no such file or folder"), ("./nothing", "no such file or folder"), (".", "no config.json")],
)
def test_a_place_without_a_configuration_is_refused(place: Path, tmp_path: Path, path: str, message: str) -> None:
    path = str(tmp_path) if path == "." else path
    with pytest.raises(UsageError, match=message):
        read_inputs(parse(place, **settings(place, model={"path": path})))


@pytest.mark.parametrize("content", ["{", '{"model_type": "no-such-model"}', "{}"])
def test_a_damaged_configuration_is_refused(place: Path, tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UsageError, match="there is no configuration of a model"):
        read_inputs(parse(place, **settings(place, model={"path": str(tmp_path)})))


# Random tokens ---------------------------------------------------------------------------------------------------


def rows_of(place: Path, **sections: Any) -> torch.Tensor:
    examples = read_inputs(parse(place, **settings(place, **sections))).examples
    return torch.tensor(examples.train["input_ids"])


def test_rows_have_the_length_and_the_tokens_asked_for(place: Path) -> None:
    rows = rows_of(place, data={"rows": 64, "length": 20, "vocabulary": 5})
    assert rows.shape == (64, 20)
    assert set(rows.unique().tolist()) == set(range(5))
    assert set(rows_of(place, data={"rows": 200}).unique().tolist()) == set(range(50))


def test_tokens_follow_the_seed_alone(place: Path) -> None:
    torch.manual_seed(5)
    first, again, other = (rows_of(place, run={"seed": seed}) for seed in (1, 1, 2))
    assert first.equal(again)
    assert not first.equal(other)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"vocabulary": 51}, r"data\.vocabulary=51 is more than the model's 50 tokens"),
        ({"length": 33}, r"data\.max_length=33 is more than the model's 32 positions"),
        ({"length": 1}, r"data\.length = 1"),
        ({"rows": 0}, r"data\.rows = 0"),
        ({"path": "x.jsonl"}, r"data\.path: unknown key"),
    ],
)
def test_data_that_do_not_fit_are_refused(place: Path, data: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read_inputs(parse(place, **settings(place, data=data)))


def test_there_is_nothing_to_evaluate_on(place: Path) -> None:
    with pytest.raises(UsageError, match="needs examples to evaluate on"):
        parse(place, **settings(place, run={"evaluate_every": 1}))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_is_measured_and_its_model_is_not_kept(place: Path, tmp_path: Path, dtype: str) -> None:
    shown = io.StringIO()
    run = {"output": str(tmp_path / "out"), "steps": 4, "batch_size": 2}
    recipe = parse(place, **settings(place, method=ADAGRADSELECT, run=run, model={"dtype": dtype}))
    train(recipe, console=Console(file=shown, width=200))
    result = json.loads((tmp_path / "out" / "run.json").read_text())
    assert result["status"] == "finished"
    # Every token of every row is computed and counts.
    assert result["tokens"] == 4 * 2 * RANDOM["length"]
    assert result["training_loss"] > 0
    assert result["seconds"]["training"] > 0
    assert result["data"]["train"]["rows_used"] == RANDOM["rows"]
    assert not list((tmp_path / "out").glob("*.safetensors"))
    assert "is not kept" in shown.getvalue().splitlines()[-1]


def test_rows_are_as_long_in_the_batch(place: Path, tmp_path: Path) -> None:
    from train_fixtures import build

    trainer, _ = build(place, tmp_path, **settings(place))
    for batch in trainer.get_train_dataloader():
        assert batch["input_ids"].shape == batch["labels"].shape == (4, RANDOM["length"])
        assert (batch["labels"] == batch["input_ids"]).all()


# The suites ------------------------------------------------------------------------------------------------------

SUITE_FILES = sorted(SUITES.glob("shapes*.yaml"))


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_are_those_of_the_published_models(name: str) -> None:
    config = AutoConfig.from_pretrained(SUITES / "shapes" / name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    num_parameters, tied = SHAPES[name]
    assert sum(parameter.numel() for parameter in model.parameters()) == num_parameters
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


@pytest.mark.parametrize("file", SUITE_FILES, ids=lambda file: file.stem)
def test_suites_of_shapes_are_valid_and_share_their_methods(file: Path) -> None:
    suite, first = load_suite(file), load_suite(SUITES / "shapes.yaml")
    assert suite.methods == first.methods
    assert suite.name == file.stem
    assert (SUITES.parent / suite.recipe.model.path / "config.json").is_file()
    assert not suite.evaluations
    assert (suite.recipe.model.random_weights, suite.recipe.model.dtype) == (True, "bfloat16")


def test_every_model_has_a_suite() -> None:
    models = [Path(load_suite(file).recipe.model.path).name for file in SUITE_FILES]
    assert set(models) == set(SHAPES)


@pytest.mark.parametrize("name", yaml.safe_load((SUITES / "shapes.yaml").read_text())["methods"])
def test_every_method_of_the_suites_runs_in_tiny_shapes(place: Path, tmp_path: Path, name: str) -> None:
    suite = load_suite(SUITES / "shapes.yaml")
    recipe = suite.training_recipe(name, lr=suite.methods[name].rates[0], seed=0, output=tmp_path / "out")
    values = recipe.model_dump(mode="json")
    values["model"]["path"] = str(place / "model")
    values["data"].update(length=8, rows=8)
    values["run"].update(steps=3, batch_size=2, device="cpu")
    train(parse_recipe(values, source="shapes"), console=quiet())
    result = json.loads((tmp_path / "out" / "run.json").read_text())
    assert sum(figures["steps"] for figures in result["seconds"]["by_kind"].values()) == 3
    assert result["bytes"]["peak"]["together"] > 0
