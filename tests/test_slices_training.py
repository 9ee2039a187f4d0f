"""Training of slices: what the optimizer does with blocks it does with ranges of columns and rows."""

from __future__ import annotations

import copy
import re
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from resume_support import assert_resumes
from slice_support import is_linked, train
from test_integration_transformers import arguments, examples
from test_plan_activations import BATCH, LENGTH, saved_by
from tiny_models import tiny_batch, tiny_llama, tiny_plain, tiny_qwen2
from torch import Tensor, nn
from train_fixtures import assert_same_weights, parse, quiet, train_until, weights, write_model, write_sums
from train_fixtures import build as build_run
from transformers import AutoModelForCausalLM, Trainer

import gradselect as gs
from gradselect.app.train import train as train_recipe
from gradselect.integrations.compile import compile_blocks
from gradselect.integrations.transformers import SelectiveOptimizerFactory, SelectiveTraining
from gradselect.planning.activations import ActivationCounter
from gradselect.planning.meta_forward import Rows, meta_copy
from gradselect.slices import SlicedLinear, sliced_linears

# TRL 1.16 uses names that transformers 5.23 has replaced.
pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")

NUM_STEPS = 8
POLICY = gs.AdaGradSelect(count=5, delta=9.0, explore_steps=3)


def build(by: str, *, model: nn.Module | None = None, policy: Any = POLICY, **options: Any) -> Any:
    """Return a sliced model and its optimizer."""
    model = tiny_qwen2(layers=2) if model is None else model
    blocks = gs.partition(model, by=by, parts=4)  # type: ignore[arg-type]
    return model, gs.BlockOptimizer(model, policy, **{"lr": 1e-2, "blocks": blocks, **options})


def step(model: nn.Module, optimizer: gs.BlockOptimizer, number: int) -> tuple[str, ...]:
    """Take a step; return the selected blocks."""
    (record,) = train(model, optimizer, [number])
    return record.selected


