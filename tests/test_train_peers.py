"""Methods beyond single policies and masks: MISA on matrices, AdaLoRA, SHiRA, and peers."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from train_fixtures import build, parse, quiet, weights
from transformers import AutoModelForCausalLM, TrainerCallback

from gradselect import UsageError
from gradselect.app.recipe import AdaLoraMethod
from gradselect.app.train import train
from gradselect.app.train.adalora import OrthogonalityPenalty
from gradselect.app.train.meter import training_bytes
from gradselect.integrations.transformers.adalora import ranks

pytestmark = [
    # TRL 1.16 uses names that transformers 5.23 has replaced.
    pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled:UserWarning"),
    # A matrix that has lost all its ranks is taken for a shard.
    pytest.mark.filterwarnings("ignore:Adapter 'default'.*have invalid shape"),
    pytest.mark.filterwarnings("ignore:BAdam expect model to be loaded in fp16:UserWarning"),
]
BADAM = {"name": "badam-package", "every": 2, "order": "ascending"}
NO_WARMUP = {"lr": 1e-2, "warmup": 0, "schedule": "constant"}
GALORE = {"name": "galore", "rank": 4, "refresh": 2}
ADALORA = {"name": "adalora", "rank": 2, "initial_rank": 4, "every": 2, "start": 0.1, "end": 0.6}


def require(package: str) -> None:
    try:
        importlib.import_module(package)
    except ImportError as error:
        pytest.skip(f"{package} cannot be used ({error}): pip install 'gradselect[peers]'")


def run(place: Path, output: Path, **sections: Any) -> dict[str, Any]:
    settings = {"output": str(output), "steps": 6, **sections.pop("run", {})}
    train(parse(place, run=settings, **sections), console=quiet())
    return json.loads((output / "run.json").read_text())


def changed(place: Path, output: Path) -> set[str]:
    ours, before = weights(output), weights(place / "model")
    assert ours.keys() == before.keys()
    return {name for name in ours if not torch.equal(ours[name], before[name])}


# MISA ------------------------------------------------------------------------------------------------------------


def test_misa_trains_matrices_of_layers(place: Path, tmp_path: Path) -> None:
    result = run(place, tmp_path / "out", method={"name": "misa", "share": 0.1, "every": 2})
    selection = result["selection"]
    names = {selection["blocks"][place] for step in selection["selected"] for place in step}
    assert len(names) > 1
    assert changed(place, tmp_path / "out") == {f"model.layers.{name.removeprefix('layer.')}.weight" for name in names}
    assert result["flop"]["limit"] > 1
    assert result["bytes"]["peak"]["state_on_host"] == 0


def test_any_policy_can_select_matrices(place: Path, tmp_path: Path) -> None:
    method = {"name": "uniform", "count": 3, "blocks": "matrix", "among": ["*_proj"]}
    selection = run(place, tmp_path / "out", method=method)["selection"]
    assert all(len(step) == 3 for step in selection["selected"])
    assert "layer.3.mlp.down_proj" in selection["blocks"]


def test_the_last_layers_are_whole_in_matrices_too(place: Path, tmp_path: Path) -> None:
    run(place, tmp_path / "out", method={"name": "last", "count": 1, "blocks": "matrix"})
    assert {name.split(".")[2] for name in changed(place, tmp_path / "out")} == {"3"}


# Adapters --------------------------------------------------------------------------------------------------------


class RanksOverTime(TrainerCallback):
    def __init__(self, model: Any) -> None:
        self.model = model
        self.totals: list[int] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.totals.append(sum(ranks(self.model).values()))


def test_ranks_of_adalora_fall_to_the_rank_asked_for(place: Path, tmp_path: Path) -> None:
    trainer, _ = build(place, tmp_path, method=ADALORA, run={"steps": 20})
    seen = RanksOverTime(trainer.model)
    num_matrices = len(ranks(seen.model))
    trainer.add_callback(seen)
    trainer.train()
    assert num_matrices == 4 * 7
    assert seen.totals[1] == 4 * num_matrices
    assert seen.totals[-1] == 2 * num_matrices
    # Between two allocations a singular value may come back; from the end of the fall on none does.
    allocated = [*seen.totals[4:12:2], *seen.totals[12:]]
    assert allocated == sorted(allocated, reverse=True)
    assert len(set(allocated)) > 2
    assert len(set(ranks(seen.model).values())) > 1


def test_steps_of_epochs_set_the_schedule_too(place: Path, tmp_path: Path) -> None:
    trainer, _ = build(place, tmp_path, method=ADALORA, run={"steps": None, "epochs": 2})
    trainer.train()
    model: Any = trainer.model
    assert model.active_peft_config.total_step == trainer.state.max_steps == 12
    assert sum(ranks(model).values()) == 2 * len(ranks(model))


def test_adalora_merges_into_a_plain_model(place: Path, tmp_path: Path) -> None:
    result = run(place, tmp_path / "out", method=ADALORA)
    assert result["status"] == "finished"
    assert all("_proj" in name for name in changed(place, tmp_path / "out"))
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_the_penalty_is_zero_for_orthogonal_factors_and_weighted(place: Path, tmp_path: Path) -> None:
    trainer, _ = build(place, tmp_path, method=ADALORA, run={"steps": 20})
    model: Any = trainer.model
    penalty, double = (OrthogonalityPenalty(model, weight=weight) for weight in (0.5, 1.0))
    assert double().item() == pytest.approx(2 * penalty().item())
    for name, factor in model.named_parameters():
        if ".lora_A." in name or ".lora_B." in name:
            torch.nn.init.orthogonal_(factor)
    assert penalty().item() < 1e-5


def test_the_penalty_counts_once_a_step_whatever_the_accumulation(place: Path, tmp_path: Path) -> None:
    """All examples of the file in one step, so that order and length do not matter."""
    losses = {}
    for accumulation, weight in ((1, 0.0), (1, 5.0), (4, 5.0)):
        output = tmp_path / f"{accumulation}-{weight}"
        batch = {"batch_size": 24 // accumulation, "accumulation": accumulation, "steps": 6}
        history = run(place, output, method={**ADALORA, "orthogonality": weight}, run=batch)["history"]
        losses[accumulation, weight] = history[0]["loss"]
    assert losses[1, 5.0] > losses[1, 0.0] + 1
    # Another order of summation.
    assert losses[4, 5.0] == pytest.approx(losses[1, 5.0], rel=1e-4)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"initial_rank": 2}, "initial_rank=2 must be above rank=2"),
        ({"start": 0.6}, r"start=0\.6 must be below end=0\.6"),
    ],
)
def test_a_schedule_of_adalora_that_falls_nowhere_is_refused(place: Path, method: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse(place, method={**ADALORA, **method})


def test_a_run_too_short_for_adalora_is_refused_before_it_begins(place: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"of 1 steps leave no step for ranks to fall"):
        build(place, tmp_path, method=ADALORA, run={"steps": 1})


def test_adalora_by_the_name_of_peft_is_refused_because_its_ranks_would_stay(place: Path) -> None:
    with pytest.raises(UsageError, match=r"ranks fall only with name=adalora"):
        parse(place, method={"name": "peft", "type": "AdaLora", "options": {"total_step": 10}})


@pytest.mark.parametrize("init", ["eva", "lora_ga"])
def test_an_init_that_looks_at_data_is_refused_because_it_would_be_a_plain_lora(place: Path, init: str) -> None:
    with pytest.raises(UsageError, match=rf"init_lora_weights='{init}' starts from gradients or activations of data"):
        parse(place, method={"name": "peft", "type": "LORA", "options": {"init_lora_weights": init}})


def test_the_default_ranks_have_the_ratio_of_pefts_defaults() -> None:
    from peft import AdaLoraConfig

    theirs = AdaLoraConfig(total_step=1000)
    assert AdaLoraMethod(name="adalora", rank=theirs.target_r).first_rank == theirs.init_r


def test_shira_trains_a_few_entries_and_merges(place: Path, tmp_path: Path) -> None:
    method = {"name": "peft", "type": "SHIRA", "options": {"r": 2, "target_modules": ["q_proj", "down_proj"]}}
    run(place, tmp_path / "out", method=method)
    names = changed(place, tmp_path / "out")
    assert names == {
        f"model.layers.{layer}.{name}.weight" for layer in range(4) for name in ("self_attn.q_proj", "mlp.down_proj")
    }
    ours, before = weights(tmp_path / "out"), weights(place / "model")
    for name in names:
        num_changed = int((ours[name] != before[name]).sum())
        assert 0 < num_changed <= 2 * sum(ours[name].shape)


# Peers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_badam_package_trains_one_layer_after_another(place: Path, tmp_path: Path, dtype: str) -> None:
    require("badam")
    result = run(place, tmp_path / "out", method=BADAM, model={"dtype": dtype}, run={"steps": 3}, optimizer=NO_WARMUP)
    # Its first block trains one step less than asked for, the second the other two.
    moved = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).state_dict()
    base = AutoModelForCausalLM.from_pretrained(place / "model", dtype=getattr(torch, dtype)).state_dict()
    layers = {name.split(".")[2] for name in moved if not moved[name].equal(base[name].float())}
    assert layers == {"0", "1"}
    peak = result["bytes"]["peak"]
    # It keeps float32 copies of the active layer, whatever the model's type, and their moments.
    assert 0 < peak["masters"] < peak["state_on_device"] * 0.51
    assert peak["state_on_device"] == 2 * peak["masters"]
    assert result["selection"] is None


def test_galore_projects_gradients_of_layers_and_trains_everything(place: Path, tmp_path: Path) -> None:
    require("galore_torch")
    result = run(place, tmp_path / "out", method=GALORE)
    assert changed(place, tmp_path / "out") == set(weights(place / "model"))
    full = run(place, tmp_path / "full", method={"name": "full"})
    ours, theirs = (side["bytes"]["peak"]["state_on_device"] for side in (result, full))
    assert 0 < ours < theirs


def test_bytes_of_galores_projections_are_counted(place: Path, tmp_path: Path) -> None:
    require("galore_torch")
    trainer, inputs = build(place, tmp_path, method=GALORE)
    trainer.train()
    optimizer: Any = trainer.optimizer
    counted = training_bytes(inputs.model, optimizer.optimizer)["state_on_device"]
    moments = matrices = 0
    for state in optimizer.optimizer.state.values():
        moments += sum(state[name].numel() for name in ("exp_avg", "exp_avg_sq"))
        matrices += state["projector"].ortho_matrix.numel() if "projector" in state else 0
    assert matrices > 0
    assert counted == 4 * (moments + matrices)


@pytest.mark.parametrize("method", [BADAM, GALORE], ids=lambda method: method["name"])
def test_peers_get_the_optimizer_settings_of_the_recipe(place: Path, tmp_path: Path, method: dict[str, Any]) -> None:
    require({"badam-package": "badam", "galore": "galore_torch"}[method["name"]])
    settings = {"lr": 3e-4, "weight_decay": 0.3, "betas": [0.7, 0.8], "eps": 1e-5, "schedule": "constant", "warmup": 0}
    trainer, _ = build(place, tmp_path, method=method, optimizer=settings, run={"steps": 2})
    trainer.train()
    optimizer: Any = trainer.optimizer
    inner = getattr(optimizer.optimizer, "base_optimizer", optimizer.optimizer)
    for group in inner.param_groups:
        assert (group["lr"], tuple(group["betas"]), group["eps"]) == (3e-4, (0.7, 0.8), 1e-5)
        assert group["weight_decay"] == 0.3


@pytest.mark.parametrize(("method", "package"), [(BADAM, "badam"), (GALORE, "galore_torch")])
def test_a_peer_that_is_not_installed_says_what_to_type(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: dict[str, Any], package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UsageError, match=r"pip install 'gradselect\[peers\]'"):
        build(place, tmp_path, method=method)


@pytest.mark.parametrize("method", [BADAM, GALORE, ADALORA], ids=lambda method: method["name"])
def test_what_could_not_resume_writes_no_checkpoints(place: Path, tmp_path: Path, method: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"cannot resume from a checkpoint.*write run\.save_every=null"):
        build(place, tmp_path, method=method, run={"save_every": 2})
