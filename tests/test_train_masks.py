"""Methods that train entries, in gradselect train."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from classification_fixtures import classify, write_place
from train_fixtures import assert_same_weights, build, parse, quiet, train_until, weights, write_model, write_sums
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from gradselect import SparseOptimizer, UsageError
from gradselect.app.inputs import read_inputs
from gradselect.app.recipe import load_recipe
from gradselect.app.train import train
from gradselect.app.train.trainer import RunTrainer

# TRL 1.16 uses names that transformers 5.23 has replaced.
pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with models and data; no test changes it."""
    folder = write_place(tmp_path_factory.mktemp("place"))
    write_model(folder / "model")
    write_sums(folder / "sums.jsonl")
    return folder


METHODS: dict[str, dict[str, Any]] = {
    "id3": {"name": "id3", "budget": 60},
    "id3-on-lora": {"name": "id3", "density": 0.1, "adapter": {"rank": 2}},
    "gmt": {"name": "gmt", "fraction": 0.01, "mask": "update"},
    "static": {"name": "static", "density": 0.01, "calibration_batches": 2},
    "static-random": {"name": "static", "salience": "random", "budget": 50, "scope": "tensor"},
    "lift": {"name": "lift", "density": 0.05, "refresh_every": 2},
    "bitfit": {"name": "bitfit", "among": ["*norm*"]},
    "sparsegrad": {"name": "sparsegrad", "density": 0.05, "calibration_batches": 2},
    "meprop": {"name": "meprop", "density": 0.05},
    "mofo": {"name": "mofo", "fraction": 0.01},
    "sparta": {"name": "sparta", "density": 0.01, "among": ["*"]},
    "lora-sp": {"name": "lora-sp", "adapter": {"rank": 2}},
    "lora-sp, each step": {"name": "lora-sp", "refresh_every": 1, "adapter": {"rank": 2}},
    "spt": {"name": "spt", "budget": 400, "rank": 1, "calibration_batches": 2},
}
LARGEST_SHARE = {
    "id3": 60,
    "gmt": 0.04,
    "static": 0.011,
    "static-random": 50,
    "lift": 0.15,
    "meprop": 0.25,
    "mofo": 0.1,
    "sparta": 0.02,
}
"""Maximum number of entries that can have moved, or their share of all; the other methods move whole tensors."""


def optimizer_of(trainer: RunTrainer) -> SparseOptimizer:
    optimizer: Any = trainer.optimizer
    return getattr(optimizer, "optimizer", optimizer)


# What comes out --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_a_mask_moves_what_it_selected_and_leaves_a_plain_checkpoint(place: Path, tmp_path: Path, name: str) -> None:
    recipe = parse(
        place,
        method=METHODS[name],
        optimizer={"weight_decay": 0.3, "schedule": "constant", "warmup": 0},
        run={"output": str(tmp_path / "out")},
    )
    out = train(recipe, console=quiet())
    AutoModelForCausalLM.from_pretrained(out)
    ours, before = weights(out), weights(place / "model")
    assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in before.items()}
    changed = sum(int((ours[key] != before[key]).sum()) for key in ours)
    total = sum(value.numel() for value in ours.values())
    most = LARGEST_SHARE.get(name, 1.0)
    assert 0 < changed <= (most if most > 1 else most * total)
    if name in ("sparsegrad", "meprop"):
        untouched = [key for key in ours if ".mlp." not in key]
        assert all(torch.equal(ours[key], before[key]) for key in untouched)


def test_what_a_mask_did_is_written_down(place: Path, tmp_path: Path) -> None:
    out = train(parse(place, method=METHODS["id3"], run={"output": str(tmp_path / "out")}), console=quiet())
    run = json.loads((out / "run.json").read_text())
    selection = run["selection"]
    assert (selection["mask"], selection["entries"]) == ("ID3", 60)
    assert selection["settings"]["steps"] == 4
    assert sum(selection["entries_by_tensor"].values()) == 60 < selection["entries_to_choose_from"]
    assert run["peak_bytes"]["state_on_device"] <= 12 * 60
    records = [json.loads(line) for line in (out / "records.jsonl").read_text().splitlines()]
    assert [(record["step"], record["num_new"]) for record in records] == [(step, 15) for step in range(4)]
    assert load_recipe(out / "recipe.yaml").method == parse(place, method=METHODS["id3"]).method