def copied(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


# Against the plain model ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["columns", "rows"])
@pytest.mark.parametrize("options", [{}, {"update_in_backward": True}, {"rule": gs.AdamWRule(fused=True)}], ids=str)
def test_slices_train_as_parts_of_whole_gradients(by: str, options: dict[str, Any]) -> None:
    """The twin takes the whole gradients of the plain model, and steps torch's AdamW on copies of the selected slices.

    To rounding, because products of fewer columns may add in another order. What is not selected stays bit for bit.
    """
    plain = tiny_qwen2(layers=2)
    model, optimizer = build(by, model=copy.deepcopy(plain), policy=gs.Cyclic(every=1), **options)
    own = dict(model.named_parameters())
    twins = {name: nn.Parameter(parameter.detach().clone()) for name, parameter in own.items()}
    undecayed = [twin for twin in twins.values() if twin.ndim < 2]
    decayed = [twin for twin in twins.values() if twin.ndim > 1]
    adamw = torch.optim.AdamW([{"params": decayed}, {"params": undecayed, "weight_decay": 0.0}], lr=1e-2)
    for number in range(NUM_STEPS):
        before = copied(model)
        selected = step(model, optimizer, number)
        plain.zero_grad()
        plain(**tiny_batch(plain, seed=number)).loss.backward()
        adamw.zero_grad()
        moved = {name for block in selected for name in optimizer._table.members[block]}
        for name in moved:
            twins[name].grad = part(plain, model, name, lambda tensor: tensor.grad).clone()
        adamw.step()
        with torch.no_grad():
            for name in own:
                part(plain, model, name, lambda tensor: tensor.detach()).copy_(twins[name])
        for name, parameter in own.items():
            torch.testing.assert_close(parameter, twins[name], rtol=1e-4, atol=1e-5)
        check_untouched(model, before, moved)
        # the twin goes on from the same bits: at this rate Adam makes much of the last digit of a small gradient
        with torch.no_grad():
            for name, parameter in own.items():
                twins[name].copy_(parameter)
            plain.load_state_dict(model.state_dict())


def part(plain: nn.Module, sliced: nn.Module, name: str, of: Any) -> Tensor:
    """Return the part of a plain model's parameter, or of its gradient, that a parameter of the sliced model is."""
    path, _, own = name.rpartition(".")
    module = sliced.get_submodule(path)
    if not isinstance(module, SlicedLinear) or own == "bias":
        return of(plain.get_parameter(name))
    region = module.checkpoint_regions[own]
    return of(plain.get_parameter(f"{path}.weight")).narrow(region.dim, region.first, region.end - region.first)


def check_untouched(model: nn.Module, before: dict[str, Tensor], moved: set[str]) -> None:
    """Every entry that is in no moved parameter has its bits of before."""
    after = model.state_dict()
    for path, module in sliced_linears(model).items():
        for own, region in module.checkpoint_regions.items():
            one, other = (
                tensors[f"{path}.weight"].narrow(region.dim, region.first, region.end - region.first)
                for tensors in (before, after)
            )
            assert torch.equal(one, other) == (f"{path}.{own}" not in moved)


def test_explore_steps_stream_and_select_by_the_norms_of_the_slices() -> None:
    model, optimizer = build("columns", policy=gs.GradNormTopK(count=3))
    twin = copy.deepcopy(model)
    selected = step(model, optimizer, 0)
    twin(**tiny_batch(twin, seed=0)).loss.backward()
    norms = {
        block.name: float(torch.cat([each.grad.flatten() for each in block.parameters]).norm())
        for block in gs.partition(twin, by="columns", parts=4)
    }
    assert set(selected) == set(sorted(norms, key=lambda name: -norms[name])[:3])
    assert optimizer.last_record.norms == pytest.approx(norms, rel=1e-4)


def test_gradients_in_an_explore_step_are_freed_while_it_runs() -> None:
    """Streaming top-k: at most `keep + 1` blocks hold gradients, and none keeps the memory of a freed one."""
    for by in ("columns", "rows"):
        model, optimizer = build(by, policy=gs.GradNormTopK(count=2))
        model(**tiny_batch(model, seed=0)).loss.backward()
        held = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        assert len(held) <= 14
        assert all(gradient.untyped_storage().nbytes() == gradient.nbytes for gradient in held)
        optimizer.step()


# Resume, masters, residency, rules -----------------------------------------------------------------------------------

RUNS = {
    "columns": ("columns", torch.float32, {}),
    "rows, offload": ("rows", torch.float32, {"residency": gs.Offload()}),
    "bf16 with masters": ("columns", torch.bfloat16, {"residency": gs.Offload()}),
    "bf16, drop, in backward": ("rows", torch.bfloat16, {"residency": gs.Drop(), "update_in_backward": True}),
    "8 bits": ("columns", torch.float32, {"rule": gs.AdamW8bitRule()}),
    "a class of torch": ("columns", torch.float32, {"rule": gs.TorchRule(torch.optim.Adafactor)}),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_resumes_at_every_step_to_the_bit(name: str) -> None:
    """From a plain checkpoint: the model is cut anew, then the optimizer's state is loaded."""
    by, dtype, options = RUNS[name]

    def built(plain: dict[str, Tensor] | None) -> tuple[nn.Module, Any]:
        model = tiny_qwen2(layers=2, dtype=dtype)
        if plain is not None:
            model.load_state_dict(plain)
        return build(by, model=model, **options)

    assert_resumes(built, step, num_steps=NUM_STEPS)


def test_another_number_of_parts_is_another_run() -> None:
    model, optimizer = build("columns")
    step(model, optimizer, 0)
    other = tiny_qwen2(layers=2)
    blocks = gs.partition(other, by="columns", parts=2)
    with pytest.raises(gs.UsageError, match="the checkpoint is of another run: blocks"):
        gs.BlockOptimizer(other, POLICY, blocks=blocks).load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("by", ["columns", "rows"])
def test_the_bytes_of_the_state_are_those_of_the_selected_slices(by: str) -> None:
    policy = gs.Fixed((f"layer.1.{by}.2",))
    model, optimizer = build(by, policy=policy, residency=gs.Offload())
    step(model, optimizer, 0)
    size = sum(parameter.numel() for parameter in optimizer._table.of(f"layer.1.{by}.2"))
    assert optimizer.memory()["state_on_device"] == 2 * 4 * size
    assert optimizer.memory()["weights"] == sum(4 * parameter.numel() for parameter in model.parameters())
    blocks = gs.partition(model, by=by, parts=4)  # type: ignore[arg-type]
    planned = gs.plan(model, policy, batch_size=2, sequence_length=8, blocks=blocks, residency=gs.Offload())
    assert planned.bytes.state_on_device == 2 * 4 * size
    assert planned.bytes.gradients == 4 * size
    largest = max(parameter.numel() for parameter in optimizer._table.of(f"layer.1.{by}.2"))
    assert planned.steps[0].moments["update"].workspace == 8 * largest + (4 * size if by == "columns" else 0)
    assert is_linked(model)


@pytest.mark.parametrize("by", ["columns", "rows"])
@pytest.mark.parametrize("active", ["_0", "_[13]", "layers.1.*_2", "*"])
def test_planned_activations_are_those_that_autograd_saves(by: str, active: str) -> None:
    model: Any = tiny_qwen2(layers=2).train()
    model.config.use_cache = False
    gs.partition(model, by=by, parts=4)  # type: ignore[arg-type]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(fnmatchcase(name, f"*{active}"))
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert names
    counted = ActivationCounter(meta_copy(model)).count(names, Rows(batch=BATCH, length=LENGTH))
    assert counted.whole == saved_by(model)


def test_columns_keep_less_for_the_backward_pass_than_whole_layers() -> None:
    kept = {}
    for by in ("layer", "columns", "rows"):
        model = tiny_llama(layers=2)
        blocks = gs.partition(model, by=by)  # type: ignore[arg-type]
        fixed = ("layer.*",) if by == "layer" else (f"layer.*.{by}.0",)
        plan = gs.plan(model, gs.Fixed(fixed), batch_size=2, sequence_length=8, blocks=blocks)
        kept[by] = plan.bytes.activations
    assert kept["columns"] < 0.8 * kept["rows"]
    assert kept["rows"] <= kept["layer"]


# Patches -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["columns", "rows"])
@pytest.mark.parametrize("sliced", [True, False])
def test_a_copy_follows_by_patches_under_plain_names(by: str, sliced: bool) -> None:
    follower = tiny_qwen2(layers=2)
    model, optimizer = build(by, policy=gs.Uniform(count=2))
    names = set(follower.state_dict())
    if sliced:
        gs.partition(follower, by="columns", parts=3)
    for number in range(NUM_STEPS):
        step(model, optimizer, number)
        patch = optimizer.changed_entries()
        assert names.issuperset(patch)
        assert patch.num_bytes < patch.model_bytes / 2
        gs.delta.apply_patch(follower, patch)
        assert same(copied(follower), copied(model))


# Compilation ---------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0:RuntimeWarning")  # torch's own, and this:
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # torch's own
def test_slices_are_refused_in_a_compiled_model() -> None:
    """Each new set of slices would compile anew. A layer that is compiled later is found before the first step."""
    model, optimizer = build("columns", model=tiny_plain(layers=2))
    with pytest.raises(gs.UsageError, match=r"linear layers are cut into slices.*torch.compile"):
        compile_blocks(model)
    with torch._dynamo.config.patch(recompile_limit=8):
        model.compile(backend="eager")
        with pytest.raises(gs.UsageError, match=r"torch.compile.*gs.join_slices\(model\)"):
            step(model, optimizer, 0)
        torch._dynamo.reset()
    optimizer.close()
    with pytest.raises(gs.UsageError, match=r"torch.compile"):
        build("columns", model=model)


# Trainer -------------------------------------------------------------------------------------------------------------

METHOD = {"name": "uniform", "count": 4, "blocks": "columns", "parts": 4, "residency": "offload"}


def trainer(folder: Any, **settings: Any) -> Trainer:
    return Trainer(
        tiny_llama(layers=2),
        arguments(folder, **settings),
        train_dataset=examples(16),
        eval_dataset=examples(2),
        callbacks=[SelectiveTraining(method=METHOD)],
    )


def test_a_trainer_saves_plain_weights_resumes_and_loads_the_best(tmp_path: Any) -> None:
    settings = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    whole_run = trainer(tmp_path / "one", **settings)
    whole_run.train()
    expected = copied(whole_run.model)
    resumed = trainer(tmp_path / "two", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "one" / "checkpoint-4"))
    assert same(copied(resumed.model), expected)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "one" / "checkpoint-6")
    assert same(copied(saved), expected)
    best = trainer(tmp_path / "three", **settings, load_best_model_at_end=True, learning_rate=0.5)
    best.train()
    loaded = AutoModelForCausalLM.from_pretrained(best.state.best_model_checkpoint)
    assert same(copied(loaded), copied(best.model))
    assert gs.join_slices(best.model) == 14