def test_what_spt_trains_is_said_with_numbers(place: Path, tmp_path: Path) -> None:
    out = train(parse(place, method=METHODS["spt"], run={"output": str(tmp_path / "out")}), console=quiet())
    run = json.loads((out / "run.json").read_text())
    assert any("SPT trains 400 entries of a budget of 400:" in note for note in run["notes"])
    assert run["selection"]["settings"]["about"] in run["notes"]
    assert run["selection"]["entries"] + run["selection"]["whole_entries"] == 400


@pytest.mark.parametrize("name", METHODS)
def test_a_recipe_with_all_defaults_is_read_back(place: Path, tmp_path: Path, name: str) -> None:
    recipe = parse(place, method=METHODS[name])
    again = parse(place, method=recipe.model_dump(mode="json")["method"])
    assert again == recipe


# Resume ----------------------------------------------------------------------------------------------------------

RESUMED = ["id3-on-lora", "gmt", "static", "sparsegrad", "mofo", "lora-sp, each step", "spt"]


@pytest.mark.parametrize("name", RESUMED)
def test_a_run_that_stops_goes_on_as_if_it_had_not(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    model = {"dtype": "bfloat16"} if name == "gmt" else {}
    length = {"steps": 4, "save_every": 2, "accumulation": 2}
    recipes = [
        parse(place, method=METHODS[name], model=model, run={"output": str(tmp_path / out), **length})
        for out in ("whole", "stopped")
    ]
    train(recipes[0], console=quiet())
    train_until(recipes[1], step=3, monkeypatch=monkeypatch)
    # The checkpoint tells what SPT has chosen.
    monkeypatch.delattr("gradselect.spt.conversion.estimate_scores")
    train(recipes[1], console=quiet(), resume=True)
    assert_same_weights(tmp_path / "whole", tmp_path / "stopped")
    records = [(tmp_path / out / "records.jsonl").read_text() for out in ("whole", "stopped")]
    assert records[0] == records[1]


# The head --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["id3", "id3-on-lora", "gmt", "bitfit", "sparsegrad"])
def test_the_head_of_a_classifier_trains_whole_beside_every_mask(place: Path, tmp_path: Path, name: str) -> None:
    method = METHODS[name] | ({"among": None} if name == "bitfit" else {})
    recipe = classify(place, tmp_path / "out", method=method, optimizer={"warmup": 0}, run={"steps": 2})
    before = {key: value.detach().clone() for key, value in read_inputs(recipe).model.named_parameters()}
    out = train(recipe, console=quiet())
    AutoModelForSequenceClassification.from_pretrained(out)
    after = weights(out)
    assert after.keys() == before.keys()
    assert bool((after["classifier.weight"] != before["classifier.weight"]).all())
    base = [key for key in after if not key.startswith("classifier")]
    assert 0 < sum(int((after[key] != before[key]).sum()) for key in base) < sum(after[key].numel() for key in base) / 2


def test_the_rest_trains_whole_by_choice(place: Path, tmp_path: Path) -> None:
    recipe = classify(place, tmp_path / "out", method={**METHODS["sparsegrad"], "train_rest": True}, run={"steps": 2})
    before = {key: value.detach().clone() for key, value in read_inputs(recipe).model.named_parameters()}
    after = weights(train(recipe, console=quiet()))
    moved = {key for key in after if not torch.equal(after[key], before[key])}
    assert {key for key in after if "attention" in key and "key.bias" not in key} <= moved


# Facts of the run ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("run", "steps"), [({"steps": 7}, 7), ({"steps": None, "epochs": 1.5, "batch_size": 5, "accumulation": 2}, 5)]
)
def test_id3_unmasks_until_the_end_of_the_run(place: Path, tmp_path: Path, run: dict[str, Any], steps: int) -> None:
    trainer, _ = build(place, tmp_path, method=METHODS["id3"], run=run)
    assert optimizer_of(trainer).mask.settings()["steps"] == steps
    trainer.train()
    assert trainer.state.global_step == steps


def test_the_optimizer_of_the_recipe_clips_in_place_of_the_trainer(place: Path, tmp_path: Path) -> None:
    trainer, _ = build(
        place,
        tmp_path,
        method={**METHODS["id3"], "always": ["model.norm.weight"], "lean_accumulation": True},
        optimizer={"lr": 3e-4, "weight_decay": 0.3, "betas": [0.7, 0.8], "eps": 1e-5, "max_grad_norm": 0.5},
        run={"accumulation": 2},
    )
    optimizer = optimizer_of(trainer)
    assert (trainer.args.max_grad_norm, optimizer.max_grad_norm, optimizer.accumulation_steps) == (0.0, 0.5, 2)
    assert {(group["betas"], group["eps"]) for group in optimizer.param_groups} == {((0.7, 0.8), 1e-5)}
    assert "model.norm.weight" not in optimizer.mask.names


def test_estimating_a_mask_disturbs_neither_the_data_nor_the_model(place: Path, tmp_path: Path) -> None:
    first = []
    for name in ("static", "id3"):
        out = train(parse(place, method=METHODS[name], run={"output": str(tmp_path / name)}), console=quiet())
        first.append(json.loads((out / "run.json").read_text())["history"][0]["loss"])
    assert first[0] == first[1]


def test_batches_to_estimate_from_are_drawn_with_the_seed(place: Path, tmp_path: Path) -> None:
    chosen = []
    for number, seed in enumerate((0, 0, 1)):
        method = {"name": "static", "budget": 200, "calibration_batches": 1}
        trainer, _ = build(place, tmp_path / str(number), method=method, run={"seed": seed})
        chosen.append({name: tuple(indices.tolist()) for name, indices in optimizer_of(trainer).entries.items()})
    assert chosen[0] == chosen[1] != chosen[2]


BAD_METHODS = {
    "no budget": ({"name": "id3"}, "give one of them"),
    "density of zero": ({"name": "id3", "density": 0}, r"outside \(0, 1\]"),
    "budget beyond the model": ({"name": "id3", "budget": 10**9}, "more than the"),
    "no such tensor": ({"name": "id3", "budget": 5, "among": ["nix"]}, "'nix' matches no parameter"),
    "no such tensor always": ({"name": "id3", "budget": 5, "always": ["nix"]}, "nix"),
    "no such salience": ({"name": "static", "density": 0.1, "salience": "luck"}, "method.salience = 'luck'"),
    "grasp without batches": ({"name": "static", "density": 0.1, "salience": "grasp"}, "needs batches"),
    "random with batches": (
        {"name": "static", "density": 0.1, "salience": "random", "calibration_batches": 1},
        "reads weights only",
    ),
    "unknown scope": ({"name": "gmt", "scope": "layer"}, "method.scope = 'layer'"),
    "rank and density": ({"name": "lift", "rank": 2, "density": 0.1}, "give one of them"),
    "no biases": ({"name": "bitfit"}, "no trainable parameter is a bias"),
    "density above one": ({"name": "sparsegrad", "density": 2}, "method.density = 2"),
    "no such layer": ({"name": "meprop", "layers": ["nix"]}, "nix"),
    "unknown key of the adapter": (
        {"name": "id3", "budget": 5, "adapter": {"rnk": 2}},
        r"method\.adapter\.rnk: unknown key, did you mean 'rank'",
    ),
    "rank of zero": ({"name": "id3", "budget": 5, "adapter": {"rank": 0}}, r"method\.adapter\.rank = 0"),
    "adapter of a method that has none": ({"name": "meprop", "adapter": {"rank": 2}}, "adapter: unknown key"),
}


@pytest.mark.parametrize(("method", "said"), BAD_METHODS.values(), ids=list(BAD_METHODS))
def test_masks_that_make_no_sense_are_refused(place: Path, tmp_path: Path, method: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        train(parse(place, method=method, run={"output": str(tmp_path / "out")}), console=quiet())
    assert not (tmp_path / "out").exists()