@pytest.mark.parametrize("sliced", [True, False])
def test_a_trainer_that_will_shard_refuses_slices(sliced: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(AcceleratorState._shared_state, "fsdp_plugin", object())
    model = tiny_llama(layers=2)
    options: dict[str, Any] = {"method": METHOD}
    if sliced:
        options = {"policy": gs.Uniform(count=1), "blocks": gs.partition(model, by="rows", parts=2)}
    with pytest.raises(gs.UsageError, match=r"FSDP shards the weights.*method.blocks in a recipe"):
        SelectiveOptimizerFactory()(model, lr=1e-3, **options)


# Page ----------------------------------------------------------------------------------------------------------------


def test_the_code_of_the_page_runs(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parent.parent / "docs" / "slices.md").read_text("utf-8")
    model = tiny_llama()
    names = {"gs": gs, "model": model, "loader": [tiny_batch(model, seed=seed) for seed in range(3)]}
    for code in re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL):
        exec(code, names)
    assert (tmp_path / "tuned" / "model.safetensors").exists()
    limits = re.findall(r"^\| 1/(\d+) \| (\d\.\d\d) \|$", page, re.MULTILINE)
    assert len(limits) == 3
    for parts, limit in limits:
        assert float(limit) == pytest.approx(6 / (4 + 2 / int(parts)), abs=0.005)


# Recipe --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("slices")
    write_model(folder / "model")
    write_sums(folder / "sums.jsonl")
    return folder


@pytest.mark.parametrize("blocks", ["columns", "rows"])
def test_a_recipe_trains_slices_writes_plain_weights_and_resumes(
    place: Any, tmp_path: Any, blocks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = {"name": "uniform", "count": 4, "blocks": blocks, "parts": 4, "among": [f"layer.*.{blocks}.*"]}
    recipes = [
        parse(place, method=method, run={"output": str(tmp_path / out), "steps": 4, "save_every": 1})
        for out in ("whole", "stopped")
    ]
    train_recipe(recipes[0], console=quiet())
    ours, before = weights(tmp_path / "whole"), weights(place / "model")
    assert ours.keys() == before.keys()
    changed = {name for name in ours if not torch.equal(ours[name], before[name])}
    assert changed
    assert all("_proj" in name for name in changed)
    train_until(recipes[1], step=2, monkeypatch=monkeypatch)
    train_recipe(recipes[1], console=quiet(), resume=True)
    assert_same_weights(tmp_path / "whole", tmp_path / "stopped")


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"name": "uniform", "count": 1, "parts": 8}, "method.parts=8 is a number of slices, and method.blocks=layer"),
        ({"name": "uniform", "count": 1, "blocks": "rows", "parts": 1}, "method.parts=1 makes no slices"),
        ({"name": "uniform", "count": 1, "blocks": "rows", "parts": 0}, "method.parts"),
        ({"name": "uniform", "count": 1, "blocks": "row"}, "method.blocks"),
    ],
)
def test_bad_settings_are_refused(place: Any, method: dict[str, Any], message: str) -> None:
    with pytest.raises(gs.UsageError, match=message):
        parse(place, method=method)


def test_eight_parts_are_the_default(place: Any, tmp_path: Any) -> None:
    made, _ = build_run(place, tmp_path / "out", method={"name": "uniform", "count": 1, "blocks": "columns"})
    assert "layer.0.columns.7" in made.create_optimizer().blocks
